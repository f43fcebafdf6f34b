"""The trainer's steps on a GPU that is not there: devices that do not fit and reads that the host waits for.

Tensors are fake: they have shapes and devices, and no numbers. Each says `cuda` to Python and to the dispatcher, which
therefore runs the code of a GPU: autocast to bf16, the fused optimizer, checks that all tensors are on one device. To
C++ that asks a tensor for its device it says `meta`. So autograd's engine asks no driver, and the backward pass stays
in the calling thread. With a backend in Python, torch's other way, the engine's own threads end the process now and
then.

Each read of a number from the device counts as a synchronisation, by the line of this package that asked for it.
"""

from __future__ import annotations

import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cmapkd
from cmapkd.data.types import Batch
from cmapkd.methods import Method
from cmapkd.models import images as image_module
from cmapkd.training import trainer as training_loop
from helpers import (
    CLASSIFYING,
    CLIP_KD_IN_FULL,
    CMAPKD_EXACT,
    DUAL,
    GRADNORM,
    MASKED,
    MemorySource,
    make_method,
    make_trainer,
    random_batch,
    second_teacher,
)

aten, prim = torch.ops.aten, torch.ops.prim
PACKAGE = Path(cmapkd.__file__).parent
CUDA, CPU, META = "cuda", "cpu", "meta"
BATCH, MICRO_BATCH = 8, 5  # two micro-batches, of unequal sizes
STEPS = 3  # of each stage: in the last of them banks are filled and buffers made
MORE_STEPS = {"cmapkd, policy": 7}  # two windows end, and the policy acts
SIZES: dict[str, int | None] = {"whole": None, "micro-batches": MICRO_BATCH}
MANUAL = {"contrastive": 1, "relational": 1, "feature": 1, "interactive": 1}
VISUAL = {"P2": 1.0, "P3": 1.0, "P4": 1.0, "P5": 1.0}
POLICY = {"name": "policy", "warmup_steps": 1, "window": 2, "edge": 1}
OTHER_TOKENS = "other tokens"  # student and teacher cut the texts differently
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # name: (method, settings); every method as it comes, and more
    **{name: (name, {}) for name in (*DUAL, *CLASSIFYING)},
    "albef": ("albef", {"queue": 12}),
    "cmapkd, everything": ("cmapkd", {**CMAPKD_EXACT, "weighting": "gate"}),
    "cmapkd, policy": ("cmapkd", {"visual_levels": VISUAL, "weighting": POLICY}),
    "cmapkd, attention": ("cmapkd", {"visual_levels": VISUAL, "weighting": "attention"}),
    "cmapkd, uncertainty": ("cmapkd", {"visual_levels": VISUAL, "weighting": "uncertainty"}),
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
# the others differ in a setting or take long, and are slow tests; what degla has beside its losses is albef's
OFTEN = (*(name for name in DUAL if name not in ("degla", "cosmos", "dclip")), "dho", "cmapkd, everything")
# in micro-batches each line of a method's own runs, too: only what they share goes other ways where a batch is whole
OFTEN_WHOLE = ("contrastive", "clip_kd", "dmae", "lelp", "promptkd", "tipsv2", "dho", "cmapkd")


@dataclass(frozen=True)
class Wait:
    """Once the host waits for the device.

    Attributes:
        what: a read, a copy.
        where: the line of the package that asked.
        age: of a single number that is read: how many steps ago the device was told to compute it.
    """

    what: str
    where: str
    age: int | None = None

    def __str__(self) -> str:
        return f"{self.what} at {self.where}" + ("" if self.age is None else f" (computed {self.age} steps before)")


_INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
_LOOKED_AT = frozenset(  # the operations that `Watched` answers itself, or that may wait; all others are many
    (
        *_INDEXED,
        aten._local_scalar_dense.default,
        aten.is_nonzero.default,
        aten.equal.default,
        aten.nonzero.default,
        aten._pin_memory.default,
        aten._linalg_check_errors.default,
        aten.copy_.default,
        aten._to_copy.default,
    )
)


