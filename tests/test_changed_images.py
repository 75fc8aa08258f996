"""What happens when images are changed, added, removed or moved after a stage has seen them."""

import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import UNET_FLAGS, VAE_FLAGS, Result, call, succeed
from PIL import Image

from lightdiff.checkpoint import Checkpoint, save
from lightdiff.data import loading
from lightdiff.data.index import read_index
from lightdiff.data.latents import LatentSet
from lightdiff.models.vae import Encoder, Posterior
from lightdiff.stages import scale

ENCODE = ("--workers", 0, "--device", "cpu")


@pytest.fixture
def data(faces: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(faces, tmp_path / "photos"))


def test_an_unreadable_image_counts_once_wherever_the_data_lie(data: Path, tmp_path: Path) -> None:
    (data / "00000.png").write_bytes(b"no image")
    flags = ("--max-bad", 0.05, "--batch-size", 24, "--val-share", 0)
    succeed("train-vae", "--run", tmp_path / "run", "--data", data, *VAE_FLAGS, *flags)
    data = data.rename(tmp_path / "moved")
    succeed("train-vae", "--run", tmp_path / "run", "--data", data, "--steps", 4)
    (row,) = (tmp_path / "run/vae/bad-files.txt").read_text().splitlines()
    assert row.split("\t")[:2] == ["0", "00000.png"]


def test_that_nothing_is_validated_is_said_at_the_start(data: Path, tmp_path: Path) -> None:
    said = "there are no validation images, so nothing is validated: best.safetensors is the newest state"
    run = ("--run", tmp_path / "run")
    assert said in succeed("train-vae", *run, "--data", data, *VAE_FLAGS, "--val-share", 0).err
    assert said in succeed("train-vae", *run, "--steps", 4).err
    succeed("encode", *run, *ENCODE)
    succeed("scale", *run)
    assert said in succeed("train-unet", *run, *UNET_FLAGS).err
    other = succeed("train-vae", "--run", tmp_path / "other", "--data", data, *VAE_FLAGS)
    assert said not in other.err


# --- a training that is resumed -----------------------------------------------------------------------------------


@pytest.fixture
def begun(data: Path, tmp_path: Path) -> Path:
    """A run whose VAE has been trained for three steps on 24 images."""
    succeed("train-vae", "--run", tmp_path / "run", "--data", data, *VAE_FLAGS)
    return tmp_path / "run"


def photos(data: Path) -> list[Path]:
    return sorted(data.rglob("*.png"))


def repaint(path: Path) -> None:
    """Other pixels, in a file of another size."""
    with Image.open(path) as image:
        size = image.size
    Image.new("RGB", size, "red").save(path)


def test_resuming_tells_what_has_become_of_the_images(begun: Path, data: Path) -> None:
    first, second, *_ = photos(data)
    repaint(first)
    shutil.copy(second, data / "shades/new.png")
    again = ("train-vae", "--run", begun, "--steps")
    assert "images since this run was last started: 1 changed, 1 added, 0 gone" in succeed(*again, 4).err
    assert "last started" not in succeed(*again, 5).err  # now they are those that it knows
    history = Checkpoint(begun / "vae/checkpoints/last.safetensors").metadata.extra["history"]
    assert [entry["changed"].keys() & {"list of images"} for entry in history] == [{"list of images"}, set()]


def test_images_that_are_gone_are_not_trained_without_unless_that_is_wanted(begun: Path, data: Path) -> None:
    first, second = photos(data)[:2]
    first.unlink()
    second.unlink()
    result = call("train-vae", "--run", begun, "--steps", 4)
    assert result.code == 2
    assert f"2 of the 24 images behind {begun / 'vae'} are gone ({first.relative_to(data)}), " in result.err
    assert "more than --max-bad 0.01: is every disk mounted" in result.err
    assert "resuming from step 3" in succeed("train-vae", "--run", begun, "--steps", 4, "--allow-missing").err
    assert "last started" not in succeed("train-vae", "--run", begun, "--steps", 5).err


def test_copies_elsewhere_are_the_same_images(begun: Path, data: Path, tmp_path: Path) -> None:
    copies = shutil.copytree(data, tmp_path / "copies", copy_function=shutil.copyfile)  # times of change are new
    assert "last started" not in succeed("train-vae", "--run", begun, "--data", copies, "--steps", 4).err


def test_a_list_of_images_that_cannot_be_read_is_no_obstacle(begun: Path, data: Path) -> None:
    (begun / "vae/images.safetensors").write_bytes(b"{")
    assert "another list of images" not in succeed("train-vae", "--run", begun, "--steps", 4).err
    (begun / "vae/images.safetensors").unlink()
    shutil.copy(photos(data)[0], data / "shades/new.png")
    said = "note: this run was started with another list of images"
    assert said in succeed("train-vae", "--run", begun, "--steps", 5).err


