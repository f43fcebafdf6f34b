"""Embeddings of a whole source: every image once, every different caption once, in the model's own evaluation form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from cmapkd.data.ring import stack
from cmapkd.data.types import BadSampleError, Source
from cmapkd.data.workers import ReadAhead
from cmapkd.evaluation.share import ALONE, Share
from cmapkd.features.pyramid import pooled
from cmapkd.features.taps import language_taps, tapped, visual_taps
from cmapkd.models.base import DualEncoder, ImageEncoder
from cmapkd.models.classifier import Classifier
from cmapkd.models.texts import encode_texts, evaluating
from cmapkd.models.types import LevelInfo, TowerFeatures

OnBadSample = Literal["skip", "error"]


@dataclass(frozen=True, slots=True)
class Embedded:
    """A source as one model sees it; unit vectors, float32, on the CPU.

    Attributes:
        images: one row for each readable sample, in the source's order.
        texts: one row for each caption, sample by sample; equal captions have equal rows.
        image_of_text: the row of `images` that each caption belongs to.
        ids: of the images.
        labels: of the images, -1 where a sample has none.
        captions: of the texts.
        bad: (id, reason) of the samples that could not be read.
        image_levels, text_levels: mean-pooled inner levels (P2 to P4, L1 to L3) as far as the towers expose them, rows
            as in `images` and `texts`; empty unless they were asked for.
        logits: of a classifier, the scores [images classes] of each head by its name; of other models empty.
    """

    images: Float[Tensor, "images dim"]
    texts: Float[Tensor, "texts dim"]
    image_of_text: Int[Tensor, " texts"]
    ids: tuple[str, ...]
    labels: Int[Tensor, " images"]
    captions: tuple[str, ...]
    bad: tuple[tuple[str, str], ...] = ()
    image_levels: dict[str, Tensor] = field(default_factory=dict)
    text_levels: dict[str, Tensor] = field(default_factory=dict)
    logits: dict[str, Tensor] = field(default_factory=dict)


def embed(
    model: ImageEncoder,
    source: Source,
    *,
    batch_size: int,
    device: torch.device | str,
    workers: int = 0,
    timeout: float = 0.0,
    limit: int | None = None,
    on_bad_sample: OnBadSample = "skip",
    autocast: torch.dtype | None = None,
    levels: bool = False,
    share: Share = ALONE,
) -> Embedded:
    """Runs the towers over the source in evaluation mode, without gradient; the model's modes are restored after.

    Images go whole through the model's own preprocessing (its resize and centre crop or squash), no view. A model that
    reads no texts has no rows of them.

    Args:
        batch_size: images, and texts, encoded at once; without influence on the result beyond rounding.
        device: where the towers run; the model is moved there.
        workers: processes that read and preprocess; 0: this one.
        timeout: seconds that reading a batch may take; 0: any time.
        limit: only the first so many samples.
        on_bad_sample: `skip` lists a sample that cannot be read in `bad`; `error` raises its `BadSampleError`.
        autocast: precision of the towers' matrix products (`torch.bfloat16`); None: the weights' own.
        levels: keep the pooled inner levels of both towers too.
        share: of several processes, all of which call this with the same arguments. The first gets what it would find
            alone, bit for bit; the others get no rows.
    Raises:
        ValueError: no sample could be read.
        ReadTimeout: reading a batch took longer than `timeout`.
        BadSampleError: of the first unreadable sample, with `on_bad_sample="error"`.
    """
    share.call(levels=levels)
    image_taps = visual_taps(model.image_levels) if levels and model.image_levels else {}
    images = _Rows(image_taps)
    own: list[_Read] = []
    with evaluating(model, device, autocast):
        length = len(source) if limit is None else min(limit, len(source))
        chunks = _Whole(source, model.image_spec.raw, batch_size=batch_size, length=length)
        size = batch_size * 3 * model.image_spec.size**2
        places = range(len(chunks))[share.mine]
        for chunk in ReadAhead(chunks, places, workers=workers, timeout=timeout, item_bytes=size, name=chunks.name):
            if chunk.bad and on_bad_sample == "error" and share.of == 1:
                raise BadSampleError(*chunk.bad[0])
            if chunk.pixels is not None:
                images.add_of(model, chunk.pixels.to(device))
            own.append(_Read(chunk.samples, chunk.bad))
    read = [*share.all_of(own)]
    samples = [sample for chunk in read for sample in chunk.samples]
    bad = [failure for chunk in read for failure in chunk.bad]
    if bad and on_bad_sample == "error":
        raise BadSampleError(*bad[0])
    if not samples:
        why = f"; the first: sample {bad[0][0]!r}: {bad[0][1]}" if bad else ""
        raise ValueError(f"no sample of {source.name} could be read ({len(bad)} tried){why}")
    rows = share.rows(images.by_name(), [len(chunk.samples) for chunk in read])
    captions, image_of_text = list[str](), torch.empty(0, dtype=torch.long)
    texts, text_levels = torch.empty(0, model.embed_dim), dict[str, Tensor]()
    if isinstance(model, DualEncoder):
        captions = [caption for sample in samples for caption in sample.captions]
        image_of_text = torch.arange(len(samples)).repeat_interleave(torch.tensor([len(s.captions) for s in samples]))
        text_taps = language_taps(model.text_levels) if levels and model.text_levels else {}
        how = {"batch_size": batch_size, "device": device, "autocast": autocast, "share": share}
        texts, text_levels = _embed_captions(model, captions, taps=text_taps, **how)  # type: ignore[arg-type]
    return Embedded(
        images=rows.pop(_EMBEDDING, torch.empty(0, model.embed_dim)),
        texts=texts,
        image_of_text=image_of_text,
        ids=tuple(sample.id for sample in samples),
        labels=torch.tensor([-1 if sample.label is None else sample.label for sample in samples], dtype=torch.long),
        captions=tuple(captions),
        bad=tuple(bad),
        image_levels={name: values for name, values in rows.items() if not name.startswith(_HEAD)},
        text_levels=text_levels,
        logits={name.removeprefix(_HEAD): rows[name] for name in rows if name.startswith(_HEAD)},
    )


def _embed_captions(
    model: DualEncoder,
    captions: Sequence[str],
    *,
    taps: Mapping[str, LevelInfo],
    batch_size: int,
    device: torch.device | str,
    autocast: torch.dtype | None,
    share: Share,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Embeddings, and the pooled levels that `taps` names."""
    own = _Rows(taps)
    order = encode_texts(
        model,
        captions,
        own.add,
        levels=own.names,
        batch_size=batch_size,
        device=device,
        autocast=autocast,
        batches=share.mine,
    )
    different = len(set(captions))
    sizes = [min(batch_size, different - first) for first in range(0, different, batch_size)]
    rows = {name: values[order] for name, values in share.rows(own.by_name(), sizes).items()}
    return rows.pop(_EMBEDDING, torch.empty(0, model.embed_dim)), rows


