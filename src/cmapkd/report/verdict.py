"""The verdict on a run: at most three sentences, by rules, and the worst first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cmapkd.compare.metric import lower_is_better, metric_digits, metric_label
from cmapkd.compare.statistics import Estimate, paired_difference
from cmapkd.evaluation.tasks import Headline
from cmapkd.methods import METHODS
from cmapkd.models import GenerativeModel
from cmapkd.report.arms import Arm
from cmapkd.report.blocks import Paragraph
from cmapkd.report.plain import mapping, number, sequence, string, whole
from cmapkd.report.read import ComparisonFolder, RunFolder, model_name, short_name
from cmapkd.report.scores import times_smaller

MOST = 3  # sentences
_FEW = 100  # pictures: with fewer, one picture moves a score by more than a point


def arm_verdict(arm: Arm) -> list[Paragraph]:
    """What a reader must know of a run, or of the same run with several seeds."""
    if not arm.finished:
        return [Paragraph(_unfinished(arm.first), "bad")]
    headline, path = arm.headline(), arm.headline_path()
    if headline is None or path is None:
        return [
            Paragraph("Nothing was scored: the recipe names no data.test and no data.val that serves a task.", "bad")
        ]
    difference = arm.difference(*path)
    runs = _runs(arm)
    said: list[Paragraph] = [runs] if runs.tone == "bad" else []
    if (worse := _worse(arm, headline, path, difference)) is not None:
        said.append(worse)
    if (kept := _kept(arm, headline, path)) is not None:
        said.append(kept)
    if difference is None:
        said.append(_no_baseline(arm))
    elif worse is None:
        said.append(_lead(arm, headline, difference))
    return said if runs.tone == "bad" else [*said, runs]


def arm_about(arm: Arm) -> str:
    """What was trained, on what and for how long, in a line."""
    config, metrics = arm.first.config, arm.first.metrics
    teacher, student = (model_name(config, role) for role in ("teacher", "student"))
    models = f"{teacher} to {student}" if teacher and student else student or teacher
    steps, batch = (whole(metrics, key) or whole(config, "training", key) for key in ("steps", "batch_size"))
    total = f" of {arm.first.cut_short[1]:,}" if arm.first.cut_short else ""
    data = string(config, "data", "train", longest=200)
    parts = [
        arm.method,
        models,
        None
        if steps is None
        else f"{steps:,}{total} steps" + (f" with {batch:,} {_samples(arm.method)} each" if batch else ""),
        None if data is None else f"on {short_name(data)}",
    ]
    return ", ".join(part for part in parts if part)


def _samples(method: str) -> str:
    """What a batch has so many of."""
    return "samples" if method in METHODS.own and issubclass(METHODS[method].reads, GenerativeModel) else "pairs"


def _unfinished(run: RunFolder) -> str:
    """How far a run came, and how it goes on."""
    last = max((step for line in run.log if (step := whole(line, "step")) is not None), default=0)
    total = whole(run.config, "training", "steps")
    reached = f" It logged step {last:,}" + (f" of {total:,}." if total else ".") if last else ""
    damaged = any(note.startswith("metrics.json ") for note in run.notes)
    why = (
        "Its metrics.json is damaged, so it has no scores."
        if damaged
        else "This run is not finished: it has no scores."
    )
    return f"{why}{reached} Go on with cmapkd distill RECIPE --out FOLDER --resume, in Python with resume=True."


def _worse(arm: Arm, headline: Headline, path: Sequence[str], difference: Estimate | float | None) -> Paragraph | None:
    """Only of a difference that is resolved, or of one seed; `_lead` says the others."""
    mean = difference.mean if isinstance(difference, Estimate) else difference
    student, baseline = arm.mean("student", *path), arm.mean("baseline", *path)
    if mean is None or mean >= 0 or student is None or baseline is None:
        return None
    if _resolves_nothing(difference, headline):
        return None
    interval = f", 95 % interval {_bounds(difference, headline)}" if isinstance(difference, Estimate) else ""
    points = " points" if headline.unit == "percent" else ""
    text = (
        f"The student is worse than {_baseline(arm)}: {headline.head} {headline.shown(student.value)} against "
        f"{headline.shown(baseline.value)} ({headline.shown(mean, '+')}{points}{interval})."
    )
    return Paragraph(text, "bad")


def _kept(arm: Arm, headline: Headline, path: Sequence[str]) -> Paragraph | None:
    """What share of the teacher's score is kept, at what share of its size."""
    student, teacher = arm.mean("student", *path), arm.mean("teacher", *path)
    if student is None:
        return None
    sizes = [arm.mean(role, "params") for role in ("teacher", "student")]
    smaller = None if None in sizes else times_smaller(*(size.value for size in sizes if size is not None))
    reached = f"The student reaches {headline.shown(student.value)} in {headline.head}"
    few = _few(arm, path)
    if teacher is None:
        return Paragraph(f"{reached}; no teacher was measured beside it.{few}")
    chance = _chance(arm, path)
    if chance is not None and teacher.value <= chance[0] + 2 * chance[1]:
        text = (
            f"{reached}. Its teacher, with {headline.shown(teacher.value)}, is not clearly above chance "
            f"({headline.shown(chance[0])}), so a share of it would say nothing."
        )
        return Paragraph(text + few, "bad")
    if headline.unit != "percent" or teacher.value <= 0:  # a share of it would say nothing
        beside = f"{reached}, its teacher {headline.shown(teacher.value)}"
        return Paragraph(beside + (f", with {smaller} times fewer parameters." if smaller else ".") + few)
    text = (
        f"The student keeps {100 * student.value / teacher.value:z.0f} % of the teacher's {headline.head} "
        f"({headline.shown(student.value)} of {headline.shown(teacher.value)})"
    )
    return Paragraph(text + (f" with {smaller} times fewer parameters." if smaller else ".") + few)


