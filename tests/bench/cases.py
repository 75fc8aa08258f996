"""What is measured: every case prepares each of its contenders in a process of that contender's own."""

import itertools
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lightdiff import checkpoint
from lightdiff.checkpoint import Checkpoint, Metadata
from lightdiff.data.files import ImageFile, find_images
from lightdiff.data.images import to_float
from lightdiff.data.index import LatentIndex, ShardFacts, shard_path
from lightdiff.data.latents import LatentSet
from lightdiff.data.loading import ImageBatch, ImageDataset, load_batches
from lightdiff.data.table import FINGERPRINT
from lightdiff.extras.compile import PassTime, compile_network, pick_compile
from lightdiff.losses import VAELoss
from lightdiff.models.lpips import PerceptualLoss
from lightdiff.models.unet import UNet, build_unet
from lightdiff.models.vae import build_vae
from lightdiff.options import preset_layer
from lightdiff.run_folder import INDEX, VAE_COPY, RunFolder
from lightdiff.runtime.processes import Processes, keep_memory, pick_precision, to_device
from lightdiff.runtime.stage import Stage
from lightdiff.settings import (
    ImageSettings,
    JobSettings,
    LatentsSettings,
    LoopSettings,
    SamplingSettings,
    TrainUNetSettings,
    TrainVAESettings,
    UNetArchitecture,
    VAEArchitecture,
    VAELossSettings,
    VAESettings,
)
from lightdiff.stages import encode as encode_stage
from lightdiff.stages import scale as scale_stage
from lightdiff.stages.train_unet import UNetTask
from lightdiff.training.loop import Trainer
from tests.bench import peers
from tests.bench.contest import Case, Work, flops_of, parameters_of

STEPS = 1000  # of the run that timed steps belong to
ORIGINAL_UNET = preset_layer("unet", "original")["model"]
ORIGINAL_VAE = preset_layer("vae", "original")["model"]
SMALL, LARGE = (32, 64, 128, 256), (128, 256, 512, 1024)  # widths of the original's U-Nets
ROOMS: list[Any] = []  # temporary folders of this process, which go when it ends


def room() -> Path:
    """A temporary folder."""
    ROOMS.append(tempfile.TemporaryDirectory(prefix="lightdiff-bench-"))
    return Path(ROOMS[-1].name)


# --- U-Net --------------------------------------------------------------------------------------------------------


def made_up_latents(folder: Path, count: int, side: int, shard_size: int = 2048) -> Path:
    """Finished latents of noise: `count` images without mirror images, a twentieth of them for validation.

    Their VAE has random weights.
    """
    from lightdiff.pipeline import vae_digest

    index = LatentIndex.of(
        [ImageFile(0, f"{i:07d}.jpg", "train" if i % 20 else "val", {}) for i in range(count)],
        shape=(4, side, side),
        dtype="float16",
        mirrored=False,
        vae_digest=vae_digest(untrained_vae(folder / VAE_COPY, VAESettings().resolved(64))),
        images=ImageSettings(),
        shard_size=shard_size,
        shard=np.arange(count, dtype=np.int32) // shard_size,
        row=np.arange(count, dtype=np.int32) % shard_size,
        shards=["planned"] * math.ceil(count / shard_size),
    )
    noise = torch.randn(2, min(shard_size, count), 1, 4, side, side).half()
    for number, first in enumerate(range(0, count, shard_size)):
        n = min(shard_size, count - first)
        mu, logvar = noise[:, :n]
        facts = ShardFacts(vae=index.vae_digest, plan=index.plan(np.arange(first, first + n)), bad=[])
        tensors = {
            "mu": mu,
            "logvar": logvar - 6,
            "fingerprints": torch.zeros(n, FINGERPRINT.itemsize, dtype=torch.uint8),
        }
        metadata = Metadata(stage="latents", extra=facts.model_dump())
        index.shards[number] = checkpoint.save(shard_path(folder, number), tensors, metadata).digest
    index.digest = index.compute_digest()
    index.write(folder / INDEX)
    return folder


