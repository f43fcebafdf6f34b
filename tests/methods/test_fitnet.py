"""FitNet: its hint against the published code and in loops, its stages, and what a stage leaves as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.methods import StageConfig, StepInfo
from cmapkd.methods.fitnet import FitNet, FitNetConfig
from cmapkd.models import FrozenTeacher
from cmapkd.models.storage import read_weights
from cmapkd.models.tiny import TinyDualEncoder, TinyOptions
from cmapkd.objectives import hint_distance, similarity_divergence
from helpers import make_method, make_trainer, random_batch, read_lines, tokenizer
from training.test_resume import assert_same_end, interrupt

# Numbers of mdistiller's `FitNet`; the file names commit and conditions.
PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "fitnet.json").read_text())
UPPER = ("vision.blocks.1.", "vision.blocks.2.", "vision.norm.", "vision.project.", "text.", "_log_logit_scale")


def deep(depth: int = 3, *, image_size: int = 16, dim: int = 16, width: int = 32, seed: int = 0) -> TinyDualEncoder:
    options = TinyOptions(
        image_size=image_size,
        patch_size=8,
        stem_width=4,
        vision_width=width,
        vision_depth=depth,
        text_width=32,
        text_depth=2,
        embed_dim=dim,
        context_length=12,
        vocab_size=100,
    )
    torch.manual_seed(seed)
    return TinyDualEncoder(options, tokenizer(), name="deep")


def fitnet(**settings: Any) -> FitNet:
    settings = {"guided_layer": "blocks.0", **settings}
    teacher = FrozenTeacher(deep(2, image_size=24, dim=24, width=64, seed=7))
    method = make_method("fitnet", student=deep(), teacher=teacher, settings=settings)
    assert isinstance(method, FitNet)
    return method


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_hint_equals_the_published_code() -> None:
    student = tensor(PUBLISHED["student"]).requires_grad_()
    regress = nn.Linear(student.shape[1], len(PUBLISHED["bias"])).double()
    regress.load_state_dict({"weight": tensor(PUBLISHED["weight"]), "bias": tensor(PUBLISHED["bias"])})
    cells, targets = (x.flatten(2).transpose(1, 2) for x in (student, tensor(PUBLISHED["teacher"])))
    weight = FitNetConfig(name="fitnet", form="one_stage").weight_of_hint()
    value = weight * hint_distance(regress(cells), targets).mean()
    assert value.item() == pytest.approx(PUBLISHED["value"], rel=1e-12)
    found = torch.autograd.grad(value, (student, regress.weight, regress.bias))
    for gradient, key in zip(found, ("gradient_student", "gradient_weight", "gradient_bias"), strict=True):
        torch.testing.assert_close(gradient, tensor(PUBLISHED[key]), rtol=1e-10, atol=1e-10)


def test_hint_is_the_mean_of_squares_on_the_students_grid_written_out() -> None:
    method, batch = fitnet(), random_batch(3)
    student, teacher = method.student, method.teacher
    assert teacher is not None
    ours = student.encode_image(batch.inputs["student"].images, ("blocks.0",)).levels["blocks.0"].values[:, 1:]
    theirs = teacher.model.encode_image(batch.inputs["teacher"].images, ("blocks.0",)).levels["blocks.0"].values[:, 1:]
    maps = theirs.unflatten(1, (3, 3)).permute(0, 3, 1, 2)  # the teacher's 3 x 3 patches on the student's 2 x 2
    targets = nn.functional.adaptive_avg_pool2d(maps, 2).flatten(2).transpose(1, 2)
    mapped = method.regress["image"](ours)
    total = 0.0
    for sample in range(3):
        for cell in range(4):
            for channel in range(64):
                total += (mapped[sample, cell, channel] - targets[sample, cell, channel]).item() ** 2
    assert method(batch)["hint"].value.item() == pytest.approx(total / (3 * 4 * 64), rel=1e-5)


def test_terms_and_weights() -> None:
    terms = fitnet().terms(random_batch(4))
    weights = {name: term.weight for name, term in terms.items()}
    assert weights == {"hint": 0.5, "contrastive": 1.0, "similarity": pytest.approx(4 / 9)}
    one_stage = fitnet(form="one_stage")
    assert {name: term.weight for name, term in one_stage.terms(random_batch(4)).items()} == {
        "hint": 100.0,
        "contrastive": 1.0,
    }
    assert one_stage.default_stages == ()


def test_similarity_is_hintons() -> None:
    method, batch = fitnet(temperature=2.0), random_batch(4)
    student, teacher = method.encode_student(batch), method.encode_teacher(batch)
    expected = similarity_divergence(
        student.image.embedding,
        student.text.embedding,
        teacher.image.embedding,
        teacher.text.embedding,
        student_scale=student.logit_scale,
        teacher_scale=teacher.logit_scale,
        temperature=2.0,
    )
    torch.testing.assert_close(method.terms(batch)["similarity"].value, expected)


def test_the_published_lambda_is_restated_for_the_squared_temperature() -> None:
    weight, temperature = fitnet().config.distilled()[0], 3.0
    assert weight * temperature**2 == pytest.approx(4.0)


def test_lambda_goes_down_over_its_stage_alone(tmp_path: Path) -> None:
    method = fitnet(hint_share=0.2, distill_weight=[4, 1])
    trainer, weights = make_trainer(tmp_path, method, steps=10), []
    terms = method.terms

    def watched(batch: Any) -> Any:
        found = terms(batch)
        weights.append(found["similarity"].weight if "similarity" in found else None)
        return found

    method.terms = watched  # type: ignore[method-assign]
    trainer.run()
    assert weights == [None, None, *(pytest.approx(4 - 3 * step / 8) for step in range(8))]
    constant = fitnet(distill_weight=2)
    constant.step = StepInfo(progress=0.7)
    assert constant.terms(random_batch(4))["similarity"].weight == 2


def test_the_guided_part_ends_at_the_guided_layer() -> None:
    method = fitnet()
    names = {name for name, _ in method.student.named_parameters()}
    guided = method.student_parts["guided"]
    assert guided == {name for name in names if not name.startswith(UPPER)}
    assert {"vision.class_token", "vision.stem.0.0.weight", "vision.blocks.0.shrink.bias"} <= guided
    both = fitnet(text_guided_layer="blocks.0", text_hint_layer=1.0).student_parts["guided"]
    assert both - guided == {n for n in names if n.startswith(("text.tokens", "text.pos", "text.blocks.0"))}


def test_the_hint_stage_leaves_the_upper_layers_bit_for_bit(tmp_path: Path) -> None:
    method = fitnet(hint_share=0.5)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    trainer = make_trainer(tmp_path, method, steps=8, optim={"weight_decay": 0.5}, ema=0.5, checkpoint_every=4)
    trainer.run()
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [{key for key in line if key.startswith("terms/")} for line in lines] == [{"terms/hint"}] * 4 + [
        {"terms/contrastive", "terms/similarity"}
    ] * 4
    hinted = read_weights(tmp_path / "checkpoints" / "step-000000004" / "method.safetensors")
    for name, value in before.items():
        upper = name.removeprefix("student.").startswith(UPPER)
        assert torch.equal(hinted[name], value) == upper, name
    for name, value in method.state_dict().items():  # then everything but the regressor learns
        assert torch.equal(value, hinted[name]) == name.startswith("regress."), name
    trainer.student.save(tmp_path / "student")
    assert not any("regress" in name for name in read_weights(tmp_path / "student" / "model.safetensors"))


def test_a_run_interrupted_in_either_stage_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_trainer(tmp_path / "whole", fitnet(hint_share=0.5), steps=6)
    whole.run()
    for step in (2, 3, 5):
        parts = make_trainer(tmp_path / "parts", fitnet(hint_share=0.5), steps=6)
        interrupt(parts, step, monkeypatch, resume=step > 2)
    again = make_trainer(tmp_path / "parts", fitnet(hint_share=0.5), steps=6)
    again.run(resume=True)
    assert_same_end(whole, again)


def test_only_what_a_stage_reads_is_asked_of_the_models() -> None:
    method = fitnet(text_guided_layer=0.5, text_hint_layer="blocks.1")
    assert method.student_needs.image_levels == method.student_needs.text_levels == ("blocks.0",)
    assert (method.teacher_needs.image_levels, method.teacher_needs.text_levels) == (("blocks.0",), ("blocks.1",))
    assert method.teacher_detail == "dense"
    method.enter(method.default_stages[1])
    assert not method.teacher_needs.image_levels
    assert method.teacher_detail == "global"


def test_a_recipes_own_stages_take_the_place_of_the_methods(tmp_path: Path) -> None:
    stages = [StageConfig(share=0.5, terms=("hint",), train=("guided",)), StageConfig(share=0.5)]
    trainer = make_trainer(tmp_path, fitnet(), steps=4, stages=stages)
    before = trainer.method.state_dict()["regress.image.weight"].clone()
    assert trainer.ends == [2, 4]
    trainer.method.enter(trainer.stages[0])
    learning = {name for name, parameter in trainer.method.named_parameters() if parameter.requires_grad}
    assert learning == {f"student.{name}" for name in fitnet().student_parts["guided"]}
    assert torch.equal(trainer.method.state_dict()["regress.image.weight"], before)
    with pytest.raises(
        ConfigError, match=r"train has 'guded' \(did you mean 'guided'\?\); what can learn here: student"
    ):
        make_trainer(tmp_path, fitnet(), stages=[StageConfig(share=1.0, train=("guded",))])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_guided_layer": 0.5}, "give text_guided_layer and text_hint_layer both, or neither"),
        ({"guided_layer": 1.5}, r"guided_layer: .*1.5 is no share of the depth"),
        ({"distill_weight": [4, -1]}, r"distill_weight: .*not negative"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FitNetConfig.from_mapping({"name": "fitnet", **settings})


def test_a_level_that_is_not_there_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"there is no image level 'block.0' \(did you mean 'blocks.0'\?\); known: blocks"
    ):
        fitnet(guided_layer="block.0")


def test_standardised_features_do_not_depend_on_their_size() -> None:
    plain, standard = fitnet(), fitnet(standardise=True)
    batch = random_batch(4)
    before = plain(batch)["hint"].value, standard(batch)["hint"].value
    for method in (plain, standard):
        with torch.no_grad():
            method.regress["image"].weight.mul_(3)
            method.regress["image"].bias.mul_(3)
    after = plain(batch)["hint"].value, standard(batch)["hint"].value
    assert not torch.isclose(after[0], before[0], rtol=0.05)
    torch.testing.assert_close(after[1], before[1], rtol=1e-3, atol=1e-4)
    assert 0 < float(before[1].detach()) < 4
