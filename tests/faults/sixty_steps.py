"""A run with dropout, data workers and a checkpoint every seven steps: a script that `test_processes.py` ends.

python tests/faults/sixty_steps.py FOLDER
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from cmapkd.training import Trainer
from helpers import DropoutStudent, make_method, make_model, make_trainer


def of_sixty_steps(out: Path, seed: int = 0) -> Trainer:
    method = make_method("contrastive", student=make_model(kind=DropoutStudent, seed=seed))
    made = make_trainer(out, method, steps=60, workers=2, checkpoint_every=7)
    torch.manual_seed(seed)
    return made


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    of_sixty_steps(Path(sys.argv[1])).run()
