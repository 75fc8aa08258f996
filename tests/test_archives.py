"""Archives as data: zip files and tar shards are read as the folders that they were made of."""

import io
import json
import os
import pickle
import random
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VAE_FLAGS
from PIL import Image

from lightdiff.checkpoint import Checkpoint
from lightdiff.data import files
from lightdiff.data.files import find_images, fingerprinters
from lightdiff.data.images import BadImage, load_image
from lightdiff.data.layouts import Names
from lightdiff.data.table import content_hash
from lightdiff.errors import UserError
from lightdiff.extras.data import archives, members
from lightdiff.extras.data.archives import SOURCE, Archive, open_archive
from lightdiff.run_folder import RunFolder
from tests.image_files import scan

Content = dict[str, bytes]


def picture(value: int = 0, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (12, 10), (value % 256, 7, 9)).save(stream, kind)
    return stream.getvalue()


def make_zip(path: Path, content: Content, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def make_tar(path: Path, content: Content, prefix: str = "") -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in content.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def content_of(folder: Path) -> Content:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    random.Random(0).shuffle(paths)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def names(found: list) -> list[str]:
    return [file.path for file in found]


# --- what a training sees -----------------------------------------------------------------------------------------


@pytest.fixture
def forms(faces: Path, tmp_path: Path) -> dict[str, Path]:
    """The same images as a folder and as archives of each kind."""
    content = content_of(faces)
    parts = [dict(list(content.items())[i::3]) for i in range(3)]
    for i, part in enumerate(parts):
        make_tar(tmp_path / f"shard-{i:03d}.tar", part)
    return {
        "folder": faces,
        "stored": make_zip(tmp_path / "stored.zip", content),
        "deflated": make_zip(tmp_path / "deflated.zip", content, zipfile.ZIP_DEFLATED),
        "tar": make_tar(tmp_path / "one.tar", content, "./"),
        "shards": tmp_path / "shard-*.tar",
    }


def weights(run: Path) -> dict[str, torch.Tensor]:
    return Checkpoint(RunFolder(run).vae.last, "vae").tensors("")


def test_each_form_of_the_same_images_trains_to_the_same_weights(cli, forms, tmp_path):
    made = {}
    for name, data in forms.items():
        flags = ("--run", tmp_path / name, *VAE_FLAGS, "--workers", 2 if name == "shards" else 0)
        if name == "deflated":  # stopped and resumed
            assert cli("train-vae", "--data", data, *flags, "--steps", 2, "--lr-schedule", "constant").code == 0
            done = cli("train-vae", *flags, "--steps", 3, "--lr-schedule", "constant")
            assert "resuming from step 2" in done.err
        else:
            done = cli("train-vae", "--data", data, *flags, "--lr-schedule", "constant")
        assert done.code == 0, done.stderr
        made[name] = weights(tmp_path / name)
    for name, found in made.items():
        assert found.keys() == made["folder"].keys()
        assert all(torch.equal(found[key], made["folder"][key]) for key in found), name


def test_latents_made_of_a_folder_are_those_of_its_archive(cli, forms, tmp_path):
    run = ("--run", tmp_path / "run")
    assert cli("train-vae", *run, "--data", forms["folder"], *VAE_FLAGS).code == 0
    encode = ("encode", *run, "--workers", 0, "--device", "cpu")
    assert cli(*encode).code == 0
    again = cli(*encode, "--data", forms["shards"])
    assert again.code == 0
    assert "has the latents of all 24 images already" in again.err  # by their contents
    content = content_of(forms["folder"])
    changed = content | {min(name for name in content if name.endswith(".png")): picture(200)}
    again = cli(*encode, "--data", make_zip(tmp_path / "changed.zip", changed))
    assert "1 changed, 0 added, 0 gone" in again.err


def test_archives_mix_with_folders(forms: dict[str, Path]) -> None:
    both = [forms["folder"], forms["stored"]]
    found = scan(both, 0.3)
    half = len(found) // 2
    assert names(found[:half]) == names(found[half:])
    assert [file.split for file in found[:half]] == [file.split for file in found[half:]]  # a hash of the name
    folder, archive = fingerprinters(both)
    name = found[0].path
    assert folder(name, True)[0::2] == archive(name, True)[0::2]  # size and hash
    assert archive("absent.png", True) == (-1, 0, bytes(16))


def test_an_archive_that_changes_while_it_is_read(forms: dict[str, Path]) -> None:
    path = forms["tar"]
    (name, *_) = names(scan([path], 0))
    os.utime(path, (1, 1))
    with pytest.raises(BadImage, match=r"^its archive has been changed since its list was made$"):
        load_image(name, folder=path, source=SOURCE)
    scan([path], 0)
    assert load_image(name, folder=path, source=SOURCE).size == (16, 16)


# --- what is listed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_what_systems_leave_in_archives_is_passed_over(make: Callable[..., Path], tmp_path: Path) -> None:
    suffix = make.__name__.removeprefix("make_")
    content = {name: picture() for name in ("a/b/1.png", "a/2.JPG", "./3.png", "/4.png", "../5.png")}
    content |= {
        name: b""
        for name in ("__MACOSX/a/._2.jpg", "__MACOSX/._a.png", ".git/x.png", "a/._2.jpg", "6.heif.txt", "a/.x")
    }
    content |= {"7.psd": b"8BPS", "notes.txt": b"none"}
    found = find_images([make(tmp_path / f"all.{suffix}", content)], 0)
    assert names(found.files) == ["3.png", "4.png", "a/2.JPG", "a/b/1.png"]
    assert found.passed_over == {"folder __MACOSX": 1, "hidden folder": 1, "hidden file": 1, ".psd": 1}


def test_a_pattern_names_all_that_fit(tmp_path: Path) -> None:
    for i in (1, 0):
        make_tar(tmp_path / f"s{i}.tar", {f"x/{i}{k}.png": picture() for k in range(2)})
    pattern = tmp_path / "s*.tar"
    assert names(scan([pattern], 0)) == ["x/00.png", "x/01.png", "x/10.png", "x/11.png"]
    make_tar(tmp_path / "s2.tar", {"x/00.png": picture(3)})  # one more of the same name
    found = names(scan([pattern], 0))
    assert found == ["x/s0:00.png", "x/s0:01.png", "x/s1:10.png", "x/s1:11.png", "x/s2:00.png"]
    assert load_image("x/s2:00.png", folder=pattern, source=SOURCE).getpixel((0, 0)) == (3, 7, 9)
    with pytest.raises(UserError, match=r"holds no image .*; for the archives in it: --data '.*/\*\.tar'$"):
        scan([tmp_path], 0)
    with pytest.raises(UserError, match=r"^--data: no file fits .*none-\*\.zip$"):
        scan([tmp_path / "none-*.zip"], 0)


class Pipe(io.BytesIO):
    """What cannot be sought in, so that sizes follow each member."""

    def seek(self, *_: object) -> int:
        raise OSError


@pytest.mark.parametrize("before", [b"", b"#!/bin/sh, and a program that unpacks what follows"])
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("file", [Pipe, io.BytesIO])
def test_a_zip_files_directory_is_read_as_pythons_zipfile_reads_it(
    before: bytes, large: bool, file: type[io.BytesIO], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:  # than numbers of 32 bits allow
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 40)
        monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    stream = file()
    with zipfile.ZipFile(stream, "w") as archive:
        for i, name in enumerate(("a.png", "folder/", "folder/\u00e9.png", "\u65e5.png", "code page/?.png")):
            member = zipfile.ZipInfo(name)
            member.comment, member.extra = b"a comment", b"\x99\x99\2\0ab"
            member.compress_type = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[i % 2]
            archive.writestr(member, os.urandom(60))
        archive.comment = before
    data = before + stream.getvalue().replace(b"code page/?", b"code page/\x82")
    assert (b"PK\6\6" in data) == large
    (tmp_path / "a.zip").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        found = [i for i in archive.infolist() if not i.is_dir()]
    assert found[-1].filename == "code page/\u00e9.png"
    wanted = [(i.filename, i.header_offset, i.compress_size, i.file_size, i.CRC) for i in found]
    assert list(members.members(archives.file_state(tmp_path / "a.zip"))) == wanted


@pytest.mark.parametrize(
    "names",
    [
        ["b/1.png", "a/2.png", "ab/1.png", "a/2.png", "B.png", "a.png"],
        ["é.png", "z.png", "a.png"],
        ["x" * 500, *map(str, range(20, 0, -1))],
        ["a", "b"],
    ],
)
def test_names_are_sorted_as_python_does(names: list[str]) -> None:
    assert archives._order(Names.of(names)).tolist() == sorted(range(len(names)), key=names.__getitem__)


def test_an_index_that_does_not_fit_its_archive_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "KEPT_FROM", 1)
    content = {f"{i}.png": picture(i) for i in range(3)} | {"dataset.json": b'{"labels": [["0.png", 1]]}'}
    path = make_zip(tmp_path / "a.zip", content)
    good = open_archive(path, tmp_path)
    (kept,) = tmp_path.glob("archive-a-*.safetensors")
    for bad in (
        {"roots": good.roots + 1},
        {"lengths": good.lengths[1:]},
        {"tables": {"dataset.json": (1, 0, 0, 0, 0)}},
    ):
        good.model_copy(update=bad).write(kept)
        with pytest.raises(UserError, match=r"fit together$"):
            Archive.read(kept)
        archives._indexed.cache_clear()
        assert archives._indexed(path, archives.state_of(path), tmp_path).read_image("1.png") == content["1.png"]
        assert np.array_equal(Archive.read(kept).lengths, good.lengths)
    good.model_copy(update={"lengths": good.lengths * 0 - 1}).write(kept)  # not to be taken for all that follows
    with pytest.raises(BadImage):
        Archive.read(kept).read_image("1.png")


