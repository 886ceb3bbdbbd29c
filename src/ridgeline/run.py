"""Run: the one description of a training run.

Read from TOML, checked once, overridden by dotted names (`--optimizer.lr 3e-4`), frozen, and
written into the run's folder fully resolved. Nothing else configures the program.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomlkit
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ridgeline.errors import RidgelineError, RunError, nearest
from ridgeline.layout.layout import Layout, words_of
from ridgeline.model.catalogue import expand
from ridgeline.model.shape import ModelShape

Fraction = Annotated[float, Field(ge=0, le=1, strict=True)]
PositiveInt = Annotated[int, Field(ge=1, strict=True)]
NaturalInt = Annotated[int, Field(ge=0, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Decay = Annotated[float, Field(ge=0, lt=1, strict=True)]
NaturalFloat = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


class Section(BaseModel):
    """A table of the run file: frozen, unknown keys refused, every field documented."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Corpus(Section):
    """One corpus of the mixture."""

    name: Name
    """What logs and reports call it."""
    sources: tuple[str, ...] = Field(min_length=1)
    """Folders, files or globs of text or .jsonl; or Megatron shards (`path/to/prefix.idx`)."""
    weight: PositiveFloat = 1.0
    """Share of the mixture's tokens, relative to the other corpora."""
    text_field: str = "text"
    """The field of a .jsonl line that holds the text."""


class Data(Section):
    """Text, tokenizer and shards."""

    folder: Path = Path("prepared")
    """Where `ridgeline data prepare` writes shards, tokenizer and manifest."""
    corpora: tuple[Corpus, ...] = ()
    """The corpora of the mixture."""
    tokenizer: Path | None = None
    """An existing tokenizer.json; left out: a BPE of `model.vocab` entries is trained."""
    sequence: NaturalInt = 0
    """Tokens per sample; 0: the model's `max_sequence`."""
    held_out_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    """Share of the documents kept out of training, chosen by their text."""
    shard_tokens: Annotated[int, Field(ge=1024)] = 2**26
    """Largest number of tokens in one shard."""
    workers: NaturalInt = 0
    """Processes that tokenize; 0: one per core."""


class Cluster(Section):
    """The devices the run is meant for."""

    device: str = "local"
    """Device whose peak MFU is measured against, such as H100-SXM-80GB; local: this machine's."""
    devices: NaturalInt = 0
    """Number of devices; 0: those of this machine."""
    mtbf_hours: PositiveFloat | None = None
    """Mean hours between failures of the whole job; left out: from the catalogue's failure rate."""


class Optimizer(Section):
    """AdamW with decoupled weight decay on matrices only."""

    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    beta1: Decay = 0.9
    """Decay of the mean of gradients."""
    beta2: Decay = 0.95
    """Decay of the mean of squared gradients."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NaturalFloat = 0.1
    """Decoupled weight decay, on parameters of two or more dimensions."""
    clip_norm: NaturalFloat = 1.0
    """Largest global gradient norm; 0: no clipping."""


class BatchRamp(Section):
    """A global batch that grows from `start` by `increment` every `every_steps` steps."""

    start: PositiveInt
    """Sequences per step at step 0."""
    increment: PositiveInt
    """Sequences added at each stage of the ramp."""
    every_steps: PositiveInt
    """Steps between two additions."""


class Schedule(Section):
    """Learning rate and batch over the run."""

    shape: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Decay after warm-up; wsd: stable, then linear over the last `decay_fraction` of the run."""
    warmup_steps: NaturalInt = 100
    """Steps of linear warm-up."""
    final_fraction: Fraction = 0.1
    """Last learning rate as a share of the peak."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the run over which wsd decays."""
    global_batch: PositiveInt | None = None
    """Sequences per optimizer step."""
    global_batch_tokens: PositiveInt | None = None
    """Tokens per optimizer step, instead of `global_batch`; a multiple of the sequence."""
    ramp: BatchRamp | None = None
    """A smaller batch at first."""


