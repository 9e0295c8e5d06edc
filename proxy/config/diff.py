"""The effective values of a configuration, and the keys in which two configurations differ.

For: reload, which logs what it changed and what needs a restart, and whether a file that a setting
names has new contents; `--print-config`, which prints the effective values. Not for: reading those
files. The caller adds the key of a `mappings_file`, because it has compared the mappings.

Invariants: two configurations with the same behaviour have equal effective values, however they
were given. A difference names keys only, never a value, because a value may be a secret.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from proxy.config.config_errors import Problem
from proxy.config.setting_keys import KeyPath, key_at, sections, settings_keys
from proxy.config.settings import Settings
from proxy.config.toml import toml_path
from proxy.config.upstream_sections import SYSTEM_AUTHORITIES
from proxy.file_stamp import Stamp, stamp_of

# A reload itself reads the others.
_READ_LATER: Final = ("client_secret_file", "password_file")


def effective_values(settings: Settings) -> Iterator[tuple[KeyPath, object]]:
    """Yield every key with its effective value, in the order of the model.

    A secret is a SecretStr, an alias a DatabaseAlias, a mapping a MappingEntry.
    """
    for section in Settings.model_fields:
        content = getattr(settings, section)
        if section in sections():
            for name, value in content:
                yield (section, name), value
        elif section == "databases":
            for alias, value in content.items():
                yield (section, alias), value
        else:
            for chosen in content:
                table = settings.target(chosen) if section == "targets" else content[chosen]
                for name, value in table:
                    yield (section, chosen, name), value


@dataclass(frozen=True, slots=True)
class Changes:
    """Dotted keys, sorted. A table that was added or removed is one key, as in `targets.eu`."""

    reloadable: tuple[str, ...]
    restart: tuple[str, ...]

    def with_contents(self, keys: Iterable[str]) -> "Changes":
        """Return these changes and the keys whose file has new contents under the same name."""
        contents = {f"{key} (contents)" for key in keys}
        return replace(self, reloadable=tuple(sorted({*self.reloadable, *contents})))


def compare(old: Settings, new: Settings) -> Changes:
    """Return the keys whose effective values differ.

    A changed key of `[upstream]` is therefore also a change of each target that inherits it.
    """
    before, after = dict(effective_values(old)), dict(effective_values(new))
    changed = {
        _key_or_table(path, old, new)
        for path in before.keys() | after.keys()
        if path not in before or path not in after or before[path] != after[path]
    }
    restart = {path for path in changed if (key := key_at(path)) and key.needs_restart}
    return Changes(_dotted(changed - restart), _dotted(restart))


def with_running_values(new: Settings, running: Settings) -> Settings:
    """Return the new settings, but with the running values of the keys that need a restart."""
    kept: dict[str, dict[str, object]] = defaultdict(dict)
    for key in settings_keys():
        if key.needs_restart:
            kept[key.section][key.name] = getattr(getattr(running, key.section), key.name)
    return new.model_copy(
        update={
            section: getattr(new, section).model_copy(update=values)
            for section, values in kept.items()
        }
    )


def _key_or_table(path: KeyPath, old: Settings, new: Settings) -> KeyPath:
    """Return the path of the key, or of its table if only one of the two has that."""
    section, name, *key = path
    both = key and name in getattr(old, section) and name in getattr(new, section)
    return path if both else (section, name)


def _dotted(paths: set[KeyPath]) -> tuple[str, ...]:
    return tuple(sorted(map(toml_path, paths)))


@dataclass(frozen=True, slots=True)
class Files:
    """The stamps of the watched files at one moment, by the key and the name of each file."""

    stamps: Mapping[tuple[KeyPath, str], Stamp]

    @classmethod
    def of(cls, settings: Settings) -> "Files":
        """Return the stamps of the watched files that exist."""
        stamps = {}
        for path, file in _watched_files(settings):
            with suppress(OSError):  # the code that reads the file reports it
                stamps[path, file] = stamp_of(file)
        return cls(stamps)

    def rewritten(self, later: "Files") -> Iterator[str]:
        """Yield the keys whose file has another stamp later, under the same name."""
        for place, stamp in self.stamps.items():
            if later.stamps.get(place, stamp) != stamp:
                yield toml_path(place[0])


def named_files(settings: Settings) -> list[str]:
    """Return the files that a reload reads again if their contents have changed."""
    maps = [one.mappings_file for one in settings.shard_maps.values() if one.mappings_file]
    return maps + [file for _, file in _watched_files(settings)]


def lost_secrets(settings: Settings) -> Iterator[Problem]:
    """Yield the files of secrets that are not there: they are only read for a later login."""
    for path, file in _watched_files(settings):
        if path[-1] in _READ_LATER and not Path(file).exists():
            yield Problem(toml_path(path), f"no such file: {file}")


def _watched_files(settings: Settings) -> Iterator[tuple[KeyPath, str]]:
    for path, value in effective_values(settings):
        key = key_at(path)
        if key is not None and key.is_watched_file:
            assert isinstance(value, str), "a file is named by a string"
            if value not in ("", SYSTEM_AUTHORITIES):
                yield path, value
