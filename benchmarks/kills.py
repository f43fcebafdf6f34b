"""Kills a run at random moments, resumes it each time, and compares its end with that of a run left in peace.

    uv run python benchmarks/kills.py --kills 50 --work runs/kills --json docs/results/kills.json

The run is a small CMAPKD in two stages: two processes under torchrun with two data workers each, tar shards with
broken pictures, a policy for the weights, a bank, an averaged student, a cache that every round builds anew. A kill is
SIGKILL to every process of the tree at once, at a moment drawn evenly between the first thing that an undisturbed run
writes (before it, libraries are imported) and its last; then the run is started again with `--resume`. A run that has
written its last, or ends before its moment, is left to end the round, and the next begins with an empty folder, until
there were so many kills. Every round must end with the same bytes: weights, optimizer, average, random states, ledger,
metrics, saved student, cache.

The log is written after every kill. A second call with the same folder and log goes on where the first one was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from cmapkd.data.open import open_source
from cmapkd.provenance import describe_environment

PROCESSES, WORKERS, SAMPLES, BATCH = 2, 2, 320, 32
EVALUATE_EVERY, CHECKPOINT_EVERY = 8, 3
MARK = "CMAPKD_KILLS"  # in the environment of every process of a tree, by which it is found
LIMIT = 900.0  # seconds after which a run that does not end counts as hanging
BROKEN = (5, 77, 201)  # samples whose picture is cut short
MEASURED = (  # of the machine, not of the run
    "pairs_per_second",
    "train_seconds",
    "seconds",
    "parts",
    "seconds_by_part",
    "peak_memory_bytes",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs; may be deleted afterwards")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    work: Path = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    kill_all(work)  # left by a call that was killed itself
    log = begin(arguments.json, arguments.kills, arguments.seed, work)
    expected = contents(work / "undisturbed")
    while not finished(log):
        number = len(log["rounds"])
        attempts = log["attempts"] = log.get("attempts", [])  # of the round under way
        kills = sum(len(each["attempts"]) for each in log["rounds"]) + len(attempts)
        folder = work / f"round-{number}"
        moment = None
        if kills < arguments.kills:
            moment = random.Random(f"{arguments.seed}/{kills}").uniform(*log["undisturbed_seconds"])
        if (folder / "run/metrics.json").exists():
            moment = None
        attempt = run(folder, work, moment)
        if attempt["killed"]:
            attempts.append(attempt)
            print(f"kill {kills + 1}/{arguments.kills}: {describe(attempt)}", flush=True)
        else:
            found = contents(folder)
            different = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
            log["rounds"].append({"attempts": log.pop("attempts"), "different": different})
            print(f"round {number}: {len(different)} differences {different[:5]}", flush=True)
            if not different:
                shutil.rmtree(folder)
        save(arguments.json, log)
    summary = log["summary"]
    print(json.dumps(summary, indent=2))
    sys.exit(0 if summary["rounds_identical"] == summary["rounds"] else 1)


def begin(path: Path, kills: int, seed: int, work: Path) -> dict[str, Any]:
    """The log of an earlier call, or a new one with the undisturbed run."""
    if path.exists():
        log: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if (log["kills"], log["seed"]) != (kills, seed) or not (work / "undisturbed").is_dir():
            raise SystemExit(f"{path} is of other --kills or --seed, or of another --work: name another file")
        return log
    write_shards(work / "shards")
    write_recipe(work)
    shutil.rmtree(work / "undisturbed", ignore_errors=True)
    for left in work.glob("round-*"):
        shutil.rmtree(left)
    run(work / "first", work, None)  # the first start of all reads everything from the disk
    shutil.rmtree(work / "first")
    began = time.time()
    run(work / "undisturbed", work, None)
    written = [(work / "undisturbed/run" / name).stat().st_mtime - began for name in ("config.yaml", "metrics.json")]
    log = {
        "command": f"python benchmarks/kills.py --kills {kills} --seed {seed}",
        "environment": describe_environment(),
        "kills": kills,
        "seed": seed,
        "run": {"processes": PROCESSES, "workers": WORKERS, "samples": SAMPLES, "batch_size": BATCH},
        "undisturbed_seconds": [round(each, 3) for each in written],  # until the first file, and until the last
        "rounds": [],
    }
    save(path, log)
    return log


def finished(log: dict[str, Any]) -> bool:
    """All kills were made and the last round ended."""
    return sum(len(each["attempts"]) for each in log["rounds"]) >= log["kills"] and "attempts" not in log


def save(path: Path, log: dict[str, Any]) -> None:
    rounds = log["rounds"]
    made = [attempt for each in rounds for attempt in each["attempts"]] + log.get("attempts", [])
    log["summary"] = {
        "kills": len(made),
        "phases": dict(Counter(attempt["phase"] for attempt in made)),
        "rounds": len(rounds),
        "rounds_identical": sum(not each["different"] for each in rounds),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    temporary.rename(path)


def write_recipe(work: Path) -> None:
    recipe = {
        "base": "scenes",
        "teacher": "tiny:scenes-teacher",
        "student": "tiny:small",
        "method": {
            "name": "cmapkd",
            "weighting": {"name": "policy", "warmup_steps": 4, "window": 3, "edge": 1},
            "bank": {"size": 96},
        },
        "data": {
            "train": f"webdataset:{work}/shards/*.tar",
            "val": "scenes@val?length=300",
            "test": "scenes@test?length=300",
            "workers": WORKERS,
            "max_bad_share": 0.1,
            "views": {"num_views": 2},
        },
        "training": {
            "stages": [
                {"name": "coarse", "steps": 12, "levels": ["P5", "L4"]},
                {"name": "fine", "steps": 24},
            ],
            "batch_size": BATCH,
            "ema": 0.9,
            "device": "cpu",
            "log_every": 1,
            "evaluate_every": EVALUATE_EVERY,
            "checkpoint_every": CHECKPOINT_EVERY,
        },
        "optim": {"warmup_steps": 4},
        "cache": {"mode": "auto", "batch_size": 16, "shard_mib": 0.05},
    }
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def write_shards(folder: Path) -> None:
    """Scenes in four tars, a few of whose pictures cannot be read."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    source = open_source(f"scenes?length={SAMPLES}")
    for shard in range(4):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as archive:
            for index in range(shard, SAMPLES, 4):
                sample, file = source[index], io.BytesIO()
                sample.image.save(file, "PNG")
                picture = file.getvalue()[: 40 if index in BROKEN else None]
                for name, data in ((f"{index:05d}.png", picture), (f"{index:05d}.txt", sample.captions[0].encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))


