"""What each process of a group of one, two or four does for `test_several_processes.py`.

A script, so that importing torch is paid once. A group finds what the ones before it left in the folder.
"""

from __future__ import annotations

import gc
import os
import shutil
import socket
import sys
import time
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import get_context

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from making import encode, write_tar

from cmapkd.cache import CacheConfig, CachePlan, all_keys
from cmapkd.data.batches import BatchBuilder
from cmapkd.data.open import open_source
from cmapkd.data.plans import PlanSampler
from cmapkd.data.shards import ShardSource
from cmapkd.data.types import Batch, Source
from cmapkd.data.views import ViewSpec
from cmapkd.evaluation.probes.config import HeadsConfig
from cmapkd.evaluation.probes.joint import build_heads
from cmapkd.features import gather_features, gather_rows
from cmapkd.methods import METHODS, Method, Term, build_method
from cmapkd.methods.targets import Answered
from cmapkd.methods.terms import divided
from cmapkd.methods.unpaired import UnpairedPictures
from cmapkd.models import DualEncoder, Features, TowerFeatures, build_model
from cmapkd.run import readers, vocabulary_captions
from cmapkd.training import Trainer
from cmapkd.training.exchange import AveragedGradients
from cmapkd.training.processes import prepare_to_wait, wait_for_all
from cmapkd.training.sharding import ShardedMethod, whole_tensors
from cmapkd.training.stopping import Agreement
from contracted import Contracted, NormedStudent
from helpers import (
    CLASSIFYING,
    CLIP_KD_IN_FULL,
    CMAPKD_EXACT,
    DUAL,
    GRADNORM,
    LENT,
    MASKED,
    MemorySource,
    Partly,
    into_first_stage,
    make_method,
    make_model,
    make_trainer,
    random_batch,
    second_teacher,
)
from surveyed import survey_of

