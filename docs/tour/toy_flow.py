"""A flow in two dimensions, whose paths one can see: `python docs/tour/toy_flow.py` draws docs/images/toy-flow.png.

Schedule, loss and sampler are those of the package. A "latent" is a point, on one of two half circles, and the network
is four layers. It takes half a minute on one core, and needs matplotlib.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from lightdiff.diffusion.objectives import denoiser, target
from lightdiff.diffusion.samplers import SAMPLERS
from lightdiff.diffusion.schedules import Schedule, random_levels, sampling_levels
from lightdiff.settings import LevelSettings, ScheduleSettings

FIGURE = Path(__file__).parent.parent / "images/toy-flow.png"
SCHEDULE = Schedule.of(ScheduleSettings(schedule="flow")).to(torch.device("cpu"))  # in float32
STEPS, SHOWN = 50, 60  # of sampling, and paths that are drawn


def two_arcs(count: int, rng: torch.Generator) -> Tensor:
    """Points on two half circles that reach into each other, of mean 0 and std about 1, (count, 2, 1, 1)."""
    angle = math.pi * torch.rand(count, generator=rng)
    side = torch.randint(2, (count,), generator=rng) * 2 - 1  # the upper arc, or the lower one
    points = torch.stack([side * angle.cos() + 0.5 * side, side * angle.sin() - 0.25 * side], 1)
    points = points + 0.05 * torch.randn(count, 2, generator=rng)
    return 1.4 * points[:, :, None, None]


class Network(nn.Module):
    """A point and a level -> the direction from data to noise."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        layers = [
            nn.Linear(3, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
        ]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(b, 2, 1, 1) and (b,) -> (b, 2, 1, 1)."""
        level = t.float()[:, None] / len(SCHEDULE)
        prediction: Tensor = self.layers(torch.cat([x_t.flatten(1), level], 1))
        return prediction[:, :, None, None]


def train(steps: int = 4000, batch: int = 512) -> Network:
    """The training step of page 3, on points."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x0 = two_arcs(batch, rng)
        eps = torch.randn(x0.shape, generator=rng)
        t = random_levels(torch.rand(batch, generator=rng), LevelSettings(), len(SCHEDULE))
        wanted = target("flow", x0, eps, *SCHEDULE.at(t))
        loss = (network(SCHEDULE.q_sample(x0, eps, t), t) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return network


@torch.inference_mode()
def paths(network: Network, noise: Tensor, steps: int = STEPS) -> Tensor:
    """Where points of noise go: (steps + 1, b, 2), from the noise to the sample."""
    seen: list[Tensor] = []
    denoise = denoiser(network, "flow")

    def watched(x_t: Tensor, level: object) -> tuple[Tensor, Tensor]:
        seen.append(x_t)
        return denoise(x_t, level)  # type: ignore[arg-type]

    x0 = SAMPLERS["ddim"](watched, sampling_levels(SCHEDULE, steps), noise, None)
    return torch.stack([*seen, x0]).flatten(2)


def main() -> None:
    """Train, and draw."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams |= {"font.size": 12}
    import matplotlib.pyplot as plt

    network, rng = train(), torch.Generator().manual_seed(1)
    data, noise = (x.flatten(1) for x in (two_arcs(1500, rng), torch.randn(1500, 2, 1, 1, generator=rng)))
    moved = paths(network, noise[:, :, None, None])
    figure, (above, below) = plt.subplots(2, 1, figsize=(4.8, 8.6), layout="constrained", sharex=True, sharey=True)
    for axes, title in ((above, "in training: straight lines"), (below, "in sampling: paths of the flow")):
        axes.scatter(*noise.T, s=3, c="#bbbbbb", linewidths=0, label="noise")
        axes.scatter(*data.T, s=3, c="#f0b070", linewidths=0, label="data")
        axes.set(title=title, xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), aspect="equal", xticks=(), yticks=())
    for start, end in zip(noise[:SHOWN], data[:SHOWN], strict=True):
        above.plot(*zip(start, end, strict=True), c="C0", lw=0.8, alpha=0.7)
    for i in range(SHOWN):
        below.plot(*moved[:, i].T, c="C0", lw=0.8, alpha=0.7)
    below.scatter(*moved[-1, :SHOWN].T, s=14, c="C3", zorder=3, label="samples")
    below.legend(frameon=False, loc="upper left", ncols=3, markerscale=2, handletextpad=0, columnspacing=1)
    figure.savefig(FIGURE, dpi=110)


if __name__ == "__main__":
    main()
