"""What a person applies to a cluster: true to the API, to the proxy, and to what it promises.

kubectl renders the kustomizations and helm the chart. The API's schemas come with
kubernetes-validate; strict refuses a key that the API does not know, which a cluster may drop
without a word. It knows no PodMonitor, which is the Prometheus Operator's.
"""

import os
import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from proxy import __version__
from proxy.addresses import is_loopback
from proxy.config import Settings, load_settings
from tests.packaging.manifests import (
    APPLIED,
    CHART,
    KUBERNETES,
    ROOT,
    SIDECAR,
    Object,
    as_bytes,
    config_files,
    documents,
    environment_of,
    parsed,
    pod_of,
    sidecar,
    tool,
)

# The first with native sidecars, and the newest that the schemas cover.
VERSIONS = ("1.29", kubernetes_validate.latest_version().rpartition(".")[0])
NATIVE = [name for name in APPLIED if name != "job-classic"]
MOUNT = "/etc/lakebase-auth-proxy"
# Kubelet's own share of the grace period: it counts from before the first signal.
SLACK_SECONDS = 5
# What a pod that says nothing has.
GRACE_SECONDS = 30

DOCUMENT = (ROOT / "docs" / "kubernetes.md").read_text()

applied = pytest.mark.parametrize("name", APPLIED)


def settings_of(name: str, directory: Path) -> Settings:
    """Return what the sidecar of an example runs with; its files are in `directory`."""
    objects = documents(name)
    for file, text in config_files(objects).items():
        (directory / file).write_text(text.replace(f"{MOUNT}/shards", f"{directory}/shards"))
    environment = environment_of(sidecar(pod_of(objects)))
    path = environment["LAKEBASE_PROXY_CONFIG"]
    assert Path(path).parent == Path(MOUNT)
    environment["LAKEBASE_PROXY_CONFIG"] = str(directory / Path(path).name)
    return load_settings([], environment, upstream_required=True)


def seconds(settings: Settings) -> float:
    """Return the longest that the proxy takes to end."""
    return settings.shutdown.accept_seconds + settings.shutdown.drain_seconds


def source_of_the_sidecar() -> Object:
    return pod_of(parsed((SIDECAR / "sidecar.yaml").read_text()))


@pytest.mark.parametrize("version", VERSIONS)
@applied
def test_every_object_is_valid_in_the_api(name: str, version: str) -> None:
    for document in documents(name):
        if document["kind"] != "PodMonitor":
            kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_network_policy_is_valid_in_the_api(version: str) -> None:
    (policy,) = parsed((KUBERNETES / "network-policy.yaml").read_text())
    kubernetes_validate.validate(policy, version, strict=True)


