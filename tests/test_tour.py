"""The tour: the code that it quotes is there, lines to type print what is shown, its numbers follow from formulas."""

import ast
import copy
import doctest
import importlib.util
import math
import os
import re
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import VAE_FLAGS, succeed
from oracles import normal
from PIL import Image
from test_docs import FENCE, PAGES, ROOT, each_page
from torch import Tensor, nn

from lightdiff.data.latents import LatentSet
from lightdiff.data.order import generator
from lightdiff.diffusion.schedules import Schedule, random_levels, sampling_levels
from lightdiff.losses import VAELoss, kl_per_element
from lightdiff.models.vae import Posterior
from lightdiff.options import build
from lightdiff.pictures import GAP
from lightdiff.run_folder import RunFolder
from lightdiff.runtime.stage import open_stage
from lightdiff.settings import LevelSettings, ScheduleSettings, TrainUNetSettings, VAELossSettings
from lightdiff.stages import train_unet
from lightdiff.stages.scale import bits_per_element
from lightdiff.training.loop import Trainer
from lightdiff.training.optimizers import learning_rate
from tests.bench.code_size import code_lines

TOUR = ROOT / "docs/tour"
FLOW = Schedule.of(ScheduleSettings(schedule="flow"))


def text_of(page: str) -> str:
    """A page, each white space as one blank."""
    return " ".join((ROOT / page).read_text(encoding="utf-8").split())


def blocks(page: Path, language: str) -> list[str]:
    return [code for _, _, name, code in FENCE.findall(page.read_text(encoding="utf-8")) if name.strip() == language]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOUR / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_figures() -> ModuleType:
    return script("make_figures")


# --- code -----------------------------------------------------------------------------------------------------------


def quoted(source: str, options: dict[str, str]) -> str:
    """What literalinclude shows of a file.

    Raises:
        LookupError: If the object is not there, or a line that it starts or ends at.
    """
    lines = source.splitlines()
    if name := options.get("pyobject"):
        node: ast.AST = ast.parse(source)
        for part in name.split("."):
            named = (n for n in ast.iter_child_nodes(node) if getattr(n, "name", "") == part)
            if (found := next(named, None)) is None:
                raise LookupError(f"there is no {name}")
            node = found
        assert isinstance(node, ast.ClassDef | ast.FunctionDef)
        lines = lines[node.lineno - 1 : node.end_lineno]
    for option in ("start-at", "end-at"):
        if wanted := options.get(option, "").strip('"'):
            at = next((i for i, line in enumerate(lines) if wanted in line), None)
            if at is None:
                raise LookupError(f"no line has {wanted}")
            lines = lines[at:] if option == "start-at" else lines[: at + 1]
    return "\n".join(lines)


@each_page
def test_quoted_code_is_there(page: Path) -> None:
    for _, _, language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if match := re.match(r"\{literalinclude\} (\S+)", language):
            options = dict(re.findall(r"^:([\w-]+): *(.*)$", block, re.MULTILINE))
            assert quoted((page.parent / match[1]).read_text(encoding="utf-8"), options)


def test_a_quotation_that_is_gone_is_noticed() -> None:
    source = "class A:\n    def f(self):\n        x = 1\n        return x\n"
    assert quoted(source, {"pyobject": "A.f", "start-at": '"x ="', "end-at": '"x ="'}) == "        x = 1"
    for options in ({"pyobject": "A.g"}, {"start-at": '"y ="'}, {"pyobject": "A.f", "end-at": '"class"'}):
        with pytest.raises(LookupError):
            quoted(source, options)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "pycon")], ids=lambda page: page.name)
def test_lines_to_type_print_what_they_should(page: Path) -> None:
    lines = doctest.DocTestParser().get_doctest("\n".join(blocks(page, "pycon")), {}, page.name, str(page), 0)
    said: list[str] = []
    assert lines.examples
    assert doctest.DocTestRunner().run(lines, out=said.append).failed == 0, "".join(said)


