"""The error of a metric whose program or package is not installed."""

from __future__ import annotations


class MissingToolError(RuntimeError):
    """A program or package that a metric needs is not installed; the message says what to install."""
