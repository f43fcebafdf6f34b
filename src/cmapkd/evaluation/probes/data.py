"""What probes learn from and answer: every readable image's captions, questions and boxes, read once for all models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from cmapkd.data.plans import Plan
from cmapkd.data.streams import Stream
from cmapkd.data.turns import Dialogue
from cmapkd.data.types import BadSampleError, Batch, Box, ModelInput, QuestionAnswer, Source, TokenBatch
from cmapkd.evaluation.probes.features import ImageFeatures, TextFeatures, whole_picture
from cmapkd.models.base import DualEncoder

Targets = Callable[[int, Tensor], dict[str, Tensor]]
"""Epoch and examples to what the head's loss compares with, one row for each."""


@dataclass(frozen=True, slots=True)
class Annotations:
    """Of every readable sample in order: where it stands in the source, its id, and what is said of it."""

    indices: tuple[int, ...]
    ids: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]  # width, height in pixels
    captions: tuple[tuple[str, ...], ...]
    questions: tuple[tuple[QuestionAnswer, ...], ...]
    boxes: tuple[tuple[Box, ...], ...]
    turns: tuple[Dialogue, ...]
    bad: tuple[tuple[str, str], ...] = ()  # id and reason of the samples that cannot be read

    def __len__(self) -> int:
        return len(self.indices)


def read_annotations(source: Source, *, limit: int | None = None) -> Annotations:
    """The first `limit` samples of the source, without those that cannot be read.

    Raises:
        ValueError: none can.
    """
    rows: list[tuple[Any, ...]] = []
    bad: list[tuple[str, str]] = []
    for index in range(len(source) if limit is None else min(limit, len(source))):
        try:
            sample = source[index]
        except BadSampleError as error:
            bad.append((error.sample_id, error.reason))
            continue
        rows.append(
            (index, sample.id, sample.image.size, sample.captions, sample.questions, sample.boxes, sample.turns)
        )
    if not rows:
        why = f"; the first: sample {bad[0][0]!r}: {bad[0][1]}" if bad else ""
        raise ValueError(f"no sample of {source.name} could be read ({len(bad)} tried){why}")
    indices, ids, sizes, captions, questions, boxes, turns = zip(*rows, strict=True)
    return Annotations(indices, ids, sizes, captions, questions, boxes, turns, tuple(bad))


class ProbeBatches(Dataset[Batch]):
    """Batches of examples, each a row of stored image (and question) features, or with `model` of pixels and tokens.

    A pure function of the plan, so that a probe resumes inside an epoch as any training does.
    """

    streams: tuple[Stream, ...] = ()  # one, mixed as a whole

    def __init__(
        self,
        image_of_example: Int[Tensor, " examples"],
        targets: Targets,
        *,
        ids: Sequence[str],
        features: ImageFeatures | None = None,
        text_of_example: Int[Tensor, " examples"] | None = None,
        text_features: TextFeatures | None = None,
        model: DualEncoder | None = None,
        pictures: Source | None = None,
        indices: Sequence[int] = (),
        texts: Sequence[str] = (),
    ) -> None:
        """Either `features` (and `text_features`), or for a live encoder `model`, `pictures`, `indices`, `texts`."""
        self.source = range(len(image_of_example))  # whose length is an epoch
        self.image_of, self.text_of, self.targets, self.ids = image_of_example, text_of_example, targets, ids
        self.features, self.text_features = features, text_features
        self.spec = model.image_spec if model is not None else None
        self.tokenizer = model.tokenizer if model is not None else None
        self.pictures, self.indices, self.texts = pictures, indices, texts

    def __getitem__(self, plan: Plan) -> Batch:
        places = torch.tensor(plan.mine)
        rows = self.image_of[places]
        extra = self.targets(plan.epoch, places)
        inputs: dict[str, ModelInput] = {}
        if self.features is not None:
            extra |= {"patches": self.features.patches[rows], "embedding": self.features.embeddings[rows]}
            if self.text_of is not None and self.text_features is not None:
                asked = self.text_of[places]
                texts = self.text_features
                extra |= {"tokens": texts.tokens[asked], "mask": texts.mask[asked]}
                extra |= {"text_embedding": texts.embeddings[asked]}
        else:
            inputs["student"] = self._live(rows.tolist(), places)
        ids = tuple(self.ids[row] for row in rows.tolist())
        return Batch(ids, inputs, ("",) * len(ids), extra=extra)

    def bytes_of(self, size: int) -> int:
        """About the bytes of a batch of `size` examples; those of features are small, and already in memory."""
        return 0 if self.spec is None else size * 3 * self.spec.size**2

    def _live(self, rows: list[int], places: Tensor) -> ModelInput:
        assert self.pictures is not None
        assert self.spec is not None
        assert self.tokenizer is not None
        pixels = [whole_picture(self.spec, self.pictures[self.indices[row]].image) for row in rows]
        texts = [self.texts[number] for number in self.text_of[places].tolist()] if self.text_of is not None else []
        length = self.tokenizer(texts) if texts else TokenBatch(torch.zeros(0, 0).long(), torch.zeros(0, 0).bool())
        return ModelInput(torch.stack(pixels), length)
