"""What differs between two configurations, and what of it needs a restart.

For: a reload that says what it changed, be it a value or the contents of a file that a setting
names. Not for: what a file says: a `mappings_file` is read, and its key added, by whoever uses it.

Invariant: names of keys only, never a value, which may be a secret.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from proxy.config.effective import effective_values
from proxy.config.setting_keys import KeyPath
from proxy.config.settings import Settings
from proxy.config.toml import toml_path
from proxy.config.upstream_sections import SYSTEM_AUTHORITIES
from proxy.file_stamp import Stamp, stamp_of

# Sockets and the log's form are made once, when the process starts.
_RESTART_SECTIONS: Final = ("listen", "admin")
_RESTART_KEYS: Final = (("log", "format"),)
_RELOADABLE_KEYS: Final = (("listen", "tls_certificate"), ("listen", "tls_key"))

# Keys whose value is the name of a file. The files that the SDK reads are its own affair.
_FILES: Final = (
    *("tls_certificate", "tls_key", "client_secret_file", "password_file", "ssl_root_cert"),
)


@dataclass(frozen=True, slots=True)
class Changes:
    """Dotted keys, sorted. One that is a whole table, as `targets.eu`, came or went."""

    reloadable: tuple[str, ...]
    restart: tuple[str, ...]

    def with_contents(self, keys: Iterable[str]) -> "Changes":
        """Return these, and keys that name the same file as before, which holds something else."""
        contents = {f"{key} (contents)" for key in keys}
        return replace(self, reloadable=tuple(sorted({*self.reloadable, *contents})))


@dataclass(frozen=True, slots=True)
class Files:
    """The files that settings name, as they are at one moment, by the key that names each."""

    stamps: Mapping[tuple[KeyPath, str], Stamp]

    @classmethod
    def of(cls, settings: Settings) -> "Files":
        """Return the files of these settings that are there."""
        stamps = {}
        for path, file in _named_files(settings):
            with suppress(OSError):  # whoever reads it says what is wrong
                stamps[path, file] = stamp_of(file)
        return cls(stamps)

    def rewritten(self, later: "Files") -> Iterator[str]:
        """Yield the keys whose file is another one later, under the same name."""
        for place, stamp in self.stamps.items():
            if later.stamps.get(place, stamp) != stamp:
                yield toml_path(place[0])


def _named_files(settings: Settings) -> Iterator[tuple[KeyPath, str]]:
    for path, value in effective_values(settings):
        if path[-1] in _FILES and isinstance(value, str) and value not in ("", SYSTEM_AUTHORITIES):
            yield path, value


def compare(old: Settings, new: Settings) -> Changes:
    """Return the keys whose effective values differ.

    A key of `[upstream]` that changes is therefore also one of each target that takes it from
    there.
    """
    before, after = dict(effective_values(old)), dict(effective_values(new))
    changed = {
        _key_or_table(path, old, new)
        for path in before.keys() | after.keys()
        if path not in before or path not in after or before[path] != after[path]
    }
    restart = {path for path in changed if _needs_restart(path)}
    return Changes(_dotted(changed - restart), _dotted(restart))


def _needs_restart(path: KeyPath) -> bool:
    if path in _RELOADABLE_KEYS:
        return False
    return path[0] in _RESTART_SECTIONS or path in _RESTART_KEYS


def _key_or_table(path: KeyPath, old: Settings, new: Settings) -> KeyPath:
    """Return the table alone that is in one of the two only."""
    section, name, *key = path
    both = key and name in getattr(old, section) and name in getattr(new, section)
    return path if both else (section, name)


def _dotted(paths: set[KeyPath]) -> tuple[str, ...]:
    return tuple(sorted(map(toml_path, paths)))
