"""What each process of a group of one to four computes of in-batch losses for `test_loss_processes.py`.

Every process holds its share of the embeddings of a batch. Weights that all of them have multiply these, as a model's
would, so that gradients are those that a wrapper would average.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import get_context

sys.path.insert(0, str(Path(__file__).parents[1]))

from cmapkd.features import gather_rows, own_place, pass_on
from cmapkd.methods import contrastive
from cmapkd.methods.dual import task_loss
from cmapkd.methods.sigmoid_ring import ring_sigmoid_loss
from cmapkd.models import Features, TowerFeatures
from cmapkd.objectives import contrastive_loss, interactive_loss, sigmoid_loss, similarity_divergence
from cmapkd.objectives.chunks import split_rows
from helpers import make_method, make_model, random_batch

SIZES = (2, 3, 4)
BATCH, WIDTH = 12, 6
PICTURES = torch.tensor([0, 1, 0, 2, 3, 3, 3, 4, 5, 6, 1, 7])
LOSSES: dict[str, Callable[..., Tensor]] = {  # of four [batch, dim] tensors and the scale, some rows at a time
    "contrastive": lambda a, b, c, d, s, **x: contrastive_loss(a, b, logit_scale=s, **x),
    "contrastive, several positives": lambda a, b, c, d, s, **x: contrastive_loss(
        a, b, logit_scale=s, pictures=PICTURES, **x
    ),
    "interactive": lambda a, b, c, d, s, **x: interactive_loss(a, b, c, d, logit_scale=s, **x),
    "similarity": lambda a, b, c, d, s, **x: similarity_divergence(
        a, b, c, d, student_scale=s, teacher_scale=9.0, temperature=2.0, **x
    ),
}


def parameters() -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(1)
    made = {name: torch.randn(WIDTH, WIDTH, generator=draws, dtype=torch.float64) for name in ("image", "text")}
    made |= {"scale": torch.tensor(7.0, dtype=torch.float64), "bias": torch.tensor(-3.0, dtype=torch.float64)}
    return {name: value.requires_grad_() for name, value in made.items()}


def inputs() -> list[Tensor]:
    draws = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, WIDTH, generator=draws, dtype=torch.float64) for _ in range(4)]


def mine(rows: Tensor) -> Tensor:
    rank, size = own_place()
    return rows[rank * BATCH // size : (rank + 1) * BATCH // size]


def averaged(name: str, value: Tensor, learned: dict[str, Tensor]) -> dict[str, Tensor]:
    """The value, and gradients as the wrapper makes them."""
    (3.0 * value).backward()
    found = {f"{name}/value": value.detach()}
    for key, parameter in learned.items():
        if parameter.grad is not None:
            total = parameter.grad.clone()
            if own_place()[1] > 1:
                dist.all_reduce(total)
            found[f"{name}/gradient/{key}"] = total / own_place()[1]
    return found


def in_batch(name: str, *, split: bool, chunk: int | None) -> dict[str, Tensor]:
    """One of `LOSSES`, of gathered embeddings; each process its own rows, or every process all."""
    learned, given = parameters(), [mine(rows) for rows in inputs()]
    rows = [gather_rows(given[0] @ learned["image"]), gather_rows(given[1] @ learned["text"])]
    rows += [gather_rows(each) for each in given[2:]]
    if not split:
        return averaged(name, LOSSES[name](*rows, learned["scale"], chunk=chunk), learned)
    rank, size = own_place()
    with split_rows(rank, size, gather_rows):
        value = LOSSES[name](*rows, learned["scale"], chunk=chunk)
    return averaged(name, value, learned)


def sigmoid(pictures: Tensor | None, *, ring: bool) -> dict[str, Tensor]:
    """SigLIP's loss, in a ring or of gathered embeddings."""
    learned, given = parameters(), [mine(rows) for rows in inputs()]
    image, text = given[0] @ learned["image"], given[1] @ learned["text"]
    name = "sigmoid" if pictures is None else "sigmoid, several positives"
    if ring:
        own = Features(TowerFeatures(image), TowerFeatures(text), learned["scale"], learned["bias"])
        return averaged(name, ring_sigmoid_loss(own, pictures), learned)
    scales = {"logit_scale": learned["scale"], "logit_bias": learned["bias"]}
    value = sigmoid_loss(gather_rows(image), gather_rows(text), **scales, pictures=pictures)
    return averaged(name, value, learned)


def refused(_: Features) -> Tensor:
    raise AssertionError("the loss was computed of gathered embeddings")


def student() -> Any:
    base = type(make_model())

    class WithBias(base):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.bias = torch.nn.Parameter(torch.tensor(-5.0))

        @property
        def logit_bias(self) -> Tensor:
            return self.bias

        @property
        def parts(self) -> dict[str, frozenset[str]]:
            parts = dict(super().parts)
            return {**parts, "scale": parts["scale"] | {"bias"}}

    return make_model(kind=WithBias)


def of_method(micro_batch: int | None, *, local_loss: bool) -> dict[str, Tensor]:
    """`contrastive` with a student that has a bias."""
    method = make_method("contrastive", student=student()).double().train()
    method.micro_batch, method.local_loss = micro_batch, local_loss
    # with its own rows alone a process needs no gathered ones: that form must not be taken then
    contrastive.task_loss = refused if local_loss and own_place()[1] > 1 else task_loss
    rank, size = own_place()
    batch = random_batch(BATCH, dtype=torch.float64).part(rank * BATCH // size, (rank + 1) * BATCH // size)
    name = "method" if micro_batch is None else "method, in micro-batches"
    return averaged(name, method(batch)["contrastive"].value, dict(method.named_parameters()))


def everything(*, local: bool) -> dict[str, Tensor]:
    """By several processes each its share, or by one all of it, in the form that has all logits at once."""
    found: dict[str, Tensor] = {}
    for name in LOSSES:
        found |= in_batch(name, split=local, chunk=2 if local else None)
    for pictures in (None, PICTURES):
        found |= sigmoid(pictures, ring=local)
    for micro_batch in (None, 2):
        found |= of_method(micro_batch if local else None, local_loss=local) if micro_batch is None or local else {}
    return found


def gathered(rank: int) -> dict[str, Tensor]:
    """What every process computes of all rows, and what the ring hands over."""
    found = {f"all/{key}": value for key, value in in_batch("contrastive", split=False, chunk=5).items()}
    found |= {f"all/{key}": value for key, value in sigmoid(None, ring=False).items()}
    return found | {"passed": pass_on(torch.full((2, 3), rank))()}


def work(rank: int, size: int, port: int, out: Path) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    torch.save(everything(local=True) | gathered(rank), out / f"rank-{rank}-of-{size}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main(out: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()
    context = get_context("fork")
    for size in SIZES:
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
    os.environ["OMP_NUM_THREADS"] = "1"
    main(Path(sys.argv[1]))
