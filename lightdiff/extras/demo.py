"""demo: all five stages on faces that the package draws itself."""

from pathlib import Path

from lightdiff.extras.settings import DemoSettings
from lightdiff.extras.toy_faces import draw_dataset
from lightdiff.run_folder import RunFolder, ensure_writable
from lightdiff.runtime.progress import console
from lightdiff.settings import (
    EncodeSettings,
    GenerateSettings,
    ImageSettings,
    LoopSettings,
    ScaleSettings,
    TrainUNetSettings,
    TrainVAESettings,
    VAELossSettings,
    VAESettings,
)
from lightdiff.stages import encode, generate, scale, train_unet, train_vae


def run(settings: DemoSettings) -> Path:
    """Draw faces, train on them, and return the folder of new faces."""
    s = settings
    faces = s.run / f"faces-{s.resolution}-seed-{s.seed}"
    ensure_writable(s.run)
    heading(f"0. draw {s.count} faces of {s.resolution} px")
    draw_dataset(faces, s.count, s.seed, s.resolution)

    heading("1. train-vae: images -> a VAE")
    common = {"seed": s.seed, "device": s.device}
    vae_loop = LoopSettings.model_validate(
        {"steps": s.vae_steps, "batch_size": 32, "val_every": 150, "save_every": 300, **common}
    )
    images = ImageSettings(data=(faces,), resolution=s.resolution, random_crop=1.0, flip=False)
    loss = VAELossSettings(lpips_gamma=0.0, reconstruction="l1", kl_beta=3e-3)
    train_vae.run(
        TrainVAESettings(run=s.run, images=images, loss=loss, loop=vae_loop, model=VAESettings(decoder_width=32))
    )

    heading("2. encode: images -> cached latents")
    encode.run(
        EncodeSettings.model_validate({"run": s.run, "compute": {"device": s.device}} | encode.inherited(s.run, None))
    )

    heading("3. scale: latents -> mean, std, scaling factor")
    scale.run(ScaleSettings(run=s.run))

    heading("4. train-unet: latents -> a U-Net that denoises them")
    unet_loop = LoopSettings.model_validate({"steps": s.unet_steps, "batch_size": 64, "val_every": 250, **common})
    unet = {"run": s.run, "loop": unet_loop} | train_unet.inherited(s.run, None)
    train_unet.run(TrainUNetSettings.model_validate(unet))

    heading("5. generate: noise -> new faces")
    out = generate.run(GenerateSettings(run=s.run, num_images=64, seed=s.seed))
    tell(s, faces, out)
    return out


def heading(text: str) -> None:
    """Print what comes next."""
    console.print()
    console.print(text, style="bold")


def tell(s: DemoSettings, faces: Path, out: Path) -> None:
    """Say what was made, where, and how to do the same by hand."""
    run = RunFolder(s.run)
    text = f"""
Done. None of the faces in {out / "grid.png"} is among the {s.count} drawn ones:
a VAE ({run.vae.best}) and a U-Net ({run.unet.last}) made them up.
For better ones, the same command with --unet-steps {4 * s.unet_steps} trains further from here.
Originals above their reconstructions are in {run.vae.images}, samples during training in {run.unet.images}.

The same by hand, with images of your own in place of {faces}:

  lightdiff train-vae --run runs/mine --data {faces} --resolution {s.resolution} \\
      --no-flip --random-crop 1 --steps {s.vae_steps} --batch-size 32 \\
      --reconstruction l1 --kl-beta 3e-3 --lpips-gamma 0
  lightdiff encode --run runs/mine
  lightdiff scale --run runs/mine
  lightdiff train-unet --run runs/mine --steps {s.unet_steps} --batch-size 64
  lightdiff generate --run runs/mine --num-images 64"""
    console.print(*text.split("\n"), sep="\n", soft_wrap=True)
