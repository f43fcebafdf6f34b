"""A resume goes on with the same data and teacher wherever they are now, and with nothing else."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1] / "families"))

from family_support import FAMILIES, SHORT

import cmapkd
from cmapkd.cache.identity import weight_hash
from cmapkd.config import ConfigError
from cmapkd.models import ModelConfig, build_model, build_teacher, load_model
from cmapkd.run import RunConfig, run
from cmapkd.run.contents import _model, check_contents, may_have_moved
from cmapkd.training.checkpoint import list_checkpoints, read_progress

COLOURS = ("red", "green", "blue", "white")


def write_data(folder: Path, *, name: str = "train.csv", number: int = 24, first: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    with (folder / name).open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        for place in range(first, first + number):
            colour = COLOURS[place % 4]
            Image.new("RGB", (20 + place, 20), colour).save(folder / f"{place}.png")
            rows.writerow([f"{place}.png", f"picture {place} is {colour}"])


def settings(**data: Any) -> dict[str, Any]:
    return {
        "teacher": "teacher",
        "student": {"name": "tiny:debug", "options": {"embed_dim": 16}},
        "data": {"train": "csv:data/train.csv", "val": "csv:data/val.csv", **data},
        "method": "clip_kd",
        "training": {"steps": 2, "batch_size": 8, "log_every": 1, "device": "cpu"},
        "optim": {"warmup_steps": 1},
    }


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with data, two teachers and a run that names them by relative paths."""
    place = tmp_path_factory.mktemp("begun")
    write_data(place / "data")
    write_data(place / "data", name="val.csv", number=6, first=100)
    for seed, name in enumerate(("teacher", "other")):
        torch.manual_seed(seed)
        build_model("tiny:debug", captions=["picture 1 is red"] * 9).save(place / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        cmapkd.distill(**settings(), out="run", quiet=True)
    return place


@pytest.fixture
def here(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the working folder."""
    shutil.copytree(begun, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def resume(**changes: Any) -> dict[str, Any]:
    return cmapkd.distill(**settings() | changes, out="run", quiet=True, resume=True).metrics


def test_the_same_contents_under_other_paths_go_on(here: Path, tmp_path: Path) -> None:
    before = json.loads((here / "run" / "metrics.json").read_text())
    shutil.move(here / "data", tmp_path / "moved")
    shutil.move(here / "teacher", tmp_path / "taught")
    data = {"train": f"csv:{tmp_path}/moved/train.csv", "val": f"csv:{tmp_path}/moved/val.csv"}
    again = resume(data=data, teacher=str(tmp_path / "taught"))
    assert again["student"]["retrieval"] == before["student"]["retrieval"]
    assert again["teacher"]["retrieval"] == before["teacher"]["retrieval"]


def test_the_same_contents_on_the_way(here: Path, tmp_path: Path) -> None:
    """A checkpoint of a moved run names where its data are now."""
    shutil.move(here / "data", tmp_path / "moved")
    data = {"train": f"csv:{tmp_path}/moved/train.csv", "val": f"csv:{tmp_path}/moved/val.csv"}
    values = settings() | {"data": data}
    cmapkd.distill(**values, out="run", quiet=True, extend_to=3)
    progress = read_progress(here / "run" / "checkpoints")
    assert progress is not None
    assert progress.contents["data.train"]["at"] == data["train"]
    cmapkd.distill(**values, out="run", quiet=True, extend_to=4)


def shuffle(here: Path) -> None:
    rows = [*csv.reader((here / "data" / "train.csv").read_text().splitlines())]
    captions = [row[1] for row in rows[1:]]
    with (here / "data" / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [rows[0], *([row[0], said] for row, said in zip(rows[1:], captions[::-1], strict=True))]
        )


def remove_rows(here: Path) -> None:
    lines = (here / "data" / "train.csv").read_text().splitlines()
    (here / "data" / "train.csv").write_text("\n".join(lines[:-5]) + "\n")


def swap_teachers(here: Path) -> None:
    shutil.rmtree(here / "teacher")
    shutil.copytree(here / "other", here / "teacher")


def other_validation(here: Path) -> None:
    lines = (here / "data" / "val.csv").read_text().splitlines()
    (here / "data" / "val.csv").write_text("\n".join(lines[:-1]) + "\n")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (shuffle, r"data.train: it was 'csv:data/train.csv' with 24 samples, fingerprint \w+; now it is .* 24 samples"),
        (remove_rows, r"data.train: it was 'csv:data/train.csv' with 24 samples, .*; now it is .* with 19 samples"),
        (
            swap_teachers,
            r"teacher.weights: it was 'teacher' with [\d,]+ parameters, fingerprint .*; now it is 'teacher'",
        ),
        (other_validation, r"data.val: it was 'csv:data/val.csv' with 6 samples, .*; now .* with 5 samples"),
    ],
)
def test_other_contents_under_the_same_path_are_refused(change: Any, words: str, here: Path) -> None:
    before = {path: path.read_bytes() for path in (here / "run").rglob("*") if path.is_file()}
    change(here)
    with pytest.raises(ConfigError, match=words):
        resume()
    assert {path: path.read_bytes() for path in (here / "run").rglob("*") if path.is_file()} == before


def test_other_contents_under_another_path_are_refused(here: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher.weights: it was 'teacher' with .*; now it is 'other' with "):
        resume(teacher="other")
    with pytest.raises(ConfigError, match=r"data.train: it was 'csv:data/train.csv'.*now it is 'csv:data/val.csv'"):
        resume(data={"train": "csv:data/val.csv", "val": "csv:data/val.csv"}, training={**settings()["training"]})


def forget_contents(run: Path) -> None:
    """Makes the checkpoints those of a version that kept no fingerprints."""
    from cmapkd.training.checkpoint import checksum

    for path in list_checkpoints(run / "checkpoints"):
        progress = json.loads((path / "progress.json").read_text())
        for key in ("contents", "total", "extended"):
            progress.pop(key, None)
        (path / "progress.json").write_text(json.dumps(progress))
        checksums = json.loads((path / "checksums.json").read_text())
        checksums["progress.json"] = checksum(path / "progress.json")
        (path / "checksums.json").write_text(json.dumps(checksums))


def test_a_checkpoint_without_fingerprints_goes_on_and_says_so(here: Path) -> None:
    forget_contents(here / "run")
    console = Console(record=True, width=300, quiet=False, file=io.StringIO())
    run(RunConfig.from_mapping(settings()), out=here / "run", resume=True, console=console)
    assert "kept no fingerprints: whether data and teacher are those" in console.export_text()
    forget_contents(here / "run")
    with pytest.raises(ConfigError, match=r"other settings: teacher.name \(was 'teacher', now 'other'\)"):
        resume(teacher="other")  # nothing to compare with
    cmapkd.distill(**settings(), out="run", quiet=True, extend_to=3)  # its length is that of its last step
    assert json.loads((here / "run" / "metrics.json").read_text())["steps"] == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_every_family_are_known_by_what_they_hold(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family].make(tmp_path / "made", SHORT)
    model.save(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, second = load_model(tmp_path / "a"), load_model(tmp_path / "b")
    assert first.random_towers == ()  # they were read
    here, there = (
        _model("teacher", ModelConfig(name=str(tmp_path / name)), each, weights=True)
        for name, each in (("a", first), ("b", second))
    )
    check_contents(here, there, where=tmp_path)
    with torch.no_grad():
        next(second.parameters()).view(-1)[0] += 1
    other = _model("teacher", ModelConfig(name=str(tmp_path / "b")), second, weights=True)
    with pytest.raises(ConfigError, match=r"teacher\.weights: it was"):
        check_contents(here, other, where=tmp_path)


def test_a_model_by_another_name_has_not_moved(tmp_path: Path) -> None:
    stored = {"teacher.weights": {"at": "", "holds": ""}}
    assert may_have_moved("teacher.name", "gone", str(tmp_path), stored)
    assert may_have_moved("teacher.checkpoint", "gone.pt", "here.pt", stored)
    assert not may_have_moved(
        "teacher.name", "open_clip:ViT-B-32/openai", "open_clip:ViT-B-32-quickgelu/openai", stored
    )
    assert not may_have_moved("teacher.name", "hf:gone", f"open_clip:{tmp_path}", stored)
    assert not may_have_moved("student.name", "gone", str(tmp_path), stored)
    assert not may_have_moved("data.test", None, "csv:a.csv", {"data.test": {"at": "", "holds": ""}})


def test_a_teacher_with_random_parts_is_the_same_at_every_start(here: Path) -> None:
    teacher = {"name": "timm:test_vit", "options": {"text_width": 16, "text_heads": 2, "text_layers": 1}}
    values = settings() | {"teacher": teacher}
    cmapkd.distill(**values, out="random", quiet=True)
    torch.manual_seed(99)
    again = cmapkd.distill(**values, out="random", quiet=True, resume=True).metrics
    assert (
        again["teacher"]["retrieval"]
        == json.loads((here / "random" / "metrics.json").read_text())["teacher"]["retrieval"]
    )
    before = torch.get_rng_state()
    first, other = (build_teacher(ModelConfig(**teacher), role) for role in ("teacher", "other"))
    assert torch.equal(torch.get_rng_state(), before)
    assert weight_hash(first) != weight_hash(other)


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ("csv:a.csv", "csv:b.csv", True),
        ("csv:a.csv", "csv:a.csv?csv_caption_key=other", False),
        ("csv:a.csv?csv_caption_key=one", "csv:b.csv?csv_caption_key=two", False),
        ("csv:a.csv?separator=comma", "csv:a.csv?separator=tab", False),
        ("csv:a.csv?texts=one", "csv:a.csv?texts=two", False),
        ("csv:a.csv?images=gone", "csv:a.csv?images=.", True),
        ("csv:a.csv?images=gone", "csv:a.csv?images=nowhere", False),
        ("parquet:a.parquet?caption=one", "parquet:a.parquet?caption=two", False),
        ("hf:some/set", "hf:some/set?image=other", False),
        ("folder:a?captions=a {}", "folder:a?captions=one {}", False),
        ("folder:a?part=0-0.9", "folder:a?part=0-0.8", False),
        ("folder:a?limit=10", "folder:b?limit=10", True),
        ("imagenet:a?classes=all", "imagenet:a?classes=present", False),
        ("coco:a.json,i@train", "coco:a.json,i@test", False),
        ("csv:a.csv", "jsonl:a.csv", False),
    ],
)
@pytest.mark.parametrize("key", ["data.train", "data.held_out", "data.more.a.source"])
def test_data_that_are_read_otherwise_have_not_moved(before: str, now: str, same: bool, key: str) -> None:
    stored = {key.removesuffix(".source"): {"at": "", "holds": ""}}
    assert may_have_moved(key, before, now, stored) is same


def test_other_captions_of_the_same_file_are_refused(here: Path) -> None:
    with pytest.raises(ConfigError, match=r"other settings: data.train \(was 'csv:data/train.csv', now .*=image'\)"):
        resume(data={"train": "csv:data/train.csv?csv_caption_key=image", "val": "csv:data/val.csv"})


def test_another_order_of_the_samples_is_refused_wherever_it_comes_from(tmp_path: Path) -> None:
    """`auto` takes another order where data have moved; then the former one may be named, and no other."""
    stored = {"data.order": {"at": "auto", "holds": "the order global"}}
    assert may_have_moved("data.order", "auto", "global", stored)
    assert not may_have_moved("data.order", "auto", "global", {})  # what it was is not known
    check_contents(stored, {"data.order": {"at": "global", "holds": "the order global"}}, where=tmp_path)
    now = {"data.order": {"at": "auto", "holds": "the order windows of 16 shards in 8 lanes"}}
    with pytest.raises(
        ConfigError, match=r"data\.order: it was 'auto' with the order global; now it is 'auto' with the"
    ):
        check_contents(stored, now, where=tmp_path)
