"""What the doctor sees in models that write: their tokens, the dialogues they are given, and whether they look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from cmapkd.config import ConfigError
from cmapkd.data.dialogues import ChatItem, Dialogue, join_items
from cmapkd.data.prompting import Prompting
from cmapkd.data.types import BadSampleError, Source
from cmapkd.data.views import WHOLE, draw_view
from cmapkd.diagnosis.finding import Finding
from cmapkd.diagnosis.models import size_beside
from cmapkd.evaluation.token_scores import negative_log_likelihoods, row_blocks
from cmapkd.features.top_tokens import top_tokens
from cmapkd.methods.byte_alignment import ByteAlignment
from cmapkd.models.base import eval_mode
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.shared_vocabulary import check_same_vocabulary, kept_of, named_token, remark_on_ends
from cmapkd.models.token_types import TokenFeatures, TokenNeeds

READ_DIALOGUES = 64  # spread over the source
JUDGED_DIALOGUES = 32  # of them, whose answers are judged with the right picture and with another one
AT_ONCE = 8
SEES = 0.02  # of the loss: by so much must another picture make the answers less likely
UNIFORM = 1.5  # nats: an untrained model's loss lies about the logarithm of its number of tokens


@dataclass(frozen=True, slots=True)
class Asked:
    """Dialogues of the training, each with the index of its sample; and why other samples give none."""

    source: Source
    dialogues: Sequence[Dialogue]
    indices: Sequence[int]
    silent: Sequence[str] = ()

    @classmethod
    def of(cls, source: Source, prompting: Prompting) -> Asked:
        """Up to `READ_DIALOGUES` that the first view of a sample gives; unreadable ones are counted with the data."""
        dialogues, indices, silent = [], [], []
        for index in range(0, len(source), max(1, len(source) // READ_DIALOGUES)):
            try:
                sample = source[index]
            except BadSampleError:
                continue
            try:
                dialogue = prompting.choose(sample, draw_view(sample.id, 0, WHOLE, sample.image.size), 0)
            except BadSampleError as error:
                silent.append(error.reason)
                continue
            dialogues.append(dialogue)
            indices.append(index)
            if len(indices) == READ_DIALOGUES:
                break
        return cls(source, dialogues, indices, silent)

    def read(self, model: GenerativeModel, place: int, *, picture_of: int | None = None) -> ChatItem:
        """A dialogue as the model reads it, with the picture of another place if one is named."""
        dialogue = self.dialogues[place]
        image = self.source[self.indices[place if picture_of is None else picture_of]].image
        return model.processor.read(dialogue, [image] * sum(turn.pictures for turn in dialogue))


def check_writer(role: str, model: GenerativeModel) -> list[Finding]:
    """Size, and the tokens that the model can write."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    parts = {part: sum(sizes[name] for name in names) for part, names in model.parts.items()}
    told = ", ".join(f"{part} {number:,}" for part, number in parts.items() if number)
    words = model.vocabulary
    ends, pad = ", ".join(named_token(words, number) for number in words.end_ids), named_token(words, words.pad_id)
    detail = f"{words.size:,} tokens in a head of {words.rows:,} rows, ends an answer with {ends}, pads with {pad}"
    return [
        Finding("ok", role, f"{model.name}: {model.num_parameters():,} parameters ({told})"),
        Finding("ok", f"{role} vocabulary", f"{detail}; template and processor {model.processor.fingerprint()[:12]}"),
    ]


def check_dialogues(
    role: str, model: GenerativeModel, asked: Asked, *, max_tokens: int | None, max_bad_share: float
) -> list[Finding]:
    """Visual tokens of a picture, lengths of answers, and what the model cannot read.

    Args:
        max_tokens: longest dialogue that the run allows; None: as long as the model takes.
        max_bad_share: of samples that cannot be used; above it the run stops.
    """
    what, items, refused = f"{role} dialogues", [], [*asked.silent]
    for place in range(len(asked.dialogues)):
        try:
            items.append(asked.read(model, place))
        except ValueError as error:
            refused.append(str(error))
    longest = max((len(item.ids) for item in items), default=0)
    over = sum(max_tokens is not None and len(item.ids) > max_tokens for item in items)
    findings = []
    if items:
        visual = [int(item.visual.sum()) for item in items if bool(item.visual.any())]
        answers = sorted(int(item.answer.sum()) for item in items)
        seen = f"{_range(visual)} visual tokens of a picture, " if visual else "no picture, "
        detail = (
            f"of {len(items)} read: {seen}{_range(answers)} learned tokens (median {answers[len(answers) // 2]}), "
            f"longest dialogue {longest} tokens"
        )
        findings.append(Finding("ok", what, detail))
    total = len(asked.dialogues) + len(asked.silent)
    for count, told in (
        (over, f"are longer than data.max_tokens={max_tokens} and will not be used"),
        (len(refused), f"cannot be used, the first: {refused[0] if refused else ''}"),
    ):
        if count:
            many = count / total > max_bad_share
            level: Literal["note", "problem"] = "problem" if many else "note"
            stops = f". A run stops above data.max_bad_share {max_bad_share:.0%}" if many else ""
            findings.append(Finding(level, what, f"{count / total:.0%} {told}{stops}"))
    return findings


