"""Losses over a vocabulary: sums in plain loops, gradients of materialised logits, chunks, both passes, types."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from cmapkd.features import top_tokens
from cmapkd.models.token_types import LogitHead, TopTokens
from cmapkd.objectives import (
    TaidState,
    TokenDivergence,
    TokenLosses,
    next_taid,
    token_losses,
    top_divergence,
    vocabulary,
    vocabulary_pass,
)
from cmapkd.objectives.tokens import DivergenceName

ROWS, TOKENS, WIDTH, TEACHER_WIDTH = 7, 11, 5, 6
NAMES = get_args(DivergenceName)
CELLS = [name for name in NAMES if not TokenDivergence(name).reads_all_tokens]
DIVERGENCES = {
    **{name: TokenDivergence(name, beta=0.3, lam=0.2, t=0.6) for name in NAMES},
    "warm": TokenDivergence("jsd", temperature=2.0, beta=0.7, normalise=True),
    "forward end": TokenDivergence("jsd", beta=0.0),
    "reverse end": TokenDivergence("jsd", beta=1.0, temperature=0.5),
    "cool taid": TokenDivergence("taid", temperature=0.7, t=0.4),
}
EXACT = {"rtol": 1e-9, "atol": 1e-11}


@dataclass
class Case:
    """Random states, heads and targets in float64."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    targets: Tensor
    row_weights: Tensor
    teacher: tuple[Tensor, LogitHead]
    scale: float = 1.0
    softcap: float | None = None

    @property
    def head(self) -> LogitHead:
        return LogitHead(self.weight, self.bias, self.scale, self.softcap)

    @property
    def learned(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias

    def whole(self, how: TokenDivergence) -> TokenLosses:
        """The losses of materialised logits, differentiated by autograd."""
        logits, targets = self.head(self.hidden), self.targets
        ce = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        kd = how(logits, self.teacher[1](self.teacher[0]), targets=targets)
        hard, soft = self.row_weights.expand(2, -1)
        return TokenLosses((ce * hard).sum(), (kd * soft).sum())

    def ours(self, how: TokenDivergence | None, **more: Any) -> TokenLosses:
        options: dict[str, Any] = {"teacher": self.teacher if how else None, "divergence": how}
        options |= {"row_weights": self.row_weights} | more
        return token_losses(self.hidden, self.head, self.targets, **options)


def case(dtype: torch.dtype = torch.float64, rows: int = ROWS, **head: Any) -> Case:
    draws = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64).to(dtype)

    return Case(
        normal(rows, WIDTH).requires_grad_(),
        normal(TOKENS, WIDTH).requires_grad_(),
        normal(TOKENS).requires_grad_(),
        torch.randint(TOKENS, (rows,), generator=draws),
        torch.rand(rows, generator=draws, dtype=torch.float64).to(dtype),
        (normal(rows, TEACHER_WIDTH), LogitHead(normal(TOKENS, TEACHER_WIDTH))),
        **head,
    )


def summed(losses: TokenLosses, ce: float, kd: float) -> Tensor:
    assert losses.kd is not None
    return ce * losses.ce + kd * losses.kd


# ------------------------------------------------------------------------------------------------ definitions


