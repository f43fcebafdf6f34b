"""Hooks on a tower's blocks for the time of one pass, in a form that `torch.compile` takes into its graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

Hook = Callable[..., Any]


@contextmanager
def block_hooks(after: Mapping[nn.Module, Hook], before: Mapping[nn.Module, Hook] | None = None) -> Iterator[None]:
    """Hooks that stand behind those that the blocks have, while the context is open.

    A compiler follows neither torch's own registering, which counts all hooks ever made, nor an entry in a module's
    hooks; it follows that a module has other hooks, and then its own again.

    Args:
        after, before: as for `register_forward_hook` and `register_forward_pre_hook`.
    """
    added = (("_forward_hooks", after), ("_forward_pre_hooks", before or {}))
    own = [(block, name, getattr(block, name)) for name, hooks in added for block in hooks]
    for name, hooks in added:
        for block, hook in hooks.items():
            there = getattr(block, name)
            setattr(block, name, {**there, f"cmapkd {len(there)}": hook})
    try:
        yield
    finally:
        for block, name, there in own:
            setattr(block, name, there)
