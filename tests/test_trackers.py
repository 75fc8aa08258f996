"""Trackers: what they get, with the real libraries and no network; one that fails ends no training."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import UNET_FLAGS, call, succeed

from lightdiff.runtime.progress import Reporter, read_metrics

WHY = "is not installed: nox -s hub runs this"
ignoring = pytest.mark.filterwarnings("ignore")  # of these libraries, on themselves


def trained_on(run: Path, tracker: str) -> list[dict[str, float]]:
    """A U-Net trained for 3 steps, then resumed up to 5; the lines of its metrics."""
    succeed("train-unet", "--run", run, *UNET_FLAGS, "--restart", "--log-every", 1, "--track", tracker)
    assert succeed("train-unet", "--run", run, "--steps", 5).stdout.split() == [
        str(run / "unet/checkpoints/last.safetensors")
    ]
    return read_metrics(run / "unet/metrics.jsonl")


def number(run: Path, tracker: str) -> str:
    return str(json.loads((run / "unet/trackers.json").read_text())[tracker])


@ignoring
@pytest.mark.slow
def test_mlflow(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason=f"mlflow {WHY}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/tracked.db")
    rows = trained_on(run, "mlflow")
    client = mlflow.MlflowClient()
    (experiment,) = [e for e in client.search_experiments() if e.name == "lightdiff"]
    (found,) = client.search_runs([experiment.experiment_id])  # the resumed run is the same one
    assert (found.info.run_id, found.info.status) == (number(run, "mlflow"), "FINISHED")
    assert found.data.params["loop.batch_size"] == "6"
    history = {m.step: m.value for m in client.get_metric_history(found.info.run_id, "loss")}
    assert history == {int(row["step"]): row["loss"] for row in rows}
    assert [*history] == [1, 2, 3, 4, 5]
    pictures = [file.path for file in client.list_artifacts(found.info.run_id, "samples")]
    assert "samples/step-00000005.png" in pictures


@ignoring
@pytest.mark.slow
def test_trackio(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "tracked"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("trackio", reason=f"trackio {WHY}")
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "tracked")
    rows = trained_on(run, "trackio")
    assert SQLiteStorage.get_runs("lightdiff") == [number(run, "trackio")]
    logged = [row for row in SQLiteStorage.get_logs("lightdiff", number(run, "trackio")) if "loss" in row]
    assert [(row["step"], row["loss"]) for row in logged] == [(row["step"], row["loss"]) for row in rows]


def records(log: bytes) -> Iterator[bytes]:
    """What is in one of wandb's files: 7 bytes, then a log of LevelDB's format (its doc/log_format.md)."""
    at, parts = 7, b""
    while at < len(log):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", log, at + 4)
        parts += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@ignoring
@pytest.mark.slow
def test_wandb(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason=f"wandb {WHY}")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    rows = trained_on(run, "wandb")
    wandb.teardown()
    logged: list[tuple[float, float]] = []
    files = sorted((run / "unet/wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    for file in files:  # one for each start, both of the same run
        assert file.stem == f"run-{number(run, 'wandb')}"
        for data in records(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            row = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            if "loss" in row:
                logged.append((json.loads(row["step"]), json.loads(row["loss"])))
    assert logged == [(row["step"], row["loss"]) for row in rows]


def test_a_missing_library_is_named_before_any_work(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightdiff.extras.trackers.find_spec", lambda name: None)
    result = call("train-unet", "--run", run, *UNET_FLAGS, "--restart", "--track", "wandb")
    assert result.code == 2
    assert "--track wandb needs the library wandb: pip install 'lightdiff[wandb]'" in result.err


def test_an_unknown_tracker_is_refused(run: Path) -> None:
    result = call("train-unet", "--run", run, *UNET_FLAGS, "--restart", "--track", "wandb,notebook")
    assert (result.code, "--track: " in result.err, "'wandb', 'trackio' or 'mlflow'" in result.err) == (2, True, True)


class Failing:
    """A tracker whose server goes away after the first line."""

    name = "Somewhere"
    lines = 0

    def __init__(self, *_: Any) -> None:
        pass

    def record(self, values: Any, step: int) -> None:
        Failing.lines += 1
        if step > 1:
            raise ConnectionError("the server is gone")


def test_a_tracker_that_fails_ends_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightdiff.extras.trackers.KINDS", {"tensorboard": Failing})
    with Reporter("vae", 4, metrics=tmp_path / "metrics.jsonl", track=["json"]) as reporter:
        for step in range(1, 5):
            reporter.record({"step": step, "loss": 1.0})
    assert (len(read_metrics(tmp_path / "metrics.jsonl")), Failing.lines) == (4, 2)
    said = capsys.readouterr().err
    assert said.count("Somewhere's files could not be written: the server is gone") == 1
    assert "json cannot be opened: " in said
