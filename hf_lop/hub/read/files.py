"""The files of a checkpoint: those of a local folder, and those of a commit on the Hub, read by ranges of bytes."""

import contextlib
import os
import stat
import threading
import time
from pathlib import Path
from typing import BinaryIO, Protocol

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    get_session,
    hf_hub_url,
    hf_raise_for_status,
    try_to_load_from_cache,
)
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from huggingface_hub.errors import HTTPError as _HTTPError  # type: ignore[attr-defined]  # of its HTTP client
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from hf_lop.errors import CheckpointMismatchError, InvalidInputError

_FAILURES = (HfHubHTTPError, _HTTPError)
ATTEMPTS = 5  # to go on with a transfer that broke off


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
            # By position: after a fork both processes would move the one that they share.
            count = os.preadv(stream.fileno(), [buffer[done:]], start + done)
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


class Repository:
    """The files of one commit on the Hub: those in the local cache are read there, of others just the bytes asked for."""

    def __init__(self, repo_id: str, commit: str, *, token: str | bool | None = None) -> None:
        self.repo_id, self.commit, self.token = repo_id, commit, token
        self.name = f"{repo_id} at {commit[:12]}"
        self.hint = " HF_HUB_OFFLINE is set: only the local cache was looked at." if constants.HF_HUB_OFFLINE else ""
        self._sizes: dict[str, int | None] = {}
        self._cached: dict[str, Folder] = {}

    def _url(self, file: str) -> str:
        return hf_hub_url(self.repo_id, file, revision=self.commit)

    def size(self, file: str) -> int | None:
        """Return the bytes of a file, or None if there is none."""
        if file not in self._sizes:
            path = try_to_load_from_cache(self.repo_id, file, revision=self.commit)
            if isinstance(path, str):
                self._cached[file] = Folder(path.removesuffix(file))
                self._sizes[file] = self._cached[file].size(file)
            elif path is None and not constants.HF_HUB_OFFLINE:
                self._sizes[file] = self._ask(file)
            else:  # known to be absent, or nobody can be asked
                self._sizes[file] = None
        return self._sizes[file]

    def _ask(self, file: str) -> int | None:
        try:
            size = get_hf_file_metadata(self._url(file), token=self.token, retry_on_errors=True).size
        except EntryNotFoundError:
            return None
        except _FAILURES as error:
            raise InvalidInputError(f"{file} of {self.name} cannot be read: {error} Try again.") from error
        if size is None:
            raise InvalidInputError(f"The Hub does not say how large {file} of {self.name} is. Download it first.")
        return size

    def stamp(self, file: str) -> str:
        """Return what changes when a file does: the commit."""
        return self.commit

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill a buffer; see `Files`. What broke off goes on where it stopped."""
        self.size(file)
        if file in self._cached:
            return self._cached[file].read_into(file, start, buffer)
        done = attempt = 0
        while done < len(buffer):
            before = done
            try:
                done = self._transfer(file, start, buffer, done)
            except _FAILURES as error:
                response = getattr(error, "response", None)
                attempt += 1
                if attempt == ATTEMPTS or (response is not None and response.status_code in (401, 403, 404, 416)):
                    raise InvalidInputError(f"{file} of {self.name} cannot be read: {error} Try again.") from error
                time.sleep(min(2.0**attempt, 8.0))
            else:
                attempt = 0 if done > before else attempt + 1
                if attempt == ATTEMPTS:
                    raise InvalidInputError(f"{file} of {self.name}: the server sends nothing. Try again.")
        return None

    def _transfer(self, file: str, start: int, buffer: memoryview, done: int) -> int:
        """Ask for what is missing of a buffer; return how much of it is filled when the answer ends."""
        first, last = start + done, start + len(buffer) - 1
        headers = build_hf_headers(token=self.token)
        headers |= {"Range": f"bytes={first}-{last}", "Accept-Encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream(
            "GET", self._url(file), headers=headers, follow_redirects=True, timeout=timeout
        ) as answer:
            hf_raise_for_status(answer)
            given = answer.headers.get("Content-Range", "")
            if answer.status_code != 206 or not given.startswith(f"bytes {first}-"):
                raise InvalidInputError(
                    f"{self._url(file)} was asked for bytes {first} to {last} and gave {given or 'all of the file'}. "
                    "The server cannot read ranges: download the repository first and pass its folder."
                )
            with contextlib.suppress(_HTTPError):  # what came is good; the rest is asked for again
                for chunk in answer.iter_bytes(2**20):
                    part = chunk[: len(buffer) - done]
                    buffer[done : done + len(part)] = part
                    done += len(part)
        return done

    def close(self) -> None:
        """Close files of the cache."""
        for folder in self._cached.values():
            folder.close()
