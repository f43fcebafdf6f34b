"""A training step of one pair: the student alone, CMAPKD with a cached teacher, online, and open_clip's own.

Every arm runs in its own process, so that its peak memory is its own; they step in turn, one step each, so that what
else happens on the machine meets all of them. With --apart one process lives at a time and takes all steps of a round:
for machines without the memory of all arms at once. All arms train on the same pixels and texts, which stand ready: the
step is measured, not decoding. Of a cache the rows are read from its files within the step. On one CPU thread the clock
is the process's own time, which other processes do not add to; else it is the wall's.
Of the large pair our own arms train in micro-batches, whose result is the same: open_clip cannot do so when it distils.

    uv run --group bench python benchmarks/step.py --pair small --threads 1 --json docs/results/step_small.json
    uv run --group bench python benchmarks/step.py --pair vit_l14_b16 --rounds 2 --threads 1 --json FILE
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
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
    apart: bool = False  # one arm in memory at a time, always
    micro_batch: int | None = None  # of our arms but those that say `whole_batch`; open_clip has none with distillation
    options: dict[str, Any] | None = None  # of the student


PAIRS = {
    "small": Pair("", "", batch_size=64, steps=8),
    # small image towers beside CLIP's text tower of 512 channels and 12 blocks
    "edge": Pair(
        "open_clip:ViT-B-32", "timm:mobilenetv3_small_100", batch_size=16, steps=3, options={"image_size": 224}
    ),
    "edge_vit": Pair(
        "open_clip:ViT-B-32", "timm:vit_tiny_patch16_224", batch_size=16, steps=3, options={"image_size": 224}
    ),
    "vit_l14_b16": Pair("open_clip:ViT-L-14", "open_clip:ViT-B-16", batch_size=16, steps=2, apart=True, micro_batch=4),
}
EVERY = {"visual_levels": {"P2": 16.0, "P3": 16.0, "P4": 16.0, "P5": 1.0}}  # by default P3 and P4 are not read
# all eight levels, from rows of kind `pooled`; compared with 2,048 pairs of a bank of 8,192 at each step, or with all
CACHED = {"name": "cmapkd", "places": "pooled", "ablations": {"relation_weight": 3.0}, **EVERY}
ARMS: dict[str, dict[str, Any]] = {
    "student_only": {"name": "contrastive"},
    "cached_cmapkd": CACHED,
    "cached_cmapkd_whole_bank": {**CACHED, "bank": {"sample": None}},
    "student_only_whole_batch": {"name": "contrastive"},
    "cached_cmapkd_whole_batch": CACHED,  # differs where the pair has a micro_batch: same losses and gradients
    "online_cmapkd": {"name": "cmapkd", **EVERY},
    "online_hinton": {"name": "hinton"},
    "online_clip_kd": {"name": "clip_kd"},
    "open_clip_distill": {},
    "open_clip_student_only": {},
    "student_only_compiled": {"name": "contrastive"},
    "student_only_channels_last": {"name": "contrastive"},
}
DEFAULT = ("student_only", "cached_cmapkd", "cached_cmapkd_whole_bank", "online_hinton", "open_clip_distill")
WORDS = ("a", "dog", "runs", "on", "the", "beach", "with", "two", "red", "balls")  # each is one token of CLIP's
ANSWER = "answer: "
PARTS = ("read", "teacher", "student", "terms", "backward", "update")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=PAIRS, default="small")
    parser.add_argument("--batch", type=int, default=None, help="pairs in a batch; by default the pair's own number")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--apart", action="store_true", help="one arm in memory at a time")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=DEFAULT)
    parser.add_argument("--threads", type=int, default=None, help="torch threads; by default torch decides")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--child", nargs=2, metavar=("ARM", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    pair = PAIRS[arguments.pair]
    pair = replace(pair, batch_size=arguments.batch or pair.batch_size)
    apart = pair.apart or arguments.apart
    if arguments.child:
        arm, folder = arguments.child
        serve(arm, pair, arguments.threads, Path(folder))
        return
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arguments.arms}
    with tempfile.TemporaryDirectory() as folder:
        start = partial(Child, pair=arguments.pair, batch=pair.batch_size, threads=arguments.threads, folder=folder)
        if any(arm.startswith("cached") for arm in arguments.arms):
            start("build").finish()
        children = {} if apart else {arm: start(arm) for arm in arguments.arms}
        for number in range(arguments.rounds if apart else 1):
            if apart:
                for arm in arguments.arms:
                    child = start(arm)
                    for _ in range(pair.steps):
                        child.step()
                    runs[arm].append(child.finish())
                    print(f"round {number + 1}  {arm}: {runs[arm][-1]}", file=sys.stderr, flush=True)
            else:
                for _ in range(arguments.rounds * pair.steps):
                    print({arm: round(child.step(), 4) for arm, child in children.items()}, file=sys.stderr, flush=True)
                runs = {arm: [child.finish()] for arm, child in children.items()}
            result = summarise(arguments.pair, pair.batch_size, runs)
            if arguments.json:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def summarise(pair: str, batch_size: int, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over all steps of all rounds, their spread, and ratios of step time and peak memory."""
    from cmapkd.provenance import describe_environment

    times = {arm: [second for run in done for second in run["seconds"]] for arm, done in runs.items()}
    step = {arm: statistics.median(seconds) for arm, seconds in times.items()}
    memory = {arm: statistics.median(run["peak_bytes"] for run in done) for arm, done in runs.items()}
    ratios: dict[str, float] = {}

    def ratio(name: str, over: dict[str, Any], one: str, other: str) -> None:
        if one in over and other in over:
            ratios[name] = round(over[one] / over[other], 3)

    ratio("cached_cmapkd_over_student_only", step, "cached_cmapkd", "student_only")
    ratio("cached_cmapkd_whole_bank_over_student_only", step, "cached_cmapkd_whole_bank", "student_only")
    ratio("open_clip_distill_over_cached_cmapkd", step, "open_clip_distill", "cached_cmapkd")
    whole = "cached_cmapkd_whole_batch"
    ratio(f"{whole}_over_student_only_whole_batch", step, whole, "student_only_whole_batch")
    ratio(f"open_clip_distill_over_{whole}", step, "open_clip_distill", whole)
    ratio("open_clip_student_only_over_student_only", step, "open_clip_student_only", "student_only")
    ratio("peak_memory_ratio_whole_batch", memory, whole, "open_clip_distill")
    ratio("online_cmapkd_over_online_clip_kd", step, "online_cmapkd", "online_clip_kd")
    ratio("open_clip_distill_over_online_hinton", step, "open_clip_distill", "online_hinton")
    ratio("peak_memory_ratio", memory, "cached_cmapkd", "open_clip_distill")
    ratio("peak_memory_over_student_only", memory, "cached_cmapkd", "student_only")
    ratio("compiled_over_student_only", step, "student_only_compiled", "student_only")
    ratio("channels_last_over_student_only", step, "student_only_channels_last", "student_only")
    return {
        "pair": pair,
        "batch_size": batch_size,
        "micro_batch": PAIRS[pair].micro_batch,
        **ratios,
        "methods": {arm: ARMS[arm] for arm in runs if ARMS[arm]},
        "clock": next(iter(runs.values()))[0]["clock"],
        "step_seconds": {arm: round(value, 4) for arm, value in step.items()},
        "step_seconds_quartiles": {
            arm: [round(value, 4) for value in statistics.quantiles(seconds, n=4)] for arm, seconds in times.items()
        },
        "step_seconds_all": {arm: [round(value, 4) for value in seconds] for arm, seconds in times.items()},
        "over_student_only": {
            arm: round(value / step["student_only"], 3) for arm, value in step.items() if "student_only" in step
        },
        "peak_memory_mib": {arm: round(value / 2**20) for arm, value in memory.items()},
        "parts_ms": {
            arm: {part: round(1000 * statistics.median(run["parts"][part] for run in done), 2) for part in PARTS}
            for arm, done in runs.items()
            if done[0]["parts"]
        },
        "parameters": max((run["parameters"] for done in runs.values() for run in done), key=len),  # with the teacher's
        "environment": describe_environment(),
    }