def test_strict_sees_a_key_that_is_misspelled() -> None:
    (workload,) = (one for one in documents("job") if one["kind"] == "Job")
    sidecar(workload["spec"]["template"]["spec"])["redinessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(workload, VERSIONS[0], strict=True)


@pytest.mark.parametrize("name", NATIVE)
def test_helm_and_kustomize_render_the_same_bytes_for_sidecar_and_volume(name: str) -> None:
    pod, source = pod_of(documents(name)), source_of_the_sidecar()
    assert as_bytes(sidecar(pod)) == as_bytes(sidecar(source))
    assert as_bytes(pod["volumes"]) == as_bytes(source["volumes"])


def test_any_workload_gets_the_sidecar_and_keeps_what_it_has(tmp_path: Path) -> None:
    pod: Object = {
        "terminationGracePeriodSeconds": 300,
        "securityContext": {"fsGroup": 2000},
        "initContainers": [{"name": "first", "image": "first:1"}],
        "containers": [{"name": "application", "image": "application:1"}],
        "volumes": [{"name": "own", "emptyDir": {}}],
    }
    workload = {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": "other"},
        "spec": {"serviceName": "other", "template": {"spec": pod}},
    }
    (tmp_path / "workload.yaml").write_text(yaml.safe_dump(workload))
    kustomization = {
        "resources": ["workload.yaml"],
        "components": [os.path.relpath(SIDECAR, tmp_path)],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    (patched,) = parsed(tool("kubectl", "kustomize", tmp_path))
    source = source_of_the_sidecar()
    found = patched["spec"]["template"]["spec"]
    assert found.pop("initContainers") == [*source["initContainers"], *pod.pop("initContainers")]
    assert found.pop("volumes") == [*source["volumes"], *pod.pop("volumes")]
    assert found == pod


def test_the_steps_of_the_document_put_the_sidecar_beside_a_deployment(tmp_path: Path) -> None:
    """What a person writes by docs/kubernetes.md, in a folder beside a clone."""
    steps = DOCUMENT.partition("## Put it beside a Deployment")[2].partition("\n## ")[0]
    (settings,) = re.findall(r"```toml\n(.*?)```", steps, re.DOTALL)
    kustomization, environment = re.findall(r"```yaml\n(.*?)```", steps, re.DOTALL)
    (tmp_path / "lakebase-auth-proxy").symlink_to(ROOT)
    own = tmp_path / "own"
    own.mkdir()
    (own / "proxy.toml").write_text(settings)
    (own / "kustomization.yaml").write_text(kustomization.replace("REGISTRY", "registry.example"))
    container = {"name": "application", "image": "application:1.0", **yaml.safe_load(environment)}
    labels = {"app": "application"}
    pod = {"metadata": {"labels": labels}, "spec": {"containers": [container]}}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "application"},
        "spec": {"selector": {"matchLabels": labels}, "template": pod},
    }
    (own / "application.yaml").write_text(yaml.safe_dump(deployment))
    objects = parsed(tool("kubectl", "kustomize", own))
    for document in objects:
        kubernetes_validate.validate(document, VERSIONS[0], strict=True)
    proxy = sidecar(pod_of(objects))
    assert proxy["image"] == "registry.example/lakebase-auth-proxy:0.1.0"
    (tmp_path / "proxy.toml").write_text(config_files(objects)["proxy.toml"])
    config = {"LAKEBASE_PROXY_CONFIG": str(tmp_path / "proxy.toml")}
    loaded = load_settings([], {**environment_of(proxy), **config}, upstream_required=True)
    (secret,) = re.findall(r"--from-file=([\w-]+)=FILE", steps)
    assert loaded.workspace.client_secret_file == f"{MOUNT}/{secret}"


def test_a_chart_of_ones_own_puts_the_sidecar_into_its_pods(tmp_path: Path) -> None:
    """A chart that depends on this one, as docs/kubernetes.md shows."""
    (tmp_path / "charts").mkdir()
    (tmp_path / "charts" / "lakebase-auth-proxy").symlink_to(SIDECAR)
    (tmp_path / "templates").mkdir()
    chart = {"apiVersion": "v2", "name": "own", "version": "1.0.0"}
    (tmp_path / "Chart.yaml").write_text(yaml.safe_dump(chart))
    template = DOCUMENT.partition("```yaml\n# templates/")[2].partition("\n")[2].partition("```")[0]
    (tmp_path / "templates" / "deployment.yaml").write_text(template)
    objects = parsed(tool("helm", "template", "own", tmp_path))
    assert as_bytes(sidecar(pod_of(objects))) == as_bytes(sidecar(source_of_the_sidecar()))
    assert pod_of(objects)["volumes"] == source_of_the_sidecar()["volumes"]
    for document in objects:
        kubernetes_validate.validate(document, VERSIONS[0], strict=True)


def test_the_chart_names_another_image_and_another_secret() -> None:
    values = ("--set", "image=registry.example.com/proxy:1", "--set", "name=other")
    chart = ("--set-json", 'containers=[{"name":"a","image":"a:1"}]')
    objects = parsed(tool("helm", "template", "own", SIDECAR, *values, *chart))
    pod = pod_of(objects)
    assert sidecar(pod)["image"] == "registry.example.com/proxy:1"
    config, secret, _ = pod["volumes"][0]["projected"]["sources"]
    assert (config["configMap"]["name"], secret["secret"]["name"]) == ("other", "other")
    assert [one["metadata"]["name"] for one in objects if one["kind"] == "ConfigMap"] == ["other"]


def test_helm_has_nothing_to_say() -> None:
    said = tool("helm", "lint", "--strict", SIDECAR)
    assert "1 chart(s) linted, 0 chart(s) failed" in said


