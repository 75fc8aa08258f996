"""The report page: what it holds, what it shows where something is missing, and how it behaves in a browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import UNET_FLAGS, call, succeed
from PIL import Image

from lightdiff.checkpoint import Checkpoint, Metadata
from lightdiff.data.files import list_images
from lightdiff.data.images import to_float
from lightdiff.data.index import read_index
from lightdiff.data.latents import LatentSet
from lightdiff.extras import report
from lightdiff.extras.evidence import held_out, load_images, seconds_an_image
from lightdiff.extras.report import measure
from lightdiff.extras.report.collect import Curve, RunFacts, Training, read_curves, read_grids, thin_out
from lightdiff.extras.report.measure import Reconstructions, encode_picture, loss_spread, reconstructions, samples
from lightdiff.extras.report.numbers import (
    BY_LEVEL,
    BY_MEAN,
    BY_VAE,
    PSNR,
    cards,
    differences,
    metrics_table,
    numbers_of,
)
from lightdiff.extras.report.page import HERE
from lightdiff.extras.settings_rows import Row
from lightdiff.losses import psnr
from lightdiff.pictures import save_grid
from lightdiff.pipeline import Pipeline
from lightdiff.run_folder import RunFolder, StageFolder
from lightdiff.runtime.progress import console
from lightdiff.settings import ImageSettings

STYLE = (HERE / "page.css").read_text()
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self._inside = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, text):
        if self._inside not in ("script", "style"):
            self.words += text + " "

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def data(self) -> dict:
        return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', self.source)[1])


@pytest.fixture(scope="module")
def two_runs(trained, tmp_path_factory):
    """The run of all stages, and one whose U-Net went on from it with another learning rate and more pictures."""
    other = Path(shutil.copytree(trained, tmp_path_factory.mktemp("report") / "other"))
    flags = [*UNET_FLAGS]
    flags[flags.index("--steps") + 1] = 8
    succeed("train-unet", "--run", other, *flags, "--lr", 0.0005, "--val-every", 2)
    return trained, other


@pytest.fixture(scope="module")
def page(two_runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "one.html"
    assert succeed("report", two_runs[1], "--out", out).stdout.strip() == str(out)
    return Page(out)


@pytest.fixture(scope="module")
def comparison(two_runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "two.html"
    succeed("report", *two_runs, "--out", out)
    return Page(out)


# --- what is collected ----------------------------------------------------------------------------------------------


def test_curves_come_from_whole_lines(tmp_path):
    folder = StageFolder(tmp_path)
    assert read_curves(folder) == {}
    folder.metrics.write_text('{"step": 1, "loss": 4}\n{"step": 2, "loss": NaN, "val_loss": 5}\n{"step": 3, "lo')
    assert read_curves(folder) == {"loss": Curve([1], [4]), "val_loss": Curve([2], [5])}


def test_curves_know_the_minutes_of_training_without_pauses(tmp_path):
    """A line a minute, and a night between two of them, which counts as at most twenty lines."""
    times = [0, 60, 120, 180, 180 + 36_000, 240 + 36_000]
    folder = StageFolder(tmp_path)
    rows = [json.dumps({"step": step, "loss": 1.0, "time": 1e9 + time}) for step, time in enumerate(times)]
    folder.metrics.write_text("\n".join(rows))
    assert read_curves(folder)["loss"].minutes == [0, 1, 2, 3, 23, 24]
    folder.metrics.write_text('{"step": 1, "loss": 1, "time": -1e308}\n{"step": 2, "loss": 1, "time": 1e308}')
    assert read_curves(folder)["loss"].minutes == []
    folder.metrics.write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 1, "time": 1}')
    assert read_curves(folder)["loss"].minutes == []


def test_long_curves_are_thinned_to_means():
    thin = thin_out(Curve(list(range(1, 3001)), [float(v) for v in range(1, 3001)]))
    assert len(thin.steps) == 1500
    assert thin.steps[0] == 2
    assert thin.steps[-1] == 3000
    assert thin.values[0] == 1.5
    assert sum(thin.values) / 1500 == pytest.approx(1500.5)  # the mean stays


def test_of_many_grids_the_first_and_the_last_are_kept(tmp_path):
    folder = StageFolder(tmp_path)
    for step in range(1, 101):
        save_grid(folder.images / f"step-{step:08d}.png", torch.zeros(1, 3, 2, 2), 1) if step > 1 else None
        folder.images.mkdir(exist_ok=True)
    shown = [step for step, _ in read_grids(folder, "vae")]
    assert len(shown) == len(set(shown)) == 24
    assert shown[0] == 2
    assert shown[-1] == 100


# --- the page -------------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_from_elsewhere(page):
    for tag, attributes in page.elements:
        for name in ("src", "href"):
            where = attributes.get(name) or "data:"
            assert where.startswith(("data:", "#")), (tag, where)
    (policy,) = [meta for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy["content"]
    assert len(page.source) < 15e6


def test_pictures_have_a_text_alternative(page):
    pictures = [picture for picture in page.all("img") if picture["src"] != "data:,"]  # the one that shows others
    assert len(pictures) >= 5  # reconstructions twice, samples through time, trajectory, samples, neighbours
    assert all(len(picture["alt"]) > 10 for picture in pictures)


def test_settings_that_differ_from_the_defaults_come_first(page):
    shown, rest = page.source.split("settings at their defaults", 1)
    assert "--lpips-gamma" in shown
    assert "--reconstruction" in rest.split("</details>")[0]
    assert "--nproc-per-node" not in page.source  # how it was started is no property of the model


def test_every_curve_of_the_metrics_is_drawn(page, two_runs):
    rows = [json.loads(line) for line in (two_runs[1] / "unet/metrics.jsonl").read_text().splitlines()]
    (chart,) = [c for c in page.data["charts"] if "noise band" in c["title"]]
    validated = [row for row in rows if "val_loss" in row]
    assert [s["name"] for s in chart["series"]] == ["band 1", "band 2", "band 3", "band 4"]
    assert chart["series"][2]["x"] == [row["step"] for row in validated]
    assert chart["series"][2]["y"] == [row["val_loss_band_3"] for row in validated]


def test_the_latents_statistics_are_shown(page, two_runs):
    index = read_index(two_runs[1] / "latents")
    assert f"Over {index.of_split('train').sum()} training images" in page.words
    assert ", ".join(f"{v:.3f}" for v in index.statistics.scale) in page.words


def test_histograms_are_densities(page):
    (chart,) = [c for c in page.data["charts"] if "density" in c["title"]]
    for series in chart["series"]:
        assert sum(series["y"]) * 0.2 == pytest.approx(1, abs=0.05), series["name"]


def test_samples_are_of_a_fixed_seed_whatever_was_drawn_last(run):
    """And the page says how they were drawn."""
    before = samples(Pipeline.load(run, device="cpu"))
    source = next((run / "samples").glob("*/00000.png"))
    succeed("edit", "--run", run, "--from", source, "--strength", 0.5, "--num-images", 1, "--device", "cpu")
    succeed("report", run)
    text = (run / "report.html").read_text()
    assert before.src in text
    assert "16 samples of seed 0: dpm++2m, 20 steps, guidance 1" in text


def test_the_trajectory_has_a_frame_for_each_call(page):
    (slider,) = [s for s in page.data["sliders"] if s["unit"] == "call"]
    assert len({frame["src"] for frame in slider["columns"][0]["frames"]}) == slider["last"] + 1 == 20


def test_a_comparison_shows_what_differs_and_what_is_better(comparison, two_runs):
    start = comparison.words.index("Settings that differ")
    differing = comparison.words[start : comparison.words.index("Numbers", start)].split()
    assert {"lr", "steps", "0.0005"} <= set(differing)
    assert "kl-beta" not in differing
    losses = []
    for run in two_runs:
        rows = [json.loads(line) for line in (run / "unet/metrics.jsonl").read_text().splitlines()]
        losses.append([row["val_loss_band_2"] for row in rows if "val_loss_band_2" in row][-1])
    row, few = (
        re.search(rf"U-Net: {name}</th>(.*?)</tr>", comparison.source, re.S)[1]
        for name in ("loss in band 2", "validation loss")
    )
    cells = re.findall(r"<td.*?</td>", row, re.S)
    assert ["better" in cell for cell in cells] == [loss == min(losses) for loss in losses]
    assert "better" not in few
    assert few.count("images are held out; 10 are needed to tell") == 2


def test_losses_with_different_definitions_are_not_ranked():
    def run(objective, loss, latents="a"):
        settings = {"target": {"objective": objective}, "noise": {}, "latent": {}}
        metadata = Metadata(
            stage="unet",
            settings=settings,
            lineage={"latents": latents},
            metrics={"val_loss": loss, "val_loss_band_4": loss},
        )
        return RunFacts(Path("run"), unet=Training(metadata, 1, [], {}, []))

    def ranked(*runs):
        return [row["best"] for row in metrics_table(runs)]

    assert ranked(run("flow", 0.5), run("flow", 0.4)) == [[1], [1]]
    assert ranked(run("flow", 0.5), run("eps", 0.4)) == [[], []]
    assert ranked(run("flow", 0.5), run("flow", 0.4, latents="b")) == [[], []]


def test_a_trainings_time_counts_validations_and_no_pause():
    """Lines 5 s apart, 25 s after a validation, and an hour between two starts."""
    seconds = {40: 25, 60: 3605, 80: 25}
    rows, now = [], 1e9
    for images in range(10, 101, 10):
        rows.append({"step": images // 10, "images_seen": images, "time": now, "images_per_s": 4.0})
        rows[-1] |= {"val_loss": 1.0} if images in (40, 80) else {}
        now += seconds.get(images, 5)
    assert seconds_an_image(rows) == pytest.approx((7 * 5 + 2 * 25) / 90)
    assert seconds_an_image(rows[:1]) == 0.25
    assert seconds_an_image([]) == 0
    assert seconds_an_image([rows[0] | {"time": -1e308}, rows[1] | {"time": 1e308}]) == 0
    assert seconds_an_image([{"step": 1, "images_per_s": 0.0}]) == 0


def test_losses_stand_beside_what_the_noise_level_alone_tells():
    settings = {"target": {"objective": "flow"}, "noise": {"schedule": "flow"}}
    metadata = Metadata(stage="unet", settings=settings, metrics={"val_loss": 0.6, "val_loss_band_1": 1.413})
    vae = Metadata(stage="vae", metrics={"val_loss": 0.6})
    run = RunFacts(Path("run"), vae=Training(vae, 1, [], {}, []), unet=Training(metadata, 1, [], {}, []))
    numbers = [row["values"][0] for row in metrics_table([run])]
    assert [str(number) for number in numbers] == ["0.6", "0.6", "1.413"]
    assert [number.scale for number in numbers] == ["", f"1.571 {BY_LEVEL}", f"1.288 {BY_LEVEL}"]


def test_numbers_have_errors_and_the_floor_of_the_vae():
    """A mean over n images has 1/sqrt(n) of the spread of one; of few images, distances say nothing."""
    metadata = Metadata(stage="vae", metrics={"val_psnr": 27.0})
    few = "a Frechet distance of 9 images and 768 features says nothing; 7,680 are enough"
    evaluation = {
        "vae": {"rFID": 2.5},
        "unet": {"FID": 9.0, "FID +-": 0.5, "KID": 0.0123, "KID +-": 0.00045, "caution": few},
    }
    picture = encode_picture(Image.new("RGB", (1, 1)), "one")
    quality = Reconstructions(picture, None, [26.0, 27.0, 28.0], 12.0)
    index = SimpleNamespace(positions=lambda split: range(100), statistics=None)
    run = RunFacts(
        Path("run"), Training(metadata, 1, [], {}, []), index=index, evaluation=evaluation, reconstructions=quality
    )
    found = numbers_of(run)
    assert (str(found[PSNR]), found[PSNR].scale) == ("27.00 ± 0.10", f"12 {BY_MEAN}")
    fid, kid = (found[f"U-Net, evaluated: {name}"] for name in ("FID", "KID"))
    assert (str(fid), fid.scale, str(kid)) == ("-", few, "0.01230 ± 0.00045")
    assert cards(run)[2].title == "Samples, KID"
    evaluation["unet"].pop("caution")
    fid = numbers_of(run)["U-Net, evaluated: FID"]
    assert (str(fid), fid.scale) == ("9.00 ± 0.50", f"2.5 {BY_VAE}")
    assert [card.value for card in cards(run)] == ["27.00 ± 0.10 dB", "-", "9.00 ± 0.50", "-"]


def test_means_over_few_held_out_images_are_refused():
    metadata = Metadata(stage="vae", metrics={"val_psnr": 27.0})
    for count, shown in ((9, "-"), (10, "27 dB")):
        index = SimpleNamespace(positions=lambda split, count=count: range(count), statistics=None)
        card = cards(RunFacts(Path("run"), Training(metadata, 1, [], {}, []), index=index))[0]
        assert card.value == shown
    assert "mean of 10 held-out images" in card.scale


def test_the_worst_reconstructions_are_those_of_least_psnr(run):
    found = reconstructions(RunFolder(run).vae, torch.device("cpu"))
    assert found.worst is None  # five are held out, and all are shown
    with patch.object(measure, "SHOWN", 2):
        found = reconstructions(RunFolder(run).vae, torch.device("cpu"))
    worst = ", ".join(f"{value:.1f}" for value in sorted(found.psnr)[:2])
    assert f"PSNR {worst} dB" in found.worst.alt
    images = Checkpoint(run / "vae/checkpoints/best.safetensors", "vae").settings(ImageSettings, "images")
    x = torch.stack(load_images(held_out(list_images(images, console)), images))
    mean = to_float(x).mean(0, keepdim=True)
    assert found.baseline == pytest.approx(float(psnr(to_float(x), mean.expand(len(x), -1, -1, -1)).mean()), abs=1e-4)


def test_the_spread_of_the_losses_of_images(run):
    """A network that returns 0, asked for -x0 as there is no noise: an image's loss is the mean of its x0^2."""
    pipeline, latents = Pipeline.load(run, device="cpu"), LatentSet(run / "latents")
    pipeline.unet = lambda x_t, t: torch.zeros_like(x_t)
    with patch.object(measure, "item_noise", lambda shape, items, seed, purpose: torch.zeros(len(items), *shape)):
        found = loss_spread(pipeline, run / "latents")
    x0 = pipeline.scaling.to_x0(latents.gather(latents.val)[0])
    assert found == pytest.approx(float(x0.square().mean((1, 2, 3)).std()))