def test_the_short_training_step_is_the_real_one(tmp_path: Path, faces: Path) -> None:
    """Same weights, same averages, after a step with the same latents, levels, noise and learning rate."""
    run = tmp_path / "run"
    for words in (["train-vae", "--data", faces, *VAE_FLAGS], ["encode", "--workers", 0, "--device", "cpu"], ["scale"]):
        succeed(words[0], "--run", run, *words[1:])
    loop = {"batch_size": 6, "steps": 4, "optimizer": "adamw", "precision": "fp32", "device": "cpu"}
    layers = [train_unet.inherited(run, None), {"run": run, "loop": loop, "model": {"width": 16, "time_dim": 32}}]
    settings = build(TrainUNetSettings, layers)
    with open_stage(settings, "unet") as stage:
        task = train_unet.UNetTask(stage, LatentSet(run / "latents"))
        assert stage.start_or_resume(task, {})
        trainer = Trainer(task, stage)
        assert trainer.emas
        unet, loop = copy.deepcopy(task.model), trainer.loop
        batch = next(task.batches(0, 1))
        drawn = task.prepare(batch, generator(stage.device, loop.seed, "unet", "noise", 0))
        trainer.train_step(batch)
    adamw = {"lr": learning_rate(loop, 0, stage.total_steps), "betas": (0.9, loop.beta2)}
    names = {
        "unet": unet,
        "ema": copy.deepcopy(unet),
        "decay": trainer.emas[0].decay_at(1),
        "optimizer": torch.optim.AdamW(unet.parameters(), **adamw, weight_decay=loop.weight_decay),
        "x_t": task.schedule.q_sample(drawn["x0"], drawn["eps"], drawn["t"]),
        "torch": torch,
        **drawn,
    }
    before = [p.clone() for p in unet.parameters()]
    (step,) = blocks(TOUR / "3-unet.md", "python")
    exec(step, names)

    def compare(a: nn.Module, b: nn.Module) -> None:
        for mine, theirs in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs)

    compare(unet, trainer.model)
    compare(names["ema"], trainer.emas[0].model)  # type: ignore[arg-type]
    assert any(not torch.equal(p, q) for p, q in zip(before, unet.parameters(), strict=True))


def test_the_mean_of_all_latents_is_drawn(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "runs/demo")
    (lines,) = blocks(TOUR / "4-sampling.md", "python")
    exec(lines, {})
    assert Path("mean.png").is_file()


def test_the_evening_has_as_many_lines_as_the_readme_says() -> None:
    order = (TOUR / "index.md").read_text(encoding="utf-8").split("A good order", 1)[1].split("Then")[0]
    files = re.findall(r"\]\((\S+\.py)\)", order)
    lines = sum(code_lines((TOUR / file).read_text(encoding="utf-8")) for file in files)
    assert len(set(files)) == 11
    assert lines == pytest.approx(1100, rel=0.1)
    for page in ("README.md", "docs/tour/index.md"):
        assert "eleven files with about 1,100 lines of code" in text_of(page)


# --- figures --------------------------------------------------------------------------------------------------------


def test_diagrams_are_those_of_the_networks() -> None:
    for name, content in make_figures().diagrams().items():
        assert (ROOT / "docs/images" / name).read_text(encoding="utf-8") == content, "run docs/tour/make_figures.py"


def test_tables_are_those_of_the_networks() -> None:
    module = make_figures()
    vae, unet = module.networks()
    found = module.tables(vae, unet)
    for page, which, network in (("1-vae.md", "vae", vae), ("3-unet.md", "unet", unet)):
        rows = found[which]
        assert sum(row.parameters for row in rows) == sum(p.numel() for p in network.parameters())
        text = (TOUR / page).read_text(encoding="utf-8")
        for row in rows:
            assert f"| {row.name} | {row.parameters:,} | {row.products / 1e6:,.1f} M |" in text


def test_multiply_adds_are_those_of_a_convolution_by_hand() -> None:
    module = make_figures()
    first = module.tables(*module.networks())["vae"][0]  # the stem, a residual block at 32 channels; 64 x 64
    assert first.products == 64 * 64 * 9 * (3 * 32 + 2 * 32 * 32)


def test_a_face_in_noise_is_drawn(trained: Path, tmp_path: Path) -> None:
    module = make_figures()
    module.draw_noised(trained, tmp_path / "noised.png")
    with Image.open(tmp_path / "noised.png") as picture:
        side, sheet = picture.height, np.asarray(picture).astype(float)
    _, first, *others = (sheet[:, at : at + side] for at in range(0, sheet.shape[1], side + GAP))
    away = [float(np.square(other - first).mean()) for other in others]
    assert len(away) == len(module.SIGMAS) - 1
    assert away == sorted(away)