def in_loops(name: str, q: list[float], p: list[float], y: int, *, beta: float, lam: float, t: float) -> float:
    """One row of the table in `TokenDivergence`, from probabilities, token by token."""

    def kl(one: list[float], other: list[float]) -> float:
        return sum(a * math.log(a / b) for a, b in zip(one, other, strict=True))

    def cross_entropy(one: list[float], other: list[float]) -> float:
        return -sum(a * math.log(b) for a, b in zip(one, other, strict=True))

    def mixed(share: float, one: list[float], other: list[float]) -> list[float]:
        return [share * a + (1 - share) * b for a, b in zip(one, other, strict=True)]

    m = mixed(beta, p, q)
    powers = [a**t * b ** (1 - t) for a, b in zip(p, q, strict=True)]
    return {
        "forward": lambda: kl(p, q),
        "reverse": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
        "skew_forward": lambda: kl(p, mixed(lam, p, q)),
        "skew_reverse": lambda: kl(q, mixed(lam, q, p)),
        "tv": lambda: sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
        "taid": lambda: cross_entropy([power / sum(powers) for power in powers], q),
        "sampled_reverse": lambda: math.log(q[y] / p[y]),
    }[name]()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_divergence_is_the_sum_over_tokens_written_out(name: DivergenceName, temperature: float) -> None:
    c = case()
    student, teacher = c.head(c.hidden).detach(), c.teacher[1](c.teacher[0])
    how = TokenDivergence(name, temperature=temperature, beta=0.3, lam=0.2, t=0.6)
    values = how(student, teacher, targets=c.targets)
    for i in range(ROWS):
        q, p = ([math.exp(z / temperature) for z in logits[i].tolist()] for logits in (student, teacher))
        q, p = [x / sum(q) for x in q], [x / sum(p) for x in p]
        expected = in_loops(name, q, p, int(c.targets[i]), beta=0.3, lam=0.2, t=0.6) * temperature**2
        assert float(values[i]) == pytest.approx(expected, rel=1e-10, abs=1e-13)


@pytest.mark.parametrize("how", DIVERGENCES.values(), ids=DIVERGENCES)
def test_slopes_make_the_gradient_by_logits(how: TokenDivergence) -> None:
    c = case()
    logits = c.head(c.hidden).detach().requires_grad_()
    teacher = c.teacher[1](c.teacher[0])
    (expected,) = torch.autograd.grad(how(logits, teacher, targets=c.targets).sum(), logits)
    log_q, log_p = how.log_softmax(logits.detach()), how.log_softmax(teacher)
    slopes = how.measure(log_q, log_p, c.targets).slopes
    by_logits = slopes - slopes.sum(-1, keepdim=True) * log_q.exp()
    torch.testing.assert_close(by_logits * how.temperature, expected, **EXACT)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("taid", "sampled_reverse", "tv")])
def test_a_divergence_has_the_gradient_of_its_differences(name: DivergenceName) -> None:
    c = case()
    logits, teacher = c.head(c.hidden).detach().requires_grad_(), c.teacher[1](c.teacher[0])
    assert gradcheck(lambda z: TokenDivergence(name, temperature=1.5)(z, teacher), logits)


@pytest.mark.parametrize("name", NAMES)
def test_agreement_is_the_least_and_constants_do_not_matter(name: DivergenceName) -> None:
    c = case()
    how, logits = TokenDivergence(name), c.head(c.hidden).detach()
    shifted = logits + torch.arange(ROWS, dtype=logits.dtype)[:, None]
    least = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1) if name == "taid" else 0.0  # a cross-entropy's floor
    assert float((how(logits, shifted, targets=c.targets) - least).abs().max()) < 1e-12
    teacher = c.teacher[1](c.teacher[0])
    torch.testing.assert_close(how(shifted, teacher, targets=c.targets), how(logits, teacher, targets=c.targets))


def test_a_normalised_jsd_goes_to_its_ends_without_a_jump() -> None:
    c = case()
    student, teacher = c.head(c.hidden).detach(), c.teacher[1](c.teacher[0])
    for beta, end in ((1e-7, 0.0), (1 - 1e-7, 1.0)):
        near, at = (TokenDivergence("jsd", beta=b, normalise=True)(student, teacher) for b in (beta, end))
        torch.testing.assert_close(near, at, rtol=1e-4, atol=1e-6)
        assert float(TokenDivergence("jsd", beta=beta)(student, teacher).max()) < 1e-5 < float(at.min())


def test_a_sampled_divergence_is_the_reverse_one_on_average() -> None:
    """Value and gradient, over all tokens that might have been drawn."""
    c = case(rows=1)
    logits, teacher = c.head(c.hidden).detach().requires_grad_(), c.teacher[1](c.teacher[0])
    how = TokenDivergence("sampled_reverse")
    values = how(logits.expand(TOKENS, -1), teacher.expand(TOKENS, -1), targets=torch.arange(TOKENS))
    q = logits.detach().softmax(-1)[0]
    whole = TokenDivergence("reverse")(logits, teacher).sum()
    torch.testing.assert_close((q * values.detach()).sum(), whole.detach())
    (got,), (expected,) = (torch.autograd.grad(value, logits) for value in ((q * values).sum(), whole))
    torch.testing.assert_close(got, expected)


