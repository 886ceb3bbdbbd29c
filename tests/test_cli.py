"""The command: help that fits a screen, and bad input as one clear error with nothing left over."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

import ridgeline
from ridgeline import cli
from ridgeline.run import Data, Run

MakeRun = Callable[..., Run]
Type = Callable[[str], tuple[int, str, str]]


@pytest.fixture
def type_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Type:
    """Run a command line in tmp_path: (exit status, standard output, standard error).

    Anything but an exit, such as a traceback, fails the test.
    """

    def typed(words: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["ridgeline", *shlex.split(words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return typed


def every_verb(group: click.Group, prefix: str = "") -> list[str]:
    """The words of every verb, groups included."""
    found = []
    for name, command in group.commands.items():
        found.append(f"{prefix}{name}")
        if isinstance(command, click.Group):
            found += every_verb(command, f"{prefix}{name} ")
    return found


def test_the_verbs_are_these() -> None:
    assert sorted(every_verb(cli.verbs)) == [
        "audit", "cost", "data", "data prepare", "machines", "models", "parity", "pipeline", "plan",
        "probe", "rehearse", "report", "sample", "train", "validate", "version",
    ]  # fmt: skip


@pytest.mark.parametrize("verb", ["", *every_verb(cli.verbs)])
def test_help_fits_a_screen_and_shows_an_example(
    verb: str, type_command: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    status, said, _ = type_command(f"{verb} --help")
    assert status == 0
    lines = said.rstrip().splitlines()
    assert len(lines) <= 40  # a terminal of a laptop's full height
    assert max(map(len, lines)) <= 100
    example = lines.index("  Example:")
    assert lines[example + 1].startswith(f"    ridgeline {verb}".rstrip())


def test_help_imports_no_torch_and_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['ridgeline', '--help']\n"
        "import atexit, ridgeline.cli as cli\n"
        "heavy = {'torch', 'numpy', 'tokenizers', 'pydantic', 'rich'}\n"
        "atexit.register(lambda: print('LOADED', heavy & set(sys.modules)))\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage: ridgeline" in done.stdout
    assert done.stdout.splitlines()[-1] == "LOADED set()"


def test_version_names_what_a_bug_report_needs(type_command: Type) -> None:
    status, said, _ = type_command("version")
    assert status == 0
    named = [line.split()[0] for line in said.splitlines()]
    assert {"ridgeline", "torch", "python", "platform"} <= set(named)


def test_models_are_listed_and_described(type_command: Type) -> None:
    status, said, _ = type_command("models")
    assert status == 0
    assert "llama3.1-8b" in said
    status, said, _ = type_command("models gpt2")
    assert status == 0
    assert "50,257" in said or "50257" in said


@pytest.fixture
def folder(tmp_path: Path, tiny_run: MakeRun, prepared: Data) -> Path:
    """tmp_path with a good run file, prepared data to spoil, and a run folder of another seed."""
    shutil.copytree(prepared.folder, tmp_path / "prepared")
    values = {"folder": "runs", "data": {"folder": "prepared"}}
    (tmp_path / "run.toml").write_text(tiny_run(**values).to_toml())
    other = tiny_run(**values, name="other", seed=5)
    (tmp_path / "runs" / "other").mkdir(parents=True)
    (tmp_path / "runs" / "other" / "run.toml").write_text(other.to_toml())
    (tmp_path / "bad.toml").write_text('name = "x"\nmodel = = "gpt2"\n')
    (tmp_path / "nothing").mkdir()
    (tmp_path / "empty.toml").write_text(
        'model = "gpt2"\n[[data.corpora]]\nname = "void"\nsources = ["nothing"]\n'
    )
    return tmp_path


BAD_INPUT = {
    # what is typed: what the error says
    "train nowhere.toml": "there is no such file",
    "train bad.toml": "it is not TOML",
    "train nothing": "run.toml",
    "train run.toml --optimizer.learning_rate 1": "optimizer.learning_rate is not a field of a run",
    "train run.toml --optimizer.lr fast": "optimizer.lr = 'fast'",
    "train run.toml --optimizer.lr": "it has no value",
    "train run.toml seed 3": "overrides are pairs",
    "train run.toml --model gpt-2-xxl": "none of that name",
    "train run.toml --data.folder unprepared": "manifest.json",
    "train run.toml --schedule.global_batch 100000": "100,000 samples (one global batch)",
    "train run.toml --model.vocab 300": "320 > 300",
    "train run.toml --layout 'dp3 mb1 fp32'": "dp·mb divides the global batch",
    "train run.toml --layout 'dp2 fp32' --cluster.devices 3": "2·1·1·1 = 2, not 3",
    "train run.toml --layout 'dp2 tp2 fp8'": "8 bits are not divided by tensor",
    "train run.toml --layout 'pp2 zbh1 compile fp32'": "cannot do inside compiled blocks",
    "train run.toml --layout 'dp2 tpp2'": "a layout is words such as",
    "train run.toml --layout dp1024 --schedule.global_batch 1024": "needs 1024 devices",
    "train run.toml --cluster.device H100": "it is not in the catalogue",
    "train run.toml --budget.steps 0": "budget.steps = 0",
    "train run.toml --data.sequence 100000": "more need",
    "train run.toml --data.sequence 2500 --schedule.global_batch 4": "are held out",
    "train run.toml --model.heads 5": "5",
    "train run.toml --model.experts '{count = 4, top_k = 2, ffn_hidden = 30}'": "30 = 32 - 2",
    "train run.toml --name other": "seed: 5 there, 1 here",
    "data prepare empty.toml": "it names no file",
    "data prepare run.toml --data.corpora '[]'": "without corpora",
    "sample runs/other": "no checkpoint yet",
    "sample nothing": "run.toml",
    "report nothing": "nothing",
    "audit nothing": "metrics.jsonl, which a run writes before its first step, is missing",
    "audit nowhere": "there is no such folder",
    "audit runs/other": "ridgeline train",
    "models gpt-2-xxl": "none of that name",
}


@pytest.mark.parametrize("words", BAD_INPUT)
def test_bad_input_is_one_error_and_leaves_nothing_behind(
    words: str, folder: Path, type_command: Type
) -> None:
    before = sorted(folder.rglob("*"))
    status, _, error = type_command(words)
    assert status == 2
    assert error.startswith("error: ")
    assert BAD_INPUT[words] in error
    assert "Traceback" not in error
    assert "\n  rule: " in error
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_a_truncated_shard_is_refused(folder: Path, type_command: Type, ending: str) -> None:
    shard = next((folder / "prepared").glob(f"code.train*{ending}"))
    shard.write_bytes(shard.read_bytes()[:-10])
    before = sorted(folder.rglob("*"))
    status, _, error = type_command("train run.toml")
    assert status == 2
    assert shard.name.removesuffix(ending) in error
    assert sorted(folder.rglob("*")) == before


def test_a_damaged_checkpoint_is_passed_over_or_the_run_ends(
    folder: Path, type_command: Type
) -> None:
    assert type_command("train run.toml --checkpoint.every_steps 2 --checkpoint.keep 9")[0] == 0
    checkpoints = folder / "runs" / "tiny" / "checkpoints"

    def damage() -> None:
        file = max(checkpoints.glob("step-*")) / "ranks-000/rank-00000.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    damage()
    status, said, error = type_command("train runs/tiny")
    assert status == 0, error
    assert "checkpoint damaged: checkpoint" in said
    assert "checksum" in said
    assert "resumed at step 2" in said
    assert [path.name for path in checkpoints.glob("damaged-*")] == ["damaged-step-00000004"]
    damage()
    shutil.rmtree(checkpoints / "step-00000002")
    before = sorted(folder.rglob("*"))
    status, _, error = type_command("train runs/tiny")
    assert status == 2
    assert "all of its 1 checkpoints are damaged" in error
    assert sorted(folder.rglob("*")) == before


def test_the_exit_status_reaches_the_shell(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ridgeline", "train", "nowhere.toml"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "error: run file nowhere.toml"
    assert done.stdout == ""


def test_a_run_that_did_not_learn_exits_with_1_and_keeps_everything(
    folder: Path, type_command: Type
) -> None:
    status, said, error = type_command("train run.toml --evaluation.must_learn_nats 50")
    assert status == 1
    assert "at least that far below the unigram entropy" in error
    assert "report: runs/tiny/report.html" in said
    assert (folder / "runs" / "tiny" / "report.html").exists()


def test_train_resume_sample_and_report_are_one_story(folder: Path, type_command: Type) -> None:
    status, said, _ = type_command("train run.toml --schedule.shape constant")
    assert status == 0
    assert "step 4/4  loss" in said
    run = folder / "runs" / "tiny"
    assert {path.name for path in run.iterdir()} == {
        "run.toml", "environment.json", "metrics.jsonl", "checkpoints", "ledgers", "report.html",
    }  # fmt: skip
    status, said, _ = type_command("train runs/tiny --budget.steps 6")
    assert status == 0
    assert "resumed at step 4: weights, optimizer, random state; next sample 32" in said
    assert (run / "run.2.toml").exists()
    status, said, _ = type_command("sample runs/tiny --prompt 'the ridge' --tokens 5")
    assert status == 0
    assert said.startswith("the ridge")
    assert (run / "sample.txt").read_text() == said
    status, said, _ = type_command("report runs/tiny")
    assert (status, said) == (0, "report: runs/tiny/report.html\n")
    status, said, _ = type_command("audit runs/tiny")
    assert status == 0
    assert "ridgeline probe" in said  # nobody measured this machine, so nobody planned for it
    assert "goodput" in said
    status, said, _ = type_command("audit runs/tiny --json")
    assert status == 0
    assert json.loads(said)["step"] == 6
    status, _, error = type_command("audit runs/tiny runs/other")
    assert status == 2
    assert "--calibrate" in error


def test_a_sample_is_a_function_of_its_seed(tiny_run: MakeRun) -> None:
    run = tiny_run()
    ridgeline.train(run)

    def drawn(**options: Any) -> str:
        return ridgeline.sample(run.path, "a tensor", tokens=12, **options)

    assert drawn(seed=1, temperature=2.0) == drawn(seed=1, temperature=2.0)
    assert len({drawn(seed=seed, temperature=2.0) for seed in range(4)}) > 1
    assert drawn(temperature=0.0) == drawn(top_k=1, seed=9) == drawn(temperature=0.0, seed=5)
    json.dumps(drawn())
