"""The layers: prologue, repeats of the pattern under one `lax.scan`, what is left of the pattern, epilogue.

Compile time does not grow with the number of repeats. Letters: b batch, t time, d model width.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from hybridlm import config
from hybridlm.ffns import FFNS
from hybridlm.ffns.base import RECORDED, Aux, Pass
from hybridlm.layers import RMSNorm
from hybridlm.mixers import MIXERS
from hybridlm.mixers.base import Carry, Context, Segments, State
from hybridlm.sharding import fold_time, unfold_time

BLOCK_OUTPUT = "block_output"
REMAT_POLICIES: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "block_outputs": jax.checkpoint_policies.save_only_these_names(BLOCK_OUTPUT),
}

StackState = dict[str, Any]
"""Mixer states by part: `prologue`, `tail` and `epilogue` are lists over blocks, `repeats` has stacked leaves."""


class Block(nnx.Module):
    """x += mixer(norm(x)); x += ffn(norm(x)).

    Where time is cut over devices, the mixer alone sees sequences; all else has a row for each device's part of one.
    """

    def __init__(self, cfg: config.Block, context: Context, rngs: nnx.Rngs):
        self.cfg, self.context = cfg, context
        self.mixer_norm = RMSNorm(rngs, context.width, context.norm_eps, offset=context.norm_offset)
        self.mixer = MIXERS.module_of(cfg.mixer)(cfg.mixer, context, rngs)
        if cfg.ffn is not None:
            self.ffn_norm = RMSNorm(rngs, context.width, context.norm_eps, offset=context.norm_offset)
            self.ffn = FFNS.module_of(cfg.ffn)(cfg.ffn, context, rngs)
        else:
            self.ffn = None

    def __call__(
        self, x: Float[Array, "b t d"], segments: Segments, state: State | None, carry: Carry, given: Pass
    ) -> tuple[Float[Array, "b t d"], State | None, Carry, Aux]:
        with jax.named_scope(f"mixer/{type(self.cfg.mixer).__name__}"):
            y, state, carry = self.mixer(unfold_time(self.mixer_norm(x)), segments, state, carry)
            x = x + checkpoint_name(fold_time(y), BLOCK_OUTPUT)
        if self.ffn is None:
            return x, state, carry, {}
        with jax.named_scope(f"ffn/{type(self.cfg.ffn).__name__}"):
            folded = Segments(*map(fold_time, segments))
            y, aux, carry = self.ffn(self.ffn_norm(x), folded, carry, given)
            x = x + checkpoint_name(y, BLOCK_OUTPUT)
        return x, state, carry, aux

    def taps(self, batch: int, length: int) -> Any:
        """Zeros for what the FFN reads from tables (see `Pass.taps`); None where it reads none."""
        make = None if self.cfg.ffn is None else getattr(FFNS.module_of(self.cfg.ffn), "taps", None)
        return make(self.cfg.ffn, self.context, batch, length) if make else None


class Stack(nnx.Module):
    """All blocks of a model."""

    def __init__(self, cfg: config.Model, context: Context, rngs: nnx.Rngs):
        self.cfg = cfg
        self.num_repeats, tail = divmod(cfg.num_layers - len(cfg.prologue) - len(cfg.epilogue), len(cfg.pattern))

        def blocks(part: tuple[config.Block, ...], rngs: nnx.Rngs) -> Any:
            return nnx.List([Block(block, context, rngs) for block in part])

        self.prologue = blocks(cfg.prologue, rngs)
        if self.num_repeats:
            self.repeats = jax.vmap(lambda rngs: blocks(cfg.pattern, rngs))(rngs.split(self.num_repeats))
        self.tail = blocks(cfg.pattern[:tail], rngs)
        self.epilogue = blocks(cfg.epilogue, rngs)

    def __call__(
        self, x: Float[Array, "b t d"], segments: Segments, state: StackState | None, carry: Carry, given: Pass
    ) -> tuple[Float[Array, "b t d"], StackState | None, Carry, dict[str, Any]]:
        """`state` None is training. Aux values are vectors over the layers that report them, in order.

        With `given.taps`, what the FFNs recorded for their tables' gradients is `aux["recorded"]`, in the taps' form.
        """
        run = _apply_block
        if self.cfg.remat != "none" and state is None:
            run = jax.checkpoint(run, policy=REMAT_POLICIES[self.cfg.remat])
        reports: list[dict[str, Array]] = []
        new_state: StackState = {}
        recorded: dict[str, Any] = {}
        layer = 0

        def run_all(
            blocks: Any, x: Array, states: Any, taps: Any, carry: Carry, first: Array | int
        ) -> tuple[Array, list[Any], list[Any], Carry, Aux]:
            new_states, records, reported = [], [], []
            of_blocks = ([None] * len(blocks) if of_all is None else of_all for of_all in (states, taps))
            for i, (block, block_state, block_taps) in enumerate(zip(blocks, *of_blocks, strict=True)):
                given_block = given._replace(layer=first + i, taps=block_taps)
                x, block_state, carry, aux = run(block, x, segments, block_state, carry, given_block)
                new_states.append(block_state)
                records.append({name: aux.pop(name) for name in list(aux) if name.startswith(RECORDED)} or None)
                reported.append(aux)
            return x, new_states, records, carry, _in_order(reported)

        def of_part(name: str) -> tuple[Any, Any]:
            return None if state is None else state[name], None if given.taps is None else given.taps[name]

        def run_part(name: str, x: Array, carry: Carry) -> tuple[Array, Carry]:
            nonlocal layer
            blocks = getattr(self, name)
            states, taps = of_part(name)
            x, new_state[name], recorded[name], carry, aux = run_all(blocks, x, states, taps, carry, layer)
            reports.append(aux)
            layer += len(blocks)
            return x, carry

        def repeat(loop: tuple[Array, Carry], xs: tuple[Any, Any, Any, Array]) -> tuple[tuple[Array, Carry], Any]:
            blocks, states, taps, first = xs
            y, new_states, records, carry, aux = run_all(blocks, loop[0], states, taps, loop[1], first)
            return (y, carry), (new_states, records, aux)

        x, carry = run_part("prologue", x, carry)
        if self.num_repeats:
            firsts = layer + len(self.cfg.pattern) * jnp.arange(self.num_repeats)
            xs = (self.repeats, *of_part("repeats"), firsts)
            (x, carry), (new_state["repeats"], recorded["repeats"], aux) = jax.lax.scan(repeat, (x, carry), xs)
            reports.append({name: values.reshape(-1, *values.shape[2:]) for name, values in aux.items()})
            layer += len(self.cfg.pattern) * self.num_repeats
        x, carry = run_part("tail", x, carry)
        x, carry = run_part("epilogue", x, carry)
        aux: dict[str, Any] = {name: jnp.concatenate(values) for name, values in _by_name(reports).items()}
        if given.taps is not None:
            aux["recorded"] = recorded
        return x, None if state is None else new_state, carry, aux

    def init_state(self, batch: int, length: int) -> StackState:
        """Empty states of all mixers, for up to `length` tokens."""
        return self._of_blocks(lambda block: block.mixer.init_state(batch, length))

    def taps(self, batch: int, length: int) -> StackState:
        """Zeros for what all blocks read from tables (see `Pass.taps`), in the form of a state."""
        return self._of_blocks(lambda block: block.taps(batch, length))

    def _of_blocks(self, make: Callable[[Block], Any]) -> StackState:
        def part(blocks: Any) -> list[Any]:
            return [make(block) for block in blocks]

        made: StackState = {name: part(getattr(self, name)) for name in ("prologue", "tail", "epilogue")}
        if self.num_repeats:
            made["repeats"] = jax.vmap(lambda blocks: part(blocks))(self.repeats)
        return made


def _apply_block(
    block: Block, x: Array, segments: Segments, state: State | None, carry: Carry, given: Pass
) -> tuple[Array, State | None, Carry, Aux]:
    return block(x, segments, state, carry, given)


def _in_order(reported: list[Aux]) -> dict[str, Array]:
    """The scalars that blocks report, as one vector per name."""
    return {name: jnp.stack(values) for name, values in _by_name(reported).items()}


def _by_name(reported: list[Aux]) -> dict[str, list[Array]]:
    names = dict.fromkeys(name for aux in reported for name in aux)
    return {name: [aux[name] for aux in reported if name in aux] for name in names}
