"""What one key requires of others: names that must exist, and what a verb that connects needs.

For: problems that no section can detect alone. Not for: the form of a value; the model checks it.

Invariant: it reads the merged raw values of the sources, any of which may be invalid. Therefore its
problems are reported together with those of the model.
"""

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from pydantic import TypeAdapter, ValidationError

from proxy.addresses import is_pooled_host
from proxy.config.config_errors import Problem
from proxy.config.server_sections import ListenSettings
from proxy.config.settings import UPSTREAM, upstream_is_target
from proxy.config.toml import toml_path
from proxy.config.upstream_sections import UpstreamSettings, with_inherited

Raw = Mapping[str, object]

_NAMES_SHOWN_MAX: Final = 20
# Reads a switch as the model does, for which "off" and 0 are false.
_SWITCH: Final = TypeAdapter(bool)
_NUMBER: Final = TypeAdapter(int)
_MAX_CONNECTIONS: Final = ListenSettings().max_connections
_UPSTREAM_DEFAULTS: Final = UpstreamSettings()
_POOLED_HOST_KEYS: Final = frozenset(("host", "pooled", "pool"))
_POOL_BOUND_KEYS: Final = frozenset(("pool_idle_max", "pool_size_max", "pool_spare_min"))


def _table(raw: Raw, name: str) -> Raw:
    found = raw.get(name)
    return found if isinstance(found, Mapping) else {}


def _tables(raw: Raw, section: str) -> Iterator[tuple[str, Raw]]:
    for name in _table(raw, section):
        yield name, _table(_table(raw, section), name)


# -- names ---------------------------------------------------------------------------------------


def unknown_references(raw: Raw) -> Iterator[Problem]:
    """Yield a problem for each name that does not exist, and for names that differ only in case."""
    for section in ("targets", "workspaces", "shard_maps"):
        yield from _same_but_for_case(section, _table(raw, section))
    targets = [*_table(raw, "targets"), UPSTREAM]
    yield from _unknown_names("target", targets, _named_targets(raw))
    yield from _unknown_names("workspace", _table(raw, "workspaces"), _named_workspaces(raw))
    chosen = _table(raw, "routing").get("shard_map")
    yield from _unknown_names(
        "shard map", _table(raw, "shard_maps"), [(("routing", "shard_map"), chosen)]
    )


def _same_but_for_case(section: str, names: Iterable[str]) -> Iterator[Problem]:
    """Yield a problem for names that differ only in case: a variable could mean either."""
    count = Counter(name.lower() for name in names)
    for name in names:
        if count[name.lower()] > 1:
            yield Problem(
                toml_path((section, name)),
                "another name differs only in case: a variable could mean either",
            )


