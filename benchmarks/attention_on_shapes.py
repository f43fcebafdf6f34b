"""Where texts look: how much of a layer's attention to a picture falls on the shape that a question asks about.

Of the test pictures of `scenes`, every question is asked that names a shape which stands there once. Attention is that
of the words behind the picture to its visual tokens, as mean over heads. Its share on the tokens that the shape's box
covers, each by the covered part of it, is divided by the share of the picture that the box covers. 1 is what evenly
spread attention has, and what a model has that does not look.

    uv run python benchmarks/attention_on_shapes.py runs/few_answers_methods/runs/*/student [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

SOURCE = "scenes@test?start=80000&length=600"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders or names of models that write")
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--source", default=SOURCE)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = {name: measured(name, arguments.source, arguments.layer) for name in arguments.models}
    for name, values in found.items():
        print(f"{values['ratio']:.3f} of {values['questions']} questions  {name}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measured(name: str, source: str, layer: int) -> dict[str, float]:
    """The mean over questions of the ratio above."""
    import torch

    import cmapkd
    from cmapkd.data.dialogues import Turn, join_items
    from cmapkd.data.open import open_source
    from cmapkd.features.attention_blocks import text_to_vision
    from cmapkd.models import TokenNeeds

    model: Any = cmapkd.load(name)
    samples, ratios = open_source(source), []
    for sample in (samples[number] for number in range(len(samples))):
        for question, box in about_one_shape(sample):
            dialogue = (Turn("user", question, 1), Turn("assistant", "a"))
            inputs = join_items([model.processor.read(dialogue, [sample.image])], model.vocabulary.pad_id)
            with torch.no_grad():
                maps = model.eval()(inputs, TokenNeeds(attention=(layer,))).attention[layer]
            (block,) = text_to_vision(maps, inputs)
            assert block is not None
            mass = block.mean((0, 1))
            covered = torch.tensor(cells(box, sample.image.size, math.isqrt(len(mass))))
            on_shape = (mass * covered).sum() / mass.sum()
            ratios.append(float(on_shape / covered.mean()))
    return {"ratio": statistics.fmean(ratios), "questions": len(ratios)}


def about_one_shape(sample: Any) -> list[tuple[str, Any]]:
    """Questions that name, with its colour, a shape which stands in the picture once; and its box."""
    names = [box.name for box in sample.boxes]
    once = [box for box in sample.boxes if names.count(box.name) == 1]
    return [
        (each.question, named[0])
        for each in sample.questions
        if len(named := [box for box in once if f" {box.name}" in each.question]) == 1
    ]


def cells(box: Any, size: tuple[int, int], side: int) -> list[float]:
    """Of each cell of a square grid the part that the box covers, row by row."""
    wide, high = size[0] / side, size[1] / side

    def overlap(start: float, length: float, cell: int, step: float) -> float:
        return max(0.0, min(start + length, (cell + 1) * step) - max(start, cell * step)) / step

    return [
        overlap(box.y, box.height, row, high) * overlap(box.x, box.width, column, wide)
        for row in range(side)
        for column in range(side)
    ]


if __name__ == "__main__":
    main()
