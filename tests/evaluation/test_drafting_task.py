"""Task `drafting`: sums of what drafts are worth, in an evaluation of several models and at the end of a run."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from writing_support import TABLE, AskedSource, LookupModel

from cmapkd.compare.metric import lower_is_better, metric_digits
from cmapkd.config import ConfigError
from cmapkd.data.dialogues import join_items
from cmapkd.data.open import open_source
from cmapkd.evaluation import SuiteConfig, evaluate, evaluate_models
from cmapkd.evaluation.answer_scores import load_answer_scores
from cmapkd.evaluation.drafting import Comparison, compare_texts, summary
from cmapkd.evaluation.run import with_reference, without_reference
from cmapkd.evaluation.share import Share
from cmapkd.evaluation.suite import check_comparable
from cmapkd.models.drafting import Drafted
from cmapkd.models.generative import Decoding
from cmapkd.run import RunConfig
from cmapkd.run import measure as measuring
from cmapkd.run.measure import measure, reference_of
from helpers import make_model
from writers import Dialogues, make_judge, make_writer

SETTINGS: dict[str, Any] = {
    "tasks": ["drafting"],
    "writing": {"caption_tokens": 6, "answer_tokens": 2, "batch_size": 2},
}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    teacher = make_judge(layers=2).model.float()
    return {"teacher": teacher, "same": copy.deepcopy(teacher), "student": make_writer().float()}


def test_sums_are_over_all_texts_and_divided_once() -> None:
    found = summary([Comparison(6, 2, 5, 4, 0.5, 1.0, None), Comparison(3, 3, 7, 0, 1.0, 2.0, 0.25)])
    assert found["accepted_length"] == 9 / 5
    assert found["accepted_share"] == pytest.approx(100 * 4 / 12)
    assert found["passes_per_token"] == 5 / 9
    assert (found["same_texts"], found["num_different"], found["widest_gap"]) == (50, 1, 0.25)
    assert (found["speed"], found["num_texts"], found["num_tokens"]) == (2, 2, 9)
    assert summary([Comparison(1, 1, 0, 0, 1.0, 1.0, None)])["accepted_share"] is None
    assert lower_is_better("drafting.passes_per_token")
    assert metric_digits("drafting.accepted_length") == 2


def test_models_are_drafts_of_the_first(models: dict[str, Any]) -> None:
    source = open_source("scenes?length=3", split="val")
    config = SuiteConfig.from_mapping({**SETTINGS, "drafting": {"proposals": 2, "samples": 2}})
    scores = evaluate_models(models, source, config, device="cpu")
    assert "accepted_length" not in scores["teacher"]["drafting"]
    same, found = scores["same"]["drafting"], scores["student"]["drafting"]
    assert (same["accepted_length"], same["accepted_share"], same["same_texts"]) == (3, 100, 100)
    assert (found["num_texts"], found["num_tokens"], found["same_texts"]) == (2, 12, 100)
    assert 1 <= found["accepted_length"] < 3
    assert found["speed"] == pytest.approx(found["seconds_alone"] / found["seconds"])
    told = found["protocol"]
    assert (told["proposals"], told["most_tokens"], told["precision"]) == (2, 6, "float32")
    writing = {"answer_tokens": 2, "asks": "questions"}
    asks = SuiteConfig.from_mapping({**SETTINGS, "limit": 1, "writing": writing, "drafting": {"samples": 2}})
    asked = evaluate_models({"t": models["teacher"], "s": models["student"]}, source, asks, device="cpu")["s"][
        "drafting"
    ]
    assert asked["protocol"]["most_tokens"] == 2
    assert asked["num_texts"] > 1


def test_a_text_that_differs_is_told_of_with_its_distance(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding may decide between two tokens that are equally likely, and nothing else may."""
    teacher, sample = models["teacher"], Dialogues()[0]
    item = teacher.processor.read(sample.turns, [sample.image])
    inputs, how = join_items([item], teacher.processor.pad_id), Decoding(max_new_tokens=5)
    own = teacher.generate(inputs, how)[0]
    other = next(token for token in range(5, 90) if token != own[2])
    wrong = Drafted([*own[:2], other, *own[3:]], 2, 4, 3)
    monkeypatch.setattr("cmapkd.evaluation.drafting.write_with_draft", lambda *_, **__: wrong)
    (found,) = compare_texts(teacher, inputs, [(teacher, inputs)], how, proposals=2)
    logits = teacher.model(**teacher.arguments(inputs.with_answers([own]))).logits[0].detach()
    row = logits[inputs.prompts().texts.ids.shape[1] + 1]
    assert found.gap == pytest.approx(float(row[own[2]] - row[other]), abs=1e-4)


