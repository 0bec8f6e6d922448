"""UltraMem: Tucker-decomposed scores, several cores, and virtual tables that share one physical table.

Letters: b batch, t time, d model width, h heads, c cores, p projectors, r ranks, g grid side, e key width, k rows per
head, v row width.
"""

import math
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.ffns.base import Aux, Pass
from hybridlm.ffns.memory.query_norms import standardized
from hybridlm.ffns.memory.reading import idle_share, table_of
from hybridlm.ffns.memory.retrieval import project_queries
from hybridlm.ffns.memory.table import Table, table_name, tap
from hybridlm.ffns.memory.tucker import first_score, tucker_loss, tucker_top_k
from hybridlm.layers import fan_in_normal, merge_tokens, split_tokens
from hybridlm.mixers.base import Carry, Context, Segments
from hybridlm.sharding import out_sharding, param, per_device


class UltraMem(nnx.Module):
    """y = sum_p W_p^T o_p, o_p,c = sum_h sum_{i in T_h, p(i) = p} S_h,c,i V_row(i),c (Huang et al., 2025,
    arXiv:2411.12364).

    T_h are the k virtual rows with the best scores sum_c S_h,c (see `tucker`); a virtual row is a row of the table and
    the projector p that it is read through. Block c of a row's columns is weighted by the score of core c, without a
    softmax. Queries and keys are layer-normed, with a scale and no bias; heads share queries. The causal convolution
    before the query is left out: the paper's ablation finds no gain in it.
    """

    def __init__(self, cfg: config.UltraMem, context: Context, rngs: nnx.Rngs):
        d, e, v = context.width, key_dim(cfg, context), value_dim(cfg, context)
        h, c, r, side = cfg.num_heads, cfg.num_cores, cfg.tucker_rank, cfg.searched_keys
        self.cfg, self.name = cfg, table_name(cfg, context)
        self.w_query = param(rngs, (d, 2 * e), ("embed", None), fan_in_normal(1.0))
        # With these two scales, the scores of selected rows are 1 on average at first.
        scale = first_score(side, cfg.top_k, r, c) ** -0.5
        self.query_scale = param(rngs, (2, e), (None, None), nnx.initializers.constant(scale))
        self.key_scale = param(rngs, (2, e), (None, None), nnx.initializers.constant(e**-0.5))
        self.keys = param(rngs, (2, h, r, side, e), (None,) * 5, nnx.initializers.normal(1.0))
        self.cores = param(rngs, (h, c, r, r), (None,) * 4, nnx.initializers.uniform(1.0))
        self.w_out = param(rngs, (cfg.expansion * v, d), (None, "embed"), fan_in_normal(1.0))

    def __call__(
        self, x: Float[Array, "b t d"], segments: Segments, carry: Carry, given: Pass
    ) -> tuple[Float[Array, "b t d"], Aux, Carry]:
        cfg, table, tokens = self.cfg, table_of(given, self.name), ("batch",)
        queries = project_queries(x, self.w_query[...])
        keys = standardized(self.keys[...]) * self.key_scale[...][:, None, None, None]
        search = per_device(partial(_search, cfg), in_axes=((), (), (), tokens, tokens), out_axes=(tokens, tokens))
        told = self.query_scale[...], keys, self.cores[...]
        rows, scores = search(*told, queries, segments.ids != 0)  # b t c p hk
        o, recorded = table.lookup(rows, scores, given)  # b t c p v/c
        o = merge_tokens(jnp.swapaxes(o, 2, 3))
        o = o.reshape(o.shape[0], -1)  # bt pv
        y = jnp.dot(o, self.w_out[...].astype(o.dtype), out_sharding=out_sharding("batch", None))
        aux: Aux = recorded
        if cfg.tucker_loss and cfg.tucker_rank > 1:
            aux["ultramem_tucker_loss"] = cfg.tucker_loss * tucker_loss(self.cores[...], cfg.tucker_margin)
        return split_tokens(y, x), aux, carry

    @staticmethod
    def shared(cfg: config.UltraMem, context: Context, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        v, c = value_dim(cfg, context), cfg.num_cores
        if v % c:
            raise ConfigError("value_dim", f"={v}: must divide by num_cores={c}")
        if cfg.num_rows * max(cfg.expansion, c) >= 2**31:
            raise ConfigError("num_rows", f"={cfg.num_rows}: rows are counted in 31 bits, expansion and num_cores too")
        name, reads = table_name(cfg, context), cfg.num_heads * cfg.top_k
        variance = cfg.expansion / (2 * reads * context.num_layers)
        init = nnx.initializers.normal(math.sqrt(variance))
        reads *= c * cfg.expansion
        return {name: Table(name, cfg.num_rows * c, v // c, cfg, context, rngs, init, reads)}

    @staticmethod
    def taps(cfg: config.UltraMem, context: Context, batch: int, length: int) -> dict[str, Array]:
        blocks = cfg.num_cores, cfg.expansion, value_dim(cfg, context) // cfg.num_cores
        return {table_name(cfg, context): tap(context, batch, length, *blocks)}

    @staticmethod
    def flops(cfg: config.UltraMem, context: Context) -> int:
        e, v, h, r = key_dim(cfg, context), value_dim(cfg, context), cfg.num_heads, cfg.tucker_rank
        search = 4 * e * (context.width + h * r * cfg.searched_keys)
        return search + 2 * v * (h * cfg.top_k + cfg.expansion * context.width)

    @staticmethod
    def idle_parameters(cfg: config.UltraMem, context: Context) -> int:
        return idle_share(cfg, context, cfg.num_heads * cfg.top_k, value_dim(cfg, context))


def _search(
    cfg: config.UltraMem,
    query_scale: Float[Array, "2 e"],
    keys: Float[Array, "2 h r g e"],
    cores: Float[Array, "h c r r"],
    queries: Float[Array, "b t f"],
    real: Bool[Array, "b t"],
) -> tuple[Int[Array, "b t c p k"], Float[Array, "b t c p k"]]:
    """Of one device's tokens: which block of the table each core reads through each projector, and its score.

    -1 where a row is read through another projector, and at padding.
    """
    halves = standardized(queries.reshape(real.size, 2, -1)) * query_scale
    scores, virtual = tucker_top_k(halves.astype(queries.dtype), keys, cores, cfg.top_k)
    rows, projectors = shuffled(virtual, cfg.half_keys, math.isqrt(cfg.expansion))
    read = (projectors[:, :, None] == jnp.arange(cfg.expansion)[:, None]) & real.reshape(-1, 1, 1, 1)  # n h p k
    blocks = rows[:, None] * cfg.num_cores + jnp.arange(cfg.num_cores)[:, None, None]  # n c h k
    blocks = jnp.where(read[:, None], blocks[:, :, :, None], -1)  # n c h p k
    weights = jnp.broadcast_to(jnp.swapaxes(scores, 1, 2)[:, :, :, None], blocks.shape)
    blocks, weights = (jnp.swapaxes(a, 2, 3).reshape(*real.shape, *_reads(cfg)) for a in (blocks, weights))
    return blocks, weights.astype(queries.dtype)


def _reads(cfg: config.UltraMem) -> tuple[int, int, int]:
    return cfg.num_cores, cfg.expansion, cfg.num_heads * cfg.top_k


def shuffled(
    virtual: Int[Array, "*n"], half_keys: int, tables_per_axis: int
) -> tuple[Int[Array, "*n"], Int[Array, "*n"]]:
    """The row of the physical table and the projector of a virtual row i g + j, g = half_keys * tables_per_axis.

    By a permutation of the grid, which is then cut into squares of `half_keys`: rounds of i += hash(j), j += hash(i)
    modulo g, which can be undone whatever the hash is. So virtual rows with the same row of the table seldom share a
    key, as in the published buffer of shuffled indices, which takes 4 bytes for each of them.
    """
    side = half_keys * tables_per_axis
    i, j = virtual // side, virtual % side
    for salt in (1, 2, 3):
        i, j = j, (i + hashed(j + salt * side)) % side
    row = (i % half_keys) * half_keys + j % half_keys
    return row, (i // half_keys) * tables_per_axis + j // half_keys


def hashed(x: Int[Array, "*n"]) -> Int[Array, "*n"]:
    """In [0, 2^16), by the finalizer of MurmurHash3."""
    bits = x.astype(jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return (bits >> 16).astype(jnp.int32)


def key_dim(cfg: config.UltraMem, context: Context) -> int:
    return context.width // 2 if cfg.key_dim is None else cfg.key_dim


def value_dim(cfg: config.UltraMem, context: Context) -> int:
    return context.width // 2 if cfg.value_dim is None else cfg.value_dim
