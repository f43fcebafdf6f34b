"""Stages with learned masks: the sparsity they reach, the student that is left, resuming, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.methods import METHODS, AuxiliaryTerms, StageConfig, StepInfo
from cmapkd.methods.pruning import MasksConfig, PruningMethod, sampled
from cmapkd.methods.tinyclip import TinyCLIPConfig
from cmapkd.models import load_model
from cmapkd.models.masked import MaskedEncoder
from cmapkd.models.tiny import TinyDualEncoder, TinyOptions
from cmapkd.run import RunConfig, run
from cmapkd.training import Trainer
from cmapkd.training.config import OptimConfig
from cmapkd.training.optim import make_optimizer, set_learning_rate
from helpers import into_first_stage, make_method, make_model, make_trainer, random_batch, read_lines, tokenizer
from training.test_resume import assert_same_end, interrupt

STEPS = 12
TWICE = {"sparsity": [0.25, 0.5], "rate": 1.43, "warmup": 0.0, "strength": 40.0}  # 3 steps of masks, 3 without, twice
pytestmark = pytest.mark.filterwarnings("ignore:the masks of stage")  # so few steps do not reach it to the percent


def student() -> TinyDualEncoder:
    sizes: dict[str, Any] = {"image_size": 16, "patch_size": 8, "stem_width": 4, "embed_dim": 16, "context_length": 12}
    sizes |= {"vision_width": 64, "text_width": 64, "vision_depth": 2, "text_depth": 1}
    torch.manual_seed(0)
    return TinyDualEncoder(TinyOptions(**sizes), tokenizer(), name="prunable")


def pruning(out: Path, masks: dict[str, Any] = TWICE, **options: Any) -> Trainer:
    method = make_method("tinyclip", student=student(), settings={"alpha": 0.7, "masks": masks})
    return make_trainer(out, method, steps=options.pop("steps", STEPS), **options)


def num_weights(model: Any) -> int:
    return sum(parts.num_weights() for parts in model.prunable.values())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run with two stages of masks, an average, validations and a checkpoint of every step."""
    trainer = pruning(tmp_path_factory.mktemp("whole"), **OPTIONS)
    trainer.run()
    return trainer


def validate(model: Any) -> dict[str, float]:
    """Best at first, when the student is large."""
    return {"score": float(model.num_parameters())}


OPTIONS: dict[str, Any] = {"ema": 0.5, "evaluate_every": 2, "validate": validate, "checkpoint_every": 1}
OPTIONS |= {"student": "best", "keep_checkpoints": STEPS}


