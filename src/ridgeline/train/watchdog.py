"""Heartbeats of all ranks through the store behind the process group, and the end of a hang.

Two threads beside the one that trains, which is never asked anything: one talks to the store, the
other looks at the clock, so that a store which does not answer is noticed too.
"""

from __future__ import annotations

import faulthandler
import json
import linecache
import math
import multiprocessing
import os
import signal
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from ridgeline.errors import HangError, RidgelineError
from ridgeline.launch.local import LAST_WORDS_S, error_of, leave_word, record_of
from ridgeline.processes import parent_of
from ridgeline.run import Run
from ridgeline.torch_compat import HashStore, TCPStore
from ridgeline.torch_compat_faults import (
    PrefixStore,
    Store,
    calls_started,
    flight_record,
    ranks_of,
)
from ridgeline.train.folder import write_atomically
from ridgeline.train.late import Answer, Heartbeat, Pending, verdict
from ridgeline.train.measured import BETWEEN

BEAT_S = 1.0
SILENT_S = 3.0
"""A rank that is asked and says nothing for so long does not run: it is stopped, its node is gone,
or native code holds its interpreter."""
COMPLAINT_S = 2.5
"""How long a rank that lost its connections waits to hear of another rank's own error."""
GRACE_S = 5.0
"""How long a rank goes on after another's error: to meet it itself, or to be ended."""
OURS = str(Path(__file__).parents[1])
LIBRARIES = ("<", *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))
AXES = {"replicate": "data", "shard": "data", "expert_replicate": "data", "default_pg": "all ranks"}


