"""The operator's command that copies rows: what it finds, how it ends, what is said of it."""

import asyncio
import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, redirect_stderr
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import pytest

from proxy.catalogue.copy_command import (
    LINE_CHARACTERS_MAX,
    TERMINATE_SECONDS_MAX,
    CopyCommand,
    LastLine,
    end_group,
    socket_folder,
)
from proxy.catalogue.errors import CatalogueError
from proxy.catalogue.model import CatalogueMap, Mapping, Shard
from proxy.config import Settings
from proxy.routing.keys import KeyType, parse_key
from proxy.routing.shard_map import Kind, MapSpec
from proxy.workspace.login_variables import without_login
from tests.support.running import Unread

MAP: Final = CatalogueMap(uuid4(), "tenants", MapSpec(Kind.RANGE, KeyType.INT4), 1)
ONE, TWO = (
    Shard(uuid4(), MAP.map_id, name, f"{name}.test", 5432, "it's/a db") for name in ("one", "two")
)
MAPPING: Final = Mapping(
    uuid4(), MAP.map_id, ONE.shard_id, parse_key("0", KeyType.INT4), parse_key("10", KeyType.INT4)
)
WAIT_SECONDS_MAX: Final = 20.0
SETTINGS: Final = {
    "upstream": {"endpoint": "projects/p/branches/b/endpoints/e"},
    "workspace": {"oidc_token_env": "OUR_SET_TOKEN"},
}


@asynccontextmanager
async def listen(shard: Shard, path: Path) -> AsyncIterator[None]:
    """Serve a socket that nothing connects to."""
    server = await asyncio.start_unix_server(lambda *_: None, path)
    async with server:
        yield


async def run(text: str, timeout_seconds: float = 0) -> None:
    environment = without_login(os.environ, Settings.model_validate(SETTINGS))
    await CopyCommand(text, timeout_seconds, listen, environment).run(MAP, MAPPING, ONE, TWO)


async def failed(text: str, timeout_seconds: float = 0) -> str:
    with pytest.raises(CatalogueError) as raised:
        await run(text, timeout_seconds)
    assert (raised.value.reason, raised.value.sqlstate) == ("copy_failed", "58000")
    return raised.value.message


async def test_it_finds_the_mapping_and_both_shards(tmp_path: Path) -> None:
    names = ["MAP", "KIND", "KEY_TYPE", "LOW", "HIGH", "SOURCE", "TARGET"]
    script = "\n".join(f'echo "$SHARDS_{name}"' for name in names)
    folder_mode = 'u="${SHARDS_SOURCE#*host=}"; stat -c %a "$(echo "${u%%&*}" | sed s,%2F,/,g)"'
    await run(f"({script}\n{folder_mode}) > {tmp_path}/said")
    *facts, source, target, mode = (tmp_path / "said").read_text().splitlines()
    assert facts == ["tenants", "range", "int4", "0", "10"]
    assert mode == "700"
    for uri, port in ((source, "1"), (target, "2")):
        parts = urlsplit(uri)
        assert (parts.scheme, parts.netloc, parts.path) == (
            "postgresql",
            "",
            "/it%27s%2Fa%20db",
        )
        query = parse_qs(parts.query)
        assert query["port"] == [port]
        assert not os.path.exists(query["host"][0])  # noqa: ASYNC240, PTH110 - removed at the end


async def test_it_gets_no_secret_of_ours_and_the_rest_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        *("DATABRICKS_CLIENT_SECRET", "ARM_CLIENT_SECRET", "LAKEBASE_PROXY_X", "PGPASSWORD"),
        *("GOOGLE_CREDENTIALS", "OIDC_TOKEN", "ACTIONS_ID_TOKEN_REQUEST_TOKEN"),
        *("SYSTEM_ACCESSTOKEN", "OUR_OWN_TOKEN", "OUR_SET_TOKEN"),
    ):
        monkeypatch.setenv(name, "not-a-real-secret")
    monkeypatch.setenv("DATABRICKS_OIDC_TOKEN_ENV", "OUR_OWN_TOKEN")
    monkeypatch.setenv("AWS_REGION", "eu-1")
    await run(f"env > {tmp_path}/said")
    said = (tmp_path / "said").read_text()
    assert "not-a-real-secret" not in said
    assert "AWS_REGION=eu-1" in said


async def test_its_output_goes_to_standard_error_and_it_reads_nothing(
    capfd: pytest.CaptureFixture[str],
) -> None:
    await run("cat; echo out; echo err >&2")
    said = capfd.readouterr()
    assert said.out == ""
    assert sorted(said.err.splitlines()) == ["err", "out"]


async def test_it_goes_on_when_nothing_reads_its_output(tmp_path: Path) -> None:
    """The move ended with a traceback, its mapping offline."""
    with redirect_stderr(Unread()):
        await run(f"echo said >&2; sleep 0.2; echo copied > {tmp_path}/copied")
    assert (tmp_path / "copied").exists()


