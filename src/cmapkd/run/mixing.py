"""How the two heads of a run's classifier answer together, chosen on the validation data and never on the test data."""

from __future__ import annotations

from collections.abc import Callable

from accelerate import PartialState

from cmapkd.data.open import open_source
from cmapkd.evaluation.embed import embed
from cmapkd.evaluation.mixing import ALPHAS, BETAS, best_mix
from cmapkd.evaluation.suite import same_samples
from cmapkd.methods import Method
from cmapkd.methods.classifying import ClassifierMethod
from cmapkd.models import Classifier, Model
from cmapkd.models.classifier import AnswerRule
from cmapkd.run.config import RunConfig

_HOW = "The heads answer by α σ(labels) + (1 - α) σ(teacher / β)"


def mix_on_validation(
    config: RunConfig, method: Method, student: Model, *, say: Callable[[str], None]
) -> tuple[str, ...]:
    """Gives a trained student the mix of its heads that is best on `data.val`, where the method leaves it open.

    Every process chooses by itself from the same scores; the first one's student is saved.

    Args:
        say: is told what was chosen.
    Returns:
        A sentence where nothing could be chosen, or where the same data are scored.
    """
    if not isinstance(method, ClassifierMethod) or method.mix is None or None not in method.mix:
        return ()
    assert isinstance(student, Classifier)
    assert student.rule is not None
    data, settings, rule = config.data, config.evaluation, student.rule
    if data.val is None:
        return (f"{_HOW} with α {rule.alpha:g} and β {rule.beta:g}: there is no data.val to choose them on.",)
    source = open_source(data.val, split="val")
    seen = embed(
        student,
        source,
        batch_size=settings.batch_size,
        device=PartialState().device,
        workers=settings.workers,
        timeout=settings.timeout,
        limit=settings.limit,
        on_bad_sample=data.on_bad_sample,
    )
    if not bool((seen.labels >= 0).any()):
        return (f"{_HOW} with α {rule.alpha:g} and β {rule.beta:g}: no sample of data.val has a label.",)
    alpha, beta = method.mix
    first, second = (seen.logits[head] for head in rule.heads)
    mix = best_mix(
        first,
        second,
        seen.labels,
        alphas=ALPHAS if alpha is None else (alpha,),
        betas=BETAS if beta is None else (beta,),
    )
    student.rule = AnswerRule(heads=rule.heads, alpha=mix.alpha, beta=mix.beta)
    say(f"{_HOW}, α {mix.alpha:g} and β {mix.beta:g}, chosen on {source.name}")
    if data.test is None or same_samples(source, open_source(data.test, split="test")):
        return ("α and β of the two heads were chosen on the data that are scored: name other samples for data.test.",)
    return ()
