"""Does the recipe hold elsewhere? The default beside tuned diffusers, on the recipe's faces and on other images.

`python -m tests.bench.elsewhere [SET ...] [--share S] [--samples N] [--seed N]` trains both on each set, at the same
time and in one thread each, draws as many samples of each and judges them as recipe.py does. The budget is a share of
recipe.py's. Two short runs tell how many steps it buys lightdiff, of which starting takes its part; the peer (tuned.py)
has it for its steps alone. Rows go to a CSV file; `python -m tests.bench.recipe --write` writes the page.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.bench import recipe_page
from tests.bench.contest import processor
from tests.bench.recipe import (
    LPIPS,
    ROWS,
    SECONDS,
    SHARED,
    Work,
    add,
    call,
    draw,
    encoded,
    trained_networks,
    unet_training,
    vae_training,
)

SIDES = {"faces": 64, "scenes": 64, "pets": 128}  # px, of the sets below shared/data
FIELDS = [
    *("set", "resolution", "contender", "seed", "share", "samples", "frechet", "psnr"),
    *("vae_parameters", "vae_steps", "vae_cpu", "unet_parameters", "unet_steps", "unet_cpu"),
    *("processor", "date"),
]


def ours(photographs: Path, side: int, seed: int, share: float, samples: int, work: Work) -> dict[str, Any]:
    """Train the default recipe, draw, and judge."""
    default = ROWS["default"]
    vae = vae_training(default, seed, share, work, photographs, side)
    vae_steps, vae_cpu = work.trained(vae, int(work.budget(vae) * share))
    latents = encoded(default, vae, work)
    unet = unet_training(default, latents, seed, share, work)
    unet_steps, unet_cpu = work.trained(unet, int(work.budget(unet) * share))
    drawn = draw(default, unet, unet_steps, latents, seed, samples, work)
    row = {"vae_steps": vae_steps, "vae_cpu": round(vae_cpu), "unet_steps": unet_steps, "unet_cpu": round(unet_cpu)}
    distance = work.distance(drawn / "images", samples, photographs, side)
    return trained_networks(vae, unet) | row | {"frechet": distance}


def peer(
    photographs: Path, side: int, seed: int, samples: int, seconds: tuple[float, float], work: Work
) -> dict[str, Any]:
    """Train the peer for as many seconds, draw, and judge."""
    home = work.home("diffusers", side, seed, samples, *seconds)
    if not (home / "result.json").is_file():
        words = ["-m", "tests.bench.tuned", home, "--data", photographs, "--resolution", side, "--samples", samples]
        words += ["--vae-seconds", seconds[0], "--unet-seconds", seconds[1], "--lpips-weights", LPIPS, "--seed", seed]
        call(words)
    row: dict[str, Any] = json.loads((home / "result.json").read_text())
    return row | {"frechet": work.distance(home / "images", samples, photographs, side)}


def main() -> None:
    """Measure both on the sets asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(SIDES)}; none: all")
    parser.add_argument("--share", type=float, default=1.0, help="of recipe.py's budget")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=recipe_page.ELSEWHERE, help="CSV file to add to")
    parser.add_argument("--work", type=Path, default=Path("runs/elsewhere"), help="where runs are kept")
    chosen = parser.parse_args()
    if unknown := sorted(set(chosen.sets) - set(SIDES)):
        parser.error(f"there is no {unknown[0]}; there are {', '.join(SIDES)}")
    for name in chosen.sets or SIDES:
        photographs, side, work = SHARED / "data" / name, SIDES[name], Work(chosen.work.absolute() / name)
        about = {"set": name, "resolution": side, "seed": chosen.seed, "share": chosen.share}
        about |= {"samples": chosen.samples, "processor": processor(), "date": time.strftime("%Y-%m-%d")}
        seconds = chosen.share * SECONDS["train-vae"], chosen.share * SECONDS["train-unet"]
        with ThreadPoolExecutor(2) as pool:
            mine = pool.submit(ours, photographs, side, chosen.seed, chosen.share, chosen.samples, work)
            theirs = pool.submit(peer, photographs, side, chosen.seed, chosen.samples, seconds, work)
        for contender, found in (("lightdiff", mine), ("diffusers", theirs)):
            row = about | {"contender": contender} | found.result()
            add(chosen.results, {field: row[field] for field in FIELDS}, FIELDS)
            print(row, flush=True)


if __name__ == "__main__":
    main()
