"""What each choice is worth: recipes within one budget of processor time, judged by one distance.

`python -m tests.bench.recipe [ROW ...] [--seed N] [--samples N] [--share S]` trains, draws and judges; every row is
added to a CSV file at once, so that the table can grow and be interrupted. VAEs and latents are shared by rows that
have them in common.
"""

import argparse
import csv
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHARED = Path(__file__).resolve().parents[3] / "shared"
FACES = SHARED / "data" / "faces"
FRECHET = SHARED / "tools" / "frechet.py"
LPIPS = SHARED / "weights" / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "recipe" / "rows.csv"
VAE_SECONDS, UNET_SECONDS = 900.0, 1500.0  # of all threads, user and system
FIELDS = [
    *("row", "seed", "share", "samples", "frechet", "psnr"),
    *("vae_parameters", "vae_steps", "vae_cpu", "unet_parameters", "unet_steps", "unet_cpu", "date", "flags"),
]


@dataclass(frozen=True)
class Recipe:
    """What is typed beyond the data, for each of the stages."""

    vae: str = ""
    scale: str = ""
    unet: str = ""
    generate: str = ""
    about: str = ""
    vae_loss: str = field(default="--lpips-net squeeze")


ORIGINAL = Recipe(
    vae="--preset original --model.encoder-channels 32,64,128 --model.decoder-channels 128,64,32 --kl-beta 1e-3 "
    "--lpips-gamma 0.5 --lr 1e-4 --lr-schedule constant --warmup-steps 0 --ema-decay 0 --batch-size 16 "
    "--weight-decay 0.01 --beta2 0.999 --random-crop 1",
    scale="--normalize global",
    unet="--preset original --model.channels 64,128,256 --objective eps --schedule cosine --lr 1e-4 "
    "--lr-schedule constant --warmup-steps 0 --beta2 0.999 --ema-decay 0.999 --batch-size 32 --density uniform "
    "--no-stratified",
    generate="--sampler ddim --min-alpha-bar 0",
    about="the original scripts' recipe, its networks scaled to the budget",
)
ROWS: dict[str, Recipe] = {"default": Recipe(about="what lightdiff does unless told otherwise"), "original": ORIGINAL}


def processor_seconds() -> float:
    """User and system time of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def call(*words: object) -> tuple[str, float]:
    """What a command prints, and its processor time."""
    before = processor_seconds()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}\n{done.stderr[-3000:]}")
    return done.stdout, processor_seconds() - before


def lightdiff(*words: object) -> float:
    """Run a command of lightdiff and return its processor time."""
    return call("-m", "lightdiff", *words)[1]


def trained(stage: str, flags: list[object], run: Path, budget: float) -> tuple[int, float]:
    """Train as many steps as the budget allows, found by two short runs; the steps, and the time they took."""
    kept = run / f"{stage}-done.json"
    if kept.is_file():
        steps, seconds = json.loads(kept.read_text())
        return steps, seconds
    trial = run / "trial"
    few, more = 10, 60
    taken = [
        lightdiff(stage, *flags, "--run", trial, "--steps", n, "--restart", "--val-every", 0, "--save-every", 10**6)
        for n in (few, more)
    ]
    step = (taken[1] - taken[0]) / (more - few)
    steps = int((budget - (taken[0] - few * step)) / step)
    seconds = lightdiff(stage, *flags, "--run", run, "--steps", steps, "--restart", "--val-every", max(1, steps // 4))
    kept.write_text(json.dumps([steps, seconds]))
    return steps, seconds


def parameters(file: Path) -> int:
    """Of a checkpoint's network."""
    from lightdiff.checkpoint import Checkpoint

    saved = Checkpoint(file)
    return sum(t.numel() for t in saved.tensors("model.").values())


