"""The command line: one command a stage, in the order of the pipeline. Imports a stage only when it is called."""

import signal
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from lightdiff import __version__, settings
from lightdiff.errors import LightdiffError, RunError, Stopped
from lightdiff.extras.settings import (
    DemoSettings,
    EditSettings,
    EvaluateSettings,
    SweepSettings,
    TrajectorySettings,
    WalkSettings,
)
from lightdiff.options import Layer, command
from lightdiff.run_folder import RunFolder
from lightdiff.runtime import is_worker, rank, restarted

STAGES = "The five stages"
DRAWING = "More to draw"
EVALUATION = "Evaluating and comparing"
LOOKING = "Looking at images and runs"
STARTING = "Starting points"
ONLY_NOW = {"run", "init_from", "restart"}  # settings that are not taken from a stopped run

app = typer.Typer(
    name="lightdiff",
    help="From a folder of images to a latent diffusion model of your own.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(wanted: bool) -> None:
    """Print the version and stop."""
    if wanted:
        typer.echo(f"lightdiff {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="print it")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """From a folder of images to a latent diffusion model of your own."""


# --- running a command --------------------------------------------------------------------------------------------


def run_stage(module: str, chosen: settings.Settings) -> None:
    """Run what a command stands for, and print the path of what it made to stdout."""
    job = getattr(chosen, "job", settings.JobSettings())
    if job.nproc_per_node > 1 and not is_worker():
        from lightdiff.runtime.launcher import launch

        return launch(job, sys.argv[1:])
    made = import_module(f"lightdiff.{module}").run(chosen)
    if rank() == 0:
        typer.echo(made)


def estimate(module: str, chosen: settings.Settings) -> None:
    """Print what a training, or the trainings of a sweep, will take."""
    import_module(f"lightdiff.{module}").estimate(chosen)


# --- what a stage inherits ----------------------------------------------------------------------------------------


def saved_layer(stage: str, said: Layer) -> Layer:
    """What a stopped run of this stage saved, so that the same command resumes it."""
    from lightdiff.runtime.resume import newest

    if said.get("restart") and not restarted():
        return {}
    folder = getattr(RunFolder(run_of(said)), stage)
    if not folder.resumable():
        return {}
    saved = newest(folder, stage, whole=False)  # the stage verifies the tensors
    return {name: value for name, value in saved.metadata.settings.items() if name not in ONLY_NOW}


def inherit_encode(said: Layer) -> Layer:
    """Encode takes the image settings from the VAE."""
    from lightdiff.stages.encode import inherited

    return inherited(run_of(said), as_path(said.get("vae")))


def inherit_unet(said: Layer) -> Layer:
    """train-unet takes shape and scale from the latents, the rest from its own checkpoint."""
    from lightdiff.stages.train_unet import inherited

    saved = saved_layer("unet", said)
    objective = group(said, "target").get("objective")
    if objective and objective != group(saved, "target").get("objective"):
        group(saved, "noise").pop("schedule", None)  # so that the stage refuses the objective, not the pair of both
    return saved | inherited(run_of(said), as_path(said.get("latents") or saved.get("latents")))


def group(layer: Layer, name: str) -> Layer:
    """A group of settings that may have come from anywhere; empty if there is none."""
    found = layer.get(name)
    return found if isinstance(found, dict) else {}


def run_of(said: Layer) -> Path:
    """The run folder that file and flags say."""
    return as_path(said.get("run")) or settings.StageSettings().run


def as_path(value: Any) -> Path | None:
    """A path, if it is one; what is none is left for pydantic to refuse."""
    return Path(value) if isinstance(value, (str, Path)) else None


# --- the commands -------------------------------------------------------------------------------------------------


class Command(NamedTuple):
    """A command that is made of settings."""

    model: type[settings.Settings]
    module: str  # its `run(settings)` does the work and returns what to print
    panel: str
    inherit: Callable[[Layer], Layer] | None = None
    presets: str = ""  # the family of presets to choose from
    estimate: str = ""  # module whose `estimate(settings)` a --dry-run calls


COMMANDS = {
    "train-vae": Command(
        settings.TrainVAESettings, "stages.train_vae", STAGES, partial(saved_layer, "vae"), "vae", "extras.estimate"
    ),
    "encode": Command(settings.EncodeSettings, "stages.encode", STAGES, inherit_encode),
    "scale": Command(settings.ScaleSettings, "stages.scale", STAGES),
    "train-unet": Command(
        settings.TrainUNetSettings, "stages.train_unet", STAGES, inherit_unet, "unet", "extras.estimate"
    ),
    "generate": Command(settings.GenerateSettings, "stages.generate", STAGES),
    "edit": Command(EditSettings, "extras.edit", DRAWING),
    "walk": Command(WalkSettings, "extras.walk", DRAWING),
    "trajectory": Command(TrajectorySettings, "extras.trajectory", DRAWING),
    "evaluate": Command(EvaluateSettings, "extras.evaluate", EVALUATION),
    "sweep": Command(SweepSettings, "extras.sweep", EVALUATION, estimate="extras.sweep"),
    "demo": Command(DemoSettings, "extras.demo", STARTING),
}
for name, row in COMMANDS.items():
    rehearse = partial(estimate, row.estimate) if row.estimate else None
    run = partial(run_stage, row.module)
    app.command(name, rich_help_panel=row.panel)(command(row.model, run, row.inherit, row.presets, rehearse))


@app.command(rich_help_panel=LOOKING)
def inspect(
    data: Annotated[list[Path], typer.Argument(help="folders of images")],
    val_share: Annotated[float, typer.Option(help="share of images held out for validation")] = 0.05,
    json: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
) -> None:
    """Report on folders of images: counts, sizes, formats, duplicates, bad files, labels, split."""
    from lightdiff.extras.inspect import inspect as look
    from lightdiff.extras.inspect import print_report

    report = look(data, val_share)
    if json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        from rich.console import Console

        print_report(report, Console())


@app.command(rich_help_panel=LOOKING)
def show(
    place: Annotated[Path, typer.Argument(metavar="PATH", help="a checkpoint, a run folder or a folder of latents")],
    json: Annotated[bool, typer.Option("--json", help="print it as JSON")] = False,
) -> None:
    """Show a checkpoint's or a run's settings, lineage and metrics."""
    from lightdiff.extras.show import show as look

    look(place, as_json=json)


@app.command(rich_help_panel=LOOKING)
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders; several are shown side by side")],
    out: Annotated[
        Path | None, typer.Option(help="file to write; default: RUN/report.html, or report.html for several runs")
    ] = None,
    device: Annotated[settings.Device, typer.Option(help="where to compute the pictures")] = "auto",
) -> None:
    """Write one self-contained HTML page about a run, or about several side by side."""
    from lightdiff.extras.report import report as write

    typer.echo(write(runs, out, device))


@app.command(rich_help_panel=STARTING)
def presets(
    resolution: Annotated[int, typer.Option(min=8, help="side of the images, in pixels")] = 64,
) -> None:
    """List the presets with parameters and memory, for images of a size."""
    from lightdiff.extras.presets import show_presets

    show_presets(resolution)


@app.command("import", rich_help_panel=STARTING)
def import_original(
    file: Annotated[Path, typer.Argument(help="checkpoint of the original scripts (.pth), VAE or U-Net")],
    run: Annotated[Path, typer.Option(help="run folder to put it in")] = Path("runs/default"),
    resolution: Annotated[int, typer.Option(help="side of the images it was trained on, in pixels")] = 256,
) -> None:
    """Convert a checkpoint of the original scripts."""
    from lightdiff.extras.import_original import import_checkpoint

    typer.echo(import_checkpoint(file, run, resolution))


def main() -> None:
    """Run the command line; a mistake or failure ends in one message on stderr and its exit code."""
    if is_worker():
        from lightdiff.runtime.launcher import register_worker

        register_worker()
    try:
        app()
    except KeyboardInterrupt:  # here, as Typer would leave without a word
        fail(Stopped("interrupted; what was saved is untouched", 128 + signal.SIGINT))
    except Exception as error:
        if "--debug" in sys.argv[1:2] and not isinstance(error, Stopped):
            raise
        if not isinstance(error, LightdiffError):
            text = f"{type(error).__name__}: {error}\nThis should not happen; --debug before the command shows where."
            error = RunError(text)
        fail(error)


def fail(error: LightdiffError) -> None:
    """Report an error and exit: on stderr, or to the process that started this one, which reports it once for all."""
    if is_worker():
        from lightdiff.runtime.launcher import send_report

        send_report(error)
        sys.exit(0 if isinstance(error, Stopped) else error.exit_code)  # torch's agent takes other codes for a failure
    from rich.console import Console
    from rich.markup import escape

    head = "stopped:" if isinstance(error, Stopped) else "error:"
    who = f"process {rank()}: " if rank() and not str(error).startswith("process ") else ""
    Console(stderr=True, highlight=False).print(f"[bold red]{head}[/] {who}{escape(str(error))}", soft_wrap=True)
    sys.exit(error.exit_code)
