"""What is known of a published architecture."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from hybridlm.config import Model
from hybridlm.interop.fields import Fields
from hybridlm.interop.rules import Rule


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A family's configs and weights, in both directions."""

    name: str
    """As config.json has it under `architectures`."""
    model_type: str
    to_model: Callable[[Fields], Model]
    """Raises ConfigError with the field that is not supported."""
    to_fields: Callable[[Model], dict[str, Any]]
    """Fields of config.json. Reads what it needs; whether that is all of the model, `to_model` of the result tells.

    Raises ConfigError where the model's layers are of another kind.
    """
    rules: Callable[[Model, Collection[str]], list[Rule]]
    """Of all parameters, for a checkpoint that has tensors of these names."""
    not_read: str = r"(?!)"
    """A pattern of names: tensors that belong to nothing the model computes."""

    def is_read(self, name: str) -> bool:
        return re.fullmatch(self.not_read, name) is None
