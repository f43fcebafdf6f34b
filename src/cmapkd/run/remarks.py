"""What a run's owner should know before it starts: data that prove nothing, an endless warm-up, untrained teachers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cmapkd.config import counted
from cmapkd.data.left_out import without_caption
from cmapkd.data.streams import JoinedSource
from cmapkd.data.texts import LOOKED_AT
from cmapkd.data.types import BadSampleError, Source
from cmapkd.data.unseen import unseen
from cmapkd.evaluation.suite import same_samples
from cmapkd.methods import Method
from cmapkd.methods.classifying import ClassifierMethod
from cmapkd.methods.generative import GenerativeMethod
from cmapkd.models import FrozenTeacher, Model
from cmapkd.models.shared_vocabulary import remark_on_ends
from cmapkd.models.untrained import remark_on_unlearned, remark_on_untrained
from cmapkd.run.config import RunConfig
from cmapkd.run.measure import Measured
from cmapkd.training.optim import learning_rate


def remarks_on_data(config: RunConfig, source: Source, measured: Measured) -> Iterator[str]:
    """A sentence for each thing that should be known about the data of training and measurement."""
    if left_out := without_caption(source):
        yield f"{counted(left_out, 'training sample')} without a caption: left out. {len(source):,} are read."
    if measured.final is None:
        yield (
            "no evaluation data are named: the run ends without scores. Name held-out data with data.val or data.test."
        )
    trained = source.sources if isinstance(source, JoinedSource) else (source,)
    named = measured.named(config)
    for key, other in named.items():
        if any(same_samples(each, other) for each in trained):
            yield (
                f"{key} and the training data are the same samples ({other.name}): the scores say what the student "
                "remembers, not what it learned. Name samples that are not trained on."
            )
    if len(named) == 2 and same_samples(*named.values()) and config.training.student == "best":
        yield (
            "data.test and data.val are the same samples: the best step is chosen by the scores that are reported. "
            "Name others for data.test."
        )


def remarks_on_questions(config: RunConfig, source: Source) -> Iterator[str]:
    """A sentence where views repeat before the questions of a picture have been asked; few samples are looked at."""
    views, prompts = config.data.views, config.data.prompts
    if not config.writes or views is None or views.num_views is None or prompts.join:
        return
    if prompts.kind not in ("auto", "questions", "both"):
        return
    asked, prompting = [], prompts.prompting()
    for index in range(min(LOOKED_AT, len(source))):
        try:
            sample = unseen(source, index)
        except BadSampleError:
            continue
        asked.append(0 if prompts.kind == "auto" and sample.turns else len(prompting.asked(sample)))
    if asked and (mean := sum(asked) / len(asked)) > views.num_views:
        yield (
            f"a picture has about {mean:.0f} questions, and its {views.num_views} views repeat: each view draws one "
            f"question, so the others are never asked. Set data.prompts.join=true, which asks all at once, or "
            f"data.views.num_views={4 * round(mean)}, which draws nearly all."
        )


def remarks_on_ends(method: Method) -> Iterator[str]:
    """A sentence where the answers of a student end with another token than those of the teacher it is compared to."""
    if not isinstance(method, GenerativeMethod) or not method.teachers or not method.compares_tokens:
        return
    if method.config.reads_bytes:
        yield "teacher and student have one tokenizer: alignment bytes compares every token of it, as ids does."
    (role, teacher), *_ = method.teachers.items()
    if (remark := remark_on_ends(teacher.model.vocabulary, method.student.vocabulary)) is not None:
        yield f"{role}: {remark}"


def remarks_on_mix(config: RunConfig, method: Method) -> Iterator[str]:
    """A sentence where there is nothing to choose the mix of a classifier's two heads on."""
    if (
        isinstance(method, ClassifierMethod)
        and method.mix is not None
        and None in method.mix
        and config.data.val is None
    ):
        yield (
            "how much each of the two heads says is chosen on labelled pictures of data.val, and none are named: it "
            "stays as the student has it. Name some with data.val, or set method.alpha and method.beta."
        )


def remarks_on_method(config: RunConfig, method: Method) -> Iterator[str]:
    """Those on what the method makes of models and data."""
    yield from remarks_on_ends(method)
    yield from remarks_on_mix(config, method)


def remarks_on_length(config: RunConfig, total: int) -> Iterator[str]:
    """A sentence where a run is over before its warm-up is."""
    warmup, peak = config.optim.warmup_steps, config.optim.learning_rate
    if total <= warmup:
        last = learning_rate(total - 1, total=total, config=config.optim)
        yield (
            f"the run has {counted(total, 'step')}, and optim.warmup_steps is {warmup}: the learning rate ends at "
            f"{last:.2g} of {peak:.2g} and never falls. Set optim.warmup_steps={max(1, total // 10)}, or train longer."
        )


def remarks_on_student(config: RunConfig, student: Model) -> Iterator[str]:
    """A sentence where random parts of the student stay as they are."""
    if (remark := remark_on_unlearned(student, config.training.train_parts)) is not None:
        yield remark


def remarks_on_teachers(teachers: Mapping[str, FrozenTeacher]) -> Iterator[str]:
    """A sentence for each teacher that nobody has trained."""
    for role, teacher in teachers.items():
        if (remark := remark_on_untrained(teacher.model)) is not None:
            yield f"{role if role == 'teacher' else f'teacher {role}'}: {remark}"
