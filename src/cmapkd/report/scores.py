"""Scores as tables: every model that was measured on the same data, with intervals where there are seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cmapkd.compare.metric import metric_digits
from cmapkd.config import counted
from cmapkd.evaluation.headline import headlines, remark_on_retrieval, retrieval_set
from cmapkd.evaluation.tasks import Headline
from cmapkd.report.arms import Arm, Mean, mean_of
from cmapkd.report.blocks import Block, Cell, Figure, Figures, Paragraph, Remarks, Table
from cmapkd.report.figures import Dot, Mark, dots, gap_bar, scatter, shown
from cmapkd.report.plain import mapping, number, sequence, string, whole
from cmapkd.report.read import ExportFolder, ReportData, ScoresFile, model_name

ROLES = ("teacher", "student", "baseline")
COLOUR = {"student": 0, "teacher": 1, "baseline": 2, "export": 3, "model": 4}

_RETRIEVAL = (
    ("I→T R@1", ("retrieval", "i2t", "r@1")),
    ("I→T R@5", ("retrieval", "i2t", "r@5")),
    ("I→T R@10", ("retrieval", "i2t", "r@10")),
    ("T→I R@1", ("retrieval", "t2i", "r@1")),
    ("T→I R@5", ("retrieval", "t2i", "r@5")),
    ("T→I R@10", ("retrieval", "t2i", "r@10")),
)
_FURTHER = (
    ("ECE, %", ("calibration", "ece")),
    ("image GMACs", ("efficiency", "shown", "image_gmacs")),
    ("ms/image", ("efficiency", "image", "latency_ms", "1", "median")),
    ("ms/text", ("efficiency", "text", "latency_ms", "1", "median")),
)

_TIMED = {  # as `cmapkd export` runs each file
    "onnx": "onnxruntime had one thread.",
    "openvino": "OpenVINO had one thread.",
    "executorch": "ExecuTorch had as many threads as it takes by itself.",
    "torch": "The model in torch had as many threads as torch takes.",
}


@dataclass(frozen=True, slots=True)
class Measured:
    """A model with its scores on one source.

    Attributes:
        scores: one a seed.
        megabytes: of its weights, and what they are; latency: milliseconds of image and text at batch 1.
        runtime: that an exported file was timed in, or `torch`, beside which it was timed.
    """

    label: str
    role: str
    data: str | None
    scores: tuple[Mapping[str, Any], ...]
    parameters: float | None = None
    megabytes: float | None = None
    latency: tuple[float, float] | None = None
    runtime: str | None = None

    def mean(self, *path: str) -> Mean | None:
        return mean_of(self.scores, *path)

    @property
    def size(self) -> str | None:
        """How many images and captions the scores are of, in all seeds; of retrieval where there is any."""
        sizes = dict.fromkeys(filter(None, (retrieval_set(scores) or _scored(scores) for scores in self.scores)))
        return "; ".join(sizes) or None


def _scored(scores: Mapping[str, Any]) -> str | None:
    """What scores without retrieval are of, in the words of `retrieval_set`."""
    images, captions = (whole(scores, "scored", key) for key in ("images", "captions"))
    if images is None:
        return None
    asked = whole(scores, "scored", "questions")
    parts = [(images, "image"), (asked, "question"), (captions, "caption")]
    return ", ".join(counted(number, name) for number, name in parts if number)


def measured_models(data: ReportData, arms: Sequence[Arm]) -> list[Measured]:
    """Every model of every path. A teacher that several arms share stands once."""
    found: list[Measured] = []
    for arm in arms:
        for role in ROLES:
            scores = arm.scores(role)
            if role == "teacher":
                scores = scores[:1]  # a frozen model is measured once
            if not scores:
                continue
            each = Measured(_label(arm, role, len(arms)), role, arm.data, scores, *_size(scores[0]))
            if not any(_same(each, other) for other in found):
                found.append(each)
    for export in data.exports:
        found += _of_export(export)
    for file in data.scores:
        found += _of_file(file)
    return found


def _label(arm: Arm, role: str, num_arms: int) -> str:
    name = {
        "teacher": model_name(arm.first.config, "teacher") or "teacher",
        "student": arm.method,
        "baseline": arm.baseline_name,
    }[role]
    where = f", {arm.name}" if num_arms > 1 and role != "teacher" else ""
    return f"{role} ({name}{where})"


def _size(
    scores: Mapping[str, Any], *, files: bool = False
) -> tuple[float | None, float | None, tuple[float, float] | None]:
    """Parameters, megabytes in float32 or of exported files, and latency where it was measured.

    Args:
        files: whether the model is read from exported files, whose numbers may be narrower than float32.
    """
    parameters = number(scores, "params")
    stored = number(scores, "efficiency", "file_bytes", "fp32") or number(scores, "efficiency", "file_bytes", "files")
    megabytes = stored / 1e6 if stored else None if parameters is None or files else 4 * parameters / 1e6
    image, text = (number(scores, "efficiency", tower, "latency_ms", "1", "median") for tower in ("image", "text"))
    return parameters, megabytes, None if image is None or text is None else (image, text)


def _same(each: Measured, other: Measured) -> bool:
    return (each.role, each.label, each.data, each.scores) == (other.role, other.label, other.data, other.scores)


def _of_export(export: ExportFolder) -> list[Measured]:
    """The model and each precision, as parity.json has them."""
    name = string(export.manifest, "model") or export.name
    data = string(export.parity, "scored_on")
    files = [each for each in sequence(export.parity, "files") if isinstance(each, Mapping)]
    scores = mapping(export.parity, "scores")
    precisions = dict.fromkeys(filter(None, (string(each, "precision") for each in files)))
    found = []
    for precision in [*(["torch"] if "torch" in scores else []), *precisions]:
        own = {string(each, "tower"): each for each in files if string(each, "precision") == precision}
        sizes = [number(each, "bytes") for each in own.values()]
        times = [number(own.get(tower), "milliseconds") for tower in ("vision_model", "text_model")]
        if precision == "torch":
            first = {string(each, "tower"): each for each in files}
            times = [number(first.get(tower), "model_milliseconds") for tower in ("vision_model", "text_model")]
        image, text = times
        known = [size for size in sizes if size is not None]
        found.append(
            Measured(
                f"export {precision} ({name})" if precision != "torch" else f"as exported, in torch ({name})",
                "export",
                data,
                (mapping(scores, precision),) if mapping(scores, precision) else (),
                number(scores, "torch", "params"),
                sum(known) / 1e6 if known and len(known) == len(sizes) else None,
                None if image is None or text is None else (image, text),
                "torch" if precision == "torch" else export.form,
            )
        )
    return found


def _of_file(file: ScoresFile) -> list[Measured]:
    data = string(file.content, "data")
    found = []
    for name, scores in mapping(file.content, "models").items():
        size = _size(mapping(scores), files=name.startswith("onnx:"))
        found.append(Measured(f"{name} ({file.name})", "model", data, (mapping(scores),), *size))
    return found


# ------------------------------------------------------------------------------------------------ blocks


def score_blocks(models: Sequence[Measured]) -> list[Block]:
    """One table for each source and size: recall among 300 pictures does not stand in one column with that of 1,000."""
    blocks: list[Block] = []
    scored = [each for each in models if any(_has_scores(scores) for scores in each.scores)]
    for data, size in dict.fromkeys((each.data, each.size) for each in scored):
        rows = [each for each in scored if (each.data, each.size) == (data, size)]
        blocks.append(_table(rows, data))
        blocks += [Remarks(remarks)] if (remarks := _remarks(rows)) else []
        if (figure := _figure(rows)) is not None:
            blocks.append(figure)
    return blocks


def _has_scores(scores: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Mapping) for key, value in scores.items() if key not in ("efficiency", "scored"))


def _table(rows: Sequence[Measured], data: str | None) -> Table:
    columns = _columns(rows)
    seeds = max(len(each.scores) for each in rows)
    size = rows[0].size
    caption = f"Scores on {data or 'unnamed data'}" + (f": {size}" if size else "")
    note = "Scores are percent, where their head names no other unit." + (
        " Below a mean over seeds stands its 95 % t interval over seeds." if seeds > 1 else ""
    )
    heads = ["model", *(["seeds"] if seeds > 1 else []), *columns, *_cost_heads(rows)]
    table = []
    for each in rows:
        cells = [Cell(each.label, tone="good" if each.role == "student" else "")]
        cells += [Cell(str(len(each.scores)), len(each.scores))] if seeds > 1 else []
        cells += [_cell(each.mean(*path), digits=_digits(path)) for path in columns.values()]
        table.append(cells + _cost_cells(each, rows))
    return Table(caption, heads, table, note=note)


def _columns(rows: Sequence[Measured]) -> dict[str, tuple[str, ...]]:
    """Heads and paths of the scores that any model has: recall both ways, the headlines, calibration, MACs."""
    columns: dict[str, tuple[str, ...]] = dict(_RETRIEVAL)
    for each in rows:
        for scores in each.scores:
            for task, (headline, _) in headlines(mapping(scores)).items():
                columns[headline.head] = (task, *headline.path)
    columns |= {head: path for head, path in _FURTHER if head.startswith(("ECE", "image"))}
    return {head: path for head, path in columns.items() if any(each.mean(*path) for each in rows)}


def _digits(path: tuple[str, ...]) -> int:
    """Decimals of a column; 3 of GMACs."""
    return 3 if path[-1] == "image_gmacs" else metric_digits(".".join(path))


def _cell(mean: Mean | None, *, digits: int = 1) -> Cell:
    if mean is None:
        return Cell("-")
    below = "" if mean.interval is None else " to ".join(f"{bound:z.{digits}f}" for bound in mean.interval)
    return Cell(f"{mean.value:z.{digits}f}", mean.value, below)


def _cost_heads(rows: Sequence[Measured]) -> list[str]:
    heads = ["parameters", "MB"]
    return heads + ["ms/image", "ms/text"] * any(each.latency for each in rows)


def _cost_cells(each: Measured, rows: Sequence[Measured]) -> list[Cell]:
    cells = [
        Cell("-") if each.parameters is None else Cell(f"{each.parameters:,.0f}", each.parameters),
        Cell("-") if each.megabytes is None else Cell(f"{each.megabytes:.2f}", each.megabytes),
    ]
    if any(other.latency for other in rows):
        cells += [Cell("-"), Cell("-")] if each.latency is None else [Cell(f"{ms:.2f}", ms) for ms in each.latency]
    return cells


def _remarks(rows: Sequence[Measured]) -> list[str]:
    """What retrieval found unusual of the data."""
    return list(dict.fromkeys(filter(None, (remark_on_retrieval(scores) for each in rows for scores in each.scores))))


def _figure(rows: Sequence[Measured]) -> Figures | None:
    """Dots of each headline, a model a line."""
    figures = []
    known = [headlines(mapping(scores)) for each in rows for scores in each.scores]
    for task in dict.fromkeys(task for each in known for task in each):
        headline = next(each[task][0] for each in known if task in each)
        places = [(each, mean) for each in rows if (mean := each.mean(task, *headline.path)) is not None]
        if len(places) > 1:
            points = [
                Dot(
                    each.label,
                    mean.value,
                    mean.interval,
                    mean.values if len(mean.values) > 1 else (),
                    COLOUR[each.role],
                )
                for each, mean in places
            ]
            figures.append(dots(f"{headline.head}", points, unit=headline.unit, least=_least(headline)))
    return Figures(figures) if figures else None


def gap_blocks(arms: Sequence[Arm]) -> list[Block]:
    """How far each arm comes from the baseline to the teacher."""
    blocks: list[Block] = []
    figures: list[Figure] = []
    for arm in arms:
        gap, path, headline = arm.gap(), arm.headline_path(), arm.headline()
        means = [None if path is None else arm.mean(role, *path) for role in ("baseline", "student", "teacher")]
        start, own, end = means
        if gap is None or headline is None or start is None or own is None or end is None:
            continue
        low_high = (
            ""
            if gap.interval is None
            else f", 95 % interval over seeds {gap.interval[0]:z.0f} to {gap.interval[1]:z.0f} %"
        )
        blocks.append(
            Paragraph(
                f"{arm.name} closes {gap.value:z.0f} % of the gap in {headline.head} from {arm.baseline_name} to the "
                f"teacher{low_high}. 0 % is the baseline and 100 % the teacher."
            )
        )
        bars = ((arm.baseline_name, start.value), ("student", own.value), ("teacher", end.value))
        figures.append(gap_bar(f"{headline.head}: {arm.name}", *bars))
    return [*blocks, *([Figures(figures)] if figures else [])]


def cost_blocks(models: Sequence[Measured]) -> list[Block]:
    """Size against score, and latency with its quartiles."""
    blocks: list[Block] = []
    figures = []
    for data, size in dict.fromkeys((each.data, each.size) for each in models):
        sized = [each for each in models if (each.data, each.size) == (data, size) and each.megabytes]
        scored = [(each, found) for each in sized if (found := _first_headline(each)) is not None]
        for headline in dict.fromkeys(headline for _, (headline, _) in scored):
            marks = [
                Mark(each.label, each.megabytes or 0.0, value, COLOUR[each.role])
                for each, (of, value) in scored
                if of == headline
            ]
            if len(marks) > 1:
                unit, least = _axis(headline), _least(headline)
                name = f"Size and score on {data}"
                figures.append(scatter(name, marks, x_unit="MB of weights", y_unit=unit, least=least))
    for tower in ("image", "text"):
        timed = [(each, *_quartiles(each, tower)) for each in models]
        rows = [
            Dot(each.label, middle, interval, (), COLOUR[each.role])
            for each, middle, interval in timed
            if middle is not None
        ]
        if rows:
            figures.append(dots(f"Latency of one {tower}", rows, unit="ms, median and quartiles"))
    blocks += [Figures(figures)] if figures else []
    if not any(each.latency for each in models):
        text = (
            "Latency was not measured: run cmapkd evaluate MODEL... --tasks efficiency --json FILE, and name FILE too."
        )
        blocks.append(Paragraph(text, "quiet"))
    if timed_in := dict.fromkeys(each.runtime for each in models if each.runtime and each.latency):
        told = [_TIMED[runtime] for runtime in timed_in if runtime in _TIMED]
        blocks.append(Paragraph(" ".join(["Latency of exports is that of a batch of one.", *told])))
    if hardware := dict.fromkeys(filter(None, map(_hardware, models))):
        blocks.append(Paragraph(f"Latency measured on {'; '.join(hardware)}."))
    return blocks


def _axis(headline: Headline) -> str:
    """Head and unit, of which one may name the other."""
    if headline.unit == "percent":
        return f"{headline.head}, %"
    return headline.unit if headline.unit.startswith(headline.head) else headline.head


def _least(headline: Headline) -> float:
    """The least range of an axis: smaller differences are not drawn large."""
    return 0.1 if headline.unit == "bits per byte" else 5.0


def _first_headline(each: Measured) -> tuple[Headline, float] | None:
    """The first headline that all seeds have, and its mean."""
    known = [headlines(mapping(scores)) for scores in each.scores]
    task = next((task for task in (known[0] if known else {}) if all(task in other for other in known)), None)
    return None if task is None else (known[0][task][0], sum(other[task][1] for other in known) / len(known))


def _quartiles(each: Measured, tower: str) -> tuple[float | None, tuple[float, float] | None]:
    scores = each.scores[0] if each.scores else {}
    path = ("efficiency", tower, "latency_ms", "1")
    middle, low, high = (number(scores, *path, key) for key in ("median", "q1", "q3"))
    if middle is None and each.latency is not None:
        return each.latency[tower == "text"], None
    return middle, None if low is None or high is None else (low, high)


def _hardware(each: Measured) -> str | None:
    scores = each.scores[0] if each.scores else {}
    device, threads = string(scores, "efficiency", "device"), whole(scores, "efficiency", "threads")
    return None if device is None else f"{device}, {threads} thread{'s'[: threads != 1]}"


def times_smaller(large: float | None, small: float | None) -> str | None:
    """How many times smaller, where it is by 5 % or more."""
    return None if not large or not small or large / small < 1.05 else shown(large / small, 2)
