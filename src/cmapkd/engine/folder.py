"""The folder of an engine: shards that are whole or not there, a manifest of what made them, and the lists to read."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from cmapkd.cache.files import leftovers, temporary_folder
from cmapkd.config import ConfigError
from cmapkd.config.disk import flush, write_text, writing
from cmapkd.data.random import uniforms
from cmapkd.engine.candidates import NO_QUESTIONS, Candidate, boxed, elsewhere, kept, noted
from cmapkd.engine.config import WriteConfig

MANIFEST, KEPT, RANDOM, SHARDS = "manifest.json", "kept.jsonl", "random.jsonl", "shards"
AGAIN = "give the same command again"
_LINES, _RECORD, _PICTURES = "candidates.jsonl", "record.json", "pictures"
_OF_RELATION = ("candidates", "kept")
_IMAGE = re.compile(r"shards/\d{6,}/pictures/\d{9,}(-\d+)?\.png")


@dataclass(frozen=True)
class EngineFolder:
    """Where an engine writes. A shard is a folder that is renamed into place when all of it is on the disk.

    Args:
        seed: of the recipe, for what is drawn when it is written.
        each: so many candidates of a question the control has at most; None: any number.
    """

    path: Path
    write: WriteConfig
    seed: int
    each: int | None = None

    def begin(self) -> None:
        """Makes the folders, and removes what writers that died left."""
        with writing(self.path, again=AGAIN):
            self._shards.mkdir(parents=True, exist_ok=True)
        for left in [*leftovers(self._shards), *leftovers(self.path)]:
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)

    @property
    def _shards(self) -> Path:
        return self.path / SHARDS

    def shard(self, number: int) -> Path:
        return self._shards / f"{number:06d}"

    def has(self, number: int) -> bool:
        """Whether this shard is finished."""
        return (self.shard(number) / _RECORD).is_file()

    def has_any(self) -> bool:
        """Whether any shard is finished."""
        return any(self._shards.glob(f"*/{_RECORD}"))

    def finish_shard(
        self, number: int, candidates: Sequence[Candidate], *, samples: int, bad: Sequence[tuple[str, str]] = ()
    ) -> None:
        """Writes a shard; nothing where another process has finished it.

        Args:
            samples: that could be read.
            bad: ids and reasons of those that could not.
        Raises:
            DiskError: the disk refuses.
        """
        final = self.shard(number)
        folder = temporary_folder(final)
        with writing(self.path, again=AGAIN):
            shutil.rmtree(folder, ignore_errors=True)
            try:
                (folder / _PICTURES).mkdir(parents=True)
                lines = self._lines(candidates, folder / _PICTURES, final.relative_to(self.path))
                data = "".join(json.dumps(line, ensure_ascii=True) + "\n" for line in lines).encode()
                (folder / _LINES).write_bytes(data)
                record = {
                    "samples": samples,
                    "bad": [list(each) for each in bad],
                    "candidates": len(candidates),
                    "dropped": Counter(each.dropped for each in candidates if each.dropped),
                    "kept": len(kept(candidates)),
                    "relations": _by_relation(candidates),
                    "digest": _digest(data),
                    "pictures": {
                        file.name: _digest(file.read_bytes()) for file in sorted((folder / _PICTURES).iterdir())
                    },
                }
                (folder / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                for file in (
                    *(folder / _PICTURES).iterdir(),
                    folder / _PICTURES,
                    folder / _LINES,
                    folder / _RECORD,
                    folder,
                ):
                    flush(file)
                try:
                    folder.rename(final)
                except OSError:
                    if not self.has(number):  # else another process was faster
                        raise
                flush(self._shards)
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def _lines(self, candidates: Sequence[Candidate], pictures: Path, place: Path) -> Iterator[dict[str, Any]]:
        """Each candidate as JSON, with the picture of those that may be read later, which is written."""
        for each in candidates:
            line = each.plain()
            if each.dropped is None or (self.write.control and each.answer and each.dropped not in NO_QUESTIONS):
                picture, name = each.sample.image, f"{each.index:09d}.png"
                if self.write.picture == "boxed":
                    assert each.box is not None
                    box = each.box
                    if self.write.place == "random":
                        box = elsewhere(box, picture.size, self.seed, each.id)
                    picture, name = boxed(picture, box), f"{each.index:09d}-{each.number}.png"
                _save(picture, pictures / name)
                line["image"] = (place / _PICTURES / name).as_posix()
            yield line

    def record(self, number: int) -> dict[str, Any]:
        """The counts of a finished shard.

        Raises:
            ConfigError: it is damaged.
        """
        file = self.shard(number) / _RECORD
        try:
            record: Any = json.loads(file.read_text(encoding="utf-8"))
            good = isinstance(record["digest"], str) and isinstance(record["dropped"], dict)
            good = good and isinstance(record["pictures"], dict)
            good = good and all(type(each[key]) is int for each in record["relations"].values() for key in _OF_RELATION)
            good = good and all(type(record[key]) is int for key in ("samples", "candidates", "kept"))
            if good and isinstance(record["bad"], list):
                return dict(record)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        raise self._damaged(number, file)

    def candidates(self, number: int) -> Iterator[dict[str, Any]]:
        """The candidates of a finished shard, kept ones and others.

        Raises:
            ConfigError: they are not as they were written.
        """
        file = self.shard(number) / _LINES
        try:
            data = file.read_bytes()
        except OSError:
            raise self._damaged(number, file) from None
        if _digest(data) != self.record(number)["digest"]:
            raise self._damaged(number, file)
        try:
            lines = list(map(json.loads, data.splitlines()))
        except (ValueError, RecursionError):
            lines = [None]
        if not all(map(_is_candidate, lines)):
            raise self._damaged(number, file)
        yield from lines

    def check_pictures(self, number: int) -> None:
        """Raises ConfigError: a picture of a finished shard is gone, or is not as it was written."""
        written = self.record(number)["pictures"]
        named = {Path(each["image"]).name for each in self.candidates(number) if "image" in each}
        for name in sorted(named):
            file = self.shard(number) / _PICTURES / name
            try:
                good = _digest(file.read_bytes()) == written.get(name)
            except OSError:
                good = False
            if not good:
                raise self._damaged(number, file)

    def _damaged(self, number: int, file: Path) -> ConfigError:
        return ConfigError(f"{file} is damaged: remove the folder {self.shard(number)}, and {AGAIN}")

    def counts(self, shards: int) -> dict[str, Any]:
        """Of all shards together: samples, candidates, those that each filter dropped, and those that are kept.

        Candidates and kept ones are also counted by relation, where there are relations.
        """
        total, dropped = Counter[str](), Counter[str]()
        relations: dict[str, Counter[str]] = {}
        for record in map(self.record, range(shards)):
            total.update({key: record[key] for key in ("samples", "candidates", "kept")})
            total["bad"] += len(record["bad"])
            dropped.update(record["dropped"])
            for name, numbers in record["relations"].items():
                relations.setdefault(name, Counter()).update({key: numbers[key] for key in _OF_RELATION})
        read = {key: total[key] for key in ("samples", "bad", "candidates")}
        found = {**read, "dropped": dict(dropped), "kept": total["kept"]}
        return found | ({"relations": {name: dict(each) for name, each in relations.items()}} if relations else {})

    def join(self, shards: int) -> int:
        """Writes the lists of all shards: what is kept and, where the recipe says so, as many random candidates.

        Returns:
            How many are in each list.
        Raises:
            ConfigError: a shard is not as it was written.
        """
        for shard in range(shards):
            self.check_pictures(shard)
        keeps = {place for place, each in self._all(shards) if each["dropped"] is None}
        self._list(KEPT, shards, keeps)
        if self.write.control:
            self._list(RANDOM, shards, self._drawn(shards))
        return len(keeps)

    def _all(self, shards: int) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
        """The candidates of all shards, each with its shard and its line."""
        for shard in range(shards):
            for line, each in enumerate(self.candidates(shard)):
                yield (shard, line), each

    def _drawn(self, shards: int) -> set[tuple[int, int]]:
        """As many random candidates of each relation as are kept: filters differ in how hard they find relations.

        Where filters keep few candidates of a question, a few of each question are drawn before.
        """
        questions: dict[tuple[str, str], list[tuple[float, tuple[int, int], str | None]]] = {}
        number = Counter[str | None]()
        for place, each in self._all(shards):
            if "image" in each:
                draw = float(uniforms(1, "control", self.seed, each["id"])[0])
                asked = (each["sample"], each["id"] if self.each is None else each["question"])
                questions.setdefault(asked, []).append((draw, place, each.get("relation")))
                number[each.get("relation")] += each["dropped"] is None
        draws: dict[str | None, list[tuple[float, tuple[int, int]]]] = {}
        for asked, found in questions.items():
            for draw, place, relation in sorted(found)[: self.each]:
                again = draw if self.each is None else float(uniforms(1, "questions", self.seed, *asked, draw)[0])
                draws.setdefault(relation, []).append((again, place))
        return {place for relation, each in draws.items() for _, place in sorted(each)[: number[relation]]}

    def _list(self, name: str, shards: int, chosen: set[tuple[int, int]]) -> None:
        """Writes one list: a line for each picture with all its questions that are chosen."""
        temporary = temporary_folder(self.path / name)  # a file; the name says whose it is
        with writing(self.path, again=AGAIN):
            try:
                with temporary.open("wb") as file:
                    for shard in range(shards):
                        rows: dict[str, dict[str, Any]] = {}
                        for line, each in enumerate(self.candidates(shard)):
                            if (shard, line) in chosen:
                                own = each["id"] if self.write.picture == "boxed" else each["sample"]
                                row = rows.setdefault(own, {"id": own, "image": each["image"], "qa": []})
                                row["qa"] += self._asked(each)
                        file.writelines(json.dumps(row).encode() + b"\n" for row in rows.values())
                flush(temporary)
                temporary.replace(self.path / name)
                flush(self.path)
            finally:
                temporary.unlink(missing_ok=True)

    def _asked(self, candidate: Mapping[str, Any]) -> list[dict[str, str]]:
        question = noted(candidate["question"], self.write.note)
        asked = [{"question_id": candidate["id"], "question": question, "answer": candidate["answer"]}]
        if self.write.why and candidate.get("rationale"):
            why = {"question_id": f"{candidate['id']}/why", "question": f"{question}\n{self.write.why}"}
            asked.append({**why, "answer": candidate["rationale"]})
        return asked

    def write_manifest(self, values: Mapping[str, Any]) -> None:
        with writing(self.path, again=AGAIN):
            self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / MANIFEST, json.dumps(values, indent=2) + "\n", again=AGAIN)

    def manifest(self) -> dict[str, Any] | None:
        """What `write_manifest` wrote; None where nothing was begun.

        Raises:
            ConfigError: it is damaged, or the folder holds something else.
        """
        file = self.path / MANIFEST
        if not file.exists():
            if any(map(_is_foreign, self.path.iterdir() if self.path.exists() else ())):
                raise ConfigError(f"{self.path} is not empty and has no {MANIFEST}: name another folder")
            return None
        try:
            values: Any = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(values, dict) and isinstance(values.get("recipe"), dict):
                return values
        except (OSError, ValueError, RecursionError):
            pass
        raise ConfigError(f"{file} is damaged: restore it, or name another folder")


def _is_foreign(path: Path) -> bool:
    """Whether no engine that died at its start left this."""
    if path.name == SHARDS and path.is_dir():
        return any(map(_is_foreign, path.iterdir()))
    return not path.name.startswith(".")


def _by_relation(candidates: Sequence[Candidate]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for each in candidates:
        if each.relation is not None:
            numbers = found.setdefault(each.relation, dict.fromkeys(_OF_RELATION, 0))
            numbers["candidates"] += 1
            numbers["kept"] += each.dropped is None
    return found


def _is_candidate(line: Any) -> bool:
    """Whether this is a line that an engine writes: a folder may come from elsewhere, and name other files."""
    if not isinstance(line, dict) or not all(isinstance(line.get(key), str) for key in ("id", "sample", "question")):
        return False
    dropped = line.get("dropped", 0)  # a line without it is not ours; None: it is kept
    if "image" not in line:  # it is in no list
        return isinstance(dropped, str)
    named = isinstance(line["image"], str) and _IMAGE.fullmatch(line["image"])
    plain = all(isinstance(each, str | None) for each in (dropped, line.get("relation"), line.get("rationale")))
    return bool(named) and plain and isinstance(line.get("answer"), str)


def _save(picture: Image.Image, file: Path) -> None:
    if not file.exists():  # of several questions the first one wrote it
        picture.save(file, "PNG")


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
