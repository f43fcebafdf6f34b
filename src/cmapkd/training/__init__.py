"""The training loop, its optimiser, checkpoints and trackers. It knows methods only by their terms."""

from cmapkd.training.config import OptimConfig, TrainConfig
from cmapkd.training.memory import OutOfMemory
from cmapkd.training.state import TrainResult
from cmapkd.training.stopping import Interrupted, NonFiniteLossError
from cmapkd.training.trainer import Trainer

__all__ = ["Interrupted", "NonFiniteLossError", "OptimConfig", "OutOfMemory", "TrainConfig", "TrainResult", "Trainer"]
