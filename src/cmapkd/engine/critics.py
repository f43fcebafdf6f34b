"""Critics: how true a model finds the statement of a fact, as a probability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Self

import torch
from PIL import Image
from pydantic import Field, field_validator, model_validator

from cmapkd.config import Config, ConfigError
from cmapkd.data.dialogues import ChatInput
from cmapkd.engine.candidates import Candidate, Shown
from cmapkd.engine.written import Panel, check_place
from cmapkd.evaluation.token_scores import first_log_odds
from cmapkd.evaluation.vqa import normalise_answer
from cmapkd.models import DualEncoder, Model
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.token_types import TokenNeeds
from cmapkd.models.yes_no import first_tokens


class CriticConfig(Config):
    """Kept where a critic finds the fact true.

    A critic that writes is asked whether the statement is true: its probability of yes against no. A critic of two
    towers compares the statement with those of the relation's other tails: its probability among them.

    Source: Symbolic Knowledge Distillation (NAACL 2022, arXiv:2110.07178).
    """

    by: str = Field(description="A name under models: one that writes, or that embeds pictures and texts.")
    threshold: float = Field(ge=0, le=1, description="Least probability at which a fact is kept.")
    thresholds: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        default_factory=dict, description="Relation -> its own threshold, where a critic finds some kinds harder."
    )
    question: str = Field("Is it true that {}?", description="What a critic that writes is asked; {} is the statement.")
    sees: Shown = Field("whole", description="What the critic sees: the whole picture, or the region of a fact.")
    margin: float = Field(0.0, ge=0, le=4, description="Of a crop, as in answers.")

    @model_validator(mode="after")
    def _margin_widens(self) -> Self:
        if self.margin and self.sees != "crop":
            raise ValueError(f"margin: {self.margin:g} widens a crop, and sees is {self.sees}: leave margin out")
        return self

    @field_validator("question")
    @classmethod
    def _has_one_place(cls, value: str) -> str:
        return check_place(value, "question", "statement")

    def keeps(self, relation: str | None, score: float) -> bool:
        """Whether a fact of this relation is kept."""
        return score >= self.thresholds.get(str(relation), self.threshold)


def check_critic(config: CriticConfig, panel: Panel, tails: Mapping[str, Sequence[str]]) -> None:
    """Refuses a model that cannot judge facts.

    Args:
        tails: of each relation.
    Raises:
        ConfigError: the model is no critic, says yes and no with the same first token, or has nothing to compare.
    """
    model = panel.models[config.by]
    if isinstance(model, GenerativeModel):
        _first_tokens(config, model)
    elif isinstance(model, DualEncoder):
        for relation, each in tails.items():
            if len(set(map(normalise_answer, each))) < 2:
                raise ConfigError(
                    f"propose.facts.relations.{relation}.tails has {len(each)}: models.{config.by} compares a fact "
                    "with the other tails, so every fact would be certain. Give two usual answers or more"
                )
    else:
        raise _no_critic(config, model)


def judge(candidates: Sequence[Candidate], config: CriticConfig, panel: Panel) -> list[float]:
    """The critic's probability, in [0, 1], that each candidate's statement is true of its picture; 0 where it cannot
    read the question.

    Raises:
        ConfigError: the model is no critic, or says yes and no with the same first token.
    """
    model = panel.models[config.by]
    if isinstance(model, GenerativeModel):
        return _asked(candidates, config, panel, model)
    if isinstance(model, DualEncoder):
        return _compared(candidates, config, panel, model)
    raise _no_critic(config, model)


def _no_critic(config: CriticConfig, model: Model) -> ConfigError:
    return ConfigError(
        f"models.{config.by} is {model.name}, which {model.does}: a critic writes, or embeds pictures and texts"
    )


def _first_tokens(config: CriticConfig, model: GenerativeModel) -> Mapping[str, Sequence[int]]:
    tokens = first_tokens(model)
    if tokens is None:
        raise ConfigError(f"models.{config.by}: {model.name} begins yes and no with the same token, so it is no critic")
    return tokens


def _asked(candidates: Sequence[Candidate], config: CriticConfig, panel: Panel, model: GenerativeModel) -> list[float]:
    tokens = _first_tokens(config, model)
    yes, no = (torch.tensor(tokens[word], device=panel.device) for word in ("yes", "no"))

    def odds(inputs: ChatInput, _: Sequence[int]) -> list[float]:
        found: list[float] = first_log_odds(model, model(inputs, TokenNeeds()), yes, no).sigmoid().tolist()
        return found

    def asks(candidate: Candidate) -> tuple[Image.Image, str]:
        return candidate.picture(config.sees, config.margin), config.question.replace("{}", str(candidate.statement))

    scores = panel.computed(model, candidates, asks, odds)
    return [scores.get(place, 0.0) for place in range(len(candidates))]


def _compared(candidates: Sequence[Candidate], config: CriticConfig, panel: Panel, model: DualEncoder) -> list[float]:
    """Among the statements of all tails of the relation, and the candidate's own where no tail is like it."""
    if not candidates:
        return []
    model.to(panel.device)
    scale = float(model.log_logit_scale.detach().exp())
    shown = [(each.index, None if config.sees == "whole" else each.box) for each in candidates]
    first = dict(zip(reversed(shown), reversed(candidates), strict=True))  # one of each picture or region
    place = {key: number for number, key in enumerate(first)}
    pictures = (each.picture(config.sees, config.margin) for each in first.values())  # drawn batch by batch
    images = model.embed(images=pictures, batch_size=panel.batch_size).images
    compared = list(map(_alternatives, candidates))
    words = list(dict.fromkeys(text for texts, _ in compared for text in texts))
    texts = model.embed(texts=words, batch_size=panel.batch_size).texts
    assert images is not None
    assert texts is not None
    row: Mapping[str, int] = {text: number for number, text in enumerate(words)}
    scores = []
    for key, (others, own) in zip(shown, compared, strict=True):
        logits = scale * texts[[row[text] for text in others]] @ images[place[key]]
        scores.append(float(logits.softmax(-1)[own]))
    return scores


def _alternatives(candidate: Candidate) -> tuple[list[str], int]:
    """Statements of different meaning by the rules of VQA v2, in the words of the tails, and the place of its own."""
    own = str(candidate.statement)
    meant: dict[str, str] = {}
    for text in (*candidate.alternatives, own):
        meant.setdefault(normalise_answer(text), text)
    return list(meant.values()), list(meant).index(normalise_answer(own))
