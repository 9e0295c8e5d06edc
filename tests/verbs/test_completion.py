"""`completion`: the shells themselves are asked what they would complete."""

import subprocess
from pathlib import Path

import pytest

from proxy.cli import main
from proxy.exit_codes import EXIT_OK
from tests.support.tools import need

CASES = {
    "lakebase-auth-proxy wa": "wait",
    "lakebase-auth-proxy wait --ti": "--timeout",
    "lakebase-auth-proxy --log.level info run --print": "--print-config",
    "lakebase-auth-proxy run --listen.po": "--listen.port",
    "lakebase-auth-proxy shards reas": "reassign",
    "lakebase-auth-proxy shards move --copy-": "--copy-timeout-seconds",
    "lakebase-auth-proxy exec -- ls --tim": "",
    "lakebase-auth-proxy wait --nothing": "",
}
SHELLS = {
    "bash": """
source {script}
while read -r -a COMP_WORDS; do
    COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)) COMPREPLY=()
    _lakebase_auth_proxy
    echo "${{COMPREPLY[@]}}"
done
""",
    "fish": """
source {script}
while read line
    echo (complete -C $line | string replace -r '\\t.*' '')
end
""",
}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes_verbs_and_flags(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == EXIT_OK
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    need(f"completion in {shell}", shell)
    ran = subprocess.run(
        [shell, "-c", SHELLS[shell].format(script=script)],
        input="\n".join(CASES) + "\n",
        capture_output=True,
        check=True,
        text=True,
        timeout=60,
    )
    assert ran.stderr == ""
    assert dict(zip(CASES, ran.stdout.split("\n"), strict=False)) == CASES


def test_zsh_takes_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == EXIT_OK
    script = capsys.readouterr().out
    need("completion in zsh", "zsh")
    # In a home of its own, where compinit writes what it has found.
    ran = subprocess.run(
        ["zsh", "-f", "-c", script + "print $_comps[lakebase-auth-proxy]"],
        capture_output=True,
        check=True,
        text=True,
        timeout=60,
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert "_lakebase_auth_proxy" in ran.stdout
