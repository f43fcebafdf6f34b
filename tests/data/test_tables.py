"""CSV, JSON lines, parquet and hub folders."""

from __future__ import annotations

import math
import pickle
import shutil
import warnings
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet
import pytest
import torch
from making import as_json, picture, write_lines

from cmapkd.config import ConfigError
from cmapkd.data.open import SourceWarning, open_source
from cmapkd.data.records import iter_captions
from cmapkd.data.stored import Texts
from cmapkd.data.types import BadSampleError, Source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with images 0.png to 3.png, of red 0 to 3."""
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    return tmp_path


def reason(source: Source, index: int) -> str:
    with pytest.raises(BadSampleError) as caught:
        _ = source[index]
    return caught.value.reason


def test_open_clip_csv_groups_five_captions(folder: Path) -> None:
    rows = [f"{i}.png\tcaption {k} of {i}" for k in range(5) for i in range(3)]
    write_lines(folder / "t.csv", ["filepath\ttitle", *rows])
    source = open_source(f"csv:{folder}/t.csv")
    assert isinstance(source, Source)
    assert [source[i].id for i in range(len(source))] == ["0.png", "1.png", "2.png"]
    assert source[1].captions == tuple(f"caption {k} of 1" for k in range(5)) == source.captions(1)
    assert source[2].image.getpixel((0, 0)) == (2, 0, 0)
    assert len(list(iter_captions(source))) == 15


def test_comma_quotes_and_byte_order_mark(folder: Path) -> None:
    write_lines(folder / "t.csv", ["\ufefffilepath,title", '0.png,"a, b ""c""\nd"', "1.png,plain"])
    source = open_source(f"csv:{folder}/t.csv")
    assert source[0].captions == ('a, b "c"\nd',)
    assert source[1].captions == ("plain",)


def test_named_columns_separator_and_lone_quotes(folder: Path) -> None:
    write_lines(folder / "t.csv", ["pic;words;label", '0.png;"lone quote;cat', "1.png;x;dog", "2.png;y;cat"])
    source = open_source(f"csv:{folder}/t.csv?csv_img_key=pic&csv_caption_key=words&separator=semicolon&quotes=no")
    assert source[0].captions == ('"lone quote',)
    assert source.class_names == ("cat", "dog")
    assert [source[i].label for i in range(3)] == [0, 1, 0]


@pytest.mark.parametrize("header", ["picture;description", "Photo,Alt_Text", "image_name\tTitle", "filename|text"])
def test_usual_names_of_columns_are_found(folder: Path, header: str) -> None:
    separator = next(mark for mark in "\t,;|" if mark in header)
    write_lines(folder / "t.csv", [header, f"0.png{separator}a red cat"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SourceWarning)
        source = open_source(f"csv:{folder}/t.csv")
    assert source[0].captions == ("a red cat",)


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        ("filepath\ttitle", "?csv_img_key=filepat", "no column 'filepat' .did you mean 'filepath'"),
        ("filepath\ttitle", "?separator=comma", "no column of images"),
        ("filepath\tother", "", "no column of captions"),
        ("filepath\ttitle", "?separator=ab", "one character"),
        ("filepath\ttitle", "?quotes=maybe", "yes or no"),
        ("filepath\ttitle", "?seperator=tab", "unknown option 'seperator' .did you mean 'separator'"),
        ("", "", "is empty"),
    ],
)
def test_csv_that_cannot_be_read(folder: Path, header: str, options: str, message: str) -> None:
    write_lines(folder / "t.csv", [header, "0.png\tx"])
    with pytest.raises(ConfigError, match=message):
        open_source(f"csv:{folder}/t.csv{options}")


def test_bad_rows_are_alone_in_it(folder: Path) -> None:
    (folder / "pipe.png").mkdir()
    rows = ["filepath\ttitle", "0.png\tgood", b"1.png\tcaf\xe9", "2.png", "\tno image", "gone.png\tx", "pipe.png\tx"]
    rows += ["https://example.org/a.png\tx", b"\xff.png\tx", "a\0.png\tx", "3.png\tgood too \ufffd é"]
    source = open_source(f"csv:{write_lines(folder / 't.csv', rows)}")
    assert source[0].captions == ("good",)
    assert [reason(source, i) for i in range(1, 9)] == [
        "caption is not UTF-8: byte 0xe9 at character 3 (row 2)",
        "row is malformed: 1 fields where the header has 2 (row 3)",
        "image is not named (row 4)",
        "image file is missing: gone.png",
        "image file is not a regular file: pipe.png",
        "image is a URL, which is not fetched: download the images first",
        "image name is not UTF-8: byte 0xff at character 0 (row 8)",
        "image file is missing: a\0.png",
    ]
    assert source[9].captions == ("good too \ufffd é",)


def test_one_bad_caption_makes_its_sample_bad(folder: Path) -> None:
    write_lines(folder / "t.csv", ["filepath\ttitle", "0.png\tgood", b"0.png\t\xff", "1.png\tgood"])
    source = open_source(f"csv:{folder}/t.csv", require_captions=True)
    assert len(source) == 2
    assert "not UTF-8" in reason(source, 0)
    with pytest.raises(BadSampleError):
        source.captions(0)
    assert list(iter_captions(source)) == ["good"]


def test_paths_may_leave_the_folder_of_a_table_that_the_user_wrote(folder: Path) -> None:
    (folder / "lists").mkdir()
    lines = ["filepath\ttitle", "../0.png\tx", f"{folder}/1.png\ty"]
    write_lines(folder / "lists" / "t.csv", lines)
    source = open_source(f"csv:{folder}/lists/t.csv")
    assert [source[i].image.getpixel((0, 0))[0] for i in range(2)] == [0, 1]
    write_lines(folder / "lists" / "u.csv", ["filepath\ttitle", "2.png\tz"])
    assert open_source(f"csv:{folder}/lists/u.csv?images={folder}")[0].image.getpixel((0, 0)) == (2, 0, 0)


def test_no_image_is_there(folder: Path) -> None:
    write_lines(folder / "t.csv", ["filepath\ttitle", "images/0.png\tx"])
    with pytest.raises(ConfigError, match=r"none of the first 1 images .* 'images/0.png': check the folder") as no:
        open_source(f"csv:{folder}/t.csv")
    assert f"names start at '{folder}'" in str(no.value)


def test_jsonl(folder: Path) -> None:
    lines = [
        as_json(id="a", image="0.png", captions=["x", "y"]),
        as_json(id=7, file_name="1.png", caption="z", label=3),
        as_json(filepath="2.png", text="one"),
        as_json(filepath="2.png", text="two"),
        b"",
        b"{broken",
        b'{"image": "3.png", "caption": "caf\xe9"}',
        as_json(image="3.png", id="a", caption="same id, other image"),
        as_json(image="3.png", question="Is it?", answer="no"),
        as_json(image=4, caption="x"),
        as_json(image="1.png", id="l", caption="x", label=[1]),
    ]
    source = open_source(f"jsonl:{write_lines(folder / 't.jsonl', lines)}")
    assert [(source[i].id, source[i].captions) for i in range(3)] == [
        ("a", ("x", "y")),
        ("7", ("z",)),
        ("2.png", ("one", "two")),
    ]
    assert source[1].label == 3
    assert reason(source, 3).startswith("row is malformed")
    assert reason(source, 4).startswith("row is not UTF-8: byte 0xe9")
    assert reason(source, 5) == "duplicate id: the sample at position 0 has it already"
    assert source[6].questions[0].kind == "yes/no"
    assert reason(source, 7) == "image is not named (row 10)"
    assert reason(source, 8) == "label is not a class number: '[1]' (row 11)"
    assert len(open_source(f"jsonl:{folder}/t.jsonl?limit=3", require_captions=True)) == 3


def test_a_missing_value_of_a_table_is_no_answer(folder: Path) -> None:
    lines = [
        as_json(image="0.png", question="what?", answer=math.nan),
        as_json(image="1.png", question="what?", answers=["red", math.nan]),
        as_json(image="2.png", question="what?", answer={"text": "red"}),
    ]
    source = open_source(f"jsonl:{write_lines(folder / 'nan.jsonl', lines)}")
    assert [source[index].questions[0].answers for index in range(2)] == [(), ("red",)]
    assert reason(source, 2).startswith("answer is not text: \"{'text': 'red'}\"")


def test_questions_in_lists_and_what_is_wrong_with_them(folder: Path) -> None:
    lines = [
        as_json(image="0.png", questions=["what?", "how many?"], answers=["red", ["2", "two"]]),
        as_json(image="1.png", questions=[{"question": "what?", "answer": "red"}, ["why?", "so"]]),
        as_json(image="2.png", caption="no question", question=math.nan),
        as_json(image="3.png", question=7, answer="x"),
        as_json(image="0.png", id="short", questions=["what?", "why?"], answers=["red"]),
        as_json(image="0.png", id="none", questions=["what?"]),
        as_json(image="0.png", id="text", questions="what?", answers="red"),
        as_json(image="0.png", id="json", questions='["what?", "why?"]', answers='["red", "so"]'),
        as_json(image="0.png", id="null", question="what?", answers=["x", None]),
        as_json(image="0.png", id="whose", question="a?", questions=["b?", "c?"], answers=["x", "y"]),
        as_json(image="0.png", id="two", qa=[["a?", "x"]], questions=["b?"], answers=["y"]),
        as_json(image="0.png", id="beside", questions=[{"question": "a?"}], answers=["x"]),
        as_json(image="0.png", id="no question", questions=[], answers=["x"]),
    ]
    source = open_source(f"jsonl:{write_lines(folder / 'lists.jsonl', lines)}")
    found = [[(asked.question, asked.answers) for asked in source[index].questions] for index in range(3)]
    assert found[0] == [("what?", ("red",)), ("how many?", ("2", "two"))]
    assert found[1:] == [[("what?", ("red",)), ("why?", ("so",))], []]
    assert reason(source, 3) == "question is not text: '7' (row 4)"
    assert reason(source, 4) == "questions has 2 questions as text, but beside them: 1 answers (row 5)"
    assert reason(source, 5) == "questions has 1 questions as text, but beside them: no list of answers (row 6)"
    assert reason(source, 6) == "questions is not a list of questions and answers: str (row 7)"
    assert [(asked.question, asked.answers) for asked in source[7].questions] == [
        ("what?", ("red",)),
        ("why?", ("so",)),
    ]
    assert source[8].questions[0].answers == ("x",)
    assert reason(source, 9).startswith("answers could be those of question or of questions")
    assert reason(source, 10).startswith("there are qa and questions")
    assert reason(source, 11).startswith("answers stand beside questions, whose entries have their own")
    assert reason(source, 12).startswith("answers stand beside questions")


def test_questions_of_a_csv(folder: Path) -> None:
    text = 'Image,Question,Answers\n0.png,what?,"[""red"", ""rose""]"\n1.png,why?,so\n2.png,when?,[now\n'
    (folder / "q.csv").write_text(text)
    source = open_source(f"csv:{folder / 'q.csv'}")
    assert [source[n].questions[0].answers for n in range(3)] == [("red", "rose"), ("so",), ("[now",)]
    rows = ['0.png,"[""a?"", ""b?""]","[""x"", ""y""]"', "1.png,[a?,x"]
    write_lines(folder / "l.csv", [line.encode() for line in ("filepath,questions,answers", *rows)])
    source = open_source(f"csv:{folder / 'l.csv'}")
    assert [asked.answers for asked in source[0].questions] == [("x",), ("y",)]
    assert reason(source, 1).startswith("questions is malformed: neither a list nor the JSON of one")


def test_jsonl_refusals(folder: Path) -> None:
    write_lines(folder / "a.jsonl", ['[{"image": "0.png"}]'])
    with pytest.raises(ConfigError, match="one object a line, not one array"):
        open_source(f"jsonl:{folder}/a.jsonl")
    write_lines(folder / "b.jsonl", [as_json(image="0.png", caption="x")])
    with pytest.raises(ConfigError, match=r"no column 'captoin' .did you mean 'caption'"):
        open_source(f"jsonl:{folder}/b.jsonl?caption=captoin")


def test_labels_that_disagree(folder: Path) -> None:
    lines = [
        as_json(image="0.png", label="cat"),
        as_json(image="0.png", label="dog"),
        as_json(image="1.png", label="dog"),
    ]
    source = open_source(f"jsonl:{write_lines(folder / 't.jsonl', lines)}")
    assert reason(source, 0) == "labels disagree: 'cat' and 'dog' (row 2)"
    assert source[1].label == 1


def test_pickle_and_fingerprint(folder: Path) -> None:
    write_lines(folder / "t.csv", ["filepath\ttitle", "0.png\tx", "1.png\ty"])
    source = open_source(f"csv:{folder}/t.csv")
    again = pickle.loads(pickle.dumps(source))  # noqa: S301 - our own
    assert again[1].captions == ("y",)
    shutil.copytree(folder, folder / "copy")
    assert open_source(f"csv:{folder}/copy/t.csv").fingerprint() == source.fingerprint() == again.fingerprint()
    write_lines(folder / "t.csv", ["filepath\ttitle", "0.png\tx", "1.png\tz"])
    assert open_source(f"csv:{folder}/t.csv").fingerprint() != source.fingerprint()


@pytest.fixture(scope="module")
def write_parquet() -> Callable[..., Path]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(path: Path, rows: list[dict[str, Any]], **types: Any) -> Path:
        table = pa.Table.from_pylist(rows)
        for name, kind in types.items():
            place = table.column_names.index(name)
            table = table.set_column(place, name, pa.array([row[name] for row in rows], kind))
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
        return path

    return write


def embedded(i: int, **values: Any) -> dict[str, Any]:
    return {"image": {"bytes": picture(i), "path": f"{i}.png"}, **values}


def test_parquet(tmp_path: Path, write_parquet: Callable[..., Path]) -> None:
    rows = [embedded(i, caption=[f"a {i}", f"b {i}"], label=i) for i in range(3)]
    rows += [{"image": {"bytes": b"broken", "path": "3.png"}, "caption": ["x"], "label": 0}]
    rows += [{"image": {"bytes": None, "path": "4.png"}, "caption": [], "label": 0}]
    rows += [{"image": None, "caption": ["x"], "label": 1}]
    path = write_parquet(tmp_path / "t-0.parquet", rows)
    source = open_source(f"parquet:{tmp_path}/t-*.parquet")
    assert len(source) == 6
    sample = source[2]
    assert (sample.id, sample.captions, sample.label) == ("row-2", ("a 2", "b 2"), 2)  # one image has no path
    assert sample.image.getpixel((0, 0)) == (2, 0, 0)
    assert source.captions(3) == ("x",)
    assert reason(source, 3).startswith("not an image")
    assert reason(source, 4) == "image file is missing: 4.png"
    assert reason(source, 5) == "image is missing: the row has none"
    kept = open_source(f"parquet:{path}?limit=5", require_captions=True)
    assert [kept.captions(i)[0] for i in range(5)] == ["a 0", "a 1", "a 2", "x", "x"]
    again = pickle.loads(pickle.dumps(source))  # noqa: S301 - our own
    assert again[1].captions == ("a 1", "b 1")
    assert again.fingerprint() == source.fingerprint() != kept.fingerprint()


def test_parquet_ids_paths_and_columns(tmp_path: Path, write_parquet: Callable[..., Path]) -> None:
    import pyarrow as pa

    write_parquet(tmp_path / "a.parquet", [embedded(i, text=f"t{i}") for i in range(2)])
    assert [s.id for s in _all(open_source(f"parquet:{tmp_path}/a.parquet"))] == ["0.png", "1.png"]
    rows = [
        {"key": f"k{i % 2}", "img": picture(i), "words": f"w{i}", "question": "q?", "answer": "2"} for i in range(3)
    ]
    write_parquet(tmp_path / "b.parquet", rows, img=pa.binary())
    source = open_source(f"parquet:{tmp_path}/b.parquet?image=img&caption=words")
    assert (source[1].id, source[1].captions, source[1].questions[0].kind) == ("k1", ("w1",), "number")
    assert reason(source, 2) == "duplicate id: the sample at position 0 has it already"
    (tmp_path / "sub").mkdir()
    (tmp_path / "0.png").write_bytes(picture(5))
    (tmp_path / "sub" / "0.png").write_bytes(picture(6))
    paths = ["0.png", "../0.png", str(tmp_path / "0.png"), str(tmp_path / "sub" / "0.png")]
    write_parquet(tmp_path / "sub" / "c.parquet", [{"filepath": path, "caption": "x"} for path in paths])
    source = open_source(f"parquet:{tmp_path}/sub/c.parquet")
    assert source[0].image.getpixel((0, 0)) == (6, 0, 0)
    assert "points outside its folder" in reason(source, 1)
    assert "points outside its folder" in reason(source, 2)
    assert source[3].image.getpixel((0, 0)) == (6, 0, 0)
    with pytest.raises(ConfigError, match=r"no column 'wrods' .did you mean 'words'"):
        open_source(f"parquet:{tmp_path}/b.parquet?image=img&caption=wrods")
    write_parquet(tmp_path / "d.parquet", [{"key": "x", "drawing": "y", "words": "z"}])
    with pytest.raises(ConfigError, match="no image column among key, drawing, words"):
        open_source(f"parquet:{tmp_path}/d.parquet")


def _all(source: Source) -> list[Any]:
    return [source[i] for i in range(len(source))]


def test_caption_in_parquet_that_is_not_utf8(tmp_path: Path, write_parquet: Callable[..., Path]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pa.Array.from_buffers(pa.string(), 3, pa.array([b"good", b"caf\xe9", b"good"]).buffers())
    images = pa.array([{"bytes": picture(i), "path": None} for i in range(3)])
    pq.write_table(pa.table({"image": images, "caption": texts}), tmp_path / "t.parquet")
    source = open_source(f"parquet:{tmp_path}/t.parquet", require_captions=True)
    assert [source.captions(i) for i in (0, 2)] == [("good",), ("good",)]
    assert reason(source, 1) == "caption is not UTF-8"


def test_broken_parquet(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ConfigError, match="cannot be read"):
        open_source(f"parquet:{tmp_path}/t.parquet")


def test_local_hub_folder_with_splits(tmp_path: Path, write_parquet: Callable[..., Path]) -> None:
    for name, count in (("train", 3), ("validation", 2)):
        write_parquet(
            tmp_path / "set" / "data" / f"{name}-0.parquet", [embedded(i, text=f"{name} {i}") for i in range(count)]
        )
    assert len(open_source(f"hf:{tmp_path}/set:train")) == 3
    assert open_source(f"hf:{tmp_path}/set@val")[1].captions == ("validation 1",)
    assert len(open_source(f"hf:{tmp_path}/set", split="dev")) == 2
    with pytest.raises(ConfigError, match="has the splits train, validation: say which"):
        open_source(f"hf:{tmp_path}/set")
    with pytest.raises(ConfigError, match="no split 'tset'"):
        open_source(f"hf:{tmp_path}/set:tset")


@pytest.mark.parametrize(
    ("name", "message"), [("no/such_set", "cannot be read"), ("./nowhere/at/all", "neither a folder")]
)
def test_hub_set_that_is_not_there(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_source(f"hf:{name}:train")


@pytest.mark.parametrize("as_list", [False, True])
def test_rows_without_a_caption_are_found_as_reading_each_finds_them(tmp_path: Path, as_list: bool) -> None:
    """Arrow looks at all texts at once; where it sees nothing the row is read."""
    texts = ["a", "", "  ", None, "\x1c\u200b", "\u3000\u00a0", "猫", "\t\n", " é ", "\x1c", "!"]
    rows = [[text, " "] if as_list else text for text in texts]
    rows += [[], None] if as_list else [None]
    table = pyarrow.table({"image": [{"bytes": picture(), "path": None}] * len(rows), "caption": rows})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet", row_group_size=3)
    everything = open_source(f"parquet:{tmp_path / 't.parquet'}")
    kept = open_source(f"parquet:{tmp_path / 't.parquet'}", require_captions=True)
    expected = [everything[row].id for row in range(len(rows)) if everything[row].captions]
    assert [sample.id for sample in kept] == expected
    assert {"row-0", "row-6", "row-8", "row-10"} <= {*expected}
    assert not {"row-1", "row-2", "row-3", "row-5", "row-7", "row-9"} & {*expected}


def test_texts_are_read_alike_before_and_after_they_are_sent() -> None:
    texts = Texts(["one", "", "zwei ü", "\ud800"])
    for each in (texts, pickle.loads(pickle.dumps(texts)), texts):  # noqa: S301
        assert [*each] == ["one", "", "zwei ü", "\ud800"]
        assert each[1:3] == ["", "zwei ü"]
        assert [*each.encoded(torch.tensor([2, 0]))] == ["zwei ü".encode(), b"one"]
        ForkingPickler.dumps(each)  # moves its memory
        assert each[2] == "zwei ü"
    assert [*Texts([])] == []
