"""One GPU in at most ten minutes: training steps, the cache, large batches, losses, the loader, compilation, texts.

    python benchmarks/gpu.py --out gpu.jsonl              # on a machine with a GPU, with all that it measures made here
    python benchmarks/gpu.py --out tiny.jsonl --tiny      # the same code with small models, also on a CPU

It needs no network and no data: models have random weights, pictures are noise, captions are random words of the
lengths that Flickr8k has. Every stage runs in a process of its own and writes a line of JSON for each of its arms, as
soon as that arm is measured. A stage that takes longer than its seconds is ended, and one that would not end in time is
not begun: both write a line that says so. What was written before stays. The exit status is 1 if a stage failed.

Times are of the wall, medians of steps after warm-up, and the device has finished at both ends of each. The work of a
pair is counted with torch's counter, forward pass times three, at the length of the texts that the batch has. What
micro-batches compute twice is counted once. `share_of_peak` divides by the device's published peak of dense bf16.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import io
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cmapkd.cache import CacheConfig, CachePlan, all_keys
from cmapkd.data.batches import BatchBuilder
from cmapkd.data.loading import make_loader
from cmapkd.data.open import open_source
from cmapkd.data.readers import DualReader
from cmapkd.data.tokens import TokenBatch
from cmapkd.data.types import Batch, ModelInput
from cmapkd.data.views import WHOLE
from cmapkd.evaluation.efficiency import count_macs
from cmapkd.methods import METHODS, build_method
from cmapkd.models import FrozenTeacher, ModelConfig, build_model
from cmapkd.objectives import contrastive_loss, interactive_loss, similarity_divergence
from cmapkd.objectives.chunks import split_rows
from cmapkd.provenance import describe_environment
from cmapkd.training import OptimConfig, TrainConfig, Trainer
from cmapkd.training.peak_memory import forget_peak, peak_bytes
from step import Noise

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # FLOP/s of dense bf16 products, as NVIDIA publishes them
LIMIT = 570.0  # seconds of everything, so that a lease of ten minutes also holds its start
GRACE = 1.5  # a stage may take so many times its seconds
LIBRARIES = ("open_clip", "timm", "torch._dynamo", "torch.optim")  # that models and trainers import when they are built
Tell = Callable[..., None]
TEXTS = {"context_length": 32, "vocab_size": 49_408, "width": 32, "heads": 2, "layers": 1}
SMALL = {  # what `--tiny` takes in place of ViT-L/14 and of the students
    name: {
        "embed_dim": width,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": width, "head_width": 16, "patch_size": 16},
        "text_cfg": TEXTS,
    }
    for name, width in (("teacher", 48), ("student", 32))
}


@dataclass(frozen=True)
class Sizes:
    """What is measured; the two instances below differ in nothing else."""

    teacher: str = "open_clip:ViT-L-14"
    student: str = "open_clip:ViT-B-16"
    light: tuple[str, ...] = ("timm:mobilenetv3_small_100", "timm:vit_tiny_patch16_224", "open_clip:ViT-B-16")
    image_size: int | None = 224  # of the timm towers, which have no size of their own
    batch: int = 1024
    large: int = 4096
    largest: int = 32_768
    micro: int = 1024
    steps: int = 6
    loss_batches: tuple[int, ...] = (8192, 16_384, 32_768)
    width: int = 512
    product: int = 8192  # side of the matrices that tell what the device can do
    photographs: int = 4096
    side: int = 512
    workers: int = 12
    precision: Literal["bf16", "fp32"] = "bf16"
    compiler: str = "inductor"
    needs_gpu: bool = True


TINY = Sizes(
    teacher="teacher",
    student="student",
    light=("student",),
    image_size=None,
    batch=8,
    large=16,
    largest=32,
    micro=8,
    steps=2,
    loss_batches=(32,),
    width=16,
    product=64,
    photographs=32,
    side=64,
    workers=1,
    precision="fp32",  # many CPUs have no products in bf16
    compiler="aot_eager",
    needs_gpu=False,
)


# ------------------------------------------------------------------------------------------------ what stages share


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def finished() -> float:
    """The time when the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(run: Callable[[], Any], repeats: int) -> float:
    """Seconds of one run, the median, after one of warm-up."""
    run()
    seconds = []
    for _ in range(repeats):
        start = finished()
        run()
        seconds.append(finished() - start)
    return statistics.median(seconds)


