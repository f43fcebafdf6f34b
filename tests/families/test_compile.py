"""`torch.compile` of every model family with the backend `aot_eager`, which needs no compiler of its own.

Each forward pass is one graph, and texts of all lengths need a few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family_support import FAMILIES, make, method_for
from model_support import inputs
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from cmapkd.data.types import ModelInput, Sample
from cmapkd.methods import Method, StageConfig
from cmapkd.models import DualEncoder, Features, LevelRequest
from cmapkd.models.block_hooks import block_hooks
from cmapkd.models.compiled import compile_in_place
from cmapkd.training import engine
from helpers import MemorySource, make_method, make_trainer, read_lines

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # dynamo looks at all
]

MOST = 5  # graphs that a stage of a run needs beside its first
OFTEN = ("open_clip",)  # the others are many seconds each


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many graphs were made of models that are compiled, each of them whole.

    Without the code generator, which needs a C++ compiler and half a minute.
    """
    counter = CompileCounterWithBackend("aot_eager")  # type: ignore[no-untyped-call]
    compile_it = nn.Module.compile

    def compile_whole(model: nn.Module) -> None:
        compile_it(model, backend=counter, fullgraph=True)

    monkeypatch.setattr(nn.Module, "compile", compile_whole)
    return lambda: int(counter.frame_count)


def numbers(model: DualEncoder, output: Features) -> dict[str, Tensor]:
    """Embeddings, levels, and every parameter's gradient of a number that depends on all of them."""
    model.zero_grad()
    values = {"image": output.image.embedding, "text": output.text.embedding}
    for tower in (output.image, output.text):
        values |= {f"level/{name}": level.values for name, level in tower.levels.items()}
    sizes = torch.stack([value.square().mean() for value in values.values()]).sum()
    (sizes + ((values["image"] @ values["text"].T).tanh() * output.logit_scale).sum()).backward()
    return values | {f"gradient/{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


def every_family() -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in OFTEN)) for name in FAMILIES]


@pytest.mark.parametrize("name", every_family())
def test_a_compiled_model_computes_what_it_did(name: str, graphs: Callable[[], int], tmp_path: Path) -> None:
    """In one graph, also in the first pass."""
    model = make(name, tmp_path / "compiled")
    batch = inputs(model)
    needs = LevelRequest((model.image_levels[-1].name,), (model.text_levels[0].name,))
    compile_in_place(model)
    found = numbers(model, model(batch, needs))
    assert graphs() == 1
    plain = make(name, tmp_path / "plain")
    assert_close(found, numbers(plain, plain(batch, needs)))


def texts_of(length: int) -> tuple[str, str]:
    """The longest of them has so many tokens, with a start and an end token, or one more or less."""
    return " ".join(["red"] * (length - 2)), "a small"


@pytest.mark.parametrize("name", every_family())
def test_texts_of_all_lengths_need_a_few_graphs(name: str, graphs: Callable[[], int], tmp_path: Path) -> None:
    """Of as many lengths as batches of real captions have; and a smaller batch, as the last micro-batch is one."""
    model, plain = (make(name, tmp_path / each, 77).train() for each in ("compiled", "plain"))
    compile_in_place(model)
    side, draws = model.image_spec.size, torch.Generator().manual_seed(0)
    seen = set()
    for number, length in enumerate((24, 40, 16, 77, 8, 32, 70, 48, 64, 56, 33, 9)):
        tokens = model.tokenizer(texts_of(length))
        batch = ModelInput(torch.randn(2, 3, side, side, generator=draws), tokens)
        if number in (5, 9):
            batch = ModelInput(torch.cat([batch.images] * 2), model.tokenizer(texts_of(length) * 2))
        seen.add(tokens.ids.shape[1])
        found, expected = model(batch), plain(batch)
        for tower in ("image", "text"):
            mine, theirs = getattr(found, tower).embedding, getattr(expected, tower).embedding
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert len(seen) >= (10 if model.whole_texts is None else 1)
    assert graphs() - 1 <= MOST


class Captions(MemorySource):
    """Of many lengths."""

    def __getitem__(self, index: int) -> Sample:
        return replace(super().__getitem__(index), captions=self.captions(index))

    def captions(self, index: int) -> tuple[str, ...]:
        return (" ".join(["red", "cat", "near", "tree"] * 16)[: 3 + 5 * index],)


def trained(folder: Path, method: Method, **training: Any) -> list[float]:
    options = {"steps": 8, "batch_size": 6, "optim": {"learning_rate": 1e-4}, **training}
    make_trainer(folder, method, source=Captions(40), **options).run()
    return [line["loss"] for line in read_lines(folder / "metrics.jsonl")]


CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "micro-batches": {"micro_batch": 4},  # of four and of two
    "bf16": {"precision": "bf16"},
}


@pytest.mark.parametrize("name", every_family())
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case != "micro-batches")) for case in CASES]
)
def test_a_run_needs_a_few_graphs(name: str, case: str, graphs: Callable[[], int], tmp_path: Path) -> None:
    made = [method_for(make(name, tmp_path / each, 77)) for each in ("plain", "compiled")]
    expected = trained(tmp_path / "plain", made[0], **CASES[case])
    found = trained(tmp_path / "compiled", made[1], compile=True, **CASES[case])
    assert found == pytest.approx(expected, rel=2e-2 if case == "bf16" else 1e-4)
    assert 1 <= graphs() <= 1 + MOST


def test_stages_have_graphs_of_their_own(graphs: Callable[[], int], tmp_path: Path) -> None:
    """Torch compiles one function a few times only, and then no more: of more stages than that all are compiled."""
    levels = [("P2", "L1"), ("P3", "L2"), ("P4", "L3")]
    stages = [StageConfig(name=f"stage {number}", steps=1, levels=each) for number, each in enumerate(levels)]
    weights = {"visual_levels": dict.fromkeys(("P2", "P3", "P4"), 1.0), "language_levels": {"L1": 1, "L2": 1, "L3": 1}}
    settings = {**weights, "bank_weight": 0.0, "interactive_weight": 0.0}
    found = []
    with torch._dynamo.config.patch(recompile_limit=len(stages) - 1):  # type: ignore[no-untyped-call]
        for name, compile_it in (("plain", False), ("compiled", True)):
            method = make_method("cmapkd", settings=settings)
            make_trainer(tmp_path / name, method, steps=None, stages=stages, compile=compile_it).run()
            found.append([line["loss"] for line in read_lines(tmp_path / name / "metrics.jsonl")])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert graphs() == len(stages)


def test_the_engine_compiles_the_student_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(engine, "compile_in_place", compiled.append)
    trainer = make_trainer(tmp_path, "clip_kd", compile=True)
    assert compiled == [trainer.method.student]


def test_hooks_of_blocks_are_gone_with_the_context() -> None:
    """Behind those that were there, which stay; also where the pass fails."""
    block, said = nn.Linear(2, 2), []
    own = block.register_forward_hook(lambda *_: said.append("own"))
    before = block._forward_hooks, block._forward_pre_hooks
    outer = {block: lambda *_: said.append("outer")}
    inner = {block: lambda *_: said.append("inner")}
    for width in (2, 3):  # with the latter the pass fails
        said.clear()
        last = block_hooks(inner, before={block: lambda *_: said.append("before")})
        with suppress(RuntimeError), block_hooks(outer), last:
            block(torch.zeros(1, width))
        assert said == (["before", "own", "outer", "inner"] if width == 2 else ["before"])
        assert block._forward_hooks is before[0]
        assert block._forward_pre_hooks is before[1]
    own.remove()
    said.clear()
    block(torch.zeros(1, 2))
    assert not said
