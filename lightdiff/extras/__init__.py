"""What looks, compares, evaluates and imports: built on the core, never imported by it."""

from lightdiff.errors import UserError


def not_installed(command: str, *packages: str) -> UserError:
    """That a command needs packages that lightdiff does without otherwise."""
    names = " ".join(packages)
    how = f"python -m pip install {names} (with pipx: pipx inject lightdiff {names})"
    return UserError(f"{command} needs {' and '.join(packages)}: {how}")
