"""Processors of published models that cannot be read, and what the error advises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor
from vlm_support import smolvlm

from cmapkd.models import ModelConfig, build_model


def test_a_processor_that_lacks_a_package_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = smolvlm()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)

    def published(*_: Any, **__: Any) -> Any:
        """What SmolVLM's files lead to; without its video processor, which these folders lack."""
        return SmolVLMProcessor(processor.image_processor, processor.tokenizer, None)

    with monkeypatch.context() as patched:
        patched.setattr("transformers.AutoProcessor.from_pretrained", published)
        with pytest.raises(ValueError, match=r"needs a package that is not installed: .*num2words") as caught:
            build_model(ModelConfig(name=f"hf:{tmp_path}"))
    assert "processor_config.json" not in str(caught.value)  # no file is missing
    (tmp_path / "processor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"no usable processor .* needs processor_config\.json"):
        build_model(ModelConfig(name=f"hf:{tmp_path}"))