def test_the_versions_are_those_of_the_package() -> None:
    chart = yaml.safe_load((SIDECAR / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__
    for name in APPLIED:
        image = sidecar(pod_of(documents(name)))["image"]
        assert image == f"lakebase-auth-proxy:{__version__}"


def test_a_pod_monitor_finds_the_sidecar() -> None:
    objects = documents(CHART)
    (monitor,) = (one for one in objects if one["kind"] == "PodMonitor")
    (deployment,) = (one for one in objects if one["kind"] == "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    ports = sidecar(pod_of(objects))["ports"]
    assert endpoint["port"] in {port["name"] for port in ports}
    assert endpoint["path"] == "/metrics"


@applied
def test_the_proxy_takes_its_environment_and_its_files(name: str, tmp_path: Path) -> None:
    settings = settings_of(name, tmp_path)
    assert all(settings.target(target).endpoint for target in settings.target_names())
    assert settings.reload.watch
    assert all(map(is_loopback, settings.listen.hosts)), "the database's port stays in the pod"


@applied
def test_probes_reach_the_admin_address(name: str, tmp_path: Path) -> None:
    """A probe comes to the pod's address: with admin.host on loopback no pod would be ready."""
    container, settings = sidecar(pod_of(documents(name))), settings_of(name, tmp_path)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert settings.admin.host == "0.0.0.0"
    for probe in ("startup", "readiness", "liveness"):
        request = container[f"{probe}Probe"]["httpGet"]
        assert request["path"] == f"/{probe}"
        assert ports[request["port"]] == settings.admin.port
        assert "host" not in request


@applied
def test_a_drain_fits_into_the_grace_period(name: str, tmp_path: Path) -> None:
    given = pod_of(documents(name)).get("terminationGracePeriodSeconds", GRACE_SECONDS)
    if name in NATIVE:
        given = min(given, GRACE_SECONDS)  # of any workload that gets the sidecar
    assert seconds(settings_of(name, tmp_path)) + SLACK_SECONDS <= given


@applied
def test_the_sidecar_is_locked_up(name: str) -> None:
    assert sidecar(pod_of(documents(name)))["securityContext"] == {
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "runAsGroup": 65532,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


@applied
def test_only_the_sidecar_sees_what_it_logs_in_with(name: str) -> None:
    pod = pod_of(documents(name))
    others = [one for one in pod["containers"] if one["name"] != sidecar(pod)["name"]]
    assert others
    assert not any(one.get("volumeMounts") for one in others)
    assert all(environment_of(other)["PGHOST"] == "localhost" for other in others)
    (volume,) = pod["volumes"]
    (mount,) = sidecar(pod)["volumeMounts"]
    assert (mount["name"], mount["mountPath"]) == (volume["name"], MOUNT)


def test_a_sidecar_is_native_but_for_the_one_that_says_so() -> None:
    for name in APPLIED:
        pod = pod_of(documents(name))
        native = sidecar(pod).get("restartPolicy") == "Always"
        assert native == ("initContainers" in pod) == (name in NATIVE)


def test_the_classic_sidecar_can_be_asked_to_end(tmp_path: Path) -> None:
    settings = settings_of("job-classic", tmp_path)
    script = pod_of(documents("job-classic"))["containers"][0]["command"][-1]
    assert settings.admin.quit
    assert settings.shutdown.accept_seconds > 0
    assert f"http://127.0.0.1:{settings.admin.port}/quitquitquit" in script


def test_what_it_logs_in_with_is_where_the_files_say(tmp_path: Path) -> None:
    _, secret, token = source_of_the_sidecar()["volumes"][0]["projected"]["sources"]
    with_secret, with_token = tmp_path / "secret", tmp_path / "token"
    with_secret.mkdir()
    with_token.mkdir()
    workspace = settings_of("deployment", with_secret).workspace
    (item,) = secret["secret"]["items"]
    assert workspace.client_secret_file == f"{MOUNT}/{item['path']}"
    workspace = settings_of("deployment-oidc", with_token).workspace
    assert workspace.oidc_token_filepath == f"{MOUNT}/{token['serviceAccountToken']['path']}"
    assert workspace.auth_type == "file-oidc"
    assert workspace.client_secret_file == ""


def test_the_map_of_the_example_is_read(tmp_path: Path) -> None:
    settings = settings_of("shard-map", tmp_path)
    (shard_map,) = settings.shard_maps.values()
    assert shard_map.mappings_file == f"{tmp_path}/shards.csv"
    rows = (tmp_path / "shards.csv").read_text().splitlines()[1:]
    assert {row.rpartition(",")[2] for row in rows} == settings.targets.keys()
