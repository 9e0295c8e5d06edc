"""What differs between two configurations, and what of it needs a restart.

For: a reload that says what it changed. Not for: the contents of files that a setting names (a
mappings_file, a secret, a certificate): under an unchanged name these are not seen here. Whoever
reads such a file adds its key.

Invariant: names of keys only, never a value, which may be a secret.
"""

from dataclasses import dataclass, replace
from typing import Final

from proxy.config.effective import effective_values
from proxy.config.keys import KeyPath
from proxy.config.settings import Settings
from proxy.config.toml import toml_path

# Sockets and the log's form are made once, when the process starts.
_RESTART_SECTIONS: Final = ("listen", "admin")
_RESTART_KEYS: Final = (("log", "format"),)


@dataclass(frozen=True, slots=True)
class Changes:
    """Dotted keys, sorted. One that is a whole table, as `targets.eu`, came or went."""

    reloadable: tuple[str, ...]
    restart: tuple[str, ...]

    def and_reloadable(self, key: str) -> "Changes":
        """Return these, and a key whose value is the same but means something else now."""
        return replace(self, reloadable=tuple(sorted({*self.reloadable, key})))


def compare(old: Settings, new: Settings) -> Changes:
    """Return the keys whose effective values differ.

    A key of `[upstream]` that changes is therefore also one of each target that takes it from
    there.
    """
    before, after = dict(effective_values(old)), dict(effective_values(new))
    changed = {
        _table_or_key(path, old, new)
        for path in before.keys() | after.keys()
        if path not in before or path not in after or before[path] != after[path]
    }
    restart = {path for path in changed if path[0] in _RESTART_SECTIONS or path in _RESTART_KEYS}
    return Changes(_spelled(changed - restart), _spelled(restart))


def _table_or_key(path: KeyPath, old: Settings, new: Settings) -> KeyPath:
    """Return the table alone that is in one of the two only."""
    section, name, *key = path
    both = key and name in getattr(old, section) and name in getattr(new, section)
    return path if both else (section, name)


def _spelled(paths: set[KeyPath]) -> tuple[str, ...]:
    return tuple(sorted(map(toml_path, paths)))
