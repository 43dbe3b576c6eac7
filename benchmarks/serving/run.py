"""cliphar serve against plain FastAPI with PyTorch, LitServe and BentoML: one machine, one model, one load generator.

    python benchmarks/serving/run.py [--seconds 5] [--rounds 2] [--overload 60] [--out docs/benchmarks]
    python benchmarks/serving/run.py --alone --model BUNDLE --out elsewhere     cliphar only, with another model

Peers live in an environment of their own, which this makes (.venv-peers) unless --peers names its python.
All servers stay up; at each number of clients they take turns, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from load import Load, Outcome, photos

from cliphar import load
from cliphar.runtime import cpu_quota

HERE = Path(__file__).resolve().parent
PEERS = ("bentoml==1.4.39", "litserve==0.2.19")  # apart, for they pin parts that cliphar has newer
CLIENTS = (1, 8, 32, 128)
_CONNECTIONS = 640  # of the overload: more than the queue takes


def peers_python() -> str:
    """An environment with the peers, which also sees what this one has."""
    home = HERE / ".venv-peers"
    python = home / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        site = next((home / "lib").glob("python*/site-packages"))
        (site / "cliphar.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PEERS], check=True)
    return str(python)


class Server:
    """A server in a process of its own."""

    def __init__(self, command: list[str], ready: str, path: str) -> None:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]
        command = [part.replace("PORT", str(self.port)) for part in command]
        started = time.perf_counter()
        self.process = subprocess.Popen(
            command, cwd=HERE, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.load = Load(self.port, path, photos())
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{ready}", timeout=2):
                    break
            except OSError:
                if self.process.poll() is not None or time.perf_counter() - started > 120:
                    raise SystemExit(f"this did not start: {' '.join(command)}") from None
                time.sleep(0.02)
        self.ready_s = time.perf_counter() - started

    def memory_mib(self) -> float:
        """Proportional memory of the process and its children."""
        return float(sum(one.memory_full_info().pss for one in self._family())) / 2**20

    def cpu_s(self) -> float:
        """Processor time of the process and its children so far."""
        times = [one.cpu_times() for one in self._family()]
        return float(sum(one.user + one.system for one in times))

    def _family(self) -> list[psutil.Process]:
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def measure(self, clients: int, seconds: float) -> Outcome:
        """Load of so many clients; the outcome also says what the server used."""
        before = self.cpu_s()
        outcome = self.load.run(clients, seconds)
        outcome.cpu_s = self.cpu_s() - before
        return outcome

    def stop(self) -> None:
        """Stop it and its children."""
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)


def own_rate(model: str, seconds: float) -> float:
    """Photos a second of the recogniser without HTTP, from bytes."""
    recognizer = load(model)
    contents, done = photos(), 0
    list(recognizer.stream(contents[:16]))
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        done += sum(1 for _ in recognizer.stream(contents))
    return done / (time.perf_counter() - started)


def overload(server: Server, seconds: float) -> dict[str, Any]:
    """Ten times what it can do, for so long: goodput against its peak, memory before and after."""
    peak = server.load.run(32, 5).per_s
    server.load.run(_CONNECTIONS, 3, rate=10 * peak)
    before = server.memory_mib()
    outcome = server.load.run(_CONNECTIONS, seconds, rate=10 * peak)
    offered = (len(outcome.latencies) + outcome.refused + outcome.failed) / outcome.seconds
    again = server.load.run(32, 5).per_s
    return {
        "peak_per_s": peak,
        "offered_x_peak": offered / peak,
        "goodput_x_peak": outcome.per_s / peak,
        "refused": outcome.refused,
        "failed": outcome.failed,
        "p99_ms": outcome.quantile_ms(0.99),
        "memory_mib": [before, server.memory_mib()],
        "afterwards_x_peak": again / peak,
    }


def row(runs: list[Outcome]) -> dict[str, float]:
    """Medians over the rounds; errors are summed."""
    return {
        "per_s": statistics.median(run.per_s for run in runs),
        "p50_ms": statistics.median(run.quantile_ms(0.5) for run in runs),
        "p99_ms": statistics.median(run.quantile_ms(0.99) for run in runs),
        "cpu_ms": statistics.median(1e3 * run.cpu_s / max(1, len(run.latencies)) for run in runs),
        "errors": sum(run.refused + run.failed for run in runs),
    }


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [
        "| clients | server | answers/s | p50 ms | p99 ms | CPU ms an answer | errors | memory MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for clients in CLIENTS:
        for name, server in results["servers"].items():
            at = server["at"][str(clients)]
            lines.append(
                f"| {clients} | {name} | {at['per_s']:.1f} | {at['p50_ms']:.0f} | {at['p99_ms']:.0f} "
                f"| {at['cpu_ms']:.1f} | {at['errors']} | {server['memory_mib']:.0f} |"
            )
    return "\n".join(lines)


def plot(results: dict[str, Any], target: Path) -> None:
    """Answers a second and p99 against clients."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.fonttype"] = "none"  # text stays text
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name, server in results["servers"].items():
        at = [server["at"][str(clients)] for clients in CLIENTS]
        left.plot(CLIENTS, [one["per_s"] for one in at], marker="o", label=name)
        right.plot(CLIENTS, [one["p99_ms"] for one in at], marker="o", label=name)
    left.axhline(results["own_per_s"], color="grey", linestyle="--", label="recogniser, no HTTP")
    left.set(xscale="log", xlabel="clients", ylabel="answers a second", ylim=(0, None))
    right.set(xscale="log", yscale="log", xlabel="clients", ylabel="p99, ms")
    for axes in (left, right):
        axes.set_xticks(CLIENTS, [str(clients) for clients in CLIENTS])
        axes.minorticks_off()
    left.legend(fontsize=7, loc="lower right", bbox_to_anchor=(1, 0.2))
    figure.savefig(target, metadata={"Date": None})


