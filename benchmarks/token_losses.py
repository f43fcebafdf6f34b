"""Memory and time of losses over a vocabulary of real size: cross-entropy alone, with a teacher, and of whole logits.

A step is the forward pass of the losses and the backward pass to final states and head, in float32. The arms:

    cross_entropy    `token_losses` without a teacher
    with_teacher     `token_losses` with forward KL from a teacher's states and head, in the same chunks
    teacher_product  the teacher's logits alone, in the same chunks: what any comparison with it must compute
    materialised     both models' logits whole, F.cross_entropy and F.kl_div, differentiated by autograd

Each arm runs in its own process. Memory is the highest resident size during the step less that before it: states, heads
and targets stand ready and do not count, gradients and all that the step makes do. Time is the process's own. Results
are added to the file, so arms and numbers of rows can be measured one after the other.

    uv run python benchmarks/token_losses.py --arms cross_entropy with_teacher teacher_product --json FILE
    uv run python benchmarks/token_losses.py --rows 4096 --rounds 3 --arms cross_entropy with_teacher --json FILE
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARMS = ("cross_entropy", "with_teacher", "teacher_product", "materialised")
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Size:
    rows: int
    tokens: int
    width: int
    teacher_width: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=2_048)
    parser.add_argument("--teacher-width", type=int, default=2_048)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--child", choices=ARMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = Size(arguments.rows, arguments.tokens, arguments.width, arguments.teacher_width)
    if arguments.child:
        print(json.dumps(measure(arguments.child, size)))
        return
    for _ in range(arguments.rounds):
        for arm in arguments.arms:
            one = in_own_process(arm, size)
            print(f"{arm}: {one}", file=sys.stderr, flush=True)
            if arguments.json:
                add(arguments.json, size, arm, one)


def in_own_process(arm: str, size: Size) -> dict[str, Any]:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in vars_of(size).items()]
    command = [sys.executable, __file__, "--child", arm, *options]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


def vars_of(size: Size) -> dict[str, int]:
    return {name: getattr(size, name) for name in ("rows", "tokens", "width", "teacher_width")}


def add(path: Path, size: Size, arm: str, one: dict[str, Any]) -> None:
    """Adds a measurement to the file, and what follows from all of them."""
    from cmapkd.provenance import describe_environment

    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"float": "float32", "sizes": []}
    result["environment"] = describe_environment()
    entry = next((entry for entry in result["sizes"] if entry["size"] == vars_of(size)), None)
    if entry is None:
        entry = {"size": vars_of(size), "runs": {}}
        result["sizes"].append(entry)
    entry["runs"].setdefault(arm, []).append(one)
    entry["ratios"] = ratios(entry["runs"])
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def ratios(runs: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    memory = {arm: max(one["peak_mib"] for one in some) for arm, some in runs.items()}
    seconds = {arm: statistics.median(one["seconds"] for one in some) for arm, some in runs.items()}
    found = {}
    if {"with_teacher", "cross_entropy"} <= runs.keys():
        found["memory, with_teacher / cross_entropy"] = memory["with_teacher"] / memory["cross_entropy"]
    if {"with_teacher", "materialised"} <= runs.keys():
        found["memory, materialised / with_teacher"] = memory["materialised"] / memory["with_teacher"]
        found["time, with_teacher / materialised"] = seconds["with_teacher"] / seconds["materialised"]
    if {"with_teacher", "cross_entropy", "teacher_product"} <= runs.keys():
        parts = seconds["cross_entropy"] + seconds["teacher_product"]
        found["time, with_teacher / (cross_entropy + teacher_product)"] = seconds["with_teacher"] / parts
    return {name: round(value, 3) for name, value in found.items()}


def measure(arm: str, size: Size) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)  # so that the process's own time is the step's
    step_of(arm, Size(4, 16, 8, 8))()  # libraries load
    step = step_of(arm, size)
    Path("/proc/self/clear_refs").write_text("5")  # the highest size so far is now this one
    before, start = resident("VmRSS"), time.process_time()
    value = step()
    seconds, peak = time.process_time() - start, resident("VmHWM")
    return {
        "peak_mib": round((peak - before) / 1024, 1),
        "seconds": round(seconds, 3),
        "value": round(value, 4),
        "load": round(os.getloadavg()[0], 1),
    }


def resident(name: str) -> int:
    """KiB, by the kernel's name."""
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))


def step_of(arm: str, size: Size) -> Callable[[], float]:
    """What is measured; its inputs are made here."""
    import torch
    from torch.nn import functional as F

    from cmapkd.models.token_types import LogitHead
    from cmapkd.objectives import TokenDivergence, token_losses
    from cmapkd.objectives.vocabulary import chunk_of_tokens

    draws = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(rows, size.width, generator=draws).requires_grad_() for rows in (size.rows, size.tokens)
    )
    states, other = (torch.randn(rows, size.teacher_width, generator=draws) for rows in (size.rows, size.tokens))
    for one, width in ((weight, size.width), (other, size.teacher_width)):
        one.data.div_(width**0.5)  # logits of variance 1
    targets = torch.randint(size.tokens, (size.rows,), generator=draws)
    head, teacher = LogitHead(weight), LogitHead(other)

    def teacher_product() -> float:
        with torch.no_grad():
            return float(
                sum(teacher(some).sum() for some in states.split(chunk_of_tokens(size.rows, size.tokens, None)))
            )

    def cross_entropy() -> float:
        loss = token_losses(hidden, head, targets).ce / size.rows
        loss.backward()
        return float(loss.detach())

    def with_teacher() -> float:
        both = token_losses(hidden, head, targets, teacher=(states, teacher), divergence=TokenDivergence())
        assert both.kd is not None
        loss = (both.ce + both.kd) / size.rows
        loss.backward()
        return float(loss.detach())

    def materialised() -> float:
        logits = head(hidden)
        with torch.no_grad():
            log_p = teacher(states).log_softmax(-1)
        kd = F.kl_div(logits.log_softmax(-1), log_p, reduction="batchmean", log_target=True)
        loss = F.cross_entropy(logits, targets) + kd
        loss.backward()
        return float(loss.detach())

    steps = (cross_entropy, with_teacher, teacher_product, materialised)
    return {step.__name__: step for step in steps}[arm]


if __name__ == "__main__":
    main()
