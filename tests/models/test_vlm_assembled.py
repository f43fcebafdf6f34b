"""Models that write, assembled from an image tower and a language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import randomise
from torch.nn import functional as F
from vlm_support import DIALOGUES, TEXTS, chat, tokenizer, words

from cmapkd.config import ConfigError
from cmapkd.data.dialogues import join_items
from cmapkd.diagnosis.models import check_weights
from cmapkd.models import Decoding, ModelConfig, TokenNeeds, build_model, load_model
from cmapkd.models.lora import adapters_of
from cmapkd.models.tiny_vlm_words import byte_tokenizer
from cmapkd.models.untrained import remark_on_unlearned
from cmapkd.models.vlm_model import AssembledVlm
from cmapkd.models.vlm_tower import Projector

EVERYWHERE = frozenset({"answer", "visual", "prompt"})
TOWERS: dict[str, dict[str, Any]] = {
    "convolutions": {"name": "timm:test_efficientnet", "image_size": 64},
    "transformer": {"name": "timm:test_vit", "image_size": 48},
    "trained": {"name": "tiny:scenes-teacher"},
}
LANGUAGES = ("llama", "gemma3")


def test_the_names_of_who_speaks_are_one_piece_each() -> None:
    """A turn's frame is a third of a short dialogue: spelled by bytes it would be most of it."""
    tokens = byte_tokenizer(TEXTS * 4, size=330)
    for name in ("user", "assistant"):
        assert len(tokens.encode(name, add_special_tokens=False)) == 1
        assert tokens.decode(tokens.encode(name, add_special_tokens=False)) == name


def language(folder: Path, kind: str) -> Path:
    """A small causal language model in transformers' format; Gemma 3 scales its words and ties its head."""
    import transformers as library

    torch.manual_seed(1)
    if kind == "gemma3":
        marks = ("<start_of_turn>", "<end_of_turn>")
        tokens = byte_tokenizer(TEXTS * 4, size=330, special=marks)
        tokens.add_special_tokens({"bos_token": "<bos>"})
        config = library.Gemma3TextConfig(
            **words(tokens, head_dim=16, query_pre_attn_scalar=16, sliding_window=64), tie_word_embeddings=True
        )
        model: Any = library.Gemma3ForCausalLM(config)
    else:
        tokens = tokenizer()
        model = library.LlamaForCausalLM(library.LlamaConfig(**words(tokens, vocab_size=len(tokens))))
    randomise(model)
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def vision(folder: Path) -> Path:
    """A small ViT in transformers' format."""
    import transformers as library

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = library.ViTModel(library.ViTConfig(image_size=32, patch_size=8, **sizes), add_pooling_layer=False)
    randomise(model)
    model.save_pretrained(folder)
    library.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {kind: language(tmp_path_factory.mktemp(kind), kind) for kind in LANGUAGES}
    return {**made, "hf": vision(tmp_path_factory.mktemp("vit"))}


def assembled(folder: Path, tower: Any = "convolutions", **options: Any) -> AssembledVlm:
    torch.manual_seed(2)
    image = TOWERS.get(tower, tower)
    config = {"name": "vlm:mine", "options": {"image": image, "text": f"hf:{folder}", **options}}
    model = build_model(ModelConfig.from_mapping(config))
    assert isinstance(model, AssembledVlm)
    return model


