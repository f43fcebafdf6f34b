"""Rollouts: the student's own answers in the place of given ones, drawn as pure functions of the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Annotated, Literal

import torch
from jaxtyping import Bool
from pydantic import Field
from torch import Tensor

from cmapkd.config import Config
from cmapkd.data.dialogues import ChatInput, join_items
from cmapkd.data.random import key_of, uniforms
from cmapkd.data.types import Batch, Input
from cmapkd.features import mean_over_processes
from cmapkd.methods.step import StepInfo
from cmapkd.models.generative import Decoding, GenerativeModel

ROLLED = "rolled out"
"""Under which a batch says which of its answers the student wrote itself, Bool[batch]."""

PASSED = "passed the gate"
"""Under which a batch says which of its answers the teacher is followed in, Bool[batch]."""


class OnPolicyConfig(Config):
    """How often the student learns from answers of its own, and how these are drawn.

    Source: Agarwal et al. 2024, arXiv:2306.13649 (GKD; `share` is its lambda). The coin is tossed for each sample.
    """

    share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Probability that a sample's answer is the student's own; it always is where the data have none "
        "(data.prompts.unanswered: student).",
    )
    temperature: float = Field(1.0, ge=0, description="Of the draws; 0: always the likeliest token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draws are among the likeliest tokens of this probability.")
    max_new_tokens: int = Field(128, ge=1, description="Longest answer; a longer one is cut and learned as it is.")
    gate: Literal["right"] | Annotated[float, Field(ge=0, le=1)] | None = Field(
        None,
        description="In which answers of its own the student follows the teacher. right: in those that say what the "
        "data's answer says, in any case; a number: in so many of them, drawn by sample, a control; none: in all.",
    )

    @property
    def decoding(self) -> Decoding:
        return Decoding(self.max_new_tokens, self.temperature, self.top_p)


def roll_out(
    batch: Batch,
    student: GenerativeModel,
    teachers: Mapping[str, GenerativeModel],
    config: OnPolicyConfig,
    *,
    step: StepInfo,
    common: int | None = None,
    at_once: int | None = None,
) -> tuple[Batch, dict[str, Tensor]]:
    """The batch with drawn answers for the samples whose coin says so, or that the data have no answer to.

    Returns it with what is worth logging of the answers.

    Coin and draws are functions of (seed, step, sample id): neither batch, process nor resume changes them. Every
    process must call it in the same step, because what is logged is measured over all of them.

    An answer is also cut where its dialogue would be longer than a reader of the batch takes, with any of the models'
    prompts: it counts as unfinished.

    Args:
        teachers: by role, those that judge the answers: they read the same tokens behind their own prompts.
        common: how many tokens they have in common with the student, the first ones; no others are drawn. None: all.
        at_once: prompts that are answered at once; None: all.
    """
    began = perf_counter()
    given, inputs = batch.inputs["student"], dict(batch.inputs)
    assert isinstance(given, ChatInput)
    answered = given.given or [True] * len(batch)
    own = [
        not known or _coin(step, sample_id) < config.share for known, sample_id in zip(answered, batch.ids, strict=True)
    ]
    places = [place for place, is_own in enumerate(own) if is_own]
    how = replace(config.decoding, never=_never(student, teachers, common))
    answers: list[list[int]] = []
    size = at_once or len(batch)
    items = given.items() if places else []
    room = _room([batch.inputs[role] for role in ("student", *teachers)], places, how.max_new_tokens)
    for start in range(0, len(places), size):
        some, limits = places[start : start + size], room[start : start + size]
        keys = [key_of("rollout", step.seed, step.step, batch.ids[place]) for place in some]
        prompts = join_items([items[place] for place in some], given.pad_id)
        written = student.generate(prompts.to(student.device, True), replace(how, max_new_tokens=max(1, *limits)), keys)
        answers += [answer[:limit] for answer, limit in zip(written, limits, strict=True)]
    torch.clear_autocast_cache()  # weights that were cast without gradient are not those of the forward pass
    for role in ("student", *teachers) if places else ():
        theirs = batch.inputs[role]
        assert isinstance(theirs, ChatInput)
        inputs[role] = (
            inputs["student"] if role != "student" and theirs is given else _replaced(theirs, places, answers)
        )
    extra = {**batch.extra, ROLLED: torch.tensor(own)}
    right: list[bool] | None = None
    if config.gate is not None:
        right = _right(answers, [given.answers()[place] for place in places], student)
        passed = [True] * len(batch)
        for place, is_right in zip(places, right, strict=True):
            passed[place] = is_right if config.gate == "right" else _gate(step, batch.ids[place]) < config.gate
        extra[PASSED] = torch.tensor(passed)
    measured = _measured(answers, student, size=len(batch), seconds=perf_counter() - began, right=right)
    return replace(batch, inputs=inputs, extra=extra), measured


def followed(part: Batch, device: torch.device, *, own_alone: bool) -> Bool[Tensor, " samples"] | None:
    """In which samples of a part of the batch the teacher is followed: those that passed the gate; None: in all.

    Args:
        own_alone: not in answers that the data give.
    """
    passed: Tensor | None = part.extra.get(PASSED)
    found = None if passed is None else passed.to(device, non_blocking=True)
    own: Tensor | None = part.extra.get(ROLLED)
    if not own_alone or own is None:
        return found
    own = own.to(device, non_blocking=True)
    return own if found is None else own & found


def _coin(step: StepInfo, sample_id: str) -> float:
    return float(uniforms(1, "on_policy", step.seed, step.step, sample_id)[0])


def _gate(step: StepInfo, sample_id: str) -> float:
    return float(uniforms(1, "gate", step.seed, step.step, sample_id)[0])


def _right(answers: Sequence[Sequence[int]], expected: Sequence[Sequence[int]], student: GenerativeModel) -> list[bool]:
    """Whether answers say what is expected: the same words in any case, with or without a full stop."""

    def words(ids: Sequence[int]) -> list[str]:
        ended = ids[:-1] if ids and ids[-1] in student.vocabulary.end_ids else ids
        return student.processor.decode(ended).strip().removesuffix(".").lower().split()

    return [words(own) == words(known) for own, known in zip(answers, expected, strict=True)]


def _room(inputs: Sequence[Input], places: Sequence[int], most: int) -> list[int]:
    """How many tokens the answers at some places may have: `most`, or as many as every reader's limit leaves."""
    if not places:
        return []
    left = [each.room() for each in inputs if isinstance(each, ChatInput)]
    return [min([most, *(room[place] for room in left if room is not None)]) for place in places]


