"""The forms in which captions of Flickr30k and Flickr8k are handed out."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from making import picture, write_lines

from cmapkd.config import ConfigError
from cmapkd.data.open import open_source
from cmapkd.data.types import BadSampleError, Source

KARPATHY = {
    "images": [
        {"filename": f"{i}.jpg", "split": split, "imgid": i, "sentences": [{"raw": f"{k} of {i}"} for k in range(5)]}
        for i, split in enumerate(("train", "val", "test"))
    ]
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(picture(i))
    return tmp_path


def listing(source: Source) -> dict[str, tuple[str, ...]]:
    return {source[i].id: source[i].captions for i in range(len(source))}


def test_karpathy(folder: Path) -> None:
    (folder / "dataset_flickr30k.json").write_text(json.dumps(KARPATHY))
    source = open_source(f"flickr30k:{folder}/dataset_flickr30k.json,{folder}/images@test")
    assert listing(source) == {"2.jpg": tuple(f"{k} of 2" for k in range(5))}
    assert source.name == f"flickr30k:{folder}/dataset_flickr30k.json,{folder}/images@test"
    with pytest.raises(ConfigError, match="splits of its own"):
        open_source(f"flickr30k:{folder}/dataset_flickr30k.json,{folder}/images@test?split_file=x")


def test_annotations_csv_with_splits(folder: Path) -> None:
    with (folder / "flickr_annotations_30k.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["raw", "sentids", "split", "filename", "img_id"])
        for i, split in enumerate(("train", "test", "test")):
            table.writerow([json.dumps([f'"{k}", of {i}' for k in range(5)]), "[0]", split, f"{i}.jpg", i])
        table.writerow(["not json", "[0]", "test", "0.jpg", 3])
    name = f"flickr30k:{folder}/flickr_annotations_30k.csv,{folder}/images"
    source = open_source(f"{name}@test")
    assert source.name == f"{name}@test"
    assert len(source) == 3
    assert source[0].captions == tuple(f'"{k}", of 1' for k in range(5))
    with pytest.raises(BadSampleError, match=r"captions are no JSON list: 'not json' .row 5"):
        _ = source[2]
    assert len(open_source(name, split="train")) == 2  # a row without captions has no split: bad in each
    with pytest.raises(ConfigError, match=r"has no split 'val'.*It has: test, train"):
        open_source(f"{name}@val")
    assert source.fingerprint() != open_source(f"{name}@train").fingerprint()


PIPES = [
    "image_name| comment_number| comment",
    "0.jpg| 0| Two dogs , one | bar .",
    "0.jpg| 1| A dog .",
    "1.jpg| 0| A cat .",
    "1.jpg| 4   A dog runs across the grass .",  # as in the file on Kaggle
    "2.jpg no bars",
]


def test_results_csv_with_bars(folder: Path) -> None:
    path = write_lines(folder / "results.csv", PIPES)
    source = open_source(f"flickr30k:{path},{folder}/images", split="val")
    assert (source[0].id, source[0].captions) == ("0.jpg", ("Two dogs , one | bar .", "A dog ."))
    assert source[1].captions == ("A cat .", "A dog runs across the grass .")
    with pytest.raises(BadSampleError, match=r"line is malformed: '2\.jpg no bars'"):
        _ = source[2]


def test_token_file_and_lists_of_a_split(folder: Path) -> None:
    path = write_lines(
        folder / "results_20130124.token", [f"{i}.jpg#{k}\t{k} of {i}" for i in range(3) for k in range(5)]
    )
    everything = open_source(f"flickr30k:{path},{folder}/images")
    assert [len(captions) for captions in listing(everything).values()] == [5, 5, 5]
    some = write_lines(folder / "test.txt", ["2", "", "0.jpg"])
    source = open_source(f"flickr30k:{path},{folder}/images?split_file={some}")
    assert list(listing(source)) == ["0.jpg", "2.jpg"]
    assert source.fingerprint() != everything.fingerprint()
    wrong = write_lines(folder / "wrong.txt", ["2", "77"])
    with pytest.raises(ConfigError, match=r"names 1 of 2 images that .* has no captions of, such as '77'"):
        open_source(f"flickr30k:{path},{folder}/images?split_file={wrong}")


def test_captions_txt(folder: Path) -> None:
    path = write_lines(folder / "captions.txt", ["image,caption", '0.jpg,"One, two"', "0.jpg,Three", "1.jpg,a,b"])
    source = open_source(f"flickr30k:{path},{folder}/images")
    assert source[0].captions == ("One, two", "Three")
    with pytest.raises(BadSampleError, match="3 fields, not two"):
        _ = source[1]


def test_refusals(folder: Path) -> None:
    path = write_lines(folder / "results.csv", PIPES)
    other = write_lines(folder / "other.csv", ["a;b", "1;2"])
    for spec, message in {
        f"{path}": "must name captions and images",
        f"{path},": "must name captions and images",
        f"{other},{folder}/images": "begin with 'a;b', which is none of the known forms",
        f"{path},{folder}/images@test": "has no splits, so '@test' cannot be read from it: add .split_file",
        f"{path},{folder}/image": "neither a folder nor a .zip. .*did you mean 'images'",
        f"{folder}/result.csv,{folder}/images": "is not a file. .*did you mean 'results.csv'",
        f"{path},{folder}": "none of the first 2 images",
    }.items():
        with pytest.raises(ConfigError, match=message):
            open_source(f"flickr30k:{spec}")