def test_settings_of_a_stage_that_only_one_run_has_do_not_differ():
    def run(*values):
        rows = [Row("lr", value, "1") for value in values]
        return RunFacts(
            Path("run"), vae=Training(Metadata(stage="vae", settings={}), 1, rows, {}, []) if rows else None
        )

    assert differences([run("1"), run()]) == []
    assert [row["values"] for row in differences([run("1"), run(), run("2")])] == [["1", "-", "2"]]


def test_being_nearer_to_training_images_is_no_merit():
    near, far = (
        RunFacts(Path("run"), evaluation={"unet": {"FID": v, "distance to the nearest": v}}) for v in (1.0, 9.0)
    )
    assert [row["best"] for row in metrics_table([near, far])] == [[0], []]


def test_a_comparison_names_its_runs(two_runs, tmp_path, comparison):
    assert f"{two_runs[0].name} and other" in comparison.words
    twin = Path(shutil.copytree(two_runs[0] / "vae", tmp_path / two_runs[0].name / "vae")).parent
    succeed("report", two_runs[0], twin, "--out", tmp_path / "twins.html")
    assert f"{twin.name} (1) and {twin.name} (2)" in Page(tmp_path / "twins.html").words


# --- what is missing ------------------------------------------------------------------------------------------------


def test_a_run_whose_images_are_gone_still_has_a_report(run, tmp_path):
    path = run / "vae/settings.json"
    shutil.rmtree(run / "latents")
    shutil.rmtree(run / "unet")
    assert path.is_file()
    data = Path(Checkpoint(run / "vae/checkpoints/best.safetensors").metadata.settings["images"]["data"][0])
    moved = data.with_name("elsewhere")
    data.rename(moved)
    try:
        succeed("report", run)
    finally:
        moved.rename(data)
    words = Page(run / "report.html").words
    assert f"the images are no longer where they were: {data}" in words
    assert "The worst reconstructions" not in words


