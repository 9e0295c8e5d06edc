"""The values in force, key by key: what is printed, and what two configurations differ in.

For: a flat view of `Settings` in which inheritance is resolved. Not for: where a value came from.

Invariant: two settings that serve alike have equal values here, however they were given.
"""

from collections.abc import Iterator

from proxy.config.setting_keys import KeyPath, sections
from proxy.config.settings import Settings


def effective_values(settings: Settings) -> Iterator[tuple[KeyPath, object]]:
    """Yield every key with its effective value, in the order of the model.

    A secret is a SecretStr, an alias a DatabaseAlias, a mapping a MappingEntry.
    """
    for section in Settings.model_fields:
        inside = getattr(settings, section)
        if section in sections():
            for name, value in inside:
                yield (section, name), value
        elif section == "databases":
            for alias, value in inside.items():
                yield (section, alias), value
        else:
            for chosen in inside:
                table = settings.target(chosen) if section == "targets" else inside[chosen]
                for name, value in table:
                    yield (section, chosen, name), value
