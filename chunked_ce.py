"""A linear layer and any loss on its outputs, without ever holding the logits.

Problem: the logits of a language model's head are its largest tensor. Batch 4 x 4096, hidden 4096,
vocabulary 128K: 4 GiB in bf16, 8 GiB as the float32 a loss needs, several of them in the backward.

Idea: take the tokens in chunks, and write a chunk's gradient over its logits while they are there.
- One loop over chunks: the products, a step that turns them into their gradient, dX and dW.
- `memory_efficient_linear`: the step lets autograd through any function of the float32 logits. A
  scalar's gradients are taken in the forward pass and multiplied by the upstream gradient in the
  backward; per-token values are computed again there, where each token's own is known.
- `linear_cross_entropy`, `linear_logprobs`, `grpo_loss`: the step is one Triton kernel that reads a
  row of logits twice (the second time from the L2 cache) and writes the gradient over it.
- Logits are bf16 in memory, float32 in registers; with fp16 inputs, which end at 65504, float32.
- dW is summed in float32. The fast functions, with `chunk`, write each row of a 16-bit dW once, in
  a second pass over slices of the vocabulary, and hold a chunk's logits alone: four products where
  three would do. The first pass has its logits in dW's memory, not yet written to.

Left out: dropping ignored tokens before the products (their number would have to come to the host),
matmul kernels of our own (cuBLAS is within a few percent of the chip), tensor parallelism.
Run on an H200 and on CPUs (plain PyTorch there). Not run on a T4, for which the kernel compiles.

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
LOG2E = tl.constexpr(math.log2(math.e))
# Bytes of a logit in memory: fp16 has float32 products and its gradient beside them
LOGIT_BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 6}
# Without `chunk`, W trained: all tokens where their logits take up to WHOLE bytes, else ROWS, over
# which a product hides the reading and writing of dW's sum (LEAN bytes where that is in bf16). W
# frozen: FROZEN bytes; 256 MiB were no faster on an H200, 128 took 4% more time.
WHOLE, ROWS, LEAN, FROZEN = 2**31, 4096, 2**29, 208 * 2**20
CPU_LOGITS = 2**17  # at a time: their half-dozen float32 copies stay in the caches
TOP, LSE, LOGP = range(3)  # rows of statistics, see _rows_reference; a fourth is the mean


# ---- The definition in plain PyTorch; CPU tensors take it


class _Head(NamedTuple):
    """From a product to a logit: softcap * tanh(scale * product / softcap) / temperature."""

    factor: float  # of the tanh, or of the product
    inner: float  # scale / softcap; 0: no softcap
    slope: float  # scale / temperature


def _units(products, bias, head):
    """float32 [n, V] in new memory: the products, or their tanh; times head.factor the logits."""
    units = products.to(torch.float32, copy=True)
    if bias is not None:
        units = units + bias.float()
    return torch.tanh(units * head.inner) if head.inner else units


def logits_reference(products, bias, head) -> Tensor:
    """The float32 logits [n, V] of products of any dtype, in new memory; differentiable."""
    units = _units(products, bias, head)
    return units if head.factor == 1.0 else units * head.factor


class _Rows(NamedTuple):
    """The products of some tokens with the words from `first` on, and what goes with them."""

    products: Tensor  # [n, columns]
    gradient: Tensor  # [n, columns], to be written; may be the products
    bias: Tensor | None  # [columns]
    labels: Tensor  # [n]
    first: int
    vocab: int
    head: _Head
    mean: bool  # whether that statistic is wanted


def _rows_reference(rows, stats, coefs, fused):
    """Fills stats [4, n] (without coefs, or fused), and from coefs [3, n] the products' gradient.

    Stats, float32, 0 for ignored tokens: the largest of _units; logsumexp of the logits less the
    largest; the label's log-probability; the mean log-probability. coefs are the gradients by
    logsumexp, log-probability and mean; fused, the first is a multiple of the logsumexp.
    """
    head, live = rows.head, rows.labels != IGNORE
    units = _units(rows.products, rows.bias, head)
    label = rows.labels.long() - rows.first
    here = live & (label >= 0) & (label < units.shape[1])
    label = torch.where(here, label, 0)[:, None]
    if coefs is None or fused:
        top = units.amax(1)
        shifted = (units - top[:, None]) * head.factor
        lse = shifted.logsumexp(1)
        found = top, lse, shifted.gather(1, label)[:, 0] - lse, shifted.mean(1) - lse
        stats.copy_(torch.where(live, torch.stack(found), 0))
    if coefs is not None:
        top, lse, _, _ = stats[:, :, None]
        g_lse, g_logp, g_mean = coefs[:, :, None]
        g_lse = g_lse * (top * head.factor + lse) if fused else g_lse
        p = torch.exp((units - top) * head.factor - lse)
        grad = p * (g_lse - g_logp - g_mean) + g_mean / rows.vocab
        grad.scatter_add_(1, label, torch.where(here[:, None], g_logp, 0))
        grad *= head.slope * (1 - units**2 if head.inner else 1)
        rows.gradient.copy_(torch.where(live[:, None], grad, 0))


# ---- One kernel for a row: its softmax, and the gradient written over the logits


# fmt: off
@triton.jit
def _load_units(products_ptr, bias_ptr, at, cols, room, inner, EVICT: tl.constexpr,
                BIAS: tl.constexpr, CAP: tl.constexpr):
    """_units at some columns; beyond cols anything: rows have `room` in memory."""
    units = tl.load(products_ptr + at, mask=at < room, other=0.0, eviction_policy=EVICT)
    units = units.to(tl.float32)
    if BIAS:
        units += tl.load(bias_ptr + at, mask=at < cols, other=0.0).to(tl.float32)
    if CAP:  # tanh(v) = 2 / (1 + exp(-2v)) - 1
        units = 2.0 / (1.0 + tl.exp(units * (-2.0 * inner))) - 1.0
    return units


@triton.jit
def _row_kernel(products_ptr, out_ptr, bias_ptr, labels_ptr, stats_ptr, coefs_ptr,
                stride, out_stride, stats_stride, coefs_stride, cols, first, vocab,
                factor, inner, slope, IGNORE: tl.constexpr,
                BIAS: tl.constexpr, CAP: tl.constexpr, STATS: tl.constexpr, GRADS: tl.constexpr,
                MEAN: tl.constexpr, BLOCK: tl.constexpr):
    # A program per row. STATS writes its statistics, GRADS the gradient; both together are fused.
    # _rows_reference says what they are. Of an ignored row nothing is read.
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    live = label != IGNORE
    tl.device_assert((label == IGNORE) | ((label >= 0) & (label < vocab)),
                     "label outside the vocabulary (and not ignore_index)")
    label = (label - first).to(tl.int32)
    here = live & (label >= 0) & (label < cols)
    products_ptr += row * stride
    out_ptr += row * out_stride
    stats_ptr += row
    coefs_ptr += row
    end = tl.where(live, cols, 0)
    factor2 = factor * LOG2E
    # A lane has 8 columns, 16 bytes of bf16: its maximum and sums need no barrier
    lane = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    if STATS:
        best = tl.full([BLOCK // 8], -1e30, tl.float32)
        total = tl.full([BLOCK // 8], 0.0, tl.float32)
        distance = total
        picked = _load_units(products_ptr, bias_ptr, tl.where(here, label, 0), cols, end, inner,
                             "", BIAS, CAP)
        origin = tl.where(picked == -float("inf"), 0.0, picked)  # near the mean: digits are kept
        for start in range(0, end, BLOCK):
            units = _load_units(products_ptr, bias_ptr, start + lane, cols, stride, inner,
                                "", BIAS, CAP)
            if MEAN:
                distance += tl.sum(tl.where(start + lane < cols, units - origin, 0.0), axis=1)
            if start + BLOCK > cols:
                units = tl.where(start + lane < cols, units, -float("inf"))
            new = tl.maximum(best, tl.max(units, axis=1))
            p = tl.exp2((units - new[:, None]) * factor2)
            total = total * tl.exp2((best - new) * factor2) + tl.sum(p, axis=1)
            best = new
        top = tl.max(best)
        lse = tl.log(tl.where(live, tl.sum(total * tl.exp2((best - top) * factor2)), 1.0))
        tl.store(stats_ptr, tl.where(live, top, 0.0))
        tl.store(stats_ptr + stats_stride, tl.where(live, lse, 0.0))
        logp = (picked - top) * factor - lse
        tl.store(stats_ptr + 2 * stats_stride, tl.where(live, logp, 0.0))
        if MEAN:
            mean = (tl.sum(distance) / vocab + (origin - top)) * factor - lse
            tl.store(stats_ptr + 3 * stats_stride, tl.where(live, mean, 0.0))
    else:
        top = tl.load(stats_ptr)
        lse = tl.load(stats_ptr + stats_stride)
    if GRADS:
        g_lse = tl.load(coefs_ptr)
        g_logp = tl.load(coefs_ptr + coefs_stride)
        g_mean = tl.load(coefs_ptr + 2 * coefs_stride)
        if STATS:
            g_lse *= top * factor + lse
        g_p = (g_lse - g_logp - g_mean) * slope
        g_label = tl.where(here, g_logp * slope, 0.0)
        g_mean *= slope / vocab
        lse2 = lse * LOG2E
        for start in range(0, end, BLOCK):
            units = _load_units(products_ptr, bias_ptr, start + lane, cols, stride, inner,
                                "evict_first", BIAS, CAP)
            grad = tl.exp2((units - top) * factor2 - lse2) * g_p
            if MEAN:
                grad += g_mean
            if (label >= start) & (label < start + BLOCK):
                grad += tl.where(lane == label - start, g_label, 0.0)
            if CAP:
                grad *= 1.0 - units * units
            tl.store(out_ptr + start + lane, grad.to(out_ptr.dtype.element_ty),
                     mask=start + lane < out_stride, eviction_policy="evict_first")
        for start in range(end, cols, BLOCK):
            zeros = tl.full([BLOCK // 8, 8], 0.0, out_ptr.dtype.element_ty)
            tl.store(out_ptr + start + lane, zeros, mask=start + lane < out_stride)


@triton.jit
def _scale_kernel(tensor_ptr, factor_ptr, numel, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    end = tl.where(factor == 1.0, 0, numel)  # an upstream gradient of 1 costs no pass over dW
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, end, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(tensor_ptr + at, mask=at < numel).to(tl.float32) * factor
        tl.store(tensor_ptr + at, value.to(tensor_ptr.dtype.element_ty), mask=at < numel)
# fmt: on


def _launch_rows(rows, stats, coefs, fused):
    products, gradient, head = rows.products, rows.gradient, rows.head
    # Columns at a time, and of a warp: as many as no chip spills registers for
    most, of_a_warp = (16384, 512) if products.itemsize == 2 else (4096, 256)
    block = min(most, max(256, triton.next_power_of_2(products.shape[1])))
    bias = stats if rows.bias is None else rows.bias.contiguous()
    tensors = [products, gradient, bias, rows.labels.contiguous(), stats]
    tensors.append(stats if coefs is None else coefs)
    strides = [t.stride(0) for t in (products, gradient, stats, tensors[-1])]
    numbers = products.shape[1], rows.first, rows.vocab, *head, IGNORE
    flags = rows.bias is not None, head.inner > 0, coefs is None or fused, coefs is not None
    options = {"num_warps": max(1, block // of_a_warp), "sanitize_overflow": False}
    on_gpu = torch.cuda.device(products.device) if products.is_cuda else contextlib.nullcontext()
    with on_gpu:  # debug: for the label's assertion
        arguments = *tensors, *strides, *numbers, *flags, rows.mean, block
        _row_kernel[(len(products),)](*arguments, debug=True, **options)


def _run_rows(rows, stats, coefs=None, fused=False):
    """What _rows_reference says, in place."""
    if rows.products.is_cuda or isinstance(_row_kernel, InterpretedFunction):
        if len(rows.products):
            _launch_rows(rows, stats, coefs, fused)
        return
    step = max(1, CPU_LOGITS // rows.products.shape[1])
    for i in range(0, len(rows.products), step):
        some = slice(i, i + step)
        part = rows._replace(products=rows.products[some], gradient=rows.gradient[some])
        part = part._replace(labels=rows.labels[some])
        _rows_reference(part, stats[:, some], None if coefs is None else coefs[:, some], fused)


# ---- Products, and the loop over chunks of tokens


def _matmul(a, b, out, add=False):
    """out (+)= a @ b with float32 sums; out may be float32 where a and b are not."""
    beta = int(add)
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif a.is_cuda:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, beta=beta, out=out)
    elif out.shape[0] < out.shape[1]:
        _matmul(b.t(), a.t(), out.t(), add)
    else:  # a CPU has no such product: slices in float32
        b = b.to(out.dtype)
        for rows, part in zip(a.split(1024), out.split(1024), strict=True):
            torch.addmm(part, rows.to(out.dtype), b, beta=beta, out=part)


def _plan(x, weight, trained, chunk, low=False, one_pass=False, split=False):
    """(tokens of a chunk, dtype in which dW is summed, columns of a second pass's slices; 0: none):
    the fastest way that adds the memory of no more than `chunk` tokens' logits (0: see WHOLE). low:
    dW is summed in its own dtype. one_pass: no second one. split: not all tokens at once."""
    n, row_bytes = max(1, len(x)), _even(len(weight), x) * LOGIT_BYTES[x.dtype]
    if chunk:
        rows = chunk
    elif not trained:
        rows = FROZEN // row_bytes
    elif n * row_bytes <= WHOLE and not split:
        rows = n
    else:
        rows = LEAN // row_bytes if low else min(ROWS, WHOLE // row_bytes)
    rows, columns = max(1, min(rows, n)), 0
    cast = weight.itemsize == 2 and weight.dtype != x.dtype  # another one than autocast's
    sums = trained and (cast or (rows < n and weight.itemsize == 2 and not low))  # in float32
    if sums and chunk and rows < n and not (cast or one_pass):
        columns = max(1, rows * len(weight) // n)
        columns -= columns % min(columns, 128)  # round numbers: products of others are slow
        rows = max(rows, min(n, ROWS, weight.nbytes // row_bytes))  # in dW's memory
    even = -(-n // -(-n // rows))  # a last chunk of few tokens would read all of W, too
    rows = min(rows, -(-even // 8) * 8)
    return rows, torch.float32 if sums and not columns else weight.dtype, columns


def _even(columns, x) -> int:
    """Columns of a row in memory: a GPU's 16-byte loads want rows that begin at multiples of 16
    bytes. None are added on a CPU: oneDNN's bf16 product for AMX reads past the end of a row and
    multiplies that with 0, which a NaN left there survives (its issue 5717)."""
    return -(-columns // 16) * 16 if x.is_cuda else columns


def _storage(rows, columns, x, reused=None) -> Tensor:
    """Memory for a chunk; `reused`, if it is large enough."""
    size = rows * _even(columns, x) * LOGIT_BYTES[x.dtype]
    if reused is not None and reused.nbytes >= size:
        return reused.view(torch.uint8).flatten()
    return torch.empty(size, dtype=torch.uint8, device=x.device)


def _split(storage, rows, columns, x):
    """(products, gradient) [rows, columns] in one memory; the same, but for fp16."""
    wide, dtype = _even(columns, x), torch.float32 if x.dtype == torch.float16 else x.dtype
    size = rows * wide * dtype.itemsize
    products = storage[:size].view(dtype).view(rows, wide)[:, :columns]
    if dtype == x.dtype:
        return products, products
    gradient = storage[size : size + rows * wide * x.itemsize].view(x.dtype)
    return products, gradient.view(rows, wide)[:, :columns]


def _for_chunks(x, weight, needs, plan, step):
    """The gradients of x, weight and a bias (that in float32), None where not needed.

    step(products, gradient, i, j) gets the products of the tokens i to j and writes their
    gradient; it returns whether there is one.
    """
    n, v, (need_x, need_w, need_b), (rows, sum_dtype, columns) = len(x), len(weight), needs, plan
    w = weight.to(x.dtype)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else None
    dw = torch.empty(weight.shape, dtype=sum_dtype, device=x.device) if need_w else None
    db = torch.zeros(v, device=x.device) if need_b else None
    storage = _storage(rows, v, x, dw if columns else None)
    for i in range(0, max(n, 1), rows):  # of no tokens one chunk: gradients of 0
        j = min(n, i + rows)
        products, gradient = _split(storage, j - i, v, x)  # [rows, V]
        _matmul(x[i:j], w.t(), products)
        if not step(products, gradient, i, j):
            continue
        if need_x:
            _matmul(gradient, w, dx[i:j])
        if need_w and not columns:
            _matmul(gradient.t(), x[i:j], dw, i > 0)
        if need_b:
            db += gradient.sum(0, dtype=torch.float32)
    return dx, dw, db


class _Options(NamedTuple):
    """As an operator's schema can hold them."""

    head: Sequence[float]
    mean: bool
    chunk: int  # 0: none given
    low: bool
    needs: Sequence[bool]  # of x, weight, bias


def _run(x, weight, bias, labels, stats, coefs, options, row_loss=None):
    """(statistics [4, n], dx, dw, db) of _rows_reference; None what is not needed.

    Without coefs: statistics alone. With both: gradients from them. With coefs alone: both, fused;
    or row_loss(log-probabilities, i, j) gives coefs[1] of the tokens i to j.
    """
    backward, fused = stats is not None, stats is None and row_loss is None
    split = row_loss is not None  # GRPO in 1.5 GiB rather than 2 for the head of Llama 1B
    plan = _plan(x, weight, options.needs[1], options.chunk, options.low, split=split)
    if not labels.is_cuda:  # a GPU checks in the kernel
        bad = labels[((labels < 0) | (labels >= len(weight))) & (labels != IGNORE)]
        if len(bad):
            need = f"0 to {len(weight) - 1}, or ignore_index"
            raise ValueError(f"labels: found {bad[0].item()}, need {need}")
    stats = stats if backward else torch.zeros(4, len(x), device=x.device)
    rest = len(weight), _Head(*options.head), options.mean

    def step(products, gradient, i, j):
        rows = _Rows(products, gradient, bias, labels[i:j], 0, *rest)
        if coefs is None or row_loss is not None:
            _run_rows(rows, stats[:, i:j])
        if row_loss is not None:
            coefs[1, i:j] = row_loss(stats[LOGP, i:j], i, j)
        if coefs is not None:
            _run_rows(rows, stats[:, i:j], coefs[:, i:j], fused)
        return coefs is not None

    dx, dw, db = _for_chunks(x, weight, options.needs, plan, step)
    if columns := plan[2]:  # the second pass: a product over all tokens gives rows of dW
        if fused:
            coefs = torch.cat([coefs[:1] * _public_stats(stats, options.head)[:1], coefs[1:]])
        storage = _storage(len(x), columns, x)
        for a in range(0, len(weight), columns):
            b = min(len(weight), a + columns)
            products, gradient = _split(storage, len(x), b - a, x)  # [n, columns]
            _matmul(x, weight[a:b].to(x.dtype).t(), products)
            rows = _Rows(products, gradient, _part(bias, a, b), labels, a, *rest)
            _run_rows(rows, stats, coefs)
            _matmul(gradient.t(), x, dw[a:b])
    return stats, dx, None if dw is None else dw.to(weight.dtype), db


def _part(a, i, j):
    """The chunk of a tensor; None, numbers and 0-d tensors as they are."""
    return a[i:j] if isinstance(a, Tensor) and a.ndim else a


Maybe = Tensor | None  # the operator's schema is read from these annotations


@torch.library.custom_op("chunked_ce::rows", mutates_args=())
def _rows_operator(x: Tensor, weight: Tensor, bias: Maybe, labels: Tensor, stats: Maybe,
                   coefs: Maybe, head: Sequence[float], mean: bool, chunk: int, low: bool,
                   needs: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """_run as an operator: torch.compile takes it whole, in one graph for all lengths."""
    options = _Options(head, mean, chunk, low, needs)
    found = _run(x, weight, bias, labels, stats, coefs, options)
    found = None if stats is not None else found[0], *found[1:]
    return tuple(x.new_empty(0) if t is None else t for t in found)


@_rows_operator.register_fake
def _(x, weight, bias, labels, stats, coefs, head, mean, chunk, low, needs):
    shapes = (4, x.shape[0]), x.shape, weight.shape, weight.shape[:1]
    dtypes = torch.float32, x.dtype, weight.dtype, torch.float32
    each = zip(shapes, dtypes, [stats is None, *needs], strict=True)
    return tuple(x.new_empty(shape if want else (0,), dtype=kind) for shape, kind, want in each)


# ---- Autograd


class _Chunked(torch.autograd.Function):
    """compute(options, upstream, *inputs) -> (value, what to keep, gradients or None).

    The forward pass calls it without an upstream gradient. A scalar's gradients may be taken there;
    the backward pass multiplies them. Else compute is called again, with what was kept.
    """

    @staticmethod
    def forward(ctx, compute, options, *inputs):
        value, kept, grads = compute(options, None, *inputs)
        ctx.compute, ctx.options, ctx.count = compute, options, len(inputs)
        ctx.early, ctx.spent = grads is not None, False
        ctx.save_for_backward(*inputs, *(kept if grads is None else grads))
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        saved = list(ctx.saved_tensors)
        inputs, grads = saved[: ctx.count], saved[ctx.count :]
        if not ctx.early:
            grads = ctx.compute(ctx.options, upstream, *inputs, *grads)[2]
        else:
            if ctx.spent:  # a second backward pass of one graph: the first multiplied in place
                grads = ctx.compute(ctx.options, None, *inputs)[2]
            if not torch.compiler.is_compiling():
                ctx.spent = True
            *grads, unit = grads
            grads = [_multiply(g, upstream * unit) for g in grads]
        pairs = zip(grads, inputs, strict=True)
        return None, None, *(g if g is None else g.to(t.dtype) for g, t in pairs)


def _multiply(gradient, factor):
    """gradient * factor, in its own memory: dW may be gigabytes."""
    if gradient is None or not gradient.numel():
        return gradient
    if torch.compiler.is_compiling():
        return (gradient.float() * factor).to(gradient.dtype)
    if not gradient.is_cuda:
        return gradient.data.mul_(factor)
    with torch.cuda.device(gradient.device):  # .data: autograd need not hear, `spent` knows
        grid = (min(4096, triton.cdiv(gradient.numel(), 4096)),)
        _scale_kernel[grid](gradient.data, factor, gradient.numel(), 4096)
    return gradient


def _if_needed(needs, grads):
    return [g if need else None for need, g in zip(needs, grads, strict=True)]


def _public_stats(stats, head):
    """[3, n]: logsumexp (the largest logit added), log-probability, mean log-probability."""
    return torch.cat([stats[TOP:LSE] * head[0] + stats[LSE:LOGP], stats[LOGP:]])


def _statistics(options, upstream, x, weight, bias, labels, stats=None):
    """_public_stats, whose gradients are computed in the backward pass."""
    if upstream is None:
        forward = options._replace(needs=[False] * 3)
        stats = _rows_operator(x, weight, bias, labels, None, None, *forward)[0]
        return _public_stats(stats, options.head), [stats], None
    found = _rows_operator(x, weight, bias, labels, stats, upstream.contiguous(), *options)
    return None, [], [*_if_needed(options.needs, found[1:]), None]


def _token_losses(stats, smoothing, z_loss):
    """Cross-entropy of each token from _public_stats; no 0 * -inf where a bias masks words."""
    lse, logp, mean = stats
    loss = (smoothing - 1) * logp + z_loss * lse**2
    return loss - smoothing * mean if smoothing else loss


def _cross_entropy(options, upstream, x, weight, bias, labels, weights):
    """sum(weights * losses), with its gradients."""
    options, smoothing, z_loss = options
    unit = torch.ones((), device=x.device)
    if x.dtype == torch.float16 and len(x):  # weights of 1/tokens would leave its range: 32 at most
        unit = weights.abs().amax().clamp(min=1e-30) / 32
    each = weights / unit
    coefs = torch.stack([2 * z_loss * each, (smoothing - 1) * each, -smoothing * each])
    stats, *grads = _rows_operator(x, weight, bias, labels, None, coefs, *options)
    loss = (_token_losses(_public_stats(stats, options.head), smoothing, z_loss) * weights).sum()
    return loss, [], [*_if_needed(options.needs, grads), None, None, unit]


def _policy(options, upstream, x, weight, bias, labels, weights, *terms):
    """sum(weights * token_loss(log-probabilities, *terms)), with its gradients: by
    log-probability from autograd, by logit from the kernel."""
    options, token_loss = options
    losses, coefs = torch.zeros(len(x), device=x.device), torch.zeros(3, len(x), device=x.device)

    def row_loss(logp, i, j):
        with torch.enable_grad():
            logp = logp.detach().requires_grad_()
            loss = token_loss(logp, *(_part(t, i, j) for t in terms)) * weights[i:j]
        losses[i:j] = loss.detach()
        return torch.autograd.grad(loss, logp, torch.ones_like(loss))[0]

    grads = _run(x, weight, bias, labels, None, coefs, options, row_loss)[1:]
    unit = torch.ones((), device=x.device)
    return losses.sum(), [], [*grads, *[None] * (2 + len(terms)), unit]


# ---- Any function of the logits


@functools.cache
def _compiled(code):
    """call(fn, ...) -> fn of the logits, compiled with the upcast before it: float32 logits are
    then in registers alone. One for each function's code, as graphs are kept, and limited, by the
    code that is compiled. fn and the tensors it holds are not kept."""

    def call(fn, products, bias, head, args):
        return fn(logits_reference(products, bias, head), *args)

    return torch.compile(types.FunctionType(call.__code__.replace(), globals()))


def _any_loss(options, upstream, x, weight, bias, *trained):
    """fn's values, or the sum of its scalars, over chunks of tokens; gradients by autograd."""
    call, args, places, chunk, grad_mode, (kind, dtype, enabled), needs = options
    # args[places] are `trained`
    early = upstream is None and (any(needs) or bool(places)) and x.dtype != torch.float16
    bias = None if bias is None else bias.detach()  # its gradient is the products'
    some = chunk or max(1, 2**30 // (16 * len(weight)))  # about four float32 copies: 1 GiB
    outs, grads_of_args = [], [[] for _ in places]

    def differentiate(products, gradient, i, j):
        part = [_part(a, i, j) for a in args]
        want = upstream is not None or (early and not (outs and outs[0].ndim))
        leaves = [t.detach() for t in (products, *(part[k] for k in places))]
        with torch.set_grad_enabled(want or grad_mode):
            leaves = [leaf.requires_grad_(want) for leaf in leaves]
            for k, leaf in zip(places, leaves[1:], strict=True):
                part[k] = leaf
            out = call(leaves[0], bias, part)
        _check_result(out, j - i, outs)
        outs.append(out.detach())
        if out.requires_grad and not want:
            _check_graph(out, [])
        if not want or (upstream is None and out.ndim):
            return False
        _check_graph(out, leaves)
        seed = torch.ones_like(out) if upstream is None else _part(upstream, i, j).to(out.dtype)
        by_products, *by_args = torch.autograd.grad(out, leaves, seed, materialize_grads=True)
        gradient.copy_(by_products)
        for found, new in zip(grads_of_args, by_args, strict=True):
            found.append(new)
        return True

    def step(products, gradient, i, j):
        wrote = False
        for a in range(i, max(j, i + 1), some):
            b = min(j, a + some)
            wrote = differentiate(products[a - i : b - i], gradient[a - i : b - i], a, b)
        return wrote

    plan = _plan(x, weight, needs[1], chunk, one_pass=True)
    with torch.autocast(kind, dtype=dtype, enabled=enabled):  # of the call, in the backward too
        grads = [*_for_chunks(x, weight, needs, plan, step)]
    value = torch.cat(outs) if outs[0].ndim else torch.stack(outs).sum()
    if upstream is None and (not early or value.ndim):
        return value, [], None
    for tensor, found in zip(trained, grads_of_args, strict=True):
        grads.append(torch.cat(found) if tensor.ndim else torch.stack(found).sum(0))
    return value, [], grads if upstream is not None else [*grads, torch.ones_like(value).float()]


def _check_result(out, rows, earlier):
    ok = isinstance(out, Tensor) and out.is_floating_point() and out.shape in ((), (rows,))
    if not ok or out.ndim != (earlier[0] if earlier else out).ndim:
        need = f"floats, [{rows}] (a value per token) or [] (their sum), alike for all chunks"
        raise ValueError(f"fn's result: found {_describe(out)}, need {need}")


def _check_graph(out, leaves):
    """fn's result must reach the logits, and no tensor with a gradient that was not given to it."""
    todo, seen, met = [out.grad_fn], set(), set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
            if hasattr(node, "variable"):
                met.add(id(node.variable))
    if leaves and id(leaves[0]) not in met:
        raise ValueError("fn's result: found it detached from the logits, need autograd through fn")
    if not met <= {id(leaf) for leaf in leaves}:
        found = "a tensor that requires grad inside fn, whose gradient would be lost"
        raise ValueError(f"fn: found {found}, need it handed over as a per-token argument")


# ---- Public functions


def _describe(found) -> str:
    """One line for what was found."""
    if isinstance(found, Tensor):
        return f"a {found.dtype} tensor of shape {list(found.shape)} on {found.device}"
    return " ".join(f"{type(found).__name__} {found!r}".split())[:100]


def _check_tensor(name, tensor, shape, device, dtypes=()):
    ok = isinstance(tensor, Tensor) and tensor.shape == shape and tensor.device == device
    if not ok or (dtypes and tensor.dtype not in dtypes):
        need = f"shape {list(shape)} on {device}, {' or '.join(map(str, dtypes)) or 'any dtype'}"
        raise ValueError(f"{name}: found {_describe(tensor)}, need {need}")


def _check_number(name, value, low, high=math.inf, kinds=(int, float)):
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise ValueError(f"{name}: found {_describe(value)}, need a number from {low} to {high}")


def _check(x, weight, bias, chunk, labels=False, ignore_index=IGNORE):
    """(x [n, D] in the dtype of the products, labels [n] with IGNORE where ignored, chunk or 0). W
    is cast later, so that dW keeps W's own dtype."""
    for name, tensor in (("x", x), ("weight", weight)):
        if not isinstance(tensor, Tensor) or tensor.ndim < 2 or not tensor.is_floating_point():
            raise ValueError(f"{name}: found {_describe(tensor)}, need floats [..., D] or [V, D]")
    kind, shape = x.device.type, (len(weight), x.shape[-1])
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
    if 0 in shape or kind not in ("cpu", "cuda") or dtype not in LOGIT_BYTES:
        need = "x [..., D] and weight [V, D] of float32, bfloat16 or float16 on cpu or cuda"
        raise ValueError(f"x: found {_describe(x)} and weight {_describe(weight)}, need {need}")
    _check_tensor("weight", weight, shape, x.device, LOGIT_BYTES if autocast else (dtype,))
    if bias is not None:
        _check_tensor("bias", bias, shape[:1], x.device, LOGIT_BYTES)
    if chunk is not None:
        _check_number("chunk", chunk, 1, kinds=int)
    if labels is not False:
        _check_number("ignore_index", ignore_index, -(2**63), 2**63 - 1, kinds=int)
        _check_tensor("labels", labels, x.shape[:-1], x.device, (torch.int64, torch.int32))
        labels = labels.reshape(-1)
        if ignore_index != IGNORE:
            labels = torch.where(labels == IGNORE, -1, labels)  # no label, as any that is negative
            labels = torch.where(labels == ignore_index, IGNORE, labels)
    return x.reshape(-1, x.shape[-1]).to(dtype), labels, chunk or 0


def _head(logit_scale, softcap, temperature=1.0) -> _Head:
    _check_number("logit_scale", logit_scale, 1e-9)
    _check_number("temperature", temperature, 1e-9)
    if softcap is not None:
        _check_number("softcap", softcap, 1e-9, 1e4)  # tanh is exact to 6e-8: times that
    inner = logit_scale / softcap if softcap else 0.0
    return _Head((softcap or logit_scale) / temperature, inner, logit_scale / temperature)


def _needs(*tensors):
    on = torch.is_grad_enabled()
    return [on and t is not None and t.requires_grad for t in tensors]


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
    chunk: tokens at a time, default as many as fill 1 GiB at 16 bytes a logit, with products over
    as many more as WHOLE and FROZEN say. Memory beyond the gradients: chunk * V logits at
    LOGIT_BYTES and what fn takes for them; W trained in 16 bits in several chunks: dW's float32
    sum, 4 * V * D bytes; in autocast W's 16-bit copy.
    Raises ValueError or TypeError on input that does not fit, and where fn detaches its result or
    uses tensors that require grad and are not arguments of it.
    """
    flat, _, chunk = _check(x, weight, bias, chunk)
    head, args = _head(logit_scale, softcap), [*per_token]
    if not callable(fn):
        raise TypeError(f"fn: found {_describe(fn)}, need a function of logits")
    for k, a in enumerate(args):
        if isinstance(a, Tensor) and a.ndim:
            rest = a.shape[x.ndim - 1 :]
            _check_tensor(f"per-token argument {k}", a, (*x.shape[:-1], *rest), x.device)
            args[k] = a.reshape(-1, *rest)

    def call(products, bias, args):
        if not compile:
            return fn(logits_reference(products, bias, head), *args)
        limits = {"recompile_limit": 64, "fail_on_recompile_limit_hit": True}  # never eager unsaid
        with torch._dynamo.config.patch(**limits, suppress_errors=False):
            inner = getattr(fn, "func", fn)  # of a functools.partial
            compiled = _compiled(getattr(inner, "__code__", type(inner)))
            return compiled(fn, products, bias, head, args)

    kind, needs = x.device.type, _needs(x, weight, bias)
    autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    places = [k for k, a in enumerate(args) if isinstance(a, Tensor) and _needs(a)[0]]
    options = call, args, places, chunk, torch.is_grad_enabled(), autocast, needs
    trained = [args[k] for k in places]
    out = _Chunked.apply(_any_loss, options, flat, weight, bias, *trained)
    return out.reshape(x.shape[:-1]) if out.ndim else out


def _stats_of(x, weight, bias, labels, head, ignore_index, chunk, mean=False, low=False):
    """_public_stats, differentiable: [3, ...]."""
    flat, ids, chunk = _check(x, weight, bias, chunk, labels, ignore_index)
    options = _Options(list(head), mean, chunk, low, _needs(x, weight, bias))
    stats = _Chunked.apply(_statistics, options, flat, weight, bias, ids)
    return stats.reshape(3, *labels.shape)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None,
    ignore_index: int = IGNORE, reduction: str = "mean", label_smoothing: float = 0.0,
    softcap: float | None = None, logit_scale: float = 1.0, z_loss: float = 0.0,
    num_items: Tensor | float | None = None, chunk: int | None = None,
    accum_dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """F.cross_entropy of the logits x @ weight.T + bias, float32 [] or, for "none", [...].

    x [..., D], weight [V, D], bias [V] in float32, bfloat16 or float16 (or cast by autocast),
    labels [...] int64 or int32, already shifted. With softcap the logits are softcap *
    tanh(logit_scale * (product + bias) / softcap). A token's loss: smoothed cross-entropy + z_loss
    * logsumexp**2. reduction "mean" divides the sum by the number of labels that are not
    ignore_index (none: loss and gradients 0); num_items, a number or a tensor, divides it instead,
    as transformers does.

    Memory beyond the gradients. With chunk: chunk * V logits at LOGIT_BYTES, whatever is trained; a
    16-bit W costs one more product then. Without it the fastest: W frozen FROZEN bytes; trained
    WHOLE bytes, or ROWS * V logits and dW's float32 sum, 4 * V * D (accum_dtype=torch.bfloat16: dW
    summed in its own memory, LEAN bytes). In all 60 bytes a token, in autocast W's 16-bit copy.
    Raises ValueError on input that does not fit; labels out of range on a GPU end in a device
    assertion that names them, as checking earlier would wait for the GPU.
    """
    if reduction not in ("mean", "sum", "none") or (reduction == "none" and num_items is not None):
        raise ValueError(f"reduction: found {reduction}, need mean, sum, or none without num_items")
    _check_number("label_smoothing", label_smoothing, 0, 1)
    _check_number("z_loss", z_loss, 0)
    flat, ids, size = _check(x, weight, bias, chunk, labels, ignore_index)
    if accum_dtype not in (torch.float32, weight.dtype):
        raise ValueError(f"accum_dtype: found {accum_dtype}, need float32 or {weight.dtype}")
    head, needs, mean = _head(logit_scale, softcap), _needs(x, weight, bias), label_smoothing > 0
    low = accum_dtype != torch.float32
    weights = (ids != IGNORE).float()
    if num_items is not None:
        weights = weights / _divisor(num_items, x)
    elif reduction == "mean":
        weights = weights / weights.sum().clamp(min=1)
    # A float16 dW, without a loss scale's upstream gradient, would leave the range
    late = reduction == "none" or (needs[1] and weight.dtype == torch.float16) or not any(needs)
    if late:
        stats = _stats_of(x, weight, bias, labels, head, ignore_index, chunk, mean, low)
        losses = _token_losses(stats, label_smoothing, z_loss) * weights.view(labels.shape)
        return losses if reduction == "none" else losses.sum()
    rows = _Options(list(head), mean, size, low, needs)
    options = rows, float(label_smoothing), float(z_loss)
    return _Chunked.apply(_cross_entropy, options, flat, weight, bias, ids, weights)


def _divisor(num_items, x):
    """0 items, a batch without labels, divide nothing."""
    if not isinstance(num_items, Tensor):
        _check_number("num_items", num_items, 0)
        return num_items or 1
    num_items = num_items.reshape(()).to(x.device)
    return torch.where(num_items == 0, 1, num_items)


def linear_logsumexp(
    x: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None,
    ignore_index: int = IGNORE, softcap: float | None = None, logit_scale: float = 1.0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(logsumexp of a token's logits, its label's logit), float32 [...], both differentiable; 0
    where ignored. Arguments, memory and errors as linear_cross_entropy's."""
    head = _head(logit_scale, softcap)
    lse, logp, _ = _stats_of(x, weight, bias, labels, head, ignore_index, chunk)
    return lse, logp + lse


def linear_logprobs(
    x: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None,
    temperature: float = 1.0, softcap: float | None = None, logit_scale: float = 1.0,
    chunk: int | None = None, ignore_index: int = IGNORE, entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """log softmax(logits / temperature)[label] of each token, float32 [...]; 0 where ignored.

    With entropy=True (log-probability, entropy of the distribution in nats), both differentiable,
    the second by memory_efficient_linear. Arguments, memory, errors as linear_cross_entropy's.
    """
    head = _head(logit_scale, softcap, temperature)
    logp = _stats_of(x, weight, bias, labels, head, ignore_index, chunk)[1]
    if not entropy:
        return logp

    def entropies(logits, live):
        logs = torch.log_softmax(logits / temperature, -1)
        return -(logs.exp() * logs.clamp(min=-1e30)).sum(-1) * live  # no 0 * -inf

    options = {"bias": bias, "softcap": softcap, "logit_scale": logit_scale, "chunk": chunk}
    live = labels != ignore_index
    return logp, memory_efficient_linear(x, weight, entropies, live, **options)


LOSS_TYPES = "grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo"


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
    _check_number("beta", beta, 0)
    _check_number("epsilon", epsilon, 0)
    _check_number("sapo_temperature_pos", sapo_temperature_pos, 1e-9)
    _check_number("sapo_temperature_neg", sapo_temperature_neg, 1e-9)
    if loss_type not in LOSS_TYPES or importance_sampling_level not in ("token", "sequence"):
        found = f"{loss_type} and {importance_sampling_level}"
        raise ValueError(f"loss_type, level: found {found}, need {LOSS_TYPES}, token or sequence")
    shape, ratio = x.shape[:-1], importance_sampling_ratio
    if advantages.shape == shape[:1]:
        advantages = advantages[:, None].expand(shape)
    if ratio is not None and ratio.shape == (shape[0], 1):
        ratio = ratio.expand(shape)
    _check_tensor("labels", labels, shape, x.device)
    given = {"mask": mask, "advantages": advantages, "old_logprobs": old_logprobs,
             "ref_logprobs": ref_logprobs, "importance_sampling_ratio": ratio}  # fmt: skip
    for name, tensor in given.items():
        if tensor is not None or name == "mask" or (beta and name == "ref_logprobs"):
            _check_tensor(name, tensor, shape, x.device)
    flat, ids, size = _check(x, weight, bias, chunk, labels.where(mask != 0, IGNORE))
    counts = ids.view(shape) != IGNORE  # of the others nothing is looked at: no -inf * 0
    clean = lambda t: t if t is None else torch.where(counts, t.detach().float(), 0)
    mask, *terms = (clean(t) for t in given.values())
    batch, length = len(x), mask.sum(1, keepdim=True).clamp(min=1)
    divisor = {"grpo": batch * length, "sapo": batch * length, "luspo": batch,
               "bnpo": mask.sum().clamp(min=1)}.get(loss_type)  # fmt: skip
    if loss_type == "dr_grpo":
        _check_number("max_completion_length", max_completion_length, 1)
        divisor = batch * max_completion_length
    elif divisor is None:
        divisor = _divisor(num_items, x)
    if loss_type == "cispo":
        _check_number("epsilon_high", epsilon_high, 0)
    low, high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)

    def token_loss(logp, advantages, old, ref, sampling, mean=lambda log_ratio: log_ratio):
        ratio = torch.exp(mean(logp - (logp.detach() if old is None else old)))
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

    weights, by_token = mask / divisor, importance_sampling_level == "token"
    head, needs = _head(logit_scale, softcap, temperature), _needs(x, weight, bias)
    early = by_token and any(needs) and flat.dtype != torch.float16
    if early and not torch.compiler.is_compiling():
        options = _Options(list(head), False, size, False, needs), token_loss
        terms = [t if t is None else t.reshape(-1) for t in (weights, *terms)]
        return _Chunked.apply(_policy, options, flat, weight, bias, ids, *terms)
    logp = _stats_of(x, weight, bias, ids.view(shape), head, IGNORE, chunk)[1]
    mean = lambda ratio: ratio if by_token else (ratio * mask).sum(1, keepdim=True) / length
    return (token_loss(logp, *terms, mean) * weights).sum()


# ---- transformers' causal language models


def head_arguments(model) -> dict[str, Any]:
    """{weight, bias, softcap, logit_scale} of the head of a transformers CausalLM, or of a PEFT
    model around one, as it is now: arguments for the functions above, differentiable into adapters.

    The weight is that of the active full copy, or with LoRA merged, or the base's where adapters
    are disabled. Softcap and scale come from the config. Raises ValueError for a head that is more
    than a linear layer: hooks, other classes, quantised, offloaded or sharded weights, other
    adapters than LoRA, its variants, its dropout in training.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    text = base.config.get_text_config()
    scale = getattr(text, "logit_scale", None) or getattr(text, "lm_head_multiplier", None)
    # Granite divides by logits_scaling, HyperCLOVA X multiplies
    if scale is None and getattr(text, "logits_scaling", None):
        scale = text.logits_scaling ** (1 if text.model_type == "hyperclovax" else -1)
    weight, bias = _head_weight(base.get_output_embeddings())
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
    replaced = "forward" in vars(layer) and not hasattr(layer, "_hf_hook")  # accelerate's is none
    plain = getattr(type(layer), "forward", None) is torch.nn.Linear.forward and not replaced
    if hooks or not plain:
        found = f"{type(layer).__name__} with {hooks} hooks"
        raise ValueError(f"the head: found {found}, need nn.Linear without any")
    if layer is not head and head.disable_adapters and head.merged:
        head.unmerge()  # as PEFT's own forward does
    weight, found = layer.weight, None
    if weight.is_meta or hasattr(weight, "placements"):
        found = "its weight offloaded or sharded, need it on a device (FSDP2: in the root's group)"
    elif layer is not head and not (head.disable_adapters or head.merged):
        names = [name for name in head.active_adapters if name in getattr(head, "lora_A", ())]
        found = None if names else f"an adapter {type(head).__name__}, need LoRA or a full copy"
        for name in names:
            dropout = head.training and getattr(head.lora_dropout[name], "p", 0)
            if dropout or head.lora_variant.get(name) or head.lora_bias.get(name):
                found = f"LoRA with dropout {dropout}, a variant or a bias, need plain LoRA"
            a, b = head.lora_A[name].weight, head.lora_B[name].weight
            weight = weight + (b @ a * head.scaling[name]).to(weight.dtype)
    if found:
        raise ValueError(f"the head: found {found}")
    return weight, layer.bias


def patch_causal_lm(model, check: bool = True, loss=None, eval_logits: bool = True):
    """A transformers CausalLM (or a PEFT model around one) whose training loss forms no logits.

    In training with labels, forward returns the loss of linear_cross_entropy (labels shifted, with
    num_items_in_batch and shift_labels) and logits=None. In evaluation, and without labels, it is
    the model's own forward; with eval_logits=False evaluation with labels forms no logits either,
    and returns `predictions`, their argmax [B, T], which Trainer hands to compute_metrics. The head
    is looked at in each call, see head_arguments. loss: a function to call in place of
    linear_cross_entropy, with (hidden, labels=, ignore_index=, num_items=, **head_arguments).
    `check` runs one short batch through both forwards and raises ValueError if the losses differ:
    the model then does something else with its logits. Returns model, whose class is now a subclass
    of its own: copies, pickles and replicas of it are patched; `del model.forward` (of PEFT's,
    of its base model) undoes it.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if _body(base) is None or not callable(getattr(base, "get_output_embeddings", None)):
        raise ValueError(f"model: found {type(base).__name__}, need a transformers CausalLM")
    head_arguments(base)
    if not hasattr(base, "_chunked"):
        hooked = vars(base).get("forward")
        if hooked is not None and not hasattr(base, "_hf_hook"):
            found = f"its forward replaced by {_describe(hooked)}"
            raise ValueError(f"model: found {found}, need its class's")
        base.__class__ = _patched_class(type(base))
        if hooked is not None:  # accelerate's hook calls the forward that it found
            base._old_forward = types.MethodType(type(base).forward, base)
    base._chunked = {"loss": loss, "eval_logits": eval_logits, "replaces": base.loss_function}
    try:
        if check:
            _check_patch(base)
    except BaseException:
        del base.forward
        raise
    return model


def _body(base):
    """What gives the head its hidden states; the name that a class says it has may be wrong."""
    named = getattr(base, getattr(base, "base_model_prefix", ""), None)
    return getattr(base, "model", None) if named is None else named


@functools.cache
def _patched_class(cls):
    names = [*inspect.signature(cls.forward).parameters][1:]

    class Patched(cls):
        @functools.wraps(cls.forward)
        def forward(self, *args, **kwargs):
            given = dict(zip(names, args, strict=False)) | kwargs
            in_full = self._chunked["eval_logits"] and not self.training
            if given.get("labels") is None or in_full:
                return cls.forward(self, *args, **kwargs)
            return _forward(self, **given)

        def __reduce_ex__(self, protocol):
            return _restore, (cls,), self.__dict__

        def __delattr__(self, name):
            if name != "forward":
                return super().__delattr__(name)
            del self._chunked
            self.__class__ = cls
            if "_old_forward" in vars(self):
                self._old_forward = types.MethodType(cls.forward, self)

    for name in ("__name__", "__qualname__", "__module__"):  # checkpoints and Trainer ask for them
        setattr(Patched, name, getattr(cls, name))
    return Patched


def _restore(cls):
    return _patched_class(cls).__new__(_patched_class(cls))


def _forward(self, labels, shift_labels=None, num_items_in_batch=None, ignore_index=IGNORE,
             logits_to_keep=0, return_dict=None, **given):  # fmt: skip
    """A patched model's loss; what is given besides goes to the model's body."""
    router = given.get("output_router_logits", getattr(self.config, "output_router_logits", False))
    changed = self.loss_function is not self._chunked["replaces"]
    if router or changed or isinstance(logits_to_keep, Tensor) or logits_to_keep:
        found = f"output_router_logits {router}, loss_function changed {changed}"
        found = f"logits_to_keep {_describe(logits_to_keep)}, {found}"
        raise ValueError(f"forward: found {found}, need none of it where no logits are formed")
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
    loss = (self._chunked["loss"] or linear_cross_entropy)(hidden, labels=shift_labels, **options)
    predictions = None
    if not self.training:
        with torch.no_grad():
            best = memory_efficient_linear(hidden, weight, _argmax, bias=head["bias"])
        predictions = best.long()
    rest = {name: outputs.get(name) for name in ("past_key_values", "hidden_states", "attentions")}
    if not (getattr(self.config, "return_dict", True) if return_dict is None else return_dict):
        return loss, predictions, *(value for value in rest.values() if value is not None)
    from transformers.modeling_outputs import CausalLMOutputWithPast

    result = CausalLMOutputWithPast(loss=loss, **rest)
    if predictions is not None:
        result["predictions"] = predictions
    return result


def _argmax(logits):
    return logits.argmax(-1).float()  # exact up to 2^24


@torch.no_grad()
def _check_patch(base):
    ids = torch.arange(1, 9, device=base.device)[None] % base.config.get_text_config().vocab_size
    modes, results = {module: module.training for module in base.modules()}, []
    try:
        base.train()  # in evaluation bitsandbytes' CPU layers repack their weights for good
        for forward in (type(base).__mro__[1].forward, type(base).forward):
            with torch.random.fork_rng():  # the same dropout
                torch.manual_seed(0)
                results.append(forward(base, input_ids=ids, labels=ids))
    finally:
        for module, training in modes.items():
            module.training = training
    stock, ours = results
    spread, eps = stock.logits.float().std(), torch.finfo(stock.logits.dtype).eps
    if not (stock.loss - ours.loss).abs() <= 4 * eps * spread + 1e-4:
        found = f"{type(base).__name__} with a loss of {ours.loss:.4f} for {stock.loss:.4f}"
        need = "a linear head, scaled as configured, and a loss of shifted labels"
        raise ValueError(f"model: found {found}, need {need}")


# ---- Self-test


def make_problem(n, d, v, dtype=torch.float32, device="cpu") -> tuple:
    """x [n, d], weight [v, d], bias [v], which require gradients; labels [n], some ignored."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    labels = (draw(n) * 1e4).long() % v
    labels[::5] = IGNORE
    tensors = draw(n, d), draw(v, d) / d**0.5, draw(v)
    return *(t.to(device, dtype).requires_grad_() for t in tensors), labels.to(device)


def results(out, inputs) -> list[Tensor]:
    """[out, gradients] for an upstream gradient that is neither 1 nor the same for all tokens."""
    upstream = torch.linspace(-1, 2, out.numel() + 1, device=out.device)[1:].view(out.shape)
    return [out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype), retain_graph=True)]


def assert_near(ours, exact, plain=None):
    """Relative in the norm: 1e-5; or twice a plain 16-bit path's own error (bf16 is cut off in the
    interpreter) and 1e-4; and never more than a tenth, so that zeros do not pass."""
    for k, want in enumerate(exact):
        error, norm = (ours[k].double() - want).norm().item(), want.norm().item()
        own = (plain[k].double() - want).norm().item() if plain else 0
        limit = min(2 * own + 1e-4 * norm if plain else 1e-5 * norm, 0.1 * norm)
        assert error <= limit, f"result {k}: {error} off a norm of {norm}, {limit} allowed"


def naive_cross_entropy(x, weight, bias, labels, smoothing=0.0, softcap=None, scale=1.0, z=0.0):
    """The definition, a value per token, over all the logits; 16-bit ones are cast to float32."""
    logits = x @ weight.t() + bias
    logits = (logits.float() if x.itemsize == 2 else logits) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    return losses + z * logits.logsumexp(1) ** 2 * (labels != IGNORE)


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor made, but for those of W's size; it looks into this file's
    operator, which a mode sees as a whole."""

    def __init__(self, weight):
        super().__init__()
        self.allowed, self.nbytes = weight.nbytes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inside = func._opname == "rows"
        with self if inside else contextlib.nullcontext():
            out = (_rows_operator._init_fn if inside else func)(*args, **kwargs or {})
        sizes = [t.nbytes for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
        self.nbytes = max([self.nbytes, *(n for n in sizes if n != self.allowed)])
        return out


def train_llama(patch, device, steps=12) -> list[float]:
    """Losses of a small Llama that learns to count."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    model, losses = LlamaForCausalLM(config).to(device).train(), []
    model = patch_causal_lm(model) if patch else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        ids = (torch.arange(24)[None] + torch.arange(2)[:, None] * 7 + step).to(device) % 17
        out = model(input_ids=ids, labels=ids)
        assert (out.logits is None) == patch
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    return losses


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
            assert_near(results(ours, inputs), results(want, doubles))
    with contextlib.suppress(ValueError):
        memory_efficient_linear(x, weight, lambda logits: (logits * weights[0]).sum())
        raise AssertionError("the gradient of a tensor that fn closes over would be lost")
    yield "any function: values and sums, gradients of x, W, bias and its arguments, ragged chunks"

    cases = (), (0.1,), (0.0, 3.0), (0.0, None, 0.3, 0.1), (0.2, 2.0, 1.5, 0.05)
    names = "label_smoothing", "softcap", "logit_scale", "z_loss"
    for dtype, case, chunk in itertools.product(LOGIT_BYTES, cases, (None, 8)):
        *inputs, labels = make_problem(23, 16, 101, dtype, device)
        doubles = [t.detach().double().requires_grad_() for t in inputs]
        options = dict(zip(names, case, strict=False), bias=inputs[2], chunk=chunk)
        for reduction in ("none", "sum"):
            ours = linear_cross_entropy(*inputs[:2], labels, reduction=reduction, **options)
            naive = [naive_cross_entropy(*given, labels, *case) for given in (doubles, inputs)]
            exact, plain = naive if reduction == "none" else [t.sum() for t in naive]
            plain = results(plain, inputs) if dtype != torch.float32 else None
            assert_near(results(ours, inputs), results(exact, doubles), plain)
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
    assert_near(results(ours, inputs), results(want, inputs))
    yield "GRPO equals the naive form"

    x, weight, _, labels = make_problem(128, 16, 4096, device=device)
    for loss in (linear_cross_entropy, linear_logprobs, general):
        with LargestTensor(weight) as seen:
            loss(x, weight, labels, chunk=8).sum().backward()
        assert 0 < seen.nbytes <= 8 * 4096 * 4, (loss, seen.nbytes)
    yield "the largest tensor alive is a chunk's"

    stock, ours = train_llama(False, device), train_llama(True, device)
    assert stock[-1] < 0.6 * stock[0], stock
    assert max(abs(a - b) for a, b in zip(stock, ours, strict=True)) < 1e-3, (stock, ours)
    yield f"a patched Llama learns as stock: {stock[0]:.3f} to {stock[-1]:.3f}, ours {ours[-1]:.3f}"


# ---- Timings


def plain(x, weight, labels):
    return F.cross_entropy((x @ weight.t()).float(), labels)


def general(x, weight, labels, **options):
    """The user's own cross-entropy by the general function."""
    fn = functools.partial(F.cross_entropy, reduction="sum")
    return memory_efficient_linear(x, weight, fn, labels, **options) / len(labels)


def bare_products(x, weight, labels):
    """The floor: the two (W frozen) or three products, over ROWS tokens at a time."""
    part, w = x.detach()[:ROWS], weight.detach()
    logits = torch.randn(len(part), len(w), dtype=x.dtype, device=x.device)
    out, dx, dw = torch.empty_like(logits), torch.empty_like(part), torch.empty_like(w)

    def run():
        for _ in range(len(x) // len(part)):
            torch.mm(part, w.t(), out=out)
            torch.mm(logits, w, out=dx)
            if weight.requires_grad:
                torch.mm(logits.t(), part, out=dw)

    return run


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
    grads = sum(t.grad.nbytes for t in tensors[:2] if t.grad is not None)
    for tensor in tensors[:2]:
        tensor.grad = None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    backward(loss, *tensors)
    return (torch.cuda.max_memory_allocated() - before - grads) / 2**20


def random_tensors(n, d, v, frozen) -> tuple:
    torch.manual_seed(0)
    x, w = (torch.randn(size, d, dtype=torch.bfloat16, device="cuda") for size in (n, v))
    weight = (w * 0.02).requires_grad_(not frozen)
    return x.requires_grad_(), weight, torch.randint(0, v, (n,), device="cuda")


def bench() -> dict[str, float]:
    """The challenge's shape in bf16: prints times and memory, returns times and ratios."""
    figures = {}
    ways = {"ours": linear_cross_entropy, "general": functools.partial(general, compile=True)}
    ways |= {"64 MiB": functools.partial(linear_cross_entropy, chunk=256), "plain": plain}
    for kind in ("trained", "frozen"):
        tensors = random_tensors(16384, 4096, 131072, kind == "frozen")
        want = backward(plain, *tensors)
        runs = {"bare products": bare_products(*tensors)}
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
