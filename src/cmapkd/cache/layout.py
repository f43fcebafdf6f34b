"""The layout of a row: which of the teacher's answers it holds, in which numbers, and the way there and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cmapkd.cache.config import Store
from cmapkd.cache.files import CacheError
from cmapkd.cache.rows import CHECK, Layout, live_features
from cmapkd.cache.tower_fidelity import TowerFidelity
from cmapkd.data.types import ModelInput, TokenBatch
from cmapkd.features import KeyTokens
from cmapkd.features.pyramid import cells_of, pooled
from cmapkd.methods.dual import TeacherDetail
from cmapkd.models import Features, FrozenTeacher, Level, LevelRequest, TowerFeatures
from cmapkd.models.types import BOTH

TowerName = str  # image, text, or text/POOL for the texts of a further pool
DETAILS: tuple[TeacherDetail, ...] = ("global", "pooled", "key_tokens", "dense")
_NUMPY = {"fp32": "<f4", "fp16": "<f2", "int8": "i1"}
_PLACES = "<i2"  # of key tokens
_MORE = "text/"
_TINY = 2.0**-14  # smallest normal number of float16: scales below would lose digits


@dataclass(frozen=True, slots=True)
class Field:
    """One array of a row: an embedding, or a level with what its values do not say themselves."""

    tower: TowerName
    level: str | None  # none: the embedding
    shape: tuple[int, ...]
    layout: Literal["tokens", "map"] = "tokens"
    num_prefix: int = 0
    grid: tuple[int, int] | None = None
    masked: bool = False
    part: Literal["values", "places", "mean"] = "values"  # of key tokens there are all three

    @property
    def name(self) -> str:
        if self.level is None:
            return self.tower
        return f"{self.tower}:{self.level}" + ("" if self.part == "values" else f"/{self.part}")

    @property
    def is_number(self) -> bool:
        return self.part != "places"

    def plain(self) -> dict[str, Any]:
        values = {**asdict(self), "shape": [*self.shape], "grid": self.grid and [*self.grid]}
        return {key: value for key, value in values.items() if (key, value) != ("part", "values")}


@dataclass(frozen=True, slots=True)
class RowLayout(Layout):
    """Embeddings of both towers, of further texts, and levels."""

    kind: TeacherDetail
    store: Store
    fields: tuple[Field, ...]
    key_tokens: KeyTokens | None = None

    @classmethod
    def of(
        cls,
        features: Features,
        *,
        kind: TeacherDetail,
        store: Store,
        context_length: int,
        key_tokens: KeyTokens | None = None,
    ) -> Self:
        """The layout for answers like these; texts get as many places as the tokenizer has at most.

        Raises:
            CacheError: a level has more places than 16 bits can number, and its key tokens are to be stored.
        """
        fields: list[Field] = []
        for name, tower in _towers(features).items():
            fields.append(Field(name, None, tuple(tower.embedding.shape[1:])))
            for level_name, level in tower.levels.items() if kind != "global" else ():
                if kind == "pooled":
                    width = level.values.shape[1] if level.layout == "map" else level.values.shape[-1]
                    fields.append(Field(name, level_name, (width,)))
                    continue
                if key_tokens is not None:
                    fields += _key_fields(name, level_name, level, key_tokens.count, context_length)
                    continue
                shape = tuple(level.values.shape[1:])
                if name == "text":
                    shape = (context_length, *shape[1:])
                masked = level.mask is not None
                fields.append(Field(name, level_name, shape, level.layout, level.num_prefix, level.grid, masked))
        return cls(kind, store, tuple(fields), key_tokens)

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Self:
        fields = [
            Field(
                **{
                    **field,
                    "shape": tuple(field["shape"]),
                    "grid": None if field["grid"] is None else tuple(field["grid"]),
                }
            )
            for field in values["fields"]
        ]
        key_tokens = KeyTokens(**values["key_tokens"]) if "key_tokens" in values else None
        if values["kind"] not in DETAILS or values["store"] not in _NUMPY:
            raise ValueError(f"rows of kind {values['kind']!r} in {values['store']!r}")
        if not {"image", "text"} <= {field.name for field in fields if field.shape}:
            raise ValueError("rows without the embeddings of image and text")
        layout = cls(values["kind"], values["store"], tuple(fields), key_tokens)
        if not 0 < layout.row_bytes < 2**31:
            raise ValueError(f"rows of {layout.row_bytes} bytes")
        return layout

    def plain(self) -> dict[str, Any]:
        values = {"kind": self.kind, "store": self.store, "fields": [field.plain() for field in self.fields]}
        return values | ({} if self.key_tokens is None else {"key_tokens": asdict(self.key_tokens)})

    @property
    def dtype(self) -> np.dtype[Any]:
        """A row as numpy reads it."""
        parts: list[tuple[str, str, tuple[int, ...]]] = [(CHECK, "<u8", ())]
        for field in self.fields:
            parts.append((field.name, _NUMPY[self.store] if field.is_number else _PLACES, field.shape))
            if self.store == "int8" and field.is_number:
                parts.append((_scale(field.name), "<f2", field.shape[:-1]))
        return np.dtype(parts)

    def embeddings(self) -> RowLayout:
        """Of the two embeddings alone."""
        return RowLayout("global", self.store, tuple(field for field in self.fields if field.name in ("image", "text")))

    @property
    def needs_texts(self) -> bool:
        """Whether masks and lengths of text levels are the tokens' own."""
        return self.kind in ("key_tokens", "dense") and any(
            field.tower == "text" and field.level is not None for field in self.fields
        )

    @property
    def needs(self) -> LevelRequest:
        """What a teacher is asked for."""
        levels = [field for field in self.fields if field.level is not None]
        image, text = (
            tuple(dict.fromkeys(str(field.level) for field in levels if field.tower == tower)) for tower in BOTH
        )
        return LevelRequest(image, text)

    def ask(self, teacher: FrozenTeacher, inputs: ModelInput, precision: str) -> dict[str, Tensor]:
        return self.arrays(live_features(teacher, inputs, self.needs, precision), inputs.texts)

    def fidelity(self) -> TowerFidelity:
        return TowerFidelity()

    def lacks(self, needs: LevelRequest, kind: TeacherDetail, key_tokens: KeyTokens | None = None) -> str | None:
        """Why rows like these cannot answer a method, or None if they can."""
        held = {(field.tower, field.level) for field in self.fields}
        asked = [("image", name) for name in needs.image_levels]
        asked += [("text", name) for name in needs.text_levels]
        missing = [f"{tower} level {name}" for tower, name in asked if (tower, name) not in held]
        if missing:
            return f"it holds no {', '.join(missing)}"
        if asked and DETAILS.index(self.kind) < DETAILS.index(kind):
            return (
                f"it holds levels {self.kind}{' (one vector each)' if self.kind == 'pooled' else ''}, and the method "
                f"compares them place by place, which needs {kind}"
            )
        if asked and self.kind == kind == "key_tokens" and self.key_tokens != key_tokens:
            held_tokens, wanted = (
                tokens and f"{tokens.count} by {tokens.by}" for tokens in (self.key_tokens, key_tokens)
            )
            return f"it holds key tokens {held_tokens}, and the method reads {wanted}"
        return None

    def arrays(self, features: Features, texts: TokenBatch | None = None) -> dict[str, Tensor]:
        """A batch of answers by field, float32 [batch ...] of the field's shape (places of key tokens: integers).

        Args:
            features: of the teacher, with the levels of the layout.
            texts: checked to have the masks of the levels; None: not checked.
        """
        arrays: dict[str, Tensor] = {}
        if self.key_tokens is not None:
            features = self.key_tokens.of(features)
        for field in self.fields:
            tower = _towers(features)[field.tower]
            if field.level is None:
                arrays[field.name] = tower.embedding.float()
                continue
            level = tower.levels[field.level]
            if self.kind == "pooled":
                arrays[field.name] = pooled(level).float()
                continue
            if self.kind == "key_tokens":
                arrays[field.name] = _key_array(field, level)
                continue
            values = level.values.float()
            if field.tower == "text":
                if texts is not None and level.mask is not None and not torch.equal(level.mask, texts.mask):
                    raise CacheError(
                        f"text level {field.level} marks other tokens as real than its tokenizer, so that dense text "
                        "levels of this teacher cannot be stored: use a live teacher, or kind pooled"
                    )
                values = F.pad(values, (0, 0, 0, field.shape[0] - values.shape[1]))
            arrays[field.name] = values
        return arrays

    def encode(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With int8 also a scale [...] for each vector [... width]."""
        if self.store == "fp32":
            return dict(arrays)
        if self.store == "fp16":
            return {name: array.half() if array.is_floating_point() else array for name, array in arrays.items()}
        encoded: dict[str, Tensor] = {}
        for name, array in arrays.items():
            if not array.is_floating_point():
                encoded[name] = array
                continue
            scale = (array.abs().amax(-1) / 127).clamp_min(_TINY).half()
            encoded[name] = (array / scale.float()[..., None]).round().clamp(-127, 127).to(torch.int8)
            encoded[_scale(name)] = scale
        return encoded

    def decode(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored arrays back to float32 [batch ...] by field; exact for fp32. Places of key tokens become int64."""
        decoded: dict[str, Tensor] = {}
        for field in self.fields:
            if not field.is_number:
                decoded[field.name] = arrays[field.name].long()
                continue
            array = arrays[field.name].float()
            decoded[field.name] = (
                array * arrays[_scale(field.name)].float()[..., None] if self.store == "int8" else array
            )
        return decoded

    def features(
        self,
        arrays: Mapping[str, Tensor],
        needs: LevelRequest,
        texts: TokenBatch | None,
        *,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
    ) -> Features:
        """Decoded arrays [batch ...] as a model would have returned them.

        A pooled level is one token without a grid, so that nothing takes it for places of the picture.
        """
        towers: dict[TowerName, TowerFeatures] = {}
        for tower, names in (("image", needs.image_levels), ("text", needs.text_levels)):
            levels = {
                field.level: self._level(field, arrays, texts)
                for field in self.fields
                if field.tower == tower and field.level in names and field.level is not None and field.part == "values"
            }
            towers[tower] = TowerFeatures(arrays[tower], {name: levels[name] for name in names})
        more = {
            field.tower.removeprefix(_MORE): TowerFeatures(arrays[field.name].reshape(-1, field.shape[-1]))
            for field in self.fields
            if field.tower.startswith(_MORE)
        }
        return Features(towers["image"], towers["text"], logit_scale, logit_bias, more)

    def _level(self, field: Field, arrays: Mapping[str, Tensor], texts: TokenBatch | None) -> Level:
        """A level of a batch from decoded arrays [batch ...]; of texts cut to the longest one of the batch."""
        values = arrays[field.name]
        if self.kind == "key_tokens":
            places, mean = arrays[f"{field.name}/places"], arrays[f"{field.name}/mean"]
            return Level(values, "tokens", 0, field.grid, places >= 0 if field.masked else None, places, mean)
        if self.kind == "pooled":
            return Level(values[:, None], "tokens")
        if field.tower == "image":
            return Level(values, field.layout, field.num_prefix, field.grid)
        assert texts is not None
        values = values[:, : texts.ids.shape[1]]
        return Level(values, "tokens", field.num_prefix, None, texts.mask if field.masked else None)

    @property
    def short(self) -> str:
        return f"{self.kind} in {self.store}"

    def describe(self) -> str:
        levels = [field.name for field in self.fields if field.level is not None and field.part == "values"]
        widths = ", ".join(f"{field.name} {math.prod(field.shape):,}" for field in self.fields if field.level is None)
        kind = self.kind if self.key_tokens is None else f"{self.key_tokens.count} key tokens by {self.key_tokens.by}"
        return f"{kind} in {self.store}: {widths}" + (f"; levels {', '.join(levels)}" if levels else "")


def _key_fields(tower: TowerName, name: str, level: Level, count: int, context_length: int) -> list[Field]:
    """The key tokens of a level, where they stand, and the mean of all."""
    cells = cells_of(level)
    num_places, width = context_length if tower == "text" else cells.shape[1], cells.shape[2]
    if num_places > np.iinfo(_PLACES).max:
        raise CacheError(
            f"{tower} level {name} has {num_places} places, too many to number in {_PLACES}: store it dense"
        )
    count = min(count, num_places)
    grid = (level.values.shape[-2], level.values.shape[-1]) if level.layout == "map" else level.grid
    masked = tower == "text" or level.mask is not None  # a short text has fewer than there is room for
    return [
        Field(tower, name, (count, width), grid=grid, masked=masked),
        Field(tower, name, (count,), part="places"),
        Field(tower, name, (width,), part="mean"),
    ]


def _key_array(field: Field, level: Level) -> Tensor:
    """One of the three, [batch *field.shape]: with as many places as the row has."""
    assert level.places is not None
    assert level.mean is not None
    if field.part == "mean":
        return level.mean.float()
    missing = field.shape[0] - level.places.shape[1]
    if field.part == "places":
        return F.pad(level.places, (0, missing), value=-1)
    return F.pad(level.values.float(), (0, 0, 0, missing))


def _scale(name: str) -> str:
    return f"{name}/scale"


def _towers(features: Features) -> dict[TowerName, TowerFeatures]:
    size = len(features.text.embedding)
    more = {f"{_MORE}{pool}": _by_sample(tower, size) for pool, tower in features.more_texts.items()}
    return {"image": features.image, "text": features.text, **more}


def _by_sample(tower: TowerFeatures, size: int) -> TowerFeatures:
    """Embeddings [size*count dim] of `count` texts of each sample as [size count dim]; one text of each as they are."""
    count = len(tower.embedding) // max(1, size)
    return tower if count <= 1 else TowerFeatures(tower.embedding.unflatten(0, (size, count)))
