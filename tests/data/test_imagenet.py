"""ImageNet's folders: which class is which number."""

from __future__ import annotations

from pathlib import Path

import pytest
from making import picture, write_zip

from cmapkd.config import ConfigError
from cmapkd.data.open import open_source


def plant(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(i))
    return root


def test_labels_are_places_among_the_thousand(tmp_path: Path) -> None:
    plant(tmp_path / "val", "n01443537/b.JPEG", "n01440764/a.JPEG", "n15075141/c.JPEG")
    plant(tmp_path / "train", "n01440764/x.JPEG")
    source = open_source(f"imagenet:{tmp_path}@val")
    assert [(source[i].id, source[i].label) for i in range(3)] == [
        ("n01440764/a.JPEG", 0),
        ("n01443537/b.JPEG", 1),
        ("n15075141/c.JPEG", 999),
    ]
    assert source.class_names is not None
    assert (len(source.class_names), source.class_names[1], source.class_names[999]) == (
        1000,
        "goldfish",
        "toilet paper",
    )
    assert source.name == f"imagenet:{tmp_path}@val"
    assert len(open_source(f"imagenet:{tmp_path}", split="train")) == 1
    direct = open_source(f"imagenet:{tmp_path}/val", split="val")  # whoever opens it asks for a split it does not have
    assert direct[2].label == 999


def test_only_the_classes_that_are_there(tmp_path: Path) -> None:
    """ImageNet-R and -A choose among their own 200 names."""
    plant(tmp_path, "n15075141/c.jpg", "n01443537/b.jpg")
    source = open_source(f"imagenet:{tmp_path}?classes=present")
    assert source.class_names == ("goldfish", "toilet paper")
    assert [source[i].label for i in range(2)] == [0, 1]


def test_numbered_folders_count_as_numbers(tmp_path: Path) -> None:
    """ImageNet-V2: in the order of text, 10 would come before 2."""
    plant(tmp_path, "2/a.jpeg", "10/b.jpeg", "999/c.jpeg")
    source = open_source(f"imagenet:{tmp_path}")
    assert {source[i].id: source[i].label for i in range(3)} == {"2/a.jpeg": 2, "10/b.jpeg": 10, "999/c.jpeg": 999}
    present = open_source(f"imagenet:{tmp_path}?classes=present")
    assert {present[i].id: present[i].label for i in range(3)} == {"2/a.jpeg": 0, "10/b.jpeg": 1, "999/c.jpeg": 2}
    assert present.class_names is not None
    assert source.class_names is not None
    assert present.class_names == tuple(source.class_names[i] for i in (2, 10, 999))


def test_zip(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "val.zip", [(f"val/{wnid}/0.jpg", picture()) for wnid in ("n01440764", "n01443537")])
    assert [open_source(f"imagenet:{path}")[i].label for i in range(2)] == [0, 1]


def test_refusals(tmp_path: Path) -> None:
    plant(tmp_path / "own", "cat/1.jpg", "dog/1.jpg")
    plant(tmp_path / "both/train", "n01440764/1.jpg")
    plant(tmp_path / "both/val", "n01440764/1.jpg")
    plant(tmp_path / "flat/val", "ILSVRC2012_val_00000001.JPEG")
    plant(tmp_path / "numbers", "0/1.jpg", "1000/1.jpg")
    path = write_zip(tmp_path / "val.zip", [("n01440764/0.jpg", picture())])
    for spec, message in {
        f"{tmp_path}/own": "2 class folders that its classes file does not name, such as 'cat': name the folder of",
        f"{tmp_path}/both": "has the splits train, val: say which",
        f"{tmp_path}/both@test": "has no split 'test'",
        f"{tmp_path}/own@val": "holds no folder of a split",
        f"{tmp_path}/flat@val": "holds no class folders, so its images have no labels",
        f"{tmp_path}/numbers": "1 class folders .* such as '1000'",
        f"{path}@val": "is one split as it is",
        f"{tmp_path}/gone": "neither a folder nor a .zip",
        f"{tmp_path}/own?classes=some": "classes must be all .* or present, got 'some'",
        "": "does not say what to read",
    }.items():
        with pytest.raises(ConfigError, match=message):
            open_source(f"imagenet:{spec}")


def test_imagenet_samples(shared: Path) -> None:
    source = open_source(f"imagenet:{shared}/imagenet_samples/dev.zip")
    same = open_source(f"folder:{shared}/imagenet_samples/dev.zip")  # numbered by its classes.json
    assert len(source) == 100
    assert [source[i].label for i in range(0, 100, 9)] == [same[i].label for i in range(0, 100, 9)]
