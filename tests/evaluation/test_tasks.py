"""Names and settings of tasks, their headlines, and what a retrieval score is of."""

from __future__ import annotations

import io
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cmapkd.config import Config, ConfigError
from cmapkd.evaluation import EvaluationConfig, SuiteConfig, evaluate_models
from cmapkd.evaluation.headline import headlines, remark_on_retrieval, retrieval_set
from cmapkd.evaluation.subject import Subject
from cmapkd.evaluation.tasks import TASKS, Headline, Task, check_tasks, make_task
from cmapkd.evaluation.usual_sets import remark_on
from cmapkd.models.masked import MaskedEncoder
from cmapkd.results import RunResult, gap_closed, gap_measure, score_table
from cmapkd.run import RunConfig
from helpers import MemorySource, make_model

RUN: dict[str, Any] = {
    "student": "tiny:debug",
    "data": {"train": "scenes", "val": "scenes@val"},
    "method": "contrastive",
    "training": {"steps": 1},
}


class CountSettings(Config):
    times: int = 1


class Count(Task):
    """Counts images, as often as it is told."""

    title = "Count"
    Settings = CountSettings
    settings: CountSettings
    alone = automatic = True
    headline = Headline("count", ("images",), "count")

    def score(self, subject: Subject) -> dict[str, Any]:
        return {"images": self.settings.times * len(subject.embedded.ids)}


class ReadsNothing(Count):
    reads = MaskedEncoder


