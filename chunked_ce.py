"""A linear layer and any loss on its outputs, without ever holding the logits.

Problem: the logits of a language model's head are its largest tensor. Batch 4 x 4096, hidden 4096,
vocabulary 128K: 4 GiB in bf16, 8 GiB as the float32 a loss needs, several of them in the backward.

Idea: take the tokens in chunks, and take a chunk's gradients while its logits are there.
- `memory_efficient_linear` runs any differentiable function of float32 logits. A scalar's gradients
  are taken in the forward pass, by autograd, and multiplied by the upstream gradient in the
  backward; per-token values are recomputed in the backward, where each token's own is known.
- `linear_cross_entropy`, `linear_logprobs`, `linear_logsumexp` and `grpo_loss` are the fast paths:
  cuBLAS for the products and one Triton kernel that reads a row of logits twice (the second time
  from the L2 cache) and writes its gradient over it. Logits are bf16 in memory, float32 in the
  kernel; with fp16 inputs they are float32 in memory as well, where fp16 would overflow.
- dW is summed in float32. Whole-row chunks cost a read and a write of dW each, so they are large
  (see ROWS); where memory is dearer than time, `budget_mib` makes a second pass over chunks of
  the vocabulary, which writes each row of dW once, for one product more (four for three).

Left out: dropping tokens with ignored labels before the products (their number would have to come
to the host), products of our own (cuBLAS is within a few percent of the chip), tensor parallelism.
Run on an H200 and on CPUs (plain PyTorch there; tests run the kernel in Triton's interpreter).

    python chunked_ce.py                  self-test, then timings; --test or --bench for one of them
    python chunked_ce.py --bench --plot results/ce.png --json results/ce.json

    from chunked_ce import linear_cross_entropy, memory_efficient_linear, patch_causal_lm
    loss = linear_cross_entropy(hidden, lm_head.weight, labels)      # labels already shifted
    loss = memory_efficient_linear(hidden, lm_head.weight, my_loss, targets)  # my_loss(logits, t)
    patch_causal_lm(model)                # then train as before; outputs.logits is None
"""

import argparse
import contextlib
import copy
import functools
import gc
import inspect
import io
import itertools
import json
import math
import os
import pydoc_data.topics
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import types
import typing
import unittest.mock
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # Ctrl-C while torch is imported: nothing else can catch it yet
    INTERRUPT = signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpretedFunction
from triton.testing import do_bench

IGNORE = -100
FUZZ_CASES = "25"  # of each random test in the self-test
LOG2E = tl.constexpr(math.log2(math.e))
NOTHING = tl.constexpr(-math.inf)  # of a column past the end
KEEP, DROP = tl.constexpr("evict_last"), tl.constexpr("evict_first")  # in the L2 cache
# Rows of a chunk where dW is trained and summed in float32: each chunk reads and writes all of dW,
# and a product over 4096 rows hides that (16384 x 4096 x 131072 on an H200: 27.1 ms, over 1024 rows
# 38.8, over 512 rows 55). Else MiB of a chunk's logits: W frozen, dW in bf16, second passes. Below
# FEW_ROWS a second pass is faster than so many reads and writes of dW (Gemma: 75 ms for 108).
# W frozen, 132 MiB take 4% more time than 264 (each chunk reads W twice), 520 no less.
ROWS, FROZEN_MIB, LEAN_MIB, PASS_MIB, FEW_ROWS = 4096, 264, 512, 32, 192
CPU_LOGITS = 2**17  # at a time: its half-dozen float32 copies stay in the caches, a third faster
LOGIT_BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 6}  # fp16: products in float32

# --------------------------------------------------------------------------------------------------
# Checks, and the definition of the loss in plain PyTorch


def _need(ok, name, found, need, error=ValueError):
    """Raise what was found and what is needed, put into words only then: under torch.compile the
    sizes of a shape are symbols."""
    if not ok:
        raise error(f"{name}: found {_words(found)}, need {_words(need)}")


def _words(value):
    """One line for what was found."""
    if isinstance(value, (tuple, Tensor)):
        shape = list(getattr(value, "shape", value))
        return f"a tensor of shape {shape}" if isinstance(value, Tensor) else f"shape {shape}"
    return " ".join(str(getattr(value, "__name__", value)).split())[:200]


def _need_tensor(name, tensor, device, shape, dtypes=None):
    _need(isinstance(tensor, Tensor), name, type(tensor), "a tensor", TypeError)
    _need(tensor.device == device, name, tensor.device, f"{device} as x")
    _need(tensor.shape == shape, name, tensor.shape, tuple(shape))
    names = " or ".join(str(t) for t in dtypes or ())
    _need(not dtypes or tensor.dtype in dtypes, name, tensor.dtype, names, TypeError)


def _need_number(name, value, low, high=math.inf, integer=False):
    kind = int if integer else (int, float)
    ok = isinstance(value, kind) and not isinstance(value, bool)
    _need(ok, name, value, "an integer" if integer else "a number", TypeError)
    ok = low <= value <= high and value < math.inf
    _need(ok, name, value, f"{low} or more" if high == math.inf else f"{low} to {high}")


def _check(x, weight, bias, chunk=None, budget_mib=None):
    """x as [N, D] in the dtype of the products. W is cast later: dW then keeps W's own dtype."""
    for name, tensor, form in (("x", x, "[..., D]"), ("weight", weight, "[V, D]")):
        _need(isinstance(tensor, Tensor), name, type(tensor), "a tensor", TypeError)
        _need(tensor.ndim == 2 or name == "x" and tensor.ndim > 2, name, tensor.shape, form)
    vocab, hidden = weight.shape
    _need(vocab > 0 and hidden > 0, "weight", weight.shape, "at least one row and one column")
    _need(x.device.type in ("cpu", "cuda"), "x", f"it on {x.device}", "it on cpu or cuda")
    auto = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if auto else x.dtype
    _need(dtype in LOGIT_BYTES, "x", dtype, "float32, bfloat16 or float16", TypeError)
    _need_tensor("weight", weight, x.device, (vocab, x.shape[-1]), None if auto else (dtype,))
    if bias is not None:
        _need_tensor("bias", bias, x.device, (vocab,), tuple(LOGIT_BYTES))
    _need(chunk is None or budget_mib is None, "chunk", "budget_mib as well", "one of the two")
    for name, value, low in (("chunk", chunk, 1), ("budget_mib", budget_mib, 2)):
        if value is not None:
            _need_number(name, value, low, integer=True)
    return x.reshape(-1, hidden).to(dtype)


def _check_labels(labels, x, ignore_index):
    _need_number("ignore_index", ignore_index, -(2**63), 2**63 - 1, integer=True)
    _need_tensor("labels", labels, x.device, x.shape[:-1], (torch.int64, torch.int32))
    return labels.reshape(-1)


def _check_range(labels, vocab, ignore):
    """On a CPU, as an operator begins; on a GPU the kernel does it, asynchronously."""
    if labels.device.type == "cpu":
        bad = labels[((labels < 0) | (labels >= vocab)) & (labels != ignore)]
        _need(not len(bad), "labels", bad[:1].tolist(), f"0 to {vocab - 1} or {ignore}")


class _Head(NamedTuple):
    """From a product to a logit: post * softcap * tanh(scale * product / softcap); 0 = no cap."""

    scale: float = 1.0
    softcap: float = 0.0
    post: float = 1.0
    smoothing: float = 0.0
    z_loss: float = 0.0


def _head(scale=1.0, softcap=None, post=1.0, smoothing=0.0, z_loss=0.0):
    for name, value in (("softcap", softcap), ("logit_scale", scale), ("1 / temperature", post)):
        if value is not None or name != "softcap":  # the kernel's tanh is exact to 6e-8: times 1e4
            _need_number(name, value, 0, 1e4 if name == "softcap" else math.inf)
            _need(value > 0, name, value, "more than 0")
    return _Head(float(scale), float(softcap or 0), float(post), float(smoothing), float(z_loss))


def _logits_torch(products, bias, head):
    """(float32 logits, their derivative by the products)."""
    raw = products.float() if bias is None else products.float() + bias.float()
    if not head.softcap:
        return raw * (head.scale * head.post), head.scale * head.post
    t = torch.tanh(raw * (head.scale / head.softcap))
    return t * (head.softcap * head.post), (1 - t * t) * (head.scale * head.post)


class _Stats(NamedTuple):
    """Of each row, float32 [N]: what is read off its logits, or the gradients to those."""

    lse: Tensor  # log(sum(exp(logits)))
    picked: Tensor  # the label's logit
    mean: Tensor  # of the logits
    entropy: Tensor  # lse - sum(softmax * logits)


class _Rows(NamedTuple):
    """Rows of products, of the columns from `first` on of `vocab`, and what goes with them."""

    products: Tensor
    out: Tensor | None  # for the gradient; may be the products
    bias: Tensor | None
    labels: Tensor
    first: int
    vocab: int
    ignore: int
    head: _Head


def _rows_torch(at, weights, loss, rows, grads, mean, entropy):
    """What _row_kernel does, in plain PyTorch: the definition, and the CPU's path."""
    products, out, bias, labels, first, vocab, ignore, head = at
    logits, slope = _logits_torch(products, bias, head)
    live = labels != ignore
    local = labels.long() - first
    here = live & (local >= 0) & (local < logits.shape[1])
    local = torch.where(here, local, 0)[:, None]
    if grads is None or weights is not None:
        rows.lse.copy_(torch.where(live, logits.logsumexp(1), 0))
        rows.picked.copy_(torch.where(here, logits.gather(1, local)[:, 0], 0))
        if mean:
            rows.mean.copy_(torch.where(live, logits.sum(1) / vocab, 0))
        if entropy:
            p = torch.softmax(logits, 1)
            expected = torch.where(p > 0, p * logits, 0).sum(1)
            rows.entropy.copy_(torch.where(live, rows.lse - expected, 0))
    if weights is not None:
        value, grads = _smoothed(rows, weights, head)
        loss.copy_(value)
    if grads is not None:
        p = torch.exp(logits - torch.where(live, rows.lse, math.inf)[:, None])
        grad = p * grads.lse[:, None]
        if entropy:
            surprise = logits - (rows.lse - rows.entropy)[:, None]
            grad -= torch.where(p > 0, p * grads.entropy[:, None] * surprise, 0)
        if mean:
            grad += (grads.mean / vocab)[:, None]
        grad.scatter_add_(1, local, torch.where(here, grads.picked, 0)[:, None])
        out.copy_(torch.where(live[:, None], grad * slope, 0))


def _smoothed(rows, weights, head):
    """Cross-entropy with label smoothing and z-loss from a row's stats: (loss, gradients)."""
    e, z = head.smoothing, head.z_loss
    loss = rows.lse - (1 - e) * rows.picked + z * rows.lse**2
    loss = loss - e * rows.mean if e else loss  # 0 * -inf where a bias masks words
    by_lse = weights * (1 + 2 * z * rows.lse)
    zero = torch.zeros_like(weights)
    return loss * weights, _Stats(by_lse, (e - 1) * weights, -e * weights, zero)


# --------------------------------------------------------------------------------------------------
# One kernel for a row: its softmax, and the gradient written over the logits


