"""What a run logged over its steps: losses, validation, rates, and the weights that a selection gave."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from cmapkd.report.arms import Arm, curves_of
from cmapkd.report.blocks import Block, Details, Figure, Figures, Paragraph
from cmapkd.report.figures import Curve, lines, stacked, thinned
from cmapkd.report.plain import mapping, number

Curves = Mapping[str, list[list[tuple[float, float]]]]

_MOST = 24  # drawings of a section
_NOT_DRAWN = ("num_images", "num_texts", "score")  # of validation: constants, and another number again
_WEIGHT = re.compile(r"^(?:(.*)/)?weight/([^/]+)$")
_UNIFORM = 0.05  # a share this near to equal ones, relative to them, counts as equal
_NAMES = {
    "learning_rate": "learning rate",
    "gradient_norm": "norm of the gradient",
    "pairs_per_second": "pairs a second",
    "logit_scale": "logit scale",
}


def training_blocks(arms: Sequence[Arm]) -> list[Block]:
    """Curves of each arm: validation first, then the loss and its terms, then the rest behind a line."""
    blocks: list[Block] = []
    for arm in arms:
        student, baseline = curves_of(arm, lambda run: run.log), curves_of(arm, lambda run: run.baseline_log)
        if not student:
            blocks.append(Paragraph(f"{arm.name} logged nothing: it has no metrics.jsonl that can be read.", "quiet"))
            continue
        if len(arms) > 1:
            blocks.append(Paragraph(arm.name))
        validation = [key for key in student if key.startswith("validation/") and key.split("/")[1] not in _NOT_DRAWN]
        terms = [key for key in student if key.startswith("terms/")]
        rest = [key for key in _NAMES if key in student]
        other = [key for key in student if "/" not in key and key not in (*_NAMES, "loss")]
        beside = [key for key in student if f"{key.partition('/')[0]}/seconds" in student]
        first = [_drawn(key, student, baseline, arm) for key in [*validation, "loss"] if key in student]
        blocks.append(Figures(first[:_MOST]))
        groups = (
            ("Terms of the loss, unweighted", terms),
            ("What the method does beside its step", beside),
            ("Rates and norms", [*rest, *other]),
        )
        for title, keys in groups:
            if keys:
                figures = [_drawn(key, student, baseline, arm) for key in keys[:_MOST]]
                blocks.append(Details(title, [Figures(figures)]))
        best = dict.fromkeys(
            run.metrics["best_step"] for run in arm.finished if isinstance(run.metrics.get("best_step"), int)
        )
        if best:
            blocks.append(Paragraph(f"Best validation at step {', '.join(map(str, best))}."))
        if (parts := _parts(arm)) is not None:
            blocks.append(parts)
        if not validation:
            text = "No validation was logged: set training.evaluate_every to see scores over steps."
            blocks.append(Paragraph(text, "quiet"))
    return blocks


def _parts(arm: Arm) -> Paragraph | None:
    """Seconds of training by part, where there is more than reading and steps; of several seeds the means."""
    runs = [mapping(run.metrics, "seconds_by_part") for run in arm.finished]
    names = dict.fromkeys(name for parts in runs for name in parts)
    if not {*names} - {"reading", "steps"}:
        return None
    means = {name: sum(number(parts, name) or 0.0 for parts in runs) / len(runs) for name in names}
    total = sum(means.values()) or 1.0
    told = ", ".join(f"{name} {seconds:,.1f} s ({100 * seconds / total:.0f} %)" for name, seconds in means.items())
    return Paragraph(f"Training by part: {told}.")


def _drawn(key: str, student: Curves, baseline: Curves, arm: Arm) -> Figure:
    """One logged number: the student, and the baseline where it logged the same."""
    name = _NAMES.get(key) or key.removeprefix("terms/").replace("validation/", "validation ").replace("_", " ")
    curves = [Curve("student", points, 0) for points in student[key]]
    if key != "loss":  # a sum of other terms is no other loss's measure
        curves += [Curve(arm.baseline_name, points, 2) for points in baseline.get(key, [])]
    return lines(name.replace("r@", "R@"), curves, dotted=key.startswith("validation/"))


def weight_blocks(arms: Sequence[Arm]) -> list[Block]:
    """The weights of levels and terms over steps, where a weighting chose any; empty for other runs."""
    blocks: list[Block] = []
    figures: list[Figure] = []
    for arm in arms:
        curves = curves_of(arm, lambda run: run.log)
        groups: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for key, runs in curves.items():
            if (found := _WEIGHT.match(key)) is not None:
                groups.setdefault(found[1] or "weights", {})[found[2]] = runs[0]  # of the first seed
        for group, items in groups.items():
            if not _moved(items):
                continue  # the weighting `uniform`, which is no selection
            if (figure := _area(f"{arm.name}: {group}", items)) is not None:
                figures.append(figure)
                if (told := _uniform(f"{arm.name}: {group}", items)) is not None:
                    blocks.append(told)
    seeds = any(len(arm.runs) > 1 for arm in arms)
    about = "Each item's share of the weights, over steps" + (", in the first seed." if seeds else ".")
    return [Paragraph(about), Figures(figures), *blocks] if figures else []


def _moved(items: Mapping[str, Sequence[tuple[float, float]]]) -> bool:
    """Whether any weight of the group ever differed from another one, by more than rounding."""
    values = [value for points in items.values() for _, value in points]
    return max(values) - min(values) > 1e-6 * max(abs(value) for value in values)


def _area(caption: str, items: Mapping[str, Sequence[tuple[float, float]]]) -> Figure | None:
    """Shares at the steps that all items logged; None where the weights are no shares or there is one item."""
    by_step = {name: dict(points) for name, points in items.items()}
    common = sorted(set.intersection(*(set(each) for each in by_step.values())))
    steps = [x for x, _ in thinned([(step, 0.0) for step in common])]
    steps = [step for step in dict.fromkeys(steps) if _total(by_step, step) > 0]
    if len(items) < 2 or not steps or any(value < 0 for each in by_step.values() for value in each.values()):
        return None
    shares = [[each[step] / _total(by_step, step) for each in by_step.values()] for step in steps]
    return stacked(caption, list(items), steps, shares)


def _uniform(caption: str, items: Mapping[str, Sequence[tuple[float, float]]]) -> Paragraph | None:
    """Says so where a selection ends with equal weights: it then chose nothing."""
    last = [points[-1][1] for points in items.values()]
    mean = sum(last) / len(last)
    if mean > 0 and all(abs(value - mean) <= _UNIFORM * mean for value in last):
        return Paragraph(f"{caption}: the weights end equal within 5 %, so nothing was selected.", "bad")
    return None


def _total(by_step: Mapping[str, Mapping[float, float]], step: float) -> float:
    return sum(each[step] for each in by_step.values())
