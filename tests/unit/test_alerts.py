"""The alert rules, the dashboard and the reference speak of metrics and labels that there are.

What the expressions do is shown with Prometheus' own promtool where that is on PATH.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from supervisor_synapse.plugin import metrics

_ROOT = Path(__file__).resolve().parents[2]
_RULES = _ROOT / "etc" / "prometheus" / "synapse.rules.yml"
_SCRAPES = _ROOT / "etc" / "prometheus" / "prometheus.yml"
_DASHBOARD = _ROOT / "etc" / "grafana" / "synapse.json"
_REFERENCE = _ROOT / "docs" / "metrics.md"
_OPERATIONS = _ROOT / "docs" / "operations.md"
_PROMTOOL = shutil.which("promtool")

ALERTS: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(_RULES.read_text())["groups"] for rule in group["rules"]
]
DASHBOARD: dict[str, Any] = json.loads(_DASHBOARD.read_text())
LABELS = {
    metric.name: {*subject, *metric.labels}
    for subject, some in metrics.METRICS.items()
    for metric in some
}
_OF_A_SCRAPE = {"job", "instance"}


def queries() -> list[str]:
    """Every expression of the dashboard, its variables' included."""
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    variables = [
        one["definition"] for one in DASHBOARD["templating"]["list"] if one["type"] == "query"
    ]
    return panels + variables


def spoken_of(query: str) -> set[str]:
    """The metrics that a query names."""
    return set(re.findall(r"\bsynapse_[a-z_]+", query))


def labels_of(query: str) -> set[str]:
    """The labels that all metrics of a query have between them."""
    return _OF_A_SCRAPE.union(*(LABELS[name] for name in spoken_of(query)))


def selected(query: str) -> list[tuple[str, set[str]]]:
    """Each metric that is named with labels in braces, and those labels."""
    found = re.findall(r"\b(synapse_[a-z_]+)\{([^}]*)\}", query)
    return [(name, set(re.findall(r"(\w+)\s*[=!]", inside))) for name, inside in found]


def grouped(query: str) -> set[str]:
    """The labels after by, without, on, ignoring, group_left and label_values."""
    clauses = re.findall(r"\b(?:by|without|on|ignoring|group_left)\s*\(([^)]*)\)", query)
    clauses += re.findall(r"\blabel_values\(.*,\s*(\w+)\)", query)
    return {word for clause in clauses for word in re.findall(r"\w+", clause)}


def assert_exists(query: str) -> None:
    """Every metric and label of it is there."""
    assert spoken_of(query) <= LABELS.keys()
    for name, labels in selected(query):
        assert labels <= LABELS[name] | _OF_A_SCRAPE
    assert grouped(query) <= labels_of(query)


@pytest.mark.parametrize("query", queries())
def test_what_the_dashboard_asks_for_is_there(query: str) -> None:
    assert spoken_of(query)
    assert_exists(query)


def test_a_legend_names_labels_that_its_query_has() -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            words = set(re.findall(r"\{\{\s*(\w+)\s*\}\}", target["legendFormat"]))
            assert words <= labels_of(target["expr"]), panel["title"]


