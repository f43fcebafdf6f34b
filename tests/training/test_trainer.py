"""The loop: what it optimises and how, what it writes down, and when it stops."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from cmapkd.data.check import TooManyBadSamples
from cmapkd.methods import DualEncoderMethod, Method
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder
from cmapkd.training import NonFiniteLossError, OptimConfig, TrainConfig, checkpoint
from cmapkd.training.checkpoint import list_checkpoints, read_checkpoint
from cmapkd.training.optim import learning_rate, make_optimizer
from cmapkd.training.trackers import JsonlTracker, make_trackers
from helpers import DUAL, MemorySource, make_method, make_model, make_trainer, read_lines

# ------------------------------------------------------------------------------------------------ optimiser


def test_schedule_rises_linearly_and_falls_along_a_cosine() -> None:
    config = OptimConfig(learning_rate=2.0, warmup_steps=4, final_rate=0.1)
    rates = [learning_rate(step, total=12, config=config) for step in range(13)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    for step in range(4, 13):
        expected = 2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - 4) / 8)) / 2)
        assert rates[step] == pytest.approx(expected)
    assert rates[8] == pytest.approx(2.0 * 0.55)
    assert rates[12] == pytest.approx(0.2)
    assert sorted(rates[4:], reverse=True) == rates[4:]


def test_constant_schedule_and_no_warm_up() -> None:
    config = OptimConfig(learning_rate=2.0, warmup_steps=0, schedule="constant")
    assert [learning_rate(step, total=3, config=config) for step in range(5)] == [2.0] * 5


def groups(method: Method, config: OptimConfig) -> dict[str, tuple[float, float]]:
    """Weight decay and rate of every parameter, by name."""
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    return {
        names[id(parameter)]: (group["weight_decay"], group["rate"])
        for group in make_optimizer(method, config).param_groups
        for parameter in group["params"]
    }


def test_only_matrices_decay_and_own_modules_have_their_own_rate() -> None:
    method = make_method("clip_kd")
    found = groups(method, OptimConfig(weight_decay=0.3, module_rate=5.0))
    assert found.keys() == {name for name, _ in method.named_parameters()}
    assert found["student.vision.blocks.0.qkv.weight"] == (0.3, 1.0)
    assert found["student.text.tokens.weight"] == (0.3, 1.0)
    assert found["project.image.weight"] == (0.3, 5.0)
    for name in (
        "student.vision.blocks.0.qkv.bias",
        "student.vision.norm.weight",
        "student.vision.positions",
        "student.text.positions",
        "student.vision.class_token",
        "student._log_logit_scale",
    ):
        assert found[name] == (0.0, 1.0), name
    assert found["project.image.bias"] == found["interactive_scale"] == (0.0, 5.0)


def test_frozen_parameters_are_not_optimised(tmp_path: Path) -> None:
    method = make_method("contrastive")
    method.student.vision.requires_grad_(False)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    make_trainer(tmp_path, method, steps=2).run()
    changed = {name for name, value in method.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert not any(name.startswith("student.vision") for name in changed)


def test_one_step_is_adamw_with_the_weighted_sum_and_a_clipped_gradient(tmp_path: Path) -> None:
    settings = {"temperature": 2.0, "distill_weight": 3.0, "task_weight": 0.5}
    optim = {"learning_rate": 0.01, "warmup_steps": 0, "max_gradient_norm": 0.05, "schedule": "constant"}
    trained = make_trainer(tmp_path, make_method("hinton", settings=settings), steps=1, optim=optim)
    twin = make_method("hinton", settings=settings)
    trained.run()
    terms = twin.train()(trained.builder[trained.sampler.plan(0)])
    loss = 0.5 * terms["contrastive"].value + 3.0 * terms["similarity"].value
    loss.backward()
    norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
    make_optimizer(twin, OptimConfig(**optim)).step()
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(trained.method.state_dict()[name], value, rtol=1e-6, atol=1e-7)
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert line["terms/similarity"] == pytest.approx(terms["similarity"].value.item(), rel=1e-6)
    assert line["gradient_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert norm > 0.05
    assert line["learning_rate"] == 0.01
    assert line["step"] == 1


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    make_trainer(tmp_path, "clip_kd", steps=30, optim={"learning_rate": 3e-3}).run()
    losses = [line["loss"] for line in read_lines(tmp_path / "metrics.jsonl")]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_logit_scale_is_kept_in_range(tmp_path: Path) -> None:
    for start, end in ((9.0, 100.0), (-3.0, 1.0)):
        method = make_method("contrastive")
        nn.init.constant_(method.student.log_logit_scale, start)
        make_trainer(tmp_path / str(start), method, steps=1).run()
        assert method.student.log_logit_scale.detach().exp().item() == pytest.approx(end, rel=0.02)
        assert 0.0 <= method.student.log_logit_scale.item() <= math.log(100) + 1e-6


def test_average_follows_the_student(tmp_path: Path) -> None:
    method = make_method("contrastive")
    result = make_trainer(tmp_path, method, steps=3, ema=0.9).run()
    by_hand: dict[str, torch.Tensor] = {}
    for steps in (1, 2, 3):  # the same run, ended earlier: with a constant rate its weights are those on the way
        other = make_method("contrastive")
        make_trainer(tmp_path / str(steps), other, steps=steps, optim={"schedule": "constant"}).run()
        state = other.student.state_dict()
        by_hand = {key: 0.9 * by_hand[key] + 0.1 * state[key] for key in state} if by_hand else dict(state)
    constant = make_trainer(
        tmp_path / "c", make_method("contrastive"), steps=3, ema=0.9, optim={"schedule": "constant"}
    ).run()
    for key, value in constant.student.state_dict().items():
        torch.testing.assert_close(value, by_hand[key], rtol=1e-5, atol=1e-6)
    assert result.student is not method.student


@pytest.mark.parametrize("method", ["contrastive", "clip_kd"])
def test_bf16_runs_close_to_fp32_with_weights_in_fp32(method: str, tmp_path: Path) -> None:
    runs = {}
    for precision in ("fp32", "bf16"):  # one after the other in one process: neither may fix the other's precision
        trained = make_trainer(tmp_path / precision, method, steps=3, precision=precision)
        trained.run()
        assert {parameter.dtype for parameter in trained.method.parameters()} == {torch.float32}
        runs[precision] = [line["loss"] for line in read_lines(tmp_path / precision / "metrics.jsonl")]
    assert runs["bf16"] == pytest.approx(runs["fp32"], rel=0.05)
    assert runs["bf16"] != runs["fp32"]


# ------------------------------------------------------------------------------------------------ micro-batches


@pytest.mark.parametrize(  # 64: more than there are, which is no matter of a method
    ("name", "size"), [*((name, 3) for name in DUAL), *((name, 64) for name in ("contrastive", "clip_kd", "cmapkd"))]
)
def test_micro_batches_train_the_same_model(name: str, size: int, tmp_path: Path) -> None:
    runs = {}
    for micro_batch in (None, size):
        options = {"optim": {"eps": 1e-2}, "ema": 0.8}  # with a small eps AdamW makes large steps of rounding errors
        trained = make_trainer(tmp_path / str(micro_batch), name, steps=3, micro_batch=micro_batch, **options)
        student = trained.run().student
        lines = [line["loss"] for line in read_lines(trained.out / "metrics.jsonl")]
        runs[micro_batch] = student.state_dict() | trained.method.state_dict() | {"losses": torch.tensor(lines)}
    for key, value in runs[None].items():
        torch.testing.assert_close(runs[size][key], value, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ length and writing


def test_length_in_epochs_or_steps() -> None:
    assert TrainConfig(epochs=2.5).num_steps(4) == 10
    assert TrainConfig(epochs=0.01).num_steps(4) == 1
    assert TrainConfig(steps=7).num_steps(4) == 7


def test_lines_and_checkpoints_come_at_their_intervals(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=7, log_every=3, checkpoint_every=2, keep_checkpoints=3).run()
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [3, 6, 7]
    names = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-000000004", "step-000000006", "step-000000007"]


def test_text_output_without_a_terminal(tmp_path: Path) -> None:
    trained = make_trainer(tmp_path, steps=2, evaluate_every=2, validate=lambda _: {"score": 1.0, "r@1": 1.0})
    trained.console = Console(record=True, width=200, file=(tmp_path / "log").open("w"))
    trained.run()
    trained.console.file.close()
    text = (tmp_path / "log").read_text()
    assert "train: step 2/2  loss" in text
    assert "validation  r@1 1.00" in text


def test_best_checkpoint_is_the_best_validated(tmp_path: Path) -> None:
    scores, weights = iter([1.0, 5.0, 3.0]), []

    def validate(student: DualEncoder) -> dict[str, float]:
        weights.append({key: value.clone() for key, value in student.state_dict().items()})
        return {"score": next(scores), "mean_r@1": 7.0}

    result = make_trainer(tmp_path, steps=5, evaluate_every=2, validate=validate).run()
    assert (result.best_step, result.best_score) == (4, 5.0)
    (best,) = list_checkpoints(tmp_path / "checkpoints", "best")
    tensors, _ = read_checkpoint(best)
    assert best.name == "best-000000004"
    assert list(tensors) == ["student"]
    assert all(torch.equal(tensors["student"][key], value) for key, value in weights[1].items())
    lines = [line for line in read_lines(tmp_path / "metrics.jsonl") if "validation/score" in line]
    assert [(line["step"], line["validation/score"]) for line in lines] == [(2, 1.0), (4, 5.0), (5, 3.0)]


def test_validation_leaves_training_modes_on(tmp_path: Path) -> None:
    seen = []

    def validate(student: DualEncoder) -> dict[str, float]:
        student.eval()
        return {"score": 0.0}

    trained = make_trainer(tmp_path, steps=3, evaluate_every=1, validate=validate)
    trained.method.student.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    trained.run()
    assert seen == [True] * 3


def test_tensorboard_is_written_beside(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for tracker in make_trackers(["tensorboard"], tmp_path, settings={}, resume_step=None):
        tracker.log(1, {"loss": 2.0})
        tracker.close()
    assert list((tmp_path / "tensorboard").glob("events.*"))
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_missing_tracker_says_how_to_install_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else "wandb", None)
    with pytest.raises(ValueError, match=f"uv sync --inexact --extra {name}"):
        make_trackers([name], tmp_path, settings={}, resume_step=None)


def test_lines_after_the_checkpoint_and_broken_ones_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n[1]\n{"st')
    tracker = JsonlTracker(path, resume_step=2)
    tracker.log(3, {"loss": 1.0})
    tracker.close()
    assert read_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


# ------------------------------------------------------------------------------------------------ stopping


class Exploding(DualEncoderMethod):
    """Its loss, or only its gradient, stops being finite."""

    Config: Any = make_method("contrastive").Config
    term_names: Any = ("size",)
    uses_teacher = False
    calls = 0

    def __init__(self, how: str, at: int) -> None:
        super().__init__(self.Config(name="exploding"), student=make_model())
        self.how, self.at = how, at

    def terms(self, batch: Any) -> dict[str, Term]:
        self.calls += 1
        value = self.encode_student(batch).image.embedding.square().mean()
        if self.calls > self.at:
            steep = (value - value.detach()).abs().sqrt()  # zero, with an infinite slope
            value = value * float("inf") if self.how == "loss" else value + steep
        return {"size": Term(value)}


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = make_trainer(tmp_path, Exploding(how, at=3), steps=8, checkpoint_every=1)
    write = checkpoint.write_checkpoint

    def slowly(*values: Any, **named: Any) -> Any:  # as on a busy disk: the message waits for the last one
        time.sleep(0.3)
        return write(*values, **named)

    monkeypatch.setattr(checkpoint, "write_checkpoint", slowly)
    with pytest.raises(NonFiniteLossError, match="not finite at step 4") as stopped:
        trained.run()
    message = str(stopped.value)
    batch = trained.builder[trained.sampler.plan(3)]
    assert all(sample_id in message for sample_id in batch.ids)
    assert "Last good checkpoint: step-000000003" in message
    assert "(size " in message
    tensors, progress = read_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1])
    assert progress.step == 3
    assert all(bool(value.isfinite().all()) for value in tensors["method"].values())
    assert all(bool(value.isfinite().all()) for value in trained.method.state_dict().values())


@pytest.mark.parametrize(
    ("asked", "batch_size", "processes", "split"),
    [
        ("auto", 4096, 1, False),
        ("auto", 4096, 2, True),
        ("auto", 4095, 64, False),
        (True, 8, 2, True),
        (False, 32768, 64, False),
    ],
)
def test_large_batches_of_several_processes_share_out_the_rows_of_losses(
    asked: Any, batch_size: int, processes: int, split: bool
) -> None:
    config = TrainConfig(steps=1, batch_size=batch_size, local_loss=asked)
    assert config.splits_losses(processes) is split


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_is_told_of_at_the_next_line_by_its_own_step(how: str, tmp_path: Path) -> None:
    method = Exploding(how, at=3)
    trained = make_trainer(tmp_path, method, steps=12, checkpoint_every=3, log_every=5)
    with pytest.raises(NonFiniteLossError, match="not finite at step 4") as stopped:
        trained.run()
    assert method.calls == 5
    assert "Last good checkpoint: step-000000003" in str(stopped.value)
    assert all(bool(value.isfinite().all()) for value in trained.method.state_dict().values())


def test_a_method_without_terms_is_refused(tmp_path: Path) -> None:
    zero = dict.fromkeys(("task_weight", "feature_weight", "relational_weight", "interactive_weight"), 0)
    with pytest.raises(ValueError, match="every weight is zero"):
        make_trainer(tmp_path, make_method("clip_kd", settings=zero)).run()


def test_too_many_bad_samples_stop_the_run(tmp_path: Path) -> None:
    source = MemorySource(200, bad=range(0, 200, 4))
    trained = make_trainer(tmp_path, source=source, steps=60, max_bad_share=0.05)
    with pytest.raises(TooManyBadSamples, match=r"more than max_bad_share 5 %: first: m\d+: truncated"):
        trained.run()
    assert 100 / 8 - 4 < trained.progress.step < 20  # from a hundred samples on
    listed = read_lines(tmp_path / "bad_samples.jsonl")
    assert listed
    assert all(line["reason"] == "truncated: no end marker" for line in listed)


def test_ledger_is_written_and_goes_on_after_a_resume(tmp_path: Path) -> None:
    source = MemorySource(24, bad=(3, 11), without_caption=(5,))
    first = make_trainer(tmp_path, source=source, steps=3)
    first.run()
    listed = (tmp_path / "bad_samples.jsonl").read_text()
    assert {json.loads(line)["id"] for line in listed.splitlines()} <= {"m3", "m11"}
    progress = read_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1])[1]
    assert progress.ledger["num_good"] == 24
    second = make_trainer(tmp_path, source=source, steps=9)
    result = second.run(resume=True)
    assert result.ledger.num_good == 72
    assert result.ledger.num_bad >= first.ledger.num_bad
    assert {json.loads(line)["id"] for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()} == {
        "m3",
        "m11",
    }


def test_batch_larger_than_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 samples, fewer than one batch of 8"):
        make_trainer(tmp_path, source=MemorySource(4))


def test_a_compiled_student_trains_as_it_would_and_keeps_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def traced(module: torch.nn.Module, **options: Any) -> None:
        """Without the code generator, which needs a C++ compiler and half a minute."""
        compiled.append(module)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    runs = []
    for name, compile_it in (("plain", False), ("compiled", True)):
        trainer = make_trainer(tmp_path / name, "clip_kd", steps=3, compile=compile_it, ema=0.9)
        trainer.run()
        runs.append((read_lines(tmp_path / name / "metrics.jsonl"), trainer))
    assert compiled == [runs[1][1].method.student]
    for mine, theirs in zip(runs[0][0], runs[1][0], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    states = [trainer.student.state_dict() for _, trainer in runs]
    assert states[0].keys() == states[1].keys()
