"""Whether a tensor is one of which each process has a share."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_shared_out(value: Any) -> TypeGuard[DTensor]:
    """Without importing the class: that takes half as long as torch itself, and who shares nothing out has none."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(value, kind)
