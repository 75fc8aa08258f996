"""The measured recipes: their flags exist, processor time is counted, and the page is that of the rows."""

import csv
import time
from pathlib import Path

import pytest
import torch
import typer

from lightdiff.cli import app
from lightdiff.pipeline import Pipeline
from lightdiff.settings import SamplingSettings
from tests.bench import recipe, recipe_page, solvers
from tests.bench.contest import processor

ROOT = Path(__file__).parent.parent
STAGES = {"vae": "train-vae", "scale": "scale", "unet": "train-unet", "generate": "generate"}


def parsed(stage: str, flags: str) -> dict[str, object]:
    command = typer.main.get_command(app).commands[stage]
    return command.make_context(stage, flags.split()).params


@pytest.mark.parametrize("name", recipe.EVERY)
def test_every_row_says_something_that_the_command_line_understands(name):
    row = recipe.EVERY[name]
    changed = 0
    for part, stage in STAGES.items():
        usual, said = parsed(stage, ""), parsed(stage, getattr(row, part))
        changed += sum(said[setting] != usual[setting] for setting in usual)
    unchanged = ("default", "photographs", "decoded-mu", "decoded-draws")
    changed += row.vae_seconds != recipe.SECONDS["train-vae"]
    assert bool(changed) == (name not in unchanged)
    assert row.about


def test_no_two_rows_are_the_same():
    assert len({(row.flags, row.vae_seconds) for row in recipe.ROWS.values()}) == len(recipe.ROWS)


def test_processor_time_is_that_of_the_process_and_those_it_waited_for():
    busy = "import time\nwhile time.process_time() < 0.5: pass"
    _, idle = recipe.call(["-c", "import time; time.sleep(0.3)"])
    text, alone = recipe.call(["-c", f"{busy}\nprint('done')"])
    assert text == "done\n"
    assert 0.45 < alone < 3
    assert idle < alone
    before = time.process_time()
    _, family = recipe.call(["-c", f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {busy!r}])\n{busy}"])
    assert family > 0.95
    assert time.process_time() - before < 0.45


def test_a_command_that_fails_says_why():
    with pytest.raises(RuntimeError, match="no such stage"):
        recipe.call(["-c", "import sys; sys.exit('no such stage')"])


class Clock:
    """Stands for lightdiff: starts and steps take time by their recipe, and all of it doubles once in a while."""

    def __init__(self, per_step):
        self.per_step, self.asked, self.slow = per_step, [], 1.0

    def __call__(self, *words):
        self.asked.append((words[words.index("--lr") + 1], words[words.index("--steps") + 1]))
        lr, steps = self.asked[-1]
        return self.slow * (7 + self.per_step[lr] * steps)


def training(home, lr):
    return recipe.Training("train-vae", home, ("--lr", lr))


def test_a_budget_buys_steps_by_the_short_runs_of_the_default(monkeypatch, tmp_path):
    """A start takes 7 s, a step 0.5 s: 900 s are 1,786 steps."""
    clock = Clock({"default": 0.5})
    monkeypatch.setattr(recipe, "lightdiff", clock)
    work = recipe.Work(tmp_path, jobs=2)
    default = training(work.home("vae", "default"), "default")
    assert work.budget(default) == 1786
    assert clock.asked == [("default", n) for n in recipe.TRIALS for _ in range(2)], "as many at a time as rows"
    assert not [path for path in default.run.iterdir() if path.is_dir()], "short runs leave nothing behind"
    clock.slow = 2.0
    assert work.budget(training(work.home("vae", "another share"), "default")) == 1786, "it is measured once"


