"""A teacher that writes in the place of one that embeds, for `makd`."""

from __future__ import annotations

from cmapkd.config import ConfigError
from cmapkd.methods.makd_config import MakdConfig
from cmapkd.models import DualEncoder, FrozenTeacher, GenerativeModel
from cmapkd.models.asked_writer import AskedWriter

WHY_NOT_CACHED = "a teacher that writes answers once, before the first step, and checkpoints hold its answers"


def asked(teacher: FrozenTeacher, config: MakdConfig) -> FrozenTeacher:
    """A teacher that embeds as it is; one that writes, as one whose embeddings are its odds of yes.

    Raises:
        ConfigError: settings that it does not read, or a teacher that does neither.
    """
    if isinstance(teacher.model, DualEncoder):
        if config.changed("asks"):
            raise ConfigError(
                f"method.asks is for teachers that write, and {teacher.name} reads texts: set method.templates instead"
            )
        for group, entries in config.questions.items():
            if len(entries) < 2 and config.options == "contrast":
                raise ConfigError(
                    f"method.questions.{group} is {list(entries)}, and options: contrast weighs an entry against the "
                    "others of its group: name two or more, or set method.options: negation"
                )
        return teacher
    if not isinstance(teacher.model, GenerativeModel):
        raise ConfigError(f"makd asks a teacher that writes, or that embeds pictures and texts, not {teacher.name}")
    unread = ("templates", "negations", "options", "teacher_scale")
    given = [*config.changed(*unread)]
    given += ["answers: random"] if config.answers == "random" else []
    if given:
        raise ConfigError(
            f"{teacher.name} writes, and is asked method.asks in words: leave {', '.join(given)} out, which are for "
            "teachers that embed"
        )
    questions = [config.asks.replace("{}", each) for entries in config.questions.values() for each in entries]
    return FrozenTeacher(AskedWriter(teacher.model, questions), teacher.role)
