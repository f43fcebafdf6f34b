"""What each of two processes does for `test_writing_processes.py`: methods over models that write, of half a batch."""

from __future__ import annotations

import gc
import os
import socket
import sys
import warnings
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import get_context

sys.path.insert(0, str(Path(__file__).parents[1]))

from cmapkd.methods import StepInfo
from cmapkd.training import Trainer
from cmapkd.training.processes import start_processes
from cmapkd.training.sharding import ShardedMethod, whole_tensors
from writers import Dialogues, batch_of, loss_of, make_other, make_run, make_seer, make_task

TWO, BATCH, STEP = 2, 8, StepInfo(3, 10, seed=11)
SHARDED = ", fsdp2"
MICRO = ", in micro-batches"
ON_POLICY = {"share": 0.5, "max_new_tokens": 5}
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # name: (method, settings)
    "sft": ("sft", {}),
    "sft, sample_mean": ("sft", {"reduction": "sample_mean"}),
    "token_kd": ("token_kd", {}),
    "token_kd, batch_sum": ("token_kd", {"reduction": "batch_sum", "divergence": "jsd"}),
    "token_kd, the likeliest": ("token_kd", {"top_k": 8}),
    "token_kd, two tokenizers": ("token_kd", {"alignment": "bytes"}),
    f"token_kd, two tokenizers, ranked{MICRO}": ("token_kd", {"alignment": "bytes", "compare": "ranked"}),
    "token_kd, balanced": ("token_kd", {"term_weighting": {"name": "gradnorm", "warmup_steps": 1, "every": 1}}),
    "on policy": ("token_kd", {"on_policy": ON_POLICY}),
    "sampled": ("token_kd", {"on_policy": ON_POLICY, "divergence": "sampled_reverse"}),
    "taid": ("taid", {"answers_weight": 1.0}),
    "llava_mod": ("llava_mod", {}),
    f"llava_mod{MICRO}": ("llava_mod", {"form": "dpo"}),
    f"switch_kd{MICRO}": ("switch_kd", {"reduction": "sample_mean"}),
    "llava_kd": ("llava_kd", {}),
    "align_kd": ("align_kd", {"focus": 2}),
    "masters": ("masters", {}),
    f"masters{MICRO}": ("masters", {}),
    f"specvlm{MICRO}": ("specvlm", {"reduction": "sample_mean"}),
    f"linearize{MICRO}": ("linearize", {"form": "matvlm"}),
    f"masking_kd{MICRO}": ("masking_kd", {"budget": 0.6}),
    f"vidlankd{MICRO}": ("vidlankd", {}),
    "move_kd": ("move_kd", {}),
    f"move_kd, three encoders{MICRO}": ("move_kd", {}),
    f"ola_vlm{MICRO}": ("ola_vlm", {"experts": {"teacher": {"target": 1.0}}}),
    f"token_kd{MICRO}": ("token_kd", {"divergence": "reverse"}),
    f"on policy{MICRO}": ("token_kd", {"on_policy": ON_POLICY}),
    f"token_kd{SHARDED}": ("token_kd", {}),
    f"taid{MICRO}{SHARDED}": ("taid", {}),
}
TRAINED = ("on policy", "taid")


def learned_from(name: str, rank: int | None) -> dict[str, Tensor]:
    """Terms and gradients of the whole batch (rank None), or of a part of it in a wrapped method."""
    kind, settings = CASES[name]
    more = [make_seer(dim=20, image_size=16, seed=seed, role=f"encoder{seed}") for seed in (3, 4)]
    options = {"more_teachers": more} if "three encoders" in name else {}
    method = make_task(kind, teacher=make_other() if "alignment" in settings else None, **options, **settings)
    batch = batch_of(method, range(BATCH))
    wrapped: Any = method
    if rank is not None:
        batch = batch.part(rank * BATCH // TWO, (rank + 1) * BATCH // TWO)
        method.micro_batch = 3 if MICRO in name else None
        if name.endswith(SHARDED):
            wrapped = ShardedMethod(method, device=torch.device("cpu"), teachers=False, ema=None)
        else:
            wrapped = torch.nn.parallel.DistributedDataParallel(method, find_unused_parameters=True)
    terms = wrapped(batch, STEP)
    loss_of(terms).backward()
    if isinstance(wrapped, ShardedMethod):
        wrapped.average_gradients()
    found = {f"gradient/{key}": each.grad for key, each in method.named_parameters() if each.grad is not None}
    values = {f"term/{key}": term.value.detach() for key, term in terms.items()}
    values |= {f"buffer/{key}": each.clone() for key, each in method.named_buffers() if key.count(".") == 0}
    values |= {f"log/{key}": each for key, each in method.measurements.items() if key != "rollouts/seconds"}
    return {f"{name}/{key}": value for key, value in (values | whole_tensors(found)).items()}


def trainer(name: str, out: Path, steps: int) -> Trainer:
    kind, settings = CASES[name]
    options = {"source": Dialogues(40, bad=(3, 17)), "batch_size": BATCH, "checkpoint_every": 2}
    return make_run(out, make_task(kind, **settings), steps=steps, **options)


def trained(name: str, out: Path, *, begun: bool = False) -> dict[str, Tensor]:
    """Weights and optimizer after a few steps on data with bad samples, resumed once on the way.

    Args:
        begun: the first steps are done, by another number of processes.
    """
    if not begun:
        trainer(name, out, 3).run()
    again = trainer(name, out, 5)
    again.run(resume=True)
    held = {f"{group}/{key}": each for group, states in again.learned_state().items() for key, each in states.items()}
    start = f"went on/{name}" if begun else f"trained/{name}"
    return {f"{start}/{key}": value.clone() for key, value in held.items()}


def begin(out: Path) -> None:
    """What one process does of the runs that two go on with."""
    warnings.simplefilter("ignore")
    for name in TRAINED:
        trainer(name, out / f"{name}, begun by one", 3).run()


def work(rank: int, port: int, out: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(TWO),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    warnings.simplefilter("ignore")
    start_processes(on_cpu=True)
    found: dict[str, Tensor] = {}
    for name in CASES:
        found |= learned_from(name, rank)
    for name in TRAINED:
        found |= trained(name, out / name)
        found |= trained(name, out / f"{name}, begun by one", begun=True)
    torch.save(found, out / f"rank-{rank}.pt")


def main(out: Path) -> None:
    torch.optim.AdamW([torch.zeros(1)])  # imports half of torch: once, before the fork
    make_task("token_kd")  # and transformers
    gc.freeze()  # each run of the children looks for circles, and need not look here
    context = get_context("fork")
    run_all([context.Process(target=begin, args=(out,))])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_all([context.Process(target=work, args=(rank, port, out)) for rank in range(TWO)])


def run_all(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit("a process failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
