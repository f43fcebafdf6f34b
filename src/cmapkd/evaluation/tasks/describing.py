"""Task `describing`: a model that writes describes every picture, scored against the source's captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

from cmapkd.data.scenes.negatives import things_right
from cmapkd.data.types import Source
from cmapkd.data.unseen import unseen
from cmapkd.evaluation import caption_tools
from cmapkd.evaluation.captioning import caption_scores
from cmapkd.evaluation.dialogues import descriptions, lacking
from cmapkd.evaluation.subject import Subject
from cmapkd.evaluation.tasks.base import Column, Headline, Task
from cmapkd.evaluation.tools import MissingToolError
from cmapkd.evaluation.vqa import normalise_answer
from cmapkd.models.generative import GenerativeModel


class Describing(Task):
    title = "Describing pictures, times 100"
    reads = GenerativeModel
    alone = automatic = True
    headline = Headline("cider", ("shown", "cider"), "CIDEr-D", unit="CIDEr-D x 100")
    columns = (
        Column("BLEU-4", ("shown", "bleu_4")),
        Column("METEOR", ("shown", "meteor")),
        Column("ROUGE-L", ("shown", "rouge_l")),
        Column("CIDEr-D", ("shown", "cider")),
        Column("words in common, F1", ("word_f1",)),
        Column("exact match", ("exact",)),
        Column("right things", ("right_things",)),
        Column("words each", ("num_words",)),
        Column("empty %", ("empty",)),
        Column("without an end %", ("unended",)),
    )

    def missing(self, subject: Subject) -> str | None:
        bench = subject.bench
        return (
            None if descriptions(bench.annotations, bench.how) else lacking(bench.annotations, bench.how, "a caption")
        )

    def score(self, subject: Subject) -> dict[str, Any]:
        """Greedy descriptions; the metrics of the COCO tool only where it and Java are installed."""
        bench, writer, how = subject.bench, subject.writer, subject.bench.how
        asked = descriptions(bench.annotations, how)
        bench.say(f"{subject.name}: describing {len(asked):,} pictures of {bench.scored.name}")
        answers = writer.written(asked, most=how.caption_tokens)
        pairs = [(each, answer) for each, answer in zip(asked, answers, strict=True) if answer is not None]
        said = {each.sample: answer.text for each, answer in pairs}
        given = {each.sample: list(each.references) for each, _ in pairs}
        lengths = [len(text.split()) for text in said.values()]
        return (
            _tool_scores(said, given)
            | _things({each.index: answer.text for each, answer in pairs}, bench.scored)
            | {
                "word_f1": 100 * _mean([_word_f1(text, given[sample]) for sample, text in said.items()]),
                "exact": 100 * _mean([_is_exact(text, given[sample]) for sample, text in said.items()]),
                "num_words": _mean(lengths),
                "median_words": median(lengths),
                "reference_words": _mean([len(text.split()) for texts in given.values() for text in texts]),
                "empty": 100 * _mean([not text for text in said.values()]),
                "unended": 100 * _mean([not answer.ended for _, answer in pairs]),
                "num_images": len(said),
                "num_not_asked": len(asked) - len(pairs),
                "examples": dict(list(said.items())[:3]),
                "protocol": writer.protocol(max_new_tokens=how.caption_tokens, instruction=how.instruction),
            }
        )


def _tool_scores(said: dict[str, str], given: dict[str, list[str]]) -> dict[str, Any]:
    """The COCO tool's metrics, and times 100 in `shown`; without the tool `unavailable` says why there are none."""
    try:
        caption_tools.library_folder()
        caption_tools.java()
    except MissingToolError as error:
        return {"unavailable": str(error)}
    if len(said) < 2:
        return {"unavailable": "CIDEr-D weighs words by how rare they are among pictures: it needs two or more"}
    scores = caption_scores(said, given).to_dict()
    metrics = {name: value for name, value in scores.items() if not name.startswith("num_")}
    return metrics | {"shown": {name: 100 * value for name, value in metrics.items()}}


def _things(said: dict[int, str], source: Source) -> dict[str, Any]:
    """Of all coloured shapes that the descriptions name, how many are in their picture; nothing where nobody knows."""
    found = [things_right(unseen(source, index), text) for index, text in said.items()]
    right = [each for of_picture in found for each in of_picture or ()]
    if None in found or not right:
        return {}
    return {"right_things": 100 * sum(right) / len(right), "num_things": len(right)}


def _word_f1(text: str, references: Sequence[str]) -> float:
    """The best over the references: 2 x words in common / words of both, as `normalise_answer` writes them."""
    return max(_f1(normalise_answer(text).split(), normalise_answer(reference).split()) for reference in references)


def _f1(first: Sequence[str], second: Sequence[str]) -> float:
    common = sum((Counter(first) & Counter(second)).values())
    return 2 * common / (len(first) + len(second)) if first or second else 1.0


def _is_exact(text: str, references: Sequence[str]) -> bool:
    return normalise_answer(text) in {normalise_answer(reference) for reference in references}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
