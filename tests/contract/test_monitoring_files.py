"""The dashboard, the rules and the files around them: whole, import-clean, and about metrics that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

import pagemgr
from pagemgr.cli.main import main
from pagemgr.metrics import METRICS, bytes_by_cause
from pagemgr.metrics.dashboard import dashboard
from pagemgr.metrics.names import STATES
from pagemgr.metrics.panels import ROWS
from pagemgr.metrics.shipped import DASHBOARD, RULES, STACK, dashboard_json
from pagemgr.metrics.vllm import ALIASES
from pagemgr.timings import TIMED

PARTS = {"histogram": ("_bucket", "_count", "_sum")}
SAMPLES = {name + part: metric for name, metric in METRICS.items() for part in PARTS.get(metric.kind, ("",))}
PROMETHEUS_ADDS = {"job", "instance", "le"}


@pytest.fixture(scope="module")
def rules(root: Path) -> list[dict[str, Any]]:
    document = yaml.safe_load((root / "metrics" / RULES).read_text(encoding="utf-8"))
    return [rule for group in document["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def unknown(expression: str, recorded: set[str] = frozenset()) -> list[str]:
    """Names in an expression that are no metric, and labels that their metric does not have."""
    wrong = [name for name in re.findall(r"\bpagemgr_\w+", expression) if name not in SAMPLES]
    wrong += [name for name in re.findall(r"\bpagemgr:[\w:]+", expression) if name not in recorded]
    for name, matchers in re.findall(r"\b(pagemgr_\w+)\{([^}]*)\}", expression):
        labels = set(SAMPLES[name].labels) | ({"pool"} - ({"pool"} if name == "pagemgr_build_info" else set()))
        wrong += [
            f"{name}{{{label}}}"
            for label in re.findall(r"(\w+)\s*[=!]", matchers)
            if label not in labels | PROMETHEUS_ADDS
        ]
    return wrong


def test_no_panel_names_what_is_not_exported() -> None:
    assert len(expressions()) > 30
    assert [wrong for expression in expressions() for wrong in unknown(expression)] == []


def test_no_rule_names_what_is_not_exported(rules: list[dict[str, Any]]) -> None:
    recorded = {rule["record"] for rule in rules if "record" in rule}
    assert len(rules) > 15
    assert [wrong for rule in rules for wrong in unknown(rule["expr"], recorded)] == []


@pytest.mark.parametrize(
    "expression", ["pagemgr_block", 'pagemgr_blocks{cause="free"}', "rate(pagemgr_swap_seconds[5m])", "pagemgr:x"]
)
def test_a_wrong_name_is_seen(expression: str) -> None:
    assert unknown(expression)


def test_every_metric_of_a_pool_is_on_the_dashboard_or_in_a_rule(rules: list[dict[str, Any]]) -> None:
    shown = " ".join([*expressions(), *(rule["expr"] for rule in rules)])
    unseen = {name for name in METRICS if not re.search(rf"\b{name}(_bucket|_sum|_count)?\b", shown)}
    assert unseen == {  # what others say better
        "pagemgr_pool_capacity_bytes",
        "pagemgr_pool_utilization_ratio",
        "pagemgr_block_allocations_total",
        "pagemgr_block_releases_total",
        "pagemgr_swap_blocks_total",
    }


def test_the_dashboard_has_its_rows_and_every_panel_says_what_to_do() -> None:
    rows = [panel["title"] for panel in dashboard()["panels"] if panel["type"] == "row"]
    assert rows == list(ROWS) == ["Capacity", "Reuse", "Pressure", "Tiers", "Kernels", "Health"]
    for panel in panels():
        assert len(panel["description"]) > 60, panel["title"]
        assert panel["targets"], panel["title"]
    assert len({panel["title"] for panel in panels()}) == len(panels())


def test_the_dashboard_imports_anywhere() -> None:
    made = dashboard()
    ids = [panel["id"] for panel in made["panels"]]
    assert len(set(ids)) == len(ids)
    assert "id" not in made  # Grafana gives it one
    for panel in panels():
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert {source["uid"] for source in sources} == {"${datasource}"}, panel["title"]
    variables = {variable["name"]: variable for variable in made["templating"]["list"]}
    assert list(variables) == ["datasource", "job", "instance", "pool"]
    used = set(re.findall(r"\$(\w+)", " ".join(expressions()))) - {"__rate_interval"}
    assert used == set(variables) - {"datasource"}


def test_no_panel_lies_over_another() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard()["panels"]:
        grid = panel["gridPos"]
        assert grid["x"] + grid["w"] <= 24, panel["title"]
        for cell in [(grid["x"] + x, grid["y"] + y) for x in range(grid["w"]) for y in range(grid["h"])]:
            assert cell not in taken, f"{panel['title']} lies over {taken[cell]}"
            taken[cell] = panel["title"]


def test_the_shipped_dashboard_is_the_current_one(root: Path) -> None:
    shipped = (root / "metrics" / DASHBOARD).read_text(encoding="utf-8")
    assert shipped == dashboard_json(), f"run: pagemgr dashboard > metrics/{DASHBOARD}"


def test_alerts_say_how_bad_it_is_and_what_to_do(rules: list[dict[str, Any]]) -> None:
    alerts = [rule for rule in rules if "alert" in rule]
    assert len({alert["alert"] for alert in alerts}) == len(alerts) > 10
    for alert in alerts:
        assert re.fullmatch(r"Pagemgr[A-Z]\w+", alert["alert"])
        assert alert["labels"] in ({"severity": "critical"}, {"severity": "warning"}), alert["alert"]
        assert len(alert["annotations"]["description"]) > 60, alert["alert"]
        assert "{{ $labels.instance }}" in alert["annotations"]["summary"], alert["alert"]


def test_the_commands_print_what_is_shipped(root: Path) -> None:
    printed = CliRunner().invoke(main, ["dashboard"])
    assert (printed.exit_code, json.loads(printed.stdout)) == (0, dashboard())
    printed = CliRunner().invoke(main, ["alerts"])
    assert (printed.exit_code, printed.stdout) == (0, (root / "metrics" / RULES).read_text(encoding="utf-8"))


def test_the_stack_is_complete_and_finds_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "monitoring"
    done = CliRunner().invoke(main, ["dashboard", "--stack", str(folder)])
    assert done.exit_code == 0
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == set(STACK)
    for name in STACK:
        assert yaml.safe_load((folder / name).read_text(encoding="utf-8")), name
    services = yaml.safe_load((folder / "compose.yaml").read_text(encoding="utf-8"))["services"]
    mounted = [mount.split(":")[0] for service in services.values() for mount in service["volumes"]]
    assert all((folder / mount).exists() for mount in mounted if mount.startswith("./")), mounted
    assert "127.0.0.1" in json.dumps(services)
    assert "0.0.0.0" not in json.dumps(services)


def test_the_stack_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "compose.yaml").write_text("mine")
    done = CliRunner().invoke(main, ["dashboard", "--stack", str(tmp_path)])
    assert done.exit_code == 2
    assert "is not an empty folder" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["compose.yaml"]


def rows(text: str, columns: int) -> dict[str, list[str]]:
    """The tables of that many columns whose first is a metric: its name → the other columns."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return {row[0].strip("`"): row[1:] for row in cells if len(row) == columns and row[0].startswith("`")}


