"""Image towers as parts of a model: timm's, open_clip's and transformers', each with its pooled features and levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from cmapkd.config import Config, ConfigError
from cmapkd.models.config import ModelConfig
from cmapkd.models.errors import first_line
from cmapkd.models.hf_model import image_spec as spec_of_processor
from cmapkd.models.hub import locate
from cmapkd.models.image_halves import ImagesBelow, like_middle
from cmapkd.models.image_tower import ImageTower
from cmapkd.models.middle import (
    encoder_above,
    encoder_below,
    trunk_above,
    trunk_below,
    twin,
    visual_above,
    visual_below,
)
from cmapkd.models.open_clip_build import construct, fit_image_size, image_spec
from cmapkd.models.open_clip_levels import (
    blocks_by_level,
    image_levels,
    last_tokens,
    outputs_of,
    unpooled,
    visual_blocks,
    visual_features,
)
from cmapkd.models.storage import load_weights, read_weights
from cmapkd.models.tiny import TinyDualEncoder
from cmapkd.models.tiny_tower import TinyImageTower
from cmapkd.models.transformers_part import blocks_of, from_config, load_part, read_config
from cmapkd.models.types import LAST, MIDDLE, Level, LevelInfo, TowerFeatures

IMAGE_CONFIG = "image_tower"  # a transformers image tower's own config, inside a model folder
COUNTERS = ".num_batches_tracked"  # of batch norms; no weight, and often left out of weight files
_NO_TEXT = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}  # built with a tower, dropped


class ImagePartConfig(Config):
    """An image tower by name. In a recipe the name alone is enough: `image: timm:vit_tiny_patch16_224/pretrained`."""

    name: str = Field(
        description="timm:NAME[/pretrained], open_clip:NAME[/TAG], hf:FOLDER or hub id, tiny:NAME, tiny:RUN."
    )
    init: Literal["auto", "scratch"] = Field(
        "auto", description="auto: the weights the name stands for; scratch: random ones."
    )
    checkpoint: Path | None = Field(
        None, description="Weight file of this tower, with its library's names; a classifier in it is left out."
    )
    image_size: int | None = Field(None, ge=16, description="Height and width of the input, in pixels. None: its own.")
    pooling: Literal["avg", "token", "map", "max", "mean", "class", "pooler"] | None = Field(
        None, description="timm: avg, max, token, map; transformers: mean, class, pooler. None: the tower's own way."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, values: Any) -> Any:
        return {"name": str(values)} if isinstance(values, str | Path) else values


class VisualTower(ImageTower):
    """An image tower as open_clip builds it: one of its own, or a timm model.

    Args:
        config: open_clip's `model_cfg`; its text tower is not used.
        headless: without open_clip's own head behind a timm model.
    """

    def __init__(
        self, visual: Any, *, config: Mapping[str, Any], preprocess: Mapping[str, Any], headless: bool, name: str
    ) -> None:
        super().__init__()
        self.visual: Any = visual
        if headless:
            visual.head = nn.Identity()
        self.name, self.headless = name, headless
        self.config = {**deepcopy(dict(config)), "text_cfg": dict(_NO_TEXT), "custom_text": True}
        self.preprocess = dict(preprocess)
        self.spec = image_spec(visual, preprocess)
        self._indices = image_levels(visual)
        self.levels = tuple(self._indices)
        self.width = self.measure_width()

    def forward(self, images: Float[Tensor, "batch 3 height width"], levels: Sequence[str] = ()) -> TowerFeatures:
        if LAST in levels:
            own = tuple(level for level in levels if level != LAST)
            return last_tokens(self.visual, images, own, self._indices, name=self.name)
        if not levels:
            return TowerFeatures(self.visual(images))
        return visual_features(self.visual, images, levels, self._indices, name=self.name)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return visual_blocks(self.visual, self.levels)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "open_clip",
            "name": self.name,
            "config": self.config,
            "preprocess": self.preprocess,
            "headless": self.headless,
        }

    @property
    def _last_frozen(self) -> str:
        """Of a timm model, what it calls the module that returns the middle."""
        name: str = self.visual.trunk.feature_info[self._indices[self.levels[self.frozen_blocks - 1]]]["module"]
        return name

    def below(self) -> nn.Module:
        if hasattr(self.visual, "trunk"):
            return ImagesBelow(trunk_below(self.visual.trunk, self._last_frozen), self)
        return ImagesBelow(visual_below(self.visual, self.frozen_blocks), self)

    def above(self, stored: TowerFeatures, levels: Sequence[str]) -> TowerFeatures:
        middle = stored.levels[MIDDLE]
        known, blocks = [level.name for level in self.levels], blocks_by_level(self.visual, self._indices)
        trunk = trunk_above(self.visual.trunk, self._last_frozen) if hasattr(self.visual, "trunk") else None
        wanted = {known.index(name) for name in levels if name != LAST}
        with outputs_of(
            blocks, sorted(wanted | ({len(known) - 1} if LAST in levels and trunk is None else set()))
        ) as kept:
            if trunk is not None and LAST in levels:
                features: Any = trunk.forward_features(middle.values)  # type: ignore[operator]
            elif trunk is not None:
                features = twin(self.visual, {"trunk": trunk})(middle.values)
            else:
                features = visual_above(self.visual, self.frozen_blocks)(middle.values)
        found = {name: like_middle(middle, kept[known.index(name)]) for name in levels if name != LAST}
        if LAST not in levels:
            return TowerFeatures(features, found)
        last = (
            like_middle(middle, kept[len(known) - 1])
            if trunk is None
            else unpooled(self.visual.trunk, features, self.name)
        )
        return TowerFeatures(middle.values.new_empty(len(middle.values), 0), {**found, LAST: last})


class TransformersImageTower(ImageTower):
    """A plain ViT of transformers. Levels are `blocks.N`, what the blocks return."""

    def __init__(self, model: Any, *, processor: Any, pooling: str, name: str) -> None:
        super().__init__()
        self.model: Any = model
        self.processor, self.name, self.pooling = processor, name, pooling
        config = model.config
        self.spec = spec_of_processor(processor.to_dict(), config.image_size)
        self._blocks = blocks_of(model)
        side = int(config.image_size) // int(config.patch_size)
        self.grid = side, side
        self.levels = tuple(LevelInfo(f"blocks.{n}", config.hidden_size, "tokens") for n in range(len(self._blocks)))
        self.width = self.measure_width()

    def forward(self, images: Float[Tensor, "batch 3 height width"], levels: Sequence[str] = ()) -> TowerFeatures:
        return self._answer(self.model, images, levels)

    def below(self) -> nn.Module:
        return ImagesBelow(encoder_below(self.model, self.frozen_blocks), self)

    def above(self, stored: TowerFeatures, levels: Sequence[str]) -> TowerFeatures:
        middle = stored.levels[MIDDLE].values
        return self._answer(encoder_above(self.model, self.frozen_blocks, middle), middle, levels)

    def _answer(self, model: Any, images: Tensor, levels: Sequence[str]) -> TowerFeatures:
        own = [name for name in levels if name != LAST]
        wanted = sorted({int(name.removeprefix("blocks.")) for name in own})
        with outputs_of(self._blocks, wanted) as values:
            output = model(pixel_values=images)
        tokens = output.last_hidden_state
        num_prefix = self._num_prefix(tokens)
        taken = {name: values[int(name.removeprefix("blocks."))] for name in own}
        if LAST in levels:
            pooled, taken[LAST] = tokens.new_empty(tokens.shape[0], 0), tokens
        elif self.pooling == "pooler":
            pooled = getattr(output, "pooler_output", None)
            if pooled is None:
                raise ConfigError(f"{self.name} has no pooler of its own: set pooling to mean or class")
        elif self.pooling == "class":
            if not num_prefix:
                raise ConfigError(f"{self.name} has no class token: set pooling to mean")
            pooled = tokens[:, 0]
        else:
            pooled = tokens[:, num_prefix:].mean(1)
        return TowerFeatures(
            pooled, {name: Level(value, "tokens", num_prefix, self.grid) for name, value in taken.items()}
        )

    def _num_prefix(self, tokens: Tensor) -> int:
        if tokens.dim() != 3 or tokens.shape[1] < self.grid[0] * self.grid[1]:
            raise ConfigError(
                f"{self.name} is no plain ViT: of transformers' image towers only these can be parts. Take its timm "
                "form instead."
            )
        return int(tokens.shape[1]) - self.grid[0] * self.grid[1]

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return tuple(self._blocks)

    def describe(self) -> dict[str, Any]:
        return {"kind": "hf", "name": self.name, "pooling": self.pooling}

    def save_config(self, folder: Path) -> None:
        self.model.config.save_pretrained(folder / IMAGE_CONFIG)
        self.processor.save_pretrained(folder / IMAGE_CONFIG)


def build_image_tower(config: ImagePartConfig) -> ImageTower:
    """The tower that a recipe names, in float32 on the CPU.

    Raises:
        ConfigError: the name, the size or the pooling is not one that can be had.
        ValueError: weights are missing or do not fit.
    """
    family, _, rest = config.name.partition(":")
    builders = {"timm": _timm, "open_clip": _open_clip, "hf": _transformers, "tiny": _tiny}
    if family not in builders or not rest:
        raise ConfigError(
            f"an image part is named timm:NAME, timm:NAME/pretrained, open_clip:NAME/TAG, hf:FOLDER or tiny:NAME, not "
            f"{config.name!r}"
        )
    poolings = {"timm": ("avg", "max", "token", "map"), "hf": ("mean", "class", "pooler")}.get(family, ())
    if config.pooling is not None and config.pooling not in poolings:
        raise ConfigError(
            f"{config.name} cannot pool by {config.pooling!r}: {', '.join(poolings) or 'leave pooling out'}"
        )
    return builders[family](rest, config)


def rebuild_image_tower(description: Mapping[str, Any], folder: Path) -> ImageTower:
    """The untrained tower that `ImageTower.describe` described, of a model folder."""
    name = str(description["name"])
    if description["kind"] == "tiny":
        return TinyImageTower.rebuilt(description, folder)
    if description["kind"] == "hf":
        source = str(folder / IMAGE_CONFIG)
        pooling = str(description["pooling"])
        model = from_config(read_config(source, {}, name), "image", pooler=pooling == "pooler")
        return TransformersImageTower(model, processor=_processor(source, {}, name), pooling=pooling, name=name)
    config, preprocess = description["config"], description["preprocess"]
    model = construct(config, preprocess, where=name)
    fit_image_size(model, where=name)
    return VisualTower(
        model.visual, config=config, preprocess=preprocess, headless=bool(description["headless"]), name=name
    )


def _timm(rest: str, config: ImagePartConfig) -> ImageTower:
    from cmapkd.models.timm_family import preprocess_of, timm_entry, with_timm_weights

    name, _, weights = rest.partition("/")
    if weights not in ("", "pretrained"):
        raise ConfigError(f"{config.name}: after the timm model's name only /pretrained may stand, not {weights!r}")
    own = timm_entry(name)
    if weights and not own.has_weights:
        raise ConfigError(f"timm has no pretrained weights for {name!r}: leave out /pretrained")
    vision = {
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": config.pooling or "",
        "timm_proj": "linear",
        "image_size": config.image_size or own.input_size[-1],
    }
    model_config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": _NO_TEXT, "custom_text": True}
    preprocess = preprocess_of(own)
    if weights and config.init == "auto" and config.checkpoint is None:
        model: Any = with_timm_weights(model_config, preprocess, config.name, own)
    else:
        model = construct(model_config, preprocess, where=config.name)
    if config.checkpoint is not None:
        _load_trunk(model.visual.trunk, config.checkpoint)
    fit_image_size(model, where=config.name)
    tower = VisualTower(model.visual, config=model_config, preprocess=preprocess, headless=True, name=config.name)
    tower.random = config.checkpoint is None and not (weights and config.init == "auto")
    return tower


def _load_trunk(trunk: Any, path: Path) -> None:
    """A timm model's weights, with or without its classifier."""
    own, weights = trunk.state_dict(), read_weights(path)
    named = trunk.pretrained_cfg.get("classifier") or ()
    classifiers = tuple(f"{each}." for each in ((named,) if isinstance(named, str) else named))
    kept = {key: value for key, value in weights.items() if key in own or not key.startswith(classifiers or "\0")}
    kept |= {key: own[key] for key in own.keys() - kept.keys() if key.endswith(COUNTERS)}
    load_weights(trunk, kept, where=path)


