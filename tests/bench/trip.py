"""How much code there is to read from a command to where its work begins.

    python -m tests.bench.trip train-vae --data FOLDER --run RUN    # up to the first optimizer step
    python -m tests.bench.trip generate --run RUN                   # up to the first call of the U-Net

Runs the command under a line tracer and prints, as JSON, the lines that ran at least once, the functions, and the
files in the order in which they are entered. Only bodies of lightdiff's functions count, in the main thread; imports
and class bodies do not. The process ends there: no weight changes, and nothing is saved.
"""

import inspect
import json
import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightdiff import cli

ROOT = f"{Path(cli.__file__).parent}{os.sep}"
lines: dict[str, set[int]] = {}  # of each file
functions: set[tuple[str, str]] = set()


def trace(frame: FrameType, event: str, _: Any) -> Any:
    """Python calls this for each function entered and each line executed."""
    code = frame.f_code
    if not code.co_filename.startswith(ROOT) or not code.co_flags & inspect.CO_OPTIMIZED:  # modules, class bodies
        return None
    file = code.co_filename.removeprefix(ROOT).replace(os.sep, "/")
    executed = lines.setdefault(file, set())
    if event == "call":
        functions.add((file, code.co_qualname))
    elif event == "line":
        executed.add(frame.f_lineno)
    return trace


def finish(*_: Any) -> NoReturn:
    """Print the figures and end the process, whatever the command has opened."""
    sys.settrace(None)
    per_file = {file: len(executed) for file, executed in lines.items()}
    print(json.dumps({"lines": sum(per_file.values()), "functions": len(functions), "files": per_file}), flush=True)
    os._exit(0)


def finish_at_unet(module: nn.Module, _: Any) -> None:
    """As a hook before each forward pass of any module."""
    if type(module).__name__ == "UNet" and torch.is_inference_mode_enabled():  # not where only its time is of interest
        finish()


def main() -> None:
    """Run the command given as arguments."""
    torch.set_num_threads(1)
    if sys.argv[1] == "generate":
        register_module_forward_pre_hook(finish_at_unet)
    else:
        register_optimizer_step_pre_hook(finish)
    sys.argv[0] = "lightdiff"
    sys.settrace(trace)
    cli.main()
    raise SystemExit("the command ended before its work began")


if __name__ == "__main__":
    main()