def test_a_training_is_made_once_and_a_cost_is_measured_once(monkeypatch, tmp_path):
    clock = Clock({"default": 0.5, "cheap": 0.25})
    monkeypatch.setattr(recipe, "lightdiff", clock)
    work = recipe.Work(tmp_path)
    default, cheap = (training(work.home("vae", name), name) for name in ("default", "cheap"))
    assert work.cost(cheap, default, "cheap") == 0.5
    clock.slow = 2.0
    asked = len(clock.asked)
    assert work.cost(cheap, default, "cheap") == 0.5
    assert work.trained(cheap, 100) == (100, 64)
    assert work.trained(cheap, 200) == (100, 64)
    assert clock.asked[asked:] == [("cheap", 100)]


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Trainings that `measure` asks for, of a budget of 1,000 steps each, where nothing is computed."""
    asked = []

    def trained(work, training, steps):
        asked.append((training.stage, " ".join(map(str, training.flags)), steps))
        return steps, 1.0

    monkeypatch.setattr(recipe.Work, "trained", trained)
    monkeypatch.setattr(recipe.Work, "budget", lambda work, default: 1000)
    monkeypatch.setattr(recipe.Work, "cost", lambda work, training, default, *settings: 2.0)
    monkeypatch.setattr(recipe.Work, "once", lambda work, folder, *commands: asked.append((folder.name, *commands)))
    monkeypatch.setattr(recipe, "first", lambda *arguments: tmp_path)
    monkeypatch.setattr(recipe, "trained_networks", lambda *networks: {})
    monkeypatch.setattr(recipe.Work, "distance", lambda *arguments: 0.5)

    def measure(row, share=1.0, **work):
        asked.clear()
        recipe.measure("row", row, 0, [1000], share, recipe.Work(tmp_path, **work))
        return list(asked)

    return measure


def steps_of(asked, stage, *flags):
    return [steps for kind, said, steps in (one for one in asked if len(one) == 3) if kind == stage and
            all(flag in said for flag in flags)]  # fmt: skip


def test_a_budget_may_be_divided_otherwise(measured):
    for vae, unet in ((600, 1800), (900, 1500), (1200, 1200)):
        asked = measured(recipe.Recipe("", vae="--lr 7", vae_seconds=vae), share=0.5)
        assert steps_of(asked, "train-vae", "--lr 7") == [int(500 * (vae / 900))]
        assert steps_of(asked, "train-unet") == [int(500 * (unet / 1500))]


def test_a_row_takes_the_steps_that_its_cost_leaves(measured):
    asked = measured(recipe.ROWS["vae-adamw"], share=0.5)
    assert steps_of(asked, "train-vae", "adamw") == [250]
    assert steps_of(asked, "train-unet") == [500]
    assert steps_of(measured(recipe.ROWS["unet-wider"]), "train-unet", "--model.width 96") == [500]


def test_a_row_may_be_guided_by_a_worse_unet(measured):
    asked = measured(recipe.ROWS["autoguidance-narrow-fifth-2"])
    assert steps_of(asked, "train-unet", "--model.width 32") == [200]
    drawn = next(command for name, *commands in asked if name.startswith("drawn") for command in commands)
    narrow = next(words for words in drawn if str(words).endswith("unet/checkpoints/last.safetensors"))
    assert drawn[drawn.index(narrow) - 1] == "--guide-with"
    assert (narrow.count("unet-"), drawn[-2:]) == (1, ["--guidance", "2"])


def test_a_training_may_be_shared_by_processes(measured):
    asked = measured(recipe.ROWS["default"], processes=2)
    assert steps_of(asked, "train-vae", "--nproc-per-node 2")
    assert steps_of(asked, "train-unet", "--nproc-per-node 2") == [1000]


def test_what_is_tried_out_is_timed():
    tried = recipe.ROWS["no-attention"].tried({"vae": "--lr 1", "scale": "", "unet": "", "generate": "--ema 0"})
    assert tried.flags.split(" | ") == ["--lr 1", "", recipe.ROWS["no-attention"].unet, "--ema 0"]
    assert set(tried.timed) == {"train-vae", "train-unet"}
    assert recipe.ROWS["default"].tried(dict.fromkeys(recipe.STAGES, "")) == recipe.ROWS["default"]


def test_rows_that_cost_other_than_the_default_are_timed():
    """Those that change a network, an optimizer or how often latents are decoded."""
    for row in recipe.ROWS.values():
        for stage, flags in (("train-vae", row.vae), ("train-unet", row.unet)):
            dearer = any(flag in flags for flag in ("--preset", "--model.", "--optimizer", "--equivariance"))
            assert stage in row.timed or not dearer


def test_a_home_is_that_of_what_it_was_made_with(tmp_path):
    work = recipe.Work(tmp_path)
    assert work.home("vae", "--lr 1", 0) == work.home("vae", "--lr 1", 0) != work.home("vae", "--lr 2", 0)


def test_rows_are_added_and_not_measured_again(tmp_path, monkeypatch, capsys):
    measured = []

    def measure(name, chosen, seed, samples, share, work):
        measured.append((name, seed, tuple(samples)))
        base = dict.fromkeys(recipe.FIELDS, 1) | {"row": name, "seed": seed, "share": share, "flags": chosen.flags}
        return [base | {"samples": n} for n in samples]

    monkeypatch.setattr(recipe, "measure", measure)
    monkeypatch.chdir(tmp_path)

    def main(*words):
        monkeypatch.setattr("sys.argv", ["recipe", *words, "--results", "rows.csv"])
        recipe.main()

    main("default", "--samples", "1000")
    main("default", "objective-v", "--samples", "2000", "1000", "--jobs", "1")
    main("default", "--samples", "1000", "--unet", "--lr 1")
    assert measured == [
        ("default", 0, (1000,)),
        ("default", 0, (2000,)),
        ("objective-v", 0, (2000, 1000)),
        ("default", 0, (1000,)),
    ]
    with Path("rows.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["row"], row["samples"]) for row in rows] == [
        *(
            ("default", "1000"),
            ("default", "2000"),
            ("objective-v", "2000"),
            ("objective-v", "1000"),
            ("default", "1000"),
        )
    ]
    with pytest.raises(SystemExit):
        main("no-such-row")
    assert "there is no no-such-row" in capsys.readouterr().err


def test_flags_that_do_not_exist_are_found():
    with pytest.raises(Exception, match="No such option"):
        parsed("train-vae", "--no-such 3")


def test_the_page_is_that_of_the_rows(tmp_path, monkeypatch):
    about = {name: row.about for name, row in recipe.ROWS.items()}
    assert recipe_page.page(recipe_page.read(), about) == recipe_page.PAGE.read_text(), "run nox -s recipe -- --write"


def test_a_choice_is_compared_with_the_default_of_its_processor():
    rows = [
        {"row": name, "processor": processor, "seed": 0.0, "share": 1.0, "samples": 1000.0, "frechet": value}
        | {"psnr": 29.0}
        | {f"{stage}_{what}": 1e6 for stage in ("vae", "unet") for what in ("parameters", "steps")}
        for processor, name, value in (
            ("A", "default", 0.5),
            ("A", "objective-v", 0.6),
            ("A", "objective-eps", 0.75),
            ("B", "objective-v", 0.44),
            ("B", "default", 0.4),
        )
    ]
    page = recipe_page.page(rows, dict.fromkeys(recipe.ROWS, "about"))
    newer, older = page.index("## Measured on two cores of: B"), page.index("## Measured on two cores of: A")
    assert newer < older
    part = page[older:]
    assert part.index("**default**") < part.index("**objective-eps**") < part.index("**objective-v**")
    assert "| 0.750 | +0.250 |" in part
    assert "| 0.600 | +0.100 |" in part
    assert "| 0.440 | +0.040 |" in page[:older]


def test_samplers_are_compared_at_equal_calls():
    values = {"default": 0.4, "ddim-6": 0.5, "dpm++2m-50": 0.3, "kl-1e-3": 0.9}
    rows = [{"row": name, "seed": 0.0, "frechet": value} for name, value in values.items()]
    lines = recipe_page.calls_table(rows).splitlines()
    assert lines[2:] == ["| `ddim` | 0.500 |  |  |  |", "| `dpm++2m` |  |  | 0.400 | 0.300 |"]
    assert recipe_page.calls_table(rows[:1]) == recipe_page.calls_table(rows[3:]) == ""


def test_the_default_is_the_sampler_that_it_is_taken_for():
    sampler, _, calls = recipe_page.DEFAULT_CALLS.rpartition("-")
    assert (sampler, recipe_page.steps_for(sampler, int(calls))) == (
        SamplingSettings().sampler,
        SamplingSettings().num_steps,
    )


def test_a_processor_is_known_by_its_name_and_what_it_can_do(tmp_path):
    about = tmp_path / "cpuinfo"
    about.write_text("model name\t: Intel(R) Xeon(R) Processor\nflags\t\t: avx512f amx_bf16 amx_tile\n")
    assert processor(about) == "Intel Xeon, AMX"
    about.write_text("model name\t: AMD EPYC\nflags\t\t: avx512f avx512_bf16\n")
    assert processor(about) == "AMD EPYC"


def test_solvers_come_nearer_to_the_exact_solution_with_more_calls(trained):
    pipeline = Pipeline.load(trained, device="cpu")
    pipeline.unet = lambda x_t, t: torch.sin(2 * x_t)  # the trained one has hardly learnt anything
    found = solvers.errors(pipeline, 2, exact=25)
    for sampler, error in found.items():
        assert error[0] > error[1] > error[2] > error[3], sampler
    assert found["heun"][3] == 0, "50 calls of heun are the 25 steps that are taken for exact"
    assert found["ddim"][3] > 0
    lines = recipe_page.by_calls({"heun": [0.5, 0.25, 0.125, 0]}).splitlines()
    assert lines[::2] == [
        "| `--sampler` | 6 calls | 10 calls | 20 calls | 50 calls |",
        "| `heun` | 0.500 | 0.250 | 0.125 | 0.000 |",
    ]


def test_fewer_samples_are_the_first_ones_which_other_recipes_draw_of_the_same_noise(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(6):
        (tmp_path / "images" / f"{i:05d}.png").write_text(str(i))
    assert recipe.first(tmp_path, 6) == tmp_path / "images"
    for _ in range(2):  # where links are made already, too
        few = recipe.first(tmp_path, 3)
        assert [file.read_text() for file in sorted(few.iterdir())] == ["0", "1", "2"]
