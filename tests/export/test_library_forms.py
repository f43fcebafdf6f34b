"""`--to transformers` and `--to open_clip`: the libraries load the folders without cmapkd, and give the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
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
TRANSFORMERS = ("open_clip", "hf CLIP", "hf SigLIP")
OPEN_CLIP = ("open_clip", "open_clip RN50-like", "timm")

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
folder, texts = sys.argv[1], json.loads(sys.argv[2])
picture = Image.open(sys.argv[3])
{body}
print(json.dumps([F.normalize(each, dim=-1).tolist() for each in (image, text)]))
"""


def loaded_alone(form: str, out: Path, picture: Path) -> tuple[np.ndarray, np.ndarray]:
    code = FRAME.format(body=ALONE[form])
    done = subprocess.run(
        [sys.executable, "-c", code, str(out), json.dumps(TEXTS), str(picture)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    image, text = json.loads(done.stdout.splitlines()[-1])
    return np.array(image), np.array(text)


FAST = {("transformers", "hf CLIP"), ("open_clip", "open_clip"), ("open_clip", "timm")}  # importing takes ten seconds


@pytest.mark.parametrize(
    ("form", "family"),
    [
        pytest.param(form, name, marks=() if (form, name) in FAST else pytest.mark.slow)
        for form, names in (("transformers", TRANSFORMERS), ("open_clip", OPEN_CLIP))
        for name in names
    ],
)
def test_the_library_loads_the_folder_without_us(form: Any, family: str, tmp_path: Path) -> None:
    model = model_of(family, tmp_path)
    size = model.image_spec.size
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size, size, 3), dtype=np.uint8))
    picture.save(tmp_path / "picture.png")
    out = tmp_path / "out"
    parity = export_library(model, out, form=form, origin=ORIGIN, licence=FREE)
    assert min(row["cosine_min"] for row in parity["files"]) > 1 - 1e-6
    image, text = loaded_alone(form, out, tmp_path / "picture.png")
    with torch.no_grad():
        own_image = model.encode_image(model.image_spec(picture)[None]).embedding.numpy()
        own_text = torch.cat([model.encode_text(model.tokenizer([each])).embedding for each in TEXTS]).numpy()
    for own, theirs in ((own_image, image), (own_text, text)):
        unit = own / np.linalg.norm(own, axis=-1, keepdims=True)
        assert (unit * theirs).sum(-1).min() > 1 - 1e-6
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
