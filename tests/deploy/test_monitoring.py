"""Rules, alerts, the dashboard's and the autoscalers' questions: read by the real promtool, and asked of real names."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import yaml

from tests.deploy import charts

RULES = charts.SERVING / "files/rules.yaml"
DASHBOARD = json.loads((charts.SERVING / "files/dashboard.json").read_text())
ALERTS = charts.ROOT / "tests/deploy/alerts.yaml"


def promtool(*arguments: str, cwd=None) -> str:
    """What promtool says; it must find no fault."""
    done = subprocess.run(
        [str(charts.BIN / "promtool"), *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_takes_the_rules():
    assert "9 rules found" in promtool("check", "rules", "--lint=all", "--lint-fatal", str(RULES))


def test_each_alert_fires_when_it_should(tmp_path):
    shutil.copy(RULES, tmp_path)
    shutil.copy(ALERTS, tmp_path)
    promtool("test", "rules", "alerts.yaml", cwd=tmp_path)
    alerts = {
        rule["alert"]
        for group in yaml.safe_load(RULES.read_text())["groups"]
        for rule in group["rules"]
        if "alert" in rule
    }
    fired = {
        one["alertname"]
        for test in yaml.safe_load(ALERTS.read_text())["tests"]
        for one in test["alert_rule_test"]
        if one.get("exp_alerts")
    }
    silent = {one["alertname"] for one in yaml.safe_load(ALERTS.read_text())["tests"][0]["alert_rule_test"]}
    assert alerts == fired == silent


def test_an_alert_that_never_fires_would_be_seen(tmp_path):
    (tmp_path / "rules.yaml").write_text(RULES.read_text().replace("> 2\n", "> 200\n"))
    shutil.copy(ALERTS, tmp_path)
    done = subprocess.run(
        [str(charts.BIN / "promtool"), "test", "rules", "alerts.yaml"], cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode != 0


def questions() -> dict[str, str]:
    """Everything that is asked of Prometheus, by who asks."""
    found = {}
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        found |= {rule.get("alert") or rule["record"]: rule["expr"] for rule in group["rules"]}
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            found[f"{panel['title']} {target['refId']}"] = target["expr"].replace("$__rate_interval", "1m")
    for trigger in charts.one_of(charts.serving("fleet"), "ScaledObject")["spec"]["triggers"]:
        found[f"keda {trigger['name']}"] = trigger["metadata"]["query"]
    return found


def test_promtool_reads_every_question(tmp_path):
    rules = [{"record": f"asked:{n}", "expr": expr} for n, expr in enumerate(questions().values())]
    (tmp_path / "asked.yaml").write_text(yaml.safe_dump({"groups": [{"name": "asked", "rules": rules}]}))
    promtool("check", "rules", str(tmp_path / "asked.yaml"))


def test_the_autoscalers_ask_for_what_the_rules_record():
    """The adapter's external metrics and KEDA's own questions are the same two, so that both scale alike."""
    recorded = {rule["record"]: rule["expr"] for rule in yaml.safe_load(RULES.read_text())["groups"][0]["rules"]}
    wait, pictures = (questions()[f"keda {name}"] for name in ("queue-wait", "pictures"))

    def plain(expr):
        return re.sub(r"\{[^}]*\}|by \([^)]*\)|\s", "", expr)

    assert plain(recorded["turbolens:queue_wait_seconds:p95_2m"]) in plain(wait)
    assert plain(recorded["turbolens:pictures:rate_2m"]) in plain(pictures)


def test_the_dashboard_is_one_that_grafana_lays_out():
    assert DASHBOARD["uid"]
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    cells = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        mine = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert cells.isdisjoint(mine), panel["title"]
        cells |= mine
    names = {one["name"] for one in DASHBOARD["templating"]["list"]}
    asked = {name for expr in questions().values() for name in re.findall(r"\$(\w+)", expr)}
    assert asked <= names | {"labels", "value"}
