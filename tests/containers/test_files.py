"""Dockerfile, compose file and manifests: valid to their tools, and true to the server."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.containers.reading import (
    DOCKER,
    ROOT,
    manifests,
    parsed_by_the_example,
    run_compose,
    settings_of,
)

from eagle3_client import InvalidRequest
from eagle3_server.config import ServerSettings

pytestmark = pytest.mark.slow

SERVERS_OF = {"one": 1, "two": 2, "four": 4, "eight": 8}
SUPERVISOR_SPARE_S = 5  # what docs/operations.md asks for beyond drain delay and grace period


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command that pip installed."""
    path = Path(sys.executable).parent / name
    assert path.exists(), f"{name} is not installed: run `make test-all`, which installs it"
    return subprocess.run([path, *arguments], capture_output=True, text=True, timeout=100)


# --- the image ---


def test_hadolint_finds_nothing(tmp_path: Path, dockerfile: str) -> None:
    done = tool("hadolint", str(DOCKER / "Dockerfile"))
    assert (done.returncode, done.stdout) == (0, "")
    bad = tmp_path / "Dockerfile"
    bad.write_text(re.sub(r"^ENTRYPOINT .*", "ENTRYPOINT serve", dockerfile, flags=re.MULTILINE))
    assert "DL3025" in tool("hadolint", str(bad)).stdout, "hadolint found nothing where it should"


def test_the_image_declares_variables_that_the_server_knows(
    dockerfile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = dict(re.findall(r"\b(EAGLE3_\w+)=(\S+)", dockerfile))
    assert settings_of(variables, monkeypatch).host == "0.0.0.0"


def test_the_build_sees_only_what_it_copies(dockerfile: str) -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if not line.startswith("#")]
    assert patterns[0] == "*"
    allowed = {pattern[1:] for pattern in patterns[1:] if pattern.startswith("!")}
    copied = {
        name
        for line in re.findall(r"^COPY (?!--from)(.*)", dockerfile, re.MULTILINE)
        for name in line.split()[:-1]
    }
    assert allowed == copied


@pytest.mark.parametrize("page", ["README.md", "docs/operations.md"])
def test_documented_runs_are_hardened_as_the_tried_ones_are(page: str, need: Any) -> None:
    hardened = " ".join(sys.modules[need.__module__].HARDENED)
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    runs = re.findall(r"^\$ docker run .*", text, re.MULTILINE)
    assert runs
    for run in runs:
        assert set(hardened.split()) | {"--tmpfs", "/tmp"} <= set(run.split()), run


# --- compose ---


@pytest.mark.parametrize("profile", [*SERVERS_OF, "cpu", "trainer"])
def test_compose_accepts_every_profile(need: Any, profile: str) -> None:
    need("docker-compose")
    done = run_compose("--profile", profile, "config", "--quiet", EAGLE3_MODEL="x")
    assert done.returncode == 0, done.stderr


def test_compose_says_which_variable_it_needs(need: Any) -> None:
    need("docker-compose")
    done = run_compose("config")
    assert done.returncode != 0
    assert "a hub id, or /models/NAME" in done.stderr


def in_profile(compose: dict[str, Any], profile: str) -> list[dict[str, Any]]:
    return [each for each in compose["services"].values() if profile in each["profiles"]]


@pytest.mark.parametrize("profile", SERVERS_OF)
def test_a_profile_has_as_many_servers_each_on_a_gpu_of_its_own(
    compose: dict[str, Any], profile: str, port: int
) -> None:
    servers = in_profile(compose, profile)
    reserved = [each["deploy"]["resources"]["reservations"]["devices"] for each in servers]
    devices = [device for (one,) in reserved for device in one["device_ids"]]
    assert devices == [str(number) for number in range(SERVERS_OF[profile])]
    assert all(one["capabilities"] == ["gpu"] for (one,) in reserved)
    published = [each["ports"] for each in servers]
    assert len({ports[0] for ports in published}) == len(servers)
    for (mapped,) in published:
        assert re.fullmatch(rf"127\.0\.0\.1:\d+:{port}/tcp", mapped)


def test_the_cpu_profile_has_one_server_without_a_gpu(compose: dict[str, Any]) -> None:
    (server,) = in_profile(compose, "cpu")
    assert "deploy" not in server
    assert "TORCH_INDEX" in server["build"]["args"]


def test_all_services_have_a_profile_and_no_more_rights_than_they_need(
    compose: dict[str, Any],
) -> None:
    for service in compose["services"].values():
        assert service["profiles"]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["tmpfs"] == ["/tmp"]
        (secret,) = service["secrets"]
        assert secret["source"] in compose["secrets"]


def servers_of(compose: dict[str, Any]) -> list[dict[str, Any]]:
    found = [each for name, each in compose["services"].items() if name.startswith("server-")]
    assert len(found) == SERVERS_OF["eight"] + 1
    return found


