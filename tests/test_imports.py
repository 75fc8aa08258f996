"""Who imports whom: the layers of the package, and that the command line starts without torch."""

import ast
import graphlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import VAE_FLAGS
from PIL import Image

import lightdiff
from lightdiff.data.files import SOURCES
from lightdiff.on_demand import on_demand

ROOT = Path(lightdiff.__file__).parent
LIGHT = [
    "lightdiff",
    "lightdiff.architectures",
    "lightdiff.settings",
    "lightdiff.options",
    "lightdiff.errors",
    "lightdiff.run_folder",
]
LIGHT_EXTRAS = ["lightdiff.extras.settings", "lightdiff.extras.commands", "lightdiff.extras.narrow_help"]
LIGHT += LIGHT_EXTRAS
# Named as text by the light modules, and imported where they are wanted
LIGHT += ["lightdiff.extras.settings_file", "lightdiff.extras.wrong_settings"]
LIGHT += ["lightdiff.extras.several.launcher", "lightdiff.extras.several.worker"]
# From the bottom up: a module imports from lower steps and its own folder. Folders on one step do not know each other.
STEPS = [
    ["errors", "on_demand", "shapes"],
    ["architectures"],
    ["options"],
    ["loops"],
    ["settings"],
    ["defaults", "run_folder"],
    ["checkpoint"],
    ["models", "diffusion", "losses", "runtime"],
    ["data"],
    ["training", "pipeline"],
    ["pictures"],
    ["stages"],
    ["extras"],
    ["cli"],
    ["__main__"],
]
ALLOWED_BESIDES = {("losses", "models")}  # on one step
STEP = {part: number for number, parts in enumerate(STEPS) for part in parts}


def name_of(path: Path) -> str:
    """`lightdiff/data/files.py` -> `lightdiff.data.files`."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(node: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """Every module, or thing of a module, that is imported, and whether only inside a function or for type checks."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, inside) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "a relative import"
            yield from ((f"{child.module}.{alias.name}", inside) for alias in child.names)
        elif isinstance(child, ast.Call) and isinstance(child.func, ast.Name) and child.func.id == "import_module":
            parts = child.args[0].values if isinstance(child.args[0], ast.JoinedStr) else child.args[:1]
            yield "".join(str(p.value) if isinstance(p, ast.Constant) else "*" for p in parts), inside
        typing = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"  # never run
        function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from imports(child, inside or typing or function)


MODULES = {name_of(path): list(imports(ast.parse(path.read_bytes()))) for path in sorted(ROOT.rglob("*.py"))}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def part_of(name: str) -> str:
    """`lightdiff.data.files` -> `data`; the package itself, which holds the version: an empty string."""
    part = name.partition("lightdiff.")[2].partition(".")[0]
    return "" if part == "__version__" else part


def module_of(name: str) -> str:
    """`lightdiff.errors.LightdiffError` -> `lightdiff.errors`: the module that a thing is imported from."""
    return name if name in MODULES else name.rpartition(".")[0]


def test_the_modules_are_found() -> None:
    assert {*LIGHT, "lightdiff.cli", "lightdiff.__main__", "lightdiff.stages.train_vae"} <= MODULES.keys()
    assert ("lightdiff.*", True) in MODULES["lightdiff.cli"]
    assert ("lightdiff.errors.LightdiffError", False) in MODULES["lightdiff.cli"]
    assert {part_of(module) for module in MODULES} == {"", *STEP}


def test_the_core_does_not_import_extras() -> None:
    found = {
        (module, inside)
        for module, names in MODULES.items()
        for name, inside in names
        if within(name, "lightdiff.extras") and not within(module, "lightdiff.extras")
        if not (module == "lightdiff.cli" and module_of(name) in LIGHT_EXTRAS)  # for --help
    }
    assert found == set()


def test_only_stages_the_command_line_and_extras_import_stages() -> None:
    found = {
        module
        for module, names in MODULES.items()
        if any(within(name, "lightdiff.stages") for name, _ in names)
        and not within(module, "lightdiff.stages")
        and not within(module, "lightdiff.extras")
    }
    assert found == {"lightdiff.cli"}


def test_the_command_line_imports_stages_only_when_called() -> None:
    assert all(inside for name, inside in MODULES["lightdiff.cli"] if within(name, "lightdiff.stages"))


@pytest.mark.parametrize("part", STEP)
def test_imports_point_downwards(part: str) -> None:
    found = [
        (module, name)
        for module, names in MODULES.items()
        if part_of(module) == part
        for name, _ in names
        if within(name, "lightdiff") and part_of(name) not in ("", "*", part)
        if STEP[part_of(name)] >= STEP[part] and (part, part_of(name)) not in ALLOWED_BESIDES
    ]
    assert not found


