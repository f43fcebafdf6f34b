"""Cosines between the gradients of CMAPKD's terms and levels over a run: which of them pull the student apart.

    uv run python benchmarks/gradient_cosines.py --json runs/cosines.json --out runs/cosines --steps 800 --every 20

One run of `cmapkd_scenes` is trained as `cmapkd distill` would. Every `--every` steps, before the optimizer's step, the
gradient of each part of the loss is taken with respect to all parameters of the student: of each level (P2 ... L4) as
its term counts it, and of each other term. The JSON has the cosines and norms of every measured step. A level of one
tower and one of the other share no parameters, so their cosine is exactly 0 unless both read an embedding's scale.
The table shows means over the measured steps, and below them how often a cosine was negative.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cmapkd.run.train as running
from cmapkd.config import load_config
from cmapkd.methods import Method, Term
from cmapkd.methods.cmapkd import CMAPKD
from cmapkd.provenance import describe_environment
from cmapkd.run import RunConfig

ALIKE = ["student=tiny:base", "training.batch_size=64", "baseline=none", "data.memory=200", "cache=auto"]


class Cosines:
    """Watches the forward passes of a method, and measures every so many steps.

    Args:
        every: steps between measurements; the first step is measured.
    """

    def __init__(self, method: CMAPKD, *, every: int) -> None:
        self.method, self.every = method, every
        self.levels: dict[str, Tensor] = {}  # of this step: batch means, as the term counts them
        self.measured: list[dict[str, Any]] = []
        method._weigh = self._weigh_watched(method._weigh)  # type: ignore[method-assign]
        method.register_forward_hook(self._after)

    def _weigh_watched(self, weigh: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def watched(term: str, losses: Mapping[str, Tensor], *rest: Any) -> Tensor:
            scale = self.method.term_weights[term]
            self.levels |= {item: scale * column.mean() for item, column in losses.items()}
            return weigh(term, losses, *rest)

        return watched

    def _after(self, method: CMAPKD, _inputs: object, terms: dict[str, Term]) -> None:
        levels, self.levels = self.levels, {}
        if not method.training or method.step.step % self.every:
            return
        whole = {name: term.weight * term.value for name, term in terms.items() if name not in method.weighting}
        self.measured.append({"step": method.step.step, **cosines_of({**levels, **whole}, method.student.parameters())})


def cosines_of(losses: Mapping[str, Tensor], parameters: Any) -> dict[str, Any]:
    """Cosines and norms of the gradients of several losses; the graph stays whole.

    Args:
        losses: scalars by name. Those without a gradient at the parameters are left out.
        parameters: of the student.
    Returns:
        `names`; `norms`, one for each; `cosines`, a row for each, symmetric with 1 on the diagonal.
    """
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    rows: dict[str, Tensor] = {}
    for name, loss in losses.items():
        if not loss.requires_grad:
            continue
        parts = torch.autograd.grad(loss, learning, retain_graph=True, allow_unused=True)
        found = [torch.zeros_like(p) if g is None else g for g, p in zip(parts, learning, strict=True)]
        gradient = torch.cat([part.flatten().double() for part in found])
        if bool(gradient.any()):
            rows[name] = gradient
    stacked = torch.stack([*rows.values()])
    norms = stacked.norm(dim=1)
    cosines = (stacked @ stacked.T / norms.outer(norms)).clamp(-1, 1)
    return {"names": [*rows], "norms": norms.tolist(), "cosines": cosines.tolist()}


Matrix = dict[str, dict[str, float]]  # by the names of a row and a column


def summary(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Over the measured steps that have all parts; at the first step the bank is empty.

    Returns:
        `steps`; `mean`, of each cosine; `negative`, in how many per cent of the steps it was below 0; `norm`, the
        median norm of each part's gradient.
    """
    names = measured[-1]["names"]
    measured = [each for each in measured if {*names} <= {*each["names"]}]
    places = [[each["names"].index(name) for name in names] for each in measured]
    stacked = torch.stack([torch.tensor(each["cosines"])[at][:, at] for each, at in zip(measured, places, strict=True)])
    norms = torch.stack([torch.tensor(each["norms"])[at] for each, at in zip(measured, places, strict=True)])
    return {
        "steps": len(measured),
        "mean": _named(names, stacked.mean(0)),
        "negative": _named(names, 100 * (stacked < 0).float().mean(0)),
        "norm": dict(zip(names, _rounded(norms.median(0).values), strict=True)),
    }


def _named(names: Sequence[str], values: Tensor) -> Matrix:
    return {name: dict(zip(names, row, strict=True)) for name, row in zip(names, _rounded(values), strict=True)}


def _rounded(values: Tensor) -> Any:
    """As lists, to four places: no measurement here is finer."""
    return values.double().mul(1e4).round().div(1e4).tolist()


def table(measured: Sequence[Mapping[str, Any]]) -> str:
    """Means over the measured steps, and per cent of them with a negative cosine, as two Markdown tables."""
    found = summary(measured)
    return "\n\n".join((_matrix(found["mean"], "{:.2f}"), _matrix(found["negative"], "{:.0f} %")))


def _matrix(rows: Matrix, form: str) -> str:
    lines = ["| | " + " | ".join(rows) + " |", "| --- |" + " ---: |" * len(rows)]
    lines += [f"| {name} | " + " | ".join(map(form.format, row.values())) + " |" for name, row in rows.items()]
    return "\n".join(lines)


def as_json(settings: Any, every: int, measured: Sequence[Mapping[str, Any]], environment: Any) -> str:
    """All that was measured, a line for each step."""
    whole = {"settings": settings, "every": every, "summary": summary(measured), "environment": environment}
    steps = [{**each, **{key: _rounded(torch.tensor(each[key])) for key in ("norms", "cosines")}} for each in measured]
    lines = ",\n  ".join(map(json.dumps, steps))
    return json.dumps(whole, indent=1).removesuffix("\n}") + f',\n "measured": [\n  {lines}\n ]\n}}\n'


def measure(config: RunConfig, *, every: int, out: Path) -> list[dict[str, Any]]:
    """Trains the run in `out`; what was measured, in order of the steps."""
    watched: list[Cosines] = []
    build = running.method_of

    def watching(*arguments: Any, **options: Any) -> Method:
        method = build(*arguments, **options)
        if not isinstance(method, CMAPKD):
            raise SystemExit(f"this measures levels of cmapkd, and the recipe's method is {config.method.name}")
        watched.append(Cosines(method, every=every))
        return method

    running.method_of = watching
    try:
        out.mkdir(parents=True, exist_ok=True)
        running.train(config, out=out, resume=False, console=None, title="cosines")
    finally:
        running.method_of = build
    return watched[0].measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of cmapkd_scenes: key=value")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--every", type=int, default=20, help="steps between measurements")
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--out", type=Path, required=True, help="a new folder, for the run")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    fixed = [*ALIKE, f"data.train=scenes?length={arguments.samples}", f"training.steps={arguments.steps}"]
    config = load_config(RunConfig, "cmapkd_scenes", [*fixed, *arguments.overrides])
    measured = measure(config, every=arguments.every, out=arguments.out)
    text = as_json(config.plain(), arguments.every, measured, describe_environment())
    arguments.json.write_text(text, encoding="utf-8")
    print(table(measured))


if __name__ == "__main__":
    main()
