"""The alignment bridge: linear maps of pooled levels of both towers into one latent space of unit vectors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cmapkd.features.pyramid import check_known


class AlignmentBridge(nn.Module):
    """One model's visual and language levels where they can be compared: a_i = N(V2L_i(v_i)), c_j = N(L2V_j(l_j)).

    Teacher and student each have their own. The teacher's is trained by its own contrastive loss on frozen features;
    nothing flows into the student through it.
    """

    def __init__(self, visual_widths: Mapping[str, int], language_widths: Mapping[str, int], dim: int = 256) -> None:
        """Maps for the named levels, from channels of each to `dim`, the width of the latent space."""
        super().__init__()
        self.dim = dim
        self.visual = nn.ModuleDict({name: nn.Linear(width, dim) for name, width in visual_widths.items()})
        self.language = nn.ModuleDict({name: nn.Linear(width, dim) for name, width in language_widths.items()})

    def forward(
        self,
        visual: Mapping[str, Float[Tensor, "batch width"]],
        language: Mapping[str, Float[Tensor, "batch width"]],
    ) -> tuple[dict[str, Float[Tensor, "batch dim"]], dict[str, Float[Tensor, "batch dim"]]]:
        """Pooled levels to unit vectors, float32 or wider; any part of the levels that there are maps for.

        Raises:
            ValueError: a level has no map.
        """
        return _mapped(self.visual, visual), _mapped(self.language, language)


def _mapped(maps: nn.ModuleDict, levels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    check_known(levels, maps, "bridge")
    return {name: _unit(maps[name](vector)) for name, vector in levels.items()}


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
