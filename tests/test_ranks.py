"""Several processes do what one does: shares, sums, both trainings, and the stages between them. Over gloo, on CPU."""

import contextlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.index import read_index
from lightdiff.data.latents import LatentSet
from lightdiff.errors import UserError
from lightdiff.extras.several.group import check_env, explain_lost_contact, for_this_start, wrap_ddp
from lightdiff.extras.several.worker import LostContact, first_host
from lightdiff.extras.toy_faces import draw_dataset
from lightdiff.models.unet import build_unet
from lightdiff.models.vae import build_vae
from lightdiff.run_folder import RunFolder
from lightdiff.runtime import DistEnv, rank
from lightdiff.runtime.processes import Processes, autocast
from lightdiff.settings import EncodeSettings, StageSettings, TrainVAESettings, UNetSettings, VAESettings
from tests.bench import many

HOME = Path(__file__).parent.parent


def free_port() -> int:
    """A port that nobody has: each of pytest's workers looks among some of its own, below those given out at will."""
    first = 20_000 + 1000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for port in random.sample(range(first, first + 1000), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port
    raise AssertionError("no port is free")


TORCH = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SLURM = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")


def run_many(job: str, folder: Path, size: int, launcher: tuple[str, ...] = TORCH) -> list[str]:
    """Run tests/bench/many.py in `size` processes; what each wrote to stderr."""
    shared = os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.bench.many", job, str(folder)],
            cwd=HOME,
            env=shared
            | dict(zip(launcher, map(str, (size, number, number, size)), strict=True))
            | {"TORCHELASTIC_RESTART_COUNT": str(number)},  # agents with a store for each attempt count differently
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(size)
    ]
    said = [process.communicate(timeout=600)[1] for process in processes]
    for number, process in enumerate(processes):
        assert process.returncode == 0, f"process {number} of {size}:\n{said[number]}"
    return said


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """All stages in one process, in float32, and both trainings in float64."""
    folder = tmp_path_factory.mktemp("one")
    draw_dataset(folder / "faces", 20, 0, 16)
    run_many("pipeline", folder, 1)
    run_many("float64", folder, 1)
    return folder


@pytest.fixture(scope="module", params=[2, 3])
def several(one, request, tmp_path_factory):
    """The same in 2 and in 3 processes."""
    folder = tmp_path_factory.mktemp(f"several-{request.param}")
    shutil.copytree(one / "faces", folder / "faces")
    run_many("pipeline", folder, request.param)
    return folder


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("size", [2, 3])
def test_in_float64_both_trainings_are_those_of_one_process(one, tmp_path, size):
    """20 steps, micro-batches of 2 in a batch of 7: equal but for the order of additions."""
    shutil.copytree(one / "faces", tmp_path / "faces")
    shutil.copytree(one / "run", tmp_path / "run")
    run_many("float64", tmp_path, size)
    for stage in ("vae", "unet"):
        straight, shared = one / "double-1" / stage, tmp_path / f"double-{size}" / stage
        a, b = (Checkpoint(folder / "checkpoints/last.safetensors") for folder in (straight, shared))
        for name in a.names():
            torch.testing.assert_close(b.tensor(name), a.tensor(name), rtol=1e-8, atol=1e-9)
        for left, right in zip(rows(straight / "metrics.jsonl"), rows(shared / "metrics.jsonl"), strict=True):
            for name in left.keys() - {"time", "images_per_s", "memory_mb"}:
                assert right[name] == pytest.approx(left[name], rel=1e-9), (stage, left["step"], name)


def test_muon_is_that_of_one_process_bit_for_bit_and_the_same_in_all(tmp_path):
    """Each orthogonalizes a share of the matrices; some have none of a size."""
    many.muon(tmp_path, Processes())
    run_many("muon", tmp_path, 3)
    alone, *others = (torch.load(tmp_path / f"muon-{name}.pt") for name in ("0-of-1", "0-of-3", "1-of-3", "2-of-3"))
    assert all(torch.isfinite(value).all() for value in alone.values())
    for other in others:
        assert other.keys() == alone.keys()
        assert [name for name, value in alone.items() if not torch.equal(other[name], value)] == []


