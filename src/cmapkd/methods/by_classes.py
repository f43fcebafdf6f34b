"""What methods share that tell classes apart by their names: a learned context, and what they cannot begin with."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from pydantic import Field, field_validator
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.data.templates import ClassPrompts
from cmapkd.methods.card import ClassesConfig
from cmapkd.models import DualEncoder, FrozenTeacher
from cmapkd.models.adapted import WITHOUT_IT, AdaptedEncoder
from cmapkd.models.prompted import PromptedEncoder, with_text_prompts
from cmapkd.models.texts import LearnedClassVectors


class ContextConfig(ClassesConfig):
    """Settings of a context that learns in front of the names of classes."""

    context: str | int | None = Field(
        "a photo of a",
        description="Words that the learned vectors begin as, one for each token; or how many random ones.",
    )
    template: str = Field("{}.", description="What stands behind the learned vectors; {} is the name of a class.")

    @field_validator("template")
    @classmethod
    def _has_a_place(cls, value: str) -> str:
        if "{}" not in value:
            raise ValueError("there must be {} where the name of a class goes")
        return value

    @property
    def own_texts(self) -> tuple[str, ...]:
        return (self.template, self.context) if isinstance(self.context, str) else (self.template,)


def learned_context(
    config: ContextConfig, student: DualEncoder, classes: ClassPrompts
) -> tuple[PromptedEncoder, LearnedClassVectors]:
    """The student with the vectors in front of its class names, and what makes class vectors of both.

    Raises:
        ConfigError: the student's text tower takes no such vectors.
    """
    assert config.context is not None
    try:
        prompted = with_text_prompts(student, context=config.context, template=config.template)
    except ValueError as error:
        raise ConfigError(f"method {config.name}: {error}") from None
    return prompted, LearnedClassVectors(ClassPrompts(classes.names, (config.template,)), prompted)


def check_several(method: str, classes: ClassPrompts) -> None:
    """Refuses data of one class.

    Raises:
        ConfigError: there is nothing to tell apart.
    """
    if len(classes.names) < 2:
        raise ConfigError(f"method {method} tells classes apart, and the data name one: {classes.names[0]!r}")


def check_kept_width(method: str, student: DualEncoder, teacher: FrozenTeacher) -> None:
    """Refuses a teacher that cannot be the student as it was.

    Raises:
        ConfigError: the two embed in different widths.
    """
    if student.embed_dim != teacher.embed_dim:
        raise ConfigError(
            f"{method} keeps the student alike to what it was, but {student.name} embeds in {student.embed_dim} "
            f"numbers and its teacher {teacher.name} in {teacher.embed_dim}: take teacher: student, or the model that "
            "the first task began with"
        )


def check_is_copy(method: str, student: DualEncoder, teacher: FrozenTeacher) -> None:
    """Refuses a teacher that is not the student as it begins.

    Raises:
        ConfigError: it has another name, width or weights. Of towers for pictures of another size, weights cannot be
            compared.
    """
    same = teacher.name == student.name and teacher.embed_dim == student.embed_dim
    own, theirs = (dict(model.named_parameters()) for model in (student, teacher.model))
    shared = [(each, theirs[name]) for name, each in own.items() if name in theirs]
    alike = all(one.shape == other.shape for one, other in shared)
    if not same or (alike and any(not torch.equal(other.cpu(), one.cpu()) for one, other in shared)):
        raise ConfigError(
            f"{method} reads the student's own answers as they begin, and the teacher {teacher.name} is another model "
            f"than the student {student.name}, or has other weights: set teacher: student"
        )


def check_unadapted(student: DualEncoder) -> None:
    """Refuses a student whose class vectors may be made of pictures.

    Raises:
        ConfigError: names it.
    """
    if isinstance(student, AdaptedEncoder):
        raise ConfigError(f"the student {student.name} has an adapter already: {WITHOUT_IT}")


def check_trained(method: str, student: DualEncoder) -> None:
    """Refuses a student of which a tower has random weights.

    Raises:
        ConfigError: which one.
    """
    if student.random_towers:
        raise ConfigError(
            f"{method} adapts a trained student, and the {' and '.join(student.random_towers)} tower of {student.name} "
            "has random weights: name a trained model or a folder"
        )


def check_shown(method: str, shown: Bool[Tensor, " classes"]) -> None:
    """Refuses training data that show pictures of fewer than two classes.

    Raises:
        ConfigError: of how many.
    """
    if (number := int(shown.sum())) < 2:
        raise ConfigError(
            f"{method} tells classes apart by their pictures, and of {len(shown)} classes {number} has labelled ones "
            "in data.train: take data with pictures of two classes or more"
        )
