"""Probes under the trainer: exact resume, reuse, what is checkpointed, and that encoder and random state stay."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cmapkd.config import ConfigError
from cmapkd.data.plans import PlanSampler
from cmapkd.data.scenes.source import ScenesSource
from cmapkd.data.types import Source
from cmapkd.evaluation.config import SuiteConfig
from cmapkd.evaluation.probes.config import ProbeConfig
from cmapkd.evaluation.probes.data import ProbeBatches, read_annotations
from cmapkd.evaluation.probes.features import encode_images, patch_level, whole_picture
from cmapkd.evaluation.probes.fusion import FusionHead
from cmapkd.evaluation.probes.probe import Probe
from cmapkd.evaluation.probes.train import train_probe, weights_digest
from cmapkd.evaluation.subject import Bench, Subject
from cmapkd.evaluation.tasks import make_task
from cmapkd.models.base import DualEncoder
from cmapkd.models.tiny import TinyDualEncoder, TinyOptions
from cmapkd.models.vocabulary import TrainedTokenizer

SMALL = {"steps": 6, "batch_size": 4, "width": 32, "depth": 1, "warmup_steps": 2}


@pytest.fixture(scope="module")
def encoder() -> TinyDualEncoder:
    options = TinyOptions(
        image_size=32,
        patch_size=8,
        stem_width=4,
        vision_width=32,
        vision_depth=2,
        text_width=32,
        text_depth=1,
        embed_dim=16,
    )
    source = ScenesSource("train", size=32, length=20)
    texts = [caption for index in range(20) for caption in source.captions(index)]
    torch.manual_seed(0)
    return TinyDualEncoder(options, TrainedTokenizer.train(texts, vocab_size=200, context_length=24)).eval()


def subject(encoder: DualEncoder, work: Path | None, **settings: Any) -> Subject:
    values = {"probes": {"samples": 12}, "vqa": SMALL, "captioning": SMALL, "detection": SMALL, **settings}
    config = SuiteConfig.from_mapping(values)
    train, scored = ScenesSource("train", size=32), ScenesSource("val", size=32, length=6)
    return Subject("m", encoder, Bench(config, torch.device("cpu"), scored, train, work))


def scored(task: str, of: Subject) -> dict[str, Any]:
    return make_task(task, of.bench.config).score(of)


def digest(folder: Path) -> dict[str, str]:
    """Of every file of the latest checkpoint but the clock's."""
    last = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in last.glob("*.safetensors")}


@pytest.mark.parametrize("fine_tune", [False, True])
@pytest.mark.parametrize("task", ["vqa", "detection"])
def test_an_interrupted_probe_ends_bit_identical(
    encoder: TinyDualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, fine_tune: bool
) -> None:
    settings = {task: {**SMALL, "fine_tune": fine_tune}}
    before = weights_digest(encoder)
    whole = scored(task, subject(encoder, tmp_path / "whole", **settings))
    made = ProbeBatches.__getitem__

    def broken(self: ProbeBatches, plan: Any) -> Any:
        if plan.step == 4:
            raise KeyboardInterrupt
        return made(self, plan)

    monkeypatch.setattr(ProbeBatches, "__getitem__", broken)
    with pytest.raises(KeyboardInterrupt):
        scored(task, subject(encoder, tmp_path / "cut", **settings))
    monkeypatch.setattr(ProbeBatches, "__getitem__", made)
    steps: list[int] = []

    def counted(self: ProbeBatches, plan: Any) -> Any:
        steps.append(plan.step)
        return made(self, plan)

    monkeypatch.setattr(ProbeBatches, "__getitem__", counted)
    resumed = scored(task, subject(encoder, tmp_path / "cut", **settings))
    assert steps == [4, 5]  # and not from the beginning
    assert digest(tmp_path / "whole" / "m" / task) == digest(tmp_path / "cut" / "m" / task)
    assert resumed == whole
    steps.clear()
    assert scored(task, subject(encoder, tmp_path / "cut", **settings)) == whole
    assert not steps  # a finished probe is reused
    assert weights_digest(encoder) == before  # a fine-tuned encoder is a copy
    assert not any(module.training for module in encoder.modules())


def test_a_checkpoint_holds_the_head_and_not_the_frozen_encoder(encoder: TinyDualEncoder, tmp_path: Path) -> None:
    scored("vqa", subject(encoder, tmp_path / "a"))
    scored("vqa", subject(encoder, tmp_path / "b", vqa={**SMALL, "fine_tune": True}))
    for folder, expected in (("a", {"head"}), ("b", {"head", "student"})):
        last = sorted((tmp_path / folder / "m/vqa/checkpoints").glob("step-*"))[-1]
        assert {name.partition(".")[0] for name in load_file(last / "method.safetensors")} == expected