def run(folder: Path, work: Path, moment: float | None) -> dict[str, Any]:
    """Starts the run, or goes on with it, and kills it after `moment` seconds unless it ends before.

    Raises:
        SystemExit: it failed by itself, or hangs.
    """
    out = folder / "run"
    resumed = (out / "config.yaml").exists()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    command += ["-m", "cmapkd", "distill", str(work / "recipe.yaml"), "--out", str(out)]
    environment = {**os.environ, MARK: str(work), "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1"}
    folder.mkdir(exist_ok=True)
    before = time.time()
    start = time.monotonic()
    with (folder / "output.txt").open("ab") as output:
        process = subprocess.Popen(
            [*command, *(["--resume"] if resumed else [])],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait(LIMIT if moment is None else moment)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            seconds = time.monotonic() - start
            num_processes = kill_all(work)
            process.wait()
    if code is None and moment is not None:
        where = place(folder, before)
        return {"killed": True, "seconds": round(seconds, 3), "resumed": resumed, "processes": num_processes, **where}
    if code != 0:
        tail = (folder / "output.txt").read_text(encoding="utf-8", errors="replace")[-3000:]
        raise SystemExit(f"the run in {folder} {'hangs' if code is None else f'ended with {code}'}:\n{tail}")
    return {"killed": False, "seconds": round(seconds, 3), "resumed": resumed}


def kill_all(work: Path) -> int:
    """SIGKILL to every process of a run in this folder, until there is none; how many there were at first."""
    first, mark = None, f"{MARK}={work}\0".encode()
    while True:
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # it ended, or is another user's
                if entry.name.isdecimal() and mark in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        first = len(found) if first is None else first
        if not found:
            return first
        for number in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.01)


