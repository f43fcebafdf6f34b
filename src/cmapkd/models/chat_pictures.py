"""How a processor reads pictures of one size, found out once, so that later ones need less of its work.

At every call a processor checks all its options, and counts the tokens of a picture. Neither depends on more than the
picture's size. So a picture of noise is read by the processor, and by its parts: image processor and tokenizer. Where
both ways give the same, bit for bit, the parts read all later pictures of that size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Processed = Callable[[str, Sequence[Image.Image]], dict[str, Tensor]]

_SEEN = 3  # pictures of a size before it is worth a look
_SIZES = 4096  # that are remembered at most


class _Way(NamedTuple):
    """How the parts read pictures of a size.

    Attributes:
        placeholder: what stands for the picture in a prompt.
        written: what the processor writes in its place.
        pictures: names of the image processor's tensors that the model reads.
        numbers: further numbers of each token by name: the one of visual tokens, 0 of all others.
    """

    placeholder: str
    written: str
    pictures: tuple[str, ...]
    numbers: Mapping[str, int]


class PictureSizes:
    """What is known of the sizes of pictures that were read.

    Args:
        native: transformers' processor.
        image_id: the token that stands for a visual token.
        options: for the image processor, at each call.
        placeholders: control texts. One of them stands for the picture in a prompt; the visual token's own is tried
            first.
    """

    def __init__(self, native: Any, image_id: int, options: Mapping[str, Any], placeholders: Iterable[str]) -> None:
        self._native, self._image_id, self._options = native, image_id, dict(options)
        own = native.tokenizer.convert_ids_to_tokens(image_id)
        self._placeholders = tuple(sorted(placeholders, key=lambda text: text != own))
        self._seen: Counter[tuple[int, int]] = Counter()
        self._ways: dict[tuple[int, int], _Way | None] = {}

    def read(self, text: str, picture: Image.Image, special: bool, whole: Processed) -> dict[str, Tensor] | None:
        """What `whole` gives, without the attention mask; None where only that can tell.

        Args:
            picture: in RGB.
            special: whether the tokenizer adds its special tokens.
            whole: the processor.
        """
        size = picture.size
        if size not in self._ways:
            if len(self._seen) < _SIZES or size in self._seen:
                self._seen[size] += 1
            if self._seen[size] < _SEEN:
                return None
            self._ways[size] = self._way(text, size, special, whole)
        way = self._ways[size]
        if way is None or text.count(way.placeholder) != 1:
            return None
        try:
            return self._by_parts(text, picture, special, way)
        except Exception:  # the processor says better what is wrong
            return None

    def _by_parts(self, text: str, picture: Image.Image, special: bool, way: _Way) -> dict[str, Tensor]:
        ids = torch.tensor([self._ids(text.replace(way.placeholder, way.written), special)])
        numbers = {name: (ids == self._image_id).to(ids.dtype).mul_(value) for name, value in way.numbers.items()}
        shown = self._shown(picture)
        return {"input_ids": ids, **numbers, **{name: shown[name] for name in way.pictures}}

    def _shown(self, picture: Image.Image) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._native.image_processor([[picture]], return_tensors="pt", **self._options)
        return found

    def _ids(self, text: str, special: bool) -> list[int]:
        ids: list[int] = self._native.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def _way(self, text: str, size: tuple[int, int], special: bool, whole: Processed) -> _Way | None:
        """How the parts read what `whole` reads; None where they give something else."""
        noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        picture = Image.fromarray(noise)
        try:
            expected = whole(text, [picture])
            expected.pop("attention_mask", None)
            way = self._supposed(text, expected)
            found = None if way is None else self._by_parts(text, picture, special, way)
        except Exception:  # whatever it is, the processor meets it again and says it
            return None
        return way if found is not None and _same(found, expected) else None

    def _supposed(self, text: str, expected: Mapping[str, Tensor]) -> _Way | None:
        ids = expected["input_ids"]
        visual = ids == self._image_id
        numbers = {
            name: int(value[visual].max())
            for name, value in expected.items()
            if name != "input_ids" and _like(value, ids)
        }
        pictures = tuple(name for name in expected if name != "input_ids" and name not in numbers)
        told: str = self._native.tokenizer.decode(
            ids[0].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        for placeholder in self._placeholders:
            before, found, after = text.partition(placeholder)
            end = len(told) - len(after)
            if (
                found
                and placeholder not in after
                and end >= len(before)
                and told == before + told[len(before) : end] + after
            ):
                return _Way(placeholder, told[len(before) : end], pictures, numbers)
        return None


def _like(value: Tensor, ids: Tensor) -> bool:
    """Whether a tensor has a number for each token."""
    return value.shape == ids.shape and value.dtype == ids.dtype


def _same(one: Mapping[str, Any], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        isinstance(one[name], Tensor) and one[name].dtype == value.dtype and torch.equal(one[name], value)
        for name, value in other.items()
    )
