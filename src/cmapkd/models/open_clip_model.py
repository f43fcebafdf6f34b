"""`OpenClipModel`: a dual encoder that open_clip builds (native, ResNet or timm image tower) behind our contract."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.data.types import TokenBatch
from cmapkd.models.base import DualEncoder
from cmapkd.models.images import ImageSpec
from cmapkd.models.open_clip_pruning import prunable_towers, resize
from cmapkd.models.parts import split_by_name
from cmapkd.models.prunable import PrunableTower, TowerSizes
from cmapkd.models.spans import span_finder
from cmapkd.models.storage import check_sizes, load_weights, read_weights, write_model_folder
from cmapkd.models.types import Level, LevelInfo, Tower, TowerFeatures

NATIVE_CONFIG, NATIVE_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
TEXT_CONFIG = "text_tower"  # a transformers text tower's own config, inside a model folder
_STEMS = ("act1", "bn1", "conv_stem", "features.norm0")  # what timm calls the output before the first stage


class OpenClipTokenizer:
    """open_clip's own tokenizer, with the mask and the spans that it does not return."""

    def __init__(self, tokenizer: Any, *, context_length: int) -> None:
        self.context_length = context_length
        self.native = tokenizer
        self.vocab_size: int = len(tokenizer.tokenizer) if hasattr(tokenizer, "tokenizer") else tokenizer.vocab_size
        self._spans = span_finder(tokenizer)
        self._of_cleaned = copy(tokenizer)  # spans need the cleaned text, so it is made here, once
        self._of_cleaned.clean_fn = str

    def __call__(self, texts: Sequence[str]) -> TokenBatch:
        if self._spans is None:
            ids = self.native(list(texts), context_length=self.context_length).long()
            return TokenBatch(ids, self._real(ids))
        cleaned = [self.native.clean_fn(text) for text in texts]
        ids = self._of_cleaned(cleaned, context_length=self.context_length).long()
        return TokenBatch(ids, self._real(ids), self._spans(texts, cleaned, self.context_length))

    def __deepcopy__(self, memo: dict[int, Any]) -> OpenClipTokenizer:
        return self  # nothing in it changes, and CLIP's vocabulary is large

    def _real(self, ids: Int[Tensor, "batch length"]) -> Bool[Tensor, "batch length"]:
        """CLIP's own vocabulary pads with 0, which is also "!": there the text ends with its end token."""
        inner = getattr(self.native, "tokenizer", None)
        if inner is None:
            return (ids == int(self.native.eot_token_id)).flip(1).cumsum(1).flip(1) > 0
        if inner.pad_token_id != inner.eos_token_id:
            return ids != int(inner.pad_token_id)
        ends = (ids == int(inner.eos_token_id)).long()  # padded with the end token: its first one is the text's own
        return (ends.cumsum(1) - ends) == 0


