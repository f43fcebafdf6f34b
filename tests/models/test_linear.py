"""Linear attention in the place of softmax: the recurrence, mixers in layers of every family, saving and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vlm_support import chat, make_vlm

from cmapkd.config import ConfigError
from cmapkd.models import Decoding, ModelConfig, build_model, load_model
from cmapkd.models.gated_recurrence import gated_recurrence
from cmapkd.models.linear_mixer import LinearMixer, MixerState, real_tokens
from cmapkd.models.linear_vlm import LinearAssembledVlm, LinearVlm, convert
from cmapkd.models.token_types import TokenNeeds
from writers import make_converted, make_task, make_writer

KINDS = ("mamba2", "gated_delta")


def draws(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def token_by_token(
    queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor, strength: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written."""
    state = keys.new_zeros(*keys.shape[:2], keys.shape[-1], values.shape[-1])
    outputs = []
    for t in range(keys.shape[2]):
        q, k, v = (each[:, :, t] for each in (queries, keys, values))
        state = state * log_decay[:, :, t, None, None].exp()
        if strength is not None:
            v = strength[:, :, t, None] * (v - torch.einsum("bhkv,bhk->bhv", state, k))
        state = state + torch.einsum("bhk,bhv->bhkv", k, v)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q))
    return torch.stack(outputs, 2), state


@pytest.mark.parametrize("delta", [False, True])
def test_chunks_and_single_tokens_are_the_recurrence(delta: bool) -> None:
    torch.manual_seed(0)
    queries, keys, values = draws(2, 3, 11, 4), F.normalize(draws(2, 3, 11, 4), dim=-1), draws(2, 3, 11, 5)
    log_decay, strength = -draws(2, 3, 11).abs(), draws(2, 3, 11).sigmoid() if delta else None
    log_decay[:, :, 4] = -800.0  # everything before is forgotten, and no sum overflows
    given = (queries, keys, values, log_decay)
    expected = token_by_token(*given, strength)
    for chunk in (3, 64):
        torch.testing.assert_close(gated_recurrence(*given, strength=strength, chunk=chunk), expected)
    state, rows = None, []
    for t in range(11):
        at = [each[:, :, t : t + 1] for each in given]
        row, state = gated_recurrence(
            *at, strength=None if strength is None else strength[:, :, t : t + 1], state=state
        )
        rows.append(row)
    torch.testing.assert_close((torch.cat(rows, 2), state), expected)
    small = tuple(
        each[:1, :1, :3].detach().requires_grad_() for each in (*given, *([strength] if strength is not None else []))
    )

    def of(q: Tensor, k: Tensor, v: Tensor, a: Tensor, *b: Tensor) -> Any:
        return gated_recurrence(q, k, v, a, strength=b[0] if b else None, chunk=2)

    assert torch.autograd.gradcheck(of, small)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_enters_no_state_and_tokens_may_come_in_pieces(kind: str) -> None:
    mixer: LinearMixer = make_converted(mixer=kind, convolution=3).mixers[1]
    states, real = draws(2, 7, 16), torch.ones(2, 7, dtype=torch.bool)
    real[0, :3] = False
    seen = real[:, None, :] & torch.ones(7, 7, dtype=torch.bool).tril()
    whole, end = mixer.mix(states, seen[:, None])
    assert torch.equal(real_tokens(seen[:, None], 7), real)  # type: ignore[arg-type]
    added = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    for mask in (added[:, None], real.long()):
        torch.testing.assert_close(mixer.mix(states, mask)[0][real], whole[real])
    short, last = mixer.mix(states[:1, 3:])
    torch.testing.assert_close(short[0], whole[0, 3:])
    torch.testing.assert_close((last.before, last.memory), (end.before[:1], end.memory[:1]))
    assert last.memory.shape[1:].numel() + last.before.shape[1:].numel() == mixer.state_size
    state: MixerState | None = None
    for piece in states[1:].split([1, 4, 2], dim=1):  # a mask of all keys, as transformers gives it while writing
        row, state = mixer.mix(piece, None, state)
    torch.testing.assert_close(row[0], whole[1, 5:])
    torch.testing.assert_close(
        real_tokens(torch.ones(1, 1, 2, 9, dtype=torch.bool), 2), torch.ones(1, 2, dtype=torch.bool)
    )


