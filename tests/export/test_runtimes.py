"""`--to openvino` and `--to executorch`: each file runs in its own runtime, and gives the model's embeddings."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from export_support import FREE, ORIGIN, model_of

from cmapkd.export import runtimes
from cmapkd.export.runtimes import RUNTIMES, export_runtime

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = {
    "openvino": ("hf CLIP", "tiny", "timm, SigLIP", "timm, transformers text", "open_clip RN50-like", "joined"),
    "executorch": ("hf CLIP", "tiny"),
}


def needs(form: str) -> Any:
    missing = [name for name in RUNTIMES[form].packages if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed: uv sync --extra {form}")


def cases(form: str, *fast: str) -> list[Any]:
    return [
        pytest.param(form, family, marks=[needs(form)] + ([] if family in fast else [pytest.mark.slow]))
        for family in FAMILIES[form]
    ]


@pytest.mark.parametrize(("form", "family"), [*cases("openvino", "hf CLIP"), *cases("executorch")])
def test_each_runtime_gives_the_models_embeddings(form: str, family: str, tmp_path: Path) -> None:
    model = model_of(family, tmp_path)
    parity = export_runtime(model, tmp_path / "out", form=form, origin=ORIGIN, licence=FREE)
    rows = [row for row in parity["files"] if row["precision"] == "fp32"]
    assert {row["tower"] for row in rows} == {"vision_model", "text_model"}
    assert min(row["cosine_min"] for row in rows) > 1 - 1e-6
    manifest = json.loads((tmp_path / "out" / "export.json").read_text())
    assert manifest["form"] == form
    assert form in manifest["exporter"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{form}/vision_model{RUNTIMES[form].suffix}" in card
    if form == "openvino":
        import openvino

        read = openvino.Core().read_model(tmp_path / "out" / "openvino" / "text_model.xml")
        held = read.get_rt_info(["cmapkd", "image_mean"]).astype(str)
        assert json.loads(held) == pytest.approx(list(model.image_spec.mean))
        chosen = {row["computed_in"] for row in parity["files"] if row["precision"] == "default"}
        assert len(chosen) == 1
        assert next(iter(chosen)) in ("f32", "bf16", "f16")


@needs("executorch")
@pytest.mark.slow
def test_an_operation_that_executorch_lacks_is_refused(tmp_path: Path) -> None:
    """timm's ViT resamples its positions."""
    model = model_of("timm, transformers text", tmp_path)
    with pytest.raises(ValueError, match=r"ExecuTorch cannot lower vision_model .*upsample_bicubic2d.*--to onnx"):
        export_runtime(model, tmp_path / "out", form="executorch", origin=ORIGIN, licence=FREE)
    assert not (tmp_path / "out").exists()


def test_a_conversion_that_embeds_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the runtime: ONNX files stand for its own, of towers whose last weights were changed."""
    from dataclasses import replace

    from cmapkd.export.program import write_graph

    def changed(graph: Any, path: Path, longest: int, told: Any) -> None:
        last = list(graph.module.model.parameters())[-1]
        last.data.add_(0.3)
        write_graph(graph, path, longest=longest, metadata=told)

    planted = replace(RUNTIMES["openvino"], convert=changed, packages=(), suffix=".onnx")
    monkeypatch.setitem(runtimes.RUNTIMES, "openvino", planted)
    with pytest.raises(ValueError, match=r"_model.onnx gives other embeddings than the model"):
        export_runtime(model_of("hf CLIP", tmp_path), tmp_path / "out", form="openvino", origin=ORIGIN, licence=FREE)
    assert not (tmp_path / "out").exists()
