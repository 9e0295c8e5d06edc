"""Hypothesis: valid configurations, as what a TOML file says."""

from hypothesis import strategies as st

from proxy.config.toml import toml_path, toml_value

TARGETS = ("eu", "US", "a-b_1")
WORKSPACES = ("main", "Other")

Table = dict[str, object]

_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=15)
_ENDPOINT = st.sampled_from([f"projects/p/branches/b/endpoints/{name}" for name in "xyz"])
_WHERE: st.SearchStrategy[Table] = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"endpoint": st.just("") | _ENDPOINT}),
    st.fixed_dictionaries({"instance": st.sampled_from(["", "shop"])}),
    st.fixed_dictionaries({"host": st.sampled_from(["", "db.example.com"])}),
    st.fixed_dictionaries(
        {"endpoint": _ENDPOINT, "host": st.just("db"), "hostaddr": st.sampled_from(["", "::1"])}
    ),
)
_LOGIN = st.fixed_dictionaries(
    {},
    optional={
        "port": st.integers(1, 65535),
        "database": _TEXT.filter(bool),
        "user": _TEXT,
        "read_only": st.booleans(),
        "connect_retry_seconds": st.floats(0, 600),
        "sslmode": st.sampled_from(["verify-full", "verify-ca", "require"]),
        "ssl_root_cert": _TEXT.filter(bool),
        "connect_timeout_seconds": st.floats(0.1, 600),
        "connects_max": st.integers(1, 10_000),
        "pool": st.sampled_from(["off", "session"]),
        "pool_idle_max": st.integers(100, 10_000),
        "pool_spare_min": st.integers(0, 10),
        "pool_idle_seconds": st.floats(1, 86_400),
        "workspace": st.sampled_from(["", *WORKSPACES]),
    },
)


@st.composite
def _upstreams(draw: st.DrawFn) -> Table:
    return {**draw(_WHERE), **draw(_LOGIN)}


_TARGET_NAME = st.sampled_from([*TARGETS, "upstream"])
_ALIAS = st.one_of(
    _TARGET_NAME,
    st.fixed_dictionaries(
        {"target": _TARGET_NAME}, optional={"database": _TEXT.filter(lambda it: len(it) < 15)}
    ),
)
_BOUND = _TEXT | st.integers(-(2**70), 2**70)
_RANGES = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["range", "hash"]),
        "key_type": st.sampled_from(["int4", "uuid", "timestamptz"]),
        "mappings": st.lists(
            st.fixed_dictionaries(
                {"target": _TARGET_NAME}, optional={"low": _BOUND, "high": _BOUND}
            ),
            min_size=1,
        ),
    }
)
_POINTS = st.fixed_dictionaries(
    {
        "kind": st.just("list"),
        "key_type": st.just("text"),
        "mappings": st.lists(
            st.fixed_dictionaries({"target": _TARGET_NAME, "key": _BOUND}), min_size=1
        ),
    },
    optional={"normalise": st.sampled_from(["none", "nfc", "ascii_lower"])},
)
_FROM_FILE = st.fixed_dictionaries(
    {"kind": st.just("list"), "key_type": st.just("int8"), "mappings_file": _TEXT.filter(bool)}
)


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Table]:
    """Draw a configuration's tables by their paths, as in `targets.eu`; no secret is in it."""
    found: dict[str, Table] = {
        "listen": draw(
            st.fixed_dictionaries(
                {},
                optional={
                    "port": st.integers(0, 65535),
                    "idle_timeout_seconds": st.just(0) | st.floats(1, 604_800),
                },
            )
        ),
        "upstream": draw(_upstreams()),
        "databases": draw(st.dictionaries(_TEXT.filter(bool), _ALIAS, max_size=3)),
        "shard_maps.m": draw(st.one_of(_RANGES, _POINTS, _FROM_FILE)),
        "routing": draw(
            st.fixed_dictionaries(
                {},
                optional={"shard_map": st.sampled_from(["", "m"]), "require_key": st.booleans()},
            )
        ),
    }
    found |= {f"workspaces.{name}": {"profile": draw(_TEXT.filter(bool))} for name in WORKSPACES}
    found |= {f"targets.{name}": draw(_upstreams()) for name in TARGETS}
    return found


def as_toml(found: dict[str, Table]) -> str:
    """Write drawn tables as a file."""
    lines = []
    for path, table in found.items():
        lines.append(f"[{path}]")
        lines += [f"{toml_path([key])} = {toml_value(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"