def test_in_float32_losses_and_weights_agree_closely(one, several):
    """Losses to 1e-4 of their size, and 99 % of the weights to half a step of the learning rate, after 20 steps."""
    for stage in ("vae", "unet"):
        left, right = (rows(folder / "run" / stage / "metrics.jsonl") for folder in (one, several))
        assert [row["step"] for row in right] == list(range(1, 21))
        for a, b in zip(left, right, strict=True):
            for name in (name for name in a if name.endswith("loss")):
                assert b[name] == pytest.approx(a[name], rel=1e-4), (stage, a["step"], name)
        a, b = (
            Checkpoint(RunFolder(folder / "run").path / stage / "checkpoints/last.safetensors")
            for folder in (one, several)
        )
        for name, value in a.tensors("model.").items():
            # where a gradient is nearly 0, its sign, and with it AdamW's first steps, hang on the order of a sum
            apart = (b.tensors("model.")[name] - value).abs()
            assert float((apart > 5e-4).double().mean()) < 0.01, name
            assert float(apart.max()) < 2e-3, name


def test_each_validation_image_counts_once(one, several):
    """The mean over 5 images in shares of 2 and 3, or 1, 2 and 2, is the mean over all."""
    held_out = read_index(RunFolder(one / "run").latents).of_split("val")
    assert held_out.sum() % 2 == 1  # else shares would be even, and a mean of means right by chance
    a, b = (rows(folder / "run/vae/metrics.jsonl")[9] for folder in (one, several))
    for name in (name for name in a if name.startswith("val_")):
        assert b[name] == pytest.approx(a[name], rel=1e-4)


def test_latents_and_their_statistics_agree(one, several):
    a, b = (LatentSet(RunFolder(folder / "run").latents) for folder in (one, several))
    assert a.index.list_digest() == b.index.list_digest()
    assert (a.train, a.val) == (b.train, b.val)
    everything = a.train + a.val
    for left, right in zip(a.gather(everything), b.gather(everything), strict=True):
        torch.testing.assert_close(right, left, rtol=0, atol=2e-2)  # the VAEs differ a little, float16 rounds
    assert b.index.statistics.count == a.index.statistics.count
    assert b.index.statistics.channel_std == pytest.approx(a.index.statistics.channel_std, rel=1e-3)


def test_images_agree(one, several):
    names = [f"{i:05d}.png" for i in range(7)] + ["grid.png"]
    assert sorted(path.name for path in (several / "out").glob("*.png")) == names
    for name in names:
        a, b = (np.asarray(Image.open(folder / "out" / name)).astype(int) for folder in (one, several))
        assert np.abs(a - b).max() <= 1, name


def test_uneven_shares_and_no_validation_images(one, tmp_path):
    shutil.copytree(one / "faces", tmp_path / "faces")
    said = run_many("corners", tmp_path, 3)
    metadata = Checkpoint(RunFolder(tmp_path / "run").vae.last).metadata
    assert metadata.step == 5
    assert metadata.images_seen == 3 * 2 + 2 * 4
    assert "3 processes on cpu" in " ".join(said[0].split())
    assert "processes" not in said[1]  # one speaks for all


def test_what_the_first_process_refuses_all_refuse(one, tmp_path):
    shutil.copytree(one / "faces", tmp_path / "faces")
    draw_dataset(tmp_path / "other", 21, 1, 16)
    run_many("refused", tmp_path, 2, SLURM)
    for name, words in (("refused", "was locked by process 17 on elsewhere"), ("differs", "another list of images")):
        said = [(tmp_path / f"{name}-{rank}").read_text() for rank in (0, 1)]
        assert said[0] == said[1]
        assert words in said[0]


