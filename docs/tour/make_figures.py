"""Write the tour's figures into docs/images/, and print the tables of where parameters and time are.

`python docs/tour/make_figures.py` draws the networks (unet.svg, vae.svg), the noise levels (levels.svg; needs
matplotlib), and prints the tables. With a finished run, as in `python docs/tour/make_figures.py runs/demo`, it also
draws one face at five levels of noise (tour-noised.png).
"""

import math
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightdiff.data.images import to_float
from lightdiff.data.order import item_noise
from lightdiff.diffusion.schedules import Schedule, random_levels
from lightdiff.extras.toy_faces import draw_face, random_face
from lightdiff.models.layers import Attention, ResBlock
from lightdiff.models.unet import UNet, build_unet
from lightdiff.models.vae import VAE, build_vae
from lightdiff.pictures import save_grid
from lightdiff.pipeline import Pipeline
from lightdiff.settings import LevelSettings, ScheduleSettings, UNetSettings, VAESettings

IMAGES = Path(__file__).parent.parent / "images"
SIDE, FACTOR, CHANNELS = 64, 4, 4  # px; the defaults' VAE
SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of tour-noised.png


class Part(NamedTuple):
    """A box of a diagram and a row of a table: some layers in sequence, and the shape they end with."""

    name: str
    layers: list[nn.Module]
    shape: tuple[int, ...]  # without the batch


# --- the networks, by their own modules -----------------------------------------------------------------------------


