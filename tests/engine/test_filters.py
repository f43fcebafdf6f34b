"""Votes, hard questions, critics and regions: each function against its definition, or against published code."""

from __future__ import annotations

import json
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from cmapkd.config import ConfigError
from cmapkd.data.dialogues import Turn, join_items
from cmapkd.data.types import Box, QuestionAnswer, Sample
from cmapkd.engine import Engine, EngineConfig
from cmapkd.engine.candidates import Candidate, boxed, elsewhere, expanded
from cmapkd.engine.critics import CriticConfig, judge
from cmapkd.engine.filters import FilterConfig, HardConfig, MajorityConfig, majority, verify
from cmapkd.engine.proposals import ProposeConfig, RelationConfig, propose
from cmapkd.engine.regions import inside, is_small, regions_of
from cmapkd.engine.written import AskConfig, Panel
from cmapkd.evaluation.token_scores import answer_rows
from cmapkd.evaluation.vqa import normalise_answer
from cmapkd.models import DualEncoder, build_model
from cmapkd.models.token_types import TokenNeeds
from writers import make_writer

ZOOM = json.loads((Path(__file__).parent / "fixtures" / "zoom_without_zoom.json").read_text())
GREY = Image.new("RGB", (64, 48), (128, 128, 128))
PANEL = Panel({"writer": make_writer().float()}, torch.device("cpu"), seed=3, batch_size=4)


def sample(*boxes: Box, name: str = "s") -> Sample:
    return Sample(name, GREY, boxes=boxes)


def candidate(number: int = 0, **values: Any) -> Candidate:
    return Candidate(sample(), 0, number, "What is it?", **values)


def test_boxes_are_expanded_and_crops_refused_as_published() -> None:
    for size, box, larger, small in ZOOM["rows"]:
        assert expanded(tuple(box), tuple(size)) == pytest.approx(larger, abs=1e-12)
        assert is_small(inside(tuple(box), tuple(size)), tuple(size)) == small
    assert len({row[3] for row in ZOOM["rows"]}) == 2


def test_regions_are_small_and_bear_a_name_alone() -> None:
    boxes = (
        Box(1, 1, 9, 9, "red ring"),
        Box(20, 20, 9, 9, "blue star"),
        Box(40, 20, 9, 9, "blue star"),
        Box(0, 0, 60, 40, "large square"),
        Box(30, 1, 9, 9, "crowd", crowd=True),
        Box(60, 40, 20, 20, "lime heart"),
    )
    assert regions_of(sample(*boxes), 0.1) == [(1, 1, 10, 10), (60, 40, 64, 48)]


def test_a_crop_holds_the_region_and_a_frame_surrounds_it() -> None:
    shown = candidate(box=(10.2, 8.0, 19.5, 15.0))
    assert shown.picture("crop").size == (20 - 10, 15 - 8)
    assert shown.picture("crop", 1.0).size == (29 - 0, 22 - 1)
    frame = shown.picture("boxed")
    red = {(x, y) for x in range(64) for y in range(48) if frame.getpixel((x, y)) == (255, 0, 0)}
    left, top, right, bottom = expanded((10.2, 8.0, 19.5, 15.0), GREY.size)
    assert all(left - 1 <= x <= right + 1 and top - 1 <= y <= bottom + 1 for x, y in red)
    assert len(red) > 20
    assert frame.getpixel((14, 11)) == (128, 128, 128)
    assert GREY.getpixel((10, 8)) == (128, 128, 128)  # the sample's own picture stays
    assert boxed(GREY, (0, 0, 64, 48)).getpixel((63, 47)) == (255, 0, 0)  # the frame lies within
    with pytest.raises(ValueError, match="no region"):
        candidate().picture("crop")


