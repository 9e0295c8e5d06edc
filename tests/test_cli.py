"""The command line: what each verb prints and how it exits, up to the point where it serves.

Everything that a configuration can get wrong is answered before anything is dialled, so these
need no emulator; serving and signals are in `e2e/test_process.py`.
"""

import os
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from proxy import __version__, native
from proxy.cli import main
from proxy.exit_codes import EXIT_FAILURE, EXIT_OK, EXIT_USAGE
from proxy.verbs.help import overview
from proxy.verbs.verb_table import VERBS
from tests.support.proxy_process import started_process

ENDPOINT = ("--upstream.endpoint", "projects/p/branches/b/endpoints/e")
SECRET = "not-a-real-secret"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave none of the person's own settings in the way."""
    for name in list(os.environ):
        if name.startswith(("LAKEBASE_", "DATABRICKS_", "PG", "ENDPOINT_NAME")):
            monkeypatch.delenv(name)


# A thread that is within pydantic's compiled part when the verb has ended.
A_THREAD_IN_AN_EXTENSION = """
import sys, threading
from pydantic import BaseModel, field_validator
entered = threading.Event()
class Model(BaseModel):
    value: int
    @field_validator("value")
    @classmethod
    def stay(cls, value):
        entered.set()
        while True:
            threading.Event().wait(0.001)
threading.Thread(target=Model, kwargs={"value": 1}, daemon=True).start()
entered.wait()
from proxy.__main__ import main
sys.exit(main())
"""


def test_a_thread_that_still_runs_does_not_abort_the_end() -> None:
    # A reload that ran when the proxy was stopped: exit code 134 (SIGABRT) in place of 0.
    ran = subprocess.run(
        [sys.executable, "-c", A_THREAD_IN_AN_EXTENSION, "version"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (EXIT_OK, f"{__version__}\n", "")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_module_and_a_line_in_the_help(verb: str) -> None:
    assert callable(import_module(f"proxy.verbs.{verb}").run)
    assert f"\n  {verb} " in overview(VERBS)


def test_waiting_does_not_pay_for_serving(unused_tcp_port: int) -> None:
    # It is a container's health check, run every few seconds.
    heavy = ["asyncpg", "databricks", "prometheus_client", "starlette", "structlog", "uvicorn"]
    code = (
        "import sys; from proxy.cli import main;"
        f" code = main(['wait', '--timeout=0', '--admin.port={unused_tcp_port}']);"
        f" print(code, [name for name in {[*heavy, 'uvloop']} if name in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60
    )
    assert ran.stdout == f"{EXIT_FAILURE} []\n", ran.stderr


def test_serving_does_not_import_what_only_others_need_or_what_comes_later() -> None:
    late = ["asyncpg", "databricks", "proxy.emulator", "scramp"]
    code = (
        "import sys, proxy.verbs.run;"
        f" print([name for name in {late} if name in sys.modules], 'uvicorn' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60
    )
    assert ran.stdout == "[] True\n", ran.stderr


@pytest.mark.parametrize("word", ["version", "-V", "--version"])
def test_version_prints_the_version_and_nothing_else(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word]) == EXIT_OK
    assert capsys.readouterr() == (f"{__version__}\n", "")


def test_version_takes_no_argument(capsys: pytest.CaptureFixture[str]) -> None:
    for argument in ("--listen.port=1", "--", "x"):
        assert main(["version", argument, "x"]) == EXIT_USAGE
        assert "too many" in capsys.readouterr().err or argument.startswith("--listen")


def test_version_says_what_was_compiled_if_it_is_asked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["version", "--build"]) == EXIT_OK
    version, relay = capsys.readouterr().out.splitlines()
    assert version == __version__
    built = "built" if native.AVAILABLE else f"not built ({native.WHY_MISSING}). "
    assert relay.startswith(f"compiled relay: {built}")


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["-h"], ["help"], ["--listen.port", "1", "--help"]], ids=str
)
def test_help_names_every_verb_and_exits_with_0(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == EXIT_OK
    out, err = capsys.readouterr()
    assert err == ""
    for verb in ("run", "demo", "version"):
        assert f"\n  {verb} " in out


@pytest.mark.parametrize(
    "arguments",
    [(), ("psql",), ("--",), ("--shard-key", "--", "psql"), ("--socket", "--listen.port", "1")],
    ids=str,
)
def test_exec_without_a_command_says_how_it_is_used(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["exec", *ENDPOINT, *arguments]) == EXIT_USAGE
    err = capsys.readouterr().err
    assert "exec needs a command after --" in err or "--shard-key needs a value" in err


def test_help_after_the_end_of_execs_flags_is_the_commands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["exec", "--", "psql", "--help"]) == EXIT_USAGE  # no endpoint is set
    out, err = capsys.readouterr()
    assert out == ""
    assert "upstream.endpoint" in err