def test_of_two_members_of_one_name_the_later_one_counts(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for value in (1, 2):
            member = tarfile.TarInfo("1.png")
            member.size = len(picture(value))
            archive.addfile(member, io.BytesIO(picture(value)))
    assert names(scan([tmp_path / "a.tar"], 0)) == ["1.png"]
    assert load_image("1.png", folder=tmp_path / "a.tar", source=SOURCE).getpixel((0, 0)) == (2, 7, 9)


def test_the_index_of_a_large_archive_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(archives, "KEPT_FROM", 3)
    content = {f"é{i}.png": picture(i) for i in range(5)} | {f"é{i}.cls": str(i % 2).encode() for i in range(4)}
    path = make_zip(tmp_path / "a.zip", content)
    first = scan([path], 0.5)
    (kept,) = (tmp_path / "home").rglob("*.safetensors")
    assert len(Archive.read(kept)) == 5
    archives._indexed.cache_clear()
    monkeypatch.setattr(archives, "_index", lambda parts: pytest.fail("it is kept"))
    assert scan([path], 0.5) == first
    assert first[3].labels == {"class": "1"}
    monkeypatch.undo()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    make_zip(path, content | {"new.png": picture()})
    assert len(scan([path], 0)) == 6
    kept.write_bytes(b"nothing")
    archives._indexed.cache_clear()
    assert len(scan([path], 0)) == 6


# --- labels -------------------------------------------------------------------------------------------------------


def test_labels_from_folders_tables_and_files_beside_images(tmp_path: Path) -> None:
    def labels(content: Content, make: Callable[..., Path], name: str, **more: object) -> list[dict[str, str]]:
        return [file.labels for file in find_images([make(tmp_path / name, content)], 0, **more).files]

    images = {f"{of}/{i}.png": picture() for of in ("cat", "dog") for i in range(2)}
    classes = [{"class": "cat"}] * 2 + [{"class": "dog"}] * 2
    assert labels(images, make_zip, "folders.zip") == labels(images, make_tar, "folders.tar") == classes
    one_deeper = {f"animals/{name}": data for name, data in images.items()}
    assert labels(one_deeper, make_zip, "deeper.zip") == classes
    stylegan = {f"00000/img{i:08d}.png": picture() for i in range(3)}
    table = json.dumps({"labels": [[name, i] for i, name in enumerate(stylegan)]}).encode()
    wanted = [{"class": str(i)} for i in range(3)]
    assert labels(stylegan | {"dataset.json": table}, make_zip, "edm.zip") == wanted
    fairface = {f"{split}/{i}.jpg": picture(0, "JPEG") for split in ("train", "val") for i in (1, 2)}
    rows = {split: f"file,age,gender,race\n{split}/1.jpg,3-9,Male,White\n".encode() for split in ("train", "val")}
    tables = {f"fairface_label_{split}.csv": text for split, text in rows.items()}
    found = find_images([make_zip(tmp_path / "fairface.zip", fairface | tables)], 0)
    assert [file.labels.get("age") for file in found.files] == ["3-9", None, "3-9", None]
    assert [file.split for file in found.files] == ["train", "train", "val", "val"]
    assert found.layouts == ["FairFace"]
    (tmp_path / "labels.csv").write_text("file,kind\ncat/0.png,odd\nfolders.zip/dog/1.png,even\n")
    given = labels(images, make_zip, "folders.zip", table=tmp_path / "labels.csv")
    assert given == [{"kind": "odd"}, {}, {}, {"kind": "even"}]


def test_webdataset_files_beside_an_image_are_its_labels(tmp_path: Path) -> None:
    tar = make_tar(
        tmp_path / "a.tar",
        {
            "s/000.cls": b"3\n",
            "s/000.jpg": picture(0, "JPEG"),
            "s/000.txt": b"a caption",
            "s/001.json": json.dumps({"kind": "cat", "year": 1999, "tags": ["a"], "score": 0.5, "none": None}).encode(),
            "s/001.input.png": picture(),
            "s/001.output.png": picture(1),
            "s/002.png": picture(),
            "s/002.json": b"{broken",
            "s/003.cls": b"no image",
        },
    )
    found = find_images([tar], 0)
    assert {file.path: file.labels for file in found.files} == {
        "s/000.jpg": {"class": "3"},
        "s/001.input.png": {"kind": "cat", "year": "1999"},
        "s/001.output.png": {"kind": "cat", "year": "1999"},
        "s/002.png": {},
    }
    assert found.notes[0] == "passed over: caption .txt (1)"  # s/000.txt: nothing is conditioned on texts


# --- what cannot be read ------------------------------------------------------------------------------------------


def compressed(tmp_path: Path) -> Path:
    with tarfile.open(tmp_path / "faces.tar.gz", "w:gz") as archive:
        archive.add(__file__, "1.png")
    return tmp_path / "faces.tar.gz"


def encrypted(tmp_path: Path) -> Path:
    path = make_zip(tmp_path / "faces.zip", {"1.png": picture()})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1  # the flag of the directory's entry
    path.write_bytes(data)
    return path


def lzma(tmp_path: Path) -> Path:
    return make_zip(tmp_path / "faces.zip", {"1.png": picture()}, zipfile.ZIP_LZMA)


def one_of_several(tmp_path: Path) -> Path:
    path = make_zip(tmp_path / "faces.zip", {"1.png": picture()})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\5\6") + 4] = 1  # the number of this disk
    path.write_bytes(data)
    return path


def beyond_the_end(tmp_path: Path) -> Path:
    path = make_zip(tmp_path / "faces.zip", {"1.png": picture()})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 42] = 200  # where the member begins
    path.write_bytes(data)
    return path


