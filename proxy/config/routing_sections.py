"""The sections that decide the target of a session: aliases, the shard key, shard maps.

For: the form of `[databases]`, `[routing]` and `[shard_maps.NAME]`. Not for: what a key or bound
means, or whether mappings overlap; `proxy.routing` decides that, and gets the entries as text.

Invariant: an entry has the columns of its map's kind, each as text, exactly as it was written.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar, Final, Self, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from proxy.config.validators import (
    FileName,
    Section,
    check_alias,
    check_database_pattern,
    check_name,
    check_no_nul,
    check_parameter,
    or_empty,
)
from proxy.routing.keys import KeyType, Normalise
from proxy.routing.shard_map import Kind, MapSpec

T = TypeVar("T")

# Enough for maps that are written by hand. A million mappings in a settings file need minutes and
# gigabytes, in a CSV file seconds.
MAPPINGS_MAX: Final = 10_000

# How many invalid mappings an error names; they are enough to see the cause.
_MAPPINGS_SHOWN_MAX: Final = 10


def _as_text(value: object) -> str:
    """Return the text of a bound or key, which TOML has as text or integer."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError("must be a string or an integer")
    return str(value)


Bound = Annotated[str, BeforeValidator(_as_text), AfterValidator(check_no_nul)]


@dataclass(frozen=True, slots=True)
class MappingEntry:
    """One row of a static map: a key of a list, or the bounds of a range; None is open."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    target: Annotated[str, AfterValidator(check_name)]
    low: Bound | None = None
    high: Bound | None = None
    key: Bound | None = None

    def columns(self) -> dict[str, str]:
        """Return the columns that were written, with their text."""
        columns = {"key": self.key, "low": self.low, "high": self.high, "target": self.target}
        return {name: text for name, text in columns.items() if text is not None}


class DatabaseAlias(Section):
    """A name that clients use as a database: it stands for a target, and a database there."""

    target: Annotated[str, AfterValidator(check_name)] = Field(
        description='NAME of a [targets.NAME], or "upstream" for [upstream].'
    )
    database: Annotated[str, or_empty(check_alias)] = Field(
        default="", description="Database to open there. Empty: that of the target."
    )

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: object) -> object:
        """Accept `orders = "eu"` for `orders = { target = "eu" }`."""
        return {"target": value} if isinstance(value, str) else value


class RoutingSettings(Section):
    """How the shard key of a session is found. Without a shard map it is not looked for."""

    shard_map: Annotated[str, or_empty(check_name)] = Field(
        default="",
        description="NAME of the [shard_maps.NAME] that this process routes by. Empty: none.",
    )
    parameter: Annotated[str, AfterValidator(check_parameter)] = Field(
        default="shard_key",
        description="Startup parameter with the shard key, alone or inside options (-c "
        "shard_key=42). lakebase.shard_key is always read as well.",
    )
    database_pattern: Annotated[str, AfterValidator(check_database_pattern)] = Field(
        default="{database}@{shard_key}",
        description="How a database name contains the shard key, for tools that can set nothing "
        "else. The name is split at the first separator; {database} is a label and may be left "
        "out, as in tenant_{shard_key}.",
    )
    require_key: bool = Field(
        default=False,
        description="Refuses a session without a shard key, with 22023; false sends it to "
        "[upstream]. If it is not set, it is true if shard_map is set.",
    )
    forward_key: bool = Field(
        default=False,
        description="Forwards the shard key as the setting lakebase.shard_key, for row-level "
        "security. The client can change it with SET: it is no security boundary.",
    )

    @model_validator(mode="before")
    @classmethod
    def _required_with_a_map(cls, value: object) -> object:
        if isinstance(value, dict):
            return {"require_key": bool(value.get("shard_map")), **value}
        return value


class ShardMapSettings(Section):
    """A shard map: which shard keys are in which target, or that the catalogue says so."""

    catalogue: bool = Field(
        default=False,
        description="The map of this name in the catalogue ([catalogue]), instead of mappings. It "
        "says kind, key_type and normalise itself; where they are set here, they must agree.",
    )
    kind: Kind | None = Field(
        default=None,
        description="list: single keys; range: low to below high; hash: ranges of the key's hash.",
    )
    key_type: KeyType | None = Field(
        default=None, description="Type of the shard key, named as in PostgreSQL."
    )
    normalise: Normalise | None = Field(
        default=None,
        description="How a key of type text is normalised before it is looked up. If it is not "
        "set, it is none.",
    )
    mappings: tuple[MappingEntry, ...] = Field(
        default=(),
        description="The entries: { key, target } of a list, { low, high, target } else, where an "
        "absent bound is open. Keys and bounds are strings or integers. For maps written by hand: "
        f"{MAPPINGS_MAX} at most.",
    )
    mappings_file: FileName = Field(
        default="",
        description="CSV file with the same columns, instead of mappings.",
    )

    @property
    def spec(self) -> MapSpec:
        """The fixed properties of a static map, as `proxy.routing` takes them."""
        assert self.kind is not None, "a static map has a kind"
        assert self.key_type is not None, "a static map has a key type"
        return MapSpec(self.kind, self.key_type, self.normalise or Normalise.NONE)

    def differing(self, found: MapSpec) -> dict[str, str]:
        """Return the keys that are set and differ from the map in the catalogue, with its value."""
        return {
            key: value
            for key, value in asdict(found).items()
            if getattr(self, key) is not None and getattr(self, key) != value
        }

    @field_validator("kind", "key_type")
    @classmethod
    def _required_without_a_catalogue(cls, value: T, info: ValidationInfo) -> T:
        if value is None and info.data.get("catalogue") is False:
            raise PydanticCustomError("missing", "required")
        return value

    @field_validator("normalise")
    @classmethod
    def _only_text(cls, value: Normalise | None, info: ValidationInfo) -> Normalise | None:
        normalises = value not in (None, Normalise.NONE)
        if normalises and info.data.get("key_type") not in (None, KeyType.TEXT):
            raise ValueError("must be none unless key_type is text")
        # In the catalogue the map may have another: there, what is not set agrees with any.
        return value or (None if info.data.get("catalogue") else Normalise.NONE)

    @field_validator("mappings", "mappings_file")
    @classmethod
    def _none_with_a_catalogue(cls, value: T, info: ValidationInfo) -> T:
        if value and info.data.get("catalogue"):
            raise ValueError("must not be set together with catalogue: the mappings are there")
        return value

    @field_validator("mappings")
    @classmethod
    def _not_too_many(cls, value: tuple[MappingEntry, ...]) -> tuple[MappingEntry, ...]:
        if len(value) > MAPPINGS_MAX:
            raise ValueError(
                f"has {len(value)} entries, and {MAPPINGS_MAX} are allowed: write them to a CSV"
                " file and name it in mappings_file"
            )
        return value

    @field_validator("mappings")
    @classmethod
    def _columns_of_kind(
        cls, value: tuple[MappingEntry, ...], info: ValidationInfo
    ) -> tuple[MappingEntry, ...]:
        kind: Kind | None = info.data.get("kind")
        if kind is None:  # it is invalid itself
            return value
        if kind is Kind.LIST:
            wrong = [n for n, row in enumerate(value) if row.key is None or _bounded(row)]
            columns = "key and target"
        else:
            wrong = [n for n, row in enumerate(value) if row.key is not None]
            columns = "low, high and target"
        if wrong:
            raise ValueError(f"a {kind} has the columns {columns}: see {_numbers_shown(wrong)}")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if not self.catalogue and bool(self.mappings) == bool(self.mappings_file):
            raise ValueError(
                "needs entries, either in mappings or in mappings_file; or catalogue = true"
            )
        return self


def _bounded(row: MappingEntry) -> bool:
    return row.low is not None or row.high is not None


def _numbers_shown(numbers: Sequence[int]) -> str:
    """Return the first of these mappings in words, counted from 1."""
    shown = ", ".join(str(number + 1) for number in numbers[:_MAPPINGS_SHOWN_MAX])
    more = len(numbers) - _MAPPINGS_SHOWN_MAX
    return f"mapping {shown}" + (f" and {more} more" if more > 0 else "")
