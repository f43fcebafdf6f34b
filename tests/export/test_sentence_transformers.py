"""sentence-transformers loads the folders of `--to transformers`, where it is installed."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest
from export_support import model_of

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        find_spec("sentence_transformers") is None,
        reason="sentence-transformers is not installed: docs/results/clients.json holds what it gave",
    ),
]


@pytest.mark.parametrize("family", ["open_clip", "hf CLIP"])
def test_it_gives_the_models_embeddings(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks" / "clients")
    client = importlib.import_module("sentence_transformers_client")
    found = client.compare(model_of(family, tmp_path), tmp_path / "out")
    assert min(found.values()) > 1 - 1e-5, found