def _chance(arm: Arm, path: Sequence[str]) -> tuple[float, float] | None:
    """Percent that guessing reaches, and its standard deviation on so many pictures; None where it is not known."""
    count = {"zero_shot": "num_classes", "retrieval": "num_images"}.get(path[0])
    options, pictures = (None if key is None else arm.mean("teacher", path[0], key) for key in (count, "num_images"))
    if options is None or pictures is None or options.value < 1 or pictures.value < 1:
        return None
    share = 1 / options.value
    return 100 * share, 100 * (share * (1 - share) / pictures.value) ** 0.5


def _few(arm: Arm, path: Sequence[str]) -> str:
    """Of how few pictures the scores are; empty where there are enough."""
    pictures = arm.mean("student", path[0], "num_images")
    if pictures is None or not 1 <= pictures.value < _FEW:
        return ""
    count = round(pictures.value)
    return f" Scores are of {count} picture{'s'[: count != 1]}: one is {100 / count:.1f} points."


def _lead(arm: Arm, headline: Headline, difference: Estimate | float) -> Paragraph:
    gap = arm.gap()
    closed = "" if gap is None else f" and closes {gap.value:z.0f} % of the gap to the teacher"
    if not isinstance(difference, Estimate):
        if _resolves_nothing(difference, headline):
            least = headline._replace(digits=headline.digits + 1).amount(_least(headline))
            return Paragraph(f"It differs from {_baseline(arm)} by less than {least}.", "bad")
        return Paragraph(f"It leads {_baseline(arm)} by {headline.amount(difference)}{closed}.")
    if _resolves_nothing(difference, headline):
        text = (
            f"The difference to {_baseline(arm)} is not resolved: {headline.amount(difference.mean, '+')}, 95 % "
            f"interval {_bounds(difference, headline)}."
        )
        return Paragraph(text, "bad")
    by = f"{headline.amount(difference.mean)} ({_bounds(difference, headline)})"
    text = f"It leads {_baseline(arm)} by {by}{closed}."
    return Paragraph(text, "good")


