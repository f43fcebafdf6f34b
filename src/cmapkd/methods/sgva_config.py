"""Settings of `sgva_clip`: its adapter, the context of its prompts, and what each term counts."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from cmapkd.methods.by_classes import ContextConfig


class SgvaClipConfig(ContextConfig):
    """The adapter, the context of the prompts, and what each term counts."""

    prototype_weight: float = Field(
        1.0, ge=0, description="Weight of the cross-entropy by the means of each class's adapted pictures."
    )
    distill_weight: float = Field(
        1.0, ge=0, description="Weight of the KL from the frozen pictures' classes to the adapted pictures' classes."
    )
    temperature: float = Field(5.0, gt=0, description="Divides both logits in the KL, which has no factor T².")
    hidden: float = Field(2.0, gt=0, description="Units between the adapter's matrices, in widths of the embedding.")
    shots: int = Field(16, ge=1, description="Labelled pictures that stand for a class at most; published: 1 to 16.")
    share: float = Field(
        0.5, ge=0, le=1, description="Share of the pictures in the answer; the rest is the share of the prompts."
    )
    context: str | int | None = Field(
        "a photo of a",
        description="Words that the learned vectors in front of class names begin as; or how many random ones. None: "
        "no learned vectors, and prompts by the evaluation's templates.",
    )

    @model_validator(mode="after")
    def _trained_adapter_answers(self) -> Self:
        if self.share and not (self.prototype_weight or self.distill_weight):
            raise ValueError(
                f"prototype_weight and distill_weight are both zero, so nothing trains the adapter, and share gives it "
                f"{self.share:g} of the answer: set share: 0, or raise one of them"
            )
        return self
