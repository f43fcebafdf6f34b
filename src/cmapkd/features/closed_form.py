"""What a set of embeddings is like, without training: moments, class means, directions, clusters, neighbours.

Everything is a pure function of its arguments and, where something is drawn, of a generator.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

_CHUNK = 4096  # rows whose products with all others are held at a time
_LAST = 4.0  # taken from a cosine, puts it below all that it was not taken from


class RunningMoments:
    """Mean and covariance of rows that come in parts (Chan et al. 1983), in float64, whatever the parts."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)  # sum of outer products of deviations

    def add(self, rows: Float[Tensor, "rows dim"]) -> None:
        """Takes further rows."""
        if not len(rows):
            return
        rows = rows.double()
        mean, total = rows.mean(0), self.count + len(rows)
        apart, deviations = mean - self.mean, rows - mean
        self._scatter += deviations.T @ deviations + torch.outer(apart, apart) * (self.count * len(rows) / total)
        self.mean = self.mean + apart * (len(rows) / total)
        self.count = total

    @property
    def covariance(self) -> Float[Tensor, "dim dim"]:
        """Of the rows, divided by their number.

        Raises:
            ValueError: there are none.
        """
        if not self.count:
            raise ValueError("no rows have been added, so there is no covariance")
        return self._scatter / self.count


def class_means(
    rows: Float[Tensor, "rows dim"], labels: Int[Tensor, " rows"], num_classes: int, *, most: int | None = None
) -> tuple[Float[Tensor, "classes dim"], Int[Tensor, " classes"]]:
    """The mean row of each class, zeros where it has none.

    Args:
        labels: of each row; negative: it counts for no class.
        most: of each class its first so many rows count; None: all.
    Returns:
        Means in float64, and how many rows each is of.
    Raises:
        ValueError: a label has no class.
    """
    if len(labels) and int(labels.max()) >= num_classes:
        raise ValueError(f"there is a label {int(labels.max())}, but only {num_classes} classes")
    if most is not None:
        labels = torch.where(rank_in_class(labels) < most, labels, -1)
    known = labels >= 0
    counts = torch.bincount(labels[known], minlength=num_classes)
    sums = torch.zeros(num_classes, rows.shape[1], dtype=torch.float64, device=rows.device)
    sums.index_add_(0, labels[known], rows[known].double())
    return sums / counts.clamp_min(1)[:, None], counts


