"""A linear layer and any loss on its outputs, without ever holding the logits.

Problem: the logits of a language model's head are its largest tensor. Batch 4 x 4096, hidden 4096,
vocabulary 128K: 4 GiB in bf16, 8 GiB as the float32 a loss needs, several of them in the backward.

Idea: take the tokens in chunks, and write a chunk's gradient over its logits while they are there.
- One loop over chunks: the products, a step that turns them into their gradient, dX and dW.
- `memory_efficient_linear`: the step lets autograd through any function of the float32 logits. A
  scalar's gradients are taken in the forward pass and multiplied by the upstream gradient in the
  backward; per-token values are computed again there, where each token's own is known.
- `linear_cross_entropy`, `linear_logprobs`, `grpo_loss`: the step is a Triton kernel, a program a
  row: its statistics, and the gradient over the logits. For a scalar cross-entropy both at once,
  the second reading of the row from the L2 cache.
- Logits are in the inputs' dtype in memory, float32 in registers. dW is summed in float32.
- `chunk` says how many tokens' logits there is room for. The kernel's losses then need no float32
  sum of a 16-bit dW either: a second pass recomputes all tokens' logits for some words at a time,
  and writes those rows of dW once, a fourth product. Until then dW's memory holds the first pass's
  logits.

Left out: dropping ignored tokens before the products (their number would have to come to the host),
matmul kernels of our own (cuBLAS is within a few percent of the chip), tensor parallelism.
Run on an H200 (torch 2.11, triton 3.6) and on CPUs (torch 2.13; plain PyTorch there). Not run on a
T4, for which the kernel compiles without spills.

    python chunked_ce.py            self-test, then timings (--test or --bench: one of them)

    from chunked_ce import linear_cross_entropy, memory_efficient_linear, patch_causal_lm
    loss = linear_cross_entropy(hidden, lm_head.weight, labels)      # labels already shifted
    loss = memory_efficient_linear(hidden, lm_head.weight, my_loss, targets)  # my_loss(logits, t)
    patch_causal_lm(model)          # then train as before
"""

import argparse
import contextlib
import functools
import inspect
import itertools
import json
import math
import os
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the self-test then runs the kernel on CPU tensors
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction
from triton.testing import do_bench

IGNORE = -100
DTYPES = torch.float32, torch.bfloat16, torch.float16
LOG2E = tl.constexpr(math.log2(math.e))
# Tokens at a time where no `chunk` is given:
TRAINED = 4096  # W is trained: the product hides the reading and writing of dW's float32 sum
LEAN = 2048  # W is trained, and dW summed in 16 bits
FROZEN = 832  # W is frozen. 1024 were 1 to 2% faster on an H200, but 257 MiB for 128K words
FUNCTION = 832  # a user's function is called for so many, and makes float32 copies of their logits
CPU = 256  # the tensors are on a CPU, which makes float32 copies too


def _error(name, found, need) -> ValueError:
    """One line: what was found, what is needed."""
    if isinstance(found, Tensor):
        found = f"a {found.dtype} tensor of shape {list(found.shape)} on {found.device}"
    elif not isinstance(found, str):
        found = " ".join(f"{type(found).__name__} {found!r}".split())[:100]
    return ValueError(f"{name}: found {found}, need {need}")


class _Options(NamedTuple):
    """What an operator's schema can hold. logit = scale * (product + bias), or with a cap
    cap * tanh(scale * (product + bias) / cap)."""

    scale: float
    cap: float  # 0: none
    smooth: bool  # whether the mean log-probability over the vocabulary is needed
    chunk: int  # tokens; 0: none given
    lean: bool  # whether dW is summed in its own dtype
    needs: Sequence[bool]  # gradients of x, weight, bias, and a user's tensors


# ---- The definition in plain PyTorch, for CPU tensors and a user's function


def logits_reference(products, bias, scale, cap) -> Tensor:
    """The float32 logits [n, V] of products of any dtype, in new memory; differentiable."""
    logits = products.to(torch.float32, copy=True)
    if bias is not None:
        logits = logits + bias.float()
    if scale != 1.0:
        logits = logits * scale
    return cap * torch.tanh(logits / cap) if cap else logits


def rows_reference(products, bias, labels, stats, coefs, options, write_stats, first=0):
    """Fills stats [4, n] if write_stats, and given coefs [4, n] overwrites the products by their
    gradient. Products [n, columns] are those with the words from `first` on.

    Stats, float32, 0 for ignored tokens: the largest logit (top); logsumexp of the logits less that
    (log_sum); the label's log-probability; the mean log-probability. The gradient by the logits:
    (coefs[0] + coefs[3] * logsumexp) * softmax + coefs[1] * onehot(label) + coefs[2]. The kernel
    leaves the mean and coefs[2] out unless options.smooth.
    """
    live, column = labels != IGNORE, labels.long() - first
    logits = logits_reference(products, bias, options.scale, options.cap)
    here = live & (column >= 0) & (column < logits.shape[1])
    column = torch.where(here, column, 0)[:, None]
    if write_stats:
        top = logits.amax(1)
        shifted = logits - top[:, None]
        log_sum = shifted.logsumexp(1)
        logp = shifted.gather(1, column)[:, 0] - log_sum
        found = torch.stack([top, log_sum, logp, shifted.mean(1) - log_sum])
        stats.copy_(torch.where(live, found, 0))
    if coefs is not None:
        top, log_sum, _, _ = stats[:, :, None]
        c_softmax, c_label, c_all, c_square = coefs[:, :, None]
        c_softmax = c_softmax + c_square * (top + log_sum)
        grad = c_softmax * torch.exp(logits - top - log_sum) + c_all
        grad.scatter_add_(1, column, torch.where(here[:, None], c_label, 0))
        if options.cap:
            grad *= 1 - (logits / options.cap) ** 2
        products.copy_(torch.where(live[:, None], grad * options.scale, 0))


# ---- One kernel for a row: its softmax, and the gradient written over the logits


# fmt: off
@triton.jit
def _load_logits(products_ptr, bias_ptr, at, limit, cols, scale, cap, EVICT: tl.constexpr,
                 BIAS: tl.constexpr, CAP: tl.constexpr):
    """Logits of the columns `at` below limit; what is not below cols is the caller's to mask."""
    logits = tl.load(products_ptr + at, mask=at < limit, other=0.0, eviction_policy=EVICT)
    logits = logits.to(tl.float32)
    if BIAS:
        logits += tl.load(bias_ptr + at, mask=at < cols, other=0.0).to(tl.float32)
    logits *= scale
    if CAP:  # tanh(v) = 2 / (1 + exp(-2v)) - 1
        logits = cap * (2.0 / (1.0 + tl.exp(logits * (-2.0 / cap))) - 1.0)
    return logits


