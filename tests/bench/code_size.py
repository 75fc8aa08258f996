"""Lines of code of lightdiff, without docstrings, comments and blank lines: `python -m tests.bench.code_size`."""

import ast
import io
import tokenize
from pathlib import Path

import lightdiff

ROOT = Path(lightdiff.__file__).parent
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def docstring_lines(source: str) -> set[int]:
    """The numbers of the lines that docstrings take."""
    found: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                found.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return found


def code_lines(source: str) -> int:
    """How many lines hold code."""
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            found.update(range(token.start[0], token.end[0] + 1))
    return len(found - docstring_lines(source))


def sources() -> dict[str, str]:
    """The text of each of lightdiff's files; names as in `training/loop.py`."""
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}


def in_core(file: str) -> bool:
    """Whether a file belongs to the core: what is no extra."""
    return not file.startswith("extras/")


def main() -> None:
    """Print the lines of each file, most first, and the sums."""
    counts = {file: code_lines(source) for file, source in sources().items()}
    for file, count in sorted(counts.items(), key=lambda row: -row[1]):
        print(f"{count:6,} {file}")
    core = sum(count for file, count in counts.items() if in_core(file))
    print(f"{core:6,} core\n{sum(counts.values()) - core:6,} extras")


if __name__ == "__main__":
    main()
