"""`--to transformers` and `--to open_clip`: a folder that the library loads without cmapkd, loaded so and compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import cmapkd
from cmapkd.data.open import open_source
from cmapkd.data.types import Source
from cmapkd.export.card import write_card
from cmapkd.export.clip_form import to_clip_model
from cmapkd.export.folder import refuse_existing, whole_folder, write_json, write_manifest
from cmapkd.export.layout import write_preprocessor, write_tokenizer
from cmapkd.export.licence import Licence, licence_of
from cmapkd.export.origin import Origin
from cmapkd.export.parity import LIMITS, Parity, compare, judge
from cmapkd.export.probes import Case, Probes, draw_probes
from cmapkd.models import DualEncoder
from cmapkd.models.base import eval_mode
from cmapkd.models.errors import first_line
from cmapkd.models.hf_model import HfModel
from cmapkd.models.open_clip_model import TEXT_CONFIG, OpenClipModel
from cmapkd.models.storage import DESCRIPTION

Form = Literal["transformers", "open_clip"]
Encoders = tuple[Callable[[Any], Tensor], Callable[[str], Tensor]]
"""A library's own path from a picture, and from a text, to embeddings [1, dim]."""


def export_library(
    model: DualEncoder,
    out: str | Path,
    *,
    form: Form,
    origin: Origin,
    licence: Licence | None = None,
    data: Source | None = None,
) -> dict[str, Any]:
    """Writes weights, config, tokenizer, preprocessor and card; then the library loads them, and is compared.

    Pictures and texts go through the library's own preprocessing and tokenizer, so both are compared too.

    Args:
        model: on the CPU; it is left as it was.
        out: a new folder.
        data: a source whose pictures and texts are compared; None: the built-in world's.
    Returns:
        What `parity.json` holds.
    Raises:
        ConfigError: `out` is there already.
        ValueError: the library has no form for this model, or gives other embeddings; nothing is left then.
    """
    out = Path(out)
    refuse_existing(out)
    licence = licence or licence_of(origin.teachers, None)
    probes = draw_probes(data if data is not None else open_source("scenes", split="val"))
    with eval_mode(model), whole_folder(out) as folder:
        (_write_transformers if form == "transformers" else _write_open_clip)(model, folder)
        encoders = (_load_transformers if form == "transformers" else _load_open_clip)(folder)
        rows = [{"tower": tower, **parity.plain()} for tower, parity in _compare(model, probes, encoders, form).items()]
        parity = {"files": rows, "scores": None, "library": form}
        write_json(folder / "parity.json", parity)
        write_card(model, folder, form=form, origin=origin, licence=licence)
        facts = {"exporter": {"cmapkd": cmapkd.__version__, "torch": torch.__version__}}
        write_manifest(folder, {**facts, "model": origin.name, "teachers": list(origin.teachers), "form": form})
    return parity


def _write_transformers(model: DualEncoder, folder: Path) -> None:
    if isinstance(model, HfModel):
        model.save(folder)
        (folder / DESCRIPTION).unlink()  # ours; it names the folder that the model came from
    elif isinstance(model, OpenClipModel):
        to_clip_model(model).save_pretrained(folder)
        write_preprocessor(model.image_spec, folder)
    else:
        raise ValueError(f"{model.name} is a {type(model).__name__}, which transformers has no form for: --to onnx")
    write_tokenizer(model, folder)


def _write_open_clip(model: DualEncoder, folder: Path) -> None:
    if not isinstance(model, OpenClipModel):
        raise ValueError(f"{model.name} is a {type(model).__name__}, which open_clip has no form for: --to onnx")
    if model.sizes is not None:
        raise ValueError(f"the towers of {model.name} were cut, and open_clip has no words for their sizes: --to onnx")
    if model.kept is not None:
        raise ValueError(
            f"{model.name} has its own vocabulary of {len(model.kept):,} tokens, and open_clip would read texts with "
            "the whole one: --to onnx"
        )
    for key in ("hf_model_name", "hf_tokenizer_name"):
        named = model.config["text_cfg"].get(key)
        if named and Path(str(named)).exists():
            raise ValueError(
                f"open_clip would read text_cfg.{key} from {named!r} wherever the folder is loaded, and that is a "
                "place on this machine: name a hub id in the model's config, or use --to onnx"
            )
    model.save(folder)
    (folder / DESCRIPTION).unlink()
    for file in (folder / TEXT_CONFIG).glob("*"):  # ours as well: open_clip asks the hub for it
        file.unlink()
    if (folder / TEXT_CONFIG).is_dir():
        (folder / TEXT_CONFIG).rmdir()


def _load_transformers(folder: Path) -> Encoders:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder, trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    padding = "max_length" if model.config.model_type == "siglip" else "longest"
    pixels = processor([_blank(processor)], return_tensors="pt")
    tokens = tokenizer(["a"], padding=padding, return_tensors="pt")

    def image(picture: Any) -> Tensor:
        own = processor([picture], return_tensors="pt")
        embeds: Tensor = model(input_ids=tokens["input_ids"], pixel_values=own["pixel_values"]).image_embeds
        return embeds

    def text(words: str) -> Tensor:
        own = tokenizer([words], padding=padding, truncation=True, return_tensors="pt")
        embeds: Tensor = model(input_ids=own["input_ids"], pixel_values=pixels["pixel_values"]).text_embeds
        return embeds

    return image, text


def _blank(processor: Any) -> np.ndarray:
    size = processor.size.get("height") or processor.size.get("shortest_edge")
    return np.zeros((int(size), int(size), 3), np.uint8)


def _load_open_clip(folder: Path) -> Encoders:
    import open_clip

    try:
        model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    except Exception as error:
        raise ValueError(
            f"open_clip cannot load this model from a folder ({type(error).__name__}: {first_line(error)}). It builds "
            "a timm tower at its own image size before it reads the weights. Use --to onnx"
        ) from error
    model.eval()
    return (
        lambda picture: model.encode_image(preprocess(picture)[None]),
        lambda words: model.encode_text(tokenizer([words])),
    )


def _compare(model: DualEncoder, probes: Probes, encoders: Encoders, form: str) -> dict[str, Parity]:
    """The library's embeddings beside the model's. Pictures come at the model's size: libraries resize differently."""
    size = model.image_spec.size
    pictures = [(name, picture.resize((size, size))) for name, picture in probes.pictures]
    texts = list(probes.texts)
    with torch.no_grad():
        pixels = torch.stack([model.image_spec(picture) for _, picture in pictures])
        own = {
            "image": model.encode_image(pixels).embedding,
            "text": torch.cat([model.encode_text(model.tokenizer([text])).embedding for _, text in texts]),
        }
        theirs = {
            "image": torch.cat([encoders[0](picture) for _, picture in pictures]),
            "text": torch.cat([encoders[1](text) for _, text in texts]),
        }
    found = {}
    for tower, items in (("image", pictures), ("text", texts)):
        # as unit vectors: transformers normalises, open_clip does not
        reference, answer = (F.normalize(each[tower], dim=-1).numpy() for each in (own, theirs))
        whole = Case(tower, {}, list(range(len(items))))
        names = [name for name, _ in items]
        found[tower] = compare(reference, [whole], {tower: answer}, names, f"the {tower} tower", 0.0)
        judge(f"the {tower} tower in {form}", "fp32", found[tower], LIMITS["fp32"])
    return found
