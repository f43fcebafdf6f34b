"""`--to onnx`: a model as ONNX files, compared with the model before the folder gets its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cmapkd
from cmapkd.cache.identity import weight_hash
from cmapkd.config import ConfigError
from cmapkd.data.open import open_source, split_of
from cmapkd.data.types import Source
from cmapkd.evaluation.efficiency import TEXTS, count_macs, parameter_counts
from cmapkd.evaluation.embed import embed
from cmapkd.export.calibration import Calibration, calibrate
from cmapkd.export.card import write_card
from cmapkd.export.folder import refuse_existing, whole_folder, write_json, write_manifest
from cmapkd.export.layout import (
    metadata_of,
    tokenizer_differences,
    write_config,
    write_preprocessor,
    write_tokenizer,
)
from cmapkd.export.licence import Licence, licence_of
from cmapkd.export.narrow import Narrowed, rotation_of
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
from cmapkd.export.program import OPSET, graphs_of, need_onnx, write_graph
from cmapkd.export.stored import stored_rows
from cmapkd.export.towers import exportable, text_rules
from cmapkd.models import DualEncoder
from cmapkd.models.base import eval_mode
from cmapkd.models.onnx_family import GraphEncoder

TOWERS = ("vision_model", "text_model")


def export_onnx(
    model: DualEncoder,
    out: str | Path,
    *,
    origin: Origin,
    licence: Licence | None = None,
    precisions: Sequence[str] = ("fp32",),
    data: Source | None = None,
    calibration: Source | None = None,
    dims: int | None = None,
    accept_loss: float | None = None,
) -> dict[str, Any]:
    """Writes both towers as ONNX files in transformers.js' layout, and compares every file with the model.

    Args:
        model: on the CPU; it is left as it was.
        out: a new folder.
        precisions: of `PRECISIONS`; fp32 is always written.
        data: a validation source, on which retrieval and zero-shot of the files are measured beside the model's;
            None: embeddings alone are compared, on pictures of the built-in world.
        calibration: training data, for the ranges of int8-calibrated and the rotation of short embeddings.
        dims: numbers that each embedding is cut to, rotated first where there is `calibration`; None: all.
        accept_loss: percent of a cosine, and points of a score, that a file may lose; None: see `LIMITS`.
    Returns:
        What `parity.json` holds.
    Raises:
        ConfigError: a wrong setting, or `out` is there already.
        ValueError: a tower cannot be captured, or a file is too far from the model; nothing is left then.
    """
    need_onnx()
    out = Path(out)
    refuse_existing(out)
    names = _checked(precisions, calibration, accept_loss, reads_training=dims is not None or data is not None)
    if dims is not None and not 0 < dims <= model.embed_dim:
        raise ConfigError(f"--dims {dims}: the embeddings of {model.name} have {model.embed_dim} numbers")
    licence = licence or licence_of(origin.teachers, None)
    with eval_mode(model):
        rotation = _rotation(model, calibration, data, dims)
        cut = model if dims is None else Narrowed(model, dims, rotation).eval()
        probes = draw_probes(data if data is not None else open_source("scenes", split="val"))
        checker = ParityChecker(cut, probes)
        with whole_folder(out) as folder:
            odd = write_beside(cut, folder, [text for _, text in probes.texts])
            write_config(cut, folder)
            ranges = calibrate(cut, calibration) if calibration is not None and "int8-calibrated" in names else None
            if ranges is not None:
                write_json(folder / "calibration.json", ranges.plain())
            _write_fp32(cut, folder, origin, licence)
            files = _compare_files(folder, names, checker, ranges, accept_loss, scored=data is not None)
            facts = _facts(cut, origin, names)
            if dims is not None:
                facts["narrowed"] = {"from": model.embed_dim, "rotated_on": calibration.name if calibration else None}
            scores = _compare_scores(model, folder, facts, data, accept_loss)
            parity: dict[str, Any] = {
                "files": files,
                "scores": scores,
                "scored_on": None if data is None else data.name,
                "embeddings": None if data is None or dims is not None else _stored(model, data, rotation, calibration),
                "compared_on": {"pictures": len(probes.pictures), "texts": len(probes.texts)},
                "accepted_loss": accept_loss,
                "limits": {name: asdict(LIMITS[name]) for name in names},
                "texts_with_other_ids": odd,
            }
            write_json(folder / "parity.json", parity)
            told: dict[str, Any] = {key: parity[key] for key in ("scores", "scored_on", "files", "embeddings")}
            write_card(cut, folder, form="onnx", origin=origin, licence=licence, accepted=accept_loss, **told)
            write_manifest(folder, facts)
    return parity


def _rotation(model: DualEncoder, calibration: Source | None, data: Source | None, dims: int | None) -> Tensor | None:
    """Of short embeddings, where they are asked for, or measured beside others."""
    if calibration is None or (dims is None and data is None):
        return None
    try:
        return rotation_of(model, calibration)
    except ConfigError:  # too few samples
        if dims is not None:
            raise
        return None


def _checked(
    precisions: Sequence[str], calibration: Source | None, accept_loss: float | None, *, reads_training: bool
) -> tuple[str, ...]:
    """The precisions to write.

    Args:
        reads_training: whether a rotation is measured on the calibration set.
    Raises:
        ConfigError: a setting is wrong, or would be ignored.
    """
    names = check_precisions(precisions)
    check_loss(accept_loss)
    if calibration is not None and "int8-calibrated" not in names and not reads_training:
        raise ConfigError(
            "a calibration set is read by int8-calibrated only, and with --dims or --data for a rotation: name one"
        )
    if calibration is None and "int8-calibrated" in names:
        raise ConfigError("int8-calibrated measures the ranges of activations: name training data with --calibrate")
    return names


def check_loss(accept_loss: float | None) -> None:
    """Raises:
    ConfigError: it is no part of a whole.
    """
    if accept_loss is not None and not 0 < accept_loss < 100:
        raise ConfigError(f"--accept-loss {accept_loss:g}: a loss is in percent, above 0 and below 100")


def write_beside(model: DualEncoder, folder: Path, texts: Sequence[str]) -> list[str]:
    """Tokenizer and preprocessor. Returns those of `texts` that other tools turn into other ids.

    Raises:
        ValueError: most of them are.
    """
    write_tokenizer(model, folder)
    write_preprocessor(model.image_spec, folder)
    odd = tokenizer_differences(model, folder, texts)
    if 2 * len(odd) > len(texts):  # a few odd texts may differ: not every cleaning has a form in the file
        raise ValueError(f"the written tokenizer gives other ids than the model's, for example for {odd[0]!r}")
    return odd


def metadata(model: DualEncoder, folder: Path, tower: str, origin: Origin, licence: Licence) -> dict[str, str]:
    """What a tower's file says of itself; the folder has the tokenizer already."""
    rules = text_rules(model)
    more = {
        "version": cmapkd.__version__,
        "license": licence.front_matter,
        "weights": weight_hash(model),
        "tokenizer_sha256": sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
        "text_length": "2 to context_length" if rules.any_length else "context_length",
        "end_token_id": str(rules.end_id),
    }
    return metadata_of(model, tower=tower, teachers=origin.teachers, more=more)


