"""A tower to an ONNX file, in which every dimension that should be free is, and nothing is of this machine."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmapkd.config.extras import need_extra
from cmapkd.export.towers import ImageGraph, TextGraph, exportable, text_rules
from cmapkd.models import DualEncoder
from cmapkd.models.errors import first_line

OPSET = 20
MAX_FILE = 1_900_000_000  # bytes; a protobuf ends at 2 GiB, and browsers read no larger file
_EXAMPLE_BATCH = 3  # torch takes 0 and 1 for constants
_EXAMPLE_LENGTH = 5


@dataclass(frozen=True, slots=True)
class Graph:
    """A tower that is ready to be captured.

    Attributes:
        inputs: example tensors by name.
        open_dims: by input, the name of each dimension whose size is free.
        output: name of the embeddings.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    open_dims: dict[str, dict[int, str]]
    output: str


def need_onnx() -> None:
    """Raises:
    ValueError: a library that makes or runs ONNX files is not installed.
    """
    need_extra("--to onnx", "onnx", "onnx", "onnxscript", "onnxruntime")


def graphs_of(model: DualEncoder, *, full_length: bool = False) -> dict[str, Graph]:
    """`vision_model` and `text_model`, of a copy of the model.

    Args:
        full_length: texts are always of `context_length`, also where the tower could take shorter ones.
    """
    copy = exportable(model)
    rules, size, longest = text_rules(copy), model.image_spec.size, model.tokenizer.context_length
    any_length = rules.any_length and not full_length
    length = min(longest, max(_EXAMPLE_LENGTH, longest // 2)) if any_length else longest
    ids = torch.ones(_EXAMPLE_BATCH, length, dtype=torch.long)
    texts = {"input_ids": ids} | ({"attention_mask": torch.ones_like(ids)} if rules.reads_mask else {})
    of_texts = {0: "batch_size"} | ({1: "sequence_length"} if any_length else {})
    return {
        "vision_model": Graph(
            ImageGraph(copy),
            {"pixel_values": torch.zeros(_EXAMPLE_BATCH, 3, size, size)},
            {"pixel_values": {0: "batch_size"}},
            "image_embeds",
        ),
        "text_model": Graph(TextGraph(copy, rules), texts, dict.fromkeys(texts, of_texts), "text_embeds"),
    }


def write_graph(graph: Graph, path: Path, *, longest: int, metadata: Mapping[str, str]) -> None:
    """Captures a tower and writes it as one ONNX file; the same model gives the same bytes.

    Args:
        longest: texts in tokens.
        metadata: kept in the file.
    Raises:
        ValueError: torch cannot capture it, a dimension that should be free is not, or the file is too large.
    """
    need_onnx()
    names = list(graph.inputs)
    dims = {
        "batch_size": torch.export.Dim("batch_size", min=1, max=65_536),
        "sequence_length": torch.export.Dim("sequence_length", min=2, max=max(3, longest)),
    }
    shapes = tuple({axis: dims[dim] for axis, dim in graph.open_dims[name].items()} for name in names)
    with capture_errors(path.stem), torch.no_grad():
        # Two steps: handed a module, torch.onnx falls back to another capture, which freezes dimensions in silence.
        captured = torch.export.export(
            graph.module.eval(), tuple(graph.inputs.values()), dynamic_shapes=shapes, strict=False
        )
        program: Any = torch.onnx.export(
            captured,
            dynamo=True,
            input_names=names,
            output_names=[graph.output],
            opset_version=OPSET,
            verbose=False,
            report=False,
        )
    _name_dims(program.model, graph, path.stem)
    _strip(program.model)
    program.model.metadata_props.update(metadata)
    size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values() if value.const_value)
    if size > MAX_FILE:
        raise ValueError(f"{path.stem} has {size:,} bytes of weights; one ONNX file holds up to {MAX_FILE:,}")
    program.save(str(path), external_data=False)


@contextmanager
def capture_errors(tower: str) -> Iterator[None]:
    """Whatever an exporter raises, in words, and without its own warnings.

    Raises:
        ValueError: names the tower, and what stops a capture.
    """
    try:
        with quietly():
            yield
    except Exception as error:
        raise ValueError(
            f"{tower} of this model cannot be captured ({type(error).__name__}: {_reason(error)}). Its forward "
            "pass must not depend on the values or the number of its inputs: len(x) of a tensor is such a number, "
            "x.shape[0] is not."
        ) from error


def _name_dims(model: Any, graph: Graph, name: str) -> None:
    """Gives the free dimensions their names, and refuses a file in which one of them has a size.

    Raises:
        ValueError: names the input and the size.
    """
    from onnx_ir import SymbolicDim

    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, dim in graph.open_dims[value.name].items():
            if isinstance(value.shape[axis], int):
                raise ValueError(
                    f"{name} came out with {value.name} frozen to {value.shape[axis]} in {dim}: it would refuse, or "
                    "answer wrongly, any other size. Replace len(x) by x.shape[0] in the model's forward pass."
                )
            names[str(value.shape[axis].value)] = dim
    for value in (*model.graph.inputs, *model.graph.outputs):
        for axis, size in enumerate(value.shape):
            if not isinstance(size, int) and str(size.value) in names:
                value.shape[axis] = SymbolicDim(names[str(size.value)])
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None  # in terms of the old names; every reader infers them


def _strip(model: Any) -> None:
    """Takes out what the exporter noted of its own run: stack traces with local paths, up to a megabyte of them."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.initializers.values(), *model.graph.inputs, *model.graph.outputs):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def _reason(error: BaseException) -> str:
    """The line of a long report that says why."""
    lines = [line.strip(" -") for line in str(error).splitlines()]
    told = [line for line in lines if re.search(r"constraint|specializ|dynamic|guard", line, re.IGNORECASE)]
    return told[0][:300] if told else first_line(error)


@contextmanager
def quietly() -> Iterator[None]:
    """Without the exporters' own warnings, which are of their parts and not of the model."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
