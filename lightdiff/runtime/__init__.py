"""What every stage runs on: processes, devices, signals, progress. Here: which process of a run this is."""

import os

WORKER_FOLDER = "LIGHTDIFF_LAUNCH"  # variable that `--nproc-per-node` sets for its workers: where they leave reports


def is_worker() -> bool:
    """Whether this process was started by `--nproc-per-node`."""
    return WORKER_FOLDER in os.environ


def rank() -> int:
    """This process's number in its run, 0 where it is alone."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def restarted() -> bool:
    """Whether torch's elastic agent has started this process again after one has died."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def may_restart_elsewhere() -> bool:
    """Whether agents on several machines may start processes again, each counting its own restarts."""
    return os.environ.get("GROUP_WORLD_SIZE", "1") != "1" and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
