"""Models that write in the trainer: parts, stages, averages, weightings, an exact resume, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.data.open import open_source
from cmapkd.run.build import check_training
from cmapkd.run.config import RunConfig
from cmapkd.training import Trainer
from helpers import read_lines
from writers import WRITERS, Dialogues, assert_same, make_run, make_student, make_task, results

ON_POLICY = {"share": 0.5, "max_new_tokens": 4}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in WRITERS},
    "on policy": ("token_kd", {"on_policy": ON_POLICY, "divergence": "reverse", "top_k": 8}),
    "taid, fast": ("taid", {"rate": 0.2, "momentum": 0.5, "answers_weight": 1.0}),
}


class _PowerCut(Exception):
    pass


def cut_after(trainer: Trainer, step: int) -> None:
    """Ends a run before a step, as a power cut would."""
    take = trainer._step

    def until(batch: Any) -> Any:
        if trainer.progress.step == step:
            raise _PowerCut
        return take(batch)

    trainer._step = until  # type: ignore[method-assign]
    with pytest.raises(_PowerCut):
        trainer.run()


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    return {f"{group}/{name}": value for group, held in trainer.learned_state().items() for name, value in held.items()}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_cut_ends_as_one_that_was_not(name: str, tmp_path: Path) -> None:
    """Bit for bit: weights, optimizer, average, rollouts and where TAID's target stands; in micro-batches, with bad
    samples, and a teacher of another precision."""
    kind, settings = RUNS[name]

    def trainer(out: str) -> Trainer:
        task = make_task(kind, student=make_student(kind).float(), **settings)
        options: dict[str, Any] = {"ema": 0.8, "micro_batch": 3, "checkpoint_every": 3}
        return make_run(tmp_path / out, task, source=Dialogues(bad=(3, 17)), **options)

    whole, cut, again = trainer("whole"), trainer("cut"), trainer("cut")
    whole.run()
    cut_after(cut, 5)
    torch.manual_seed(1234)
    again.run(resume=True)
    expected, found = state_of(whole), state_of(again)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    logged = [read_lines(tmp_path / out / "metrics.jsonl") for out in ("whole", "cut")]
    times = ("pairs_per_second", "rollouts/seconds")
    for one, other in zip(logged[0], [line for line in logged[1] if line["step"] <= 6][-6:], strict=True):
        assert {k: v for k, v in one.items() if k not in times} == {k: v for k, v in other.items() if k not in times}
    if kind == "taid":
        assert float(again.method.place) > 0.4  # type: ignore[arg-type]
        assert all("taid/t" in line for line in logged[1])
    if name == "on policy":
        assert sum(line["rollouts/share"] for line in logged[1]) > 0


@pytest.mark.parametrize(
    "name", [name for name in WRITERS if name not in ("move_kd", "linearize")]
)  # which need other parts
def test_a_projector_learns_alone(name: str, tmp_path: Path) -> None:
    task = make_task(name, **({"visual_weight": 0.0} if name == "switch_kd" else {}))  # which trains vision, too
    before = {key: value.clone() for key, value in task.student.state_dict().items()}
    make_run(tmp_path, task, steps=3, train_parts=("projector",)).run()  # one for each stage that a method may have
    changed = {key for key, value in task.student.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == task.student.parts["projector"]


def test_stages_have_their_terms_and_parts(tmp_path: Path) -> None:
    task = make_task("token_kd")
    stages = [{"name": "a", "steps": 2, "terms": ["answers"], "train": ["projector"]}, {"name": "b", "steps": 2}]
    make_run(tmp_path, task, steps=None, stages=stages).run()
    shown = [{key for key in line if key.startswith("terms/")} for line in read_lines(tmp_path / "metrics.jsonl")]
    assert shown == [{"terms/answers"}] * 2 + [{"terms/answers", "terms/distillation"}] * 2


def test_a_term_that_a_stage_does_not_know_is_refused(tmp_path: Path) -> None:
    stages = [{"name": "a", "steps": 2, "terms": ["answer"]}]
    with pytest.raises(ConfigError, match="answer"):
        make_run(tmp_path, make_task("token_kd"), steps=None, stages=stages)


def test_an_average_of_the_student_is_kept(tmp_path: Path) -> None:
    trainer = make_run(tmp_path, make_task("sft"), steps=3, ema=0.5)
    result = trainer.run()
    learned = dict(trainer.method.student.named_parameters())
    averaged = dict(result.student.named_parameters())
    assert any(not torch.equal(averaged[name], learned[name]) for name in learned)
    assert {name: each.shape for name, each in averaged.items()} == {n: each.shape for n, each in learned.items()}


@pytest.mark.parametrize("weighting", ["gradnorm", "uncertainty"])
@pytest.mark.parametrize("kind", ["token_kd", "taid"])
def test_terms_can_be_weighted(kind: str, weighting: str) -> None:
    settings = {"name": weighting} | ({"warmup_steps": 1, "every": 1} if weighting == "gradnorm" else {})
    found = []
    for size in (None, 4):
        task = make_task(kind, answers_weight=1.0, term_weighting=settings)
        found.append(results(task, micro_batch=size))
        (name,) = task.shared_parameters()
        assert "mlp.down_proj" in name
        assert name.startswith("model.model.language_model.layers.0")
    assert "term/weighted" in found[0]
    assert_same(found[1], found[0])


def test_balanced_terms_of_a_projector_have_nothing_in_common_to_measure(tmp_path: Path) -> None:
    """The last layer is frozen: the weighting stays as it is, and the run goes on."""
    task = make_task("token_kd", term_weighting={"name": "gradnorm", "warmup_steps": 1, "every": 1})
    make_run(tmp_path, task, steps=2, train_parts=("projector",)).run()


def test_shares_of_the_weights_do_not_go_with_answers_of_ones_own() -> None:
    assert make_task("token_kd").why_whole(()) is None
    assert "leave on_policy out" in str(make_task("token_kd", on_policy=0.0).why_whole(()))  # unanswered ones may come
    assert "leave on_policy out" in str(make_task("token_kd", on_policy=0.2).why_whole(()))


def config_of(**changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "student": "tiny_vlm:small",
        "teacher": "tiny_vlm:base",
        "data": {"train": "scenes?length=40&size=32"},
        "method": "token_kd",
        "training": {"steps": 2, "batch_size": 4},
    }
    values["training"] |= changes.pop("training", {})
    return RunConfig.from_mapping(values | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"local_loss": True}}, "training.local_loss"),
        ({"training": {"compile": True}}, "training.compile"),
        ({"heads": {"vqa": 1.0}}, "leave heads out"),
    ],
)
def test_what_has_no_meaning_here_is_refused(changes: dict[str, Any], message: str) -> None:
    config = config_of(**changes)
    with pytest.raises(ConfigError, match=message):
        check_training(config, make_task("token_kd"), open_source(config.data.train))


def test_a_baseline_has_its_student_s_tokenizer() -> None:
    """An untrained student takes its teacher's, so the run without distillation names the teacher, too."""
    alone = config_of(baseline="scratch").scratch()
    assert alone.method.name == "sft"
    assert alone.teacher is not None
    assert not alone.more_teachers
