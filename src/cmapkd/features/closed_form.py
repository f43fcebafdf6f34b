"""What a set of embeddings is like, without training: moments, directions, classes and parts, clusters, neighbours.

Everything is a pure function of its arguments and, where something is drawn, of a generator.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

_CHUNK = 4096  # rows whose products with all others are held at a time
_ROUNDS = 20  # of k-means
ALIKE = 1e-12
"""Mean variance of unit embeddings below which they are one embedding: what is left is rounding."""
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


def class_parts(
    rows: Float[Tensor, "rows dim"],
    labels: Int[Tensor, " rows"],
    num_classes: int,
    *,
    common: tuple[Float[Tensor, "parts dim"], Float[Tensor, " parts"]],
    random: bool,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "classes parts dim"], Float[Tensor, "classes parts"]]:
    """For each class, maps of a row to scores of the parts of the class: around its mean, of equal variances.

    A class is cut along its own `principal_directions`, which a random rotation mixes. It is scaled to a mean variance
    of 1. A class with as many rows as parts or fewer, or whose rows are `ALIKE`, is cut along the common directions.

    Args:
        labels: the class of each row.
        common: the principal directions of all rows and their variances, as many as each class has parts.
        random: along random directions within the rows instead, as a control.
        generator: what rotations and directions are drawn from, on the CPU.
    Returns:
        Projections P_c and offsets o_c, in float64: the scores of row x are P_c x - o_c.
    """
    num_parts = len(common[0])
    projections, offsets = [], []
    for number in range(num_classes):
        own = rows[labels == number]
        found = principal_directions(own, num_parts) if len(own) > num_parts else common
        few = found is common or float(found[1].mean()) < ALIKE
        of_class, (directions, variances) = (rows, common) if few else (own, found)
        if random:
            centred = rows - rows.mean(0)  # else each direction would lie near the rows' common mean
            inside = torch.randn(num_parts, len(rows), generator=generator, dtype=torch.float64) @ centred
            directions = torch.linalg.qr(inside.T).Q.T
            variances = ((of_class - of_class.mean(0)) @ directions.T).square().mean(0)
        rotation = torch.linalg.qr(torch.randn(num_parts, num_parts, generator=generator).double()).Q
        projections.append(rotation @ directions / variances.mean().sqrt())
        offsets.append(projections[-1] @ of_class.mean(0))
    return torch.stack(projections), torch.stack(offsets)


@torch.no_grad()
def spherical_kmeans(rows: Float[Tensor, "rows dim"], num: int, generator: torch.Generator) -> Float[Tensor, "num dim"]:
    """Centres of length one: every row belongs to that of the largest cosine, a centre is the mean of its rows.

    Begins at rows that are drawn. A centre that no row belongs to stays where it is. Twenty rounds, so the host never
    looks at the rows.

    Args:
        rows: normalised here.
        num: of centres, 1 to the number of rows.
        generator: on the CPU, the same in every process.
    Returns:
        Unit vectors, float32 or wider, where the rows are.
    Raises:
        ValueError: there are fewer rows than centres.
    Source: Dhillon and Modha 2001, "Concept decompositions for large sparse text data using clustering".
    """
    if not 1 <= num <= len(rows):
        raise ValueError(f"{num} clusters are asked for, and there are {len(rows)} rows")
    units = F.normalize(rows if rows.dtype == torch.float64 else rows.float(), dim=-1)
    centres = units[torch.randperm(len(units), generator=generator)[:num].to(units.device, non_blocking=True)]
    with torch.autocast(units.device.type, enabled=False):
        for _ in range(_ROUNDS):
            sums, held = torch.zeros_like(centres), centres.new_zeros(num)
            for part in units.split(_CHUNK):
                belongs = F.one_hot((part @ centres.T).argmax(1), num).to(units.dtype)  # no scatter: always equal
                sums, held = sums + belongs.T @ part, held + belongs.sum(0)
            centres = torch.where(held[:, None] > 0, F.normalize(sums, dim=-1), centres)
    return centres


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