def test_the_note_stands_behind_questions_about_boxed_pictures_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    panel = replace(PANEL, note="In the box.")
    asked: list[str] = []
    processor = type(panel.models["writer"].processor)  # type: ignore[union-attr]
    read = processor.read

    def noticed(self: Any, turns: Any, pictures: Any) -> Any:
        asked.append(turns[0].text)
        return read(self, turns, pictures)

    monkeypatch.setattr(processor, "read", noticed)
    for sees in ("whole", "crop", "boxed"):
        how = AskConfig(by="writer", sees=sees, max_new_tokens=1, suffix="Answer:")
        panel.drafts([candidate(box=(10.0, 8.0, 19.0, 15.0))], how, name="a")
    assert asked == ["What is it?\nAnswer:", "What is it?\nAnswer:", "What is it?\n\nIn the box.\nAnswer:"]


def test_a_box_elsewhere_has_its_size_within_the_picture() -> None:
    places = [elsewhere((10, 8, 19, 15), GREY.size, 0, number) for number in range(50)]
    assert all((x1 - x0, y1 - y0) == pytest.approx((9, 7)) for x0, y0, x1, y1 in places)
    assert all(x0 >= 0 and y0 >= 0 and x1 <= 64 and y1 <= 48 for x0, y0, x1, y1 in places)
    assert places[0] != places[1]
    assert places[0] == elsewhere((10, 8, 19, 15), GREY.size, 0, 0)


def test_the_majority_is_counted_in_words_of_vqa() -> None:
    drafts = ["The Ring.", "a ring", "star", "ring", "", "two", "2", "ring"]
    counts = Counter(map(normalise_answer, drafts))
    assert majority(drafts) == ("The Ring.", counts["ring"] / 8)
    assert majority(["a star", "ring"]) == ("a star", 0.5)
    assert majority(["", "?"]) == (None, 0.0)


def test_votes_of_several_models_count_together_and_few_right_drafts_are_hard() -> None:
    first = candidate(answers={"a": ["red"] * 3 + ["blue"], "b": ["red"] * 3 + ["lime"], "own": ["red", "x", "x", "x"]})
    second = candidate(1, answers={"a": ["red"] * 2 + ["blue"] * 2, "b": ["red"] * 3 + ["lime"], "own": ["red"] * 4})
    both = [first, second]
    verify(both, FilterConfig(majority=MajorityConfig(of=("a", "b"))), "majority", PANEL)
    assert [(each.answer, each.scores["majority"], each.dropped) for each in both] == [
        ("red", 0.75, None),
        ("red", 0.625, "majority"),
    ]
    easy = replace(first, answers={"own": ["Red", "a red", "x", "x"]}, scores={})
    for each, right, dropped in ((first, 1.0, None), (easy, 2.0, "hard")):
        verify([each], FilterConfig(hard=HardConfig(by="own")), "hard", PANEL)
        assert (each.scores["hard"], each.dropped) == (right, dropped)


def test_drafts_that_no_model_can_read_have_no_vote() -> None:
    both = [
        candidate(answers={"a": ["<image> red"] * 3 + ["red"]}),
        candidate(1, answers={"a": ["x" * 3000] + ["red"] * 3}),
    ]
    verify(both, FilterConfig(majority=MajorityConfig(of=("a",))), "majority", PANEL)
    assert [(each.answer, each.scores["majority"], each.dropped) for each in both] == [
        ("red", 0.25, "majority"),
        ("red", 0.75, None),
    ]


def test_facts_are_of_each_small_region() -> None:
    class Says(Panel):
        def drafts(self, candidates: Any, *_: Any, **__: Any) -> list[list[str]]:
            return [[f"{int(each.box[0])}", "x", f"{int(each.box[0])}."] for each in candidates]

    boxes = (Box(1, 1, 9, 9, "ring"), Box(20, 20, 9, 9, "star"), Box(0, 0, 60, 40, "large square"))
    facts = {**FACTS["facts"], "regions": True, "sees": "crop"}
    found = propose(
        [(0, sample(*boxes))], ProposeConfig.model_validate({"facts": facts}), Says(PANEL.models, PANEL.device)
    )
    assert [(each.answer, each.statement, each.box) for each in found] == [
        (tail, f"it is {tail}", box)
        for box, tails in (((1, 1, 10, 10), ("1", "x")), ((20, 20, 29, 29), ("20", "x")))
        for tail in tails
    ]
    assert len({each.id for each in found}) == 4