def test_a_student_becomes_smaller_in_stages(whole: Trainer) -> None:
    lines = [line for line in read_lines(whole.out / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines if "terms/sparsity" in line] == [1, 2, 3, 7, 8, 9]
    assert [line.get("masks/target") for line in lines] == [0.25] * 3 + [None] * 3 + [0.5] * 3 + [None] * 3
    sparsities = [line["masks/sparsity"] for line in lines if "masks/sparsity" in line]
    assert sparsities == sorted(sparsities)
    assert sparsities[3] > sparsities[0] + 0.05  # the second stage counts from the first student, too
    left = whole.method.student
    assert isinstance(left, TinyDualEncoder)
    assert 1 - num_weights(left) / num_weights(student()) > sparsities[3] + 0.05
    assert left.num_parameters() < 0.9 * student().num_parameters()
    assert whole.progress.structure["masked"] is False
    for name, parameter in whole.method.named_parameters():
        assert parameter.requires_grad, name
    assert any(parameter in whole.engine.optimizer.state for parameter in left.parameters())
    assert len(whole.engine.optimizer.state) == len([*whole.method.parameters()])


def test_the_average_and_the_best_are_of_the_smaller_student(whole: Trainer, tmp_path: Path) -> None:
    assert isinstance(whole.student, TinyDualEncoder)
    assert whole.student is not whole.method.student
    assert whole.student.num_parameters() == whole.method.student.num_parameters()
    assert whole.progress.best_step is not None
    assert whole.progress.best_step > 9  # larger students were better, but are none of this size
    whole.student.save(tmp_path / "s")
    again, batch = load_model(tmp_path / "s"), random_batch(4).inputs["student"]
    with torch.no_grad():
        assert torch.equal(again(batch).image.embedding, whole.student.eval()(batch).image.embedding)


@pytest.mark.parametrize("steps", [(2, 4, 7, 10), (3, 6, 9)])
def test_a_run_interrupted_before_at_and_after_the_shrink_ends_the_same(
    whole: Trainer, steps: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in steps:
        interrupt(pruning(tmp_path, **OPTIONS), step, monkeypatch, resume=step > steps[0])
    again = pruning(tmp_path, **OPTIONS)
    again.run(resume=True)
    assert_same_end(whole, again)
    assert again.progress.best_step == whole.progress.best_step


def test_in_micro_batches_it_becomes_smaller_too(whole: Trainer, tmp_path: Path) -> None:
    """The gradients are compared in test_micro_batches; of whole runs the first steps, as a step without momentum
    follows the sign of a rounding error."""
    parts = pruning(tmp_path, micro_batch=3)
    parts.run()
    mine, its = (read_lines(trainer.out / "metrics.jsonl") for trainer in (parts, whole))
    for name in ("terms/affinity", "terms/sparsity", "masks/sparsity"):
        assert mine[0][name] == pytest.approx(its[0][name], rel=1e-4)
    assert num_weights(parts.method.student) < 0.95 * num_weights(student())


def test_the_student_that_is_left_gives_what_the_masked_one_gave(tmp_path: Path) -> None:
    trainer = pruning(tmp_path, steps=6)
    method, found = trainer.method, []
    batch = random_batch(4).inputs["student"]
    reshape = method.reshape

    def watched(stage: StageConfig) -> None:
        before = method.student
        reshape(stage)
        if isinstance(before, MaskedEncoder):
            with torch.no_grad():
                found.append([each.eval()(batch) for each in (before, method.student)])

    method.reshape = watched  # type: ignore[method-assign]
    trainer.run()
    assert len(found) == 2
    for before, after in found:
        for tower in ("image", "text"):
            mine, its = (getattr(each, tower).embedding for each in (before, after))
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


def test_what_stages_freeze_stays_out_of_the_masks_way(tmp_path: Path) -> None:
    stages = [
        StageConfig(share=0.25, train=("modules",), sparsity=0.3),
        StageConfig(share=0.25, train=("student",), terms=("affinity",)),
        StageConfig(share=0.25),
        StageConfig(share=0.25, terms=("affinity",)),
    ]
    method = make_method("tinyclip", student=student(), settings={"alpha": 0.7, "masks": {"rate": 0.1, "warmup": 0.0}})
    trainer = make_trainer(tmp_path, method, steps=8, stages=stages, precision="bf16")
    with pytest.warns(UserWarning, match=r"the masks of stage '' took out \d+ % of the student's weights and not 30 %"):
        trainer.run()  # two steps are too few
    assert len(trainer.engine.optimizer.state) == len([*method.parameters()])


def test_masks_and_multipliers_have_a_rate_of_their_own() -> None:
    method = into_first_stage(make_method("tinyclip", student=student(), settings={"masks": TWICE}))
    optimizer = make_optimizer(method, OptimConfig())
    set_learning_rate(optimizer, 1e-4)
    rates = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in method.named_parameters():
        own = name.startswith(("student.masks.", "constraint."))
        assert rates[parameter]["lr"] == (1.43 if own else 1e-4), name
        assert (rates[parameter]["weight_decay"] == 0) or not own
        assert method.part_of(name) == ("modules" if own else "student")


def test_multipliers_rise_while_something_is_missing_and_masks_fall() -> None:
    method = into_first_stage(make_method("tinyclip", student=student(), settings={"masks": TWICE}))
    assert isinstance(method, PruningMethod)
    assert isinstance(method.student, MaskedEncoder)
    assert method.constraint is not None
    optimizer = make_optimizer(method, OptimConfig())
    set_learning_rate(optimizer, 1e-6)
    before = [mask.detach().clone() for mask in method.student.masks.values()]
    torch.stack([term.weight * term.value for term in method(random_batch(4)).values()]).sum().backward()
    optimizer.step()
    method.after_step(StepInfo())
    assert float(method.constraint.linear.detach()) == pytest.approx(41.43, abs=1e-3)  # torch's first step is the rate
    assert float(method.constraint.quadratic.detach()) == pytest.approx(41.43, abs=1e-3)
    fell = [float((new.detach() - old).mean()) for new, old in zip(method.student.masks.values(), before, strict=True)]
    assert max(fell) < -0.5


@pytest.mark.parametrize("target", [0.3, 0.75])
def test_masks_reach_the_sparsity_that_is_asked_for(target: float) -> None:
    masks = {"sparsity": [target], "rate": 0.1}
    method = into_first_stage(make_method("tinyclip", student=student(), settings={"masks": masks}))
    assert isinstance(method, PruningMethod)
    assert isinstance(method.student, MaskedEncoder)
    assert method.constraint is not None
    optimizer = make_optimizer(method, OptimConfig())
    set_learning_rate(optimizer, 1e-3)
    with torch.no_grad():
        for mask in method.student.masks.values():  # some units are worth more than others
            mask += torch.randn(mask.shape)
    for _ in range(200):
        expected = 1 - method.student.expected_weights() / method.num_weights
        method.constraint(expected, target).backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(StepInfo())
    assert float(expected.detach()) == pytest.approx(target, abs=0.05)
    left = method.student.shrunk()
    assert 1 - num_weights(left) / num_weights(student()) == pytest.approx(target, abs=0.05)


def test_a_stage_of_sampled_units_needs_no_masks(tmp_path: Path) -> None:
    trainer = pruning(tmp_path, {**TWICE, "choice": "random"}, checkpoint_every=1)
    trainer.run()
    left = trainer.method.student
    assert not any("terms/sparsity" in line for line in read_lines(tmp_path / "metrics.jsonl"))
    share = 1 - num_weights(left) / num_weights(student())
    assert 0.5 <= share < 0.52


def test_sampled_units_are_an_equal_share_of_every_group() -> None:
    model = student()
    draws = torch.Generator().manual_seed(1)
    left = sampled(model, 0.5 * num_weights(model), draws)
    assert 0.48 < num_weights(left) / num_weights(model) <= 0.5
    sizes = left.prunable["image"].sizes
    assert len({*sizes.units}) == 1
    assert sizes.units[0] / 256 == pytest.approx(sizes.width / 64, abs=0.02)
    kept = left.state_dict()["vision.class_token"].flatten()
    assert set(kept.tolist()) <= set(model.state_dict()["vision.class_token"].flatten().tolist())
    tiniest = sampled(model, 0, draws)  # one of each remains
    assert tiniest.prunable["text"].sizes.width == 1


# ------------------------------------------------------------------------------------------------ what is refused


def refused(message: str, tmp_path: Path, *, masks: dict[str, Any] | None = None, **options: Any) -> None:
    model = options.pop("model", None) or student()
    name = options.pop("name", "tinyclip")
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path, make_method(name, student=model, settings={"masks": masks} if masks else {}), **options)


def test_stages_that_make_no_sense_are_refused_before_the_first_step(tmp_path: Path) -> None:
    last = StageConfig(name="end", share=0.5)
    asked = [StageConfig(name="go", share=0.5, sparsity=0.5), last]
    refused("stage 'go': this method has no masks, leave sparsity out", tmp_path, name="hinton", stages=asked)
    refused("stage 'go' is the last and has masks: add one", tmp_path, stages=asked[::-1])
    refused("add sparsity to those that shall have masks", tmp_path, masks=TWICE, stages=[StageConfig(share=1.0)])
    falling = [StageConfig(share=0.25, sparsity=0.5), StageConfig(share=0.25, sparsity=0.4), last]
    refused(r"the stages' sparsities \[0.5, 0.4\] must rise", tmp_path, stages=falling)
    frozen = [StageConfig(name="go", share=0.5, sparsity=0.5, train=("student",)), last]
    refused("stage 'go' has masks, which are modules: add modules to train", tmp_path, stages=frozen)


class Beside(AuxiliaryTerms):
    """Terms of a run's own, which know the student's widths."""

    term_names = ()

    def forward(self, *_arguments: Any, **_options: Any) -> dict[str, Any]:
        return {}


def test_heads_that_learn_with_the_student_are_refused(tmp_path: Path) -> None:
    method = make_method("tinyclip", student=student(), settings={"masks": TWICE})
    method.auxiliary = Beside()
    with pytest.raises(ConfigError, match="heads read the student's levels, whose width changes under masks"):
        make_trainer(tmp_path, method)


class Fixed(TinyDualEncoder):
    """Of a family that cannot be taken apart."""

    @property
    def prunable(self) -> dict[Any, Any]:
        return {}


def test_a_student_that_cannot_be_taken_apart_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="test-16 cannot be pruned by masks"):
        make_method("tinyclip", student=make_model(kind=Fixed), settings={"masks": TWICE})
    stages = [StageConfig(share=0.5, sparsity=0.5), StageConfig(share=0.5)]
    with pytest.raises(ValueError, match="test-16 cannot be pruned by masks"):
        make_trainer(tmp_path, make_method("tinyclip", student=make_model(kind=Fixed)), stages=stages)
    make_trainer(tmp_path, make_method("tinyclip", student=make_model(kind=Fixed)), steps=2).run()  # without masks


