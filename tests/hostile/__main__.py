"""Do every attack in full and print what became of it. Exit code 1 where anything ended as it must not.

cd tests && python -m hostile [--seed 0] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from hostile.arguments import READ, WRITTEN, mistaken_arguments
from hostile.attacks import TARGETS, Trial, changed_streams, mutated_files, random_configurations, write_targets

CHANGES, CONFIGURATIONS, MUTATIONS = 3, 500, 200
ARGUMENTS = (
    ("read arguments", READ, ("pipe", "device", "folder", "sparse")),
    ("written arguments", WRITTEN, ("pipe", "device")),
)


def summary(name: str, trials: Iterable[Trial]) -> list[Trial]:
    """Print how the trials of each kind ended; return the wrong ones."""
    ends: dict[str, Counter[str]] = {}
    wrong = []
    for trial in trials:
        kind = trial.name.rstrip("0123456789 ") if name == "files" else name
        ends.setdefault(kind, Counter())[str(trial.outcome.end)] += 1
        if not trial.is_right:
            wrong.append(trial)
    for kind, counts in ends.items():
        print(f"{kind:24} " + "  ".join(f"{end}: {count}" for end, count in sorted(counts.items())), flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("streams", "configurations", "files", "arguments"))
    parser.add_argument("--target", nargs="+", help="of the files: only those whose name begins so")
    arguments = parser.parse_args()
    wrong: list[Trial] = []
    lost = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.only in (None, "streams"):
            streams = Counter(changed_streams(folder, CHANGES))
            lost = sum(count for (_, end), count in streams.items() if end == "OTHER TEXT")
            for (compression, end), count in sorted(streams.items()):
                print(f"stream {compression:17} {end}: {count}")
        if arguments.only in (None, "configurations"):
            wrong += summary("configurations", random_configurations(folder, CONFIGURATIONS, arguments.seed))
        if arguments.only in (None, "files"):
            targets = [each for each in TARGETS if each.name.startswith(tuple(arguments.target or ("",)))]
            wrong += summary("files", mutated_files(folder / "files", MUTATIONS, targets, arguments.seed))
            print("\n".join(f"0 of {each.name}: {each.excuse}" for each in targets if each.excuse))
        if arguments.only in (None, "arguments"):
            write_targets(folder / "good")
            for name, lines, kinds in ARGUMENTS:
                (folder / name).mkdir()
                wrong += summary(name, mistaken_arguments(folder / name, folder / "good", lines, kinds))
    for trial in wrong[:20]:
        print(
            f"\nWRONG {trial.name}: {trial.outcome.end}, {trial.outcome.seconds:.1f} s\n{trial.outcome.output[-1500:]}"
        )
    print(f"{len(wrong)} wrong ends, {lost} texts changed in silence")
    return 1 if wrong or lost else 0


if __name__ == "__main__":
    sys.exit(main())
