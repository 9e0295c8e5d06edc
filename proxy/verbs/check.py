"""`check`: walk the whole way once, and print each step."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Final

from proxy.check import Step, as_line, check
from proxy.config import LogSettings, Settings
from proxy.exit_codes import EXIT_FAILURE, EXIT_OK
from proxy.process import Signals
from proxy.verbs.running import PRINT_CONFIG, print_config, settings_of, until_done
from proxy.verbs.telling import fail

_JSON: Final = "--json"
_ALL_SHARDS: Final = "--all-shards"


def run(arguments: Sequence[str]) -> int:
    """Walk and print, or print the values in force. Raises ConfigurationError."""
    if PRINT_CONFIG in arguments:
        return print_config(arguments)
    flags = [argument for argument in arguments if argument not in (_JSON, _ALL_SHARDS)]

    async def walk_or_stop(settings: Settings) -> int:
        try:
            return await _walk(
                settings, as_json=_JSON in arguments, all_targets=_ALL_SHARDS in arguments
            )
        except asyncio.CancelledError:
            return fail("check was interrupted")  # 0 would say that all is well

    settings = settings_of(flags)
    quiet = settings.model_copy(update={"log": LogSettings(level="error")})
    return until_done(quiet, walk_or_stop)


async def _walk(settings: Settings, *, as_json: bool, all_targets: bool) -> int:
    Signals()  # which end it quietly
    steps: list[Step] = []
    async for step in check(settings, all_targets=all_targets):
        if not as_json:
            if all_targets and (not steps or steps[-1].target != step.target):
                print(f"target {step.target}")
            print(as_line(step), flush=True)
        steps.append(step)
    good = all(step.ok for step in steps)
    if as_json:
        print(json.dumps({"ok": good, "steps": [asdict(step) for step in steps]}))
    return EXIT_OK if good else EXIT_FAILURE
