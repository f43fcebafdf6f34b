"""Divergences between what two models predict for each token, each with its gradient written out.

Every one is a sum over cells: the tokens of a vocabulary, or a teacher's likeliest ones and the rest (`top_tokens.py`).
Its slopes are the derivatives by the student's log-probabilities of the cells. Those by its logits at temperature 1 are
`slopes - slopes.sum(-1) * q`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from cmapkd.objectives.common import at_least_float32
from cmapkd.objectives.divergence import check_temperature

DivergenceName = Literal["forward", "reverse", "jsd", "skew_forward", "skew_reverse", "tv", "taid", "sampled_reverse"]


class Measured(NamedTuple):
    """A divergence of each row, at temperature 1.

    Attributes:
        values: Float[rows] in nats.
        slopes: Float[rows cells], d value / d log q of each cell. Any multiple of q may be missing: derivatives by
            logits have none of it.
    """

    values: Tensor
    slopes: Tensor


@dataclass(frozen=True, slots=True)
class TokenDivergence:
    """How far a student's prediction of each token is from a teacher's: p the teacher's probabilities, q the student's.

    | name | value | source |
    | --- | --- | --- |
    | forward | sum p log(p/q) | Hinton et al. 2015, arXiv:1503.02531 |
    | reverse | sum q log(q/p) | MiniLLM, arXiv:2306.08543 |
    | jsd | beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q | GKD, arXiv:2306.13649 |
    | skew_forward | KL(p, lam p + (1 - lam) q) | DistiLLM, arXiv:2402.03898 |
    | skew_reverse | KL(q, (1 - lam) p + lam q) | the same |
    | tv | sum abs(p - q) / 2 | f-distill, arXiv:2307.15190 |
    | taid | -sum p_t log q, p_t = softmax((1 - t) z_S + t z_T), with no gradient through p_t | TAID, arXiv:2501.16937 |
    | sampled_reverse | log q_y - log p_y of the token y that the student drew | on-policy distillation |

    The value of `sampled_reverse` estimates the reverse divergence without bias; its gradient is that of the score
    function, (log q_y - log p_y) d log q_y, and no gradient of the value. It may be negative.

    Attributes:
        temperature: divides both models' logits; > 0. Values are multiplied by its square, as in `kl_divergence`.
        beta: of `jsd`, in [0, 1]: the teacher's share in m. 0 is `forward` and 1 is `reverse`. Without `normalise` that
            is a jump: next to the ends the value goes to zero.
        lam: of the skewed ones, in (0, 1): how much of the first distribution is mixed into the second.
        normalise: divides `jsd` by beta (1 - beta), so that it goes to `forward` and `reverse` without a jump.
        t: of `taid`, in [0, 1]: 0 aims at the student itself, 1 at the teacher.
    """

    name: DivergenceName = "forward"
    temperature: float = 1.0
    beta: float = 0.5
    lam: float = 0.1
    normalise: bool = False
    t: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in get_args(DivergenceName):
            raise ValueError(
                f"there is no divergence {self.name!r}: choose one of {', '.join(get_args(DivergenceName))}"
            )
        check_temperature(self.temperature)
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be in [0, 1], got {self.beta}: it is the teacher's share in the mixture")
        if not 0 < self.lam < 1:
            raise ValueError(f"lam must be in (0, 1), got {self.lam}; for 0 take `forward` or `reverse`")
        if not 0 <= self.t <= 1:
            raise ValueError(f"t must be in [0, 1], got {self.t}: it is the teacher's share in the target's logits")

    @property
    def reads_targets(self) -> bool:
        """Whether it asks which token stood there."""
        return self.name == "sampled_reverse"

    @property
    def reads_all_tokens(self) -> bool:
        """Whether a teacher's likeliest tokens are not enough for it."""
        return self.name in ("taid", "sampled_reverse")

    def __call__(
        self,
        student_logits: Float[Tensor, "rows tokens"],
        teacher_logits: Float[Tensor, "rows tokens"],
        *,
        targets: Int[Tensor, " rows"] | None = None,
    ) -> Float[Tensor, " rows"]:
        """The divergence of each row in nats, times the squared temperature; no gradient reaches the teacher.

        Args:
            student_logits, teacher_logits: over the same tokens, finite.
            targets: the tokens that stand there; read by `sampled_reverse` alone.
        Returns:
            In nats, >= 0 and zero where both agree; float32 or wider. But `sampled_reverse` may be negative, and `taid`
            is a cross-entropy, because its value moves t.
        Raises:
            ValueError: the shapes differ, or targets are missing.
        """
        if student_logits.shape != teacher_logits.shape or student_logits.ndim != 2:
            raise ValueError(
                f"student_logits has shape {tuple(student_logits.shape)} but teacher_logits "
                f"{tuple(teacher_logits.shape)}. Both must be [rows, tokens] over one vocabulary: cut padded rows of "
                "the heads, or align two tokenizers by `ranked.py`."
            )
        self.check_targets(targets)
        log_q, log_p = (self.log_softmax(logits) for logits in (student_logits, teacher_logits.detach()))
        return self.measure(log_q, log_p, targets).values * self.temperature**2

    def check_targets(self, targets: Tensor | None) -> None:
        """Refuses missing targets where they are read.

        Raises:
            ValueError: says which divergence reads them.
        """
        if self.reads_targets and targets is None:
            raise ValueError(f"{self.name} reads the tokens that the student drew: pass them as targets")

    def log_softmax(self, logits: Float[Tensor, "rows tokens"]) -> Float[Tensor, "rows tokens"]:
        """Log-probabilities at the temperature, float32 or wider."""
        logits = at_least_float32(logits)
        return F.log_softmax(logits if self.temperature == 1 else logits / self.temperature, dim=-1)

    def measure(
        self,
        log_q: Float[Tensor, "rows cells"],
        log_p: Float[Tensor, "rows cells"],
        targets: Int[Tensor, " rows"] | None = None,
    ) -> Measured:
        """Value and slopes of log-probabilities, without the squared temperature; unchecked.

        Values can be differentiated by `log_q`, with the same result as the slopes.
        """
        if self.reads_targets:
            assert targets is not None  # by `check_targets`
            return _sampled_reverse(log_q, log_p, targets)
        return _MEASURES[self.name](self, log_q, log_p)