class OpenClipModel(DualEncoder):
    """Wraps `open_clip.CLIP` or `open_clip.CustomTextCLIP`; `config` is open_clip's `model_cfg` of it.

    `sizes` are those of towers that were cut to smaller ones than a `model_cfg` can describe.

    Levels come from open_clip's `forward_intermediates`. A ViT's are `blocks.N` with its class and register tokens at
    the front; a convolutional or windowed tower's are `stages.N` maps, the stem not counted. Texts have `blocks.N`.
    """

    tokenizer: OpenClipTokenizer

    def __init__(
        self,
        model: nn.Module,
        *,
        config: Mapping[str, Any],
        preprocess: Mapping[str, Any],
        tokenizer: OpenClipTokenizer,
        name: str,
        family: str = "open_clip",
        sizes: Mapping[Tower, TowerSizes] | None = None,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.sizes = sizes
        self.config, self.preprocess = deepcopy(dict(config)), dict(preprocess)
        self.name, self.family, self.tokenizer = name, family, tokenizer
        self.embed_dim = int(config["embed_dim"])
        self.image_spec = _image_spec(self.model.visual, preprocess)
        self._indices = _image_levels(self.model.visual)
        self.image_levels = tuple(self._indices)
        blocks = _text_blocks(self.model)
        width = _text_width(self.model)
        self.text_levels = tuple(LevelInfo(f"blocks.{number}", width, "tokens") for number in range(len(blocks)))

    @property
    def log_logit_scale(self) -> nn.Parameter:
        parameter: nn.Parameter = self.model.logit_scale
        return parameter

    @property
    def logit_bias(self) -> Tensor | None:
        bias: Tensor | None = self.model.logit_bias
        return None if bias is None else bias.reshape(())

    def clamp_logit_scale(self) -> None:
        """CLIP's clamp; not where there is a bias, as SigLIP (arXiv:2303.15343) has none and ends above 100."""
        if self.model.logit_bias is None:
            super().clamp_logit_scale()

    @property
    def parts(self) -> Mapping[str, frozenset[str]]:
        prefixes = {
            "image": ("model.visual",),
            "text": ("model",),  # open_clip.CLIP keeps its text tower's weights beside the image tower
            "projections": [f"model.{name}" for name in _projections(self.model)],
            "scale": ("model.logit_scale", "model.logit_bias"),
        }
        return split_by_name((name for name, _ in self.named_parameters()), prefixes)

    @property
    def image_blocks(self) -> tuple[nn.Module, ...]:
        visual = self.model.visual
        if any(level.layout != "tokens" for level in self.image_levels) or not self.image_levels:
            return ()
        if not hasattr(visual, "trunk"):
            return tuple(visual.transformer.resblocks) if visual.transformer.batch_first else ()
        positions_inside = any(getattr(visual.trunk, name, None) is not None for name in ("rope", "rel_pos_bias"))
        return () if positions_inside else tuple(visual.trunk.blocks)

    @property
    def prunable(self) -> Mapping[Tower, PrunableTower]:
        return {tower: parts.within("model") for tower, parts in prunable_towers(self.model).items()}

    def resized(self, sizes: Mapping[Tower, TowerSizes]) -> OpenClipModel:
        model = deepcopy(self.model)
        resize(model, sizes)
        return type(self)(
            model,
            config=self.config,
            preprocess=self.preprocess,
            tokenizer=self.tokenizer,
            name=self.name,
            family=self.family,
            sizes=sizes,
        )

    def encode_image(self, images: Float[Tensor, "batch 3 height width"], levels: Sequence[str] = ()) -> TowerFeatures:
        self.check_levels("image", levels)
        if not levels:
            return TowerFeatures(self.model.encode_image(images))
        asked = [info for info in self.image_levels if info.name in levels]
        tokens = asked[0].layout == "tokens"
        # The last one is always taken: open_clip 3.3's ModifiedResNet stops at the last index asked for, then pools.
        wanted = sorted({self._indices[info] for info in asked} | {max(self._indices.values())})
        output = self.model.forward_intermediates(
            image=images,
            image_indices=wanted,
            normalize=False,
            image_output_fmt="NLC" if tokens else "NCHW",
            image_output_extra_tokens=tokens,
        )
        values = dict(zip(wanted, output["image_intermediates"], strict=True))
        prefixes = dict(zip(wanted, output.get("image_intermediates_prefix", ()), strict=False))
        kept: dict[str, Level] = {}
        for name in levels:
            index = next(self._indices[info] for info in asked if info.name == name)
            if tokens:
                kept[name] = _tokens(values[index], prefixes.get(index), self._grid(images), self.name)
            else:
                kept[name] = Level(values[index], "map", grid=tuple(values[index].shape[-2:]))
        return TowerFeatures(output["image_features"], kept)

    def encode_text(self, texts: TokenBatch, levels: Sequence[str] = ()) -> TowerFeatures:
        self.check_levels("text", levels)
        if not levels:
            return TowerFeatures(self.model.encode_text(texts.ids))
        wanted = sorted({int(name.removeprefix("blocks.")) for name in levels})
        if _has_transformers_text(self.model):
            with _outputs_of(_text_blocks(self.model), wanted) as values:
                embedding = self.model.encode_text(texts.ids)
        else:
            output = self.model.forward_intermediates(text=texts.ids, text_indices=wanted, normalize=False)
            values = dict(zip(wanted, output["text_intermediates"], strict=True))
            embedding = output["text_features"]
        taken = {name: values[int(name.removeprefix("blocks."))] for name in levels}
        return TowerFeatures(
            embedding, {name: Level(value, "tokens", mask=texts.mask) for name, value in taken.items()}
        )

    def _grid(self, images: Tensor) -> tuple[int, int]:
        height, width = images.shape[-2:]
        visual = self.model.visual
        if hasattr(visual, "trunk"):
            rows, columns = visual.trunk.patch_embed.dynamic_feat_size((height, width))
            return int(rows), int(columns)
        return height // visual.patch_size[0], width // visual.patch_size[1]

    def load_checkpoint(self, path: Path) -> None:
        weights = read_weights(path)
        if all(key.startswith("model.") for key in weights):  # our own names
            load_weights(self, weights, where=path)
        else:
            load_native_weights(self.model, path)

    def save(self, folder: Path) -> None:
        """Ours, and open_clip's: `open_clip.create_model_and_transforms("local-dir:FOLDER")` reads it too.

        A timm ViT whose `image_size` is not its own is an exception: open_clip builds it at its own size first. So is a
        model whose towers were cut: open_clip has no words for it, and it is written without open_clip's config.
        """
        from open_clip.push_to_hf_hub import save_config_for_hf

        options: dict[str, Any] = {"config": self.config, "preprocess": self.preprocess}
        if self.sizes is not None:
            options["sizes"] = {tower: sizes.plain() for tower, sizes in self.sizes.items()}
        write_model_folder(folder, family=self.family, name=self.name, options=options)
        if self.sizes is None:
            save_config_for_hf(self.model, folder / NATIVE_CONFIG, model_config=self.config)
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in self.model.state_dict().items()}
        save_file(tensors, folder / NATIVE_WEIGHTS)
        if hasattr(self.tokenizer.native, "save_pretrained"):
            self.tokenizer.native.save_pretrained(folder)
        if _has_transformers_text(self.model):
            self.model.text.config.save_pretrained(folder / TEXT_CONFIG)