def overlapping(tmp_path: Path) -> Path:
    path = make_zip(tmp_path / "faces.zip", {"1.png": picture(), "2.png": picture()})
    data = bytearray(path.read_bytes())
    first, second = (i for i in range(len(data)) if data[i : i + 4] == b"PK\1\2")
    data[second + 42 : second + 46] = data[first + 42 : first + 46]  # where the member begins
    path.write_bytes(data)
    return path


def no_archive(tmp_path: Path) -> Path:
    (tmp_path / "faces.zip").write_bytes(b"PK\3\4 and no more")
    return tmp_path / "faces.zip"


def cut_off(tmp_path: Path) -> Path:
    path = make_tar(tmp_path / "faces.tar", {f"{i}.png": os.urandom(3000) for i in range(4)})
    path.write_bytes(path.read_bytes()[:6000])
    return path


def bad_header(tmp_path: Path) -> Path:
    path = make_tar(tmp_path / "faces.tar", {f"{i}.png": os.urandom(500) for i in range(4)})
    data = bytearray(path.read_bytes())
    data[1024 + 150] ^= 1  # the sum of the second header
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            compressed,
            r"faces\.tar\.gz is compressed as a whole.*: run 'gunzip faces\.tar\.gz' and name the \.tar file$",
        ),
        (encrypted, r"faces\.zip is encrypted \(1\.png\): unpack it and name the folder$"),
        (lzma, r"faces\.zip is compressed by LZMA \(1\.png\): unpack it, or pack it again without compression$"),
        (one_of_several, r"faces\.zip is the last part of several: join them, as 'zip -s 0' does$"),
        (beyond_the_end, r"faces\.zip is damaged, or no archive of that kind: its directory does not fit$"),
        (overlapping, r"faces\.zip is damaged or made to do harm: files in it lie within one another$"),
        (no_archive, r"faces\.zip is damaged, or no archive of that kind: the directory at its end is missing$"),
        (cut_off, r"faces\.tar is damaged, or no archive of that kind: it ends within 1\.png$"),
        (bad_header, r"faces\.tar is damaged: at byte 1,024 there is neither a file nor its end$"),
    ],
)
def test_archives_that_cannot_be_read_are_named(make: Callable[[Path], Path], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^--data: .*" + words):
        scan([make(tmp_path)], 0)


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "faces.zip", {"1.png": picture(), "dataset.json": b'{"labels": [["1.png", 1]]}'})
    path.write_bytes(path.read_bytes().replace(b'1.png"', b'2.png"'))
    with pytest.raises(
        UserError, match=r"^--data: .*faces\.zip/dataset\.json cannot be read: damaged: its bytes are not"
    ):
        scan([path], 0)


