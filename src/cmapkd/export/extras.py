"""The libraries that an export needs besides cmapkd's own, and the error where one is missing."""

from __future__ import annotations

from importlib.util import find_spec

_ONNX = ("onnx", "onnxscript", "onnxruntime")


def need_onnx() -> None:
    """Checks that the libraries of `--to onnx` are installed.

    Raises:
        ValueError: names those that are missing, and the command that installs them.
    """
    missing = [name for name in _ONNX if find_spec(name) is None]
    if missing:
        raise ValueError(f"--to onnx needs {', '.join(missing)}: pip install 'cmapkd[onnx]'")
