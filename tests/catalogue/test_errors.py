"""What verbs and operations are refused for, and what errors of databases are called."""

import asyncpg
import pytest

from proxy.catalogue.errors import CatalogueError, Reason, driver_errors, translated
from proxy.errors import ErrorKind, ProxyError


def server_error(sqlstate: str) -> asyncpg.PostgresError:
    return asyncpg.PostgresError.new({"C": sqlstate, "M": "the server's words"})


def test_every_word_is_one_reason_with_one_sqlstate() -> None:
    words = [reason.value.word for reason in Reason]
    assert len(set(words)) == len(words)
    assert all(len(reason.value.sqlstate) == 5 for reason in Reason)


@pytest.mark.parametrize(
    ("sqlstate", "reason", "transient"),
    [
        ("3F000", "store_missing", False),
        ("42P01", "store_missing", False),
        ("42501", "rights_missing", False),
        ("57P01", "server_error", True),
        ("08006", "server_error", True),
        ("40P01", "server_error", True),
        ("22023", "server_error", False),
    ],
)
def test_an_error_of_a_server_names_the_database(
    sqlstate: str, reason: str, transient: bool
) -> None:
    error = translated(server_error(sqlstate), "shard eu")
    assert (error.reason, error.transient) == (reason, transient)
    assert error.message == "shard eu: the server's words"


@pytest.mark.parametrize(
    "lost",
    [
        asyncpg.InterfaceError("connection is closed"),
        # A soak saw it end the task that follows the map.
        asyncpg.InternalClientError("cannot switch to state 12; another operation is in progress"),
    ],
)
def test_a_lost_connection_is_transient(lost: Exception) -> None:
    assert isinstance(lost, driver_errors())
    error = translated(lost, "the catalogue")
    assert (error.reason, error.sqlstate, error.transient) == ("connection_lost", "08006", True)


@pytest.mark.parametrize(
    ("kind", "transient"),
    [(ErrorKind.PERMISSION_DENIED, False), (ErrorKind.UPSTREAM_UNREACHABLE, True)],
)
def test_an_error_of_the_dialer_keeps_its_word_and_its_sqlstate(
    kind: ErrorKind, transient: bool
) -> None:
    error = translated(ProxyError(kind, "as it was said"), "shard eu")
    assert (error.reason, error.sqlstate) == (kind.value.reason, kind.value.sqlstate)
    assert error.transient is transient
    assert error.message.startswith("shard eu: ")
    assert error.message.endswith("as it was said")


def test_a_refusal_is_left_as_it_is() -> None:
    refusal = CatalogueError(Reason.OVERLAP, "the keys are taken")
    assert translated(refusal, "the catalogue") is refusal


def test_a_key_that_is_none_is_no_error_of_the_catalogue() -> None:
    """`shards lookup x` said "the catalogue: the shard key is not written as a value"."""
    error = translated(ProxyError(ErrorKind.KEY_SYNTAX, "an integer"), "the catalogue")
    assert (error.reason, error.sqlstate) == ("key_invalid", "22P02")
    assert error.message == f"{ErrorKind.KEY_SYNTAX.value.message}: an integer"
