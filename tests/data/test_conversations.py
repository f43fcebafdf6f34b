"""Dialogues as strangers write them: TRL, ms-swift, LLaVA and ShareGPT, queries with responses."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from making import picture, write_tar

from cmapkd.config import ConfigError
from cmapkd.data.conversations import parse_turns
from cmapkd.data.open import open_source
from cmapkd.data.prompting import Prompting
from cmapkd.data.records import Unusable
from cmapkd.data.rows import Columns, grouped
from cmapkd.data.turns import Turn
from cmapkd.data.types import BadSampleError
from cmapkd.data.views import View

ASKED = (Turn("user", "Is it red?", 1), Turn("assistant", "yes"))


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def human(text: str) -> dict[str, Any]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, Any]:
    return {"from": "gpt", "value": text}


PIECES = [{"type": "image"}, {"type": "text", "text": "Is it red?"}]
FORMS: dict[str, dict[str, Any]] = {
    "trl lists": {"messages": [user(PIECES), assistant([{"type": "text", "text": "yes"}])]},
    "trl with nulls": {"messages": [user([{"type": "image", "text": None}, PIECES[1]]), assistant("yes")]},
    "trl plain": {"messages": [user("Is it red?"), assistant("yes")]},
    "trl prompt": {"prompt": [user(PIECES)], "completion": [assistant("yes")]},
    "trl prompt plain": {"prompt": "Is it red?", "completion": "yes"},
    "swift": {"messages": [user("<image>Is it red?"), assistant(" yes ", loss=True)]},
    "llava": {"conversations": [human("<image>\nIs it red?"), gpt("yes")]},
    "llava behind": {"conversations": [human("Is it red?\n<image>"), gpt("yes")]},
    "query": {"query": "<image>Is it red?", "response": "yes"},
    "query plain": {"query": "Is it red?", "response": "yes"},
    "json in a table": {"messages": json.dumps([user("<image>Is it red?"), assistant("yes")])},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_says_the_same(form: str) -> None:
    assert parse_turns(FORMS[form], pictures=1) == ASKED


def test_preferences_bring_a_worse_answer() -> None:
    turns = (ASKED[0], Turn("assistant", "yes", rejected="no"))
    asked = user("<image>Is it red?")
    for values in (
        {"prompt": "Is it red?", "chosen": "yes", "rejected": "no"},
        {"prompt": [user(PIECES)], "chosen": [assistant("yes")], "rejected": [assistant("no")]},
        {"chosen": [asked, assistant("yes")], "rejected": [asked, assistant("no")]},
        {"chosen": [human("<image>Is it red?"), gpt("yes")], "rejected": [human("<image>Is it red?"), gpt("no")]},
    ):
        assert parse_turns(values, pictures=1) == turns
    with pytest.raises(Unusable, match="not to the same prompt"):
        parse_turns({"chosen": [asked, assistant("a")], "rejected": [user("<image>b"), assistant("c")]}, pictures=1)


PAIR = {"prompt": "Is it red?", "chosen": "yes", "rejected": "no"}


def test_a_history_goes_before_a_preference() -> None:
    before = (Turn("user", "Is it big?", 1), Turn("assistant", "no"))
    expected = (*before, Turn("user", "Is it red?"), Turn("assistant", "yes", rejected="no"))
    past = {"history": [["Is it big?", "no"]]}
    for prompt in ("prompt", "query"):
        values = {prompt: "Is it red?", "chosen": "yes", "rejected": "no", **past}
        assert parse_turns(values, pictures=1) == expected


def test_messages_beside_a_preference_are_the_chosen_ones() -> None:
    asked = user("<image>Is it red?")
    expected = (ASKED[0], Turn("assistant", "yes", rejected="no"))
    assert parse_turns({**PAIR, "messages": [asked, assistant("yes")]}, pictures=1) == expected
    for messages in ([asked, assistant("maybe")], [asked]):
        with pytest.raises(Unusable, match="beside chosen and rejected, and is not the chosen one: leave"):
            parse_turns({**PAIR, "messages": messages}, pictures=1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**PAIR, "videos": ["a.mp4"]}, "has videos, which are not read"),
        ({**PAIR, "tools": [{"name": "a"}]}, "has tools, which are not read"),
        ({**PAIR, "rejected": " yes "}, "the chosen and the rejected answer are the same"),
        ({**PAIR, "completion": "maybe"}, "is not the chosen one"),
        ({**PAIR, "prompt": None, "history": [["a", "b"]]}, "history stands beside chosen and rejected without"),
    ],
)
def test_preferences_that_cannot_be_read_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(Unusable, match=message):
        parse_turns(values, pictures=1)


def test_what_is_no_dialogue_has_no_turns() -> None:
    for values in ({}, {"prompt": "a"}, {"query": "a", "response": None}, {"messages": None}):
        assert parse_turns(values, pictures=1) == ()


def test_longer_dialogues() -> None:
    system = {"role": "system", "content": "Be short."}
    rest = [
        user("And blue?"),
        assistant("no", loss=False),
        user("Why?"),
        assistant("so"),
        user("b"),
        assistant("c", loss=False),
    ]
    turns = parse_turns({"messages": [system, user("<image>Is it red?"), assistant("yes"), *rest]}, pictures=1)
    assert turns == (
        Turn("system", "Be short."), *ASKED, Turn("user", "And blue?"), Turn("assistant", "no", learned=False),
        Turn("user", "Why?"), Turn("assistant", "so"),
    )  # fmt: skip
    told = {"system": "Be short.", "history": [["<image>Is it red?", "yes"]], "query": "Why?", "response": "so"}
    assert parse_turns(told, pictures=1) == (turns[0], *ASKED, *turns[-2:])


def test_a_dialogue_without_picture() -> None:
    assert parse_turns(FORMS["query plain"], pictures=0) == (Turn("user", "Is it red?"), Turn("assistant", "yes"))


SAID = [human("<image>\na"), gpt("b")]
WRONG: dict[str, tuple[dict[str, Any], int, str]] = {
    "no picture": ({"conversations": SAID}, 0, "1 placeholders of pictures, but 0"),
    "no placeholder": ({"conversations": [human("a"), gpt("b")]}, 1, "0 placeholders of pictures, but 1"),
    "two placeholders": ({"conversations": [human("<image><image>a"), gpt("b")]}, 1, "2 placeholders"),
    "two pictures": ({"conversations": [human("<image><image>a"), gpt("b")]}, 2, "2 pictures: one is read"),
    "in the middle": ({"conversations": [human("see <image> here"), gpt("b")]}, 1, "in the middle"),
    "in the answer": ({"conversations": [human("a"), gpt("<image>b")]}, 1, "only a user shows pictures"),
    "in a listed text": ({"messages": [user([{"type": "text", "text": "<image>"}]), assistant("b")]}, 1, "entries of"),
    "named inside": ({"messages": [user([{"type": "image", "image": "/etc/a.png"}]), assistant("b")]}, 1, "under im"),
    "unknown piece": ({"messages": [user([{"type": "video"}]), assistant("b")]}, 0, "neither a text nor an image"),
    "empty answer": ({"conversations": [human("<image>a"), gpt(" \n")]}, 1, "answer is empty"),
    "empty question": ({"messages": [user(" "), assistant("a")]}, 0, "the user's turn is empty"),
    "unknown role": ({"messages": [{"role": "tool", "content": "a"}]}, 0, "role is unknown: 'tool'"),
    "no role": ({"messages": ["a"]}, 0, "has no role"),
    "no text": ({"messages": [user(None), assistant("b")]}, 0, "not text: NoneType"),
    "nothing": ({"messages": []}, 0, "messages is empty"),
    "no list": ({"messages": {"a": 1}}, 0, "not a list"),
    "broken json": ({"messages": '[{"role":'}, 0, "neither a list nor"),
    "no answer": ({"messages": [user("a")]}, 0, "last turn is not the assistant's"),
    "no turns taken": ({"messages": [user("a"), user("b"), assistant("c")]}, 0, "do not take turns"),
    "assistant first": ({"messages": [assistant("b")]}, 0, "do not take turns"),
    "late system": ({"messages": [user("a"), {"role": "system", "content": "b"}, assistant("c")]}, 0, "stand first"),
    "nothing learned": ({"messages": [user("a"), assistant("b", loss=False)]}, 0, "nothing is learned"),
    "learned question": ({"messages": [{**user("a"), "loss": True}, assistant("b")]}, 0, "loss is malformed"),
    "odd loss": ({"messages": [user("a"), assistant("b", loss="no")]}, 0, "loss is malformed"),
    "many turns": ({"messages": [user("a")] * 1001}, 0, "1001 turns, limit 1000"),
    "long word": ({"query": "a" * 2001, "response": "b"}, 0, "without a space"),
    "surrogate": ({"query": "a", "response": "\ud800"}, 0, "not UTF-8"),
    "video": ({"query": "a", "response": "b", "videos": ["a.mp4"]}, 0, "videos, which are not read"),
    "history": ({"query": "a", "response": "b", "history": [["a"]]}, 0, "history is malformed"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_used_says_why(case: str) -> None:
    values, pictures, reason = WRONG[case]
    with pytest.raises(Unusable, match=reason):
        parse_turns(values, pictures=pictures)


# ------------------------------------------------------------------------------------------------------------ in files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.png").write_bytes(picture(number))
    return tmp_path


def rows() -> list[dict[str, Any]]:
    return [
        {"id": "a", "image": "0.png", **FORMS["llava"]},
        {"id": "a", "image": "0.png", **FORMS["llava behind"]},
        {"id": 7, "image": "1.png", "conversations": [human("a"), gpt("b")]},
        {"id": "text", "conversations": [human("a"), gpt("b")]},
        {"id": "gone", "image": "none.png", **FORMS["llava"]},
        {"id": "out", "image": "../secret.png", **FORMS["llava"]},
        {"id": "two", "image": ["0.png", "1.png"], **FORMS["llava"]},
    ]


def outcome(source: Any, index: int) -> Any:
    try:
        sample = source[index]
        assert sample.turns == source.unseen(index).turns
        return sample.id, sample.turns, sample.image.size
    except BadSampleError as error:
        return error.sample_id, error.reason


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_llava(folder: Path, bom: bytes) -> None:
    (folder / "secret.png").write_bytes(picture(5))
    text = json.dumps(rows(), indent=1).replace("\n", "\r\n").encode()
    (folder / "train.json").write_bytes(bom + text + b"\r\n")
    source = open_source(f"llava:{folder}/train.json,{folder}/images")
    size = source[0].image.size
    text_only = (Turn("user", "a"), Turn("assistant", "b"))
    found = [outcome(source, index) for index in range(len(source))]
    assert found[:2] == [("a", ASKED, size), ("a#2", ASKED, size)]
    assert found[2] == ("7", "dialogue has 0 placeholders of pictures, but 1 pictures (row 3)")
    assert found[3] == ("text", text_only, (1, 1))
    assert found[4] == ("gone", "image file is missing: none.png")
    assert "secret" in found[5][1]
    assert "missing" in found[5][1] or "refused" in found[5][1]
    assert "2 pictures" in found[6][1]


def test_a_llava_file_is_read_in_small_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [{"id": f"é{number}", "image": "0.png", "n": 10**number, **FORMS["llava"]} for number in range(12)]
    (folder / "train.json").write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    whole = open_source(f"llava:{folder}/train.json,{folder}/images")
    monkeypatch.setattr("cmapkd.data.llava._PART", 3)
    parts = open_source(f"llava:{folder}/train.json,{folder}/images")
    assert parts.fingerprint() == whole.fingerprint()
    assert [parts[index].id for index in range(12)] == [f"é{number}" for number in range(12)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"id": 1}', "jsonl:"),
        (b"", "do not begin with"),
        (b"[{}", "no comma after entry 1"),
        (b'[{"id": 1', "end early, at entry 1"),
        (b"[{}] []", "go on after"),
        (b"[\xff]", "not UTF-8"),
        (b"[]", "holds no samples"),
        (b'["\x01"]', "at entry 1"),
    ],
)
def test_a_llava_file_that_is_none(folder: Path, text: bytes, message: str) -> None:
    (folder / "train.json").write_bytes(text)
    with pytest.raises(ConfigError, match=message):
        open_source(f"llava:{folder}/train.json,{folder}/images")


def test_llava_needs_two_names(folder: Path) -> None:
    with pytest.raises(ConfigError, match="must name a file of dialogues and its images"):
        open_source(f"llava:{folder}/train.json")


def test_jsonl_with_images_in_a_list(folder: Path) -> None:
    lines = [
        {"images": ["images/0.png"], **FORMS["swift"]},
        {"images": [{"path": "images/1.png"}], **FORMS["trl lists"]},
        {"images": [], **FORMS["query plain"]},
        {"images": ["images/0.png", "images/1.png"], **FORMS["swift"]},
        {"images": ["images/2.png"], "captions": ["a red square"]},
    ]
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(line).encode() for line in lines))
    source = open_source(f"jsonl:{folder}/a.jsonl")
    found = [outcome(source, index) for index in range(len(source))]
    assert [each[:2] for each in found[:2]] == [("images/0.png", ASKED), ("images/1.png", ASKED)]
    assert found[2][0] == "row-3"
    assert found[2][2] == (1, 1)
    assert found[3][1].startswith("row names 2 pictures")
    assert source[4].captions == ("a red square",)
    assert source[4].turns == ()
    captioned = open_source(f"jsonl:{folder}/a.jsonl", require_captions=True)  # silent dialogues are no pairs
    assert [outcome(captioned, index)[0] for index in range(len(captioned))] == ["row-4", "images/2.png"]


def test_csv_of_queries(folder: Path) -> None:
    (folder / "a.csv").write_text("image,query,response\nimages/0.png,<image>Is it red?,yes\nimages/1.png,a,\n")
    source = open_source(f"csv:{folder}/a.csv")
    assert source[0].turns == ASKED
    assert source[1].turns == ()


def test_tar(tmp_path: Path) -> None:
    members = {
        "0.png": picture(0),
        "0.json": json.dumps({"id": "x", **FORMS["llava"]}).encode(),
        "1.json": json.dumps({"id": "y", **FORMS["query plain"]}).encode(),
        "2.png": picture(1),
        "2.json": json.dumps({"id": "z", "conversations": [human("a"), gpt("b")]}).encode(),
    }
    write_tar(tmp_path / "a.tar", members.items())
    source = open_source(f"webdataset:{tmp_path}/a.tar")
    found = [outcome(source, index) for index in range(len(source))]
    assert found[0][:2] == ("x", ASKED)
    assert found[1][0] == "y"
    assert found[1][2] == (1, 1)
    assert "0 placeholders" in found[2][1]


def test_parquet(tmp_path: Path) -> None:
    import datasets

    def pieces(message: dict[str, Any]) -> dict[str, Any]:
        content = message["content"]
        listed = content if isinstance(content, list) else [{"type": "text", "text": content}]
        return {
            "role": message["role"],
            "content": [{"type": each["type"], "text": each.get("text")} for each in listed],
        }

    asked = [pieces(message) for message in FORMS["trl lists"]["messages"]]
    plain = [pieces(message) for message in (user("a"), assistant("b"))]
    shown = [{"bytes": picture(0), "path": None}]
    table = {"images": [shown, [], shown * 2, []], "messages": [asked, plain, asked, asked]}
    features = datasets.Features(
        images=datasets.Sequence(datasets.Image()),
        messages=[{"role": datasets.Value("string"),
                   "content": [{"type": datasets.Value("string"), "text": datasets.Value("string")}]}],
    )  # fmt: skip
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "a.parquet")
    source = open_source(f"parquet:{tmp_path}/a.parquet")
    found = [outcome(source, index) for index in range(len(source))]
    assert found[0][1] == ASKED
    assert found[1][1:] == ((Turn("user", "a"), Turn("assistant", "b")), (1, 1))
    assert "2 pictures" in found[2][1]
    assert "1 placeholders of pictures, but 0" in found[3][1]


CALL = {"messages": [{"role": "tool", "content": "y"}]}
BROKEN = "role is unknown: 'tool'"


def test_a_broken_dialogue_is_no_matter_for_models_that_read_captions(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "0.png").write_bytes(picture(0))
    lines = [
        {"image": "0.png", "caption": "x", **CALL},
        {"image": "0.png", "label": 1, **CALL},
        {"image": "0.png", **CALL},
        {"caption": "x", **CALL},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    members = {"0.png": picture(0), "0.json": json.dumps(CALL).encode(), "0.txt": b"x"}
    members |= {"1.png": picture(1), "1.json": json.dumps(CALL).encode()}
    write_tar(tmp_path / "a.tar", members.items())
    table = {
        "image": [{"bytes": picture(0), "path": None}] * 2,
        "caption": ["x", None],
        **{"messages": [CALL["messages"]] * 2},
    }
    features = datasets.Features(
        image=datasets.Image(),
        caption=datasets.Value("string"),
        messages=[{"role": datasets.Value("string"), "content": datasets.Value("string")}],
    )
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "a.parquet")
    for name, good in (("jsonl:{}/a.jsonl", [0, 1]), ("webdataset:{}/a.tar", [0]), ("parquet:{}/a.parquet", [0])):
        source = open_source(name.format(tmp_path))
        for index in range(len(source)):
            if index not in good:
                assert outcome(source, index)[1].startswith(BROKEN), (name, index)
                continue
            sample = source[index]
            assert sample.captions == (("x",) if index == 0 else ())
            assert str(sample.no_turns).startswith(BROKEN)
            with pytest.raises(BadSampleError, match=BROKEN):
                Prompting("turns").choose(sample, View(), 0)
            with pytest.raises(BadSampleError, match=BROKEN):
                Prompting().choose(sample, View(), 0)
        assert Prompting("captions").choose(source[0], View(), 0)[-1].text == "x"
        with pytest.raises(ConfigError, match="none of the first"):
            Prompting().check(source)


def test_names_that_are_given_to_repeated_rows_are_no_others(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(picture(0))
    ids = ("a", "a", "a#2", "b", "a", "a#2")
    lines = [{"id": each, "image": "0.png", **FORMS["swift"]} for each in ids]
    lines.append({"id": "b", "image": "0.png", "caption": "x"})
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = open_source(f"jsonl:{tmp_path}/a.jsonl")
    found = [outcome(source, index) for index in range(len(source))]
    assert [each[0] for each in found] == ["a", "a#3", "a#2", "b#2", "a#4", "a#2#2", "b"]
    assert [each[1] for each in found] == [ASKED] * 6 + [()]


def test_dialogues_wait_for_the_last_row_as_text() -> None:
    turns = [user("<image>Is it red?"), assistant("yes")] * 200
    turns[2::2] = [user("Is it red?")] * 199
    rows = ((number, {"image": f"{number}.png", "messages": turns}) for number in range(100))
    tracemalloc.start()
    try:
        groups = grouped(rows, Columns(), set())
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(groups) == 100
    assert held < 100 * 400 * 45  # bytes of a turn as JSON; an object alone takes more
