"""Texts as published models were trained on them, whatever their folders forget: SigLIP 1 and 2, and old CLIP."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from model_support import check_contract, check_round_trip, offline, same_tokens, save_word_tokenizer
from safetensors.torch import save_file
from test_hf_family import SIZES, VISION, edit
from test_hf_family import write as write_hf
from test_open_clip_family import CONFIGS, TEXT, write
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.data.types import TokenBatch
from cmapkd.models import DualEncoder, ModelConfig, build_model, load_model

LENGTH = 16
PAIRS = (
    ("A Dog, running!", "a dog running"),
    ("two   BLUE_circles...", "two blue circles"),
    ("(a) red; square?", "a red square"),
)
ODD = tuple(odd for odd, _ in PAIRS)
PLAIN = tuple(plain for _, plain in PAIRS)
TOWER = "cmapkd_siglip_vit"


def save_gemma_tokenizer(folder: Path, **config: Any) -> None:
    """A byte-pair tokenizer in the files of SigLIP 2's folders: Gemma's class, no lower case, an end token."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    inner = Tokenizer(models.BPE(fuse_unk=True, unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    inner.train_from_iterator([*ODD, *PLAIN] * 3, trainer)
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    names = {f"{kind}_token": f"<{kind}>" for kind in ("bos", "eos", "pad", "unk", "mask")}
    settings = {"tokenizer_class": "GemmaTokenizer", **names, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def save_siglip(folder: Path, tokenizer: dict[str, Any], size: int = 90) -> Any:
    """A small random SigLIP with Gemma's tokenizer, as `google/siglip2-...` folders are."""
    torch.manual_seed(0)
    text = {**SIZES, "hidden_size": 48, "vocab_size": size, "max_position_embeddings": LENGTH, "hidden_act": "gelu"}
    config = transformers.SiglipConfig(text_config=text, vision_config={**VISION, "hidden_act": "gelu"})
    model = transformers.SiglipModel(config)
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-5.0)
        for parameter in model.parameters():
            if parameter.ndim == 1 and len(parameter) > 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    transformers.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    save_gemma_tokenizer(folder, **tokenizer)
    return model.eval()


FORGOTTEN: dict[str, dict[str, Any]] = {
    "nothing": {"padding_side": "right", "add_bos_token": False, "add_eos_token": True, "do_lower_case": True},
    "lower case": {"padding_side": "right", "add_bos_token": False, "add_eos_token": True},
    "the padding's side": {"add_bos_token": False, "add_eos_token": True},
    "the end token": {"padding_side": "right"},
    "everything": {},
    "left and start token": {"padding_side": "left", "truncation_side": "left", "add_bos_token": True},
}


def check_ids(tokens: TokenBatch, plain: TokenBatch) -> None:
    assert same_tokens(tokens, plain)
    assert tokens.ids.shape == (len(PAIRS), LENGTH)
    for ids, mask in zip(tokens.ids, tokens.mask, strict=True):
        end = int(mask.sum()) - 1
        assert mask[: end + 1].all()  # padded on the right
        assert (int(ids[0]), int(ids[end])) != (2, 1)  # no start token
        assert int(ids[end]) == 1
        assert not ids[end + 1 :].any()
    assert tokens.spans is not None
    for text, spans in zip(ODD, tokens.spans.tolist(), strict=True):
        spelled = "".join(text[start:end] for start, end in spans)
        assert [letter for letter in spelled if letter.isalpha()] == [letter for letter in text if letter.isalpha()]


@pytest.mark.parametrize("forgotten", FORGOTTEN)
def test_siglip_folders_of_transformers(forgotten: str, tmp_path: Path) -> None:
    save_siglip(tmp_path / "native", FORGOTTEN[forgotten])
    model = build_model(f"hf:{tmp_path / 'native'}")
    check_ids(model.tokenizer(ODD, spans=True), model.tokenizer(PLAIN))
    long = model.tokenizer(["a dog running " * 20])
    assert long.mask.all()
    assert int(long.ids[0, -1]) == 1
    check_contract(model)
    check_round_trip(model, tmp_path / "saved")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")  # for those who clean texts themselves
    padded = again(list(PLAIN), padding="max_length", max_length=LENGTH, return_tensors="pt")
    assert torch.equal(padded["input_ids"], model.tokenizer(PLAIN).ids)