def several(step: Callable[[], object], steps: int, batch: int, flops: float, model: nn.Module, precision: str) -> Work:
    """Some training steps one after the other, as a round; `flops` are those of an image."""

    def round_of_steps() -> None:
        for _ in range(steps):
            step()

    images = steps * batch
    return Work(round_of_steps, images, flops * images, parameters_of(model), precision)


def train_unet_step(
    model: dict[str, Any], side: int, batch: int, device: torch.device, **loop: Any
) -> tuple[Trainer, Callable[[], object]]:
    """train-unet as a user has it by default, and its next step."""
    settings = UNetArchitecture.model_validate(model).resolved(side)
    chosen = defaults(device, batch_size=batch, **loop)
    latents = LatentSet(made_up_latents(room(), 512, side))
    if device.type == "cuda":
        latents.to(device)
    latent = LatentsSettings(height=side, width=side)
    whole = TrainUNetSettings(model=settings, latent=latent, loop=chosen).resolved()
    stage = Stage("unet", whole, device, Processes(), room(), total_steps=STEPS)
    task = UNetTask(stage, latents)
    keep_memory()
    trainer = Trainer(task, stage)
    order = task.batches(0, 10**9)
    return trainer, lambda: trainer.train_step(next(order))


def defaults(device: torch.device, **changes: Any) -> LoopSettings:
    """The loop's settings, with every `auto` decided as for a long run; AdamW, as the peers have it."""
    precision = pick_precision("auto", device)
    compiling = pick_compile("auto", device, 10**5, lambda: PassTime(1, computing=1.0, launching=0.0))
    chosen = {"precision": precision, "compile": compiling, "steps": STEPS, "optimizer": "adamw"}
    return LoopSettings.model_validate(chosen | changes)


def unet_step(
    contender: str, device: torch.device, *, model: dict[str, Any], side: int, batch: int, peer: Any = None, steps: int
) -> Work:
    """Training steps of a U-Net: batch, noise, forward, backward, clip, AdamW, EMA."""
    shape = (batch, 4, side, side)
    example = torch.randn(1, 4, side, side), torch.zeros(1, dtype=torch.long)
    if contender.startswith("lightdiff"):
        network: nn.Module = build_unet(UNetArchitecture.model_validate(model).resolved(side), 4)
        flops = flops_of(network, *example, backward=True)
        trainer, step = train_unet_step(model, side, batch, device)
        return several(step, steps, batch, flops, network, trainer.loop.precision)
    bf16 = contender.endswith("bf16")
    if contender == "original":
        network = build_unet(UNetArchitecture.model_validate(model).resolved(side), 4)
        flops = flops_of(network, *example, backward=True)
        taught = peers.DenoiserSteps(network, lambda net, x, t: net(x, t), shape, device, bf16)
    else:
        network = peers.diffusers_unet(*peer, side)
        flops = flops_of(network, *example, backward=True)
        taught = peers.DiffusersSteps(network, lambda net, x, t: net(x, t, return_dict=False)[0], shape, device, bf16)
    return several(taught.step, steps, batch, flops, network, "bf16" if bf16 else "fp32")


OWN_UNET = {"channels": (64, 64, 128, 256, 256), "blocks": 1, "time_dim": 512, "attend_levels": (2,)}
SMALL_UNET = {**ORIGINAL_UNET, "channels": SMALL}
LARGE_UNET = {**ORIGINAL_UNET, "channels": LARGE}


# --- VAE ----------------------------------------------------------------------------------------------------------


def random_squeezenet(folder: Path) -> Path:
    """Random weights for LPIPS: as fast as trained ones, and nothing has to be fetched."""
    from torchvision.models import squeezenet1_1

    weights = folder / "squeezenet.pth"
    torch.save(squeezenet1_1(weights=None).state_dict(), weights)
    return weights


