"""The tasks by name: a further one is its file and its line here."""

from cmapkd.evaluation.tasks.agreement import Agreement
from cmapkd.evaluation.tasks.base import Column, Task
from cmapkd.evaluation.tasks.captioning import Captioning
from cmapkd.evaluation.tasks.detection import Detection
from cmapkd.evaluation.tasks.efficiency import Efficiency
from cmapkd.evaluation.tasks.linear import LinearProbe, Neighbours
from cmapkd.evaluation.tasks.retrieval import Retrieval
from cmapkd.evaluation.tasks.vqa import VQA
from cmapkd.evaluation.tasks.zero_shot import Calibration, ZeroShot

TASKS: dict[str, Task] = {
    "retrieval": Retrieval(),
    "zero_shot": ZeroShot(),
    "linear_probe": LinearProbe(),
    "knn": Neighbours(),
    "vqa": VQA(),
    "captioning": Captioning(),
    "detection": Detection(),
    "calibration": Calibration(),
    "agreement": Agreement(),
    "efficiency": Efficiency(),
}

__all__ = ["TASKS", "Column", "Task"]
