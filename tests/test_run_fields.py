"""Every field of a run changes something: an option that nothing reads does not pass here."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from pydantic import BaseModel
from rich.console import Console
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import ridgeline
from ridgeline.data.prepare import prepare
from ridgeline.errors import CorruptionError, LaunchError, LayoutError, NotLearnt, WorkerLost
from ridgeline.launch.local import Life, run_workers
from ridgeline.launch.stopping import Wish, deadline
from ridgeline.layout.arithmetic import check
from ridgeline.layout.layout import Layout
from ridgeline.layout.trainable import trainable
from ridgeline.model.counts import flops_per_token, parameters
from ridgeline.model.decoder import Decoder, make_mlp
from ridgeline.plan.constants import peak
from ridgeline.plan.question import question_of_run
from ridgeline.run import Data, Run
from ridgeline.train.build import build
from ridgeline.train.experts import update_router_bias
from ridgeline.train.interval import mtbf_s
from ridgeline.train.manifest import Progress
from ridgeline.train.parallelize import make_mesh
from ridgeline.train.pipeline import steps_of
from ridgeline.train.resolve import Host, resolve
from ridgeline.train.saving import Saver
from ridgeline.train.schedule import (
    batch_at,
    first_sample,
    learning_rate,
    run_fraction,
    total_steps,
)
from ridgeline.train.start import judge
from ridgeline.train.telemetry import Clock
from ridgeline.train.vocabulary import token_loss
from ridgeline.train.watchdog import Watchdog
from ridgeline.train.worker import Outcome, local_folder

MakeRun = Callable[..., Run]
LAPTOP = Host(torch.device("cpu"), devices=0, cores=2, numa_domains=1, bf16=None)
TIMED = {"tokens_per_s", "memory_bytes", "step_s", "seconds", "mfu", "time", "start_s"}
TIMED |= {"write_s", "slower"}


def trained(run: Run) -> object:
    """All that training leaves, but for what differs from one minute to the next."""
    outcome = ridgeline.train(run)
    lines = (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    measured = [{k: v for k, v in row.items() if k not in TIMED} for row in rows]
    knows_its_peak = any(row.get("mfu") is not None for row in rows)
    measured.sort(
        key=lambda row: ("loss" in row, row["step"])
    )  # a checkpoint tells when it is done
    kept = sorted(path.name for path in (run.path / "checkpoints").iterdir())
    files = sorted(path.name for path in run.path.iterdir())
    return outcome, measured, knows_its_peak, kept, files


def saved(run: Run) -> object:
    """How a checkpoint is written: whether from a copy, and what lies on the node's own disk."""
    saver = Saver(run.path / "checkpoints", run.checkpoint, None, local_folder(run))
    saver.save(Progress(step=1), {"weight": torch.zeros(3)})
    done = saver.finish()
    assert done is not None and done.error is None
    return len(saver.buffers), sorted(Path().rglob("step-*"))


