"""Every family as ONNX files in every precision: the model's embeddings, whatever the batch and the length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_support import EXPORTED, PRUNED, checked_here, made, model_of, scenes, write
from PIL import Image

from cmapkd.export.folder import file_hash
from cmapkd.export.layout import tokenizer_differences
from cmapkd.export.precision import PRECISIONS
from cmapkd.models import DualEncoder, build_model

pytestmark = pytest.mark.usefixtures("one_thread")
FIXED = {"timm, SigLIP", "hf SigLIP"}  # pool the last place, so they take texts of one length
MASKED = {"tiny", "joined", "parts"}


CASES = [pytest.param(name, marks=[pytest.mark.slow] if name == PRUNED else []) for name in EXPORTED]


@pytest.fixture(scope="module", params=CASES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name, model, folder and parity of a family, in every precision."""
    base = tmp_path_factory.mktemp("family")
    model = model_of(request.param, base)
    out = base / "out"
    with checked_here():
        parity = write(model, out, precisions=tuple(PRECISIONS), calibration=scenes("train", 40), accept_loss=60)
    return request.param, model, out, parity


def rows(parity: dict[str, Any], precision: str) -> list[dict[str, Any]]:
    return [row for row in parity["files"] if row["precision"] == precision]


def test_fp32_and_fp16_give_the_models_embeddings(exported: Any) -> None:
    _, _, _, parity = exported
    for row in rows(parity, "fp32"):
        assert row["cosine_min"] > 1 - 1e-9, row
        assert row["largest_error"] < 2e-5, row
    for row in rows(parity, "fp16"):
        assert row["cosine_min"] > 0.999, row


def test_int8_is_smaller_and_its_loss_is_stated(exported: Any) -> None:
    name, _, out, parity = exported
    table = {(row["precision"], row["tower"]): row for row in parity["files"]}
    assert len(table) == 8
    for precision in ("int8-weights", "int8-calibrated"):
        for row in rows(parity, precision):
            assert 0.4 < row["cosine_min"] < 1, (name, row)
            assert row["bytes"] == (out / row["file"]).stat().st_size
    assert min(row["cosine_min"] for row in rows(parity, "int8-weights")) > 0.98


def test_names_and_free_dimensions(exported: Any) -> None:
    name, model, out, _ = exported
    size = model.image_spec.size
    vision = onnxruntime.InferenceSession(out / "onnx" / "vision_model.onnx")
    text = onnxruntime.InferenceSession(out / "onnx" / "text_model.onnx")
    [image] = vision.get_inputs()
    assert (image.name, image.shape) == ("pixel_values", ["batch_size", 3, size, size])
    with pytest.raises(Exception, match=r"(?i)dimension"):
        vision.run(None, {"pixel_values": np.zeros((1, 3, size + 8, size + 8), np.float32)})
    [embeds] = vision.get_outputs()
    assert (embeds.name, embeds.shape) == ("image_embeds", ["batch_size", model.embed_dim])
    length = model.tokenizer.context_length if name in FIXED else "sequence_length"
    for given in text.get_inputs():
        assert given.shape == ["batch_size", length]
    assert [each.name for each in text.get_inputs()] == ["input_ids", "attention_mask"][: 1 + (name in MASKED)]
    [embeds] = text.get_outputs()
    assert (embeds.name, embeds.shape) == ("text_embeds", ["batch_size", model.embed_dim])
    if name in FIXED:
        ids = np.ones((1, model.tokenizer.context_length - 1), np.int64)
        with pytest.raises(Exception, match=r"(?i)dimension"):
            text.run(None, {"input_ids": ids})


def test_operations_that_some_runtimes_lack(exported: Any) -> None:
    """ArgMax over 64-bit numbers, and norms of vectors."""
    _, _, out, _ = exported
    for tower in ("vision_model", "text_model"):
        graph = onnx.shape_inference.infer_shapes(onnx.load(str(out / "onnx" / f"{tower}.onnx"))).graph
        kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input)}
        assert not {node.op_type for node in graph.node} & {"LpNormalization", "ReduceL2"}
        for node in graph.node:
            if node.op_type == "ArgMax":
                assert kinds[node.input[0]] == onnx.TensorProto.INT32


