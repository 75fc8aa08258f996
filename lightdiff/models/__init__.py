"""Networks only: tensors in, tensors out. One architecture a file; each takes its own settings, never a stage's.

A further architecture is a file here, with its settings, and a row in `ARCHITECTURES` of `VAEArchitecture` or
`UNetArchitecture` (settings.py). `original.py` is an example of both.
"""

from pkgutil import resolve_name

from torch import nn

from lightdiff.models.vae import VAE
from lightdiff.settings import UNetArchitecture, VAEArchitecture


def build_vae(settings: VAEArchitecture) -> VAE:
    """The VAE of resolved settings, whichever architecture they are of."""
    vae: VAE = resolve_name(settings.NETWORK)(settings)
    return vae


def build_unet(settings: UNetArchitecture, latent_channels: int, num_classes: int = 0) -> nn.Module:
    """The U-Net of resolved settings, whichever architecture they are of; without classes it takes no label."""
    unet: nn.Module = resolve_name(settings.NETWORK)(settings, latent_channels, num_classes)
    return unet
