"""Logit scales that a method learns beside the student's: their start, their form and their range."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmapkd.models import MAX_LOGIT_SCALE

ScaleForm = Literal["exp", "official"]
"""exp: the parameter is the factor's logarithm, in CLIP's range. official: it is the factor, without a range."""


def new_scale() -> nn.Parameter:
    """A parameter that starts at log(1/0.07) = 2.66, as CLIP's does."""
    return nn.Parameter(torch.tensor(math.log(1 / 0.07)))


def factor(scale: Float[Tensor, ""], form: ScaleForm) -> Float[Tensor, ""]:
    """What the scale multiplies cosines by: 14.3 at first, or 2.66 where it is official."""
    return scale if form == "official" else scale.exp()


@torch.no_grad()
def keep_in_range(scales: Iterable[nn.Parameter | None], form: ScaleForm) -> None:
    """Keeps factors in [1, 100], as CLIP's; official ones stay as they are, and so does a scale that is None."""
    for scale in scales:
        if scale is not None and form == "exp":
            scale.clamp_(0.0, math.log(MAX_LOGIT_SCALE))
