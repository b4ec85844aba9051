"""Prometheus itself: scrapes a server with its token, and evaluates dashboard and alerts."""

from __future__ import annotations

import math
import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from tests.from_apt import program
from tests.grafana.expressions import FOLDER, RULES, TARGETS
from tests.pages import commands
from tests.ports import free_port
from tests.server.sharing.conftest import Trainer
from tests.server.sharing.server_process import Process
from tests.servers import PATIENCE_S

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the first may have to install it


def promtool(*arguments: str) -> str:
    command = [program("promtool", "prometheus"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_takes_rules_and_configuration(tmp_path: Path) -> None:
    assert "3 rules found" in promtool("check", "rules", str(FOLDER / "alerts.yaml"))
    for name in ("alerts.yaml", "prometheus.yaml"):
        (tmp_path / name).write_text((FOLDER / name).read_text("utf-8"), "utf-8")
    (tmp_path / "eagle3-token").write_text("secret")
    promtool("check", "config", str(tmp_path / "prometheus.yaml"))


def test_each_alert_fires_when_it_should_and_not_before() -> None:
    tests = Path(__file__).with_name("alerts_test.yaml")
    named = {each["alertname"] for case in yaml.safe_load(tests.read_text("utf-8"))["tests"]
             for each in case.get("alert_rule_test", [])}  # fmt: skip
    assert named == {rule["alert"] for rule in RULES}
    assert "SUCCESS" in promtool("test", "rules", str(tests))


@pytest.fixture
def server() -> Iterator[Process]:
    process = Process(EAGLE3_TOKEN="secret", EAGLE3_MAX_BODY_BYTES="60000")
    yield process
    process.close()


@pytest.fixture
def one(server: Process) -> Iterator[Trainer]:
    trainer = Trainer(server.url, "trainer", authorization="Bearer secret")
    with trainer.http:
        trainer.register()
        yield trainer


@pytest.fixture
def prometheus(server: Process, tmp_path: Path, documented: list[str]) -> Iterator[httpx.Client]:
    """By the page's commands, with our configuration but for the target's address, the intervals
    and Prometheus' own address, in a folder of its own."""
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text("utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(FOLDER / name) for name in config["rule_files"]]
    (scrape,) = config["scrape_configs"]
    scrape["static_configs"][0]["targets"] = [server.url.removeprefix("http://")]
    (tmp_path / "docker" / "grafana").mkdir(parents=True)
    (tmp_path / "docker/grafana/prometheus.yaml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    ((secret, command),) = map(commands, documented)
    environment = {**os.environ, "EAGLE3_TOKEN": "secret"}
    subprocess.run(["bash", "-c", secret], cwd=tmp_path, env=environment, check=True)
    assert command.count("127.0.0.1:9090") == 1
    name, *arguments = shlex.split(command.replace("127.0.0.1:9090", address))
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [program(name, "prometheus"), *arguments], stderr=log, cwd=tmp_path
        )
    with httpx.Client(base_url=f"http://{address}/api/v1") as client:
        ends = time.monotonic() + PATIENCE_S
        try:
            # It does not listen at once, listens before it is ready, and refuses until then.
            is_ready = False
            while not is_ready:
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < ends, (tmp_path / "log").read_text()
                time.sleep(0.05)
                with suppress(httpx.ConnectError):
                    is_ready = client.get(f"http://{address}/-/ready").status_code == 200
            yield client
        finally:
            process.terminate()
            process.wait(PATIENCE_S)


def query(prometheus: httpx.Client, expression: str) -> list[Any]:
    """Return samples that are numbers."""
    answer = prometheus.get("/query", params={"query": expression}).json()
    assert answer["status"] == "success", answer
    return [
        sample for sample in answer["data"]["result"] if math.isfinite(float(sample["value"][1]))
    ]


def rules(prometheus: httpx.Client) -> dict[str, Any]:
    (group,) = prometheus.get("/rules").json()["data"]["groups"]
    return {rule["name"]: rule for rule in group["rules"]}


def test_it_scrapes_with_the_token_and_every_panel_has_data(
    prometheus: httpx.Client, server: Process, one: Trainer
) -> None:
    # As Grafana fills them in; the window spans a few of our scrapes.
    expressions = [
        target["expr"].replace("$__rate_interval", "30s").replace("$instance", ".*")
        for target in TARGETS
    ]
    without_data = expressions
    ends = time.monotonic() + PATIENCE_S
    seed = 20
    while without_data:
        assert time.monotonic() < ends, without_data
        seed += 1
        assert one.ask(seed % 40 + 20).status_code == 200
        assert one.http.post("/v1/supervision", content=b"x").status_code == 400
        without_data = [each for each in without_data if not query(prometheus, each)]
    (target,) = prometheus.get("/targets").json()["data"]["activeTargets"]
    assert (target["health"], target["labels"]["job"]) == ("up", "eagle3-remote")
    (ready,) = query(prometheus, 'eagle3_ready{job="eagle3-remote"}')
    assert ready["value"][1] == "1"
    (sent,) = query(prometheus, 'eagle3_tokens_total{kind="sent"}')
    assert float(sent["value"][1]) % (2 * 900) == 0
    while {rule["health"] for rule in rules(prometheus).values()} != {"ok"}:
        assert time.monotonic() < ends
    # Pending at first: a rate takes two scrapes.
    while rules(prometheus)["Eagle3TargetDoesNotServe"]["state"] != "inactive":
        assert time.monotonic() < ends
    # Half of the requests were refused.
    while rules(prometheus)["Eagle3RequestsFail"]["state"] != "pending":
        assert time.monotonic() < ends
    one.http.close()
    server.close()
    while rules(prometheus)["Eagle3TargetDoesNotServe"]["state"] != "pending":
        assert time.monotonic() < ends
