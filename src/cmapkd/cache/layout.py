"""The layout of a row: which of the teacher's answers it holds, in which numbers, and the way there and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cmapkd.cache.config import Store
from cmapkd.cache.files import CacheError
from cmapkd.data.types import TokenBatch
from cmapkd.features.pyramid import pooled
from cmapkd.methods.base import Detail
from cmapkd.models import Features, Level, Needs, TowerFeatures

Tower = Literal["image", "text"]
CHECK = "check"  # a row's own number: which sample, view and caption it answers; 0: no answer
DETAILS: tuple[Detail, ...] = ("global", "pooled", "dense")
_NUMPY = {"fp32": "<f4", "fp16": "<f2", "int8": "i1"}
_TINY = 2.0**-14  # smallest normal number of float16: scales below would lose digits


@dataclass(frozen=True, slots=True)
class Field:
    """One array of a row: an embedding, or a level with what its values do not say themselves."""

    tower: Tower
    level: str | None  # none: the embedding
    shape: tuple[int, ...]
    layout: Literal["tokens", "map"] = "tokens"
    num_prefix: int = 0
    grid: tuple[int, int] | None = None
    masked: bool = False

    @property
    def name(self) -> str:
        return self.tower if self.level is None else f"{self.tower}:{self.level}"


@dataclass(frozen=True, slots=True)
class Layout:
    """Fixed-width rows of named arrays, packed without gaps."""

    kind: Detail
    store: Store
    fields: tuple[Field, ...]

    @classmethod
    def of(cls, features: Features, *, kind: Detail, store: Store, context_length: int) -> Self:
        """The layout for answers like these; texts get as many places as the tokenizer has at most."""
        fields: list[Field] = []
        for name, tower in _towers(features).items():
            fields.append(Field(name, None, tuple(tower.embedding.shape[1:])))
            for level_name, level in tower.levels.items() if kind != "global" else ():
                if kind == "pooled":
                    width = level.values.shape[1] if level.layout == "map" else level.values.shape[-1]
                    fields.append(Field(name, level_name, (width,)))
                    continue
                shape = tuple(level.values.shape[1:])
                if name == "text":
                    shape = (context_length, *shape[1:])
                masked = level.mask is not None
                fields.append(Field(name, level_name, shape, level.layout, level.num_prefix, level.grid, masked))
        return cls(kind, store, tuple(fields))

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Self:
        fields = [
            Field(
                **{
                    **each,
                    "shape": tuple(each["shape"]),
                    "grid": None if each["grid"] is None else tuple(each["grid"]),
                }
            )
            for each in values["fields"]
        ]
        return cls(values["kind"], values["store"], tuple(fields))

    def plain(self) -> dict[str, Any]:
        fields = [{**asdict(each), "shape": [*each.shape], "grid": each.grid and [*each.grid]} for each in self.fields]
        return {"kind": self.kind, "store": self.store, "fields": fields}

    @property
    def dtype(self) -> np.dtype[Any]:
        """A row as numpy reads it."""
        parts: list[tuple[str, str, tuple[int, ...]]] = [(CHECK, "<u8", ())]
        for each in self.fields:
            parts.append((each.name, _NUMPY[self.store], each.shape))
            if self.store == "int8":
                parts.append((_scale(each.name), "<f2", each.shape[:-1]))
        return np.dtype(parts)

    @property
    def row_bytes(self) -> int:
        return int(self.dtype.itemsize)

    def lacks(self, needs: Needs, kind: Detail) -> str | None:
        """Why rows like these cannot answer a method, or None if they can."""
        held = {(each.tower, each.level) for each in self.fields}
        asked: list[tuple[Tower, str]] = [("image", name) for name in needs.image_levels]
        asked += [("text", name) for name in needs.text_levels]
        missing = [f"{tower} level {name}" for tower, name in asked if (tower, name) not in held]
        if missing:
            return f"it holds no {', '.join(missing)}"
        if asked and DETAILS.index(self.kind) < DETAILS.index(kind):
            return (
                f"it holds levels {self.kind} (one vector each), and the method compares them place by place, which "
                f"needs {kind}"
            )
        return None

    def arrays(self, features: Features, texts: TokenBatch | None = None) -> dict[str, Tensor]:
        """A batch of answers as float32 arrays by field; `texts` are checked to have the levels' masks."""
        found: dict[str, Tensor] = {}
        for each in self.fields:
            tower = _towers(features)[each.tower]
            if each.level is None:
                found[each.name] = tower.embedding.float()
                continue
            level = tower.levels[each.level]
            if self.kind == "pooled":
                found[each.name] = pooled(level).float()
                continue
            values = level.values.float()
            if each.tower == "text":
                if texts is not None and level.mask is not None and not torch.equal(level.mask, texts.mask):
                    raise CacheError(
                        f"text level {each.level} marks other tokens as real than its tokenizer, so that dense text "
                        "levels of this teacher cannot be stored: use a live teacher, or kind pooled"
                    )
                values = F.pad(values, (0, 0, 0, each.shape[0] - values.shape[1]))
            found[each.name] = values
        return found

    def encode(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """In the numbers that are stored. What does not fit them becomes infinite."""
        if self.store == "fp32":
            return dict(arrays)
        if self.store == "fp16":
            return {name: array.half() for name, array in arrays.items()}
        encoded: dict[str, Tensor] = {}
        for name, array in arrays.items():
            scale = (array.abs().amax(-1) / 127).clamp_min(_TINY).half()
            encoded[name] = (array / scale.float()[..., None]).round().clamp(-127, 127).to(torch.int8)
            encoded[_scale(name)] = scale
        return encoded

    def decode(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Back to float32; exact for fp32."""
        decoded: dict[str, Tensor] = {}
        for each in self.fields:
            array = arrays[each.name].float()
            decoded[each.name] = array * arrays[_scale(each.name)].float()[..., None] if self.store == "int8" else array
        return decoded

    def rows(self, encoded: Mapping[str, Tensor], checks: NDArray[np.uint64]) -> NDArray[Any]:
        """Rows with these arrays, in their order."""
        rows = np.zeros(len(checks), self.dtype)
        rows[CHECK] = checks
        for name, array in encoded.items():
            rows[name] = array.cpu().numpy()
        return rows

    def tensors(self, rows: NDArray[Any]) -> dict[str, Tensor]:
        """The arrays of rows as they are stored."""
        return {
            name: torch.from_numpy(np.ascontiguousarray(rows[name])) for name in self.dtype.names or () if name != CHECK
        }

    def features(
        self,
        arrays: Mapping[str, Tensor],
        needs: Needs,
        texts: TokenBatch | None,
        *,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
    ) -> Features:
        """Decoded arrays as a model would have returned them.

        A pooled level is one token without a grid, so that nothing takes it for places of the picture.
        """
        towers: dict[Tower, TowerFeatures] = {}
        for tower, names in (("image", needs.image_levels), ("text", needs.text_levels)):
            tower = cast(Tower, tower)
            levels = {
                each.level: self._level(each, arrays[each.name], texts)
                for each in self.fields
                if each.tower == tower and each.level in names and each.level is not None
            }
            towers[tower] = TowerFeatures(arrays[tower], {name: levels[name] for name in names})
        return Features(towers["image"], towers["text"], logit_scale, logit_bias)

    def _level(self, field: Field, values: Tensor, texts: TokenBatch | None) -> Level:
        if self.kind == "pooled":
            return Level(values[:, None], "tokens")
        if field.tower == "image":
            return Level(values, field.layout, field.num_prefix, field.grid)
        assert texts is not None
        values = values[:, : texts.ids.shape[1]]
        return Level(values, "tokens", field.num_prefix, None, texts.mask if field.masked else None)

    def describe(self) -> str:
        """One line for people."""
        levels = [each.name for each in self.fields if each.level is not None]
        widths = ", ".join(f"{each.name} {math.prod(each.shape):,}" for each in self.fields if each.level is None)
        return f"{self.kind} in {self.store}: {widths}" + (f"; levels {', '.join(levels)}" if levels else "")


def _scale(name: str) -> str:
    return f"{name}/scale"


def _towers(features: Features) -> dict[Tower, TowerFeatures]:
    return {"image": features.image, "text": features.text}
