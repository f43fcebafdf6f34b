"""Scores picture by picture, from the ranks that runs keep, and differences resampled over seeds and pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from cmapkd.compare.bootstrap import Floats, Part, two_way_estimate
from cmapkd.compare.rows import config_digest
from cmapkd.compare.statistics import Estimate, PairedDifference
from cmapkd.evaluation.answer_scores import AnswerScore, load_answer_scores
from cmapkd.evaluation.picture_ranks import PictureRanks
from cmapkd.run.measure import RANKS

Kept = TypeVar("Kept")

_BOTH_WAYS = re.compile(r"retrieval\.mean_(r@\d+)")
_RETRIEVAL = re.compile(r"retrieval\.((?:i2t|t2i)\.(?:r@\d+|mean_rank))")
_ANSWERS = (
    "answering.overall",
    "answering.exact",
    "yes_no.accuracy",
    "perplexity.bits_per_byte",
    "perplexity.negative_bits_per_byte",
    "drafting.passes_per_token",
)
FOLDS = "folds"  # what an interval covers where each seed, or group of seeds, has test pictures of its own
_TOLERANCE = 0.02  # between a score and its pictures, in units of the metric; a committed table is rounded


class NoPictures(ValueError):
    """Why a difference cannot be resampled over pictures."""


class PictureScore(NamedTuple):
    """One mean over queries, picture by picture, in the metric's unit."""

    sums: Floats  # [pictures], over the picture's queries
    queries: Floats  # [pictures]

    @property
    def mean(self) -> float:
        return float(self.sums.sum() / self.queries.sum())


class PictureSource(Protocol):
    """Where the scores of a run's pictures can be had."""

    def scores(self, run: str, data: str, measure: str) -> tuple[str, PictureScore]:
        """A digest of the pictures, and their scores.

        Args:
            run: by the name that the source uses.
            data: name of further test data; "" for the run's own.
            measure: see `measures_of`.
        Raises:
            NoPictures: there are none.
        """


def measures_of(path: str) -> tuple[str, ...]:
    """The means over queries that a metric is the mean of: `retrieval.mean_r@1` is that of `i2t.r@1` and `t2i.r@1`.

    Args:
        path: the metric, without the name of its test data.
    Raises:
        NoPictures: the metric is no mean over pictures.
    """
    if match := _BOTH_WAYS.fullmatch(path):
        return f"i2t.{match[1]}", f"t2i.{match[1]}"
    if match := _RETRIEVAL.fullmatch(path):
        return (match[1],)
    if path in ("zero_shot.top1", "zero_shot.top5", "accuracy.top1", "accuracy.top5", *_ANSWERS):
        return (path,)
    raise NoPictures(f"{path} is no mean over pictures")


def score_pictures(ranks: PictureRanks, measure: str) -> PictureScore:
    """A measure by picture: recall and accuracy in percent, or the expected rank.

    Raises:
        NoPictures: the ranks do not have it.
    """
    task, _, name = measure.partition(".")
    if task not in ranks.ranks:
        raise NoPictures(f"the kept ranks have no {task}")
    counts = ranks.ranks[task]
    k = int(name.removeprefix("r@").removeprefix("top")) if name != "mean_rank" else None
    values = counts.expected() if k is None else 100 * counts.hits(k)
    captions = ranks.captions.numpy()
    queries = {"i2t": captions > 0, "t2i": captions}.get(task, ranks.labelled.numpy())
    picture = np.repeat(np.arange(len(captions)), queries.astype(int))  # of each query
    sums = np.bincount(picture, weights=values.numpy(), minlength=len(captions)).astype(float)
    return PictureScore(sums, queries.astype(float))


def split_metric(metric: str, data: Mapping[str, str]) -> tuple[str, str]:
    """A metric as the name of its test data, "" for the run's own, and its path there.

    Args:
        data: the comparison's further test data.
    """
    name, _, path = metric.partition(".")
    return (name, path) if name in data else ("", metric)


def ranks_name(name: str, source: str) -> str:
    """The file in a run folder that keeps the ranks on further test data.

    Args:
        name, source: as `evaluate` of the comparison has them.
    """
    return f"ranks-{re.sub(r'[^A-Za-z0-9_-]', '_', name)[:40]}-{config_digest(source)}.safetensors"


def is_of_answers(measure: str) -> bool:
    """Whether a measure is a score of what a model wrote."""
    return measure in _ANSWERS