async def test_its_last_words_are_in_the_error(capfd: pytest.CaptureFixture[str]) -> None:
    message = await failed("echo first >&2; printf 'no \\033[1mspace\\033 left\\n\\n' >&2; exit 3")
    assert message == "the copy command ended with exit status 3: no [1mspace left"
    assert await failed("exit 7") == "the copy command ended with exit status 7"
    assert await failed("kill -KILL $$") == "the copy command was ended by signal 9"
    assert await failed("no-such-program") != ""


async def test_what_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"sleep 600 & echo $! > {pids}; echo waiting >&2; wait"
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        assert await failed(script, 0.5) == "the copy command did not end within 0.5 s: waiting"
    assert has_ended(int(pids.read_text()))


async def test_what_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    async with asyncio.timeout(WAIT_SECONDS_MAX + TERMINATE_SECONDS_MAX):
        script = "trap '' TERM; while :; do sleep 0.1; done"
        assert "did not end" in await failed(script, 0.5)


async def test_what_it_leaves_running_is_ended_with_it(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        await run(f"sleep 600 & echo $! > {pids}")
    assert has_ended(int(pids.read_text()))


async def test_a_daemon_that_it_starts_does_not_keep_it_from_ending(tmp_path: Path) -> None:
    # It has left the process group, and has the command's standard error.
    pids = tmp_path / "pids"
    script = f"setsid sh -c 'echo $$ > {pids}; exec sleep 600' & until [ -s {pids} ]; do :; done"
    for end, timeout_seconds, words in (
        ("echo the end >&2; exit 3", 0, "ended with exit status 3: the end"),
        ("sleep 600", 3, "did not end within 3 s"),
    ):
        try:
            async with asyncio.timeout(WAIT_SECONDS_MAX):
                message = await failed(f"{script}; {end}", timeout_seconds)
            assert message == f"the copy command {words}"
        finally:
            os.kill(int(pids.read_text()), signal.SIGKILL)
            pids.unlink()


@pytest.mark.parametrize(("refusals", "is_ended"), [(3, True), (1_000, False)])
async def test_processes_of_another_user_are_waited_for_and_then_told(
    refusals: int, is_ended: bool
) -> None:
    """As it may not signal them, the verb ended with a traceback."""
    calls: list[int] = []

    def refuse(group: int, number: int) -> None:
        calls.append(number)
        raise PermissionError if len(calls) <= refusals else ProcessLookupError

    async with asyncio.timeout(WAIT_SECONDS_MAX):
        assert await end_group(1_000_000, refuse, 0.2 if refusals > 3 else 10) is is_ended
    assert calls[:2] == [signal.SIGTERM, 0]
    assert calls[-1] == (0 if is_ended else signal.SIGKILL)


_HOLD: Final = """\
import sys
from proxy.catalogue.copy_command import socket_folder
with socket_folder() as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_the_folder_of_a_process_that_was_killed_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    process = subprocess.Popen(
        (sys.executable, "-c", _HOLD),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    with process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        with socket_folder() as folder:
            assert sorted(tmp_path.iterdir()) == sorted([left, Path(folder)])
            process.kill()
            process.wait(WAIT_SECONDS_MAX)
            with socket_folder():
                assert not left.exists()
                assert Path(folder).stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []


def test_a_filesystem_without_locks_keeps_no_copy_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of a network have none: a move was undone for what only tidies up."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with socket_folder(lock=refuse) as first, socket_folder(lock=refuse) as second:
        assert sorted(tmp_path.iterdir()) == sorted([Path(first), Path(second)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("blocked_seconds", [0, 0.1])
async def test_an_interruption_ends_it(tmp_path: Path, blocked_seconds: float) -> None:
    """While the shell was being started, what it had started already was left."""
    pids = tmp_path / "pids"
    os.mkfifo(tmp_path / "ready")
    script = f"sleep 600 & echo $! > {pids}; echo > {tmp_path}/ready; wait"
    running = asyncio.ensure_future(run(script))
    while not has_text(pids):
        await asyncio.sleep(0)
        hold_loop_until_written(pids, blocked_seconds)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert has_ended(int(pids.read_text()))


def has_text(path: Path) -> bool:
    """Return whether the file is there and not empty."""
    return path.exists() and bool(path.read_text())


def hold_loop_until_written(path: Path, seconds_max: float) -> None:
    """Wait in the event loop's thread: the shell is faster than the loop."""
    end = time.monotonic() + seconds_max
    while time.monotonic() < end and not has_text(path):
        pass


def has_ended(pid: int) -> bool:
    """Return whether a process is gone, or a zombie that its parent has not asked for."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def test_the_last_line_is_bounded_and_printable_however_it_arrives() -> None:
    said = b"first\n\xc3\xa9t\xc3\xa9 \x1b[0m\r\n\n"
    for size in (1, 3, len(said)):
        line = LastLine()
        for at in range(0, len(said), size):
            line.add(said[at : at + size])
        assert str(line) == "été [0m"
    line = LastLine()
    for _ in range(10):
        line.add(b"x" * 1000)
    assert str(line) == "x" * LINE_CHARACTERS_MAX
    assert str(LastLine()) == ""