def test_figures_of_a_run_are_drawn(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    module, run = script("run_figures"), RunFolder(trained)
    module.draw_channels(run, tmp_path / "channels.png")
    module.draw_betas([trained, trained], tmp_path / "betas.png")
    module.draw_histograms(run, tmp_path / "histograms.svg")
    module.draw_bands(run, tmp_path / "bands.svg")
    for name, columns in (("channels", 6), ("betas", 6)):  # an image, four channels, decoded; six latents
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width > columns * 64
    texts = [(tmp_path / f"{name}.svg").read_text(encoding="utf-8") for name in ("histograms", "bands")]
    assert "channel 3" in texts[0]
    assert "band 4" in texts[1]


def test_the_flow_in_two_dimensions_moves_noise_to_the_arcs() -> None:
    """After a short training: nearer to the data than noise is, along paths that bend, unlike those of training."""
    module = script("toy_flow")
    network = module.train(steps=150, batch=256)
    rng = torch.Generator().manual_seed(1)
    data, noise = module.two_arcs(500, rng).flatten(1), torch.randn(200, 2, 1, 1, generator=rng)
    assert data.mean(0).abs().max() < 0.15
    assert 0.8 < data.std() < 1.2
    moved = module.paths(network, noise, steps=20)
    assert moved.shape == (21, 200, 2)
    torch.testing.assert_close(moved[0], noise.flatten(1))
    far, near = (torch.cdist(some, data).amin(1).median() for some in (moved[0], moved[-1]))
    assert near < 0.7 * far
    length = (moved[1:] - moved[:-1]).norm(dim=2).sum(0)
    assert (length / (moved[-1] - moved[0]).norm(dim=1)).median() > 1.02


# --- numbers --------------------------------------------------------------------------------------------------------


def test_what_you_should_see_is_what_a_demo_shows() -> None:
    """Each claim is still in its page; where there is a demo's run, its numbers are those that the page says."""
    module = script("check_claims")
    assert all(module.said(claim) for claim in module.CLAIMS)
    run = RunFolder(Path(os.environ.get("LIGHTDIFF_DEMO", ROOT / "runs/demo")))
    if not run.unet.last.is_file():
        pytest.skip("needs the run of lightdiff demo, in runs/demo or where LIGHTDIFF_DEMO says")
    assert module.wrong(run) == []


def test_beta_in_both_conventions() -> None:
    """P times the loss is the sum over pixels plus beta P / D times the sum over latents; see the how-to's table."""
    how_to, sizes = text_of("docs/how-to/choose-beta-and-lpips.md"), ((64, 16), (256, 32))
    for side, latent in sizes:
        x, x_hat = normal(1, 3, side, side, seed=1).tanh(), normal(1, 3, side, side, seed=2).tanh()
        p = Posterior(normal(1, 4, latent, latent, seed=3), normal(1, 4, latent, latent, seed=4))
        for beta in (1e-3, 3e-3):
            summed = beta * x.numel() / p.mu.numel()
            loss = VAELoss(VAELossSettings(kl_beta=beta, lpips_gamma=0))(x, x_hat, p)["loss"]
            whole = (x - x_hat).square().sum() + summed * kl_per_element(p).sum()
            torch.testing.assert_close(loss * x.numel(), whole)
            assert f"{summed:.3f} |" in how_to
    assert "3 x 256 x 256" in (VAELoss.__call__.__doc__ or "")
    assert f"{1e-3 * 3 * 256**2 / (4 * 32**2):.3f}." in (VAELoss.__call__.__doc__ or "")


def rows_of_scale() -> list[list[float]]:
    """The table of page 2: mean, std, sigma and bits of each channel."""
    found = re.findall(r"^\| \d \|(.*)\|$", (TOUR / "2-latents.md").read_text(encoding="utf-8"), re.MULTILINE)
    return [[float(cell.replace("bits", "")) for cell in row.split("|")] for row in found]


def test_the_table_of_scale_agrees_with_itself() -> None:
    rows = rows_of_scale()
    assert len(rows) == 4
    for mean, std, sigma, bits, shift, scale in rows:
        assert bits_per_element(std**2, sigma**2) == pytest.approx(bits, abs=0.01)
        assert shift == mean
        assert scale == pytest.approx(1 / std, abs=1e-4)
    formula = r"$\frac12 \log_2(1 + \text{std}^2 / \sigma^2)$"
    for page in ("docs/tour/2-latents.md", "docs/how-to/choose-beta-and-lpips.md"):
        assert formula in text_of(page)


def test_where_noise_is_as_strong_as_latents_of_a_wrong_scale() -> None:
    page, rows = text_of("docs/tour/2-latents.md"), rows_of_scale()
    mean = sum(row[0] for row in rows) / 4
    std = math.sqrt(sum(row[0] ** 2 + row[1] ** 2 for row in rows) / 4 - mean**2)
    assert f"computed, here {1 / std:.2f}." in page
    levels = random_levels((torch.arange(100_000) + 0.5) / 100_000, LevelSettings(stratified=False), 1000)
    equal, noisier = [], []
    for factor in (0.1, 1 / std, 10):
        hidden = FLOW.sigma >= FLOW.alpha * factor * std
        equal.append(FLOW.sigma[hidden].min().item())
        noisier.append(100 * hidden[levels].double().mean().item())
    assert "$\\sigma_t$ = {:.2f} in the first row, {:.2f} in the second and {:.2f} in the third".format(*equal) in page
    said = re.search(r"So ([\d.]+) % of .*?, ([\d.]+) % of the second's, and ([\d.]+) % of the third's", page)
    assert said is not None
    assert [float(share) for share in said.groups()] == pytest.approx(noisier, rel=0.05)
    third = sampling_levels(FLOW, 20)
    assert sum(level.sigma >= level.alpha * 10 * std for level in third) == 3
    assert "first three of its twenty steps" in page


def test_the_exercises_of_the_vae_and_the_latents() -> None:
    zero = torch.zeros(1, 1, 1, 1)
    wide, narrow = (kl_per_element(Posterior(zero, zero + 2 * math.log(sigma))).item() for sigma in (0.02, 0.01))
    assert f"{narrow - wide:.2f}$ nats" in text_of("docs/tour/1-vae.md")
    assert f"{3e-3 * math.log(2):.4f}" in text_of("docs/tour/1-vae.md")
    nats = [0.5 * (mean**2 + std**2 + sigma**2 - 1 - math.log(sigma**2)) for mean, std, sigma, *_ in rows_of_scale()]
    listed = [f"{value:.2f}" for value in nats]
    page = text_of("docs/tour/2-latents.md")
    assert f"{', '.join(listed[:3])} and {listed[3]} nats, {sum(nats) / 4:.2f} on average" in page
    assert f"{sum(nats) / 4 / math.log(2):.2f} bits" in page
    assert f"{sum(row[3] for row in rows_of_scale()) / 4:.2f} bits" in page


def best_loss(alpha: Tensor, sigma: Tensor, a: float = -1, b: float = 1) -> Tensor:
    """What a linear least-squares fit of a x0 + b eps to x_t leaves, on a million standard normal pairs."""
    x0, eps = normal(2, 1_100_000, seed=0)
    losses = []
    for signal, noise in zip(alpha, sigma, strict=True):
        x_t, target = signal * x0 + noise * eps, a * x0 + b * eps
        losses.append((target - (x_t @ target) / (x_t @ x_t) * x_t).square().mean())
    return torch.stack(losses)


def test_little_noise_hides_the_noise_and_much_noise_the_latent() -> None:
    levels = torch.arange(99, 1000, 200)
    of_x0, of_eps = (best_loss(FLOW.alpha[levels], FLOW.sigma[levels], *target).tolist() for target in ((1, 0), (0, 1)))
    assert of_x0 == sorted(of_x0)
    assert of_eps == sorted(of_eps, reverse=True)
    assert of_x0[0] < 0.02
    assert of_eps[0] > 0.98


def test_the_exercise_of_the_unet() -> None:
    levels = torch.arange(124, 1000, 250)
    alpha, sigma = FLOW.alpha[levels], FLOW.sigma[levels]
    torch.testing.assert_close(best_loss(alpha, sigma).double(), 1 / (alpha**2 + sigma**2), rtol=0, atol=0.02)
    bands = (1 / (FLOW.alpha**2 + FLOW.sigma**2)).view(4, 250).mean(1).tolist()
    assert "{:.1f}, {:.1f}, {:.1f} and {:.1f}".format(*bands) in text_of("docs/tour/3-unet.md")


def test_how_often_levels_are_drawn() -> None:
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    t = random_levels(u, LevelSettings(stratified=False), 1000)
    assert f"{100 * ((t >= 250) & (t < 750)).double().mean().item():.0f} % lie between" in text_of(
        "docs/tour/3-unet.md"
    )
    assert f"{100 * (t >= 900).double().mean().item():.1f} % of those drawn" in text_of("docs/tour/4-sampling.md")


def test_the_std_of_noised_latents() -> None:
    x_t = FLOW.q_sample(normal(1, 4, 100, 100, seed=1), normal(1, 4, 100, 100, seed=2), torch.tensor([499]))
    assert x_t.std().item() == pytest.approx(math.sqrt(0.5), rel=0.02)  # four standard errors
    assert (FLOW.alpha**2 + FLOW.sigma**2).sqrt().min().item() == pytest.approx(math.sqrt(0.5))
    assert "between 0.71 (at" in text_of("docs/notation.md")


def test_pages_say_what_lpips_downloads() -> None:
    defaults = VAELossSettings()
    assert (defaults.lpips_gamma, defaults.lpips_net) == (0.1, "vgg")
    for page in ("README.md", "docs/index.md"):
        after = text_of(page).split("lightdiff train-vae", 1)[1][:1200]
        assert all(words in after for words in ("528 MB", "`--lpips-weights FILE`", "`--lpips-gamma 0`"))
