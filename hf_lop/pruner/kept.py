"""What a fit leaves in its journal folder beside the evaluations: measurements, and the seconds that they took."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hf_lop.errors import InvalidInputError
from hf_lop.hub.write.whole import write_whole
from hf_lop.learning.processes import Processes


class Clock:
    """Seconds that each phase took when it was run first, as a journal answers it at once from then on."""

    def __init__(self, journal: str | Path | None, processes: Processes) -> None:
        self.path = None if journal is None else Path(journal) / "seconds.json"
        self.processes, self.seconds, self.start = processes, dict[str, float](), time.perf_counter()

    def stop(self, phase: str, share: float = 1.0) -> None:
        """Note a phase that has ended, of which `1 / share` was measured; the next one starts."""
        spent = round(share * (time.perf_counter() - self.start), 3)

        def first() -> float:
            known: dict[str, float] = {}
            if self.path is not None and self.path.is_file():
                known = json.loads(self.path.read_text(encoding="utf-8"))
            if self.path is not None and phase not in known:
                write_whole(self.path, json.dumps({**known, phase: spent}).encode())
            return known.get(phase, spent)

        self.seconds[phase] = self.processes.from_main(first)
        self.start = time.perf_counter()


def kept_array(
    path: Path, settings: dict[str, Any], measure: Callable[[], np.ndarray], processes: Processes
) -> np.ndarray:
    """Return a measurement from its file, or make it and write the file; the file is the main process's."""
    wanted = json.loads(json.dumps(settings))

    def read() -> np.ndarray | None:
        if not path.is_file():
            return None
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["settings"] != wanted:
            known = stored["settings"]
            different = [key for key in {**wanted, **known} if known.get(key) != wanted.get(key)]
            raise InvalidInputError(
                f"{path} was measured with another {', '.join(different)}. Choose another journal folder, or remove it."
            )
        return np.array(stored["damage"])

    damage = processes.from_main(read)
    if damage is None:
        damage = measure()
        if processes.main:
            write_whole(path, json.dumps({"settings": wanted, "damage": damage.tolist()}).encode())
    return damage