# --- latents ------------------------------------------------------------------------------------------------------


@pytest.fixture
def encoded(begun: Path) -> Path:
    """A run with latents of 24 images in three shards, and their statistics."""
    succeed("encode", "--run", begun, "--shard-size", 8, *ENCODE)
    succeed("scale", "--run", begun)
    return begun


def latents_by_name(run: Path) -> dict[str, torch.Tensor]:
    """The posterior's mean of each image and its mirror image."""
    latents = LatentSet(run / "latents")
    positions = [*latents.train, *latents.val]
    sides = [latents.gather(positions, torch.full((len(positions),), side))[0] for side in (0, 1)]
    return {latents.index.name(p): mu for p, mu in zip(positions, torch.stack(sides, 1), strict=True)}


def encode_again(run: Path, *flags: object) -> str:
    return succeed("encode", "--run", run, "--shard-size", 8, *ENCODE, *flags).err


def test_encode_does_what_is_new_and_says_how_much(encoded: Path, data: Path) -> None:
    before, shard = latents_by_name(encoded), (encoded / "latents/shard-00001.safetensors").read_bytes()
    changed, gone, *_ = photos(data)
    repaint(changed)
    gone.unlink()
    shutil.copy(changed, data / "shades/new.png")
    said = encode_again(encoded, "--max-bad", 0.1)
    assert "images since they were encoded last: 1 changed, 1 added, 1 gone" in said
    assert Checkpoint(encoded / "latents/shard-00003.safetensors").shapes("")["mu"][0] == 2
    assert "run 'lightdiff scale' again" in said
    after, names = latents_by_name(encoded), {path.relative_to(data).as_posix() for path in photos(data)}
    assert after.keys() == names
    new = {"shades/new.png", changed.relative_to(data).as_posix()}
    for name in names - new:
        assert torch.equal(after[name], before[name])
    first, second = (after[name] for name in new)
    assert torch.equal(first, second)
    assert not torch.equal(first, before[changed.relative_to(data).as_posix()])
    assert (encoded / "latents/shard-00001.safetensors").read_bytes() == shard
    assert "run 'lightdiff scale' first" in call("train-unet", "--run", encoded, *UNET_FLAGS).err
    assert "has the latents of all 24 images already" in encode_again(encoded)


def test_latents_gone_on_with_are_those_of_a_fresh_start(encoded: Path, data: Path) -> None:
    for path in photos(data)[::3]:
        repaint(path)
    encode_again(encoded)
    after = latents_by_name(encoded)
    encode_again(encoded, "--restart")
    for name, mu in latents_by_name(encoded).items():
        torch.testing.assert_close(after[name], mu, rtol=0, atol=2e-2)  # in other batches, in float16


def test_pixels_that_change_without_the_files_size_are_noticed(encoded: Path, data: Path) -> None:
    path = photos(data)[0]
    pixels = path.read_bytes()
    path.write_bytes(pixels[:60] + bytes([pixels[60] ^ 1]) + pixels[61:])
    assert "1 changed, 0 added, 0 gone" in encode_again(encoded, "--max-bad", 0.1)


def test_touched_and_moved_files_are_not_encoded_again(encoded: Path, data: Path, tmp_path: Path) -> None:
    os.utime(photos(data)[0])
    assert "has the latents of all 24 images already" in encode_again(encoded)
    copies = shutil.copytree(data, tmp_path / "copies", copy_function=shutil.copyfile)
    assert "has the latents of all 24 images already" in encode_again(encoded, "--data", copies)
    assert read_index(encoded / "latents").statistics is not None


def test_a_corrected_label_needs_no_encoding(encoded: Path, data: Path, tmp_path: Path) -> None:
    names = [path.relative_to(data).as_posix() for path in photos(data)]
    table = tmp_path / "labels.csv"
    table.write_text("file,kind\n" + "".join(f"{name},{i % 2}\n" for i, name in enumerate(names)))
    assert "has the latents of all 24 images already" in encode_again(encoded, "--labels", table)
    index = read_index(encoded / "latents")
    assert index.labels == {"kind": ["0", "1"]}
    assert index.classes("kind", ["1"]).tolist() == [1, 0] * 12
    assert index.statistics is not None


def test_another_split_drops_the_statistics_alone(encoded: Path) -> None:
    before = latents_by_name(encoded)
    assert "run 'lightdiff scale' again" in encode_again(encoded, "--val-share", 0.4)
    assert read_index(encoded / "latents").statistics is None
    after = latents_by_name(encoded)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], mu) for name, mu in before.items())


