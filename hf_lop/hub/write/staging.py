"""Writing a folder over several runs: a later one goes on where an earlier one was killed."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Self

from hf_lop.hub.write.whole import Partial, sync_all
from hf_lop.planning.journal import sealed, unsealed

LOT = 2**28  # bytes that are written between two notes


def _boot() -> str:
    """Return what changes when the system starts, or nothing where that is not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


# What a killed process wrote is not lost while the system runs. To make every lot safe at once would keep the disk from
# reading: with it, copying takes a third longer.
BOOT = _boot()


class Staging(Partial):
    """Writes a folder with a journal of what is there.

    A later run with the same job goes on from there; one with another job starts anew. The folder appears when all of it is
    safely on disk.
    """

    def __init__(self, out: Path, job: str) -> None:
        """Prepare to write.

        Args:
            out (`Path`): the folder that shall appear.
            job (`str`): what determines every byte of it.
        """
        super().__init__(out)
        self.job = job
        self._journal = self.root / "journal.jsonl"
        self._noted: dict[str, int] = {}

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            self._noted = self._read()
            if self._noted.keys() <= {"job"}:  # a step that was killed may have left files
                self.clear()
                self.folder.mkdir()
                self._note("job", 0, job=self.job)
        except BaseException:
            self.__exit__()
            raise
        return self

    @property
    def resumed(self) -> int:
        """Bytes that an earlier run left."""
        return sum(self._noted.values())

    def clear(self) -> None:
        """Remove what is written."""
        self._noted = {}
        super().clear()

    def once(self, step: str, make: Callable[[], None]) -> None:
        """Do a step unless an earlier run did it; what it writes is safe afterwards."""
        if step not in self._noted:
            make()
            sync_all(self.folder)
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
            end, noted = 0, done
            for content, size in parts:
                end += size
                if end <= done:
                    continue
                self._pass_on(disk, stream, (content,) if isinstance(content, bytes) else content())
                if stream.tell() != end:
                    raise AssertionError(f"{file}: a tensor has other bytes than its shape says")
                if end - noted >= LOT:
                    if not BOOT:
                        os.fsync(stream.fileno())
                    self._note(file, end, unsafe=bool(BOOT))
                    noted = end
            os.fsync(stream.fileno())
        self._note(file, end)
        os.replace(partial, final)

    @staticmethod
    def _pass_on(disk: ThreadPoolExecutor, stream: BinaryIO, pieces: Iterable[bytes | memoryview]) -> None:
        """Write pieces, each while the next one is made."""
        writing: Future[None] | None = None
        try:
            for piece in pieces:
                if writing is not None:
                    writing.result()
                writing = disk.submit(_write_all, stream, piece)
        finally:
            if writing is not None:
                writing.result()

    def finish(self) -> None:
        """Let the folder appear.

        Raises:
            InvalidInputError: if something is in its place by now; the same job can finish later.
        """
        self.publish()
        self._journal.unlink()
        self.leave()

    def _note(self, step: str, size: int, *, unsafe: bool = False, **more: str) -> None:
        """Note a step that is safely on disk, or as `unsafe` one that is only with the system yet."""
        self._noted[step] = size
        entry = {"step": step, "bytes": size, **({"boot": BOOT} if unsafe else {}), **more}
        with self._journal.open("ab") as stream:
            stream.write(sealed(entry) + b"\n")
            stream.flush()
            if not unsafe:
                os.fsync(stream.fileno())

    def _read(self) -> dict[str, int]:
        """Return what the journal notes of this job, and cut off what cannot be read; nothing if it is of another."""
        noted: dict[str, int] = {}
        length = 0
        try:
            lines = self._journal.read_bytes().split(b"\n")
        except OSError:
            return noted
        for line in lines[:-1]:  # a last line without end was cut off
            try:
                entry = unsealed(line)  # a note with another number than was written would pass over bytes
                step, size, job, boot = entry["step"], int(entry["bytes"]), entry.get("job"), entry.get("boot", BOOT)
            except (ValueError, KeyError, TypeError):
                break
            if length == 0 and job != self.job:
                return {}
            if boot == BOOT:  # what was with the system is lost if that stopped
                noted[step] = size
            length += len(line) + 1
        if not self.folder.is_dir():
            return {}
        os.truncate(self._journal, length)
        return noted


def _write_all(stream: BinaryIO, piece: bytes | memoryview) -> None:
    view = memoryview(piece)
    while view:
        view = view[stream.write(view) :]
