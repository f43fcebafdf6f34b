"""Batches as pure functions of a plan: which views and texts of its samples, for which model."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset

from cmapkd.data.memory import SampleMemory
from cmapkd.data.pieces import Part, Rows, united_rows
from cmapkd.data.plans import Plan
from cmapkd.data.random import permuted
from cmapkd.data.readers import Reader, Shared, first_alike, refuse_more_views
from cmapkd.data.records import Unusable
from cmapkd.data.regions import further_view, told_of_views
from cmapkd.data.streams import MAIN_STREAM, Stream, streams_of
from cmapkd.data.texts import TextChoice
from cmapkd.data.types import BadSampleError, Batch, Input, Sample, Source, StoredRows
from cmapkd.data.unseen import UnseenSamples
from cmapkd.data.views import View, ViewSpec, check_more_views, draw_view

_EXTRAS_KEPT = 1_000_000  # samples; what extras make of one is a number or two
MAX_REPLACEMENTS = 100  # tries before a batch gives up finding a readable sample


class Choice(Protocol):
    """Which of a sample's texts a batch brings, a pure function of the sample and the number of its view. Picklable.

    Attributes:
        plain: whether `unseen.unseen` has all that it reads.
    """

    @property
    def plain(self) -> bool: ...

    def choose(self, sample: Sample, view: View, number: int) -> Any:
        """What is said of this view.

        Raises:
            BadSampleError: the sample lacks what is read.
        """
        ...

    def columns(self, chosen: Sequence[Any]) -> tuple[tuple[str, ...], dict[str, list[str]]]:
        """One text of each sample, and by pool the further texts of one sample after the other."""
        ...

    def named(self, chosen: Any) -> str:
        """All that was chosen for a sample as one text, which names it in a cache."""
        ...

    def check(self, source: Source) -> None:
        """Refuses data that seem to lack what is to be read.

        Raises:
            ConfigError: none of the first samples has it.
        """
        ...

    def describe(self) -> str:
        """Names the choice for a cache's identity."""
        ...


class Answers(Protocol):
    """A model's answers to views, read instead of computed; see `cache.CacheReader`. Picklable."""

    needs_texts: bool  # whether the model's own tokens are read beside the answers

    def has(self, view: int, index: int) -> bool:
        """Whether the answer to a view of the sample at `index` is there."""
        ...

    def read(
        self,
        view: int | Sequence[int],
        indices: Sequence[int],
        ids: Sequence[str],
        captions: Sequence[str],
        missing: Sequence[int],
    ) -> StoredRows:
        """The answers to one view of these samples with these texts (`texts.joined`), except in the `missing` places.

        Args:
            view: the view's number, one for all samples or one for each.
        Raises:
            ValueError: an answer is to another sample, view or caption, or damaged.
        """
        ...


class Extra(Protocol):
    """Something else that a batch brings of its samples, made where these are read. Picklable.

    One with a true `of_sample` makes the same of a sample in every view and epoch, so it is asked once.
    """

    def read(self, sample: Sample, view: View, epoch: int) -> Any:
        """Of one sample, what is kept when its picture is gone.

        Args:
            view: what the batch shows of the picture: its crop, in pixels of the original, its flip and its colours.
            epoch: the sample's own, from 0.
        Raises:
            BadSampleError: the sample cannot be used; another takes its place.
        """
        ...

    def join(self, items: Sequence[Any]) -> Any:
        """Of the batch: one row for each item, or an object with `part(start, stop)`; see `Batch.extra`."""
        ...


class Batches(Protocol):
    """What a trainer steps through: the batch of a plan, and as many items in an epoch as `source` has."""

    @property
    def source(self) -> Sized: ...

    @property
    def streams(self) -> Sequence[Stream]:
        """Of the source, each with its order."""
        ...

    def __getitem__(self, plan: Plan) -> Batch: ...

    def bytes_of(self, size: int) -> int:
        """About the bytes of a batch of `size` samples, to bound how many are made ahead."""
        ...


