"""Tasks of models that write, against numbers that were worked out by hand."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from writing_support import ASK, CAPTIONS, SHARPNESS, SIZE, TABLE, AskedSource, ByteProcessor, LookupModel

from cmapkd.data.dialogues import ChatItem, Dialogue, Turn
from cmapkd.data.prompting import Prompting
from cmapkd.data.records import kind_of
from cmapkd.data.types import BadSampleError, QuestionAnswer, Sample
from cmapkd.data.views import WHOLE, draw_view
from cmapkd.evaluation import SuiteConfig, caption_tools, evaluate_models
from cmapkd.evaluation.captioning import CaptionScores, caption_scores
from cmapkd.evaluation.config import WritingConfig
from cmapkd.evaluation.dialogues import questions
from cmapkd.evaluation.headline import headlines, scored_set
from cmapkd.evaluation.probes.data import Annotations
from cmapkd.evaluation.table import score_table
from cmapkd.evaluation.tasks import describing
from cmapkd.evaluation.tools import MissingToolError
from cmapkd.evaluation.yes_no import YesNoScores, is_clear, is_yes
from cmapkd.results import gap_closed
from cmapkd.results import score_table as result_table
from helpers import make_model

Z = math.exp(SHARPNESS) + SIZE - 1
HIT, MISS = math.log(Z) - SHARPNESS, math.log(Z)  # nats of a token that the model would write, and of any other


def scores_of(*tasks: str, model: Any = None, source: Any = None, **settings: Any) -> dict[str, Any]:
    config = SuiteConfig.from_mapping({**({"tasks": tasks} if tasks else {}), **settings})
    models = {"m": model or LookupModel(TABLE)}
    return evaluate_models(models, source or AskedSource(), config, device="cpu")["m"]


@pytest.fixture
def no_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    """The COCO tool takes seconds, and is tested for itself."""

    def missing() -> str:
        raise MissingToolError("no Java")

    monkeypatch.setattr(caption_tools, "java", missing)


def test_answers_by_the_rules_of_vqa() -> None:
    scores = scores_of("answering")
    found = scores["answering"]
    assert found["overall"] == pytest.approx(40)  # `Yes.` and `Two` are right; `maybe` and a cut answer are not
    assert found["by_kind"] == {"yes/no": pytest.approx(100 / 3), "number": 100, "other": 0}
    assert found["exact"] == pytest.approx(40)
    assert (found["commonest"], found["prior"]) == ("yes", pytest.approx(40))
    assert found["unended"] == pytest.approx(20)  # `dark red w`, after ten bytes
    assert (found["num_questions"], found["num_not_asked"]) == (5, 0)
    assert found["protocol"] == {
        "batch_size": 16,
        "precision": "float32",
        "max_new_tokens": 10,
        "question_suffix": "",
    }
    assert scores["scored"] == {
        "images": 3, "captions": 0, "questions": 5, "skipped": 0, "samples": 3, "limit": None
    }  # fmt: skip
    assert scored_set(scores) == "scored on 3 images and 5 questions"


def test_the_reference_is_the_answer_that_a_training_learns() -> None:
    asked_of_it = (QuestionAnswer("What color?", ("", "red")), QuestionAnswer("Which one?", ("", "")))
    said = Annotations((0,), ("one",), ((4, 4),), ((),), (asked_of_it,), ((),), ((),))
    (asked,) = questions(said, WritingConfig().resolved)  # the second question has no answer
    sample = Sample("one", Image.new("RGB", (4, 4)), questions=asked_of_it)
    assert Prompting().asked(sample) == (asked.question,)
    learned = Prompting().choose(sample, draw_view("one", 0, WHOLE, (4, 4)), 0)
    assert asked.dialogue == learned
    assert learned[-1].text == "red"


def test_yes_and_no_as_pope_counts_them() -> None:
    found = scores_of("yes_no")["yes_no"]
    assert found["accuracy"] == pytest.approx(200 / 3)  # the published rule takes `maybe` for yes
    assert found["precision"] == pytest.approx(200 / 3)
    assert (found["recall"], found["f1"], found["yes_ratio"]) == (100, pytest.approx(80), 100)
    assert (found["num_unclear"], found["accuracy_strict"]) == (1, pytest.approx(100 / 3))
    assert {name: each["f1"] for name, each in found["by_category"].items()} == {"a": pytest.approx(200 / 3), "b": 100}
    assert found["mean_f1"] == pytest.approx((200 / 3 + 100) / 2)
    odds = found["by_odds"]  # of Y and y against N and n, as the answers begin: Y, y, m
    assert (odds["accuracy"], odds["yes_ratio"]) == (pytest.approx(100 / 3), pytest.approx(200 / 3))
    tilt = math.log((math.exp(SHARPNESS) + 1) / 2)
    assert odds["mean_margin"] == pytest.approx((tilt - tilt + 0) / 3, abs=1e-6)


@pytest.mark.parametrize(
    ("answer", "yes", "clear"),
    [
        ("Yes", True, True),
        ("No", False, True),
        ("no, there is none", False, True),
        ("There is not a dog.", False, True),
        ("Yes. No dog is hidden", True, False),
        ("NO", True, True),  # the published parser knows no other spelling
        ("no\nyes", True, False),  # nor other blanks
        ("no.", False, True),
        (" no", False, True),
        ("nothing", True, False),
        ("maybe", True, False),
        ("", True, False),
    ],
)
def test_answers_are_read_as_the_published_parser_reads_them(answer: str, yes: bool, clear: bool) -> None:
    assert is_yes(answer) is yes
    assert is_clear(answer) is clear


def test_yes_no_scores_without_any_yes() -> None:
    found = YesNoScores.of([False, False], [False, True]).to_dict()
    assert (found["accuracy"], found["precision"], found["recall"], found["f1"]) == (50, None, 0, 0)
    assert YesNoScores.of([False], [False]).to_dict()["f1"] is None


def test_bits_per_byte_and_what_the_picture_is_worth() -> None:
    found = scores_of("perplexity")["perplexity"]
    nats = 2 * HIT + 15 * MISS  # `es` of the first yes, of 17 tokens
    assert (found["num_tokens"], found["num_bytes"], found["num_references"]) == (17, 12, 5)
    assert found["nll"] == pytest.approx(nats / 17)
    assert found["perplexity"] == pytest.approx(math.exp(nats / 17))
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / 12)
    assert found["negative_bits_per_byte"] == -found["bits_per_byte"]
    wrong = (8 * HIT + 9 * MISS) / math.log(2) / 12  # each picture's questions with the next picture
    assert found["wrong_picture"]["bits_per_byte"] == pytest.approx(wrong)
    assert found["visual_gain"] == pytest.approx(wrong - found["bits_per_byte"])


def test_logits_are_made_of_few_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scores_of("perplexity")["perplexity"]["bits_per_byte"]
    sizes = []

    class Counted(LookupModel):
        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            sizes.append(len(hidden))
            return super().logits(hidden)

    monkeypatch.setattr("cmapkd.evaluation.token_scores._BLOCK_LOGITS", 3 * SIZE + 1)
    assert scores_of("perplexity", model=Counted(TABLE))["perplexity"]["bits_per_byte"] == pytest.approx(whole)
    assert max(sizes) == 3
    assert sum(sizes) == 2 * 17


def test_captions_are_read_where_nothing_is_asked() -> None:
    scores = scores_of("perplexity", source=AskedSource(questions=False))
    found = scores["perplexity"]
    assert (found["of"], found["num_references"]) == ("captions", 6)
    assert found["num_bytes"] == sum(len(text) for texts in CAPTIONS for text in texts)
    assert found["num_tokens"] == found["num_bytes"] + 6
    assert scored_set(scores) == "scored on 3 images and 6 captions"


@pytest.fixture(scope="module")
def with_tool() -> tuple[dict[str, Any], list[tuple[Any, CaptionScores]]]:
    """Scores of all tasks by the COCO tool, which takes seconds; and what the tool was given each time, and found."""
    calls: list[tuple[Any, CaptionScores]] = []

    def watched(*given: Any) -> CaptionScores:
        calls.append((given, caption_scores(*given)))
        return calls[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(describing, "caption_scores", watched)
        return scores_of(), calls


def test_descriptions_by_the_tool(with_tool: tuple[dict[str, Any], list[tuple[Any, CaptionScores]]]) -> None:
    found, ((given, scores),) = with_tool[0]["describing"], with_tool[1]
    said = dict(zip(("s0", "s1", "s2"), ("a red dog", "one cat", ""), strict=True))
    assert given == (said, {f"s{number}": list(texts) for number, texts in enumerate(CAPTIONS)})
    assert found["cider"] == scores.corpus["cider"]
    assert found["shown"]["cider"] == 100 * found["cider"]
    assert found["examples"] == said
    assert found["empty"] == pytest.approx(100 / 3)


def test_descriptions_without_the_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise MissingToolError("no such package")

    monkeypatch.setattr(caption_tools, "library_folder", missing)
    scores = scores_of("describing")
    found = scores["describing"]
    assert found["unavailable"] == "no such package"
    # without articles, and `one` is 1: red dog of red dog runs; 1 cat of 1 cat; nothing of birds
    assert found["word_f1"] == pytest.approx(100 * (4 / 5 + 1 + 0) / 3)
    assert found["exact"] == pytest.approx(100 / 3)
    assert (found["num_words"], found["median_words"]) == (pytest.approx(5 / 3), 2)
    assert "describing" not in headlines(scores)


def test_agreement_token_by_token() -> None:
    models = {"t": LookupModel(TABLE), "s": LookupModel({**TABLE, (20, "Cat?"): "yes"})}
    config = SuiteConfig(tasks=("token_agreement",))
    found = evaluate_models(models, AskedSource(), config, device="cpu")
    teacher, student = (found[name]["token_agreement"] for name in ("t", "s"))
    assert (teacher["top1"], teacher["kl"]) == (100, 0)
    assert student["top1"] == pytest.approx(100 * 13 / 17)  # they differ in all of `yes` and its end
    assert student["kl"] == pytest.approx(4 * SHARPNESS * (math.exp(SHARPNESS) - 1) / Z / 17, rel=1e-5)
    assert (student["num_tokens"], student["teacher"]) == (17, "t")


def test_agreement_is_over_what_all_can_read() -> None:
    models = {"t": LookupModel(TABLE), "s": LookupModel(TABLE, most=10)}  # which cannot read three of the questions
    config = SuiteConfig.from_mapping({"tasks": ["token_agreement"], "writing": {"batch_size": 1}})
    found = evaluate_models(models, AskedSource(), config, device="cpu")
    assert found["s"]["token_agreement"]["num_not_asked"] == 2
    assert found["t"]["token_agreement"]["num_tokens"] == 4 + 3 + 4
    assert (found["t"]["bad_samples"], found["s"]["bad_samples"]) == (0, 2)


def test_agreement_refuses_other_vocabularies() -> None:
    models = {"t": LookupModel(TABLE), "s": LookupModel(TABLE, pieces="others")}
    with pytest.raises(ValueError, match=r"same vocabulary: t has 259 tokens .*, s 259 .*bits per byte"):
        evaluate_models(models, AskedSource(), SuiteConfig(tasks=("token_agreement",)), device="cpu")


@pytest.mark.parametrize("changes", [{"end_ids": (257,)}, {"lead": " "}])
def test_agreement_refuses_other_ends_and_beginnings(changes: dict[str, Any]) -> None:
    other = LookupModel(TABLE)
    other.vocabulary = replace(other.vocabulary, **changes)
    models = {"t": LookupModel(TABLE), "s": other}
    with pytest.raises(ValueError, match=r"answers of the same tokens: t begins them with '' and ends them with token"):
        evaluate_models(models, AskedSource(), SuiteConfig(tasks=("token_agreement",)), device="cpu")


@pytest.mark.usefixtures("no_tool")
def test_other_vocabularies_cost_no_other_score() -> None:
    models = {"t": LookupModel(TABLE), "s": LookupModel(TABLE, pieces="others")}
    said = Console(file=io.StringIO(), width=400)
    cost = {"new_tokens": 2, "rounds": 3, "warmup": 0, "picture_size": 16}
    config = SuiteConfig.from_mapping({"tasks": "all", "generation": cost})
    found = evaluate_models(models, AskedSource(), config, device="cpu", console=said)
    assert found["s"].keys() >= {"answering", "describing", "perplexity", "generation"}
    assert "token_agreement" not in found["s"]
    assert "not measured: token_agreement: it compares models with the same vocabulary" in said.file.getvalue()  # type: ignore[attr-defined]


class Answers(AskedSource):
    """The usual pictures, each with one question and the answers that a test gives."""

    def __init__(self, *answers: str) -> None:
        super().__init__(captions=False)
        self.answers = answers

    def __getitem__(self, index: int) -> Sample:
        given = (self.answers[index],)
        return replace(super().__getitem__(index), questions=(QuestionAnswer("So?", given, kind_of(given)),))


@pytest.mark.usefixtures("no_tool")
def test_true_and_false_are_no_yes_and_no() -> None:
    source = Answers("true", "false", "true")  # of kind yes/no
    found = scores_of(source=source)
    assert "answering" in found
    assert "yes_no" not in found
    with pytest.raises(ValueError, match="yes_no: none of its 3 readable samples has a yes/no question whose answer"):
        scores_of("yes_no", source=source)


@pytest.mark.usefixtures("no_tool")
def test_a_limit_is_kept_where_it_is_asked_what_can_be_measured() -> None:
    found = scores_of(source=Answers("red", "blue", "yes"), limit=2)
    assert found["answering"]["num_questions"] == 2
    assert "yes_no" not in found
    assert "yes_no" in scores_of(source=Answers("red", "blue", "yes"))


@pytest.mark.usefixtures("no_tool")
def test_what_was_not_trained_is_not_asked() -> None:
    def tasks(asks: str, **source: bool) -> set[str]:
        found = scores_of(source=AskedSource(**source), writing={"asks": asks})
        return found.keys() & {"answering", "yes_no", "describing", "perplexity"}

    assert tasks("captions") == {"describing", "perplexity"}
    assert tasks("questions") == {"answering", "yes_no", "perplexity"}
    assert tasks("both") == tasks("auto") == {"answering", "yes_no", "describing", "perplexity"}
    assert tasks("captions", captions=False) == tasks("turns") == {"perplexity"}  # of what there is
    with pytest.raises(ValueError, match=r"answering: .* asked for captions alone \(writing\.asks\)"):
        scores_of("answering", writing={"asks": "captions"})


@pytest.mark.usefixtures("no_tool")
def test_a_task_whose_dialogues_are_too_long_costs_no_other_score() -> None:
    source = Answers("red", "yes", "blue")

    class Selective(ByteProcessor):
        def read(self, dialogue: Dialogue, pictures: Sequence[Image.Image]) -> ChatItem:
            if pictures[0].getpixel((0, 0))[0] == 10:  # type: ignore[index]
                raise ValueError("too long")
            return super().read(dialogue, pictures)

    model = LookupModel(TABLE)
    model.processor = Selective()
    found = scores_of(model=model, source=source)
    assert found["answering"]["num_questions"] == 2
    assert "yes_no" not in found  # its one question is the one that cannot be read
    with pytest.raises(ValueError, match="could read no dialogue of asked"):
        scores_of("answering", "yes_no", model=model, source=source)


def test_each_answer_is_written_once() -> None:
    model = LookupModel(TABLE)
    scores_of("yes_no", "answering", model=model)
    assert model.num_written == 5
    assert model.training  # as it was before


@pytest.mark.usefixtures("no_tool")
def test_scores_do_not_depend_on_the_batch() -> None:
    tasks = ("answering", "yes_no", "describing", "perplexity")
    by_size = [scores_of(*tasks, model=LookupModel(TABLE), writing={"batch_size": size}) for size in (1, 8)]
    for scores in by_size:
        for task in tasks:
            del scores[task]["protocol"]
    one, eight = (json.loads(json.dumps(scores), parse_float=lambda text: round(float(text), 9)) for scores in by_size)
    assert one == eight


@pytest.mark.usefixtures("no_tool")
def test_auto_is_what_the_source_serves() -> None:
    assert scores_of().keys() >= {"answering", "yes_no", "describing", "perplexity"}
    scores = scores_of(source=AskedSource(questions=False))
    assert "answering" not in scores
    assert scores.keys() >= {"describing", "perplexity"}


def test_what_cannot_be_read_is_counted() -> None:
    scores = scores_of("answering", source=AskedSource(bad=[1]))
    assert scores["bad_samples"] == 1
    assert scores["answering"]["num_questions"] == 3
    long = scores_of("answering", model=LookupModel(TABLE, most=10))
    assert (long["bad_samples"], long["scored"]["questions"]) == (2, 3)
    assert long["answering"]["num_not_asked"] == 2
    with pytest.raises(
        ValueError, match=r"could read no dialogue of asked \(5 tried\); the first: sample 's0': the di"
    ):
        scores_of("answering", model=LookupModel(TABLE, most=5))
    with pytest.raises(BadSampleError, match="s1"):
        evaluate_models(
            {"m": LookupModel(TABLE)},
            AskedSource(bad=[1]),
            SuiteConfig(tasks=("answering",)),
            device="cpu",
            on_bad_sample="error",
        )


def test_samples_of_which_a_part_was_asked_are_not_left_out() -> None:
    class Short(ByteProcessor):
        def read(self, dialogue: Dialogue, pictures: Sequence[Image.Image]) -> ChatItem:
            if "How many" in dialogue[0].text:
                raise ValueError("too long")
            return super().read(dialogue, pictures)

    model = LookupModel(TABLE)
    model.processor = Short()
    found = scores_of("answering", model=model, source=AskedSource(bad=[1]))
    assert found["bad_samples"] == 2  # one cannot be read, one of another's questions cannot be asked
    assert found["scored"]["images"] == 2
    assert scored_set(found) == (
        "scored on 2 images and 2 questions; 1 of 3 samples could not be read and are left out"
    )


def test_a_wrong_picture_that_does_not_fit_makes_no_sample_bad() -> None:
    class Large(ByteProcessor):
        def read(self, dialogue: Dialogue, pictures: Sequence[Image.Image]) -> ChatItem:
            if pictures[0].getpixel((0, 0))[0] == 20 and "Cat" not in dialogue[0].text:  # type: ignore[index]
                raise ValueError("too long with the last picture")
            return super().read(dialogue, pictures)

    model = LookupModel(TABLE)
    model.processor = Large()
    scores = scores_of("perplexity", model=model)
    found = scores["perplexity"]
    assert (scores["bad_samples"], found["num_references"]) == (0, 5)
    assert found["wrong_picture"]["num_references"] == 3  # two questions would be shown the last picture
    whole = scores_of("perplexity")["perplexity"]
    assert found["bits_per_byte"] == pytest.approx(whole["bits_per_byte"])
    lengths = {name: found["wrong_picture"][name] for name in ("num_bytes", "num_tokens")}
    assert lengths == {"num_bytes": 7, "num_tokens": 10}  # yes, 2 and yes; each with its end
    gain = (6 * HIT + 4 * MISS) - (2 * HIT + 8 * MISS)  # of these three alone
    assert found["visual_gain"] == pytest.approx(gain / math.log(2) / 7)


def test_dialogues_without_a_picture_are_shown_no_wrong_one_and_lend_none() -> None:
    class Silent(AskedSource):
        """The last sample has a dialogue without a picture."""

        def __getitem__(self, index: int) -> Sample:
            sample = super().__getitem__(index)
            if index != 2:
                return sample
            turns = (Turn("user", "Cat?"), Turn("assistant", "no"))
            return replace(sample, image=Image.new("RGB", (1, 1)), turns=turns, questions=(), captions=())

    found = scores_of("perplexity", source=Silent())["perplexity"]
    shown = scores_of("perplexity", source=AskedSource(bad=[2]))["perplexity"]
    assert found["num_references"] == shown["num_references"] + 1
    assert found["wrong_picture"] == shown["wrong_picture"]
    assert found["visual_gain"] == pytest.approx(shown["visual_gain"])


def test_what_the_source_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="answering: none of its 3 readable samples has a question with"):
        scores_of("answering", source=AskedSource(questions=False))
    with pytest.raises(ValueError, match="describing: none of its 3 readable samples has a caption"):
        scores_of("describing", source=AskedSource(captions=False))


def test_models_of_two_kinds_are_evaluated_apart() -> None:
    models = {"writes": LookupModel(TABLE), "embeds": make_model()}
    with pytest.raises(ValueError, match=r"no task measures all .* writes write answers, and embeds embed images"):
        evaluate_models(models, AskedSource(), device="cpu")
    with pytest.raises(
        ValueError, match=r"answering: it is for a model that writes, and embeds embeds pictures and texts"
    ):
        evaluate_models(models, AskedSource(), SuiteConfig(tasks=("answering",)), device="cpu")


def test_half_precision_is_told_of() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    evaluate_models(
        {"m": LookupModel(TABLE).to(torch.bfloat16)},
        AskedSource(),
        SuiteConfig(tasks=("answering",)),
        device="cpu",
        console=console,
    )
    assert "warning: m wrote in bfloat16: its answers depend on writing.batch_size (16)" in console.export_text()


def test_the_cost_of_writing() -> None:
    class Slow(LookupModel):
        """Takes longer for each further token than any stumble of a busy machine's clock."""

        def generate(self, inputs: Any, how: Any, keys: Any = None) -> list[list[int]]:
            time.sleep(0.02 * how.max_new_tokens)
            return super().generate(inputs, how, keys)

    models = {"a": Slow(TABLE), "b": Slow(TABLE)}
    config = SuiteConfig.from_mapping(
        {"tasks": ["generation"], "generation": {"batch_size": 2, "new_tokens": 6, "rounds": 3, "picture_size": 16}}
    )
    found = evaluate_models(models, None, config, device="cpu")["b"]["generation"]
    length = 2 + len("Describe the picture in detail.")
    assert (found["image_tokens"], found["prompt_tokens"]) == (2, length)
    assert found["kv_bytes_per_token"] == 2 * 2 * 3 * 5 * 4
    assert found["kv_bytes"] == found["kv_bytes_per_token"] * (length + 6)
    assert found["prefill_ms"]["rounds"] == 3
    assert found["tokens_per_second"]["median"] > 0
    assert found["peak_bytes"] > 4 * (SIZE + 5) * SIZE
    assert found["ratio"]["kv_bytes"] == 1

    class Short(LookupModel):
        obeys = False

    with pytest.raises(ValueError, match="wrote 2 tokens where 6 were asked for"):
        evaluate_models({"m": Short({})}, None, config, device="cpu")


