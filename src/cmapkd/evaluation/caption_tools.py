"""The two Java programs of the COCO caption tool, as the package pycocoevalcap ships them: PTB tokeniser and METEOR."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from cmapkd.config import install_advice
from cmapkd.evaluation.tools import MissingToolError

TOKENISER = "tokenizer/stanford-corenlp-3.4.1.jar"
METEOR = "meteor/meteor-1.5.jar"

_ENGLISH = ("-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US")  # else numbers may have decimal commas


def library_folder() -> Path:
    """Where pycocoevalcap lies.

    Raises:
        MissingToolError: it is not installed.
    """
    found = importlib.util.find_spec("pycocoevalcap")
    if found is None or not found.submodule_search_locations:
        raise MissingToolError(
            f"caption metrics need the package pycocoevalcap: install the extra, {install_advice('captions')}"
        )
    return Path(next(iter(found.submodule_search_locations)))


def java() -> str:
    """The Java program.

    Raises:
        MissingToolError: there is none.
    """
    program = shutil.which("java")
    if program is None:
        raise MissingToolError(
            "the PTB tokeniser and METEOR are Java programs, and no java is on the PATH: install a Java runtime, "
            "version 8 or later (Debian and Ubuntu: apt-get install default-jre-headless)."
        )
    return program


def tokenise(captions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Captions in lower case, as Penn Treebank tokens without punctuation, joined by single blanks.

    Raises:
        MissingToolError: pycocoevalcap or Java is not installed.
        ValueError: a caption is no Unicode text.
        RuntimeError: the tokeniser failed.
    """
    folder = library_folder()
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    # one line each: Java breaks lines at more characters than "\n"
    lines = [" ".join(text.split()) for texts in captions.values() for text in texts]
    command = [java(), *_ENGLISH, "-cp", str(folder / TOKENISER)]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    try:
        given = "".join(line + "\n" for line in lines).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"a caption is no Unicode text: {error.object[max(0, error.start - 20) : error.end]!r}"
        ) from None
    done = subprocess.run(command, input=given, capture_output=True, check=False)
    found = done.stdout.decode().split("\n")[:-1]
    if done.returncode or len(found) != len(lines):
        said = done.stderr.decode(errors="replace").strip()[-500:]
        raise RuntimeError(
            f"the PTB tokeniser returned {len(found)} lines for {len(lines)} captions, exit status {done.returncode}. "
            f"It said: {said}"
        )
    tokens = iter([" ".join(word for word in line.split(" ") if word and word not in PUNCTUATIONS) for line in found])
    return {image: [next(tokens) for _ in texts] for image, texts in captions.items()}


def meteor(
    references: Mapping[str, Sequence[str]], predictions: Mapping[str, Sequence[str]]
) -> dict[str, tuple[float, list[float]]]:
    """METEOR 1.5 (English, normalised) of tokenised captions: over all images, and of each.

    Raises:
        MissingToolError: pycocoevalcap or Java is not installed.
        RuntimeError: the program failed.
    Source: Denkowski & Lavie 2014; driven by the line protocol of its `-stdio` mode.
    """
    program = library_folder() / METEOR
    command = [java(), *_ENGLISH, "-Xmx2G", "-jar", str(program), "-", "-", "-stdio", "-l", "en", "-norm"]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        asked, answered = process.stdin, process.stdout
        assert asked is not None
        assert answered is not None

        def ask(line: str) -> None:
            asked.write(line.encode() + b"\n")
            asked.flush()

        def answer() -> str:
            line = answered.readline().decode().strip()
            if not line:
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip()[-500:]
                raise RuntimeError(f"METEOR stopped without an answer. It said: {said}")
            return line

        statistics = []
        try:
            for image, given in references.items():
                ask(" ||| ".join(("SCORE", *map(_field, given), _field(predictions[image][0]))))
                statistics.append(answer())
            ask(" ||| ".join(("EVAL", *statistics)))
            by_image = [float(answer()) for _ in references]
            total = float(answer())
        except BrokenPipeError:
            answer()  # says why
            raise
        finally:
            with contextlib.suppress(BrokenPipeError):  # what it did not take
                asked.close()
            process.kill()
    return {"meteor": (total, by_image)}


def _field(text: str) -> str:
    """A caption that cannot be taken for the protocol's separator."""
    return " ".join(text.replace("|||", "").split())
