"""A second language for the captions of scenes: other words for all words, in the opposite order."""

from __future__ import annotations

import re
from functools import lru_cache
from hashlib import blake2b

_TOKEN = re.compile(r"[\w-]+|[^\w\s]")
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def second_language(text: str) -> str:
    """The text word by word in invented words, last word first; as much is said, and no word is shared.

    An invented word is three syllables that a hash of the word chooses. Commas are words of their own: they part what
    belongs together in either order.
    """
    return " ".join(map(_invented, reversed(_TOKEN.findall(text.lower()))))


@lru_cache(maxsize=4096)
def _invented(word: str) -> str:
    if not word[0].isalnum():
        return word
    digest = blake2b(word.encode(), digest_size=6).digest()
    return "".join(_CONSONANTS[digest[n] % 14] + _VOWELS[digest[n + 1] % 5] for n in (0, 2, 4))
