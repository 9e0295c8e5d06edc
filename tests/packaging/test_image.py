"""The image, built and run: what it holds, as whom it runs, how it serves and how it ends.

No registry of images is asked. The base is put together on the spot: a small Debian with its
Python, in the place of the official image that the Dockerfile names. So what these tests cannot
show is that very base; what is ours in the image is the same.

buildah builds without a daemon. podman runs the image as it would run anywhere: an own root, file
system read-only, no capability, PID 1. It takes root, mmdebstrap, buildah, podman and runc; the
tests say so when they are skipped.
"""

import asyncio
import faulthandler
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import psycopg
import pytest

from proxy import __version__
from proxy.emulator.cluster import CLIENT_ID
from proxy.emulator.lakebase import Lakebase
from tests.packaging.manifests import ROOT
from tests.support.proxy_process import ProxyProcess
from tests.support.running import proxy_values
from tests.support.tools import need

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

UNPACKED_BYTES_MAX: Final = 250_000_000
# A Debian, and two images with everything that they install.
BUILD_SECONDS_MAX: Final = 600
# 128 and SIGKILL would be 137: podman's own impatience.
STOP_SECONDS_MAX: Final = 20

# As slim as the official base: apt, but neither documents nor more of perl than perl-base.
BASE_OPTIONS: Final = (
    "--quiet",
    "--variant=apt",
    # usr-is-merged stands in for usrmerge, which would bring perl.
    "--include=python3,python3-venv,ca-certificates,usr-is-merged",
    "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
    *(f"--dpkgopt=path-exclude=/usr/share/{of}/*" for of in ("doc", "man", "locale", "info")),
)
BUILD_ARGUMENTS: Final = {
    "BASE": "localhost/base",
    "SOURCE": "https://example.com/proxy",
    "REVISION": "1234abcd",
}
BASE_FILE: Final = """\
FROM scratch
ADD base.tar /
ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin
CMD ["python3"]
"""


def run(*command: str, seconds_max: float = 60, **more: str) -> str:
    """Run a program and return what it printed; fail with all that it said."""
    ran = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=seconds_max,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **more},
    )
    assert ran.returncode == 0, f"{command}: {ran.stdout[-4000:]}{ran.stderr[-4000:]}"
    return ran.stdout


