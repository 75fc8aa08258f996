"""Draw the tour's figures of a run into docs/images/: `python docs/tour/run_figures.py runs/demo`. Needs matplotlib.

tour-channels.png, histograms.svg and bands.svg are of that run. With more runs, as in `runs/demo runs/beta-*`,
tour-betas.png is of their VAEs.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.images import to_float
from lightdiff.data.latents import LatentSet, Scaling
from lightdiff.extras.baselines import BAND_LOSSES, baselines_of
from lightdiff.extras.sheet import Heading, contact_sheet
from lightdiff.extras.toy_faces import draw_face, random_face
from lightdiff.losses import psnr
from lightdiff.pictures import grid, save_png
from lightdiff.pipeline import load_vae
from lightdiff.run_folder import RunFolder
from lightdiff.runtime.progress import read_metrics
from lightdiff.settings import ImageSettings, TrainUNetSettings, VAELossSettings

IMAGES = Path(__file__).parent.parent / "images"
FACES = 4  # in tour-channels.png
JITTER, BETWEEN = 0.5, (0.25, 0.5, 0.75)  # stds of the latents; shares of the way from one latent to another
CPU = torch.device("cpu")


def faces(count: int, side: int) -> Tensor:
    """Drawn faces in [-1, 1], (count, 3, side, side)."""
    drawn = [torch.from_numpy(np.array(draw_face(random_face(0, i), side))) for i in range(count)]
    return to_float(torch.stack(drawn)).permute(0, 3, 1, 2)


def picture(x: Tensor) -> list[Image.Image]:
    """An image as a cell of a sheet."""
    return [grid(x[None], 1)]


@torch.inference_mode()
def draw_channels(run: RunFolder, path: Path) -> None:
    """Some faces, each beside the channels of its scaled latent: black is -2.5, white 2.5."""
    vae, model = load_vae(Checkpoint(run.vae.best, "vae"), CPU)
    scaling = Scaling.of(Checkpoint(run.unet.last, "unet").settings(TrainUNetSettings).latent)
    x = faces(FACES, 8 * model.factor)
    mu = vae.encoder(x).mu
    channels = (scaling.to_x0(mu) / 2.5).clamp(-1, 1)[:, :, None].expand(-1, -1, 3, -1, -1)
    cells = [
        [picture(face), *map(picture, latent), picture(x_hat)]
        for face, latent, x_hat in zip(x, channels, vae.decoder(mu), strict=True)
    ]
    heads = ["image", *(f"channel {c}" for c in range(mu.shape[1])), "decoded"]
    save_png(path, contact_sheet("", Heading("", [""] * FACES), Heading("", heads), cells))


def plots() -> Any:
    """pyplot, for files that come out the same each time."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "lightdiff", "font.size": 12}
    import matplotlib.pyplot as plt

    return plt


def draw_histograms(run: RunFolder, path: Path) -> None:
    """The distribution of each channel before and after scaling, beside the standard normal one."""
    plt, latents = plots(), LatentSet(run.latents)
    z = latents.gather(latents.train)[0]
    x0 = Scaling.of(Checkpoint(run.unet.last, "unet").settings(TrainUNetSettings).latent).to_x0(z)
    figure, panels = plt.subplots(2, 1, figsize=(4.8, 5), layout="constrained", sharex=True, sharey=True)
    edges = torch.linspace(-4, 4, 81)
    centres = (edges[1:] + edges[:-1]) / 2
    for axes, values, title in zip(panels, (z, x0), ("before scaling: z", "after: x0"), strict=True):
        for c, channel in enumerate(values.unbind(1)):
            counts = torch.histc(channel, len(centres), float(edges[0]), float(edges[-1]))
            axes.plot(centres, counts / channel.numel() / 0.1, label=f"channel {c}", lw=1.2)
        normal = torch.exp(-(centres**2) / 2) / (2 * torch.pi) ** 0.5
        axes.plot(centres, normal, "k--", lw=1, label="standard normal")
        axes.set(title=title, ylim=(0, None))
    panels[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Date": None})


def draw_bands(run: RunFolder, path: Path) -> None:
    """The validation loss of each band of levels over the training, beside what the level alone tells."""
    plt, known = plots(), baselines_of(Checkpoint(run.unet.last, "unet").metadata)
    rows = [row for row in read_metrics(run.unet.metrics) if BAND_LOSSES[0] in row]
    figure, axes = plt.subplots(figsize=(4.8, 3.4), layout="constrained")
    for band, name in enumerate(BAND_LOSSES):
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], f"C{band}o-", label=f"band {band + 1}")
        axes.axhline(known[name], c=f"C{band}", ls=(2 * band, (2, 6)), lw=1.2)
    axes.set(xlabel="step", title="validation loss; dashed: by the level alone", ylim=(0, 2))
    axes.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 0.9), fontsize=9, columnspacing=1)
    figure.savefig(path, metadata={"Date": None})


@torch.inference_mode()
def draw_betas(runs: list[Path], path: Path) -> None:
    """What VAEs of several betas make of a latent, of it with noise, and of those between it and another.

    Prints sigma as a share of each channel's std, and the PSNR of decoded latents with that noise to those without.
    """
    rows = []
    for run in runs:
        saved = Checkpoint(RunFolder(run).vae.last, "vae")
        vae, _ = load_vae(saved, CPU)
        posterior = vae.encoder(faces(64, saved.settings(ImageSettings, "images").resolution.height))
        mu, beta = posterior.mu, saved.settings(VAELossSettings, "loss").kl_beta
        std = mu.std((0, 2, 3), keepdim=True)
        widths = (posterior.logvar / 2).exp().mean((0, 2, 3)) / std.flatten()
        each = torch.randn(mu.shape, generator=torch.Generator().manual_seed(0))
        still, moved = (vae.decoder(z).clamp(-1, 1) for z in (mu, mu + JITTER * std * each))
        print(f"beta {beta:g}: sigma {widths.min():.0%} to {widths.max():.0%}; {psnr(still, moved).mean():.1f} dB")
        noise = torch.randn(mu[:1].shape, generator=torch.Generator().manual_seed(0))
        one, other = mu[:1], mu[1:2]
        shown = [one, one + JITTER * std * noise, *(torch.lerp(one, other, share) for share in BETWEEN), other]
        cells = [picture(x) for x in vae.decoder(torch.cat(shown)).clamp(-1, 1)]
        rows.append((beta, cells))
    rows.sort(key=lambda row: row[0])
    heads = ["a face", "jittered", *(f"{share:.0%}" for share in BETWEEN), "another"]
    labels = Heading("beta", [f"{beta:g}" for beta, _ in rows])
    save_png(path, contact_sheet("", labels, Heading("", heads), [cells for _, cells in rows]))


def main() -> None:
    """Draw all of them."""
    run, *others = map(Path, sys.argv[1:])
    draw_channels(RunFolder(run), IMAGES / "tour-channels.png")
    draw_histograms(RunFolder(run), IMAGES / "histograms.svg")
    draw_bands(RunFolder(run), IMAGES / "bands.svg")
    if others:
        draw_betas(others, IMAGES / "tour-betas.png")


if __name__ == "__main__":
    main()
