"""`token_kd` with `alignment: bytes`: teacher and student of two tokenizers, against sums in plain loops."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from test_generative_training import cut_after, state_of
from torch import Tensor
from written_out import kl, reduced, rows_of

from cmapkd.config import ConfigError
from cmapkd.data.turns import Turn
from cmapkd.data.types import Batch
from cmapkd.diagnosis.writing import Asked, check_common, compare_writers
from cmapkd.methods.byte_alignment import ByteAlignment
from cmapkd.methods.byte_distance import ByteDistance
from cmapkd.methods.token_kd import TokenKD
from cmapkd.models import FrozenTeacher, ModelConfig, build_model
from cmapkd.models.token_bytes import Spelling, paired_tokens, token_bytes
from cmapkd.objectives.tokens import TokenDivergence
from cmapkd.run.remarks import remarks_on_ends
from cmapkd.training import Trainer
from writers import (
    STUDENT,
    TEACHER,
    Dialogues,
    assert_same,
    batch_of,
    make_judge,
    make_run,
    make_task,
    results,
)

TEACHERS_TEXTS = ("no", "How many squares?", "a red circ le", "ye s", "and 2 bl ue")  # yes and circle in two tokens
STUDENTS_TEXTS = ("yes", "many squ ares?", "a red circle", "and 2 blue")  # no and squares in two
DIVERGENCES: dict[str, dict[str, Any]] = {
    "forward": {},
    "reverse": {"temperature": 2.0},
    "jsd": {"beta": 0.3, "temperature": 0.7},
    "skew_forward": {"skew": 0.2},
    "skew_reverse": {"skew": 0.3},
    "tv": {},
}


@cache
def _made(texts: tuple[str, ...], lead: str = "") -> Any:
    sizes = STUDENT if texts is STUDENTS_TEXTS else TEACHER
    config = ModelConfig(name="tiny_vlm:small", options={**sizes, "heads": 2, "vocab_size": 310, "max_tokens": 128})
    torch.manual_seed(11)
    model: Any = build_model(config, captions=list(texts) * 4)
    if lead:
        native = model.processor.native
        answers = "{% if message['role'] == 'assistant' %}{{ ' ' }}{% endif %}{% for part"
        native.chat_template = native.chat_template.replace("{% for part", answers)
        again = type(model.processor)(native, image_id=model.processor.image_id, max_tokens=128)
        model = type(model)(model.model, processor=again, name="with a lead")
        assert model.vocabulary.lead == lead
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def make_other(lead: str = "") -> FrozenTeacher:
    """A teacher in float64 whose tokenizer was learned from other texts."""
    return FrozenTeacher(copy.deepcopy(_made(TEACHERS_TEXTS, lead)).double())


def aligned(lead: str = "", **settings: Any) -> TokenKD:
    student = copy.deepcopy(_made(STUDENTS_TEXTS)).double()
    method = make_task("token_kd", student=student, teacher=make_other(lead), alignment="bytes", **settings)
    assert isinstance(method, TokenKD)
    assert method.aligned is not None
    return method


def groups_of(ours: list[bytes], theirs: list[bytes]) -> list[tuple[range, range]]:
    """By common ends, in plain loops; the end of the answer is a letter of its own."""
    ends = []
    for pieces in (ours, theirs):
        at, found = 0, []
        for piece in pieces[:-1]:
            at += len(piece)
            found.append(at)
        found.append(at + 1)
        ends.append(found)
    made, begin, there = [], 0, 0
    for number, end in enumerate(ends[0]):
        if end and end in ends[1]:
            stop = ends[1].index(end) + 1
            made.append((range(begin, number + 1), range(there, stop)))
            begin, there = number + 1, stop
    return made


def measured(q: Tensor, p: Tensor, settings: dict[str, Any]) -> Tensor:
    name, beta, lam = settings["divergence"], settings["beta"], settings["skew"]
    m = beta * p + (1 - beta) * q
    return {
        "forward": lambda: kl(p, q),
        "reverse": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
        "skew_forward": lambda: kl(p, lam * p + (1 - lam) * q),
        "skew_reverse": lambda: kl(q, (1 - lam) * p + lam * q),
        "tv": lambda: (p - q).abs().sum() / 2,
    }[name]() * settings["temperature"] ** 2


def of_group(
    q: Tensor, p: Tensor, own: list[int], other: list[int], pairs: list[tuple[int, int]], top: int | None
) -> tuple[Tensor, Tensor]:
    """The cells of a group: of probabilities [rows, tokens] of its tokens."""
    written = (
        torch.stack([row[token] for row, token in zip(q, own, strict=True)]).prod(),
        torch.stack([row[token] for row, token in zip(p, other, strict=True)]).prod(),
    )
    likeliest = [set(range(p.shape[1])) if top is None else set(row.topk(top).indices.tolist()) for row in p]
    known = all(token in known for token, known in zip(other, likeliest, strict=True))
    used = [(a, b) for a, b in pairs if a != other[0] and b != own[0] and a in likeliest[0]]
    cells = [each[0][[pair[side] for pair in used]] for side, each in enumerate((p, q))]
    if known:
        cells = [torch.cat([cell, each[None]]) for cell, each in zip(cells, written[::-1], strict=True)]
    theirs, ours = (torch.cat([cell, (1 - cell.sum())[None]]) for cell in cells)
    return ours, theirs


def written_out(method: TokenKD, batch: Batch) -> dict[str, Tensor]:
    settings = method.config.model_dump()
    student, temperature = rows_of(method.student, batch.inputs["student"]), settings["temperature"]
    assert method.teacher is not None
    assert method.aligned is not None
    with torch.no_grad():
        teacher = rows_of(method.teacher.model, batch.inputs["teacher"])
    spelled = method.aligned.student.pieces, method.aligned.teacher.pieces
    lead, ends = method.aligned.teacher.lead, (method.aligned.teacher.end_id, method.aligned.student.end_id)
    by_text = {piece: number for number, piece in enumerate(spelled[1]) if piece}
    pairs = [(by_text[piece], number) for number, piece in enumerate(spelled[0]) if piece in by_text] + [ends]
    shifted = {piece.removeprefix(lead): number for piece, number in by_text.items() if piece.startswith(lead)}
    at_start = [(shifted[piece], number) for number, piece in enumerate(spelled[0]) if piece and piece in shifted]
    distances, ce = [], []
    for (logits, own), (judged, other) in zip(student, teacher, strict=True):
        ours, theirs = [spelled[0][number] for number in own], [spelled[1][number] for number in other]
        theirs[0] = theirs[0].removeprefix(lead)
        q, p = (logits / temperature).softmax(-1), (judged / temperature).softmax(-1)
        found = []
        for mine, of_teacher in groups_of(ours, theirs):
            here, there = [own[row] for row in mine], [other[row] for row in of_teacher]
            known = [*at_start, ends] if lead and mine.start == 0 else pairs
            rows = (q[mine.start : mine.stop], p[of_teacher.start : of_teacher.stop])
            found.append(measured(*of_group(*rows, here, there, known, settings["top_k"]), settings))
        distances.append(found)
        ce.append([-row.log_softmax(-1)[token] for row, token in zip(logits, own, strict=True)])
    terms = {"answers": reduced(ce, settings["reduction"]), "distillation": reduced(distances, settings["reduction"])}
    return {name: terms[name] for name in method.term_names}


CASES: dict[str, dict[str, Any]] = {
    **{name: {"divergence": name, **more} for name, more in DIVERGENCES.items()},
    "top 5": {"top_k": 5, "temperature": 2.0},
    "top 200, jsd": {"top_k": 200, "divergence": "jsd"},
    "sample_mean": {"reduction": "sample_mean", "answers_weight": 0.3},
    "batch_sum": {"reduction": "batch_sum"},
    "distillation alone": {"answers_weight": 0.0},
}


@pytest.mark.parametrize("lead", ["", " "])
@pytest.mark.parametrize("name", CASES)
def test_terms_and_gradients_are_the_sums_written_out(name: str, lead: str) -> None:
    method = aligned(lead, **CASES[name])
    batch = batch_of(method)
    found = results(method, batch)
    method.zero_grad()
    terms = written_out(method, batch)
    sum(method.weights[name] * value for name, value in terms.items()).backward()  # type: ignore[union-attr]
    expected = {f"term/{name}": value.detach() for name, value in terms.items()}
    expected |= {f"gradient/{name}": p.grad for name, p in method.named_parameters() if p.grad is not None}
    assert any("vision" in key for key in expected)
    assert_same(found, expected)


def test_the_two_tokenizers_of_these_tests_differ_in_pairs_and_in_groups() -> None:
    method = aligned()
    batch = batch_of(method)
    assert method.aligned is not None
    targets = [batch.inputs[role].texts.ids[batch.inputs[role].answer] for role in ("student", "teacher")]  # type: ignore[attr-defined]
    groups = method.aligned.groups(*targets)
    sizes = {tuple((each.stop - each.start)[row].item() for each in groups[:2]) for row in range(len(groups.first))}
    assert (1, 1) in sizes
    assert any(a > 1 for a, _ in sizes)
    assert any(b > 1 for _, b in sizes)
    assert 256 < len(method.aligned.pairs) < 300
    assert int(groups.first.sum()) == len(batch)


@pytest.mark.parametrize(
    "settings", [{}, {"divergence": "jsd", "temperature": 2.0}, {"top_k": 5}, {"compare": "hybrid"}]
)
def test_of_one_tokenizer_it_is_the_plain_loss_exactly(settings: dict[str, Any]) -> None:
    plain = {name: value for name, value in settings.items() if name != "compare"}
    for judge in (make_judge, lambda: make_judge(extra=3)):
        found, expected = (
            results(make_task("token_kd", teacher=judge(), **each))
            for each in ({"alignment": "bytes", **settings}, plain)
        )
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value), key


def test_the_cells_of_one_tokenizer_are_its_tokens() -> None:
    """What is computed for two tokenizers, on two that are one, is the plain divergence to rounding.

    Control tokens, which are one cell between two tokenizers, are given texts for this.
    """
    plain, forced = make_task("token_kd", answers_weight=0.0), make_task("token_kd", answers_weight=0.0)
    assert isinstance(forced, TokenKD)
    assert forced.teacher is not None
    met = ByteAlignment(forced.teacher.model, forced.student)
    spelled, end = met.teacher.pieces, met.teacher.end_id
    named = tuple(piece or (b"" if n == end else f"control {n}".encode()) for n, piece in enumerate(spelled))
    met.pairs = met.first_pairs = paired_tokens(*[replace(met.teacher, pieces=named)] * 2)
    forced.aligned = met
    assert_same(results(forced), results(plain))


@pytest.mark.parametrize("micro_batch", [1, 4, 5])
@pytest.mark.parametrize(
    "settings",
    [*(CASES[name] for name in ("forward", "top 5", "sample_mean")), {"compare": "hybrid"}, {"compare": "ranked"}],
    ids=str,
)
def test_micro_batches_are_the_batch(settings: dict[str, Any], micro_batch: int) -> None:
    whole, parts = (results(aligned(" ", **settings), micro_batch=size) for size in (None, micro_batch))
    assert float(whole["term/distillation"]) > 0
    assert_same(parts, whole)


@pytest.mark.parametrize("compare", ["text", "hybrid", "ranked"])
def test_a_few_groups_at_a_time_are_all_at_once(compare: Any) -> None:
    found = []
    for chunk in (None, 3):
        method = aligned(" ", compare=compare)
        batch = batch_of(method)
        assert method.aligned is not None
        student = method.student(batch.inputs["student"])
        teacher = method.read_teacher(batch)
        groups = method.aligned.groups(student.targets, teacher.targets)
        total = ByteDistance(compare, TokenDivergence()).total(
            method.aligned,
            student,
            (teacher.targets, (teacher.hidden["answer"].values, teacher.head)),
            groups,
            weights=torch.linspace(0.5, 1, len(groups.first), dtype=torch.float64),
            chunk=chunk,
        )
        total.backward()
        found.append(
            {"total": total.detach()} | {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
        )
    assert_same(found[1], found[0])


@pytest.mark.parametrize("compare", ["hybrid", "ranked"])
def test_groups_by_rank_train_and_fall(compare: str) -> None:
    method = aligned(compare=compare, answers_weight=0.0, divergence="jsd" if compare == "hybrid" else "forward")
    batch, seen = batch_of(method), []
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        term = method(batch)["distillation"].value
        seen.append(float(term.detach()))
        term.backward()
        optimizer.step()
    assert seen[-1] < seen[0]


def test_cells_sum_to_one_and_agree_where_models_do() -> None:
    method = aligned()
    batch = batch_of(method)
    value = float(method(batch)["distillation"].value.detach())
    assert value > 0
    assert math.isfinite(value)


# ------------------------------------------------------------------------------------------------ runs


def test_a_run_that_was_cut_ends_as_one_that_was_not(tmp_path: Path) -> None:
    """Bit for bit, in micro-batches and with bad samples."""

    def trainer(out: str) -> Trainer:
        method = aligned(" ", divergence="jsd", top_k=40)
        return make_run(tmp_path / out, method, source=Dialogues(bad=(3, 17)), micro_batch=3, checkpoint_every=3)

    whole, cut, again = trainer("whole"), trainer("cut"), trainer("cut")
    whole.run()
    cut_after(cut, 5)
    torch.manual_seed(1234)
    again.run(resume=True)
    expected, found = state_of(whole), state_of(again)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_doctor_and_run_say_how_tokens_meet() -> None:
    method = aligned()
    assert method.teacher is not None
    assert method.aligned is not None
    told = compare_writers(method.student, method.teacher.model, by_bytes=True)[-1]
    assert told.level == "ok"
    assert f"{len(method.aligned.pairs)} of the student's {method.student.vocabulary.size} tokens" in told.detail
    assert not [*remarks_on_ends(method)]
    (said,) = remarks_on_ends(make_task("token_kd", alignment="bytes"))
    assert "teacher and student have one tokenizer" in said


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_policy": 0.5}, "leave on_policy out"),
        ({"divergence": "sampled_reverse", "on_policy": 1.0}, "another divergence than sampled_reverse"),
        ({"compare": "ranked", "divergence": "jsd"}, "leave divergence out"),
        ({"alignment": "ids", "compare": "hybrid"}, "set alignment: bytes"),
        ({"alignment": "words"}, "alignment"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_task("token_kd", **{"alignment": "bytes", **settings})


def test_two_tokenizers_without_alignment_are_refused_and_told_of_it() -> None:
    with pytest.raises(ConfigError, match=r"(?s)different tokenizers.*alignment=bytes"):
        make_task("token_kd", teacher=make_other())


def test_other_answers_are_refused() -> None:
    method = aligned()
    batch, other = batch_of(method), batch_of(method, range(1, 7))
    mixed = Batch(batch.ids, {**batch.inputs, "teacher": other.inputs["teacher"]}, batch.captions)
    with pytest.raises(ValueError, match="the student's tokens of an answer stand for"):
        method(mixed)
    fewer = Batch(batch.ids, {**batch.inputs, "teacher": batch_of(method, range(5)).inputs["teacher"]}, batch.captions)
    with pytest.raises(ValueError, match="6 answers in this batch and the teacher 5"):
        method(fewer)


def test_bytes_of_sentencepiece_tokens_and_the_space_that_they_put_before_a_text() -> None:
    """Llama's form: a space is a letter, bytes have tokens, and a text begins with a space that is not its own."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", "<0x61>", "<0xC3>", "<0xA9>", "▁", "a", "▁a", "b", "é"]
    backend = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [("▁", "a")], byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    native = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>")
    found = token_bytes(native, size=10, control=frozenset({0}), name="it")
    assert found == (b"", b"a", b"\xc3", b"\xa9", b" ", b"a", b" a", b"b", "é".encode(), b"")
    llama = Spelling(found[:9], b" ", 0)
    plain = Spelling((b"a", b"b", b" a", b"\xc3", b""), b"", 4)
    within, first = (paired_tokens(llama, plain, first=each) for each in (False, True))
    assert list(zip(within.teacher.tolist(), within.student.tolist(), strict=True)) == [
        (5, 0),
        (7, 1),
        (6, 2),
        (2, 3),
        (0, 4),
    ]
    assert list(zip(first.teacher.tolist(), first.student.tolist(), strict=True)) == [(6, 0), (0, 4)]


