"""Small networks for tests, and weights that hide no mistake."""

import torch
from torch import Tensor, nn

from lightdiff.settings import UNetSettings, VAESettings

SMALL_VAE = VAESettings(encoder_width=8, decoder_width=8)
SMALL_UNET = UNetSettings(width=16, blocks=1, time_dim=32)


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight drawn anew, so that nothing that starts at zero or one hides a mistake."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            spread = 0.3 if p.ndim == 1 else float(p[0].numel()) ** -0.5
            p.copy_(spread * torch.randn(p.shape, generator=rng) + (p.ndim == 1 and name.endswith("norm1.weight")))
    return model.eval().requires_grad_(False)


def levels(*t: int) -> Tensor:
    return torch.tensor(t)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