class Watched(TorchDispatchMode):
    """Answers what fake tensors have no number for, and notes each time the host would wait for the device.

    Args:
        equal: what `torch.equal` finds, of tensors of one shape.
    """

    def __init__(self, *, equal: bool) -> None:
        super().__init__()
        self.equal, self.step = equal, -1  # before the first
        self.waits: dict[int, list[Wait]] = defaultdict(list)  # by step

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is prim.device.default:  # C++ asks
            device = args[0].fake_device
            return torch.device(META) if device.type == CUDA else device
        kwargs = dict(kwargs or {})
        if (asked := kwargs.get("device")) is not None and torch.device(asked).type == META:  # C++ said as it was told
            kwargs["device"] = torch.device(CUDA, 0)
        found = self._answer(func, args, kwargs)
        for leaf in (found,) if isinstance(found, Tensor) else tree_leaves(found):
            if isinstance(leaf, FakeTensor) and leaf.ndim == 0:
                leaf.computed_in = self.step
        return found

    def _answer(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func not in _LOOKED_AT:
            return func(*args, **kwargs)
        there = [leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func in (aten._local_scalar_dense.default, aten.is_nonzero.default):
            return self._number(args[0])
        if func is aten.equal.default:
            if len(set(there)) > 1:
                raise RuntimeError("tensors on two devices are compared")
            self._note(CUDA in there, "equal")
            return args[0].shape == args[1].shape and self.equal
        if func is aten.nonzero.default:
            self._note(CUDA in there, "nonzero")
            return torch.empty((min(2, args[0].numel()), args[0].ndim), dtype=torch.long, device=args[0].device)
        if func is aten._pin_memory.default:  # fake tensors know of no pinned memory
            return args[0]
        if func is aten._linalg_check_errors.default:
            self._note(CUDA in there, "check of a decomposition")
        if func in _INDEXED:
            self._note(there[0] == CUDA and CPU in there, "copy of an index from the host")
        if func is aten.copy_.default and not (args[2] if len(args) > 2 else kwargs.get("non_blocking")):
            self._copied_between(there[1], there[0])
        if func is aten._to_copy.default and kwargs.get("device") is not None and len(there) == 1:
            to = torch.device(kwargs["device"]).type
            if not kwargs.get("non_blocking"):  # of one that is, torch pins the host's side, and streams keep the order
                self._copied_between(there[0], to)
            if to != CPU:  # a number that is known on the host would be copied in earnest
                dtype = kwargs.get("dtype") or args[0].dtype
                return torch.empty_strided(args[0].shape, args[0].stride(), dtype=dtype, device=kwargs["device"])
        return func(*args, **kwargs)

    def _copied_between(self, away: str, to: str) -> None:
        self._note(away == CUDA and to == CPU, "copy to the host")
        self._note(away == CPU and to == CUDA, "copy from the host")

    def _number(self, tensor: Tensor) -> Any:
        computed = getattr(tensor, "computed_in", None)
        self._note(tensor.device.type == CUDA, "read", None if computed is None else self.step - computed)
        if tensor.dtype == torch.bool:
            return True
        return 1.0 if tensor.dtype.is_floating_point else 3

    def _note(self, waits: bool, what: str, age: int | None = None) -> None:
        if waits:
            self.waits[self.step].append(Wait(what, asked_by(), age))


def asked_by() -> str:
    """The innermost line of the package on the way here."""
    for frame in reversed(traceback.extract_stack()):
        if (path := Path(frame.filename)).is_relative_to(PACKAGE):
            return f"{path.relative_to(PACKAGE)}:{frame.lineno} {frame.line}"
    return "no line of the package"


@contextmanager
def pretending(*, equal: bool = True) -> Iterator[Watched]:
    """A GPU, as far as torch, Accelerate and the trainer look; within it tensors have no numbers."""
    watched = Watched(equal=equal)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # torch's, of a GPU that it does not find
        for owner, name, new in (
            (Tensor, "__deepcopy__", _copied),
            (nn.Parameter, "__deepcopy__", _copied),
            (nn.Module, "_apply", _exchanged),
            (BackwardCFunction, "apply", _backward),
            (FakeTensor, "is_cuda", property(lambda tensor: tensor.device.type == CUDA)),
            (FakeTensor, "is_meta", property(lambda tensor: tensor.device.type == META)),
            (torch.utils.checkpoint, "_infer_device_type", lambda *_: CPU),  # whose random state is kept
            (training_loop, "forget_peak", lambda _device: None),
            (image_module, "_TABLES", {}),  # on the device: no tensor without numbers is left there
        ):
            stack.enter_context(mock.patch.object(owner, name, new, create=True))
        stack.enter_context(_on_device(torch.device(CUDA, 0)))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(watched)
        yield watched


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


def _backward(self: Any, *gradients: Any) -> Any:
    """The backward pass of a function of one's own, with the engine's check, which it spares tensors that are fake."""
    found = _apply_backward(self, *gradients)
    nodes = [each for each in self.next_functions if each[0] is not None]
    there = {node._input_metadata[number].device.type.replace(META, CUDA) for node, number in nodes}
    for gradient in found if isinstance(found, tuple) else (found,):
        if isinstance(gradient, Tensor) and gradient.device.type not in there:
            raise RuntimeError(f"a gradient is on {gradient.device}, the device of its tensor is another: {there}")
    return found


_apply_backward = BackwardCFunction.apply


@contextmanager
def _on_device(device: torch.device) -> Iterator[None]:
    """Accelerate takes this device for the one that the process has."""
    PartialState(cpu=True)
    shared = PartialState._shared_state
    before = shared["device"]
    AcceleratorState._reset_state()
    shared["device"] = device
    try:
        yield
    finally:
        shared["device"] = before
        AcceleratorState._reset_state()


def made(case: str) -> Method:
    kind, settings = CASES[case]
    more = [second_teacher()] if kind == "mobileclip" else []
    return make_method(kind, settings=settings, more_teachers=more)


def batches(case: str) -> list[Batch]:
    """With numbers in them: what is on the host is there. Pixels are bytes, as data workers give them."""
    found, method = [], made(case)
    for seed in range(STEPS):
        batch = random_batch(
            BATCH, seed=seed, rich=CASES[case][0] == "mobileclip", pools=method.text_pools, views=method.more_views
        )
        pairs = {role: batch.pairs(role) for role in batch.inputs}
        raw = {role: replace(pair, images=(pair.images * 50 + 128).byte()) for role, pair in pairs.items()}
        batch = replace(batch, inputs=raw)
        if case.endswith(OTHER_TOKENS):
            spans = torch.arange(8).unfold(0, 2, 1).expand(BATCH, 7, 2).contiguous()
            inputs = dict(batch.inputs)
            texts = replace(inputs["student"].texts, spans=spans, ids=inputs["student"].texts.ids.flip(1))
            inputs["student"] = replace(inputs["student"], texts=texts)
            inputs["teacher"] = replace(inputs["teacher"], texts=replace(inputs["teacher"].texts, spans=spans))
            batch = replace(batch, inputs=inputs)
        found.append(replace(batch, ids=tuple(f"{seed}-{number}" for number in range(BATCH))))
    return found


class _Enough(Exception):
    pass


class Given:
    """Batches that are there already, for the trainer; a step begins when its batch is asked for."""

    def __init__(self, given: list[Batch], watched: Watched, stop: int) -> None:
        self.source, self.given, self.watched, self.stop = MemorySource(2 * BATCH), given, watched, stop

    def __getitem__(self, plan: Any) -> Batch:
        if plan.step == self.stop:
            raise _Enough
        self.watched.step = plan.step
        return self.given[plan.step % len(self.given)]


def waits_of(
    folder: Path,
    method: Callable[[], Method],
    given: list[Batch],
    *,
    micro_batch: int | None = None,
    steps: int = STEPS,
    equal: bool = True,
    log_every: int = 1000,
) -> list[list[Wait]]:
    """What the host waits for in each of the trainer's steps, from one batch to the next, with all that belongs to it.

    Args:
        method: makes it; called where tensors are fake.
        given: its batches, over and over.
        steps: of each of the method's stages.
        equal: what `torch.equal` finds, of tensors of one shape.
        log_every: steps between lines of the log.
    Returns:
        One list for each step, of all stages.
    """
    with pretending(equal=equal) as watched:
        learner = method()
        stages = [stage.model_copy(update={"share": None, "steps": steps}) for stage in learner.default_stages]
        stop = steps * max(1, len(stages))
        if stages:
            stages[-1] = stages[-1].model_copy(update={"steps": steps + 1})  # the last step of a run writes it down
        trainer = make_trainer(
            folder,
            learner,
            steps=None if stages else stop + 1,
            stages=tuple(stages),
            micro_batch=micro_batch,
            precision="bf16",
            ema=0.9,
            log_every=log_every,
            checkpoint_every=1000,
        )
        trainer.builder = Given(given, watched, stop)  # type: ignore[assignment]
        with suppress(_Enough):
            trainer.run()
        assert {parameter.device.type for parameter in trainer.method.parameters()} == {CUDA}
        assert trainer.progress.step == stop
    return [watched.waits[step] for step in range(stop)]


def waits_of_case(folder: Path, case: str, micro_batch: int | None) -> list[list[Wait]]:
    """Of the steps that are not the first of a stage, in which modules are new."""
    steps, equal = MORE_STEPS.get(case, STEPS), not case.endswith(OTHER_TOKENS)
    waits = waits_of(folder, lambda: made(case), batches(case), micro_batch=micro_batch, steps=steps, equal=equal)
    return [of_step for step, of_step in enumerate(waits) if step % steps]
