"""How far down the right picture stands: for each k, the share of captions that find it among the first k.

    uv run python benchmarks/draw_ranks.py docs/images/ranks.png --json docs/results/ranks.json --models \\
      "teacher=runs/teacher" "taught=runs/compared/runs/clip_kd-seed?-*" "alone=runs/compared/runs/alone-seed?-*"

A model is a run folder, or a pattern of several seeds, of which the mean is drawn and the least and largest as a band.
Each folder has the ranks of its evaluation (`ranks.safetensors`). All must have searched the same pictures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

mpl.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ("#222222", "#1f8f5c", "#c0504d", "#5b7fb5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--most", type=int, default=100, help="the largest k")
    parser.add_argument("--json", type=Path, help="where the numbers go")
    arguments = parser.parse_args()
    curves: dict[str, NDArray[np.float64]] = {}
    searched: set[int] = set()
    for name, pattern in (given.split("=", 1) for given in arguments.models):
        folders = sorted(Path().glob(pattern)) if not Path(pattern).is_absolute() else [*_absolute(pattern)]
        if not folders:
            raise SystemExit(f"{name}: no folder is named {pattern}")
        found = [load_file(folder / "ranks.safetensors") for folder in folders]
        searched |= {len(each["captions"]) for each in found}
        curves[name] = np.stack([within(each["t2i.better"], arguments.most) for each in found])
    if len(searched) > 1:
        raise SystemExit(f"the models searched different numbers of pictures: {sorted(searched)}")
    (pictures,) = searched
    drawn(curves, pictures, arguments.out)
    if arguments.json is not None:
        told = {name: {str(k): float(rows.mean(0)[k - 1]) for k in (1, 10, 100)} for name, rows in curves.items()}
        values = {"pictures": pictures, "seeds": {name: len(rows) for name, rows in curves.items()}, "within": told}
        arguments.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def within(better: NDArray[np.uint16], most: int) -> NDArray[np.float64]:
    """Per cent of captions with fewer than k better pictures, for k from 1 to `most`."""
    counts = np.bincount(np.minimum(better.astype(np.int64), most), minlength=most + 1)
    return 100 * np.cumsum(counts[:most]) / len(better)


def drawn(curves: dict[str, NDArray[np.float64]], pictures: int, out: Path) -> None:
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for (name, rows), colour in zip(curves.items(), COLOURS, strict=False):
        first = np.arange(1, rows.shape[1] + 1)
        axes.plot(first, rows.mean(0), color=colour, linewidth=2, label=name)
        if len(rows) > 1:
            axes.fill_between(first, rows.min(0), rows.max(0), color=colour, alpha=0.2, linewidth=0)
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    axes.set_xlabel(f"the first ... pictures that a caption finds, of {pictures:,}")
    axes.set_ylabel("captions that find their picture, %")
    axes.set_ylim(0, 100)
    axes.set_xlim(1, 100)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", frameon=False, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=130)


def _absolute(pattern: str) -> list[Path]:
    path = Path(pattern)
    return sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))


if __name__ == "__main__":
    main()
