"""A native role's password, read from its file at each login."""

import asyncio
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from proxy.errors import ErrorKind, ProxyError
from proxy.upstream import password_file
from proxy.upstream.password_file import PasswordFile


@pytest.mark.parametrize(
    ("content", "password"),
    [
        (b"not-a-real-password", b"not-a-real-password"),
        (b"not-a-real-password\n", b"not-a-real-password"),
        (b"not-a-real-password\r\n", b"not-a-real-password"),
        (b" spaces stay ", b" spaces stay "),
    ],
)
async def test_a_password_file_is_read_at_each_login(
    tmp_path: Path, content: bytes, password: bytes
) -> None:
    path = tmp_path / "password"
    path.write_bytes(content)
    source = PasswordFile(str(path))
    shown = await source.fresh()
    assert shown.secret.reveal() == password
    assert shown.is_password
    assert shown.expires_at == math.inf
    source.reject(shown)
    path.write_bytes(b"rotated-not-real")
    assert (await source.fresh()).secret.reveal() == b"rotated-not-real"


def _missing(path: Path) -> None:
    pass


def _directory(path: Path) -> None:
    path.mkdir()


def _empty(path: Path) -> None:
    path.write_bytes(b"\n")


def _with_nul(path: Path) -> None:
    path.write_bytes(b"not-a-real\0password")


@pytest.mark.parametrize("make", [_missing, _directory, _empty, _with_nul])
async def test_a_password_file_that_cannot_be_used_says_so_and_nothing_of_what_is_in_it(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "password"
    make(path)
    with pytest.raises(ProxyError) as refused:
        await PasswordFile(str(path)).fresh()
    assert refused.value.kind is ErrorKind.PASSWORD_FILE_UNREADABLE
    assert "not-a-real" not in repr(refused.value.response())


async def test_a_password_file_that_does_not_answer_stops_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It was read in the event loop: with a pipe in its place the whole proxy stood still, and
    # SIGTERM was not served.
    path = tmp_path / "password"
    os.mkfifo(path)
    monkeypatch.setattr(password_file, "READ_SECONDS_MAX", 0.1)
    reading = asyncio.ensure_future(PasswordFile(str(path)).fresh())
    await asyncio.sleep(0)
    assert not reading.done()
    with pytest.raises(ProxyError) as refused:
        await reading
    assert refused.value.kind is ErrorKind.PASSWORD_FILE_UNREADABLE
    assert "no answer" in refused.value.detail
    os.close(os.open(path, os.O_WRONLY))  # its reader, which waits in open(), ends
