"""`cmapkd export` from the command line, scores of the files beside the model's, origins and licences."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import yaml

from cmapkd.api import distill, load
from cmapkd.cache.identity import weight_hash
from cmapkd.cli import main
from cmapkd.cli.export import _FORMS
from cmapkd.config import ConfigError, extras
from cmapkd.export.licence import is_free, licence_of, teacher_licence
from cmapkd.export.origin import origin_of, without_folders
from cmapkd.export.write import export_onnx
from cmapkd.models import ModelConfig, build_model
from helpers import make_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cmapkd", *arguments])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return call


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as `distill` leaves it, with the packaged teacher as its student."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    load("tiny:scenes-teacher").save(folder / "student")
    config = {
        "teacher": {"name": "tiny:scenes-teacher"},
        "method": {"name": "clip_kd"},
        "data": {"train": "scenes"},
        "seed": 3,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    scores = {"retrieval": {"i2t": {"r@1": 70.0}, "t2i": {"r@1": 60.0}, "mean_r@1": 65.0}, "params": 2_000_000}
    metrics = {"student": scores, "evaluated_on": "scenes@test"}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "first"
    command = ["cmapkd", "export", str(run), "--out", str(out), "--data", "scenes?length=200"]
    command += ["--precision", "fp32,fp16,int8-weights,int8-calibrated", "--calibrate", "scenes?length=64"]
    said, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(errors):
        patch.setattr(sys, "argv", command)
        patch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            main()
    assert not ended.value.code, errors.getvalue()[-3000:]
    assert "onnx/vision_model_fp16.onnx: " in said.getvalue()
    assert "int8-calibrated: R@1 " in said.getvalue()
    return out


def test_the_files_keep_retrieval_and_zero_shot(exported: Path) -> None:
    parity = json.loads((exported / "parity.json").read_text())
    scores = parity["scores"]
    assert parity["scored_on"].startswith("scenes")
    own = scores["torch"]["retrieval"]["mean_r@1"], scores["torch"]["zero_shot"]["top1"]
    assert own[0] > 60
    for precision, most in (("fp32", 0.05), ("fp16", 0.5), ("int8-weights", 1.0), ("int8-calibrated", 1.0)):
        theirs = scores[precision]["retrieval"]["mean_r@1"], scores[precision]["zero_shot"]["top1"]
        assert own[0] - theirs[0] <= most, precision
        assert own[1] - theirs[1] <= most, precision
        assert scores[precision]["retrieval"]["num_texts"] == scores["torch"]["retrieval"]["num_texts"]
    sizes = {row["precision"]: row["bytes"] for row in parity["files"] if row["tower"] == "vision_model"}
    assert sizes["fp16"] < 0.6 * sizes["fp32"]
    assert sizes["int8-weights"] < 0.35 * sizes["fp32"]
    assert sizes["int8-calibrated"] < 0.35 * sizes["fp32"]


def test_calibrated_weights_fit_cpus_that_add_products_in_16_bits(exported: Path) -> None:
    import onnx

    for name in ("vision_model_uint8.onnx", "text_model_uint8.onnx"):
        weights = [onnx.numpy_helper.to_array(each) for each in onnx.load(exported / "onnx" / name).graph.initializer]
        matrices = [each for each in weights if each.dtype == np.int8 and each.ndim > 1]
        assert matrices
        assert max(int(np.abs(each.astype(int)).max()) for each in matrices) <= 64


def test_smaller_embeddings_are_rows_of_parity_and_card(exported: Path) -> None:
    parity = json.loads((exported / "parity.json").read_text())
    table = {(row["width"], row["rotated"]): row["forms"] for row in parity["embeddings"]["rows"]}
    whole = table[256, False]
    assert whole["float32"]["recall@1"] == pytest.approx(parity["scores"]["torch"]["retrieval"]["mean_r@1"], abs=0.01)
    assert {form: each["bytes"] for form, each in whole.items()} == {
        "float32": 1024,
        "int8": 256,
        "bits": 32,
        "bits, rescored": 32,
    }
    assert whole["float32"]["recall@1"] - whole["int8"]["recall@1"] < 1
    assert whole["bits"]["recall@1"] < whole["bits, rescored"]["recall@1"]
    assert table[32, True]["float32"]["recall@1"] > table[32, False]["float32"]["recall@1"] + 10
    assert parity["embeddings"]["rotated_on"].startswith("scenes")
    card = (exported / "README.md").read_text()
    assert "| numbers | float32 | int8 | bits | bits, rescored |" in card
    assert "| 32, rotated | " in card


def test_files_are_evaluated_beside_their_run(cli: Any, run: Path, exported: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", f"student={run}", f"int8=onnx:{exported}@int8", f"fp32=onnx:{exported}"]
    arguments += ["--data", "scenes?length=40", "--tasks", "retrieval,zero_shot,agreement,efficiency"]
    arguments += [
        "--set",
        "efficiency.rounds=3",
        "--set",
        "efficiency.batch_size=2",
        "--json",
        str(tmp_path / "s.json"),
    ]
    code, out, err = cli(*arguments)
    assert code == 0, err
    assert "files MB" in out
    scores = json.loads((tmp_path / "s.json").read_text())["models"]
    assert scores["fp32"]["retrieval"]["mean_r@1"] == pytest.approx(scores["student"]["retrieval"]["mean_r@1"])
    assert scores["fp32"]["agreement"]["t2i"]["top1"] == 100
    assert scores["int8"]["agreement"]["cka"].keys() == {"P5", "L4"}
    own, files = (scores[name]["efficiency"] for name in ("student", "int8"))
    assert files["parameters"] == own["parameters"]
    assert files["image"]["macs"] == own["image"]["macs"]
    assert "peak_bytes" not in files["image"]
    assert files["device"] == "cpu (onnxruntime)"
    sizes = [(exported / "onnx" / f"{tower}_model_int8.onnx").stat().st_size for tower in ("vision", "text")]
    assert files["file_bytes"] == {"files": sum(sizes)}


@pytest.mark.parametrize(
    ("rest", "told"),
    [
        ("{empty}", "has no export.json: name a folder that `cmapkd export --to onnx` wrote"),
        ("{library}", "names no ONNX graphs"),
        ("{damaged}", "cannot be read"),
        ("{exported}@q4", "has no precision 'q4': fp32, fp16, int8-weights, int8-calibrated"),
        ("{changed}", "is not the file that export.json describes: its SHA-256 begins with"),
        ("{lost}", "has no tokenizer.json, which its export.json lists"),
    ],
)
def test_a_wrong_folder_of_files_is_said(rest: str, told: str, exported: Path, tmp_path: Path) -> None:
    places = {name: tmp_path / name for name in ("empty", "library", "damaged", "changed", "lost")}
    for name in ("empty", "library", "damaged"):
        places[name].mkdir()
    (places["library"] / "export.json").write_text('{"form": "transformers", "files": {}}')
    (places["damaged"] / "export.json").write_text("{")
    for name in ("changed", "lost"):
        if name in rest:
            shutil.copytree(exported, places[name])
    if "changed" in rest:
        (places["changed"] / "onnx" / "text_model.onnx").write_bytes(b"another")
    if "lost" in rest:
        (places["lost"] / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=re.escape(told)):
        load(f"onnx:{rest.format(exported=exported, **places)}")


def test_files_teach_from_a_cache_that_knows_them(exported: Path, tmp_path: Path) -> None:
    models = [load(f"onnx:{exported}{precision}") for precision in ("", "@int8", "")]
    first, other, again = (weight_hash(model) for model in models)
    assert first == again != other
    copied, texts = deepcopy(models[0]), ["a red square"]
    assert torch.equal(copied.embed(texts=texts).texts, models[0].embed(texts=texts).texts)
    distill(
        teacher=f"onnx:{exported}",
        student={"name": "tiny:debug", "options": {"embed_dim": 16}},
        data={"train": "scenes?length=16&size=32"},
        method="clip_kd",
        training={"steps": 2, "batch_size": 8, "device": "cpu"},
        optim={"warmup_steps": 1},
        cache={"mode": "auto", "folder": str(tmp_path / "caches")},
        out=tmp_path / "run",
        quiet=True,
    )
    assert [*(tmp_path / "caches").iterdir()]


@pytest.mark.parametrize("settings", [{"init": "scratch"}, {"options": {"a": 1}}, {"inherit": "teacher"}])
def test_files_take_no_settings_and_learn_nothing(settings: dict[str, Any], exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a set of finished files"):
        build_model(ModelConfig(name=f"onnx:{exported}", **settings))
    model = load(f"onnx:{exported}")
    with pytest.raises(ValueError, match="cannot be trained"):
        model.train()
    with pytest.raises(ValueError, match="copy their folder"):
        model.save(tmp_path / "saved")
    with pytest.raises(ValueError, match="is a set of exported files already"):
        export_onnx(model, tmp_path / "again", origin=origin_of(str(exported)))
    assert not (tmp_path / "again").exists()


def test_the_file_alone_ranks_captions(exported: Path) -> None:
    """With onnxruntime and nothing of ours but the preprocessing that the file itself states."""
    from transformers import AutoImageProcessor, AutoTokenizer

    from cmapkd.data.open import open_source

    source = open_source("scenes?length=20", split="val")
    processor, tokenizer = AutoImageProcessor.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    vision = onnxruntime.InferenceSession(exported / "onnx" / "vision_model.onnx")
    text = onnxruntime.InferenceSession(exported / "onnx" / "text_model.onnx")
    samples = [source[index] for index in range(len(source))]
    pixels = processor([sample.image for sample in samples], return_tensors="np")["pixel_values"]
    [image] = vision.run(None, {"pixel_values": pixels})
    tokens = tokenizer([sample.captions[0] for sample in samples], padding=True, return_tensors="np")
    [words] = text.run(None, {name: tokens[name] for name in ("input_ids", "attention_mask")})
    scores = (image / np.linalg.norm(image, axis=1, keepdims=True)) @ (words / np.linalg.norm(words, axis=1)[:, None]).T
    assert (scores.argmax(1) == np.arange(len(samples))).mean() > 0.6


def test_the_card_states_split_teacher_and_licence(exported: Path) -> None:
    text = (exported / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "apache-2.0"
    assert front["library_name"] == "transformers.js"
    metrics = front["model-index"][0]["results"][0]
    assert metrics["dataset"]["name"].startswith("scenes")
    assert "Distilled from tiny:scenes-teacher by `clip_kd`." in text
    assert "200 images" in text
    assert "onnx/text_model_int8.onnx" in text
    assert "tiny:scenes-teacher: terms" not in text


def test_a_loss_that_was_accepted_is_in_the_card(cli: Any, tmp_path: Path) -> None:
    make_model().save(tmp_path / "model")
    code, out, err = cli("export", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--accept-loss", "2.5")
    assert code == 0, err
    assert "allowed to lose 2.5 % of a cosine and 2.5 points" in (tmp_path / "out" / "README.md").read_text()
    assert "licence: no licence is stated: give one with --license" in out
    assert "license: unknown" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{empty}"], "is not a cmapkd model folder"),
        (["{model}", "--to", "onyx"], "there is no form 'onyx' to export to"),
        (["{model}", "--precision", "int8"], "there is no precision 'int8'"),
        (["{model}", "--precision", "int8-calibrated"], "name training data with --calibrate"),
        (["{model}", "--data", "scenes@test"], "reads the split 'test'"),
        (["{model}", "--to", "transformers"], "which transformers has no form for"),
        (["{model}", "--to", "open_clip", "--precision", "fp16"], "is for --to onnx"),
        (["{model}", "--to", "openvino", "--dims", "8"], "is for --to onnx"),
        (["{model}", "--to", "open_clip", "--accept-loss", "1"], "is for files of a runtime"),
        (["{model}", "--to", "hub"], "every exported folder is ready for the hub: export, then: hf upload OWNER/NAME"),
        (["{run}"], "is a run without student"),
    ],
)
def test_wrong_use_is_one_message(cli: Any, arguments: list[str], told: str, tmp_path: Path) -> None:
    make_model().save(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("method: {name: hinton}\n")  # it ended before its student was saved
    places = {name: str(tmp_path / name) for name in ("model", "empty", "run")}
    code, _, err = cli("export", *(each.format(**places) for each in arguments), "--out", str(tmp_path / "out"))
    assert code == 2
    assert told in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", _FORMS)
def test_an_existing_folder_and_a_missing_extra(
    cli: Any, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    code, _, err = cli("export", "tiny:scenes-teacher", "--to", form, "--out", str(tmp_path / "out"))
    assert code == 2
    assert "is there already: name a new folder" in err
    if form in ("transformers", "open_clip"):
        return
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    code, _, err = cli("export", "tiny:scenes-teacher", "--to", form, "--out", str(tmp_path / "other"))
    assert code == 2
    assert f"uv sync --inexact --extra {form}" in err
    assert not (tmp_path / "other").exists()


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from cmapkd.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'onnx', 'onnxruntime', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, "export", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--accept-loss" in done.stdout


# ------------------------------------------------------------------------------------------------ origins, licences


def test_a_run_tells_its_origin(run: Path) -> None:
    for model in (run, run / "student"):
        origin = origin_of(str(model))
        assert (origin.name, origin.teachers, origin.method) == ("first", ("tiny:scenes-teacher",), "clip_kd")
        assert (origin.data, origin.seed, origin.scored_on) == ("scenes", 3, "scenes@test")
    assert origin_of("tiny:scenes-teacher").teachers == ()


def test_names_lose_their_folders(tmp_path: Path) -> None:
    assert without_folders(f"hf:{tmp_path}/clip") == "hf:clip"
    assert without_folders(str(tmp_path / "a" / "b")) == "b"
    assert without_folders("open_clip:ViT-B-32/openai") == "open_clip:ViT-B-32/openai"


def test_a_teachers_licence_comes_first_in_the_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# teacher\n")
    assert teacher_licence(f"hf:{tmp_path}") == "cc-by-nc-4.0"
    restricted = licence_of([f"hf:{tmp_path}"], None)
    assert restricted.front_matter == "other"
    assert "may forbid a use" in restricted.sentence
    assert str(tmp_path.parent) not in restricted.sentence
    given = licence_of([f"hf:{tmp_path}"], "mit")
    assert given.front_matter == "mit"
    assert "cc-by-nc-4.0" in given.sentence
    assert licence_of(["hf:nobody/knows"], None).front_matter == "unknown"
    assert licence_of(["tiny:scenes-teacher"], None).warning is None
    assert not is_free("apple-amlr")


def test_timm_states_the_licence_of_its_weights() -> None:
    assert teacher_licence("timm:resnet18.a1_in1k/pretrained") == "apache-2.0"
    assert licence_of(["timm:resnet18.fb_swsl_ig1b_ft_in1k/pretrained"], None).front_matter == "other"
    torch.manual_seed(0)
