"""The programs in `examples` run against the demo as a person runs them, by what it prints.

One demo serves all of them. A program with the sidecar gets a shard key of the second shard, and
the demo's log says that this is where it came.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import pytest

from proxy.emulator.cluster import CLIENT_ID, DATABASE
from tests.packaging.manifests import ROOT
from tests.support.languages import GO_ENVIRONMENT, JDBC
from tests.support.proxy_process import run_to_end
from tests.support.running import eventually
from tests.support.tools import lack

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

EXAMPLES = ROOT / "examples"
KEY = "1500"  # the second shard has it
RUN_SECONDS_MAX = 300.0  # some compile first
JARS = tuple(JDBC.with_name(f"{name}.jar") for name in ("HikariCP", "slf4j-api", "slf4j-nop"))
PACKAGED_CRATES = Path("/usr/share/cargo/registry")
CARGO = (
    *("cargo", "run", "--quiet", "--offline", "--config", "profile.dev.debug=false"),
    *("--config", 'source.crates-io.replace-with="packages"'),
    *("--config", f'source.packages.directory="{PACKAGED_CRATES}"'),
    # Where tests/clients builds the same crates.
    *("--target-dir", str(ROOT / ".tools" / "built" / "rust")),
)


@dataclass(frozen=True, slots=True)
class Example:
    """How a program with the sidecar is run, and a command that succeeds if that is possible."""

    file: str
    command: tuple[str, ...]
    installed: str = "true"


SIDECARS = {
    "Python": Example("python/sidecar.py", (sys.executable,)),
    "Node.js": Example("node/sidecar.js", ("node",), "node -e 'require(\"pg\")'"),
    "Ruby": Example("ruby/sidecar.rb", ("ruby",), "ruby -e 'require \"pg\"'"),
    "PHP": Example("php/sidecar.php", ("php",), "php -m | grep -qx pdo_pgsql"),
    "Java": Example(
        "java/Sidecar.java",
        ("java", "-cp", ":".join(map(str, (JDBC, *JARS)))),
        f"command -v java && ls {' '.join(map(str, (JDBC, *JARS)))}",
    ),
    "Go": Example(
        "go/sidecar/main.go",
        ("go", "run"),
        f"command -v go && ls {GO_ENVIRONMENT['GOPATH']}/src/github.com/jackc/pgx",
    ),
    "Rust": Example(
        "rust/src/main.rs",
        CARGO,
        f"cargo --version && ls -d {PACKAGED_CRATES}/tokio-postgres-*",
    ),
}
OWN_TOKENS = "python/own_tokens.py"


class Demo:
    """A demo that runs: what it printed, and its log."""

    def __init__(self, printed: str, log: Path) -> None:
        self.printed = printed
        self._log = log

    @property
    def clients(self) -> dict[str, str]:
        """The environment of a client of the proxy."""
        (port,) = set(re.findall(r"psql -h \S+ -p (\d+) ", self.printed))
        where = {"PGHOST": "localhost", "PGPORT": port, "PGDATABASE": DATABASE, "PGUSER": "app"}
        # Inherited from the guide's environment, as in a terminal that has both.
        return {**where, "PGSSLMODE": "require"}

    @property
    def guide(self) -> str:
        """The lines to paste for programs that get their own tokens."""
        _, _, last = self.printed.partition("Programs that get their own tokens")
        return "\n".join(line for line in last.splitlines() if line.startswith("  export "))

    def sessions(self, shard: str) -> int:
        """Return how many sessions a shard had."""
        whole = self._log.read_text().rpartition("\n")[0]  # the last line may be under way
        events = map(json.loads, whole.splitlines())
        ended = [event for event in events if event["event"] == "session ended"]
        return sum(event["target"] == f"tenants/{shard}" for event in ended)


@contextmanager
def running_demo(directory: Path) -> Iterator[Demo]:
    ports = ("--listen.port=0", "--admin.port=0", "--log.level=info", "--https")
    command = (sys.executable, "-m", "proxy", "demo", *ports)
    log = directory / "log"
    with (
        log.open("w") as errors,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        assert process.stdout is not None
        printed = ""
        while "Ctrl-C stops everything" not in printed:
            line = process.stdout.readline().decode()
            assert line, log.read_text()
            printed += line
        yield Demo(printed, log)
        process.terminate()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    with running_demo(tmp_path_factory.mktemp("demo")) as demo:
        yield demo


def command_of(language: str, directory: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the command that runs an example, and what its environment has besides."""
    example = SIDECARS[language]
    file = EXAMPLES / example.file
    if language == "Rust":
        manifest = directory / "Cargo.toml"  # Cargo writes a file beside it
        manifest.write_text((EXAMPLES / "rust" / "Cargo.toml").read_text())
        (directory / "src").symlink_to(EXAMPLES / "rust" / "src")
        return (*example.command, f"--manifest-path={manifest}", "--", KEY), {}
    if language == "Go":  # the distribution has version 4, with another name for the constructor
        code = file.read_text().replace("pgx/v5", "pgx/v4").replace("NewWith", "Connect")
        file = directory / "main.go"
        file.write_text(code)
        return (*example.command, str(file), KEY), dict(GO_ENVIRONMENT)
    return (*example.command, str(file), KEY), {}


@pytest.mark.parametrize("language", list(SIDECARS))
async def test_an_example_with_the_sidecar_reaches_the_shard_of_its_key(
    demo: Demo, tmp_path: Path, language: str
) -> None:
    code, _, _ = await run_to_end("sh", "-c", SIDECARS[language].installed)
    lack(f"the example for {language}", ["it or its driver is missing"] if code else [])
    command, environment = command_of(language, tmp_path)
    before = demo.sessions("two")
    code, out, err = await run_to_end(
        *command, environment={**environment, **demo.clients}, seconds_max=RUN_SECONDS_MAX
    )
    assert (code, out.split()) == (0, [CLIENT_ID, DATABASE]), err
    await eventually(lambda: demo.sessions("two") > before, "its session is in the log")


async def test_an_example_with_own_tokens_runs_with_the_printed_environment(demo: Demo) -> None:
    assert "DATABRICKS_HOST=https://" in demo.guide
    paste = f"{demo.guide}\nexec {quote(sys.executable)} {EXAMPLES / OWN_TOKENS}"
    code, out, err = await run_to_end("bash", "-c", paste, seconds_max=RUN_SECONDS_MAX)
    assert (code, out.split()) == (0, [CLIENT_ID, DATABASE]), err


def test_the_document_lists_every_example_and_says_which_are_not_run() -> None:
    suffixes = {".py", ".go", ".java", ".js", ".rb", ".php", ".rs", ".cs"}
    programs = {path for path in EXAMPLES.rglob("*") if path.suffix in suffixes}
    text = (EXAMPLES / "README.md").read_text()
    said = dict(re.findall(r"\]\((\w+/\S+?)\)(, not run)?", text))
    assert set(said) == {str(path.relative_to(EXAMPLES)) for path in programs}
    run = {example.file for example in SIDECARS.values()} | {OWN_TOKENS}
    assert {file for file, not_run in said.items() if not not_run} == run
