import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from hf_lop.errors import InvalidInputError
from hf_lop.planning.journal import Evaluation, Journal, merge_journals, read_journal
from hf_lop.planning.search.cmaes import CMAES
from hf_lop.planning.search.mcts import MCTS
from hf_lop.planning.search.run import run_search
from hf_lop.planning.search.space import SearchSpace
from tests.landscape import toy_reward

SETTINGS = {"model": "org/base", "reward": "divergence", "samples": 64, "search": {"c": 0.1, "seed": 3}}
SPACE = SearchSpace((40, 64, 64, 100), 0.4)


def journalled(folder, search, evaluations=40, reward=toy_reward, settings=SETTINGS, **options):
    with Journal(folder, settings, **options) as journal:
        return run_search(search(SPACE, seed=3), reward, evaluations, journal=journal)


def refuse(ratios):
    pytest.fail("a journalled candidate was evaluated again")


@pytest.mark.parametrize("search", [MCTS, CMAES])
@pytest.mark.parametrize("stop", [0, 1, 13, 39])
def test_a_stopped_search_resumes_to_the_same_result(tmp_path, search, stop):
    whole = run_search(search(SPACE, seed=3), toy_reward, 40)
    calls = []

    def failing(ratios):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(SPACE.widths(ratios))
        return toy_reward(ratios)

    with pytest.raises(KeyboardInterrupt):
        journalled(tmp_path, search, reward=failing)
    again = []

    def counting(ratios):
        again.append(SPACE.widths(ratios))
        return toy_reward(ratios)

    assert journalled(tmp_path, search, reward=counting) == whole
    assert len(calls) == stop
    assert not set(calls) & set(again)
    assert len(calls) + len(again) == 40
    assert journalled(tmp_path, search, reward=refuse) == whole


def test_lines_are_readable_and_exact(tmp_path):
    result = journalled(tmp_path, MCTS)
    header, *lines = (tmp_path / "evaluations-00000.jsonl").read_text().splitlines()
    assert json.loads(header)["settings"] == SETTINGS
    assert [json.loads(line)["reward"] for line in lines] == list(result.rewards)
    assert {json.loads(line)["target"] for line in lines} == {0.4}
    assert {sum(json.loads(line)["widths"]) for line in lines} == {SPACE.kept}


@pytest.mark.parametrize("length", range(1, 75, 7))
def test_a_torn_last_line_is_cut_off(tmp_path, length):
    whole = journalled(tmp_path, CMAES)
    path = tmp_path / "evaluations-00000.jsonl"
    content = path.read_bytes()
    start = content.rfind(b"\n", 0, -1) + 1
    path.write_bytes(content[: start + length])
    assert len(list(read_journal(path))) == 39
    assert journalled(tmp_path, CMAES) == whole
    assert path.read_bytes() == content


@pytest.mark.parametrize("length", [0, 1, 30])
def test_a_torn_header_is_written_again(tmp_path, length):
    whole = journalled(tmp_path, CMAES)
    path = tmp_path / "evaluations-00000.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:length])
    assert journalled(tmp_path, CMAES) == whole
    assert path.read_bytes() == content


