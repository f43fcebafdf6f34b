"""COCO's annotation files and Karpathy's splits."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from making import picture, write_zip

from cmapkd.config import ConfigError
from cmapkd.data.open import open_source
from cmapkd.data.types import BadSampleError, Box


def write(path: Path, **values: Any) -> Path:
    path.write_text(json.dumps(values))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for i in range(4):
        (tmp_path / "images" / f"{i}.png").write_bytes(picture(i))
    return tmp_path


IMAGES = [{"id": 10 + i, "file_name": f"{i}.png"} for i in range(3)]


def test_captions_and_instances(folder: Path) -> None:
    captions = [{"image_id": 10 + i, "id": 5 * i + k, "caption": f"{k} of {i}\n"} for k in range(5) for i in range(2)]
    write(folder / "captions.json", images=IMAGES, annotations=captions)
    boxes = [
        {"image_id": 11, "category_id": 2, "bbox": [1, 2.5, 3, 4], "iscrowd": 0, "area": 7.5},
        {"image_id": 11, "category_id": 2, "bbox": [0, 0, 8, 6], "iscrowd": 1},
        {"image_id": 12, "category_id": 1, "bbox": [1, 2]},
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    write(folder / "instances.json", images=IMAGES, annotations=boxes, categories=categories)
    source = open_source(f"coco:{folder}/captions.json,{folder}/instances.json,{folder}/images")
    assert len(source) == 3
    assert (source[1].id, source[1].captions) == ("11", tuple(f"{k} of 1" for k in range(5)))
    assert source[1].boxes == (Box(1, 2.5, 3, 4, "dog", area=7.5), Box(0, 0, 8, 6, "dog", crowd=True))
    assert source[1].image.getpixel((0, 0)) == (1, 0, 0)
    with pytest.raises(BadSampleError, match="box is malformed"):
        _ = source[2]
    only = open_source(f"coco:{folder}/captions.json,{folder}/images", split="val", require_captions=True)
    assert (len(only), only.num_without_caption) == (2, 1)


def test_bad_entries(folder: Path) -> None:
    images = [*IMAGES, {"id": 20, "file_name": "gone.png"}, {"id": 21, "file_name": "../captions.json"}]
    images += [{"id": 10, "file_name": "3.png"}, {"file_name": "3.png"}, {"id": 22}]
    annotations = [{"image_id": 12, "caption": None}, {"image_id": 11, "caption": 3}]
    path = write(folder / "captions.json", images=images, annotations=annotations)
    source = open_source(f"coco:{path},{folder}/images")
    found = {}
    for index in range(len(source)):
        try:
            _ = source[index]
        except BadSampleError as error:
            found[index] = error.reason
    assert found == {
        1: "caption is not text: int (row 1)",
        3: "image file is missing: gone.png",
        4: "image name is refused: ../captions.json points outside its folder",
        5: "duplicate id: the sample at position 0 has it already",
        6: "image entry is malformed: it has no id (row 6)",
        7: "image is not named (row 7)",
    }


KARPATHY = [
    {
        "filename": "0.png",
        "split": "train",
        "cocoid": 5,
        "filepath": "val2014",
        "sentences": [{"raw": "a"}, {"raw": "b"}],
    },
    {"filename": "1.png", "split": "restval", "cocoid": 6, "filepath": "val2014", "sentences": [{"raw": "c"}]},
    {"filename": "2.png", "split": "test", "cocoid": 7, "filepath": "val2014", "sentences": [{"raw": "d"}]},
    {"filename": "3.png", "split": "val", "imgid": 3, "sentences": [{"raw": "e"}]},
]


@pytest.mark.parametrize("zipped", [False, True])
def test_karpathy_splits(folder: Path, zipped: bool) -> None:
    path = write(folder / "dataset_coco.json", images=KARPATHY)
    images = folder / "images"
    if zipped:
        images = write_zip(folder / "i.zip", [(f"coco/val2014/{i}.png", picture(i)) for i in range(4)])
    train = open_source(f"coco:{path},{images}@train")
    assert [(s.id, s.captions) for s in (train[0], train[1])] == [("5", ("a", "b")), ("6", ("c",))]
    assert train[1].image.getpixel((0, 0)) == (1, 0, 0)
    assert len(open_source(f"coco:{path},{images}", split="test")) == 1
    assert open_source(f"coco:{path},{images}@dev?limit=1")[0].id == "3.png"
    assert train.fingerprint() != open_source(f"coco:{path},{images}@test").fingerprint()


def test_refusals(folder: Path) -> None:
    karpathy = write(folder / "dataset_coco.json", images=KARPATHY)
    plain = write(folder / "captions.json", images=IMAGES, annotations=[])
    other = write(folder / "other.json", things=[])
    lost = write(folder / "lost.json", images=IMAGES, annotations=[{"image_id": 99, "caption": "x"}])
    (folder / "broken.json").write_text("{")
    images = folder / "images"
    for spec, message in {
        f"{karpathy},{images}": "has the splits test, train, val: say which",
        f"{karpathy},{images}@tset": "no split 'tset' .did you mean 'test'",
        f"{plain},{images}@test": "has no splits",
        f"{karpathy},{plain},{images}@test": "stands alone",
        f"{plain}": "must name annotations and images",
        f"{plain},": "must name annotations and images",
        f"{other},{images}": "hold no list 'images'",
        f"{folder}/broken.json,{images}": "are not JSON",
        f"{lost},{images}": "belongs to no image",
        f"{folder}/captoins.json,{images}": "is not a file. .*did you mean 'captions.json'",
        f"{plain},{folder}": "none of the first 3 images",
        f"{plain},{folder}/imagse": "neither a folder nor a .zip",
    }.items():
        with pytest.raises(ConfigError, match=message):
            open_source(f"coco:{spec}")


def test_coco_mini(shared: Path, tmp_path: Path) -> None:
    with tarfile.open(shared / "coco_mini" / "dev-000000.tar") as archive:
        names = json.loads((shared / "coco_mini" / "captions_dev.json").read_text())["images"]
        for number, image in enumerate(names):
            data = archive.extractfile(f"{number:06}.jpg")
            assert data is not None
            (tmp_path / image["file_name"]).write_bytes(data.read())
    files = f"{shared}/coco_mini/captions_dev.json,{shared}/coco_mini/instances_dev.json"
    source = open_source(f"coco:{files},{tmp_path}", require_captions=True)
    tars = open_source(f"webdataset:{shared}/coco_mini/dev-000000.tar")
    assert len(source) == 39
    boxes = [box for i in range(39) for box in source[i].boxes]
    assert (len(boxes), sum(box.crowd for box in boxes)) == (312, 3)
    assert all(box.area is not None and box.area <= box.width * box.height * 1.02 for box in boxes)
    assert {source[i].id: source.captions(i) for i in range(39)} == {tars[i].id: tars.captions(i) for i in range(39)}


@pytest.mark.parametrize(
    ("name", "images", "boxes", "names", "size"),
    [("bccd", 87, 1137, {"RBC", "WBC", "Platelets"}, (640, 480)), ("raccoon", 29, 33, {"raccoon"}, (427, 256))],
)
def test_boxes_in_a_zip(
    shared: Path, name: str, images: int, boxes: int, names: set[str], size: tuple[int, int]
) -> None:
    source = open_source(f"coco:{shared}/{name}/instances_dev.json,{shared}/{name}/images_dev.zip")
    found = [box for index in range(len(source)) for box in source[index].boxes]
    assert (len(source), len(found), {box.name for box in found}) == (images, boxes, names)
    assert not any(box.crowd for box in found)
    assert source[0].image.size == size


def test_odd_boxes(folder: Path) -> None:
    for number, wrong in enumerate(({"bbox": [0, 0, -1, 2]}, {"bbox": [0, 0, 1, 2], "area": "big"})):
        annotations = [{"image_id": 10, "category_id": 1, **wrong}]
        path = write(folder / f"{number}.json", images=IMAGES, annotations=annotations, categories=[])
        with pytest.raises(BadSampleError, match=r"must not be negative|area big is not a number of square pixels"):
            _ = open_source(f"coco:{path},{folder}/images")[0]
