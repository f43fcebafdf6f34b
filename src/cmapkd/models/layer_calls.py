"""How layers of a language model were called in a pass, and what they gave: to call other layers in the same way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.models.hf_vlm import HfVlm
from cmapkd.models.linear_mixer import LinearMixer

Inside = Literal["layer", "attention"]
"""What is called: a whole decoder layer; or its attention, up to the output projection."""


@dataclass(frozen=True, slots=True)
class LayerCall:
    """Arguments of a call, and what it gave, Float[batch length width]; nothing has a gradient."""

    arguments: tuple[Any, ...] = ()
    named: Mapping[str, Any] = field(default_factory=dict)
    output: Any = None

    def of(self, layer: nn.Module, inside: Inside) -> Tensor:
        """What `layer` gives for these arguments, with gradient; of an attention it must be a `LinearMixer`."""
        dtype = next(layer.parameters()).dtype
        arguments, named = _of_dtype(self.arguments, dtype), _of_dtype(dict(self.named), dtype)
        if inside == "attention":
            mixer: Any = layer.self_attn
            assert isinstance(mixer, LinearMixer)
            states = arguments[0] if arguments else named["hidden_states"]
            return mixer.mix(states, named.get("attention_mask"))[0]
        output = layer(*arguments, **named)
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found


@contextmanager
def layer_calls(layers: Mapping[int, nn.Module], inside: Inside) -> Iterator[dict[int, LayerCall]]:
    """The last call of each layer inside this context, by its number; of passes without gradient."""
    kept: dict[int, LayerCall] = {}
    handles = []

    def called(number: int) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            kept[number] = LayerCall(arguments, named)

        return hook

    def gave(number: int) -> Any:
        def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
            kept[number] = replace(kept[number], output=output[0] if isinstance(output, tuple) else output)

        return hook

    def projects(number: int) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            kept[number] = replace(kept[number], output=arguments[0])

        return hook

    for number, layer in layers.items():
        module: Any = layer if inside == "layer" else layer.self_attn
        handles.append(module.register_forward_pre_hook(called(number), with_kwargs=True))
        if inside == "layer":
            handles.append(module.register_forward_hook(gave(number)))
        else:
            handles.append(module.o_proj.register_forward_pre_hook(projects(number)))
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def check_same_layers(student: HfVlm, teacher: Any) -> None:
    """Refuses a teacher whose layers cannot be called as the student's are.

    Raises:
        ConfigError: it has layers of another family, number or size.
    """
    told = [_told(model) if isinstance(model, HfVlm) else () for model in (student, teacher)]
    if told[0] != told[1]:
        raise ConfigError(
            f"the layers of {student.name} ({_listed(told[0])}) are given what those of the teacher {teacher.name} "
            f"({_listed(told[1])}) are given, so both must be of one form: set student: linear:{teacher.name}"
        )


def _told(model: HfVlm) -> tuple[Any, ...]:
    """Family of the language model, its number of layers, and the shapes of their output projections."""
    found = (getattr(getattr(layer, "self_attn", None), "o_proj", None) for layer in model.layers)
    shapes = tuple(() if each is None else tuple(each.weight.shape) for each in found)
    return model.model.config.text_config.model_type, shapes


def _listed(told: tuple[Any, ...]) -> str:
    if not told:
        return "unknown"
    kind, shapes = told
    return f"{kind}, {len(shapes)} of width {shapes[0][0] if shapes[0] else 'unknown'}"


def _of_dtype(tree: Any, dtype: torch.dtype) -> Any:
    """The same arguments with numbers in this precision, as of a teacher in half precision."""
    if isinstance(tree, Tensor):
        return tree.to(dtype) if tree.is_floating_point() else tree
    if isinstance(tree, tuple):
        return tuple(_of_dtype(each, dtype) for each in tree)
    if isinstance(tree, dict):
        return {name: _of_dtype(each, dtype) for name, each in tree.items()}
    return tree
