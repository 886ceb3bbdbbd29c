"""The verbs. Each imports what it calls only when called, so that `--help` needs no torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

import ridgeline
from ridgeline.cli_audit import audit
from ridgeline.cli_plan import NewFile, machines, plan, probe, validate
from ridgeline.cli_train import OVERRIDES, parity, rehearse
from ridgeline.errors import NotLearnt, RidgelineError, Stopped
from ridgeline.launch.stopping import Wish, end_agent, stop_on_signals


def main() -> NoReturn:
    """Run the command line; errors of the tree, and files that cannot be written, are one message
    and an exit status."""
    try:
        verbs(prog_name="ridgeline", standalone_mode=False)
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            click.echo(stopped)
        sys.exit(stopped.exit_status)
    except RidgelineError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_status)
    except OSError as error:
        click.echo(f"error: {error.filename or 'the system'}: {error.strerror or error}", err=True)
        sys.exit(RidgelineError.exit_status)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    sys.exit(0)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def verbs() -> None:
    """Train large language models without wasting a node-hour.

    \b
    Example:
      ridgeline data prepare examples/laptop.toml
      ridgeline train examples/laptop.toml
      ridgeline sample runs/laptop --prompt "def "
    """


@verbs.group()
def data() -> None:
    """Corpora: text to tokens on disk.

    \b
    Example:
      ridgeline data prepare examples/laptop.toml
    """


@data.command(context_settings=OVERRIDES)
@click.argument("run_file", type=click.Path(path_type=Path))
@click.pass_context
def prepare(context: click.Context, run_file: Path) -> None:
    """Tokenize the corpora of RUN_FILE into shards, training a tokenizer if it names none.

    Any field of the run can be overridden by its dotted name.

    \b
    Example:
      ridgeline data prepare run.toml --data.workers 8
    """
    from rich.console import Console

    run = ridgeline.read_run(run_file, context.args)
    ridgeline.prepare(run, console=Console(highlight=False, soft_wrap=True))


@verbs.command(context_settings=OVERRIDES)
@click.argument("run_file", type=click.Path(path_type=Path))
@click.pass_context
def train(context: click.Context, run_file: Path) -> None:
    """Train RUN_FILE (or go on with a run folder) on this machine's devices.

    Resumes from the newest checkpoint in the run's folder. Ctrl-C, or a signal of a batch system,
    saves and says how to go on (exit status 75). Any field of the run can be overridden by its
    dotted name.

    \b
    Example:
      ridgeline train run.toml --optimizer.lr 3e-4 --layout "dp2 mb8 bf16"
    """
    with stop_on_signals(stop := Wish()):
        try:
            _train(run_file, context.args, stop)
        except Stopped:
            end_agent()
            raise


def _train(run_file: Path, overrides: list[str], stop: Wish) -> None:
    """Train, report, and say how it ended."""
    if run_file.is_dir():
        from ridgeline.train.folder import latest_run_file

        # It may have been moved since its run file was written.
        folder = run_file if run_file.name else run_file.resolve()
        overrides = ["--folder", str(folder.parent), "--name", folder.name, *overrides]
        run_file = latest_run_file(run_file)
    run = ridgeline.read_run(run_file, overrides)
    try:
        outcome = ridgeline.train(run, stop=stop)
    except NotLearnt:
        click.echo(f"report: {ridgeline.report(run.path)}")
        raise
    if outcome.rank == 0:
        click.echo(f"report: {ridgeline.report(run.path)}")
    if not outcome.complete:
        if outcome.rank == 0:
            click.echo(f"stopped at step {outcome.step:,}; go on with: ridgeline train {run.path}")
        end_agent()
        sys.exit(Stopped.exit_status)


@verbs.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--prompt", default="", help="Text to continue; empty: a new document.")
@click.option("--tokens", default=100, show_default=True, help="Most tokens to draw.")
@click.option("--temperature", default=0.8, show_default=True, help="0: the likeliest token.")
@click.option("--top-k", default=50, show_default=True, help="Draw from the k likeliest; 0: all.")
@click.option("--seed", default=0, show_default=True, help="Seed of the draw.")
def sample(
    folder: Path, prompt: str, tokens: int, temperature: float, top_k: int, seed: int
) -> None:
    """Continue a text with the newest checkpoint of a run FOLDER, and keep it as sample.txt.

    \b
    Example:
      ridgeline sample runs/laptop --prompt "def main(" --temperature 0.7
    """
    text = ridgeline.sample(
        folder, prompt, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed
    )
    click.echo(text)
    (folder / "sample.txt").write_text(text + "\n", encoding="utf-8")


@verbs.command()
@click.argument("folder", type=click.Path(path_type=Path))
def report(folder: Path) -> None:
    """Write report.html of a run FOLDER: one file, readable without a network.

    \b
    Example:
      ridgeline report runs/laptop
    """
    click.echo(f"report: {ridgeline.report(folder)}")


@verbs.command()
@click.argument("name", required=False)
def models(name: str | None) -> None:
    """List the catalogue, or all figures of the model NAME.

    \b
    Example:
      ridgeline models llama3.1-8b
    """
    from ridgeline.model.table import describe, table

    click.echo(describe(name) if name else table())


@verbs.command()
@click.argument("model")
@click.option("--tokens", required=True, help="Training tokens: 15T, 300B, 2e12.")
@click.option("--on", "machine", required=True, help="Devices: 16000xH100-SXM-80GB.")
@click.option("--mfu", type=float, help="Share of the dense peak; default: as planned.")
@click.option("--days", type=float, help="Days without failures, instead of --mfu.")
@click.option("--seq", "sequence", type=int, help="Tokens per sequence.")
@click.option("--precision", help="Of the matrix products: bf16, fp16, fp8, fp32.")
@click.option("--price-per-hour", type=float, help="Rent of a device for an hour.")
@click.option("--device-price", type=float, help="Price of buying a device.")
@click.option("--other-capital", type=float, help="Share of capital that is not devices: 0.5.")
@click.option("--electricity", "price_per_kwh", type=float, help="Price of a kWh.")
@click.option("--currency", default="USD", show_default=True, help="Of all prices.")
@click.option("--watts", "device_w", type=float, help="Power per device, with its share of a node.")
@click.option("--pue", type=float, help="Power of the centre over that of its nodes.")
@click.option("--grid", "grid_g_per_kwh", type=float, help="Grams of CO₂ per kWh.")
@click.option("--failures", "failures_per_device_hour", type=float, help="Per device and hour.")
@click.option("--checkpoint", "checkpoint_s", type=float, help="Seconds a checkpoint blocks.")
@click.option("--restart", "restart_s", type=float, help="Seconds from a failure to training.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, in SI units.")
def cost(as_json: bool, **asked: Any) -> None:
    """Days, money and energy of training MODEL; what is not known stays a dash.

    \b
    Example:
      ridgeline cost llama3.1-405b --tokens 15T --on 16000xH100-SXM-80GB --mfu 0.4
    """
    from ridgeline.plan.cost_text import answer

    click.echo(answer(as_json=as_json, **asked))


verbs.add_command(audit)
verbs.add_command(parity)
verbs.add_command(rehearse)
verbs.add_command(plan)
verbs.add_command(validate)
verbs.add_command(machines)
verbs.add_command(probe)


@verbs.command()
@click.argument("layout")
@click.option("--micro-batches", type=int, required=True, help="Per replica and step.")
@click.option("--forward", "forward_s", default=1.0, show_default=True, help="Seconds on a rank.")
@click.option("--backward-input", "backward_input_s", default=1.0, show_default=True)
@click.option("--backward-weight", "backward_weight_s", default=1.0, show_default=True)
@click.option("--send", "send_s", default=0.0, show_default=True, help="Seconds between ranks.")
@click.option("--svg", type=NewFile(), help="Write a picture.")
@click.option("--trace", type=NewFile(), help="Write a trace for ui.perfetto.dev.")
def pipeline(layout: str, micro_batches: int, **options: Any) -> None:
    """Replay the pipeline schedule of LAYOUT: idle time, activations kept, pictures.

    \b
    Example:
      ridgeline pipeline "pp8 v2 1f1b" --micro-batches 16
      ridgeline pipeline "pp4 zbv" --micro-batches 8 --svg zbv.svg --trace zbv.json
    """
    from ridgeline.plan.timeline_picture import draw

    click.echo(draw(layout, micro_batches, **options))


@verbs.command()
def version() -> None:
    """Print the versions a bug report needs.

    \b
    Example:
      ridgeline version
    """
    import platform
    from importlib import metadata

    for package in ("ridgeline", "torch", "numpy", "pydantic", "tokenizers", "safetensors"):
        click.echo(f"{package:12} {metadata.version(package)}")
    click.echo(f"{'python':12} {platform.python_version()}")
    click.echo(f"{'platform':12} {platform.platform()}")
