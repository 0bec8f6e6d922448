"""Gradients of queries, keys and gates of gated linear attention, every chunk in parallel (Mosaic GPU).

Letters: h value heads of all batch rows, n chunks, c chunk (64 tokens), k key dim, v value dim, p pieces of bfloat16.

With S the state that enters a chunk, dS the gradient of the one that leaves it, pre and suf the sums of g up to a token
and after it, r = beta (v - exp(pre) (k S)), dr its gradient, and u = T r (u = v where nothing is erased):

    G = scale tril(do u^T) o Gamma,            E = -beta_i strict_tril(dr u^T) o Gamma   (0 where nothing is erased)
    dq = scale exp(pre) (do S^T) + G k
    dk = exp(suf) (u dS^T) - beta exp(pre) (dr S^T) + G^T q + (E + E^T) k

The exponent of Gamma_ij is the sum of g over j < l <= i, hence token l gains what M = G o (q k^T) + E o (k k^T) holds
at j < l <= i: the sums of M's rows from l on, less those of its columns. Both are of the same float32 numbers, so that
what cancels leaves no more than their rounding. All other sums of g have terms of one kind only.

Two warpgroups share a chunk where k or v is 128: each has half of the value columns, then half of the key columns.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hybridlm_kernels.gpu_kernel import gpu_kernel
from hybridlm_kernels.linear_attention.gpu_blocks import (
    BLOCK,
    COMPILER_PARAMS,
    ONLY,
    Operand,
    Ref,
    blocks,
    each_row,
    indices,
    load,
    pieces,
    product,
    repeat,
    row_numbers,
    store,
    transposed,
)
from hybridlm_kernels.linear_attention.gpu_prepare import BETA, ENTER, LEAVE, NUM_ROWS, TOTAL, Chunks, decays

# Rows of the gradients per token: of the sums of g up to it, of those after it, of beta; <S, dS> channel by channel;
# and what is to be subtracted from the first row, kept apart because threads hold it in another order.
D_PREFIX, D_SUFFIX, D_BETA, D_TOTAL, MINUS_D_PREFIX, NUM_SUMS = range(6)
ROWS, COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def gradients(
    chunks: Chunks,
    v: Array,
    states: Array,
    do: Array,
    dr: Array,
    dstates: Array,
    *,
    scale: float,
    num_pieces: int,
) -> tuple[Array, Array, Array]:
    """dq, dk [h, t, k] bfloat16, of every value head, and sums per token [h n, NUM_SUMS, c] float32.

    v, do [h, t, v]; dr [p, h, t, v]; `states` and `dstates` [p, h n, k, v].
    """
    q, k, numbers, inverse = chunks.q, chunks.k, chunks.numbers, chunks.inverse
    (heads, t, value_dim), key_dim = v.shape, k.shape[2]
    num_chunks, group = t // BLOCK, heads // k.shape[0]
    key_blocks, value_blocks = key_dim // BLOCK, value_dim // BLOCK
    threads = 2 if max(key_blocks, value_blocks) > 1 else 1
    thread = "w" if threads > 1 else ONLY
    erases = inverse is not None
    dr = dr.reshape(num_pieces * heads, t, value_dim)
    arrays = (q, k, v, do, numbers, states, dstates, *((dr, inverse) if erases else ()))

    def kernel(*refs: Ref) -> None:
        q_ref, k_ref, v_ref, do_ref, numbers_ref, states_ref, dstates_ref, *erasing = refs[: len(arrays)]
        dq_ref, dk_ref, sums_ref = refs[len(arrays) : len(arrays) + 3]
        q_all, k_all, v_all, do_all, given, s_all, ds_all, scratch, sums, ready, met, *of_erasing = refs[
            len(arrays) + 3 :
        ]
        dr_all, t_all = refs[-2:]
        head, chunk = lax.axis_index("h"), lax.axis_index("n")
        index, tokens = head * num_chunks + chunk, pl.ds(chunk * BLOCK, BLOCK)
        key_head = lax.div(head, jnp.int32(group))
        part = [pl.ds(i * BLOCK, BLOCK) for i in range(max(key_blocks, value_blocks))]

        def fetch() -> None:
            copies = [(numbers_ref.at[index], given)]
            for i in range(key_blocks):
                copies.append((q_ref.at[key_head, tokens, part[i]], q_all.at[i]))
                copies.append((k_ref.at[key_head, tokens, part[i]], k_all.at[i]))
            for j in range(value_blocks):
                copies.append((v_ref.at[head, tokens, part[j]], v_all.at[j, 0]))
                copies.append((do_ref.at[head, tokens, part[j]], do_all.at[j]))
                for p in range(num_pieces):
                    state = p * heads * num_chunks + index
                    for i in range(key_blocks):
                        copies.append((states_ref.at[state, part[i], part[j]], s_all.at[i, j, p]))
                        copies.append((dstates_ref.at[state, part[i], part[j]], ds_all.at[i, j, p]))
                    for ref in erasing[:1]:
                        copies.append((ref.at[p * heads + head, tokens, part[j]], dr_all.at[j, p]))
            for ref in erasing[1:]:
                for p in range(num_pieces):
                    copies.append((ref.at[p * heads * num_chunks + index], t_all.at[p]))
            for source, buffer in copies:
                plgpu.copy_gmem_to_smem(source, buffer, ready)

        def meet(i: int) -> None:
            """Both warpgroups' shared memory is written, and they have read what may be written over."""
            plgpu.commit_smem()
            if threads > 1:
                plgpu.barrier_arrive(met.at[i])
                plgpu.barrier_wait(met.at[i])

        # The operands of blocks i of the key dim and j of the value dim.
        def query(i: Array | int) -> Operand:
            return [q_all.at[i]]

        def key(i: Array | int) -> Operand:
            return [k_all.at[i]]

        def d_out(j: Array | int) -> Operand:
            return [do_all.at[j]]

        def u(j: Array | int) -> Operand:
            return pieces(v_all.at[j], num_pieces if erases else 1)  # v itself is exact, and needs no more pieces

        def dr_of(j: Array | int) -> Operand:
            return pieces(dr_all.at[j], num_pieces)

        def entering(i: Array | int, j: Array | int) -> Operand:
            return pieces(s_all.at[i, j], num_pieces)

        def leaving(i: Array | int, j: Array | int) -> Operand:
            return pieces(ds_all.at[i, j], num_pieces)

        g_operand, e_operand = (pieces(scratch.at[i], num_pieces) for i in (0, int(erases)))

        def row(number: int) -> Array:
            return row_numbers(given.at[number])

        def add(number: int, value: Array) -> None:
            """Adds numbers per token to a row of this warpgroup's sums."""
            layout = COLUMNS if number == MINUS_D_PREFIX else ROWS
            mine = sums.at[lax.axis_index(thread), number]
            mine[...] = plgpu.layout_cast(mine[...], layout) + value

        def add_exponents(m: Array) -> None:
            add(D_PREFIX, m.sum(axis=1))
            add(MINUS_D_PREFIX, m.sum(axis=0))

        # One product after the other: results that wait in registers for others would be spilled.
        def of_values(j: Array) -> None:
            """Makes u of 64 columns of the values, and what those columns give the gates."""
            read = product(*((query(i), entering(i, j)) for i in range(key_blocks)))
            add(D_PREFIX, scale * row(ENTER) * (load(d_out(j)) * read).sum(axis=1))
            if erases:
                read = each_row(row(ENTER)) * product(*((key(i), entering(i, j)) for i in range(key_blocks)))
                add(D_PREFIX, -row(BETA) * (load(dr_of(j)) * read).sum(axis=1))
                r = load([v_all.at[j, 0]]) - read
                add(D_BETA, (load(dr_of(j)) * r).sum(axis=1))
                store(u(j), each_row(row(BETA)) * r)
                plgpu.commit_smem()
                store(u(j), product((pieces(t_all, num_pieces), u(j))))
            read = product(*((key(i), leaving(i, j)) for i in range(key_blocks)))
            add(D_SUFFIX, row(LEAVE) * (load(u(j)) * read).sum(axis=1))
            for i in range(key_blocks):
                add(D_TOTAL, (load(entering(i, j)) * load(leaving(i, j))).sum(axis=1))

        def of_scores() -> None:
            """Makes G, and what its exponents give the gates."""
            rows, columns = indices()
            g = product(*((d_out(j), transposed(u(j))) for j in range(value_blocks)))
            g = scale * decays(given) * g
            store(g_operand, g)
            similar = product(*((query(i), transposed(key(i))) for i in range(key_blocks)))
            add_exponents(jnp.where(rows > columns, g * similar, 0.0))

        def of_similarities() -> None:
            """Makes E, and what it gives beta and the gates."""
            rows, columns = indices()
            e = product(*((dr_of(j), transposed(u(j))) for j in range(value_blocks)))
            e = jnp.where(rows > columns, -decays(given) * e, 0.0)
            store(e_operand, each_row(row(BETA)) * e)
            m = e * product(*((key(i), transposed(key(i))) for i in range(key_blocks)))
            add(D_BETA, m.sum(axis=1))
            add_exponents(each_row(row(BETA)) * m)

        def of_keys(i: Array) -> None:
            """dq and dk of 64 columns of the keys, written in the place of q and k."""
            dq = product(*((d_out(j), transposed(entering(i, j))) for j in range(value_blocks)))
            dq = scale * each_row(row(ENTER)) * dq + product((g_operand, key(i)))
            dk = product(*((u(j), transposed(leaving(i, j))) for j in range(value_blocks)))
            dk = each_row(row(LEAVE)) * dk
            within = [(transposed(g_operand), query(i))]
            if erases:
                read = product(*((dr_of(j), transposed(entering(i, j))) for j in range(value_blocks)))
                dk = dk - each_row(row(BETA) * row(ENTER)) * read
                within += [(e_operand, key(i)), (transposed(e_operand), key(i))]
            dk = dk + product(*within)
            columns = pl.ds(i * BLOCK, BLOCK)
            store(query(i), dq)
            store(key(i), dk)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(query(i)[0], dq_ref.at[head, tokens, columns])
            plgpu.copy_smem_to_gmem(key(i)[0], dk_ref.at[head, tokens, columns])

        me = lax.axis_index(thread)
        pl.when(me == 0)(fetch)
        for number in range(NUM_SUMS):
            layout = COLUMNS if number == MINUS_D_PREFIX else ROWS
            sums[me, number] = plgpu.layout_cast(jnp.zeros(BLOCK, jnp.float32), layout)
        plgpu.barrier_wait(ready)
        repeat(lax.div(value_blocks - me + threads - 1, jnp.int32(threads)), lambda j: of_values(me + threads * j))
        meet(0)
        pl.when(me == 0)(of_scores)
        if erases:
            pl.when(me == threads - 1)(of_similarities)
        meet(1)
        repeat(lax.div(key_blocks - me + threads - 1, jnp.int32(threads)), lambda i: of_keys(me + threads * i))
        plgpu.copy_smem_to_gmem(sums.at[me], sums_ref.at[index, me])
        plgpu.wait_smem_to_gmem(0)

    copies = 1 + 2 * key_blocks + value_blocks * (2 + 2 * key_blocks * num_pieces)
    if erases:
        copies += num_pieces * (1 + value_blocks)
    of_threads = {"num_threads": threads, "thread_name": thread} if threads > 1 else {}
    dq, dk, sums = gpu_kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((heads, t, key_dim), jnp.bfloat16),
            jax.ShapeDtypeStruct((heads, t, key_dim), jnp.bfloat16),
            jax.ShapeDtypeStruct((heads * num_chunks, threads, NUM_SUMS, BLOCK), jnp.float32),
        ],
        scratch_types=[
            blocks(key_blocks),
            blocks(key_blocks),
            blocks(value_blocks, num_pieces),
            blocks(value_blocks),
            plgpu.SMEM((NUM_ROWS, BLOCK), jnp.float32),
            blocks(key_blocks, value_blocks, num_pieces),
            blocks(key_blocks, value_blocks, num_pieces),
            blocks(2 if erases else 1, num_pieces),
            plgpu.SMEM((threads, NUM_SUMS, BLOCK), jnp.float32),
            plgpu.Barrier(num_arrivals=copies),
            plgpu.Barrier(num_arrivals=threads, num_barriers=2),
            *((blocks(value_blocks, num_pieces), blocks(num_pieces)) if erases else ()),
        ],
        grid=(heads, num_chunks) if threads > 1 else (1, heads, num_chunks),
        grid_names=("h", "n") if threads > 1 else (thread, "h", "n"),
        compiler_params=COMPILER_PARAMS,
        kernel_name="linear_attention_gradients",
        **of_threads,
    )(*arrays)
    sums = sums.sum(axis=1)
    sums = sums.at[:, D_PREFIX].add(-sums[:, MINUS_D_PREFIX])
    return dq, dk, sums


