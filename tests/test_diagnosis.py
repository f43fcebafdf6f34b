"""The doctor says what is wrong before the run does."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from cmapkd.cache.cost import Cost
from cmapkd.data.open import open_source
from cmapkd.diagnosis import Finding, diagnose, examine, verdict
from cmapkd.diagnosis.data import check_order, check_overlap
from cmapkd.diagnosis.diagnose import check_warmup
from cmapkd.diagnosis.models import check_activation, check_size, check_weights, millions, size_beside
from cmapkd.models import DualEncoder, ModelConfig, build_model
from cmapkd.models.tiny import TinyDualEncoder
from cmapkd.run import RunConfig, run
from helpers import MemorySource

DEBUG = "tiny:debug"
TEACHER = "tiny:scenes-teacher"


def _config(**changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "student": DEBUG,
        "data": {"train": "scenes?length=64", "val": "scenes@val?length=8"},
        "method": "contrastive",
        "training": {"steps": 100, "batch_size": 8},
    }
    return RunConfig.from_mapping({**values, **changes})


def _by_what(findings: list[Finding], level: str) -> dict[str, str]:
    return {finding.what: finding.detail for finding in findings if finding.level == level}


def test_a_sound_recipe_has_no_problem_and_an_estimate() -> None:
    findings = diagnose(_config())
    assert not _by_what(findings, "problem")
    fine = _by_what(findings, "ok")
    assert "64 samples" in fine["data.train"]
    assert "5.0 captions each" in fine["data.train"]
    assert "32 px" in fine["student"]
    assert "for 100 steps" in fine["steps"]
    assert "GiB" in fine["memory"]


def test_missing_data_and_model_are_named_not_raised(tmp_path: Path) -> None:
    missing = diagnose(_config(data={"train": f"webdataset:{tmp_path}/none-*.tar"}))
    assert "none-*.tar" in _by_what(missing, "problem")["data.train"]
    wrong_teacher = diagnose(_config(teacher=str(tmp_path / "nowhere"), method="hinton"))
    assert "nowhere" in _by_what(wrong_teacher, "problem")["teacher"]


def test_too_little_data_for_a_batch() -> None:
    findings = diagnose(_config(training={"steps": 10, "batch_size": 128}))
    assert "lower training.batch_size" in _by_what(findings, "problem")["data.train"]


def test_the_order_of_the_samples_is_told(tmp_path: Path) -> None:
    for shard in range(6):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for number in range(8):
                info = tarfile.TarInfo(f"{number}.txt")
                info.size = 4
                tar.addfile(info, io.BytesIO(b"word"))
    data = {"train": f"webdataset:{tmp_path}/*.tar", "order": "window", "window": 1}
    config = _config(data=data, training={"steps": 10, "batch_size": 2})
    findings = [*check_order(open_source(config.data.train), config)]
    assert [finding.level for finding in findings] == ["ok", "note"]
    assert "windows of 1 shard in 2 lanes: about" in findings[0].detail
    assert "of 6 shards are read at a time, and 1 in 2 pairs of a batch is of one shard" in findings[0].detail
    assert "raise data.window" in findings[1].detail
    (wrong,) = check_order(open_source("scenes?length=64"), config)
    assert (wrong.level, wrong.what) == ("problem", "data.order")
    assert "has no shards" in wrong.detail
    assert not [*check_order(open_source(config.data.train), _config())]  # a full shuffle


def test_targets_of_the_teachers_answers_are_built_first() -> None:
    method = {"name": "clip_cid", "clusters": 4}
    findings = diagnose(_config(teacher=TEACHER, method=method))
    assert not _by_what(findings, "problem")
    fine = _by_what(findings, "ok")
    assert "before the first step, of at most 64 samples, in at most about" in fine["targets"]
    assert "for 100 steps" in fine["steps"]
    for steps, level in ((100, "note"), (5, "problem")):  # the whole run reads more; it does not
        few = diagnose(
            _config(teacher=TEACHER, method=method | {"clusters": 41}, training={"steps": steps, "batch_size": 8})
        )
        assert "of 40 samples: clip_cid makes clusters" in _by_what(few, level)["targets"]
        assert "steps" not in _by_what(few, "ok")


def test_undecodable_images_are_counted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as shard:
        for number in range(16):
            for suffix, content in ((".jpg", b"no picture"), (".txt", b"a red circle beside a blue square")):
                file = tmp_path / f"{number:06d}{suffix}"
                file.write_bytes(content)
                shard.add(file, file.name)
    findings = diagnose(_config(data={"train": f"webdataset:{tmp_path}/bad.tar"}))
    assert (
        "16 of 16 samples cannot be used (100 %; training stops above data.max_bad_share, 1 %)"
        in _by_what(findings, "problem")["data.train"]
    )


def test_a_teacher_that_sees_nothing_fails_the_sanity_check(tmp_path: Path) -> None:
    broken = build_model(DEBUG, captions=["a red circle", "a blue square"] * 4)
    assert isinstance(broken, TinyDualEncoder)
    torch.nn.init.zeros_(broken.vision.project.weight)
    broken.save(tmp_path / "teacher")
    problems = _by_what(diagnose(_config(teacher=str(tmp_path / "teacher"), method="hinton")), "problem")
    assert "for 3 % of the images (chance 3 %)" in problems["teacher sanity"]


def test_each_of_several_teachers_is_looked_at() -> None:
    teachers: dict[str, Any] = {"teacher": "tiny:scenes-teacher", "more_teachers": {"other": "tiny:scenes-teacher"}}
    method = {"name": "mobileclip", "synthetic": True}
    findings = diagnose(_config(**teachers, method=method))
    assert not _by_what(findings, "problem")
    named = {finding.what for finding in findings}
    assert {"teacher", "teacher other", "teacher other sanity", "cache", "cache of other", "steps"} <= named


def test_a_cache_pays_from_the_epoch_on_that_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the sums of whole trainings of so many epochs, with and without the cache."""
    cost = Cost(fetch=0.001, prepare=0.0, answer=0.010, build=0.0125, read=0.0007)
    monkeypatch.setattr("cmapkd.diagnosis.cost.measure", lambda *_, **__: cost)
    data = {"train": "scenes?length=64", "views": {"num_views": 3}}
    findings = diagnose(_config(teacher=TEACHER, method="clip_kd", cache="auto", data=data))
    detail = " ".join(finding.detail for finding in findings if finding.what == "cache")
    said = re.search(r"With 3 views it pays from ([0-9.]+) epochs on, .* this run has ([0-9.]+)", detail)
    assert said is not None, detail
    pays, epochs = map(float, said.groups())
    assert epochs == pytest.approx(100 * 8 / 64)

    def saved(epochs: float) -> float:
        return epochs * cost.answer - (3 * cost.build + epochs * cost.read)

    assert saved(pays - 0.05) < 0 < saved(pays + 0.05)
    assert f"{1000 * cost.answer:.2f} ms live, {1000 * cost.build:.2f} ms to store" in detail


