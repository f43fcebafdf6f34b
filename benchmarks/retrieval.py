"""How long, and in how much memory, COCO-sized retrieval is scored: `python benchmarks/retrieval.py --json out.json`.

The peak is the growth of the resident set (`ru_maxrss`) of a fresh process, beyond its imports and the embeddings.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from cmapkd.evaluation.retrieval import retrieval


def peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB on Linux


def processor() -> str:
    """The processor's name, and how many of its threads this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} thread(s)"


def measure(num_images: int, num_texts: int, width: int, tied: bool) -> dict[str, float]:
    """Seconds and extra MiB of one call; `tied`: every text occurs twice and every embedding is coarse."""
    torch.manual_seed(0)
    images, texts = torch.randn(num_images, width), torch.randn(num_texts, width)
    for values in (images, texts):  # in place: a copy would raise the peak before the measurement
        F.normalize(values, dim=-1, out=values)
    image_of_text = torch.arange(num_texts) % num_images
    if tied:
        for values in (images, texts):
            values.mul_(8).round_().div_(8)
        half = num_texts // 2
        texts[half : 2 * half].copy_(texts[:half])
    retrieval(images[:64], texts[:64], torch.arange(64))  # libraries allocate their own workspace once
    before = peak_mib()
    start, start_cpu = time.perf_counter(), time.process_time()
    scores = retrieval(images, texts, image_of_text)
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(time.process_time() - start_cpu, 2),  # the honest one on a machine that others use
        "extra_mib": round(peak_mib() - before, 1),
        "mean_r@1": scores["mean_r@1"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--texts", type=int, default=25_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--child", choices=["random", "tied"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.images, options.texts, options.width, options.child == "tied")))
        return
    result: dict[str, object] = {
        "images": options.images,
        "texts": options.texts,
        "width": options.width,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "processor": processor(),
    }
    sizes = ["--images", str(options.images), "--texts", str(options.texts), "--width", str(options.width)]
    for kind in ("random", "tied"):
        command = [sys.executable, __file__, "--child", kind, *sizes]
        result[kind] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
