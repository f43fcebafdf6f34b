"""What a run's data and models hold, in short: a resume goes on with the same contents, wherever they are now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cmapkd.cache.files import digest_of
from cmapkd.cache.identity import reading_fingerprint, view_hash, weight_hash
from cmapkd.config import ConfigError
from cmapkd.data.held_out import open_held_out
from cmapkd.data.kept_counts import claimed_shards
from cmapkd.data.open import same_reading
from cmapkd.data.ordering import describe
from cmapkd.data.streams import JoinedSource
from cmapkd.data.templates import ClassPrompts
from cmapkd.data.types import Source
from cmapkd.models import FAMILIES, FrozenTeacher, Model, ModelConfig
from cmapkd.run.build import read_streams
from cmapkd.run.config import RunConfig
from cmapkd.training.checkpoint import Contents
from cmapkd.training.processes import patient_group

_ARCHITECTURE = ".architecture"  # the library's own description, compared only where a model was moved


def contents_of(
    config: RunConfig,
    *,
    source: Source,
    measured: Mapping[str, Source],
    student: Model,
    teachers: Mapping[str, FrozenTeacher],
    classes: ClassPrompts | None,
) -> Contents:
    """By the setting that names it: where it is, and what it holds.

    A data set is read as far as its own fingerprint reads it (names, captions and sizes, not every byte of pictures).
    Weights are hashed whole, at about a second for each GB.

    Args:
        measured: the sources of validation and test by their settings.
        student: before its first step.
        teachers: live ones, by role.
    """
    data = config.data
    found: Contents = {}
    main, *others = source.sources if isinstance(source, JoinedSource) else (source,)
    found["data.train"] = _data(data.train, main)
    for (name, stream), other in zip(data.more.items(), others, strict=True):
        found[f"data.more.{name}"] = _data(stream.source, other)
    if isinstance(data.held_out, str):
        held_out = open_held_out(data.train, data.held_out, require_captions=config.method.reads_captions)
        found["data.held_out"] = _data(data.held_out, held_out)
    for key, other in measured.items():
        found[key] = _data(str(getattr(data, key.removeprefix("data."))), other)
    for role, teacher in teachers.items():
        key = role if role == "teacher" else f"more_teachers.{role}"
        found |= _model(key, config.teachers[role], teacher.model, weights=True)
    found |= _model("student", config.student, student, weights=_all_from_files(config.student))
    found["data.order"] = {"at": data.order, "holds": f"the order {describe(read_streams(config, source))}"}
    assert data.views is not None
    found["data.views"] = {"at": "", "holds": f"views, fingerprint {view_hash(data.views)}"}
    if classes is not None:
        prompts = digest_of("\0".join(classes.texts).encode("utf-8", "surrogatepass"))
        found["classes"] = {"at": "", "holds": f"{len(classes.texts)} prompts of classes, fingerprint {prompts}"}
    return found


def _data(spec: str, source: Source) -> dict[str, str]:
    by = " by the counts beside their shards" if claimed_shards(source) else ""
    return {"at": spec, "holds": f"{len(source):,} samples{by}, fingerprint {source.fingerprint()}"}


def check_alike(contents: Contents) -> None:
    """Refuses data that hold something else in another process of the run: no batch would be whole.

    Each machine keeps what it knows of remote shards, perhaps from a time when other counts lay beside them.

    Raises:
        ConfigError: names the first that differ, in every process.
    """
    group = patient_group()
    if group is None:
        return
    own = {key: part["holds"] for key, part in contents.items() if key.partition(".")[0] == "data"}
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, own, group=group)
    for rank, other in enumerate(told):
        for key, holds in told[0].items():
            if (read := other.get(key)) != holds:
                raise ConfigError(
                    f"{key}: process 0 reads {holds}, and process {rank} reads {read}: give all machines the "
                    "same data. If remote shards were counted at different times, remove *.set in cmapkd/index under "
                    "$XDG_CACHE_HOME or ~/.cache on each machine, or set counts=index in the source"
                )


def _model(key: str, config: ModelConfig, model: Model, *, weights: bool) -> Contents:
    at = config.name if config.checkpoint is None else f"{config.name} with {config.checkpoint}"
    holds = {
        **{f"{key}.{name}": told for name, told in _reading(model)},
        f"{key}{_ARCHITECTURE}": f"an architecture, fingerprint {digest_of(repr(model).encode())}",
    }
    if weights:
        count = f"{model.num_parameters():,} parameters"
        holds[f"{key}.weights"] = f"{count}, fingerprint {weight_hash(model)}"
    return {name: {"at": at, "holds": value} for name, value in holds.items()}


def _reading(model: Model) -> Iterator[tuple[str, str]]:
    """How the model reads pictures and texts, by the name of each part."""
    for name, value in reading_fingerprint(model).items():
        if isinstance(value, dict):
            yield "preprocessing", "images of " + ", ".join(f"{key} {each}" for key, each in value.items())
        else:
            yield name, f"a {name}, fingerprint {value}"


def _all_from_files(config: ModelConfig) -> bool:
    """Whether every first weight is read from the user's own files. Random ones may differ between versions of torch,
    and say nothing once there is a checkpoint."""
    return config.inherit is None and config.init == "auto" and (config.checkpoint is not None or _is_path(config.name))


def check_contents(stored: Contents, now: Contents, *, where: Path) -> None:
    """Refuses to go on with other contents than a checkpoint was trained with.

    Raises:
        ConfigError: names each, where both are and what both hold.
    """
    wrong = [
        f"{key}: {_told('it was', stored[key])}; {_told('now it is', now[key])}"
        for key in stored
        if key in now and _differs(key, stored[key], now[key])
    ]
    if wrong:
        listed = "\n  ".join(wrong)
        raise ConfigError(
            f"{where} was trained with other contents than it would go on with:\n  {listed}\nPut the former back, name "
            "where they are now (data.train=..., teacher=...), or start a new run in another folder."
        )


def _differs(key: str, before: Mapping[str, str], now: Mapping[str, str]) -> bool:
    return before["holds"] != now["holds"] and not (key.endswith(_ARCHITECTURE) and before["at"] == now["at"])


def _told(verb: str, part: Mapping[str, str]) -> str:
    return f"{verb} {part['at']!r} with {part['holds']}" if part["at"] else f"{verb} {part['holds']}"


def may_have_moved(key: str, before: Any, now: Any, stored: Contents) -> bool:
    """Whether a setting names only where something is, whose content a checkpoint knows: that is compared later.

    Args:
        key: dotted key of the setting; before, now: its values.
    """
    section, _, name = key.rpartition(".")
    if not (isinstance(before, str) and isinstance(now, str)):
        return False
    if key in ("data.train", "data.val", "data.test", "data.held_out"):
        return key in stored and same_reading(before, now)
    if key == "data.order":
        return key in stored
    if section.startswith("data.more.") and name == "source":
        return section in stored and same_reading(before, now)
    if section in ("teacher", "student") or section.startswith("more_teachers."):
        moved = name == "checkpoint" or (name == "name" and _is_path(now) and _family(before) == _family(now))
        return moved and f"{section}.weights" in stored
    return False


def _family(name: str) -> str:
    family, colon, _ = name.partition(":")
    return family if colon and family in FAMILIES else ""


def _is_path(name: str) -> bool:
    return Path(name.partition(":")[2] if _family(name) else name).expanduser().exists()