@pytest.mark.parametrize(
    ("tower", "kind"), [("convolutions", "llama"), ("transformer", "gemma3"), ("hf", "llama"), ("trained", "llama")]
)
def test_the_contract(folders: dict[str, Path], tower: str, kind: str, tmp_path: Path) -> None:
    model = assembled(folders[kind], f"hf:{folders['hf']}" if tower == "hf" else tower)
    batch = chat(model)
    infos = (*model.image_levels, *model.text_levels)
    needs = TokenNeeds(EVERYWHERE, tuple(info.name for info in infos), attention=(1,), projected=True)
    whole = model(batch, needs)
    assert int(batch.visual.sum()) == 2 * model.vision.count == len(whole.hidden["visual"].values)
    for info in infos:
        assert all(rows.values.shape[1] == info.width for rows in whole.levels[info.name].values()), info
    for number in range(3):
        for one in (model(chat(model, [number]), needs), model(chat(model).part(number, number + 1), needs)):
            mine = whole.hidden["answer"].sample == number
            expected = whole.hidden["answer"].values[mine]
            torch.testing.assert_close(one.hidden["answer"].values, expected, atol=2e-5, rtol=1e-4)
            level = infos[0].name
            mine = whole.levels[level]["visual"].sample == number
            expected = whole.levels[level]["visual"].values[mine]
            torch.testing.assert_close(one.levels[level]["visual"].values, expected, atol=2e-5, rtol=1e-4)
    fed = model.forward_seeing(batch, model.see(batch))
    torch.testing.assert_close(fed.hidden["answer"].values, whole.hidden["answer"].values)
    F.cross_entropy(model.logits(whole.hidden["answer"].values), whole.targets).backward()
    learned = {name for name, each in model.named_parameters() if each.grad is not None and each.grad.any()}
    assert all(model.parts[part] & learned for part in ("vision", "projector", "embeddings", "language"))
    assert frozenset().union(*model.parts.values()) == {name for name, _ in model.named_parameters()}
    model.save(tmp_path)
    again = load_model(tmp_path)
    assert isinstance(again, AssembledVlm)
    assert again.processor == model.processor
    assert again.vocabulary == model.vocabulary
    assert torch.equal(again(batch).hidden["answer"].values, model(batch).hidden["answer"].values)
    assert not again.random_parts
    written = model.generate(batch, Decoding(max_new_tokens=4))
    assert again.generate(batch, Decoding(max_new_tokens=4)) == written
    assert [model.generate(chat(model, [number]), Decoding(max_new_tokens=4))[0] for number in range(3)] == written


@pytest.mark.parametrize("kind", LANGUAGES)
def test_without_a_picture_it_is_the_language_model(folders: dict[str, Path], kind: str) -> None:
    from transformers import AutoModelForCausalLM

    model = assembled(folders[kind])
    alone = AutoModelForCausalLM.from_pretrained(folders[kind], dtype=torch.float32).eval()
    batch = chat(model, [2])
    logits = alone(input_ids=batch.texts.ids, attention_mask=batch.texts.mask.long()).logits
    rows = model(batch).hidden["answer"]
    size = min(model.vocabulary.size, logits.shape[-1])  # a token for pictures may have been added
    torch.testing.assert_close(model.logits(rows.values)[:, :size], logits[rows.sample, rows.place][:, :size])


@pytest.mark.parametrize("tower", TOWERS)
def test_visual_tokens_are_the_towers_own(folders: dict[str, Path], tower: str) -> None:
    from cmapkd.models.image_towers import ImagePartConfig, build_image_tower

    model = assembled(folders["llama"], tower)
    torch.manual_seed(2)
    own = build_image_tower(ImagePartConfig.from_mapping(TOWERS[tower], where="image")).eval()
    item = model.processor.read(*DIALOGUES[0])
    pixels = item.pictures["pixel_values"]
    level = own(pixels, [own.levels[-1].name]).levels[own.levels[-1].name]
    tokens = level.values.flatten(2).mT if level.layout == "map" else level.values[:, level.num_prefix :]
    found = model.see(join_items([item], model.processor.pad_id)).tokens
    projector: Projector = model.model.model.multi_modal_projector
    torch.testing.assert_close(found.values, projector(tokens)[0])
    rows = model(chat(model, [0]), TokenNeeds(levels=(own.levels[-1].name,))).levels[own.levels[-1].name]["visual"]
    torch.testing.assert_close(rows.values, tokens[0])


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_projected_tokens_have_the_size_of_words(kind: Any) -> None:
    torch.manual_seed(0)
    made = Projector(kind, 96, 256, scale=0.3)
    out = made(7 + 40 * torch.randn(8, 49, 96))
    assert out.detach().square().mean().sqrt().item() == pytest.approx(0.3, rel=0.1)


