"""report: one self-contained HTML page about a run, or about several side by side."""

from pathlib import Path

from lightdiff.errors import UserError
from lightdiff.extras.report.collect import RunFacts, collect
from lightdiff.extras.report.page import MARK, render
from lightdiff.run_folder import RunFolder, atomic_write_text, open_regular, remove_abandoned
from lightdiff.runtime.processes import pick_device
from lightdiff.runtime.progress import console
from lightdiff.settings import Device


def report(runs: list[Path], out: Path | None, device: Device = "auto") -> Path:
    """Write the page and return its path: RUN/report.html, or ./report.html for several runs.

    Raises:
        UserError: If a run is empty, or the path is taken by something else.
    """
    target = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    if target.is_dir():
        raise UserError(f"--out: {target} is a folder; name a file")
    if target.exists() and not is_report(target):
        raise UserError(f"--out: {target} is no report of lightdiff and is not overwritten: choose another name")
    where = pick_device(device)
    found: list[RunFacts] = []
    for run in runs:
        remove_abandoned(RunFolder(run))
        with console.status(f"reading {run}"):
            found.append(collect(run, where))
    text = render(found).encode(errors="replace").decode()  # file names need not be UTF-8
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(target, text)
    console.print(f"{len(text.encode()) / 1e6:.1f} MB; open it in a browser", soft_wrap=True)
    return target


def is_report(path: Path) -> bool:
    """Whether a file is a report: the only kind that is overwritten."""
    try:
        with open_regular(path) as file:
            return MARK.encode() in file.read(200)
    except OSError:
        return False
