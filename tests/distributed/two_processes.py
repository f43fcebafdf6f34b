"""What each of two processes does for `test_two_processes.py`; a script, so that importing torch is paid once."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import get_context

sys.path.insert(0, str(Path(__file__).parents[1]))
from cmapkd.cache import CacheConfig, CachePlan, all_keys
from cmapkd.data.batches import BatchBuilder, PlanSampler
from cmapkd.data.open import open_source
from cmapkd.data.types import Batch
from cmapkd.data.views import ViewSpec
from cmapkd.evaluation.probes.config import HeadsConfig
from cmapkd.evaluation.probes.joint import build_heads
from cmapkd.features import gather_features
from cmapkd.methods import METHODS, Method, build_method
from cmapkd.models import Features, TowerFeatures, build_model
from cmapkd.run import readers, vocabulary_captions
from cmapkd.training import Trainer
from cmapkd.training.checkpoint import optimizer_tensors
from helpers import (
    CLIP_KD_IN_FULL,
    CMAPKD_IN_FULL,
    GRADNORM,
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

WORLD_SIZE = 2
BATCH = 8
DTYPES = {"float32": torch.float32, "float64": torch.float64}
CACHED = ", from a cache"
MICRO_BATCH = 3  # of each process's four pairs
MICRO = ", in micro-batches"
TRAINED = (
    "contrastive",
    "clip_kd",
    "clip_kd, balanced terms",
    "cmapkd, selected by a policy",
    f"clip_kd{CACHED}",
    "tinyclip, with masks",
    "tinyclip, units by lot",
    f"cmapkd{MICRO}",
    f"clip_kd{MICRO}{CACHED}",
)
POLICY = {"name": "policy", "warmup_steps": 2, "window": 2, "edge": 1}
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # name: (method, settings); every method as it comes, and more
    **{name: (name, {}) for name in METHODS},
    "promptkd": ("promptkd", {"distill_weight": 5.0}),  # by default 1000, for more than the 5 classes here
    "c2kd, every sample": ("c2kd", {"agreement": -1.0, "direct_weight": 1.0}),
    "cmapkd, everything": ("cmapkd", {**CMAPKD_IN_FULL, "weighting": "gate"}),
    "cmapkd, selected by a policy": ("cmapkd", {**CMAPKD_IN_FULL, "weighting": POLICY}),
    "clip_kd, everything": ("clip_kd", CLIP_KD_IN_FULL),
    "clip_kd, everything in micro-batches": ("clip_kd", CLIP_KD_IN_FULL),
    "clip_kd, weighted terms": ("clip_kd", {"term_weighting": "uncertainty"}),
    "hinton, classes": ("hinton", {"form": "classes"}),
    "hinton, the teacher's classes in micro-batches": ("hinton", {"form": "classes", "class_vectors": "teacher"}),
    "clip_kd, balanced terms": ("clip_kd", {"term_weighting": GRADNORM}),
    "clip_kd, balanced terms in micro-batches": ("clip_kd", {"term_weighting": GRADNORM}),
    **{f"{name}, in micro-batches": (name, {}) for name in METHODS},  # one process: the whole batch at once
    "promptkd, in micro-batches": ("promptkd", {"distill_weight": 5.0}),
    "mobileclip, two teachers": ("mobileclip", {"synthetic": True}),
    "mobileclip, two teachers in micro-batches": ("mobileclip", {"synthetic": True}),
    "tinyclip, with masks": ("tinyclip", MASKED),
    "tinyclip, with masks in micro-batches": ("tinyclip", MASKED),
    "tinyclip, units by lot": ("tinyclip", {"masks": {"sparsity": [0.5], "choice": "random"}}),
    "cmapkd, everything in micro-batches": ("cmapkd", {**CMAPKD_IN_FULL, "weighting": "gate"}),
}


def part_of(batch: Batch, rank: int) -> Batch:
    start, stop = rank * len(batch) // WORLD_SIZE, (rank + 1) * len(batch) // WORLD_SIZE
    extra = {name: values[start:stop] for name, values in batch.extra.items()}
    return replace(batch.part(start, stop), extra=extra)


def rows(seed: int) -> Tensor:
    return torch.randn(BATCH, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gather_loss(image: Tensor, text: Tensor) -> Tensor:
    """Some function in which every row meets every other."""
    return ((image @ text.T).tanh() * torch.arange(1.0, BATCH + 1, dtype=image.dtype)).sum()


def losses_and_gradients(name: str, dtype: torch.dtype, rank: int | None) -> dict[str, Tensor]:
    """Every term and every parameter's gradient, of the whole batch (rank None) or wrapped, of a part of it."""
    kind, settings = CASES[name]
    rich = "two teachers" in name
    more_teachers = [second_teacher()] if rich else []
    method = make_method(kind, settings=settings, more_teachers=more_teachers).to(dtype).train()
    for teacher in method.teachers.values():
        teacher.model.to(dtype)
    if "with masks" in name:
        into_first_stage(method)
    earlier, batch = random_batch(BATCH, seed=1, dtype=dtype, rich=rich), random_batch(BATCH, dtype=dtype, rich=rich)
    earlier = replace(earlier, ids=tuple(f"earlier{i}" for i in range(BATCH)))  # fills a bank, if there is one
    if rank is None:
        method(earlier)
        terms = method(batch)
    else:
        method.micro_batch = MICRO_BATCH if name.endswith("in micro-batches") else None
        wrapped = torch.nn.parallel.DistributedDataParallel(method, find_unused_parameters=True)
        with torch.no_grad():
            method(part_of(earlier, rank))
        terms = wrapped(part_of(batch, rank))
    torch.stack([term.weight * term.value for term in terms.values()]).sum().backward()
    values = {f"{name}/{dtype}/term/{key}": term.value.detach() for key, term in terms.items()}
    gradients = {
        f"{name}/{dtype}/gradient/{key}": parameter.grad
        for key, parameter in method.named_parameters()
        if parameter.grad is not None
    }
    return values | gradients


