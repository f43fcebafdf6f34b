"""`LinearVlm`: a model that writes, with linear attention in some layers of its language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cmapkd.config import ConfigError
from cmapkd.models.architecture import settings_text
from cmapkd.models.generative import CacheShape
from cmapkd.models.hf_vlm import HfVlm
from cmapkd.models.linear_mixer import LinearMixer, MixerKind
from cmapkd.models.storage import write_model_folder
from cmapkd.models.token_types import TokenNeeds
from cmapkd.models.vlm_model import AssembledVlm

MIXERS = ("mixers", "mixer_inputs", "mixer_outputs")
"""Parts that a model with converted layers has beside those of others."""

SETTINGS = "settings"  # inside a model folder: all of the unconverted model but its weights
_INPUTS = ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm")


class LinearVlm(HfVlm):
    """Further parts are `mixers`, what is new in converted layers; `mixer_inputs`, their queries, keys and values; and
    `mixer_outputs`, their output projections. Converted layers have no attention maps, and no keys that can be hidden.
    """

    @property
    def mixers(self) -> Mapping[int, LinearMixer]:
        """The converted layers' mixers, by number of the layer."""
        found = ((number, getattr(layer, "self_attn", None)) for number, layer in enumerate(self.layers))
        return {number: mixer for number, mixer in found if isinstance(mixer, LinearMixer)}

    @property
    def conversion(self) -> dict[str, Any]:
        """Which layers are converted, and to what."""
        first = next(iter(self.mixers.values()))
        return {"layers": [*self.mixers], "mixer": first.kind, "convolution": first.taps.shape[-1]}

    @property
    def architecture(self) -> str:
        return settings_text(self, super().architecture, self.conversion)

    @property
    def parts(self) -> Mapping[str, frozenset[str]]:
        kinds: dict[int, str] = {}
        for mixer in self.mixers.values():
            for name, parameter in mixer.named_parameters():
                word = name.partition(".")[0]
                outer = "mixer_outputs" if word == "o_proj" else "mixers"
                kinds[id(parameter)] = "mixer_inputs" if word in _INPUTS else outer
        own = {name: kinds[id(each)] for name, each in self.named_parameters() if id(each) in kinds}
        parts = {part: names - own.keys() for part, names in super().parts.items()}
        return parts | {part: frozenset(name for name, kind in own.items() if kind == part) for part in MIXERS}

    @property
    def cache_shape(self) -> CacheShape:
        whole, mixers = super().cache_shape, self.mixers
        state = sum(mixer.state_size for mixer in mixers.values())
        return replace(whole, layers=whole.layers - len(mixers), state=state)

    @property
    def attention(self) -> str:
        return f"{super().attention}, and without softmax in layers {', '.join(map(str, self.mixers))}"

    @property
    def attention_heads(self) -> None:
        return None

    def write(self, folder: Path) -> None:
        """Ours: one weight file, and the settings of the model that was converted. No other library reads it."""
        options = {
            "conversion": self.conversion,
            "of": "vlm" if isinstance(self, AssembledVlm) else "hf",
            "settings": self.write_settings(folder / SETTINGS),
        }
        weights, seen = {}, set()
        for name, tensor in self.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:  # a tied head is stored once
                weights[name] = tensor
            seen.add(id(tensor))
        write_model_folder(folder, family="linear", name=self.name, options=options, weights=weights)

    def write_settings(self, folder: Path) -> dict[str, Any]:
        """What `hf_family.blank` needs."""
        self.model.config.save_pretrained(folder)
        self.model.generation_config.save_pretrained(folder)
        self.processor.native.save_pretrained(folder)
        return {"max_tokens": self.processor.max_tokens}

    def _check(self, needs: TokenNeeds) -> None:
        super()._check(needs)
        if needs.attention_mean or needs.hidden is not None or self.mixers.keys() & set(needs.attention):
            raise ValueError(
                f"layers {', '.join(map(str, self.mixers))} of {self.name} have linear attention: they have no "
                "attention maps, and no keys that can be hidden"
            )


class LinearAssembledVlm(LinearVlm, AssembledVlm):
    """As `LinearVlm`, of halves of any origin."""

    write_settings = AssembledVlm.write_settings


def convert(
    model: HfVlm, layers: Sequence[int], *, mixer: MixerKind, convolution: int, seeded: bool = True
) -> LinearVlm:
    """The same model, whose attention in these layers is exchanged in place.

    Raises:
        ConfigError: there is no such layer, its attention has other projections, or layers were converted before.
    """
    if isinstance(model, LinearVlm):
        raise ConfigError(f"{model.name} has converted layers already: name the model that it was made of")
    found = model.layers
    wrong = sorted({number for number in layers if not 0 <= number < len(found)})
    if wrong or not layers or len({*layers}) < len(layers):
        raise ConfigError(
            f"options.layers is {list(layers)}, and {model.name} has layers 0 to {len(found) - 1}: name some of them, "
            "each once"
        )
    made = {}
    for number in sorted(layers):  # all of them before the first is exchanged
        attention = getattr(found[number], "self_attn", None)
        made[number] = LinearMixer(attention, mixer, layer=number, width=convolution, seeded=seeded)
    for number, each in made.items():
        found[number].self_attn = each
    kind = LinearAssembledVlm if isinstance(model, AssembledVlm) else LinearVlm
    converted = kind(model.model, processor=model.processor, name=model.name)
    parts = () if seeded else ("mixer_inputs", "mixer_outputs")
    converted.random_parts = (*model.random_parts, "mixers", *parts)
    return converted.train(model.training)