def test_an_unknown_verb_is_named_with_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve"]) == EXIT_USAGE
    out, err = capsys.readouterr()
    assert out == ""
    first, *listed = err.splitlines()
    assert first == "lakebase-auth-proxy: there is no verb 'serve': one of"
    assert " ".join(line.strip() for line in listed) == ", ".join(VERBS)
    assert max(map(len, listed)) <= 80


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--shard-key", "run", "exec", "--", "x"), "--shard-key: needs a shard map"),
        (("--project", "run", "init", "--sql", "--toml"), "--sql prints no configuration"),
        (("shards", "--range", "move", "7", "repair"), "--from is one of catalogue, shard"),
        (("--map", "run", "shards", "ops", "--dry-run"), "--dry-run, --all, --copy"),
        (("--dry-run", "shards", "init", "7"), "too many arguments"),
    ],
    ids=str,
)
def test_the_value_of_a_flag_before_the_verb_is_no_verb(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # `--shard-key run exec -- x` was taken for `run`.
    assert main(arguments) == EXIT_USAGE
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("also", ["--watch", "--sessions"])
def test_a_session_is_not_ended_and_shown(also: str, capsys: pytest.CaptureFixture[str]) -> None:
    # It was ignored.
    assert main(["status", "--end", "1", also]) == EXIT_USAGE
    assert "--end shows nothing" in capsys.readouterr().err


def test_what_was_meant_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--max_connection"]) == EXIT_USAGE
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith("lakebase-auth-proxy: there is no --max_connection; did you mean")
    assert second == "  --listen.max_connections?"


def test_a_word_that_may_be_a_secret_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"postgres://app:{SECRET}@host/db"]) == EXIT_USAGE
    assert "there is no verb of that name" in (err := capsys.readouterr().err)
    assert SECRET not in err


def test_a_reader_that_has_ended_ends_the_verb_in_silence() -> None:
    # `status --watch | head -1` ended with a traceback.
    reading, writing = os.pipe()
    os.close(reading)
    ran = subprocess.run(
        [sys.executable, "-m", "proxy", "status", "--watch", "--admin.host=127.0.0.9"],
        check=False,
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (EXIT_FAILURE, b"")


def test_every_configuration_error_is_reported_at_once_and_no_secret(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text(f'[workspace]\nclient_secrt = "{SECRET}"\n[listen]\nport = 70000\n')
    arguments = ["--config", str(file), "--listen.max_connections", "none", "--unknown.key", SECRET]
    assert main(["run", *arguments]) == EXIT_USAGE
    out, err = capsys.readouterr()
    assert out == ""
    for key in ("listen.port", "listen.max_connections", "client_secrt", "unknown.key"):
        assert key in err
    assert SECRET not in err
    assert "Traceback" not in err


def test_run_without_anything_to_dial_says_what_to_set(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["run"]) == EXIT_USAGE
    assert "upstream.endpoint" in capsys.readouterr().err


def test_a_remote_host_is_refused_unless_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *ENDPOINT, "--listen.host", "0.0.0.0"]) == EXIT_USAGE
    assert "allow_remote" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["run", "check"])
def test_print_config_prints_a_file_that_can_be_used_and_asks_for_nothing(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LAKEBASE_PROXY_WORKSPACE__CLIENT_SECRET", SECRET)
    assert main([verb, "--listen.port", "6000", "--print-config"]) == EXIT_OK
    out, err = capsys.readouterr()
    assert err == ""
    assert "port = 6000  # flag --listen.port\n" in out
    assert SECRET not in out
    file = tmp_path / "proxy.toml"
    file.write_text(out)
    assert main([verb, "--print-config", "--config", str(file)]) == EXIT_OK
    again = capsys.readouterr().out
    assert f"port = 6000  # file {file}\n" in again


@pytest.mark.parametrize("verb", ["run", "check"])
def test_print_config_of_a_bad_configuration_exits_with_2(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "--print-config", "--listen.port", "none"]) == EXIT_USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert "listen.port" in err