def test_models_that_are_no_drafts_are_refused(models: dict[str, Any]) -> None:
    source, config = open_source("scenes?length=2", split="val"), SuiteConfig.from_mapping(SETTINGS)
    with pytest.raises(ValueError, match="name the teacher and then the student"):
        evaluate_models({"t": models["teacher"]}, source, config, device="cpu")
    with pytest.raises(ValueError, match="must know every token that"):
        evaluate_models({"t": make_judge(extra=2).model, "s": models["student"]}, source, config, device="cpu")
    lookup = {"t": LookupModel(TABLE), "s": LookupModel(TABLE)}
    with pytest.raises(ValueError, match="is no model of transformers"):
        evaluate_models(lookup, AskedSource(), config, device="cpu")
    with pytest.raises(ConfigError, match="proposals"):
        SuiteConfig.from_mapping({**SETTINGS, "drafting": {"proposals": 0}})
    with pytest.raises(
        ConfigError, match=r"evaluation\.tasks names drafting, which cannot be measured here: it is for a"
    ):
        check_comparable({"teacher": make_model(), "student": models["student"]}, config)


def run_of(**changes: Any) -> RunConfig:
    recipe: dict[str, Any] = {
        "teacher": "tiny_vlm:scenes-teacher",
        "student": "tiny_vlm:small",
        "method": "sft",
        "data": {"train": "scenes?length=4", "val": "scenes@val?length=2", "prompts": {"kind": "captions"}},
        "training": {"steps": 2, "evaluate_every": None, "device": "cpu"},
        "evaluation": SETTINGS,
    }
    return RunConfig.from_mapping({**recipe, **changes})


class Told(Share):
    """Of one process, which notes how often the others would have been let go."""

    ends = 0

    def _tell(self, what: Any) -> None:
        type(self).ends += what is None


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> type[Told]:
    Told.ends = 0
    monkeypatch.setattr(measuring, "share_of", lambda _: Told())
    return Told


def test_a_run_ends_with_its_student_as_a_draft(
    models: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: type[Told]
) -> None:
    """Also where no other task is named; of the teacher nothing is left to measure then."""
    monkeypatch.setattr(measuring, "build_teacher", lambda _: models["teacher"])
    for tasks, source in ((["drafting"], open_source("scenes@val?length=1")), (["perplexity", "drafting"], None)):
        config = run_of(evaluation={**SETTINGS, "tasks": tasks, "limit": 1})
        found = measure(config, source, models["student"], None, None, device=torch.device("cpu"), out=tmp_path)
        assert found["student"]["params"] > 0
        if source is not None:
            assert found["student"]["drafting"]["num_texts"] == 1
            assert "drafting" not in found["teacher"]
            assert {*load_answer_scores(tmp_path / measuring.RANKS)} == {"drafting.passes_per_token"}
    assert told.ends == 2  # each process that helps is let go once for each model
    json.dumps(found)


def test_other_tasks_are_measured_once_and_alone(models: dict[str, Any], tmp_path: Path) -> None:
    source = open_source("scenes@val?length=1")
    config = SuiteConfig.from_mapping({**SETTINGS, "tasks": ["perplexity", "drafting"]})
    file = tmp_path / "scores"
    found = evaluate(
        models["student"], source, config, device="cpu", reference=models["teacher"], ranks_file=file, share=Told()
    )
    assert found["perplexity"]["num_references"] > 0
    assert found["drafting"]["teacher"] == "teacher"
    assert {*load_answer_scores(file)} >= {"drafting.passes_per_token", "perplexity.bits_per_byte"}
    assert [each.tasks for each in (with_reference(config), without_reference(config)) if each] == [
        ("drafting",),
        ("perplexity",),
    ]
    auto = SuiteConfig()
    assert (with_reference(auto), without_reference(auto)) == (None, auto)


def test_what_a_run_cannot_draft_is_refused_before_it() -> None:
    with pytest.raises(ConfigError, match="names drafting, which compares with the teacher, and there is none"):
        run_of(teacher=None)
    assert reference_of(run_of(evaluation={"tasks": ["perplexity"]})) is None
    assert "drafting" not in run_of(evaluation={"tasks": ["perplexity"]}).plain()["evaluation"]
    assert run_of(evaluation={**SETTINGS, "drafting": {"proposals": 3}}).plain()["evaluation"]["drafting"]
