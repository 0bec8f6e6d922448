"""Training kernels of hybrid language models: one function per operation, several implementations behind each.

>>> h, h_last = linear_scan(a, x, segment_ids=ids)          # h_t = a_t h_{t-1} + x_t
>>> h, h_last = rg_lru(x, gate_a, gate_x, decay)            # the same with Griffin's gates computed inside
>>> y, state = short_conv(x, w, activation="silu")          # causal depthwise convolution
>>> y = grouped_matmul(x, w, group_sizes)                   # y_i = x_i w[j] for the rows i of group j
>>> y = memory_lookup(table, indices, weights)              # y_t = sum_k w_tk table[i_tk]
>>> print(explain("linear_scan", a, x))                     # which implementation runs, and why
"""

from hybridlm_kernels.debug import check_values
from hybridlm_kernels.dispatch import IMPLS, OPS, Explanation, UnsupportedKernel, explain, interpret_pallas
from hybridlm_kernels.grouped_matmul import grouped_matmul
from hybridlm_kernels.linear_attention import gated_delta_rule, gated_linear_attention
from hybridlm_kernels.linear_scan import linear_scan
from hybridlm_kernels.memory_lookup import memory_lookup, memory_scores
from hybridlm_kernels.rg_lru import rg_lru
from hybridlm_kernels.short_conv import short_conv

__all__ = [
    "IMPLS",
    "OPS",
    "Explanation",
    "UnsupportedKernel",
    "check_values",
    "explain",
    "gated_delta_rule",
    "gated_linear_attention",
    "grouped_matmul",
    "interpret_pallas",
    "linear_scan",
    "memory_lookup",
    "memory_scores",
    "rg_lru",
    "short_conv",
]
