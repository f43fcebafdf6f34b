"""Where transformers' image-text models that write keep their parts: one line for each `model_type`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from cmapkd.models.token_types import EncodedShape


@dataclass(frozen=True, slots=True)
class VlmLayout:
    """Paths inside `model.model`, and how pictures come in.

    Attributes:
        kind: transformers' class.
        vision: the vision tower.
        projector: what leads from it to the language model; may stand inside the tower.
        language: the language model, without its head.
        packed: whether patches of all pictures stand in one row, with their grids beside them (Qwen).
        nested: whether the model reads pictures with one more axis in front (Idefics3).
        shuffled: whether visual tokens are folded together in front of the projector (InternVL).
        windowed: whether vision blocks see the patches in another order (Qwen2.5-VL).
        width: where the vision config has the width of its blocks.
        picture_options: for the image processor at each call.
    """

    kind: str
    vision: str
    projector: tuple[str, ...]
    language: str = "language_model"
    packed: bool = False
    nested: bool = False
    windowed: bool = False
    shuffled: bool = False
    width: str = "hidden_size"
    picture_options: Mapping[str, Any] = field(default_factory=dict)


_TILES = ("vision_tower", ("multi_modal_projector",))
_NESTED = ("vision_model", ("connector",), "text_model")
_PACKED = ("visual", ("visual.merger", "visual.deepstack_merger_list"))

LAYOUTS: Mapping[str, VlmLayout] = {
    "llava": VlmLayout("LlavaForConditionalGeneration", *_TILES),
    "smolvlm": VlmLayout("SmolVLMForConditionalGeneration", *_NESTED, nested=True),
    "idefics3": VlmLayout("Idefics3ForConditionalGeneration", *_NESTED, nested=True),
    "qwen2_vl": VlmLayout("Qwen2VLForConditionalGeneration", *_PACKED, packed=True, width="embed_dim"),
    "qwen2_5_vl": VlmLayout("Qwen2_5_VLForConditionalGeneration", *_PACKED, packed=True, windowed=True),
    "qwen3_vl": VlmLayout("Qwen3VLForConditionalGeneration", *_PACKED, packed=True),
    # The processor's own default, to cut pictures into tiles, wins over the folder's settings: pictures are whole here.
    "internvl": VlmLayout(
        "InternVLForConditionalGeneration", *_TILES, shuffled=True, picture_options={"crop_to_patches": False}
    ),
    "gemma3": VlmLayout("Gemma3ForConditionalGeneration", *_TILES),
}


def blocks_of(tower: nn.Module) -> nn.ModuleList:
    """The blocks of a vision tower or language model, in their order.

    Raises:
        ValueError: there are none.
    """
    for name, module in tower.named_modules():
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in ("layers", "layer", "blocks"):
            return module
    raise ValueError(f"{type(tower).__name__} has no list of blocks")


def encoded_shape(layout: VlmLayout, config: Any, width: int) -> EncodedShape | None:
    """What the projector is given of a picture; None where patches of all pictures stand in one row.

    Args:
        config: of the whole model, as transformers has it.
        width: of the vision tower.
    """
    if layout.packed:
        return None
    sides = config.vision_config
    side, patch = (each if isinstance(each, int) else each[0] for each in (sides.image_size, sides.patch_size))
    folded = round(1 / config.downsample_ratio) ** 2 if layout.shuffled else 1
    layers = getattr(config, "vision_feature_layer", -1)  # of several, LLaVA's projector is given all
    return EncodedShape(
        (side // patch) ** 2 // folded, width * folded * (1 if isinstance(layers, int) else len(layers))
    )
