"""Validation: what it reads, assumes, refuses and prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from ridgeline.cli import verbs
from ridgeline.errors import SourceError
from ridgeline.plan.cases import read_cases
from ridgeline.plan.constants import DeviceConstants, calibration, names_of
from ridgeline.plan.memory import FRAGMENTATION
from ridgeline.plan.validate import summary, validate

LUMI = Path(__file__).parent / "lumi.csv"
HEAD = LUMI.read_text(encoding="utf-8").splitlines()[0]


def csv_of(folder: Path, **changes: str) -> Path:
    """A file with one row: LUMI's first with some columns changed."""
    names, values = HEAD.split(","), LUMI.read_text(encoding="utf-8").splitlines()[1].split(",")
    row = dict(zip(names, values, strict=True)) | changes
    path = folder / "cases.csv"
    path.write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n", encoding="utf-8")
    return path


def test_lumis_strong_scaling_is_reproduced() -> None:
    """Published raw logs, 128 to 2,048 GCDs; in the fit: within 10% each, 6% on average."""
    found = summary(validate([LUMI]))
    assert found["predicted"] == 5
    assert found["mape"] < 0.06
    assert all(abs(each["error"]) < 0.1 for each in found["cases"])
    assert found["spearman"] == pytest.approx(1)


def test_the_json_has_the_promised_fields() -> None:
    result = CliRunner().invoke(verbs, ["validate", str(LUMI), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert list(found) == [
        "rows", "predicted", "skipped", "scored", "mape", "median", "bias", "baseline_mape",
        "spearman", "regret", "regret_groups", "pairs_ordered", "memory_mape", "coverage",
        "narrow", "by_source", "by_tier", "cases",
    ]  # fmt: skip
    assert list(found["cases"][0]) == [
        "id", "source", "tier", "precision", "step_s", "predicted_s", "error", "interval_s",
        "baseline_s", "memory_bytes", "predicted_memory_bytes", "extrapolated", "stack", "assumed",
    ]  # fmt: skip
    assert "vocab 51200" in found["cases"][0]["assumed"]


def test_the_text_names_every_row_when_asked() -> None:
    result = CliRunner().invoke(verbs, ["validate", str(LUMI), "--rows"])
    assert result.exit_code == 0, result.output
    assert "lumi_175b_2048" in result.output
    assert "5 rows, 5 predicted, 0 skipped" in result.output


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"devices": "100"}, "dp·cp·tp·pp"),
        ({"tensor": "", "pipeline": ""}, "tensor and pipeline"),
        ({"layers": "-3"}, "-3 is not a quantity"),
        ({"step_s": "nan"}, "nan is not a quantity"),
        ({"hidden": "wide"}, "'wide' is not a number"),
        ({"device": "MI250X"}, "two GCDs"),
        ({"device": "abacus"}, "not in the catalogue"),
        ({"recompute": "some"}, "none of none, selective, full"),
        ({"stack": "magic"}, "no stack is called"),
        ({"global_batch": "2"}, "more than the global batch"),
        ({"step_s": ""}, "no step time"),
    ],
)
def test_a_row_that_cannot_be_expressed_is_skipped_with_a_reason(
    tmp_path: Path, changes: dict[str, str], why: str
) -> None:
    found = validate([csv_of(tmp_path, **changes)])
    assert len(found.outcomes) == 0
    assert why in found.skipped[0][1]