def test_the_table_of_metrics_is_what_is_exported(root: Path) -> None:
    text = (root / "metrics" / "README.md").read_text(encoding="utf-8")
    table = rows(text, columns=6)
    assert list(table) == list(METRICS)
    for name, (kind, unit, labels, meaning, advice) in table.items():
        metric = METRICS[name]
        stated = (kind, unit, labels, meaning)
        assert stated == (metric.kind, metric.unit or "–", ", ".join(metric.labels) or "–", metric.meaning), name
        assert advice.endswith("."), name
    assert set(rows(text, columns=2)) >= {alias.name for alias in ALIASES}


def test_the_values_of_labels_are_explained(root: Path) -> None:
    text = (root / "metrics" / "README.md").read_text(encoding="utf-8")
    tier = pagemgr.BlockManager(4, 4, num_host_blocks=4).stats()
    causes = {cause for one in tier.tiers for cause in bytes_by_cause(one, 4)}
    values = causes | set(STATES) | set(tier.counters.failures) | {kind for kinds in TIMED.values() for kind in kinds}
    assert [value for value in values if f"`{value}`" not in text] == []


def test_all_files_beside_the_metrics_are_part_of_the_stack(root: Path) -> None:
    found = {
        str(path.relative_to(root / "metrics"))
        for kind in ("*.yaml", "*.json")
        for path in (root / "metrics").rglob(kind)
    }
    assert found == set(STACK)
