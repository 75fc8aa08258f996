"""lightdiff: from a folder of images to a latent diffusion model of one's own.

A map of the package, in the order in which pixels travel:

    settings.py            every knob, on one page
    data/                  folder -> tensors, order of items, cached latents, drawn toy faces
    models/                VAE, U-Net, LPIPS: tensors in, tensors out
    losses.py              reconstruction, KL, LPIPS and other terms
    diffusion/             noise schedules, what the network predicts, samplers
    training/              the one loop: accumulate, clip, step, average, validate, save
    stages/                one file per command: train_vae, encode, scale, train_unet, generate, demo
    checkpoint.py          one .safetensors file = one snapshot
    run_folder.py          where each stage's files lie
    options.py, cli.py     settings -> command line
    pipeline.py            the library in four calls: load, encode, sample, decode
    extras/                looks, inspects, imports; built on the core, never imported by it

Nothing here imports torch, so that `lightdiff --help` answers at once.
"""

__version__ = "0.1.0"
