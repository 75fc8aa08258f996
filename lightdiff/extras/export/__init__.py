"""export: a trained model -> a folder for diffusers, ONNX Runtime, browsers, or whatever reads .safetensors."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from lightdiff.errors import UserError
from lightdiff.extras.export.card import check_license, write_card
from lightdiff.extras.export.folder import about, write_diffusers, write_json, write_plain
from lightdiff.extras.export.onnx_files import check_libraries, write_onnx
from lightdiff.extras.export.web import write_web
from lightdiff.extras.hub import push as upload
from lightdiff.pipeline import EXPORTED, Pipeline
from lightdiff.run_folder import ensure_writable

To = Literal["diffusers", "onnx", "safetensors", "web"]


def export(
    run: Path,
    to: To,
    out: Path,
    about_data: str = "",
    license_: str = "unknown",
    samples: int = 8,
    runtime: Path | None = None,
    push: str = "",
    guide_with: Path | None = None,
) -> str:
    """Write a run's model into a new folder and return that, or the address that it was uploaded to.

    Args:
        run: The run, or an exported folder.
        to: The form.
        out: The folder to write.
        about_data: What it was trained on, in words, for the model card.
        license_: The model's licence, as the Hub names it.
        samples: Images in the model card; 0 for none.
        runtime: Folder of the npm package onnxruntime-web, whose files are put beside a page.
        push: owner/name of a repository on the Hugging Face Hub to upload to.
        guide_with: A worse U-Net to export, too, for guidance without a class; as `Pipeline.load` takes it.

    Raises:
        UserError: If there is no model, the folder holds something, or a library is missing.
    """
    check_license(license_)
    if guide_with is not None and (str(run).startswith("hf://") or (run / EXPORTED).is_file()):
        raise UserError(f"--guide-with: {run} is an exported folder; export the run that it was made of")
    if runtime is not None and to != "web":
        raise UserError("--runtime belongs to --to web")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already: choose another folder")
    write = writer(to, runtime)
    pipeline = Pipeline.load(run, device="cpu", guide_with=guide_with)
    ensure_writable(out)
    write(pipeline, out)
    write_json(out / EXPORTED, about(pipeline).model_dump())
    write_card(pipeline, out, to, run, license_, about_data, samples)
    return upload(out, push) if push else str(out)


def writer(to: To, runtime: Path | None) -> Callable[[Pipeline, Path], None]:
    """What writes a form; the libraries that it needs are looked for here."""
    if to == "diffusers":
        return write_diffusers
    if to == "safetensors":
        return write_plain
    check_libraries(to)
    return write_onnx if to == "onnx" else partial(write_web, runtime=runtime)
