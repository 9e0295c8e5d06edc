"""`completion`: print a script that makes a shell complete verbs and flags.

The script has every word in it, so that completing starts no program. zsh takes bash's.
"""

from collections.abc import Iterator
from shlex import quote
from typing import Final

from proxy.config import settings_keys
from proxy.exit_codes import EXIT_OK
from proxy.verbs import shards
from proxy.verbs.help import metavar_of
from proxy.verbs.syntax import PROGRAM, Arguments, Syntax, UsageError
from proxy.verbs.verb_table import VERBS

_BASH: Final = """\
_lakebase_auth_proxy() {{
    local i verb= given="--help --version {verbs}"
    local settings="--config {settings}"
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "$verb ${{COMP_WORDS[i]}}" in
            *" --") return ;;
{cases}
        esac
    done
    COMPREPLY=($(compgen -W "$given $settings" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o bashdefault -o default -F _lakebase_auth_proxy {program}
"""
_ZSH: Final = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


def run(arguments: Arguments) -> int:
    """Print the script. Raises UsageError."""
    (shell,) = arguments.words
    scripts = {"bash": _bash, "zsh": lambda: _ZSH + _bash(), "fish": _fish}
    if shell not in scripts:
        raise UsageError(f"completion is for one of {', '.join(scripts)}")
    print(scripts[shell](), end="")
    return EXIT_OK


def _bash() -> str:
    cases = [_case(f" {name}", name, syntax) for name, syntax in VERBS.items()]
    cases += [_case(f"shards {name}", name, verb.syntax) for name, verb in shards.VERBS.items()]
    return _BASH.format(
        program=PROGRAM,
        verbs=" ".join(VERBS),
        settings=" ".join(key.flag for key in settings_keys()),
        cases="\n".join(cases),
    )


def _case(seen: str, name: str, syntax: Syntax) -> str:
    """Return what follows a verb: its options, and the verbs of its own."""
    words = ["--help", *(option.flag for option in syntax.options)]
    if name == "shards":
        words += shards.VERBS
    settings = "" if syntax.sections else " settings="
    return f'            "{seen}") verb={name} given="{" ".join(words)}"{settings} ;;'


def _fish() -> str:
    return "".join(f"complete -c {PROGRAM} {rest}\n" for rest in _fish_rules())


def _fish_rules() -> Iterator[str]:
    yield "-l help -s h -d 'print the help'"
    yield "-l config -r -d 'the file with settings'"
    for key in settings_keys():
        yield f"-l {key.flag.removeprefix('--')} -x -d {quote(metavar_of(key))}"
    unseen = f"not __fish_seen_subcommand_from {' '.join(VERBS)}"
    for name, syntax in VERBS.items():
        yield f"-f -n {quote(unseen)} -a {name} -d {quote(syntax.summary)}"
        yield from _fish_options(f"__fish_seen_subcommand_from {name}", syntax)
    own = f"__fish_seen_subcommand_from {' '.join(shards.VERBS)}"
    for name, verb in shards.VERBS.items():
        unseen = f"__fish_seen_subcommand_from shards; and not {own}"
        yield f"-f -n '{unseen}' -a {name} -d {quote(verb.syntax.summary)}"
        seen = f"__fish_seen_subcommand_from shards; and __fish_seen_subcommand_from {name}"
        yield from _fish_options(seen, verb.syntax)


def _fish_options(seen: str, syntax: Syntax) -> Iterator[str]:
    for option in syntax.options:
        takes = " -r" if option.metavar else ""
        yield f"-n {quote(seen)} -l {option.name}{takes} -d {quote(option.help)}"
