"""The program of a pipeline rank agrees with the chunks it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

from ridgeline.launch.pool import Pool
from ridgeline.layout.layout import Layout, Schedule
from ridgeline.layout.schedules import Action
from ridgeline.layout.stages import chunks_of
from ridgeline.layout.transfers import MOST_LEAVING
from ridgeline.model.decoder import Decoder
from ridgeline.model.shape import ModelShape
from ridgeline.run import Run
from ridgeline.train.build import make_job
from ridgeline.train.loop import train_loop
from ridgeline.train.manifest import Progress
from ridgeline.train.optimizer import adamw
from ridgeline.train.pipeline import steps_of
from ridgeline.train.vocabulary import token_loss
from ridgeline.train.worker import process_group

SHAPE = ModelShape(layers=8, hidden=32, heads=4, vocab=64, max_sequence=32)


@pytest.mark.parametrize("pipeline", [1, 2, 4])
@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_each_chunk_of_the_cut_is_worked_on_by_one_rank(schedule: Schedule, pipeline: int) -> None:
    layout = Layout(pipeline=pipeline, schedule=schedule)
    homes = []
    for rank in range(pipeline):
        steps = steps_of(layout, rank, 4, True)
        homes.append({step.chunk for step in steps if isinstance(step, Action)})
    worked_on = sorted(chunk for home in homes for chunk in home)
    assert worked_on == [chunk.index for chunk in chunks_of(layout, SHAPE, 32)]


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_without_a_pipeline_each_micro_batch_goes_forward_and_back(schedule: Schedule) -> None:
    expected = [Action(kind, 0, k) for k in range(3) for kind in ("F", "B")]
    assert list(steps_of(Layout(schedule=schedule), 0, 3, True)) == expected


def _most_sends_alive(run: Run) -> int:
    """Most tensors that this rank's sends kept alive at once, over one step."""
    sent: list[StorageWeakRef] = []
    most = 0
    plain = dist.isend

    def isend(value: torch.Tensor, *rest: Any, **options: Any) -> Any:
        nonlocal most
        sent.append(StorageWeakRef(value.untyped_storage()))  # type: ignore[no-untyped-call]
        most = max(most, sum(not each.expired() for each in sent))  # type: ignore[no-untyped-call]
        return plain(value, *rest, **options)

    with patch.object(dist, "isend", isend), process_group() as (device, control):
        job = make_job(run, Decoder, token_loss, adamw, device, control, lambda: False)
        train_loop(job, Progress(), lambda seen: None, lambda *_: (False, None))
    assert len(sent) == 32
    return most


def test_what_was_sent_is_let_go_before_the_step_ends(
    tiny_run: Callable[..., Run], pool: Pool
) -> None:
    changes = {"schedule": {"global_batch": 32}, "budget": {"steps": 1}}
    run = tiny_run(layout="pp2 mb1 fp32", **changes)
    for most in pool.run(_most_sends_alive, (run,), 2):
        assert 2 <= most <= MOST_LEAVING + 2
