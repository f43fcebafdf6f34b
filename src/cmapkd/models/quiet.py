"""Libraries that speak while a model is built, loaded or saved are silenced: the output of a command is its own."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_PYTREE = "torch.utils._pytree"
"""Warns of torchao, which transformers imports where it is installed, in words that no user can act on."""
_OF_TRANSFORMERS = ("hf", "tiny_vlm", "vlm")


@contextmanager
def quiet(family: str = "") -> Iterator[None]:
    """Without transformers' bars of weights, and without torch's warnings of libraries that transformers imports.

    Bars of downloads stay.

    Args:
        family: of the model. transformers is imported here for those that need it, and for no others.
    """
    logger = logging.getLogger(_PYTREE)
    level = logger.level
    logger.setLevel(logging.ERROR)
    if family in _OF_TRANSFORMERS:
        importlib.import_module("transformers.utils.logging")
    library = sys.modules.get("transformers.utils.logging")
    set_hook = getattr(library, "set_tqdm_hook", None)  # older versions write their shards without a bar
    hook = set_hook(_without_bar) if set_hook is not None else None
    try:
        yield
    finally:
        logger.setLevel(level)
        if set_hook is not None:
            set_hook(hook)


def _without_bar(factory: Callable[..., Any], given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    return factory(*given, **{**named, "disable": True})
