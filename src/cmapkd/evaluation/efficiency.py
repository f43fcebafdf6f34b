"""What models cost: parameters, multiply-adds, latency, memory and file size, measured in one interleaved run."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmapkd.config import Config
from cmapkd.data.types import TokenBatch
from cmapkd.models.base import DualEncoder
from cmapkd.models.open_clip_tokenizer import OpenClipTokenizer
from cmapkd.models.parts import word_tables
from cmapkd.models.reach import differentiable, parameters_behind
from cmapkd.models.types import BOTH

TEXTS = (
    "a small red circle lies above a large striped square",
    "two dogs play with a ball on the grass",
    "a man in a blue shirt rides a bicycle down the street",
    "a plate with bread, cheese and a glass of water",
)
"""What the text tower is timed with: ordinary captions, the same for every model, each through its own tokenizer."""


class EfficiencyConfig(Config):
    """How long and at which batch the cost is measured."""

    batch_size: int = Field(16, ge=2, description="The larger batch; batch 1 is always measured too.")
    rounds: int = Field(15, ge=3, description="Timings of each model and batch, in turns; the median is reported.")
    warmup: int = Field(2, ge=0, description="Untimed calls of each before the first round.")
    seconds: float = Field(
        120, gt=0, description="Timing stops after the round in which this is reached, with at least 3 rounds."
    )


def parameter_counts(model: DualEncoder, pixels: Tensor, texts: TokenBatch) -> dict[str, int]:
    """Numbers of parameters by what uses them: those with a gradient from a tower's embedding belong to the tower.

    Returns:
        `total`; `image`; `text`; `other` (logit scale, and whatever reaches no embedding); `shared` of both towers,
        counted in each; `text_embedding`, the text tower's token table, which is part of `text`: it takes memory and
        disk, but no multiplication.
    """
    image = _behind(model, lambda: model.encode_image(pixels).embedding)
    text = _behind(model, lambda: model.encode_text(texts).embedding)
    parameters = {id(parameter): parameter.numel() for parameter in model.parameters()}
    tables = {id(table.weight) for table in word_tables(model, model.tokenizer.vocab_size)}

    def count(names: set[int]) -> int:
        return sum(parameters[name] for name in names)

    return {
        "total": count(set(parameters)),
        "image": count(image),
        "text": count(text),
        "other": count(set(parameters) - image - text),
        "shared": count(image & text),
        "text_embedding": count(tables & text),
    }


def _behind(model: nn.Module, embed: Callable[[], Tensor]) -> set[int]:
    parameters = dict(model.named_parameters())
    return {id(parameters[name]) for name in parameters_behind(model, embed)}


def count_macs(model: nn.Module, run: Callable[[], Any]) -> int:
    """Multiply-adds of `run`: half of what torch's flop counter counts, which is 2 FLOPs for each.

    Matrix products, convolutions and attention; norms, activations and look-ups of embeddings are not counted.
    """
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton, and most evaluations count nothing

    # With gradient and attention written out: torch's fused inference kernels are invisible to the counter.
    with differentiable(model), sdpa_kernel(SDPBackend.MATH):
        counter: Any = FlopCounterMode(display=False)
        with counter:
            run()
    return int(counter.get_total_flops()) // 2


def weight_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of the weight file without its header: every stored number in 4 or 2 bytes, integers as they are."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}.values()

    def size(width: int) -> int:
        return sum(t.numel() * (width if t.is_floating_point() else t.element_size()) for t in tensors)

    return {"fp32": size(4), "fp16": size(2)}


class _LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made inside that are alive at once, at most. Scratch space inside kernels is not seen."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._known and storage._cdata not in before:  # neither a view nor in place
                    self._known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return output

    def _freed(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.now -= size


def peak_bytes(model: nn.Module, inputs: Sequence[Tensor], run: Callable[[], Any]) -> int:
    """Memory of a forward pass at its peak: weights, input, and intermediate tensors alive at once.

    On a GPU by its allocator; on the CPU by the tensors' own sizes, without scratch space inside kernels.
    """
    fixed = sum(t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    fixed += sum(tensor.untyped_storage().nbytes() for tensor in inputs)
    device = inputs[0].device
    with torch.no_grad():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            held = torch.cuda.memory_allocated(device)
            run()
            torch.cuda.synchronize(device)
            return int(fixed + torch.cuda.max_memory_allocated(device) - held)
        with _LiveBytes() as live:
            run()
    return int(fixed + live.peak)


def efficiency(
    models: Mapping[str, DualEncoder], config: EfficiencyConfig | None = None, *, device: torch.device | str
) -> dict[str, dict[str, Any]]:
    """The cost of each model, and its ratios to the first, which is the reference.

    Every model gets random pixels of its own size and the same texts. Latencies are taken in turns (one call of each
    model in each round), so that a machine that slows down slows all of them; ratios are medians of the ratios within
    rounds. Whole pictures to embeddings: decoding, resizing and tokenising are not included.

    Returns:
        For each model `parameters` (see `parameter_counts`), `image` and `text` with `macs` and `flops` (= 2 x macs) a
        sample, `latency_ms` a sample by batch size (median and quartiles), `peak_bytes` at the larger batch;
        `file_bytes`; `ratio` to the first model (`parameters`, `image_macs`, `text_macs`, `image_speed`, `text_speed`
        by batch: above 1 is faster than the reference); `image_size`, `text_tokens`, `threads`, `device`. A model of
        exported files states its counts and the size of its `files`, and has no `peak_bytes`.
    """
    config = config or EfficiencyConfig()
    device = torch.device(device)
    calls: dict[str, dict[str, dict[int, Callable[[], Any]]]] = {}
    results: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        model.to(device).eval()
        calls[name], results[name] = _examine(model, config, device)
    seconds = _time_in_turns(calls, config, device)
    reference = next(iter(models))
    for name, result in results.items():
        for tower in ("image", "text"):
            result[tower]["latency_ms"] = {
                str(batch): _summary(times, batch) for batch, times in seconds[name][tower].items()
            }
        result["ratio"] = _ratios(result, results[reference], seconds[name], seconds[reference])
    return results


def _examine(
    model: DualEncoder, config: EfficiencyConfig, device: torch.device
) -> tuple[dict[str, dict[int, Callable[[], Any]]], dict[str, Any]]:
    """What to time, and everything that needs no clock."""
    size, batch = model.image_spec.size, config.batch_size
    draws = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, 3, size, size, generator=draws).to(device)
    texts = _captions(model, batch).to(device)
    first = replace(texts, lengths=None).part(0, 1)  # as long as the whole batch
    one = pixels[:1].clone()
    calls: dict[str, dict[int, Callable[[], Any]]] = {
        "image": {1: lambda: model.encode_image(one), batch: lambda: model.encode_image(pixels)},
        "text": {1: lambda: model.encode_text(first), batch: lambda: model.encode_text(texts)},
    }
    result: dict[str, Any] = {
        "batch_size": batch,
        "image_size": size,
        "text_tokens": texts.ids.shape[1],
        "threads": torch.get_num_threads(),
    }
    if (stated := model.stated_costs()) is not None:  # torch sees nothing of its towers
        macs = dict(stated.macs)
        result |= {"parameters": dict(stated.parameters), "device": stated.device}
        result |= {"file_bytes": {"files": stated.file_bytes}, "image": {}, "text": {}}
    else:
        macs = {tower: count_macs(model, calls[tower][1]) for tower in BOTH}
        result |= {
            "parameters": parameter_counts(model, one, first),
            "image": {"peak_bytes": peak_bytes(model, [pixels], calls["image"][batch])},
            "text": {"peak_bytes": peak_bytes(model, [texts.ids, texts.mask], calls["text"][batch])},
            "file_bytes": weight_bytes(model),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        }
    for tower in BOTH:
        result[tower] |= {"macs": macs[tower], "flops": 2 * macs[tower]}
    return calls, result


def _captions(model: DualEncoder, number: int) -> TokenBatch:
    """Texts of an open_clip model at full length, as publications count their cost; of others as they are read."""
    tokenizer = model.tokenizer
    if isinstance(tokenizer, OpenClipTokenizer):
        tokenizer = tokenizer.padded("publications count it so")
    return tokenizer([TEXTS[place % len(TEXTS)] for place in range(number)])


def _time_in_turns(
    calls: Mapping[str, Mapping[str, Mapping[int, Callable[[], Any]]]], config: EfficiencyConfig, device: torch.device
) -> dict[str, dict[str, dict[int, list[float]]]]:
    """Seconds of every call in every round, round by round."""
    seconds: dict[str, dict[str, dict[int, list[float]]]] = {
        name: {tower: {batch: [] for batch in batches} for tower, batches in towers.items()}
        for name, towers in calls.items()
    }

    names, draws = list(calls), torch.Generator().manual_seed(0)

    def timed(call: Callable[[], Any]) -> float:
        wait_for(device)
        start = time.perf_counter()
        call()
        wait_for(device)
        return time.perf_counter() - start

    with torch.inference_mode():
        began = time.perf_counter()
        for turn in range(-config.warmup, config.rounds):
            if turn >= 3 and time.perf_counter() - began > config.seconds:
                break
            for tower in ("image", "text"):
                for batch in calls[names[0]][tower]:
                    for place in torch.randperm(len(names), generator=draws).tolist():
                        name = names[place]
                        calls[name][tower][batch]()  # what the call before left behind, such as cold caches, falls here
                        taken = timed(calls[name][tower][batch])
                        if turn >= 0:
                            seconds[name][tower][batch].append(taken)
    return seconds


def wait_for(device: torch.device) -> None:
    """Until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(seconds: Sequence[float], batch: int) -> dict[str, float]:
    """Milliseconds a sample."""
    return median_and_quartiles([1000 * each / batch for each in seconds])


