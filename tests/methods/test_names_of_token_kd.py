"""The settings by which docs/generative.md says what other tools and papers do give the numbers of their code."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from cmapkd.data.dialogues import ChatInput, ChatItem, join_items
from cmapkd.data.types import Batch
from cmapkd.methods import METHODS
from cmapkd.methods.terms import total_loss
from cmapkd.models import FrozenTeacher
from cmapkd.models.generative import Decoding, GenerativeModel
from cmapkd.models.token_bytes import Spelling, TokenPairs
from cmapkd.models.token_types import LogitHead, Rows, TokenFeatures, TokenNeeds, Vocabulary

ROOT = Path(__file__).parents[2]
PUBLISHED = json.loads((ROOT / "tests/objectives/fixtures/token_losses.json").read_text())
GOLD = json.loads((ROOT / "tests/objectives/fixtures/gold.json").read_text())
COUNTED = [row for row, label in enumerate(PUBLISHED["labels"]) if label != -100]
TARGETS = torch.tensor([PUBLISHED["labels"][row] for row in COUNTED])
SAMPLES = torch.tensor([0, 1, 1])  # whose answers these tokens are


def named() -> dict[str, dict[str, Any]]:
    """The settings of each name in the page's table."""
    page = (ROOT / "docs/generative.md").read_text(encoding="utf-8")
    table = page.partition("## The same under other names")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| `(name: \w+.*?)` \|", table, flags=re.MULTILINE)
    return {name: yaml.safe_load(f"{{{settings}}}") for name, settings in rows}


class Written(GenerativeModel):
    """Logits that were written down, as final states behind a head that changes nothing."""

    name = "written"

    def __init__(self, logits: str) -> None:
        super().__init__()
        values = torch.tensor(PUBLISHED[logits], dtype=torch.float64)
        self.values = nn.Parameter(values[COUNTED])
        self.vocabulary = Vocabulary(values.shape[1], values.shape[1], (0,), 0, 1, "the same")

    @property
    def head(self) -> LogitHead:
        return LogitHead(torch.eye(self.vocabulary.size, dtype=torch.float64))

    def forward(self, inputs: ChatInput, needs: TokenNeeds | None = None) -> TokenFeatures:
        rows = Rows(self.values, SAMPLES, torch.arange(len(SAMPLES)))
        return TokenFeatures({"answer": rows}, TARGETS, self.head)

    @property
    def parts(self) -> Mapping[str, frozenset[str]]:
        raise NotImplementedError

    def write(self, folder: Path) -> None:
        raise NotImplementedError

    def generate(self, inputs: ChatInput, how: Decoding, keys: Any = None) -> list[list[int]]:
        raise NotImplementedError


class Spelled(Written):
    """One answer of GOLD's case, in the tokens of one of its models."""

    def __init__(self, who: str) -> None:
        nn.Module.__init__(self)
        self.values = nn.Parameter(torch.tensor(GOLD[f"{who}_logits"], dtype=torch.float64))
        self.targets = torch.tensor(GOLD[f"{who}_ids"])
        size = self.values.shape[1]
        self.vocabulary = Vocabulary(size, size, (0,), 0, 1, who)
        lengths = dict(zip(GOLD[f"{who}_ids"], GOLD[f"{who}_bytes"], strict=True))
        pieces = tuple(b"x" * lengths.get(number, 9) for number in range(size))
        self.processor = SimpleNamespace(spelling=lambda _: Spelling(pieces, b"", size))  # type: ignore[assignment]

    def forward(self, inputs: ChatInput, needs: TokenNeeds | None = None) -> TokenFeatures:
        number = len(self.targets)
        rows = Rows(self.values, torch.zeros(number, dtype=torch.long), torch.arange(number))
        return TokenFeatures({"answer": rows}, self.targets, self.head)


