"""A kind of data that an installed package adds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cmapkd.config import ConfigError
from cmapkd.data import open as open_module
from cmapkd.data.config import DataConfig
from cmapkd.data.open import KINDS, open_source, open_streams

MODULE = '''
from PIL import Image

from cmapkd.data.types import Sample


class Dots:
    """Pictures of one colour."""

    def __init__(self, length, split):
        self.length, self.split, self.name = length, split, f"dots:{length}@{split}"

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return Sample(f"dot-{index}", Image.new("RGB", (8, 8), (index, 0, 0)), self.captions(index))

    def captions(self, index):
        return (f"dot {index}",)

    class_names = None

    def fingerprint(self):
        return self.name


def open_dots(spec):
    length = int(spec.need_rest("dots:5"))
    brightness = spec.take("brightness")
    spec.refuse_leftovers(("brightness",))
    return Dots(length if spec.keep.limit is None else min(length, spec.keep.limit), spec.split or spec.default_split)
'''


@pytest.fixture
def dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package `dots-data` is installed that offers the kind `dots`."""
    (tmp_path / "dots_data.py").write_text(MODULE)
    (info := tmp_path / "dots_data-1.2.dist-info").mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dots-data\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[cmapkd.sources]\ndots = dots_data:open_dots\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    fresh = type(KINDS)(KINDS.group, KINDS.own)
    monkeypatch.setattr(open_module, "KINDS", fresh)
    yield
    sys.modules.pop("dots_data", None)


def test_an_installed_package_adds_a_kind(dots: None) -> None:
    source = open_source("dots:5@odd?limit=3&brightness=2", split="val")
    assert (len(source), source.name) == (3, "dots:3@odd")
    assert source[2].captions == ("dot 2",)
    assert open_source("dots:5", split="val").name == "dots:5@val"
    with pytest.raises(ConfigError, match=r"unknown option 'brightnes' .did you mean 'brightness'.*Known for dots"):
        open_source("dots:5?brightnes=1")
    with pytest.raises(ConfigError, match=r"no kind of data 'dotz' .did you mean 'dots'.*hf, dots"):
        open_source("dotz:5")
    more = DataConfig.from_mapping(
        {"train": "dots:5", "more": {"other": {"source": "dots:7", "share": 0.5}}}, where="data"
    ).more
    assert open_streams("dots:5", more)[6].id == "other/dot-1"


def test_without_the_package_the_kind_is_unknown() -> None:
    with pytest.raises(ConfigError, match="no kind of data 'dots'"):
        open_source("dots:5")