def test_compose_gives_servers_settings_that_fit_the_supervisor(
    compose: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for server in servers_of(compose):
        settings = settings_of(server["environment"], monkeypatch)
        wait_s = settings.drain_delay_s + settings.grace_period_s + SUPERVISOR_SPARE_S
        assert server["stop_grace_period"] == f"{wait_s:.0f}s"
        (secret,) = server["secrets"]
        assert str(settings.token_file) == f"/run/secrets/{secret['source']}"
        assert settings.token is None, "a token in the compose file"


def test_the_trainer_of_compose_finds_all_servers_by_one_name(
    compose: dict[str, Any], port: int
) -> None:
    trainer = compose["services"]["trainer"]
    said = parsed_by_the_example(shlex.split(trainer["command"]))
    assert said == f"['http://target:{port}'] some/model /text/corpus.txt\n"
    for server in servers_of(compose):
        assert server["networks"]["default"]["aliases"] == ["target"]
    (secret,) = trainer["secrets"]
    assert f"/run/secrets/{secret['source']})" in trainer["entrypoint"][2]


# --- Kubernetes ---


@pytest.mark.parametrize("name", ["secret.yaml", "server.yaml", "trainer.yaml"])
def test_kubernetes_accepts_the_manifests(name: str) -> None:
    done = tool("kubernetes-validate", "--strict", str(DOCKER / "kubernetes" / name))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout + done.stderr
    assert {path.name for path in (DOCKER / "kubernetes").glob("*")} == {
        "secret.yaml", "server.yaml", "trainer.yaml",
    }  # fmt: skip


def test_kubernetes_would_refuse_another_field(tmp_path: Path) -> None:
    text = (DOCKER / "kubernetes" / "server.yaml").read_text(encoding="utf-8")
    wrong = tmp_path / "server.yaml"
    wrong.write_text(text.replace("serviceName:", "servicename:"))
    done = tool("kubernetes-validate", "--strict", str(wrong))
    assert done.returncode != 0


def pods() -> dict[str, dict[str, Any]]:
    found = manifests()
    return {
        name: found[name]["spec"]["template"]["spec"]
        for name in ("StatefulSet/eagle3", "Job/eagle3-trainer")
    }


def test_pods_have_no_more_rights_than_they_need(uid: int) -> None:
    for pod in pods().values():
        assert pod["enableServiceLinks"] is False, "a Service named eagle3 sets EAGLE3_PORT"
        assert pod["automountServiceAccountToken"] is False
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] == uid
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"/tmp", "/cache"} <= {each["mountPath"] for each in container["volumeMounts"]}


def test_the_servers_settings_fit_their_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    pod = pods()["StatefulSet/eagle3"]
    (container,) = pod["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    settings = settings_of(variables, monkeypatch)
    assert settings.drain_delay_s > 0, "the name keeps a stopping server's address for a while"
    wait_s = settings.drain_delay_s + settings.grace_period_s + SUPERVISOR_SPARE_S
    assert pod["terminationGracePeriodSeconds"] == wait_s
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    (key,) = manifests()["Secret/eagle3-token"]["stringData"]
    assert str(settings.token_file) == f"{mounts['token']}/{key}"


def test_probes_ask_what_they_should(port: int) -> None:
    (container,) = pods()["StatefulSet/eagle3"]["containers"]
    paths = {
        kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")
    }
    assert paths == {
        # A liveness probe of /readyz would kill servers that load or drain.
        "startup": {"path": "/healthz", "port": "http"},
        "readiness": {"path": "/readyz", "port": "http"},
        "liveness": {"path": "/healthz", "port": "http"},
    }
    assert container["ports"] == [{"name": "http", "containerPort": port}]
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 300


def test_the_service_is_headless_and_selects_the_servers(port: int) -> None:
    found = manifests()
    service, servers = found["Service/eagle3"]["spec"], found["StatefulSet/eagle3"]["spec"]
    labels = servers["template"]["metadata"]["labels"]
    assert service["clusterIP"] == "None"
    assert service["selector"] == labels == servers["selector"]["matchLabels"]
    assert found["PodDisruptionBudget/eagle3"]["spec"]["selector"]["matchLabels"] == labels
    assert servers["serviceName"] == "eagle3"
    assert service["ports"] == [{"name": "http", "port": port, "targetPort": "http"}]
    assert found["Job/eagle3-trainer"]["spec"]["template"]["metadata"]["labels"] != labels


def test_the_secret_is_named_right_and_holds_no_token() -> None:
    found = manifests()
    secret = found["Secret/eagle3-token"]
    volumes = {each["name"]: each for each in pods()["StatefulSet/eagle3"]["volumes"]}
    assert volumes["token"]["secret"]["secretName"] == secret["metadata"]["name"]
    (trainer,) = pods()["Job/eagle3-trainer"]["containers"]
    (variable,) = trainer["env"]
    assert variable["name"] == "EAGLE3_TOKEN"
    key = variable["valueFrom"]["secretKeyRef"]
    assert key == {"name": secret["metadata"]["name"], "key": "token"}
    with pytest.raises(InvalidRequest, match="without spaces"):
        ServerSettings(token=secret["stringData"]["token"]).tokens()


def test_the_trainer_of_kubernetes_uses_the_services_name(port: int) -> None:
    (container,) = pods()["Job/eagle3-trainer"]["containers"]
    assert Path(container["command"][1]).name == "train_eagle3.py"
    said = parsed_by_the_example(container["args"])
    assert said.startswith(f"['http://eagle3:{port}'] ")
