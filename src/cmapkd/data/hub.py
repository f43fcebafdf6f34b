"""Parquet files and Hugging Face data sets, read by `datasets`; images stay encoded until they are asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmapkd.config import ConfigError
from cmapkd.data.conversations import TURN_KEYS, UNREAD_KEYS, checked_turns, is_dialogue, with_turns
from cmapkd.data.listed import ListedSource
from cmapkd.data.places import find_files, nearest
from cmapkd.data.reading import Folder, check_size
from cmapkd.data.records import TEXT_KEYS, Record, Unusable, parse_captions, parse_id, parse_record
from cmapkd.data.rows import Columns
from cmapkd.data.splits import pick_split
from cmapkd.data.stored import SampleFilter, Texts

FURTHER_COLUMNS = (
    *("question", "answer", "questions", "answers", "qa"),
    *(key for keys in TEXT_KEYS.values() for key in keys),
    *TURN_KEYS,
    *UNREAD_KEYS,
)

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class HubSource(ListedSource):
    """The rows of a `datasets.Dataset`, one sample a row.

    The id is the id column's; without one the path stored with the image, where those are relative and all different;
    else the row's number.

    Args:
        table: a `datasets.Dataset`.
        columns: names to look for; where the user names a column, only that one.
        folder: where images given as paths lie; None refuses them.
        contents: what the fingerprint covers besides ids and columns.
    Raises:
        ConfigError: no image column, several that could be it, or a named column that is not there.
    """

    def __init__(
        self,
        name: str,
        table: Any,
        *,
        columns: Columns,
        folder: Path | None,
        contents: Sequence[str],
        keep: SampleFilter | None = None,
    ) -> None:
        import datasets

        keep = keep or SampleFilter()
        self._contents_digests = [*contents, str(len(table)), repr(sorted(table.features.items()))]
        self._folder = None if folder is None else Folder(folder)
        self._column = _image_column(name, table.features, columns)
        self._captions = _first(columns.caption, table.features)
        id_column, label = _first(columns.id, table.features), _first(columns.label, table.features)
        columns.check(name, table.features)
        self._label, self._pools = label, tuple(columns.texts)
        feature = table.features[label] if label else None
        names = feature.names if isinstance(feature, datasets.ClassLabel) else None
        images = table.select_columns([self._column])
        kind = table.features[self._column]
        self._in_lists = not hasattr(kind, "dtype") and hasattr(kind, "feature")
        single = kind.feature if self._in_lists else kind
        self._is_path = getattr(single, "dtype", None) == "string"
        encoded = datasets.Image(decode=False)
        encoded = datasets.Sequence(encoded) if self._in_lists else encoded
        self._pictures = images if self._is_path else images.cast_column(self._column, encoded)
        texts = [
            self._captions,
            id_column,
            label,
            *(q for q in (*FURTHER_COLUMNS, *self._pools) if q in table.features),
        ]
        chosen = list(dict.fromkeys(text for text in texts if text is not None and text != self._column))
        self._texts = table.select_columns(chosen) if chosen else None
        ids, bad = self._find_ids(id_column, len(table))
        super().__init__(
            name, ids, keep=keep, captioned=self._find_captioned(keep, len(table)), bad=bad, class_names=names
        )

    def _find_ids(self, column: str | None, length: int) -> tuple[Texts, dict[int, str]]:
        bad: dict[int, str] = {}
        if column is not None and self._texts is not None:
            ids = []
            for row, value in enumerate(self._texts[column]):
                try:
                    identity = parse_id({column: value}, (column,))
                except Unusable as error:
                    identity, bad[row] = None, str(error)
                ids.append(identity or f"row-{row}")
            return Texts(ids), bad
        paths = self._image_paths()
        usable = all(path and not PurePath(path).is_absolute() and "://" not in path for path in paths)
        if usable and len(set(paths)) == len(paths):
            return Texts(str(path) for path in paths), bad
        return Texts(f"row-{row}" for row in range(length)), bad

    def _image_paths(self) -> list[str | None]:
        """The path stored with every image, without reading the images."""
        import pyarrow.compute as pc  # type: ignore[import-untyped]

        column = self._pictures.data.column(self._column)
        if self._in_lists:
            return [None] * len(column)
        return (column if self._is_path else pc.struct_field(column, "path")).to_pylist()  # type: ignore[no-any-return]

    def _find_captioned(self, keep: SampleFilter, length: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        captioned = np.ones(length, dtype=np.bool_)
        if not keep.require_captions:
            return captioned
        if self._captions is None or self._texts is None:
            return ~captioned
        for row in np.flatnonzero(~self._surely_captioned(length)).tolist():
            try:
                captioned[row] = bool(self._record(row).captions)
            except Unusable:
                continue  # bad, which its reading will say
        return captioned

    def _surely_captioned(self, length: int) -> NDArray[np.bool_]:
        """Where a row's captions, one text or a list of them, have a letter or another visible character."""
        import pyarrow as pa
        import pyarrow.compute as pc

        surely = np.zeros(length, dtype=np.bool_)
        start = 0
        for chunk in self._texts.data.column(self._captions).chunks if self._texts is not None else ():
            kind = chunk.type
            lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
            values = pc.list_flatten(chunk) if lists else chunk
            if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
                return np.zeros(length, dtype=np.bool_)
            visible = pc.fill_null(pc.match_substring_regex(values, r"[^\s\p{Z}\p{C}]"), False)
            visible = visible.to_numpy(zero_copy_only=False)
            rows = pc.list_parent_indices(chunk).to_numpy(zero_copy_only=False) if lists else np.arange(len(chunk))
            surely[start + rows[visible]] = True
            start += len(chunk)
        return surely if start == length else np.zeros(length, dtype=np.bool_)

    def _record(self, entry: int) -> Record:
        if self._texts is None:
            return Record()
        try:
            values: Mapping[str, Any] = self._texts[entry]
        except UnicodeDecodeError:
            raise Unusable("caption is not UTF-8") from None
        captions = None if self._captions is None else parse_captions(values[self._captions])
        label = values.get(self._label) if self._label else None
        unlabelled = {} if label is None or label == -1 else {"label": label}  # -1: a hub test split without labels
        asked = {name: values[name] for name in (*FURTHER_COLUMNS, *self._pools) if name in values}
        record = parse_record({**asked, **unlabelled}, caption_keys=(), texts=self._pools)
        record = Record(captions, record.label, record.questions, texts=record.texts)
        if not is_dialogue(values):
            return record
        return checked_turns(with_turns(record, values, pictures=self._num_pictures(entry)))

    def _num_pictures(self, entry: int) -> int:
        """How many pictures a row has, without reading them."""
        import pyarrow as pa

        value = self._pictures.data.column(self._column)[entry]
        if not value.is_valid:
            return 0
        if self._in_lists:
            return len(value)
        return int(not isinstance(value, pa.StructScalar) or any(value[key].is_valid for key in value))

    def _image(self, entry: int) -> bytes:
        value = self._pictures[entry][self._column]
        if self._in_lists:
            value = value[0] if value else None
        if value is None:
            raise Unusable("image is missing: the row has none")
        path = value if isinstance(value, str) else value.get("path")
        data = None if isinstance(value, str) else value.get("bytes")
        if data is not None:
            check_size(len(data))
            return bytes(data)
        if path is None or self._folder is None:
            raise Unusable("image is missing: the row holds neither its bytes nor a path that may be followed")
        inside = PurePath(path)
        if inside.is_absolute() and inside.is_relative_to(self._folder.path.absolute()):
            path = inside.relative_to(self._folder.path.absolute()).as_posix()
        return self._folder.read(path)

    def _contents(self) -> Iterable[str]:
        """Number of rows and columns; of parquet files names and sizes; of a hub set its name, split and revision."""
        return self._contents_digests


