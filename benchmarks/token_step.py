"""A step of a model that writes: alone, and with a teacher whose likeliest tokens stand in a cache.

Both arms are the recipe's own parts (`token_kd_scenes`: student, prompts, batch, optimizer), on fewer pictures, which
stand decoded in memory as they do after a run's first epoch. A step makes its batch, through the model's processor and
from the cache, and is the trainer's own. The arms are:

    sft              the same student, without a teacher
    cached_token_kd  with the 32 likeliest tokens of an untrained teacher `tiny_vlm:base`, read from the disk

They step in turn in one process, so that what else happens on the machine meets both. Time is the process's own.
Memory is the highest resident size during a step less that before it, taken in steps whose time does not count.

Beside this it measures how the student's reader reads one dialogue with its picture, by the whole processor and by its
parts (`models/chat_pictures.py`), in turn.

    taskset -c 0 uv run python benchmarks/token_step.py --json docs/results/token_step.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RECIPE = "token_kd_scenes"
ARMS = ("sft", "cached_token_kd")
PARTS = ("batch", "step", "whole")


@dataclass
class Arm:
    """One training, a step at a time."""

    batches: Any
    trainer: Any
    taken: int = 0
    seconds: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})

    def step(self) -> dict[str, float]:
        start = time.process_time()
        batch = self.batches[self.trainer.sampler.plan(self.taken)]
        read = time.process_time()
        float(self.trainer._step(batch)["loss"])
        end = time.process_time()
        self.taken += 1
        return {"batch": read - start, "step": end - read, "whole": end - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="of each arm, after two of warm-up")
    parser.add_argument("--memory-steps", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        arms, settings = made(arguments.pictures, Path(folder))
        for _ in range(2):
            for arm in arms.values():
                arm.step()
        for _ in range(arguments.steps):
            for name, arm in arms.items():
                spent = arm.step()
                for part, seconds in spent.items():
                    arm.seconds[part].append(seconds)
                print(name, {part: round(seconds, 3) for part, seconds in spent.items()}, file=sys.stderr, flush=True)
        peaks: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(arguments.memory_steps):
            for name, arm in arms.items():
                peaks[name].append(added_mib(arm.step))
    result = {**settings, **summary(arms, peaks), "milliseconds_of_a_dialogue": reading(arms["sft"])}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["ratios"], indent=2))


def made(pictures: int, folder: Path) -> tuple[dict[str, Arm], dict[str, Any]]:
    """Both arms over one teacher's tokenizer, with equal students; and what they were made of."""
    from cmapkd.config import load_config
    from cmapkd.models import FrozenTeacher, build_model
    from cmapkd.run import RunConfig, open_training

    overrides = [
        "teacher=tiny_vlm:base",
        f"data.train=scenes?length={pictures}",
        "data.prompts.share=1.0",
        f"cache.folder={folder / 'cache'}",
        f"training.steps={4 * pictures}",
        "baseline=none",
    ]
    config = load_config(RunConfig, RECIPE, overrides)
    source = open_training(config)
    teacher = build_model("tiny_vlm:base", captions=config.data.prompts.prompting().vocabulary(source))
    alone = config.scratch()
    arms = {
        "sft": arm_of(alone, source, {}, teacher, folder / "sft"),
        "cached_token_kd": arm_of(config, source, {"teacher": FrozenTeacher(teacher)}, teacher, folder / "kd"),
    }
    settings = {
        "recipe": RECIPE,
        "overrides": [one.replace(str(folder), "FOLDER") for one in overrides],
        "batch_size": config.training.batch_size,
        "top_k": config.method.top_k,  # type: ignore[attr-defined]
        "parameters": arms["sft"].trainer.method.student.num_parameters(),
        "vocabulary": teacher.vocabulary.size,  # type: ignore[union-attr]
    }
    return arms, settings


