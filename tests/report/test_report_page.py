"""Reports: the numbers are the files' numbers, strangers' text stays text, damaged folders give a page that says so."""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_support import CLASSES, HOSTILE, write_pictures, write_run

from cmapkd.cli import main
from cmapkd.config import ConfigError
from cmapkd.report import write_report
from cmapkd.report.arms import arms_of
from cmapkd.report.figures import COLOURS, Curve, lines, thinned
from cmapkd.report.read import read_paths
from cmapkd.report.verdict import arm_verdict

sys.path.insert(0, str(Path(__file__).parents[1]))
from family_support import FAMILIES, make

from compare_support import PretendedRuns, compare_pretended, write_recipe

HOLE = "could not be made"  # what a section says whose part is damaged


class Elements(HTMLParser):
    """Elements, attributes and texts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


def sentences(run: Path) -> list[str]:
    return [each.text for arm in arms_of(read_paths([run]).runs) for each in arm_verdict(arm)]


def changed(run: Path, out: Path, **metrics: Any) -> Path:
    """A copy of a run's files, without its models, with other metrics."""
    out.mkdir()
    for file in run.iterdir():
        if file.is_file():
            shutil.copy(file, out)
    content = json.loads((run / "metrics.json").read_text()) | metrics
    (out / "metrics.json").write_text(json.dumps(content))
    return out


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pictures(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, source: str) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "hostile <b>run", source=source)


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "report.html"
    return write_report([run], out, gallery=40).read_text(encoding="utf-8")  # every query


def test_numbers_are_those_of_metrics_json(run: Path, page: str) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    table = page[page.index('id="scores"') :].partition("</table>")[0]
    rows = {
        re.findall(r"<bdi>(\w+)", row)[0]: re.findall(r'data-value="([^"]+)"', row)
        for row in table.partition("<tbody>")[2].split("</tr>")[:-1]
    }
    for role in ("teacher", "student", "baseline"):
        scores, numbers = metrics[role], [float(each) for each in rows[role]]
        retrieval = scores["retrieval"]
        expected = [retrieval[way][f"r@{k}"] for way in ("i2t", "t2i") for k in (1, 5, 10)]
        expected += [retrieval["mean_r@1"], scores["zero_shot"]["top1"], scores["params"], 4 * scores["params"] / 1e6]
        assert numbers == pytest.approx(expected)
    assert f"{metrics['student']['retrieval']['num_images']} images" in page
    assert HOLE not in page