def open_parquet(pattern: str, *, columns: Columns | None = None, keep: SampleFilter | None = None) -> HubSource:
    """Parquet files with images as bytes (`struct<bytes, path>` or binary) or as paths inside the files' folder.

    Raises:
        ConfigError: nothing matches, or `datasets` cannot read it.
    """
    paths = find_files(pattern, suffix=".parquet", what="parquet:")
    table = _load(f"parquet:{pattern}", "parquet", data_files=[str(path.absolute()) for path in paths], split="train")
    contents = [f"{path.name}\0{path.stat().st_size}" for path in paths]
    folder = paths[0].parent
    return HubSource(
        f"parquet:{pattern}", table, columns=columns or Columns(), folder=folder, contents=contents, keep=keep
    )


def open_hub(
    name: str,
    *,
    split: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    columns: Columns | None = None,
    keep: SampleFilter | None = None,
) -> HubSource:
    """A data set of the Hugging Face hub, or a local folder that `datasets` understands.

    Raises:
        ConfigError: not found, not reachable, or without such a split.
    """
    path = Path(name).expanduser()
    if not path.is_dir() and not _HUB_NAME.fullmatch(name):
        raise ConfigError(f"hf:{name} is neither a folder nor the name of a hub data set. {nearest(name)}")
    where = str(path) if path.is_dir() else name
    builder = _load(f"hf:{name}", where, name=config, revision=revision, builder=True)
    found = [str(key) for key in (builder.config.data_files or builder.info.splits or {})]
    chosen = pick_split(split, found, f"hf:{name}") if found else split or "train"
    table = _load(f"hf:{name}", where, name=config, revision=revision, split=chosen)
    contents = [path.name if path.is_dir() else name, chosen, config or "", revision or ""]
    folder = path if path.is_dir() else None
    return HubSource(
        f"hf:{name}@{chosen}", table, columns=columns or Columns(), folder=folder, contents=contents, keep=keep
    )


def _load(spec: str, path: str, *, builder: bool = False, **options: Any) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return (datasets.load_dataset_builder if builder else datasets.load_dataset)(path, **options)
    except (DatasetsError, OSError, ValueError) as error:
        cause = f" ({error.__cause__})" if error.__cause__ is not None else ""
        raise ConfigError(f"{spec} cannot be read: {error}{cause}") from None


def _first(wanted: Sequence[str], found: Iterable[str]) -> str | None:
    return next((name for name in wanted if name in found), None)


def _image_column(name: str, features: Mapping[str, Any], columns: Columns) -> str:
    import datasets

    images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    chosen = _first(columns.image, images) or (images[0] if len(images) == 1 and len(columns.image) > 1 else None)
    chosen = chosen or (None if images and len(columns.image) > 1 else _first(columns.image, features))
    if chosen is None:
        hint = f"several image columns ({', '.join(images)})" if images else "no image column"
        raise ConfigError(f"{name} has {hint} among {', '.join(features)}: name it with ?image=COLUMN.")
    return chosen
