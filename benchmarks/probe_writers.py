"""What the vision tower of a model that writes knows of drawn pictures, for each finished run of a comparison.

    uv run python benchmarks/probe_writers.py runs/move_kd_effect docs/results/move_kd_probes --smallest 2

A linear probe reads an attribute of the largest object, or the background's colour, off the mean of a picture's visual
tokens: those of the vision tower (`encoded`), or the states behind a layer of the language model (`--layer blocks.1`).
It is a ridge regression onto one-hot classes. Its penalty is chosen on the last fifth of its training pictures.

Writes NAME.csv with a row for each run, and NAME.json with the contrasts that the comparison declares, on the mean of
the probes: t intervals over seeds, and verdicts as `compare` gives them.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

ATTRIBUTES = ("colour", "shape", "texture", "background")
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
METRIC = "probe.mean"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the comparison")
    parser.add_argument("name", type=Path, help="of the two files, without an ending")
    parser.add_argument("--layer", help="a level of the language model; by default the vision tower's tokens are read")
    parser.add_argument("--learn", default="scenes@val?start=10000&length=1500", help="the probe's pictures")
    parser.add_argument("--test", default="scenes@val?start=20000&length=1000")
    parser.add_argument("--smallest", type=float, required=True, help="the declared smallest difference, in points")
    arguments = parser.parse_args()
    told = json.loads((arguments.folder / "results.json").read_text(encoding="utf-8"))
    rows = []
    with (arguments.folder / "results.csv").open(encoding="utf-8", newline="") as stream:
        for run in csv.DictReader(stream):
            if run["status"] == "finished":
                student = str(arguments.folder / "runs" / run["run"] / "student")
                scores = probed(student, arguments.learn, arguments.test, arguments.layer)
                rows.append({"arm": run["arm"], "seed": run["seed"], **scores})
                print(rows[-1], flush=True)
    with arguments.name.with_suffix(".csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    kept = {
        "learn": arguments.learn,
        "test": arguments.test,
        "layer": arguments.layer,
        "contrasts": contrasts(rows, told["comparison"]["contrasts"], arguments.smallest),
    }
    arguments.name.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print(arguments.name)


def probed(name: str, learn: str, test: str, layer: str | None) -> dict[str, float]:
    """Percent of the test pictures whose attribute the probe names, and the mean over attributes."""
    import cmapkd

    model: Any = cmapkd.load(name).eval()
    states, labels = seen(model, learn, layer)
    others, truth = seen(model, test, layer)
    scores = {f"probe.{each}": ridge(states, labels[each], others, truth[each]) for each in ATTRIBUTES}
    return {METRIC: sum(scores.values()) / len(scores), **scores}


def seen(model: Any, source: str, layer: str | None) -> tuple[Any, dict[str, list[str]]]:
    """Means of visual tokens, Float[pictures width], and what the pictures show."""
    import torch

    from cmapkd.data.dialogues import Turn, join_items
    from cmapkd.data.open import open_source
    from cmapkd.models import TokenNeeds

    samples, means = open_source(source), []
    labels: dict[str, list[str]] = {each: [] for each in ATTRIBUTES}
    dialogue = (Turn("user", "?", 1), Turn("assistant", "a"))
    needs = TokenNeeds(where=frozenset({"visual"}), levels=(layer,)) if layer else TokenNeeds(encoded=True)
    for start in range(0, len(samples), 50):
        some = [samples[number] for number in range(start, min(start + 50, len(samples)))]
        items = [model.processor.read(dialogue, [sample.image]) for sample in some]
        with torch.no_grad():
            found = model(join_items(items, model.vocabulary.pad_id), needs)
        means.append(found.encoded.mean(1) if layer is None else by_picture(found.levels[layer]["visual"], len(some)))
        for sample in some:
            largest, background = sample.scene.objects[0], sample.scene.background.colour
            for each in ATTRIBUTES:
                labels[each].append(background if each == "background" else getattr(largest, each))
    return torch.cat(means).float(), labels


def by_picture(rows: Any, number: int) -> Any:
    """The mean of the visual rows of each dialogue."""
    import torch

    return torch.stack([rows.values[rows.sample == each].mean(0) for each in range(number)])


def ridge(states: Any, labels: list[str], others: Any, truth: list[str]) -> float:
    """Accuracy in percent of a ridge regression onto one-hot classes, with standardised inputs."""
    import torch

    names = sorted(set(labels))
    one_hot = torch.tensor([[float(name == label) for name in names] for label in labels], dtype=torch.float64)
    mean, spread = states.mean(0), states.std(0).clamp(min=1e-6)

    def inputs(values: Any) -> Any:
        scaled = ((values - mean) / spread).double()
        return torch.cat([scaled, scaled.new_ones(len(scaled), 1)], 1)

    def right(penalty: float, upto: int, questions: Any, answers: list[str]) -> float:
        given = inputs(states[:upto])
        square = given.T @ given + penalty * upto * torch.eye(given.shape[1], dtype=torch.float64)
        chosen = (inputs(questions) @ torch.linalg.solve(square, given.T @ one_hot[:upto])).argmax(1)
        return (
            100 * sum(names[at] == answer for at, answer in zip(chosen.tolist(), answers, strict=True)) / len(answers)
        )

    learned = len(labels) * 4 // 5
    penalty = max(PENALTIES, key=lambda each: right(each, learned, states[learned:], labels[learned:]))
    return right(penalty, len(labels), others, truth)


def contrasts(rows: list[dict[str, Any]], declared: list[dict[str, Any]], smallest: float) -> dict[str, Any]:
    """The comparison's pairs of arms, each once, by arms and metric."""
    from cmapkd.compare.statistics import paired_difference
    from cmapkd.compare.verdicts import Contrast, judge

    values: dict[str, dict[int, float]] = {}
    for row in rows:
        values.setdefault(row["arm"], {})[int(row["seed"])] = row[METRIC]
    asked = []
    for arm, against in dict.fromkeys((each["arm"], each["against"]) for each in declared):
        difference = paired_difference(values[arm], values[against])
        estimate = difference.estimate if difference else None
        asked.append(Contrast(arm, against, METRIC, smallest, difference, estimate, (arm, against)))
    return {f"{each.contrast.arm} - {each.contrast.against}": {METRIC: told(each)} for each in judge(asked)}


def told(tested: Any) -> dict[str, Any]:
    contrast, estimate = tested.contrast, tested.contrast.estimate
    low, high = estimate.interval if estimate else (None, None)
    return {
        "metric": METRIC,
        "difference": contrast.difference and contrast.difference.mean,
        "low": low,
        "high": high,
        "p": tested.p,
        "p_holm": tested.p_holm,
        "p_equal_holm": tested.p_equal_holm,
        "smallest": contrast.smallest,
        "covers": "seeds",
        "verdict": tested.verdict,
        "reason": tested.reason,
    }


if __name__ == "__main__":
    main()
