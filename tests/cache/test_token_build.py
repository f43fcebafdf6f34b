"""Building and refusing caches of a teacher that writes."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_support import contents
from token_support import LENGTH, Asked, batch_of, built, make_writer, token_kd, token_plan
from tokenizers import Tokenizer

from cmapkd.cache import CacheError, all_keys, describe, verify
from cmapkd.cache.cost import measure
from cmapkd.cache.folder import CacheFolder
from cmapkd.cache.token_layout import TokenLayout
from cmapkd.data.prompting import Prompting
from cmapkd.data.types import QuestionAnswer, Sample
from cmapkd.models import load_model

forks = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
BYTES = {(16, 512): 70, (32, 512): 134, (64, 512): 262, (128, 512): 518}
BYTES |= {(16, 151_936): 104, (32, 151_936): 200, (64, 151_936): 392, (128, 151_936): 776}


@pytest.mark.parametrize(("count", "size"), BYTES)
def test_bytes_of_a_token(count: int, size: int) -> None:
    """As in docs/cache.md: ids and gaps, the token itself and the rest."""
    layout = TokenLayout("fp16", count, 1.0, size, 100)
    assert layout.token_bytes == BYTES[count, size]
    assert layout.row_bytes == 100 * layout.token_bytes + 8 + 4
    assert f"{layout.token_bytes} bytes a token" in layout.describe()
    assert TokenLayout.from_plain(layout.plain()) == layout


def test_ids_above_half_of_sixteen_bits_come_back() -> None:
    layout = TokenLayout("fp16", 2, 1.0, 2**16, 1)
    ids = torch.tensor([[[65_535, 40_000]]])
    zeros = torch.zeros(1, 1, 2)
    arrays = {"tokens": torch.tensor([1]), "targets": torch.tensor([[50_000]]), "ids": ids, "gaps": zeros.half()}
    encoded = layout.encode({**arrays, "rest": torch.zeros(1, 1), "log_p": zeros})
    rows = layout.rows(encoded, np.array([1], np.uint64))
    decoded = layout.decode(layout.tensors(rows))
    assert decoded["ids"].tolist() == ids.tolist()
    assert decoded["targets"].tolist() == [[50_000]]


def test_what_a_cache_says_of_itself(tmp_path: Path) -> None:
    method = token_kd()
    plan = token_plan(tmp_path / "c", method)
    plan.build(device="cpu")
    longest = max(len(method.student.processor.encode_answer(f"a {c} thing, number 8")) for c in ("green", "blue"))
    layout = plan.layout
    assert isinstance(layout, TokenLayout)
    assert layout.answer_tokens <= longest  # of the answers that the two views show
    found = describe(CacheFolder.open(tmp_path / "c"))
    assert found["rows_done"] == 2 * LENGTH
    assert "logit_scale" not in found
    fidelity = found["fidelity"]
    assert fidelity["same_likeliest"] == 1.0
    assert 0 < fidelity["tail_mean"] < 1
    assert abs(fidelity["kl_mean"]) < 1e-4
    assert 2 * LENGTH < fidelity["tokens"] <= 2 * LENGTH * layout.answer_tokens
    assert all(problem is None for _, problem in verify(CacheFolder.open(tmp_path / "c")))
    shard = next((tmp_path / "c").rglob("*.rows"))
    data = bytearray(shard.read_bytes())
    data[20] ^= 1
    shard.write_bytes(data)
    assert sum(problem is not None for _, problem in verify(CacheFolder.open(tmp_path / "c"))) == 1
    cost = measure(token_plan(tmp_path / "d", method), device="cpu")
    assert min(cost.answer, cost.build, cost.read, cost.prepare) > 0


class SlowAsked(Asked):
    """Time enough to be killed in, on a quick machine too."""

    def __getitem__(self, index: int) -> Sample:
        time.sleep(0.01)
        return super().__getitem__(index)


@forks
def test_killed_at_random_moments_it_ends_byte_identical(tmp_path: Path) -> None:
    method, source = token_kd(), SlowAsked()
    built(tmp_path / "whole", method, source=source)
    whole = contents(tmp_path / "whole")
    assert sum(name.endswith(".rows") for name in whole) >= 4
    draws = random.Random(0)
    kills = rounds = 0
    while kills < 6:
        folder = tmp_path / f"killed-{rounds}"
        for _ in range(4):
            child = os.fork()
            if child == 0:
                try:
                    torch.set_num_threads(1)  # a fork has none of torch's threads and would wait for them
                    token_plan(folder, method, source=source).build(device="cpu")
                finally:
                    os._exit(0)
            time.sleep(draws.uniform(0.0, 0.1))
            os.kill(child, signal.SIGKILL)
            kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        built(folder, method, source=source)
        assert contents(folder) == whole
        rounds += 1
    for rank in range(2):
        token_plan(tmp_path / "shared", method, source=source).build(device="cpu", rank=rank, world_size=2)
    assert contents(tmp_path / "shared") == whole


def test_other_answers_are_refused_with_the_reason(tmp_path: Path) -> None:
    method = token_kd()
    built(tmp_path / "c", method)
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "temperature 1, and the method reads them at 2": (token_kd(temperature=2.0), {}),
        "it holds the 8 likeliest tokens, and the method reads 9": (token_kd(top_k=9), {}),
        "answers of other weights": (token_kd(make_writer(width=24, seed=8)), {}),
        "the teacher reads dialogues otherwise": (token_kd(make_writer(width=24, seed=7, max_tokens=60)), {}),
        "it answers other texts": (method, {"texts": Prompting(suffix="Answer shortly.")}),
        "it leaves out dialogues of another length": (method, {"max_tokens": 50}),
        "made from other data": (method, {"source": Asked(LENGTH + 1)}),
    }
    for reason, (other, changes) in cases.items():
        with pytest.raises(CacheError, match=reason):
            token_plan(tmp_path / "c", other, **changes).open()


def test_a_changed_template_or_vocabulary_is_refused(tmp_path: Path) -> None:
    teacher = make_writer(width=24, seed=7)
    built(tmp_path / "c", token_kd(teacher))
    other = make_writer(width=24, seed=7)
    native = other.processor.native
    native.chat_template = native.chat_template.replace("assistant", "helper")
    changed = make_writer(width=24, seed=7)
    method = token_kd(changed)
    changed.processor.__dict__.update(
        type(other.processor)(native, image_id=other.processor.image_id, max_tokens=64).__dict__
    )
    with pytest.raises(CacheError, match="the teacher reads dialogues otherwise"):
        token_plan(tmp_path / "c", method).open()


def test_what_cannot_be_cached_says_why(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"set method.top_k \(32 for example\), or cache: off"):
        token_plan(tmp_path, token_kd(top_k=None))
    with pytest.raises(CacheError, match="judges answers that the student has just written"):
        token_plan(tmp_path, token_kd(on_policy=0.5))
    for settings, reason in (
        ({"kind": "dense"}, "cache.kind is dense, which teachers of two towers have"),
        ({"store": "int8"}, "cache.store is int8, and likeliest tokens are stored in fp16 or fp32"),
        ({"top_k": 4}, "cache.top_k is 4, and the method reads the 8 likeliest"),
    ):
        with pytest.raises(CacheError, match=reason):
            _ = token_plan(tmp_path / "x", token_kd(), **settings).layout


def test_an_answer_that_has_no_room_is_named_before_the_teacher_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = token_kd()
    longest = token_plan(tmp_path / "a", method).layout.answer_tokens  # type: ignore[attr-defined]
    plan = token_plan(tmp_path / "c", method, max_answer_tokens=longest - 1, keys=all_keys(LENGTH, 1).first(2))
    with monkeypatch.context() as patch:
        patch.setattr(TokenLayout, "ask", lambda *_: pytest.fail("the teacher was asked"))
        with pytest.raises(
            CacheError, match=rf"sample 'a\d' has {longest} tokens .*cache.max_answer_tokens={longest} or"
        ):
            plan.build(device="cpu")
    assert not (tmp_path / "c").exists()
    wide = token_plan(tmp_path / "d", method, max_answer_tokens=longest + 2)
    assert wide.layout.answer_tokens == longest + 2  # type: ignore[attr-defined]
    wide.build(device="cpu")
    inputs = batch_of(method, 0).inputs["teacher"]
    with pytest.raises(CacheError, match=r"the answer of sample '.' has \d+ tokens .* cache.max_answer_tokens="):
        replace(wide.layout, answer_tokens=1).check_inputs(inputs, "abcdef")  # type: ignore[type-var,attr-defined]


def test_the_room_is_that_of_all_samples_and_answers_too_long_for_the_teacher_do_not_count(tmp_path: Path) -> None:
    method = token_kd()
    whole = token_plan(tmp_path / "a", method).layout
    assert (
        token_plan(tmp_path / "b", method, keys=all_keys(LENGTH, 1).first(1)).layout == whole
    )  # later runs may read more
    source = Asked()
    say = source.unseen

    def one_is_long(index: int) -> Sample:
        sample = say(index)
        return replace(sample, questions=(QuestionAnswer("what?", ("a thing " * 100,)),)) if index == 3 else sample

    source.unseen = one_is_long  # type: ignore[method-assign]
    assert token_plan(tmp_path / "c", method, source=source).layout == whole


def test_another_merge_of_the_tokenizer_is_refused(tmp_path: Path) -> None:
    """Pieces and probes stay the same, and texts have other tokens."""
    built(tmp_path / "c", token_kd(make_writer(width=24, seed=7)))
    changed = make_writer(width=24, seed=7)
    native = copy.deepcopy(changed.processor.native)
    rules = json.loads(native.tokenizer.backend_tokenizer.to_str())
    rules["model"]["merges"] = rules["model"]["merges"][:-1]
    native.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(rules))
    method = token_kd(changed)
    other = type(changed.processor)(native, image_id=changed.processor.image_id, max_tokens=64)
    changed.processor.__dict__.update(other.__dict__)
    with pytest.raises(CacheError, match="the teacher reads dialogues otherwise"):
        token_plan(tmp_path / "c", method).open()


def test_another_setting_of_the_same_weights_is_refused(tmp_path: Path) -> None:
    built(tmp_path / "c", token_kd(make_writer(width=24, seed=7)))
    for change in ({"vision_feature_layer": -2}, {"image_token_index": 5}):
        changed = make_writer(width=24, seed=7)
        for name, value in change.items():
            setattr(changed.model.config, name, value)
        with pytest.raises(CacheError, match="the teacher computes otherwise with its weights"):
            token_plan(tmp_path / "c", token_kd(changed)).open()
    changed = make_writer(width=24, seed=7)
    changed.model.config.text_config.rms_norm_eps = 1e-3
    with pytest.raises(CacheError, match="the teacher computes otherwise with its weights"):
        token_plan(tmp_path / "c", token_kd(changed)).open()
    saved = make_writer(width=24, seed=7)
    saved.save(tmp_path / "saved")
    token_plan(tmp_path / "c", token_kd(load_model(tmp_path / "saved"))).open()  # the same model, read back


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"top_k": 4}, "cache.top_k is 4, and the method reads the 8 likeliest tokens"),
        ({"top_k": 64}, "it holds the 8 likeliest tokens, and cache.top_k is 64"),
        ({"max_answer_tokens": 1}, "and cache.max_answer_tokens is 1"),
        ({"kind": "dense"}, "cache.kind is dense"),
        ({"store": "fp32"}, "it stores fp16, and cache.store is fp32"),
    ],
)
def test_a_cache_that_is_there_does_not_silence_settings(
    change: dict[str, object], reason: str, tmp_path: Path
) -> None:
    method = token_kd()
    built(tmp_path / "c", method)
    with pytest.raises(CacheError, match=reason):
        token_plan(tmp_path / "c", method, **change).existing()
