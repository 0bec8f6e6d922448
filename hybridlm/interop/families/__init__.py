"""Published architectures, one file for those that name their tensors alike."""

from hybridlm.config_check import ConfigError
from hybridlm.interop.architecture import Architecture
from hybridlm.interop.families import fla, llama, mamba2, qwen3_next, recurrent_gemma
from hybridlm.interop.fields import Fields

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for family in (llama, recurrent_gemma, mamba2, qwen3_next, fla)
    for architecture in family.ARCHITECTURES
}
"""By name, in the order in which an export tries them."""


def architecture_of(fields: Fields) -> Architecture:
    """That of a config.json: by `architectures`, or where that is absent by `model_type`."""
    names, kind = fields.get("architectures"), fields.get("model_type")
    if names:
        name = names if isinstance(names, str) else names[0]
        return architecture_named(str(name), "architectures")
    if kind is None:
        raise ConfigError("architectures", f": is missing, and so is model_type; known are {', '.join(ARCHITECTURES)}")
    by_type = (known.name for known in ARCHITECTURES.values() if known.model_type == kind)
    return architecture_named(next(by_type, str(kind)), "model_type")


def architecture_named(name: str, where: str) -> Architecture:
    """Raises ConfigError, which lists what is known, where it is not; `where` says which input named it."""
    if name not in ARCHITECTURES:
        raise ConfigError(where, f": {name} is not supported; known are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]
