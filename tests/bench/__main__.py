"""Measure: `nox -s bench -- [NAME ...] [--device cuda] [--rounds N] [--write]`, or `python -m tests.bench` the same.

Names are those of cases, and growth, profile, memory (on a GPU alone) and quality. Results are kept in a JSON file;
docs/benchmarks.md is written from it. `gpu`, by itself, measures what matters on a GPU in `--minutes` (8).
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightdiff.runtime.processes import pick_device
from tests.bench import gpu, growth, memory, profile, quality, report
from tests.bench.cases import CASES
from tests.bench.contest import compete, machine, peak

MORE: dict[str, Callable[[torch.device], Any]] = {
    "profile": profile.table,
    "memory": memory.table,
    "growth": lambda _: growth.measure(),
    "quality": quality.measure,
}


def main() -> None:
    """Run the chosen cases one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], usage=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join([*CASES, *MORE])}; none: all; or gpu")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--rounds", type=int, default=0, help="rounds of each case; 0: as many as it needs")
    parser.add_argument("--results", type=Path, help="JSON file to add to; default: one in docs/benchmarks")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md, too")
    parser.add_argument("--minutes", type=float, default=8.0, help="of gpu")
    chosen = parser.parse_args()
    if chosen.names == ["gpu"]:
        device = pick_device(chosen.device)
        found = gpu.run(device, chosen.minutes, chosen.results or report.FOLDER / f"gpu-{device.type}.json")
        print("\n".join(gpu.page(found)))
        return
    if unknown := sorted(set(chosen.names) - set(CASES) - set(MORE)):
        parser.error(f"there is no {unknown[0]}; there are {', '.join([*CASES, *MORE])}")
    device = pick_device(chosen.device)
    path = chosen.results or report.FOLDER / f"{report.name_of(device.type)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(path.read_text()) if path.is_file() else {"cases": {}}
    names = chosen.names or ([] if chosen.write else list(CASES))
    for name in names:
        if name in MORE:
            print(f"\n{name}", flush=True)
            kept[name] = MORE[name](device)
        else:
            kept |= machine(device) | {"date": time.strftime("%Y-%m-%d")}
            case = CASES[name]
            print(f"\n{name}: {case.title}", flush=True)
            rows = compete(case, name, device, chosen.rounds)
            kept["cases"][name] = {"title": case.title, "wanted": case.wanted, "peak": peak(device)}
            kept["cases"][name]["rows"] = [row.as_dict() for row in rows]
            print("\n".join(report.lines(kept["cases"][name])), flush=True)
        path.write_text(json.dumps(kept, indent=1) + "\n")
    if "growth" in names:
        growth.plot(kept["growth"], path.parent / "growth.svg")
    if chosen.write:
        report.write()


if __name__ == "__main__":
    main()
