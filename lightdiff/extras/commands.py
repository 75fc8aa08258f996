"""The commands beside the five stages. Imports no torch before one is called, so that `--help` does not either."""

from functools import partial
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lightdiff.architectures import Size
from lightdiff.errors import UserError, shorten
from lightdiff.extras.narrow_help import ReadableCommand as ReadableCommand
from lightdiff.extras.narrow_help import ReadableGroup as ReadableGroup
from lightdiff.extras.settings import (
    DemoSettings,
    EditSettings,
    EvaluateSettings,
    SweepSettings,
    TrajectorySettings,
    WalkSettings,
)
from lightdiff.options import parse_number
from lightdiff.settings import Device

SAMPLING = "More ways to sample"
EVALUATION = "Evaluating and comparing"
LOOKING = "Looking at images and runs"
STARTING = "Starting points"
LEAVING = "Taking a model elsewhere"
# Commands that are made of settings: the settings, the module that runs them, the panel, the module that estimates
EXTRAS: dict[str, tuple[Any, ...]] = {
    "edit": (EditSettings, "extras.edit", SAMPLING),
    "walk": (WalkSettings, "extras.walk", SAMPLING),
    "trajectory": (TrajectorySettings, "extras.trajectory", SAMPLING),
    "evaluate": (EvaluateSettings, "extras.evaluate", EVALUATION),
    "sweep": (SweepSettings, "extras.sweep", EVALUATION, "extras.sweep"),
    "demo": (DemoSettings, "extras.demo", STARTING),
}


option = partial(typer.Option, metavar="")  # no column of types: the text and the default show them


def number(kind: type, name: str, text: str) -> Any:
    """An option for a number, which `parse_number` reads."""
    example = f"--{name} {64 if kind is int else 0.1}"
    parser = partial(parse_number, kind, f"--{name}", example=example)
    return option(f"--{name}", help=text, parser=parser)


AsJSON = Annotated[bool, option("--json", help="print it as JSON")]


def ending(stage: str, chosen: Any, seconds: float) -> str:
    """What a stage's last lines say of what it made."""
    from lightdiff.extras.ending import ending as of_stage

    return of_stage(stage, chosen, seconds)


def add_commands(app: typer.Typer) -> None:
    """Add them all to the command line."""
    for function in (inspect, show, report):
        app.command(cls=ReadableCommand, rich_help_panel=LOOKING)(function)
    app.command(cls=ReadableCommand, rich_help_panel=STARTING)(pack)
    app.command(cls=ReadableCommand, rich_help_panel=STARTING)(presets)
    app.command("export", cls=ReadableCommand, rich_help_panel=LEAVING)(export_model)
    app.command("import", cls=ReadableCommand, rich_help_panel=STARTING)(import_model)


def inspect(
    data: Annotated[list[Path], typer.Argument(help="folders of images")],
    val_share: Annotated[float, number(float, "val-share", "share of images held out for validation")] = 0.05,
    labels: Annotated[Path | None, option(help="table of labels, as for train-vae")] = None,
    json: AsJSON = False,
) -> None:
    """Report on folders of images: counts, sizes, formats, duplicates, bad files, labels, split."""
    from lightdiff.extras.inspect import inspect as look
    from lightdiff.extras.inspect import print_report

    report = look(data, val_share, labels=labels)
    if json:
        typer.echo(dumps(report.model_dump(mode="json"), indent=2))
    else:
        from lightdiff.runtime.progress import SafeConsole

        print_report(report, SafeConsole(markup=True))


def pack(
    data: Annotated[list[Path], typer.Argument(help="folders or archives of images", metavar="DATA...")],
    out: Annotated[Path, typer.Argument(help="folder for the shards")],
    resolution: Annotated[str, option(help="side of square images in pixels, or height x width")],
    image: Annotated[
        Literal["webp", "png", "jpeg"], option(help="webp, png, jpeg: format; webp and png are lossless")
    ] = "webp",
    quality: Annotated[int, number(int, "quality", "of jpeg")] = 95,
    shards: Annotated[Literal["tar", "zip"], option(help="tar, zip: kind of the shards")] = "tar",
    shard_size: Annotated[int, number(int, "shard-size", "images of a shard")] = 10_000,
    labels: Annotated[Path | None, option(help="table of labels, as for train-vae")] = None,
    val_share: Annotated[float, number(float, "val-share", "share of images held out for validation")] = 0.05,
    background: Annotated[str, option(help="colour behind transparent pixels")] = "white",
    max_bad: Annotated[float, number(float, "max-bad", "tolerated share of unreadable images")] = 0.01,
    processes: Annotated[int, number(int, "processes", "processes that pack; 0: as many as there are cores")] = 0,
) -> None:
    """Resize images once and pack them as tar or zip shards, which load faster and copy well."""
    from lightdiff.extras.pack import pack as write
    from lightdiff.options import build
    from lightdiff.runtime.processes import usable_cores
    from lightdiff.settings import TrainVAESettings

    for name, value, least, most in (("quality", quality, 1, 100), ("shard-size", shard_size, 1, 10**9)):
        if not least <= value <= most:
            raise UserError(f"--{name}: {value} is not between {least} and {most:,}")
    chosen = {
        "data": data,
        "resolution": resolution,
        "labels": labels,
        "val_share": val_share,
        "background": background,
        "max_bad": max_bad,
    }
    images = build(TrainVAESettings, [{"images": chosen}]).images
    typer.echo(write(images, out, image, quality, shards, shard_size, processes or usable_cores()))


