"""How evenly each router spreads tokens while a small model trains: its balance curve, and the loss.

    python kernels/benchmarks/router_balance.py --steps 200

Two layers of Griffin's recurrence, width 64, 8 experts each, on the source of the running Python's standard library;
the same data, seed and optimizer for all. The control is a dense layer of the same active parameters. A row per router:
the busiest expert's load over the mean (1 is balance, 8 is one expert for all), the mean of the two layers, at several
steps; then experts per token and the training loss, over the last 100 steps.
"""

import argparse
import contextlib
import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax

from hybridlm.config import (
    RGLRU,
    AdaptiveTopK,
    Block,
    Comet,
    Config,
    Cosine,
    DenseToSparse,
    DSelectK,
    ExpertChoice,
    GRKANGate,
    GShardTop2,
    HashRouter,
    Model,
    MoE,
    NoisyTopK,
    PreGated,
    RecurrentGate,
    Router,
    SwiGLU,
    Switch,
    TopK,
)
from hybridlm.config_io import load_config
from hybridlm.data.corpus import load_corpus
from hybridlm.data.pipeline import Batches
from hybridlm.model import build
from hybridlm.optim import make_optimizer
from hybridlm.train.step import init_state, make_train_step

HIDDEN = 48  # of an expert


def routers(steps: int) -> dict[str, Router | None]:
    """Two experts per token where there is a choice, None for no experts at all; schedules end half-way."""
    half = steps // 2
    no_loss = TopK(k=2, balance_loss=0.0, z_loss=0.0)
    return {
        "dense control": None,
        "TopK, no balance": no_loss,
        "TopK": TopK(k=2),
        "TopK(score=sigmoid, bias_balance)": replace(no_loss, score="sigmoid", bias_balance=True),
        "TopK(gate=RecurrentGate)": TopK(k=2, gate=RecurrentGate(state_dim=32)),
        "TopK(gate=GRKANGate)": TopK(k=2, gate=GRKANGate(hidden=16)),
        "NoisyTopK": NoisyTopK(k=2),
        "Switch": Switch(),
        "GShardTop2": GShardTop2(),
        "ExpertChoice": ExpertChoice(leaks_future=True),
        "HashRouter": HashRouter(k=2),
        "AdaptiveTopK": AdaptiveTopK(),
        "PreGated": PreGated(router=TopK(k=2)),
        "DenseToSparse": DenseToSparse(anneal_steps=half),
        "DenseToSparse(activation=sigmoid)": DenseToSparse(activation="sigmoid", anneal_steps=half),
        "DSelectK": DSelectK(k=2),
        "Comet": Comet(k=2, search_steps=half),
    }


def curve(router: Router | None, base: Config, data: Any, steps: int) -> Iterator[dict[str, float]]:
    """The metrics of every step."""
    recurrence = RGLRU(width=96, num_heads=4, init="recurrentgemma")
    ffn = SwiGLU(hidden=2 * HIDDEN) if router is None else MoE(num_experts=8, hidden=HIDDEN, router=router)
    block = Block(mixer=recurrence, ffn=ffn)
    model = Model(vocab_size=320, width=64, num_layers=2, pattern=(block,))
    train = replace(base.train, steps=steps)
    init, bind = build(model, base.kernels)
    optimizer, schedule = make_optimizer(base.optimizer, steps)
    state = jax.jit(partial(init_state, init, optimizer, 0))()
    step = make_train_step(bind, optimizer, schedule, train)
    with contextlib.closing(Batches(data, batch_size=train.batch_size, seed=0, sharding=None, prefetch=2)) as batches:
        for _ in range(steps):
            state, metrics = step(state, next(batches))
            yield {name: float(value.mean()) for name, value in metrics.items()}


def mean(records: list[dict[str, float]], name: str) -> float:
    """1 where no record has such a value: the control's load is even, and its one expert everybody's."""
    return statistics.mean(record.get(name, 1.0) for record in records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--router", action="append", help="one of the rows (default: all)")
    args = parser.parse_args()
    base = load_config("griffin_tiny")
    schedule = Cosine(warmup_steps=args.steps // 10)
    base = replace(base, data=replace(base.data, seq_len=128), optimizer=replace(base.optimizer, schedule=schedule))
    data = load_corpus(base.data).train
    at = [step for step in (1, 10, 25, 50, 100, 200, 500, 1000, 2000) if step <= args.steps]
    print("router | " + " | ".join(f"load at {step}" for step in at) + " | experts per token | loss")
    for name, router in routers(args.steps).items():
        if args.router and name not in args.router:
            continue
        records = list(curve(router, base, data, args.steps))
        last = records[-100:]
        values = [f"{mean(records[max(0, i - 5) : i], 'aux/moe_max_load'):.2f}" for i in at]
        values += [f"{mean(last, 'aux/moe_experts_per_token'):.2f}", f"{mean(last, 'loss'):.3f}"]
        print(" | ".join((name, *values)), flush=True)


if __name__ == "__main__":
    main()
