"""What must be refused: planted faults of the export, damaged files, wrong settings; and that nothing is left then."""

from __future__ import annotations

import errno
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_support import FREE, ORIGIN, checked_here, model_of, scenes, write
from torch import Tensor

from cmapkd.config import ConfigError, DiskError, extras
from cmapkd.export import folder, layout, parity, towers
from cmapkd.export.calibration import calibrate, open_calibration
from cmapkd.export.library import export_library
from cmapkd.export.overflow import write_watched
from cmapkd.export.parity import LIMITS, Limits, ParityChecker, compare, judge, judge_scores, run_apart
from cmapkd.export.precision import check_precisions, convert, quantise, round_channels
from cmapkd.export.probes import Case, draw_probes
from cmapkd.export.program import graphs_of, write_graph
from cmapkd.export.write import open_validation
from cmapkd.models.tiny import TinyDualEncoder
from cmapkd.models.types import TowerFeatures
from helpers import make_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def nothing_left(out: Path) -> bool:
    return not out.exists() and not [path for path in out.parent.iterdir() if out.name in path.name]


# ------------------------------------------------------------------------------------------------ planted faults


def test_a_dropped_causal_mask_is_refused_with_the_worst_texts(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unmasked(tower: Any, ids: Tensor) -> Tensor:
        x = tower.token_embedding(ids) + tower.positional_embedding[torch.arange(ids.shape[1])]
        x = tower.ln_final(tower.transformer(x))
        embedding: Tensor = x[torch.arange(x.shape[0]), ids.to(torch.int32).argmax(-1)] @ tower.text_projection
        return embedding

    monkeypatch.setattr(towers, "_causal_text", unmasked)
    with pytest.raises(ValueError, match=r"text_model.onnx gives other embeddings.*The worst: .*text.*--accept-loss"):
        write(model_of("open_clip", base), tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_pooling_one_place_too_early_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def early(tower: Any, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])
        x = tower.token_embedding(ids) + tower.positional_embedding[places]
        mask = torch.where(places[None, :] > places[:, None], float("-inf"), 0.0)
        x = tower.ln_final(tower.transformer(x, attn_mask=mask))
        end = ids.to(torch.int32).argmax(-1) - 1
        embedding: Tensor = x[torch.arange(x.shape[0]), end] @ tower.text_projection
        return embedding

    monkeypatch.setattr(towers, "_causal_text", early)
    with pytest.raises(ValueError, match=r"text_model.onnx gives other embeddings"):
        write(model_of("open_clip", base), tmp_path / "out")
    assert nothing_left(tmp_path / "out")


class CountsItsBatch(TinyDualEncoder):
    def encode_image(self, images: Tensor, levels: Sequence[str] = ()) -> TowerFeatures:
        found = super().encode_image(images, levels)
        return TowerFeatures(torch.cat([found.embedding[:1]] * len(images)) + found.embedding * 0)


def test_a_forward_pass_that_counts_its_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vision_model of this model cannot be captured.*x\.shape\[0\]"):
        write(make_model(kind=CountsItsBatch), tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_a_dimension_that_came_out_frozen_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where an exporter falls back to another capture, and says nothing."""
    capture = torch.export.export

    def frozen(module: Any, args: Any, **_: Any) -> Any:
        return capture(module, args, strict=False)

    monkeypatch.setattr(torch.export, "export", frozen)
    with pytest.raises(ValueError, match=r"vision_model came out with pixel_values frozen to 3 in batch_size"):
        write(make_model(), tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_fp16_that_overflows_is_refused(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.vision.norm.weight.mul_(1e3)  # each number fits, and their sums of products do not
        model.vision.project.weight.mul_(1e3)
    with pytest.raises(ValueError, match=r"vision_model_fp16.onnx would overflow: numbers inside reach .*e\+0"):
        write(model, tmp_path / "out", precisions=["fp16"])
    assert nothing_left(tmp_path / "out")


def test_numbers_that_are_not_finite_are_refused_with_their_samples() -> None:
    reference, answers = np.ones((2, 2)), {"all": np.array([[1.0, 1.0], [np.nan, 1.0]])}
    with pytest.raises(ValueError, match=r"file gives numbers that are not finite for the cat \(all\)"):
        compare(reference, [Case("all", {}, [0, 1])], answers, ["the dog", "the cat"], "file", 1.0)


def test_the_largest_number_inside_a_graph(tmp_path: Path) -> None:
    """Between two operations, where no output shows it; what stands for minus infinity does not count."""
    values = onnx.numpy_helper.from_array(np.array([3.0, -np.inf, -3e38], np.float32), "w")
    nodes = [onnx.helper.make_node("Mul", ["x", "x"], ["y"]), onnx.helper.make_node("Div", ["y", "x"], ["z"])]
    row = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 2]) for name in "xz"]
    graph = onnx.helper.make_graph(nodes, "g", row[:1], row[1:], [values])
    opsets = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), str(tmp_path / "g.onnx"))
    assert write_watched(tmp_path / "g.onnx", tmp_path / "watched.onnx") == 3.0
    found = run_apart(tmp_path / "watched.onnx", [Case("one", {"x": np.array([[-5.0, 2.0]], np.float32)}, [0])])
    assert float(found.by_case["one"]) == 25.0


def test_a_file_that_ends_its_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deadly = tmp_path / "python"
    deadly.write_text("#!/bin/sh\nkill -SEGV $$\n")
    deadly.chmod(0o755)
    monkeypatch.setattr(parity, "sys", SimpleNamespace(executable=str(deadly)))
    with pytest.raises(ValueError, match=r"onnxruntime does not run text_model.onnx: ended by signal 11"):
        run_apart(tmp_path / "text_model.onnx", [Case("one", {"input_ids": np.zeros((1, 2), np.int64)}, [0])])


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vision_model.onnx").write_bytes(b"not a graph")
    with pytest.raises(ValueError, match=r"onnxruntime does not run vision_model.onnx: .*"):
        run_apart(tmp_path / "vision_model.onnx", [Case("one", {"x": np.zeros((1, 2), np.float32)}, [0])])


def test_int8_of_every_operation_of_a_text_tower_fails_the_limit(tmp_path: Path) -> None:
    """The recipe of convolutional towers, on the packaged teacher's text tower: it converts, and ranks worse."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    from cmapkd.api import load
    from cmapkd.export import precision

    model = load("tiny:scenes-teacher")
    source = tmp_path / "text_model.onnx"
    write_graph(graphs_of(model)["text_model"], source, longest=model.tokenizer.context_length, metadata={})
    feeds = calibrate(model, scenes("train", 64)).feeds["text_model"]
    checker = ParityChecker(model, draw_probes(scenes()))
    ours, theirs = tmp_path / "ours.onnx", tmp_path / "theirs.onnx"
    with precision._quietly():
        quantise(source, ours, feeds)
        quantize_static(
            str(source),
            str(theirs),
            precision._Reader(feeds),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    good, bad = checker.compare("text_model", ours), checker.compare("text_model", theirs)
    judge("ours", "int8-calibrated", good, LIMITS["int8-calibrated"])
    assert bad.noise_to_spread > 5 * good.noise_to_spread
    with pytest.raises(ValueError, match=r"theirs (gives other embeddings|may rank otherwise)"):
        judge("theirs", "int8-calibrated", bad, LIMITS["int8-calibrated"])


def test_a_wrong_tokenizer_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = layout._clip_tokenizer

    def shifted(native: Any, longest: int) -> Any:
        moved = {piece: number ^ 1 for piece, number in native.encoder.items()}
        return right(SimpleNamespace(encoder=moved, bpe_ranks=native.bpe_ranks), longest)

    monkeypatch.setattr(layout, "_clip_tokenizer", shifted)
    with pytest.raises(ValueError, match=r"the written tokenizer gives other ids than the model's, for example for"):
        write(model_of("open_clip", base), tmp_path / "out")
    assert nothing_left(tmp_path / "out")


# ------------------------------------------------------------------------------------------------ the comparison


def test_the_comparison_written_out() -> None:
    reference = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
    cases = [Case("all", {}, [0, 1, 2]), Case("alone", {}, [2])]
    answers = {"all": np.array([[1.0, 0.0], [0.0, 2.5], [4.0, 3.0]]), "alone": np.array([[3.0, 4.0]])}
    found = compare(reference, cases, answers, ["a", "b", "c"], "file", 1.0)
    assert found.cosine_min == pytest.approx(24 / 25)
    assert found.cosine_mean == pytest.approx((1 + 1 + 24 / 25 + 1) / 4)
    assert found.largest_error == pytest.approx(1.0)
    assert found.between_batches == pytest.approx(1 / 25)
    assert found.worst[0] == ("c", pytest.approx(24 / 25))
    units = np.array([[1, 0], [0, 1], [0.6, 0.8]])
    spread = ((units - units.mean(0)) ** 2).sum(1).mean()
    assert found.noise_to_spread == pytest.approx((0.2**2 + 0.2**2) / 4 / spread)


def test_limits_name_the_worst_and_can_be_loosened() -> None:
    reference = np.array([[1.0, 0.0], [0.0, 1.0]])
    answers = {"all": np.array([[1.0, 0.1], [0.0, 1.0]])}
    found = compare(reference, [Case("all", {}, [0, 1])], answers, ["the dog", "the cat"], "file", 1.0)
    with pytest.raises(ValueError, match=r"cosine 0\.995037 at worst, fp16 must reach 0\.999\. The worst: the dog"):
        judge("file", "fp16", found, LIMITS["fp16"])
    judge("file", "fp16", found, LIMITS["fp16"].loosened(1.0))
    assert LIMITS["int8-weights"].loosened(0.1) == Limits(0.95, float("inf"), 1.0)  # never stricter than without
    with pytest.raises(ValueError, match=r"int8-weights loses 2\.00 points of R@1 on scenes; it may lose 1.*loss 2"):
        judge_scores("int8-weights", {"R@1": 2.0, "zero-shot": 0.1}, LIMITS["int8-weights"], "scenes")
    judge_scores("int8-weights", {"R@1": 2.0}, LIMITS["int8-weights"].loosened(2.5), "scenes")


def test_noise_in_a_narrow_space_is_refused_unless_scores_are_measured() -> None:
    """All embeddings nearly parallel: every cosine is near 1, whatever the file does."""
    reference = np.array([[1.0, 0.01], [1.0, -0.01], [1.0, 0.0]])
    answers = {"all": np.array([[1.0, -0.01], [1.0, 0.01], [1.0, 0.0]])}
    found = compare(reference, [Case("all", {}, [0, 1, 2])], answers, ["a", "b", "c"], "file", 1.0)
    assert found.cosine_min > 0.999
    with pytest.raises(ValueError, match=r"file may rank otherwise .* variance .* may have 0\.05.*with --data"):
        judge("file", "int8-weights", found, LIMITS["int8-weights"])
    judge("file", "int8-weights", found, LIMITS["int8-weights"], scored=True)
    judge("file", "int8-weights", found, LIMITS["int8-weights"].loosened(0.1))


def test_rounded_weights_are_clipped_and_have_a_scale_for_each_channel() -> None:
    weight = np.array([[1.0, -2.0], [0.5, 0.25], [0.0, 0.0]], np.float32)
    numbers, scale = round_channels(weight, 0)
    assert numbers.dtype == np.int8
    np.testing.assert_array_equal(numbers, [[64, -127], [127, 64], [0, 0]])
    np.testing.assert_allclose(scale, [2 / 127, 0.5 / 127, 1])


# ------------------------------------------------------------------------------------------------ wrong use


def test_an_existing_folder_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    with pytest.raises(ConfigError, match=r"out is there already: name a new folder"):
        write(make_model(), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ValueError, match=r"--to onnx needs onnxscript: uv sync --inexact --extra onnx"):
        write(make_model(), tmp_path / "out")
    assert nothing_left(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"precisions": ["fp61"]}, r"no precision 'fp61' \(did you mean 'fp16'\?\): fp32, fp16"),
        ({"precisions": ["int8-calibrated"]}, r"name training data with --calibrate"),
        ({"dims": 0}, r"--dims 0: the embeddings of .* have \d+ numbers"),
        ({"dims": 100_000}, r"--dims 100000"),
        ({"accept_loss": 0.0}, r"--accept-loss 0: a loss is in percent"),
        ({"accept_loss": float("nan")}, r"--accept-loss nan"),
    ],
)
def test_wrong_settings(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        write(make_model(), tmp_path / "out", **options)
    assert nothing_left(tmp_path / "out")


def test_a_calibration_set_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"read by int8-calibrated only"):
        write(make_model(), tmp_path / "out", calibration=scenes("train"))


