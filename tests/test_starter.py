"""A first recipe: data are found by their names, a student fits the budget, and the recipe runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cmapkd.config import ConfigError, load_config
from cmapkd.data.open import open_source
from cmapkd.run import RunConfig, run
from cmapkd.starter import Looked, choose_student, compose, look, weights_said, write_recipe
from cmapkd.starter.find import find_sources
from cmapkd.starter.student import LADDER, Measured


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


LAYOUTS: tuple[tuple[tuple[str, ...], dict[str, str]], ...] = (
    (("a.jpg", "a.txt"), {"train": "folder:."}),
    (("cat/a.jpg", "dog/b.png"), {"train": "folder:."}),
    (("train/cat/a.jpg", "valid/cat/b.jpg"), {"train": "folder:./train", "val": "folder:./valid"}),
    (("train/a.jpg", "val/b.jpg", "test/c.jpg"), {role: f"folder:./{role}" for role in ("train", "val", "test")}),
    (("a.jpg", "data.csv"), {"train": "csv:./data.csv"}),
    (("train.tsv", "dev.tsv", "images/a.jpg"), {"train": "csv:./train.tsv", "val": "csv:./dev.tsv"}),
    (("my_train.jsonl", "my_test.jsonl"), {"train": "jsonl:./my_train.jsonl", "test": "jsonl:./my_test.jsonl"}),
    (("metadata.jsonl", "a.jpg"), {"train": "folder:."}),
    (
        ("train-00.tar", "train-01.tar", "val-0.tar"),
        {"train": "webdataset:./train-0*.tar", "val": "webdataset:./val-0.tar"},
    ),
    (("train.zip", "dev.zip", "classes.json"), {"train": "folder:./train.zip", "val": "folder:./dev.zip"}),
    (("p0.parquet", "p1.parquet"), {"train": "parquet:./p*.parquet"}),
    (
        (
            "annotations/captions_train2017.json",
            "annotations/captions_val2017.json",
            "train2017/a.jpg",
            "val2017/b.jpg",
        ),
        {
            "train": "coco:./annotations/captions_train2017.json,./train2017",
            "val": "coco:./annotations/captions_val2017.json,./val2017",
        },
    ),
    (
        ("dataset_coco.json", "images/a.jpg"),
        {role: f"coco:./dataset_coco.json,./images@{role}" for role in ("train", "val", "test")},
    ),
)


@pytest.mark.parametrize(("names", "expected"), LAYOUTS, ids=str)
def test_data_are_found_by_their_names(names: tuple[str, ...], expected: dict[str, str], tmp_path: Path) -> None:
    found = find_sources(touch(tmp_path, *names))
    assert {role: source.replace(str(tmp_path), ".") for role, source in found.items()} == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "holds nothing that cmapkd reads"),
        (("notes.md",), "holds nothing that cmapkd reads"),
        (("a.csv", "b.csv"), "a.csv, b.csv, and no name says which is for training"),
        (("train_1.csv", "train_2.csv"), "several csv files for train"),
        (("2014_train.tar", "2017_train.tar", "2017_val.tar"), "no pattern of names has them without 2017_val.tar"),
    ],
    ids=str,
)
def test_what_cannot_be_told_is_asked(names: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        find_sources(touch(tmp_path, *names))


def test_a_file_names_its_kind(tmp_path: Path) -> None:
    touch(tmp_path, "x.csv", "x.docx")
    assert find_sources(tmp_path / "x.csv") == {"train": f"csv:{tmp_path}/x.csv"}
    with pytest.raises(ConfigError, match="no kind of file that cmapkd reads"):
        find_sources(tmp_path / "x.docx")
    with pytest.raises(ConfigError, match="there is no file or folder"):
        find_sources(tmp_path / "y.csv")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two class folders of twenty pictures each."""
    root = tmp_path_factory.mktemp("photographs")
    for number in range(40):
        place = root / ("cat", "dog")[number % 2]
        place.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), (6 * number, 99, 200 * (number % 2))).save(place / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def smallest() -> Measured:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("cmapkd.starter.student.LADDER", LADDER[:1])
        return choose_student(max_mb=25, max_ms=None)


def test_the_student_fits_what_is_allowed(smallest: Measured) -> None:
    assert smallest.student == LADDER[0]
    assert 0 < smallest.megabytes <= 25
    assert smallest.image_ms > 0
    assert smallest.text_ms > 0
    assert smallest.threads >= 1


def test_budgets_that_nothing_fits_say_what_the_smallest_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmapkd.starter.student.LADDER", LADDER[:1])
    with pytest.raises(ConfigError, match=r"the smallest student .* MB of weights, more than --max-mb 1:"):
        choose_student(max_mb=1, max_ms=None)
    with pytest.raises(ConfigError, match=r"ms for a picture here, more than --max-ms 1e-06"):
        choose_student(max_mb=100, max_ms=1e-6)


def test_classes_without_captions_and_validation_data(photographs: Path) -> None:
    looked = look(photographs)
    assert looked.classes == ("cat", "dog")
    assert not looked.captioned
    assert [*looked.sources] == ["train", "val"]
    opened = {role: open_source(source, require_captions=True) for role, source in looked.sources.items()}
    assert looked.samples == len(opened["train"])
    assert sum(map(len, opened.values())) == 40
    assert opened["val"].captions(0)[0] in ("a photo of a cat.", "a photo of a dog.")
    assert any("no captions" in remark for remark in looked.remarks)
    assert any("no validation data" in remark for remark in looked.remarks)


def test_pictures_that_cannot_be_read_are_counted(photographs: Path, tmp_path: Path) -> None:
    shutil.copytree(photographs, tmp_path / "photographs")
    first = next(path for path in sorted((tmp_path / "photographs").rglob("*")) if path.is_file())
    first.write_bytes(b"no picture")
    remarks = look(tmp_path / "photographs").remarks
    assert any("1 of 40 samples that were looked at cannot be read" in each for each in remarks)


def test_pictures_that_say_nothing_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="neither captions nor several class folders"):
        look(tmp_path)
    (tmp_path / "Images").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "Images" / "a.png")
    with pytest.raises(ConfigError, match="neither captions nor several class folders"):
        look(tmp_path)


