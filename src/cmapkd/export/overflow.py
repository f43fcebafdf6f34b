"""The largest number inside a graph: whether fp16 can hold it, which a run on a CPU does not tell.

onnxruntime computes most of an fp16 graph in float32 on a CPU, and leaves casts between two such operations out. So an
overflow shows on a GPU or in a browser only.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

LARGEST_FP16 = float(np.finfo(np.float16).max)
_STANDS_FOR_INFINITY = 1e30  # masks hold -inf, or the smallest float32; in fp16 both are -inf, and as harmless


def write_watched(source: Path, target: Path) -> float:
    """Writes the fp32 graph with one output: the largest absolute number that any operation gives.

    Returns:
        The largest absolute number among the weights.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.shape_inference.infer_shapes(onnx.load(str(source)))
    graph = model.graph
    described = (*graph.value_info, *graph.output)
    floats = {value.name for value in described if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    names = [name for node in graph.node for name in node.output if name in floats]
    limit = numpy_helper.from_array(np.float32(_STANDS_FOR_INFINITY), "watched_limit")
    nothing = numpy_helper.from_array(np.float32(0), "watched_nothing")
    graph.initializer.extend([limit, nothing])
    largest = []
    for number, name in enumerate(names):
        size, small, kept, most = (f"watched_{number}_{part}" for part in ("size", "small", "kept", "most"))
        graph.node.extend(
            [
                helper.make_node("Abs", [name], [size]),
                helper.make_node("Less", [size, limit.name], [small]),
                helper.make_node("Where", [small, size, nothing.name], [kept]),
                helper.make_node("ReduceMax", [kept], [most], keepdims=0),
            ]
        )
        largest.append(most)
    graph.node.append(helper.make_node("Max", largest, ["watched"]))
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("watched", TensorProto.FLOAT, []))
    onnx.save(model, str(target))
    return largest_of(numpy_helper.to_array(each) for each in graph.initializer)


def largest_of(arrays: Iterable[np.ndarray]) -> float:
    """The largest absolute number of float arrays, leaving out those that stand for infinity; 0 for none."""
    found = 0.0
    for array in arrays:
        if array.dtype == np.float32 and array.size:
            sizes = np.abs(array)
            found = max(found, float(sizes[sizes < _STANDS_FOR_INFINITY].max(initial=0.0)))
    return found


def check_fp16(tower: str, largest: float) -> None:
    """Refuses fp16 where a number does not fit.

    Raises:
        ValueError: names the number.
    """
    if not largest <= LARGEST_FP16:
        raise ValueError(
            f"{tower}_fp16.onnx would overflow: numbers inside reach {largest:.3g}, and fp16 holds up to "
            f"{LARGEST_FP16:,.0f}. On a GPU or in a browser its embeddings would not be finite. Leave fp16 out"
        )
