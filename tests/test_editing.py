"""Beginning with an image, drawing parts of it anew, walking between two: through the command line."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import UNET_FLAGS, VAE_FLAGS, succeed
from oracles import normal
from PIL import Image

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.images import frame, load_image, to_float
from lightdiff.data.latents import Scaling
from lightdiff.data.order import item_noise
from lightdiff.extras.edit import from_latent
from lightdiff.extras.trajectory import trajectory, with_callback
from lightdiff.extras.walk import noise_between, save_walk
from lightdiff.pipeline import Pipeline
from lightdiff.settings import LatentsSettings, SamplingSettings, TrainUNetSettings

FAST = ["--device", "cpu", "--precision", "fp32", "--num-steps", 4]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def places(sheet: np.ndarray, picture: np.ndarray) -> list[tuple[int, int]]:
    """Where a picture lies in a sheet, enlarged to 64 pixels, up to rounding: (top, left) of each."""
    large = picture.repeat(64 // len(picture), 0).repeat(64 // len(picture), 1)
    corner = np.abs(sheet[: 1 - 64, : 1 - 64] - large[0, 0]).max(2) <= 1
    return [(y, x) for y, x in np.argwhere(corner) if np.abs(sheet[y : y + 64, x : x + 64] - large).max() <= 1]


@pytest.fixture
def face(faces):
    return sorted(faces.rglob("*.png"))[0]


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean())


def test_strength_says_how_much_changes(trained, face, tmp_path):
    model = Pipeline.load(trained, device="cpu")
    x = to_float(frame(load_image(face), 16))[None]
    back = ((model.decode(model.encode(x))[0] + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 0).numpy()
    change = []
    for strength in (0.01, 0.4, 1.0):
        out = tmp_path / f"{strength}"
        succeed(
            "edit", "--run", trained, *FAST, "--num-images", 2, "--from", face, "--strength", strength, "--out", out
        )
        change.append(distance(pixels(out / "00000.png"), back))
    assert change[0] < 3
    assert change[0] < change[1] < change[2]


def test_what_a_mask_leaves_out_stays_to_the_pixel(trained, face, tmp_path):
    mask = np.zeros((40, 40), np.uint8)
    mask[:, 20:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    flags = ["--from", face, "--mask", tmp_path / "mask.png", "--num-images", 3, "--out", tmp_path / "out"]
    succeed("edit", "--run", trained, *FAST, *flags)
    source = frame(load_image(face), 16).permute(1, 2, 0).numpy()
    drawn = [pixels(tmp_path / f"out/{i:05d}.png") for i in range(3)]
    for image in drawn:
        np.testing.assert_array_equal(image[:, :8], source[:, :8])
        assert distance(image[:, 8:], source[:, 8:]) > 1
    assert distance(drawn[0], drawn[1]) > 1  # each of its own noise


def test_what_is_transparent_lies_on_the_models_background_and_stays_where_it_is_a_mask(trained, tmp_path):
    run = tmp_path / "run"
    flags = [*VAE_FLAGS, "--background", "black"]
    data = Checkpoint(trained / "vae/checkpoints/best.safetensors", "vae").metadata.settings["images"]["data"][0]
    succeed("train-vae", "--run", run, "--data", data, *flags)
    succeed("encode", "--run", run, "--workers", 0, "--device", "cpu")
    succeed("scale", "--run", run)
    succeed("train-unet", "--run", run, *UNET_FLAGS)
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    mask = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (16, 0, 32, 32))
    mask.save(tmp_path / "mask.png")
    flags = ["--from", tmp_path / "clear.png", "--mask", tmp_path / "mask.png", "--num-images", 1, "--out"]
    succeed("edit", "--run", run, *FAST, *flags, tmp_path / "out")
    drawn = pixels(tmp_path / "out/00000.png")
    assert (drawn[:, :8] == 0).all()
    assert (drawn[:, 8:] != 0).any()


def test_a_mask_that_lets_nothing_change_is_refused(trained, face, tmp_path, cli):
    """All black, transparent, or white only beyond the square that is generated."""
    beyond = Image.new("L", (48, 16), 0)
    beyond.paste(255, (0, 0, 15, 16))
    Image.new("RGB", (48, 16), "red").save(tmp_path / "wide.png")
    for number, mask in enumerate([Image.new("L", (16, 16)), Image.new("RGBA", (16, 16), (255, 255, 255, 0)), beyond]):
        mask.save(tmp_path / "mask.png")
        flags = ["--from", tmp_path / "wide.png" if mask is beyond else face, "--mask", tmp_path / "mask.png"]
        refused = cli("edit", "--run", trained, *FAST, *flags, "--out", tmp_path / f"{number}")
        assert refused.code == 2
        assert (
            "mask.png has no white in the part that is drawn, so nothing would be redrawn: paint white" in refused.err
        )
        assert not (tmp_path / f"{number}").exists()


def test_a_mask_of_another_shape_is_refused(trained, tmp_path, cli):
    Image.new("RGB", (40, 20)).save(tmp_path / "wide.png")
    flags = ["edit", "--run", trained, *FAST, "--num-images", 1, "--from", tmp_path / "wide.png"]
    for size, refused in (((20, 40), True), ((80, 40), False), ((16, 16), False)):
        Image.new("L", size, 255).save(tmp_path / "mask.png")
        result = cli(*flags, "--mask", tmp_path / "mask.png", "--out", tmp_path / f"{size[0]}")
        assert ("not the same shape" in " ".join(result.err.split())) == refused, result.err
        assert result.code == (2 if refused else 0)


@pytest.mark.parametrize(("sampler", "strength"), [("ddim", 1.0), ("euler", 0.5), ("heun", 0.7), ("dpm++2m", 0.9)])
def test_outside_of_a_mask_latents_are_the_source_and_its_noise_all_the_way(sampler, strength):
    settings = TrainUNetSettings(latent=LatentsSettings(shift=(0.5,), scale=(2.0,)))
    z, mask, seen = normal(1, 4, 16, 16, dtype=torch.float32), torch.zeros(1, 1, 16, 16), []
    mask[..., :8] = 1
    pipeline = Pipeline(None, None, lambda x_t, t: torch.sin(3 * x_t), settings, torch.device("cpu"))
    drawn = pipeline.sample(
        [2, 9],
        0,
        SamplingSettings(num_steps=6, sampler=sampler),
        strength=strength,
        start=with_callback(lambda *step: seen.append(step), from_latent(2 * (z - 0.5), mask)),
    )
    known, noise = 2 * (z - 0.5), item_noise((4, 16, 16), [2, 9], 0, "start")
    assert seen[0][0].sigma == pytest.approx(strength)
    for level, x_t, x0 in seen:
        wanted = level.alpha * known + level.sigma * noise
        torch.testing.assert_close(x_t[..., 8:], wanted[..., 8:], rtol=0, atol=1e-5)
        torch.testing.assert_close(x0[..., 8:], known.expand_as(x0)[..., 8:])
    torch.testing.assert_close(drawn[..., 8:], z.expand_as(drawn)[..., 8:])
    assert float((drawn - z)[..., :8].abs().mean()) > 0.1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["edit", "--from", "nothing.png"], "--from: nothing.png cannot be read: No such file"),
        (["edit", "--mask", "m.png"], "--from: give the image to start from"),
        (["edit", "--strength", "0.5"], "--from: give the image to start from"),
        (["walk"], "--between: two numbers of images or more"),
        (["walk", "--between", "3"], "--between: two numbers of images or more"),
        (["walk", "--between", "3,-4"], "--between: two numbers of images or more, from 0 on"),
        (["walk", "--between", "3,4", "--sampler", "ddim", "--eta", "0.5"], "a walk needs a sampler without noise"),
        (["walk", "--between", "3,4", "--sampler", "ddpm"], "a walk needs a sampler without noise"),
        (["generate", "--eta", "0.5"], "--eta belongs to --sampler ddim"),
        (["generate", "--sampler", "heun", "--eta", "0.5"], "--eta belongs to --sampler ddim"),
    ],
)
def test_what_does_not_fit_together_is_told(trained, cli, flags, message):
    command, *rest = flags
    result = cli(command, "--run", trained, "--device", "cpu", *rest)
    assert (result.code, message in result.err) == (2, True), result.err


def test_too_many_steps_for_a_small_strength_are_told(trained, face, cli):
    result = cli("edit", "--run", trained, *FAST, "--from", face, "--strength", 0.002, "--num-steps", 3)
    assert (result.code, "--strength 0.002: 3 steps asked for, but the schedule has 2 usable levels" in result.err) == (
        2,
        True,
    )


# --- between two --------------------------------------------------------------------------------------------------


def test_a_walk_keeps_the_length_of_noise_and_ends_where_it_should():
    shape = (4, 8, 8)
    walk = noise_between(shape, [3, 17, 5], 9, seed=2)
    ends = item_noise(shape, [3, 17, 5], 2, "start")
    assert walk.shape == (17, *shape)
    assert torch.equal(walk[[0, 8, 16]], ends)
    lengths = walk.flatten(1).norm(dim=1)
    between = torch.stack([lengths[i] for i in (2, 4, 6)])
    # Two random vectors of 256 numbers are nearly perpendicular: on the arc lengths stay, on a line 0.7 would be left.
    assert float(between.min()) > 0.95 * float(lengths[[0, 8]].min())
    steps = (walk[1:9] - walk[:8]).flatten(1).norm(dim=1)
    assert float(steps.max() / steps.min()) < 1.1
    assert torch.equal(noise_between(shape, [3, 3], 4, seed=2), ends[:1].expand(4, -1, -1, -1))


@pytest.mark.skipif(os.name != "posix", reason="limits of a process")
def test_a_long_walk_does_not_keep_its_pictures_open(tmp_path):
    import resource

    files = [tmp_path / f"{i}.png" for i in range(100)]
    for i, file in enumerate(files):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(file)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = os.dup(0)  # the lowest number that is free
    os.close(spare)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 50, hard))
    try:
        save_walk(tmp_path / "walk.webp", files)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with Image.open(tmp_path / "walk.webp") as walk:
        assert walk.n_frames == 198


def test_a_walk_by_the_command_line(trained, tmp_path):
    out = tmp_path / "walk"
    flags = ["--between", "1,4", "--frames", 5, "--batch-size", 2, "--out", out]
    succeed("walk", "--run", trained, *FAST, *flags)
    assert sorted(p.name for p in out.glob("*.png")) == [f"{i:05d}.png" for i in range(5)]
    with Image.open(out / "walk.webp") as image:
        assert image.n_frames == 8  # there and back, without the ends twice
    succeed("generate", "--run", trained, *FAST, "--num-images", 5, "--out", tmp_path / "plain")
    for frame_number, item in ((0, 1), (4, 4)):
        plain = pixels(tmp_path / f"plain/{item:05d}.png")
        assert np.abs(pixels(out / f"{frame_number:05d}.png") - plain).max() <= 1


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++2m", "heun", "euler"])
@pytest.mark.parametrize("spacing", ["karras", "quadratic"])
def test_every_sampler_by_the_command_line(trained, tmp_path, sampler, spacing):
    flags = ["--sampler", sampler, "--spacing", spacing, "--num-images", 2, "--out", tmp_path / "out"]
    succeed("generate", "--run", trained, *FAST, *flags)
    assert (tmp_path / "out/grid.png").is_file()


# --- the way from noise to an image ---------------------------------------------------------------------------------


def test_a_trajectory_ends_at_the_image(trained, tmp_path):
    flags = ["--num-images", 5, "--seed", 3, "--out", tmp_path / "out"]
    succeed("trajectory", "--run", trained, *FAST, *flags)
    sheet = pixels(tmp_path / "out/trajectory.png")
    found = [places(sheet, pixels(tmp_path / f"out/{i:05d}.png")) for i in range(4)]
    lefts = [max(left for _, left in some) for some in found]  # a network of three steps changes little on the way
    assert len(set(lefts)) == 1  # in the last column
    tops = [min(top for top, left in some if left == lefts[0]) for some in found]
    assert tops == sorted(set(tops))
    with Image.open(tmp_path / "out/trajectory.webp") as animation:
        assert animation.n_frames == 4
        assert animation.size == (4 * 66 - 2, 2 * 66 - 2)


def test_a_trajectory_begins_with_noise_and_tells_every_call(trained):
    model = Pipeline.load(trained, device="cpu")
    how = SamplingSettings(num_steps=5, sampler="heun")
    moments = trajectory(model, 2, sampling=how)
    assert len(moments) == 9
    start = item_noise(
        (model.settings.latent.channels, model.settings.latent.height, model.settings.latent.width), [0, 1], 0, "start"
    )
    torch.testing.assert_close(
        moments[0].x_t, model.decode(Scaling.of(model.settings.latent).to_z(start)), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(moments[-1].x0, model.decode(model.sample(2, sampling=how)))


def test_a_trajectory_of_an_edit_ends_at_the_image(trained, face, tmp_path):
    flags = ["--num-images", 2, "--from", face, "--trajectory", "--out", tmp_path / "out", "--name", "me"]
    succeed("edit", "--run", trained, *FAST, *flags)
    sheet = pixels(tmp_path / "out/me-trajectory.png")
    assert all(places(sheet, pixels(tmp_path / f"out/me-{i:05d}.png")) for i in range(2))


@pytest.mark.parametrize("masked", [False, True])
def test_the_sheet_of_an_edit_shows_source_and_mask(trained, face, tmp_path, masked):
    Image.fromarray(np.kron([[0, 255]], np.ones((16, 8))).astype(np.uint8)).save(tmp_path / "mask.png")
    flags = ["--num-images", 2, "--from", face, "--out", tmp_path / "out"]
    flags += ["--mask", tmp_path / "mask.png"] if masked else []
    succeed("edit", "--run", trained, *FAST, *flags)
    sheet = pixels(tmp_path / "out/grid.png")
    source = frame(load_image(face), 16).permute(1, 2, 0).numpy().astype(int)
    mask = pixels(tmp_path / "mask.png")
    made = [places(sheet, pixels(tmp_path / f"out/{i:05d}.png")) for i in range(2)]
    assert len(places(sheet, source)) == 1
    assert len(places(sheet, mask)) == masked
    assert [len(found) for found in made] == [1, 1]
    assert places(sheet, source)[0][0] < made[0][0][0] == made[1][0][0]  # above them


def test_edits_are_not_mixed_with_those_of_another_image(trained, faces, tmp_path, cli):
    first, second = sorted(faces.rglob("*.png"))[:2]
    flags = ["edit", "--run", trained, *FAST, "--num-images", 1, "--out", tmp_path / "out", "--from"]
    succeed(*flags, first)
    succeed(*flags, first)
    result = cli(*flags, second)
    assert (result.code, "was started with --from" in result.err) == (2, True), result.err
    result = cli("generate", "--run", trained, *FAST, "--num-images", 1, "--out", tmp_path / "out")
    assert (result.code, "started with lightdiff edit, not generate" in result.err) == (2, True), result.err
