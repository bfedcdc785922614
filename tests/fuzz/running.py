"""Reads mutated inputs one by one: each is taken, or refused in one line, within its time and memory.

Input number n of a reader depends on the seed, the reader and n alone, so that any crash can be made again.
"""

from __future__ import annotations

import base64
import contextlib
import json
import mmap
import multiprocessing
import random
import re
import resource
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from infoprune_export.errors import InfopruneError

from .mutating import MUTATORS
from .reading import READERS, Read

SECONDS = 2.0
"""Of one input, in processor time of this process: other work on the machine does not count."""
MEMORY = 2 * 2**30
"""Address space that a process may take beyond what it has when it begins."""
LONGEST_LINE = 1500
_KEPT_CRASHES = 5
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Hang(BaseException):
    """The time of an input is over."""


@dataclass
class Crash:
    """An input that is neither taken nor refused as it should be."""

    reader: str
    what: str
    """Kind and place; crashes with the same are one."""
    detail: str
    data: bytes
    seed: int
    number: int


@dataclass
class Outcome:
    """What became of a reader's inputs."""

    reader: str
    inputs: int = 0
    taken: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    messages: Counter[str] = field(default_factory=Counter)
    """Refusals by their wording without values."""
    crashes: dict[str, list[Crash]] = field(default_factory=dict)

    def add(self, other: Outcome) -> None:
        self.inputs += other.inputs
        self.taken += other.taken
        self.refused += other.refused
        self.seconds += other.seconds
        self.slowest = max(self.slowest, other.slowest)
        self.messages += other.messages
        for what, crashes in other.crashes.items():
            self.crashes.setdefault(what, []).extend(crashes)

    @property
    def crashed(self) -> int:
        return self.inputs - self.taken - self.refused


# ── One input ────────────────────────────────────────────────────────────────


def verdict(read: Read, data: bytes, folder: Path) -> tuple[str, str]:
    """``taken``, ``refused`` with the message's wording, or what is wrong with its traceback."""
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    # What is stuck in C never comes to the handler; this timer has none and ends the process.
    signal.setitimer(signal.ITIMER_PROF, 5 * SECONDS)
    try:
        read(data)
        return "taken", ""
    except InfopruneError as error:
        return _judged(str(error), folder)
    except Hang:
        return f"hang in {_place(traceback.format_exc())}", traceback.format_exc()
    except Exception as error:
        text = traceback.format_exc()
        return f"{type(error).__name__} in {_place(text)}", text
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)


def _judged(message: str, folder: Path) -> tuple[str, str]:
    wording = _wording(message.replace(str(folder), "FOLDER"))
    if found := _CONTROL.search(message):
        return f"a message holds {found.group()!a}: {wording[:60]}", message
    if len(message) > LONGEST_LINE:
        return f"a message of {len(message) // 1000} thousand characters: {wording[:60]}", message
    if not message.strip():
        return "an empty message", message
    return "refused", wording


def _wording(message: str) -> str:
    """A message without what it quotes, so that messages of one kind are counted together."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "_", re.sub(r" = .*?: ", " = _: ", message))[:160]


def _place(text: str) -> str:
    """The last line of the package in a traceback."""
    lines = re.findall(r'File ".*?(infoprune_export/[^"]+|tests/fuzz/reading\.py)", line \d+, in (\S+)', text)
    return ":".join(lines[-1]) if lines else "?"


# ── Many inputs ──────────────────────────────────────────────────────────────


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Time per input by signal, and memory by limit, for this process."""

    def over(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGVTALRM, over)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, before)


def prepared(name: str, folder: Path) -> tuple[list[bytes], Read]:
    """A reader's examples and its function, checked: every example must be taken."""
    examples, read = READERS[name].prepare(folder)
    for example in examples:
        read(example)
    return list(examples), read


