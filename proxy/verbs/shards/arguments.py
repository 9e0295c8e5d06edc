"""The arguments of `shards VERB`: the options of its verbs, and the names in them.

For: judging what needs no database. Not for: bounds and keys, whose meaning depends on the map.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Final
from uuid import UUID

from proxy.verbs import syntax as generic
from proxy.verbs.syntax import JSON, Option, Syntax, UsageError

_DRY_RUN: Final = Option("dry-run", "print what would change, and change nothing")
_SECTIONS: Final = ("catalogue", "targets", "upstream", "workspace", "workspaces", "routing")
# As the catalogue's columns have them.
_MAP_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,50}")
_SHARD_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,63}")

# As the catalogue's columns have it, of epochs and of versions.
_EPOCH_MAX: Final = (1 << 63) - 1

# What the options of all verbs mean, and the value of those that take one.
_OPTIONS: Final[Mapping[str, tuple[str, str]]] = {
    "all": ("all of them, not one shard or operation", ""),
    "auto": ("every mapping that has the same shard as its neighbour", ""),
    "copy": ("what copies the rows, for a shell", "COMMAND"),
    "copy-timeout-seconds": ("its time limit", "N"),
    "database": ("the shard's database", "NAME"),
    "drain-seconds": ("how long busy sessions may go on (60)", "N"),
    "endpoint": ("the shard's Autoscaling endpoint", "RESOURCE"),
    "expect": ("refuse if the epoch or version is another one", "N"),
    "expires-seconds": ("when the lock ends by itself (3600)", "N"),
    "file": ("a CSV file with the mappings", "FILE"),
    "force": ("do it without the token, or although the shard does not answer", ""),
    "from": ("where to read, or the first bound to show", "PLACE"),
    "host": ("the shard's host, else it is looked up", "HOST"),
    "instance": ("the shard's Provisioned instance", "NAME"),
    "key-type": ("int4, int8, text, uuid, ...", "TYPE"),
    "kind": ("list, range or hash", "KIND"),
    "label": ("why it is locked", "TEXT"),
    "limit": ("how many mappings to show", "N"),
    "locations": ("also list the shards' hosts", ""),
    "map": ("the map (routing.shard_map)", "NAME"),
    "new-identity": ("attach a copy of a shard as a shard of its own", ""),
    "normalise": ("how a text key is normalised", "FORM"),
    "offline": ("add it offline", ""),
    "port": ("the shard's port", "PORT"),
    "range": ("only these keys; may be given several times", "LOW HIGH"),
    "rename": ("its new name", "NAME"),
    "report": ("the report of verify that is repaired", "ID"),
    "sessions": ("what becomes of the sessions there: kill, drain or keep", "HOW"),
    "shard": ("the shard", "NAME"),
    "sql": ("print the statements for an administrator instead", ""),
    "to": ("the shard that gets them, or the last bound to show", "SHARD"),
    "token": ("the token of a lock", "TOKEN"),
    "without-copy": ("continue although the rows were copied otherwise", ""),
    "workspace": ("the workspace that the endpoint belongs to", "NAME"),
}


# What each verb does.
_SUMMARIES: Final[Mapping[str, str]] = {
    "init": "install the catalogue's schema",
    "upgrade": "migrate the schemas of the catalogue and of shards",
    "grant": "let a role read the catalogue, or open sessions on shards",
    "revoke": "take such rights from a role",
    "create": "create a map",
    "drop": "remove an empty map",
    "list": "list the maps",
    "show": "show a map: its shards and mappings",
    "add-shard": "add a database to a map as a shard",
    "alter-shard": "change where a shard is found, or its name",
    "remove-shard": "remove a shard that has no mappings",
    "sessions": "list the sessions of shards, or of keys",
    "add": "add a mapping, or those of a file",
    "delete": "remove a mapping",
    "offline": "take keys offline: sessions end, new ones wait",
    "online": "bring keys online again",
    "move": "move keys to another shard, with their rows",
    "reassign": "name another shard for keys; copy no row",
    "split": "split a mapping in two",
    "merge": "merge a mapping with its neighbour",
    "lock": "keep mappings from being changed without a token",
    "unlock": "remove such a lock",
    "lookup": "print where a key leads",
    "verify": "compare the catalogue with its shards",
    "repair": "make the catalogue and a shard agree again",
    "detach": "take a shard that is lost out of its map",
    "attach": "add a database that has a local map as a shard",
    "relocate": "say where a shard is now: another host, port or name",
    "ops": "list pending operations; complete or undo one",
}


def syntax(
    usage: str,
    words_min: int = 0,
    words_max: int = 0,
    *,
    options: Sequence[str] = (),
    switches: Sequence[str] = (),
    pairs: Sequence[str] = (),
    writes: bool = False,
) -> Syntax:
    """Return what a verb takes beside --map and --json; --dry-run if it `writes`."""
    named = [
        Option(name, *_OPTIONS[name], pair=name in pairs)
        for name in (*options, *switches, *pairs, "map")
    ]
    own = (*named, *([_DRY_RUN] if writes else []), JSON)
    summary = _SUMMARIES[usage.partition(" ")[0]]
    return Syntax(f"shards {usage}", summary, words_min, words_max, own, _SECTIONS)


class Arguments(generic.Arguments):
    """A verb's arguments, with the values that several verbs read."""

    __slots__ = ()

    @property
    def dry_run(self) -> bool:
        """Whether nothing is to be changed."""
        return self.has(_DRY_RUN)

    def shard(self) -> str | None:
        """Return the value of --shard. Raises UsageError for what is no name."""
        name = self.get("shard")
        return None if name is None else shard_name(name)

    def expect(self) -> int | None:
        """Return the value of --expect: an epoch or a version. Raises UsageError."""
        return self.number("expect", 1, _EPOCH_MAX)

    def token(self) -> UUID | None:
        """Return the value of --token. Raises UsageError for what is none."""
        text = self.get("token")
        try:
            return None if text is None else UUID(text)
        except ValueError:
            raise UsageError("--token is what lock has printed") from None


def map_name(text: str) -> str:
    """Return the name of a map. Raises UsageError."""
    if not _MAP_NAME.fullmatch(text):
        raise UsageError("a map's name is 1 to 50 letters, digits, underscores and hyphens")
    return text


def shard_name(text: str) -> str:
    """Return the name of a shard. Raises UsageError."""
    if not _SHARD_NAME.fullmatch(text):
        raise UsageError("a shard's name is 1 to 63 letters, digits, underscores and hyphens")
    return text


def one_of(what: str, text: str, known: Sequence[str]) -> str:
    """Return the text if it is one of these words. Raises UsageError."""
    if text not in known:
        raise UsageError(f"{what} is one of {', '.join(known)}")
    return text