class Budget(Section):
    """How long to train: exactly one of the three."""

    steps: PositiveInt | None = None
    """Optimizer steps."""
    tokens: PositiveInt | None = None
    """Training tokens; rounded up to whole steps."""
    hours: PositiveFloat | None = None
    """Wall-clock hours of training, over all restarts together."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Budget:
        given = {k: v for k, v in self.model_dump().items() if v is not None}
        if len(given) != 1:
            said = " and ".join(f"{k} = {v}" for k, v in given.items()) or "nothing"
            raise RunError(
                f"[budget] says {said}",
                "exactly one of steps, tokens, hours says how long to train",
                "steps = 1000",
            )
        return self


class Evaluation(Section):
    """Held-out loss while training."""

    every_steps: NaturalInt = 0
    """Steps between evaluations; 0: only after the last step."""
    sequences: PositiveInt = 64
    """Held-out sequences per corpus, spread evenly over its held-out part."""
    must_learn_nats: NaturalFloat | None = None
    """The run fails (exit status 1) unless its last held-out loss is this far below the unigram
    entropy, and below the bigram model's held-out loss."""


class Checkpoint(Section):
    """When and where to save, and how many to keep."""

    every_steps: Literal["auto"] | NaturalInt = 500
    """Steps between checkpoints; auto: Young and Daly's interval, from the measured cost of saving
    and the cluster's failure rate; 0: only after the last step or when stopped."""
    keep: PositiveInt = 2
    """How many of the newest checkpoints stay."""
    permanent_every_steps: NaturalInt = 0
    """Checkpoints of every so many steps stay for ever; 0: none but the newest."""
    asynchronous: bool = True
    """Training goes on while a copy of its state is written; false: it waits."""
    local: Path | None = None
    """Folder on a disk of each node where checkpoints are written first, then drained from."""


class Faults(Section):
    """What a run does about what goes wrong."""

    restarts: NaturalInt = 3
    """How often lost workers are started again, from the newest checkpoint, before giving up."""
    fewer_devices: bool = True
    """With fewer nodes than before, go on in the nearest layout that fits them."""
    bad_step: Literal["skip", "roll back", "stop"] = "skip"
    """A step whose loss or gradient is not finite, or a spike, is left out; or the run goes back to
    its newest checkpoint and passes over the data since; or it stops. Optimizers other than
    PyTorch's fused ones make every step wait until it is known whether it was bad."""
    spike: NaturalFloat = 0.0
    """A gradient norm or loss this many robust deviations above the median of the last steps is a
    spike; 0: only what is not finite is bad."""
    most_bad_steps: PositiveInt = 20
    """So many bad steps in a row stop the run, whatever `bad_step` says."""
    step_limit_s: NaturalFloat = 1200.0
    """A step, or a phase beside the steps, that takes longer is a hang: the late rank is named and
    the run ends, to be started again; 0: wait for ever."""
    stop_within_s: PositiveFloat = 300.0
    """How long workers that were asked to stop may take before they are ended."""
    save_before_s: PositiveFloat = 300.0
    """How long before the job's time limit the run saves and stops."""
    compare_every_steps: NaturalInt = 0
    """Compare the copies of parameters that ranks hold, bit by bit, so often; 0: never."""
    self_test: bool = True
    """Before the first step, each device multiplies matrices whose product is known exactly."""


class Logging(Section):
    """What is printed and recorded."""

    every_steps: PositiveInt = 10
    """Steps between logged lines."""
    tensorboard: bool = True
    """Write TensorBoard event files beside metrics.jsonl."""
    samples: bool = False
    """Write which samples each rank reads at each step into samples/rank-N.jsonl."""


def _expand_model(value: object) -> object:
    """`model = "gpt2"`, and a table whose name is in the catalogue, take the rest from there."""
    if isinstance(value, str):
        value = {"name": value}
    return expand(value) if isinstance(value, dict) else value


