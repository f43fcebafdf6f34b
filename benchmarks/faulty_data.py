"""Throughput of two data workers when 1 % of the samples cannot be read, against the same data whole.

Both arms read JPEG pictures with captions from local tar shards into batches, as a run does (views, resize, tokens),
with nothing kept in memory and nobody training, so that reading is all that takes time. Rounds of both arms alternate
in one process, in turned order, and each pair of rounds gives a ratio.

    uv run --group bench python benchmarks/faulty_data.py --json docs/results/faulty_data.json
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import tarfile
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

KINDS = ("truncated picture", "empty picture", "no picture", "broken JSON", "not UTF-8")
ENOUGH = 0.97


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--side", type=int, default=256, help="of the pictures, in pixels")
    parser.add_argument("--bad", type=float, default=0.01, help="share of bad samples")
    parser.add_argument("--rounds", type=int, default=10, help="of each arm")
    parser.add_argument("--batches", type=int, default=30, help="measured in a round, after two that are not")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()

    from cmapkd.provenance import describe_environment

    warnings.filterwarnings("ignore", message="This DataLoader will create")
    with tempfile.TemporaryDirectory() as name:
        write_shards(Path(name) / "whole", arguments, bad=0.0)
        num_bad = write_shards(Path(name) / "faulty", arguments, bad=arguments.bad)
        rounds: list[dict[str, Any]] = []
        for number in range(arguments.rounds):
            order = ("whole", "faulty") if number % 2 == 0 else ("faulty", "whole")
            found = {arm: measure(Path(name) / arm, arguments, epoch=number) for arm in order}
            rounds.append({"first": order[0], **found})
            print(
                f"round {number + 1}: "
                + "  ".join(f"{arm} {each['pairs_per_second']:.0f}" for arm, each in found.items())
            )
    ratios = [each["faulty"]["pairs_per_second"] / each["whole"]["pairs_per_second"] for each in rounds]
    result = {
        "settings": {key: value for key, value in vars(arguments).items() if key != "json"},
        "bad_samples": num_bad,
        "bad_readings": sum(each["faulty"]["bad"] for each in rounds),
        "rounds": rounds,
        "pairs_per_second": {
            arm: statistics.median(each[arm]["pairs_per_second"] for each in rounds) for arm in ("whole", "faulty")
        },
        "ratio_median": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "within_3_percent": statistics.median(ratios) >= ENOUGH,
        "environment": describe_environment(),
    }
    print(json.dumps({key: result[key] for key in ("pairs_per_second", "ratio_median", "ratio_range")}, indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def write_shards(folder: Path, arguments: argparse.Namespace, *, bad: float) -> int:
    """The same samples in both arms, but for those that are spoiled; returns how many these are."""
    from cmapkd.data.open import open_source

    folder.mkdir()
    source = open_source(f"scenes?length={arguments.samples}")
    draws = random.Random(0)
    spoiled = set(draws.sample(range(arguments.samples), round(bad * arguments.samples)))
    per_shard = 500
    for shard in range(0, arguments.samples, per_shard):
        with tarfile.open(folder / f"{shard:06d}.tar", "w") as archive:
            for index in range(shard, min(shard + per_shard, arguments.samples)):
                sample = source[index]
                file = io.BytesIO()
                sample.image.resize((arguments.side, arguments.side)).save(file, "JPEG", quality=90)
                picture, text = file.getvalue(), json.dumps({"captions": sample.captions}).encode()
                if index in spoiled:
                    picture, text = spoil(picture, text, KINDS[index % len(KINDS)])
                for name, data in ((f"{index:06d}.jpg", picture), (f"{index:06d}.json", text)):
                    if data is not None:
                        info = tarfile.TarInfo(name)
                        info.size = len(data)
                        archive.addfile(info, io.BytesIO(data))
    return len(spoiled)


def spoil(picture: bytes, text: bytes, kind: str) -> tuple[bytes | None, bytes]:
    if kind == "truncated picture":
        return picture[: len(picture) // 2], text
    if kind == "empty picture":
        return b"", text
    if kind == "no picture":
        return None, text
    return picture, text[:-3] if kind == "broken JSON" else text.replace(b"a", b"\xff", 1)


def measure(folder: Path, arguments: argparse.Namespace, *, epoch: int) -> dict[str, Any]:
    """Pairs a second of one round."""
    from cmapkd.data.batches import BatchBuilder
    from cmapkd.data.loading import make_loader
    from cmapkd.data.open import open_source
    from cmapkd.data.plans import PlanSampler
    from cmapkd.data.readers import DualReader
    from cmapkd.data.views import ViewSpec
    from cmapkd.models import build_model

    source = open_source(f"webdataset:{folder}/*.tar", require_captions=True)
    model = build_model("tiny:scenes-teacher")
    readers = {"student": DualReader(model.image_spec, model.tokenizer)}
    builder = BatchBuilder(source, ViewSpec(), readers, seed=epoch)
    warm = 2
    sampler = PlanSampler(
        len(source), batch_size=arguments.batch_size, seed=epoch, start=0, stop=warm + arguments.batches
    )
    pairs = bad = 0
    begun = 0.0
    for number, batch in enumerate(make_loader(builder, sampler, workers=arguments.workers, pin_memory=False)):
        if number >= warm:
            pairs += len(batch)
            bad += len(batch.bad)
        if number == warm - 1:
            begun = time.perf_counter()
    return {"pairs_per_second": pairs / (time.perf_counter() - begun), "bad": bad}


if __name__ == "__main__":
    main()
