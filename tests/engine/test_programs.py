"""Programs: steps by their definition, ways to one question, what filters of ways keep, and what is written of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cmapkd.config import ConfigError
from cmapkd.data.open import open_source
from cmapkd.data.scenes.source import ScenesSource
from cmapkd.data.types import Box, QuestionAnswer, Sample
from cmapkd.engine import Engine, EngineConfig
from cmapkd.engine.candidates import Candidate
from cmapkd.engine.filters import FilterConfig, verify
from cmapkd.engine.programs import ProgramsConfig, programs
from cmapkd.engine.steps import StepConfig, StepError, Thing, Value
from cmapkd.engine.written import AskConfig, Panel
from writers import make_writer

GREY = Image.new("RGB", (64, 48), (128, 128, 128))
BOXES = (Box(2, 20, 8, 8, "a"), Box(30, 2, 20, 20, "b"), Box(50, 30, 9, 9, "a"), Box(0, 0, 60, 40, "c", crowd=True))
COLOURS = {(30, 2, 50, 22): "red", (50, 30, 59, 39): "Red.", (2, 20, 10, 28): "blue"}  # the largest first
ASKED = (
    QuestionAnswer("How many red things are there?", ("2", "two")),
    QuestionAnswer("Is the blue thing left of the red thing?", ("no",)),
    QuestionAnswer("Why?", ("because",)),
    QuestionAnswer("How many red things are there?", ("2", "two")),
)
SAMPLE = Sample("s", GREY, questions=ASKED, boxes=BOXES)


class Says(Panel):
    """A panel with answers of its own; `asked` counts what was asked."""

    asked: list[tuple[str, object]] = []  # noqa: RUF012
    whole: dict[str, str] = {}  # noqa: RUF012

    def drafts(self, candidates: Sequence[Candidate], how: AskConfig, *, name: str, number: int = 1) -> list[list[str]]:
        self.asked.extend((each.question, each.box) for each in candidates)
        return [[COLOURS[each.box] if each.box else self.whole.get(each.question, "3")] for each in candidates]  # type: ignore[index]


LOOK = {"look": {"tool": "glass", "questions": {"colour": "What colour?"}}}
RED = {"where": {"of": "seen", "attribute": "colour", "equals": "{colour}"}}
KINDS: dict[str, Any] = {
    "number": {
        "asked": r"How many (?P<colour>\w+) things are there\?",
        "ways": {
            "direct": {
                "steps": {"answer": {"ask": {"tool": "eye", "question": "{question}"}}},
                "rationale": "{answer}",
            },
            "regions": {
                "steps": {"seen": LOOK, "those": RED, "answer": {"count": "those"}},
                "rationale": "I see {seen}; {those} are {colour}.",
            },
        },
    },
    "side": {
        "asked": r"Is the (?P<colour>\w+) thing (?P<side>[\w ]+) the (?P<other>\w+) thing\?",
        "ways": {
            "regions": {
                "steps": {
                    "seen": LOOK,
                    "one": RED,
                    "two": {"where": {"of": "seen", "attribute": "colour", "equals": "{other}"}},
                    "answer": {"side": {"of": "one", "to": "two", "side": "{side}"}},
                },
                "rationale": "{one}",
            }
        },
    },
}
TOOLS = {"eye": {"by": "writer"}, "glass": {"by": "writer", "sees": "crop"}}


@pytest.fixture
def panel() -> Says:
    Says.asked, Says.whole = [], {}
    return Says({"writer": make_writer().float()}, torch.device("cpu"), seed=3, batch_size=4)


def made_of(panel: Panel, sample: Sample = SAMPLE, **kinds: Any) -> list[Candidate]:
    return programs([(0, sample)], ProgramsConfig.model_validate({"tools": TOOLS, "kinds": kinds or KINDS}), panel)


def step(**values: Any) -> StepConfig:
    return StepConfig.model_validate(values)


def test_each_step_computes_what_it_says() -> None:
    things = tuple(Thing(box, {"colour": colour}) for box, colour in COLOURS.items())
    values: dict[str, Value] = {"things": things, "none": (), "colour": "Red", "side": "above", "n": "two"}
    red = step(where={"of": "things", "attribute": "colour", "equals": "a {colour}"}).compute(values)
    assert red == things[:2]
    assert step(count="things").compute(values) == "3"
    assert [step(exists=name).compute(values) for name in ("things", "none")] == ["yes", "no"]
    assert step(get={"of": "things", "attribute": "colour"}).compute(values) == "red"
    assert step(same={"first": "{colour}", "second": "the RED."}).compute(values) == "yes"
    assert step(same={"first": "{colour}", "second": "blue"}).compute(values) == "no"
    assert step(words={"word": "{n}", "becomes": {"2": "a pair"}}).compute(values) == "a pair"
    assert step(say="{colour}: {n}, {things}").compute(values) == "Red: two, red, Red., blue"
    values |= {"first": things[:1], "second": things[2:]}
    sides = {"left of": "no", "right of": "yes", "above": "yes", "below": "no"}  # centres 40, 12 and 6, 24
    for side, said in sides.items():
        assert step(side={"of": "first", "to": "second", "side": side}).compute(values) == said
        assert step(side={"of": "second", "to": "first", "side": side}).compute(values) != said
        assert step(side={"of": "first", "to": "first", "side": side}).compute(values) == "no"
    for nothing in (
        step(get={"of": "none", "attribute": "colour"}),
        step(side={"of": "things", "to": "none", "side": "above"}),
        step(side={"of": "things", "to": "things", "side": "{colour}"}),
        step(words={"word": "{colour}", "becomes": {"2": "a pair"}}),
    ):
        with pytest.raises(StepError):
            nothing.compute(values)


def test_ways_to_a_question_make_candidates_with_rationales(panel: Says) -> None:
    made = made_of(panel)
    assert [(each.question, each.relation, each.way, each.answer, each.dropped) for each in made] == [
        (ASKED[0].question, "number", "direct", "3", None),
        (ASKED[0].question, "number", "regions", "2", None),
        (ASKED[1].question, "side", "regions", "yes", None),
    ]
    assert [each.rationale for each in made] == ["3", "I see red, Red., blue; red, Red. are red.", "blue"]
    assert [each.accepted for each in made] == [("2", "two"), ("2", "two"), ("no",)]
    assert [each.id for each in made] == ["s#0", "s#1", "s#2"]
    assert len(panel.asked) == len(set(panel.asked)) == 1 + 3  # the regions once for both programs
    assert [box for _, box in panel.asked if box] == list(COLOURS)  # the largest first, no crowd


def test_a_program_that_finds_nothing_is_dropped_alone(panel: Says) -> None:
    panel.whole[ASKED[0].question] = "<image> 3"  # a control token
    absent = Sample("s", GREY, questions=(ASKED[0], QuestionAnswer("Is the red thing above the pink thing?", ("no",))))
    made = made_of(panel, absent)
    assert [(each.answer, each.dropped) for each in made] == [(None, "readable"), ("0", None), (None, "parsed")]
    panel.whole[ASKED[0].question] = ""
    assert [each.dropped for each in made_of(panel)] == ["parsed", None, None]


def test_a_new_question_is_asked_of_every_picture_in_hops(panel: Says) -> None:
    hops = {
        "colour": {"ask": {"tool": "eye", "question": "Which colour?"}},
        "number": {"ask": {"tool": "eye", "question": "How many are {colour}?"}},
    }
    panel.whole |= {"Which colour?": "lime", "How many are lime?": "4"}
    ways = {"hops": {"steps": hops}, "direct": KINDS["number"]["ways"]["direct"]}
    (first, second) = programs(
        [(0, Sample("s", GREY))],
        ProgramsConfig.model_validate(
            {"tools": {"eye": TOOLS["eye"]}, "kinds": {"hop": {"question": "How many like it?", "ways": ways}}}
        ),
        panel,
    )
    assert (first.question, first.answer, first.rationale, first.accepted) == ("How many like it?", "4", None, ())
    assert second.answer == "3"


def test_draws_of_tools_belong_to_question_and_region_alone(panel: Says) -> None:
    real = Panel(panel.models, panel.device, seed=3, batch_size=4)
    tools = {name: {**how, "temperature": 2.0, "max_new_tokens": 3} for name, how in TOOLS.items()}
    samples = [(place, Sample(f"s{place}", GREY, questions=ASKED, boxes=BOXES)) for place in range(2)]
    config = ProgramsConfig.model_validate({"tools": tools, "kinds": {"number": KINDS["number"]}})
    together = programs(samples, config, real)
    alone = [each for pair in samples for each in programs([pair], config, real)]
    assert [each.plain() for each in together] == [each.plain() for each in alone]
    assert together[0].rationale != together[2].rationale or together[1].rationale != together[3].rationale


def candidate(number: int, answer: str, question: str = "What?", accepted: tuple[str, ...] = ()) -> Candidate:
    return Candidate(SAMPLE, 0, number, question, answer=answer, accepted=accepted)


def dropped(candidates: list[Candidate], panel: Panel, **config: Any) -> list[str | None]:
    for each in candidates:
        each.dropped = None
    verify(candidates, FilterConfig.model_validate(config), "x", panel)
    return [each.dropped for each in candidates]


def test_the_label_keeps_what_the_data_say(panel: Says) -> None:
    some = [candidate(0, "Two.", accepted=("2",)), candidate(1, "3", accepted=("2", "two")), candidate(2, "2")]
    assert dropped(some, panel, label={}) == [None, "x", "x"]
    assert dropped([candidate(0, "It is two", accepted=("two",))], panel, label={"match": "contained"}) == [None]


def test_agreement_counts_the_ways_of_each_question(panel: Says) -> None:
    some = [candidate(number, answer) for number, answer in enumerate(("red", "blue", "the Red", "lime"))]
    other = [candidate(4, "2", "How many?"), candidate(5, "two", "How many?"), candidate(6, "1", "Which?")]
    assert dropped([*some, *other], panel, agree={}) == [None, "x", None, "x", None, None, "x"]
    assert [each.scores["x"] for each in (*some, *other)] == [0.5, 0.25, 0.5, 0.25, 1.0, 1.0, 1.0]
    assert dropped([*some, *other], panel, agree={"share": 0.6}) == ["x"] * 4 + [None, None, "x"]
    assert dropped([*some, *other], panel, agree={"ways": 3}) == ["x"] * 7
    tie = [candidate(number, answer) for number, answer in enumerate(("red", "blue", "blue", "red"))]
    assert dropped(tie, panel, agree={}) == [None, "x", "x", None]  # of equals the one of the first way


def test_the_first_of_each_question_are_kept(panel: Says) -> None:
    some = [candidate(0, "1"), candidate(1, "2", "How?"), candidate(2, "3"), candidate(3, "4", "How?")]
    assert dropped(some, panel, first={}) == [None, None, "x", "x"]
    assert dropped(some, panel, first={"number": 2}) == [None] * 4


RECIPE: dict[str, Any] = {
    "data": "scenes?length=4&size=32",
    "models": {"writer": "tiny_vlm:scenes-teacher"},
    "propose": {
        "programs": {
            "tools": {name: {**how, "max_new_tokens": 3} for name, how in TOOLS.items()},
            "kinds": {
                "any": {
                    "asked": "(?P<colour>.*)",
                    "ways": {
                        "direct": {**KINDS["number"]["ways"]["direct"], "rationale": "It says {answer}."},
                        "regions": KINDS["number"]["ways"]["regions"],
                    },
                }
            },
        }
    },
    "verify": [{"first": {}}],
    "write": {"control": True, "why": "Why?"},
    "shard_samples": 2,
}


def engine(source: Any = None, **changes: Any) -> Engine:
    config = EngineConfig.from_mapping({**RECIPE, **changes})
    made = Engine(
        config, source=source or ScenesSource("train", size=32, length=4), models={"writer": make_writer().float()}
    )
    made.panel = Counts(made.panel.models, made.panel.device, made.panel.seed)
    return made


class Counts(Panel):
    """Answers that hold of the question and the region, without a model."""

    def drafts(self, candidates: Sequence[Candidate], how: AskConfig, *, name: str, number: int = 1) -> list[list[str]]:
        return [[f"word {len(each.question)}"] for each in candidates]


def test_rationales_are_questions_of_their_own_and_the_control_has_no_question_twice(tmp_path: Path) -> None:
    result = engine().run(tmp_path / "out")
    assert result.counts is not None
    lists = [open_source(f"jsonl:{tmp_path / 'out' / name}") for name in ("kept.jsonl", "random.jsonl")]
    kept, control = ([q for place in range(len(each)) for q in each[place].questions] for each in lists)
    assert len(kept) == len(control) == 2 * result.counts["kept"]
    asked = [question.id for question in control if not str(question.id).endswith("/why")]
    files = sorted(tmp_path.glob("out/shards/*/candidates.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]
    of = {line["id"]: (line["sample"], line["question"]) for line in lines}
    assert len({of[str(each)] for each in asked}) == len(asked) == result.counts["kept"]
    ways = {line["id"]: line["way"] for line in lines}
    assert {ways[str(each)] for each in asked} == {"direct", "regions"}
    first = {question.id: question for question in kept}
    for name, question in first.items():
        if not str(name).endswith("/why"):
            why = first[f"{name}/why"]
            assert why.question == f"{question.question}\nWhy?"
            assert why.answers == (f"It says {question.answers[0]}.",)


def test_a_stop_loses_the_shard_in_flight_and_another_program_is_refused(tmp_path: Path) -> None:
    class Stops(ScenesSource):
        def __getitem__(self, index: int) -> Sample:
            if index == 2:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    whole, out = tmp_path / "whole", tmp_path / "stopped"
    engine().run(whole)
    with pytest.raises(KeyboardInterrupt):
        engine(Stops("train", size=32, length=4)).run(out)
    assert engine().run(out).made == 1
    for name in ("kept.jsonl", "random.jsonl", "shards/000001/candidates.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    kinds = RECIPE["propose"]["programs"]["kinds"]
    other = {"any": {**kinds["any"], "asked": "(?P<colour>.+)"}}
    with pytest.raises(ConfigError, match=r"propose\.programs\.kinds\.any\.asked was .*, now"):
        engine(propose={"programs": {**RECIPE["propose"]["programs"], "kinds": other}}).run(out)


@pytest.mark.parametrize(
    ("sample", "changes", "told"),
    [
        (Sample("s", GREY), {}, "propose.programs reads questions that a kind takes, and of 2 samples"),
        (
            Sample("s", GREY, questions=(QuestionAnswer("What?", ()),)),
            {"verify": [{"label": {}}, {"first": {}}]},
            "verify.label reads questions with answers",
        ),
        (
            Sample("s", GREY),
            {
                "propose": {
                    "programs": {
                        "tools": {"glass": TOOLS["glass"]},
                        "kinds": {
                            "hop": {
                                "question": "How many?",
                                "ways": {"a": {"steps": {"seen": LOOK, "n": {"count": "seen"}}, "rationale": "{n}"}},
                            }
                        },
                    }
                }
            },
            "propose.programs reads boxes",
        ),
    ],
)
def test_data_without_what_is_read_are_refused(sample: Sample, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        engine([sample, sample], **changes)


def test_a_folder_keeps_the_order_of_its_ways(tmp_path: Path) -> None:
    engine().run(tmp_path)
    kind = RECIPE["propose"]["programs"]["kinds"]["any"]
    turned = {"any": {**kind, "ways": dict(reversed(kind["ways"].items()))}}
    with pytest.raises(ConfigError, match="its names stand in another order"):
        engine(propose={"programs": {**RECIPE["propose"]["programs"], "kinds": turned}}).run(tmp_path)


def test_programs_that_look_need_boxes_and_questions_that_fit() -> None:
    asked = Sample("s", GREY, questions=ASKED)
    with pytest.raises(ConfigError, match=r"propose\.programs reads boxes"):
        engine([asked, asked])
    fits = {"any": {**RECIPE["propose"]["programs"]["kinds"]["any"], "asked": "(?P<colour>Where).*"}}
    with pytest.raises(ConfigError, match="reads questions that a kind takes"):
        engine([SAMPLE, SAMPLE], **changed(kinds=fits))


def test_a_box_over_the_whole_picture_counts_once(panel: Says) -> None:
    whole = Box(0, 0, *GREY.size, "bed")
    sample = Sample("s", GREY, questions=(QuestionAnswer("How many?", ()),), boxes=(whole, whole))
    COLOURS[0, 0, *GREY.size] = "red"
    ways = {"all": {"steps": {"seen": LOOK, "n": {"count": "seen"}}}}
    tools = {"glass": TOOLS["glass"]}
    config = ProgramsConfig.model_validate({"tools": tools, "kinds": {"k": {"asked": ".*", "ways": ways}}})
    assert [each.answer for each in programs([(0, sample)], config, panel)] == ["1"]


def test_what_found_nothing_is_equal_to_nothing_and_asks_nothing(panel: Says) -> None:
    panel.whole["What colour?"] = ""
    colour = {"ask": {"tool": "eye", "question": "What colour?"}}
    ways = {
        "same": {"steps": {"a": colour, "b": colour, "n": {"same": {"first": "{a}", "second": "{b}"}}}},
        "hop": {"steps": {"a": colour, "n": {"ask": {"tool": "eye", "question": "How many {a} things?"}}}},
    }
    kinds = {"k": {"asked": "Why.*", "ways": ways}}
    config = ProgramsConfig.model_validate({"tools": {"eye": TOOLS["eye"]}, "kinds": kinds})
    same, hop = programs([(0, SAMPLE)], config, panel)
    assert (same.answer, hop.answer, hop.dropped) == ("no", None, "parsed")
    assert {question for question, _ in panel.asked} == {"What colour?"}


def test_an_empty_label_fits_nothing(panel: Says) -> None:
    for match in ("equal", "contained"):
        assert dropped([candidate(0, "red", accepted=("",))], panel, label={"match": match}) == ["x"]


def changed(**values: Any) -> dict[str, Any]:
    return {"propose": {"programs": {**RECIPE["propose"]["programs"], **values}}}


def one(**way: Any) -> dict[str, Any]:
    return changed(kinds={"k": {"asked": "(?P<colour>.*)", "ways": {"w": {"rationale": "x", **way}}}})


EYE = {"ask": {"tool": "eye", "question": "What?"}}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (one(steps={"a": {"ask": {"tool": "eye", "question": "Is {colur} it?"}}}), "did you mean 'colour'"),
        (one(steps={"a": {"ask": {"tool": "eye", "question": "Is {} it?"}}}), "braces that hold no name"),
        (one(steps={"a": {"ask": {"tool": "eyes", "question": "What?"}}}), "did you mean 'eye'"),
        (one(steps={"a": {"ask": {"tool": "glass", "question": "What?"}}}), "ask sees whole, look crop or boxed"),
        (one(steps={"a": {"look": {"tool": "eye", "questions": {"b": "What?"}}}}), "ask sees whole, look crop"),
        (one(steps={"seen": LOOK}), "the last step, gives things"),
        (one(steps={"seen": LOOK, "n": {"get": {"of": "seen", "attribute": "color"}}}), "there are colour"),
        (one(steps={"n": {"count": "seen"}}), "which no step before it gives"),
        (one(steps={"seen": LOOK, "n": {"same": {"first": "{seen}", "second": "x"}}}), "gives things, no text"),
        (one(steps={"colour": EYE}), "is the name of something else"),
        (one(steps={"a": {}}), "exactly one of"),
        (one(steps={"a": EYE}, rationale="It is {b}."), "which is no step"),
        (one(steps={"a": EYE}), "no step asks the tools glass"),
        (one(steps={"a": EYE, "seen": LOOK, "n": {"count": "seen"}}, rationale=None), "kinds.k.ways.w has none"),
        (changed(kinds={"k": {"asked": "(", "ways": {"w": {"steps": {"a": EYE}}}}}), "no regular expression"),
        (changed(kinds={"k": {"asked": "(?P<question>.*)", "ways": {"w": {"steps": {"a": EYE}}}}}), "another name"),
        (
            one(steps={"a": {"words": {"word": "{colour}", "becomes": {"2": "x", "two": "y"}}}}),
            "two words: 'x' and 'y'",
        ),
        (changed(kinds={"k": {"ways": {"w": {"steps": {"a": EYE}}}}}), "give asked"),
        ({"verify": [{"agree": {"ways": 3}}]}, "kinds.any has 2"),
        ({"verify": [{"first": {}}, {"agree": {}}]}, "let agree come before"),
        (changed(kinds={"k": {"asked": "a{99999999999999}", "ways": {"w": {"steps": {"a": EYE}}}}}), "no regular"),
        (one(steps={"seen": LOOK, "n": {"side": {"of": "seen", "to": "seen", "side": "leftof"}}}), "is no side"),
        ({"propose": {"questions": {"by": "writer"}}, "verify": [{"first": {}}]}, "first reads several answers"),
        ({"propose": {"questions": {"by": "writer"}}, "verify": []}, "write.why asks for a rationale"),
        ({"propose": {"written": {"by": "writer", "instruction": "Ask."}}, "verify": [{"label": {}}]}, "label reads"),
        ({"write": {"picture": "boxed"}}, "regions: true"),
    ],
)
def test_recipes_that_cannot_work_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        EngineConfig.from_mapping({**RECIPE, **changes})
