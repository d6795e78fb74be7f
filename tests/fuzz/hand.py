"""Many cases by hand: `python -m tests.fuzz.hand COUNT TARGET...`."""

import sys
import time
from collections import Counter

from tests.fuzz.table import TARGETS, run_target

if __name__ == "__main__":
    count, *names = sys.argv[1:]
    first = 0
    if ":" in count:
        first, count = (int(part) for part in count.split(":"))
    for target in TARGETS:
        if not names or any(target.name.startswith(name) for name in names):
            start = time.perf_counter()
            seen, kinds = run_target(target, first, int(count)), Counter()
            print(target.name, dict(seen.counts), f"{time.perf_counter() - start:.1f} s")
            for seed, outcome in seen.failed[:400]:
                key = outcome.reason[:110]
                kinds[key] += 1
                if kinds[key] <= 1:
                    print("   ", seed, outcome.reason)
            if "-v" in sys.argv:
                print(Counter(reason[:90] for reason in seen.refused).most_common(12))
