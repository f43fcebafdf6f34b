"""Weight files as strangers' training scripts write them: what is taken out of them, and what is refused and how."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_support import inputs
from safetensors.torch import load_file, save_file
from test_hf_family import write as write_hf
from test_open_clip_family import CONFIGS, small, write
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.models import ModelConfig, build_model
from cmapkd.models.weight_files import read_weights

WEIGHTS = {"a.weight": torch.randn(2, 3), "b": torch.arange(3)}


def same(read: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return read.keys() == expected.keys() and all(torch.equal(read[key], value) for key, value in expected.items())


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in WEIGHTS.items()}


@pytest.mark.parametrize(
    "number",
    [np.float64(0.5), np.float32(0.5), np.int64(3), np.bool_(True), np.uint8(2), np.float16(1), np.str_("x")],
    ids=lambda number: type(number).__name__,
)
def test_numpy_numbers_beside_the_weights(number: Any, tmp_path: Path) -> None:
    torch.save({"epoch": 32, "name": "x", "state_dict": WEIGHTS, "best": number}, tmp_path / "t.pt")
    assert same(read_weights(tmp_path / "t.pt"), WEIGHTS)


def test_numbers_that_numpy_1_pickled(tmp_path: Path) -> None:
    torch.save(
        {"state_dict": WEIGHTS, "best": np.float64(0.5)}, tmp_path / "two.pt", _use_new_zipfile_serialization=False
    )
    data = (tmp_path / "two.pt").read_bytes()
    assert b"cnumpy._core.multiarray\n" in data
    (tmp_path / "one.pt").write_bytes(data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert same(read_weights(tmp_path / "one.pt"), WEIGHTS)


PREFIXES = ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module._orig_mod.")


@pytest.mark.parametrize("prefix", [*PREFIXES, "_fsdp_wrapped_module."])
@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "none", "safetensors"])
def test_wrappers_of_names_and_of_files(prefix: str, key: str, tmp_path: Path) -> None:
    path = tmp_path / ("w.safetensors" if key == "safetensors" else "w.pt")
    if key == "safetensors":
        save_file(prefixed(prefix), path)
    else:
        torch.save(prefixed(prefix) if key == "none" else {"epoch": 3, key: prefixed(prefix)}, path)
    assert same(read_weights(path), WEIGHTS)


def test_a_part_that_was_compiled_alone(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    model[1] = torch.compile(model[1])
    assert "1._orig_mod.weight" in model.state_dict()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    assert same(read_weights(tmp_path / "w.pt"), plain)


def test_names_that_are_no_wrappers_stay(tmp_path: Path) -> None:
    weights = {"visual.module.weight": torch.ones(1), "module": torch.ones(2)}
    torch.save(weights, tmp_path / "w.pt")
    assert same(read_weights(tmp_path / "w.pt"), weights)
    torch.save({"module.a": torch.ones(1), "a": torch.ones(1)}, tmp_path / "twice.pt")
    with pytest.raises(ValueError, match="has the same weight twice"):
        read_weights(tmp_path / "twice.pt")


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema"])
def test_the_moving_average_is_taken_when_it_is_asked_for(key: str, tmp_path: Path) -> None:
    average = {name: value + 1 for name, value in prefixed("module.").items()}
    torch.save({"state_dict": WEIGHTS, key: average}, tmp_path / "both.pt")
    assert same(read_weights(tmp_path / "both.pt"), WEIGHTS)
    expected = {name: value + 1 for name, value in WEIGHTS.items()}
    assert same(read_weights(tmp_path / "both.pt", averaged=True), expected)
    torch.save({key: average}, tmp_path / "alone.pt")
    with pytest.raises(ValueError, match=rf"no weights but their moving average \({key}\): set `weights: ema`"):
        read_weights(tmp_path / "alone.pt")
    torch.save({"state_dict": WEIGHTS}, tmp_path / "without.pt")
    with pytest.raises(ValueError, match=r"holds no moving average of its weights: .*the keys state_dict"):
        read_weights(tmp_path / "without.pt", averaged=True)


def test_torchs_own_averaged_model(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    torch.save({"model": averaged.state_dict()}, tmp_path / "w.pt")
    assert same(read_weights(tmp_path / "w.pt"), dict(model.state_dict()))


def test_moving_averages_in_a_recipe(tmp_path: Path) -> None:
    model = small("vit", tmp_path)
    average = {name: value * 1.5 for name, value in model.model.state_dict().items()}
    torch.save({"state_dict": model.model.state_dict(), "state_dict_ema": average}, tmp_path / "w.pt")
    name, batch = f"open_clip:{tmp_path / 'small.json'}", inputs(model)
    last, ema = (
        build_model(ModelConfig(name=name, checkpoint=tmp_path / "w.pt", weights=weights))
        for weights in ("last", "ema")
    )
    assert torch.equal(last(batch).image.embedding, model(batch).image.embedding)
    assert torch.equal(ema.model.visual.proj, average["visual.proj"])
    with pytest.raises(ConfigError, match="weights: ema says which weights of a checkpoint to take, but no checkpoint"):
        ModelConfig.from_mapping({"name": name, "weights": "ema"}, where="model")
    assert "weights" not in ModelConfig(name=name).model_dump()
    assert ModelConfig(name=name, checkpoint=tmp_path / "w.pt", weights="ema").model_dump()["weights"] == "ema"


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("this must never run",)


@pytest.mark.parametrize(
    ("content", "place", "what"),
    [
        ({"state_dict": WEIGHTS, "args": argparse.Namespace(lr=1)}, '["state_dict"]', r"argparse\.Namespace"),
        ({"model": prefixed("module."), "args": argparse.Namespace()}, '["model"]', r"argparse\.Namespace"),
        ({"model_state_dict": WEIGHTS, "path": Path("x")}, '["model_state_dict"]', r"pathlib\.PosixPath"),
        ({**WEIGHTS, "args": argparse.Namespace()}, "", r"argparse\.Namespace"),
        ({"model": nn.Linear(2, 3)}, '["model"].state_dict()', r"torch\.nn\.modules\.linear\.Linear"),
        (nn.Linear(2, 3), ".state_dict()", r"torch\.nn\.modules\.linear\.Linear"),
    ],
)
def test_other_objects_are_refused_with_the_line_that_converts_this_file(
    content: Any, place: str, what: str, tmp_path: Path
) -> None:
    path = tmp_path / "a run's file.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=rf"cannot be loaded safely .*holds Python objects \({what}") as caught:
        read_weights(path)
    line = str(caught.value).partition("as `checkpoint`: ")[2]
    assert f"weights_only=False){place};" in line
    if place == '["state_dict"]':
        subprocess.run(["bash", "-c", line.replace("python", sys.executable, 1)], check=True, timeout=120)
    else:  # as that shell reads it; a start of Python and torch for each file would take seconds
        python, option, code = shlex.split(line)
        assert (python, option) == ("python", "-c")
        exec(code, {})
    converted = path.with_suffix(".safetensors")
    names = {"weight", "bias"} if place.endswith("state_dict()") else set(WEIGHTS)
    assert read_weights(converted).keys() == names
    assert load_file(converted)


def test_nothing_in_a_refused_file_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": Harmful()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"holds Python objects \(builtins\.print\)"):
        read_weights(tmp_path / "w.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "w.pt").read_bytes()[:200])
    with pytest.raises(ValueError, match="is damaged, or no weight file"):
        read_weights(tmp_path / "cut.pt")
    torch.save({"state_dict": 3, "other": "x"}, tmp_path / "none.pt")
    with pytest.raises(ValueError, match="holds no plain state dict, but the keys state_dict, other"):
        read_weights(tmp_path / "none.pt")
    assert "must never run" not in capfd.readouterr().out


@pytest.mark.parametrize("kind", ["vit", "hf"])
def test_a_published_checkpoint_over_an_architecture(kind: str, tmp_path: Path) -> None:
    """As CLIP-KD's and LAION's: DDP, torch.compile, an epoch and a numpy score."""
    if kind == "hf":
        write_hf("clip", tmp_path / "hf")
        model, name = build_model(f"hf:{tmp_path / 'hf'}"), f"hf:{tmp_path / 'hf'}"
    else:
        model, name = small("vit", tmp_path), f"open_clip:{write(tmp_path, CONFIGS['vit'])}"
    weights = {f"module._orig_mod.{key}": value for key, value in model.model.state_dict().items()}
    torch.save({"epoch": 32, "state_dict": weights, "best": np.float64(0.5)}, tmp_path / "t.pt")
    loaded = build_model(ModelConfig(name=name, init="scratch", checkpoint=tmp_path / "t.pt"))
    batch = inputs(model)
    assert torch.equal(loaded(batch).image.embedding, model(batch).image.embedding)
    assert torch.equal(loaded(batch).text.embedding, model(batch).text.embedding)
    if kind == "vit":
        folder = tmp_path / "folder"
        model.save(folder)
        (folder / "open_clip_model.safetensors").unlink()
        torch.save({"state_dict": weights, "best": np.float64(0.5)}, folder / "open_clip_pytorch_model.bin")
        assert torch.equal(build_model(f"open_clip:{folder}")(batch).image.embedding, model(batch).image.embedding)


def test_names_and_sizes_that_open_clip_converts(tmp_path: Path) -> None:
    """Weights of the plain class in the custom one, a scale as a vector, other positions: as open_clip's own loader."""
    import open_clip

    plain = small("vit", tmp_path)
    weights = dict(plain.model.state_dict())
    weights["logit_scale"] = weights["logit_scale"].reshape(1)
    save_file(weights, tmp_path / "w.safetensors")
    config = {**CONFIGS["vit"], "custom_text": True, "vision_cfg": {**CONFIGS["vit"]["vision_cfg"], "image_size": 48}}
    ours = build_model(ModelConfig(name=f"open_clip:{write(tmp_path, config)}", checkpoint=tmp_path / "w.safetensors"))
    native = open_clip.CustomTextCLIP(**{key: value for key, value in config.items() if key != "custom_text"})
    open_clip.load_checkpoint(native, str(tmp_path / "w.safetensors"))
    assert re.match("Custom", type(ours.model).__name__)
    assert same(dict(ours.model.state_dict()), dict(native.state_dict()))
