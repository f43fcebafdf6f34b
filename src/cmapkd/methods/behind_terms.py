"""What of a student that writes stands behind a term: the parts that can change it, and one matrix behind all terms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Literal

import torch

from cmapkd.config import ConfigError
from cmapkd.methods.learning import Learning
from cmapkd.methods.stages import WHOLE_RUN, StageConfig
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.linear_vlm import MIXERS
from cmapkd.models.reach import example_encoded, example_rows, example_visual_tokens, last_matrix_behind

Made = Literal["encoded", "projected", "attention", "layers", "mixed", "mixers", "states", "logits"]
"""What a term is made of: the vision tower's tokens, projected tokens, attention maps, states of layers, what converted
layers mix of a teacher's states, or make of them, final states, or logits."""

_LANGUAGE = ("vision", "projector", "embeddings", "language", "adapters", *MIXERS)
_PARTS: Mapping[Made, tuple[str, ...]] = {
    "encoded": ("vision",),
    "projected": ("vision", "projector"),
    "attention": _LANGUAGE,
    "layers": _LANGUAGE,
    "mixed": MIXERS[:2],
    "mixers": (*MIXERS, "language"),
    "states": _LANGUAGE,
}
_EXAMPLES = {"encoded": example_encoded, "projected": example_visual_tokens, "states": example_rows}


def mixers_of(parts: Mapping[str, Iterable[str]]) -> tuple[str, ...]:
    """Those of a student's parts that a stage which trains all of its language model names too: converted layers."""
    return tuple(part for part in MIXERS if part in parts)


def check_terms_learn(method: Learning, made: Mapping[str, Made], stages: Iterable[StageConfig]) -> None:
    """Refuses stages with a term that nothing of the student which learns there can change.

    Where only the method's own modules learn, they are warmed up, and nothing is refused.

    Args:
        made: of each term that counts what it is made of; of logits everything can change it.
    Raises:
        ConfigError: names the term, the parts that could change it, and what to do.
    """
    free = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    for stage in stages:
        learning = free & method.learning_in(stage)
        for name, what in made.items():
            parts = [part for part in _PARTS.get(what, ()) if method.student_parts.get(part)]
            behind = {f"student.{each}" for part in parts for each in method.student_parts[part]}
            warms_up = not any(each.startswith("student.") for each in learning)
            if warms_up or not parts or not stage.wants_term(name) or behind & learning:
                continue
            where = "this run" if stage is WHOLE_RUN or stage == WHOLE_RUN else f"stage {stage.name!r}"
            raise ConfigError(
                f"{where}: the term {name} trains the student's {' or '.join(parts)}, and nothing of it learns: name "
                f"{parts[0]} among the parts that learn (training.train_parts, lora.learn, train of a stage), leave "
                f"{name} out of the stage's terms, or give it a weight of 0"
            )


class SharedMatrix:
    """Finds a matrix of the student that all terms are made behind, and keeps what it found."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, frozenset[str]], str] = {}

    def of(self, student: GenerativeModel, made: Iterable[Made]) -> dict[str, torch.nn.Parameter]:
        """The last matrix behind the first thing that any of the terms is made of, by name.

        Of what the student sees, the last one that learns; where none does, the last one.

        Args:
            made: what each term is made of.
        """
        parameters, made = dict(student.named_parameters()), set(made)
        first = (
            "encoded" if "encoded" in made else "projected" if {"projected", "attention", "layers"} & made else "states"
        )
        learning = frozenset(name for name, parameter in parameters.items() if parameter.requires_grad)
        key = first, learning if first != "states" else frozenset()
        if key not in self._known:
            output = partial(_EXAMPLES[first], student)
            try:
                self._known[key] = last_matrix_behind(student, output, learning=first != "states")
            except ValueError:
                self._known[key] = last_matrix_behind(student, output)
        return {self._known[key]: parameters[self._known[key]]}
