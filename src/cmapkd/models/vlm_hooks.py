"""What is read of, and put into, the modules of an image-text model while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def outputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What modules return inside this context, by name."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            kept[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def fed_to(language: nn.Module) -> Iterator[dict[str, Tensor]]:
    """`inputs_embeds` as the language model was given them: words, and visual tokens in their places."""
    kept: dict[str, Tensor] = {}

    def hook(_module: nn.Module, _arguments: Any, named: dict[str, Any]) -> None:
        kept["inputs_embeds"] = named["inputs_embeds"]

    handle = language.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield kept
    finally:
        handle.remove()


@contextmanager
def given_to(module: nn.Module | None) -> Iterator[list[Tensor]]:
    """The first argument of a module's call inside this context; of None, and where it is not called, nothing."""
    kept: list[Tensor] = []
    if module is None:
        yield kept
        return
    handle = module.register_forward_pre_hook(lambda _module, arguments: kept.append(arguments[0]))
    try:
        yield kept
    finally:
        handle.remove()


@contextmanager
def feeding(language: nn.Module, visual: Tensor, tokens: Tensor, deeper: Sequence[Tensor] = ()) -> Iterator[None]:
    """Inside this context the language model is given these visual tokens, whatever stood in their places.

    Args:
        visual: Bool[batch length], their places.
        tokens: Float[rows width], dialogue by dialogue.
        deeper: Float[rows width] each, for a model that adds more to the visual states after its first layers.
    """

    def hook(_module: nn.Module, arguments: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        embeds = named["inputs_embeds"]
        named["inputs_embeds"] = embeds.masked_scatter(visual[..., None], tokens.to(embeds.dtype))
        if deeper:
            named["visual_pos_masks"], named["deepstack_visual_embeds"] = visual, list(deeper)
        return arguments, named

    handle = language.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()
