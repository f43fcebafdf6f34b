"""What `cmapkd doctor` finds: everything about a recipe that can be known before hours are spent on it."""

from cmapkd.diagnosis.diagnose import diagnose
from cmapkd.diagnosis.finding import Finding

__all__ = ["Finding", "diagnose"]
