"""What --help prints: the verbs, or one verb with its options and the settings' keys in groups.

For: people at a terminal. argparse wraps the lines; the keys come from the settings model.
"""

from collections.abc import Mapping
from typing import Final

from proxy.config import SettingKey, named_keys, settings_keys
from proxy.config.toml import toml_value
from proxy.verbs.syntax import PROGRAM, OptionParser, Syntax

_TAIL: Final = """\
Every key of config.example.toml is a flag (--listen.port 6000) and an
environment variable (LAKEBASE_PROXY_LISTEN__PORT=6000). A flag beats the
environment, which beats the file. Flags stand before or after the verb.
"""
_CONFIG: Final = "the file with settings, as TOML (or LAKEBASE_PROXY_CONFIG)"
# Sections that have the keys of another one.
_EXPLAINED_AS: Final = {"targets": "upstream", "workspaces": "workspace"}


def overview(syntaxes: Mapping[str, Syntax]) -> str:
    """Return the help of the program."""
    width = max(map(len, syntaxes))
    verbs = "".join(f"  {name:<{width}}  {one.summary}\n" for name, one in syntaxes.items())
    return (
        f"usage: {PROGRAM} VERB [--config FILE] [--SECTION.KEY VALUE ...]\n\n{verbs}\n"
        "VERB --help lists what a verb takes; --version prints the version.\n\n" + _TAIL
    )


def help_of(syntax: Syntax) -> str:
    """Return the help of a verb."""
    parser = OptionParser(syntax)
    if syntax.sections:
        settings = parser.add_argument_group("settings")
        settings.add_argument("--config", metavar="FILE", help=_CONFIG)
    for section in syntax.sections:
        keys = [key for key in (*settings_keys(), *named_keys()) if key.path[0] == section]
        if section in _EXPLAINED_AS:
            text = f"the keys of {_EXPLAINED_AS[section]}, as in {keys[0].flag}"
            parser.add_argument_group(keys[0].section, text)
            continue
        group = parser.add_argument_group(keys[0].section)
        for key in keys:
            text = described(key).replace("%", "%%")  # argparse fills in what follows one
            group.add_argument(key.flag, metavar=metavar_of(key), help=text)
    return parser.format_help()


def metavar_of(key: SettingKey) -> str:
    """Return what stands for the value of a key."""
    return "true|false" if key.is_boolean else key.name.rpartition("_")[2].upper()


def described(key: SettingKey) -> str:
    """Return the first sentence on a key, its bounds and its default."""
    first = key.description.partition(". ")[0].rstrip(".") + "."
    default = "" if key.default in (None, "") or key.is_secret else _default(key.default)
    return " ".join(filter(None, (first, key.bounds, default)))


def _default(value: object) -> str:
    return f"Default: {toml_value(value)}."
