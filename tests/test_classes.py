"""Labels from folders and tables, a U-Net that is told them, and what `generate --class` makes of it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import UNET_FLAGS, VAE_FLAGS, succeed
from PIL import Image

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.files import list_images
from lightdiff.data.index import read_index
from lightdiff.data.latents import LatentSet, latents_settings
from lightdiff.errors import UserError
from lightdiff.options import build
from lightdiff.pipeline import Pipeline
from lightdiff.runtime.processes import Processes
from lightdiff.runtime.progress import console
from lightdiff.runtime.stage import Stage
from lightdiff.settings import ImageSettings, LatentsSettings, SamplingSettings, TrainUNetSettings
from lightdiff.stages import train_unet
from lightdiff.stages.generate import check
from tests.image_files import scan

COLOURS = {"blue": (20, 40, 200), "orange": (240, 150, 20)}


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Two classes: images of one colour or the other, with a little noise."""
    folder, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir()
        for i in range(12):
            pixels = np.clip(np.array(colour) + rng.normal(0, 12, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, colours):
    """Their latents, with statistics."""
    run = tmp_path_factory.mktemp("run")
    succeed("train-vae", "--run", run, "--data", colours, *VAE_FLAGS, "--steps", 60, "--lr", "1e-2", "--kl-beta", 1e-2)
    succeed("encode", "--run", run, "--workers", 0, "--device", "cpu")
    succeed("scale", "--run", run)
    return run


@pytest.fixture(scope="module")
def told(encoded):
    """The same with a U-Net that is told the class."""
    flags = [
        *UNET_FLAGS,
        "--label",
        "class",
        "--label-dropout",
        0.2,
        "--objective",
        "flow",
        "--steps",
        300,
        "--batch-size",
        24,
        "--lr",
        "3e-3",
    ]
    succeed("train-unet", "--run", encoded, *flags, "--val-every", 0, "--save-every", 300)
    return encoded


# --- tables -------------------------------------------------------------------------------------------------------


def table(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n")
    return path


def test_a_table_gives_labels(colours, tmp_path):
    csv = table(tmp_path / "t.csv", "file,label,size", "blue/00.png,sky,big", "orange\\01.png,fruit,", "none.png,x,y")
    labels = {file.path: file.labels for file in scan([colours], 0, table=csv) if file.labels}
    assert labels == {"blue/00.png": {"label": "sky", "size": "big"}, "orange/01.png": {"label": "fruit"}}


def test_a_tables_index_is_no_label_and_spaces_are_no_part_of_a_name(colours, tmp_path):
    csv = table(tmp_path / "t.csv", ",file, age", "0, ./blue/00.png, young", "1,blue/01.png ,old ")
    labels = {file.path: file.labels for file in scan([colours], 0, table=csv) if file.labels}
    assert labels == {"blue/00.png": {"age": "young"}, "blue/01.png": {"age": "old"}}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["path,label", "blue/00.png,sky"], "has no column file"),
        (["file", "blue/00.png"], "has no column but file"),
        (["file,label", "blue/00.png,sky", "./blue/00.png,sea"], "names ./blue/00.png again, with different labels"),
        (["file,label", "nothing.png,sky"], r"names no image of .*it has nothing.png, there is blue/00.png"),
    ],
)
def test_a_table_that_helps_nobody_is_refused(colours, tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        scan([colours], 0, table=table(tmp_path / "t.csv", *rows))


def test_images_without_a_label_are_counted(colours, tmp_path, capsys):
    csv = table(tmp_path / "t.csv", "file,label", "blue/00.png,sky", "blue/00.png,sky")
    list_images(ImageSettings(data=(colours,), labels=csv), console)
    assert "note: 23 of 24 images have no label" in " ".join(capsys.readouterr().err.split())
    list_images(ImageSettings(data=(colours,)), console)
    assert "label" not in capsys.readouterr().err


def test_a_table_that_is_not_there_is_told(colours, tmp_path):
    with pytest.raises(UserError, match=r"cannot be read: .*No such file"):
        scan([colours], 0, table=tmp_path / "t.csv")


def test_a_tables_labels_reach_the_latents(colours, tmp_path):
    csv = table(tmp_path / "t.csv", "file,tone", *(f"{c}/{i:02d}.png,{c[0]}" for c in COLOURS for i in range(12)))
    run = tmp_path / "run"
    succeed("train-vae", "--run", run, "--data", colours, "--labels", csv, *VAE_FLAGS)
    succeed("encode", "--run", run, "--workers", 0)
    succeed("scale", "--run", run)
    assert latents_settings(run / "latents").labels == {"tone": ("b", "o")}


# --- training -----------------------------------------------------------------------------------------------------


def task_of(run: Path, **changes) -> train_unet.UNetTask:
    layer = {"run": run, "label": "class", "loop": {"batch_size": 2000, "precision": "fp32"}, **changes}
    settings = build(
        TrainUNetSettings, [train_unet.inherited(run, None), {"model": {"width": 16, "zero_init": False}}, layer]
    ).resolved()
    stage = Stage("unet", settings, torch.device("cpu"), Processes(), run / "unet")
    return train_unet.UNetTask(stage, LatentSet(run / "latents"))


def test_labels_are_forgotten_as_often_as_asked_for(encoded):
    task = task_of(encoded, label_dropout=0.25)
    batch = next(task.batches(0, 1))
    label = task.prepare(batch, torch.Generator().manual_seed(0))["label"]
    assert float((label == 2).double().mean()) == pytest.approx(0.25, abs=0.04)  # four standard errors of 2,000
    kept = label != 2
    assert label[kept].equal(batch[1][kept])
    names = task.names(0)
    assert [COLOURS_OF[name.split("/")[0]] for name in names] == batch[1].tolist()


COLOURS_OF = {"blue": 0, "orange": 1}


def test_validation_tells_each_image_its_class(encoded):
    task, told = task_of(encoded, loop={"batch_size": 3, "micro_batch": 3, "precision": "fp32"}), []

    class Listening(torch.nn.Module):
        def forward(self, x_t, t, label):
            told.extend(label.tolist())
            return x_t

    task.validate(Listening())
    files = [task.latents.index.name(position) for position in task.latents.val]
    classes = [COLOURS_OF[path.split("/")[0]] for path in files]
    assert sorted(told) == sorted(4 * classes)  # at one level of each of four bands
    assert set(classes) == {0, 1}


def test_a_network_without_a_label_is_one_for_no_known_class(encoded):
    task = task_of(encoded)
    x, t = torch.randn(3, 4, 4, 4), torch.tensor([3, 500, 900])
    torch.testing.assert_close(task.model(x, t), task.model(x, t, torch.full((3,), 2)))
    assert not torch.allclose(task.model(x, t), task.model(x, t, torch.tensor([0, 1, 0])))


def test_what_a_label_says_of_itself(told):
    saved = Checkpoint(told / "unet/checkpoints/last.safetensors").settings(TrainUNetSettings)
    assert (saved.label, saved.classes) == ("class", ("blue", "orange"))


@pytest.mark.parametrize(("name", "message"), [("kind", "--label kind: the latents have class")])
def test_a_label_that_is_not_there_lists_those_that_are(encoded, cli, name, message):
    assert message in cli("train-unet", "--run", encoded, "--label", name, *UNET_FLAGS).err


def test_latents_without_labels_are_told():
    with pytest.raises(UserError, match="--label class: the latents have no labels"):
        build(TrainUNetSettings, [{"label": "class"}])


def test_labels_that_nobody_asked_for_are_mentioned(encoded, tmp_path, cli):
    result = cli("train-unet", "--run", tmp_path / "run", "--latents", encoded, *UNET_FLAGS)
    assert "--label class" in result.err


# --- generating ---------------------------------------------------------------------------------------------------


def mean_colour(x: torch.Tensor) -> list[float]:
    return ((x.mean((0, 2, 3)) + 1) * 127.5).tolist()


def nearest(x: torch.Tensor) -> list[str]:
    """Which of the colours each image is nearest to."""
    colours = torch.tensor(list(COLOURS.values())) / 127.5 - 1
    distance = (x.mean((2, 3))[:, None] - colours).norm(dim=2)
    return [list(COLOURS)[i] for i in distance.argmin(1).tolist()]


def test_a_class_is_drawn_as_asked_for(told):
    model = Pipeline.load(told, device="cpu")
    for name in COLOURS:
        x = model.decode(model.sample(16, 0, SamplingSettings(num_steps=10, class_=(name,), guidance=2.0)))
        assert nearest(x).count(name) >= 15
    turns = nearest(
        model.decode(model.sample(16, 0, SamplingSettings(num_steps=10, class_=tuple(COLOURS), guidance=2.0)))
    )
    assert sum(found == list(COLOURS)[i % 2] for i, found in enumerate(turns)) >= 15


def test_guidance_of_1_is_the_class_alone_and_of_0_none(told):
    model = Pipeline.load(told, device="cpu")
    how = SamplingSettings(num_steps=4, class_=("blue",), guidance=0.0)
    torch.testing.assert_close(
        model.sample(3, 0, how), model.sample(3, 0, SamplingSettings(num_steps=4)), rtol=0, atol=2e-4
    )  # float32


def test_a_class_of_images_held_out_alone_is_none(encoded, tmp_path):
    folder = tmp_path / "latents"
    shutil.copytree(encoded / "latents", folder)
    index = read_index(folder)
    held_out = index.of_split("val")
    index.labels["class"].append("rare")
    index.codes[0, held_out] = len(index.labels["class"]) - 1
    index.write(folder / "index.safetensors")
    settings = latents_settings(folder)
    assert settings.labels["class"] == tuple(sorted(COLOURS))
    told = index.classes("class", settings.labels["class"])
    assert set(told[held_out].tolist()) == {2}  # as without a label


def test_a_network_that_never_drew_without_a_class_says_so(encoded, tmp_path):
    run = tmp_path / "run"
    flags = ["--latents", encoded, "--label", "class", "--label-dropout", 0]
    succeed("train-unet", "--run", run, *UNET_FLAGS, *flags)
    drawn = ["generate", "--run", run, "--num-images", 1, "--num-steps", 2, "--device", "cpu"]
    said = "trained with --label-dropout 0"
    assert said in " ".join(succeed(*drawn).err.split())
    assert said in " ".join(succeed(*drawn, "--class", "blue", "--guidance", 2).err.split())
    assert said not in " ".join(succeed(*drawn, "--class", "blue").err.split())


def test_a_network_that_is_never_told_a_label_is_not_trained(encoded, tmp_path, cli):
    flags = ["--latents", encoded, "--label", "class", "--label-dropout", 1]
    refused = cli("train-unet", "--run", tmp_path / "run", *UNET_FLAGS, *flags)
    assert refused.code == 2
    assert "--label-dropout 1 hides every label from the network: try 0.1, or leave --label out" in refused.err
    assert not (tmp_path / "run").exists()


def test_one_that_was_says_so_when_asked_for_a_class(told, capsys):
    model = Pipeline.load(told, device="cpu")
    model.settings = model.settings.model_copy(update={"label_dropout": 1.0})
    check(model, SamplingSettings(class_=("blue",)), 1.0)
    assert "--label-dropout 1, so it knows no class from another" in " ".join(capsys.readouterr().err.split())
    check(model, SamplingSettings(), 1.0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["", " ", "blue,", ",", '""'])
def test_an_empty_name_of_a_class_is_refused(told, tmp_path, cli, name):
    for command in ("generate", "trajectory"):
        drawn = ["--run", told, "--num-steps", 2, "--device", "cpu", "--out", tmp_path / "out"]
        refused = cli(command, *drawn, "--class", name)
        assert refused.code == 2
        assert "--class: a name is empty; to sample any class, leave it out" in refused.err
    assert not (tmp_path / "out").exists()


def test_samples_settings_draw_the_same_again(told, tmp_path):
    flags = ["--run", told, "--num-images", 2, "--device", "cpu"]
    chosen = ["--class", "orange", "--guidance", 1.5, "--num-steps", 3, "--seed", 5]
    succeed("generate", *flags, *chosen, "--out", tmp_path / "a")
    succeed("generate", *flags, "--settings", tmp_path / "a/settings.json", "--out", tmp_path / "b")
    for name in ("00000.png", "00001.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_guidance_is_used_in_its_share_of_the_levels_of_noise():
    settings = TrainUNetSettings(label="class", latent=LatentsSettings(labels={"class": tuple(COLOURS)}))
    calls = {}

    def network(x_t, t, label):
        calls[int(t[0])] = label.tolist()
        return x_t

    asked = SamplingSettings(num_steps=10, class_=("orange", "blue"), guidance=2.0, guidance_interval=(0.15, 0.55))
    Pipeline(None, None, network, settings, torch.device("cpu")).sample(3, 0, asked)
    assert list(calls) == list(range(999, 0, -100))  # sigma is (t + 1) / 1000
    within = {t for t, labels in calls.items() if labels == [1, 0, 1, 2, 2, 2]}
    assert within == {499, 399, 299, 199}
    assert all(labels == [1, 0, 1] for t, labels in calls.items() if t not in within)


def test_images_of_a_class_by_the_command_line(told, cli, tmp_path):
    flags = ["--run", told, "--num-images", 4, "--num-steps", 3, "--device", "cpu", "--out", tmp_path / "out"]
    succeed("generate", *flags, "--class", "orange,blue", "--guidance", 1.5, "--guidance-interval", "0.2,0.9")
    about = json.loads((tmp_path / "out/settings.json").read_text())
    assert about["settings"]["sampling"]["class_"] == ["orange", "blue"]
    with Image.open(tmp_path / "out/grid.png") as grid:
        shown = np.asarray(grid.convert("RGB"))
    for i in range(4):  # a row for each class
        with Image.open(tmp_path / f"out/{i:05d}.png") as image:
            row, column = i % 2, i // 2
            place = shown[66 * row :, 66 * column :][:64:4, :64:4]  # 16 px, enlarged
            np.testing.assert_array_equal(place, np.asarray(image.convert("RGB")))
    again = cli("generate", *flags, "--class", "blue")
    assert (again.code, "--class" in again.err) == (2, True)


def test_a_walk_between_classes_is_refused(told, cli):
    result = cli("walk", "--run", told, "--device", "cpu", "--class", "blue,orange", "--between", "0,1")
    assert (result.code, "a walk stays within one --class" in result.err) == (2, True), result.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--class", "green"], "this U-Net knows no green; it knows blue, orange"),
        (["--class", "none"], "this U-Net knows no none; it knows blue, orange"),
        (
            ["--guidance", "2"],
            "--guidance needs a --class to guide to, or a worse U-Net to guide away from: there is no ",
        ),
        (["--class", "blue", "--guidance-interval", "0.9,0.2"], "--guidance-interval: two numbers from 0 to 1"),
    ],
)
def test_classes_that_make_no_sense_are_refused(told, cli, flags, message):
    result = cli("generate", "--run", told, "--device", "cpu", *flags)
    assert (result.code, message in result.err) == (2, True), result.err


def test_a_network_that_was_told_nothing_says_so(run, cli):
    result = cli("generate", "--run", run, "--device", "cpu", "--class", "blue")
    assert (result.code, "it was trained without --label" in result.err) == (2, True)


def test_going_on_with_another_label_is_refused(told, tmp_path, cli):
    copy = Path(shutil.copytree(told, tmp_path / "run"))
    result = cli("train-unet", "--run", copy, "--label", "", "--steps", 310)
    assert (result.code, "--label" in result.err) == (2, True)
