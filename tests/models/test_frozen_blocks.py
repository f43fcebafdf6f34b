"""Towers that are entered in the middle, and several image towers as one: the same answers and gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import check_contract, inputs, randomise
from test_parts_family import CONVOLUTIONAL, VIT, check_round_trip, parts, save_encoder, save_vit

from cmapkd.cache.identity import weight_hash
from cmapkd.config import ConfigError
from cmapkd.methods import StageConfig
from cmapkd.models import DualEncoder, load_model
from cmapkd.models.adapted import AdaptedEncoder
from cmapkd.models.joined import JoinedEncoder
from cmapkd.models.prompted import with_text_prompts
from cmapkd.models.several_towers import SeveralTowers
from cmapkd.models.types import LevelRequest, TowerFeatures
from cmapkd.models.untrained import remark_on_unlearned
from helpers import CLASSES, make_method, make_teacher

MLP, READER = {"image_head": "mlp", "text_head": "mlp"}, {"image_head": "reader", "text_head": "reader"}
IMAGES: dict[str, tuple[Any, int]] = {
    "timm EfficientNet": (CONVOLUTIONAL, 3),
    "timm MobileNet": ({"name": "timm:mobilenetv3_small_050", "image_size": 32}, 2),
    "timm ResNet": ({"name": "timm:test_resnet", "image_size": 32}, 2),
    "timm ConvNeXt": ({"name": "timm:test_convnext", "image_size": 32}, 1),
    "timm ViT": (VIT, 4),
    "open_clip": ("open_clip:{root}/small.json", 1),
    "hf": ("hf:{root}/vit", 2),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text encoders, a ViT of transformers and a config of open_clip."""
    root = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    for kind in ("bert", "modernbert", "t5"):
        save_encoder(kind, root / kind)
    save_vit(root / "vit")
    vision = {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 12, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
    (root / "small.json").write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}))
    return root


def image_of(kind: str, root: Path, **settings: Any) -> dict[str, Any]:
    named, blocks = IMAGES[kind]
    given = {"name": named.format(root=root)} if isinstance(named, str) else named
    return {**given, "frozen_blocks": blocks, **settings}


def live_and_stored(model: DualEncoder, needs: LevelRequest) -> list[dict[str, torch.Tensor]]:
    """Embeddings, levels and gradients of a training pass from the inputs, and of one from what is stored of them."""
    batch, towers = inputs(model), model.frozen_towers
    with torch.no_grad():
        stored = model.pooled_towers(towers)(batch, model.stored_levels)
    found = []
    for run in (lambda: model(batch, needs), lambda: model.from_pooled(stored, towers, None, needs)):
        model.zero_grad()
        torch.manual_seed(0)  # of the dropout in blocks that learn
        features = run()
        sides: dict[str, TowerFeatures] = {"image": features.image, "text": features.text}
        values = {name: side.embedding for name, side in sides.items()}
        values |= {f"{name}/{key}": level.values for name, side in sides.items() for key, level in side.levels.items()}
        sum(value.square().mean() for value in values.values()).backward()  # type: ignore[union-attr]
        gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
        found.append({name: value.detach() for name, value in values.items()} | gradients)
    return found


def check_entered(model: DualEncoder, *, levels: bool = True) -> None:
    randomise(model)
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    model.train()
    last = LevelRequest((model.image_levels[-1].name,), (model.text_levels[-1].name,)) if levels else LevelRequest()
    live, stored = live_and_stored(model, last)
    assert live.keys() == stored.keys()
    assert any(name.startswith("image.") for name in live)
    for name, value in live.items():
        torch.testing.assert_close(stored[name], value, rtol=1e-5, atol=1e-6, msg=name)
    frozen = {name.rpartition(".")[0] for name, each in model.named_parameters() if not each.requires_grad}
    assert frozen
    for name, value in model.named_buffers():  # of batch norms: those that learn have taken note, the frozen ones not
        assert name.rpartition(".")[0] not in frozen or torch.equal(value, statistics[name]), name


@pytest.mark.parametrize("kind", IMAGES)
def test_image_towers_go_on_from_their_middle(kind: str, root: Path) -> None:
    heads = MLP if kind in ("timm MobileNet", "hf") else {**READER, "text_head": "mlp"}
    text = {"frozen_blocks": 3}
    check_entered(parts(root / "bert", image_of(kind, root), text=text, **heads))


