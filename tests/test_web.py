"""The page that draws in a browser: its mathematics is that of the library, and its pictures those of generate."""

import functools
import http.server
import json
import math
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import random_pipeline
from torch import Tensor, nn

from lightdiff.data.order import item_noise
from lightdiff.diffusion.objectives import Guidance, denoiser
from lightdiff.diffusion.samplers import SAMPLERS
from lightdiff.errors import UserError
from lightdiff.extras.export.web import PAGE, page_settings, runtime_files
from lightdiff.pipeline import Pipeline, default_sampling, levels_for
from lightdiff.settings import SamplingSettings, with_changes

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NODE = shutil.which("node")
RUNTIME = Path(os.environ.get("ONNXRUNTIME_WEB", "node_modules/onnxruntime-web"))
SPACINGS = ("trailing", "uniform", "karras", "quadratic")


def in_node(code: str, folder: Path, **given: Any) -> Any:
    """What a module computes with what it is given, beside the page's mathematics."""
    shutil.copy(PAGE / "draw.js", folder / "draw.mjs")
    (folder / "given.json").write_text(json.dumps(given))
    head = 'import * as d from "./draw.mjs"; import { readFileSync } from "node:fs";\n'
    head += 'const given = JSON.parse(readFileSync("given.json"));\n'
    (folder / "run.mjs").write_text(head + code)
    done = subprocess.run([str(NODE), "run.mjs"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not NODE, reason="needs node")
def test_noise_is_that_of_generate(tmp_path: Path) -> None:
    cases = [
        [16, "0", "start", 0],
        [256, "7", "step 3", 0],
        [100, str(2**64 + 5), "start", 12],
        [4096, "1", "start", 0],
    ]
    code = "console.log(JSON.stringify(given.cases.map((c) => Array.from(d.noise(...c)))))"
    for (count, seed, purpose, item), found in zip(cases, in_node(code, tmp_path, cases=cases), strict=True):
        wanted = item_noise((count,), [item], int(seed), purpose)[0]
        torch.testing.assert_close(torch.tensor(found), wanted, atol=2e-6, rtol=1e-5)


def network(x: Tensor, t: Tensor, label: Tensor | None = None, size: float = 0.4) -> Tensor:
    """What stands for a U-Net, here and in JavaScript."""
    known = 0 if label is None else label[:, None, None, None]
    return size * torch.tanh(x) * torch.cos(t / 700)[:, None, None, None] + 0.1 * known


CODE = """
const predict = async (latents, t, labels, worse) => latents.map((x, i) =>
  x.map((value) => (worse ? 0.3 : 0.4) * Math.tanh(value) * Math.cos(t / 700) + 0.1 * (labels ? labels[i] : 0)));
const found = [];
for (const how of given.hows) {
  const way = d.sample(given.models[how.model], predict, how, d.noise(64, how.seed, "start", 0));
  let steps = 0, last;
  for (;;) {
    const { value, done } = await way.next();
    if (done) { last = value; break; }
    steps++;
  }
  found.push({ steps, x: Array.from(last), levels: d.levels(given.models[how.model], how.steps, how.spacing) });
}
console.log(JSON.stringify(found));
"""


@pytest.mark.skipif(not NODE, reason="needs node")
def test_levels_and_samplers_are_those_of_the_library(tmp_path: Path) -> None:
    targets: dict[str, dict[str, Any]] = {"flow": {}, "eps": {"objective": "eps"}, "v": {"objective": "v"}}
    models = {name: random_pipeline(**target) for name, target in targets.items()}
    worse = functools.partial(network, size=0.3)
    models["v"].weak = nn.Identity()  # the page's settings say only that there is one
    hows = [
        {"model": m, "sampler": s, "spacing": p, "steps": n, "seed": "3", "label": label, "guidance": g, "interval": i}
        for m in models
        for s in ("dpm++2m", "ddim", "ddpm", "heun")
        for p, n in zip(SPACINGS, (7, 4, 9, 1), strict=True)
        for label, g, i in ((None, 1, [0, 1]), (1, 2.5, [0.2, 0.8]), (None, 2, [0.1, 0.9]))
    ]
    for found, how in zip(
        in_node(CODE, tmp_path, hows=hows, models={n: page_settings(m) for n, m in models.items()}), hows, strict=True
    ):
        s = models[str(how["model"])].settings
        sampling = SamplingSettings(sampler=how["sampler"], spacing=how["spacing"], num_steps=how["steps"])  # type: ignore[arg-type]
        levels = levels_for(s, sampling)
        theirs = torch.tensor(
            [[level["t"], level["alpha"], level["sigma"]] for level in found["levels"]], dtype=torch.float64
        )
        torch.testing.assert_close(theirs, torch.tensor(levels, dtype=torch.float64), atol=1e-5, rtol=1e-5)
        first, last = (share * s.noise.timesteps - 1 for share in how["interval"])  # type: ignore[union-attr]
        label = how["label"]
        known = None if label is None else torch.tensor([label])
        weak = worse if known is None and how["model"] == "v" else None
        guide = Guidance(known, 3, how["guidance"], first, last, weak) if label is not None or weak else None  # type: ignore[arg-type]
        denoise = denoiser(network, s.target.objective, 0.0, guide)
        x = math.hypot(levels[0].alpha, levels[0].sigma) * item_noise((4, 4, 4), [0], 3, "start")
        wanted = SAMPLERS[sampling.sampler](
            denoise, levels, x, lambda step: item_noise((4, 4, 4), [0], 3, f"step {step}")
        )
        torch.testing.assert_close(torch.tensor(found["x"]), wanted.flatten(), atol=3e-4, rtol=3e-4, msg=str(how))
        assert found["steps"] == how["steps"]


def test_a_folder_without_the_runtime(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no ort\.wasm\.min\.mjs: give the folder of npm's onnxruntime-web"):
        runtime_files(tmp_path)


# --- in a browser ---------------------------------------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A static host that says nothing, and remembers what was asked for."""

    asked: list[str] = []  # noqa: RUF012

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Pipeline, Any]]:
    """A model with classes, of images that are not square, and its page in a browser that can reach nothing else."""
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason=f"{library} is not installed: nox -s hub runs these")
    if not CHROMIUM or not RUNTIME.is_dir():
        pytest.skip("needs chromium, and npm's onnxruntime-web, named by ONNXRUNTIME_WEB: nox -s hub runs these")
    sync_api = pytest.importorskip("playwright.sync_api")
    from lightdiff.extras.export.web import write_web

    model, folder = random_pipeline(width=12), tmp_path_factory.mktemp("page")
    write_web(model, folder, RUNTIME)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.set_default_timeout(120_000)
        tab.route("**/*", lambda route: route.continue_() if route.request.url.startswith(address) else route.abort())
        tab.goto(f"{address}/index.html?on=wasm")
        yield model, tab
        browser.close()
    server.shutdown()
    server.server_close()


