"""Flat rows of dialogues as padded tables, for modules that read a whole dialogue at once."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Bool, Float
from torch import Tensor

from cmapkd.data.dialogues import ChatInput
from cmapkd.features.visual_rows import per_picture
from cmapkd.models.token_types import Rows, Where


def dialogue_table(
    rows: Mapping[Where, Rows], inputs: ChatInput
) -> tuple[Float[Tensor, "batch places width"], Bool[Tensor, "batch places"]]:
    """Rows of each dialogue beside each other, and True where there is one. Padding is zero.

    Words stand at their places in the dialogue, and visual tokens behind them, in the order of their picture.

    Args:
        rows: of the positions that are read.
        inputs: of the same dialogues. Inputs that lie on the host make nothing wait for a device.
    """
    batch, length = inputs.texts.ids.shape
    first = next(iter(rows.values())).values
    places = length + max(per_picture(inputs), default=0)
    table, mask = first.new_zeros(batch, places, first.shape[-1]), first.new_zeros(batch, places).bool()
    for where, each in rows.items():
        at = (each.sample, each.place + (length if where == "visual" else 0))
        table = table.index_put(at, each.values)
        mask = mask.index_put(at, mask.new_ones(()))
    return table, mask
