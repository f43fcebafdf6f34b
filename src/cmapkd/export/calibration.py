"""The calibration set: training samples on which the ranges of activations are measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cmapkd.config import ConfigError
from cmapkd.data.open import open_source, split_of
from cmapkd.data.types import BadSampleError, Source
from cmapkd.export.towers import text_rules
from cmapkd.models import DualEncoder

MIN_CALIBRATION = 32
_CALIBRATION_BATCH = 8


@dataclass(frozen=True, slots=True)
class Calibration:
    """Inputs that the ranges of activations are measured on.

    Attributes:
        source, fingerprint: of the data.
        ids: of the samples.
        feeds: by tower, what the graph is given.
    """

    source: str
    fingerprint: str
    ids: tuple[str, ...]
    feeds: dict[str, list[dict[str, np.ndarray]]]

    def plain(self) -> dict[str, Any]:
        return {"source": self.source, "fingerprint": self.fingerprint, "samples": list(self.ids)}


def open_calibration(spec: str) -> Source:
    """Training data that ranges are measured on.

    Raises:
        ConfigError: it is another split: what is measured there later must not have been seen.
    """
    split = split_of(spec, default="train")
    if split is not None and split != "train":
        raise ConfigError(f"--calibrate {spec!r} reads split {split!r}: ranges are measured on training data")
    return open_source(spec, split="train")


def calibrate(model: DualEncoder, source: Source, *, num: int = 64) -> Calibration:
    """The first readable samples of a source, through the model's own preprocessing and tokenizer.

    Args:
        num: samples; more add memory and little else.
    Raises:
        ConfigError: there are fewer than 32.
    """
    ids: list[str] = []
    pixels: list[torch.Tensor] = []
    texts: list[str] = []
    for index in range(len(source)):
        try:
            sample = source[index]
        except BadSampleError:
            continue
        ids.append(sample.id)
        pixels.append(model.image_spec(sample.image))
        texts.extend(sample.captions[:1])
        if len(ids) == num:
            break
    if len(ids) < MIN_CALIBRATION or len(texts) < MIN_CALIBRATION:
        raise ConfigError(
            f"{source.name} has {len(ids)} readable samples and {len(texts)} captions; int8-calibrated needs "
            f"{MIN_CALIBRATION} of each"
        )
    tokens, rules = model.tokenizer(texts), text_rules(model)
    longest = int(tokens.mask.sum(1).max()) if rules.any_length else tokens.ids.shape[1]
    feed = {"input_ids": tokens.ids[:, :longest]} | (
        {"attention_mask": tokens.mask[:, :longest].long()} if rules.reads_mask else {}
    )
    feeds = {"vision_model": _batches({"pixel_values": torch.stack(pixels)}), "text_model": _batches(feed)}
    return Calibration(source.name, source.fingerprint(), tuple(ids), feeds)


def _batches(inputs: dict[str, torch.Tensor]) -> list[dict[str, np.ndarray]]:
    total = len(next(iter(inputs.values())))
    places = [slice(first, first + _CALIBRATION_BATCH) for first in range(0, total, _CALIBRATION_BATCH)]
    return [{name: np.ascontiguousarray(rows[place].numpy()) for name, rows in inputs.items()} for place in places]
