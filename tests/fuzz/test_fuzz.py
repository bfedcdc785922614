"""Two thousand mutated inputs, and every input that once broke a reader."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from infoprune_export.errors import InfopruneError

from .mutating import MUTATORS
from .reading import READERS
from .running import Crash, died, fuzz, limits, minimised, prepared, read_regression, verdict, write_regression

REGRESSIONS = sorted((Path(__file__).parent / "regressions").glob("*.json"))
_INPUTS = 2000


@pytest.mark.parametrize("name", READERS)
def test_mutated_inputs_are_taken_or_refused_in_one_line(name):
    share = READERS[name].share / sum(reader.share for reader in READERS.values())
    result = fuzz(name, 20, range(max(10, int(_INPUTS * share))))
    assert {what: ascii(kept[0].detail[-600:]) for what, kept in result.crashes.items()} == {}
    assert result.refused


@pytest.mark.parametrize("path", REGRESSIONS, ids=lambda path: path.stem)
def test_what_once_broke_a_reader_is_taken_or_refused(path, tmp_path):
    name, data = read_regression(path)
    _, read = prepared(name, tmp_path)
    with limits():
        assert verdict(read, data, tmp_path)[0] in ("taken", "refused")


@pytest.mark.parametrize("form", MUTATORS)
def test_mutations_depend_on_the_seed_alone_and_differ(form):
    examples = [b'{"a": [1, "x"], "b": {"c": null}}']
    drawn = [[MUTATORS[form](examples, random.Random(f"{n}")) for n in range(50)] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 30


# ── The judge ────────────────────────────────────────────────────────────────


def _refuse(data: bytes) -> None:
    error = InfopruneError("x")
    error.args = (data.decode(),)
    raise error


def _loop(data: bytes) -> None:
    while True:
        pass


def _divide(data: bytes) -> float:
    return 1 / len(data)


@pytest.mark.parametrize(
    ("read", "data", "expected"),
    [
        (len, b"", "taken"),
        (_refuse, b"a.json: no key", "refused"),
        (_refuse, b"a.json:\nno key", "a message holds"),
        (_refuse, b"\x1b[31m", "a message holds"),
        (_refuse, b"x" * 2000, "a message of"),
        (_refuse, b" ", "an empty message"),
        (_divide, b"", "ZeroDivisionError"),
        (lambda data: bytearray(2**40), b"", "MemoryError"),
    ],
)
def test_the_judge_knows_what_is_wrong(read, data, expected, tmp_path):
    with limits():
        assert verdict(read, data, tmp_path)[0].startswith(expected)


def test_the_judge_ends_what_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr("fuzz.running.SECONDS", 0.05)
    with limits():
        assert verdict(_loop, b"", tmp_path)[0].startswith("hang")


def test_a_crash_is_made_smaller_and_kept(tmp_path, monkeypatch):
    def prepare(folder):
        return [b"fine"], lambda data: 1 / (b"!" not in data)

    monkeypatch.setitem(READERS, "broken", type(READERS["set"])("text", 1, prepare))
    crash = Crash("broken", "ZeroDivisionError in ?", "", b"a long text! with more behind", 7, 3)
    assert minimised(crash) == b"!"
    path = write_regression(crash, tmp_path)
    assert read_regression(path) == ("broken", b"!")


def test_a_process_that_goes_well_alone_did_not_die_of_its_input(tmp_path):
    (tmp_path / "at-work").write_bytes((5).to_bytes(8, "little"))
    assert died("set", 1, tmp_path / "at-work") is None
