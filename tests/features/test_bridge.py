"""The alignment bridge: unit vectors by its definition, separate weights, any part of the levels."""

from __future__ import annotations

import pytest
import torch

from cmapkd.features.bridge import AlignmentBridge

VISUAL, LANGUAGE = {"P2": 5, "P4": 6}, {"L1": 3, "L4": 7}


def vectors(widths: dict[str, int], batch: int = 4) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    return {name: torch.randn(batch, width, generator=draws) for name, width in widths.items()}


def test_levels_become_unit_vectors_of_one_space() -> None:
    bridge = AlignmentBridge(VISUAL, LANGUAGE, dim=8)
    visual, language = vectors(VISUAL), vectors(LANGUAGE)
    a, c = bridge(visual, language)
    for maps, given, out in ((bridge.visual, visual, a), (bridge.language, language, c)):
        assert list(out) == list(given)
        for name, unit in out.items():
            mapped = given[name] @ maps[name].weight.T + maps[name].bias
            torch.testing.assert_close(unit, mapped / mapped.norm(dim=1, keepdim=True))
            assert unit.shape == (4, 8)
    assert AlignmentBridge(VISUAL, LANGUAGE).dim == 256


def test_levels_that_are_not_given_take_no_part() -> None:
    bridge = AlignmentBridge(VISUAL, LANGUAGE, dim=8)
    a, c = bridge({"P4": vectors(VISUAL)["P4"]}, {})
    assert (list(a), c) == (["P4"], {})
    a["P4"][:, 0].sum().backward()
    reached = {name for name, parameter in bridge.named_parameters() if parameter.grad is not None}
    assert reached == {"visual.P4.weight", "visual.P4.bias"}
    with pytest.raises(ValueError, match="no bridge for level P3; there is one for P2, P4"):
        bridge({"P3": torch.zeros(1, 5)}, {})


def test_unit_vectors_are_float32_under_bf16_autocast() -> None:
    bridge = AlignmentBridge(VISUAL, LANGUAGE, dim=8)
    with torch.autocast("cpu", torch.bfloat16):
        a, c = bridge(vectors(VISUAL), vectors(LANGUAGE))
    for unit in (*a.values(), *c.values()):
        assert unit.dtype == torch.float32
        torch.testing.assert_close(unit.norm(dim=1), torch.ones(4))
