"""The stage `encode`: its latents, stopped and resumed, other settings, unreadable images, files that do not fit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_run import draw, encode_all, train_first, train_second

from lightdiff.data.images import frame, load_image, to_float
from lightdiff.data.index import read_index, shard_path
from lightdiff.data.latents import LatentSet
from lightdiff.errors import RunError, Stopped, UserError
from lightdiff.pipeline import Pipeline
from lightdiff.settings import EncodeSettings, JobSettings, ScaleSettings
from lightdiff.stages import encode, scale


def test_latents_are_what_the_encoder_says_of_each_image_and_its_mirror_image(finished, faces_32):
    model = Pipeline.load(finished)
    latents = LatentSet(finished / "latents")
    for position in (0, 17, 39):
        x = to_float(frame(load_image(faces_32 / latents.index.name(position)), 32))[None]
        for mirror, image in ((0, x), (1, x.flip(-1))):
            mu, logvar = latents.gather([position], torch.tensor([mirror]))
            posterior = model.vae.encoder(image)
            torch.testing.assert_close(mu, posterior.mu, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(logvar, posterior.logvar, atol=1e-4, rtol=1e-4)


def test_latents_on_a_device_are_the_same(finished):
    positions, mirror = [3, 30, 17], torch.tensor([0, 1, 1])
    mapped = LatentSet(finished / "latents").gather(positions, mirror)
    resident = LatentSet(finished / "latents").to(torch.device("cpu")).gather(positions, mirror)
    for a, b in zip(mapped, resident, strict=True):
        assert torch.equal(a, b)


def test_an_interrupted_encoding_goes_on_and_gives_the_same(copy):
    shards = [shard_path(copy / "latents", n) for n in range(3)]
    before = [shard.read_bytes() for shard in shards]
    index = read_index(copy / "latents")
    index.digest = ""
    index.write(copy / "latents/index.safetensors")
    shards[1].unlink()
    damaged = bytearray(before[2])
    damaged[-5] ^= 4
    shards[2].write_bytes(damaged)
    encode_all(copy, shard_size=16, dtype="float32")
    assert [shard.read_bytes() for shard in shards] == before
    assert read_index(copy / "latents").complete


def test_generate_and_encode_keep_to_their_time_and_go_on(finished, copy, tmp_path):
    short = JobSettings(max_time=1e-6)
    with pytest.raises(Stopped, match="what is done is saved"):
        draw(finished, tmp_path / "out", num_images=5, batch_size=2, job=short)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["00000.png", "00001.png"]
    draw(finished, tmp_path / "out", num_images=5, batch_size=2)
    assert (tmp_path / "out/grid.png").is_file()
    chosen = encode.inherited(copy, None) | {"run": copy, "restart": True, "shard_size": 10}
    with pytest.raises(Stopped) as stopped:
        encode.run(EncodeSettings.model_validate(chosen | {"job": short}))
    assert stopped.value.exit_code == 75
    shards = copy / "latents"
    assert len(list(shards.glob("shard-*"))) == 1
    encode.run(EncodeSettings.model_validate(chosen | {"restart": False}))
    assert read_index(shards).complete


def test_automatic_precision_stays_what_it_was_begun_in(copy, tmp_path, monkeypatch):
    def faster_by_now(name, _):
        return "bf16" if name == "auto" else name

    index = read_index(copy / "latents")
    index.digest = ""
    index.write(copy / "latents/index.safetensors")
    monkeypatch.setattr("lightdiff.runtime.stage.pick_precision", faster_by_now)
    encode_all(copy, shard_size=16, dtype="float32", compute={"workers": 0})
    assert read_index(copy / "latents").precision == "fp32"
    draw(copy, tmp_path / "out")
    (tmp_path / "out/00004.png").unlink()
    draw(copy, tmp_path / "out", compute={})
    draw(copy, tmp_path / "new", compute={})
    kept = [
        json.loads((tmp_path / name / "settings.json").read_text())["compute"]["precision"] for name in ("out", "new")
    ]
    assert kept == ["fp32", "bf16"]


def test_latents_of_other_settings_are_refused_and_restart_keeps_them_aside(copy):
    with pytest.raises(UserError, match=r"latents was started with --dtype float32, not float16.*encode --restart"):
        encode_all(copy, shard_size=16)
    with pytest.raises(UserError, match="started with --flip True, not False"):
        encode_all(copy, shard_size=16, dtype="float32", images={"flip": False})
    encode_all(copy, restart=True, images={"flip": False})
    assert (copy / "latents.old-1/index.safetensors").is_file()
    assert LatentSet(copy / "latents").gather([0])[0].shape == (1, 4, 8, 8)
    assert not read_index(copy / "latents").mirrored


def test_unreadable_images_are_named_and_left_out(tmp_path, faces_32):
    folder = Path(shutil.copytree(faces_32, tmp_path / "faces"))
    broken = next(folder.rglob("*.png"))
    train_first(tmp_path / "run", folder, max_bad=0.1)
    broken.write_bytes(b"no image")
    encode_all(tmp_path / "run", images={"max_bad": 0.1})
    latents = LatentSet(tmp_path / "run/latents")
    assert len(latents.train) + len(latents.val) == 39
    assert broken.name in (tmp_path / "run/latents/bad-files.txt").read_text()
    scale.run(ScaleSettings(run=tmp_path / "run"))
    train_second(tmp_path / "run")
    with pytest.raises(RunError, match="--max-bad"):
        encode_all(tmp_path / "run", restart=True, images={"max_bad": 0.0})


def test_restart_replaces_latents_whose_index_is_damaged(copy):
    path = copy / "latents/index.safetensors"
    path.write_bytes(path.read_bytes().replace(b'precision\\": \\"fp32', b'precision\\": \\"bf16'))
    with pytest.raises(RunError, match="encode --restart"):
        encode_all(copy, compute={"workers": 0})
    encode_all(copy, restart=True, compute={"workers": 0})
    assert read_index(copy / "latents").complete


def test_unfinished_latents_are_not_used(copy):
    index = read_index(copy / "latents")
    index.digest = ""
    index.write(copy / "latents/index.safetensors")
    for use in (lambda: LatentSet(copy / "latents"), lambda: scale.run(ScaleSettings(run=copy))):
        with pytest.raises(UserError, match="encoding has not finished: run 'lightdiff encode' again"):
            use()


def test_exchanged_shards_are_noticed(copy):
    shutil.copy(shard_path(copy / "latents", 0), shard_path(copy / "latents", 1))
    with pytest.raises(UserError, match="is not the shard of this index"):
        LatentSet(copy / "latents")
