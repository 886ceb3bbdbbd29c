"""Memory against published formulas and figures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.layout.layout import Layout
from ridgeline.machine.cluster import parse_devices
from ridgeline.model.catalogue import entry
from ridgeline.plan.constants import calibration, rates_of
from ridgeline.plan.memory import in_flight, layer_activations, memory, stage_memory
from ridgeline.plan.quantities import Layouts, Rates, Task, task_of
from ridgeline.plan.step import layer_parameters

GIB = 2.0**30
ONE, EIGHT = np.array(1.0), np.array(8.0)


def megatron(name: str, sequence: int = 2048, batch: int = 512) -> tuple[Task, Rates]:
    """A GPT under Megatron as of 2022: dropout, scores kept, float32 gradients."""
    machine = parse_devices("8xA100")[1]
    rates = rates_of([machine], ["megatron-deepspeed"], ["bf16"], [False], calibration())
    task = task_of(entry(name).shape, sequence, batch)
    changed = {"flash": 0.0, "dropout": 1.0, "sequence_parallel": 0.0, "keeps_messages": 0.0}
    return replace(task, **{k: np.array(v) for k, v in changed.items()}), rates


@pytest.mark.parametrize("name", ["megatron-18.4b", "gpt3-175b", "megatron-529.6b"])
@pytest.mark.parametrize("tensor", [1, 4, 8])
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_activations_are_those_of_korthikantis_table_2(
    name: str, tensor: int, micro_batch: int
) -> None:
    """arXiv:2205.05198, table 2: s·b·h·(10 + 24/t + 5·a·s/(h·t)), and its selective row."""
    task, rates = megatron(name)
    s, h, a = 2048, float(task.hidden), float(task.heads)
    sbh = s * micro_batch * h

    def kept(recompute: str) -> float:
        layout = Layout.model_validate(
            {"tensor": tensor, "micro_batch": micro_batch, "recompute": recompute}
        )
        return float(layer_activations(task, rates, Layouts.of([layout]))[0][0])

    assert kept("none") == pytest.approx(sbh * (10 + 24 / tensor + 5 * a * s / h / tensor))
    assert kept("selective") == pytest.approx(sbh * (10 + 24 / tensor))
    assert kept("full") == pytest.approx(2 * sbh)


def test_sequence_parallel_divides_all_of_it() -> None:
    """arXiv:2205.05198, table 2: 34·s·b·h/t with sequence parallelism and selective recompute."""
    task, rates = megatron("gpt3-175b")
    task = replace(task, sequence_parallel=ONE)
    layout = Layout.model_validate("tp8 selective")
    kept = layer_activations(task, rates, Layouts.of([layout]))[0][0]
    assert kept == pytest.approx(34 * 2048 * float(task.hidden) / 8)


def test_interleaving_keeps_what_korthikanti_says() -> None:
    """arXiv:2205.05198, section 4.2.3: L·(1 + (p - 1)/(p·m)) layers' activations, m the chunks."""
    layouts = Layouts.of([Layout.model_validate(f"pp8 v{v} dp2") for v in (2, 3)])
    chunks = in_flight(layouts, np.full(2, 64.0))
    for found, v in zip(chunks, (2, 3), strict=True):
        assert found / (8 * v) == pytest.approx(1 + 7 / (8 * v))


