"""An hour of CMAPKD with cache, two data workers, checkpoints and validation: do memory and file handles stay flat?

The run is `cmapkd distill`, as a user starts it; every ten seconds the memory, open files, threads and shared memory of
all its processes are noted. After the given time SIGTERM ends it, which must save a checkpoint.

    uv run --group bench python benchmarks/soak.py --minutes 75 --json docs/results/soak.json

Flat means, over what follows the warm-up (the first quarter, and never less than two validations): the line through
resident memory rises by less than 2 % of the mean in an hour; and in the last third the medians of open files, threads,
processes and files in shared memory are not above those of the first third. With less than 30 minutes measured there is
no verdict.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

MOST_GROWTH = 0.02  # of the mean resident memory, in an hour
ENOUGH_MINUTES = 30.0
COUNTS = ("open_files", "threads", "processes", "shared_files")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=75.0)
    parser.add_argument("--every", type=float, default=10.0, help="seconds between looks")
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps-between", type=int, default=200, help="checkpoints, and validations")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()

    from cmapkd.provenance import describe_environment

    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "run"
        every = arguments.steps_between
        command = [
            *(sys.executable, "-m", "cmapkd", "distill", "cmapkd_scenes", "--out", str(out)),
            *(f"data.train=scenes?length={arguments.samples}", "data.val=scenes@val?length=200", "data.test=null"),
            *(f"data.workers={arguments.workers}", f"cache.folder={name}/cache", "baseline=none"),
            # the stages state the length: a short one, so that a change of stage is in it, and one that does not end
            f"training.stages=[{{name: first, steps: {every // 2}}}, {{name: rest, steps: 100000000}}]",
            *("training.steps=null", "training.epochs=null", f"training.batch_size={arguments.batch_size}"),
            *(f"training.evaluate_every={every}", f"training.checkpoint_every={every}", "training.log_every=20"),
        ]
        begun = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        looks = []
        while process.poll() is None and time.monotonic() - begun < 60 * arguments.minutes:
            time.sleep(arguments.every)
            look = observe(process.pid, out)
            if look is not None:
                looks.append({"seconds": round(time.monotonic() - begun, 1), **look})
        ended_early = process.poll() is not None
        process.send_signal(signal.SIGTERM)
        printed = process.communicate(timeout=600)[0]
        saved = sorted(path.name for path in (out / "checkpoints").glob("step-*"))
        result = {
            "settings": {key: value for key, value in vars(arguments).items() if key != "json"},
            "command": [part.replace(name, "DIR") for part in command[1:]],
            "ended_by_itself": ended_early,
            "exit_code_after_sigterm": process.returncode,
            "steps": last_step(out),
            "checkpoints_left": saved,
            **judge(looks),
            "last_lines": printed.replace(name, "DIR").splitlines()[-5:],
            "looks": looks,
            "environment": describe_environment(),
        }
    print(json.dumps({key: value for key, value in result.items() if key not in ("looks", "environment")}, indent=2))
    if arguments.json is not None:
        arguments.json.write_text(as_json(result), encoding="utf-8")
    sys.exit(ended_early or result["flat"] is False)


def as_json(result: dict[str, Any]) -> str:
    """Indented, but each look on a line of its own."""
    looks = ",\n".join(f"  {json.dumps(look)}" for look in result["looks"])
    return json.dumps({**result, "looks": []}, indent=1).replace('"looks": []', f'"looks": [\n{looks}\n ]') + "\n"


def observe(root: int, out: Path) -> dict[str, Any] | None:
    """Of the run and all processes below it; None while one of them comes or goes."""
    try:
        first = psutil.Process(root)
        family = [first, *first.children(recursive=True)]
        memory = [process.memory_full_info() for process in family]
        shared = list(Path("/dev/shm").iterdir())
        return {
            "resident_bytes": sum(each.rss for each in memory),
            "own_bytes": sum(each.uss for each in memory),  # without what the processes share
            "open_files": sum(process.num_fds() for process in family),
            "threads": sum(process.num_threads() for process in family),
            "processes": len(family),
            "shared_files": len(shared),
            "shared_bytes": sum(file.stat().st_size for file in shared),
            "step": last_step(out),
        }
    except (psutil.Error, FileNotFoundError):
        return None


def last_step(out: Path) -> int:
    """The step of the last whole line of metrics.jsonl."""
    path = out / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 20_000))
        lines = file.read().split(b"\n")[:-1]
    return int(json.loads(lines[-1])["step"]) if lines else 0


def judge(looks: list[dict[str, Any]]) -> dict[str, Any]:
    """Slopes after the warm-up, and whether they are flat; see the top of this file."""
    trained = [look for look in looks if look["step"]]
    measured = trained[len(trained) // 4 :]
    if len(measured) < 6:
        return {"flat": None, "why": f"{len(measured)} looks after the warm-up are too few"}
    minutes = (measured[-1]["seconds"] - measured[0]["seconds"]) / 60
    hours = [look["seconds"] / 3600 for look in measured]
    growth = {}
    for key in ("resident_bytes", "own_bytes", "shared_bytes"):
        values = [look[key] for look in measured]
        line = statistics.linear_regression(hours, values)
        growth[key] = {
            "mean": statistics.mean(values),
            "per_hour": line.slope,
            "share_per_hour": line.slope / max(1.0, statistics.mean(values)),
            "first": values[0],
            "last": values[-1],
            "highest": max(values),
        }
    third = len(measured) // 3
    counts = {
        key: [statistics.median(look[key] for look in part) for part in (measured[:third], measured[-third:])]
        for key in COUNTS
    }
    flat = growth["resident_bytes"]["share_per_hour"] < MOST_GROWTH and all(
        last <= first for first, last in counts.values()
    )
    return {
        "minutes_measured": round(minutes, 1),
        "flat": flat if minutes >= ENOUGH_MINUTES else None,
        "would_be_flat": flat,
        "threshold_share_per_hour": MOST_GROWTH,
        "growth": growth,
        "medians_of_first_and_last_third": counts,
    }


if __name__ == "__main__":
    main()
