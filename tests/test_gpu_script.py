"""`benchmarks/gpu.py` with small models on a CPU: the code that a GPU would run, and what becomes of its stages."""

from __future__ import annotations

import importlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from started import run_script

ROOT = Path(__file__).parents[1]

with pytest.MonkeyPatch.context() as patched:
    patched.syspath_prepend(ROOT / "benchmarks")
    gpu: Any = importlib.import_module("gpu")

pytestmark = pytest.mark.usefixtures("one_thread")
Lines = dict[str, list[dict[str, Any]]]


def lines(file: Path) -> Lines:
    """By stage, in their order."""
    found: Lines = {}
    for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        found.setdefault(line.pop("stage"), []).append(line)
    return found


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Lines:
    """By the whole script, as it is called."""
    out = tmp_path_factory.mktemp("gpu") / "tiny.jsonl"
    script, hidden = ROOT / "benchmarks" / "gpu.py", {"CUDA_VISIBLE_DEVICES": ""}
    done = run_script(script, "--tiny", "--out", str(out), timeout=900, environment=hidden)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return lines(out)


def test_every_stage_tells_its_arms_and_ends(told: Lines) -> None:
    assert list(told) == list(gpu.STAGES)
    for name, found in told.items():
        assert found[-1].keys() == {"took_s"}, name
        assert len(found) > 1, name
        for line in found:
            assert not line.keys() & {"failed", "skipped"}
            rates = [value for key, value in line.items() if key.endswith(("_per_s", "_s"))]
            assert all(rate > 0 for rate in rates)


def test_arms_are_those_that_are_compared(told: Lines) -> None:
    arms = {name: [line["arm"] for line in found if "arm" in line] for name, found in told.items()}
    assert arms["student"] == ["contrastive", "contrastive"]
    assert arms["teachers"] == ["student alone", "cached", "live"]
    assert arms["compiled"] == ["eager", "compiled"]
    assert arms["large_batch"] == ["8 in micro-batches of 8", "32 in micro-batches of 8"]
    assert arms["loader"] == ["one batch, ready", "read alone", "trained from tars"]
    assert [line["pairs"] for line in told["student"][:2]] == [8, 16]
    assert told["student"][1]["micro_batch"] == 8
    assert told["pixels"][0]["equal_to_host"] is True
    cut, whole = told["texts"][0]["lengths"]
    assert cut < whole == gpu.TEXTS["context_length"]


def test_the_two_sizes_measure_the_same(told: Lines) -> None:
    """No stage asks which of the two it has: `needs_gpu` is read by the first stage alone, to refuse a CPU."""
    source = (ROOT / "benchmarks" / "gpu.py").read_text(encoding="utf-8")
    assert "TINY" in source
    assert source.count("sizes.needs_gpu") == 1
    assert sum(seconds for seconds, _ in gpu.STAGES.values()) <= gpu.LIMIT <= 600


def test_padded_texts_give_the_same_embeddings(tmp_path: Path) -> None:
    student = gpu.model(gpu.TINY, "student", tmp_path).eval()
    cut = gpu.ready({"student": student}, 8, 4)
    whole = gpu.padded(cut, student.tokenizer.context_length)
    assert whole.inputs["student"].texts.ids.shape[1] == 32
    with torch.no_grad():
        short, long = (student(batch.inputs["student"]).text.embedding for batch in (cut, whole))
    torch.testing.assert_close(short, long, rtol=1e-5, atol=1e-5)


def test_work_of_a_pair_is_the_products_written_out(tmp_path: Path) -> None:
    student = gpu.model(gpu.TINY, "student", tmp_path).eval()
    batch = gpu.ready({"student": student}, 8, 4)
    length = batch.inputs["student"].texts.ids.shape[1]

    def blocks(number: int, places: int, width: int) -> int:
        """Queries, keys, values and output; logits and values of attention; the two layers of four times the width."""
        return number * (4 * places * width**2 + 2 * places**2 * width + 8 * places * width**2)

    macs = 4 * 3 * 16**2 * 32 + blocks(2, 5, 32) + 32 * 32  # 4 patches and the class token
    macs += blocks(1, length, 32) + 32 * 32
    assert gpu.work_of_a_pair(student, batch, "student") == 2 * macs


def test_share_of_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.told(100, 0.5, 1e12)["share_of_peak"] is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    found = gpu.told(100, 0.5, 1e12)
    assert found["pairs_per_s"] == 200
    assert found["tflop_per_s"] == pytest.approx(200)
    assert found["share_of_peak"] == pytest.approx(200e12 / 989e12)


def test_a_stage_is_ended_failed_or_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "out.jsonl"

    def slow(_sizes: Any, tell: Any, _folder: Path) -> None:
        tell(arm="before")
        time.sleep(600)

    def wrong(_sizes: Any, tell: Any, _folder: Path) -> None:
        tell(arm="before")
        raise ValueError("no such arm")

    def quick(_sizes: Any, tell: Any, folder: Path) -> None:
        tell(arm="all", folder=folder.is_dir())

    stages = {"slow": (1, slow), "wrong": (1, wrong), "long": (1000, quick), "quick": (1, quick)}
    monkeypatch.setattr(gpu, "STAGES", stages)
    monkeypatch.setattr(gpu, "LIBRARIES", ())
    start = time.monotonic()
    assert not gpu.run(gpu.TINY, file, list(stages), limit=300, grace=5)
    assert time.monotonic() - start < 60
    found = lines(file)
    assert found["slow"][0] == {"arm": "before"}
    assert "its lines before this one stand" in found["slow"][1]["skipped"]
    assert found["wrong"] == [{"arm": "before"}, {"failed": "ValueError: no such arm"}]
    assert "it may take 1000 s" in found["long"][0]["skipped"]
    assert found["quick"][0] == {"arm": "all", "folder": True}
    assert found["quick"][1].keys() == {"took_s"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_full_sizes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LIBRARIES", ())
    file = tmp_path / "out.jsonl"
    assert not gpu.run(replace(gpu.TINY, needs_gpu=True), file, ["machine", "pixels"])
    assert lines(file) == {
        "machine": [{"failed": "SystemExit: there is no GPU here: give --tiny for the same code with small models"}]
    }
