"""Exported files beside the model: cosines, errors, sizes, latency, and what their scores lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cmapkd.evaluation.headline import headlines
from cmapkd.report.blocks import Block, Cell, Details, Paragraph, Remarks, Table
from cmapkd.report.plain import mapping, number, sequence, string, whole
from cmapkd.report.read import ExportFolder

SCORED = "onnx"  # the form whose files cmapkd export scores; the others are compared by their embeddings alone


def export_blocks(exports: Sequence[ExportFolder]) -> list[Block]:
    """How far each file lies from the model."""
    blocks: list[Block] = []
    for export in exports:
        files = [each for each in sequence(export.parity, "files") if isinstance(each, Mapping)]
        if not files:
            blocks.append(Paragraph(f"{export.name} has no parity.json that can be read: export it again.", "bad"))
            continue
        blocks.append(_parity_table(export, files))
        blocks += _score_losses(export)
        if export.form == SCORED and not mapping(export.parity, "scores"):
            blocks.append(
                Paragraph(f"{export.name} was compared without data: add --data SOURCE to cmapkd export.", "quiet")
            )
        if odd := [str(each)[:80] for each in sequence(export.parity, "texts_with_other_ids")]:
            blocks.append(Details(f"{len(odd)} texts that its tokenizer reads otherwise", [Remarks(odd[:20])]))
    return blocks


def _parity_table(export: ExportFolder, files: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for each in files:
        name = string(each, "file") or f"{string(each, 'tower')} tower"
        cosine, error = number(each, "cosine_min"), number(each, "largest_error")
        noise, batches = number(each, "noise_to_spread"), number(each, "between_batches")
        size, ms = number(each, "bytes"), number(each, "milliseconds")
        sha = string(export.manifest, "files", name, "sha256")
        rows.append(
            [
                Cell(name),
                Cell(string(each, "precision") or "-"),
                Cell("-" if size is None else f"{size / 1e6:.2f}", size),
                Cell("-" if cosine is None else f"{cosine:.6f}", cosine),
                *(Cell("-" if value is None else f"{value:.1e}", value) for value in (error, noise, batches)),
                Cell("-" if ms is None else f"{ms:.2f}", ms),
                Cell("-" if sha is None else sha[:12]),
            ]
        )
    pictures, texts = (whole(export.parity, "compared_on", key) for key in ("pictures", "texts"))
    compared = f"{pictures or '?'} pictures and {texts or '?'} texts"
    heads = ["file", "precision", "MB", "lowest cosine", "largest error", "noise / spread", "between batches", "ms"]
    note = "Every file was loaded in its own runtime and embeds as the model does, within the limits of cmapkd export."
    return Table(f"{export.name}: files beside the model, on {compared}", [*heads, "sha256"], rows, words=2, note=note)


def _score_losses(export: ExportFolder) -> list[Block]:
    """Scores of each precision minus those of the model."""
    scores = mapping(export.parity, "scores")
    reference = headlines(mapping(scores, "torch"))
    rows = []
    for precision in scores:
        own = headlines(mapping(scores, precision))
        cells = [Cell("model in torch" if precision == "torch" else precision)]
        for task in reference:
            value = own[task][1] if task in own else None
            lost = None if value is None or precision == "torch" else value - reference[task][1]
            cells.append(
                Cell("-" if value is None else f"{value:.2f}", value, "" if lost is None else f"{lost:+.2f} points")
            )
        rows.append(cells)
    if not reference:
        return []
    heads = ["precision", *(headline.head for headline, _ in reference.values())]
    return [Table(f"{export.name}: scores on {string(export.parity, 'scored_on') or 'unnamed data'}", heads, rows)]
