"""A bank of teacher embeddings: a reference set far larger than the batch, which a frozen teacher never makes stale."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

BankStore = Literal["fp16", "fp32"]
"""The numbers of a bank's entries; named as those of a cache."""

_EMPTY = -1
_CHUNK = 2048  # entries at a time, where they are widened
_TYPES: dict[BankStore, torch.dtype] = {"fp16": torch.float16, "fp32": torch.float32}


def sample_keys(ids: Iterable[str]) -> Int[Tensor, " batch"]:
    """A number >= 0 for each sample id, the same in every process and run (63 bits of its hash)."""
    digests = (blake2b(name.encode(), digest_size=8).digest() for name in ids)
    return torch.tensor([int.from_bytes(digest, "little") >> 1 for digest in digests], dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class References:
    """Pairs of teacher embeddings to compare samples with; rows of length one, in the numbers that the bank stores."""

    image: Float[Tensor, "entries dim"]
    text: Float[Tensor, "entries dim"]
    exclude: Bool[Tensor, "batch entries"]  # True where an entry is no reference for a sample
    levels: dict[str, Float[Tensor, "entries width"]] = field(default_factory=dict)  # as they came; zeros: not known

    def of_level(self, level: str) -> tuple[Float[Tensor, "entries width"], Bool[Tensor, "batch entries"]]:
        """The vectors of one level, float32, and where they are no reference; an entry that lacks it is none."""
        entries = _widened(self.levels[level])
        return entries, self.exclude | ~entries.any(-1)


class EmbeddingBank(nn.Module):
    """Pairs of teacher embeddings with the samples they came from: the last `size` that a run has seen, or a fixed set.

    Unlike a queue of a student's embeddings (MoCo, arXiv:1911.05722) its entries stay exact, because the teacher does
    not move. A bank of the run fills as it goes and is checkpointed with the method, so a resumed run finds it as it
    was; a fixed set (`fill`) is drawn again. Memory: size x (2 x dim x 2 + 8) bytes, in fp32 size x (2 x dim x 4 + 8).
    Nothing in it is trained.

    Args:
        size: pairs at most.
        store: fp16 is off by at most one part in 2048 of a number; whoever compares with the entries widens them.
        fixed: filled once by `fill`, from the teacher's cache, and not by `push`; no part of a checkpoint.
        levels: widths of further vectors that are stored with each pair, by name; size x width more numbers each.
    """

    image: Float[Tensor, "size dim"]
    text: Float[Tensor, "size dim"]
    keys: Int[Tensor, " size"]
    cursor: Int[Tensor, ""]

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        store: BankStore = "fp16",
        fixed: bool = False,
        levels: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.size, self.fixed, self.levels = size, fixed, tuple(levels or ())
        assert not (fixed and self.levels)  # a cache's draw has embeddings only
        rows = 0 if fixed else size  # a fixed one gets its entries at once
        self.register_buffer("image", torch.zeros(rows, dim, dtype=_TYPES[store]), persistent=not fixed)
        self.register_buffer("text", torch.zeros(rows, dim, dtype=_TYPES[store]), persistent=not fixed)
        self.register_buffer("keys", torch.full((rows,), _EMPTY, dtype=torch.int64), persistent=not fixed)
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64), persistent=not fixed)
        for name, width in (levels or {}).items():
            self.register_buffer(f"level_{name}", torch.zeros(rows, width, dtype=_TYPES[store]))
        self._filled: int | None = 0  # entries that are not empty, which come first; None: to be counted

    @property
    def filled(self) -> int:
        """Entries that hold a pair."""
        if self._filled is None:
            self._filled = int((self.keys != _EMPTY).sum())
        return self._filled

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self._filled = None

    @torch.no_grad()
    def push(
        self,
        image: Float[Tensor, "batch dim"],
        text: Float[Tensor, "batch dim"],
        keys: Int[Tensor, " batch"],
        levels: Mapping[str, Float[Tensor, "batch width"]] | None = None,
    ) -> None:
        """Stores the pairs over the oldest entries, normalised; of more than `size` pairs the last ones.

        The vectors of `levels` are stored with them as they are; a level that is not given is not known of these pairs.
        """
        image, text, keys = image[-self.size :], text[-self.size :], keys[-self.size :]
        places = (self.cursor + torch.arange(len(keys), device=self.cursor.device)) % self.size
        self.image[places], self.text[places] = self._stored(image), self._stored(text)
        self.keys[places] = keys.to(self.keys.device, non_blocking=True)
        for name in self.levels:
            stored = self._level(name)
            vectors = (levels or {}).get(name)
            limit = torch.finfo(stored.dtype).max
            stored[places] = (
                torch.zeros_like(stored[places])
                if vectors is None
                else _widened(vectors[-self.size :].to(stored.device)).clamp(-limit, limit).to(stored.dtype)
            )
        self.cursor.copy_((self.cursor + len(keys)) % self.size)
        self._filled = min(self.size, self.filled + len(keys))

    @torch.no_grad()
    def fill(self, parts: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        """The pairs of a fixed bank, the same in every process, normalised.

        Args:
            parts: of images and texts Float[entries dim] and their keys Int[entries]; up to `size` entries in all. One
                is stored before the next is asked for, so that they are never held twice.
        """
        self.image, self.text = (rows.new_empty(self.size, rows.shape[1]) for rows in (self.image, self.text))
        self.keys, self._filled = self.keys.new_full((self.size,), _EMPTY), 0
        for image, text, keys in parts:
            here = slice(self._filled, self._filled + len(keys))
            self.image[here], self.text[here] = self._stored(image), self._stored(text)
            self.keys[here] = keys.to(self.keys)
            self._filled = here.stop

    def _level(self, name: str) -> Float[Tensor, "size width"]:
        return self.get_buffer(f"level_{name}")

    def _stored(self, embeddings: Float[Tensor, "entries dim"]) -> Float[Tensor, "entries dim"]:
        """At length one, in the bank's numbers; normalised before it is rounded."""
        return F.normalize(_widened(embeddings.to(self.image.device)), dim=-1).to(self.image.dtype)

    def references(
        self,
        keys: Int[Tensor, " batch"],
        *,
        num: int | None = None,
        generator: torch.Generator | None = None,
        images: Float[Tensor, "batch dim"] | None = None,
        duplicates_above: float | None = None,
    ) -> References:
        """What samples are compared with: all entries, or `num` of them, drawn anew.

        Nothing writes into what is returned: a bank that goes on being filled gives copies.

        Args:
            keys: of the samples; entries of the same sample (another view or caption of it) are excluded.
            num: each pair is equally likely; fewer where the bank does not hold so many.
            generator: what the draw comes from, on the CPU, the same in every process; needed with `num`.
            images: the teacher's embeddings of the samples' images.
            duplicates_above: an entry whose image has a larger cosine with a sample's is the same image under another
                name, and excluded; None looks at names only.
        Raises:
            ValueError: `num` without a generator.
        """
        if num is not None and generator is None:
            raise ValueError(
                f"{num} entries are to be drawn, but from what? Give a generator, as `StepInfo` makes them"
            )
        if num is None or num >= self.filled:
            held = slice(max(1, self.filled))  # one empty entry, excluded, where there is nothing yet
            image, text = self.image[held], self.text[held]
            if not self.fixed:
                image, text = image.clone(), text.clone()
            levels = {name: self._level(name)[held].clone() for name in self.levels}
            references = References(image, text, self._excluded(keys, self.keys[held]), levels)
        else:
            drawn = torch.randperm(self.filled, generator=generator)[:num]
            chosen = drawn.to(self.keys.device, non_blocking=True)
            levels = {name: self._level(name)[chosen] for name in self.levels}
            excluded = self._excluded(keys, self.keys[chosen])
            references = References(self.image[chosen], self.text[chosen], excluded, levels)
        if duplicates_above is not None and images is not None:
            directions = F.normalize(_widened(images.detach()), dim=-1)
            with torch.autocast(directions.device.type, enabled=False):  # cosines in bf16 are off by up to 0.004
                for start in range(0, len(references.image), _CHUNK):
                    part = slice(start, start + _CHUNK)
                    cosines = directions @ references.image[part].to(directions.dtype).T
                    references.exclude[:, part] |= cosines > duplicates_above
        return references

    def _excluded(self, keys: Int[Tensor, " batch"], entries: Int[Tensor, " entries"]) -> Bool[Tensor, "batch entries"]:
        """True where an entry is no reference for a sample: still empty, or of the sample itself (another view)."""
        excluded = entries[None, :] == keys.to(entries.device)[:, None]
        return excluded.logical_or_(entries == _EMPTY)


def _widened(embeddings: Tensor) -> Tensor:
    """In float32 or wider."""
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