def test_a_snapshot_that_cannot_be_written_ends_all_processes(tmp_path):
    draw_dataset(tmp_path / "faces", 20, 0, 16)
    run_many("full_disk", tmp_path, 2)
    said = [(tmp_path / f"full-{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert "last.safetensors could not be written: No space left on device; what was saved before is" in said[0]


def test_stages_in_turn_meet_again_under_torchs_agent(tmp_path):
    draw_dataset(tmp_path / "faces", 12, 0, 16)
    agent = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [sys.executable, "-m", *agent, "-m", "tests.bench.many", "in_turn", str(tmp_path)]
    done = subprocess.run(words, cwd=HOME, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert Checkpoint(RunFolder(tmp_path / "run").vae.last).metadata.step == 3


# --- who is who -----------------------------------------------------------------------------------------------------


@given(count=st.integers(0, 100), size=st.integers(1, 12))
def test_shares_cover_everything_once_and_evenly(count, size):
    shares = [Processes(rank, size).share(count) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    dealt = [Processes(rank, size).strided(range(count)) for rank in range(size)]
    assert sorted(i for items in dealt for i in items) == list(range(count))
    parts = [list(range(count))[Processes(rank, size).batch_slice(count)] for rank in range(size)]
    assert all(parts) or not count


def test_alone_nothing_travels():
    alone = Processes()
    value = torch.ones(2)
    assert alone.all_reduce_sum(value) is value
    assert alone.all_true(value) is value
    assert alone.all_reduce_max(3, 4) == [3, 4]
    assert alone.run_on_main(lambda: 5) == 5
    alone.check_same("anything", 1)


@pytest.fixture
def group_of_one():
    """Torch's process group with this process alone in it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("family", ["vae", "unet"])
def test_gradients_of_1_x_1_convolutions_lie_as_ddp_wants_them(family, precision, layout):
    """Else it warns, and a warning is an error here."""
    if family == "vae":
        model = build_vae(VAESettings(encoder_width=32, decoder_width=32).resolved(16))
        inputs = torch.zeros(2, 3, 16, 16), torch.zeros(2, 4, 8, 8)
    else:
        model = build_unet(UNetSettings(width=32, blocks=1).resolved(8), 4)
        inputs = torch.zeros(2, 4, 8, 8), torch.zeros(2)
    network = wrap_ddp(model.to(memory_format=layout))
    for _ in range(2):
        with autocast(torch.device("cpu"), precision):
            out = network(*inputs)
        (out if family == "unet" else out[0].sum() + torch.cat(out[1]).mean()).mean().backward()


def test_torchs_variables_and_slurms():
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert DistEnv.from_env(torchrun | {"MASTER_ADDR": "a", "MASTER_PORT": "77"}) == DistEnv(5, 8, 1, 4, "a", "77")
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "123456", "SLURM_LOCALID": "0"}
    assert DistEnv.from_env(batch) == DistEnv()  # a batch script is no step
    step = batch | {"SLURM_PROCID": "6", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "2"}
    step |= {"SLURM_STEP_NODELIST": "gpu[007-008]", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
    assert DistEnv.from_env(step) == DistEnv(6, 8, 2, 4, "gpu007", str(20000 + 123456 % 20000))
    assert DistEnv.from_env({}) == DistEnv()


@pytest.mark.parametrize(
    "left_over",
    [
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "tcp://10.0.0.1:7077"},  # Kubernetes' of a service `master`
        {"RANK": "3", "WORLD_SIZE": "1"},
        {"RANK": "3"},
        {"RANK": "", "WORLD_SIZE": ""},
        {"RANK": "none", "WORLD_SIZE": "one"},
        {"SLURM_PROCID": "3", "SLURM_JOB_ID": "12_3"},
        {"WORLD_SIZE": "8"},
    ],
)
def test_variables_left_over_from_others_do_not_disturb_a_lone_process(monkeypatch, left_over):
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    assert DistEnv.from_env(os.environ).world_size == 1
    assert rank() == 0


@pytest.mark.parametrize("port", ["tcp://10.0.0.1:7077", "0", "-1", "65536", "1e4", "9" * 5000, "\N{SUPERSCRIPT TWO}"])
def test_a_port_that_is_none_is_refused_by_its_name(port):
    with pytest.raises(UserError, match=r"^MASTER_PORT=.* is no port: all processes need the same number up to 65535$"):
        check_env(DistEnv(0, 2, port=port))
    check_env(DistEnv(1, 2, port="65535"))
    with pytest.raises(UserError, match="process number 2 of 2: RANK has to be less than WORLD_SIZE"):
        check_env(DistEnv(2, 2))


def meet(tmp_path: Path, **environment: str) -> str:
    """What a lone training says that by its environment is one of two."""
    shared = os.environ | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    words = ["train-vae", "--data", tmp_path, "--run", tmp_path / "run", "--timeout", 2, "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "lightdiff", *map(str, words)],
        env=shared | {"PYTHONPATH": str(HOME)} | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert not (tmp_path / "run").exists()
    return done.stderr


@pytest.mark.slow
def test_processes_that_do_not_meet_say_by_which_variables_they_waited(tmp_path):
    port = str(free_port())
    for number in (0, 1):
        said = meet(tmp_path, MASTER_PORT=port, RANK=str(number))
        assert said.count("\n") == 1, said
        named = f"RANK={number}, WORLD_SIZE=2, MASTER_ADDR=localhost, MASTER_PORT={port}"
        assert re.search(rf"have not met within \d+ s \(.+\): by {named}, this is process {number} of 2\. ", said), said
        assert "unset RANK WORLD_SIZE" in said
    said = meet(tmp_path, MASTER_ADDR="no-such-host.invalid")
    assert said.count("\n") == 1, said
    assert "MASTER_ADDR=no-such-host.invalid: this machine knows no host of that name" in said
    with socket.socket() as other:
        other.bind(("localhost", int(port)))
        other.listen()
        assert f"MASTER_PORT={port} is taken on this machine: choose another one" in meet(tmp_path, MASTER_PORT=port)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("node7", "node7"), ("a1,a2", "a1"), ("n[01-04,07]", "n01"), ("n[3,5]", "n3"), ("", "")],
)
def test_the_first_of_slurms_hosts(hosts, first):
    assert first_host(hosts) == first


def test_errors_of_lost_contact_are_explained_and_others_left_alone(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LostContact, match=r"process 1 has lost contact with the others \(Connection closed by peer"):
        with explain_lost_contact(StageSettings()):
            raise RuntimeError("[/pytorch/gloo/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:1234\nmore")
    with pytest.raises(RuntimeError, match="shape mismatch"), explain_lost_contact(StageSettings()):
        raise RuntimeError("shape mismatch")


def test_one_of_several_leaves_at_once_after_an_error():
    """Not by the interpreter's own end, which threads of the group may abort; here, an object's end does that."""
    job = """
import atexit, os
from lightdiff import cli

class Threads:
    def __del__(self):
        os.abort()

threads = Threads()
atexit.register(print, "told at the exit")
cli.main()
"""
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    for world in (1, 2):
        done = subprocess.run(
            [sys.executable, "-c", job, "scale", "--only-mi"],
            env=alone | {"PYTHONPATH": str(HOME), "RANK": "0", "WORLD_SIZE": str(world)},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert (done.returncode == 2) == (world == 2), done.stderr
        assert done.stdout == "told at the exit\n"
        assert done.stderr.startswith("error: No such option: --only-mi")


@pytest.mark.parametrize("settings", [EncodeSettings(restart=True), TrainVAESettings(restart=True, from_step=3)])
def test_a_restarted_process_forgets_what_is_for_the_first_start(monkeypatch, settings):
    assert for_this_start(settings, "--restart") == settings
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert for_this_start(settings, "--restart") == type(settings)()
