"""Cost: counts against arithmetic, the published pair, and timings in turns."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cmapkd.evaluation import efficiency as module
from cmapkd.evaluation.efficiency import (
    TEXTS,
    EfficiencyConfig,
    count_macs,
    efficiency,
    parameter_counts,
    peak_bytes,
    weight_bytes,
)
from cmapkd.models import build_model
from cmapkd.models.tiny import TinyDualEncoder

QUICK = EfficiencyConfig(batch_size=2, rounds=3, warmup=0)


def pixels(model: Any, batch: int = 1) -> torch.Tensor:
    return torch.zeros(batch, 3, model.image_spec.size, model.image_spec.size)


def test_parameters_fall_to_the_towers_that_use_them(model: TinyDualEncoder) -> None:
    counts = parameter_counts(model, pixels(model), model.tokenizer(TEXTS[:1]))
    own = {name: sum(p.numel() for p in part.parameters()) for name, part in (("i", model.vision), ("t", model.text))}
    assert counts == {
        "total": own["i"] + own["t"] + 1,
        "image": own["i"],
        "text": own["t"],
        "other": 1,  # the logit scale
        "shared": 0,
        "text_embedding": model.text.tokens.weight.numel(),
    }
    frozen = model.requires_grad_(False)
    assert parameter_counts(frozen, pixels(model), model.tokenizer(TEXTS[:1])) == counts
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_macs_are_the_arithmetic_of_the_tower(model: TinyDualEncoder) -> None:
    """16 px, patches of 8, width 32: stem, 1x1, one block on 5 tokens (attention written out), projection."""
    o = model.options
    stem, side, channels = 0, 16, 3
    for out in (o.stem_width, 2 * o.stem_width, 4 * o.stem_width):
        side //= 2
        stem += side * side * 9 * channels * out
        channels = out
    width, tokens = 32, side * side + 1
    block = tokens * (3 + 1 + 8) * width**2 + 2 * tokens**2 * width
    expected = stem + side * side * channels * width + block + width * o.embed_dim
    assert count_macs(model, lambda: model.encode_image(pixels(model))) == expected


def test_weight_bytes_are_those_of_the_file(model: TinyDualEncoder, tmp_path: Path) -> None:
    model.save(tmp_path)
    file = (tmp_path / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(file[:8], "little")
    assert weight_bytes(model) == {"fp32": len(file) - header, "fp16": (len(file) - header) // 2}


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    net = nn.Identity()
    given = torch.zeros(1000)

    def chain() -> torch.Tensor:
        x = given + 1  # 4 kB
        x = x * 2  # 4 kB more while the first is alive, then it goes
        x = x * 2
        return x.view(10, 100)  # no memory

    assert peak_bytes(net, [given], chain) == 4000 + 8000

    def keeping() -> list[torch.Tensor]:
        return [given + n for n in range(5)]

    assert peak_bytes(net, [given], keeping) == 4000 + 5 * 4000
    assert peak_bytes(nn.Linear(10, 10), [given], lambda: given.add_(1)) == 4000 + 440


def test_models_are_timed_in_turns(model: TinyDualEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Slow(TinyDualEncoder):
        def encode_image(self, images: torch.Tensor, levels: Any = ()) -> Any:
            order.append("slow")
            time.sleep(0.02)
            return super().encode_image(images, levels)

    class Quick(TinyDualEncoder):
        def encode_image(self, images: torch.Tensor, levels: Any = ()) -> Any:
            order.append("quick")
            return super().encode_image(images, levels)

    models = {"teacher": Slow(model.options, model.tokenizer), "student": Quick(model.options, model.tokenizer)}
    results = efficiency(models, QUICK, device="cpu")
    turns = [order[first : first + 4] for first in range(len(order) - 24, len(order), 4)]  # 3 rounds of 2 batches
    one, two = ["slow"] * 2 + ["quick"] * 2, ["quick"] * 2 + ["slow"] * 2  # an untimed call before each timed one
    assert all(turn in (one, two) for turn in turns)
    assert one in turns
    assert two in turns  # neither always comes first
    assert results["teacher"]["ratio"]["image_speed"] == {"1": 1.0, "2": 1.0}
    assert results["student"]["ratio"]["image_speed"]["1"] > 1.5
    assert results["student"]["ratio"]["parameters"] == results["student"]["ratio"]["image_macs"] == 1
    times = results["teacher"]["image"]["latency_ms"]["1"]
    assert times["q1"] <= times["median"] <= times["q3"]
    assert times["rounds"] == 3
    assert times["median"] >= 20
    assert results["student"]["image"]["flops"] == 2 * results["student"]["image"]["macs"]
    monkeypatch.setattr(module, "wait_for", lambda _: time.sleep(0.01))
    impatient = efficiency(models, EfficiencyConfig(batch_size=2, rounds=9, warmup=0, seconds=0.01), device="cpu")
    assert impatient["teacher"]["text"]["latency_ms"]["1"]["rounds"] == 3


# open_clip's docs/model_profile.csv, whose GFLOPs are 2 x GMACs: image and text, parameters (M) and GFLOPs
PUBLISHED = {
    "ViT-L-14": (303.97, 162.03, 123.65, 13.3),
    "ViT-B-16": (86.19, 35.13, 63.43, 5.96),
    "RN50": (38.32, 12.22, 63.69, 5.96),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_reference_pair_costs_what_is_published(name: str) -> None:
    model = build_model(f"open_clip:{name}")
    texts = model.tokenizer(TEXTS[:1])
    counts = parameter_counts(model, pixels(model), texts)
    image_millions, image_gflops, text_millions, text_gflops = PUBLISHED[name]
    assert counts["image"] / 1e6 == pytest.approx(image_millions, abs=0.01)
    assert counts["text"] / 1e6 == pytest.approx(text_millions, abs=0.01)
    assert counts["image"] + counts["text"] + counts["other"] == counts["total"]
    image = 2 * count_macs(model, lambda: model.encode_image(pixels(model)))
    text = 2 * count_macs(model, lambda: model.encode_text(texts))
    assert image / 1e9 == pytest.approx(image_gflops, rel=0.005)
    assert text / 1e9 == pytest.approx(text_gflops, rel=0.005)
