"""Everything about a recipe that can be known before hours are spent on it, in the order of a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch

from cmapkd.data.open import open_source
from cmapkd.data.types import Source
from cmapkd.diagnosis.cost import measure_steps, predict_cache
from cmapkd.diagnosis.data import check_source
from cmapkd.diagnosis.finding import Finding
from cmapkd.diagnosis.models import check_activation, check_model, check_sanity, compare_sizes
from cmapkd.models import DualEncoder, FrozenTeacher, build_model
from cmapkd.run import (
    RunConfig,
    build_student,
    check_training,
    classes_of,
    heads_of,
    method_of,
    open_training,
    texts_of,
)

T = TypeVar("T")


def diagnose(config: RunConfig) -> list[Finding]:
    """Builds everything the recipe names, reads some data, takes a few steps, and writes nothing.

    Returns:
        Findings in the order of a run. After a problem with a part, what depends on it is left out.
    """
    findings: list[Finding] = []
    sources: dict[str, Source] = {}
    for role, name in (("train", config.data.train), ("val", config.data.val), ("test", config.data.test)):
        if name is None:
            continue
        opened = partial(open_training, config) if role == "train" else partial(open_source, name, split=role)
        source = _attempt(findings, f"data.{role}", opened)
        if source is not None:
            sources[role] = source
            findings += check_source(role, source, config)
    if config.data.final is None:
        findings.append(Finding("note", "data", "neither val nor test is named: the run ends without scores"))
    if "train" not in sources:
        return findings
    train = sources["train"]
    torch.manual_seed(config.seed)
    teachers: dict[str, DualEncoder] = {}
    for role, model in config.teachers.items():
        teacher = _attempt(findings, _named(role), partial(build_model, model))
        if teacher is not None:
            teachers[role] = teacher
    if len(teachers) < len(config.teachers):
        return findings
    frozen = {role: FrozenTeacher(teacher, role) for role, teacher in teachers.items()}
    student = _attempt(findings, "student", partial(build_student, config, train, frozen))
    if student is None:
        return findings
    findings += check_model("student", student, train)
    findings += check_activation("student", student, train)
    for role, teacher in teachers.items():
        findings += check_model(_named(role), teacher, train)
        findings += compare_sizes(student, teacher)
        findings += check_activation(_named(role), teacher, train)
        findings += check_sanity(_named(role), teacher, train)
    num_findings = len(findings)
    heads = partial(heads_of, config, train)
    _attempt(findings, "heads", partial(heads, student))  # a problem of theirs bears their name
    classes = _attempt(findings, "classes", partial(classes_of, config, train))
    if len(findings) > num_findings:
        return findings
    method = _attempt(findings, "method", partial(method_of, config, student, frozen, heads, classes))
    texts = None if method is None else _attempt(findings, "texts", partial(texts_of, config, method, train))
    if method is None or texts is None:
        return findings
    if len(train) >= config.training.batch_size:
        if _attempt(findings, "stages and parts", partial(check_training, config, method, train)) is None:
            return findings
        for role in (role for role in config.teachers if role in method.teachers):
            findings += predict_cache(role, method, train, config)
    findings += measure_steps(method, train, config, texts)
    return findings


def _named(role: str) -> str:
    """How a teacher is called where there may be several."""
    return role if role == "teacher" else f"teacher {role}"


def _attempt(findings: list[Finding], what: str, build: Callable[[], T]) -> T | None:
    """The built part, or None and a problem that says why."""
    try:
        return build()
    except (ValueError, OSError) as error:
        findings.append(Finding("problem", what, str(error)))
        return None
