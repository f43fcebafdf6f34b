"""cmapkd: knowledge distillation of vision-language models, from one command to the proof of what the student kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmapkd.api import distill, load, method

__all__ = ["__version__", "distill", "load", "method"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The Python interface, imported when first used: torch takes seconds and `--help` must not wait."""
    if name in ("distill", "load", "method"):
        from cmapkd import api

        return getattr(api, name)
    raise AttributeError(f"module 'cmapkd' has no attribute {name!r}")
