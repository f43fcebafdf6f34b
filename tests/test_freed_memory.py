"""What is freed stays with the process: the kernel maps no page twice."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

import pytest

from cmapkd.freed_memory import keep_freed_memory

BLOCKS = """
import resource, sys
from cmapkd.freed_memory import keep_freed_memory
told = sys.argv[1] == "told" and keep_freed_memory()
def work():
    for _ in range(10):
        bytearray(b"1") * (64 << 20)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(told, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
glibc = pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="only glibc is told")


def faults(word: str, chosen: Mapping[str, str] = {}) -> tuple[str, int]:
    """Whether glibc was told, and the pages that were mapped anew."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", BLOCKS, word], env={**kept, **chosen}, check=True, capture_output=True, text=True
    )
    told, pages = done.stdout.split()
    return told, int(pages)


@glibc
def test_blocks_are_mapped_once() -> None:
    told, pages = faults("told")
    assert told == "True"
    assert 10 * pages < faults("untold")[1]  # their number depends on the system's page size


@glibc
@pytest.mark.parametrize("chosen", [{"MALLOC_ARENA_MAX": "4"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}])
def test_who_chose_is_left_alone(chosen: dict[str, str]) -> None:
    told, pages = faults("told", chosen)
    assert told == "False"
    assert 2 * pages > faults("untold")[1]


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_are_told_nothing(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    assert keep_freed_memory() is False
