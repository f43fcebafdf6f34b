"""From a method with a live teacher to the same method with a cached one: finds the cache, builds it, opens it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from cmapkd.cache.asked import Asked, AskedTokens, AskedTowers, Seen, asked_of
from cmapkd.cache.config import CacheConfig
from cmapkd.cache.files import CacheError, digest_of
from cmapkd.cache.folder import CacheFolder, ShardsOfRun
from cmapkd.cache.identity import BY_SHARD, data_of, differences, identity_of, weight_hash
from cmapkd.cache.layout import RowLayout
from cmapkd.cache.reader import CacheReader
from cmapkd.cache.rows import Layout
from cmapkd.cache.teacher import CachedTeacher
from cmapkd.cache.token_layout import TokenLayout
from cmapkd.cache.token_teacher import CachedTokens
from cmapkd.cache.wanted import Wanted
from cmapkd.cache.writer import BuildResult, OnProgress, build, missing_shards
from cmapkd.data.batches import Choice
from cmapkd.data.shard_contents import ShardContents, shard_contents
from cmapkd.data.texts import TextChoice
from cmapkd.data.types import Source
from cmapkd.data.views import ViewSpec
from cmapkd.methods import Method
from cmapkd.methods.dual import TeacherDetail
from cmapkd.models import DualEncoder, FrozenTeacher, Model

GIB = 2**30


@dataclass(frozen=True)
class CachePlan:
    """What a run asks of a cache; nothing is written before `build`."""

    config: CacheConfig
    teacher: FrozenTeacher  # live
    asked: Asked
    source: Source
    views: ViewSpec
    keys: Wanted  # what the run will read
    precision: str
    texts: Choice = field(default_factory=TextChoice)
    max_tokens: int | None = None  # longest dialogue of a teacher that writes; none: as long as it takes

    @classmethod
    def of_method(
        cls,
        config: CacheConfig,
        method: Method,
        *,
        source: Source,
        views: ViewSpec,
        keys: Wanted,
        precision: str,
        role: str = "teacher",
        texts: Choice | None = None,
        max_tokens: int | None = None,
    ) -> CachePlan:
        """Before any stage has been entered: what all stages together read of the teacher with this role.

        Where the config names a folder, each further teacher has a folder of its own next to it.

        Args:
            texts: that the run reads; none: a caption, and what the method asks for.
            max_tokens: longest dialogue of a teacher that writes; None: as long as it takes.
        Raises:
            CacheError: the method has no use for one.
        """
        if method.not_cached is not None:
            raise CacheError(f"this method takes no teacher cache as it is set: {method.not_cached}. Set cache: off")
        teacher, asked = method.teachers[role], asked_of(method, role)
        if not isinstance(teacher, FrozenTeacher):
            raise CacheError(f"teacher {role} of {type(method).__name__} has no answers to keep: set cache: off")
        config = config if role == "teacher" else beside(config, role)
        texts = texts or TextChoice(method.text_pools)
        return cls(config, teacher, asked, source, views, keys, precision, texts, max_tokens)

    @classmethod
    def of_student(
        cls,
        config: CacheConfig,
        student: DualEncoder,
        *,
        source: Source,
        views: ViewSpec,
        keys: Wanted,
        precision: str,
        texts: TextChoice,
    ) -> CachePlan:
        """Of what the student's towers that do not learn give to what follows: pooled features, or last tokens.

        Where the config names a folder, they have a folder of their own next to it. `cache.kind` is the teacher's.
        """
        needs = student.stored_levels
        detail: TeacherDetail = "dense" if needs.image_levels or needs.text_levels else "global"
        config = beside(config, "student").model_copy(update={"kind": detail})
        towers = FrozenTeacher(student.pooled_towers(student.frozen_towers), role="student", shared=True)
        return cls(config, towers, AskedTowers(needs, detail), source, views, keys, precision, texts)

    @property
    def _seen(self) -> Seen:
        return Seen(self.teacher, self.source, self.views, self.texts, self.precision, self.config)

    @cached_property
    def _outline(self) -> Layout:
        return self.asked.outline(self._seen)

    @cached_property
    def layout(self) -> Layout:
        """That of the cache, or the one that it will have.

        Raises:
            CacheError: the cache does not fit, or no sample can be read.
        """
        cache = self.existing()
        return self.asked.completed(self._outline, self._seen) if cache is None else cache.layout

    @cached_property
    def _contents(self) -> ShardContents | None:
        """The shards of the data, by which answers are kept; None where they are kept for the data as a whole.

        Of a teacher that writes they are: the room of its rows depends on all answers of the data.
        """
        return shard_contents(self.source) if isinstance(self._outline, RowLayout) else None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Of a new cache."""
        return self._identity_of_whole if self._contents is None else self._identity(by_shard=True)

    @cached_property
    def _identity_of_whole(self) -> dict[str, Any]:
        """Of a cache that belongs to the data as a whole."""
        return self._identity(by_shard=False)

    def _identity(self, *, by_shard: bool) -> dict[str, Any]:
        return identity_of(
            self.teacher.model,
            self.source,
            self.views,
            precision=self.precision,
            texts=self.texts,
            max_tokens=self.max_tokens,
            by_shard=by_shard,
            weights=self._weights,
        )

    @cached_property
    def _weights(self) -> str:
        return weight_hash(self.teacher.model)

    @cached_property
    def folder(self) -> Path:
        """The config's, or one under the user's cache folder by what is in it."""
        if self.config.folder is not None:
            return self.config.folder
        folder = self._folder_of(self.identity)
        if self._contents is None or CacheFolder.exists(folder):
            return folder
        before = self._folder_of(self._identity_of_whole)  # where earlier versions kept the answers
        return before if CacheFolder.exists(before) else folder

    def _folder_of(self, identity: Mapping[str, Any]) -> Path:
        root = os.environ.get("XDG_CACHE_HOME")
        base = Path(root) if root else Path("~/.cache").expanduser()
        # of tars no digest covers the pictures' bytes, so tars that lie elsewhere are not taken for these
        place = [self._contents.folder] if self._contents is not None and identity["data"] == BY_SHARD else []
        content = repr((sorted(identity.items()), self._outline.plain(), *place)).encode()
        name = re.sub(r"[^\w.-]+", "-", f"{self.teacher.name}-{(place or [self.source.name])[0]}").strip("-")
        return base / "cmapkd" / "teachers" / f"{name[:80]}-{digest_of(content)[:12]}"

    def existing(self) -> CacheFolder | None:
        """The cache in the folder, or None where there is none yet.

        Raises:
            CacheError: it does not fit; lists every reason.
        """
        if not CacheFolder.exists(self.folder):
            return None
        self.asked.check(self.config, self.teacher.name)
        cache = CacheFolder.open(self.folder)
        reasons = differences(cache.identity, self.identity if cache.by_shard else self._identity_of_whole)
        lacking = self.asked.lacking(cache.layout)
        reasons += [lacking] if lacking else []
        if self.config.store != cache.layout.store:
            reasons.append(f"it stores {cache.layout.store}, and cache.store is {self.config.store}")
        if isinstance(cache.layout, TokenLayout):
            reasons += cache.layout.differs(self.config.top_k, self.config.max_answer_tokens)
        if reasons:
            listed = "\n  ".join(reasons)
            raise CacheError(
                f"the cache {self.folder} does not fit this run:\n  {listed}\nName another folder, or leave "
                "cache.folder out: then each teacher and data set has its own."
            )
        return self._for_data(cache)

    def _for_data(self, cache: CacheFolder) -> CacheFolder:
        """The cache as this run's data use it."""
        if not cache.by_shard or self._contents is None:
            return cache
        views = -(-self.keys.end // len(self.source))
        return cache.of(ShardsOfRun(self._contents, views, data_of(self.source), self.config.batch_size))

    def bytes_missing(self) -> int:
        """That building would write."""
        cache = self.existing()
        if cache is None:
            return len(self.keys) * self.layout.row_bytes
        missing, unknown = missing_shards(cache, self.keys)
        return (len(unknown) + sum(shards.rows for shards in missing)) * cache.layout.row_bytes

    def check_size(self) -> None:
        """Refuses what is larger than the config or the disk allows.

        Raises:
            CacheError: says how much, and what to do.
        """
        needed = self.bytes_missing()
        if not needed:
            return
        what = (
            f"caching {self.teacher.name} for this run takes {needed / GIB:.2f} GiB ({len(self.keys):,} rows of "
            f"{self.layout.row_bytes:,} bytes)"
        )
        advice = (
            "read fewer samples (for scenes: data.train=scenes?length=50000), fewer views (data.views.num_views), or "
            f"store less ({self.asked.smaller})"
        )
        if needed > self.config.max_gib * GIB:
            raise CacheError(f"{what}, more than cache.max_gib {self.config.max_gib:g}: {advice}; or raise the limit")
        existing = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if needed > free:
            raise CacheError(f"{what}, and the disk of {existing} has {free / GIB:.2f} GiB left: {advice}")

    def build(
        self,
        *,
        device: torch.device | str,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        skip_bad: bool = True,
        progress: OnProgress | None = None,
        timeout: float = 0.0,
    ) -> BuildResult:
        """Adds what is missing; this process's part of it. The teacher is moved to `device`.

        In bf16 the teacher then holds weights as it computes with them, see `FrozenTeacher.hold_in_bf16`.

        Raises:
            CacheError: it would be too large, does not fit, or cannot be written.
        """
        self.check_size()
        cache = self.existing() or self._create()
        missing, unknown = missing_shards(cache, self.keys)
        if not missing and not len(unknown):
            return BuildResult()
        self.teacher.to(device)
        if self.precision == "bf16":
            _ = self.identity  # of the teacher's own weights
            self.teacher.hold_in_bf16()
        return build(
            cache,
            self.keys,
            teacher=self.teacher,
            source=self.source,
            views=self.views,
            precision=self.precision,
            batch_size=self.config.batch_size,
            shard_bytes=self.config.shard_mib * 2**20,
            workers=workers,
            rank=rank,
            world_size=world_size,
            skip_bad=skip_bad,
            progress=progress,
            timeout=timeout,
            texts=self.texts,
            max_tokens=self.max_tokens,
        )

    def _create(self) -> CacheFolder:
        model = self.teacher.model
        data = self.source.name if self._contents is None else f"tars in {self._contents.folder}"
        about = {"teacher": model.name, "data": data}
        scale = bias = None
        if isinstance(model, DualEncoder):
            scale = float(model.log_logit_scale.detach().exp().reshape(()))
            bias = None if model.logit_bias is None else float(model.logit_bias.detach())
        cache = CacheFolder.create(
            self.folder,
            identity=self.identity,
            layout=self.layout,
            about=about,
            logit_scale=scale,
            logit_bias=bias,
            length=0 if self._contents is not None else len(self.source),
        )
        return self._for_data(cache)

    def open(self) -> CacheReader:
        """The cache, complete for this run.

        Raises:
            CacheError: there is none, it does not fit, it is damaged, or rows are missing.
        """
        cache = self.existing()
        if cache is None:
            raise CacheError(
                f"there is no cache in {self.folder}: build it (cmapkd cache build RECIPE), or set cache: auto"
            )
        reader = CacheReader(cache, check=self.config.check)
        absent = reader.num_absent(self.keys)
        if absent:
            raise CacheError(
                f"the cache {self.folder} lacks {absent:,} of the {len(self.keys):,} rows that this run reads (other "
                "samples, more views, or a build that was stopped): build them (cmapkd cache build RECIPE), or set "
                "cache: auto"
            )
        return reader

    def cached_teacher(self, reader: CacheReader, reload: Callable[[], Model]) -> CachedTeacher:
        """What answers in the live teacher's place, without its weights: they go with whoever else holds them."""
        identity = self.identity["teacher"]

        def checked() -> Any:
            model = reload()
            if weight_hash(model) != identity:
                raise CacheError(f"the teacher {model.name} has other weights than when this run began")
            return model

        options: dict[str, Any] = {
            "reload": checked,
            "wanted": self.keys,
            "precision": self.precision,
            "check": reader.check,
            "role": self.teacher.role,
        }
        if isinstance(self.asked, AskedTokens):
            return CachedTokens(self.teacher.model, reader.cache, **options)
        return CachedTeacher(self.teacher.model, reader.cache, **options)


def beside(config: CacheConfig, role: str) -> CacheConfig:
    """The same for another role: where the config names a folder, one next to it."""
    if config.folder is None:
        return config
    return config.model_copy(update={"folder": config.folder.with_name(f"{config.folder.name}-{role}")})
