"""Every method on a pretended GPU, whole and in micro-batches: one device for all, and how often the host waits for it.

A wait is a number that is read from the device, or a copy that the host does not go on beside. A step of the trainer,
with its backward pass and its update, has none, whatever the method and however many micro-batches. Only the first step
of a run or a stage may have some, and the last one before a log line.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from pretended import (
    CASES,
    CUDA,
    MICRO_BATCH,
    OFTEN,
    OFTEN_WHOLE,
    SIZES,
    Wait,
    batches,
    pretending,
    waits_of,
    waits_of_case,
)
from torch import Tensor

from cmapkd.data.types import Batch, TokenBatch
from cmapkd.features.words import WordAligner
from cmapkd.methods import METHODS, Term
from cmapkd.training.engine import WholeEngine
from cmapkd.training.stopping import FiniteWatch
from helpers import make_method

Contrastive: Any = METHODS["contrastive"]
FLAG = "read at training/stopping.py"  # whether steps were finite


def check(waits: list[list[Wait]]) -> None:
    """No step has a wait."""
    for step, of_step in enumerate(waits):
        listed = "\n".join(map(str, of_step))
        assert not of_step, f"{len(of_step)} waits in step {step} of those counted, none allowed:\n{listed}"


@pytest.mark.parametrize(
    ("case", "size"),
    [
        pytest.param(case, size, marks=[] if case in often else pytest.mark.slow)
        for size, often in (("whole", OFTEN_WHOLE), ("micro-batches", OFTEN))
        for case in CASES
    ],
)
def test_a_step_runs_where_the_student_is_and_waits_for_nothing(tmp_path: Path, case: str, size: str) -> None:
    check(waits_of_case(tmp_path, case, SIZES[size]))


class Planted(Contrastive):  # type: ignore[misc]
    """A method with a fault in its forward or its backward pass."""

    fault: Callable[[Tensor], Any]

    def terms(self, batch: Batch) -> dict[str, Term]:
        terms: dict[str, Term] = super().terms(batch)
        name, term = next(iter(terms.items()))
        value = self.fault(term.value)
        return {**terms, name: Term(value if isinstance(value, Tensor) else term.value, term.weight)}


def waits_with(
    folder: Path, fault: Callable[[Tensor], Any], micro_batch: int | None = None, *, steps: int = 1
) -> list[list[Wait]]:
    """In so many steps after the first."""
    kind = type("Planted", (Planted,), {"fault": staticmethod(fault)})
    given = batches("contrastive")
    return waits_of(folder, lambda: make_method(kind), given, micro_batch=micro_batch, steps=1 + steps)[1:]


class Backwards(torch.autograd.Function):
    """The identity, with a fault in its backward pass."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, fault: Callable[[Tensor], Any]) -> Tensor:
        ctx.fault = fault
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        changed = ctx.fault(gradients[0])
        return (changed if isinstance(changed, Tensor) else gradients[0]), None


def backwards(fault: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    return lambda value: Backwards.apply(value, fault)  # type: ignore[no-untyped-call, no-any-return]


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda value: value.item(),
    "float": float,
    "branch": lambda value: 1 if value > 0 else 2,
    "tolist": lambda value: value.expand(2).tolist(),
    "cpu": lambda value: value.cpu(),
    "nonzero": lambda value: value.expand(2).nonzero(),
    "equal": lambda value: torch.equal(value, value),
    "copy to the host": lambda value: torch.zeros(()).copy_(value),
    "constant": lambda value: value * torch.tensor([1.0], device=value.device),
    "index of the host": lambda value: value.expand(2)[torch.tensor([0, 1])],
    "inverse": lambda value: torch.linalg.inv(value.float().expand(2, 2)),
}


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_planted_reads_are_found(tmp_path: Path, way: str) -> None:
    """Each in a step of its own; before and after three of them comes a step in which nothing is read."""
    names = [name for number, read in enumerate(READS) for name in (["", read] if number % 3 == 0 else [read])] + [""]
    coming = iter(["", *names])  # the first step does not count

    def fault(value: Tensor) -> None:
        if name := next(coming):
            READS[name](value.detach())

    waits = waits_with(tmp_path, fault if way == "forward" else backwards(fault), steps=len(names))
    assert next(coming, None) is None
    for name, of_step in zip(names, waits, strict=True):
        with nullcontext() if not name else pytest.raises(AssertionError, match=r"[1-9] waits in step 0"):
            check([of_step])


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_planted_shape_that_depends_on_numbers_is_found(tmp_path: Path, way: str) -> None:
    def fault(value: Tensor) -> None:
        many = value.detach().expand(2)
        many[many > 0].sum()

    with pytest.raises(Exception, match=r"aten\.(nonzero|index)"):
        waits_with(tmp_path, fault if way == "forward" else backwards(fault))


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_planted_tensor_on_the_host_is_found(tmp_path: Path, way: str) -> None:
    def fault(value: Tensor) -> Tensor:
        return value + torch.zeros(2).to(value.dtype)

    with pytest.raises(RuntimeError, match=r"same device.*cuda:0 and cpu"):
        waits_with(tmp_path, fault if way == "forward" else backwards(fault))