# fmt: off
@triton.jit
def _units(products_ptr, bias_ptr, at, mask, cap,
           OTHER: tl.constexpr, KEEP: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr):
    """What a logit is a positive multiple of: the product, or tanh(product / softcap)."""
    if OTHER is None:  # no mask
        u = tl.load(products_ptr + at, eviction_policy=KEEP).to(tl.float32)
        if BIAS:
            u += tl.load(bias_ptr + at).to(tl.float32)
    else:
        u = tl.load(products_ptr + at, mask=mask, other=0.0, eviction_policy=KEEP).to(tl.float32)
        if BIAS:
            u += tl.load(bias_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if CAP:  # tanh(v) = 2 / (1 + exp(-2v)) - 1
        u = 2.0 / (1.0 + tl.exp2(u * cap)) - 1.0
    if OTHER is not None:
        u = tl.where(mask, u, OTHER)
    return u


@triton.jit
def _online(top, total, plain, weighted, u, unit, MEAN: tl.constexpr, ENTROPY: tl.constexpr):
    """A lane's running maximum and sums, over its 8 columns: no barrier, one exp2 a column."""
    new = tl.maximum(top, tl.max(u, axis=1))
    shrink = tl.exp2((top - new) * unit)
    p = tl.exp2(u * unit - (new * unit)[:, None])
    total = total * shrink + tl.sum(p, axis=1)
    real = tl.where(u == -float("inf"), 0.0, u)
    if MEAN:
        plain += tl.sum(real, axis=1)
    if ENTROPY:
        weighted = weighted * shrink + tl.sum(p * real, axis=1)
    return new, total, plain, weighted


@triton.jit
def _gradient(u, unit, lse2, g_lse, g_mean, g_entropy, expected,
              CAP: tl.constexpr, MEAN: tl.constexpr, ENTROPY: tl.constexpr):
    """The gradient by the product, but for the label's part."""
    p = tl.exp2(u * unit - lse2)
    if ENTROPY:
        grad = p * (g_lse - g_entropy * (u * (unit / LOG2E) - expected))
    else:
        grad = p * g_lse
    if MEAN:
        grad += g_mean
    if CAP:
        grad *= 1.0 - u * u
    return grad


@triton.jit
def _row_kernel(products_ptr, out_ptr, bias_ptr, labels_ptr, weight_ptr, loss_ptr,
                lse_ptr, picked_ptr, mean_ptr, entropy_ptr,
                g_lse_ptr, g_picked_ptr, g_mean_ptr, g_entropy_ptr,
                stride, out_stride, cols, first, vocab, ignore,
                scale, softcap, post, smoothing, z_loss,
                BIAS: tl.constexpr, CAP: tl.constexpr, STATS: tl.constexpr, GRADS: tl.constexpr,
                MEAN: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    # A program per row. STATS fills lse, picked, mean and entropy; GRADS writes the gradient; both
    # together are the cross-entropy, whose coefficients need no gradients from outside.
    # 13 instructions a logit, where memory allows about 25: whole blocks go without masks, exp2
    # takes one fused multiply-add, and the label's column is mended at the end.
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    live = label != ignore
    tl.device_assert((label == ignore) | ((label >= 0) & (label < vocab)),
                     "label outside the vocabulary (and not ignore_index)")
    local = label - first
    here = live & (local >= 0) & (local < cols)
    products_ptr += row * stride
    out_ptr += row * out_stride
    at = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    cap = -2.0 * LOG2E * scale / softcap
    slope = scale * post
    unit = LOG2E * (softcap * post if CAP else slope)  # log2 of exp(logit) per u
    only = tl.where(here, local, 0)
    labelled = _units(products_ptr, bias_ptr, only, here, cap, 0.0, "", BIAS, CAP)
    whole = cols // BLOCK * BLOCK
    if STATS:
        top = tl.full([BLOCK // 8], -1e30, tl.float32)
        total = tl.full([BLOCK // 8], 0.0, tl.float32)
        plain, weighted = total, total
        if live:
            for start in range(0, whole, BLOCK):
                u = _units(products_ptr, bias_ptr, start + at, here, cap, None, KEEP, BIAS, CAP)
                top, total, plain, weighted = _online(
                    top, total, plain, weighted, u, unit, MEAN, ENTROPY)
            if whole < cols:
                last = whole + at
                u = _units(products_ptr, bias_ptr, last, last < cols, cap, NOTHING, KEEP, BIAS, CAP)
                top, total, plain, weighted = _online(
                    top, total, plain, weighted, u, unit, MEAN, ENTROPY)
        most = tl.max(top)
        fix = tl.exp2((top - most) * unit)
        s = tl.where(live, tl.sum(total * fix), 1.0)
        lse2 = tl.where(live, most * unit + tl.log2(s), 0.0)
        picked = labelled * unit / LOG2E
        lse = lse2 / LOG2E
        mean = tl.sum(plain) * unit / LOG2E / vocab
        tl.store(lse_ptr + row, lse)
        tl.store(picked_ptr + row, tl.where(here, picked, 0.0))
        if MEAN:
            tl.store(mean_ptr + row, mean)
        if ENTROPY:
            expected = tl.sum(weighted * fix) / s * unit / LOG2E
            tl.store(entropy_ptr + row, tl.where(live, lse - expected, 0.0))
    else:
        lse = tl.load(lse_ptr + row)
    if GRADS:
        g_mean = 0.0
        g_entropy = 0.0
        expected = 0.0
        if STATS:
            weight = tl.where(live, tl.load(weight_ptr + row), 0.0)
            loss = lse - (1.0 - smoothing) * picked + z_loss * lse * lse
            if MEAN:
                loss -= smoothing * mean
                g_mean = -smoothing * weight / vocab
            tl.store(loss_ptr + row, loss * weight)
            g_lse = weight * (1.0 + 2.0 * z_loss * lse)
            g_picked = weight * (smoothing - 1.0)
        else:
            g_lse = tl.load(g_lse_ptr + row)
            g_picked = tl.load(g_picked_ptr + row)
            if MEAN:
                g_mean = tl.load(g_mean_ptr + row) / vocab
            if ENTROPY:
                g_entropy = tl.load(g_entropy_ptr + row)
                expected = lse - tl.load(entropy_ptr + row)
        g_lse *= slope
        g_mean *= slope
        g_entropy *= slope
        lse2 = lse * LOG2E
        tl.debug_barrier()  # every warp has the label's product before one of them overwrites it
        if live:
            for start in range(0, whole, BLOCK):
                u = _units(products_ptr, bias_ptr, start + at, here, cap, None, DROP, BIAS, CAP)
                grad = _gradient(
                    u, unit, lse2, g_lse, g_mean, g_entropy, expected, CAP, MEAN, ENTROPY)
                tl.store(out_ptr + start + at, grad.to(out_ptr.dtype.element_ty),
                         eviction_policy=DROP)
            if whole < cols:
                inside = whole + at < cols
                u = _units(products_ptr, bias_ptr, whole + at, inside, cap, 0.0, DROP, BIAS, CAP)
                grad = _gradient(
                    u, unit, lse2, g_lse, g_mean, g_entropy, expected, CAP, MEAN, ENTROPY)
                tl.store(out_ptr + whole + at, grad.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            for start in range(0, cols, BLOCK):
                zeros = tl.full([BLOCK // 8, 8], 0.0, out_ptr.dtype.element_ty)
                tl.store(out_ptr + start + at, zeros, mask=start + at < cols)
        tl.debug_barrier()
        grad = _gradient(
            labelled, unit, lse2, g_lse, g_mean, g_entropy, expected, CAP, MEAN, ENTROPY)
        grad += g_picked * slope * (1.0 - labelled * labelled if CAP else 1.0)
        tl.store(out_ptr + local, grad.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit
def _scale_kernel(in_ptr, out_ptr, factor_ptr, numel, INSIDE: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if (not INSIDE) | (factor != 1.0):  # an upstream gradient of 1 costs no pass over dW
        at = tl.program_id(0).to(tl.int64) * 4096 + tl.arange(0, 4096)
        value = tl.load(in_ptr + at, mask=at < numel).to(tl.float32) * factor
        tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=at < numel)
# fmt: on


def _block(cols: int, itemsize: int, wide: bool) -> tuple[int, int]:
    """(BLOCK, warps): bf16 8192 columns at a time by 16 warps, float32 2048 by 8: with more ptxas
    spills on one chip or another. `wide`, without options and from sm_90 on, takes 16384 by 32: one
    row a multiprocessor, whose second reading finds the L2 (12% faster than 8192 on an H200)."""
    most = (16384 if wide else 8192) if itemsize == 2 else 2048
    block = min(most, max(256, triton.next_power_of_2(cols)))
    return block, block // (512 if itemsize == 2 else 256) or 1


def _launch_rows(at, weights, loss, rows, grads, mean, entropy):
    """_row_kernel on `at`; Triton's interpreter takes tensors on a CPU too."""
    wide = at.products.is_cuda and torch.cuda.get_device_capability(at.products.device) >= (9, 0)
    wide = wide and at.bias is None and not (at.head.softcap or mean or entropy)
    block, warps = _block(at.products.shape[1], at.products.itemsize, wide)
    device = at.products.device
    out, head = at.products if at.out is None else at.out, at.head
    bias, labels = None if at.bias is None else at.bias.contiguous(), at.labels.contiguous()
    pointers = [at.products, out, bias, labels, weights, loss, *rows, *(grads or rows)]
    pointers = [rows.lse if p is None else p for p in pointers]
    numbers = [at.products.stride(0), out.stride(0), at.products.shape[1], *at[4:7]]
    numbers += [head.scale, head.softcap or 1.0, head.post, head.smoothing, head.z_loss]
    flags = [at.bias is not None, head.softcap > 0, grads is None]
    flags += [grads is not None or weights is not None, mean, entropy, block]
    # debug is for the label's assertion
    options = {"num_warps": warps, "debug": True, "sanitize_overflow": False}
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        _row_kernel[(len(at.products),)](*pointers, *numbers, *flags, **options)


def _run_rows(at, rows, weights=None, loss=None, grads=None, mean=False, entropy=False):
    """Statistics of the rows into `rows`; or from `grads` the products' gradient into at.out; or
    with `weights` both, and `loss`: the cross-entropy."""
    if at.products.device.type != "cpu":
        return _launch_rows(at, weights, loss, rows, grads, mean, entropy)
    for i, j in _chunks(len(at.products), max(1, CPU_LOGITS // at.products.shape[1])):
        part = at._replace(labels=at.labels[i:j], out=_part(at.out, i, j))
        terms = _part(weights, i, j), _part(loss, i, j), _slice(rows, i, j)
        grads_of = grads and _slice(grads, i, j)
        _rows_torch(part._replace(products=at.products[i:j]), *terms, grads_of, mean, entropy)


# --------------------------------------------------------------------------------------------------
# Products, and the loops over chunks of rows or of the vocabulary. As operators torch.compile takes
# them whole, for any length.


def _mm(a, b, out):
    """out = a @ b, with float32 sums; `out` may be float32 where a and b are not."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
    return out


def _product(a, b, dtype):
    """a @ b as `dtype`, with float32 sums, whatever autocast holds."""
    with torch.autocast(a.device.type, enabled=False):
        if dtype == a.dtype:
            return torch.mm(a, b)
        return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else a.to(dtype) @ b.to(dtype)


def _addmm(out, a, b):
    """out += a @ b in out's dtype, one kernel on a GPU."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif a.is_cuda:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


class _Plan(NamedTuple):
    rows: int  # of a chunk with the whole vocabulary
    sums: bool  # dW is a float32 sum over the chunks of rows, cast in the backward
    again: bool  # dW comes from a second pass over chunks of the vocabulary with all rows


def _fit(mib, length, size, most) -> int:
    """How many lines of `length` elements of `size` bytes fit, 1 to `most`; a round number: of 640
    or 896 rows products are slower than of 512 or 768 (8% a row for 896 against 1024)."""
    lines = int(mib * 2**20) // (max(1, length) * size)
    step = 256 if lines >= 512 else 8 if lines >= 8 else 1
    return max(1, min(lines // step * step, most))


def _plan(x, weight, trained, chunk=None, budget_mib=None, exact=True) -> _Plan:
    """The fastest way to a scalar loss with `budget_mib` MiB beyond the gradients."""
    v, size, low = len(weight), LOGIT_BYTES[x.dtype], weight.itemsize == 2
    n = 2**40 if torch.compiler.is_compiling() else len(x)  # one graph for all lengths
    exact = trained and (exact or weight.dtype != torch.bfloat16)
    half = trained and x.dtype == torch.float16  # not scaled back yet, dW may be above 65504
    fit = lambda mib: _fit((budget_mib or mib + 1) - 1, v, size, n)
    if chunk is not None:
        return _Plan(min(chunk, n), half or (exact and low and chunk < n), False)
    if not exact:
        rows = fit(LEAN_MIB if trained else FROZEN_MIB)
        return _Plan(rows, False, trained and rows < min(FEW_ROWS, n))
    rows = min(ROWS, n) if torch.compiler.is_compiling() else _balanced(n, ROWS)
    dw = weight.numel() * weight.itemsize / 2**20
    need, whole = rows * v * size / 2**20, n * v * size / 2**20
    sums = low and rows < n
    if sums:
        need = max(2 * dw, dw + need)  # of float32 sums, whose cast makes dW
        if whole <= need:  # one product over all rows sums for itself
            rows, sums, need = n, False, whole
    if budget_mib is None or need < budget_mib:
        return _Plan(rows, half or sums, False)
    return _Plan(fit(0), half, low and fit(0) < n)


def _even(cols, x):
    """Columns of a row in memory: a GPU's 16-byte loads want rows that begin at multiples of 16
    bytes. None are added on a CPU: oneDNN's bf16 product for AMX reads past the end of a row and
    multiplies that with 0, which a NaN left there survives (its issue 5717)."""
    return -(-cols // 8) * 8 if x.is_cuda else cols


class _Room:
    """Memory for a chunk's products and for its gradient: the same, but for fp16."""

    def __init__(self, count, x, gradient=True):
        kind = torch.float32 if x.dtype == torch.float16 else x.dtype
        self.products = torch.empty(count, dtype=kind, device=x.device)
        other = gradient and kind != x.dtype
        self.gradient = torch.empty_like(self.products, dtype=x.dtype) if other else self.products

    def get(self, rows, cols):
        wide = _even(cols, self.products)
        both = self.products, self.gradient
        return (t[: rows * wide].view(rows, wide)[:, :cols] for t in both)


def _balanced(n, rows) -> int:
    """At most `rows`, in as many chunks, of one size: a last one of few rows reads all of W too."""
    rows = max(1, min(rows, n))
    even = -(-n // -(-n // rows)) if n else 1
    step = 256 if even >= 512 else 8
    return min(rows, -(-even // step) * step)


def _chunks(n, size):
    return [(i, min(n, i + size)) for i in range(0, n, size)]


def _part(a, i, j):
    """The chunk of a tensor; None, numbers and 0-d tensors as they are."""
    return a[i:j] if isinstance(a, Tensor) and a.ndim else a


def _new_stats(n, device):
    return _Stats(*torch.zeros(4, n, device=device).unbind())


def _slice(rows, i, j):
    return _Stats(*(t[i:j] for t in rows))


def _log_ratio(logp, old):
    """Without old log-probabilities the policy is its own old one: 0, with logp's gradient."""
    return logp - (logp.detach() if old is None else old)


def _policy(logp, log_ratio, advantages, ref, policy):
    """Of each token: GRPO's loss, and its derivative by logp where log_ratio is logp - old."""
    beta, low, high, delta, cispo = policy
    ratio = torch.exp(log_ratio)
    if cispo:
        kept = ratio.clamp(max=high).detach()
        loss, slope = -kept * advantages * logp, -kept * advantages
    else:
        free, held = ratio.clamp(max=delta), ratio.clamp(1 - low, 1 + high)
        free_moves, held_moves = ratio <= delta, (ratio >= 1 - low) & (ratio <= 1 + high)
        moves = torch.where(free * advantages <= held * advantages, free_moves, held_moves)
        loss = -torch.minimum(free * advantages, held * advantages)
        slope = -advantages * ratio * moves
    if beta:
        gap = ref - logp
        loss, slope = loss + beta * (gap.exp() - gap - 1), slope + beta * (1 - gap.exp())
    return loss, slope


class _Sums:
    """The gradients of x, weight and bias that are needed, from those of chunks of the products.
    The chunks are gathered until there are `group` rows of them: a product with few is slow."""

    def __init__(self, x, weight, w, needs, sums, group=0):
        self.x, self.w, self.needs, self.parts = x, w, needs, []  # w: weight in x's dtype
        self.compiled, self.start = torch.compiler.is_compiling(), 0
        self.dx = torch.empty_like(x) if needs[0] else x.new_empty(0)
        dtype = torch.float32 if sums else weight.dtype
        make = torch.empty_like if len(x) and not self.compiled else torch.zeros_like
        self.dw = make(weight, dtype=dtype) if needs[1] else x.new_empty(0)
        self.db = torch.zeros(len(weight) if needs[2] else 0, device=x.device)
        self.stack = x.new_empty(group, len(weight)) if group and not self.compiled else None

    def add(self, grad, i, j, dw=True):
        if self.needs[2]:
            self.db = self.db + grad.sum(0, dtype=torch.float32)
        if self.stack is not None:
            self.stack[i - self.start : j - self.start] = grad
            if j - self.start < len(self.stack) and j < len(self.x):
                return
            i, grad = self.start, self.stack[: j - self.start]
            self.start = j
        grad, x = grad.to(self.x.dtype), self.x[i:j]
        if self.compiled:  # of its own products inductor makes better use
            self.parts += [grad @ self.w] if self.needs[0] else []
            self.dw = self.dw + _product(grad.t(), x, self.dw.dtype) if self.needs[1] else self.dw
            return
        if self.needs[0]:
            torch.mm(grad, self.w, out=self.dx[i:j])
        if self.needs[1] and dw:
            _addmm(self.dw, grad.t(), x) if i else _mm(grad.t(), x, self.dw)

    def get(self):
        return torch.cat(self.parts) if self.parts else self.dx, self.dw, self.db


Maybe = Tensor | None  # the operators' schemas are read from these annotations
_operator = functools.partial(torch.library.custom_op, mutates_args=())


# fmt: off
@_operator("chunked_ce::loss_and_grads")
def _loss_and_grads(x: Tensor, weight: Tensor, bias: Maybe, labels: Tensor, weights: Tensor,
                    advantages: Maybe, old: Maybe, ref: Maybe, head: Sequence[float],
                    policy: Sequence[float], ignore: int, plan: Sequence[int],
                    needs: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """sum(weights * loss), and its gradients by x, weight, bias, each to be multiplied by the last
    result. The loss is cross-entropy, or with a policy GRPO's."""
    n, v, head, (rows, sums, again) = len(x), len(weight), _Head(*head), plan
    _check_range(labels, v, ignore)
    rows = _balanced(n, rows)
    unit = torch.ones((), device=x.device)
    if x.dtype == torch.float16:  # weights of 1/tokens would leave its range: 32 at most
        unit = weights.abs().amax().clamp(min=1e-30) / 32 if n else unit
        weights = weights / unit
    w, mean = weight.to(x.dtype), head.smoothing > 0
    total = _Sums(x, weight, w, needs, sums)
    loss, stats = torch.zeros(n, device=x.device), _new_stats(n, x.device)
    grads = _new_stats(n, x.device) if policy else None
    cols = _fit(min(PASS_MIB, rows * v * LOGIT_BYTES[x.dtype] / 2**20), n, LOGIT_BYTES[x.dtype], v)
    room = _Room(max(rows * _even(v, x), n * _even(cols, x) if again else 0), x)
    for i, j in _chunks(n, rows):
        p, g = room.get(j - i, v)
        at, part = _Rows(p, g, bias, labels[i:j], 0, v, ignore, head), _slice(stats, i, j)
        _mm(x[i:j], w.t(), p)
        if policy:
            _run_rows(at, part)
            logp = part.picked - part.lse
            terms = _log_ratio(logp, _part(old, i, j)), advantages[i:j], _part(ref, i, j)
            value, slope = _policy(logp, *terms, policy)
            loss[i:j] = value * weights[i:j]
            grads.picked[i:j] = slope * weights[i:j]
            grads.lse[i:j] = -grads.picked[i:j]
            _run_rows(at, part, grads=_slice(grads, i, j))
        else:
            _run_rows(at, part, weights=weights[i:j], loss=loss[i:j], mean=mean)
        total.add(g, i, j, dw=not again)
    if needs[1] and again:
        grads = grads or _smoothed(stats, weights, head)[1]
        for a, b in _chunks(v, cols):
            p, g = room.get(n, b - a)
            _mm(x, w[a:b].t(), p)
            at = _Rows(p, g, _part(bias, a, b), labels, a, v, ignore, head)
            _run_rows(at, stats, grads=grads, mean=mean)
            _mm(g.t(), x, total.dw[a:b])
    return loss.sum() * unit, *total.get(), unit
# fmt: on


@_loss_and_grads.register_fake
def _(x, weight, bias, labels, weights, advantages, old, ref, head, policy, ignore, plan, needs):
    empty, scalar = x.new_empty(0), x.new_empty((), dtype=torch.float32)
    dw = torch.empty_like(weight, dtype=torch.float32 if plan[1] else None) if needs[1] else empty
    db = scalar.new_empty(len(weight) if needs[2] else 0)
    return scalar, torch.empty_like(x) if needs[0] else empty, dw, db, scalar.clone()


# fmt: off
@_operator("chunked_ce::row_stats")
def _row_stats(x: Tensor, weight: Tensor, bias: Maybe, labels: Tensor, head: Sequence[float],
               ignore: int, mean: bool, entropy: bool, mib: float,
               ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lse, label's logit, mean and entropy of each row; in chunks of rows and of the vocabulary,
    of PASS_MIB or, if that is less, `mib` (0: unsaid)."""
    n, v, w, head = len(x), len(weight), weight.to(x.dtype), _Head(*head)
    _check_range(labels, v, ignore)
    rows = _balanced(n, ROWS)
    cols = _fit(min(PASS_MIB, mib or PASS_MIB), rows, LOGIT_BYTES[x.dtype], v)
    result, live = _new_stats(n, x.device), (labels != ignore).float()
    room = _Room(rows * _even(cols, x), x, gradient=False)
    for i, j in _chunks(n, rows):
        whole, part = _slice(result, i, j), _new_stats(j - i, x.device)
        expected = torch.zeros_like(part.lse)
        for a, b in _chunks(v, cols):
            p, _ = room.get(j - i, b - a)
            _mm(x[i:j], w[a:b].t(), p)
            at = _Rows(p, None, _part(bias, a, b), labels[i:j], a, v, ignore, head)
            _run_rows(at, part, mean=mean, entropy=entropy)
            lse = torch.logaddexp(whole.lse, part.lse) if a else part.lse
            if entropy:  # the mean logit under the softmax, of the columns so far
                expected *= torch.exp(whole.lse - lse)
                expected += torch.exp(part.lse - lse) * (part.lse - part.entropy)
            whole.lse.copy_(lse)
            whole.picked.add_(part.picked)
            whole.mean.add_(part.mean)
        whole.entropy.copy_(whole.lse - expected)
    return tuple(t * live for t in result)
# fmt: on


@_row_stats.register_fake
def _(x, weight, bias, labels, head, ignore, mean, entropy, mib):
    return tuple(x.new_empty(len(x), dtype=torch.float32) for _ in range(4))


# fmt: off
@_operator("chunked_ce::row_stats_grads")
def _stats_grads(x: Tensor, weight: Tensor, bias: Maybe, labels: Tensor, lse: Tensor,
                 entropies: Tensor, by_lse: Tensor, by_picked: Tensor, by_mean: Tensor,
                 by_entropy: Tensor, head: Sequence[float], ignore: int, mean: bool, entropy: bool,
                 mib: float, needs: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, weight and bias from those by the statistics. W frozen: over chunks of rows;
    else over chunks of the vocabulary, where a row of dW is one product's, and dx a float32 sum."""
    n, v, w, head = len(x), len(weight), weight.to(x.dtype), _Head(*head)
    grads, stats = _Stats(by_lse, by_picked, by_mean, by_entropy), _Stats(lse, lse, lse, entropies)
    size, (need_x, need_w, need_b), mib = LOGIT_BYTES[x.dtype], needs, mib or FROZEN_MIB
    rows = n if need_w else _balanced(n, _fit(mib, v, size, n))
    cols = _fit(mib, n, size, v) if need_w else v
    dx = torch.zeros_like(x, dtype=torch.float32 if need_w else None) if need_x else x.new_empty(0)
    dw = torch.zeros_like(weight) if need_w else x.new_empty(0)
    db = torch.zeros(v if need_b else 0, device=x.device)
    room = _Room(rows * _even(cols, x), x)
    for (i, j), (a, b) in itertools.product(_chunks(n, rows), _chunks(v, cols)):
        p, g = room.get(j - i, b - a)
        _mm(x[i:j], w[a:b].t(), p)
        at = _Rows(p, g, _part(bias, a, b), labels[i:j], a, v, ignore, head)
        options = {"grads": _slice(grads, i, j), "mean": mean, "entropy": entropy}
        _run_rows(at, _slice(stats, i, j), **options)
        if need_w:
            _mm(g.t(), x, dw[a:b])
        if need_x:
            _addmm(dx[i:j], g, w[a:b]) if need_w else torch.mm(g, w, out=dx[i:j])
        if need_b:
            db[a:b] += g.sum(0, dtype=torch.float32)
    return dx.to(x.dtype), dw, db
# fmt: on


@_stats_grads.register_fake
def _(x, weight, bias, labels, lse, entropies, a, b, c, d, head, ignore, mean, entropy, mib, needs):
    db = x.new_empty(len(weight) if needs[2] else 0, dtype=torch.float32)
    dx = torch.empty_like(x) if needs[0] else x.new_empty(0)
    return dx, torch.empty_like(weight) if needs[1] else x.new_empty(0), db


class _ScalarLoss(torch.autograd.Function):
    """A loss whose gradients are taken in the forward pass, and scaled in the backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, *rest):
        ctx.options, ctx.spent = rest[5:], False
        loss, dx, dw, db, unit = _loss_and_grads(x, weight, bias, *rest)
        ctx.save_for_backward(x, weight, bias, *rest[:5], dx, dw, db, unit)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        *inputs, dx, dw, db, unit = ctx.saved_tensors
        weight, bias, needs = inputs[1], inputs[2], ctx.options[-1]
        if not torch.compiler.is_compiling():
            if ctx.spent:  # a second backward of one graph: the first scaled the gradients in place
                _, dx, dw, db, unit = _loss_and_grads(*inputs, *ctx.options)
            ctx.spent = True
        factor = upstream * unit
        dx = _scaled(dx, factor, dx.dtype) if needs[0] else None
        dw = _scaled(dw, factor, weight.dtype) if needs[1] else None
        db = _scaled(db, factor, bias.dtype) if needs[2] else None
        return dx, dw, db, *[None] * (5 + len(ctx.options))


def _scaled(gradient, factor, dtype, keep=False):
    """gradient * factor, rounded once; in place where the dtype stays, but not to `keep` it."""
    if torch.compiler.is_compiling():
        return (gradient.float() * factor).to(dtype)
    # .data: autograd need not hear of it, the callers count backward passes themselves
    inside = gradient.dtype == dtype and not keep
    out = gradient.data if inside else torch.empty_like(gradient, dtype=dtype)
    if not gradient.is_cuda:
        return out.copy_(gradient.float() * factor)
    grid = (triton.cdiv(out.numel(), 4096),)
    with torch.cuda.device(out.device):
        _scale_kernel[grid](gradient, out, factor, out.numel(), inside) if out.numel() else None
    return out


class _RowStats(torch.autograd.Function):
    """lse, label's logit, mean and entropy of each row; logits are formed again in the backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, labels, head, ignore, mean, entropy, mib, needs):
        stats = _row_stats(x, weight, bias, labels, head, ignore, mean, entropy, mib)
        ctx.save_for_backward(x, weight, bias, labels, stats[0], stats[3])
        ctx.options, ctx.needs = (head, ignore, mean, entropy, mib), needs
        return stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream):
        x, weight, bias, labels, lse, entropies = ctx.saved_tensors
        upstream = [u.contiguous() for u in upstream]
        inputs = (x, weight, bias, labels, lse, entropies, *upstream)
        dx, dw, db = _stats_grads(*inputs, *ctx.options, ctx.needs)
        db = db.to(bias.dtype) if ctx.needs[2] else None
        return dx if ctx.needs[0] else None, dw if ctx.needs[1] else None, db, *[None] * 7


def _needs(*tensors):
    on = torch.is_grad_enabled()
    return [on and t is not None and t.requires_grad for t in tensors]


def _stats_of(x, weight, bias, labels, head, ignore, sizes, mean=False, entropy=False):
    chunk, budget_mib, *_ = sizes
    mib = chunk * len(weight) * LOGIT_BYTES[x.dtype] / 2**20 if chunk else (budget_mib or 1) - 1
    options = (list(head), ignore, mean, entropy, float(mib), _needs(x, weight, bias))
    return _Stats(*_RowStats.apply(x, weight, bias, labels, *options))


# --------------------------------------------------------------------------------------------------
# Any function of the logits


class _Handed(torch.autograd.Function):
    """Makes logits a result of autograd's, no leaf: fn may then write into them. No copy."""

    @staticmethod
    def forward(ctx, logits, anchor):
        ctx.mark_dirty(logits)
        return logits


def _linearise(fn, logits, args, wanted):
    """fn(logits, *args), and a function from its gradient to the logits' and args[wanted]'s."""
    if wanted is None:
        return fn(logits, *args), None
    if torch.compiler.is_compiling():  # Dynamo traces torch.func; autograd.grad by a flag only

        def chosen(logits, *some):
            full = list(args)
            for k, tensor in zip(wanted, some, strict=True):
                full[k] = tensor
            return fn(logits.clone(), *full)  # into which fn may write; fused away

        return torch.func.vjp(chosen, logits, *(args[k] for k in wanted))
    with torch.enable_grad():
        args = [a.detach() if isinstance(a, Tensor) else a for a in args]
        for k in wanted:
            args[k].requires_grad_()
        logits = _Handed.apply(logits, torch.empty((), requires_grad=True))
        source, leaves = torch.autograd.graph.get_gradient_edge(logits), [args[k] for k in wanted]
        out = fn(logits, *args)

    def pull(upstream):
        _check_graph(out, source.node, leaves)
        grads = torch.autograd.grad(out, [source, *leaves], upstream, allow_unused=True)
        pairs = zip(grads, [logits, *leaves], strict=True)
        return [torch.zeros_like(t) if g is None else g for g, t in pairs]

    return out, pull


def _check_result(out, rows, ndim):
    _need(isinstance(out, Tensor), "fn's result", type(out), "a tensor", TypeError)
    _need(out.is_floating_point(), "fn's result", out.dtype, "a floating dtype", TypeError)
    shapes = f"[{rows}] (a value per token) or [] (their sum), the same for all chunks"
    ok = out.ndim == 0 or out.ndim == 1 and out.shape[0] == rows
    ok = ok and ndim in (None, out.ndim)
    _need(ok, "fn's result", out.shape, shapes)


def _check_graph(out, source, leaves):
    """fn's result must reach the logits, and no tensor with a gradient not handed to fn."""
    _need(out.requires_grad, "fn's result", "it detached from the logits", "autograd through fn")
    todo, seen, met = [out.grad_fn], set(), set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if node is source:
                continue
            todo += [parent for parent, _ in node.next_functions]
            if hasattr(node, "variable"):
                met.add(id(node.variable))
    known = {id(leaf) for leaf in leaves}
    _need(source in seen, "fn's result", "it detached from the logits", "autograd through fn")
    found = "a tensor that requires grad inside fn, whose gradient would be lost"
    _need(met <= known, "fn", found, "such tensors handed over as per_token arguments")


def _logits32(x, weight, bias):
    """The float32 upcast: float32 sums as they leave the product, never rounded to 16 bits."""
    logits = _product(x, weight.t(), torch.float32)
    return logits if bias is None else logits + bias.float()


@functools.lru_cache(32)
def _compiled(fn):
    """fn behind its upcast, compiled: logits are 16 bits wide in memory, float32 in registers."""

    def upcast(logits, bias, *args):
        logits = logits.to(torch.float32, copy=True)  # into which fn may write; fused away
        return fn(logits if bias is None else logits + bias.float(), *args)

    return torch.compile(upcast)


class _General(torch.autograd.Function):
    """The sum of fn's scalars, with gradients from the forward pass; or fn's values, per token."""

    @staticmethod
    def forward(ctx, fn, rows, compiled, needs, x, weight, bias, *args):
        kind = x.device.type
        ctx.auto = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        ctx.fn, ctx.rows, ctx.compiled, ctx.needs = fn, rows, compiled, needs
        ctx.slots = [isinstance(a, Tensor) for a in args]
        ctx.constants = [None if isinstance(a, Tensor) else a for a in args]
        # fp16 waits for the upstream gradient: without a loss scale 1/tokens would leave its range
        ahead = any(needs) and x.dtype != torch.float16
        outs, grads = _General.run(ctx, x, weight, bias, args, None, ahead)
        ctx.ahead, ctx.scalar = ahead and outs[0].ndim == 0, outs[0].ndim == 0
        ctx.save_for_backward(x, weight, bias, *(a for a in args if isinstance(a, Tensor)), *grads)
        return torch.stack(outs).sum() if ctx.scalar else torch.cat(outs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        x, weight, bias, *saved = ctx.saved_tensors
        saved = list(saved)  # Dynamo makes a tuple of it
        slots = zip(ctx.slots, ctx.constants, strict=True)
        args = [saved.pop(0) if slot else constant for slot, constant in slots]
        grads = saved
        if not ctx.ahead:
            with torch.autocast(ctx.auto[0], dtype=ctx.auto[1], enabled=ctx.auto[2]):
                _, grads = _General.run(ctx, x, weight, bias, args, upstream, True)
        result = []
        for tensor, need in zip((x, weight, bias, *args), ctx.needs, strict=True):
            grad = grads.pop(0) if need else None
            scale = need and ctx.ahead
            grad = _scaled(grad, upstream, tensor.dtype, keep=True) if scale else grad
            result.append(grad if grad is None else grad.to(tensor.dtype))
        return None, None, None, None, *result

    @staticmethod
    def run(ctx, x, weight, bias, args, upstream, pull_back):
        """(fn's value for each chunk, the gradients needed: none if those want an upstream one)."""
        wanted = [k for k, need in enumerate(ctx.needs[3:]) if need]
        sums, by_args, outs, w = None, [[] for _ in wanted], [], weight.to(x.dtype)
        for i, j in _chunks(len(x), ctx.rows):
            part = [_part(a, i, j) for a in args]
            if ctx.compiled:
                fn, part, at = _compiled(ctx.fn), [bias, *part], [k + 1 for k in wanted]
                low = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
                logits = _product(x[i:j], w.t(), low)
            else:
                fn, at, logits = ctx.fn, wanted, _logits32(x[i:j], w, bias)
            out, pull = _linearise(fn, logits, part, at if pull_back else None)
            del logits
            _check_result(out, j - i, outs[0].ndim if outs else None)
            if not i:
                pull_back = pull_back and (out.ndim == 0 or upstream is not None)
                several = weight.itemsize == 2 and len(x) > ctx.rows
                each = -(-len(x) // -(-len(x) // ROWS))  # rows of a product for dW, evenly
                group = -(-each // ctx.rows) * ctx.rows if several and ctx.needs[1] else 0
                sums = _Sums(x, weight, w, ctx.needs[:3], several, group) if pull_back else None
            if pull_back:
                scale = torch.ones_like(out) if upstream is None else _part(upstream, i, j)
                by_logits, *by_part = pull(scale.to(out.dtype))
                del pull
                sums.add(by_logits, i, j)
                for known, new in zip(by_args, by_part, strict=True):
                    known.append(new)
                del by_logits
            outs.append(out.detach())
            del out
        if not pull_back:
            return outs, []
        grads = [g for g, need in zip(sums.get(), ctx.needs[:3], strict=True) if need]
        tokens = [args[k].ndim > 0 for k in wanted]
        join = lambda parts, token: torch.cat(parts) if token else torch.stack(parts).sum(0)
        return outs, grads + [join(*pair) for pair in zip(by_args, tokens, strict=True)]


# --------------------------------------------------------------------------------------------------
# Public functions


def memory_efficient_linear(
    x: Tensor,
    weight: Tensor,
    fn: Callable[..., Tensor],
    *per_token,
    bias: Tensor | None = None,
    chunk: int | None = None,
    budget_mib: int | None = None,
    compile: bool = False,
) -> Tensor:
    """fn(x @ weight.T + bias, *per_token), without the logits of more than a chunk of tokens.

    x [..., D], weight [V, D] and bias [V] in float32, bfloat16 or float16 (or cast by autocast).
    fn gets float32 logits [n, V] and the same n entries of each per-token argument: a tensor with
    x's leading shape, a 0-d tensor or anything else that is no tensor (passed as it is). It returns
    a sum [] (or any scalar to be summed over the chunks), or a value for each token [n], and may be
    any differentiable function, called several times: autograd goes through it. Divide a mean by
    the number of tokens of all chunks (`/ num_items`, in fn or of the result), not of the chunk.

    Gradients: x, weight, bias and those per-token arguments that require them; nothing is computed
    for the others. A scalar's are taken in the forward pass (in fp16: in the backward), values' in
    the backward by calling fn again: it must repeat itself (no dropout). dW is summed in float32.
    LoRA on the head: pass the merged form, weight + scaling * B @ A; autograd splits the gradient.
    compile=True hands fn, with the upcast before it, to torch.compile: faster, half the memory.
    Give the same function object each time, each new one is compiled.
    chunk: tokens at a time; None: what `budget_mib` MiB of working memory allow (default 1024).
    Raises ValueError or TypeError on shapes, dtypes and devices that do not fit, and where fn
    detaches its result or uses tensors with gradients that are not arguments of it.
    """
    flat = _check(x, weight, bias, chunk, budget_mib)
    _need(callable(fn), "fn", type(fn), "a function of logits", TypeError)
    ok = not compile or isinstance(fn, Hashable)
    _need(ok, "fn", f"an unhashable {type(fn).__name__}", "a hashable one to compile", TypeError)
    args = []
    for k, a in enumerate(per_token):
        if isinstance(a, Tensor) and a.ndim:
            shape = (*x.shape[:-1], *a.shape[x.ndim - 1 :])
            _need_tensor(f"per-token argument {k}", a, x.device, shape)
            a = a.reshape(-1, *a.shape[x.ndim - 1 :])
        args.append(a)
    _need(len(flat) > 0, "x", x.shape, "at least one token")
    fit = _fit(budget_mib or 1024, len(weight), 16, 2**40)  # about four float32 copies
    rows = min(chunk or fit, len(flat))
    needs = _needs(x, weight, bias, *(a if isinstance(a, Tensor) else None for a in args))
    compiled = compile and not torch.compiler.is_compiling()
    out = _General.apply(fn, rows, compiled, needs, flat, weight, bias, *args)
    return out.reshape(x.shape[:-1]) if out.ndim else out


def _scalar_loss(x, weight, bias, labels, weights, head, ignore, sizes, policy=(), terms=()):
    """sum(weights * loss) over rows, with gradients taken in the forward pass where needed."""
    needs = _needs(x, weight, bias)
    advantages, old, ref = terms or (None, None, None)
    if not any(needs):
        stats = _stats_of(x, weight, bias, labels, head, ignore, sizes, mean=head.smoothing > 0)
        if not policy:
            return _smoothed(stats, weights, head)[0].sum()
        logp = stats.picked - stats.lse
        terms = _log_ratio(logp, old), advantages, ref
        return (_policy(logp, *terms, policy)[0] * weights).sum()
    rows, sums, again = _plan(x, weight, needs[1], *sizes)
    plan = [rows, int(sums), int(again)]
    tensors = (x, weight, bias, labels, weights, advantages, old, ref)
    return _ScalarLoss.apply(*tensors, list(head), list(policy), ignore, plan, needs)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    num_items: Tensor | float | None = None,
    chunk: int | None = None,
    budget_mib: int | None = None,
    accum_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """F.cross_entropy of the logits x @ weight.T + bias, float32 [] or, for "none", [...].

    x [..., D], weight [V, D], bias [V] in float32, bfloat16 or float16 (or cast by autocast),
    labels [...] int64 or int32, already shifted.
    Logits: softcap * tanh(logit_scale * product / softcap).
    A token's loss: smoothed cross-entropy + z_loss * logsumexp**2. reduction "mean" divides the sum
    by the number of labels that are not ignore_index (none: loss 0 and gradients 0), or by
    num_items (a number or a tensor without synchronisation), as transformers does; "sum"; "none".

    Mean and sum take the gradients in the forward pass, over `chunk` tokens at a time (None: by
    measurement). dW is summed in float32; accum_dtype=torch.bfloat16 sums a bfloat16 dW in its own
    memory. budget_mib: MiB beyond the gradients; a small one costs a second pass, 4 products for 3.
    "none" forms its logits again in the backward, of so many tokens or MiB (W trained: in chunks of
    the vocabulary, with a float32 dX besides).
    Raises ValueError or TypeError on input that does not fit; labels out of range on a GPU end in a
    device assertion that names them, as checking earlier would wait for the GPU.
    """
    flat = _check(x, weight, bias, chunk, budget_mib)
    labels = _check_labels(labels, x, ignore_index)
    _need(reduction in ("mean", "sum", "none"), "reduction", reduction, "mean, sum or none")
    _need_number("label_smoothing", label_smoothing, 0, 1)
    _need_number("z_loss", z_loss, 0)
    ok = accum_dtype in (torch.float32, weight.dtype)
    _need(ok, "accum_dtype", accum_dtype, f"torch.float32 or weight's {weight.dtype}")
    _need(num_items is None or reduction != "none", "num_items", "reduction none", "mean or sum")
    head = _head(logit_scale, softcap, 1.0, label_smoothing, z_loss)
    valid = (labels != ignore_index).float()
    sizes = chunk, budget_mib, accum_dtype == torch.float32
    if reduction == "none":
        rows = _stats_of(flat, weight, bias, labels, head, ignore_index, sizes, label_smoothing > 0)
        return _smoothed(rows, valid, head)[0].reshape(x.shape[:-1])
    if num_items is not None:
        valid = valid / _items(num_items, x)
    elif reduction == "mean":
        valid = valid / valid.sum().clamp(min=1)
    return _scalar_loss(flat, weight, bias, labels, valid, head, ignore_index, sizes)


def _items(num_items, x):
    """A divisor; 0 of them, a batch without labels, divides nothing."""
    if isinstance(num_items, Tensor):
        _need(num_items.numel() == 1, "num_items", num_items.shape, "one number")
        num_items = num_items.reshape(()).to(x.device)
        return torch.where(num_items == 0, 1, num_items)
    _need_number("num_items", num_items, 0)
    return float(num_items) or 1.0


def linear_logsumexp(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(logsumexp of a token's logits, its label's logit), float32 [...], both differentiable.

    For losses that are functions of these two: cross-entropy is their difference, the label's
    probability exp(picked - lse), z-loss lse**2. Chunks go over the vocabulary too, so a row of
    logits need not fit in memory; `chunk` bounds them to as much as that many rows. Arguments and
    errors as linear_cross_entropy; ignored tokens: 0.
    """
    flat = _check(x, weight, bias, chunk)
    labels = _check_labels(labels, x, ignore_index)
    head = _head(logit_scale, softcap)
    rows = _stats_of(flat, weight, bias, labels, head, ignore_index, (chunk, None))
    return rows.lse.reshape(x.shape[:-1]), rows.picked.reshape(x.shape[:-1])


def linear_logprobs(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
    ignore_index: int = IGNORE,
    entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(logits / temperature)[label] of each token, float32 [...]; 0 where ignored.

    With entropy=True (log-probability, entropy of the distribution in nats), both differentiable.
    Arguments and errors as linear_cross_entropy, chunk as linear_logsumexp.
    """
    flat = _check(x, weight, bias, chunk)
    labels = _check_labels(labels, x, ignore_index)
    head = _head(1.0, softcap, _inverse(temperature))
    _need(isinstance(entropy, bool), "entropy", entropy, "True or False", TypeError)
    sizes = chunk, None
    rows = _stats_of(flat, weight, bias, labels, head, ignore_index, sizes, entropy=entropy)
    logprobs = (rows.picked - rows.lse).reshape(x.shape[:-1])
    return (logprobs, rows.entropy.reshape(x.shape[:-1])) if entropy else logprobs


def _inverse(temperature):
    _need_number("temperature", temperature, 0)
    _need(temperature > 0, "temperature", temperature, "more than 0")
    return 1 / temperature


LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "luspo")


def grpo_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    loss_type: str = "grpo",
    importance_sampling_level: str = "token",
    max_completion_length: int | None = None,
    num_items: Tensor | float | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
    budget_mib: int | None = None,
) -> Tensor:
    """GRPO's loss over completions, float32 []; names and formulas as TRL's GRPOTrainer (whose own
    default loss_type is "dapo").

    x [B, T, D] hidden states that predict labels [B, T], mask [B, T] (1 where a token counts; one
    labelled -100 does not), advantages [B] or [B, T], old_logprobs and ref_logprobs [B, T] float
    (old None: on-policy, ratio 1; ref is needed for beta > 0). A token's loss is
    -min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A) + beta * KL with
    KL = exp(ref - logp) - (ref - logp) - 1; delta clips the ratio from above as well. Summed over
    tokens it is divided by (loss_type): the sequence's tokens, then a mean over B ("grpo"); all
    tokens ("bnpo"); B * max_completion_length ("dr_grpo");
    num_items ("dapo"; "cispo", whose loss is -min(ratio, epsilon_high) * A * logp with a constant
    ratio); B ("luspo"). Divide by accumulation steps yourself where the batch is accumulated.
    importance_sampling_level "sequence" takes one ratio for a sequence (GSPO) and logits twice.
    Gradients reach x, weight and bias. Raises ValueError or TypeError on input that does not fit.
    """
    flat = _check(x, weight, bias, chunk, budget_mib)
    _need(x.ndim == 3, "x", x.shape, "[batch, tokens, hidden]")
    batch, tokens = x.shape[:2]
    _need(loss_type in LOSS_TYPES, "loss_type", loss_type, "one of " + ", ".join(LOSS_TYPES))
    level = importance_sampling_level
    ok = level in ("token", "sequence")
    _need(ok, "importance_sampling_level", level, "token or sequence")
    wants = {"beta": beta, "epsilon": epsilon, "epsilon_high": epsilon_high, "delta": delta}
    wants |= {"max_completion_length": max_completion_length}
    for name, value in wants.items():
        if value is not None or name in ("beta", "epsilon"):
            _need_number(name, value, 1 if name == "max_completion_length" else 0)
    for name, value, wanted in (
        ("ref_logprobs", ref_logprobs, beta != 0),
        ("max_completion_length", max_completion_length, loss_type == "dr_grpo"),
        ("num_items", num_items, loss_type in ("dapo", "cispo")),
        ("epsilon_high", epsilon_high, loss_type == "cispo"),
    ):
        _need(value is not None or not wanted, name, None, "it for this loss_type or beta")
    _need(isinstance(advantages, Tensor), "advantages", type(advantages), "a tensor", TypeError)
    if advantages.ndim == 1:
        _need_tensor("advantages", advantages, x.device, x.shape[:1])
        advantages = advantages[:, None].expand(x.shape[:2])
    floats = {"mask": mask, "advantages": advantages}
    floats |= {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs}
    for name, tensor in ({"labels": labels} | floats).items():
        if tensor is not None or name in ("labels", "mask"):
            _need_tensor(name, tensor, x.device, x.shape[:2])
    counts = (mask != 0) & (labels != IGNORE)
    parts = (t if t is None else t.detach().float() for t in floats.values())
    parts = (t if t is None else torch.where(counts, t, 0) for t in parts)  # no -inf * 0
    mask, advantages, old, ref = parts
    labels = _check_labels(torch.where(counts, labels, IGNORE), x, IGNORE)
    weights = mask / (mask.sum(1, keepdim=True).clamp(min=1) if loss_type == "grpo" else 1)
    items = None if num_items is None else _items(num_items, x)
    total = {"bnpo": mask.sum().clamp(min=1), "dapo": items, "cispo": items}
    total |= {"dr_grpo": batch * (max_completion_length or 1)}
    weights = weights / total.get(loss_type, batch)
    high = epsilon if epsilon_high is None else epsilon_high
    policy = [beta, epsilon, high, math.inf if delta is None else delta, loss_type == "cispo"]
    policy = [float(number) for number in policy]
    head = _head(1.0, softcap, _inverse(temperature))
    if level == "token":
        terms = [None if t is None else t.reshape(-1) for t in (advantages, old, ref)]
        rest = weights.reshape(-1), head, IGNORE, (chunk, budget_mib), policy, terms
        return _scalar_loss(flat, weight, bias, labels, *rest)
    stats = _stats_of(flat, weight, bias, labels, head, IGNORE, (chunk, budget_mib))
    logp = (stats.picked - stats.lse).view(batch, tokens)
    ratio = _log_ratio(logp, old) * mask
    ratio = ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return (_policy(logp, ratio, advantages, ref, policy)[0] * weights).sum()


def patch_causal_lm(model, check: bool = True, loss=None):
    """A transformers CausalLM (or a PEFT model around one) whose loss never forms the logits.

    With labels, forward returns the loss of linear_cross_entropy (labels shifted, with
    num_items_in_batch and shift_labels) and logits=None; without labels it is the stock forward, so
    generate() works. Softcaps and logit scales are read from the config (Gemma, Cohere, Granite);
    tied heads, heads with a bias, and heads with LoRA (merged form, no dropout) work. `check`
    runs one short batch through both forwards and raises ValueError if logits or losses differ: the
    model then does something else with its logits. loss: a function to call in place of
    linear_cross_entropy, a compiled one say. Returns model; `del model.forward` undoes it (of a
    PEFT model, of its base). Under FSDP2 leave the head in the root's group.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ok = callable(getattr(base, "get_output_embeddings", None))
    ok = ok and base.get_output_embeddings() is not None and base.base_model is not base
    _need(ok, "model", type(base).__name__, "a causal language model with a head", TypeError)
    from transformers.modeling_outputs import CausalLMOutputWithPast

    text = base.config.get_text_config()
    scale = getattr(base, "logit_scale", None) or 1 / getattr(text, "logits_scaling", 1.0)
    logits = {"softcap": getattr(text, "final_logit_softcapping", None), "logit_scale": scale}
    signature = inspect.signature(base.forward)
    names = [*signature.parameters]

    def forward(self, *args, **kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs
        labels = given.pop("labels", None)
        if labels is None:
            return self._stock_forward(**given)
        shifted, items = given.pop("shift_labels", None), given.pop("num_items_in_batch", None)
        ignore, some = given.pop("ignore_index", IGNORE), given.pop("logits_to_keep", None)
        moe = getattr(self.config, "output_router_logits", False)
        moe = given.get("output_router_logits", moe)
        _need(not moe, "output_router_logits", True, "False: its loss is not computed here")
        ok = some is None or isinstance(some, int) and not some
        _need(ok, "logits_to_keep", some, "labels without it")
        named = given.pop("return_dict", None)
        outputs = self.base_model(**given, return_dict=True)
        if shifted is None:
            shifted = F.pad(labels, (0, 1), value=ignore)[..., 1:]
        head = self.get_output_embeddings()  # of now: it may have been resized or given LoRA
        weight = _head_weight(head)
        hidden = outputs.last_hidden_state.to(weight.device)  # of a device_map over several GPUs
        if not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(weight.dtype)
        options = {"bias": getattr(head, "bias", None), "ignore_index": ignore, "num_items": items}
        value = (loss or linear_cross_entropy)(
            hidden, weight, shifted.to(hidden.device), **options, **logits
        )
        kept = "past_key_values", "hidden_states", "attentions"
        rest = {name: getattr(outputs, name, None) for name in kept}
        result = CausalLMOutputWithPast(loss=value.to(labels.device), **rest)
        named = getattr(self.config, "return_dict", True) if named is None else named
        return result if named else result.to_tuple()

    def _replicate_for_data_parallel(self):  # whose copy of __dict__ leaves methods with this model
        replica = type(self)._replicate_for_data_parallel(self)
        for name, method in vars(self).items():
            if isinstance(method, types.MethodType) and method.__self__ is self:
                object.__setattr__(replica, name, types.MethodType(method.__func__, replica))
        return replica

    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = signature.replace(parameters=[itself, *signature.parameters.values()])
    forward.__doc__ = base.forward.__doc__
    forward.never_forms_logits = True
    if not getattr(base.forward, "never_forms_logits", False):  # patched twice: once
        base._stock_forward = base.forward
    if check:
        _check_patch(base, types.MethodType(forward, base), logits)
    for method in (forward, _replicate_for_data_parallel):  # bound, so that a deep copy has its own
        setattr(base, method.__name__, types.MethodType(method, base))
    return model


def _check_patch(base, forward, options):
    ids = torch.arange(1, 9, device=base.device)[None] % base.config.get_text_config().vocab_size
    modes = {module: module.training for module in base.modules()}
    try:
        base.eval()
        for module in base.modules():  # in evaluation bitsandbytes' CPU layers repack their weights
            # for good, and then have no gradient
            module.training = type(module).__module__.startswith("bitsandbytes")
        with torch.no_grad():
            ways = base._stock_forward, forward
            stock, got = (way(input_ids=ids, labels=ids) for way in ways)
            hidden, layer = base.base_model(ids).last_hidden_state, base.get_output_embeddings()
            weight, bias = _head_weight(layer), getattr(layer, "bias", None)
            products = _product(hidden[0].to(weight), weight.t(), torch.float32)
            head = _head(options["logit_scale"], options["softcap"])
            logits = _logits_torch(products, bias, head)[0].to(stock.logits.device)
    finally:
        for module, training in modes.items():
            module.training = training
    want, spread = stock.logits[0].float(), stock.logits.float().square().mean().sqrt()
    close = want.shape == logits.shape and (want - logits).norm() <= 2e-2 * want.norm() + 1e-6
    need = "a head that is a linear layer, with a softcap and a scale that the config names"
    _need(close, type(base).__name__, "other logits than its head's", need)
    found = f"a loss of {got.loss.item():.4f} for {stock.loss.item():.4f}"
    close = (stock.loss - got.loss).abs() <= 2e-2 * spread + 1e-4
    _need(close, type(base).__name__, found, "a cross-entropy of shifted labels")


def _head_weight(head) -> Tensor:
    """The head's weight, differentiable; of a PEFT head the active or merged one."""
    saved = getattr(head, "modules_to_save", None)
    if saved is not None:
        active = head.active_adapter
        head = saved[active if isinstance(active, str) else active[0]]
    layer = head.get_base_layer() if hasattr(head, "get_base_layer") else head
    weight = layer.weight
    _need(weight.is_floating_point(), "the head", weight.dtype, "a floating dtype, not quantised")
    whole = weight.ndim == 2 and not hasattr(weight, "placements")
    _need(whole, "the head", "its weight sharded", "it in the root's group, where forward has it")
    if layer is head or head.disable_adapters or head.merged:
        return weight
    ok = hasattr(head, "lora_A")
    _need(ok, "the adapter on the head", type(head).__name__, "LoRA or a full copy")
    for name in head.active_adapters:
        if name in head.lora_A:
            p = getattr(head.lora_dropout[name], "p", 0)
            ok = not (p and head.training)
            _need(ok, "LoRA on the head", f"dropout {p}", "0, for its merged form")
            for kind in ("use_dora", "lora_bias"):
                on = getattr(head, kind, {}).get(name)
                _need(not on, "LoRA on the head", f"{kind} {on}", "plain LoRA, for its merged form")
            delta = head.lora_B[name].weight @ head.lora_A[name].weight * head.scaling[name]
            weight = weight + delta.to(weight.dtype)
    return weight


# --------------------------------------------------------------------------------------------------
# Self-test: `pytest chunked_ce.py` runs the same functions

_nll = functools.partial(F.cross_entropy, reduction="none")
USER_LOSSES = {  # what a user writes: a value per token from float32 logits and two arguments
    "cross-entropy": lambda logits, labels, _: _nll(logits, labels),
    "mse": lambda logits, _, teacher: ((logits - teacher) ** 2).mean(-1),
    "distillation": lambda logits, _, teacher: _nll(logits / 2, (teacher / 2).softmax(-1)),
    "focal": lambda logits, y, _: (1 - torch.exp(-_nll(logits, y))) ** 2 * _nll(logits, y),
    "z-loss": lambda logits, _, __: logits.logsumexp(-1) ** 2,
}


def _sum_cross_entropy(logits, labels):
    return F.cross_entropy(logits, labels, reduction="sum")


def _general(x, weight, labels, chunk=None, fn=_sum_cross_entropy, **options):
    return memory_efficient_linear(x, weight, fn, labels, chunk=chunk, **options)


def _gpus() -> int:
    """How many GPUs there are, if the kernel runs on the first."""
    able = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (7, 5)
    return torch.cuda.device_count() if able else 0


def _skip_unless(gpus, gib=0):
    if _gpus() < gpus or gib and torch.cuda.mem_get_info()[0] < gib * 2**30:
        memory = f" and {gib} GiB free on it" if gib else ""
        raise unittest.SkipTest(f"needs {gpus} NVIDIA GPU(s) of capability 7.5 or more{memory}")


def _problem(n=23, d=8, v=37, dtype=torch.float32, device="cpu"):
    """x [n, d], weight [v, d], bias [v] that require gradients; labels [n], some ignored."""
    make = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=make)
    labels = torch.randint(0, v, (n,), generator=make)
    labels[::5] = IGNORE
    tensors = normal(n, d), normal(v, d) / d**0.5, normal(v)
    return *(t.to(device, dtype).requires_grad_() for t in tensors), labels.to(device)


def _gradients(out, inputs):
    """For an upstream gradient that is neither 1 nor the same for all tokens; zeros for None."""
    upstream = torch.linspace(-1, 2, out.numel(), device=out.device).view(out.shape).to(out)
    options = {"retain_graph": True, "allow_unused": True}
    grads = torch.autograd.grad(out, inputs, upstream, **options)
    pairs = zip(grads, inputs, strict=True)  # cloned: a next backward must not reach them
    return [torch.zeros_like(t) if g is None else g.clone() for g, t in pairs]


def _run(x, weight, labels, loss):
    out = loss(x, weight, labels)
    return [out, *torch.autograd.grad(out * 4, (x, weight))]


def _error(got, want):
    """Relative, in the Frobenius norm."""
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-12)).item()


def _close(got, want, tolerance, name=""):
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert _error(a, b) <= tolerance, (name, k, _error(a, b), tolerance)


def _small(**constants):
    """Constants of this file, made small so that small tensors take many chunks."""
    return unittest.mock.patch.multiple(sys.modules[__name__], **constants)


def _fuzz(check, **drawn):
    """check(**values) for random values drawn by hypothesis' strategies: in the self-test the same
    few each time, with --fuzz N as many, from --seed. A failure is shrunk to a small case."""
    import hypothesis

    few = int(FUZZ_CASES) // (4 if torch.cuda.is_available() else 1)  # there each compiles kernels
    cases, seed = os.environ.get("FUZZ_CASES", str(few)), os.environ.get("FUZZ_SEED", "0")
    settings = hypothesis.settings(
        max_examples=int(cases),
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.seed(int(seed))(settings(hypothesis.given(**drawn)(check)))()


def _drawn(**more) -> dict:
    """Strategies for the arguments of _random_problem, and more."""
    from hypothesis import strategies as st

    sizes = st.integers(1, 24), st.integers(1, 12), st.integers(1, 40)  # tokens, D, V
    drawn = {"seed": st.integers(0, 2**31), "sizes": st.tuples(*sizes)}
    drawn |= {"lead": st.sampled_from(((), (1,), (3,))), "dtype": st.sampled_from([*LOGIT_BYTES])}
    drawn |= {"on": st.tuples(*[st.booleans()] * 3), "strided": st.booleans()}
    return drawn | {name: st.sampled_from(values) for name, values in more.items()}


def _random_problem(seed, sizes, lead, dtype, on, strided, ignore=IGNORE):
    """x [*lead, n, D], weight, bias, trained where `on` says; labels, some ignored; the generator."""
    rng, device, (n, d, v) = torch.Generator(), "cuda" if _gpus() else "cpu", sizes
    rng.manual_seed(seed)
    shapes, tensors = ((*lead, n, d), (v, d), (v,)), []
    for shape, train in zip(shapes, on, strict=True):
        tensor = torch.randn(shape, generator=rng).to(device, dtype)
        tensor = torch.stack([tensor, tensor], -1)[..., 0] if strided else tensor
        tensors.append(tensor.requires_grad_(train))
    labels = torch.randint(0, v, (*lead, n), generator=rng)
    labels[torch.rand(labels.shape, generator=rng) < 0.2] = ignore
    return tensors, labels.to(device, torch.int32 if seed % 2 else torch.int64), rng


ERRORS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of random problems


def _check_near(ours, naive, tensors, rng, tiny):
    """ours(*tensors) and its gradients as naive's in float64, for a random upstream gradient. The
    limit goes by the size of all that is summed, which may be more than that of the sum."""
    tensors = [t for t in tensors if t is not None]
    doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    small = {"PASS_MIB": 1e-3, "FROZEN_MIB": 1e-3, "LEAN_MIB": 1e-3}
    on, results, upstream = [k for k, t in enumerate(tensors) if t.requires_grad], [], None
    with _small(**small | {"ROWS": 8, "CPU_LOGITS": 99} if tiny else {"ROWS": ROWS}):
        for run, given in (ours, tensors), (naive, doubles):
            out = run(*given)
            out = out if isinstance(out, Tensor) else torch.stack(out)
            if upstream is None:
                assert out.dtype == torch.float32 and out.requires_grad == bool(on)
                upstream = torch.randn(out.shape, generator=rng).to(out)
            inputs = [given[k] for k in on]
            options = {"allow_unused": True, "materialize_grads": True}
            if inputs and out.requires_grad:
                grads = torch.autograd.grad(out, inputs, upstream.to(out), **options)
            else:  # a naive one may have nothing that counts
                grads = map(torch.zeros_like, inputs)
            results.append([out, *grads])
    size = (1 + max(t.detach().norm() for t in doubles)) * (1 + upstream.norm())
    for k, got, want in zip((None, *on), *results, strict=True):
        assert k is None or got.dtype == tensors[k].dtype
        limit = ERRORS[tensors[0].dtype] * (want.norm() + size)
        assert got.shape == want.shape and (got - want).norm() <= limit, (k, got, want)


class _Watch(TorchDispatchMode):
    """Counts matrix products, and elements of the largest tensor but for those of allowed sizes. It
    looks into the operators of this file, which a mode sees only as a whole."""

    inside: typing.ClassVar = {
        "loss_and_grads": _loss_and_grads._init_fn,
        "row_stats": _row_stats._init_fn,
        "row_stats_grads": _stats_grads._init_fn,
    }

    def __init__(self, *allowed):
        super().__init__()
        self.products, self.largest, self.allowed = 0, 0, allowed

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        mine = self.inside.get(func._opname)
        with self if mine else contextlib.nullcontext():
            out = (mine or func)(*args, **kwargs or {})
        self.products += func._opname in ("mm", "addmm", "addmm_")
        sizes = (t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))
        self.largest = max([self.largest, *(n for n in sizes if n not in self.allowed)])
        return out


def test_any_function_equals_the_unchunked_one():
    tensors = *_problem(), torch.randn(23, 37, requires_grad=True)
    wants = ("x",), ("weight",), ("x", "weight", "bias", "teacher")
    for fn, chunk, total, on in itertools.product(
        USER_LOSSES.values(), (1, 7, 23, 100, None), (False, True), wants
    ):
        inputs = dict(zip(("x", "weight", "bias", "labels", "teacher"), tensors, strict=True))
        inputs = {k: t.detach().requires_grad_(k in on) for k, t in inputs.items()}
        x, weight, bias, labels, teacher = inputs.values()
        run = (lambda *a, fn=fn: fn(*a).sum()) if total else fn
        got = memory_efficient_linear(x, weight, run, labels, teacher, bias=bias, chunk=chunk)
        logits = x.double() @ weight.double().t() + bias.double()
        want = run(logits, labels, teacher.double())
        chosen = [inputs[k] for k in on]
        grads = _gradients(got, chosen)
        _close([got, *grads], [want, *_gradients(want, chosen)], 1e-5)
        _close(_gradients(got, chosen), grads, 0)  # a second backward of the same graph


def test_fuzz_any_function():
    def check(loss, total, tiny, given, taught, biased, **problem):
        (x, weight, bias), labels, rng = _random_problem(**problem)
        teacher = torch.randn(*x.shape[:-1], len(weight), generator=rng).to(x.device)
        each = USER_LOSSES[loss]
        fn = (lambda *a: each(*a).sum()) if total else each

        def ours(x, weight, teacher, bias=None):
            rest = labels.long(), teacher
            return memory_efficient_linear(x, weight, fn, *rest, bias=bias, **given)

        def naive(x, weight, teacher, bias=0):
            logits = (x @ weight.t() + bias).flatten(0, -2)
            out = fn(logits, labels.long().flatten(), teacher.flatten(0, -2))
            return out if total else out.view(x.shape[:-1])

        tensors = x, weight, teacher.requires_grad_(taught), bias if biased else None
        _check_near(ours, naive, tensors, rng, tiny)

    given = {}, {"chunk": 1}, {"chunk": 7}, {"chunk": 99}, {"budget_mib": 2}
    options = {"loss": [*USER_LOSSES], "total": (False, True), "taught": (False, True)}
    _fuzz(check, **_drawn(**options, tiny=(0, 1), given=given, biased=(0, 1)))


def test_gradients_of_the_functions_own_arguments():
    x, weight, _, labels = _problem()
    heat, scale = torch.tensor(1.7, requires_grad=True), torch.rand(23, requires_grad=True)
    each = lambda logits, y, scale, heat: _nll(logits / heat, y) * scale
    for fn in (each, lambda *a: each(*a).sum()):
        got = memory_efficient_linear(x, weight, fn, labels, scale, heat, chunk=4)
        want = fn(x @ weight.t(), labels, scale, heat)
        inputs = (x, weight, heat, scale)
        _close(_gradients(got, inputs), _gradients(want, inputs), 1e-5)
    writes = lambda logits, y: _nll(logits.div_(0.5), y).sum()
    for got in (memory_efficient_linear(x, weight, writes, labels, compile=on) for on in (0, 1)):
        want = _nll(x @ weight.t() / 0.5, labels).sum()
        _close(_gradients(got, (x, weight)), _gradients(want, (x, weight)), 1e-5)
    with _raises(ValueError, "fn: found a tensor that requires grad inside fn"):
        memory_efficient_linear(x, weight, lambda logits: (logits / heat).sum())


def test_tied_heads_lora_heads_and_frozen_parts():
    x, weight, _, labels = _problem()
    down, up = torch.randn(4, 8, requires_grad=True), torch.randn(37, 4, requires_grad=True)
    tied = lambda f: f(F.embedding(labels.clamp(min=0), weight) * 2, weight, labels)
    merged = lambda f: f(x, weight + 0.5 * up @ down, labels)
    plain = lambda x, w, y: _sum_cross_entropy(x @ w.t(), y)
    fast = functools.partial(linear_cross_entropy, reduction="sum", chunk=5)
    for loss in (fast, functools.partial(_general, chunk=5)):
        for case, inputs in ((tied, (weight,)), (merged, (x, weight, up, down))):
            _close(_gradients(case(loss), inputs), _gradients(case(plain), inputs), 1e-5)
        for x_on, w_on in ((True, True), (True, False), (False, True)):
            given = x.detach().requires_grad_(x_on), weight.detach().requires_grad_(w_on)
            with _Watch() as watch:
                loss(*given, labels).backward()
            assert watch.products == 5 * (1 + x_on + w_on)  # a frozen part costs no product


def test_callers_that_compile_accumulate_or_scale():
    x, weight, _, labels = _problem(40)
    inputs, plain = (x, weight), lambda x, w, y: F.cross_entropy(x @ w.t(), y)
    ways = [functools.partial(_general, chunk=16), functools.partial(_general, chunk=16, fn=_nll)]
    fast = functools.partial(linear_cross_entropy, chunk=16)
    ways += [functools.partial(fast, reduction=reduction) for reduction in ("sum", "none")]
    for loss in ways:
        want = loss(*inputs, labels) * 3
        torch._dynamo.reset()
        compiled = torch.compile(lambda *a, f=loss: f(*a) * 3, fullgraph=True, backend="aot_eager")
        got = compiled(*inputs, labels)
        _close([got, *_gradients(got, inputs)], [want, *_gradients(want, inputs)], 1e-5)
        twice = [f(*inputs, labels).sum() + f(x * 2, weight, labels).sum() for f in (loss, plain)]
        scale = (labels != IGNORE).sum()  # plain is the mean, loss the sum
        pairs = [_gradients(t, inputs) for t in (twice[0], twice[1] * scale)]
        _close(*pairs, 1e-5)
    # One graph for all lengths
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    frames = CompileCounter()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend=frames, dynamic=True)
    for n in (40, 24, 33, 7):
        compiled(x[:n].detach().requires_grad_(), weight, labels[:n].clone()).backward()
    assert frames.frame_count == 1, frames.frame_count
    policy = functools.partial(grpo_loss, advantages=torch.ones(1), beta=0.1)
    seven = functools.partial(_general, chunk=7, fn=_nll)
    fixed = weight.detach()
    frozen = lambda x, y: linear_cross_entropy(x, fixed, y, chunk=16)
    grpo = lambda x, y: policy(x[None], weight, y[None], mask=y[None] * 0 + 1, ref_logprobs=y[None])
    for loss in (lambda x, y: seven(x, weight, y), frozen, grpo):
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
        for n in (40, 24, 9):
            part, y = x[:n].detach().requires_grad_(), labels[:n].clamp(min=0)
            outs = [way(part, y).sum() for way in (compiled, loss)]
            _close(*([out, *torch.autograd.grad(out, part)] for out in outs), 1e-5)
    # Autocast: products in bf16, dW of a float32 weight in float32
    with torch.autocast("cpu", torch.bfloat16):
        outs = [linear_cross_entropy(x, weight, labels, chunk=16)]
        outs += [_general(x, weight, labels, chunk=16) / (labels != IGNORE).sum()]
        want = plain(x, weight, labels)
    exact = _gradients(plain(x, weight, labels), inputs)
    for out in outs:
        grads = _gradients(out, inputs)
        assert grads[1].dtype == torch.float32
        _close([out, *grads], [want, *exact], 1e-2)
    # A loss scale gives 2^16 times the gradients, exactly
    losses = [linear_cross_entropy(x, weight, labels) for _ in range(2)]
    scaled = torch.amp.GradScaler("cpu").scale(losses[0])
    pairs = zip(_gradients(scaled, inputs), _gradients(losses[1], inputs), strict=True)
    assert all(torch.equal(a, b * 65536) for a, b in pairs)
    # Two halves with num_items of the whole
    items = (labels != IGNORE).sum()
    split = zip(x.split(20), labels.split(20), strict=True)
    halves = sum(linear_cross_entropy(a, weight, b, num_items=items) for a, b in split)
    _close(_gradients(halves, inputs), exact, 1e-5)


def _cross_entropy(x, weight, bias, labels, smoothing=0.0, softcap=None, scale=1.0, z=0.0):
    """The definition, a value per token, unchunked and in x's dtype."""
    logits = (x @ weight.t() + bias) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    loss = _nll(logits, labels, label_smoothing=smoothing)
    return loss + z * logits.logsumexp(1) ** 2 * (labels != IGNORE)


def _naive_cross_entropy(x, weight, labels, bias=None, ignore_index=IGNORE, reduction="mean", **o):
    """The same with linear_cross_entropy's arguments, those that change the result."""
    labels = torch.where(labels == ignore_index, IGNORE, labels.long()).flatten()
    logits = o.get("softcap"), o.get("logit_scale", 1.0)
    given = x.flatten(0, -2), weight, 0 if bias is None else bias, labels
    each = _cross_entropy(*given, o.get("label_smoothing", 0.0), *logits, o.get("z_loss", 0.0))
    if reduction == "none":
        return each.view(x.shape[:-1])
    count = (labels != IGNORE).sum().clamp(min=1) if reduction == "mean" else 1
    return each.sum() / (count if o.get("num_items") is None else o["num_items"] or 1)


def test_fuzz_cross_entropy():
    from hypothesis import strategies as st

    def check(biased, tiny, low, given, options, **problem):
        (x, weight, bias), labels, rng = _random_problem(**problem, ignore=options["ignore_index"])
        given = given | ({"accum_dtype": x.dtype} if low and x.dtype == torch.bfloat16 else {})
        if options["reduction"] == "none":
            options = options | {"num_items": None}
        ours = lambda x, w, b=None: linear_cross_entropy(x, w, labels, bias=b, **options, **given)
        naive = lambda x, w, b=None: _naive_cross_entropy(x, w, labels, b, **options)
        _check_near(ours, naive, (x, weight, bias if biased else None), rng, tiny)

    given = {}, {"chunk": 1}, {"chunk": 3}, {"chunk": 99}, {"budget_mib": 2}
    drawn = _drawn(biased=(0, 1), tiny=(0, 1), low=(0, 1), given=given)
    options = {"reduction": ("mean", "sum", "none"), "label_smoothing": (0, 0.1, 1)}
    options |= {"softcap": (None, 0.5, 30), "logit_scale": (1.0, 0.3, 2), "z_loss": (0, 0.01)}
    options |= {"ignore_index": (IGNORE, 0, -1), "num_items": (None, 0, 7, torch.tensor(5))}
    options = {name: st.sampled_from(values) for name, values in options.items()}
    _fuzz(check, **drawn, options=st.fixed_dictionaries(options))


def test_cross_entropy_equals_the_definition():
    x, weight, bias, labels = _problem(37, 16, 101)
    inputs, count = (x, weight, bias), (labels != IGNORE).sum()
    reduce = {"none": lambda t: t, "sum": torch.sum, "mean": lambda t: t.sum() / count}
    names = "label_smoothing", "softcap", "logit_scale", "z_loss"
    cases = (0.0, None, 1.0, 0.0), (0.1, None, 1.0, 0.0), (0.0, 3.0, 1.0, 0.0)
    cases += (0.0, None, 0.3, 0.1), (0.2, 2.0, 1.5, 0.05)
    for case, chunk, reduction in itertools.product(cases, (None, 1, 8, 100), reduce):
        doubles = [t.double() for t in inputs]
        want = reduce[reduction](_cross_entropy(*doubles, labels, *case))
        options = dict(zip(names, case, strict=True)) | {"chunk": chunk, "reduction": reduction}
        got = linear_cross_entropy(x, weight, labels, bias=bias, **options)
        grads = _gradients(got, inputs)
        _close([got, *grads], [want, *_gradients(want, inputs)], 1e-5, options)
        _close(_gradients(got, inputs), grads, 0)  # a second backward of the same graph
    # Views with strides, and a bias that masks words out
    bias = torch.where(torch.arange(101) < 90, bias.detach(), -math.inf)
    both = torch.stack([labels, labels]).clamp(max=89).t(), torch.stack([bias, bias]).t()
    got = linear_cross_entropy(x, weight, both[0][:, 1], bias=both[1][:, 1])
    want = F.cross_entropy(x @ weight.t() + bias, both[0][:, 0])
    _close([got, *_gradients(got, inputs[:2])], [want, *_gradients(want, inputs[:2])], 1e-5)
    # No label that counts: loss 0, gradients 0, and what is not finite is not looked at
    nothing = torch.full_like(labels, IGNORE)
    for value, chunk, reduction in itertools.product((0.0, math.nan), (None, 5), reduce):
        x = torch.full_like(x, value).requires_grad_()
        loss = linear_cross_entropy(x, weight, nothing, chunk=chunk, reduction=reduction).sum()
        dx, dw = _gradients(loss, (x, weight))
        assert loss == 0 and not dx.any() and (value != 0 or not dw.any()), reduction


def test_low_precision_is_no_worse_than_the_plain_path(device="cpu"):
    exact = lambda x, w, y: F.cross_entropy(x.float() @ w.float().t(), y)
    plain = lambda x, w, y: F.cross_entropy((x @ w.t()).float(), y)
    mean = lambda loss, **o: lambda x, w, y: loss(x, w, y, **o).sum() / (y != IGNORE).sum()
    options = {}, {"chunk": 64}, {"budget_mib": 2}
    ways = [functools.partial(linear_cross_entropy, **option) for option in options]
    ways += [mean(linear_cross_entropy, reduction="none"), mean(_general, chunk=16)]
    twice = functools.partial(linear_cross_entropy, accum_dtype=torch.bfloat16)  # a second pass
    lean = functools.partial(twice, chunk=64)
    for dtype, v in itertools.product((torch.bfloat16, torch.float16), (1001, 1024)):
        x, weight, _, labels = _problem(300, 64, v, dtype, device)
        run = functools.partial(_run, x, weight, labels)
        want, own = run(exact), run(plain)
        with _small(ROWS=64, PASS_MIB=0.1, LEAN_MIB=0.1):
            for way in [*ways, twice, lean] if dtype == torch.bfloat16 else ways:
                for got, right, theirs in zip(run(way), want, own, strict=True):
                    factor = 1.5 if way is lean else 1.05
                    assert _error(got, right) <= factor * _error(theirs, right) + 1e-4, (way, dtype)
    # fp16: products above 65504; and gradients of 1/tokens that without a scale are below 6e-8,
    # as are those of the words from 100 on, which are no token's label
    for shape, size, scale in (((64, 64, 100), 150, 1e-3), ((4096, 16, 2000), 1, 2.0**16)):
        x, weight, _, labels = _problem(*shape, torch.float16, device)
        x, weight = ((t.detach() * size).requires_grad_() for t in (x, weight))
        assert size == 1 or (x @ weight.t()).isinf().any()
        outs = [f(x, weight, labels.clamp(max=99)) * scale for f in (linear_cross_entropy, exact)]
        got, want = ([g, w, w[100:]] for g, w in (_gradients(out, (x, weight)) for out in outs))
        _close(got, want, 2e-2 if size > 1 else 5e-3)


def test_every_plan_sums_dw_in_float32():
    """Unless asked for bf16; and with a budget no plan takes more memory than it."""
    cases = itertools.product(
        (1, 300, 5000, 20000), (64, 2048), (5003, 128256), (2, 64, 3000, None)
    )
    for (n, d, v, budget), exact in itertools.product(cases, (True, False)):
        x, weight = (torch.empty(rows, d, dtype=torch.bfloat16, device="meta") for rows in (n, v))
        plan = _plan(x, weight, True, None, budget, exact)
        assert plan.rows >= n or plan.sums or plan.again or not exact
        logits, sums = plan.rows * v * 2, v * d * 4 if plan.sums else 0
        beyond = max(sums + logits - v * d * 2, sums) if sums else logits
        assert budget is None or beyond <= budget * 2**20 or plan.rows == 1, (n, d, v, budget, plan)


def test_logprobs_entropy_and_logsumexp():
    x, weight, bias, labels = _problem(37, 16, 101)
    live, index, ramp = labels != IGNORE, labels.clamp(min=0)[:, None], torch.linspace(0, 1, 37)
    cases = itertools.product((None, 2.0), (1.0, 0.7), ((1, 1), (1, 0), (0, 1)))
    for softcap, heat, on in cases:
        logits = x.double() @ weight.double().t() + bias.double()
        logits = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / heat
        logs = torch.log_softmax(logits, 1)
        pick = lambda t: t.gather(1, index)[:, 0] * live
        wants = [(pick(logs), -(logs.exp() * logs).sum(1) * live)]
        given = x.view(1, 37, 16), weight, labels[None]
        options = {"bias": bias, "softcap": softcap}
        with _small(ROWS=16, PASS_MIB=1e-3, FROZEN_MIB=1e-3):  # chunks of rows and of words
            gots = [linear_logprobs(*given, temperature=heat, entropy=True, **options)]
            options["chunk"] = 5
            if heat == 1:
                wants.append((logits.logsumexp(1) * live, pick(logits)))
                gots.append(linear_logsumexp(*given, **options))
            for got, want in zip(gots, wants, strict=True):
                _close([t.view(-1) for t in got], want, 1e-5)
                mix = [(a * on[0] * ramp + b * on[1] * ramp).sum() for a, b in (got, want)]
                _close(*(_gradients(m, (x, weight, bias)) for m in mix), 1e-5)


def _naive_logprobs(x, weight, labels, bias=None, temperature=1.0, softcap=None, **o):
    """(log-probability, entropy, logsumexp, the label's logit) with linear_logprobs' arguments."""
    live = labels != o.get("ignore_index", IGNORE)
    logits = (x @ weight.t() + (0 if bias is None else bias)) * o.get("logit_scale", 1.0)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits, index = logits / temperature, torch.where(live, labels, 0).long()[..., None]
    logs, pick = torch.log_softmax(logits, -1), lambda t: t.gather(-1, index)[..., 0]
    results = pick(logs), -(logs.exp() * logs).sum(-1), logits.logsumexp(-1), pick(logits)
    return [result * live for result in results]


def test_fuzz_logprobs_and_logsumexp():
    def check(entropy, heat, scale, softcap, ignore, chunk, biased, tiny, **problem):
        (x, weight, bias), labels, rng = _random_problem(**problem, ignore=ignore)
        options = {"softcap": softcap, "ignore_index": ignore, "chunk": chunk}
        function, other = linear_logsumexp, {"logit_scale": scale}
        if entropy is not None:
            function, other = linear_logprobs, {"temperature": heat}
        part = slice(2, 4) if entropy is None else slice(0, 1 + entropy)
        ours = functools.partial(function, **options, **other)
        ours = ours if not entropy else functools.partial(ours, entropy=True)
        run = lambda x, w, b=None: ours(x, w, labels, bias=b)
        naive = lambda x, w, b=None: _naive_logprobs(x, w, labels, b, **options, **other)[part]
        one = lambda *a: naive(*a)[0] if entropy is False else naive(*a)
        _check_near(run, one, (x, weight, bias if biased else None), rng, tiny)

    options = {"entropy": (None, False, True), "heat": (1, 0.7, 3.0), "scale": (1, 0.5)}
    options |= {"softcap": (None, 0.5, 30), "ignore": (IGNORE, 0), "chunk": (None, 1, 5)}
    _fuzz(check, **_drawn(**options, biased=(0, 1), tiny=(0, 1)))


def _naive_grpo(logits, labels, advantages, mask, old=None, ref=None, policy=None, *rest):
    """TRL's formulas over all the logits; items: num_items, or tokens of a longest completion."""
    beta, low, high, delta = policy or (0.0, 0.2, 0.2, None)
    kind, level, items = rest or ("grpo", "token", 1)
    logp = torch.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0]
    log_ratio = logp - (logp.detach() if old is None else old)
    if level == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1))[:, None]
    ratio = log_ratio.exp()
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    if kind == "cispo":
        loss = -ratio.clamp(max=high).detach() * advantages * logp
    else:
        first = ratio if delta is None else ratio.clamp(max=delta)
        loss = -torch.min(first * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    loss = loss + beta * ((ref - logp).exp() - (ref - logp) - 1) if beta else loss
    rows = (loss * mask).sum(-1)
    whole = {"bnpo": mask.sum().clamp(min=1), "dr_grpo": len(labels) * items}
    if kind in ("grpo", "luspo"):
        return (rows / mask.sum(-1).clamp(min=1) if kind == "grpo" else rows).mean()
    return rows.sum() / whole.get(kind, items)


def test_grpo_equals_the_naive_one():
    batch, tokens, d, v = 4, 11, 16, 101
    x, weight, _, _ = _problem(batch * tokens, d, v)
    x = x.detach().view(batch, tokens, d).requires_grad_()
    labels, mask = torch.randint(0, v, (batch, tokens)), torch.rand(batch, tokens) < 0.7
    mask[2], advantages = False, torch.tensor([1.0, -1.5, 0.5, -0.7])  # 2: of nothing
    logits = (x @ weight.t()) / 0.9
    logp = torch.log_softmax(logits.detach(), -1).gather(-1, labels[..., None])[..., 0]
    old, ref = (logp + 0.4 * torch.randn(batch, tokens) for _ in range(2))
    unseen = torch.where(mask, labels, v + 5)  # where nothing counts nothing is looked at
    old_unseen, given = torch.where(mask, old, -math.inf), mask.clone()
    mask[3, 0], given[3, 0], unseen[3, 0] = False, True, IGNORE  # a token labelled so is masked too
    levels = "token", "sequence"
    for kind, level, off, beta, delta in itertools.product(
        LOSS_TYPES, levels, (None, old), (0.0, 0.1), (None, 1.3)
    ):
        high = 2.0 if kind == "cispo" else 0.28
        policy = beta, 0.2, high, delta
        naive = labels, advantages, mask.float(), off, ref, policy, kind, level, 16
        want = _naive_grpo(logits, *naive)
        options = {"old_logprobs": None if off is None else old_unseen, "ref_logprobs": ref}
        options |= {"beta": beta, "delta": delta}
        options |= {"epsilon_high": high, "loss_type": kind, "importance_sampling_level": level}
        options |= {"max_completion_length": 16, "num_items": torch.tensor(16.0), "chunk": 8}
        run = lambda o=options: grpo_loss(
            x, weight, unseen, advantages, given, temperature=0.9, **o
        )
        got, inputs = run(), (x, weight)
        _close([got, *_gradients(got, inputs)], [want, *_gradients(want, inputs)], 1e-4, options)
        with torch.no_grad():
            _close([run()], [want], 1e-4)


def test_fuzz_grpo():
    def check(kind, level, off, beta, high, delta, per_token, given, softcap, biased, tiny, **rest):
        (x, weight, bias), labels, rng = _random_problem(**rest, ignore=0)
        x = x if x.ndim == 3 else x.detach()[None].requires_grad_(x.requires_grad)
        labels, uniform = labels.view(x.shape[:2]), lambda *size: torch.rand(size, generator=rng)
        mask = (uniform(*labels.shape) < 0.7).float().to(x.device)
        advantages = torch.randn(labels.shape[: 1 + per_token], generator=rng).to(x.device)
        exact = _naive_logprobs(
            *(t.detach().double() for t in (x, weight)),
            labels,
            bias.detach() * biased,
            0.9,
            softcap,
            ignore_index=-1,
        )[0]
        # Ratios far from where they are clipped, or rounding would decide
        steps = torch.tensor([-0.6, -0.1, 0.0, 0.1, 0.5])
        tokens = labels.shape[1] if level == "token" else 1
        steps = steps[torch.randint(0, 5, (len(labels), tokens), generator=rng)].to(x.device)
        old, ref = (exact + steps).float() if off else None, (exact - 0.3).float()
        high = 2.0 if kind == "cispo" else high
        options = {"old_logprobs": old, "ref_logprobs": ref, "beta": beta, "delta": delta}
        options |= {"epsilon_high": high, "loss_type": kind, "importance_sampling_level": level}
        options |= {"max_completion_length": 16, "num_items": 16.0, "temperature": 0.9}
        policy = beta, 0.2, 0.2 if high is None else high, delta

        def ours(x, weight, bias=None):
            more = {"bias": bias, "softcap": softcap} | given
            return grpo_loss(x, weight, labels, advantages, mask, **options, **more)

        def naive(x, weight, bias=0):
            logits = x @ weight.t() + bias
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            more = labels.long(), advantages, mask, old, ref, policy, kind, level, 16
            return _naive_grpo(logits / 0.9, *more)

        _check_near(ours, naive, (x, weight, bias if biased else None), rng, tiny)

    options = {"kind": LOSS_TYPES, "level": ("token", "sequence"), "off": (False, True)}
    options |= {"beta": (0.0, 0.1), "high": (None, 0.28), "delta": (None, 1.3)}
    options |= {"per_token": (False, True), "softcap": (None, 2.0), "biased": (0, 1)}
    given = {}, {"chunk": 1}, {"chunk": 5}, {"budget_mib": 2}
    _fuzz(check, **_drawn(**options, given=given, tiny=(0, 1)))


def test_largest_tensor_alive():
    n, d, v = 512, 16, 4096
    x, weight, _, labels = _problem(n, d, v)
    for loss in (_general, linear_cross_entropy, linear_logprobs):
        with _small(PASS_MIB=0.25), _Watch(v * d, n * d) as watch:
            loss(x, weight, labels, chunk=32).sum().backward()
        assert watch.largest <= n * v // 16, (loss, watch.largest)


def test_no_product_on_a_cpu_has_padding_beside_its_rows():
    """Weight trained or frozen, one chunk or many, a second pass over the vocabulary."""

    class Whole(_Watch):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._opname in ("mm", "addmm", "addmm_"):
                left = args[-2]
                assert left.is_contiguous() or left.t().is_contiguous(), (func, left.stride())
            return super().__torch_dispatch__(func, types, args, kwargs)

    x, weight, bias, labels = _problem(19, 6, 37, torch.bfloat16)
    tiny = {"PASS_MIB": 1e-3, "FROZEN_MIB": 1e-3, "LEAN_MIB": 1e-3, "ROWS": 8}
    lean = functools.partial(linear_cross_entropy, accum_dtype=torch.bfloat16)
    losses = _general, linear_cross_entropy, lean, linear_logprobs
    for w, loss, chunk in itertools.product((weight, weight.detach()), losses, (None, 5)):
        for constants in ({"ROWS": ROWS}, tiny):
            with _small(**constants), Whole() as watch:
                loss(x, w, labels, bias=bias, chunk=chunk).sum().backward()
            assert watch.products >= 2 + w.requires_grad


def _tiny(kind="Llama", **options):
    """A small CausalLM of a transformers family, random weights."""
    import transformers

    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    sizes |= {"head_dim": 16, "eos_token_id": 1, "attn_implementation": "eager"}
    config = getattr(transformers, f"{kind}Config")(**sizes | options)
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def test_causal_language_models_train_through_it():
    import peft

    families = {"Llama": {}, "Qwen2": {"tie_word_embeddings": True}}
    families |= {"Cohere": {"logit_scale": 0.25}, "Granite": {"logits_scaling": 4.0}}
    families |= {"Gemma2": {"final_logit_softcapping": 5.0}, "GPTNeoX": {}}
    ids = torch.randint(0, 256, (2, 24))
    labels = ids.masked_fill(torch.rand(2, 24) < 0.3, IGNORE)
    layers = r".*(q_proj|query_key_value|lm_head|embed_out)"
    lora = {"r": 4, "target_modules": layers, "init_lora_weights": False}
    for (kind, options), wrap in itertools.product(families.items(), (False, True)):
        model = _tiny(kind, **options)
        model = peft.get_peft_model(model, peft.LoraConfig(**lora)) if wrap else model
        for given in ({}, {"num_items_in_batch": torch.tensor(20)}):
            results = []
            for patched in (False, True):
                patch_causal_lm(model) if patched else None
                out = model(input_ids=ids, labels=labels, **given)
                model.zero_grad()
                out.loss.backward()
                grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
                results.append([out.loss.detach(), *grads])
            assert out.logits is None and model(input_ids=ids).logits.shape == (2, 24, 256)
            _close(*results[::-1], 1e-4, kind)
            del (model.get_base_model() if wrap else model).forward
    model = _tiny()
    patch_causal_lm(patch_causal_lm(model))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    names = [*inspect.signature(model.forward).parameters]
    assert names == [*inspect.signature(type(model).forward).parameters][1:]  # Trainer reads them
    uniform = twin(input_ids=ids, labels=labels, return_dict=False)[0].item()
    assert abs(uniform - math.log(256)) < 1e-4  # a copy has its own weights
    replica = model._replicate_for_data_parallel()
    assert replica.forward.__self__ is replica is replica._stock_forward.__self__
    assert replica(input_ids=ids, labels=labels).logits is None
    del model.forward
    model.lm_head.forward = lambda hidden: hidden @ torch.randn(64, 256)  # not what it looks like
    with _raises(ValueError, "LlamaForCausalLM: found other logits than its head's, need"):
        patch_causal_lm(model)
    model = _tiny()
    model.loss_function = lambda logits, labels, **_: F.cross_entropy(logits[0], labels[0])
    with _raises(ValueError, "LlamaForCausalLM: found a loss of"):
        patch_causal_lm(model)


def test_fuzz_causal_language_models():
    """Any head's options and labels: the stock loss and gradients."""
    from hypothesis import strategies as st

    def check(kind, vocab, tied, cap, shape, items, given, share, seed):
        config = {"vocab_size": vocab, "tie_word_embeddings": tied, "num_hidden_layers": 1}
        caps = {"Cohere": "logit_scale", "Granite": "logits_scaling"}
        caps["Gemma2"] = "final_logit_softcapping"
        config |= {caps[kind]: cap} if kind in caps else {}
        model = _tiny(kind, **config)
        torch.manual_seed(seed)
        ids = torch.randint(0, vocab, shape)
        labels = ids.masked_fill(torch.rand(shape) < share, IGNORE)
        labels[:, -1] = ids[:, -1]  # of none that counts stock's loss is nan
        options = {} if items is None else {"num_items_in_batch": items}
        if given:
            options["shift_labels"] = F.pad(labels, (0, 1), value=IGNORE)[:, 1:].contiguous()
        results = []
        for patched in (False, True):
            patch_causal_lm(model) if patched else None
            out = model(input_ids=ids, labels=labels, **options)
            model.zero_grad()
            out.loss.backward()
            grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            results.append([out.loss.detach(), *grads])
        _close(*results[::-1], 1e-4, kind)

    options = {"kind": ("Llama", "Gemma2", "Cohere", "Granite"), "vocab": (2, 37, 256)}
    options |= {"tied": (False, True), "cap": (0.5, 5.0), "shape": ((1, 2), (2, 9), (3, 24))}
    options |= {"items": (None, 7, torch.tensor(20)), "given": (False, True)}
    options |= {"share": (0.0, 0.5), "seed": range(100)}
    with _small(ROWS=8):
        _fuzz(check, **{name: st.sampled_from(values) for name, values in options.items()})


def test_patching_leaves_4bit_weights_trainable():
    import bitsandbytes as bnb

    model = _tiny().bfloat16()
    attention = model.model.layers[0].self_attn
    plain, dtype = attention.q_proj, torch.bfloat16
    shape = plain.in_features, plain.out_features
    layer = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.load_state_dict(plain.state_dict())
    attention.q_proj = layer.to("cpu")
    patch_causal_lm(model.eval())
    model.train()
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


def _text(steps, batch, length):
    """Batches of English: Python's own help texts, a token a byte."""
    data = "".join(pydoc_data.topics.topics.values()).encode()
    starts = torch.randint(0, len(data) - length, (steps * batch,)).tolist()
    rows = [list(data[start : start + length]) for start in starts]
    return torch.tensor(rows).view(steps, batch, length)


def _curve(model, batches, rate, patched, parts=1):
    """The loss of each optimizer step in bf16 autocast, each batch taken in `parts`."""
    model = patch_causal_lm(model) if patched else model
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=rate), torch.zeros(len(batches))
    for step, batch in enumerate(batches):
        for ids in batch.chunk(parts):
            with torch.autocast(ids.device.type, torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss / parts
            loss.backward()
            losses[step] += loss.item()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _compare_curves(make, batches, rate):
    """Stock, stock with other orders of summation (half batches), patched: it may differ alike."""
    ways = (False,), (False, 2), (True,)
    stock, halves, ours = (_curve(make(), batches, rate, *way) for way in ways)
    noise, difference = (stock - halves).abs().max().item(), (stock - ours).abs().max().item()
    print(f"\n{len(batches)} steps; largest difference of the loss to stock: half batches ", end="")
    print(f"{noise:.1e}, patched {difference:.1e}; step: stock, patched")
    points = [*range(0, len(stock), 10), len(stock) - 1]
    print(" | ".join(f"{k}: {stock[k]:.4f}, {ours[k]:.4f}" for k in points))
    assert stock[-1] < stock[0] - 0.5, "it does not learn"
    assert difference <= 3 * noise + 1e-3, (difference, noise)


def test_training_loss_matches_stock():
    _compare_curves(_tiny, _text(60, 4, 64), 1e-3)


def test_grpo_step_like_trl():
    """8 completions of a prompt, rewards, advantages within the group, a step: as the naive one."""
    model, prompt = _tiny(), torch.randint(0, 256, (1, 5)).expand(8, -1)
    ids = model.generate(prompt, max_new_tokens=12, do_sample=True, pad_token_id=0)
    completion, head = ids[:, 5:], model.lm_head.weight
    mask = torch.arange(completion.shape[1])[None] < torch.randint(3, 13, (8, 1))
    rewards = (completion % 7 == 0).float().mean(1)
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    results = []
    for ours in (False, True):
        hidden = model.model(ids).last_hidden_state[:, 4:-1]  # each predicts the token after it
        rest = completion, advantages, mask.float()
        naive = functools.partial(_naive_grpo, hidden @ head.t())
        loss = grpo_loss(hidden, head, *rest, chunk=16) if ours else naive(*rest)
        model.zero_grad()
        loss.backward()
        results.append([loss.detach() + 1, *(p.grad.clone() for p in model.parameters())])
    _close(*results[::-1], 1e-4)


@contextlib.contextmanager
def _raises(error, words):
    try:
        yield
    except error as found:
        assert str(found).startswith(words) and "\n" not in str(found), (words, str(found))
    else:
        raise AssertionError(f"no {error.__name__}: {words}")


def test_errors_name_what_was_found_and_needed():
    x, weight, bias, labels = _problem()
    ce, general = linear_cross_entropy, memory_efficient_linear
    total, far = lambda logits, *_: logits.sum(), torch.full_like(labels, 37)
    double = weight.double()
    for kind, words, function, *given in (
        (TypeError, "x: found list, need a tensor", ce, [1], weight, labels),
        (ValueError, "x: found shape [8], need [..., D]", ce, x[0], weight, labels),
        (ValueError, "weight: found shape [37, 4], need shape [37", ce, x, weight[:, :4], labels),
        (TypeError, "weight: found torch.float64, need torch.float32", ce, x, double, labels),
        (TypeError, "x: found torch.float64, need float32", ce, x.double(), weight, labels),
        (ValueError, "weight: found meta, need cpu as x", ce, x, weight.to("meta"), labels),
        (ValueError, "x: found it on meta, need it on cpu", ce, x.to("meta"), weight, labels),
        (ValueError, "labels: found shape [22], need shape [23]", ce, x, weight, labels[1:]),
        (TypeError, "labels: found torch.float32, need torch.int64", ce, x, weight, labels.float()),
        (ValueError, "labels: found [37], need 0 to 36 or -100", linear_logprobs, x, weight, far),
        (ValueError, "labels: found [-1], need 0", linear_logsumexp, x, weight, far - 38),
        (ValueError, "x: found shape [0, 8], need at least one", general, x[:0], weight, total),
        (TypeError, "fn: found int, need a function", general, x, weight, 3),
        (ValueError, "weight: found shape [37, 0], need", ce, x[:, :0], weight[:, :0], labels),
        (TypeError, "fn's result: found float, need a tensor", general, x, weight, lambda t: 1.0),
        (ValueError, "fn's result: found shape [23, 37], need", general, x, weight, lambda t: t),
        (ValueError, "fn's result: found it det", general, x, weight, lambda t: t.detach().sum()),
        (ValueError, "per-token argument 0: found s", general, x, weight, total, labels[1:]),
    ):
        with _raises(kind, words):
            function(*given)
    with _raises(ValueError, "fn's result: found shape [], need [1]"):  # of a last chunk of one
        general(x, weight, lambda logits: logits.sum(1).squeeze(), chunk=22)
    for kind, words, option in (
        (ValueError, "chunk: found 0, need 1 or more", {"chunk": 0}),
        (TypeError, "chunk: found 2.5, need an integer", {"chunk": 2.5}),
        (ValueError, "chunk: found budget_mib as well", {"chunk": 8, "budget_mib": 8}),
        (TypeError, "ignore_index: found None, need an integer", {"ignore_index": None}),
        (ValueError, f"ignore_index: found {2**70}, need", {"ignore_index": 2**70}),
        (TypeError, "logit_scale: found None, need a number", {"logit_scale": None}),
        (TypeError, "z_loss: found a tensor of shape [37, 8], need a number", {"z_loss": weight}),
        (ValueError, "softcap: found 1000000.0, need 0 to 10000", {"softcap": 1e6}),
        (ValueError, "num_items: found shape [2], need one", {"num_items": torch.ones(2)}),
        (ValueError, "budget_mib: found 1, need 2 or more", {"budget_mib": 1}),
        (ValueError, "reduction: found max, need mean, sum or none", {"reduction": "max"}),
        (ValueError, "label_smoothing: found 1.5, need 0 to 1", {"label_smoothing": 1.5}),
        (ValueError, "softcap: found 0, need more than 0", {"softcap": 0}),
        (ValueError, "bias: found shape [36], need shape [37]", {"bias": bias[1:]}),
        (ValueError, "accum_dtype: found torch.float16", {"accum_dtype": torch.float16}),
        (ValueError, "num_items: found reduction none", {"reduction": "none", "num_items": 3}),
    ):
        with _raises(kind, words):
            ce(x, weight, labels, **option)
    x, labels, mask = x.view(1, 23, 8), labels.view(1, 23).clamp(min=0), torch.ones(1, 23)
    for words, option in (
        ("loss_type: found ppo, need one of grpo", {"loss_type": "ppo"}),
        ("ref_logprobs: found None, need it for this loss_type", {"beta": 0.1}),
        ("num_items: found None, need it for this loss_type", {"loss_type": "dapo"}),
        ("old_logprobs: found shape [23], need shape [1, 23]", {"old_logprobs": mask[0]}),
        ("temperature: found 0, need more than 0", {"temperature": 0}),
        ("epsilon: found -1, need 0 or more", {"epsilon": -1}),
    ):
        with _raises(ValueError, words):
            grpo_loss(x, weight, labels, torch.ones(1), mask, **option)


def test_fuzz_broken_arguments_are_refused():
    """One argument with another value: the right result for what it then says, or one line."""
    from hypothesis import strategies as st

    problem = 0, (5, 4, 7), (2,), torch.float32, (True,) * 3, False
    x, weight, bias = (t.detach().cpu().requires_grad_() for t in _random_problem(*problem)[0])
    labels = torch.randint(0, 7, (2, 5))
    ones = torch.ones(2, 5)
    square, flat = lambda logits: (logits**2).sum(), lambda x: x.reshape(-1)
    policy = {"old_logprobs": -2 * ones, "ref_logprobs": -2.2 * ones, "beta": 0.1, "delta": 1.3}
    policy |= {"epsilon": 0.2, "epsilon_high": 0.28, "loss_type": "grpo", "num_items": 3}
    policy |= {"importance_sampling_level": "token", "max_completion_length": 9}
    sized, head = {"chunk": None, "budget_mib": None}, {"softcap": 2.0, "bias": bias}
    plain = head | {"x": x, "weight": weight, "labels": labels, "ignore_index": IGNORE}
    entropy = {"reduction": "mean", "label_smoothing": 0.1, "logit_scale": 0.5, "z_loss": 0.01}
    entropy |= {"num_items": None, "accum_dtype": torch.float32}

    def naive_grpo(x, weight, labels, advantages, mask, bias, softcap, temperature, **o):
        logits = x @ weight.t() + (0 if bias is None else bias)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        high = o["epsilon"] if o["epsilon_high"] is None else o["epsilon_high"]
        rest = o["old_logprobs"], o["ref_logprobs"], (o["beta"], o["epsilon"], high, o["delta"])
        items = {"dr_grpo": o["max_completion_length"]}.get(o["loss_type"], o["num_items"] or 1)
        rest = *rest, o["loss_type"], o["importance_sampling_level"], items
        mask = mask * (labels != IGNORE)
        labels = torch.where(mask != 0, labels, 0).long()
        return _naive_grpo(logits / temperature, labels, advantages, mask, *rest)

    def naive_any(x, weight, fn, bias, **_):
        return fn((x @ weight.t() + (0 if bias is None else bias)).flatten(0, -2))

    functions = {  # the arguments, and what gives the right result
        linear_cross_entropy: (plain | entropy | sized, _naive_cross_entropy),
        linear_logprobs: (
            plain | {"temperature": 0.9, "chunk": None, "entropy": True},
            lambda entropy, **o: _naive_logprobs(**o)[: 2 if entropy else 1],
        ),
        linear_logsumexp: (
            plain | {"logit_scale": 0.5, "chunk": None},
            lambda **o: _naive_logprobs(**o)[2:],
        ),
        grpo_loss: (
            plain | policy | sized | {"advantages": ones[:, 0], "mask": ones, "temperature": 0.9},
            naive_grpo,
        ),
        memory_efficient_linear: (
            sized | {"x": x, "weight": weight, "bias": bias, "fn": square},
            naive_any,
        ),
        patch_causal_lm: ({"model": None, "loss": None}, None),
    }
    del functions[grpo_loss][0]["ignore_index"]
    functions[grpo_loss][0]["labels"] = labels.clamp(min=0)
    values = [
        None,
        0,
        1,
        3,
        -1,
        0.5,
        1.5,
        math.nan,
        math.inf,
        1e30,
        2**70,
        True,
        "mean",
        "bnpo",
        (),
        [1],
    ]
    values += [torch.zeros(size) for size in ((), (2,), (7,), (2, 5), (7, 4), (2, 5, 4), (0, 4))]
    values += [torch.full((2, 5), n) for n in (0, 6, 7, -1, IGNORE)]
    values += [
        t.detach().to(kind) for t in (x, weight) for kind in (torch.float64, "meta", torch.int)
    ]
    values += [torch.bfloat16, square, labels.to("meta"), flat(x), x.mT, torch.nn.Identity()]
    names = [(f, name) for f, (given, _) in functions.items() for name in given]
    cases = itertools.product(names, values)
    cases = st.sampled_from([(*name, value) for name, value in cases])

    def check(cases):
        for case in cases:
            call(*case)

    def call(function, name, value):
        given, naive = functions[function]
        given = given | {name: value}
        try:
            got = function(**given)
        except (TypeError, ValueError) as error:
            assert "found" in str(error) and "\n" not in str(error), error
            return
        given = {k: float(a) if type(a) is int and a > 99 else a for k, a in given.items()}
        exact = lambda a: a.double() if isinstance(a, Tensor) and a.is_floating_point() else a
        wants = naive(**{k: exact(a) for k, a in given.items()})
        gots, wants = ([t] if isinstance(t, Tensor) else t for t in (got, wants))
        for got, want in zip(gots, wants, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5, equal_nan=True)

    _fuzz(check, cases=st.lists(cases, min_size=20, max_size=20))


def _check_rows(device, n, cols, first, vocab, head, mode, dtype, mean, entropy, biased):
    """_row_kernel against _rows_torch on random rows, the first of them ignored."""
    wide = torch.float32 if dtype == torch.float16 else dtype  # fp16 inputs: float32 products
    products = torch.randn(n, cols + -cols % 8, device=device).to(wide)[:, :cols] * 3
    labels = torch.randint(0, vocab, (n,), device=device)
    labels[0], products[0, :3] = IGNORE, math.nan  # of an ignored row nothing is read
    bias = torch.linspace(-1, 1, cols, device=device) if biased else None
    weights = torch.linspace(0.5, 1, n, device=device) if mode == "both" else None
    grads = _Stats(*(torch.randn(n, device=device) * on for on in (1, 1, mean, entropy)))
    results = []
    for run in (_rows_torch, _launch_rows):
        stats, loss, p = _new_stats(n, device), torch.zeros(n, device=device), products.clone()
        out = p if wide == dtype else torch.empty_like(p, dtype=dtype)
        at = _Rows(p, out, bias, labels, first, vocab, IGNORE, head)
        if mode == "grads":
            _rows_torch(at._replace(out=None), None, None, stats, None, True, True)
        run(at, weights, loss, stats, grads if mode == "grads" else None, mean, entropy)
        assert mode == "stats" or not out[0].any()
        kept = [stats.lse, stats.picked, stats.mean * mean, stats.entropy * entropy, loss]
        results.append([t[1:].float() for t in [*kept, *([] if mode == "stats" else [out])]])
    for k, (want, got) in enumerate(zip(*results, strict=True)):
        limit = 2e-4 if k < 5 or dtype == torch.float32 else 2e-2
        assert torch.allclose(got, want, limit, limit), (n, cols, head, mode, dtype, k)


def _on_gpu_or_interpreted(check):
    """On the GPU; without one in Triton's interpreter, which has to be chosen before the import."""
    if _gpus():
        return check("cuda")
    code = f"import {Path(__file__).stem} as c; c.{check.__name__}('cpu')"
    done = _run_python(code, TRITON_INTERPRET="1")
    if "only 0-dimensional arrays" in done.stderr:
        raise unittest.SkipTest("Triton 3.6's interpreter has loops with numpy before 2.4 only")
    assert done.returncode == 0, done.stderr[-2000:]


def _run_python(code, **env):
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    env = os.environ | {"PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"} | env
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


HEADS = _Head(), _Head(0.7, 5.0, 1.3, 0.1, 0.2), _Head(0.5, 0.0, 1.0, 0.0, 0.1)
MODES = "stats", "both", "grads"


def _runs_so(first, cols, vocab, head, mode, mean, entropy) -> bool:
    """Statistics and gradient together are of whole rows, and of the cross-entropy."""
    both = not entropy and mean == (head.smoothing > 0) and not first and cols == vocab
    return both or mode != "both"


def _check_kernel(device):
    """Whole rows and slabs, odd sizes, options, dtypes."""
    sizes = (5, 1000, 0, 1000), (4, 300, 704, 1500), (3, 7, 0, 7), (2, 257, 8, 300)
    flags, cases = itertools.product((False, True), repeat=3), []
    for size, head, mode, dtype, flag in itertools.product(sizes, HEADS, MODES, LOGIT_BYTES, flags):
        so = _runs_so(size[2], size[1], size[3], head, mode, *flag[:2])
        cases += [(*size, head, mode, dtype, *flag)] if so else []
    for case in cases[::7]:
        _check_rows(device, *case)


def test_row_kernel():
    _on_gpu_or_interpreted(_check_kernel)


def _fuzz_kernel(device):
    from hypothesis import strategies as st

    def check(rows, cols, first, past, head, mode, dtype, mean, entropy, biased):
        first, vocab = (0, cols) if mode == "both" else (first, first + cols + past)
        if mode == "both":
            mean, entropy = head.smoothing > 0, False
        torch.manual_seed(cols)
        _check_rows(device, rows, cols, first, vocab, head, mode, dtype, mean, entropy, biased)

    drawn = {"rows": st.integers(2, 5), "cols": st.integers(1, 2500), "first": st.integers(0, 99)}
    drawn |= {"past": st.integers(0, 99), "head": st.sampled_from(HEADS)}
    drawn |= {"mode": st.sampled_from(MODES), "dtype": st.sampled_from([*LOGIT_BYTES])}
    drawn |= {name: st.booleans() for name in ("mean", "entropy", "biased")}
    _fuzz(check, **drawn)


def test_fuzz_row_kernel():
    _on_gpu_or_interpreted(_fuzz_kernel)


def _compile_rows(sm, dtype, biased, flags):
    """_row_kernel for a compute capability; needs no GPU."""
    block, warps = _block(2**17, 2 if dtype == "bf16" else 4, sm >= 90 and not biased)
    wide = "fp32" if dtype == "fp16" else dtype
    constants = [biased, biased, *flags, block]  # bias, softcap; stats, grads, mean, entropy; BLOCK
    types = [f"*{wide}", f"*{dtype}", "*fp32", "*i64", *["*fp32"] * 10, *["i32"] * 6, *["fp32"] * 5]
    names = _row_kernel.arg_names
    signature = dict(zip(names, types + ["constexpr"] * 7, strict=True))
    constants = dict(zip(names[-7:], constants, strict=True))
    attrs = {(i,): [["tt.divisibility", 16]] for i in range(16)}
    source = ASTSource(_row_kernel, signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": warps, "debug": True, "sanitize_overflow": False}
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def test_every_architecture_compiles_without_spills():
    if isinstance(_row_kernel, InterpretedFunction):
        raise unittest.SkipTest("needs TRITON_INTERPRET unset")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    variants = (False, (1, 1, 0, 0)), (True, (1, 1, 1, 0)), (True, (1, 0, 1, 1))
    variants += ((True, (0, 1, 1, 1)),)
    chips, dtypes = (75, 80, 89, 90, 100), ("fp16", "bf16", "fp32")
    for sm, dtype, (biased, flags) in itertools.product(chips, dtypes, variants):
        if (sm, dtype) != (75, "bf16"):  # which has no bf16 products
            made = _compile_rows(sm, dtype, biased, [bool(flag) for flag in flags])
            with tempfile.NamedTemporaryFile() as cubin:
                cubin.write(made.asm["cubin"])
                cubin.flush()
                usage = subprocess.check_output([tool, "-res-usage", cubin.name], text=True)
            assert re.search(r"STACK:0\b.*LOCAL:0\b", usage), (sm, dtype, flags, usage)


def _main(*args, **changed):
    """(exit code, lines of stdout, lines of stderr) of main, with this file's names changed."""
    out, err = io.StringIO(), io.StringIO()
    to, changes = contextlib.redirect_stdout(out), _small(**changed or {"ROWS": ROWS})
    with to, contextlib.redirect_stderr(err), changes:
        code = main([*map(str, args)])
    return code, out.getvalue().splitlines(), err.getvalue().splitlines()


def test_faults_end_in_one_line_and_a_code():
    full, memory = OSError(28, "No space left on device"), torch.OutOfMemoryError("CUDA: 1 GiB")
    alloc = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "made", "ce.json")
        for code, words, fault in (
            (130, "interrupted", KeyboardInterrupt()),
            (1, "out of memory: CUDA: 1 GiB, need more free or fewer of --only", memory),
            (1, f"out of memory: {alloc}, need", RuntimeError(f"{alloc} Search for it")),
            (1, "a check failed: 3, not 4", AssertionError("3, not 4")),
            (77, "found no unknown, need it installed", ModuleNotFoundError(name="unknown")),
            (77, "cannot import name 'a'", ImportError("cannot import name 'a'")),
            (2, f"{path}: found No space left on device, need room", full),
            (0, "", None),
        ):
            timing = unittest.mock.Mock(return_value={"a_ms": 2.0})
            timing.side_effect = None if fault is full else fault
            disk = unittest.mock.patch.object(Path, "replace", side_effect=full)
            with disk if fault is full else contextlib.nullcontext():
                rest = "--only", "grpo", "--json", path
                got, out, err = _main("--bench", *rest, TIMINGS={"grpo": timing})
            assert got == code and len(err) == (code > 0), err
            assert code == 0 or err[0].startswith(f"chunked_ce: {words}"), err
            assert out[-1].startswith(f"RESULT chunked_ce {'FAIL' if code else 'PASS'} checks=0")
            assert [p.name for p in path.parent.iterdir()] == ([] if code else [path.name])
        for words, *args in (
            ("--only: found lama, need of challenge, gemma-2b", "--only", "lama"),
            ("--fuzz: found 0, need 1 or more", "--fuzz", 0),
            ("--seed: found -1, need 0", "--seed", -1),
            (f"--plot, --json: found the directory {folder}, need a file", "--json", folder),
            (f"{path}: found ", "--plot", path / "a.png"),
        ):
            code, out, err = _main("--bench", *args)
            assert code == 2 and len(err) == 1 and err[0].startswith(f"chunked_ce: {words}"), err
    old = {"is_available": lambda: True, "get_device_capability": lambda *_: (6, 1)}
    with unittest.mock.patch.multiple(torch.cuda, **old, get_device_name=lambda *_: "P100"):
        code, out, _ = _main("--bench", "--only", "lama")
    assert out[1] == "chunked_ce: found P100, need compute capability 7.5: everything on the CPU"


def test_ctrl_c_ends_the_self_test():
    """In 130, whatever pytest's plugins then raise; a failed test that -x stops ends in 1."""
    import pytest

    for kind, code in ((KeyboardInterrupt, 130), (pytest.Session.Interrupted, 1)):

        def run(_, plugins, kind=kind):
            plugins[0].pytest_runtest_logreport(types.SimpleNamespace(passed=False, when="call"))
            plugins[0].pytest_keyboard_interrupt(types.SimpleNamespace(type=kind))
            if kind is KeyboardInterrupt:
                raise ImportError(name="half_imported")
            return pytest.ExitCode.INTERRUPTED

        with unittest.mock.patch.object(pytest, "main", run):
            assert _main("--test")[0] == code, kind


def test_low_precision_on_gpu():
    _skip_unless(gpus=1)
    test_low_precision_is_no_worse_than_the_plain_path("cuda")


def test_gpu_streams_without_synchronisation_and_compiled_callers():
    _skip_unless(gpus=1, gib=2)
    x, weight, bias, labels = _problem(3000, 256, 5003, torch.bfloat16, "cuda")
    losses = [functools.partial(linear_cross_entropy, bias=bias, chunk=1024)]
    losses += [lambda *a: linear_logprobs(*a).sum(), functools.partial(_general, chunk=512)]
    stream = torch.cuda.Stream()
    for loss in losses:
        run = functools.partial(_run, x, weight, labels)
        want = run(loss)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            run(loss)  # the stream's own memory and cuBLAS handle
            stream.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                torch.cuda._sleep(10**9)
                got = run(loss)
                assert not stream.query()  # all of it was queued while the stream was busy
            finally:
                torch.cuda.set_sync_debug_mode("default")
        stream.synchronize()
        _close(got, want, 1e-6)
        torch._dynamo.reset()
        _close(run(torch.compile(loss, fullgraph=True)), want, 1e-2)
    _close(run(functools.partial(losses[2], compile=True)), want, 1e-2)


def test_models_on_two_gpus():
    """Replicated by DataParallel (what Trainer does in one process), or split by a device_map."""
    _skip_unless(gpus=2)
    from accelerate import dispatch_model

    ids, results = torch.randint(0, 256, (4, 24)).cuda(), []
    second = "model.layers.1", "model.norm", "lm_head"
    first = "model.embed_tokens", "model.rotary_emb", "model.layers.0"
    split = dict.fromkeys(first, 0) | dict.fromkeys(second, 1)
    ways = lambda model: model, torch.nn.DataParallel, lambda m: dispatch_model(m.cpu(), split)
    for k, way in enumerate(ways):
        model = _tiny().cuda()
        if k:
            patch_causal_lm(way(model) if k == 2 else model)
        run = way(model) if k < 2 else model
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss.mean()
        loss.backward()
        results.append([loss.detach().cpu(), *(p.grad.cpu() for p in model.parameters())])
    for got in results[1:]:
        _close(got, results[0], 1e-4)


def test_labels_out_of_range_stop_the_gpu():
    _skip_unless(gpus=1)
    code = f"import torch, {Path(__file__).stem} as c; x = torch.ones(4, 8, device='cuda')\n"
    code += "c.linear_cross_entropy(x, x, torch.tensor([0, 1, 4, -100], device='cuda')).item()"
    done = _run_python(code)
    assert done.returncode and "label outside the vocabulary" in done.stderr + done.stdout


def test_more_than_2_31_logits_in_a_chunk():
    _skip_unless(gpus=1, gib=16)
    n, v = 2**14 + 8, 2**17
    x, weight, _, labels = _problem(n, 16, v, torch.bfloat16, "cuda")
    small, large = (linear_cross_entropy(x, weight, labels, chunk=chunk) for chunk in (512, n))
    _close([large], [small], 1e-6)
    _close(*(_gradients(loss, (x, weight)) for loss in (large, small)), 2e-3)


def test_the_challenge_takes_half_the_memory_or_less():
    _skip_unless(gpus=1, gib=48)
    x, weight, labels = _random(*SHAPES["challenge"])
    ways = _plain, lambda *a: _general(*a) / len(x), linear_cross_entropy
    runs = [functools.partial(loss, x, weight, labels) for loss in ways]
    plain, *ours = [_peak_mib(run, (x, weight)) for run in runs]
    print(f"\npeak beyond the gradients, MiB: plain {plain:.0f}, general and fast {ours}")
    assert max(ours) <= plain / 2


def test_llama_1b_training_loss_matches_stock():
    _skip_unless(gpus=1, gib=60)
    sizes = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64}
    sizes |= {"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
    batches = _text(60, 4, 512).cuda()
    with torch.device("cuda"):  # the weights are made there
        _compare_curves(lambda: _tiny(**sizes, tie_word_embeddings=True), batches, 2e-4)


# --------------------------------------------------------------------------------------------------
# Timings: every figure with its peers in the same run, in turns

SHAPES = {"challenge": (16384, 4096, 131072), "gemma-2b": (8192, 2304, 256000)}  # tokens, D, V
SHAPES |= {"llama-1b": (8192, 2048, 128256), "llama-8b": (8192, 4096, 128256)}


def _shape(name):
    """One of SHAPES; on a CPU a small one like it."""
    n, d, v = SHAPES[name]
    return (n, d, v) if _gpus() else (n // 64, d // 16, v // 16)


def _random(n, d, v, frozen=False):
    torch.manual_seed(torch.initial_seed())  # whatever ran before, the same tensors
    gpu = _gpus() > 0
    options = {"device": "cuda" if gpu else "cpu", "dtype": torch.bfloat16 if gpu else None}
    x, weight = torch.randn(n, d, **options), torch.randn(v, d, **options) * 0.02
    labels = torch.randint(0, v, (n,), device=x.device)
    return x.requires_grad_(), weight.requires_grad_(not frozen), labels


def _backward(run, inputs):
    for tensor in inputs:
        tensor.grad = None
    loss = run()
    loss.backward()
    return loss.detach()


def _peak_mib(run, inputs):
    """Peak memory of a step beyond its gradients."""
    _backward(run, inputs)  # a first one: compilation, cuBLAS' workspace
    for tensor in inputs:
        tensor.grad = None
    gc.collect()
    if _gpus():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _backward(run, inputs)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak = _cpu_peak(functools.partial(_backward, run, inputs))
    kept = sum(t.grad.nbytes for t in inputs if t.grad is not None)
    return (peak - kept) / 2**20


def _cpu_peak(run) -> int:
    """The most bytes of tensors that run() has at one time, as the profiler hears of them."""
    screen = os.dup(2)
    with open(os.devnull, "w") as nowhere:  # the profiler writes there that it begins and ends
        os.dup2(nowhere.fileno(), 2)
        try:
            with torch.autograd.profiler.profile(use_cpu=True, profile_memory=True) as profile:
                run()
        finally:
            os.dup2(screen, 2)
            os.close(screen)
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def _plain(x, weight, labels):
    return F.cross_entropy((x @ weight.t()).float(), labels)


def _lean(frozen=False) -> dict:
    """Name -> ours in little memory: 64 MiB, or 4 of a CPU's small shapes."""
    mib, low = 64 if _gpus() else 4, _gpus() and not frozen
    options = {"accum_dtype": torch.bfloat16} if low else {}
    return {f"ours, {mib} MiB": functools.partial(linear_cross_entropy, budget_mib=mib, **options)}


def _ways(frozen) -> dict:
    """Name -> loss of (x, weight, labels): ours, then what is installed of the peers."""
    mean = lambda x, w, y, **options: _general(x, w, y, **options) / len(y)
    ways = {"ours": linear_cross_entropy} | _lean(frozen) | {"general": mean, "eager": _plain}
    if hasattr(F, "linear_cross_entropy"):
        ways["torch's own"] = F.linear_cross_entropy
    if not _gpus():
        return ways
    if frozen:
        ways["ours, 160 MiB"] = functools.partial(linear_cross_entropy, budget_mib=160)
    else:
        low = torch.bfloat16
        ways["ours, dW in bf16"] = functools.partial(linear_cross_entropy, accum_dtype=low)
    ways["general, compiled"] = functools.partial(mean, compile=True)
    ways["torch.compile"] = torch.compile(_plain)
    with contextlib.suppress(ImportError):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss as Liger

        both = Liger(), Liger(accum_dtype=torch.float32)
        ways["Liger"], ways["Liger, dW in fp32"] = (lambda x, w, y, f=f: f(w, x, y) for f in both)
    with contextlib.suppress(ImportError):
        import cut_cross_entropy

        ways["CCE"] = cut_cross_entropy.linear_cross_entropy
    with contextlib.suppress(ImportError), contextlib.redirect_stdout(io.StringIO()):
        import unsloth  # noqa: F401
        from unsloth_zoo.fused_losses.fused_linear import (
            fused_linear_cross_entropy as theirs,
        )

        ways["Unsloth"] = lambda x, w, y: theirs(x, w, None, y, divisor=len(y))
    return ways


def _exact(x, weight, labels):
    """(loss, dX of 2048 tokens, dW of 4096 words) in float32, in slices of the vocabulary."""
    n, loss, dw, dx, slices = len(x), 0.0, 0.0, [], weight.detach().split(2**15)
    for i, j in _chunks(n, 1024):
        part, y = x[i:j].detach().float(), labels[i:j]
        logits = torch.cat([part @ w.float().t() for w in slices], 1)
        loss += F.cross_entropy(logits, y, reduction="sum").item() / n
        grad = torch.softmax(logits, 1) / n
        grad[torch.arange(len(y)), y] -= 1 / n
        dw += grad[:, :4096].t() @ part
        if i < 2048:
            pairs = zip(grad.split(2**15, 1), slices, strict=True)
            dx.append(sum(g @ w.float() for g, w in pairs))
    return loss, torch.cat(dx), dw


def _products(x, weight, frozen):
    """The bare products, two or three, over 4096 tokens at a time."""
    rows = min(4096, len(x))
    part, w = x[:rows].detach(), weight.detach()
    logits = torch.randn(rows, len(w), device=x.device, dtype=x.dtype)
    room, dx, dw = torch.empty_like(logits), torch.empty_like(part), torch.empty_like(w)

    def run():
        for _ in range(len(x) // rows):
            torch.mm(part, w.t(), out=room)
            torch.mm(logits, w, out=dx)
            frozen or torch.mm(logits.t(), part, out=dw)

    return run


def _lap_ms(run):
    if _gpus():
        return do_bench(run, warmup=25, rep=75, return_mode="median")
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _in_turns_ms(runs, turns=4) -> dict:
    """Median milliseconds over turns in changing order: what ran before heats or cools a chip."""
    times = {name: [] for name in runs}
    for turn in range(turns):
        for name in random.Random(turn).sample([*runs], len(runs)):
            times[name].append(_lap_ms(runs[name]))
    return {name: statistics.median(laps) for name, laps in times.items()}


def _bench_weight(name, frozen, results) -> dict:
    shape = _shape(name)
    x, weight, labels = _random(*shape, frozen)
    inputs, (loss, *exact) = (x, weight), _exact(x, weight, labels)
    key = "frozen" if frozen else "trained"
    title = f"{name} {'x'.join(map(str, shape))} W {key}"
    torch._dynamo.reset()
    runs, figures = {"the bare products": _products(x, weight, frozen)}, {}
    for way, function in _ways(frozen).items():
        run, ours = functools.partial(function, x, weight, labels), way[:4] in ("ours", "gene")
        try:
            peak, value = _peak_mib(run, inputs), _backward(run, inputs).item()
        except Exception as error:  # a peer's is said, and the others are timed
            if ours:
                raise
            print(f"  {way}: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
            continue
        grads = [x.grad[:2048]] + ([] if frozen else [weight.grad[:4096]])
        errors = [_error(g, e) for g, e in zip(grads, exact, strict=False)]
        right = abs(value - loss) < 1e-3 and max(errors) < 5e-3
        assert right or not ours, (title, way, value, loss, errors)
        runs[way], figures[way] = functools.partial(_backward, run, inputs), (peak, errors)
    times = _in_turns_ms(runs)
    limit = times.pop("the bare products")
    print(f"{title}: the bare products take {limit:.2f} ms", flush=True)
    for way, time_ms in times.items():
        peak, errors = figures[way]
        ratios = f"{time_ms / times['ours']:.2f}x ours, {time_ms / limit:.2f}x the products"
        words = ", ".join(f"d{k} {e:.1e}" for k, e in zip("XW", errors, strict=False))
        print(f"  {way}: {time_ms:.2f} ms ({ratios}), {peak:.0f} MiB beyond, error {words}")
        record = {"ms": time_ms, "mib": peak, "limit_ms": limit, "errors": errors}
        results[f"{title}, {way}"] = record
    return {f"{key}_ms": times["ours"], f"{key}_vs_products": limit / times["ours"]}


def _bench_shape(name, results) -> dict:
    head = _bench_weight(name, False, results) | _bench_weight(name, True, results)
    return head if name == "challenge" else {}


def _bench_grpo(results) -> dict:
    n, d, v = _shape("llama-1b")
    x, weight, labels = _random(n, d, v)
    x = x.detach().view(8, -1, d).requires_grad_()
    labels, mask = labels.view(8, -1), torch.ones(8, n // 8, device=x.device)
    old, advantages = torch.full_like(mask, -11.0), torch.randn(8, device=x.device)
    rest = labels, advantages, mask
    runs = {"ours": lambda: grpo_loss(x, weight, *rest, old_logprobs=old)}
    runs["all the logits"] = lambda: _naive_grpo((x @ weight.t()).float(), *rest, old)
    peaks = {name: _peak_mib(run, (x, weight)) for name, run in runs.items()}
    steps = {k: functools.partial(_backward, run, (x, weight)) for k, run in runs.items()}
    ours, naive = (step().item() for step in steps.values())
    assert abs(ours - naive) < 1e-3 + 1e-2 * abs(naive), (ours, naive)
    times = _in_turns_ms(steps)
    ratio = {k: f"{t / times['ours']:.2f}x" for k, t in times.items()}
    words = [f"{k} {t:.2f} ms ({ratio[k]}), {peaks[k]:.0f} MiB" for k, t in times.items()]
    title = f"GRPO, 8 completions of {n // 8} tokens, head {d}x{v}"
    print(f"{title} | {' | '.join(words)}", flush=True)
    results["GRPO"] = {"ms": times, "mib": peaks}
    return {"grpo_ms": times["ours"]}


# Of the sweep: D, tokens while the vocabulary changes, V while the tokens do, powers of 2 of both
SWEEP = 2048, 8192, 128256, range(13, 19), range(10, 16)  # D of Llama 1B
SMALL_SWEEP = 128, 256, 4096, range(10, 15), range(6, 11)  # on a CPU


def _bench_sweep(results) -> dict:
    """Memory and time by vocabulary and by tokens, for `plot`. torch.compile as it comes: it makes
    one program for all the later sizes, a few percent slower than one for each."""
    d, tokens, vocab, vocabs, lengths = SWEEP if _gpus() else SMALL_SWEEP
    torch._dynamo.reset()
    ways = {"ours": linear_cross_entropy} | _lean() | {"eager": _plain}
    ways["torch.compile"] = torch.compile(_plain)
    sizes = [("vocabulary", tokens, 2**k) for k in vocabs]
    sizes += [("tokens", 2**k, vocab) for k in lengths]
    results["sweep"] = records = []
    for axis, n, v in sizes:
        x, weight, labels = _random(n, d, v)
        runs, peaks, losses, inputs = {}, {}, {}, (x, weight)
        for way, function in ways.items():
            run = functools.partial(function, x, weight, labels)
            try:
                peaks[way], losses[way] = _peak_mib(run, inputs), _backward(run, inputs).item()
            except torch.OutOfMemoryError:
                print(f"  {way}: out of memory at {n}x{d}x{v}")
                continue
            runs[way] = functools.partial(_backward, run, inputs)
        assert max(losses.values()) - min(losses.values()) < 1e-2, (n, v, losses)
        times = _in_turns_ms(runs, turns=1 if _gpus() else 3)
        for way, time_ms in times.items():
            record = {"by": axis, "tokens": n, "hidden": d, "vocabulary": v, "way": way}
            records.append(record | {"ms": time_ms, "mib": peaks[way]})
        words = [f"{k} {t:.2f} ms, {peaks[k]:.0f} MiB" for k, t in times.items()]
        print(f"sweep {n}x{d}x{v} | {' | '.join(words)}", flush=True)
    return {}


TIMINGS = {name: functools.partial(_bench_shape, name) for name in SHAPES}
TIMINGS |= {"grpo": _bench_grpo, "sweep": _bench_sweep}
USUAL = "challenge", "grpo"


def bench(results, names) -> dict:
    """TIMINGS by name; each adds its records to results, headline figures are returned."""
    head = {}
    for name in (n for n in TIMINGS if n in names):
        head |= TIMINGS[name](results)
        gc.collect()
    return head


def plot(results, path):
    """The sweep as a PNG: memory and time, by vocabulary and by tokens."""
    from matplotlib.figure import Figure

    figure, records = Figure((10, 8), layout="constrained", dpi=150), results["sweep"]
    device = torch.cuda.get_device_name() if _gpus() else "CPU"
    dtype, hidden = "bf16" if _gpus() else "float32", records[0]["hidden"]
    figure.suptitle(f"Cross-entropy of a head and its backward, hidden {hidden}, {dtype}, {device}")
    panels = figure.subplots(2, 2, sharex="col")
    units = {"mib": "MiB beyond the gradients", "ms": "ms, forward and backward"}
    pairs = itertools.product(units, (("vocabulary", "tokens"), ("tokens", "vocabulary")))
    for axes, (unit, (by, other)) in zip(panels.flat, pairs, strict=True):
        chosen = [record for record in records if record["by"] == by]
        for way in dict.fromkeys(record["way"] for record in chosen):
            mine = [record for record in chosen if record["way"] == way]
            axes.plot([r[by] for r in mine], [r[unit] for r in mine], "o-", ms=4, label=way)
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", ylabel=units[unit], xlabel=by if unit == "ms" else "")
        axes.set_title(f"by {by}, {chosen[0][other]} {other.replace('lary', 'lary entries')}")
        axes.grid(alpha=0.3)
    panels[0, 0].legend()
    _write(path, lambda part: figure.savefig(part, format="png"))
    print(f"drawn: {path}")


# --------------------------------------------------------------------------------------------------


def _self_test(fuzz=None, seed=0) -> tuple[int, int]:
    """(exit code, tests passed) of this file; with fuzz of its random tests, as many cases each."""
    import pytest

    passed, errors, stopped = [], [], []

    def count(report):
        if report.when == "call" and report.passed:
            passed.append(report)

    def interrupt(excinfo):  # -x stops pytest-xdist by a KeyboardInterrupt of its own kind
        stopped.append(excinfo.type is KeyboardInterrupt)

    keep = lambda call: errors.append(call.excinfo.value)
    sys.modules["chunked_ce"] = sys.modules[__name__]  # or pytest would import a second one
    quiet = ["-x", "-q", "-rs", "--no-header", "--no-fold-skipped", "-p", "no:cacheprovider"]
    quiet += ["-W", "ignore", "--show-capture=no"]
    quiet += ["-p", "no:logging"]  # listening, it has Dynamo write out every guard
    if fuzz:
        os.environ |= {"FUZZ_CASES": str(fuzz), "FUZZ_SEED": str(seed)}
        quiet += ["-k", "fuzz"]
    hooks = {"pytest_runtest_logreport": count, "pytest_exception_interact": keep}
    hooks["pytest_keyboard_interrupt"] = interrupt
    try:
        code = pytest.main([*quiet, __file__], [types.SimpleNamespace(**hooks)])
    finally:
        if any(stopped):  # whatever its plugins raise on their way out
            raise KeyboardInterrupt
    for error in errors:
        if isinstance(error, ImportError):  # a package is missing, which is no failed check
            raise error
    return int(code != 0), len(passed)


def _check_paths(*paths):
    """What is written last is looked at first: no folder has a file's name, and theirs are made."""
    for path in filter(None, paths):
        _need(not Path(path).is_dir(), "--plot, --json", f"the directory {path}", "a file")
        folder = Path(path).absolute().parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"{folder}: found {error.strerror}, need a folder to write to") from error


def _write(path, save):
    """save(a temporary path), which then gets its name: no half of a file ever has it."""
    part = Path(f"{path}.part")
    try:
        save(part)
        part.replace(path)
    except OSError as error:
        found = error.strerror or error
        raise OSError(f"{path}: found {found}, need room and leave to write") from error
    finally:
        part.unlink(missing_ok=True)


def _no_memory(error) -> str:
    """What PyTorch, a library of CUDA's or Triton says that found no memory; "" of other errors."""
    line = " ".join(str(error).split())
    said = re.search("out of memory|ALLOC_FAILED|DefaultCPUAllocator", line)
    kinds = torch.OutOfMemoryError, MemoryError
    if isinstance(error, kinds) or isinstance(error, RuntimeError) and said:
        return line.split(" Search for")[0][:120] or "in Python"
    return ""


def _explain(error) -> tuple[int, str]:
    """(exit code, one line) for what ended a run; "" if it was not foreseen."""
    line = " ".join(str(error).split())[:400]
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, AssertionError):
        return 1, f"a check failed: {line}"
    if found := _no_memory(error):
        return 1, f"out of memory: {found}, need more free or fewer of --only"
    if isinstance(error, ModuleNotFoundError):
        return 77, f"found no {error.name}, need it installed, see requirements.txt"
    if isinstance(error, ImportError):
        return 77, line
    if isinstance(error, (ValueError, TypeError, OSError)):
        return 2, line
    return 1, ""


def _parser():
    first, usage = __doc__.split("\n")[0], __doc__[__doc__.index("    python ") :]
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=first, epilog=usage, formatter_class=style)
    option, names, usual = parser.add_argument, ", ".join(TIMINGS), ", ".join(USUAL)
    option("--test", action="store_true", help="the self-test alone")
    option("--bench", action="store_true", help="the timings alone")
    option("--fuzz", type=int, metavar="N", help="the random tests alone, with N cases each")
    option("--only", metavar="NAMES", help=f"of {names} (default: {usual})")
    option("--seed", type=int, default=0, help="of timings and --fuzz (default: 0)")
    option("--plot", metavar="PATH", help="the sweep as PNG (needs matplotlib)")
    option("--json", metavar="PATH", help="also write the results as JSON")
    return parser


def main(argv=None) -> int:
    parser = _parser()
    args, gpu = parser.parse_args(argv), _gpus() > 0
    tests = args.test or args.fuzz is not None or not args.bench
    times = args.bench or not (args.test or args.fuzz is not None)
    if not times and (args.plot or args.only):
        parser.error("--plot and --only are for the timings")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = {"torch": torch.__version__.split("+")[0], "triton": triton.__version__}
    versions |= {"cuda": torch.version.cuda, "seed": args.seed}
    print("chunked_ce", device, *(f"{k} {v}" for k, v in versions.items()), sep=" | ", flush=True)
    if device != "CPU" and not gpu:
        print(f"chunked_ce: found {device}, need compute capability 7.5: everything on the CPU")
    results, head, code, checks = {}, {}, 0, 0
    try:
        names = args.only.split(",") if args.only else [*USUAL]
        for name in names:
            _need(name in TIMINGS, "--only", name, f"of {', '.join(TIMINGS)}")
        _need_number("--seed", args.seed, 0, 2**63 - 1)
        _need(args.fuzz is None or args.fuzz > 0, "--fuzz", args.fuzz, "1 or more")
        _check_paths(args.plot, args.json)  # what is written last is looked at first
        if args.plot:
            import matplotlib  # noqa: F401

            names.append("sweep")
        torch.manual_seed(args.seed)
        if tests:
            code, checks = _self_test(args.fuzz, args.seed)
        if times and not code:
            torch.manual_seed(args.seed)
            head = bench(results, names)
            if args.plot:
                plot(results, args.plot)
        if args.json:
            text = json.dumps({"device": device, **versions, **results, **head}, indent=1)
            _write(args.json, lambda part: part.write_text(text))
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 (a traceback if unforeseen)
        code, words = _explain(error)
        print(f"chunked_ce: {words}" if words else traceback.format_exc(), file=sys.stderr)
    figures = " ".join(f"{k}={v:.2f}" + ("" if k.endswith("ms") else "x") for k, v in head.items())
    print(f"RESULT chunked_ce {'FAIL' if code else 'PASS'} checks={checks} {figures}".rstrip())
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, INTERRUPT)
    sys.exit(main())
