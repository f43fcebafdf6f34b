"""Names after `linear:`: a model that writes, some of whose layers get linear attention in place of softmax."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from cmapkd.config import Config, ConfigError
from cmapkd.models import hf_family, vlm_family
from cmapkd.models.base import Model
from cmapkd.models.config import ModelConfig
from cmapkd.models.families import Loader
from cmapkd.models.hf_vlm import HfVlm
from cmapkd.models.linear_mixer import WIDTHS, MixerKind
from cmapkd.models.linear_vlm import SETTINGS, LinearVlm, convert
from cmapkd.models.load import build_model
from cmapkd.models.storage import WEIGHTS, load_weights, read_weights

Rule = Literal["all_but_every_fourth", "every_fourth", "all"]


class LinearOptions(Config):
    """Which layers of the language model are converted, and to what."""

    layers: Rule | Annotated[tuple[int, ...], Field(min_length=1)] = Field(
        "all_but_every_fourth",
        description="Converted layers, from 0: numbers; or all but 0, 4, 8, ...; every_fourth: these alone; all.",
    )
    mixer: MixerKind = Field(
        "mamba2", description="mamba2: as mmMamba and MaTVLM; gated_delta: as InfiniteVL, a gated delta rule."
    )
    convolution: int | None = Field(
        None, ge=1, le=64, description="Tokens that short convolutions see. None: 2 of mamba2, 4 of gated_delta."
    )
    seeded: bool = Field(
        True, description="Queries, keys, values and output begin as those of the attention. false is a control."
    )

    def numbers(self, depth: int) -> list[int]:
        """Of a model with `depth` layers."""
        if not isinstance(self.layers, str):
            return list(self.layers)
        fourth = [number % 4 == 0 for number in range(depth)]
        wanted = {"all": [True] * depth, "every_fourth": fourth, "all_but_every_fourth": [not each for each in fourth]}
        return [number for number, chosen in enumerate(wanted[self.layers]) if chosen]


def build(rest: str, config: ModelConfig, captions: Iterable[str] | None, teacher: Model | None = None) -> LinearVlm:
    """`linear:NAME`, of any model that writes: a family's, or a folder.

    Raises:
        ConfigError: there is no such model, it does not write, or its layers cannot be converted.
    """
    options = LinearOptions.from_mapping(config.options, where=f"options of {config.name}")
    model = build_model(ModelConfig(name=rest, init=config.init), captions=captions, teacher=teacher)
    if not isinstance(model, HfVlm):
        raise ConfigError(
            f"{config.name} converts layers of a language model of transformers, and {rest} {model.does}: name a model "
            "that writes, such as linear:tiny_vlm:scenes-teacher"
        )
    model.name = config.name
    width = WIDTHS[options.mixer] if options.convolution is None else options.convolution
    layers = options.numbers(len(model.layers))
    if not layers:
        raise ConfigError(
            f"options.layers of {config.name} is {options.layers}, which is no layer of {len(model.layers)}: give "
            "numbers, or all"
        )
    return convert(model, layers, mixer=options.mixer, convolution=width, seeded=options.seeded)


def load(folder: Path, description: dict[str, Any], load_model: Loader) -> Model:  # noqa: ARG001
    """A folder that `LinearVlm.save` wrote; needs no network."""
    name, options = str(description["name"]), description["options"]
    blank = (vlm_family if options["of"] == "vlm" else hf_family).blank
    conversion = options["conversion"]
    plain = blank(folder / SETTINGS, options["settings"], name)
    mixer: MixerKind = "gated_delta" if conversion["mixer"] == "gated_delta" else "mamba2"
    model = convert(plain, conversion["layers"], mixer=mixer, convolution=int(conversion["convolution"]))
    load_weights(model, read_weights(folder / WEIGHTS), where=folder)
    model.random_parts = ()
    return model