@pytest.mark.parametrize("stage", ["vae", "unet"])
def test_a_training_that_has_not_saved_yet_is_shown(run, cli, stage):
    """From its settings and metrics, also if there is nothing else, and also before the first line of metrics."""
    shutil.rmtree(run / stage / "checkpoints")
    shown = cli("show", run)
    assert shown.code == 0
    assert f"stage {stage}, not saved yet (of settings and metrics) step 3 (18 images seen) val_loss" in shown.out
    assert "--batch-size" in shown.out
    for other in {"vae", "unet", "latents"} - {stage}:
        shutil.rmtree(run / other)
    assert "step 3 (18 images seen)" in cli("show", run / stage).out
    page = Page(report.report([run], run / "page.html"))
    assert "Not saved yet; step 3" in " ".join(page.words.split())
    assert page.data["charts"]
    (run / stage / "metrics.jsonl").unlink()
    assert "step 0 (0 images seen)" in cli("show", run).out
    for text in ("{", "[]", '{"loop": 1}'):
        (run / stage / "settings.json").write_text(text)
        refused = cli("show", run)
        assert refused.code in (1, 2)
        assert "settings.json" in refused.err
        assert "should not happen" not in refused.err


def test_a_damaged_part_is_named_and_the_rest_shown(run):
    shard = run / "latents/shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    succeed("report", run)
    words = Page(run / "report.html").words
    assert "shard-00000" in words
    assert "U-Net: noise to latents" in words