def test_a_damaged_line_is_named(tmp_path):
    journalled(tmp_path, MCTS)
    path = tmp_path / "evaluations-00000.jsonl"
    lines = path.read_bytes().split(b"\n")
    good = b'"target": 0.4, "widths": [40, 64, 64, 72]'
    for damage in (
        *(b"\x00\x00\x00", b"[1, 2]", b'{"target": 0.4, "widths": 3, "reward": 1.0}'),
        *(
            b"{%s, " % good + reward
            for reward in (b'"reward": "7"}', b'"reward": NaN}', b'"reward": true}', b'"reward": []}')
        ),
        *(
            b'{"target": 0.4, "reward": 1, "widths": ' + widths + b"}"
            for widths in (b"[[40]]", b'["40"]', b"[4.0]", b"[-1]")
        ),
        b'{"target": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ):
        path.write_bytes(b"\n".join([*lines[:4], damage, *lines[5:]]))
        with pytest.raises(InvalidInputError, match=r"Line 5 of .*evaluations-00000\.jsonl is no entry"):
            Journal(tmp_path, SETTINGS)


def test_only_one_process_writes_a_file(tmp_path):
    code = "import sys; from hf_lop.planning.journal import Journal; Journal(sys.argv[1], {})"
    with Journal(tmp_path, {}) as journal:
        journal.add(0.4, (1, 2), 3.0)
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
        assert "Another process is writing" in done.stderr
    with Journal(tmp_path, {}) as journal:
        assert journal.get((1, 2)) == 3.0
    assert [path.name for path in tmp_path.iterdir()] == ["evaluations-00000.jsonl"]


def test_other_settings_are_refused_with_what_differs(tmp_path):
    journalled(tmp_path, MCTS)
    before = (tmp_path / "evaluations-00000.jsonl").read_bytes()
    other = {"model": "org/base", "reward": "accuracy", "search": {"c": 0.1, "seed": 4}, "questions": 10}
    with pytest.raises(InvalidInputError) as caught:
        Journal(tmp_path, other)
    message = str(caught.value)
    for part in (
        'reward was "divergence" and is now "accuracy"',
        "samples was 64 and is now absent",
        "questions was absent and is now 10",
        'search was {"c": 0.1, "seed": 3} and is now {"c": 0.1, "seed": 4}',
        "another folder",
    ):
        assert part in message
    assert "model" not in message
    assert (tmp_path / "evaluations-00000.jsonl").read_bytes() == before
    with pytest.raises(InvalidInputError, match="samples was 64"):
        Journal(tmp_path, {**SETTINGS, "samples": 65}, process=1)


def test_equal_settings_are_equal_in_any_order_and_as_tuples(tmp_path):
    with (
        Journal(tmp_path, {"a": 1, "b": (1, 2)}) as first,
        Journal(tmp_path, {"b": [1, 2], "a": 1}, process=1) as second,
    ):
        assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize("value", [object(), float("nan"), np.zeros(2)])
def test_settings_must_be_json(tmp_path, value):
    with pytest.raises(InvalidInputError, match="must be JSON types"):
        Journal(tmp_path, {"value": value})


def test_processes_write_their_own_files_and_read_each_other(tmp_path):
    with Journal(tmp_path, SETTINGS, process=0) as zero, Journal(tmp_path, SETTINGS, process=1) as one:
        zero.add(0.5, (1, 3), 0.25)
        one.add(0.5, (2, 2), 0.5)
        one.add(0.5, (1, 3), 0.75)
        assert zero.get((2, 2)) is None
        zero.refresh()
        assert (zero.get((2, 2)), zero.get((1, 3)), len(zero)) == (0.5, 0.25, 2)
    expected = [Evaluation(0.5, (1, 3), 0.25), Evaluation(0.5, (2, 2), 0.5)]
    assert merge_journals(tmp_path) == merge_journals(tmp_path, SETTINGS) == expected
    with Journal(tmp_path, SETTINGS, process=2) as two:  # the first file by name counts
        assert (two.get((1, 3)), len(two)) == (0.25, 2)
    with pytest.raises(InvalidInputError, match="samples was 64"):
        merge_journals(tmp_path, {**SETTINGS, "samples": 1})


def test_another_process_in_the_middle_of_a_line_does_no_harm(tmp_path):
    with Journal(tmp_path, SETTINGS, process=1) as one:
        one.add(0.5, (1, 3), 0.25)
    path = tmp_path / "evaluations-00001.jsonl"
    path.write_bytes(path.read_bytes() + b'{"target": 0.5, "wid')
    before = path.read_bytes()
    with Journal(tmp_path, SETTINGS) as zero:
        assert len(zero) == 1
    assert path.read_bytes() == before  # its owner cuts it, nobody else


CHILD = """
import sys, time
from hf_lop.planning.search.cmaes import CMAES
from hf_lop.planning.journal import Journal
from hf_lop.planning.search.mcts import MCTS
from hf_lop.planning.search.space import SearchSpace
from hf_lop.planning.table import learn_table
from tests.landscape import toy_reward
from functools import partial
folder, engine = sys.argv[1], {"MCTS": MCTS, "CMAES": CMAES}[sys.argv[2]]
def slow(ratios):
    with open(folder + "/calls.txt", "a") as file:
        file.write(repr(SearchSpace((40, 64, 64, 100), 0.5).widths(ratios)) + "\\n")
    time.sleep(0.02)
    return toy_reward(ratios)
with Journal(folder, {"engine": sys.argv[2]}) as journal:
    rows = learn_table(partial(engine, seed=11), slow, (40, 64, 64, 100), (0.3, 0.4, 0.5), evaluations=80, journal=journal)
print(rows)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "kills"), [("MCTS", 10), ("CMAES", 3)])
def test_kills_change_nothing(tmp_path, engine, kills):
    def start(folder):
        folder.mkdir(exist_ok=True)
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder), engine],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(child):
        output, errors = child.communicate(timeout=60)
        assert child.returncode == 0, errors
        return output

    undisturbed = start(tmp_path / "whole")
    expected = finish(undisturbed)
    folder = tmp_path / "killed"
    journal = folder / "evaluations-00000.jsonl"
    calls = folder / "calls.txt"
    rng = np.random.default_rng()

    def journalled_now():
        return {repr(entry.widths) for entry in merge_journals(folder)}

    def calls_now():
        return calls.read_text().splitlines() if calls.exists() else []

    for _ in range(kills):
        known, called = journalled_now(), len(calls_now())
        child = start(folder)
        deadline = time.monotonic() + 30
        while len(journalled_now()) <= len(known) + 2:
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        assert not known & set(calls_now()[called:])
        if rng.random() < 0.5:  # a kill may also hit a write: half of the time leave a part of a line
            journal.write_bytes(journal.read_bytes()[: -int(rng.integers(1, 30))])
    known, called = journalled_now(), len(calls_now())
    assert finish(start(folder)) == expected
    assert not known & set(calls_now()[called:])
    evaluations = [entry.widths for entry in read_journal(journal)]
    assert len(evaluations) == len(set(evaluations))
    assert set(merge_journals(folder)) == set(merge_journals(tmp_path / "whole"))
    # Measured twice at most: the candidate under way at each kill, and the one whose line was torn.
    assert len(calls_now()) <= len(evaluations) + 2 * kills
