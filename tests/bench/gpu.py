"""`python -m tests.bench gpu [--minutes 8]`: what matters on a GPU, in one command that fits into a few minutes.

The tests marked gpu, then training steps, encoding and generating, each beside the original's way (float32, not
compiled) and, where it is installed, diffusers. After each of them a JSON file and a table are written: what was
measured before a stop is kept, and what no time was left for is listed. On a CPU, the same with tiny networks.
"""

import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.bench.contest import best, processor, resident, timed
from tests.bench.gpu_cases import TINY, Sizes, Way, ways

HOME = Path(__file__).parents[2]
ROUNDS = 3
WARM_UP = 3  # calls; the first one compiles, and the next ones record CUDA graphs
LAST_START = 5.0  # seconds left, with which nothing more is begun
HEAD = "| | images/s | times the original | of the bf16 peak | memory | waits a call | compiling | parameters |"


class TimeUpError(BaseException):
    """No time is left; none of the many who catch exceptions on the way is to catch this one."""


def time_is_up(*_: Any) -> None:
    raise TimeUpError


def measure(way: Way, z: Sizes, device: torch.device) -> dict[str, Any]:
    """Warm up, count what waits in one call, and time some rounds."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    work = way.make()
    first, *_, once = (timed(work.call, device) for _ in range(WARM_UP))
    calls = max(1, round(z.seconds / once))
    rounds = [timed(lambda: [work.call() for _ in range(calls)], device) / calls for _ in range(ROUNDS)]
    return {
        "images_per_s": work.images / sorted(rounds)[ROUNDS // 2],
        "flops": work.flops,
        "memory": torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM"),
        "waits": waits(work.call) if on_gpu else None,
        "compiling": first - once if "compiled" in way.name else None,
        "parameters": work.parameters,
    }


def waits(call: Callable[[], object]) -> int:
    """How often a call waits for the GPU, by CUDA's own count."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in told)


def bf16_peak(side: int, device: torch.device) -> float:
    """FLOP/s of a large product of matrices."""
    a = torch.ones(side, side, dtype=torch.bfloat16, device=device)
    return best(lambda: a @ a, 2 * side**3, device)


def gpu_tests(seconds: float) -> str:
    """What the tests marked gpu have come to; no more than pytest itself is needed."""
    if importlib.util.find_spec("pytest") is None:
        return "left out, as there is no pytest"
    files = [str(file) for file in sorted((HOME / "tests").glob("test_*.py")) if "mark.gpu" in file.read_text()]
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-o", "addopts=", "-p", "no:cacheprovider", *files]
    try:
        said = subprocess.run(words, cwd=HOME, capture_output=True, text=True, timeout=seconds, check=False).stdout
    except subprocess.TimeoutExpired:
        return f"not finished within {seconds:.0f} s"
    return said.strip().splitlines()[-1]


def run(device: torch.device, minutes: float, path: Path) -> dict[str, Any]:
    """Measure as much as time allows, and write it to `path` and to a table beside it."""
    end, on_gpu = time.monotonic() + 60 * minutes, device.type == "cuda"
    z = Sizes() if on_gpu else TINY
    found: dict[str, Any] = {
        "machine": torch.cuda.get_device_name(device) if on_gpu else f"{processor()}, tiny networks",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "bf16_peak": bf16_peak(8192 if on_gpu else 512, device),
        "tests": gpu_tests(60 * minutes / 4) if on_gpu else "left out, as there is no GPU",
        "rows": [],
        "left_out": [],
    }
    signal.signal(signal.SIGALRM, time_is_up)
    todo = ways(z, device)
    found["left_out"] = [f"{way.case}: {way.name}" for way in todo]
    write(found, path)
    for way in todo:
        row = {"case": way.case, "way": way.name}
        try:
            if end - time.monotonic() < LAST_START:
                break
            signal.setitimer(signal.ITIMER_REAL, end - time.monotonic())
            row |= measure(way, z, device)
        except torch.OutOfMemoryError:
            row["failed"] = "out of memory"
        except TimeUpError:
            row["failed"] = "no time left"
        except Exception as error:  # the rest is to be measured all the same
            row["failed"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        gc.collect()
        if "compiled" in way.name:
            torch.compiler.reset()
        found["rows"].append(row)
        found["left_out"] = found["left_out"][1:]
        write(found, path)
        print(row, flush=True)
    return found


def write(found: dict[str, Any], path: Path) -> None:
    """Write the results so far: as JSON, and as a table in a .md file of the same name."""
    for file, text in ((path, json.dumps(found, indent=1)), (path.with_suffix(".md"), "\n".join(page(found)))):
        passing = file.with_suffix(".tmp")
        passing.write_text(text + "\n")
        os.replace(passing, file)


def page(found: dict[str, Any]) -> list[str]:
    """The results as Markdown, a table for each case."""
    lines = [
        f"{found['machine']}; torch {found['torch']}; {found['date']}; `python -m tests.bench gpu`. Largest product of "
        f"matrices in bf16: {found['bf16_peak'] / 1e12:.3g} TFLOP/s. Tests marked gpu: {found['tests']}."
    ]
    for case in dict.fromkeys(row["case"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["case"] == case]
        lines += ["", f"**{case}**", "", HEAD, "|---" + "|---:" * (HEAD.count("|") - 2) + "|"]
        original = next(
            (r["images_per_s"] for r in rows if "original, float32" == r["way"] and "failed" not in r), None
        )
        for row in rows:
            if "failed" in row:
                lines.append(f"| {row['way']} | {row['failed']}" + " |" * (HEAD.count("|") - 2))
                continue
            speed = row["images_per_s"]
            cells = [
                row["way"],
                f"{speed:.4g}",
                f"{speed / original:.2f}" if original else "",
                f"{speed * row['flops'] / found['bf16_peak']:.1%}",
                f"{row['memory'] / 1e9:.2f} GB",
                "" if row["waits"] is None else str(row["waits"]),
                "" if row["compiling"] is None else f"{row['compiling']:.0f} s",
                f"{row['parameters'] / 1e6:.1f} M",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines + (
        ["", "Left out for want of time: " + "; ".join(found["left_out"]) + "."] if found["left_out"] else []
    )
