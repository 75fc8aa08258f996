"""One Python file out of several: a file of its own together with what it uses of lightdiff, and of what that uses.

Annotations, which name types of other libraries, are left out; docstrings, which explain, stay.
"""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from lightdiff.errors import UserError

PACKAGE = "lightdiff"
Names = dict[str, ast.stmt]


class Module:
    """What a module defines and imports at its top level."""

    def __init__(self, source: str) -> None:
        tree = ast.parse(source)
        self.text = ast.get_docstring(tree) or ""
        self.defined: Names = {}
        self.imported: dict[str, ast.Import | ast.ImportFrom] = {}  # of other libraries, each name by itself
        self.taken: dict[str, tuple[str, str]] = {}  # from lightdiff: name -> module, name there
        for node in tree.body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self._note(node)
            else:
                self.defined |= {name: node for name in targets(node)}

    def _note(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            name = alias.asname or alias.name.split(".")[0]
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == PACKAGE:
                self.taken[name] = (str(node.module), alias.name)
            elif isinstance(node, ast.ImportFrom):
                self.imported[name] = ast.ImportFrom(node.module, [alias], 0)
            else:
                self.imported[name] = ast.Import([alias])


def targets(node: ast.stmt) -> list[str]:
    """The names that a statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return [node.target.id] if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else []


class Plain(ast.NodeTransformer):
    """Takes annotations off; fields of a class that has nothing else keep one that says nothing."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Of arguments and of what is returned."""
        self.generic_visit(node)
        node.returns = None
        for argument in ast.walk(node.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        """Of fields."""
        bases = {ast.unparse(base) for base in [*node.bases, *node.decorator_list]}
        has_fields = any(base.startswith(("NamedTuple", "dataclass")) for base in bases)
        fields = [child for child in node.body if isinstance(child, ast.AnnAssign)]
        self.generic_visit(node)
        if has_fields:
            kept = [ast.AnnAssign(f.target, ast.Name("object"), f.value, 1) for f in fields]
            node.body = [*node.body[:1], *kept, *[child for child in node.body[1:] if child not in fields]]
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        """Of a variable; one without a value is left out."""
        return ast.Assign([node.target], node.value) if node.value is not None else None


@cache
def module(name: str) -> Module:
    """One of lightdiff's modules."""
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Module(Path(spec.origin).read_text(encoding="utf-8"))


def bundle(template: Path, network: str = "") -> str:
    """The source of a file that imports nothing of lightdiff.

    Args:
        template: A Python file, of which everything is taken.
        network: "module:class" of the architecture that the template is for, if not the default's.

    Raises:
        UserError: If that architecture is not one of lightdiff's.
    """
    top = Module(template.read_text(encoding="utf-8"))
    if network and "Network" in top.taken:
        home, _, name = network.partition(":")
        if home.split(".")[0] != PACKAGE:
            raise UserError(f"the architecture {network} is not one of lightdiff's: only those can be exported")
        top.taken["Network"] = (home, name)
    libraries: dict[str, str] = {}  # name -> import statement
    parts: dict[str, str] = {}  # name -> source, in the order that they need each other
    origins: dict[str, object] = {}

    def take(home: Module, name: str) -> None:
        if name in home.taken:
            source, original = home.taken[name]
            take(module(source), original)
            if original != name and name not in parts:
                parts[name] = f"{name} = {original}"
        elif name in home.imported:
            libraries[name] = ast.unparse(home.imported[name])
        elif name in home.defined and name not in origins:
            origins[name] = home
            node = ast.parse(ast.unparse(home.defined[name])).body[0]
            plain = ast.fix_missing_locations(Plain().visit(node))
            for used in names_in(plain):
                take(home, used)
            parts[name] = ast.unparse(plain)
        else:
            assert origins.get(name, home) is home or name not in home.defined, f"two different things named {name}"

    for name in top.defined:
        take(top, name)
    imports = "\n".join(sorted(set(libraries.values()), key=lambda line: (line.split()[1], line)))
    return "\n\n\n".join([f'"""{top.text}\n"""\n\n{imports}', *dict.fromkeys(parts.values())]) + "\n"


def names_in(node: ast.AST) -> Iterator[str]:
    """The names that a definition uses."""
    return (child.id for child in ast.walk(node) if isinstance(child, ast.Name))
