"""Training speed and peak memory of one pair: student alone, distilled by cmapkd, distilled by open_clip itself.

Every arm runs in its own process, so that its peak memory is its own; rounds go through the arms in turn, so that what
else happens on the machine meets all of them. All arms train on the same decoded batches: the step is measured, not the
disk. Results are ratios to the student-only arm and to open_clip.

    uv run --group bench python benchmarks/step.py --pair small --json docs/results/step_small.json
    uv run --group bench python benchmarks/step.py --pair vit_l14_b16 --rounds 2 --json FILE
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SMALL = {
    "teacher": {
        "embed_dim": 256,
        "vision_cfg": {"image_size": 64, "layers": 8, "width": 256, "head_width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 4},
    },
    "student": {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 64, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2},
    },
}


@dataclass(frozen=True)
class Pair:
    teacher: str  # names of the open_clip family; `small` is written out as config files first
    student: str
    batch_size: int
    steps: int  # measured in a round, after one of warm-up


PAIRS = {
    "small": Pair("", "", batch_size=64, steps=8),
    "vit_l14_b16": Pair("open_clip:ViT-L-14", "open_clip:ViT-B-16", batch_size=8, steps=3),
}
ARMS = ("student_only", "cmapkd_hinton", "cmapkd_clip_kd", "open_clip_distill")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=PAIRS, default="small")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="torch threads; by default torch decides")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)  # what a child process runs
    arguments = parser.parse_args()
    if arguments.arm:
        print(json.dumps(measure(arguments.arm, arguments.pair, arguments.threads)))
        return
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for number in range(arguments.rounds):
        for arm in ARMS:
            runs[arm].append(_in_child(arm, arguments.pair, arguments.threads))
            print(f"round {number + 1}/{arguments.rounds}  {arm}: {runs[arm][-1]}", file=sys.stderr)
    result = summarise(arguments.pair, runs)
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def summarise(pair: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over rounds, and ratios of step time and peak memory."""
    from cmapkd.provenance import describe_environment

    speed = {arm: statistics.median(run["pairs_per_second"] for run in done) for arm, done in runs.items()}
    memory = {arm: statistics.median(run["peak_bytes"] for run in done) for arm, done in runs.items()}
    return {
        "pair": pair,
        "batch_size": PAIRS[pair].batch_size,
        "parameters": runs["cmapkd_hinton"][0]["parameters"],
        "pairs_per_second": {arm: round(value, 2) for arm, value in speed.items()},
        "spread": {arm: [round(run["pairs_per_second"], 2) for run in done] for arm, done in runs.items()},
        "peak_memory_mib": {arm: round(value / 2**20) for arm, value in memory.items()},
        "step_time_over_student_only": {arm: round(speed["student_only"] / value, 3) for arm, value in speed.items()},
        "open_clip_distill_over_online_hinton": round(speed["cmapkd_hinton"] / speed["open_clip_distill"], 3),
        "peak_memory_ratio": round(memory["cmapkd_hinton"] / memory["open_clip_distill"], 3),
        "environment": describe_environment(),
    }


