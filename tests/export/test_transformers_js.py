"""transformers.js under Node reads exported folders from disk, and embeds and ranks as the model does.

Needs Node and the package: `npm install --ignore-scripts @huggingface/transformers` beside pyproject.toml, or the
folder that holds `node_modules` in `CMAPKD_NODE`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_support import checked_here, model_of, scenes, write

from cmapkd.api import load
from cmapkd.models import DualEncoder

pytestmark = pytest.mark.usefixtures("one_thread")
HERE = Path(__file__).parent
TEXTS = ("a red square", "a", "two blue circles and a small green triangle", " ".join(["red"] * 200))
Exported = Callable[[str], tuple[DualEncoder, Path]]
DTYPES = {"fp32": 1e-5, "fp16": 1e-4, "int8": 0.05, "default": 1e-5}  # how far a cosine may be from 1


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the client and the package in it."""
    if shutil.which("node") is None:
        pytest.skip("Node is not installed")
    root = Path(os.environ.get("CMAPKD_NODE", HERE.parents[1])) / "node_modules"
    if not (root / "@huggingface" / "transformers").is_dir():
        pytest.skip(
            "@huggingface/transformers is not installed: npm install --ignore-scripts @huggingface/transformers"
        )
    place = tmp_path_factory.mktemp("node")
    shutil.copy(HERE / "client.mjs", place)
    (place / "node_modules").symlink_to(root.resolve())
    return place


@pytest.fixture(scope="module")
def exported(node: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A family's model and its folder, which is written once."""

    @cache
    def made(family: str) -> tuple[DualEncoder, Path]:
        place = tmp_path_factory.mktemp("exported")
        model = load("tiny:scenes-teacher") if family == "tiny" else model_of(family, place)
        with checked_here():
            write(model, place / "out", precisions=["fp16", "int8-weights"], accept_loss=10.0)
        return model, place / "out"

    return made


def ask(node: Path, folder: Path, **question: Any) -> dict[str, Any]:
    (node / "question.json").write_text(json.dumps(question))
    done = subprocess.run(
        ["node", str(node / "client.mjs"), str(folder), str(node / "question.json")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def units(rows: Any) -> np.ndarray:
    array = np.asarray(rows, np.float64)
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    "family",
    ["hf CLIP", "tiny"]
    + [
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("open_clip", "hf SigLIP", "timm", "timm, transformers text")
    ],
)
def test_node_gives_the_models_embeddings(node: Path, family: str, exported: Exported) -> None:
    model, out = exported(family)
    size = model.image_spec.size
    pictures = [scenes()[index].image.convert("RGB").resize((size, size)) for index in range(6)]
    for number, picture in enumerate(pictures):
        picture.save(node / f"{number}.png")
    files = [str(node / f"{number}.png") for number in range(len(pictures))]
    found = ask(node, out, texts=TEXTS, pictures=files, dtypes=list(DTYPES))
    with torch.no_grad():
        text = units(torch.cat([model.encode_text(model.tokenizer([each])).embedding for each in TEXTS]))
        image = units(model.encode_image(torch.stack([model.image_spec(each) for each in pictures])).embedding)
    tokens = [model.tokenizer([each]) for each in TEXTS]
    assert found["ids"][:3] == [each.ids[0][each.mask[0]].tolist() for each in tokens[:3]]
    for dtype, far in DTYPES.items():
        for name, own in (("text", text), ("image", image)):
            theirs = units(found[dtype][name])
            assert theirs.shape == own.shape
            assert 1 - (own * theirs).sum(-1).min() < far, (dtype, name)
    for dtype in ("fp32", "default"):
        ranks = np.argsort(-units(found[dtype]["text"]) @ units(found[dtype]["image"]).T, axis=1)
        np.testing.assert_array_equal(ranks, np.argsort(-text @ image.T, axis=1))


def test_a_dtype_without_a_file_is_an_error_that_names_it(node: Path, exported: Exported) -> None:
    _, out = exported("hf CLIP")
    (node / "question.json").write_text(json.dumps({"texts": ["a"], "pictures": [], "dtypes": ["q8"]}))
    done = subprocess.run(
        ["node", str(node / "client.mjs"), str(out), str(node / "question.json")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode != 0
    assert "text_model_quantized.onnx" in done.stderr
