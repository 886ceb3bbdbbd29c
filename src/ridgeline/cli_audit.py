"""The verb `audit`."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("further", metavar="[RUN]...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--calibrate", is_flag=True, help="Correct the planner's constants by this run.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, in SI units.")
def audit(folder: Path, further: tuple[Path, ...], calibrate: bool, as_json: bool) -> None:
    """Lay side by side what was planned, rehearsed and measured of a run folder.

    Each term with its difference and its source, what a billion tokens take, and the goodput; the
    same goes into report.html. --calibrate writes what the run tells of the machine into the user's
    machine file, and says how far off the planner was before and after on the further runs, or on
    those beside it.

    \b
    Example:
      ridgeline audit runs/laptop
      ridgeline audit runs/laptop --calibrate runs/dp2 runs/tp2 runs/pp2 runs/mb1 runs/mb4
    """
    import ridgeline
    from ridgeline.audit import audit_text
    from ridgeline.audit.calibrate import calibrate as correct

    if further and not calibrate:
        raise click.UsageError("further runs test a calibration: --calibrate")
    found = ridgeline.audit(folder)
    corrected = correct(folder, further) if calibrate else None
    report = ridgeline.report(folder)
    if as_json:
        told = found.json() | ({"calibrated": corrected.json()} if corrected else {})
        click.echo(json.dumps(told, indent=2, allow_nan=False))
        return
    click.echo(audit_text.table(found))
    if corrected is not None:
        click.echo("\n" + audit_text.calibration(corrected))
    click.echo(f"\nreport: {report}")