@pytest.mark.parametrize("kind", ["written", "questions", "facts"])
def test_an_answer_with_a_control_token_is_dropped(kind: str) -> None:
    class Says(Panel):
        def drafts(self, candidates: Any, *_: Any, **__: Any) -> list[list[str]]:
            return [["Question: What is it?\nAnswer: <image> red"] for _ in candidates]

    settings: dict[str, Any] = {
        "written": {"instruction": "Ask."},
        "questions": {},
        "facts": {"drafts": 1, "relations": {"kind": {"question": "What?", "statement": "it is {}"}}},
    }
    config = ProposeConfig.model_validate({kind: {"by": "writer", **settings[kind]}})
    own = Sample("s", GREY, questions=(QuestionAnswer("What?", ("red",)),))
    (found,) = propose([(0, own)], config, Says(PANEL.models, PANEL.device))
    assert found.dropped == "readable"


def test_what_a_model_writes_again_of_a_picture_is_dropped() -> None:
    class Says(Panel):
        def drafts(self, candidates: Any, *_: Any, **__: Any) -> list[list[str]]:
            texts = ("Is it red?\nAnswer: yes", "is it RED?\nanswer: Yes", "Is it red?\nAnswer: no")
            return [["Question: " + texts[place % 3]] for place in range(len(candidates))]

    panel, asks = Says(PANEL.models, PANEL.device), {"by": "w", "instruction": "Ask.", "number": 3, "temperature": 1}
    samples = [(0, sample(Box(1, 1, 9, 9, "ring"))), (1, sample(Box(1, 1, 9, 9, "ring"), name="t"))]
    found = propose(samples, ProposeConfig.model_validate({"written": asks}), panel)
    assert [each.dropped for each in found] == [None, "repeated", None] * 2
    found = propose(samples, ProposeConfig.model_validate({"crops": {"written": asks}}), panel)
    assert [each.dropped for each in found] == [None, "repeated", "repeated"] * 2


def test_pictures_are_drawn_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Any] = []
    most = []

    def picture(*_: Any) -> Image.Image:
        drawn = GREY.copy()
        held.append(weakref.ref(drawn))
        most.append(sum(each() is not None for each in held))
        return drawn

    monkeypatch.setattr(Candidate, "picture", picture)
    PANEL.drafts([candidate(place) for place in range(12)], AskConfig(by="writer", max_new_tokens=1), name="x")
    assert len(most) == 12
    assert max(most) <= PANEL.batch_size + 1


def test_facts_are_the_different_answers_of_each_relation() -> None:
    relations = {"kind": {"question": "What is it?", "statement": "it is {}", "tails": ["red", "no"]}}
    config = ProposeConfig.model_validate(
        {"facts": {"by": "writer", "relations": relations, "temperature": 1.5, "drafts": 5, "max_new_tokens": 2}}
    )
    found = propose([(0, sample()), (1, sample(name="t"))], config, PANEL)
    assert len({each.id for each in found}) == len(found)
    assert len({(each.sample.id, normalise_answer(each.answer or "")) for each in found}) == len(found)
    assert {each.dropped for each in found} <= {None, "parsed"}
    for each in found:
        if each.dropped is None:
            assert (each.statement, each.alternatives) == (f"it is {each.answer}", ("it is red", "it is no"))
    for wrong in ("it is", "{} is {}", "it is {0}", "{a} {}"):
        with pytest.raises(ValueError, match="needs one"):
            RelationConfig(question="What?", statement=wrong)
    assert RelationConfig(question="What?", statement="it is {}").states("{x} {}") == "it is {x} {}"