def test_no_circle_of_imports() -> None:
    graph = {
        module: {module_of(name) for name, inside in names if within(name, "lightdiff") and not inside}
        for module, names in MODULES.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the modules


def test_only_the_command_line_and_extras_know_options() -> None:
    found = {module for module, names in MODULES.items() for name, _ in names if within(name, "lightdiff.options")}
    assert {part_of(module) for module in found} == {"cli", "extras"}


def test_only_what_runs_several_processes_imports_torch_distributed() -> None:
    found = {module for module, names in MODULES.items() for name, _ in names if within(name, "torch.distributed")}
    assert found <= {"lightdiff.extras.several.launcher", "lightdiff.extras.several.group"}


@pytest.mark.parametrize("module", [*LIGHT, "lightdiff.cli", "lightdiff.__main__"])
def test_light_modules_name_no_torch(module: str) -> None:
    assert not [name for name, inside in MODULES[module] if name.split(".")[0].startswith("torch") and not inside]


@pytest.mark.parametrize("modules", [LIGHT, ["lightdiff.cli"]])
def test_light_modules_load_no_torch(modules: list[str]) -> None:
    heavy = "{'torch', 'torchvision', 'numpy', 'lpips', 'safetensors', 'PIL'}"
    code = f"import sys, {', '.join(modules)}; found = {heavy} & set(sys.modules); assert not found, found"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr


ALONE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torchvision", "typer", "rich", "lpips", "PIL", "jaxtyping", "filelock"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
import torch
from safetensors.torch import load_file, save_file
import lightdiff.models.kl, lightdiff.models.original, lightdiff.extras.taesd
from lightdiff.models.unet import build_unet
from lightdiff.models.vae import build_vae
from lightdiff.architectures import UNetArchitecture, VAEArchitecture

z, t = torch.zeros(1, 4, 8, 8), torch.zeros(1)
unet = build_unet(UNetArchitecture.model_validate({"width": 32, "blocks": 1}).resolved(8), 4)
save_file(unet.state_dict(), sys.argv[1])
unet.load_state_dict(load_file(sys.argv[1]))
assert unet(z, t).shape == z.shape
vae = build_vae(VAEArchitecture.model_validate({"architecture": "kl", "channels": [32, 32]}).resolved(16))
assert vae.decoder(z).shape == (1, 3, 16, 16)
assert not {name for name in sys.modules if name.startswith("lightdiff.") and "stages" in name}
"""


def test_networks_need_only_torch_safetensors_and_pydantic(tmp_path: Path) -> None:
    """Of all that lightdiff depends on; safetensors itself needs numpy to save tensors of torch."""
    command = [sys.executable, "-c", ALONE, str(tmp_path / "unet.safetensors")]
    done = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_imported_on_demand_is_there() -> None:
    named = [
        node.args[0].value
        for path in sorted(ROOT.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "on_demand"
        if isinstance(node.args[0], ast.Constant)
    ]
    assert len(named) > 40
    for name in [*named, *(source for source in SOURCES.values() if isinstance(source, str))]:
        assert on_demand(str(name))


ORDINARY = """
import sys
from lightdiff.cli import app

for line in sys.argv[1].splitlines():
    app(line.split(), standalone_mode=False)
found = [name for name in sys.modules if name.startswith("lightdiff.extras.data")]
assert not found, found
"""


@pytest.mark.parametrize("homes", [("",), ("cats/a-", "dogs/b-")])
def test_an_ordinary_folder_of_pictures_imports_nothing_on_demand(tmp_path: Path, homes: tuple[str, ...]) -> None:
    """JPEGs and PNGs of 8 bits a colour, some grey, transparent or with a palette, in one folder or one a class."""
    for i in range(12):
        path = tmp_path / "data" / f"{homes[i % len(homes)]}IMG_{i:04d}.{('jpg', 'png')[i % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(("RGB", "RGBA", "L", "P")[i % 4], (20, 18), i).save(path)
    train = f"train-vae --run run --data data {' '.join(VAE_FLAGS)}"
    done = subprocess.run(
        [sys.executable, "-c", ORDINARY, f"{train}\nencode --run run --workers 0 --device cpu"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/latents/index.safetensors").is_file()


# What plain runs of the five stages, in one process and without a terminal, do not need
RARE = {"display", "guide", "nonfinite", "set_aside", "settings_file", "several", "wrong_settings"}
RARE |= {"abandoned", "download", "out_of_memory"}
RARE |= {f"several.{name}" for name in ("group", "launcher", "worker")}
RARE_IN = {
    "train-vae": RARE | {"compile"},
    "encode": RARE | {"compile"},
    "scale": RARE | {"compile"},
    "train-unet": RARE | {"compile"},
    "generate": RARE,  # which looks whether compiling pays
}
PLAIN_RUNS = """
import json, sys
from lightdiff.cli import main

loaded = {}
for name, flags in json.loads(sys.argv[1]).items():
    sys.argv = ["lightdiff", name, *flags]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, name
    loaded[name] = [name for name in sys.modules if name.startswith("lightdiff.extras.")]
print(json.dumps(loaded))
"""


@pytest.mark.slow
def test_plain_runs_import_no_extra_that_they_do_not_need(tmp_path: Path, faces: Path) -> None:
    assert {f"lightdiff.extras.{name}" for name in RARE | {"compile"}} <= MODULES.keys()
    short = "--preset tiny --steps 1 --batch-size 4 --device cpu --run".split()
    images = ["--data", str(faces), "--resolution", "16", "--lpips-gamma", "0", "--workers", "0"]
    run = str(tmp_path / "run")
    commands = {
        "train-vae": [*images, *short, run],
        "encode": ["--device", "cpu", "--workers", "0", "--run", run],
        "scale": ["--run", run],
        "train-unet": [*short, run],
        "generate": ["--num-images", "1", "--num-steps", "1", "--device", "cpu", "--run", run],
    }
    code = [sys.executable, "-c", PLAIN_RUNS, json.dumps(commands)]
    done = subprocess.run(code, cwd=ROOT.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])
    found = {name: {f"lightdiff.extras.{rare}" for rare in RARE_IN[name]} & {*loaded[name]} for name in commands}
    assert found == {name: set() for name in commands}
