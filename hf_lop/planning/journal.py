"""An append-only record of evaluations, so that a killed search resumes exactly.

A folder holds one JSONL file per process. The first line of a file names the settings under which rewards were measured;
every further line is one evaluation: `{"target": 0.3, "widths": [...], "reward": -0.12}`. Widths `[L]` are the quantised
ratios of a candidate, and so its key.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hf_lop.errors import InvalidInputError


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
        self.folder.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(self.path)
        self._rewards: dict[tuple[int, ...], float] = {}
        self.refresh()
        self._file = self.path.open("ab")
        if not self._file.tell():
            self._write({"journal": 1, "fingerprint": self.fingerprint, "settings": self.settings})

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
        self._write({"target": target, "widths": list(widths), "reward": reward})
        self._rewards[widths] = reward

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

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
    *lines, _ = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if number > 1:
                evaluation = Evaluation(float(entry["target"]), tuple(entry["widths"]), float(entry["reward"]))
            else:
                written = dict(entry["settings"])
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidInputError(
                f"Line {number} of {path} is no entry of a journal ({error!r}). Delete that line, or start a new folder."
            ) from error
        if number > 1:
            yield evaluation
        elif settings is not None and (differences := _differences(written, json.loads(_canonical(settings)))):
            raise InvalidInputError(
                f"{path} was written under other settings: {'; '.join(differences)}. Use the same settings to resume, or "
                "another folder to start anew."
            )


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


def _cut_torn_line(path: Path) -> None:
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def _canonical(settings: Mapping[str, Any]) -> str:
    try:
        return json.dumps(settings, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"The settings of a journal must be JSON types, but {error}.") from error


def _differences(written: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Name every setting that is not equal, the way messages show them."""
    absent = object()
    return [
        f"{name} was {_show(written, name)} and is now {_show(wanted, name)}"
        for name in sorted({*written, *wanted})
        if written.get(name, absent) != wanted.get(name, absent)
    ]


def _show(settings: Mapping[str, Any], name: str) -> str:
    return json.dumps(settings[name]) if name in settings else "absent"
