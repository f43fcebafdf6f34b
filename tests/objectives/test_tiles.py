"""Both directions of a loss from one pass over tiles: values, gradients, products, memory, against the whole form."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad, gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmapkd.objectives import chunks, contrastive_loss, interactive_loss, similarity_divergence
from cmapkd.objectives.tiles import both_ways, row_log_sums

ROOT = Path(__file__).parents[2]

with pytest.MonkeyPatch.context() as patched:
    patched.syspath_prepend(ROOT / "benchmarks")
    measured: Any = importlib.import_module("in_batch_losses")

BATCH = 12
PICTURES = torch.tensor([0, 1, 0, 2, 3, 3, 3, 4, 5, 6, 1, 7])
Loss = Callable[..., Tensor]
LOSSES: dict[str, Loss] = {
    "contrastive": lambda a, b, c, d, s, **x: contrastive_loss(a, b, logit_scale=s, **x),
    "contrastive, several positives": lambda a, b, c, d, s, **x: contrastive_loss(
        a, b, logit_scale=s, pictures=PICTURES, **x
    ),
    "interactive": lambda a, b, c, d, s, **x: interactive_loss(a, b, c, d, logit_scale=s, **x),
    "interactive, several positives": lambda a, b, c, d, s, **x: interactive_loss(
        a, b, c, d, logit_scale=s, pictures=PICTURES, **x
    ),
    "similarity": lambda a, b, c, d, s, **x: similarity_divergence(
        a, b, c, d, student_scale=s, teacher_scale=40.0, temperature=2.0, **x
    ),
}


def inputs(dtype: torch.dtype = torch.float64, rows: int = BATCH) -> list[Tensor]:
    draws = torch.Generator().manual_seed(0)
    given = [torch.randn(rows, 5, generator=draws, dtype=torch.float64).to(dtype) for _ in range(4)]
    return [*(each.requires_grad_() for each in given), torch.tensor(20.0, dtype=dtype, requires_grad=True)]


def value_and_gradients(name: str, given: list[Tensor], **options: Any) -> list[Tensor]:
    value = LOSSES[name](*given, **options)
    (3.0 * value).backward()  # so that the gradient from above counts
    return [value.detach(), *(torch.zeros_like(each) if each.grad is None else each.grad for each in given)]


@pytest.mark.parametrize("chunk", [1, 5, 11])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_those_of_the_whole_form(name: str, chunk: int) -> None:
    whole = value_and_gradients(name, inputs())
    for found, expected in zip(value_and_gradients(name, inputs(), chunk=chunk), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert all(each.any() for each in whole[:3])
    assert not any(each.any() for each in whole[3:5])  # of the teacher


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_parts_of_the_rows_make_the_whole(name: str, parts: int) -> None:
    """Each part in turn, with what the others send: what they compute, without their gradient.

    The gradient of a part's own tiles, added over all parts, is then that of the whole.
    """
    sent: dict[int, list[Tensor]] = {number: [] for number in range(parts)}

    def of_part(number: int, known: bool) -> list[Tensor]:
        place = 0

        def gather(own: Tensor) -> Tensor:
            nonlocal place
            place += 1
            if not known:
                sent[number].append(own.detach())
                return own.detach().repeat(parts, *[1] * (own.ndim - 1))
            others = [sent[other][place - 1] for other in range(parts)]
            return torch.cat([*others[:number], own, *others[number + 1 :]])

        with chunks.split_rows(number, parts, gather):
            return value_and_gradients(name, inputs(), chunk=2) if known else [LOSSES[name](*inputs(), chunk=2)]

    for number in range(parts):
        of_part(number, False)
    found = [of_part(number, True) for number in range(parts)]
    whole = value_and_gradients(name, inputs())
    # what is no logit, a pair's own cosine, every part has whole
    given = inputs()
    alone = [torch.zeros_like(each) for each in given]
    if "similarity" not in name:
        matched = of_pairs(name, given)
        (-3.0 * matched).backward()
        alone = [torch.zeros_like(each) if each.grad is None else each.grad for each in given]
    for place, expected in enumerate(whole):
        for each in found:
            if place == 0:
                torch.testing.assert_close(each[0], expected, rtol=0, atol=1e-10)
        if place:
            total = torch.stack([each[place] for each in found]).sum(0) - (parts - 1) * alone[place - 1]
            torch.testing.assert_close(total, expected, rtol=0, atol=1e-10)


def of_pairs(name: str, given: list[Tensor]) -> Tensor:
    image, text, teacher_image, teacher_text, scale = given
    image, text, teacher_image, teacher_text = (
        F.normalize(each, dim=-1) for each in (image, text, teacher_image.detach(), teacher_text.detach())
    )
    if name.startswith("contrastive"):
        return scale * (image * text).sum(-1).mean()
    return scale * ((image * teacher_text).sum(-1) + (text * teacher_image).sum(-1)).mean() / 2


def weights(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def all_sums(rows: Tensor, columns: Tensor, *, pictures: Tensor | None = None, teacher: bool = False) -> Tensor:
    """One number of every output, so that each has a gradient of its own."""
    _, _, *others, _ = (each.detach() for each in inputs())
    of_rows, of_columns = both_ways(rows, columns, tuple(others) if teacher else None, pictures=pictures, size=5)
    found = [of_rows.log_sums, of_columns.log_sums]
    if teacher:
        assert of_rows.divergences is not None
        assert of_columns.divergences is not None
        found += [of_rows.divergences, of_columns.divergences]
    return (torch.cat(found) * weights(len(found) * BATCH)).sum()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")  # torch, of itself
@pytest.mark.parametrize(
    "options", [{}, {"pictures": PICTURES}, {"teacher": True}], ids=["plain", "pictures", "teacher"]
)
def test_gradcheck(options: dict[str, Any]) -> None:
    rows, columns, *_ = inputs()
    assert gradcheck(lambda r, c: all_sums(r, c, **options), [rows, columns], check_forward_ad=True)
    assert gradcheck(lambda r: all_sums(r, columns.detach(), **options), [rows], check_forward_ad=True)
    assert gradcheck(lambda c: all_sums(rows.detach(), c, **options), [columns], check_forward_ad=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")
@pytest.mark.parametrize("pictures", [None, PICTURES])
def test_gradcheck_of_one_direction(pictures: Tensor | None) -> None:
    rows, columns, *_ = inputs()
    sums = lambda r: row_log_sums(r, columns, pictures=pictures, size=5)  # noqa: E731
    assert gradcheck(sums, [rows], check_forward_ad=True)
    assert sums(rows).requires_grad
    assert not row_log_sums(rows.detach(), columns, size=5).requires_grad


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", LOSSES)
def test_forward_derivatives_are_those_of_the_whole_form(name: str) -> None:
    def slope(**options: Any) -> Tensor:
        given = [each.detach() for each in inputs()]
        along = torch.ones_like(given[0]).cumsum(0)
        with torch.no_grad(), forward_ad.dual_level():
            value = LOSSES[name](forward_ad.make_dual(given[0], along), *given[1:], **options)
            return forward_ad.unpack_dual(value).tangent

    torch.testing.assert_close(slope(chunk=5), slope(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_second_derivatives_are_refused_and_not_wrong(name: str) -> None:
    given = inputs()
    (expected,) = torch.autograd.grad(LOSSES[name](*given, chunk=5), given[:1])
    (gradient,) = torch.autograd.grad(LOSSES[name](*given, chunk=5), given[:1], create_graph=True)
    torch.testing.assert_close(gradient, expected)
    with pytest.raises(RuntimeError, match="written out and was to be differentiated again"):
        torch.autograd.grad(gradient.square().sum(), given[0], allow_unused=True)
    (gradient,) = torch.autograd.grad(LOSSES[name](*given), given[:1], create_graph=True)
    gradient.square().sum().backward()  # the whole form has them


@pytest.mark.parametrize("name", LOSSES)
def test_logits_far_beyond_the_range_of_exp(name: str) -> None:
    """In float32, with a scale at which the sum of exponentials would be infinite."""
    given, exact = inputs(torch.float32), inputs()
    for each in (given, exact):
        each[-1] = (each[-1].detach() * 50).requires_grad_()
    whole = value_and_gradients(name, exact)
    for found, expected in zip(value_and_gradients(name, given, chunk=5), whole, strict=True):
        least = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=max(least, 1e-6))


@pytest.mark.parametrize("name", LOSSES)
def test_products_stay_in_float32_under_autocast(name: str) -> None:
    plain = value_and_gradients(name, inputs(torch.float32), chunk=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = value_and_gradients(name, inputs(torch.float32), chunk=5)  # the backward pass is within it, too
    for found, expected in zip(mixed, plain, strict=True):
        assert torch.equal(found, expected)


def test_embeddings_in_half_precision_get_gradients_in_theirs() -> None:
    given = inputs(torch.bfloat16)
    value = contrastive_loss(given[0], given[1], logit_scale=given[-1].float(), chunk=5)
    value.backward()
    assert value.dtype == torch.float32
    assert given[0].grad is not None
    assert given[0].grad.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------ products and memory


@pytest.mark.parametrize(
    ("loss", "before", "after"), [("contrastive", 8, 4), ("relational", 12, 6), ("interactive", 6, 4)]
)
def test_products_of_a_step(loss: str, before: int, after: int) -> None:
    assert measured.products("passes", loss) == before
    assert measured.products("tiles", loss) == after


@pytest.mark.parametrize("loss", measured.ARMS["tiles"])
def test_passes_are_what_the_losses_were(loss: str) -> None:
    """Else the benchmark would compare with something else."""
    given = measured.embeddings(24, 8, torch.float64)
    found = [[each.clone() for each in measured.run(arm, loss, given, 7)] for arm in ("passes", "tiles")]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


class Largest(TorchDispatchMode):
    """The most numbers that a tensor made inside has."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        sizes = [
            leaf.untyped_storage().nbytes() // leaf.element_size()
            for leaf in tree_leaves(result)
            if isinstance(leaf, Tensor)
        ]
        self.numbers = max(self.numbers, *sizes, 0)
        return result


@pytest.mark.parametrize("loss", measured.ARMS["tiles"])
def test_no_tensor_is_larger_than_a_tile_of_both_models(loss: str) -> None:
    batch, size = 512, 16
    given = measured.embeddings(batch, 8)
    with Largest() as largest:
        measured.run("tiles", loss, given, size)
    assert largest.numbers <= 2 * size * batch
    with Largest() as largest:
        measured.run("whole", loss, given, size)
    assert largest.numbers >= batch * batch