def _resolves_nothing(difference: Estimate | float | None, headline: Headline) -> bool:
    """Whether the interval holds 0; of one seed, whether the decimals of the headline show no difference."""
    if isinstance(difference, Estimate):
        return difference.interval[0] <= 0 <= difference.interval[1]
    return difference is not None and abs(difference) < _least(headline)


def _least(headline: Headline) -> float:
    """Less is shown as 0."""
    return 0.5 * 0.1**headline.digits


def _baseline(arm: Arm) -> str:
    return "the same student trained alone" if arm.baseline_name in ("scratch", "sft") else arm.baseline_name


def _no_baseline(arm: Arm) -> Paragraph:
    if arm.scores("teacher"):
        return Paragraph(
            "There is no baseline, so it is not known what the teacher brought: set baseline: scratch in the recipe.",
            "bad",
        )
    return Paragraph("No teacher and no baseline were measured, so these scores stand alone.", "quiet")


def _runs(arm: Arm) -> Paragraph:
    """How many runs the numbers are of; bad where one is missing or was not trained to its end."""
    count, missing = len(arm.finished), len(arm.runs) - len(arm.finished)
    if missing:
        left = "one seed is left, so chance is not excluded" if count == 1 else f"numbers are means of {count} seeds"
        verb = "is" if missing == 1 else "are"
        return Paragraph(f"{missing} of {len(arm.runs)} runs {verb} not finished and in no number here; {left}.", "bad")
    if arm.first.cut_short is not None:
        step, total = arm.first.cut_short
        left = "one seed, so chance is not excluded" if count == 1 else f"means of {count} seeds"
        return Paragraph(
            f"Training did not reach its end: scores are of step {step:,} of {total:,}, and {left}.", "bad"
        )
    if count == 1:
        return Paragraph("This is one run with one seed: chance is not excluded.")
    return Paragraph(f"Numbers are means of {count} seeds; intervals are over seeds.")


def _bounds(estimate: Estimate, headline: Headline) -> str:
    return " to ".join(headline.shown(bound, "+") for bound in estimate.interval)


# ------------------------------------------------------------------------------------------------ comparisons


def comparison_verdict(comparison: ComparisonFolder) -> list[Paragraph]:
    """What a reader must know of a comparison."""
    if not comparison.results:
        text = (
            f"This comparison is not finished: {comparison.num_finished} of {comparison.num_runs} runs that were begun "
            "ended, and there is no table yet. Give its command once more."
        )
        return [Paragraph(text, "bad")]
    said: list[Paragraph] = []
    records = [mapping(each) for each in sequence(comparison.results, "runs")]
    lost = [each for each in records if string(each, "status") not in ("finished", None)]
    if lost:
        text = f"{len(lost)} of {len(records)} runs failed or are missing; the same command tries them again."
        said.append(Paragraph(text, "bad"))
    tables = [mapping(each) for each in sequence(comparison.results, "tables")]
    contrasts = _distinct([mapping(each) for table in tables for each in sequence(table, "contrasts")])
    said += _declared(contrasts) if contrasts else [_best(tables[0])] if tables else []
    if contrasts or not tables:
        return said[:MOST]
    said.append(Paragraph("No contrast was declared, so no difference has a verdict; intervals are uncorrected."))
    return said[:MOST]


