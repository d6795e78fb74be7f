"""A run of a fit: what its journal folder keeps, the seconds its phases took, and the processes that share it."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hf_lop.errors import InvalidInputError
from hf_lop.files import write_whole
from hf_lop.learning.processes import launched
from hf_lop.planning.journal import AGAIN, Journal, check_settings, read_json, sealed


class Run:
    """Keeps the results of a fit's phases, so that the method itself need not know of journals, clocks or processes.

    Attributes:
        folder (`Path`, *optional*): of the journal; without one, nothing is kept.
        processes (`Processes`): those that `accelerate launch` or torchrun started; the main one keeps the journal.
        settings (`dict`): what results depend on, as JSON types; a journal of others is refused.
        seconds (`dict[str, float]`): by phase, what it took when it was run first.
    """

    def __init__(self, journal: str | Path | None) -> None:
        self.folder = None if journal is None else Path(journal)
        self.processes = launched()
        self.settings: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self._measured = 1.0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note the seconds of a phase, as they were when it was run first: a journal answers it at once from then on."""
        start, self._measured = time.perf_counter(), 1.0
        yield
        spent = round((time.perf_counter() - start) / self._measured, 3)

        def first() -> float:
            known: dict[str, float] = {}
            path = None if self.folder is None else self.folder / "seconds.json"
            if path is not None and path.is_file():
                known = read_json(path)
                if not all(type(value) in (int, float) and 0 <= value < math.inf for value in known.values()):
                    raise InvalidInputError(f"{path} holds {str(known)[:200]}; seconds by phase belong there. {AGAIN}")
            if path is not None and name not in known:
                write_whole(path, sealed({**known, name: spent}))
            return known.get(name, spent)

        self.seconds[name] = self.processes.from_main(first)

    def array(self, name: str, shape: tuple[int, ...], measure: Callable[[], np.ndarray]) -> np.ndarray:
        """Return a measurement of a shape from the file of its name, or make it and write the file.

        Raises:
            InvalidInputError: if it was measured under other settings, or the file is damaged.
        """
        if self.folder is None:
            return measure()
        path, wanted = self.folder / f"{name}.json", json.loads(json.dumps(self.settings))

        def read() -> np.ndarray | None:
            if not path.is_file():
                return None
            stored = read_json(path)
            check_settings(path, stored.get("settings") or {}, wanted)
            try:
                damage = np.array(stored["damage"])
            except (KeyError, ValueError) as error:
                raise InvalidInputError(f"{path} is no measurement of a fit ({error!r}). {AGAIN}") from error
            if damage.shape != shape or damage.dtype.kind not in "fi" or not np.isfinite(damage).all():
                raise InvalidInputError(
                    f"{path} is no measurement of a fit: finite numbers {list(shape)} belong there. {AGAIN}"
                )
            return damage

        found = self.processes.from_main(read)
        if found is None:
            found = measure()
            if self.processes.main:
                write_whole(path, sealed({"settings": wanted, "damage": found.tolist()}))
        return found

    def search(
        self,
        score: Callable[[Any], Any],
        search: Callable[[Callable[[Any], Any], Journal | None], Any],
        **settings: Any,
    ) -> Any:
        """Run a search in the main process, while the others score every candidate with it; return its result in all.

        Args:
            score (`Callable`): scores a candidate, together with the other processes.
            search (`Callable`): given what scores and the journal, searches.
            **settings: what rewards depend on besides.

        Raises:
            InvalidInputError: if the journal belongs to other settings.
        """

        def searched() -> tuple[Any, float]:
            kept = Journal(self.folder, {**self.settings, **settings}) if self.folder else contextlib.nullcontext()
            with kept as journal:
                before = 0 if journal is None else len(journal)
                found = search(lambda candidate: self.processes.together(score, candidate), journal)
                after = 0 if journal is None else len(journal)
            # A resumed search measured a part of its evaluations only; the others took as long.
            return found, (after - before) / after if after > before else 1.0

        found, self._measured = self.processes.from_main(searched, serve=score)
        return found