def mutated(name: str, examples: Sequence[bytes], seed: int, number: int) -> bytes:
    """Input `number` of a reader."""
    return MUTATORS[READERS[name].form](examples, random.Random(f"{seed}/{name}/{number}"))


def fuzz(name: str, seed: int, numbers: range, progress: Path | None = None) -> Outcome:
    """Read the inputs of these numbers; `progress`, a file of 8 bytes, always holds the one at work."""
    result = Outcome(name)
    at_work = Counting(progress)
    with tempfile.TemporaryDirectory(dir=_scratch()) as scratch:
        folder = Path(scratch)
        examples, read = prepared(name, folder)
        with limits():
            began = time.perf_counter()
            for number in numbers:
                data = mutated(name, examples, seed, number)
                at_work.set(number)
                started = time.process_time()
                what, detail = verdict(read, data, folder)
                result.slowest = max(result.slowest, time.process_time() - started)
                result.inputs += 1
                if what == "taken":
                    result.taken += 1
                elif what == "refused":
                    result.refused += 1
                    result.messages[detail] += 1
                else:
                    kept = result.crashes.setdefault(what, [])
                    if len(kept) < _KEPT_CRASHES:
                        kept.append(Crash(name, what, detail, data, seed, number))
            result.seconds = time.perf_counter() - began
    return result


class Counting:
    """A number in a file that outlives the process, at the price of a copy in memory."""

    def __init__(self, path: Path | None) -> None:
        self._bytes: mmap.mmap | None = None
        if path is not None:
            path.write_bytes(bytes(8))
            with path.open("r+b") as file:
                self._bytes = mmap.mmap(file.fileno(), 8)

    def set(self, number: int) -> None:
        if self._bytes is not None:
            self._bytes[:] = number.to_bytes(8, "little")


def died(name: str, seed: int, progress: Path) -> Crash | None:
    """The input on which a process ended: stuck in C for ten seconds, or out of stack; None if it goes well alone."""
    number = int.from_bytes(progress.read_bytes(), "little")
    again = multiprocessing.get_context("spawn").Process(target=fuzz, args=(name, seed, range(number, number + 1)))
    again.start()
    again.join()
    if again.exitcode == 0:
        return None
    with tempfile.TemporaryDirectory(dir=_scratch()) as scratch:
        examples, _ = READERS[name].prepare(Path(scratch))
    return Crash(name, "process died", f"input {number}", mutated(name, examples, seed, number), seed, number)


def _scratch() -> str | None:
    """Files in memory where there are some: a million of them are written."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


# ── Crashes ──────────────────────────────────────────────────────────────────


def minimised(crash: Crash, tries: int = 400) -> bytes:
    """The crash's input with everything taken out that it does not need."""
    best = crash.data
    with tempfile.TemporaryDirectory(dir=_scratch()) as scratch:
        folder = Path(scratch)
        _, read = prepared(crash.reader, folder)
        with limits():
            size = max(1, len(best) // 2)
            while size and tries:
                place = 0
                while place < len(best) and tries:
                    shorter = best[:place] + best[place + size :]
                    tries -= 1
                    if verdict(read, shorter, folder)[0] == crash.what:
                        best = shorter
                    else:
                        place += size
                size //= 2
    return best


def write_regression(crash: Crash, folder: Path) -> Path:
    """Keep a minimised crash; the default tests read it from then on."""
    # A second death would be this process's.
    data = crash.data if crash.what == "process died" else minimised(crash)
    name = re.sub(r"[^A-Za-z0-9]+", "-", crash.what).strip("-")[:80]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{crash.reader}-{name}.json"
    tree = {
        "reader": crash.reader,
        "seed": crash.seed,
        "number": crash.number,
        "was": crash.what,
        "input": base64.b64encode(data).decode(),
    }
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    return path


def read_regression(path: Path) -> tuple[str, bytes]:
    tree = json.loads(path.read_text(encoding="utf-8"))
    return tree["reader"], base64.b64decode(tree["input"])