def test_a_critic_that_writes_gives_its_probability_of_yes() -> None:
    model: Any = PANEL.models["writer"]
    facts = [candidate(statement="it is red"), candidate(1, statement="<image> it is"), candidate(2, statement="a no")]
    scores = judge(facts, CriticConfig(by="writer", threshold=0.5, question="Is {}?"), PANEL)
    assert scores[1] == 0  # it cannot read it
    for place in (0, 2):
        asked = (Turn("user", f"Is {facts[place].statement}?", 1), Turn("assistant", "yes"))
        item = model.processor.read(asked, [GREY])
        with torch.no_grad():
            features = model(join_items([item], model.processor.pad_id), TokenNeeds())
            first = model.logits(answer_rows(features).values[:1])[0].softmax(-1)
        words = {word: {model.processor.encode_answer(s)[0] for s in (word, word.title())} for word in ("yes", "no")}
        yes, no = (float(first[sorted(words[word])].sum()) for word in ("yes", "no"))
        assert scores[place] == pytest.approx(yes / (yes + no), abs=1e-5)


def test_a_critic_of_two_towers_compares_with_the_other_tails() -> None:
    critic = build_model("tiny:scenes-teacher")
    assert isinstance(critic, DualEncoder)
    panel = replace(PANEL, models={"critic": critic})
    others = ("it is red", "it is blue")
    facts = [
        candidate(statement="it is red", alternatives=others),
        candidate(1, statement="it is new", alternatives=others),
        candidate(2, statement="it is Red.", alternatives=others),  # no third one
    ]
    scores = judge(facts, CriticConfig(by="critic", threshold=0.5), panel)
    scale = critic.log_logit_scale.detach().exp()
    two = ["it is red", "it is blue"]
    for score, texts in zip(scores, (two, ["it is new", *two], two), strict=True):
        expected = (scale * critic.embed([GREY], texts).similarity).softmax(-1)[0, 0]
        assert score == pytest.approx(float(expected), abs=1e-5)
    assert judge([], CriticConfig(by="critic", threshold=0.5), panel) == []
    two_regions = [replace(facts[0], box=box) for box in ((0.0, 0.0, 9.0, 9.0), (4.0, 4.0, 60.0, 40.0))]
    sharp = Image.linear_gradient("L").resize(GREY.size).convert("RGB")
    own = [replace(each, sample=Sample("s", sharp)) for each in two_regions]
    scores = judge(own, CriticConfig(by="critic", threshold=0.5, sees="crop", margin=0.5), panel)
    for score, each in zip(scores, own, strict=True):
        expected = (scale * critic.embed([each.picture("crop", 0.5)], two).similarity).softmax(-1)[0, 0]
        assert score == pytest.approx(float(expected), abs=1e-5)
    assert scores[0] != scores[1]


def test_relations_have_their_own_thresholds() -> None:
    config = CriticConfig(by="critic", threshold=0.5, thresholds={"texture": 0.2})
    assert [config.keeps(name, 0.3) for name in ("texture", "shape", None)] == [True, False, False]


def test_a_model_that_cannot_judge_is_refused() -> None:
    silent: Any = SimpleNamespace(name="silent", does="says nothing")
    panel = replace(PANEL, models={"critic": silent})
    with pytest.raises(ConfigError, match=r"models\.critic is silent, which says nothing: a critic"):
        judge([candidate(statement="it is")], CriticConfig(by="critic", threshold=0.5), panel)


