"""Peak memory and time of a large batch in micro-batches, against plain batches of the micro-batch's size and more.

Every arm trains in its own process, so that its peak memory is its own: of the GPU if there is one, else the resident
memory of the process, in which the pixels of the whole batch count too (a GPU holds those of one micro-batch). All arms
train on the same decoded batch of noise. On a CPU, glibc is told to give freed memory back, else
much of the peak is holes in its heap, more or fewer in every run; times suffer from that, so measure them with --heap.

    uv run --group bench python benchmarks/large_batch.py --json docs/results/large_batch.json
    uv run --group bench python benchmarks/large_batch.py --method cmapkd --teacher tiny:large
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WORDS = ("red", "green", "blue", "circle", "square", "star", "left", "right", "above", "below", "small", "large")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="contrastive")
    parser.add_argument("--student", default="tiny:base")
    parser.add_argument("--teacher", default="tiny:large", help="untrained; left out where the method has none")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=128)
    parser.add_argument("--plain", type=int, nargs="*", default=[1024], help="plain batches besides the micro-batch")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=2, help="measured, after one of warm-up")
    parser.add_argument("--heap", action="store_true", help="leave malloc as it is: for times")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--arm", nargs=2, type=int, help=argparse.SUPPRESS)  # batch, micro-batch or 0: a child's
    arguments = parser.parse_args()
    if arguments.arm:
        print(json.dumps(measure(arguments)))
        return
    from cmapkd.provenance import describe_environment

    micro = arguments.micro_batch
    arms = {
        f"plain {micro}": (micro, 0),
        f"{arguments.batch} in micro-batches of {micro}": (arguments.batch, micro),
        **{f"plain {size}": (size, 0) for size in arguments.plain},
    }
    environment = {} if arguments.heap else {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
    found = {name: run_child(arm, environment) for name, arm in arms.items()}
    base, large, *_ = found.values()
    result = {
        "settings": {key: value for key, value in vars(arguments).items() if key not in ("json", "arm")},
        "arms": found,
        "peak_memory_ratio": large["peak_bytes"] / base["peak_bytes"],
        "peak_memory_ratio_without_pixels": (large["peak_bytes"] - large["pixel_bytes"])
        / (base["peak_bytes"] - base["pixel_bytes"]),
        "time_per_pair_ratio": base["pairs_per_second"] / large["pairs_per_second"],
        "environment": describe_environment(),
    }
    print(json.dumps(result, indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def run_child(arm: tuple[int, int], environment: dict[str, str]) -> dict[str, Any]:
    """One arm in a process of its own, with this one's arguments."""
    command = [sys.executable, __file__, *sys.argv[1:], "--arm", *map(str, arm)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"batch {arm} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Speed of one arm in this process, and its peak memory."""
    import torch

    from cmapkd.data.types import Batch, ModelInput
    from cmapkd.methods import METHODS, build_method
    from cmapkd.models import FrozenTeacher, build_model
    from cmapkd.training import OptimConfig, TrainConfig, Trainer

    size, micro_batch = arguments.arm
    torch.manual_seed(0)
    captions = [" ".join(WORDS[(number * step) % len(WORDS)] for step in (1, 5, 7, 11)) for number in range(size)]
    student = build_model(arguments.student, captions=captions)
    kind = METHODS[arguments.method]
    teacher = FrozenTeacher(build_model(arguments.teacher, captions=captions)) if kind.uses_teacher else None
    models = {"student": student} | ({"teacher": teacher.model} if teacher is not None else {})
    specs = {model.image_spec for model in models.values()}
    images = {spec: torch.randn(size, 3, spec.size, spec.size) for spec in specs}
    tokens = {role: model.tokenizer(captions, spans=True) for role, model in models.items()}
    inputs = {role: ModelInput(images[model.image_spec], tokens[role]) for role, model in models.items()}
    batch = Batch(tuple(map(str, range(size))), inputs, tuple(captions))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    class Ready:
        source = range(size * 10_000)

        def __getitem__(self, plan: object) -> Batch:
            return batch

    steps = 1 + arguments.steps
    config = TrainConfig(
        steps=steps,
        batch_size=size,
        micro_batch=micro_batch or None,
        precision=arguments.precision,
        log_every=1,
        checkpoint_every=steps,
    )
    method = build_method(kind.Config.from_mapping({"name": arguments.method}), student=student, teacher=teacher)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        Trainer(method, Ready(), config, OptimConfig(), out=out, seed=0).run()  # type: ignore[arg-type]
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    gpu = torch.cuda.is_available()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "pairs_per_second": round(statistics.median(line["pairs_per_second"] for line in lines[1:]), 1),
        "peak_bytes": torch.cuda.max_memory_allocated() if gpu else resident,
        "bytes_before_training": 0 if gpu else before,
        "pixel_bytes": 0 if gpu else sum(pixels.nbytes for pixels in images.values()),
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "loss": lines[-1]["loss"],
    }


if __name__ == "__main__":
    main()
