"""Two and four processes equal one: every method's terms and gradients, the gather, whole runs, and changed numbers."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from started import run_script

sys.path.insert(0, str(Path(__file__).parent))
from several_processes import (
    BATCH,
    CASES,
    DTYPES_OF,
    FOUR,
    GOES_ON,
    LOCAL,
    OF_FOUR,
    SHARDED,
    SHARDED_CASES,
    SHARED_TEACHER,
    TRAINED,
    TWO,
    WITH_LEVELS,
    WITH_LOCAL,
    answered,
    asked_by,
    gather_loss,
    go_on,
    losses_and_gradients,
    rows,
    trained,
    with_heads,
    write_shards,
)

from cmapkd import methods
from cmapkd.data.shards import ShardSource
from cmapkd.methods import METHODS
from cmapkd.training.checkpoint import list_checkpoints, read_checkpoint
from helpers import ROUNDING

TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-9}  # float32: rounding, sums are taken in another order
Found = dict[str, Tensor]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:the masks of stage"),  # a few steps of theirs take nothing out
]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What groups of one, two and four processes left, one after the other."""
    folder = tmp_path_factory.mktemp("several")
    script = Path(__file__).with_name("several_processes.py")
    done = run_script(script, str(folder), timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@cache
def found_by(out: Path, size: int) -> list[Found]:
    """By each process of a group."""
    return [torch.load(out / f"rank-{rank}-of-{size}.pt", weights_only=True) for rank in range(size)]


@cache
def of_one(name: str, dtype: torch.dtype) -> Found:
    return losses_and_gradients(name, dtype, None)


def assert_equal_to_one(found: list[Found], name: str, dtype: torch.dtype, how: str = "") -> None:
    """Each error relative to the largest number of its kind: one term, or the gradient of one parameter.

    A gradient that is nothing but rounding (a bias before a norm) has no scale of its own: it gets a thousandth of the
    largest gradient's.
    """
    expected = of_one(name, dtype)
    gradients = [value for key, value in expected.items() if "/gradient/" in key]
    least = 1e-3 * max(float(value.abs().max()) for value in gradients)
    if dtype == torch.float32:
        least = 1.0
    for mine in found:
        start = f"{name}{how}/{dtype}/"
        mine = {f"{name}/{dtype}/{key.removeprefix(start)}": v for key, v in mine.items() if key.startswith(start)}
        assert mine.keys() == expected.keys()
        for key, value in expected.items():
            scale = max(float(value.abs().max()), least)
            error = float((mine[key] - value).abs().max()) / scale
            rounding = ROUNDING.get(CASES[name][0], 1.0) if dtype == torch.float32 else 1.0
            assert error < TOLERANCE[dtype] * rounding, f"{key}: {error}"


@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for name in CASES for dtype in DTYPES_OF[name]], ids=str)
def test_terms_and_gradients_of_two_equal_those_of_one(out: Path, name: str, dtype: torch.dtype) -> None:
    assert_equal_to_one(found_by(out, TWO), name, dtype)


@pytest.mark.parametrize("name", OF_FOUR)
def test_terms_and_gradients_of_four_equal_those_of_one(out: Path, name: str) -> None:
    assert_equal_to_one(found_by(out, FOUR), name, torch.float64)


