"""How a model of any contract reads a batch."""

from __future__ import annotations

from cmapkd.data.readers import ChatReader, DualReader, Reader
from cmapkd.models.base import ImageEncoder, Model
from cmapkd.models.fast_images import FastPixels
from cmapkd.models.generative import GenerativeModel


def reader_of(
    model: Model,
    *,
    max_tokens: int | None = None,
    num_tokens: int | None = None,
    pictures_alone: bool = False,
    fast: bool = False,
    spans: bool = False,
) -> Reader:
    """How a model of any contract reads a batch.

    Args:
        max_tokens: longest dialogue with its picture, for models that write; None: as long as the model takes.
        num_tokens: tokens that their answers may have, the first by id; None: all.
        pictures_alone: whether models that write read no dialogue without a picture.
        fast: whether pictures of models of two towers are resized by torch, see `FastPixels`.
        spans: whether batches say where the tokens of captions stand, of models of two towers.
    """
    if isinstance(model, GenerativeModel):
        return ChatReader(model.processor, max_tokens, num_tokens, pictures_alone)
    assert isinstance(model, ImageEncoder)
    spec = model.image_spec
    return DualReader(FastPixels(spec) if fast else spec, model.tokenizer, spans)
