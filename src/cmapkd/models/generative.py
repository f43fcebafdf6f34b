"""`GenerativeModel`: what a model that writes about pictures looks like to the rest of cmapkd."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.data.dialogues import ChatInput, ChatProcessing, Dialogue, Turn, join_items
from cmapkd.models.asking import dialogues
from cmapkd.models.base import Model
from cmapkd.models.embedding import Picture
from cmapkd.models.token_bytes import Spelling
from cmapkd.models.token_types import EncodedShape, LogitHead, Seen, TokenFeatures, TokenNeeds, Vocabulary
from cmapkd.models.types import LevelInfo


@dataclass(frozen=True, slots=True)
class Decoding:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: after so many the answer ends, finished or not.
        temperature: 0: always the likeliest token; else tokens are drawn at this temperature.
        top_p: draws are among the likeliest tokens that together have this probability; 1: among all.
        min_new_tokens: before so many no end token is chosen; to time answers of a fixed length.
        never: tokens that are not written, as those that a model which reads the answer does not know.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    min_new_tokens: int = 0
    never: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What a language model keeps of every token while it writes: keys and values of each layer.

    Attributes:
        layers: that keep them.
        heads: of keys and values, in each layer.
        width: numbers of one key, and of one value.
        state: numbers that further layers keep of a dialogue, however long it is.
    """

    layers: int
    heads: int
    width: int
    state: int = 0

    def num_bytes(self, bytes_per_number: int) -> int:
        """Of one token, visual or not."""
        return 2 * self.layers * self.heads * self.width * bytes_per_number

    def state_bytes(self, bytes_per_number: int) -> int:
        """Of one dialogue, beside its tokens; states are kept in float32 at least."""
        return self.state * max(4, bytes_per_number)


