"""Configs of fine-tuning. Imports no JAX."""

from dataclasses import dataclass

from hybridlm.config_check import ConfigError, Node, PositiveFloat, PositiveInt


@dataclass(frozen=True, kw_only=True)
class LoRA(Node):
    """W + (alpha / rank) A B in place of matrices W, of which A and B alone are trained (arXiv:2106.09685)."""

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    targets: tuple[str, ...] = ()
    """Patterns of parameters' paths, such as `*.mixer.w_q`; without any, all matrices of mixers and FFNs but those of
    routers."""
    dora: bool = False
    """Train the norm of each output's weights apart from their direction (arXiv:2402.09353)."""


@dataclass(frozen=True, kw_only=True)
class Finetune(Node):
    """Which parameters a run trains, and what it may add to those that it begins with.

    Patterns are those of file names, over the paths of parameters: `embedding`, `stack.repeats.0.*`, `*.ffn.*`. A
    stack's `repeats.0` are the first blocks of all repeats of the pattern, which are trained alike.
    """

    lora: LoRA | None = None
    """Train adapters of matrices, and of the other parameters only what `trained` or `fresh` name."""
    frozen: tuple[str, ...] = ()
    """These stay as they are, whatever else names them."""
    trained: tuple[str, ...] = ()
    """Only these change (beside adapters, and what `fresh` names)."""
    fresh: tuple[str, ...] = ()
    """These may be missing in the run that this one begins with, or have another shape there: they are drawn anew."""
    differs: tuple[str, ...] = ()
    """Patterns of fields of the model, such as `model.pattern.*.mixer.window`, which may differ from that run's."""

    def check(self) -> None:
        for name in ("frozen", "trained", "fresh", "differs"):
            for i, pattern in enumerate(getattr(self, name)):
                if not pattern:
                    raise ConfigError(f"{name}.{i}", ": is empty; give a pattern such as *.ffn.*")
