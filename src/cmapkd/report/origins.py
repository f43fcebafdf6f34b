"""Where the numbers of a page come from: data, settings, versions, and the commands that give them again."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import yaml

from cmapkd.config import redact
from cmapkd.data.open import KINDS
from cmapkd.report.arms import Arm, listed
from cmapkd.report.blocks import Block, Cell, Code, Details, Paragraph, Remarks, Table
from cmapkd.report.plain import mapping, number, sequence, shortened, string, whole
from cmapkd.report.read import ComparisonFolder, ExportFolder, ReportData, RunFolder, model_name

_FIRST = 20  # bad samples that are named
_LINES = 400  # of a config that is shown


def data_blocks(runs: Sequence[RunFolder]) -> list[Block]:
    """What was trained and measured on, and what could not be read."""
    blocks: list[Block] = []
    rows = []
    for run in runs:
        data = mapping(run.config, "data")
        rows.append(
            [
                Cell(run.name),
                *(Cell(string(data, name) or "-") for name in ("train", "val", "test")),
                Cell(string(run.metrics, "evaluated_on") or "-"),
            ]
        )
    if rows:
        blocks.append(Table("Sources", ["run", "train", "val", "test", "scores are of"], rows, words=5))
    for run in runs:
        blocks += _bad(run)
    return blocks


def _bad(run: RunFolder) -> list[Block]:
    """Samples that could not be read: how many of how many, kinds, and the first ids with reasons."""
    counted = mapping(run.metrics, "bad_samples")
    first = [(string(each, "id") or "?", string(each, "reason") or "unknown") for each in run.bad[:_FIRST]]
    if not first:
        pairs = [sequence({"pair": each}, "pair") for each in sequence(counted, "bad")]
        first = [(str(pair[0]), str(pair[1])[:280]) for pair in pairs if len(pair) == 2][:_FIRST]
    good, bad = whole(counted, "num_good"), whole(counted, "num_bad") or len(run.bad)
    if not bad:
        text = f"{run.name}: no sample was bad" + (f" of {good:,} that were read." if good else ".")
        return [Paragraph(text if run.finished else f"{run.name}: no bad samples are listed.", "quiet")]
    kinds = {kind: count for kind in mapping(counted, "kinds") if (count := whole(counted, "kinds", kind))}
    kinds = kinds or Counter((string(each, "reason") or "unknown").partition(":")[0] for each in run.bad)
    order = sorted(kinds.items(), key=lambda pair: (-pair[1], pair[0]))
    rows = [[Cell(shortened(kind, 80)), Cell(f"{count:,}", count)] for kind, count in order[:_FIRST]]
    of = f" of {good + bad:,}" if good is not None else ""
    listed_ids = [f"{_last_part(identity)}: {reason}" for identity, reason in first]
    return [
        Table(f"{run.name}: {bad:,} bad samples{of}, skipped", ["kind", "samples"], rows),
        Details(f"The first {len(first)}", [Remarks(listed_ids)]),
    ]


def _last_part(identity: str) -> str:
    """An id may be a path of somebody's disk."""
    return shortened(PurePosixPath(identity.replace("\\", "/")).name or identity, 80)


def origin_blocks(data: ReportData) -> list[Block]:
    """Versions, hardware, commit and settings of everything on the page."""
    blocks: list[Block] = []
    named = [(run.name, run.environment, run.config, run) for run in data.runs]
    rows = [_row(name, environment, config, run) for name, environment, config, run in named]
    for comparison in data.comparisons:
        rows.append(_row(comparison.name, mapping(comparison.results, "environment"), {}, None))
    for file in data.scores:
        rows.append(_row(file.name, mapping(file.content, "environment"), {}, None))
    for export in data.exports:
        exporter = mapping(export.manifest, "exporter")
        versions = ", ".join(f"{key} {string(value)}" for key, value in exporter.items())
        rows.append([Cell(export.name), Cell("-"), Cell("-"), Cell(shortened(versions, 120)), Cell("-"), Cell("-")])
    if rows:
        heads = ["path", "teacher", "seed, steps, batch", "versions", "hardware", "commit"]
        blocks.append(Table("Origins", heads, rows, words=6))
    for name, _, config, _ in named:
        if config:
            blocks.append(Details(f"{name}: config.yaml", [Code(_yaml(config))]))
    for comparison in data.comparisons:
        if declared := mapping(comparison.results, "comparison"):
            blocks.append(Details(f"{comparison.name}: comparison.yaml", [Code(_yaml(declared))]))
    return blocks


def _row(name: str, environment: Mapping[str, Any], config: Mapping[str, Any], run: RunFolder | None) -> list[Cell]:
    packages = mapping(environment, "packages")
    kept = [f"{key} {string(packages, key)}" for key in ("cmapkd", "torch") if string(packages, key)]
    python = string(environment, "python")
    hardware = listed(environment.get("gpus")) or [string(environment, "cpu") or string(environment, "platform") or "-"]
    training = "-"
    if run is not None:
        seed = whole(run.metrics, "seed") if run.finished else whole(config, "seed")
        steps, batch = (whole(run.metrics, key) for key in ("steps", "batch_size"))
        seconds = number(run.metrics, "train_seconds")
        parts = [f"seed {seed}", f"{steps} steps", f"batch {batch}", f"{(seconds or 0) / 60:.1f} min"]
        given = (seed, steps, batch, seconds)
        training = ", ".join(part for part, value in zip(parts, given, strict=True) if value is not None) or "-"
    return [
        Cell(name),
        Cell(model_name(config, "teacher") or "-"),
        Cell(training),
        Cell(", ".join([*kept, *([f"Python {python}"] if python else [])]) or "-"),
        Cell(", ".join(dict.fromkeys(hardware))),
        Cell(_commit(environment)),
    ]


