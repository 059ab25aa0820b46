"""The files that make Prometheus and Grafana show a pool: scrape config, rules, dashboard, and what starts them."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from pagemgr.errors import InvalidInput

from .dashboard import dashboard

DASHBOARD = "grafana/pagemgr.json"
RULES = "rules/pagemgr.yaml"
STACK = (
    "compose.yaml",
    "prometheus.yaml",
    RULES,
    DASHBOARD,
    "grafana/provisioning/dashboards/pagemgr.yaml",
    "grafana/provisioning/datasources/prometheus.yaml",
)
"""All of them, as they lie beside this module."""


def dashboard_json() -> str:
    """The dashboard, as Grafana imports it."""
    return json.dumps(dashboard(), indent=2, ensure_ascii=False) + "\n"


def rules_yaml() -> str:
    """The recording and alert rules, as Prometheus loads them."""
    return _text(RULES)


def write_stack(folder: Path) -> list[Path]:
    """Write all files into a new or empty folder, and return them. ``InvalidInput`` if it holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidInput(f"{folder} is not an empty folder: name a new one")
    written = []
    for name in STACK:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_text(name), encoding="utf-8")
        written.append(path)
    return written


def _text(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
