"""The command line: one command a stage, in the order of the pipeline. Imports a stage only when it is called."""

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn

import typer

from lightdiff import __version__, settings
from lightdiff.architectures import Layer
from lightdiff.defaults import following, preset_for
from lightdiff.errors import LightdiffError, Stopped, from_os, printable
from lightdiff.extras.commands import EXTRAS, ReadableCommand, ReadableGroup, add_commands, ending
from lightdiff.on_demand import on_demand
from lightdiff.options import PRESETS, command
from lightdiff.run_folder import RunFolder
from lightdiff.runtime import WORKER_FOLDER, DistEnv, outlive_readers, rank, restarted

STAGES = "The five stages"
ONLY_NOW = {"run", "init_from", "restart"}  # settings that are not taken from a stopped run

app = typer.Typer(
    name="lightdiff",
    cls=ReadableGroup,
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


def run_stage(module: str, then: str, chosen: settings.Settings) -> None:
    """Run what a command stands for; print the time it took, what comes next, and, to stdout, what it made."""
    began = time.monotonic()
    job = getattr(chosen, "job", settings.JobSettings())
    if WORKER_FOLDER not in os.environ and job.nproc_per_node > 1:
        on_demand("several.launcher:launch")(chosen, sys.argv[1:])
        return
    try:
        made = import_module(f"lightdiff.{module}").run(chosen)
    except KeyboardInterrupt:  # here, as Typer would leave without a word
        raise Stopped("interrupted; what was saved is untouched", 128 + signal.SIGINT) from None
    if rank() == 0 and not job.quiet:
        from lightdiff.runtime.progress import console

        if made_of := ending(module.rpartition(".")[2], chosen, time.monotonic() - began):
            console.print(made_of, soft_wrap=True)
        following = f"; next: lightdiff {then} {shlex.quote(str(chosen.run))}" if then else ""  # type: ignore[attr-defined]
        console.print(f"took {timedelta(seconds=round(time.monotonic() - began))}{following}", soft_wrap=True)
    if rank() == 0:
        typer.echo("\n".join(map(printable, str(made).split("\n"))) if sys.stdout.isatty() else made)


def estimate(module: str, chosen: settings.Settings) -> None:
    """Print what a training, or the trainings of a sweep, will take."""
    if module:
        import_module(f"lightdiff.{module}").estimate(chosen)


# --- what a stage inherits ----------------------------------------------------------------------------------------


def saved_layer(stage: str, given: Layer) -> Layer:
    """What a stopped run of this stage saved, so that the same command resumes it."""
    folder = getattr(RunFolder(run_of(given)), stage)
    if not folder.resumable() or (given.get("restart") and not restarted()):
        return {}
    newest = import_module("lightdiff.runtime.resume").newest
    saved = newest(folder, stage, whole=False).metadata.settings  # the stage verifies the tensors
    return {name: value for name, value in saved.items() if name not in ONLY_NOW}


def inherit_vae(given: Layer) -> Layer:
    """A new VAE takes its architecture from the one it starts from."""
    saved, source = saved_layer("vae", given), given.get("init_from")
    return saved if saved or not source else inherited("train_vae", given, source)


def pick_preset(asked: str, saved: Layer, given: Layer) -> tuple[str, int]:
    """The preset of a training, and the smaller side of its images (px): asked for, the VAE's, or by the machine.

    None where the network is known already: of a stopped run, or of --init-from.
    """
    with suppress(ValueError):
        size = min(settings.Size.of((group(saved, "images") | group(given, "images")).get("resolution", 64)))
        if asked not in ("", "auto") or "model" in saved:
            return asked.removesuffix("auto"), size
        device = group(given, "loop").get("device", "auto")
        if saved.get("preset") in PRESETS:
            return saved["preset"], size
        if device == "auto":
            device = import_module("lightdiff.runtime.processes").pick_device("auto").type
        return preset_for(device), size
    return asked.removesuffix("auto"), 0  # the resolution is none, which is told later


def inherit_encode(given: Layer) -> Layer:
    """Encode takes the image settings from the VAE."""
    return inherited("encode", given, given.get("vae"))


def inherit_unet(given: Layer) -> Layer:
    """train-unet takes shape and scale from the latents, the rest from its own checkpoint."""
    saved = saved_layer("unet", given)
    objective = group(given, "target").get("objective")
    if objective and objective != group(saved, "target").get("objective"):
        group(saved, "noise").pop("schedule", None)  # so that the stage refuses the objective, not the pair of both
    return saved | inherited("train_unet", given, given.get("latents") or saved.get("latents"))


def inherited(stage: str, given: Layer, source: Any) -> Layer:
    """What a stage takes from what an earlier one made: in the run that file and flags say, or in another place."""
    layer: Layer = import_module(f"lightdiff.stages.{stage}").inherited(run_of(given), as_path(source))
    return layer


def group(layer: Layer, name: str) -> Layer:
    """A group of settings that may have come from anywhere; empty if there is none."""
    found = layer.get(name)
    return found if isinstance(found, dict) else {}


def run_of(given: Layer) -> Path:
    """The run folder that file and flags say."""
    return as_path(given.get("run")) or settings.StageSettings().run


def as_path(value: Any) -> Path | None:
    """A path, if it is one; what is none is left for pydantic to refuse."""
    return Path(value) if isinstance(value, (str, Path)) else None


# --- the commands -------------------------------------------------------------------------------------------------


class Command(NamedTuple):
    """A command that is made of settings."""

    model: type[settings.Settings]
    module: str  # its `run(settings)` does the work and returns what to print
    panel: str = STAGES
    estimate: str = ""  # the module whose `estimate(settings)` a --dry-run calls
    presets: str = ""  # the family of presets to choose from
    inherit: Callable[[Layer], Layer] = lambda given: {}
    then: str = ""  # the command that comes next, up to the run
    start: str = ""  # the flags that --help shows; all if empty
    example: str = ""


VAE_START = "data run resolution steps epochs batch-size lpips-gamma"
VAE_EXAMPLE = "lightdiff train-vae --data ~/faces --run runs/faces --resolution 64"
VAE = ("extras.estimate", "vae", inherit_vae, "encode --run", VAE_START, VAE_EXAMPLE)
UNET_EXAMPLE = "lightdiff train-unet --run runs/faces"
UNET = ("extras.estimate", "unet", inherit_unet, "generate --run", "run steps epochs batch-size label", UNET_EXAMPLE)
DRAW_START = "run num-images seed class guidance num-steps out"
DRAW = ("report", DRAW_START, "lightdiff generate --run runs/faces --num-images 16")
COMMANDS = {
    "train-vae": Command(settings.TrainVAESettings, "stages.train_vae", STAGES, *VAE),
    "encode": Command(settings.EncodeSettings, "stages.encode", inherit=inherit_encode, then="scale --run"),
    "scale": Command(settings.ScaleSettings, "stages.scale", then="train-unet --run"),
    "train-unet": Command(settings.TrainUNetSettings, "stages.train_unet", STAGES, *UNET),
    "generate": Command(settings.GenerateSettings, "stages.generate", STAGES, "", "", lambda given: {}, *DRAW),
} | {name: Command(*row) for name, row in EXTRAS.items()}
for name, row in COMMANDS.items():
    run, outlook = partial(run_stage, row.module, row.then), partial(estimate, row.estimate)
    rules = (row.presets, pick_preset, following) if row.presets else ()
    call = command(row.model, run, row.inherit, outlook, row.start.split(), row.example, *rules)
    app.command(name, cls=ReadableCommand, rich_help_panel=row.panel, add_help_option=False)(call)
add_commands(app)


def main() -> None:
    """Run the command line; a mistake or failure ends in one message on stderr and its exit code."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a path need not be valid UTF-8
    outlive_readers()
    try:
        if DistEnv.from_env(os.environ).world_size > 1:
            on_demand("several.worker:begin")()
        sys.exit(app(prog_name="lightdiff", standalone_mode=False))
    except typer.Abort:
        fail(Stopped("interrupted; what was saved is untouched", 128 + signal.SIGINT))
    except Exception as error:
        if "--debug" in sys.argv[1:2] and not isinstance(error, Stopped):
            raise
        if isinstance(error, OSError):
            fail(from_os(error))
        fail(error if isinstance(error, LightdiffError) else on_demand("wrong_settings:unexpected")(error))


def fail(error: LightdiffError) -> NoReturn:
    """Report an error and exit: on stderr, or to the process that started this one, which reports it once for all."""
    if isinstance(error, Stopped) and error.exit_code > 128:  # whoever asks again need not be heard
        for name in ("SIGTERM", "SIGHUP", "SIGXCPU"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
    if DistEnv.from_env(os.environ).world_size > 1:
        on_demand("several.worker:fail")(error, tell)
    tell(error)
    sys.exit(error.exit_code)


def tell(error: LightdiffError) -> None:
    """Print an error on stderr."""
    from rich.text import Text

    from lightdiff.runtime.progress import SafeConsole

    head = "stopped:" if isinstance(error, Stopped) else "error:"
    who = f"process {rank()}: " if rank() and not str(error).startswith("process ") else ""
    SafeConsole(stderr=True).print(Text.assemble((head, "bold red"), f" {who}{error}"), soft_wrap=True)
