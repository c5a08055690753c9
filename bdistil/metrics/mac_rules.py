"""Which operators of torch cost multiply-adds, how many each, and which are known to be free."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from math import isqrt, prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

# Operators without matmul-like work, beyond those that fvcore knows, as a pattern of what is between "aten::_" and "_".
FREE_OPERATORS = r"""
    (leaky_|p|r|)relu6?|(c|s|)elu|gelu|silu|mish|glu|(log_)?(sigmoid|softmax)|hard(tanh|sigmoid|swish)|tanh|threshold|t|
    (hard|soft|tanh)shrink|soft(plus|sign)|(alpha_|feature_|feature_alpha_|)dropout|bernoulli|embedding(_bag)?|one_hot|
    (batch|layer|group|instance|rms|weight|linalg_vector)_norm|norm|weight_norm_interface|grid_sampler|upsample_\w+|all|
    any|(adaptive_)?(avg|max)_pool[123]d(_with_indices)?|add|r?sub|mul(tiply)?|(true_|floor_|)div(ide)?|neg|abs|sign|eq|
    log(1p|2|10)?|exp(2|m1)?|logsumexp|r?sqrt|pow|square|reciprocal|a?(sin|cos|tan)h?|atan2|erfc?|round|ceil|floor|frac|
    trunc|fmod|remainder|clamp(_min|_max)?|clip|addc(mul|div)|lerp|where|(logical|bitwise)_\w+|and|x?or|not|ne|[gl][et]|
    is(nan|inf|finite)|nan_to_num|(arg)?(max|min|sort)|a(min|max|minmax)|(max|min)imum|sum|mean|prod|(std|var)(_mean)?|
    cum(sum|prod)|topk|clone|copy|detach|alias|numpy_t|transpose|move(axis|dim)|swap(axes|dims)|unflatten|(un)?squeeze|
    unfold|im2col|col2im|tile|repeat(_interleave)?|(expand|view|reshape)_as|broadcast_(to|tensors)|flip|rot90|fill|zero|
    pad(_packed_sequence)?|(reflection|replication)_pad\dd|pixel_(un)?shuffle|channel_shuffle|concat|[hv]stack|linspace|
    (unsafe|tensor)_(split\w*|chunk)|index_\w+|scatter(_add)?|masked_(select|scatter|fill)|take(_along_dim)?|tri[lu]|
    diag(onal|_embed)?|meshgrid|new_ones|randn?|numel|dim|item|(ones|empty|rand|randn)_like|scalar_tensor|lift_fresh|
    local_scalar_dense|pack_padded_sequence|\w+implicit|real|imag|conj|view_as_(real|complex)"""

# What torch's own operators come down to when they run.
FREE_WHEN_RUN = r"""
    (native_|cudnn_|miopen_)\w*norm\w*|view|unsafe_view|to_copy|constant_pad_nd|cat|stack|slice|select|expand|permute|reshape|
    empty\w*|full|arange|zeros|as_strided|unbind|split(_with_sizes)?|roll|assert\w*|index|constant"""


def not_free(names: Mapping[str, int], patterns: str) -> dict[str, int]:
    """Those of some operators, by how often each ran, that none of the patterns knows to be free."""
    free = re.compile(rf"aten::_*({patterns})_*", re.VERBOSE | re.IGNORECASE)
    return {name: times for name, times in names.items() if not free.fullmatch(name)}


def _sizes(value: Any) -> list[int]:
    return list(value.type().sizes())


def _product(left: int) -> Callable[[list[Any], list[Any]], int]:
    """A matrix product whose left factor is input number `left`; the sum runs over its last dimension."""
    return lambda inputs, outputs: prod(_sizes(outputs[0])) * _sizes(inputs[left])[-1]


def _convolution(inputs: list[Any], outputs: list[Any]) -> int:
    transposed = inputs[6].toIValue() is True  # the number of groups, where padding is a word
    return prod(_sizes(inputs[0] if transposed else outputs[0])) * prod(_sizes(inputs[1])[1:])


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    query, key, value = map(_sizes, inputs[:3])
    return prod(_sizes(outputs[0])[:-1]) * key[-2] * (query[-1] + value[-1])


def _recurrent(inputs: list[Any], outputs: list[Any]) -> int:
    """Every matrix is used once a step; the steps are the rows of the input, padded or packed."""
    lists = [v.node().inputs() for v in inputs[1:] if v.node().kind() == "prim::ListConstruct"]
    matrices = [s for values in lists for s in map(_sizes, values) if len(s) == 2]
    return prod(_sizes(inputs[0])[:-1]) * sum(map(prod, matrices))


def _einsum(inputs: list[Any], outputs: list[Any]) -> int:
    factors = [torch.empty(_sizes(v), device="meta") for v in inputs[1].node().inputs()]
    with FlopCounterMode(display=False) as counter:  # counts 2 a multiply-add
        torch.einsum(inputs[0].toIValue(), *factors)
    return int(counter.get_total_flops()) // 2


# By operator: multiply-adds from the inputs and outputs of a traced node, as fvcore hands them over.
RULES: dict[str, Callable[[list[Any], list[Any]], int]] = {
    **{f"aten::{name}": _product(0) for name in ("linear", "mm", "bmm", "matmul", "mv", "dot", "vdot", "inner")},
    **{f"aten::{name}": _product(1) for name in ("addmm", "addmv", "baddbmm")},
    **{f"aten::{name}": _recurrent for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
    "aten::_convolution": _convolution,
    "aten::_convolution_mode": _convolution,
    "aten::scaled_dot_product_attention": _attention,
    "aten::einsum": _einsum,
    "aten::tensordot": lambda i, o: isqrt(prod(_sizes(i[0])) * prod(_sizes(i[1])) * prod(_sizes(o[0]))),  # IK KJ IJ
}
