"""What a report says of awkward runs: cut short, of test data, of metrics where lower is better, of equal names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from report_support import write_pictures, write_run

from cmapkd.compare.metric import metric_digits
from cmapkd.config import ConfigError
from cmapkd.report import write_report
from cmapkd.report.arms import arms_of
from cmapkd.report.blocks import Paragraph, Table
from cmapkd.report.classes import _wrong
from cmapkd.report.compared import tone_of
from cmapkd.report.exported import export_blocks
from cmapkd.report.origins import _again_exported
from cmapkd.report.read import ComparisonFolder, ExportFolder, RunFolder, read_paths
from cmapkd.report.scores import cost_blocks, measured_models, score_blocks
from cmapkd.report.verdict import arm_about, arm_verdict, comparison_verdict

CONFIG = {"student": {"name": "tiny:debug"}, "method": {"name": "cmapkd"}, "training": {"steps": 600}}


def scores(mean: float, *, params: int = 1_000) -> dict[str, Any]:
    return {"retrieval": {"mean_r@1": mean, "num_images": 10, "num_texts": 20}, "params": params}


def write_metrics(
    folder: Path, student: float, baseline: float | None, *, seed: int = 0, params: int = 1_000, **more: Any
) -> Path:
    """A run folder without models, of scores that a test chooses."""
    folder.mkdir(parents=True)
    config = CONFIG | {"seed": seed} | more.pop("config", {})
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    metrics = {
        "teacher": scores(60.0, params=2_000), "student": scores(student, params=params), "method": "cmapkd",
        "baseline": None if baseline is None else scores(baseline), "baseline_name": "scratch",
        "seed": seed, "steps": 600, "total_steps": 600,
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics | more))
    return folder


def said(*folders: Path) -> list[Paragraph]:
    return [each for arm in arms_of(read_paths(folders).runs) for each in arm_verdict(arm)]


def test_a_run_cut_short_is_no_seed_of_the_whole_ones(tmp_path: Path) -> None:
    short = write_metrics(tmp_path / "short", 20.0, 10.0, steps=100)
    whole = [write_metrics(tmp_path / f"seed{seed}", 30.0 + seed, 10.0, seed=seed) for seed in (1, 2)]
    first, *others = said(short)
    assert (first.tone, len(others)) == ("bad", 2)
    assert "step 100 of 600" in first.text
    assert "one seed, so chance is not excluded" in first.text
    arms = arms_of(read_paths([short, *whole]).runs)
    assert [len(arm.runs) for arm in arms] == [1, 2]
    assert "100 of 600 steps" in arm_about(arms[0])
    assert not any("600" in each.text for each in arm_verdict(arms[1]))


def test_a_comparison_counts_only_runs_that_reached_their_end(tmp_path: Path) -> None:
    (tmp_path / "comparison.yaml").write_text("base: x\n")
    for name, steps in (("a", 600), ("b", 100)):
        write_metrics(tmp_path / "runs" / name, 1.0, None, steps=steps)
    (found,) = read_paths([tmp_path]).comparisons
    assert (found.num_finished, found.num_runs) == (1, 2)


def test_the_seeds_are_said_however_much_there_is_to_say(tmp_path: Path) -> None:
    whole = write_metrics(tmp_path / "seed0", 20.0, 30.0)
    lost = write_metrics(tmp_path / "seed1", 20.0, 30.0, seed=1)
    (lost / "metrics.json").unlink()
    sentences = said(whole, lost)
    assert len(sentences) == 3
    assert "1 of 2 runs is not finished" in sentences[0].text
    assert "chance is not excluded" in sentences[0].text
    assert "worse than" in sentences[1].text


def test_what_is_not_resolved_is_neither_worse_nor_a_lead(tmp_path: Path) -> None:
    folders = [
        write_metrics(tmp_path / f"seed{seed}", own, 10.0, seed=seed) for seed, own in enumerate((14.0, 9.0, 4.0))
    ]
    sentences = [each.text for each in said(*folders)]
    assert not any("worse" in each for each in sentences)
    assert any("The difference to the same student trained alone is not resolved: -1.0" in each for each in sentences)
    same = " ".join(each.text for each in said(write_metrics(tmp_path / "same", 10.0, 10.0)))
    assert "differs from the same student trained alone by less than 0.05 points" in same
    assert "leads" not in same


def test_a_student_that_is_larger_is_not_called_smaller(tmp_path: Path) -> None:
    large = write_metrics(tmp_path / "large", 20.0, 10.0, params=4_000)
    assert not any("fewer" in each.text for each in said(large))
    assert any("2 times fewer" in each.text for each in said(write_metrics(tmp_path / "small", 20.0, 10.0)))


def zero_shot(top1: float, *, classes: int, pictures: int) -> dict[str, Any]:
    return {"zero_shot": {"top1": top1, "num_classes": classes, "num_images": pictures}, "params": 1_000}


def test_nothing_is_kept_of_a_teacher_at_chance(tmp_path: Path) -> None:
    def sentences(name: str, teacher: float, student: float, pictures: int) -> str:
        models = {
            role: zero_shot(top1, classes=3, pictures=pictures)
            for role, top1 in (("teacher", teacher), ("student", student))
        }
        folder = write_metrics(tmp_path / name, 0.0, None)
        metrics = json.loads((folder / "metrics.json").read_text())
        (folder / "metrics.json").write_text(json.dumps(metrics | models))
        return " ".join(each.text for each in said(folder))

    text = sentences("few", 14.3, 28.6, 7)
    assert "keeps" not in text
    assert "Its teacher, with 14.3, is not clearly above chance (33.3)" in text
    assert "Scores are of 7 pictures: one is 14.3 points." in text
    text = sentences("many", 60.0, 45.0, 900)
    assert "keeps 75 % of the teacher's zero-shot" in text
    assert "Scores are of" not in text


def test_equal_scores_of_all_seeds_have_no_interval(tmp_path: Path) -> None:
    folders = [write_metrics(tmp_path / f"seed{seed}", 20.0, 10.0, seed=seed) for seed in (0, 1)]
    (arm,) = arms_of(read_paths(folders).runs)
    mean = arm.mean("student", "retrieval", "mean_r@1")
    assert mean is not None
    assert mean.interval is None
    assert arm.difference("retrieval", "mean_r@1") == 10.0


def bits(value: float) -> dict[str, Any]:
    return {"perplexity": {"negative_bits_per_byte": value, "bits_per_byte": -value}, "params": 1_000}


def write_bits(folder: Path, student: float, baseline: float, *, seed: int = 0) -> Path:
    models = {"teacher": bits(-0.5), "student": bits(student), "baseline": bits(baseline), "baseline_name": "sft"}
    metrics = json.loads((write_metrics(folder, 0.0, None, seed=seed) / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(metrics | models | {"method": "token_kd"}))
    return folder


def test_bits_per_byte_have_their_decimals_and_no_share(tmp_path: Path) -> None:
    kept = said(write_bits(tmp_path / "one", -0.912, -0.934))[0].text
    assert kept == "The student reaches -0.912 in -bits/byte, its teacher -0.500."
    lead = said(tmp_path / "one")[1].text
    assert lead == "It leads the same student trained alone by 0.022 in -bits/byte."
    worse = said(write_bits(tmp_path / "worse", -0.95, -0.934))[0]
    assert (worse.tone, "-bits/byte -0.950 against -0.934 (-0.016)." in worse.text) == ("bad", True)
    same = said(write_bits(tmp_path / "same", -0.9341, -0.934))[1].text
    assert same == "It differs from the same student trained alone by less than 0.0005 in -bits/byte."
    config = {"training": {"steps": 600, "batch_size": 8}}
    folder = write_metrics(tmp_path / "about", 1.0, None, method="token_kd", config=config)
    assert "600 steps with 8 samples each" in arm_about(arms_of(read_paths([folder]).runs)[0])
    seeds = [write_bits(tmp_path / f"s{seed}", -0.912 - 0.001 * seed, -0.934, seed=seed) for seed in (1, 2, 3)]
    assert any("by 0.020 in -bits/byte (+0.018 to +0.022)" in each.text for each in said(*seeds))
    data = read_paths([tmp_path / "one"])
    models = measured_models(data, arms_of(data.runs))
    (table,) = [each for each in score_blocks(models) if isinstance(each, Table)]
    assert {row[1].text for row in table.rows} == {"-0.500", "-0.912", "-0.934"}
    page = write_report([tmp_path / "one"], tmp_path / "page.html", gallery=0).read_text()
    assert "-bits/byte, %" not in page


def test_a_comparison_shows_the_decimals_of_its_metric() -> None:
    path = "perplexity.negative_bits_per_byte"
    assert (metric_digits(path), metric_digits(f"other.{path}"), metric_digits("retrieval.mean_r@1")) == (3, 3, 1)
    each = contrast(path, "above", 0.012)
    text = " ".join(part.text for part in comparison_verdict(comparison({"contrasts": [each]})))
    assert "by +0.012, 95 % interval -0.988 to +1.012." in text


def test_two_learning_rates_have_two_names(tmp_path: Path) -> None:
    folders = [
        write_metrics(tmp_path / f"rate{rate}" / f"seed{seed}", 20.0, 10.0, seed=seed, config={"optim": {"rate": rate}})
        for rate in (1, 2)
        for seed in (0, 1)
    ]
    names = [arm.name for arm in arms_of(read_paths(folders).runs)]
    assert names == [f"cmapkd, tiny:debug, rate{rate}/seed0" for rate in (1, 2)]
    singles = [arm.name for arm in arms_of(read_paths([folders[0], folders[2]]).runs)]
    assert singles == ["rate1/seed0", "rate2/seed0"]


# ------------------------------------------------------------------------------------------------ comparisons


def comparison(*tables: dict[str, Any]) -> ComparisonFolder:
    return ComparisonFolder(Path("c"), {"tables": list(tables)}, 0, 0, ())


def contrast(metric: str, verdict: str, difference: float) -> dict[str, Any]:
    return {
        "arm": "a", "against": "b", "metric": metric, "verdict": verdict, "difference": difference, "p": 0.01,
        "interval": [difference - 1, difference + 1],
    }  # fmt: skip


def test_a_contrast_in_two_tables_counts_once() -> None:
    one, other = contrast("retrieval.mean_r@1", "above", 3.0), contrast("retrieval.mean_r@1", "not resolved", 0.5)
    first, *_ = comparison_verdict(comparison({"contrasts": [one, other]}, {"contrasts": [one]}))
    assert first.text.startswith("1 of 2 declared contrasts")


@pytest.mark.parametrize(
    ("metric", "verdict", "difference", "tone"),
    [
        ("retrieval.t2i.median_rank", "below", -3.0, "good"),
        ("retrieval.t2i.median_rank", "above", 3.0, "bad"),
        ("retrieval.mean_r@1", "below", -3.0, "bad"),
        ("retrieval.mean_r@1", "above", 3.0, "good"),
    ],
)
def test_a_verdict_knows_which_direction_is_better(metric: str, verdict: str, difference: float, tone: str) -> None:
    sentence = comparison_verdict(comparison({"contrasts": [contrast(metric, verdict, difference)]}))[-1]
    assert sentence.tone == tone
    assert ("lower is better" in sentence.text) == ("rank" in metric)
    assert tone_of(difference > 0, metric) == tone


def test_the_best_rank_is_the_lowest() -> None:
    metric = "retrieval.t2i.median_rank"
    rows = [{"row": name, "metrics": {metric: {"summary": {"mean": mean}}}} for name, mean in (("a", 4.0), ("b", 9.0))]
    first, *_ = comparison_verdict(comparison({"metrics": [metric], "rows": rows}))
    assert first.text.startswith("a has the lowest t2i median rank of the trained arms: 4.0")


def arm(name: str, *values: float) -> dict[str, Any]:
    kept = {str(seed): value for seed, value in enumerate(values)}
    summary = {"mean": sum(values) / len(values)}
    return {"row": name, "metrics": {"retrieval.mean_r@1": {"summary": summary, "values": kept}}}


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ((0.12, 0.20), (0.08, 0.16), "is the same in all 2 seeds, which show no spread"),
        ((0.10, 0.22), (0.16, 0.08), "is not resolved: 95 % interval"),
        ((9.0,), (4.0,), "is of one seed, so chance is not excluded"),
        ((9.0, 9.1, 9.2), (4.0, 4.2, 4.1), ""),
    ],
)
def test_the_best_arm_is_praised_only_where_seeds_tell_it_apart(
    first: tuple[float, ...], second: tuple[float, ...], told: str
) -> None:
    table = {"metrics": ["retrieval.mean_r@1"], "rows": [arm("a", *first), arm("b", *second)]}
    sentence, *_ = comparison_verdict(comparison(table))
    assert "a has the highest mean R@1 of the trained arms: " in sentence.text
    assert told in sentence.text
    assert (sentence.tone == "bad") == bool(told)


# ------------------------------------------------------------------------------------------------ test data


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pictures(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, source: str) -> Path:
    run = write_run(tmp_path_factory.mktemp("runs") / "run", source=source)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["more_teachers"] = {"second": {"name": "tiny:debug"}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


@pytest.mark.parametrize(("val", "split"), [("scenes?length=6", "test"), ("scenes@test?length=6", "val")])
def test_test_data_stay_shut_unless_they_are_named(run: Path, tmp_path: Path, val: str, split: str) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    before = (run / "config.yaml").read_text()
    config["data"]["val"] = val
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    try:
        page = write_report([run], tmp_path / "r.html", gallery=1, split=split).read_text(encoding="utf-8")
    finally:
        (run / "config.yaml").write_text(before)
    assert "is test data" in page
    assert 'id="gallery"' not in page
    page = write_report([run], tmp_path / "r.html", gallery=1, split=split, data=val).read_text(encoding="utf-8")
    assert "The gallery shows test data (scenes/standard/test)" in page
    assert 'id="gallery"' in page


def test_further_teachers_and_unread_pictures_are_told(run: Path, source: str, tmp_path: Path) -> None:
    lines = Path(source.removeprefix("jsonl:")).read_text().splitlines(keepends=True)
    cut = tmp_path / "cut.png"
    cut.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    broken = json.dumps({"image": str(cut), "caption": "red cat"}) + "\n"
    (tmp_path / "val.jsonl").write_text("".join([broken, *lines]))
    page = write_report([run], tmp_path / "r.html", gallery=1, data=f"jsonl:{tmp_path / 'val.jsonl'}").read_text()
    assert "The teacher second is not in it" in page
    assert "embedded all 17 pictures" in page
    skipped = json.loads((run / "metrics.json").read_text())["student"]["scored"]["skipped"]  # with hostile texts
    assert f"Pictures that could not be read: {skipped + 1}." in page


def test_out_replaces_pages_only_and_gallery_0_takes_no_data(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is there and is no page"):
        write_report([run], run / "metrics.json", gallery=0)
    assert json.loads((run / "metrics.json").read_text())["student"]
    with pytest.raises(ConfigError, match="--gallery 0"):
        write_report([run], tmp_path / "r.html", gallery=0, data="scenes")
    assert write_report([run], tmp_path / "new", gallery=0).is_file()


def test_confusions_are_as_large_as_the_mistakes() -> None:
    labels, predicted = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([9, 9, 1, 0, 2])
    assert _wrong(labels, predicted, 100_000) == {(0, 9): 2, (2, 0): 1}


# ------------------------------------------------------------------------------------------------ exports and sizes


def export(manifest: dict[str, Any], **parity: Any) -> ExportFolder:
    form = manifest.get("form", "onnx")
    files = [
        {"file": f"{form}/{tower}.x", "tower": tower, "precision": "fp32", "bytes": 1e6, "milliseconds": 1.0}
        for tower in ("vision_model", "text_model")
    ]
    return ExportFolder(Path("out/first"), manifest, {"files": files, "scores": None} | parity, ())


def run_named(path: str) -> RunFolder:
    return RunFolder(Path(path), {}, {}, {}, (), (), (), ())


def test_the_command_of_an_export_is_whole_or_is_not_given() -> None:
    narrow = {"model": "first", "precisions": ["fp32", "fp16"], "embed_dim": 64}
    narrow["narrowed"] = {"from": 512, "rotated_on": "scenes/standard/train"}
    made = export(narrow, accepted_loss=2.5, scored_on="jsonl:val.jsonl")
    assert _again_exported(made, [run_named("runs/first")]) == (
        "cmapkd export runs/first --out out/first-again --to onnx --precision fp32,fp16 --dims 64 --accept-loss 2.5 "
        "--data jsonl:val.jsonl --calibrate scenes:standard@train"
    )
    assert _again_exported(made, []) is None  # of the model the last part of its path is known
    runs = [run_named("runs/first")]
    assert _again_exported(export(narrow | {"precisions": ["int8-calibrated"], "narrowed": None}), runs) is None
    assert _again_exported(export({"model": "first"}, scored_on="a data set"), runs) is None
    other = export({"model": "hf:me/model", "form": "openvino"})
    assert _again_exported(other, []) == "cmapkd export hf:me/model --out out/first-again --to openvino"


@pytest.mark.parametrize("form", ["onnx", "openvino", "executorch"])
def test_each_runtime_is_called_by_its_name(form: str, tmp_path: Path) -> None:
    manifest = {"model": "a", **({} if form == "onnx" else {"form": form})}
    (tmp_path / "export.json").write_text(json.dumps(manifest))
    (tmp_path / "parity.json").write_text(json.dumps(export(manifest).parity))
    data = read_paths([tmp_path])
    told = " ".join(each.text for each in cost_blocks(measured_models(data, [])) if isinstance(each, Paragraph))
    assert ("onnxruntime" in told) == (form == "onnx")
    assert ("OpenVINO had one thread" in told) == (form == "openvino")
    assert ("ExecuTorch" in told) == (form == "executorch")
    advice = [each.text for each in export_blocks(data.exports) if isinstance(each, Paragraph)]
    assert any("--data" in each for each in advice) == (form == "onnx")


def test_tables_are_split_by_what_was_scored_and_files_have_their_own_size(tmp_path: Path) -> None:
    models = {
        name: {"zero_shot": {"top1": 50.0}, "params": 1_000_000, "scored": {"images": images, "captions": 0}}
        for name, images in (("onnx:a@int8", 300), ("b", 1_000), ("onnx:c@int8", 1_000))
    }
    models["onnx:a@int8"]["efficiency"] = {"file_bytes": {"files": 1_100_000}}
    (tmp_path / "s.json").write_text(json.dumps({"data": "val", "models": models}))
    found = measured_models(read_paths([tmp_path / "s.json"]), [])
    assert [each.megabytes for each in found] == [1.1, 4.0, None]
    captions = [each.caption for each in score_blocks(found) if isinstance(each, Table)]
    assert captions == ["Scores on val: 300 images", "Scores on val: 1,000 images"]