def _never(student: GenerativeModel, teachers: Mapping[str, GenerativeModel], common: int | None) -> tuple[int, ...]:
    """Tokens that a teacher could not read in an answer: it has no such token, or one that stands for a picture."""
    size = student.vocabulary.size
    pictures = {teacher.vocabulary.image_id for teacher in teachers.values()}
    return (*sorted(token for token in pictures if token < size), *range(size if common is None else common, size))


def _replaced(inputs: ChatInput, places: Sequence[int], answers: Sequence[Sequence[int]]) -> ChatInput:
    """With other last answers at some places."""
    items = inputs.items()
    for place, item in zip(places, inputs.rows(places).with_answers(answers).items(), strict=True):
        items[place] = item
    return replace(join_items(items, inputs.pad_id), max_tokens=inputs.max_tokens)


def _measured(
    answers: Sequence[Sequence[int]],
    student: GenerativeModel,
    *,
    size: int,
    seconds: float,
    right: Sequence[bool] | None,
) -> dict[str, Tensor]:
    """Over all processes: the share of samples with answers of the student's own, their length, and how many did not
    end; the seconds that a process took for them; and how many are right, where that is known."""
    ended = sum(bool(answer) and answer[-1] in student.vocabulary.end_ids for answer in answers)
    counts = [size, len(answers), sum(map(len, answers)), len(answers) - ended, sum(right or ())]
    own = torch.tensor([*counts, seconds], dtype=torch.float64).to(student.device, non_blocking=True)
    samples, number, tokens, unfinished, correct, took = mean_over_processes(own).unbind()
    values = {"share": number / samples, "tokens": tokens / number.clamp(min=1e-9), "seconds": took}
    values["unfinished"] = unfinished / number.clamp(min=1e-9)
    if right is not None:
        values["right"] = correct / number.clamp(min=1e-9)
    return {f"rollouts/{name}": value for name, value in values.items()}