def place(folder: Path, since: float) -> dict[str, Any]:
    """Where a killed run was, by what it left: the phase, the last step logged and the last one saved."""
    out = folder / "run"
    steps = [int(path.name.removeprefix("step-")) for path in out.glob("checkpoints/step-*")]
    lines = [line for line in map(parsed, read_lines(out / "metrics.jsonl")) if line]
    step = max((int(line["step"]) for line in lines), default=0)
    saved = max(steps, default=0)
    return {"phase": phase(folder, lines, step, saved, since), "step": step, "saved": saved}


def phase(folder: Path, lines: list[dict[str, Any]], step: int, saved: int, since: float) -> str:
    out, cache = folder / "run", folder / "cache"

    def written(root: Path) -> bool:
        return any(path.stat().st_mtime > since for path in root.rglob("*") if path.is_file())

    if any(path.name.endswith(".writing") for path in (*out.glob("checkpoints/.*"), *out.glob(".*"))):
        return "saving"
    if (out / "metrics.json").exists():
        return "end"
    if (out / "student").is_dir():
        return "final evaluation"
    if written(cache) and not written(out / "checkpoints") and (not lines or not written_after(out, since)):
        return "cache build"
    if not written_after(out, since):
        return "start"
    validated = any(line["step"] == step and any(key.startswith("validation/") for key in line) for line in lines)
    if step % EVALUATE_EVERY == 0 and not validated and saved < step:
        return "evaluation"
    return "training"


def written_after(out: Path, since: float) -> bool:
    """Whether this attempt has logged anything."""
    path = out / "metrics.jsonl"
    return path.exists() and path.stat().st_mtime > since


def describe(attempt: dict[str, Any]) -> str:
    return (
        f"after {attempt['seconds']:.1f} s, {attempt['phase']}, step {attempt['step']}, saved {attempt['saved']}, "
        f"{attempt['processes']} processes"
    )


def contents(folder: Path) -> dict[str, str]:
    """Digests of everything that a run ends with, but for times and numbers of processes."""
    out = folder / "run"
    last = sorted(out.glob("checkpoints/step-*"))[-1]
    best = sorted(out.glob("checkpoints/best-*"))
    found = {}
    for path in [*last.iterdir(), *(file for each in best for file in each.iterdir()), *out.glob("student/*")]:
        if path.name != "checksums.json":  # which are of times, too; a resume has compared them
            found[str(path.relative_to(out))] = digest(path)
    for name in ("metrics.json", "metrics.jsonl", "bad_samples.jsonl", "config.yaml"):
        found[name] = digest(out / name)
    cache = folder / "cache"
    found |= {str(path.relative_to(folder)): digest(path) for path in cache.rglob("*") if path.suffix == ".rows"}
    return found


def digest(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix == ".json":
        data = json.dumps(without_times(json.loads(data)), sort_keys=True).encode()
    elif path.suffix == ".jsonl":
        lines = [json.dumps(without_times(json.loads(line)), sort_keys=True) for line in data.decode().splitlines()]
        data = "\n".join(sorted(lines) if path.name == "bad_samples.jsonl" else lines).encode()
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def without_times(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: without_times(value) for key, value in values.items() if key not in MEASURED}
    return values


def read_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def parsed(line: str) -> dict[str, Any]:
    """A line of the log; of one cut short nothing."""
    try:
        values: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return values


if __name__ == "__main__":
    main()
