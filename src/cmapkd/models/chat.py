"""`HfChatProcessor`: from a dialogue to tokens, by a transformers processor (tokenizer, template, pictures)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.data.dialogues import ChatItem, Dialogue, Turn
from cmapkd.models.chat_pictures import PictureSizes
from cmapkd.models.errors import first_line
from cmapkd.models.generative import ChatProcessor
from cmapkd.models.token_bytes import Spelling, token_bytes

_PROBE = (Turn("user", "What is it?", pictures=1), Turn("assistant", "cmapkd"))
_PROBE_TEXT = (Turn("user", "How many, and where?"), Turn("assistant", "2 of 10"))
_SHORT, _ANSWERS_KEPT = 32, 2**14  # characters of an answer whose tokens are kept, and how many such answers
_NAMES = ("image_processor_type", "processor_class", "auto_map")  # of a saved image processor; none is a setting


class HfChatProcessor(ChatProcessor):
    """Reads dialogues as generation does: the prompt ends where the model begins to write.

    The template is applied to all turns before the last answer, with its generation prompt, and the processor expands
    the pictures. The answer is tokenised apart, without special tokens, and its end token is appended. Equal answers
    therefore have equal tokens in all models that share a tokenizer and write the same before an answer. Earlier
    answers are learned too, but for those whose turn says that they are not.

    Some templates write a space before an answer that their generation prompt leaves to the model (SmolVLM). The model
    learns that space as the beginning of the answer, and `decode` leaves it out.

    The end token is the first special token that the template puts behind an answer; where there is none, the
    tokenizer's own. Every tensor that the processor gives is kept.

    Args:
        native: transformers' processor.
        image_id: the token that stands for a visual token.
        max_tokens: longest dialogue with its picture, in tokens.
        picture_options: for the image processor, at each call.
        nested: whether the processor puts a batch axis before its rows of pictures (Idefics3).
    Attributes:
        lead: whitespace that the model writes before each answer; mostly none.
    Raises:
        ConfigError: the template or the tokenizer cannot serve a model that writes.
    """

    max_tokens: int

    def __init__(
        self,
        native: Any,
        *,
        image_id: int,
        max_tokens: int,
        picture_options: Mapping[str, Any] | None = None,
        nested: bool = False,
        name: str = "the model",
    ) -> None:
        self.native, self.image_id, self.max_tokens = native, image_id, max_tokens
        self.picture_options, self.nested = dict(picture_options or {}), nested
        self._answers: dict[str, list[int]] = {}
        self.end_id = self._end_token(name)
        self.lead = self._before_answers()
        pad = native.tokenizer.pad_token_id
        self.pad_id: int = self.end_id if pad is None else pad
        self._forbidden = re.compile("|".join(map(re.escape, self._control_texts())))
        self._sizes = PictureSizes(native, image_id, self.picture_options, self._control_texts())
        self._numbers = self._numbers_of_tokens(name)

    def read(self, dialogue: Dialogue, pictures: Sequence[Image.Image]) -> ChatItem:
        self._check(dialogue, pictures)
        text = self._rendered(dialogue[:-1], prompt=True)
        found = self._seen(text, pictures)
        prompt = found.pop("input_ids")[0]
        found.pop("attention_mask", None)
        tail, worse = torch.tensor(self.encode_answer(dialogue[-1].text)), dialogue[-1].rejected
        rejected = tuple(self.encode_answer(worse)) if worse else ()
        ids = torch.cat([prompt, tail])
        longest = len(prompt) + max(len(tail), len(rejected))
        if longest > self.max_tokens:
            raise ValueError(f"the dialogue has {longest} tokens with its picture, more than {self.max_tokens}")
        visual = ids == self.image_id
        if bool(visual.any()) != bool(pictures):
            raise ValueError(f"{len(pictures)} pictures became {int(visual.sum())} visual tokens by the chat template")
        answer = torch.cat([torch.zeros_like(prompt, dtype=torch.bool), torch.ones_like(tail, dtype=torch.bool)])
        self._mark_earlier(answer, dialogue, text, prompt)
        numbers = {name: self._padded(found.pop(name, None), len(ids)) for name in self._numbers}
        pixels = {key: self._rows(rows) for key, rows in found.items()}
        return ChatItem(ids, answer, visual, numbers, pixels, given=dialogue[-1].given, rejected=rejected)

    def control_in(self, text: str) -> str | None:
        found = self._forbidden.search(text)
        return found.group() if found is not None else None

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.native.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text.removeprefix(self.lead)

    def encode_answer(self, text: str) -> list[int]:
        """The tokens of an answer, with what the model writes before it, and the end token after them.

        Raises:
            ValueError: the answer is empty, or its tokens do not stand for it.
        """
        known = self._answers.get(text)
        if known is not None:
            return [*known, self.end_id]
        if not text.strip():
            raise ValueError("the answer is empty")
        ids = self._bare_ids(self.lead + text)
        if self.decode(ids) != text:
            raise ValueError(f"the answer {text[:80]!r} does not survive the tokenizer: {self.decode(ids)[:80]!r}")
        if len(text) <= _SHORT and len(self._answers) < _ANSWERS_KEPT:  # a word that answers many questions
            self._answers[text] = ids
        return [*ids, self.end_id]

    def spelling(self, size: int) -> Spelling:
        tokenizer = self.native.tokenizer
        control, name = control_ids(tokenizer), type(tokenizer).__name__
        pieces = token_bytes(tokenizer, size=size, control=control | {self.end_id}, name=name)
        probe = "a"  # some tokenizers put a space before a text, beside what the template writes
        written = b"".join(pieces[number] for number in self.encode_answer(probe))
        if not written.endswith(probe.encode()):
            raise ConfigError(
                f"the tokens of {name} do not spell {probe!r}, but {written!r}: their bytes are not known"
            )
        return Spelling(pieces, written[: -len(probe)], self.end_id)

    def fingerprint(self) -> str:
        return self._fingerprint

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HfChatProcessor) and self.fingerprint() == other.fingerprint()

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    @cached_property
    def _fingerprint(self) -> str:
        """Of the template, of all settings for pictures, of probes as they are read, and of the whole tokenizer.

        Probes are small. They do not show limits that only large pictures reach, so the settings count too.
        """
        settings = (self.native.chat_template, self.max_tokens, self.end_id, self.image_id, self._picture_settings())
        digest = hashlib.sha256(repr(settings).encode())
        for dialogue in (_PROBE, _PROBE_TEXT):
            found = self._processed(self._rendered(dialogue[:-1], prompt=True), _probe_pictures(dialogue))
            for key in sorted(found):
                digest.update(f"{key} {tuple(found[key].shape)}".encode())
                digest.update(found[key].contiguous().numpy().tobytes())
            digest.update(repr(self.encode_answer(dialogue[-1].text)).encode())
        digest.update(vocabulary_digest(self.native.tokenizer).encode())
        digest.update(_rules_of(self.native.tokenizer).encode())
        return digest.hexdigest()[:32]

    def _picture_settings(self) -> str:
        """All settings of the image processor, but for the name of its class, as JSON."""
        settings = {
            key: value
            for key, value in self.native.image_processor.to_dict().items()
            if value is not None and key not in _NAMES
        }
        return json.dumps([settings, self.picture_options], sort_keys=True, default=str)

    def _check(self, dialogue: Dialogue, pictures: Sequence[Image.Image]) -> None:
        if len(dialogue) < 2 or dialogue[-1].role != "assistant":
            raise ValueError("a dialogue needs a question, and an answer of the assistant as its last turn")
        if not dialogue[-1].learned:
            raise ValueError("the last answer is marked as one that is not learned")
        stated = sum(turn.pictures for turn in dialogue)
        if stated != len(pictures) or stated > 1:
            raise ValueError(f"the turns speak of {stated} pictures, {len(pictures)} are given; one is the most")
        for turn in dialogue:
            control = self.control_in(turn.text) or self.control_in(turn.rejected)
            if control is not None:
                raise ValueError(f"the text of a turn has the control token {control!r}")

    def _mark_earlier(self, answer: Tensor, dialogue: Dialogue, text: str, prompt: Tensor) -> None:
        """Marks the earlier answers in the prompt, where the template writes them as generation would.

        Raises:
            ValueError: the template writes an answer otherwise once more turns follow.
        """
        learned = [number for number, turn in enumerate(dialogue[:-1]) if turn.role == "assistant" and turn.learned]
        if not learned:
            return
        plain, token_at = self._tokens_by_place(text)
        grown = len(prompt) - len(plain)  # tokens of the expanded picture
        for number in learned:
            turn = dialogue[number]
            before = dialogue[:number]
            ids = self.encode_answer(turn.text)
            head = self._rendered(before, prompt=True)
            start = token_at.get(len(head)) if text.startswith(head) else None
            if start is None or plain[start : start + len(ids)] != ids:  # count what is before
                start = len(self._plain_ids(head))
            start += grown if any(earlier.pictures for earlier in before) else 0
            if prompt[start : start + len(ids)].tolist() != ids:
                raise ValueError(
                    f"answer {turn.text[:80]!r} has other tokens once more turns follow, so it cannot be learned "
                    "there: set data.prompts.learn: last"
                )
            answer[start : start + len(ids)] = True

    def _rendered(self, turns: Sequence[Turn], *, prompt: bool) -> str:
        messages = [
            {
                "role": turn.role,
                "content": [*({"type": "image"} for _ in range(turn.pictures)), {"type": "text", "text": turn.text}],
            }
            for turn in turns
        ]
        try:
            text: str = self.native.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # templates raise for roles or orders that they do not know
            raise ValueError(f"the chat template refuses the dialogue: {first_line(error)}") from None
        return text

    def _seen(self, text: str, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """What the processor gives for one dialogue, by a shorter way for pictures of a size that is known."""
        if len(pictures) != 1:
            return self._processed(text, pictures)
        picture = pictures[0].convert("RGB")
        known = self._sizes.read(text, picture, self._adds_special(text), self._processed)
        return self._processed(text, [picture]) if known is None else known

    def _processed(self, text: str, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """What the processor gives for one dialogue, pictures expanded."""
        options: dict[str, Any] = {"text_kwargs": {"add_special_tokens": self._adds_special(text), "padding": False}}
        if pictures:
            options.update(images=[[picture.convert("RGB") for picture in pictures]])
            options["images_kwargs"] = self.picture_options
        try:
            found = self.native(text=[text], return_tensors="pt", **options)
        except Exception as error:  # of seven libraries' processors, anything
            raise ValueError(f"the processor cannot read the dialogue: {first_line(error)}") from None
        return {key: value for key, value in found.items() if isinstance(value, Tensor)}

    def _plain_ids(self, text: str) -> list[int]:
        ids: list[int] = self.native.tokenizer(text, add_special_tokens=self._adds_special(text))["input_ids"]
        return ids

    def _tokens_by_place(self, text: str) -> tuple[list[int], dict[int, int]]:
        """The tokens, and which of them begins at each character; none of tokenizers that do not know places.

        So a dialogue of many turns is tokenised once, and not once for each turn.
        """
        tokenizer = self.native.tokenizer
        if not tokenizer.is_fast:
            return self._plain_ids(text), {}
        found = tokenizer(text, add_special_tokens=self._adds_special(text), return_offsets_mapping=True)
        places = {begin: number for number, (begin, end) in enumerate(found["offset_mapping"]) if end > begin}
        return found["input_ids"], places

    def _bare_ids(self, text: str) -> list[int]:
        ids: list[int] = self.native.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _adds_special(self, text: str) -> bool:
        """Templates that write the start token themselves are not given a second one."""
        start = self.native.tokenizer.bos_token
        return start is None or not text.startswith(start)

    def _padded(self, numbers: Tensor | None, length: int) -> Tensor:
        """Numbers of the prompt's tokens, 0 for those of the answer."""
        made = torch.zeros(length, dtype=torch.long)
        if numbers is not None:
            made[: numbers.shape[1]] = numbers[0]
        return made

    def _rows(self, pictures: Tensor) -> Tensor:
        return pictures[0] if self.nested else pictures

    def _end_token(self, name: str) -> int:
        template = self.native.chat_template
        if not template:
            raise ConfigError(
                f"the processor of {name} has no chat template: give a model that was tuned for dialogues"
            )
        question, answer = _PROBE
        if self._rendered([question], prompt=True) == self._rendered([question], prompt=False):
            raise ConfigError(
                f"the chat template of {name} has no generation prompt, so a prompt does not end where the model "
                "begins to write: give a template that reads add_generation_prompt"
            )
        whole = self._rendered([question, answer], prompt=False)
        _, found, rest = whole.rpartition(answer.text)
        if not found:
            raise ConfigError(f"the chat template of {name} leaves out the assistant's text")
        special = control_ids(self.native.tokenizer)
        end: int | None = next(
            (token for token in self._bare_ids(rest) if token in special), self.native.tokenizer.eos_token_id
        )
        if end is None:
            raise ConfigError(f"{name} has no end token, in its chat template or its tokenizer: it would never stop")
        return end

    def _before_answers(self) -> str:
        """Whitespace of the template between its generation prompt and an answer.

        It is none where the tokenizer puts a space before a text by itself, as Llama's does.
        """
        question, answer = _PROBE
        prompt, whole = self._rendered([question], prompt=True), self._rendered([question, answer], prompt=False)
        start = whole.rfind(answer.text)
        lead = whole[len(prompt) : start]
        if not whole.startswith(prompt) or lead.strip():
            return ""
        written = self._plain_ids(whole[: start + len(answer.text)])
        return "" if written == [*self._plain_ids(prompt), *self._bare_ids(answer.text)] else lead

    def _control_texts(self) -> list[str]:
        """Texts that would become control tokens, or that the processor would expand to a picture."""
        tokenizer = self.native.tokenizer
        named = [getattr(self.native, key) for key in vars(self.native) if key.endswith("_token")]
        known = {tokenizer.convert_ids_to_tokens(token) for token in control_ids(tokenizer)}
        known |= {text for text in named if isinstance(text, str) and text}
        return sorted(known, key=len, reverse=True)

    def _numbers_of_tokens(self, name: str) -> tuple[str, ...]:
        """Names of the numbers that the processor gives of each token; tested with and without a picture."""
        names: dict[str, None] = {}
        for dialogue in (_PROBE, _PROBE_TEXT):
            try:
                found = self._processed(self._rendered(dialogue[:-1], prompt=True), _probe_pictures(dialogue))
            except ValueError as error:
                raise ConfigError(f"{name}: {error}") from None
            shape = found["input_ids"].shape
            others = found.keys() - {"input_ids", "attention_mask"}
            names.update(dict.fromkeys(sorted(key for key in others if _is_of_tokens(found[key], shape))))
        return tuple(names)