@torch.no_grad()
def test_the_folder_is_a_model_again(exported: Any) -> None:
    """`onnx:DIR@PRECISION`, through the folder's own tokenizer and preprocessing."""
    name, model, out, _ = exported
    texts = ["a red square", "a", " ".join(["red"] * 200)]
    pictures = [scenes()[index].image for index in range(3)]
    wanted = model.embed(images=pictures, texts=texts)
    for precision, far in (("fp32", 1e-6), ("fp16", 1e-4), ("int8", 0.02)):
        graphs = build_model(f"onnx:{out}@{precision}")
        found = graphs.embed(images=pictures, texts=texts)
        for own, theirs in ((wanted.images, found.images), (wanted.texts, found.texts)):
            assert own is not None
            assert theirs is not None
            assert float((own * theirs).sum(-1).min()) > 1 - far, (name, precision)
    assert graphs.image_spec == model.image_spec
    assert graphs.num_parameters() == model.num_parameters()
    assert graphs.log_logit_scale.item() == pytest.approx(model.log_logit_scale.item(), abs=1e-6)
    assert (graphs.logit_bias is None) == (model.logit_bias is None)


def test_files_name_no_place_on_this_machine_and_hold_their_preprocessing(exported: Any) -> None:
    _, model, out, _ = exported
    for path in out.rglob("*"):
        if path.is_file():
            held = path.read_bytes()
            for place in (str(Path(__file__).parents[2]), str(Path.home()) + "/", str(out.parent), "site-packages"):
                assert place.encode() not in held, path.name
    for path in (out / "onnx").glob("*.onnx"):
        graph = onnx.load(str(path))
        onnx.checker.check_model(graph, full_check=True)
        held = {entry.key: entry.value for entry in graph.metadata_props}
        assert json.loads(held["cmapkd.image_mean"]) == list(model.image_spec.mean), path.name
        assert json.loads(held["cmapkd.image_std"]) == list(model.image_spec.std)
        assert held["cmapkd.image_fit"] == model.image_spec.fit
        assert json.loads(held["cmapkd.context_length"]) == model.tokenizer.context_length
        assert float(held["cmapkd.logit_scale"]) == pytest.approx(model.log_logit_scale.exp().item())
        assert held["cmapkd.tokenizer_sha256"] == file_hash(out / "tokenizer.json")


def test_the_manifest_has_every_files_hash(exported: Any) -> None:
    _, _, out, _ = exported
    manifest = json.loads((out / "export.json").read_text())
    there = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} - {"export.json"}
    assert manifest["files"].keys() == there
    for name, entry in manifest["files"].items():
        assert entry == {"bytes": (out / name).stat().st_size, "sha256": file_hash(out / name)}
    assert json.loads((out / "calibration.json").read_text())["source"] == scenes("train", 40).name


def test_written_tokenizer_and_preprocessor_are_the_models(exported: Any) -> None:
    from transformers import AutoImageProcessor

    _, model, out, _ = exported
    texts = ["a red square", "A Red SQUARE, and a blue ball!", "a", " ".join(["red"] * 200)]
    assert tokenizer_differences(model, out, texts) == []
    spec = model.image_spec
    pixels = np.random.default_rng(0).integers(0, 256, (spec.size, spec.size, 3), dtype=np.uint8)
    processor = AutoImageProcessor.from_pretrained(str(out))
    [made] = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(made, spec(Image.fromarray(pixels)).numpy(), atol=2e-6)


def test_the_model_itself_is_left_as_it_was(exported: Any, tmp_path: Path) -> None:
    """A reference that was changed for the export would agree with a wrong file."""
    name, model, _, _ = exported
    fresh = made(name, tmp_path / "fresh")
    assert [type(module) for module in model.modules()] == [type(module) for module in fresh.modules()]
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))
    assert isinstance(model, DualEncoder)
