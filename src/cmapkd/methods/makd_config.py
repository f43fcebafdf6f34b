"""The settings of `makd`: the questions, how the teacher answers them, and what each term counts."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from cmapkd.methods.classifying import ClassifyingConfig


class MakdConfig(ClassifyingConfig):
    """The questions, how the teacher answers them, and what each term counts."""

    questions: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="What is asked, in groups of alternatives: {colour: [red, green, blue], surface: [striped, ...]}. "
        "Every entry is one question. There must be some.",
    )
    templates: tuple[str, ...] = Field(
        ("a photo of something that is {}.",),
        description="Texts that mean a yes, with {} where an entry goes; several are averaged.",
    )
    options: Literal["contrast", "negation"] = Field(
        "contrast",
        description="What a yes is weighed against. contrast: the other entries of its group; negation: the entry in "
        "the negations, as in the published question.",
    )
    negations: tuple[str, ...] = Field(
        ("a photo of something that is not {}.",),
        description="Texts that mean a no, read with options: negation.",
    )
    task_weight: float = Field(1.0, ge=0, description="Weight of the cross-entropy with the labels, above 0.")
    question_weight: float = Field(
        4.0, ge=0, description="Weight of the binary cross-entropy of the questions, a mean over all of them."
    )
    teacher_scale: float | Literal["own"] = Field(
        "own", description="Multiplies the teacher's cosines before its softmax: a number > 0, or own, its logit scale."
    )
    answers: Literal["soft", "hard", "random", "shuffled"] = Field(
        "soft",
        description="soft: probabilities, as published; hard: yes or no; random: of random vectors in place of the "
        "texts', a control; shuffled: another picture's, the control that must fail.",
    )

    asks: str = Field(
        "Is the object in the picture {}?",
        description="What a teacher that writes is asked, with {} where an entry goes. Others read templates.",
    )

    @field_validator("templates", "negations")
    @classmethod
    def _entries_have_a_place(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or any("{}" not in text for text in value):
            raise ValueError(f"give one text or more, each with {{}} where an entry goes, got {list(value)}")
        return value

    @field_validator("asks")
    @classmethod
    def _asks_of_an_entry(cls, value: str) -> str:
        if "{}" not in value:
            raise ValueError(f"say where an entry goes, by {{}}: {value!r} has none")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.task_weight == 0:
            raise ValueError("task_weight 0 leaves the head of the classes random, and no other head answers: raise it")
        for group, entries in self.questions.items():
            if not entries:
                raise ValueError(f"questions.{group} is empty: name an entry or more, or leave the group out")
            if len(set(entries)) < len(entries):
                raise ValueError(f"questions.{group} has an entry twice, {list(entries)}: each is a question")
        return self
