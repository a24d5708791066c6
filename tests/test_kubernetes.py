"""The files of examples/kubernetes are what Kubernetes and KServe take, and what serves."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from lminf_export.cli.serve import serve_command
from lminf_export.serve.metrics import described
from tests.support import serving
from tests.support.kserve_fields import KServeFields

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "kubernetes"
VERSION = "1.37"
# Resources of others' definitions, whose schemas Kubernetes does not have.
OF_OTHERS = {
    "BackendTrafficPolicy",
    "DestinationRule",
    "HTTPRoute",
    "InferenceService",
    "Kustomization",
    "ServiceMonitor",
}
# Fields that KServe's predictor has besides those of a pod.
OF_PREDICTOR = {"labels", "minReplicas", "maxReplicas", "scaleMetric", "scaleTarget"}


def resources(name="*"):
    """Resources of the files, by file and kind."""
    return {
        (path.stem, found["kind"], found["metadata"]["name"] if "metadata" in found else ""): found
        for path in sorted(FOLDER.glob(f"{name}.yaml"))
        for found in yaml.safe_load_all(path.read_text(encoding="utf-8"))
        if "kind" in found
    }


ALL = resources()
[DEPLOYMENT] = resources("deployment").values()
[INFERENCE_SERVICE] = resources("kserve").values()
PREDICTOR = INFERENCE_SERVICE["spec"]["predictor"]
PODS = {"deployment": DEPLOYMENT["spec"]["template"]["spec"], "kserve": PREDICTOR}


def options(pod):
    return dict(x.split("=", 1) for x in pod["containers"][0]["args"] if x.startswith("--"))


@pytest.mark.parametrize("place", [key for key in ALL if key[1] not in OF_OTHERS])
def test_kubernetes_schemas_take_it(place):
    validate = pytest.importorskip("kubernetes_validate").validate
    assert validate(ALL[place], VERSION, strict=True) == VERSION


def test_the_schemas_refuse_a_field_that_there_is_not():
    """As a slip of the pen would be; a schema that is not strict lets it pass."""
    module = pytest.importorskip("kubernetes_validate")
    wrong = yaml.safe_load(yaml.safe_dump(DEPLOYMENT))
    wrong["spec"]["template"]["spec"]["terminationGracePeriod"] = 75
    with pytest.raises(module.ValidationError, match="terminationGracePeriod"):
        module.validate(wrong, VERSION, strict=True)


def test_the_predictor_is_a_pod_beside_what_kserve_adds():
    validate = pytest.importorskip("kubernetes_validate").validate
    assert PREDICTOR.keys() >= OF_PREDICTOR
    pod = {key: value for key, value in PREDICTOR.items() if key not in OF_PREDICTOR}
    validate({"apiVersion": "v1", "kind": "Pod", "spec": pod}, VERSION, strict=True)


@pytest.mark.registry
def test_kserve_knows_the_fields_of_the_predictor(tmp_path):
    known = KServeFields.from_registry("kserve==0.21.0", tmp_path)
    assert not known.unknown(INFERENCE_SERVICE, "V1beta1InferenceService")
    wrong = {**INFERENCE_SERVICE, "spec": {"predictor": {**PREDICTOR, "minReplica": 2}}}
    assert known.unknown(wrong, "V1beta1InferenceService") == ["spec.predictor.minReplica"]


@pytest.mark.parametrize("name", PODS)
def test_the_servers_may_do_nothing_that_they_need_not(name):
    pod = PODS[name]
    [container] = pod["containers"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    # Else the node walks through every conversation of the store before a pod starts.
    assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "privileged": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert (
        container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
    )
    variables = {entry["name"]: entry for entry in container["env"]}
    assert not [name for name in variables if "KEY" in name or "SECRET" in name]


@pytest.mark.parametrize("name", PODS)
def test_a_server_has_the_time_to_end_that_it_takes(name):
    pod = PODS[name]
    [container] = pod["containers"]
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    answers = float(options(pod)["--shutdown-seconds"])
    # What is left is for writing conversations.
    assert pod["terminationGracePeriodSeconds"] >= before + answers + 30
    probe = container["readinessProbe"]
    assert before >= probe["periodSeconds"]


@pytest.mark.parametrize("name", PODS)
def test_probes_ports_and_options_are_the_servers(name):
    pod = PODS[name]
    [container] = pod["containers"]
    known = {option for parameter in serve_command.params for option in parameter.opts}
    assert options(pod).keys() <= known
    [port] = container["ports"]
    assert int(options(pod)["--port"]) == port["containerPort"]
    paths = {}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[probe]["httpGet"]
        assert asked["port"] in (port["name"], port["containerPort"])
        paths[probe] = asked["path"]
    assert paths == {
        "startupProbe": "/readyz",
        "readinessProbe": "/readyz",
        "livenessProbe": "/healthz",
    }
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


# KServe gives them to its pods and its Service.
LABELS = {
    "deployment": DEPLOYMENT["spec"]["template"]["metadata"]["labels"],
    "kserve": INFERENCE_SERVICE["metadata"]["labels"],
    "kserve's predictor": PREDICTOR["labels"],
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_what_selects_the_servers_selects_them(labels):
    selectors = {
        "service": ("Service", "lminf", ("spec", "selector")),
        "disruption": ("PodDisruptionBudget", "lminf", ("spec", "selector", "matchLabels")),
        "network": ("NetworkPolicy", "lminf", ("spec", "podSelector", "matchLabels")),
        "network-bucket": (
            "NetworkPolicy",
            "lminf-bucket",
            ("spec", "podSelector", "matchLabels"),
        ),
        "affinity-istio": (
            "NetworkPolicy",
            "lminf-istio",
            ("spec", "podSelector", "matchLabels"),
        ),
        "monitoring": ("ServiceMonitor", "lminf", ("spec", "selector", "matchLabels")),
    }
    for file, (kind, name, path) in selectors.items():
        found = ALL[file, kind, name]
        for key in path:
            found = found[key]
        assert found == labels, file
    for file in ("autoscaling", "autoscaling-cpu"):
        target = ALL[file, "HorizontalPodAutoscaler", "lminf"]["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) == ("Deployment", DEPLOYMENT["metadata"]["name"])
    claims = {name for _, kind, name in ALL if kind == "PersistentVolumeClaim"}
    for pod in PODS.values():
        asked = [volume.get("persistentVolumeClaim") for volume in pod["volumes"]]
        assert {claim["claimName"] for claim in asked if claim} <= claims


@pytest.mark.parametrize("name", PODS)
def test_ports_are_called_alike_wherever_they_are_named(name):
    """KServe's Service has port 80, too, with the name of the container's port."""
    [port] = PODS[name]["containers"][0]["ports"]
    [of_service] = ALL["service", "Service", "lminf"]["spec"]["ports"]
    assert (of_service["port"], of_service["name"]) == (80, port["name"])
    [monitored] = ALL["monitoring", "ServiceMonitor", "lminf"]["spec"]["endpoints"]
    assert monitored["port"] == port["name"]
    [let_in] = ALL["network", "NetworkPolicy", "lminf"]["spec"]["ingress"]
    assert [each["port"] for each in let_in["ports"]] == [port["name"]]
    [rule] = ALL["affinity-ingress-nginx", "Ingress", "lminf"]["spec"]["rules"]
    [path] = rule["http"]["paths"]
    assert path["backend"]["service"]["port"] == {"number": 80}
    [rule] = ALL["affinity-envoy-gateway", "HTTPRoute", "lminf"]["spec"]["rules"]
    assert [backend["port"] for backend in rule["backendRefs"]] == [80]


@pytest.mark.parametrize(
    ("file", "name", "more"),
    [
        ("network-bucket", "lminf-bucket", ("TCP", 443)),
        ("affinity-istio", "lminf-istio", ("TCP", 15012)),
    ],
)
def test_who_reaches_something_may_ask_for_its_name(file, name, more):
    egress = ALL[file, "NetworkPolicy", name]["spec"]["egress"]
    let_out = {(port["protocol"], port["port"]) for rule in egress for port in rule["ports"]}
    assert let_out == {("UDP", 53), ("TCP", 53), more}


@pytest.mark.parametrize("name", PODS)
def test_a_node_has_room_for_what_a_pod_writes_there(name):
    pod = PODS[name]
    asked = pod["containers"][0]["resources"]["requests"]["ephemeral-storage"]
    limits = [volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if "emptyDir" in volume]
    assert all(size.endswith("Mi") for size in (asked, *limits))
    assert int(asked[:-2]) > sum(int(limit[:-2]) for limit in limits)


@pytest.mark.parametrize("place", ["", "examples/serving/", "examples/ray/"])
def test_secrets_that_the_pages_make_stay_out_of_commits_and_images(place):
    if not (FOLDER.parents[1] / ".git").exists():
        pytest.skip("no checkout")
    for name in ("api-key", "session-secret"):
        found = subprocess.run(
            ["git", "check-ignore", "-q", f"{place}{name}"], cwd=FOLDER.parents[1], check=False
        )
        assert found.returncode == 0, name
        ignored = FOLDER.parent / "serving" / "Dockerfile.dockerignore"
        assert f"**/{name}" in ignored.read_text(encoding="utf-8").splitlines()


def test_no_secret_of_the_pages_is_on_a_command_line_or_readable_for_others():
    pages = [*(FOLDER.parents[1] / "docs").glob("*.md"), FOLDER.parent / "dynamo" / "README.md"]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "$(cat api-key)" not in text, page
        assert "--from-literal" not in text, page
        for block in re.findall(r"(?:^    .+\n)+", text, re.M):
            if re.search(r"> (api-key|session-secret)|DYN_FILE_KV=", block):
                assert "umask 077" in block, (page, block)


def test_the_metric_of_the_autoscaler_is_one_of_the_servers():
    [metric] = ALL["autoscaling", "HorizontalPodAutoscaler", "lminf"]["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert name in described()
    adapter = (FOLDER / "prometheus-adapter.yaml").read_text(encoding="utf-8")
    [rule] = yaml.safe_load(adapter)["rules"]["custom"]
    assert rule["seriesQuery"].startswith(name + "{")


def test_every_proxy_hashes_the_header_of_a_conversation():
    for path in FOLDER.glob("affinity-*.yaml"):
        assert re.search(r"x[-_]session[-_]id$", path.read_text(encoding="utf-8"), re.M), path


def test_the_kustomization_lists_files_that_there_are():
    [found] = resources("kustomization").values()
    assert len(found["resources"]) > 4
    for name in found["resources"]:
        kinds = [kind for file, kind, _ in ALL if f"{file}.yaml" == name]
        assert kinds
        assert not OF_OTHERS & set(kinds)


@pytest.mark.slow
@pytest.mark.parametrize("name", PODS)
def test_the_command_of_a_pod_serves(name, demo_bundle, tmp_path):
    (tmp_path / "api-key").write_text("secret-of-the-test\n")
    (tmp_path / "session-secret").write_text("0123456789abcdef" * 4 + "\n")
    places = {
        "/run/secrets/lminf/": f"{tmp_path}/",
        "/sessions/": f"{tmp_path}/",
        "0.0.0.0": "127.0.0.1",
    }
    given = []
    for option in PODS[name]["containers"][0]["args"][1:]:
        if option.startswith(("--port", "--name")):
            continue
        for before, after in places.items():
            option = option.replace(before, after)
        given.append(option)
    with serving.server_process(demo_bundle, *given) as server:
        first = serving.ask(
            server.url, "mine", [{"role": "user", "content": "a"}], key="secret-of-the-test"
        )
        assert first.status_code == 200, first.text
        assert server.end()[0] == 0
    assert [path for path in (tmp_path / "kept").rglob("*") if path.is_file()]
