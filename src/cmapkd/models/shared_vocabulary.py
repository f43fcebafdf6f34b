"""Whether two models write the same tokens and end their answers alike, and the part of a head that both have."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from jaxtyping import Int
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.models.token_types import LogitHead, Vocabulary


def check_same_vocabulary(teacher: Vocabulary, student: Vocabulary) -> int:
    """How many tokens both models have in common: the first ones, by id.

    Models of one family often differ in tokens that were added at the end. Predictions are then compared over the
    common ones: cut both heads by `cut_head`.

    Raises:
        ConfigError: the tokens differ, it is not known whether they do, an end token is none of the common ones, or
            the chat templates write other whitespace before an answer.
    """
    if teacher.lead != student.lead:
        raise ConfigError(
            f"the teacher writes {teacher.lead!r} before an answer and the student {student.lead!r}, so their answers "
            "have other tokens. Give the student a chat template that writes the teacher's text there, or set "
            "method.alignment=bytes (token_kd)."
        )
    if teacher.digest == student.digest and teacher.size == student.size:
        return student.size
    common = min(teacher.size, student.size)
    if not teacher.pieces or not student.pieces:
        raise ConfigError(
            f"the teacher has {teacher.size} tokens (digest {teacher.digest[:12]}) and the student {student.size} "
            f"({student.digest[:12]}), and the pieces of one are not known. Take two models with one tokenizer."
        )
    pairs = zip(teacher.pieces[:common], student.pieces[:common], strict=True)
    different = [number for number, (one, other) in enumerate(pairs) if one != other]
    if different:
        first = different[0]
        raise ConfigError(
            f"teacher and student have different tokenizers: {len(different)} of their first {common} tokens differ. "
            f"The first is token {first}: {teacher.pieces[first]!r} of the teacher, {student.pieces[first]!r} of the "
            "student. A divergence compares predictions token by token. Take two models with one tokenizer, or method "
            "token_kd with method.alignment=bytes."
        )
    lost = [number for number in (*teacher.end_ids, *student.end_ids) if number >= common]
    if lost:
        raise ConfigError(
            f"end tokens {lost} are known to one model only: teacher and student share their first {common} tokens. "
            "Give both models an end token that both know."
        )
    return common


def kept_of(teacher: Vocabulary, student: Vocabulary) -> tuple[int, ...] | None:
    """The teacher's id of each token of a student whose vocabulary was cut out of the teacher's; else None.

    A cut vocabulary has the teacher's pieces in the teacher's order, and the same control tokens.
    """
    if not 0 < len(student.pieces) < len(teacher.pieces) or teacher.lead != student.lead:
        return None
    if student.pieces == teacher.pieces[: len(student.pieces)]:
        return None  # the first ones, which need no table
    numbers = {piece: number for number, piece in enumerate(teacher.pieces)}
    found = tuple(numbers.get(piece, -1) for piece in student.pieces)
    in_order = found[0] >= 0 and all(one < other for one, other in pairwise(found))
    ends_alike = found[student.end_ids[0]] == teacher.end_ids[0]
    return found if in_order and ends_alike else None


def remark_on_ends(teacher: Vocabulary, student: Vocabulary) -> str | None:
    """A sentence where two models with common tokens end their answers with different ones; else None."""
    theirs, own = teacher.end_ids[0], student.end_ids[0]
    if theirs == own:
        return None
    return (
        f"the student's answers end with {named_token(student, own)}, and the teacher's with "
        f"{named_token(teacher, theirs)}: behind an answer the data teach the one, and the teacher teaches the other. "
        "Give both models one chat template, for example the instruct version of the student"
    )


def named_token(vocabulary: Vocabulary, number: int) -> str:
    """The token's number, and its piece where it is known."""
    return f"token {number}" + (f" {vocabulary.pieces[number]!r}" if number < len(vocabulary.pieces) else "")


def picked_head(head: LogitHead, ids: Int[Tensor, " kept"]) -> LogitHead:
    """The head over some of its tokens, in that order."""
    return replace(head, weight=head.weight[ids], bias=None if head.bias is None else head.bias[ids])


def cut_head(head: LogitHead, size: int) -> LogitHead:
    """The head over its first `size` tokens: itself where it has no more, so that no gradient is copied.

    Raises:
        ValueError: it has fewer.
    """
    num_tokens = len(head.weight)
    if size > num_tokens:
        raise ValueError(f"the head has {num_tokens} tokens, fewer than {size}")
    if size == num_tokens:
        return head
    return replace(head, weight=head.weight[:size], bias=None if head.bias is None else head.bias[:size])
