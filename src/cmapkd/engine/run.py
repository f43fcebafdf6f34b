"""One engine, from its recipe to a folder: models are loaded, shards that are missing are made, lists are joined."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from cmapkd.cache.identity import data_of, reading_fingerprint, weight_hash
from cmapkd.config import ConfigError, counted
from cmapkd.config.resumable import fixed_differences
from cmapkd.data.open import open_source
from cmapkd.data.random import key_of
from cmapkd.data.types import BadSampleError, Sample, Source
from cmapkd.data.unseen import unseen
from cmapkd.engine.candidates import Candidate, kept
from cmapkd.engine.config import EngineConfig
from cmapkd.engine.critics import check_critic
from cmapkd.engine.filters import verify
from cmapkd.engine.folder import AGAIN, EngineFolder
from cmapkd.engine.proposals import ProposeConfig, propose
from cmapkd.engine.written import Panel
from cmapkd.models import Model, build_model
from cmapkd.provenance import describe_environment

FORMAT = 2
TRIED = 256
"""Samples that are looked through, before anything is asked, for what a recipe needs of its data."""
OnProgress = Callable[[int, int], None]  # samples done, samples to do, of this process
_REASONS = {
    "format": "it was written by another version of cmapkd",
    "data": "the data are others",
    "weights": "it was written by other weights",
    "architecture": "it computes otherwise with its weights (another version, or a setting of its config)",
    "processor": "it reads pictures or texts otherwise",
}


@dataclass(frozen=True)
class EngineResult:
    """What is in the folder.

    Attributes:
        made: shards that this process made.
        missing: shards that other processes have still to make; the lists are written when there are none.
        counts: of all shards, see `EngineFolder.counts`; None as long as some are missing.
    """

    made: int
    missing: int
    counts: dict[str, Any] | None


class Engine:
    """The engine of a recipe. Nothing is written before `run`.

    Args:
        source, models: in the place of those that the recipe names.
    """

    def __init__(
        self, config: EngineConfig, *, source: Source | None = None, models: Mapping[str, Model] | None = None
    ) -> None:
        """Raises ConfigError: a model is asked to write or to judge, and cannot."""
        self.config = config
        self.source = open_source(config.data, split="train") if source is None else source
        cuda = torch.cuda.is_available() and not config.on_cpu
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}" if cuda else "cpu"
        built = load_models(config) if models is None else dict(models)
        self.panel = Panel(built, torch.device(device), config.seed, config.batch_size, config.write.note)
        self._check_kinds()
        self._check_data()

    def _check_kinds(self) -> None:
        facts = self.config.propose.facts
        for how in (*self.config.propose.asks.values(), *self.config.answers.values()):
            self.panel.writer(how.by)
        for each in self.config.verify:
            if each.critic is not None and facts is not None:
                check_critic(each.critic, self.panel, {name: each.tails for name, each in facts.relations.items()})

    def _check_data(self) -> None:
        """Refuses data of which no sample that is tried has what the recipe reads."""
        propose, labels = self.config.propose, any(each.label is not None for each in self.config.verify)
        apart = max(1, len(self.source) // TRIED)
        places = range(0, len(self.source), apart)[:TRIED]
        for need in propose.needs:
            if any(_has(self.source, place, need, propose, labels) for place in places):
                continue
            asked = need == "questions"
            reader = "verify.label" if labels and asked else f"propose.{propose.kind}"
            what = need + " with answers" * (labels and asked)
            fitting = " that a kind takes" if asked and propose.programs is not None else ""
            raise ConfigError(
                f"{reader} reads {what}{fitting}, and of {counted(len(places), 'sample')} of {self.config.data} none "
                "has any: give other data"
            )

    @property
    def num_shards(self) -> int:
        return -(-len(self.source) // self.config.shard_samples)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the written data depend on, as plain data: the manifest without its counts."""
        return {
            "format": FORMAT,
            "recipe": self.config.model_dump(mode="json"),
            "data": data_of(self.source),
            "models": {name: describe_model(model) for name, model in self.panel.models.items()},
        }

    def run(
        self, out: str | Path, *, rank: int = 0, world_size: int = 1, progress: OnProgress | None = None
    ) -> EngineResult:
        """Makes the shards that are missing, of several processes each every `world_size`-th; the last joins them.

        Shards are made apart, so that any number of processes and of stops leaves the same bytes.

        Raises:
            ConfigError: the folder holds what another recipe, other data or other models wrote, or something else.
            DiskError: the disk refuses.
        """
        folder = EngineFolder(Path(out), self.config.write, self.config.seed, self.config.each)
        self._claim(folder)
        folder.begin()
        todo = [shard for shard in range(self.num_shards) if shard % world_size == rank and not folder.has(shard)]
        sizes = [len(self._samples_of(shard)) for shard in todo]
        for place, shard in enumerate(todo):
            candidates, bad = self.make(shard)
            self._refuse_others(folder)  # another recipe may have taken a folder that had no shard yet
            folder.finish_shard(shard, candidates, samples=sizes[place] - len(bad), bad=bad)
            if progress is not None:
                progress(sum(sizes[: place + 1]), sum(sizes))
        missing = sum(not folder.has(shard) for shard in range(self.num_shards))
        counts = None
        if not missing:
            folder.join(self.num_shards)
            counts = folder.counts(self.num_shards)
            folder.write_manifest({**(folder.manifest() or self._begun), "counts": counts})
        return EngineResult(len(todo), missing, counts)

    def _claim(self, folder: EngineFolder) -> None:
        """Writes the manifest where there is none; a kill before it leaves nothing that another start would refuse.

        Raises:
            ConfigError: the folder holds shards of another engine, or something else.
        """
        folder.manifest()  # refuses strangers' files before the work
        begun = self._begun  # takes seconds, in which another process may begin
        before = folder.manifest()
        if before is None or (not folder.has_any() and self._differences(before)):
            folder.write_manifest(begun)
        self._refuse_others(folder)  # of two recipes that begin at once one is refused
        before = folder.manifest() or begun
        known = before.get("environments", [])
        (own,) = begun["environments"]
        if all({**each, "command": None} != {**own, "command": None} for each in known):
            folder.write_manifest({**before, "environments": [*known, own]})

    @cached_property
    def _begun(self) -> dict[str, Any]:
        """The manifest of a folder in which no shard is finished."""
        return {**self.identity, "environments": [describe_environment()], "counts": None}

    def _samples_of(self, shard: int) -> range:
        size = self.config.shard_samples
        return range(shard * size, min((shard + 1) * size, len(self.source)))

    def make(self, shard: int) -> tuple[list[Candidate], list[tuple[str, str]]]:
        """All candidates of a shard, kept ones and others, and the samples that could not be read."""
        samples: list[tuple[int, Sample]] = []
        bad: list[tuple[str, str]] = []
        for index in self._samples_of(shard):
            try:
                samples.append((index, self.source[index]))
            except BadSampleError as error:
                if error.passing:
                    raise ConfigError(
                        f"{error}. It would be missing for good: {AGAIN} when the store answers"
                    ) from None
                bad.append((error.sample_id, error.reason))
        candidates = propose(samples, self.config.propose, self.panel)
        for label, config in zip(self.config.labels, self.config.verify, strict=True):
            for name in config.answers:
                how = self.config.answers[name]
                asked = [each for each in kept(candidates) if name not in each.answers]
                self.panel.answer(asked, how, name=name, number=how.drafts)
            verify(kept(candidates), config, label, self.panel)
        return candidates, bad

    def _refuse_others(self, folder: EngineFolder) -> None:
        """Raises ConfigError: the manifest is of another recipe, other data or other models."""
        _refuse(folder, self._differences(folder.manifest() or self._begun))

    def _differences(self, before: Mapping[str, Any]) -> list[str]:
        """What a manifest has otherwise than this engine, in words."""
        own = self.identity
        reasons = _of_recipe(self.config, before)
        reasons += [_REASONS[key] for key in ("format", "data") if before.get(key) != own[key]]
        written = before.get("models")
        for name, model in own["models"].items():
            theirs = written.get(name) if isinstance(written, dict) else None
            theirs = theirs if isinstance(theirs, dict) else {}
            reasons += [
                f"models.{name}: {_REASONS.get(key, f'its {key} is another')}"
                for key, value in model.items()
                if key != "name" and theirs.get(key) != value
            ]
        return reasons


