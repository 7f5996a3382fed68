"""How many GPUs for a load, what a way of sharing it is worth, and how far to trust the answer.

python -m benchmarks.fleet plan --rate 100 --p99 0.3 --usd-per-hour 3
python -m benchmarks.fleet study     # policies, losses and cold starts, simulated
python -m benchmarks.fleet check     # real processes beside the simulation, about eight minutes
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from benchmarks.fleet.simulation import Curve, Fleet, Policy, plan, poisson, simulate
from benchmarks.places import RESULTS

BENCH = RESULTS / "sdxl-turbo-gpu.json"
FIGURES = Path(__file__).parents[2] / "docs/deployment"
POLICIES: tuple[Policy, ...] = ("random", "round robin", "least loaded", "one queue")
OVERHEAD_S = 0.006
"""Of a call to an idle server beyond its batch: from "all features" to "new prompt to PNG" in the benchmark."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The fewest servers that keep a p99 under a load, and what they cost."""

    rate: float
    """Calls a second, at the busiest; they come independently of each other."""
    p99: float
    """Seconds within which 99 of 100 are answered."""
    pictures: int = 1
    """Of a call."""
    bench: Path = BENCH
    """What `turbolens bench --out` wrote on the machine that will serve."""
    steps: int = 1
    """Denoising steps."""
    served: float = 0.0
    """Pictures a second that one server was measured to serve in full batches, where the benchmark of the engine alone
    says more; 0: believe that one."""
    policy: Policy = "round robin"
    """How callers find a server; the SDK takes turns."""
    max_batch: int = 8
    """As for `turbolens serve`."""
    overhead: float = OVERHEAD_S
    """Seconds of a call beyond its batch."""
    spare: int = 1
    """Servers that may be missing, lost or being replaced, without the p99 suffering."""
    seconds: float = 120.0
    """Of the load that is simulated; a p99 wants some thousands of calls."""
    usd_per_hour: float = 0.0
    """Of one server; 0: say nothing of cost."""

    def run(self) -> None:
        curve = Curve.of_bench(self.bench, self.steps)
        if self.served:
            curve = curve.serving(self.served, self.max_batch)
        fleet = Fleet(curve, 1, self.policy, self.max_batch, overhead_s=self.overhead)
        rate = self.rate * self.pictures
        print(f"{self.bench.name}: {curve.pictures_per_s(1):.1f} pictures a second one by one, "
              f"{curve.pictures_per_s(self.max_batch):.1f} in batches of {self.max_batch}")  # fmt: skip
        needed = 0
        for needed, outcome in plan(fleet, poisson(self.rate, self.seconds, 0, self.pictures), self.p99):
            told = f"{outcome.refused} refused, " if outcome.refused else ""
            print(f"{needed:4} servers: {told}p50 {outcome.quantile(0.5):.3f} s, p99 {outcome.quantile(0.99):.3f} s, "
                  f"busy {outcome.busy:.0%}, {outcome.mean_batch:.1f} pictures a batch")  # fmt: skip
        servers = needed + self.spare
        print(
            f"\n{servers} servers, of which {self.spare} to spare. autoscaling.picturesPerSecond: {rate / needed:.3g}"
        )
        if self.usd_per_hour:
            each = self.usd_per_hour * servers / 3600 / rate
            print(f"${self.usd_per_hour * servers:,.2f} an hour, ${each * 1000:.3f} for 1,000 pictures at this load")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Policies, the loss of a machine and cold starts, on the curve of a benchmark; written as JSON and as a figure."""

    bench: Path = BENCH
    """As for `plan`."""
    servers: int = 4
    """Of the fleet."""
    seconds: float = 60.0
    """Of each load."""
    out: Path = RESULTS / "fleet.json"
    """File to write."""

    def run(self) -> None:
        from benchmarks.fleet.figures import draw_study

        curve = Curve.of_bench(self.bench)
        base = Fleet(curve, self.servers, overhead_s=OVERHEAD_S)
        most = self.servers * curve.pictures_per_s(base.max_batch)
        loads = [round(share * most, 1) for share in (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)]
        rows: list[dict[str, Any]] = []
        for policy in POLICIES:
            for pictures in (1, 4):
                for load in loads:
                    requests = poisson(load / pictures, self.seconds, 1, pictures)
                    done = simulate(dataclasses.replace(base, policy=policy), requests)
                    rows.append({
                        "policy": policy, "pictures of a call": pictures, "pictures_per_s": load,
                        "p50_s": done.quantile(0.5), "p99_s": done.quantile(0.99), "refused": done.refused,
                        "busy": done.busy, "mean_batch": done.mean_batch,
                    })  # fmt: skip
                    print(policy, pictures, load, f"{done.quantile(0.99):.3f}", done.refused, file=sys.stderr)
        losses = [self._loss(base, share * most, cold) for share in (0.6, 0.8, 0.9) for cold in (15.0, 90.0)]
        result = {"benchmark": "fleet", "bench": self.bench.name, "servers": self.servers, "most_pictures_per_s": most,
                  "policies": rows, "losses": losses}  # fmt: skip
        self.out.write_text(json.dumps(result, indent=1) + "\n")
        draw_study(result, FIGURES / "fleet.png")

    def _loss(self, base: Fleet, load: float, cold_start_s: float) -> dict[str, Any]:
        """What callers see around the loss of one server: p99 of the calls that came in each five seconds."""
        requests = poisson(load, 180.0, 2)
        done = simulate(dataclasses.replace(base, losses=(40.0,), cold_start_s=cold_start_s), requests)
        windows = []
        for start in range(0, 180, 5):
            took = [r.done - r.arrived for r in requests if r.done is not None and start <= r.arrived < start + 5]
            windows.append({"from_s": start, "p99_s": float(np.quantile(took, 0.99)) if took else None})
        return {
            "pictures_per_s": load, "cold_start_s": cold_start_s, "sent_again": done.sent_again,
            "refused": done.refused, "windows": windows,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """Two and three real processes beside the simulation, under the same calls.

    The engine of each sleeps as long as a curve says, so that processes on a small machine do not slow each other.
    """

    seconds: float = 100.0
    """Of each of the four loads."""
    out: Path = RESULTS / "fleet_check.json"
    """File to write."""

    def run(self) -> None:
        from benchmarks.fleet.check import case
        from benchmarks.fleet.figures import draw_check

        curve = Curve((1, 8), (0.20, 0.76), (0.04, 0.20))
        cases = []
        for servers, rate in ((2, 6.0), (2, 11.0), (3, 9.0), (3, 16.5)):
            made = case(servers, rate, self.seconds, curve)
            cases.append(made)
            told = ", ".join(
                f"{name} {row['real_s']:.3f} s (simulated {row['simulated_s']:.3f})"
                for name, row in made["quantiles"].items()
            )
            print(f"{servers} servers, {rate:g} calls a second, {made['calls']} calls, {made['failed']} failed: {told}")
        result = {"benchmark": "fleet_check", "curve": dataclasses.asdict(curve), "cases": cases}
        self.out.write_text(json.dumps(result, indent=1) + "\n")
        draw_check(result, FIGURES / "fleet-check.png")
        off = [abs(row["simulated_s"] / row["real_s"] - 1) for one in cases for row in one["quantiles"].values()]
        if max(off) > 0.15 or any(one["failed"] for one in cases):
            sys.exit(f"the simulation is {max(off):.0%} off; 15 % is the aim")


Command = (
    Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Study, tyro.conf.subcommand("study")]
    | Annotated[Check, tyro.conf.subcommand("check")]
)


def main() -> None:
    """Run one command; what cannot be had is one line and exit code 1."""
    command: Plan | Study | Check = tyro.cli(Command, prog="python -m benchmarks.fleet", description=__doc__)
    try:
        command.run()
    except ValueError as error:
        sys.exit(f"benchmarks.fleet: {error}")


if __name__ == "__main__":
    main()
