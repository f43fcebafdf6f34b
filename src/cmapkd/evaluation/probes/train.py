"""Training a probe with the trainer of every run: exact resume, checkpoints, signals; and reuse of a trained one."""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from cmapkd.config import ConfigError
from cmapkd.data.batches import Batches
from cmapkd.evaluation.probes.config import ProbeConfig
from cmapkd.evaluation.probes.features import ImageFeatures, encode_images
from cmapkd.evaluation.probes.probe import Head, Probe
from cmapkd.evaluation.subject import Subject
from cmapkd.models.base import DualEncoder
from cmapkd.training import OptimConfig, TrainConfig, Trainer

IDENTITY = "probe.json"


def train_probe(
    task: str,
    subject: Subject,
    config: ProbeConfig,
    make_head: Callable[[], Head],
    make_batches: Callable[[DualEncoder], Batches],
) -> Probe:
    """The trained probe of one model, in eval mode.

    With a work folder, what is in `WORK/<model>/<task>` goes on where it stopped, or is reused if it is done; a folder
    of another model, data or setting is refused. Without one the checkpoints live in a temporary folder.

    Args:
        make_head: called once under the probes' seed, so every model's head starts from the same draws.
        make_batches: given the encoder that is read live, which is a copy where it learns.
    Raises:
        ConfigError: the work folder holds another probe.
        ValueError: there are fewer examples than a batch.
        Interrupted, NonFiniteLossError: see `Trainer.run`.
    """
    bench, seed = subject.bench, subject.bench.suite.probes.seed
    encoder = copy.deepcopy(subject.dual) if config.fine_tune else subject.dual
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = make_head()
        batches = make_batches(encoder)
        if len(batches.source) < config.batch_size:
            raise ValueError(
                f"the {task} probe has {len(batches.source)} training examples, fewer than a batch: set "
                f"{task}.batch_size to {len(batches.source)} or less, or raise probes.samples (now "
                f"{bench.suite.probes.samples})."
            )
        probe = Probe(encoder, head, fine_tune=config.fine_tune)
        with ExitStack() as stack:
            if bench.work is None:
                out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cmapkd-probe-")))
            else:
                out = bench.work / _folder_name(subject.name) / task
                _check_identity(out, _identity(task, subject, config))
            bench.say(f"{subject.name}: {task} probe, {config.steps} steps over {len(batches.source)} examples")
            trainer = Trainer(
                probe,
                batches,
                TrainConfig(
                    steps=config.steps,
                    batch_size=config.batch_size,
                    device="cpu" if bench.device.type == "cpu" else "auto",
                    log_every=min(50, config.steps),
                    checkpoint_every=max(1, config.steps // 5),
                    keep_checkpoints=1,
                ),
                _optim(config),
                out=out,
                seed=seed,
                timeout=bench.config.timeout,
                console=bench.console,
                title=f"{subject.name} {task}",
            )
            trainer.run(resume=bench.work is not None)
    probe.to(bench.device).eval()
    return probe


def _optim(config: ProbeConfig) -> OptimConfig:
    """The trainer's rate is the student's, so the head's stands as its multiple."""
    share = config.encoder_rate if config.fine_tune else 1.0
    return OptimConfig(
        learning_rate=config.learning_rate * share,
        module_rate=1 / share,
        weight_decay=config.weight_decay,
        warmup_steps=min(config.warmup_steps, config.steps),
    )


def _identity(task: str, subject: Subject, config: ProbeConfig) -> dict[str, Any]:
    bench = subject.bench
    assert bench.train is not None
    return {
        "task": task,
        "model": weights_digest(subject.dual),
        "train": bench.train.name,
        "train_fingerprint": bench.train.fingerprint(),
        "templates": bench.config.templates,
        **bench.suite.probes.model_dump(mode="json", exclude={"memory"}),
        **config.model_dump(mode="json"),
    }


def weights_digest(model: torch.nn.Module) -> str:
    """A hash of every stored number and its name."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_identity(out: Path, identity: dict[str, Any]) -> None:
    path = out / IDENTITY
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [
            f"{key} (was {before.get(key)!r}, now {identity.get(key)!r})"
            for key in {**before, **identity}
            if before.get(key) != identity.get(key)
        ]
        if changed:
            raise ConfigError(
                f"{out} holds a probe with other settings: {', '.join(changed)}. Name another --work folder, or delete "
                "this one."
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")


def _folder_name(name: str) -> str:
    """A model's name as a folder's: readable, and different for different names."""
    plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in name).strip("._") or "model"
    return plain if plain == name else f"{plain[-60:]}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"


def scored_images(probe: Probe, subject: Subject, config: ProbeConfig) -> ImageFeatures:
    """Features of the scored pictures by the encoder that the head learned on: the subject's, or its tuned copy."""
    if not config.fine_tune:
        return subject.image_features("scored")
    bench = subject.bench
    return encode_images(
        probe.student,
        bench.scored,
        bench.annotations.indices,
        batch_size=bench.config.batch_size,
        device=bench.device,
        memory=bench.suite.probes.memory,
    )
