"""Runs one file on given inputs in a process of its own: `python -m cmapkd.export.check FILE INPUTS OUTPUTS [default]`.

A runtime can end a process by a signal. That must refuse a file, and not end the export. Imports no torch for ONNX
and OpenVINO files.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROUNDS = 7
Run = Callable[[Mapping[str, Any]], Any]
"""Arrays by the name of the input to the embeddings."""


def open_file(path: Path, *, default: bool = False) -> tuple[Run, str]:
    """What runs a file on the CPU with one thread, as its clients run it, and the numbers that it computes in.

    Args:
        default: in the precision that the runtime chooses on this machine; else in float32. Of OpenVINO only.
    """
    if path.suffix == ".xml":
        return _openvino(path, default=default)
    if path.suffix == ".pte":
        return _executorch(path), "f32"
    return _onnxruntime(path), "f32"


def _onnxruntime(path: Path) -> Run:
    """At the optimisation level that clients have by default."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda feed: session.run(None, dict(feed))[0]


def _openvino(path: Path, *, default: bool) -> tuple[Run, str]:
    import openvino

    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": 1}
    if not default:
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    chosen = compiled.get_property("INFERENCE_PRECISION_HINT")
    return lambda feed: compiled(dict(feed))[0], str(chosen.get_type_name())


def _executorch(path: Path) -> Run:
    """Such a file takes one sample at a time."""
    import torch
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(str(path)).load_method("forward")

    def run(feed: Mapping[str, Any]) -> Any:
        rows = zip(*(array for array in feed.values()), strict=True)
        answers = [method.execute([torch.from_numpy(value)[None] for value in row])[0] for row in rows]
        return torch.cat(answers).numpy()

    return run


def main(graph: str, inputs: str, outputs: str, *more: str) -> None:
    """Reads arrays named `case|input`; writes an array for each case, `ms`, the median of a batch of one, and
    `precision`, the numbers that the runtime computed in."""
    run, precision = open_file(Path(graph), default="default" in more)
    cases: dict[str, dict[str, Any]] = {}
    with np.load(inputs, allow_pickle=False) as arrays:
        for key in arrays.files:
            case, _, name = key.partition("|")
            cases.setdefault(case, {})[name] = arrays[key]
    answers = {case: run(feed) for case, feed in cases.items()}
    alone = {name: array[:1] for name, array in next(iter(cases.values())).items()}
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        run(alone)
        times.append(1000 * (time.perf_counter() - started))
    np.savez(outputs, ms=np.median(times), precision=precision, **answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