def test_every_forgetful_folder_gives_the_same_ids(tmp_path: Path) -> None:
    ids = []
    for number, settings in enumerate(FORGOTTEN.values()):
        save_siglip(tmp_path / str(number), settings)
        ids.append(build_model(f"hf:{tmp_path / str(number)}").tokenizer(ODD).ids)
    assert all(torch.equal(ids[0], other) for other in ids)


def test_a_siglip_tokenizer_without_an_end_token_is_refused(tmp_path: Path) -> None:
    save_siglip(tmp_path, {})
    inner = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    inner["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(inner), encoding="utf-8")
    edit(tmp_path, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", eos_token=None)
    with pytest.raises(ConfigError, match="puts no end token behind a text"):
        build_model(f"hf:{tmp_path}")


def test_the_sentencepiece_tokenizer_of_siglip_1(tmp_path: Path) -> None:
    """transformers' slow class for `hf:` folders, T5's fast one in open_clip's: the same ids."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    save_siglip(tmp_path / "hf", {}, size=60)
    (tmp_path / "hf" / "tokenizer.json").unlink()
    (tmp_path / "corpus.txt").write_text("\n".join([*PLAIN] * 40), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "hf" / "spiece"),
        vocab_size=200,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        add_dummy_prefix=True,
        minloglevel=2,
    )
    settings = {"tokenizer_class": "SiglipTokenizer", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    model = build_model(f"hf:{tmp_path / 'hf'}")
    tokens = model.tokenizer(ODD)
    assert same_tokens(tokens, model.tokenizer(PLAIN))
    assert tokens.ids.shape == (3, LENGTH)
    assert [int(row[int(mask.sum()) - 1]) for row, mask in zip(tokens.ids, tokens.mask, strict=True)] == [1, 1, 1]
    check_round_trip(model, tmp_path / "saved")

    (tmp_path / "words").mkdir()
    (tmp_path / "hf" / "spiece.model").rename(tmp_path / "words" / "spiece.model")
    settings = {**settings, "tokenizer_class": "T5TokenizerFast", "extra_ids": 0, "legacy": False}
    (tmp_path / "words" / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    fast = build_model(f"open_clip:{write(tmp_path, siglip_config(str(tmp_path / 'words')))}")
    assert torch.equal(fast.tokenizer(ODD).ids, tokens.ids)


# ------------------------------------------------------------------------------------------------ open_clip


@pytest.fixture(autouse=True)
def small_siglip_tower() -> Iterator[None]:
    """timm's SigLIP image tower, small: no class token, attention pooling."""

    def create(pretrained: bool = False, **settings: Any) -> VisionTransformer:
        for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            settings.pop(name, None)
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 2, "mlp_ratio": 2}
        model = VisionTransformer(**{**sizes, "class_token": False, "global_pool": "map", **settings})
        model.pretrained_cfg = model.default_cfg = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
        return model

    registry = timm.models._registry
    registry._model_entrypoints[TOWER] = create
    registry._model_pretrained_cfgs[TOWER] = timm.models.PretrainedCfg(input_size=(3, 32, 32))
    yield
    del registry._model_entrypoints[TOWER], registry._model_pretrained_cfgs[TOWER]


def siglip_config(tokenizer: str, **text: Any) -> dict[str, Any]:
    """As `ViT-B-16-SigLIP2.json`, small."""
    return {
        "embed_dim": 48,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {"image_size": 32, "timm_model_name": TOWER, "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": {
            "context_length": LENGTH,
            "vocab_size": 90,
            "hf_tokenizer_name": tokenizer,
            "width": 48,
            "heads": 2,
            "layers": 3,
            "mlp_ratio": 64 / 48,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
            **text,
        },
    }


def converted(model: Any) -> dict[str, Tensor]:
    """Weights of transformers' SigLIP under open_clip's and timm's names."""
    theirs = model.state_dict()
    weights = {name: theirs[name] for name in ("logit_scale", "logit_bias")}
    text = {
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_final": "final_layer_norm",
        "text_projection": "head",
    }
    image = {
        "patch_embed.proj": "embeddings.patch_embedding",
        "norm": "post_layernorm",
        "attn_pool.proj": "head.attention.out_proj",
        "attn_pool.norm": "head.layernorm",
        "attn_pool.mlp.fc1": "head.mlp.fc1",
        "attn_pool.mlp.fc2": "head.mlp.fc2",
    }
    for number in range(3):
        layer = f"encoder.layers.{number}"
        names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
        names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
        text |= {f"transformer.resblocks.{number}.{ours}": f"{layer}.{own}" for ours, own in names.items()}
        names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj"}
        names |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        image |= {f"blocks.{number}.{ours}": f"{layer}.{own}" for ours, own in names.items()}
        for kind in ("weight", "bias"):
            for tower, ours in (("text", f"text.transformer.resblocks.{number}.attn.in_proj_{kind}"),
                                ("vision", f"visual.trunk.blocks.{number}.attn.qkv.{kind}")):  # fmt: skip
                parts = [theirs[f"{tower}_model.{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                weights[ours] = torch.cat(parts)
    for prefix, tower, names in (("text", "text_model", text), ("visual.trunk", "vision_model", image)):
        for ours, own in names.items():
            for kind in ("", ".weight", ".bias"):
                if f"{tower}.{own}{kind}" in theirs:
                    weights[f"{prefix}.{ours}{kind}"] = theirs[f"{tower}.{own}{kind}"]
    weights["visual.trunk.pos_embed"] = theirs["vision_model.embeddings.position_embedding.weight"][None]
    weights["visual.trunk.attn_pool.latent"] = theirs["vision_model.head.probe"]
    for kind in ("weight", "bias"):
        query, keys = theirs[f"vision_model.head.attention.in_proj_{kind}"].split([48, 96])
        weights[f"visual.trunk.attn_pool.q.{kind}"], weights[f"visual.trunk.attn_pool.kv.{kind}"] = query, keys
    return weights


@torch.no_grad()
def test_open_clip_and_transformers_agree_on_one_siglip(tmp_path: Path) -> None:
    native = save_siglip(tmp_path / "hf", {})  # forgets everything
    folder = tmp_path / "open_clip"
    folder.mkdir()
    config = siglip_config("nobody/nothing")  # and so does this one: no clean, no padding side
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    save_file({name: value.contiguous() for name, value in converted(native).items()}, folder / "model.safetensors")
    save_gemma_tokenizer(folder)
    ours, theirs = build_model(f"open_clip:{folder}"), build_model(f"hf:{tmp_path / 'hf'}")

    assert same_tokens(ours.tokenizer(ODD), theirs.tokenizer(ODD))
    check_ids(ours.tokenizer(ODD, spans=True), ours.tokenizer(PLAIN))
    texts = theirs.tokenizer(ODD)
    torch.testing.assert_close(ours.encode_text(texts).embedding, theirs.encode_text(texts).embedding)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.encode_image(pixels).embedding, theirs.encode_image(pixels).embedding)
    torch.testing.assert_close(ours.log_logit_scale, theirs.log_logit_scale.reshape(()))
    check_round_trip(ours, tmp_path / "saved")
    saved = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'saved'}")  # open_clip itself reads it so
    assert torch.equal(saved(list(ODD)), ours.tokenizer(ODD).ids)


def test_a_config_that_cleans_in_its_own_way_is_left_so(tmp_path: Path) -> None:
    save_word_tokenizer(tmp_path / "words", pad="</s>")
    name = write(tmp_path, siglip_config(str(tmp_path / "words"), tokenizer_kwargs={"clean": "whitespace"}))
    model = build_model(f"open_clip:{name}")
    assert not torch.equal(model.tokenizer(["a, red"]).ids, model.tokenizer(["a red"]).ids)
    clip = {**TEXT, "vocab_size": 20, "hf_tokenizer_name": str(tmp_path / "words")}
    model = build_model(f"open_clip:{write(tmp_path, {**CONFIGS['siglip'], 'text_cfg': clip})}")
    assert not torch.equal(model.tokenizer(["a, red"]).ids, model.tokenizer(["a red"]).ids)


def folder_without_tokenizer(folder: Path, named: str) -> DualEncoder:
    """As open_clip's `push_to_hf_hub` may leave it. Returns the model that it was made from."""
    save_word_tokenizer(folder / "words")
    text = {**TEXT, "vocab_size": 20, "hf_tokenizer_name": str(folder / "words")}
    model = build_model(f"open_clip:{write(folder, {**CONFIGS['vit'], 'text_cfg': text})}")
    model.save(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "cmapkd.json"):
        (folder / "model" / name).unlink(missing_ok=True)
    config = json.loads((folder / "model" / "open_clip_config.json").read_text(encoding="utf-8"))
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = named
    (folder / "model" / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    return model


def test_an_open_clip_folder_without_tokenizer_files_takes_the_one_it_names(tmp_path: Path) -> None:
    model = folder_without_tokenizer(tmp_path, str(tmp_path / "words"))
    loaded = build_model(f"open_clip:{tmp_path / 'model'}")
    texts = ("a red square", "two blue circles")
    assert same_tokens(loaded.tokenizer(texts), model.tokenizer(texts))
    check_round_trip(loaded, tmp_path / "saved")


def test_the_named_tokenizer_is_looked_for_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = folder_without_tokenizer(tmp_path, "somebody/words")
    commit = "0123456789012345678901234567890123456789"
    cache = tmp_path / "cache" / "models--somebody--words"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    (cache / "snapshots").mkdir()
    (tmp_path / "words").rename(cache / "snapshots" / commit)
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("cmapkd.models.open_clip_tokenizer.hub_answers", lambda: pytest.fail("no need to ask the hub"))
    loaded = build_model(f"open_clip:{tmp_path / 'model'}")
    assert same_tokens(loaded.tokenizer(["a red square"]), model.tokenizer(["a red square"]))


@pytest.mark.parametrize("set_offline", [True, False])
def test_no_tokenizer_anywhere_is_said_at_once(
    set_offline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_without_tokenizer(tmp_path, "nobody/nothing-of-this-name")
    if set_offline:
        offline(monkeypatch)
    else:  # a network that leads nowhere, and nobody said so
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.perf_counter()
    with pytest.raises(
        ValueError,
        match=r"model has no tokenizer files, and the tokenizer 'nobody/nothing-of-this-name' that "
        r"text_cfg\.hf_tokenizer_name names .* the hub cannot be reached",
    ):
        build_model(f"open_clip:{tmp_path / 'model'}")
    assert time.perf_counter() - started < 2  # with building the model


# ------------------------------------------------------------------------------------------------ old CLIP


@pytest.mark.parametrize("end", [2, 1, 5])
@torch.no_grad()
def test_clip_pools_at_the_tokenizers_end_token(end: int, tmp_path: Path) -> None:
    """Old hub configs say `eos_token_id: 2`, where transformers takes the highest id: a token above the end token."""
    write_hf("clip", tmp_path / "right")
    right = build_model(f"hf:{tmp_path / 'right'}")
    write_hf("clip", tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["eos_token_id"] = end
    (tmp_path / "old" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    old = build_model(f"hf:{tmp_path / 'old'}")
    texts = old.tokenizer(("a red square", "a red square and one small green triangle"))
    first, second = embeddings = old.encode_text(texts).embedding
    assert torch.equal(embeddings, right.encode_text(texts).embedding)
    assert torch.cosine_similarity(first, second, dim=0) < 0.999
    loaded = check_round_trip(old, tmp_path / "saved")
    assert torch.equal(loaded.encode_text(texts).embedding, embeddings)
    library = transformers.AutoModel.from_pretrained(tmp_path / "saved").eval()
    output = library.text_model(input_ids=texts.ids, attention_mask=texts.mask.long()).pooler_output
    torch.testing.assert_close(library.text_projection(output), embeddings, rtol=0, atol=1e-6)
    assert load_model(tmp_path / "saved").model.config.text_config.eos_token_id == 1


def test_a_clip_tokenizer_without_an_end_token_is_refused(tmp_path: Path) -> None:
    write_hf("clip", tmp_path / "clip")
    save_word_tokenizer(tmp_path / "words")
    inner = json.loads((tmp_path / "words" / "tokenizer.json").read_text(encoding="utf-8"))
    inner["post_processor"] = None
    (tmp_path / "words" / "tokenizer.json").write_text(json.dumps(inner), encoding="utf-8")
    options = {"tokenizer": str(tmp_path / "words")}
    with pytest.raises(ConfigError, match="puts no end token behind a text, but a CLIP model pools there"):
        build_model(ModelConfig(name=f"hf:{tmp_path / 'clip'}", options=options))
