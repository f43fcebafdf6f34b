"""Checkpoints in shares: they hold what whole ones hold, in whichever number of processes they are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from share_checkpoints import CUT, GROUPS, METHODS, REFUSED, STEPS
from torch import Tensor

from cmapkd.training.checkpoint import checkpoint_path, list_checkpoints, read_checkpoint
from cmapkd.training.shards import has_shares, stored
from started import run_script

SIZES = {name: size for name, size, _, _ in GROUPS}
ENDS = tuple(name for name in SIZES if name not in REFUSED)
PLAIN = "2 not shared out on shares"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of every run."""
    folder = tmp_path_factory.mktemp("shares")
    script = Path(__file__).with_name("share_checkpoints.py")
    done = run_script(script, str(folder), timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def told(out: Path, name: str, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / f"{name}, {rank}.json").read_text())
    assert "failed" not in found, found["failed"]
    return found


def last(out: Path, name: str, method: str) -> dict[str, Tensor]:
    """What the last checkpoint of a run holds, but for random states of the processes."""
    for rank in range(SIZES[name]):
        assert told(out, name, rank)[method]["step"] == STEPS
    groups, _ = read_checkpoint(checkpoint_path(out / name / method / "checkpoints", STEPS))
    assert {f"random-{rank}" for rank in range(SIZES[name])} == {group for group in groups if "random" in group}
    return {
        f"{group}/{key}": value
        for group, tensors in groups.items()
        if "random" not in group
        for key, value in tensors.items()
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [name for name in ENDS if SIZES[name] == 2 and name not in ("whole", PLAIN)])
def test_they_hold_bit_for_bit_what_whole_ones_hold(out: Path, name: str, method: str) -> None:
    """Also after going on, from either form and in either, and from the checkpoint before a damaged one."""
    found, expected = last(out, name, method), last(out, "whole", method)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    folder = out / name / method / "checkpoints"
    assert has_shares(checkpoint_path(folder, STEPS)) == (name != "2 whole on shares")
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["1 on shares", "3 on shares", PLAIN])
def test_other_numbers_of_processes_go_on(out: Path, name: str, method: str) -> None:
    found, expected = last(out, name, method), last(out, "whole", method)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")
    assert has_shares(checkpoint_path(out / name / method / "checkpoints", STEPS)) == (name == "3 on shares")


@pytest.mark.parametrize("method", METHODS)
def test_each_process_writes_its_share_and_no_pickle(out: Path, method: str) -> None:
    path = checkpoint_path(out / "shares" / method / "checkpoints", STEPS)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    sizes = [sum(value.nbytes for value in load_file(file).values()) for file in sorted(path.glob("shard-*"))]
    assert len(sizes) == 2
    assert max(sizes) < 0.6 * sum(sizes)
    whole = sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in stored(path).values())
    assert sum(sizes) == whole  # nothing twice


@pytest.mark.parametrize("method", METHODS)
def test_damage_that_one_process_sees_is_known_to_all(out: Path, method: str) -> None:
    """All went on from the step before, see above; the first one says so."""
    first, second = (
        [text for text in told(out, "damaged", rank)[method]["warned"] if "checksum" in text] for rank in range(2)
    )
    assert not second
    (warned,) = first
    assert "shard-00002-model-00001-of-00001.safetensors is damaged" in warned
    assert f"Going on from step-{CUT:09d} instead" in warned


def test_a_disk_that_refuses_one_process_stops_all_and_loses_nothing(out: Path) -> None:
    first, second = (told(out, "full disk", rank)["cmapkd"]["refused"] for rank in range(2))
    assert "is full: free some space" in second
    assert "process 1 could not do its part of a checkpoint" in first
    folder = out / "full disk" / "cmapkd" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-000000002"]
    assert read_checkpoint(list_checkpoints(folder)[-1])[1].step == 2


def test_processes_that_see_different_folders_are_told_so(out: Path) -> None:
    first, second = (told(out, "two folders", rank)["cmapkd"]["refused"] for rank in range(2))
    assert "process 1 could not do its part of a checkpoint: process 1 does not see" in first
    assert "set training.checkpoint_form=whole" in second
    assert not list(out.glob("two folders*/cmapkd/checkpoints/*"))


def test_shares_that_are_missing_are_told_of(out: Path, tmp_path: Path) -> None:
    """Also where the list of checksums does not know them."""
    path = tmp_path / f"step-{STEPS:09d}"
    shutil.copytree(checkpoint_path(out / "shares" / "cmapkd" / "checkpoints", STEPS), path)
    (gone,) = path.glob("shard-00002*")
    gone.unlink()
    with pytest.raises(ValueError, match="shard-00002-model-00001-of-00001"):
        read_checkpoint(path)
    checksums = json.loads((path / "checksums.json").read_text())
    del checksums[gone.name]
    (path / "checksums.json").write_text(json.dumps(checksums))
    with pytest.raises(ValueError, match="a share is missing"):
        read_checkpoint(path)
