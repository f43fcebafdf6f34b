"""What an evaluation takes of each process: `python benchmarks/evaluating.py --json out.json`.

One, two and four processes score the same model on the same scenes: retrieval and zero-shot, or with `--model
tiny_vlm:small` answers and likelihoods. Counted is the CPU time of the busiest process, from the first batch to the
scores: on a machine with a core for each that is the time that passes. Rounds are in turns, and the scores of all must
be equal, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import get_context

from cmapkd.data.open import open_source
from cmapkd.evaluation import EvaluationConfig, evaluate
from cmapkd.evaluation.config import WritingConfig
from cmapkd.evaluation.run import assist
from cmapkd.evaluation.share import ALONE, Share
from cmapkd.models import build_model
from cmapkd.run import vocabulary_captions
from cmapkd.training.processes import patient_group, start_processes
from retrieval import processor

SIZES = (1, 2, 4)
BATCH = 32
CONFIGS = {
    "tiny:base": EvaluationConfig(batch_size=BATCH),
    "tiny_vlm:small": EvaluationConfig(tasks=("answering", "perplexity"), writing=WritingConfig(batch_size=BATCH)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", choices=CONFIGS, default="tiny:base")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    context = get_context("fork")
    taken: dict[int, list[float]] = {size: [] for size in SIZES}
    scores = set()
    for _ in range(arguments.rounds):
        for size in SIZES:
            answers: Any = context.SimpleQueue()
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            processes = [
                context.Process(target=work, args=(rank, size, port, arguments.model, arguments.samples, answers))
                for rank in range(size)
            ]
            for process in processes:
                process.start()
            given = [answers.get() for _ in range(size)]
            for process in processes:
                process.join()
            taken[size].append(max(seconds for seconds, _ in given))
            scores |= {found for _, found in given if found}
    medians = {f"{size}": statistics.median(taken[size]) for size in SIZES}
    found = {
        "torch": torch.__version__,
        "processor": processor(),
        "model": arguments.model,
        "samples": arguments.samples,
        "rounds": arguments.rounds,
        "different_scores": len(scores),
        "seconds": {size: round(each, 3) for size, each in medians.items()},
        "ratio": {size: round(each / medians["1"], 3) for size, each in medians.items()},
    }
    arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


def work(rank: int, size: int, port: int, name: str, samples: int, answers: Any) -> None:
    torch.set_num_threads(1)
    share = ALONE
    if size > 1:
        os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{size}"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
        start_processes(on_cpu=True)
        share = Share(rank, size, patient_group())
    torch.manual_seed(0)
    model = build_model(name, captions=vocabulary_captions(open_source("scenes?length=500")))
    source, config = open_source(f"scenes@val?length={samples}"), CONFIGS[name]
    began = time.process_time()
    if share.leads:
        found = json.dumps(evaluate(model, source, config, device="cpu", share=share), sort_keys=True)
    else:
        assist(model, source, config, device="cpu", share=share)
        found = ""
    answers.put((time.process_time() - began, found))


if __name__ == "__main__":
    main()
