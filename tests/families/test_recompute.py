"""Activation checkpointing: the same losses, gradients and statistics of every family, with fewer activations kept."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from family_support import FAMILIES, make, method_for
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.data.plans import PlanSampler
from cmapkd.data.types import Batch
from cmapkd.methods import Method
from cmapkd.training import TrainConfig
from cmapkd.training.recompute import recompute_blocks
from helpers import MemorySource, make_builder, make_method, make_model, make_trainer
from writers import batch_of, make_task


def step(method: Method, batch: Batch) -> tuple[dict[str, Tensor], int]:
    """Losses, gradients and buffers of one step, and the bytes that the forward pass kept beside the weights."""
    torch.manual_seed(5)
    weights = {parameter.untyped_storage().data_ptr() for parameter in method.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        terms = method(batch)
    parts = [term.weight * term.value / (1 if term.count is None else term.count) for term in terms.values()]
    total = torch.stack(parts).sum()
    total.backward()
    found = {"loss": total.detach()}
    found |= {name: each.grad for name, each in method.named_parameters() if each.grad is not None}
    found |= {name: each.clone() for name, each in method.named_buffers()}
    return found, sum(kept.values())


def compare(method: Method, batch: Batch, micro_batch: int | None = None) -> float:
    """Checks that both ways are equal, and says how many times more bytes are kept without."""
    again = copy.deepcopy(method)
    recompute_blocks(again)
    kinds = [type(module) for module in again.modules()]
    recompute_blocks(again)  # a second time changes nothing
    assert [type(module) for module in again.modules()] == kinds
    method.micro_batch = again.micro_batch = micro_batch
    (expected, many), (found, few) = step(method, batch), step(again, batch)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
    return many / max(1, few)


@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_the_same_in_training(name: str, micro_batch: int | None, tmp_path: Path) -> None:
    method = method_for(make(name, tmp_path))
    builder = make_builder(method, MemorySource(16))
    plan = next(iter(PlanSampler(16, batch_size=8, seed=0, start=0, stop=1)))
    ratio = compare(method, builder[plan], micro_batch)
    assert ratio > 1 or micro_batch is not None


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("name", ["sft", "token_kd", "taid", "llava_kd"])
def test_models_that_write_are_the_same(name: str, micro_batch: int | None) -> None:
    method = make_task(name)
    compare(method, batch_of(method), micro_batch)


def test_deep_towers_keep_far_less() -> None:
    student = make_model(depth=8)
    method = make_method("contrastive", student=student).train()
    plan = next(iter(PlanSampler(16, batch_size=8, seed=0, start=0, stop=1)))
    assert compare(method, make_builder(method, MemorySource(16))[plan]) > 2


def test_hints_of_inner_levels_are_the_same() -> None:
    method = make_method("cmapkd").train()
    plan = next(iter(PlanSampler(16, batch_size=8, seed=0, start=0, stop=1)))
    compare(method, make_builder(method, MemorySource(16))[plan])


def test_a_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path / "plain", steps=3, ema=0.9).run()
    again = make_trainer(tmp_path / "again", steps=3, ema=0.9, activation_checkpointing=True).run()
    states: Any = plain.student.state_dict(), again.student.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_what_cannot_compute_again_is_refused() -> None:
    method = make_method("contrastive")
    method.student.vision, method.student.text = nn.Linear(1, 1), nn.Linear(1, 1)
    with pytest.raises(ConfigError, match="has no blocks that could compute again"):
        recompute_blocks(method)
    pruned = make_method("tinyclip", settings={"masks": {"sparsity": [0.5]}})
    with pytest.raises(ConfigError, match="masks are multiplied into weights that exist for a forward pass alone"):
        recompute_blocks(pruned, pruned.default_stages)
    with pytest.raises(ConfigError, match="compile and activation_checkpointing do not go together"):
        TrainConfig.from_mapping({"steps": 1, "compile": True, "activation_checkpointing": True}, where="training")
