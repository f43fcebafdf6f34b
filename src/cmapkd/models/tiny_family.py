"""Names after `tiny:`: a preset of sizes (untrained) or a trained model that ships with cmapkd."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cmapkd.config import ConfigError, closest
from cmapkd.models.base import DualEncoder
from cmapkd.models.config import ModelConfig
from cmapkd.models.families import Loader
from cmapkd.models.packaged import packaged_models
from cmapkd.models.storage import WEIGHTS, load_weights, read_description, read_weights
from cmapkd.models.tiny import PRESETS, TinyDualEncoder, TinyOptions
from cmapkd.models.types import BOTH
from cmapkd.models.vocabulary import TrainedTokenizer


def build(rest: str, config: ModelConfig, captions: Iterable[str] | None) -> DualEncoder:
    """A preset with random weights and a vocabulary learned from `captions`, or a packaged trained model."""
    packaged = packaged_models()
    if rest in packaged and config.init == "auto":
        if config.options:
            raise ConfigError(
                f"tiny:{rest} is trained: its sizes are fixed, options {sorted(config.options)} do not apply"
            )
        return _read(packaged[rest], read_description(packaged[rest]))
    if rest not in PRESETS:
        known = [*PRESETS, *packaged]
        raise ConfigError(f"there is no model tiny:{rest}{closest(rest, known)}; known: {', '.join(known)}")
    options = TinyOptions.from_mapping(
        {**PRESETS[rest].model_dump(), **config.options}, where=f"options of tiny:{rest}"
    )
    if captions is None:
        raise ConfigError(
            f"tiny:{rest} is untrained and learns its vocabulary from captions: give it texts, or name a trained model "
            f"({', '.join('tiny:' + name for name in packaged) or 'a run folder'})"
        )
    tokenizer = TrainedTokenizer.train(captions, vocab_size=options.vocab_size, context_length=options.context_length)
    model = TinyDualEncoder(options, tokenizer, name=config.name)
    model.random_towers = BOTH
    return model


def names() -> list[str]:
    return [*PRESETS, *packaged_models()]


def load(folder: Path, description: dict[str, Any], load_model: Loader) -> DualEncoder:  # noqa: ARG001
    """A folder that `TinyDualEncoder.save` wrote."""
    return _read(folder, description)


def _read(folder: Path, description: dict[str, Any]) -> DualEncoder:
    options = TinyOptions.from_mapping(description["options"], where=f"model folder {folder}")
    tokenizer = TrainedTokenizer.load(folder, context_length=options.context_length)
    model = TinyDualEncoder(options, tokenizer, name=str(description["name"]))
    load_weights(model, read_weights(folder / WEIGHTS), where=folder)
    return model
