"""Prompt sets and class names: the named ones, the source's own, and files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cmapkd.config import ConfigError
from cmapkd.data.templates import fill, get_class_names, get_templates

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("name", "count", "first"),
    [
        ("openai_imagenet", 80, "a bad photo of a {}."),
        ("simple", 7, "itap of a {}."),
        ("photo", 1, "a photo of a {}."),
        ("plain", 1, "{}"),
    ],
)
def test_named_sets(name: str, count: int, first: str) -> None:
    templates = get_templates(name)
    assert (len(templates), templates[0]) == (count, first)
    assert all("{}" in template for template in templates)


def test_templates_of_the_built_in_world() -> None:
    from cmapkd.data.scenes import ScenesSource

    assert get_templates("scenes") == get_templates("auto", ScenesSource("val"))
    assert all(template.count("{}") == 1 for template in get_templates("scenes"))


def test_auto_without_templates_of_its_own_is_photo(make_source: Make) -> None:
    assert get_templates("auto", make_source()) == get_templates("auto") == ("a photo of a {}.",)


def test_a_file_of_templates(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("a scan of {}\n\n  {} {1} again, {}  \n", encoding="utf-8")
    templates = get_templates(str(path))
    assert templates == ("a scan of {}", "{} {1} again, {}")
    assert fill(templates[1], "a {b}") == "a {b} {1} again, a {b}"


def test_template_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'openai_imagnet' is no file .*did you mean 'openai_imagenet'"):
        get_templates("openai_imagnet")
    path = tmp_path / "mine.txt"
    path.write_text("a photo of a {}\na photo of a %s\n")
    with pytest.raises(ConfigError, match=r"1 of 2 lines without \{\}.*'a photo of a %s'"):
        get_templates(str(path))
    path.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        get_templates(str(path))
    path.write_bytes(b"\xff\xfe{}\x00")
    with pytest.raises(ConfigError, match="not readable UTF-8"):
        get_templates(str(path))


def test_class_names_of_the_source_and_of_imagenet(make_source: Make) -> None:
    assert get_class_names(None, make_source()) is None
    assert get_class_names(None, make_source(class_names=["cat", "dog"])) == ("cat", "dog")
    names = get_class_names("imagenet", make_source())
    assert names is not None
    assert (len(names), names[0], names[999]) == (1000, "tench", "toilet paper")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("names.txt", "cat\nlarge dog\n"),
        ("names.json", json.dumps(["cat", "large dog"])),
        ("names.json", json.dumps({"1": "large dog", "0": "cat"}, indent=1)),
    ],
)
def test_class_names_from_a_file(make_source: Make, tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).write_text(text)
    assert get_class_names(str(tmp_path / file), make_source()) == ("cat", "large dog")


def test_numbered_class_names_are_in_numeric_order(make_source: Make, tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text(json.dumps({str(number): f"class {number}" for number in range(12)}))
    names = get_class_names(str(tmp_path / "names.json"), make_source())
    assert names == tuple(f"class {number}" for number in range(12))


@pytest.mark.parametrize("text", ['["cat", 1]', '"cat"', "[cat"])
def test_json_that_is_no_list_of_names(make_source: Make, tmp_path: Path, text: str) -> None:
    (tmp_path / "names.json").write_text(text)
    with pytest.raises(ConfigError, match=r"names.json is (none of|not JSON)"):
        get_class_names(str(tmp_path / "names.json"), make_source())


def test_class_name_errors(make_source: Make) -> None:
    with pytest.raises(ConfigError, match="did you mean 'imagenet'"):
        get_class_names("imagnet", make_source())
    with pytest.raises(ValueError, match="imagenet has 1000 names, but memory has 2 classes"):
        get_class_names("imagenet", make_source(class_names=["cat", "dog"]))
