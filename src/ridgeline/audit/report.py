"""One HTML file that says what a run was, how far it got and what it cost.

The file carries its styles, its script and its drawings, and its Content-Security-Policy forbids
every request; only the style sheet and the script of this package may act in it, named by their
hashes, so that text from a run cannot.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import math
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from html import escape
from importlib import resources
from pathlib import Path

import numpy as np

from ridgeline import human
from ridgeline.audit.figures import baselines, charts, column
from ridgeline.audit.history import (
    SAMPLE_CHARACTERS,
    History,
    LoggedStep,
    number,
    read_history,
)
from ridgeline.audit.plots import figure
from ridgeline.audit.section import section
from ridgeline.audit.witnesses import Witnesses, plan_witness, read_witnesses

STATES = {"started": None, "resumed": None, "finished": "finished", "interrupted": "stopped"}
RECENT_CHECKPOINTS = 12  # listed in full; a long run keeps more than a reader wants


def write_report(folder: Path) -> Path:
    """Read the run folder `folder` and write `<folder>/report.html`; returns its path.

    Plans the run where nobody has yet. The file appears whole or not at all. Raises
    RunFolderError when `folder` is missing or holds no readable metrics.
    """
    history = read_history(folder)
    found = read_witnesses(history)
    plan_witness(history, found)
    page = render(history, found)
    path = folder / "report.html"
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", errors="replace", dir=folder, prefix=".report-", delete=False
    ) as file:
        try:
            file.write(page)
            file.close()
            Path(file.name).chmod(0o644)  # a temporary file is private; a report is to be read
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink()
            raise
    return path


def render(history: History, found: Witnesses) -> str:
    """The whole page as HTML."""
    files = resources.files("ridgeline.audit")
    style = files.joinpath("report.css").read_text(encoding="utf-8")
    script = files.joinpath("report.js").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    figures = "".join(figure(chart, history.last_step) for chart in charts(history))
    nothing = '<p class="empty">No step was logged yet, so there is nothing to draw.</p>'
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(_name(history))} · Ridgeline run report</title>\n"
        f"<style>{style}</style>\n</head>\n<body>\n"
        f"{_header(history)}\n<main>\n{_key_figures(history)}\n{_notes(history)}\n"
        f'<section class="charts" aria-label="Curves">{figures or nothing}</section>\n'
        f"{section(history, found)}\n{_sample(history)}\n{_checkpoints(history)}\n"
        f"{_tables('The run', history.run, f'from {history.run_file.name}', history.reasons)}\n"
        f"{_tables('The environment', history.environment, 'from environment.json', {})}\n"
        f"</main>\n{_footer(history)}\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return "sha256-" + base64.b64encode(digest).decode()


def _name(history: History) -> str:
    return str(history.run.get("name") or history.folder.resolve().name)


def _total_steps(history: History) -> float | None:
    return number(history.latest("total_steps"))


def _header(history: History) -> str:
    parameters = number(history.latest("parameters"))
    embedding = number(history.latest("embedding_parameters"))
    model = history.latest("model")
    facts = [escape(model)] if isinstance(model, str) else []
    if parameters is not None:
        body = None if embedding is None else human.short(parameters - embedding)
        beside = f" ({body} without embeddings and head)" if body else ""
        facts.append(f"{human.short(parameters)} parameters{beside}")
    for key in ("device", "processes", "host"):
        value = history.environment.get(key)
        if isinstance(value, str | int):
            plural = "es" if value != 1 else ""
            facts.append(f"{value} process{plural}" if key == "processes" else escape(str(value)))
    started = history.environment.get("started")
    if isinstance(started, str):
        facts.append(f"started {escape(_moment(started))}")
    facts = [f"<li>{fact}</li>" for fact in facts]
    return (
        '<header>\n<p class="brand">Ridgeline <span>run report</span></p>\n'
        f"<h1>{escape(_name(history))}</h1>\n"
        f'<ul class="facts">{"".join(facts)}</ul>\n{_status(history)}\n</header>'
    )


def _moment(iso: str) -> str:
    try:
        moment = datetime.datetime.fromisoformat(iso)
    except ValueError:
        return iso
    zone = " UTC" if moment.utcoffset() == datetime.timedelta(0) else ""
    return moment.strftime("%-d %B %Y, %H:%M") + (zone or moment.strftime(" %Z").rstrip())


def _status(history: History) -> str:
    """One word for how the run stands, the step it reached, and a bar of the way gone.

    A killed run writes no last word and leaves its lock, so it looks like one still running.
    """
    total = _total_steps(history)
    place = f"step {human.integer(history.last_step)} of {human.integer(total)}"
    names = [e.name for e in history.events if e.name in STATES]
    ending = STATES[names[-1]] if names else None
    if ending is not None:
        word, said = ending, f"{ending.capitalize()} at {place}"
    elif history.held:
        word, said = "open", f"Running, or killed: last heard of at {place}"
    else:
        word, said = "stopped", f"Broke off after {place}"
    bar = ""
    if total is not None and 0 < total < math.inf:
        gone = 100 * min(1.0, history.last_step / total)
        bar = f'<svg class="way" aria-hidden="true"><rect width="{gone:.2f}%" height="100%"/></svg>'
    return f'<p class="status {word}"><i></i>{said}</p>{bar}'


def _key_figures(history: History) -> str:
    steps = history.steps
    last_loss = next((s for s in reversed(steps) if s.loss is not None), None)
    held_out = next((e for e in reversed(history.evaluations) if e.held_out_loss is not None), None)
    value = held_out.held_out_loss if held_out else None
    versus = [
        f"{human.fixed(abs(level - value), 2)} {'below' if value <= level else 'above'} "
        f"{name.split()[0]}"
        for name, level in baselines(history).items()
        if value is not None and math.isfinite(value)
    ]
    convention = history.latest("mfu_convention")
    mfu_note = f"median, {convention}" if isinstance(convention, str) else "median"
    speed, mfu = (_median(steps, key) for key in ("tokens_per_s", "mfu"))
    memory = max((s.memory_bytes for s in steps if s.memory_bytes is not None), default=None)
    tokens = next((s.tokens for s in reversed(steps) if s.tokens is not None), None)
    elapsed_s = history.elapsed_s if 0 < history.elapsed_s < math.inf else None
    at = f"at step {human.integer(last_loss.step)}" if last_loss else ""
    tiles = [
        ("Train loss", human.fixed(last_loss.loss if last_loss else None), ["nats per token", at]),
        ("Held-out loss", human.fixed(value), versus or ["nats per token"]),
        ("Tokens seen", human.short(tokens), [human.integer(tokens) if tokens else ""]),
        ("Tokens/s", human.short(speed), ["median"]),
        ("MFU", human.percent(mfu), [mfu_note if mfu is not None else "device peak not known"]),
        ("Peak memory", human.size(memory), ["of rank 0"]),
        ("Time", human.duration(elapsed_s), ["in steps and evaluations"]),
    ]
    items = "".join(
        f"<div><dt>{label}</dt><dd><b>{figure_}</b>"
        + "".join(f"<span>{escape(note)}</span>" for note in notes if note)
        + "</dd></div>"
        for label, figure_, notes in tiles
    )
    return f'<dl class="figures">{items}</dl>'


def _median(steps: list[LoggedStep], key: str) -> float | None:
    values = column(steps, lambda s: getattr(s, key))
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else None


def _notes(history: History) -> str:
    notes = list(history.notes)
    train = [(s.step, s.loss) for s in history.steps]
    held_out = [(e.step, e.held_out_loss) for e in history.evaluations]
    for name, losses in (("training", train), ("held-out", held_out)):
        lost = [step for step, value in losses if value is not None and not math.isfinite(value)]
        if lost:
            notes.append(
                f"The {name} loss was not a finite number at {len(lost):,} of {len(losses):,} "
                f"records, first at step {lost[0]:,}; the curve has gaps there."
            )
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<ul class="notes">{items}</ul>' if items else ""


def _sample(history: History) -> str:
    if not history.sample:
        return ""
    text = history.sample[:SAMPLE_CHARACTERS]
    more = " It is cut here; sample.txt has the rest." if len(history.sample) > len(text) else ""
    return (
        "<section><h2>What it writes</h2>"
        f"<p>A continuation sampled from the model, as it came.{more}</p>"
        f'<pre class="sample" tabindex="0">{escape(text)}</pre></section>'
    )


def _checkpoints(history: History) -> str:
    resume = f"ridgeline train {shlex.quote(str(history.run_file))}"
    count = len(history.checkpoints)
    if not count:
        return (
            "<section><h2>Checkpoints</h2><p>None was written; this starts the run again:</p>"
            f'<pre tabindex="0">{escape(resume)}</pre></section>'
        )
    recent = history.checkpoints[-RECENT_CHECKPOINTS:]
    rows = "".join(
        f"<li><b>{escape(_checkpoint_step(path))}</b> <span>{human.size(_size(path))}</span></li>"
        for path in recent
    )
    earlier = f" The last {len(recent)} of {count:,} are listed." if count > len(recent) else ""
    return (
        "<section><h2>Checkpoints</h2><p>This goes on from the newest; a finished run "
        f"needs a larger budget first.{earlier}</p>"
        f'<pre tabindex="0">{escape(resume)}</pre><ul class="checkpoints">{rows}</ul></section>'
    )


def _checkpoint_step(path: Path) -> str:
    digits = path.name.removeprefix("step-")
    return f"step {int(digits):,}" if digits.isdecimal() else path.name


def _size(folder: Path) -> float:
    return float(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()))


def _tables(title: str, tree: Mapping[str, object], origin: str, reasons: Mapping[str, str]) -> str:
    """A tree of values as a small table per group, keys as in the file, and why where known."""
    if not tree:
        return ""
    groups = [("", [(k, v) for k, v in tree.items() if not isinstance(v, dict)])]
    groups += [(k, list(_leaves(v))) for k, v in tree.items() if isinstance(v, dict)]
    cards = []
    for name, rows in groups:
        heading = f"<h3>{escape(name)}</h3>" if name else ""
        body = []
        for key, value in rows:
            reason = reasons.get(f"{name}.{key}" if name else key)
            why = f'<span class="why">{escape(reason)}</span>' if reason else ""
            said = _breakable(_text(value)) + why
            body.append(f'<tr><th scope="row">{_breakable(key)}</th><td>{said}</td></tr>')
        if body:
            cards.append(f'<div class="card">{heading}<table>{"".join(body)}</table></div>')
    return (
        f"<section><h2>{escape(title)} <small>{escape(origin)}</small></h2>"
        f'<div class="cards">{"".join(cards)}</div></section>'
    )


def _leaves(table: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """The values of a nested table under their dotted names; entries of a list are counted."""
    for key, value in table.items():
        if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            value = {str(i): entry for i, entry in enumerate(value, 1)}
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _text(value: object) -> str:
    if value is None:
        return human.DASH
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _breakable(text: str) -> str:
    """Escaped, with places where a long path or dotted name may wrap."""
    safe = escape(text)
    for mark in ("/", ".", "_"):
        safe = safe.replace(mark, mark + "<wbr>")
    return safe


def _footer(history: History) -> str:
    written = (history.folder / "metrics.jsonl").stat().st_mtime
    moment = datetime.datetime.fromtimestamp(written, tz=datetime.UTC)
    as_of = moment.strftime("%-d %B %Y, %H:%M UTC")
    return (
        f"<footer><p>As of {as_of}, the last write to metrics.jsonl. A dash means not known. "
        "This file loads nothing from any network.</p></footer>"
    )