class VAEStepTask:
    """As much of train-vae's task as a step needs; its images lie in memory."""

    def __init__(self, settings: TrainVAESettings, device: torch.device):
        self.settings, self.device = settings, device
        self.vae_loss = VAELoss(settings.loss, device)
        self.model = build_vae(settings.model)
        to_device(self.model, device)
        size = settings.images.resolution
        self.latent_shape = (settings.model.latent_channels, *size.divided(settings.model.factor))
        self.networks = [*self.model.children(), *self.vae_loss.networks]
        image = torch.zeros(1, 3, *size, device=device)
        self.example = image, torch.zeros(1, *self.latent_shape, device=device)

    def prepare(self, batch: ImageBatch, rng: torch.Generator) -> dict[str, Tensor]:
        noise = torch.randn((len(batch.x), *self.latent_shape), generator=rng, device=self.device)
        return {"x": batch.x.to(self.device).float() / 127.5 - 1, "noise": noise}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x_hat, posterior = model(batch["x"], batch["noise"])
        return self.vae_loss(batch["x"], x_hat, posterior)


def train_vae_step(
    model: dict[str, Any], side: int, batch: int, device: torch.device, lpips: Path | None = None, **loop: Any
) -> tuple[Trainer, Callable[[], object]]:
    """train-vae as a user has it by default, but with images in memory, and its next step."""
    chosen = defaults(device, batch_size=batch, **loop)
    settings = TrainVAESettings(
        model=VAEArchitecture.model_validate(model).resolved(side),
        loop=chosen,
        loss=VAELossSettings(lpips_gamma=0.5 if lpips else 0, lpips_net="squeeze", lpips_weights=lpips),
        images=ImageSettings(resolution=side),
    )
    keep_memory()
    stage = Stage("vae", settings, device, Processes(), room(), total_steps=STEPS)
    trainer = Trainer(VAEStepTask(settings, device), stage)  # type: ignore[arg-type]
    loaded = ImageBatch(torch.randint(256, (batch, 3, side, side), dtype=torch.uint8), torch.arange(batch), [], 0)
    return trainer, lambda: trainer.train_step(loaded)


