"""`demo`: the whole system on this machine."""

import os
from collections.abc import Sequence

from proxy.config import Settings, load_settings
from proxy.demo import DemoError, demonstrating, greeting
from proxy.process import Signals, until_stopped
from proxy.verbs.running import until_done
from proxy.verbs.telling import fail


def run(arguments: Sequence[str]) -> int:
    """Run stand-in and proxy until told to stop. Raises ConfigurationError."""
    # The guide's variables point at a real Lakebase: the demo has its own.
    own = {name: value for name, value in os.environ.items() if name.startswith("LAKEBASE_PROXY_")}
    settings = load_settings(arguments, {"LAKEBASE_PROXY_LOG__LEVEL": "warning", **own})
    try:
        return until_done(settings, _serve)
    except ImportError as error:
        return fail(f"{error}. For the demo: pip install 'lakebase-auth-proxy[demo]'")
    except DemoError as error:
        return fail(f"the demo cannot start: {error}")


async def _serve(settings: Settings) -> int:
    signals = Signals()
    async with demonstrating(settings) as (app, lakebase):
        print(greeting(app, lakebase), flush=True)
        return await until_stopped(app, signals)
