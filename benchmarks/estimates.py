"""What CC12M and DataComp-1B would take on 8 and 64 GPUs, on paper: measured constants times sizes.

    uv run python benchmarks/estimates.py            # fails if docs/results/estimates.json is not what comes out
    uv run python benchmarks/estimates.py --write    # writes it

`MEASURED` names the file of docs/results and the place in it of every constant. They come from one CPU core, so an
estimate in CPU seconds is one of that core. `ASSUMED` is what nobody measured, `PUBLISHED` what others say of the data.
No GPU was measured: no line says how many pairs a GPU trains in a second. Rates are given for 1,000 pairs a second.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "docs" / "results"
FILE = RESULTS / "estimates.json"

MEASURED: dict[str, tuple[str, ...]] = {  # file and place
    "first_opening_us_a_pair": ("opening.json", "microseconds_per_sample", "files", "cold"),
    "later_opening_s": ("opening.json", "warm_seconds_of_files"),
    "later_opening_shards": ("opening.json", "settings", "shards"),
    "private_bytes_a_pair": ("opening.json", "private_bytes_per_sample", "files"),
    "handed_over_mib": ("hand_over.json", "mib", "uint8"),
    "handed_over_worker_ms": ("hand_over.json", "uint8", "worker"),
    "handed_over_main_ms": ("hand_over.json", "uint8", "main"),
    "handed_over_pictures": ("hand_over.json", "pictures"),
    "student_parameters": ("step_vit_l14_b16.json", "parameters", "student"),
    "products_of_losses": ("in_batch_losses.json", "losses", "all", "products", "tiles"),
    "checkpoint_s_a_gigabyte": ("checkpoint_seconds.json", "seconds_per_gigabyte", "write_cpu"),
    "row_bytes_fp16": ("cache.json", "vit_l14_rows", "0", "bytes_per_row"),
    "row_bytes_int8": ("cache.json", "vit_l14_rows", "1", "bytes_per_row"),
    "rows_a_core_and_second": ("cache.json", "vit_l14_rows", "0", "rows_read_per_second_and_core"),
}
ASSUMED = {
    "pairs_a_gpu_and_second": 1000,
    "gpus_a_node": 8,
    "width": 512,  # of the student's embeddings
    "teacher_gflop_a_pair": 175.3,  # ViT-L/14 at 224 pixels and 77 tokens, counted: tests/test_estimates.py
    "teacher_tflop_a_second": 400.0,  # that a GPU would reach
}


@dataclass(frozen=True)
class Case:
    """Data and a machine."""

    pairs: int
    shards: int
    picture_bytes: float  # of one picture with its texts, as published
    gpus: int
    batch: int


CASES = {
    "CC12M, 8 GPUs": Case(10_968_539, 1_243, 60e3, 8, 8_192),
    "CC12M, 64 GPUs": Case(10_968_539, 1_243, 60e3, 64, 32_768),
    "DataComp-1B, 8 GPUs": Case(1_400_000_000, 140_000, 47e3, 8, 8_192),
    "DataComp-1B, 64 GPUs": Case(1_400_000_000, 140_000, 47e3, 64, 32_768),
}


def constants() -> dict[str, float]:
    """The measured constants, read from their files."""

    def inner(holder: Any, key: str) -> Any:
        return holder[int(key)] if isinstance(holder, list) else holder[key]

    found = {}
    for name, (file, *places) in MEASURED.items():
        found[name] = reduce(inner, places, json.loads((RESULTS / file).read_text(encoding="utf-8")))
    return found


def estimated(case: Case, known: Mapping[str, float]) -> dict[str, float]:
    """Every line of the table, in the unit that its name says; MiB and GiB are 2^20 and 2^30 bytes."""
    rate, others = ASSUMED["pairs_a_gpu_and_second"], (case.gpus - 1) / case.gpus
    of_gpu, weights = case.batch / case.gpus, 4 * known["student_parameters"]
    handed_over = (known["handed_over_worker_ms"] + known["handed_over_main_ms"]) / known["handed_over_pictures"]
    checkpoint = 3 * weights / 1e9  # and AdamW's two averages
    teacher = case.pairs * ASSUMED["teacher_gflop_a_pair"] / 1e3 / ASSUMED["teacher_tflop_a_second"]
    lines = {
        "start: first opening, core hours": case.pairs * known["first_opening_us_a_pair"] / 1e6 / 3600,
        "start: later opening of a process, s": case.shards * known["later_opening_s"] / known["later_opening_shards"],
        "memory: opened data of a process, MiB at most": case.pairs * known["private_bytes_a_pair"] / 2**20,
        "memory: pixels of a step, GiB of a node": (
            of_gpu * ASSUMED["gpus_a_node"] * known["handed_over_mib"] / known["handed_over_pictures"] / 2**10
        ),
        "cores of a GPU to hand pictures over": rate * handed_over / 1e3,
        "disk or network: read by a node, MB/s": rate * ASSUMED["gpus_a_node"] * case.picture_bytes / 1e6,
        "network: embeddings to a GPU in a step, MiB": others * 2 * case.batch * ASSUMED["width"] * 4 / 2**20,
        "network: gradients from a GPU in a step, MiB": others * 2 * weights / 2**20,
        "losses of a step on a GPU, TFLOP": (
            known["products_of_losses"] * 2 * case.batch**2 * ASSUMED["width"] / case.gpus / 1e12
        ),
        "checkpoint: size, GB": checkpoint,
        "checkpoint: CPU time, s": checkpoint * known["checkpoint_s_a_gigabyte"],
        "cache: rows of embeddings in fp16, GB": case.pairs * known["row_bytes_fp16"] / 1e9,
        "cache: in int8, GB": case.pairs * known["row_bytes_int8"] / 1e9,
        "cache: read by a node, MB/s": rate * ASSUMED["gpus_a_node"] * known["row_bytes_fp16"] / 1e6,
        "cache: cores of a GPU to read it": rate / known["rows_a_core_and_second"],
        "cache: to build, hours": teacher / case.gpus / 3600,
    }
    return {name: rounded(value) for name, value in lines.items()}


def rounded(value: float) -> float:
    """To two significant digits; no estimate is better than that."""
    digits = 1 - math.floor(math.log10(abs(value)))
    return int(round(value, digits)) if digits <= 0 else round(value, digits)


def result() -> dict[str, Any]:
    known = constants()
    return {
        "measured": {name: {"value": known[name], "file": place[0]} for name, place in MEASURED.items()},
        "assumed": ASSUMED,
        "cases": {name: vars(case) for name, case in CASES.items()},
        "estimates": {name: estimated(case, known) for name, case in CASES.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {FILE.name}")
    arguments = parser.parse_args()
    text = json.dumps(result(), indent=2) + "\n"
    if arguments.write:
        FILE.write_text(text, encoding="utf-8")
    elif FILE.read_text(encoding="utf-8") != text:
        sys.exit(f"{FILE.name} is not what its constants give: python benchmarks/estimates.py --write")


if __name__ == "__main__":
    main()
