"""A student's towers that do not learn answer from the cache: the same losses, without a look at any picture."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_support import losses
from PIL import Image
from rich.console import Console

import cmapkd
from cmapkd.config import ConfigError
from cmapkd.data.stored import StoredSource
from cmapkd.methods import METHODS
from cmapkd.models import ModelConfig, build_model, load_model
from cmapkd.models.adapted import AdaptedEncoder
from cmapkd.models.image_towers import VisualTower
from cmapkd.run.cached import student_from_cache
from cmapkd.training import trainer
from cmapkd.training.stopping import Interrupted

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from model_support import inputs
from test_parts_family import CONVOLUTIONAL, save_encoder

from helpers import CLASSES, MemorySource, make_method

CACHE = {"store": "fp32", "shard_mib": 0.01}
HEADS = ["projections", "scale"]
WORDS = ("red", "blue", "square", "circles", "triangle", "green")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Twenty pictures with two captions each, one of them damaged, and a BERT with dropout."""
    root = tmp_path_factory.mktemp("world")
    lines = ["filepath\ttitle"]
    for number in range(20):
        Image.effect_noise((40, 50), 20 + number).convert("RGB").save(root / f"{number}.png")
        lines += [f"{number}.png\ta {WORDS[number % 6]} {WORDS[number % 5]} {WORDS[number % 4]}"]
    (root / "7.png").write_bytes((root / "7.png").read_bytes()[:60])
    (root / "pairs.tsv").write_text("\n".join(lines) + "\n")
    torch.manual_seed(0)
    return {"data": f"csv:{root / 'pairs.tsv'}", "text": f"hf:{save_encoder('bert', root / 'bert')}"}


def settings(world: dict[str, Any], **changes: Any) -> dict[str, Any]:
    training = {"steps": 6, "batch_size": 8, "log_every": 1, "device": "cpu", "train_parts": HEADS}
    heads = changes.pop("heads", "mlp")
    views = {"num_views": 2} | ({} if heads == "mlp" else {"crop_scale": [1.0, 1.0]})  # each picture is answered once
    options = {"image": CONVOLUTIONAL, "text": world["text"], "image_head": heads, "text_head": heads, "embed_dim": 16}
    values: dict[str, Any] = {
        "student": {"name": "parts:small", "options": options},
        "data": {"train": world["data"], "views": views, "on_bad_sample": "skip", "max_bad_share": 1.0},
        "method": "contrastive",
        "optim": {"learning_rate": 0.01},
        "seed": 4,
    }
    values["training"] = training | changes.pop("training", {})
    return values | changes


