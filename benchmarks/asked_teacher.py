"""How well a model that writes tells things that stand in drawn pictures from things that do not, by its yes and no.

    uv run python benchmarks/asked_teacher.py tiny_vlm:scenes-teacher --pictures "scenes:easy@val?length=500" \
        --json docs/results/asked_teacher.json

Every picture is asked `Is there a THING?`. Things are the shape of its largest object, and a shape that is not there.
They are also its largest object with colour and shape, and the same with another colour or another shape. AUC is how
often the log-odds of yes are larger for the thing that is there than for one that is not, over all pairs of pictures.
The interval is a bootstrap over pictures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

AGAINST = {"another shape": "shape", "another shape of the colour": "pair", "the shape in another colour": "pair"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pictures", default="scenes:easy@val?length=500")
    parser.add_argument("--asks", default="Is there a {}?")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    told = measured(arguments.model, arguments.pictures, arguments.asks)
    arguments.json.write_text(
        json.dumps({"model": arguments.model, "pictures": arguments.pictures, "asks": arguments.asks, **told}, indent=1)
        + "\n",
        encoding="utf-8",
    )
    print(told)


def measured(name: str, pictures: str, asks: str) -> dict[str, Any]:
    """AUC against each kind of thing that is not there, with 95 % intervals."""
    import numpy as np
    import torch
    from torchvision.transforms.functional import pil_to_tensor

    import cmapkd
    from cmapkd.data.open import open_source
    from cmapkd.data.scenes.spec import COLOURS, SHAPES
    from cmapkd.models.asked_writer import AskedWriter

    model: Any = cmapkd.load(name).eval()
    samples = open_source(pictures)
    odds: dict[str, list[float]] = {kind: [] for kind in (*AGAINST, *AGAINST.values())}
    for number in range(len(samples)):
        sample: Any = samples[number]
        largest, things = sample.scene.objects[0], sample.scene.objects
        shapes = [each for each in SHAPES if all(each != thing.shape for thing in things)]
        colours = [each for each in COLOURS if all(each != thing.colour for thing in things)]
        other, painted = shapes[number % len(shapes)], colours[number % len(colours)]  # without a draw
        asked = {
            "shape": largest.shape,
            "pair": largest.name,
            "another shape": other,
            "another shape of the colour": f"{largest.colour} {other}",
            "the shape in another colour": f"{painted} {largest.shape}",
        }
        writer = AskedWriter(model, [asks.format(each) for each in asked.values()])
        with torch.no_grad():
            found = writer.encode_image(pil_to_tensor(sample.image)[None].float() / 255).embedding[0]
        for kind, value in zip(asked, found.tolist(), strict=True):
            odds[kind].append(value)
    values = {kind: np.array(each) for kind, each in odds.items()}
    draw = np.random.default_rng(0)
    drawn = [draw.integers(0, len(samples), len(samples)) for _ in range(500)]

    def auc(there: Any, other: Any) -> float:
        return float(((there[:, None] > other[None]).mean() + (there[:, None] >= other[None]).mean()) / 2)

    return {
        kind: {
            "auc": auc(values[there], values[kind]),
            "interval": np.quantile(
                [auc(values[there][at], values[kind][at]) for at in drawn], (0.025, 0.975)
            ).tolist(),
        }
        for kind, there in AGAINST.items()
    }


if __name__ == "__main__":
    main()
