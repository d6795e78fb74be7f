"""Files by which a killed run resumes exactly: settings, then entries, each safe on disk when it was added.

The first line of a file names the settings under which its entries were made; every further line is an entry. A journal of
a search is a folder with one such file per process, whose entries are evaluations: `{"target": 0.3, "widths": [...],
"reward": -0.12}`. Widths `[L]` are the quantised ratios of a candidate, and so its key. Every line ends with a checksum of
the rest of it, since a number of which one digit is another looks like any other.
"""

import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeVar

from hf_lop.errors import InvalidInputError

Entry = TypeVar("Entry")
AGAIN = "Delete it: what it held is measured again."
SEAL = re.compile(rb', "check": "([0-9a-f]{8})"\}\Z')


def sealed(entry: Mapping[str, Any]) -> bytes:
    """Return a JSON object, which must not be empty, as one line, with a checksum as its last value."""
    text = json.dumps(entry, allow_nan=False).encode()
    return text[:-1] + b', "check": "%08x"}' % zlib.crc32(text)


def unsealed(line: bytes, *, strict: bool = True) -> dict[str, Any]:
    """Return the JSON object of a line that [`sealed`] made; unless `strict`, also one of version 0.1, without a checksum.

    Raises:
        ValueError: if it is damaged.
    """
    if found := SEAL.search(line):
        line = line[: found.start()] + b"}"
        if int(found[1], 16) != zlib.crc32(line):
            raise ValueError("its checksum is that of another line")
    elif strict:
        raise ValueError("it has no checksum")
    try:
        entry = json.loads(line)
    except RecursionError as error:
        raise ValueError("it is nested without end") from error
    if not isinstance(entry, dict):
        raise ValueError("it is no JSON object")
    if "check" in entry:
        raise ValueError("its checksum is not at its end")
    return entry


def open_entries(path: Path, header: Mapping[str, Any]) -> BinaryIO:
    """Open a file to add entries; a last line that a killed process left unfinished is cut off.

    Args:
        path (`Path`): the file; made, with its first line, if it does not exist.
        header (`Mapping`): that line: the settings that entries depend on, or what holds them, as JSON types.

    Returns:
        `BinaryIO`: the file, which no other process opens until it is closed.

    Raises:
        InvalidInputError: if another process has it open.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    try:
        _lock(file, path)
        if (content := path.read_bytes()) and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
            file.seek(0, os.SEEK_END)
        if not file.tell():
            add_entry(file, header)
    except BaseException:
        file.close()
        raise
    return file


def _lock(file: BinaryIO, path: Path) -> None:
    """Keep other processes from a file until it is closed: what one is writing would look unfinished to the other."""
    try:
        import fcntl
    except ImportError:  # no POSIX
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InvalidInputError(
            f"Another process is writing {path}. Wait for it, or use another folder for this run."
        ) from error
    except OSError:  # a file system without locks
        return


def add_entry(file: BinaryIO, entry: Mapping[str, Any]) -> None:
    """Add a line; it survives whatever happens to the process after this call."""
    file.write(sealed(entry) + b"\n")
    file.flush()
    os.fsync(file.fileno())


def read_entries(
    path: Path,
    settings: Mapping[str, Any] | None,
    parse: Callable[[dict[str, Any]], Entry],
    *,
    settings_of: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Iterator[Entry]:
    """Read the entries of a file in their order; an unfinished last line is left out.

    Args:
        path (`Path`): the file; one that does not exist has no entries.
        settings (`Mapping`, *optional*): those that it must have been written under; any when omitted.
        parse (`Callable`): reads an entry.
        settings_of (`Callable`): finds the settings in the first line; by default that is nothing else.

    Raises:
        InvalidInputError: if the settings differ (the message says which), or a line is damaged.
    """
    *lines, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
    strict = any(SEAL.search(line) for line in lines)  # else it is of an older version
    for number, line in enumerate(lines, start=1):
        try:
            entry = unsealed(line, strict=strict)
            if number > 1:
                parsed = parse(entry)
            else:
                written = settings_of(entry)
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidInputError(
                f"Line {number} of {path} is no entry of a journal ({_cause(error)}). Delete that line, or start a new folder."
            ) from error
        if number > 1:
            yield parsed
        elif settings is not None:
            check_settings(path, written, settings)


def check_settings(path: Path, written: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse to go on with what was made under other settings.

    Args:
        path (`Path`): where it is.
        written (`Mapping`): the settings that are noted there.
        settings (`Mapping`): those of this run.

    Raises:
        InvalidInputError: if one differs; the message names all that do, with both values.
    """
    if not isinstance(written, Mapping):
        raise InvalidInputError(f"{path} names no settings but {str(written)[:200]!r}. {AGAIN}")
    wanted = json.loads(_canonical(settings))
    absent = object()
    differences = [
        f"{name} was {_show(written, name)} and is now {_show(wanted, name)}"
        for name in sorted({*written, *wanted})
        if written.get(name, absent) != wanted.get(name, absent)
    ]
    if differences:
        raise InvalidInputError(
            f"{path} was written under other settings: {'; '.join(differences)[:2000]}. Use the same settings to resume, or another "
            "folder to start anew."
        )


