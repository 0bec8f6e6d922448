"""hybridlm: pretrain, fine-tune and evaluate hybrid language models in JAX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybridlm.run import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """`load` is imported when it is used: a mistake in a config should be told before JAX has loaded."""
    if name == "load":
        from hybridlm.run import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