def test_models_are_checked_before_anything_is_asked() -> None:
    critic = {
        "propose": {"facts": {**FACTS["facts"], "by": "writer"}},
        "verify": [{"critic": {"by": "c", "threshold": 0.5}}],
    }
    config = EngineConfig.from_mapping({"data": "scenes", "models": {"writer": "x", "c": "y"}, **critic})
    models = {**PANEL.models, "c": build_model("tiny:scenes-teacher")}
    with pytest.raises(ConfigError, match=r"relations\.kind\.tails has 0: models\.c compares"):
        Engine(config, models=models)
    silent: Any = SimpleNamespace(name="silent", does="says nothing")
    with pytest.raises(ConfigError, match=r"models\.c is silent"):
        Engine(config, models={**models, "c": silent})


ASKS = {"by": "a", "temperature": 1.0}
FACTS = {"facts": {"by": "a", "drafts": 1, "relations": {"kind": {"question": "What?", "statement": "it is {}"}}}}
OWN = {"questions": {"by": "a"}}
CROPS = {"crops": {"questions": ["What is it?"]}}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"propose": CROPS}, "let a majority come first"),
        ({"propose": {"crops": {}}}, "give questions, or written"),
        ({"propose": {"facts": {**FACTS["facts"], "drafts": 3}}}, "set a temperature above 0"),
        (
            {"propose": {"questions": {"by": "a"}}, "verify": [{"critic": {"by": "a", "threshold": 0.5}}]},
            "a critic reads statements",
        ),
        (
            {"propose": FACTS, "verify": [{"critic": {"by": "a", "threshold": 0.5, "thresholds": {"kin": 0.5}}}]},
            "did you mean 'kind'",
        ),
        (
            {"propose": FACTS, "verify": [{"critic": {"by": "a", "threshold": 0.5, "question": "Is it true?"}}]},
            "needs one {}, where the statement goes",
        ),
        (
            {"propose": FACTS, "verify": [{"critic": {"by": "a", "threshold": 0.5, "question": "As {json}: {}?"}}]},
            "no other braces",
        ),
        ({"propose": {"questions": {"by": "a", "margin": 2}}}, "margin: 2 widens a crop, and sees is whole"),
        ({"propose": {"questions": {"by": "a", "top_p": 0.5}}}, "top_p: 0.5 limits draws"),
        ({"answers": {"d": ASKS}, "verify": [{"hard": {"by": "d"}}]}, "nothing would be dropped"),
        ({"answers": {"d": {**ASKS, "drafts": 8}}, "verify": [{"hard": {"by": "d", "most": 8}}]}, "nothing would be"),
        ({"answers": {"d": {**ASKS, "drafts": 8}}, "verify": [{"right": {"by": "d"}}]}, "right reads one draft"),
        (
            {"answers": {"d": {**ASKS, "drafts": 8}, "e": ASKS}, "verify": [{"parity": {"right": "e", "wrong": "d"}}]},
            r"parity reads one draft, and answers\.d has 8",
        ),
        ({"propose": {"facts": {**FACTS["facts"], "regions": True}}}, "sees: whole shows none"),
        ({"propose": {"facts": {**FACTS["facts"], "most_area": 0.2}}}, "most_area: 0.2 limits regions"),
        (
            {"propose": FACTS, "verify": [{"critic": {"by": "a", "threshold": 0.5, "margin": 1}}]},
            "margin: 1 widens a crop",
        ),
        ({"propose": FACTS, "verify": [{"critic": {"by": "a", "threshold": 0.5, "sees": "crop"}}]}, "regions: true"),
        ({"propose": FACTS, "verify": [{"critic": {"by": "b", "threshold": 0.5}}]}, "names the model 'b'"),
        ({"propose": FACTS, "verify": [{"critic": {"by": "a", "threshold": 50}}]}, "<= 1"),
        (
            {"propose": FACTS, "verify": [{"critic": {"by": "a", "threshold": 0.5}, "majority": {"of": ["c"]}}]},
            "exactly",
        ),
    ],
)
def test_recipes_that_cannot_work_are_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        EngineConfig.from_mapping(
            {"data": "scenes", "models": {"a": "tiny_vlm:scenes-teacher"}, "propose": OWN, **values}
        )