def test_new_parts_begin_near_nothing() -> None:
    """The convolution passes the token, decay and strength are those of no input, projections are the attention's."""
    source = make_writer()
    attention: Any = source.layers[0].self_attn
    states, before = draws(1, 3, 16), {name: each.clone() for name, each in attention.state_dict().items()}
    mixer = LinearMixer(attention, "gated_delta", layer=0, width=4)
    torch.testing.assert_close({name: mixer.state_dict()[name] for name in before}, before)
    assert not mixer.step.weight.any()
    torch.testing.assert_close(F.softplus(mixer.step_bias), torch.full_like(mixer.step_bias, 0.001))
    steps = F.softplus(LinearMixer(attention, "mamba2", layer=0, width=2).step_bias).detach()
    assert 0.001 <= float(steps.min()) <= float(steps.max()) <= 0.1
    values = F.silu(mixer.v_proj(states)).unflatten(-1, (-1, 8)).transpose(1, 2)
    keys, queries = (
        F.normalize(F.silu(each(states)).unflatten(-1, (-1, 8)).transpose(1, 2), dim=-1)
        for each in (mixer.k_proj, mixer.q_proj)
    )
    groups = mixer.heads // mixer.groups
    keys, values = (each.repeat_interleave(groups, 1) for each in (keys, values))
    decay, half = queries.new_full((1, mixer.heads, 3), -0.001), queries.new_full((1, mixer.heads, 3), 0.5)
    mixed = token_by_token(queries * 8**-0.5, keys, values, decay, half)[0].transpose(1, 2)
    unit = mixed / (mixed.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = unit.flatten(-2) * F.silu(mixer.gate(states))
    torch.testing.assert_close(mixer.mix(states)[0], expected)
    torch.manual_seed(1)
    fresh = LinearMixer(attention, "mamba2", layer=0, width=2, seeded=False)
    assert all(not torch.equal(fresh.state_dict()[name], each) for name, each in before.items())


@pytest.mark.parametrize("kind", ["llava", "smolvlm", "qwen3_vl", "gemma3"])  # others are made of these
def test_every_family_writes_what_it_would_be_taught(kind: str) -> None:
    """With a state and keys of kept layers, and padding on the left, as all at once and padded on the right."""
    layers, mixer = ([0], "mamba2") if kind != "llava" else ([0, 1], "gated_delta")  # the first counts the tokens
    model = convert(make_vlm(kind), layers, mixer=mixer, convolution=3)  # type: ignore[arg-type]
    torch.manual_seed(1)
    with torch.no_grad():
        for name in sorted(model.parts["mixers"]):
            model.get_parameter(name).add_(0.3 * torch.randn(model.get_parameter(name).shape))
        inputs = chat(model)
        written = model.generate(inputs, Decoding(max_new_tokens=5, min_new_tokens=5))
        found = model(inputs.with_answers(written))
        logits = model.logits(found.hidden["answer"].values)
        logits[:, [*model.vocabulary.end_ids, model.vocabulary.image_id]] = -torch.inf
        assert torch.equal(logits.argmax(-1), found.targets)
        alone = model(chat(model, [1])).hidden["answer"].values
        rows = model(inputs).hidden["answer"]
    torch.testing.assert_close(rows.values[rows.sample == 1], alone, atol=1e-4, rtol=1e-4)
    assert sum(len(names) for names in model.parts.values()) == len(list(model.parameters()))


def test_the_state_does_not_grow() -> None:
    model = make_converted(layers=[1]).float()
    grown = []
    for length in (3, 40):
        output = model.model(input_ids=torch.full((1, length), 5), use_cache=True).past_key_values
        state = output.layers[1].state
        grown.append((sum(each[0].numel() for each in state), output.layers[0].keys[0].numel()))
        assert output.get_seq_length(1) == length
    shape = model.cache_shape
    assert grown[0][0] == grown[1][0] == shape.state
    assert [keys for _, keys in grown] == [shape.num_bytes(1) // 2 * length for length in (3, 40)]
    assert shape.state_bytes(2) == 4 * shape.state


@pytest.mark.parametrize("assembled", [False, True])
def test_it_is_saved_and_read_again(assembled: bool, tmp_path: Path) -> None:
    tower: dict[str, Any] = {"image": "tiny:scenes-teacher"} if assembled else {}
    source = make_writer(rows=0, layers=2, **tower).float()
    source.save(tmp_path / "source")
    options = {"layers": [1], "mixer": "gated_delta"}
    torch.manual_seed(2)
    model: Any = build_model(ModelConfig(name=f"linear:{tmp_path / 'source'}", options=options))
    assert isinstance(model, LinearAssembledVlm if assembled else LinearVlm)
    assert model.random_parts == ("mixers",)
    assert model.mixers[1].taps.shape[-1] == 4
    model.save(tmp_path / "converted")
    again: Any = load_model(tmp_path / "converted")
    assert (type(again), again.conversion, again.random_parts) == (type(model), model.conversion, ())
    assert again.architecture == model.architecture != source.architecture
    state = again.state_dict()
    assert all(torch.equal(state[name], each) for name, each in model.state_dict().items())
    assert again.vocabulary == model.vocabulary
    if assembled:
        return
    unlike = convert(make_writer(rows=0, layers=2, **tower).float(), [1], mixer="gated_delta", convolution=4)
    unlike.load_checkpoint(tmp_path / "converted" / "model.safetensors")
    assert torch.equal(unlike.mixers[1].gate.weight, model.mixers[1].gate.weight)
    with pytest.raises((ConfigError, ValueError), match="config"):  # nobody takes it for a model with softmax
        build_model(f"hf:{tmp_path / 'converted'}")


def test_what_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    make_writer(rows=0).float().save(tmp_path / "one")
    one = f"linear:{tmp_path / 'one'}"
    for name, options, message in (
        (one, {"layers": [1]}, r"options.layers is \[1\], and .* has layers 0 to 0"),
        (one, {"layers": [0, 0]}, "each once"),
        (one, {"layers": []}, "layers"),
        (one, {}, "options.layers of .* is all_but_every_fourth, which is no layer of 1: give numbers, or all"),
        (one, {"mixer": "mamba"}, "mixer"),
        (one, {"lora": {}}, "lora"),
        (
            "linear:tiny:scenes-teacher",
            {},
            "and tiny:scenes-teacher embeds pictures and texts: name a model that writes",
        ),
        ("linear:nothing", {}, "there is no model 'nothing'"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_model(ModelConfig(name=name, options=options))
    converted = make_converted()
    with pytest.raises(ConfigError, match="has converted layers already"):
        convert(converted, [0], mixer="mamba2", convolution=2)
    with pytest.raises(ValueError, match=r"layers 0, 1 of .* have linear attention"):
        converted._check(TokenNeeds(attention_mean=True))
    with pytest.raises(ConfigError, match="computes attention by sdpa, and without softmax in layers 0, 1"):
        make_task("masking_kd", student=converted)
    odd = make_writer()
    odd.layers[0].self_attn.q_proj = nn.Sequential()
    with pytest.raises(ConfigError, match="layer 0 has a Qwen2Attention, without plain linear layers q_proj"):
        convert(odd, [0], mixer="mamba2", convolution=2)
