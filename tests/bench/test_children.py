"""Programs that a run starts end with it, whatever becomes of the run."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.children import child, run
from bench.errors import BenchError

SECONDS_MAX = 30
SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]


def wait_for_end(pid: int) -> None:
    """Wait until no such process runs; a zombie does not run."""
    deadline = time.monotonic() + SECONDS_MAX
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":
            return
    pytest.fail(f"process {pid} is still there")


def test_a_child_ends_with_its_block(tmp_path: Path) -> None:
    with child(SLEEPER, tmp_path / "log") as started:
        assert started.process.poll() is None
    assert started.process.poll() is not None


def test_a_child_that_is_deaf_is_killed(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True)"
    command = [sys.executable, "-c", f"{deaf}; time.sleep(600)"]
    with child(command, tmp_path / "log", stop_seconds_max=0.2) as started:
        started.wait_until(lambda: started.tail() == "1\n")
    assert started.process.returncode == -signal.SIGKILL


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs util-linux's setpriv")
def test_a_child_ends_when_the_run_itself_is_killed(tmp_path: Path) -> None:
    program = f"""
import time
from pathlib import Path
from bench.children import child
with child({SLEEPER!r}, Path({str(tmp_path / "log")!r})) as started:
    # The child's own program runs, and with it the kernel's promise.
    started.wait_until(lambda: b"time.sleep" in Path(f"/proc/{{started.pid}}/cmdline").read_bytes()
        and b"setpriv" not in Path(f"/proc/{{started.pid}}/cmdline").read_bytes())
    print(started.pid, flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as harness:
        assert harness.stdout is not None
        pid = int(harness.stdout.readline())
        harness.kill()
    wait_for_end(pid)


def test_a_program_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="no such day"):
        run(
            [sys.executable, "-c", "raise SystemExit('no such day')"],
            tmp_path / "log",
            seconds_max=SECONDS_MAX,
        )


def test_a_program_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"took over 0\.2 s"):
        run(SLEEPER, tmp_path / "log", seconds_max=0.2)


def test_a_child_hears_nothing_of_our_own_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGHOST", "elsewhere")
    command = [sys.executable, "-c", "import os; print(os.environ.get('PGHOST'))"]
    assert run(command, tmp_path / "log", seconds_max=SECONDS_MAX) == "None\n"
    assert os.environ["PGHOST"] == "elsewhere"