class KeptRanks:
    """The ranks, or scores of answers, in the folders of a comparison's runs, each read when it is first asked for.

    Args:
        folders: of the runs, by digest.
        data: the comparison's further test data: name -> source.
    """

    def __init__(self, folders: Mapping[str, Path], data: Mapping[str, str]) -> None:
        self._folders, self._data = folders, data
        self._ranks: dict[Path, PictureRanks | NoPictures] = {}
        self._answers: dict[Path, dict[str, AnswerScore] | NoPictures] = {}

    def scores(self, run: str, data: str, measure: str) -> tuple[str, PictureScore]:
        """See `PictureSource`; a run is named by its digest."""
        if is_of_answers(measure):
            score = self._answer(run, data, measure)
            return score.digest, PictureScore(score.sums, score.weights)
        ranks = self.ranks(run, data)
        return ranks.digest, score_pictures(ranks, measure)

    def ranks(self, run: str, data: str) -> PictureRanks:
        """The ranks of a run on one of its test sets.

        Raises:
            NoPictures: none were kept, or the file is damaged.
        """
        return _kept(self._ranks, self._path(run, data), PictureRanks.load, "their runs keep no ranks of pictures")

    def _answer(self, run: str, data: str, measure: str) -> AnswerScore:
        path = self._path(run, data)
        scores = _kept(self._answers, path, load_answer_scores, "their runs keep no scores of single answers")
        if measure not in scores:
            raise NoPictures(f"the kept scores have no {measure}")
        return scores[measure]

    def _path(self, run: str, data: str) -> Path:
        return self._folders[run] / (ranks_name(data, self._data[data]) if data else RANKS)


def _kept(known: dict[Path, Kept | NoPictures], path: Path, load: Callable[[Path], Kept], why_not: str) -> Kept:
    """What a file holds, or why it holds nothing; read once."""
    if path not in known:
        try:
            known[path] = load(path)
        except FileNotFoundError:
            known[path] = NoPictures(why_not)
        except ValueError as error:
            known[path] = NoPictures(str(error))
    found = known[path]
    if isinstance(found, NoPictures):
        raise found
    return found


def resampled_difference(
    source: PictureSource,
    arm: Mapping[int, str],
    against: Mapping[int, str],
    data: str,
    path: str,
    difference: PairedDifference,
) -> Estimate | None:
    """The difference of two rows with its standard error over seeds and pictures.

    Seeds that share their pictures are resampled with them. Where folds give seeds pictures of their own, the mean
    difference of each fold is one number with the chance of its pictures in it, and the interval is their corrected t
    interval (`over_folds`).

    Args:
        arm, against: seed -> run, as `source` names it.
        data, path: the metric, see `split_metric`.
        difference: of the two rows' scores. Its seeds are used; the pictures must give the same differences.
    Returns:
        None with one seed.
    Raises:
        NoPictures: says why there is no such estimate. All seeds may agree at every picture, too.
    """
    measures = measures_of(path)
    folds: dict[str, list[float]] = {}  # digest of its pictures -> differences of its seeds
    sums: list[list[Floats]] = [[] for _ in measures]  # of each measure, seed by seed
    queries: list[Floats] = []
    for seed, expected in zip(difference.seeds, difference.differences, strict=True):
        means = []
        queries = []
        digests: set[str] = set()
        for place, measure in enumerate(measures):
            (digest, score), (other_digest, other) = (source.scores(run[seed], data, measure) for run in (arm, against))
            digests |= {digest, other_digest}
            if len(digests) > 1:
                raise NoPictures("the runs were tested on different pictures or captions")
            sums[place].append(score.sums - other.sums)
            queries.append(score.queries)
            means.append(score.mean - other.mean)
        kept = float(np.mean(means))
        if abs(kept - expected) > max(_TOLERANCE, 1e-4 * abs(expected)):
            raise NoPictures(f"the pictures of seed {seed} give a difference of {kept:.3f}, the scores {expected:.3f}")
        folds.setdefault(digests.pop(), []).append(expected)
    if len(folds) > 1:
        return over_folds([float(np.mean(each)) for each in folds.values()])
    estimate = two_way_estimate([Part(np.stack(rows), each) for rows, each in zip(sums, queries, strict=True)])
    if estimate is None and len(difference.seeds) > 1:
        raise NoPictures("every seed and picture has the same difference")
    return estimate


def over_folds(means: Sequence[float]) -> Estimate:
    """The mean of k folds' differences, with an error that allows for the training samples which the folds share.

    The squared error is s² (1/k + 1/(k - 1)) in place of s²/k, with the variance s² of the differences. The second term
    is the ratio of test to training samples where each fold tests what the others train on.

    Raises:
        NoPictures: the folds have no spread.
    Source: Nadeau and Bengio 2003, Machine Learning 52, 239-281, equation 9.
    """
    count = len(means)
    error = float(np.std(means, ddof=1)) * math.sqrt(1 / count + 1 / (count - 1))
    if not error:
        raise NoPictures("every fold has the same difference")
    return Estimate(float(np.mean(means)), error, count - 1, FOLDS)
