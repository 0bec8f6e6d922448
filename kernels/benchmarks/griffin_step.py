"""Times a whole Griffin training step on this machine beside google-deepmind's recurrentgemma package.

    pip install --no-deps recurrentgemma 'typeguard<3' einops
    python kernels/benchmarks/griffin_step.py --config griffin_tiny

Same shapes, batch, loss and AdamW. The package rematerialises whole blocks or nothing: whole blocks under
`--model.remat=full`, else nothing, whatever policy ours has. Steps of the two alternate; the best and the median of
each are printed, with the ratio of the medians. The package unrolls its scan 128 times, which takes minutes to
compile: a smaller `--model.num_layers=3` helps. Without the package the peer is our own model on the reference tier.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hybridlm.config import RGLRU, Attention, Config, Kernels
from hybridlm.config_io import load_config, override
from hybridlm.model import build
from hybridlm.optim import make_optimizer
from hybridlm.train.step import init_state, make_train_step

try:
    from recurrentgemma import common
    from recurrentgemma.jax import griffin
except ImportError:
    common = griffin = None

Run = Callable[[], Any]
"""Runs one step and returns something to wait for."""


def ours(config: Config, batch: dict[str, jax.Array]) -> Run:
    init, bind = build(config.model, config.kernels)
    optimizer, schedule = make_optimizer(config.optimizer, config.train.steps)
    state = jax.jit(partial(init_state, init, optimizer, 0))()
    step = make_train_step(bind, optimizer, schedule, config.train)

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    return run


def theirs(config: Config, batch: dict[str, jax.Array]) -> Run:
    """The peer's model of the same shapes: its MLP and output projections have biases, ours here have none."""
    assert common is not None and griffin is not None
    blocks = config.model.blocks()
    attention = next(b.mixer for b in blocks if isinstance(b.mixer, Attention))
    recurrent = next(b.mixer for b in blocks if isinstance(b.mixer, RGLRU))
    kinds = {RGLRU: common.TemporalBlockType.RECURRENT, Attention: common.TemporalBlockType.ATTENTION}
    model = griffin.Griffin(
        common.GriffinConfig(
            vocab_size=config.model.vocab_size,
            width=config.model.width,
            mlp_expanded_width=blocks[0].ffn.hidden,
            num_heads=attention.num_heads,
            block_types=tuple(kinds[type(b.mixer)] for b in blocks),
            embeddings_scale_by_sqrt_dim=config.model.scale_embedding,
            attention_window_size=attention.window,
            logits_soft_cap=config.model.logit_soft_cap or 0.0,
            lru_width=recurrent.width,
        ),
        gradient_checkpointing=config.model.remat == "full",
    )
    params = jax.jit(lambda key: model.init(key, batch["tokens"], batch["positions"]))(jax.random.key(0))
    optimizer, _ = make_optimizer(config.optimizer, config.train.steps)

    def loss(params: Any) -> jax.Array:
        logits, _ = model.apply(params, batch["tokens"], batch["positions"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    state = params, jax.jit(optimizer.init)(params)

    def run() -> Any:
        nonlocal state
        *new, value = step(*state)
        state = tuple(new)
        return value

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="griffin_tiny")
    parser.add_argument("--steps", type=int, default=15)
    args, overrides = parser.parse_known_args()
    config = override(load_config(args.config), [word.removeprefix("--") for word in overrides])
    b, t = config.train.batch_size, config.data.seq_len
    tokens = jax.random.randint(jax.random.key(1), (b, t + 1), 0, 256)
    ones = jnp.ones((b, t), jnp.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": ones,
        "positions": jnp.broadcast_to(jnp.arange(t), (b, t)),
        "target_bytes": ones,
        "loss_weight": jnp.ones((b, t)),
    }
    runs = {"hybridlm": ours(config, batch)}
    if griffin is None:
        runs["hybridlm, reference tier"] = ours(replace(config, kernels=Kernels(linear_scan="reference")), batch)
    else:
        runs["recurrentgemma"] = theirs(config, batch)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(args.steps + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if i:  # the first compiles
                seconds[name].append(time.perf_counter() - start)
    mine = statistics.median(seconds["hybridlm"])
    for name, times in seconds.items():
        median = statistics.median(times)
        print(
            f"{name:32} {b * t / median:9,.0f} tokens/s (median), {b * t / min(times):9,.0f} (best), "
            f"{median / mine:5.2f} x the time of hybridlm"
        )


if __name__ == "__main__":
    main()
