"""The config of learning from a teacher. Imports no JAX. Use it from `hybridlm.config`."""

from dataclasses import dataclass
from typing import Literal

from hybridlm.config_check import ConfigError, Fraction, Node, NonNegativeInt, PositiveFloat, PositiveInt


@dataclass(frozen=True, kw_only=True)
class Distill(Node):
    """Learning a teacher's probabilities (generalised knowledge distillation: Agarwal et al., 2023, arXiv:2306.13649).

    With p of the teacher and q of the student, both at `temperature`, the loss of a token is `hard_weight` times the
    next-token loss and 1 - `hard_weight` times D(p, q) temperature^2, which keeps the gradient's scale.
    """

    teacher: str
    """Run directory of the teacher."""
    teacher_step: NonNegativeInt | None = None
    """Of its checkpoint; where absent, the latest when the run begins."""
    loss: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """D: KL(p||q), KL(q||p), or beta KL(p||m) + (1 - beta) KL(q||m) with m = beta p + (1 - beta) q."""
    beta: Fraction = 0.5
    """Of `jsd`; towards 0 it learns like `forward_kl`, towards 1 like `reverse_kl`."""
    temperature: PositiveFloat = 1.0
    hard_weight: Fraction = 0.0
    on_policy: Fraction = 0.0
    """Share of the batches that go on with the student's own tokens. There D alone is learned, on these tokens."""
    prompt_length: PositiveInt = 32
    """Tokens of each row of such a batch that stay; the others are drawn at temperature 1, to the document's end."""

    def check(self) -> None:
        if self.loss == "jsd" and not 0 < self.beta < 1:
            other = "forward_kl" if self.beta == 0 else "reverse_kl"
            raise ConfigError("beta", f"={self.beta}: must be above 0 and below 1; take loss={other}")
