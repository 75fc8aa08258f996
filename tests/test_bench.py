"""The benchmarks' arithmetic, and that their page is that of their results. Nothing here is timed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.bench import report
from tests.bench.contest import Row, flops_of, ratio

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
