"""The command line: one command a stage, in the order of the pipeline. Imports a stage only when it is called."""

import signal
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from lightdiff import __version__, settings
from lightdiff.errors import LightdiffError, RunError, Stopped, UserError
from lightdiff.extras.settings import EditSettings, TrajectorySettings, WalkSettings
from lightdiff.options import Layer, command, read_settings
from lightdiff.runtime import launcher
from lightdiff.runtime.dist_env import may_restart_elsewhere, restarted

STAGES = "The five stages"
OTHERS = "Looking, listing, importing"
PRESETS = ("tiny", "small", "base", "original")
PRESET_FOLDER = Path(__file__).parent / "presets"

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


def preset_layer(network: str) -> Callable[[str], Layer]:
    """Name of a preset -> its settings, for one of the networks."""
    return lambda name: read_settings(PRESET_FOLDER / f"{network}-{name}.toml")


def stage(name: str, package: str) -> Callable[[Any], None]:
    """Call a stage's `run` and print the path of what it made to stdout."""

    def run(chosen: Any) -> None:
        job = getattr(chosen, "job", None)
        if job is not None and job.nproc_per_node > 1 and not launcher.is_worker():
            launcher.launch(job, sys.argv[1:])
            return
        once = {name: default for name, default in (("restart", False), ("from_step", 0)) if getattr(chosen, name, 0)}
        if once and may_restart_elsewhere():  # there, restarted() may be true in one process and not in another
            raise UserError(
                f"{once_flags(once)} would be repeated by torchrun's --max-restarts: start once without that"
            )
        if restarted() and once:  # these are for the first time
            chosen = settings.with_changes(chosen, **once)
        from lightdiff.runtime.processes import explain_lost_contact, shutdown
        from lightdiff.runtime.progress import console
        from lightdiff.runtime.signals import stop_at_once

        console.quiet = job is not None and job.quiet
        try:
            with stop_at_once(), explain_lost_contact(launcher.rank()):
                made = import_module(f"lightdiff.{package}.{name}").run(chosen)
                shutdown()
        except KeyboardInterrupt:  # here, as Typer would leave without a word
            raise Stopped("interrupted; what was saved before is untouched", 128 + signal.SIGINT) from None
        except Stopped as stopped:
            raise Stopped(f"{stopped}{f', without {once_flags(once)}' if once else ''}", stopped.exit_code) from None
        if launcher.rank() == 0:
            typer.echo(made)

    return run


def once_flags(names: Iterable[str]) -> str:
    """Settings for a run's first start, as they are typed."""
    return " and ".join(f"--{name.replace('_', '-')}" for name in names)


def saved_settings(said: Layer, name: str) -> list[Layer]:
    """What a stopped run of this stage saved, so that the same command goes on with it."""
    from lightdiff.run_folder import RunFolder
    from lightdiff.stages.start import newest

    folder = getattr(RunFolder(path(said.get("run")) or settings.StageSettings().run), name)
    if said.get("restart") and not restarted():
        return []
    saved = newest(folder, name, whole=False)  # the stage will read the rest, and tell what is damaged
    if saved is None:
        return []
    layer = saved.metadata.settings.items()
    return [{key: value for key, value in layer if key not in {"run", "init_from", "restart"}}]


def inherit_vae(said: Layer) -> list[Layer]:
    """train-vae goes on with what its own checkpoint saved."""
    return saved_settings(said, "vae")


def inherit_encode(said: Layer) -> list[Layer]:
    """Encode takes the image settings from the VAE."""
    from lightdiff.stages.encode import inherited

    return [inherited(path(said.get("run")) or settings.StageSettings().run, path(said.get("vae")))]


def inherit_unet(said: Layer) -> list[Layer]:
    """train-unet takes shape and scaling from the latents, and goes on with what its own checkpoint saved."""
    from lightdiff.stages.train_unet import inherited

    run = path(said.get("run")) or settings.StageSettings().run
    saved = saved_settings(said, "unet")
    for layer in saved:
        if part(said, "target").get("objective", "") not in ("", part(layer, "target").get("objective")):
            part(layer, "noise").pop("schedule", None)  # so that the stage refuses the objective, not the pair of both
    named = next((layer["latents"] for layer in (said, *saved) if layer.get("latents")), None)
    return [*saved, inherited(run, path(named))]


def part(layer: Layer, name: str) -> Layer:
    """A part of settings that may have come from anywhere; empty if there is none."""
    found = layer.get(name)
    return found if isinstance(found, dict) else {}


def estimate(chosen: Any) -> None:
    """What a training, or the trainings of a sweep, will take."""
    name = "sweep" if isinstance(chosen, settings.SweepSettings) else "estimate"
    import_module(f"lightdiff.extras.{name}").estimate(chosen)


