"""What a stage's last lines say of what it made: the one number that matters, and the picture to look at."""

from pathlib import Path
from typing import Any

import torch

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.files import ImageFile
from lightdiff.data.images import to_float
from lightdiff.data.index import read_index
from lightdiff.data.latents import LatentSet
from lightdiff.extras.baselines import baselines_of
from lightdiff.extras.evidence import load_images, try_read
from lightdiff.losses import psnr
from lightdiff.pictures import save_pairs
from lightdiff.pipeline import load_vae
from lightdiff.run_folder import VAE_COPY, StageFolder
from lightdiff.runtime.processes import pick_device
from lightdiff.settings import EncodeSettings, GenerateSettings
from lightdiff.stages.scale import channel_bits

SHOWN = 8  # images that are decoded


def ending(stage: str, chosen: Any, seconds: float) -> str:
    """A number and a picture of a stage that has ended; nothing where there is none, or it cannot be read.

    Args:
        stage: The stage's module.
        chosen: Its settings.
        seconds: How long it took.
    """
    known = {
        "train_vae": lambda: of_vae(StageFolder(chosen.run / "vae")),
        "encode": lambda: of_latents(chosen),
        "scale": lambda: of_scaling(chosen.run / "latents"),
        "train_unet": lambda: of_unet(StageFolder(chosen.run / "unet")),
        "generate": lambda: of_samples(chosen, seconds),
    }
    return try_read(known[stage]) or "" if stage in known else ""


def of_vae(folder: StageFolder) -> str:
    """PSNR of held-out images, and the last sheet of them."""
    psnr = Checkpoint(folder.last, "vae").metadata.metrics["val_psnr"]
    return f"PSNR {psnr:.1f} dB on held-out images{look_at(newest(folder.images))}"


def of_unet(folder: StageFolder) -> str:
    """The validation loss beside its baseline, and the last samples."""
    metadata = Checkpoint(folder.last, "unet").metadata
    loss, known = metadata.metrics["val_loss"], baselines_of(metadata)["val_loss"]
    return f"validation loss {loss:.3g}; the noise level alone gives {known:.3g}{look_at(newest(folder.images))}"


def of_scaling(folder: Path) -> str:
    """Bits that an element of the latents carries."""
    found = read_index(folder).statistics
    assert found is not None
    bits = channel_bits(found)
    return f"{sum(bits) / len(bits):.1f} bits per element of the latents, on average"


@torch.inference_mode()
def of_latents(chosen: EncodeSettings) -> str:
    """PSNR of some images decoded from the latents that are stored, and a sheet of them: decoded.png."""
    folder, device = chosen.run / "latents", pick_device(chosen.compute.device)
    latents = LatentSet(folder)
    index, positions = latents.index, (latents.val or latents.train)[:SHOWN]
    files = [ImageFile(root, name, "val", {}) for root, name in index.keys(positions)]
    x = to_float(torch.stack(load_images(files, index.images)))
    vae, _ = load_vae(Checkpoint(folder / VAE_COPY, "vae"), device)
    x_hat = vae.decoder(latents.gather(positions, device=device)[0]).clamp(-1, 1).cpu()
    save_pairs(folder / "decoded.png", x, x_hat, SHOWN)
    quality = float(psnr(x, x_hat).mean())
    return f"PSNR {quality:.1f} dB of {len(x)} images from their stored latents{look_at(folder / 'decoded.png')}"


def of_samples(chosen: GenerateSettings, seconds: float) -> str:
    """Seconds per image; where to look is in the line above."""
    return f"{seconds / chosen.num_images:.2g} seconds per image, including startup"


def newest(images: Path) -> Path | None:
    """The last picture that a training has drawn."""
    return max(images.glob("step-*.png"), default=None)


def look_at(picture: Path | None) -> str:
    """Where to look."""
    return f"; look at {picture}" if picture else ""
