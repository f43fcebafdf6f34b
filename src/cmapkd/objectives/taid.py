"""How fast TAID's target moves from the student to the teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class TaidState:
    """What one step of TAID hands to the next.

    Attributes:
        t: the teacher's share in the target's logits; of the first step its start.
        previous: the loss of the step before; infinite before the first step.
        momentum: running mean of the loss's relative decrease.
    """

    t: float
    previous: float = math.inf
    momentum: float = 0.0


def next_taid(
    state: TaidState,
    loss: float,
    *,
    progress: float,
    start: float = 0.4,
    end: float = 1.0,
    rate: float = 5e-4,
    inertia: float = 0.99,
) -> TaidState:
    """The state after a step: t grows with time at least, and faster while the loss falls.

    The first step only stores its loss.

    Args:
        loss: of the step, over all processes; of `taid` in the cross-entropy form that the paper's code uses, or of any
            other positive quantity that falls as the student comes closer.
        progress: share of the training that is done, in [0, 1].
        start, end: t is at least start + (end - start) * progress, and at most end.
        rate: largest step of t beyond that, of what is missing to 1.
        inertia: of the running mean, in [0, 1).
    Source: TAID, arXiv:2501.16937, section 3.3.
    """
    if math.isinf(state.previous):
        return replace(state, previous=loss)
    decrease = (state.previous - loss) / (state.previous + 1e-15)
    momentum = inertia * state.momentum + (1 - inertia) * decrease
    faster = state.t + rate * (1 - state.t) * (1 + math.tanh(momentum / 2)) / 2  # the logistic function
    floor = start + (end - start) * progress
    return TaidState(min(end, max(floor, faster)), loss, momentum)
