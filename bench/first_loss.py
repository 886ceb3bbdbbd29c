"""How soon after the command does the first loss appear? `python bench/first_loss.py RUN.toml [N]`

Starts `ridgeline train RUN.toml` N times (5) in fresh run folders, data prepared, and stops each
after its first logged line; in between times `import torch` in a process of its own. The claim:
first loss within the import time of torch + 8 s.
"""

from __future__ import annotations

import json
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata


def first_loss_s(run_file: str, folder: str) -> float:
    """Seconds from starting the command to its first line with a loss."""
    command = [sys.executable, "-m", "ridgeline", "train", run_file, "--folder", folder]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step"):
                taken = time.perf_counter() - start
                process.send_signal(signal.SIGINT)
                process.stdout.read()
                return taken
    raise SystemExit(f"{' '.join(command)} printed no loss (exit status {process.returncode})")


def import_torch_s() -> float:
    """Seconds that `import torch` takes in a new process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - start


def main() -> None:
    run_file = sys.argv[1] if len(sys.argv) > 1 else "examples/laptop.toml"
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    rows = []
    print(f"{'round':>5} {'import torch':>13} {'first loss':>11} {'difference':>11}")
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            torch_s, loss_s = import_torch_s(), first_loss_s(run_file, folder)
        rows.append((torch_s, loss_s))
        print(f"{number + 1:>5} {torch_s:>11.2f} s {loss_s:>9.2f} s {loss_s - torch_s:>9.2f} s")
    beyond = statistics.median(loss_s - torch_s for torch_s, loss_s in rows)
    print(f"median beyond the import of torch: {beyond:.2f} s (claim: at most 8 s)")
    print(
        json.dumps(
            {
                "bench": "first_loss",
                "platform": platform.platform(),
                "torch": metadata.version("torch"),
                "rows": rows,
                "median_beyond_import_s": beyond,
            }
        )
    )


if __name__ == "__main__":
    main()