def test_latents_are_not_dropped_for_a_disk_that_is_not_mounted(encoded: Path, data: Path) -> None:
    before = (encoded / "latents/index.safetensors").read_bytes()
    shutil.rmtree(data / "shades")
    result = call("encode", "--run", encoded, "--shard-size", 8, *ENCODE)
    assert result.code == 2
    assert f"of the 24 images behind {encoded / 'latents'} are gone (shades/" in result.err
    assert (encoded / "latents/index.safetensors").read_bytes() == before
    said = encode_again(encoded, "--allow-missing")
    assert latents_by_name(encoded).keys() == {path.relative_to(data).as_posix() for path in photos(data)}
    assert "0 changed, 0 added" in said


def test_an_interrupted_encoding_mixes_no_versions_of_an_image(begun: Path, data: Path) -> None:
    """Two images of the first, finished shard and one of the second change while it is interrupted."""
    stopped = call("encode", "--run", begun, "--shard-size", 8, *ENCODE, "--max-time", 1e-6)
    assert stopped.code == 75
    for path in (photos(data)[0], photos(data)[3], photos(data)[10]):
        repaint(path)
    assert "3 changed" in encode_again(begun)
    after = latents_by_name(begun)
    encode_again(begun, "--restart")
    for name, mu in latents_by_name(begun).items():
        torch.testing.assert_close(after[name], mu, rtol=0, atol=2e-2)


def test_interruptions_leave_no_trace(encoded: Path, data: Path, tmp_path: Path) -> None:
    for path in photos(data)[::2]:
        repaint(path)
    photos(data)[1].unlink()
    never = Path(shutil.copytree(encoded, tmp_path / "never"))
    encode_again(never, "--max-bad", 0.1)
    flags = ("--shard-size", 8, *ENCODE, "--max-bad", 0.1)
    codes = [call("encode", "--run", encoded, *flags, "--max-time", 1e-6).code for _ in range(2)]
    assert codes == [75, 0]  # two shards, one at a time
    for path in sorted((never / "latents").iterdir()):
        assert (encoded / "latents" / path.name).read_bytes() == path.read_bytes(), path.name


