"""Settings of which exactly one is given: the kind of a proposal, the kind of a filter."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from cmapkd.config import Config


class OneOf(Config):
    """Every field is None unless it is the one that was chosen.

    Raises:
        ValueError: none is given, or several; names those that can be.
    """

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            known = ", ".join(type(self).model_fields)
            raise ValueError(f"set exactly one of {known}, not {', '.join(given) or 'none'}")
        return self

    @property
    def kind(self) -> str:
        """Which one is set."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)
