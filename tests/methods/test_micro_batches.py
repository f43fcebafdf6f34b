"""A batch encoded in micro-batches is the batch: terms, gradients, random state, and no more than one part kept."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmapkd.methods import Method, StageConfig, micro_batches
from cmapkd.methods.dual import DualEncoderMethod
from cmapkd.models import Features, TowerFeatures
from cmapkd.models.tiny import TinyDualEncoder
from helpers import (
    CLASSIFYING,
    CLIP_KD_IN_FULL,
    CMAPKD_EXACT,
    DUAL,
    GRADNORM,
    LENT,
    MASKED,
    ROUNDING,
    DropoutStudent,
    into_first_stage,
    make_method,
    make_student,
    random_batch,
)

BATCH, MICRO_BATCH = 8, 3  # the last part is shorter
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # name: (method, settings); every method as it comes, and more
    **{name: (name, {}) for name in (*DUAL, *CLASSIFYING)},
    "promptkd": ("promptkd", {"distill_weight": 5.0}),  # by default 1000, for more than the 5 classes here
    "c2kd, every sample": ("c2kd", {"agreement": -1.0, "direct_weight": 1.0}),
    "cmapkd, everything": ("cmapkd", CMAPKD_EXACT),
    "cmapkd, key tokens": ("cmapkd", {**CMAPKD_EXACT, "places": "key_tokens", "key_tokens": 2}),
    "cmapkd, pooled": ("cmapkd", {**CMAPKD_EXACT, "places": "pooled"}),
    "cmapkd, top down and gated": (
        "cmapkd",
        {**CMAPKD_EXACT, "ablations": {**CMAPKD_EXACT["ablations"], "top_down": True}, "weighting": "gate"},
    ),
    "clip_kd, everything": ("clip_kd", CLIP_KD_IN_FULL),
    "clip_rd, lent hints": ("clip_rd", LENT),
    "clip_kd, weighted terms": ("clip_kd", {"term_weighting": "uncertainty"}),
    "hinton, classes": ("hinton", {"form": "classes"}),
    "hinton, the teacher's classes": ("hinton", {"form": "classes", "class_vectors": "teacher"}),
    "clip_kd, balanced terms": ("clip_kd", {"term_weighting": GRADNORM}),
    "tinyclip, with masks": ("tinyclip", MASKED),
    "tinyclip, with masks and balanced terms": ("tinyclip", {**MASKED, "term_weighting": GRADNORM}),
}


class BiasedStudent(TinyDualEncoder):
    """Has SigLIP's bias, which reaches the loss beside the embeddings."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.bias = nn.Parameter(torch.tensor(-2.0))

    @property
    def logit_bias(self) -> Tensor:
        return self.bias


