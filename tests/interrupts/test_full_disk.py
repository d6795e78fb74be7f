"""Every command on a disk that fills up, a real one in memory: one sentence, and the same again finishes once there is room."""

import subprocess

import pytest
from interrupts_cases import CASES, make_inputs
from interrupts_runs import hurried

from hf_lop.cli import main
from tests.hub.test_full_disk import disk, mount  # noqa: F401 - a fixture
from tests.interrupts.test_commands import NEEDS

PAGES = (1, 3, 8, 16, 32, 64, 128, 256)
FULL = ("is full", "has room for", "No space left", "disk full", "disk is full")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    with hurried():
        yield make_inputs(tmp_path_factory.mktemp("inputs"))


def run(monkeypatch, words):
    """Run a command as the console script does; return its exit code."""
    monkeypatch.setattr("sys.argv", ["hf-lop", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_sentence_and_the_rerun_finishes(case, inputs, disk, monkeypatch, capsys, tmp_path):  # noqa: F811
    if case.name in NEEDS:
        pytest.importorskip(NEEDS[case.name], reason="an extra is not installed")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    folder, resize = disk
    words, refused, tried = case.arguments(inputs, folder / "out"), 0, False
    for pages in PAGES:
        assert not resize(4096 * pages)
        code = run(monkeypatch, [*words, *(case.again if tried else ())])
        tried, said = True, capsys.readouterr().err
        if not code:
            break
        refused += 1
        assert code == 1, said
        sentences = [line for line in said.splitlines() if line.startswith("Error: ")]
        assert len(sentences) == 1, said
        assert any(words in sentences[0] for words in FULL), said
        assert "Traceback" not in said
    assert refused
    resize("64m")
    if code:
        assert run(monkeypatch, [*words, *case.again]) == 0, capsys.readouterr().err
    case.loads(folder / "out")
    subprocess.run(["sync", "-f", str(folder)], check=True)
