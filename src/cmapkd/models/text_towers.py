"""Text encoders of transformers as parts of a model: BERT-, MiniLM-, E5-, ModernBERT- and T5-like ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from cmapkd.config import Config, ConfigError
from cmapkd.data.types import TokenBatch
from cmapkd.models.cut_words import cut_encoder, cut_native
from cmapkd.models.hf_tokenizer import HfTokenizer, load_tokenizer, pad_on_the_right
from cmapkd.models.hub import file_beside, hub_options, locate
from cmapkd.models.middle import encoder_above, encoder_below
from cmapkd.models.open_clip_levels import outputs_of
from cmapkd.models.part_tower import PartTower
from cmapkd.models.storage import load_weights, read_weights
from cmapkd.models.transformers_part import blocks_of, from_config, keep_first_blocks, load_part, read_config
from cmapkd.models.types import LAST, MIDDLE, Level, LevelInfo, TowerFeatures

Pooling = Literal["mean", "class", "end"]
TEXT_CONFIG = "text_tower"  # the tower's own config, inside a model folder
DEFAULT_LENGTH = 77  # tokens, CLIP's; encoders take more, and captions have fewer
_SENTENCE_TRANSFORMERS = "1_Pooling/config.json"
_MODE = "pooling_mode_"  # begins the names of its flags
_POOLINGS: dict[str, Pooling] = {
    "cls_token": "class",
    "cls": "class",
    "mean_tokens": "mean",
    "mean": "mean",
    "lasttoken": "end",
}


class TextPartConfig(Config):
    """A text encoder by name. In a recipe the name alone is enough: `text: hf:FOLDER`."""

    name: str = Field(description="hf:FOLDER or hub id of a text encoder.")
    init: Literal["auto", "scratch"] = Field(
        "auto", description="auto: the weights the name stands for; scratch: random ones."
    )
    checkpoint: Path | None = Field(None, description="Weight file of this encoder, with transformers' names.")
    pooling: Pooling | None = Field(
        None, description="mean of tokens, class (first) or end (last) token. None: as the folder says, else mean."
    )
    context_length: int | None = Field(
        None, ge=2, description="Longest text, in tokens. None: 77, or as many as the encoder takes."
    )
    blocks: int | None = Field(
        None,
        ge=1,
        description="Only its first so many blocks, with their weights: a smaller encoder. None: all.",
    )
    tokenizer: str | None = Field(None, description="Folder or hub id of the tokenizer. None: the encoder's own.")
    revision: str | None = Field(None, description="Commit or branch of the hub repository. None: its main branch.")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, values: Any) -> Any:
        return {"name": str(values)} if isinstance(values, str | Path) else values


class TextTower(PartTower):
    """Token ids to pooled features [batch width], not projected, and levels `blocks.N`, what the blocks return.

    `LAST` is what the encoder returns for each token. Where it is asked for, nothing is pooled: the features have
    width 0.

    Attributes:
        width: of the pooled features.
        levels: shallow to deep; none where the encoder does not keep its blocks in one list.
        hub_id: repository whose main branch has the encoder's config and tokenizer; None: they are from elsewhere.
        random: whether it was just built with random weights.
    """

    hub_id: str | None = None
    random: bool = False

    def __init__(self, model: Any, *, tokenizer: HfTokenizer, pooling: Pooling, name: str) -> None:
        super().__init__()
        self.transformer: Any = model
        self.tokenizer, self.pooling, self.name = tokenizer, pooling, name
        self.width = int(model.config.hidden_size)
        self._blocks = blocks_of(model)
        self.levels = tuple(LevelInfo(f"blocks.{n}", self.width, "tokens") for n in range(len(self._blocks)))

    @property
    def config(self) -> Any:
        return self.transformer.config

    def forward(self, texts: TokenBatch, levels: Sequence[str] = ()) -> TowerFeatures:
        return self._answer(self.transformer, texts, levels)

    def example(self) -> TokenBatch:
        return self.tokenizer(("a", "a photo of a dog and of a cat"))

    def below(self) -> nn.Module:
        return _TextBelow(encoder_below(self.transformer, self.frozen_blocks), self)

    def above(self, stored: TowerFeatures, levels: Sequence[str]) -> TowerFeatures:
        middle = stored.levels[MIDDLE]
        assert middle.mask is not None
        upper = encoder_above(self.transformer, self.frozen_blocks, middle.values)
        return self._answer(upper, TokenBatch(middle.mask.long(), middle.mask), levels)  # no block reads the ids

    def _answer(self, transformer: Any, texts: TokenBatch, levels: Sequence[str]) -> TowerFeatures:
        own = [name for name in levels if name != LAST]
        wanted = sorted({int(name.removeprefix("blocks.")) for name in own})
        with outputs_of(self._blocks, wanted) as values:
            output = transformer(input_ids=texts.ids, attention_mask=texts.mask.long())
        taken = {name: values[int(name.removeprefix("blocks."))] for name in own}
        tokens: Tensor = output.last_hidden_state
        if LAST in levels:
            pooled, taken[LAST] = tokens.new_empty(tokens.shape[0], 0), tokens
        else:
            pooled = self._pooled(tokens, texts.mask)
        return TowerFeatures(pooled, {name: Level(value, "tokens", mask=texts.mask) for name, value in taken.items()})

    def last_levels(self) -> tuple[LevelInfo, ...]:
        """Width and layout of the last tokens."""
        return (LevelInfo(LAST, self.width, "tokens"),)

    def _pooled(self, tokens: Tensor, mask: Tensor) -> Float[Tensor, "batch width"]:
        if self.pooling == "class":
            return tokens[:, 0]
        if self.pooling == "end":
            rows = torch.arange(tokens.shape[0], device=tokens.device)
            return tokens[rows, mask.long().sum(1).clamp_min(1) - 1]
        weights = mask.to(tokens.dtype)[..., None]
        return (tokens * weights).sum(1) / weights.sum(1).clamp_min(1)

    def cut_words(self, texts: Iterable[str]) -> None:
        """Leaves out, in place, the tokens that these texts do not need, see `DualEncoder.with_words_of`.

        Raises:
            ConfigError: they cannot be left out.
        """
        native, kept = cut_native(self.tokenizer.native, texts, name=self.name, clean=self.tokenizer.clean)
        cut_encoder(self.transformer, kept, name=self.name)
        self.tokenizer, self.hub_id = self.tokenizer.over(native), None  # what the hub has is another tokenizer

    def describe(self) -> dict[str, Any]:
        """Plain data from which `rebuild_text_tower` makes the untrained encoder, beside what `save_config` writes."""
        plain = {"name": self.name, "pooling": self.pooling, "context_length": self.tokenizer.context_length}
        return plain if self.hub_id is None else {**plain, "hub_id": self.hub_id}

    def save_config(self, folder: Path) -> None:
        """The encoder's config and the tokenizer, into a model folder."""
        self.config.save_pretrained(folder / TEXT_CONFIG)
        self.tokenizer.native.save_pretrained(folder)


