"""What int8 costs: R@1 of the teacher's own embeddings, live and as each store gives them back, on several sets.

    uv run python benchmarks/int8.py --json docs/results/int8.json

The sets are the validation split of `scenes` and disjoint blocks of 1000 other samples. A row is one image and one
caption, as a cache stores them. What rounding costs a student is in `benchmarks/key_tokens.py`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from cmapkd.cache.layout import Field, RowLayout
from cmapkd.data.open import open_source
from cmapkd.evaluation.embed import embed
from cmapkd.evaluation.retrieval import retrieval
from cmapkd.models import build_model
from cmapkd.provenance import describe_environment

STORES = ("fp32", "fp16", "int8")


class Block:
    """Samples `first` to `first + length` of a source."""

    def __init__(self, source: Any, first: int, length: int) -> None:
        self.source, self.first, self.length = source, first, length

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.source[self.first + index]

    def captions(self, index: int) -> tuple[str, ...]:
        captions: tuple[str, ...] = self.source.captions(self.first + index)
        return captions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="tiny:scenes-teacher")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    model = build_model(arguments.teacher).eval()
    train = open_source("scenes", split="train", require_captions=True)
    sets = {"val": open_source("scenes@val", split="val")}
    sets |= {f"block {n}": Block(train, 5_000_000 + 1000 * n, 1000) for n in range(arguments.blocks)}
    rows = []
    for name, source in sets.items():
        rows.append({"set": name, **scores(model, source)})
        print(rows[-1], flush=True)
    losses = {store: [row["fp32"] - row[store] for row in rows] for store in STORES[1:]}
    result = {
        "teacher": arguments.teacher,
        "rows": rows,
        "points_lost": {store: {"mean": sum(x) / len(x), "most": max(x)} for store, x in losses.items()},
        "environment": describe_environment(),
    }
    print(json.dumps(result["points_lost"], indent=2))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def scores(model: Any, source: Any) -> dict[str, float]:
    """Mean R@1 of both directions, by store."""
    embedded = embed(model, source, batch_size=256, device="cpu")
    found: dict[str, float] = {}
    for store in STORES:
        sides = []
        for values in (embedded.images, embedded.texts):
            layout = RowLayout("global", store, (Field("image", None, (values.shape[1],)),))  # type: ignore[arg-type]
            # a row holds embeddings as the tower gives them; their length does not matter to a scale for each row
            decoded = layout.decode(layout.encode({"image": values.float()}))["image"]
            sides.append(torch.nn.functional.normalize(decoded, dim=-1))
        found[store] = retrieval(sides[0], sides[1], embedded.image_of_text)["mean_r@1"]
    return found


if __name__ == "__main__":
    main()