def main() -> None:
    """Run it all, and write the table, the plot and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--overload", type=float, default=60, help="seconds of ten times too much; 0 leaves it out")
    parser.add_argument("--peers", help="python of an environment that has the peers")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--model", default="mini", help="with --alone, any bundle")
    parser.add_argument("--alone", action="store_true", help="without the peers, which are written for mini")
    given = parser.parse_args()
    if given.model != "mini" and not given.alone:
        parser.error("the peers are written for mini; give --alone for another model")
    commands = {
        "cliphar": ([sys.executable, "-m", "cliphar", "serve", "--model", given.model, "--port", "PORT"], "/readyz")
    }
    if not given.alone:
        python = given.peers or peers_python()
        commands |= {
            "FastAPI + PyTorch": ([sys.executable, "peers.py", "plain", "PORT"], "/docs"),
            "LitServe": ([python, "peers.py", "litserve", "PORT"], "/health"),
            "BentoML": ([python, "-m", "bentoml", "serve", "peers:Bento", "--port", "PORT"], "/readyz"),
        }
    servers = {}
    try:
        for name, (command, ready) in commands.items():
            servers[name] = Server(command, ready, "/v1/predict" if name == "cliphar" else "/predict")
            print(f"{name}: ready after {servers[name].ready_s:.1f} s", flush=True)
            servers[name].load.run(4, 2)  # warm
        results: dict[str, Any] = {"cores": cpu_quota(), "rounds": given.rounds, "seconds": given.seconds}
        runs: dict[str, dict[int, list[Outcome]]] = {name: {clients: [] for clients in CLIENTS} for name in servers}
        own = []
        for _ in range(given.rounds):
            for clients in CLIENTS:
                own.append(own_rate(given.model, given.seconds) if clients == 32 else 0.0)
                for name, server in servers.items():
                    runs[name][clients].append(server.measure(clients, given.seconds))
                    print(f"{clients:>4} {name}: {runs[name][clients][-1].per_s:.1f}/s", flush=True)
        results["own_per_s"] = statistics.median(rate for rate in own if rate)
        results["servers"] = {
            name: {
                "ready_s": server.ready_s,
                "memory_mib": server.memory_mib(),
                "at": {str(clients): row(runs[name][clients]) for clients in CLIENTS},
            }
            for name, server in servers.items()
        }
        for name in list(servers)[1:]:
            servers.pop(name).stop()
        if given.overload:
            results["overload"] = overload(servers["cliphar"], given.overload)
    finally:
        for server in servers.values():
            server.stop()
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "serving.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, given.out / "serving.svg")
    print(table(results))
    print(json.dumps({key: value for key, value in results.items() if key != "servers"}, indent=1))


if __name__ == "__main__":
    main()