def _named_targets(raw: Raw) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yield each place that names a target, and the name."""
    yield ("catalogue", "target"), _table(raw, "catalogue").get("target")
    for name, alias in _table(raw, "databases").items():
        if isinstance(alias, Mapping):
            yield ("databases", name, "target"), alias.get("target")
        else:
            yield ("databases", name), alias
    for name, shard_map in _tables(raw, "shard_maps"):
        entries = shard_map.get("mappings")
        for number, entry in enumerate(entries if isinstance(entries, list) else ()):
            if isinstance(entry, Mapping):
                yield ("shard_maps", name, "mappings", str(number), "target"), entry.get("target")


def _named_workspaces(raw: Raw) -> Iterator[tuple[tuple[str, ...], object]]:
    yield ("upstream", "workspace"), _table(raw, "upstream").get("workspace")
    for name, target in _tables(raw, "targets"):
        yield ("targets", name, "workspace"), target.get("workspace")


def _unknown_names(
    what: str, known: Iterable[str], named: Iterable[tuple[tuple[str, ...], object]]
) -> Iterator[Problem]:
    known = dict.fromkeys(known)
    shown = ", ".join(list(known)[:_NAMES_SHOWN_MAX]) or "none"
    for path, name in named:
        if name and isinstance(name, str) and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            yield Problem(
                toml_path(path), f"there is no {what} {name!r} (there is: {shown}){meant}"
            )


# -- the catalogue -------------------------------------------------------------------------------


def catalogue_conflicts(raw: Raw) -> Iterator[Problem]:
    """Yield what a map in the catalogue lacks, and what contradicts it or [catalogue]."""
    catalogue = _table(raw, "catalogue")
    maps = [name for name, one in _tables(raw, "shard_maps") if _as_switch(one.get("catalogue"))]
    if maps:
        yield from _not_for_a_catalogue(raw, maps[0])
    if _as_switch(catalogue.get("validate")) is False:
        if not _as_switch(catalogue.get("allow_unvalidated")):
            yield Problem(
                "catalogue.validate",
                "false needs catalogue.allow_unvalidated = true: for a while after a change of the"
                " map, sessions reach the shard that had the key before",
            )
        if catalogue.get("snapshot_file"):
            yield Problem(
                "catalogue.snapshot_file",
                "requires catalogue.validate: only the shards know whether an old map still holds",
            )
    park_max = _as_number(catalogue.get("park_max", 0))
    most = _as_number(_table(raw, "listen").get("max_connections", _MAX_CONNECTIONS))
    if park_max is not None and most is not None and park_max > most // 2:
        yield Problem(
            "catalogue.park_max",
            f"must be at most {most // 2}, half of listen.max_connections: clients that wait keep"
            " their connection slots",
        )


def _not_for_a_catalogue(raw: Raw, name: str) -> Iterator[Problem]:
    """Yield what is missing or must not be set if this map is in the catalogue."""
    target = _table(raw, "catalogue").get("target")
    where = f"shard_maps.{name}.catalogue"
    if not target:
        yield Problem(
            "catalogue.target", f"required with {where}: the target with the catalogue's database"
        )
    upstream = _table(raw, "upstream")
    for key in ("read_only", "pooled"):
        if _as_switch(upstream.get(key)):
            yield Problem(
                f"upstream.{key}",
                f"must not be set together with {where}: each session registers with its shard,"
                " which takes a direct host that can be written to",
            )
        own = _table(_table(raw, "targets"), str(target))
        if _as_switch(own.get(key)):
            yield Problem(
                toml_path(("targets", str(target), key)),
                "must not be set for the target of the catalogue: LISTEN needs the direct host of"
                " the primary",
            )


# -- pools ---------------------------------------------------------------------------------------


def pool_conflicts(raw: Raw) -> Iterator[Problem]:
    """Yield the settings of pools that contradict each other, or the host."""
    upstream = _table(raw, "upstream")
    yield from _pool_conflicts((UPSTREAM,), upstream, upstream)
    for name, own in _tables(raw, "targets"):
        # What a target only inherits is reported once, for [upstream].
        yield from _pool_conflicts(("targets", name), own, with_inherited(upstream, own))


def _pool_conflicts(section: tuple[str, ...], own: Raw, target: Raw) -> Iterator[Problem]:
    if own.keys() & _POOLED_HOST_KEYS and target.get("pool", "off") != "off":
        is_pooled = _as_switch(target.get("pooled")) or is_pooled_host(str(target.get("host", "")))
        if is_pooled:
            yield Problem(
                toml_path((*section, "pool")),
                "must be off with a pooled host, where a reset could reach another database"
                " session: use the direct host, or no pool",
            )
    if not own.keys() & _POOL_BOUND_KEYS:
        return
    idle_max, size_max, spare_min = (
        _as_number(target.get(key, getattr(_UPSTREAM_DEFAULTS, key)))
        for key in ("pool_idle_max", "pool_size_max", "pool_spare_min")
    )
    if spare_min is None:
        return
    spare_key = toml_path((*section, "pool_spare_min"))
    if idle_max is not None and spare_min > idle_max:
        yield Problem(spare_key, f"must be at most pool_idle_max, which is {idle_max}")
    if size_max and spare_min > size_max:
        yield Problem(spare_key, f"must be at most pool_size_max, which is {size_max}")


# -- workspaces ----------------------------------------------------------------------------------


def incomplete_workspaces(raw: Raw) -> Iterator[Problem]:
    """Yield what a named workspace lacks: it takes nothing from the environment."""
    for name, given in _tables(raw, "workspaces"):
        if given.get("profile"):
            continue
        if not given.get("host"):
            yield Problem(
                toml_path(("workspaces", name, "host")),
                "required, because a named workspace does not use DATABRICKS_HOST: set it, or"
                " profile",
            )
        secret = given.get("client_secret") or given.get("client_secret_file")
        if not (given.get("auth_type") or given.get("token") or secret):
            yield Problem(
                toml_path(("workspaces", name, "auth_type")),
                "required, because a named workspace does not use DATABRICKS_*: set"
                " client_id with client_secret or client_secret_file, or token, or profile, or"
                " auth_type with what it needs",
            )
        elif secret and not given.get("client_id") and not given.get("auth_type"):
            yield Problem(
                toml_path(("workspaces", name, "client_id")), "required with a client secret"
            )


# -- what a verb that connects needs --------------------------------------------------------------


def missing_to_dial(raw: Raw) -> Iterator[Problem]:
    """Yield what a verb that connects lacks, for every target that sessions can be sent to."""
    password = _table(raw, "credentials").get("password_file")
    upstream = _table(raw, "upstream")
    routing = _table(raw, "routing")
    if upstream_is_target(
        upstream,
        alone=not _table(raw, "targets"),
        keyless=bool(routing.get("shard_map")) and _as_switch(routing.get("require_key")) is False,
        named=(name for _, name in _named_targets(raw)),
    ):
        yield from _missing_for_target(("upstream",), upstream, password)
    for name, own in _tables(raw, "targets"):
        yield from _missing_for_target(("targets", name), with_inherited(upstream, own), password)


def _missing_for_target(
    section: tuple[str, ...], target: Raw, password: object
) -> Iterator[Problem]:
    def problem(key: str, text: str) -> Problem:
        return Problem(toml_path((*section, key)), text)

    # The guide's variables set [upstream]; targets only inherit them.
    or_variable = {"endpoint": ", or ENDPOINT_NAME,", "host": ", or PGHOST", "user": ", or PGUSER"}
    if section != ("upstream",):
        or_variable = {"endpoint": "", "host": "", "user": ", or upstream.user"}
    endpoint = target.get("endpoint") or target.get("instance")
    for key, host in (("read_only", "read-only host"), ("pooled", "pooled host")):
        if target.get("host") and _as_switch(target.get(key)):
            yield problem(
                key,
                f"must not be set together with host{or_variable['host']}, which is used as it"
                f" is: remove host, and the {host} is looked up; or set host to the {host}",
            )
    if _as_switch(target.get("pooled")) and not target.get("endpoint") and not target.get("host"):
        yield problem("pooled", "requires endpoint, whose pooled host is looked up")
    if not password:
        if not endpoint:
            yield problem(
                "endpoint",
                "required, because tokens are issued for an endpoint: set it"
                f"{or_variable['endpoint']} to projects/PROJECT/branches/BRANCH/endpoints/ENDPOINT"
                f" (or {toml_path(section)}.instance)",
            )
        return
    if not endpoint and not target.get("host"):
        yield problem("host", f"required without an endpoint: set it{or_variable['host']}")
    if not target.get("user"):
        yield problem(
            "user",
            "required with credentials.password_file, because no token provides the role: set it"
            f"{or_variable['user']}",
        )


def _as_switch(value: object) -> bool | None:
    """Return the value of a switch as the model reads it; None if the model refuses it."""
    try:
        return _SWITCH.validate_python(value)
    except ValidationError:
        return None


def _as_number(value: object) -> int | None:
    """Return a whole number as the model reads it; None if the model refuses it."""
    try:
        return None if isinstance(value, bool) else _NUMBER.validate_python(value)
    except ValidationError:
        return None