@pytest.fixture
def plugged(monkeypatch: pytest.MonkeyPatch) -> None:
    points = {
        name: EntryPoint(name, f"{__name__}:{kind}", "cmapkd.tasks")
        for name, kind in (("count", "Count"), ("nothing", "ReadsNothing"), ("broken", "Missing"))
    }
    monkeypatch.setattr(TASKS, "_offered", points)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": ["retreival"]}, r"evaluation\.tasks: unknown task 'retreival' .did you mean 'retrieval'"),
        ({"tasks": ["vqa"]}, r"evaluation\.tasks: task 'vqa' needs more than one model and its test data"),
        ({"tasks": "all"}, r"evaluation\.tasks: unknown task 'all'"),
        ({"settings": {"cuont": {}}}, r"evaluation\.settings\.cuont: there is no task 'cuont' .did you mean 'count'"),
        ({"settings": {"vqa": {"steps": 1}}}, r"evaluation\.settings\.vqa: vqa is a task of cmapkd's own"),
        ({"settings": {"count": {"times": 2}}}, r"settings\.count: tasks does not name count"),
        ({"tasks": ["count"], "settings": {"count": {"tmies": 2}}}, r"tmies: unknown key .did you mean 'times'"),
        ({"tasks": ["broken"]}, "cmapkd.tasks 'broken' of .* cannot be imported"),
    ],
)
@pytest.mark.usefixtures("plugged")
def test_a_run_refuses_tasks_and_settings_that_do_not_fit(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_mapping({**RUN, "evaluation": values})


@pytest.mark.usefixtures("plugged")
def test_a_packages_task_is_measured_with_its_settings_where_it_is_named_and_only_there() -> None:
    model, source = make_model(), MemorySource(4)
    config = EvaluationConfig(tasks=("count",), settings={"count": {"times": 3}})
    assert evaluate_models({"m": model}, source, config, device="cpu")["m"]["count"] == {"images": 12}
    assert EvaluationConfig.from_mapping(config.model_dump(mode="json")) == config
    auto = evaluate_models({"m": model}, source, device="cpu")["m"]
    assert "count" not in auto  # though it calls itself automatic
    assert headlines({"retrieval": {"mean_r@1": 5}, "count": {"images": 7}}) == {
        "retrieval": (TASKS["retrieval"].headline, 5.0),
        "count": (Count.headline, 7.0),
    }
    shown = score_table([("m", {"count": {"images": 7}, "params": 1})], title="t")
    assert [column.header for column in shown.columns] == ["model", "count", "parameters"]
    RunConfig.from_mapping(
        {**RUN, "training": {"steps": 1, "evaluate_every": 1}, "evaluation": {"tasks": ["count"]}}
    )  # the best step can be chosen by it


@pytest.mark.usefixtures("plugged")
def test_a_task_says_which_models_it_reads() -> None:
    with pytest.raises(
        ValueError, match=r"nothing: it is for a model that has gates at its units, and m embeds pictures and texts"
    ):
        evaluate_models({"m": make_model()}, MemorySource(4), EvaluationConfig(tasks=("nothing",)), device="cpu")


def test_own_settings_are_the_section_of_their_name() -> None:
    config = SuiteConfig.from_mapping({"vqa": {"steps": 7}})
    assert make_task("vqa", config).settings.steps == 7
    assert make_task("vqa", EvaluationConfig()).settings.steps == 1000
    with pytest.raises(ConfigError, match=r"settings\.vqa: .*write vqa\.KEY"):
        check_tasks(SuiteConfig(settings={"vqa": {"steps": 1}}))
    assert "settings" not in EvaluationConfig().model_dump(mode="json")


# ------------------------------------------------------------------------------------------------ headlines and sets


def of(recall: float, num_images: int = 1000, **more: Any) -> dict[str, Any]:
    both = {"i2t": {"r@1": recall}, "t2i": {"r@1": recall}, "mean_r@1": recall}
    return {"retrieval": {**both, "num_images": num_images, "num_texts": 5 * num_images, **more}, "params": 1}


def test_a_gap_is_closed_on_the_first_headline_that_all_have() -> None:
    labelled = [{"zero_shot": {"top1": top}, "params": 1} for top in (80.0, 60.0, 40.0)]
    assert gap_closed(*labelled) == pytest.approx(0.5)
    assert gap_measure(*labelled) == "zero-shot"
    both = [of(recall) | scores for recall, scores in zip((50.0, 45.0, 30.0), labelled, strict=True)]
    assert gap_closed(*both) == pytest.approx(0.75)
    assert gap_measure(*both) == "R@1"
    assert gap_closed(both[0], labelled[1], of(30.0)) is None
    assert gap_measure(both[0], labelled[1], of(30.0)) == ""


def test_recall_stands_beside_what_it_is_of(tmp_path: Path) -> None:
    remark = "retrieval is over 40 images and 200 captions, and so on"
    metrics = {"student": of(12.0, 40, remark=remark), "method": "hinton", "gap_closed": None, "evaluated_on": "x"}
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(RunResult(tmp_path, metrics).table())
    text = console.export_text()
    assert "40 x 200" in text
    assert remark in text
    assert retrieval_set(of(1.0)) == "1,000 images, 5,000 captions"
    assert retrieval_set({"zero_shot": {}}) is None
    assert remark_on_retrieval(of(1.0)) is None


@pytest.mark.parametrize(
    ("name", "images", "remarked"),
    [
        ("csv:/data/Flickr8k/captions.txt", 8091, "harder"),
        ("csv:/data/Flickr8k/captions.txt", 500, "easier"),
        ("csv:/data/Flickr8k/captions.txt", 1000, None),
        ("flickr30k:captions.json,images@test", 1000, None),
        ("flickr30k:captions.json,images@val", 1014, None),
        ("flickr30k:captions.json,images@train", 29000, "harder"),
        ("coco:captions_val2014.json,images", 40504, "harder"),
        ("coco:karpathy.json,images@test", 5000, None),
        ("webdataset:mscoco-{00..03}.tar", 25000, "harder"),
        ("folder:/home/me/coconuts", 25000, None),
        ("scenes/standard/val", 48, None),
    ],
)
def test_a_named_set_of_unusual_size_is_remarked(name: str, images: int, remarked: str | None) -> None:
    said = remark_on(name, num_images=images, num_texts=5 * images)
    if remarked is None:
        assert said is None
    else:
        assert said is not None
        assert f"{images:,} images and {5 * images:,} captions" in said
        assert remarked in said


def test_the_remark_stands_in_the_scores_of_the_task() -> None:
    source = MemorySource(6)
    source.name = "folder:/data/flickr30k"
    scores = evaluate_models({"m": make_model()}, source, EvaluationConfig(tasks=("retrieval",)), device="cpu")["m"]
    assert "1,000 images with 5,000 captions" in str(remark_on_retrieval(scores))
    assert scores["retrieval"]["num_images"] == 6
