"""Texts as a model reads them: token ids, padded to one length, and how far of that a tower needs to compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cmapkd.data.ring import joined

LENGTH_MULTIPLE = 8  # a batch ends at a multiple of it: few lengths, so few compiled graphs, and rows that GPUs like


class Lengths:
    """How long each text of a batch is, in tokens, as the host knows it.

    No dataclass and no tuple: `torch.compile` would compile anew for other numbers, which the towers never read.
    """

    def __init__(self, of_each: Iterable[int]) -> None:
        self.of_each = tuple(of_each)


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Token ids of a batch of texts, which positions are not padding, and where in its text each token stands.

    A span is the first character of a token and the one after its last, in the text as it was given, before any
    cleaning. It is 0 0 for special tokens, padding, and tokens whose characters cleaning has changed beyond matching.

    Attributes:
        ids: Int[batch*per_sample length]: all texts of the first sample, then all of the second.
        mask: Bool[batch*per_sample length], True where a real token stands (special tokens included).
        spans: Int[batch*per_sample length 2]; None where nobody asked for them, or the tokenizer cannot tell.
        per_sample: texts of each sample.
        lengths: of each text, up to its last real token, where the tower computes the same without the padding that all
            texts of a batch have in common. They are the host's, so that nobody waits for a device to say them. None:
            texts are read as they are padded.
        pad_id: the token that fills short texts.
    """

    ids: Tensor
    mask: Tensor
    spans: Tensor | None = None
    per_sample: int = 1
    lengths: Lengths | None = None
    pad_id: int = 0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenBatch:
        return self.changed(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TokenBatch:
        return self.changed(torch.Tensor.pin_memory)

    def part(self, start: int, stop: int) -> TokenBatch:
        """The texts of the samples from `start` to before `stop`, cut to the longest of them."""
        rows = slice(start * self.per_sample, stop * self.per_sample)
        lengths = None if self.lengths is None else Lengths(self.lengths.of_each[rows])
        return replace(self.changed(lambda tensor: tensor[rows]), lengths=lengths).cut()

    def rows(self, places: Tensor) -> TokenBatch:
        """The texts of the samples at `places`, in that order; cut to the longest of them if `places` is on the CPU."""
        if self.per_sample > 1:
            places = (places[:, None] * self.per_sample + torch.arange(self.per_sample, device=places.device)).flatten()
        lengths = None
        if self.lengths is not None and places.device.type == "cpu":
            lengths = Lengths(self.lengths.of_each[place] for place in places.tolist())
        return replace(self.changed(lambda tensor: tensor[places]), lengths=lengths).cut()

    def text_of_each(self, place: int) -> TokenBatch:
        """One text of each sample: its first, of `place` 0; cut to the longest of them."""
        here = slice(place, None, self.per_sample)
        lengths = None if self.lengths is None else Lengths(self.lengths.of_each[here])
        return replace(self.changed(lambda tensor: tensor[here]), lengths=lengths, per_sample=1).cut()

    def changed(self, change: Callable[[Tensor], Tensor]) -> TokenBatch:
        """With `change` of each tensor."""
        spans = None if self.spans is None else change(self.spans)
        return replace(self, ids=change(self.ids), mask=change(self.mask), spans=spans)

    def measured(self) -> TokenBatch:
        """With `lengths`; for tokens on the CPU, of a tower that computes the same without common padding."""
        if not self.mask.numel():
            return replace(self, lengths=Lengths([0] * len(self.mask)))
        ends = self.mask * torch.arange(1, self.mask.shape[1] + 1)
        return replace(self, lengths=Lengths(ends.amax(1).tolist()))

    def cut(self) -> TokenBatch:
        """Without the places behind the longest text, up to a multiple of 8. This is where texts are cut.

        Tokens without `lengths` stay as they are.
        """
        if self.lengths is None or not self.lengths.of_each:
            return self
        length = LENGTH_MULTIPLE * max(1, -(-max(self.lengths.of_each) // LENGTH_MULTIPLE))
        if length >= self.ids.shape[1]:
            return self
        return self.changed(lambda tensor: tensor[:, :length].contiguous())


def united_texts(parts: Sequence[TokenBatch]) -> TokenBatch:
    """The texts of several batches of one tokenizer, one after the other, padded to the longest of them."""
    longest = max(part.ids.shape[1] for part in parts)

    def padded(tensors: Iterable[Tensor], fill: int) -> Tensor:
        return joined([_widened(tensor, longest, fill) for tensor in tensors])

    first = parts[0]
    spans = [part.spans for part in parts if part.spans is not None]
    lengths = [part.lengths for part in parts if part.lengths is not None]
    return replace(
        first,
        ids=padded([part.ids for part in parts], first.pad_id),
        mask=padded([part.mask for part in parts], 0),
        spans=padded(spans, 0) if len(spans) == len(parts) else None,
        lengths=Lengths(each for part in lengths for each in part.of_each) if len(lengths) == len(parts) else None,
    )


def _widened(tensor: Tensor, length: int, fill: int) -> Tensor:
    """[batch length ...] with `fill` behind what is there."""
    missing = length - tensor.shape[1]
    return F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, missing), value=fill) if missing else tensor
