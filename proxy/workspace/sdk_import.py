"""databricks-sdk without the services that are not used here.

Its package imports the code of about sixty services: 33 MB and most of a second of CPU, for three
that are used. So the package is registered here without running its `__init__`, which runs when a
name that it defines is looked up; its modules are imported as usual.

For: `sdk_client`. Invariant: what any version of the SDK imports from itself, it gets, at worst
later and with all services.
"""

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from threading import Lock
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:  # importing it takes long: only in a thread, and only when it is needed
    from databricks.sdk.core import Config
    from databricks.sdk.service.database import DatabaseAPI
    from databricks.sdk.service.iam import CurrentUserAPI
    from databricks.sdk.service.postgres import PostgresAPI

_PACKAGE: Final = "databricks.sdk"

_lock: Final = Lock()


class WorkspaceClient:
    """The part of the SDK's class of this name that is used here."""

    def __init__(self, config: "Config") -> None:
        """Raises ImportError when the SDK cannot be used."""
        skip_package_init()
        from databricks.sdk.core import ApiClient  # noqa: PLC0415 - slow

        self.config = config
        self.api_client = ApiClient(config)

    @property
    def postgres(self) -> "PostgresAPI":
        """The Autoscaling API: projects, branches, endpoints."""
        from databricks.sdk.service.postgres import PostgresAPI  # noqa: PLC0415

        return PostgresAPI(self.api_client)  # type: ignore[no-untyped-call]

    @property
    def database(self) -> "DatabaseAPI":
        """The Provisioned API: instances."""
        from databricks.sdk.service.database import DatabaseAPI  # noqa: PLC0415

        return DatabaseAPI(self.api_client)  # type: ignore[no-untyped-call]

    @property
    def current_user(self) -> "CurrentUserAPI":
        """The identity's own user."""
        from databricks.sdk.service.iam import CurrentUserAPI  # noqa: PLC0415

        return CurrentUserAPI(self.api_client)  # type: ignore[no-untyped-call]


def load() -> None:
    """Import what a mint needs, which takes some tenths of a second; call it in a thread.

    Raises ImportError when the SDK cannot be used.
    """
    skip_package_init()
    for name in ("core", "service.postgres", "service.database"):
        import_module(f"{_PACKAGE}.{name}")


def skip_package_init() -> None:
    """Register the SDK's package without running its `__init__`. Call it before any import."""
    with _lock:
        if _PACKAGE in sys.modules:
            return
        spec = find_spec(_PACKAGE)
        if spec is None:
            return  # the first import from it fails
        package = module_from_spec(spec)
        package.__class__ = _Package
        sys.modules[_PACKAGE] = package
        parent, _, name = _PACKAGE.rpartition(".")
        setattr(sys.modules[parent], name, package)


class _Package(ModuleType):
    """The package before its own code has run."""

    def __getattr__(self, name: str) -> Any:
        """Return a module of the package; for any other name, run the package's code first.

        `from databricks.sdk import x` looks the name up here first.
        """
        spec = self.__spec__
        if name.startswith("__") or spec is None or spec.loader is None:
            raise AttributeError(name)
        if find_spec(f"{_PACKAGE}.{name}") is not None:
            return import_module(f"{_PACKAGE}.{name}")
        self.__class__ = ModuleType  # type: ignore[assignment]
        spec.loader.exec_module(self)
        return getattr(self, name)
