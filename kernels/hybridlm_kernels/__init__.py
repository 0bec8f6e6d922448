"""Training kernels of hybrid language models: one function per operation, several implementations behind each.

>>> h, h_last = linear_scan(a, x, segment_ids=ids)          # h_t = a_t h_{t-1} + x_t
>>> y, state = short_conv(x, w, activation="silu")          # causal depthwise convolution
>>> print(explain("linear_scan", a, x))                     # which implementation runs, and why
"""

from hybridlm_kernels.dispatch import IMPLS, OPS, Explanation, UnsupportedKernel, explain
from hybridlm_kernels.linear_scan import linear_scan
from hybridlm_kernels.short_conv import short_conv

__all__ = ["IMPLS", "OPS", "Explanation", "UnsupportedKernel", "explain", "linear_scan", "short_conv"]