def compare_writers(student: GenerativeModel, teacher: GenerativeModel, *, by_bytes: bool = False) -> list[Finding]:
    """Sizes, and how many tokens both models have in common.

    Args:
        by_bytes: whether the method lets tokens of two tokenizers meet at the bytes of a text.
    """
    ratio = teacher.num_parameters() / student.num_parameters()
    findings = [Finding("ok" if ratio > 1 else "note", "pair", size_beside(ratio))]
    kept = kept_of(teacher.vocabulary, student.vocabulary)
    if kept is not None and not by_bytes:
        told = f"the student writes {len(kept):,} of the teacher's {teacher.vocabulary.size:,} tokens"
        return [*findings, Finding("ok", "pair", f"{told}; the teacher's probabilities are taken among these")]
    try:
        common = check_same_vocabulary(teacher.vocabulary, student.vocabulary)
    except ConfigError as error:
        return [*findings, _met_at_bytes(student, teacher) if by_bytes else Finding("note", "pair", f"{error}")]
    sizes = (teacher.vocabulary.size, student.vocabulary.size)
    if by_bytes and common < max(teacher.vocabulary.spoken, student.vocabulary.spoken):
        return [*findings, _met_at_bytes(student, teacher)]
    same = f"both write the same {common:,} tokens" if max(sizes) == common else (
        f"they have the first {common:,} tokens in common, of {sizes[0]:,} and {sizes[1]:,}"
    )  # fmt: skip
    findings.append(Finding("ok", "pair", same))
    ends = remark_on_ends(teacher.vocabulary, student.vocabulary)
    return findings if ends is None else [*findings, Finding("note", "pair", ends)]


def check_common(
    student: GenerativeModel, teacher: GenerativeModel, asked: Asked, *, max_bad_share: float
) -> list[Finding]:
    """Of two models that have their first tokens in common, how many answers have others."""
    try:
        common = check_same_vocabulary(teacher.vocabulary, student.vocabulary)
    except ConfigError:  # told by `compare_writers`
        return []
    if kept_of(teacher.vocabulary, student.vocabulary) is not None:
        return []
    items = _readable(student, asked)
    beyond = sum(bool((item.ids[item.answer] >= common).any()) for item in items)
    if not beyond:
        return []
    share = beyond / len(items)
    many = share > max_bad_share
    told = f"{share:.0%} of the answers have tokens behind the first {common:,}, and will not be used"
    stops = f". A run stops above data.max_bad_share {max_bad_share:.0%}: set method.alignment=bytes" if many else ""
    return [Finding("problem" if many else "note", "pair", told + stops)]


def _met_at_bytes(student: GenerativeModel, teacher: GenerativeModel) -> Finding:
    """Of two tokenizers, how many tokens stand for the same text."""
    try:
        pairs = len(ByteAlignment(teacher, student).pairs)
    except ConfigError as error:
        return Finding("problem", "pair", f"{error}")
    sizes = (student.vocabulary.size, teacher.vocabulary.size)
    detail = (
        f"{pairs:,} of the student's {sizes[0]:,} tokens stand for the text of one of the teacher's {sizes[1]:,}; they "
        "are compared where tokens of both begin at the same byte"
    )
    return Finding("ok" if pairs > sizes[0] / 4 else "note", "pair", detail)


