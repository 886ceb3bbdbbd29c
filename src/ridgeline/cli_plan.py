"""The verbs `plan`, `validate`, `machines` and `probe`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ridgeline.plan.cost import Rates
    from ridgeline.plan.question import Question
    from ridgeline.run import Run


class NewFile(click.Path):
    """A file to write: what would fail after the work is refused before it."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Path:
        """The path, if its folder is there and can be written to."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if not os.access(path.parent, os.W_OK):
            self.fail(f"{path}: there is no folder {path.parent} to write to", param, ctx)
        return path


@click.command()
@click.argument("what")
@click.option("--on", "machine", help="Devices: 16384xH100-SXM-80GB, 3072xFrontier.")
@click.option("--tokens", help="Training tokens: 15T; default: 20 per parameter.")
@click.option("--batch", help="Tokens per step: 16M.")
@click.option("--seq", "sequence", type=click.IntRange(min=1), help="Tokens per sequence.")
@click.option("--precision", help="Of the matrix products: bf16, fp16, fp8, fp32.")
@click.option("--stack", default="ridgeline", show_default=True, help="Whose program runs it.")
@click.option("--rank", type=click.Choice(["time", "money", "energy"]), default="time")
@click.option("--top", type=click.IntRange(1, 100), default=5, show_default=True)
@click.option("--price-per-hour", type=float, help="Rent of a device for an hour.")
@click.option("--currency", default="USD", show_default=True, help="Of that price.")
@click.option("--failures", type=float, help="Job-stopping failures per device and hour.")
@click.option("--checkpoint", type=float, help="Seconds a checkpoint blocks.")
@click.option("--restart", type=float, help="Seconds from a failure to training.")
@click.option("--explain", is_flag=True, help="The best one's ledger, and why the next one lost.")
@click.option("--sensitivity", is_flag=True, help="Which knob matters most, over all that fit.")
@click.option("--scale", help="Numbers of devices to plan as well: 1024,2048,4096.")
@click.option("--weak", is_flag=True, help="With --scale: the batch grows with the devices.")
@click.option("--picture", type=NewFile(), help="SVG of the best's pipeline.")
@click.option("--trace", type=NewFile(), help="Its step for ui.perfetto.dev.")
@click.option("--write", type=NewFile(), help="Write a run file to train.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, in SI units.")
def plan(
    what: str,
    machine: str | None,
    tokens: str | None,
    batch: str | None,
    sequence: int | None,
    precision: str | None,
    stack: str,
    rank: str,
    top: int,
    price_per_hour: float | None,
    currency: str,
    failures: float | None,
    checkpoint: float | None,
    restart: float | None,
    explain: bool,
    sensitivity: bool,
    scale: str | None,
    weak: bool,
    picture: Path | None,
    trace: Path | None,
    write: Path | None,
    as_json: bool,
) -> None:
    """Which layout trains WHAT (a model of the catalogue, or a run file) soonest on which machine.

    \b
    Example:
      ridgeline plan llama3-405b --on 16384xH100 --tokens 15T --batch 16M --seq 8192
    """
    from ridgeline.plan import explore, plan_text
    from ridgeline.plan.cost import Rates
    from ridgeline.plan.plan import plan as search
    from ridgeline.plan.question import with_own_layout

    if failures is not None and (checkpoint is None or restart is None):
        raise click.UsageError("what --failures cost needs --checkpoint and --restart, in seconds")
    sizes = _sizes(scale, weak)
    prices = Rates(
        price_per_hour=price_per_hour,
        currency=currency,
        failures_per_device_hour=failures,
        checkpoint_s=checkpoint,
        restart_s=restart,
    )
    asked, run = _question(what, machine, tokens, batch, sequence, precision, stack, prices)
    own = None
    if run is not None:
        asked, own = with_own_layout(asked, run, machine)
    found = search(asked, top=top, rank=rank, layout=own)  # type: ignore[arg-type]
    run_file = plan_text.run_of(found, run) if write else ""
    best = found.layouts[0]
    drawn = explore.draw_step(asked, best.layout, picture, trace) if picture or trace else ""
    knobs = explore.sensitivity(asked) if sensitivity else None
    points = explore.scaling(asked, sizes, weak) if sizes else []
    if write is not None:
        write.write_text(run_file, encoding="utf-8")
    if as_json:
        told = found.json()
        if explain:
            told["ledger"] = best.ledger.model_dump(mode="json", exclude_none=True)
        if knobs is not None:
            told["sensitivity"] = asdict(knobs)
        if sizes:
            told["scaling"] = explore.json_of(points)
        click.echo(json.dumps(told, indent=2, allow_nan=False))
        return
    click.echo(plan_text.table(found))
    if explain:
        click.echo(plan_text.explain(found))
    if drawn:
        click.echo(f"\n{drawn}")
    if knobs is not None:
        click.echo("\n" + explore.sensitivity_table(knobs))
    if sizes:
        click.echo("\n" + explore.table(points, sizes))
    for path in (write, picture, trace):
        if path is not None:
            click.echo(f"wrote {path}")


def _sizes(scale: str | None, weak: bool) -> list[int]:
    """The numbers of devices to plan on as well."""
    from ridgeline.machine.cluster import MOST_DEVICES
    from ridgeline.plan.amounts import count_of

    if weak and not scale:
        raise click.UsageError("--weak says how to scale; --scale 1024,2048 says to what")
    listed = scale.split(",") if scale else []
    return [count_of(size, "devices", "1024", MOST_DEVICES) for size in listed]


def _question(
    what: str,
    machine: str | None,
    tokens: str | None,
    batch: str | None,
    sequence: int | None,
    precision: str | None,
    stack: str,
    prices: Rates,
) -> tuple[Question, Run | None]:
    """The question of a run file, or of a model's name on a machine."""
    from ridgeline.model.catalogue import entry
    from ridgeline.plan.amounts import MOST_BATCH, count_of
    from ridgeline.plan.question import question, question_of_run
    from ridgeline.run import apply_overrides, make_run, read_run

    if not what.endswith(".toml"):
        if machine is None:
            raise click.UsageError("a model is planned on a machine: --on 16384xH100-SXM-80GB")
        return question(
            entry(what).shape,
            machine,
            tokens=count_of(tokens, "tokens") if tokens else None,
            batch_tokens=count_of(batch, "batch", "16M", MOST_BATCH) if batch else None,
            sequence=sequence,
            precision=precision,
            stack=stack,
            prices=prices,
        ), None
    run = read_run(what)
    changes = {
        "--budget.tokens": count_of(tokens, "tokens") if tokens else None,
        "--schedule.global_batch_tokens": (
            count_of(batch, "batch", "16M", MOST_BATCH) if batch else None
        ),
        "--data.sequence": sequence,
    }
    words = [f"{name}={value}" for name, value in changes.items() if value is not None]
    if words:
        values = run.model_dump(mode="json", exclude_none=True)
        apply_overrides(values, words)
        run = make_run(values, what)
    asked = question_of_run(run, machine, prices)
    if precision:
        asked = replace(asked, precision=precision)
    return replace(asked, stack=stack), run


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object; fractions and seconds.")
@click.option("--rows", is_flag=True, help="One line per row as well.")
def validate(files: tuple[Path, ...], as_json: bool, rows: bool) -> None:
    """Predict published or measured runs (CSV) and say how far off the planner is.

    \b
    Example:
      ridgeline validate my-measurements.csv --rows
    """
    from ridgeline.plan.validate import summary, validate
    from ridgeline.plan.validate_text import table

    found = validate(list(files))
    if as_json:
        click.echo(json.dumps(summary(found), indent=2, allow_nan=False))
        return
    click.echo(table(found, rows))