def vae_step(
    contender: str, device: torch.device, *, side: int, batch: int, lpips: bool = False, steps: int = 3
) -> Work:
    """Training steps of a VAE: forward, backward, clip, AdamW, EMA."""
    model = VAEArchitecture.model_validate(SMALL_VAE).resolved(side)
    example = torch.randn(1, 3, side, side)
    weights = random_squeezenet(room()) if lpips else None
    distance = PerceptualLoss("squeeze", weights).to(device) if weights else None
    pixels = torch.randint(256, (batch, 3, side, side), dtype=torch.uint8)
    own = build_vae(model)
    factor = model.factor
    flops = flops_of(own, example, torch.randn(1, 4, side // factor, side // factor), backward=True)
    if distance is not None:
        flops += 3 * flops_of(distance.to("cpu"), example, example) / 2 + flops_of(distance, example, example) / 2
        distance.to(device)
    if contender == "lightdiff":
        trainer, step = train_vae_step(SMALL_VAE, side, batch, device, weights)
        return several(step, steps, batch, flops, own, trainer.loop.precision)
    x = (pixels.float() / 127.5 - 1).to(device)
    if contender == "original":

        def reconstruct(net: Any, x: Tensor) -> Any:
            x_hat, posterior = net(x, torch.randn(batch, *shape, device=device))
            return x_hat, posterior.mu, posterior.logvar

        shape = (4, side // factor, side // factor)
        network: nn.Module = own
    else:

        def reconstruct(net: Any, x: Tensor) -> Any:
            posterior = net.encode(x).latent_dist
            return net.decode(posterior.sample()).sample, posterior.mean, posterior.logvar

        network = peers.diffusers_vae((32, 64, 128), 2)
        flops = flops_of(network, example, backward=True)
    taught = peers.VAESteps(network, reconstruct, x, distance)
    return several(taught.step, steps, batch, flops, network, "fp32")


SMALL_VAE = {**ORIGINAL_VAE, "encoder_channels": SMALL, "decoder_channels": SMALL[::-1]} | {
    "encoder_blocks": (2,),
    "decoder_blocks": (2,),
}


# --- images and latents -------------------------------------------------------------------------------------------


def photographs(folder: Path, count: int, side: int) -> Path:
    """JPEG files that take as long to decode as photographs: smooth shapes under some noise."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((side, side), Image.BICUBIC)
        noisy = np.asarray(coarse).astype(np.int16) + rng.integers(-12, 13, (side, side, 3), dtype=np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i:05d}.jpg", quality=90)
    return folder


def image_pipeline(contender: str, device: torch.device, *, file_side: int, side: int = 256, workers: int = 2) -> Work:
    """Files -> training batches, with two processes that load."""
    count, batch, per_round = 128 if file_side > 512 else 256, 32, 8
    folder = photographs(room() / "images", count, file_side)
    if contender == "lightdiff":
        images = ImageSettings(data=(folder,), resolution=side, val_share=0)
        dataset = ImageDataset(find_images(images.data, 0).files, images, seed=0, train=True)
        order = ([(epoch, i) for i in range(k, k + batch)] for epoch in range(10**6) for k in range(0, count, batch))
        loaded: Any = load_batches(dataset, order, workers)
        keep_memory()
        return Work(lambda: [to_float(next(loaded).x).sum() for _ in range(per_round)], batch * per_round)
    loader = torch.utils.data.DataLoader(
        peers.Photographs(folder, side, augment=True), batch_size=batch, shuffle=True, num_workers=workers,
        persistent_workers=True,
    )  # fmt: skip
    endless = itertools.chain.from_iterable(itertools.repeat(loader))
    return Work(lambda: [next(endless).sum() for _ in range(per_round)], batch * per_round)


def encode(contender: str, device: torch.device, *, count: int = 192) -> Work:
    """Files of 256 px -> latents of 64 px images. lightdiff encodes each image's mirror image, too."""
    home = room()
    folder = photographs(home / "images", count, 256)
    model = VAEArchitecture.model_validate(SMALL_VAE).resolved(64)
    vae = build_vae(model)
    example = torch.randn(1, 3, 64, 64)
    flops = flops_of(vae.encoder, example)
    if contender == "original":
        flops = flops_of(vae, example, torch.randn(1, 4, 8, 8))
        vae.eval()
        return Work(
            lambda: peers.encode_all(vae, folder, 64, home / "latents.pkl"), count, flops * count, parameters_of(vae)
        )
    images = ImageSettings(data=(folder,), resolution=64)
    settings = TrainVAESettings(model=model, images=images)
    path = RunFolder(home / "vae").vae.best
    tensors = {f"model.{name}": value for name, value in vae.state_dict().items()}
    checkpoint.save(path, tensors, Metadata(stage="vae", settings=settings.to_save()))
    runs = itertools.count()

    def once() -> None:
        wanted = {"run": home / f"run-{next(runs)}", "vae": path, "images": images}
        encode_stage.run(encode_stage.EncodeSettings.model_validate(wanted))

    return Work(once, 2 * count, flops * 2 * count, parameters_of(vae), pick_precision("auto", device))


def scale(contender: str, device: torch.device, *, count: int = 20_000) -> Work:
    """Statistics of latents of 4 x 32 x 32."""
    home = room()
    if contender == "original":
        made = torch.randn(count, 4, 32, 32)
        peers.write_pickle(home / "latents.pkl", [m.clone() for m in made], [m.clone() for m in made])
        del made
        return Work(lambda: peers.scaling_factor(home / "latents.pkl"), count)
    made_up_latents(home, count, 32)
    settings = scale_stage.ScaleSettings(latents=home, job=JobSettings())
    return Work(lambda: scale_stage.run(settings), count)


# --- sampling -----------------------------------------------------------------------------------------------------


def sampling(
    contender: str, device: torch.device, *, batch: int, own: dict[str, Any] | None = None, steps: int = 50
) -> Work:
    """DDIM of latents of 4 x 16 x 16; lightdiff draws with its `own` network, or with the original's, too."""
    side, shape = 16, (batch, 4, 16, 16)
    example = torch.randn(1, 4, side, side), torch.zeros(1, dtype=torch.long)
    if contender == "diffusers":
        from diffusers import DDIMScheduler

        network: Any = peers.diffusers_unet(SMALL, 2, side).to(device).eval()
        scheduler = DDIMScheduler(num_train_timesteps=1000)

        @torch.no_grad()
        def draw() -> None:
            scheduler.set_timesteps(steps)
            x = torch.randn(shape, device=device)
            for t in scheduler.timesteps:
                x = scheduler.step(network(x, t).sample, t, x).prev_sample

        flops = flops_of(network.to("cpu"), *example) * batch * steps
        network.to(device)
        return Work(draw, batch, flops, parameters_of(network))
    chosen = own if own and contender != "original" else SMALL_UNET
    settings = UNetArchitecture.model_validate(chosen).resolved(side)
    model = build_unet(settings, 4)
    if isinstance(model, UNet):  # its output starts at zero
        nn.init.normal_(model.out.weight, std=0.01)
    flops = flops_of(model, *example) * batch * steps
    if contender == "original":
        model.to(device)
        alpha_bar = torch.cos(torch.linspace(0, 1.5, 1000, device=device)).square()
        times = torch.linspace(999, 0, steps).long().tolist()

        @torch.no_grad()
        def walk() -> None:
            x = torch.randn(shape, device=device)
            for here, there in itertools.pairwise([*times, -1]):
                a, b = alpha_bar[here], alpha_bar[there] if there >= 0 else torch.ones((), device=device)
                eps = model(x, torch.full((batch,), here, device=device))
                x = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps

        return Work(walk, batch, flops, parameters_of(model))
    return lightdiff_sampling(model, settings, device, batch, steps, flops, contender.endswith("compiled"))


def untrained_vae(path: Path, settings: VAEArchitecture) -> Checkpoint:
    """A VAE of random weights, saved."""
    weights = {f"model.{name}": value for name, value in build_vae(settings).state_dict().items()}
    checkpoint.save(path, weights, Metadata(stage="vae", settings=TrainVAESettings(model=settings).to_save()))
    return Checkpoint(path)


def lightdiff_sampling(
    model: nn.Module,
    settings: UNetArchitecture,
    device: torch.device,
    batch: int,
    steps: int,
    flops: float,
    compiled: bool,
) -> Work:
    """The same through a saved run, as `generate` draws."""
    from lightdiff.pipeline import Pipeline, vae_digest

    home = room()
    vae_settings = VAESettings().resolved(64)
    vae_path, unet_path = home / "vae.safetensors", home / "unet.safetensors"
    vae = untrained_vae(vae_path, vae_settings)
    metadata = Metadata(
        stage="unet", settings=TrainUNetSettings(model=settings).to_save(), lineage={"vae": vae_digest(vae)}
    )
    checkpoint.save(unet_path, {f"model.{name}": value for name, value in model.state_dict().items()}, metadata)
    precision = pick_precision("auto", device)
    pipeline = Pipeline.load(home, unet_path, vae_path, "cuda" if device.type == "cuda" else "cpu", precision)
    if compiled:
        size = (pipeline.settings.latent.channels, *pipeline.latent_size())
        example = torch.zeros(1, *size, device=device), torch.zeros(1, device=device)
        time = PassTime.of(pipeline.unet, example, batch, precision)
        compile_network(pipeline.unet, device, training=False, graphs=time.launch_bound)
    chosen = SamplingSettings(num_steps=steps, sampler="ddim")
    return Work(lambda: pipeline.sample(batch, 0, chosen), batch, flops, parameters_of(model), precision)


# --- starting -----------------------------------------------------------------------------------------------------


def start(contender: str, device: torch.device, *, command: str) -> Work:
    """From the shell to a command's help, or to the end of the first training step; or for torch to be imported."""
    if contender == "import torch":
        return Work(lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True), 1)
    words = [sys.executable, "-m", "lightdiff", "train-unet"]
    if command == "help":
        return Work(lambda: subprocess.run([*words, "--help"], check=True, capture_output=True), 1)
    run = room() / "run"
    made_up_latents(RunFolder(run).latents, 2048, 16)
    scale_stage.run(scale_stage.ScaleSettings(run=run))
    words += ["--run", str(run), "--preset", "tiny", "--log-every", "1", "--restart"]
    metrics = RunFolder(run).unet.metrics

    def until_the_first_step() -> None:
        metrics.unlink(missing_ok=True)
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while not metrics.is_file() or not metrics.stat().st_size:
            if process.poll() is not None:
                raise RuntimeError(f"train-unet has ended before its first step: {process.communicate()[1]}")
            time.sleep(0.01)
        process.kill()
        process.communicate()

    return Work(until_the_first_step, 1)


UNET_PEERS = ("lightdiff", "original")
OWN_PEERS = ("lightdiff", "diffusers", "diffusers bf16")
VAE_PEERS = ("lightdiff", "original", "diffusers")

CASES: dict[str, Case] = {
    "unet-small": Case(
        "U-Net step, original architecture, 4 x 16 x 16, batch 32",
        UNET_PEERS,
        partial(unet_step, model=SMALL_UNET, side=16, batch=32, steps=5),
        {"original": 2.0},
        rounds=7,
    ),
    "unet-large": Case(
        "U-Net step, original architecture, 4 x 32 x 32, batch 4",
        UNET_PEERS,
        partial(unet_step, model=LARGE_UNET, side=32, batch=4, steps=2),
        {"original": 2.0},
        rounds=5,
    ),
    "unet-own": Case(
        "U-Net step, own architecture against diffusers' of as many weights, 4 x 16 x 16, batch 32",
        OWN_PEERS,
        partial(unet_step, model=OWN_UNET, side=16, batch=32, peer=(SMALL, 2), steps=5),
        {"diffusers": 1.5},
    ),
    "vae-64": Case(
        "VAE step without LPIPS, 64 px, batch 16",
        VAE_PEERS,
        partial(vae_step, side=64, batch=16),
        {"original": 2.0, "diffusers": 2.0},
    ),
    "vae-128": Case(
        "VAE step without LPIPS, 128 px, batch 4",
        VAE_PEERS,
        partial(vae_step, side=128, batch=4),
        {"original": 2.0, "diffusers": 2.0},
    ),
    "vae-lpips": Case(
        "VAE step with LPIPS squeeze, 64 px, batch 16",
        ("lightdiff", "original"),
        partial(vae_step, side=64, batch=16, lpips=True),
        {"original": 2.0},
    ),
    "encode": Case(
        "encode, 64 px from files of 256 px", ("lightdiff", "original"), encode, {"original": 3.0}, rounds=5
    ),
    **{
        f"sampling-{batch}{'-own' if own else ''}": Case(
            f"DDIM, 50 steps, {batch} images at a time, {'own' if own else 'original'} architecture",
            ("lightdiff", "original", "diffusers", "lightdiff compiled"),
            partial(sampling, batch=batch, own=own),
            {"original": 2.5, "diffusers": 2.5},
            rounds=5 if batch < 32 else 3,
        )
        for own in (None, OWN_UNET)
        for batch in (4, 32)
    },
    "scale": Case("scale, 20,000 latents of 4 x 32 x 32", ("lightdiff", "original"), scale, {"original": 20.0}, 3),
    "images-256": Case(
        "image pipeline, JPEG of 256 px -> 256 px, 2 workers",
        ("lightdiff", "original"),
        partial(image_pipeline, file_side=256),
        {"original": 3.0},
    ),
    "images-1024": Case(
        "image pipeline, JPEG of 1024 px -> 256 px, 2 workers",
        ("lightdiff", "original"),
        partial(image_pipeline, file_side=1024),
        {"original": 3.0},
    ),
    "help": Case("--help of a command", ("lightdiff", "import torch"), partial(start, command="help"), rounds=5),
    "first-step": Case(
        "train-unet, from the shell to the end of one step",
        ("lightdiff", "import torch"),
        partial(start, command="train-unet"),
        rounds=3,
    ),
}
