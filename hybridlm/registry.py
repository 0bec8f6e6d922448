"""Which module computes which config class. Mixers and FFNs each have one registry."""

from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from hybridlm.config_check import ConfigError, Node, suggestion

C = TypeVar("C", bound=Node)


@dataclass(frozen=True)
class Entry(Generic[C]):
    """A module and small configs of it, at which the tests over all registered blocks run."""

    module: Any
    examples: tuple[C, ...]


@dataclass(frozen=True)
class Registry(Generic[C]):
    kind: str
    entries: dict[type[C], Entry[C]] = field(default_factory=dict)

    def register(self, config: type[C], module: Any, *, examples: tuple[C, ...]) -> None:
        """Let `module(cfg, context, rngs)` compute `config`. `examples` suit a model width of 32 and two devices."""
        self.entries[config] = Entry(module, examples)

    def module_of(self, cfg: C) -> Any:
        """Raises ConfigError where nothing is registered for the class of `cfg`."""
        if entry := self.entries.get(type(cfg)):
            return entry.module
        names = [config.__name__ for config in self.entries]
        hint = suggestion(type(cfg).__name__, names) or f"; registered: {', '.join(names)}"
        raise ConfigError(self.kind, f": no {self.kind} is registered for {type(cfg).__name__}{hint}")
