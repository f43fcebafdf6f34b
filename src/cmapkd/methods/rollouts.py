"""Rollouts: the student's own answers in the place of given ones, drawn as pure functions of the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import perf_counter

import torch
from pydantic import Field
from torch import Tensor

from cmapkd.config import Config
from cmapkd.data.dialogues import ChatInput, join_items
from cmapkd.data.random import key_of, uniforms
from cmapkd.data.types import Batch
from cmapkd.methods.step import StepInfo
from cmapkd.models.generative import Decoding, GenerativeModel

ROLLED = "rolled out"
"""Under which a batch says which of its answers the student wrote itself, Bool[batch]."""


class OnPolicyConfig(Config):
    """How often the student learns from answers of its own, and how these are drawn.

    Source: Agarwal et al. 2024, arXiv:2306.13649 (GKD; `share` is its lambda). The coin is tossed for each sample.
    """

    share: float = Field(0.5, ge=0, le=1, description="Probability that a sample's answer is the student's own.")
    temperature: float = Field(1.0, ge=0, description="Of the draws; 0: always the likeliest token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draws are among the likeliest tokens of this probability.")
    max_new_tokens: int = Field(128, ge=1, description="Longest answer; a longer one is cut and learned as it is.")

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
    at_once: int | None = None,
) -> tuple[Batch, dict[str, Tensor]]:
    """The batch with drawn answers for the samples whose coin says so, and what is worth logging of them.

    Coin and draws are functions of (seed, step, sample id): neither batch, process nor resume changes them.

    Args:
        teachers: by role, those that judge the answers: they read them behind their own prompts.
        at_once: prompts that are answered at once; None: all.
    """
    began = perf_counter()
    drawn = [_coin(step, sample_id) < config.share for sample_id in batch.ids]
    rolled = torch.tensor(drawn)
    places = [place for place, own in enumerate(drawn) if own]
    extra = {**batch.extra, ROLLED: rolled}
    if not places:
        return replace(batch, extra=extra), _measured([], student, len(batch), perf_counter() - began)
    given = batch.inputs["student"]
    assert isinstance(given, ChatInput)
    answers: list[list[int]] = []
    for start in range(0, len(places), at_once or len(places)):
        some = places[start : start + (at_once or len(places))]
        prompts = _some(given, some).to(student.device, True)
        keys = [key_of("rollout", step.seed, step.step, batch.ids[place]) for place in some]
        answers += student.generate(prompts, config.decoding, keys)
    inputs = dict(batch.inputs)
    inputs["student"] = _replaced(given, places, answers)
    for role, teacher in teachers.items():
        theirs = inputs[role]
        assert isinstance(theirs, ChatInput)
        same = teacher.vocabulary.digest == student.vocabulary.digest
        inputs[role] = _replaced(theirs, places, answers if same else _translated(answers, student, teacher))
    measured = _measured(answers, student, len(batch), perf_counter() - began)
    return replace(batch, inputs=inputs, extra=extra), measured


def _coin(step: StepInfo, sample_id: str) -> float:
    return float(uniforms(1, "on_policy", step.seed, step.step, sample_id)[0])


def _some(inputs: ChatInput, places: Sequence[int]) -> ChatInput:
    items = inputs.items()
    return join_items([items[place] for place in places], inputs.pad_id)


def _replaced(inputs: ChatInput, places: Sequence[int], answers: Sequence[Sequence[int]]) -> ChatInput:
    """With other last answers at some places."""
    items = inputs.items()
    changed = _some(inputs, places).with_answers(answers).items()
    for place, item in zip(places, changed, strict=True):
        items[place] = item
    return join_items(items, inputs.pad_id)


def _translated(
    answers: Sequence[Sequence[int]], student: GenerativeModel, teacher: GenerativeModel
) -> list[list[int]]:
    """The answers in the teacher's tokens; one without an end stays without one."""
    translated = []
    for answer in answers:
        ended = bool(answer) and answer[-1] in student.vocabulary.end_ids
        theirs = teacher.processor.encode_answer(student.processor.decode(answer))
        translated.append(theirs if ended else theirs[:-1])
    return translated


def _measured(
    answers: Sequence[Sequence[int]], student: GenerativeModel, size: int, seconds: float
) -> dict[str, Tensor]:
    number = max(1, len(answers))
    ended = sum(bool(answer) and answer[-1] in student.vocabulary.end_ids for answer in answers)
    values = {
        "share": len(answers) / size,
        "tokens": sum(map(len, answers)) / number,
        "unfinished": (len(answers) - ended) / number,
        "seconds": seconds,
    }
    return {f"rollouts/{name}": torch.tensor(value) for name, value in values.items()}