def show(
    place: Annotated[Path, typer.Argument(metavar="PATH", help="a checkpoint, a run folder or a folder of latents")],
    every: Annotated[bool, option("--all", help="settings at their defaults, too")] = False,
    json: AsJSON = False,
) -> None:
    """Show a checkpoint's or a run's health, metrics, lineage and settings."""
    from lightdiff.extras.show import show as look

    look(place, as_json=json, all_settings=every)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders; several are shown side by side")],
    out: Annotated[
        Path | None, option(help="file to write; default: RUN/report.html, or report.html for several runs")
    ] = None,
    device: Annotated[Device, option(help="auto, cpu, cuda, mps: where to compute the pictures")] = "auto",
    live: Annotated[bool, option("--live", help="serve it on this machine instead, renewed while training")] = False,
    port: Annotated[int, number(int, "port", "of --live; 0: any that is free")] = 8033,
) -> None:
    """Write one self-contained HTML page about a run, or about several side by side."""
    if not live:
        from lightdiff.extras.report import report as write

        return typer.echo(write(runs, out, device))
    if out:
        raise UserError("--out: a live page is not written; leave it out, or leave out --live")
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port: {shorten(port)} is not between 0 and {(1 << 16) - 1}")
    from lightdiff.extras.report.live import serve

    serve(runs, port)


def presets(
    resolution: Annotated[str, option(help="side of square images in pixels, or height x width")] = "64",
) -> None:
    """List the presets with parameters and memory, for images of a size."""
    try:
        size = Size.of(resolution)
    except ValueError as error:
        raise UserError(f"--resolution: {error} (found {shorten(resolution)})") from None
    if not 8 <= min(size) <= max(size) <= 1 << 14:
        raise UserError(f"--resolution: {shorten(resolution)} is not between 8 and {1 << 14}")
    from lightdiff.extras.presets import show_presets

    show_presets(size)


def import_model(
    source: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="diffusers folder of a VAE or pipeline, file of a VAE (.safetensors, .ckpt), hf://OWNER/NAME, or "
            "checkpoint of the original scripts (.pth)",
        ),
    ],
    run: Annotated[Path, option(help="run folder to put it in")] = Path("runs/default"),
    resolution: Annotated[int, number(int, "resolution", "side of the images it is for, in pixels")] = 256,
) -> None:
    """Start from a VAE that others have trained, or convert a checkpoint of the original scripts."""
    from lightdiff.extras.import_vae import import_model

    typer.echo(import_model(source, run, resolution))


def export_model(
    out: Annotated[Path, typer.Argument(help="folder to write")],
    to: Annotated[
        Literal["diffusers", "onnx", "safetensors", "web"], option(help="diffusers, onnx, safetensors, web: what for")
    ],
    run: Annotated[Path, option(help="run folder, or a folder exported before")] = Path("runs/default"),
    about: Annotated[str, option(help="what it was trained on, in words, for the model card")] = "",
    license: Annotated[str, option(help="licence for the model card, as the Hugging Face Hub names it")] = "unknown",
    samples: Annotated[int, number(int, "samples", "images in the model card; 0: none")] = 8,
    runtime: Annotated[
        Path | None, option(help="folder of npm's onnxruntime-web, to be put beside the page of --to web")
    ] = None,
    push: Annotated[str, option(help="OWNER/NAME on the Hugging Face Hub to upload the folder to")] = "",
    guide_with: Annotated[
        Path | None, option(help="worse U-Net to write, too, for guidance without a class: as generate takes it")
    ] = None,
) -> None:
    """Write a model as a folder for other programs, with a model card."""
    if not 0 <= samples <= 64:
        raise UserError(f"--samples: {shorten(samples)} is not between 0 and 64")
    from lightdiff.extras.export import export

    typer.echo(export(run, to, out, about, license, samples, runtime, push, guide_with))
