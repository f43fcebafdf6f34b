"""`cmapkd export`: a model as files for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def export(
    model: Annotated[str, typer.Argument(help="A run folder, a model folder, or a name such as tiny:scenes-teacher.")],
    out: Annotated[Path, typer.Option(help="A new folder.")],
    to: Annotated[
        str,
        typer.Option(help="onnx: two graphs in transformers.js' layout; transformers, open_clip: a folder of each."),
    ] = "onnx",
    precision: Annotated[
        str, typer.Option(help="Comma-separated: fp32, fp16, int8-weights, int8-calibrated. fp32 is always written.")
    ] = "fp32",
    data: Annotated[
        str | None, typer.Option(help="Validation source: retrieval and zero-shot of each file beside the model's.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a source that has several.")] = "val",
    calibrate: Annotated[
        str | None, typer.Option(help="Training data that int8-calibrated measures ranges on.")
    ] = None,
    accept_loss: Annotated[
        float | None, typer.Option(help="Percent of a cosine, and points of a score, that a file may lose.")
    ] = None,
    licence: Annotated[str | None, typer.Option("--license", help="The hub's name of the model's licence.")] = None,
) -> None:
    """Write a model for other tools, and prove that it gives the same embeddings there."""
    from rich.console import Console

    from cmapkd.config import ConfigError

    if to not in _FORMS:
        raise ConfigError(f"there is no form {to!r} to export to: {', '.join(_FORMS)}")
    if to != "onnx" and (precision != "fp32" or calibrate is not None or accept_loss is not None):
        raise ConfigError("--precision, --calibrate or --accept-loss is for --to onnx: libraries get the weights as is")

    from cmapkd.api import load
    from cmapkd.export.calibration import open_calibration
    from cmapkd.export.extras import need_onnx
    from cmapkd.export.folder import refuse_existing
    from cmapkd.export.library import export_library
    from cmapkd.export.licence import licence_of
    from cmapkd.export.origin import origin_of, teachers_of
    from cmapkd.export.write import export_onnx, open_validation

    refuse_existing(out)
    if to == "onnx":
        need_onnx()
    terms = licence_of(teachers_of(model), licence)
    source = None if data is None else open_validation(data, split)
    known: dict[str, Any] = {"origin": origin_of(model), "licence": terms, "data": source}
    if to == "onnx":
        names = [name.strip() for name in precision.split(",")]
        ranges = None if calibrate is None else open_calibration(calibrate)
        parity = export_onnx(load(model), out, precisions=names, calibration=ranges, accept_loss=accept_loss, **known)
    else:
        parity = export_library(load(model), out, form="open_clip" if to == "open_clip" else "transformers", **known)
    told = [*map(_line, parity["files"]), *_score_lines(parity)]
    told += [f"licence: {terms.warning}"] if terms.warning else []
    for line in (*told, f"files and their hashes: {out}"):
        Console().print(line, markup=False, highlight=False, soft_wrap=True)


_FORMS = ("onnx", "transformers", "open_clip")


def _line(row: dict[str, Any]) -> str:
    close = f"lowest cosine {row['cosine_min']:.6f}, largest error {row['largest_error']:.1e}"
    if "file" not in row:
        return f"{row['tower']} tower as the library loads it: {close}"
    return f"{row['file']}: {row['bytes'] / 1e6:.2f} MB, {close}, {row['milliseconds']:.2f} ms"


def _score_lines(parity: dict[str, Any]) -> list[str]:
    from cmapkd.evaluation.headline import headlines

    lines = []
    for name, scores in (parity["scores"] or {}).items():
        told = ", ".join(f"{headline.head} {number:.2f}" for headline, number in headlines(scores).values())
        lines.append(f"{name}: {told} on {parity['scored_on']}")
    return lines
