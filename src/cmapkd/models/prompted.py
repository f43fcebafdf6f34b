"""`PromptedEncoder`: a model whose texts begin with learned vectors, which its tokenizer leaves room for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cmapkd.data.tokens import Lengths
from cmapkd.data.types import TokenBatch
from cmapkd.models.architecture import settings_text
from cmapkd.models.base import DualEncoder, Tokenizer
from cmapkd.models.contracts import dual
from cmapkd.models.families import Loader
from cmapkd.models.parts import joined_parts, within
from cmapkd.models.prompts import TextPrompts
from cmapkd.models.reach import example_output, parameters_behind
from cmapkd.models.storage import WEIGHTS, load_weights, read_weights, write_model_folder
from cmapkd.models.stored_towers import live_within
from cmapkd.models.texts import evaluating
from cmapkd.models.types import Level, TowerFeatures

_LEAST = 2  # tokens of a text's own that must still fit behind the vectors and between start and end


class PromptedTokenizer:
    """A tokenizer whose texts have `count` placeholders from place `first` on: real tokens, of no influence.

    Texts are cut by so many tokens more, so that no text is longer than the tower takes.
    """

    def __init__(self, tokenizer: Tokenizer, *, count: int, first: int, placeholder: int) -> None:
        shorter: Any = getattr(tokenizer, "of_length", None)
        if shorter is None:
            raise ValueError(f"a {type(tokenizer).__name__} cannot leave room for learned vectors")
        self.context_length, self.vocab_size = tokenizer.context_length, tokenizer.vocab_size
        self.inner: Any = shorter(tokenizer.context_length - count)
        self.count, self.first, self.placeholder = count, first, placeholder
        self._origin: Any = tokenizer

    @property
    def whole_because(self) -> str | None:
        """See `DualEncoder.whole_texts`."""
        because: str | None = getattr(self.inner, "whole_because", None)
        return because

    def __call__(self, texts: str | Sequence[str], *, spans: bool = False) -> TokenBatch:
        tokens: TokenBatch = self.inner(texts, spans=spans)

        def widened(tensor: Tensor, fill: int) -> Tensor:
            places = F.pad(tensor[:, :0], (0, 0) * (tensor.ndim - 2) + (0, self.count), value=fill)
            return torch.cat([tensor[:, : self.first], places, tensor[:, self.first :]], dim=1)

        lengths = None if tokens.lengths is None else Lengths(each + self.count for each in tokens.lengths.of_each)
        return replace(
            tokens,
            ids=widened(tokens.ids, self.placeholder),
            mask=widened(tokens.mask, 1),
            spans=None if tokens.spans is None else widened(tokens.spans, 0),
            lengths=lengths,
        ).cut()

    def __eq__(self, other: object) -> bool:
        """Whether both read every text alike."""
        return isinstance(other, PromptedTokenizer) and self._reads() == other._reads()

    def __hash__(self) -> int:
        return hash(self._reads())

    def _reads(self) -> tuple[Any, ...]:
        return self._origin, self.count, self.first, self.placeholder


class PromptedEncoder(DualEncoder):
    """A model with learned vectors at the front of every text, behind its start token.

    It is a dual encoder as others: its tokenizer leaves room for the vectors, and a classifier of it is made of the
    template that they were tuned in. So evaluation, saving and loading need nothing else. Captions begin with the
    vectors too, which were not tuned for them.

    Attributes:
        model: the model as it was given.
        context: the vectors.
    """

    def __init__(self, model: DualEncoder, context: TextPrompts, *, placeholder: int, template: str) -> None:
        super().__init__()
        self.model, self.context, self.placeholder = model, context, placeholder
        self.class_templates = (template,)
        self.name, self.embed_dim = model.name, model.embed_dim
        self.image_spec, self.image_levels, self.text_levels = model.image_spec, model.image_levels, model.text_levels
        self.tokenizer = PromptedTokenizer(
            model.tokenizer, count=len(context.tokens), first=context.first, placeholder=placeholder
        )

    @property
    def architecture(self) -> str:
        return settings_text(self, self.model.architecture, self._options())

    @property
    def log_logit_scale(self) -> nn.Parameter:
        return self.model.log_logit_scale

    @property
    def logit_bias(self) -> Tensor | None:
        return self.model.logit_bias

    @property
    def parts(self) -> Mapping[str, frozenset[str]]:
        """Those of the model, and `context`."""
        return joined_parts(within("model", self.model.parts), {"context": frozenset({"context.tokens"})})

    @property
    def why_towers_live(self) -> str | None:
        return live_within(self.model, "a prompted model")

    @property
    def image_blocks(self) -> tuple[nn.Module, ...]:
        return self.model.image_blocks

    def clamp_logit_scale(self) -> None:
        self.model.clamp_logit_scale()

    def encode_image(self, images: Float[Tensor, "batch 3 height width"], levels: Sequence[str] = ()) -> TowerFeatures:
        return self.model.encode_image(images, levels)

    def tokens_in_joint_space(self, level: Level) -> Float[Tensor, "batch tokens dim"]:
        return self.model.tokens_in_joint_space(level)

    def encode_text(self, texts: TokenBatch, levels: Sequence[str] = ()) -> TowerFeatures:
        """Of texts by this model's own tokenizer, which leaves room for the vectors."""
        embedding = self.model.token_embedding
        assert embedding is not None
        with self.context.inside(embedding):
            return self.model.encode_text(texts, levels)

    def num_parameters(self) -> int:
        return self.model.num_parameters() + self.context.tokens.numel()

    def num_borrowed_parameters(self) -> int:
        return self.model.num_borrowed_parameters()

    def _options(self) -> dict[str, Any]:
        [template] = self.class_templates or ("{}",)
        shape = [*self.context.tokens.shape]
        return {
            "tokens": shape,
            "first": self.context.first,
            "placeholder": self.placeholder,
            "template": template,
        }

    def write(self, folder: Path) -> None:
        own = {key: value for key, value in self.state_dict().items() if not key.startswith("model.")}
        write_model_folder(folder, family="prompted", name=self.name, options=self._options(), weights=own)
        self.model.save(folder / "model")


