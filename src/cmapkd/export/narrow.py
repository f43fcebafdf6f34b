"""`--dims N`: embeddings of fewer numbers, cut after a rotation that puts the most of training data into the first.

The rotation is orthogonal, so at full width it changes no inner product. It makes a prefix the best prefix, for models
that were not trained for short ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.data.types import Source, TokenBatch
from cmapkd.evaluation.embed import embed
from cmapkd.models import DualEncoder
from cmapkd.models.parts import within
from cmapkd.models.types import TowerFeatures

NUM_SAMPLES = 1_000  # pictures, with all their captions


def rotation_of(model: DualEncoder, source: Source) -> Float[Tensor, "dim dim"]:
    """Columns are the directions of unit embeddings of pictures and captions, the strongest first; float32.

    They are the right singular vectors of the embeddings as they are, not centred: inner products are to be kept.

    Raises:
        ConfigError: there are fewer embeddings than dimensions.
    """
    found = embed(model, source, batch_size=64, device="cpu", limit=NUM_SAMPLES)
    rows = torch.cat([found.images, found.texts]).double()
    if len(rows) < model.embed_dim:
        raise ConfigError(
            f"{source.name} has {len(rows)} readable pictures and captions: a rotation of {model.embed_dim} dimensions "
            "is measured on as many at least"
        )
    directions = torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1)
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    rotation: Tensor = (directions * largest.sign()).float()  # of the two signs of a direction, always the same
    return rotation


class Narrowed(DualEncoder):
    """A model whose embeddings are rotated and cut to their first `dims` numbers.

    Args:
        rotation: of `rotation_of`; None: cut as they are.
    """

    rotation: Tensor | None

    def __init__(self, model: DualEncoder, dims: int, rotation: Float[Tensor, "dim dim"] | None) -> None:
        super().__init__()
        self.model, self.embed_dim, self.name = model, dims, model.name
        self.image_spec, self.tokenizer = model.image_spec, model.tokenizer
        self.image_levels, self.text_levels = model.image_levels, model.text_levels
        self.register_buffer("rotation", None if rotation is None else rotation[:, :dims].contiguous())

    @property
    def log_logit_scale(self) -> nn.Parameter:
        return self.model.log_logit_scale

    @property
    def logit_bias(self) -> Tensor | None:
        return self.model.logit_bias

    @property
    def parts(self) -> dict[str, frozenset[str]]:
        return within("model", self.model.parts)

    def num_parameters(self) -> int:
        return self.model.num_parameters()

    def narrow(self, embedding: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dims"]:
        return embedding[:, : self.embed_dim] if self.rotation is None else embedding @ self.rotation

    def encode_image(self, images: Float[Tensor, "batch 3 height width"], levels: Sequence[str] = ()) -> TowerFeatures:
        found = self.model.encode_image(images, levels)
        return TowerFeatures(self.narrow(found.embedding), found.levels)

    def encode_text(self, texts: TokenBatch, levels: Sequence[str] = ()) -> TowerFeatures:
        found = self.model.encode_text(texts, levels)
        return TowerFeatures(self.narrow(found.embedding), found.levels)

    def write(self, folder: Path) -> None:
        raise ValueError(f"{self.name} was narrowed for an export and is not saved in {folder}: save the model itself")
