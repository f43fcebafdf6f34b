"""One self-contained page on what was trained: verdict, scores, cost, retrievals to look at, and origins."""

from cmapkd.report.write import CARDS, write_report

__all__ = ["CARDS", "write_report"]