_EMBEDDING = "embedding"  # beside the names of levels
_HEAD = "head "  # in front of the names of heads


class _Rows:
    """A tower's answers, batch by batch: unit embeddings and pooled levels."""

    def __init__(self, taps: Mapping[str, LevelInfo]) -> None:
        self.taps = taps
        self.names = tuple(dict.fromkeys(info.name for info in taps.values()))
        self.embeddings: list[Tensor] = []
        self._levels: dict[str, list[Tensor]] = {name: [] for name in taps}
        self._logits: dict[str, list[Tensor]] = {}

    def add(self, tower: TowerFeatures) -> None:
        self.embeddings.append(_unit(tower.embedding))
        for name, level in tapped(self.taps, tower.levels).items():
            self._levels[name].append(pooled(level).cpu())

    def add_of(self, model: ImageEncoder, pixels: UInt8[Tensor, "batch 3 height width"]) -> None:
        """What the model's image tower answers to a batch, and the heads of a classifier."""
        tower = model.encode_image(model.image_spec.to_model(pixels), self.names)
        self.add(tower)
        if isinstance(model, Classifier):
            for name in model.heads:
                scores = model.logits(name, tower.embedding)
                self._logits.setdefault(f"{_HEAD}{name}", []).append(scores.float().cpu())

    def by_name(self) -> dict[str, Tensor]:
        """All rows so far; nothing where there are none."""
        every = {_EMBEDDING: self.embeddings, **self._levels, **self._logits}
        return {name: torch.cat(values) for name, values in every.items() if values}


def _unit(embedding: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
    return F.normalize(embedding.float(), dim=-1).cpu()


class _Text(NamedTuple):
    """What is kept of a sample beside its pixels."""

    id: str
    captions: tuple[str, ...]
    label: int | None


class _Read(NamedTuple):
    """What a chunk had beside its pixels."""

    samples: list[_Text]
    bad: list[tuple[str, str]]


class _Chunk(NamedTuple):
    samples: list[_Text]
    pixels: UInt8[Tensor, "batch 3 height width"] | None
    bad: list[tuple[str, str]]


class _Whole(Dataset[_Chunk]):
    """Chunk `i` of the source: whole images at the model's size. Works inside data workers."""

    def __init__(self, source: Source, read: Callable[[Image.Image], Tensor], *, batch_size: int, length: int) -> None:
        self.source, self.read = source, read
        self.batch_size, self.length = batch_size, length

    def __len__(self) -> int:
        return -(-self.length // self.batch_size)

    def name(self, chunk: int) -> str:
        first = chunk * self.batch_size
        return f"samples {first} to {min(first + self.batch_size, self.length) - 1} of {self.source.name}"

    def __getitem__(self, chunk: int) -> _Chunk:
        samples: list[_Text] = []
        pixels: list[Tensor] = []
        bad: list[tuple[str, str]] = []
        for index in range(chunk * self.batch_size, min((chunk + 1) * self.batch_size, self.length)):
            try:
                sample = self.source[index]
                pixels.append(self.read(sample.image))
            except BadSampleError as error:
                bad.append((error.sample_id, error.reason))
            else:
                samples.append(_Text(sample.id, sample.captions, sample.label))
        return _Chunk(samples, stack(pixels) if pixels else None, bad)
