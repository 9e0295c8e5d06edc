"""The section `[catalogue]`: the database that has the shard map, and how this proxy follows it.

For: the form of its keys. Not for: which map is in the catalogue (`routing_sections`), or what its
keys require of others (`cross_checks`).

Invariant: no value here decides where a token is sent, except `shard_hosts`, which restricts it.
"""

import warnings
from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, Field

from proxy.config.validators import (
    FileName,
    Section,
    check_address,
    check_host,
    check_name,
    join_list,
    or_empty,
)

Load = Literal["eager", "lazy"]
Feed = Literal["listen", "poll", "off"]

# Each is compared with every shard's host.
_SHARD_HOSTS_MAX: Final = 100
ANY_LABELS: Final = "*."
"""In front of a name in `shard_hosts`: one label or more."""


def _check_shard_hosts(value: str) -> str:
    patterns = [pattern.strip().lower() for pattern in value.split(",")]
    if len(patterns) > _SHARD_HOSTS_MAX:
        raise ValueError(f"must not be more than {_SHARD_HOSTS_MAX} names")
    for pattern in patterns:
        check_host(pattern.removeprefix(ANY_LABELS))
    return ",".join(patterns)


# `validate` is also the name of a method that pydantic has deprecated, and warns of. Nothing here
# calls it: each instance has its own value under that name.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", r'Field name "validate" in .* shadows', UserWarning)

    class CatalogueSettings(Section):
        """The database with the shard map, for a map that has catalogue = true."""

        target: Annotated[str, or_empty(check_name)] = Field(
            default="",
            description="NAME of the [targets.NAME] that has the catalogue, with the role that "
            'reads it, or "upstream" for [upstream].',
        )
        load: Load = Field(
            default="eager",
            description="eager: reads the whole map at the start. lazy: looks up each key when it "
            "is first used.",
        )
        validate: bool = Field(  # type: ignore[assignment]  # an instance's value, not a method
            default=True,
            description="Asks the shard, with each new session, whether it has the key. false "
            "needs allow_unvalidated: for a while after a change, sessions then reach the shard "
            "that had the key before.",
        )
        allow_unvalidated: bool = Field(
            default=False, description="Confirms that validate = false is intended."
        )
        feed: Feed = Field(
            default="listen",
            description="How the proxy learns of changes. listen: at once, on a connection that "
            "it keeps open, so the database does not scale to zero. poll: every poll_seconds. off: "
            "from shards that refuse a session, and from keys that are not known.",
        )
        poll_seconds: float = Field(
            default=30,
            ge=1,
            le=3600,
            description="Time between two comparisons of the map's version with the catalogue's, "
            "10 % more or less at random, in seconds.",
        )
        max_stale_seconds: float = Field(
            default=300,
            ge=0,
            le=86_400,
            description="With validate = false: how long the map is used while the catalogue "
            "cannot be reached, in seconds. A validated map is used without a limit.",
        )
        park_timeout_seconds: float = Field(
            default=10,
            ge=0,
            le=600,
            description="How long a client waits for a mapping that is offline, before it gets "
            "57P03, in seconds. 0: not at all.",
        )
        park_max: int = Field(
            default=0,
            ge=0,
            le=50_000,
            description="Number of clients that may wait so at a time; the next one gets 57P03 at "
            "once. At most half of listen.max_connections; 0: that half, or 100 if it is more.",
        )
        snapshot_file: FileName = Field(
            default="",
            description="File that the map is written to, so that the proxy can start while the "
            "catalogue cannot be reached. It contains shard keys, and no secret. Empty: none.",
        )
        shard_hosts: Annotated[str, BeforeValidator(join_list), or_empty(_check_shard_hosts)] = (
            Field(
                default="",
                description="Hosts that shards may have, as a list or with commas between them; "
                "*. in front of a name stands for one label or more. Tokens are sent to no other "
                "host. Empty: the host of the catalogue, and those that are equal to it after the "
                "first dot, if that is three labels or more.",
            )
        )
        shard_hostaddr: Annotated[str, or_empty(check_address)] = Field(
            default="",
            description="IP address to connect to instead of resolving the shards' hosts, as "
            "upstream.hostaddr.",
        )

        @property
        def shard_host_patterns(self) -> tuple[str, ...]:
            """The names of `shard_hosts`, in lower case."""
            return tuple(self.shard_hosts.split(",")) if self.shard_hosts else ()
