"""Linear attention as a recurrence with a state of constant size, computed a chunk of tokens at a time."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK = 64


def gated_recurrence(
    queries: Float[Tensor, "batch heads length keys"],
    keys: Float[Tensor, "batch heads length keys"],
    values: Float[Tensor, "batch heads length width"],
    log_decay: Float[Tensor, "batch heads length"],
    *,
    strength: Float[Tensor, "batch heads length"] | None = None,
    state: Float[Tensor, "batch heads keys width"] | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, "batch heads length width"], Float[Tensor, "batch heads keys width"]]:
    """o_t = S_tᵀ q_t with S_t = a_t S_{t-1} + k_t u_tᵀ, where a = exp(log_decay).

    u_t is v_t, which is the recurrence of Mamba-2 with x = v, B = k and C = q. With a `strength` b it is
    b_t (v_t − a_t S_{t-1}ᵀ k_t), the gated delta rule: what the state says of a key is replaced.

    A token with log_decay 0 and v = 0 (or strength 0) leaves the state as it was. One token at a time, each with the
    state of those before, gives what all tokens at once give.

    Args:
        log_decay: <= 0, of each token.
        strength: in [0, 1]; keys are then expected to have length 1.
        state: after the tokens before; None: zeros.
        chunk: tokens that are computed at once. Memory grows with length times chunk.
    Returns:
        Outputs, and the state after the last token; float32 or wider, also under autocast.
    Source: Dao & Gu 2024 (Mamba-2, arXiv:2405.21060), section 6; Yang et al. 2024 (gated delta networks,
        arXiv:2412.06464), section 3.3. The sums over a chunk are our own.
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    with torch.autocast(values.device.type, enabled=False):
        given = (queries, keys, values, log_decay, strength)
        queries, keys, values, log_decay, strength = (None if each is None else each.to(dtype) for each in given)  # type: ignore[assignment]
        if state is None:
            state = values.new_zeros(*values.shape[:2], keys.shape[-1], values.shape[-1])
        outputs = []
        for start in range(0, values.shape[2], chunk):
            at = (slice(None), slice(None), slice(start, start + chunk))
            part = None if strength is None else strength[at]
            output, state = _chunk(queries[at], keys[at], values[at], log_decay[at], part, state.to(dtype))
            outputs.append(output)
    return torch.cat(outputs, dim=2), state


def _chunk(
    queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor, strength: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    since = log_decay.cumsum(-1)  # log of the decay of the state since the chunk began
    size = since.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=since.device).tril()
    # exp is taken behind the mask: above the diagonal it would overflow, and infinity times zero is no number
    between = (since[..., :, None] - since[..., None, :]).masked_fill(~later, -torch.inf).exp()
    decayed = since.exp()[..., None]
    written = values
    if strength is not None:
        known = values - decayed * (keys @ state)
        overlaps = strength[..., None] * (between * (keys @ keys.mT)).tril(-1)
        # each token corrects what the state says after the tokens before it: a triangular system, ones on its diagonal
        written = torch.linalg.solve_triangular(overlaps, strength[..., None] * known, upper=False, unitriangular=True)
    output = (between * (queries @ keys.mT)) @ written + decayed * (queries @ state)
    left = (since[..., -1:] - since).exp()[..., None]
    return output, decayed[..., -1:, :] * state + (left * keys).mT @ written
