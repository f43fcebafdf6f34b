"""`pictures.csv`: the scores of every run's pictures as text, small enough to be committed beside `results.csv`.

One row for each run, test set and measure. `values` has one byte a picture, its mean over the picture's queries in
1/240: 0 is a miss, 240 a hit, 255 a picture without a query. Up to six captions a picture are exact, more are rounded.
A row of measure `captions`, without a run, has two bytes a picture (low byte first): how many captions it has, or how
many questions a model that writes was asked. The bytes are compressed with zlib and written in base64. docs/compare.md
says how many characters a picture takes.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmapkd.compare.pictures import KeptRanks, NoPictures, PictureScore, is_of_answers, measures_of, split_metric

HIT, NO_QUERY = 240, 255
_HEAD = ("run", "data", "measure", "digest", "pictures", "values")


def pictures_csv(
    ranks: KeptRanks, runs: Iterable[tuple[str, str]], metrics: Iterable[str], data: dict[str, str]
) -> str | None:
    """The table of the runs that keep ranks; None where none does.

    Args:
        runs: name and digest of each finished run.
        metrics: recall and accuracy among them are written.
        data: the comparison's further test data.
    """
    wanted = dict.fromkeys(measure for metric in metrics for measure in _percents(metric, data))
    rows: list[tuple[Any, ...]] = []
    described: set[tuple[str, str]] = set()
    for name, run in runs:
        for where, measure in wanted:
            try:
                digest, score = ranks.scores(run, where, measure)
            except NoPictures:
                continue
            if (where, digest) not in described:
                described.add((where, digest))
                many = score.queries if is_of_answers(measure) else ranks.ranks(run, where).captions.numpy()
                rows.append(("", where, "captions", digest, len(many), _encoded(many.astype("<u2"))))
            rows.append((name, where, measure, digest, len(score.sums), _encoded(_bytes(score))))
    if not rows:
        return None
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_HEAD)
    writer.writerows(rows)
    return text.getvalue()


class PictureTable:
    """A committed `pictures.csv`, or several of one comparison put together.

    Raises:
        ValueError: a file is none, or a value in it is damaged.
    """

    def __init__(self, *paths: Path) -> None:
        self._rows: dict[tuple[str, str, str], dict[str, str]] = {}
        self._captions: dict[str, NDArray[Any]] = {}
        for path in paths:
            with path.open(encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file)
                if tuple(reader.fieldnames or ()) != _HEAD:
                    raise ValueError(f"{path} is no table of pictures: its heads are not {', '.join(_HEAD)}")
                for row in reader:
                    if row["measure"] == "captions":
                        self._captions[row["digest"]] = _decoded(row, "<u2")
                    else:
                        self._rows[row["run"], row["data"], row["measure"]] = row

    def scores(self, run: str, data: str, measure: str) -> tuple[str, PictureScore]:
        """See `pictures.PictureSource`; a run is named as in the table.

        Raises:
            NoPictures: the table does not have it.
        """
        row = self._rows.get((run, data, measure))
        if row is None:
            raise NoPictures(f"the table of pictures has no {measure} of {run}")
        values = _decoded(row, "u1")
        asked = values != NO_QUERY
        many = measure.startswith("t2i.") or is_of_answers(measure)
        queries = np.where(asked, self._captions[row["digest"]] if many else 1, 0).astype(float)
        return row["digest"], PictureScore(np.where(asked, values / HIT * 100, 0.0) * queries, queries)


def _percents(metric: str, data: dict[str, str]) -> list[tuple[str, str]]:
    """Test data and measures of a metric; none where it is not made of hits."""
    where, path = split_metric(metric, data)
    try:
        return [(where, measure) for measure in measures_of(path) if not measure.endswith(("mean_rank", "per_byte"))]
    except NoPictures:
        return []


def _bytes(score: PictureScore) -> NDArray[Any]:
    means = np.divide(score.sums, score.queries, out=np.zeros_like(score.sums), where=score.queries > 0)
    return np.where(score.queries > 0, np.rint(means / 100 * HIT), NO_QUERY).astype(np.uint8)


def _encoded(values: NDArray[Any]) -> str:
    return base64.b64encode(zlib.compress(values.tobytes(), 9)).decode("ascii")


def _decoded(row: dict[str, str], kind: str) -> NDArray[Any]:
    """The values of a row, never more than it says that there are."""
    try:
        size = int(row["pictures"]) * np.dtype(kind).itemsize
        content = zlib.decompressobj().decompress(base64.b64decode(row["values"], validate=True), size + 1)
        if len(content) != size:
            raise ValueError(f"{len(content)} bytes, not {size}")
    except (ValueError, binascii.Error, zlib.error) as error:
        raise ValueError(f"the values of {row['measure']} of run {row['run']!r} are damaged: {error}") from None
    return np.frombuffer(content, kind)
