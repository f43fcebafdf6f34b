"""In-batch losses of large batches: both directions from one pass over tiles, against one pass for each direction.

    uv run python benchmarks/in_batch_losses.py --json docs/results/in_batch_losses.json

The losses are those of `clip_kd`: contrastive, relational and interactive, forward and backward, on random embeddings
of one thread. **Passes** is how this project computed large batches before: rows in chunks, each direction for itself,
each chunk again in the backward pass. **Tiles** is what it does now, **whole** has all logits in memory. The arms take
turns. Times are CPU time of the process, and medians. Products are counted by torch's counter, in units of batch x
batch x width. Memory is what a forward and backward pass adds to the process, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cmapkd.objectives import contrastive_loss, interactive_loss, similarity_divergence
from cmapkd.objectives.chunks import by_rows, chunk_rows
from cmapkd.objectives.common import similarities
from cmapkd.objectives.divergence import row_divergences
from cmapkd.training.peak_memory import forget_peak, peak_bytes

Loss = Callable[..., Tensor]
SCALE, TEACHER_SCALE = 50.0, 100.0


# ------------------------------------------------------------------------------------------------ as it was before


def _matching(anchors: Tensor, candidates: Tensor, scale: Tensor, size: int) -> Tensor:
    def losses(rows: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(similarities(rows, candidates, scale), labels, reduction="none")

    return by_rows(losses, anchors, torch.arange(len(anchors)), size=size).mean()


def _divergence(rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor], scale: Tensor, size: int) -> Tensor:
    def divergences(student: Tensor, teacher: Tensor) -> Tensor:
        theirs = similarities(teacher, columns[1], TEACHER_SCALE).detach()
        return row_divergences(similarities(student, columns[0], scale), theirs)

    return by_rows(divergences, *rows, size=size).mean()


def contrastive_in_passes(image: Tensor, text: Tensor, _i: Tensor, _t: Tensor, scale: Tensor, size: int) -> Tensor:
    return (_matching(image, text, scale, size) + _matching(text, image, scale, size)) / 2


def relational_in_passes(
    image: Tensor, text: Tensor, teacher_image: Tensor, teacher_text: Tensor, scale: Tensor, size: int
) -> Tensor:
    images, texts = (image, teacher_image), (text, teacher_text)
    return (_divergence(images, texts, scale, size) + _divergence(texts, images, scale, size)) / 2


def interactive_in_passes(
    image: Tensor, text: Tensor, teacher_image: Tensor, teacher_text: Tensor, scale: Tensor, size: int
) -> Tensor:
    return (_matching(image, teacher_text, scale, size) + _matching(text, teacher_image, scale, size)) / 2


# ------------------------------------------------------------------------------------------------ as it is


def contrastive(image: Tensor, text: Tensor, _i: Tensor, _t: Tensor, scale: Tensor, size: int) -> Tensor:
    return contrastive_loss(image, text, logit_scale=scale, chunk=size)


def relational(
    image: Tensor, text: Tensor, teacher_image: Tensor, teacher_text: Tensor, scale: Tensor, size: int
) -> Tensor:
    scales = {"student_scale": scale, "teacher_scale": TEACHER_SCALE}
    return similarity_divergence(image, text, teacher_image, teacher_text, **scales, chunk=size)


def interactive(
    image: Tensor, text: Tensor, teacher_image: Tensor, teacher_text: Tensor, scale: Tensor, size: int
) -> Tensor:
    return interactive_loss(image, text, teacher_image, teacher_text, logit_scale=scale, chunk=size)


ARMS: dict[str, dict[str, Loss]] = {
    "passes": {
        "contrastive": contrastive_in_passes,
        "relational": relational_in_passes,
        "interactive": interactive_in_passes,
    },
    "tiles": {"contrastive": contrastive, "relational": relational, "interactive": interactive},
    "whole": {"contrastive": contrastive, "relational": relational, "interactive": interactive},
}


# ------------------------------------------------------------------------------------------------ measuring


def embeddings(batch: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Student's and teacher's, which resemble each other and find their pairs; the scale."""
    draws = torch.Generator().manual_seed(0)
    meant = torch.randn(batch, width, generator=draws, dtype=dtype)
    rows = [meant + noise * torch.randn(batch, width, generator=draws, dtype=dtype) for noise in (2.0, 2.0, 1.0, 1.0)]
    scale = torch.tensor(SCALE, dtype=dtype)
    return [*(each.requires_grad_() for each in rows[:2]), *rows[2:], scale.requires_grad_()]