def test_methods_do_not_ask_how_many_processes_there_are() -> None:
    """So what holds for `KINDS` of them holds for all: `contrastive`, which asks for SigLIP's ring, is one."""
    asks = re.compile(r"own_place|world_size|get_rank|torch\.distributed|pass_on")
    shared = {"base.py", "contrastive.py", "sigmoid_ring.py"}
    files = [path for path in Path(methods.__file__).parent.rglob("*.py") if path.name not in shared]
    assert len(files) > len(METHODS)
    assert not [path.name for path in files if asks.search(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("name", WITH_LOCAL)
def test_each_process_may_compare_its_own_rows_alone(out: Path, name: str) -> None:
    assert_equal_to_one(found_by(out, TWO), name, torch.float64, LOCAL)


@pytest.mark.parametrize("name", SHARDED_CASES)
def test_terms_and_gradients_with_shards_of_the_weights_equal_those_of_one(out: Path, name: str) -> None:
    assert_equal_to_one(found_by(out, TWO), name, torch.float64, SHARDED)


@pytest.mark.parametrize("name", WITH_LEVELS)
def test_the_teacher_may_be_shared_out_too(out: Path, name: str) -> None:
    assert_equal_to_one(found_by(out, TWO), name, torch.float64, SHARED_TEACHER)


def test_gather_passes_on_the_gradient_of_every_process(out: Path) -> None:
    image, text = rows(1).requires_grad_(), rows(2).requires_grad_()
    loss = gather_loss(image, text)
    loss.backward()
    assert image.grad is not None
    assert text.grad is not None
    share = BATCH // TWO
    for rank, found in enumerate(found_by(out, TWO)):
        mine = slice(rank * share, (rank + 1) * share)
        torch.testing.assert_close(found["gather/loss"], loss.detach())
        # both processes ask for the same loss, so a row's gradient is twice that of one; the wrapper halves it
        torch.testing.assert_close(found["gather/image"], TWO * image.grad[mine])
        torch.testing.assert_close(found["gather/text"], TWO * text.grad[mine])


def test_a_pass_over_the_data_answers_the_same(out: Path) -> None:
    for found in found_by(out, TWO):
        for key, value in answered().items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=0, msg=key)


def test_heads_learn_the_same_however_their_lessons_are_shared(out: Path) -> None:
    whole = with_heads(None)
    for found in found_by(out, TWO):
        for key, value in whole.items():
            # gradients reach 2,000 here: a small entry of such a tensor is a sum that rounds with its large terms
            rounding = 2e-5 + 5e-7 * float(value.abs().max())
            torch.testing.assert_close(
                found[key], value, rtol=1e-3, atol=rounding, msg=lambda text, key=key: f"{key}: {text}"
            )


def assert_same_run(found: list[Found], expected: Found, start: str) -> None:
    """Up to rounding; the counts of samples exactly."""
    for number, mine in enumerate(found):
        keys = [key for key in expected if number == 0 or not key.startswith("first/")]
        assert {key.removeprefix(start) for key in mine if key.startswith(start)} == {*keys}
        for key in keys:
            value = expected[key]
            if key != "ledger":
                steps = 1e-3 if value.dtype == torch.float16 else 0.0  # a bank's entry may round to its neighbour
                torch.testing.assert_close(
                    mine[start + key], value, rtol=1e-4 + steps, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
                )
    assert torch.equal(found[0][f"{start}ledger"], expected["ledger"])


@pytest.mark.parametrize("name", TRAINED)
def test_training_in_two_processes_gives_the_same_model(out: Path, name: str, tmp_path: Path) -> None:
    start = f"trained/{name}/"
    whole = {key.removeprefix(start): value for key, value in trained(name, tmp_path / name).items()}
    found = found_by(out, TWO)
    assert_same_run(found, whole, start)
    assert all(torch.equal(found[1][key], found[0][key]) for key in found[0] if key.startswith(f"{start}method/"))
    assert (out / name / "metrics.jsonl").read_text().count("\n") == 8
    one, two = ((folder / name / "bad_samples.jsonl").read_text().splitlines() for folder in (tmp_path, out))
    assert sorted(one) == sorted(two)
    assert (out / name / "checkpoints" / "step-000000008" / "random-1.safetensors").exists()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a single core
@pytest.mark.parametrize("case", GOES_ON)
def test_a_run_goes_on_in_another_number_of_processes(out: Path, case: str, uninterrupted: Found) -> None:
    """In the middle of an epoch and a stage: tars, workers, an average, a policy, a bank; with and without shards."""
    later = GOES_ON[case][1]
    start = f"changed/{case}/"
    if later == 1:
        here = go_on(out / case, ShardSource(str(out / "shards" / "*.tar")))
        found = [{start + key: value for key, value in here.items()}]
    else:
        found = found_by(out, later)
    assert_same_run(found, uninterrupted, start)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The run of one process that nothing stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    torch.set_num_threads(1)
    found = go_on(folder / "run", write_shards(folder / "shards"), resume=False)
    assert found["ledger"][1] > 0
    return found


def test_processes_wait_for_one_that_is_busy_for_longer_than_collectives_may_take(out: Path) -> None:
    """It got past `wait_for_all` (else there were nothing here); a plain barrier would have failed."""
    assert float(found_by(out, TWO)[1]["patience/barrier failed"]) == 1


def test_what_shards_write_is_whole(out: Path) -> None:
    folders = [out / name / "checkpoints" for name in (f"clip_kd{SHARDED}", "clip_kd")]
    sharded, plain = (read_checkpoint(list_checkpoints(folder)[-1])[0] for folder in folders)
    for group in ("method", "optimizer"):
        shapes = {key: value.shape for key, value in plain[group].items()}
        assert {key: value.shape for key, value in sharded[group].items()} == shapes


def test_a_request_to_stop_is_known_everywhere_one_step_later(out: Path) -> None:
    for found in found_by(out, TWO):
        assert found["agreed"].tolist() == [False, False, True, False]


def test_buffers_are_the_same_everywhere_without_being_sent(out: Path) -> None:
    first, second = found_by(out, TWO)
    buffers = [key for key in first if key.startswith("buffers/")]
    assert any("bank" in key for key in buffers)
    assert sum("running_mean" in key for key in buffers) == 3  # of both students and the momentum teacher
    for key in buffers:
        assert torch.equal(first[key], second[key]), key
    assert all(first[key].any() for key in buffers if "running_mean" in key)


def test_gradients_of_bf16_rows_are_rounded_once(out: Path) -> None:
    for found in found_by(out, FOUR):
        assert found["gather/bf16"].item() == 260  # 259 to the nearest bf16; summed in bf16 it would be 256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_of_four_are_summed_in_float32(out: Path, dtype: torch.dtype) -> None:
    exact = sum(asked_by(rank, dtype).double() for rank in range(FOUR))
    assert isinstance(exact, Tensor)
    for rank, found in enumerate(found_by(out, FOUR)):
        expected, mine = exact[5 * rank : 5 * rank + 5], found[f"gather/random/{dtype}"]
        if dtype == torch.float32:
            assert float((mine - expected).abs().max() / expected.abs().max()) <= 1e-6
        else:
            assert torch.equal(mine, expected.to(dtype))  # rounded once, at the end


def test_a_method_that_is_not_as_steady_as_it_says_is_told_so(out: Path) -> None:
    for found in found_by(out, TWO):
        message = bytes(found["unsteady"].tolist()).decode()
        assert message.startswith("Unsteady is declared steady, but sometimes.bias, sometimes.weight had a gradient")
        assert "steady = False" in message


def test_a_process_with_nothing_to_count_keeps_nobody_waiting(out: Path) -> None:
    first, second = found_by(out, TWO)
    assert first["counted/value"].item() == second["counted/value"].item() == 2.0
    assert first["counted/gradient"].tolist() == pytest.approx([2 * 2 / 3] * 3)  # the wrapper takes a mean of two
    assert not second["counted/gradient"].any()
