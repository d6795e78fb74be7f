"""One target of the fuzz: damage that a seed draws, what reads it, and the verdict: refused, equal, or failed."""

import contextlib
import random
import resource
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_lop.errors import LOPError
from tests.fuzz.world import World

SECONDS = 20  # of computing, for what takes a tenth of one
ROOM = 3 * 2**30  # bytes, for what takes some kilobytes


class Wrong(Exception):
    """A result that is not that of the undamaged input, and nobody said so."""


class Hang(BaseException):
    """Beyond the time that a case may take; not an Exception, as those are caught on the way."""


@dataclass(frozen=True, slots=True)
class Target:
    """What is damaged and read.

    Attributes:
        name: of the target, and of its files among those that were found.
        make: draws damage and returns it as the bytes of a file.
        run: reads it, in a folder of its own; returns if the result is right, raises `Wrong` if it is not.
        theirs: tells whether an error is another library's own, which it raises for a dense model too.
    """

    name: str
    make: Callable[[World, random.Random], bytes]
    run: Callable[[World, bytes, Path], None]
    theirs: Callable[[Exception], bool] = lambda error: False


@dataclass(frozen=True, slots=True)
class Outcome:
    kind: str  # "refused", "equal" or "failed"
    reason: str = ""


def damage_of(target: Target, world: World, seed: int) -> bytes:
    return target.make(world, random.Random(f"{target.name} {seed}"))


def judge(target: Target, world: World, damage: bytes) -> Outcome:
    """Run one case."""
    try:
        with limits(), warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=world.root) as folder:
            warnings.simplefilter("ignore")
            target.run(world, damage, Path(folder))
    except LOPError as error:
        text = str(error)
        return (
            Outcome("refused", text)
            if 0 < len(text) < 5000
            else Outcome("failed", f"a message of {len(text)} characters")
        )
    except Wrong as error:
        return Outcome("failed", f"wrong in silence: {error}")
    except Hang:
        return Outcome("failed", f"no end after {SECONDS} seconds")
    except Exception as error:
        if target.theirs(error):
            return Outcome("refused", f"{type(error).__name__} of another library")
        last = traceback.format_exception(error)[-1].strip()[:300]
        places = [
            f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[-6:]
        ]
        return Outcome("failed", f"{last} at {' > '.join(places)}")
    return Outcome("equal")


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Within it, neither time nor memory is without end."""

    def stop(*_: Any) -> None:
        raise Hang

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGVTALRM, stop)  # pytest-timeout has the other timer
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