def test_an_error_in_a_part_does_not_end_the_report(run):
    (folder := run / "vae/images").mkdir(exist_ok=True)
    grid = folder / "step-00000001.png"
    grid.write_bytes(b"no picture")
    evaluation = run / "evaluation" / "metrics.json"
    evaluation.parent.mkdir()
    evaluation.write_text('{"unet": 3, "vae": {"network": "gone", "rFID": 1.0}}')

    with patch.object(Pipeline, "load", side_effect=torch.OutOfMemoryError("no memory is left")):
        succeed("report", run)
    words = Page(run / "report.html").words
    assert "no memory is left" in words
    assert f"{grid.name} is no whole picture: remove it" in words
    assert "belong to other networks than these" in words
    assert "rFID" not in words


def test_pictures_too_large_for_webp_are_shown_all_the_same():
    assert encode_picture(Image.new("RGB", (2, 16_384)), "tall").src.startswith("data:image/png;base64,")
    assert encode_picture(Image.new("RGB", (2, 16_383)), "less tall").src.startswith("data:image/webp;base64,")


@pytest.mark.parametrize("make", ["nothing", "empty"])
def test_a_folder_without_a_run_is_refused(make, tmp_path):
    if make == "empty":
        (tmp_path / "run").mkdir()
    result = call("report", tmp_path / "run")
    assert result.code == 2
    assert str(tmp_path / "run") in result.stderr


