"""What each choice is worth: recipes within one budget of processor time, judged by one distance.

`nox -s recipe -- [ROW ...] [--seed N ...] [--samples N ...] [--share S ...] [--write]`, or
`python -m tests.bench.recipe` the same, trains, draws and judges. Each row is added to a CSV file as soon as it is
known, and a row that is there is not measured again: the table can grow and be interrupted. VAEs, latents and U-Nets
are shared by the rows that have them in common.

Short runs of the default recipe tell how many steps the budget buys it, once for all rows. All of them take as many, or
fewer or more where a step of theirs costs other than the default's, which short runs of both in turn tell: what a
second buys changes with the processor, with what else it does and from hour to hour, and none of it is to be part of
what a choice is worth.

Every process computes in one thread, and as many run at a time as there are cores: threads that wait for each other
in turning loops would count as processor time. So the short runs that the budget is measured by run at a time, too:
cores that share caches and memory make fewer steps in a second side by side.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

import torch

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.images import frame, load_image, to_float, to_uint8
from lightdiff.pictures import save_png
from lightdiff.pipeline import load_vae
from lightdiff.runtime.progress import read_metrics
from lightdiff.settings import SamplerName
from tests.bench import recipe_page
from tests.bench.contest import processor

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
FACES = SHARED / "data" / "faces"
FRECHET = SHARED / "tools" / "frechet.py"
LPIPS = SHARED / "weights" / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
Stage = Literal["train-vae", "train-unet"]
# Of processor time, user and system, in all threads:
SECONDS: dict[Stage, float] = {"train-vae": 900.0, "train-unet": 1500.0}
PARTS = 10  # of a training, after each of which a step file is kept
TRIALS = (10, 60)  # optimizer steps of the two short runs that the time of a step is found by
TURNS = 3  # of such runs, where the times of two recipes are compared
FIELDS = [
    *("row", "seed", "share", "samples", "frechet", "psnr", "val_loss"),
    *("vae_parameters", "vae_steps", "vae_cpu", "unet_parameters", "unet_steps", "unet_cpu"),
    *("processor", "date", "flags"),
]
STAGES = ("vae", "scale", "unet", "generate")  # that a row has flags for


@dataclass(frozen=True)
class Recipe:
    """The flags of each stage, beyond those for the data."""

    about: str
    vae: str = ""
    scale: str = ""
    unet: str = ""
    generate: str = ""
    timed: tuple[Stage, ...] = ()  # whose steps cost other than the default's
    vae_seconds: float = SECONDS["train-vae"]  # of the whole budget, before its share; the U-Net gets the rest
    worse: tuple[str, float] | None = None  # flags, and share of the steps, of a worse U-Net to guide away from

    @property
    def flags(self) -> str:
        """All flags, as typed."""
        worse = ["{} for {:g} of the steps".format(*self.worse)] if self.worse else []
        return " | ".join([self.vae, self.scale, self.unet, self.generate, *worse])

    def tried(self, flags: dict[str, str]) -> "Recipe":
        """The recipe with further flags."""
        more = {stage: f"{getattr(self, stage)} {flags[stage]}".strip() for stage in STAGES}
        timed = {f"train-{stage}" for stage in ("vae", "unet") if flags[stage]}
        return replace(self, **more, timed=tuple({*self.timed, *timed}))  # type: ignore[arg-type]


def guided(share: str, weight: float, sampler: str = "") -> Recipe:
    """The default, guided by its own step file after this share of the steps; drawn by another sampler in 20 steps."""
    about = (
        f"guided by the U-Net after a {share} of its steps" if share != "half" else "guided by that after half of them"
    )
    drawn, flags = (f", by {sampler}", f" --sampler {sampler} --num-steps 20") if sampler else ("", "")
    how = f"--guide-with step-{{{share}}} --guidance {weight:g}{flags}"
    return Recipe(f"{about}, weight {weight:g}{drawn}", generate=how)


def guided_by_narrower(part: float, words: str, weight: float) -> Recipe:
    """The default, guided by a U-Net of half its width, trained for this part of its steps."""
    about = f"guided by a U-Net of width 32 after {words} of the steps, weight {weight:g}"
    return Recipe(about, generate=f"--guide-with {{worse}} --guidance {weight:g}", worse=("--model.width 32", part))


EMAS = "--ema-decay 0.9999,0.99"
UNLIMITED = "--sampler ddim --num-steps 50 --min-alpha-bar 0"  # begins where there is next to no signal
ORIGINAL = Recipe(
    "the original scripts' recipe, its networks scaled to the budget",
    vae="--preset original --model.encoder-channels 32,64,128 --model.decoder-channels 128,64,32 --kl-beta 1e-3 "
    "--lpips-gamma 0.5 --lr-schedule constant --warmup-steps 0 --ema-decay 0 --beta2 0.999 --random-crop 1",
    scale="--normalize global",
    unet="--preset original --model.channels 64,128,256 --lr-schedule constant --warmup-steps 0 --beta2 0.999",
    generate=f"{UNLIMITED} --clamp 3",
    timed=("train-vae", "train-unet"),
)
ROWS: dict[str, Recipe] = {
    "default": Recipe("what lightdiff does unless told otherwise"),
    "original": ORIGINAL,
    "original-no-clamp": replace(ORIGINAL, about="the original, drawn without its limit on x0", generate=UNLIMITED),
    "original-redrawn": replace(ORIGINAL, about="the original's networks, drawn as lightdiff draws", generate=""),
    "objective-eps": Recipe("noise is predicted, on the cosine schedule", unet="--objective eps"),
    "objective-v": Recipe("v is predicted, on the cosine schedule", unet="--objective v"),
    "weight-min-snr": Recipe("min-SNR weights", unet="--loss-weight min-snr"),
    "density-uniform": Recipe("all levels alike", unet="--density uniform"),
    "not-stratified": Recipe("each level drawn by itself", unet="--no-stratified"),
    "unet-adamw": Recipe("AdamW for the U-Net, lr 1e-3", unet="--optimizer adamw --lr 1e-3", timed=("train-unet",)),
    "unet-wider": Recipe("U-Net of width 96", unet="--model.width 96", timed=("train-unet",)),
    "unet-batch-16": Recipe("the U-Net's batch is 16", unet="--batch-size 16", timed=("train-unet",)),
    "unet-lr-4e-3": Recipe("twice the learning rate for the U-Net", unet="--lr 4e-3"),
    "unet-convnext": Recipe(
        "ConvNeXt blocks in the U-Net", unet="--settings tests/bench/unets/convnext.toml", timed=("train-unet",)
    ),
    "unet-diffusers": Recipe(
        "the U-Net's blocks joined as diffusers joins them",
        unet="--settings tests/bench/unets/diffusers.toml",
        timed=("train-unet",),
    ),
    "unet-x0": Recipe("the U-Net predicts x0, with the velocity's loss", unet="--settings tests/bench/unets/x0.toml"),
    "noise-paired": Recipe(
        "noise paired with the batch's latents by optimal transport", unet="--settings tests/bench/unets/paired.toml"
    ),
    "no-attention": Recipe(
        "no attention in the U-Net",
        unet="--model.attend-levels none --model.mid-attention off",
        timed=("train-unet",),
    ),
    "no-ema": Recipe("drawn with the raw weights", generate="--ema 0"),
    "ema-0.99": Recipe("weights averaged over some 100 steps", unet=EMAS, generate="--ema 0.99"),
    "autoguidance-tenth-1.5": guided("tenth", 1.5),
    "autoguidance-tenth-2": guided("tenth", 2),
    "autoguidance-tenth-2-ddpm": guided("tenth", 2, "ddpm"),
    "autoguidance-tenth-2.5-ddpm": guided("tenth", 2.5, "ddpm"),
    "autoguidance-fifth-1.5": guided("fifth", 1.5),
    "autoguidance-fifth-2": guided("fifth", 2),
    "autoguidance-fifth-3": guided("fifth", 3),
    "autoguidance-half-2": guided("half", 2),
    "autoguidance-narrow-tenth-2": guided_by_narrower(0.1, "a tenth", 2),
    "autoguidance-narrow-fifth-2": guided_by_narrower(0.2, "a fifth", 2),
    "autoguidance-narrow-half-2": guided_by_narrower(0.5, "half", 2),
    "density-shifted": Recipe("levels shifted by the latents' dimension", unet="--density-mean -0.69"),
    "lr-constant": Recipe("the U-Net's learning rate stays", unet="--lr-schedule constant"),
    "normalize-global": Recipe("one factor for all channels, no shift", scale="--normalize global"),
    "draws": Recipe("the U-Net learns draws of the posterior, not mu", scale="--no-only-mu"),
    "vae-original": Recipe(
        "the original's VAE, at these widths",
        vae="--preset original --model.encoder-channels 32,64,128 --model.decoder-channels 128,64,32 "
        "--kl-beta 1e-3 --lpips-gamma 0.1 --optimizer muon --lr 2e-3",
        timed=("train-vae", "train-unet"),
    ),
    "vae-adamw": Recipe("AdamW for the VAE, lr 1e-3", vae="--optimizer adamw --lr 1e-3", timed=("train-vae",)),
    "kl-1e-3": Recipe("a KL weight of 1e-3, as the original's", vae="--kl-beta 1e-3"),
    "kl-1e-2": Recipe("a KL weight of 1e-2", vae="--kl-beta 1e-2"),
    "kl-1e-2-guided": replace(guided("tenth", 2, "ddpm"), about="the same, guided, by ddpm", vae="--kl-beta 1e-2"),
    "lpips-0.3": Recipe("an LPIPS weight of 0.3", vae="--lpips-gamma 0.3"),
    "vae-lr-4e-3": Recipe("twice the learning rate for the VAE", vae="--lr 4e-3"),
    "vae-batch-8": Recipe("the VAE's batch is 8", vae="--batch-size 8", timed=("train-vae",)),
    "vae-encoder": Recipe(
        "two blocks a level in the encoder, one in the decoder",
        vae="--model.encoder-blocks 2 --model.decoder-blocks 1",
        timed=("train-vae",),
    ),
    "vae-shorter": Recipe("600 s for the VAE, 1,800 s for the U-Net", vae_seconds=600),
    "vae-longer": Recipe("1,200 s for each", vae_seconds=1200),
    "latents-8": Recipe("latents of 8 channels", vae="--model.latent-channels 8", timed=("train-vae", "train-unet")),
    "equivariance": Recipe(
        "a quarter of the steps decode shrunk and turned latents", vae="--equivariance 0.25", timed=("train-vae",)
    ),
    "sampler-ddpm": Recipe("drawn by ddpm, 20 steps", generate="--sampler ddpm --num-steps 20"),
    "sampler-ddim": Recipe("drawn by ddim, 50 steps", generate="--sampler ddim --num-steps 50"),
}
CALLS: dict[str, Recipe] = {  # quality against the number of calls of the network
    f"{sampler}-{calls}": Recipe(
        f"{sampler}, {calls} calls of the network",
        generate=f"--sampler {sampler} --num-steps {recipe_page.steps_for(sampler, calls)}",
    )
    for sampler in get_args(SamplerName)
    for calls in recipe_page.CALLS
    if f"{sampler}-{calls}" != recipe_page.DEFAULT_CALLS
}
FLOORS: dict[str, Recipe] = {
    name: Recipe(about, vae=ROWS.get(name.removeprefix("decoded-by-"), ROWS["default"]).vae)
    for name, about in recipe_page.FLOORS.items()
}
EVERY = ROWS | CALLS | FLOORS


def call(words: list[object]) -> tuple[str, float]:
    """What a command of Python prints, and the processor time (s) of it and of the processes it started."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, *map(str, words)], stdout=said, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
        )
        _, status, used = os.wait4(process.pid, 0)  # unlike getrusage, of this child alone
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}\n{text[-3000:]}")
    return text, used.ru_utime + used.ru_stime