def shared_bytes(key_dim: int, value_dim: int, num_pieces: int, *, erases: bool) -> int:
    """What `gradients`, which needs the most, takes of a multiprocessor's shared memory."""
    key_blocks, value_blocks = key_dim // BLOCK, value_dim // BLOCK
    in_pieces = value_blocks + 2 * key_blocks * value_blocks + 1 + (value_blocks + 2 if erases else 0)
    num_blocks = 2 * key_blocks + value_blocks + num_pieces * in_pieces
    return num_blocks * BLOCK * BLOCK * 2 + 8 * 1024  # the rest: numbers per token, barriers, the compiler's own


def gate_gradients(sums: Array, numbers: Array) -> tuple[Array, Array]:
    """dg and dbeta [h n, c] from `gradients`' sums: a token is in the sums up to later ones and after earlier ones."""
    from_prefix = jnp.cumsum(sums[:, D_PREFIX, ::-1], axis=1)[:, ::-1]
    from_suffix = jnp.cumsum(jnp.pad(sums[:, D_SUFFIX, :-1], ((0, 0), (1, 0))), axis=1)
    from_total = numbers[:, TOTAL] * sums[:, D_TOTAL].sum(axis=1, keepdims=True)
    return from_prefix + from_suffix + from_total, sums[:, D_BETA]
