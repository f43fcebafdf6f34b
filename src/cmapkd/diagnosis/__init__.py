"""What `cmapkd doctor` finds: everything about a recipe that can be known before hours are spent on it."""

from cmapkd.diagnosis.diagnose import diagnose, examine
from cmapkd.diagnosis.finding import Finding, verdict

__all__ = ["Finding", "diagnose", "examine", "verdict"]
