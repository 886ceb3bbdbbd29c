"""`audit --calibrate`: constants from one run, and what that does to others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ridgeline.audit.audit_text import calibration
from ridgeline.audit.calibrate import ENOUGH, calibrate
from ridgeline.errors import LedgerError
from ridgeline.machine.corrections import correction_file, read_corrections

WriteAudited = Callable[..., Path]
DEVICE = "A100-SXM-80GB"
SLOW = {"compute_s": 1.5, "host_s": 1.5, "bubble_s": 1.5}
OTHERS = (
    "dp2 bf16", "dp2 mb2 bf16", "dp2 mb4 zero3 bf16", "tp2 bf16", "pp2 bf16",
)  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


def test_a_slower_machine_is_learnt_from_one_run_and_believed_on_five_others(
    write_audited: WriteAudited,
) -> None:
    folder = write_audited("own", SLOW)
    for place, layout in enumerate(OTHERS):
        write_audited(f"other{place}", SLOW, layout=layout)
    found = calibrate(folder)
    assert found.factors["compute"] == pytest.approx(1.5, rel=1e-6)
    assert set(found.factors) | set(found.left) == {"compute", "link", "port", "update"}
    assert [each.layout for each in found.others] == list(OTHERS)
    assert found.error_before is not None
    assert found.error_after is not None
    assert found.error_before > 0.2
    assert found.error_after < 0.02
    assert found.file == correction_file(DEVICE)
    (written,) = read_corrections(DEVICE).values()
    assert written.compute == pytest.approx(1.5, rel=1e-6)
    assert written.source.startswith("run own 'pp2 mb2 bf16', ridgeline 0.1.0, torch 2.13.0, 20")
    said = calibration(found)
    assert "x1.500" in said
    assert f"over {ENOUGH} other runs" in said
    assert "at least" not in said
    again = calibrate(folder)  # before is now what after was
    assert again.error_before == pytest.approx(found.error_after)
    assert again.factors == pytest.approx(found.factors)


def test_fewer_than_five_others_are_said(write_audited: WriteAudited) -> None:
    folder = write_audited("own", SLOW)
    found = calibrate(folder, [write_audited("elsewhere", SLOW, layout="dp2 mb1 bf16")])
    assert len(found.others) == 1
    assert f"1 other layouts: at least {ENOUGH} are needed" in calibration(found)
    assert calibrate(folder, [folder]).error_after is None


def test_runs_that_are_no_test_are_left_out_with_why(write_audited: WriteAudited) -> None:
    folder = write_audited("own", SLOW)
    write_audited("twin", SLOW)
    write_audited("fp16", SLOW, layout="pp2 mb2 fp16")
    broken = write_audited("broken", SLOW)
    (broken / "run.toml").unlink()
    found = calibrate(folder)
    why = {Path(name).name: reason for name, reason in found.skipped.items() if name != "own"}
    assert "layout and the model" in why["twin"]
    assert "it is in fp16" in why["fp16"]
    assert "no run file" in why["broken"]
    assert not found.others


def test_a_run_that_tells_nothing_writes_nothing(write_audited: WriteAudited) -> None:
    folder = write_audited("own", {"compute_s": 50.0, "optimizer_s": 0.0})
    found = calibrate(folder)
    assert "would be needed" in found.left["compute"]
    assert found.factors == {}
    assert found.file is None
    assert not correction_file(DEVICE).exists()


def test_a_run_that_was_not_measured_is_refused(write_audited: WriteAudited) -> None:
    folder = write_audited("own")
    (folder / "ledgers" / "train.json").unlink()
    with pytest.raises(LedgerError, match=r"no ledgers/train\.json"):
        calibrate(folder)