def test_text_encoders_go_on_from_their_middle(root: Path) -> None:
    model: Any = parts(root / "modernbert", image_of("timm EfficientNet", root), text={"frozen_blocks": 1}, **READER)
    check_entered(model)
    model.eval()
    check_contract(model)  # asks for levels of the frozen blocks, too, as of any tower
    alone = model.tokenizer(["a red square"])
    together = model.tokenizer(["a red square", "two blue circles and one small green triangle"])
    middle = model.text.below()(together)
    one = model.text.go_on(middle).embedding[:1]
    torch.testing.assert_close(one, model.text(alone).embedding)  # padding is masked above the middle as below it


def test_several_towers_are_one(root: Path, tmp_path: Path) -> None:
    """One that is frozen, one that is entered in the middle, one with another normalisation."""
    towers = [
        {**CONVOLUTIONAL, "frozen": True},
        {**VIT, "image_size": 64, "frozen_blocks": 4},
        {"name": "timm:test_resnet", "image_size": 64, "frozen_blocks": 2},
    ]
    model: Any = parts(root / "bert", towers, text={"frozen": True}, image_head={"kind": "mlp", "hidden": 8})
    each = list(model.image.towers)
    own = each[1].spec
    each[1].spec = type(own)(64, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    model.image = SeveralTowers(each)
    assert model.image.width == sum(tower.width for tower in each)
    assert model.image_levels == each[0].levels
    check_entered(model, levels=False)
    model.eval()
    check_contract(model)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    joined = model.image(model.image_spec.to_model(pixels)).embedding
    alone = torch.cat([tower(tower.spec.to_model(pixels)).embedding for tower in each], 1)
    torch.testing.assert_close(joined, alone, rtol=1e-4, atol=1e-5)
    each[1].spec = own
    model.image = SeveralTowers(each)
    assert check_round_trip(model, tmp_path / "saved")["frozen"] == {"image": [True, 4, 2], "text": True}
    assert all(parameter.requires_grad for parameter in load_model(tmp_path / "saved").parameters())


def test_a_stage_changes_nothing_of_what_is_stored(root: Path) -> None:
    student: Any = parts(root / "bert", image_of("timm ResNet", root), text={"frozen": True}, **MLP)
    method, towers = make_method("contrastive", student=student), student.frozen_towers
    before = student.stored_levels, weight_hash(student.pooled_towers(towers))
    method.enter(StageConfig(name="heads", share=1.0, train=("projections",)))
    assert (student.stored_levels, weight_hash(student.pooled_towers(towers))) == before
    assert (student.image.freezing(), student.text.freezing()) == (2, True)
    whole: Any = parts(root / "bert")
    make_method("contrastive", student=whole).train_only(["text", "projections", "scale"])
    assert (whole.image.freezing(), whole.text.freezing()) == (True, 0)


def test_several_towers_that_learn_are_not_called_frozen(root: Path, tmp_path: Path) -> None:
    model: Any = parts(root / "bert", [CONVOLUTIONAL, {**CONVOLUTIONAL, "name": "timm:test_resnet"}])
    model.save(tmp_path / "saved")
    assert "frozen" not in json.loads((tmp_path / "saved" / "cmapkd.json").read_text())["options"]
    make_method("contrastive", student=model).train_only(["text", "projections", "scale"])
    assert model.image.freezing() == [True, True]
    with pytest.raises(ValueError, match="are 2 towers: freeze 3 blocks in one of them"):
        model.image.freeze(3)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_only_the_towers_that_are_read_go_on(root: Path, tower: Any) -> None:
    """From stored answers as from the inputs: a tower that nobody reads runs no pass and draws nothing."""
    model: Any = parts(root / "bert", image_of("timm ResNet", root), **MLP).eval()
    batch, needs, passes = inputs(model), LevelRequest(towers=(tower,)), list[int]()
    stored = model.pooled_towers(("image",))(batch, model.stored_levels)
    model.text.register_forward_hook(lambda *_: passes.append(1))
    model.image_head.register_forward_hook(lambda *_: passes.append(2))
    features, live = model.from_pooled(stored, ("image",), batch, needs), model(batch, needs)
    assert passes == {"image": [2, 2], "text": [1, 1]}[tower]
    torch.testing.assert_close(features.image.embedding, live.image.embedding)
    torch.testing.assert_close(features.text.embedding, live.text.embedding)


def test_a_method_that_compares_no_levels_takes_frozen_towers(root: Path) -> None:
    """Maps that learn read the last tokens of cosmos."""
    student = parts(root / "bert", {**VIT, "frozen_blocks": 2}, text={"frozen": True}, embed_dim=16)
    method: Any = make_method("cosmos", student=student, settings={"heads": 4})
    assert method.student_needs.text_levels
    method.train_only(["image", "projections", "scale"])
    method.check_learning()


def test_models_that_hold_a_frozen_one_say_why_it_answers_live(root: Path) -> None:
    def frozen() -> Any:
        return parts(root / "bert", {**VIT, "frozen": True}, **MLP)

    adapted = AdaptedEncoder(frozen(), CLASSES.names, shots=1, hidden=2, share=0.5)
    prompted = with_text_prompts(frozen(), context=2, template="{}")
    inner = frozen()
    joined = JoinedEncoder(inner, make_teacher(dim=inner.embed_dim), projector="none")
    for model, form in ((adapted, "an adapted"), (prompted, "a prompted"), (joined, "a joined")):
        assert (model.why_towers_live or "").startswith(f"parts:small is part of {form} model here, which cannot")
        assert model.frozen_towers == ()
    assert AdaptedEncoder(parts(root / "bert"), CLASSES.names, shots=1, hidden=2, share=0.5).why_towers_live is None


def test_readers_behind_several_towers(root: Path, tmp_path: Path) -> None:
    """What is read of each tower is joined and projected; two towers of transformers keep their files apart."""
    named = {"name": f"hf:{root / 'vit'}"}
    model: Any = parts(
        root / "bert", [{**named, "frozen": True}, {**named, "frozen_blocks": 1}], text={"frozen": True}, **READER
    )
    check_entered(model, levels=False)
    options = check_round_trip(model.eval(), tmp_path / "saved")
    assert [tower["kind"] for tower in options["image"]["towers"]] == ["hf", "hf"]


def test_what_cannot_be_frozen_so_is_refused(root: Path) -> None:
    bert = root / "bert"
    with pytest.raises(ConfigError, match=r"frozen_blocks is 9, and timm:test_vit has 6 blocks \(blocks\.0 to blocks"):
        parts(bert, {**VIT, "frozen_blocks": 9})
    with pytest.raises(ConfigError, match="leaves nothing of hf:bert that learns"):
        parts(bert, text={"frozen_blocks": 4})
    with pytest.raises(ConfigError, match=r"tiny:debug cannot be entered .* These can: timm's plain ViTs, Efficient"):
        parts(bert, {"name": "tiny:debug", "frozen_blocks": 1})
    with pytest.raises(ConfigError, match=r"hf:t5 cannot be entered .* text encoders built like BERT"):
        parts(root / "t5", text={"frozen_blocks": 1})  # its first block knows where tokens stand
    with pytest.raises(ConfigError, match=r"frozen: true says that nothing of timm:test_vit learns, and frozen_blocks"):
        parts(bert, {**VIT, "frozen": True, "frozen_blocks": 2})
    with pytest.raises(ConfigError, match=r"take other sizes in pixels: timm:test_vit 48, timm:test_resnet 32\. Set"):
        parts(bert, [VIT, {"name": "timm:test_resnet", "image_size": 32}])
    with pytest.raises(ConfigError, match="name at least one image tower"):
        parts(bert, [])
    with pytest.raises(ConfigError, match=r"image\.0\.frozen_block\b"):
        parts(bert, {**VIT, "frozen_block": 1})


def test_what_learns_must_agree_with_the_training(root: Path) -> None:
    def method(kind: str, blocks: dict[str, Any], **settings: Any) -> Any:
        student = parts(root / "bert", {**VIT, **blocks}, text={"frozen_blocks": 2})
        return make_method(kind, student=student, settings=settings)

    with pytest.raises(ConfigError, match=r"options\.image of parts:small says frozen_blocks, .* leaves image out"):
        method("contrastive", {"frozen_blocks": 2}).train_only(["text", "projections"])
    with pytest.raises(ConfigError, match=r"train_parts names image, and options\.image of parts:small says frozen"):
        method("contrastive", {"frozen": True}).train_only(["image", "text", "projections"])
    hints = {"hints": {"P2": 1.0, "L3": 1.0}}
    compared = method("clip_kd", {"frozen_blocks": 5}, **hints)
    with pytest.raises(ConfigError, match=r"options\.image of parts:small freezes blocks\.\d, which this method"):
        compared.check_learning()
    method("clip_kd", {"frozen_blocks": 1}, hints={"P4": 1.0}).check_learning()
    mixed = parts(root / "bert", [{**VIT, "frozen": True}, {"name": "timm:test_resnet", "image_size": 48}])
    assert mixed.frozen_towers == ()
    assert (mixed.why_towers_live or "").startswith("timm:test_resnet learns from its first block on")
    assert parts(root / "bert").why_towers_live is None
    random = parts(root / "bert", {**VIT, "frozen_blocks": 2})
    assert (remark_on_unlearned(random) or "").startswith("frozen_blocks of image of parts:small has random weights")