@click.command()
@click.argument("name", required=False)
def machines(name: str | None) -> None:
    """List the catalogue of machines, or every number of one and how it is known.

    \b
    Example:
      ridgeline machines Frontier
    """
    from ridgeline.plan.machine_text import describe, table

    click.echo(describe(name) if name else table())


@click.command()
@click.option("--processes", help="Numbers of processes to measure with: 1,2,4.")
@click.option("--output", type=NewFile(), help="File to write instead of the user's own.")
def probe(processes: str | None, output: Path | None) -> None:
    """Measure this machine, within a minute, so that `local` can be planned on.

    Matrix products and attention by precision, memory, gloo's collectives, and passes and updates
    of a small model by the trainer's own program, with one process and with as many as training
    starts. It should do nothing else meanwhile.

    \b
    Example:
      ridgeline probe
      ridgeline plan examples/laptop.toml
    """
    from rich.console import Console
    from rich.progress import Progress

    from ridgeline.machine.local import local_file
    from ridgeline.machine.probe import Sizes, figures, write_machine
    from ridgeline.plan.amounts import count_of
    from ridgeline.train.measure import measure, usual_processes

    usual = usual_processes()
    counts = [count_of(n, "processes", "2") for n in processes.split(",")] if processes else usual
    sizes = Sizes()
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("probing", total=1.0)
        found = measure(
            counts, sizes, lambda what, share: bar.update(task, description=what, completed=share)
        )
    for each in found:
        click.echo(f"{each.processes} of these at a time, {each.threads} threads each")
        for name, value in figures(each, sizes):
            click.echo(f"  {name:28} {value:>20}")
    file = output or local_file()
    write_machine(found, sizes, file)
    click.echo(f"wrote {file}")
