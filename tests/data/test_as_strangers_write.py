"""Tables as strangers write them, class folders as captions, and parts of a source."""

from __future__ import annotations

from pathlib import Path

import pytest
from making import picture

from cmapkd.config import ConfigError
from cmapkd.data.open import SourceWarning, open_source
from cmapkd.data.templates import get_templates
from cmapkd.data.types import BadSampleError

WORDS = ("ein Café am Fluß", "häßliche Brücke über Wasser", "naïve Größe: 20 °C", "a plain dog")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(len(WORDS)):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    return tmp_path


def write(folder: Path, encoding: str, separator: str = ",", header: tuple[str, str] = ("File", "Caption")) -> str:
    lines = [header, *((f"{i}.png", words) for i, words in enumerate(WORDS))]
    (folder / "t.csv").write_bytes("\r\n".join(separator.join(line) for line in lines).encode(encoding))
    return f"csv:{folder}/t.csv"


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_latin_1_is_read_and_the_guess_is_said(folder: Path, encoding: str, separator: str) -> None:
    with pytest.warns(SourceWarning) as said:
        source = open_source(write(folder, encoding, separator), require_captions=True)
    assert tuple(source.captions(i)[0] for i in range(len(source))) == WORDS
    text = " ".join(str(each.message) for each in said)
    assert "t.csv is not UTF-8: read as Windows-1252 (Latin-1), a guess from 3 lines" in text
    assert ("separator=semicolon" in text) == (separator == ";")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", [",", "\t"])
def test_marked_encodings_need_no_guess(folder: Path, encoding: str, separator: str) -> None:
    source = open_source(write(folder, encoding, separator), require_captions=True)
    assert tuple(source.captions(i)[0] for i in range(len(source))) == WORDS


@pytest.mark.parametrize("name", ["semicolon", "pipe"])
def test_a_rare_separator_is_found_by_the_header_and_said(folder: Path, name: str) -> None:
    text = write(folder, "utf-8", {"semicolon": ";", "pipe": "|"}[name], ("filepath", "title"))
    with pytest.warns(SourceWarning, match=f"separator={name}"):
        guessed = open_source(text)
    assert guessed.captions(0) == open_source(f"{text}?separator={name}").captions(0) == (WORDS[0],)


def test_another_alphabet_is_not_guessed(folder: Path) -> None:
    (folder / "t.csv").write_bytes("filepath,title\n0.png,красный круг\n1.png,синий квадрат\n".encode("cp1251"))
    with pytest.raises(ConfigError, match=r"is not UTF-8 \(2 of 2 lines.*\?encoding="):
        open_source(f"csv:{folder}/t.csv")
    assert open_source(f"csv:{folder}/t.csv?encoding=cp1251").captions(1) == ("синий квадрат",)
    with pytest.raises(ConfigError, match="there is no encoding 'cp9999'"):
        open_source(f"csv:{folder}/t.csv?encoding=cp9999")
    with pytest.raises(ConfigError, match="there is no encoding 'base64'"):
        open_source(f"csv:{folder}/t.csv?encoding=base64")


def test_one_damaged_row_is_no_other_encoding(folder: Path) -> None:
    rows = [f"{i}.png,{words}".encode() for i, words in enumerate(WORDS)]
    (folder / "t.csv").write_bytes(b"\n".join([b"filepath,title", *rows[:3], b"3.png,caf\xe9 \xff"]))
    source = open_source(f"csv:{folder}/t.csv")
    assert source.captions(0) == (WORDS[0],)
    with pytest.raises(BadSampleError, match="UTF-8"):
        source.captions(3)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    for number in range(20):
        place = tmp_path / ("cat", "dog")[number % 2]
        place.mkdir(exist_ok=True)
        (place / f"{number}.png").write_bytes(picture(number))
    (tmp_path / "dog" / "1.txt").write_text("my own dog")
    return tmp_path


