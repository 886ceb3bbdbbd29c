"""The report as a file: complete, small, closed to the network, and safe with any text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ridgeline.audit.report import write_report
from ridgeline.errors import RunFolderError

WriteRunFolder = Callable[..., Path]
VOID = {"meta", "wbr"}


class Page(HTMLParser):
    """Collects the text, the attributes and the elements that were never closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.shown: list[str] = []
        self.feed(html)
        self.text = " ".join("".join(self.shown).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
            self.shown.append(" ")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.shown.append(data)


def report_on(folder: Path) -> Page:
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert page.open == []
    return page


def test_a_finished_run_shows_everything_it_holds(run_folder: Path) -> None:
    page = report_on(run_folder)
    for part in [
        "standard-library stdlib-9m 8.52M parameters (6.36M without embeddings and head)",
        "Finished at step 600 of 600",
        "Held-out loss 3.329 2.79 below unigram 0.98 below bigram",
        "Tokens seen 1.23M 1,228,800",
        "MFU — device peak not known",
        "Loss nats per token",
        "Learning rate",
        "Gradient norm Median 0.68; the largest, 12.03, came at step 245.",
        "Throughput tokens/s",
        "Memory GiB At most 1.15 GiB on rank 0",
        "Where the step's time went ms per step",
        "Held-out loss by corpus",
        "unigram entropy 6.120",
        "Read up to size bytes & <return> them",
        f"ridgeline train {run_folder}/run.toml",
        "step 600 39.1 KiB",
        "from run.toml",
        "layout dp2 mb8 bf16 bf16: this CPU multiplies bf16 natively",
        "sequence 256 the model's max_sequence",
        "corpora.2.weight 0.3",
        "capabilities amx_bf16 true avx512 —",
    ]:
        assert part in page.text, part


def test_shares_of_the_step_add_up_to_it(run_folder: Path) -> None:
    html = write_report(run_folder).read_text(encoding="utf-8")
    bar = re.search(r'<svg class="share".*?</svg>', html)
    assert bar is not None
    widths = [float(r.attrib["width"][:-1]) for r in ElementTree.fromstring(bar[0])]
    assert sum(widths) == pytest.approx(100, abs=0.05)
    # conftest.py: forward and backward take 148 to 154 of about 181 ms
    assert max(widths) == pytest.approx(100 * 151 / 181, abs=1)


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("finished", "Finished at step 240 of 600"),
        ("interrupted", "Stopped at step 240 of 600"),
        (None, "Running, or killed: last heard of at step 240 of 600"),
    ],
)
def test_the_status_says_how_far_the_run_got(
    write_run_folder: WriteRunFolder, tmp_path: Path, ending: str | None, said: str
) -> None:
    folder = write_run_folder(tmp_path / "r", reached=240, ending=ending)
    assert said in report_on(folder).text


def test_a_run_that_broke_off_with_an_error_is_not_called_running(
    write_run_folder: WriteRunFolder, tmp_path: Path
) -> None:
    folder = write_run_folder(tmp_path / "r", reached=240, ending=None)
    (folder / "lock.json").unlink()
    assert "Broke off after step 240 of 600" in report_on(folder).text


def test_the_newest_run_file_is_shown_and_resumed(run_folder: Path) -> None:
    for number in (2, 10, 9):
        text = f'name = "session {number}"\n'
        (run_folder / f"run.{number}.toml").write_text(text, encoding="utf-8")
    text = report_on(run_folder).text
    assert "name session 10" in text
    assert f"ridgeline train {run_folder}/run.10.toml" in text


