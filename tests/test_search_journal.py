"""A search that is killed, at whatever moment, goes on where it was: nothing is evaluated twice, the end is the same."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from searching import chain_space, fit, jiggle
from test_rules import one_thread
from torch import nn

from graphprune.errors import ConfigError
from graphprune.search import Episodes, Found, Schedule, Space, Trials, amc, annealing, netadapt, sensitivity

PROGRAM = """
import os, signal, sys
from pathlib import Path

import torch
from searching import chain_space, fit, jiggle
from graphprune.search import Trials, netadapt

torch.set_num_threads(1)
journal, log, last, moment = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def evaluate(model):
    if moment == "evaluating" and len(log.read_text().split()) == last:
        die()
    score = fit(model)
    with log.open("a") as file:
        file.write(f"{score} ")
    return score

def finetune(model):
    jiggle(model)
    if moment == "training" and len(log.read_text().split()) == last:
        die()

if moment == "writing":  # half of a line
    from graphprune.search.journal import Journal
    whole = Journal._append
    def torn(self, line):
        if "score" in line and len(log.read_text().split()) == last:
            with self.path.open("ab") as file:
                file.write(b'{"key": "0123')
                file.flush()
            die()
        whole(self, line)
    Journal._append = torn

found = netadapt(Trials(chain_space(6, 8), evaluate, journal=journal), 0.6, step=0.2, finetune=finetune)
print(repr(found.score))
"""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def space() -> Space:
    return chain_space(6, 8)


class Counting:
    """An evaluator that remembers how often it was asked, and stops the search at one of the calls.

    Both are nothing that its score depends on, and kept where a journal does not look.
    """

    def __init__(self, stop: int | None = None) -> None:
        self._own = SimpleNamespace(calls=0, stop=stop)

    @property
    def calls(self) -> int:
        return self._own.calls

    def __call__(self, model: nn.Module) -> float:
        if self._own.calls == self._own.stop:
            raise KeyboardInterrupt
        self._own.calls += 1
        return fit(model)


SEARCHES = {
    "netadapt": lambda trials: netadapt(trials, 0.6, step=0.2, finetune=jiggle),
    "annealing": lambda trials: annealing(trials, 0.4, schedule=Schedule(cool=0.7, tries=2, batch=2)),
    "amc": lambda trials: amc(trials, 0.6, round_to=1, episodes=Episodes(6, 2)),
}


def same(one: Found, other: Found) -> bool:
    tensors = zip(one.result.model.state_dict().values(), other.result.model.state_dict().values(), strict=True)
    return one.history == other.history and one.shares == other.shares and all(torch.equal(a, b) for a, b in tensors)


@pytest.mark.parametrize("search", SEARCHES)
def test_a_stopped_search_goes_on(space: Space, tmp_path: Path, search: str) -> None:
    run = SEARCHES[search]
    whole = Counting()
    expected = run(Trials(space, whole))
    assert whole.calls >= 3
    for stop in sorted({0, whole.calls // 2, whole.calls - 1}):
        journal = tmp_path / f"{stop}.jsonl"
        first, second = Counting(stop), Counting()
        with pytest.raises(KeyboardInterrupt):
            run(Trials(space, first, journal=journal))
        assert same(run(Trials(space, second, journal=journal)), expected)
        assert first.calls + second.calls == whole.calls
    third = Counting(0)
    assert same(run(Trials(space, third, journal=journal)), expected) and third.calls == 0


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["evaluating", "training", "writing"])
def test_a_killed_search_goes_on(space: Space, tmp_path: Path, moment: str) -> None:
    whole = Counting()
    expected = netadapt(Trials(space, whole), 0.6, step=0.2, finetune=jiggle)
    program, journal, log = tmp_path / "program.py", tmp_path / "journal.jsonl", tmp_path / "calls"
    program.write_text(PROGRAM)
    log.touch()
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    for last in (1, whole.calls - 1, -1) if moment == "writing" else (0, 1, whole.calls - 1, -1):
        words = [sys.executable, "-W", "ignore", str(program), str(journal), str(log), str(last), moment]
        done = subprocess.run(
            words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False
        )
        assert done.returncode == (0 if last < 0 else -signal.SIGKILL), done.stderr
    calls = [float(score) for score in log.read_text().split()]
    again = 0 if moment != "writing" else 2  # there an evaluation was done whose score was never written whole
    assert len(calls) == whole.calls + again
    assert float(done.stdout) == expected.score


def test_a_torn_line_does_not_count(space: Space, tmp_path: Path) -> None:
    run = SEARCHES["netadapt"]
    journal = tmp_path / "journal.jsonl"
    expected = run(Trials(space, Counting(), journal=journal))
    whole = journal.read_bytes()
    ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]
    for cut in (1, ends[0], ends[1] - 3, ends[2] + 5, len(whole) - 1):
        journal.write_bytes(whole[:cut])
        again = Counting()
        assert same(run(Trials(space, again, journal=journal)), expected)
        assert again.calls == len(ends) - 1 - max(whole[:cut].count(b"\n") - 1, 0)
        assert sorted(journal.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_lost_weights_are_trained_again(space: Space, tmp_path: Path) -> None:
    run = SEARCHES["netadapt"]
    journal = tmp_path / "journal.jsonl"
    expected = run(Trials(space, Counting(), journal=journal))
    kept = sorted(tmp_path.glob("journal.jsonl.*.safetensors"))
    assert len(kept) == len({e.key[:16] for e in expected.history} & {file.name.split(".")[2] for file in kept}) >= 2
    for file in kept:
        file.unlink()
    again = Counting(0)
    assert same(run(Trials(space, again, journal=journal)), expected)
    assert sorted(tmp_path.glob("journal.jsonl.*.safetensors")) == kept


def test_weights_of_killed_runs_go_in_the_end(space: Space, tmp_path: Path) -> None:
    run, journal = SEARCHES["netadapt"], tmp_path / "journal.jsonl"
    run(Trials(space, Counting(), journal=journal))
    kept = set(tmp_path.iterdir())
    for name in (
        "0123456789abcdef.safetensors",
        f"{next(iter(kept - {journal})).name.split('.')[2]}.safetensors.77.new",
    ):
        (tmp_path / f"journal.jsonl.{name}").touch()
    (tmp_path / "journal.jsonl.mine.safetensors").touch()
    run(Trials(space, Counting(0), journal=journal))
    assert set(tmp_path.iterdir()) == kept | {tmp_path / "journal.jsonl.mine.safetensors"}


def test_weights_that_lie_beside_a_new_journal_are_not_its_own(space: Space, tmp_path: Path) -> None:
    def run(journal: Path, tune: Callable[[nn.Module], None]) -> Found:
        return netadapt(Trials(space, fit, journal=journal), 0.6, step=0.2, finetune=tune)

    def twice(model: nn.Module) -> None:
        jiggle(model)
        jiggle(model)

    first = run(tmp_path / "one", jiggle)
    with pytest.raises(
        ConfigError, match="another search .its finetune was another.. Use another file, or delete this"
    ):
        run(tmp_path / "one", twice)
    (tmp_path / "one").unlink()
    assert list(tmp_path.glob("one.*.safetensors"))
    again, expected = run(tmp_path / "one", twice), run(tmp_path / "two", twice)
    assert same(again, expected) and not same(again, first)


def test_a_part_of_a_weight_file_is_none(space: Space, tmp_path: Path) -> None:
    run, journal = SEARCHES["netadapt"], tmp_path / "journal.jsonl"
    expected = run(Trials(space, fit, journal=journal))
    kept = {file: file.read_bytes() for file in tmp_path.glob("journal.jsonl.*.safetensors")}
    for file, data in kept.items():
        file.write_bytes(data[:-10])
    assert same(run(Trials(space, fit, journal=journal)), expected)
    assert {file: file.read_bytes() for file in kept} == kept


def test_the_journal_of_something_else_is_refused(space: Space, tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    annealing(Trials(space, fit, journal=journal), 0.4, schedule=Schedule(start=20, tries=1))
    before = journal.read_bytes()

    def refused(trials: Trials, sparsity: float = 0.4) -> str:
        with pytest.raises(ConfigError) as caught:
            annealing(trials, sparsity, schedule=Schedule(start=20, tries=1))
        assert journal.read_bytes() == before and "\n" not in str(caught.value)
        return str(caught.value).removeprefix(f"{journal}: is the journal of another search ")

    assert refused(Trials(space, fit, journal=journal), 0.5) == (
        "(sparsity 0.4, not 0.5). Use another file, or delete this one."
    )
    assert refused(Trials(space, fit, journal=journal, seed=1)).startswith("(seed 0, not 1).")
    assert refused(Trials(space, fit, journal=journal, minimize=True)).startswith("(minimize False, not True).")
    assert refused(Trials(chain_space(6, 9), fit, journal=journal)).startswith("(its model, weights or limits are")
    assert refused(Trials(space, lambda model: 7.0, journal=journal)).startswith("(the code of its model, its training")
    with pytest.raises(ConfigError, match="search 'annealing', not 'sensitivity'"):
        sensitivity(Trials(space, fit, journal=journal), (0.5,))


@pytest.mark.parametrize(
    "text",
    ["hello\n", "half a line", '{"a": 1}\n', '{"journal": 1}\n[1]\n', "[]\n", "\x00\xff\n"]
    + [f'{{"journal": 1}}\n{{"key": "0", "score": {score}}}\n' for score in ("null", "NaN", "true", '"1"', "[]")],
)
def test_files_that_are_no_journals(space: Space, tmp_path: Path, text: str) -> None:
    file = tmp_path / "notes.txt"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"notes.txt: is no journal of a search"):
        sensitivity(Trials(space, fit, journal=file), (0.5,))
    assert file.read_text(encoding="latin-1") == text


def test_a_journal_that_cannot_be_written(space: Space, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        sensitivity(Trials(space, fit, journal=tmp_path / "none" / "journal.jsonl"), (0.5,))


def test_a_journal_can_be_read(space: Space, tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    table = sensitivity(Trials(space, fit, journal=journal), (0.5,))
    header, *lines = map(json.loads, journal.read_text().splitlines())
    assert (header["search"], header["seed"], header["settings"]) == ("sensitivity", 0, {"shares": [0.5]})
    assert lines[0]["score"] == table.dense and lines[1]["shares"] == {"layers.0.weight": 0.5, "layers.1.weight": 0.0}