TWO, FOUR = 2, 4
BATCH = 8
DTYPES = {"float32": torch.float32, "float64": torch.float64}
CACHED = ", from a cache"
MICRO_BATCH = 3  # of the four pairs that each of two processes has; the two of each of four are encoded at once
MICRO = ", in micro-batches"
LOCAL, SHARDED, SHARED_TEACHER = ", local loss", ", fsdp2", ", fsdp2 with the teacher"
SHARDED_METHODS = ("contrastive", "clip_kd", "clip_rd", "cmapkd", "hinton", "tinyclip")
WITH_STATE = ("contrastive", "clip_kd", "cmapkd", "tinyclip")  # of these; the others keep scales, which clip_kd has
WITH_LEVELS = ("clip_kd", "cmapkd")  # a teacher that is asked for embeddings, and for levels
TRAINED = (
    "contrastive",
    "clip_kd",
    "clip_kd, balanced terms",
    "cmapkd, selected by a policy",
    f"clip_kd{CACHED}",
    "tinyclip, with masks",
    "tinyclip, units by lot",
    "contracted",
    f"cmapkd{MICRO}",
    f"clip_kd{MICRO}{CACHED}",
    *(f"{name}{SHARDED}" for name in WITH_STATE),
    f"contracted{SHARDED}",
)
POLICY = {"name": "policy", "warmup_steps": 2, "window": 2, "edge": 1}
CASES: dict[
    str, tuple[str | type[Method], dict[str, Any]]
] = {  # name: (method, settings); every method as it comes, and more
    **{name: (name, {}) for name in DUAL},
    "promptkd": ("promptkd", {"distill_weight": 5.0}),  # by default 1000, for more than the 5 classes here
    "c2kd, every sample": ("c2kd", {"agreement": -1.0, "direct_weight": 1.0}),
    "cmapkd, everything": ("cmapkd", {**CMAPKD_EXACT, "weighting": "gate"}),
    "cmapkd, selected by a policy": ("cmapkd", {**CMAPKD_EXACT, "weighting": POLICY}),
    "clip_kd, everything": ("clip_kd", CLIP_KD_IN_FULL),
    "clip_rd, lent hints": ("clip_rd", LENT),
    "clip_kd, everything in micro-batches": ("clip_kd", CLIP_KD_IN_FULL),
    "clip_rd, lent hints in micro-batches": ("clip_rd", LENT),
    "clip_kd, weighted terms": ("clip_kd", {"term_weighting": "uncertainty"}),
    "clip_kd, some without captions": ("clip_kd", {}),
    "hinton, classes": ("hinton", {"form": "classes"}),
    "hinton, the teacher's classes in micro-batches": ("hinton", {"form": "classes", "class_vectors": "teacher"}),
    "clip_kd, balanced terms": ("clip_kd", {"term_weighting": GRADNORM}),
    "clip_kd, balanced terms in micro-batches": ("clip_kd", {"term_weighting": GRADNORM}),
    **{f"{name}, in micro-batches": (name, {}) for name in DUAL},  # one process: the whole batch at once
    "promptkd, in micro-batches": ("promptkd", {"distill_weight": 5.0}),
    "mobileclip, two teachers": ("mobileclip", {"synthetic": True}),
    "mobileclip, two teachers in micro-batches": ("mobileclip", {"synthetic": True}),
    "radio, two teachers": ("radio", {}),
    "tinyclip, with masks": ("tinyclip", MASKED),
    "tinyclip, with masks in micro-batches": ("tinyclip", MASKED),
    "tinyclip, units by lot": ("tinyclip", {"masks": {"sparsity": [0.5], "choice": "random"}}),
    **{name: (name, {}) for name in CLASSIFYING if name != "supervised"},
    "dho, in micro-batches": ("dho", {}),
    "mst_distill, routes by lot": ("mst_distill", {"routing": "random"}),
    "tipsv2, masked cells in micro-batches": ("tipsv2", {"mask_ratio": 0.5, "cells": "masked"}),
    "contracted": (Contracted, {}),
    "contracted, in micro-batches": (Contracted, {}),
    "cmapkd, everything in micro-batches": ("cmapkd", {**CMAPKD_EXACT, "weighting": "attention"}),
}
IN_MICRO_BATCHES = tuple(name for name in CASES if name.endswith("in micro-batches"))
# Methods leave it to the code that they share how many processes there are, and in which type these exchange rows; a
# test below holds that. So float32, and four processes, are tried with one case of each kind of row and of exchange.
KINDS = (
    "contrastive",
    "promptkd",  # a batch norm over all rows
    "clip_kd, everything",  # levels, a bank
    "cmapkd, everything",
    "cmapkd, selected by a policy",  # losses of each sample
    "clip_kd, balanced terms",  # norms of gradients
    "degla",  # further texts, a momentum teacher
    "zscl",  # streams, labels
    "mobileclip, two teachers",
    "tinyclip, with masks",
    "dho",
    "contracted",  # sums with a count
)
DTYPES_OF = {name: [*DTYPES.values()] if name in KINDS else [torch.float64] for name in CASES}
# rows of losses are shared out behind the encoders, to which micro-batches belong: one case has both
WITH_LOCAL = (*(name for name in CASES if name not in IN_MICRO_BATCHES), "cmapkd, everything in micro-batches")
# two pairs of each process are encoded at once: one case shows that this is the whole batch as well
OF_FOUR = (*KINDS, "cmapkd, everything in micro-batches")
SHARDED_CASES = (
    "contracted",
    *SHARDED_METHODS,
    *(f"{name}{MICRO}" for name in WITH_STATE),
    "cmapkd, everything",
)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def part_of(batch: Batch, rank: int) -> Batch:
    start, stop = rank * len(batch) // world_size(), (rank + 1) * len(batch) // world_size()
    return batch.part(start, stop)