@pytest.mark.filterwarnings("ignore::cmapkd.cache.CacheWarning")
@pytest.mark.parametrize(
    ("training", "heads"),
    [
        ({}, "mlp"),
        ({"train_parts": ["text", *HEADS]}, "mlp"),
        ({"micro_batch": 4}, "mlp"),
        ({"micro_batch": 4}, {"kind": "reader", "queries": 2, "heads": 2}),
        ({"train_parts": ["text", *HEADS]}, "reader"),
    ],
)
def test_the_same_losses_without_a_forward_pass(
    world: dict[str, Any],
    training: dict[str, Any],
    heads: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    # AdamW makes rounding of small gradients larger from step to step, the more the higher its rate is
    values = {"heads": heads, "training": training, "optim": {"learning_rate": 0.001}}
    cmapkd.distill(**settings(world, **values), out=tmp_path / "live", quiet=True)
    first = {**values, "training": {**training, "steps": 1}}
    cmapkd.distill(**settings(world, **first, cache=CACHE), out=tmp_path / "first")
    assert "of the student answer from" in capsys.readouterr().out.replace("\n", " ")
    encoded: list[int] = []
    read: list[int] = []
    passes, decode = VisualTower.forward, StoredSource.__getitem__

    def counted(self: VisualTower, pixels: torch.Tensor, *levels: Any) -> Any:
        encoded.append(len(pixels))
        return passes(self, pixels, *levels)

    def looked(self: StoredSource, index: int) -> Any:
        read.append(index)
        return decode(self, index)

    cmapkd.distill(**settings(world, **values, cache=CACHE), out=tmp_path / "cached", quiet=True)
    for mine, theirs in zip(losses(tmp_path / "cached"), losses(tmp_path / "live"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6, abs=1e-6)
    cached, live = load_model(tmp_path / "cached"), load_model(tmp_path / "live")
    torch.testing.assert_close(cached(inputs(live)).text.embedding, live(inputs(live)).text.embedding)
    monkeypatch.setattr(VisualTower, "forward", counted)
    monkeypatch.setattr(StoredSource, "__getitem__", looked)
    cmapkd.distill(**settings(world, **values, cache={**CACHE, "mode": "require"}), out=tmp_path / "b", quiet=True)
    # empty pictures that measure the width and, for readers, the tokens, one whose answer shows the layout, and the one
    # in the place of the damaged picture, which no plan foresees; with micro-batches once more in the backward pass
    assert sum(encoded) <= (4 if heads == "mlp" else 5)
    assert len({index for index in read if index > 0}) <= 2


def test_what_needs_a_tower_that_learns_is_refused(world: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = {"teacher": "tiny:scenes-teacher"}
    hints = {"name": "clip_kd", "hints": {"P4": 1.0, "L3": 1.0}}
    with pytest.raises(ConfigError, match=r"freezes the image tower of parts:small, but .* compares its levels blocks"):
        cmapkd.distill(**settings(world, **teacher, method=hints), out=tmp_path / "a", quiet=True)
    part = settings(world, **teacher, method=hints, training={"train_parts": ["image", *HEADS]})
    with pytest.raises(ConfigError, match="freezes the text tower of parts:small"):
        cmapkd.distill(**part, out=tmp_path / "b", quiet=True)
    heads = {"stages": [{"name": "heads", "share": 1.0, "train": ["text", *HEADS]}], "train_parts": None}
    with pytest.raises(ConfigError, match=r"no stage trains the image tower of parts:small, .* its levels blocks"):
        cmapkd.distill(**settings(world, **teacher, method=hints, training=heads), out=tmp_path / "c", quiet=True)


def test_a_method_that_needs_pictures_says_so(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    method = {"name": "clip_kd", "masked_weight": 1.0, "mask_patch": 16}
    values = settings(world, teacher="tiny:scenes-teacher", method=method, cache="auto", training={"steps": 1})
    cmapkd.distill(**values, out=tmp_path / "a")
    shown = " ".join(capsys.readouterr().out.split())
    assert "frozen towers answer live: its masked pictures are encoded anew in every step" in shown


def test_a_frozen_text_encoder_beside_a_tower_that_learns_says_so(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    training = {"steps": 1, "train_parts": ["image", *HEADS]}
    for cache, told in (("auto", True), ("off", False)):
        cmapkd.distill(**settings(world, cache=cache, training=training), out=tmp_path / cache)
        shown = " ".join(capsys.readouterr().out.split())
        assert ("answer live: the image tower learns, and answers of a text encoder alone are not" in shown) == told


def test_a_student_within_another_model_says_so(world: dict[str, Any]) -> None:
    options = {"image": {**CONVOLUTIONAL, "frozen": True}, "text": {"name": world["text"]}, "embed_dim": 16}
    student: Any = build_model(ModelConfig(name="parts:small", options=options))
    held = AdaptedEncoder(student, CLASSES.names, shots=1, hidden=2, share=0.5)
    config: Any = None  # which nobody reads where nothing is stored
    for name, told in (("contrastive", True), ("sgva_clip", False)):  # whose steps read the teacher's pictures alone
        method: Any = make_method("contrastive", student=held)
        method.encodes_student = METHODS[name].encodes_student  # type: ignore[attr-defined]
        console = Console(record=True, width=200, file=io.StringIO())
        assert student_from_cache(config, method, MemorySource([]), console) == {}
        assert ("answer live: parts:small is part of an adapted model here" in console.export_text()) == told


def test_a_text_reader_answers_live_where_there_are_further_texts(world: dict[str, Any]) -> None:
    options = {"image": CONVOLUTIONAL, "text": world["text"], "text_head": "reader", "embed_dim": 16}
    student: Any = build_model(ModelConfig(name="parts:small", options=options))
    for settings_of, told in (({}, False), ({"synthetic": True}, True)):
        method: Any = make_method("mobileclip", student=student, settings=settings_of)
        method.train_only(HEADS)
        assert ("a reader behind the text tower" in (method.why_student_live or "")) == told


# ------------------------------------------------------------------------------------------------ from the middle


@contextmanager
def asked_to_stop_at_once() -> Iterator[threading.Event]:
    event = threading.Event()
    event.set()
    yield event


@pytest.mark.filterwarnings("ignore::cmapkd.cache.CacheWarning")
def test_steps_begin_in_the_middle(world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Last blocks of a text encoder and of one of two image towers learn: the losses of live towers, and bit for bit
    the same after a stop, when these blocks have other weights, from the same cache and without a look at pictures."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    training = {"train_parts": None, "micro_batch": 4, "steps": 4}
    values = settings(world, heads="reader", training=training)
    towers = [{**CONVOLUTIONAL, "frozen": True}, {"name": "timm:test_resnet", "image_size": 64, "frozen_blocks": 2}]
    values["student"]["options"] |= {"image": towers, "text": {"name": world["text"], "frozen_blocks": 2}}
    cmapkd.distill(**values, out=tmp_path / "live", quiet=True)
    cmapkd.distill(**values, cache=CACHE, out=tmp_path / "cached", quiet=True)
    pairs = zip(losses(tmp_path / "cached"), losses(tmp_path / "live"), strict=True)
    for number, (mine, theirs) in enumerate(pairs):  # AdamW makes rounding of small gradients larger from step to step
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=(far := 1e-6 if number == 0 else 1e-5), abs=far)
    folder = tmp_path / "cached" / "student"
    assert json.loads((folder / "cmapkd.json").read_text())["options"]["frozen"] == {"image": [True, 2], "text": 2}
    read: list[int] = []
    decode = StoredSource.__getitem__

    def looked(self: StoredSource, index: int) -> Any:
        read.append(index)
        return decode(self, index)

    monkeypatch.setattr(StoredSource, "__getitem__", looked)
    values["cache"] = {**CACHE, "mode": "require"}
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "signals", asked_to_stop_at_once)
        with pytest.raises(Interrupted):
            cmapkd.distill(**values, out=tmp_path / "parts", quiet=True)
    cmapkd.distill(**values, out=tmp_path / "parts", quiet=True, resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "cached")
    cached, parts = (load_model(tmp_path / name).state_dict() for name in ("cached", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in cached.items())
    assert len({index for index in read if index > 0}) <= 2  # the one in the place of the damaged one, as above


@pytest.mark.filterwarnings("ignore::cmapkd.cache.CacheWarning")
def test_heads_may_learn_first_and_last(world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages that leave the last blocks out: a damaged picture is answered live; the folder says what was frozen."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    stages = [
        {"name": "heads", "share": 0.4, "train": HEADS},
        {"name": "all", "share": 0.2},
        {"name": "heads again", "share": 0.4, "train": HEADS},
    ]
    values = settings(world, training={"train_parts": None, "steps": 5, "stages": stages})
    blocks = {"name": "timm:test_resnet", "image_size": 64, "frozen_blocks": 2}
    values["student"]["options"] |= {"image": blocks, "text": {"name": world["text"], "frozen_blocks": 2}}
    cmapkd.distill(**values, out=tmp_path / "live", quiet=True)
    cmapkd.distill(**values, cache=CACHE, out=tmp_path / "cached", quiet=True)
    pairs = zip(losses(tmp_path / "cached"), losses(tmp_path / "live"), strict=True)
    for number, (mine, theirs) in enumerate(pairs):  # AdamW makes rounding of small gradients larger from step to step
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=(far := 1e-6 if number == 0 else 1e-5), abs=far)
    said = json.loads((tmp_path / "cached" / "student" / "cmapkd.json").read_text())["options"]["frozen"]
    assert said == {"image": 2, "text": 2}


@pytest.mark.filterwarnings("ignore::cmapkd.cache.CacheWarning")
def test_pictures_without_captions_are_read_from_the_stored_middle(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stream without captions, where the first blocks of both of the student's towers answer from a cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    values = settings(world, training={"train_parts": None, "steps": 3, "micro_batch": 3})
    blocks = {"name": "timm:test_resnet", "image_size": 64, "frozen_blocks": 2}
    values["student"]["options"] |= {"image": blocks, "text": {"name": world["text"], "frozen_blocks": 2}}
    stream = {"source": "scenes?length=12&size=32", "share": 0.25, "captions": "none"}
    values |= {"teacher": "tiny:scenes-teacher", "method": "clip_kd"}
    values["data"] = {**values["data"], "more": {"pictures": stream}}
    cmapkd.distill(**values, out=tmp_path / "live", quiet=True)
    cmapkd.distill(**values, cache=CACHE, out=tmp_path / "cached")
    assert "of the student answer from" in capsys.readouterr().out.replace("\n", " ")
    pairs = zip(losses(tmp_path / "cached"), losses(tmp_path / "live"), strict=True)
    for number, (mine, theirs) in enumerate(pairs):
        far = 1e-6 if number == 0 else 1e-5
        assert mine["terms/unpaired"] == pytest.approx(theirs["terms/unpaired"], rel=far, abs=far)
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=far, abs=far)
