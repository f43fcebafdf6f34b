"""Where the levels, blocks and projections of an open_clip model are, whichever library its towers come from."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.models.block_hooks import block_hooks
from cmapkd.models.types import LAST, Level, LevelInfo, TowerFeatures

_STEMS = ("act1", "bn1", "conv_stem", "features.norm0")  # what timm calls the output before the first stage


def image_levels(visual: Any) -> dict[LevelInfo, int]:
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


def visual_features(
    visual: Any,
    images: Float[Tensor, "batch 3 height width"],
    levels: Sequence[str],
    indices: Mapping[LevelInfo, int],
    *,
    name: str,
) -> TowerFeatures:
    """What an image tower returns, and the named levels.

    Args:
        indices: of each level, as `image_levels` gives them. levels: at least one of them.
    """
    wanted, tokens = _wanted(levels, indices)
    output = visual.forward_intermediates(
        images, indices=wanted, output_fmt="NLC" if tokens else "NCHW", output_extra_tokens=tokens
    )
    values = dict(zip(wanted, output["image_intermediates"], strict=True))
    prefixes = dict(zip(wanted, output.get("image_intermediates_prefix", ()), strict=False))
    grid = grid_of(visual, images) if tokens else None
    return TowerFeatures(output["image_features"], _named(levels, indices, values, prefixes, grid, name))


def last_tokens(
    visual: Any,
    images: Float[Tensor, "batch 3 height width"],
    levels: Sequence[str],
    indices: Mapping[LevelInfo, int],
    *,
    name: str,
) -> TowerFeatures:
    """The named levels, and `LAST`: timm's features before they are pooled, of open_clip's own towers the last level.

    Nothing is pooled, so the embedding has width 0.

    Args:
        levels, indices: as of `visual_features`; there may be no level.
    Raises:
        ConfigError: the tower gives no tokens.
    """
    nothing = images.new_empty(images.shape[0], 0)
    if not hasattr(visual, "trunk"):
        deepest = max(indices, key=lambda info: indices[info]).name
        found = visual_features(visual, images, tuple(dict.fromkeys((*levels, deepest))), indices, name=name).levels
        return TowerFeatures(nothing, {**{level: found[level] for level in levels}, LAST: found[deepest]})
    trunk = visual.trunk
    if not levels:
        return TowerFeatures(nothing, {LAST: unpooled(trunk, trunk.forward_features(images), name)})
    wanted, tokens = _wanted(levels, indices)
    more = {"return_prefix_tokens": True} if tokens else {}
    final, found = trunk.forward_intermediates(images, indices=wanted, output_fmt="NLC" if tokens else "NCHW", **more)
    pairs = [each if isinstance(each, tuple) else (each, None) for each in found]
    values = {number: patches for number, (patches, _) in zip(wanted, pairs, strict=True)}
    prefixes = {number: prefix for number, (_, prefix) in zip(wanted, pairs, strict=True) if prefix is not None}
    grid = grid_of(visual, images) if tokens else None
    kept = _named(levels, indices, values, prefixes, grid, name)
    return TowerFeatures(nothing, {**kept, LAST: unpooled(trunk, final, name)})


def _wanted(levels: Sequence[str], indices: Mapping[LevelInfo, int]) -> tuple[list[int], bool]:
    """The indices to ask `forward_intermediates` for, and whether levels are tokens.

    The last one is always taken: open_clip 3.3's ModifiedResNet stops at the last index asked for, then pools.
    """
    asked = [info for info in indices if info.name in levels]
    return sorted({indices[info] for info in asked} | {max(indices.values())}), asked[0].layout == "tokens"


def _named(
    levels: Sequence[str],
    indices: Mapping[LevelInfo, int],
    values: Mapping[int, Tensor],
    prefixes: Mapping[int, Tensor],
    grid: tuple[int, int] | None,
    name: str,
) -> dict[str, Level]:
    """The levels by name, from what `forward_intermediates` gave by index; a grid where they are tokens."""
    numbers = {info.name: number for info, number in indices.items()}
    kept: dict[str, Level] = {}
    for level in levels:
        value = values[numbers[level]]
        if grid is not None:
            kept[level] = with_prefix(value, prefixes.get(numbers[level]), grid, name)
        else:
            kept[level] = Level(value, "map", grid=(value.shape[-2], value.shape[-1]))
    return kept


def unpooled(trunk: Any, features: Any, name: str) -> Level:
    """What a timm model pools, of the width that its classifiers expect: tokens, or a map of either layout.

    Raises:
        ConfigError: these are not its features, or one vector.
    """
    width, shape = trunk.num_features, tuple(features.shape) if isinstance(features, Tensor) else ()
    if len(shape) == 3 and shape[2] == width and shape[1] > 1:
        return Level(features, "tokens", num_prefix=int(getattr(trunk, "num_prefix_tokens", 0)))
    if len(shape) == 4 and shape[3] == width and (getattr(trunk, "output_fmt", "") == "NHWC" or shape[1] != width):
        return Level(features.permute(0, 3, 1, 2), "map", grid=(shape[1], shape[2]))
    if len(shape) == 4 and shape[1] == width:
        return Level(features, "map", grid=(shape[2], shape[3]))
    given = f"features of shape {shape[1:]}" if shape else "several features at once"
    raise ConfigError(
        f"{name} gives {given} before it pools and no tokens of width {width}, so a reader has nothing to attend over: "
        "set image_head to linear or mlp"
    )


def visual_blocks(visual: Any, levels: Sequence[LevelInfo]) -> tuple[nn.Module, ...]:
    """The blocks of an image tower that is a plain ViT, see `DualEncoder.image_blocks`; none of any other."""
    if any(level.layout != "tokens" for level in levels) or not levels:
        return ()
    if not hasattr(visual, "trunk"):
        return tuple(visual.transformer.resblocks) if visual.transformer.batch_first else ()
    positions_inside = any(getattr(visual.trunk, name, None) is not None for name in ("rope", "rel_pos_bias"))
    return () if positions_inside else tuple(visual.trunk.blocks)


def projected_tokens(visual: Any, level: Level, *, name: str) -> Float[Tensor, "batch tokens dim"]:
    """See `DualEncoder.tokens_in_joint_space`.

    Raises:
        ValueError: the tower gives a map, or pools by attention, which has no norm and projection of single tokens.
    """
    trunk, head = getattr(visual, "trunk", None), getattr(visual, "head", None)
    pools = getattr(visual if trunk is None else trunk, "attn_pool", None) is not None or hasattr(head, "pool")
    if level.layout != "tokens" or pools:
        why = "pools them by attention" if pools else "is no plain ViT"
        raise ValueError(f"{name} has no image tokens in the joint space: its image tower {why}")
    if trunk is None:
        x: Tensor = visual.ln_post(level.values)
        return x if visual.proj is None else x @ visual.proj
    for layer in ("norm", "fc_norm", "head"):
        x = getattr(trunk, layer, nn.Identity())(level.values if layer == "norm" else x)
    assert head is not None
    projected: Tensor = head(x)
    return projected


def grid_of(visual: Any, images: Tensor) -> tuple[int, int]:
    """Rows and columns of the patch tokens that a tower of tokens, or a timm model itself, makes of pictures."""
    height, width = images.shape[-2:]
    trunk = getattr(visual, "trunk", visual)
    if hasattr(trunk, "patch_embed"):
        rows, columns = trunk.patch_embed.dynamic_feat_size((height, width))
        return int(rows), int(columns)
    return height // visual.patch_size[0], width // visual.patch_size[1]


def blocks_by_level(visual: Any, indices: Mapping[LevelInfo, int]) -> list[nn.Module]:
    """The modules that return the levels, in the order of `indices`."""
    if hasattr(visual, "trunk"):
        return [visual.trunk.get_submodule(visual.trunk.feature_info[n]["module"]) for n in indices.values()]
    if hasattr(visual, "attnpool"):
        return [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
    return [*visual.transformer.resblocks]


def with_prefix(patches: Tensor, prefix: Tensor | None, grid: tuple[int, int], name: str) -> Level:
    if patches.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"{name} returned {patches.shape[1]} patch tokens for a grid of {grid[0]} x {grid[1]}: patch dropout is "
            "on, so its levels have no places. Set patch_dropout to 0, or use a method without image levels."
        )
    if prefix is None:
        return Level(patches, "tokens", grid=grid)
    return Level(torch.cat([prefix, patches], dim=1), "tokens", num_prefix=prefix.shape[1], grid=grid)


def projections(model: Any) -> Iterator[str]:
    """Names of the weights or modules that lead from the towers to the joint space, where a tower has one."""
    yield from ("visual.proj", "visual.attnpool.c_proj", "visual.head")  # ViT, ResNet, open_clip's head behind timm
    yield from ("text_projection", "text.text_projection", "text.proj")  # CLIP, CustomTextCLIP, a transformers tower
    trunk = getattr(model.visual, "trunk", None)
    if trunk is not None and trunk.num_classes > 0:  # timm's own classifier projects
        classifiers = trunk.get_classifier()  # two of a distilled one
        owners = {id(module) for module in (classifiers if isinstance(classifiers, tuple) else (classifiers,))}
        yield from (f"visual.trunk.{name}" for name, module in trunk.named_modules() if id(module) in owners)


def has_transformers_text(model: Any) -> bool:
    return hasattr(model, "text") and hasattr(model.text, "pooler")


def text_blocks(model: Any) -> Sequence[nn.Module]:
    if not has_transformers_text(model):
        blocks: Sequence[nn.Module] = getattr(model, "text", model).transformer.resblocks
        return blocks
    inner = model.text.transformer
    inner = getattr(inner, "encoder", inner)
    for attribute in ("layer", "layers", "block"):  # BERT and its kin; M2M-100; T5
        if hasattr(inner, attribute):
            layers: Sequence[nn.Module] = getattr(inner, attribute)
            return layers
    return ()


def embedding_of_tokens(model: Any) -> nn.Module:
    """What makes vectors of the ids of a text."""
    if has_transformers_text(model):
        table: nn.Module = model.text.transformer.get_input_embeddings()
        return table
    own: nn.Module = getattr(model, "text", model).token_embedding
    return own


def text_width(model: Any) -> int:
    if has_transformers_text(model):
        return int(model.text.config.hidden_size)
    return int(getattr(model, "text", model).transformer.width)


@contextmanager
def outputs_of(blocks: Sequence[nn.Module], numbers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """What the numbered blocks return while the context is open. Only for towers without `forward_intermediates`."""
    kept: dict[int, Tensor] = {}

    def keep(number: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            kept[number] = output[0] if isinstance(output, tuple) else output

        return hook

    with block_hooks({blocks[number]: keep(number) for number in numbers}):
        yield kept
