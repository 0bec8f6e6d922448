"""Trained models from a run directory: `hybridlm.load`."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from hybridlm import config_io
from hybridlm.config import Config
from hybridlm.data.tokenizers import Tokenizer, load_tokenizer
from hybridlm.model import Params, build
from hybridlm.model.lm import LM, LMState
from hybridlm.train.checkpoint import Checkpoints


class Model:
    """A trained language model: parameters, and a compiled call."""

    def __init__(self, params: Params, bind: Callable[[Params], LM]):
        self.params, self.bind = params, bind

    @cached_property
    def _call(self) -> Any:
        return jax.jit(lambda params, *args: self.bind(params)(*args))

    def __call__(
        self, tokens: Int[Array, "b t"], segment_ids: Int[Array, "b t"] | None = None, state: LMState | None = None
    ) -> tuple[Float[Array, "b t v"], LMState | None]:
        """Float32 logits, and the state after the last token where one was given; see `LM.__call__`."""
        return self._call(self.params, tokens, segment_ids, state)

    def init_state(self, batch: int, length: int) -> LMState:
        """The state before the first of up to `length` tokens."""
        return self.bind(self.params).init_state(batch, length)


def load(run_dir: str | Path) -> tuple[Model, Tokenizer, Config]:
    """The model of a run at its latest checkpoint, its tokenizer and its config, on one device.

    Raises ConfigError where the directory holds no run or no complete checkpoint.
    """
    config = config_io.load_run_config(run_dir)
    init, bind = build(config.model, config.kernels)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        jax.eval_shape(lambda: init(jax.random.key(0))),
    )
    with Checkpoints(Path(run_dir) / "checkpoints", config.checkpoint.keep) as checkpoints:
        params = checkpoints.restore_params(abstract)
    return Model(params, bind), load_tokenizer(config.data.tokenizer), config