def rows(seed: int) -> Tensor:
    return torch.randn(BATCH, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gather_loss(image: Tensor, text: Tensor) -> Tensor:
    """Some function in which every row meets every other, and two that are added have one gradient in common."""
    return ((image @ text.T).tanh() * torch.arange(1.0, BATCH + 1, dtype=image.dtype)).sum() + (image + text).sum()


def summed(terms: dict[str, Term]) -> Tensor:
    return torch.stack([term.weight * term.value for term in terms.values()]).sum()


def losses_and_gradients(name: str, dtype: torch.dtype, rank: int | None, how: str = "") -> dict[str, Tensor]:
    """Every term and every parameter's gradient, of the whole batch (rank None) or wrapped, of a part of it.

    Args:
        how: of several processes; "" wrapped as the trainer does by default, or `LOCAL`, `SHARDED`, `SHARED_TEACHER`.
    """
    kind, settings = CASES[name]
    rich = "two teachers" in name
    more_teachers = [second_teacher()] if rich else []
    unpaired = UnpairedPictures(("reference",), 2.0) if "without captions" in name else None
    method = make_method(kind, settings=settings, more_teachers=more_teachers, unpaired=unpaired).to(dtype).train()
    for teacher in method.teachers.values():
        teacher.model.to(dtype)
    if "with masks" in name:
        into_first_stage(method)
    earlier, batch = (
        random_batch(BATCH, seed=seed, dtype=dtype, rich=rich, pools=method.text_pools, views=method.more_views)
        for seed in (1, 0)
    )
    earlier = replace(earlier, ids=tuple(f"earlier{i}" for i in range(BATCH)))  # fills a bank, if there is one
    sharded, averaged = None, None
    if rank is None:
        method(earlier)
        terms = method(batch)
    else:
        method.micro_batch = MICRO_BATCH if name.endswith("in micro-batches") else None
        method.local_loss = how == LOCAL
        if how in (SHARDED, SHARED_TEACHER):
            sharded = ShardedMethod(method, device=torch.device("cpu"), teachers=how == SHARED_TEACHER, ema=None)
            wrapped: Any = sharded
            with torch.no_grad():
                method(part_of(earlier, rank))
        else:
            wrapped = averaged = AveragedGradients(method, torch.device("cpu"))
            summed(wrapped(part_of(earlier, rank))).backward()
            averaged.after_backward()
            assert averaged.searches == (world_size() > TWO or not method.steady)
            method.zero_grad()
        terms = wrapped(part_of(batch, rank))
    summed(terms).backward()
    if sharded is not None:
        sharded.average_gradients()
    if averaged is not None:
        averaged.after_backward()
        averaged.close()
    gradients = {key: parameter.grad for key, parameter in method.named_parameters() if parameter.grad is not None}
    values = {f"term/{key}": term.value.detach() for key, term in terms.items()}
    values |= {f"gradient/{key}": value for key, value in whole_tensors(gradients).items()}
    return {f"{name}{how}/{dtype}/{key}": value for key, value in values.items()}


def with_heads(rank: int | None) -> dict[str, Tensor]:
    """Likewise of the heads that learn with a student, where the processes have unequal shares of what they learn."""
    source = open_source("scenes?length=40&size=32")
    shares = {"rank": rank, "world_size": world_size()} if rank is not None else {}
    plan = PlanSampler(40, batch_size=BATCH, seed=0, start=0, stop=1, **shares).plan(0)
    values: dict[str, Tensor] = {}
    for case, lacking in (("few", plan.everyone[1:5]), ("none for one", plan.everyone[4:]), ("none", plan.everyone)):
        torch.manual_seed(0)
        student = build_model("tiny:debug", captions=vocabulary_captions(source))
        asked = HeadsConfig.model_validate({"vqa": 1.0, "captioning": 0.5, "detection": 2.0})
        heads = partial(build_heads, asked, source=source, template="a {}", seed=0)
        method = build_method(
            METHODS["contrastive"].Config(name="contrastive"),
            student=student,
            teacher=None,
            auxiliary=lambda model, heads=heads: heads(student=model),
        )
        partly = Partly(source, lacking)
        builder = BatchBuilder(partly, ViewSpec(), readers(student, None), seed=0, extras=method.extras)
        learner: torch.nn.Module = method
        if rank is not None:
            learner = torch.nn.parallel.DistributedDataParallel(method, find_unused_parameters=True)
        terms = learner(builder[plan])
        torch.stack([term.weight * term.value for term in terms.values()]).sum().backward()
        values |= {f"heads/{case}/{key}": term.value.detach() for key, term in terms.items()}
        values |= {f"heads/{case}/{key}": value.clone() for key, value in method.measurements.items()}
        values |= {f"heads/{case}/{key}": p.grad for key, p in method.named_parameters() if p.grad is not None}
    return values


def gathered_gradient(rank: int) -> dict[str, Tensor]:
    share = BATCH // world_size()
    image, text = (rows(seed)[rank * share : (rank + 1) * share].clone().requires_grad_() for seed in (1, 2))
    whole = gather_features(Features(TowerFeatures(image), TowerFeatures(text), torch.tensor(1.0)))
    loss = gather_loss(whole.image.embedding, whole.text.embedding)
    loss.backward()
    assert image.grad is not None
    assert text.grad is not None
    return {"gather/loss": loss.detach(), "gather/image": image.grad, "gather/text": text.grad}


def answered_from_cache(method: Method, source: Any, out: Path) -> dict[str, Any]:
    """Every process fills the same cache, and reads its own rows."""
    views = ViewSpec(crop_scale=(0.6, 1.0), flip=0.5, num_views=1)
    config = CacheConfig(folder=out.with_name(f"{out.name} (cache)"), store="fp32", batch_size=8, shard_mib=0.001)
    keys = all_keys(len(source), 1)
    plan = CachePlan.of_method(config, method, source=source, views=views, keys=keys, precision="fp32")
    plan.build(device="cpu")
    reader = plan.open()
    method.teacher = plan.cached_teacher(reader, make_model)
    return {"views": views, "stored": {"teacher": reader}}


def trained(name: str, out: Path) -> dict[str, Tensor]:
    """Weights and optimizer of a run of a few steps, on data with bad samples; resumed once on the way."""
    source = MemorySource(40, bad=(3, 17))
    optim = {"schedule": "constant", "eps": 1e-2}  # with a small one AdamW makes large steps of rounding errors
    sharded = name.endswith(SHARDED) and dist.is_initialized()
    kind, settings = CASES[name.removesuffix(CACHED).removesuffix(SHARDED).removesuffix(MICRO)]

    def trainer(**options: Any) -> Trainer:
        method = make_method(kind, settings=settings)
        options |= {"sharding": "fsdp2"} if sharded else {}
        if name.endswith(CACHED):
            options["builder"] = answered_from_cache(method, source, out)
        if MICRO in name and dist.is_initialized():
            options["micro_batch"] = MICRO_BATCH
        return make_trainer(out, method, source=source, optim=optim, **options)

    trainer(steps=6, checkpoint_every=3).run()
    again = trainer(steps=8)
    result = again.run(resume=True)
    ledger = result.ledger
    state = learned(again)
    state |= {"ledger": torch.tensor([ledger.num_good, ledger.num_bad])}
    return {f"trained/{name}/{key}": value for key, value in state.items()}


def learned(done: Trainer) -> dict[str, Tensor]:
    """Everything that a checkpoint would hold now."""
    return {
        f"{group}/{key}": value.clone() for group, held in done.learned_state().items() for key, value in held.items()
    }


# Runs that go on with another number of processes: what each does is a pure function of the folder.
STEPS, CUT = 12, 7  # five steps an epoch: cut in the middle of the second one, and of the second stage
GOES_ON = {"1 to 2": (1, 2), "2 to 1": (2, 1), "2 to 4": (2, 4)}
GOES_ON |= {f"1 to 2{SHARDED}": (1, 2), f"2{SHARDED} to 1": (2, 1), f"2{SHARDED} to 4{SHARDED}": (2, 4)}
STAGES = [{"name": "a", "steps": 4, "terms": ["contrastive", "bank", "visual"]}, {"name": "b", "steps": 8}]


class _PowerCut(Exception):
    pass


def write_shards(folder: Path) -> Source:
    """Three tars, some of whose pictures cannot be read."""
    folder.mkdir()
    source = MemorySource(40)
    for shard in range(3):
        members: list[tuple[str, bytes]] = []
        for number in range(shard, len(source), 3):
            sample = source[number]
            picture = encode(sample.image) if number not in (3, 17) else b"\x89PNG, and no more of it"
            members += [(f"{number:04d}.png", picture), (f"{number:04d}.txt", sample.captions[0].encode())]
        write_tar(folder / f"{shard:04d}.tar", members)
    return ShardSource(str(folder / "*.tar"))


def changing(out: Path, source: Source, sharding: str = "none") -> Trainer:
    """A run with everything that has a state: stages, a policy, a bank, an average, workers, shards, a best score."""
    method = make_method("cmapkd", settings={**CMAPKD_EXACT, "weighting": POLICY})
    optim = {"schedule": "constant", "eps": 1e-2}
    options: dict[str, Any] = {"stages": STAGES, "workers": 2, "ema": 0.8, "evaluate_every": 3, "validate": score}
    trainer: Trainer = make_trainer(
        out, method, source=source, steps=None, optim=optim, checkpoint_every=CUT, sharding=sharding, **options
    )
    return trainer


def score(student: DualEncoder) -> dict[str, float]:
    """Some number of the weights."""
    return {"score": float(sum(parameter.detach().abs().sum() for parameter in student.parameters()))}


def cut(out: Path, source: Source, sharding: str) -> None:
    """Ends after a step without a checkpoint, as a power cut would."""
    running = changing(out, source, sharding)
    step = running._step

    def until(batch: Batch) -> Any:
        if running.progress.step == CUT + 1:
            raise _PowerCut
        return step(batch)

    running._step = until  # type: ignore[method-assign]
    try:
        running.run()
    except _PowerCut:
        return
    raise AssertionError("the run was not cut")


def go_on(out: Path, source: Source, sharding: str = "none", *, resume: bool = True) -> dict[str, Tensor]:
    """What the run ends with; of several processes the first has the student, too."""
    done = changing(out, source, sharding)
    result = done.run(resume=resume)
    found = {**learned(done), "ledger": torch.tensor([result.ledger.num_good, result.ledger.num_bad])}
    if done.accelerator.is_main_process:
        found |= {f"first/student/{key}": value.clone() for key, value in result.student.state_dict().items()}
        found |= {"first/best": torch.tensor([result.best_step or 0, result.best_score or 0.0])}
    return found


def changed(out: Path, rank: int, size: int) -> dict[str, Tensor]:
    """The part of a group of `size` processes in the runs that change their number."""
    source = ShardSource(str(out / "shards" / "*.tar"))
    found: dict[str, Tensor] = {}
    for case, (_, later) in GOES_ON.items():
        if later == size > 1:
            ended = go_on(out / case, source, "fsdp2" if case.endswith(SHARDED) else "none")
            found |= {f"changed/{case}/{key}": value for key, value in ended.items()}
    for how in {1: ("none",), TWO: ("none", "fsdp2")}.get(size, ()):
        folder = out / f"{size} in {how}"
        cut(folder, source, how)
        for case, (before, _) in GOES_ON.items():
            if before == size and case.startswith(f"{size}{SHARDED}") == (how == "fsdp2") and rank == 0:
                shutil.copytree(folder, out / case)
    return found


def of_two(out: Path, rank: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in TRAINED:  # the trainer starts the process group itself
        found |= trained(name, out / name)
    for name in CASES:
        for dtype in DTYPES_OF[name]:
            found |= losses_and_gradients(name, dtype, rank)
    for name in WITH_LOCAL:
        found |= losses_and_gradients(name, torch.float64, rank, LOCAL)
    for name in SHARDED_CASES:
        found |= losses_and_gradients(name, torch.float64, rank, SHARDED)
    for name in WITH_LEVELS:
        found |= losses_and_gradients(name, torch.float64, rank, SHARED_TEACHER)
    return (
        found
        | gathered_gradient(rank)
        | with_heads(rank)
        | agreed(rank)
        | counted(rank)
        | statistics(out / "statistics")
        | unsteady(out / "unsteady")
        | answered()
    )


def answered() -> dict[str, Tensor]:
    """A teacher's answers to all training samples, two of which cannot be read; 8 batches, 2 of 5 in the last round."""
    survey = survey_of(make_method("hinton", settings={"form": "classes"}), source=MemorySource(37, bad=(3, 17)))
    found = Answered.joined(survey())
    return {f"answered/{name}": getattr(found, name) for name in ("image", "text", "keys", "labels")}


def counted(rank: int) -> dict[str, Tensor]:
    """A term of which one process has nothing, and no graph either: the others must not wait for it."""
    weights = torch.ones(3, requires_grad=True)
    own = Term((weights * 2).sum(), 1.0, torch.tensor(3)) if rank == 0 else Term(torch.zeros(()), 1.0, torch.tensor(0))
    value = divided({"counted": own})["counted"].value
    value.backward()
    gradient = torch.zeros(3) if weights.grad is None else weights.grad
    return {"counted/value": value.detach(), "counted/gradient": gradient}


def agreed(rank: int) -> dict[str, Tensor]:
    """What each of four steps answers when the first process is asked to stop in the second."""
    agreement = Agreement()
    answers = [agreement.stop(rank == 0 and step == 1) for step in range(4)]
    agreement.close()
    return {"agreed": torch.tensor(answers)}


def statistics(out: Path) -> dict[str, Tensor]:
    """Every buffer of a method with batch norms, a bank and a momentum teacher after some steps."""
    student = make_model(kind=NormedStudent)
    found: dict[str, Tensor] = {}
    for kind in ("cmapkd", Contracted):
        done = make_trainer(out, make_method(kind, student=student), source=MemorySource(40), steps=3)
        done.run()
        name = kind if isinstance(kind, str) else "contracted"
        found |= {f"buffers/{name}/{key}": value.clone() for key, value in done.method.named_buffers()}
    return found


def patience(rank: int, out: Path) -> dict[str, Tensor]:
    """Whether a process waits for one that is busy for longer than collectives may take, and whether these do."""
    dist.destroy_process_group()
    store = f"file://{out / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=TWO, timeout=timedelta(seconds=1))
    prepare_to_wait()
    if rank == 0:
        time.sleep(2)
    wait_for_all()
    if rank == 0:
        time.sleep(2)
    try:
        dist.barrier()
    except RuntimeError:
        return {"patience/barrier failed": torch.ones(1)}
    return {"patience/barrier failed": torch.zeros(1)}


def rounded_gradient(rank: int) -> dict[str, Tensor]:
    """Of a bf16 row to which one process gives a gradient of 256 and three give 1: in bf16, 256 + 1 is 256."""
    row = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    (gather_rows(row).sum() * (1.0 if rank else 256.0)).backward()
    assert row.grad is not None
    found = {"gather/bf16": row.grad}
    for dtype in (torch.bfloat16, torch.float32):
        row = torch.zeros(5, 7, dtype=dtype, requires_grad=True)
        (gather_rows(row) * asked_by(rank, dtype)).sum().backward()
        assert row.grad is not None
        found[f"gather/random/{dtype}"] = row.grad
    return found


def asked_by(rank: int, dtype: torch.dtype) -> Tensor:
    """The gradient that one of four processes asks of all their rows."""
    return torch.randn(4 * 5, 7, generator=torch.Generator().manual_seed(rank)).to(dtype)


class Unsteady(METHODS["contrastive"]):  # type: ignore[misc]
    """A method that says it is steady, and reads a module in every second step alone."""

    steady = True

    def __init__(self, *arguments: Any, **models: Any) -> None:
        super().__init__(*arguments, **models)
        self.sometimes = torch.nn.Linear(1, 1)

    def terms(self, batch: Batch) -> dict[str, Term]:
        terms: dict[str, Term] = super().terms(batch)
        odd = bool(self.step.step % 2)
        return terms | ({"more": Term(self.sometimes(torch.ones(1, 1)).sum())} if odd else {})


def unsteady(out: Path) -> dict[str, Tensor]:
    """The message, in numbers, as what processes leave are tensors."""
    try:
        make_trainer(out, make_method(Unsteady), source=MemorySource(40), steps=4).run()
    except RuntimeError as error:
        return {"unsteady": torch.tensor([*str(error).encode()])}
    raise AssertionError("it went on")


def of_four(_out: Path, rank: int) -> dict[str, Tensor]:
    found = rounded_gradient(rank)
    for name in OF_FOUR:
        found |= losses_and_gradients(name, torch.float64, rank)
    return found


def work(rank: int, size: int, port: int, out: Path) -> None:
    if size > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    found = changed(out, rank, size)
    assert world_size() == size
    if size > 1:
        found |= of_two(out, rank) if size == TWO else of_four(out, rank)
        dist.barrier()
        found |= patience(rank, out) if size == TWO else {}
        torch.save(found, out / f"rank-{rank}-of-{size}.pt")


def main(out: Path) -> None:
    torch.optim.AdamW([torch.zeros(1)])  # imports half of torch: once, before the fork
    write_shards(out / "shards")
    gc.freeze()  # each run of the children looks for circles, and need not look here
    context = get_context("fork")
    for size in (1, TWO, FOUR):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [context.Process(target=work, args=(rank, size, port, out)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            sys.exit(f"a process of {size} failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
