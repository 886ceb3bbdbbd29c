"""The report in a real browser: it fits, it answers the pointer, and it asks for nothing."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest

from ridgeline.audit.report import write_report

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian package `chromium`)"),
]

write_run_folder = runpy.run_path(str(Path(__file__).parents[1] / "audit" / "conftest.py"))[
    "write_run_folder"
]

# The report runs untouched inside a frame of the wanted width (a window cannot be that narrow);
# the page around it measures the frame, moves the pointer, and writes what it found.
PROBE = """<!doctype html><body style="margin:0">
<iframe id="frame" style="border:0;width:{width}px;height:4000px" srcdoc="{page}"></iframe>
<script>
const frame = document.getElementById("frame");
frame.onload = () => {{
  const page = frame.contentDocument, root = page.documentElement;
  const wide = [...page.querySelectorAll("body *")].filter((e) =>
    e.getBoundingClientRect().right > {width} + 0.5 && !e.closest("svg svg"));
  const canvas = page.querySelector(".canvas"), box = canvas.getBoundingClientRect();
  const legend = () => page.querySelector(".legend").textContent;
  const before = legend();
  canvas.dispatchEvent(new frame.contentWindow.PointerEvent("pointermove",
    {{ clientX: box.left + box.width / 2, clientY: box.top + 9 }}));
  const during = legend();
  canvas.dispatchEvent(new frame.contentWindow.PointerEvent("pointerleave"));
  const found = {{ scroll: root.scrollWidth, inner: frame.contentWindow.innerWidth,
    wide: wide.map((e) => `${{e.tagName}}.${{e.getAttribute("class")}}`), before, during,
    after: legend(), charts: page.querySelectorAll(".chart").length }};
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
}};
</script>"""


def browse(page: Path, profile: Path, *options: str) -> tuple[str, str]:
    """The page's DOM after its scripts ran, and what the browser had to say."""
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--enable-logging=stderr",
        f"--user-data-dir={profile}",
        "--window-size=1400,4100",
        *options,
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    return done.stdout, done.stderr


@pytest.mark.parametrize("width", [390, 1280])
def test_the_report_fits_answers_the_pointer_and_logs_no_error(tmp_path: Path, width: int) -> None:
    name = "a-run-name-without-any-place-to-break-it-" + "x" * 60
    folder = write_run_folder(tmp_path / "run", name=name)
    probe = tmp_path / "probe.html"
    page = escape(write_report(folder).read_text(encoding="utf-8"))
    probe.write_text(PROBE.format(width=width, page=page), encoding="utf-8")
    dom, log = browse(probe, tmp_path / "profile")
    match = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert match is not None, log
    found = json.loads(unescape(match[1]))
    assert found["inner"] == width
    assert found["scroll"] <= width
    assert found["wide"] == []
    assert found["charts"] == 7
    assert found["before"].startswith("step 600")
    assert re.match(r"step (299|30[01])\D", found["during"])
    assert found["after"] == found["before"]
    assert "CONSOLE" not in log, log


def test_a_script_planted_in_a_run_does_not_run(tmp_path: Path) -> None:
    attack = "<script>document.title = 'owned'</script><b onmouseover='x'>"
    folder = write_run_folder(tmp_path / "run", name=attack, total=60)
    dom, log = browse(write_report(folder), tmp_path / "profile")
    assert re.search(r"<title>&lt;script&gt;document\.title = 'owned'", dom)
    assert dom.count("<script") == 1
    assert "CONSOLE" not in log, log


def test_the_policy_stops_even_a_script_that_slipped_in(tmp_path: Path) -> None:
    page = write_report(write_run_folder(tmp_path / "run", total=60))
    html = page.read_text(encoding="utf-8")
    planted = "<script>document.title = 'owned'</script></body>"
    page.write_text(html.replace("</body>", planted), encoding="utf-8")
    dom, log = browse(page, tmp_path / "profile")
    assert "<title>owned" not in dom
    assert "Content Security Policy" in log
