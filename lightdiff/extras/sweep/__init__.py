"""sweep: repeat a run with other values of one or two settings, and show their effects side by side."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightdiff.data.index import read_index
from lightdiff.errors import UserError
from lightdiff.extras.evidence import rows_of, seconds_an_image
from lightdiff.extras.settings import SweepSettings
from lightdiff.extras.settings_rows import format_duration
from lightdiff.extras.sweep.outcome import write_results
from lightdiff.extras.sweep.plan import Kind, Plan, Result, latents_of, vae_of
from lightdiff.run_folder import INDEX, StageFolder, atomic_link, atomic_write_text
from lightdiff.runtime import DistEnv
from lightdiff.runtime.progress import console
from lightdiff.runtime.stage import open_stage
from lightdiff.settings import (
    JobSettings,
    StageSettings,
    TrainUNetSettings,
    TrainVAESettings,
    with_changes,
)
from lightdiff.stages import encode, generate, scale, train_unet, train_vae

NAMES: dict[Kind, tuple[str, str]] = {
    "vae": ("VAE", "VAEs"),
    "latents": ("set of latents", "sets of latents"),
    "unet": ("U-Net", "U-Nets"),
    "samples": ("set of samples", "sets of samples"),
}


def run(settings: SweepSettings) -> str:
    """Make the missing results, draw the contact sheets, and return their paths, one per line."""
    if DistEnv.from_env(os.environ).world_size > 1:
        raise UserError("sweep runs in one process: start it without a launcher")
    plan = Plan(settings)
    find_lpips(plan)
    with open_stage(settings, "sweep", lambda: plan.folder):
        todo = print_plan(plan)
        for number, result in enumerate(todo, 1):
            console.print()
            console.print(
                f"{number} of {len(todo)}: {NAMES[result.kind][0]}, {shared_values(plan, result)}", style="bold"
            )
            make(plan, result, settings.job)
        return "\n".join(map(str, write_results(plan)))


def estimate(settings: SweepSettings) -> None:
    """Print what a sweep would make."""
    print_plan(Plan(settings))


def find_lpips(plan: Plan) -> None:
    """Check that all LPIPS weights are available, as the last VAE may be the first to need them.

    Raises:
        UserError: If some cannot be found or downloaded.
    """
    stages = [s for result in plan.new_results() for s in result.settings.values() if isinstance(s, TrainVAESettings)]
    wanted = {(s.loss.lpips_net, s.loss.lpips_weights) for s in stages if s.loss.lpips_gamma}
    if wanted:
        from lightdiff.models.lpips import find_weights  # imports torchvision: 1.5 s

        for net, file in wanted:
            find_weights(net, file)


# --- the plan ------------------------------------------------------------------------------------------------------


def print_plan(plan: Plan) -> list[Result]:
    """Print what exists, what is to be made and roughly how long that takes; return what is to be made."""
    values = " x ".join(f"{axis.name} {', '.join(axis.texts)}" for axis in plan.axes)
    console.print(f"{len(plan.cells)} cells: {values}", soft_wrap=True)
    shared = list(dict.fromkeys(r.kind for cell in plan.cells for r in cell.results.values() if not r.new))
    if shared:
        console.print(f"from {plan.base.run.path}: {', '.join(NAMES[kind][0] for kind in shared)}", soft_wrap=True)
    results = plan.new_results()
    existing, todo = ([result for result in results if result.done == done] for done in (True, False))
    if existing:
        console.print(f"already made: {count_results(existing)}", soft_wrap=True)
    if not todo:
        console.print("nothing is left to make")
        return todo
    console.print(f"to make: {count_results(todo)}", soft_wrap=True)
    seconds, size = cost(plan, todo)
    if seconds or size:
        console.print(
            f"training takes about {format_duration(seconds)} at that run's speed; results take {size / 1e6:.0f} MB",
            soft_wrap=True,
        )
    return todo


def count_results(results: Sequence[Result]) -> str:
    """The number of results of each kind, and their training lengths, as text."""
    parts = []
    for kind, names in NAMES.items():
        some = [result for result in results if result.kind == kind]
        if some:
            steps = sorted({training_length(result) for result in some} - {""})
            parts.append(f"{len(some)} {names[len(some) > 1]}" + (f" of {' or '.join(steps)}" if steps else ""))
    return ", ".join(parts)


def training_length(result: Result) -> str:
    """Steps or epochs of a result's training; empty if it is not trained."""
    loop = loop_settings(result)
    return "" if loop is None else f"{loop.epochs:g} epochs" if loop.epochs else f"{loop.steps:,} steps"


def loop_settings(result: Result) -> Any:
    """The loop settings of a result that is trained; None for others."""
    (first, *_) = result.settings.values()
    return first.loop if isinstance(first, (TrainVAESettings, TrainUNetSettings)) else None


def cost(plan: Plan, todo: Sequence[Result]) -> tuple[float, int]:
    """Seconds of training at the base run's speed, and bytes of results if they are as large as the base's."""
    run = plan.base.run
    places = {"vae": run.vae.path, "latents": run.latents, "unet": run.unet.path}
    seconds, size = 0.0, 0
    for result in todo:
        place, loop = places.get(result.kind), loop_settings(result)
        if place is None or result.twin:
            continue
        size += sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        if loop is not None and not loop.epochs:
            seconds += loop.steps * loop.batch_size * seconds_an_image(rows_of(StageFolder(place)))
    return seconds, size


# --- making -------------------------------------------------------------------------------------------------------


def shared_values(plan: Plan, result: Result) -> str:
    """The values that all cells with this result share, as text."""
    cells = [cell for cell in plan.cells if result.place in {r.place for r in cell.results.values()}]
    shared = [
        f"{axis.name} {cells[0].texts[i]}"
        for i, axis in enumerate(plan.axes)
        if len({cell.texts[i] for cell in cells}) == 1
    ]
    return ", ".join(shared) or "for all cells"


def make(plan: Plan, result: Result, job: JobSettings) -> None:
    """Run the stages that make a result; a stage that was interrupted resumes."""
    home, source = result.place, result.source
    home.mkdir(exist_ok=True)
    atomic_write_text(home / "what.json", result.describe())

    def prepare(stage: str, **more: Any) -> Any:
        chosen: StageSettings = result.settings[stage]
        return with_changes(chosen, run=home, job=job, **more)

    if result.kind == "vae":
        train_vae.run(prepare("train-vae"))
    elif result.kind == "latents":
        assert source is not None
        if result.twin:
            link_latents(latents_of(result.twin), latents_of(result))
        else:
            encode.run(prepare("encode", vae=source.place))
        scale.run(prepare("scale"))
    elif result.kind == "unet":
        assert source is not None
        train_unet.run(
            prepare("train-unet", latents=latents_of(source), **train_unet.inherited(home, latents_of(source)))
        )
    else:
        assert source is not None
        generate.run(prepare("generate", unet=source.place, vae=vae_of(source), out=home))
    atomic_write_text(home / "done", time.strftime("%Y-%m-%d %H:%M:%S\n"))


def link_latents(source: Path, target: Path) -> None:
    """Link the same latents into another folder, to be scaled differently; the links take no disk space."""
    for file in source.glob("*.safetensors"):
        atomic_link(target / file.name, file)
    index = read_index(source)
    index.statistics = None
    index.write(target / INDEX)
