"""A real Prometheus on loopback, with the shipped rules, but faster: what takes minutes takes fractions of a second."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import yaml

EVERY = "300ms"
"""From one scrape to the next, and from one evaluation of the rules to the next."""
RATE = "3s"
"""What a panel's rates and a rule's windows are taken over."""
PATIENT = "1500ms"
"""How long an alert's condition must hold."""
PATIENCE = 60.0
"""Seconds to wait for anything; it takes two or three."""


class Prometheus:
    """Its query API."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **arguments: str) -> Any:
        with urlopen(f"{self._url}{path}?{urlencode(arguments)}", timeout=10) as response:
            return json.load(response)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        return list(self.get("/api/v1/query", query=expression)["result"])

    def values(self, expression: str) -> list[float]:
        return [float(series["value"][1]) for series in self.query(expression)]

    def firing(self) -> set[tuple[str, str]]:
        """Names of the alerts that fire, each with the pool or target that it is about."""
        alerts = self.get("/api/v1/alerts")["alerts"]
        return {
            (alert["labels"]["alertname"], alert["labels"].get("pool", "target"))
            for alert in alerts
            if alert["state"] == "firing"
        }

    def ready(self) -> bool:
        try:
            with urlopen(f"{self._url}/-/ready", timeout=1) as response:
                return bool(response.status == 200)
        except OSError:
            return False


def wait_for(what: Callable[[], object], name: str) -> None:
    """Until it is true."""
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline, f"not within {PATIENCE} s: {name}"
        time.sleep(0.05)


@contextmanager
def running(folder: Path, rules: str, targets: list[str]) -> Iterator[Prometheus]:
    """Scrapes these targets with the shipped scrape config, in which intervals are short, until the block ends."""
    port = free_port()
    config = yaml.safe_load((folder / "prometheus.yaml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": EVERY, "evaluation_interval": EVERY}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = targets
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    (folder / "rules" / "pagemgr.yaml").write_text(hurried(rules))
    command = [
        "prometheus",
        f"--config.file={folder}/prometheus.yaml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
        "--enable-feature=exemplar-storage",
        "--log.level=warn",
    ]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stderr=log, stdout=log) as process:
        try:
            prometheus = Prometheus(port)
            wait_for(lambda: prometheus.ready() or process.poll() is not None, "Prometheus")
            assert process.poll() is None, (folder / "log").read_text()
            yield prometheus
        finally:
            process.kill()


def hurried(rules: str) -> str:
    """The rules with every window and every patience shortened."""
    document = yaml.safe_load(rules)
    for group in document["groups"]:
        for rule in group["rules"]:
            rule["expr"] = re.sub(r"\[\d+m\]", f"[{RATE}]", rule["expr"]).replace("60 *", "0.6 *")  # a minute
            if "for" in rule:
                rule["for"] = PATIENT
    return yaml.safe_dump(document)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
