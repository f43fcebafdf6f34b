"""The largest student of a ladder whose weights and latency, measured on this machine, stay within a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cmapkd.config import ConfigError
from cmapkd.evaluation.efficiency import EfficiencyConfig, efficiency, weight_bytes
from cmapkd.models import DualEncoder, ModelConfig, build_model
from cmapkd.models.contracts import dual

LADDER: tuple[dict[str, Any], ...] = (
    {
        "name": "timm:mobilenetv3_small_050",
        "options": {"embed_dim": 128, "text_width": 64, "text_layers": 4, "text_heads": 2},
    },
    {
        "name": "timm:mobilenetv3_small_100",
        "options": {"embed_dim": 256, "text_width": 128, "text_layers": 4, "text_heads": 4},
    },
    {
        "name": "timm:mobilenetv3_large_100",
        "options": {"embed_dim": 256, "text_width": 192, "text_layers": 6, "text_heads": 3},
    },
    {
        "name": "timm:vit_tiny_patch16_224",
        "options": {"embed_dim": 256, "text_width": 256, "text_layers": 6, "text_heads": 4},
    },
    {
        "name": "timm:vit_small_patch16_224",
        "options": {"embed_dim": 384, "text_width": 384, "text_layers": 8, "text_heads": 6},
    },
    {"name": "open_clip:ViT-B-32"},
)
"""Students from small to large. The text tower is sized with the image tower: its table of words has 49,408 rows."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A student and what it costs here.

    Attributes:
        megabytes: of its weights in float32, both towers, in units of 10^6 bytes.
        image_ms, text_ms: median time from pixels, and from ids, to an embedding, one at a time.
        threads: of the processor that it was timed with.
    """

    student: dict[str, Any]
    megabytes: float
    image_ms: float
    text_ms: float
    threads: int


def choose_student(*, max_mb: float, max_ms: float | None, say: Callable[[str], None] = lambda _: None) -> Measured:
    """The largest student within both limits.

    Args:
        max_mb: of the weights in float32, both towers.
        max_ms: of one picture on this machine's processor; None: whatever it takes.
    Raises:
        ConfigError: not even the smallest one is; says what it takes.
    """
    light: list[tuple[dict[str, Any], DualEncoder, float]] = []
    for values in LADDER:
        say(f"building {values['name']}")
        model = dual(build_model(ModelConfig.from_mapping(values, where="student")), "cmapkd init")
        megabytes = weight_bytes(model)["fp32"] / 1e6
        if megabytes > max_mb:
            if not light:
                raise ConfigError(
                    f"the smallest student ({values['name']}) has {megabytes:.1f} MB of weights, more than --max-mb "
                    f"{max_mb:g}: allow more, or write a smaller one yourself (docs/models.md)"
                )
            break
        light.append((values, model, megabytes))
    for values, model, megabytes in reversed(light):  # timing takes the longest, so it ends with the first that fits
        say(f"timing {values['name']}")
        measured = measure(values, model, megabytes)
        if max_ms is None or measured.image_ms <= max_ms:
            return measured
    raise ConfigError(
        f"the smallest student ({values['name']}) takes {measured.image_ms:.1f} ms for a picture here, more than "
        f"--max-ms {max_ms:g}: allow more, or measure on the machine that it is for"
    )


def measure(values: dict[str, Any], model: DualEncoder, megabytes: float) -> Measured:
    """A model's latency, one sample at a time."""
    cost = efficiency({"student": model}, EfficiencyConfig(batch_size=2, rounds=7, warmup=1), device="cpu")["student"]
    image, text = (cost[tower]["latency_ms"]["1"]["median"] for tower in ("image", "text"))
    return Measured(values, megabytes, image, text, cost["threads"])
