"""`torch.compile` of every model family with the backend `aot_eager`, which needs no compiler of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from family_support import FAMILIES, make
from model_support import inputs
from torch import Tensor
from torch._dynamo.exc import Unsupported

from cmapkd.models import DualEncoder, Features, LevelRequest

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def numbers(model: DualEncoder, output: Features) -> dict[str, Tensor]:
    """Embeddings, levels, and every parameter's gradient of a number that depends on all of them."""
    model.zero_grad()
    values = {"image": output.image.embedding, "text": output.text.embedding}
    for tower in (output.image, output.text):
        values |= {f"level/{name}": level.values for name, level in tower.levels.items()}
    sizes = torch.stack([value.square().mean() for value in values.values()]).sum()
    (sizes + ((values["image"] @ values["text"].T).tanh() * output.logit_scale).sum()).backward()
    return values | {f"gradient/{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at every tensor
@pytest.mark.parametrize("name", FAMILIES)
def test_a_compiled_model_computes_what_it_did(name: str, tmp_path: Path) -> None:
    """In one graph, or for the reason that its family states in several."""
    model = make(name, tmp_path)
    batch = inputs(model)
    needs = LevelRequest((model.image_levels[-1].name,), (model.text_levels[0].name,))
    expected = numbers(model, model(batch, needs))
    broken = FAMILIES[name].breaks_graph is not None
    if broken:
        with pytest.raises(Unsupported):  # so that no reason is kept for longer than it holds
            torch.compile(model, backend="aot_eager", fullgraph=True)(batch, needs)
        torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=not broken)
    found = numbers(model, compiled(batch, needs))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
