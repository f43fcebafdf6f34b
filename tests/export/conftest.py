"""What every test of exports gets: torch's table of ONNX operations, made once and not for each tower again."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_table_of_operations() -> Iterator[None]:
    """It takes a fifth of a small export. Where torch has it elsewhere, each export makes its own."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            from torch.onnx._internal.exporter._registration import ONNXRegistry

            made = ONNXRegistry.from_torchlib
        except (ImportError, AttributeError):
            pass
        else:
            patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(cache(made)))
        yield