def test_files_that_are_no_cases_are_named_errors(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be read"):
        validate([tmp_path / "none.csv"])
    bad = tmp_path / "bad.csv"
    bad.write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(SourceError, match="layers"):
        validate([bad])
    bad.write_text("", encoding="utf-8")
    with pytest.raises(SourceError, match="empty"):
        validate([bad])


def test_the_eleven_column_form_is_read(tmp_path: Path) -> None:
    path = tmp_path / "node.csv"
    path.write_text(
        "# GPUs,global batch,micro batch,hidden size,attention heads,# layers,sequence length,"
        "tensor parallelism,data parallelism,pipeline parallelism,iteration time (ms)\n"
        "2,16,8,1024,16,24,1024,1,1,2,372.160408\n",
        encoding="utf-8",
    )
    found = validate([path])
    assert found.outcomes[0].case.stack == "megatron-deepspeed"
    assert abs(found.outcomes[0].error) < 0.2


def test_what_is_given_is_not_assumed(tmp_path: Path) -> None:
    known = calibration()
    bare = read_cases([csv_of(tmp_path, recompute="", precision="")], known).rows[0]
    assert {"recompute none", "precision bf16"} <= set(bare.assumed)
    assert {"gated n", "tied y", "cluster Frontier"} <= set(bare.assumed)
    said = csv_of(
        tmp_path, stack="megatron-deepspeed", vocab="50000", sequence_parallel="y", gated="n",
        tied="y", cluster="LUMI", schedule="1f1b",
    )  # fmt: skip
    assert read_cases([said], known).rows[0].assumed == ()


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = csv_of(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(validate([path]).outcomes) == 1


@pytest.mark.parametrize("hidden", ["1e30", "nan", "-5", "inf"])
def test_absurd_numbers_are_skipped_with_the_reason(tmp_path: Path, hidden: str) -> None:
    found = validate([csv_of(tmp_path, hidden=hidden)])
    assert not found.outcomes
    assert "not a quantity" in found.skipped[0][1]


def test_the_source_is_never_read_for_an_assumption(tmp_path: Path) -> None:
    known = calibration()
    one = read_cases([csv_of(tmp_path, source="one", recompute="")], known).rows[0]
    other = read_cases([csv_of(tmp_path, source="FSDP2 Megatron", recompute="")], known).rows[0]
    assert one.numbers == other.numbers
    assert one.stack == other.stack


def test_few_constants_are_fitted() -> None:
    """At most 10 per device, 4 per software stack, 10 shared; none is a case's or a source's."""
    for label, names in calibration().fitted.items():
        assert len(names) <= (4 if label.startswith("stack") else 10), label
    assert len(names_of(DeviceConstants)) <= 10
    assert {label.split()[0] for label in calibration().fitted} == {"device", "stack", "shared"}


@pytest.mark.parametrize(
    ("name", "stack"),
    [
        ("Megatron-Core", "megatron-core"), ("FSDP2", "fsdp2"), ("PyTorch FSDP1", "fsdp1"),
        ("eager Megatron-DeepSpeed 2021-23", "megatron-deepspeed"), ("ridgeline", "ridgeline"),
        ("-", "megatron-deepspeed"),
    ],
)  # fmt: skip
def test_stacks_are_read_by_many_names(tmp_path: Path, name: str, stack: str) -> None:
    head, row = csv_of(tmp_path).read_text(encoding="utf-8").splitlines()
    path = tmp_path / "named.csv"
    path.write_text(f"{head},stack\n{row},{name}\n", encoding="utf-8")
    assert read_cases([path], calibration()).rows[0].stack == stack


def test_an_unknown_cluster_is_said_and_the_usual_one_taken(tmp_path: Path) -> None:
    head, row = csv_of(tmp_path).read_text(encoding="utf-8").splitlines()
    path = tmp_path / "named.csv"
    path.write_text(f"{head},cluster\n{row},LUMI\n{row},Eos\n", encoding="utf-8")
    first, second = read_cases([path], calibration()).rows
    assert first.cluster.name == "LUMI"
    assert second.cluster.name == "Frontier"
    assert "cluster Frontier" in second.assumed


@pytest.mark.parametrize(
    ("words", "zero", "group"),
    [
        ("0", 0, 2), ("zero1", 1, 2), ("ZeRO-3 (DeepSpeed)", 3, 2), ("zero3/1", 3, 1),
        ("3 (FSDP FULL_SHARD)", 3, 2), ("FSDP2 full shard", 3, 2), ("", 0, 2),
    ],
)  # fmt: skip
def test_shards_are_read_in_many_words(
    tmp_path: Path, words: str, zero: float, group: float
) -> None:
    changes = {"shard": words, "stack": "megatron-deepspeed"}
    numbers = read_cases([csv_of(tmp_path, **changes)], calibration()).rows[0].numbers
    assert (numbers["zero"], numbers["shard_group"]) == (zero, group)


def test_dense_rows_and_mixtures_stand_side_by_side(tmp_path: Path) -> None:
    """A dense row's cost does not depend on its neighbours, a mixture's counts its experts."""
    dense = csv_of(tmp_path)
    alone = validate([dense]).outcomes[0].predicted_s
    head, row = dense.read_text(encoding="utf-8").splitlines()
    mixed = row.replace("lumi_175b_128", "mixture") + ",8,2,57344,1"
    dense.write_text(
        f"{head},experts,top_k,expert_ffn,expert\n{row},,,,\n{mixed}\n", encoding="utf-8"
    )
    together = validate([dense]).outcomes
    assert together[0].predicted_s == pytest.approx(alone, rel=1e-12)
    assert together[1].predicted_s > 1.4 * alone


def test_a_schedule_may_be_called_by_its_other_names(tmp_path: Path) -> None:
    path = csv_of(tmp_path)
    head, row = path.read_text(encoding="utf-8").splitlines()
    for name, code in (("Interleaved1F1B", 0), ("GPipe", 1), ("ZBVZeroBubble", 4)):
        path.write_text(f"{head},schedule\n{row},{name}\n", encoding="utf-8")
        assert read_cases([path], calibration()).rows[0].numbers["schedule"] == code


def test_ports_are_those_that_a_rows_notes_name(tmp_path: Path) -> None:
    known = calibration()
    told = csv_of(tmp_path, notes="inter-node 400 Gbps; 1F1B")
    (row,) = read_cases([told], known).rows
    assert row.cluster.network.node_bandwidth == 50e9
    slower = validate([told]).outcomes[0].predicted_s
    assert slower > validate([csv_of(tmp_path)]).outcomes[0].predicted_s
    head, line = told.read_text(encoding="utf-8").splitlines()
    told.write_text(
        f"{head},cluster\n{line.replace('1F1B', 'inter-node 400 Gbps')},LUMI\n", encoding="utf-8"
    )
    assert read_cases([told], known).rows[0].cluster.network.node_bandwidth == 100e9


@pytest.mark.parametrize(("precision", "width"), [("bf16", 4), ("fp16", 2), ("fp32", 4)])
def test_megatron_deepspeed_reduces_gradients_of_bf16_in_float32(
    tmp_path: Path, precision: str, width: float
) -> None:
    """Megatron-LM accumulates and reduces gradients in float32 wherever it trains in bf16."""
    changes = {"precision": precision, "stack": "megatron-deepspeed"}
    numbers = read_cases([csv_of(tmp_path, **changes)], calibration()).rows[0].numbers
    assert numbers["reduce_bytes"] == numbers["gradient_bytes"] == width


def test_published_memory_is_what_was_reserved_unless_it_says_allocated(tmp_path: Path) -> None:
    reserved = validate([csv_of(tmp_path, memory_gb="50")]).outcomes[0].memory_bytes
    path = csv_of(tmp_path, memory_gb="50", notes="memory = peak allocated")
    allocated = validate([path]).outcomes[0].memory_bytes
    assert reserved / allocated == pytest.approx(1 + FRAGMENTATION)


def test_rowwise_fp8_pays_for_conversion_and_gains_nothing(tmp_path: Path) -> None:
    """Slower than bf16, and tensorwise fp8 is faster."""
    device = {"device": "H100-SXM-80GB", "devices": "128"}
    seconds = [
        validate([csv_of(tmp_path, **device, precision=precision, notes=notes)])
        .outcomes[0]
        .predicted_s
        for precision, notes in (("fp8", "tensorwise"), ("bf16", ""), ("fp8", "rowwise"))
    ]
    assert seconds == sorted(seconds)
    assert len(set(seconds)) == 3