def _open_clip(rest: str, config: ImagePartConfig) -> ImageTower:
    from cmapkd.models import open_clip_family

    options = {} if config.image_size is None else {"image_size": config.image_size}
    model = open_clip_family.build(rest, ModelConfig(name=config.name, init=config.init, options=options), None)
    if config.checkpoint is not None:
        model.load_checkpoint(config.checkpoint)
    whole: Any = model
    tower = VisualTower(
        whole.model.visual, config=whole.config, preprocess=whole.preprocess, headless=False, name=config.name
    )
    tower.random = config.checkpoint is None and "image" in model.random_towers
    return tower


def _tiny(rest: str, config: ImagePartConfig) -> ImageTower:
    """Of a `tiny` model by name, or of a folder: one that was saved, or a run with such a student."""
    from cmapkd.models.load import build_model, load_model

    if Path(rest).is_dir():
        model = load_model(rest)
    else:
        # Its text tower is let go. One more word would draw other random numbers for all that is built after it.
        model = build_model(ModelConfig(name=config.name, init=config.init), captions=("a",))
    if not isinstance(model, TinyDualEncoder):
        raise ConfigError(f"{config.name}: {rest} holds {model.name}, which is no tiny model")
    if config.checkpoint is not None:
        model.load_checkpoint(config.checkpoint)
        model.random_towers = ()
    if config.image_size not in (None, model.options.image_size):
        raise ConfigError(
            f"{config.name} takes images of {model.options.image_size} pixels only, image_size is {config.image_size}"
        )
    return TinyImageTower.of(model, config.name)


