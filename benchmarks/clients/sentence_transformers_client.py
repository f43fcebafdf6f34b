"""sentence-transformers reads folders of `cmapkd export --to transformers`: how near its embeddings are to the model's.

    uv pip install sentence-transformers
    uv run python benchmarks/clients/sentence_transformers_client.py --json docs/results/clients.json

The models are the small random ones of the tests (tests/families/family_support.py). Pictures come at the model's own
size. A text of 200 words is among the texts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cmapkd.export.library import export_library
from cmapkd.export.origin import Origin
from cmapkd.models import DualEncoder
from cmapkd.provenance import describe_environment

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "families"))

FAMILIES = ("open_clip", "hf CLIP", "hf SigLIP")
FULL_LENGTH = {"text": {"padding": "max_length"}}  # what SigLIP's texts need; the client pads to the longest
TEXTS = ("a red square", "a", "two blue circles and a small green triangle", " ".join(["red"] * 200))


def compare(model: DualEncoder, folder: Path) -> dict[str, float]:
    """Lowest cosines between the client's embeddings and the model's: of texts in one batch, of each alone, of texts
    padded to the full length, and of pictures."""
    from sentence_transformers import SentenceTransformer

    export_library(model, folder, form="transformers", origin=Origin(model.name))
    client = SentenceTransformer(str(folder), device="cpu")
    size = model.image_spec.size
    draws = np.random.default_rng(0)
    pictures = [Image.fromarray(draws.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(3)]
    own = model.embed(images=pictures, texts=TEXTS)
    alone = np.concatenate([client.encode([text]) for text in TEXTS])
    found = {
        "texts": (own.texts, client.encode(list(TEXTS))),
        "texts alone": (own.texts, alone),
        "texts padded": (own.texts, client.encode(list(TEXTS), processing_kwargs=FULL_LENGTH)),
        "images": (own.images, client.encode(pictures)),
    }
    return {name: _lowest(np.asarray(ours), theirs) for name, (ours, theirs) in found.items()}


def _lowest(ours: np.ndarray, theirs: np.ndarray) -> float:
    lengths = np.linalg.norm(theirs, axis=-1) * np.linalg.norm(ours, axis=-1)
    return float(((ours * theirs).sum(-1) / lengths).min())


def main(arguments: Sequence[str] | None = None) -> None:
    from family_support import make

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None)
    path = parser.parse_args(arguments).json
    results: dict[str, Any] = {}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as place:
            model = make(family, Path(place, "made")).eval()
            results[family] = compare(model, Path(place, "out"))
        print(family, results[family], flush=True)
    if path is not None:
        content = {
            "sentence_transformers": {"version": version("sentence-transformers"), "lowest_cosine": results},
            "environment": describe_environment(),
        }
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
