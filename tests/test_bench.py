"""The benchmarks' arithmetic, and that their page is that of their results. Nothing here is timed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.bench import gpu, report
from tests.bench.contest import Row, flops_of, ratio
from tests.bench.gpu_cases import TINY, Way, Work, flops, network_of, settings_of, ways

ROOT = Path(__file__).parent.parent


def row(contender, seconds, images=10, **more):
    base = {"flops": 0.0, "parameters": 0, "precision": "fp32", "memory": 3_000_000, "memory_before": 1_000_000}
    return Row(contender, seconds, images, **(base | more))


def test_a_ratio_compares_neighbouring_rounds_and_counts_images():
    ours, peer = row("lightdiff", [1.0, 2.0, 9.0]), row("peer", [2.0, 4.0, 9.0])
    assert ratio(ours, peer) == 2
    assert ratio(row("lightdiff", [1.0, 2.0, 9.0], images=20), peer) == 4


def test_a_line_says_what_was_measured():
    ours = row("lightdiff", [0.5], flops=1e9, parameters=1_500_000)
    peak = {"matmul fp32": 3e9, "convolution fp32": 4e9, "matmul bf16": 9e9}
    case = {"rows": [ours.as_dict(), row("peer", [1.0]).as_dict()], "wanted": {"peer": 1.5}, "peak": peak}
    lines = report.lines(case)
    assert lines == [
        "| lightdiff | 20 |  |  | 3 MB (+2) | 1.5 M | 0.1 | 50% | fp32 |",
        "| peer | 10 | 2.00 x | 1.5 x | 3 MB (+2) |  |  |  |  |",
    ]


def test_operations_are_counted_as_multiplications_and_additions():
    conv = torch.nn.Conv2d(3, 8, 3, padding=1)
    assert flops_of(conv, torch.randn(1, 3, 16, 16)) == 2 * 3 * 8 * 9 * 16 * 16
    assert flops_of(conv, torch.randn(1, 3, 16, 16), backward=True) == 6 * 3 * 8 * 9 * 16 * 16


def test_the_page_is_that_of_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PAGE", tmp_path / "benchmarks.md")
    report.write()
    assert (tmp_path / "benchmarks.md").read_text() == (ROOT / "docs/benchmarks.md").read_text(), (
        "run nox -s bench -- --write"
    )


@pytest.mark.slow
def test_a_case_runs_and_adds_to_its_results(tmp_path):
    results = tmp_path / "cpu.json"
    results.write_text('{"cases": {"another": {}}}')
    words = [sys.executable, "-m", "tests.bench", "help", "--rounds", "2", "--results", str(results)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept = json.loads(results.read_text())
    assert set(kept["cases"]) == {"another", "help"}
    assert [len(r["seconds"]) for r in kept["cases"]["help"]["rows"]] == [2, 2]
    assert "| import torch |" in done.stdout


def test_an_unknown_case_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", "speed"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "there is no speed; there are unet-small" in " ".join(done.stderr.split())


@pytest.mark.slow
def test_the_command_for_a_gpu_runs_with_tiny_networks(tmp_path):
    words = [sys.executable, "-m", "tests.bench", "gpu", "--device", "cpu", "--minutes", "60"]  # on a busy machine, too
    words += ["--results", str(tmp_path / "gpu.json")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [(row["case"], row["way"]) for row in found["rows"]] == [way[:2] for way in ways(TINY, torch.device("cpu"))]
    assert not [row for row in found["rows"] if "failed" in row]
    assert found["left_out"] == []
    assert (tmp_path / "gpu.md").read_text().splitlines() == gpu.page(found)


def test_what_was_measured_survives_what_fails_and_what_no_time_is_left_for(tmp_path, monkeypatch):
    made, now = [], [0.0]

    def work(call):
        made.append(call)
        return Work(call, images=2, flops=1.0, parameters=3)

    def too_large():
        raise torch.OutOfMemoryError

    def too_long():
        now[0] = 60.0
        signal.raise_signal(signal.SIGALRM)

    steps = [lambda: None, too_large, lambda: 1 / 0, too_long, lambda: None]
    names = ["fine", "large", "wrong", "slow", "late"]
    found = [Way("case", name, lambda step=step: work(step)) for name, step in zip(names, steps, strict=True)]
    monkeypatch.setattr(gpu, "ways", lambda z, device: found)
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: now[0], strftime=time.strftime))
    monkeypatch.setattr(gpu, "bf16_peak", lambda side, device: 1e12)
    monkeypatch.setattr(gpu, "timed", lambda call, device: (call(), 0.1)[1])
    gpu.run(torch.device("cpu"), 1, tmp_path / "gpu.json")
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert made == steps[:4]
    assert "images_per_s" in kept["rows"][0]
    told = [row["failed"] for row in kept["rows"][1:]]
    assert told == ["out of memory", "ZeroDivisionError: division by zero", "no time left"]
    assert kept["left_out"] == ["case: late"]
    assert "Left out for want of time: case: late." in (tmp_path / "gpu.md").read_text()


def test_a_table_compares_with_the_original():
    row = {"case": "a step", "flops": 5e9, "memory": 2_500_000_000, "parameters": 1_500_000}
    ours = {"way": "lightdiff, preset base, compiled", "images_per_s": 30.0, "waits": 0, "compiling": 41.4}
    original = {"way": "original, float32", "images_per_s": 10.0, "waits": 2, "compiling": None}
    about = {"machine": "GPU", "torch": "2", "date": "today", "bf16_peak": 1e12, "tests": "3 passed", "left_out": []}
    lines = gpu.page(about | {"rows": [row | ours, row | original]})
    assert lines[-2:] == [
        "| lightdiff, preset base, compiled | 30 | 3.00 | 15.0% | 2.50 GB | 0 | 41 s | 1.5 M |",
        "| original, float32 | 10 | 1.00 | 5.0% | 2.50 GB | 2 |  | 1.5 M |",
    ]
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_operations_are_counted_without_computing():
    settings = settings_of("vae", "tiny", TINY)
    made, (x, latent) = network_of(settings), (torch.zeros(1, 3, 32, 32), torch.zeros(1, 4, 8, 8))
    assert flops(lambda: network_of(settings), TINY) == 3 * flops_of(made, x, latent)
    assert flops(lambda: network_of(settings), TINY, "decoder") == flops_of(made.decoder, latent)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_training_step_never_waits_for_the_gpu():
    from tests.bench.cases import train_unet_step

    _, step = train_unet_step({"width": 32, "blocks": 1}, 8, 4, torch.device("cuda"), compile="off")
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
