"""Learned vectors in front of the texts, in every family with a text tower: a model as others, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from family_support import FAMILIES, make
from model_support import check_contract, check_round_trip

from cmapkd.data.open import open_source
from cmapkd.evaluation.config import EvaluationConfig
from cmapkd.evaluation.run import evaluate
from cmapkd.export.layout import write_tokenizer
from cmapkd.models import build_model, dual, load_model
from cmapkd.models.prompted import PromptedEncoder, PromptedTokenizer, with_text_prompts
from cmapkd.models.texts import class_vectors, prompt_bank
from cmapkd.models.tiny import TinyDualEncoder
from helpers import CLASSES, make_model

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = [name for name in FAMILIES if name not in ("open_clip RN50-like", "timm")]  # whose text tower is open_clip's


@pytest.mark.parametrize("name", KINDS)
def test_vectors_that_begin_as_words_are_those_words_and_learn(name: str, tmp_path: Path) -> None:
    model = make(name, tmp_path).eval()
    own = model.tokenizer(["a red square", "a red two circles"])
    hooks = len(model.token_embedding._forward_hooks)  # type: ignore[union-attr]
    prompted = with_text_prompts(model, context="a red", template="{}.")
    assert prompted.tokenizer.context_length == model.tokenizer.context_length
    found = prompted.encode_text(prompted.tokenizer(["square", "two circles"])).embedding
    torch.testing.assert_close(found, model.encode_text(own).embedding, rtol=1e-5, atol=1e-6)
    found.square().sum().backward()
    assert prompted.context.tokens.grad is not None
    assert (prompted.context.tokens.grad.abs().amax(1) > 0).all()
    assert len(model.token_embedding._forward_hooks) == hooks  # type: ignore[union-attr]
    with torch.no_grad():
        prompted.context.tokens.add_(1.0)
    check_contract(prompted)
    loaded = check_round_trip(prompted, tmp_path / "saved")
    assert isinstance(loaded, PromptedEncoder)
    assert loaded.class_templates == ("{}.",)
    assert (
        loaded.num_parameters() == prompted.num_parameters() == model.num_parameters() + prompted.context.tokens.numel()
    )
    assert prompted.parts["context"] == {"context.tokens"}
    assert "context.tokens" in prompted.no_weight_decay()


def test_long_texts_are_cut_for_the_vectors_and_keep_their_end() -> None:
    prompted = with_text_prompts(make_model(), context=3, template="{}")
    tokens = prompted.tokenizer([" ".join(["red"] * 30), "red cat"], spans=True)
    own = prompted.model.tokenizer([" ".join(["red"] * 30)]).ids[0]
    assert tokens.ids.shape == (2, prompted.tokenizer.context_length)
    assert tokens.ids[0, -1] == own[-1]
    assert tokens.ids[:, 1:4].unique().tolist() == [prompted.placeholder]
    assert tokens.mask.sum(1).tolist() == [12, 7]
    assert tokens.lengths is not None
    assert tokens.lengths.of_each == (12, 7)
    assert tokens.spans is not None
    assert tokens.spans[1, :6].tolist() == [[0, 0]] * 4 + [[0, 3], [4, 7]]
    assert prompted.tokenizer == PromptedTokenizer(
        prompted.model.tokenizer, count=3, first=1, placeholder=prompted.placeholder
    )
    assert prompted.tokenizer != with_text_prompts(make_model(), context=2, template="{}").tokenizer


def test_random_vectors_come_from_the_seed_and_leave_the_model_as_it_is() -> None:
    model = make_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(1)
    one = with_text_prompts(model, context=4, template="{}").context.tokens
    torch.manual_seed(1)
    assert torch.equal(one, with_text_prompts(model, context=4, template="{}").context.tokens)
    assert one.shape == (4, 32)
    assert 0.01 < float(one.detach().std()) < 0.03
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_classifiers_are_made_of_the_template_that_the_vectors_were_tuned_in(tmp_path: Path) -> None:
    source = open_source("scenes:easy@val?length=30")
    torch.manual_seed(0)
    model = dual(
        build_model("tiny:debug", captions=[each for index in range(30) for each in source.captions(index)]), "the test"
    )
    prompted = with_text_prompts(model, context="a red", template="one {}").eval()
    names = ["circle", "blue square"]
    found = class_vectors(prompted, names, ["a photo of a {}.", "{}"], device="cpu")
    torch.testing.assert_close(found, class_vectors(model, names, ["a red one {}"], device="cpu"))
    (tmp_path / "words.txt").write_text("a red one {}\n")
    scores = [
        evaluate(each, source, EvaluationConfig(tasks=("zero_shot",), **config), device="cpu")["zero_shot"]
        for each, config in ((prompted, {}), (model, {"templates": str(tmp_path / "words.txt")}))
    ]
    assert scores[0] == scores[1]


def test_what_cannot_be_prompted_is_refused(tmp_path: Path) -> None:
    class Unreached(TinyDualEncoder):
        token_embedding = None  # type: ignore[assignment]

    class Elsewhere(TinyDualEncoder):
        token_embedding = torch.nn.Embedding(100, 32)

    with pytest.raises(ValueError, match="takes no learned vectors: its embeddings of tokens cannot be reached"):
        with_text_prompts(make_model(kind=Unreached), context=2, template="{}")
    with pytest.raises(ValueError, match="it does not read what its table of tokens gives"):
        with_text_prompts(make_model(kind=Elsewhere), context=2, template="{}")
    with pytest.raises(ValueError, match=r"the template 'a photo' has no \{\}"):
        with_text_prompts(make_model(), context=2, template="a photo")
    with pytest.raises(
        ValueError, match=r"with learned vectors in front of its texts, takes no further ones: name the"
    ):
        with_text_prompts(with_text_prompts(make_model(), context=2, template="{}"), context=2, template="{}")
    for context, tokens in (("", 0), (9, 9), (" ".join(["red"] * 12), 10)):
        with pytest.raises(
            ValueError, match=rf"is {tokens} tokens of test-16, whose texts have at most 12.*give 1 to 8"
        ):
            with_text_prompts(make_model(), context=context, template="{}")
    with pytest.raises(ValueError, match="learned vectors between the tokens of its texts"):
        write_tokenizer(with_text_prompts(make_model(), context=2, template="{}"), tmp_path)


def test_a_bank_has_every_prompt_and_its_mean_is_the_class_vector() -> None:
    model = make_model().eval()
    bank, mask = prompt_bank(model, CLASSES.of_class, device="cpu")
    assert bank.shape == (5, 2, 16)
    assert mask.all()
    torch.testing.assert_close(bank.norm(dim=-1), torch.ones(5, 2))
    vectors = class_vectors(model, CLASSES.names, CLASSES.templates, device="cpu")
    torch.testing.assert_close(torch.nn.functional.normalize(bank.mean(1), dim=-1), vectors)
    ragged, mask = prompt_bank(model, [["red cat"], ["blue boat", "round house", "tree"]], device="cpu")
    assert mask.tolist() == [[True, False, False], [True] * 3]
    assert not ragged[0, 1:].any()
    torch.testing.assert_close(ragged[1, 0], bank[2, 0])
    with pytest.raises(ValueError, match=r"needs texts of every class, got \[1, 0\]"):
        prompt_bank(model, [["red cat"], []], device="cpu")


def test_a_folder_has_no_pickle_and_says_what_it_is(tmp_path: Path) -> None:
    with_text_prompts(make_model(), context=2, template="{}").save(tmp_path)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    described = json.loads((tmp_path / "cmapkd.json").read_text())
    assert described["family"] == "prompted"
    assert described["options"] == {"tokens": [2, 32], "first": 1, "placeholder": 4, "template": "{}"}
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_model(tmp_path)
