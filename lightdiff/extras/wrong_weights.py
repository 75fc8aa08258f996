"""What is wrong with tensors that are to be a network's weights."""

from lightdiff.errors import UserError, shorten

Shapes = dict[str, tuple[int, ...]]


def misfit(what: str, expected: Shapes, found: Shapes) -> UserError:
    """How the tensors that were found differ from those that a network has."""
    missing = [name for name in expected if name not in found]
    other = [name for name in expected if name in found and found[name] != expected[name]]
    over = [name for name in found if name not in expected]
    kinds = {"missing": missing, "of another shape": other, "left over": over}
    told = [f"{len(names)} {kind}, {shorten(names[0])} first" for kind, names in kinds.items() if names]
    if other:
        told[bool(missing)] += f": {found[other[0]]} where {expected[other[0]]} is expected"
    return UserError(f"{what}: {'; '.join(told)}")
