"""The pictures of CMAPKD's page: the levels of both models, and what a selection gave each level during a run.

uv run python benchmarks/draw_cmapkd.py levels docs/images/cmapkd_levels.png
uv run python benchmarks/draw_cmapkd.py weights docs/images/cmapkd_weights.png gate=runs/a policy=runs/b
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Polygon, Rectangle

TEACHER, STUDENT, VISUAL, LANGUAGE, BANK = "#3a6ea5", "#b3541e", "#1f6f5c", "#8b5fbf", "#7a7a7a"
SIDES = {"visual": ("P2", "P3", "P4", "P5"), "language": ("L1", "L2", "L3", "L4")}
MEANINGS = {
    "P2": "early patches", "P3": "middle", "P4": "last", "P5": "embedding",
    "L1": "words", "L2": "phrases", "L3": "sentence", "L4": "embedding",
}  # fmt: skip
COLOURS = ("#9fc9bd", "#5fa88f", "#1f6f5c", "#123f34")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", choices=("levels", "weights"))
    parser.add_argument("out", type=Path)
    runs = parser.add_argument("runs", nargs="*", help="for weights: TITLE=RUN_FOLDER")
    arguments = parser.parse_args()
    if arguments.picture != "levels" and not arguments.runs:
        parser.error(f"{arguments.picture} are drawn of something: {runs.help}")
    draw = {"levels": lambda _: draw_levels(), "weights": draw_weights}
    figure = draw[arguments.picture](arguments.runs)
    figure.savefig(arguments.out, dpi=160)


def draw_levels() -> Figure:
    """Teacher outside, student inside; each level beside its counterpart, the embeddings joined in the middle."""
    figure = Figure(figsize=(10.4, 5.4))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, 104)
    axes.set_ylim(0, 54)
    axes.axis("off")
    heights = (7.5, 16.5, 25.5, 34.5)
    for side, levels in SIDES.items():
        mirrored = side == "language"
        colour = LANGUAGE if mirrored else VISUAL
        for number, (level, bottom) in enumerate(zip(levels, heights, strict=True)):
            wide = 15.5 - 2.6 * number
            for role, centre in (("teacher", 14.0), ("student", 37.0)):
                x = 104 - centre if mirrored else centre
                _level(axes, x, bottom, wide if role == "teacher" else wide * 0.66, role, side, 4 - number)
            near, far = 14 + wide / 2 + 0.6, 37 - wide * 0.33 - 0.6
            start, end = (104 - near, 104 - far) if mirrored else (near, far)
            axes.annotate(
                "", (end, bottom + 2.6), (start, bottom + 2.6), arrowprops={"arrowstyle": "-|>", "color": colour}
            )
            axes.text((start + end) / 2, bottom + 3.3, rf"$d_{{{level}}}$", ha="center", fontsize=9, color=colour)
            axes.text((start + end) / 2, bottom + 0.4, rf"$w_{{{level}}}$", ha="center", fontsize=8, color="#555555")
            axes.text(
                104 - 43.2 if mirrored else 43.2, bottom + 2.6, f"{level}\n{MEANINGS[level]}",
                ha="right" if mirrored else "left", va="center", fontsize=7, color="#333333",
            )  # fmt: skip
    for x, name, colour in ((14, "teacher, frozen or cached", TEACHER), (37, "student", STUDENT)):
        axes.text(x, 5.2, f"image tower\n{name}", ha="center", va="top", fontsize=8.5, color=colour)
        axes.text(104 - x, 5.2, f"text tower\n{name}", ha="center", va="top", fontsize=8.5, color=colour)
    axes.add_patch(FancyBboxPatch((36, 46.2), 32, 5.4, boxstyle="round,pad=0.3", fc="#f4f4f4", ec=BANK))
    axes.text(
        52, 48.9, "joint space: contrastive, interactive,\nbank of the teacher's embeddings",
        ha="center", va="center", fontsize=8.5, color="#333333",
    )  # fmt: skip
    for x in (37, 67):
        axes.annotate(
            "", (x + (1.5 if x < 52 else -1.5), 46), (x, 39.5), arrowprops={"arrowstyle": "-|>", "color": BANK}
        )
    for x in (14, 90):
        axes.annotate("", (35.4 if x < 52 else 68.6, 48.6), (x, 39.5), arrowprops={"arrowstyle": "-|>", "color": BANK})
    axes.text(14, 51.6, "visual pyramid", ha="center", fontsize=11, color=VISUAL)
    axes.text(90, 51.6, "language hierarchy", ha="center", fontsize=11, color=LANGUAGE)
    return figure


def _level(axes: Any, x: float, bottom: float, wide: float, role: str, side: str, cells: int) -> None:
    """One level: a grid of cells seen from above for pictures, a row of words for texts; the top one a bar."""
    colour = TEACHER if role == "teacher" else STUDENT
    if cells == 1:
        axes.add_patch(Rectangle((x - wide / 2, bottom + 1.8), wide, 1.6, fc=colour, ec="none"))
        return
    if side == "language":
        each = wide / cells
        for number in range(cells):
            axes.add_patch(
                Rectangle((x - wide / 2 + number * each, bottom + 1.4), each * 0.84, 2.4, fc=colour, ec="white")
            )
        return
    tall, slant = 5.0, 1.8
    for row in range(cells):
        for column in range(cells):
            corners = [(column, row), (column + 1, row), (column + 1, row + 1), (column, row + 1)]
            points = [
                (x - wide / 2 + (wide - slant) * u / cells + slant * v / cells, bottom + tall * v / cells)
                for u, v in corners
            ]
            axes.add_patch(Polygon(points, closed=True, fc=colour, ec="white", lw=0.8, alpha=0.55 + 0.1 * (4 - cells)))


def draw_weights(runs: list[str]) -> Figure:
    """Each run a row, each modality a column; the batch mean of every level's weight over the steps."""
    figure = Figure(figsize=(8.6, 0.6 + 2.0 * len(runs)), layout="constrained")
    panels = figure.subplots(len(runs), 2, sharex=True, squeeze=False)
    for row, run in zip(panels, runs, strict=True):
        title, _, folder = run.partition("=")
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        for axes, (side, levels) in zip(row, SIDES.items(), strict=True):
            for level, colour in zip(levels, COLOURS, strict=True):
                key = f"{side}/weight/{level}"
                points = [(line["step"], line[key]) for line in lines if key in line]
                if points:
                    steps, weights = zip(*points, strict=True)
                    axes.plot(steps, weights, color=colour, alpha=0.25, lw=0.8)  # a policy tries others all the time
                    axes.plot(steps, _smooth(weights), color=colour, label=level)
            axes.axhline(1.0, color="#bbbbbb", lw=0.8, ls="--")
            axes.set_title(f"{title}: {side}", fontsize=9)
            axes.set_ylim(0, axes.get_ylim()[1] * 1.15)  # room for the legend
            axes.legend(fontsize=7, ncols=4, frameon=False, loc="upper center")
            axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel("step")
    for axes in panels[:, 0]:
        axes.set_ylabel("mean weight")
    return figure


def _smooth(values: Sequence[float], reach: int = 4) -> list[float]:
    """Each value's mean with those up to `reach` places around it."""
    return [statistics.fmean(values[max(0, place - reach) : place + reach + 1]) for place in range(len(values))]


if __name__ == "__main__":
    main()
