"""Visual Genome's region descriptions and objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from making import picture, write_zip

from cmapkd.config import ConfigError
from cmapkd.data.open import open_source
from cmapkd.data.types import BadSampleError, Box

REGIONS = [
    {"id": 1, "regions": [{"region_id": 11, "image_id": 1, "phrase": " the clock is green ", "x": 4, "y": 5},
                          {"region_id": 12, "image_id": 1, "phrase": "shade"}]},
    {"id": 3, "regions": []},
]  # fmt: skip
OBJECTS = [
    {"image_id": 1, "image_url": "x", "objects": [{"names": ["clock", "dial"], "x": 4, "y": 5, "w": 6, "h": 7}]},
    {"image_id": 2, "objects": [{"names": ["trees"], "x": 0, "y": 0, "w": 3, "h": 2, "synsets": ["tree.n.01"]}]},
    {"image_id": 3, "objects": [{"names": [], "x": 0, "y": 0, "w": 3, "h": 2}]},
    {"objects": []},
]


def write(path: Path, values: Any) -> Path:
    path.write_text(json.dumps(values))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, inside in ((1, "VG_100K"), (2, "VG_100K_2"), (3, "")):
        (tmp_path / "images" / inside).mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / inside / f"{number}.jpg").write_bytes(picture(number))
    write(tmp_path / "region_descriptions.json", REGIONS)
    write(tmp_path / "objects.json", OBJECTS)
    return tmp_path


def test_regions_are_captions_and_objects_are_boxes(folder: Path) -> None:
    source = open_source(f"visual_genome:{folder}/region_descriptions.json,{folder}/objects.json,{folder}/images")
    assert len(source) == 4
    first, third = source[0], source[2]
    assert (first.id, first.captions) == ("1", ("the clock is green", "shade"))
    assert first.boxes == (Box(4, 5, 6, 7, "clock"),)
    assert first.image.getpixel((0, 0)) == (1, 0, 0)
    assert (third.id, third.captions, third.boxes) == ("2", (), (Box(0, 0, 3, 2, "trees"),))
    with pytest.raises(BadSampleError, match=r"box is malformed: .* has no name"):
        _ = source[1]
    with pytest.raises(BadSampleError, match="has no image_id"):
        _ = source[3]


def test_one_file_alone(folder: Path) -> None:
    regions = open_source(
        f"visual_genome:{folder}/region_descriptions.json,{folder}/images?limit=2", require_captions=True
    )
    assert (len(regions), regions[0].boxes) == (1, ())  # the other has no region
    objects = open_source(f"visual_genome:{folder}/objects.json,{folder}/images?limit=2")
    assert [objects[i].captions for i in range(2)] == [(), ()]
    assert objects.fingerprint() != open_source(f"visual_genome:{folder}/objects.json,{folder}/images").fingerprint()


def test_images_in_a_zip(folder: Path) -> None:
    images = write_zip(folder / "i.zip", [("a/VG_100K/1.jpg", picture(1)), ("a/VG_100K_2/2.jpg", picture(2))])
    source = open_source(f"visual_genome:{folder}/objects.json,{images}")
    assert source[1].image.getpixel((0, 0)) == (2, 0, 0)


def test_refusals(folder: Path) -> None:
    (folder / "broken.json").write_text("[{")
    for name, values in {"empty": [], "other": [{"image_id": 1, "attributes": []}], "object": {}}.items():
        write(folder / f"{name}.json", values)
    for spec, message in {
        f"{folder}/objects.json": "must name regions or objects, or both, and images",
        f"{folder}/broken.json,{folder}/images": "is not JSON",
        f"{folder}/empty.json,{folder}/images": "no list of images with 'regions' or 'objects'",
        f"{folder}/other.json,{folder}/images": "no list of images with 'regions' or 'objects'",
        f"{folder}/object.json,{folder}/images": "no list of images with 'regions' or 'objects'",
        f"{folder}/objects.json,{folder}": "none of the first 2 images",
        f"{folder}/objects.json,{folder}/images@val": "neither a folder nor a .zip",
    }.items():
        with pytest.raises(ConfigError, match=message):
            open_source(f"visual_genome:{spec}")


def test_entries_of_another_shape_are_bad_samples(folder: Path) -> None:
    write(folder / "objects.json", [{"image_id": 1, "objects": [7]}, {"image_id": 2, "objects": [{"names": ["a"]}]}])
    write(folder / "regions.json", [{"id": 3, "regions": [{"phrase": 7}]}, {"id": 1, "regions": "none"}])
    source = open_source(f"visual_genome:{folder}/regions.json,{folder}/objects.json,{folder}/images")
    reasons = []
    for index in range(len(source)):
        with pytest.raises(BadSampleError) as error:
            _ = source[index]
        reasons.append(error.value.reason.split(" (row")[0])
    assert reasons == [
        "caption is not text: int",
        "regions or objects are malformed: 'none' of image 1",
        "box is malformed: [None, None, None, None] is not four finite numbers",
    ]
