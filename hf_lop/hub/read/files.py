"""The files of a checkpoint, read by ranges of bytes: those of a local folder. Nothing of the Hub is imported for them."""

import os
import stat
import threading
from pathlib import Path
from typing import BinaryIO, Protocol

from hf_lop.errors import CheckpointMismatchError


class Files(Protocol):
    """The files of a checkpoint, by name."""

    name: str  #: of the whole, for messages
    hint: str  #: why files may be missing that are there, or nothing

    def size(self, file: str) -> int | None:
        """Return the bytes of a file, or None if there is none."""

    def stamp(self, file: str) -> str:
        """Return what changes when a file does."""

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from `start` on."""

    def close(self) -> None:
        """Give back what was opened."""


def _read_at(stream: BinaryIO, buffer: memoryview, start: int) -> int:
    """Fill a part of a buffer; return how much."""
    if hasattr(os, "preadv"):  # by position: after a fork both processes would move the one that they share
        return os.preadv(stream.fileno(), [buffer], start)
    stream.seek(start)  # Windows, which has no fork; each thread has a stream of its own
    return stream.readinto(buffer) or 0  # type: ignore[attr-defined]


class Folder:
    """The files of a local folder."""

    def __init__(self, path: str | Path, *, ahead: bool = True) -> None:
        """Read from a folder.

        Args:
            path (`str` or `Path`): the folder.
            ahead (`bool`): whether the system may read ahead; not where parts of files are left out.
        """
        self.path, self.name, self.hint, self.ahead = Path(path), str(path), "", ahead
        # Each thread has its last file open, so that the system reads ahead: it mostly reads one tensor behind the other.
        self._own = threading.local()
        self._open: set[BinaryIO] = set()

    def size(self, file: str) -> int | None:
        """Return the bytes of a file, or None if there is none."""
        try:
            found = os.stat(self.path / file)
        except OSError:
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None  # to open a pipe would wait for ever

    def stamp(self, file: str) -> str:
        """Return what changes when a file does."""
        found = os.stat(self.path / file)
        return f"{found.st_size} bytes of {found.st_mtime_ns}"

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill a buffer; see `Files`. Pages are not mapped, so that they do not count as this process's memory."""
        stream = self._opened(file)
        done = 0
        while done < len(buffer):
            count = _read_at(stream, buffer[done:], start + done)
            if not count:
                raise CheckpointMismatchError(
                    f"{file} in {self.name} ends at byte {start + done:,} while it is read. Do not change it meanwhile."
                )
            done += count

    def _opened(self, file: str) -> BinaryIO:
        name, stream = getattr(self._own, "last", ("", None))
        if stream is None or stream.closed or name != file:
            if stream is not None:
                stream.close()
                self._open.discard(stream)
            stream = open(self.path / file, "rb", buffering=0)  # noqa: SIM115
            self._open.add(stream)
            self._own.last = file, stream
            if hasattr(os, "posix_fadvise"):
                advice = os.POSIX_FADV_SEQUENTIAL if self.ahead else os.POSIX_FADV_RANDOM
                os.posix_fadvise(stream.fileno(), 0, 0, advice)
        return stream

    def close(self) -> None:
        """Close the files that are open; no thread may read meanwhile."""
        while self._open:
            self._open.pop().close()
