"""Runs of a command in children of this process, which a signal stops at a counted moment, and what is then there."""

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it would not survive a fork

from interrupts_cases import Case, contents, make_inputs

SIGNALS = {"kill -9": signal.SIGKILL, "Ctrl-C": signal.SIGINT}
NAMES = ("rename", "remove", "mkdir", "rmdir", "truncate", "chmod", "link", "symlink")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
ENDED = (-int(signal.SIGKILL), 130)  # by either signal


class Moments:
    """Counts what a process does, and lets a signal come before the one that is asked for."""

    def __init__(self, at: int | None, number: int) -> None:
        self.at, self.number, self.seen = at, number, list[str]()

    def __call__(self, path: Any = "") -> None:
        """Note a moment, with the path that it is about."""
        if isinstance(path, int):
            with contextlib.suppress(OSError):
                path = os.readlink(f"/proc/self/fd/{path}")
        self.seen.append(os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else "")
        if self.at == len(self.seen) - 1:
            os.kill(os.getpid(), self.number)

    def install(self) -> None:
        """Watch this process from now on; there is no way back."""
        from hf_lop.pruner import prune
        from hf_lop.units import slice, unit

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open":
                writes = isinstance(arguments[2], int) and arguments[2] & WRITES
                if writes and arguments[0] != os.devnull:
                    self(arguments[0])
            elif event.startswith("os.") and event[3:] in NAMES:
                self(arguments[0])

        sync = os.fsync
        os.fsync = self._before(sync, lambda handle: handle)  # type: ignore[assignment]
        for module, name in ((unit, "note_size"), (slice, "set_counts"), (prune, "set_output_weights")):
            setattr(module, name, self._before(getattr(module, name), lambda *_: ""))
        sys.addaudithook(audit)

    def _before(self, call: Callable[..., Any], path: Callable[..., Any]) -> Callable[..., Any]:
        def seen(*args: Any, **kwargs: Any) -> Any:
            self(path(*args[:1]))
            return call(*args, **kwargs)

        return seen


@dataclass
class Run:
    """One run of a command.

    Attributes:
        place (`Path`): beside which nothing else of it may stay; the result is `place / "out"`.
        code (`int`): how it ended; below 0, by a signal.
        said (`str`): what it wrote to stderr.
        moments (`list[str]`): paths, where they were counted.
    """

    place: Path
    code: int
    said: str
    moments: list[str] = field(default_factory=list)


@contextlib.contextmanager
def hurried() -> Iterator[None]:
    """Make few plans and train on them briefly, and draw no picture: nothing is written meanwhile, and it takes long."""
    from matplotlib.figure import Figure

    from hf_lop.learning.predictors import train_predictor
    from hf_lop.pruner import fit, pruner

    def save(_figure: Figure, file: Any, **_: Any) -> None:
        file.write(b"no picture")

    with (
        mock.patch.object(fit, "train_predictor", partial(train_predictor, epochs=2)),
        mock.patch.object(pruner, "usual_targets", return_value=(0.2, 0.4, 0.6)),
        mock.patch.object(Figure, "savefig", save),
    ):
        yield


class Bench:
    """Inputs, and runs of commands on them.

    Args:
        folder (`Path`): where everything is written; new.
    """

    def __init__(self, folder: Path) -> None:
        import torch

        torch.set_num_threads(1)  # threads would not survive a fork
        self.folder, self._count = folder, 0
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            self.inputs = make_inputs(folder / "inputs")
        self._known: dict[str, tuple[dict[str, str], Run]] = {}

    def new(self) -> Path:
        """Return a folder for a result, with its own temporary files beside it."""
        self._count += 1
        place = self.folder / f"run-{self._count}" / "place"
        for folder in (place, place.parent / "tmp", place.parent / "assets"):
            folder.mkdir(parents=True)
        return place

    def _datasets(self) -> Any:
        """Let the library datasets keep its cache here, and not the user's."""
        import datasets

        return mock.patch.object(datasets.config, "HF_DATASETS_CACHE", self.folder / "datasets")

    def undisturbed(self, case: Case) -> tuple[dict[str, str], Run]:
        """Return what a command leaves, and a run whose moments were counted; the first time imports what it needs."""
        if case.name not in self._known:
            warm = self.new()
            with self._datasets():
                code, said = _in_process(case.arguments(self.inputs, warm / "out"))
            if code:
                raise RuntimeError(f"{case.name} fails by itself: {said[-2000:]}")
            counted = self.run(case, self.new(), at=None)
            expected, found = contents(warm), contents(counted.place)
            if counted.code or expected != found:
                other = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
                raise RuntimeError(f"Two runs of {case.name} differ in {other}: {counted.said[-2000:]}")
            self._known[case.name] = expected, counted
        return self._known[case.name]

    def run(self, case: Case, place: Path, *, at: int | None, number: int = 0, again: bool = False) -> Run:
        """Run a command in a child, which a signal stops at a moment."""
        arguments = [*case.arguments(self.inputs, place / "out"), *(case.again if again else ())]
        said, counted = place.parent / "said", place.parent / "moments.json"
        sys.stdout.flush()
        with warnings.catch_warnings(), self._datasets():
            warnings.simplefilter("ignore", DeprecationWarning)  # other threads wait, and the child needs none of them
            child = os.fork()
            if not child:
                _child(arguments, place, said, counted, Moments(at, number))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        moments = json.loads(counted.read_text()) if counted.exists() else []
        return Run(place, code, said.read_text(errors="replace"), moments)

    def stop(self, case: Case, number: int, at: int) -> "Stopped":
        """Stop a command at a moment, look at what is there, and run it again."""
        expected, _ = self.undisturbed(case)
        stopped = self.run(case, self.new(), at=at, number=number)
        place, out = stopped.place, stopped.place / "out"
        there, wanted = _results(contents(place)), _results(expected)
        whole, torn = there == wanted, any(there[name] != wanted.get(name) for name in there)
        wrong = (torn if case.single else not whole) and _is_a_result(case, out, self.folder)
        unclean = stopped.code not in (*ENDED, 0) or (stopped.code == 130 and not _one_line(stopped.said))
        rerun = self.run(case, place, at=None, again=True)
        refused = whole and rerun.code == 1 and "is not empty" in rerun.said  # there is nothing left to do
        found = contents(place)
        failed = rerun.code != 0 and not refused
        failed = failed or any(found.get(name) != expected[name] for name in expected)
        left = sorted(found.keys() - expected.keys())
        left += [name for folder in ("tmp", "assets") for name in contents(place.parent / folder)]
        shutil.rmtree(place.parent)
        return Stopped(at, wrong, unclean, failed, left, stopped.said + rerun.said)