def test_the_dashboard_takes_any_data_source_and_its_panels_stand_apart() -> None:
    variables = {one["name"]: one["type"] for one in DASHBOARD["templating"]["list"]}
    assert variables == {
        "datasource": "datasource", "instance": "query", "model": "query", "device": "query",
    }  # fmt: skip
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one in (*panels, *(target for panel in panels for target in panel["targets"])):
        assert one["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    places = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(places)) == len(places)
    assert max(x for x, _ in places) < 24


def test_the_checks_of_names_would_find_a_wrong_one() -> None:
    for wrong in (
        "synapse_model_redy == 0", 'synapse_up{model="m"}', "sum by (phase) (synapse_model_ready)",
        "label_values(synapse_up, model)",
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            assert_exists(wrong)


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_asks_for_what_is_there_and_says_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in {"critical", "warning"}
    assert_exists(alert["expr"])
    said = alert["annotations"]
    assert said.keys() == {"summary", "description"}
    assert re.search(r" See docs/operations\.md#[a-z-]+\.$", said["description"])
    used = set(re.findall(r"\$labels\.(\w+)", said["summary"] + said["description"]))
    assert "instance" in used
    assert used <= labels_of(alert["expr"])


@pytest.mark.skipif(not _OPERATIONS.exists(), reason="the docs do not travel with everything")
def test_what_to_do_upon_an_alert_stands_where_it_says() -> None:
    headings = re.findall(r"^#+ (.+)$", _OPERATIONS.read_text(), re.MULTILINE)
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings
    }
    for alert in ALERTS:
        (named,) = re.findall(r"operations\.md#([a-z-]+)", alert["annotations"]["description"])
        assert named in anchors, alert["alert"]


def test_the_example_scrapes_with_a_password_from_a_file() -> None:
    (scrape,) = yaml.safe_load(_SCRAPES.read_text())["scrape_configs"]
    assert scrape["job_name"] == "synapse"
    assert scrape["basic_auth"].keys() == {"username", "password_file"}
    assert yaml.safe_load(_SCRAPES.read_text())["rule_files"] == [_RULES.name]


# --- the reference -------------------------------------------------------------------------------


def _alerts_with(metric: str) -> str:
    return ", ".join(one["alert"] for one in ALERTS if metric in spoken_of(one["expr"]))


def _line(metric: metrics.Metric, subject: tuple[str, ...]) -> str:
    labels = ", ".join(f"`{label}`" for label in (*subject, *metric.labels))
    cells = (
        f"`{metric.name}`", metric.kind.value, labels, metric.unit, metric.meaning,
        _alerts_with(metric.name),
    )  # fmt: skip
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def test_the_reference_lists_every_metric_as_it_is() -> None:
    """Where it does not, what stands on the left is what should stand there."""
    meant = [_line(one, subject) for subject, some in metrics.METRICS.items() for one in some]
    there = [line for line in _REFERENCE.read_text().splitlines() if line.startswith("| `synapse_")]
    assert "\n".join(meant) == "\n".join(there)


def test_the_reference_lists_every_alert() -> None:
    there = re.findall(r"^\| (Synapse\w+) \|", _REFERENCE.read_text(), re.MULTILINE)
    assert there == [alert["alert"] for alert in ALERTS]


# --- what the rules do ---------------------------------------------------------------------------

_STEPS = 80  # of 15 s: 20 minutes
_AT = "19m"


def _series(name: str, **labels: str) -> str:
    where = {"job": "synapse", "instance": "h"} | labels
    return name + "{" + ",".join(f'{key}="{word}"' for key, word in where.items()) + "}"


def _of_m(name: str, **labels: str) -> str:
    return _series(f"synapse_model_{name}", model="m", **labels)


_PHASE, _QUEUED = _of_m("phase", phase="ready"), _of_m("requests_queued")
_OOM = _of_m("failures_total", **{"class": "out-of-memory"})
_CPU = {"device": "CPU"}

# One model and one device in good health, whose latest change has proved itself.
HEALTHY = {
    _series("up"): "1x80", _series("synapse_up"): "1x80",
    _series("synapse_listener_lag_seconds"): "0.01x80",
    _series("synapse_snapshot_unreadable"): "0x80", _series("synapse_commands_waiting"): "0x80",
    _of_m("info", tier="FAST"): "1x80", _PHASE: "1x80", _of_m("ready"): "1x80",
    _of_m("enabled"): "1x80", _of_m("breaker", state="closed"): "1x80",
    _of_m("restarts_total"): "7x80", _OOM: "2x80", _of_m("generation"): "3x40 4x40",
    _of_m("trial"): "0x40 1x12 0x28", _QUEUED: "0 1 2 1 0 0x80",
    _of_m("probe_seconds"): "0.01x30 20 0.01x50",
    _series("synapse_device_up", **_CPU): "1x80",
    _series("synapse_device_room_bytes", **_CPU): "1000x80",
}  # fmt: skip

_DOWN = {_PHASE: "_x80", _of_m("ready"): "0x80"}

# What is otherwise, and which alerts are raised then.
HISTORIES: dict[str, tuple[dict[str, str], set[str]]] = {
    "all is well": ({}, set()),
    "supervisord is gone": ({_series("up"): "0x80"}, {"SynapseUnreachable"}),
    "the listener is silent": ({_series("synapse_up"): "0x80"}, {"SynapseListenerSilent"}),
    "the listener is late": (
        {_series("synapse_listener_lag_seconds"): "2x80"}, {"SynapseListenerLate"},
    ),
    "a part is not read": (
        {_series("synapse_snapshot_unreadable"): "1x80"}, {"SynapseSnapshotUnreadable"},
    ),
    "a command waits": ({_series("synapse_commands_waiting"): "1x80"}, {"SynapseCommandsWaiting"}),
    "a model has failed": (
        {**_DOWN, _of_m("phase", phase="failed"): "1x80"},
        {"SynapseModelFailed", "SynapseNoFastModel"},
    ),
    "a breaker is open": (
        {
            **_DOWN, _of_m("phase", phase="failed"): "1x80",
            _of_m("breaker", state="closed"): "_x80", _of_m("breaker", state="open"): "1x80",
        },
        {"SynapseBreakerOpen", "SynapseNoFastModel"},
    ),
    "a model restarts every two minutes": (
        {_of_m("restarts_total"): " ".join(str(step // 8) for step in range(_STEPS))},
        {"SynapseRestartLoop"},
    ),
    "a model ran out of memory for the first time": (
        {_OOM: "0x60 1x20"}, {"SynapseOutOfMemory"},
    ),
    "a model comes and goes": (
        {
            **_DOWN, _of_m("phase", phase="backoff"): "1 _ _ _ " * 20,
            _of_m("phase", phase="loading"): "_ 1 1 1 " * 20,
        },
        {"SynapseModelUnhealthy", "SynapseNoFastModel"},
    ),
    "a model loads for a long time": (
        {**_DOWN, _of_m("phase", phase="loading"): "1x80", _of_m("info", tier="FAST"): "_x80"},
        set(),
    ),
    "a model does not fit": (
        {**_DOWN, _of_m("phase", phase="deferred"): "1x80"},
        {"SynapseModelDeferred", "SynapseNoFastModel"},
    ),
    "a model is disabled": (
        {**_DOWN, _of_m("enabled"): "0x80", _of_m("phase", phase="disabled"): "1x80"}, set(),
    ),
    "another FAST model serves": (
        {
            **_DOWN, _of_m("phase", phase="loading"): "1x80",
            _series("synapse_model_info", model="n", tier="FAST"): "1x80",
            _series("synapse_model_ready", model="n"): "1x80",
            _series("synapse_model_enabled", model="n"): "1x80",
        },
        set(),
    ),
    "a queue grows": ({_QUEUED: "0+1x80"}, {"SynapseQueueGrowing"}),
    "a queue is long and shrinks": ({_QUEUED: "200-1x80"}, set()),
    "probes are slow": ({_of_m("probe_seconds"): "5x80"}, {"SynapseProbeSlow"}),
    "a change is taken back": (
        {
            _of_m("generation"): "3x40 4x12 5x28", _of_m("trial"): "0x40 1x12 0x28",
        },
        {"SynapseChangeRolledBack"},
    ),
    "a change follows another": (
        {
            _of_m("generation"): "3x40 4x12 5x28", _of_m("trial"): "0x40 1x40",
        },
        set(),
    ),
    "a device is not read": (
        {
            _series("synapse_device_up", **_CPU): "0x80",
            _series("synapse_device_room_bytes", **_CPU): "_x80",
        },
        {"SynapseDeviceUnreadable"},
    ),
    "a reserve is broken into": (
        {_series("synapse_device_room_bytes", **_CPU): "-1x80"}, {"SynapseDeviceFull"},
    ),
}  # fmt: skip


def _case(name: str, changes: dict[str, str], raised: set[str]) -> dict[str, Any]:
    """A test as promtool takes it."""
    series = [{"series": key, "values": word} for key, word in (HEALTHY | changes).items()]
    expected = [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in sorted(raised)]
    firing = 'count by (alertname) (ALERTS{alertstate="firing"})'
    return {
        "name": name, "interval": "15s", "input_series": series,
        "promql_expr_test": [{"expr": firing, "eval_time": _AT, "exp_samples": expected}],
    }  # fmt: skip


def test_every_alert_is_raised_in_one_of_the_histories() -> None:
    raised = set().union(*(alerts for _, alerts in HISTORIES.values()))
    assert raised == {alert["alert"] for alert in ALERTS}


@pytest.mark.skipif(_PROMTOOL is None, reason="promtool is not on PATH")
def test_alerts_are_raised_when_they_should_be_and_no_others(tmp_path: Path) -> None:
    cases = [_case(name, *history) for name, history in HISTORIES.items()]
    file = tmp_path / "histories.json"
    file.write_text(
        json.dumps({"rule_files": [str(_RULES)], "evaluation_interval": "15s", "tests": cases})
    )
    done = subprocess.run(
        [str(_PROMTOOL), "test", "rules", str(file)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(_PROMTOOL is None, reason="promtool is not on PATH")
def test_promtool_takes_every_query_of_the_dashboard(tmp_path: Path) -> None:
    rules = [
        {"record": f"q{number}", "expr": query.replace("$__rate_interval", "1m")}
        for number, query in enumerate(queries())
        if "label_values" not in query
    ]
    file = tmp_path / "queries.json"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run(
        [str(_PROMTOOL), "check", "rules", str(file)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