def by_bytes(settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """As `by_settings`, of two models with two tokenizers; which tokens are the same ones, GOLD's case says itself."""
    student = Spelled("student")
    config = METHODS[settings["name"]].Config.from_mapping(settings, where="docs/generative.md")
    method: Any = METHODS[settings["name"]](config, student=student, teacher=FrozenTeacher(Spelled("teacher"))).eval()
    pairs = torch.tensor(GOLD["matched"])
    method.aligned.pairs = method.aligned.first_pairs = TokenPairs(pairs[:, 0], pairs[:, 1])
    item = ChatItem(torch.tensor([2, 3]), torch.tensor([False, True]), torch.zeros(2, dtype=torch.bool))
    inputs = join_items([item], pad_id=0)
    loss = total_loss(method(Batch(("a",), {"student": inputs, "teacher": inputs}, ("",))))
    return loss, torch.autograd.grad(loss, student.values)[0]


def by_settings(settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Loss and gradient by the student's logits, through everything that a run does with a batch of given answers."""
    student, kind = Written("student_logits"), METHODS[settings["name"]]
    config = kind.Config.from_mapping(settings, where="docs/generative.md")
    method = kind(config, student=student, teacher=FrozenTeacher(Written("teacher_logits"))).eval()
    items = [ChatItem(torch.tensor([2, 3]), torch.tensor([False, True]), torch.zeros(2, dtype=torch.bool))] * 2
    inputs = join_items(items, pad_id=0)
    loss = total_loss(method(Batch(("a", "b"), {"student": inputs, "teacher": inputs}, ("", ""))))
    return loss, torch.autograd.grad(loss, student.values)[0]


def published(function: str, source: str, **ours: Any) -> tuple[float, Tensor]:
    """The recorded mean over tokens, without the teacher's entropy, and its gradient."""
    [case] = [
        case
        for case in PUBLISHED["cases"]
        if case["function"] == function and case["source"] == source and case["ours"].items() >= ours.items()
    ]
    entropy = 0.0
    if case["form"] == "cross_entropy":
        p = torch.tensor(PUBLISHED["teacher_logits"], dtype=torch.float64)[COUNTED].softmax(-1)
        entropy = float(-(p * p.log()).sum(-1).mean())
    return case["value"] - entropy, torch.tensor(case["gradient"], dtype=torch.float64)[COUNTED]


def answers() -> tuple[float, Tensor]:
    """The cross-entropy of torch, as every one of these tools has it."""
    logits = torch.tensor(PUBLISHED["student_logits"], dtype=torch.float64, requires_grad=True)
    loss = nn.functional.cross_entropy(logits, torch.tensor(PUBLISHED["labels"]))
    return loss.item(), torch.autograd.grad(loss, logits)[0][COUNTED]


def mixed(*parts: tuple[float, tuple[float, Tensor]]) -> tuple[float, Tensor]:
    values, gradients = zip(*((w * value, w * gradient) for w, (value, gradient) in parts), strict=True)
    return sum(values), torch.stack(gradients).sum(0)


def gold(which: str) -> tuple[float, Tensor]:
    return GOLD[which]["value"], torch.tensor(GOLD[which]["gradient"], dtype=torch.float64)


TRL, TAID, NEMO, LLAVA_KD = "huggingface/trl", "SakanaAI/TAID", "NVIDIA-NeMo/Automodel", "Fantasyele/LLaVA-KD"
PER_SAMPLE = len(COUNTED) / 2  # a sum over tokens by the samples of the batch, in means over tokens
EXPECTED = {
    "token KD (Hinton et al.)": mixed((1, answers()), (1, published("KDLoss", NEMO, temperature=2.0))),
    "NeMo Automodel, `kd_ratio: 0.5`": mixed((0.5, answers()), (0.5, published("KDLoss", NEMO, temperature=1.0))),
    "Model-Optimizer, `LogitsDistillationLoss`": published(
        "LogitsDistillationLoss", "NVIDIA/Model-Optimizer", temperature=1.0
    ),
    "TRL `GKDTrainer` (GKD)": published("generalized_jsd_loss", TRL, beta=0.5, temperature=0.9),
    "TRL `DistillationTrainer` (on-policy distillation)": published(
        "generalized_jsd_loss", TRL, beta=1.0, temperature=1.0
    ),
    "KEPO, its distillation term": published("generalized_jsd_loss", TRL, beta=0.5, temperature=1.0),
    "DistiLLM, skewed KL": published("SkewForwardKL", TAID),
    "DistiLLM, skewed reverse KL": published("SkewReverseKL", TAID),
    "LLaVA-MoD, mimic distillation": published("compute_align_loss", "shufangxun/LLaVA-MoD"),
    "LLaVA-MoD, mimic distillation with its language loss (`kd_lm`)": mixed(
        (1, answers()), (1, published("compute_align_loss", "shufangxun/LLaVA-MoD"))
    ),
    "LLaVA-KD, response term": mixed((1, answers()), (1, published("forward_kl", LLAVA_KD))),
    "MaTVLM, mmMamba: the last stage's logits": mixed((PER_SAMPLE, published("KDLoss", NEMO, temperature=1.0))),
    "InfiniteVL: the second stage": mixed((PER_SAMPLE, published("KDLoss", NEMO, temperature=2.0))),
    "GOLD": gold("hybrid"),
    "ULD": gold("ranked"),
    "TAID": mixed((1, published("TAID.compute_loss", TAID))),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_settings_of_a_name_give_its_published_numbers(name: str) -> None:
    settings = named()[name]
    loss, gradient = (by_bytes if settings.get("alignment") == "bytes" else by_settings)(settings)
    value, slopes = EXPECTED[name]
    if name == "TAID":  # a cross-entropy with its moving target, here as in the published code
        value = next(case["value"] for case in PUBLISHED["cases"] if case["function"] == "TAID.compute_loss")
    assert float(loss.detach()) == pytest.approx(value, rel=2e-6)
    torch.testing.assert_close(gradient, slopes, rtol=2e-5, atol=2e-6)


def test_every_name_of_the_page_is_checked_or_reads_the_answers_of_the_student() -> None:
    unchecked = {name: settings for name, settings in named().items() if name not in EXPECTED}
    assert all(settings["divergence"] == "sampled_reverse" for settings in unchecked.values())
    assert EXPECTED.keys() <= named().keys()