def _results(found: dict[str, str]) -> dict[str, str]:
    """Leave out what a command keeps for itself: journals, caches, what is not finished."""
    kept = ("out.journal", "out/fit-", "out/rows.jsonl", "out/cache")
    return {name: digest for name, digest in found.items() if not name.startswith(kept) and "/." not in f"/{name}"}


def _is_a_result(case: Case, out: Path, folder: Path) -> bool:
    """Whether something that is not the result is read as one."""
    if not out.exists():
        return False
    with tempfile.TemporaryDirectory(dir=folder) as scratch, contextlib.suppress(Exception):
        copy = shutil.copytree(out, Path(scratch, "out"))
        case.loads(copy)
        return True
    return False


def _one_line(said: str) -> bool:
    """Whether an interrupted command says that it was, without a traceback."""
    return "Traceback" not in said and said.rstrip().rpartition("\n")[2].startswith("Interrupted")


def _in_process(arguments: Sequence[str]) -> tuple[int, str]:
    """Run a command here, and return its exit code and what it said."""
    from hf_lop.cli import main

    said, before = io.StringIO(), sys.argv
    sys.argv = ["hf-lop", *arguments]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            main()
    except SystemExit as stop:
        return int(stop.code or 0), said.getvalue()
    finally:
        sys.argv = before
    return 0, said.getvalue()


def _child(arguments: Sequence[str], place: Path, said: Path, counted: Path, moments: Moments) -> None:
    """Be a command, with temporary files of its own, and end as it would."""
    code = 1
    try:
        for stream in (1, 2):
            os.dup2(os.open(said if stream == 2 else os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))
        import huggingface_hub.constants

        tempfile.tempdir = os.environ["TMPDIR"] = str(place.parent / "tmp")
        huggingface_hub.constants.HF_ASSETS_CACHE = str(place.parent / "assets")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["hf-lop", *arguments]
        from hf_lop.cli import main

        moments.install()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        seen, moments.at = list(moments.seen), None
        counted.write_text(json.dumps(seen))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


@dataclass(frozen=True, slots=True)
class Stopped:
    """What a stop did.

    Attributes:
        at (`int`): the moment.
        wrong (`bool`): whether what was there after it was read as a result, and is none.
        unclean (`bool`): whether the command ended otherwise than by the signal, or with more than a line.
        failed (`bool`): whether the same command then did not give the result.
        left (`list[str]`): what was there then besides.
        said (`str`): what both runs wrote to stderr.
    """

    at: int
    wrong: bool
    unclean: bool
    failed: bool
    left: list[str]
    said: str

    @property
    def right(self) -> bool:
        """Whether all is as it should be."""
        return not (self.wrong or self.unclean or self.failed or self.left)


def between(moments: Sequence[str], place: Path) -> range:
    """Return the moments from the first change of what a command writes to the last."""
    writes = [index for index, path in enumerate(moments) if path.startswith(f"{place}/")]
    return range(writes[0], writes[-1] + 1)


def choose(moments: Sequence[str], place: Path, count: int) -> list[int]:
    """Choose moments, spread evenly: two thirds between the first and the last write, the others before and after."""
    inside = between(moments, place)
    outside = [index for index in range(len(moments)) if index not in inside]
    wanted = min(max(count - len(outside), -(-2 * count // 3)), len(inside))
    return sorted([*_spread(inside, wanted), *_spread(outside, count - wanted)])


def _spread(places: Sequence[int], count: int) -> list[int]:
    count = min(count, len(places))
    return [places[int((index + 0.5) * len(places) / count)] for index in range(count)]
