"""What converted layers keep in transformers' cache while a model writes: a state that does not grow."""

from __future__ import annotations

from functools import cache
from typing import Any


def state_in(past: Any, layer: int) -> Any:
    """The `state` of a converted layer, None before its first token, and `keep(state, length)` for the next one.

    Args:
        past: transformers' cache of keys and values. Its entry of this layer is exchanged at the first call.
    """
    from transformers.cache_utils import DynamicLayer

    while len(past.layers) <= layer:
        past.layers.append(DynamicLayer())
    if not isinstance(past.layers[layer], _kind()):
        past.layers[layer] = _kind()()
    return past.layers[layer]


@cache
def _kind() -> Any:
    """A class of transformers', whose import takes seconds."""
    from transformers.cache_utils import DynamicLayer

    class LinearState(DynamicLayer):  # type: ignore[misc]  # transformers has no types for mypy
        """Counts tokens as a layer of keys and values does, because models ask the first layer for their number."""

        is_croppable = False

        def __init__(self) -> None:
            super().__init__()
            self.state: Any = None
            self.length = 0

        def keep(self, state: Any, length: int) -> None:
            self.state, self.length = state, self.length + length

        def get_seq_length(self) -> int:
            return self.length

    return LinearState
