"""The teacher's answers on disk: built once, checked, and read in place of the teacher."""

from cmapkd.cache.config import DEFAULT_VIEWS, CacheConfig
from cmapkd.cache.coverage import all_keys, keys_of_run
from cmapkd.cache.files import CacheError
from cmapkd.cache.folder import CacheFolder
from cmapkd.cache.prepare import CachePlan
from cmapkd.cache.reader import CacheReader
from cmapkd.cache.teacher import CachedTeacher, CacheWarning
from cmapkd.cache.verify import describe, verify
from cmapkd.cache.wanted import Wanted

__all__ = [
    "DEFAULT_VIEWS",
    "CacheConfig",
    "CacheError",
    "CacheFolder",
    "CachePlan",
    "CacheReader",
    "CacheWarning",
    "CachedTeacher",
    "Wanted",
    "all_keys",
    "describe",
    "keys_of_run",
    "verify",
]
