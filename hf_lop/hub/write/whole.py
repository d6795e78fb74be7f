"""A folder that appears whole or not at all."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from hf_lop.errors import InvalidInputError, LOPError
from hf_lop.files import sync

LAST = "config.json"  # without it, a folder is no model


@contextlib.contextmanager
def whole_folder(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """Give an empty folder of the same name, which takes its place at the end, or vanishes with an error.

    Args:
        out (`Path`): the folder that shall appear; new or empty.
        replace (`bool`): whether it may hold something, which then goes when all of the new one is written.

    Raises:
        InvalidInputError: if something is in its place, or another process writes it.
    """
    with Partial(out) as partial, _full_disk_said(out):
        partial.clear()  # what a process left that was killed
        try:
            partial.folder.mkdir()
            yield partial.folder
            sync_all(partial.folder)
            partial.publish(replace=replace)
        finally:
            partial.clear()
            partial.leave()


@contextlib.contextmanager
def filled_folder(out: Path, stale: Callable[[Path, Path], Iterable[Path]]) -> Iterator[Path]:
    """Give an empty folder of the same name, whose files go into the one that is meant at the end, or vanish with an error.

    Where that has files already, those of the same names are replaced, all others stay. Its config.json goes first and the
    new one comes last, so that no loader takes what a kill has left in between.

    Args:
        out (`Path`): the folder to fill; made if it is not there.
        stale (`Callable`): given the new folder and `out`, returns files of an earlier save that must not stay.

    Raises:
        InvalidInputError: if another process writes it, or the disk is full.
    """
    if not out.is_dir() or (not any(out.iterdir()) and not os.path.ismount(out)):
        with whole_folder(out) as folder:
            yield folder
        return
    with Partial(out / out.resolve().name) as partial, _full_disk_said(out):
        partial.clear()
        try:
            partial.folder.mkdir()
            yield partial.folder
            sync_all(partial.folder)
            for path in (out / LAST, *stale(partial.folder, out)):
                path.unlink(missing_ok=True)
            sync(out)
            files = [path.relative_to(partial.folder) for path in partial.folder.rglob("*") if path.is_file()]
            for file in sorted(files, key=lambda file: (file == Path(LAST), file)):
                (out / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(partial.folder / file, out / file)
            sync_all_folders(out, files)
        finally:
            partial.clear()
            partial.leave()


@contextlib.contextmanager
def _full_disk_said(out: Path) -> Iterator[None]:
    """Say that a disk is full as a sentence; safetensors and numpy have errors of their own for it."""
    try:
        yield
    except Exception as error:
        words = ("No space left on device", "requested and")  # numpy: 38016 requested and 64 written
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or (not isinstance(error, LOPError) and any(part in str(error) for part in words)):
            raise InvalidInputError(
                f"The disk of {out} is full, so nothing was written. Free some room, and do the same again."
            ) from error
        raise


class Partial:
    """A folder `.NAME.partial/NAME` beside a folder NAME that shall appear, written by one process at a time.

    Attributes:
        out (`Path`): the folder that shall appear.
        root (`Path`): what is beside it.
        folder (`Path`): what is written to.
    """

    def __init__(self, out: Path) -> None:
        """Name the folders; as a context, this keeps other processes away."""
        self.out = out.resolve()
        self.root = self.out.parent / f".{self.out.name}.partial"
        self.folder = self.root / self.out.name
        self._lock = FileLock(self.root / "lock", timeout=0)

    def __enter__(self) -> Self:
        check_replaceable(self.out)
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise InvalidInputError(
                f"Another process is writing {self.out}. Wait for it, or choose a new folder."
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def clear(self) -> None:
        """Remove what is written."""
        for path in self.root.iterdir():
            if path.is_file() and path.name != "lock":
                path.unlink()  # the journal first: if this is killed, no later run believes that all is there
        sync(self.root)
        for path in self.root.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)

    def publish(self, *, replace: bool = False) -> None:
        """Let the folder appear; what is in it is safe on disk already.

        Raises:
            InvalidInputError: if something is in its place that it may not replace.
        """
        with contextlib.suppress(OSError):  # an empty folder is in its place; a full one is not removed
            self.out.rmdir()
        sync(self.folder)
        try:
            if replace and self.out.exists():
                os.rename(self.out, self.root / "before")
            os.rename(self.folder, self.out)
        except OSError as error:
            raise InvalidInputError(
                f"{self.out} cannot be put in place: {error} If it was made meanwhile, remove it and do the same again."
            ) from error
        sync(self.out.parent)

    def forget(self) -> None:
        """Remove what a process left beside a folder that was killed when it had put that in place."""
        if self.root.is_dir() and not self.folder.exists():
            with contextlib.suppress(InvalidInputError, OSError), self:  # what another process writes stays
                self.clear()
                self.leave()

    def leave(self) -> None:
        """Remove what is beside the folder, if it is empty."""
        Path(self._lock.lock_file).unlink(missing_ok=True)  # while it is held: behind it, another process may begin
        self._lock.release()
        with contextlib.suppress(OSError):  # another process has begun
            self.root.rmdir()


def check_new(folder: Path) -> None:
    """Refuse a folder that holds something, or that cannot be made.

    Raises:
        InvalidInputError: if it is so.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        Partial(folder).forget()
        raise InvalidInputError(f"{folder} exists and is not empty. Choose a new folder, or remove it first.")
    check_makeable(folder)


def check_makeable(folder: Path) -> None:
    """Refuse a folder that is not there and cannot be made, or that nothing can be written to.

    Raises:
        InvalidInputError: if it is so.
    """
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InvalidInputError(f"{folder} cannot be made: {there} is no folder that you may write. Choose another.")


def check_replaceable(folder: Path) -> None:
    """Refuse a folder in whose place no other can be put.

    Raises:
        InvalidInputError: if it is so.
    """
    if os.path.ismount(folder):
        raise InvalidInputError(
            f"{folder} is a mount point, which no finished folder can replace. Choose a new folder inside it."
        )


def check_room(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        folder (`Path`): a folder on that disk.
        needed (`int`): bytes.

    Raises:
        InvalidInputError: if there is less room.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InvalidInputError(
            f"{folder.parent} has room for {free:,} bytes; {needed:,} are needed. Free some, or write elsewhere."
        )


def sync_all(folder: Path) -> None:
    """Make all that is in a folder safe on disk, with its names."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or path.is_dir():
            sync(path)


def sync_all_folders(folder: Path, files: Iterable[Path]) -> None:
    """Make the names of files in a folder safe on disk."""
    for parent in {folder, *((folder / file).parent for file in files)}:
        sync(parent)
