"""The language hierarchy against slow loops, and words that two tokenizers share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import jaxtyped
from torch import Tensor

from cmapkd.data.types import TokenBatch
from cmapkd.features.hierarchy import (
    LanguageProjectors,
    phrases,
    sentence_level,
    token_level,
)
from cmapkd.features.words import WordAligner, Words, aligned_words, pool_words
from cmapkd.models.types import Level, LevelInfo
from cmapkd.models.vocabulary import TrainedTokenizer

WIDTH = 4


def phrase_level(level: Level, window: int = 3) -> tuple[Tensor, Tensor]:
    return phrases(*token_level(level), window=window)


MASKS = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 1],
        [0, 1, 1, 0, 1, 0, 1],
        [0, 0, 0, 0, 0, 0, 0],
    ],
    dtype=torch.bool,
)
Spans = list[tuple[int, int]]


def numbers_of(words: Words) -> tuple[Tensor, Tensor, int]:
    return words.student, words.teacher, words.count


def level(mask: Tensor | None = MASKS, *, seed: int = 0) -> Level:
    draws = torch.Generator().manual_seed(seed)
    return Level(torch.randn(*MASKS.shape, WIDTH, generator=draws, dtype=torch.float64), "tokens", mask=mask)


def batch(*spans: Spans) -> TokenBatch:
    """Tokens that stand at `spans`; (0, 0) for special tokens and padding."""
    length = max(len(row) for row in spans)
    rows = torch.tensor([row + [(0, 0)] * (length - len(row)) for row in spans])
    mask = torch.arange(length)[None] < torch.tensor([len(row) for row in spans])[:, None]
    return TokenBatch(torch.randint(0, 2**40, mask.shape), mask, rows)


# ------------------------------------------------------------------------------------------------ levels


@pytest.mark.parametrize("window", [1, 2, 3, 7, 9])
def test_phrases_written_out(window: int) -> None:
    text = level()
    values, found = phrase_level(text, window)
    assert values.shape[1] == max(7 - window, 0) + 1
    for sample, mask, means, where in zip(text.values, MASKS, values, found, strict=True):
        real = [token for token, keep in zip(sample, mask, strict=True) if keep]
        expected = [torch.stack(real[n : n + window]).mean(0) for n in range(len(real) - window + 1)]
        if real and len(real) < window:
            expected = [torch.stack(real).mean(0)]
        assert where.tolist() == [n < len(expected) for n in range(len(where))]
        for n, mean in enumerate(means):
            torch.testing.assert_close(mean, expected[n] if n < len(expected) else torch.zeros_like(mean))


def test_tokens_and_sentences() -> None:
    text = level()
    assert token_level(text)[0] is text.values
    assert token_level(text)[1] is MASKS
    assert token_level(level(None))[1].all()
    for sample, mask, mean in zip(text.values, MASKS, sentence_level(text), strict=True):
        torch.testing.assert_close(mean, sample[mask].mean(0) if mask.any() else torch.zeros_like(mean))


def test_padding_never_leaks() -> None:
    text = level()
    values = text.values.requires_grad_()
    outputs = (phrase_level(text, 3)[0], sentence_level(text), pool_words(values, MASKS.long() * 3 - 1, 3)[0])
    sum(output.square().sum() for output in outputs).backward()
    assert values.grad is not None
    assert not values.grad[~MASKS].any()
    assert values.grad[MASKS].all()
    changed = replace(text, values=values.detach().masked_fill(~MASKS[..., None], torch.nan))
    again = (
        phrase_level(changed, 3)[0],
        sentence_level(changed),
        pool_words(changed.values, MASKS.long() * 3 - 1, 3)[0],
    )
    for left, right in zip(outputs, again, strict=True):
        assert torch.equal(left, right)


def test_what_is_no_text_is_refused() -> None:
    for wrong in (Level(torch.zeros(1, 4, 2, 2), "map"), Level(torch.zeros(1, 5, 3), "tokens", 1, (2, 2))):
        for read in (token_level, phrase_level, sentence_level):
            with pytest.raises(ValueError, match="not a text tower's"):
                read(wrong)
    with pytest.raises(ValueError, match="at least one token, got 0"):
        phrase_level(level(), 0)


# ------------------------------------------------------------------------------------------------ words


def words_in_loops(student: Spans, teacher: Spans) -> tuple[list[int], list[int], int]:
    """Merges overlapping spans until nothing changes, then keeps the groups that hold tokens of both."""
    tokens = [(role, n, span) for role, row in enumerate((student, teacher)) for n, span in enumerate(row)]
    groups = [{token} for token in tokens if token[2][1] > token[2][0]]
    merged = True
    while merged:
        merged = False
        for a in groups:
            for b in groups:
                if a is not b and any(x[2][0] < y[2][1] and y[2][0] < x[2][1] for x in a for y in b):
                    a |= b
                    groups.remove(b)
                    merged = True
                    break
            if merged:
                break
    shared = [group for group in groups if {role for role, _, _ in group} == {0, 1}]
    shared.sort(key=lambda group: min(span for _, _, span in group))
    numbers = [[-1] * len(student), [-1] * len(teacher)]
    for word, group in enumerate(shared):
        for role, n, _ in group:
            numbers[role][n] = word
    return numbers[0], numbers[1], len(shared)


@st.composite
def spans(draw: st.DrawFn) -> Spans:
    """Tokens in order, some touching, some with gaps, some sharing a character, some without any."""
    row, at = [], 0
    for _ in range(draw(st.integers(1, 6))):
        start = max(0, at + draw(st.integers(-1, 2)))
        end = start + draw(st.integers(0, 3))
        row.append((start, end) if end > start else (0, 0))
        at = max(at, end)
    return row


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(spans(), spans()), min_size=1, max_size=3))
def test_words_are_what_merging_overlaps_gives(texts: list[tuple[Spans, Spans]]) -> None:
    student, teacher = batch(*(text[0] for text in texts)), batch(*(text[1] for text in texts))
    of_student, of_teacher, num_words = numbers_of(aligned_words(student, teacher))
    expected = [words_in_loops(*text) for text in texts]
    assert num_words == max(count for _, _, count in expected)
    for row, numbers in enumerate(expected):
        for found, wanted in ((of_student[row], numbers[0]), (of_teacher[row], numbers[1])):
            assert found[: len(wanted)].tolist() == wanted
            assert (found[len(wanted) :] == -1).all()


def test_words_of_a_text() -> None:
    #        "a red triangle": start a red tri angle end
    student = batch([(0, 0), (0, 1), (2, 5), (6, 9), (9, 14), (0, 0)])
    teacher = batch([(0, 1), (1, 4), (4, 5), (5, 14)])  # a, " re", "d", " triangle"
    of_student, of_teacher, num_words = numbers_of(aligned_words(student, teacher))
    assert of_student.tolist() == [[-1, 0, 1, 2, 2, -1]]
    assert of_teacher.tolist() == [[0, 1, 1, 2]]
    assert num_words == 3
    cut = batch([(0, 1), (1, 4)])  # a shorter context
    assert aligned_words(student, cut).student.tolist() == [[-1, 0, 1, -1, -1, -1]]
    assert aligned_words(batch([(0, 0)]), teacher).count == 0


def test_vocabularies_of_different_captions_meet_at_words() -> None:
    fine = TrainedTokenizer.train(["ab cd"] * 4, vocab_size=20, context_length=60)
    coarse = TrainedTokenizer.train(["The small dog, a zebra abcd!"] * 9, vocab_size=400, context_length=60)
    texts = ["The abcd dog", "A zebra, a DOG!", "abcd"]
    for tokenizer in (fine, coarse):
        tokenizer._tokenizer.pre_tokenizer = coarse._tokenizer.pre_tokenizer
    student, teacher = fine(texts, spans=True), coarse(texts, spans=True)
    assert student.ids.shape != teacher.ids.shape
    numbers = numbers_of(aligned_words(student, teacher))
    assert student.spans is not None
    assert teacher.spans is not None
    for row, text in enumerate(texts):
        for role, tokens in enumerate((student, teacher)):
            found: dict[int, str] = {}
            for word, (a, b) in zip(numbers[role][row].tolist(), tokens.spans[row].tolist(), strict=True):
                if word >= 0:
                    found[word] = found.get(word, "") + text[a:b]
            if role == 0:
                of_student = found
            assert list(found) == list(range(len(found)))
        assert found == of_student  # the same characters in both models' words
    assert set("".join(of_student.values())) <= set(texts[2])


def test_the_same_tokens_match_position_by_position() -> None:
    ids, mask = torch.arange(12).view(2, 6), torch.arange(6)[None] < torch.tensor([[6], [3]])
    tokens = TokenBatch(ids, mask)
    words = aligned_words(tokens, TokenBatch(ids.clone(), mask.clone()))
    of_student, of_teacher, num_words = numbers_of(words)
    assert words.are_tokens
    assert of_student.tolist() == of_teacher.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, -1, -1, -1]]
    values = torch.randn(2, 6, WIDTH)
    pooled, found = pool_words(values, of_student, num_words)
    torch.testing.assert_close(pooled, values * mask[..., None])
    assert torch.equal(found, mask)
    as_tokens, found = words.pool("teacher", values)
    assert torch.equal(as_tokens, pooled)  # bit for bit: a mean of one token is the token
    assert torch.equal(found, mask)


def test_words_found_without_looking_are_the_same_words() -> None:
    """As on a GPU, where looking waits: more numbers than there are words, and the same words and phrases."""
    ids, mask = torch.arange(12).view(2, 6), torch.arange(6)[None] < torch.tensor([[5], [3]])
    spans = torch.arange(6)[None, :, None] * 3 + torch.tensor([0, 2])
    one = TokenBatch(ids, mask, spans * mask[..., None])
    other = TokenBatch(ids + 1, mask, one.spans)
    short = TokenBatch(ids[:, :4], mask[:, :4], one.spans[:, :4])  # type: ignore[index]
    values = torch.randn(2, 6, WIDTH)
    for student, teacher in ((one, one), (one, other), (one, short), (short, one)):
        looked, blind = (aligned_words(student, teacher, look=look) for look in (True, False))
        assert looked.count <= blind.count == min(student.ids.shape[1], teacher.ids.shape[1])
        for role, tokens in (("student", student), ("teacher", teacher)):
            own = values[:, : tokens.ids.shape[1]]
            (words, found), (padded, found_too) = (each.pool(role, own) for each in (looked, blind))
            torch.testing.assert_close(padded[:, : looked.count], words)
            assert torch.equal(found_too[:, : looked.count], found)
            assert not found_too[:, looked.count :].any()
            assert not padded[:, looked.count :].any()


def test_tokens_without_spans_are_the_same_or_refused() -> None:
    ids, mask = torch.arange(12).view(2, 6), torch.ones(2, 6, dtype=torch.bool)
    tokens, others = TokenBatch(ids, mask), TokenBatch(ids + 1, mask)
    align = WordAligner()
    with pytest.raises(ValueError, match="leave levels L1 and L2 out"):
        align(tokens, others)
    assert align(tokens, tokens).are_tokens
    blind = aligned_words(tokens, others, look=False)  # a GPU, which has looked at the first batch
    assert blind.are_tokens
    assert blind.count == 6
    with pytest.raises(ValueError, match="leave levels L1 and L2 out"):
        aligned_words(tokens, TokenBatch(ids[:, :4], mask[:, :4]), look=False)


@pytest.mark.parametrize("look", [True, False])
def test_how_far_a_tokenizer_pads_is_no_difference(look: bool) -> None:
    """One model's texts may be cut to the longest of the batch where the other's are read whole."""
    ids, mask = torch.arange(24).view(2, 12), torch.arange(12)[None] < torch.tensor([[5], [3]])
    spans = (torch.arange(12)[None, :, None] * 3 + torch.tensor([0, 2])) * mask[..., None]
    spans[:, 0] = 0  # the start token, which is no word where tokens differ
    for known in (spans, None):
        padded = TokenBatch(ids, mask, known)
        cut = replace(padded, ids=torch.where(mask, ids, 7)).measured().cut()
        assert cut.ids.shape == (2, 8)
        values = torch.randn(2, 12, WIDTH)
        expected, real = aligned_words(padded, padded, look=look).pool("student", values)
        for student, teacher in ((cut, padded), (padded, cut)):
            words = aligned_words(student, teacher, look=look)
            for role, tokens in (("student", student), ("teacher", teacher)):
                found, there = words.pool(role, values[:, : tokens.ids.shape[1]])
                torch.testing.assert_close(found, expected[:, : words.count])
                assert torch.equal(there, real[:, : words.count])
                assert not real[:, words.count :].any()


def test_words_pool_the_mean_of_their_tokens() -> None:
    values = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    numbers = torch.tensor([[-1, 0, 1, 1, -1], [0, 0, 0, -1, -1]])
    pooled, found = pool_words(values, numbers, 3)
    assert found.tolist() == [[True, True, False], [True, False, False]]
    for row in range(2):
        for word in range(3):
            members = values[row][numbers[row] == word]
            expected = members.mean(0) if len(members) else torch.zeros(WIDTH, dtype=torch.float64)
            torch.testing.assert_close(pooled[row, word], expected)
    assert phrases(pooled, found, window=2)[1].tolist() == [[True, False], [True, False]]


def test_words_that_cannot_be_matched() -> None:
    student, teacher = batch([(0, 1), (2, 3)]), batch([(0, 3)])
    with pytest.raises(ValueError, match=r"the teacher's tokenizer does not say.*leave levels L1 and L2 out"):
        aligned_words(student, replace(teacher, spans=None))
    with pytest.raises(ValueError, match=r"the student's and teacher's tokenizer"):
        aligned_words(replace(student, spans=None), replace(teacher, spans=None))
    with pytest.raises(ValueError, match=r"student has 1 texts, the teacher 2"):
        aligned_words(student, batch([(0, 3)], [(0, 3)]))


# ------------------------------------------------------------------------------------------------ projecting


def test_projectors() -> None:
    student = {name: LevelInfo("blocks.0", WIDTH, "tokens") for name in ("L1", "L2", "L3")}
    teacher = {name: LevelInfo("blocks.0", 6, "tokens") for name in student}
    project = LanguageProjectors(student, teacher).double()
    text = level()
    out = project({"L3": sentence_level(text), "L1": text.values})
    assert {name: tuple(value.shape) for name, value in out.items()} == {"L3": (6, 6), "L1": (6, 7, 6)}
    out["L1"].sum().backward()
    reached = {name for name, parameter in project.named_parameters() if parameter.grad is not None}
    assert reached == {"linear.L1.weight", "linear.L1.bias"}
    with pytest.raises(ValueError, match="no projector for level L4"):
        project({"L4": text.values})
    with pytest.raises(ValueError, match="give both the same levels"):
        LanguageProjectors(student, {"L1": teacher["L1"]})


def test_under_bf16_autocast() -> None:
    text = replace(level(), values=level().values.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        pooled = pool_words(text.values, MASKS.long() - 1, 1)[0]
        outputs = (phrase_level(text)[0], sentence_level(text), pooled)
    assert {output.dtype for output in outputs} == {torch.float32}
    torch.testing.assert_close(pooled[:, 0], sentence_level(text))


def test_signatures_hold_the_shapes_that_are_passed() -> None:
    def checked(function: object) -> object:
        return jaxtyped(typechecker=beartype)(function)

    text = level()
    student, teacher = batch([(0, 1), (2, 3)]), batch([(0, 3)])
    for function in (token_level, phrase_level, sentence_level):
        checked(function)(text)  # type: ignore[operator]
    checked(phrases)(text.values, MASKS)  # type: ignore[operator]
    checked(aligned_words)(student, teacher)  # type: ignore[operator]
    checked(pool_words)(text.values, MASKS.long() - 1, 1)  # type: ignore[operator]
