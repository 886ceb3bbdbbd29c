"""Corrections lie in the user's folder, beside what was measured, and are read back as written."""

from __future__ import annotations

from pathlib import Path

import pytest

from ridgeline.errors import MachineError
from ridgeline.machine.corrections import (
    Correction,
    correction_file,
    read_corrections,
    write_correction,
)
from ridgeline.machine.local import local_file


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path


def test_written_and_read_back_by_precision() -> None:
    assert read_corrections("H100-SXM-80GB") == {}
    bf16, fp8 = Correction(compute=1.25, source="run a"), Correction(link=0.5, source="run b")
    file = write_correction("H100-SXM-80GB", "bf16", bf16)
    assert write_correction("H100-SXM-80GB", "fp8", fp8) == file
    assert file.name == "H100-SXM-80GB.toml"
    assert read_corrections("H100-SXM-80GB") == {"bf16": bf16, "fp8": fp8}
    assert read_corrections("A100-SXM-80GB") == {}


def test_what_was_probed_stays_and_all_process_counts_share_it() -> None:
    local_file().parent.mkdir(parents=True)
    local_file().write_text('[devices.local]\nsource = "probe"\n[clusters.local]\nx = 1\n')
    write_correction("local/2", "bf16", Correction(update=1.5))
    assert (
        read_corrections("local/4") == read_corrections("local") == {"bf16": Correction(update=1.5)}
    )
    text = local_file().read_text(encoding="utf-8")
    assert '[devices.local]\nsource = "probe"' in text
    assert list(local_file().parent.iterdir()) == [local_file()]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[corrections", "machines"),
        ("corrections = 3", "no table"),
        ("[corrections]\nbf16 = 2.0", "no table"),
        ("[corrections.bf16]\ncompute = 9.0", "from 0.25 to 4"),
        ("[corrections.bf16]\nlink = nan", "from 0.25 to 4"),
        ('[corrections.bf16]\nport = "fast"', "from 0.25 to 4"),
        ("[corrections.bf16]\nmatrix = 1.1", "not matrix"),
    ],
)
def test_a_spoilt_file_is_one_error_that_names_it(text: str, says: str) -> None:
    file = correction_file("A100-SXM-80GB")
    file.parent.mkdir(parents=True)
    file.write_text(text, encoding="utf-8")
    with pytest.raises(MachineError, match=says) as refused:
        read_corrections("A100-SXM-80GB")
    assert "A100-SXM-80GB.toml" in str(refused.value)
