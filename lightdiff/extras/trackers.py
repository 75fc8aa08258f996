"""Where a training's numbers and pictures go besides metrics.jsonl: TensorBoard, Weights & Biases, trackio, MLflow.

Each is a class that is opened with a stage's folder, the step that a run starts or goes on at, and its settings. A
tracker's own number of the run lies in that folder, so that a resumed run goes on in the same place.
"""

import json
import math
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightdiff.errors import UserError
from lightdiff.run_folder import atomic_write_text, read_json
from lightdiff.settings import flat

PROJECT = "lightdiff"
IDS = "trackers.json"  # in a stage's folder


def run_id(folder: Path, tracker: str, start: int) -> str:
    """A tracker's number of the run in this folder, if the run goes on and was tracked before; else nothing."""
    path = folder / IDS
    return str(read_json(path).get(tracker, "")) if start and path.is_file() else ""


def keep_id(folder: Path, tracker: str, number: str) -> None:
    """Remember it."""
    path = folder / IDS
    known = read_json(path) if path.is_file() else {}
    atomic_write_text(path, json.dumps(known | {tracker: number}) + "\n")


def run_name(folder: Path) -> str:
    """What a run is called: its folder and stage."""
    here = folder.absolute()
    return f"{here.parent.name}-{here.name}"


def plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a table has them: one value a name."""
    return {
        name: json.dumps(value) if not isinstance(value, (int, float, str)) or name.endswith("seed") else value
        for name, value in flat(settings).items()
    }


class TensorBoard:
    """Files beside metrics.jsonl."""

    name = "TensorBoard"

    def __init__(self, folder: Path, start: int, settings: Mapping[str, Any]) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        threading.excepthook = without_traceback_of_writers
        board: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        for summary in hparams(plain_settings(settings), {"val_loss": math.nan}):  # type: ignore[no-untyped-call]
            board.file_writer.add_summary(summary)
        self.board = board

    def record(self, values: Mapping[str, float], step: int) -> None:
        """Add a line of metrics.jsonl."""
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def picture(self, path: Path, step: int) -> None:
        """Add a picture."""
        import numpy as np
        from PIL import Image

        self.board.add_image("samples", np.asarray(Image.open(path)), step, dataformats="HWC")

    def close(self) -> None:
        """Put all on the disk."""
        self.board.close()


def without_traceback_of_writers(failed: threading.ExceptHookArgs) -> None:
    """Report what ends a thread, but not a full disk in TensorBoard's: the next call of its writer tells of it."""
    if not (isinstance(failed.exc_value, OSError) and type(failed.thread).__module__.startswith("tensorboard")):
        threading.__excepthook__(failed)


class WandB:
    """Weights & Biases; offline unless a key is known, or as the environment variable WANDB_MODE says."""

    name = "Weights & Biases"

    def __init__(self, folder: Path, start: int, settings: Mapping[str, Any]) -> None:
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        known = run_id(folder, "wandb", start) or secrets.token_hex(4)
        self.library, config = wandb, plain_settings(settings)
        self.run: Any = wandb.init(
            project=PROJECT, name=run_name(folder), id=known, dir=folder, resume="allow", config=config, mode=mode
        )
        self.run.define_metric("*", step_metric="step")  # its own count only grows, where a resumed run may go back
        keep_id(folder, "wandb", known)

    def record(self, values: Mapping[str, float], step: int) -> None:
        """Add a line of metrics.jsonl."""
        self.run.log({**values, "step": step})

    def picture(self, path: Path, step: int) -> None:
        """Add a picture."""
        self.run.log({"samples": self.library.Image(str(path)), "step": step})

    def close(self) -> None:
        """Put all on the disk, or on the server."""
        self.run.finish()


class Trackio:
    """trackio, which keeps its runs on this machine, where the environment variable TRACKIO_DIR says."""

    name = "trackio"

    def __init__(self, folder: Path, start: int, settings: Mapping[str, Any]) -> None:
        import trackio

        known = run_id(folder, "trackio", start) or f"{run_name(folder)}-{secrets.token_hex(4)}"
        self.library, config = trackio, plain_settings(settings)
        resume, quiet = "allow" if start else "never", {"auto_log_gpu": False, "auto_log_cpu": False}
        with redirect_stdout(sys.stderr):  # stdout is for results
            self.run: Any = trackio.init(PROJECT, name=known, config=config, resume=resume, embed=False, **quiet)
        keep_id(folder, "trackio", known)

    def record(self, values: Mapping[str, float], step: int) -> None:
        """Add a line of metrics.jsonl."""
        self.run.log({name: value for name, value in values.items() if name != "step"}, step=step)

    def picture(self, path: Path, step: int) -> None:
        """Add a picture."""
        self.run.log({"samples": self.library.Image(str(path))}, step=step)

    def close(self) -> None:
        """Put all on the disk."""
        with redirect_stdout(sys.stderr):
            self.library.finish()


class MLflow:
    """MLflow, at the address that the environment variable MLFLOW_TRACKING_URI says, else where it keeps runs here."""

    name = "MLflow"

    def __init__(self, folder: Path, start: int, settings: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self.client, self.metric = MlflowClient(), Metric
        self.number = run_id(folder, "mlflow", start)
        if self.number:
            self.client.update_run(self.number, status="RUNNING")
            return
        found = self.client.get_experiment_by_name(PROJECT)
        experiment = found.experiment_id if found else self.client.create_experiment(PROJECT)
        self.number = self.client.create_run(experiment, run_name=run_name(folder)).info.run_id
        params = [Param(name, str(value)[:5000]) for name, value in plain_settings(settings).items()]
        for first in range(0, len(params), 100):  # as many as it takes at a time
            self.client.log_batch(self.number, params=params[first : first + 100])
        keep_id(folder, "mlflow", self.number)

    def record(self, values: Mapping[str, float], step: int) -> None:
        """Add a line of metrics.jsonl."""
        now = int(time.time() * 1000)
        self.client.log_batch(self.number, [self.metric(name, value, now, step) for name, value in values.items()])

    def picture(self, path: Path, step: int) -> None:
        """Add a picture."""
        self.client.log_artifact(self.number, str(path), "samples")

    def close(self) -> None:
        """Say that the run has ended."""
        self.client.set_terminated(self.number)


KINDS: dict[str, Callable[[Path, int, Mapping[str, Any]], Any]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
    "mlflow": MLflow,
}


def check_installed(names: Sequence[str]) -> None:
    """Check that the libraries of trackers are there.

    Raises:
        UserError: If one is missing.
    """
    for name in names:
        if not find_spec(name):
            raise UserError(f"--track {name} needs the library {name}: pip install 'lightdiff[{name}]'")


class Trackers:
    """The trackers of a training: what one of them cannot do ends it, and nothing else."""

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        start: int,
        settings: Mapping[str, Any],
        note: Callable[[str], None],
    ) -> None:
        """Open those that can be opened; TensorBoard may not be installed."""
        self.note, self.opened = note, list[Any]()
        for name in names:
            try:
                self.opened.append(KINDS[name](folder, start, settings))
            except ImportError:
                continue
            except Exception as error:  # of a network, a server, a library
                note(f"{name} cannot be opened: {error}; the training goes on without it")

    def tell(self, do: Callable[[Any], object]) -> None:
        """Let every tracker do something."""
        for tracker in [*self.opened]:
            try:
                do(tracker)
            except Exception as error:
                why = getattr(error, "strerror", None) or error
                self.note(f"{tracker.name}'s files could not be written: {why}; there are no more of them")
                self.opened.remove(tracker)