class _TextBelow(nn.Module):
    """What is frozen of a `TextTower`, see `PartTower.below`."""

    def __init__(self, half: Any, tower: TextTower) -> None:
        super().__init__()
        self.lower: Any = half
        self.frozen_blocks, self._describe = tower.frozen_blocks, tower.describe()

    def forward(self, texts: TokenBatch, _levels: Sequence[str] = ()) -> TowerFeatures:
        values = self.lower.eval()(input_ids=texts.ids, attention_mask=texts.mask.long()).last_hidden_state
        return TowerFeatures(values.new_empty(len(values), 0), {MIDDLE: Level(values, "tokens", mask=texts.mask)})

    def describe(self) -> dict[str, Any]:
        return {**self._describe, "frozen_blocks": self.frozen_blocks}


def build_text_tower(config: TextPartConfig) -> TextTower:
    """The encoder that a recipe names, in float32 on the CPU.

    Raises:
        ConfigError: the name, length or pooling is not one that can be had.
        ValueError: weights or tokenizer are missing or do not fit.
    """
    family, _, rest = config.name.partition(":")
    if family != "hf" or not rest:
        raise ConfigError(f"a text part is named hf:FOLDER, or hf: and a hub id, not {config.name!r}")
    source, fetching = locate(rest, where=config.name, revision=config.revision)
    settings = read_config(source, fetching, config.name)
    native = (
        load_tokenizer(source, fetching, config.name)
        if config.tokenizer is None
        else load_tokenizer(config.tokenizer, {} if Path(config.tokenizer).is_dir() else hub_options(), config.name)
    )
    scratch = config.init == "scratch"
    model: Any = load_part(source, settings, fetching, config.name, "text", scratch=scratch, pooler=False)
    if config.checkpoint is not None:
        load_weights(model, read_weights(config.checkpoint), where=config.checkpoint)
    if config.blocks is not None:
        keep_first_blocks(model, config.blocks, name=config.name)
    pooling = config.pooling or _pooling_of(source, fetching, config.name)
    tower = _assemble(model, native, pooling, config.context_length, config.name)
    if Path(source).exists():
        tower.name = f"hf:{Path(source).name}"  # of a folder its name alone: a saved model may be published
    elif config.revision is None and config.tokenizer is None and config.blocks is None:
        tower.hub_id = source
    tower.random = scratch and config.checkpoint is None
    return tower


