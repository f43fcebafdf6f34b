"""Models that are asked about pictures: answers in batches, each draw a function of its candidate alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from PIL import Image
from pydantic import Field, model_validator

from cmapkd.config import Config, ConfigError
from cmapkd.data.dialogues import ChatInput, ChatItem, join_items
from cmapkd.data.random import key_of
from cmapkd.data.records import Unusable, check_caption
from cmapkd.data.turns import UNREAD, Turn
from cmapkd.engine.candidates import READABLE, Candidate, Shown, kept, noted
from cmapkd.models import Model
from cmapkd.models.generative import Decoding, GenerativeModel
from cmapkd.models.texts import evaluating

T = TypeVar("T")


class AskConfig(Config):
    """Which model is asked, what is shown to it, and how its tokens are chosen."""

    by: str = Field(description="A name under models, of a model that writes.")
    sees: Shown = Field("whole", description="whole: the picture; crop: the region alone; boxed: with a red box.")
    margin: float = Field(
        0.0, ge=0, le=4, description="A crop has so much more at each side, as a share of the region's own size."
    )
    suffix: str = Field("", description="Stands after every question, on a line of its own.")
    temperature: float = Field(0.0, ge=0, description="Of the draws; 0: always the likeliest token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draws are among the likeliest tokens of this probability.")
    max_new_tokens: int = Field(128, ge=1, description="After so many tokens an answer ends, finished or not.")

    @model_validator(mode="after")
    def _all_do_something(self) -> Self:
        if self.margin and self.sees != "crop":
            raise ValueError(f"margin: {self.margin:g} widens a crop, and sees is {self.sees}: leave margin out")
        if self.top_p < 1 and self.temperature == 0:
            raise ValueError(f"top_p: {self.top_p:g} limits draws, and temperature 0 draws none: set one above 0")
        return self

    @property
    def decoding(self) -> Decoding:
        return Decoding(self.max_new_tokens, self.temperature, self.top_p)

    def asks(self, question: str) -> str:
        """The question as the model reads it."""
        return f"{question}\n{self.suffix}" if self.suffix else question


@dataclass(frozen=True)
class Panel:
    """The models of a recipe, on their device.

    Attributes:
        seed: of all draws.
        batch_size: questions that are answered at once.
        note: stands behind every question about a boxed picture, as it will be written: without it, nothing says that
            the box is meant.
    """

    models: Mapping[str, Model]
    device: torch.device
    seed: int = 0
    batch_size: int = 16
    note: str = ""

    def writer(self, name: str) -> GenerativeModel:
        """Raises ConfigError: the model does not write."""
        model = self.models[name]
        if not isinstance(model, GenerativeModel):
            raise ConfigError(f"models.{name} is {model.name}, which {model.does}: a model that writes is asked here")
        return model

    def readable(self, *texts: str) -> bool:
        """Whether the sources of cmapkd, and the models here that write, would read these texts."""
        writers = [model for model in self.models.values() if isinstance(model, GenerativeModel)]
        try:
            for text in texts:
                check_caption(text)
        except Unusable:
            return False
        return not any(model.processor.control_in(text) for model in writers for text in texts)

    def drafts(self, candidates: Sequence[Candidate], how: AskConfig, *, name: str, number: int = 1) -> list[list[str]]:
        """So many answers to each candidate's question; none where the model cannot read the question.

        Args:
            name: of these answers. Draws are functions of the seed, this name, the candidate's id and the draft's
                number: no other candidate changes them.
        """
        model = self.writer(how.by)

        def asks(candidate: Candidate) -> tuple[Image.Image, str]:
            question = noted(candidate.question, self.note if how.sees == "boxed" else "")
            return candidate.picture(how.sees, how.margin), how.asks(question)

        def write(inputs: ChatInput, places: Sequence[int]) -> list[list[str]]:
            found: list[list[str]] = [[] for _ in places]
            for draft in range(number):
                keys = [key_of("engine", self.seed, name, candidates[place].id, draft) for place in places]
                written = model.generate(inputs, how.decoding, keys if how.temperature > 0 else None)
                for texts, ids in zip(found, written, strict=True):
                    texts.append(text_of(model, ids))
            return found

        made = self.computed(model, candidates, asks, write)
        return [made.get(place, []) for place in range(len(candidates))]

    def answer(self, candidates: Sequence[Candidate], how: AskConfig, *, name: str, number: int = 1) -> None:
        """Adds drafts to candidates that are still kept. One that the model cannot read is dropped."""
        asked = kept(candidates)
        made = self.drafts(asked, how, name=f"answers.{name}", number=number)
        for each, drafts in zip(asked, made, strict=True):
            each.answers[name] = drafts
            if not drafts:
                each.dropped = READABLE

    def computed(
        self,
        model: GenerativeModel,
        candidates: Sequence[Candidate],
        asks: Callable[[Candidate], tuple[Image.Image, str]],
        work: Callable[[ChatInput, Sequence[int]], Sequence[T]],
    ) -> dict[int, T]:
        """What `work` makes of batches of questions, by place; without those that the model cannot read.

        Args:
            asks: the picture and the question of a candidate; called batch by batch, so that few copies are in memory.
        """
        found: dict[int, T] = {}
        for start in range(0, len(candidates), self.batch_size):
            places: list[int] = []
            items: list[ChatItem] = []
            for place in range(start, min(start + self.batch_size, len(candidates))):
                picture, question = asks(candidates[place])
                try:
                    items.append(model.processor.read(_dialogue(question), [picture]))
                except ValueError:  # too long, a control token in the text, a picture of no pixels
                    continue
                places.append(place)
            if places:
                with evaluating(model, self.device, None):
                    made = work(join_items(items, model.processor.pad_id).to(self.device), places)
                found.update(zip(places, made, strict=True))
        return found


def text_of(model: GenerativeModel, ids: Sequence[int]) -> str:
    """An answer's text without its end token."""
    whole = ids[:-1] if ids and ids[-1] in model.vocabulary.end_ids else ids
    return model.processor.decode(whole).strip()


def check_place(text: str, what: str, stands: str) -> str:
    """Refuses a template without exactly one {}, or with other braces.

    Args:
        what: the template is, and `stands`: in the place of {}.
    Raises:
        ValueError: for pydantic.
    """
    if text.count("{}") != 1 or re.search(r"[{}]", text.replace("{}", "")):
        raise ValueError(f"the {what} {text!r} needs one {{}}, where the {stands} goes, and no other braces")
    return text


def _dialogue(question: str) -> Any:
    return (Turn("user", question, pictures=1), Turn("assistant", UNREAD))