def test_strangers_text_stays_text(page: str) -> None:
    elements = Elements(page)
    assert not {"i", "u", "b", "iframe", "object", "link", "base", "embed"} & elements.names
    assert page.count("<script") == 1
    assert not [name for _, name, _ in elements.attributes if name.startswith("on")]
    addresses = [value for _, name, value in elements.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert all(value.startswith(("data:image/webp;base64,", "#")) for value in addresses)
    for text in (HOSTILE[0], HOSTILE[2], HOSTILE[3], CLASSES[0]):
        assert text in elements.text
    assert "\u202e" not in page
    assert "\x00" not in page
    assert "\x1b" not in page
    assert "x" * 281 not in page
    assert "/home/somebody" not in page
    assert 'id="gallery"' in page
    assert 'id="weights"' in page
    assert 'id="confusions"' in page


@pytest.mark.parametrize(("end", "blocks"), [(1.0, 0), (1.03, 3), (3.0, 2)])
def test_weights_are_shown_where_a_weighting_chose_any(tmp_path: Path, end: float, blocks: int) -> None:
    """Equal weights from first to last are the weighting `uniform`: no section, and no word of a failed selection."""
    from cmapkd.report.arms import Arm
    from cmapkd.report.curves import weight_blocks
    from cmapkd.report.read import RunFolder

    log = [{"step": step, "visual/weight/P2": 1.0, "visual/weight/P5": each} for step, each in ((1, 1.0), (9, end))]
    run = RunFolder(tmp_path, {}, {}, {}, tuple(log), (), (), ())
    assert len(weight_blocks([Arm((run,))])) == blocks


def test_pictures_are_scored_by_the_runs_own_texts_of_classes(tmp_path: Path) -> None:
    from cmapkd.report.read import RunFolder
    from cmapkd.report.watch import _settings

    own = {"templates": "none", "class_prompts": "own", "class_names": "names.txt", "batch_size": 8}
    settings = _settings(RunFolder(tmp_path, {}, {"evaluation": own}, {}, (), (), (), ()), 5)
    assert {key: getattr(settings, key) for key in own} == own


def test_only_figures_make_markup() -> None:
    import cmapkd.report

    folder = Path(cmapkd.report.__file__).parent
    makers = {path.name for path in folder.glob("*.py") if re.search(r"Markup\(|\bescape\(", path.read_text())}
    assert makers == {"figures.py"}
    template = (folder / "template" / "page.html").read_text()
    assert "safe" not in re.findall(r"\|\s*(\w+)", template)
    assert "autoescape" not in template


def test_the_script_is_the_one_that_the_policy_names(page: str) -> None:
    import base64
    import hashlib

    policy = re.search(r"script-src 'sha256-([^']+)'", page)
    script = re.search(r"<script>(.*)</script>", page, re.S)
    assert policy is not None
    assert script is not None
    assert base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode() == policy[1]


def test_equal_files_and_seed_give_equal_bytes(run: Path, tmp_path: Path) -> None:
    pages = [
        write_report([run], tmp_path / "report.html", gallery=1, seed=seed).read_text(encoding="utf-8")
        for seed in (0, 0, 1)
    ]
    assert pages[0] == pages[1]
    cards = [re.findall(r'class="id"><bdi>(.*?)</bdi>', each) for each in pages]
    assert cards[0] != cards[2]


def test_the_groups_hold_every_query(run: Path, page: str) -> None:
    table = re.search(r"All queries by outcome</bdi>.*?</table>", page, re.S)
    assert table is not None
    counts = [float(each) for each in re.findall(r'data-value="([^"]+)"', table[0])]
    retrieval = json.loads((run / "metrics.json").read_text())["student"]["retrieval"]
    assert sum(counts[::2]) == retrieval["num_texts"]
    assert sum(counts[1::2]) == retrieval["num_images"]
    right = counts[2] + counts[4]  # student right: alone, and both
    assert 100 * right / retrieval["num_texts"] == pytest.approx(retrieval["t2i"]["r@1"], abs=0.01)


def test_captions_of_classes_are_right_for_every_picture_of_the_class(tmp_path: Path) -> None:
    """Where most captions are said of several pictures, another picture of the same class is no wrong answer."""
    source = write_pictures(tmp_path / "data", count=9, captions=("a photo of a cat.", "a photo of a dog."))
    kept = (tmp_path / "data" / "val.jsonl").read_text(encoding="utf-8").splitlines()[::2]  # one caption a picture
    (tmp_path / "data" / "val.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    folder = write_run(tmp_path / "run", source=source)
    page = write_report([folder], tmp_path / "page.html", gallery=4).read_text(encoding="utf-8")
    assert "A caption is right for every picture of which the same is said." in page
    assert "also said of this picture" not in page
    assert "✓ same caption" in page
    assert "✗ same caption" not in page


def test_without_pictures_and_captions(run: Path, tmp_path: Path) -> None:
    page = write_report([run], tmp_path / "a.html", gallery=1, images=False).read_text(encoding="utf-8")
    assert "<img" not in page
    assert "red cat near tree" in page
    page = write_report([run], tmp_path / "b.html", gallery=1, captions=False).read_text(encoding="utf-8")
    assert "<img" in page
    assert "red cat near tree" not in page


# ------------------------------------------------------------------------------------------------ verdicts


def test_worse_than_scratch_comes_first(run: Path, tmp_path: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["student"]["retrieval"]["mean_r@1"], metrics["baseline"]["retrieval"]["mean_r@1"] = 8.1, 9.2
    said = sentences(changed(run, tmp_path / "worse", **metrics))
    assert "worse than the same student trained alone: R@1 8.1 against 9.2 (-1.1 points)" in said[0]
    assert "one seed: chance is not excluded" in said[-1]
    assert len(said) <= 3


def test_no_baseline_says_how_to_get_one(run: Path, tmp_path: Path) -> None:
    said = sentences(changed(run, tmp_path / "alone", baseline=None, gap_closed=None))
    assert any("set baseline: scratch" in each for each in said)
    assert len(said) <= 3


def test_seeds_give_intervals_and_a_lead_may_not_be_resolved(run: Path, tmp_path: Path) -> None:
    base = json.loads((run / "metrics.json").read_text())
    folders = []
    for seed, (own, alone) in enumerate([(20.0, 10.0), (22.0, 11.0), (27.0, 12.0)]):
        metrics = json.loads(json.dumps(base))
        metrics["student"]["retrieval"]["mean_r@1"], metrics["baseline"]["retrieval"]["mean_r@1"] = own, alone
        metrics["teacher"]["retrieval"]["mean_r@1"] = 60.0
        metrics |= {"seed": seed, "gap_closed": (own - alone) / (60.0 - alone)}
        folders.append(changed(run, tmp_path / f"seed{seed}", **metrics))
    arms = arms_of(read_paths(folders).runs)
    assert [arm.seeds for arm in arms] == [(0, 1, 2)]
    said = [each.text for each in arm_verdict(arms[0])]
    assert said[0].startswith("The student keeps 38 % of the teacher's R@1 (23.0 of 60.0)")
    half = 4.302653 * 7**0.5 / 3**0.5  # of the differences 10, 11 and 15: their deviation is the root of 7
    assert f"by 12.0 points of R@1 ({12 - half:+.1f} to {12 + half:+.1f})" in said[1]
    assert "means of 3 seeds" in said[2]
    page = write_report(folders, tmp_path / "r.html", gallery=0).read_text(encoding="utf-8")
    assert "95 % t interval over seeds" in page
    assert HOLE not in page
    content = json.loads((folders[2] / "metrics.json").read_text())
    content["student"]["retrieval"]["mean_r@1"] = 60.0
    (folders[2] / "metrics.json").write_text(json.dumps(content))
    assert any("not resolved" in each.text for each in arm_verdict(arms_of(read_paths(folders).runs)[0]))


def test_a_stopped_run_says_how_far_it_came(run: Path, tmp_path: Path) -> None:
    stopped = changed(run, tmp_path / "stopped")
    (stopped / "metrics.json").unlink()
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 901, "lo')  # as a kill leaves it
    page = write_report([stopped], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "This run is not finished" in page
    assert "step 900 of 900" in page
    assert "there is no student that loads" in page
    assert 'id="training"' in page
    assert "lines of" not in page  # a line cut short at the end is no damage


# ------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metrics.json", b"{"),
        ("metrics.json", b"\xff\xfe\x00"),
        ("metrics.json", b"[1, 2]"),
        ("metrics.json", b'{"student": 3, "teacher": [], "gap_closed": "much", "bad_samples": 7}'),
        ("metrics.json", b'{"student": {"retrieval": {"i2t": 1e999, "mean_r@1": NaN}}, "seed": 1e400}'),
        ("metrics.json", b'{"student": {"retrieval": ' + b"[" * 5_000 + b"]" * 5_000 + b"}}"),
        ("config.yaml", b"a: [1"),
        ("config.yaml", b"teacher: {name: [1, 2]}\ntraining: 7\ndata: none\nbaseline: [x]\n"),
        ("metrics.jsonl", b'[]\n{"step": "x", "loss": {}}\n\xff\n{"step": 1, "loss": NaN}\n' * 3),
        ("environment.json", b'{"packages": 3, "command": [1, {}], "gpus": "x", "git_commit": 7}'),
        ("bad_samples.jsonl", b'{"id": 1}\n{"reason": ["x"]}\n7\n'),
        ("student/weights.safetensors", b"none"),
    ],
)
def test_damaged_files_give_a_page(run: Path, tmp_path: Path, file: str, content: bytes) -> None:
    damaged = changed(run, tmp_path / "damaged")
    (damaged / file).parent.mkdir(exist_ok=True)
    (damaged / file).write_bytes(content)
    page = write_report([damaged], tmp_path / "r.html", gallery=1).read_text(encoding="utf-8")
    assert HOLE not in page
    assert 'class="sentence' in page


def mutated(value: Any, draws: random.Random) -> Any:
    """Plain data with some values of another kind."""
    if draws.random() < 0.04:
        return draws.choice([None, "text", -1, 1e308, [], {}, [None], {"": 0}, True, "9" * 400])
    if isinstance(value, dict):
        return {key: mutated(each, draws) for key, each in value.items()}
    return [mutated(each, draws) for each in value] if isinstance(value, list) else value


def test_files_of_any_content_give_a_page(
    run: Path, compared: Path, exported: Path, scored: Path, tmp_path: Path
) -> None:
    for number in range(30):
        draws = random.Random(number)
        folders = []
        for kind, name in ((run, "metrics.json"), (compared, "results.json"), (exported, "parity.json")):
            folder = tmp_path / f"{number}-{name}"
            folder.mkdir()
            content = json.loads((kind / name).read_text())
            (folder / name).write_text(json.dumps(mutated(content, draws)))
            folders.append(folder)
        file = tmp_path / f"{number}.json"
        content = json.loads(scored.read_text())
        file.write_text(json.dumps(content | {"models": {"a": mutated(content["models"]["a"], draws)}}))
        page = write_report([*folders, file], tmp_path / "r.html", gallery=0).read_text(encoding="utf-8")
        assert HOLE not in page, re.findall(r"This part could not.*", page)


def test_wrong_paths_are_refused_in_words(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no"):
        write_report([tmp_path / "none"], tmp_path / "r.html")
    with pytest.raises(ConfigError, match="holds no run, comparison or export"):
        write_report([tmp_path], tmp_path / "r.html")
    with pytest.raises(ConfigError, match="is a folder: name a file"):
        write_report([run], tmp_path)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds no scores"):
        write_report([tmp_path / "x.json"], tmp_path / "r.html")
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl"):
        write_report([run], tmp_path / "r.html", data="jsonl:nowhere.jsonl")
    assert not (tmp_path / "r.html").exists()


# ------------------------------------------------------------------------------------------------ other folders


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of pretended runs, one of which failed."""

    def score(config: Any) -> float:
        if config.method.name == "hinton" and config.seed == 3:
            raise ValueError("the loss is <b>not</b> finite")
        lead = {"clip_kd": 9.0, "hinton": -4.0}.get(config.method.name, 0.0)
        return 30.0 + lead + random.Random(f"{config.method.name} {config.seed}").gauss(0, 1)

    folder = tmp_path_factory.mktemp("comparison")
    declared = [{"arm": "clip_kd", "against": "contrastive", "smallest": 1.0}]
    declared.append({"arm": "hinton", "against": "contrastive"})
    with pytest.MonkeyPatch.context() as patch:
        runs = PretendedRuns(score, curve={20: 0.5, 40: 1.0})
        compare_pretended(
            write_recipe(folder), folder / "out", patch, runs, contrasts=declared, reference="contrastive"
        )
    return folder / "out"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an export leaves for readers; the numbers are a test's."""
    folder = tmp_path_factory.mktemp("export")
    file = {
        "file": "onnx/vision_model.onnx", "tower": "vision_model", "precision": "fp16", "bytes": 4_000_000,
        "cosine_min": 0.99998, "largest_error": 1e-3, "noise_to_spread": 2e-6, "between_batches": 1e-9,
        "milliseconds": 1.25, "model_milliseconds": 2.0,
    }  # fmt: skip
    scores = {
        name: {"retrieval": {"mean_r@1": value, "num_images": 10, "num_texts": 20}, "params": 1_000_000}
        for name, value in (("torch", 50.0), ("fp16", 49.75))
    }
    files = [file, file | {"file": "onnx/text_model.onnx", "tower": "text_model", "bytes": 1_000_000}]
    parity = {"files": files, "scores": scores, "scored_on": "some/val", "compared_on": {"pictures": 8, "texts": 9}}
    (folder / "parity.json").write_text(json.dumps(parity))
    (folder / "export.json").write_text(json.dumps({"model": "my <i>run", "precisions": ["fp16"], "files": {}}))
    return folder


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scores") / "scores.json"
    latency = {tower: {"latency_ms": {"1": {"median": 7.5, "q1": 7.0, "q3": 8.0}}} for tower in ("image", "text")}
    efficiency = latency | {"file_bytes": {"fp32": 8e6}, "device": "cpu", "threads": 2, "shown": {"image_gmacs": 0.5}}
    model = {"retrieval": {"mean_r@1": 40.0}, "efficiency": efficiency, "params": 2_000_000}
    path.write_text(json.dumps({"data": "some/val", "models": {"a": model}, "environment": {}}))
    return path


def test_a_comparison_shows_what_results_json_says(compared: Path, tmp_path: Path) -> None:
    page = write_report([compared], tmp_path / "r.html").read_text(encoding="utf-8")
    assert HOLE not in page
    results = json.loads((compared / "results.json").read_text())
    for row in results["tables"][0]["rows"]:
        cell = row["metrics"]["retrieval.mean_r@1"]
        assert f'data-value="{cell["summary"]["mean"]}"' in page
        if cell["difference"] is not None:
            low, high = cell["difference"]["interval"]
            assert f"seeds {low:+.1f} to {high:+.1f}" in page
    text = Elements(page).text
    assert "hinton is below contrastive by" in text
    assert "2 of 2 declared contrasts are resolved" in text
    assert "1 of 18 runs failed" in text
    assert "the loss is <b>not</b> finite" in text
    assert results["tables"][0]["contrasts"][0]["verdict"] in text
    for note in results["tables"][0]["notes"]:
        assert note in text
    assert "paired difference to contrastive" in page
    assert "Validation over steps" in page


def test_an_unfinished_comparison_says_so(compared: Path, tmp_path: Path) -> None:
    shutil.copytree(compared, tmp_path / "c")
    (tmp_path / "c" / "results.json").unlink()
    (tmp_path / "c" / "comparison.yaml").write_text("base: x\n")
    page = write_report([tmp_path / "c"], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "This comparison is not finished: 17 of" in page


def test_exports_and_scores_stand_beside_a_run(run: Path, exported: Path, scored: Path, tmp_path: Path) -> None:
    page = write_report([run, exported, scored], tmp_path / "r.html", gallery=0).read_text(encoding="utf-8")
    assert HOLE not in page
    text = Elements(page).text
    assert "-0.25 points" in text
    assert "0.999980" in text
    assert "Scores on some/val: 10 images, 20 captions" in text
    assert "Latency of one image" in text
    assert "cpu, 2 threads" in text
    assert "cmapkd report" in text


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gallery_of_every_family(family: str, source: str, tmp_path: Path) -> None:
    import torch

    torch.manual_seed(0)
    model = make(family, tmp_path / "model").eval()
    folder = tmp_path / "run"
    model.save(folder / "student")
    (folder / "config.yaml").write_text(json.dumps({"data": {"val": source}}))
    (folder / "metrics.json").write_text(json.dumps({"student": {"params": 3}}))
    page = write_report([folder], tmp_path / "r.html", gallery=1).read_text(encoding="utf-8")
    assert HOLE not in page
    assert "Student wrong" in page
    assert page.count("<img") > 3


def test_long_curves_keep_their_extremes() -> None:
    points = [(float(step), 1.0 if step == 7_001 else 0.0) for step in range(10_000)]
    kept = thinned(points)
    assert len(kept) <= 400
    assert (7_001.0, 1.0) in kept
    assert "nan" not in lines("a", [Curve("b", [(1.0, 2.0)], COLOURS - 1)]).drawing


def test_commands_leave_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    small = ["data.train=scenes?length=32", "data.val=scenes@val?length=12", "data.test=scenes@test?length=12"]
    small += ["student=tiny:debug", "training.steps=2", "training.batch_size=8", "training.device=cpu"]
    monkeypatch.setattr(sys, "argv", ["cmapkd", "demo", *small, "--out", str(tmp_path / "demo")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert f"report: {tmp_path / 'demo' / 'report.html'}" in printed
    assert "After 2 steps the student is right in" in printed
    assert f"(scored again by: cmapkd evaluate {tmp_path / 'demo'} --data 'scenes@test?length=12')" in printed
    use = f"cmapkd.load('{tmp_path / 'demo'}').embed(images=['a.jpg'], texts=['a dog'])"
    assert printed.splitlines()[-1] == f"use the student in Python: {use}"
    page = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert HOLE not in page
    assert 'id="gallery"' in page
    assert 'id="calibration"' in page
    monkeypatch.setattr(sys, "argv", ["cmapkd", "report", str(tmp_path / "demo"), "--gallery", "0", "--no-images"])
    with pytest.raises(SystemExit):
        main()
    assert re.search(r"report\.html \(\d+\.\d [kM]B\)", capsys.readouterr().out)
