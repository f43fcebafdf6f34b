"""What other libraries raise, in words: their first line, and which file it was about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cmapkd.config import ConfigError


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters; its class where it has none."""
    return str(error).strip().split("\n")[0][:300] or type(error).__name__


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Files that are damaged or odd make the libraries raise anything; here it becomes an error that names them.

    Raises:
        ValueError: with the library's own words, and its error as the cause.
    """
    try:
        yield
    except (ConfigError, MemoryError):
        raise
    except Exception as error:
        if type(error) is ValueError:  # ours, or in words
            raise
        raise ValueError(
            f"{what} is damaged or of a kind that is not supported ({type(error).__name__}: {first_line(error)}): "
            "copy or export it again"
        ) from error
