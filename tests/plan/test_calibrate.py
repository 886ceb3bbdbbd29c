"""A measured step gives the planner's constants back, those that it tells of and no others."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.layout.layout import Layout
from ridgeline.ledger import StepSeconds
from ridgeline.machine.corrections import FACTORS, MOST, Correction
from ridgeline.model.catalogue import entry
from ridgeline.plan.calibrate import fit
from ridgeline.plan.plan import price
from ridgeline.plan.question import Question, question

EIGHT = question(entry("llama2-7b").shape, "8xA100", batch_tokens=2**20, sequence=4096)
MANY = question(entry("llama2-7b").shape, "64xA100", batch_tokens=2**22, sequence=4096)
factors = st.floats(0.5, 2.0)


def measured(asked: Question, layout: Layout, by: Correction) -> StepSeconds:
    """What a machine would measure that is as far from the catalogue's as `by` says."""
    corrected = replace(asked, corrections={asked.precision: by})
    return price(corrected, [layout])[0].ledger.seconds


@given(factors, factors, factors)
def test_the_factors_of_a_machine_are_found(compute: float, link: float, update: float) -> None:
    layout = Layout.model_validate("dp2 tp4 mb1 zero1 bf16")
    by = Correction(compute=compute, link=link, update=update)
    seen = measured(EIGHT, layout, by)
    found = fit(EIGHT, layout, seen)
    assert found.correction.compute == pytest.approx(compute, rel=1e-6)
    assert found.correction.link == pytest.approx(link, rel=1e-6)
    optimizer_s, total_s = seen.optimizer_s or 0.0, seen.total_s or 1.0
    if optimizer_s > 0.02 * total_s:
        assert found.correction.update == pytest.approx(update, rel=1e-6)
    else:
        assert (found.correction.update, found.left["update"]) == (1, "less than 2% of the step")
    assert found.left["port"] == "the planner has no seconds for it here"


def test_links_and_ports_are_told_apart_by_the_axes_that_cross_nodes() -> None:
    layout = Layout.model_validate("dp8 tp8 mb1 zero3 bf16")
    by = Correction(compute=1.1, link=1.5, port=2.5)
    found = fit(MANY, layout, measured(MANY, layout, by))
    assert found.correction.link == pytest.approx(1.5, rel=1e-6)
    assert found.correction.port == pytest.approx(2.5, rel=1e-6)


def test_a_corrected_planner_gives_the_measured_step_back() -> None:
    layout = Layout.model_validate("dp2 tp4 mb1 bf16")
    seen = measured(EIGHT, layout, Correction(compute=1.3, link=0.7))
    by = fit(EIGHT, layout, seen).correction
    assert measured(EIGHT, layout, by).total_s == pytest.approx(seen.total_s, rel=1e-6)


def test_what_is_not_measured_stays() -> None:
    layout = Layout.model_validate("dp2 tp4 mb1 bf16")
    found = fit(EIGHT, layout, StepSeconds(total_s=1.0))
    assert found.correction == Correction()
    assert set(found.left) == set(FACTORS)


def test_a_factor_beyond_all_reason_stays() -> None:
    layout = Layout.model_validate("dp8 mb1 bf16")
    seen = measured(EIGHT, layout, Correction())
    far = seen.model_copy(update={"compute_s": 10 * MOST * (seen.compute_s or 0.0)})
    found = fit(EIGHT, layout, far)
    assert found.correction.compute == 1
    assert "would be needed" in found.left["compute"]


def test_an_earlier_correction_is_not_built_upon() -> None:
    layout = Layout.model_validate("dp2 tp4 mb1 bf16")
    seen = measured(EIGHT, layout, Correction(compute=1.5))
    asked = replace(EIGHT, corrections={"bf16": Correction(compute=3.0)})
    assert fit(asked, layout, seen).correction.compute == pytest.approx(1.5, rel=1e-6)


def test_forward_and_backward_stand_for_compute_where_only_they_are_known() -> None:
    layout = Layout.model_validate("dp8 mb1 bf16")
    seen = measured(EIGHT, layout, Correction(compute=1.5))
    whole = seen.compute_s or 0.0
    parts = {"compute_s": None, "forward_s": whole / 3, "backward_s": whole * 2 / 3}
    found = fit(EIGHT, layout, seen.model_copy(update=parts))
    assert found.correction.compute == pytest.approx(1.5, rel=1e-6)


def test_a_correction_is_of_our_own_stack_and_one_precision_and_is_said() -> None:
    asked = replace(EIGHT, corrections={"bf16": Correction(compute=2.0, source="run a")})
    assert asked.assumed[-1] == "constants corrected by run a"
    for other in (replace(asked, precision="fp16"), replace(asked, stack="megatron-core")):
        assert other.correction is None
        assert other.assumed == EIGHT.notes
