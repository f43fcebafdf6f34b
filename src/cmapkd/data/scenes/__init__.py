"""The built-in procedural world of coloured shapes: `ScenesSource`."""

from cmapkd.data.scenes.source import ScenesSource
from cmapkd.data.scenes.spec import DIFFICULTIES

__all__ = ["DIFFICULTIES", "ScenesSource"]
