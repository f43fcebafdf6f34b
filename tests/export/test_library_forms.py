"""`--to transformers` and `--to open_clip`: the libraries load the folders without cmapkd, and give the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from export_support import FREE, ORIGIN, model_of
from PIL import Image

from cmapkd.export.library import export_library
from cmapkd.export.parity import Limits
from cmapkd.models import build_model

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["a red square", "a", "A Red SQUARE, and blue!", " ".join(["red"] * 200)]

ALONE = {
    "transformers": """
from transformers import AutoModel, AutoProcessor, CLIPTextModelWithProjection
model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
padding = "max_length" if model.config.model_type == "siglip" else True
inputs = processor(images=[picture], text=texts, padding=padding, truncation=True, return_tensors="pt")
with torch.no_grad():
    found = model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
image, text = found.image_embeds, found.text_embeds
if model.config.model_type == "clip":
    tower = CLIPTextModelWithProjection.from_pretrained(folder).eval()
    with torch.no_grad():
        alone = tower(input_ids=inputs["input_ids"]).text_embeds
    assert torch.allclose(F.normalize(alone, dim=-1), F.normalize(text, dim=-1), atol=1e-5)
""",
    "open_clip": """
import open_clip
model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
model.eval()
with torch.no_grad():
    image, text = model.encode_image(preprocess(picture)[None]), model.encode_text(tokenizer(texts))
""",
}
FRAME = """
import sys, json
sys.modules["cmapkd"] = None  # importing it is an error
import numpy as np, torch, torch.nn.functional as F
from PIL import Image
texts, answers = json.loads(sys.argv[1]), []
for place in sys.argv[2:]:
    folder, picture = place + "/out", Image.open(place + "/picture.png")
{body}
    answers.append([F.normalize(each, dim=-1).tolist() for each in (image, text)])
print(json.dumps(answers))
"""


def loaded_alone(form: str, places: Sequence[Path]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Embeddings of the picture and the texts by the models in `out` of each place, in one new process."""
    code = FRAME.format(body=indent(ALONE[form], "    "))
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(TEXTS), *map(str, places)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [(np.array(image), np.array(text)) for image, text in json.loads(done.stdout.splitlines()[-1])]


@pytest.mark.parametrize(
    ("form", "families"),
    [
        ("transformers", ("hf CLIP",)),
        ("open_clip", ("open_clip", "timm")),
        pytest.param("transformers", ("open_clip", "hf SigLIP"), marks=pytest.mark.slow),
        pytest.param("open_clip", ("open_clip RN50-like",), marks=pytest.mark.slow),
    ],
)
def test_the_library_loads_the_folder_without_us(form: Any, families: Sequence[str], tmp_path: Path) -> None:
    """Importing takes ten seconds, so one process loads the folders of several families."""
    models = {tmp_path / str(number): model_of(family, tmp_path) for number, family in enumerate(families)}
    pictures: list[Image.Image] = []
    for place, model in models.items():
        parity = export_library(model, place / "out", form=form, origin=ORIGIN, licence=FREE)
        assert min(row["cosine_min"] for row in parity["files"]) > 1 - 1e-6, place
        size = model.image_spec.size
        pixels = np.random.default_rng(1).integers(0, 256, (size, size, 3), dtype=np.uint8)
        pictures.append(Image.fromarray(pixels))
        pictures[-1].save(place / "picture.png")
    for model, picture, found in zip(models.values(), pictures, loaded_alone(form, [*models]), strict=True):
        with torch.no_grad():
            own_image = model.encode_image(model.image_spec(picture)[None]).embedding.numpy()
            own_text = torch.cat([model.encode_text(model.tokenizer([each])).embedding for each in TEXTS]).numpy()
        for own, theirs in zip((own_image, own_text), found, strict=True):
            unit = own / np.linalg.norm(own, axis=-1, keepdims=True)
            assert (unit * theirs).sum(-1).min() > 1 - 1e-6, model.name
    for out in (place / "out" for place in models):
        assert not (out / "cmapkd.json").exists()
        for path in out.rglob("*"):
            assert not path.is_file() or str(tmp_path).encode() not in path.read_bytes(), path.name


def test_the_converted_model_is_read_back_by_our_own_family(tmp_path: Path) -> None:
    model = model_of("open_clip", tmp_path)
    export_library(model, tmp_path / "out", form="transformers", origin=ORIGIN, licence=FREE)
    back = build_model(f"hf:{tmp_path / 'out'}")
    assert back.image_spec == model.image_spec
    assert back.log_logit_scale.item() == pytest.approx(model.log_logit_scale.item())
    assert torch.equal(back.tokenizer(["a red dog"]).ids[0], model.tokenizer(["a red dog"]).ids[0, :5])


@pytest.mark.parametrize(
    ("form", "family", "told"),
    [
        ("transformers", "open_clip RN50-like", r"its image tower is a ModifiedResNet.*--to onnx"),
        ("transformers", "timm", r"its image tower is a MobileNetV3.*--to onnx"),
        ("transformers", "tiny", r"is a TinyDualEncoder, which transformers has no form for"),
        ("transformers", "joined", r"is a JoinedEncoder, which transformers has no form for"),
        ("open_clip", "hf CLIP", r"is a HfModel, which open_clip has no form for"),
        ("open_clip", "timm, SigLIP", r"builds a timm tower at its own image size"),
        ("open_clip", "timm, transformers text", r"read text_cfg.hf_model_name from .* a place on this machine"),
    ],
)
def test_what_a_library_has_no_form_for(form: Any, family: str, told: str, tmp_path: Path) -> None:
    model = model_of(family, tmp_path)
    with pytest.raises(ValueError, match=told):
        export_library(model, tmp_path / "out", form=form, origin=ORIGIN, licence=FREE)
    assert not (tmp_path / "out").exists()


def test_a_wrong_conversion_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cmapkd.export import library

    def gelu_exchanged(model: Any) -> Any:
        clip = convert(model)
        clip.config.vision_config.hidden_act = clip.config.text_config.hidden_act = "quick_gelu"
        return clip

    convert = library.to_clip_model
    monkeypatch.setattr(library, "to_clip_model", gelu_exchanged)
    monkeypatch.setitem(library.LIMITS, "fp32", Limits(1 - 1e-7, 1e-4, 0.5))
    with pytest.raises(ValueError, match=r"the .* tower in transformers gives other embeddings"):
        export_library(model_of("open_clip", tmp_path), tmp_path / "out", form="transformers", origin=ORIGIN)
    assert not (tmp_path / "out").exists()


def test_the_card_is_read_by_the_hubs_own_reader(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    export_library(model_of("open_clip", tmp_path), tmp_path / "out", form="open_clip", origin=ORIGIN, licence=FREE)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "open_clip"
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert "tiny:scenes-teacher" in card.text
    assert yaml.safe_load(card.content.split("---")[1])["tags"] == ["clip", "cmapkd", "distillation"]
