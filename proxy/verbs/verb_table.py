"""The verbs of the command line: what each takes and what it does, in one table.

For: choosing a verb, its help, completion and the manual, without importing the verb. A new verb is
a line here and a module of its name with `run(arguments)`.
"""

from collections.abc import Mapping
from typing import Final

from proxy.config import Settings
from proxy.verbs.syntax import ANY_NUMBER, JSON, PRINT_CONFIG, Option, Syntax

# The options that verbs read by name.
ALL_SHARDS: Final = Option("all-shards", "test every target, not only the usual one")
BRANCH: Final = Option("branch", "the branch's id, where there are several", "ID")
BUILD: Final = Option("build", "also print whether the relay was compiled")
END: Final = Option("end", "end this session (it needs admin.quit)", "ID")
GATEWAY_PORT: Final = Option(
    "gateway-port", "the emulator's port for programs that log in themselves (a free one)", "PORT"
)
HTTPS: Final = Option("https", "serve the workspace API over HTTPS, too")
PROCESSES: Final = Option(
    "processes", "with --sessions: also the processes of clients on this machine"
)
PROJECT: Final = Option("project", "the project's id, where there are several", "ID")
ROLE: Final = Option("role", "the identity that the proxy will log in as, if it is another", "NAME")
SESSIONS: Final = Option("sessions", "also print who is connected")
SHARD_KEY: Final = Option("shard-key", "connect to the shard that has the key", "KEY")
SOCKET: Final = Option("socket", "take a unix socket in a private directory, and no port")
SQL: Final = Option("sql", "print only the SQL: for psql")
TIMEOUT: Final = Option("timeout", "how long to wait (30)", "SECONDS")
TOML: Final = Option("toml", "print TOML, and not variables of the environment")
URL: Final = Option("url", "print a URL with the key, for an application beside the proxy")
WATCH: Final = Option("watch", "print it again every two seconds, until it is interrupted")

_ALL_SECTIONS: Final = tuple(Settings.model_fields)
_DIALLING: Final = (
    *("upstream", "targets", "workspace", "workspaces", "credentials", "databases", "routing"),
    *("shard_maps", "catalogue"),
)

VERBS: Final[Mapping[str, Syntax]] = {
    "run": Syntax(
        "run [--print-config] [settings]",
        "connect local Postgres clients to Databricks Lakebase",
        options=(PRINT_CONFIG,),
        sections=_ALL_SECTIONS,
    ),
    "exec": Syntax(
        "exec [--socket] [--shard-key KEY] [settings] -- COMMAND ...",
        "run a command beside a proxy of its own; end with its exit code",
        words_max=ANY_NUMBER,
        options=(SOCKET, SHARD_KEY),
        sections=(*_DIALLING, "shutdown", "log"),
    ),
    "check": Syntax(
        "check [--json] [--all-shards] [--print-config] [settings]",
        "test each step of a connection; print what fails, and the fix",
        options=(JSON, ALL_SHARDS, PRINT_CONFIG),
        sections=_ALL_SECTIONS,
    ),
    "init": Syntax(
        "init [--project ID] [--branch ID] [--role NAME] [--toml | --sql] [settings]",
        "find an endpoint; print a configuration, and SQL for the role",
        options=(PROJECT, BRANCH, ROLE, TOML, SQL),
        sections=("workspace", "credentials", "upstream"),
    ),
    "demo": Syntax(
        "demo [--gateway-port PORT] [--https] [settings]",
        "run the whole system on this machine, nothing to sign up for",
        options=(GATEWAY_PORT, HTTPS),
        sections=("listen", "admin", "upstream", "shutdown", "log"),
    ),
    "resolve": Syntax(
        "resolve KEY [--url | --json] [settings]",
        "print where a shard key leads, without connecting",
        1,
        1,
        options=(URL, JSON),
        sections=("listen", *_DIALLING),
    ),
    "shards": Syntax(
        "shards VERB ... [settings]",
        "administer the catalogue of shard maps (has verbs of its own)",
        sections=(*_DIALLING, "log"),
    ),
    "wait": Syntax(
        "wait [--timeout SECONDS] [settings]",
        "wait until a running proxy is ready",
        options=(TIMEOUT,),
        sections=("admin",),
    ),
    "status": Syntax(
        "status [[--sessions [--processes]] [--watch] | --end ID] [--json] [settings]",
        "print what a running proxy does, and who is connected",
        options=(SESSIONS, PROCESSES, WATCH, JSON, END),
        sections=("admin",),
    ),
    "reconnect": Syntax(
        "reconnect [settings]",
        "ask a running proxy to replace the sessions of its pools",
        sections=("admin",),
    ),
    "reload": Syntax(
        "reload [settings]",
        "ask a running proxy to read its configuration again",
        sections=("admin",),
    ),
    "shutdown": Syntax(
        "shutdown [settings]",
        "ask a running proxy to drain and end (it needs admin.quit)",
        sections=("admin",),
    ),
    "completion": Syntax(
        "completion bash | zsh | fish",
        "print a script that makes a shell complete verbs and flags",
        1,
        1,
    ),
    "version": Syntax("version [--build]", "print the version", options=(BUILD,)),
}
