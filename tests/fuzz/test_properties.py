"""What must hold for any input, tried by hypothesis. The same examples are tried every time, so that CI is repeatable."""

from __future__ import annotations

import csv
import io
import json
import math
import tarfile
import tempfile
import unicodedata
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from cmapkd.cache.files import CacheError, read_json, write_json
from cmapkd.config import ConfigError, apply_overrides, in_markdown, load_config, printable
from cmapkd.data.images import decode_image
from cmapkd.data.open import open_source
from cmapkd.data.records import Record, Unusable, parse_json, parse_record
from cmapkd.data.tar_index import build_index
from cmapkd.data.tar_names import is_safe_name
from cmapkd.data.types import BadSampleError
from cmapkd.models.storage import read_weights
from cmapkd.run import RunConfig
from cmapkd.training.checkpoint import Progress, read_checkpoint, write_checkpoint

some = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

texts = st.text(max_size=40)  # with NUL, controls and every plane; no surrogates
numbers = st.integers() | st.floats() | st.booleans() | st.none()
jsons = st.recursive(numbers | texts, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12)  # fmt: skip


def folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="cmapkd-property-")


# ------------------------------------------------------------------------------------------------ configs

RECIPE: dict[str, Any] = {
    "student": "tiny:debug",
    "method": {"name": "contrastive"},
    "data": {"train": "scenes"},
    "training": {"steps": 3},
    "optim": {"learning_rate": 0.1},
}
_KEYS = st.sampled_from([*RECIPE])


@some
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_file_is_a_recipe_or_refused(data: bytes) -> None:
    with folder() as name:
        path = Path(name) / "r.yaml"
        path.write_bytes(data)
        try:
            load_config(RunConfig, path)
        except ConfigError as error:
            assert len(str(error)) > 10


@some
@given(_KEYS, st.sampled_from([None, "name", "steps", "train", "learning_rate", "workers", "options"]), jsons)
def test_any_value_in_a_recipe_is_taken_or_refused_by_its_key(key: str, inner: str | None, value: Any) -> None:
    values = json.loads(json.dumps(RECIPE))
    if inner is None:
        values[key] = value
    else:
        values[key] = {**(values[key] if isinstance(values[key], dict) else {}), inner: value}
    try:
        config = RunConfig.from_mapping(values)
    except ConfigError as error:
        assert error.problems
        return
    again = RunConfig.from_mapping(yaml.safe_load(yaml.safe_dump(config.plain())))
    assert again.plain() == config.plain()  # what is written in the run folder is the run


@some
@given(st.text(max_size=30), st.text(max_size=30))
def test_any_override_is_applied_or_refused(key: str, value: str) -> None:
    try:
        changed = apply_overrides({"a": {"b": 1}}, [f"{key}={value}"], where="recipe")
    except ConfigError:
        return
    assert isinstance(changed, dict)


# ------------------------------------------------------------------------------------------------ archives and records


@some
@given(st.binary(max_size=2000) | st.lists(st.binary(min_size=512, max_size=512), max_size=4).map(b"".join))
def test_any_bytes_are_a_tar_or_refused(data: bytes) -> None:
    _indexed(data)


@some
@given(st.data())
def test_a_damaged_tar_has_its_samples_inside_the_file(data: st.DataObject) -> None:
    whole = bytearray(_small_tar())
    for _ in range(data.draw(st.integers(1, 5))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    _indexed(bytes(whole[: data.draw(st.integers(0, len(whole)))]))


def _indexed(data: bytes) -> None:
    with folder() as name:
        path = Path(name) / "a.tar"
        path.write_bytes(data)
        status = path.stat()
        try:
            index = build_index(path, (status.st_size, status.st_mtime_ns))
        except Unusable:
            return
        for entry in index.entries:
            assert is_safe_name(entry.key)
            assert entry.bad or all(0 <= at <= at + size <= len(data) for at, size in entry.members.values())


@cache
def _small_tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member, content in (("a.txt", b"one"), ("a.png", b"12345"), ("é.json", b'{"caption": "two"}')):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


@some
@given(st.text(max_size=30))
def test_a_safe_name_stays_inside_any_folder(name: str) -> None:
    assume(is_safe_name(name))
    root = Path("/some/where")
    inside = root / name.replace("\\", "/")
    depth = 0
    for part in inside.relative_to(root).parts:
        depth += -1 if part == ".." else 1
        assert depth >= 0
    assert "\0" not in name


@some
@given(st.binary(max_size=300) | jsons.map(lambda values: json.dumps(values).encode()))
def test_any_bytes_are_a_json_object_or_unusable(data: bytes) -> None:
    try:
        assert isinstance(parse_json(data), dict)
    except Unusable as error:
        assert len(str(error)) > 10


_FIELDS = st.sampled_from(["caption", "captions", "label", "question", "answer", "answers", "qa", "boxes", "synthetic"])


@some
@given(st.dictionaries(_FIELDS, jsons | st.lists(st.dictionaries(st.sampled_from(["name", "x", "y", "width", "height", "question", "answers"]), jsons))))  # fmt: skip
def test_any_object_is_a_record_or_unusable(values: dict[str, Any]) -> None:
    try:
        record = parse_record(values, labels={"cat": 0})
    except Unusable:
        return
    assert isinstance(record, Record)
    for caption in record.captions or ():
        assert caption == caption.strip() != ""
        caption.encode()
    assert record.label is None or 0 <= record.label < 2**31
    for box in record.boxes:
        assert all(map(math.isfinite, (box.x, box.y, box.width, box.height)))


printing = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=30)


