"""The knobs of the small heads: probes of an encoder, and heads that learn with a student."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from cmapkd.config import Config

SCALES = (4.0, 2.0, 1.0, 0.5, 0.25)


class ProbeDataConfig(Config):
    """What every probe of an evaluation shares: the training images and the seed."""

    samples: int = Field(6000, ge=2, description="Images of the training split that probes learn from: the first ones.")
    seed: int = Field(0, ge=0, description="Of the heads' initialisation and the order of the data.")
    memory: float = Field(
        4.0, gt=0, description="GiB that a frozen encoder's stored features may take; above it the probe is refused."
    )


class ProbeConfig(Config):
    """How one head is trained: the same for every model."""

    steps: int = Field(600, ge=1, description="Optimizer steps.")
    batch_size: int = Field(64, ge=2, description="Examples in a step.")
    learning_rate: float = Field(
        1e-3, gt=0, description="Peak rate of the head: linear warm-up, then a cosine to zero."
    )
    weight_decay: float = Field(0.05, ge=0, description="Decoupled decay of the matrices.")
    warmup_steps: int = Field(50, ge=0, description="Linear warm-up, in steps.")
    fine_tune: bool = Field(False, description="Whether a copy of the encoder learns with the head.")
    encoder_rate: float = Field(0.1, gt=0, description="Rate of the encoder where it learns, as a share of the head's.")
    width: int = Field(96, ge=32, multiple_of=32, description="Channels of the head.")
    depth: int = Field(2, ge=1, description="Blocks, or convolutions, of the head.")


class VQAConfig(ProbeConfig):
    """A fusion classifier over the most frequent answers."""

    steps: int = Field(1000, ge=1, description="Optimizer steps.")
    answers: int = Field(3129, ge=2, description="Answers to choose from: the most frequent of the training split.")


class CaptioningConfig(ProbeConfig):
    """A small decoder behind image tokens."""

    words: int = Field(10_000, ge=8, description="Words to write with: the most frequent of the training captions.")
    length: int = Field(32, ge=4, description="Longest caption, in words.")


class DetectionConfig(ProbeConfig):
    """A simple feature pyramid whose classifier is the text tower."""

    batch_size: int = Field(32, ge=2, description="Images in a step.")
    depth: int = Field(1, ge=1, description="Convolutions before the classifier, and before the boxes.")
    scales: tuple[float, ...] = Field(
        (2.0, 1.0, 0.5), min_length=1, description="Levels of the pyramid, in rows and columns of the encoder's grid."
    )
    max_boxes: int = Field(100, ge=1, description="Boxes kept of an image, as COCO counts them.")
    nms_iou: float = Field(0.6, gt=0, le=1, description="Overlap above which the weaker of two boxes of a class goes.")

    @field_validator("scales")
    @classmethod
    def _known_scales(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        return _known(value)


class JointHeadConfig(Config):
    """How much a head that learns with the student counts, and its size. A number alone is the weight."""

    weight: float = Field(ge=0, description="Weight of the head's loss; 0: no such head.")
    width: int = Field(96, ge=32, multiple_of=32, description="Channels of the head.")
    depth: int = Field(2, ge=1, description="Blocks, or convolutions, of the head.")


class JointVQAConfig(JointHeadConfig):
    """The fusion classifier, in a run."""

    answers: int = Field(3129, ge=2, description="Answers to choose from: the most frequent.")


class JointCaptioningConfig(JointHeadConfig):
    """The caption decoder, in a run."""

    words: int = Field(10_000, ge=8, description="Words to write with: the most frequent.")
    length: int = Field(32, ge=4, description="Longest caption, in words.")


class JointDetectionConfig(JointHeadConfig):
    """The detector, in a run."""

    depth: int = Field(1, ge=1, description="Convolutions before the classifier, and before the boxes.")
    scales: tuple[float, ...] = Field(
        (2.0, 1.0, 0.5), min_length=1, description="Levels of the pyramid, in rows and columns of the encoder's grid."
    )

    @field_validator("scales")
    @classmethod
    def _known_scales(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        return _known(value)


class HeadsConfig(Config):
    """Heads that learn with the student, each with a term of the loss."""

    vqa: JointVQAConfig | None = Field(None, description="Answers questions: a weight, or settings.")
    captioning: JointCaptioningConfig | None = Field(None, description="Writes captions: a weight, or settings.")
    detection: JointDetectionConfig | None = Field(None, description="Finds boxes: a weight, or settings.")
    samples: int = Field(
        6000, ge=2, description="Training samples read beforehand for answers, words and class names, spread evenly."
    )

    @field_validator("vqa", "captioning", "detection", mode="before")
    @classmethod
    def _weight_alone(cls, value: Any) -> Any:
        return {"weight": value} if isinstance(value, int | float) and not isinstance(value, bool) else value

    @property
    def wanted(self) -> dict[str, JointHeadConfig]:
        """The heads whose weight is not zero."""
        heads = {"vqa": self.vqa, "captioning": self.captioning, "detection": self.detection}
        return {name: head for name, head in heads.items() if head is not None and head.weight > 0}


def _known(scales: tuple[float, ...]) -> tuple[float, ...]:
    if wrong := [scale for scale in scales if scale not in SCALES]:
        raise ValueError(f"levels come in the scales {', '.join(map(str, SCALES))}, got {wrong[0]}")
    return scales