def median_and_quartiles(values: Sequence[float]) -> dict[str, float]:
    """The median over rounds, the quartiles around it, and how many `rounds` there were."""
    quartiles = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    low, median, high = quartiles.tolist()
    return {"median": median, "q1": low, "q3": high, "rounds": len(values)}


def _ratios(
    result: Mapping[str, Any],
    reference: Mapping[str, Any],
    seconds: Mapping[str, Mapping[int, Sequence[float]]],
    reference_seconds: Mapping[str, Mapping[int, Sequence[float]]],
) -> dict[str, Any]:
    """Sizes as fractions of the reference's, speeds as multiples; seconds by tower, batch size and round."""

    def speed(tower: str, batch: int) -> float:
        pairs = zip(reference_seconds[tower][batch], seconds[tower][batch], strict=True)
        return float(torch.tensor([a / b for a, b in pairs], dtype=torch.float64).median())

    def ratio(value: float, of: float) -> float:
        return value / of if of else math.nan

    return {
        "parameters": ratio(result["parameters"]["total"], reference["parameters"]["total"]),
        "image_macs": ratio(result["image"]["macs"], reference["image"]["macs"]),
        "text_macs": ratio(result["text"]["macs"], reference["text"]["macs"]),
        "image_speed": {str(batch): speed("image", batch) for batch in seconds["image"]},
        "text_speed": {str(batch): speed("text", batch) for batch in seconds["text"]},
    }
