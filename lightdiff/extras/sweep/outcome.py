"""Results of a sweep: metrics and contact sheets of all cells."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.files import list_images
from lightdiff.data.images import to_float, to_uint8
from lightdiff.extras.evidence import held_out, load_images, loss_definition
from lightdiff.extras.set_aside import move_aside
from lightdiff.extras.sheet import Heading, Pictures, contact_sheet
from lightdiff.extras.sweep.axes import Axis
from lightdiff.extras.sweep.plan import Cell, Plan, Result, cache_key
from lightdiff.extras.tables import print_table
from lightdiff.pictures import opened, save_png
from lightdiff.pipeline import load_vae
from lightdiff.run_folder import RunFolder, atomic_write_text, find_unet, find_vae, read_json
from lightdiff.runtime.processes import pick_device
from lightdiff.runtime.progress import console
from lightdiff.settings import ImageSettings, with_changes

SHEET, RECONSTRUCTIONS, RESULTS = "sheet.png", "sheet-reconstructions.png", "sweep.json"
ACROSS = 4  # pictures side by side in a cell of a sheet with rows and columns
SHOWN = {"vae": ("val_psnr", "val_mse", "val_lpips", "val_kl"), "unet": ("val_loss",)}  # others cannot be compared


def write_results(plan: Plan) -> list[Path]:
    """Write the metrics, draw the sheets and return their paths; results of other values are moved aside."""
    folder, s = plan.folder, plan.settings
    about: dict[str, Any] = {"run": str(s.run), "vary": {axis.name: list(axis.texts) for axis in plan.axes}}
    about |= {"set": {axis.name: axis.texts[0] for axis in plan.fixed}, "num_images": s.num_images, "until": s.until}
    about["cells"] = [describe_cell(plan, cell) for cell in plan.cells]
    names = [name for name in (RESULTS, RECONSTRUCTIONS, SHEET) if (folder / name).is_file()]
    if RESULTS in names and read_json(folder / RESULTS) != json.loads(json.dumps(about)):
        aside = move_aside([folder / name for name in names], folder / "sheets")
        console.print(f"the sheets of other values have been moved to {aside}", soft_wrap=True)
    atomic_write_text(folder / RESULTS, json.dumps(about, indent=2) + "\n")
    print_metrics(plan, about["cells"])
    sheets = []
    vary_vae = [axis for axis in plan.axes if axis.stage == "train-vae"]
    if vary_vae:
        originals, reconstructed = reconstruct(plan)
        save_png(folder / RECONSTRUCTIONS, draw_sheet(plan, "reconstructions", vary_vae, reconstructed, originals))
        sheets.append(folder / RECONSTRUCTIONS)
    if plan.whole:
        files = range(s.num_images)
        samples = [[opened(cell.end.place / f"{i:05d}.png") for i in files] for cell in plan.cells]
        save_png(folder / SHEET, draw_sheet(plan, "samples", plan.axes, samples))
        sheets.append(folder / SHEET)
    return sheets


def describe_cell(plan: Plan, cell: Cell) -> dict[str, Any]:
    """A cell's entry in sweep.json."""
    results = cell.results
    return {
        "values": dict(zip((axis.name for axis in plan.axes), cell.texts, strict=True)),
        "folders": {kind: str(result.place) for kind, result in results.items()},
        "metrics": {kind: trained_network(r).metadata.metrics for kind, r in results.items() if kind in SHOWN},
        "settings": {stage: cache_key(s) for result in results.values() for stage, s in result.settings.items()},
    }


def trained_network(result: Result) -> Checkpoint:
    """The checkpoint of a VAE or a U-Net."""
    run = RunFolder(result.place)
    return Checkpoint(find_vae(result.place, run) if result.kind == "vae" else find_unet(result.place, run))


def print_metrics(plan: Plan, cells: Sequence[dict[str, Any]]) -> None:
    """Print the validation metrics that can be compared between cells."""
    table = Table(title="Validation", title_justify="left")
    for axis in plan.axes:
        table.add_column(axis.name)
    made = {result.kind for result in plan.new_results()}
    pairs = [(kind, name) for kind, names in SHOWN.items() for name in names if kind in made]
    pairs = [(kind, name) for kind, name in pairs if any(name in cell["metrics"][kind] for cell in cells)]
    definitions = (
        [loss_definition(trained_network(cell.results["unet"]).metadata) for cell in plan.cells] if plan.whole else []
    )
    if any(other != definitions[0] for other in definitions):
        pairs = [(kind, name) for kind, name in pairs if kind != "unet"]
        console.print("note: losses of different objectives, schedules or latents cannot be compared; see the sheet")
    for kind, name in pairs:
        table.add_column(f"{kind} {name}", justify="right")
    for cell in cells:
        numbers = [cell["metrics"][kind].get(name) for kind, name in pairs]
        table.add_row(*cell["values"].values(), *("" if n is None else f"{n:.4g}" for n in numbers))
    if pairs:
        print_table(console, table)


@torch.inference_mode()
def reconstruct(plan: Plan) -> tuple[Pictures, list[Pictures]]:
    """The first held-out images (training images if none are held out), and each cell's reconstructions of them."""
    its_own = plan.base.vae_settings
    chosen = held_out(list_images(its_own.images, console))[: plan.settings.num_images]
    device = pick_device(its_own.loop.device)

    def load(framing: ImageSettings) -> torch.Tensor:
        return torch.stack(load_images(chosen, with_changes(framing, data=its_own.images.data)))

    made: dict[Path, Pictures] = {}
    for cell in plan.cells:
        result = cell.results["vae"]
        if result.place not in made:
            saved = trained_network(result)
            vae, _ = load_vae(saved, device)
            x = to_float(load(saved.settings(ImageSettings, "images")).to(device))
            made[result.place] = to_pictures(to_uint8(vae.decoder(vae.encoder(x).mu).cpu()))
    return to_pictures(load(its_own.images)), [made[cell.results["vae"].place] for cell in plan.cells]


def to_pictures(pixels: torch.Tensor) -> Pictures:
    """Pillow images of uint8 tensors."""
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]


def draw_sheet(
    plan: Plan, what: str, axes: Sequence[Axis], cells: Sequence[Pictures], originals: Pictures | None = None
) -> Image.Image:
    """A contact sheet over these axes, with a first row of originals if given; cells that differ elsewhere coincide."""
    first, *second = axes
    at = [plan.axes.index(axis) for axis in axes]
    found = {tuple(cell.texts[i] for i in at): shown for cell, shown in zip(plan.cells, cells, strict=True)}
    columns = Heading(f"--{second[0].name}", second[0].texts) if second else Heading("", [""])
    rows = [[found[row, column] if second else found[(row,)] for column in columns.labels] for row in first.texts]
    labels = list(first.texts)
    if originals is not None:
        rows, labels = [[originals for _ in columns.labels], *rows], ["originals", *labels]
    fixed = ", ".join(f"{axis.name} {Path(axis.texts[0]).name}" for axis in plan.fixed)  # no path of a machine
    caption = f"{plan.base.run.path.absolute().name}: {what}" + (f", with {fixed}" if fixed else "")
    across = ACROSS if second else plan.settings.num_images
    return contact_sheet(caption, Heading(f"--{first.name}", labels), columns, rows, across)
