"""Why a verb or an operation was refused: one closed list, one exception.

A `Reason` is a word and its SQLSTATE, both a contract; the sentence is not. Not for what a client
of the sidecar is told: that is `proxy.errors`. An error of asyncpg is translated here only.
"""

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final
from uuid import UUID

from proxy.errors import Disposition, ErrorKind, ProxyError


@dataclass(frozen=True, slots=True)
class ReasonRow:
    """A reason's word, and the SQLSTATE that goes with it."""

    word: str
    sqlstate: str


class Reason(Enum):
    """The closed list."""

    OVERLAP = ReasonRow("overlap", "23P01")
    EXISTS = ReasonRow("exists", "42710")
    UNKNOWN_MAP = ReasonRow("unknown_map", "42704")
    UNKNOWN_SHARD = ReasonRow("unknown_shard", "42704")
    UNKNOWN_MAPPING = ReasonRow("unknown_mapping", "42704")
    UNKNOWN_OPERATION = ReasonRow("unknown_operation", "42704")
    NOT_OFFLINE = ReasonRow("not_offline", "55006")
    SESSIONS_ALIVE = ReasonRow("sessions_alive", "55006")
    SHARD_OFFLINE = ReasonRow("shard_offline", "55006")
    PREPARED_TRANSACTIONS = ReasonRow("prepared_transactions", "55006")
    NOT_EMPTY = ReasonRow("not_empty", "2BP01")
    NOT_UNDOABLE = ReasonRow("not_undoable", "55006")
    REPORT_STALE = ReasonRow("report_stale", "22023")
    RANGE_NOT_IN_REPORT = ReasonRow("range_not_in_report", "22023")
    IDENTITY_EXISTS = ReasonRow("identity_exists", "42710")
    OPERATION_PENDING = ReasonRow("operation_pending", "55P03")
    LOCKED = ReasonRow("locked", "55P03")
    LOCK_NOT_OWNED = ReasonRow("lock_not_owned", "55P03")
    STALE_EPOCH = ReasonRow("stale_epoch", "40001")
    STALE_VERSION = ReasonRow("stale_version", "40001")
    MAPPING_NOT_FOUND = ReasonRow("mapping_not_found", "3D000")
    INVALID_BOUNDS = ReasonRow("invalid_bounds", "22023")
    NOT_INSIDE = ReasonRow("not_inside", "22023")
    NOT_ADJACENT = ReasonRow("not_adjacent", "22023")
    NO_SPLIT_OF_A_LIST = ReasonRow("no_split_of_a_list", "22023")
    SAME_SHARD = ReasonRow("same_shard", "22023")
    POOLER_HOST = ReasonRow("pooler_host", "22023")
    READ_ONLY_HOST = ReasonRow("read_only_host", "22023")
    CATALOGUE_IS_SHARD = ReasonRow("catalogue_is_shard", "55000")
    STORE_MISSING = ReasonRow("store_missing", "55000")
    STORE_VERSION = ReasonRow("store_version", "55000")
    WRONG_SHARD = ReasonRow("wrong_shard", "55000")
    SHARD_NOT_VALID = ReasonRow("shard_not_valid", "55000")
    RIGHTS_MISSING = ReasonRow("rights_missing", "42501")
    COPY_FAILED = ReasonRow("copy_failed", "58000")
    STEP_FAILED = ReasonRow("step_failed", "58000")


class CatalogueError(Exception):
    """Something that a verb or an operation was refused, or could not do.

    `op_id` is set where an operation is left pending; nothing is half done otherwise. `transient`
    says that the same call may succeed a moment later.
    """

    def __init__(
        self,
        reason: Reason | ReasonRow,
        message: str,
        hint: str = "",
        *,
        op_id: UUID | None = None,
        transient: bool = False,
    ) -> None:
        row = reason.value if isinstance(reason, Reason) else reason
        super().__init__(message)
        self.reason = row.word
        self.sqlstate = row.sqlstate
        self.message = message
        self.hint = hint
        self.op_id = op_id
        self.transient = transient

    def with_text(self, message: str, hint: str) -> "CatalogueError":
        """Return the same refusal in other words."""
        row = ReasonRow(self.reason, self.sqlstate)
        return CatalogueError(row, message, hint, op_id=self.op_id)


# What the same call may get past: connections that were lost or could not be made (class 08, the
# server's shutdown and start), deadlocks, serialization failures, a lock that was held for long.
_TRANSIENT: Final = re.compile("08...|57P0[123]|40P01|40001|55P03")
_RETRYABLE: Final = frozenset(
    {Disposition.RETRY, Disposition.RETRY_ONCE, Disposition.RECONNECT, Disposition.WAIT}
)
# Of what was asked for, and not of the database where that turned out.
_OF_THE_KEY: Final = frozenset(
    {
        ErrorKind.KEY_MISSING,
        ErrorKind.KEY_TOO_LONG,
        ErrorKind.KEY_SYNTAX,
        ErrorKind.KEY_RANGE,
        ErrorKind.KEY_INVALID,
        ErrorKind.MAPPING_NOT_FOUND,
    }
)
# An object of ours that is not there: the schema was not installed.
_NOT_INSTALLED: Final = frozenset({"3F000", "42P01", "42883"})
_NO_RIGHT: Final = "42501"


def driver_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """Return what asyncpg raises, the server's errors and its own, and `others`."""
    import asyncpg  # noqa: PLC0415 - a proxy without a catalogue does not load it

    # The internal one comes when a server ends a session between two of the driver's messages.
    own = asyncpg.InterfaceError, asyncpg.InternalClientError
    return asyncpg.PostgresError, *own, OSError, EOFError, *others


def translated(error: BaseException, where: str) -> CatalogueError:
    """Return what an error of asyncpg, or of the dialer, is called here.

    `where` is the database in words, such as "shard eu" or "the catalogue".
    """
    if isinstance(error, CatalogueError):
        return error
    if isinstance(error, ProxyError):
        answer = error.response()
        text = answer.message + (f": {error.detail}" if error.detail else "")
        if error.kind not in _OF_THE_KEY:
            text = f"{where}: {text}"
        row = ReasonRow(error.reason, answer.sqlstate)
        transient = error.kind.value.disposition in _RETRYABLE
        return CatalogueError(row, text, answer.text(b"H"), transient=transient)
    if sqlstate := getattr(error, "sqlstate", None):  # asyncpg.PostgresError has one
        return _of_server(error, str(sqlstate), where)
    row = ReasonRow("connection_lost", "08006")
    return CatalogueError(row, f"{where}: the connection was lost ({error})", transient=True)


def _of_server(error: BaseException, sqlstate: str, where: str) -> CatalogueError:
    text = f"{where}: {error}"
    hint = str(getattr(error, "hint", None) or "")
    if sqlstate in _NOT_INSTALLED:
        hint = (
            "Run `shards init` for the catalogue; `shards add-shard` installs what a shard needs."
        )
        return CatalogueError(ReasonRow(Reason.STORE_MISSING.value.word, "55000"), text, hint)
    if sqlstate == _NO_RIGHT:
        return CatalogueError(Reason.RIGHTS_MISSING, text, hint)
    transient = _TRANSIENT.fullmatch(sqlstate) is not None
    return CatalogueError(ReasonRow("server_error", sqlstate), text, hint, transient=transient)