def with_text_prompts(model: DualEncoder, *, context: str | int, template: str) -> PromptedEncoder:
    """A model with learned vectors in front of its texts.

    Args:
        context: words that the vectors begin as, one for each token; or how many random vectors there are.
        template: that class names are put into, with `{}`.
    Raises:
        ValueError: nothing can be put in the place of this text tower's embeddings, the model has such vectors, the
            context has no tokens or is longer than texts may be, or the template has no `{}`.
    """
    if "{}" not in template:
        raise ValueError(f"the template {template!r} has no {{}}, where the class name goes")
    if isinstance(model, PromptedEncoder):
        raise ValueError(
            f"the student, {model.name} with learned vectors in front of its texts, takes no further ones: name the "
            "model without them, which is in the folder `model` within its own (student/model of a run)"
        )
    embedding = model.token_embedding
    if embedding is None or not hasattr(model.tokenizer, "of_length"):
        raise ValueError(
            f"the text tower of {model.name} takes no learned vectors: its embeddings of tokens cannot be reached. "
            "Choose a tiny, open_clip, timm, hf or parts model as student."
        )
    device = model.log_logit_scale.device
    first, placeholder, words = _frame(model.tokenizer, context if isinstance(context, str) else "")
    count = len(words) if isinstance(context, str) else context
    if not 1 <= count <= model.tokenizer.context_length - first - 1 - _LEAST:
        raise ValueError(
            f"the context {context!r} is {count} tokens of {model.name}, whose texts have at most "
            f"{model.tokenizer.context_length}, start and end included: give 1 to "
            f"{model.tokenizer.context_length - first - 1 - _LEAST}"
        )
    with evaluating(model, device, None):
        vectors = embedding(torch.tensor([words or [placeholder]], device=device))[0]
    prompts = TextPrompts(vectors.shape[-1], count=count, first=first).to(device, vectors.dtype)
    if words:
        with torch.no_grad():
            prompts.tokens.copy_(vectors)
    prompted = PromptedEncoder(model, prompts, placeholder=placeholder, template=template)
    _check_influence(prompted)
    return prompted


def _frame(tokenizer: Tokenizer, words: str) -> tuple[int, int, list[int]]:
    """Where a text's own tokens begin, the id of an ordinary token, and the ids of `words` without start and end."""
    empty, letter, named = (_own(tokenizer, text) for text in ("", "a", words))
    first = next((n for n, pair in enumerate(zip(empty, letter, strict=False)) if pair[0] != pair[1]), len(empty))
    return first, letter[first], named[first : len(named) - (len(empty) - first)]


def _own(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text without padding."""
    tokens = tokenizer(text)
    return [number for number, real in zip(tokens.ids[0].tolist(), tokens.mask[0].tolist(), strict=True) if real]


def _check_influence(model: PromptedEncoder) -> None:
    """Refuses a tower that does not read what its embedding gives.

    Raises:
        ValueError: names the model.
    """
    if "context.tokens" not in parameters_behind(model, partial(example_output, model, "text")):
        raise ValueError(
            f"the text tower of {model.name} takes no learned vectors: it does not read what its table of tokens gives"
        )


def load(folder: Path, description: dict[str, Any], load_model: Loader) -> DualEncoder:
    """A folder that `PromptedEncoder.save` wrote."""
    options = description["options"]
    count, width = options["tokens"]
    context = TextPrompts(width, count=count, first=options["first"])
    inner = dual(load_model(folder / "model"), "a prompted model")
    model = PromptedEncoder(inner, context, placeholder=options["placeholder"], template=options["template"])
    weights = {key: value for key, value in model.state_dict().items() if key.startswith("model.")}
    load_weights(model, weights | read_weights(folder / WEIGHTS), where=folder)
    return model
