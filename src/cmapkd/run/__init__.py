"""One run, from config to evidence: the only place that joins data, models, method, training and evaluation."""

from cmapkd.run.build import (
    build_student,
    check_training,
    heads_of,
    load_teachers,
    method_of,
    open_training,
    read_streams,
    readers,
    readers_of,
    teacher_views,
    texts_of,
)
from cmapkd.run.cached import answer_from_cache, plan_cache
from cmapkd.run.config import RunConfig
from cmapkd.run.execute import run
from cmapkd.run.finalize import finalize
from cmapkd.run.measure import check_words, reference_of, scores_of
from cmapkd.run.targets import survey_of
from cmapkd.run.texts import classes_of, vocabulary_captions

__all__ = [
    "RunConfig",
    "answer_from_cache",
    "build_student",
    "check_training",
    "check_words",
    "classes_of",
    "finalize",
    "heads_of",
    "load_teachers",
    "method_of",
    "open_training",
    "plan_cache",
    "read_streams",
    "readers",
    "readers_of",
    "reference_of",
    "run",
    "scores_of",
    "survey_of",
    "teacher_views",
    "texts_of",
    "vocabulary_captions",
]
