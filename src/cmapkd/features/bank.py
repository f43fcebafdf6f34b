"""A bank of teacher embeddings: a reference set far larger than the batch, which a frozen teacher never makes stale."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

_EMPTY = -1


def sample_keys(ids: Iterable[str]) -> Int[Tensor, " batch"]:
    """A number >= 0 for each sample id, the same in every process and run (63 bits of its hash)."""
    digests = (blake2b(name.encode(), digest_size=8).digest() for name in ids)
    return torch.tensor([int.from_bytes(digest, "little") >> 1 for digest in digests], dtype=torch.int64)


class EmbeddingBank(nn.Module):
    """The last `size` pairs of teacher embeddings that a run has seen, with the samples they came from.

    Unlike a queue of a student's embeddings (MoCo, arXiv:1911.05722) its entries stay exact, because the teacher does
    not move. It fills as the run goes and is checkpointed with the method, so a resumed run finds it as it was.
    Memory: size x (2 x dim x 4 + 8) bytes. Nothing in it is trained.
    """

    image: Float[Tensor, "size dim"]
    text: Float[Tensor, "size dim"]
    keys: Int[Tensor, " size"]
    cursor: Int[Tensor, ""]

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("image", torch.zeros(size, dim))
        self.register_buffer("text", torch.zeros(size, dim))
        self.register_buffer("keys", torch.full((size,), _EMPTY, dtype=torch.int64))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64))

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

    def excluded(self, keys: Int[Tensor, " batch"]) -> Bool[Tensor, "batch size"]:
        """True where an entry is no reference for a sample: still empty, or of the sample itself (another view)."""
        return (self.keys == _EMPTY)[None, :] | (self.keys[None, :] == keys.to(self.keys.device)[:, None])
