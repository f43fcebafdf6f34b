"""What can be taken out of a transformer tower, and where it stands in the weights: channels, heads, hidden units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Place:
    """Where the units of a group stand in a weight.

    Attributes:
        weight: its name in the model.
        axis: along which the units stand in it.
        scaled: whether a unit's factor belongs here: on what it gives, and not also on what it is made of.
        each: entries of one unit, side by side: the channels of a head.
        times: how often all units stand there, one stretch after the other: as queries, keys and values.
    """

    weight: str
    axis: int
    scaled: bool = False
    each: int = 1
    times: int = 1

    def take(self, weight: Tensor, kept: Int[Tensor, " kept"], size: int) -> Tensor:
        """The weight with the kept ones of `size` units."""
        stretches = torch.arange(self.times, device=kept.device)[:, None, None] * size
        inside = torch.arange(self.each, device=kept.device)
        entries = (stretches + kept[None, :, None]) * self.each + inside
        return weight.index_select(self.axis, entries.flatten().to(weight.device))

    def scale(self, weight: Tensor, factors: Float[Tensor, " size"]) -> Tensor:
        """The weight with each unit's part multiplied by its factor."""
        along = factors.repeat_interleave(self.each).repeat(self.times)
        return weight * along.view(-1, *[1] * (weight.ndim - 1 - self.axis))


@dataclass(frozen=True, slots=True)
class Group:
    """Units of one kind, of which some may be kept without the others."""

    size: int
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class TowerSizes:
    """Channels of a tower's stream; heads and hidden units of each of its layers."""

    width: int
    heads: tuple[int, ...]
    units: tuple[int, ...]

    def plain(self) -> dict[str, Any]:
        return {"width": self.width, "heads": [*self.heads], "units": [*self.units]}

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """What `plain` wrote."""
        return cls(int(values["width"]), tuple(values["heads"]), tuple(values["units"]))


@dataclass(frozen=True, slots=True)
class BlockNames:
    """The weights of one pre-norm layer by their names: linear maps and norms without `.weight` and `.bias`."""

    norms: tuple[str, str]
    qkv: tuple[str, str]  # weight and bias of queries, keys and values, fused in this order, heads inside each
    out: str
    expand: str
    shrink: str
    vectors: tuple[str, ...] = ()  # further weights with one entry a channel


@dataclass(frozen=True, slots=True)
class PrunableTower:
    """A pre-norm transformer tower, taken apart.

    Attributes:
        head_width: channels of a head.
        channels: of the residual stream, shared by all layers.
        heads, units: of each layer.
        norms: names of the modules that normalise over the channels.
    """

    head_width: int
    channels: Group
    heads: tuple[Group, ...]
    units: tuple[Group, ...]
    norms: tuple[str, ...]

    @classmethod
    def of(
        cls,
        sizes: TowerSizes,
        *,
        head_width: int,
        blocks: Sequence[BlockNames],
        writes: Mapping[str, int],
        reads: Mapping[str, int],
        norms: Sequence[str],
    ) -> Self:
        """A tower from its names.

        Args:
            writes: what makes the stream before the first layer (embeddings, positions), and the axis of its channels.
            reads: what reads it behind the last (the projection), likewise.
            norms: those outside the layers.
        """
        norms = [*norms, *(norm for block in blocks for norm in block.norms)]
        channels = [Place(name, axis, scaled=True) for name, axis in writes.items()]
        channels += [Place(name, axis) for name, axis in reads.items()]
        channels += [Place(f"{norm}.{kind}", 0) for norm in norms for kind in ("weight", "bias")]
        heads, units = [], []
        for block, num_heads, num_units in zip(blocks, sizes.heads, sizes.units, strict=True):
            for name in (block.out, block.shrink):
                channels += [Place(f"{name}.{kind}", 0, scaled=True) for kind in ("weight", "bias")]
            channels += [Place(block.qkv[0], 1), Place(f"{block.expand}.weight", 1)]
            channels += [Place(name, 0) for name in block.vectors]
            fused = [Place(name, 0, each=head_width, times=3) for name in block.qkv]
            heads.append(Group(num_heads, (Place(f"{block.out}.weight", 1, scaled=True, each=head_width), *fused)))
            expand = [Place(f"{block.expand}.{kind}", 0) for kind in ("weight", "bias")]
            units.append(Group(num_units, (Place(f"{block.shrink}.weight", 1, scaled=True), *expand)))
        return cls(head_width, Group(sizes.width, tuple(channels)), tuple(heads), tuple(units), tuple(norms))

    def within(self, outer: str) -> PrunableTower:
        """The same with the names that the weights have in a model that holds this one as `outer`."""

        def named(group: Group) -> Group:
            return Group(group.size, tuple(replace(place, weight=f"{outer}.{place.weight}") for place in group.places))

        heads, units = (tuple(named(group) for group in groups) for groups in (self.heads, self.units))
        norms = tuple(f"{outer}.{norm}" for norm in self.norms)
        return replace(self, channels=named(self.channels), heads=heads, units=units, norms=norms)

    @property
    def groups(self) -> dict[str, Group]:
        """All groups by name: `channels`, `heads_0`, `units_0`, ..."""
        layers = {f"heads_{number}": group for number, group in enumerate(self.heads)}
        layers |= {f"units_{number}": group for number, group in enumerate(self.units)}
        return {"channels": self.channels, **layers}

    @property
    def sizes(self) -> TowerSizes:
        heads, units = (tuple(group.size for group in groups) for groups in (self.heads, self.units))
        return TowerSizes(self.channels.size, heads, units)

    def num_weights(self, sizes: TowerSizes | None = None) -> int:
        """Entries of the layers' matrices, of this tower or of one of these sizes.

        What sparsity is counted in. Biases, norms, embeddings and projections are not among them.
        """
        sizes = sizes or self.sizes
        return sizes.width * (4 * self.head_width * sum(sizes.heads) + 2 * sum(sizes.units))


Kept = Mapping[str, Int[Tensor, " kept"]]
"""Which units of each group of a tower are kept, by the group's name."""


def kept_sizes(kept: Kept) -> TowerSizes:
    """How many that are."""
    heads, units = (
        tuple(len(kept[f"{kind}_{layer}"]) for layer in range(len(kept) // 2)) for kind in ("heads", "units")
    )
    return TowerSizes(len(kept["channels"]), heads, units)