def test_a_folder_of_another_probe_is_refused(encoder: TinyDualEncoder, tmp_path: Path) -> None:
    scored("vqa", subject(encoder, tmp_path))
    with pytest.raises(ConfigError, match=r"with other settings: samples .was 12, now 11"):
        scored("vqa", subject(encoder, tmp_path, probes={"samples": 11}))
    other = TinyDualEncoder(encoder.options, encoder.tokenizer).eval()
    with pytest.raises(ConfigError, match="with other settings: model"):
        scored("vqa", subject(other, tmp_path))


def test_training_leaves_the_random_state_and_nothing_on_disk(encoder: TinyDualEncoder, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = scored("vqa", subject(encoder, None))
    assert torch.equal(torch.rand(3), expected)
    assert scored("vqa", subject(encoder, None)) == first  # the seed decides, not what came before
    assert not list(tmp_path.iterdir())


def test_stored_and_live_features_are_the_same(encoder: TinyDualEncoder) -> None:
    source: Source = ScenesSource("train", size=32, length=8)
    notes = read_annotations(source)
    features = encode_images(encoder, source, notes.indices, batch_size=3, device="cpu", memory=1.0)
    assert features.grid == (4, 4)
    head = FusionHead(patch_width=32, embed_dim=16, cells=16, text_width=32, answers=2, width=32, depth=1)
    probe = Probe(encoder, head, fine_tune=False)
    rows, none = torch.arange(8), {"targets": lambda _e, _p: {}}
    stored = ProbeBatches(rows, **none, ids=notes.ids, features=features)
    live = ProbeBatches(rows, **none, ids=notes.ids, model=encoder, pictures=source, indices=notes.indices)
    plan = PlanSampler(8, batch_size=5, seed=0, start=0, stop=1).plan(0)
    a, b = stored[plan], live[plan]
    assert a.ids == b.ids
    inputs = probe._encode(b)
    torch.testing.assert_close(inputs.patches, a.extra["patches"].float(), atol=2e-3, rtol=2e-3)  # half precision
    torch.testing.assert_close(inputs.embedding, a.extra["embedding"], atol=1e-5, rtol=1e-5)


def test_features_above_the_memory_are_refused(encoder: TinyDualEncoder) -> None:
    source = ScenesSource("train", size=32, length=8)
    with pytest.raises(ValueError, match=r"take .* GiB, more than probes.memory=1e-06: lower probes.samples"):
        encode_images(encoder, source, range(8), batch_size=3, device="cpu", memory=1e-6)


def test_too_few_examples_for_a_batch(encoder: TinyDualEncoder) -> None:
    with pytest.raises(ValueError, match="detection probe has 12 training examples, fewer than a batch: set detection"):
        scored("detection", subject(encoder, None, detection={**SMALL, "batch_size": 13}))


def test_nothing_is_cropped_away(encoder: TinyDualEncoder) -> None:
    picture = ScenesSource("val", size=64, length=1)[0].image.resize((90, 40))
    assert whole_picture(encoder.image_spec, picture).shape == (3, 32, 32)
    squashed = encoder.image_spec(picture.resize((32, 32), 3))
    torch.testing.assert_close(encoder.image_spec.to_model(whole_picture(encoder.image_spec, picture)), squashed)


def test_patches_come_from_the_block_before_the_last(encoder: TinyDualEncoder) -> None:
    assert patch_level(encoder).name == "blocks.0"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_head_starts_alike_for_every_model(encoder: TinyDualEncoder) -> None:
    starts = []

    def make_head() -> FusionHead:
        head = FusionHead(patch_width=32, embed_dim=16, cells=16, text_width=32, answers=2, width=32, depth=1)
        starts.append(head.answer.detach().clone())
        return head

    for seed in (1, 2):
        torch.manual_seed(seed)
        each = subject(encoder, None)
        features = each.image_features("train")
        batches = ProbeBatches(
            torch.arange(12),
            lambda _e, p: {"answers": torch.zeros(len(p), 1).long(), "shares": torch.ones(len(p), 1)},
            ids=each.bench.train_annotations.ids,
            model=encoder,
            pictures=each.bench.train,
            indices=each.bench.train_annotations.indices,
            text_of_example=torch.zeros(12).long(),
            texts=["is there a star"],
        )
        assert len(features) == 12
        train_probe("vqa", each, ProbeConfig(**SMALL), make_head, lambda _model, b=batches: b)
    assert torch.equal(*starts)
