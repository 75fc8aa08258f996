"""Batches of images: the same whatever the workers; what stands in for an unreadable image; workers that end."""

import itertools
import multiprocessing
import pickle
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from image_files import dataset, listed, picture

from lightdiff.data.bad_files import BadFiles
from lightdiff.data.files import ImageFile
from lightdiff.data.images import frame, load_image
from lightdiff.data.loading import ImageDataset, load_batches
from lightdiff.errors import RunError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight good images, 0.png to 7.png."""
    for i in range(8):
        picture(40, 30, i).save(tmp_path / f"{i}.png")
    return tmp_path


EIGHT = [f"{i}.png" for i in range(8)]


def test_augmentation_is_a_function_of_seed_epoch_and_index(folder: Path) -> None:
    data = dataset(folder, EIGHT, random_crop=0.7)
    first = {place: data[place].x for place in ((0, 0), (0, 1), (1, 0))}
    assert all(
        torch.equal(x, again) for place, x in first.items() if x is not None and (again := data[place].x) is not None
    )
    same = ImageDataset([ImageFile(0, "0.png", "train", {})] * 4, data.settings, seed=3, train=True)
    other = ImageDataset([ImageFile(0, "0.png", "train", {})] * 4, data.settings, seed=4, train=True)
    seen = [d[place].x for d in (same, other) for place in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len({x.numpy().tobytes() for x in seen if x is not None}) == 8


def test_validation_ignores_the_epoch_and_equals_the_frame(folder: Path) -> None:
    data = dataset(folder, EIGHT, train=False, random_crop=0.5)
    for epoch in (0, 1):
        x = data[epoch, 5].x
        assert x is not None
        assert x.equal(frame(load_image(folder / "5.png"), 16))


def test_training_and_validation_read_a_large_jpeg_at_the_same_scale(tmp_path: Path) -> None:
    picture(640, 480).save(tmp_path / "large.jpg")
    train, val = (dataset(tmp_path, ["large.jpg"], t, random_crop=1, flip=False) for t in (True, False))
    a, b = train[4, 0].x, val[0, 0].x
    assert a is not None
    assert b is not None
    assert a.equal(b)
    assert dataset(tmp_path, ["large.jpg"]).at_least == 32
    assert dataset(tmp_path, ["large.jpg"], random_crop=0.1).at_least == 160


def test_data_sets_can_be_sent_to_spawned_processes(folder: Path) -> None:
    data = dataset(folder, EIGHT)
    copy = pickle.loads(pickle.dumps(data))
    a, b = data[2, 3].x, copy[2, 3].x
    assert a is not None
    assert a.equal(b)


def test_batches_are_the_same_whatever_the_workers(folder: Path) -> None:
    (folder / "2.png").write_text("bad")
    order = [[(0, 2), (0, 7)], [(0, 1), (1, 2), (1, 3)], [(1, 0)]]
    results = []
    for workers in (0, 2):
        global_state = torch.get_rng_state()
        results.append(list(load_batches(dataset(folder, EIGHT), order, workers)))
        assert torch.get_rng_state().equal(global_state)
    for plain, parallel in zip(*results, strict=True):
        assert plain.x.equal(parallel.x)
        assert plain.index.equal(parallel.index)
        assert (plain.bad, plain.missing) == (parallel.bad, parallel.missing)
    assert [batch.index.tolist() for batch in results[0]] == [[3, 7], [1, 3, 3], [0]]
    reason = "no image, or too damaged to be recognised"
    assert [batch.bad for batch in results[0]] == [[(2, reason)], [(2, reason)], []]


def test_an_endless_order_is_read_a_little_ahead_only(folder: Path) -> None:
    asked = []

    def order() -> Iterator[list[tuple[int, int]]]:
        for i in range(10**9):
            asked.append(i)
            yield [(i, i % 8)]

    stream = load_batches(dataset(folder, EIGHT), order(), workers=1)
    assert [next(stream).index.tolist() for _ in range(3)] == [[0], [1], [2]]
    assert len(asked) <= 3 + 2 + 1


# --- images that cannot be read -----------------------------------------------------------------------------------


def test_validation_leaves_bad_images_out(folder: Path) -> None:
    (folder / "0.png").write_text("bad")
    (folder / "1.png").write_text("bad")
    data = dataset(folder, EIGHT, train=False)
    assert data[0, 0].x is None
    some, none = load_batches(data, [[(0, 0), (0, 3)], [(0, 0), (0, 1)]], workers=0)
    assert (some.x.shape, some.index.tolist(), some.missing) == ((1, 3, 16, 16), [3], 1)
    assert (none.x.shape, none.x.dtype, none.index.tolist(), none.missing) == ((0, 3, 16, 16), torch.uint8, [], 2)
    assert [index for index, _ in none.bad] == [0, 1]
    assert data.collate([]).x.shape == (0, 3, 16, 16)


def test_the_next_image_stands_in_and_the_last_is_followed_by_the_first(folder: Path) -> None:
    for name in ("6.png", "7.png"):
        (folder / name).write_text("bad")
    item = dataset(folder, EIGHT)[0, 6]
    assert (item.index, [index for index, _ in item.bad]) == (0, [6, 7])
    assert item.x is not None


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_without_a_readable_image_ends_the_run(folder: Path, workers: int) -> None:
    for name in EIGHT:
        (folder / name).write_text("bad")
    with pytest.raises(RunError, match=r"3\.png cannot be read \(no image, .*\), nor can the 7 images after it"):
        next(load_batches(dataset(folder, EIGHT), [[(0, 3)]], workers))
    report = folder / "bad-files.txt"
    files = listed(EIGHT)
    bad = BadFiles(report, len(files), max_bad=0.5)
    with pytest.raises(RunError, match="8 of 8 images"):
        next(load_batches(dataset(folder, EIGHT), [[(0, 3)]], workers, lambda found: bad.add(files, found)))
    assert len(report.read_text().splitlines()) == 8


# --- workers ------------------------------------------------------------------------------------------------------


def test_workers_outlive_a_signal_to_all_and_end_with_their_batches(folder: Path) -> None:
    others = set(multiprocessing.active_children())
    data = dataset(folder, EIGHT, train=False)
    stream = load_batches(data, [[(0, i)] for i in range(8)], workers=1)
    found = [next(stream).x]
    workers = set(multiprocessing.active_children()) - others
    for worker in workers:
        subprocess.run(["sh", "-c", f"kill -INT {worker.pid}; kill -TERM {worker.pid}"], check=True)
    found += [batch.x for batch in stream]
    assert len(workers) == 1
    assert set(multiprocessing.active_children()) == others
    assert torch.cat(found).equal(torch.cat([batch.x for batch in load_batches(data, [[(0, i) for i in range(8)]], 0)]))


def run_program(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """What a program of its own does with `data`, the eight images."""
    before = f"""
        from pathlib import Path
        from lightdiff.data.loading import ImageDataset, ImageFile, ImageSettings, load_batches
        files = [ImageFile(0, f"{{i}}.png", "train", {{}}) for i in range(8)]
        images = ImageSettings(data=({str(folder)!r},), resolution=16)
        data = ImageDataset(files, images, seed=0, train=True)
        """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(before) + textwrap.dedent(code)],
        cwd=Path(__file__).parents[1], timeout=600, capture_output=True, text=True,
    )  # fmt: skip


def test_a_program_that_ends_in_the_middle_leaves_no_worker_and_does_not_hang(folder: Path) -> None:
    done = run_program(
        folder,
        """
        stream = load_batches(data, ([(i, i % 8)] for i in range(10**9)), workers=2)
        print(next(stream).index.tolist())
        """,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0]\n", "")


def test_a_dying_worker_is_told_when_its_batch_is_due_and_not_before(folder: Path) -> None:
    others = set(multiprocessing.active_children())
    stream = load_batches(dataset(folder, EIGHT), ([(i, 0)] for i in range(10**9)), workers=1)
    next(stream)
    (worker,) = set(multiprocessing.active_children()) - others
    worker.kill()
    worker.join()
    time.sleep(0.1)  # the time of a step, or of saving: nothing is raised here
    with pytest.raises(RunError, match=r"^loading images failed: DataLoader worker .*need memory, .*--workers 0"):
        list(itertools.islice(stream, 100))


@pytest.mark.skipif(sys.platform == "win32", reason="batches go through sockets with a path on POSIX alone")
def test_a_batch_that_a_worker_cannot_send_ends_the_run_instead_of_being_waited_for(folder: Path) -> None:
    # Job schedulers set TMPDIR to long paths; the path of a socket has at most 107 characters.
    done = run_program(
        folder,
        """
        import tempfile
        long = data.settings.data[0] / ("long" * 25)
        long.mkdir()
        tempfile.tempdir = str(long)
        next(load_batches(data, [[(0, 0)], [(0, 1)]], workers=1))
        """,
    )
    assert done.stderr.splitlines()[-1] == (
        "lightdiff.errors.RunError: loading images failed: AF_UNIX path too long (worker processes need memory, "
        "room in /dev/shm, open files (ulimit -n) and a short TMPDIR; --workers 0 does without them)"
    )
