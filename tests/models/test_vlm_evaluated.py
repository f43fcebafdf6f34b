"""Real, tiny models that write, through every task of an evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vlm_support import make_vlm

from cmapkd.data.open import open_source
from cmapkd.evaluation import SuiteConfig, evaluate_models

TASKS = ("answering", "yes_no", "perplexity", "token_agreement", "generation")


def scores_of(models: dict[str, Any], *tasks: str, batch_size: int) -> dict[str, dict[str, Any]]:
    settings = {
        "tasks": tasks,
        "limit": 2,
        "writing": {"batch_size": batch_size, "answer_tokens": 4},
        "generation": {"new_tokens": 5, "rounds": 3, "warmup": 0, "picture_size": 64},
    }
    source = open_source("scenes?length=4", split="val")
    return evaluate_models(models, source, SuiteConfig.from_mapping(settings), device="cpu")


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_every_task_reads_a_real_model_and_the_batch_changes_nothing(kind: str) -> None:
    teacher, student = make_vlm(kind), make_vlm(kind)
    draws = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draws))
    found = scores_of({"t": teacher, "s": student}, *TASKS, batch_size=8)
    scores = found["s"]
    assert scores.keys() >= set(TASKS)
    assert scores["scored"]["images"] == 2
    assert scores["answering"]["num_questions"] == scores["scored"]["questions"] >= 12
    assert scores["yes_no"]["by_category"]["existence"]["num_questions"] == 4
    assert scores["token_agreement"]["kl"] > 1e-4
    assert scores["perplexity"]["visual_gain"] != 0
    cost = scores["generation"]
    assert cost["image_tokens"] == {"llava": 16, "qwen2_5_vl": 4}[kind]
    assert cost["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4  # 2 layers, 2 heads of keys, 16 wide, float32
    assert cost["ratio"]["kv_bytes"] == 1
    one = scores_of({"s": student}, "answering", "yes_no", "perplexity", batch_size=1)["s"]
    assert one["answering"]["overall"] == scores["answering"]["overall"]
    assert one["answering"]["unended"] == scores["answering"]["unended"]
    margins = [each["yes_no"]["by_odds"]["mean_margin"] for each in (one, scores)]
    assert margins[0] == pytest.approx(margins[1], abs=1e-5)
    for name in ("bits_per_byte", "nll", "visual_gain"):
        assert one["perplexity"][name] == pytest.approx(scores["perplexity"][name], abs=1e-4)
