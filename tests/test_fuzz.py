"""Documents that a stranger has changed, sealed again where they are sealed: always a sentence, never a bug of ours.

`FUZZ=5000 python -m pytest tests/test_fuzz.py` tries as many of each.
"""

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import call
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lightdiff import checkpoint
from lightdiff.checkpoint import Checkpoint, Metadata
from lightdiff.errors import LightdiffError
from lightdiff.extras.evaluate import draw_samples, images_of, lpips_settings, print_results, store_results
from lightdiff.extras.report.page import render
from lightdiff.extras.settings import EvaluateSettings, SweepSettings
from lightdiff.extras.show import show
from lightdiff.extras.sweep.plan import Plan
from lightdiff.pipeline import Pipeline, levels_for
from lightdiff.run_folder import RunFolder
from lightdiff.runtime.processes import Processes
from lightdiff.runtime.progress import Reporter
from lightdiff.settings import SamplingSettings, TrainUNetSettings, VAELossSettings
from lightdiff.training.saving import Progress

collecting = import_module("lightdiff.extras.report.collect")
MANY = int(os.environ.get("FUZZ", "25"))
several = settings(
    max_examples=MANY,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # shrinking takes minutes, and says little more
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NUMBERS = [0, -1, 1, 2, 7, 10**9, 10**18, 10**400, -(10**400), 0.5, -0.5, 1e-320, 1e308, float("nan"), float("inf")]
TEXTS = ["", "x", "auto", "original", "1", "\x1b[31m", "x" * 5000, "/", "../..", "\udcff", "é"]
SCALARS = st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(TEXTS) | st.floats() | st.integers()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*TEXTS, "step"]), inner, max_size=3),
    max_leaves=5,
)
GONE = object()


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value of a document, groups included."""
    rows = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    for name, value in rows:
        yield (*path, name)
        yield from places(value, (*path, name))


def changed(document: Any, data: st.DataObject) -> Any:
    """The document with one to three values replaced, removed, or added."""
    result = copy.deepcopy(document)
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from(list(places(document))))
        new = data.draw(VALUES | st.just(GONE))
        group = result
        try:
            for name in way:
                group = group[name]
            if new is GONE:
                del group[last]
            else:
                group[last] = new
        except (KeyError, IndexError, TypeError):
            continue  # what was there has been replaced before
    return result


def told(*what: Callable[[], object]) -> None:
    """Do all of it; each may end in one of our sentences."""
    for do in what:
        try:
            do()
        except LightdiffError as error:
            text = str(error)
        else:
            continue
        assert text
        assert len(text) < 4000
        assert "\x1b" not in text


@pytest.fixture
def looked_at(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[], None]:
    """Look at a run with all that only looks, health included; what takes long and reads no document is left out."""
    monkeypatch.setattr(collecting, "trajectory_pictures", lambda pipeline: [])
    monkeypatch.setattr(collecting, "samples", lambda pipeline: None)
    monkeypatch.setattr(collecting, "nearest", lambda pipeline, latents: None)
    monkeypatch.setattr(collecting, "reconstructions", lambda folder, device: None)

    def look() -> None:
        cpu = torch.device("cpu")
        told(
            lambda: show(run),
            lambda: show(run, as_json=True),
            lambda: render([collecting.collect(run, cpu)] * 2).encode(errors="replace"),
        )
        assert "\x1b" not in "".join(capsys.readouterr())

    return look


@given(data=st.data())
@several
def test_metrics(run: Path, looked_at: Callable[[], None], data: st.DataObject) -> None:
    rows = [{"step": n, "images_seen": n, "loss": 1.0, "images_per_s": 3.0, "memory_mb": 1.0} for n in (1, 5)]
    rows += [{"step": n, "val_loss": 1.0, **{f"val_loss_band_{b}": 1.0 for b in (1, 2, 3, 4)}} for n in (1, 4, 9)]
    lines = [json.dumps(row) for row in changed(rows, data)] if data.draw(st.booleans()) else []
    lines += data.draw(st.lists(VALUES.map(json.dumps) | st.text(), max_size=2))
    for stage in ("vae", "unet"):
        text = "\n".join(lines).encode(errors="surrogatepass")
        (run / stage / "metrics.jsonl").write_bytes(text)
    looked_at()
    with Reporter("again", 9, 4, run / "unet/metrics.jsonl"):
        pass


@given(data=st.data())
@several
def test_settings_of_a_run_that_has_saved_nothing(
    run: Path, looked_at: Callable[[], None], data: st.DataObject
) -> None:
    stage = data.draw(st.sampled_from(["vae", "unet"]))
    kept = run.with_name("kept")
    if not kept.exists():
        shutil.copytree(run, kept)
    shutil.rmtree(run)
    shutil.copytree(kept, run)
    shutil.rmtree(run / stage / "checkpoints")
    document = json.loads((run / stage / "settings.json").read_text())
    text = json.dumps(changed(document, data)) if data.draw(st.booleans()) else data.draw(st.text())
    (run / stage / "settings.json").write_bytes(text.encode(errors="surrogatepass"))
    looked_at()


@given(data=st.data())
@several
def test_an_evaluation(run: Path, looked_at: Callable[[], None], data: st.DataObject) -> None:
    files = {stage: run / stage / "checkpoints/last.safetensors" for stage in ("vae", "unet")}
    results = {"samples": 9, "FID": 1.0, "FID +-": 0.1, "share of samples nearer than 99% of those": 0.5}
    results |= {"KL per channel (nats per element)": [1.0, 2.0]}
    document = {stage: {"network": Checkpoint(file).metadata.digest, **results} for stage, file in files.items()}
    file = run / "evaluation/metrics.json"
    file.parent.mkdir(exist_ok=True)
    text = json.dumps(changed(document, data)) if data.draw(st.booleans()) else data.draw(st.text())
    file.write_bytes(text.encode(errors="surrogatepass"))
    looked_at()
    told(lambda: store_results(file, "unet", document["unet"]), lambda: print_results("unet", document["unet"]))


@given(data=st.data())
@several
def test_sealed_checkpoints(run: Path, looked_at: Callable[[], None], data: st.DataObject) -> None:
    """Their digests are right, but what they say of themselves is not."""
    stage = data.draw(st.sampled_from(["vae", "unet"]))
    path = run / stage / "checkpoints/last.safetensors"
    kept = run.with_name(f"{stage}.safetensors")
    if not kept.exists():
        shutil.copy(path, kept)
    saved = Checkpoint(kept)
    document = changed(saved.metadata.model_dump(), data)
    try:
        metadata = Metadata.model_validate(document)
        checkpoint.save(path, saved.tensors(""), metadata)
    except ValueError:  # no such file can be made with its digest
        shutil.copy(kept, path)
        return
    shutil.copy(path, path.with_name("best.safetensors"))
    run_folder, ranks = RunFolder(run), Processes()
    unet, vae = run_folder.unet.last, run_folder.vae.last
    looked_at()
    told(
        lambda: Pipeline.load(run, device="cpu").sample(1, sampling=SamplingSettings(num_steps=2)),
        lambda: Progress.of(Checkpoint(unet)),
        lambda: levels_for(Checkpoint(unet, "unet").settings(TrainUNetSettings), SamplingSettings()),
        lambda: images_of(Checkpoint(vae, "vae"), EvaluateSettings()),
        lambda: lpips_settings(
            Checkpoint(run_folder.vae.last).settings(VAELossSettings, "loss"), EvaluateSettings(), ranks
        ),
        lambda: (
            draw_samples(unet, vae, EvaluateSettings(run=run, num_images=2), run / "evaluation")
            if data.draw(st.sampled_from([False] * 9 + [True]))
            else None
        ),
        lambda: Plan(SweepSettings(run=run, vary=("kl-beta=1,2",), until="vae")),
        lambda: Plan(SweepSettings(run=run, vary=("num-steps=1,2",))),
    )
    for command in ("encode", "train-unet"):
        if data.draw(st.sampled_from([False] * 9 + [True])):
            result = call(command, "--run", run, "--dry-run")
            assert "should not happen" not in result.err
    shutil.copy(kept, path)


@pytest.mark.parametrize("group", ["loop", "images", "model"])
def test_a_group_of_settings_that_is_none(run: Path, group: str) -> None:
    path = RunFolder(run).vae.last
    saved = Checkpoint(path)
    metadata = saved.metadata.model_copy(update={"settings": saved.metadata.settings | {group: ""}})
    checkpoint.save(path, saved.tensors(""), metadata)
    shutil.copy(path, path.with_name("best.safetensors"))
    sweep = call("sweep", "--vary", "kl-beta=1,2", "--until", "vae", "--dry-run", "--run", run)
    edit = call("edit", "--vae", path, "--from", next((run / "samples").glob("*/00000.png")), "--run", run)
    assert sweep.code
    assert "should not happen" not in sweep.err + edit.err


@pytest.mark.parametrize("change", [{"best": "low"}, {"skipped": -1}, {"unvalidated": {"loss": None}}])
def test_a_training_whose_progress_makes_no_sense_is_refused(run: Path, change: dict[str, Any]) -> None:
    for path in (RunFolder(run).unet.last, *RunFolder(run).unet.steps()):
        saved = Checkpoint(path)
        metadata = saved.metadata.model_copy(update={"extra": saved.metadata.extra | change})
        checkpoint.save(path, saved.tensors(""), metadata)
    result = call("train-unet", "--run", run, "--steps", 99)
    assert result.code == 2
    assert f"is damaged: {next(iter(change))}: " in result.err
