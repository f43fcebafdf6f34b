"""Encoding a batch a few pairs at a time: memory of the few, features and gradients of the whole.

The forward pass keeps of each micro-batch only what comes out of it. The backward pass, which knows by then what the
loss of the whole batch asks of every feature, encodes one micro-batch after the other again, with the random state it
had, and goes through it. So it is the gradient caching of Gao et al. 2021 (arXiv:2101.06983), done by checkpointing:
one backward pass, in which every parameter gets its gradient once, as processes that wait for each other need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from cmapkd.data.types import Batch
from cmapkd.models import Features, Level, TowerFeatures

Rows = TypeVar("Rows")  # a tree of tensors with one row for each sample, see `map_rows`
Encoded = TypeVar("Encoded")


def micro_batches(batch: Batch, size: int | None) -> list[Batch]:
    """The batch in parts of `size` pairs, the last one shorter if it must be; None: as it is."""
    if size is None or size >= len(batch):
        return [batch]
    return [batch.part(start, start + size) for start in range(0, len(batch), size)]


def encode_checkpointed(
    encode: Callable[[Batch, int], Encoded], parts: Sequence[Batch], *, model: nn.Module
) -> list[Encoded]:
    """`encode(part, its number)` of each part; of several, nothing inside is kept and the backward pass repeats it.

    Args:
        encode: a function of the part, the modules and the random state; without side effects.
        model: what it trains. Its batch norms, which know their micro-batch only, take note of each once.
    """
    if len(parts) == 1:
        return [encode(parts[0], 0)]
    encoded: list[Encoded] = []
    for number, part in enumerate(parts):
        # weights cast for one part are not shared with the next, where their gradients would be summed in bf16
        torch.clear_autocast_cache()

        def run(_ids: Tensor, part: Batch = part, number: int = number) -> Encoded:
            return encode(part, number)

        ids = _an_input(part)  # an argument by its device: that one's random state is restored
        twice = partial(noted_once, model)
        encoded.append(checkpoint(run, ids, use_reentrant=False, context_fn=twice))
    return encoded


def _an_input(part: Batch) -> Tensor:
    """A tensor of the student's inputs, or of what is stored in their place."""
    if "student" in part.inputs:
        return part.inputs["student"].texts.ids
    return next(iter(part.stored["student"].arrays.values()))


def join_features(parts: Sequence[Features]) -> Features:
    """Features of successive parts as those of the whole."""
    if len(parts) == 1:
        return parts[0]
    image, text = _join_towers([part.image for part in parts]), _join_towers([part.text for part in parts])
    texts = {pool: _join_towers([part.more_texts[pool] for part in parts]) for pool in parts[0].more_texts}
    views = {view: _join_towers([part.more_images[view] for part in parts]) for view in parts[0].more_images}
    return replace(parts[0], image=image, text=text, more_texts=texts, more_images=views)


def map_rows(function: Callable[..., Tensor], *trees: Rows) -> Rows:
    """`function` of the tensors that stand in the same place of each tree, as a tree of the same shape.

    Args:
        trees: all of one structure: tensors, mappings of trees by name, or dataclasses whose fields are trees.
    """
    first: Any = trees[0]
    if isinstance(first, Tensor):
        return cast(Rows, function(*trees))
    if isinstance(first, Mapping):
        return cast(Rows, {name: map_rows(function, *(cast(Any, tree)[name] for tree in trees)) for name in first})
    if is_dataclass(first) and not isinstance(first, type):
        named = {
            field.name: map_rows(function, *(getattr(tree, field.name) for tree in trees)) for field in fields(first)
        }
        return cast(Rows, replace(first, **named))
    raise TypeError(f"rows are tensors, or mappings or dataclasses of tensors, not {type(first).__name__}")


def join_rows(parts: Sequence[Rows]) -> Rows:
    """Rows of successive parts as those of the whole."""
    return map_rows(lambda *rows: torch.cat(rows), *parts)


def without_levels(features: Features) -> Features:
    """The embeddings alone."""
    image, text = TowerFeatures(features.image.embedding), TowerFeatures(features.text.embedding)
    return replace(features, image=image, text=text)


def with_levels_on(features: Features, device: torch.device | str) -> Features:
    """The features with their levels on another device; embeddings stay.

    On their way from a GPU to the host and back nothing waits for them: the host's copy lies in pinned memory, which
    only the GPU's own stream writes and reads, in that order. Nothing on the host may look at it.
    """
    there = torch.device(device)

    def copied(tensor: Tensor) -> Tensor:
        if there.type == "cpu" and tensor.device.type == "cuda":
            return torch.empty_like(tensor, device=there, pin_memory=True).copy_(tensor, non_blocking=True)
        return tensor.to(there, non_blocking=there.type != "cpu")

    def moved(level: Level) -> Level:
        mask, places, mean = (None if t is None else copied(t) for t in (level.mask, level.places, level.mean))
        return replace(level, values=copied(level.values), mask=mask, places=places, mean=mean)

    image, text = (
        replace(tower, levels={name: moved(level) for name, level in tower.levels.items()})
        for tower in (features.image, features.text)
    )
    return replace(features, image=image, text=text)


def _join_towers(parts: Sequence[TowerFeatures]) -> TowerFeatures:
    levels = {name: _join_levels([part.levels[name] for part in parts]) for name in parts[0].levels}
    return TowerFeatures(torch.cat([part.embedding for part in parts]), levels)


def _join_levels(parts: Sequence[Level]) -> Level:
    """Tokens of texts are padded to the longest part, which is as long as the whole batch would be."""

    def joined(tensors: Iterable[Tensor | None], fill: float = 0) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(_of_one_length(present, fill)) if present else None

    values = [part.values for part in parts]
    return replace(
        parts[0],
        values=torch.cat(values if parts[0].layout == "map" else _of_one_length(values)),
        mask=joined(part.mask for part in parts),
        places=joined((part.places for part in parts), fill=-1),
        mean=joined(part.mean for part in parts),
    )


def _of_one_length(tensors: Sequence[Tensor], fill: float = 0) -> list[Tensor]:
    """[batch tokens ...] each, with as many tokens as the longest has."""
    length = max(tensor.shape[1] for tensor in tensors)

    def padded(tensor: Tensor) -> Tensor:
        missing = length - tensor.shape[1]
        more = tensor.new_full((len(tensor), missing, *tensor.shape[2:]), fill)
        return torch.cat([tensor, more], dim=1) if missing else tensor

    return [padded(tensor) for tensor in tensors]


def noted_once(model: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `checkpoint`: contexts of the first encoding and of each later one, so that batch norms take note once."""
    return nullcontext(), _StatisticsKept(model)


class _StatisticsKept(AbstractContextManager[None]):
    """Batch norms normalise as they do, but their running statistics and counts of batches stay as they are.

    They note what they see in copies. So a compiled model finds nothing else than before, and needs no other graph.
    May be entered several times: a part is encoded again for every backward pass, and a kept graph has several.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.own: list[tuple[_BatchNorm, dict[str, Tensor | None]]] = []

    def __enter__(self) -> None:
        norms = [module for module in self.model.modules() if isinstance(module, _BatchNorm)]
        self.own = [(norm, dict(norm._buffers)) for norm in norms]
        for norm, buffers in self.own:
            norm._buffers.update({name: None if each is None else each.clone() for name, each in buffers.items()})

    def __exit__(self, *_error: object) -> None:
        for norm, buffers in self.own:
            norm._buffers.update(buffers)
