"""What a run says before it starts and while it goes on, and what its scores say they are of."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from cmapkd.config import ConfigError
from cmapkd.data.left_out import without_caption
from cmapkd.data.open import open_source
from cmapkd.diagnosis import diagnose
from cmapkd.diagnosis.data import check_source
from cmapkd.diagnosis.writing import compare_writers
from cmapkd.evaluation.config import EvaluationConfig
from cmapkd.evaluation.headline import scored_set
from cmapkd.evaluation.run import evaluate
from cmapkd.models import FrozenTeacher, ModelConfig, build_model
from cmapkd.models.untrained import remark_on_untrained
from cmapkd.results import RunResult
from cmapkd.run import RunConfig, open_training, run
from cmapkd.run.lock import locked
from cmapkd.run.measure import Measured
from cmapkd.run.remarks import (
    remarks_on_data,
    remarks_on_ends,
    remarks_on_length,
    remarks_on_mix,
    remarks_on_questions,
    remarks_on_teachers,
)
from cmapkd.training.progress import Outlook, Pace, TrainingDisplay, shown_rate, shown_time
from helpers import MemorySource, make_method, make_model
from writers import make_task

TIMM = {"embed_dim": 16, "text_width": 32, "text_layers": 1, "text_heads": 2, "context_length": 12, "image_size": 64}
TRAIN = "scenes?length=30&size=32"


def config(**data: Any) -> RunConfig:
    return RunConfig.from_mapping(
        {
            "student": "tiny:debug",
            "data": {"train": TRAIN, **data},
            "method": "contrastive",
            "training": {"steps": 60, "batch_size": 8},
        }
    )


def said_of(settings: RunConfig) -> list[str]:
    source = open_source(settings.data.train, split="train")
    return [*remarks_on_data(settings, source, Measured.open(settings))]


def test_data_that_prove_nothing_are_told_of() -> None:
    assert ["no evaluation data are named" in said for said in said_of(config())] == [True]
    for key in ("val", "test"):
        (said,) = said_of(config(**{key: "scenes@train?length=30&size=32"}))
        assert said.startswith(f"data.{key} and the training data are the same samples")
    assert said_of(config(val="scenes@val?length=10&size=32")) == []


def test_a_mix_of_heads_that_nothing_can_choose_is_told_of() -> None:
    val = "scenes@val?length=10&size=32"
    for settings, data, told in (({}, {}, 1), ({"alpha": 0.5, "beta": 1.0}, {}, 0), ({}, {"val": val}, 0)):
        said = [*remarks_on_mix(config(**data), make_method("dho", settings=settings))]
        assert len(said) == told
        assert all("Name some with data.val, or set method.alpha and method.beta" in each for each in said)
    assert not [*remarks_on_mix(config(), make_method("vl2lite"))]


def test_two_parts_of_one_folder_are_other_samples(tmp_path: Path) -> None:
    for number in range(30):
        Image.new("RGB", (32, 32), (8 * number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"red {number}")
    parts = config(train=f"folder:{tmp_path}?part=0-0.7", val=f"folder:{tmp_path}?part=0.7-1")
    assert said_of(parts) == []
    whole = config(train=f"folder:{tmp_path}", val=f"folder:{tmp_path}")
    assert len(said_of(whole)) == 1


def test_samples_that_say_nothing_are_counted_and_said(tmp_path: Path) -> None:
    def rows(name: str, silent: int) -> str:
        lines = [f"{name}{number}.png,{'' if number < silent else 'a cat'}" for number in range(12)]
        for number in range(12):
            Image.new("RGB", (32, 32), (8 * number, silent, 0)).save(tmp_path / f"{name}{number}.png")
        (tmp_path / f"{name}.csv").write_text("\n".join(["filepath,title", *lines]), encoding="utf-8")
        return f"csv:{tmp_path}/{name}.csv"

    first, second = rows("a", 3), rows("b", 1)
    silent = config(train=first, val="scenes@val?length=10&size=32")
    (said,) = remarks_on_data(silent, open_training(silent), Measured.open(silent))
    assert said == "3 training samples without a caption: left out. 9 are read."
    notes = [each.detail for each in check_source("train", open_training(silent), silent) if each.level == "note"]
    assert notes == ["3 samples without a caption: left out"]
    both = config(train=first, more={"b": {"source": second, "share": 0.5}}, val="scenes@val?length=10&size=32")
    assert without_caption(open_training(both)) == 4
    assert without_caption(open_training(config(train=first, held_out=2))) == 3


def test_what_is_wrong_with_data_bears_the_name_of_their_setting(tmp_path: Path) -> None:
    classes = {"name": "hinton", "form": "classes"}
    values = {"student": "tiny:debug", "teacher": "tiny:debug", "method": classes, "baseline": "scratch"}
    values |= {"data": {"train": f"folder:{tmp_path}/nope"}, "training": {"steps": 1, "batch_size": 4}}
    with pytest.raises(ConfigError, match=r"^data\.train: folder: .*nope' is neither a folder nor a .zip") as refused:
        run(RunConfig.from_mapping(values), out=tmp_path / "run")
    assert "baseline" not in str(refused.value)
    for role in ("val", "test"):
        with pytest.raises(ConfigError, match=rf"^data\.{role}: csv"):
            Measured.open(config(**{role: "csv:nope.csv"}))
    with pytest.raises(ConfigError, match=r"^data\.more\.b: csv"):
        open_training(config(more={"b": {"source": "csv:nope.csv", "share": 0.5}}))
    told = [each.detail for each in diagnose(config(train="csv:nope.csv")) if each.level == "problem"]
    assert len(told) == 1
    assert told[0].startswith("csv")  # the finding has the name beside it


def test_a_warm_up_longer_than_the_run_is_told_of() -> None:
    (said,) = remarks_on_length(config(), 60)
    assert "the run has 60 steps, and optim.warmup_steps is 100: the learning rate ends at 0.0006 of 0.001" in said
    assert "optim.warmup_steps=6" in said
    assert not [*remarks_on_length(config(), 101)]


def test_answers_that_end_with_different_tokens_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    method = make_task("token_kd")
    assert not [*remarks_on_ends(method)]
    words = method.student.vocabulary
    first, other = words.end_ids[0], words.pad_id + 1 if words.pad_id == words.end_ids[0] else words.pad_id
    monkeypatch.setattr(method.student, "vocabulary", replace(words, end_ids=(other, first)))
    (said,) = remarks_on_ends(method)
    assert f"teacher: the student's answers end with token {other} {words.pieces[other]!r}" in said
    assert f"and the teacher's with token {first} {words.pieces[first]!r}" in said
    found = compare_writers(method.student, method.teachers["teacher"].model)  # type: ignore[arg-type]
    assert found[-1].level == "note"
    assert found[-1].detail in said
    assert not [*remarks_on_ends(make_task("sft", student=method.student))]


def test_questions_that_are_never_asked_are_told_of() -> None:
    def said(cache: str = "auto", **data: Any) -> list[str]:
        values = {"student": "tiny_vlm:small", "teacher": "tiny_vlm:scenes-teacher", "data": {"train": TRAIN, **data}}
        values |= {"method": {"name": "token_kd", "top_k": 8}, "training": {"steps": 9, "batch_size": 8}}
        settings = RunConfig.from_mapping({**values, "cache": cache})
        return [*remarks_on_questions(settings, open_source(TRAIN, split="train"))]

    (warned,) = said(prompts="questions")
    source = open_source(TRAIN, split="train")
    mean = sum(len(source[index].questions) for index in range(16)) / 16
    assert mean > 4
    assert f"about {mean:.0f} questions, and its 4 views repeat" in warned
    assert f"data.views.num_views={4 * round(mean)}" in warned
    assert not said(prompts={"kind": "questions", "share": 0.1})
    assert not said(prompts={"kind": "questions", "join": True})
    assert not said(prompts="captions")
    assert not said(prompts="questions", views={"num_views": 4 * round(mean), "crop_scale": [1.0, 1.0]})
    assert not said("off", prompts="questions")


@pytest.mark.parametrize(
    ("model", "towers"),
    [
        ({"name": "tiny:debug"}, ("image", "text")),
        ({"name": "tiny:scenes-teacher"}, ()),
        ({"name": "timm:mobilenetv3_small_050", "options": TIMM}, ("image", "text")),
    ],
)
def test_models_without_trained_weights_are_known(model: dict[str, Any], towers: tuple[str, ...]) -> None:
    built = build_model(ModelConfig.from_mapping(model), captions=["a red square"] * 9)
    assert built.random_towers == towers
    said = [*remarks_on_teachers({"teacher": FrozenTeacher(built)})]
    assert [f"teacher: {built.name} is untrained: its weights are random" in each for each in said] == [True] * bool(
        towers
    )


def test_weights_that_are_read_are_trained(tmp_path: Path) -> None:
    random = build_model("tiny:debug", captions=["a red square"] * 9)
    random.save(tmp_path / "tiny")
    filled = ModelConfig(name="tiny:debug", checkpoint=tmp_path / "tiny" / "model.safetensors")
    assert remark_on_untrained(build_model(filled, captions=["a red square"] * 9)) is None
    half = build_model("tiny:scenes-teacher")
    half.random_towers = ("text",)
    assert str(remark_on_untrained(half)).startswith("the text tower is untrained: its weights are random")


def test_scores_say_what_they_are_of() -> None:
    source = MemorySource(24, bad={1, 5, 20})
    scores = evaluate(make_model(), source, device="cpu")
    assert scores["scored"] == {"images": 21, "captions": 40, "skipped": 3, "samples": 24, "limit": None}
    assert (
        scored_set(scores) == "scored on 21 images and 40 captions; 3 of 24 samples could not be read and are left out"
    )
    limited = evaluate(make_model(), source, EvaluationConfig(limit=10), device="cpu")
    assert "the first 10 of 24 samples (evaluation.limit); 2 of 10 samples could" in str(scored_set(limited))
    metrics = {"student": scores, "method": "contrastive", "evaluated_on": "memory", "gap_closed": -0.003}
    metrics |= {"teacher": scores, "baseline": scores, "baseline_name": "scratch", "remarks": ["no end"]}
    caption = str(RunResult(Path(), metrics).table().caption)
    assert "scored on 21 images and 40 captions" in caption
    assert "gap closed: 0 %" in caption
    assert "warning: no end" in caption
    bare = RunResult(Path(), {"student": {"params": 3}, "method": "contrastive", "evaluated_on": None})
    assert "no evaluation data" in str(bare.table().title)
    assert scored_set({"params": 3}) is None


def test_a_folder_that_cannot_be_made_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be made .*: name another one"), locked(tmp_path / ("x" * 300)):
        pass


def test_the_time_left_is_that_of_the_whole_command() -> None:
    outlook = Outlook(validation=50, more_trainings=1, final=300)
    # 6 of 10 steps of 8 pairs, 10 of the next training, validations at 5 and 10 (one is done) and 5, 10, and the end
    assert outlook.pairs_left(6, 10, batch_size=8, evaluate_every=5) == (4 + 10) * 8 + (1 + 2) * 50 + 300
    assert Outlook().pairs_left(10, 10, batch_size=8, evaluate_every=None) == 0
    pace = Pace(outlook, total=10, batch_size=8, evaluate_every=5)
    pace._clock -= 100.0  # a slow first step
    assert pace.lap() >= 100
    for _ in range(2):
        pace._clock -= 2.0
        pace.lap()
    assert pace.rate == pytest.approx(4.0, rel=0.01)  # the first step does not count
    assert pace.line_rate() == pytest.approx(24 / 104, rel=0.01)
    assert pace.seconds_left(6) == pytest.approx((14 * 8 + 150 + 300) / 4, rel=0.01)


def test_times_and_rates_are_readable() -> None:
    assert [shown_time(t) for t in (5, 125, 3725, 86400 * 3, 1e15)] == [
        "0:05",
        "2:05",
        "1:02:05",
        "3 days",
        "over 10,000 days",
    ]
    assert [shown_rate(rate) for rate in (0.5, 9.94, 161.4, 12345)] == [
        "0.5 pairs/s",
        "9.9 pairs/s",
        "161 pairs/s",
        "12,345 pairs/s",
    ]


def test_a_display_breaks_a_long_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    display = TrainingDisplay(Console(file=out, width=200), title="student", total=100, start=0, line_every=50)
    display.tick(1, pairs_per_second=0.5, seconds_left=100)
    assert out.getvalue() == ""
    display._spoke -= 60
    display.tick(2, pairs_per_second=0.5, seconds_left=100)
    display.update(50, loss=1.5, pairs_per_second=20, seconds_left=60)
    lines = out.getvalue().splitlines()
    assert lines == [
        "student: step 2/100  0.5 pairs/s  1:40 left",
        "student: step 50/100  loss 1.500  20 pairs/s  1:00 left",
    ]
