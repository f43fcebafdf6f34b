"""What a run reads beside its pairs: the names and prompts of classes, sentences, and texts of a vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cmapkd.config import ConfigError
from cmapkd.data.streams import streams_of
from cmapkd.data.templates import ClassPrompts, get_class_names, get_class_prompts, get_sentences, get_templates
from cmapkd.data.types import BadSampleError, Source
from cmapkd.data.unseen import unseen
from cmapkd.run.config import RunConfig

VOCABULARY_CAPTIONS = 20_000  # samples read to learn the vocabulary of an untrained tiny model


def classes_of(config: RunConfig, source: Source) -> ClassPrompts | None:
    """The classes of the training source, in the evaluation's words; None where the method does not read them.

    Raises:
        ConfigError: it reads them, and nobody names them.
    """
    if not config.method.reads_classes:
        return None
    names = get_class_names(config.evaluation.class_names, source)
    if not names:
        raise ConfigError(
            f"method {config.method.name}, as it is set, reads the names of the classes, and {source.name} names none: "
            "give evaluation.class_names a file with a name on each line, or take a data.train with labels"
        )
    own = get_class_prompts(config.evaluation.class_prompts, names, source)
    prompts = ClassPrompts(names, get_templates(config.evaluation.templates, source), own)
    return replace(prompts, sentences=_sentences_of(config, prompts, source))


def _sentences_of(config: RunConfig, prompts: ClassPrompts, source: Source) -> tuple[str, ...]:
    """The sentences that the method reads beside the classes; none of most methods.

    Raises:
        ConfigError: there are none where it looks for them.
    """
    asked = config.method.reads_sentences
    if asked is None:
        return ()
    if asked.origin == "classes":
        return prompts.texts
    if asked.origin == "captions":
        first, length = next(
            ((each.first, each.length) for each in streams_of(source) if each.name == asked.stream), (0, len(source))
        )
        every = max(1, length // asked.number)
        found = tuple(dict.fromkeys(_first_captions(source, range(first, first + length, every))))[: asked.number]
    else:
        lines = get_sentences(asked.origin)
        found = lines[:: max(1, len(lines) // asked.number)][: asked.number]
    if not found:
        raise ConfigError(
            f"method {config.method.name} compares pictures with captions of {asked.stream}, which has none: set "
            "method.sentences to a text file with one on each line, or to classes"
        )
    return found


def _first_captions(source: Source, places: range) -> Iterator[str]:
    """Of each of these samples, where it has one and can be read."""
    for index in places:
        try:
            captions = source.captions(index)
        except BadSampleError:
            continue
        yield from captions[:1]


def training_texts(config: RunConfig, source: Source) -> Iterator[str]:
    """Every text that a student which embeds may read in training; lazily.

    Those are captions, further texts by pool, prompts of the classes, the sentences and own texts of the method, and
    where heads learn beside the student, questions and prompts of the names of boxes. Pictures are not decoded where
    the source can be read without them. Unreadable samples are passed over.

    Raises:
        ConfigError: the method reads classes or sentences, and nobody gives them.
    """
    boxes: set[str] = set()
    for index in range(len(source)):
        try:
            sample = unseen(source, index)
        except BadSampleError:  # the training meets it again, and counts it or stops
            continue
        yield from sample.captions
        for texts in sample.texts.values():
            yield from texts
        if config.heads is not None:
            yield from (each.question for each in sample.questions)
            boxes.update(box.name for box in sample.boxes)
    templates = get_templates(config.evaluation.templates, source)
    yield from ClassPrompts(tuple(sorted(boxes)), templates or ("{}",)).texts
    framed = tuple(text for text in config.method.own_texts if "{}" in text)
    yield from (text for text in config.method.own_texts if text not in framed)
    classes = classes_of(config, source) or _classes_if_named(config, source)
    if classes is not None:
        # names alone are read where there are no templates; these may leave a class without any text
        yield from replace(classes, templates=(*(templates or ("{}",)), *framed)).texts
        yield from classes.sentences


def _classes_if_named(config: RunConfig, source: Source) -> ClassPrompts | None:
    """The classes for a method that does not read them, without templates; None where the training source names none.

    Texts of classes are left out where they are of the evaluation's data alone.
    """
    settings = config.evaluation
    names = get_class_names(settings.class_names, source)
    if not names:
        return None
    try:
        own = get_class_prompts(settings.class_prompts, names, source)
    except ConfigError:
        own = ()
    return ClassPrompts(names, (), own)


def vocabulary_captions(source: Source) -> Iterator[str]:
    """Captions of up to `VOCABULARY_CAPTIONS` samples spread evenly over the source; lazily, few models read them."""
    stride = max(1, len(source) // VOCABULARY_CAPTIONS)
    for index in range(0, min(len(source), stride * VOCABULARY_CAPTIONS), stride):
        try:
            captions = source.captions(index)
        except BadSampleError:  # the training meets it again, and counts it or stops
            continue
        yield from captions


def or_prompts(captions: Iterator[str], config: RunConfig, source: Source) -> Iterator[str]:
    """The captions, or the prompts of the classes where there are none to learn a vocabulary from; lazily."""
    first = next(captions, None)
    if first is not None:
        yield first
        yield from captions
    elif (classes := classes_of(config, source)) is not None:
        yield from classes.texts
