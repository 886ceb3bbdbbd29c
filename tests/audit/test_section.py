"""The audit within the report: every part is there when its ledger is, small, and on one scale."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ridgeline.audit.bars import MOST_LANES, Bar, Part, lanes, stacked
from ridgeline.audit.history import read_history
from ridgeline.audit.report import write_report
from ridgeline.audit.witnesses import Span, read_witnesses

WriteAudited = Callable[..., Path]


def page_of(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def write_measured_pipeline(folder: Path, stretch: float) -> None:
    """The planned pipeline, slower, as a sampled step's."""
    write_report(folder)
    planned = read_witnesses(read_history(folder)).planned_spans
    assert planned is not None
    ranks = [
        [
            {**span.model_dump(), "start_s": stretch * span.start_s, "end_s": stretch * span.end_s}
            for span in rank
        ]
        for rank in planned.ranks
    ]
    text = json.dumps({"step": 7, "ranks": ranks})
    (folder / "ledgers" / "timeline.json").write_text(text, encoding="utf-8")


def test_a_timed_run_shows_all_parts_of_the_audit(write_audited: WriteAudited) -> None:
    folder = write_audited("a", {"compute_s": 2.0})
    write_measured_pipeline(folder, 1.5)
    html = page_of(folder)
    titles = re.findall(r'<figure class="bars"><figcaption><h3>(.*?)</h3>', html)
    assert titles == [
        "Goodput", "Where a step&#x27;s time goes", "The pipeline", "Memory of the fullest device",
    ]  # fmt: skip
    assert "<h4>planned</h4>" in html
    assert html.index("<h4>planned</h4>") < html.index("<h4>measured at step 7</h4>")
    for name in ("stage 0 planned", "stage 1 measured", "host clock", "-50.0%"):
        assert name in html, name
    assert len(html) < 1_000_000


def test_planned_and_measured_pipelines_have_one_scale(write_audited: WriteAudited) -> None:
    folder = write_audited("a")
    write_measured_pipeline(folder, 2.0)
    planned, measured = re.findall(r'<div class="lanes">(.*?)</div>', page_of(folder), re.DOTALL)
    ends = []
    for picture in (planned, measured):
        bars = re.findall(r'class="tone\d" x="([\d.]+)%" y="\d+" width="([\d.]+)%"', picture)
        assert len(bars) == 2 * 8
        ends.append(max(float(x) + float(width) for x, width in bars))
    assert ends == pytest.approx([50, 100], abs=0.05)


def test_without_ledgers_or_times_the_report_is_as_it_was(run_folder: Path) -> None:
    assert "Planned, rehearsed, measured" not in page_of(run_folder)
    assert not (run_folder / "ledgers").exists()


def test_the_report_does_not_change_when_it_is_written_again(write_audited: WriteAudited) -> None:
    folder = write_audited("a")
    assert page_of(folder) == page_of(folder)


def test_bars_are_as_long_as_their_parts_on_the_longest_one() -> None:
    rows = [Bar("one", [Part("x", 1.0, 0), Part("y", 3.0, 1)]), Bar("two", [Part("x", 2.0, 0)])]
    html = stacked("T", "S.", rows, str)
    widths = [float(w) for w in re.findall(r'width="([\d.]+)%"', html)]
    assert widths == [25, 75, 50]
    assert html.count('<i class="band') == 2
    assert stacked("T", "S.", [Bar("none", [])], str) == ""


def test_a_huge_pipeline_is_cut_and_said() -> None:
    ranks = [
        [Span(kind="F", chunk=r, micro_batch=m, start_s=m, end_s=m + 1) for m in range(500)]
        for r in range(64)
    ]
    html = lanes("T", "S.", [("planned", ranks)], lambda seconds: f"{seconds:.0f} s")
    assert re.search(r"S\. The first \d+ s of the step are shown\.", html)
    assert len(re.findall(r'<text class="y"', html)) == MOST_LANES
    assert re.findall(r'<text class="y"[^>]*>(\d+)<', html)[-1] == "63"
    assert len(html) < 200_000


def test_text_of_a_ledger_is_shown_and_never_obeyed(write_audited: WriteAudited) -> None:
    folder = write_audited("a")
    path = folder / "ledgers" / "train.json"
    told = json.loads(path.read_text(encoding="utf-8"))
    told["sources"] = {"seconds.compute_s": "<img src=x onerror=alert(1)>"}
    told["flops_by_module"] = {"</td><script>alert(1)</script>": 3.0}
    path.write_text(json.dumps(told), encoding="utf-8")
    html = page_of(folder)
    assert "<img" not in html
    assert html.count("<script") == 1
