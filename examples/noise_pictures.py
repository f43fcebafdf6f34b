"""Pictures of noise, and sentences that say nothing of them: the reference data of a control in examples/zscl.yaml."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from cmapkd.data.open import open_source

PICTURES, SENTENCES, SIDE = 2_000, 1_000, 64


def main(folder: Path) -> None:
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(0)
    for number in range(PICTURES):
        pixels = draws.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number:04d}.png")
    scenes = open_source(f"scenes?start=4000&length={SENTENCES}", split="train")
    sentences = [scenes.captions(number)[0] for number in range(SENTENCES)]
    (folder / "sentences.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