class BatchBuilder(Dataset[Batch]):
    """Turns a plan into a batch: reads samples, draws views, lets each model preprocess and tokenise its own way.

    A sample that cannot be read is replaced by another that is not in the batch (chosen by the step and the bad one, so
    the same after a resume) and reported in `Batch.bad`; with `on_bad_sample="error"` it stops the run, unless it only
    lacks a caption. In windows of shards it is one of the same window, so that no other shard is opened for it.

    A role with `stored` answers gets these, and images only of the samples that they lack. Where every role has them
    and nothing else reads the pictures, pictures are not even decoded, of sources that know ids without reading (`id`).
    What `extras` make of the samples is in `Batch.extra`, by their names. `texts` says which texts a batch brings of
    each sample. Up to `memory` MiB of decoded samples are kept for later epochs.

    Args:
        more_views: by name, how many further views a method reads of each sample. A role with stored answers gets none
            of them: nobody is there to encode them.
        own_views: by role, what it sees in place of `views`; its captions are theirs.
        streams: of the source, each with its order (`Ordering.streams`); none: all are mixed as a whole.
        view_specs: what the further views may be, by name (`data.more_views`).
    Raises:
        ConfigError: a further view is asked for that no spec describes.
    """

    def __init__(
        self,
        source: Source,
        views: ViewSpec,
        readers: Mapping[str, Reader],
        *,
        seed: int,
        on_bad_sample: str = "skip",
        stored: Mapping[str, Answers] | None = None,
        extras: Mapping[str, Extra] | None = None,
        texts: Choice | None = None,
        memory: int = 0,
        more_views: Mapping[str, int] | None = None,
        view_specs: Mapping[str, ViewSpec] | None = None,
        own_views: Mapping[str, ViewSpec] | None = None,
        streams: Sequence[Stream] = (),
    ) -> None:
        self.samples = SampleMemory(source, memory)
        self.views, self.readers, self.seed = views, readers, seed
        self.skip_bad = on_bad_sample == "skip"
        self.stored = dict(stored or {})
        self.texts: Choice = texts or TextChoice()
        self.more_views, self.view_specs = dict(more_views or {}), dict(view_specs or {})
        self.extras, self.own_views = told_of_views(extras or {}, self.view_specs), dict(own_views or {})
        check_more_views(self.more_views, self.view_specs)
        self._live = [role for role in readers if role not in self.stored]
        self._unseen = UnseenSamples(source)  # a view's draws but for its crop need no size, so captions are the same
        self._extras_read: dict[int, dict[str, Any]] = {}
        self._together = [role for role in self.stored if self._reads_together(role)]
        lasting = all(getattr(extra, "of_sample", False) for extra in self.extras.values())
        plain = self.texts.plain and lasting and not self.more_views and not self._together
        self._may_be_unseen = plain and not self._live and bool(self.stored) and hasattr(source, "id")
        self._like = first_alike(readers, self.own_views)
        self.streams = tuple(streams) or streams_of(source) or (Stream(MAIN_STREAM, 0, len(source)),)
        if self.more_views:
            refuse_more_views(self._live, readers)

    def _reads_together(self, role: str) -> bool:
        """Whether a role with stored answers reads texts that its picture is needed for."""
        return role in self.readers and self.readers[role].reads_together and self.stored[role].needs_texts

    @property
    def source(self) -> Source:
        return self.samples.source

    def bytes_of(self, size: int) -> int:
        """About the bytes of a batch of `size` samples: stored answers, and pixels but for those that a cache lacks."""
        views = 1 + sum(self.more_views.values())
        distinct = dict.fromkeys(self._like[role] for role in self._live)
        pixels = sum(self.readers[role].bytes_of(views, self.source) for role in distinct)
        return size * (pixels + sum(getattr(answers, "row_bytes", 0) for answers in self.stored.values()))

    def __getitem__(self, plan: Plan) -> Batch:
        return self.join(plan, [self.piece(plan, 0, len(plan.mine))])

    def piece(self, plan: Plan, first: int, last: int, taken: Collection[int] = ()) -> Part:
        """The rows from `first` to before `last` of `plan.mine`.

        Args:
            taken: samples that other rows have in place of unreadable ones.
        Raises:
            BadSampleError: a sample cannot be used, and bad samples are errors, or no other could take its place.
        """
        made = Rows(self.readers, self.more_views, self.stored, self.extras)
        for row in range(first, last):
            planned, epoch = plan.mine[row], plan.epochs[row] if plan.epochs else plan.epoch
            for index in self._candidates(plan, planned, epoch, made.tried, taken):
                try:
                    self._add(made, index, epoch)
                except BadSampleError as error:
                    if not self.skip_bad and not error.silent:
                        raise
                    made.bad.append((error.sample_id, error.reason))
                    continue
                break
            else:
                sample_id, reason = made.bad[-1]
                raise BadSampleError(
                    sample_id, f"{reason}; and no readable sample was found to take its place at step {plan.step}"
                )
        return made.part(
            self._inputs(made, *self.texts.columns(made.texts)), made.answers(self.stored, self.texts.named)
        )

    def join(self, plan: Plan, parts: Sequence[Part]) -> Batch:
        """The batch of all its pieces, in their order.

        A piece does not know what replaced the bad samples of others. One that would have tried the same sample is made
        again here, so a batch does not depend on its cuts.
        """
        ids: list[str] = []
        taken: set[int] = set()
        whole: list[Part] = []
        for part in parts:
            first, last = len(ids), len(ids) + len(part.ids)
            whole.append(part if taken.isdisjoint(part.tried) else self.piece(plan, first, last, taken))
            taken.update(whole[-1].tried)
            ids += whole[-1].ids
        sizes = [len(part.ids) for part in whole]
        extras = {name: [item for part in whole for item in part.extras[name]] for name in self.extras}
        return Batch(
            tuple(ids),
            self._united(whole),
            self.texts.columns([chosen for part in whole for chosen in part.texts])[0],
            view=self.views.view_number(plan.epoch),
            bad=tuple(bad for part in whole for bad in part.bad),
            extra={name: self.extras[name].join(items) for name, items in extras.items()},
            stored={role: united_rows([part.stored[role] for part in whole], sizes) for role in self.stored},
            streams=plan.streams,
            views=tuple(view for part in whole for view in part.views) if plan.epochs else (),
        )

    def _united(self, parts: Sequence[Part]) -> dict[str, Input]:
        """The inputs of all pieces by role. One that a cache answers can be missing from some of them."""
        if len(parts) == 1:
            return dict(parts[0].inputs)
        said = [self.texts.columns(part.texts) for part in parts]
        shared, inputs = Shared(), {}
        for role, reader in self.readers.items():
            each = [part.inputs.get(role) for part in parts]
            if any(one is not None for one in each):
                inputs[role] = reader.unite(each, said, shared)
        return inputs

    def _add(self, made: Rows, index: int, epoch: int) -> None:
        """Reads one sample into the rows of a batch, all of it or nothing.

        Raises:
            BadSampleError: it cannot be used.
        """
        number = self.views.view_number(epoch)
        own = {role: spec.view_number(epoch) for role, spec in self.own_views.items()}
        lacking = [role for role, answers in self.stored.items() if not answers.has(own.get(role, number), index)]
        extras = self._extras_read.get(index) if self._may_be_unseen else None
        seen_before = self._may_be_unseen and (extras is not None or not self.extras)
        sample = self._unseen[index] if seen_before and not lacking else self.samples[index]
        view = draw_view(sample.id, number, self.views, sample.image.size)
        texts = self.texts.choose(sample, view, number)
        seen = {role: draw_view(sample.id, own[role], self.own_views[role], sample.image.size) for role in own}
        items = self._read(sample, view, texts, [*self._live, *lacking, *self._together], seen)
        for role in self._together:
            if role not in lacking:
                items[role] = self.readers[role].without_picture(items[role])
        further = {
            name: [
                self._read(
                    sample,
                    further_view(sample, number, name, place, self.view_specs[name]),
                    texts,
                    self._live,
                )
                for place in range(count)
            ]
            for name, count in self.more_views.items()
        }
        if extras is None:
            extras = {name: extra.read(sample, view, epoch) for name, extra in self.extras.items()}
            if self._may_be_unseen and len(self._extras_read) < _EXTRAS_KEPT:
                self._extras_read[index] = extras
        for role in lacking:
            made.missing[role].append(len(made.ids))
        made.ids.append(sample.id)
        made.indices.append(index)
        made.views.append(number)
        made.texts.append(texts)
        for role, shown in seen.items():
            chosen = texts if own[role] == number else self.texts.choose(sample, shown, own[role])
            made.own.setdefault(role, []).append((own[role], chosen))
        for role, column in made.items.items():
            column.append(items.get(role))
        for name, each_view in further.items():
            for each in each_view:
                for role, item in each.items():
                    made.more_items[name][role].append(item)
        for name, value in extras.items():
            made.extras[name].append(value)

    def _candidates(
        self, plan: Plan, planned: int, epoch: int, tried: list[int], taken: Collection[int]
    ) -> Iterator[int]:
        """The planned sample, then others of its stream; those that another row could take too are put into `tried`."""
        yield planned
        stream = self.streams[bisect_right(self.streams, planned, key=lambda each: each.first) - 1]
        if stream.order is not None:
            others = stream.order.instead_of(planned - stream.first, epoch)
            yield from (stream.first + other for other in islice(others, MAX_REPLACEMENTS))
            return
        used = {*plan.everyone, *taken, *tried}
        for attempt in range(MAX_REPLACEMENTS):
            start = np.array([attempt % stream.length])
            drawn = permuted(start, stream.length, "replacement", self.seed, plan.step, planned)
            index = stream.first + int(drawn[0])
            if index not in used:
                used.add(index)
                tried.append(index)
                yield index

    def _read(
        self, sample: Sample, view: View, texts: Any, roles: Iterable[str], own: Mapping[str, View] | None = None
    ) -> dict[str, Any]:
        """The view as each of `roles` reads it, once for all that read alike: these share the item.

        Args:
            own: by role, the view that it sees in place of this one.
        Raises:
            BadSampleError: a role cannot read it.
        """
        main = view.prepare(sample.image)
        done: dict[str, Any] = {}
        items: dict[str, Any] = {}
        for role in roles:
            like = self._like[role]
            if like not in done:
                shown = own[role].prepare(sample.image) if own and role in own else main
                try:
                    done[like] = self.readers[role].read(*shown, texts)
                except Unusable as error:
                    raise BadSampleError(sample.id, str(error)) from None
            items[role] = done[like]
        return items

    def _inputs(self, made: Rows, captions: Sequence[str], more_texts: Mapping[str, Sequence[str]]) -> dict[str, Input]:
        """By role. Models that read alike share the pixels or dialogues, those of one tokenizer the tokens."""
        inputs: dict[str, Input] = {}
        shared = Shared()
        for role, reader in self.readers.items():
            items = made.items[role]
            further: dict[str, list[Any]] = {}
            if role not in self.stored:
                further = {name: columns[role] for name, columns in made.more_items.items()}
            elif all(item is None for item in items) and not self.stored[role].needs_texts:
                continue
            inputs[role] = reader.join(items, captions, more_texts, further, shared)
        return inputs
