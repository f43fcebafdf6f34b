"""Every method on a GPU that is not there: devices that do not fit and reads that the host waits for, found on a CPU.

A script for `test_pretended.py`: what it does to torch holds for a whole process. Tensors are fake: they have shapes
and devices, and no numbers. `forward` pretends CUDA with the trainer's autocast to bf16. It has no backward pass:
autograd's engine asks the CUDA driver about its devices. `learning` pretends the device type that torch leaves to
backends written in Python, which need no driver: forward, backward and the steps of the real `Trainer`.

Each read of a number from the device counts as a synchronisation, by the line of this package that asked for it.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyDeviceGuard,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate.state import AcceleratorState, PartialState

import cmapkd
from cmapkd.data.types import Batch
from cmapkd.methods import METHODS, Method
from helpers import (
    CLIP_KD_IN_FULL,
    CMAPKD_EXACT,
    GRADNORM,
    MASKED,
    MemorySource,
    into_first_stage,
    make_method,
    make_trainer,
    random_batch,
    second_teacher,
)

aten = torch.ops.aten
PACKAGE = Path(cmapkd.__file__).parent
BATCH, MICRO_BATCH = 8, 3
PRETENDED = "pretended"  # a device type
STEPS = 4  # of these the last is counted: by then banks are filled, windows closed, buffers made
HOW = ("forward", "learning")
NEEDS_GRADIENTS = ("clip_kd, balanced terms",)  # in their forward pass
SIZES: dict[str, int | None] = {"whole": None, "micro-batches": MICRO_BATCH}
MANUAL = {"contrastive": 1, "relational": 1, "feature": 1, "interactive": 1}
VISUAL = {"P2": 1.0, "P3": 1.0, "P4": 1.0, "P5": 1.0}
OTHER_TOKENS = "other tokens"  # student and teacher cut the texts differently
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # name: (method, settings); every method as it comes, and more
    **{name: (name, {}) for name in METHODS},
    "cmapkd, everything, gate": ("cmapkd", {**CMAPKD_EXACT, "weighting": "gate"}),
    "cmapkd, everything, policy": (
        "cmapkd",
        {**CMAPKD_EXACT, "weighting": {"name": "policy", "warmup_steps": 1, "window": 2, "edge": 1}},
    ),
    "cmapkd, everything, attention": ("cmapkd", {**CMAPKD_EXACT, "weighting": "attention"}),
    "cmapkd, everything, uncertainty": ("cmapkd", {**CMAPKD_EXACT, "weighting": "uncertainty"}),
    "cmapkd, key tokens": ("cmapkd", {"places": "key_tokens", "key_tokens": 2, "visual_levels": VISUAL}),
    "cmapkd, pooled": ("cmapkd", {"places": "pooled", "depths": "mean"}),
    "cmapkd, top down": ("cmapkd", {"top_down": True, "grids": {"P2": 2.0}}),
    "cmapkd, duplicates in the bank": ("cmapkd", {"bank_duplicates": 0.9, "bank_sample": 4, "bank_size": 12}),
    f"cmapkd, {OTHER_TOKENS}": ("cmapkd", {}),
    f"cmapkd, key tokens, {OTHER_TOKENS}": ("cmapkd", {"places": "key_tokens", "key_tokens": 2}),
    "clip_kd, everything": ("clip_kd", CLIP_KD_IN_FULL),
    "clip_kd, weighted terms": ("clip_kd", {"term_weighting": "uncertainty"}),
    "clip_kd, balanced terms": ("clip_kd", {"term_weighting": GRADNORM}),
    "clip_kd, terms by hand": ("clip_kd", {"term_weighting": {"name": "manual", "weights": MANUAL}}),
    "hinton, classes": ("hinton", {"form": "classes"}),
    "hinton, the teacher's classes": ("hinton", {"form": "classes", "class_vectors": "teacher"}),
    "tinyclip, masks": ("tinyclip", MASKED),
    "mobileclip, two teachers": ("mobileclip", {"synthetic": True}),
    "c2kd, all at once": ("c2kd", {"agreement": -1.0, "direct_weight": 1.0, "prompts_at_once": None}),
    "fitnet, texts": ("fitnet", {"text_guided_layer": 0.5, "text_hint_layer": 0.5}),
}


class Watched(TorchDispatchMode):
    """Answers what fake tensors have no number for, and counts each time the host would wait for the device.

    Args:
        equal: what `torch.equal` finds, of tensors of one shape.
    """

    def __init__(self, *, equal: bool) -> None:
        super().__init__()
        self.equal, self.waits = equal, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        there = [leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(kind != "cpu" for kind in there)
        if func in (aten._local_scalar_dense.default, aten.is_nonzero.default):
            return self._number(args[0])
        if func is aten.equal.default:
            if len(set(there)) > 1:
                raise RuntimeError("tensors on two devices are compared")
            self._note(on_device, "equal")
            return args[0].shape == args[1].shape and self.equal
        if func is aten.nonzero.default:
            self._note(on_device, "nonzero")
            return torch.empty((min(2, args[0].numel()), args[0].ndim), dtype=torch.long, device=args[0].device)
        if func is aten._to_copy.default and kwargs.get("device") is not None and len(there) == 1:
            away, to = there[0], torch.device(kwargs["device"]).type
            if not kwargs.get("non_blocking"):  # of one that is, torch pins the host's side, and streams keep the order
                self._note(away != "cpu" and to == "cpu", "copy to the host")
                self._note(away == "cpu" and to != "cpu", "copy from the host")
            if to != "cpu":  # a number that is known on the host would be copied in earnest
                dtype = kwargs.get("dtype") or args[0].dtype
                return torch.empty_strided(args[0].shape, args[0].stride(), dtype=dtype, device=kwargs["device"])
        return func(*args, **kwargs)

    def _number(self, tensor: Tensor) -> Any:
        self._note(tensor.device.type != "cpu", "read")
        if tensor.dtype == torch.bool:
            return True
        return 1.0 if tensor.dtype.is_floating_point else 3

    def _note(self, waits: bool, what: str) -> None:
        if waits:
            self.waits[f"{what} at {asked_by()}"] += 1


def asked_by() -> str:
    """The innermost line of the package on the way here."""
    for frame in reversed(traceback.extract_stack()):
        if (path := Path(frame.filename)).is_relative_to(PACKAGE):
            return f"{path.relative_to(PACKAGE)}:{frame.lineno} {frame.line}"
    return "torch's own backward pass"


class Backend(_DummyBackendModule):  # type: ignore[misc]
    """`torch.pretended`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


