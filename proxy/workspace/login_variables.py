"""The environment variables that our identity comes from.

For: the environment of a command that we start, which must not have them. Not for: reading them
(`login_settings`).
"""

from collections.abc import Mapping
from typing import Final

from proxy.config import Settings

# All of the SDK's own: some are secrets, some name a file with one, and without the others they are
# of no use.
_PREFIX: Final = "DATABRICKS_"
# The secrets that the SDK reads from other variables; in CI it asks for a token with the last two.
_OTHERS: Final = frozenset(
    (
        *("ARM_CLIENT_SECRET", "GOOGLE_CREDENTIALS"),
        *("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "SYSTEM_ACCESSTOKEN"),
    )
)
# It names the variable in which the SDK looks for a token.
_TOKEN_VARIABLE: Final = "DATABRICKS_OIDC_TOKEN_ENV"  # noqa: S105 - a name


def without_login(environ: Mapping[str, str], settings: Settings) -> dict[str, str]:
    """Return the environment without the variables that the SDK logs in with."""
    workspaces = (settings.workspace, *settings.workspaces.values())
    named = {workspace.oidc_token_env for workspace in workspaces}
    removed = _OTHERS | named | {environ.get(_TOKEN_VARIABLE)}
    return {
        name: value
        for name, value in environ.items()
        if name not in removed and not name.startswith(_PREFIX)
    }