# -- Searches ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One line of a journal.

    Attributes:
        target (`float`): the target ratio whose search asked for it.
        widths (`tuple[int, ...]`): `[L]` kept neurons.
        reward (`float`): what they are worth.
    """

    target: float
    widths: tuple[int, ...]
    reward: float


class Journal:
    """Rewards that are known already, and the file to which this process adds its own.

    Opening reads the files of all processes. Where two know a candidate, the first file by name counts. Every
    evaluation is on disk when `add` returns. A last line that a killed process left unfinished is cut off.

    Args:
        folder (`Path`): one folder per set of settings; made if it does not exist.
        settings (`Mapping`): everything the reward depends on (model, its commit, data, criterion, ...) and whatever
            else must not change between runs, as JSON types.
        process (`int`): number of this process; it alone writes `evaluations-<process>.jsonl`.

    Raises:
        InvalidInputError: If a file of the folder was written under other settings or is no journal.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], *, process: int = 0) -> None:
        self.folder = Path(folder)
        self.settings: dict[str, Any] = json.loads(_canonical(settings))
        self.fingerprint = sha256(_canonical(settings).encode()).hexdigest()[:16]
        self.path = self.folder / f"evaluations-{process:05d}.jsonl"
        self._rewards: dict[tuple[int, ...], float] = {}
        self.refresh()
        header = {"journal": 1, "fingerprint": self.fingerprint, "settings": self.settings}
        self._file = open_entries(self.path, header)

    def refresh(self) -> None:
        """Read what other processes have added; what is known already stays as it is."""
        for path in _files(self.folder):
            for evaluation in read_journal(path, self.settings):
                self._rewards.setdefault(evaluation.widths, evaluation.reward)

    def get(self, widths: tuple[int, ...]) -> float | None:
        """Return the reward of a candidate, if it is known."""
        return self._rewards.get(widths)

    def add(self, target: float, widths: tuple[int, ...], reward: float) -> None:
        """Record an evaluation; it survives whatever happens to the process after this call."""
        add_entry(self._file, {"target": target, "widths": list(widths), "reward": reward})
        self._rewards[widths] = reward

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __len__(self) -> int:
        return len(self._rewards)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_journal(path: str | Path, settings: Mapping[str, Any] | None = None) -> Iterator[Evaluation]:
    """Read one file; an unfinished last line is left out.

    Args:
        path: The file.
        settings: The settings it must have been written under; any when omitted.

    Yields:
        `Evaluation`: in the order they were made.

    Raises:
        InvalidInputError: If the settings differ (the message says which), or a line is damaged.
    """
    return read_entries(Path(path), settings, _evaluation, settings_of=lambda header: dict(header["settings"]))


def _evaluation(entry: dict[str, Any]) -> Evaluation:
    target, widths, reward = entry["target"], entry["widths"], entry["reward"]
    if not all(type(number) in (int, float) and math.isfinite(number) for number in (target, reward)):
        raise ValueError(f"target {target!r} and reward {reward!r} must be numbers")
    if not isinstance(widths, list) or not all(type(width) is int and width > 0 for width in widths):
        raise ValueError(f"widths {widths!r} must be a list of positive integers")
    return Evaluation(float(target), tuple(widths), float(reward))


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of a journal that holds one JSON object, as [`sealed`] made it.

    Raises:
        InvalidInputError: if it is torn or damaged.
    """
    try:
        return unsealed(path.read_bytes(), strict=False)
    except ValueError as error:
        raise InvalidInputError(f"{path} is no file of a journal ({_cause(error)}). {AGAIN}") from error


def merge_journals(folder: str | Path, settings: Mapping[str, Any] | None = None) -> list[Evaluation]:
    """Read the files of all processes: every candidate once, in the order of file names and lines.

    Args:
        folder: Where they are.
        settings: See `read_journal`.

    Raises:
        InvalidInputError: See `read_journal`.
    """
    merged: dict[tuple[int, ...], Evaluation] = {}
    for path in _files(Path(folder)):
        for evaluation in read_journal(path, settings):
            merged.setdefault(evaluation.widths, evaluation)
    return list(merged.values())


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("evaluations-*.jsonl"))


def _canonical(settings: Mapping[str, Any]) -> str:
    try:
        return json.dumps(settings, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"The settings of a journal must be JSON types, but {error}.") from error


def _show(settings: Mapping[str, Any], name: str) -> str:
    return json.dumps(settings[name])[:200] if name in settings else "absent"


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"
