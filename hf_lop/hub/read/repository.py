"""The files of a commit on the Hub, read by ranges of bytes; see `hf_lop.hub.read.files`."""

import contextlib
import time

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

from hf_lop.errors import InvalidInputError
from hf_lop.hub.read.files import Folder

_FAILURES = (HfHubHTTPError, _HTTPError)
ATTEMPTS = 5  # to go on with a transfer that broke off


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
