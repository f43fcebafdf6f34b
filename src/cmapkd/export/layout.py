"""The files beside the graphs that transformers.js, and whoever reads the same layout, looks for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from cmapkd.export.folder import write_json
from cmapkd.export.narrow import Narrowed
from cmapkd.export.origin import without_folders
from cmapkd.export.towers import text_rules
from cmapkd.models import DualEncoder
from cmapkd.models.adapted import AdaptedEncoder
from cmapkd.models.hf_model import HfModel
from cmapkd.models.hf_tokenizer import HfTokenizer
from cmapkd.models.images import ImageSpec
from cmapkd.models.joined import JoinedEncoder
from cmapkd.models.onnx_family import GraphEncoder
from cmapkd.models.open_clip_model import OpenClipModel
from cmapkd.models.prompted import PromptedEncoder
from cmapkd.models.tiny import TinyDualEncoder

_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # PIL's numbers
_RENAMED = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}  # open_clip's: transformers'
_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""


def write_tokenizer(model: DualEncoder, folder: Path) -> None:
    """`tokenizer.json` and `tokenizer_config.json`, with the cleaning of texts and the longest length in them.

    Raises:
        ValueError: the model's tokenizer has no form that other tools read.
    """
    if isinstance(model, JoinedEncoder | Narrowed):
        write_tokenizer(model.text_model if isinstance(model, JoinedEncoder) else model.model, folder)
        return
    if isinstance(model, GraphEncoder):
        raise ValueError(f"{model.name} is a set of exported files already: export the model that they are of")
    if isinstance(model, PromptedEncoder):
        raise ValueError(
            f"{model.name} has learned vectors between the tokens of its texts, which no other tool leaves room for: "
            "export the model that was prompted, and take class vectors from cmapkd"
        )
    if isinstance(model, AdaptedEncoder):
        raise ValueError(
            f"{model.name} scores classes by pictures that it has seen, which an export has no room for: export the "
            "model that was adapted (`model` within its folder), and take class vectors from cmapkd"
        )
    longest = model.tokenizer.context_length
    if isinstance(model, TinyDualEncoder):
        model.tokenizer.save(folder)
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[START]", "eos_token": "[END]"}
        read = {"model_input_names": ["input_ids", "attention_mask"], "model_max_length": longest}
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names, **read})
        return
    canonical = False
    if isinstance(model.tokenizer, HfTokenizer):
        native = deepcopy(model.tokenizer.native)
        canonical = isinstance(model, HfModel) and model.model_type == "siglip"
    elif isinstance(model, OpenClipModel) and hasattr(model.tokenizer.native, "tokenizer"):
        native = deepcopy(model.tokenizer.native.tokenizer)
        canonical = "canonicalize" in getattr(model.tokenizer.native.clean_fn, "__name__", "")
    elif isinstance(model, OpenClipModel):
        native = _clip_tokenizer(model.tokenizer.native, longest)
    else:
        raise ValueError(f"the tokenizer of {model.name} has no form that transformers.js reads")
    if canonical:
        _clean_as_siglip(native)
    native.model_max_length = longest
    native.save_pretrained(folder)
    _without_paths(folder / "tokenizer_config.json")


def _clip_tokenizer(native: Any, longest: int) -> Any:
    """open_clip's own CLIP vocabulary as transformers' tokenizer; its repair of mojibake and HTML has no form there."""
    from transformers import CLIPTokenizer

    vocabulary = {_RENAMED.get(piece, piece): number for piece, number in native.encoder.items()}
    merges = sorted(native.bpe_ranks, key=native.bpe_ranks.get)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=longest)


def _clean_as_siglip(native: Any) -> None:
    """Puts the cleaning that our tokenizer does in Python into the file: lower case, no punctuation, single spaces."""
    from tokenizers import Regex, normalizers

    own = native.backend_tokenizer.normalizer
    steps = [
        normalizers.Replace("_", " "),
        normalizers.Replace(Regex(_PUNCTUATION), ""),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
    ]
    native.backend_tokenizer.normalizer = normalizers.Sequence([*steps, *([own] if own is not None else [])])


def _without_paths(path: Path) -> None:
    """Takes the folder that the tokenizer was read from out of its config."""
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {key: value for key, value in config.items() if key not in ("name_or_path", "tokenizer_file")})


def write_preprocessor(spec: ImageSpec, folder: Path) -> None:
    """`preprocessor_config.json` with this model's own numbers, and not its class's defaults."""
    square = {"height": spec.size, "width": spec.size}
    crop = spec.fit == "crop"
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor" if crop else "SiglipImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": spec.size} if crop else square,
            "resample": _FILTERS[spec.interpolation],
            "do_center_crop": crop,
            **({"crop_size": square} if crop else {}),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(spec.mean),
            "image_std": list(spec.std),
        },
    )


def write_config(model: DualEncoder, folder: Path) -> None:
    """`config.json`: the kind of model, its sizes, and the files that transformers.js loads when nobody names any."""
    kind = "clip" if model.logit_bias is None else "siglip"
    name = "CLIPModel" if kind == "clip" else "SiglipModel"
    text: dict[str, Any] = {"max_position_embeddings": model.tokenizer.context_length}
    text |= {"vocab_size": model.tokenizer.vocab_size, "projection_dim": model.embed_dim}
    text |= {"bos_token_id": None, "eos_token_id": text_rules(model).end_id, "pad_token_id": None}  # not CLIP's own
    vision = {"image_size": model.image_spec.size, "projection_dim": model.embed_dim}
    write_json(
        folder / "config.json",
        {
            "architectures": [name],
            "model_type": kind,
            "projection_dim": model.embed_dim,
            "logit_scale_init_value": model.log_logit_scale.item(),
            "text_config": {"model_type": f"{kind}_text_model", **text},
            "vision_config": {"model_type": f"{kind}_vision_model", **vision},
            "transformers.js_config": {"dtype": {"vision_model": "fp32", "text_model": "fp32"}},
        },
    )


def metadata_of(model: DualEncoder, *, tower: str, teachers: Sequence[str], more: dict[str, str]) -> dict[str, str]:
    """What a user of the file alone must know, as text: preprocessing, lengths, scale and bias, teachers."""
    spec = model.image_spec
    values = {
        "format": 1,
        "tower": tower,
        "model": without_folders(model.name),
        "teachers": list(teachers),
        "image_size": spec.size,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        "image_interpolation": spec.interpolation,
        "image_fit": spec.fit,
        "context_length": model.tokenizer.context_length,
        "embed_dim": model.embed_dim,
        "normalized": False,
        "logit_scale": model.log_logit_scale.exp().item(),
        "logit_bias": None if model.logit_bias is None else model.logit_bias.item(),
    }
    told = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    return {f"cmapkd.{key}": value for key, value in {**told, **more}.items()}


def tokenizer_differences(model: DualEncoder, folder: Path, texts: Sequence[str]) -> list[str]:
    """Those of `texts` that the written tokenizer turns into other ids than the model's own does."""
    from transformers import AutoTokenizer

    written = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    different = []
    for text in dict.fromkeys(texts):
        tokens = model.tokenizer([text])
        own = tokens.ids[0][tokens.mask[0]].tolist()
        theirs = written(text, truncation=True, max_length=model.tokenizer.context_length)["input_ids"]
        if own != theirs:
            different.append(text)
    return different
