"""One training of a VAE: refused starts, its first lines, where weights start, images that break, how long it is."""

import re
import shutil

import pytest
import torch
from small_training import lines, vae_settings

from lightdiff.checkpoint import Checkpoint
from lightdiff.errors import RunError, UserError
from lightdiff.extras.toy_faces import draw_dataset
from lightdiff.settings import EncodeSettings, ImageSettings, JobSettings, VAELossSettings, VAESettings, with_changes
from lightdiff.stages import encode, train_vae
from lightdiff.training.loop import Trainer


def test_the_first_lines_tell_passes_and_where_pictures_will_be(tmp_path, faces, capsys):
    settings = vae_settings(tmp_path / "run", faces, steps=4)
    train_vae.run(settings)
    said = capsys.readouterr().err
    images = int(re.search(r"(\d+) training", said)[1])
    passes = f"{4 * settings.loop.batch_size / images:.3g} passes over the data"
    assert f"4 steps, batch size {settings.loop.batch_size}: {passes}; cpu, fp32" in said
    assert f"pictures: {tmp_path / 'run/vae/images'}\n" in said
    assert "val_kl " in said
    assert "kl_sum" not in said, "the same number, times the size of a latent"


def test_a_warm_up_that_is_longer_than_the_run_is_told(tmp_path, faces, capsys):
    train_vae.run(vae_settings(tmp_path / "a", faces, steps=2, warmup_steps=8))
    said = " ".join(capsys.readouterr().err.split())
    assert "note: --warmup-steps 8 is longer than this run of 2 steps: the learning rate ends at 0.00025, not" in said
    train_vae.run(vae_settings(tmp_path / "b", faces, steps=2, warmup_steps=2))
    assert "warmup" not in capsys.readouterr().err


def test_a_refused_start_leaves_no_empty_folder(tmp_path, faces):
    settings = vae_settings(tmp_path / "new" / "run", faces)
    refused = (
        with_changes(settings, images=with_changes(settings.images, data=(tmp_path / "none",))),
        with_changes(settings, freeze_encoder=True),
        with_changes(settings, init_from=tmp_path / "none.safetensors"),
        with_changes(settings, from_step=3),
    )
    for wrong in refused:
        with pytest.raises(UserError):
            train_vae.run(wrong)
        assert not (tmp_path / "new").exists()
    with pytest.raises(UserError):
        encode.run(EncodeSettings(run=tmp_path / "new" / "run"))
    assert not (tmp_path / "new").exists()


def test_a_run_folder_that_another_host_has_locked(tmp_path, faces):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/.lock").write_text("elsewhere 17\n")
    settings = vae_settings(tmp_path, faces)
    with pytest.raises(UserError, match=r"was locked by process 17 on elsewhere.*--force-unlock"):
        train_vae.run(settings)
    train_vae.run(with_changes(settings, job=JobSettings(force_unlock=True)))


def test_init_from_starts_at_another_runs_weights(tmp_path, faces):
    train_vae.run(vae_settings(tmp_path / "first", faces, ema_decay=()))
    more = with_changes(
        vae_settings(tmp_path / "second", faces, ema_decay=(), steps=1, lr=1e-12), init_from=tmp_path / "first"
    )
    train_vae.run(more)
    old, new = (
        Checkpoint(tmp_path / name / "vae/checkpoints/last.safetensors").weights() for name in ("first", "second")
    )
    for name in old:
        torch.testing.assert_close(new[name], old[name], rtol=0, atol=1e-6)
    misfit = with_changes(
        vae_settings(tmp_path / "third", faces), model=VAESettings(encoder_width=16), init_from=tmp_path / "first"
    )
    with pytest.raises(UserError, match="does not fit this architecture"):
        train_vae.run(misfit)


def test_images_that_vanish_or_break_in_mid_run(tmp_path, faces, monkeypatch):
    """Below --max-bad others stand in for them and the report names them; above it, the run stops."""
    step = Trainer.train_step

    def harming(folder):
        files = sorted(folder.rglob("*.png"))

        def stepping(self, batch):
            if self.step == 2:
                files[0].unlink()
                files[1].write_bytes(b"no picture any more")
                files[2].write_bytes(files[3].read_bytes())  # changed, but an image
            return step(self, batch)

        return stepping

    for name in ("tolerated", "stopped"):
        shutil.copytree(faces, tmp_path / name)
    tolerant = vae_settings(tmp_path / "a", tmp_path / "tolerated", steps=20)
    tolerant = with_changes(tolerant, images=with_changes(tolerant.images, max_bad=0.2))
    monkeypatch.setattr(Trainer, "train_step", harming(tmp_path / "tolerated"))
    train_vae.run(tolerant)
    report = (tmp_path / "a/vae/bad-files.txt").read_text().splitlines()
    assert len(report) == 2
    monkeypatch.setattr(Trainer, "train_step", harming(tmp_path / "stopped"))
    with pytest.raises(RunError, match=r"of 24 images .* cannot be read, more than --max-bad 0.01"):
        train_vae.run(vae_settings(tmp_path / "b", tmp_path / "stopped", steps=20))


def test_epochs_count_passes_over_the_training_images(tmp_path, faces):
    train_vae.run(vae_settings(tmp_path, faces, epochs=2))
    metadata = Checkpoint(tmp_path / "vae/checkpoints/last.safetensors").metadata
    trained = sum(1 for _ in faces.rglob("*.png")) - round_val(faces)
    assert metadata.step == max(1, round(2 * trained / 6))


def round_val(faces):
    from tests.image_files import scan

    return sum(f.split == "val" for f in scan((faces,), 0.2))


def test_an_empty_validation_set_makes_best_the_last(tmp_path, faces):
    settings = vae_settings(tmp_path, faces, steps=4)
    settings = with_changes(settings, images=with_changes(settings.images, val_share=0))
    train_vae.run(settings)
    last, best = (Checkpoint(tmp_path / f"vae/checkpoints/{name}.safetensors") for name in ("last", "best"))
    assert best.metadata.step == last.metadata.step == 4
    assert best.weights().keys() == last.weights().keys()
    assert all(torch.equal(w, last.weights()[n]) for n, w in best.weights().items())


@pytest.mark.slow
def test_a_vae_learns_eight_faces_by_heart(tmp_path, faces):
    settings = vae_settings(
        tmp_path, faces, steps=250, batch_size=8, micro_batch=0, val_every=0, save_every=250, lr=3e-3
    )
    few = tmp_path / "few"
    draw_dataset(few, 8, 0, 16)
    images = ImageSettings(data=(few,), resolution=16, val_share=0, random_crop=1, flip=False)
    model = VAESettings(encoder_width=16, decoder_width=16, latent_channels=8)
    train_vae.run(with_changes(settings, images=images, model=model, loss=VAELossSettings(lpips_gamma=0, kl_beta=0)))
    rows = lines(tmp_path / "vae/metrics.jsonl")
    assert rows[-1]["mse"] < 0.1 * rows[0]["mse"]