def test_a_cache_of_a_fast_teacher_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmapkd.diagnosis.cost.measure", lambda *_, **__: Cost(answer=0.0005, build=0.001, read=0.0007))
    findings = diagnose(_config(teacher=TEACHER, method="clip_kd", cache="auto"))
    assert "it does not pay" in _by_what(findings, "note")["cache"]


def test_what_a_cache_holds_already_needs_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmapkd.diagnosis.cost.measure", lambda *_, **__: Cost(answer=0.01, build=0.011, read=0.0007))
    config = _config(teacher=TEACHER, method="clip_kd", cache={"mode": "auto", "max_gib": 1e-6})
    assert "more than cache.max_gib" in _by_what(diagnose(config), "problem")["cache"]
    monkeypatch.setattr("cmapkd.cache.CachePlan.bytes_missing", lambda _: 500)
    findings = diagnose(config)
    assert not _by_what(findings, "problem")
    assert any("of which 500 bytes are to be built" in each.detail for each in findings if each.what == "cache")


def _assuming(model: DualEncoder, twin: DualEncoder, monkeypatch: pytest.MonkeyPatch) -> DualEncoder:
    """A model that was loaded as one of GELU, and its like with QuickGELU."""
    monkeypatch.setattr(model, "assumed_activation", "gelu", raising=False)
    monkeypatch.setattr(model, "activation_twin", lambda: twin, raising=False)
    return model


