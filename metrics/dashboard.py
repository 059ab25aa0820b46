"""The Grafana dashboard, laid out from ``panels.py``. ``pagemgr dashboard`` prints it."""

from __future__ import annotations

from string import ascii_uppercase
from typing import Any

from .panels import ROWS, Panel, Shape

Json = dict[str, Any]

DATASOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
CHOSEN = 'job=~"$job", instance=~"$instance", pool=~"$pool"'
"""What ``@`` stands for in a query."""

WIDTH, HEIGHT = 8, 8
"""Of a panel, in Grafana's grid of 24 columns."""

_TYPES: dict[Shape, str] = {"stacked": "timeseries"}


def dashboard() -> Json:
    """The dashboard as Grafana imports it: it asks for a data source, and belongs to no installation."""
    return {
        "uid": "pagemgr",
        "title": "pagemgr",
        "description": "Where the bytes of a paged KV cache are, what is reused, and what to change.",
        "tags": ["pagemgr", "llm"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "links": [],
        "templating": {"list": [_datasource(), *map(_variable, ("job", "instance", "pool"))]},
        "panels": _panels(),
    }


def _datasource() -> Json:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}


def _variable(name: str) -> Json:
    query = f"label_values(pagemgr_up, {name})"
    return {
        "name": name,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,  # whenever the time range changes
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _panels() -> list[Json]:
    placed: list[Json] = []
    top = 0
    for title, panels in ROWS.items():
        grid = {"x": 0, "y": top, "w": 24, "h": 1}
        placed.append({"id": len(placed) + 1, "type": "row", "title": title, "collapsed": False, "gridPos": grid})
        top += 1
        for index, panel in enumerate(panels):
            line, column = divmod(index, 24 // WIDTH)
            last = index == len(panels) - 1  # takes the rest of its line
            width = 24 - column * WIDTH if last else WIDTH
            grid = {"x": column * WIDTH, "y": top + line * HEIGHT, "w": width, "h": HEIGHT}
            placed.append({"id": len(placed) + 1, **_panel(panel), "gridPos": grid})
        top += -(-len(panels) * WIDTH // 24) * HEIGHT
    return placed


def _panel(panel: Panel) -> Json:
    made: Json = {
        "type": _TYPES.get(panel.shape, panel.shape),
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "targets": [
            _target(panel, letter, legend, query)
            for letter, (legend, query) in zip(ascii_uppercase, panel.queries.items(), strict=False)
        ],
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0, **_colours(panel), **_lines(panel)},
            "overrides": [],
        },
    }
    match panel.shape:
        case "timeseries" | "stacked":
            made["options"] = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
        case "heatmap":
            made["options"] = {"calculate": False, "yAxis": {"unit": panel.unit}, "color": {"scheme": "Oranges"}}
        case "table":
            made["transformations"] = [{"id": "merge", "options": {}}]
    return made


def _target(panel: Panel, letter: str, legend: str, query: str) -> Json:
    now = panel.shape in ("gauge", "stat", "table")
    target: Json = {
        "refId": letter,
        "datasource": DATASOURCE,
        "expr": query.replace("@", CHOSEN),
        "legendFormat": legend,
        "instant": now,
        "range": not now,
        "exemplar": panel.shape == "timeseries" and "histogram_quantile" in query,
    }
    if panel.shape in ("heatmap", "table"):
        target["format"] = panel.shape
    return target


def _colours(panel: Panel) -> Json:
    if panel.warn is None and panel.bad is None:
        return {}
    given = (("orange", panel.warn), ("red", panel.bad))
    steps: list[Json] = [{"color": "green", "value": None}]
    steps += [{"color": colour, "value": value} for colour, value in given if value is not None]
    limit = {"max": 1} if panel.shape == "gauge" else {}
    return {"thresholds": {"mode": "absolute", "steps": steps}, **limit}


def _lines(panel: Panel) -> Json:
    if panel.shape == "stacked":
        return {"custom": {"stacking": {"mode": "normal"}, "fillOpacity": 60, "lineWidth": 0}}
    return {"custom": {"fillOpacity": 5, "lineWidth": 2}} if panel.shape == "timeseries" else {}