def check_looks(what: str, teacher: GenerativeModel, asked: Asked) -> list[Finding]:
    """Whether the right picture makes the answers likelier than another sample's: a broken splice shows no difference.

    With few samples only a clear difference is told; none at all is a problem.
    """
    places = [place for place in range(len(asked.dialogues)) if _shows(asked.dialogues[place])][:JUDGED_DIALOGUES]
    half = max(1, len(places) // 2)
    own, other = [], []
    for number, place in enumerate(places):
        try:
            pair = (
                asked.read(teacher, place),
                asked.read(teacher, place, picture_of=places[(number + half) % len(places)]),
            )
        except ValueError:
            continue
        own.append(pair[0])
        other.append(pair[1])
    if len(own) < 2:
        return []
    right, wrong = loss_of(teacher, own), loss_of(teacher, other)
    detail = (
        f"its loss on {len(own)} answers is {right:.3f} nats a token with the right picture and {wrong:.3f} with "
        "another sample's"
    )
    if wrong - right > SEES * right:
        return [Finding("ok", f"{what} sanity", detail)]
    if wrong > right:
        return [Finding("note", f"{what} sanity", f"{detail}: the picture hardly counts")]
    return [
        Finding("problem", f"{what} sanity", f"{detail}: it does not look at the picture. Check weights and processor")
    ]


def check_start(student: GenerativeModel, asked: Asked) -> list[Finding]:
    """The student's loss before its first step, beside that of a model that knows nothing."""
    items = _readable(student, asked)
    if not items:
        return []
    loss, chance = loss_of(student, items), math.log(student.vocabulary.size)
    detail = f"loss {loss:.2f} nats a token at the start; of a model that knows nothing it is {chance:.2f}"
    if not math.isfinite(loss) or loss > chance + UNIFORM:
        return [Finding("note" if math.isfinite(loss) else "problem", "student start", f"{detail}: check its weights")]
    return [Finding("ok", "student start", detail)]


def check_top(what: str, teacher: GenerativeModel, asked: Asked, number: int, temperature: float) -> list[Finding]:
    """What the `number` likeliest tokens leave out."""
    items = _readable(teacher, asked)
    if not items:
        return []
    if number >= teacher.vocabulary.size:
        return [
            Finding("note", f"{what} tokens", f"top_k {number} is no fewer than its {teacher.vocabulary.size} tokens")
        ]
    rest, rows = 0.0, 0
    for features in _features(teacher, items):
        values = features.hidden["answer"].values
        for block in row_blocks(len(values), teacher.vocabulary.size):
            top = top_tokens(teacher.logits(values[block]), number, temperature=temperature)
            rest += float(top.rest.exp().double().sum())
        rows += len(values)
    return [
        Finding(
            "ok",
            f"{what} tokens",
            f"its {number} likeliest tokens leave out {100 * rest / rows:.2g} % of the probability, over {rows:,} "
            f"tokens of answers",
        )
    ]


@torch.no_grad()
def loss_of(model: GenerativeModel, items: Sequence[ChatItem]) -> float:
    """Nats a token, over the learned tokens of all dialogues."""
    total, tokens = 0.0, 0
    for features in _features(model, items):
        losses = negative_log_likelihoods(model, features)
        total, tokens = total + float(losses.sum()), tokens + len(losses)
    return total / max(1, tokens)


def padding_share(model: GenerativeModel, asked: Asked, batch_size: int) -> float:
    """Share of a batch's tokens that are padding, as the dialogues stand in the data."""
    lengths = [len(item.ids) for item in _readable(model, asked)]
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    whole = sum(max(batch) * len(batch) for batch in batches)
    return 1 - sum(lengths) / whole if whole else 0.0


def _features(model: GenerativeModel, items: Sequence[ChatItem]) -> Sequence[TokenFeatures]:
    """Final states of the answers, a few dialogues at once."""
    with torch.no_grad(), eval_mode(model):
        return [
            model(join_items(items[start : start + AT_ONCE], model.processor.pad_id).to(model.device), TokenNeeds())
            for start in range(0, len(items), AT_ONCE)
        ]


def _readable(model: GenerativeModel, asked: Asked) -> list[ChatItem]:
    items = []
    for place in range(len(asked.dialogues)):
        try:
            items.append(asked.read(model, place))
        except ValueError:  # told by `check_dialogues`
            continue
        if len(items) == JUDGED_DIALOGUES:
            break
    return items


def _shows(dialogue: Dialogue) -> bool:
    return any(turn.pictures for turn in dialogue)


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low}-{high}"