def test_no_gradient_reaches_the_teacher() -> None:
    c = case()
    states, head = c.teacher[0].requires_grad_(), replace(c.teacher[1], weight=c.teacher[1].weight.requires_grad_())
    losses = c.ours(TokenDivergence(), teacher=(states, head))
    summed(losses, 1, 1).backward()
    assert states.grad is None
    assert head.weight.grad is None


# ------------------------------------------------------------------------------------------------ chunks and passes


@pytest.mark.parametrize("shape", [{}, {"scale": 0.7, "softcap": 3.0}], ids=["plain", "capped"])
@pytest.mark.parametrize("how", DIVERGENCES.values(), ids=DIVERGENCES)
def test_losses_and_gradients_are_those_of_materialised_logits(how: TokenDivergence, shape: dict[str, float]) -> None:
    c = case(**shape)
    whole = c.whole(how)
    for factors in ((1.0, 0.0), (0.0, 1.0), (0.5, 2.0)):
        expected = torch.autograd.grad(summed(whole, *factors), c.learned, retain_graph=True)
        for chunk in (None, 1, 3):
            for declared in (None, (1.0, 1.0), (0.25, 1.0)):  # the last is (0.5, 2) but for a factor
                losses = c.ours(how, chunk=chunk, declared=declared)
                torch.testing.assert_close(losses, whole, **EXACT)
                got = torch.autograd.grad(summed(losses, *factors), c.learned)
                torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("top", [None, 4, TOKENS])