def networks() -> tuple[VAE, UNet]:
    """The default networks at 64 px."""
    unet = build_unet(UNetSettings().resolved(SIDE // FACTOR), CHANNELS)
    assert isinstance(unet, UNet)
    return build_vae(VAESettings().resolved(SIDE)).eval(), unet.eval()


@torch.inference_mode()
def forward(vae: VAE, unet: UNet, batch: int = 1) -> None:
    """A pass through encoder, decoder and U-Net."""
    z = torch.zeros(batch, CHANNELS, SIDE // FACTOR, SIDE // FACTOR)
    vae.encoder(torch.zeros(batch, 3, SIDE, SIDE))
    vae.decoder(z)
    unet(z, torch.zeros(batch, dtype=torch.long))


def shapes(vae: VAE, unet: UNet) -> dict[nn.Module, tuple[int, ...]]:
    """The shape that each module returns, without the batch."""
    found: dict[nn.Module, tuple[int, ...]] = {}

    def note(module: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor):
            found[module] = tuple(output.shape[1:])

    hooks = [module.register_forward_hook(note) for module in (*vae.modules(), *unet.modules())]
    forward(vae, unet)
    for hook in hooks:
        hook.remove()
    return found


def blocks_name(blocks: list[nn.Module]) -> str:
    """Residual blocks and attention in words."""
    layers = [m for block in blocks for m in block.modules() if isinstance(m, (ResBlock, Attention))]
    words = ["attention" if isinstance(layer, Attention) else "residual block" for layer in layers]
    if len(words) > 1 and words == words[:1] * len(words):
        return f"{len(words)} {words[0]}s"
    pairs = words.count("attention")
    return f"{pairs} x (residual block, attention)" if pairs > 1 else ", ".join(words)


def unet_parts(unet: UNet, shape: dict[nn.Module, tuple[int, ...]]) -> dict[str, list[Part]]:
    """The U-Net's parts: down, middle and up."""
    down = [Part("convolution", [unet.stem], shape[unet.stem])]
    for *blocks, halve in unet.down:
        down += [Part(blocks_name(blocks), blocks, shape[blocks[-1]]), Part("halve", [halve], shape[halve])]
    middle = [unet.mid1, unet.mid2]
    up: list[Part] = []
    for *blocks, double in unet.up:
        up += [Part("double", [double], shape[double]), Part(blocks_name(blocks), blocks, shape[blocks[-1]])]
    up.append(Part("norm, SiLU, convolution", [unet.norm, unet.out], shape[unet.out]))
    return {"down": down, "middle": [Part(blocks_name(middle), middle, shape[unet.mid2])], "up": up}


def vae_parts(vae: VAE, shape: dict[nn.Module, tuple[int, ...]]) -> dict[str, list[Part]]:
    """The VAE's parts: encoder and decoder."""
    parts = {}
    for side, body in (("encoder", vae.encoder.body), ("decoder", vae.decoder.body)):
        found: list[Part] = []
        for layer in body:
            last = found[-1].layers if found else []
            name = {"Downsample": "halve", "Upsample": "double", "Conv2d": "convolution"}.get(type(layer).__name__, "")
            if isinstance(layer, ResBlock):
                before = last if last and isinstance(last[0], ResBlock) and shape[layer] == shape[last[-1]] else []
                found = found[:-1] if before else found
                found.append(Part(blocks_name([*before, layer]), [*before, layer], shape[layer]))
            elif name and not (name == "convolution" and found):
                found.append(Part(name, [layer], shape[layer]))
            elif found[-1].name == "norm, SiLU, convolution":
                found[-1] = Part(found[-1].name, [*last, layer], shape[layer])
            else:
                found.append(Part("norm, SiLU, convolution", [layer], shape[layer]))
        parts[side] = found
    end = parts["encoder"].pop()
    heads = [vae.encoder.mu, vae.encoder.logvar]
    parts["encoder"].append(Part("norm, SiLU, 2 convolutions", [*end.layers, *heads], shape[vae.encoder.mu]))
    return parts


# --- diagrams -------------------------------------------------------------------------------------------------------

WIDTH, BOX, ROW, HIGH = 470, 210, 62, 44  # of a diagram, a box, from row to row, and of a box
BLUE, GREEN, GREY = "#dbe9f9", "#e2f0dc", "#f1f1f1"


def times(shape: tuple[int, ...]) -> str:
    """A shape in words."""
    return " x ".join(map(str, shape))


class Drawing:
    """An SVG of boxes and arrows on white, so that it can be read on a dark page too."""

    def __init__(self, height: int) -> None:
        self.height, self.elements = height, list[str]()

    def text(self, x: float, y: float, text: str, size: int = 14, weight: str = "normal") -> None:
        """A line of text around x."""
        style = f'font-size="{size}" font-weight="{weight}" text-anchor="middle"'
        self.elements.append(f'<text x="{x:g}" y="{y:g}" {style}>{text}</text>')

    def box(self, x: float, y: float, first: str, second: str, colour: str, width: float = BOX) -> None:
        """A box with two lines of text, its upper left corner at (x, y)."""
        self.elements.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{HIGH}" rx="5" fill="{colour}" stroke="#555"/>'
        )
        self.text(x + width / 2, y + 18, first, 13)
        self.text(x + width / 2, y + 36, second, weight="bold")

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        """A line with a head at its end."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.elements.append(f'<polyline points="{path}" fill="none" stroke="#555"{dash} marker-end="url(#head)"/>')

    def svg(self, title: str) -> str:
        """The file's text."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{self.height}" '
            f'viewBox="0 0 {WIDTH} {self.height}" font-family="system-ui, Helvetica, Arial, sans-serif" fill="#111">'
        )
        marker = (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#555"/></marker></defs>'
        )
        back = f'<rect width="{WIDTH}" height="{self.height}" rx="8" fill="#fff"/>'
        return "\n".join([head, f"<title>{title}</title>", marker, back, *self.elements, "</svg>\n"])


LEFT, RIGHT = 10, WIDTH - BOX - 10


def column(drawing: Drawing, x: float, parts: list[Part], top: float, upwards: bool = False) -> list[float]:
    """Boxes one below the other with arrows between them; the upper edge of each, in the order of the parts."""
    rows = [top + ROW * (len(parts) - 1 - i if upwards else i) for i in range(len(parts))]
    for part, y in zip(parts, rows, strict=True):
        drawing.box(x, y, part.name, times(part.shape), GREEN if upwards else BLUE)
    centre = x + BOX / 2
    for a, b in pairwise(rows):
        drawing.arrow((centre, a if upwards else a + HIGH), (centre, b + HIGH if upwards else b))
    return rows


def draw_unet(parts: dict[str, list[Part]], time_dim: int) -> str:
    """The U-Net: down on the left, up on the right, dashed where outputs are kept and taken in."""
    down, up, (middle,) = parts["down"], parts["up"], parts["middle"]
    top = 52
    bottom = top + ROW * len(down)
    drawing = Drawing(bottom + HIGH + 84)
    drawing.text(LEFT + BOX / 2, 20, f"x_t: {times((CHANNELS, SIDE // FACTOR, SIDE // FACTOR))}", weight="bold")
    drawing.text(RIGHT + BOX / 2, 20, "prediction", weight="bold")
    drawing.arrow((LEFT + BOX / 2, 26), (LEFT + BOX / 2, top))
    drawing.arrow((RIGHT + BOX / 2, top), (RIGHT + BOX / 2, 26))
    left = column(drawing, LEFT, down, top)
    right = column(drawing, RIGHT, up, top, upwards=True)
    width, x = 290.0, (WIDTH - 290) / 2
    drawing.box(x, bottom, middle.name, times(middle.shape), BLUE, width)
    drawing.arrow((LEFT + BOX / 2, left[-1] + HIGH), (LEFT + BOX / 2, bottom))
    drawing.arrow((RIGHT + BOX / 2, bottom), (RIGHT + BOX / 2, right[0] + HIGH))
    for part, y in zip(down, left, strict=True):
        if "residual" in part.name:
            drawing.arrow((LEFT + BOX, y + HIGH / 2), (RIGHT, y + HIGH / 2), dashed=True)
    drawing.text(WIDTH / 2, bottom + HIGH + 28, f"t: level -> time embedding of {time_dim} numbers,", 13)
    drawing.text(WIDTH / 2, bottom + HIGH + 46, "which scales and shifts the channels in every residual block", 13)
    drawing.text(WIDTH / 2, bottom + HIGH + 66, "dashed: blocks' outputs are kept, and concatenated on the way up", 13)
    return drawing.svg("The U-Net at 64 px")


def draw_vae(parts: dict[str, list[Part]]) -> str:
    """The VAE: encoder on the left, decoder on the right, latents below."""
    encoder, decoder = parts["encoder"], parts["decoder"]
    top = 52
    bottom = top + ROW * max(len(encoder), len(decoder))
    drawing = Drawing(bottom + HIGH + 14)
    drawing.text(LEFT + BOX / 2, 20, f"x: {times((3, SIDE, SIDE))}", weight="bold")
    drawing.text(RIGHT + BOX / 2, 20, "tanh: x_hat", weight="bold")
    drawing.arrow((LEFT + BOX / 2, 26), (LEFT + BOX / 2, top))
    drawing.arrow((RIGHT + BOX / 2, top), (RIGHT + BOX / 2, 26))
    left = column(drawing, LEFT, encoder, top)
    right = column(drawing, RIGHT, decoder, top, upwards=True)
    width, x = 290.0, (WIDTH - 290) / 2
    drawing.box(x, bottom, "mu, logvar -> z = mu + sigma noise", times(encoder[-1].shape), GREY, width)
    drawing.arrow((LEFT + BOX / 2, left[-1] + HIGH), (LEFT + BOX / 2, bottom))
    drawing.arrow((RIGHT + BOX / 2, bottom), (RIGHT + BOX / 2, right[0] + HIGH))
    return drawing.svg("The VAE at 64 px")


def diagrams() -> dict[str, str]:
    """The content of unet.svg and vae.svg."""
    vae, unet = networks()
    shape = shapes(vae, unet)
    unet_svg = draw_unet(unet_parts(unet, shape), UNetSettings().time_dim)
    return {"unet.svg": unet_svg, "vae.svg": draw_vae(vae_parts(vae, shape))}


# --- where parameters and time are ----------------------------------------------------------------------------------


class Row(NamedTuple):
    """What a network does at one size."""

    name: str
    layers: list[nn.Module]
    parameters: int
    products: int  # multiply-adds of a forward pass of one image


def by_size(parts: list[Part], prefix: str = "") -> dict[str, list[nn.Module]]:
    """The layers of each size of feature maps, by that of their output."""
    found: dict[str, list[nn.Module]] = {}
    for part in parts:
        found.setdefault(f"{prefix}{part.shape[-2]} x {part.shape[-1]}", []).extend(part.layers)
    return found


def tables(vae: VAE, unet: UNet) -> dict[str, list[Row]]:
    """The rows of both tables."""
    shape = shapes(vae, unet)
    inside, parts = vae_parts(vae, shape), unet_parts(unet, shape)
    groups = {
        "vae": by_size(inside["encoder"], "encoder, ") | by_size(inside["decoder"], "decoder, "),
        "unet": {"time embedding": [unet.time]} | by_size([*parts["down"], *parts["middle"], *parts["up"]]),
    }
    with FlopCounterMode(display=False) as counter:
        forward(vae, unet)
    flops = {name: sum(count.values()) for name, count in counter.get_flop_counts().items()}
    names = {m: f"{type(n).__name__}.{name}" for n in (vae.encoder, vae.decoder, unet) for name, m in n.named_modules()}
    return {
        which: [
            Row(
                name,
                layers,
                sum(p.numel() for layer in layers for p in layer.parameters()),
                sum(flops.get(names[layer], 0) for layer in layers) // 2,
            )
            for name, layers in found.items()
        ]
        for which, found in groups.items()
    }


def seconds(vae: VAE, unet: UNet, layers: list[nn.Module], passes: int = 10, batch: int = 16) -> dict[nn.Module, float]:
    """Processor time of each layer in forward passes on one core, after a first one that does not count."""
    spent: dict[nn.Module, float] = dict.fromkeys(layers, 0.0)

    def begin(layer: nn.Module, _: object) -> None:
        spent[layer] -= time.process_time()

    def end(layer: nn.Module, *_: object) -> None:
        spent[layer] += time.process_time()

    torch.set_num_threads(1)
    forward(vae, unet, batch)
    for layer in layers:
        layer.register_forward_pre_hook(begin)
        layer.register_forward_hook(end)
    for _ in range(passes):
        forward(vae, unet, batch)
    return spent


def print_tables() -> None:
    """Print both tables, in Markdown."""
    vae, unet = networks()
    found = tables(vae, unet)
    spent = seconds(vae, unet, [layer for rows in found.values() for row in rows for layer in row.layers])
    for rows in found.values():
        whole = sum(spent[layer] for row in rows for layer in row.layers)
        print("\n| Feature maps | Parameters | Multiply-adds | Time |\n| --- | ---: | ---: | ---: |")
        for row in rows:
            share = sum(spent[layer] for layer in row.layers) / whole
            print(f"| {row.name} | {row.parameters:,} | {row.products / 1e6:,.1f} M | {100 * share:.0f} % |")


# --- noise ----------------------------------------------------------------------------------------------------------


def draw_levels(path: Path) -> None:
    """Alpha and sigma over the levels of two schedules, and how often training draws each level."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "lightdiff", "font.size": 12}
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(4.8, 5), layout="constrained", sharex=True)
    for name, style in (("flow", "-"), ("cosine", ":")):
        schedule = Schedule.of(ScheduleSettings(schedule=name))
        top.plot(schedule.alpha, "C0" + style, label=rf"$\alpha_t$, {name}")
        top.plot(schedule.sigma, "C1" + style, label=rf"$\sigma_t$, {name}")
    top.set(title="latent's and noise's factor", ylim=(0, 1.5))
    top.legend(frameon=False, loc="upper center", ncols=2)
    u = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    for density, style in (("logit-normal", "-"), ("uniform", ":")):
        levels = random_levels(u, LevelSettings(density=density, stratified=False), 1000)
        counts = torch.histc(levels.float(), 50, 0, 1000) / len(u) * 50
        bottom.plot(torch.arange(50) * 20 + 10, counts, "C2" + style, label=density)
    bottom.set(title="how often training draws a level", xlabel="level t", ylim=(0, 2.2))
    bottom.legend(frameon=False, loc="upper center", ncols=2)
    figure.savefig(path, metadata={"Date": None})


def draw_noised(run: Path, path: Path) -> None:
    """A drawn face, and its latent at five levels, decoded at unit variance as `trajectory` does it."""
    model = Pipeline.load(run)
    face = draw_face(random_face(0, 0), model.resolution.height)
    x = to_float(torch.from_numpy(np.array(face))).permute(2, 0, 1)[None]
    x0 = model.scaling.to_x0(model.encode(x))
    eps = item_noise(tuple(x0.shape[1:]), [0], 0, "tour")
    noised = [((1 - s) * x0 + s * eps) / math.hypot(1 - s, s) for s in SIGMAS]
    save_grid(path, torch.cat([x, model.decode(model.scaling.to_z(torch.cat(noised)))]), 1 + len(SIGMAS))


def main() -> None:
    """Write the figures, print the tables."""
    for name, text in diagrams().items():
        (IMAGES / name).write_text(text, encoding="utf-8")
    for run in sys.argv[1:]:
        draw_noised(Path(run), IMAGES / "tour-noised.png")
    print_tables()
    draw_levels(IMAGES / "levels.svg")


if __name__ == "__main__":
    main()
