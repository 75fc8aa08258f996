"""Whether the fast defaults are as good as float32: the demo's U-Net trained and sampled both ways, two seeds each."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from lightdiff.run_folder import RunFolder
from tests.bench.cases import room
from tests.bench.contest import synchronize

FRECHET = Path(__file__).parents[3] / "shared" / "tools" / "frechet.py"
WAYS = {"float32, eager": ["--precision", "fp32", "--compile", "off"], "default": []}
STEPS, SAMPLES, EARLY = 600, 1000, 300


def call(*words: object) -> str:
    """Run a command and return what it prints."""
    done = subprocess.run([sys.executable, *map(str, words)], check=True, capture_output=True, text=True)
    return done.stdout


def measure(device: torch.device) -> dict[str, Any]:
    """A row for each way and seed: losses, seconds, and the Frechet distance where its tool is at hand."""
    home = room()
    synchronize(device)
    demo = home / "demo"
    call("-m", "lightdiff", "demo", "--run", demo, "--device", device.type, "--unet-steps", 1)
    rows = []
    for seed in (0, 1):
        for way, flags in WAYS.items():
            run = home / f"{way.split(',')[0]}-{seed}"
            common = ["--run", run, "--seed", seed, "--device", device.type, *flags]
            training = ["--latents", demo, "--steps", STEPS, "--lr", "1e-3", "--model.width", 64, "--val-every", EARLY]
            call("-m", "lightdiff", "train-unet", *training, "--log-every", 10, *common)
            call("-m", "lightdiff", "generate", "--vae", demo, "--num-images", SAMPLES, "--out", run / "out", *common)
            (run / "out" / "grid.png").unlink()
            metrics = [json.loads(line) for line in RunFolder(run).unet.metrics.read_text().splitlines()]
            early = [m["loss"] for m in metrics if m["step"] <= EARLY]
            row: dict[str, Any] = {"precision": way, "seed": seed, "curve": [(m["step"], m["loss"]) for m in metrics]}
            row |= {"mean loss, first 300 steps": sum(early) / len(early)}
            row |= {"validation loss": next(m["val_loss"] for m in reversed(metrics) if "val_loss" in m)}
            if FRECHET.is_file():
                faces = next(demo.glob("faces-*"))
                said = call(FRECHET, faces, run / "out", "--size", 32, "--count", SAMPLES)
                row["Frechet-768"] = float(re.findall(r"\d+\.\d+", said)[0])
            rows.append(row)
            print({name: value for name, value in row.items() if name != "curve"}, flush=True)
    about = (
        f"The demo's VAE and latents; {STEPS} steps of its U-Net, {SAMPLES} samples. "
        f"Largest difference of a logged loss between the two ways, of one seed: {apart(rows):.2g}."
    )
    return {"about": about, "names": [n for n in rows[0] if n not in ("precision", "seed", "curve")], "rows": rows}


def apart(rows: list[dict[str, Any]]) -> float:
    """The largest difference between losses that both ways logged at the same step of the same seed."""
    pairs = [(a, b) for a in rows for b in rows if a["seed"] == b["seed"] and a["precision"] < b["precision"]]
    return max(abs(x[1] - y[1]) for a, b in pairs for x, y in zip(a["curve"], b["curve"], strict=True))