def test_what_is_no_report_is_not_overwritten(trained, tmp_path):
    (tmp_path / "thesis.html").write_text("years of work")
    result = call("report", trained, "--out", tmp_path / "thesis.html")
    assert result.code == 2
    assert (tmp_path / "thesis.html").read_text() == "years of work"


# --- in a browser ---------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Of #rrggbb (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_and_lines_stand_out_from_the_paper(scheme):
    block = re.findall(r":root \{(.*?)\}", STYLE, re.S)[scheme]
    colours = dict(re.findall(r"--([\w-]+): (#\w{6});", block))
    lines = [colour for name, colour in colours.items() if name.startswith("colour-")]
    assert len(lines) == 6

    def contrast(a: str, b: str) -> float:
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for name in ("ink", "quiet", "accent"):
        assert contrast(colours[name], colours["paper"]) >= 4.5, name
        assert contrast(colours[name], colours["card"]) >= 4.5, name
    for name in ("ink", "quiet", "warn"):
        assert contrast(colours[name], colours["warn-paper"]) >= 4.5, name
    for colour in lines:
        assert contrast(colour, colours["paper"]) >= 3, colour


def check_choices(view, charts):
    """Smoothing, axes, what is pointed at, and pictures in large."""
    loss = next(c for c in charts if c["title"] == "U-Net: Loss")
    other = next(c for c in charts if c["title"] == "U-Net: Gradient norm")
    home, beside = (view.locator(f"#{c['id']}") for c in (loss, other))

    def state():
        return home.locator(".plot").inner_html()

    plain = state()
    home.locator(".log").click()
    assert state() != plain
    home.locator(".log").click()
    assert state() == plain
    view.locator("[name=axis]").first.select_option("time")
    assert home.locator(".axis").inner_text() == "minutes"
    view.locator("[name=axis]").first.select_option("step")
    first = loss["series"][0]
    home.locator("svg").first.focus()
    for _ in range(60):
        view.keyboard.press("ArrowLeft")
    for place in (home, beside):
        assert place.locator(".where").inner_text() == f"at {first['x'][0]}"
        assert place.locator(".cursor").get_attribute("visibility") == "visible"
    assert f"{first['y'][0]:.4g}" in home.locator(".legend").inner_text()
    home.locator(".large").click()
    assert home.locator("svg").first.bounding_box()["width"] > 300
    assert not view.locator("#large").is_visible()
    view.locator(".picture").first.click()
    assert view.locator("#large").is_visible()
    view.keyboard.press("Escape")
    assert not view.locator("#large").is_visible()


