"""A student whose vocabulary is cut out of its teacher's: the teacher's probabilities among the kept tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from written_out import divergence, reduced, rows_of

from cmapkd.cache.asked import asked_of
from cmapkd.cache.files import CacheError
from cmapkd.config import ConfigError
from cmapkd.diagnosis.writing import compare_writers
from cmapkd.methods.token_kd import TokenKD
from cmapkd.models import FrozenTeacher, ModelConfig, build_model
from cmapkd.models.shared_vocabulary import kept_of
from writers import STUDENT, TEXTS, assert_same, batch_of, make_judge, make_task, make_writer, results

SETTINGS: dict[str, dict[str, Any]] = {
    "forward": {},
    "reverse": {"divergence": "reverse", "temperature": 2.0},
    "top 5": {"top_k": 5, "divergence": "jsd"},
}


def make_small(judge: FrozenTeacher, texts: tuple[str, ...] = TEXTS[1:]) -> Any:
    """A student in float64 with the teacher's tokens of these texts."""
    options = {**STUDENT, "heads": 2, "max_tokens": 128, "vocabulary": "texts"}
    torch.manual_seed(3)
    made = build_model(ModelConfig(name="tiny_vlm:small", options=options), captions=texts, teacher=judge.model)
    return copy.deepcopy(made).double()


def make_pair(texts: tuple[str, ...] = TEXTS[1:], **settings: Any) -> TokenKD:
    judge = make_judge()
    method = make_task("token_kd", student=make_small(judge, texts), teacher=judge, **settings)
    assert isinstance(method, TokenKD)
    return method


@pytest.mark.parametrize("name", SETTINGS)
def test_the_teacher_is_renormalised_over_the_kept_tokens(name: str) -> None:
    """Terms and gradients are the sums written out, of the softmax over the kept logits alone."""
    method = make_pair(**SETTINGS[name])
    assert method.teacher is not None
    kept = kept_of(method.teacher.model.vocabulary, method.student.vocabulary)
    assert kept is not None
    assert 256 < len(kept) < method.teacher.model.vocabulary.size
    batch = batch_of(method)
    found = results(method, batch)
    method.zero_grad()
    student = rows_of(method.student, batch.inputs["student"])  # type: ignore[arg-type]
    with torch.no_grad():
        teacher = rows_of(method.teacher.model, batch.inputs["teacher"])  # type: ignore[arg-type]
    settings = {key: value for key, value in method.config.model_dump().items() if value is not None}
    ids = torch.tensor(kept)
    assert [[kept[token] for token in tokens] for _, tokens in student] == [tokens for _, tokens in teacher]
    kd = [
        [divergence(ours, theirs[ids], settings) for ours, theirs in zip(mine, judged, strict=True)]
        for (mine, _), (judged, _) in zip(student, teacher, strict=True)
    ]
    ce = [[-row.log_softmax(-1)[token] for row, token in zip(*each, strict=True)] for each in student]
    terms = {"answers": reduced(ce, "token_mean"), "distillation": reduced(kd, "token_mean")}
    (terms["answers"] + terms["distillation"]).backward()
    expected = {f"term/{key}": value.detach() for key, value in terms.items()}
    expected |= {f"gradient/{key}": p.grad for key, p in method.named_parameters() if p.grad is not None}
    assert_same(found, expected)


def test_micro_batches_are_the_batch() -> None:
    whole, parts = (results(make_pair(), micro_batch=size) for size in (None, 4))
    assert_same(parts, whole)


def test_answers_with_tokens_that_were_cut_off_are_refused_or_met_at_their_bytes() -> None:
    method = make_pair(("yes", "no"))
    with pytest.raises(ValueError, match=r"cut out of the student's vocabulary.*alignment=bytes"):
        method(batch_of(method))
    met = make_pair(("yes", "no"), alignment="bytes")
    assert met.aligned is not None
    assert met.kept is None
    terms = met(batch_of(met))
    assert 0 < float(terms["distillation"].value.detach()) < 10


def test_taid_reads_the_kept_tokens_too() -> None:
    judge = make_judge()
    at_end = make_task("taid", student=make_small(judge), teacher=judge, start=1.0)
    plain = make_pair(answers_weight=0.0)
    gradients = [{key: g for key, g in results(each).items() if "gradient" in key} for each in (at_end, plain)]
    assert_same(gradients[0], gradients[1])


def test_what_does_not_go_with_kept_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="leave on_policy out"):
        make_pair(on_policy=0.5)
    method = make_pair(top_k=4)
    assert method.not_cached is not None
    assert "alignment=bytes" in method.not_cached
    met = make_pair(top_k=4, alignment="bytes")
    assert met.not_cached is None
    assert asked_of(met, "teacher") is not None
    with pytest.raises(CacheError, match="top_k"):
        asked_of(make_pair(alignment="bytes"), "teacher")


def test_only_a_vocabulary_that_was_cut_out_is_taken_for_one() -> None:
    judge = make_judge()
    small, whole = make_small(judge).vocabulary, judge.model.vocabulary
    assert kept_of(whole, small) is not None
    assert kept_of(small, whole) is None
    assert kept_of(whole, whole) is None
    assert kept_of(make_judge(extra=3).model.vocabulary, make_writer().vocabulary) is None  # the first ones
    from dataclasses import replace

    swapped = (small.pieces[1], small.pieces[0], *small.pieces[2:])
    assert kept_of(whole, replace(small, pieces=swapped)) is None
    assert kept_of(whole, replace(small, lead=" ")) is None


def test_the_doctor_says_how_many_tokens_are_kept() -> None:
    method = make_pair()
    assert method.teacher is not None
    told = compare_writers(method.student, method.teacher.model)[-1]
    sizes = method.student.vocabulary.size, method.teacher.model.vocabulary.size
    assert told.level == "ok"
    assert f"the student writes {sizes[0]} of the teacher's {sizes[1]} tokens" in told.detail