def check_recipe(config: EngineConfig, out: str | Path) -> None:
    """Refuses a folder with shards of another recipe; for whom models, which take minutes to load, are to come.

    Raises:
        ConfigError: names what is another, or the folder holds something else.
    """
    folder = EngineFolder(Path(out), config.write, config.seed, config.each)
    before = folder.manifest()
    if before is not None and folder.has_any():
        _refuse(folder, _of_recipe(config, before))


def _of_recipe(config: EngineConfig, before: Mapping[str, Any]) -> list[str]:
    """What the recipe of a manifest has otherwise than this one, in words."""
    own, recipe = config.model_dump(mode="json"), before["recipe"]
    with suppress(ConfigError):  # a setting that is newer than the folder has its default
        recipe = EngineConfig.from_mapping(recipe).model_dump(mode="json")
    changed = fixed_differences(config, recipe, own)
    reasons = [f"{key} {words}" for key, words in changed.items()]
    named = isinstance(recipe, dict) and json.dumps(recipe.get("propose")) != json.dumps(own["propose"])
    if named and not any(key.startswith("propose") for key in changed):
        reasons.append("propose: its names stand in another order, which kinds, ways and steps follow")
    return reasons


def _refuse(folder: EngineFolder, reasons: Sequence[str]) -> None:
    """Raises ConfigError where there is any reason."""
    if reasons:
        listed = "\n  ".join(reasons)
        raise ConfigError(
            f"{folder.path} holds what another engine wrote:\n  {listed}\nName another folder with --out."
        )