@pytest.mark.parametrize("section", ["listen", "admin"])
def test_a_busy_port_is_answered_with_the_flag_that_chooses_another(
    section: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        ports = {"listen": 0, "admin": 0} | {section: port}
        flags = [word for name in ports for word in (f"--{name}.port", str(ports[name]))]
        assert main(["run", *ENDPOINT, *flags]) == EXIT_FAILURE
    err = capsys.readouterr().err
    assert f"--{section}.port" in err
    assert str(port) in err
    assert "Traceback" not in err
    assert "ExceptionGroup" not in err


@pytest.mark.parametrize("content", [None, "not a certificate"], ids=["absent", "nonsense"])
def test_a_certificate_file_that_cannot_be_used_is_a_configuration_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_text(content)
    flags = ["--listen.port", "0", "--admin.port", "0", "--upstream.ssl_root_cert", str(file)]
    assert main(["run", *ENDPOINT, *flags]) == EXIT_USAGE
    err = capsys.readouterr().err
    assert f"upstream.ssl_root_cert: {file}: " in err
    assert "Traceback" not in err


@pytest.mark.parametrize("verb", ["run", "check"])
@pytest.mark.parametrize("section", ["workspace", "workspaces.eu"])
@pytest.mark.parametrize("content", [None, "not a certificate"], ids=["absent", "nonsense"])
def test_a_ca_file_of_a_workspace_that_cannot_be_used_is_a_configuration_error(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    content: str | None,
    section: str,
    verb: str,
) -> None:
    # It was reported at the first mint, and as an API that cannot be reached.
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_text(content)
    flags = ["--listen.port", "0", "--admin.port", "0", f"--{section}.ssl_root_cert", str(file)]
    flags += ["--workspaces.eu.profile", "eu"]
    assert main([verb, *ENDPOINT, *flags]) == EXIT_USAGE
    err = capsys.readouterr().err
    assert f"{section}.ssl_root_cert: {file}" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("verb", ["run", "check"])
@pytest.mark.parametrize("section", ["workspace", "workspaces.eu"])
def test_a_workspace_host_with_a_path_is_a_configuration_error(
    capsys: pytest.CaptureFixture[str], section: str, verb: str
) -> None:
    flags = [f"--{section}.host", "https://dbc.example.com/browse", "--workspaces.eu.profile", "eu"]
    assert main([verb, *ENDPOINT, *flags]) == EXIT_USAGE
    err = capsys.readouterr().err
    assert f"{section}.host (flag --{section}.host): the workspace's address has a path" in err


def test_a_host_that_is_not_ours_is_a_sentence_not_a_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # An address of the documentation's own network: no machine has it.
    flags = ["--admin.port", "0", "--listen.port", "0", "--listen.host", "192.0.2.1"]
    assert main(["run", *ENDPOINT, *flags, "--listen.allow_remote", "true"]) == EXIT_FAILURE
    err = capsys.readouterr().err
    assert err.startswith("lakebase-auth-proxy: ")
    assert "Traceback" not in err


@pytest.mark.parametrize("section", ["listen", "admin"])
def test_a_port_that_is_taken_is_named_with_its_key(
    section: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # "Address already in use" did not say which of the two ports it was.
    with socket.create_server(("127.0.0.1", 0)) as busy:
        ports = {"listen": "0", "admin": "0", section: str(busy.getsockname()[1])}
        flags = [f"--{name}.port={port}" for name, port in ports.items()]
        assert main(["run", *ENDPOINT, *flags]) == EXIT_FAILURE
    err = capsys.readouterr().err
    assert f"{section}.port: 127.0.0.1 port {ports[section]}: Address already in use" in err


async def test_python_m_proxy_is_the_same_command() -> None:
    async with started_process("version") as proxy:
        assert await proxy.ended() == EXIT_OK
    assert (proxy.out, proxy.err) == (f"{__version__}\n", "")
