"""What a reader must know of a method, and the base of every method's settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field, SerializeAsAny, field_validator

from cmapkd.config import Config
from cmapkd.weighting import WeightingConfig, weighting_config


@dataclass(frozen=True, slots=True)
class MethodCard:
    """What a reader must know before trusting a method."""

    title: str
    paper: str
    equations: tuple[str, ...]
    needs: str
    trainable: str
    departures: tuple[str, ...]
    checked_against: str


@dataclass(frozen=True, slots=True)
class SentenceRequest:
    """Sentences that a method compares pictures with.

    Attributes:
        origin: captions, of a stream; classes, their prompts; or a text file with one on each line.
        stream: of which captions are read.
        number: how many at most, spread evenly over the stream or the file.
    """

    origin: str
    stream: str
    number: int


class MethodConfig(Config):
    """Base of every method's settings. In a recipe they stand beside the method's name."""

    name: str = Field("", description="The method's name in METHODS.")
    term_weighting: SerializeAsAny[WeightingConfig] | None = Field(
        None, description="A weighting of the method's terms, on top of their weights; none: these alone."
    )

    several_positives: bool = Field(
        False,
        description="Captions of one picture in a batch are no negatives of each other, in every contrastive loss.",
    )

    @property
    def reads_classes(self) -> bool:
        """Whether the method, with these settings, needs the classes of the training source: names and prompts."""
        return False

    @property
    def reads_sentences(self) -> SentenceRequest | None:
        """The sentences that stand beside the classes' prompts; None: the method reads none."""
        return None

    @property
    def own_texts(self) -> tuple[str, ...]:
        """Texts in the settings that the student reads; in each, {} stands for the names of all classes."""
        return ()

    @property
    def reads_captions(self) -> bool:
        """Whether the method, with these settings, reads captions. If not, pictures without captions will do."""
        return True

    @property
    def pair_terms(self) -> tuple[str, ...]:
        """The terms that read a worse answer beside the given one; of methods over models that write."""
        return ()

    @property
    def reads_bytes(self) -> bool:
        """Whether tokens of two tokenizers may meet where both begin at the same byte of a text."""
        return False

    @property
    def not_cached(self) -> str | None:
        """Why no cache can hold a teacher's answers under these settings; None: one can, as far as they say."""
        return None

    @property
    def why_unmixed(self) -> str | None:
        """Why a synthetic caption in place of a sample's own would change nothing; None: it is read in its place."""
        return None

    @field_validator("term_weighting", mode="before")
    @classmethod
    def _weighting_by_name(cls, value: Any) -> Any:
        return None if value is None else weighting_config(value)


class ClassesConfig(MethodConfig):
    """Settings of a method that learns from pictures and the names of classes, and from no captions."""

    @property
    def reads_classes(self) -> bool:
        return True

    @property
    def reads_captions(self) -> bool:
        return False
