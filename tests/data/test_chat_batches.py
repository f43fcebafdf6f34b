"""Batches of dialogues: prompts as pure functions, readers of both kinds, parts, workers, stored answers."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cmapkd.config import ConfigError
from cmapkd.data.asked import AskedSource, asked
from cmapkd.data.batches import BatchBuilder
from cmapkd.data.config import DataConfig, PromptConfig
from cmapkd.data.dialogues import ChatInput, ChatItem
from cmapkd.data.loading import make_loader
from cmapkd.data.open import open_streams
from cmapkd.data.plans import Plan, PlanSampler
from cmapkd.data.prompting import INSTRUCTIONS, Prompting, commonest
from cmapkd.data.readers import ChatReader, DualReader
from cmapkd.data.scenes.source import ScenesSource
from cmapkd.data.turns import UNREAD, Dialogue, Turn
from cmapkd.data.types import BadSampleError, Batch, QuestionAnswer, Sample, StoredRows
from cmapkd.data.views import WHOLE, ViewSpec, draw_view
from helpers import make_model

RED = Image.new("RGB", (12, 8), "red")


@dataclass(frozen=True)
class ByteChat:
    """Reads texts as bytes; a picture is one visual token for 8 columns, with as many rows of pixels."""

    longest: int = 400
    pad_id: int = 0
    max_tokens: int | None = None

    def read(self, dialogue: Dialogue, pictures: Sequence[Image.Image]) -> ChatItem:
        assert len(pictures) == sum(turn.pictures for turn in dialogue)
        columns = [picture.width // 8 for picture in pictures]
        red = [float(np.asarray(picture)[0, 0, 0]) for picture in pictures]
        pixels = [torch.full((count, 3), value) for count, value in zip(columns, red, strict=True)]
        ids: list[int] = []
        answer: list[bool] = []
        visual: list[bool] = []
        for turn in dialogue:
            said = [1] * (columns[0] if turn.pictures else 0) + [2 + byte for byte in turn.text.encode()] + [300]
            learned = turn.role == "assistant" and turn.learned
            ids += said
            answer += [learned] * len(said)
            visual += [token == 1 for token in said]
        if len(ids) > self.longest:
            raise ValueError(f"the dialogue has {len(ids)} tokens, more than {self.longest}")
        numbers = torch.tensor(ids)
        shown = {"pixels": torch.cat(pixels)} if pixels else {}
        return ChatItem(numbers, torch.tensor(answer), torch.tensor(visual), {"kind": numbers % 2}, shown)

    def fingerprint(self) -> str:
        return str(self.longest)


class Listed:
    """A source of pictures about which nothing is said; the last position cannot be read."""

    name = "listed"

    def __init__(self, pictures: Sequence[Image.Image]) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures) + 1

    def __getitem__(self, index: int) -> Sample:
        if index == len(self.pictures):
            raise BadSampleError("last", "broken")
        return Sample(str(index), self.pictures[index])


class Answered:
    """A cache without arrays that has the answers to the samples of even index."""

    def __init__(self, *, needs_texts: bool, everything: bool = False) -> None:
        self.needs_texts, self.everything = needs_texts, everything
        self.asked: list[Sequence[str]] = []

    def has(self, view: int, index: int) -> bool:
        return self.everything or index % 2 == 0

    def read(self, view: Any, indices: Any, ids: Any, captions: Sequence[str], missing: Sequence[int]) -> StoredRows:
        self.asked.append(captions)
        return StoredRows({}, torch.tensor([*missing], dtype=torch.int64), torch.tensor([*indices]))


def builder_of(source: Any = None, prompting: Prompting | None = None, **options: Any) -> BatchBuilder:
    readers = options.pop("readers", {"student": ChatReader(ByteChat()), "teacher": ChatReader(ByteChat())})
    source = source or ScenesSource(length=40)
    return BatchBuilder(source, WHOLE, readers, seed=3, texts=prompting or Prompting(), **options)


def plan(*indices: int, epoch: int = 0) -> Plan:
    return Plan(0, epoch, indices, indices)


def chat(batch: Batch, role: str = "student") -> ChatInput:
    found = batch.inputs[role]
    assert isinstance(found, ChatInput)
    return found


def copied(value: Any) -> Any:
    """As another process gets it."""
    return pickle.loads(pickle.dumps(value))  # noqa: S301


def text_of(ids: Sequence[int]) -> str:
    return bytes(token - 2 for token in ids if 2 <= token < 258).decode()


def same(one: ChatInput, other: ChatInput) -> None:
    for first, second in zip(one.items(), other.items(), strict=True):
        assert torch.equal(first.ids, second.ids)
        assert torch.equal(first.answer, second.answer)
        assert first.pictures.keys() == second.pictures.keys()
        assert all(torch.equal(first.pictures[name], second.pictures[name]) for name in first.pictures)


# ------------------------------------------------------------------------------------------------------------- prompts


def test_a_prompt_is_a_question_of_the_sample_and_its_commonest_answer() -> None:
    source = ScenesSource(length=8)
    seen = set()
    for number in range(30):
        sample = source[3]
        turns = Prompting(suffix="In a word.").choose(sample, draw_view(sample.id, number, WHOLE, (8, 8)), number)
        question = turns[0].text.removesuffix("\nIn a word.")
        assert question != turns[0].text
        assert turns[0].pictures == 1
        assert turns[1].text == {each.question: each.answers[0] for each in sample.questions}[question]
        seen.add(question)
    assert len(seen) > 3


def test_the_commonest_answer_is_the_first_of_the_most_frequent() -> None:
    assert commonest(("no", "yes", "yes", "no", "", "", "")) == "no"
    assert commonest(("", "")) == ""


def test_auto_takes_turns_then_questions_then_captions() -> None:
    view = draw_view("a", 0, WHOLE, (8, 8))
    turns = (Turn("user", "a", 1), Turn("assistant", "b"))
    whole = Sample("a", RED, ("a red one",), questions=(QuestionAnswer("q", ("r",)),), turns=turns)
    assert Prompting().choose(whole, view, 0) == turns
    assert Prompting().choose(replace(whole, turns=()), view, 0)[1].text == "r"
    said = Prompting().choose(replace(whole, turns=(), questions=()), view, 0)
    assert said[0].text in INSTRUCTIONS
    assert said[1].text == "a red one"
    assert Prompting("captions", plain_captions=True).choose(whole, view, 0)[0] == Turn("user", "", 1)
    with pytest.raises(BadSampleError, match="no questions that this run learns from"):
        Prompting("questions").choose(replace(whole, questions=(QuestionAnswer("q", ()),)), view, 0)


def test_names_tell_every_choice_apart() -> None:
    turns = (Turn("user", "a", 1), Turn("assistant", "b"))
    names = {Prompting().named(each) for each in (turns, (replace(turns[0], pictures=0), turns[1]), (*turns, *turns))}
    assert len(names) == 3
    every = [
        Prompting(),
        Prompting("questions"),
        Prompting(share=0.5),
        Prompting(suffix="x"),
        Prompting(plain_captions=True),
        Prompting("both", join=True),
        Prompting("both", join=True, captions=2),
    ]
    assert len({each.describe() for each in every}) == len(every)


def test_data_without_what_is_asked_for_are_refused() -> None:
    Prompting().check(ScenesSource(length=8))
    with pytest.raises(ConfigError, match=r"has any turns: set data.prompts"):
        Prompting("turns").check(ScenesSource(length=8))


def test_questions_without_an_answer_are_told_of() -> None:
    sample = Sample("s", RED, (), questions=(QuestionAnswer("why?", ()), QuestionAnswer("how?", ("",))))
    with pytest.raises(BadSampleError, match="this run learns from; its questions have no answer"):
        Prompting().choose(sample, draw_view("s", 0, WHOLE, RED.size), 0)


def test_every_caption_and_question_of_both_is_shown_as_often() -> None:
    said = {f"caption {place}": 0 for place in range(5)} | {"answer 0": 0, "answer 1": 0}
    questions = tuple(QuestionAnswer(f"question {place}", (f"answer {place}",)) for place in range(2))
    sample = Sample("s", RED, tuple(f"caption {place}" for place in range(5)), questions=questions)
    prompting = Prompting("both")
    for number in range(6000):
        view = draw_view("s", number, ViewSpec(), RED.size)
        said[prompting.choose(sample, view, number)[-1].text] += 1
    expected = {name: 2000 if name.startswith("answer") else 400 for name in said}
    assert all(abs(said[name] - count) < 5 * count**0.5 for name, count in expected.items()), said
    assert prompting.describe() != Prompting("both", join=True).describe()
    assert "drawn apart" in prompting.describe()  # a cache of the old choice is refused


@pytest.mark.parametrize("kind", ["captions", "both"])
def test_several_captions_stand_in_one_dialogue_each_once(kind: Any) -> None:
    said = ("one", "two", "three")
    sample = Sample("a", RED, said, questions=(QuestionAnswer("q", ("r",)),))
    of_views = []
    for number in range(40):
        turns = Prompting(kind, join=True, captions=2).choose(sample, draw_view("a", number, WHOLE, (8, 8)), number)
        answers = [turn.text for turn in turns if turn.role == "assistant" and turn.text != "r"]
        assert len(set(answers)) == 2
        assert [turn.pictures for turn in turns] == [1, *[0] * (len(turns) - 1)]
        of_views.append(tuple(answers))
    assert {each for answers in of_views for each in answers} == {*said}
    more = Prompting(kind, join=True, captions=9).choose(sample, draw_view("a", 0, WHOLE, (8, 8)), 0)
    assert {turn.text for turn in more} >= {*said}


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "question"},
        {"share": 0.0},
        {"share": 1.5},
        {"kind": "both", "join": True, "captions": 0},
        {"kind": "both", "captions": 2},
        {"kind": "questions", "join": True, "captions": 2},
        {"kind": "both", "unanswered": "student"},
        {"join": True, "unanswered": "student"},
    ],
)
def test_wrong_settings_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        PromptConfig.from_mapping(values)
    with pytest.raises(ValueError):  # noqa: PT011
        Prompting(**values)


def test_a_share_of_the_questions_is_fixed_and_others_are_never_asked() -> None:
    source, few = ScenesSource(length=60), Prompting("questions", share=0.1)
    part = asked(source, few)
    assert isinstance(part, AskedSource)
    pairs = {(sample.id, each.question) for sample in map(source.unseen, range(60)) for each in few.asked(sample)}
    total = sum(len(source.unseen(index).questions) for index in range(60))
    assert 0.04 * total < len(pairs) < 0.18 * total
    assert {part[index].id for index in range(len(part))} == {name for name, _ in pairs}
    found = set()
    for index in range(len(part)):
        for number in range(12):
            sample = part[index]
            found.add((sample.id, few.choose(sample, draw_view(sample.id, number, WHOLE, (8, 8)), number)[0].text))
    assert found <= pairs
    assert len(found) > 0.9 * len(pairs)
    assert part.fingerprint() != source.fingerprint()
    assert asked(source, Prompting()) is source


def test_questions_without_an_answer_are_asked_too_and_show_none() -> None:
    """The answers that are given are those of the same share without the others; no other answer is seen."""
    source = ScenesSource(length=30)
    few, all_asked = Prompting("questions", share=0.2), Prompting("questions", share=0.2, unanswered="student")
    assert asked(source, all_asked) is source
    for sample in map(source.unseen, range(30)):
        assert len(all_asked.asked(sample)) == len(sample.questions)
        given, shown = set(), set()
        for number in range(60):
            turns = all_asked.choose(sample, draw_view(sample.id, number, WHOLE, (8, 8)), number)
            shown.add(turns[0].text)
            if turns[-1].given:
                given.add((turns[0].text, turns[-1].text))
            else:
                assert turns[-1].text == UNREAD
        assert len(shown) > 0.8 * len({each.question for each in sample.questions})
        assert given <= {(each.question, commonest(each.answers)) for each in few.asked(sample)}
        assert given or not few.asked(sample)
    silent = Sample("a", RED, questions=(QuestionAnswer("What is it?", ()), QuestionAnswer("", ("no",))))
    assert not Prompting("questions").has(silent)
    assert [each.question for each in all_asked.asked(silent)] == ["What is it?"]
    assert all_asked.describe() != few.describe()


def test_shares_in_streams_go_by_the_ids_that_batches_have() -> None:
    data = DataConfig.from_mapping(
        {
            "train": "scenes?length=30",
            "more": {"b": {"source": "scenes?length=30", "share": 0.5}},
            "prompts": {"share": 0.1},
        }
    )
    source = open_streams(data.train, data.more, prompting=data.prompts.prompting())
    assert len(source) < 60
    assert all(data.prompts.prompting().asked(source[index]) for index in range(len(source)))
    assert data.prompts.prompting(training=False).share == 1


def test_a_share_of_too_many_samples_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"has 10,000,000: name at most 1,000,000"):
        asked(ScenesSource(), Prompting(share=0.1))


def test_views_of_dialogues_are_whole_unless_they_are_set() -> None:
    given = {"train": "folder:x", "views": {"flip": 0.5}}
    assert DataConfig.from_mapping({"train": "folder:x"}).for_dialogues().views == WHOLE
    assert DataConfig.from_mapping({"train": "folder:x"}).views != WHOLE
    assert DataConfig.from_mapping(given).for_dialogues().views == ViewSpec(flip=0.5)
    assert DataConfig.from_mapping({"train": "x", "prompts": "captions"}).prompts.kind == "captions"


def test_a_vocabulary_is_learned_from_everything_that_may_be_said() -> None:
    texts = list(Prompting(suffix="In a word.").vocabulary(ScenesSource(length=5)))
    sample = ScenesSource(length=5)[4]
    assert {"In a word.", *INSTRUCTIONS, *sample.captions, sample.questions[0].question} <= {*texts}
    only = list(Prompting("questions").vocabulary(ScenesSource(length=5)))
    assert not {*sample.captions} & {*only}


# ------------------------------------------------------------------------------------------------------------- batches


def test_a_batch_is_a_pure_function_of_its_plan() -> None:
    first, second = builder_of()[plan(4, 7, 9)], builder_of()[plan(4, 7, 9)]
    same(chat(first), chat(second))
    assert first.captions == second.captions
    assert [text_of(ids) for ids in chat(first).answers()] == [*first.captions]
    assert builder_of()[plan(4, 7, 9, epoch=1)].captions != first.captions
    assert chat(first) is chat(first, "teacher")  # equal processors
    assert chat(builder_of(readers={"student": ChatReader(ByteChat()), "teacher": ChatReader(ByteChat(99))})[plan(4)])


def test_a_sample_too_long_for_its_processor_is_bad() -> None:
    builder = builder_of(readers={"student": ChatReader(ByteChat(longest=5))}, on_bad_sample="error")
    with pytest.raises(BadSampleError, match=r"scenes/standard/train/000000002.*more than 5"):
        builder[plan(2)]


def test_an_input_knows_the_longest_dialogue_that_its_reader_takes() -> None:
    for own, allowed, expected in ((None, None, None), (300, None, 300), (None, 200, 200), (300, 200, 200)):
        batch = builder_of(readers={"student": ChatReader(ByteChat(max_tokens=own), allowed)})[plan(0, 1)]
        found = chat(batch)
        assert found.max_tokens == chat(batch.part(0, 1)).max_tokens == expected
        prompts = found.prompts().texts.mask.sum(1).tolist()
        assert found.room() == (None if expected is None else [expected - length for length in prompts])


def test_what_two_roles_share_stays_one_object_when_it_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # without a GPU there is none
    batch = builder_of()[plan(0, 1)]
    batch = replace(batch, inputs={"student": batch.inputs["student"], "teacher": batch.inputs["student"]})
    moved = [batch.to("meta"), batch.to("meta", images=False), batch.pin_memory()]
    for each in moved:
        assert each.inputs["teacher"] is each.inputs["student"] is not batch.inputs["student"]
    assert chat(moved[1]).texts.ids.is_meta
    assert chat(moved[2]).texts.ids.data_ptr() != chat(batch).texts.ids.data_ptr()


def test_parts_are_the_rows_of_the_whole() -> None:
    turns = (Turn("user", "alone"), Turn("assistant", "b"))

    class Mixed(ScenesSource):
        def __getitem__(self, index: int) -> Sample:
            sample = super().__getitem__(index)
            return Sample(sample.id, sample.image, turns=turns) if index == 1 else sample

    batch = builder_of(Mixed(length=9))[plan(0, 1, 2, 3)]
    items = chat(batch).items()
    assert not items[1].pictures["pixels"].numel()
    part = chat(batch.part(1, 3))
    for whole, mine in zip(items[1:3], part.items(), strict=True):
        assert torch.equal(whole.ids, mine.ids)
        assert torch.equal(whole.pictures["pixels"], mine.pictures["pixels"])
    same(chat(batch).rows([1, 2]), part)
    moved = batch.to("meta")
    assert chat(moved).pictures["pixels"].device.type == chat(moved).answer.device.type == "meta"
    stayed = batch.to("meta", images=False)
    assert chat(stayed).pictures["pixels"].device.type == "cpu"
    assert [*batch.only("student").inputs] == ["student"]
    assert torch.equal(copied(batch).inputs["student"].texts.ids, chat(batch).texts.ids)


def test_writers_and_encoders_read_the_same_batch() -> None:
    model = make_model()
    readers = {"student": ChatReader(ByteChat()), "eye": DualReader(model.image_spec, model.tokenizer)}
    batch = builder_of(readers=readers)[plan(1, 2)]
    assert batch.pairs("eye").images.shape == (2, 3, 16, 16)
    assert torch.equal(batch.pairs("eye").texts.ids, model.tokenizer([*batch.captions]).ids)
    with pytest.raises(TypeError, match="the student reads ChatInput"):
        batch.pairs("student")
    with pytest.raises(ConfigError, match="further views"):
        builder_of(more_views={"other": 1}, view_specs={"other": WHOLE})


@pytest.mark.parametrize("needs_texts", [False, True])
def test_stored_answers_leave_the_pictures_of_the_missing_alone(needs_texts: bool) -> None:
    answers = Answered(needs_texts=needs_texts)
    batch = builder_of(stored={"teacher": answers})[plan(2, 3, 4, 5)]
    assert answers.asked[0][0].startswith("user 1 1 ")
    student, teacher = chat(batch).items(), chat(batch, "teacher").items()
    assert batch.stored["teacher"].missing.tolist() == [1, 3]
    for row in range(4):
        if needs_texts or row % 2:
            assert torch.equal(teacher[row].ids, student[row].ids)
        else:
            assert not len(teacher[row].ids)
        assert bool(len(teacher[row].pictures["pixels"])) == bool(row % 2)
    part = batch.part(1, 3)
    assert part.stored["teacher"].missing.tolist() == [0]
    assert torch.equal(chat(part, "teacher").items()[0].pictures["pixels"], student[1].pictures["pixels"])
    same(chat(batch, "teacher").rows([1, 3]), chat(batch).rows([1, 3]))


def test_with_every_answer_stored_a_role_brings_no_more_than_texts() -> None:
    batch = builder_of(stored={"teacher": Answered(needs_texts=False, everything=True)})[plan(2, 3)]
    assert "teacher" not in batch.inputs
    batch = builder_of(stored={"teacher": Answered(needs_texts=True, everything=True)})[plan(2, 3)]
    assert not chat(batch, "teacher").pictures
    same_texts = torch.equal(chat(batch, "teacher").texts.ids, chat(batch).texts.ids)
    assert same_texts


def test_crops_reach_the_processor() -> None:
    reader = ChatReader(ByteChat())
    turns = (Turn("user", "a", 1), Turn("assistant", "b"))
    picture = Image.new("RGB", (64, 20))
    assert len(reader.read(picture, None, turns).pictures["pixels"]) == 8
    assert len(reader.read(picture, (8.2, 0.0, 24.4, 20.0), turns).pictures["pixels"]) == 2
    assert not len(reader.read(picture, (63.9, 19.9, 64.0, 20.0), turns).pictures["pixels"])


def test_memory_is_estimated() -> None:
    assert builder_of().bytes_of(3) == 3 * builder_of().bytes_of(1) > 0
    short = builder_of(readers={"student": ChatReader(ByteChat(longest=5))})
    assert short.bytes_of(1) > 10**6


def test_memory_grows_with_the_pictures_of_the_data() -> None:
    def of(*widths: int) -> int:
        return ChatReader(ByteChat()).bytes_of(1, Listed([Image.new("RGB", (width, 8)) for width in widths]))

    small, large = of(16), of(16, 1600, 24)
    assert large - small == (1600 - 16) // 8 * (3 * 4 + 8 + 1 + 1 + 8)  # of pixels, ids, two marks and a number each
    assert of(16, 80_000) > 10**6  # longer than the model reads


def test_workers_make_the_same_batches_in_order() -> None:
    def batches(workers: int) -> list[Batch]:
        sampler = PlanSampler(40, batch_size=4, seed=3, start=0, stop=5)
        return list(make_loader(builder_of(), sampler, workers=workers, pin_memory=False))

    for mine, theirs in zip(batches(0), batches(1), strict=True):
        assert mine.ids == theirs.ids
        same(chat(mine), chat(theirs))
    assert copied(builder_of())[plan(1)].captions == builder_of()[plan(1)].captions


def test_texts_alone_are_bad_samples_where_every_process_must_see_a_picture() -> None:
    silent = (Turn("user", "why?"), Turn("assistant", "so"))
    reader = ChatReader(ByteChat(), pictures_alone=True)
    with pytest.raises(ValueError, match=r"shows no picture, and with training\.sharding: fsdp2 every process"):
        reader.read(RED, None, silent)
    shown = (Turn("user", "why?", 1), Turn("assistant", "so"))
    assert len(reader.read(RED, None, shown).ids) == len(ChatReader(ByteChat()).read(RED, None, shown).ids)
