"""Loading settings in tests: from TOML text, and the problems of what is refused."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from proxy.config import Configuration, ConfigurationError, Inspect, load

ENDPOINT = "projects/shop/branches/production/endpoints/primary"
ENDPOINT_EU = "projects/shop/branches/production/endpoints/eu"


def written(folder: Path, toml: str) -> list[str]:
    """Write a configuration file and return the flags that name it."""
    file = folder / "proxy.toml"
    file.write_text(toml, encoding="utf-8")
    return ["--config", str(file)]


def refusals(
    argv: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    *,
    upstream_required: bool = False,
    inspect: Sequence[Inspect] = (),
) -> dict[str, str]:
    """Return what is said of each key, a line each, with the place where it was given."""
    with pytest.raises(ConfigurationError) as caught:
        load(argv, environ or {}, upstream_required=upstream_required, inspect=inspect)
    said: dict[str, str] = {}
    for problem in caught.value.problems:
        text = str(problem).removeprefix(problem.key).removeprefix(": ").strip()
        assert text not in said.get(problem.key, ""), "nothing is said twice"
        said[problem.key] = "\n".join(filter(None, [said.get(problem.key), text]))
    return said


def loaded(
    argv: Sequence[str], environ: Mapping[str, str] | None = None, *, dials: bool = False
) -> Configuration:
    """Load what must be valid."""
    return load(argv, environ or {}, upstream_required=dials)
