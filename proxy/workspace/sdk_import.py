"""databricks-sdk without the services that nobody here calls.

Its package imports the code of every service, some sixty of them: 33 MB and most of a second of
CPU for three that are used. So the package is entered here without its own `__init__`, which runs
as soon as somebody asks for a name that it defines; modules inside are imported as ever.

For: `Workspace`. The invariant: whatever a version of the SDK imports from where, it gets what it
would have got, at worst later and with all services.
"""

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from threading import Lock
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:  # importing any of it takes long: only in a thread, and only once needed
    from databricks.sdk.core import Config
    from databricks.sdk.service.database import DatabaseAPI
    from databricks.sdk.service.iam import CurrentUserAPI
    from databricks.sdk.service.postgres import PostgresAPI

_PACKAGE: Final = "databricks.sdk"

_lock: Final = Lock()


class WorkspaceClient:
    """What is used here of the SDK's class of this name, made from the same parts."""

    def __init__(self, config: "Config") -> None:
        """Raises ImportError when the SDK cannot be used."""
        skip_package_init()
        from databricks.sdk.core import ApiClient  # noqa: PLC0415 - slow: see above

        self.config = config
        self.api_client = ApiClient(config)

    @property
    def postgres(self) -> "PostgresAPI":
        """Autoscaling: projects, branches, endpoints."""
        from databricks.sdk.service.postgres import PostgresAPI  # noqa: PLC0415

        return PostgresAPI(self.api_client)  # type: ignore[no-untyped-call]

    @property
    def database(self) -> "DatabaseAPI":
        """Provisioned: instances."""
        from databricks.sdk.service.database import DatabaseAPI  # noqa: PLC0415

        return DatabaseAPI(self.api_client)  # type: ignore[no-untyped-call]

    @property
    def current_user(self) -> "CurrentUserAPI":
        """Who we are."""
        from databricks.sdk.service.iam import CurrentUserAPI  # noqa: PLC0415

        return CurrentUserAPI(self.api_client)  # type: ignore[no-untyped-call]


def load() -> None:
    """Import what a mint needs, which takes some tenths of a second. For a thread.

    Raises ImportError when the SDK cannot be used.
    """
    skip_package_init()
    for name in ("core", "service.postgres", "service.database"):
        import_module(f"{_PACKAGE}.{name}")


def skip_package_init() -> None:
    """Let modules of the SDK be imported without all the others. Call it before any of them."""
    with _lock:
        if _PACKAGE in sys.modules:
            return
        spec = find_spec(_PACKAGE)
        if spec is None:
            return  # whoever imports from it says so
        package = module_from_spec(spec)
        package.__class__ = _Package
        sys.modules[_PACKAGE] = package
        parent, _, name = _PACKAGE.rpartition(".")
        setattr(sys.modules[parent], name, package)


class _Package(ModuleType):
    """The package before its own code has run."""

    def __getattr__(self, name: str) -> Any:
        """Return a module inside; for any other name run the package's code, which may define it.

        `from databricks.sdk import x` asks here first.
        """
        spec = self.__spec__
        if name.startswith("__") or spec is None or spec.loader is None:
            raise AttributeError(name)
        if find_spec(f"{_PACKAGE}.{name}") is not None:
            return import_module(f"{_PACKAGE}.{name}")
        self.__class__ = ModuleType  # type: ignore[assignment]
        spec.loader.exec_module(self)
        return getattr(self, name)