def construct(config: Mapping[str, Any], preprocess: Mapping[str, Any], *, where: str) -> nn.Module:
    """The untrained architecture of an open_clip `model_cfg`, chosen and built as `open_clip.create_model` does.

    Raises:
        ConfigError: open_clip cannot build it, or it is of a kind we do not support.
    """
    import open_clip

    check_sizes(config, where=where)
    arguments = deepcopy(dict(config))
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - arguments.keys()
    if missing:
        raise ConfigError(f"{where} is no open_clip model config: it lacks {', '.join(sorted(missing))}")
    if "multimodal_cfg" in arguments:
        raise ConfigError(f"{where} is a CoCa model (it has a multimodal_cfg): only CLIP and SigLIP are supported")
    for part in ("vision_cfg", "text_cfg"):
        if not isinstance(arguments[part], dict):
            raise ConfigError(f"{where} is no open_clip model config: its {part} is no object")
    custom = arguments.pop("custom_text", False) or bool(arguments["text_cfg"].get("hf_model_name"))
    try:
        model: Any = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**arguments)
    except (
        TypeError,
        ValueError,
        AssertionError,
        RuntimeError,
        LookupError,
        OSError,
        ArithmeticError,
        AttributeError,
    ) as error:
        raise ConfigError(f"open_clip cannot build {where}: {_first_line(error)}") from None
    size = model.visual.image_size
    size = size if isinstance(size, Sequence) else (size, size)
    open_clip.set_model_preprocess_cfg(model, {**preprocess, "size": tuple(size)})
    return model.float()  # type: ignore[no-any-return]


