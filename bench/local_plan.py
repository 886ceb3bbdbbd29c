"""Does `ridgeline plan` know how fast this machine trains? `python bench/local_plan.py [ROUNDS]`

Needs the prepared data of examples/laptop.toml. Each round (2) probes the machine into a folder of
its own, then runs `ridgeline train` on a few models and layouts; the second round goes backwards.
Step times are medians of a run's steps, the first two left out. What others do on the machine
disturbs both sides: each probe and run waits for quiet, and of at most three tries the one counts
during which others used the least of the cores, which the table tells.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from functools import partial
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

import tomlkit

from ridgeline.machine.local import local_file
from ridgeline.plan.plan import price, question_of_run
from ridgeline.run import make_run

EXAMPLE = Path("examples/laptop.toml")
STEPS = 8
QUIET = 0.05
"""Share of the cores that others may use."""
TRIES, PATIENCE_S = 3, 60.0
"""How often a case is tried, and how long each try waits for quiet."""
MODELS: dict[str, dict[str, Any]] = {
    "laptop": {},
    "wider": {"hidden": 768, "heads": 12, "ffn_hidden": 2048},
    "deeper": {"layers": 8},
}
CASES = (
    ("laptop", "mb1 bf16"), ("laptop", "mb4 bf16"), ("laptop", "mb8 bf16"),
    ("laptop", "mb1 fp32"), ("laptop", "mb4 fp32"), ("laptop", "mb8 fp32"),
    ("laptop", "dp2 mb1 bf16"), ("laptop", "dp2 mb8 bf16"), ("laptop", "dp2 mb4 fp32"),
    ("wider", "mb1 bf16"), ("wider", "mb8 bf16"), ("wider", "mb4 fp32"), ("wider", "dp2 mb4 bf16"),
    ("deeper", "mb1 fp32"), ("deeper", "mb8 bf16"), ("deeper", "dp2 mb8 bf16"),
)  # fmt: skip


def values_of(model: str, layout: str) -> dict[str, Any]:
    """The run file: the example with another model and layout, which only trains."""
    values = tomllib.loads(EXAMPLE.read_text(encoding="utf-8"))
    return values | {
        "model": {"name": "laptop", **MODELS[model]},
        "layout": layout,
        "budget": {"steps": STEPS},
        "evaluation": {"sequences": 1},
        "checkpoint": {"every_steps": 0},
        "logging": {"every_steps": 1, "tensorboard": False},
    }


def ridgeline(*words: str) -> None:
    """Run a command, and show what it said where it failed."""
    command = [sys.executable, "-m", "ridgeline", *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{ended.stdout}{ended.stderr}")


def busy_s() -> float:
    """Seconds that all cores together have worked, for whomever."""
    words = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()
    user, nice, system, _, _, irq, softirq, stolen = map(int, words[1:9])
    return (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK")


def ours_s() -> float:
    """Seconds that this process and the children it has waited for have worked."""
    told = os.times()
    return told.user + told.system + told.children_user + told.children_system


def used_by_others(since: tuple[float, float]) -> float:
    """Share of the cores that others used since `(perf_counter(), busy_s() - ours_s())`."""
    seconds = time.perf_counter() - since[0]
    return (busy_s() - ours_s() - since[1]) / seconds / (os.cpu_count() or 1)


def quietest(action: Callable[[], float]) -> tuple[float, float]:
    """What `action` gives in the quietest of some tries, and the share that others used."""
    tries = []
    for _ in range(TRIES):
        patience, others = time.monotonic() + PATIENCE_S, 1.0
        while others > QUIET and time.monotonic() < patience:
            since = time.perf_counter(), busy_s() - ours_s()
            time.sleep(2)
            others = used_by_others(since)
        since = time.perf_counter(), busy_s() - ours_s()
        value = action()
        tries.append((used_by_others(since), value))
        if tries[-1][0] <= QUIET:
            break
    others, value = min(tries)
    return value, others


def probed(folder: str, number: int) -> float:
    """Probe into a new file of `folder`; its number."""
    ridgeline("probe", "--output", f"{folder}/{number}.toml")
    return number


def measured_s(values: dict[str, Any]) -> float:
    """The median step of a real run."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "run.toml")
        file.write_text(tomlkit.dumps(values | {"folder": folder}), encoding="utf-8")
        ridgeline("train", str(file))
        metrics = Path(folder, values["name"], "metrics.jsonl").read_text(encoding="utf-8")
    steps = [row["step_s"] for row in map(json.loads, metrics.splitlines()) if "step_s" in row]
    return statistics.median(steps[2:])


def one_round(cases: tuple[tuple[str, str], ...]) -> dict[tuple[str, str], tuple[float, ...]]:
    """Planned and measured seconds, and the share of the cores others used, of each case."""
    rows = {}
    with tempfile.TemporaryDirectory() as home:
        os.environ["XDG_CONFIG_HOME"] = home
        numbers = count()
        number, others = quietest(lambda: probed(home, next(numbers)))
        print(f"probed, others used {others:.0%}", file=sys.stderr, flush=True)
        local_file().parent.mkdir(parents=True)
        Path(home, f"{number}.toml").rename(local_file())
        for model, layout in cases:
            values = values_of(model, layout)
            run = make_run(values)
            assert run.layout != "auto"
            planned = price(question_of_run(run), [run.layout])[0].step_s
            measured, others = quietest(partial(measured_s, values))
            rows[model, layout] = planned, measured, others
            told = f"{model:8} {layout:14} {planned:8.3f} {measured:8.3f} {others:7.0%}"
            print(told, file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Print one line per case: the mean over the rounds of planned and measured, and the ratio."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    found = [one_round(CASES[:: 1 if turn % 2 == 0 else -1]) for turn in range(rounds)]
    print(f"{'model':8} {'layout':14} {'planned':>9} {'measured':>9} {'ratio':>6} {'others':>7}")
    ratios = []
    for case in CASES:
        columns = zip(*(each[case] for each in found), strict=True)
        planned, measured, others = map(statistics.fmean, columns)
        ratios.append(planned / measured)
        print(
            f"{case[0]:8} {case[1]:14} {planned:7.3f} s {measured:7.3f} s {ratios[-1]:6.2f} "
            f"{others:7.0%}"
        )
    off = [abs(math.log(each)) for each in ratios]
    print(
        f"off by {math.expm1(statistics.fmean(off)):.1%} on average, {math.expm1(max(off)):.1%} at "
        f"most, {sum(each <= math.log(1.1) for each in off)} of {len(off)} within 10%"
    )
    print(f"{platform.platform()}, {os.cpu_count()} cores, PyTorch {metadata.version('torch')}")


if __name__ == "__main__":
    main()