def troubled(run: Run) -> object:
    """Which steps are left out, and whether one stops the run, where the loss is NaN in step 2 and
    a thousandfold in step 23."""
    factors = (
        {2: math.nan, 23: 1000.0}.get(step, 1.0) for step in itertools.count(1) for _ in range(2)
    )

    def loss(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
        factor = next(factors) if torch.is_grad_enabled() else 1.0
        return token_loss(logits_BLV, targets_BL) * factor

    stopped = None
    try:
        ridgeline.train(run, loss=loss)
    except NotLearnt as error:
        stopped = error.rule
    rows = (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return stopped, [row["step"] for row in map(json.loads, rows) if row.get("event") == "bad_step"]


def miscalculated(run: Run) -> bool:
    """Whether a device whose products are wrong goes unnoticed."""

    class Faulty(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            return out + 1 if func is torch.ops.aten.mm.default else out

    try:
        with Faulty():  # type: ignore[no-untyped-call]
            ridgeline.train(run)
    except CorruptionError:
        return False
    return True


def planned(run: Run) -> float:
    """The peak that a plan of the run's own machine is measured against."""
    asked = question_of_run(run)
    return peak(asked.cluster, asked.precision)


def where(run: Run) -> object:
    """The folder that training makes."""
    ridgeline.train(run)
    return run.path, (run.path / "metrics.jsonl").exists()


def scheduled(run: Run) -> object:
    """The curve of the learning rate, and what each step trains on."""
    steps = total_steps(run) or 30
    rates = [
        learning_rate(run, step, step / steps) for step in range(0, steps, max(1, steps // 30))
    ]
    return rates, total_steps(run), [(batch_at(run, s), first_sample(run, s)) for s in range(12)]


def fraction(run: Run) -> float:
    """How much of the budget is behind step 3, after 36 seconds."""
    return run_fraction(run, 3, 36.0)


def computed(run: Run) -> object:
    """Logits of the model as it is initialised, or what it weighs and costs if only planned."""
    counts = parameters(run.model), flops_per_token(run.model, run.sequence, "full")
    if run.model.latent_attention:
        return counts
    model = Decoder(run.model)
    model.initialise(run.seed)
    tokens = torch.arange(24).reshape(2, 12) * 11 % 250
    return counts, model(tokens).tolist()


def balanced(run: Run) -> object:
    """What evens the load of the experts: the gradient of the router, and the moved bias."""
    mixture = make_mlp(run.model, 0)
    x_BLD = torch.ones(1, 8, run.model.hidden)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    torch.autograd.backward(mixture(x_BLD).sum())
    update_router_bias([mixture], lambda visits_ME: visits_ME)
    gradient = mixture.get_parameter("router.weight").grad
    assert gradient is not None
    return gradient.tolist(), mixture.get_buffer("selection_bias").tolist()


def written(run: Run) -> str:
    """The run's own file, for fields whose whole effect is to be told to a reader."""
    return run.to_toml()


def resolved(run: Run) -> object:
    """What is chosen for a laptop."""
    return resolve(run, LAPTOP, None)[0]


def refused(run: Run) -> str | None:
    """Why the layout cannot be trained, if it cannot."""
    assert isinstance(run.layout, Layout)
    try:
        trainable(run.layout, run.model, run.sequence)
    except LayoutError as error:
        return error.rule
    return None


def divided(run: Run) -> object:
    """The program that the last rank of the layout runs, built without the other ranks: which part
    of each parameter it holds and who shares it, what is done to its blocks, and all its actions.

    Nothing of it is refused: that a run trains so is for the tests of parity.
    """
    layout = run.layout
    assert isinstance(layout, Layout) and refused(run) is None
    check(layout, run.model, run.sequence, run.global_batch, layout.world)
    rank = layout.world - 1
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world)
    try:
        mesh = make_mesh(layout, torch.device("cpu"), rank)
        pipeline = build(run, Decoder, mesh, Clock())
        told: list[object] = [pipeline.positions.tolist(), pipeline.hidden().shape]
        for index, chunk in pipeline.chunks.items():
            for name, parameter in chunk.named_parameters():
                told.append((index, name, parameter.shape))
                if isinstance(parameter, DTensor):
                    ranks = parameter.device_mesh.mesh.tolist()
                    told.append((parameter.to_local().shape, parameter.placements, ranks))
            for block in chunk.get_submodule("blocks").children():
                told.append(isinstance(block, FSDPModule))
                told.append(getattr(block.forward, "args", ())[:1])  # the kind of recomputation
                told.append(block._compiled_call_impl is not None)
    finally:
        dist.destroy_process_group()
    micro_batches = run.global_batch // (layout.data * layout.micro_batch)
    return told, steps_of(layout, pipeline.rank, micro_batches, True)


def judged(run: Run) -> bool:
    """Whether a held-out loss of half a nat is enough."""
    try:
        judge(run, Outcome(rank=0, complete=True, step=4, tokens=99, held_out_loss=0.5))
    except NotLearnt:
        return False
    return True


def hangs_after(run: Run) -> float:
    """Seconds after which the watchdog calls a step a hang."""
    return Watchdog(run).limit_s


def made(run: Run) -> object:
    """What `data prepare` writes and says."""
    said = io.StringIO()
    manifest = prepare(run.data, run.model.vocab, run.seed, Console(file=said, width=200))
    workers = [line.split(" by ")[1] for line in said.getvalue().splitlines() if " by " in line]
    shards = sorted(path.name for path in run.data.folder.iterdir())
    return str(run.data.folder), manifest.digest(), shards, workers


def launched(run: Run) -> object:
    """The layout for which a launcher has too few devices."""
    return resolve(run, LAPTOP, 2)[0].layout


def lost(run: Run) -> object:
    """What becomes of a worker that dies once."""
    run.path.mkdir(parents=True)
    try:
        return run_workers(lose_once, (run.path,), 1, faults=run.faults)
    except WorkerLost:
        return None


def lose_once(folder: Path, life: Life) -> int:
    if not life.lost:
        os.kill(os.getpid(), signal.SIGKILL)
    return len(life.lost)


def slow(run: Run) -> object:
    """What becomes of a worker that was asked to stop and takes a second and a half."""
    stop = Wish()
    stop.set()
    try:
        return run_workers(sleep, (1.5,), 1, stop, run.faults)
    except LaunchError as error:
        return error.rule


def sleep(seconds: float, life: Life) -> float:
    time.sleep(seconds)
    return seconds


def limited(run: Run) -> float:
    """When to save, in a job that ends an hour after the epoch."""
    with patch.dict(os.environ, {"SLURM_JOB_END_TIME": "3600"}):
        return deadline(run.faults.save_before_s)


@dataclass(frozen=True)
class Case:
    """A field, another value for it, and the probe that shows the difference."""

    name: str
    value: object
    probe: Callable[[Run], object]
    base: dict[str, Any] = field(default_factory=dict)
    along: dict[str, Any] = field(default_factory=dict)
    """What must change with it, for the run to agree with itself."""


def nested(name: str, value: object) -> dict[str, Any]:
    """{"a": {"b": value}} from "a.b"."""
    for part in reversed(name.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


GPT = {"model": {"positions": "learned", "norm": "layernorm", "activation": "gelu"}}
STRETCHED = {"model": {"rope_scaling": {"factor": 8.0, "original_max_sequence": 8}}}
EXPERTS = {"model": {"experts": {"count": 4, "top_k": 2, "ffn_hidden": 16, "shared": 1}}}
LATENT = {
    "model": {
        "kv_heads": 4,
        "head_dim": 12,
        "latent_attention": {
            "query_rank": 8, "kv_rank": 8, "rope_head_dim": 4, "nope_head_dim": 8,
            "value_head_dim": 8,
        },
    }
}  # fmt: skip
RAMP = {"schedule": {"global_batch": 24, "ramp": {"start": 8, "increment": 4, "every_steps": 2}}}
TOKENS = {"schedule": {"global_batch": None, "global_batch_tokens": 256}}
WSD = {"schedule": {"shape": "wsd"}, "budget": {"steps": 40}}
SHARDED = {"layout": {"data": 4, "zero": 3}}
ONE = {"layout": {"data": 1}}
STAGES = {"model": {"layers": 4}, "layout": {"pipeline": 2}}
OFTEN = {"checkpoint": {"every_steps": 1, "keep": 1}}
LONG = {"budget": {"steps": 40}}
AUTO = {"layout": "auto"}
SPIKED = {"budget": {"steps": 24}, "faults": {"spike": 20.0}}
ON_A100 = {"cluster": {"device": "A100-SXM-80GB", "devices": 1}}

CASES = [
    Case("name", "other", where),
    Case("folder", "elsewhere", where),
    Case("seed", 2, trained),
    Case("model.name", "another", trained),
    Case("model.source", "my notebook", written),
    Case("model.layers", 3, computed),
    Case("model.hidden", 48, computed),
    Case("model.heads", 8, computed),
    Case("model.kv_heads", 4, computed),
    Case("model.head_dim", 16, computed),
    Case("model.activation", "gelu_tanh", computed),
    Case("model.ffn_hidden", 96, computed),
    Case("model.vocab", 384, computed),
    Case("model.max_sequence", 64, computed, GPT),
    Case("model.positions", "learned", computed),
    Case("model.rope_theta", 100.0, computed),
    Case("model.norm", "layernorm", computed),
    Case("model.norm_eps", 0.1, computed),
    Case("model.bias", True, computed),
    Case("model.qkv_bias", True, computed),
    Case("model.qk_norm", True, computed),
    Case("model.tied", True, computed),
    Case("model.init_std", 0.1, computed),
    Case("model.rope_scaling.factor", 2.0, computed, STRETCHED),
    Case("model.rope_scaling.low_frequency_factor", 0.1, computed, STRETCHED),
    Case("model.rope_scaling.high_frequency_factor", 1.5, computed, STRETCHED),
    Case("model.rope_scaling.original_max_sequence", 16, computed, STRETCHED),
    Case("model.experts.count", 8, computed, EXPERTS),
    Case("model.experts.top_k", 1, computed, EXPERTS),
    Case("model.experts.ffn_hidden", 8, computed, EXPERTS),
    Case("model.experts.shared", 0, computed, EXPERTS),
    Case("model.experts.first_dense_layers", 1, computed, EXPERTS),
    Case("model.experts.routing", "sigmoid", computed, EXPERTS),
    Case("model.experts.normalise", False, computed, EXPERTS),
    Case("model.experts.scale", 3.0, computed, EXPERTS),
    Case("model.experts.balance_weight", 0.5, balanced, EXPERTS),
    Case("model.experts.bias_rate", 0.5, balanced, EXPERTS),
    Case("model.latent_attention.query_rank", 4, computed, LATENT),
    Case("model.latent_attention.kv_rank", 4, computed, LATENT),
    Case("model.latent_attention.rope_head_dim", 6, computed, LATENT, {"model": {"head_dim": 14}}),
    Case("model.latent_attention.nope_head_dim", 9, computed, LATENT, {"model": {"head_dim": 13}}),
    Case("model.latent_attention.value_head_dim", 4, computed, LATENT),
    Case("data.folder", "prepared again", made),
    Case("data.corpora.name", "renamed", made),
    Case("data.corpora.sources", ["other.jsonl"], made),
    Case("data.corpora.weight", 9.0, trained),
    Case("data.corpora.text_field", "title", made),
    Case("data.tokenizer", "given.json", made),
    Case("data.sequence", 16, trained),
    Case("data.held_out_fraction", 0.3, made),
    Case("data.shard_tokens", 1024, made),
    Case("data.workers", 2, made),
    Case("cluster.device", "H100-SXM-80GB", planned, ON_A100),
    Case("cluster.devices", 4, resolved, AUTO),
    Case("cluster.mtbf_hours", 3.0, mtbf_s),
    Case("layout.data", 2, divided, ONE),
    Case("layout.context", 2, divided, ONE),
    Case("layout.tensor", 2, divided, ONE),
    Case("layout.pipeline", 2, divided, ONE),
    Case("layout.expert", 2, divided, {**EXPERTS, "layout": {"data": 2}}),
    Case("layout.expert_tensor", 2, refused, ONE),
    Case("layout.micro_batch", 4, divided, ONE),
    Case("layout.interleave", 2, divided, STAGES),
    Case("layout.schedule", "zbv", divided, STAGES),
    Case("layout.zero", 1, divided, {"layout": {"data": 4}}),
    Case("layout.shard_group", 2, divided, SHARDED),
    Case("layout.recompute", "full", divided, ONE),
    Case("layout.compile", True, divided, ONE),
    Case("layout.precision", "bf16", trained, {"layout": {"micro_batch": 4, "precision": "fp32"}}),
    Case("layout.order", "dp-pp-cp-tp", divided, {"layout": {"data": 2, "pipeline": 2, "zero": 1}}),
    Case("optimizer.lr", 1e-3, trained),
    Case("optimizer.beta1", 0.5, trained),
    Case("optimizer.beta2", 0.5, trained),
    Case("optimizer.eps", 1e-2, trained),
    Case("optimizer.weight_decay", 0.9, trained),
    Case("optimizer.clip_norm", 0.05, trained),
    Case("schedule.shape", "linear", scheduled, LONG),
    Case("schedule.warmup_steps", 3, scheduled, LONG),
    Case("schedule.final_fraction", 0.5, scheduled, LONG),
    Case("schedule.decay_fraction", 0.6, scheduled, WSD),
    Case("schedule.global_batch", 12, scheduled),
    Case("schedule.global_batch_tokens", 512, scheduled, TOKENS),
    Case("schedule.ramp.start", 4, scheduled, RAMP),
    Case("schedule.ramp.increment", 8, scheduled, RAMP),
    Case("schedule.ramp.every_steps", 3, scheduled, RAMP),
    Case("budget.steps", 6, scheduled),
    Case("budget.tokens", 9999, scheduled, {"budget": {"steps": None, "tokens": 99}}),
    Case("budget.hours", 0.1, fraction, {"budget": {"steps": None, "hours": 1.0}}),
    Case("evaluation.every_steps", 2, trained),
    Case("evaluation.sequences", 9, trained),
    Case("evaluation.must_learn_nats", 99.0, judged, {"evaluation": {"must_learn_nats": 0.0}}),
    Case("checkpoint.every_steps", 1, trained),
    Case("checkpoint.keep", 1, trained, {"checkpoint": {"every_steps": 1}}),
    Case(
        "checkpoint.permanent_every_steps",
        2,
        trained,
        {"checkpoint": {"every_steps": 1, "keep": 1}},
    ),
    Case("checkpoint.asynchronous", False, saved),
    Case("checkpoint.local", "disk", saved),
    Case("faults.bad_step", "stop", troubled, SPIKED),
    Case("faults.spike", 0.0, troubled, SPIKED),
    Case("faults.most_bad_steps", 1, troubled, SPIKED),
    Case("faults.compare_every_steps", 2, trained),
    Case("faults.self_test", False, miscalculated),
    Case("faults.restarts", 0, lost),
    Case("faults.fewer_devices", False, launched, {"layout": {"data": 4}}),
    Case("faults.stop_within_s", 0.5, slow),
    Case("faults.save_before_s", 60.0, limited),
    Case("faults.step_limit_s", 0.0, hangs_after),
    Case("logging.every_steps", 3, trained),
    Case("logging.samples", True, trained),
    Case("logging.tensorboard", True, trained),
]


def leaves(table: type[BaseModel], prefix: str = "") -> set[str]:
    """Dotted names of all fields that are not tables themselves."""
    names: set[str] = set()
    for name, info in table.model_fields.items():
        tables = [
            kind
            for kind in (info.annotation, *get_args(info.annotation))
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        names |= leaves(tables[0], f"{prefix}{name}.") if tables else {f"{prefix}{name}"}
    return names


def test_every_field_of_a_run_has_a_case() -> None:
    assert {case.name for case in CASES} == leaves(Run)
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.fixture
def small_text(tmp_path: Path, prepared: Data) -> dict[str, Any]:
    """`[data]` of two small corpora that are not prepared yet, and a tokenizer.json."""
    for name, word in (("text", "ridge"), ("other", "valley"), ("second", "summit")):
        rows = [{"text": f"{n} {word} " * 40, "title": f"title {n} of {word}"} for n in range(60)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    given = (prepared.folder / "tokenizer.json").read_bytes()
    (tmp_path / "given.json").write_bytes(given)
    corpora = [
        {"name": name, "sources": [f"{name}.jsonl"], "text_field": "text"}
        for name in ("text", "second")
    ]
    return {"folder": "prepared", "corpora": corpora, "sequence": 32, "workers": 1}


@pytest.fixture
def probe_of(
    tiny_run: MakeRun,
    prepared: Data,
    small_text: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Case, bool], object]:
    """What a case's probe sees in an empty folder, without or with the change."""
    monkeypatch.chdir(tmp_path)

    def look(case: Case, changed: bool) -> object:
        for folder in ("runs", "prepared"):
            shutil.rmtree(folder, ignore_errors=True)
        data = prepared.model_dump(mode="json", exclude_none=True)
        told: dict[str, Any] = {
            "folder": "runs",
            "data": small_text if case.probe is made else data,
        }
        told = merge(told, case.base)
        table, _, name = case.name.rpartition(".")
        if changed and table == "data.corpora":
            first, second = told["data"]["corpora"]
            told["data"] = {**told["data"], "corpora": [{**first, name: case.value}, second]}
        elif changed:
            told = merge(merge(told, nested(case.name, case.value)), case.along)
        return case.probe(tiny_run(**told))

    return look


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_field_changes_something(case: Case, probe_of: Callable[[Case, bool], object]) -> None:
    assert probe_of(case, False) != probe_of(case, True)


PROBES = {case.probe: case for case in reversed(CASES)}


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.__name__)
def test_a_probe_sees_no_difference_where_there_is_none(
    probe: Callable[[Run], object], probe_of: Callable[[Case, bool], object]
) -> None:
    assert probe_of(PROBES[probe], False) == probe_of(PROBES[probe], False)


def merge(into: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`into` with the tables of `changes` laid over its own."""
    result = dict(into)
    for key, value in changes.items():
        inner = result.get(key)
        both = isinstance(inner, dict) and isinstance(value, dict)
        result[key] = merge(inner or {}, value) if both else value
    return result