def rebuild_text_tower(description: dict[str, Any], folder: Path) -> TextTower:
    """The untrained encoder of a model folder that `TextTower.describe` and `save_config` described."""
    name = str(description["name"])
    model = from_config(read_config(str(folder / TEXT_CONFIG), {}, name), "text", pooler=False)
    native = load_tokenizer(str(folder), {}, name)
    tower = _assemble(model, native, description["pooling"], int(description["context_length"]), name)
    tower.hub_id = description.get("hub_id")
    return tower


def _assemble(model: Any, native: Any, pooling: Pooling, length: int | None, name: str) -> TextTower:
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    if len(native) > vocabulary:
        raise ConfigError(
            f"the tokenizer of {name} has {len(native)} tokens, but the encoder embeds {vocabulary}: give the "
            "tokenizer that it was trained with, by the option `tokenizer`"
        )
    longest = _longest(model.config)
    if length is not None and longest is not None and length > longest:
        raise ConfigError(f"context_length {length} is longer than {name} takes: {longest} tokens")
    if native.pad_token_id is None:
        raise ConfigError(f"the tokenizer of {name} has no padding token: give it one in tokenizer_config.json")
    pad_on_the_right(native)
    _check_pooling(native, pooling, name)
    length = length or min(DEFAULT_LENGTH, longest or DEFAULT_LENGTH)
    tokenizer = HfTokenizer(native, context_length=length)
    return TextTower(model.eval(), tokenizer=tokenizer, pooling=pooling, name=name)


def _longest(config: Any) -> int | None:
    """Tokens that the encoder has places for; None: any number, as with relative positions."""
    places = getattr(config, "max_position_embeddings", None)
    if not isinstance(places, int) or places < 1:
        return None
    offset = 1 + config.pad_token_id if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet") else 0
    return places - offset


def _check_pooling(native: Any, pooling: Pooling, name: str) -> None:
    """Refuses to pool at a token that the tokenizer does not put there.

    Raises:
        ConfigError: names what can be set instead.
    """
    ids: list[int] = native("a")["input_ids"]
    firsts = {native.cls_token_id, native.bos_token_id} - {None}
    lasts = {native.eos_token_id, native.sep_token_id} - {None}
    if pooling == "class" and ids[0] not in firsts:
        raise ConfigError(f"the tokenizer of {name} puts no class token in front of a text: set pooling to mean")
    if pooling == "end" and ids[-1] not in lasts:
        raise ConfigError(f"the tokenizer of {name} puts no end token behind a text: set pooling to mean")


def _pooling_of(source: str, fetching: dict[str, Any], name: str) -> Pooling:
    """What a sentence-transformers folder or repository says, else the mean.

    Raises:
        ConfigError: it says something that no tower has, or there is no telling.
    """
    have = "set the option pooling to mean, class or end"
    try:
        path = file_beside(source, _SENTENCE_TRANSFORMERS, fetching)
    except LookupError as error:
        raise ConfigError(f"{name}: without a network there is no telling how it pools ({error}): {have}") from None
    if path is None:
        return "mean"
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        modes = [key.removeprefix("pooling_mode_") for key, on in said.items() if key.startswith(_MODE) and on is True]
        modes += [mode for mode in [said.get("pooling_mode")] if mode is not None]
    except (OSError, ValueError, AttributeError):
        raise ConfigError(f"{name}: {_SENTENCE_TRANSFORMERS} cannot be read: {have}") from None
    pooling = _POOLINGS.get(modes[0]) if len(modes) == 1 and isinstance(modes[0], str) else None
    if pooling is None:
        raise ConfigError(
            f"{name}: {_SENTENCE_TRANSFORMERS} says that it pools by {modes or 'nothing'}, which no text part does: "
            f"{have}, and its head learns what to make of that"
        )
    return pooling
