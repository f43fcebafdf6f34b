"""`onnx:FOLDER@PRECISION`: the files that `cmapkd export` wrote, as a model that onnxruntime runs.

Whatever measures models measures its files then. Tokenizer and preprocessing are the folder's own, too.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmapkd.config import Config, ConfigError
from cmapkd.config.extras import need_extra
from cmapkd.data.types import TokenBatch
from cmapkd.models.base import DualEncoder
from cmapkd.models.config import ModelConfig
from cmapkd.models.errors import explained
from cmapkd.models.families import Loader
from cmapkd.models.hf_tokenizer import HfTokenizer
from cmapkd.models.images import ImageSpec
from cmapkd.models.types import StatedCosts, TowerFeatures

MANIFEST = "export.json"


class OnnxOptions(Config):
    """None: nothing of finished files can be set, and their precision stands in the name."""


def build(rest: str, config: ModelConfig, captions: Iterable[str] | None) -> DualEncoder:  # noqa: ARG001
    """The folder and precision that `rest` names; fp32 where it names none.

    Raises:
        ConfigError: the folder is no export, has no such precision, or a setting is given that files cannot take.
        ValueError: a file is not the one that the manifest describes.
    """
    given = {"options": config.options, "init: scratch": config.init == "scratch", "inherit": config.inherit}
    given |= {"checkpoint": config.checkpoint}
    if wrong := [name for name, value in given.items() if value]:
        raise ConfigError(f"{config.name} is a set of finished files: {', '.join(wrong)} cannot change them")
    need_extra(config.name, "onnx", "onnxruntime")
    folder, wanted = _split(rest)
    manifest = read_manifest(folder)
    with explained(f"{folder}/{MANIFEST}"):
        precision = _precision(wanted, manifest, folder)
        for name in (*manifest["graphs"][precision].values(), "tokenizer.json", "tokenizer_config.json"):
            _check_file(folder, name, manifest["files"])
        return GraphEncoder(folder, precision, manifest, name=config.name)


def load(folder: Path, description: dict[str, Any], load_model: Loader) -> DualEncoder:  # noqa: ARG001
    raise ValueError(f"{folder} describes exported files: name their folder as onnx:FOLDER")


def read_manifest(folder: Path) -> dict[str, Any]:
    """`export.json` of a folder with graphs.

    Raises:
        ConfigError: there is none, or it describes something else.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ConfigError(f"{folder} has no {MANIFEST}: name a folder that `cmapkd export --to onnx` wrote")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): export the model again") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("graphs"), dict) or "files" not in manifest:
        raise ConfigError(f"{path} names no ONNX graphs: name a folder that `cmapkd export --to onnx` wrote")
    return manifest