def _has(source: Source, place: int, need: str, propose: ProposeConfig, labels: bool) -> bool:
    """Raises ConfigError: the store of the data does not answer."""
    try:
        sample = unseen(source, place)
    except BadSampleError as error:
        if error.passing:
            raise ConfigError(f"{error}: {AGAIN} when the store answers") from None
        return False
    if need == "boxes":
        return bool(sample.boxes)
    return any(
        propose.takes(each.question) and (not labels or any(answer.strip() for answer in each.answers))
        for each in sample.questions
    )


def load_models(config: EngineConfig) -> dict[str, Model]:
    """The models by name, the same in every process, also where one is untrained."""
    built: dict[str, Model] = {}
    first: Model | None = None
    for name, model in config.models.items():
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key_of("engine", name, config.seed) % 2**63)
            built[name] = build_model(model, teacher=first)
        first = first or built[name]
    return built


def describe_model(model: Model) -> dict[str, Any]:
    """Digests of its weights, of what it computes, and of how it reads pictures and texts."""
    reading = reading_fingerprint(model)
    return {
        "name": model.name,
        "weights": weight_hash(model),
        "architecture": key_of(model.architecture).to_bytes(16, "little").hex(),
        **{key: value if isinstance(value, str) else str(value) for key, value in reading.items()},
    }


def told(counts: Mapping[str, Any]) -> str:
    """Counts in words: `of 60 candidates, 20 kept, 40 dropped as parity`."""
    dropped = ", ".join(f"{number:,} dropped as {label}" for label, number in counts["dropped"].items())
    bad = f"; {counted(counts['bad'], 'sample')} could not be read" if counts["bad"] else ""
    found = counts.get("relations", {}).items()
    relations = ", ".join(f"{each['kept']:,} of {each['candidates']:,} of {name}" for name, each in found)
    kept = f"{counts['kept']:,} kept" + (f" ({relations})" if relations else "")
    return f"of {counted(counts['candidates'], 'candidate')}, {kept}, {dropped or 'none dropped'}{bad}"