class Images:
    """The two images, in a store of the test's own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._places = ("--root", f"{directory}/store", "--runroot", f"{directory}/run")

    def storage(self, program: str) -> list[str]:
        """Return a program's command line up to its verb."""
        return [program, *self._places]

    def build(self) -> None:
        """Build base, proxy and demo."""
        base = self._directory / "base"
        base.mkdir()
        (base / "Containerfile").write_text(BASE_FILE)
        archive = str(base / "base.tar")
        run("mmdebstrap", *BASE_OPTIONS, "bookworm", archive, seconds_max=BUILD_SECONDS_MAX)
        self._bud("base", "--file", f"{base}/Containerfile", str(base))
        for target in ("proxy", "demo"):
            given = (f"--build-arg={name}={value}" for name, value in BUILD_ARGUMENTS.items())
            self._bud(target, "--target", target, *given, str(ROOT))

    def remove(self) -> None:
        """Free the disk space."""
        run(*self.storage("podman"), "rmi", "--all", "--force", seconds_max=BUILD_SECONDS_MAX)
        shutil.rmtree(self._directory, ignore_errors=True)  # the store may still be a mount

    def _bud(self, name: str, *arguments: str) -> None:
        """Build an image. Packages come from wherever pip gets them on this machine, with the
        certificate authorities that this machine trusts."""
        options = ["--quiet", "--layers", "--format", "docker", "--isolation", "chroot"]
        options += ["--pull-never", "--tag", f"localhost/{name}"]
        trusted = Path("/etc/ssl/certs")
        if name != "base":
            options += ["--volume", f"{trusted}:{trusted}:ro"]
        command = (*self.storage("buildah"), "bud", *options, *arguments)
        run(*command, seconds_max=BUILD_SECONDS_MAX)

    def inspect(self, image: str, template: str) -> str:
        """Return something that is written in an image."""
        command = (*self.storage("podman"), "image", "inspect", "--format", template)
        return run(*command, f"localhost/{image}").strip()

    def command(
        self, image: str, *options: str, arguments: Sequence[str] = (), network: str = "host"
    ) -> list[str]:
        """Return the command line that runs an image, locked up as our manifests lock it up."""
        return [
            *self.storage("podman"),
            *("--runtime", "runc", "--cgroup-manager", "cgroupfs", "run", "--rm"),
            *("--network", network, "--cap-drop", "all", "--security-opt", "no-new-privileges"),
            *("--read-only", "--read-only-tmpfs=false", "--no-healthcheck"),
            # What this machine may give; the defaults ask for more.
            *("--ulimit", "nofile=4096:4096", "--ulimit", "nproc=1024:1024"),
            *options,
            f"localhost/{image}",
            *arguments,
        ]

    @asynccontextmanager
    async def running(
        self, image: str, name: str, *options: str, network: str = "host"
    ) -> AsyncIterator[ProxyProcess]:
        """Run an image while the block runs; signals go to its PID 1."""
        process = await asyncio.create_subprocess_exec(
            *self.command(image, "--name", name, *options, network=network),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        proxy = ProxyProcess(process)
        try:
            yield proxy
        finally:
            if proxy.running:
                run(*self.storage("podman"), "rm", "--force", "--time", "0", name)
            await proxy.ended()

    def execute(self, name: str, *command: str) -> str:
        """Run a command inside a running container."""
        return run(*self.storage("podman"), "--runtime", "runc", "exec", name, *command)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    """Build once for all tests here."""
    tools = ("mmdebstrap", "buildah", "podman", "runc")
    need("the image was neither built nor run", *tools, root=True)
    directory = tmp_path_factory.mktemp("images")
    # It takes longer than a test may; each of its steps has a deadline of its own.
    faulthandler.cancel_dump_traceback_later()
    built = Images(directory)
    try:
        built.build()
        yield built
    finally:  # its mounts would make every later run of pytest fail, which cleans up
        built.remove()


def environment(lakebase: Lakebase) -> list[str]:
    """Return options that point the proxy in a container at the emulator, by environment alone."""
    ca_file = "/ca.pem"
    values = proxy_values(lakebase, {"admin": {"enabled": True}, "upstream": {}})
    values["upstream"]["ssl_root_cert"] = ca_file
    options = ["--volume", f"{lakebase.ca_file}:{ca_file}:ro"]
    for section, keys in values.items():
        for key, value in keys.items():
            text = str(value).lower() if isinstance(value, bool) else str(value)
            options += ["--env", f"LAKEBASE_PROXY_{section.upper()}__{key.upper()}={text}"]
    return options


def test_the_image_is_small(images: Images) -> None:
    assert int(images.inspect("proxy", "{{.Size}}")) < UNPACKED_BYTES_MAX


@pytest.mark.parametrize("image", ["proxy", "demo"])
def test_the_image_says_how_to_run_it(images: Images, image: str) -> None:
    assert images.inspect(image, "{{.Config.User}}") == "65532:65532"
    assert images.inspect(image, "{{.Config.Entrypoint}}") == "[lakebase-auth-proxy]"
    assert images.inspect(image, "{{.Config.StopSignal}}") == "SIGTERM"
    healthcheck = "[CMD lakebase-auth-proxy wait --timeout 3]"
    assert images.inspect(image, "{{.Config.Healthcheck.Test}}") == healthcheck
    labels = json.loads(images.inspect(image, "{{json .Config.Labels}}"))
    given = {
        "title": "lakebase-auth-proxy",
        "version": __version__,
        "source": BUILD_ARGUMENTS["SOURCE"],
        "revision": BUILD_ARGUMENTS["REVISION"],
        "base.name": BUILD_ARGUMENTS["BASE"],
    }
    for name, value in given.items():
        assert labels[f"org.opencontainers.image.{name}"] == value


def test_no_build_tool_and_no_installer_is_left(images: Images) -> None:
    code = (
        "import importlib.util, shutil; "
        "print([t for t in ('cc', 'gcc', 'make', 'git', 'pip', 'pip3') if shutil.which(t)],"
        " [m for m in ('pip', 'setuptools', 'Cython', 'pytest') if importlib.util.find_spec(m)])"
    )
    python = ("--entrypoint", "/opt/lakebase-auth-proxy/bin/python")
    assert run(*images.command("proxy", *python, arguments=("-c", code))) == "[] []\n"


async def test_the_container_logs_a_client_in_and_ends_cleanly(
    images: Images, lakebase: Lakebase
) -> None:
    options = environment(lakebase)
    async with images.running("proxy", "lakebase-serves", *options) as proxy:
        await proxy.serving()
        assert [line["acceleration"] for line in proxy.events("serving")] == ["used"]
        where = f"host={proxy.listen_host} port={proxy.listen_port} dbname=databricks_postgres"
        connecting = psycopg.AsyncConnection.connect(f"{where} user=anyone")
        async with await connecting as connection:
            cursor = await connection.execute("SELECT current_user")
            assert await cursor.fetchone() == (CLIENT_ID,)
        read = "import os; print(os.getuid(), open('/proc/1/cmdline').read().split(chr(0))[1:3])"
        inside = images.execute("lakebase-serves", "python3", "-c", read)
        assert inside == "65532 ['/opt/lakebase-auth-proxy/bin/lakebase-auth-proxy', 'run']\n"
        proxy.send(signal.SIGTERM)  # podman passes it on to PID 1
        assert await proxy.ended(STOP_SECONDS_MAX) == 0
        assert [line["signal"] for line in proxy.events("draining")] == ["SIGTERM"]


async def test_the_container_needs_no_name_for_its_user(images: Images, lakebase: Lakebase) -> None:
    """OpenShift gives each namespace a number of its own, which no passwd file knows."""
    options = (*environment(lakebase), "--user", "1000680000:0")
    async with images.running("proxy", "lakebase-number", *options) as proxy:
        await proxy.serving()
        proxy.send(signal.SIGTERM)
        assert await proxy.ended(STOP_SECONDS_MAX) == 0


async def test_the_demo_needs_no_account_no_network_and_only_its_tmp(images: Images) -> None:
    """As docker-compose.yml has it: its own ports, and a client inside the same network."""
    running = images.running("demo", "lakebase-demo", "--tmpfs", "/tmp", network="none")
    async with running as proxy:
        await proxy.printed("Ctrl-C stops everything")
        healthcheck = json.loads(images.inspect("demo", "{{json .Config.Healthcheck.Test}}"))
        images.execute("lakebase-demo", *healthcheck[1:])
        command = next(line for line in proxy.out.splitlines() if "SELECT current_user" in line)
        answer = images.execute("lakebase-demo", *with_bundled_psql(proxy, command))
        assert CLIENT_ID in answer
        proxy.send(signal.SIGTERM)
        assert await proxy.ended(STOP_SECONDS_MAX) == 0


def with_bundled_psql(proxy: ProxyProcess, command: str) -> list[str]:
    """Return the command that the demo prints, with the psql that it says is there."""
    directory = re.search(r"There is one in (\S+)", proxy.out)
    assert directory is not None
    _, *arguments = shlex.split(command)
    return [f"/{directory[1].lstrip('/')}/psql", *arguments]
