"""DeepSeek-V3's latent attention in the planner: parameters and FLOPs exact, memory by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ridgeline.layout.layout import Layout
from ridgeline.model.catalogue import entry
from ridgeline.model.counts import flops_per_token, parameters
from ridgeline.model.shape import ExpertShape, LatentAttentionShape, ModelShape
from ridgeline.plan.block import block
from ridgeline.plan.constants import calibration
from ridgeline.plan.memory import layer_activations, memory
from ridgeline.plan.plan import plan, price
from ridgeline.plan.quantities import Array, Layouts, Rates, task_of
from ridgeline.plan.question import physics, question
from ridgeline.plan.step import layer_parameters

ONE = np.array(1.0)
DEEPSEEK = entry("deepseek-v3").shape


def dense(**changes: object) -> ModelShape:
    """DeepSeek-V3 with an ordinary MLP in every layer."""
    return DEEPSEEK.model_copy(update={"experts": None} | changes)


def test_layers_on_one_rank_have_the_exact_parameters() -> None:
    for shape in (DEEPSEEK, dense()):
        common, routed = layer_parameters(task_of(shape, 4096, 16), ONE, ONE)
        exact = parameters(shape)
        beside = exact.embedding + exact.head + shape.hidden  # and the last norm
        assert shape.layers * (common + routed) + beside == pytest.approx(exact.total, rel=1e-12)


def test_latents_stay_whole_on_every_tensor_rank_and_heads_do_not() -> None:
    common, _ = layer_parameters(task_of(dense(), 4096, 16), np.array(8.0), ONE)
    down = 7168 * (1536 + 512 + 64) + 1536 + 512 + 2 * 7168
    up = 1536 * 128 * 192 + 512 * 128 * (128 + 128) + 128 * 128 * 7168 + 3 * 7168 * 18432
    assert common == pytest.approx(down + up / 8)


@pytest.mark.parametrize("shape", [DEEPSEEK, dense(), entry("llama3.1-8b").shape])
@pytest.mark.parametrize("tensor", [1, 4])
def test_a_machine_without_overheads_takes_the_exact_flops(shape: ModelShape, tensor: int) -> None:
    """Infinitely fast but for arithmetic at 1 FLOP/s: seconds are the FLOPs of `model.counts`."""
    asked = question(shape, "64xH100", sequence=4096, batch_tokens=2**16)
    task, rates = physics(asked)
    numbers = dict.fromkeys(("memory", "near", "link", "port"), np.inf)
    numbers |= {"matrix": 1.0, "matrix_16": 1.0, "attention": 1.0, "edge": 0.0, "host": 0.0}
    arrays: dict[str, Array] = {name: np.array(value) for name, value in numbers.items()}
    ideal = replace(rates, **arrays)
    shared = replace(calibration().shared, attention_backward=2.0, narrow_heads=0.0)
    keys = Layouts.of([Layout(tensor=tensor)])
    found = block(task, ideal, shared, keys)
    seconds = shape.layers * found.compute[0] + found.head[0]
    counted = flops_per_token(shape, 4096, "causal")
    # the router's product is left out: a thousandth of the rest at most
    exact = counted.total - 3 * counted.forward.router
    assert seconds * tensor / 4096 == pytest.approx(exact, rel=1e-9)


def test_kept_activations_are_those_of_each_operation() -> None:
    asked = question(dense(), "64xH100", sequence=4096, batch_tokens=2**16)
    task, rates = physics(asked)
    kept, _ = layer_activations(task, rates, Layouts.of([Layout()]))
    hidden, latents = 4 * 7168, 2 * (1536 + 512) + 64
    heads = 128 * (192 + 192 + 128) + 128 * 128
    inner = 4 * 18432  # gate, up, the activation and their product
    assert kept[0] == 4096 * (2 * (hidden + latents + heads + inner) + 4 * 128)


def test_attention_that_is_not_latent_is_what_it_was() -> None:
    """Latent rows beside ordinary ones change nothing for them."""
    asked = question(entry("llama2-7b").shape, "8xH100", sequence=4096, batch_tokens=2**17)
    task, rates = physics(asked)
    both = [task, task_of(DEEPSEEK, 4096, 32)]
    names = task.__dataclass_fields__
    joined = type(task)(**{n: np.array([getattr(t, n) for t in both], dtype=float) for n in names})
    keys, pair = Layouts.of([Layout(data=8)]), Layouts.of([Layout(data=8)] * 2)
    shared = calibration().shared
    alone, together = block(task, rates, shared, keys), block(joined, rates, shared, pair)
    assert together.forward[0] == pytest.approx(alone.forward[0], rel=1e-12)
    assert together.forward[1] == pytest.approx(
        block(both[1], rates, shared, keys).forward[0], rel=1e-12
    )


def test_an_experts_states_are_sharded_over_the_ranks_that_hold_it() -> None:
    """8 replicas, experts over 4 of them: an expert's moments are halved, the rest's are in 8."""
    task = task_of(DEEPSEEK, 4096, 16)
    rates: Rates = physics(question(DEEPSEEK, "64xH100", sequence=4096, batch_tokens=2**16))[1]
    layouts = [Layout.model_validate(f"dp8 ep4 zero{zero}") for zero in (0, 1)]
    whole, sharded = memory(task, rates, Layouts.of(layouts)).optimizer
    experts = 58 * 64 * 3 * 7168 * 2048 * 12
    assert sharded == pytest.approx(experts / 2 + (whole - experts) / 8)


def test_what_no_fitted_row_has_is_marked_on_a_calibrated_device_too() -> None:
    asked = question(DEEPSEEK, "512xH100", batch_tokens=2**24, sequence=4096)
    layout = Layout.model_validate("dp32 pp16 ep32 zero1 full")
    (marked,) = price(asked, [layout])
    assert marked.extrapolated
    (plain,) = price(replace(asked, shape=entry("llama2-70b").shape), [Layout(data=512)])
    assert not plain.extrapolated
    assert marked.interval_s[1] / marked.step_s > plain.interval_s[1] / plain.step_s


def test_deepseek_v3_is_planned() -> None:
    found = plan(question(DEEPSEEK, "2048xH800-SXM-80GB", batch_tokens=2**24, sequence=4096), top=1)
    best = found.layouts[0]
    assert best.fits
    assert best.extrapolated
    assert best.layout.expert > 1


def test_more_experts_per_rank_is_less_communication_and_more_memory() -> None:
    asked = question(DEEPSEEK, "2048xH800-SXM-80GB", batch_tokens=2**24, sequence=4096)
    texts = [f"dp128 pp16 ep{expert} zero1 full" for expert in (8, 64)]
    few, many = price(asked, [Layout.model_validate(text) for text in texts])
    assert few.ledger.sent.expert_bytes is not None
    assert many.ledger.sent.expert_bytes is not None
    assert few.ledger.sent.expert_bytes < many.ledger.sent.expert_bytes
    assert few.memory_bytes > many.memory_bytes


def test_a_small_latent_model_costs_as_its_widths_say() -> None:
    """Twice the values' width: more memory and more time, and nothing else asked."""
    latent = LatentAttentionShape(
        query_rank=256, kv_rank=128, rope_head_dim=32, nope_head_dim=64, value_head_dim=64
    )
    narrow = ModelShape(
        layers=8, hidden=1024, heads=8, head_dim=96, vocab=32000, latent_attention=latent,
        experts=ExpertShape(count=8, top_k=2, ffn_hidden=512),
    )  # fmt: skip
    wide = narrow.model_copy(
        update={"latent_attention": latent.model_copy(update={"value_head_dim": 128})}
    )
    first, second = (
        price(
            question(shape, "8xH100", sequence=2048, batch_tokens=2**18),
            [Layout.model_validate("dp8")],
        )[0]
        for shape in (narrow, wide)
    )
    assert second.step_s > first.step_s
    assert second.memory_bytes > first.memory_bytes