def fit_image_size(model: Any, *, where: str) -> None:
    """Makes a timm tower take the size that its config names: timm itself resamples the position embedding.

    Raises:
        ConfigError: the tower has one fixed size.
    """
    trunk = getattr(model.visual, "trunk", None)
    if trunk is None:
        return
    size, own = tuple(model.visual.image_size), tuple(trunk.pretrained_cfg.get("input_size", (3, 0, 0))[-2:])
    if size == own:
        return
    if hasattr(trunk, "set_input_size"):
        try:
            model.visual.set_input_size(size)
        except (AssertionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{where} cannot be built for images of {size[0]} pixels: {_first_line(error)}") from None
    elif trunk.pretrained_cfg.get("fixed_input_size"):
        raise ConfigError(f"{where} takes images of {own[0]} pixels only, image_size is {size[0]}")


def load_native_weights(model: Any, path: Path) -> None:
    """open_clip's own loader, which converts other names and resizes position embeddings, without unpickling objects.

    Raises:
        ValueError: the file is missing, unreadable or unsafe, or does not fit; says which, and what to do.
    """
    import open_clip

    try:
        open_clip.load_checkpoint(model, str(path), strict=True, weights_only=True)
    except Exception as error:
        read_weights(path)  # says what is wrong with the file, if it is the file
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(
            f"the weights in {path} do not fit {type(model).__name__}: {' '.join(lines[:4])[:600]}. "
            "Name the architecture that they were trained with."
        ) from None


def make_tokenizer(text_config: Mapping[str, Any], *, source: str | None = None) -> OpenClipTokenizer:
    """The tokenizer of an open_clip `text_cfg`, as `open_clip.get_tokenizer` chooses it; `source` replaces its place.

    Raises:
        ValueError: its files are not there.
    """
    from open_clip.tokenizer import HFTokenizer

    length = int(text_config.get("context_length", 77))
    settings = dict(text_config.get("tokenizer_kwargs") or {})
    if not (named := text_config.get("hf_tokenizer_name")):
        return OpenClipTokenizer(_clip_tokenizer(**settings), context_length=length)
    mode = text_config.get("tokenizer_mode")
    try:
        native = HFTokenizer(source or named, context_length=length, tokenizer_mode=mode, **settings)
        if len(native.tokenizer) <= len(set(native.tokenizer.all_special_ids)):
            raise ValueError("it knows no words")  # what transformers 5 makes up where there are no files
    except Exception as error:
        raise ValueError(
            f"there is no tokenizer in {source or named!r} ({type(error).__name__}: {_first_line(error)}). Put its "
            "files (tokenizer.json and tokenizer_config.json) into a folder and name it as text_cfg.hf_tokenizer_name, "
            "or connect to the Hugging Face hub once."
        ) from None
    return OpenClipTokenizer(native, context_length=length)


@cache
def _clip_tokenizer(**settings: Any) -> Any:
    """Made once: it parses 49,000 merges. The context length is given with each call."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(**settings)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__


def _image_spec(visual: Any, preprocess: Mapping[str, Any]) -> ImageSpec:
    """open_clip's evaluation transform in our terms."""
    size = visual.image_size
    height, width = size if isinstance(size, Sequence) else (size, size)
    if height != width:
        raise ConfigError(f"image_size {tuple(size)} is not square: only square inputs are supported")
    mode = preprocess.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash"):
        raise ConfigError(f"resize_mode {mode!r} (padding to a square) is not supported, only 'shortest' and 'squash'")
    mean, std = (tuple(float(v) for v in preprocess[key]) for key in ("mean", "std"))
    interpolation = "bilinear" if preprocess.get("interpolation") == "bilinear" else "bicubic"  # as open_clip decides
    return ImageSpec(
        int(height),
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        interpolation=interpolation,  # type: ignore[arg-type]
        fit="crop" if mode == "shortest" else "squash",
    )


def _image_levels(visual: Any) -> dict[LevelInfo, int]:
    """Each level of an image tower, and its index in `forward_intermediates`."""
    if hasattr(visual, "trunk"):
        return _timm_levels(visual.trunk)
    if hasattr(visual, "attnpool"):  # ModifiedResNet: the stem is index 0
        stages = (visual.layer1, visual.layer2, visual.layer3, visual.layer4)
        return {LevelInfo(f"stages.{n}", stage[-1].conv3.out_channels, "map"): n + 1 for n, stage in enumerate(stages)}
    width, depth = visual.transformer.width, len(visual.transformer.resblocks)
    return {LevelInfo(f"blocks.{number}", width, "tokens"): number for number in range(depth)}


def _timm_levels(trunk: Any) -> dict[LevelInfo, int]:
    """timm lists what `forward_intermediates` returns in `feature_info`; only token towers know prefix tokens."""
    import inspect

    listed = list(getattr(trunk, "feature_info", None) or ())
    if not listed or not hasattr(trunk, "forward_intermediates"):
        return {}
    parameters = inspect.signature(trunk.forward_intermediates).parameters
    tokens = "return_prefix_tokens" in parameters and hasattr(getattr(trunk, "patch_embed", None), "dynamic_feat_size")
    if tokens or all(entry["module"] == f"blocks.{number}" for number, entry in enumerate(listed)):
        layout = "tokens" if tokens else "map"
        return {LevelInfo(f"blocks.{n}", e["num_chs"], layout): n for n, e in enumerate(listed)}  # type: ignore[arg-type]
    stem = int(listed[0]["module"].startswith("stem") or listed[0]["module"] in _STEMS)
    return {LevelInfo(f"stages.{n - stem}", e["num_chs"], "map"): n for n, e in enumerate(listed) if n >= stem}


def _tokens(patches: Tensor, prefix: Tensor | None, grid: tuple[int, int], name: str) -> Level:
    if patches.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"{name} returned {patches.shape[1]} patch tokens for a grid of {grid[0]} x {grid[1]}: patch dropout is "
            "on, so its levels have no places. Set patch_dropout to 0, or use a method without image levels."
        )
    if prefix is None:
        return Level(patches, "tokens", grid=grid)
    return Level(torch.cat([prefix, patches], dim=1), "tokens", num_prefix=prefix.shape[1], grid=grid)