def run(arm: str, loss: str, given: list[Tensor], size: int) -> list[Tensor]:
    """Value and gradients."""
    for each in given:
        each.grad = None
    size = len(given[0]) if arm == "whole" else size
    value = ARMS[arm][loss](*given, size)
    value.backward()
    return [value.detach(), *(each.grad for each in given if each.grad is not None)]


def counted(run: Callable[[], Any], product: int) -> float:
    """Products of `product` multiply-adds that `run` takes, in either direction."""

    def flops(_total: Any, one: Any, other: Any, *_: Any, **__: Any) -> int:  # in place: torch's counter knows no such
        return int(2 * one[0] * one[1] * other[1])

    counter: Any = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: flops})
    with counter:
        run()
    return float(counter.get_total_flops()) / (2 * product)


def products(arm: str, loss: str) -> float:
    batch, width = 64, 32
    given = embeddings(batch, width)
    return counted(partial(run, arm, loss, given, 16), batch * batch * width)


def peak(arm: str, loss: str, batch: int, width: int) -> int:
    """Bytes that a pass adds, in a process of its own."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def measure() -> None:
        given = embeddings(batch, width)
        run(arm, loss, embeddings(64, width), 16)  # what libraries keep for themselves
        device = torch.device("cpu")
        forget_peak(device)
        before = peak_bytes(device)
        run(arm, loss, given, chunk_rows(batch, batch, None))
        send.send(peak_bytes(device) - before)

    process = context.Process(target=measure)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{arm}, {loss}: ended with {process.exitcode}")
    return int(receive.recv())


def errors(loss: str, width: int) -> dict[str, float]:
    """Of value and gradients in float64 against the whole form, relative to the largest number of each."""
    given = embeddings(96, width, torch.float64)
    exact = run("whole", loss, given, 96)
    found = [run("tiles", loss, given, size) for size in (7, 32)]
    pairs = [zip(each, exact, strict=True) for each in found]
    return {"float64": max(float((a - b).abs().max() / b.abs().max()) for each in pairs for a, b in each)}


def measure(batch: int, width: int, rounds: int, arms: list[str]) -> dict[str, Any]:
    given, size = embeddings(batch, width), chunk_rows(batch, batch, None)
    seconds: dict[str, dict[str, list[float]]] = {loss: {arm: [] for arm in arms} for loss in ARMS["tiles"]}
    for number in range(1 + rounds):
        for loss, of_arms in seconds.items():
            for arm in arms:
                start = time.process_time()
                run(arm, loss, given, size)
                if number:
                    of_arms[arm].append(time.process_time() - start)
    result: dict[str, Any] = {}
    for loss, of_arms in seconds.items():
        result[loss] = {
            "products": {arm: round(products(arm, loss), 2) for arm in arms},
            "seconds": {arm: round(statistics.median(values), 3) for arm, values in of_arms.items()},
            "tiles_over_passes": round(
                statistics.median(a / b for a, b in zip(of_arms["tiles"], of_arms["passes"], strict=True)), 3
            ),
            "peak_mib": {arm: round(peak(arm, loss, batch, width) / 2**20) for arm in arms},
            "error": errors(loss, width),
        }
    result["all"] = {
        "products": {arm: sum(result[loss]["products"][arm] for loss in seconds) for arm in arms},
        "seconds": {arm: round(sum(result[loss]["seconds"][arm] for loss in seconds), 3) for arm in arms},
    }
    result["all"]["tiles_over_passes"] = round(
        result["all"]["seconds"]["tiles"] / result["all"]["seconds"]["passes"], 3
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    from cmapkd.provenance import describe_environment

    result = {
        "batch": arguments.batch,
        "width": arguments.width,
        "rows_of_a_tile": chunk_rows(arguments.batch, arguments.batch, None),
        "rounds": arguments.rounds,
        "losses": measure(arguments.batch, arguments.width, arguments.rounds, list(ARMS)),
        "environment": describe_environment(),
    }
    text = json.dumps(result, indent=2)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
