"""The run file: in and out of TOML, overridden from the command line, and refused with a lesson."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from ridgeline.errors import LayoutError, ModelError, RidgelineError, RunError
from ridgeline.layout.layout import Layout
from ridgeline.model.shape import ModelShape
from ridgeline.run import Run, apply_overrides, make_run, read_run

SHAPE = {"layers": 2, "hidden": 32, "heads": 4, "vocab": 300, "max_sequence": 64}
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
texts = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=20)
positive = st.floats(1e-12, 1e12)
fractions = st.floats(0, 1)


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, Any]:
    schedule: dict[str, Any] = {
        "shape": draw(st.sampled_from(["cosine", "linear", "wsd", "constant"])),
        "warmup_steps": draw(st.integers(0, 10**6)),
        "final_fraction": draw(fractions),
    }
    start, increment = draw(st.integers(1, 50)), draw(st.integers(1, 50))
    batch = start + increment * draw(st.integers(0, 20))
    if draw(st.booleans()):
        schedule["global_batch"] = batch
    else:
        schedule["global_batch_tokens"] = 64 * batch  # of data.sequence = 64
    if draw(st.booleans()):
        every = draw(st.integers(1, 100))
        schedule["ramp"] = {"start": start, "increment": increment, "every_steps": every}
    return schedule


models = st.one_of(
    st.sampled_from(["gpt2", "llama3.1-8b", "mixtral-8x7b", "deepseek-v3"]),
    st.just({"name": "gpt2", "layers": 3, "max_sequence": 256}),
    st.just(SHAPE),
    st.just(SHAPE | {"rope_scaling": {"factor": 4.0}, "qk_norm": True, "source": "a 'test'\n#"}),
    st.just(SHAPE | {"experts": {"count": 8, "top_k": 2, "ffn_hidden": 16}}),
)
layouts = st.sampled_from(["auto", "dp1", "dp48 tp8 pp8 v2 zero1 selective bf16", "cp-dp-pp-tp"])
corpora = st.lists(
    st.fixed_dictionaries(
        {"name": names, "sources": st.lists(texts, min_size=1, max_size=3), "weight": positive}
    ),
    max_size=3,
    unique_by=lambda corpus: corpus["name"],
)
data_tables = st.fixed_dictionaries(
    {
        "sequence": st.just(64),
        "corpora": corpora,
        "folder": texts,
        "held_out_fraction": st.floats(0.001, 0.49),
    },
    optional={"workers": st.integers(0, 64), "tokenizer": texts},
)
budgets = st.one_of(
    st.fixed_dictionaries({"steps": st.integers(1, 10**12)}),
    st.fixed_dictionaries({"tokens": st.integers(1, 10**15)}),
    st.fixed_dictionaries({"hours": positive}),
)
optimizers = st.fixed_dictionaries({"lr": positive, "beta2": st.floats(0, 0.999)})
runs = st.fixed_dictionaries(
    {
        "model": models,
        "layout": layouts,
        "schedule": schedules(),
        "budget": budgets,
        "data": data_tables,
    },
    optional={"name": names, "seed": st.integers(0, 2**62), "optimizer": optimizers},
)


@settings(max_examples=60)
@example(values={"model": SHAPE}, reason="#")
@given(values=runs, reason=texts)
def test_a_run_reads_back_from_its_toml(values: dict[str, Any], reason: str) -> None:
    run = make_run(values)
    reasons = {"layout": reason, "data.sequence": reason}
    assert make_run(tomllib.loads(run.to_toml(reasons))) == run
    assert f"# {reason}".rstrip() in run.to_toml(reasons)


def test_toml_holds_every_field_that_has_a_value() -> None:
    run = make_run({"model": SHAPE})
    text = tomllib.loads(run.to_toml())
    for section in ("model", "data", "cluster", "optimizer", "evaluation", "checkpoint", "logging"):
        owned = getattr(run, section)
        said = {name for name in type(owned).model_fields if getattr(owned, name) is not None}
        assert set(text[section]) == said


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


OVERRIDES = [
    # words on the command line, where the value lands, the value
    (["--optimizer.lr", "3e-3"], "optimizer.lr", 3e-3),
    (["--optimizer.lr=3e-3"], "optimizer.lr", 3e-3),
    (["--optimizer.weight-decay", "0"], "optimizer.weight_decay", 0.0),
    (["--seed", "7"], "seed", 7),
    (["--name", "other-2"], "name", "other-2"),
    (["--data.folder=a=b"], "data.folder", Path("a=b")),
    (["--logging.tensorboard", "false"], "logging.tensorboard", False),
    (["--data.folder", "some where/else"], "data.folder", Path("some where/else")),
    (["--layout", "dp4 mb2 bf16"], "layout", Layout(data=4, micro_batch=2, precision="bf16")),
    (["--layout.tensor", "8"], "layout", Layout(data=2, tensor=8, micro_batch=4)),
    (["--layout.order", "tp-dp-cp-pp"], "layout.order", ("tensor", "data", "context", "pipeline")),
    (["--model.layers", "3"], "model.layers", 3),
    (["--model", "llama3.1-8b"], "model.layers", 32),
    (["--seed", "1", "--seed", "2"], "seed", 2),
]


@pytest.mark.parametrize(("words", "name", "value"), OVERRIDES)
def test_an_override_takes_the_place_of_the_files_value(
    tmp_path: Path, words: list[str], name: str, value: object
) -> None:
    file = write(tmp_path / "run.toml", 'model = "gpt2"\nlayout = "dp2 mb4"\nseed = 3\n')
    found: Any = read_run(file, words)
    for part in name.split("."):
        found = getattr(found, part)
    assert found == value


def test_an_override_of_auto_starts_a_layout(tmp_path: Path) -> None:
    file = write(tmp_path / "run.toml", 'model = "gpt2"\nlayout = "auto"\n')
    assert read_run(file, ["--layout.data", "2"]).layout == Layout(data=2)
    file = write(tmp_path / "run.toml", 'model = "gpt2"\n')
    assert read_run(file, ["--layout.data", "2"]).layout == Layout(data=2)


def test_an_override_of_the_budget_or_batch_replaces_the_files_choice(tmp_path: Path) -> None:
    file = write(
        tmp_path / "run.toml",
        'model = "gpt2"\n[budget]\nsteps = 10\n[schedule]\nglobal_batch = 4\n',
    )
    assert read_run(file, ["--budget.tokens", "5000"]).budget.model_dump() == {
        "steps": None, "tokens": 5000, "hours": None,
    }  # fmt: skip
    assert read_run(file, ["--budget.hours", "1.5"]).budget.hours == 1.5
    run = read_run(file, ["--schedule.global-batch-tokens", "8192"])
    assert (run.schedule.global_batch, run.global_batch) == (None, 8)
    with pytest.raises(RunError, match=r"steps = 3 and hours = 1"):
        make_run({"model": "gpt2", "budget": {"steps": 3, "hours": 1}})


REFUSED: list[tuple[dict[str, Any], type[RidgelineError], str, str]] = [
    # what is laid over a valid run, the error, part of its text, the remedy
    ({"sede": 1}, RunError, "sede is not a field of a run", "did you mean 'seed'?"),
    ({"optimizer": {"learning_rate": 1}}, RunError, "optimizer.learning_rate is not", "known: "),
    ({"optimizer": {"lrr": 1}}, RunError, "optimizer.lrr is not a field", "did you mean 'lr'?"),
    ({"model": SHAPE | {"layer": 1}}, RunError, "model.layer is not", "did you mean 'layers'?"),
    (
        {"model": SHAPE | {"rope_scaling": {"facto": 1}}},
        RunError,
        "model.rope_scaling.facto",
        "did you mean 'factor'?",
    ),
    (
        {"data": {"corpora": [{"name": "a", "sources": ["a"], "weigth": 1}]}},
        RunError,
        "data.corpora.0.weigth",
        "did you mean 'weight'?",
    ),
    ({"layout": {"tenser": 2}}, RunError, "layout.tenser is not", "did you mean 'tensor'?"),
    (
        {"schedule": {"ramp": {"star": 1, "increment": 1, "every_steps": 1}}},
        RunError,
        "schedule.ramp.star",
        "did you mean 'start'?",
    ),
    ({"layout": "dp2 tpp4"}, LayoutError, "'tpp4'", "did you mean"),
    ({"layout": 7}, RunError, "layout", ""),
    ({"model": "gpt-9"}, ModelError, "'gpt-9'", "did you mean"),
    ({"seed": -1}, RunError, "seed = -1", "seed = 0"),
    ({"seed": 2**63}, RunError, "seed = 9223372036854775808", "seed below 9"),
    ({"seed": "many"}, RunError, "seed = 'many'", "a whole number"),
    ({"name": "../escape"}, RunError, "name = '../escape'", ""),
    ({"optimizer": {"lr": 0}}, RunError, "optimizer.lr = 0", "lr above 0"),
    ({"optimizer": {"lr": float("nan")}}, RunError, "optimizer.lr = nan", "a number"),
    ({"optimizer": {"beta1": 1.0}}, RunError, "optimizer.beta1 = 1.0", "beta1 below 1"),
    (
        {"optimizer": {"weight_decay": float("inf")}},
        RunError,
        "optimizer.weight_decay = inf",
        "a number",
    ),
    ({"data": {"held_out_fraction": 0}}, RunError, "data.held_out_fraction = 0", ""),
    ({"data": {"corpora": [{"name": "a", "sources": []}]}}, RunError, "data.corpora.0.sources", ""),
    ({"budget": {}}, RunError, "exactly one of steps, tokens, hours", "steps = 1000"),
    ({"budget": {"steps": 1, "tokens": 2}}, RunError, "steps = 1 and tokens = 2", "steps = 1000"),
    (
        {"schedule": {"global_batch": 4, "global_batch_tokens": 256}},
        RunError,
        "one of the two",
        "global_batch = 4",
    ),
    (
        {"schedule": {"global_batch_tokens": 1000}},
        RunError,
        "1000/64 = 15.625",
        "global_batch_tokens = 1024",
    ),
    (
        {"schedule": {"global_batch": 9, "ramp": {"start": 2, "increment": 4, "every_steps": 1}}},
        RunError,
        "(9 - 2)/4 = 1.750",
        "start = 1",
    ),
    (
        {"data": {"corpora": [{"name": "a", "sources": ["x"]}, {"name": "a", "sources": ["y"]}]}},
        RunError,
        "two corpora are called 'a'",
        "",
    ),
    (
        {"model": "gpt2", "data": {"sequence": 2048}},
        RunError,
        "1024 learned positions",
        "data.sequence = 1024",
    ),
]


def test_the_override_none_takes_an_optional_value_away(tmp_path: Path) -> None:
    path = write(tmp_path / "run.toml", 'model = "gpt2"\n[evaluation]\nmust_learn_nats = 1.5\n')
    words = ["--evaluation.must_learn_nats", "none", "--layout.recompute", "none"]
    run = read_run(path, words)
    assert run.evaluation.must_learn_nats is None
    assert run.layout == Layout(recompute="none")
    with pytest.raises(RunError, match="seed"):
        read_run(path, ["--seed", "none"])


@pytest.mark.parametrize(("changes", "kind", "text", "remedy"), REFUSED)
def test_what_cannot_be_is_refused_with_a_lesson(
    changes: dict[str, Any], kind: type[RidgelineError], text: str, remedy: str
) -> None:
    with pytest.raises(RidgelineError) as caught:
        make_run({"model": SHAPE} | changes)
    assert type(caught.value) is kind
    assert text in str(caught.value)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("changes", "correction"),
    [
        ({"schedule": {"global_batch_tokens": 1000}}, {"global_batch_tokens": 1024}),
        (
            {
                "schedule": {
                    "global_batch": 9,
                    "ramp": {"start": 2, "increment": 4, "every_steps": 1},
                }
            },
            {"global_batch": 9, "ramp": {"start": 1, "increment": 4, "every_steps": 1}},
        ),
    ],
)
def test_the_remedy_of_a_batch_works(changes: dict[str, Any], correction: dict[str, Any]) -> None:
    with pytest.raises(RunError):
        make_run({"model": SHAPE} | changes)
    make_run({"model": SHAPE, "schedule": correction})


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    write(tmp_path / "laptop.toml", 'model = "gpt2"')
    with pytest.raises(RunError, match="no such file") as caught:
        read_run(tmp_path / "labtop.toml")
    assert "laptop.toml" in caught.value.remedy
    with pytest.raises(RunError, match="no such file"):
        read_run(tmp_path / "nowhere" / "run.toml")
    with pytest.raises(RunError, match="cannot be read"):
        read_run(tmp_path)
    with pytest.raises(RunError, match=r"not TOML: .*line 2"):
        read_run(write(tmp_path / "bad.toml", 'model = "gpt2"\nseed = = 3'))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunError, match="cannot be read"):
        read_run(tmp_path / "binary.toml")
    with pytest.raises(RunError, match=r"model is missing"):
        read_run(write(tmp_path / "empty.toml", ""))


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["optimizer.lr", "3"], "pairs of a dotted name and a value"),
        (["--"], "pairs of a dotted name and a value"),
        (["--optimizer.lr"], "it has no value"),
        (["--seed.more", "3"], "'seed' is a value, not a table"),
    ],
)
def test_a_bad_override_is_refused(words: list[str], rule: str) -> None:
    with pytest.raises(RunError, match=rule):
        apply_overrides({"seed": 1}, words)


def tables_of(table: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Every table of a run by its dotted name: the class and those of its fields."""
    found = {"": table}
    for name, field in table.model_fields.items():
        annotations = [field.annotation, *get_args(field.annotation)]
        for inner in annotations:
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                found |= {f"{name}.{rest}": made for rest, made in tables_of(inner).items()}
    return found


def test_every_field_is_described() -> None:
    tables = tables_of(Run)
    assert {"model.", "model.rope_scaling.", "layout.", "data.corpora.", "schedule.ramp."} <= set(
        tables
    )
    for prefix, table in tables.items():
        assert (table.__doc__ or "").strip(), table
        for name, field in table.model_fields.items():
            assert len(field.description or "") > 4, f"{prefix}{name} has no docstring"


def test_a_run_is_frozen() -> None:
    run = make_run({"model": SHAPE})
    with pytest.raises(Exception, match="frozen"):
        run.seed = 3
    assert isinstance(run.model, ModelShape)
    assert run.path == Path("runs/run")
