"""Names after `timm:`: any timm image tower beside a CLIP text transformer, joined by open_clip's own classes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from cmapkd.config import Config, ConfigError, closest
from cmapkd.models import open_clip_family
from cmapkd.models.base import DualEncoder
from cmapkd.models.config import ModelConfig
from cmapkd.models.families import Loader
from cmapkd.models.open_clip_build import construct, fit_image_size
from cmapkd.models.open_clip_model import OpenClipModel
from cmapkd.models.open_clip_tokenizer import make_tokenizer
from cmapkd.models.types import BOTH


class TimmOptions(Config):
    """Both towers' settings; the image tower's own sizes are in its timm name."""

    image_size: int | None = Field(
        None, ge=16, description="Height and width of the input, in pixels. None: timm's own."
    )
    embed_dim: int = Field(512, ge=1, description="Width of the joint space.")
    timm_pool: Literal["", "avg", "token", "map", "abs_attn", "rot_attn"] = Field(
        "", description="How the image tower pools its features. Empty: timm's own way for this model."
    )
    timm_proj: Literal["linear", "mlp"] | None = Field(
        None, description="From pooled features to the joint space. None: linear, or timm's own classifier (see docs)."
    )
    drop_path: float | None = Field(None, ge=0, lt=1, description="Stochastic depth of the image tower, a probability.")
    text_width: int = Field(512, ge=8, description="Channels of the text transformer.")
    text_layers: int = Field(12, ge=1, description="Blocks of the text transformer.")
    text_heads: int | None = Field(None, ge=1, description="Attention heads of the text transformer. None: width / 64.")
    context_length: int = Field(77, ge=2, description="Longest text, in tokens, start and end included.")
    init_logit_bias: float | None = Field(
        None, description="Start of a learned logit bias, for a sigmoid loss (SigLIP: -10). None: the model has none."
    )

    @property
    def heads(self) -> int:
        return self.text_heads or max(1, self.text_width // 64)

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.text_width % self.heads:
            raise ValueError(f"text_width {self.text_width} is not a multiple of text_heads {self.heads}")
        return self


def build(rest: str, config: ModelConfig, captions: Iterable[str] | None) -> DualEncoder:  # noqa: ARG001
    """`NAME` untrained, or `NAME/pretrained` with timm's weights for the image tower; the text tower is untrained."""
    name, _, weights = rest.partition("/")
    options = TimmOptions.from_mapping(config.options, where=f"options of {config.name}")
    if weights not in ("", "pretrained"):
        raise ConfigError(f"{config.name}: after the timm model's name only /pretrained may stand, not {weights!r}")
    own = timm_entry(name)
    pretrained = weights == "pretrained" and config.init == "auto"
    if weights and not own.has_weights:
        raise ConfigError(f"timm has no pretrained weights for {name!r}: leave out /pretrained")
    model_config: dict[str, Any] = {
        "embed_dim": options.embed_dim,
        "vision_cfg": {
            "timm_model_name": name,
            "timm_model_pretrained": False,
            "timm_pool": options.timm_pool,
            "timm_proj": options.timm_proj or "linear",
            "timm_drop_path": options.drop_path,
            "image_size": options.image_size or own.input_size[-1],
        },
        "text_cfg": {
            "context_length": options.context_length,
            "vocab_size": 49408,  # CLIP's own vocabulary
            "width": options.text_width,
            "heads": options.heads,
            "layers": options.text_layers,
        },
        "custom_text": True,
    }
    if options.init_logit_bias is not None:
        model_config["init_logit_bias"] = options.init_logit_bias
    preprocess = preprocess_of(own)
    model: Any = construct(model_config, preprocess, where=config.name)
    if _head_widens(model.visual.trunk):
        if options.timm_proj is not None:
            raise ConfigError(
                f"{config.name} ends in a head of its own ({model.visual.trunk.head_hidden_size} channels from "
                f"{model.visual.trunk.num_features}), which open_clip cannot project: leave out timm_proj."
            )
        model_config["vision_cfg"].update(timm_proj="", timm_pool=options.timm_pool or "avg")
        model = construct(model_config, preprocess, where=config.name)
    if pretrained:
        model = with_timm_weights(model_config, preprocess, config.name, own)
    fit_image_size(model, where=config.name)
    assembled = OpenClipModel(
        model,
        config=model_config,
        preprocess=preprocess,
        tokenizer=make_tokenizer(model_config["text_cfg"]),
        name=config.name,
        family="timm",
    )
    assembled.random_towers = ("text",) if pretrained else BOTH
    return assembled


def load(folder: Path, description: dict[str, Any], load_model: Loader) -> DualEncoder:
    """A folder that was saved from a `timm:` model: open_clip's format."""
    return open_clip_family.load(folder, description, load_model)


def timm_entry(name: str) -> Any:
    """timm's own entry for a model (and tag, after a dot)."""
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        known = timm.list_models()
        raise ConfigError(
            f"timm has no model {architecture!r}{closest(architecture, known)}; timm.list_models() lists them"
        )
    try:
        return timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:
        tags = [full.partition(".")[2] for full in timm.list_models(f"{architecture}.*", pretrained=True)]
        raise ConfigError(
            f"timm's {architecture} has no weights {tag!r}{closest(tag, tags)}; it has: {', '.join(tags)}"
        ) from None


def preprocess_of(own: Any) -> dict[str, Any]:
    """The preprocessing of timm's own entry, in open_clip's words."""
    return {
        "mean": list(own.mean),
        "std": list(own.std),
        "interpolation": "bilinear" if own.interpolation == "bilinear" else "bicubic",
        "resize_mode": "shortest",
    }


def _head_widens(trunk: Any) -> bool:
    """MobileNetV3 and its kin widen the pooled features before the classifier, which open_clip 3.3 does not expect.

    There timm's own classifier serves as the projection (`timm_proj: ""` in open_clip's config).
    """
    return bool(getattr(trunk, "head_hidden_size", trunk.num_features) != trunk.num_features)


def with_timm_weights(model_config: dict[str, Any], preprocess: dict[str, Any], where: str, own: Any) -> Any:
    """The same model, built with timm's weights in its image tower (timm prefers safetensors and never unpickles).

    Raises:
        ValueError: they are not on this machine and the hub cannot be reached.
    """
    vision = {**model_config["vision_cfg"], "timm_model_pretrained": True}
    try:
        return construct({**model_config, "vision_cfg": vision}, preprocess, where=where)
    except Exception as error:
        raise ValueError(
            f"the weights of {where} are not on this machine and could not be fetched from "
            f"{own.hf_hub_id or own.url} ({error}). Connect to the network once, or leave out /pretrained."
        ) from None


def names() -> list[str]:
    """timm's architectures, then those with weights, with their tag."""
    import timm

    return [*timm.list_models(), *(f"{name}/pretrained" for name in timm.list_models(pretrained=True))]