def arm_of(config: Any, source: Any, teachers: Any, tokens_of: Any, out: Path) -> Arm:
    import torch

    from cmapkd.data.batches import BatchBuilder
    from cmapkd.models import build_model
    from cmapkd.run import answer_from_cache, method_of, readers_of, texts_of
    from cmapkd.training import Trainer

    torch.manual_seed(config.seed)
    student = build_model(config.student, teacher=tokens_of)
    method = method_of(config, student, teachers)
    texts = texts_of(config, method, source)
    stored = answer_from_cache(config, method, source, None) if teachers else {}
    batches = BatchBuilder(
        source,
        config.data.views,
        readers_of(method, config),
        seed=config.seed,
        stored=stored,
        extras=method.extras,
        texts=texts,
        memory=config.data.memory,
    )
    for index in range(len(source)):
        batches.samples[index]  # decoded once, and kept
    trainer = Trainer(method, batches, config.training, config.optim, out=out, seed=config.seed)
    trainer.engine.wrapped.train()
    return Arm(batches, trainer)


def reading(arm: Arm, rounds: int = 12) -> dict[str, float]:
    """Milliseconds of reading one dialogue: medians of batches, which are read in turn in both ways."""
    from cmapkd.data.turns import Turn

    reader, picture = arm.batches.readers["student"], arm.batches.samples[0].image
    said = [
        (Turn("user", f"How many {what} are there?", pictures=1), Turn("assistant", answer))
        for what in ("circles", "squares", "triangles", "stars")
        for answer in "12345678"
    ]
    known = reader.processor._sizes._ways
    parts = known[picture.size]
    assert parts is not None
    spent: dict[str, list[float]] = {"processor": [], "parts": []}
    for _ in range(rounds):
        for name, way in (("processor", None), ("parts", parts)):
            known[picture.size] = way
            start = time.process_time()
            for dialogue in said:
                reader.read(picture, None, dialogue)
            spent[name].append(1000 * (time.process_time() - start) / len(said))
    return {name: round(statistics.median(values), 2) for name, values in spent.items()}


def added_mib(step: Callable[[], Any]) -> float:
    import torch

    from cmapkd.training.peak_memory import forget_peak, peak_bytes

    device = torch.device("cpu")
    forget_peak(device)
    before = peak_bytes(device)
    step()
    return round((peak_bytes(device) - before) / 2**20, 1)


def summary(arms: dict[str, Arm], peaks: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, ratios of both arms, and how much the machine had to do beside."""
    from cmapkd.provenance import describe_environment

    medians = {
        name: {part: statistics.median(values) for part, values in arm.seconds.items()} for name, arm in arms.items()
    }
    memory = {name: statistics.median(values) for name, values in peaks.items()}
    alone, cached = (medians[name] for name in ARMS)
    pairs = [cached / alone for alone, cached in zip(*(arms[name].seconds["whole"] for name in ARMS), strict=True)]
    ratios = {
        "time of whole steps, cached_token_kd / sft": cached["whole"] / alone["whole"],
        "time of whole steps, median of pairs": statistics.median(pairs),
        "time without the batch, cached_token_kd / sft": cached["step"] / alone["step"],
        "time of the batch, cached_token_kd / sft": cached["batch"] / alone["batch"],
        "memory, cached_token_kd / sft": memory["cached_token_kd"] / memory["sft"],
    }
    return {
        "steps": len(pairs),
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
        "milliseconds": {
            name: {part: round(1000 * value, 1) for part, value in parts.items()} for name, parts in medians.items()
        },
        "quartiles_ms": {
            name: [round(1000 * value, 1) for value in statistics.quantiles(arm.seconds["whole"], n=4)]
            for name, arm in arms.items()
        },
        "peak_mib": memory,
        "clock": "CPU time of one thread",
        "load": [round(one, 1) for one in os.getloadavg()],
        "environment": describe_environment(),
    }


if __name__ == "__main__":
    main()
