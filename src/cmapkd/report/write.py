"""`write_report`: from paths to a page on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import cmapkd
from cmapkd.config import ConfigError
from cmapkd.config.disk import write_text
from cmapkd.report.arms import Arm, arms_of
from cmapkd.report.blocks import Block, Paragraph, Section
from cmapkd.report.classes import calibration, confusions
from cmapkd.report.compared import comparison_sections
from cmapkd.report.curves import training_blocks, weight_blocks
from cmapkd.report.exported import export_blocks
from cmapkd.report.gallery import gallery as gallery_blocks
from cmapkd.report.origins import data_blocks, origin_blocks, reproduce_blocks
from cmapkd.report.page import Page, missing, render, section
from cmapkd.report.questioned import Questioned, answer_blocks
from cmapkd.report.read import ReportData, RunFolder, read_paths
from cmapkd.report.scores import cost_blocks, gap_blocks, measured_models, score_blocks
from cmapkd.report.verdict import arm_about, arm_verdict, comparison_verdict
from cmapkd.report.watch import NothingToWatch, Watched, watch

_ABOUT = 5  # arms that are described above the verdict


def write_report(
    paths: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    gallery: int = 6,
    data: str | None = None,
    split: str = "val",
    images: bool = True,
    captions: bool = True,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Writes one self-contained page on runs, comparisons, exports and files of scores.

    Args:
        paths: run folders, comparison folders, export folders, and files of `cmapkd evaluate --json`, in any mixture;
            one alone needs no list.
        out: the page; one that stands there is replaced.
        gallery: cards of each outcome; with 0 no model is loaded, and the page takes seconds.
        data: pictures of the gallery; None: the run's validation source. Never its test data, unless this names them.
        split: of a source that has several.
        images, captions: whether the page shows any.
        seed: of the draw of the cards. Equal files, arguments and seed give equal bytes.
        say: told what takes long.
    Returns:
        `out`.
    Raises:
        ConfigError: a path or an argument is wrong.
        DiskError: `out` cannot be written.
    """
    given = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    out = Path(out)
    _refuse(out, gallery, data, split)
    read = read_paths(given)
    arms = arms_of(read.runs)
    absent: list[str] = []
    watched = _watched(arms, gallery, data, split, absent, say or _silent)
    looked: list[Section] = []
    if watched is not None:
        looked = _looked(watched, cards=gallery, seed=seed, images=images, captions=captions)
    if watched is not None and watched.test:
        absent.append(f"The gallery shows test data ({watched.source.name}): choose nothing by it.")
    command = _command(given, out, gallery, data, split, images, captions, seed)
    sections = _sections(read, arms, looked, command)
    about = [arm_about(arm) for arm in arms[:_ABOUT]]
    page = Page(read.title, about, _verdicts(read, arms), read.notes, [*sections, missing(absent)], cmapkd.__version__)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, render(page), again="write the page again")
    return out


def _refuse(out: Path, gallery: int, data: str | None, split: str) -> None:
    """Raises ConfigError where the arguments cannot be followed, before anything is read."""
    if gallery < 0:
        raise ConfigError(f"gallery is {gallery}: give the number of cards of each outcome, or 0 for none")
    if not gallery and (data is not None or split != "val"):
        given = "--split" if data is None else "--data"
        raise ConfigError(f"{given} chooses the pictures of the gallery, and --gallery 0 asks for none: leave one out")
    if out.is_dir():
        raise ConfigError(f"{out} is a folder: name a file, such as {out / 'report.html'}")
    if out.exists() and out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"{out} is there and is no page: name a new file, or one that ends in .html")


def _silent(_: str) -> None:
    """For callers that show no progress."""


def _verdicts(read: ReportData, arms: Sequence[Arm]) -> list[tuple[str, Sequence[Paragraph]]]:
    """Each with its name, where there are several."""
    named: list[tuple[str, Callable[[], Sequence[Block]]]] = []
    named += [(arm.name, partial(arm_verdict, arm)) for arm in arms]
    named += [(each.name, partial(comparison_verdict, each)) for each in read.comparisons]
    verdicts: list[tuple[str, Sequence[Paragraph]]] = []
    for name, build in named:
        blocks = section("verdict", "", build).blocks
        said = [block for block in blocks if isinstance(block, Paragraph)]
        verdicts.append((name if len(named) > 1 else "", said))
    return verdicts


def _sections(
    read: ReportData, arms: Sequence[Arm], looked: Sequence[Section], command: Sequence[str]
) -> list[Section]:
    """All parts, in the order in which they are read; empty ones are left out by the page."""
    models = measured_models(read, arms)
    compared = [part for place, each in enumerate(read.comparisons, 1) for part in comparison_sections(each, place)]
    return [
        section("scores", "Scores", lambda: score_blocks(models)),
        section("gap", "Gap closed", lambda: gap_blocks(arms)),
        *compared,
        section("cost", "Cost", lambda: cost_blocks(models) if models else []),
        section("training", "Training", lambda: training_blocks(arms)),
        section("weights", "Learned weights", lambda: weight_blocks(arms)),
        *looked,
        section("exports", "Exports", lambda: export_blocks(read.exports)),
        section("data", "Data", lambda: data_blocks(read.runs)),
        section("origins", "Where the numbers come from", lambda: origin_blocks(read)),
        section("reproduce", "Reproduce", lambda: reproduce_blocks(read, arms, command)),
    ]


def _watched(
    arms: Sequence[Arm], gallery: int, data: str | None, split: str, absent: list[str], say: Callable[[str], None]
) -> Watched | Questioned | None:
    """The models of the first run that is finished, on pictures; or why not, in `absent`."""
    runs: list[RunFolder] = [run for arm in arms for run in arm.runs]
    if not runs:
        if data is not None:
            raise ConfigError("--data chooses the pictures of a run's gallery, and no run folder is named")
        return None
    if not gallery:
        names = " ".join(str(run.path) for run in runs[:1])
        absent.append(
            f"A gallery of examples, with confusions and calibration of classes: cmapkd report {names} --gallery 6"
        )
        return None
    run = next((run for run in runs if run.finished), runs[0])
    try:
        watched = watch(run, data=data, split=split, say=say)
    except NothingToWatch as error:
        absent.append(f"A gallery of examples: {error}.")
        return None
    absent += watched.notes
    if len(runs) > 1:
        absent.append(f"Galleries of the other runs: the one here is of {run.name}.")
    return watched


def _looked(watched: Watched | Questioned, *, cards: int, seed: int, images: bool, captions: bool) -> list[Section]:
    if isinstance(watched, Questioned):
        drawn = partial(answer_blocks, watched, cards=cards, seed=seed, images=images, captions=captions)
        return [section("gallery", "Answers to look at", drawn)]

    def cards_drawn() -> list[Block]:
        return gallery_blocks(watched, cards=cards, seed=seed, images=images, captions=captions)

    return [
        section("gallery", "Gallery of retrievals", cards_drawn),
        section("confusions", "Zero-shot confusions", lambda: confusions(watched)),
        section("calibration", "Calibration", lambda: calibration(watched)),
    ]


def _command(
    paths: Sequence[Path],
    out: Path,
    gallery: int,
    data: str | None,
    split: str,
    images: bool,
    captions: bool,
    seed: int,
) -> list[str]:
    words = ["cmapkd", "report", *map(str, paths), "--out", str(out), "--gallery", str(gallery)]
    words += ["--data", data] if data is not None else []
    words += ["--split", split] if split != "val" else []
    words += ["--seed", str(seed)] if seed else []
    return words + ["--no-images"] * (not images) + ["--no-captions"] * (not captions)
