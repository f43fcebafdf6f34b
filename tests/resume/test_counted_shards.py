"""A run over shards that are counted by what lies beside them goes on with the counts that it began with."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from making import picture, write_tar

import cmapkd
from cmapkd.config import ConfigError
from cmapkd.results import RunResult
from cmapkd.run.finalize import finalize
from cmapkd.training import Interrupted, trainer

SHARDS, IN_SHARD = 6, 5


def say(folder: Path, short: int) -> None:
    """Counts beside the shards; one shard lacks two of what is said of it."""
    for shard in range(SHARDS):
        samples = IN_SHARD + 2 * (shard == short)
        (folder / f"{shard}_stats.json").write_text(json.dumps({"successes": samples}))


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = tmp_path / "store"
    store.mkdir()
    for shard in range(SHARDS):
        members = [(f"{number}.png", picture(40 * shard + number)) for number in range(IN_SHARD)]
        members += [(f"{number}.txt", f"picture {number} of {shard}".encode()) for number in range(IN_SHARD)]
        write_tar(store / f"{shard}.tar", sorted(members))
    say(store, short=2)
    return {
        "student": {"name": "tiny:debug", "options": {"embed_dim": 16}},
        "method": "contrastive",
        "data": {"train": f"webdataset:file://{store}/{{0..5}}.tar", "lanes": 2, "window": 2, "max_bad_share": 0.5},
        "training": {"steps": 8, "batch_size": 4, "log_every": 1, "checkpoint_every": 1, "device": "cpu"},
        "optim": {"warmup_steps": 1},
    }


def weights(out: Path) -> dict[str, torch.Tensor]:
    return cmapkd.load(out).state_dict()


def distill(values: dict[str, Any], out: Path, **options: Any) -> RunResult:
    return cmapkd.distill(**values, out=out, quiet=True, **options)


def stop_at_once(values: dict[str, Any], out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def asked_at_once() -> Iterator[threading.Event]:
        event = threading.Event()
        event.set()
        yield event

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "signals", asked_at_once)
        with pytest.raises(Interrupted):
            distill(values, out)


def test_a_run_goes_on_with_its_counts_where_others_lie_by_now(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill(values, tmp_path / "whole")
    stop_at_once(values, tmp_path / "run", monkeypatch)
    (sets,) = json.loads((tmp_path / "run" / "shards.json").read_text())["sets"].values()
    assert sets["counts"] == [5, 5, 7, 5, 5, 5]

    say(tmp_path / "store", short=4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    kept = tmp_path / "run" / "shards.json"
    kept.rename(tmp_path / "kept.json")
    with pytest.raises(ConfigError, match=r"(?s)other contents .* 32 samples by the counts beside their shards, fing"):
        distill(values, tmp_path / "run", resume=True)
    (tmp_path / "kept.json").rename(kept)
    assert finalize(tmp_path / "run").metrics["steps"] == 1
    distill(values, tmp_path / "run", resume=True)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    bad = [(tmp_path / name / "bad_samples.jsonl").read_text() for name in ("whole", "run")]
    assert bad[0] == bad[1]
    assert {json.loads(line)["id"] for line in bad[0].splitlines()} == {"2#5", "2#6"}
