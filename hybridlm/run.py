"""Trained models from a run directory: `hybridlm.load`."""

from pathlib import Path

import jax
import numpy as np
from jaxtyping import Int

from hybridlm import config_io
from hybridlm.config import Config
from hybridlm.data.corpus import load_corpus, tokenizer_of
from hybridlm.data.pipeline import evaluation_batches
from hybridlm.data.tokenizers import Tokenizer
from hybridlm.model import build
from hybridlm.model.buffering import buffered, check_resident
from hybridlm.model.compiled import Model
from hybridlm.model.expert_usage import count_choices, hottest, layers_with_experts, read_usage
from hybridlm.train.checkpoint import Checkpoints
from hybridlm.train.derived import read_params

USAGE_SEQUENCES = 16
"""Of held-out text, over which the hottest experts are found."""


def load(
    run_dir: str | Path, *, resident_experts: int | None = None, usage: str | Path | None = None
) -> tuple[Model, Tokenizer, Config]:
    """The model of a run at its latest checkpoint, its tokenizer and its config, on one device.

    With `resident_experts`, only so many experts of each layer lie on the device; the others stay in host memory, and
    one is fetched when a token goes to it. They are the hottest in the file `usage`, which `hybridlm experts RUN --json
    FILE` wrote, or where it is absent on some of the run's held-out text.

    Raises ConfigError where the directory holds no run or no complete checkpoint, or layers have fewer experts.
    """
    config = config_io.load_run_config(run_dir)
    tokenizer = tokenizer_of(config.data)
    if resident_experts is not None:
        usage = None if usage is None else Path(usage)
        return load_buffered(Path(run_dir), config, resident_experts, usage), tokenizer, config
    init, bind = build(config.model, config.kernels)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=first_device()),
        jax.eval_shape(lambda: init(jax.random.key(0))),
    )
    with Checkpoints(Path(run_dir) / "checkpoints", config.model, config.checkpoint) as checkpoints:
        params = checkpoints.restore_params(abstract)
    return Model(params, bind), tokenizer, config


def load_buffered(run_dir: Path, config: Config, num: int, usage: Path | None) -> Model:
    """The model with the `num` hottest experts of each layer on the device."""
    check_resident(config.model, num)
    by_layer = None if usage is None else read_usage(usage, config.model)
    params, _ = read_params(run_dir, config)

    def with_resident(ids: dict[int, Int[np.ndarray, " num"]]) -> Model:
        return Model(*buffered(params, config.model, config.kernels, ids, first_device()))

    if by_layer is None:
        # Found by a model that has no more experts on the device either; which they are does not change its choices.
        first = with_resident({layer: np.arange(num) for layer in layers_with_experts(config.model)})
        size = min(config.train.batch_size, USAGE_SEQUENCES)
        windows = load_corpus(config.data).validation
        batches = evaluation_batches(windows, batch_size=size, sharding=None, limit=-(-USAGE_SEQUENCES // size))
        by_layer = count_choices(first.bind, first.params, batches, config.model)
    return with_resident({layer: hottest(counts, num) for layer, counts in by_layer.items()})


def first_device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])
