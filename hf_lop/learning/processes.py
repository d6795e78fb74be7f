"""Several processes, started by `accelerate launch` or torchrun: work is split over them, and all get the same results.

Every process runs the same code on the same data and takes every n-th batch. Everything they tell each other goes through
one exchange, an all-gather of small objects, so that an error of one process reaches all others where they wait for it.
"""

import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tqdm.auto import tqdm

from hf_lop.errors import InvalidInputError, ProcessError

T = TypeVar("T")
A = TypeVar("A")

_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # torchrun, and three kinds of MPI


@dataclass(frozen=True, slots=True)
class _Task(Generic[A]):
    """What the main process asks all others to do, instead of its result."""

    argument: A


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of one run; a single one, which exchanges nothing, by default.

    Attributes:
        index (`int`): of this process, from 0.
        count (`int`): how many there are.
        exchange (`Callable`): returns what every process passed to it, by index. Blocks until all have called it.
        device (`str`): where this process should compute.
    """

    index: int = 0
    count: int = 1
    exchange: Callable[[Any], list[Any]] = lambda value: [value]
    device: str = "cpu"

    @property
    def main(self) -> bool:
        """Whether this process is the one that keeps the journal, prints and writes."""
        return self.index == 0

    def takes(self, position: int) -> bool:
        """Whether the batch at a position is this process's."""
        return position % self.count == self.index

    def bar(self, batches: Iterable[T], what: str) -> Iterable[T]:
        """Show on stderr how far the main process is."""
        return tqdm(batches, desc=what, unit="batch") if self.main else batches

    def gather(self, compute: Callable[[], T]) -> list[T]:
        """Run something in every process, and return all results, by the index of the process.

        Raises:
            Exception: what `compute` raised here.
            ProcessError: if it failed in another process, or one is gone.
        """
        if self.count == 1:
            return [compute()]
        own, failed = None, None
        try:
            own = compute()
        except Exception as error:
            failed = error
        try:
            found = self.exchange((own, None if failed is None else f"{type(failed).__name__}: {failed}"))
        finally:
            if failed is not None:  # also where nobody is left to be told
                raise failed
        for index, (_, message) in enumerate(found):
            if message is not None:
                raise ProcessError(f"Process {index} of {self.count} stopped, and so do all others. {message}")
        return [value for value, _ in found]

    def from_main(self, make: Callable[[], T], serve: Callable[[Any], object] = lambda _: None) -> T:
        """Run something in the main process alone, and return its result in every process.

        Args:
            make (`Callable`): may call [`~Processes.together`].
            serve (`Callable`): what the other processes do with the argument of each such call.

        Raises:
            Exception: in the main process, what `make` raised.
            ProcessError: in the others, if it failed, or if one is gone.
        """
        if self.main:
            return self.gather(make)[0]
        failed: Exception | None = None

        def report() -> Any:
            if failed is not None:
                raise failed

        while isinstance(answer := self.gather(report)[0], _Task):
            try:
                serve(answer.argument)
            except Exception as error:  # the next exchange tells the main process, which decides
                failed = error
        result: T = answer
        return result

    def together(self, function: Callable[[A], T], argument: A) -> T:
        """Call a function in the main process, inside of `from_main`, while the others serve the same argument."""
        self.gather(lambda: _Task(argument))
        return function(argument)

    def agree(self, what: str, value: Any) -> None:
        """Check that all processes hold the same value.

        Raises:
            InvalidInputError: if they do not.
        """
        values = self.gather(lambda: value)
        if any(other != values[0] for other in values):
            raise InvalidInputError(
                f"{what} differ between the processes: {values}. Give every process the same; hf_lop splits them."
            )


def launched() -> Processes:
    """Join the processes that `accelerate launch`, torchrun or MPI started; without them, this one is alone.

    Nothing is imported or set up for a process that is alone. Several processes use the group that is there, or make one
    with accelerate's defaults: on the CPU where there is no accelerator or ACCELERATE_USE_CPU is true.
    """
    count = max(int(os.environ.get(name) or 1) for name in _COUNTS)
    if count == 1:
        if {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= set(os.environ):
            warnings.warn(
                "accelerate launch was asked for several processes but started one, as it does without a GPU. "
                "Pass --multi_gpu, which starts processes on the CPU too, or use torchrun --nproc_per_node.",
                stacklevel=2,
            )
        return Processes()
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object, str_to_bool

    cpu = bool(str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "false"))) or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu)
    if state.num_processes != count:
        raise InvalidInputError(
            f"{count} processes were started, but accelerate was set up for {state.num_processes}, as it is without a GPU. "
            "Set ACCELERATE_USE_CPU=true, or use Accelerator(cpu=True)."
        )

    def exchange(value: Any) -> list[Any]:
        try:
            return list(gather_object([value]))
        except RuntimeError as error:
            raise ProcessError(
                f"Process {state.process_index} of {state.num_processes} cannot reach the others any more ({error}). One "
                "was killed, or kept the others waiting for too long. Start all again with the same journal to go on."
            ) from error

    return Processes(state.process_index, state.num_processes, exchange, str(state.device))