def test_frozen_parts_neither_learn_nor_change_their_statistics(folders: dict[str, Path]) -> None:
    model = assembled(folders["llama"], frozen=["vision", "language", "embeddings", "head"]).train()
    learning = {name for name, each in model.named_parameters() if each.requires_grad}
    assert learning == model.parts["projector"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = model(chat(model))
    F.cross_entropy(model.logits(found.hidden["answer"].values), found.targets).backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.vision.training
    learning_vision = assembled(folders["llama"], frozen=["language", "embeddings"]).train()
    assert learning_vision.vision.training
    assert not learning_vision._language.training


@pytest.mark.parametrize("kind", LANGUAGES)
def test_a_language_model_with_fewer_layers(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    whole = assembled(folders[kind])
    found, batch = whole(chat(whole), TokenNeeds(levels=("layers.0",))), chat(whole)
    with torch.no_grad():
        expected = whole._language.norm(found.levels["layers.0"]["answer"].values)
    cut = assembled(folders[kind], text={"name": f"hf:{folders[kind]}", "layers": 1})
    assert len(cut.text_levels) == 1
    torch.testing.assert_close(cut(batch).hidden["answer"].values, expected)
    written = cut.generate(batch, Decoding(max_new_tokens=3))
    cut.save(tmp_path)
    again = load_model(tmp_path)
    assert isinstance(again, AssembledVlm)
    assert torch.equal(again(batch).hidden["answer"].values, cut(batch).hidden["answer"].values)
    assert again.generate(batch, Decoding(max_new_tokens=3)) == written
    same = assembled(folders[kind], text={"name": f"hf:{folders[kind]}", "layers": 2})
    assert torch.equal(same(batch).hidden["answer"].values, whole(batch).hidden["answer"].values)
    with pytest.raises(ConfigError, match="layers is 3, but the model has 2"):
        assembled(folders[kind], text={"name": f"hf:{folders[kind]}", "layers": 3})


def test_random_parts_and_wrong_options(folders: dict[str, Path], tmp_path: Path) -> None:
    model = assembled(folders["llama"])
    assert model.random_parts == ("vision", "projector")  # no weights are named for the tower
    assert assembled(folders["llama"], "trained").random_parts == ("projector",)
    adapted = assembled(folders["llama"], lora={"rank": 2, "learn": ["projector"]})
    assert len(adapters_of(adapted)) == 4
    adapted.save(tmp_path)
    plain = load_model(tmp_path)
    assert not adapters_of(plain)
    batch = chat(model)
    torch.testing.assert_close(plain(batch).hidden["answer"].values, adapted(batch).hidden["answer"].values)
    for options, reason in (
        ({"level": "blocks.99"}, "has no level 'blocks.99'"),
        ({"lora": {}, "frozen": ["vision"]}, "leave out frozen"),
        ({"text": f"hf:{tmp_path / 'nothing'}"}, "there is no folder"),
        ({"max_tokens": 9999}, "is more than"),
    ):
        with pytest.raises(ConfigError, match=reason):
            assembled(folders["llama"], **options)
    with pytest.raises(ConfigError, match=r"name them as options\.image"):
        build_model("vlm:mine")


@pytest.mark.parametrize("kind", LANGUAGES)
def test_new_adapters_go_on_from_a_saved_student(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """Gemma's head is its table of words, which the file has once."""
    first = assembled(folders[kind], lora={"rank": 2, "targets": "all", "learn": ["projector"]})
    for parameter in first.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    first.save(tmp_path)
    image, text, lora = TOWERS["convolutions"], f"hf:{folders[kind]}", {"rank": 3, "learn": ["projector"]}
    config = {"name": "vlm:mine", "checkpoint": str(tmp_path / "model.safetensors")}
    again = build_model(ModelConfig.from_mapping({**config, "options": {"image": image, "text": text, "lora": lora}}))
    assert isinstance(again, AssembledVlm)
    assert {layer.rank for layer in adapters_of(again.model).values()} == {3}
    assert not again.random_parts
    expected, found = (model(chat(model)).hidden["answer"].values for model in (load_model(tmp_path), again))
    torch.testing.assert_close(found, expected)


def test_weights_of_other_tokens_and_adapters_that_are_merged_already_are_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    image = TOWERS["convolutions"]
    texts = [[f"a {word} here"] * 3 for word in ("circle", "square")]

    def made(captions: list[str], **more: Any) -> Any:
        options = {"image": image, "text": f"hf:{folders['gemma3']}", "vocabulary": "texts", **more.pop("options", {})}
        return build_model(
            ModelConfig.from_mapping({"name": "vlm:mine", "options": options, **more}), captions=captions
        )

    first = made(texts[0], options={"lora": {"rank": 2}})
    sizes = {name: value.numel() for name, value in first.named_parameters()}
    assert first.num_parameters() == sum(sizes.values()) - sum(sizes[name] for name in first.parts["adapters"])
    first.save(tmp_path)
    assert load_model(tmp_path).num_parameters() == first.num_parameters()
    weights = str(tmp_path / "model.safetensors")
    made(texts[0], checkpoint=weights, options={"lora": {"rank": 2}})
    with pytest.raises((ConfigError, ValueError), match=r"has other tokens than vlm:mine|of another shape"):
        made(texts[1], checkpoint=weights)
    with pytest.raises(ConfigError, match="whose weights have them already"):
        made(texts[0], checkpoint=weights, options={"lora": {"folder": str(tmp_path / "adapters")}})


def test_as_many_tokens_that_are_others_are_refused(tmp_path: Path) -> None:
    def made(text: str, **more: Any) -> Any:
        options = {"vocab_size": 300, "image": "tiny:scenes-teacher", "width": 16, "layers": 1, "heads": 2}
        config = {"name": "tiny_vlm:small", "options": options, **more}
        return build_model(ModelConfig.from_mapping(config), captions=[text] * 9)

    one, other = "a red circle is left of a blue square " * 3, "two green stars stand below one yellow moon " * 3
    made(one).save(tmp_path)
    made(one, checkpoint=str(tmp_path / "model.safetensors"))
    with pytest.raises(ConfigError, match=r"has other tokens than tiny_vlm:small: token \d+ is"):
        made(other, checkpoint=str(tmp_path / "model.safetensors"))


def test_random_parts_that_never_learn_are_told_of(folders: dict[str, Path]) -> None:
    told = remark_on_unlearned(assembled(folders["llama"], lora={"rank": 2}))
    assert told is not None
    assert told.startswith("vision, projector of vlm:mine have random weights and will not learn")
    assert remark_on_unlearned(assembled(folders["llama"], lora={"rank": 2, "learn": ["vision", "projector"]})) is None
    model = assembled(folders["llama"], "trained")
    assert remark_on_unlearned(model) is None
    assert remark_on_unlearned(model, ("projector", "language")) is None
    assert str(remark_on_unlearned(model, ("language",))).startswith("projector of vlm:mine has random weights")
    (found,) = check_weights("student", model, teaches=False, learning=("language",))
    assert found.level == "problem"
    with pytest.raises(ConfigError, match="targets"):
        assembled(folders["llama"], lora={"targets": []})


def test_a_head_that_is_the_table_of_words_cannot_be_frozen_alone(folders: dict[str, Path]) -> None:
    assembled(folders["llama"], frozen=["head"])
    with pytest.raises(ConfigError, match=r"options\.frozen names head, which has no weights of its own here"):
        assembled(folders["gemma3"], frozen=["head"])


def test_a_language_model_that_caps_its_logits_is_refused(tmp_path: Path) -> None:
    import transformers as library

    tokens = tokenizer()
    config = library.Gemma2Config(**words(tokens, head_dim=16), final_logit_softcapping=0.5)
    model = library.Gemma2ForCausalLM(config)
    randomise(model)
    model.save_pretrained(tmp_path)
    tokens.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="scales or caps its logits"):
        assembled(tmp_path)


def test_the_presets_have_the_sizes_that_the_documentation_says() -> None:
    sizes = {name: build_model(f"tiny_vlm:{name}", captions=TEXTS * 4).num_parameters() for name in ("small", "base")}
    assert sizes["small"] == pytest.approx(1.0e6, rel=0.05)
    assert sizes["base"] == pytest.approx(6.4e6, rel=0.02)