def last_value(metrics: Path, name: str) -> float:
    """The last value of a metric."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return float(next(row[name] for row in reversed(rows) if name in row))


def home(folder: Path, *parts: object) -> Path:
    """A folder for what is made with these settings."""
    name = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:12]
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "what.txt").write_text("\n".join(map(str, parts)) + "\n")
    return folder / name


def measure(name: str, recipe: Recipe, seed: int, samples: int, share: float, folder: Path) -> dict[str, Any]:
    """Train both networks of a recipe, draw, and judge."""
    split = str.split
    loss = [] if "--lpips-gamma 0 " in f"{recipe.vae} " else [*split(recipe.vae_loss), "--lpips-weights", LPIPS]
    images = ["--data", FACES, "--resolution", 64]
    vae_run = home(folder, "vae", recipe.vae, recipe.vae_loss, seed, share)
    vae_flags = [*images, *split(recipe.vae), *loss, "--seed", seed]
    vae_steps, vae_cpu = trained("train-vae", vae_flags, vae_run, VAE_SECONDS * share)
    latents = home(folder, "latents", vae_run.name, recipe.scale)
    if not (latents / "scaled").is_file():
        lightdiff("encode", "--run", latents, "--vae", vae_run)
        lightdiff("scale", "--run", latents, *split(recipe.scale))
        (latents / "scaled").touch()
    unet_run = home(folder, "unet", latents.name, recipe.unet, seed, share)
    unet_flags = ["--latents", latents, *split(recipe.unet), "--seed", seed]
    unet_steps, unet_cpu = trained("train-unet", unet_flags, unet_run, UNET_SECONDS * share)
    out = home(folder, "out", unet_run.name, recipe.generate, samples)
    vae = latents / "latents" / "vae.safetensors"
    drawing = ["--run", unet_run, "--vae", vae, "--num-images", samples, "--seed", seed, "--out", out / "images"]
    lightdiff("generate", *drawing, "--batch-size", 100, *split(recipe.generate))
    grid = out / "images" / "grid.png"
    if grid.is_file():
        grid.rename(out / "grid.png")
    reference = folder / "reference.npz"
    if not reference.is_file():
        call(FRECHET, FACES, out / "images", "--size", 64, "--save", reference)
    said, _ = call(FRECHET, reference, out / "images", "--size", 64, "--count", samples)
    numbers = re.findall(r"\d+\.\d+", said)
    return {
        "row": name,
        "seed": seed,
        "share": share,
        "samples": samples,
        "frechet": float(numbers[0]),
        "psnr": round(last_value(vae_run / "vae" / "metrics.jsonl", "val_psnr"), 2),
        "vae_parameters": parameters(vae_run / "vae" / "checkpoints" / "last.safetensors"),
        "vae_steps": vae_steps,
        "vae_cpu": round(vae_cpu),
        "unet_parameters": parameters(unet_run / "unet" / "checkpoints" / "last.safetensors"),
        "unet_steps": unet_steps,
        "unet_cpu": round(unet_cpu),
        "date": time.strftime("%Y-%m-%d"),
        "flags": " | ".join((recipe.vae, recipe.scale, recipe.unet, recipe.generate)),
    }


def add(path: Path, row: dict[str, Any]) -> None:
    """Add a row to the table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.is_file()
    with path.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, FIELDS)
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    """Measure the rows asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; none: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--share", type=float, default=1.0, help="of the budget")
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV file to add to")
    parser.add_argument("--work", type=Path, default=Path("runs/recipe"), help="where runs are kept")
    for stage in ("vae", "scale", "unet", "generate"):
        parser.add_argument(f"--{stage}", default=None, help="flags in place of the row's, to try something out")
    chosen = parser.parse_args()
    if unknown := sorted(set(chosen.rows) - set(ROWS)):
        parser.error(f"there is no {unknown[0]}; there are {', '.join(ROWS)}")
    for name in chosen.rows or ROWS:
        tried = {s: getattr(chosen, s) for s in ("vae", "scale", "unet", "generate") if getattr(chosen, s) is not None}
        recipe = Recipe(**{**{s: getattr(ROWS[name], s) for s in ("vae", "scale", "unet", "generate")}, **tried})
        row = measure(name, recipe, chosen.seed, chosen.samples, chosen.share, chosen.work.absolute())
        add(chosen.results, row)
        print(row, flush=True)


if __name__ == "__main__":
    main()
