"""Which parameters of a model stand behind an output: asked of autograd, because libraries name them differently."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from cmapkd.data.dialogues import ChatInput, Turn, join_items
from cmapkd.models.base import DualEncoder, ImageEncoder, eval_mode
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.token_types import TokenNeeds
from cmapkd.models.types import Tower


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Every parameter requires a gradient, and gradients are on; afterwards those do that did before."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def parameters_behind(model: nn.Module, compute: Callable[[], Tensor]) -> frozenset[str]:
    """Names of the parameters that what `compute` returns has a gradient to."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    with differentiable(model):
        gradients = torch.autograd.grad(compute().sum(), parameters, allow_unused=True)
    return frozenset(name for name, gradient in zip(names, gradients, strict=True) if gradient is not None)


def last_matrix_behind(model: nn.Module, compute: Callable[[], Tensor], *, learning: bool = False) -> str:
    """Name of the weights whose product fewest operations separate from what `compute` returns: its last layer.

    Tables that are looked up or added, as positions are, are no layer.

    Args:
        learning: passes over weights that do not learn.
    Raises:
        ValueError: there is none.
    """
    known = model.named_parameters()
    names = {id(parameter): name for name, parameter in known if parameter.requires_grad or not learning}
    with differentiable(model):
        output = compute()
    waiting, visited = deque([output.grad_fn]), set()
    while waiting:
        node = waiting.popleft()
        if node is None or node in visited:
            continue
        visited.add(node)
        following = [function for function, _ in node.next_functions if function is not None]
        if any(word in node.name() for word in _PRODUCTS):
            for factor in map(_source, following):
                parameter = getattr(factor, "variable", None)
                if parameter is not None and parameter.ndim >= 2 and id(parameter) in names:
                    return names[id(parameter)]
        waiting.extend(following)
    raise ValueError("no matrix of weights stands behind this output: it cannot be trained")


_PRODUCTS = ("mm", "Mm", "Linear", "Convolution")  # in the names of autograd's nodes
_RESHAPES = ("T", "Transpose", "Permute", "View", "Reshape", "Expand", "ToCopy")


def _source(node: Any) -> Any:
    """What a factor of a product is before it was transposed, reshaped or cast."""
    while node.name().removesuffix("Backward0") in _RESHAPES:
        node = node.next_functions[0][0]
    return node


def example_output(model: ImageEncoder, tower: Tower, level: str | None = None) -> Tensor:
    """A tower's embedding, or a level, of an empty picture or of the text "a"; the model is left as it was."""
    # knows where the model is, and in what precision
    scale = model.log_logit_scale if isinstance(model, DualEncoder) else next(model.parameters())
    levels = (level,) if level is not None else ()
    with eval_mode(model):  # batch norms must not take note of it
        if tower == "image":
            side = model.image_spec.size
            features = model.encode_image(scale.new_zeros(1, 3, side, side), levels)
        else:
            assert isinstance(model, DualEncoder)  # others have no such tower
            features = model.encode_text(model.tokenizer(["a"]).to(scale.device, non_blocking=True), levels)
    return features.embedding if level is None else features.levels[level].values


def example_visual_tokens(model: GenerativeModel) -> Tensor:
    """The visual tokens of an empty picture, as the language model is fed with them; the model is left as it was."""
    with eval_mode(model):
        seen = model.see(_with_a_picture(model))
    return seen.tokens.values


def example_encoded(model: GenerativeModel) -> Tensor:
    """The vision tower's tokens of an empty picture, as the projector is given them; the model is left as it was."""
    with eval_mode(model):
        features = model(_with_a_picture(model), TokenNeeds(encoded=True))
    tokens: Tensor = features.encoded
    return tokens


def _with_a_picture(model: GenerativeModel) -> ChatInput:
    picture = Image.new("RGB", (64, 64), (90, 160, 40))
    item = model.processor.read((Turn("user", "a", 1), Turn("assistant", "a")), [picture])
    return join_items([item], model.vocabulary.pad_id).to(model.device)


def example_rows(model: GenerativeModel) -> Tensor:
    """Final states of the answer "a" to "a", without a picture; the model is left as it was."""
    item = model.processor.read((Turn("user", "a"), Turn("assistant", "a")), [])
    with eval_mode(model):
        features = model(join_items([item], model.vocabulary.pad_id).to(model.device))
    values: Tensor = features.hidden["answer"].values
    return values