def test_calibration_needs_training_data_and_enough_of_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reads split 'val': ranges are measured on training data"):
        open_calibration("scenes@val")
    with pytest.raises(ConfigError, match=r"has 8 readable samples and 8 captions; int8-calibrated needs 32"):
        calibrate(make_model(), scenes("train", 8))
    with pytest.raises(ConfigError, match=r"measures the ranges"):
        convert("int8-calibrated", tmp_path / "a.onnx", tmp_path / "b.onnx", None)


@pytest.mark.parametrize(("spec", "split"), [("scenes@test", "val"), ("scenes", "test")])
def test_a_test_split_is_not_read(spec: str, split: str) -> None:
    with pytest.raises(ConfigError, match=r"reads the split 'test': precisions are chosen on validation data"):
        open_validation(spec, split)


def test_fp32_is_always_written_first() -> None:
    assert check_precisions(["int8-weights", "fp16"]) == ("fp32", "fp16", "int8-weights")


# ------------------------------------------------------------------------------------------------ disks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("form", ["onnx", "open_clip"])
def test_a_full_disk_is_said_and_nothing_is_left(form: Any, disk: Path, base: Path) -> None:
    export = write if form == "onnx" else partial(export_library, form=form, origin=ORIGIN, licence=FREE)
    with pytest.raises(DiskError, match=r"out is full: free some space and export again; nothing is left"):
        export(model_of("open_clip", base), disk / "out")
    assert list(disk.iterdir()) == []


def test_a_place_that_may_not_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(folder.Path, "mkdir", refuse)
    with pytest.raises(DiskError, match=r"cannot be written \(.*\): name another folder"):
        write(make_model(), tmp_path / "out")


# ------------------------------------------------------------------------------------------------ the same again


def test_the_tests_that_the_docs_name_are_there() -> None:
    """Nineteen kinds of failed exports, each with a test or a reason."""
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    table = page.partition("## What went wrong elsewhere")[2]
    rows = re.findall(r"^\| (\d+) \| .* \| (.*) \|$", table, flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 20))
    here = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    for _, told in rows:
        names = re.findall(r"`(test_\w+)`", told)
        assert names or told.startswith(("cannot occur: ", "the same: "))
        assert all(f"def {name}(" in here for name in names), told


def test_two_exports_of_a_model_have_the_same_bytes(tmp_path: Path) -> None:
    one, two = make_model(), deepcopy(make_model())
    with checked_here():
        for model, name in ((one, "one"), (two, "two")):
            write(model, tmp_path / name, precisions=["fp16", "int8-weights"])
    for path in sorted((tmp_path / "one" / "onnx").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / "onnx" / path.name).read_bytes(), path.name
    shutil.rmtree(tmp_path / "one")