def test_a_planted_gradient_on_the_host_is_found(tmp_path: Path) -> None:
    backward = backwards(lambda gradient: torch.ones(2))
    with pytest.raises(RuntimeError, match="gradient is on cpu"):
        waits_with(tmp_path, lambda value: backward(value.expand(2)).mean())


@pytest.mark.parametrize("micro_batch", [None, MICRO_BATCH])
def test_a_planted_read_in_the_student_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch: int | None
) -> None:
    """In micro-batches the backward pass encodes again: each of them reads twice."""

    def encoded(method: Any, part: Batch, number: int = 0) -> Any:
        method.student.log_logit_scale.sum().item()
        return encode(method, part, number)

    encode = Contrastive._encode_student
    monkeypatch.setattr(Contrastive, "_encode_student", encoded)
    reads = 1 if micro_batch is None else 4
    with pytest.raises(AssertionError, match=f"{reads} waits in step 0"):
        check(waits_with(tmp_path, lambda value: None, micro_batch))


def test_a_planted_read_in_the_trainers_step_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def clip(engine: WholeEngine, max_norm: float) -> Tensor:
        norm = clipped(engine, max_norm)
        assert float(norm) >= 0
        return norm

    clipped = WholeEngine.clip
    monkeypatch.setattr(WholeEngine, "clip", clip)
    with pytest.raises(AssertionError, match="1 waits in step 0"):
        check(waits_with(tmp_path, lambda value: None))


def test_a_flag_read_at_once_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host waits for all that the step has launched."""

    def watch(self: FiniteWatch, *arguments: Any, **settings: Any) -> Tensor:
        finite = watched(self, *arguments, **settings)
        self.check(list)
        return finite

    watched = FiniteWatch.watch
    monkeypatch.setattr(FiniteWatch, "watch", watch)
    with pytest.raises(AssertionError, match="1 waits in step 0"):
        check(waits_with(tmp_path, lambda value: None))


def test_a_line_of_the_log_reads_all_flags_at_once(tmp_path: Path) -> None:
    waits = waits_of(tmp_path, lambda: make_method("contrastive"), batches("contrastive"), log_every=2, steps=6)
    flags = [[wait for wait in of_step if str(wait).startswith(FLAG)] for of_step in waits]
    assert [len(of_step) for of_step in flags] == [0, 1, 0, 1, 0, 1]
    assert [len(of_step) for of_step in waits][2::2] == [0, 0]


def test_flags_are_read_in_time_where_nothing_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FiniteWatch, "LONGEST", 3)
    waits = waits_of(tmp_path, lambda: make_method("contrastive"), batches("contrastive"), steps=7)
    assert [len(of_step) for of_step in waits][1:] == [0, 1, 0, 0, 1, 0]


def tokens_on_device() -> TokenBatch:
    return TokenBatch(torch.arange(12).view(2, 6), torch.ones(2, 6, dtype=torch.bool)).to(CUDA)


def test_tokens_without_spans_are_looked_at_once() -> None:
    """And that they were is nothing to see in the words: a micro-batch that is encoded again must have as many."""
    with pretending() as watched:
        align, tokens = WordAligner(), tokens_on_device()
        watched.waits.clear()
        first = align(tokens, tokens)
        assert len(watched.waits[watched.step]) == 1
        watched.waits.clear()
        second = align(tokens, tokens)
        assert not watched.waits[watched.step]
    assert first.are_tokens
    assert second.are_tokens
    assert first.count == second.count == 6


def test_other_tokens_without_spans_are_refused_as_often_as_they_come() -> None:
    with pretending(equal=False):
        align, tokens = WordAligner(), tokens_on_device()
        for _ in range(2):
            with pytest.raises(ValueError, match="leave levels L1 and L2 out"):
                align(tokens, tokens)


def test_nothing_of_the_pretending_stays() -> None:
    def patched() -> list[Any]:
        places = ((torch.nn.Module, "_apply"), (Tensor, "__deepcopy__"), (torch.nn.Parameter, "__deepcopy__"))
        return [vars(owner).get(name) for owner, name in places] + [PartialState._shared_state["device"]]

    PartialState(cpu=True)
    before, method = patched(), make_method("contrastive")
    with pretending():
        assert make_method("contrastive").to(CUDA).device.type == CUDA
        assert all(now is not then for now, then in zip(patched(), before, strict=True))
    assert patched() == before
    assert method.device.type == "cpu"
    assert torch.ones(2).sum().item() == 2
