"""`cmapkd export`: a model as files for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cmapkd.cli.command import tell_start


def export(
    model: Annotated[str, typer.Argument(help="A run folder, a model folder, or a name such as tiny:scenes-teacher.")],
    out: Annotated[Path, typer.Option(help="A new folder.")],
    to: Annotated[
        str,
        typer.Option(
            help="onnx: two graphs in transformers.js' layout; openvino, executorch: files of that runtime; "
            "transformers, open_clip: a folder that the library loads."
        ),
    ] = "onnx",
    precision: Annotated[
        str, typer.Option(help="Comma-separated: fp32, fp16, int8-weights, int8-calibrated. fp32 is always written.")
    ] = "fp32",
    data: Annotated[
        str | None, typer.Option(help="Validation source: retrieval and zero-shot of each file beside the model's.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a source that has several.")] = "val",
    calibrate: Annotated[
        str | None, typer.Option(help="Training data: ranges of int8-calibrated, rotation of short embeddings.")
    ] = None,
    dims: Annotated[
        int | None, typer.Option(help="Cut embeddings to so many numbers, rotated first where --calibrate is given.")
    ] = None,
    accept_loss: Annotated[
        float | None, typer.Option(help="Percent of a cosine, and points of a score, that a file may lose.")
    ] = None,
    licence: Annotated[str | None, typer.Option("--license", help="The hub's name of the model's licence.")] = None,
) -> None:
    """Write a model for other tools, and prove that it gives the same embeddings there."""
    from rich.console import Console

    from cmapkd.config import ConfigError

    if to == "hub":
        raise ConfigError(f"every exported folder is ready for the hub: export, then: hf upload OWNER/NAME {out}")
    if to not in _FORMS:
        raise ConfigError(f"there is no form {to!r} to export to: {', '.join(_FORMS)}")
    if to != "onnx" and (precision != "fp32" or calibrate is not None or dims is not None):
        raise ConfigError(
            "--precision, --calibrate or --dims is for --to onnx: other forms get the weights as they are"
        )
    if to in ("transformers", "open_clip") and accept_loss is not None:
        raise ConfigError("--accept-loss is for files of a runtime: libraries get the weights as they are")

    tell_start(f"exporting {model} to {out}: starting PyTorch")
    from cmapkd.api import load
    from cmapkd.export.calibration import open_calibration
    from cmapkd.export.folder import refuse_existing
    from cmapkd.export.library import export_library
    from cmapkd.export.licence import licence_of
    from cmapkd.export.origin import origin_of, teachers_of
    from cmapkd.export.program import need_onnx
    from cmapkd.export.runtimes import RUNTIMES, export_runtime, need_runtime
    from cmapkd.export.write import export_onnx, open_validation
    from cmapkd.models.contracts import both_towers

    refuse_existing(out)
    if to == "onnx":
        need_onnx()
    elif to in RUNTIMES:
        need_runtime(to)
    terms = licence_of(teachers_of(model), licence)
    source = None if data is None else open_validation(data, split)
    read = both_towers(load(model), "cmapkd export")
    tell_start(f"writing {to} ({precision}) and comparing every file with {model}; large models take minutes")
    known: dict[str, Any] = {"origin": origin_of(model), "licence": terms, "data": source}
    if to == "onnx":
        names = [name.strip() for name in precision.split(",")]
        ranges = None if calibrate is None else open_calibration(calibrate)
        settings: dict[str, Any] = {"precisions": names, "calibration": ranges, "dims": dims}
        parity = export_onnx(read, out, accept_loss=accept_loss, **settings, **known)
    elif to in RUNTIMES:
        parity = export_runtime(read, out, form=to, accept_loss=accept_loss, **known)
    else:
        parity = export_library(read, out, form="open_clip" if to == "open_clip" else "transformers", **known)
    told = [*map(_line, parity["files"]), *_score_lines(parity)]
    told += [f"licence: {terms.warning}"] if terms.warning else []
    for line in (*told, f"files and their hashes: {out}"):
        Console().print(line, markup=False, highlight=False, soft_wrap=True)


_FORMS = ("onnx", "openvino", "executorch", "transformers", "open_clip")


def _line(row: dict[str, Any]) -> str:
    close = f"lowest cosine {row['cosine_min']:.6f}, largest error {row['largest_error']:.1e}"
    if "file" not in row:
        return f"{row['tower']} tower as the library loads it: {close}"
    precision = f" in {row['computed_in']}, as the runtime chooses" if row["precision"] == "default" else ""
    return f"{row['file']}{precision}: {row['bytes'] / 1e6:.2f} MB, {close}, {row['milliseconds']:.2f} ms"


def _score_lines(parity: dict[str, Any]) -> list[str]:
    from cmapkd.evaluation.headline import headlines

    lines = []
    for name, scores in (parity["scores"] or {}).items():
        told = ", ".join(f"{headline.head} {number:.2f}" for headline, number in headlines(scores).values())
        lines.append(f"{name}: {told} on {parity['scored_on']}")
    for row in (parity.get("embeddings") or {"rows": []})["rows"]:
        forms = (f"{form} {each['recall@1']:.2f} ({each['bytes']} bytes)" for form, each in row["forms"].items())
        lines.append(f"embeddings of {row['width']}{', rotated' if row['rotated'] else ''}: R@1 {', '.join(forms)}")
    return lines
