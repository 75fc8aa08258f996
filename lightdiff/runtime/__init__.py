"""What every stage runs on: processes, devices, signals, progress, work in other threads."""

WORKER_FOLDER = (
    "LIGHTDIFF_LAUNCH"  # variable that `--nproc-per-node` sets in the processes it starts: where they report
)