def test_every_byte_has_a_letter() -> None:
    judge = make_other()
    spelled = judge.model.processor.spelling(judge.model.vocabulary.size)
    assert {bytes([byte]) for byte in range(256)} <= set(spelled.pieces)
    for text in ("yes", "naïve 日本 \n\t\x00 🙂", "a red circle"):
        ids = judge.model.processor.encode_answer(text)
        assert spelled.text(ids) == text.encode()


def test_a_processor_without_known_bytes_is_refused() -> None:
    judge = make_other()
    native = judge.model.processor.native.tokenizer
    from tokenizers import decoders

    native.backend_tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ConfigError, match=r"bytes of the tokens of .* are not known"):
        make_task("token_kd", teacher=judge, alignment="bytes")


def test_a_tokenizer_that_spells_with_more_tokens_is_met_at_bytes() -> None:
    """By ids, answers with tokens that one model alone has could not be used. Tokens that were added do not count."""
    student, teacher = (_grown(size) for size in (300, 330))
    assert student.vocabulary.pieces == teacher.vocabulary.pieces[: student.vocabulary.size]
    plain, by_bytes = (
        make_task("token_kd", student=student, teacher=FrozenTeacher(teacher), alignment=each)
        for each in ("ids", "bytes")
    )
    assert plain.num_tokens == student.vocabulary.size < teacher.vocabulary.size
    assert isinstance(by_bytes, TokenKD)
    assert by_bytes.aligned is not None
    assert by_bytes.num_tokens is None
    for extra in (0, 3):
        same = make_task("token_kd", teacher=make_judge(extra=extra), alignment="bytes")
        assert isinstance(same, TokenKD)
        assert same.aligned is None


def _grown(size: int) -> Any:
    """A model whose tokenizer was learned from the same texts, up to so many tokens."""
    config = ModelConfig(name="tiny_vlm:small", options={**STUDENT, "heads": 2, "vocab_size": size, "max_tokens": 96})
    torch.manual_seed(1)
    texts = ["a red circle is left of two blue squares", "three green stars stand below one yellow moon"]
    return build_model(config, captions=texts * 9).double()


def test_the_doctor_counts_answers_with_tokens_that_one_model_alone_has() -> None:
    more, plain = make_judge(extra=3).model, make_judge().model
    asked = Asked(Dialogues(), [(Turn("user", "What?", 1), Turn("assistant", "quagga0"))], [0])
    (told,) = check_common(more, plain, asked, max_bad_share=0.1)
    assert told.level == "problem"
    assert "set method.alignment=bytes" in told.detail
    assert not check_common(plain, more, asked, max_bad_share=0.1)
