"""How a sentence encoder pools: what its folder or repository says, and what no text part can do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from model_support import offline
from test_parts_family import CONVOLUTIONAL, save_encoder

from cmapkd.config import ConfigError
from cmapkd.models import ModelConfig, build_model
from cmapkd.models.text_towers import _pooling_of

FLAGS = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
SAYS = "1_Pooling/config.json"


def say(folder: Path, text: str) -> Path:
    (folder / SAYS).parent.mkdir(parents=True, exist_ok=True)
    (folder / SAYS).write_text(text)
    return folder


def flags(*on: str) -> str:
    return json.dumps(
        {"word_embedding_dimension": 32, "include_prompt": True}
        | {f"pooling_mode_{name}": name in on for name in FLAGS}
    )


@pytest.mark.parametrize(
    ("text", "pooling"),
    [
        (flags("cls_token"), "class"),
        (flags("mean_tokens"), "mean"),
        (flags("lasttoken"), "end"),
        ('{"pooling_mode": "cls"}', "class"),
    ],
)
def test_a_folder_says_how_it_pools(text: str, pooling: str, tmp_path: Path) -> None:
    assert _pooling_of(str(say(tmp_path, text)), {}, "hf:it") == pooling


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (flags("max_tokens"), r"pools by \['max_tokens'\], which no text part does: set the option pooling"),
        (flags("cls_token", "mean_tokens"), r"pools by \['cls_token', 'mean_tokens'\]"),
        (flags(), "pools by nothing"),
        ("[]", "cannot be read"),
        ("{", "cannot be read"),
    ],
)
def test_other_poolings_are_refused_until_one_is_set(text: str, said: str, tmp_path: Path) -> None:
    folder = say(save_encoder("t5", tmp_path / "t5"), text)

    def build(**options: Any) -> Any:
        text_part = {"name": f"hf:{folder}", **options}
        return build_model(
            ModelConfig(name="parts:it", options={"image": CONVOLUTIONAL, "text": text_part, "embed_dim": 8})
        )

    with pytest.raises(ConfigError, match=said):
        build()
    assert build(pooling="end").text.pooling == "end"


def test_a_folder_without_that_file_pools_by_the_mean(tmp_path: Path) -> None:
    assert _pooling_of(str(tmp_path), {}, "hf:it") == "mean"


def test_a_repository_of_the_hub_is_asked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    commit = "0123456789012345678901234567890123456789"
    offline(monkeypatch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("bge", "plain", "halfway"):
        (tmp_path / f"models--somebody--{name}" / "refs").mkdir(parents=True)
        (tmp_path / f"models--somebody--{name}" / "refs" / "main").write_text(commit)
        (tmp_path / f"models--somebody--{name}" / "snapshots" / commit).mkdir(parents=True)
    say(tmp_path / "models--somebody--bge" / "snapshots" / commit, flags("cls_token"))
    absent = tmp_path / "models--somebody--plain" / ".no_exist" / commit / SAYS
    absent.parent.mkdir(parents=True)
    absent.touch()
    only_here = {"local_files_only": True}
    assert _pooling_of("somebody/bge", only_here, "hf:somebody/bge") == "class"
    assert _pooling_of("somebody/plain", only_here, "hf:somebody/plain") == "mean"
    with pytest.raises(ConfigError, match=r"hf:somebody/halfway: without a network there is no telling how it pools"):
        _pooling_of("somebody/halfway", only_here, "hf:somebody/halfway")
