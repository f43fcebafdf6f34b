"""What an evaluation asks: dialogues of the data, and the words that a run was trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from writing_support import LookupModel

from cmapkd.data.config import PromptConfig
from cmapkd.data.open import open_source
from cmapkd.evaluation.config import SuiteConfig, WritingConfig
from cmapkd.evaluation.dialogues import questions, references
from cmapkd.evaluation.probes.data import read_annotations
from cmapkd.evaluation.suite import evaluate_models

LINES = (
    {
        "image": "a.png",
        "messages": [
            {"role": "user", "content": "<image>What?"},
            {"role": "assistant", "content": "a dog"},
            {"role": "user", "content": "Big?"},
            {"role": "assistant", "content": "yes"},
        ],
    },
    {"image": "b.png", "qa": [{"question": "Cat?", "answer": "no", "kind": "yes/no", "category": "animals"}]},
    {"image": "b.png", "caption": "a cat"},
)


@pytest.fixture
def source(tmp_path: Path) -> Any:
    for name in ("a", "b"):
        Image.new("RGB", (8, 8), (7, 0, 0)).save(tmp_path / f"{name}.png")
    (tmp_path / "said.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    return open_source(f"jsonl:{tmp_path}/said.jsonl")


def test_the_last_answer_of_a_dialogue_is_judged(source: Any) -> None:
    model = LookupModel({(7, "What?a dogBig?"): "Yes", (7, "Cat?"): "yes"})
    config = SuiteConfig.from_mapping({"tasks": ["answering", "perplexity"]})
    found = evaluate_models({"m": model}, source, config, device="cpu")["m"]
    assert found["answering"]["num_questions"] == 2
    assert found["answering"]["overall"] == pytest.approx(50)
    assert found["answering"]["by_kind"] == {"yes/no": pytest.approx(50)}
    assert found["perplexity"]["num_bytes"] == len("yes") + len("no")  # the earlier answer is given, not judged
    assert found["perplexity"]["num_tokens"] == len("yes") + len("no") + 2


def test_earlier_answers_are_not_learned(source: Any) -> None:
    (dialogue, question) = questions(read_annotations(source), WritingConfig().resolved)
    assert [turn.learned for turn in dialogue.dialogue] == [True, False, True, True]
    assert dialogue.num_bytes == 3
    assert question.question is not None
    assert question.question.category == "animals"  # survives the table


def test_the_kind_of_prompts_decides_what_is_asked(source: Any) -> None:
    said = read_annotations(source)

    def asked(kind: str) -> list[str]:
        how = WritingConfig().like(PromptConfig.from_mapping({"kind": kind}))
        return [each.dialogue[-1].text for each in references(said, how)]

    assert asked("auto") == ["yes", "no"]
    assert asked("turns") == ["yes"]
    assert asked("questions") == ["no"]
    assert asked("captions") == ["a cat"]


def test_own_words_win_over_those_of_the_training() -> None:
    prompts = PromptConfig(suffix="Briefly.", plain_captions=True)
    trained = WritingConfig().like(prompts)
    assert (trained.question_suffix, trained.instruction, trained.asks) == ("Briefly.", "", "auto")
    own = WritingConfig(question_suffix="", instruction="What?").like(prompts)
    assert (own.question_suffix, own.instruction) == ("", "What?")
    alone = WritingConfig().resolved
    assert (alone.question_suffix, alone.instruction) == ("", "Describe the image.")
