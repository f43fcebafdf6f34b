"""Many runs, one table: arms, axes and seeds in one resumable comparison with paired statistics."""

from cmapkd.compare.config import ComparisonConfig, TableConfig, list_comparisons, load_comparison
from cmapkd.compare.declared import ContrastConfig
from cmapkd.compare.execute import ComparisonResult, compare, prepare, tune
from cmapkd.compare.outcome import Outcome
from cmapkd.compare.picture_table import PictureTable
from cmapkd.compare.pictures import NoPictures, resampled_difference
from cmapkd.compare.plan import Plan, make_plan
from cmapkd.compare.statistics import (
    Estimate,
    PairedDifference,
    Summary,
    holm,
    paired_difference,
    summarize,
    t_critical,
)

__all__ = [
    "ComparisonConfig",
    "ComparisonResult",
    "ContrastConfig",
    "Estimate",
    "NoPictures",
    "Outcome",
    "PairedDifference",
    "PictureTable",
    "Plan",
    "Summary",
    "TableConfig",
    "compare",
    "holm",
    "list_comparisons",
    "load_comparison",
    "make_plan",
    "paired_difference",
    "prepare",
    "resampled_difference",
    "summarize",
    "t_critical",
    "tune",
]
