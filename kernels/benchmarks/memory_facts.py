"""How many random facts a small model learns by heart: a memory against an MLP of the same FLOPs.

    python kernels/benchmarks/memory_facts.py

A fact is three random bytes and the byte that follows them; nothing about it can be derived. Two models of two layers,
local attention and an MLP in the first, are trained on the same facts in the same order; the second layer has a memory
in one, in the other an MLP with at least as many FLOPs per token. Printed: forward FLOPs per token, parameters, those
that a token uses, and the share of all facts whose last byte is predicted, every `--every` steps.
"""

import argparse
import math
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridlm import flops
from hybridlm.config import (
    PEER,
    AdamW,
    Attention,
    Block,
    Cosine,
    Kernels,
    Memory,
    MemoryPlus,
    Model,
    ProductKeyMemory,
    RowAdam,
    SwiGLU,
    Train,
    UltraMem,
)
from hybridlm.mixers.base import Segments
from hybridlm.model import build
from hybridlm.optim import make_optimizer
from hybridlm.train.step import init_state, make_train_step

WIDTH, BATCH = 32, 512
MEMORIES: dict[str, Memory] = {
    "ProductKeyMemory": ProductKeyMemory(num_rows=64**2, top_k=8, num_heads=2, key_dim=32),
    "MemoryPlus": MemoryPlus(num_rows=64**2, top_k=8, num_heads=2, key_dim=32, qk_norm=True),
    "PEER": PEER(num_rows=64**2, top_k=8, num_heads=2, key_dim=32),
    "UltraMem": UltraMem(num_rows=64**2, top_k=8, key_dim=16, value_dim=32),
}


def model_of(ffn: Any) -> Model:
    attention = Attention(num_heads=4, num_kv_heads=4, window=4)
    first = Block(mixer=attention, ffn=SwiGLU(hidden=128))
    return Model(
        vocab_size=256, width=WIDTH, num_layers=2, prologue=(first,), pattern=(Block(mixer=attention, ffn=ffn),)
    )


def control(memory: Memory) -> SwiGLU:
    """As many FLOPs as the memory has, or more."""
    spent = flops.forward_flops(model_of(memory), 3) - flops.forward_flops(model_of(SwiGLU(hidden=1)), 3)
    return SwiGLU(hidden=1 + math.ceil(spent / (6 * WIDTH)))


def train(name: str, ffn: Any, facts: np.ndarray, steps: int, every: int, lr: float, row_lr: float) -> None:
    cfg = AdamW(peak_lr=lr, weight_decay=0.0, schedule=Cosine(warmup_steps=100), tables=RowAdam(lr=row_lr))
    options = Train(steps=steps, batch_size=BATCH)
    model = model_of(ffn)
    init, bind = build(model, Kernels())
    optimizer, schedule = make_optimizer(cfg, steps)
    state = jax.jit(partial(init_state, init, optimizer, 0, cfg.tables))()
    step = make_train_step(bind, optimizer, schedule, options, cfg.tables)
    total = sum(x.size for x in jax.tree.leaves(state.params))
    used = total - flops.idle_parameters(model)
    print(f"{name}: {flops.forward_flops(model, 3):,} FLOPs, {total:,} parameters, {used:,} used", flush=True)

    @jax.jit
    def known(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        lm = bind(params)
        x, _, _ = lm.features(batch["tokens"], Segments(batch["segment_ids"], batch["positions"]))
        return jnp.sum(jnp.argmax(lm.logits(x)[:, 2], axis=-1) == batch["targets"][:, 2])

    rng, start = np.random.default_rng(1), time.monotonic()
    order = np.concatenate([rng.permutation(len(facts)) for _ in range(math.ceil(steps * BATCH / len(facts)))])
    for i in range(steps):
        state, metrics = step(state, batch_of(facts[order[i * BATCH : (i + 1) * BATCH]]))
        if (i + 1) % every == 0 or i + 1 == steps:
            right = sum(int(known(state.params, batch_of(facts[j : j + BATCH]))) for j in range(0, len(facts), BATCH))
            usage = f", {metrics['aux/memory_used']:.0%} of rows used" if "aux/memory_used" in metrics else ""
            print(
                f"  step {i + 1}: loss {metrics['loss']:.3f}, {right / len(facts):.1%} of {len(facts)} facts{usage}, "
                f"{time.monotonic() - start:.0f} s",
                flush=True,
            )


def batch_of(facts: np.ndarray) -> dict[str, Any]:
    ids = np.ones((len(facts), 3), np.int32)
    weight = np.zeros((len(facts), 3), np.float32)
    weight[:, 2] = 1.0
    positions = np.broadcast_to(np.arange(3, dtype=np.int32), ids.shape)
    arrays = {"tokens": facts[:, :3], "targets": facts[:, 1:], "segment_ids": ids, "positions": positions}
    return arrays | {"target_bytes": ids, "loss_weight": weight}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", choices=MEMORIES, default="ProductKeyMemory")
    parser.add_argument("--facts", type=int, default=16_384, help="a multiple of 512")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--every", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--row-lr", type=float, default=3e-3)
    parser.add_argument("--only", choices=("memory", "mlp"))
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    keys = rng.choice(256**3, args.facts, replace=False)
    facts = np.stack([keys >> 16, keys >> 8 & 255, keys & 255, rng.integers(0, 256, args.facts)], axis=1).astype(
        np.int32
    )
    memory = MEMORIES[args.memory]
    for name, ffn in (("memory", memory), ("mlp", control(memory))):
        if args.only in (None, name):
            train(f"{name} ({type(ffn).__name__})", ffn, facts, args.steps, args.every, args.lr, args.row_lr)


if __name__ == "__main__":
    main()
