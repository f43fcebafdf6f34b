"""One published method = one file. `METHODS` is the list: adding a method adds one line here."""

from cmapkd.methods.base import Method, MethodCard, MethodConfig, Term
from cmapkd.methods.clip_kd import ClipKD
from cmapkd.methods.contrastive import Contrastive
from cmapkd.methods.hinton import Hinton

METHODS: dict[str, type[Method]] = {
    "contrastive": Contrastive,
    "hinton": Hinton,
    "clip_kd": ClipKD,
}

__all__ = ["METHODS", "Method", "MethodCard", "MethodConfig", "Term"]