def _distinct(contrasts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One that stands in two tables counts once, as in Holm's correction."""
    names, numbers = ("arm", "against", "metric"), ("difference", "p")
    found: dict[tuple[str | float | None, ...], Mapping[str, Any]] = {}
    for each in contrasts:
        found.setdefault((*(string(each, key) for key in names), *(number(each, key) for key in numbers)), each)
    return list(found.values())


def _declared(contrasts: Sequence[Mapping[str, Any]]) -> list[Paragraph]:
    """How many declared contrasts are resolved, and the first of them."""
    resolved = [each for each in contrasts if string(each, "verdict") in ("above", "below", "equal")]
    text = f"{len(resolved)} of {len(contrasts)} declared contrasts are resolved at 5 %, with Holm's correction."
    said = [Paragraph(text, "" if resolved else "bad")]
    worse = [each for each in resolved if _is_worse(each)]
    first = next(iter(worse or resolved), None)
    if first is not None:
        arm, against, verdict = (string(first, key) or "?" for key in ("arm", "against", "verdict"))
        difference, bounds = number(first, "difference"), sequence(first, "interval")
        low, high = (number({"bound": bound}, "bound") for bound in bounds) if len(bounds) == 2 else (None, None)
        how = "is equal to" if verdict == "equal" else f"is {verdict}"
        metric = string(first, "metric") or ""
        digits = metric_digits(metric)
        interval = "" if low is None or high is None else f", 95 % interval {low:+z.{digits}f} to {high:+z.{digits}f}"
        by = "" if difference is None else f" by {difference:+z.{digits}f}{interval}"
        shown = interval if difference is not None and verdict == "equal" else by
        lower = f" ({metric_label(metric)}: lower is better)" if lower_is_better(metric) else ""
        said.append(Paragraph(f"{arm} {how} {against}{shown}{lower}.", "bad" if worse else "good"))
    return said


def _is_worse(contrast: Mapping[str, Any]) -> bool:
    verdict = string(contrast, "verdict")
    return verdict == ("above" if lower_is_better(string(contrast, "metric") or "") else "below")


def _best(table: Mapping[str, Any]) -> Paragraph:
    """The row with the best mean, and its difference to the reference."""
    metric = next((text for each in sequence(table, "metrics") if (text := string({"m": each}, "m"))), None)
    rows = [mapping(each) for each in sequence(table, "rows")]
    means = [
        (value, row)
        for row in rows
        if metric is not None and (value := number(row, "metrics", metric, "summary", "mean")) is not None
    ]
    if not means or metric is None:
        return Paragraph("No run of the first table has a score.", "bad")
    lower = lower_is_better(metric)
    means.sort(key=lambda pair: pair[0], reverse=not lower)
    value, best = means[0]
    digits = metric_digits(metric) + (abs(value) < 1)
    text = (
        f"{string(best, 'row')} has the {'lowest' if lower else 'highest'} {metric_label(metric)} of the trained arms: "
        f"{value:z.{digits}f}"
    )
    if len(means) > 1 and (doubt := _doubt(best, means[1][1], metric, digits)):
        return Paragraph(f"{text}. {doubt}", "bad")
    difference = number(best, "metrics", metric, "difference", "mean")
    if difference is None:
        return Paragraph(text + ".")
    bounds = [
        number({"bound": bound}, "bound") for bound in sequence(best, "metrics", metric, "difference", "interval")
    ]
    known = [f"{bound:+z.{digits}f}" for bound in bounds if bound is not None]
    interval = f", 95 % interval {' to '.join(known)}" if len(known) == 2 else ""
    return Paragraph(f"{text}, {difference:+z.{digits}f} from {string(table, 'reference')}{interval}.")


def _doubt(best: Mapping[str, Any], second: Mapping[str, Any], metric: str, digits: int) -> str:
    """Why the best row may not be better than the next one; empty where the seeds tell them apart."""
    of_both = [
        {seed: value for seed in values if (value := number(values, seed)) is not None}
        for row in (best, second)
        for values in [mapping(row, "metrics", metric, "values")]
    ]
    paired = paired_difference(
        *({int(seed): value for seed, value in each.items() if seed.isdigit()} for each in of_both)
    )
    if paired is None:
        return ""
    beside = f"Its difference to {string(second, 'row')}, {paired.mean:+z.{digits}f},"
    if len(paired.seeds) == 1:
        return f"{beside} is of one seed, so chance is not excluded."
    if paired.spreadless:
        return f"{beside} is the same in all {len(paired.seeds)} seeds, which show no spread to judge chance by."
    low, high = paired.interval or (0.0, 0.0)
    if low <= 0 <= high:
        return f"{beside} is not resolved: 95 % interval {low:+z.{digits}f} to {high:+z.{digits}f}."
    return ""