def _write_fp32(model: DualEncoder, folder: Path, origin: Origin, licence: Licence) -> None:
    (folder / "onnx").mkdir()
    for tower, graph in graphs_of(model).items():
        told = metadata(model, folder, tower, origin, licence)
        path = folder / "onnx" / f"{tower}.onnx"
        write_graph(graph, path, longest=model.tokenizer.context_length, metadata=told)


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
    model: DualEncoder, folder: Path, facts: dict[str, Any], data: Source | None, accept_loss: float | None
) -> dict[str, dict[str, Any]] | None:
    """Scores of the model (`torch`) and of each precision, through the folder's own tokenizer; None without data."""
    if data is None:
        return None
    scores = {"torch": scores_of(model, data)}
    for name in facts["precisions"]:
        scores[name] = scores_of(GraphEncoder(folder, name, facts, name=f"{model.name} {name}"), data)
        losses = score_losses(scores["torch"], scores[name])
        shown = f"{name} with {facts['embed_dim']} numbers" if "narrowed" in facts else name
        judge_scores(shown, losses, LIMITS[name].loosened(accept_loss), data.name)
    return scores


def _stored(
    model: DualEncoder, data: Source, rotation: torch.Tensor | None, calibration: Source | None
) -> dict[str, Any] | None:
    """What stored embeddings keep of the model's retrieval; None where the data have no captions."""
    found = embed(model, data, batch_size=64, device="cpu")
    if not len(found.texts):
        return None
    rotated_on = calibration.name if calibration is not None and rotation is not None else None
    return {"rows": stored_rows(found, rotation), "rotated_on": rotated_on}


def _facts(model: DualEncoder, origin: Origin, names: Sequence[str]) -> dict[str, Any]:
    """What the manifest says besides the files."""
    import onnx
    import onnxruntime

    return {
        "exporter": {
            "cmapkd": cmapkd.__version__,
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "opset": OPSET,
        },
        "precisions": list(names),
        "graphs": {name: {tower: f"onnx/{tower}{PRECISIONS[name]}.onnx" for tower in TOWERS} for name in names},
        "costs": _costs(model),
        **facts_of(model, origin),
    }


def facts_of(model: DualEncoder, origin: Origin) -> dict[str, Any]:
    """What every manifest with graphs says of its model."""
    return {
        "model": origin.name,
        "teachers": list(origin.teachers),
        "image_size": model.image_spec.size,
        "context_length": model.tokenizer.context_length,
        "text_length": "any up to context_length" if text_rules(model).any_length else "always context_length",
        "embed_dim": model.embed_dim,
        "normalized": False,
    }


def _costs(model: DualEncoder) -> dict[str, Any]:
    """Counts that nobody can read from a graph: as `efficiency` counts them for the model itself."""
    size, texts = model.image_spec.size, model.tokenizer(TEXTS[0])
    pixels, copy = torch.zeros(1, 3, size, size), exportable(model)  # the copy owns a text tower that is only borrowed
    runs = {"image": lambda: copy.encode_image(pixels), "text": lambda: copy.encode_text(texts)}
    counts = parameter_counts(copy, pixels, texts) | {"total": model.num_parameters()}
    return {"parameters": counts, "macs": {tower: count_macs(copy, run) for tower, run in runs.items()}}


def open_validation(spec: str, split: str) -> Source:
    """The source that files are scored on.

    Raises:
        ConfigError: it is a test split, which is read by nobody who chooses; a precision is chosen here.
    """
    named = split_of(spec, default=split)
    if named is not None and named.startswith("test"):
        raise ConfigError(f"--data {spec!r} reads the split {named!r}: precisions are chosen on validation data")
    return open_source(spec, split=split)
