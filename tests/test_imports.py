"""Who imports whom: the layers of the package, and that the command line starts without torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightdiff

ROOT = Path(lightdiff.__file__).parent
LIGHT = [
    "lightdiff",
    "lightdiff.settings",
    "lightdiff.extras.settings",
    "lightdiff.options",
    "lightdiff.errors",
    "lightdiff.run_folder",
]
FORBIDDEN = {
    "models": ["stages", "training", "data", "pipeline", "diffusion"],
    "diffusion": ["stages", "training", "data", "pipeline", "models"],
    "data": ["models", "diffusion", "training", "stages", "pipeline"],
    "training": ["stages", "models", "diffusion", "pipeline"],
    "settings": ["models", "diffusion", "data", "training", "stages", "pipeline", "options", "cli", "run_folder"],
    "options": ["models", "diffusion", "data", "training", "stages", "pipeline", "settings", "cli", "run_folder"],
    "checkpoint": ["models", "diffusion", "data", "training", "stages", "pipeline", "settings", "options", "cli"],
    "losses": ["diffusion", "data", "training", "stages", "pipeline"],
    "pipeline": ["stages", "cli"],
    "stages": ["cli", "options"],
}


def name_of(path: Path) -> str:
    """`lightdiff/data/files.py` -> `lightdiff.data.files`."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(node: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """Every module, or thing of a module, that is imported, and whether inside a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, inside) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "a relative import"
            yield from ((f"{child.module}.{alias.name}", inside) for alias in child.names)
        elif isinstance(child, ast.Call) and isinstance(child.func, ast.Name) and child.func.id == "import_module":
            parts = child.args[0].values if isinstance(child.args[0], ast.JoinedStr) else child.args[:1]
            yield "".join(str(p.value) if isinstance(p, ast.Constant) else "*" for p in parts), inside
        yield from imports(child, inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))


MODULES = {name_of(path): list(imports(ast.parse(path.read_bytes()))) for path in sorted(ROOT.rglob("*.py"))}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_the_modules_are_found() -> None:
    assert {*LIGHT, "lightdiff.cli", "lightdiff.__main__", "lightdiff.stages.train_vae"} <= MODULES.keys()
    assert ("lightdiff.*.*", True) in MODULES["lightdiff.cli"]
    assert ("lightdiff.errors.LightdiffError", False) in MODULES["lightdiff.cli"]
    assert all((ROOT / f"{part}.py").is_file() or (ROOT / part).is_dir() for part in FORBIDDEN)


def test_the_core_does_not_import_extras() -> None:
    found = {
        (module, inside)
        for module, names in MODULES.items()
        for name, inside in names
        if within(name, "lightdiff.extras") and not within(module, "lightdiff.extras")
        if (module, name.rpartition(".")[0]) != ("lightdiff.cli", "lightdiff.extras.settings")  # which import no torch
    }
    assert found == {("lightdiff.cli", True)}


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


@pytest.mark.parametrize("part", FORBIDDEN)
def test_layers(part: str) -> None:
    found = [
        (module, name)
        for module, names in MODULES.items()
        if within(module, f"lightdiff.{part}")
        for name, _ in names
        if any(within(name, f"lightdiff.{other}") for other in FORBIDDEN[part])
    ]
    assert not found


def test_only_training_knows_of_other_processes() -> None:
    found = {module for module, names in MODULES.items() for name, _ in names if within(name, "torch.distributed")}
    assert found <= {"lightdiff.runtime.launcher", "lightdiff.runtime.processes"}


@pytest.mark.parametrize("module", [*LIGHT, "lightdiff.cli", "lightdiff.__main__"])
def test_light_modules_name_no_torch(module: str) -> None:
    assert not [name for name, inside in MODULES[module] if name.split(".")[0].startswith("torch") and not inside]


@pytest.mark.parametrize("modules", [LIGHT, ["lightdiff.cli"]])
def test_light_modules_load_no_torch(modules: list[str]) -> None:
    heavy = "{'torch', 'torchvision', 'numpy', 'lpips', 'safetensors', 'PIL'}"
    code = f"import sys, {', '.join(modules)}; found = {heavy} & set(sys.modules); assert not found, found"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