def _transformers(rest: str, config: ImagePartConfig) -> ImageTower:
    source, fetching = locate(rest, where=config.name)
    settings = read_config(source, fetching, config.name)
    vision = getattr(settings, "vision_config", settings)
    if not isinstance(getattr(vision, "image_size", None), int) or not isinstance(
        getattr(vision, "patch_size", None), int
    ):
        raise ConfigError(
            f"{config.name} (model_type {settings.model_type!r}) is no plain ViT with square patches: of transformers' "
            "image towers only these can be parts. Take its timm form instead."
        )
    if config.image_size not in (None, vision.image_size):
        raise ConfigError(
            f"{config.name} takes images of {vision.image_size} pixels only, image_size is {config.image_size}"
        )
    pooling = config.pooling or ("pooler" if settings.model_type.startswith("siglip") else "class")
    scratch, pooler = config.init == "scratch", pooling == "pooler"
    model = load_part(source, settings, fetching, config.name, "image", scratch=scratch, pooler=pooler)
    if config.checkpoint is not None:
        load_weights(model, read_weights(config.checkpoint), where=config.checkpoint)
    processor = _processor(source, fetching, config.name)
    tower = TransformersImageTower(model, processor=processor, pooling=pooling, name=config.name)
    tower.random = scratch and config.checkpoint is None
    return tower


def _processor(source: str, fetching: dict[str, Any], name: str) -> Any:
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(source, trust_remote_code=False, **fetching)
    except Exception as error:
        raise ValueError(
            f"{name} has no readable preprocessor_config.json in {source!r} ({first_line(error)}), so the pixels that "
            "it reads are unknown: copy that file there."
        ) from None