class Child:
    """A process that takes a step of its arm each time it is asked."""

    def __init__(self, arm: str, *, pair: str, batch: int, threads: int | None, folder: str) -> None:
        command = [sys.executable, __file__, "--child", arm, folder, "--pair", pair, "--batch", str(batch)]
        command += ["--threads", str(threads)] if threads else []
        self.arm, self.seconds = arm, list[float]()
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.seconds.append(float(self._answer()))
        return self.seconds[-1]

    def finish(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.close()
        result: dict[str, Any] = json.loads(self._answer())
        self.process.wait()
        return {**result, "seconds": self.seconds}

    def _answer(self) -> str:
        """The next line that is meant for the parent; libraries print others."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return line.removeprefix(ANSWER)
        raise SystemExit(f"{self.arm} ended with {self.process.wait()}")


def serve(arm: str, pair: Pair, threads: int | None, folder: Path) -> None:
    """The child's side: one step of warm-up, then one for each line it is sent, and at the end its memory."""
    import torch

    from cmapkd.models import ModelConfig, build_model
    from cmapkd.training.peak_memory import forget_peak, peak_bytes

    if threads:
        torch.set_num_threads(threads)
    gpu = torch.cuda.is_available()
    alone = torch.get_num_threads() == 1 and not gpu
    clock = time.process_time if alone else time.perf_counter
    torch.manual_seed(0)
    asks = arm != "open_clip_student_only" and (arm == "build" or ARMS[arm].get("name") != "contrastive")
    teacher = build_model(_name(pair.teacher, "teacher", folder)) if asks else None
    torch.manual_seed(1)
    student = build_model(ModelConfig(name=_name(pair.student, "student", folder), options=pair.options or {}))
    parameters = {"student": student.num_parameters()} | ({"teacher": teacher.num_parameters()} if teacher else {})
    spent: dict[str, list[float]] = {}
    step: Callable[[], float]
    if arm.startswith("open_clip"):
        step = _open_clip(student, teacher, _batch(pair, student, teacher), pair, clock)
    else:
        trainer, read = _trainer(arm, student, teacher, pair, folder)
        del teacher  # a cached one has no weights any more
        step = (lambda: 0.0) if arm == "build" else _cmapkd(trainer, read, clock, spent)
    device = torch.device("cuda" if gpu else "cpu")
    forget_peak(device)  # models were built, a cached teacher let go: what is measured is training
    seconds = [step()]
    for values in spent.values():
        values.clear()
    for _ in sys.stdin:
        seconds.append(step())
        print(f"{ANSWER}{seconds[-1]}", flush=True)
    parts = {part: statistics.median(values) if values else 0.0 for part, values in spent.items()}
    parts = {} if pair.micro_batch and not arm.endswith("whole_batch") else parts  # there a part comes many times
    if parts:
        parts["terms"] -= parts["student"] + parts["teacher"]  # what is left of the forward pass
        parts["update"] = statistics.median(seconds[1:]) - sum(parts.values())
    peak = peak_bytes(device)
    clock_name = "CPU time of one thread" if alone else "wall"
    print(ANSWER + json.dumps({"parts": parts, "peak_bytes": peak, "parameters": parameters, "clock": clock_name}))


class Noise:
    """One batch of pictures that nothing can compress, with a caption each."""

    name = "noise"
    class_names: Sequence[str] | None = None

    def __init__(self, length: int, size: int) -> None:
        self.length, self.size = length, size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        import numpy as np
        from PIL import Image

        from cmapkd.data.types import Sample

        pixels = np.random.default_rng(index).integers(0, 256, (self.size, self.size, 3), dtype=np.uint8)
        return Sample(str(index), Image.fromarray(pixels), self.captions(index))

    def captions(self, index: int) -> tuple[str, ...]:
        """As many words as captions have: a gamma distribution with the mean (14.1 tokens) and the 99th centile (26) of
        Flickr8k's 30,000, where 42 tokens are the most. Each word is one token of CLIP's."""
        import numpy as np

        draws = np.random.default_rng([index, 14])
        count = int(np.clip(round(draws.gamma(7.2, 12.1 / 7.2)), 2, 40))
        return (" ".join(draws.choice(WORDS, count)),)

    def fingerprint(self) -> str:
        return f"noise-{self.length}-{self.size}-{self.captions(0)[0]}"


def _name(name: str, role: str, folder: Path) -> str:
    if name:
        return name
    path = folder / f"{role}.json"
    path.write_text(json.dumps(SMALL[role]), encoding="utf-8")
    return f"open_clip:{path}"


def _batch(pair: Pair, student: Any, teacher: Any = None, reader: Any = None) -> Any:
    """The one batch of all arms; with the rows of a cache in place of the teacher's input, where there is one."""
    from cmapkd.data.batches import BatchBuilder
    from cmapkd.data.plans import PlanSampler
    from cmapkd.data.readers import DualReader
    from cmapkd.data.views import WHOLE

    source = Noise(pair.batch_size, student.image_spec.size)
    models = {"student": student} | ({"teacher": teacher} if teacher is not None else {})
    readers = {role: DualReader(model.image_spec, model.tokenizer) for role, model in models.items()}
    builder = BatchBuilder(source, WHOLE, readers, seed=0, stored={"teacher": reader} if reader is not None else None)
    plan = PlanSampler(len(source), batch_size=pair.batch_size, seed=0, start=0, stop=1).plan(0)
    return builder[plan]


def _trainer(arm: str, student: Any, teacher: Any, pair: Pair, folder: Path) -> tuple[Any, Any]:
    """The trainer of an arm, and what reads its batch, with rows from the cache; `build` builds that cache."""
    import torch

    from cmapkd.cache import CacheConfig, CachePlan, all_keys
    from cmapkd.data.views import WHOLE
    from cmapkd.methods import METHODS, build_method
    from cmapkd.models import FrozenTeacher, build_model
    from cmapkd.training import OptimConfig, TrainConfig, Trainer

    settings = CACHED if arm == "build" else ARMS[arm]
    config = METHODS[settings["name"]].Config.from_mapping(settings)
    method = build_method(config, student=student, teacher=FrozenTeacher(teacher) if teacher is not None else None)
    source = Noise(pair.batch_size, student.image_spec.size)
    reader = None
    if arm == "build" or arm.startswith("cached"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        cache = CacheConfig(folder=folder / "cache", store="fp16", batch_size=pair.batch_size)
        plan = CachePlan.of_method(
            cache, method, source=source, views=WHOLE, keys=all_keys(len(source), 1), precision="fp32"
        )
        if arm == "build":
            plan.build(device=device)
            return None, None
        reader = plan.open()
        again = partial(build_model, _name(pair.teacher, "teacher", folder))  # nothing here may keep the weights
        method.teacher = plan.cached_teacher(reader, again)
    bank = getattr(method, "bank", None)
    if bank is not None:  # as it is after the first steps of a run
        draws = torch.Generator().manual_seed(2)
        noise = (torch.randn(bank.size, teacher.embed_dim, generator=draws) for _ in range(2))
        bank.push(*noise, torch.arange(bank.size) + 2**40)
    batch = _batch(pair, student, None if reader is not None else teacher, reader)
    if arm == "student_only_channels_last":
        student.to(memory_format=torch.channels_last)
        inputs = batch.inputs["student"]
        images = inputs.images.to(memory_format=torch.channels_last)
        batch = replace(batch, inputs={"student": replace(inputs, images=images)})
    training = TrainConfig(
        steps=1 + pair.steps,
        batch_size=pair.batch_size,
        micro_batch=None if arm.endswith("whole_batch") else pair.micro_batch,
        compile=arm.endswith("compiled"),
    )
    builder = SimpleNamespace(source=source, streams=())
    trainer = Trainer(method, builder, training, OptimConfig(), out=folder / "run", seed=0)  # type: ignore[arg-type]
    trainer.engine.wrapped.train()
    indices = [int(name) for name in batch.ids]

    def read() -> Any:
        if reader is None:
            return batch
        return replace(batch, stored={"teacher": reader.read(0, indices, batch.ids, batch.captions, [])})

    return trainer, read


def _cmapkd(trainer: Any, read: Any, clock: Any, spent: dict[str, list[float]]) -> Callable[[], float]:
    """The trainer's own step, with its clipping and its checks; `spent` collects the seconds of its parts."""
    import torch

    spent |= {part: [] for part in PARTS if part != "update"}
    method = trainer.method

    def timed(holder: Any, name: str, part: str) -> None:
        inner = getattr(holder, name)

        def outer(*arguments: Any, **options: Any) -> Any:
            start = clock()
            result = inner(*arguments, **options)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            spent[part].append(clock() - start)
            return result

        object.__setattr__(holder, name, outer)

    timed(method, "_encode_student", "student")
    if method.teacher is not None:
        timed(method, "_encode_teacher", "teacher")
    timed(method, "terms", "terms")
    timed(trainer.accelerator, "backward", "backward")

    def step() -> float:
        start = clock()
        ready = read()
        spent["read"].append(clock() - start)
        float(trainer._step(ready)["loss"])
        return float(clock() - start)

    return step


def _open_clip(student: Any, teacher: Any, batch: Any, pair: Pair, clock: Any) -> Callable[[], float]:
    """open_clip's own training loop, with its distillation loss if there is a teacher, on the models that the adapters
    wrap. Its texts are padded to the full length, because it takes no others."""
    import open_clip
    import torch
    from open_clip_train.train import train_one_epoch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    args = SimpleNamespace(
        device=device,
        precision="fp32",
        distill=teacher is not None,
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
    model = student.model.to(device)
    distilled = None if teacher is None else teacher.model.to(device).eval().requires_grad_(False)
    for module in (model, distilled):
        if module is not None:
            module.output_dict = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    class Ready:
        """What the loop reads of a dataset: the same batch, `num_batches` times."""

        def __init__(self, steps: int) -> None:
            self.num_batches, self.num_samples, self.dataloader = steps, steps * pair.batch_size, self

        def __iter__(self) -> Any:
            return iter([(images, ids)] * self.num_batches)

        def set_epoch(self, epoch: int) -> None:
            """The loop announces each epoch; the batches stay the same."""

    images = student.image_spec.to_model(batch.inputs["student"].images)  # this loop takes them normalised
    ids = student.tokenizer.native(list(batch.captions), context_length=student.tokenizer.context_length)
    loss = open_clip.create_loss(args)

    def step() -> float:
        """An epoch of one step."""
        start = clock()
        train_one_epoch(model, {"train": Ready(1)}, loss, 0, optimizer, None, None, distilled, args)
        return float(clock() - start)

    return step


if __name__ == "__main__":
    main()