def _projections(model: Any) -> Iterator[str]:
    """Names of the weights or modules that lead from the towers to the joint space, where a tower has one."""
    yield from ("visual.proj", "visual.attnpool.c_proj", "visual.head")  # ViT, ResNet, open_clip's head behind timm
    yield from ("text_projection", "text.text_projection", "text.proj")  # CLIP, CustomTextCLIP, a transformers tower
    trunk = getattr(model.visual, "trunk", None)
    if trunk is not None and trunk.num_classes > 0:  # timm's own classifier projects
        found = trunk.get_classifier()  # two of a distilled one
        owners = {id(module) for module in (found if isinstance(found, tuple) else (found,))}
        yield from (f"visual.trunk.{name}" for name, module in trunk.named_modules() if id(module) in owners)


def _has_transformers_text(model: Any) -> bool:
    return hasattr(model, "text") and hasattr(model.text, "pooler")


def _text_blocks(model: Any) -> Sequence[nn.Module]:
    if not _has_transformers_text(model):
        blocks: Sequence[nn.Module] = getattr(model, "text", model).transformer.resblocks
        return blocks
    inner = model.text.transformer
    inner = getattr(inner, "encoder", inner)
    for attribute in ("layer", "layers", "block"):  # BERT and its kin; M2M-100; T5
        if hasattr(inner, attribute):
            found: Sequence[nn.Module] = getattr(inner, attribute)
            return found
    return ()


def _text_width(model: Any) -> int:
    if _has_transformers_text(model):
        return int(model.text.config.hidden_size)
    return int(getattr(model, "text", model).transformer.width)


@contextmanager
def _outputs_of(blocks: Sequence[nn.Module], numbers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """What the numbered blocks return while the context is open. Only for towers without `forward_intermediates`."""
    kept: dict[int, Tensor] = {}

    def keep(number: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            kept[number] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [blocks[number].register_forward_hook(keep(number)) for number in numbers]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
