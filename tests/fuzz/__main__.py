"""`python -m tests.fuzz --count 10000 --seed 0`: exits with 1 at the first fault."""

from __future__ import annotations

import argparse
import sys
import time

from tests.fuzz.runner import FaultError, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="streams (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default: 0)")
    args = parser.parse_args()
    start = time.monotonic()

    def progress(done: int) -> None:
        if done % 1000 == 0:
            print(f"{done} streams, {time.monotonic() - start:.0f} s", flush=True)

    try:
        report = run(count=args.count, seed=args.seed, progress=progress)
    except FaultError as fault:
        print(fault, file=sys.stderr)
        return 1
    for outcome, count in report.outcomes.most_common():
        print(f"{count:7} {outcome}")
    print(
        f"slowest failure {report.slowest_failure:.3f} s, slowest decoding "
        f"{report.slowest_decoding:.3f} s (CPU time), memory grew by {report.memory / 2**20:.0f} MB"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
