"""What each mixer learns of a synthetic task in a few minutes on a CPU: the recipe's budget, and other mixers in it.

    python kernels/benchmarks/synthetic_tasks.py mqar
    python kernels/benchmarks/synthetic_tasks.py parity

Recall (Arora et al., 2023, arXiv:2312.04927) and state tracking (Grazzi et al., 2024, arXiv:2411.12537). A row per
mixer: accuracy of answers on held-out examples, at several lengths for parity; steps until it was 0.999 on a part of
them, or all of the recipe's; and minutes of one CPU core, compiling included. One seed.
"""

import argparse
import contextlib
import time
from dataclasses import replace
from functools import partial
from typing import Any

import jax

from hybridlm.config import RGLRU, Attention, Block, Config, DeltaNet, GatedDeltaNet, Mixer
from hybridlm.config_io import load_config
from hybridlm.data.corpus import load_corpus
from hybridlm.data.pipeline import Batches, evaluation_batches
from hybridlm.data.synthetic.windows import windows_of_length
from hybridlm.evaluation.synthetic import accuracy, make_answer_step
from hybridlm.model import build
from hybridlm.optim import make_optimizer
from hybridlm.train.step import init_state, make_train_step

CHECKED_EVERY = 25  # steps
CHECKED = 256  # examples
LEARNED = 0.999  # of their answers
LENGTHS = {"mqar": (32,), "parity": (40, 80, 160, 320)}


def rows(task: str) -> dict[str, tuple[Mixer, ...]]:
    """The mixers of a stack, by name."""
    if task == "mqar":
        attention = Attention(num_heads=2, num_kv_heads=2, head_dim=64)
        recurrence = RGLRU(width=64, num_heads=4)
        return {
            "RG-LRU, then attention": (recurrence, attention),
            # What lets a layer look one token back within these steps; the recurrence's convolution does it above.
            "attention": (replace(attention, rope_theta=10.0),),
            "DeltaNet": (DeltaNet(num_heads=2, head_dim=32),),
            "Gated DeltaNet": (GatedDeltaNet(num_heads=2, head_dim=32, value_head_dim=32),),
            "RG-LRU": (recurrence,),
        }
    delta = DeltaNet(num_heads=2, head_dim=16, conv_width=None, allow_neg_eigval=True)
    return {
        "DeltaNet, beta in (0, 2)": (delta,),
        "DeltaNet, beta in (0, 1)": (replace(delta, allow_neg_eigval=False),),
        "RG-LRU": (RGLRU(width=32, num_heads=2),),
        "attention": (Attention(num_heads=2, num_kv_heads=2),),
    }


def config_of(recipe: str, mixers: tuple[Mixer, ...]) -> Config:
    """The recipe with other mixers."""
    config = load_config(recipe)
    ffn = config.model.pattern[0].ffn
    pattern = tuple(Block(mixer=mixer, ffn=ffn) for mixer in mixers)
    return replace(config, model=replace(config.model, pattern=pattern))


def measured(config: Config, lengths: tuple[int, ...]) -> tuple[list[float], int]:
    """Accuracy of answers at each of `lengths`, and how many steps there were."""
    train, task = config.train, config.data.task
    assert task is not None
    init, bind = build(config.model, config.kernels)
    optimizer, schedule = make_optimizer(config.optimizer, train.steps)
    state = jax.jit(partial(init_state, init, optimizer, train.seed))()
    step = make_train_step(bind, optimizer, schedule, train)
    answer = make_answer_step(bind)

    def accuracy_at(params: Any, length: int, limit: int | None) -> float:
        windows = windows_of_length(task, length)
        batches = evaluation_batches(windows, batch_size=train.batch_size, sharding=None, limit=limit)
        return accuracy(answer, params, batches)["accuracy"]

    corpus, done = load_corpus(config.data).train, 0
    batches = Batches(corpus, batch_size=train.batch_size, seed=train.seed, sharding=None, prefetch=2)
    with contextlib.closing(batches):
        for done in range(1, train.steps + 1):
            state, _ = step(state, next(batches))
            checked = CHECKED // train.batch_size if done % CHECKED_EVERY == 0 else 0
            if checked and accuracy_at(state.params, lengths[0], checked) >= LEARNED:
                break
    return [accuracy_at(state.params, length, None) for length in lengths], done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=LENGTHS)
    parser.add_argument("--mixer", action="append", help="one of the rows (default: all)")
    parser.add_argument("--steps", type=int, help="at most (default: the recipe's)")
    args = parser.parse_args()
    lengths = LENGTHS[args.task]
    print("mixer | " + " | ".join(f"accuracy at {length}" for length in lengths) + " | steps | CPU minutes")
    for name, mixers in rows(args.task).items():
        if args.mixer and name not in args.mixer:
            continue
        config = config_of(args.task, mixers)
        if args.steps is not None:
            config = replace(config, train=replace(config.train, steps=args.steps))
        began = time.process_time()
        accuracies, steps = measured(config, lengths)
        minutes = (time.process_time() - began) / 60
        print(" | ".join((name, *(f"{a:.3f}" for a in accuracies), str(steps), f"{minutes:.1f}")), flush=True)


if __name__ == "__main__":
    main()
