"""A difference that a comparison's file declares before the runs."""

from __future__ import annotations

from pydantic import Field

from cmapkd.config import Config


class ContrastConfig(Config):
    """A difference that is declared before the runs. Declared differences alone are tested and get a verdict."""

    arm: str = Field(description="The arm, axis value or whole row whose score is tested.")
    against: str = Field(description="What it is tested against, named in the same way.")
    metric: str | None = Field(None, description="Dotted path in the student's scores; none: the table's first metric.")
    smallest: float | None = Field(
        None, gt=0, description="The smallest difference that matters, in units of the metric; none: never `equal`."
    )
