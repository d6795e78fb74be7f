"""Files that appear whole or not at all, and scratch folders: what a killed process leaves of either, the next one removes.

Whether its process still lives is told by a lock, which the system releases when that ends, however it does.
"""

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

SCRATCH = "hf_lop-"  # begins the names of scratch folders
# Elsewhere folders cannot be opened, and so neither locked nor made safe by themselves; what a killed process leaves stays there.
POSIX = hasattr(os, "O_DIRECTORY")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all, in place of the one that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent, f".{glob.escape(path.name)}.????????.partial")
    handle, name = _claimed(lambda: tempfile.mkstemp(".partial", f".{path.name}.", path.parent))
    try:
        with open(handle, "wb") as file:  # open, and so locked, until it has its name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a name must not be safe on disk before what it names
            os.chmod(name, 0o644)  # temporary files are private, repositories are not
            if POSIX:
                os.replace(name, path)
        if not POSIX:  # an open file cannot be renamed there
            os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def scratch_folder(where: Path | None = None) -> Iterator[Path]:
    """Give an empty folder that is gone afterwards; those of processes that were killed go first.

    Args:
        where (`Path`, *optional*): the folder to make it in; that for temporary files by default.
    """
    if not POSIX:
        with tempfile.TemporaryDirectory("", SCRATCH, where) as temporary:
            yield Path(temporary)
        return
    root = Path(where or tempfile.gettempdir())
    _sweep(root, f"{SCRATCH}????????")

    def make() -> tuple[int, str]:
        name = tempfile.mkdtemp("", SCRATCH, root)
        return os.open(name, os.O_RDONLY), name

    handle, name = _claimed(make)
    inside = Path(name, "files")  # a folder that appears whole may take its place, but not that of the locked one
    try:
        inside.mkdir()
        yield inside
    finally:
        shutil.rmtree(name, ignore_errors=True)
        os.close(handle)


def sync(path: Path) -> None:
    """Make a file or folder safe on disk."""
    if not POSIX and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if POSIX else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _claimed(make: Callable[[], tuple[int, str]]) -> tuple[int, str]:
    """Make something, and lock it before a process that sweeps takes it for a dead one's."""
    while True:
        handle, name = make()
        _lock(handle, wait=True)
        if _is(handle, name):
            return handle, name
        os.close(handle)


def _sweep(folder: Path, pattern: str) -> None:
    """Remove what processes made that live no more."""
    for path in folder.glob(pattern) if POSIX else ():
        with contextlib.suppress(OSError):  # another process sweeps too, or it is not ours
            handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
            try:
                ours = os.fstat(handle).st_uid == os.getuid()
                if ours and _lock(handle, wait=False) and _is(handle, str(path)):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(handle)


def _lock(handle: int, *, wait: bool) -> bool:
    """Lock an open file or folder until it is closed; return whether it is."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (ImportError, OSError):  # no POSIX, a file system without locks, or another process has it
        return False
    return True


def _is(handle: int, name: str) -> bool:
    """Whether a name still is that of what was opened."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), os.stat(name))
    return False
