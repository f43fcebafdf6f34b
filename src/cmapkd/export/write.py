"""`export`: a model as files for other tools, compared with the model before the folder gets its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

import cmapkd
from cmapkd.cache.identity import weight_hash
from cmapkd.config import ConfigError
from cmapkd.data.open import open_source, split_of
from cmapkd.data.types import Source
from cmapkd.export.calibration import Calibration, calibrate
from cmapkd.export.card import write_card
from cmapkd.export.extras import need_onnx
from cmapkd.export.folder import refuse_existing, whole_folder, write_json, write_manifest
from cmapkd.export.layout import (
    metadata_of,
    tokenizer_differences,
    write_config,
    write_preprocessor,
    write_tokenizer,
)
from cmapkd.export.licence import Licence, licence_of
from cmapkd.export.origin import Origin
from cmapkd.export.overflow import check_fp16
from cmapkd.export.parity import (
    LIMITS,
    ParityChecker,
    judge,
    judge_scores,
    score_losses,
    scores_of,
)
from cmapkd.export.precision import PRECISIONS, check_precisions, convert
from cmapkd.export.probes import draw_probes
from cmapkd.export.program import OPSET, graphs_of, write_graph
from cmapkd.export.runtime import GraphEncoder
from cmapkd.export.towers import text_rules
from cmapkd.models import DualEncoder
from cmapkd.models.base import eval_mode

TOWERS = ("vision_model", "text_model")


def export_onnx(
    model: DualEncoder,
    out: Path,
    *,
    origin: Origin,
    licence: Licence | None = None,
    precisions: Sequence[str] = ("fp32",),
    data: Source | None = None,
    calibration: Source | None = None,
    accept_loss: float | None = None,
) -> dict[str, Any]:
    """Writes both towers as ONNX files in transformers.js' layout, and compares every file with the model.

    Args:
        model: on the CPU; it is left as it was.
        out: a new folder.
        precisions: of `PRECISIONS`; fp32 is always written.
        data: a validation source, on which retrieval and zero-shot of the files are measured beside the model's;
            None: embeddings alone are compared, on pictures of the built-in world.
        calibration: training data for int8-calibrated.
        accept_loss: percent of a cosine, and points of a score, that a file may lose; None: see `LIMITS`.
    Returns:
        What `parity.json` holds.
    Raises:
        ConfigError: a wrong setting, or `out` is there already.
        ValueError: a tower cannot be captured, or a file is too far from the model; nothing is left then.
    """
    need_onnx()
    refuse_existing(out)
    names = _checked(precisions, calibration, accept_loss)
    licence = licence or licence_of(origin.teachers, None)
    with eval_mode(model):
        probes = draw_probes(data if data is not None else open_source("scenes", split="val"))
        checker = ParityChecker(model, probes)
        ranges = None if calibration is None else calibrate(model, calibration)
        with whole_folder(out) as folder:
            odd = _write_beside(model, folder, [text for _, text in probes.texts])
            if ranges is not None:
                write_json(folder / "calibration.json", ranges.plain())
            _write_fp32(model, folder, origin, licence)
            files = _compare_files(folder, names, checker, ranges, accept_loss, scored=data is not None)
            scores = _compare_scores(model, folder, names, data, accept_loss)
            parity = {
                "files": files,
                "scores": scores,
                "scored_on": None if data is None else data.name,
                "compared_on": {"pictures": len(probes.pictures), "texts": len(probes.texts)},
                "accepted_loss": accept_loss,
                "limits": {name: asdict(LIMITS[name]) for name in names},
                "texts_with_other_ids": odd,
            }
            write_json(folder / "parity.json", parity)
            told: dict[str, Any] = {"scores": scores, "scored_on": parity["scored_on"], "files": files}
            write_card(model, folder, form="onnx", origin=origin, licence=licence, accepted=accept_loss, **told)
            write_manifest(folder, _facts(model, origin, names))
    return parity


def _checked(precisions: Sequence[str], calibration: Source | None, accept_loss: float | None) -> tuple[str, ...]:
    """The precisions to write.

    Raises:
        ConfigError: a setting is wrong, or would be ignored.
    """
    names = check_precisions(precisions)
    if accept_loss is not None and not 0 < accept_loss < 100:
        raise ConfigError(f"--accept-loss {accept_loss:g}: a loss is in percent, above 0 and below 100")
    if calibration is not None and "int8-calibrated" not in names:
        raise ConfigError("a calibration set is read by int8-calibrated only: name that precision too")
    if calibration is None and "int8-calibrated" in names:
        raise ConfigError("int8-calibrated measures the ranges of activations: name training data with --calibrate")
    return names


def _write_beside(model: DualEncoder, folder: Path, texts: Sequence[str]) -> list[str]:
    """Tokenizer, preprocessor and config. Returns those of `texts` that other tools turn into other ids.

    Raises:
        ValueError: most of them are.
    """
    (folder / "onnx").mkdir()
    write_tokenizer(model, folder)
    write_preprocessor(model.image_spec, folder)
    write_config(model, folder)
    odd = tokenizer_differences(model, folder, texts)
    if 2 * len(odd) > len(texts):  # a few odd texts may differ: not every cleaning has a form in the file
        raise ValueError(f"the written tokenizer gives other ids than the model's, for example for {odd[0]!r}")
    return odd


def _write_fp32(model: DualEncoder, folder: Path, origin: Origin, licence: Licence) -> None:
    rules = text_rules(model)
    more = {
        "version": cmapkd.__version__,
        "license": licence.front_matter,
        "weights": weight_hash(model),
        "tokenizer_sha256": sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
        "text_length": "2 to context_length" if rules.any_length else "context_length",
        "end_token_id": str(rules.end_id),
    }
    for tower, graph in graphs_of(model).items():
        metadata = metadata_of(model, tower=tower, teachers=origin.teachers, more=more)
        path = folder / "onnx" / f"{tower}.onnx"
        write_graph(graph, path, longest=model.tokenizer.context_length, metadata=metadata)


def _compare_files(
    folder: Path,
    names: Sequence[str],
    checker: ParityChecker,
    calibration: Calibration | None,
    accept_loss: float | None,
    *,
    scored: bool,
) -> list[dict[str, Any]]:
    """Writes the further precisions, and judges each file; a row for each."""
    rows = []
    for name in names:
        for tower in TOWERS:
            whole = folder / "onnx" / f"{tower}.onnx"
            path = whole.with_name(f"{tower}{PRECISIONS[name]}.onnx")
            inside = {}
            if name == "fp16":
                inside["largest_inside"] = checker.largest_inside(tower, whole)
                check_fp16(tower, inside["largest_inside"])
            if path != whole:
                convert(name, whole, path, calibration)
            parity = checker.compare(tower, path)
            judge(path.name, name, parity, LIMITS[name].loosened(accept_loss), scored=scored)
            described = {"file": f"onnx/{path.name}", "tower": tower, "precision": name, "bytes": path.stat().st_size}
            rows.append(described | inside | parity.plain())
    return rows


def _compare_scores(
    model: DualEncoder, folder: Path, names: Sequence[str], data: Source | None, accept_loss: float | None
) -> dict[str, dict[str, Any]] | None:
    """Scores of the model (`torch`) and of each precision; None without data."""
    if data is None:
        return None
    scores = {"torch": scores_of(model, data)}
    for name in names:
        vision, text = (folder / "onnx" / f"{tower}{PRECISIONS[name]}.onnx" for tower in TOWERS)
        scores[name] = scores_of(GraphEncoder(model, vision, text), data)
        losses = score_losses(scores["torch"], scores[name])
        judge_scores(name, losses, LIMITS[name].loosened(accept_loss), data.name)
    return scores


def _facts(model: DualEncoder, origin: Origin, names: Sequence[str]) -> dict[str, Any]:
    """What the manifest says besides the files."""
    import onnx
    import onnxruntime

    rules = text_rules(model)
    return {
        "exporter": {
            "cmapkd": cmapkd.__version__,
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "opset": OPSET,
        },
        "model": origin.name,
        "teachers": list(origin.teachers),
        "precisions": list(names),
        "image_size": model.image_spec.size,
        "context_length": model.tokenizer.context_length,
        "text_length": "any up to context_length" if rules.any_length else "always context_length",
        "normalized": False,
    }


def open_validation(spec: str, split: str) -> Source:
    """The source that files are scored on.

    Raises:
        ConfigError: it is a test split, which is read by nobody who chooses; a precision is chosen here.
    """
    named = split_of(spec, default=split)
    if named is not None and named.startswith("test"):
        raise ConfigError(f"--data {spec!r} reads the split {named!r}: precisions are chosen on validation data")
    return open_source(spec, split=split)
