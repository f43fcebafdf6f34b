"""Pictures and texts of any kind to unit embeddings, for whoever uses a model outside of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from cmapkd.data.images import decode_image, upright_rgb
from cmapkd.models.images import ImageSpec

Picture = str | os.PathLike[str] | bytes | Image.Image
"""A file, an encoded picture, or one that is open already."""
_ONE = (str, os.PathLike, bytes, Image.Image)

Item = TypeVar("Item")


class Embeddings(NamedTuple):
    """What `DualEncoder.embed` gives, on the CPU in float32, each row of length one.

    Attributes:
        images: one row for each picture; None where none were given.
        texts: one row for each text; None where none were given.
    """

    images: Float[Tensor, "images dim"] | None
    texts: Float[Tensor, "texts dim"] | None

    @property
    def similarity(self) -> Float[Tensor, "images texts"]:
        """Cosines of every picture with every text, in [-1, 1].

        Raises:
            ValueError: only one of both was embedded.
        """
        if self.images is None or self.texts is None:
            raise ValueError("similarity needs both: give embed() images and texts")
        return self.images @ self.texts.T


def embedded_images(
    images: Picture | Iterable[Picture],
    preprocess: ImageSpec,
    encode: Callable[[Float[Tensor, "batch 3 height width"]], Float[Tensor, "batch dim"]],
    *,
    dim: int,
    batch_size: int,
) -> Float[Tensor, "images dim"]:
    """The unit embeddings of pictures; see `DualEncoder.embed`."""
    return rows_of_images(images, preprocess, lambda pixels: _unit(encode(pixels)), dim=dim, batch_size=batch_size)


def rows_of_images(
    images: Picture | Iterable[Picture],
    preprocess: ImageSpec,
    answer: Callable[[Float[Tensor, "batch 3 height width"]], Float[Tensor, "batch dim"]],
    *,
    dim: int,
    batch_size: int,
) -> Float[Tensor, "images dim"]:
    """What a model answers to pictures, on the CPU in float32; see `DualEncoder.embed` for arguments and errors."""
    rows = [torch.empty(0, dim)]
    listed: Iterable[Picture] = [images] if isinstance(images, _ONE) else _several(images, "images")
    for batch in _batches(enumerate(listed), batch_size):
        pixels = torch.stack([preprocess(opened(picture, place)) for place, picture in batch])
        rows.append(answer(pixels).float().cpu())
    return torch.cat(rows)


def embedded_texts(
    texts: str | Iterable[str],
    encode: Callable[[list[str]], Float[Tensor, "batch dim"]],
    *,
    dim: int,
    batch_size: int,
) -> Float[Tensor, "texts dim"]:
    """The unit embeddings of texts; see `DualEncoder.embed`.

    Raises:
        TypeError: a text is none.
    """
    rows = [torch.empty(0, dim)]
    for batch in _batches(enumerate([texts] if isinstance(texts, str) else _several(texts, "texts")), batch_size):
        for place, text in batch:
            if not isinstance(text, str):
                raise TypeError(f"text {place} is of type {type(text).__name__}: give texts as str")
        rows.append(_unit(encode([text for _, text in batch])))
    return torch.cat(rows)


def _batches(items: Iterable[Item], size: int) -> Iterator[Sequence[Item]]:
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch


def _several(items: Iterable[Item], what: str) -> Iterable[Item]:
    """`items`, if they can be gone through.

    Raises:
        TypeError: they are a number or something else that is neither one item nor several.
    """
    if not isinstance(items, Iterable):
        raise TypeError(f"{what} is of type {type(items).__name__}: give one, or a list of them")
    return items


def _unit(embedding: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
    return F.normalize(embedding.float(), dim=-1).cpu()


def opened(picture: Picture, place: int) -> Image.Image:
    """The picture as upright RGB.

    Args:
        place: among the pictures, to name one that has no file.
    Raises:
        FileNotFoundError, IsADirectoryError: no such file; or it is a folder.
        BadSampleError: the file or the bytes are no picture that can be read.
        TypeError: it is neither a file, nor bytes, nor a picture of Pillow.
    """
    if isinstance(picture, Image.Image):
        return upright_rgb(picture, f"image {place}")
    if isinstance(picture, bytes):
        return decode_image(picture, f"image {place}")
    if not isinstance(picture, str | os.PathLike):
        raise TypeError(
            f"image {place} is of type {type(picture).__name__}: give a path, bytes of an image file, or a PIL image"
        )
    path = Path(picture)
    if path.is_dir():
        raise IsADirectoryError(
            f"image {place}: {str(path)!r} is a folder: give the files in it, for example "
            f"sorted(Path({str(path)!r}).iterdir())"
        )
    if not path.is_file():
        raise FileNotFoundError(f"image {place}: there is no file {str(path)!r}")
    return decode_image(path.read_bytes(), str(path))
