"""The Kubernetes manifests: true to the API, to the proxy's own settings, and to what they promise.

The API's schemas come with kubernetes-validate; strict refuses a key that the API does not know,
which a cluster may drop without a word.
"""

from collections.abc import Mapping
from pathlib import Path

import kubernetes_validate
import pytest

from proxy import __version__
from proxy.addresses import is_loopback
from proxy.config import Settings, load_settings
from tests.packaging.manifests import (
    KUBERNETES,
    Object,
    documents,
    environment_of,
    pods,
    sidecar,
)

# The first with native sidecars, and the newest that the schemas cover.
VERSIONS = ("1.29", kubernetes_validate.latest_version().rpartition(".")[0])
WORKLOADS = [file for file in KUBERNETES if any(pods(file))]
# Kubelet's own share of the grace period: it counts from before the first signal.
SLACK_SECONDS = 5

files = pytest.mark.parametrize("file", KUBERNETES, ids=lambda file: file.name)
workloads = pytest.mark.parametrize("file", WORKLOADS, ids=lambda file: file.name)


def settings_of(container: Object) -> Settings:
    return load_settings([], environment_of(container), upstream_required=True)


def seconds(settings: Settings) -> float:
    """Return the longest that the proxy takes to end."""
    return settings.shutdown.accept_seconds + settings.shutdown.drain_seconds


@pytest.mark.parametrize("version", VERSIONS)
@files
def test_every_object_is_valid_in_the_api(file: Path, version: str) -> None:
    for document in documents(file):
        kubernetes_validate.validate(document, version, strict=True)


def test_strict_sees_a_key_that_is_misspelled() -> None:
    document = documents(WORKLOADS[0])[-1]
    sidecar(document["spec"]["template"]["spec"])["redinessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, VERSIONS[0], strict=True)


@workloads
def test_the_proxy_takes_the_environment_of_a_manifest(file: Path) -> None:
    for pod in pods(file):
        container = sidecar(pod)
        settings = settings_of(container)
        assert settings.upstream.endpoint
        assert all(map(is_loopback, settings.listen.hosts)), (
            "the database's port stays inside the pod"
        )
        assert container["image"] == f"lakebase-auth-proxy:{__version__}"


@workloads
def test_probes_reach_the_admin_address(file: Path) -> None:
    """A probe comes to the pod's address: with admin.host on loopback no pod would be ready."""
    for pod in pods(file):
        container = sidecar(pod)
        settings = settings_of(container)
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert settings.admin.host == "0.0.0.0"
        for probe in ("startup", "readiness", "liveness"):
            request = container[f"{probe}Probe"]["httpGet"]
            assert request["path"] == f"/{probe}"
            assert ports[request["port"]] == settings.admin.port
            assert "host" not in request


@workloads
def test_a_drain_fits_into_the_grace_period(file: Path) -> None:
    for pod in pods(file):
        needed = seconds(settings_of(sidecar(pod))) + SLACK_SECONDS
        assert needed <= pod["terminationGracePeriodSeconds"]


@workloads
def test_the_sidecar_is_locked_up(file: Path) -> None:
    for pod in pods(file):
        security: Mapping[str, object] = sidecar(pod)["securityContext"]
        assert security["readOnlyRootFilesystem"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert security["runAsUser"] == 65532
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False


@workloads
def test_only_the_sidecar_sees_what_it_logs_in_with(file: Path) -> None:
    for pod in pods(file):
        secrets = {volume["name"] for volume in pod["volumes"]}
        others = [c for c in pod["containers"] if c is not sidecar(pod)]
        mounted = {mount["name"] for c in others for mount in c.get("volumeMounts", [])}
        assert others
        assert not secrets & mounted
        assert {mount["name"] for mount in sidecar(pod)["volumeMounts"]} == secrets
        assert all(environment_of(other)["PGHOST"] == "localhost" for other in others)


def test_a_sidecar_is_native_but_for_the_one_that_says_so() -> None:
    for file in WORKLOADS:
        for pod in pods(file):
            native = sidecar(pod).get("restartPolicy") == "Always"
            assert native == ("initContainers" in pod)
            assert native == ("classic" not in file.name)


def test_the_classic_sidecar_can_be_asked_to_end() -> None:
    (pod,) = pods(next(file for file in WORKLOADS if "classic" in file.name))
    settings = settings_of(sidecar(pod))
    script = pod["containers"][-1]["command"][-1]
    assert settings.admin.quit
    assert settings.shutdown.accept_seconds > 0
    assert f"http://127.0.0.1:{settings.admin.port}/quitquitquit" in script


def test_the_projected_token_is_the_file_that_the_sdk_reads() -> None:
    (pod,) = pods(next(file for file in WORKLOADS if "oidc" in file.name))
    container = sidecar(pod)
    environment = environment_of(container)
    (mount,) = container["volumeMounts"]
    (source,) = pod["volumes"][0]["projected"]["sources"]
    file = f"{mount['mountPath']}/{source['serviceAccountToken']['path']}"
    assert environment["DATABRICKS_OIDC_TOKEN_FILEPATH"] == file
    assert environment["DATABRICKS_AUTH_TYPE"] == "file-oidc"
    assert "DATABRICKS_CLIENT_SECRET" not in environment
    assert not any("secret" in volume for volume in pod["volumes"])
