"""One published method = one file. `METHODS` is the list: adding a method adds one line here."""

from collections.abc import Callable
from typing import Any

from cmapkd.data.templates import ClassPrompts
from cmapkd.methods.base import Method, MethodCard, MethodConfig, Term, TermsBeside
from cmapkd.methods.c2kd import C2KD
from cmapkd.methods.clip_kd import ClipKD
from cmapkd.methods.cmapkd import CMAPKD
from cmapkd.methods.contrastive import Contrastive
from cmapkd.methods.dc_clip import DCClip
from cmapkd.methods.hinton import Hinton
from cmapkd.methods.promptkd import PromptKD
from cmapkd.methods.stages import StageConfig
from cmapkd.models import DualEncoder, FrozenTeacher

METHODS: dict[str, type[Method]] = {
    "contrastive": Contrastive,
    "hinton": Hinton,
    "promptkd": PromptKD,
    "c2kd": C2KD,
    "dc_clip": DCClip,
    "clip_kd": ClipKD,
    "cmapkd": CMAPKD,
}


def build_method(
    config: MethodConfig,
    *,
    student: DualEncoder,
    teacher: FrozenTeacher | None,
    beside: Callable[[DualEncoder], TermsBeside | None] | None = None,
    classes: ClassPrompts | None = None,
) -> Method:
    """The method that `config` names; a teacher it does not use is left out.

    Args:
        beside: makes the terms that the run adds to the method's own, for the student as the method trains it.
        classes: of the training source; read where `config.reads_classes`, and left out elsewhere.

    Raises:
        ConfigError: a setting does not fit the method's terms or levels.
        ValueError: the method needs a teacher and there is none, or the models lack what it reads.
    """
    kind = METHODS[config.name]
    told: dict[str, Any] = {"classes": classes} if config.reads_classes else {}
    method = kind(config, student=student, teacher=teacher if kind.uses_teacher else None, **told)
    method.beside = beside(method.student) if beside is not None else None
    if config.term_weighting is not None:
        method.weigh_terms(config.term_weighting)
    return method


__all__ = ["METHODS", "Method", "MethodCard", "MethodConfig", "StageConfig", "Term", "TermsBeside", "build_method"]
