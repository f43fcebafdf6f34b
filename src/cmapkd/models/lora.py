"""Low-rank adapters (LoRA, Hu et al. 2022, arXiv:2106.09685): y = W x + (alpha / rank) B A x, where A and B learn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from cmapkd.config import Config, ConfigError, closest


class LoraConfig(Config):
    """Adapters of the language model of a student that writes. They alone learn, with the parts that `learn` names."""

    rank: int = Field(8, ge=1, description="Rows of A.")
    alpha: float = Field(16.0, gt=0, description="The adapter's output is multiplied by alpha / rank.")
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | Literal["all"] = Field(
        ("q_proj", "v_proj"), description="Last words of the names of linear layers; all: every linear layer."
    )
    learn: tuple[Literal["vision", "projector", "embeddings", "language", "head"], ...] = Field(
        (), description="Parts of the model that learn beside the adapters."
    )
    folder: Path | None = Field(
        None,
        description="Adapters to begin with, in peft's format; rank, alpha and targets are theirs then.",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        own = {"rank", "alpha", "targets"} & self.model_fields_set
        if self.folder is not None and own:
            raise ValueError(f"folder brings its own rank, alpha and targets: leave out {', '.join(sorted(own))}")
        return self


class LoraLinear(nn.Linear):
    """A linear layer with an adapter beside it. The layer's own weight keeps its name and is not copied.

    At first B is zero, so the output is that of the layer alone.
    """

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.alpha = rank, alpha
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as the official code and peft draw it

    def forward(self, input: Tensor) -> Tensor:
        added = F.linear(F.linear(input, self.lora_A), self.lora_B)
        return F.linear(input, self.weight, self.bias) + (self.alpha / self.rank) * added

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """One plain linear layer that computes the same, up to rounding."""
        plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        plain.weight = nn.Parameter(
            self.weight + (self.alpha / self.rank) * (self.lora_B @ self.lora_A), self.weight.requires_grad
        )
        if self.bias is not None:
            plain.bias = self.bias
        return plain.train(self.training)


def adapters_of(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers with adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the parameters that are adapters."""
    return [f"{name}.{matrix}" for name in adapters_of(model) for matrix in ("lora_A", "lora_B")]


def add_adapters(language: nn.Module, config: LoraConfig, *, name: str) -> None:
    """Puts adapters beside linear layers of `language`, in place.

    Raises:
        ConfigError: there is no linear layer of such a name.
    """
    linears = {path: module for path, module in language.named_modules() if isinstance(module, nn.Linear)}
    known = sorted({path.rpartition(".")[2] for path in linears})
    for target in () if config.targets == "all" else config.targets:
        if target not in known:
            raise ConfigError(
                f"lora.targets has {target!r}{closest(target, known)}; linear layers of {name}: {', '.join(known)}"
            )
    for path, linear in linears.items():
        if config.targets == "all" or path.rpartition(".")[2] in config.targets:
            exchange(language, path, LoraLinear(linear, rank=config.rank, alpha=config.alpha))


def exchange(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` where the module named `path` stands."""
    owner, _, last = path.rpartition(".")
    setattr(model.get_submodule(owner), last, module)


def merge(model: nn.Module) -> None:
    """Adds every adapter to its layer's weight, and leaves plain linear layers behind; in place."""
    for path, layer in adapters_of(model).items():
        exchange(model, path, layer.merged())


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Plain linear layers inside this context; afterwards the adapters stand as they stood before, bit for bit."""
    layers = adapters_of(model)
    merge(model)
    try:
        yield
    finally:
        for path, layer in layers.items():
            exchange(model, path, layer)
