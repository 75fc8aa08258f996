"""One process of several, for test_ranks.py: `python -m tests.bench.many JOB FOLDER`, with RANK etc. set.

Without other processes it computes the same in one. Rank 0 writes the results into FOLDER.
"""

import errno
import os
import signal
import sys
from pathlib import Path

import torch

from lightdiff import checkpoint
from lightdiff.checkpoint import Checkpoint, Metadata
from lightdiff.data.files import find_images
from lightdiff.data.latents import LatentSet, latents_settings
from lightdiff.diffusion.schedules import Schedule
from lightdiff.errors import LightdiffError
from lightdiff.extras.several.group import init_distributed, shutdown
from lightdiff.pictures import save_grid
from lightdiff.run_folder import RunFolder
from lightdiff.runtime.processes import Processes
from lightdiff.runtime.stage import Stage
from lightdiff.settings import (
    EncodeSettings,
    GenerateSettings,
    ImageSettings,
    LoopSettings,
    SamplingSettings,
    ScaleSettings,
    TrainUNetSettings,
    TrainVAESettings,
    UNetSettings,
    VAELossSettings,
    VAESettings,
)
from lightdiff.stages import encode, generate, scale, train_unet, train_vae
from lightdiff.training.loop import Trainer, train
from lightdiff.training.optimizers import Muon

CPU = torch.device("cpu")


def loop(**changes):
    base = {"steps": 20, "batch_size": 6, "lr": 1e-3, "warmup_steps": 3, "val_every": 10, "save_every": 10}
    return LoopSettings(
        **(base | {"precision": "fp32", "workers": 0, "log_every": 1, "ema_decay": (0.999, 0.9)} | changes)
    )


def vae_settings(folder: Path, val_share=0.2, **changes) -> TrainVAESettings:
    return TrainVAESettings(
        run=folder / "run",
        images=ImageSettings(data=(folder / "faces",), resolution=16, val_share=val_share),
        loss=VAELossSettings(lpips_gamma=0),
        loop=loop(**changes),
        model=VAESettings(encoder_width=8, decoder_width=8, encoder_blocks=(1,), decoder_blocks=(1,)).resolved(16),
    )


def unet_settings(run: Path, **changes) -> TrainUNetSettings:
    latent = latents_settings(RunFolder(run).latents)
    model = UNetSettings(width=16, blocks=1, time_dim=16).resolved(latent.height)
    return TrainUNetSettings(run=run, loop=loop(**changes), model=model, latent=latent).resolved()


def blank(task, model, path):
    """A black picture: real ones are made in float32."""
    save_grid(path, torch.zeros(1, 3, 4, 4), columns=1)


class DoubleVAE(train_vae.VAETask):
    """The VAE's task in float64."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.model.double()

    def prepare(self, batch, rng):
        return {
            name: value.double() if value.is_floating_point() else value
            for name, value in super().prepare(batch, rng).items()
        }

    def validation_batches(self):
        for x, noise in super().validation_batches():
            yield x.double(), noise.double()

    picture = blank


class DoubleUNet(train_unet.UNetTask):
    """The U-Net's task in float64. Its levels are drawn in float32, exactly as before."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.model.double()
        self.schedule = Schedule(self.schedule.alpha.double(), self.schedule.sigma.double())

    def prepare(self, batch, rng):
        whole = super().prepare(batch, rng)
        return {name: value.double() if value.is_floating_point() else value for name, value in whole.items()}

    picture = blank

    def validate(self, model):
        return {}


def float64(folder: Path, processes: Processes) -> None:
    """20 steps of both trainings in float64, with micro-batches and a batch that 3 processes share unevenly.

    Two processes compute activations again, more keep them.
    """
    torch.set_num_threads(1)
    again = processes.world_size == 2
    settings = vae_settings(folder, batch_size=7, micro_batch=2, checkpoint_activations=again)
    files = find_images(settings.images.data, 0.2).files
    run = RunFolder(folder / f"double-{processes.world_size}")
    latents = LatentSet(RunFolder(folder / "run").latents)
    unet = unet_settings(folder / "run", batch_size=7, micro_batch=2, checkpoint_activations=again)
    vae_stage = Stage("vae", settings, CPU, processes, run.vae.path, total_steps=20, metadata=Metadata(stage="vae"))
    unet_stage = Stage("unet", unet, CPU, processes, run.unet.path, total_steps=20, metadata=Metadata(stage="unet"))
    for task, stage in ((DoubleVAE(vae_stage, files), vae_stage), (DoubleUNet(unet_stage, latents), unet_stage)):
        processes.run_on_main(lambda stage=stage: stage.folder.checkpoints.mkdir(parents=True))
        train(task, stage)


