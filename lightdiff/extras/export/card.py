"""A model card: README.md with the front matter that the Hugging Face Hub reads."""

import json
import re
from pathlib import Path
from typing import Any

from lightdiff import __version__
from lightdiff.errors import UserError, shorten
from lightdiff.pictures import save_grid
from lightdiff.pipeline import Pipeline, default_sampling
from lightdiff.run_folder import RunFolder, atomic_write_text, read_json
from lightdiff.runtime.progress import shape_words

SAMPLES = "samples.png"
LICENSE = re.compile(r"[a-z0-9.-]{1,40}")
LOADING = {
    "diffusers": """```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)
images = pipe(num_images=4, seed=0CLASSES).images
```

diffusers has no class for this U-Net, so the folder has Python files of its own, and
`trust_remote_code=True` lets diffusers run them. VAE_NOTE lightdiff itself need not be installed; with it,
`Pipeline.load("FOLDER")` works, too.""",
    "safetensors": """```python
from lightdiff.pipeline import Pipeline

model = Pipeline.load("FOLDER")
x = model.decode(model.sample(4, seed=0))  # (4, 3, h, w) in [-1, 1]
```

`lightdiff.json` describes the networks. GUIDE_NOTE VAE_NOTE""",
    "onnx": """Files for ONNX Runtime, with any batch and size of latents; `lightdiff.json` describes
objective, noise schedule and scale of the latents:

| file | inputs | outputs |
|---|---|---|
| `unet.onnx`GUIDE_FILE | `x` (b, c, h, w), `t` (b,), from 0 to T - 1LABEL_INPUT | `prediction` (b, c, h, w) |
| `vae_decoder.onnx` | `z` (b, c, h, w) | `image` (b, 3, f h, f w) in [-1, 1] |
| `vae_encoder.onnx` | `image` | `mu`, `logvar` |

`z = x0 / scale + shift`, with both from `lightdiff.json`. GUIDE_NOTE""",
    "web": """Serve the folder by any static host, or by `python -m http.server` in it, and open `index.html`.
The model draws in the browser; nothing leaves the page.""",
}

GUIDE = {
    "safetensors": "`guide.safetensors` is a worse U-Net that guidance leads away from: load by "
    '`Pipeline.load("FOLDER", guide_with=Path("early"))`, draw by `model.sample(4, 0, SamplingSettings(guidance=2))`.',
    "onnx": "`guide.onnx` is a worse U-Net that guidance w leads away from: unet + (w - 1) (unet - guide).",
}


def write_card(pipeline: Pipeline, folder: Path, to: str, run: Path, license_: str, about: str, samples: int) -> None:
    """Write README.md, and a picture of samples, into an exported folder."""
    front = {"license": license_, "library_name": "diffusers" if to == "diffusers" else "lightdiff"}
    tags = ["lightdiff", "latent-diffusion", "image-generation", *(["onnx"] if to in ("onnx", "web") else [])]
    task = "unconditional-image-generation"
    head = "\n".join(
        ["---", *(f"{n}: {v}" for n, v in front.items()), f"pipeline_tag: {task}", f"tags: {json.dumps(tags)}", "---"]
    )
    s = pipeline.settings
    shape = f"{s.latent.channels} x {s.latent.height} x {s.latent.width}"
    text = [head, f"# A latent diffusion model of {shape_words(pipeline.resolution)} px images"]
    text.append(plain(about) if about else "What it was trained on has not been said.")
    if samples:
        z = pipeline.sample(samples, 0, default_sampling(s))
        save_grid(folder / SAMPLES, pipeline.decode(z), min(samples, 8))
        text.append(f"![The first {samples} images of seed 0, none left out]({SAMPLES})")
    text.append("## How to load it\n\n" + loading(to, pipeline))
    rows = {
        "images": f"{shape_words(pipeline.resolution)} px, RGB",
        "latents": shape,
        "VAE": f"{pipeline.vae_settings.architecture}, {millions(pipeline.vae)} M parameters",
        "U-Net": f"{s.model.architecture}, {millions(pipeline.unet)} M parameters",
        "objective": f"{s.target.objective}, schedule {s.noise.schedule}, {s.noise.timesteps} levels",
        **({"classes": plain(", ".join(s.classes))} if s.classes else {}),
        **trained(pipeline),
    }
    text.append("## What it is\n\n" + table(("", ""), rows.items()))
    if numbers := measured(run):
        text.append("## Numbers\n\n" + table(("", "value"), numbers.items()))
    text.append(f"Trained and exported with lightdiff {__version__}.")
    atomic_write_text(folder / "README.md", "\n\n".join(text) + "\n")


def check_license(value: str) -> str:
    """A licence as the Hub names it.

    Raises:
        UserError: If it is none of that form.
    """
    if not LICENSE.fullmatch(value):
        raise UserError(f"--license {shorten(value)}: give its short name, such as mit, cc-by-4.0 or other")
    return value


def loading(to: str, pipeline: Pipeline) -> str:
    """How to load a folder of this kind."""
    stock = pipeline.vae_settings.architecture == "kl"
    vae = "The VAE is a stock AutoencoderKL." if stock else "The VAE, too, has code of its own."
    if to == "safetensors":
        vae = "`vae.safetensors` has the tensor names of diffusers' AutoencoderKL." if stock else ""
    classes = pipeline.settings.classes
    guided = pipeline.weak is not None
    chosen = f", class_names=[{json.dumps(classes[0])}], guidance=2.0" if classes else ", guidance=2.0" * guided
    label = f", `label` (b,), {len(classes)} for no class" if classes else ""
    notes = {"CLASSES": chosen, "VAE_NOTE": vae, "LABEL_INPUT": label}
    notes |= {"GUIDE_FILE": ", `guide.onnx`" * guided, "GUIDE_NOTE": GUIDE.get(to, "") * guided}
    text = LOADING[to]
    for place, note in notes.items():
        text = text.replace(place, note)
    return text.strip()


def trained(pipeline: Pipeline) -> dict[str, str]:
    """How long both networks were trained, as far as it is known."""
    seen = {name: saved.metadata for name, saved in pipeline.checkpoints.items()}
    return {
        f"{name} trained": f"{about.step:,} steps, {about.images_seen:,} images"
        for name, about in seen.items()
        if about.images_seen
    }


def measured(run: Path) -> dict[str, str]:
    """What `evaluate` has measured in a run, with the errors of its numbers."""
    path = RunFolder(run).path / "evaluation/metrics.json"
    found: dict[str, Any] = read_json(path) if path.is_file() else {}
    rows = {}
    for part, values in found.items():
        for name, value in (values if isinstance(values, dict) else {}).items():
            if isinstance(value, float) and not name.endswith("+-"):
                error = values.get(f"{name} +-")
                told = f" +- {error:.2g}" if isinstance(error, float) else ""
                rows[f"{part}: {plain(name)}"] = f"{value:.4g}{told}"
    return rows


def millions(network: Any) -> str:
    """Its size."""
    return f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f}"


def table(heads: tuple[str, str], rows: Any) -> str:
    """A table in Markdown."""
    return "\n".join([f"| {heads[0]} | {heads[1]} |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])


def plain(text: str) -> str:
    """Words of a user in Markdown: no table, heading, image or HTML comes of them."""
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", " ".join(text.split()))
