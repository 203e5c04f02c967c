"""`python -m faults [--only TEXT] [--json]` (from tests/): do every fault to real training and print what became of it."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from dataclasses import asdict

from tqdm import tqdm

from faults.catalogue import FAULTS
from faults.laboratory import Laboratory, Outcome

YES_NO = {True: "yes", False: "no", None: "-"}


def main() -> int:
    """Return 0 where every fault came out as it has to."""
    parser = argparse.ArgumentParser(prog="faults", description=__doc__)
    parser.add_argument("--only", default="", help="faults whose name matches this regular expression")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of ranks and moments (default: the time)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    chosen = {name: fault for name, fault in FAULTS.items() if re.search(arguments.only, name)}
    outcomes: dict[str, Outcome] = {}
    begin = time.monotonic()
    with Laboratory(seed=arguments.seed) as lab:
        for name, fault in tqdm(chosen.items(), desc="faults", disable=not sys.stderr.isatty()):
            outcomes[name] = fault(lab)
            print(row(name, outcomes[name]), file=sys.stderr, flush=True)
            for problem in outcomes[name].problems:
                print(f"    {problem}", file=sys.stderr)
    passed = sum(outcome.passes for outcome in outcomes.values())
    if arguments.json:
        print(json.dumps({name: asdict(outcome) | {"passes": outcome.passes} for name, outcome in outcomes.items()}))
    else:
        print(f"\n{row('fault', None)}\n" + "\n".join(row(name, outcome) for name, outcome in outcomes.items()))
        print(
            f"{passed} of {len(outcomes)} as they have to be, seed {arguments.seed}, {time.monotonic() - begin:.0f} s"
        )
    return 0 if passed == len(outcomes) else 1


def row(name: str, outcome: Outcome | None) -> str:
    """Return one line of the table; its head where there is no outcome."""
    if outcome is None:
        return f"{name:<40} {'detected':>9} {'survived':>9} {'bit-equal':>10}  verdict"
    detected = "-" if outcome.detected_seconds is None else f"{outcome.detected_seconds:.1f} s"
    equal = YES_NO[outcome.bit_equal]
    verdict = "PASS" if outcome.passes else "FAIL"
    return f"{name:<40} {detected:>9} {YES_NO[outcome.survived]:>9} {equal:>10}  {verdict}"


if __name__ == "__main__":
    sys.exit(main())
