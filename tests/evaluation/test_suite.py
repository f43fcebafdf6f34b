"""Several models side by side: one embedding for all tasks, which task needs what, and splits that stay apart."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from cmapkd.config import ConfigError
from cmapkd.data.scenes.source import ScenesSource
from cmapkd.data.types import Sample
from cmapkd.evaluation import EvaluationConfig, SuiteConfig, evaluate_models
from cmapkd.evaluation.suite import training_source
from cmapkd.evaluation.table import score_table
from cmapkd.evaluation.tasks import TASKS, check_tasks
from cmapkd.evaluation.tools import MissingToolError
from cmapkd.models import build_model
from cmapkd.models.tiny import TinyDualEncoder, TinyOptions
from cmapkd.models.vocabulary import TrainedTokenizer

Make = Callable[..., Any]
CLASSES = ["cat", "dog", "boat"]
SMALL = {"steps": 2, "batch_size": 4, "width": 32, "depth": 1}
QUICK = {"probes": {"samples": 8}, "vqa": SMALL, "captioning": SMALL, "detection": SMALL}
QUICK["efficiency"] = {"batch_size": 2, "rounds": 3, "warmup": 0}


def other(model: TinyDualEncoder, seed: int = 1) -> TinyDualEncoder:
    torch.manual_seed(seed)
    return TinyDualEncoder(model.options, model.tokenizer, name="other")


def test_an_image_tower_alone_is_told_before_it_embeds(make_source: Make) -> None:
    tower = build_model("pictures:tiny:debug")
    source = make_source(6, labels=[n % 3 for n in range(6)], class_names=CLASSES)
    with pytest.raises(ValueError, match="p has an image tower alone, which linear_probe and knn can measure"):
        evaluate_models({"p": tower}, source, SuiteConfig(), device="cpu")
    named = SuiteConfig(tasks=("calibration",))
    with pytest.raises(ValueError, match="for calibration: it embeds texts, and p has an image tower alone"):
        evaluate_models({"p": tower}, source, named, device="cpu")
    train = make_source(9, labels=[n % 3 for n in range(9)], class_names=CLASSES)
    train.name, train.fingerprint = "another", lambda: "another"
    scores = evaluate_models({"p": tower}, source, SuiteConfig(tasks=("knn",)), device="cpu", train=train)
    assert 0 <= scores["p"]["knn"]["top1"] <= 100


def test_each_model_reads_the_source_once_for_all_tasks(model: TinyDualEncoder, make_source: Make) -> None:
    reads: Counter[int] = Counter()
    source = make_source(6, labels=[n % 3 for n in range(6)], class_names=CLASSES)
    inner = source.__class__.__getitem__

    class Counting(source.__class__):  # type: ignore[name-defined,misc]
        def __getitem__(self, index: int) -> Sample:
            reads[index] += 1
            return inner(self, index)

    source.__class__ = Counting
    config = SuiteConfig(tasks=("retrieval", "zero_shot", "calibration", "agreement"))
    scores = evaluate_models({"teacher": model, "student": other(model)}, source, config, device="cpu")
    assert reads == dict.fromkeys(range(6), 2)
    assert list(scores) == ["teacher", "student"]
    assert set(scores["student"]) == {*config.tasks, "params", "bad_samples", "scored"}
    perfect = scores["teacher"]["agreement"]
    assert perfect["t2i"] == {"rank_correlation": pytest.approx(1), "top1": 100}
    assert perfect["zero_shot"]["top1"] == 100
    assert set(perfect["cka"]) == {"P2", "P3", "P4", "P5", "L1", "L2", "L3", "L4"}
    assert all(value == pytest.approx(1) for value in perfect["cka"].values())
    assert scores["student"]["agreement"]["t2i"]["rank_correlation"] < 0.9
    assert json.loads(json.dumps(scores)) == scores


def test_what_cannot_be_computed_is_none_and_not_nan(model: TinyDualEncoder, make_source: Make) -> None:
    """Pictures of one class: the teacher cannot err, so there is no agreement in error."""
    source = make_source(3, labels=[0] * 3, class_names=["cat"])
    config = SuiteConfig(tasks=("agreement",))
    scores = evaluate_models({"a": model, "b": other(model)}, source, config, device="cpu")
    assert scores["b"]["agreement"]["zero_shot"] == {"top1": 100, "top1_where_teacher_errs": None}
    json.loads(json.dumps(scores, allow_nan=False))


def test_agreement_wants_the_same_samples(model: TinyDualEncoder, make_source: Make) -> None:
    source = make_source(5)

    class Picky(TinyDualEncoder):
        """Cannot take one of the pictures."""

    picky = Picky(model.options, model.tokenizer)
    spec = picky.image_spec

    class Refusing:
        size, to_model = spec.size, staticmethod(spec.to_model)

        def raw(self, image: Any) -> torch.Tensor:
            from cmapkd.data.types import BadSampleError

            if image.size == source.images[2].size:
                raise BadSampleError("m2", "too odd")
            return spec.raw(image)

    picky.image_spec = Refusing()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="could read different samples"):
        evaluate_models({"a": model, "b": picky}, source, SuiteConfig(tasks=("agreement",)), device="cpu")


def test_what_a_task_needs_is_said_before_anything_is_embedded(model: TinyDualEncoder, make_source: Make) -> None:
    unreadable = make_source(4, broken=range(4))

    def run(*tasks: str, **more: Any) -> None:
        evaluate_models({"m": model}, more.pop("source", unreadable), SuiteConfig(tasks=tasks), device="cpu", **more)

    with pytest.raises(ValueError, match="agreement: it compares models with the first: name the teacher and then"):
        run("retrieval", "agreement")
    with pytest.raises(ValueError, match="vqa: its head learns on another split of the data: name it with --train"):
        run("vqa")
    with pytest.raises(ValueError, match="retrieval: it needs data"):
        run("retrieval", source=None)
    train = make_source(5)
    train.name, train.fingerprint = "another", lambda: "another"
    with pytest.raises(ValueError, match="vqa: none of its first 4 samples has a question"):
        run("vqa", source=make_source(4), train=train)
    with pytest.raises(ValueError, match="detection: none of its first 4 samples has a box"):
        run("detection", source=make_source(4), train=train)


def test_unknown_tasks_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown task 'detecton' .did you mean 'detection'"):
        check_tasks(SuiteConfig(tasks=("detecton",)))
    with pytest.raises(ConfigError, match="task 'vqa' needs more than one model and its test data: measure it with"):
        check_tasks(EvaluationConfig(tasks=("vqa",)))
    with pytest.raises(ConfigError, match=r"vqa.stpes: unknown key .did you mean 'steps'"):
        SuiteConfig.from_mapping({"vqa": {"stpes": 3}})
    assert SuiteConfig.from_mapping({"tasks": "all"}).tasks == "all"
    with pytest.raises(ConfigError, match="unknown task 'all'"):
        check_tasks(EvaluationConfig.from_mapping({"tasks": "all"}))
    config = SuiteConfig.from_mapping(QUICK)
    assert SuiteConfig.from_mapping(config.model_dump(mode="json")) == config


def test_the_cost_needs_no_data(model: TinyDualEncoder) -> None:
    config = SuiteConfig.from_mapping({**QUICK, "tasks": ["efficiency"]})
    scores = evaluate_models({"a": model, "b": other(model)}, None, config, device="cpu")
    assert set(scores["a"]) == {"efficiency", "params"}
    table = score_table(scores, title="Cost")
    assert [str(column.header) for column in table.columns] == ["task", "measure", "a", "b"]
    measures = list(table.columns[1].cells)
    assert "image GMACs" in measures
    assert [name for name in measures if "param" in name] == ["parameters"]


@pytest.fixture(scope="module")
def scenes_model() -> TinyDualEncoder:
    options = TinyOptions(
        image_size=32,
        patch_size=8,
        stem_width=4,
        vision_width=32,
        vision_depth=2,
        text_width=32,
        text_depth=1,
        embed_dim=16,
    )
    source = ScenesSource("train", size=32, length=20)
    texts = [caption for index in range(20) for caption in source.captions(index)]
    torch.manual_seed(0)
    return TinyDualEncoder(options, TrainedTokenizer.train(texts, vocab_size=200, context_length=24)).eval()


ON_SCENES = ("retrieval", "zero_shot", "knn", "vqa", "detection", "calibration", "agreement", "efficiency")


def every_task(model: TinyDualEncoder, tasks: Any) -> tuple[ScenesSource, dict[str, Any]]:
    """The second of two models on pictures with pairs that training never shows."""
    source = ScenesSource("ood", size=32, length=10)
    config = SuiteConfig.from_mapping({**QUICK, "tasks": tasks})
    models = {"teacher": model, "student": other(model)}
    scores = evaluate_models(models, source, config, device="cpu", train=training_source(None, "scenes@ood?size=32"))
    assert json.loads(json.dumps(scores)) == scores
    return source, scores["student"]


@pytest.mark.skipif(find_spec("faster_coco_eval") is None, reason="box AP needs the extra detection")
def test_many_tasks_on_scenes(scenes_model: TinyDualEncoder) -> None:
    source, scores = every_task(scenes_model, ON_SCENES)
    assert set(scores) == {*ON_SCENES, "params", "bad_samples", "scored"}
    vqa, detection = scores["vqa"], scores["detection"]
    assert vqa["num_questions"] == sum(len(source[index].questions) for index in range(10))
    assert set(vqa["by_kind"]) == {"yes/no", "number", "other"}
    shown = {box.name for index in range(10) for box in source[index].boxes}
    learned = {box.name for index in range(8) for box in ScenesSource("train", size=32)[index].boxes}
    assert detection["novel_classes"] == sorted(shown - learned)
    assert detection["novel"]["num_classes"] == len(shown - learned)
    assert detection["num_images"] == 10


NEEDED = [shutil.which("java"), find_spec("pycocoevalcap"), find_spec("faster_coco_eval")]


@pytest.mark.slow
@pytest.mark.skipif(None in NEEDED, reason="caption metrics need Java and the extras captions and detection")
def test_every_task_on_scenes(scenes_model: TinyDualEncoder) -> None:
    _, scores = every_task(scenes_model, "all")
    assert set(scores) == {*TASKS, "params", "bad_samples", "scored"}
    assert scores["captioning"]["num_images"] == 10
    assert set(scores["captioning"]["shown"]) == {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider"}
    assert scores["linear_probe"]["settings"]["num_train"] == 8


def test_captions_are_written_for_every_picture(scenes_model: TinyDualEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the task but its Java programs."""
    from cmapkd.evaluation.tasks import captioning as module

    given: list[Any] = []

    class Scores:
        def to_dict(self) -> dict[str, float]:
            return {"cider": 0.5, "num_images": 10}

    def scored(*both: Any) -> Scores:
        given.append(both)
        return Scores()

    monkeypatch.setattr(module, "caption_scores", scored)
    monkeypatch.setattr(module.caption_tools, "java", lambda: "java")
    monkeypatch.setattr(module.caption_tools, "library_folder", lambda: Path())
    source, scores = every_task(scenes_model, ["captioning"])
    predictions, references = given[-1]
    assert references == {source[index].id: list(source[index].captions) for index in range(10)}
    assert predictions.keys() == references.keys()
    assert scores["captioning"]["shown"] == {"cider": 50}
    assert len(scores["captioning"]["examples"]) == 3

    def without() -> str:
        raise MissingToolError("no java is on the PATH")

    monkeypatch.setattr(module.caption_tools, "java", without)
    with pytest.raises(ValueError, match="captioning: no java is on the PATH"):
        every_task(scenes_model, ["captioning"])


