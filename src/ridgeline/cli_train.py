"""The verbs `parity` and `rehearse`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

OVERRIDES = {"ignore_unknown_options": True, "allow_extra_args": True}
"""Settings of a verb that takes any field of the run by its dotted name."""


@click.command(context_settings=OVERRIDES)
@click.argument("run_file", type=click.Path(path_type=Path))
@click.option(
    "--layouts", multiple=True, help="A layout to compare; left out: the run's own and the usual."
)
@click.option("--steps", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object; nats and fractions.")
@click.pass_context
def parity(
    context: click.Context, run_file: Path, layouts: tuple[str, ...], steps: int, as_json: bool
) -> None:
    """Train RUN_FILE in one process and in each layout: are they the same model?

    Compares loss and gradient norm of every step, and every gradient of the first; exit status 1
    when a layout differs. In float32 unless the run says another precision. Any field of the run
    can be overridden by its dotted name.

    \b
    Example:
      ridgeline parity run.toml --layouts "dp2 mb2" --layouts dp4
    """
    from rich.console import Console
    from rich.progress import Progress

    import ridgeline
    from ridgeline.train.parity_text import table

    run = ridgeline.read_run(run_file, context.args)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("parity", total=1.0)
        found = ridgeline.parity(
            run,
            layouts,
            steps,
            progress=lambda what, share: bar.update(task, description=what, completed=share),
        )
    as_text = json.dumps(found.json(), indent=2, allow_nan=False) if as_json else table(found)
    click.echo(as_text)
    if not found.equal:
        sys.exit(1)


@click.command(context_settings=OVERRIDES)
@click.argument("run_file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object; bytes, FLOP, seconds.")
@click.pass_context
def rehearse(context: click.Context, run_file: Path, as_json: bool) -> None:
    """Trace the training step of RUN_FILE at its full size, on this machine's CPU.

    Says for each pipeline stage what memory its fullest moment takes and of what, what the step
    computes and sends, and what looks wrong; exit status 1 when it does not fit. Neither data nor
    accelerators are needed. Any field of the run can be overridden by its dotted name.

    \b
    Example:
      ridgeline rehearse run.toml
      ridgeline rehearse run.toml --layout "dp8 mb2 zero3 full bf16" --json
    """
    from rich.console import Console
    from rich.progress import Progress

    import ridgeline
    from ridgeline.rehearse.rehearse_text import as_json as to_json
    from ridgeline.rehearse.rehearse_text import table

    run = ridgeline.read_run(run_file, context.args)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("rehearse", total=1.0)
        found = ridgeline.rehearse(
            run, progress=lambda what, share: bar.update(task, description=what, completed=share)
        )
    click.echo(json.dumps(to_json(found), indent=2, allow_nan=False) if as_json else table(found))
    if found.fits is False:
        sys.exit(1)
