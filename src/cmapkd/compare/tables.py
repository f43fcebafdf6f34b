"""What a table of a comparison holds, ready to be written."""

from __future__ import annotations

from dataclasses import dataclass

from cmapkd.compare.gap import GapStart
from cmapkd.compare.rows import Row
from cmapkd.compare.statistics import Estimate, PairedDifference, Summary
from cmapkd.compare.verdicts import EXPLORATORY_SEEDS, TestedContrast


@dataclass(frozen=True, slots=True)
class Cell:
    """One metric of one row."""

    values: dict[int, float]  # by seed
    summary: Summary | None
    difference: PairedDifference | None  # to the row's reference; None for the reference itself
    gap: dict[int, float]  # by seed, share of the way from `gap_from` to the teacher: 0 is none of it, 1 all
    two_way: Estimate | None = None  # the difference with the chance of pictures in its interval, where it is known
    seeds_alone: str = ""  # why it is not known
    gap_start: GapStart | None = None  # what is known of the row where the gap begins; None without a gap


@dataclass(frozen=True, slots=True)
class RowSummary:
    """One row of a table; the row of a teacher has no `row`, and without folds one value, under seed -1."""

    label: str
    row: Row | None
    is_reference: bool
    starts_gap: bool
    cells: dict[str, Cell]
    costs: dict[str, Summary]  # by `summary.COSTS`, where the runs recorded them
    errors: dict[int, str]
    off_plateau: tuple[int, int] | None = None  # seeds off the plateau, of how many; None where none is given

    def median_shown(self, path: str) -> bool:
        """Whether a metric's mean would mislead: its seeds fall into two groups, or the plateau divides them."""
        summary = self.cells[path].summary
        divided = self.off_plateau is not None and 0 < self.off_plateau[0] < self.off_plateau[1]
        return summary is not None and (summary.bimodal or (divided and summary.count > 1))


@dataclass(frozen=True, slots=True)
class TableSummary:
    """A table, ready to be written."""

    title: str
    metrics: tuple[str, ...]
    reference_name: str | None
    gap_name: str | None
    teachers: tuple[RowSummary, ...]
    rows: tuple[RowSummary, ...]
    notes: tuple[str, ...]
    plateau: float | None = None  # of the first metric
    num_seeds: int = 0  # the most that any row has finished
    contrasts: tuple[TestedContrast, ...] = ()

    @property
    def heading(self) -> str:
        """The title, which says where the seeds are too few for more than exploring."""
        if self.num_seeds > EXPLORATORY_SEEDS:
            return self.title
        few = f"exploratory, uncorrected: {self.num_seeds} seed{'s'[: self.num_seeds != 1]}"
        return f"{self.title} ({few})" if self.title else few.capitalize()
