r"""A copy of a model that writes, which sees the mean picture in every picture: a control of what a teacher sees.

    uv run python benchmarks/blind_teacher.py tiny_vlm:scenes-teacher runs/blind_teacher \
        --pictures "scenes?start=990000&length=200"

The last matrix of its projector is zero, and the bias is the mean of its visual tokens over the pictures. So the
language model reads tokens of a usual size, equal in all pictures. What such a teacher still knows are words: which
answers a kind of question usually has.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--pictures", required=True, help="a source, for the mean of visual tokens")
    arguments = parser.parse_args()
    blinded(arguments.model, arguments.pictures).save(arguments.out)
    print(arguments.out)


def blinded(name: str, pictures: str) -> Any:
    """The model with a projector that answers equally for all pictures."""
    import torch
    from torch import nn

    import cmapkd
    from cmapkd.data.dialogues import Turn, join_items
    from cmapkd.data.open import open_source

    model: Any = cmapkd.load(name).eval()
    owned = {parameter for parameter, _, _ in (name.rpartition(".") for name in model.parts["projector"])}
    last = [part for name, part in model.named_modules() if name in owned and isinstance(part, nn.Linear)][-1]
    seen: list[torch.Tensor] = []
    hook = last.register_forward_hook(lambda _module, _given, answer: seen.append(answer.flatten(0, -2).mean(0)))
    samples = open_source(pictures)
    dialogue = (Turn("user", "?", 1), Turn("assistant", "a"))
    for sample in (samples[number] for number in range(len(samples))):
        inputs = join_items([model.processor.read(dialogue, [sample.image])], model.vocabulary.pad_id)
        with torch.no_grad():
            model(inputs)
    hook.remove()
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.stack(seen).mean(0))
    return model


if __name__ == "__main__":
    main()