class Run(Section):
    """A training run: what, on what, where, how, how long."""

    name: Name = "run"
    """Name of the run's folder."""
    folder: Path = Path("runs")
    """Where run folders lie."""
    seed: Seed = 0
    """Seed of weights, of the order of samples and of the held-out split."""
    model: Annotated[ModelShape, BeforeValidator(_expand_model)]
    """What is trained: a name of the catalogue, and what differs from it."""
    data: Data = Data()
    """What it is trained on."""
    cluster: Cluster = Cluster()
    """Where."""
    layout: Annotated[Literal["auto"] | Layout, Field(union_mode="left_to_right")] = "auto"
    """How it is divided, in one sentence: `dp8 tp2 mb4 bf16`; auto: chosen for this machine."""
    optimizer: Optimizer = Optimizer()
    """How weights are updated."""
    schedule: Schedule = Schedule()
    """Learning rate and batch over the run."""
    budget: Budget = Budget(steps=1000)
    """How long."""
    evaluation: Evaluation = Evaluation()
    """Held-out loss."""
    checkpoint: Checkpoint = Checkpoint()
    """When and where to save."""
    faults: Faults = Faults()
    """What to do about what goes wrong."""
    logging: Logging = Logging()
    """What is printed and recorded."""

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.folder / self.name

    @property
    def sequence(self) -> int:
        """Tokens per sample."""
        return self.data.sequence or self.model.max_sequence

    @property
    def global_batch(self) -> int:
        """Sequences per optimizer step, once a ramp has ended."""
        if self.schedule.global_batch_tokens:
            return self.schedule.global_batch_tokens // self.sequence
        return self.schedule.global_batch or 64

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Run:
        if self.sequence > self.model.max_sequence and self.model.positions == "learned":
            raise RunError(
                f"data.sequence = {self.sequence} for {self.model.name}",
                f"it has {self.model.max_sequence} learned positions (model.max_sequence)",
                f"data.sequence = {self.model.max_sequence}",
            )
        names = [corpus.name for corpus in self.data.corpora]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise RunError(
                f"two corpora are called {min(repeated)!r}", "names of corpora are unique", ""
            )
        self._check_batch()
        return self

    def _check_batch(self) -> None:
        schedule = self.schedule
        if schedule.global_batch and schedule.global_batch_tokens:
            raise RunError(
                f"[schedule] says global_batch = {schedule.global_batch} and "
                f"global_batch_tokens = {schedule.global_batch_tokens}",
                "one of the two says how large a step is",
                f"global_batch = {schedule.global_batch}",
            )
        tokens = schedule.global_batch_tokens
        if tokens and tokens % self.sequence:
            whole = max(1, round(tokens / self.sequence))
            raise RunError(
                f"schedule.global_batch_tokens = {tokens}",
                f"a batch is whole sequences of {self.sequence} tokens: "
                f"{tokens}/{self.sequence} = {tokens / self.sequence:.3f}",
                f"global_batch_tokens = {whole * self.sequence}",
            )
        ramp = schedule.ramp
        if ramp and (
            ramp.start > self.global_batch or (self.global_batch - ramp.start) % ramp.increment
        ):
            raise RunError(
                f"schedule.ramp from {ramp.start} by {ramp.increment}",
                f"it reaches the global batch of {self.global_batch} in whole increments: "
                f"({self.global_batch} - {ramp.start})/{ramp.increment} = "
                f"{(self.global_batch - ramp.start) / ramp.increment:.3f}",
                f"start = {self.global_batch % ramp.increment or ramp.increment}",
            )

    def to_toml(self, reasons: Mapping[str, str] | None = None) -> str:
        """The whole run as TOML; `reasons` become comments at their dotted names."""
        reasons = reasons or {}
        values = self.model_dump(mode="json", exclude_none=True)
        if isinstance(self.layout, Layout):
            values["layout"] = str(self.layout)
        scalars = {k: v for k, v in values.items() if not isinstance(v, dict)}
        tables = {k: v for k, v in values.items() if isinstance(v, dict)}
        document = tomlkit.document()
        _fill(document, scalars, "", reasons)
        _fill(document, tables, "", reasons)
        return tomlkit.dumps(document)


def _fill(table: Any, values: Mapping[str, Any], prefix: str, reasons: Mapping[str, str]) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            inner = tomlkit.table()
            _fill(inner, value, f"{prefix}{key}.", reasons)
            table.add(key, inner)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            array = tomlkit.aot()
            for entry in value:
                row = tomlkit.table()
                _fill(row, entry, "", {})
                array.append(row)
            table.add(key, array)
        else:
            item = tomlkit.item(value)
            if f"{prefix}{key}" in reasons:
                item.comment(f"# {reasons[f'{prefix}{key}']}")
            table.add(key, item)


