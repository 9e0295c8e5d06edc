"""Commands as a new user types them, and what they answer: `tests/transcripts.txt`.

`python -m tests.transcripts` runs them again and writes the file; `test_transcripts` demands that
nothing in it has changed. For: verbs up to the point where they connect, in a terminal of 80
columns. They run in this process, in a folder with the files below.
"""

import io
import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Final

from proxy.cli import main

FILE: Final = Path(__file__).parent / "transcripts.txt"
_PROMPT: Final = "$ "
_PROGRAM: Final = "lakebase-auth-proxy"
_FILES: Final[Mapping[str, str]] = {
    "good.toml": """\
[upstream]
endpoint = "projects/shop/branches/production/endpoints/primary"
[targets.eu]
endpoint = "projects/shop/branches/production/endpoints/eu"
[routing]
shard_map = "tenants"
[shard_maps.tenants]
kind = "range"
key_type = "int4"
mappings = [{ low = 0, high = 1000, target = "eu" }]
""",
    "bad.toml": "[listen]\nprot = 6000\nmax_connections = 0\n[sutdown]\ndrain_seconds = 1\n",
    "broken.toml": "[listen\nport = 1\n",
}


def rerun(text: str) -> str:
    """Return the transcript with what its commands answer now."""
    shown: list[str] = []
    with _folder():
        for line in text.splitlines():
            if line.startswith("#"):
                shown += [line]
            elif line.startswith(_PROMPT):
                shown += ["", line, *_answer(line.removeprefix(_PROMPT))]
    return "\n".join(shown) + "\n"


def _answer(command: str) -> list[str]:
    """Return the lines that a command prints, and its exit code if it is not 0."""
    words = shlex.split(command)
    at = words.index(_PROGRAM)
    printed = io.StringIO()
    given = dict(word.split("=", 1) for word in words[:at])
    with _environment(given), redirect_stdout(printed), redirect_stderr(printed):
        code = main(words[at + 1 :])
    lines = printed.getvalue().splitlines()
    return [*lines, f"[exit {code}]"] if code else lines


@contextmanager
def _folder() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        for name, text in _FILES.items():
            Path(name).write_text(text)
        yield


@contextmanager
def _environment(given: Mapping[str, str]) -> Iterator[None]:
    """Leave none of the person's own settings in the way."""
    before = dict(os.environ)
    own = ("LAKEBASE_", "DATABRICKS_", "PG", "ENDPOINT_NAME", "PYTHON")
    for name in [name for name in os.environ if name.startswith(own)]:
        del os.environ[name]
    os.environ.update({"COLUMNS": "80", "NO_COLOR": "1", **given})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


if __name__ == "__main__":
    FILE.write_text(rerun(FILE.read_text()))
