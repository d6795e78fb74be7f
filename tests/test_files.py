"""What a killed process leaves is removed by the next one, what a living one has is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_lop.errors import InvalidInputError
from hf_lop.files import scratch_folder, write_whole
from hf_lop.hub.write.whole import Partial, check_new, whole_folder

ROOT = Path(__file__).parents[1]
KILLED = """
import os, sys
from pathlib import Path
from hf_lop.files import scratch_folder, write_whole
os.replace = lambda *_: os.kill(os.getpid(), 9)
with scratch_folder(Path(sys.argv[1])) as scratch:
    write_whole(scratch / "x", b"x" * 1000) if sys.argv[2] == "scratch" else write_whole(Path(sys.argv[1], "y"), b"y")
"""


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("what", ["scratch", "file"])
def test_a_killed_process(tmp_path, what):
    child = subprocess.run([sys.executable, "-c", KILLED, tmp_path, what], cwd=ROOT, check=False)
    assert child.returncode == -9
    assert len(names(tmp_path)) == (1 if what == "scratch" else 2)
    (tmp_path / "hf_lop-mine").mkdir()
    with scratch_folder(tmp_path) as first:
        write_whole(tmp_path / "y", b"after")
        assert names(tmp_path) == {"hf_lop-mine", "y", first.parent.name}
        with scratch_folder(tmp_path) as second:  # and that of a living one stays
            assert first.is_dir()
            assert first != second
    assert names(tmp_path) == {"hf_lop-mine", "y"}
    assert (tmp_path / "y").read_bytes() == b"after"


def test_a_file_that_is_being_written_stays(tmp_path, monkeypatch):
    replace, seen = os.replace, []

    def slowly(*args):
        if not seen:
            seen.append(1)
            write_whole(tmp_path / "x", b"second")  # as another process would
        replace(*args)

    monkeypatch.setattr(os, "replace", slowly)
    write_whole(tmp_path / "x", b"first")
    assert (tmp_path / "x").read_bytes() == b"first"
    assert names(tmp_path) == {"x"}


def test_a_scratch_folder_goes_with_an_error(tmp_path):
    with pytest.raises(IsADirectoryError), scratch_folder(tmp_path) as scratch:
        scratch.write_bytes(b"")
    assert not names(tmp_path)


def test_a_scratch_folder_in_whose_place_another_was_put_stays(tmp_path):
    """As a save does, whose folder appears whole."""
    with scratch_folder(tmp_path) as first:
        with whole_folder(first) as folder:
            (folder / "x").touch()
        with scratch_folder(tmp_path):
            assert names(first) == {"x"}
    assert not names(tmp_path)


def test_what_is_left_beside_a_finished_folder(tmp_path):
    """A kill right behind the moment at which a folder appeared: the same command, refused, cleans up."""
    out = tmp_path / "out"
    with Partial(out) as partial:
        partial.folder.mkdir()
        (partial.folder / "x").touch()
        partial.publish()
    assert names(tmp_path) == {"out", ".out.partial"}
    with Partial(out), pytest.raises(InvalidInputError, match="not empty"):
        check_new(out)  # somebody else may be at work
    assert names(tmp_path) == {"out", ".out.partial"}
    with pytest.raises(InvalidInputError, match="not empty"):
        check_new(out)
    assert names(tmp_path) == {"out"}
    (tmp_path / ".out.partial" / "out").mkdir(parents=True)  # what can go on stays
    with pytest.raises(InvalidInputError, match="not empty"):
        check_new(out)
    assert names(tmp_path) == {"out", ".out.partial"}