def path(value: Any) -> Path | None:
    """A path that a flag or a settings file may have given; what is none is left for pydantic to refuse."""
    return Path(value) if isinstance(value, (str, Path)) else None


def add(name: str, model: type[settings.Settings], panel: str, package: str = "stages", **more: Any) -> None:
    """Add a stage as a command."""
    app.command(name, rich_help_panel=panel)(command(model, stage(name.replace("-", "_"), package), **more))


add(
    "train-vae",
    settings.TrainVAESettings,
    STAGES,
    inherit=inherit_vae,
    preset=preset_layer("vae"),
    presets=PRESETS,
    estimate=estimate,
)
add("encode", settings.EncodeSettings, STAGES, inherit=inherit_encode)
add("scale", settings.ScaleSettings, STAGES)
add(
    "train-unet",
    settings.TrainUNetSettings,
    STAGES,
    inherit=inherit_unet,
    preset=preset_layer("unet"),
    presets=PRESETS,
    estimate=estimate,
)
add("generate", settings.GenerateSettings, STAGES)
add("edit", EditSettings, OTHERS, package="extras")
add("walk", WalkSettings, OTHERS, package="extras")
add("trajectory", TrajectorySettings, OTHERS, package="extras")
add("demo", settings.DemoSettings, OTHERS)
add("evaluate", settings.EvaluateSettings, OTHERS, package="extras")
add("sweep", settings.SweepSettings, OTHERS, package="extras", estimate=estimate)


@app.command(rich_help_panel=OTHERS)
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


@app.command(rich_help_panel=OTHERS)
def show(
    place: Annotated[Path, typer.Argument(metavar="PATH", help="a checkpoint, a run folder or a folder of latents")],
    json: Annotated[bool, typer.Option("--json", help="print it as JSON")] = False,
) -> None:
    """Show a checkpoint's or a run's settings, lineage and metrics."""
    from lightdiff.extras.show import show as look

    look(place, as_json=json)


@app.command(rich_help_panel=OTHERS)
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders; several are laid side by side")],
    out: Annotated[
        Path | None, typer.Option(help="file to write; default: RUN/report.html, or report.html for several runs")
    ] = None,
    device: Annotated[settings.Device, typer.Option(help="where to compute the pictures")] = "auto",
) -> None:
    """Write one self-contained HTML page about a run, or about several side by side."""
    from lightdiff.extras.report import report as write

    typer.echo(write(runs, out, device))


@app.command(rich_help_panel=OTHERS)
def presets(
    resolution: Annotated[int, typer.Option(min=8, help="side of the images, in pixels")] = 64,
) -> None:
    """List the presets with parameters and memory, for images of a size."""
    from lightdiff.extras.presets import show_presets

    show_presets(resolution, PRESETS, PRESET_FOLDER)


@app.command("import", rich_help_panel=OTHERS)
def import_original(
    file: Annotated[Path, typer.Argument(help="checkpoint of the original scripts (.pth), VAE or U-Net")],
    run: Annotated[Path, typer.Option(help="run folder to put it in")] = Path("runs/default"),
    resolution: Annotated[int, typer.Option(help="side of the images it was trained on, in pixels")] = 256,
) -> None:
    """Turn a checkpoint of the original scripts into one of lightdiff."""
    from lightdiff.extras.import_original import import_checkpoint

    typer.echo(import_checkpoint(file, run, resolution))


def main() -> None:
    """Run the command line; a mistake or failure ends in one message on stderr and its exit code."""
    debug = "--debug" in sys.argv[1:2]
    launcher.register_worker()
    try:
        app()
    except LightdiffError as error:
        if debug and not isinstance(error, Stopped):
            raise
        fail(error)
    except Exception as error:
        if debug:
            raise
        text = f"{type(error).__name__}: {error}\nThis should not happen; --debug before the command shows where."
        fail(RunError(text))


def fail(error: LightdiffError) -> None:
    """Tell an error and exit: to stderr, or to the process that started this one, which tells it once for all."""
    from rich.console import Console

    if launcher.tell(error):
        sys.exit(0 if isinstance(error, Stopped) else error.exit_code)  # torch's agent takes other codes for a failure
    head = "stopped:" if isinstance(error, Stopped) else "error:"
    who = f"process {launcher.rank()}: " if launcher.rank() and not str(error).startswith("process ") else ""
    Console(stderr=True, highlight=False).print(f"[bold red]{head}[/] {who}{escape(str(error))}", soft_wrap=True)
    sys.exit(error.exit_code)


def escape(text: str) -> str:
    """Text with rich's markup taken as it stands."""
    from rich.markup import escape as rich_escape

    return rich_escape(text)