class GraphEncoder(DualEncoder):
    """Both graphs of an exported folder, at one precision, in onnxruntime on the CPU.

    It has no levels, and nothing in it can be trained: the towers are no modules. Preprocessing, lengths, scale and
    bias are read from the graphs' own metadata.

    Args:
        manifest: what `export.json` says, or will say.
    """

    _bias: Tensor | None
    _graphs: Tensor

    def __init__(self, folder: Path, precision: str, manifest: Mapping[str, Any], *, name: str) -> None:
        super().__init__()
        files = manifest["graphs"][precision]
        self._vision, self._text = (_session(folder / files[tower]) for tower in ("vision_model", "text_model"))
        told = self._text.get_modelmeta().custom_metadata_map
        value = {key: _plain(told[f"cmapkd.{key}"]) for key in _READ}
        self.name, self.embed_dim = name, value["embed_dim"]
        self.image_spec = ImageSpec(
            size=value["image_size"],
            mean=tuple(value["image_mean"]),
            std=tuple(value["image_std"]),
            interpolation=value["image_interpolation"],
            fit=value["image_fit"],
        )
        self._text_inputs = [each.name for each in self._text.get_inputs()]
        length = self._text.get_inputs()[0].shape[1]
        whole = f"its graph takes texts of {length} tokens only" if isinstance(length, int) else None
        self.tokenizer = _tokenizer(folder, value["context_length"], whole)
        self.image_levels = self.text_levels = ()
        self._scale = nn.Parameter(torch.tensor(math.log(value["logit_scale"])), requires_grad=False)
        bias = value["logit_bias"]
        self.register_buffer("_bias", None if bias is None else torch.tensor(bias))
        # what tells one export from another, for caches and resumes: the weights are in the graphs and not in here
        digests = "".join(manifest.get("files", {}).get(files[tower], {}).get("sha256", "") for tower in sorted(files))
        self.register_buffer("_graphs", torch.tensor([*bytes.fromhex(digests)], dtype=torch.uint8))
        costs = manifest["costs"]
        sizes = sum((folder / file).stat().st_size for file in files.values())
        self._costs = StatedCosts(costs["parameters"], costs["macs"], sizes, "cpu (onnxruntime)")

    @property
    def log_logit_scale(self) -> nn.Parameter:
        return self._scale

    @property
    def logit_bias(self) -> Tensor | None:
        return self._bias

    @property
    def parts(self) -> dict[str, frozenset[str]]:
        return {"image": frozenset(), "text": frozenset(), "projections": frozenset(), "scale": frozenset({"_scale"})}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Sessions cannot be copied. They only answer, so a copy shares them."""
        copied = type(self).__new__(type(self))
        memo |= {id(self): copied, id(self._vision): self._vision, id(self._text): self._text}
        copied.__dict__.update(deepcopy(self.__dict__, memo))
        return copied

    def stated_costs(self) -> StatedCosts:
        return self._costs

    def num_parameters(self) -> int:
        return self._costs.parameters["total"]

    def train(self, mode: bool = True) -> Self:
        """Raises:
        ValueError: training is asked for.
        """
        if mode:
            raise ValueError(
                f"{self.name} is a set of exported files, which cannot be trained: name the run they are of"
            )
        return super().train(mode)

    def encode_image(self, images: Float[Tensor, "batch 3 height width"], levels: Sequence[str] = ()) -> TowerFeatures:
        self.check_levels("image", levels)
        [embedding] = self._vision.run(None, {"pixel_values": images.float().cpu().numpy()})
        return _features(embedding, images.device)

    def encode_text(self, texts: TokenBatch, levels: Sequence[str] = ()) -> TowerFeatures:
        self.check_levels("text", levels)
        feed = {"input_ids": texts.ids.cpu().numpy(), "attention_mask": texts.mask.long().cpu().numpy()}
        [embedding] = self._text.run(None, {name: feed[name] for name in self._text_inputs})
        return _features(embedding, texts.ids.device)

    def write(self, folder: Path) -> None:  # noqa: ARG002  as it is called
        raise ValueError(f"{self.name} is a set of exported files: copy their folder, or save the model they are of")


_READ = (
    "embed_dim",
    "image_size",
    "image_mean",
    "image_std",
    "image_interpolation",
    "image_fit",
    "context_length",
    "logit_scale",
    "logit_bias",
)


def _plain(text: str) -> Any:
    """A value of a graph's metadata, which is JSON unless it is a bare word."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _features(embedding: np.ndarray, device: torch.device) -> TowerFeatures:
    return TowerFeatures(torch.from_numpy(embedding.astype(np.float32)).to(device))


def _session(path: Path) -> Any:
    """On as many threads as torch has, so that both are timed alike."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _tokenizer(folder: Path, context_length: int, whole_because: str | None) -> HfTokenizer:
    from transformers import AutoTokenizer

    native = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    return HfTokenizer(native, context_length=context_length, whole_because=whole_because)


def _split(rest: str) -> tuple[Path, str]:
    """Folder and precision. A folder's own name may have an `@` in it."""
    folder, at, precision = rest.rpartition("@")
    if not at or Path(rest).is_dir():
        return Path(rest).expanduser(), "fp32"
    return Path(folder).expanduser(), precision


def _precision(wanted: str, manifest: Mapping[str, Any], folder: Path) -> str:
    """The export's name of a precision, which may be given as transformers.js names its files: int8, uint8.

    Raises:
        ConfigError: the folder has none of that name.
    """
    graphs = manifest["graphs"]
    for name, files in graphs.items():
        if name == wanted or all(Path(file).stem.endswith(f"_{wanted}") for file in files.values()):
            return str(name)
    raise ConfigError(f"{folder} has no precision {wanted!r}: {', '.join(graphs)}")


def _check_file(folder: Path, name: str, files: Mapping[str, Any]) -> None:
    """Raises:
    ValueError: the file is gone, or is not the one that was compared with the model.
    """
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{folder} has no {name}, which its {MANIFEST} lists: copy or export the folder again")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if files.get(name, {}).get("sha256") != found:
        raise ValueError(
            f"{path} is not the file that {MANIFEST} describes: its SHA-256 begins with {found[:12]}. It was changed "
            "after it was compared with the model: copy or export the folder again"
        )
