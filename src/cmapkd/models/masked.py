"""`MaskedEncoder`: a model that learns which of its channels, heads and hidden units it can do without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import functional_call

from cmapkd.data.types import TokenBatch
from cmapkd.models.base import DualEncoder
from cmapkd.models.cut import cut
from cmapkd.models.gates import LOG_ALPHA_RANGE, drawn_gates, expected_weights, fixed_gates
from cmapkd.models.parts import within
from cmapkd.models.prunable import PrunableTower
from cmapkd.models.types import BOTH, Tower, TowerFeatures


@dataclass(frozen=True, slots=True)
class _Folded:
    """A tower with gates: the weights that they multiply, and whether each channel's gate is not 0."""

    weights: dict[str, Tensor]
    kept: Bool[Tensor, " channels"]


class MaskedEncoder(DualEncoder):
    """A model whose units have learned gates, which are multiplied into its weights.

    A gate acts on what its unit gives: a channel on embeddings and on the layers' outputs, a head before the output
    projection, a hidden unit behind the activation. Norms see the channels alone whose gate is not 0. So what is left
    after taking out the units with gate 0 computes the same, and that is what `shrunk` returns and `save` writes.

    In training mode gates are drawn anew by each `draw`, for all samples of the batch alike; in eval mode, and before
    the first draw, they are fixed.

    Attributes:
        model: the full model.
        masks: log alpha of each group of units, by tower and group.

    Raises:
        ValueError: the model's family cannot be taken apart.
    """

    does: ClassVar[str] = "has gates at its units"

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model
        self.prunable_towers = check_prunable(model)
        self.masks = nn.ParameterDict(
            {
                f"{tower}_{name}": nn.Parameter(model.log_logit_scale.new_full((group.size,), LOG_ALPHA_RANGE[1]))
                for tower, parts in self.prunable_towers.items()
                for name, group in parts.groups.items()
            }
        )
        self._drawn: dict[Tower, _Folded] = {}
        self.name, self.embed_dim, self.tokenizer = model.name, model.embed_dim, model.tokenizer
        self.image_spec, self.image_levels, self.text_levels = model.image_spec, model.image_levels, model.text_levels

    @property
    def log_logit_scale(self) -> nn.Parameter:
        return self.model.log_logit_scale

    @property
    def logit_bias(self) -> Tensor | None:
        return self.model.logit_bias

    @property
    def parts(self) -> Mapping[str, frozenset[str]]:
        """Those of the full model, and `masks`."""
        masks = frozenset(f"masks.{name}" for name in self.masks)
        return {**within("model", self.model.parts), "masks": masks}

    def clamp_logit_scale(self) -> None:
        self.model.clamp_logit_scale()

    def compile(self, *_arguments: Any, **_options: Any) -> None:
        """Does nothing: its weights are made anew in every step, which a compiled model would not see."""

    def draw(self, generator: torch.Generator) -> None:
        """New gates, until the next draw.

        Args:
            generator: what they are drawn from, on the CPU, the same in every process.
        """

        def drawn(log_alpha: Tensor) -> Tensor:
            uniform = torch.rand(len(log_alpha), generator=generator).to(log_alpha.device, non_blocking=True)
            return drawn_gates(log_alpha, uniform)

        self._drawn = {
            tower: self._folded(tower, {name: drawn(alpha) for name, alpha in self._log_alphas(tower).items()})
            for tower in self.prunable_towers
        }

    @torch.no_grad()
    def after_step(self) -> None:
        """Keeps every log alpha and the logit scale in their ranges, and lets go of the last draw."""
        super().after_step()
        for log_alpha in self.masks.values():
            log_alpha.clamp_(*LOG_ALPHA_RANGE)
        self._drawn = {}

    def expected_weights(self) -> Float[Tensor, ""]:
        """How many entries of the layers' matrices are kept on average, with gradient to the masks."""
        expected = []
        for tower, parts in self.prunable_towers.items():
            masks = self._log_alphas(tower)
            heads, units = ([masks[f"{kind}_{n}"] for n in range(len(parts.heads))] for kind in ("heads", "units"))
            expected.append(expected_weights(masks["channels"], heads, units, per_head=4 * parts.head_width))
        return torch.stack(expected).sum()

    @torch.no_grad()
    def shrunk(self) -> DualEncoder:
        """The smaller model that gives what this one gives in eval mode."""
        gates = {tower: self._fixed(tower) for tower in self.prunable_towers}
        weights: dict[str, Tensor] = {}
        for tower in self.prunable_towers:
            weights |= self._folded(tower, gates[tower]).weights
        kept = {
            tower: {name: gate.nonzero()[:, 0] for name, gate in gates[tower].items()} for tower in self.prunable_towers
        }
        return cut(self.model, kept, weights)

    def encode_image(self, images: Float[Tensor, "batch 3 height width"], levels: Sequence[str] = ()) -> TowerFeatures:
        return self._encode("image", images, levels)

    def encode_text(self, texts: TokenBatch, levels: Sequence[str] = ()) -> TowerFeatures:
        return self._encode("text", texts, levels)

    def write(self, folder: Path) -> None:
        """Writes the smaller model."""
        self.shrunk().save(folder)

    def _encode(self, tower: Tower, inputs: Any, levels: Sequence[str]) -> TowerFeatures:
        drawn = self._drawn.get(tower) if self.training else None
        folded = drawn or self._folded(tower, self._fixed(tower))
        weights = {f"model.{name}": weight for name, weight in folded.weights.items()}
        with self._norms_over(folded.kept, tower):
            output: TowerFeatures = functional_call(_Call(self.model), weights, (f"encode_{tower}", inputs, levels))
        return output

    def _log_alphas(self, tower: Tower) -> dict[str, Tensor]:
        return {name: self.masks[f"{tower}_{name}"] for name in self.prunable_towers[tower].groups}

    def _fixed(self, tower: Tower) -> dict[str, Tensor]:
        return {name: fixed_gates(log_alpha) for name, log_alpha in self._log_alphas(tower).items()}

    def _folded(self, tower: Tower, gates: dict[str, Tensor]) -> _Folded:
        weights: dict[str, Tensor] = {}
        for name, group in self.prunable_towers[tower].groups.items():
            for place in group.places:
                if place.scaled:
                    weight = weights.get(place.weight)
                    weight = self.model.get_parameter(place.weight) if weight is None else weight
                    weights[place.weight] = place.scale(weight, gates[name])
        return _Folded(weights, gates["channels"] != 0)

    @contextmanager
    def _norms_over(self, kept: Bool[Tensor, " channels"], tower: Tower) -> Iterator[None]:
        """While the context is open, the tower's norms see these channels alone."""

        def normalised(norm: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor:
            assert isinstance(norm, nn.LayerNorm)
            return _norm_over(kept, inputs[0], norm)

        handles = [
            self.model.get_submodule(n).register_forward_hook(normalised) for n in self.prunable_towers[tower].norms
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _norm_over(
    kept: Bool[Tensor, " channels"], x: Float[Tensor, "*batch channels"], norm: nn.LayerNorm
) -> Float[Tensor, "*batch channels"]:
    """A layer norm over the kept channels, 0 in the others; float32 or wider.

    Written out over all channels: to pick the kept ones, the host would wait for a GPU to say how many there are.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    count = kept.sum()
    centred = torch.where(kept, wide - torch.where(kept, wide, 0.0).sum(-1, keepdim=True) / count, 0.0)
    variance = centred.square().sum(-1, keepdim=True) / count
    return torch.where(kept, centred * (variance + norm.eps).rsqrt() * norm.weight + norm.bias, 0.0)


class _Call(nn.Module):
    """A method of a model as a module's forward, where `functional_call` can exchange its weights."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, name: str, *arguments: Any) -> Any:
        return getattr(self.model, name)(*arguments)


def check_prunable(model: DualEncoder) -> dict[Tower, PrunableTower]:
    """Both towers, taken apart.

    Raises:
        ValueError: they are of a kind that cannot be; names those that can.
    """
    towers = dict(model.prunable)
    if {*towers} != {*BOTH}:
        raise ValueError(
            f"{model.name} cannot be pruned by masks: that takes a plain pre-norm ViT and text transformer of the "
            "families tiny or open_clip (not timm, hf, ResNets or towers with blocks of their own). Take one of these "
            "as the student, or cut a smaller one of the same family from it with student.inherit"
        )
    return towers
