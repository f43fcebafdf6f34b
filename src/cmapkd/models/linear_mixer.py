"""`LinearMixer`: linear attention with a state of constant size, in the place of a layer's softmax attention."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.models.gated_recurrence import gated_recurrence
from cmapkd.models.linear_state import state_in

MixerKind = Literal["mamba2", "gated_delta"]
WIDTHS: dict[str, int] = {"mamba2": 2, "gated_delta": 4}  # of the short convolutions, as published
_GATE_GAIN = 2**-2.5
_EPS = 1e-5
_RATES = {"mamba2": (0.001, 0.1), "gated_delta": (0.001, 0.001)}
_LOG_A = {"mamba2": 1.0, "gated_delta": 0.0}


class MixerState(NamedTuple):
    """What is kept of the tokens so far, whatever their number: Float[batch channels width-1] before the convolution,
    and Float[batch heads keys width] of the recurrence."""

    before: Tensor
    memory: Tensor


class LinearMixer(nn.Module):
    """Takes the place of an attention, and its projections: queries, keys, values and output keep their weights.

    Queries, keys and values pass a short causal convolution and SiLU. The recurrence of `gated_recurrence` mixes them,
    without positions. Its output is brought to unit size head by head, and gated by SiLU of the layer's input. New
    parts begin near "do nothing": the convolution passes the current token, no decay or strength depends on the input.

    Args:
        attention: of a decoder layer of transformers.
        width: of the convolution, in tokens.
        seeded: if not, queries, keys, values and output begin with random weights.
    Raises:
        ConfigError: the attention has other projections.
    Source: Mamba-2 layers of mmMamba (arXiv:2502.13145), gated delta networks as InfiniteVL begins them (Dec. 2025).
    """

    def __init__(self, attention: Any, kind: MixerKind, *, layer: int, width: int, seeded: bool = True) -> None:
        super().__init__()
        self.kind, self.layer_idx = kind, layer
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = _projections(attention, layer, seeded=seeded)
        self.q_norm, self.k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        self.head_width = int(attention.head_dim)
        self.heads, self.groups = (each.out_features // self.head_width for each in (self.q_proj, self.k_proj))
        inputs, weight = self.q_proj.in_features, self.q_proj.weight
        channels = sum(each.out_features for each in (self.q_proj, self.k_proj, self.v_proj))
        like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.taps = nn.Parameter(torch.zeros(channels, 1, width, **like))
        self.shift = nn.Parameter(torch.zeros(channels, **like)) if kind == "mamba2" else None
        self.step = nn.Linear(inputs, self.heads, bias=False, **like)
        self.step_bias = nn.Parameter(torch.zeros(self.heads, **like))
        self.log_decay = nn.Parameter(torch.full((self.heads,), _LOG_A[kind], **like))
        self.strength = nn.Linear(inputs, self.heads, bias=False, **like) if kind == "gated_delta" else None
        self.gate = nn.Linear(inputs, self.heads * self.head_width, bias=False, **like)
        self.scale = nn.Parameter(torch.ones(self.head_width, **like))
        self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        self.taps[..., -1] = 1.0
        for zero in (self.step, self.strength):
            if zero is not None:
                zero.weight.zero_()
        least, most = (math.log(each) for each in _RATES[self.kind])
        step = torch.exp(least + (most - least) * torch.rand(self.heads))
        self.step_bias.copy_(step + torch.log(-torch.expm1(-step)))  # whose softplus is the step
        nn.init.xavier_uniform_(self.gate.weight, gain=_GATE_GAIN)

    @property
    def state_size(self) -> int:
        """Numbers of a dialogue's `MixerState`."""
        return self.taps.shape[0] * (self.taps.shape[2] - 1) + self.heads * self.head_width**2

    def forward(
        self,
        hidden_states: Float[Tensor, "batch length width"],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """As an attention of transformers is called. While a model writes, its cache holds the state."""
        kept = None if past_key_values is None else state_in(past_key_values, self.layer_idx)
        before = None if kept is None else kept.state
        mixed, state = self.mix(hidden_states, attention_mask, before)
        if kept is not None:
            kept.keep(state, hidden_states.shape[1])
        return self.o_proj(mixed), None

    def mix(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, state: MixerState | None = None
    ) -> tuple[Float[Tensor, "batch length channels"], MixerState]:
        """What is in front of the output projection, and the state after the last token."""
        real = real_tokens(attention_mask, hidden_states.shape[1])
        inputs = self._projected(hidden_states)
        if real is not None:
            inputs = inputs * real[..., None]
        before = (
            inputs.new_zeros(len(inputs), inputs.shape[2], self.taps.shape[2] - 1) if state is None else state.before
        )
        whole = torch.cat([before.to(inputs.dtype), inputs.mT], dim=2)
        passed = F.silu(F.conv1d(whole, self.taps, self.shift, groups=len(self.taps))).mT
        sizes = [self.heads * self.head_width] + [self.groups * self.head_width] * 2
        queries, keys, values = (self._by_head(each) for each in passed.split(sizes, dim=-1))
        mixed, memory = self._recur(hidden_states, queries, keys, values, real, None if state is None else state.memory)
        unit = mixed * torch.rsqrt(mixed.square().mean(-1, keepdim=True) + _EPS)
        gate = F.silu(self.gate(hidden_states)).unflatten(-1, (self.heads, self.head_width))
        output = (unit.transpose(1, 2) * self.scale).to(gate.dtype) * gate
        return output.flatten(-2), MixerState(whole[..., whole.shape[2] - before.shape[2] :], memory)

    def _projected(self, hidden_states: Tensor) -> Tensor:
        """Queries, keys and values beside each other; normalised by head where the attention does so."""
        rows = []
        for project, norm in ((self.q_proj, self.q_norm), (self.k_proj, self.k_norm), (self.v_proj, None)):
            row = project(hidden_states)
            rows.append(row if norm is None else norm(row.unflatten(-1, (-1, self.head_width))).flatten(-2))
        return torch.cat(rows, dim=-1)

    def _by_head(self, rows: Tensor) -> Tensor:
        """Float[batch heads length width]; a key or value of a group for each of its heads."""
        heads: Tensor = rows.unflatten(-1, (-1, self.head_width)).transpose(1, 2)
        return heads.repeat_interleave(self.heads // heads.shape[1], dim=1)

    def _recur(
        self, hidden: Tensor, queries: Tensor, keys: Tensor, values: Tensor, real: Tensor | None, memory: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(self.step_bias.dtype, torch.float32)
        step = F.softplus(self.step(hidden).to(wide) + self.step_bias.to(wide)).mT
        strength = None if self.strength is None else self.strength(hidden).to(wide).sigmoid().mT
        if real is not None:  # padding neither writes nor lets the state fade
            step = step * real[:, None]
            strength = None if strength is None else strength * real[:, None]
        log_decay = -self.log_decay.to(wide).exp()[:, None] * step
        if strength is None:
            return gated_recurrence(queries, keys, values * step[..., None], log_decay, state=memory)
        queries = F.normalize(queries.to(wide), dim=-1) * self.head_width**-0.5
        keys = F.normalize(keys.to(wide), dim=-1)
        return gated_recurrence(queries, keys, values, log_decay, strength=strength, state=memory)


def real_tokens(mask: Tensor | None, length: int) -> Bool[Tensor, "batch length"] | None:
    """Which tokens are no padding, of the mask that transformers makes for an attention; None: all.

    In a mask of queries and keys a token sees itself unless it is padding.

    Args:
        mask: None, [batch keys], or [batch 1 queries keys] of bools or of numbers that are added, below zero where
            nothing is seen. The last keys are the queries.
    """
    if mask is None:
        return None
    if mask.ndim == 4:
        mask = mask[:, 0].diagonal(mask.shape[-1] - length, dim1=-2, dim2=-1)
        return mask if mask.dtype == torch.bool else mask == 0
    return mask[:, -length:].bool()


def _projections(attention: Any, layer: int, *, seeded: bool) -> list[nn.Linear]:
    found: list[Any] = [getattr(attention, f"{name}_proj", None) for name in "qkvo"]
    if not all(type(each) is nn.Linear for each in found) or not hasattr(attention, "head_dim"):
        raise ConfigError(
            f"layer {layer} has a {type(attention).__name__}, without plain linear layers q_proj, k_proj, v_proj and "
            "o_proj: it cannot be converted. Name other layers, or another model"
        )
    if seeded:
        return found
    fresh = []
    for old in found:
        like = {"device": old.weight.device, "dtype": old.weight.dtype}
        fresh.append(nn.Linear(old.in_features, old.out_features, bias=old.bias is not None, **like))
    return fresh