def rank_in_class(labels: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """How many rows before each one have the same label."""
    order = torch.argsort(labels, stable=True)
    of_order = labels[order]
    begins = torch.searchsorted(of_order, of_order)
    ranks = torch.empty_like(labels)
    ranks[order] = torch.arange(len(labels), device=labels.device) - begins
    return ranks


def principal_directions(
    rows: Float[Tensor, "rows dim"], num: int
) -> tuple[Float[Tensor, "num dim"], Float[Tensor, " num"]]:
    """Orthogonal directions along which the rows, around their mean, vary most.

    Args:
        num: of directions, at most the width.
    Returns:
        Unit directions, the first varies most, and the variance along each (divided by the number of rows); float64.
        A direction's sign is chosen so that its largest component by size is positive.
    Raises:
        ValueError: more directions than the width, or no rows.
    """
    if not 1 <= num <= rows.shape[1]:
        raise ValueError(f"{num} directions are asked for, and the rows have width {rows.shape[1]}")
    moments = RunningMoments(rows.shape[1])
    moments.add(rows.cpu())
    variances, vectors = torch.linalg.eigh(moments.covariance)
    directions, variances = vectors.T.flip(0)[:num], variances.flip(0)[:num].clamp_min(0)
    largest = directions.abs().argmax(1, keepdim=True)
    return directions * directions.gather(1, largest).sign(), variances


def spherical_kmeans(
    rows: Float[Tensor, "rows dim"], num: int, *, generator: torch.Generator, iterations: int = 25
) -> tuple[Float[Tensor, "num dim"], Int[Tensor, " rows"]]:
    """Centres of length one whose cosines with their rows are large (Dhillon and Modha 2001).

    Begins at rows drawn by k-means++ (Arthur and Vassilvitskii 2007). A cluster that loses all rows gets the row that
    is farthest from its own centre.

    Args:
        rows: normalised here; float32 or wider.
        num: of clusters, at most the number of rows.
        generator: on the CPU; what the first centres are drawn from.
        iterations: at most; it ends before, when no row changes its cluster.
    Returns:
        The centres, in the type of the rows, and the cluster of each row.
    Raises:
        ValueError: more clusters than rows.
    """
    if not 1 <= num <= len(rows):
        raise ValueError(f"{num} clusters are asked for, and there are {len(rows)} rows")
    rows = F.normalize(rows, dim=-1)
    centres = _spread_out(rows, num, generator)
    clusters, cosines = _nearest_centre(rows, centres)
    for _ in range(iterations):
        means, counts = class_means(rows, clusters, num)
        centres = F.normalize(means, dim=-1).to(rows.dtype)
        empty = (counts == 0).nonzero().flatten()
        if len(empty):
            centres[empty] = rows[cosines.argsort(stable=True)[: len(empty)]]
        before = clusters
        clusters, cosines = _nearest_centre(rows, centres)
        if torch.equal(clusters, before):
            break
    return centres, clusters


def _spread_out(rows: Float[Tensor, "rows dim"], num: int, generator: torch.Generator) -> Float[Tensor, "num dim"]:
    """Rows drawn one after the other, each by its squared distance from the nearest that was drawn before."""
    draws = torch.rand(num, generator=generator, dtype=torch.float64)
    chosen = [min(int(draws[0] * len(rows)), len(rows) - 1)]
    distances = 2 - 2 * (rows @ rows[chosen[0]]).double()
    for draw in draws[1:]:
        distances[torch.tensor(chosen)] = 0.0
        ends = distances.clamp_min(0).cumsum(0)
        if float(ends[-1]) > 0:
            place = int(torch.searchsorted(ends, (draw * ends[-1]).to(ends.device), right=True))
        else:  # every row is where one was drawn: any other will do
            place = next(row for row in range(len(rows)) if row not in chosen)
        chosen.append(min(place, len(rows) - 1))
        distances = torch.minimum(distances, 2 - 2 * (rows @ rows[chosen[-1]]).double())
    return rows[torch.tensor(chosen)].clone()


def _nearest_centre(
    rows: Float[Tensor, "rows dim"], centres: Float[Tensor, "num dim"]
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    found = [(part @ centres.T).max(1) for part in rows.split(_CHUNK)]
    return torch.cat([each.indices for each in found]), torch.cat([each.values for each in found])


def nearest_others(
    queries: Float[Tensor, "queries dim"],
    entries: Float[Tensor, "entries dim"],
    *,
    query_keys: Int[Tensor, " queries"],
    entry_keys: Int[Tensor, " entries"],
    avoided: Bool[Tensor, "queries entries"] | None = None,
    duplicates_above: float | None = None,
    chunk: int = _CHUNK,
) -> Int[Tensor, " queries"]:
    """Which entry has the largest cosine with each query, among those of other samples.

    Args:
        queries, entries: normalised here.
        query_keys, entry_keys: name the samples; an entry of the query's own sample does not count.
        avoided: True where an entry counts only if the query has no other.
        duplicates_above: an entry with a larger cosine is the same thing under another name, and avoided likewise.
        chunk: entries at a time; memory grows with queries x chunk.
    Returns:
        Places among the entries, of equals the first; -1 where no entry is of another sample. On the queries' device.
    """
    queries = F.normalize(queries, dim=-1)
    best = queries.new_full((len(queries),), -torch.inf)
    places = torch.full((len(queries),), -1, dtype=torch.long, device=queries.device)
    for start in range(0, len(entries), chunk):
        some = F.normalize(entries[start : start + chunk].to(queries.dtype), dim=-1)
        own = query_keys[:, None] == entry_keys[None, start : start + chunk]
        cosines = queries @ some.T
        if duplicates_above is not None:
            cosines = torch.where(cosines > duplicates_above, cosines - _LAST, cosines)
        if avoided is not None:
            cosines = cosines - _LAST * avoided[:, start : start + chunk].to(cosines)
        cosines, at = cosines.masked_fill(own, -torch.inf).max(1)
        better = cosines > best
        best, places = torch.where(better, cosines, best), torch.where(better, at + start, places)
    return places


def dispersion(rows: Float[Tensor, "rows dim"]) -> Float[Tensor, ""]:
    """Mean squared angle between each row and the direction of the mean row, in radians².

    Returns:
        In [0, pi²], zero where all rows point one way; float64.
    Raises:
        ValueError: there are no rows, or their mean is zero, so that it points nowhere.
    Source: the angular dispersion of arXiv:2601.17237, equations 3 to 7, as others quote them.
    """
    if not len(rows):
        raise ValueError("there are no rows, so there is no dispersion")
    mean = rows.double().mean(0)
    if not float(mean.norm()) > 0:
        raise ValueError("the mean row is zero, so it has no direction to measure angles from")
    units, middle = F.normalize(rows.double(), dim=-1), F.normalize(mean, dim=0)
    # by the tangent of half the angle, since arccos loses half of the digits near 1
    angles = 2 * torch.atan2((units - middle).norm(dim=-1), (units + middle).norm(dim=-1))
    return angles.square().mean()