def test_mfu_says_by_which_convention_it_counts(tmp_path: Path) -> None:
    started = {"step": 0, "event": "started", "mfu_convention": "causal"}
    lines = [started, {"step": 1, "mfu": 0.41}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert "MFU 41.0% median, causal" in report_on(tmp_path).text


def test_what_is_unknown_is_a_dash_and_never_zero(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "event": "started"}\n', encoding="utf-8")
    text = report_on(tmp_path).text
    for label in ("Train loss", "Held-out loss", "Tokens seen", "Tokens/s", "MFU", "Peak memory"):
        assert f"{label} —" in text
    assert "Time —" in text
    assert "step 0 of —" in text
    assert "there is nothing to draw" in text


def test_a_loss_that_is_not_finite_is_said(tmp_path: Path) -> None:
    lines = ['{"step": 1, "loss": 3.0}', '{"step": 2, "loss": NaN}', '{"step": 3, "loss": NaN}']
    lines += ['{"step": 3, "held_out_loss": Infinity}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = report_on(tmp_path).text
    assert "training loss was not a finite number at 2 of 3 records, first at step 2" in text
    assert "held-out loss was not a finite number at 1 of 1 records" in text
    assert "Train loss NaN" in text
    assert "Held-out loss ∞" in text


def test_a_run_above_its_baselines_says_above(tmp_path: Path) -> None:
    started = {"step": 0, "event": "started", "baselines": {"unigram_entropy": 6.0}}
    lines = [started, {"step": 1, "held_out_loss": 8.5, "held_out": {}}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    text = report_on(tmp_path).text
    assert "2.50 above unigram" in text
    assert "ends at 8.50, 2.50 above the unigram entropy." in text


def test_ten_thousand_steps_stay_below_a_megabyte(
    write_run_folder: WriteRunFolder, tmp_path: Path
) -> None:
    folder = write_run_folder(tmp_path / "long", total=10_000)
    assert write_report(folder).stat().st_size < 1_000_000
    assert "12.0" in report_on(folder).text  # the one step with a spike of the gradient norm


def test_nothing_is_asked_of_any_network(run_folder: Path) -> None:
    page = report_on(run_folder)
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "href", "srcset", "style", "action", "poster"}
    assert not [v for _, v in page.attributes if v and re.search(r"//|url\(|@import", v)]
    assert not set(page.tags) & {"img", "link", "iframe", "object", "embed", "form", "base", "a"}
    html = (run_folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\(|fetch\(|XMLHttp", html)


def test_only_our_style_and_script_may_act(run_folder: Path) -> None:
    html = write_report(run_folder).read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert "unsafe" not in policy[1]
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (body,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy[1]


def test_text_from_a_run_is_shown_and_never_obeyed(
    write_run_folder: WriteRunFolder, tmp_path: Path
) -> None:
    attack = "</title></script><script>alert('x')</script><img src=x onerror=alert(1)>"
    folder = write_run_folder(tmp_path / "attacked", name=attack, reached=200)
    environment = {attack: attack, "host": attack, "device": attack, "started": attack}
    environment["command"] = "lone surrogate \ud800"
    (folder / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    (folder / "sample.txt").write_text(attack, encoding="utf-8")
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
        event = {"step": 200, "event": "resumed", "model": attack, "total_steps": attack}
        held_out = {"step": 200, "held_out_loss": 3, "held_out": {attack: 3, "b": 4}}
        phases = {"step": 201, "step_s": 1, "seconds": {attack: 1}, "loss": 3}
        for record in (event, held_out, phases):
            metrics.write(json.dumps(record) + "\n")
    page = report_on(folder)
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count("alert('x')") >= 8


def test_a_long_sample_and_many_checkpoints_are_cut_and_said(run_folder: Path) -> None:
    (run_folder / "sample.txt").write_text("word " * 10_000, encoding="utf-8")
    for step in range(1, 30):
        (run_folder / "checkpoints" / f"step-{step:08d}").mkdir()
    page = report_on(run_folder)
    assert "sample.txt has the rest" in page.text
    assert "The last 12 of 32 are listed." in page.text


def test_the_report_is_replaced_whole_and_depends_on_the_folder_alone(run_folder: Path) -> None:
    (run_folder / "report.html").write_text("an older report", encoding="utf-8")
    first = write_report(run_folder).read_bytes()
    assert write_report(run_folder).read_bytes() == first
    assert not list(run_folder.glob(".report-*"))


def test_a_report_that_cannot_be_put_in_place_leaves_nothing_behind(run_folder: Path) -> None:
    (run_folder / "report.html").mkdir()
    with pytest.raises(IsADirectoryError):
        write_report(run_folder)
    assert not list(run_folder.glob(".report-*"))


def test_a_folder_without_metrics_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="ridgeline train"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def palettes() -> dict[str, dict[str, str]]:
    css = resources.files("ridgeline.audit").joinpath("report.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    return {
        name: dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
        for name, block in (("light", light), ("dark", dark))
    }


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.1: https://www.w3.org/TR/WCAG21/#dfn-relative-luminance."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_meet_wcag_aa(scheme: str) -> None:
    """4.5 for text and 3 for the lines of a chart (success criteria 1.4.3 and 1.4.11)."""
    colours = palettes()[scheme]
    for text in ("ink", "soft", "good", "halt", "open"):
        assert contrast(colours[text], colours["paper"]) >= 4.5, text
    assert contrast(colours["ink"], colours["panel"]) >= 4.5
    tones = [colour for name, colour in colours.items() if name.startswith("tone")]
    assert len(tones) == 8
    assert all(contrast(tone, colours["paper"]) >= 3 for tone in tones)
