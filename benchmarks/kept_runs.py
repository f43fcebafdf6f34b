"""The evidence of a comparison's finished runs, small enough to be committed: a later sitting goes on with them.

    uv run python benchmarks/kept_runs.py keep runs/attribution docs/results/cmapkd_attribution_runs
    uv run python benchmarks/kept_runs.py restore docs/results/cmapkd_attribution_runs runs/attribution

What is kept of a run: its config, environment, scores, and the rank of each right answer; neither weights nor curves.
There is one zip for each seed. `cmapkd compare` counts restored runs as finished, if its settings are those of their
configs. Other versions of cmapkd have other settings: the commit is in `environment.json`.
"""

from __future__ import annotations

import argparse
import json
import zipfile
from collections import defaultdict
from pathlib import Path

EVIDENCE = ("config.yaml", "environment.json", "metrics.json", "ranks.safetensors")
OF_ALL = ("seconds.json",)
LONG_AGO = (2020, 1, 1, 0, 0, 0)  # zips of equal runs are equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("keep", "restore"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    told = keep if arguments.what == "keep" else restore
    print(told(arguments.source, arguments.target))


def keep(comparison: Path, kept: Path) -> str:
    """Adds the finished runs of a comparison's folder to the zips of their seeds."""
    runs = [path.parent for path in sorted(comparison.glob("runs/*/metrics.json"))]
    by_seed: dict[int, dict[str, bytes]] = defaultdict(dict)
    for run in runs:
        seed = json.loads((run / "environment.json").read_text(encoding="utf-8"))["seed"]
        for name in EVIDENCE:
            if (run / name).is_file():
                by_seed[seed][f"runs/{run.name}/{name}"] = _without_command(run / name)
    kept.mkdir(parents=True, exist_ok=True)
    for seed, files in by_seed.items():
        path = kept / f"seed{seed}.zip"
        files = (_read(path) if path.exists() else {}) | files
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for name in sorted(files):
                archive.writestr(zipfile.ZipInfo(name, LONG_AGO), files[name], zipfile.ZIP_DEFLATED, 9)
    for name in OF_ALL:
        if (comparison / name).is_file():
            (kept / name).write_bytes(_without_command(comparison / name))
    return f"{kept}: {len(runs)} runs, {len(by_seed)} seeds"


def restore(kept: Path, comparison: Path) -> str:
    """Puts kept runs into a comparison's folder, where they are not there yet."""
    count = 0
    for path in sorted(kept.glob("seed*.zip")):
        for name, content in _read(path).items():
            place = comparison / name
            if not place.resolve().is_relative_to(comparison.resolve()):
                raise SystemExit(f"{path} holds {name}, which would lie outside of {comparison}")
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content)
                count += place.name == "metrics.json"
    for name in OF_ALL:
        if (kept / name).is_file() and not (comparison / name).exists():
            (comparison / name).write_bytes((kept / name).read_bytes())
    return f"{comparison}: {count} runs restored"


def _read(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _without_command(path: Path) -> bytes:
    """A file's content; of an environment without the command line, which names folders of one machine."""
    if path.suffix != ".json":
        return path.read_bytes()
    values = json.loads(path.read_text(encoding="utf-8"))
    for holder in (values, values.get("environment")):
        if isinstance(holder, dict):
            holder.pop("command", None)
    return (json.dumps(values, indent=2) + "\n").encode()


if __name__ == "__main__":
    main()
