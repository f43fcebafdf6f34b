"""The tasks by name. A further one is its file and its line here, or an entry point `cmapkd.tasks` of its package."""

from cmapkd.config import ConfigError, Registry, closest
from cmapkd.evaluation.config import EvaluationConfig
from cmapkd.evaluation.tasks.accuracy import Accuracy
from cmapkd.evaluation.tasks.agreement import Agreement
from cmapkd.evaluation.tasks.answering import Answering
from cmapkd.evaluation.tasks.base import Column, Headline, Task
from cmapkd.evaluation.tasks.captioning import Captioning
from cmapkd.evaluation.tasks.compositional import Compositional
from cmapkd.evaluation.tasks.describing import Describing
from cmapkd.evaluation.tasks.detection import Detection
from cmapkd.evaluation.tasks.drafting import Drafting
from cmapkd.evaluation.tasks.efficiency import Efficiency
from cmapkd.evaluation.tasks.generation import Generation
from cmapkd.evaluation.tasks.linear import LinearProbe, Neighbours
from cmapkd.evaluation.tasks.patch_text import PatchText
from cmapkd.evaluation.tasks.perplexity import Perplexity
from cmapkd.evaluation.tasks.retrieval import Retrieval
from cmapkd.evaluation.tasks.token_agreement import TokenAgreement
from cmapkd.evaluation.tasks.vqa import VQA
from cmapkd.evaluation.tasks.yes_no import YesNo
from cmapkd.evaluation.tasks.zero_shot import Calibration, ZeroShot

TASKS: Registry[type[Task]] = Registry(
    "cmapkd.tasks",
    {
        "retrieval": Retrieval,
        "zero_shot": ZeroShot,
        "compositional": Compositional,
        "accuracy": Accuracy,
        "linear_probe": LinearProbe,
        "knn": Neighbours,
        "vqa": VQA,
        "captioning": Captioning,
        "detection": Detection,
        "patch_text": PatchText,
        "calibration": Calibration,
        "agreement": Agreement,
        "efficiency": Efficiency,
        "answering": Answering,
        "yes_no": YesNo,
        "describing": Describing,
        "perplexity": Perplexity,
        "token_agreement": TokenAgreement,
        "generation": Generation,
        "drafting": Drafting,
    },
    base=Task,
)


def make_task(name: str, config: EvaluationConfig) -> Task:
    """The task with this name, as `config` sets it.

    Raises:
        ConfigError: its settings do not fit.
    """
    kind = TASKS[name]
    return kind(config.of_task(name, kind.Settings))


def check_tasks(config: EvaluationConfig) -> None:
    """Refuses names of tasks that do not exist or cannot be measured here, and settings that reach no task.

    Raises:
        ConfigError: lists what is wrong, each line with its key.
    """
    named = config.tasks if isinstance(config.tasks, tuple) else ()
    problems = [f"tasks: {why}" for name in named if (why := _refused(name, config)) is not None]
    for name in config.settings:
        if name in TASKS.own:
            instead = f"write {name}.KEY" if name in type(config).model_fields else "it has none here"
            problems.append(f"settings.{name}: {name} is a task of cmapkd's own: {instead}")
        elif name not in TASKS:
            problems.append(f"settings.{name}: there is no task {name!r}{closest(name, TASKS)}")
        elif name not in named and config.tasks != "all":
            problems.append(f"settings.{name}: tasks does not name {name}, so its settings would do nothing")
    if problems:
        raise ConfigError("the evaluation has tasks that do not fit:\n  " + "\n  ".join(problems), tuple(problems))
    for name in named:
        make_task(name, config)


def _refused(name: str, config: EvaluationConfig) -> str | None:
    """Why a task cannot be named, or None."""
    # a package's task is imported only where it is named
    known = [key for key in TASKS if key not in TASKS.own or TASKS[key].alone or not config.alone]
    offered = f"{', '.join(known)}, or {' or '.join(config.words)}"
    if name not in TASKS:
        return f"unknown task {name!r}{closest(str(name), known)}; known: {offered}"
    if config.alone and not TASKS[name].alone:
        return (
            f"task {name!r} needs more than one model and its test data: measure it with cmapkd evaluate when the run "
            f"is done. Known here: {offered}"
        )
    return None


__all__ = ["TASKS", "Column", "Headline", "Task", "check_tasks", "make_task"]
