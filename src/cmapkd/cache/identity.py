"""What a cache belongs to: hashes of the teacher, its preprocessing, the views and the data, and what differs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from hashlib import blake2b
from typing import Any

import torch

from cmapkd.cache.files import digest_of
from cmapkd.data.batches import Choice
from cmapkd.data.texts import TextChoice
from cmapkd.data.types import BadSampleError, Source
from cmapkd.data.views import ViewSpec, draw_view
from cmapkd.models import ImageEncoder, Model
from cmapkd.models.generative import GenerativeModel

FORMAT = 1
BY_SHARD = "by the shards of the data"  # whose contents the names of files say
_TEXTS = (
    "a photo of two dogs on the beach.",
    "The QUICK brown fox, jumped over 13 lazy dogs!",
    "ünïcödé 漢字 🙂 &amp; <b>tags</b>\tand  spaces",
    "it's a red-green-blue cube; left of it: nothing at all",
    " ".join(["word"] * 200),
    "",
)
_OWN_TEXTS = 32  # captions of the data that the tokenizer is also tried on

_REASONS = {
    "format": "it was written by another version of cmapkd",
    "teacher": "it holds the answers of other weights",
    "architecture": "the teacher computes otherwise with its weights (a setting of its config, or another version)",
    "image_spec": "the teacher's image preprocessing differs",
    "tokenizer": "the teacher's tokenizer differs",
    "processor": "the teacher reads dialogues otherwise (tokenizer, chat template, pictures or longest dialogue)",
    "vocabulary": "the teacher writes other tokens",
    "attention": "the teacher computes attention otherwise",
    "max_tokens": "it leaves out dialogues of another length (data.max_tokens)",
    "views": "it holds other views of the samples (data.views)",
    "data": "it was made from other data",
    "texts": "it answers other texts of the samples (pools of further texts, or data.prompts)",
    "precision": "the teacher answered in another precision (training.precision)",
}


def identity_of(
    model: Model,
    source: Source,
    views: ViewSpec,
    *,
    precision: str,
    texts: Choice | None = None,
    max_tokens: int | None = None,
    by_shard: bool = False,
    weights: str | None = None,
) -> dict[str, Any]:
    """Everything that an answer depends on besides sample and view number, as plain data.

    The model is read on the CPU or wherever it is; hashing takes about a second for each GB.

    Args:
        max_tokens: longest dialogue of a teacher that writes; None: as long as it takes.
        by_shard: without what depends on the set of shards: its fingerprint, and its captions for a tokenizer.
        weights: `weight_hash` of the model, where it is known.
    """
    plain = texts is None or (isinstance(texts, TextChoice) and texts.plain)
    return {
        "format": FORMAT,
        "teacher": weights or weight_hash(model),
        "architecture": digest_of(model.architecture.encode()),
        **reading_fingerprint(model, () if by_shard else _captions(source)),
        **({"attention": model.attention, "max_tokens": max_tokens} if isinstance(model, GenerativeModel) else {}),
        "views": view_hash(views),
        "data": BY_SHARD if by_shard else data_of(source),
        "precision": precision,
        **({} if texts is None or plain else {"texts": texts.describe()}),
    }


def data_of(source: Source) -> str:
    """What tells a source from others."""
    return f"{source.fingerprint()} of {len(source)}"


def reading_fingerprint(model: Model, captions: Iterable[str] = ()) -> dict[str, Any]:
    """What decides how a model reads pictures and texts, beside its weights, as plain data by name.

    Args:
        captions: on which a tokenizer is tried too, of a model whose tokenizer has no fingerprint of its own.
    """
    if isinstance(model, GenerativeModel):
        vocabulary = model.vocabulary
        return {
            "processor": model.processor.fingerprint(),
            "vocabulary": f"{vocabulary.size} tokens, {vocabulary.digest}",
        }
    assert isinstance(model, ImageEncoder)
    return {"image_spec": plain_image_spec(model), "tokenizer": tokenizer_hash(model, captions)}


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """A sentence for each part in which a cache does not fit a run."""
    return [
        f"{reason} (stored {stored.get(key)!r}, this run {wanted.get(key)!r})"
        for key, reason in _REASONS.items()
        if stored.get(key) != wanted.get(key)
    ]


def weight_hash(model: Model) -> str:
    """Of every tensor's name, type, shape and bytes.

    Raises:
        ValueError: weights are held in bf16 in place of the model's own.
    """
    model.check_own_weights()
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def plain_image_spec(model: ImageEncoder) -> dict[str, Any]:
    """The model's image preprocessing as plain data."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(model.image_spec).items()}


def row_check(sample_id: str, view: int, caption: str) -> int:
    """The number that a row carries of what it answers, so that no other view or caption can pass for it; never 0."""
    text = f"{len(sample_id)} {sample_id} {view} {caption}".encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") | 1


def view_hash(views: ViewSpec) -> str:
    """Of the ranges and of what is drawn from them, so that a change of the drawing shows as well; and the reading."""
    drawn = [draw_view("probe", number, views, (640, 480)) for number in range(4)]
    reading = "" if views.reading == "exact" else f" {views.reading}"
    return f"{views.fingerprint()} {digest_of(repr(drawn).encode())}{reading}"


def tokenizer_hash(model: ImageEncoder, captions: Iterable[str] = ()) -> str:
    """Of what it makes of some texts, and of `captions`: every family's tokenizer can be asked for that."""
    texts = [*_TEXTS, *captions]
    tokens = model.tokenizer(texts)
    digest = blake2b(f"{model.tokenizer.context_length} {model.tokenizer.vocab_size}".encode(), digest_size=16)
    for tensor in (tokens.ids.long(), tokens.mask):
        digest.update(f"{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _captions(source: Source) -> Iterator[str]:
    for index in range(min(len(source), _OWN_TEXTS)):
        try:
            captions = source.captions(index)
        except BadSampleError:
            continue
        yield from captions[:1]