def _in_child(arm: str, pair: str, threads: int | None) -> dict[str, Any]:
    command = [sys.executable, __file__, "--arm", arm, "--pair", pair]
    command += ["--threads", str(threads)] if threads else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arm} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def measure(arm: str, pair_name: str, threads: int | None) -> dict[str, Any]:
    """Speed of one arm in this process, and the process's peak resident memory."""
    import torch

    from cmapkd.models import build_model

    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    pair = PAIRS[pair_name]
    with tempfile.TemporaryDirectory() as folder:
        student = build_model(_name(pair.student, "student", Path(folder)))
        teacher = build_model(_name(pair.teacher, "teacher", Path(folder))) if arm != "student_only" else None
        parameters = {"student": student.num_parameters()}
        if teacher is not None:
            parameters["teacher"] = teacher.num_parameters()
        images = torch.randn(pair.batch_size, 3, student.image_spec.size, student.image_spec.size)
        texts = student.tokenizer([f"a photo of {number} dogs on a beach" for number in range(pair.batch_size)])
        if arm == "open_clip_distill":
            rate = _open_clip(student, teacher, images, texts, pair)
        else:
            method = {"student_only": "contrastive", "cmapkd_hinton": "hinton", "cmapkd_clip_kd": "clip_kd"}[arm]
            rate = _cmapkd(method, student, teacher, images, texts, pair, Path(folder))
    peak = (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return {"pairs_per_second": rate, "peak_bytes": peak, "parameters": parameters}


def _name(name: str, role: str, folder: Path) -> str:
    if name:
        return name
    path = folder / f"{role}.json"
    path.write_text(json.dumps(SMALL[role]), encoding="utf-8")
    return f"open_clip:{path}"


def _cmapkd(method_name: str, student: Any, teacher: Any, images: Any, texts: Any, pair: Pair, folder: Path) -> float:
    """The Trainer itself, with its logging and clipping; the batches stand ready."""
    from cmapkd.data.types import Batch, ModelInput
    from cmapkd.methods import METHODS
    from cmapkd.models import FrozenTeacher
    from cmapkd.training import OptimConfig, TrainConfig, Trainer

    inputs = {"student": ModelInput(images, texts)} | (
        {"teacher": ModelInput(images, texts)} if teacher is not None else {}
    )
    batch = Batch(tuple(map(str, range(pair.batch_size))), inputs, ("",) * pair.batch_size)

    class Ready:
        source = range(pair.batch_size * 10_000)

        def __getitem__(self, plan: object) -> Batch:
            return batch

    method_class = METHODS[method_name]
    method = method_class(
        method_class.Config(name=method_name),
        student=student,
        teacher=FrozenTeacher(teacher) if teacher is not None else None,
    )
    steps = 1 + pair.steps
    config = TrainConfig(steps=steps, batch_size=pair.batch_size, log_every=1, checkpoint_every=steps)
    trainer = Trainer(method, Ready(), config, OptimConfig(), out=folder / "run", seed=0)  # type: ignore[arg-type]
    (folder / "run").mkdir()
    trainer.run()
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["pairs_per_second"] for line in lines[1:])


def _open_clip(student: Any, teacher: Any, images: Any, texts: Any, pair: Pair) -> float:
    """open_clip's own training loop with its distillation loss, on the models that the adapters wrap."""
    import time
    from types import SimpleNamespace

    import open_clip
    import torch
    from open_clip_train.train import train_one_epoch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    args = SimpleNamespace(
        device=device,
        precision="fp32",
        distill=True,
        accum_freq=1,
        skip_scheduler=True,
        horovod=False,
        grad_clip_norm=1.0,
        rank=0,
        world_size=1,
        local_rank=0,
        local_loss=False,
        gather_with_grad=False,
        log_every_n_steps=1,
        batch_size=pair.batch_size,
        wandb=False,
        distributed=False,
        model="",
        siglip=False,
        save_logs=False,
    )
    model, distilled = student.model.to(device), teacher.model.to(device).eval().requires_grad_(False)
    for module in (model, distilled):
        module.output_dict = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    class Ready:
        """What the loop reads of a dataset: the same batch, `num_batches` times."""

        def __init__(self, steps: int) -> None:
            self.num_batches, self.num_samples, self.dataloader = steps, steps * pair.batch_size, self

        def __iter__(self) -> Any:
            return iter([(images, texts.ids)] * self.num_batches)

        def set_epoch(self, epoch: int) -> None:
            """The loop announces each epoch; the batches stay the same."""

    loss = open_clip.create_loss(args)
    train_one_epoch(model, {"train": Ready(1)}, loss, 0, optimizer, None, None, distilled, args)
    start = time.perf_counter()
    train_one_epoch(model, {"train": Ready(pair.steps)}, loss, 1, optimizer, None, None, distilled, args)
    return pair.batch_size * pair.steps / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