def test_weights_that_want_the_other_activation_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source("scenes?length=64")
    good = build_model(TEACHER)
    broken = build_model(TEACHER)
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    found = [*check_activation("student", _assuming(broken, good, monkeypatch), source)]
    assert [(finding.level, finding.what) for finding in found] == [("problem", "student activation")]
    assert "set options.quick_gelu: true" in found[0].detail
    assert "over 32 pairs" in found[0].detail
    right = [*check_activation("teacher", _assuming(build_model(TEACHER), broken, monkeypatch), source)]
    assert [finding.level for finding in right] == ["ok"]
    equal = [*check_activation("teacher", _assuming(build_model(TEACHER), good, monkeypatch), source)]
    assert [finding.level for finding in equal] == ["ok"]
    assert not [*check_activation("teacher", build_model(TEACHER), source)]


def test_without_captions_the_assumption_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _assuming(build_model(TEACHER), build_model(TEACHER), monkeypatch)
    found = [*check_activation("teacher", model, MemorySource(8, without_caption=range(8)))]
    assert [finding.level for finding in found] == ["note"]
    assert "assumed to use GELU" in found[0].detail


def test_the_doctor_and_the_training_look_at_every_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(TinyDualEncoder, "assumed_activation", "gelu")
    monkeypatch.setattr(TinyDualEncoder, "activation_twin", lambda self: self)
    settings = {"teacher": TEACHER, "method": "clip_kd", "training": {"steps": 1, "batch_size": 8, "device": "cpu"}}
    findings = diagnose(_config(**settings))
    assert {"student activation", "teacher activation"} <= {finding.what for finding in findings}
    console = Console(width=300, file=io.StringIO(), record=True)
    run(_config(**settings), out=tmp_path / "run", console=console)
    text = console.export_text()
    assert text.count("is assumed to use GELU") == 2
    assert f"student: {TEACHER} is assumed" in text
    assert f"student: {DEBUG} is assumed" in text


def test_parts_and_stages_are_checked_as_a_run_checks_them() -> None:
    def problems(**training: Any) -> list[str]:
        values = {"student": "tiny:debug", "method": "contrastive"}
        values |= {"data": {"train": "scenes?length=40&size=32"}, "training": {"batch_size": 8, **training}}
        found = diagnose(RunConfig.from_mapping(values))
        return [finding.detail for finding in found if finding.level == "problem"]

    for expected, training in (
        ("train_parts has 'imge' (did you mean 'image'?)", {"steps": 2, "train_parts": ["imge"]}),
        ("no stream 'b'", {"stages": [{"steps": 2, "data": "b"}]}),
        ("no term 'nope'", {"stages": [{"steps": 2, "terms": ["nope"]}]}),
    ):
        assert any(expected in text for text in problems(**training))


def _captioned(folder: Path, names: list[str], *, shift: int = 0) -> str:
    """A csv of pictures, each of its own colour."""
    folder.mkdir(exist_ok=True)
    for place, name in enumerate(names):
        Image.new("RGB", (12, 12), (place + shift, 7, 9)).save(folder / name)
    rows = [f"{name},picture {place}" for place, name in enumerate(names)]
    (folder / "t.csv").write_text("\n".join(["filepath,title", *rows]))
    return f"csv:{folder}/t.csv"


def test_data_that_are_trained_on_and_scored_are_a_problem(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(10)]
    train = _captioned(tmp_path / "train", names)
    again = _captioned(tmp_path / "again", [*names[:6], "new.png"])
    others = _captioned(tmp_path / "others", names, shift=100)  # the same names, other pictures

    def found(**roles: str) -> dict[str, str]:
        sources = {role: open_source(name) for role, name in roles.items()}
        return {f"{each.level} {each.what}": each.detail for each in check_overlap(sources)}

    assert "the same data as data.train" in found(train=train, val=train)["problem data.val"]
    assert "6 of 6 pictures compared are in data.train too" in found(train=train, test=again)["problem data.test"]
    assert found(train=train, val=others) == {}
    assert [*found(train=train, val=others, test=others)] == ["note data.test"]