def check_sorting(view):
    """By a setting, upwards and then downwards."""
    rows = view.locator(".sortable tbody tr")
    column = view.locator(".sortable thead th").all_inner_texts().index("U-Net: lr")
    seen = []
    for _ in range(2):
        view.locator(".sortable thead button").nth(column).click()
        values = [rows.nth(i).locator("th, td").nth(column).inner_text() for i in range(rows.count())]
        seen.append([float(value) for value in values])
    assert seen[0] == sorted(seen[0])
    assert seen[1] == seen[0][::-1] != seen[0]


def test_smoothing_is_an_average_without_bias(page):
    """Of values that are all the same it changes nothing; the first of others is itself."""
    node = shutil.which("node")
    if not node:
        pytest.skip("needs node")
    script = (
        HERE / "charts.js"
    ).read_text() + ";console.log(JSON.stringify([smoothed([3,3,3],.9),smoothed([1,2],.5)]))"
    found = json.loads(subprocess.run([node, "-e", script], capture_output=True, text=True, check=True).stdout)
    assert found[0] == pytest.approx([3, 3, 3])
    assert found[1] == pytest.approx([1, (0.25 * 1 + 0.5 * 2) / 0.75])


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
@pytest.mark.parametrize("which", ["one", "two"])
@pytest.mark.parametrize("phone", [False, True], ids=["desktop", "phone"])
def test_in_a_browser(which, phone, page, comparison, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    path = tmp_path / "page.html"
    path.write_text({"one": page, "two": comparison}[which].source, encoding="utf-8")
    asked, said = [], []
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        size = {"width": 390, "height": 800} if phone else {"width": 1280, "height": 900}
        view = browser.new_page(viewport=size, is_mobile=phone, color_scheme="dark" if phone else "light")
        view.on("request", lambda request: asked.append(request.url))
        view.on("console", lambda message: said.append(message.text))
        view.on("pageerror", lambda error: said.append(str(error)))
        view.goto(path.as_uri())
        charts = {"one": page, "two": comparison}[which].data["charts"]
        assert view.locator(".plot .series").count() == sum(len(c["series"]) for c in charts)
        assert view.evaluate("document.documentElement.scrollWidth") <= size["width"]
        sliders = view.locator(".slider input")
        sliders_of = {"one": page, "two": comparison}[which].data["sliders"]
        assert sliders.count() == 3
        for i in range(3):
            home = view.locator(f"#slider-{i}")
            slider = home.locator("input")
            last = [column["frames"][column["at"][-1]]["label"] for column in sliders_of[i]["columns"]]
            where = home.locator("output").inner_text()
            assert all(label in where for label in last)
            assert slider.get_attribute("aria-valuetext") == where  # before it is moved
            seen, alts = set(), set()
            slider.focus()
            view.keyboard.press("Home")
            frames = min(3, int(slider.get_attribute("max")) + 1)
            for _ in range(frames):
                seen.add(home.locator("img").last.get_attribute("src"))
                alts.add(home.locator("img").last.get_attribute("alt"))
                where = home.locator("output").inner_text()
                assert slider.get_attribute("aria-valuetext") == where
                view.keyboard.press("ArrowRight")
            assert len(seen) == len(alts) == frames >= 2
        check_choices(view, charts)
        if which == "two":
            check_sorting(view)
        browser.close()
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [path.as_uri()]
    assert said == []
