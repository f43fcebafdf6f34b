"""A teacher that writes, answered from disk, says what the live one says: token by token, loss by loss."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from token_support import Asked, batch_of, built, make_writer, other_tokenizer, token_kd, token_plan

from cmapkd.cache import CacheError, CacheWarning
from cmapkd.cache.token_layout import TokenLayout
from cmapkd.cache.token_teacher import CachedTokens
from cmapkd.features.top_tokens import top_tokens
from cmapkd.methods.specvlm import SpecVLM, SpecVLMConfig
from cmapkd.methods.token_kd import TokenKD
from cmapkd.models.token_types import TokenNeeds

ROUNDING = 2.0**-11  # of fp16, as a share of a number


def replayed(folder: Path, method: TokenKD, reload: object = None, **changes: object) -> tuple[TokenKD, object]:
    """The same method with a cached teacher, and what answers for it."""
    cached = copy.deepcopy(method)
    plan = token_plan(folder, method, **changes)
    plan.build(device="cpu")
    reader = plan.open()
    cached.teacher = plan.cached_teacher(reader, reload or _never)  # type: ignore[arg-type]
    return cached, reader


def _never() -> None:
    raise AssertionError("the live teacher was asked for")


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_stored_tokens_are_the_live_ones(temperature: float, tmp_path: Path) -> None:
    """Ids and rest exactly; log-probabilities but for the rounding of fp16, in both views of several questions."""
    method = token_kd(temperature=temperature)
    cached, reader = replayed(tmp_path / "c", method)
    seen = set()
    for epoch in (0, 1):
        live_batch, batch = batch_of(method, epoch), batch_of(cached, epoch, stored=reader)  # type: ignore[arg-type]
        assert live_batch.captions == batch.captions
        seen.update(zip(batch.ids, batch.captions, strict=True))
        assert "teacher" not in batch.inputs  # nobody prepares a dialogue for it
        live, found = method.read_teacher(live_batch), cached.read_teacher(batch)
        assert live is not None
        assert found is not None
        assert found.top is not None
        logits = live.head(live.hidden["answer"].values)  # type: ignore[misc]
        wanted = top_tokens(logits, 8, temperature=temperature)
        assert torch.equal(found.targets, live.targets)
        assert torch.equal(found.top.ids, wanted.ids)
        torch.testing.assert_close(found.top.rest, wanted.rest, rtol=1e-5, atol=1e-5)
        gaps = (wanted.log_p[:, :1] - wanted.log_p).abs()
        error = (found.top.log_p - wanted.log_p).abs()
        assert (error <= 2 * ROUNDING * gaps.amax(1, keepdim=True) + 1e-5).all()
        assert gaps.max() * temperature > 1
    assert len(seen) > 6  # samples of both epochs were asked different questions


@pytest.mark.parametrize("settings", [{}, {"alignment": "bytes"}, {"divergence": "jsd", "beta": 0.3}], ids=str)
def test_stored_in_fp32_losses_and_gradients_are_the_live_ones(settings: dict[str, object], tmp_path: Path) -> None:
    method = token_kd(*([other_tokenizer()] if settings.get("alignment") else []), **settings)
    cached, reader = replayed(tmp_path / "c", method, store="fp32")
    found = []
    for made, batch in ((method, batch_of(method, 0)), (cached, batch_of(cached, 0, stored=reader))):  # type: ignore[arg-type]
        terms = made(batch)
        sum(term.weight * term.value for term in terms.values()).backward()  # type: ignore[union-attr]
        gradient = torch.cat([each.grad.flatten() for each in made.student.parameters() if each.grad is not None])
        found.append((terms["distillation"].value.detach(), gradient))
    (live, live_gradient), (value, gradient) = found
    torch.testing.assert_close(value, live, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient, live_gradient, rtol=0, atol=1e-6 * float(live_gradient.abs().max()))


def test_a_draft_that_reads_no_states_can_be_served(tmp_path: Path) -> None:
    task = token_kd(top_k=8)
    assert task.teacher is not None
    config = SpecVLMConfig(top_k=8, features_weight=0)
    method = SpecVLM(config, student=task.student, teacher=task.teacher)  # type: ignore[arg-type]
    cached, reader = replayed(tmp_path / "c", method, store="fp32")
    live, found = method(batch_of(method, 0)), cached(batch_of(cached, 0, stored=reader))  # type: ignore[arg-type]
    assert live.keys() == found.keys() == {"distillation"}
    torch.testing.assert_close(found["distillation"].value, live["distillation"].value, rtol=1e-6, atol=1e-7)


def test_losses_and_gradients_are_the_live_ones_in_micro_batches_too(tmp_path: Path) -> None:
    method = token_kd()
    cached, reader = replayed(tmp_path / "c", method)
    results = []
    for made, batch, size in (
        (method, batch_of(method, 0), None),
        (cached, batch_of(cached, 0, stored=reader), None),  # type: ignore[arg-type]
        (cached, batch_of(cached, 0, stored=reader), 4),  # type: ignore[arg-type]
    ):
        made.micro_batch = size
        made.zero_grad()
        terms = made(batch)
        sum(term.weight * term.value for term in terms.values()).backward()  # type: ignore[union-attr]
        gradient = torch.cat([each.grad.flatten() for each in made.student.parameters() if each.grad is not None])
        results.append((torch.stack([terms[name].value for name in ("answers", "distillation")]).detach(), gradient))
    live, whole, parts = results
    torch.testing.assert_close(whole[0], live[0], rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(whole[1], live[1], rtol=2e-2, atol=2e-3 * float(live[1].abs().max()))
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-3, atol=1e-5 * float(live[1].abs().max()))


def test_a_teacher_of_another_tokenizer_is_stored_in_its_own_tokens(tmp_path: Path) -> None:
    """With alignment bytes; some tokens of its answers are not among its 8 likeliest."""
    method = token_kd(other_tokenizer(), alignment="bytes")
    assert method.aligned is not None
    cached, reader = replayed(tmp_path / "c", method)
    batches = (batch_of(method, 0), batch_of(cached, 0, stored=reader))  # type: ignore[arg-type]
    tokens = [int(batches[0].inputs[role].answer.sum()) for role in ("student", "teacher")]  # type: ignore[attr-defined]
    assert tokens[0] != tokens[1]
    gradients, values = [], []
    for made, batch in zip((method, cached), batches, strict=True):
        terms = made(batch)
        sum(term.weight * term.value for term in terms.values()).backward()  # type: ignore[union-attr]
        gradients.append(
            torch.cat([each.grad.flatten() for each in made.student.parameters() if each.grad is not None])
        )
        values.append(terms["distillation"].value.detach())
    assert float(values[0]) > 0.01
    torch.testing.assert_close(values[1], values[0], rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=2e-2, atol=2e-3 * float(gradients[0].abs().max()))


def test_ranked_distances_have_no_cache(tmp_path: Path) -> None:
    method = token_kd(other_tokenizer(), alignment="bytes", compare="ranked")
    assert method.not_cached is not None
    assert "compare: ranked reads all" in method.not_cached


def test_more_stored_tokens_serve_a_method_that_reads_fewer(tmp_path: Path) -> None:
    rich = token_kd(top_k=24)
    built(tmp_path / "c", rich)
    poor = token_kd(top_k=8)
    cached, reader = replayed(tmp_path / "c", poor, mode="require")
    batch = batch_of(cached, 0, stored=reader)  # type: ignore[arg-type]
    live, found = poor(batch_of(poor, 0)), cached(batch)
    torch.testing.assert_close(found["distillation"].value, live["distillation"].value, rtol=2e-3, atol=2e-4)
    assert batch.stored["teacher"].arrays["ids"].shape[-1] == 24
    more = token_plan(tmp_path / "more", poor, top_k=24)
    more.build(device="cpu")
    assert token_plan(tmp_path / "more", rich).open().num_absent(more.keys) == 0


def test_a_vocabulary_smaller_than_top_k_is_stored_whole(tmp_path: Path) -> None:
    method = token_kd(top_k=1000)
    cached, reader = replayed(tmp_path / "c", method)
    live, found = method(batch_of(method, 0)), cached(batch_of(cached, 0, stored=reader))  # type: ignore[arg-type]
    torch.testing.assert_close(found["distillation"].value, live["distillation"].value, rtol=2e-3, atol=2e-4)


def test_samples_without_answer_are_answered_live(tmp_path: Path) -> None:
    """Their rows stand among the stored ones, in the order of the samples."""
    teacher = make_writer(width=24, seed=7)
    method = token_kd(teacher)
    cached, reader = replayed(
        tmp_path / "c", method, lambda: make_writer(width=24, seed=7), source=Asked(bad=(1, 4, 6))
    )
    batch, live_batch = batch_of(cached, 0, stored=reader), batch_of(method, 0)  # type: ignore[arg-type]
    missing = batch.stored["teacher"].missing
    assert 0 < len(missing) < 6
    with pytest.warns(CacheWarning, match="the teacher is loaded to answer"):
        found = cached.read_teacher(batch)
    live = method.read_teacher(live_batch)
    assert found is not None
    assert live is not None
    assert torch.equal(found.targets, live.targets)
    losses = [made(each)["distillation"].value for made, each in ((cached, batch), (method, live_batch))]
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-3, atol=2e-4)
    part = batch.part(2, 6)
    some = cached.read_teacher(part)
    assert some is not None
    assert torch.equal(some.targets, method.read_teacher(live_batch.part(2, 6)).targets)  # type: ignore[union-attr]


def test_a_row_answers_its_own_question_alone(tmp_path: Path) -> None:
    method = token_kd()
    reader = built(tmp_path / "c", method)
    batch = batch_of(method, 0, stored=reader)
    place = int(batch.stored["teacher"].samples[0])
    with pytest.raises(CacheError, match="another sample, view or caption"):
        reader.read(0, [place], [batch.ids[0]], ["user 1 1 is it pink?\0assistant 0 1 no"], [])


def test_a_cached_teacher_has_distributions_alone(tmp_path: Path) -> None:
    method = token_kd()
    cached, reader = replayed(tmp_path / "c", method)
    teacher = cached.teacher
    assert isinstance(teacher, CachedTokens)
    assert all(parameter.is_meta for parameter in teacher.model.parameters())
    batch = batch_of(cached, 0, stored=reader)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holds next-token distributions alone"):
        teacher(batch, TokenNeeds(levels=("layers.0",)))
    with pytest.raises(ValueError, match="reference embeddings are asked of a teacher that writes"):
        teacher.reference_embeddings(3)
    assert isinstance(teacher.cache.layout, TokenLayout)
