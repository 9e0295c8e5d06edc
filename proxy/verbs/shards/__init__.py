"""`shards VERB`: the catalogue of shard maps, as an administrator fills and reads it.

For: from arguments to an answer and an exit code. Each group of verbs has a module; `arguments`,
`output`, `administration` and `verb` are what they share.

Invariant: arguments are judged before anything is asked of a database, and standard output has the
answer alone.
"""

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import Final

from proxy.catalogue.errors import CatalogueError, translated
from proxy.catalogue.operation import Reach, pass_by
from proxy.config import LogSettings, Settings, load_settings
from proxy.errors import ProxyError
from proxy.exit_codes import EXIT_OK
from proxy.server.process import Signals
from proxy.verbs.event_loop import run_on_event_loop
from proxy.verbs.help import help_of
from proxy.verbs.shards import (
    attach_verbs,
    key_verbs,
    lock_verbs,
    map_verbs,
    mapping_verbs,
    move_verbs,
    operation_verbs,
    recovery_verbs,
    shard_verbs,
    split_verbs,
    store_verbs,
)
from proxy.verbs.shards.administration import administering, check_target
from proxy.verbs.shards.arguments import Arguments
from proxy.verbs.shards.output import Output
from proxy.verbs.shards.verb import Call, Verb
from proxy.verbs.stderr import fail
from proxy.verbs.syntax import PROGRAM, Syntax, UsageError, one_of, take_verb

VERBS: Final[Mapping[str, Verb]] = {
    **store_verbs.VERBS,
    **map_verbs.VERBS,
    **shard_verbs.VERBS,
    **mapping_verbs.VERBS,
    **move_verbs.VERBS,
    **split_verbs.VERBS,
    **lock_verbs.VERBS,
    **key_verbs.VERBS,
    **recovery_verbs.VERBS,
    **attach_verbs.VERBS,
    **operation_verbs.VERBS,
}
_SYNTAXES: Final[Mapping[str, Syntax]] = {name: verb.syntax for name, verb in VERBS.items()}


_NOTES: Final = """
It reads the sidecar's settings: [catalogue] says where, the users of its
target and of [upstream] as whom. RANGE is KEY in a list map, LOW HIGH in the
others; what begins with two dashes follows --. Verbs that write take --dry-run.
shards VERB --help has a verb's words and flags. Exit codes: 0 done, 1 refused
or failed, 2 usage or configuration, 4 an operation is left pending, 5 verify
has found differences.
"""


def help_of_verb(arguments: Sequence[str]) -> str:
    """Return the help of the verb in the arguments, or the list of all. Raises UsageError."""
    word, _ = take_verb(arguments, _SYNTAXES, ("--help", "-h"))
    if word:
        return help_of(VERBS[word].syntax)
    verbs = "".join(f"  {name:<13} {verb.syntax.summary}\n" for name, verb in VERBS.items())
    return f"usage: {PROGRAM} shards VERB ... [--map NAME] [--json] [settings]\n\n{verbs}{_NOTES}"


def run(arguments: Sequence[str], reach: Reach = pass_by) -> int:
    """Do what the verb says, and print its answer. Raises UsageError and ConfigurationError.

    `reach` is called at each point of an operation: tests end the process there.
    """
    verb, parsed, settings = read(arguments)

    async def program(settings: Settings) -> int:
        Signals()  # which cancel this task
        try:
            return await answer(verb, parsed, settings, reach)
        except asyncio.CancelledError:
            return fail("shards was interrupted")

    return run_on_event_loop(settings, program)


def read(arguments: Sequence[str]) -> tuple[Verb, Arguments, Settings]:
    """Return the verb, its arguments and the settings. Asks no database.

    Raises UsageError and ConfigurationError.
    """
    word, rest = take_verb(arguments, _SYNTAXES)
    if not word:
        raise UsageError(f"shards needs a verb: {one_of(VERBS)}")
    verb = VERBS[word]
    parsed = Arguments.parse(rest, verb.syntax)
    verb.judge(parsed)
    settings = load_settings(parsed.flags, os.environ, upstream_required=True)
    check_target(settings)
    verb.check_map_name(parsed, settings)
    return verb, parsed, settings.model_copy(update={"log": LogSettings(level="error")})


async def answer(
    verb: Verb, arguments: Arguments, settings: Settings, reach: Reach = pass_by
) -> int:
    """Run the verb. Return the exit code; a refusal is printed."""
    output = Output(as_json=arguments.as_json)
    try:
        async with administering(settings) as administration:
            return await verb.run(Call(arguments, administration, output, reach)) or EXIT_OK
    except CatalogueError as error:
        return output.refuse(error)
    except ProxyError as error:  # of a key or a bound: a database is named where it is asked
        return output.refuse(translated(error, "the argument"))
    finally:
        output.progress.stop()
