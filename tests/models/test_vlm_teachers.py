"""Teachers that write: in half precision, and those that nobody has trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vlm_support import MAKERS, TEXTS, chat, make_vlm

from cmapkd.config import ConfigError
from cmapkd.diagnosis.models import check_weights
from cmapkd.models import (
    Decoding,
    FrozenTeacher,
    ModelConfig,
    build_model,
    build_teacher,
    hf_family,
    hf_vlm_build,
    load_model,
)
from cmapkd.models.hf_vlm import HfVlm
from cmapkd.models.untrained import remark_on_untrained
from cmapkd.run.build import build_student
from cmapkd.run.config import RunConfig
from cmapkd.run.remarks import remarks_on_teachers


@pytest.fixture(params=MAKERS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    make_vlm(request.param).save(tmp_path)
    return tmp_path


@torch.no_grad()
def test_a_teacher_in_half_precision_answers_as_the_whole_one_does(folder: Path) -> None:
    whole = load_model(folder)
    half = build_teacher(ModelConfig(name=str(folder), dtype="bf16"))
    assert isinstance(whole, HfVlm)
    assert isinstance(half, HfVlm)
    assert {each.dtype for each in half.parameters()} == {torch.bfloat16}
    found, expected = half(chat(half)), whole(chat(whole))
    logits = half.logits(found.hidden["answer"].values)
    assert logits.dtype == torch.float32
    exact = whole.logits(expected.hidden["answer"].values)
    error = ((logits - exact).abs().mean() / exact.std()).detach()
    assert 0 < float(error) < 0.1, float(error)
    assert len(half.generate(chat(half), Decoding(max_new_tokens=2))) == 3


def test_a_student_in_half_precision_is_refused() -> None:
    student = {"name": "tiny_vlm:small", "dtype": "bf16"}
    values: dict[str, Any] = {"student": student, "method": {"name": "sft"}, "data": {"train": "scenes?length=4"}}
    values["training"] = {"steps": 2}
    config = RunConfig.from_mapping(values, where="this test")
    with pytest.raises(ConfigError, match=r"student.dtype is bf16, but weights that learn are kept in fp32"):
        build_student(config, None, {})  # type: ignore[arg-type]


def test_a_writer_that_nobody_has_trained_is_named(tmp_path: Path) -> None:
    model = build_model("tiny_vlm:small", captions=TEXTS * 3)
    said = [*remarks_on_teachers({"teacher": FrozenTeacher(model)})]
    assert [each[:50] for each in said] == ["teacher: tiny_vlm:small is untrained: its weights "]
    assert [each.level for each in check_weights("teacher", model, teaches=True)] == ["problem"]
    learner = build_model("tiny_vlm:small", captions=TEXTS * 3)  # a teacher's weights are frozen
    (finding,) = check_weights("student", learner, teaches=False)
    assert finding.level == "ok"
    assert "random in the vision, projector, embeddings and language: it learns" in finding.detail
    model.save(tmp_path)
    assert remark_on_untrained(load_model(tmp_path)) is None
    assert not [*remarks_on_teachers({"teacher": FrozenTeacher(load_model(tmp_path))})]
    scratch = build_model(ModelConfig(name=f"hf:{tmp_path}", init="scratch"))
    assert "untrained" in str(remark_on_untrained(scratch))
    assert remark_on_untrained(build_model(f"hf:{tmp_path}")) is None
    scratch.random_parts = ("projector",)  # type: ignore[assignment]
    assert str(remark_on_untrained(scratch)).startswith("the projector is untrained: its weights are random (hf:")


@pytest.mark.parametrize("kind", MAKERS)
def test_half_precision_is_read_from_the_start_and_is_the_same(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_vlm(kind).save(tmp_path)
    whole = build_model(f"hf:{tmp_path}")
    loaded = []

    def assemble(source: str, model: Any, *rest: Any, **more: Any) -> HfVlm:
        loaded.append({each.dtype for each in model.parameters()})
        return hf_vlm_build.assemble(source, model, *rest, **more)

    monkeypatch.setattr(hf_family, "assemble_vlm", assemble)
    half = build_model(ModelConfig(name=f"hf:{tmp_path}", dtype="bf16"))
    assert loaded == [{torch.bfloat16}]
    expected = {name: each.to(torch.bfloat16) for name, each in whole.named_parameters()}
    for name, each in half.named_parameters():
        assert torch.equal(each, expected[name]), name
    tables = dict(whole.named_buffers())
    for name, each in half.named_buffers():  # positions would lose digits
        assert torch.equal(each.float(), tables[name].to(each.dtype).float()), name
        assert each.dtype == tables[name].dtype or tables[name].numel() == 1, name


def test_models_that_write_need_a_new_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    with pytest.raises(ConfigError, match=r"need transformers 5 or newer. Installed is 4.57.1: pip"):
        build_model(f"hf:{folder}")
    with pytest.raises(ConfigError, match=r"tiny_vlm:small writes, and models that write need transformers 5"):
        build_model("tiny_vlm:small", captions=TEXTS)