def pipeline(folder: Path, processes: Processes) -> None:
    """All five stages, as the command line calls them."""
    torch.set_num_threads(1)
    run = folder / "run"
    train_vae.run(vae_settings(folder))
    encode.run(EncodeSettings.model_validate({"run": run, "shard_size": 5, **encode.inherited(run, None)}))
    scale.run(ScaleSettings(run=run, only_mu=False))  # an untrained mu hardly varies: scaled, its rounding would show
    train_unet.run(unet_settings(run))
    generate.run(
        GenerateSettings(
            run=run, num_images=7, batch_size=2, sampling=SamplingSettings(num_steps=4), out=folder / "out"
        )
    )


def muon(folder: Path, processes: Processes) -> None:
    """Some steps of Muon alone: one large matrix, two alike, one of a shape of its own; then one whose loss is NaN."""
    torch.set_num_threads(1)
    weights = {}
    for dtype in (torch.float64, torch.float32):
        rng = torch.Generator().manual_seed(0)
        params = [torch.randn(*shape, generator=rng) for shape in ((40, 30, 3, 3), (20, 24), (20, 24), (70, 17))]
        params = [torch.nn.Parameter(p.to(dtype)) for p in params]
        optimizer = Muon(params, {"lr": 0.1, "weight_decay": 0.1, "tf32": False}, processes)
        for step in range(4):
            for p in params:
                p.grad = torch.randn(p.shape, generator=rng).to(p.dtype) if step < 3 else torch.full_like(p, torch.nan)
            optimizer.found_inf = torch.tensor(float(step == 3))
            optimizer.step()
        weights |= {f"{dtype} {i}": p.detach() for i, p in enumerate(params)}
        weights |= {f"{dtype} momentum {i}": optimizer.state[p]["exp_avg"].clone() for i, p in enumerate(params)}
    torch.save(weights, folder / f"muon-{processes.rank}-of-{processes.world_size}.pt")


def corners(folder: Path, processes: Processes) -> None:
    """More processes than items in a batch, no validation images, other settings on resuming."""
    torch.set_num_threads(1)
    train_vae.run(vae_settings(folder, val_share=0.0, batch_size=2, steps=3))
    assert Checkpoint(RunFolder(folder / "run").vae.best).metadata.step == 3
    train_vae.run(vae_settings(folder, val_share=0.0, batch_size=4, steps=5))
    assert processes.run_on_main(lambda: processes.rank) == 0


def refused(folder: Path, processes: Processes) -> None:
    """A mistake that only the first process can see is reported by all of them."""
    (folder / "run/vae").mkdir(parents=True, exist_ok=True)
    (folder / "run/vae/.lock").write_text("elsewhere 17\n")
    try:
        train_vae.run(vae_settings(folder, steps=3))
    except LightdiffError as error:
        (folder / f"refused-{processes.rank}").write_text(str(error))
    (folder / "run/vae/.lock").unlink(missing_ok=True)
    settings = vae_settings(folder, steps=3)
    if processes.rank:  # as on a machine with other files
        other = settings.images.model_copy(update={"data": (folder / "other",)})
        settings = settings.model_copy(update={"images": other})
    try:
        train_vae.run(settings)
    except LightdiffError as error:
        (folder / f"differs-{processes.rank}").write_text(str(error))


def in_turn(folder: Path, processes: Processes) -> None:
    """One stage after the other, each of which meets the other processes anew."""
    torch.set_num_threads(1)
    processes.all_reduce_max(0, patient=True)  # all have met before one of them leaves
    shutdown()
    for steps in (2, 3):
        train_vae.run(vae_settings(folder, steps=steps))


def full_disk(folder: Path, processes: Processes) -> None:
    """A write that fails while training goes on ends it in all processes, long before the next save."""
    train_step = Trainer.train_step

    def asking(trainer, batch):
        losses = train_step(trainer, batch)
        if trainer.step == 3:
            checkpoint.save_file = full
            os.kill(os.getpid(), signal.SIGUSR1)
        return losses

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Trainer.train_step = asking
    try:
        train_vae.run(vae_settings(folder, steps=100_000, val_every=0, save_every=100_000))
    except LightdiffError as error:
        (folder / f"full-{processes.rank}").write_text(str(error))
        os._exit(0)  # threads of gloo that are left by an error sometimes abort the interpreter's own end


def main() -> None:
    job, folder = sys.argv[1:]
    processes = init_distributed(CPU, 30)
    assert processes.world_size == int(os.environ.get("WORLD_SIZE") or os.environ["SLURM_STEP_NUM_TASKS"])
    jobs = (float64, muon, pipeline, corners, refused, full_disk, in_turn)
    {work.__name__: work for work in jobs}[job](Path(folder), processes)
    shutdown()


if __name__ == "__main__":
    main()