@pytest.mark.parametrize(
    ("name", "pipeline", "published_gib"),
    [("gpt3-175b", 8, 45.56), ("megatron-529.6b", 35, 31.64), ("megatron-1008b", 64, 32.96)],
)
def test_parameters_and_optimizer_are_those_of_korthikantis_figure_1(
    name: str, pipeline: int, published_gib: float
) -> None:
    """arXiv:2205.05198: a middle stage's layers at 18 bytes per parameter, tensor parallel 8."""
    task, rates = megatron(name)
    middle = float(task.layers) / pipeline * float(layer_parameters(task, EIGHT, ONE)[0])
    assert 18 * middle / GIB == pytest.approx(published_gib, rel=0.015)
    # the first stage holds the embedding as well
    table = memory(task, rates, Layouts.of([Layout.model_validate(f"tp8 pp{pipeline}")]))
    embedding = float(task.vocab) * float(task.hidden) / 8
    states = float((table.weights + table.gradients + table.optimizer)[0])
    assert states == pytest.approx(18 * (middle + embedding))


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8]), st.sampled_from([8, 16, 64]))
def test_zero_shards_what_it_says(tensor: int, pipeline: int, data: int) -> None:
    """arXiv:1910.02054: 18·Ψ, (2 + 4)·Ψ + 12·Ψ/D, 2·Ψ + 16·Ψ/D, 16·Ψ/D, with float32 gradients."""
    task, rates = megatron("megatron-7.5b")
    texts = [f"dp{data} tp{tensor} pp{pipeline} zero{zero}" for zero in range(4)]
    table = memory(task, rates, Layouts.of([Layout.model_validate(text) for text in texts]))
    states = table.weights + table.gradients + table.optimizer
    psi = table.weights[0] / 2
    assert states[0] == pytest.approx(18 * psi)
    assert states[1] == pytest.approx(6 * psi + 12 * psi / data)
    assert states[2] == pytest.approx(2 * psi + 16 * psi / data)
    assert states[3] == pytest.approx(16 * psi / data)


def test_layer_parameters_are_those_of_the_exact_count() -> None:
    task, _ = megatron("gpt3-175b")
    common, routed = layer_parameters(task, ONE, ONE)
    assert common == pytest.approx(12 * 12288**2 + 2 * 12288)
    assert routed == 0


@pytest.mark.parametrize(
    "sentence",
    ["pp1", "dp2 pp4", "pp8 v3 tp2", "pp4 gpipe full", "pp8 zbh1 selective", "pp4 v2 zbv zero1 dp4",
     "pp5", "pp7 v2"],
)  # fmt: skip
def test_the_fullest_stage_is_what_memory_says(sentence: str) -> None:
    """Exactly where the layers divide; at most that, and nearly, where they do not."""
    task, rates = megatron("gpt3-175b", batch=560)
    one = Layouts.of([Layout.model_validate(sentence)])
    whole, stages = memory(task, rates, one), stage_memory(task, rates, one)
    fullest = float(stages.total.max())
    assert len(stages.total) == int(one.pipeline[0])
    if 96 % int(one.pipeline[0] * one.interleave[0]):
        assert 0.9 * whole.total[0] <= fullest <= whole.total[0] * (1 + 1e-12)
    else:
        assert fullest == pytest.approx(float(whole.total[0]), rel=1e-12)
    layers = stages.weights.sum() - 2 * 2 * 51200 * 12288 / float(one.tensor[0])
    assert layers > 0


def test_earlier_stages_keep_more() -> None:
    task, rates = megatron("gpt3-175b")
    one = Layouts.of([Layout.model_validate("pp8 v2")])
    activations = stage_memory(task, rates, one).activations
    assert np.all(np.diff(activations) < 0)
    assert activations[-1] / activations[0] == pytest.approx((1 * 8 + 1) / (2 * 8 + 7))


def test_an_undivided_embedding_gradient_stands_on_the_first_stage_until_it_is_reduced() -> None:
    """DTensor's gradient of an embedding is whole on every tensor rank: 128,256 x 16,384 in float32
    are 7.8 GiB, of which the eighth that each rank owns is counted among the gradients."""
    machine = parse_devices("512xH100")[1]
    arrays = rates_of([machine], ["fsdp2"], ["bf16"], [False], calibration())
    rates = Rates(**{k: np.asarray(v[0]) for k, v in arrays.__dict__.items()})
    task = task_of(entry("llama3.1-405b").shape, 8192, 256)
    whole = replace(task, whole_gradient=np.array(4.0))
    for zero, more in ((1, 128_256 * 16_384 * 4 * 7 / 8), (2, 0.0)):
        layouts = Layouts.of([Layout.model_validate(f"dp8 tp8 pp8 mb4 zero{zero} full")])
        for stages in (memory, stage_memory):
            without, with_it = (stages(each, rates, layouts).temporary for each in (task, whole))
            assert (with_it - without)[0] == pytest.approx(more)
            assert (with_it - without)[1:] == pytest.approx(0)