def test_settings_are_checked_and_left_out_where_there_are_none() -> None:
    for sparsity in ([0.5, 0.25], [1.0], [0.0], [0.5, 0.5]):
        with pytest.raises(ConfigError, match="must rise, between 0 and 1"):
            MasksConfig.from_mapping({"sparsity": sparsity})
    assert "masks" not in TinyCLIPConfig(name="tinyclip").model_dump()
    assert "sparsity" not in StageConfig(share=1.0).model_dump(mode="json")
    assert StageConfig(share=1.0, sparsity=0.5).model_dump(mode="json")["sparsity"] == 0.5
    method = make_method("tinyclip", settings={"masks": TWICE})
    shares: list[float | None] = [stage.share for stage in method.default_stages]
    assert shares == [0.25] * 4
    assert [stage.sparsity for stage in method.default_stages] == [0.25, None, 0.5, None]
    assert METHODS["tinyclip"].prunes
    assert not METHODS["cmapkd"].prunes


def test_masks_are_the_same_whatever_else_is_drawn() -> None:
    found: list[Tensor] = []
    for noise in (0, 5):
        method = into_first_stage(make_method("tinyclip", student=student(), settings={"masks": TWICE})).train()
        torch.rand(noise)
        found.append(method(random_batch(4))["affinity"].value)
    assert torch.equal(*found)


def test_a_run_reports_and_saves_the_smaller_student(tmp_path: Path) -> None:
    config = RunConfig.from_mapping(
        {
            "teacher": "tiny:scenes-teacher",
            "student": "tiny:scenes-teacher",
            "data": {"train": "scenes?length=16", "val": "scenes@val?length=8"},
            "method": {"name": "tinyclip", "masks": {"sparsity": [0.5], "rate": 3.0, "warmup": 0.0}},
            "training": {"steps": 4, "batch_size": 8, "log_every": 1, "device": "cpu"},
            "evaluation": {"templates": "plain", "tasks": ["retrieval"]},
            "cache": {"mode": "auto", "folder": str(tmp_path / "cache")},
        }
    )
    metrics = run(config, out=tmp_path / "run").metrics
    left = load_model(tmp_path / "run")
    assert metrics["student"]["params"] == left.num_parameters() < 0.7 * metrics["teacher"]["params"]
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert ["terms/sparsity" in line for line in lines if "loss" in line] == [True, True, False, False]