def _commit(environment: Mapping[str, Any]) -> str:
    commit = string(environment, "git_commit")
    if commit is None:
        return "-"
    return commit[:12] + ("+changes" if commit.endswith("+changes") else "")


def _yaml(values: Mapping[str, Any]) -> list[str]:
    """Settings as lines, with what looks like a secret removed."""
    try:
        written = yaml.safe_dump(_redacted(dict(values)), sort_keys=False, allow_unicode=True, width=110)
    except (yaml.YAMLError, RecursionError):
        return ["(these settings cannot be written)"]
    texts = [shortened(line, 200) for line in written.splitlines()]
    return [*texts[:_LINES], f"# and {len(texts) - _LINES} lines more"] if len(texts) > _LINES else texts


def _redacted(value: Any, key: str = "") -> Any:
    if isinstance(value, Mapping):
        return {str(name): _redacted(each, str(name)) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(each, key) for each in value]
    if isinstance(value, str):
        return redact(f"{key}={value}").removeprefix(f"{key}=")
    return value if isinstance(value, int | float | bool | None) else str(value)


def reproduce_blocks(data: ReportData, arms: Sequence[Arm], command: Sequence[str]) -> list[Block]:
    """Commands as they were given, from the folders alone, and of this page."""
    given: list[str] = []
    for environment in [
        *(run.environment for run in data.runs),
        *(mapping(comparison.results, "environment") for comparison in data.comparisons),
        *(mapping(file.content, "environment") for file in data.scores),
    ]:
        words = [each if isinstance(each, str) else "" for each in sequence(environment, "command")]
        if words:
            words = ["cmapkd" if PurePosixPath(words[0]).name in ("__main__.py", "-m", "") else words[0], *words[1:]]
            given.append(shortened(shlex.join(map(redact, words)), 2_000))
    again = [_again(run) for arm in arms for run in arm.runs if run.config]
    again += [_again_compared(comparison) for comparison in data.comparisons]
    exported = {export.name: _again_exported(export, data.runs) for export in data.exports}
    again += filter(None, exported.values())
    blocks: list[Block] = []
    if given:
        blocks.append(Code(list(dict.fromkeys(given)), "As it was started", copy=True))
    if again:
        blocks.append(Code(list(dict.fromkeys(again)), "From what the folders hold", copy=True))
    unknown = [name for name, line in exported.items() if line is None]
    blocks += [
        Paragraph(f"{name}: the export does not tell where its model or its data lay, so no command is given.", "quiet")
        for name in unknown
    ]
    return [*blocks, Code([shlex.join(command)], "This page", copy=True)]


def _again(run: RunFolder) -> str:
    return shlex.join(["cmapkd", "distill", str(run.path / "config.yaml"), "--out", f"{run.path}-again"])


def _again_compared(comparison: ComparisonFolder) -> str:
    path = comparison.path
    return shlex.join(["cmapkd", "compare", str(path / "comparison.yaml"), "--out", f"{path}-again"])


def _again_exported(export: ExportFolder, runs: Sequence[RunFolder]) -> str | None:
    """The command of an export; None where its files do not tell the model's place, or what data were read."""
    model = _place_of(string(export.manifest, "model") or "", runs)
    precisions = listed(export.manifest.get("precisions")) or ["fp32"]
    data = string(export.parity, "scored_on")
    calibration = string(export.manifest, "narrowed", "rotated_on") or string(export.parity, "embeddings", "rotated_on")
    read = {"--data": data, "--calibrate": calibration}
    sources = {key: _source_named(name) for key, name in read.items() if name is not None}
    if model is None or None in sources.values() or ("int8-calibrated" in precisions and calibration is None):
        return None
    words = ["cmapkd", "export", model, "--out", f"{export.path}-again", "--to", export.form]
    words += ["--precision", ",".join(precisions)] if export.form == "onnx" else []
    given = {
        "--dims": whole(export.manifest, "embed_dim") if mapping(export.manifest, "narrowed") else None,
        "--accept-loss": string(export.parity, "accepted_loss"),
        **sources,
    }
    return shlex.join(words + [word for key, value in given.items() if value is not None for word in (key, str(value))])


def _place_of(model: str, runs: Sequence[RunFolder]) -> str | None:
    """A manifest names no folders: a run on this page of that name, or a name that no folder was cut off."""
    paths = [str(run.path) for run in runs if run.name == model]
    if paths:
        return paths[0] if len(paths) == 1 else None
    family, colon, rest = model.partition(":")
    return model if colon and (family == "tiny" or "/" in rest) else None


def _source_named(name: str) -> str | None:
    """The source that bears a name, where the name tells it: `scenes/standard/val` is `scenes:standard@val`."""
    kind, *parts = name.split("/")
    if kind == "scenes" and len(parts) == 2:
        return f"scenes:{parts[0]}@{parts[1]}"
    return name if name.partition(":")[0] in KINDS and ":" in name else None
