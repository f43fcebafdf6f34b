"""Networks on a teacher's embeddings that tell classes, and masks that change what their layers say."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class ChannelMask(nn.Module):
    """A factor in (0, 1) for each channel of a layer, by attention among its channels.

    Each channel gets a vector that depends on all of them. The vectors attend to each other, and one map makes a number
    of each.

    Args:
        width: channels of the layer.
        heads: of the attention; the vectors have the largest multiple of it that is at most width / 2.
    Raises:
        ValueError: half of the channels are fewer than the heads.
    Source: Li et al. 2025, arXiv:2507.07015, the masking network of its code.
    """

    def __init__(self, width: int, *, heads: int = 3) -> None:
        super().__init__()
        inner = width // (2 * heads) * heads
        if inner < heads:
            raise ValueError(f"a mask of {heads} heads is for layers of {2 * heads} channels or more, not of {width}")
        self.width, self.inner = width, inner
        self.embed = nn.Linear(width, inner * width)
        self.attention = nn.MultiheadAttention(inner, heads, batch_first=True)
        self.score = nn.Linear(inner, 1)

    def forward(self, values: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
        """The factors for these values."""
        vectors = self.embed(values).unflatten(1, (self.width, self.inner))
        attended, _ = self.attention(vectors, vectors, vectors, need_weights=False)
        factors: Tensor = self.score(attended).squeeze(-1).sigmoid()
        return factors


class ClassNetwork(nn.Module):
    """Three linear layers with ReLU between them, from embeddings to scores of classes.

    Args:
        width: of the embeddings.
        hidden: units of the first layer; the second has half of them.
    """

    def __init__(self, width: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        sizes = (width, hidden, hidden // 2, num_classes)
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(sizes))

    def forward(
        self,
        embeddings: Float[Tensor, "batch width"],
        masks: Mapping[int, nn.Module] | None = None,
        *,
        frozen: bool = False,
    ) -> Float[Tensor, "batch classes"]:
        """Scores of the classes.

        Args:
            masks: by the number of the layer from 1, whose values they multiply before the ReLU.
            frozen: whether no gradient reaches the weights, only the masks.
        """
        values = embeddings
        for number, layer in enumerate(self.layers, 1):
            weight, bias = layer.weight, layer.bias
            assert isinstance(weight, Tensor)
            assert isinstance(bias, Tensor)
            values = F.linear(values, weight.detach(), bias.detach()) if frozen else layer(values)
            if masks is not None and number in masks:
                values = values * masks[number](values)
            if number < len(self.layers):
                values = values.relu()
        return values


class Specialists(nn.Module):
    """Networks by name, and of each as many specialists as it has masked layers.

    Args:
        widths: of what each network reads.
        mask_layers: layers with a mask, from the first; 0: each network is its own specialist.

    Attributes:
        keys: names of the specialists, in their order.
    """

    def __init__(
        self, widths: Mapping[str, int], num_classes: int, *, hidden: int, mask_layers: int, heads: int
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(
            {name: ClassNetwork(width, hidden, num_classes) for name, width in widths.items()}
        )
        layers = range(1, mask_layers + 1)
        self.masks = nn.ModuleDict(
            {f"{name}_{layer}": ChannelMask(hidden // layer, heads=heads) for name in widths for layer in layers}
        )
        self._places = [(name, layer) for name in widths for layer in (layers or (0,))]  # 0: without a mask
        self.keys = tuple(f"{name}_{layer}" if layer else name for name, layer in self._places)

    def last_layers(self) -> dict[str, nn.Parameter]:
        """Of the first network, and of the first mask where there is one, by name."""
        first = next(iter(self.networks))
        last = max(int(name.split(".")[1]) for name, _ in self.networks[first].named_parameters())
        names = [f"networks.{first}.layers.{last}.weight"]
        names += [f"masks.{name}.score.weight" for name in self.masks][:1]
        return {f"specialists.{name}": self.get_parameter(name) for name in names}

    def plain(self, inputs: Mapping[str, Float[Tensor, "batch width"]]) -> list[Float[Tensor, "batch classes"]]:
        """What each network says without masks."""
        return [network(inputs[name]) for name, network in self.networks.items()]

    def forward(
        self, inputs: Mapping[str, Float[Tensor, "batch width"]], *, stacked: bool = False
    ) -> Float[Tensor, "batch specialists classes"]:
        """What each specialist says; the masks get a gradient, the networks none.

        Args:
            stacked: whether the masks of earlier layers stay.
        """
        told: list[Tensor] = []
        for name, layer in self._places:
            masked = range(1 if stacked else layer, layer + 1) if layer else ()
            masks = {each: self.masks[f"{name}_{each}"] for each in masked}
            told.append(self.networks[name](inputs[name], masks, frozen=True))
        return torch.stack(told, dim=1)
