"""lightdiff: from a folder of images to a latent diffusion model of one's own.

A map of the package, in the order in which images travel:

    cli.py, options.py     commands; settings -> options
    settings.py            every setting of the core but the networks', on one page
    defaults.py            defaults that follow the machine, the resolution and the data
    loops.py               settings of where and how long to compute
    architectures.py       settings of the networks, and which architectures there are
    stages/                one file per command: train_vae, encode, scale, train_unet, generate
    runtime/               how every stage runs: opening it, processes, devices, signals, resuming, progress
    data/                  folder -> tensors, order of items, cached latents
    models/                VAE, U-Net, LPIPS: tensors in, tensors out; one architecture a file
    losses.py              reconstruction, KL, LPIPS and other terms
    diffusion/             noise schedules, what the network predicts, samplers
    training/              the one loop: accumulate, clip, step, average, validate, save
    checkpoint.py          one .safetensors file = one snapshot
    run_folder.py          where each stage's files lie
    pipeline.py            the library in four calls: load, encode, sample, decode
    pictures.py            grids and animations
    extras/                edit, walk, evaluate, sweep, report, show, demo and more; and what most runs do without

The core imports no extra; what only some runs need it names as text and imports `on_demand`.

Nothing here imports torch, so that `lightdiff --help` answers at once.
"""

__version__ = "0.1.0"