def _forward(_: TokenDivergence, log_q: Tensor, log_p: Tensor) -> Measured:
    p = log_p.exp()
    return Measured((log_p - log_q).mul_(p).sum(-1), p.detach().neg())  # in place: log_p has no gradient


def _reverse(_: TokenDivergence, log_q: Tensor, log_p: Tensor) -> Measured:
    terms = log_q.exp() * (log_q - log_p)
    return Measured(terms.sum(-1), terms.detach())


def _jsd(how: TokenDivergence, log_q: Tensor, log_p: Tensor) -> Measured:
    beta = how.beta
    if beta in (0, 1):
        return (_reverse if beta else _forward)(how, log_q, log_p)
    log_m = _mixed(log_p, log_q, beta)
    of_teacher = (log_p.exp() * (log_p - log_m)).sum(-1)
    terms = log_q.exp() * (log_q - log_m)
    factor = 1 / (beta * (1 - beta)) if how.normalise else 1.0
    values = beta * of_teacher + (1 - beta) * terms.sum(-1)
    return Measured(factor * values, factor * (1 - beta) * terms.detach())


def _skew_forward(how: TokenDivergence, log_q: Tensor, log_p: Tensor) -> Measured:
    log_m = _mixed(log_p, log_q, how.lam)
    gaps = log_p - log_m
    slopes = (gaps + log_q).detach().exp_().mul_(how.lam - 1)  # p q / m
    return Measured((log_p.exp() * gaps).sum(-1), slopes)


def _skew_reverse(how: TokenDivergence, log_q: Tensor, log_p: Tensor) -> Measured:
    q, gaps = log_q.exp(), log_q - _mixed(log_q, log_p, how.lam)
    slopes = q.detach() * (gaps.detach() - how.lam * gaps.detach().exp())
    return Measured((q * gaps).sum(-1), slopes)


def _tv(_: TokenDivergence, log_q: Tensor, log_p: Tensor) -> Measured:
    q = log_q.exp()
    gaps = q - log_p.exp()
    return Measured(gaps.abs().sum(-1) / 2, gaps.detach().sign().mul_(q.detach()).div_(2))


def _taid(how: TokenDivergence, log_q: Tensor, log_p: Tensor) -> Measured:
    p = torch.lerp(log_q.detach(), log_p, how.t).softmax(-1)
    return Measured(-(p * log_q).sum(-1), p.neg())


def _sampled_reverse(log_q: Tensor, log_p: Tensor, targets: Tensor) -> Measured:
    chosen = targets[:, None].long()
    log_q_y = log_q.gather(-1, chosen)
    gaps = (log_q_y - log_p.gather(-1, chosen)).detach()
    values = gaps + gaps * (log_q_y - log_q_y.detach())  # whose derivative is the score function's
    return Measured(values[:, 0], torch.zeros_like(log_q).scatter_(-1, chosen, gaps))


def _mixed(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b)."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


_MEASURES: dict[str, Callable[[TokenDivergence, Tensor, Tensor], Measured]] = {
    "forward": _forward,
    "reverse": _reverse,
    "jsd": _jsd,
    "skew_forward": _skew_forward,
    "skew_reverse": _skew_reverse,
    "tv": _tv,
    "taid": _taid,
}