@pytest.mark.parametrize("weighed", ["once", "twice"])
def test_sums_of_few_rows_at_a_time_are_those_of_the_chunk(
    top: int | None, weighed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of one and of two rows, in chunks that they divide and others."""
    c, how = case(softcap=4.0, scale=0.7), TokenDivergence("jsd", temperature=1.5)
    c.row_weights = c.row_weights if weighed == "once" else torch.stack([c.row_weights, c.row_weights.flip(0)])
    teacher = c.teacher if top is None else top_tokens(c.teacher[1](c.teacher[0]), top, temperature=1.5)
    whole = c.ours(how, teacher=teacher)
    expected = torch.autograd.grad(summed(whole, 0.5, 2.0), c.learned)
    for block, chunk in ((1, 3), (2 * TOKENS, None), (2 * TOKENS + 1, 3), (2 * TOKENS, 4)):
        monkeypatch.setattr(vocabulary_pass, "BLOCK_LOGITS", block)
        losses = c.ours(how, teacher=teacher, chunk=chunk, declared=(0.5, 2.0))
        torch.testing.assert_close(losses, whole, **EXACT)
        torch.testing.assert_close(torch.autograd.grad(summed(losses, 0.5, 2.0), c.learned), expected, **EXACT)


@pytest.mark.parametrize("k", [1, 4, TOKENS])
@pytest.mark.parametrize("name", CELLS)
def test_likeliest_tokens_have_the_gradients_of_materialised_logits(name: DivergenceName, k: int) -> None:
    c, how = case(softcap=4.0), TokenDivergence(name, temperature=2.0, lam=0.2, beta=0.4)
    top = top_tokens(c.teacher[1](c.teacher[0]), k, temperature=2.0)
    kd = (top_divergence(c.head(c.hidden), top, how) * c.row_weights).sum()
    whole = TokenLosses(c.whole(how).ce, kd)
    expected = torch.autograd.grad(summed(whole, 0.5, 2.0), c.learned)
    for declared in (None, (0.5, 2.0)):
        losses = c.ours(how, teacher=top, declared=declared, chunk=3)
        torch.testing.assert_close(losses, whole, **EXACT)
        torch.testing.assert_close(torch.autograd.grad(summed(losses, 0.5, 2.0), c.learned), expected, **EXACT)


@pytest.mark.parametrize("declared", [None, (1.0, 1.0)])
def test_gradient_of_differences(declared: tuple[float, float] | None) -> None:
    c = case(softcap=4.0)

    def losses(*learned: Tensor) -> Tensor:
        one = replace(c, hidden=learned[0], weight=learned[1], bias=learned[2])
        return summed(one.ours(TokenDivergence("jsd"), chunk=3, declared=declared), 1.0, 1.0)

    assert gradcheck(losses, c.learned)


@pytest.mark.parametrize(
    ("name", "top"),
    [*((name, None) for name in ("forward", "reverse", "sampled_reverse", "taid")), ("forward", 4), ("reverse", 4)],
)
def test_each_sum_may_weigh_the_rows_its_own_way(name: DivergenceName, top: int | None) -> None:
    """As where some rows have no cross-entropy, and others no divergence."""
    c, how = case(), TokenDivergence(name, t=0.6)
    c.row_weights = torch.stack([c.row_weights, c.row_weights.flip(0)])
    c.row_weights[0, :3] = 0
    c.row_weights[1, 4] = 0
    whole, options = c.whole(how), {}
    if top is not None:
        options["teacher"] = likeliest = top_tokens(c.teacher[1](c.teacher[0]), top)
        whole = whole._replace(kd=(top_divergence(c.head(c.hidden), likeliest, how) * c.row_weights[1]).sum())
    for factors in ((1.0, 0.0), (0.0, 1.0), (0.5, 2.0)):
        expected = torch.autograd.grad(summed(whole, *factors), c.learned, retain_graph=True)
        for declared in (None, (1.0, 1.0), (0.25, 1.0)):  # formed again, formed again, and declared but for a factor
            losses = c.ours(how, chunk=3, declared=declared, **options)
            torch.testing.assert_close(losses, whole, **EXACT)
            torch.testing.assert_close(torch.autograd.grad(summed(losses, *factors), c.learned), expected, **EXACT)
    with pytest.raises(ValueError, match="two or none"):
        c.ours(how, row_weights=torch.ones(3, ROWS), **options)


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float] | None]:
    """The factors of each pass over the chunks."""
    seen: list[tuple[float, float] | None] = []
    passes = vocabulary.in_chunks

    def counted(plan: Any, given: Any, factors: Any, wanted: Any) -> Any:
        seen.append(factors)
        return passes(plan, given, factors, wanted)

    monkeypatch.setattr(vocabulary, "in_chunks", counted)
    return seen


def test_declared_weights_save_the_second_pass_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    c, how, seen = case(), TokenDivergence(), count_passes(monkeypatch)
    summed(c.ours(how, declared=(0.5, 2.0)), 0.5 / 7, 2 / 7).backward()
    assert seen == [(0.5, 2.0)]
    summed(c.ours(how, declared=(0.5, 2.0)), 1.0, 1.0).backward()
    assert seen[1:] == [(0.5, 2.0), (1.0, 1.0)]
    c.ours(None).ce.backward()  # without a teacher any weight of ce is the declared one
    assert seen[3:] == [(1.0, 0.0)]
    with torch.no_grad():
        c.ours(how)
    assert seen[4:] == [None]


def test_a_second_backward_pass_finds_the_same_gradient_and_leaves_the_first_alone() -> None:
    c = case()
    loss = summed(c.ours(TokenDivergence()), 1.0, 1.0)
    first = torch.autograd.grad(loss, c.learned, retain_graph=True)
    kept = [one.clone() for one in first]
    for one in first:
        one.mul_(3)
    second = torch.autograd.grad(2 * loss, c.learned)
    torch.testing.assert_close(second, tuple(2 * one for one in kept), **EXACT)


def test_a_second_derivative_is_refused() -> None:
    c = case()
    for declared in (None, (1.0, 0.0)):
        losses = c.ours(TokenDivergence(), declared=declared)
        (expected,) = torch.autograd.grad(losses.ce, c.hidden, retain_graph=True)
        (slope,) = torch.autograd.grad(losses.ce, c.hidden, create_graph=True)
        torch.testing.assert_close(slope.detach(), expected, **EXACT)
        with pytest.raises(RuntimeError, match="can be differentiated once"):
            slope.square().sum().backward()


@pytest.mark.parametrize("declared", [None, (1.0, 1.0)])
def test_within_checkpoint_the_gradient_is_the_same(declared: tuple[float, float] | None) -> None:
    c, how = case(), TokenDivergence("reverse")
    expected = torch.autograd.grad(summed(c.whole(how), 1.0, 1.0), c.learned)

    def run(*learned: Tensor) -> Tensor:
        one = replace(c, hidden=learned[0], weight=learned[1], bias=learned[2])
        return torch.stack(list(one.ours(how, chunk=3, declared=declared)))  # type: ignore[arg-type]

    sums = checkpoint(run, *c.learned, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(sums.sum(), c.learned), expected, **EXACT)


def test_no_rows_are_zero_with_a_graph() -> None:
    c = case(rows=0)
    losses = c.ours(TokenDivergence())
    loss = summed(losses, 1.0, 1.0)
    loss.backward()
    assert float(loss.detach()) == 0
    assert c.weight.grad is not None
    assert not c.weight.grad.any()


def test_a_frozen_head_gets_no_gradient_and_a_frozen_student_no_graph() -> None:
    c = case()
    c.weight.requires_grad_(False)
    c.bias.requires_grad_(False)
    (expected,) = torch.autograd.grad(c.whole(TokenDivergence()).ce, c.hidden)
    c.ours(TokenDivergence()).ce.backward()
    torch.testing.assert_close(c.hidden.grad, expected, **EXACT)
    assert c.weight.grad is None
    c.hidden.requires_grad_(False)
    assert not c.ours(TokenDivergence()).ce.requires_grad


# ------------------------------------------------------------------------------------------------ types


def in_bf16(autocast: bool) -> tuple[Case, TokenLosses]:
    c = case(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return c, c.ours(TokenDivergence(), chunk=2)


@pytest.mark.parametrize("autocast", [True, False])
def test_in_half_precision_losses_are_float32_and_gradients_near(autocast: bool) -> None:
    exact, how = case(), TokenDivergence()
    c, losses = in_bf16(autocast)
    assert losses.ce.dtype == torch.float32
    whole = exact.whole(how)
    assert float(losses.ce.detach()) == pytest.approx(float(whole.ce.detach()), rel=0.02)
    got = torch.autograd.grad(summed(losses, 1.0, 1.0), c.learned)
    expected = torch.autograd.grad(summed(whole, 1.0, 1.0), exact.learned)
    for one, other, tensor in zip(got, expected, c.learned, strict=True):
        assert one.dtype == tensor.dtype
        torch.testing.assert_close(one.double(), other, rtol=0.05, atol=0.05)


def test_float64_stays_under_autocast_and_without() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        losses = case().ours(TokenDivergence())
    torch.testing.assert_close(losses, case().whole(TokenDivergence()), **EXACT)


@pytest.mark.parametrize(("rows", "tokens", "chunk", "expected"), [(4096, 151_936, None, 128), (4096, 512, None, 4096)])
def test_a_chunk_is_64_mebibytes_or_128_rows(rows: int, tokens: int, chunk: int | None, expected: int) -> None:
    assert vocabulary.chunk_of_tokens(rows, tokens, chunk) == expected
    assert vocabulary.chunk_of_tokens(rows, 100_000, None) == 167


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"targets": c.targets - 100}, "leave out rows without a target"),
        (lambda c: {"targets": c.targets[1:]}, "one target"),
        (lambda c: {"row_weights": c.row_weights[1:]}, "one weight, two or none"),
        (lambda c: {"divergence": None}, "both or neither"),
        (lambda c: {"teacher": None}, "both or neither"),
        (lambda c: {"teacher": (c.teacher[0][1:], c.teacher[1])}, "the same answers"),
        (lambda c: {"teacher": (c.teacher[0], LogitHead(c.teacher[1].weight[1:]))}, "the tokens that they share"),
        (lambda c: {"teacher": (c.teacher[0][:, 1:], c.teacher[1])}, "the teacher's hidden states"),
        (lambda c: {"hidden": c.hidden[:, 1:]}, "the student's hidden states"),
        (lambda c: {"chunk": 0}, "at least one row"),
        (lambda c: {"teacher": top_tokens(c.head(c.hidden)[1:], 3)}, "1 <= k <= tokens"),
        (lambda c: {"teacher": top_tokens(c.head(c.hidden), 3), "divergence": TokenDivergence("taid")}, "all of the"),
    ],
)
def test_what_does_not_fit_is_refused(change: Callable[[Case], dict[str, Any]], message: str) -> None:
    c = case()
    options = {"hidden": c.hidden, "targets": c.targets, "teacher": c.teacher, "divergence": TokenDivergence()}
    options |= change(c)
    with pytest.raises(ValueError, match=message):
        token_losses(options.pop("hidden"), c.head, options.pop("targets"), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "backward"}, "choose one of forward"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"beta": 1.5}, r"beta must be in \[0, 1\], got 1.5"),
        ({"lam": 0.0}, "take `forward` or `reverse`"),
        ({"t": -1.0}, r"t must be in \[0, 1\]"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenDivergence(**options)


def test_logits_of_two_vocabularies_and_missing_targets_are_refused() -> None:
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="over one vocabulary"):
        TokenDivergence()(logits, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="pass them as targets"):
        TokenDivergence("sampled_reverse")(logits, logits)


# ------------------------------------------------------------------------------------------------ likeliest tokens


@pytest.mark.parametrize("name", CELLS)
def test_more_likeliest_tokens_come_nearer_from_below(name: DivergenceName) -> None:
    c, how = case(), TokenDivergence(name)
    student, teacher = c.head(c.hidden).detach(), c.teacher[1](c.teacher[0])
    values = [top_divergence(student, top_tokens(teacher, k), how) for k in range(1, TOKENS + 1)]
    whole = how(student, teacher)
    for fewer, more in zip(values, [*values[1:], whole], strict=True):
        assert (fewer <= more + 1e-12).all()
    torch.testing.assert_close(values[-1], whole)
    assert float(top_divergence(teacher, top_tokens(teacher, 3), how).abs().max()) < 1e-12


def test_a_rest_of_nothing_gives_finite_losses_and_gradients() -> None:
    """Rounded probabilities that sum to 1 leave -inf for the rest, where the student is never sure."""
    logits = torch.randn(2, TOKENS, requires_grad=True)
    top = TopTokens(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0.7, 0.3]] * 2).log(), torch.full((2,), -torch.inf))
    for name in CELLS:
        values = top_divergence(logits, top, TokenDivergence(name))
        (slope,) = torch.autograd.grad(values.sum(), logits)
        assert values.isfinite().all()
        assert slope.isfinite().all()


@pytest.mark.parametrize("name", CELLS)
def test_a_sure_student_has_the_finite_gradient_of_autograd(name: DivergenceName) -> None:
    """The rest has a probability whose reciprocal is too large for float32."""
    hidden, weight = torch.tensor([[100.0, 0.0, 0.0]]), torch.eye(3)
    top = TopTokens(torch.tensor([[0]]), torch.tensor([[0.8]]).log(), torch.tensor([0.2]).log())
    how, found = TokenDivergence(name), hidden.clone().requires_grad_()
    kd = token_losses(found, LogitHead(weight), torch.zeros(1, dtype=torch.long), teacher=top, divergence=how).kd
    assert kd is not None
    (slope,) = torch.autograd.grad(kd, found)
    exact = hidden.double().requires_grad_()
    wide = TopTokens(top.ids, top.log_p.double(), top.rest.double())
    (expected,) = torch.autograd.grad(top_divergence(exact, wide, how).sum(), exact)
    torch.testing.assert_close(slope.double(), expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------ published code


PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "token_losses.json").read_text())


def number(name: str) -> Tensor:
    return torch.tensor(PUBLISHED[name], dtype=torch.float64)


@pytest.mark.parametrize("case", PUBLISHED["cases"], ids=lambda case: f"{case['source']} {case['function']}")
def test_divergences_are_those_of_published_code(case: dict[str, Any]) -> None:
    """Its cross-entropies have our gradient and add the target's entropy. GKD's leave out the squared temperature.

    TAID's is a cross-entropy here as well, because its value moves the target.
    """
    how, rows = TokenDivergence(**case["ours"]), torch.tensor(PUBLISHED["labels"]) != -100
    logits, teacher = number("student_logits").requires_grad_(), number("teacher_logits")
    value = how(logits, teacher)[rows].mean()
    (gradient,) = torch.autograd.grad(value, logits)
    factor = how.temperature**2 if case["form"] == "divergence_by_T2" else 1.0
    entropy = torch.zeros(())
    if case["form"] == "cross_entropy" and how.name != "taid":
        p = teacher.softmax(-1)[rows]
        entropy = -(p * p.log()).sum(-1).mean()
    exact = 1e-9 if case["dtype"] == "float64" else 1e-5
    assert float((value / factor + entropy).detach()) == pytest.approx(case["value"], rel=exact)
    expected = torch.tensor(case["gradient"], dtype=torch.float64)
    torch.testing.assert_close(gradient / factor, expected, rtol=exact, atol=exact / 10)


def test_taid_moves_its_target_as_published_code_does() -> None:
    published = PUBLISHED["taid"]
    state = TaidState(0.4)
    for step, (loss, expected) in enumerate(zip(published["losses"], published["states"], strict=True)):
        state = next_taid(state, loss, progress=step / published["steps"])
        assert (state.t, state.previous, state.momentum) == pytest.approx(tuple(expected), rel=2e-6, abs=1e-8)


@pytest.mark.parametrize("losses", [(1e-5, 1.0), (0.0, 1.0), (1.0, 0.0), (1e-300, 1e300)])
def test_taid_survives_losses_of_any_two_sizes(losses: tuple[float, float]) -> None:
    """The published logistic function saturates, where exp would overflow."""
    before, loss = losses
    state = next_taid(TaidState(0.4, before, 0.0), loss, progress=0.1)
    assert 0.46 - 1e-12 <= state.t <= 1.0


def test_chunks_have_the_value_and_gradients_of_published_chunks() -> None:
    published = {name: torch.tensor(value) for name, value in PUBLISHED["liger"].items() if isinstance(value, list)}
    hidden, weight = (published[name].double().requires_grad_() for name in ("hidden", "weight"))
    teacher = published["teacher_hidden"].double(), LogitHead(published["teacher_weight"].double())
    hard, soft = PUBLISHED["liger"]["weights"]
    losses = token_losses(
        hidden,
        LogitHead(weight),
        published["targets"],
        teacher=teacher,
        divergence=TokenDivergence("jsd", beta=PUBLISHED["liger"]["beta"]),
        declared=(hard, soft),
        chunk=2,
    )
    loss = summed(losses, hard / 5, soft / 5)
    assert float(loss.detach()) == pytest.approx(PUBLISHED["liger"]["value"], rel=1e-6)
    for got, name in zip(torch.autograd.grad(loss, (hidden, weight)), ("by_hidden", "by_weight"), strict=True):
        torch.testing.assert_close(got, published[name].double(), rtol=1e-6, atol=1e-7)


def test_the_sampled_divergence_is_that_of_an_implementation_of_vla_opd() -> None:
    kept = json.loads((Path(__file__).parent / "fixtures" / "vla_opd.json").read_text())
    student, teacher = (torch.tensor(kept[name], dtype=torch.float64) for name in ("student", "teacher"))
    counts, targets = torch.tensor(kept["counts"]), torch.tensor(kept["targets"])
    student.requires_grad_()
    mean = TokenDivergence("sampled_reverse")(student, teacher, targets=targets)[counts].mean()
    assert mean.item() == pytest.approx(kept["reverse_kl"], abs=1e-6)
    (gradient,) = torch.autograd.grad(mean, student)
    torch.testing.assert_close(gradient, torch.tensor(kept["gradient"], dtype=torch.float64), rtol=1e-5, atol=1e-6)
