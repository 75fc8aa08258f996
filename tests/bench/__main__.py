"""Measure: `python -m tests.bench [NAME ...] [--device cuda] [--rounds N] [--results FILE]`.

Results are kept in a JSON file, case by case, and docs/benchmarks.md is written from it with --write.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from lightdiff.training.compute import pick_device
from tests.bench import report
from tests.bench.cases import CASES
from tests.bench.contest import compete, machine, peak


def main() -> None:
    """Run the cases one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], usage=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}; none: all")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--rounds", type=int, default=0, help="rounds of each case; 0: as many as it needs")
    parser.add_argument("--results", type=Path, help="JSON file to add to; default: docs/benchmarks/DEVICE.json")
    chosen = parser.parse_args()
    if unknown := sorted(set(chosen.names) - set(CASES)):
        parser.error(f"there is no {unknown[0]}; there are {', '.join(CASES)}")
    device = pick_device(chosen.device)
    results = chosen.results or report.FOLDER / f"{device.type}.json"
    kept = json.loads(results.read_text()) if results.is_file() else {"cases": {}}
    kept |= machine(device) | {"date": time.strftime("%Y-%m-%d"), "peak": peak(device)}
    for name in chosen.names or CASES:
        case = CASES[name]
        print(f"\n{name}: {case.title}", flush=True)
        rows = compete(case, name, device, chosen.rounds)
        kept["cases"][name] = {"title": case.title, "wanted": case.wanted, "rows": [row.as_dict() for row in rows]}
        results.parent.mkdir(parents=True, exist_ok=True)
        results.write_text(json.dumps(kept, indent=1) + "\n")
        print("\n".join(report.lines(kept["cases"][name], kept["peak"])), flush=True)


if __name__ == "__main__":
    torch.set_num_interop_threads(1)
    main()