class Watchdog:
    """One rank's: its heartbeat, and when a step or phase takes too long, its part in the end."""

    def __init__(self, run: Run) -> None:
        self.limit_s = run.faults.step_limit_s or math.inf
        self.stacks = run.path / "stacks"
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.holds_store = self.rank == 0 and self.world > 1 and not agents
        """Whether it ends with this process, which then waits until the others have read it."""
        self.main = threading.get_ident()
        self.where: Callable[[], tuple[int, str]] = lambda: (0, "start")
        """Steps done, and the phase that runs."""
        self.seen: dict[int, tuple[bytes, float]] = {}
        """The last heartbeat of each rank that this one looks at, and when it was new."""
        self.answered_s = time.monotonic()
        """When the store did last."""
        self.overdue = self.told = self.waited = False
        self.word: dict[str, Any] | None = None
        """The first error of any rank."""
        self.mine: dict[str, Any] | None = None
        self.over = threading.Event()
        self.wake = threading.Event()
        loops = (self._talk, self._time)
        self.threads = [threading.Thread(target=loop, daemon=True) for loop in loops]

    def host_of(self, rank: int) -> str:
        """By its last heartbeat; known on rank 0."""
        return Heartbeat.read(self.seen[rank][0]).host if rank in self.seen else ""

    def start(self) -> None:
        """Begin; `where` may change from now on."""
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """End both threads: one within the store when Python ends would take the process down."""
        self.over.set()
        self.wake.set()
        for thread in self.threads:
            thread.join(SILENT_S)
        self.where = lambda: (0, "end")  # lets go of the job

    def first_error(self, error: Exception) -> RidgelineError | None:
        """What another rank died of before `error` was raised here; None: this is the first.

        A broken connection is a complaint of somebody else's death, so it waits for his word.
        """
        complaint = isinstance(error, RuntimeError) and not isinstance(error, RidgelineError)
        end = time.monotonic() + (COMPLAINT_S if complaint else 0.0)
        while self.word is None and time.monotonic() < end:
            time.sleep(0.1)
        if self.word is None:
            self.mine = record_of(error)
            self.wake.set()
            end = time.monotonic() + COMPLAINT_S
            while self.word is None and time.monotonic() < end:
                time.sleep(0.02)
            if self.holds_store:
                time.sleep(LAST_WORDS_S + BEAT_S)
        if self.word is None or self.word["rank"] == self.rank:
            return None
        return _anothers(self.word)

    # The thread that looks at the clock

    def _time(self) -> None:
        state, since, last = self._state(), time.monotonic(), time.monotonic()
        while not self.over.wait(BEAT_S / 2):
            now = time.monotonic()
            if now - last > SILENT_S:  # this process was stopped: that is not the step's time
                since += now - last
            last = now
            if (new := self._state()) != state:
                state, since = new, now
            if now - since > self.limit_s and not self.overdue:
                self.overdue = True
                self.wake.set()
            if self.overdue and now - self.answered_s > 2 * SILENT_S and not self.told:
                self.told = True
                self._dump()
                error = self._judge({rank: Answer((), {}) for rank in range(1, self.world)})
                _say(error)  # rank 0, on whose node the store is, does not answer
                self._end(error, silent=(0,))

    def _state(self) -> tuple[int, str]:
        """What the limit is of: one step, or one phase beside the steps."""
        step, phase = self.where()
        return step, phase if phase in BETWEEN or not step else ""

    # The thread that talks to the store

    def _talk(self) -> None:
        store: Store | None = None
        while not self.over.is_set():
            try:
                store = store or self._store()
                self._beat(store)
                self.answered_s = time.monotonic()
            except RuntimeError:
                store = None  # gone with rank 0, or not there yet
            self.wake.wait(0 if self.over.is_set() else BEAT_S)
            self.wake.clear()

    def _store(self) -> Store:
        """A connection of its own: the process group's may be in use while the group waits."""
        if "MASTER_ADDR" not in os.environ or self.world == 1:
            return HashStore()
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = timedelta(seconds=10)
        store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=patience)
        return PrefixStore("watchdog", store)

    def _beat(self, store: Store) -> None:
        store.set(f"beat/{self.rank}", self._heartbeat().to_json())
        self._look(store, range(self.world) if self.rank == 0 else (0,))
        if self.mine is not None:
            store.compare_set("word", "", json.dumps(self.mine))
        if self.word is None and store.check(["word"]):
            self.word = json.loads(store.get("word"))
            if self.word["rank"] != self.rank:
                self._heard(self.word)
        if self.overdue and self.word is None:
            store.set("alarm", str(self.rank))
        if self.word is None and store.check(["alarm"]):
            self._settle(store)

    def _look(self, store: Store, ranks: Iterable[int]) -> None:
        """Note which heartbeats are new, by this process's own clock: hosts' clocks differ."""
        there = [rank for rank in ranks if rank in self.seen or store.check([f"beat/{rank}"])]
        beats = store.multi_get([f"beat/{rank}" for rank in there]) if there else []
        for rank, beat in zip(there, beats, strict=True):
            if rank not in self.seen or self.seen[rank][0] != beat:
                self.seen[rank] = beat, time.monotonic()

    def _heard(self, word: dict[str, Any]) -> None:
        """Another rank died of an error: end, unless the thread that trains does so by itself."""
        end = time.monotonic() + (0.0 if word["kind"] == HangError.__name__ else GRACE_S)
        while time.monotonic() < end:
            if self.over.is_set():
                return
            time.sleep(0.1)
        if word["kind"] != HangError.__name__:
            _say(_anothers(word))
        self._end(error_of(word), word.get("silent", ()))

    def _settle(self, store: Store) -> None:
        """Tell what this rank waits for; rank 0, or one in its place, says who is late."""
        if not self.told:
            self.told = True
            self._dump()
            store.set(f"told/{self.rank}", self._answer().to_json())
        chosen = self._ages().get(0, math.inf) > SILENT_S and store.add("judges", 1) == 1
        if self.rank == 0 or chosen or self.waited:
            self._look(store, range(self.world))
            alive = [rank for rank, age in self._ages().items() if age < SILENT_S]
            end = time.monotonic() + SILENT_S - BEAT_S / 2
            while not store.check([f"told/{rank}" for rank in alive]) and time.monotonic() < end:
                time.sleep(0.1)
            told = {
                rank: Answer.read(store.get(f"told/{rank}"))
                for rank in range(self.world)
                if store.check([f"told/{rank}"])
            }
            error = self._judge(told)
            write_atomically(self.stacks / "verdict.txt", f"{error}\n")
            _say(error)
            silent = [rank for rank in range(self.world) if rank not in told]
            store.compare_set("word", "", json.dumps(record_of(error) | {"silent": silent}))
            if self.holds_store:
                time.sleep(LAST_WORDS_S + BEAT_S)
            self._end(error, silent)
        self.waited = True  # in vain, if this raises
        store.wait(["word"], timedelta(seconds=2 * SILENT_S))
        self._heard(json.loads(store.get("word")))

    # What they say

    def _heartbeat(self) -> Heartbeat:
        step, phase = self.where()
        inner, line = self._lines()
        return Heartbeat(
            rank=self.rank,
            host=socket.gethostname(),
            process=os.getpid(),
            step=step,
            phase=phase or "no phase",
            line=_place(line),
            inside="" if inner is line else _place(inner),
            calls=calls_started(),
            monotonic_s=time.monotonic(),
        )

    def _lines(self) -> tuple[FrameType, FrameType]:
        """Where the thread that trains is: innermost of all, and of ours or the user's."""
        inner = frame = sys._current_frames()[self.main]
        while frame.f_back is not None:
            file = frame.f_code.co_filename
            if file.startswith(OURS) or not file.startswith(LIBRARIES):
                return inner, frame
            frame = frame.f_back
        return inner, inner

    def _answer(self) -> Answer:
        """The calls this rank is in, by PyTorch's flight recorder.

        It does not know of sends and receives on gloo: a rank that stands in a wait, and in no call
        that it knows, waits for some other rank.
        """
        reached: dict[str, int] = {}
        pending = []
        for entry in flight_record():
            if entry["is_p2p"]:
                continue
            (group, axis), number = entry["process_group"], entry["collective_seq_id"]
            reached[group] = max(number, reached.get(group, 0))
            if not entry["retired"] and entry["state"] != "completed":
                axis = axis.removeprefix("mesh_")
                what = f"{entry['profiling_name']} over {AXES.get(axis, axis)}, its call {number:,}"
                pending.append(Pending(group, number, what, tuple(ranks_of(group))))
        inner, line = self._lines()
        text = linecache.getline(inner.f_code.co_filename, inner.f_lineno)
        if not pending and ".wait(" in text:
            what = f"a send or receive at {_place(line)}"
            pending.append(Pending("", 1, what, tuple(range(self.world))))
        return Answer(tuple(pending), reached)

    def _ages(self) -> dict[int, float]:
        """Seconds since each heartbeat that is known; on this host, by the clock they share."""
        now, ages, here = time.monotonic(), {}, socket.gethostname()
        for rank, (text, at) in self.seen.items():
            beat = Heartbeat.read(text)
            ages[rank] = now - (beat.monotonic_s if beat.host == here else at)
        return ages

    def _judge(self, told: dict[int, Answer]) -> HangError:
        beats = {rank: Heartbeat.read(text) for rank, (text, _) in self.seen.items()}
        return verdict(told, beats, self._ages(), self.world, self.limit_s, self.stacks)

    def _dump(self) -> None:
        """Stacks of all threads, and the last collective calls, into the run's folder."""
        self.stacks.mkdir(parents=True, exist_ok=True)
        with (self.stacks / f"rank-{self.rank}.txt").open("w") as file:
            faulthandler.dump_traceback(file)
        calls = "".join(json.dumps(entry) + "\n" for entry in flight_record())
        (self.stacks / f"calls-{self.rank}.jsonl").write_text(calls, encoding="utf-8")

    def _end(self, error: RidgelineError, silent: Iterable[int] = ()) -> None:
        """End this process, and with it `silent` ranks beside it, which take no other signal."""
        if "RANK" in os.environ:
            leave_word(error)
        for beat in (Heartbeat.read(self.seen[rank][0]) for rank in silent if rank in self.seen):
            if beat.host == socket.gethostname() and parent_of(beat.process) == os.getppid():
                with suppress(ProcessLookupError):
                    os.kill(beat.process, signal.SIGKILL)
        os._exit(error.exit_status)


def _anothers(word: dict[str, Any]) -> RidgelineError:
    """An error of another rank, as this one tells it."""
    error = error_of(word)
    return type(error)(f"rank {word['rank']} failed first: {error.asked}", error.rule, error.remedy)


def _say(error: RidgelineError) -> None:
    """As the command says it, where no parent will."""
    if multiprocessing.parent_process() is None:
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()


def _place(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno} {frame.f_code.co_name}"


@contextmanager
def watched(run: Run) -> Iterator[Watchdog]:
    """Heartbeats of this rank meanwhile.

    When another rank's error was the cause of one that is raised here, that one is raised instead.
    """
    watchdog = Watchdog(run)
    watchdog.start()
    try:
        yield watchdog
    except Exception as error:
        first = watchdog.first_error(error) if watchdog.world > 1 else None
        if first is None:
            raise
        raise first from error
    finally:
        watchdog.stop()
