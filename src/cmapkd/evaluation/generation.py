"""What writing costs: time until the first token and for each further one, memory of the cache, visual tokens."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from cmapkd.config import Config
from cmapkd.data.dialogues import ChatInput, Turn, join_items
from cmapkd.evaluation.efficiency import median_and_quartiles, peak_bytes, wait_for
from cmapkd.models.generative import Decoding, GenerativeModel
from cmapkd.models.texts import evaluating

PROMPT = "Describe the picture in detail."


class WritingCostConfig(Config):
    """At which sizes the cost of writing is measured, and how long."""

    batch_size: int = Field(1, ge=1, description="Dialogues written at once.")
    new_tokens: int = Field(32, ge=2, description="Tokens of each answer; none ends before.")
    picture_size: int = Field(336, ge=16, description="Pixels of each side of the picture.")
    rounds: int = Field(9, ge=3, description="Timings of each model, in turns; the median is reported.")
    warmup: int = Field(1, ge=0, description="Untimed rounds before the first.")
    seconds: float = Field(
        120, gt=0, description="Timing stops after the round in which this is reached, with at least 3 rounds."
    )


def writing_costs(
    models: Mapping[str, GenerativeModel],
    config: WritingCostConfig | None = None,
    *,
    device: torch.device | str,
    autocast: torch.dtype | None = None,
) -> dict[str, dict[str, Any]]:
    """The cost of writing of each model, and its ratios to the first, which is the reference.

    Every model gets the same picture and prompt through its own processor, and writes answers of the same number of
    tokens. Decoding files, resizing and tokenising are not included. Each round times every model twice: one token
    (`prefill`, vision and prompt included), and all of them. The difference is the time of the further tokens.

    Returns:
        For each model `prefill_ms` a batch and `tokens_per_second` of the batch (median and quartiles over rounds);
        `image_tokens` of the picture, `prompt_tokens` with them; `kv_bytes_per_token`, `state_bytes` of linear
        layers whatever the length, and `kv_bytes` of one dialogue with its answer, both together (None where the model
        does not tell its `cache_shape`); `peak_bytes` of weights and all that is
        alive while the batch is written; `ratio` to the first model (`prefill_speed`, `decode_speed`, `kv_bytes`); and
        the settings.
    Raises:
        ValueError: a model ended an answer before the fixed number of tokens.
    """
    config, device = config or WritingCostConfig(), torch.device(device)
    inputs = {name: _inputs(model, config).to(device) for name, model in models.items()}
    results: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        with evaluating(model, device, autocast):
            results[name] = _examine(model, inputs[name], config)
    seconds = _time_in_turns(models, inputs, config, device, autocast)
    reference = next(iter(models))
    for name, result in results.items():
        first, whole = (torch.tensor(times, dtype=torch.float64) for times in seconds[name])
        result["prefill_ms"] = median_and_quartiles((1000 * first).tolist())
        speeds = config.batch_size * (config.new_tokens - 1) / (whole - first)
        counted = speeds[whole > first]  # a clock may stumble over a tiny model
        result["tokens_per_second"] = median_and_quartiles(counted.tolist()) if len(counted) else None
    for result in results.values():
        result["ratio"] = _ratios(result, results[reference])
    return results


def _inputs(model: GenerativeModel, config: WritingCostConfig) -> ChatInput:
    """The same dialogue for every row. The picture is noise: a blank one is dropped by some processors."""
    side = config.picture_size
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))
    dialogue = (Turn("user", PROMPT, pictures=1), Turn("assistant", "yes"))
    items = [model.processor.read(dialogue, [picture]) for _ in range(config.batch_size)]
    return join_items(items, model.processor.pad_id).prompts()


def _examine(model: GenerativeModel, inputs: ChatInput, config: WritingCostConfig) -> dict[str, Any]:
    """Everything that needs no clock."""
    length = inputs.texts.ids.shape[1]
    shape, width = model.cache_shape, _bytes_per_number(model, inputs.texts.ids.device.type)
    per_token, state = (None, None) if shape is None else (shape.num_bytes(width), shape.state_bytes(width))
    tensors = [inputs.texts.ids, inputs.texts.mask, *inputs.pictures.values()]
    written: list[list[list[int]]] = []
    peak = peak_bytes(model, tensors, lambda: written.append(_write(model, inputs, config.new_tokens)))
    if short := [len(answer) for answer in written[0] if len(answer) != config.new_tokens]:
        raise ValueError(
            f"{model.name} wrote {short[0]} tokens where {config.new_tokens} were asked for: its `generate` must keep "
            "`Decoding.min_new_tokens`, or its speed cannot be measured."
        )
    return {
        "image_tokens": int(inputs.visual[0].sum()),
        "prompt_tokens": length,
        "kv_bytes_per_token": per_token,
        "state_bytes": state,
        "kv_bytes": None if per_token is None or state is None else state + per_token * (length + config.new_tokens),
        "peak_bytes": peak,
        "batch_size": config.batch_size,
        "new_tokens": config.new_tokens,
        "picture_size": config.picture_size,
        "threads": torch.get_num_threads(),
    }


def _bytes_per_number(model: GenerativeModel, kind: str) -> int:
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind).itemsize
    return next(p.dtype.itemsize for p in model.parameters() if p.is_floating_point())


def _write(model: GenerativeModel, inputs: ChatInput, tokens: int) -> list[list[int]]:
    return model.generate(inputs, Decoding(max_new_tokens=tokens, min_new_tokens=tokens))


def _time_in_turns(
    models: Mapping[str, GenerativeModel],
    inputs: Mapping[str, ChatInput],
    config: WritingCostConfig,
    device: torch.device,
    autocast: torch.dtype | None,
) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds for one token, and for all tokens, of every model in every round."""
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in models}

    def timed(name: str, tokens: int) -> float:
        wait_for(device)
        start = time.perf_counter()
        _write(models[name], inputs[name], tokens)
        wait_for(device)
        return time.perf_counter() - start

    began = time.perf_counter()
    for turn in range(-config.warmup, config.rounds):
        if turn >= 3 and time.perf_counter() - began > config.seconds:
            break
        for name, model in models.items():
            with evaluating(model, device, autocast):
                taken = [timed(name, tokens) for tokens in (1, config.new_tokens)]
            if turn >= 0:
                for times, each in zip(seconds[name], taken, strict=True):
                    times.append(each)
    return seconds


def _ratios(result: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, float | None]:
    """Speeds as multiples of the reference's, the cache as a fraction of it."""

    def of(value: float | None, other: float | None) -> float | None:
        return value / other if value is not None and other else None

    def median(scores: Mapping[str, Any], name: str) -> float | None:
        return None if scores[name] is None else float(scores[name]["median"])

    return {
        "prefill_speed": of(median(reference, "prefill_ms"), median(result, "prefill_ms")),
        "decode_speed": of(median(result, "tokens_per_second"), median(reference, "tokens_per_second")),
        "kv_bytes": of(result["kv_bytes"], reference["kv_bytes"]),
    }
