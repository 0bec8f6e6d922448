"""Options of the compiler: a table per platform, and a run's own."""

import jax
import pytest

from hybridlm.compiler_options import OPTIONS, compiler_options
from hybridlm.config_check import ConfigError
from hybridlm.train.program import own_options_as_config_errors


def test_a_runs_own_options_come_on_top() -> None:
    options = compiler_options("gpu", ("xla_a=true", "xla_b=17", "xla_gpu_enable_latency_hiding_scheduler=false"))
    assert options == {"xla_gpu_enable_latency_hiding_scheduler": False, "xla_a": True, "xla_b": "17"}
    assert OPTIONS["gpu"] == {"xla_gpu_enable_latency_hiding_scheduler": True}


@pytest.mark.parametrize("option", ["xla_a", "xla_a=", "=true"])
def test_what_is_no_option_is_an_error(option: str) -> None:
    with pytest.raises(ConfigError, match=r"^sharding.xla_options.1=.*: expected name=value"):
        compiler_options("cpu", ("xla_b=1", option))


OWN = ("xla_tpu_enable_async_collective_fusion=true",)
# What libtpu says of it on v5p and v6e, shortened.
REFUSAL = "FAILED_PRECONDITION: Continuation fusion for AllGather is enabled on platform viperfish\nand more"


def test_an_option_that_the_devices_do_not_support_is_one_line() -> None:
    line = "^sharding.xla_options: FAILED_PRECONDITION: Continuation fusion for AllGather is enabled on .* viperfish$"
    with pytest.raises(ConfigError, match=line), own_options_as_config_errors(OWN):
        raise jax.errors.JaxRuntimeError(REFUSAL)


@pytest.mark.parametrize(("own", "text"), [((), REFUSAL), (OWN, "INTERNAL: a kernel: INVALID_ARGUMENT")])
def test_other_errors_of_the_compiler_are_not_blamed_on_options(own: tuple[str, ...], text: str) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError), own_options_as_config_errors(own):
        raise jax.errors.JaxRuntimeError(text)
