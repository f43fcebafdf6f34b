"""Settings of equal time: the arm that sets it, and how seconds a step are measured or given."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from cmapkd.config import Config


class EqualTimeConfig(Config):
    """Beside the rows of equal steps, the same arms with the steps that fit into one arm's time."""

    to: str = Field(description="Arm whose steps are kept: the others get as many as fit into its time.")
    measure_steps: int = Field(60, ge=20, description="Steps by which an arm is measured, after the warm-up.")
    warmup_steps: int | None = Field(
        None, ge=0, description="Steps before them, left out; none: one epoch, at least 10 and at most 200."
    )
    seconds: dict[str, float] | str | None = Field(
        None, description="Seconds a step by arm or row, or another comparison's seconds.json; none: measured."
    )

    @field_validator("seconds")
    @classmethod
    def _above_zero(cls, value: Any) -> Any:
        for name, seconds in value.items() if isinstance(value, dict) else ():
            if not seconds > 0:
                raise ValueError(f"seconds a step are above 0; got {name}: {seconds}")
        return value