def model(sizes: Sizes, name: str, folder: Path) -> Any:
    """A model with random weights; of the tiny ones the description is written to a file first."""
    if name in SMALL:
        path = folder / f"{name}.json"
        path.write_text(json.dumps(SMALL[name]), encoding="utf-8")
        name = f"open_clip:{path}"
    options = {"image_size": sizes.image_size} if name.startswith("timm:") else {}
    return build_model(ModelConfig(name=name, options=options))


def ready(models: dict[str, Any], pairs: int, of: int) -> Batch:
    """A batch of `pairs` pairs that repeats the same `of` ones, in pinned memory where there is a GPU."""
    names = [str(number) for number in range(of)] * (pairs // of)
    said = [Noise(of, 1).captions(int(name))[0] for name in names[:of]] * (pairs // of)
    shown: dict[Any, Tensor] = {}
    inputs: dict[str, ModelInput] = {}
    for role, each in models.items():
        spec = each.image_spec
        if spec.raw_form not in shown:
            some = torch.randint(0, 256, (of, 3, spec.size, spec.size), dtype=torch.uint8)
            shown[spec.raw_form] = some.repeat(pairs // of, 1, 1, 1)
        inputs[role] = ModelInput(shown[spec.raw_form], each.tokenizer(said))
    batch = Batch(tuple(names), inputs, tuple(said))
    return batch.pin_memory() if torch.cuda.is_available() else batch


def padded(batch: Batch, length: int) -> Batch:
    """The student's texts padded to the tokenizer's length, which the tower then computes to the end."""
    inputs = batch.inputs["student"]
    texts: TokenBatch = inputs.texts
    more = length - texts.ids.shape[1]
    longer = texts.changed(lambda tensor: torch.nn.functional.pad(tensor, [0, 0] * (tensor.ndim - 2) + [0, more]))
    return replace(batch, inputs={**batch.inputs, "student": replace(inputs, texts=replace(longer, lengths=None))})


def work_of_a_pair(each: Any, batch: Batch, role: str) -> int:
    """FLOPs of a model's forward pass for one pair at the batch's length of texts."""
    some = batch.part(0, 2).inputs[role]
    texts = replace(batch.inputs[role].texts.changed(lambda tensor: tensor[:2]), lengths=None)
    inputs = replace(some, texts=texts).to(each.device)
    return 2 * count_macs(each, lambda: each(inputs)) // 2


class Arm:
    """A trainer that takes steps on one batch, and what a step costs."""

    def __init__(
        self, sizes: Sizes, method: Any, batch: Batch, folder: Path, *, builder: Any = None, **training: Any
    ) -> None:
        self.batch = batch
        config = TrainConfig(steps=1000, batch_size=len(batch), precision=sizes.precision, **training)
        builder = builder or SimpleNamespace(source=range(10 * len(batch)), streams=())
        self.trainer = Trainer(method, builder, config, OptimConfig(), out=folder / "run", seed=0)
        self.trainer.engine.wrapped.train()

    def step(self, batch: Batch | None = None) -> float:
        """Seconds of the trainer's own step, on its own batch unless another is given."""
        start = finished()
        float(self.trainer._step(batch or self.batch)["loss"])
        return finished() - start

    def measured(self, steps: int, warm: int = 2, work: float = 0.0) -> dict[str, Any]:
        """Medians of `steps` steps; `work` is that of a pair, in FLOP."""
        first = self.step()
        for _ in range(warm - 1):
            self.step()
        forget_peak(device())
        seconds = statistics.median(self.step() for _ in range(steps))
        return told(len(self.batch), seconds, work) | {"first_step_s": first, "peak_bytes": peak_bytes(device())}


def told(pairs: int, seconds: float, work: float = 0.0) -> dict[str, Any]:
    """Rates of a step, and its share of the device's published peak where that is known."""
    found: dict[str, Any] = {"pairs": pairs, "step_s": seconds, "pairs_per_s": pairs / seconds}
    if work:
        found |= {"gflop_of_a_pair": work / 1e9, "tflop_per_s": pairs * work / seconds / 1e12}
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        peak = next((value for key, value in PEAKS.items() if key in name), None)
        found["share_of_peak"] = None if peak is None else pairs * work / seconds / peak
    return found


def made(name: str, student: Any, teacher: Any = None) -> Any:
    """A method with its defaults, and with a live teacher if it has one."""
    frozen = None if teacher is None else FrozenTeacher(teacher)
    return build_method(METHODS[name].Config.from_mapping({"name": name}), student=student, teacher=frozen)


def cached(sizes: Sizes, folder: Path) -> tuple[Any, Any]:
    """`clip_kd` whose teacher answers from a cache of `batch` samples, and what reads the cache."""
    method = made("clip_kd", model(sizes, sizes.student, folder), model(sizes, sizes.teacher, folder))
    source = Noise(sizes.batch, method.student.image_spec.size)
    cache = CacheConfig(folder=folder / "cache", store="fp16", batch_size=min(256, sizes.batch))
    keys = all_keys(len(source), 1)
    plan = CachePlan.of_method(cache, method, source=source, views=WHOLE, keys=keys, precision="fp32")
    plan.build(device=device().type)
    reader = plan.open()
    method.teacher = plan.cached_teacher(reader, partial(model, sizes, sizes.teacher, folder))
    return method, reader


def with_rows(batch: Batch, reader: Any) -> Batch:
    """The batch with the teacher's stored rows in place of its pixels."""
    indices = [int(name) for name in batch.ids]
    rows = reader.read(0, indices, batch.ids, batch.captions, [])
    return replace(batch, stored={"teacher": rows.pin_memory() if torch.cuda.is_available() else rows})


# ------------------------------------------------------------------------------------------------ the stages


def machine(sizes: Sizes, tell: Tell, _folder: Path) -> None:
    """Which device this is, and what plain products and copies reach on it."""
    if sizes.needs_gpu and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: give --tiny for the same code with small models")
    tell(environment=describe_environment(), device=device().type)
    side = sizes.product
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("tf32", torch.float32)):
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        one, other = (torch.randn(side, side, device=device()).to(dtype) for _ in range(2))
        seconds = timed(partial(torch.mm, one, other), 5)
        tell(product=name, side=side, tflop_per_s=2 * side**3 / seconds / 1e12)
    host = torch.empty(sizes.batch, 3, 224, 224, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    seconds = timed(lambda: host.to(device(), copy=True), 5)
    tell(copied_bytes=host.nbytes, gb_per_s=host.nbytes / seconds / 1e9)


def student(sizes: Sizes, tell: Tell, folder: Path) -> None:
    """`contrastive` alone: a batch at once, and a larger one in micro-batches of that size."""
    each = model(sizes, sizes.student, folder)
    for pairs in (sizes.batch, sizes.large):
        batch = ready({"student": each}, pairs, sizes.batch)
        work = 3 * work_of_a_pair(each, batch, "student")
        micro = {"micro_batch": sizes.micro} if pairs > sizes.micro else {}
        arm = Arm(sizes, made("contrastive", each), batch, folder, **micro)
        tell(arm="contrastive", **micro, **arm.measured(sizes.steps if not micro else 2, 2 if not micro else 1, work))


def compiled(sizes: Sizes, tell: Tell, folder: Path) -> None:
    """The same step with `training.compile` off and on; of the second also how long the first step takes."""
    for on in (False, True):
        each = model(sizes, sizes.student, folder)
        each.compile = partial(each.compile, backend=sizes.compiler)
        batch = ready({"student": each}, sizes.batch, sizes.batch)
        work = 3 * work_of_a_pair(each, batch, "student")
        arm = Arm(sizes, made("contrastive", each), batch, folder, compile=on)
        tell(arm="compiled" if on else "eager", compiler=sizes.compiler, **arm.measured(sizes.steps, 3, work))


def texts(sizes: Sizes, tell: Tell, folder: Path) -> None:
    """Steps with texts padded to the tokenizer's length, as open_clip has them, and cut to the longest, in turn."""
    for name in sizes.light:
        each = model(sizes, name, folder)
        cut = ready({"student": each}, sizes.batch, sizes.batch)
        whole = padded(cut, each.tokenizer.context_length)
        arm = Arm(sizes, made("contrastive", each), cut, folder)
        for batch in (cut, whole):
            arm.step(batch)
        seconds = [(arm.step(cut), arm.step(whole)) for _ in range(sizes.steps)]
        of_cut, of_whole = (statistics.median(column) for column in zip(*seconds, strict=True))
        lengths = [batch.inputs["student"].texts.ids.shape[1] for batch in (cut, whole)]
        tell(
            arm=name,
            lengths=lengths,
            padded_step_s=of_whole,
            padded_over_cut=of_whole / of_cut,
            **told(len(cut), of_cut),
        )


def teachers(sizes: Sizes, tell: Tell, folder: Path) -> None:
    """`clip_kd` with the teacher's rows from a cache and with the teacher live, beside the student alone."""
    alone = model(sizes, sizes.student, folder)
    batch = ready({"student": alone}, sizes.batch, sizes.batch)
    arm = Arm(sizes, made("contrastive", alone), batch, folder)
    base = arm.measured(sizes.steps)
    tell(arm="student alone", **base)
    del arm, alone
    method, reader = cached(sizes, folder)
    arm = Arm(sizes, method, with_rows(batch, reader), folder)
    found = arm.measured(sizes.steps)
    tell(arm="cached", over_student_alone=found["step_s"] / base["step_s"], **found)
    del arm, method
    live = {"student": model(sizes, sizes.student, folder), "teacher": model(sizes, sizes.teacher, folder)}
    both = ready(live, sizes.batch, sizes.batch)
    arm = Arm(sizes, made("clip_kd", live["student"], live["teacher"]), both, folder)
    live_found = arm.measured(sizes.steps)
    tell(arm="live", over_cached=live_found["step_s"] / found["step_s"], **live_found)


def large_batch(sizes: Sizes, tell: Tell, folder: Path) -> None:
    """`clip_kd` from a cache: one micro-batch, then as many as make the largest batch; time of a pair and memory."""
    method, reader = cached(sizes, folder)
    base: dict[str, Any] = {}
    for pairs in (sizes.micro, sizes.largest):
        batch = with_rows(ready({"student": method.student}, pairs, sizes.batch), reader)
        arm = Arm(sizes, method, batch, folder, micro_batch=sizes.micro)
        found = arm.measured(1 if pairs == sizes.largest else sizes.steps, warm=1)
        pixels = batch.inputs["student"].images.nbytes
        base = base or found
        tell(
            arm=f"{pairs} in micro-batches of {sizes.micro}",
            host_pixel_bytes=pixels,
            peak_over_one_micro_batch=found["peak_bytes"] / base["peak_bytes"],
            **found,
        )


def losses(sizes: Sizes, tell: Tell, _folder: Path) -> None:
    """The three in-batch losses of `clip_kd`, forward and backward: whole, an eighth of the rows, and in TF32."""
    for pairs in sizes.loss_batches:
        rows = [torch.randn(pairs, sizes.width, device=device(), requires_grad=n < 2) for n in range(4)]
        scale = torch.tensor(50.0, device=device(), requires_grad=True)

        def all_three(rows: list[Tensor] = rows, scale: Tensor = scale) -> Tensor:
            image, text, teacher_image, teacher_text = rows
            value = contrastive_loss(image, text, logit_scale=scale)
            value = value + similarity_divergence(
                image, text, teacher_image, teacher_text, student_scale=scale, teacher_scale=100.0
            )
            value = value + interactive_loss(image, text, teacher_image, teacher_text, logit_scale=scale)
            rows[0].grad = rows[1].grad = None
            value.backward()
            return value

        def of_an_eighth(run: Callable[[], Tensor] = all_three) -> None:
            with split_rows(0, 8, lambda own: own.repeat(8, *[1] * (own.ndim - 1))):
                run()

        forget_peak(device())
        whole = timed(all_three, 2)
        peak = peak_bytes(device())
        eighth = timed(of_an_eighth, 2)
        all_three()
        exact = rows[0].grad
        torch.set_float32_matmul_precision("high")
        in_tf32 = timed(all_three, 2)
        assert exact is not None
        assert rows[0].grad is not None
        error = float((rows[0].grad - exact).norm() / exact.norm())
        torch.set_float32_matmul_precision("highest")
        tell(
            pairs=pairs, whole_s=whole, eighth_s=eighth, eighth_over_whole=eighth / whole, tf32_s=in_tf32,
            tf32_gradient_error=error, peak_bytes=peak,
        )  # fmt: skip


def loader(sizes: Sizes, tell: Tell, folder: Path) -> None:
    """Pictures a second that data workers read from tars alone, and that training takes from them."""
    write_tars(folder / "tars", sizes)
    source = open_source(f"webdataset:{folder / 'tars'}/*.tar")
    each = model(sizes, sizes.student, folder)
    builder = BatchBuilder(source, WHOLE, {"student": DualReader(each.image_spec, each.tokenizer)}, seed=0)
    batch = ready({"student": each}, sizes.batch, sizes.batch)
    arm = Arm(sizes, made("contrastive", each), batch, folder, builder=builder)
    base = arm.measured(sizes.steps)
    tell(arm="one batch, ready", **base)
    for train in (False, True):
        steps = 4 * sizes.steps if train else 2 * sizes.steps
        arm.trainer.sampler.start, arm.trainer.sampler.stop = 0, steps + 1
        pin = torch.cuda.is_available()
        batches = make_loader(builder, arm.trainer.sampler, workers=sizes.workers, pin_memory=pin)
        next(batches)  # the first one waits for the workers to start
        start = finished()
        for read in batches:
            if train:
                arm.step(read)
        found = told(sizes.batch, (finished() - start) / steps)
        over = {"over_one_batch_ready": base["step_s"] / found["step_s"]} if train else {}
        tell(
            arm="trained from tars" if train else "read alone", workers=sizes.workers, side=sizes.side, **over, **found
        )


def write_tars(folder: Path, sizes: Sizes) -> None:
    """Tars of pairs as img2dataset writes them; up to 256 pictures, clouds with some grain, are repeated."""
    folder.mkdir()
    draws, pictures = np.random.default_rng(0), list[bytes]()
    for _ in range(min(256, sizes.photographs)):
        clouds = Image.fromarray(draws.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((sizes.side, sizes.side))
        grain = draws.normal(0, 6, (sizes.side, sizes.side, 1))
        file = io.BytesIO()
        Image.fromarray(np.clip(np.asarray(clouds) + grain, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        pictures.append(file.getvalue())
    said = Noise(sizes.photographs, 1)
    for shard in range(8):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for number in range(shard, sizes.photographs, 8):
                text = said.captions(number)[0].encode()
                for kind, data in (("jpg", pictures[number % len(pictures)]), ("txt", text)):
                    info = tarfile.TarInfo(f"{number:09d}.{kind}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))


def pixels(sizes: Sizes, tell: Tell, folder: Path) -> None:
    """What it takes the device to normalise a batch of bytes, and whether the numbers are the host's."""
    spec = model(sizes, sizes.student, folder).image_spec
    images = torch.randint(0, 256, (sizes.batch, 3, spec.size, spec.size), dtype=torch.uint8)
    there = images.to(device())
    seconds = timed(lambda: spec.to_model(there), 5)
    tell(
        pairs=sizes.batch, seconds=seconds, equal_to_host=torch.equal(spec.to_model(there).cpu(), spec.to_model(images))
    )


STAGES: dict[str, tuple[int, Callable[[Sizes, Tell, Path], None]]] = {  # seconds, in the order of what matters most
    "machine": (20, machine),
    "student": (60, student),
    "teachers": (80, teachers),
    "texts": (50, texts),
    "compiled": (80, compiled),
    "losses": (40, losses),
    "large_batch": (100, large_batch),
    "loader": (80, loader),
    "pixels": (15, pixels),
}


# ------------------------------------------------------------------------------------------------ running them


def write(file: Path, stage: str, numbers: dict[str, Any]) -> None:
    line = json.dumps({"stage": stage, **numbers})
    with file.open("a", encoding="utf-8") as out:
        out.write(line + "\n")
    print(line, flush=True)


def work(stage: str, sizes: Sizes, file: Path) -> None:
    """A stage, in a process of its own, which leads the group of all that it starts."""
    os.setsid()
    try:
        with tempfile.TemporaryDirectory() as folder:
            STAGES[stage][1](sizes, lambda **numbers: write(file, stage, numbers), Path(folder))
    except BaseException as error:
        write(file, stage, {"failed": f"{type(error).__name__}: {error}"[:500]})
        traceback.print_exc()
        sys.exit(1)


def run(sizes: Sizes, file: Path, names: list[str], *, limit: float = LIMIT, grace: float = GRACE) -> bool:
    """The stages named, one after the other; whether all of them ended well or in time."""
    begin, good = time.monotonic(), True
    for library in LIBRARIES:  # once, and not in every stage
        importlib.import_module(library)
    gc.freeze()
    context = multiprocessing.get_context("fork")  # what was imported is there; the device is not yet touched
    for name in names:
        seconds, left = STAGES[name][0], limit - (time.monotonic() - begin)
        if left < seconds:
            write(file, name, {"skipped": f"it may take {seconds} s, and {left:.0f} s are left"})
            continue
        process = context.Process(target=work, args=(name, sizes, file))
        start = time.monotonic()
        process.start()
        process.join(min(grace * seconds, left))
        took = time.monotonic() - start
        if process.is_alive():
            assert process.pid is not None
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            write(file, name, {"skipped": f"ended after {took:.0f} s, its lines before this one stand"})
        elif process.exitcode:
            good = False
            if name == "machine":
                return False
        else:
            write(file, name, {"took_s": round(took, 3)})
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines, which is begun anew")
    parser.add_argument("--tiny", action="store_true", help="small models and batches, also on a CPU")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of all stages together")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("", encoding="utf-8")
    sizes = TINY if arguments.tiny else Sizes()
    sys.exit(0 if run(sizes, arguments.out, arguments.stages, limit=arguments.limit) else 1)


if __name__ == "__main__":
    main()
