"""`open_source`: from a name such as `webdataset:train-*.tar` to the samples behind it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cmapkd.config import ConfigError, Registry
from cmapkd.data.asked import asked
from cmapkd.data.classes import read_classes
from cmapkd.data.config import StreamConfig
from cmapkd.data.kinds import refuse_unknown_kind
from cmapkd.data.parts import PartOfSource
from cmapkd.data.picked import picked
from cmapkd.data.places import existing_file, existing_folder
from cmapkd.data.prompting import Prompting
from cmapkd.data.spec import PART, TEXTS, Spec
from cmapkd.data.stored import SampleFilter, StoredSource
from cmapkd.data.streams import MAIN_STREAM, JoinedSource
from cmapkd.data.texts import CAPTIONS
from cmapkd.data.types import Source

if TYPE_CHECKING:
    from cmapkd.data.rows import Columns

# A glob may hold `?` and `@` too: options are told from it by their `name=value`, splits are read for some kinds only.
_OPTIONS = re.compile(r"\?([A-Za-z_]\w*=[^&]*(?:&[A-Za-z_]\w*=[^&]*)*)$")
_SPLIT = re.compile(r"@([A-Za-z0-9_.+-]*)$")


class SourceWarning(UserWarning):
    """Something about a data set that its user should know of, such as a truncated shard."""


def open_source(
    spec: str, *, split: str | None = None, require_captions: bool = False, limit: int | None = None
) -> Source:
    """The source that `spec` names; docs/data.md shows every form.

    Args:
        spec: `scenes[:difficulty]`, `webdataset:GLOB`, `folder:DIR`, `csv:FILE`, `jsonl:FILE`, `parquet:GLOB`,
            `coco:JSON,IMAGES`, `flickr30k:CAPTIONS,IMAGES`, `vqa:QUESTIONS,ANNOTATIONS,IMAGES`,
            `llava:JSON,IMAGES`, `visual_genome:JSON,IMAGES`, `imagenet:DIR` or `hf:NAME`; then
            `@split` (scenes, coco, flickr30k, imagenet, hf), then `?limit=1000&...`.
        split: read where the kind has splits and `spec` names none; other kinds are one split as they are.
        require_captions: leave samples without caption out; the source counts them in `num_without_caption`.
        limit: only the first so many samples; the smaller of this and the spec's own.
    Raises:
        ConfigError: an unknown kind or option, nothing there, or nothing readable in it.
    """
    parsed = _parse(spec, split, require_captions, limit)
    if parsed.kind not in KINDS:
        refuse_unknown_kind(spec, KINDS, kind=parsed.kind)
    source = _made(parsed)
    for option, given in ((CAPTIONS, parsed.keep.templates), (PART, parsed.keep.part)):
        if given and not isinstance(source, StoredSource):
            raise ConfigError(f"data {spec!r}: kind {parsed.kind} has no option {option}: leave it out")
    for message in source.warnings if isinstance(source, StoredSource) else ():
        warnings.warn(message, SourceWarning, stacklevel=2)
    return picked(source, parsed.pick)


def split_of(spec: str, *, default: str | None = None) -> str | None:
    """The split that `spec` names, else `default`; None where its kind has none."""
    parsed = _parse(spec, default, False, None)
    kind, _, named = parsed.rest.rpartition(":") if parsed.kind == "hf" else ("", "", "")
    if parsed.split is None and kind:  # hf:NAME:SPLIT
        return named
    return (parsed.split or default) if _may_have_splits(parsed.kind) else None


def same_reading(before: str, now: str) -> bool:
    """Whether two names of sources differ at most in where files are: kind, split and what is read of them agree.

    A fingerprint alone does not tell: a table's covers the file's bytes, and not which of its columns are read.

    Raises:
        ConfigError: a name cannot be taken apart.
    """
    first, second = (_parse(text, None, False, None) for text in (before, now))
    if not first.pick.like(second.pick):
        return False
    for name in COPIES:  # where copies of remote shards are kept; what is counted by what, the fingerprint tells
        first.take(name), second.take(name)
    if (first.kind, first.split, first.keep, {*first.options}) != (
        second.kind,
        second.split,
        second.keep,
        {*second.options},
    ):
        return False
    differ = [name for name, value in second.options.items() if first.options[name] != value]
    return all(name in PATH_OPTIONS and Path(second.options[name]).expanduser().exists() for name in differ)


def _made(spec: Spec) -> Source:
    """What the kind's function makes of the spec.

    Raises:
        ConfigError: a package's kind is no function, or makes no source.
    """
    make: Any = KINDS[spec.kind]
    source: Source = make(spec) if callable(make) else make
    if not all(hasattr(type(source), name) for name in ("__len__", "__getitem__", "captions", "fingerprint")):
        raise ConfigError(
            f"data kind {spec.kind!r} of {KINDS.origin(spec.kind)} gives {type(source).__name__}, which is no "
            "cmapkd.data.types.Source: repair or uninstall that package"
        )
    return source


def open_streams(
    train: str,
    more: Mapping[str, StreamConfig],
    *,
    require_captions: bool = False,
    held_out: int = 0,
    prompting: Prompting | None = None,
) -> Source:
    """What a run learns from: the training split of `train`, joined with the further sources where there are any.

    Args:
        held_out: how many of the last samples of `train` are left out.
        prompting: of a run that learns from dialogues; samples without a question in its share are left out.
    Raises:
        ConfigError: a source cannot be opened, or they do not go together; see `JoinedSource`.
    """
    main = _of_role("data.train", train, require_captions)
    if held_out:
        main = PartOfSource(main, 0, len(main) - held_out)
    main = asked(main, prompting)
    if not more:
        return main
    sources = {MAIN_STREAM: main}
    for name, stream in more.items():
        opened = _of_role(f"data.more.{name}", stream.source, require_captions and stream.captions == "read")
        sources[name] = asked(opened, prompting, stream=name)
    hidden = [name for name, stream in more.items() if stream.labels == "hidden"]
    silent = [name for name, stream in more.items() if stream.captions == "none"]
    return JoinedSource(sources, {name: stream.share for name, stream in more.items()}, hidden, silent)


def _of_role(key: str, spec: str, require_captions: bool) -> Source:
    """A training source; what is wrong with it bears the name of its setting."""
    try:
        return open_source(spec, split="train", require_captions=require_captions)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def _parse(text: str, split: str | None, require_captions: bool, limit: int | None) -> Spec:
    name, options = text.strip(), {}
    found = _OPTIONS.search(name)
    if found:
        name = name[: found.start()]
        for pair in found[1].split("&"):
            key, _, value = pair.partition("=")
            if key in options:
                raise ConfigError(f"data {text!r} sets {key} twice")
            options[key] = value
    kind, _, rest = name.partition(":")
    own_split = None
    if _may_have_splits(kind.partition("@")[0]) and (at := _SPLIT.search(name)):
        kind, _, rest = name[: at.start()].partition(":")
        own_split = at[1]
        if not own_split:
            raise ConfigError(f"data {text!r} names no split after '@'")
    spec = Spec(text, kind, rest, own_split, split, SampleFilter(require_captions, limit), options)
    spec.pick = spec.take_pick()
    if kind != "scenes":
        limits = [number for number in (spec.take_int("limit"), limit) if number is not None]
        spec.keep = SampleFilter(require_captions, min(limits, default=None), spec.take_templates(), spec.take_part())
    return spec


def _may_have_splits(kind: str) -> bool:
    return kind in SPLIT_KINDS or (kind in KINDS and kind not in KINDS.own)


def _open_scenes(spec: Spec) -> Source:
    from cmapkd.data.scenes.source import ScenesSource

    options: dict[str, Any] = {"difficulty": spec.rest} if spec.rest else {}
    length = spec.take_int("length")
    limits = [number for number in (length, spec.take_int("limit"), spec.keep.limit) if number is not None]
    if limits:
        options["length"] = min(limits)
    words = ("language", "label", "descriptions")
    given: dict[str, Any] = {name: spec.take_int(name) for name in ("size", "start")}
    given |= {"wrong": spec.take_float("wrong"), **{name: spec.take(name) for name in words}}
    options |= {name: value for name, value in given.items() if value is not None}
    spec.refuse_leftovers(("size", "length", "start", "limit", "wrong", *words))
    try:
        return ScenesSource(split=spec.split or spec.default_split or "train", **options)
    except ValueError as error:
        raise ConfigError(f"data {spec.text!r}: {error}") from None


def _open_shards(spec: Spec) -> Source:
    from cmapkd.data.shards import ShardSource

    pattern = spec.need_rest("webdataset:folder/train-*.tar or webdataset:folder/train-{000000..000012}.tar")
    classes, texts = spec.take("classes"), spec.take_texts()
    disk, copies, counts = spec.take_float("disk"), spec.take("copies"), spec.take("counts")
    if counts not in (None, "stats", "index") and ("/" in str(counts) or not str(counts).endswith(".json")):
        raise ConfigError(
            f"data {spec.text!r}: counts must be index, stats, or the name of a table beside the shards such as "
            f"sizes.json, got {counts!r}"
        )
    spec.refuse_leftovers(("classes", "limit", TEXTS, *COPIES))
    names = read_classes(classes).names if classes else None
    folder = None if copies is None else Path(copies).expanduser()
    return ShardSource(pattern, keep=spec.keep, classes=names, texts=texts, copies=folder, disk=disk, counts=counts)


def _open_folder(spec: Spec) -> Source:
    from cmapkd.data.folders import METADATA_FILE, FolderSource, open_images
    from cmapkd.data.rows import Columns
    from cmapkd.data.tables import open_jsonl

    name = spec.need_rest("folder:train or folder:train.zip")
    classes, texts = spec.take("classes"), spec.take_texts()
    spec.refuse_leftovers(("classes", "limit", TEXTS))
    images = open_images(name, "folder:")
    metadata = images.path / METADATA_FILE
    if images.path.is_dir() and metadata.is_file():
        named = read_classes(classes) if classes not in (None, "none") else None
        columns = Columns(texts=texts)
        return open_jsonl(
            metadata, keep=spec.keep, columns=columns, images=images, classes=named, name=f"folder:{name}"
        )
    return FolderSource(name, keep=spec.keep, classes=classes, texts=texts)


def _open_csv(spec: Spec) -> Source:
    from cmapkd.data.records import CAPTION_KEYS, IMAGE_KEYS
    from cmapkd.data.rows import Columns
    from cmapkd.data.sniff import SEPARATORS, check_encoding
    from cmapkd.data.tables import open_csv

    path = existing_file(spec.need_rest("csv:train.csv"), "csv")
    image, caption = spec.take("csv_img_key"), spec.take("csv_caption_key")
    separator, quotes, images, classes = (spec.take(name) for name in ("separator", "quotes", "images", "classes"))
    texts, encoding = spec.take_texts(), spec.take("encoding")
    known = ("csv_img_key", "csv_caption_key", "separator", "encoding", "quotes", "images", "classes", "limit", TEXTS)
    spec.refuse_leftovers(known)
    separator = {**SEPARATORS, "\\t": "\t"}.get(separator, separator) if separator else None
    if separator is not None and len(separator) != 1:
        raise ConfigError(f"data {spec.text!r}: separator must be one character, or one of {', '.join(SEPARATORS)}")
    if quotes not in (None, "yes", "no"):
        raise ConfigError(f"data {spec.text!r}: quotes must be yes or no, got {quotes!r}")
    return open_csv(
        path,
        keep=spec.keep,
        separator=separator,
        encoding=check_encoding(encoding) if encoding else None,
        columns=Columns(
            (image,) if image else ("filepath", *IMAGE_KEYS),
            (caption,) if caption else ("title", *CAPTION_KEYS),
            required=tuple(name for name in (image, caption, *texts) if name),
            texts=texts,
        ),
        quotes=quotes != "no",
        images=existing_folder(images, "images") if images else None,
        classes=read_classes(classes) if classes else None,
    )


def _open_jsonl(spec: Spec) -> Source:
    from cmapkd.data.reading import Folder
    from cmapkd.data.tables import open_jsonl

    path = existing_file(spec.need_rest("jsonl:train.jsonl"), "jsonl")
    columns, images, classes = _columns(spec), spec.take("images"), spec.take("classes")
    spec.refuse_leftovers((*COLUMN_OPTIONS, "images", "classes", "limit", TEXTS))
    folder = Folder(existing_folder(images, "images"), strict=False) if images else None
    named = read_classes(classes) if classes else None
    return open_jsonl(path, keep=spec.keep, columns=columns, images=folder, classes=named)


def _open_coco(spec: Spec) -> Source:
    from cmapkd.data.coco import open_coco

    rest = spec.need_rest("coco:captions.json,images or coco:dataset_coco.json,images@test")
    spec.refuse_leftovers(("limit",))
    split = spec.split or spec.default_split
    return open_coco(rest, split=split, keep=spec.keep, split_is_own=spec.split is not None)


def _open_vqa(spec: Spec) -> Source:
    from cmapkd.data.vqa import EXAMPLE, open_vqa

    rest = spec.need_rest(EXAMPLE)
    spec.refuse_leftovers(("limit",))
    return open_vqa(rest, keep=spec.keep)


def _open_llava(spec: Spec) -> Source:
    from cmapkd.data.llava import EXAMPLE, open_llava

    rest = spec.need_rest(EXAMPLE)
    spec.refuse_leftovers(("limit",))
    return open_llava(rest, keep=spec.keep)


def _open_flickr(spec: Spec) -> Source:
    from cmapkd.data.flickr import open_flickr

    rest, split_file = spec.need_rest("flickr30k:dataset_flickr30k.json,images@test"), spec.take("split_file")
    spec.refuse_leftovers(("split_file", "limit"))
    split = spec.split or spec.default_split
    return open_flickr(rest, split=split, split_is_own=spec.split is not None, split_file=split_file, keep=spec.keep)


def _open_visual_genome(spec: Spec) -> Source:
    from cmapkd.data.visual_genome import EXAMPLE, open_visual_genome

    rest = spec.need_rest(EXAMPLE)
    spec.refuse_leftovers(("limit",))
    return open_visual_genome(rest, keep=spec.keep)


def _open_imagenet(spec: Spec) -> Source:
    from cmapkd.data.imagenet import open_imagenet

    rest, classes = spec.need_rest("imagenet:FOLDER@val or imagenet:FOLDER/val"), spec.take("classes") or "all"
    spec.refuse_leftovers(("classes", "limit"))
    if classes not in ("all", "present"):
        raise ConfigError(f"data {spec.text!r}: classes must be all (1,000 of them) or present, got {classes!r}")
    which: Literal["all", "present"] = "present" if classes == "present" else "all"
    split = spec.split or spec.default_split
    return open_imagenet(rest, split=split, split_is_own=spec.split is not None, classes=which, keep=spec.keep)


def _open_parquet(spec: Spec) -> Source:
    from cmapkd.data.hub import open_parquet

    pattern, columns = spec.need_rest("parquet:train-*.parquet"), _columns(spec)
    spec.refuse_leftovers((*COLUMN_OPTIONS, "limit", TEXTS))
    return open_parquet(pattern, columns=columns, keep=spec.keep)


def _open_hub(spec: Spec) -> Source:
    from cmapkd.data.hub import open_hub

    name, columns = spec.need_rest("hf:user/name, hf:user/name:train or hf:FOLDER@train"), _columns(spec)
    config, revision = spec.take("config"), spec.take("revision")
    spec.refuse_leftovers((*COLUMN_OPTIONS, "config", "revision", "limit", TEXTS))
    split = spec.split
    if split is None and ":" in name:
        name, _, split = name.rpartition(":")
    split = split or spec.default_split
    return open_hub(name, split=split, config=config, revision=revision, columns=columns, keep=spec.keep)


def _columns(spec: Spec) -> Columns:
    """Columns by the names that the user gave, or by the usual ones."""
    from cmapkd.data.rows import Columns

    named = {role: (name,) for role in COLUMN_OPTIONS if (name := spec.take(role))}
    texts = spec.take_texts()
    required = (*(name for names in named.values() for name in names), *texts)
    return Columns(**named, required=required, texts=texts)


Opener = Callable[[Spec], Source]
"""Takes the options it knows off the spec (`Spec.take`), refuses others (`Spec.refuse_leftovers`), opens the source."""

KINDS: Registry[Opener] = Registry(
    "cmapkd.sources",
    {
        "scenes": _open_scenes,
        "webdataset": _open_shards,
        "folder": _open_folder,
        "csv": _open_csv,
        "jsonl": _open_jsonl,
        "parquet": _open_parquet,
        "coco": _open_coco,
        "flickr30k": _open_flickr,
        "vqa": _open_vqa,
        "llava": _open_llava,
        "visual_genome": _open_visual_genome,
        "imagenet": _open_imagenet,
        "hf": _open_hub,
    },
)

SPLIT_KINDS = ("scenes", "coco", "flickr30k", "imagenet", "hf")  # those of other packages may have splits too
PATH_OPTIONS = ("images", "classes", "split_file")  # whose values are files or folders, where they are no words
COPIES = ("disk", "copies", "counts")  # of remote shards
COLUMN_OPTIONS = ("image", "caption", "id", "label")
