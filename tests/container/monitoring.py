"""Ask a Prometheus that scrapes the API all that the dashboard and the alerts ask: monitoring.py PROMETHEUS API."""

# ruff: noqa: S310 - the addresses are the test's own

import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import Request, urlopen

ROOT = Path(__file__).parents[2]


def ask(url: str, **query: str) -> list[dict[str, Any]]:
    with urlopen(f"{url}/api/v1/query?{urlencode(query)}", timeout=10) as answer:
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return found


def missing(prometheus: str, queries: list[str]) -> list[str]:
    """Those that nothing, or no number, is answered to."""
    return [
        query
        for query in queries
        if not any(not math.isnan(float(found["value"][1])) for found in ask(prometheus, query=query))
    ]


def main(prometheus: str, api: str) -> None:
    panels = json.loads((ROOT / "docker/monitoring/dashboard.json").read_text())["panels"]
    queries = [t["expr"].replace("$__rate_interval", "1m") for panel in panels for t in panel["targets"]]
    with urlopen(f"{prometheus}/api/v1/rules", timeout=10) as answer:
        rules = [rule for group in json.load(answer)["data"]["groups"] for rule in group["rules"]]
    metrics = sorted({name for rule in rules for name in re.findall(r"\b(?:cliphar_\w+|up)\b", rule["query"])})
    photo = (ROOT / "src/cliphar/assets/samples/cat.jpg").read_bytes()
    left = queries + metrics
    for turn in range(120):
        # another file each time, for one that was answered costs the model nothing
        sent = photo + turn.to_bytes(2)
        urlopen(Request(f"{api}/v1/predict", sent, {"Content-Type": "image/jpeg"}), timeout=30).close()
        left = missing(prometheus, left)
        if not left:
            break
        time.sleep(1)
    assert not left, f"nothing is answered to {left}"
    bad = [rule for rule in rules if rule["health"] == "err"]
    assert rules and not bad, f"rules that do not run: {bad}"
    print(f"{len(queries)} queries of {len(panels)} panels, {len(rules)} alerts")


if __name__ == "__main__":
    main(*sys.argv[1:])
