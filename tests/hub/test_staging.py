"""A folder that appears whole or not at all, and the journal by which a later run goes on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from hf_lop.errors import InvalidInputError
from hf_lop.files import write_whole
from hf_lop.hub.write import staging as module
from hf_lop.hub.write.staging import Staging
from hf_lop.hub.write.whole import whole_folder
from tests.hub.test_streaming import contents


@pytest.mark.parametrize("damage", [b"", b"{", b'{"step": "job"', b"\xff\n", b"[]\n"])
def test_a_damaged_journal_starts_anew(tmp_path, damage):
    with Staging(tmp_path / "out", "a") as staging:
        staging.write("x", [(b"abc", 3)])
    (tmp_path / ".out.partial" / "journal.jsonl").write_bytes(damage)
    with Staging(tmp_path / "out", "a") as staging:
        staging.write("x", [(b"xyz", 3)])
        staging.finish()
    assert contents(tmp_path / "out") == {"x": b"xyz"}


def test_a_killed_step_leaves_no_file(tmp_path):
    def killed():
        (tmp_path / ".out.partial/out/.widths.png.x").touch()
        raise KeyboardInterrupt

    with Staging(tmp_path / "out", "a") as staging, pytest.raises(KeyboardInterrupt):
        staging.once("companions", killed)
    with Staging(tmp_path / "out", "a") as staging:
        staging.write("x", [(b"abc", 3)])
        staging.finish()
    assert contents(tmp_path / "out") == {"x": b"abc"}


def test_only_one_process_writes(tmp_path):
    code = "import sys; from pathlib import Path; from hf_lop.hub.write.staging import Staging; Staging(Path(sys.argv[1]), 'a').__enter__()"
    with Staging(tmp_path / "out", "a"):
        other = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, check=False
        )
    assert "InvalidInputError: Another process is writing" in other.stderr


def killed_while_writing(out):
    """Begin with two tensors of a file, and stop in the third."""

    def fails():
        yield b"e"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Staging(out, "a") as staging:
        staging.write("x", [(b"ab", 2), (b"cd", 2), (fails, 2)])


def finished(out):
    """Go on with other bytes, so that the result shows what was written when."""
    with Staging(out, "a") as staging:
        done = staging.resumed
        staging.write("x", [(b"AB", 2), (b"CD", 2), (b"EF", 2)])
        staging.finish()
    return done, (out / "x").read_bytes()


def test_a_later_run_goes_on_behind_the_last_note(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOT", 1)
    killed_while_writing(tmp_path / "out")
    assert finished(tmp_path / "out") == (4, b"abcdEF")


def test_what_was_only_with_the_system_is_written_again_after_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOT", 1)
    monkeypatch.setattr(module, "BOOT", "yesterday")
    killed_while_writing(tmp_path / "out")
    monkeypatch.setattr(module, "BOOT", "today")
    assert finished(tmp_path / "out") == (0, b"ABCDEF")


def test_without_a_name_for_the_boot_every_lot_is_made_safe(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOT", 1)
    monkeypatch.setattr(module, "BOOT", "")
    killed_while_writing(tmp_path / "out")
    assert b"boot" not in (tmp_path / ".out.partial" / "journal.jsonl").read_bytes()
    assert finished(tmp_path / "out") == (4, b"abcdEF")


def test_notes_behind_a_line_that_was_cut_off_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOT", 1)
    killed_while_writing(tmp_path / "out")
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-4])  # the note of the second tensor
    killed_while_writing(tmp_path / "out")
    assert finished(tmp_path / "out") == (4, b"abcdEF")


def companions(staging):
    def make():
        (staging.folder / "assets").mkdir()
        (staging.folder / "assets" / "plot").touch()
        (staging.folder / "config").touch()

    staging.once("companions", make)


def test_killed_while_another_job_is_cleared(tmp_path, monkeypatch):
    def killed(folder, **_):
        (folder / "config").unlink()
        raise KeyboardInterrupt

    with Staging(tmp_path / "out", "a") as staging:
        companions(staging)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            Staging(tmp_path / "out", "b").__enter__()
    with Staging(tmp_path / "out", "a") as staging:
        companions(staging)
        staging.finish()
    assert contents(tmp_path / "out").keys() == {"assets/plot", "config"}


def test_a_step_is_noted_when_its_files_and_their_names_are_safe(tmp_path, monkeypatch):
    safe, sync = [], os.fsync

    def fsync(handle):
        path = Path(f"/dev/fd/{handle}").resolve()
        safe.append(path.name if path.exists() else os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    with Staging(tmp_path / "out", "a") as staging:
        monkeypatch.setattr(os, "fsync", fsync)
        companions(staging)
    assert sorted(safe[:-1]) == ["assets", "config", "out", "plot"]
    assert safe[-1] == "journal.jsonl"


def test_another_process_begins_while_one_finishes(tmp_path, monkeypatch):
    second, release = Staging(tmp_path / "out", "b"), FileLock.release

    def begins(lock, *args, **kwargs):
        release(lock, *args, **kwargs)
        monkeypatch.undo()
        second.__enter__()

    with Staging(tmp_path / "out", "a") as first:
        first.write("x", [(b"abc", 3)])
        monkeypatch.setattr(FileLock, "release", begins)
        first.finish()
    shutil.rmtree(tmp_path / "out")
    second.write("x", [(b"xyz", 3)])
    second.finish()
    assert contents(tmp_path / "out") == {"x": b"xyz"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_was_made_meanwhile_stays(tmp_path):
    with Staging(tmp_path / "out", "a") as staging:
        staging.write("x", [(b"abc", 3)])
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").touch()
        with pytest.raises(InvalidInputError, match="made meanwhile"):
            staging.finish()
    assert contents(tmp_path / "out") == {"mine": b""}
    shutil.rmtree(tmp_path / "out")
    with Staging(tmp_path / "out", "a") as staging:
        staging.write("x", [(b"xyz", 3)])
        staging.finish()
    assert contents(tmp_path / "out") == {"x": b"abc"}


def test_a_mount_point_is_refused_first(tmp_path, monkeypatch):
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(InvalidInputError, match="mount point"):
        Staging(tmp_path / "out", "a").__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# -- In one run ---------------------------------------------------------------------------------------------------------


def test_a_folder_appears_when_all_of_it_is_safe(tmp_path, monkeypatch):
    safe, sync = set(), os.fsync

    def fsync(handle):
        safe.add(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with whole_folder(tmp_path / "above/out") as folder:
        assert folder.name == "out"
        (folder / "assets").mkdir()
        (folder / "assets" / "plot").touch()
        assert not (tmp_path / "above/out").exists()
    assert {"plot", "assets", "out", "above"} <= safe
    assert contents(tmp_path / "above") == {"out/assets/plot": b""}


def test_an_error_leaves_nothing_and_a_kill_nothing_that_stays(tmp_path):
    with pytest.raises(IsADirectoryError), whole_folder(tmp_path / "out") as folder:
        folder.write_bytes(b"")
    assert not list(tmp_path.iterdir())
    with Staging(tmp_path / "out", "a") as staging:
        staging.write("old", [(b"abc", 3)])
    with whole_folder(tmp_path / "out") as folder:
        (folder / "x").touch()
    assert contents(tmp_path) == {"out/x": b""}


def test_what_is_in_its_place_stays_unless_it_may_be_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(InvalidInputError, match="made meanwhile"), whole_folder(tmp_path / "out"):
        pass
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "out", replace=True):
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"out/mine": b""}
    with whole_folder(tmp_path / "out", replace=True) as folder:
        (folder / "x").touch()
    assert contents(tmp_path) == {"out/x": b""}


def test_a_file_that_cannot_be_written_leaves_the_one_that_is_there(tmp_path, monkeypatch):
    write_whole(tmp_path / "x", b"before")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_whole(tmp_path / "x", b"after")
    assert contents(tmp_path) == {"x": b"before"}