class NormedStudent(TinyDualEncoder):
    """Has a batch norm."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.norm = nn.BatchNorm1d(self.embed_dim)

    def encode_image(self, images: Tensor, levels: Sequence[str] = ()) -> TowerFeatures:
        tower = super().encode_image(images, levels)
        return replace(tower, embedding=self.norm(tower.embedding))


def built(name: str, dtype: torch.dtype = torch.float32, kind: type[TinyDualEncoder] = TinyDualEncoder) -> Method:
    method_name, settings = CASES[name]
    student = make_student(method_name, kind=kind)
    method = make_method(method_name, student=student, settings=settings).to(dtype).train()
    if method.teacher is not None:
        method.teacher.model.to(dtype)
    return into_first_stage(method) if "with masks" in name else method


def results(method: Method, micro_batch: int | None, *, precision: torch.dtype | None = None) -> dict[str, Tensor]:
    """Terms and gradients of a batch, after another one that fills a bank, if there is one."""
    dtype = next(method.student.parameters()).dtype
    earlier, batch = (
        random_batch(BATCH, seed=seed, dtype=dtype, pools=method.text_pools, views=method.more_views) for seed in (1, 0)
    )
    method.micro_batch = micro_batch
    with torch.no_grad():
        method(replace(earlier, ids=tuple(f"earlier{i}" for i in range(BATCH))))
    with torch.autocast("cpu", dtype=precision) if precision else nullcontext():
        terms = method(batch)
    torch.stack([term.weight * term.value for term in terms.values()]).sum().backward()
    values = {f"term/{key}": term.value.detach() for key, term in terms.items()}
    found = {name: parameter.grad for name, parameter in method.named_parameters() if parameter.grad is not None}
    return values | {f"gradient/{name}": gradient for name, gradient in found.items()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        error = float((found[key] - value).abs().max()) / max(1.0, float(value.abs().max()))
        assert error < tolerance, f"{key}: {error}"


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        *((name, torch.float64, 1e-10) for name in CASES),
        *((name, torch.float32, 1e-5) for name in ("contrastive", "promptkd", "clip_kd, everything", "dho")),
        *((name, torch.float32, 1e-5) for name in ("cmapkd, everything", "tinyclip, with masks and balanced terms")),
    ],
)
def test_terms_and_gradients_equal_those_of_one_batch(name: str, dtype: torch.dtype, tolerance: float) -> None:
    whole = results(built(name, dtype), None)
    assert any(key.startswith("gradient/student.") for key in whole)
    rounding = ROUNDING.get(CASES[name][0], 1.0) if dtype == torch.float32 else 1.0
    assert_close(results(built(name, dtype), MICRO_BATCH), whole, tolerance * rounding)


def test_a_logit_bias_gets_its_gradient() -> None:
    whole = results(built("contrastive", torch.float64, BiasedStudent), None)
    assert whole["gradient/student.bias"].abs() > 1e-3
    assert_close(results(built("contrastive", torch.float64, BiasedStudent), MICRO_BATCH), whole, 1e-10)


def test_a_student_that_does_not_learn_gets_no_gradient() -> None:
    found = []
    for micro_batch in (None, MICRO_BATCH):
        method = built("cmapkd, everything", torch.float64)
        method.enter(StageConfig(share=1.0, train=("modules", "weighting")))
        found.append(results(method, micro_batch))
    assert "gradient/match.project_visual.lateral.P2.weight" in found[0]
    assert not any(key.startswith("gradient/student.") for key in found[0])
    assert_close(found[1], found[0], 1e-10)


@pytest.mark.parametrize("name", ["clip_kd", "cmapkd, everything"])
def test_dropout_is_the_same_in_both_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    found = results(built(name, torch.float64, DropoutStudent), MICRO_BATCH)
    after = torch.rand(1)
    monkeypatch.setattr(micro_batches, "checkpoint", lambda run, ids, **_: run(ids))  # everything is kept
    torch.manual_seed(0)
    assert_close(found, results(built(name, torch.float64, DropoutStudent), MICRO_BATCH), 1e-12)
    assert torch.equal(after, torch.rand(1))  # the backward pass draws nothing of its own


@pytest.mark.parametrize("name", ["clip_kd", "cmapkd, everything"])
def test_bf16_sums_the_gradients_of_its_parts_in_float32(name: str) -> None:
    exact = results(built(name), None)
    whole = results(built(name), None, precision=torch.bfloat16)
    parts = results(built(name), 1, precision=torch.bfloat16)

    def error(found: dict[str, Tensor]) -> float:
        gradients = [key for key in exact if key.startswith("gradient/student.")]
        away, length = (
            torch.stack([x.square().sum() for x in them]).sum().sqrt()
            for them in ([found[key] - exact[key] for key in gradients], [exact[key] for key in gradients])
        )
        return float(away / length)

    assert error(parts) < 1.2 * error(whole) < 0.1
    weight = "gradient/student.vision.blocks.0.qkv.weight"
    assert torch.equal(whole[weight], whole[weight].bfloat16().float())  # comes in bf16 from the one product
    assert not torch.equal(parts[weight], parts[weight].bfloat16().float())


@pytest.mark.parametrize("keeps", [False, True])
def test_one_part_at_a_time(keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DualEncoderMethod, "_keeps_answers", keeps)  # as with a live teacher on a GPU
    method = built("cmapkd")
    assert method.teacher is not None
    method.micro_batch = MICRO_BATCH
    sizes: dict[str, list[int]] = {"student": [], "teacher": []}
    for role, model in (("student", method.student), ("teacher", method.teacher.model)):

        def seen(images: Tensor, levels: Any = (), role: str = role, encode: Any = model.encode_image) -> TowerFeatures:
            sizes[role].append(len(images))
            result: TowerFeatures = encode(images, levels)
            return result

        monkeypatch.setattr(model, "encode_image", seen)
    terms = method(random_batch(BATCH))
    assert sizes == {"student": [3, 3, 2], "teacher": [3, 3, 2]}
    torch.stack([term.value for term in terms.values()]).sum().backward()
    again = [3, 3, 2, 2, 3, 3]
    assert sizes == {"student": again, "teacher": [3, 3, 2] if keeps else again}


def test_kept_answers_are_answers_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for keeps in (False, True):
        monkeypatch.setattr(DualEncoderMethod, "_keeps_answers", keeps)
        found.append(results(built("cmapkd, key tokens", torch.float64), MICRO_BATCH))
    assert_close(*found, 1e-14)


def test_nothing_of_a_part_is_kept_between_the_passes() -> None:
    def kept(micro_batch: int | None) -> list[tuple[int, ...]]:
        method, shapes = built("cmapkd"), []
        method.micro_batch = micro_batch

        def pack(tensor: Tensor) -> Tensor:
            shapes.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            method(random_batch(BATCH))
        return [shape for shape in shapes if len(shape) > 2]

    assert kept(None)
    assert not kept(MICRO_BATCH)


def test_batch_norms_take_note_of_each_part_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def statistics() -> Tensor:
        method = built("contrastive", torch.float64, NormedStudent)
        results(method, MICRO_BATCH)
        assert isinstance(method.student, NormedStudent)
        assert method.student.norm.momentum == 0.1
        return torch.cat([method.student.norm.running_mean, method.student.norm.running_var])

    found = statistics()
    monkeypatch.setattr(micro_batches, "checkpoint", lambda run, ids, **_: run(ids))
    assert torch.equal(found, statistics())


def test_levels_are_joined_whole() -> None:
    method = built("cmapkd")
    whole = method.encode_teacher(random_batch(BATCH))
    method.micro_batch = MICRO_BATCH
    parts = method.encode_teacher(random_batch(BATCH))

    def tensors(features: Features) -> list[Tensor]:
        levels = [*features.image.levels.values(), *features.text.levels.values()]
        return [level.values for level in levels] + [level.mask for level in levels if level.mask is not None]

    assert len(tensors(whole)) == 3
    for one, other in zip(tensors(whole), tensors(parts), strict=True):
        torch.testing.assert_close(one, other)
