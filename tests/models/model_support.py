"""Small random models in the libraries' real formats, and what every adapter's tests ask of one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from cmapkd.data.types import ModelInput, TokenBatch
from cmapkd.models import DualEncoder, LevelRequest, load_model

TEXTS = ("a red square", "two blue circles and one small green triangle", "a")


def picture(width: int = 53, height: int = 37) -> Image.Image:
    """A random RGB picture that is not square."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def images(model: DualEncoder, batch: int = 2) -> Tensor:
    return torch.randn(
        batch, 3, model.image_spec.size, model.image_spec.size, generator=torch.Generator().manual_seed(1)
    )


def inputs(model: DualEncoder) -> ModelInput:
    return ModelInput(images(model, len(TEXTS)), model.tokenizer(TEXTS))


def randomise(module: nn.Module) -> None:
    """Moves every parameter and statistic off its neutral start (zero gains, zero biases), so that mistakes show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if not value.is_floating_point() or name.endswith(("logit_scale", "logit_bias")):
                continue
            if name.endswith("running_var"):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            elif value.dim() < 2:
                value.add_(torch.randn(value.shape, generator=generator) * 0.1)


def hooked(modules: Sequence[nn.Module], run: Callable[[], Any]) -> list[Tensor]:
    """What the library's own blocks return during `run`."""
    kept: dict[int, Tensor] = {}

    def keep(number: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            kept[number] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [module.register_forward_hook(keep(number)) for number, module in enumerate(modules)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [kept[number] for number in range(len(modules))]


@contextmanager
def counting_calls(modules: Sequence[nn.Module], argument: str) -> Iterator[list[bool]]:
    """Whether each call of the modules was given `argument` as true."""
    calls: list[bool] = []

    def hook(_module: nn.Module, _arguments: Any, named: dict[str, Any]) -> None:
        calls.append(bool(named.get(argument)))

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def features(model: DualEncoder, batch: ModelInput) -> list[Tensor]:
    """Embeddings and every level of both towers, and the logit scale."""
    needs = LevelRequest(tuple(i.name for i in model.image_levels), tuple(i.name for i in model.text_levels))
    output = model(batch, needs)
    towers = (output.image, output.text)
    return [
        *(tower.embedding for tower in towers),
        *(level.values for tower in towers for level in tower.levels.values()),
        output.logit_scale,
        *([] if output.logit_bias is None else [output.logit_bias]),
    ]


@torch.no_grad()
def check_contract(model: DualEncoder) -> None:
    """What any adapter promises, whichever library it wraps."""
    batch = inputs(model)
    plain = model(batch)
    assert plain.image.embedding.shape == plain.text.embedding.shape == (len(TEXTS), model.embed_dim)
    assert plain.image.levels == plain.text.levels == {}
    assert plain.logit_scale.shape == ()
    assert isinstance(model.log_logit_scale, nn.Parameter)
    assert any(parameter is model.log_logit_scale for parameter in model.parameters())
    torch.testing.assert_close(plain.logit_scale, model.log_logit_scale.exp().reshape(()))

    needs = LevelRequest(tuple(i.name for i in model.image_levels), tuple(i.name for i in model.text_levels))
    full = model(batch, needs)
    torch.testing.assert_close(full.image.embedding, plain.image.embedding, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(full.text.embedding, plain.text.embedding, rtol=1e-5, atol=1e-6)
    for tower, infos in ((full.image, model.image_levels), (full.text, model.text_levels)):
        assert list(tower.levels) == [info.name for info in infos]
        for info, level in zip(infos, tower.levels.values(), strict=True):
            assert level.layout == info.layout
            assert level.values.shape[2 if info.layout == "tokens" else 1] == info.width
    for level in full.image.levels.values():
        assert level.grid is not None
        if level.layout == "map":
            assert tuple(level.values.shape[2:]) == level.grid
        else:
            assert level.values.shape[1] == level.num_prefix + level.grid[0] * level.grid[1]
    for level in full.text.levels.values():
        assert level.mask is not None
        assert level.mask.shape == level.values.shape[:2]

    some = LevelRequest(needs.image_levels[:1], needs.text_levels[-1:])
    for tower, names in ((model(batch, some).image, some.image_levels), (model(batch, some).text, some.text_levels)):
        assert tuple(tower.levels) == names

    twin = copy.deepcopy(model)
    for left, right in zip(features(model, batch), features(twin, batch), strict=True):
        assert torch.equal(left, right)
    tokenizer = pickle.loads(pickle.dumps(model.tokenizer))  # noqa: S301
    assert same_tokens(tokenizer(TEXTS), model.tokenizer(TEXTS))
    assert batch.texts.ids.shape[1] <= model.tokenizer.context_length
    assert int(batch.texts.ids.max()) < model.tokenizer.vocab_size


def check_round_trip(model: DualEncoder, folder: Path) -> DualEncoder:
    """Saved and loaded: the same outputs to the last bit, the same tokens, pixels and name."""
    model.save(folder)
    loaded = load_model(folder)
    batch = inputs(model)
    for left, right in zip(features(model, batch), features(loaded, batch), strict=True):
        assert torch.equal(left, right)
    assert same_tokens(loaded.tokenizer(TEXTS), batch.texts)
    assert loaded.image_spec == model.image_spec
    assert loaded.name == model.name
    assert (loaded.image_levels, loaded.text_levels) == (model.image_levels, model.text_levels)
    return loaded


def whole(model: DualEncoder, texts: TokenBatch) -> TokenBatch:
    """The same texts padded to the full length, as the library's own tokenizer pads them with 0."""
    more = model.tokenizer.context_length - texts.ids.shape[1]
    return TokenBatch(F.pad(texts.ids, (0, more)), F.pad(texts.mask, (0, more)))


def same_tokens(left: TokenBatch, right: TokenBatch) -> bool:
    return torch.equal(left.ids, right.ids) and torch.equal(left.mask, right.mask)


def save_word_tokenizer(folder: Path, *, pad: str = "[PAD]", end: str = "</s>") -> None:
    """A transformers tokenizer of whole words; every text ends with `end`. With pad = end it pads as SigLIP does."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for text in TEXTS for word in text.split()})
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([pad, end, "[UNK]", *words]))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, vocabulary[end])])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=pad, eos_token=end, unk_token="[UNK]")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)


def save_unsafe_pickle(path: Path) -> None:
    """A torch file that would run code where it is unpickled without care."""
    torch.save({"state_dict": Harmful()}, path)


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("this must never run",)


def offline(monkeypatch: Any) -> None:
    """No request leaves this machine, whatever its network is."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
