"""`--to openvino` and `--to executorch`: the towers through each runtime's own converter, compared in that runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import cmapkd
from cmapkd.config.extras import need_extra
from cmapkd.data.open import open_source
from cmapkd.data.types import Source
from cmapkd.export.card import write_card
from cmapkd.export.folder import refuse_existing, whole_folder, write_json, write_manifest
from cmapkd.export.licence import Licence, licence_of
from cmapkd.export.origin import Origin
from cmapkd.export.parity import LIMITS, ParityChecker, judge
from cmapkd.export.probes import draw_probes
from cmapkd.export.program import Graph, capture_errors, graphs_of, quietly, write_graph
from cmapkd.export.write import check_loss, facts_of, metadata, write_beside
from cmapkd.models import DualEncoder
from cmapkd.models.base import eval_mode
from cmapkd.models.errors import first_line

Convert = Callable[[Graph, Path, int, Mapping[str, str]], None]
"""Writes a tower as a file; given the longest text in tokens, and what the file says of itself."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """Where a form runs.

    Attributes:
        packages: of the extra of the same name, as they are imported.
        suffix: of a tower's file.
        one_by_one: whether a file takes one sample at a time, and texts of full length only.
        chooses: whether the runtime computes in another precision than float32 where nobody asks for one.
    """

    convert: Convert
    packages: tuple[str, ...]
    suffix: str
    one_by_one: bool
    chooses: bool


def export_runtime(
    model: DualEncoder,
    out: str | Path,
    *,
    form: str,
    origin: Origin,
    licence: Licence | None = None,
    data: Source | None = None,
    accept_loss: float | None = None,
) -> dict[str, Any]:
    """Writes both towers for a runtime of `RUNTIMES`, and compares each file with the model, in that runtime.

    Args:
        model: on the CPU; it is left as it was.
        out: a new folder.
        data: a source whose pictures and texts are compared; None: the built-in world's.
        accept_loss: percent of a cosine that a file may lose.
    Returns:
        What `parity.json` holds.
    Raises:
        ConfigError: a wrong setting, or `out` is there already.
        ValueError: a package is missing, a tower cannot be captured or converted, or a file is too far from the model;
            nothing is left then.
    """
    runtime = RUNTIMES[form]
    need_runtime(form)
    out = Path(out)
    refuse_existing(out)
    check_loss(accept_loss)
    licence = licence or licence_of(origin.teachers, None)
    probes = draw_probes(data if data is not None else open_source("scenes", split="val"))
    with eval_mode(model), whole_folder(out) as folder:
        checker = ParityChecker(model, probes, full_length=runtime.one_by_one)
        odd = write_beside(model, folder, [text for _, text in probes.texts])
        (folder / form).mkdir()
        files: list[dict[str, Any]] = []
        for tower, graph in graphs_of(model, full_length=runtime.one_by_one).items():
            path = folder / form / f"{tower}{runtime.suffix}"
            told = metadata(model, folder, tower, origin, licence)
            runtime.convert(graph, path, model.tokenizer.context_length, told)
            files += _compared(checker, tower, path, runtime, accept_loss)
        parity = {
            "files": files,
            "scores": None,
            "compared_on": {"pictures": len(probes.pictures), "texts": len(probes.texts)},
            "accepted_loss": accept_loss,
            "limits": {"fp32": asdict(LIMITS["fp32"])},
            "texts_with_other_ids": odd,
        }
        write_json(folder / "parity.json", parity)
        write_card(model, folder, form=form, origin=origin, licence=licence, files=files, accepted=accept_loss)
        versions = {"cmapkd": cmapkd.__version__, "torch": torch.__version__, form: version(form)}
        write_manifest(folder, {"exporter": versions, "form": form, **facts_of(model, origin)})
    return parity


def need_runtime(form: str) -> None:
    """Raises:
    ValueError: a package of the form is not installed.
    """
    need_extra(f"--to {form}", form, *RUNTIMES[form].packages)


def _compared(
    checker: ParityChecker, tower: str, path: Path, runtime: Runtime, accept_loss: float | None
) -> Sequence[dict[str, Any]]:
    """A row in float32, which is judged; and one in the precision that the runtime chooses, which is told."""
    described = {"file": f"{path.parent.name}/{path.name}", "tower": tower, "bytes": _bytes(path)}
    parity = checker.compare(tower, path)
    judge(path.name, "fp32", parity, LIMITS["fp32"].loosened(accept_loss))
    rows = [described | {"precision": "fp32"} | parity.plain()]
    if runtime.chooses:
        rows.append(described | {"precision": "default"} | checker.compare(tower, path, default=True).plain())
    return rows


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.stem}.*"))


def _to_openvino(graph: Graph, path: Path, longest: int, told: Mapping[str, str]) -> None:
    """`X.xml` and the weights in `X.bin`, float32; what the file says of itself is in `rt_info`."""
    import openvino

    with tempfile.TemporaryDirectory(prefix="cmapkd-openvino-") as folder:
        source = Path(folder, f"{path.stem}.onnx")
        write_graph(graph, source, longest=longest, metadata={})
        model = openvino.convert_model(str(source))
        for key, value in told.items():
            model.set_rt_info(value, key.split("."))
        openvino.save_model(model, str(path), compress_to_fp16=False)


def _to_executorch(graph: Graph, path: Path, longest: int, told: Mapping[str, str]) -> None:  # noqa: ARG001
    """A program for XNNPACK, which runs on CPUs of phones; it has no place for what a file says of itself."""
    one = tuple(each[:1] for each in graph.inputs.values())
    with capture_errors(path.stem), torch.no_grad():
        captured = torch.export.export(graph.module.eval(), one, strict=False)
    try:
        with quietly(), torch.no_grad():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower

            program = to_edge_transform_and_lower(captured, partitioner=[XnnpackPartitioner()]).to_executorch()
    except Exception as error:  # whatever its passes raise
        raise ValueError(
            f"ExecuTorch cannot lower {path.stem} of this model ({type(error).__name__}: {first_line(error)}). Use "
            "--to onnx or --to openvino"
        ) from error
    path.write_bytes(program.buffer)


RUNTIMES = {
    "openvino": Runtime(_to_openvino, ("onnx", "onnxscript", "openvino"), ".xml", one_by_one=False, chooses=True),
    "executorch": Runtime(_to_executorch, ("executorch",), ".pte", one_by_one=True, chooses=False),
}
