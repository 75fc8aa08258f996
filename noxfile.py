"""Checks, each in an environment that is kept: `nox -s tests lint types build docs`."""

import os
import shutil
import tempfile
from pathlib import Path

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["tests", "lint", "types", "build", "docs"]

AT_ONCE = ["-n", "auto", "--maxprocesses", "4", "--dist", "worksteal"]  # each test computes in one thread
ONNXRUNTIME_WEB = "1.30.0"  # as lightdiff/extras/export/web.py has it
PLATFORMS = ("linux", "win32", "darwin")  # types are checked for all, as tests run on one at a time


def install(session: nox.Session, *groups: str) -> None:
    """Install the package as it stands here, with development groups."""
    session.install("-e", ".", *(f"--group={group}" for group in groups))


@nox.session
def tests(session: nox.Session) -> None:
    """Run the test suite, as many tests at a time as there are cores; arguments after -- go to pytest."""
    install(session, "test", "types")
    session.run("pytest", *(session.posargs or [*AT_ONCE, "--durations=10"]))


def borrowed(session: nox.Session) -> str:
    """The Python of the tests' environment: torch is too large to install it for every session."""
    folder = Path(session.cache_dir).parent / "tests"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        session.run("nox", "-s", "tests", "--install-only", external=True)
    return str(python)


@nox.session(venv_backend="none")
def coverage(session: nox.Session) -> None:
    """List the lines that no test runs; arguments after -- go to pytest. Half as long again as the tests alone."""
    python = borrowed(session)
    tests = ["-m", "pytest", "--cov", "--cov-report=term"]
    session.run(python, *tests, *(session.posargs or AT_ONCE), external=True)


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Check types for all three platforms, in the tests' environment; arguments after -- go to mypy."""
    python = borrowed(session)
    for platform in PLATFORMS:
        cache = f"--cache-dir=.mypy_cache/{platform}"  # each its own: mypy discards that of another platform
        session.run(python, "-m", "mypy", f"--platform={platform}", cache, *session.posargs, external=True)


@nox.session(venv_backend="none")
def reference(session: nox.Session) -> None:
    """Write the settings page of the docs from the settings' models, in the tests' environment."""
    session.run(borrowed(session), "docs/reference/make_settings.py", external=True)


def measure(session: nox.Session, tool: str, *groups: str) -> None:
    """Run a measuring tool in the tests' environment, to which it may add development groups."""
    python = borrowed(session)
    for group in groups:
        session.run(python, "-m", "pip", "install", "-q", f"--group={group}", external=True)
    session.run(python, "-m", tool, *session.posargs, external=True)


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Measure speed and memory beside the peers'; arguments after -- go to tests/bench. 15 minutes on a CPU."""
    measure(session, "tests.bench", "bench")


@nox.session(venv_backend="none")
def recipe(session: nox.Session) -> None:
    """Measure what each choice of the recipe is worth; arguments after -- go to tests/bench/recipe.py. Hours."""
    measure(session, "tests.bench.recipe", "bench")


@nox.session(venv_backend="none")
def faults(session: nox.Session) -> None:
    """Stop all stages 100 times in all and compare; arguments after -- go to tests/bench/faults.py. 10 minutes."""
    measure(session, "tests.bench.faults")


@nox.session(venv_backend="none")
def saving(session: nox.Session) -> None:
    """Measure what saving costs; arguments after -- go to tests/bench/saving.py."""
    measure(session, "tests.bench.saving")


@nox.session(venv_backend="none")
def tour(session: nox.Session) -> None:
    """Run the demo, and compare the numbers that the tour says one should see with it. 5 minutes."""
    python = borrowed(session)
    with tempfile.TemporaryDirectory() as folder:
        session.run(python, "-m", "lightdiff", "demo", "--run", folder, external=True)
        session.run(python, "docs/tour/check_claims.py", folder, external=True)


@nox.session(venv_backend="none")
def two_machines(session: nox.Session) -> None:
    """Train over a network link between two namespaces, and cut it. Needs root and iproute2."""
    measure(session, "tests.bench.two_machines")


@nox.session
def hub(session: nox.Session) -> None:
    """Test exports and trackers with the libraries that they are for, on top of the tests' environment. 2 minutes."""
    where = ("-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    theirs = session.run(borrowed(session), *where, external=True, silent=True)
    own = session.run("python", *where, silent=True)
    (Path(str(own).strip()) / "tests.pth").write_text(str(theirs).strip())
    session.install("onnx", "onnxscript", "onnxruntime", "wandb", "trackio", "mlflow")
    browser = Path(session.create_tmp()) / "onnxruntime-web"
    if shutil.which("npm") and not browser.exists():
        session.run("npm", "install", "--prefix", str(browser), f"onnxruntime-web@{ONNXRUNTIME_WEB}", external=True)
    environment = {"PYTHONPATH": ".", "ONNXRUNTIME_WEB": str(browser / "node_modules/onnxruntime-web")}
    files = [f"tests/test_{name}.py" for name in ("onnx", "web", "trackers")]
    session.run("python", "-m", "pytest", "-n", "2", *(session.posargs or files), env=environment)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format."""
    session.install("--group=lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("pre-commit", "validate-config")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site in site/, where a warning is an error; arguments after -- go to sphinx-build. Without torch."""
    session.install("--group=docs")
    session.run("sphinx-build", "-q", "-n", "-W", "--keep-going", *session.posargs, "docs", "site")


@nox.session(reuse_venv=False)
def build(session: nox.Session) -> None:
    """Build the wheel, install it into a clean environment, and call it there from elsewhere."""
    session.install("build")
    with tempfile.TemporaryDirectory() as folder:
        session.run("python", "-m", "build", "--wheel", "--outdir", folder)
        (wheel,) = Path(folder).glob("*.whl")
        session.install(str(wheel))
        session.chdir(folder)
        session.run("lightdiff", "--version")
        session.run("lightdiff", "--help")
        session.run("lightdiff", "presets")