def read_run(path: Path | str, overrides: Sequence[str] = ()) -> Run:
    """Read a run file and apply overrides such as `["--optimizer.lr", "3e-4"]`.

    Raises RunError for a missing file, bad TOML, unknown keys (with the closest known name) and
    impossible values; ModelError and LayoutError for their tables.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")])
        remedy = f"did you mean {str(path.parent / near[0])!r}?" if near else ""
        raise RunError(f"run file {path}", "there is no such file", remedy) from None
    except (OSError, UnicodeDecodeError) as fault:
        raise RunError(f"run file {path}", f"it cannot be read: {fault}", "") from None
    except tomllib.TOMLDecodeError as fault:
        raise RunError(
            f"run file {path}", f"it is not TOML: {fault}", 'lines such as  name = "my-run"'
        ) from None
    apply_overrides(values, overrides)
    return make_run(values, str(path))


def make_run(values: Mapping[str, Any], where: str = "run") -> Run:
    """A Run from plain values, with pydantic's complaints turned into one RunError."""
    try:
        return Run.model_validate(values)
    except ValidationError as fault:
        raise _teach(fault, where) from None


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Write `--a.b value` and `--a.b=value` pairs into nested `values`, in place.

    `none` takes an optional value away.
    """
    words = list(overrides)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or len(word) < 3:
            raise RunError(
                f"{word!r} on the command line",
                "overrides are pairs of a dotted name and a value",
                "--optimizer.lr 3e-4",
            )
        name, equals, text = word[2:].partition("=")
        if not equals:
            if not words:
                raise RunError(f"--{name} on the command line", "it has no value", f"--{name} 1")
            text = words.pop(0)
        *tables, key = name.replace("-", "_").split(".")
        target = values
        for table in tables:
            inner = target.setdefault(table, {})
            if isinstance(inner, str):  # layout = "dp2 mb4" or model = "gpt2", said shortly
                inner = _long_form(table, inner)
                target[table] = inner
            if not isinstance(inner, dict):
                raise RunError(f"--{name}", f"{table!r} is a value, not a table", f"--{table} …")
            target = inner
        rivals = RIVALS.get(".".join(tables), ())
        if key in rivals:
            for rival in rivals:
                target.pop(rival, None)
        unset = text == "none" and tables != ["layout"]  # layout.recompute has a value "none"
        target[key] = None if unset else _value_of(text)


RIVALS = {
    "budget": ("steps", "tokens", "hours"),
    "schedule": ("global_batch", "global_batch_tokens"),
}
"""Fields of which one is said: an override takes the place of the file's choice."""


def _long_form(table: str, text: str) -> dict[str, Any]:
    if table == "layout":
        return {} if text == "auto" else words_of(text)
    return {"name": text}


def _value_of(text: str) -> Any:
    """A TOML value where it is one, else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _teach(fault: ValidationError, where: str) -> RidgelineError:
    """One RunError from pydantic's list: unknown keys with the closest name, values with a rule."""
    lines = []
    remedy = ""
    for problem in fault.errors():
        # The branch of `"auto" | Layout` stands in pydantic's path, named by its validators.
        path = [str(part) for part in problem["loc"] if not re.search(r"Layout|'auto'", str(part))]
        name = ".".join(path)
        if problem["type"] == "extra_forbidden":
            known = _fields_at(path[:-1])
            lines.append(f"{name} is not a field of a run")
            remedy = remedy or nearest(path[-1], known)
        elif problem["type"] == "missing":
            lines.append(f"{name} is missing")
        elif problem["type"] == "default_factory_not_called":
            continue  # a field that is derived from one of the missing
        elif problem["type"] != "literal_error" or path != ["layout"]:
            lines.append(f"{name} = {problem['input']!r}: {problem['msg']}")
            remedy = remedy or _nearest_value(name, problem["type"], problem.get("ctx", {}))
    return RunError(where, "; ".join(lines), remedy)


def _nearest_value(name: str, kind: str, limits: Mapping[str, Any]) -> str:
    """The closest value that a complaint of pydantic's leaves; empty where none is known."""
    for limit, words in (("ge", "="), ("le", "="), ("gt", "above"), ("lt", "below")):
        if limit in limits:
            return f"{name} {words} {limits[limit]}"
    if "expected" in limits:
        return f"{name} = {limits['expected']}"
    meant = {"int_type": "a whole number", "float_type": "a number", "finite_number": "a number"}
    return f"{name} = {meant[kind]}" if kind in meant else ""


def _fields_at(path: Sequence[str]) -> list[str]:
    """Names of the fields of the table at `path` of a Run."""
    owner: type[BaseModel] = Run
    for part in path:
        if part.isdigit():
            continue
        annotation: Any = owner.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        owner = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(owner.model_fields)