def control_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of a transformers tokenizer's special tokens, of whatever purpose."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def vocabulary_digest(tokenizer: Any) -> str:
    """Of all (id, piece) of a transformers tokenizer."""
    pieces = sorted((number, piece) for piece, number in tokenizer.get_vocab().items())
    return hashlib.sha256(repr(pieces).encode()).hexdigest()[:32]


def _rules_of(tokenizer: Any) -> str:
    """How texts become pieces (merges, splitting, normalisation), as JSON; empty of a tokenizer written in Python.

    Cutting and padding are left out: both are set at each call.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return ""
    rules = json.loads(backend.to_str())
    return json.dumps({key: rules[key] for key in sorted(rules) if key not in ("truncation", "padding")})


def _is_of_tokens(value: Tensor, shape: Iterable[int]) -> bool:
    return not value.is_floating_point() and tuple(value.shape) == tuple(shape)


def _probe_pictures(dialogue: Dialogue) -> list[Image.Image]:
    """A picture with two gradients, so that another order or scale of pixels shows."""
    if not any(turn.pictures for turn in dialogue):
        return []
    row = Image.linear_gradient("L").resize((56, 40))
    return [Image.merge("RGB", (row, row.transpose(Image.Transpose.ROTATE_180), Image.new("L", (56, 40), 90)))]
