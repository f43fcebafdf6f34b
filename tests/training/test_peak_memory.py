"""The peak is that of the stretch, not of what came before it."""

from __future__ import annotations

import sys

import pytest
import torch

from cmapkd.training.peak_memory import forget_peak, peak_bytes

CPU, MIB = torch.device("cpu"), 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can forget a process's peak")
def test_only_what_was_held_since() -> None:
    large = torch.ones(200 * MIB // 4)
    held = peak_bytes(CPU)
    del large
    forget_peak(CPU)
    after = peak_bytes(CPU)
    assert after < held - 150 * MIB
    again = torch.ones(100 * MIB // 4)
    assert 90 * MIB < peak_bytes(CPU) - after < 130 * MIB
    del again
    assert peak_bytes(CPU) - after > 90 * MIB  # a peak stays when memory goes
