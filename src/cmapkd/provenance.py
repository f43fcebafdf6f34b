"""Where a result came from: versions, hardware and commit, as plain data for the run folder."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from cmapkd.config import redact

PACKAGES = (
    "cmapkd",
    "torch",
    "torchvision",
    "open_clip_torch",
    "transformers",
    "timm",
    "datasets",
    "accelerate",
    "numpy",
    "pillow",
)


def describe_environment() -> dict[str, Any]:
    """Versions of what computes, kind of hardware, and the git commit of the working folder (None outside one)."""
    import torch

    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "git_commit": git_commit(Path.cwd()),
        "command": [Path(sys.argv[0]).name, *map(redact, sys.argv[1:])],
    }


def _cpu_name() -> str | None:
    """The processor's own name where the system tells it (Linux)."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def git_commit(folder: Path) -> str | None:
    """The commit checked out in `folder`, with `+changes` when tracked files differ from it."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
