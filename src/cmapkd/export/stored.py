"""What retrieval keeps when embeddings are stored in fewer bytes: int8, sign bits, fewer numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor

from cmapkd.evaluation.embed import Embedded
from cmapkd.evaluation.retrieval import retrieval

RESCORED = 40  # candidates that sign bits propose, and floats order
SHARES = (1, 2, 4, 8)  # of the width
_QUERIES = 256  # at once


def to_int8(units: Float[Tensor, "rows dim"]) -> Int8[Tensor, "rows dim"]:
    """Each number times 127, rounded and clipped: one scale for all, so pictures and texts stay comparable."""
    return (units * 127).round().clamp(-127, 127).to(torch.int8)


def to_bits(units: Float[Tensor, "rows dim"]) -> UInt8[Tensor, "rows bytes"]:
    """The sign of each number, eight of a row in a byte."""
    return torch.from_numpy(np.packbits((units > 0).numpy(), axis=-1))


def signs(bits: UInt8[Tensor, "rows bytes"], dim: int) -> Float[Tensor, "rows dim"]:
    """-1 and 1; an inner product of two is `dim` less twice the number of bits that differ."""
    return 2 * torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1, count=dim)).float() - 1


def stored_rows(found: Embedded, rotation: Float[Tensor, "dim dim"] | None) -> list[dict[str, Any]]:
    """Mean R@1 of both directions, for each width and each form of storing.

    Queries are stored as candidates are. A cut vector is normalised again.

    Args:
        rotation: of training data (`rotation_of`); None: vectors are cut as they are only.
    Returns:
        `width`, `rotated`, and by form `bytes` of a vector and `recall@1` in percent.
    """
    dim, cuts = found.images.shape[1], [(False, None), *([(True, rotation)] if rotation is not None else [])]
    rows = []
    for rotated, matrix in cuts:
        for width in dict.fromkeys(max(1, dim // share) for share in SHARES):
            if rotated and width == dim:
                continue  # the same inner products
            pair = [each if matrix is None else each @ matrix for each in (found.images, found.texts)]
            images, texts = (F.normalize(each[:, :width], dim=-1) for each in pair)
            rows.append({"width": width, "rotated": rotated, "forms": _forms(images, texts, found.image_of_text)})
    return rows


def _forms(images: Tensor, texts: Tensor, image_of_text: Int[Tensor, " texts"]) -> dict[str, dict[str, float]]:
    width = images.shape[1]
    eighth = -(-width // 8)
    image_bits, text_bits = (signs(to_bits(each), width) for each in (images, texts))
    recalls = {
        "float32": (4 * width, _recall(images, texts, image_of_text)),
        "int8": (width, _recall(to_int8(images).float(), to_int8(texts).float(), image_of_text)),
        "bits": (eighth, _recall(image_bits, text_bits, image_of_text)),
        "bits, rescored": (eighth, _rescored((images, texts), (image_bits, text_bits), image_of_text)),
    }
    return {form: {"bytes": size, "recall@1": recall} for form, (size, recall) in recalls.items()}


def _recall(images: Tensor, texts: Tensor, image_of_text: Tensor) -> float:
    return float(retrieval(images, texts, image_of_text)["mean_r@1"])


def _rescored(units: tuple[Tensor, Tensor], bits: tuple[Tensor, Tensor], image_of_text: Tensor) -> float:
    """R@1 where sign bits propose `RESCORED` candidates, and the floats choose among them."""
    rows = torch.arange(len(units[0]))
    described = torch.isin(rows, image_of_text)  # a picture without a caption asks for nothing
    i2t = _first_is_right(units, bits, rows, image_of_text)[described]
    t2i = _first_is_right(units[::-1], bits[::-1], image_of_text, rows)
    return float(50 * (i2t.mean() + t2i.mean()))


def _first_is_right(
    units: tuple[Tensor, ...], bits: tuple[Tensor, ...], query_group: Tensor, candidate_group: Tensor
) -> Float[Tensor, " queries"]:
    """Whether the best candidate belongs to the query; of equally good ones, the share that does."""
    shares = []
    for first in range(0, len(units[0]), _QUERIES):
        part = slice(first, first + _QUERIES)
        proposed = (bits[0][part] @ bits[1].T).topk(min(RESCORED, len(units[1])), dim=-1).indices
        scores = (units[1][proposed] @ units[0][part][:, :, None]).squeeze(-1)
        best = scores >= scores.max(-1, keepdim=True).values - 1e-6  # equal captions may differ in the last digit
        right = candidate_group[proposed] == query_group[part][:, None]
        shares.append((best & right).sum(-1).float() / best.sum(-1))
    return torch.cat(shares)
