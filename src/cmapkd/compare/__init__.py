"""Many runs, one table: arms, axes and seeds in one resumable comparison with paired statistics."""

from cmapkd.compare.config import ComparisonConfig, TableConfig, list_comparisons, load_comparison
from cmapkd.compare.execute import ComparisonResult, compare, prepare, tune
from cmapkd.compare.outcome import Outcome
from cmapkd.compare.plan import Plan, make_plan
from cmapkd.compare.statistics import PairedDifference, Summary, paired_difference, summarize, t_critical

__all__ = [
    "ComparisonConfig",
    "ComparisonResult",
    "Outcome",
    "PairedDifference",
    "Plan",
    "Summary",
    "TableConfig",
    "compare",
    "list_comparisons",
    "load_comparison",
    "make_plan",
    "paired_difference",
    "prepare",
    "summarize",
    "t_critical",
    "tune",
]
