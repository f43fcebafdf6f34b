"""What the tests of exports share: the small models of every family, and one export of each, made once."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "families"))
from family_support import FAMILIES, make

from cmapkd.data.open import open_source
from cmapkd.export.licence import Licence
from cmapkd.export.origin import Origin
from cmapkd.export.write import export_onnx
from cmapkd.models import DualEncoder

__all__ = ["FAMILIES", "FREE", "ORIGIN", "make", "model_of", "scenes", "write"]

ORIGIN = Origin("student", teachers=("tiny:scenes-teacher",), method="clip_kd", data="scenes", seed=0)
FREE = Licence("apache-2.0", "Licence: apache-2.0.", None)


@cache
def model_of(family: str, folder: Path) -> DualEncoder:
    torch.manual_seed(0)
    return make(family, folder / family.replace(" ", "_").replace(",", "")).eval()


@cache
def scenes(split: str = "val", length: int = 60) -> Any:
    return open_source(f"scenes?length={length}", split=split)


def write(model: DualEncoder, out: Path, **options: Any) -> dict[str, Any]:
    return export_onnx(model, out, **{"origin": ORIGIN, "licence": FREE, **options})
