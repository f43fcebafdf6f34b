"""Runs one ONNX file on given inputs in a process of its own: `python -m cmapkd.export.check FILE INPUTS OUTPUTS`.

onnxruntime can end a process by a signal. That must refuse a file, and not end the export. Imports no torch.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROUNDS = 7


def open_session(path: Path) -> Any:
    """A session on the CPU with one thread, at the optimisation level that clients have by default."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def main(graph: str, inputs: str, outputs: str) -> None:
    """Reads arrays named `case|input`; writes an array for each case, and `ms`, the median of a batch of one."""
    session = open_session(Path(graph))
    cases: dict[str, dict[str, Any]] = {}
    with np.load(inputs, allow_pickle=False) as arrays:
        for key in arrays.files:
            case, _, name = key.partition("|")
            cases.setdefault(case, {})[name] = arrays[key]
    answers = {case: session.run(None, feed)[0] for case, feed in cases.items()}
    alone = {name: array[:1] for name, array in next(iter(cases.values())).items()}
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        session.run(None, alone)
        times.append(1000 * (time.perf_counter() - started))
    np.savez(outputs, ms=np.median(times), **answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