def lightdiff(*words: object) -> float:
    """Run a command of lightdiff, which knows the U-Nets of `networks`, too; its processor time."""
    return call(["-m", "tests.bench.networks", *words])[1]


@dataclass(frozen=True)
class Training:
    """A stage, the folder of its run, and its further flags."""

    stage: Stage
    run: Path
    flags: tuple[object, ...]

    def train(self, steps: int, run: Path | None = None) -> float:
        """Train, there or in another folder, and return the processor time."""
        each = max(1, steps // PARTS)  # a step file after each tenth, to guide with
        words = [self.stage, *self.flags, "--restart", "--val-every", 0, "--save-every", each, "--keep", PARTS]
        return lightdiff(*words, "--run", run or self.run, "--steps", steps)

    def tried(self, steps: int) -> float:
        """The processor time of a short run, which leaves nothing behind."""
        with tempfile.TemporaryDirectory(dir=self.run) as folder:
            return self.train(steps, Path(folder))


class Work:
    """The folder of runs: each result is made once, in a folder named after the settings it was made with."""

    def __init__(self, folder: Path, jobs: int = 1, processes: int = 1) -> None:
        """Work in this folder, on `jobs` rows at a time; each training is shared by `processes`."""
        self.folder, self.jobs = folder, jobs
        self.shared = ("--nproc-per-node", processes) if processes > 1 else ()
        self._locks: dict[Path, threading.Lock] = defaultdict(threading.Lock)

    def home(self, *parts: object) -> Path:
        """The folder of the result with these settings."""
        text = "\n".join(map(str, parts)) + "\n"
        home = self.folder / f"{parts[0]}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
        home.mkdir(parents=True, exist_ok=True)
        (home / "what.txt").write_text(text)
        return home

    def found(self, path: Path, find: Callable[[], Any]) -> Any:
        """What is found once, and then read from this JSON file."""
        with self._locks[path]:
            if not path.is_file():
                path.write_text(json.dumps(find()))
        return json.loads(path.read_text())

    def budget(self, default: Training) -> int:
        """Number of steps that the whole budget buys the default, measured once for all rows."""
        path = self.home("budget", default.stage) / "steps.json"
        return int(self.found(path, lambda: steps_within(default, self.jobs)))

    def cost(self, training: Training, default: Training, *settings: object) -> float:
        """The cost of a step relative to the default's, measured once for all seeds and shares."""
        path = self.home("cost", *settings) / "cost.json"
        return float(self.found(path, lambda: relative_cost(training, default)))

    def trained(self, training: Training, steps: int) -> tuple[int, float]:
        """Train, once; the number of steps, and the processor time they took."""
        steps, seconds = self.found(training.run / "trained.json", lambda: (steps, training.train(steps)))
        return steps, seconds

    def once(self, folder: Path, *commands: list[object]) -> None:
        """Run the commands of lightdiff that fill this folder, unless it is finished."""
        with self._locks[folder]:
            if not (folder / "done").is_file():
                for words in commands:
                    lightdiff(*words)
                (folder / "done").touch()

    def distance(self, images: Path, samples: int, photographs: Path = FACES, side: int = 64) -> float:
        """The distance (frechet.py) from images to the photographs, which are measured once."""
        reference = self.folder / "reference.npz"
        with self._locks[reference]:
            if not reference.is_file():
                call([FRECHET, photographs, images, "--size", side, "--save", reference])
        said, _ = call([FRECHET, reference, images, "--size", side, "--count", samples])
        return float(re.findall(r"\d+\.\d+", said)[0])


def steps_within(training: Training, jobs: int = 1) -> int:
    """Number of steps within the budget; two short runs, `jobs` at a time, give the time of a start and of a step."""
    with ThreadPoolExecutor(jobs) as pool:
        few, more = (median(pool.map(training.tried, [steps] * jobs)) for steps in TRIALS)
    step = (more - few) / (TRIALS[1] - TRIALS[0])
    return int((SECONDS[training.stage] - (few - TRIALS[0] * step)) / step)


def relative_cost(training: Training, other: Training) -> float:
    """The time of a step over the other's: short runs of both in turn, as the machine's load changes."""
    ratios = []
    for _ in range(TURNS):
        few, more = ([each.tried(steps) for each in (training, other)] for steps in TRIALS)
        ratios.append((more[0] - few[0]) / (more[1] - few[1]))
    return median(ratios)


def measure(name: str, recipe: Recipe, seed: int, samples: list[int], share: float, work: Work) -> list[dict[str, Any]]:
    """Train both networks of a recipe, draw, and judge: a row for each number of samples."""
    vae_share = share * (recipe.vae_seconds / SECONDS["train-vae"])
    unet_share = share * ((sum(SECONDS.values()) - recipe.vae_seconds) / SECONDS["train-unet"])
    base = ROWS["default"]
    default = vae_training(base, 0, share, work)
    vae = vae_training(recipe, seed, vae_share, work)
    cost = work.cost(vae, default, "vae", recipe.vae) if "train-vae" in recipe.timed else 1
    bought = work.budget(default)
    vae_steps, vae_cpu = work.trained(vae, int(bought * vae_share / cost))

    work.trained(default, int(bought * share))
    default = unet_training(base, encoded(base, default, work), 0, share, work)
    latents = encoded(recipe, vae, work)
    unet = unet_training(recipe, latents, seed, unet_share, work)
    cost = work.cost(unet, default, "unet", recipe.vae, recipe.unet) if "train-unet" in recipe.timed else 1
    unet_steps, unet_cpu = work.trained(unet, int(work.budget(default) * unet_share / cost))

    worse = None
    if recipe.worse:
        flags, part = recipe.worse
        worse = unet_training(replace(recipe, unet=flags), latents, seed, unet_share * part, work)
        work.trained(worse, int(unet_steps * part))

    drawn = draw(recipe, unet, unet_steps, latents, seed, max(samples), work, worse)
    row = {"row": name, "seed": seed, "share": share, "date": time.strftime("%Y-%m-%d"), "flags": recipe.flags}
    row |= trained_networks(vae, unet)
    row |= {"vae_steps": vae_steps, "vae_cpu": round(vae_cpu), "unet_steps": unet_steps, "unet_cpu": round(unet_cpu)}
    return [row | {"samples": n, "frechet": work.distance(first(drawn, n), n)} for n in samples]


def draw(
    recipe: Recipe,
    unet: Training,
    steps: int,
    latents: Path,
    seed: int,
    count: int,
    work: Work,
    worse: Training | None = None,
) -> Path:
    """The folder of `images` drawn by a U-Net that was trained for `steps` steps, and of a grid of some of them."""
    tenth = max(1, steps // PARTS)
    weak = worse.run / "unet" / "checkpoints" / "last.safetensors" if worse else None
    how = recipe.generate.format(tenth=tenth, fifth=2 * tenth, half=5 * tenth, worse=weak)
    drawn = work.home("drawn", unet.run.name, how, count)
    copy = latents / "latents" / "vae.safetensors"
    words = ["generate", "--run", unet.run, "--vae", copy, "--num-images", count, "--batch-size", 100]
    work.once(drawn, [*words, "--seed", seed, "--out", drawn / "images", *how.split()])
    with suppress(FileNotFoundError):  # where it has been moved before
        (drawn / "images" / "grid.png").rename(drawn / "grid.png")  # it is no sample
    return drawn


def trained_networks(vae: Training, unet: Training) -> dict[str, Any]:
    """What a row says of both networks: their size and how well they do on images held out."""
    return {
        "psnr": round(last_value(vae.run / "vae" / "metrics.jsonl", "val_psnr"), 2),
        "val_loss": round(last_value(unet.run / "unet" / "metrics.jsonl", "val_loss"), 4),
        "vae_parameters": parameters(vae.run / "vae" / "checkpoints" / "last.safetensors"),
        "unet_parameters": parameters(unet.run / "unet" / "checkpoints" / "last.safetensors"),
    }


def first(drawn: Path, count: int) -> Path:
    """A folder with the first `count` images: those that other recipes make of the same noise.

    From a folder with more images than it is asked for, frechet.py takes every n-th.
    """
    images = sorted((drawn / "images").glob("*.png"))
    if len(images) == count:
        return drawn / "images"
    return linked(images[:count], drawn / f"first-{count}")


def linked(images: list[Path], folder: Path) -> Path:
    """A folder with links to these images."""
    folder.mkdir(parents=True, exist_ok=True)
    for image in images:
        if not (folder / image.name).is_symlink():
            (folder / image.name).symlink_to(image)
    return folder


def vae_training(
    recipe: Recipe, seed: int, share: float, work: Work, photographs: Path = FACES, side: int = 64
) -> Training:
    """A recipe's VAE."""
    perceptual = [] if "--lpips-gamma 0 " in f"{recipe.vae} " else ["--lpips-net", "squeeze", "--lpips-weights", LPIPS]
    data = ("--data", photographs, "--resolution", side, *perceptual)
    flags = (*data, *recipe.vae.split(), *work.shared, "--seed", seed)
    return Training("train-vae", work.home("vae", recipe.vae, seed, share), flags)


def unet_training(recipe: Recipe, latents: Path, seed: int, share: float, work: Work) -> Training:
    """A recipe's U-Net, on its latents."""
    flags = ("--latents", latents, *recipe.unet.split(), *work.shared, "--seed", seed)
    return Training("train-unet", work.home("unet", latents.name, recipe.unet, seed, share), flags)


def encoded(recipe: Recipe, vae: Training, work: Work) -> Path:
    """A recipe's latents, of its VAE."""
    latents = work.home("latents", vae.run.name, recipe.scale)
    scale = ["scale", "--run", latents, *recipe.scale.split()]
    work.once(latents, ["encode", "--run", latents, "--vae", vae.run], scale)
    return latents


def measure_floor(
    name: str, recipe: Recipe, seed: int, samples: list[int], share: float, work: Work
) -> list[dict[str, Any]]:
    """The distance of photographs that the reference, which is every other one, leaves out; as they are, or decoded."""
    rows = []
    for count in samples:
        photographs = left_out(count)
        if name == "photographs":
            others = linked(photographs, work.home(name, count))
        else:
            vae = work.home("vae", recipe.vae, seed, share)
            others = work.home(name, vae.name, count)
            decode(photographs, vae, name == "decoded-draws", others)
        rows.append({"row": name, "samples": count, "frechet": work.distance(others, count)})
    about = {"seed": seed, "share": share, "date": time.strftime("%Y-%m-%d"), "flags": recipe.flags}
    return [about | row for row in rows]


def left_out(count: int) -> list[Path]:
    """The first `count` photographs that the reference, which is every other one, leaves out."""
    return sorted(FACES.rglob("*.jpg"))[1::2][:count]


def decode(photographs: list[Path], vae: Path, draw: bool, out: Path) -> None:
    """Encode photographs with a trained VAE and write what it decodes, of the posterior's mean or of a draw."""
    checkpoint = Checkpoint(vae / "vae" / "checkpoints" / "best.safetensors", "vae")
    network, _ = load_vae(checkpoint, torch.device("cpu"))
    rng = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for photograph in photographs:
            x = to_float(frame(load_image(photograph), 64))[None]
            posterior = network.encoder(x)
            z = posterior.sample(torch.randn(posterior.mu.shape, generator=rng)) if draw else posterior.mu
            save_png(out / f"{photograph.stem}.png", to_uint8(network.decoder(z))[0])


def parameters(file: Path) -> int:
    """Number of weights of a checkpoint's network."""
    return sum(map(math.prod, Checkpoint(file).shapes("model.").values()))


def last_value(metrics: Path, name: str) -> float:
    """The last value of a metric."""
    return float(next(row[name] for row in reversed(read_metrics(metrics)) if name in row))


def add(path: Path, row: dict[str, Any], fields: Sequence[str] = FIELDS) -> None:
    """Add a row to the table."""
    fresh = not path.is_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, fields)
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    """Measure the rows asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(EVERY)}, or calls; none: all")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[1000])
    parser.add_argument("--share", type=float, nargs="+", default=[1.0], help="of the budget")
    parser.add_argument("--results", type=Path, default=recipe_page.ROWS, help="CSV file to add to")
    parser.add_argument("--work", type=Path, default=Path("runs/recipe"), help="where runs are kept")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="rows at a time")
    parser.add_argument("--processes", type=int, default=1, help="that share a training, for a long row by itself")
    parser.add_argument("--write", action="store_true", help="write docs/recipe.md, too")
    for stage in STAGES:
        parser.add_argument(f"--{stage}", default="", help="flags to add to the row's, to try something out")
    chosen = parser.parse_args()
    names = chosen.rows or ([] if chosen.write else list(EVERY))
    if "calls" in names:
        names = [name for name in names if name != "calls"] + list(CALLS)
    if unknown := sorted(set(names) - set(EVERY)):
        parser.error(f"there is no {unknown[0]}; there are {', '.join(EVERY)}")
    work, adding = Work(chosen.work.absolute(), chosen.jobs, chosen.processes), threading.Lock()

    def one(name: str, seed: int, share: float) -> None:
        row = EVERY[name]
        recipe = row.tried({stage: getattr(chosen, stage) for stage in STAGES})
        wanted = {"row": name, "seed": seed, "share": share, "processor": processor(), "flags": recipe.flags}
        there = [r for r in recipe_page.read(chosen.results) if all(r[n] == v for n, v in wanted.items())]
        samples = [n for n in chosen.samples if n not in {r["samples"] for r in there}]
        if not samples:
            return
        if name in FLOORS:
            rows = measure_floor(name, recipe, seed, samples, share, work)
        else:
            rows = measure(name, recipe, seed, samples, share, work)
        for found in rows:
            with adding:
                add(chosen.results, found | {"processor": processor()})
                print(found, flush=True)

    with ThreadPoolExecutor(chosen.jobs) as pool:
        waiting = [pool.submit(one, n, seed, share) for share in chosen.share for n in names for seed in chosen.seed]
        for future in waiting:
            future.result()
    if chosen.write:
        recipe_page.write({name: recipe.about for name, recipe in ROWS.items()})


if __name__ == "__main__":
    main()