@pytest.mark.parametrize("teacher", ["tiny:scenes-teacher", None])
def test_the_recipe_is_one_and_runs(
    photographs: Path, smallest: Measured, teacher: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = compose(look(photographs), smallest, teacher=teacher, command="cmapkd init")
    path = tmp_path / "recipe.yaml"
    write_recipe(path, text)
    config = load_config(RunConfig, path)
    assert config.method.name == ("contrastive" if teacher is None else "hinton")
    assert teacher is None or config.method.reads_classes  # which is what README and docs/choose_method.md advise
    assert config.student.name == smallest.student["name"]
    assert f"{smallest.megabytes:.1f} MB of weights" in text
    assert all(len(line) <= 150 for line in text.splitlines())
    with pytest.raises(ConfigError, match="exists, and init overwrites nothing"):
        write_recipe(path, text)
    assert path.read_text(encoding="utf-8") == text
    if teacher is not None:
        short = ["training.epochs=null", "training.steps=1", "training.device=cpu", "training.batch_size=4"]
        result = run(load_config(RunConfig, path, [*short, "baseline=none"]), out=tmp_path / "run")
        assert "zero_shot" in result.metrics["student"]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Sixteen pictures in a table with odd names of columns; four have no caption."""
    rows = ["bild;worte"]
    for number in range(16):
        Image.new("RGB", (20, 20), (9 * number, 9, 9)).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png;{'' if number % 4 == 3 else f'a picture of {number}'}")
    (tmp_path / "odd.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return tmp_path / "odd.csv"


def test_a_source_with_its_options_is_looked_at(table: Path) -> None:
    with pytest.raises(ConfigError, match=rf"Name the columns in the source, csv:{table}\?csv_img_key="):
        look(table)
    source = f"csv:{table}?csv_img_key=bild&csv_caption_key=worte&separator=semicolon"
    looked = look(source)
    assert looked.sources == {"train": f"{source}&part=0-0.9", "val": f"{source}&part=0.9-1"}
    assert looked.captioned
    assert [remark for remark in looked.remarks if "without a caption" in remark]
    opened = open_source(looked.sources["train"], require_captions=True)
    assert looked.samples == len(opened) < 13
    with pytest.raises(ConfigError, match=r"no kind of data 'cvs'.*did you mean 'csv"):
        look(f"cvs:{table}")


def test_a_source_with_splits_is_read_by_its_role() -> None:
    looked = look("scenes?length=20")
    assert looked.sources == {"train": "scenes?length=20", "val": "scenes?length=20"}


def test_a_file_without_splits_is_not_measured_on_itself(tmp_path: Path) -> None:
    for number in range(20):
        Image.new("RGB", (20, 20), (9 * number, 9, 9)).save(tmp_path / f"{number}.jpg")
    rows = [f"{number}.jpg,a picture of {number}" for number in range(20)]
    (tmp_path / "captions.txt").write_text("image,caption\n" + "\n".join(rows) + "\n", encoding="utf-8")
    source = f"flickr30k:{tmp_path}/captions.txt,{tmp_path}"
    assert look(source).sources == {"train": f"{source}?part=0-0.9", "val": f"{source}?part=0.9-1"}


def test_it_is_said_where_the_weights_of_a_teacher_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    cached: list[tuple[str, ...]] = []

    def cached_folder(repository: str, files: Any) -> Path | None:
        cached.append((repository, *files))
        return tmp_path if repository == "here/here" else None

    monkeypatch.setattr("cmapkd.starter.weights.cached_folder", cached_folder)
    assert "are not on this machine; doctor or distill downloads" in str(weights_said("open_clip:ViT-B-32/openai"))
    assert cached[0][0].count("/") == 1  # asked by the name of its repository
    assert "are not on this machine" in str(weights_said("hf:not/here"))
    for name in ("hf:here/here", str(tmp_path), "tiny:scenes-teacher"):
        assert str(weights_said(name)).endswith("are on this machine")
    for name in ("open_clip:ViT-B-32", "open_clip:no-such/model", "timm:x"):
        assert weights_said(name) is None
    (tmp_path / ".cache" / "clip").mkdir(parents=True)
    (tmp_path / ".cache" / "clip" / "w.pt").touch()
    entry = {"url": "https://example.org/w.pt"}
    monkeypatch.setattr("open_clip.get_pretrained_cfg", lambda *_: entry)
    assert str(weights_said("open_clip:ViT-B-32/openai")).endswith("are on this machine")


def test_pictures_with_captions_of_their_own_get_a_method_that_reads_them(smallest: Measured) -> None:
    looked = Looked({"train": "csv:a.csv", "val": "csv:b.csv"}, 40, ("cat", "dog"), True, ())
    assert "\nmethod: clip_kd\n" in compose(looked, smallest, teacher="tiny:scenes-teacher", command="cmapkd init")


def test_the_command_writes_beside_nothing(tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from cmapkd.cli import main

    def call(*arguments: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["cmapkd", "init", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cmapkd.starter.student.LADDER", LADDER[:1])
    assert not call(str(photographs), "--out", "mine.yaml", "--teacher", "none", "--max-mb", "25")
    written = Path("mine.yaml").read_text(encoding="utf-8")
    assert written.startswith(f"# Written by: cmapkd init {photographs} --max-mb 25 --teacher none\n")
    assert call(str(photographs), "--out", "mine.yaml") == 2
    assert Path("mine.yaml").read_text(encoding="utf-8") == written
    assert call(str(photographs), "--out", "nowhere/mine.yaml", "--max-mb", "25") == 2
    assert not Path("nowhere").exists()