class Watched(ScenesSource):
    """Says which samples are read."""

    read: set[str]

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        self.read.add(sample.id)
        return sample


def test_probes_learn_from_the_training_split_alone(scenes_model: TinyDualEncoder) -> None:
    """Other scored pictures, same probes: what is scored reaches no head."""
    read: set[str] = set()
    train = Watched("train", size=32)
    train.read = read
    config = SuiteConfig.from_mapping({**QUICK, "tasks": ["detection"]})
    heads: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        from cmapkd.evaluation.probes import train as module

        made = module.Trainer.run

        def kept(self: Any, **arguments: Any) -> Any:
            result = made(self, **arguments)
            heads.append({name: value.clone() for name, value in self.method.state_dict().items()})
            return result

        patch.setattr(module.Trainer, "run", kept)
        for split in ("val", "test"):
            scored = ScenesSource(split, size=32, length=4)
            evaluate_models({"m": scenes_model}, scored, config, device="cpu", train=train)
    assert read == {f"scenes/standard/train/{index:09d}" for index in range(8)}
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


def test_the_scored_split_and_test_splits_are_not_trained_on(scenes_model: TinyDualEncoder) -> None:
    source = ScenesSource("train", size=32, length=30)
    config = SuiteConfig.from_mapping({**QUICK, "tasks": ["detection"]})
    with pytest.raises(ConfigError, match="would learn from scenes/standard/train, which is what is scored"):
        evaluate_models({"m": scenes_model}, source, config, device="cpu", train=ScenesSource("train", size=32))
    for name in ("scenes@test", "scenes@test?length=30", "coco:x.json,images@test", "hf:name@test-dev"):
        with pytest.raises(ConfigError, match="is a test split: nothing learns or is chosen there"):
            training_source(name, "scenes@val")
    assert training_source(None, "csv:x.csv") is None
    found = training_source(None, "scenes:easy@test?length=9&size=48")
    assert found is not None
    assert (found.name, found[0].image.size) == ("scenes/easy/train", (48, 48))
    assert len(found) > 9


def test_a_table_shows_a_dash_for_what_does_not_exist(model: TinyDualEncoder) -> None:
    both = {
        "a": {"detection": {"shown": {"ap": 12.34, "novel": 1.0}}, "params": 1000},
        "b": {"detection": {"shown": {"ap": 5.0}}, "params": 2},
    }
    columns = [list(column.cells) for column in score_table(both, title="t").columns]
    assert columns == [
        ["detection", "", ""],
        ["AP", "novel", "parameters"],
        ["12.3", "1.0", "1,000"],
        ["5.0", "-", "2"],
    ]


def test_the_work_folder_is_named_after_the_model(scenes_model: TinyDualEncoder, tmp_path: Path) -> None:
    source = ScenesSource("val", size=32, length=4)
    config = SuiteConfig.from_mapping({**QUICK, "tasks": ["detection"]})
    evaluate_models(
        {"runs/a": scenes_model}, source, config, device="cpu", train=ScenesSource("train", size=32), work=tmp_path
    )
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("runs_a-")
    assert (folder / "detection" / "probe.json").is_file()