def test_an_image_that_changes_while_it_is_encoded_is_encoded_again(
    begun: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, path = loading.load_image, photos(data)[7]

    def changing(name: str, *arguments: Any, **more: Any) -> Image.Image:
        image = load(name, *arguments, **more)
        if name == path.relative_to(data).as_posix():
            repaint(path)
        return image

    monkeypatch.setattr(loading, "load_image", changing)
    encode_again(begun)
    monkeypatch.undo()
    assert "1 changed, 0 added, 0 gone" in encode_again(begun, "--max-bad", 0.1)
    assert "has the latents of all 24 images already" in encode_again(begun)


def test_a_repaired_image_is_encoded_and_no_longer_listed(begun: Path, data: Path) -> None:
    path = photos(data)[5]
    pixels = path.read_bytes()
    path.write_bytes(b"no image")
    assert "1 unreadable" in encode_again(begun, "--max-bad", 0.1)
    report = begun / "latents/bad-files.txt"
    assert path.name in report.read_text()
    assert "has the latents of all" in encode_again(begun, "--max-bad", 0.1)
    assert path.name in report.read_text()
    path.write_bytes(pixels)
    assert "1 changed" in encode_again(begun)
    assert not report.exists()
    assert len(latents_by_name(begun)) == 24


# --- shards -------------------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(encoded: Path, data: Path, tmp_path: Path) -> Path:
    """A shard of the same images, by another VAE."""
    run = tmp_path / "other"
    succeed("train-vae", "--run", run, "--data", data, *VAE_FLAGS, "--seed", 5)
    succeed("encode", "--run", run, "--shard-size", 8, *ENCODE)
    return run / "latents/shard-00001.safetensors"


def test_a_foreign_shard_is_refused_and_replaced(encoded: Path, foreign: Path) -> None:
    latents, before = encoded / "latents", latents_by_name(encoded)
    shutil.copy(foreign, latents / "shard-00001.safetensors")
    for command in (("scale",), ("train-unet", *UNET_FLAGS)):
        result = call(command[0], "--run", encoded, *command[1:])
        assert result.code == 2
        assert "shard-00001.safetensors is not the shard of this index" in result.err
        assert "run 'lightdiff encode' again" in result.err
    said = "damaged, or of another VAE, other settings or other images; it will be encoded again"
    assert said in encode_again(encoded)
    assert all(torch.equal(mu, before[name]) for name, mu in latents_by_name(encoded).items())
    assert read_index(latents).statistics is not None  # they are the same


@pytest.mark.parametrize("number", [0, 1])
def test_an_unfinished_encoding_takes_in_no_shard_of_another_vae_or_other_images(
    encoded: Path, foreign: Path, number: int
) -> None:
    latents, before = encoded / "latents", latents_by_name(encoded)
    index = read_index(latents)
    index.digest = ""
    index.forget(number, index.by_shard()[number])
    index.write(latents / "index.safetensors")
    own = latents / "shard-00001.safetensors"
    shutil.copy(own if number == 0 else foreign, latents / f"shard-0000{number}.safetensors")
    assert f"shard-0000{number}.safetensors is damaged, or of another VAE" in encode_again(encoded)
    assert all(torch.equal(mu, before[name]) for name, mu in latents_by_name(encoded).items())


def test_scale_keeps_the_latents_from_being_replaced_meanwhile(encoded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, results = scale.read_train_latents, list[Result]()

    def reading(*arguments: Any) -> Any:
        results.append(call("encode", "--run", encoded, "--restart", *ENCODE))
        return read(*arguments)

    monkeypatch.setattr(scale, "read_train_latents", reading)
    succeed("scale", "--run", encoded)
    assert [result.code for result in results] == [2, 2, 2]
    assert "latents is in use by" in results[0].err


def test_an_unfinished_encoding_takes_in_no_shard_of_other_settings(encoded: Path, data: Path, tmp_path: Path) -> None:
    """Of the same VAE and images: drawn on another background, so only the index can tell."""
    other = Path(shutil.copytree(encoded, tmp_path / "other"))
    encode_again(other, "--restart", "--background", "red")
    index = read_index(encoded / "latents")
    index.digest = ""
    index.forget(0, index.by_shard()[0])
    index.write(encoded / "latents/index.safetensors")
    shutil.copy(other / "latents/shard-00000.safetensors", encoded / "latents")
    assert "shard-00000.safetensors is damaged, or of another VAE, other settings" in encode_again(encoded)


def test_a_copy_of_another_vae_beside_latents_is_noticed_and_replaced(encoded: Path, foreign: Path) -> None:
    copy = encoded / "latents/vae.safetensors"
    copy.unlink()  # a hard link of the run's own
    shutil.copy(foreign.parent / "vae.safetensors", copy)
    result = call("train-unet", "--run", encoded, *UNET_FLAGS)
    assert result.code == 2
    assert "vae.safetensors is not the VAE of these latents: run 'lightdiff encode' again" in result.err
    encode_again(encoded)
    succeed("train-unet", "--run", encoded, *UNET_FLAGS)


def test_a_unet_that_is_resumed_with_corrected_labels_says_so(begun: Path, data: Path, tmp_path: Path) -> None:
    names = [path.relative_to(data).as_posix() for path in photos(data)]
    table = tmp_path / "labels.csv"
    table.write_text("file,kind\n" + "".join(f"{name},{i % 2}\n" for i, name in enumerate(names)))
    encode_again(begun, "--labels", table)
    succeed("scale", "--run", begun)
    again = ("train-unet", "--run", begun, *UNET_FLAGS, "--label", "kind")
    succeed(*again)
    said = "some images have another label now than when this run was started"
    assert said not in succeed(*again, "--steps", 4).err
    table.write_text(table.read_text().replace(f"{names[0]},0", f"{names[0]},1"))
    encode_again(begun, "--labels", table)
    assert said in succeed(*again, "--steps", 5).err


# --- latents that cannot be stored --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "words"), [(1e6, "is too large for float16 (1e+06): --dtype float32"), (math.nan, "is not finite")]
)
def test_a_latent_that_is_not_finite_names_its_image(
    begun: Path, monkeypatch: pytest.MonkeyPatch, number: float, words: str
) -> None:
    forward, calls = Encoder.forward, []

    def poisoned(self: Encoder, x: torch.Tensor) -> Posterior:
        posterior = forward(self, x)
        calls.append(len(x))
        if len(calls) == 2:
            posterior.mu[len(x) // 2 + 1, 0, 0, 0] = number  # of the second image's mirror image
        return posterior

    monkeypatch.setattr(Encoder, "forward", poisoned)
    flags = ("--shard-size", 8, "--batch-size", 4, "--precision", "fp32", *ENCODE)
    result = call("encode", "--run", begun, *flags)
    assert result.code == 1
    assert words in result.err
    assert str(photos(begun.parent / "photos")[5]) in result.err
    monkeypatch.undo()
    succeed("encode", "--run", begun, *flags)


def test_latents_that_are_not_finite_are_not_scaled(encoded: Path) -> None:
    latents = encoded / "latents"
    index, path = read_index(latents), latents / "shard-00000.safetensors"
    shard = Checkpoint(path)
    tensors = {name: tensor.clone() for name, tensor in shard.tensors("").items()}
    tensors["mu"][0] = math.inf
    index.shards[0] = save(path, tensors, shard.metadata).digest
    index.write(latents / "index.safetensors")
    result = call("scale", "--run", encoded)
    assert result.code == 1
    assert "latents are not finite" in result.err