def with_heads(rank: int | None) -> dict[str, Tensor]:
    """Likewise of the heads that learn with a student, where the processes have unequal shares of what they learn."""
    source = open_source("scenes?length=40&size=32")
    shares = {"rank": rank, "world_size": WORLD_SIZE} if rank is not None else {}
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
            beside=lambda model, heads=heads: heads(student=model),
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
    share = BATCH // WORLD_SIZE
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
    kind, settings = CASES[name.removesuffix(CACHED).removesuffix(MICRO)]

    def trainer(**options: Any) -> Trainer:
        method = make_method(kind, settings=settings)
        if name.endswith(CACHED):
            options["builder"] = answered_from_cache(method, source, out)
        if MICRO in name and dist.is_initialized():
            options["micro_batch"] = MICRO_BATCH
        return make_trainer(out, method, source=source, optim=optim, **options)

    trainer(steps=6, checkpoint_every=3).run()
    again = trainer(steps=8)
    result = again.run(resume=True)
    ledger = result.ledger
    state = {f"trained/{name}/{key}": value.clone() for key, value in again.method.state_dict().items()}
    state |= {f"optimizer/{name}/{key}": value for key, value in optimizer_tensors(again.optimizer).items()}
    return state | {f"ledger/{name}": torch.tensor([ledger.num_good, ledger.num_bad])}


def work(rank: int, port: int, out: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD_SIZE),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    found: dict[str, Tensor] = {}
    for name in TRAINED:  # the trainer starts the process group itself
        found |= trained(name, out / name)
    assert dist.get_world_size() == WORLD_SIZE
    for name in CASES:
        for dtype in DTYPES.values():
            found |= losses_and_gradients(name, dtype, rank)
    found |= gathered_gradient(rank) | with_heads(rank)
    torch.save(found, out / f"rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main(out: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.optim.AdamW([torch.zeros(1)])  # imports half of torch: once, before the fork
    context = get_context("fork")
    processes = [context.Process(target=work, args=(rank, port, out)) for rank in range(WORLD_SIZE)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in processes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
