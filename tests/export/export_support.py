"""What the tests of exports share: the small models of every family, and one export of each, made once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "families"))
from family_support import CLIP_TEXT, FAMILIES, VIT, make, open_clip

from cmapkd.data.open import open_source
from cmapkd.export import parity
from cmapkd.export.check import main as check
from cmapkd.export.licence import Licence
from cmapkd.export.origin import Origin
from cmapkd.export.write import export_onnx
from cmapkd.models import DualEncoder
from cmapkd.models.prunable import TowerSizes

__all__ = ["EXPORTED", "FAMILIES", "FREE", "ORIGIN", "PRUNED", "checked_here", "make", "model_of", "scenes", "write"]

PRUNED = "open_clip, pruned"
EXPORTED = (*FAMILIES, PRUNED)
ORIGIN = Origin("student", teachers=("tiny:scenes-teacher",), method="clip_kd", data="scenes", seed=0)
FREE = Licence("apache-2.0", "Licence: apache-2.0.", None)


@cache
def model_of(family: str, folder: Path) -> DualEncoder:
    return made(family, folder / family.replace(" ", "_").replace(",", ""))


def made(family: str, folder: Path) -> DualEncoder:
    torch.manual_seed(0)
    return (pruned(folder) if family == PRUNED else make(family, folder)).eval()


def pruned(folder: Path) -> DualEncoder:
    """open_clip's own towers with one head and some hidden units taken out of each block."""
    whole = open_clip(folder, vision_cfg=VIT, text_cfg=CLIP_TEXT)
    model = whole.resized({"image": TowerSizes(32, (1,), (48,)), "text": TowerSizes(32, (1,), (40,))})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "logit" not in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.2 + ("ln" in name))
    return model


@cache
def scenes(split: str = "val", length: int = 60) -> Any:
    return open_source(f"scenes?length={length}", split=split)


@contextmanager
def checked_here() -> Iterator[None]:
    """Files are run in this process, where what they give counts; others hold that a process of its own runs them."""

    def run(command: list[str], **_options: Any) -> SimpleNamespace:
        assert command[1:3] == ["-m", "cmapkd.export.check"]
        check(*command[3:])
        return SimpleNamespace(returncode=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "subprocess", SimpleNamespace(run=run, TimeoutExpired=TimeoutError))
        yield


def write(model: DualEncoder, out: Path, **options: Any) -> dict[str, Any]:
    return export_onnx(model, out, **{"origin": ORIGIN, "licence": FREE, **options})
