"""Shapes in the signatures of networks: jaxtyping's, or, where that is not installed, plain tensors."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Float as Float
    from jaxtyping import Int as Int
    from jaxtyping import Real as Real
else:
    try:
        from jaxtyping import Float, Int, Real
    except ImportError:

        class Float:
            """Stands for all of them."""

            def __class_getitem__(cls, shape: tuple[type, str]) -> Any:
                return shape[0]

        Int = Real = Float