def pixels(tab: Any, canvas: str) -> Tensor:
    """What is on a canvas, (3, h, w) of bytes."""
    script = """(c) => { const e = document.querySelector(c);
        return [e.height, e.width, Array.from(e.getContext("2d").getImageData(0, 0, e.width, e.height).data)]; }"""
    height, width, values = tab.evaluate(script, canvas)
    return torch.tensor(values).view(height, width, 4)[..., :3].permute(2, 0, 1)


def finish(tab: Any) -> None:
    tab.wait_for_function("['done', 'failed'].includes(document.body.dataset.state)")
    assert tab.evaluate("document.body.dataset.state") == "done", tab.inner_text("#status")


def largest(found: Tensor, model: Pipeline, z: Tensor) -> float:
    """The largest difference from the library's picture, in 255ths."""
    wanted = ((model.decode(z)[0] + 1) * 127.5).clamp(0, 255)
    return float((found - wanted).abs().max())


@pytest.mark.slow
@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")  # of torch.onnx, on itself
def test_the_first_picture_is_that_of_generate(page: tuple[Pipeline, Any]) -> None:
    model, tab = page
    finish(tab)
    plain = with_changes(default_sampling(model.settings), class_=())
    assert largest(pixels(tab, "#picture"), model, model.sample(1, 0, plain)) <= 2
    assert torch.equal(pixels(tab, "#picture"), pixels(tab, "#clean"))  # the last step's x0
    tab.fill("#seed", "5")
    tab.select_option("#class", label="dog")
    tab.fill("#guidance", "3")
    tab.fill("#steps", "6")
    tab.select_option("#sampler", "heun")
    tab.select_option("#spacing", "karras")
    tab.click("#draw")
    finish(tab)
    asked = SamplingSettings(class_=("dog",), guidance=3.0, num_steps=6, sampler="heun", spacing="karras")
    assert largest(pixels(tab, "#picture"), model, model.sample(1, 5, asked)) <= 2
    assert "ms a step, on wasm" in tab.inner_text("#status")
    tab.evaluate("e = document.getElementById('step'); e.value = 0; e.dispatchEvent(new Event('input'))")
    tab.wait_for_function("document.getElementById('level').textContent.startsWith('step 1:')")
    first = item_noise((4, 8, 12), [0], 5, "start")
    noisy = first * math.hypot(*levels_for(model.settings, asked)[0][1:])
    assert largest(pixels(tab, "#noisy"), model, model.scaling.to_z(noisy)) <= 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_walk_ends_at_both_seeds(page: tuple[Pipeline, Any]) -> None:
    model, tab = page
    finish(tab)
    tab.fill("#seed", "2")
    tab.fill("#to", "9")
    tab.select_option("#class", "")
    tab.fill("#guidance", "1")
    tab.fill("#steps", "3")
    tab.select_option("#sampler", "ddim")
    tab.select_option("#spacing", "trailing")
    tab.fill("#frames", "3")
    tab.click("#walking")
    finish(tab)
    plain = SamplingSettings(num_steps=3, sampler="ddim")
    for frame, seed in ((1, 2), (3, 9)):
        found = pixels(tab, f"#walk canvas:nth-child({frame})")
        assert largest(found, model, model.sample(1, seed, plain)) <= 2
    assert not torch.equal(pixels(tab, "#walk canvas:nth-child(2)"), pixels(tab, "#walk canvas:nth-child(1)"))
    tab.fill("#steps", "100000")
    tab.click("#draw")
    tab.wait_for_function("document.body.dataset.state == 'failed'")
    assert tab.inner_text("#status") == "between 1 and 1000 steps, please"
