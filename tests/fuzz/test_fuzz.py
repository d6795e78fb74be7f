"""A fuzz of what hf_lop reads, for a minute; and what it found once.

It begins at seed 0, so that a change is not refused for what was there before; `FUZZ_SEED=random pytest tests/fuzz` looks for more,
and `FUZZ_SEED=<seed>` repeats a run. What failed is written to `found/`; commit it with the fix, and it is tried every time.
"""

import os

import pytest

from tests.fuzz.table import FOUND, TARGETS, run_case, run_target

SECONDS = 60  # for all targets together; to make what they damage takes a part of it
EACH = 0.65 * SECONDS / len(TARGETS)
ASKED = os.environ.get("FUZZ_SEED", "0")
FIRST = int.from_bytes(os.urandom(4), "big") if ASKED == "random" else int(ASKED)
BY_NAME = {target.name: target for target in TARGETS}
KEPT = sorted(path.name for path in FOUND.iterdir()) if FOUND.is_dir() else []


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_equal_or_refused(name):
    seen = run_target(BY_NAME[name], FIRST, seconds=EACH, keep=FOUND)
    print(f"{name} from seed {FIRST}: {dict(seen.counts)}")
    assert not seen.failed, "\n".join(
        [
            f"FUZZ_SEED={FIRST} repeats this; what was read is in {FOUND.name}/:",
            *(f"{name}.{seed}: {outcome.reason}" for seed, outcome in seen.failed),
        ]
    )


@pytest.mark.parametrize("name", KEPT)
def test_what_was_found_once(name):
    outcome = run_case(BY_NAME[name.rsplit(".", 1)[0]], (FOUND / name).read_bytes())
    assert outcome.kind != "failed", outcome.reason
