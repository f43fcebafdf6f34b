"""A bank of teacher embeddings: a reference set far larger than the batch, which a frozen teacher never makes stale."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

_EMPTY = -1
_CHUNK = 8192  # entries at a time, where images are compared


def sample_keys(ids: Iterable[str]) -> Int[Tensor, " batch"]:
    """A number >= 0 for each sample id, the same in every process and run (63 bits of its hash)."""
    digests = (blake2b(name.encode(), digest_size=8).digest() for name in ids)
    return torch.tensor([int.from_bytes(digest, "little") >> 1 for digest in digests], dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class References:
    """Pairs of teacher embeddings to compare samples with; rows of length one."""

    image: Float[Tensor, "entries dim"]
    text: Float[Tensor, "entries dim"]
    exclude: Bool[Tensor, "batch entries"]  # True where an entry is no reference for a sample


class EmbeddingBank(nn.Module):
    """Pairs of teacher embeddings with the samples they came from: the last `size` that a run has seen, or a fixed set.

    Unlike a queue of a student's embeddings (MoCo, arXiv:1911.05722) its entries stay exact, because the teacher does
    not move. A bank of the run fills as it goes and is checkpointed with the method, so a resumed run finds it as it
    was; a fixed set (`fill`) is drawn again. Memory: size x (2 x dim x 4 + 8) bytes. Nothing in it is trained.

    Args:
        size: pairs at most.
        fixed: filled once by `fill`, from the teacher's cache, and not by `push`; no part of a checkpoint.
    """

    image: Float[Tensor, "size dim"]
    text: Float[Tensor, "size dim"]
    keys: Int[Tensor, " size"]
    cursor: Int[Tensor, ""]

    def __init__(self, size: int, dim: int, *, fixed: bool = False) -> None:
        super().__init__()
        self.size, self.fixed = size, fixed
        rows = 0 if fixed else size  # a fixed one gets its entries at once
        self.register_buffer("image", torch.zeros(rows, dim), persistent=not fixed)
        self.register_buffer("text", torch.zeros(rows, dim), persistent=not fixed)
        self.register_buffer("keys", torch.full((rows,), _EMPTY, dtype=torch.int64), persistent=not fixed)
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64), persistent=not fixed)
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
        self, image: Float[Tensor, "batch dim"], text: Float[Tensor, "batch dim"], keys: Int[Tensor, " batch"]
    ) -> None:
        """Stores the pairs over the oldest entries, normalised; of more than `size` pairs the last ones."""
        image, text, keys = image[-self.size :], text[-self.size :], keys[-self.size :]
        places = (self.cursor + torch.arange(len(keys), device=self.cursor.device)) % self.size
        self.image[places] = F.normalize(image.to(self.image.dtype), dim=-1)
        self.text[places] = F.normalize(text.to(self.text.dtype), dim=-1)
        self.keys[places] = keys.to(self.keys.device)
        self.cursor.copy_((self.cursor + len(keys)) % self.size)
        self._filled = min(self.size, self.filled + len(keys))

    def fill(
        self, image: Float[Tensor, "entries dim"], text: Float[Tensor, "entries dim"], keys: Int[Tensor, " entries"]
    ) -> None:
        """The pairs of a fixed bank, the same in every process; the tensors become its own, normalised in place."""
        for embeddings in (image, text):
            for part in embeddings.split(_CHUNK):
                part.div_(part.norm(dim=-1, keepdim=True).clamp_min_(1e-12))
        self.image, self.text = (embeddings.to(self.image) for embeddings in (image, text))
        self.keys, self._filled = keys.to(self.keys), len(keys)

    def references(
        self,
        keys: Int[Tensor, " batch"],
        *,
        num: int | None = None,
        images: Float[Tensor, "batch dim"] | None = None,
        duplicates_above: float | None = None,
    ) -> References:
        """What samples are compared with: all entries, or `num` of them, drawn anew from the process's random state.

        Nothing writes into what is returned: a bank that goes on being filled gives copies.

        Args:
            keys: of the samples; entries of the same sample (another view or caption of it) are excluded.
            num: each pair is equally likely; fewer where the bank does not hold so many.
            images: the teacher's embeddings of the samples' images.
            duplicates_above: an entry whose image has a larger cosine with a sample's is the same image under another
                name, and excluded; None looks at names only.
        """
        if num is None or num >= self.filled:
            held = slice(max(1, self.filled))  # one empty entry, excluded, where there is nothing yet
            image, text = self.image[held], self.text[held]
            if not self.fixed:
                image, text = image.clone(), text.clone()
            references = References(image, text, self.excluded(keys)[:, held])
        else:
            chosen = torch.randperm(self.filled)[:num].to(self.keys.device)
            own = self.keys[chosen][None, :] == keys.to(self.keys.device)[:, None]
            references = References(self.image[chosen], self.text[chosen], own)
        if duplicates_above is not None and images is not None:
            directions = F.normalize(images.detach().to(self.image.dtype), dim=-1)
            for start in range(0, len(references.image), _CHUNK):
                part = slice(start, start + _CHUNK)
                references.exclude[:, part] |= directions @ references.image[part].T > duplicates_above
        return references

    def excluded(self, keys: Int[Tensor, " batch"]) -> Bool[Tensor, "batch size"]:
        """True where an entry is no reference for a sample: still empty, or of the sample itself (another view)."""
        return (self.keys == _EMPTY)[None, :] | (self.keys[None, :] == keys.to(self.keys.device)[:, None])