@some
@given(st.lists(printing, min_size=1, max_size=5), st.sampled_from([",", "\t"]))
def test_a_table_gives_back_the_captions_that_were_written(captions: list[str], separator: str) -> None:
    with folder() as name:
        Image.new("RGB", (4, 4)).save(Path(name) / "a.png")
        with (Path(name) / "t.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter=separator)
            writer.writerow(["filepath", "title"])
            writer.writerows(["a.png", caption] for caption in captions)
        expected = tuple(caption.strip() for caption in captions if caption.strip())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            source = open_source(f"csv:{name}/t.csv")
        assert source[0].captions == expected


@some
@given(st.text(max_size=400))
def test_any_text_is_a_table_or_refused(text: str) -> None:
    with folder() as name:
        Image.new("RGB", (4, 4)).save(Path(name) / "a.png")
        (Path(name) / "t.csv").write_text("filepath,title\na.png,good\n" + text, encoding="utf-8", newline="")
        try:
            source = open_source(f"csv:{name}/t.csv")
        except ConfigError:
            return
        for index in range(len(source)):
            try:
                assert source[index].image.mode == "RGB"
            except BadSampleError as error:
                assert error.reason


# ------------------------------------------------------------------------------------------------ pictures


@some
@given(st.binary(max_size=300))
def test_any_bytes_are_a_picture_or_bad(data: bytes) -> None:
    _decoded(data)


@some
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"]), st.data())
def test_a_damaged_picture_is_a_picture_or_bad(form: str, data: st.DataObject) -> None:
    damaged = bytearray(_encoded(form))
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    _decoded(bytes(damaged[: data.draw(st.integers(1, len(damaged)))]))


def _decoded(data: bytes) -> None:
    try:
        image = decode_image(data, "it", max_pixels=10_000_000)
    except BadSampleError as error:
        assert len(error.reason) > 10
    else:
        assert image.mode == "RGB"
        assert 0 < image.size[0] * image.size[1] <= 10_000_000


@cache
def _encoded(form: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)).save(file, form)
    return file.getvalue()


@some
@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from(["RGB", "L", "1"]), st.integers(0, 2**32 - 1))
def test_a_picture_without_loss_comes_back_as_it_was(width: int, height: int, mode: str, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(values).convert(mode)
    file = io.BytesIO()
    image.save(file, "PNG")
    assert decode_image(file.getvalue(), "it").tobytes() == image.convert("RGB").tobytes()


# ------------------------------------------------------------------------------------------------ caches, checkpoints


@some
@given(st.dictionaries(st.text(max_size=10).filter(lambda key: key != "digest"), jsons, max_size=5), st.data())
def test_a_manifest_is_what_was_written_or_damaged(values: dict[str, Any], data: st.DataObject) -> None:
    assume(json.loads(json.dumps(values)) == values)  # NaN is not equal to itself
    with folder() as name:
        path = Path(name) / "cache.json"
        write_json(path, values)
        assert read_json(path) == values
        changed = bytearray(path.read_bytes())
        changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(bytes(changed[: data.draw(st.integers(0, len(changed)))]))
        try:
            assert read_json(path) == values  # white space, or the last line's end
        except CacheError as error:
            assert str(path) in str(error)


@some
@given(st.data())
def test_one_changed_byte_of_a_checkpoint_is_noticed(data: st.DataObject) -> None:
    with folder() as name:
        path = Path(name) / "step-000000001"
        tensors = {"method": {"a": torch.arange(6.0)}, "optimizer": {"0.step": torch.tensor(1.0)}}
        write_checkpoint(path, tensors, Progress(step=1))
        found = read_checkpoint(path)
        assert torch.equal(found[0]["method"]["a"], tensors["method"]["a"])
        files = sorted(path.iterdir())
        file = files[data.draw(st.integers(0, len(files) - 1))]
        changed = bytearray(file.read_bytes())
        changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        file.write_bytes(bytes(changed))
        try:
            again = read_checkpoint(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:  # white space of the list of checksums: every other byte is covered by one
            assert file.name == "checksums.json"
            assert again[1] == found[1]


@some
@given(st.binary(max_size=200), st.sampled_from(["w.safetensors", "w.pt"]))
def test_any_bytes_are_weights_or_refused(data: bytes, name: str) -> None:
    with folder() as where:
        path = Path(where) / name
        path.write_bytes(data)
        try:
            weights = read_weights(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert all(isinstance(value, torch.Tensor) for value in weights.values())


# ------------------------------------------------------------------------------------------------ what is shown


@some
@given(st.text(st.characters(), max_size=60))
def test_nothing_printed_moves_the_cursor(text: str) -> None:
    shown = printable(text)
    assert not list(_controls(shown))
    assert printable(shown) == shown
    shown.encode()


@some
@given(st.text(st.characters(), max_size=60) | st.text("|<>[]()`&! \n\x1b", max_size=30))
def test_nothing_in_markdown_is_markup_or_another_cell(text: str) -> None:
    shown = in_markdown(text)
    assert not {"<", ">", "\n", "\r", "\x1b"} & set(shown)
    assert "](" not in shown
    assert not {"|", "`"} & set(shown)


def _controls(text: str) -> Iterator[str]:
    for character in text:
        kept = character in "\n\t\u200c\u200d"
        if not kept and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            yield character
