"""Every setting as plain data, written beforehand: so a misspelt key is answered, and a setting shown, without torch.

`make.py` writes `settings.json` from the config classes; a test fails when it is stale.
"""

from cmapkd.settings.check import check_evaluation, check_recipe, check_source
from cmapkd.settings.index import Index, Setting, read_index

__all__ = ["Index", "Setting", "check_evaluation", "check_recipe", "check_source", "read_index"]