@pytest.mark.parametrize("written", ["captions=a photo of a {}.", 'captions="a photo of a {}."'])
def test_class_folders_say_a_sentence_of_their_name(classes: Path, written: str) -> None:
    source = open_source(f"folder:{classes}?{written}", require_captions=True)
    said = {source.captions(i) for i in range(len(source))}
    assert said == {("a photo of a cat.",), ("a photo of a dog.",), ("my own dog",)}
    assert source[0].captions == source.captions(0)
    assert get_templates("auto", source) == ("a photo of a {}.",)  # zero-shot asks with the same words
    plain = open_source(f"folder:{classes}")
    assert (len(source), source.class_names) == (len(plain), plain.class_names)
    assert source.fingerprint() != plain.fingerprint()


def test_several_sentences_and_other_options_go_together(classes: Path) -> None:
    source = open_source(f"folder:{classes}?limit=3&captions=a {{}}.|a small {{}}.", require_captions=True)
    assert len(source) == 3
    assert source.captions(0) == ("a cat.", "a small cat.")


def test_labels_of_a_table_say_sentences_too(folder: Path) -> None:
    (folder / "t.csv").write_text("filepath,label\n0.png,cat\n1.png,dog\n2.png,\n")
    source = open_source(f"csv:{folder}/t.csv?captions=a photo of a {{}}.", require_captions=True)
    assert source.captions(1) == ("a photo of a dog.",)
    with pytest.raises(BadSampleError, match="neither a caption nor a class"):
        source.captions(2)


def test_sentences_without_a_place_or_a_class_are_refused(
    classes: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("table")
    (folder / "0.png").write_bytes(picture(0))
    with pytest.raises(ConfigError, match=r"'title' has no \{\}.*A column of captions is named by another option"):
        open_source(f"folder:{classes}?captions=title")
    with pytest.raises(ConfigError, match="has no class names to make captions of"):
        open_source(f"{write(folder, 'utf-8')}?captions=a {{}}")
    (classes / "dog" / "1.txt").unlink()
    with pytest.raises(ConfigError, match=r"\?captions=a photo of a \{\}\."):
        open_source(f"folder:{classes}", require_captions=True)


def test_parts_share_no_picture_and_leave_none_out(classes: Path) -> None:
    whole = open_source(f"folder:{classes}")
    train = open_source(f"folder:{classes}?part=0-0.7")
    val = open_source(f"folder:{classes}?part=0.7-1&captions=a {{}}.", require_captions=True)
    ids = [{source[i].id for i in range(len(source))} for source in (whole, train, val)]
    assert ids[1] | ids[2] == ids[0]
    assert not ids[1] & ids[2]
    assert ids[1]
    assert ids[2]
    assert train.fingerprint() != whole.fingerprint()
    assert (train.name, val.name) == (f"folder:{classes}?part=0-0.7", f"folder:{classes}?part=0.7-1")
    for low, high in ((0.0, 0.2), (0.2, 0.4), (0.8, 1.0)):  # the others of a middle part go over 1
        part, others = (
            {source[i].id for source in [open_source(f"folder:{classes}?part={text}")] for i in range(len(source))}
            for text in (f"{low}-{high}", f"{high % 1}-{round((high % 1) + 0.8, 1)}")
        )
        assert (part | others, part & others) == (ids[0], set())
    for wrong in ("0.9-0.1", "0-2", "0.5-1.6", "1-1.2", "half", "0.5"):
        with pytest.raises(ConfigError, match="part is two numbers from 0 to 1"):
            open_source(f"folder:{classes}?part={wrong}")
    with pytest.raises(ConfigError, match="the part 0 to 1e-09 of the 20 samples"):
        open_source(f"folder:{classes}?part=0-1e-9")


def test_a_path_without_its_kind_is_told_which(folder: Path) -> None:
    write(folder, "utf-8")
    with pytest.raises(ConfigError, match=rf"did you mean 'csv:{folder}/t.csv'\?"):
        open_source(f"{folder}/t.csv")
    with pytest.raises(ConfigError, match=rf"did you mean 'folder:{folder}'\?"):
        open_source(str(folder))
