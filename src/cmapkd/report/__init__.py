"""One self-contained page on what was trained: verdict, scores, cost, retrievals to look at, and origins."""

from cmapkd.report.write import write_report

__all__ = ["write_report"]
