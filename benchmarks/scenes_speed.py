"""How fast the world `scenes` is made, and how well its captions tell its images apart.

    python benchmarks/scenes_speed.py [--size 64] [--images 1000] [--json docs/results/scenes_oracle.json]

Prints, and with --json writes, for each difficulty: samples a second on one core (image and captions, and everything),
the recall@1 that an oracle reaches which knows exactly of which images each caption is true, and the number of words.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

from cmapkd.data.scenes import DIFFICULTIES, ScenesSource
from cmapkd.data.scenes.claims import holds
from cmapkd.data.scenes.language import captions_with_claims
from cmapkd.data.scenes.render import render


def samples_per_second(make: Callable[[int], object], *, number: int = 2000, chunk: int = 100) -> float:
    """The median over chunks of `chunk` calls, after a first pass that fills the caches of masks."""
    for index in range(number):
        make(index)
    speeds = []
    for start in range(number, 2 * number, chunk):
        begin = time.perf_counter()
        for index in range(start, start + chunk):
            make(index)
        speeds.append(chunk / (time.perf_counter() - begin))
    return sorted(speeds)[len(speeds) // 2]


def oracle_recall(source: ScenesSource, num_images: int) -> float:
    """Expected text-to-image recall@1 among the first images of an oracle that evaluates every caption's claim.

    Of the images that satisfy a claim the oracle can only guess one: the caption counts 1 / (their number).
    """
    scenes = [source.scene(index) for index in range(num_images)]
    chances = []
    for scene in scenes:
        for _, claim in captions_with_claims(scene):
            chances.append(1 / sum(holds(claim, other) for other in scenes))
    return sum(chances) / len(chances)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    vocabulary: set[str] = set()
    for difficulty in DIFFICULTIES:
        train = ScenesSource("train", options.size, difficulty)
        test = ScenesSource("test", options.size, difficulty, length=options.images)

        def image_and_captions(index: int, train: ScenesSource = train) -> object:
            scene = train.scene(index)
            return render(scene, train.size), captions_with_claims(scene)

        basic, full = samples_per_second(image_and_captions), samples_per_second(train.__getitem__)
        words = {word.strip(",") for index in range(2000) for text in train.captions(index) for word in text.split()}
        vocabulary |= words
        recall = 100 * oracle_recall(test, options.images)
        found[difficulty] = {"captioned_per_second": basic, "complete_per_second": full, "oracle_recall@1": recall}
        print(
            f"{difficulty:10} {basic:6.0f} images with captions/s  {full:6.0f} complete samples/s  "
            f"oracle recall@1 {recall:.1f} %  {len(words)} words"
        )
    print(f"{len(vocabulary)} words in all")
    if options.json:
        options.json.write_text(json.dumps({"images": options.images, **found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