PARTS: list[Any] = []  # kept here: torch holds them by their address


def prepare_torch(how: str) -> None:
    """What fake tensors and a device without a driver need, once in the process."""
    torch.set_num_threads(1)
    torch.autograd.set_multithreading_enabled(False)  # no thread of the engine for a device that is not there
    warnings.simplefilter("ignore")
    if how == "learning":  # with it torch no longer pretends CUDA
        PARTS.extend((Backend(), _DummyPrivateUse1Hook(), _DummyDeviceGuard()))
        _setup_privateuseone_for_python_backend(PRETENDED, *PARTS)
    Tensor.__deepcopy__ = nn.Parameter.__deepcopy__ = _copied  # type: ignore[method-assign, assignment]
    nn.Module._apply = _exchanged  # type: ignore[method-assign, assignment]
    torch.utils.checkpoint._infer_device_type = lambda *_: "cpu"  # type: ignore[attr-defined]


def _copied(self: Tensor, memo: dict[int, Any]) -> Tensor:
    """`copy.deepcopy` of a tensor without numbers, whose storage cannot be copied."""
    if id(self) not in memo:
        with torch.no_grad():
            copied = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device=self.device)
        memo[id(self)] = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
    return memo[id(self)]  # type: ignore[no-any-return]


def _exchanged(self: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`Module.to` that puts new parameters in place of the old ones, of which fake tensors cannot change the device."""
    done: dict[int, nn.Parameter] = {}
    for module in self.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in done:
                with torch.no_grad():
                    moved = change(parameter)
                same = moved is parameter
                done[id(parameter)] = parameter if same else nn.Parameter(moved.detach(), parameter.requires_grad)
            module._parameters[name] = done[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = change(buffer)
    return self


def made(case: str) -> Method:
    kind, settings = CASES[case]
    more = [second_teacher()] if kind == "mobileclip" else []
    method = make_method(kind, settings=settings, more_teachers=more).train()
    return into_first_stage(method) if "masks" in case else method


def batches(case: str) -> list[Batch]:
    """With numbers in them: what is on the host is there."""
    found = []
    for seed in range(STEPS + 1):
        batch = random_batch(BATCH, seed=seed, rich=CASES[case][0] == "mobileclip")
        if case.endswith(OTHER_TOKENS):
            spans = torch.arange(8).unfold(0, 2, 1).expand(BATCH, 7, 2).contiguous()
            inputs = dict(batch.inputs)
            texts = replace(inputs["student"].texts, spans=spans, ids=inputs["student"].texts.ids.flip(1))
            inputs["student"] = replace(inputs["student"], texts=texts)
            inputs["teacher"] = replace(inputs["teacher"], texts=replace(inputs["teacher"].texts, spans=spans))
            batch = replace(batch, inputs=inputs)
        found.append(replace(batch, ids=tuple(f"{seed}-{number}" for number in range(BATCH))))
    return found


@contextmanager
def pretending(case: str) -> Iterator[Watched]:
    watched = Watched(equal=not case.endswith(OTHER_TOKENS))
    with FakeTensorMode(allow_non_fake_inputs=True), watched:
        yield watched


def forward(case: str, micro_batch: int | None) -> Counter[str]:
    """Terms under autocast, on CUDA; what waits in the last step."""
    given = batches(case)
    with pretending(case) as watched:
        method = made(case).to("cuda")
        for teacher in method.teachers.values():
            teacher.to("cuda")
        method.micro_batch = micro_batch
        for batch in given[:STEPS]:
            watched.waits.clear()
            moved = batch.to("cuda", non_blocking=True, images=micro_batch is None)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                terms = method(moved)
            torch.stack([term.weight * term.value.float() for term in terms.values()]).sum()
    return watched.waits


class _Enough(Exception):
    pass


class Given:
    """Batches that are there already, for the trainer."""

    def __init__(self, case: str) -> None:
        self.source, self.batches = MemorySource(BATCH * (STEPS + 2)), batches(case)

    def __getitem__(self, plan: Any) -> Batch:
        return self.batches[plan.step % len(self.batches)]


def learning(case: str, micro_batch: int | None) -> Counter[str]:
    """Steps of the trainer with gradients; what waits in the last one that is whole.

    From one step of the optimizer to the next: backward pass, average, checks, the next batch, its forward pass.
    """
    given = Given(case)
    with pretending(case) as watched, on_device(PRETENDED):
        folder = Path(os.environ["CMAPKD_PRETENDED"]) / f"{case} {micro_batch}"
        trainer = make_trainer(
            folder, made(case), steps=100, log_every=100, checkpoint_every=100, ema=0.9, micro_batch=micro_batch
        )
        trainer.builder = given  # type: ignore[assignment]
        steps = 0

        def count(*_arguments: Any) -> None:
            nonlocal steps
            steps += 1
            gradients = [p.grad for p in trainer.method.student.parameters() if p.grad is not None]
            assert gradients
            assert {gradient.device.type for gradient in gradients} == {PRETENDED}
            if steps == STEPS:
                raise _Enough
            watched.waits.clear()

        handle = register_optimizer_step_pre_hook(count)
        try:
            trainer.run()
        except _Enough:
            return watched.waits
        finally:
            handle.remove()
    raise AssertionError("the trainer never stepped")


@contextmanager
def on_device(kind: str) -> Iterator[None]:
    """Accelerate takes this device for the one that the process has."""
    PartialState(cpu=True)
    shared = PartialState._shared_state
    before = shared["device"]
    AcceleratorState._reset_state()
    shared["device"] = torch.device(kind, 0)
    try:
        yield
    finally:
        shared["device"] = before
        AcceleratorState._reset_state()


def cases_of(how: str) -> list[str]:
    return [case for case in CASES if how == "learning" or case not in NEEDS_GRADIENTS]


def main(out: Path, how: str) -> None:
    prepare_torch(how)
    os.environ["CMAPKD_PRETENDED"] = str(out)
    found: dict[str, Any] = {}
    for case in sys.argv[3:] or cases_of(how):
        for size, micro_batch in SIZES.items():
            try:
                waits = {"forward": forward, "learning": learning}[how](case, micro_batch)
                found[f"{case}, {size}"] = {"waits": dict(waits)}
            except Exception as error:
                found[f"{case}, {size}"] = {
                    "error": f"{error!s:.2000}\n{''.join(traceback.format_tb(error.__traceback__))}"
                }
    (out / f"{how}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # threads of an engine without a driver do not end by themselves


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
