"""Smaller forms of an ONNX file: fp16, weights in int8, and int8 with ranges measured on training samples."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cmapkd.config import ConfigError, closest
from cmapkd.export.calibration import Calibration

PRECISIONS = {"fp32": "", "fp16": "_fp16", "int8-weights": "_int8", "int8-calibrated": "_uint8"}
"""Suffix of the files. It is the name that transformers.js has for a file of that kind: fp16, int8, uint8."""

MIN_WEIGHTS = 4_096  # a smaller array is not worth the scale beside it
_MATRICES = ("MatMul", "Gemm")
_ROUNDED = (*_MATRICES, "Conv", "Gather")  # Gather: the token table is half of a CLIP text tower


def check_precisions(names: Sequence[str]) -> tuple[str, ...]:
    """fp32, which all others are made of, and those that are named.

    Raises:
        ConfigError: there is no such precision.
    """
    for name in names:
        if name not in PRECISIONS:
            raise ConfigError(f"there is no precision {name!r}{closest(name, PRECISIONS)}: {', '.join(PRECISIONS)}")
    return tuple(name for name in PRECISIONS if name == "fp32" or name in names)


def convert(precision: str, source: Path, target: Path, calibration: Calibration | None) -> None:
    """Writes the fp32 file `source` in another precision.

    Raises:
        ConfigError: int8-calibrated without a calibration set.
    """
    if precision == "int8-calibrated" and calibration is None:
        raise ConfigError("int8-calibrated measures the ranges of activations: name training data with --calibrate")
    with _quietly():
        if precision == "fp16":
            to_fp16(source, target)
        elif precision == "int8-weights":
            round_weights(source, target)
        elif calibration is not None:
            quantise(source, target, calibration.feeds[source.stem])


def to_fp16(source: Path, target: Path) -> None:
    """Every number inside in 16 bits; inputs and outputs stay float32."""
    import onnx
    import onnx_ir
    from onnxruntime.transformers.float16 import convert_float_to_float16

    halved = convert_float_to_float16(onnx.load(str(source)), keep_io_types=True)
    model = onnx_ir.serde.deserialize_model(halved)
    model.graph.sort()  # the converter appends its casts, and the standard wants nodes in order
    onnx_ir.save(model, str(target))
    onnx.checker.check_model(str(target), full_check=True)


def round_weights(source: Path, target: Path) -> None:
    """Weights as int8 with one scale for each output channel, `w = scale * q`; activations stay float32."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(str(source))
    graph = model.graph
    arrays = {each.name: each for each in graph.initializer}
    rounded: dict[str, str] = {}
    new = []
    for node in graph.node:
        place = 0 if node.op_type == "Gather" else 1
        if node.op_type not in _ROUNDED or len(node.input) <= place or node.input[place] not in arrays:
            continue
        name = node.input[place]
        weight = numpy_helper.to_array(arrays[name])
        if weight.dtype != np.float32 or weight.ndim < 2 or weight.size < MIN_WEIGHTS:
            continue
        if name not in rounded:
            axis = _output_axis(node, weight.ndim)
            numbers, scale = round_channels(weight, axis)
            rounded[name] = f"{name}_dequantized"
            stored = [(f"{name}_int8", numbers), (f"{name}_scale", scale)]
            graph.initializer.extend(numpy_helper.from_array(array, each) for each, array in stored)
            graph.initializer.remove(arrays[name])
            inputs = [each for each, _ in stored]
            new.append(helper.make_node("DequantizeLinear", inputs, [rounded[name]], name=f"{name}_dq", axis=axis))
        node.input[place] = rounded[name]
    for number, node in enumerate(new):
        graph.node.insert(number, node)
    onnx.save(model, str(target))


def round_channels(weight: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 in [-127, 127] and one float32 scale for each index of `axis`; clipped, so that nothing wraps round."""
    others = tuple(number for number in range(weight.ndim) if number != axis)
    scale = (np.abs(weight).max(axis=others) / 127).astype(np.float32)
    scale[scale == 0] = 1
    shape = [-1 if number == axis else 1 for number in range(weight.ndim)]
    return np.clip(np.rint(weight / scale.reshape(shape)), -127, 127).astype(np.int8), scale


def _output_axis(node: Any, ndim: int) -> int:
    """The axis of a weight that counts its outputs; of a table that is looked up, its rows."""
    if node.op_type in ("Conv", "Gather"):
        return 0
    if node.op_type == "Gemm" and any(each.name == "transB" and each.i for each in node.attribute):
        return 0
    return ndim - 1


def quantise(source: Path, target: Path, feeds: Sequence[dict[str, np.ndarray]]) -> None:
    """Weights in int8, activations in uint8 with ranges measured on `feeds`.

    Weights use 7 of the 8 bits: CPUs without VNNI add two products in 16 bits, which saturate with 8.

    A convolutional tower is quantised whole: only its convolutions, and every other operation would need a step back.
    Of a transformer only the matrices are: with its norms and softmax in 8 bits a text tower ranks worse.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(prefix="cmapkd-int8-") as folder:
        prepared = Path(folder, "prepared.onnx")
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        kinds = [node.op_type for node in onnx.load(str(prepared)).graph.node]
        convolutional = kinds.count("Conv") > sum(map(kinds.count, _MATRICES))
        quantize_static(
            str(prepared),
            str(target),
            _Reader(feeds),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=None if convolutional else list(_ROUNDED),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=True,
            calibrate_method=CalibrationMethod.MinMax,
        )


class _Reader:
    """Gives the calibrator one feed after the other."""

    def __init__(self, feeds: Sequence[dict[str, np.ndarray]]) -> None:
        self._feeds = iter(feeds)
        self.get_next: Callable[[], dict[str, np.ndarray] | None] = lambda: next(self._feeds, None)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the converters' remarks on numbers that fp16 rounds to zero, and on how to call them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
