"""A model that writes whose every logit is known: it looks its answers up by picture and prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from cmapkd.data.dialogues import ChatInput, ChatItem, Dialogue
from cmapkd.data.types import BadSampleError, QuestionAnswer, Sample
from cmapkd.models.generative import CacheShape, ChatProcessor, Decoding, GenerativeModel
from cmapkd.models.token_types import LogitHead, Rows, TokenFeatures, TokenNeeds, Vocabulary

PAD, IMAGE, END, SIZE = 256, 257, 258, 259
SHARPNESS = 4.0  # logit of the token that the model would write; that of all others is 0

Table = Mapping[tuple[int, str], str]
"""Answers by the picture's red and the prompt."""


class ByteProcessor(ChatProcessor):
    """One token a byte; two visual tokens a picture, of which the red of its first pixel is kept."""

    pad_id = PAD

    def __init__(self, most: int = 200) -> None:
        self.most = most

    def read(self, dialogue: Dialogue, pictures: Sequence[Image.Image]) -> ChatItem:
        prompt = [IMAGE] * (2 * len(pictures)) + list("".join(turn.text for turn in dialogue[:-1]).encode())
        answer = self.encode_answer(dialogue[-1].text)
        ids = torch.tensor(prompt + answer)
        if len(ids) > self.most:
            raise ValueError(f"the dialogue has {len(ids)} tokens, more than {self.most}")
        learned = torch.arange(len(ids)) >= len(prompt)
        reds = torch.tensor([[float(picture.getpixel((0, 0))[0])] for picture in pictures])  # type: ignore[index]
        return ChatItem(ids, learned, ids == IMAGE, pictures={"reds": reds})

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(number for number in ids if number < PAD).decode(errors="replace")

    def encode_answer(self, text: str) -> list[int]:
        return [*text.encode(), END]

    def fingerprint(self) -> str:
        return f"bytes-{self.most}"


class LookupModel(GenerativeModel):
    """Writes what its table says of picture and prompt, else `?`, whatever stands before in the answer."""

    image_levels = text_levels = ()
    obeys = True  # keeps the least number of tokens

    def __init__(self, table: Table, *, name: str = "lookup", most: int = 200, pieces: str = "bytes") -> None:
        super().__init__()
        self.table, self.name, self.processor = dict(table), name, ByteProcessor(most)
        digest = hashlib.sha256(pieces.encode()).hexdigest()[:32]
        self.vocabulary = Vocabulary(SIZE, SIZE + 5, (END,), PAD, IMAGE, digest)
        self.weight = nn.Parameter(SHARPNESS * torch.eye(SIZE + 5, SIZE))
        self.num_written = 0

    @property
    def parts(self) -> Mapping[str, frozenset[str]]:
        return {"head": frozenset({"weight"})}

    @property
    def cache_shape(self) -> CacheShape:
        return CacheShape(layers=2, heads=3, width=5)

    @property
    def head(self) -> LogitHead:
        return LogitHead(self.weight[:SIZE])

    def write(self, folder: Path) -> None:
        raise NotImplementedError

    def forward(self, inputs: ChatInput, needs: TokenNeeds | None = None) -> TokenFeatures:
        assert needs is None or needs == TokenNeeds()
        values, sample, place = [], [], []
        for row, item in enumerate(inputs.items()):
            start = int(item.answer.nonzero()[0])
            for number in range(start, len(item.ids)):
                values.append(self._state(self._looked_up(item, start), number - start))
                sample.append(row)
                place.append(number - 1)
        rows = Rows(torch.stack(values), torch.tensor(sample), torch.tensor(place))
        return TokenFeatures({"answer": rows}, inputs.texts.ids[inputs.answer], self.head)

    def generate(self, inputs: ChatInput, how: Decoding, keys: Sequence[int] | None = None) -> list[list[int]]:
        assert how.temperature == 0
        assert keys is None
        answers = []
        for item in inputs.prompts().items():
            known, ids = self._looked_up(item, len(item.ids)), list[int]()
            while len(ids) < how.max_new_tokens and ids[-1:] != [END]:
                logits = self.logits(self._state(known, len(ids))[None])[0]
                if self.obeys and len(ids) < how.min_new_tokens:
                    logits[END] = -torch.inf
                ids.append(int(logits.argmax()))
            answers.append(ids)
        self.num_written += len(answers)
        return answers

    def _looked_up(self, item: ChatItem, start: int) -> list[int]:
        shown = item.pictures["reds"]
        red = int(shown[0, 0]) if len(shown) else -1
        return self.processor.encode_answer(
            self.table.get((red, self.processor.decode(item.ids[:start].tolist())), "?")
        )

    def _state(self, known: Sequence[int], number: int) -> Tensor:
        state = self.weight.new_zeros(SIZE)
        state[known[min(number, len(known) - 1)]] = 1.0
        return state


QUESTIONS = (
    (QuestionAnswer("Dog?", ("yes",), "yes/no", category="a"), QuestionAnswer("How many?", ("2", "two"), "number")),
    (QuestionAnswer("Dog?", ("no",), "yes/no", category="a"), QuestionAnswer("What colour?", ("red",) * 10)),
    (QuestionAnswer("Cat?", ("yes",), "yes/no", category="b"),),
)
CAPTIONS = (("a red dog runs", "the dog"), ("a cat sits here", "one cat"), ("two birds fly", "birds"))
ASK = "Describe the image."
TABLE: Table = {
    (0, "Dog?"): "Yes.",
    (0, "How many?"): "Two",
    (10, "Dog?"): "yes",
    (10, "What colour?"): "dark red wine colour",
    (20, "Cat?"): "maybe",
    (0, ASK): "a red dog",
    (10, ASK): "one cat",
    (20, ASK): "",
}


class AskedSource:
    """Plain pictures, whose red is ten times their index."""

    name = "asked"
    class_names = None

    def __init__(self, *, questions: bool = True, captions: bool = True, bad: Sequence[int] = ()) -> None:
        self.with_questions, self.with_captions, self.bad = questions, captions, bad

    def __len__(self) -> int:
        return len(QUESTIONS)

    def __getitem__(self, index: int) -> Sample:
        if index in self.bad:
            raise BadSampleError(f"s{index}", "truncated file")
        image = Image.new("RGB", (8, 8), (10 * index, 1, 2))
        asked = QUESTIONS[index] if self.with_questions else ()
        return Sample(f"s{index}", image, self.captions(index), questions=asked)

    def captions(self, index: int) -> tuple[str, ...]:
        return CAPTIONS[index] if self.with_captions else ()

    def fingerprint(self) -> str:
        return "asked"