@triton.jit
def _row_kernel(products_ptr, bias_ptr, labels_ptr, stats_ptr, coefs_ptr,
                stride, stats_stride, coefs_stride, cols, first, scale, cap,
                IGNORE: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, STATS: tl.constexpr,
                GRADS: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr):
    # rows_reference, a program per row. STATS writes its statistics, GRADS the gradient over the
    # products, whose rows have `stride` columns in memory.
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    live = label != IGNORE
    if STATS:  # whole rows
        tl.device_assert((label == IGNORE) | ((label >= 0) & (label < cols)),
                         "label outside the vocabulary (and not ignore_index)")
    label = (label - first).to(tl.int32)
    here = live & (label >= 0) & (label < cols)
    products_ptr += row * stride
    stats_ptr += row
    coefs_ptr += row
    end = tl.where(live, cols, 0)  # of an ignored row no column is read
    # A block's columns. A thread has 8 neighbours, 16 bytes of bf16, and adds them by itself
    cols8 = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    if STATS:
        best = tl.full([BLOCK // 8], -1e30, tl.float32)
        total = tl.full([BLOCK // 8], 0.0, tl.float32)
        distance = tl.full([BLOCK // 8], 0.0, tl.float32)
        picked = _load_logits(products_ptr, bias_ptr, tl.where(here, label, 0), end, cols, scale,
                              cap, "", BIAS, CAP)
        # The mean is summed as distance from a logit: a common offset then costs no digits
        origin = tl.where(picked == -float("inf"), 0.0, picked)
        for start in range(0, end, BLOCK):
            logits = _load_logits(products_ptr, bias_ptr, start + cols8, stride, cols, scale, cap,
                                  "", BIAS, CAP)
            if SMOOTH:
                distance += tl.sum(tl.where(start + cols8 < cols, logits - origin, 0.0), axis=1)
            if start + BLOCK > cols:
                logits = tl.where(start + cols8 < cols, logits, -float("inf"))
            new = tl.maximum(best, tl.max(logits, axis=1))
            p = tl.exp2((logits - new[:, None]) * LOG2E)
            total = total * tl.exp2((best - new) * LOG2E) + tl.sum(p, axis=1)
            best = new
        top = tl.max(best)
        log_sum = tl.log(tl.where(live, tl.sum(total * tl.exp2((best - top) * LOG2E)), 1.0))
        tl.store(stats_ptr, tl.where(live, top, 0.0))
        tl.store(stats_ptr + stats_stride, tl.where(live, log_sum, 0.0))
        tl.store(stats_ptr + 2 * stats_stride, tl.where(live, picked - top - log_sum, 0.0))
        if SMOOTH:
            mean = tl.sum(distance) / cols + (origin - top) - log_sum
            tl.store(stats_ptr + 3 * stats_stride, tl.where(live, mean, 0.0))
    else:
        top = tl.load(stats_ptr)
        log_sum = tl.load(stats_ptr + stats_stride)
    if GRADS:
        c_softmax = tl.load(coefs_ptr) + tl.load(coefs_ptr + 3 * coefs_stride) * (top + log_sum)
        c_softmax *= scale
        c_label = tl.where(here, tl.load(coefs_ptr + coefs_stride) * scale, 0.0)
        c_all = tl.load(coefs_ptr + 2 * coefs_stride) * scale
        log2_sum = log_sum * LOG2E
        for start in range(0, end, BLOCK):
            logits = _load_logits(products_ptr, bias_ptr, start + cols8, stride, cols, scale, cap,
                                  "evict_first", BIAS, CAP)
            grad = tl.exp2((logits - top) * LOG2E - log2_sum) * c_softmax
            if SMOOTH:
                grad += c_all
            if (label >= start) & (label < start + BLOCK):
                grad += tl.where(cols8 == label - start, c_label, 0.0)
            if CAP:
                grad *= 1.0 - (logits * (1.0 / cap)) * (logits * (1.0 / cap))
            tl.store(products_ptr + start + cols8, grad.to(products_ptr.dtype.element_ty),
                     mask=start + cols8 < stride, eviction_policy="evict_first")
        for start in range(end, cols, BLOCK):  # of an ignored row, whose end is 0
            zeros = tl.full([BLOCK // 8, 8], 0.0, products_ptr.dtype.element_ty)
            tl.store(products_ptr + start + cols8, zeros, mask=start + cols8 < stride)


@triton.jit
def _scale_kernel(tensor_ptr, factor_ptr, numel, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    end = tl.where(factor == 1.0, 0, numel)  # an upstream gradient of 1 costs no pass over dW
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, end, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(tensor_ptr + at, mask=at < numel).to(tl.float32) * factor
        tl.store(tensor_ptr + at, value.to(tensor_ptr.dtype.element_ty), mask=at < numel)
# fmt: on


def _run_rows(products, bias, labels, stats, coefs, options, write_stats, first=0):
    """rows_reference, by the kernel where there is a GPU or Triton's interpreter."""
    if not (products.is_cuda or isinstance(_row_kernel, InterpretedFunction)):
        rows_reference(products, bias, labels, stats, coefs, options, write_stats, first)
    elif len(products):
        # As large as compiles without spilled registers for sm_75 to sm_90
        max_block, of_a_warp = (16384, 512) if products.itemsize == 2 else (4096, 256)
        block = min(max_block, max(256, triton.next_power_of_2(products.shape[1])))
        flags = bias is not None, options.cap > 0, write_stats, coefs is not None, options.smooth
        # Where there is none, any pointer will do
        bias, coefs = (stats if t is None else t.contiguous() for t in (bias, coefs))
        sizes = products.stride(0), stats.stride(0), coefs.stride(0), products.shape[1], first
        arguments = products, bias, labels, stats, coefs, *sizes, options.scale, options.cap
        with torch.cuda.device_of(products):  # debug: for the label's assertion
            _row_kernel[(len(products),)](
                *arguments, IGNORE, *flags, block, num_warps=max(1, block // of_a_warp),
                debug=True, sanitize_overflow=False)  # fmt: skip


# ---- Products, and the loop over chunks of tokens


def _matmul(a, b, out, add=False):
    """out (+)= a @ b with float32 sums; out may be float32 where a and b are not."""
    if out.dtype != a.dtype and a.is_cuda:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, beta=int(add), out=out)
    else:  # a CPU has no such product
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=int(add), out=out)


def _plan(x, weight, need_w, chunk, lean=False):
    """(tokens at a time, dtype of dW's sum). All chunks have about as many tokens: one of a few
    would read all of W for them."""
    n, default = max(1, len(x)), FROZEN
    if need_w:
        default = LEAN if lean else TRAINED
    rows = min(n, chunk or (default if x.is_cuda else CPU))
    even = -(-n // -(-n // rows))
    rows = min(rows, -(-even // 8) * 8)
    own = (lean or rows == n) and weight.dtype == x.dtype
    return rows, weight.dtype if own else torch.float32


def _padded(columns, like) -> int:
    """Columns of a row in memory. On a GPU a multiple of 16: Triton and cuBLAS then load 16 bytes
    at once. None are added on a CPU: oneDNN's bf16 product for AMX reads past the end of a row and
    multiplies that with 0, which a NaN left there survives (its issue 5717)."""
    return -(-columns // 16) * 16 if like.is_cuda else columns


def _rows_in(memory, rows, columns):
    """[rows, columns] at the beginning of a tensor's memory."""
    wide = _padded(columns, memory)
    return memory.view(-1)[: rows * wide].view(rows, wide)[:, :columns]


def _for_chunks(x, weight, needs, rows, sum_dtype, step, memory=None):
    """The gradients of x, weight (summed in sum_dtype) and a bias (float32); None if not needed.

    step(products, i, j) gets the products of the tokens i to j and writes their gradient over them;
    it returns whether it did. memory: for the products, if there is enough of it.
    """
    n, v, (need_x, need_w, need_b) = len(x), len(weight), needs[:3]
    w = weight.to(x.dtype)
    dx = dw = db = None
    if memory is None or memory.numel() < rows * _padded(v, x):
        memory = torch.empty(rows * _padded(v, x), dtype=x.dtype, device=x.device)
    for i in range(0, max(n, 1), rows):  # of no tokens one chunk: gradients of 0
        j = min(n, i + rows)
        products = _rows_in(memory, j - i, v)  # [rows, V]
        _matmul(x[i:j], w.t(), products)
        if not step(products, i, j):
            continue
        if need_x:
            dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if i == 0 else dx
            _matmul(products, w, dx[i:j])
        if need_w:
            dw = torch.empty(weight.shape, dtype=sum_dtype, device=x.device) if i == 0 else dw
            _matmul(products.t(), x[i:j], dw, i > 0)
        if need_b:
            found = products.sum(0, dtype=torch.float32)
            db = found if db is None else db + found
    del memory, products  # before dW's copy
    return dx, None if dw is None else dw.to(weight.dtype), db


def _run(x, weight, bias, labels, stats, coefs, options, row_loss=None):
    """(statistics [4, n], dX, dW, db) as in rows_reference; None what is given or not needed.

    stats None: they are computed. coefs None: no gradients. row_loss(log-probabilities, i, j): the
    gradient by those, of the tokens i to j, instead of coefs.
    """
    if torch.compiler.is_compiling():
        stats, *grads = _rows_operator(x, weight, bias, labels, stats, coefs, *options)
        return stats, *(g if need else None for need, g in zip(options.needs, grads, strict=True))
    if not labels.is_cuda:  # a GPU checks in the kernel
        bad = labels[((labels < 0) | (labels >= len(weight))) & (labels != IGNORE)]
        if len(bad):
            raise _error("labels", str(bad[0].item()), f"0 to {len(weight) - 1}, or ignore_index")
    n, (need_x, need_w, need_b) = len(x), options.needs
    rows, sum_dtype = _plan(x, weight, need_w, options.chunk, options.lean)
    known = stats is not None
    stats = stats if known else torch.zeros(4, n, device=x.device)
    second_pass = need_w and options.chunk > 0 and weight.dtype == x.dtype != sum_dtype
    dw = None
    if second_pass:
        columns = max(1, rows * len(weight) // n)
        columns -= columns % min(columns, 128)  # round numbers: products of others are slow
        dw = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
        if x.is_cuda:  # the first pass's logits are there, so that chunk does not limit them
            rows = max(rows, min(n, TRAINED, dw.numel() // _padded(len(weight), x)))

    def step(products, i, j):
        chunk = products, bias, labels[i:j], stats[:, i:j]
        if row_loss is not None:
            _run_rows(*chunk, None, options, True)
            coefs[1, i:j] = row_loss(stats[2, i:j], i, j)
            coefs[0, i:j] = -coefs[1, i:j]
        of_chunk = None if coefs is None else coefs[:, i:j]
        _run_rows(*chunk, of_chunk, options, write_stats=not known and row_loss is None)
        return coefs is not None

    needs = need_x, need_w and not second_pass, need_b
    dx, dw_of_one, db = _for_chunks(x, weight, needs, rows, sum_dtype, step, memory=dw)
    if second_pass:  # a product over all tokens gives rows of dW
        memory = torch.empty(n * _padded(columns, x), dtype=x.dtype, device=x.device)
        for a in range(0, len(weight), columns):
            b = min(len(weight), a + columns)
            products = _rows_in(memory, n, b - a)  # [n, columns]
            _matmul(x, weight[a:b].t(), products)
            _run_rows(products, _part(bias, a, b), labels, stats, coefs, options, False, first=a)
            _matmul(products.t(), x, dw[a:b])
    return None if known else stats, dx, dw if second_pass else dw_of_one, db


def _part(a, i, j):
    """The chunk of a tensor; None, numbers and 0-d tensors as they are."""
    return a[i:j] if isinstance(a, Tensor) and a.ndim else a


@torch.library.custom_op("chunked_ce::rows", mutates_args=(), schema=(
    "(Tensor x, Tensor weight, Tensor? bias, Tensor labels, Tensor? stats, Tensor? coefs,"
    " float scale, float cap, bool smooth, int chunk, bool lean, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)"))  # fmt: skip
def _rows_operator(x, weight, bias, labels, stats, coefs, *options):
    """_run as an operator: torch.compile takes it whole, in one graph for all lengths."""
    found = _run(x, weight, bias, labels, stats, coefs, _Options(*options))
    return tuple(x.new_empty(0) if t is None else t for t in found)


@_rows_operator.register_fake
def _(x, weight, bias, labels, stats, coefs, *options):
    shapes = (4, x.shape[0]), x.shape, weight.shape, weight.shape[:1]
    dtypes = torch.float32, x.dtype, weight.dtype, torch.float32
    each = zip(shapes, dtypes, [stats is None, *_Options(*options).needs], strict=True)
    return tuple(x.new_empty(shape, dtype=t) if want else x.new_empty(0) for shape, t, want in each)


# ---- Autograd


class _Chunked(torch.autograd.Function):
    """The forward pass: compute(None, *inputs) -> (value, early, kept). If early, a scalar's
    gradients are kept, which the backward pass multiplies by the upstream gradient. Otherwise the
    backward pass, where each token's own is known, calls compute(upstream, *inputs, *kept) ->
    gradients.
    """

    @staticmethod
    def forward(ctx, compute, *inputs):
        value, ctx.early, kept = compute(None, *inputs)
        ctx.compute, ctx.count, ctx.spent = compute, len(inputs), False
        ctx.save_for_backward(*inputs, *kept)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        inputs, kept = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        if not ctx.early:
            grads = ctx.compute(upstream, *inputs, *kept)
        else:
            if ctx.spent:  # a second backward pass of one graph: the first multiplied in place
                kept = ctx.compute(None, *inputs)[2]
            if not torch.compiler.is_compiling():
                ctx.spent = True
            grads = [g if g is None else _multiply(g, upstream) for g in kept]
        pairs = zip(grads, inputs, strict=True)
        return None, *(g if g is None else g.to(t.dtype) for g, t in pairs)


def _multiply(gradient, factor):
    """gradient * factor, in its own memory: dW may be gigabytes."""
    if torch.compiler.is_compiling():
        return (gradient.float() * factor).to(gradient.dtype)
    if not gradient.is_cuda or gradient.dtype == torch.float64:  # of a user's tensor
        return gradient.data.mul_(factor.to(gradient.device))  # .data: `spent` knows of it
    with torch.cuda.device_of(gradient):
        _scale_kernel[(4096,)](gradient.data, factor, gradient.numel(), 4096)
    return gradient


def _statistics(options, upstream, x, weight, bias, labels, stats=None):
    """The statistics of rows_reference, whose gradients are computed in the backward pass."""
    if upstream is None:
        forward = options._replace(needs=[False] * 3)
        stats = _run(x, weight, bias, labels, None, None, forward)[0]
        return stats.clone(), False, [stats]
    by_lse, _, by_logp, by_mean = upstream  # of top and log_sum callers use the sum alone
    c_softmax, c_all = by_lse - by_logp - by_mean, by_mean / len(weight)
    coefs = torch.stack([c_softmax, by_logp, c_all, torch.zeros_like(by_lse)])
    return [*_run(x, weight, bias, labels, stats, coefs, options)[1:], None]


def _token_losses(stats, smoothing, z_loss):
    """Cross-entropy of each token from its statistics; no 0 * -inf where a bias masks words."""
    top, log_sum, logp, mean = stats
    loss = (smoothing - 1) * logp + z_loss * (top + log_sum) ** 2
    return loss - smoothing * mean if smoothing else loss


def _cross_entropy(options, smoothing, z_loss, _, x, weight, bias, labels, weights):
    """sum(weights * _token_losses), with its gradients. d logp / d logits = onehot - softmax and
    d mean / d logits = 1 / V - softmax: softmax has a factor of (1 - smoothing) + smoothing."""
    factors = 1, smoothing - 1, -smoothing / len(weight), 2 * z_loss
    coefs = torch.stack([weights * factor for factor in factors])
    stats, *grads = _run(x, weight, bias, labels, None, coefs, options)
    loss = (_token_losses(stats, smoothing, z_loss) * weights).sum()
    return loss, True, [*grads, None, None]


def _policy(token_loss, options, _, x, weight, bias, labels, weights, *terms):
    """sum(weights * token_loss(log-probabilities, *terms)), with its gradients: by
    log-probability from autograd, by logit from the kernel."""

    def row_loss(logp, i, j):
        with torch.enable_grad():
            logp = logp.detach().requires_grad_()
            losses = token_loss(logp, *(_part(t, i, j) for t in terms)) * weights[i:j]
            return torch.autograd.grad(losses.sum(), logp)[0]

    coefs = torch.zeros(4, len(x), device=x.device)
    stats, *grads = _run(x, weight, bias, labels, None, coefs, options, row_loss)
    loss = (token_loss(stats[2], *terms) * weights).sum()
    return loss, True, [*grads, *[None] * (2 + len(terms))]


# ---- Any function of the logits


def _logits_then(fn, products, bias, head, args):
    return fn(logits_reference(products, bias, *head), *args)


_compiled = functools.cache(lambda: torch.compile(_logits_then))


def _call_compiled(*arguments):
    """_logits_then, compiled: float32 logits are then in registers alone. There is a graph for each
    fn; what fn holds is not kept. Many are allowed, and then an error, not eager calls unsaid."""
    limits = dict.fromkeys(("recompile_limit", "accumulated_recompile_limit"), 1024)
    limits |= {"fail_on_recompile_limit_hit": True, "suppress_errors": False}
    with torch._dynamo.config.patch(**limits):
        return _compiled()(*arguments)


def _any_loss(call, args, places, options, upstream, x, weight, bias, *tensors):
    """call's values, or the sum of its scalars, over chunks of tokens; gradients by autograd.
    args[places] are `tensors`; options.needs go on with theirs."""
    needs, outs, grads_of_tensors = options.needs, [], []
    bias = None if bias is None else bias.detach()  # its gradient is the products'
    joined = lambda parts: torch.cat(parts) if parts[0].ndim else torch.stack(parts).sum()

    def is_due(out):
        # A scalar's gradients at once; those of values, and in fp16, in the backward pass, where
        # each value's upstream gradient, or a loss scale, is known
        late = out.ndim or x.dtype == torch.float16
        return any(needs) and (upstream is not None or not late)

    def step(products, i, j):
        for a in range(i, max(j, i + 1), options.chunk or FUNCTION):  # of no tokens once
            b = min(j, a + (options.chunk or FUNCTION))
            part, leaf = [*args], products[a - i : b - i].detach().requires_grad_(any(needs))
            for k, tensor, need in zip(places, tensors, needs[3:], strict=True):
                part[k] = _part(tensor, a, b).detach().requires_grad_(need)
            leaves = [leaf, *(part[k] for k in places if part[k].requires_grad)]
            out = call(leaf, bias, part)
            _check_result(out, b - a, outs)
            _check_graph(out, leaves)
            outs.append(out.detach())
            if not is_due(out):
                continue
            if not out.requires_grad:
                raise _error("fn's result", "it detached from the logits", "autograd through fn")
            seed = torch.ones_like(out) if upstream is None else _part(upstream, a, b).to(out.dtype)
            by_products, *by_tensors = torch.autograd.grad(
                out, leaves, seed, materialize_grads=True
            )
            leaf.data.copy_(by_products)
            grads_of_tensors.append(by_tensors)
        return is_due(out)

    plan = _plan(x, weight, needs[1], options.chunk)
    grads = _for_chunks(x, weight, needs, *plan, step)
    if not is_due(outs[0]):
        return joined(outs), False, []
    found = map(joined, zip(*grads_of_tensors, strict=True))
    grads = [*grads, *(next(found) if need else None for need in needs[3:])]
    return (joined(outs), True, grads) if upstream is None else grads


def _check_result(out, rows, outs):
    ok = isinstance(out, Tensor) and out.is_floating_point() and out.shape in ((), (rows,))
    if not ok or (outs and out.ndim != outs[0].ndim):
        need = f"floats, [{rows}] (a value per token) or [] (their sum), alike for all chunks"
        raise _error("fn's result", out, need)


def _check_graph(out, leaves):
    """fn's result must reach no tensor with a gradient that was not given to it."""
    given, todo, seen = {id(leaf) for leaf in leaves}, [out.grad_fn], {None}
    lost = out.requires_grad and out.is_leaf and id(out) not in given
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
            lost |= hasattr(node, "variable") and id(node.variable) not in given
    if lost:
        found = "a tensor that requires grad inside fn, whose gradient would be lost"
        raise _error("fn", found, "it handed over as a per-token argument")


# ---- Public functions


def _check_tensor(name, tensor, shape, device, dtypes=()):
    ok = isinstance(tensor, Tensor) and tensor.shape == shape and tensor.device == device
    if not ok or (dtypes and tensor.dtype not in dtypes):
        need = f"shape {list(shape)} on {device}, {' or '.join(map(str, dtypes)) or 'any dtype'}"
        raise _error(name, tensor, need)


def _check_number(name, value, low, high=math.inf, kinds=(int, float)):
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        number = "an integer" if kinds is int else "a number"
        raise _error(name, value, f"{number} from {low} to {high}")


def _needs(tensors):
    return [t is not None and t.requires_grad and torch.is_grad_enabled() for t in tensors]


def _prepare(x, weight, bias, chunk, softcap, logit_scale, labels=..., ignore_index=IGNORE,
             temperature=1.0, smooth=False, lean=False):  # fmt: skip
    """Checks. ((x [n, D] in the dtype of the products, weight, bias, labels [n]), _Options). W is
    cast later, so that dW keeps W's own dtype."""
    kind = x.device.type if isinstance(x, Tensor) else "none"
    if kind not in ("cpu", "cuda") or x.ndim < 2 or x.dtype not in DTYPES:
        raise _error("x", x, "[..., D] in float32, bfloat16 or float16 on cpu or cuda")
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
    vocab = len(weight) if isinstance(weight, Tensor) and weight.ndim and weight.numel() else 1
    dtypes = DTYPES if autocast else (dtype,)
    _check_tensor("weight", weight, (vocab, x.shape[-1]), x.device, dtypes)
    if bias is not None:
        _check_tensor("bias", bias, (vocab,), x.device, DTYPES)
    if chunk is not None:
        _check_number("chunk", chunk, 1, kinds=int)
    if labels is not ...:  # but for a user's function, which may have none
        _check_tensor("labels", labels, x.shape[:-1], x.device, (torch.int64, torch.int32))
        labels = labels.reshape(-1).contiguous()
        if ignore_index != IGNORE:
            others = labels.where(labels != IGNORE, -1)  # no label, as any that is negative
            labels = torch.where(labels == ignore_index, IGNORE, others)
    _check_number("logit_scale", logit_scale, 1e-9)
    _check_number("temperature", temperature, 1e-9)
    if softcap is not None:
        _check_number("softcap", softcap, 1e-9, 1e4)  # tanh is exact to 6e-8: times that
    head = logit_scale / temperature, (softcap or 0.0) / temperature
    options = _Options(*head, smooth, chunk or 0, lean, _needs((x, weight, bias)))
    return (x.reshape(-1, x.shape[-1]).to(dtype), weight, bias, labels), options


@torch.compiler.disable
def memory_efficient_linear(
    x: Tensor, weight: Tensor, fn: Callable[..., Tensor], *per_token, bias: Tensor | None = None,
    softcap: float | None = None, logit_scale: float = 1.0, chunk: int | None = None,
    compile: bool = False,
) -> Tensor:  # fmt: skip
    """fn(logits of x @ weight.T + bias, *per_token), without the logits of more than a chunk.

    x [..., D], weight [V, D] and bias [V] in float32, bfloat16 or float16 (or cast by autocast).
    fn gets float32 logits [n, V], softcap * tanh(logit_scale * (product + bias) / softcap) with
    those options, and the same n entries of each per-token argument: a tensor with x's leading
    shape, a 0-d tensor or anything else (passed as it is). It returns a sum [] (or any scalar to be
    summed over chunks) or a value for each token [n], and may be any differentiable function,
    called several times. Divide a mean by the tokens of all chunks, not of the chunk.

    Gradients: x, weight, bias and those per-token arguments that require them; nothing is computed
    for the others. A scalar's are taken in the forward pass (in fp16 in the backward, where a loss
    scale is known), values' in the backward by calling fn again: it must repeat itself (no
    dropout). compile=True hands fn, with the upcast before it, to torch.compile. Inside a caller's
    torch.compile this is a graph break.
    chunk: tokens at a time; by default TRAINED or FROZEN for the products, FUNCTION for fn. Memory
    beyond the gradients: their logits in x's dtype and what fn takes for its float32 ones; W
    trained in 16 bits in several chunks: dW's float32 sum, 4 * V * D bytes; in autocast W's 16-bit
    copy.
    Raises ValueError or TypeError on input that does not fit, and where fn detaches its result or
    uses tensors that require grad and are not arguments of it.
    """
    (flat, *_), options = _prepare(x, weight, bias, chunk, softcap, logit_scale)
    if not callable(fn):
        raise TypeError(str(_error("fn", fn, "a function of logits")))
    args, places = [*per_token], [k for k, a in enumerate(per_token) if isinstance(a, Tensor)]
    for k in places:
        if args[k].ndim:
            rest = args[k].shape[x.ndim - 1 :]
            _check_tensor(f"per-token argument {k}", args[k], (*x.shape[:-1], *rest), x.device)
            args[k] = args[k].reshape(-1, *rest)
    tensors = [args[k] for k in places]  # autograd saves them, and sees if they change
    options = options._replace(needs=[*options.needs, *_needs(tensors)])
    kind, grad_mode, head = x.device.type, torch.is_grad_enabled(), (options.scale, options.cap)
    autocast = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}

    def call(products, bias, args):  # with the modes of now, in the backward pass too
        with torch.set_grad_enabled(grad_mode), torch.autocast(kind, **autocast):
            return (_call_compiled if compile else _logits_then)(fn, products, bias, head, args)

    compute = functools.partial(_any_loss, call, args, places, options)
    out = _Chunked.apply(compute, flat, weight, bias, *tensors)
    return out.reshape(x.shape[:-1]) if out.ndim else out


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None,
    ignore_index: int = IGNORE, reduction: str = "mean", label_smoothing: float = 0.0,
    softcap: float | None = None, logit_scale: float = 1.0, z_loss: float = 0.0,
    num_items: Tensor | float | None = None, chunk: int | None = None,
    accum_dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """F.cross_entropy of the logits x @ weight.T + bias, float32 [] or, for "none", [...].

    x, weight, bias, softcap and logit_scale as memory_efficient_linear's; labels [...] int64 or
    int32, already shifted. A token's loss: smoothed cross-entropy + z_loss * logsumexp**2.
    reduction "mean" divides the sum by the number of labels that are not ignore_index (none: loss
    and gradients 0); num_items, a number or a tensor, divides it instead, as transformers does.

    Memory beyond the gradients: the logits of `chunk` tokens in x's dtype, whatever is trained;
    with it a 16-bit W costs one more product. Without chunk the fastest: W frozen FROZEN tokens;
    trained TRAINED and dW's float32 sum, 4 * V * D bytes (accum_dtype=torch.bfloat16: LEAN, dW
    summed in its own memory). In all 60 bytes a token, in autocast W's 16-bit copy, on a CPU
    float32 copies.
    Raises ValueError on input that does not fit; labels out of range on a GPU end in a device
    assertion that says so, as checking earlier would wait for the GPU.
    """
    if reduction not in ("mean", "sum", "none") or (reduction == "none" and num_items is not None):
        raise _error("reduction", reduction, "mean, sum, or none without num_items")
    _check_number("label_smoothing", label_smoothing, 0, 1)
    _check_number("z_loss", z_loss, 0)
    given = x, weight, bias, chunk, softcap, logit_scale, labels, ignore_index
    lean = accum_dtype != torch.float32
    tensors, options = _prepare(*given, smooth=label_smoothing > 0, lean=lean)
    if lean and accum_dtype != weight.dtype:
        raise _error("accum_dtype", accum_dtype, f"float32 or {weight.dtype}")
    weights, divisor = (tensors[3] != IGNORE).float(), 1
    if num_items is not None:
        divisor = _divisor(num_items, x)
    elif reduction == "mean":
        divisor = weights.sum().clamp(min=1)
    # Without a loss scale, which the upstream gradient has, a float16 dW overflows or underflows
    fp16 = options.needs[1] and weight.dtype == torch.float16
    if reduction == "none" or fp16 or not any(options.needs):
        stats = _Chunked.apply(functools.partial(_statistics, options), *tensors)
        losses = _token_losses(stats, label_smoothing, z_loss) * weights
        return losses.view(labels.shape) if reduction == "none" else losses.sum() / divisor
    compute = functools.partial(_cross_entropy, options, float(label_smoothing), float(z_loss))
    if tensors[0].dtype == torch.float16:  # a dX of 1/tokens underflows, one of 32 does neither
        return _Chunked.apply(compute, *tensors, weights * 32) / (divisor * 32)
    return _Chunked.apply(compute, *tensors, weights / divisor)


def _divisor(num_items, x):
    """0 items, a batch without labels, divide nothing."""
    if isinstance(num_items, Tensor):
        num_items = num_items.reshape(()).to(x.device)
        return num_items + (num_items == 0)
    _check_number("num_items", num_items, 0)
    return num_items or 1


def linear_logsumexp(
    x: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None,
    ignore_index: int = IGNORE, softcap: float | None = None, logit_scale: float = 1.0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(logsumexp of a token's logits, its label's logit), float32 [...], both differentiable; 0
    where ignored. Arguments, memory and errors as linear_cross_entropy's."""
    tensors, options = _prepare(x, weight, bias, chunk, softcap, logit_scale, labels, ignore_index)
    top, log_sum, logp, _ = _Chunked.apply(functools.partial(_statistics, options), *tensors)
    lse = (top + log_sum).view(labels.shape)
    return lse, logp.view(labels.shape) + lse


def linear_logprobs(
    x: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None,
    temperature: float = 1.0, softcap: float | None = None, logit_scale: float = 1.0,
    chunk: int | None = None, ignore_index: int = IGNORE,
) -> Tensor:  # fmt: skip
    """log softmax(logits / temperature)[label] of each token, float32 [...]; 0 where ignored.
    Arguments, memory and errors as linear_cross_entropy's."""
    given = x, weight, bias, chunk, softcap, logit_scale, labels, ignore_index, temperature
    tensors, options = _prepare(*given)
    stats = _Chunked.apply(functools.partial(_statistics, options), *tensors)
    return stats[2].view(labels.shape)


def grpo_loss(
    x: Tensor, weight: Tensor, labels: Tensor, advantages: Tensor, mask: Tensor, *,
    old_logprobs: Tensor | None = None, ref_logprobs: Tensor | None = None, beta: float = 0.0,
    epsilon: float = 0.2, epsilon_high: float | None = None, delta: float | None = None,
    loss_type: str = "grpo", importance_sampling_level: str = "token",
    use_bias_correction_kl: bool = False, importance_sampling_ratio: Tensor | None = None,
    sapo_temperature_pos: float = 1.0, sapo_temperature_neg: float = 1.05,
    max_completion_length: int | None = None, num_items: Tensor | float | None = None,
    bias: Tensor | None = None, temperature: float = 1.0, softcap: float | None = None,
    logit_scale: float = 1.0, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """GRPO's loss over completions, float32 []; names and formulas of TRL 1.16's GRPOTrainer.

    x [B, T, D] hidden states that predict labels [B, T], mask [B, T] (1 where a token counts; one
    labelled -100 does not), advantages [B] or [B, T], old_logprobs and ref_logprobs [B, T] (old
    None: on-policy, ratio 1; ref is needed for beta > 0). A token's loss is
    -min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A) + beta * KL with
    KL = exp(ref - logp) - (ref - logp) - 1, times the ratio with use_bias_correction_kl (TRL's own
    defaults are True, and loss_type "dapo"); delta clips the ratio from above as well.
    importance_sampling_ratio [B, T] or [B, 1], exp(old - the sampler's log-probabilities) clipped
    or masked, multiplies all but the KL. "cispo": -min(ratio, epsilon_high) * A * logp with a
    constant ratio; "sapo": a sigmoid of the ratio. The sum over tokens is divided by: the
    sequence's tokens, then a mean over B ("grpo", "sapo"); all tokens ("bnpo"); B *
    max_completion_length ("dr_grpo"); num_items ("dapo", "cispo"); B ("luspo"). Divide by
    accumulation steps yourself. Level "sequence" takes one ratio for a sequence (GSPO); that, fp16
    and torch.compile cost a fourth product. Raises ValueError on input that does not fit.
    """
    shape, ratio = x.shape[:-1], importance_sampling_ratio
    if x.ndim != 3:
        raise _error("x", x, "[B, T, D]")
    if importance_sampling_level not in ("token", "sequence"):
        raise _error("importance_sampling_level", importance_sampling_level, "token or sequence")
    _check_number("beta", beta, 0)
    _check_number("epsilon", epsilon, 0)
    _check_number("sapo_temperature_pos", sapo_temperature_pos, 1e-9)
    _check_number("sapo_temperature_neg", sapo_temperature_neg, 1e-9)
    if getattr(advantages, "shape", None) == shape[:1]:
        advantages = advantages[:, None].expand(shape)
    if ratio is not None and ratio.shape == (shape[0], 1):
        ratio = ratio.expand(shape)
    _check_tensor("labels", labels, shape, x.device)
    given = {"mask": mask, "advantages": advantages, "old_logprobs": old_logprobs,
             "ref_logprobs": ref_logprobs, "importance_sampling_ratio": ratio}  # fmt: skip
    for name, tensor in given.items():
        needed = name in ("mask", "advantages") or (beta and name == "ref_logprobs")
        if needed or tensor is not None:
            _check_tensor(name, tensor, shape, x.device)
    ids = labels.where(mask != 0, IGNORE)
    arguments = x, weight, bias, chunk, softcap, logit_scale, ids, IGNORE, temperature
    tensors, options = _prepare(*arguments)
    counts = ids != IGNORE  # of the others nothing is looked at: no -inf * 0
    clean = lambda t: t if t is None else torch.where(counts, t.detach().float(), 0)
    mask, advantages, old, ref, sampling = (clean(t) for t in given.values())
    terms = advantages, old, ref, sampling
    batch, length = len(x), mask.sum(1, keepdim=True).clamp(min=1)
    divisors = {"grpo": batch * length, "sapo": batch * length, "luspo": batch,
                "bnpo": mask.sum().clamp(min=1)}  # fmt: skip
    if loss_type == "dr_grpo":
        _check_number("max_completion_length", max_completion_length, 1)
        divisors[loss_type] = batch * max_completion_length
    if loss_type == "cispo":
        _check_number("epsilon_high", epsilon_high, 0)
    if loss_type in ("dapo", "cispo"):
        divisors[loss_type] = _divisor(num_items, x)
    if loss_type not in divisors:
        raise _error("loss_type", loss_type, f"{', '.join(divisors)}, dr_grpo, dapo or cispo")
    low, high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)

    def token_loss(logp, advantages, old, ref, sampling):
        log_ratio = logp - (logp.detach() if old is None else old)
        if importance_sampling_level == "sequence":  # then logp is [B, T]
            log_ratio = (log_ratio * mask).sum(1, keepdim=True) / length
        ratio = torch.exp(log_ratio)
        if loss_type == "cispo":
            loss = -ratio.clamp(max=epsilon_high).detach() * advantages * logp
        elif loss_type == "sapo":
            heat = torch.where(advantages > 0, sapo_temperature_pos, sapo_temperature_neg)
            loss = -torch.sigmoid(heat * (ratio - 1)) * 4 / heat * advantages
        else:
            free = ratio if delta is None else ratio.clamp(max=delta)
            loss = -torch.minimum(free * advantages, ratio.clamp(low, high) * advantages)
        loss = loss if sampling is None else loss * sampling
        if beta:
            kl = torch.exp(ref - logp) - (ref - logp) - 1
            loss = loss + beta * (kl * ratio if use_bias_correction_kl else kl)
        return loss

    weights = mask / divisors[loss_type]
    early = importance_sampling_level == "token" and tensors[0].dtype != torch.float16
    if early and any(options.needs) and not torch.compiler.is_compiling():
        of_tokens = (t if t is None else t.reshape(-1) for t in (weights, *terms))
        return _Chunked.apply(functools.partial(_policy, token_loss, options), *tensors, *of_tokens)
    stats = _Chunked.apply(functools.partial(_statistics, options), *tensors)
    return (token_loss(stats[2].view(shape), *terms) * weights).sum()


# ---- transformers' causal language models


def _base(model):
    """The transformers model in a PEFT model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_arguments(model) -> dict[str, Any]:
    """{weight, bias, softcap, logit_scale} of the head of a transformers CausalLM, or of a PEFT
    model around one, as it is now: arguments for the functions above, differentiable into adapters.

    The weight is that of the active full copy, or with LoRA merged (a copy of W, and its gradient),
    or the base's where adapters are disabled. Softcap and scale come from the config. Raises
    ValueError for a head that is more than a linear layer: hooks, other classes, quantised,
    offloaded or sharded weights, other adapters than LoRA, its variants, its dropout in training.
    """
    text = _base(model).config.get_text_config()
    scale = getattr(text, "logit_scale", None) or getattr(text, "lm_head_multiplier", None)
    # Granite divides by logits_scaling, HyperCLOVA X multiplies
    if scale is None and getattr(text, "logits_scaling", None):
        scale = text.logits_scaling ** (1 if text.model_type == "hyperclovax" else -1)
    weight, bias = _head_weight(_base(model).get_output_embeddings())
    softcap = getattr(text, "final_logit_softcapping", None)
    return {"weight": weight, "bias": bias, "softcap": softcap, "logit_scale": scale or 1.0}


def _head_weight(head):
    layer = head.get_base_layer() if hasattr(head, "get_base_layer") else head
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    hooks = sum(len(getattr(module, kind)) for module in {head, layer} for kind in kinds)
    if hasattr(head, "modules_to_save") and not hooks:  # PEFT's full copy
        active = [name for name in head.active_adapters if name in head.modules_to_save]
        off = head.disable_adapters or not active
        return _head_weight(head.original_module if off else head.modules_to_save[active[0]])
    replaced = "forward" in vars(layer) and not hasattr(layer, "_hf_hook")  # but by accelerate
    if hooks or replaced or getattr(type(layer), "forward", None) is not torch.nn.Linear.forward:
        raise _error("the head", f"{type(layer).__name__} with {hooks} hooks", "a bare nn.Linear")
    if layer is not head and head.disable_adapters and head.merged:
        head.unmerge()  # as PEFT's own forward does
    weight = layer.weight
    if weight.is_meta or type(weight.detach()) is not Tensor:
        need = "it on a device (FSDP2: in the root's group)"
        raise _error("the head", "its weight offloaded, sharded or quantised", need)
    if layer is head or head.disable_adapters or head.merged:
        return weight, layer.bias
    names = [name for name in head.active_adapters if name in getattr(head, "lora_A", ())]
    for name in names:
        dropout = head.training and getattr(head.lora_dropout[name], "p", 0)
        if dropout or head.lora_variant.get(name) or head.lora_bias.get(name):
            raise _error("the head", f"LoRA, dropout {dropout}, a variant or a bias", "plain LoRA")
        a, b = head.lora_A[name].weight, head.lora_B[name].weight
        weight = weight + (b @ a * head.scaling[name]).to(weight.dtype)
    if not names:
        raise _error("the head", f"an adapter {type(head).__name__}", "LoRA or a full copy")
    return weight, layer.bias


def patch_causal_lm(model, check: bool = True, loss=None, eval_logits: bool = True):
    """A transformers CausalLM (or a PEFT model around one) whose training loss forms no logits.

    In training with labels, forward returns the loss of linear_cross_entropy (labels shifted, with
    num_items_in_batch and shift_labels) and logits=None. In evaluation, and without labels, it is
    the model's own forward; with eval_logits=False evaluation with labels forms no logits either,
    and returns `predictions`, their argmax [B, T], which Trainer hands to compute_metrics. The head
    is looked at in each call, see head_arguments. loss: a function to call in place of
    linear_cross_entropy, with (hidden, labels=, ignore_index=, num_items=, **head_arguments).
    `check` runs one short batch through both forwards (not with `loss`) and raises ValueError if
    the losses differ: the model then does something else with its logits. Returns model, whose
    class is now a subclass of its own: copies, pickles and replicas of it are patched.
    """
    base = _base(model)
    head = getattr(base, "get_output_embeddings", lambda: None)()
    if _body(base) is None or head is None:
        raise _error("model", type(base).__name__, "a transformers CausalLM")
    head_arguments(base)
    hooked, patched = vars(base).get("forward"), type(base)
    if not hasattr(base, "_chunked"):
        if hooked is not None and not hasattr(base, "_hf_hook"):
            raise _error("model", "its forward replaced", "its class's")
        patched = _patched_class(type(base))
    settings = {"loss": loss, "eval_logits": eval_logits, "replaces": base.loss_function}
    if check:
        _check_patch(base, patched, settings)
    base.__class__, base._chunked = patched, settings
    if hooked is not None:  # accelerate's hook calls the forward that it found
        base._old_forward = types.MethodType(patched.forward, base)
    return model


def _body(base):
    """What gives the head its hidden states; the name that a class says it has may be wrong."""
    named = getattr(base, getattr(base, "base_model_prefix", ""), None)
    return getattr(base, "model", None) if named is None else named


@functools.cache
def _patched_class(cls):
    """The subclass of a CausalLM, with its name, as checkpoints and Trainer ask for that."""
    names = [*inspect.signature(cls.forward).parameters][1:]

    @functools.wraps(cls.forward)
    def forward(self, *args, **kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs
        if given.get("labels") is None or (self._chunked["eval_logits"] and not self.training):
            return cls.forward(self, *args, **kwargs)
        return _forward(self, self._chunked, **given)

    attributes = {"forward": forward, "__module__": cls.__module__}
    attributes["__qualname__"] = cls.__qualname__
    attributes["__reduce_ex__"] = lambda self, protocol: (_restore, (cls,), self.__dict__)
    return type(cls)(cls.__name__, (cls,), attributes)


def _restore(cls):
    """An unpickled model, before its attributes are set."""
    return _patched_class(cls).__new__(_patched_class(cls))


def _forward(self, settings, labels, shift_labels=None, num_items_in_batch=None,
             ignore_index=IGNORE, logits_to_keep=0, return_dict=None, **given):  # fmt: skip
    """A patched model's loss; what is given besides goes to the model's body."""
    router = given.get("output_router_logits")
    router = getattr(self.config, "output_router_logits", False) if router is None else router
    changed = self.loss_function is not settings["replaces"]
    if router or changed or isinstance(logits_to_keep, Tensor) or logits_to_keep:
        found = f"output_router_logits {router}, loss_function changed {changed}"
        found = f"logits_to_keep {type(logits_to_keep).__name__}, {found}"
        raise _error("forward", found, "none of it where no logits are formed")
    outputs = _body(self)(**given, return_dict=True)
    head = head_arguments(self)  # as it is now
    weight = head["weight"]
    hidden = outputs.last_hidden_state.to(weight.device)  # of a device_map over several GPUs
    if not torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(weight.dtype)
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.reshape(hidden.shape[:-1]).to(hidden.device)
    options = {"ignore_index": ignore_index, "num_items": num_items_in_batch, **head}
    loss = (settings["loss"] or linear_cross_entropy)(hidden, labels=shift_labels, **options)
    predictions = None
    if not self.training:
        argmax = lambda logits: logits.argmax(-1).float()  # exact up to 2^24
        with torch.no_grad():
            predictions = memory_efficient_linear(hidden, weight, argmax, bias=head["bias"]).long()
    rest = {name: outputs.get(name) for name in ("past_key_values", "hidden_states", "attentions")}
    if not (getattr(self.config, "return_dict", True) if return_dict is None else return_dict):
        return loss, predictions, *(value for value in rest.values() if value is not None)
    from transformers.modeling_outputs import CausalLMOutputWithPast

    result = CausalLMOutputWithPast(loss=loss, **rest)
    if predictions is not None:
        result["predictions"] = predictions
    return result


@torch.no_grad()
def _check_patch(base, patched, settings):
    """Raises where a short batch has another loss in the patched forward than in its own."""
    ids = torch.arange(1, 9, device=base.device)[None] % base.config.get_text_config().vocab_size
    modes, results = {module: module.training for module in base.modules()}, []
    ours = functools.partial(_forward, base, settings | {"loss": None})
    try:
        base.train()  # in evaluation bitsandbytes' CPU layers repack their weights for good
        for forward in (functools.partial(patched.__mro__[1].forward, base), ours):
            with torch.random.fork_rng():  # the same dropout
                torch.manual_seed(0)
                results.append(forward(input_ids=ids, labels=ids))
    finally:
        for module, training in modes.items():
            module.training = training
    stock, ours = results
    spread, eps = stock.logits.float().std(), torch.finfo(stock.logits.dtype).eps
    if not (stock.loss - ours.loss).abs() <= 4 * eps * spread + 1e-4:
        found = f"{type(base).__name__} with a loss of {ours.loss:.4f} for {stock.loss:.4f}"
        raise _error("model", found, "a linear head, scaled as configured, and shifted labels")


# ---- Self-test


def make_problem(n, d, v, dtype=torch.float32, device="cpu") -> tuple:
    """x [n, d], weight [v, d], bias [v], which require gradients; labels [n], some ignored."""
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=device)
    labels = torch.randint(0, v, (n,), generator=generator, device=device)
    labels[::5] = IGNORE
    tensors = draw(n, d), draw(v, d) / d**0.5, draw(v)
    return *(t.to(dtype).requires_grad_() for t in tensors), labels


def assert_near(ours, exact, plain=None):
    """Of pairs (output, inputs) the outputs and all gradients, for an upstream gradient that is
    neither 1 nor the same for all tokens. In the norm: to 1e-5 of it; or to 1e-4 and twice a plain
    16-bit path's own error (three times in the interpreter, which cuts bf16 off), if less than a
    tenth."""
    found, factor = [], 3 if isinstance(_row_kernel, InterpretedFunction) else 2
    for out, inputs in (ours, exact, plain or exact):
        upstream = torch.linspace(-1, 2, out.numel() + 1)[1:].view(out.shape).to(out)
        found.append([out, *torch.autograd.grad(out, inputs, upstream, retain_graph=True)])
    for got, want, rough in zip(*found, strict=True):
        error, norm, own_error = (t.norm() for t in (got.double() - want, want, rough - want))
        limit = min(0.1 * norm, factor * own_error + (1e-4 if plain else 1e-5) * norm)
        assert error <= limit, f"{error} off a norm of {norm}, {limit} allowed"


def naive_losses(x, weight, bias, labels, label_smoothing=0.0, softcap=None, logit_scale=1.0,
                 z_loss=0.0):  # fmt: skip
    """The definition of cross-entropy, a value per token, over all the logits."""
    logits = x @ weight.t() + bias
    logits = (logits.float() if x.itemsize == 2 else logits) * logit_scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    return losses + z_loss * logits.logsumexp(1) ** 2 * (labels != IGNORE)


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor made."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.nbytes = max(self.nbytes, getattr(out, "nbytes", 0))
        return out


def focal(logits, labels, weights):
    """A user's loss: a value per token."""
    logp = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    return -((1 - logp.exp()) ** 2) * logp * weights


def self_test():
    """Yields the name of each check once it has passed. Without a GPU the kernel is interpreted."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    *inputs, labels = make_problem(23, 8, 37, device=device)
    inputs.append(torch.rand(23, device=device).requires_grad_())
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    x, weight, bias, weights = inputs
    for chunk, compiled in ((None, False), (1, False), (7, False), (7, True), (100, False)):
        options = {"bias": bias, "chunk": chunk, "compile": compiled}
        for fn in (focal, lambda *args: focal(*args).sum()):
            ours = memory_efficient_linear(x, weight, fn, labels, weights, **options)
            want = fn(doubles[0] @ doubles[1].t() + doubles[2], labels, doubles[3])
            assert_near((ours, inputs), (want, doubles))
    with contextlib.suppress(ValueError):  # which the call in the next line is to raise
        memory_efficient_linear(x, weight, lambda logits: (logits * weights[0]).sum())
        raise AssertionError("the gradient of a tensor that fn closes over would be lost")
    yield "any function: values and sums, gradients of x, W, bias and its arguments, ragged chunks"

    x, weight, bias, labels = make_problem(23, 8, 5000, device=device)  # two blocks
    options, runs = _Options(0.5, 3.0, True, 0, False, [True] * 3), []
    coefs = torch.randn(4, 23, device=device)
    for run in (_run_rows, rows_reference):
        products, stats = (x @ weight.t()).detach(), torch.zeros(4, 23, device=device)
        run(products, bias.detach(), labels, stats, coefs, options, True)
        runs.append((products, stats))
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-5)
    yield "the kernel equals its reference: statistics and gradients of rows"

    cases = [{}, {"label_smoothing": 0.1}, {"softcap": 3.0}, {"logit_scale": 0.3, "z_loss": 0.1}]
    cases.append({"label_smoothing": 0.2, "softcap": 2.0, "logit_scale": 1.5, "z_loss": 0.05})
    for dtype, options, chunk in itertools.product(DTYPES, cases, (None, 8)):
        *inputs, labels = make_problem(23, 16, 101, dtype, device)
        doubles = [t.detach().double().requires_grad_() for t in inputs]
        runs = [(naive_losses(*given, labels, **options), given) for given in (doubles, inputs)]
        if dtype == torch.float32:
            runs.pop()
        options = {"bias": inputs[2], "chunk": chunk, **options}
        ours = linear_cross_entropy(*inputs[:2], labels, reduction="none", **options)
        assert_near((ours, inputs), *runs)
        ours = linear_cross_entropy(*inputs[:2], labels, reduction="sum", **options)
        assert_near((ours, inputs), *((losses.sum(), given) for losses, given in runs))
    yield "cross-entropy's options in float32, bf16, fp16, no worse than the plain path"

    x, weight, _, labels = make_problem(48, 16, 101, device=device)
    labels, x = labels.view(4, 12), x.detach().view(4, 12, 16).requires_grad_()
    mask, inputs = (labels != IGNORE).float(), (x, weight)
    advantages, index = torch.randn(4, device=device), labels.clamp(min=0)[..., None]
    logp = torch.log_softmax(x.double() @ weight.double().t(), -1).gather(-1, index)[..., 0]
    old, ref = logp.detach().float() - 0.1, logp.detach().float() + 0.3
    ratio, gap, scale = torch.exp(logp - old), ref - logp, advantages[:, None]
    losses = 0.04 * (gap.exp() - gap - 1)
    losses = losses - torch.minimum(ratio * scale, ratio.clamp(0.8, 1.2) * scale)
    want = ((losses * mask).sum(1) / mask.sum(1)).mean()
    rest = {"old_logprobs": old, "ref_logprobs": ref, "beta": 0.04, "chunk": 5}
    ours = grpo_loss(x, weight, labels, advantages, mask, **rest)
    assert_near((ours, inputs), (want, inputs))
    yield "GRPO equals the naive form"

    x, weight, _, labels = make_problem(128, 4, 4096, device=device)
    for loss in (linear_cross_entropy, linear_logprobs, general):
        with LargestTensor() as seen:
            loss(x, weight, labels, chunk=8).sum().backward()
        assert 0 < seen.nbytes <= 8 * 4096 * 4, (loss, seen.nbytes)
    yield "the largest tensor alive is a chunk's"

    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    counts, curves = torch.stack([torch.arange(24), torch.arange(7, 31)]).to(device), []
    for patched in (False, True):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).to(device).train()
        model = patch_causal_lm(model) if patched else model
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
        for step in range(12):  # it learns to count
            out = model(input_ids=(counts + step) % 17, labels=(counts + step) % 17)
            assert (out.logits is None) == patched
            out.loss.backward()
            losses.append(out.loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        curves.append(torch.stack(losses))
    (start, *_, end), ours = curves[0].tolist(), curves[1]
    assert end < 0.6 * start
    torch.testing.assert_close(ours, curves[0], rtol=0, atol=1e-3)
    yield f"a patched Llama learns as stock: {start:.3f} to {end:.3f}, ours {ours[-1]:.3f}"


# ---- Timings


def plain(x, weight, labels):
    return F.cross_entropy((x @ weight.t()).float(), labels)


def general(x, weight, labels, **options):
    """The user's own cross-entropy by the general function."""
    fn = functools.partial(F.cross_entropy, reduction="sum")
    return memory_efficient_linear(x, weight, fn, labels, **options) / len(labels)


@torch.no_grad()
def bare_products(x, weight, labels):
    """The floor: the two (W frozen) or three products, over TRAINED tokens at a time."""
    for part in x.split(TRAINED):
        logits = part @ weight.t()
        torch.mm(logits, weight)
        if weight.requires_grad:
            torch.mm(logits.t(), part)


def backward(loss, *tensors) -> Tensor:
    """A step's loss, with the gradients in place."""
    for tensor in tensors[:2]:
        tensor.grad = None
    out = loss(*tensors)
    out.backward()
    return out.detach()


def peak_mib(loss, *tensors) -> float:
    """Peak memory of a step on a GPU beyond the gradients; the second, so compiled and tuned."""
    backward(loss, *tensors)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()  # with the first's gradients, in place of the second's
    backward(loss, *tensors)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def bench() -> dict[str, float]:
    """The challenge's shape in bf16: prints times and memory, returns times and ratios."""
    figures = {}
    ways = {"ours": linear_cross_entropy, "general": functools.partial(general, compile=True)}
    ways |= {"64 MiB": functools.partial(linear_cross_entropy, chunk=256), "plain": plain}
    x, weight, _, labels = make_problem(16384, 4096, 131072, torch.bfloat16, "cuda")
    for kind in ("trained", "frozen"):
        tensors = x, weight.requires_grad_(kind == "trained"), labels.clamp(min=0)
        want = backward(plain, *tensors)
        runs = {"bare products": functools.partial(bare_products, *tensors)}
        for name, way in ways.items():
            assert (backward(way, *tensors) - want).abs() < 1e-3, name
            runs[name] = functools.partial(backward, way, *tensors)
        times = {name: do_bench(run, rep=300, return_mode="median") for name, run in runs.items()}
        for name, time_ms in times.items():
            memory = f", {peak_mib(ways[name], *tensors):.0f} MiB" if name in ways else ""
            share = time_ms / times["bare products"]
            print(f"W {kind}, {name}: {time_ms:.2f} ms, {share:.3f} of the products{memory}")
        figures[f"{kind}_ms"] = times["ours"]
        figures[f"{kind}_vs_plain"] = times["plain"] / times["ours"]
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--test", action="store_true", help="the self-test alone")
    parser.add_argument("--bench", action="store_true", help="the timings alone (needs a GPU)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures there")
    args = parser.parse_args()
    gpu, checks, figures = torch.cuda.is_available(), 0, {}
    if args.bench and not gpu:
        parser.error("--bench needs a GPU")
    device = torch.cuda.get_device_name() if gpu else "CPU"
    print(f"chunked_ce | {device} | torch {torch.__version__} | triton {triton.__version__}")
    if args.test or not args.bench:
        for checks, name in enumerate(self_test(), 1):
            print(f"ok {checks}: {name}", flush=True)
    if gpu and (args.bench or not args.test):
        figures = bench()
    words = "".join(f" {k}={v:.2f}{'x' if '_vs_' in k else ''}" for k, v in figures.items())
    print(f"RESULT chunked_ce PASS checks={checks}{'' if gpu else ' skipped=1(GPU)'}{words}")
    if args.json:
        part = args.json.with_name(f"{args.json.name}.part")
        part.write_text(json.dumps({"device": device, "checks": checks, **figures}, indent=1))
        part.replace(args.json)


if __name__ == "__main__":
    main()