def test_scores_are_shown(with_tool: tuple[dict[str, Any], Any]) -> None:
    scores = {"m": with_tool[0]}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(score_table(scores, title="t"), result_table([("m", scores["m"])], title="t"))
    text = console.export_text()
    for word in ("mean F1 of categories", "bits per byte", "CIDEr-D", "-bits/byte", "without an end %"):
        assert word in text
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores


def test_gaps_are_closed_on_answers_and_else_on_bits() -> None:
    by_bits = [{"perplexity": {"negative_bits_per_byte": -bits}, "params": 1} for bits in (1.0, 1.5, 2.0)]
    assert gap_closed(*by_bits) == pytest.approx(0.5)
    with_answers = [
        each | {"answering": {"overall": right}} for each, right in zip(by_bits, (80.0, 70.0, 40.0), strict=True)
    ]
    assert gap_closed(*with_answers) == pytest.approx(0.75)


@pytest.mark.usefixtures("no_tool")
def test_prompts_are_settings() -> None:
    table = {(0, "How many?\nAnswer briefly."): "2"}
    found = scores_of("answering", model=LookupModel(table), writing={"question_suffix": "Answer briefly."})
    assert found["answering"]["by_kind"]["number"] == 100
    described = scores_of(
        "describing", model=LookupModel({(0, "What is it?"): "the dog"}), writing={"instruction": "What is it?"}
    )
    assert described["describing"]["examples"]["s0"] == "the dog"
    assert ASK not in str(described["describing"]["protocol"])
