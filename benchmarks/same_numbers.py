"""Whether a change of the code moved any number: one short run of every recipe on the built-in world, as JSON.

    uv run python benchmarks/same_numbers.py --json before.json
    uv run python benchmarks/same_numbers.py --json after.json --against before.json

Each run is a few steps of a packaged recipe, then an evaluation on few samples. The log holds the checksum of the
saved student's weights, the losses of every step, and all scores. `--against` compares bit for bit, prints each number
that differs and by how much, and ends with status 1 if any does. Numbers compare on one machine and one release of
torch only. Runs of one log share nothing, so `--only` may name some of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cmapkd import distill

SHORT = (
    "data.train=scenes?length=400",
    "data.val=null",
    "training.evaluate_every=null",
    "training.student=last",
    "data.test=scenes@val?length=50",
    "training.steps=12",
    "training.batch_size=32",
    "training.log_every=1",
    "training.device=cpu",
    "optim.warmup_steps=4",
    "baseline=none",
)
RECIPES = (
    "demo",
    "contrastive_scenes",
    "albef_scenes",
    "hinton_scenes",
    "hinton_classes_scenes",
    "open_clip_distill_scenes",
    "promptkd_scenes",
    "biomedcoop_scenes",
    "sgva_clip_scenes",
    "c2kd_scenes",
    "dc_clip_scenes",
    "fitnet_scenes",
    "clip_kd_scenes",
    "clip_rd_scenes",
    "clip_ping_scenes",
    "clip_cid_scenes",
    "lelp_scenes",
    "supervised_scenes",
    "dho_scenes",
    "vl2lite_scenes",
    "makd_scenes",
    "mst_distill_scenes",
    "acam_kd_scenes",
    "dmae_scenes",
    "trg_token_graph_scenes",
    "cmapkd_scenes",
    "mobileclip_scenes",
    "degla_scenes",
    "cosmos_scenes",
    "dclip_scenes",
    "radio_scenes",
    "tinyclip_scenes",
    "tipsv2_scenes",
    "tinyclip_auto_scenes",
)
STAGES = "training.stages=[{name: a, share: 0.5, terms: [contrastive]}, {name: b, share: 0.5}]"
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {  # name: (recipe, more overrides)
    **{recipe: (recipe, ()) for recipe in RECIPES},
    "mobileclip_scenes": ("mobileclip_scenes", ("data.train=scenes?wrong=0.3&length=400",)),
    "promptkd_scenes": (
        "promptkd_scenes",
        ("data.train=scenes:hard?length=400", "data.test=scenes:hard@val?length=50"),
    ),
    "cmapkd_scenes, from a cache": ("cmapkd_scenes", ("cache.mode=auto", "cache.folder={work}/cache")),
    "cmapkd_scenes, bf16": ("cmapkd_scenes", ("training.precision=bf16",)),
    "cmapkd_scenes, micro-batches": ("cmapkd_scenes", ("training.micro_batch=12",)),
    "cmapkd_scenes, policy": ("cmapkd_scenes", ("method.weighting=policy",)),
    "cmapkd_scenes, gate": ("cmapkd_scenes", ("method.weighting=gate",)),
    "cmapkd_scenes, averaged": ("cmapkd_scenes", ("training.ema=0.9",)),
    "cmapkd_scenes, in stages": ("cmapkd_scenes", (STAGES,)),
    "clip_kd_scenes, weighted terms": ("clip_kd_scenes", ("method.term_weighting=uncertainty",)),
    "clip_kd_scenes, balanced terms": (
        "clip_kd_scenes",
        ("method.term_weighting={name: gradnorm, warmup_steps: 2, every: 2}",),
    ),
    "clip_kd_scenes, int8 cache": (
        "clip_kd_scenes",
        ("cache.mode=auto", "cache.folder={work}/cache", "cache.store=int8"),
    ),
    "contrastive_scenes, with heads": (
        "contrastive_scenes",
        ("heads.vqa=1.0", "heads.captioning=0.5", "heads.detection=1.0"),
    ),
}
MEASURED = ("seconds", "train_seconds", "peak_memory_bytes", "pairs_per_second")  # of the machine, not of the run

Entry = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the numbers are written")
    parser.add_argument("--against", type=Path, help="numbers of an earlier call, compared with these bit for bit")
    parser.add_argument("--only", nargs="+", choices=[*VARIANTS], default=[*VARIANTS], metavar="NAME")
    arguments = parser.parse_args()
    before = json.loads(arguments.against.read_text()) if arguments.against else None
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: dict[str, Entry] = {}
    for name in arguments.only:
        with tempfile.TemporaryDirectory(prefix="same-numbers-") as work:
            found[name] = numbers_of(name, Path(work))
        arguments.json.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        print(f"{name}: loss {found[name]['losses'][-1]:.9g}, weights {found[name]['weights'][:12]}", flush=True)
    if before is not None:
        moved = [line for name in found for line in differences(name, before.get(name), found[name])]
        print("\n".join(moved) if moved else f"all {len(found)} runs give the same numbers, bit for bit")
        sys.exit(1 if moved else 0)


def numbers_of(name: str, work: Path) -> Entry:
    """One run and everything it computed."""
    recipe, more = VARIANTS[name]
    overrides = [*SHORT, *(each.format(work=work) if "{work}" in each else each for each in more)]
    result = distill(recipe, out=work / "run", quiet=True, overrides=overrides)
    lines = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    last = {key: value for key, value in lines[-1].items() if key not in MEASURED}
    return {
        "weights": weights_checksum(work / "run" / "student" / "model.safetensors"),
        "losses": [line["loss"] for line in lines],
        "last": last,
        "scores": plain_scores(result.metrics),
    }


def weights_checksum(path: Path) -> str:
    """SHA-256 of the tensors by name: of names, shapes, types and bits, not of what else a file holds."""
    checksum = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        checksum.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        checksum.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return checksum.hexdigest()


def plain_scores(metrics: Any, path: str = "") -> dict[str, float]:
    """Every number of the metrics of teacher and student, by its path."""
    if isinstance(metrics, dict):
        kept = ("student", "teacher") if not path else metrics.keys()
        parts = [plain_scores(metrics[key], f"{path}/{key}".lstrip("/")) for key in kept if key in metrics]
        return {name: value for part in parts for name, value in part.items()}
    counts = isinstance(metrics, int | float) and not isinstance(metrics, bool)
    return {path: metrics} if counts and path.rpartition("/")[2] not in MEASURED else {}


def differences(name: str, before: Entry | None, after: Entry) -> list[str]:
    """One line for each number that moved."""
    if before is None:
        return [f"{name}: the earlier log does not have it"]
    lines = []
    if before["weights"] != after["weights"]:
        lines.append(f"{name}: the student's weights differ")
    pairs = list(zip(before["losses"], after["losses"], strict=False))
    first = next((step for step, (old, new) in enumerate(pairs, 1) if old != new), None)
    if first is not None:
        largest = max(abs(new - old) for old, new in pairs)
        lines.append(f"{name}: losses differ from step {first} on, by at most {largest:.3g}")
    for part in ("last", "scores"):
        lines += [f"{name}: {line}" for line in moved_values(part, before[part], after[part])]
    return lines


def moved_values(part: str, before: dict[str, float], after: dict[str, float]) -> list[str]:
    """Values that differ, are gone, or are new."""
    lines = [f"{part} {key} is gone" for key in before.keys() - after.keys()]
    lines += [f"{part} {key} is new" for key in after.keys() - before.keys()]
    for key in before.keys() & after.keys():
        old, new = before[key], after[key]
        if old != new:
            lines.append(f"{part} {key} {old!r} -> {new!r} ({new - old:+.3g})")
    return sorted(lines)


if __name__ == "__main__":
    main()