def test_a_run_that_only_warms_up_is_noticed() -> None:
    train = open_source("scenes?length=64")

    def found(**changes: Any) -> list[str]:
        return [each.detail for each in check_warmup(_config(**changes), train)]

    assert "60 steps: the rate never reaches its peak" in found(training={"steps": 60, "batch_size": 8})[0]
    assert "set optim.warmup_steps to 6" in found(training={"steps": 60, "batch_size": 8})[0]
    assert "more than half of the run warms up" in found(training={"steps": 150, "batch_size": 8})[0]
    assert found(training={"steps": 200, "batch_size": 8}) == []
    assert found(training={"epochs": 5, "batch_size": 8}, optim={"warmup_steps": 4}) == []


def test_random_weights_are_a_problem_of_teachers_alone() -> None:
    trained = build_model(ModelConfig(name=TEACHER))
    assert not [*check_weights("teacher", trained, teaches=True)]
    random = build_model(DEBUG, captions=["a red square"])
    assert [each.level for each in check_weights("teacher", random, teaches=True)] == ["problem"]
    (finding,) = check_weights("student", random, teaches=False)
    assert (finding.level, finding.detail) == ("ok", "random in the image and text tower: it learns from scratch")


def test_towers_and_words_are_counted() -> None:
    student = build_model("tiny:debug", captions=["a red circle", "a blue square"] * 4)
    assert isinstance(student, TinyDualEncoder)
    detail = " ".join(each.detail for each in check_size("student", student))
    towers = {part: sum(student.get_parameter(name).numel() for name in names) for part, names in student.parts.items()}
    table = student.tokenizer.vocab_size * student.text.tokens.weight.shape[1]
    assert f"image tower {millions(towers['image'])}" in detail
    assert f"text tower {millions(towers['text'])}, {millions(table)} of it the table of words" in detail
    assert "MB on disk" in detail


@pytest.mark.parametrize(
    ("levels", "said"),
    [
        ((), "no problems, no notes"),
        (("ok", "note"), "no problems, 1 note"),
        (("problem", "problem", "note"), "2 problems, 1 note"),
    ],
)
def test_a_verdict_counts(levels: tuple[Any, ...], said: str) -> None:
    assert verdict([Finding(level, "x", "y") for level in levels]) == said


def test_findings_come_as_soon_as_they_are_known() -> None:
    """The data are told before any model is built; what comes next is announced before it takes its time."""
    said: list[str] = []
    findings = examine(_config(teacher=TEACHER, method="clip_kd"), say=said.append)
    assert next(findings).what == "data.train"
    assert said == ["reading scenes?length=64"]
    whats = [each.what for each in findings]
    assert [said[-1], whats[-1]] == ["taking a few steps", "memory"]
    assert {"student size", "teacher size", "disk", "warm-up"} <= {*whats}


def test_expected_disk_is_what_a_run_takes(tmp_path: Path) -> None:
    """Of a run that keeps its checkpoints: weights, two moments, and the student, within a tenth."""
    config = _config(
        training={"steps": 3, "batch_size": 8, "checkpoint_every": 1, "device": "cpu"},
        data={"train": "scenes?length=64"},
    )
    detail = next(each.detail for each in diagnose(config) if each.what == "disk")
    number, unit = re.search(r"checkpoints of ([0-9.]+) (kB|MB)", detail).groups()  # type: ignore[union-attr]
    run(config, out=tmp_path / "run")
    kept = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    size = sum(file.stat().st_size for file in kept[-1].rglob("*") if file.is_file())
    assert float(number) * {"kB": 1e3, "MB": 1e6}[unit] == pytest.approx(size, rel=0.1)


def test_a_larger_student_is_not_called_smaller() -> None:
    assert size_beside(0.117).startswith("the student has 8.55 times the parameters of the teacher: it is larger")
    assert size_beside(5.0) == "the student has 20.0% of the teacher's parameters (5.0 times smaller)"