class ChatProcessor(ChatProcessing):
    """A model's processor: tokenizer, template and picture processing; see `chat.py` for transformers' ones."""

    def learned(self, dialogue: Dialogue) -> list[Turn]:
        """The turns whose tokens `read` marks as answers."""
        *earlier, last = (turn for turn in dialogue if turn.role == "assistant")
        return [turn for turn in earlier if turn.learned] + [last]

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without end and other special tokens."""

    @abstractmethod
    def encode_answer(self, text: str) -> list[int]:
        """The tokens of an answer and the end token after them, as `read` appends them to a prompt."""

    def control_in(self, text: str) -> str | None:  # noqa: ARG002 - what has control tokens says so
        """The first control token in a text, which `read` refuses; None: there is none, or none is known."""
        return None

    def spelling(self, size: int) -> Spelling:
        """The bytes of the first `size` tokens.

        Raises:
            ConfigError: they are not known.
        """
        raise ConfigError(f"the bytes of the {size} tokens of a {type(self).__name__} are not known")


class GenerativeModel(Model):
    """A model that reads pictures and dialogues and writes answers.

    Its parts are `vision`, `projector`, `embeddings`, `language`, `head` (empty where it is tied to the embeddings) and
    `adapters` (LoRA).

    Attributes:
        processor: the model's own.
        vocabulary: the tokens that it can write.
        image_levels: outputs of the vision blocks (`blocks.N`), then `projector`.
        text_levels: outputs of the language model's layers (`layers.N`); the last is after the final norm.
        random_parts: the parts that have random weights, of a model that was just built; () once it was trained.
    """

    does: ClassVar[str] = "writes"
    processor: ChatProcessor
    vocabulary: Vocabulary
    image_levels: tuple[LevelInfo, ...]
    text_levels: tuple[LevelInfo, ...]
    random_parts: tuple[str, ...] = ()

    @property
    def cache_shape(self) -> CacheShape | None:
        """What is kept of every token while writing; None where it is not known. Windows of attention are ignored."""
        return None

    @abstractmethod
    def forward(self, inputs: ChatInput, needs: TokenNeeds | None = None) -> TokenFeatures:
        """What `needs` names; none: final states of the answers.

        Raises:
            ValueError: a level or layer that this model does not have.
        """

    @property
    def encoded_shape(self) -> EncodedShape | None:
        """What the projector is given, where `project` can be given it by others; None: it cannot."""
        return None

    @property
    def num_deeper(self) -> int:
        """How many further outputs of the vision tower the first layers are fed with (`Seen.deeper`)."""
        return 0

    def project(self, inputs: ChatInput, encoded: Float[Tensor, "tiles tokens width"]) -> Seen:  # noqa: ARG002
        """The projector's visual tokens of what stands in the place of its vision tower's output; with gradient.

        Of its own, `project(inputs, forward(inputs, TokenNeeds(encoded=True)).encoded)`, it is what `see` gives.

        Args:
            encoded: of all tiles of the batch, in their order, shaped as `encoded_shape` says.
        Raises:
            ValueError: this model has no `encoded_shape`, or the tokens are not as many as `inputs.visual` marks.
        """
        raise ValueError(f"the projector of {self.name} cannot be given what another vision tower made")

    def see(self, inputs: ChatInput) -> Seen:  # noqa: ARG002  for models that can be taken apart there
        """The visual tokens of the batch's pictures, as the language model is fed with them; with gradient.

        Raises:
            ValueError: this model cannot be taken apart between its vision tower and its language model.
        """
        raise ValueError(f"{self.name} does not give the visual tokens that its language model is fed with")

    def forward_seeing(self, inputs: ChatInput, seen: Seen, needs: TokenNeeds | None = None) -> TokenFeatures:  # noqa: ARG002
        """As `forward`, but the language model is fed with visual tokens that were made elsewhere.

        With its own, `model.forward_seeing(inputs, model.see(inputs))`, it gives what `forward` gives. Gradients reach
        whatever made the tokens, also through a frozen language model.

        Args:
            seen: as many tokens as `inputs.visual` marks, in their order, as wide as the language model.
        Raises:
            ValueError: the tokens do not fit, or outputs of vision blocks are asked for.
        """
        raise ValueError(f"{self.name} cannot be fed with visual tokens that were made elsewhere")

    @property
    def attention(self) -> str:
        """How attention is computed, where that may change the last digits; part of a cache's identity."""
        return ""

    @property
    def attention_heads(self) -> int | None:
        """How many maps a layer of the language model has; None where they are not known, or cannot be read."""
        return None

    @property
    @abstractmethod
    def head(self) -> LogitHead:
        """Makes logits of final states, over the real tokens."""

    def logits(self, hidden: Float[Tensor, "rows width"]) -> Float[Tensor, "rows size"]:
        """Logits over the real tokens, float32."""
        return self.head(hidden)

    @abstractmethod
    def generate(self, inputs: ChatInput, how: Decoding, keys: Sequence[int] | None = None) -> list[list[int]]:
        """Answers to the prompts of `inputs` (`ChatInput.prompts` is taken), without gradient and in eval mode.

        Args:
            keys: one for each dialogue where tokens are drawn. The draw of a token is a pure function of the key and of
                its place in the answer: other dialogues in the batch change nothing.
        Returns:
            The tokens of each answer, up to and including its end token, if it ended.
        Raises:
            ValueError: tokens are to be drawn, and there are no keys.
        """

    def answer(
        self,
        pictures: Picture | Iterable[Picture | None] | None,
        questions: str | Iterable[str],
        *,
        max_new_tokens: int = 64,
        batch_size: int = 16,
    ) -> list[str]:
        """Greedy answers to questions about pictures, by the model's own template and preprocessing.

        The model computes on the device where it is, in eval mode and without gradient. Its modes are restored after.

        Args:
            pictures: paths, bytes of image files or PIL images; one for all questions, or one for each. None: the
                question has no picture.
            questions: one for all pictures, or one for each.
            max_new_tokens: after so many tokens an answer ends, finished or not.
            batch_size: how many are answered at once; in half precision it may change answers.
        Returns:
            An answer for each pair, without its end token.
        Raises:
            ValueError: the numbers of pictures and questions differ, a number is below 1, or the model cannot read a
                question, with the reason.
            FileNotFoundError: a picture's file is not there.
            BadSampleError: a picture cannot be read; the message names it.
            TypeError: an item is no picture, or no text.
        """
        if batch_size < 1 or max_new_tokens < 1:
            raise ValueError(f"batch_size is {batch_size} and max_new_tokens {max_new_tokens}: give whole numbers >= 1")
        asked = dialogues(pictures, questions)
        answers: list[str] = []
        while batch := list(islice(asked, batch_size)):
            items = [self.processor.read(dialogue, seen) for dialogue, seen in batch]
            inputs = join_items(items, self.processor.pad_id).to(self.device)
            written = self.generate(inputs, Decoding(max_new_tokens=max_new_tokens))
            ends = self.vocabulary.end_ids
            whole = (ids[:-1] if ids and ids[-1] in ends else ids for ids in written)
            answers += [self.processor.decode(ids).strip() for ids in whole]
        return answers
