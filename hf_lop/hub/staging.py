"""A folder that appears whole or not at all, and can be written over several runs."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from hf_lop.errors import InvalidInputError

SYNC = 2**28  # bytes that are written at most before they are made safe; a killed run loses no more than two such lots


class Staging:
    """Writes a folder `NAME` as `.NAME.partial/NAME` beside it, with a journal of what is safely on disk.

    A later run with the same job goes on from there; one with another job starts anew.
    """

    def __init__(self, out: Path, job: str) -> None:
        """Prepare to write.

        Args:
            out (`Path`): the folder that shall appear.
            job (`str`): what determines every byte of it.
        """
        self.out, self.job = out.resolve(), job
        self.root = self.out.parent / f".{self.out.name}.partial"
        self.folder = self.root / self.out.name
        self._journal = self.root / "journal.jsonl"
        self._lock = FileLock(self.root / "lock", timeout=0)
        self._noted: dict[str, int] = {}

    def __enter__(self) -> Self:
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise InvalidInputError(
                f"Another process is writing {self.out}. Wait for it, or choose a new folder."
            ) from error
        try:
            self._noted = self._read()
            if not self._noted:
                shutil.rmtree(self.folder, ignore_errors=True)
                self._journal.unlink(missing_ok=True)
                self.folder.mkdir()
                self._note("job", 0, job=self.job)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @property
    def resumed(self) -> int:
        """Bytes that an earlier run left."""
        return sum(self._noted.values())

    def once(self, step: str, make: Callable[[], None]) -> None:
        """Do a step unless an earlier run did it; what it writes is safe afterwards."""
        if step not in self._noted:
            make()
            for path in self.folder.rglob("*"):
                if path.is_file():
                    _sync(path)
            self._note(step, 0)

    def write(self, file: str, parts: Iterable[tuple[bytes | Callable[[], Iterator[memoryview]], int]]) -> None:
        """Write a file, except what an earlier run has written of it; until it is complete it has another name.

        Args:
            file (`str`): its name.
            parts (`Iterable`): its contents in order: each as bytes or what makes them, and how many bytes they are.
        """
        final, partial = self.folder / file, self.folder / f"{file}.partial"
        done = self._noted.get(file, 0)
        if final.exists() and file in self._noted:
            return
        if done and (not partial.exists() or partial.stat().st_size < done):
            done = 0
        with partial.open("r+b" if done else "wb", buffering=0) as stream, ThreadPoolExecutor(1) as disk:
            stream.truncate(done)
            stream.seek(done)
            end = safe = 0
            syncing: tuple[Future[None], int] | None = None  # made safe while the next bytes are read and cut
            try:
                for content, size in parts:
                    end += size
                    if end <= done:
                        safe = end
                        continue
                    for piece in (content,) if isinstance(content, bytes) else content():
                        _write_all(stream, piece)
                    if stream.tell() != end:
                        raise AssertionError(f"{file}: a tensor has other bytes than its shape says")
                    if end - max(safe, done) >= SYNC:
                        self._settle(file, syncing)
                        syncing, safe = (disk.submit(os.fsync, stream.fileno()), end), end
            finally:
                self._settle(file, syncing)
            os.fsync(stream.fileno())
        self._note(file, end)
        os.replace(partial, final)

    def _settle(self, file: str, syncing: tuple["Future[None]", int] | None) -> None:
        """Wait until bytes are safe, and note it."""
        if syncing is not None:
            syncing[0].result()
            self._note(file, syncing[1])

    def finish(self) -> None:
        """Let the folder appear."""
        with contextlib.suppress(OSError):  # an empty folder is in its place; a full one is not removed
            self.out.rmdir()
        _sync(self.folder)
        os.rename(self.folder, self.out)
        _sync(self.out.parent)
        self._lock.release()
        shutil.rmtree(self.root, ignore_errors=True)

    def _note(self, step: str, size: int, **more: str) -> None:
        self._noted[step] = size
        with self._journal.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, "bytes": size, **more}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _read(self) -> dict[str, int]:
        """Return what the journal notes of this job; nothing if it is of another."""
        try:
            lines = self._journal.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError):
            return {}
        noted: dict[str, int] = {}
        for number, line in enumerate(lines[:-1]):  # a last line without end was cut off
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not isinstance(entry, dict) or (number == 0 and entry.get("job") != self.job):
                return {}
            noted[entry["step"]] = entry["bytes"]
        return noted if self.folder.is_dir() else {}


def check_new(folder: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        InvalidInputError: if it does.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidInputError(f"{folder} exists and is not empty. Choose a new folder, or remove it first.")


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


def _write_all(stream: object, piece: bytes | memoryview) -> None:
    view = memoryview(piece)
    while view:
        view = view[stream.write(view) :]  # type: ignore[attr-defined]


def _sync(path: Path) -> None:
    """Make a file or folder safe on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