def test_a_damaged_member_is_an_unreadable_image(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = make_zip(tmp_path / "faces.zip", {"1.png": picture(), "2.png": picture()}, method)
        data = bytearray(path.read_bytes())
        data[60] ^= 255
        path.write_bytes(data)
        scan([path], 0)
        with pytest.raises(BadImage, match=r"^damaged: its bytes are not those that the archive's directory tells of$"):
            load_image("1.png", folder=path, source=SOURCE)
        load_image("2.png", folder=path, source=SOURCE)


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_zip(tmp_path / "bomb.zip", {"1.png": bytes(1 << 20)}, zipfile.ZIP_DEFLATED)
    scan([path], 0)
    monkeypatch.setattr(members, "LARGEST", 1 << 19)
    with pytest.raises(BadImage, match=r"^more than 524,288 bytes in an archive"):
        load_image("1.png", folder=path, source=SOURCE)
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\1\2")
    data[at + 24 : at + 28] = struct.pack("<I", 100)  # it says that it is small
    path.write_bytes(data)
    scan([path], 0)
    with pytest.raises(BadImage, match=r"^damaged"):
        load_image("1.png", folder=path, source=SOURCE)
    assert len(open_archive(path)) == 1


def test_inspect_looks_into_archives(cli, forms, tmp_path):
    content = content_of(forms["folder"])
    twice = dict(list(content.items())[:1])
    (copy,) = twice.values()
    report = json.loads(cli("inspect", make_zip(tmp_path / "a.zip", content | {"copy.png": copy}), "--json").stdout)
    assert (report["images"], report["bad"], report["duplicates"]["images"]) == (25, [], 1)
    assert report["formats"] == {"PNG": 25}


def test_the_list_of_archives_that_have_not_changed_is_taken_over(cli, forms, tmp_path, monkeypatch):
    run, deflated = ("--run", tmp_path / "run"), forms["deflated"]
    flags = (*run, "--data", forms["shards"], "--data", deflated, *VAE_FLAGS, "--lr-schedule", "constant")
    assert cli("train-vae", *flags, "--steps", 2).code == 0
    with monkeypatch.context() as patched:
        patched.setattr(files, "find_images", lambda *_: pytest.fail("it is known"))
        patched.setattr(archives, "content_hash", lambda data: content_hash(data) if data else pytest.fail("known"))
        assert cli("train-vae", *flags).code == 0
        assert cli("encode", *run, "--workers", 0, "--device", "cpu").code == 0
    assert cli("encode", *run, "--workers", 0, "--device", "cpu").code == 0
    content = content_of(forms["folder"])
    make_zip(deflated, content | {"new.png": picture()})
    again = cli("encode", *run, "--workers", 0, "--device", "cpu")
    assert "0 changed, 1 added, 0 gone" in again.err


def test_what_lies_where_in_archives_is_kept_in_the_run(cli, forms, tmp_path, monkeypatch):
    def forget() -> None:
        archives._indexed.cache_clear()
        archives.open_archive.cache_clear()

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(archives, "KEPT_FROM", 10)
    data, moved = forms["deflated"], tmp_path / "moved"
    assert cli("train-vae", "--run", tmp_path / "run", "--data", forms["folder"], "--data", data, *VAE_FLAGS).code == 0
    (tmp_path / "run").rename(moved)
    shutil.rmtree(tmp_path / "home")
    encode = ("encode", "--run", moved, "--workers", 0, "--device", "cpu")
    with monkeypatch.context() as patched:
        patched.setattr(archives, "_index", lambda _: pytest.fail("it is in the run"))
        forget()
        assert cli(*encode).code == 0
        forget()
        in_a_new_process = pickle.loads(pickle.dumps(SOURCE))
        assert in_a_new_process.open(data, max(content_of(forms["folder"]))).size == (16, 16)
    (kept,) = moved.glob("archive-deflated-*.safetensors")
    kept.unlink()
    (tmp_path / "home").touch()  # a file: nothing can be kept below it
    monkeypatch.setattr(Archive, "write", lambda *_: (_ for _ in ()).throw(PermissionError()))
    forget()
    again = cli(*encode)
    assert "latents of all 48 images already" in again.err
    assert not kept.exists()
