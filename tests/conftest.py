"""What every test gets: caches in a temporary folder, no network, and the data sets beside the checkout."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_CACHE = tempfile.TemporaryDirectory(prefix="cmapkd-tests-")

# Set when this file is read, before anything imports `datasets`, which looks at them once.
os.environ.update(
    XDG_CACHE_HOME=f"{_CACHE.name}/cache",
    HF_HOME=f"{_CACHE.name}/hf",
    HF_DATASETS_CACHE=f"{_CACHE.name}/hf/datasets",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
)
# Set by `uv run pytest`: messages would then name commands as `uv run cmapkd`. The test of those words sets it itself.
os.environ.pop("UV_RUN_RECURSION_DEPTH", None)


@pytest.fixture(scope="session", autouse=True)
def _leave_nothing() -> Iterator[None]:
    thresholds = gc.get_threshold()
    gc.set_threshold(20_000, *thresholds[1:])  # tests make many small objects: a sixth of their time went into looking
    yield
    gc.set_threshold(*thresholds)
    _CACHE.cleanup()
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def _pass_over_what_stays() -> None:
    """Circles among what imports left are looked for once a file: that takes 0.2 s, and every run looks for circles."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _need_not_reach_the_disk(request: pytest.FixtureRequest) -> Iterator[None]:
    """No power is cut here, and a flush takes 5 ms. Only `faults` looks at flushes, so there they are real."""
    with pytest.MonkeyPatch.context() as patch:
        if "faults" not in request.path.parts:
            patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared/data` beside the checkout."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared data sets are not beside this checkout (../shared/data)")
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As child processes have: sums over more threads round differently, and what is made in float32 keeps it."""
    import torch  # after the environment above

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
