"""A QLoRA training step with every module compiled: no graph break, nothing compiled twice.

Problem: torch.compile on a QLoRA model breaks graphs in bitsandbytes and PEFT, recompiles for
lengths, for the first layer and for each kind of mask, keeps dequantised weights for the backward,
and inlined over all layers takes minutes. Eager, most of a step is launches and memory traffic.

Idea: one region per thing that repeats, each with fullgraph=True and dynamic lengths.
- A decoder block is one region, compiled once and called for every layer: weights are its inputs.
  Compiling the whole model would inline 16 to 80 copies of it. Embedding, rotary tables, final norm
  and loss are a region each: they run once a step, on tokens without a batch dimension, so that one
  graph serves all batch sizes. The mask is made once a batch, outside, for all blocks.
- Projections of one input (q, k, v; gate, up) are dequantised into one buffer and multiplied at
  once, forward and backward, as are their LoRA products. The backward's dequantisation takes the
  gradient as an argument it does not need: else the compiler would merge it with the forward's and
  keep 16-bit weights between them.
- LoRA's second product is added into the output where it lies; in a gated MLP it is added inside
  the kernel of the activation and of its gradient (Triton, below), so it costs no memory traffic
  and is not rounded away. Backward, that kernel also makes the gradients of three LoRA matrices.
- Activation checkpointing is the partitioner's: at a budget of 0 it keeps a block's inputs alone,
  and recomputes what the backward needs: not the MLP's last product, which torch.utils.checkpoint
  repeats (a quarter of a block). Without it, whatever is pointwise is recomputed all the same.
- What checkpointed blocks keep can wait in pinned host memory (offload), copied beside the kernels.

Left out: CUDA graphs, other quantisations than NF4, more than one GPU (qlora_fsdp2.py).
LoRA dropout above 0, DoRA and several active adapters take PEFT's own path, compiled, unfused.
Attention dropout is refused. Rotary tables that ask for the longest position (dynamic, longrope)
stay eager. Measured on an H200; not run on a T4.

    python compile_qlora.py                self-test, then the comparison; --test or --bench for one
    python compile_qlora.py --model unsloth/Llama-3.2-1B-Instruct-bnb-4bit --dataset data.jsonl
        --max_length 1024 --per_device_train_batch_size 1 --gradient_accumulation_steps 2
        --max_steps 60 --gradient_checkpointing true --log true      (any TrainingArguments flag)
    python compile_qlora.py --model DIR --dataset F --stacks ours_compiled    train, no comparison

    from compile_qlora import compile_model, fuse
    model = compile_model(fuse(peft_model))       # then train as ever, in Trainer too
"""

import argparse
import collections
import concurrent.futures
import contextlib
import copy
import functools
import gc
import importlib.util
import io
import itertools
import json
import math
import os
import queue
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import unittest
import urllib.error
import urllib.request
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, NamedTuple
from unittest import mock

if __name__ == "__main__":  # Ctrl-C while torch is imported: nothing else can catch it yet
    INTERRUPT = signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import torch
import torch._dynamo
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_scalar
from triton.runtime.interpreter import InterpretedFunction

try:
    import chunked_ce
    import flex_attn
    from nf4_triton import dequantize_nf4, patch_bitsandbytes
except ModuleNotFoundError as error:
    if error.name not in ("chunked_ce", "flex_attn", "nf4_triton"):
        raise
    found = f"compile_qlora: found no {error.name}.py, need it in this script's directory"
    if __name__ != "__main__":
        raise ImportError(found) from None
    print(found, file=sys.stderr)
    sys.exit(77)

GROUPS = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")  # projections of one input
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ACTIVATIONS = {"silu": F.silu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}
SLOPES = {"silu": torch.ops.aten.silu_backward}
SLOPES["gelu_tanh"] = functools.partial(torch.ops.aten.gelu_backward, approximate="tanh")
MANY_SMS = 68  # inductor tunes matrix products on GPUs of so many SMs (a T4 has 40)
GIB = 2**30
KEEP = torch.contiguous_format
TIMINGS = "1b", "8b", "challenge"  # on a GPU, by --only
FUSED_RANK = 64  # larger LoRA ranks are added by cuBLAS before the activation: shared memory


def _need(ok, name, found, need, error=ValueError):
    if not ok:  # in one line, whatever a file's columns are called
        raise error(" ".join(f"{name}: found {found}, need {need}".split()))


# --------------------------------------------------------------------------------------------------
# The tests' harness and what the command line needs; qlora_fsdp2.py takes it from here


def _resources(compiled) -> dict[str, int]:
    """{REG, STACK, SHARED, LOCAL} of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.check_output([tool, "-res-usage", cubin], text=True)
    return {k: int(n) for k, n in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}


def _random_cases(check, few=25, **drawn):
    """check(**values) for random values drawn by hypothesis' strategies: in the self-test the same
    few each time, with --fuzz N as many, from --seed. A failure is shrunk to a small case."""
    import hypothesis

    few = int(few) // (4 if torch.cuda.is_available() else 1)  # there each compiles kernels
    cases, seed = os.environ.get("FUZZ_CASES", str(few)), os.environ.get("FUZZ_SEED", "0")
    settings = hypothesis.settings(
        max_examples=int(cases),
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.seed(int(seed))(settings(hypothesis.given(**drawn)(check)))()


def _self_test(fuzz, seed, module) -> tuple[int, int]:
    """(exit code, tests passed) of a script; with fuzz of its random tests, as many cases each."""
    import pytest

    passed, errors, stopped = [], [], []

    def count(report):
        if report.when == "call" and report.passed:
            passed.append(report)

    def interrupt(excinfo):  # -x stops pytest-xdist by a KeyboardInterrupt of its own kind
        stopped.append(excinfo.type is KeyboardInterrupt)

    keep = lambda call: errors.append(call.excinfo.value)
    sys.modules[Path(module.__file__).stem] = module  # or pytest would import a second one
    quiet = ["-x", "-q", "-rs", "--no-header", "--no-fold-skipped", "-p", "no:cacheprovider"]
    quiet += ["-W", "ignore", "--show-capture=no"]
    quiet += ["-p", "no:logging"]  # listening, it has Dynamo write out every guard
    if fuzz:
        os.environ |= {"FUZZ_CASES": str(fuzz), "FUZZ_SEED": str(seed)}
        quiet += ["-k", "fuzz"]
    hooks = {"pytest_runtest_logreport": count, "pytest_exception_interact": keep}
    hooks["pytest_keyboard_interrupt"] = interrupt
    try:
        code = pytest.main([*quiet, module.__file__], [types.SimpleNamespace(**hooks)])
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


# --------------------------------------------------------------------------------------------------
# LoRA over 4-bit weights: the operators. A Params4bit carries its quant_state, also as an input of
# compiled code and as a tensor saved for the backward, so these take the packed weights alone.

_OPS = torch.library.Library("compile_qlora", "DEF")


def _operator(schema, fake):
    """Registers a function under compile_qlora::, for CPU and CUDA; returns the operator."""

    def register(run):
        name = schema.split("(")[0]
        _OPS.define(schema)
        _OPS.impl(name, run, "CPU")
        _OPS.impl(name, run, "CUDA")
        torch.library.register_fake(f"compile_qlora::{name}", fake)
        return getattr(torch.ops.compile_qlora, name)

    return register


def _fake_stacked(packed, rows, columns, dtype, tail=None, after=None):
    more = 0 if tail is None else tail.shape[0]
    return packed[0].new_empty((sum(rows) + more, columns), dtype=dtype)


@_operator(
    "stacked(Tensor[] packed, int[] rows, int columns, ScalarType dtype, Tensor? tail, "
    "Tensor? after) -> Tensor",
    _fake_stacked,
)
def stacked(packed, rows, columns, dtype, tail=None, after=None):
    """The weights behind `packed`, one below the other, then `tail`: [sum(rows) + len(tail),
    columns] in dtype. `after`: a tensor to wait for; what depends on a gradient cannot move into
    the forward pass."""
    sizes = [*rows, 0 if tail is None else len(tail)]
    out = torch.empty((sum(sizes), columns), dtype=dtype, device=packed[0].device)
    *parts, end = out.split(sizes)
    if tail is not None:
        end.copy_(tail)
    for weight, part in zip(packed, parts, strict=True):
        dequantize_nf4(weight, weight.quant_state, part, dtype=dtype)
    return out


@_operator("after(Tensor x, Tensor other) -> Tensor", lambda x, other: torch.empty_like(x))
def after(x, other):
    """A copy of x that the compiler must make when `other` exists."""
    return x.clone()


@_operator("add_product_(Tensor(a!) out, Tensor a, Tensor b) -> ()", lambda out, a, b: None)
def add_product_(out, a, b):
    """out += a @ b in place. As aten.addmm the sum would be a copy of `out` and a product."""
    out.addmm_(a, b)


@functools.cache
def _bitsandbytes():
    import bitsandbytes.functional

    return bitsandbytes.functional


# --------------------------------------------------------------------------------------------------
# The gated MLP's middle, act(gate) * up, with the LoRA products of gate, up and down inside


@triton.jit
def _rows_of(ptr, rows, n, pitch, RANK: tl.constexpr, K: tl.constexpr):  # [rows, K] of [n, RANK]
    k = tl.arange(0, K)
    at = ptr + rows[:, None].to(tl.int64) * pitch + k[None, :]
    return tl.load(at, mask=(rows < n)[:, None] & (k < RANK)[None, :], other=0.0)


@triton.jit
def _cols_of(ptr, cols, width, k_stride, stride, RANK: tl.constexpr, K: tl.constexpr):  # [K, cols]
    k = tl.arange(0, K)
    at = ptr + k[:, None] * k_stride + cols[None, :].to(tl.int64) * stride
    return tl.load(at, mask=(k < RANK)[:, None] & (cols < width)[None, :], other=0.0)


@triton.jit
def _sigmoid(x):
    r = tl.rsqrt(1 + tl.exp2(-1.4426950408889634 * x))  # under half of tl.sigmoid's instructions
    return r * r


@triton.jit
def _activation(x, GELU: tl.constexpr):
    """(value, slope) of silu or of gelu's tanh form."""
    if GELU:
        t = 2 * _sigmoid(2 * 0.7978845608028654 * (x + 0.044715 * x * x * x)) - 1
        inner = 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
        return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * inner
    s = _sigmoid(x)
    value = x * s
    return value, s + value * (1 - s)


@triton.jit(do_not_specialize=["steps"])
def _gated_kernel(y_ptr, xa_ptr, b_ptr, act_ptr, dact_ptr, ga_ptr, a_ptr, dy_ptr, grads_ptr,
                  n, width, y_pitch, xa_pitch, b_pitch, dy_pitch, steps,
                  GATE: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr, K: tl.constexpr,
                  GELU: tl.constexpr, BACKWARD: tl.constexpr, ACT: tl.constexpr,
                  M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    # A program keeps its columns of B and goes down `steps` tiles of rows, loading ahead. The
    # grid's first axis runs along a row of memory, so neighbours write one after the other.
    # Backward, it adds up over its rows what LoRA's gradients need of tiles that it has anyway.
    cols = tl.program_id(0) * N + tl.arange(0, N)
    gate_b = _cols_of(b_ptr, cols, width, 1, b_pitch, GATE, K)
    up_b = _cols_of(b_ptr + width.to(tl.int64) * b_pitch + GATE, cols, width, 1, b_pitch, UP, K)
    if BACKWARD:
        down_a = _cols_of(a_ptr, cols, width, width, 1, DOWN, K)
        gate_sum = tl.zeros((N, K), tl.float32)
        up_sum = tl.zeros((N, K), tl.float32)
        down_sum = tl.zeros((N, K), tl.float32)
    first = tl.program_id(1) * steps * M
    for i in tl.range(0, min(steps, tl.cdiv(n - first, M)), num_stages=STAGES):
        rows = first + i * M + tl.arange(0, M)
        mask = (rows < n)[:, None] & (cols < width)[None, :]
        row = rows[:, None].to(tl.int64)
        y_at = y_ptr + row * y_pitch + cols[None, :]
        gate = tl.load(y_at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(y_at + width, mask=mask, other=0.0).to(tl.float32)
        gate_xa = _rows_of(xa_ptr, rows, n, xa_pitch, GATE, K)
        up_xa = _rows_of(xa_ptr + GATE, rows, n, xa_pitch, UP, K)
        gate = tl.dot(gate_xa, gate_b, acc=gate)
        up = tl.dot(up_xa, up_b, acc=up)
        value, slope = _activation(gate, GELU)
        act = (value * up).to(act_ptr.dtype.element_ty)
        if BACKWARD:
            dact = tl.load(dact_ptr + row * width + cols[None, :], mask=mask, other=0.0)
            ga = _rows_of(ga_ptr, rows, n, DOWN, DOWN, K)
            dact = tl.dot(ga, down_a, acc=dact.to(tl.float32))
            dy_at = dy_ptr + row * dy_pitch + cols[None, :]
            dgate = (dact * up * slope).to(act.dtype)
            dup = (dact * value).to(act.dtype)
            tl.store(dy_at, dgate, mask=mask)
            tl.store(dy_at + width, dup, mask=mask)
            if GATE:
                gate_sum = tl.dot(tl.trans(dgate), gate_xa, acc=gate_sum)
            if UP:
                up_sum = tl.dot(tl.trans(dup), up_xa, acc=up_sum)
            if DOWN:
                down_sum = tl.dot(tl.trans(act), ga, acc=down_sum)
        if ACT:
            tl.store(act_ptr + row * width + cols[None, :], act, mask=mask)
    if BACKWARD:
        k = tl.arange(0, K)
        size = width.to(tl.int64) * K
        at = grads_ptr + tl.program_id(1) * 3 * size + cols[:, None].to(tl.int64) * K + k[None, :]
        inside = (cols < width)[:, None] & (k < K)[None, :]
        if GATE:
            tl.store(at, gate_sum, mask=inside)
        if UP:
            tl.store(at + size, up_sum, mask=inside)
        if DOWN:
            tl.store(at + 2 * size, down_sum, mask=inside)


def _tiles(sm, backward):
    """(rows, columns, warps, tiles of rows, stages). On an H200 at 8192 x 14336 of r = 32 these
    take 190 to 230 us forward and 440 us backward; the backward's bytes alone would take 280."""
    # Elsewhere there is less shared memory; Turing has no asynchronous copies to it
    if 90 <= sm < 120:
        return (32, 64, 4 if sm < 100 else 8, 32, 3) if backward else (64, 64, 8, 4, 3)
    if sm >= 80:
        return (32, 32, 4, 16, 2) if backward else (32, 64, 8, 4, 2)
    return (32, 32, 4, 16 if backward else 4, 1)


def _padded(ranks):
    """Columns that the kernel's products over ranks have: a power of two."""
    return max(16, triton.next_power_of_2(max(ranks)))


def _lora_shape(y, ranks):
    """Of LoRA's gradients, as gated_grads describes them."""
    return (3, y.shape[1] // 2, _padded(ranks)) if any(ranks) else (0,)


def _launch_gated(y, xa, b, act, ranks, activation, dact=None, ga=None, a=None, dy=None):
    """Writes act, unless it is None; with dact also dy, and returns the LoRA gradients."""
    n, width = y.shape[0], y.shape[1] // 2
    backward = dact is not None
    major, minor = torch.cuda.get_device_capability(y.device) if y.is_cuda else (9, 0)
    m, cols, warps, steps, stages = _tiles(10 * major + minor, backward)
    if backward:  # each group of rows has sums of its own: at most 16 groups
        steps = max(steps, triton.cdiv(n, 16 * m))
    grid = triton.cdiv(width, cols), triton.cdiv(n, m * steps)
    extra, dy_pitch = (y,) * 5, 0
    if backward:
        grads = y.new_empty((grid[1], *_lora_shape(y, ranks)), dtype=torch.float32)
        extra, dy_pitch = (dact, ga, a, dy, grads), dy.stride(0)
    pitches = y.stride(0), xa.stride(0), b.stride(0), dy_pitch
    if n and width:
        with torch.cuda.device(y.device) if y.is_cuda else contextlib.nullcontext():
            _gated_kernel[grid](y, xa, b, y if act is None else act, *extra, n, width, *pitches,
                                steps, *ranks, _padded(ranks), activation == "gelu_tanh", backward,
                                act is not None, m, cols, stages, num_warps=warps)  # fmt: skip
    return grads.sum(0) if backward else None


def _gate_up(y, xa, b):
    """gate and up with their LoRA products, float32."""
    sums = y.float()
    if xa.numel():
        sums = sums + xa.float() @ b.float().t()
    return sums.chunk(2, -1)


def _empty_act(y, *_):
    return y.new_empty((y.shape[0], y.shape[1] // 2))


@_operator(
    "gated(Tensor y, Tensor xa, Tensor b, int[] ranks, str activation) -> Tensor", _empty_act
)
def gated(y, xa, b, ranks, activation):
    """act(gate) * up of y [n, 2 m] + xa [n, r] @ b.T [r, 2 m], gate's half first: [n, m]."""
    if not _by_kernel(y):
        gate, up = _gate_up(y, xa, b)
        return (ACTIVATIONS[activation](gate) * up).to(y.dtype)
    act = _empty_act(y)
    _launch_gated(y, xa, b, act, ranks, activation)
    return act


def _gated_grads(y, xa, b, dact, ga, a, ranks, activation, dy, act):
    """Fills dy and, unless it is None, act; returns the LoRA gradients."""
    if _by_kernel(y):
        return _launch_gated(y, xa, b, act, ranks, activation, dact, ga, a, dy)
    gate, up = _gate_up(y, xa, b)
    grad = dact.float()
    if ga.numel():
        grad = grad + ga.float() @ a.float()
    value = ACTIVATIONS[activation](gate)
    sides = SLOPES[activation](grad * up, gate), grad * value, value * up
    grads = y.new_zeros(_lora_shape(y, ranks), dtype=torch.float32)
    inputs = *(xa.split(ranks[:2], -1) if any(ranks[:2]) else (None, None)), ga
    for out, side, x, rank in zip(grads, sides, inputs, ranks, strict=any(ranks)):
        if rank:
            out[:, :rank] = side.to(y.dtype).float().t() @ x.float()
    if act is not None:
        act.copy_(sides[2])  # which may be where dact is, and dy where y is
    for part, side in zip(dy.chunk(2, -1), sides, strict=False):
        part.copy_(side)
    return grads


_GRADS = "Tensor xa, Tensor b, {} dact, Tensor ga, Tensor a, int[] ranks, str activation, "
_GRADS += "bool keep)"


def _empty_grads(y, dact, keep):
    return y.new_empty(y.shape), y.new_empty(dact.shape if keep else (0,))


def _fake_lora(y, xa, b, dact, ga, a, ranks, activation, keep):
    return y.new_empty(_lora_shape(y, ranks), dtype=torch.float32)


@_operator(
    f"gated_grads(Tensor y, {_GRADS.format('Tensor')} -> (Tensor, Tensor, Tensor)",
    lambda y, *args: (*_empty_grads(y, args[2], args[-1]), _fake_lora(y, *args)),
)
def gated_grads(y, xa, b, dact, ga, a, ranks, activation, keep):
    """For the gradient dact + ga @ a of act: (dy, the gradient of y and so of gate and up; act
    again, [0] unless `keep`; [3, m, k] float32 in whose first columns are dgate.T @ xa's part for
    gate, dup.T @ xa's part for up, and act.T @ ga: LoRA's gradients; [0] if all ranks are 0)."""
    dy, act = _empty_grads(y, dact, keep)
    where = act if keep else None
    return dy, act, _gated_grads(y, xa, b, dact, ga, a, ranks, activation, dy, where)


@_operator(f"gated_grads_(Tensor(a!) y, {_GRADS.format('Tensor(b!)')} -> Tensor", _fake_lora)
def gated_grads_(y, xa, b, dact, ga, a, ranks, activation, keep):
    """gated_grads with dy in the place of y and, if `keep`, act in that of dact."""
    where = dact if keep else None
    return _gated_grads(y, xa, b, dact, ga, a, ranks, activation, y, where)


def _by_kernel(y):
    """Half precision on a GPU, or in Triton's interpreter. (float32 has no use of tensor cores.)"""
    interpreted = isinstance(_gated_kernel, InterpretedFunction)
    return (y.is_cuda or interpreted) and y.dtype != torch.float32


# --------------------------------------------------------------------------------------------------
# Projections: x W^T + bias + scaling (x A^T) B^T, W in 4 bits and frozen


class Side(NamedTuple):
    """What a group of projections of one input is, apart from its tensors."""

    rows: tuple[int, ...]  # output features of each
    columns: int  # input features
    dtype: torch.dtype  # of the products
    ranks: tuple[int, ...]  # 0: no adapter
    scales: tuple[float, ...]
    by: str  # "nf4_triton" or "bnb": which code dequantises


def _weight(side, packed, tail=None, grad=None):
    """The dequantised weights [sum of rows, columns] of a side, and `tail` below them."""
    if side.by == "nf4_triton":
        return stacked(packed, side.rows, side.columns, side.dtype, tail, grad)
    weights = [] if tail is None else [tail]
    for weight in reversed(packed):  # as bitsandbytes.functional.dequantize_4bit, by its operators
        state = weight.quant_state
        absmax = state.absmax if grad is None else after(state.absmax, grad)
        if state.nested:
            absmax = _bitsandbytes().dequantize_blockwise(absmax, state.state2) + state.offset
        kind = state.blocksize, state.quant_type, state.shape, state.dtype
        out = torch.ops.bitsandbytes.dequantize_4bit.default(weight, absmax.float(), *kind)
        weights.insert(0, out.to(side.dtype))
    return torch.cat(weights) if len(weights) > 1 else weights[0]


def _adapters(side, a, b):
    """A stacked [sum of ranks, columns] and the scaled B as blocks [sum of rows, sum of ranks]."""
    like = next(t for t in a if t is not None)
    empty = lambda rows: like.new_empty((rows, 0), dtype=side.dtype)
    stack = torch.cat([t.to(side.dtype) for t in a if t is not None])
    scaled = zip(b, side.scales, side.rows, strict=True)
    return stack, torch.block_diag(
        *(empty(rows) if t is None else (t * scale).to(side.dtype) for t, scale, rows in scaled)
    )


def _project(side, flat, packed, biases, a, b, add=True):
    """(y [n, sum of rows], x A^T [n, sum of ranks], A, B); without `add` y lacks the LoRA product.
    x A^T comes out of the product with W, as its last columns: alone it would read x once more."""
    width, rank = sum(side.rows), sum(side.ranks)
    a, b = _adapters(side, a, b) if rank else (None, None)
    joint = rank and _joint(side)
    w = _weight(side, packed, a if joint else None)
    more = rank if joint else 0
    if any(bias is not None for bias in biases):
        zeros = lambda bias, rows: flat.new_zeros(rows) if bias is None else bias.to(side.dtype)
        bias = [zeros(*pair) for pair in zip(biases, side.rows, strict=True)]
        both = torch.addmm(torch.cat([*bias, flat.new_zeros(more)]), flat, w.t())
    else:
        both = flat @ w.t()
    if not rank:
        return both, None, None, None
    y, xa = both.split([width, rank], -1) if joint else (both, flat @ a.t())
    if add:  # and a copy of what the backward keeps, or it would keep all of `both`
        xa = xa.contiguous()
        add_product_(y, xa, b.t())
    return y, xa, a, b


def _joint(side):
    """Whether LoRA's products can be columns of others: rows stay multiples of 16 bytes, which
    tensor cores' fast paths ask for."""
    return any(side.ranks) and sum(side.ranks) % 8 == 0


def _diagonal(side, blocks):
    """The blocks [rows, rank] on the diagonal of [sum of rows, sum of ranks]."""
    columns = blocks.split(side.ranks, -1)
    return [t.split(side.rows)[i] for i, t in enumerate(columns)]


def _input_grad(side, g, packed, a, b):
    """(dx, g B [n, sum of ranks]) for the gradient g [n, sum of rows] of y."""
    dx = g @ _weight(side, packed, grad=g)
    if not any(side.ranks):
        return dx, None
    ga = g @ b
    add_product_(dx, ga, a)
    return dx, ga


def _lora_grads(side, g, flat, xa, ga, da=None, dbs=None):
    """(dA list, dB list). da [sum of ranks, columns] and dbs, a list of [rows, rank] without their
    scales, where the gated kernel has made them."""
    if not any(side.ranks):
        return [None] * len(side.ranks), [None] * len(side.ranks)
    da = ga.t() @ flat if da is None else da  # of all projections in one product
    dbs = _diagonal(side, g.t() @ xa) if dbs is None else dbs  # likewise
    scaled = zip(dbs, side.scales, side.ranks, strict=True)
    dbs = [t.float() * scale if rank else None for t, scale, rank in scaled]
    return [t.float() if len(t) else None for t in da.split(side.ranks)], dbs


def _split(tensors, count):
    return [list(tensors[i : i + count]) for i in range(0, len(tensors), count)]


class _Projections(torch.autograd.Function):
    """(side, x, *packed, *biases, *A, *B) -> one output for each projection."""

    @staticmethod
    def forward(ctx, side, x, *tensors):
        packed, biases, a, b = _split(tensors, len(side.rows))
        flat = x.reshape(-1, side.columns).to(side.dtype)
        y, xa, a_stack, b_blocks = _project(side, flat, packed, biases, a, b)
        ctx.side, ctx.shape, ctx.dtype = side, x.shape, x.dtype
        ctx.kinds = [None if t is None else t.dtype for t in (*a, *b)]
        ctx.save_for_backward(flat, xa, a_stack, b_blocks, *packed)
        # Outputs must be tensors of their own: of two names for one tensor Dynamo (torch 2.11)
        # gives the gradient to the other. v alone is kept for the backward, not all of y.
        y = y.to(x.dtype).view(*x.shape[:-1], -1)
        if len(side.rows) == 1 and not any(side.ranks):
            return (y,)
        return tuple(part.clone(memory_format=KEEP) for part in y.split(side.rows, -1))

    @staticmethod
    def backward(ctx, *grads):
        side, (flat, xa, a, b, *packed) = ctx.side, ctx.saved_tensors
        pairs = zip(grads, side.rows, strict=True)
        parts = [g.reshape(-1, rows).to(side.dtype) for g, rows in pairs]
        if len(parts) == 1 or not _joint(side):
            g = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
            dx, ga = _input_grad(side, g, packed, a, b)
        else:  # dx with its LoRA product as one: [g, g B] @ [W; A]
            blocks = _diagonal(side, b)
            gas = [g @ block for g, block in zip(parts, blocks, strict=True) if block.shape[1]]
            both = torch.cat([*parts, *gas], -1)
            dx = both @ _weight(side, packed, a, both)
            g, ga = both.split([sum(side.rows), sum(side.ranks)], -1)
        das, dbs = _lora_grads(side, g, flat, xa, ga)
        cast = [g if g is None else g.to(k) for g, k in zip(das + dbs, ctx.kinds, strict=True)]
        frozen = [None] * (2 * len(side.rows))
        return None, dx.view(ctx.shape).to(ctx.dtype), *frozen, *cast


class _GatedMLP(torch.autograd.Function):
    """down(act(gate(x)) * up(x)): (up side, down side, activation, recompute, the largest rank that
    the activation's kernel adds, x, tensors)."""

    @staticmethod
    def forward(ctx, up, down, activation, recompute, most, x, *tensors):
        packed, biases, a, b = _split(tensors[:8], 2)
        (down_packed,), (down_bias,), (down_a,), (down_b,) = _split(tensors[8:], 1)
        flat = x.reshape(-1, up.columns).to(up.dtype)
        fused = max(*up.ranks, *down.ranks) <= most
        y, xa, a_stack, b_blocks = _project(up, flat, packed, biases, a, b, add=not fused)
        xa_in, b_in, ranks = _inside(up, fused, y, xa, b_blocks)
        act = gated(y, xa_in, b_in, [*ranks, 0], activation)
        out, act_a, down_stack, down_blocks = _project(
            down, act, [down_packed], [down_bias], [down_a], [down_b]
        )
        ctx.spec = up, down, activation, recompute, fused, x.shape, x.dtype
        ctx.kinds = [None if t is None else t.dtype for t in (*a, *b, down_a, down_b)]
        if recompute:  # from act, which the backward makes anyway
            act_a = None
        ctx.save_for_backward(
            flat, y, xa, a_stack, b_blocks, act_a, down_stack, down_blocks, *packed, down_packed
        )
        return out.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        up, down, activation, recompute, fused, shape, dtype = ctx.spec
        flat, y, xa, a, b, act_a, down_a, down_b, *packed, down_packed = ctx.saved_tensors
        g = grad.reshape(-1, sum(down.rows)).to(down.dtype)
        # Recomputed, y comes first: its weights and dact are then not there at one time
        dact = g @ _weight(down, [down_packed], grad=y if recompute else g)
        ga = None if down_b is None else g @ down_b
        if ga is not None and not fused:
            add_product_(dact, ga, down_a)
        more = _inside(down, fused, dact, ga, down_a)
        xa_in, b_in, ranks = _inside(up, fused, y, xa, b)
        ranks = [*ranks, *more[2]]
        keep = down_a is not None and (recompute or not fused)
        args = xa_in, b_in, dact, *more[:2], ranks, activation, keep
        if recompute:  # y is the backward's own
            by_kernel = gated_grads_(y, *args)
            dy, act = y, dact
        else:
            dy, act, by_kernel = gated_grads(y, *args)
        if down_a is not None and act_a is None:
            act_a = act @ down_a.t()
        db_gate_up = down_da = None
        if any(ranks):
            *db_gate_up, down_da = (t[:, :rank] for t, rank in zip(by_kernel, ranks, strict=True))
            down_da = down_da.t()
        (down_da,), (down_db,) = _lora_grads(down, g, act, act_a, ga, da=down_da)
        dx, up_ga = _input_grad(up, dy, packed, a, b)
        das, dbs = _lora_grads(up, dy, flat, xa, up_ga, dbs=db_gate_up)
        grads = [*das, *dbs, down_da, down_db]
        cast = [g if g is None else g.to(k) for g, k in zip(grads, ctx.kinds, strict=True)]
        dx, none = dx.view(shape).to(dtype), [None] * 5
        # packed, biases, A, B of gate and up; then of down
        return *none, dx, *none[:4], *cast[:4], None, None, *cast[4:]


def _inside(side, fused, like, left, right):
    """(left, right, ranks) of a LoRA product for the gated kernel; empty if it is not its task."""
    if fused and any(side.ranks):
        return left, right, list(side.ranks)
    nothing = like.new_empty((0, 0))
    return nothing, nothing, [0] * len(side.ranks)


class Part(NamedTuple):
    """A projection as its module stands now."""

    layer: torch.nn.Module  # bitsandbytes' Linear4bit
    a: Tensor | None
    b: Tensor | None
    scale: float


def _part(module) -> Part | None:
    """What the fused paths need of a Linear4bit or of PEFT's LoRA around one; None if it does more:
    dropout, DoRA, several adapters, a bias in B."""
    if not hasattr(module, "lora_A"):
        return Part(module, None, None, 1.0)
    if module.disable_adapters or module.merged:
        return Part(module.base_layer, None, None, 1.0)
    active = [name for name in module.active_adapters if name in module.lora_A]
    if not active:
        return Part(module.base_layer, None, None, 1.0)
    name = active[0]
    if len(active) > 1 or name in module.lora_variant or module.lora_bias[name]:
        return None
    if module.training and not isinstance(module.lora_dropout[name], torch.nn.Identity):
        return None
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    return Part(module.base_layer, a, b, guard_scalar(module.scaling[name]))


def _side(parts, x, by):
    layers, a, b, scales = zip(*parts, strict=True)
    side = Side(
        rows=tuple(layer.out_features for layer in layers),
        columns=layers[0].in_features,
        dtype=layers[0].compute_dtype or x.dtype,
        ranks=tuple(0 if t is None else t.shape[0] for t in a),
        scales=tuple(scales),
        by=by,
    )
    return side, [layer.weight for layer in layers] + [layer.bias for layer in layers] + [*a, *b]


class _Group:
    """The projections of one input. The first that is called computes all, the others take theirs,
    if they are given that very input."""

    def __init__(self, modules, by):
        self.modules, self.by, self.kept = modules, by, None


def _projection_forward(self, x, *args, **kwargs):
    group, index = self._qlora
    kept = group.kept
    if kept is not None and kept[0] is x:
        if index == len(group.modules) - 1:
            group.kept = None
        return kept[1][index]
    parts = [_part(module) for module in group.modules] if index == 0 else [None]
    if any(part is None for part in parts):
        part = _part(self)
        if part is None:  # PEFT's own, whose base layer comes back to the line below
            return type(self).forward(self, x, *args, **kwargs)
        side, tensors = _side([part], x, group.by)
        return _Projections.apply(side, x, *tensors)[0]
    side, tensors = _side(parts, x, group.by)
    outputs = _Projections.apply(side, x, *tensors)
    if len(outputs) > 1:
        group.kept = x, outputs
    return outputs[0]


def _mlp_forward(self, x):
    by, *how = self._qlora
    parts = [_part(module) for module in (self.gate_proj, self.up_proj, self.down_proj)]
    if any(part is None for part in parts):
        return type(self).forward(self, x)
    up, up_tensors = _side(parts[:2], x, by)
    down, down_tensors = _side(parts[2:], x, by)
    return _GatedMLP.apply(up, down, *how, x, *up_tensors, *down_tensors)


def _is_4bit(module):
    import bitsandbytes as bnb

    return isinstance(getattr(module, "base_layer", module), bnb.nn.Linear4bit)


def _activation_name(mlp) -> str | None:
    probe = torch.linspace(-4, 4, 9)
    act = getattr(mlp, "act_fn", None)
    if not callable(act):
        return None
    got = act(probe)
    return next((n for n, fn in ACTIVATIONS.items() if torch.allclose(fn(probe), got)), None)


def fuse(
    model,
    *,
    dequant: str = "nf4_triton",
    recompute: bool = False,
    peft_rounding: bool = False,
):
    """Every 4-bit projection and gated MLP of `model`, with or without LoRA, through this file's
    functions. In place; returns model.

    model: a transformers causal language model whose linear layers are bitsandbytes Linear4bit,
    usually inside a PEFT model; attn_implementation="flex_attn" is the caller's. Outputs and
    gradients equal PEFT's within the rounding of the compute dtype. dequant: "nf4_triton", or
    "bnb" for bitsandbytes' own operators. recompute: activations are recomputed in the backward
    (compile_model with checkpointing), which may then overwrite them. peft_rounding: LoRA's
    products for gate and up are rounded to the compute dtype before the activation, as PEFT does;
    the kernel keeps them in float32. ValueError if the model has no 4-bit layer.
    """
    _need(dequant in ("nf4_triton", "bnb"), "dequant", repr(dequant), "nf4_triton or bnb")
    layers = {m for m in model.modules() if _is_4bit(m)}
    _need(layers, "model", f"a {type(model).__name__} without a 4-bit layer", "one loaded in NF4")
    wrapped = {m.base_layer for m in layers if hasattr(m, "base_layer")}
    groups = [[m] for m in wrapped]
    for parent in model.modules():
        for names in GROUPS:
            found = [getattr(parent, name, None) for name in names]
            if all(m in layers for m in found) and len({_columns(m) for m in found}) == 1:
                groups.append(found)
        mlp = [getattr(parent, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if all(m in layers for m in mlp) and (name := _activation_name(parent)):
            most = 0 if peft_rounding else FUSED_RANK
            parent._qlora = dequant, name, recompute, most
            parent.forward = types.MethodType(_mlp_forward, parent)
    grouped = {m for group in groups for m in group}
    for group in [*groups, *([m] for m in layers - grouped)]:
        shared = _Group(group, dequant)
        for index, module in enumerate(group):
            module._qlora = shared, index
            module.forward = types.MethodType(_projection_forward, module)
    return model


def _columns(module):
    return getattr(module, "base_layer", module).in_features


# --------------------------------------------------------------------------------------------------
# Regions: what is compiled by itself. Their names are what the compiler's own reports say.


def block(module, *args, **kwargs):
    return type(module).forward(module, *args, **kwargs)


def embedding(module, ids):
    return type(module).forward(module, ids)


def rotary(module, like, position_ids):
    return type(module).forward(module, like, position_ids)


def norm(module, hidden):
    return type(module).forward(module, hidden)


def loss(hidden, weight, labels, num_items, **options):
    return chunked_ce.linear_cross_entropy(hidden, weight, labels, num_items=num_items, **options)


REGIONS = {f.__name__: f for f in (embedding, rotary, block, norm, loss)}


@functools.cache
def _choices():
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint

    stock = InductorChoices.should_use_persistent_reduction

    class Choices(InductorChoices):
        """Inductor's own, but that sums along a row (of a norm) hold all of it in registers."""

        @staticmethod
        def should_use_persistent_reduction(features, cooperative_reduction):
            inner = features.get_reduction_hint() == ReductionHint.INNER
            count = features.reduction_numel
            if inner and not cooperative_reduction and count.is_number and count <= 8192:
                return True
            return stock(features, cooperative_reduction)

    return Choices()


class Graph(NamedTuple):
    """One compilation: a Dynamo graph, its forward and, if it needs gradients, its backward."""

    region: str
    backward: bool
    seconds: float  # tracing, partition, code generation and the compilers' own time
    cause: str


class Compiled:
    """The compiled regions of one model, and what the compiler says about them."""

    def __init__(self, backend="inductor", checkpointing=False, max_autotune=False):
        self.backend, self.checkpointing = backend, checkpointing
        self.options = {"max_autotune_gemm": max_autotune, "triton.cudagraphs": False}
        self.options |= {"epilogue_fusion": True, "shape_padding": True}
        self.eager = []  # what is left eager, and why
        self.winners = collections.Counter()  # of max_autotune, by kind
        self.backwards = {name: [] for name in REGIONS}
        self.before = len(_metrics())
        self.kernels_before = _kernels()
        compile_ = functools.partial(torch.compile, fullgraph=True, dynamic=True)
        self.functions = {
            name: compile_(function, backend=functools.partial(self._run_backend, name))
            for name, function in REGIONS.items()
        }
        if max_autotune and torch.cuda.is_available():
            from torch._inductor.select_algorithm import add_feedback_saver

            add_feedback_saver(self._note_winner)

    def _run_backend(self, region, graph, inputs):
        wants = torch.is_grad_enabled() and any(getattr(t, "requires_grad", 0) for t in inputs)
        self.backwards[region].append(wants)
        # Settings of the partition hold while a graph is compiled, not for the process
        partition = {
            "ban_recompute_used_far_apart": False,
            "ban_recompute_long_fusible_chains": False,
            "ban_recompute_materialized_backward": False,
            "activation_memory_budget": 0.0 if self.checkpointing and region == "block" else 1.0,
            "autograd_cache_allow_custom_autograd_functions": True,
        }
        with torch._functorch.config.patch(partition):
            if self.backend != "inductor":
                return torch._dynamo.lookup_backend(self.backend)(graph, inputs)
            from torch._inductor.compile_fx import compile_fx
            from torch._inductor.virtualized import V

            if _tf32_is_torn():  # TrainingArguments(tf32=True), in somebody's own script
                _set_tf32(torch.backends.cuda.matmul.fp32_precision == "tf32")
            with V.set_choices_handler(_choices()):
                return compile_fx(graph, inputs, config_patches=self.options)

    def _note_winner(self, timings, *_):
        if timings:
            best = min(timings, key=timings.get)
            self.winners["cuBLAS" if "Extern" in type(best).__name__ else "Triton"] += 1

    def graphs(self) -> list[Graph]:
        """Every compilation so far, in order, with its time and cause."""
        seen, found = collections.Counter(), []
        for entry in _metrics()[self.before :]:
            if entry.co_name in REGIONS and entry.is_forward:
                backwards = self.backwards[entry.co_name]
                i = seen[entry.co_name]
                if i < len(backwards):
                    reason = (entry.recompile_reason or "").split(": ", 1)[-1].split("\n")[0]
                    cause = reason.split("  #")[0].strip() or "first call"
                    seconds = (entry.duration_us or 0) / 1e6
                    found.append(Graph(entry.co_name, backwards[i], seconds, cause))
                    seen[entry.co_name] += 1
        return found

    def kernels(self) -> tuple[int, int]:
        """Triton kernels of inductor (compiled, taken from its cache); on a CPU C++ kernels."""
        return tuple(a - b for a, b in zip(_kernels(), self.kernels_before, strict=True))

    def report(self) -> list[str]:
        graphs = self.graphs()
        backward, seconds = sum(g.backward for g in graphs), sum(g.seconds for g in graphs)
        compiled, cached = self.kernels()
        total = len(graphs) + backward
        first = f"{len(graphs)} Dynamo graphs, each whole (fullgraph), graph breaks "
        first += f"{_breaks().total()}; AOT graphs {len(graphs)} forward + {backward} "
        first += f"backward = {total} compilations; kernels {compiled} compiled, {cached} from the "
        lines = [f"compiled: {first}cache; {seconds:.1f} s"]
        for g in graphs:
            both = "forward + backward" if g.backward else "forward"
            lines.append(f"  {g.region:<10} {both:<18} {g.seconds:6.1f} s  {g.cause}")
        lines += _break_lines()
        lines += [f"  eager: {why}" for why in self.eager]
        if self.options["max_autotune_gemm"]:
            lines.append("  max_autotune: " + self._tuning())
        return lines

    def _tuning(self):
        if not torch.cuda.is_available():
            return "inductor tunes Triton products on GPUs only"
        count = torch.cuda.get_device_properties(0).multi_processor_count
        if count < MANY_SMS:
            return (
                f"inductor skips Triton products on GPUs under {MANY_SMS} SMs; this one has {count}"
            )
        won = ", ".join(f"{kind} {n}" for kind, n in sorted(self.winners.items())) or "none"
        return f"fastest of each tuned product: {won}"


def _metrics():
    from torch._dynamo import utils

    utils.set_compilation_metrics_limit(4096)  # 64 are kept without this
    return utils.get_compilation_metrics()


def _breaks() -> collections.Counter:
    from torch._dynamo.utils import counters

    return collections.Counter(
        {" ".join(k.split())[:160]: n for k, n in counters["graph_break"].items()}
    )


def _break_lines():
    return [f"  graph break x{n}: {reason}" for reason, n in _breaks().items()]


def _kernels():
    from torch._dynamo.utils import counters
    from torch._inductor import metrics

    gpu = counters["inductor"]
    made = gpu["async_compile_cache_miss"] or metrics.generated_kernel_count
    return made, gpu["async_compile_cache_hit"]


def no_recompiles():
    """A context in which whatever would compile anew raises torch._dynamo.exc.RecompileError."""
    return torch._dynamo.config.patch(error_on_recompile=True)


class _Waiting:
    """A block's input in pinned host memory, and on the GPU again shortly before its backward."""

    def __init__(self, offload, tensor, move):
        self.offload, self.device, self.ready, self.host = offload, tensor, None, None
        self.before, offload.latest = offload.latest, weakref.ref(self)
        self.shape, self.dtype = tensor.shape, tensor.dtype
        if move:
            self.host, self.device = offload.buffer(tensor.nbytes), None
            side = offload.stream
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.view(self.host).copy_(tensor, non_blocking=True)
            tensor.record_stream(side)

    def view(self, bytes_):
        size = self.shape.numel() * self.dtype.itemsize
        return bytes_[:size].view(self.dtype).view(self.shape)

    def fetch(self):
        if self.device is None:
            with torch.cuda.stream(self.offload.stream):
                self.device = self.view(self.host).to("cuda", non_blocking=True)
                self.ready = self.offload.stream.record_event()

    def __del__(self):  # copies to and from it are in order on the one stream
        if self.host is not None:
            self.offload.free[self.host.numel()].append(self.host)


class Offload:
    """Moves what checkpointed blocks keep to host memory while later blocks run, and back one block
    ahead of the backward. The copies run beside the kernels, on a stream of their own."""

    def __init__(self):
        self.free, self.latest = collections.defaultdict(list), lambda: None
        self.stream = torch.cuda.Stream()

    def buffer(self, size):
        size = 1 << (size - 1).bit_length()  # so that changing lengths find a buffer to reuse
        free = self.free[size]
        return free.pop() if free else torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def run(self, function, last, layer, hidden, *args, **kwargs):
        """function(layer, hidden, ...), its saved `hidden` away; the last block's stays."""
        pointer, shape = hidden.data_ptr(), hidden.shape  # autograd keeps pack, and pack these

        def pack(tensor):
            if tensor.data_ptr() != pointer or tensor.shape != shape:
                return tensor
            return _Waiting(self, tensor.detach(), not last)

        with torch.autograd.graph.saved_tensors_hooks(pack, self.unpack):
            return function(layer, hidden, *args, **kwargs)

    def unpack(self, kept):
        if isinstance(kept, Tensor):
            return kept
        kept.fetch()
        if before := kept.before():
            before.fetch()
        tensor, stream = kept.device, torch.cuda.current_stream()
        if kept.ready is not None:
            stream.wait_event(kept.ready)
            tensor.record_stream(stream)
            kept.device = kept.ready = None
        return tensor


def _flat(tensor):
    """[B, S, ...] as [B S, ...], and no view of it: guards would ask for its base's sizes too."""
    return torch.ops.aten._unsafe_view(tensor, [-1, *tensor.shape[2:]])


def _need_backend(backend, name):
    known = torch._dynamo.list_backends(exclude_tags=None)
    _need(backend in known, name, repr(backend), f"one of {', '.join(known)}")


def compile_model(
    model,
    *,
    backend: str = "inductor",
    checkpointing: bool = False,
    offload: bool = False,
    max_autotune: bool = False,
):
    """Compiles every region of a transformers causal language model, usually one that `fuse` has
    prepared. In place; returns model, whose `compiled_regions` is a Compiled.

    backend: a torch.compile backend. checkpointing: each block keeps its inputs alone and
    recomputes the rest in the backward, by the partitioner; with dropout by transformers' own way.
    offload: those inputs wait in pinned host memory. max_autotune: inductor times Triton kernels
    against cuBLAS for each product. generate() with a cache runs the blocks uncompiled. A region
    that cannot be compiled whole raises, with the reason, at its first call. ValueError for a
    backend that does not exist or a model whose blocks are not found.
    """
    _need_backend(backend, "backend")
    ok = not offload or model.get_input_embeddings().weight.is_cuda
    _need(ok, "offload", "a model on a CPU", "one on a GPU")
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner = causal.base_model
    parts = [getattr(inner, name, None) for name in ("layers", "norm", "rotary_emb")]
    found = f"a {type(causal).__name__} without layers, norm or rotary_emb"
    _need(None not in parts, "model", found, "a Llama, Mistral, Qwen, Gemma or one built like them")
    layers, last, rope = parts
    dropout = getattr(inner.config, "attention_dropout", 0.0)
    _need(not dropout, "attention_dropout", dropout, "0: the attention kernels have none")
    # The partitioner does not draw the same dropout twice: torch.utils.checkpoint does
    drops = any(isinstance(m, torch.nn.Dropout) and m.p for m in inner.modules())
    found = "eager, which drops others when it recomputes"
    ok = not (drops and checkpointing and backend == "eager")
    _need(ok, "backend", found, "another for checkpointing with dropout")
    compiled = Compiled(backend, checkpointing and not drops, max_autotune)
    run = compiled.functions
    if checkpointing:
        _checkpoint_blocks(causal, drops)
    # A batch's length must not be taken for the hidden size where the two are equal
    torch.fx.experimental._config.use_duck_shape = False

    def forward_embedding(self, ids):
        hidden = run["embedding"](self, torch.ops.aten._unsafe_view(ids.contiguous(), [-1]))
        hidden = torch.ops.aten._unsafe_view(hidden, [*ids.shape, -1])
        # The first block's input then is as every other's: one graph, for 0.3% of the products
        return hidden.requires_grad_() if torch.is_grad_enabled() else hidden

    def without_cache(_, args, kwargs):
        # A model called as it comes makes a cache, and blocks with one run uncompiled
        if torch.is_grad_enabled() and kwargs.get("past_key_values") is None:
            kwargs["use_cache"] = bool(kwargs.get("use_cache"))  # None: as the config has it
        return args, kwargs

    def positions(_, args, kwargs):
        # transformers asks positions whether they restart, and waits for a GPU's answer. Those
        # that it would make itself may as well be on the CPU.
        names = "position_ids", "attention_mask", "past_key_values", "inputs_embeds"
        if "input_ids" in kwargs and all(kwargs.get(name) is None for name in names):
            kwargs["position_ids"] = torch.arange(kwargs["input_ids"].shape[-1])[None]
        return args, kwargs

    def forward_rotary(self, hidden, position_ids):
        position_ids = position_ids.to(hidden.device, non_blocking=True).contiguous()
        like = hidden.new_empty((1, 1, hidden.shape[-1]))  # read for its dtype and device
        cos, sin = run["rotary"](self, like, torch.ops.aten._unsafe_view(position_ids, [1, -1]))
        shape = *position_ids.shape, -1
        return [torch.ops.aten._unsafe_view(t, shape) for t in (cos, sin)]

    def forward_norm(self, hidden):
        return run["norm"](self, _flat(hidden)).view(hidden.shape)

    def forward_loss(hidden, weight, labels, num_items=None, **options):
        labels = torch.ops.aten._unsafe_view(labels.contiguous(), [-1])
        if num_items is not None and not isinstance(num_items, Tensor):
            num_items = torch.tensor(float(num_items), device=hidden.device)  # data, no constant
        return run["loss"](_flat(hidden), weight, labels, num_items, **options)

    away = Offload() if offload and compiled.checkpointing else None

    def forward_block(self, hidden, *args, past_key_values=None, **kwargs):
        if past_key_values is not None:  # generate(): each layer's cache would be a graph
            more = {"past_key_values": past_key_values, **kwargs}
            return type(self).forward(self, hidden, *args, **more)
        if away is None:
            return run["block"](self, hidden, *args, **kwargs)
        return away.run(run["block"], self is layers[-1], self, hidden, *args, **kwargs)

    for layer in layers:
        layer.forward = types.MethodType(forward_block, layer)
    words = inner.get_input_embeddings()
    words.forward = types.MethodType(forward_embedding, words)
    kind = getattr(rope, "rope_type", "default")
    if "dynamic" in kind or kind == "longrope":
        compiled.eager.append(f"rotary: {kind} tables ask for the longest position")
    else:
        rope.forward = types.MethodType(forward_rotary, rope)
        inner.register_forward_pre_hook(positions, with_kwargs=True)
    inner.register_forward_pre_hook(without_cache, with_kwargs=True)
    last.forward = types.MethodType(forward_norm, last)
    chunked_ce.patch_causal_lm(model, check=False, loss=forward_loss)
    model.compiled_regions = compiled
    return model


# --------------------------------------------------------------------------------------------------
# Models and data


STACKS = {
    "hf": "transformers + PEFT + bitsandbytes, eager",
    "hf_blocks": "the same, blocks compiled (dynamic=True)",
    "ours": "this file's functions, eager",
    "ours_compiled": "the same, every region compiled",
}
COMPARED = "hf", "ours", "ours_compiled"  # of them, where nothing else is asked for


@dataclass
class ModelOptions:
    """What model, data and LoRA; what qlora_fsdp2.py adds to TrainingArguments too."""

    model: str | None = field(
        default=None, metadata={"help": "hub id or directory; none: a small random Llama"}
    )
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "hub id, directory or .json .jsonl .csv .parquet .txt file with a column text "
            "or messages; none: Python's own documentation"
        },
    )
    max_length: int = field(default=1024, metadata={"help": "tokens of a row at most"})
    packing: bool = field(default=False, metadata={"help": "several documents to a row"})
    lora_r: int = field(default=32, metadata={"help": "LoRA rank"})
    lora_alpha: float = field(default=64.0, metadata={"help": "scaling = lora_alpha / lora_r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "above 0 takes PEFT's own path"})
    target_modules: list[str] = field(
        default_factory=lambda: list(TARGETS), metadata={"help": "layers that get LoRA"}
    )
    dequant: str = field(
        default="nf4_triton", metadata={"help": "nf4_triton, or bnb: bitsandbytes' operator"}
    )
    peft_rounding: bool = field(
        default=False, metadata={"help": "gate and up rounded before the activation, as in PEFT"}
    )
    attention: str = field(default="auto", metadata={"help": "a backend of flex_attn"})
    max_autotune: bool = field(default=False, metadata={"help": "let inductor tune products"})
    offload: bool = field(
        default=False, metadata={"help": "checkpointed activations in pinned host memory (GPU)"}
    )
    test: bool = field(default=False, metadata={"help": "the self-test alone"})
    bench: bool = field(default=False, metadata={"help": "the timings alone"})
    fuzz: int | None = field(
        default=None,
        metadata={"help": "the random tests alone, with N cases each", "metavar": "N"},
    )
    only: str | None = field(
        default=None, metadata={"help": "timings, by name", "metavar": "NAMES"}
    )
    plot: str | None = field(
        default=None,
        metadata={"help": "loss curves as PNG (needs matplotlib)", "metavar": "PATH"},
    )
    json: str | None = field(
        default=None, metadata={"help": "also write the results as JSON", "metavar": "PATH"}
    )

    def __post_init__(self):
        _need(self.max_length > 1, "max_length", self.max_length, "2 or more tokens")
        _need(self.lora_r > 0, "lora_r", self.lora_r, "1 or more")
        ok = 0 < self.lora_alpha < math.inf
        _need(ok, "lora_alpha", self.lora_alpha, "a number above 0")
        _need(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "0 to below 1")
        ok = self.dequant in ("nf4_triton", "bnb")
        _need(ok, "dequant", repr(self.dequant), "nf4_triton or bnb")
        _need(self.fuzz is None or self.fuzz > 0, "fuzz", self.fuzz, "1 or more cases")


@dataclass
class Options(ModelOptions):
    """What this script adds to TrainingArguments."""

    stacks: str | None = field(
        default=None,
        metadata={
            "help": f"of {STACKS}; default hf,ours,ours_compiled, and where speed is timed "
            "hf,ours_compiled and, if it is installed, unsloth"
        },
    )
    controls: str = field(
        default="few",
        metadata={
            "help": "with hf, what the losses' differences are to be judged by: few is one more "
            "run, with the sums in another order; all: each order, PEFT's rounding, float32; none"
        },
    )
    only: str | None = field(
        default=None,
        metadata={
            "help": f"on a GPU, of {', '.join(TIMINGS)} (default: 1b; --plot adds challenge)",
            "metavar": "NAMES",
        },
    )
    log: bool = field(
        default=False, metadata={"help": "the compiler's words on breaks and recompilations"}
    )
    error_on_recompile: int = field(
        default=0, metadata={"help": "from this optimizer step on a recompilation is an error"}
    )


_import = importlib.import_module  # a dependency when it is needed; main says which is missing


@functools.cache
def _probe_hub():
    """Where the hub cannot be reached, whoever asks it is to fail at once, or to take what is cached:
    its client would try for half a minute, and again for the next file."""
    constants = _import("huggingface_hub").constants
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=5).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError:
        constants.HF_HUB_OFFLINE = True


def _causal_config(path):
    transformers = _import("transformers")
    if not Path(path).exists():
        _probe_hub()
    try:
        config = transformers.AutoConfig.from_pretrained(path)
    except Exception as error:  # noqa: BLE001 (a wrong field may raise anything)
        words = " ".join(str(error).split())[:160]
        need = "a directory with config.json, or a hub id and a network"
        raise ValueError(f"model: found {path!r} ({words}), need {need}") from None
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    names = config.architectures or []
    causal = causal and (not names or any("CausalLM" in n or "LMHead" in n for n in names))
    found = f"{', '.join(names) or type(config).__name__}"
    _need(causal, "model", found, "a causal language model")
    return config


def _nf4_config(dtype):
    """NF4 with nested scales, products in dtype."""
    how = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_type": "nf4"}
    return _import("transformers").BitsAndBytesConfig(**how, bnb_4bit_compute_dtype=dtype)


def _config_of(path, options):
    """(a checkpoint's text config, how its weights are quantised or None). ValueError if they are
    by another library than bitsandbytes, or rows may be too long for the model."""
    config = _causal_config(path)
    text = config.get_text_config()
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        get = (
            quantised.get if isinstance(quantised, dict) else functools.partial(getattr, quantised)
        )
        kind = get("quant_method", None)
        ok = "bitsandbytes" in str(kind) and get("load_in_4bit", False)
        _need(
            ok, "model", f"weights quantised by {kind}", "bitsandbytes' 4 bits, or 16-bit weights"
        )
    most = getattr(text, "max_position_embeddings", None) or options.max_length
    _need(options.max_length <= most, "max_length", options.max_length, f"{most} at most: {path}")
    return text, quantised


def _lora_config(options, **more):
    return _import("peft").LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=options.target_modules,
        **more,
    )


def load(path, stack, options, dtype, device):
    """(model with LoRA, tokenizer) for one of STACKS; 4-bit weights on `device`, dtype as the
    products'. A checkpoint that is quantised already is taken as it is, any other is quantised to
    NF4 with nested scales while it is loaded."""
    transformers, peft = _import("transformers"), _import("peft")
    text, quantised = _config_of(path, options)
    ours = stack.startswith("ours")
    capped = getattr(text, "attn_logit_softcapping", None)  # which transformers' SDPA leaves out
    attention = "flex_attn" if ours else "eager" if capped else "sdpa"
    if ours:
        flex_attn.register()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        device_map={"": device},
        attn_implementation=attention,
        **({} if quantised else {"quantization_config": _nf4_config(dtype)}),
    )
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            # A checkpoint may ask for bf16 where there is none. And bitsandbytes would round its
            # weights to that before it rounds them to the products' dtype.
            module.compute_dtype = module.weight.quant_state.dtype = dtype
    # transformers 5.23 leaves what is not quantised in a quantised checkpoint's own dtype
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.to(dtype)
    model.requires_grad_(False)
    model.config.use_cache = False
    linear = {n.split(".")[-1] for n, m in model.named_modules() if _is_4bit(m)}
    found = ", ".join(options.target_modules)
    _need(linear & {*options.target_modules}, "target_modules", found, f"of {', '.join(linear)}")
    return peft.get_peft_model(model, _lora_config(options)), _tokenizer(path)


def _tokenizer(path):
    tokenizer = _import("transformers").AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def prepare(model, stack, options, *, checkpointing=False, fixed=False, backend="inductor"):
    """Makes `model` what `stack` says. fixed: all batches have one length."""
    inner = model.get_base_model().base_model
    if stack.startswith("hf"):  # as QLoRA recipes do; bitsandbytes' product without it is another
        model.enable_input_require_grads()
    if stack == "hf_blocks":
        for layer in inner.layers:
            layer.compile(dynamic=True)
    compiled = stack == "ours_compiled"
    if stack.startswith("ours"):
        flex_attn.register(backend=_attention(options.attention, inner, fixed, options.packing))
        how = {"dequant": options.dequant, "peft_rounding": options.peft_rounding}
        fuse(model, recompute=checkpointing and compiled, **how)
        if not compiled:
            chunked_ce.patch_causal_lm(model, check=False)
    if compiled:
        how = {"max_autotune": options.max_autotune, "offload": options.offload and checkpointing}
        compile_model(model, backend=backend, checkpointing=checkpointing, **how)
    elif checkpointing:
        _checkpoint_blocks(model.get_base_model(), True)
    return model.train()


def _attention(backend, inner, fixed, packing):
    """For `auto` a backend by name: its rules ask for the length, and each answer is a graph more.
    flex_attn's own kernels where they run (Hopper); for plain causal masks elsewhere SDPA. cuDNN,
    which `auto` takes for those on Hopper, plans anew for each length: 84 ms on an H200, forward
    and backward, as often as there are lengths. Where they do not change (fixed) it is 6% faster at
    head size 128, and slower at 64."""
    layer, weight = inner.layers[0].self_attn, inner.get_input_embeddings().weight
    dim = getattr(layer, "head_dim", None)
    if backend != "auto" or dim is None:
        return backend
    special = packing or getattr(layer, "attn_logit_softcapping", None)
    special = special or any(getattr(m, "sliding_window", None) for m in inner.modules())
    q = torch.empty((1, 1, 256, dim), dtype=weight.dtype, device=weight.device)
    able = weight.is_cuda and flex_attn.supports("triton", q, q, q, flex_attn.Mask()) is None
    if able and (special or not fixed or dim <= 64):
        return "triton"
    return "auto" if special else "sdpa"


def _documents():
    """Python's own documentation by paragraphs: 1,500 rows of 64 to some 3,000 characters."""
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    paragraphs = "\n\n".join(topics[key] for key in sorted(topics)).split("\n\n")
    return [p for p in paragraphs if len(p) >= 64]


def load_texts(dataset, tokenizer) -> list[str]:
    """The rows of a dataset as text; its column is text, or messages for the chat template."""
    if dataset is None:
        return _documents()
    datasets = _import("datasets")
    kinds = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
    kinds[".txt"] = "text"
    kind = kinds.get(Path(dataset).suffix)
    try:
        if kind is not None and Path(dataset).is_file():
            rows = datasets.load_dataset(kind, data_files=dataset, split="train")
        else:
            if not Path(dataset).exists():
                _probe_hub()
            rows = datasets.load_dataset(dataset, split="train")
    except Exception as error:  # noqa: BLE001 (datasets raises a dozen kinds)
        words = str(error).strip().split("\n")[0][:120]
        found = f"{dataset!r} ({type(error).__name__}: {words})"
        need = (
            "a directory, a .json, .jsonl, .csv, .parquet or .txt file, or a hub id and a network"
        )
        raise ValueError(f"dataset: found {found}, need {need}") from None
    columns = rows.column_names
    _need(len(rows), "dataset", f"no row in {dataset!r}", "rows")
    if "text" in columns:
        texts = list(rows["text"])
        other = next((t for t in texts if not isinstance(t, str)), "")
        _need(other == "", "dataset", f"{other!r:.40} in the column text", "strings")
        return texts
    found = f"columns {', '.join(columns)}"
    _need("messages" in columns, "dataset", found, "a column text or messages")
    need = "one that has a chat template, or a dataset with a column text"
    _need(tokenizer.chat_template, "tokenizer", "no chat template for messages", need)
    try:
        return [tokenizer.apply_chat_template(m, tokenize=False) for m in rows["messages"]]
    except Exception as error:  # noqa: BLE001 (whatever a template's code raises)
        found = f"messages that the chat template refuses ({type(error).__name__}: {error!s:.120})"
        need = "lists of {role, content}"
        raise ValueError(f"dataset: found {' '.join(found.split())}, need {need}") from None


def tokenise(texts, tokenizer, max_length, packing=False) -> list[dict]:
    """Rows of input_ids and labels, cut at max_length. packing: several documents to a row, with
    position_ids that restart, and no label across them."""
    _need(max_length > 1, "max_length", max_length, "2 or more tokens")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [tokenizer(text)["input_ids"][: max_length - len(end)] + end for text in texts]
    ids = [row for row in ids if len(row) > 1]
    _need(ids, "dataset", "no row of two tokens or more", "text")
    if not packing:
        return [{"input_ids": row, "labels": row} for row in ids]
    rows = []
    for row in ids:
        if not rows or len(rows[-1]["input_ids"]) + len(row) > max_length:
            rows.append({"input_ids": [], "labels": [], "position_ids": []})
        rows[-1]["input_ids"] += row
        rows[-1]["labels"] += [chunked_ce.IGNORE, *row[1:]]
        rows[-1]["position_ids"] += range(len(row))
    return rows


@functools.lru_cache(1)
def _rows(path, dataset, max_length, packing):
    """A dataset's rows for a model's tokenizer, read once for all stacks."""
    tokenizer = _tokenizer(path)
    return tokenise(load_texts(dataset, tokenizer), tokenizer, max_length, packing)


@dataclass
class Collate:
    """A batch padded on the right, without a mask: no real token sees what comes after it, and the
    padding has no labels. One kind of mask is one kind of graph."""

    pad: int
    multiple: ClassVar[int] = 1  # the length is made one of

    def __call__(self, rows):
        # Packed rows get a token of padding more, where positions restart: else a batch of one
        # document a row has another kind of mask, and so another graph
        longest = max(len(row["input_ids"]) for row in rows) + ("position_ids" in rows[0])
        longest = -(-longest // self.multiple) * self.multiple
        values = {"input_ids": self.pad, "labels": chunked_ce.IGNORE, "position_ids": 0}
        fill = lambda row, name: [*row[name], *[values[name]] * (longest - len(row[name]))]
        names = [name for name in values if name in rows[0]]
        return {name: torch.tensor([fill(row, name) for row in rows]) for name in names}


def write_checkpoint(directory, config, *, quantised=True, device="cpu", seed=0, dtype=None):
    """A random model of `config` as transformers would save it, in NF4 or unquantised, with a
    tokenizer of bytes: what a hub would have. Weights N(0, initializer_range^2)."""
    transformers, bnb = _import("transformers"), _import("bitsandbytes")
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    dtype = dtype or torch.bfloat16
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    if quantised:
        for parent in list(model.base_model.layers.modules()):
            for name, layer in list(parent.named_children()):
                if type(layer) is torch.nn.Linear:
                    new = bnb.nn.Linear4bit(
                        layer.in_features, layer.out_features, layer.bias is not None, device="meta"
                    )
                    weight = bnb.nn.Params4bit(
                        layer.weight.data, requires_grad=False, quant_type="nf4", module=new
                    )
                    new.weight, new.bias = weight.to(device), layer.bias
                    setattr(parent, name, new)
        model.config.quantization_config = _nf4_config(dtype).to_dict()
    state = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    part = directory / "model.safetensors.part"
    save_file(state, part, metadata={"format": "pt"})
    part.replace(directory / "model.safetensors")
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    model.config.save_pretrained(directory)
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({sign: i for i, sign in enumerate(signs)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(directory)
    return directory


def _llama(size):
    """Configurations: Llama 3.2 1B, Llama 3.1 8B, and small ones."""
    shape = {
        "tiny": (128, 320, 2, 4, 2, 32, 512, True),
        "small": (256, 768, 4, 4, 2, 64, 512, True),
        "1b": (2048, 8192, 16, 32, 8, 64, 128256, True),
        "8b": (4096, 14336, 32, 32, 8, 128, 128256, False),
    }[size]
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads"
    names += " num_key_value_heads head_dim vocab_size tie_word_embeddings"
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    ids = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    fields = dict(zip(names.split(), shape, strict=True))
    return _import("transformers").LlamaConfig(
        **fields, **ids, max_position_embeddings=8192, rope_parameters=rope
    )


# --------------------------------------------------------------------------------------------------
# Training


@functools.cache
def _trainer_class():
    """transformers' Trainer that remembers each micro-batch's loss, unrounded, without waiting."""
    transformers = _import("transformers")

    class Watched(transformers.Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.seen = collections.deque(maxlen=100_000)  # (step, loss, labels) of micro-batches

        def training_step(self, model, inputs, *args, **kwargs):
            labels = (inputs["labels"] != chunked_ce.IGNORE).sum()
            loss = super().training_step(model, inputs, *args, **kwargs)
            self.seen.append((self.state.global_step, loss.detach(), labels))
            return loss

    return Watched


@functools.cache
def _callback_class():
    transformers = _import("transformers")

    class Watch(transformers.TrainerCallback):
        """Ctrl-C ends training that is saved after the step in hand, with a checkpoint; the first
        step's seconds; and from a given step on a recompilation is an error."""

        def __init__(self, strict_from=0, save=False):
            self.stop, self.strict_from, self.strict, self.save = False, strict_from, None, save
            self.first_s, self.start, self.old, self.marks = math.nan, 0.0, None, {}

        def on_train_begin(self, args, state, control, **_):
            if self.save and threading.current_thread() is threading.main_thread():
                self.old = signal.signal(signal.SIGINT, self.interrupt)

        def interrupt(self, *_):
            if self.stop:
                raise KeyboardInterrupt
            self.stop = True
            words = "stopping after this step, with a checkpoint; again: at once"
            print(f"\n{words}", flush=True)

        def on_step_begin(self, args, state, control, **_):
            if self.strict_from and state.global_step >= self.strict_from and not self.strict:
                self.strict = no_recompiles()
                self.strict.__enter__()
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            last = self.stop or state.global_step >= state.max_steps
            if math.isnan(self.first_s) or last or state.global_step == state.max_steps // 2:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                self.marks[state.global_step] = time.perf_counter()
            if math.isnan(self.first_s):
                self.first_s = time.perf_counter() - self.start
            if self.stop:
                control.should_save = control.should_training_stop = True

        def on_train_end(self, args, state, control, **_):
            self.restore()

        def restore(self):
            if self.old is not None:
                signal.signal(signal.SIGINT, self.old)
                self.old = None
            if self.strict:
                self.strict.__exit__(None, None, None)
                self.strict = None

    return Watch


class Run(NamedTuple):
    """What training with one stack gave."""

    stack: str
    losses: list[float]  # one an optimizer step
    first_s: float  # seconds of the first optimizer step, compilation included
    tokens_per_s: float  # labels a second over the second half of the steps
    peak_gib: dict[str, float]  # of GPU memory: loaded, training
    report: list[str]
    interrupted: bool
    compiled: Compiled | None


def train(stack, path, options, args, *, save=False, resume=None, backend="inductor") -> Run:
    """Trains `path` with one of STACKS through Trainer. The same seed gives the same LoRA weights
    and the same order of the data in every stack."""
    transformers = _import("transformers")
    _reset()
    device = args.device
    dtype = torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else torch.float32
    _config_of(path, options)
    rows = _rows(path, options.dataset, options.max_length, options.packing)
    transformers.set_seed(args.seed)
    model, tokenizer = load(path, stack, options, dtype, device)
    args = _plain_arguments(args, stack, save)
    checkpointing = _take_checkpointing(args)
    fixed = len({len(row["input_ids"]) for row in rows}) == 1
    prepare(model, stack, options, checkpointing=checkpointing, fixed=fixed, backend=backend)
    loaded = _peak_gib(reset=True)
    watch = _callback_class()(options.error_on_recompile, save)
    trainer = _trainer_class()(
        model=model,
        args=args,
        train_dataset=rows,
        data_collator=Collate(tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    if not save:
        trainer.remove_callback(transformers.PrinterCallback)
    before = len(_metrics())
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        watch.restore()
    if save and not watch.stop:
        trainer.save_model()
    compiled = getattr(model, "compiled_regions", None)
    report = compiled.report() if compiled else _foreign_report(before) if "hf_b" in stack else []
    steps, (*_, begin, end) = {}, (0, 0, *watch.marks)
    for step, loss, _ in trainer.seen:
        steps[step] = steps.get(step, 0.0) + float(loss)
    tokens = sum(int(labels) for step, _, labels in trainer.seen if begin <= step < end)
    rate = tokens / (watch.marks[end] - watch.marks[begin]) if begin in watch.marks else math.nan
    memory = {"loaded": loaded, "training": _peak_gib()}
    losses = list(steps.values())
    return Run(stack, losses, watch.first_s, rate, memory, report, watch.stop, compiled)


def _half():
    """The half precision that this GPU has products in."""
    return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"


def _in_precision(args, half):
    """A copy of TrainingArguments made for "bf16", "fp16" or, if None, float32."""
    args = copy.copy(args)
    args.bf16, args.fp16 = half == "bf16", half == "fp16"
    args.mixed_precision = half or "no"  # which Trainer reads: autocast, and fp16's GradScaler
    _import("accelerate").state.AcceleratorState._reset_state()  # one precision a process
    return args


# Since transformers 5.2x the first name, before the second
CHECKPOINTING = "activation_checkpointing", "gradient_checkpointing"


def _take_checkpointing(args) -> bool:
    """Whether it is asked for; and Trainer does not switch it on itself."""
    names = [name for name in CHECKPOINTING if hasattr(args, name)]
    wanted = any(getattr(args, name) for name in names)
    for name in names:
        setattr(args, name, False)
    return bool(wanted)


def _checkpoint_blocks(model, on):
    """transformers' own checkpointing of a model's blocks."""
    do = "enable" if on else "disable"
    method = next(m for n in CHECKPOINTING if (m := getattr(model, f"{n}_{do}", None)))
    method({"use_reentrant": False}) if on else method()


def _tf32_is_torn():
    """transformers sets TF32 by torch.backends.fp32_precision alone; torch 2.11 to 2.13 then raise in
    Inductor's autotuning, which asks for the older setting (pytorch/pytorch#166387)."""
    try:
        torch.get_float32_matmul_precision()
    except RuntimeError:
        return True
    return False


def _set_tf32(on):
    torch.set_float32_matmul_precision("high" if on else "highest")  # of both settings


def _settle_tf32(args):
    """As args.tf32 asks: by itself torch_compile makes TrainingArguments turn TF32 on."""
    if args.tf32 is not None or _tf32_is_torn():
        _set_tf32(args.tf32)


def _plain_arguments(args, stack, save):
    """A copy of TrainingArguments for one stack. transformers' own torch_compile is taken over:
    Trainer would compile the whole model around our regions."""
    args = copy.copy(args)
    _settle_tf32(args)
    args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
    for name in [n for n in os.environ if n.startswith("ACCELERATE_DYNAMO_")]:
        del os.environ[name]
    args.report_to = args.report_to if save else []
    if not save:
        args.save_strategy = "no"
        args.output_dir = os.path.join(args.output_dir, stack)
    args.label_names = ["labels"]
    args._n_gpu = min(args.n_gpu, 1)  # or Trainer would take DataParallel where there are more
    return args


def _foreign_report(before):
    entries = [e for e in _metrics()[before:] if e.co_name and e.is_forward]
    seconds = sum((e.duration_us or 0) / 1e6 for e in entries)
    count = _breaks().total()
    return [
        f"compiled: {len(entries)} Dynamo graphs, graph breaks {count}; {seconds:.1f} s",
        *_break_lines(),
    ]


def _reset():
    """Nothing compiled, counted or allocated by an earlier run counts for the next."""
    gc.collect()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak_gib(reset=False):
    if not torch.cuda.is_available():
        return 0.0
    peak = torch.cuda.max_memory_allocated() / GIB
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return peak


def difference(a, b):
    """The largest relative difference of two loss curves."""
    return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))


# --------------------------------------------------------------------------------------------------
# The comparison: the same seed, data and steps in every stack


@contextlib.contextmanager
def _other_attention():
    """Attention by SDPA's math kernel: the same sums in another order."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextlib.contextmanager
def _other_products():
    """Matrix products by another library, on a CPU by another number of threads."""
    if torch.cuda.is_available():
        choose, other = torch.backends.cuda.preferred_blas_library, "cublaslt"
        usual = choose()
    else:
        choose, other, usual = torch.set_num_threads, 1, torch.get_num_threads()
        other += usual == 1
    choose(other)
    try:
        yield
    finally:
        choose(usual)


@contextlib.contextmanager
def _other_shapes():
    """Rows padded to multiples of 64: other tiles and other kernels."""
    Collate.multiple, usual = 64, Collate.multiple
    try:
        yield
    finally:
        Collate.multiple = usual


def compare(path, stacks, options, args, *, save=False, resume=None, backend="inductor"):
    """Trains with every stack and prints what differs. ({stack: Run}, results); saves the last
    stack's checkpoints and adapter if `save`. KeyboardInterrupt, once a run that is saved has
    its checkpoint; any other ends at once."""
    runs, results = {}, {}
    for i, stack in enumerate(stacks):
        last = i == len(stacks) - 1
        more = {"save": save and last, "resume": resume if last else None, "backend": backend}
        run = runs[stack] = train(stack, path, options, args, **more)
        memory, gpu = run.peak_gib, torch.cuda.is_available()
        peak = f"peak {memory['training']:.2f} GiB (loaded {memory['loaded']:.2f})"
        curve = f"loss {run.losses[0]:.4f} to {run.losses[-1]:.4f}" if run.losses else "none left"
        curve += f"; first step {run.first_s:.1f} s; {run.tokens_per_s:.0f} labels/s; "
        curve += peak if gpu else "on a CPU"
        print(f"{stack:<14} {len(run.losses)} steps, {curve}", flush=True)
        for line in run.report:
            print(f"  {line}", flush=True)
        results[stack] = {
            "losses": run.losses,
            "first_s": run.first_s,
            "labels_per_s": run.tokens_per_s,
            "peak_gib": memory["training"],
        }
        if run.interrupted:
            words = f"saved in {args.output_dir}; go on with --resume_from_checkpoint true"
            raise KeyboardInterrupt(words)
    counts = {len(run.losses) for run in runs.values()}
    if counts != {0} and len(counts) == 1 < len(runs):
        results |= _print_curves(runs, path, options, args, backend)
    return runs, results


def _print_curves(runs, path, options, args, backend):
    """What the runs' losses are and how far apart: {"differences", "controls"}."""
    for stack, run in runs.items():
        for i in range(0, len(run.losses), 10):
            values = " ".join(f"{x:.5f}" for x in run.losses[i : i + 10])
            print(f"loss {stack:<14} from step {i + 1:<4} {values}")
    found, controls = {}, {}

    def note(name, a, b):
        words = "left out, it needs more GPU memory"
        if a and b:
            found[name] = difference(a, b)
            words = f"{found[name]:.2e}"
        print(f"largest relative difference of the losses, {name}: {words}", flush=True)

    for a, b in itertools.combinations(runs, 2):
        note(f"{a} to {b}", runs[a].losses, runs[b].losses)
    if options.controls != "none" and "hf" in runs:
        _controls(runs, path, options, args, backend, note, controls)
    return {"differences": found, "controls": controls}


def _controls(runs, path, options, args, backend, note, controls):
    """Runs made to judge the others by: `hf` with its sums in other orders, whose losses become
    `controls`; asked for all, our functions with PEFT's rounding, and all of it in float32 too."""
    half, compiled = args.bf16 or args.fp16, "ours_compiled" in runs
    orders = {"attention": _other_attention, "products": _other_products, "shapes": _other_shapes}
    if getattr(_causal_config(path).get_text_config(), "attn_logit_softcapping", None):
        del orders["attention"]  # transformers then computes it without SDPA

    def losses(stack, args, change=(), **more):
        with contextlib.ExitStack() as changed:
            for other in change:
                changed.enter_context(other())
            try:
                run = train(stack, path, replace(options, **more), args, backend=backend)
            except torch.OutOfMemoryError:
                return []
        return run.losses

    words = "none leaves them out" if options.controls == "all" else "all makes more of them"
    print(f"runs to judge these by (--controls {words})", flush=True)
    hf, changes = runs["hf"].losses, {"all": orders.values()}
    if options.controls == "all":
        changes = {name: [order] for name, order in orders.items()} | changes
    for name, change in changes.items():
        controls[name] = losses("hf", args, change)
        note(f"hf to hf, {name} in another order", hf, controls[name])
    if options.controls != "all":
        return
    if half and compiled:
        rounded = losses("ours_compiled", args, peft_rounding=True)
        note("hf to ours_compiled with PEFT's rounding", hf, rounded)
    if not half:
        return
    args = _in_precision(args, None)
    exact = losses("hf", args)
    for stack, run in runs.items():
        note(f"hf in float32 to {stack}", exact, run.losses)
    again = losses("hf", args, orders.values())
    note("in float32, hf to hf, all in another order", exact, again)
    if compiled:
        note("in float32, hf to ours_compiled", exact, losses("ours_compiled", args))


# --------------------------------------------------------------------------------------------------
# Self-test: `pytest compile_qlora.py` runs the same functions


def _device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def _needs_gpu():
    if not torch.cuda.is_available():
        raise unittest.SkipTest("needs a CUDA GPU")


@functools.cache
def _folder():
    """Goes when the process ends."""
    return tempfile.TemporaryDirectory(prefix="compile_qlora_")


def _checkpoint(name="tiny", config=None, quantised=False, dtype=torch.float32):
    """A checkpoint of a small model, written once a process."""
    directory = Path(_folder().name) / f"{name}-{quantised}-{dtype}".replace("torch.", "")
    if not (directory / "config.json").exists():
        config = config or _llama(name)
        write_checkpoint(directory, config, quantised=quantised, dtype=dtype, device=_device())
    return str(directory)


def _model(stack, path=None, dtype=torch.float32, backend="aot_eager", checkpointing=False, **more):
    """A model with LoRA whose B is not zero, or half the gradients would be."""
    _reset()
    path = path or _checkpoint()
    torch.manual_seed(1)
    options = Options(lora_r=8, lora_alpha=16, **more)
    model, _ = load(path, stack, options, dtype, _device())
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    return prepare(model, stack, options, checkpointing=checkpointing, backend=backend)


def _ids(rows, length, seed=0, vocab=512):
    generator = torch.Generator().manual_seed(seed + 1000 * rows + length)
    return torch.randint(0, vocab, (rows, length), generator=generator).to(_device())


def _step(model, ids, dtype=torch.float32, scale=1.0, **more):
    """(loss, gradients) of one step."""
    model.zero_grad()
    half = dtype != torch.float32
    with torch.autocast(_device(), dtype, enabled=half):
        value = model(**{"input_ids": ids, "labels": ids, **more}).loss
    (value * scale).backward()
    grads = {n: p.grad.clone() / scale for n, p in model.named_parameters() if p.grad is not None}
    return value.item(), grads


def _apart(got, want, least=1e-9) -> float:
    """The largest relative error of gradients, of those below `least` in terms of that."""
    assert got.keys() == want.keys(), set(got) ^ set(want)
    return max(((got[n] - want[n]).norm() / want[n].norm().clamp(min=least)).item() for n in want)


def _families():
    transformers = _import("transformers")
    small = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 512}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    ids = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    small |= {"tie_word_embeddings": False, "head_dim": 32, **ids}
    return {
        "llama": transformers.LlamaConfig(**small),
        "mistral": transformers.MistralConfig(**small, sliding_window=24),
        "qwen2": transformers.Qwen2Config(**{k: v for k, v in small.items() if k != "head_dim"}),
        "qwen3": transformers.Qwen3Config(**small),
        "gemma2": transformers.Gemma2Config(**small, sliding_window=24, query_pre_attn_scalar=32),
    }


def test_families_equal_transformers():
    families = _families()
    del families["llama"]  # which every other test has
    if _device() == "cuda":  # where kernels are compiled for each: those with biases, with softcaps
        families = {name: families[name] for name in ("qwen2", "gemma2")}
    for name, config in families.items():
        path = _checkpoint(name, config)
        stock = _model("hf", path)
        backend = "aot_eager" if name == "gemma2" else "eager"  # Dynamo alone: faster
        models = [_model("ours", path), _model("ours_compiled", path, backend=backend)]
        limit = {"gemma2": 6}.get(name, 5)  # two kinds of blocks alternate
        for rows, length in ((2, 40), (3, 57)):
            ids = _ids(rows, length)
            loss_, grads = _step(stock, ids)
            for model in models:
                got = _step(model, ids)
                assert abs(got[0] - loss_) < 2e-5 * loss_, (name, got[0], loss_)
                assert _apart(got[1], grads) < 2e-4, (name, _apart(got[1], grads))
        graphs = models[1].compiled_regions.graphs()
        assert len(graphs) == limit and not _breaks(), (name, graphs, _breaks())


def test_one_compilation_for_all_lengths_and_batch_sizes():
    """Through inductor: 14 lengths, batches of 1 to 5; after the warm-up nothing is compiled."""
    stock, model = _model("hf"), None
    for checkpointing in (False, True) if _device() == "cpu" else (True,):
        model = _model("ours_compiled", backend="inductor", checkpointing=checkpointing)
        for rows, length in ((2, 33), (1, 48)):
            _step(model, _ids(rows, length))
        graphs = model.compiled_regions.graphs()
        with no_recompiles():
            lengths = (2, 3, 8, 17, 31, 32, 40, 64, 77, 100, 127, 128, 160, 201)
            for i, length in enumerate(lengths):
                _step(model, _ids(1 + i % 5, length))
        assert model.compiled_regions.graphs() == graphs
        try:  # the guard itself: evaluation is another graph
            with no_recompiles(), torch.no_grad():
                model(input_ids=_ids(2, 40), labels=_ids(2, 40))
        except torch._dynamo.exc.RecompileError:
            pass
        else:
            raise AssertionError("a recompilation went unnoticed")
        assert [g.region for g in graphs] == [
            "embedding",
            "rotary",
            "block",
            "norm",
            "loss",
            "block",
        ]
        assert sum(g.backward for g in graphs) == 4 and len(graphs) <= 6, graphs
        assert not _breaks()
        for rows, length in ((4, 50), (1, 90)):
            loss_, grads = _step(stock, _ids(rows, length))
            got = _step(model, _ids(rows, length))
            assert abs(got[0] - loss_) < 2e-5 * loss_ and _apart(got[1], grads) < 2e-4


def _kept_bytes(model, ids):
    """Bytes that autograd keeps between forward and backward, parameters apart."""
    kept, known = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = model(input_ids=ids, labels=ids).loss
    value.backward()
    return sum(kept.values())


def test_checkpointing_keeps_inputs_alone():
    ids = _ids(4, 200)
    kept = {}
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        model = _model("ours_compiled", checkpointing=checkpointing)
        _step(model, ids)
        kept[name] = _kept_bytes(model, ids)
    config = model.config
    tokens, hidden = ids.numel() * 4, config.hidden_size  # float32
    inputs = (config.num_hidden_layers + 2) * tokens * hidden  # of blocks, norm and loss
    assert kept["checkpointed"] < 1.6 * inputs, (kept, inputs)
    # and without it no dequantised weight, no activation of the MLP beyond gate and up
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    block = 4 * hidden + 2 * config.intermediate_size + 2 * heads * config.head_dim
    most = 1.2 if _device() == "cpu" else 1.4  # in float32 SDPA repeats grouped heads on a GPU
    assert kept["plain"] < inputs + most * config.num_hidden_layers * tokens * block, kept


def test_projections_equal_float64():
    """Groups and single layers, biases, uneven ranks, layers without LoRA, every dtype."""
    peft = _import("peft")
    config = _families()["qwen2"]
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
        for targets, patterns in (
            (TARGETS, {"k_proj": 4, "up_proj": 16, "down_proj": 3}),
            (("q_proj", "v_proj", "down_proj"), {}),
            (("gate_proj",), {"gate_proj": 160}),
            (TARGETS, {"up_proj": FUSED_RANK + 8}),  # not in the kernel, nor down's with it
        ):
            torch.manual_seed(3)
            path = _checkpoint("qwen2", config)
            options = Options()
            model, _ = load(path, "hf", options, dtype, _device())
            model = model.unload()
            lora = peft.LoraConfig(
                r=8, lora_alpha=16, target_modules=list(targets), rank_pattern=patterns
            )
            layer = peft.get_peft_model(model, lora).base_model.model.model.layers[0].train()
            for p in layer.parameters():
                if p.requires_grad or p.ndim == 1:
                    torch.nn.init.normal_(p, std=0.1)
            fuse(layer)
            for x_shape in ((2, 19, 64), (1, 64), (130, 64)):
                x = torch.randn(x_shape, device=_device()).to(dtype).requires_grad_()
                for part in (layer.mlp, layer.self_attn.q_proj, layer.self_attn.o_proj):
                    y = part(x)
                    group = getattr(part, "_qlora", None)
                    if isinstance(group[0], _Group) and len(group[0].modules) > 1:
                        others = [m(x) for m in group[0].modules[1:]]
                        y = torch.cat([y, *others], -1)
                    w = torch.randn_like(y)
                    leaves = [p for p in layer.parameters() if p.requires_grad]
                    got = torch.autograd.grad(y, [x, *leaves], w, allow_unused=True)
                    x64 = x.detach().double().requires_grad_()
                    want_y, names = _float64(part, x64)
                    want = torch.autograd.grad(want_y, [x64, *names.values()], w.double())
                    assert _close(y, want_y, limit), (dtype, targets, part)
                    assert _close(got[0], want[0], limit), (dtype, targets, part)
                    by_id = dict(zip(map(id, leaves), got[1:], strict=True))
                    for p, grad in zip(names, want[1:], strict=True):
                        assert _close(by_id[id(p)], grad, limit), (dtype, targets, part)


def _close(got, want, limit):
    """Within `limit` of the norm, or of one for each element: sums of few may cancel."""
    return (got.double() - want).norm() <= limit * max(want.norm(), want.numel() ** 0.5)


def _float64(part, x):
    """(output, {parameter: its float64 leaf}) of an MLP or a group of projections, in float64."""
    leaves = {}

    def leaf(p):
        return leaves.setdefault(p, p.detach().double().requires_grad_())

    def linear(module, x):
        base = getattr(module, "base_layer", module)
        y = x @ dequantize_nf4(base.weight, base.weight.quant_state).double().t()
        y = y if base.bias is None else y + base.bias.double()
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            y = y + x @ leaf(a).t() @ leaf(b).t() * module.scaling["default"]
        return y

    if hasattr(part, "gate_proj"):
        gate = linear(part.gate_proj, x)
        out = linear(part.down_proj, part.act_fn(gate) * linear(part.up_proj, x))
    else:
        out = torch.cat([linear(m, x) for m in part._qlora[0].modules], -1)
    return out, leaves


def _gated_case(n, m, ranks, dtype, seed, activation):
    """(arguments of gated_grads but `keep`, float64 (act, dy, LoRA gradients)) for n rows of m;
    ranks of gate, up and down."""
    generator = torch.Generator().manual_seed(seed)
    make = lambda *s: torch.randn(*s, generator=generator).mul(0.5).to(_place(), dtype)
    rank = ranks[0] + ranks[1]
    both = make(n, 2 * m + rank)  # as the product leaves them: one below the other in a row
    y, xa = both.split([2 * m, rank], -1)
    b = torch.block_diag(make(m, ranks[0]), make(m, ranks[1]))
    dact, ga, a = make(n, m), make(n, ranks[2]), make(ranks[2], m)
    sums = y.double() + xa.double() @ b.double().t()
    gate, up = (t.detach().requires_grad_() for t in sums.chunk(2, -1))
    act = ACTIVATIONS[activation](gate) * up
    grad = dact.double() + ga.double() @ a.double()
    sides = *torch.autograd.grad(act, (gate, up), grad), act.detach()
    inputs = *xa.double().split(ranks[:2], -1), ga.double()
    lora = [side.t() @ x for side, x in zip(sides, inputs, strict=True)]
    truth = act.detach(), torch.cat(sides[:2], -1), lora
    return (y, xa, b, dact, ga, a, list(ranks), activation), truth


def _place():
    return "cpu" if isinstance(_gated_kernel, InterpretedFunction) else _device()


def _check_gated(dtypes):
    shapes = (
        (70, 130, (8, 4, 5)),
        (1, 16, (0, 0, 0)),
        (65, 257, (0, 48, 32)),
        (1100, 64, (16, 16, 0)),
    )
    turns = [*itertools.product(dtypes, ACTIVATIONS)]
    for turn, (dtype, activation) in enumerate(turns):
        for seed, shape in enumerate(shapes):
            if _place() == "cpu" or seed % 2 == turn % 2:  # on a GPU each is kernels to compile
                _check_gated_case(*shape, dtype, seed, activation)


def _check_gated_case(n, m, ranks, dtype, seed, activation):
    limit = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    args, truth = _gated_case(n, m, ranks, dtype, seed, activation)
    y, xa, b, dact, *_ = args
    got = gated(y, xa, b, [*ranks[:2], 0], activation)
    case = dtype, activation, n, m, ranks
    assert _close(got, truth[0], limit), case
    dy, act, lora = gated_grads(*args, True)
    _check_gated_grads(dy, act, lora, truth, ranks, limit, case)
    dy, nothing, lora = gated_grads(*args, False)
    assert not nothing.numel(), case
    _check_gated_grads(dy, act, lora, truth, ranks, limit, case)
    lora = gated_grads_(*args, True)  # over y and dact
    assert torch.equal(y, dy) and torch.equal(dact, act), case
    _check_gated_grads(dy, act, lora, truth, ranks, limit, case)


def _check_gated_grads(dy, act, lora, truth, ranks, limit, case):
    assert _close(dy, truth[1], limit) and _close(act, truth[0], limit), case
    assert (len(lora) == 3) == any(ranks), case
    for got, want, rank in zip(lora, truth[2], ranks, strict=any(ranks)):
        assert _close(got[:, :rank], want, limit), (case, (got[:, :rank] - want).norm())


def test_gated_operators():
    """PyTorch's operations on a CPU and in float32; the kernel for half precision on a GPU."""
    _check_gated([torch.float32, torch.bfloat16, torch.float16])


def test_gpu_gated_kernel_on_a_stream():
    """As many rows as make each program take more tiles; the rest is test_gated_operators'."""
    _needs_gpu()
    stream = torch.cuda.Stream()
    ranks = 64, 40, 8
    args, truth = _gated_case(20000, 264, ranks, torch.bfloat16, 9, "silu")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = gated_grads(*args, True)
    stream.synchronize()
    _check_gated_grads(*got, truth, ranks, 1e-2, "stream")


def _compile_gated(sm, dtype, backward, act, k):
    """_gated_kernel for a compute capability; needs no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, (m, cols, warps, _, stages) = _gated_kernel.arg_names, _tiles(sm, backward)
    constants = {"GATE": k, "UP": k, "DOWN": k, "K": k, "GELU": False, "ACT": act}
    constants |= {"BACKWARD": backward, "M": m, "N": cols, "STAGES": stages}
    types_ = {name: f"*{dtype}" if name.endswith("_ptr") else "i32" for name in names}
    types_ |= {"grads_ptr": "*fp32"} | dict.fromkeys(constants, "constexpr")
    numbers = (i for i, name in enumerate(names) if name not in constants)
    source = ASTSource(
        _gated_kernel, types_, constants, {(i,): [["tt.divisibility", 16]] for i in numbers}
    )
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": warps})


def test_gated_kernel_compiles_for_every_gpu():
    """sm_75 (T4) to sm_120, half precisions, both directions, without spilled registers."""
    limits = {75: 64, 80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB of shared memory
    variants = (False, True, 64), (True, True, FUSED_RANK), (True, True, 32), (True, False, 32)
    for sm, dtype in itertools.product(limits, ("fp16", "bf16")):
        few = 4 if sm in (75, 90) else 2  # the smaller ranks need less
        for variant in variants[:few] if (sm, dtype) != (75, "bf16") else ():  # it has no bf16
            made = _compile_gated(sm, dtype, *variant)
            used = _resources(made)
            assert used["STACK"] == used["LOCAL"] == 0, (sm, dtype, variant, used)
            assert made.metadata.shared <= limits[sm] * 1024, (sm, variant, made.metadata.shared)


def test_bitsandbytes_operator_and_quantised_checkpoint():
    ids = _ids(2, 45)
    loss_, grads = _step(_model("hf"), ids)
    ready = _checkpoint(quantised=True)
    for more in ({"dequant": "bnb"}, {"path": ready}):
        for stack in ("ours", "ours_compiled"):
            got = _step(_model(stack, backend="eager", **more), ids)
            assert abs(got[0] - loss_) < 2e-5 * loss_ and _apart(got[1], grads) < 2e-4, (
                stack,
                more,
            )
        assert not _breaks()
    saved = _checkpoint(quantised=True, dtype=torch.bfloat16)  # and asked for in float32
    models = [_model(stack, saved) for stack in ("hf", "ours")]
    assert {p.dtype for p in models[0].parameters()} == {torch.float32, torch.uint8}
    (loss_, grads), got = (_step(model, ids) for model in models)
    assert abs(got[0] - loss_) < 2e-5 * loss_ and _apart(got[1], grads) < 2e-4


def test_dropout_adapters_and_evaluation():
    """What takes PEFT's own path, and what changes between two calls, is right compiled too."""
    ids = _ids(2, 37)
    values = []
    for stack in ("hf", "ours", "ours_compiled", "checkpointed"):
        checkpointing = stack == "checkpointed"
        stack = "ours_compiled" if checkpointing else stack
        backend = "aot_eager" if checkpointing else "eager"
        model = _model(stack, lora_dropout=0.2, checkpointing=checkpointing, backend=backend)
        torch.manual_seed(5)
        trained = _step(model, ids)
        torch.manual_seed(6)
        other = _step(model, ids)[0]
        if checkpointing:  # which is for training alone
            values.append((trained[0], other, *values[0][2:4], trained[1], values[0][5]))
            continue
        with torch.no_grad():
            evaluated = model.eval()(input_ids=ids, labels=ids).loss.item()
            with model.disable_adapter():
                bare = model(input_ids=ids, labels=ids).loss.item()
        graphs = model.compiled_regions.graphs() if stack == "ours_compiled" else []
        words = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True).tolist()
        assert stack != "ours_compiled" or len(model.compiled_regions.graphs()) <= len(graphs) + 4
        values.append((trained[0], other, evaluated, bare, trained[1], words))
    assert not _breaks()
    found = _refusal(lambda: _model(stack, lora_dropout=0.2, checkpointing=True, backend="eager"))
    assert found is None, "wrong gradients of dropout"
    want = values[0]
    assert len({round(v, 4) for v in want[:4]}) == 4, want[:4]  # each of the four matters
    for got in values[1:]:
        for a, b in zip(got[:4], want[:4], strict=True):
            assert abs(a - b) < 2e-5 * b, (got[:4], want[:4])
        assert _apart(got[4], want[4]) < 2e-4 and got[5] == want[5]


def test_half_precision_with_a_scaled_loss():
    """fp16 as on a T4, and bf16: products in half precision, loss scaled, gradients finite."""
    ids = _ids(2, 60)
    truth = _step(_model("hf"), ids)
    for dtype, scale, limit in ((torch.float16, 2.0**10, 2e-2), (torch.bfloat16, 1.0, 8e-2)):
        plain = _apart(_step(_model("hf", dtype=dtype), ids, dtype, scale)[1], truth[1])
        checkpointing = dtype == torch.float16
        how = {"checkpointing": checkpointing, "backend": "aot_eager" if checkpointing else "eager"}
        model = _model("ours_compiled", dtype=dtype, **how)
        got = _step(model, ids, dtype, scale)
        assert abs(got[0] - truth[0]) < 5e-3 * truth[0]
        assert _apart(got[1], truth[1]) < max(limit, 1.5 * plain), (dtype, plain)


def test_packed_documents_keep_apart():
    lengths = (30, 5, 41)
    documents = [_ids(1, n, seed=n)[0].tolist() for n in lengths]
    model = _model("ours_compiled", backend="eager")
    tokens = sum(n - 1 for n in lengths)
    want = sum(
        model(input_ids=row, labels=row).loss.item() * (row.shape[1] - 1)
        for row in (torch.tensor([d], device=_device()) for d in documents)
    )

    class Tokenizer:
        eos_token_id = None
        __call__ = staticmethod(lambda text: {"input_ids": text})

    (row,) = tokenise(documents, Tokenizer(), 100, packing=True)
    short = tokenise(documents, Tokenizer(), 50, packing=True)
    assert [len(r["input_ids"]) for r in short] == [35, 41]
    batch = Collate(258)([row, short[0]])
    assert batch["input_ids"].shape == (2, sum(lengths) + 1)
    assert (batch["labels"][1, 35:] == -100).all() and batch["position_ids"][0, -1] == 0
    batch = {k: v[:1].to(_device()) for k, v in batch.items()}
    got = model(**batch).loss.item() * tokens
    assert abs(got - want) < 1e-4 * want, (got, want)


def test_loss_curve_through_trainer():
    """12 steps, accumulation, rows of many lengths: eager, compiled, checkpointed, and packed."""
    args = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 12}
    options = Options(max_length=96, lora_r=8)
    strict = Options(max_length=96, lora_r=8, error_on_recompile=2)
    args = _arguments(**args, learning_rate=2e-3)
    path = _checkpoint()
    eager = train("hf", path, options, args).losses
    with _other_attention():
        control = train("hf", path, options, args).losses
    run = train("ours_compiled", path, strict, args, backend="eager")
    assert len(run.losses) == 12 and run.losses[-1] < run.losses[0] - 0.2, run.losses
    assert len(run.compiled.graphs()) == 5 and not _breaks()
    args.gradient_checkpointing = True
    saved = train("ours_compiled", path, strict, args, backend="aot_eager").losses
    noise = max(difference(eager, control), 1e-6)  # float32: a unit in the last place is 1e-7
    assert difference(eager, run.losses) < 10 * noise, (difference(eager, run.losses), noise)
    assert difference(eager, saved) < 10 * noise
    strict.packing = options.packing = True
    want = train("ours", path, options, args).losses
    packed = train("ours_compiled", path, strict, args, backend="eager")
    assert difference(want, packed.losses) < 10 * noise
    assert len(packed.compiled.graphs()) <= 6, packed.compiled.graphs()


def test_comparison_has_its_controls():
    """In bf16: the curves, other orders of the sums, PEFT's rounding, and the float32 runs."""
    how = {"per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-3}
    options, path = Options(max_length=40, lora_r=8, controls="all"), _checkpoint()
    stacks, args = [*COMPARED], _arguments(**how, bf16=True)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runs, results = compare(path, stacks, options, args, backend="eager")
    exact = train("hf", path, options, _arguments(**how)).losses
    found = results["differences"]
    for stack, run in runs.items():
        want = difference(exact, run.losses)
        assert abs(found[f"hf in float32 to {stack}"] - want) < 0.1 * want, (found, want)
        assert want > 1e-6, "float32 where bf16 was asked for"
    controls = [v for k, v in found.items() if "another order" in k and "float32" not in k]
    assert len(controls) == len(results["controls"]) == 4 and max(controls) > 0, found
    assert found["in float32, hf to ours_compiled"] < 5e-6, found
    assert found["in float32, hf to hf, all in another order"] < 5e-6, found
    assert "hf to ours_compiled with PEFT's rounding" in found
    assert out.getvalue().count("largest relative difference") == len(found) == 13, found
    assert all(f"loss {stack} " in out.getvalue() for stack in stacks)
    with _other_shapes():
        assert Collate(0)([{"input_ids": [5] * 60, "labels": [5] * 60}])["labels"].shape == (1, 64)


def test_losses_are_drawn():
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise unittest.SkipTest("matplotlib is not installed") from None
    path = str(Path(_folder().name) / "losses.png")
    curves = {stack: {"losses": [2.0, 1.0]} for stack in COMPARED}
    plot(curves | {"controls": {"all": [2.0, 1.1]}}, path)
    assert Path(path).read_bytes()[1:4] == b"PNG" and not Path(f"{path}.part").exists()


def test_comparison_chooses_its_controls():
    """Some or none; one that does not fit on the GPU is left out in a line."""
    options, calls = Options(), []

    def fake(stack, *_, **__):
        calls.append(stack)
        if full and len(calls) > 2:
            raise torch.OutOfMemoryError
        return Run(stack, [2.0, 1.0], 1.0, 1.0, {"training": 0.0, "loaded": 0.0}, [], False, None)

    for controls, full, more in (("few", 0, ["all"]), ("few", 1, []), ("none", 0, [])):
        options.controls = controls
        calls.clear()
        with (
            mock.patch.dict(globals(), train=fake),
            contextlib.redirect_stdout(io.StringIO()) as out,
        ):
            _, results = compare(_checkpoint(), ["hf", "ours"], options, _arguments())
        want = ["hf to ours", *(f"hf to hf, {name} in another order" for name in more)]
        assert [*results["differences"]] == want, results
        assert out.getvalue().count("left out, it needs") == full


def test_rounding_of_gate_and_up():
    """In bf16 with a small B: our own sums are closer to float64, the rounded ones to PEFT's."""
    stock, ours = _model("hf", dtype=torch.bfloat16), _model("ours", dtype=torch.bfloat16)
    rounded = _model("ours", dtype=torch.bfloat16, peft_rounding=True)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn((3, 50, 128), generator=generator).to(_device(), torch.bfloat16)
    outs, grads = [], []
    for model in (stock, ours, rounded):
        mlp = model.get_base_model().model.layers[0].mlp
        for name, p in mlp.named_parameters():
            if "lora_B" in name:
                p.data.mul_(0.02)
        leaf = x.clone().requires_grad_()
        with torch.autocast(_device(), torch.bfloat16):
            out = mlp(leaf)
        out.float().pow(2).sum().backward()
        outs.append(out.detach().double())
        grads.append(mlp.gate_proj.lora_B["default"].weight.grad.double())
    exact = _float64(mlp, x.double())[0].detach()
    apart = lambda a, b: _apart({"": a}, {"": b})
    to_exact = [apart(out, exact) for out in outs]
    assert to_exact[1] < 0.93 * min(to_exact[0], to_exact[2]), to_exact
    assert apart(outs[2], outs[0]) < 0.93 * apart(outs[1], outs[0]), (to_exact, outs)
    assert apart(grads[2], grads[0]) < 0.02 and apart(grads[1], grads[0]) < 0.02


def test_interrupted_and_resumed():
    """Ctrl-C in the third of six steps saves a checkpoint; what is resumed has the same losses."""
    folder = tempfile.mkdtemp(dir=_folder().name)
    common = {"per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 1e-3}
    args = _arguments(**common, output_dir=folder, save_strategy="steps", save_steps=100)
    options, path = Options(max_length=64, lora_r=8), _checkpoint()
    go = functools.partial(train, "ours", path, options)
    whole = go(args).losses
    trainer = _trainer_class()
    stock = trainer.training_step

    def interrupting(self, *a, **k):
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return stock(self, *a, **k)

    trainer.training_step = interrupting
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup and & ignore it
    before, options.controls = signal.getsignal(signal.SIGINT), "none"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            cut = go(args, save=True)
    finally:
        trainer.training_step = stock
    assert cut.interrupted and cut.losses == whole[:3], (cut.losses, whole)
    assert signal.getsignal(signal.SIGINT) is before
    assert (Path(folder) / "checkpoint-3" / "adapter_model.safetensors").exists()
    rest = go(args, save=True, resume=True)
    assert rest.losses == whole[3:], (rest.losses, whole)
    assert (Path(folder) / "adapter_model.safetensors").exists()

    trainer.training_step = interrupting
    for save, words in ((True, "saved in"), (False, "")):  # in a comparison it ends at once
        try:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                compare(path, ["ours"], options, args, save=save)
        except KeyboardInterrupt as error:
            assert str(error).startswith(words) and bool(str(error)) == save, error
            assert ("3 steps" in out.getvalue()) == save, out.getvalue()
        else:
            raise AssertionError("training went on after Ctrl-C")
    trainer.training_step = stock
    signal.signal(signal.SIGINT, usual)


def test_a_graph_break_is_named():
    class Breaks(torch.nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return F.relu(x)

    model, _ = load(_checkpoint(), "ours", Options(lora_r=8), torch.float32, _device())
    model.get_base_model().model.layers[0].mlp.act_fn = Breaks()
    prepare(model, "ours_compiled", Options(), backend="eager")
    try:
        _step(model, _ids(1, 20))
    except torch._dynamo.exc.TorchDynamoException as error:
        assert "graph_break" in str(error), error
    else:
        raise AssertionError("a graph break went unnoticed")


def _refused(*argv):
    """(exit code, the one line on stderr) of main."""

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(argv))
    lines = [line for line in err.getvalue().splitlines() if line.startswith("compile_qlora: ")]
    assert out.getvalue().splitlines()[-1].startswith("RESULT compile_qlora FAIL"), out.getvalue()
    return code, lines


def test_bad_input_is_one_line():
    folder = Path(_folder().name)
    transformers = _import("transformers")
    transformers.T5Config(d_model=16, num_layers=1).save_pretrained(folder / "t5")
    bert = transformers.BertConfig(hidden_size=16, architectures=["BertForMaskedLM"])
    bert.save_pretrained(folder / "bert")
    (folder / "wrong.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    (folder / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    (folder / "broken.jsonl").write_text('{"text": \n')
    path = _checkpoint()
    common = ("--output_dir", str(folder / "out"), "--use_cpu", "true", "--stacks", "ours_compiled")
    cases = (
        (("--model", str(folder / "none")), "model: found", "config.json"),
        (("--model", str(folder / "t5")), "T5", "causal"),
        (("--model", str(folder / "bert")), "BertForMaskedLM", "causal"),
        (("--model", path, "--dataset", str(folder / "wrong.jsonl")), "prompt, answer", "messages"),
        (("--model", path, "--dataset", str(folder / "chat.jsonl")), "chat template", "text"),
        (("--model", path, "--dataset", str(folder / "broken.jsonl")), "dataset", ".jsonl"),
        (("--model", path, "--dataset", str(folder / "no.jsonl")), "dataset", ".jsonl"),
        (("--model", path, "--max_length", "10000"), "10000", "8192 at most"),
        (("--model", path, "--torch_compile_backend", "nonesuch"), "nonesuch", "inductor"),
        (("--model", path, "--stacks", "theirs"), "theirs", "ours_compiled"),
        (("--model", path, "--attention", "nonesuch"), "nonesuch", "sdpa"),
        (("--model", path, "--dequant", "nonesuch"), "nonesuch", "bnb"),
    )
    for argv, *words in cases:
        code, lines = _refused(*common, *argv)
        assert code == 2 and len(lines) == 1 and all(w in lines[0] for w in words), (argv, lines)
    config = _families()["llama"]
    config.attention_dropout = 0.1
    code, lines = _refused(*common, "--model", _checkpoint("dropout", config))
    assert code == 2 and "attention_dropout" in lines[0], lines


def test_wrong_flags_are_one_line():
    """Before any work, and errors that come later: their exit codes and lines."""
    folder, model = _folder().name, ("--model", "x")
    for argv, word in (
        (("--nonesuch", "1"), "--nonesuch 1"),
        (("--max_steps", "abc"), "'abc'"),
        (("--fuzz", "0"), "fuzz: found 0"),
        (("--only", "9b"), "some of 1b, 8b, challenge"),
        (("--only", "1b", "--test"), "no timings"),
        (("--only", "1b", *model), "no timings"),
        (("--plot", f"{folder}/x.png", "--test"), "no losses"),
        (("--json", folder, "--test"), "the directory"),
        (("--test", *model), "--test, --bench or --fuzz"),
        (("--controls", "true"), "none, few, all"),
        (("--lora_r", "0", *model), "lora_r: found 0"),
    ):
        code, lines = _refused(*argv)
        assert code == 2 and len(lines) == 1 and word in lines[0], (argv, lines)
    dynamo = torch._dynamo.exc
    for error, code, word in (
        (KeyboardInterrupt(), 130, "interrupted"),
        (torch.OutOfMemoryError("2 GiB"), 1, "out of memory: 2 GiB, need less"),
        (RuntimeError("a out of memory Search for"), 1, "out of memory: a out of memory, need"),
        (dynamo.RecompileError("r"), 1, "compiled again after the warm-up: r"),
        (dynamo.Unsupported("u"), 1, "a region has a graph break: u"),
        (ModuleNotFoundError("", name="peft"), 77, "found no peft, need it installed"),
        (ImportError("cannot import name 'a'"), 77, "cannot import name 'a'"),
        (AssertionError("a"), 1, "a check failed: a"),
        (OSError("o\no"), 2, "o o"),
        (RuntimeError("unexpected pos 12 vs 6"), 2, "torch.save could not write: found unexp"),
        (RuntimeError("PytorchStreamReader failed"), 2, "torch.load cannot read: found Pytorch"),
        (RuntimeError("other"), 1, ""),
    ):
        found = _explain(error)
        assert found[0] == code and found[1].startswith(word) and bool(found[1]) == bool(word), (
            found
        )
    old = {"is_available": lambda: True, "get_device_capability": lambda *_: (6, 1)}
    for more, word in (
        ({}, "sm_61, need sm_70"),
        ({"torch_compile_backend": "eager"}, "sm_61, need --fp16"),
    ):
        args = _arguments(bf16=True, **more)
        args.use_cpu = False
        with mock.patch.multiple(torch.cuda, **old):
            try:
                _train(Options(model="x", stacks="ours_compiled"), args)
            except ValueError as error:
                assert word in str(error), error
            else:
                raise AssertionError("a GPU that is too old was taken")


def test_half_a_checkpoint_is_passed_over():
    args = _arguments(resume_from_checkpoint="true")
    for step in (5, 10, 20):
        (Path(args.output_dir) / f"checkpoint-{step}").mkdir()
    try:
        _whole_checkpoint(args)
    except ValueError as error:
        assert "checkpoint-20" in str(error) and "trainer_state.json" in str(error), error
    else:
        raise AssertionError("half a checkpoint was taken")
    for step in (5, 10):
        (Path(args.output_dir) / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (Path(args.output_dir) / "checkpoint-20" / "trainer_state.json").write_text('{"epoch": 1,')
    assert _whole_checkpoint(args).endswith("checkpoint-10")


def test_timings_by_name():
    """What bench_gpu would start for which options, and its headline; a worker that is no process."""
    started = []

    def spawn(spec, gpu, cache, running):
        started.append((spec["name"], spec["stack"], spec["checkpointing"], spec["steps"]))
        rate = {"hf": 1.0, "ours": 2.0, "ours_compiled": 3.0}[spec["stack"]]
        return (
            {**spec, "tokens_per_s": rate, "error": "full"}
            if rate == 2
            else {
                **spec,
                "tokens_per_s": rate,
                "step_ms": 1.0,
                "first_s": 2.0,
                "peak_gib": 1.0,
                "tflops": 1.0,
            }
        )

    find = importlib.util.find_spec  # others may be looked for as well: transformers asks for torch

    def no_unsloth(name, *package):
        return None if name == "unsloth" else find(name, *package)

    gpu = types.SimpleNamespace(total_memory=80 * GIB)
    fakes = {"_spawn": spawn, "write_checkpoint": lambda path, *_, **__: path}
    fakes |= {"_challenge": lambda path, options: {"path": path}}
    cuda = {"get_device_properties": lambda *_: gpu, "get_device_capability": lambda *_: (9, 0)}
    cuda |= {"device_count": lambda: 1, "empty_cache": int}
    for stacks, names, count in (
        (None, ["1b"], 4),
        ("ours,ours_compiled,hf", ["8b", "challenge"], 8),
    ):
        started.clear()
        results, options = {}, Options(stacks=stacks)
        quiet = contextlib.redirect_stdout(io.StringIO())
        absent = mock.patch.object(importlib.util, "find_spec", no_unsloth)
        with (
            mock.patch.dict(globals(), fakes),
            mock.patch.multiple(torch.cuda, **cuda),
            quiet,
            absent,
        ):
            head = bench_gpu(results, names, options)
        assert head == {f"{names[0]}_vs_hf": 3.0, f"{names[0]}_ckpt_vs_hf": 3.0}, head
        assert len(started) == count == len({*started}), started
        assert len(results["speed"]) == 2 * (3 if stacks else 2) and len(results) == len(names)


def test_tf32_is_as_asked():
    """TrainingArguments(torch_compile=True) turns TF32 on on a GPU, by the newer setting alone."""
    args = _arguments()
    more = {"backend": "inductor", "max_autotune": True, "target_modules": ["q_proj"]}
    get = torch.get_float32_matmul_precision

    def start(newer):
        torch.set_float32_matmul_precision("highest")
        for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
            backend.fp32_precision = "none"
        torch.backends.fp32_precision = newer

    try:
        for asked, want in ((None, "highest"), (True, "high"), (False, "highest")):
            start("tf32")
            assert _tf32_is_torn()
            args.tf32 = asked
            _plain_arguments(args, "ours", False)
            assert get() == want, asked
        args.tf32 = None
        torch.set_float32_matmul_precision("high")  # somebody's own choice
        _plain_arguments(args, "ours", False)
        assert get() == "high"
        start("tf32")  # and somebody's own Trainer(tf32=True)
        with torch._inductor.config.patch({"test_configs.max_mm_configs": 3}):
            loss_, _ = _step(_model("ours_compiled", **more), _ids(2, 64))
        assert math.isfinite(loss_) and get() == "high"
    finally:
        start("none")


def test_command_line_trains():
    """A run as users type it: a data file, messages for a template, adapter and log written."""
    folder = Path(tempfile.mkdtemp(dir=_folder().name))
    rows = [json.dumps({"text": text[:200]}) for text in _documents()[:40]]
    (folder / "data.jsonl").write_text("\n".join(rows))
    argv = f"--model {_checkpoint()} --dataset {folder}/data.jsonl --output_dir {folder}/out "
    argv += "--max_length 64 --max_steps 3 --per_device_train_batch_size 2 --use_cpu true "
    argv += "--stacks ours_compiled --torch_compile_backend eager --lora_r 8 --disable_tqdm true "
    argv += f"--json {folder}/out.json --packing true --gradient_checkpointing true"
    torch._dynamo.utils.counters.clear()
    assert main(argv.split()) == 0
    # the regions alone: had Trainer compiled the model around them, there would be more and breaks
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 5 and not _breaks()
    assert len(json.loads((folder / "out.json").read_text())["ours_compiled"]["losses"]) == 3
    assert (folder / "out" / "adapter_model.safetensors").exists()


def test_readme_snippets():
    """The README's parts for one's own code run as they stand, on a small checkpoint."""
    readme = Path(__file__).with_name("README.md")
    if not readme.is_file():
        raise unittest.SkipTest("no README.md beside this file")
    part = readme.read_text().split("\n## In your own training code\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", part, re.DOTALL)
    assert len(blocks) == 3
    path, device = _checkpoint(quantised=True, dtype=torch.bfloat16), _device()
    names = {"path": str(path), "device": device, "ids": _ids(2, 24).to(device)}
    made = io.StringIO()
    try:
        for block in blocks:
            with contextlib.redirect_stdout(made):
                exec(compile(block, "README.md", "exec"), names)  # noqa: S102 (our own README)
            grads = [p.grad for p in names["model"].parameters() if p.grad is not None]
            assert grads and all(g.isfinite().all() for g in grads)
    finally:
        for patch in [*patch_bitsandbytes.active]:
            patch.undo()
    assert re.search(r"block +forward \+ backward", made.getvalue()), made.getvalue()


def test_precision_is_the_gpus():
    """If nothing is asked for: bf16, and before Ampere fp16, as Trainer itself would have it."""
    run = types.SimpleNamespace(interrupted=False, stack="ours")
    for capability, half in (((7, 5), "fp16"), ((8, 0), "bf16")):
        args, take = _arguments(), mock.Mock(return_value=({"ours": run}, {}))
        args.use_cpu = False
        gpu = {"is_available": lambda: True, "get_device_capability": lambda of=capability: of}
        options = Options(model=_checkpoint())
        with mock.patch.multiple(torch.cuda, **gpu), mock.patch.dict(globals(), compare=take):
            assert _train(options, args) == {}
        got = take.call_args.args[3]
        precision = got.bf16, got.fp16, got.mixed_precision
        assert precision == (half == "bf16", half == "fp16", half), (capability, precision)
    want, got = _arguments(bf16=True), _in_precision(_arguments(), "bf16")
    assert (got.bf16, got.fp16, got.mixed_precision) == (True, False, want.mixed_precision)


def test_gpu_trainer_in_half_precision():
    """On a GPU through inductor: bf16, and fp16 with Trainer's GradScaler, against eager."""
    _needs_gpu()
    path = _checkpoint("small", dtype=torch.bfloat16)
    for half, checkpointing in (("bf16", False), ("fp16", True)):
        more = {half: True, "gradient_checkpointing": checkpointing, "max_steps": 30}
        args = _arguments(per_device_train_batch_size=2, learning_rate=1e-3, **more)
        options = Options(max_length=512, error_on_recompile=2)
        eager = train("hf", path, options, args).losses
        with _other_attention():
            noise = difference(eager, train("hf", path, options, args).losses)
        options.offload = checkpointing
        run = train("ours_compiled", path, options, args)
        assert difference(eager, run.losses) < max(5 * noise, 2e-3), (half, noise)
        assert len(run.compiled.graphs()) == 5 and not _breaks()


def test_gpu_offloaded_inputs_come_back():
    """Same gradients, less memory; several graphs at a time, one of them dropped."""
    _needs_gpu()
    path, dtype = _checkpoint("small", dtype=torch.bfloat16), torch.bfloat16
    batches = [_ids(rows, length) for rows, length in ((4, 2000), (2, 500), (4, 2000))]
    found = []
    for offload in (False, True):
        model = _model("ours_compiled", path, dtype, "aot_eager", True, offload=offload)
        for ids in batches:
            _step(model, ids, dtype)
        dropped = model(input_ids=batches[1], labels=batches[1]).loss
        del dropped
        torch.cuda.reset_peak_memory_stats()
        steps = [_step(model, ids, dtype) for ids in batches]
        found.append((steps, _peak_gib()))
    for (loss_, grads), (want, true) in zip(found[1][0], found[0][0], strict=True):
        assert loss_ == want and _apart(grads, true) == 0.0
    assert found[1][1] < found[0][1], (found[1][1], found[0][1])


def test_gpu_host_runs_ahead():
    """Nothing in a step waits for the device, or each step would begin with it idle."""
    _needs_gpu()
    path, dtype = _checkpoint("small", dtype=torch.bfloat16), torch.bfloat16
    model, ids = _model("ours_compiled", path, dtype, "aot_eager"), _ids(2, 300)
    _step(model, ids, dtype)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", dtype):
            value = model(input_ids=ids, labels=ids).loss
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_gpu_max_autotune():
    _needs_gpu()
    more = {"backend": "inductor", "max_autotune": True, "target_modules": ["q_proj"]}
    with torch._inductor.config.patch({"test_configs.max_mm_configs": 3}):  # or it takes minutes
        model = _model("ours_compiled", dtype=torch.bfloat16, **more)
        loss_, _ = _step(model, _ids(4, 256), torch.bfloat16)
    compiled = model.compiled_regions
    assert math.isfinite(loss_)
    assert sum(compiled.winners.values()) or "skips" in compiled._tuning(), compiled._tuning()


# --------------------------------------------------------------------------------------------------
# Self-test, at random


_fuzz = functools.partial(_random_cases, few=12)  # cases of each random test in the self-test


def _refusal(do):
    """The result of do(); None where it raises one line of what was found and is needed."""
    try:
        return do()
    except (TypeError, ValueError) as error:
        words = str(error)
        assert "found" in words and "need" in words and "\n" not in words, words
        return None


def _fuzz_gated(dtypes, most):
    from hypothesis import strategies as st

    _fuzz(
        _check_gated_case,
        n=st.integers(0, most),
        m=st.integers(1, most),
        ranks=st.tuples(*[st.sampled_from((0, 0, 1, 3, 8, 16, 17, FUSED_RANK))] * 3),
        dtype=st.sampled_from(dtypes),
        seed=st.integers(0, 999),
        activation=st.sampled_from([*ACTIVATIONS]),
    )


def test_fuzz_gated_operators():
    _fuzz_gated([torch.float32, torch.bfloat16, torch.float16], 300)


def test_fuzz_gated_kernel_under_interpreter():
    """The Triton kernel itself, on CPU tensors, of given shapes and of random ones; in a process of
    its own, for Triton's compiler does not work after its interpreter. (Which has no dot of
    bfloat16.)"""
    code = "import torch, compile_qlora as c; assert c._by_kernel(torch.empty(1).half()); "
    code += "c._check_gated([torch.float16]); c._fuzz_gated([torch.float16], 90)"
    flex_attn._run_interpreted(code, CUDA_VISIBLE_DEVICES="")


class _Layer(torch.nn.Module):
    """Projections of one width, of any sizes, quantised; biases for those that are named."""

    def __init__(self, sizes, biases, dtype, nested, activation):
        from bitsandbytes.nn import Linear4bit

        super().__init__()
        width, inner = sizes
        self.act_fn = ACTIVATIONS[activation]
        for name in TARGETS:
            shape = {"down_proj": (inner, width)}.get(name, (width, inner))
            shape = (width, 2 * inner) if name == "q_proj" else shape
            how = {"compute_dtype": dtype, "compress_statistics": nested, "quant_type": "nf4"}
            layer = Linear4bit(*shape, bias=name in biases, **how).to(_device())
            self.add_module(name, layer.requires_grad_(False))

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_fuzz_projections_equal_float64():
    """fuse() over layers of any shape, with or without LoRA and biases; also when it recomputes."""
    from hypothesis import strategies as st

    limits = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

    def check(sizes, shape, biases, ranks, dtype, half_input, nested, activation, seed, **how):
        torch.manual_seed(seed)
        if how["dequant"] == "bnb":  # whose CPU code errs where a row ends inside a block
            sizes = [64 * triton.cdiv(size, 64) for size in sizes]
        layer = _Layer(sizes, biases, dtype, nested, activation)
        if ranks:
            config = _import("peft").LoraConfig(
                target_modules=[*ranks],
                rank_pattern=ranks,
                r=8,
                lora_alpha=4,
                init_lora_weights=False,
            )
            _import("peft").inject_adapter_in_model(config, layer)
        fuse(layer.train(), **how)
        x = torch.randn(*shape, sizes[0], device=_device()).to(dtype if half_input else torch.float)
        for part in (layer, layer.q_proj, layer.o_proj):
            inputs = x.requires_grad_()
            y = part(inputs)
            if part is layer.q_proj:
                y = torch.cat([y, layer.k_proj(inputs), layer.v_proj(inputs)], -1)
            exact = x.detach().to(dtype).double().requires_grad_()
            want, leaves = _float64(part, exact)
            assert y.dtype == x.dtype and _close(y, want, limits[dtype])
            g = torch.randn_like(y)
            got = torch.autograd.grad(y, [inputs, *leaves], g)
            wants = torch.autograd.grad(want, [exact, *leaves.values()], g.double())
            for a, b in zip(got, wants, strict=True):
                assert _close(a, b, limits[dtype]), (
                    part,
                    a.shape,
                    (a.double() - b).norm(),
                    b.norm(),
                )

    names = st.sets(st.sampled_from(TARGETS))
    _fuzz(
        check,
        sizes=st.tuples(st.integers(2, 150), st.integers(2, 150)),
        shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
        biases=names,
        ranks=st.dictionaries(st.sampled_from(TARGETS), st.sampled_from((1, 3, 4, 8, 16, 72))),
        dtype=st.sampled_from([*limits]),
        half_input=st.booleans(),
        nested=st.booleans(),
        activation=st.sampled_from([*ACTIVATIONS]),
        seed=st.integers(0, 999),
        dequant=st.sampled_from(("nf4_triton", "bnb")),
        recompute=st.booleans(),
        peft_rounding=st.booleans(),
    )


def test_fuzz_compiled_steps_equal_transformers():
    """Batches of any shape, padded on either side or packed, labels left out, num_items given: what
    transformers computes, with a graph of the block for each kind of mask, of one row and of more."""
    from hypothesis import strategies as st

    stock, model = _model("hf"), _model("ours_compiled", backend="eager")

    def check(rows, length, pad, packed, unlabelled, items, seed):
        ids = _ids(rows, length, seed)
        more = {"labels": ids.clone()}
        more["labels"][:, : int(unlabelled * (length - 1))] = chunked_ce.IGNORE
        pad = max(-length + 1, min(pad, length - 1))  # rows have a token at least
        if pad and length > 2:
            mask = torch.ones_like(ids)
            (mask[0, :pad] if pad > 0 else mask[0, pad:]).fill_(0)
            more["attention_mask"] = mask
            more["labels"][mask == 0] = chunked_ce.IGNORE
        elif packed:
            restart = torch.arange(length, device=ids.device) % packed
            more["position_ids"] = restart.expand(rows, -1)
        if (more["labels"][:, 1:] == chunked_ce.IGNORE).all():
            return
        if items:
            more["num_items_in_batch"] = torch.tensor(items, device=ids.device)
        want, grads = _step(stock, ids, **more)
        got, ours = _step(model, ids, **more)
        assert abs(got - want) < 2e-5 * want, (got, want)
        least = 1e-3 * max(grad.norm() for grad in grads.values())  # one key alone has none
        assert _apart(ours, grads, least) < 5e-4, _apart(ours, grads, least)

    _fuzz(
        check,
        rows=st.integers(1, 4),
        length=st.integers(2, 90),
        pad=st.sampled_from((0, 0, 1, 7, -1, -7)),
        packed=st.sampled_from((0, 1, 2, 5, 31)),
        unlabelled=st.floats(0, 1),
        items=st.sampled_from((0, 0, 1, 100)),
        seed=st.integers(0, 999),
    )
    graphs = collections.Counter(g.region for g in model.compiled_regions.graphs())
    others = graphs["embedding"], graphs["rotary"], graphs["norm"], graphs["loss"]
    assert others == (1, 1, 1, 2) and graphs["block"] <= 8 and not _breaks(), graphs


def test_fuzz_rows_and_batches():
    """tokenise() and Collate keep every token in its place; labels never cross documents."""
    from hypothesis import strategies as st

    chain = itertools.chain.from_iterable

    class Tokenizer:
        __call__ = staticmethod(lambda text: {"input_ids": text})

    def check(texts, most, packing, eos, multiple):
        tokenizer = Tokenizer()
        tokenizer.eos_token_id = eos
        rows = _refusal(lambda: tokenise(texts, tokenizer, most, packing))
        end = [] if eos is None else [eos]
        want = [[*text[: most - len(end)], *end] for text in texts] if most > 1 else []
        want = [row for row in want if len(row) > 1]
        assert (rows is None) == (not want)
        if rows is None:
            return
        assert all(1 < len(row["input_ids"]) <= most for row in rows)
        held = {name: [*chain(row[name] for row in rows)] for name in rows[0]}
        assert held["input_ids"] == [*chain(want)]
        if packing:
            assert held["position_ids"] == [*chain(range(len(row)) for row in want)]
            want = [[chunked_ce.IGNORE, *row[1:]] for row in want]
        assert held["labels"] == [*chain(want)]
        with mock.patch.object(Collate, "multiple", multiple):
            batch = Collate(999)(rows)
        length = batch["input_ids"].shape[1]
        longest = max(len(row["input_ids"]) for row in rows) + packing
        assert length % multiple == 0 and longest <= length < longest + multiple
        for name, pad in zip(batch, (999, chunked_ce.IGNORE, 0), strict=False):
            padded = [[*row[name], *[pad] * (length - len(row[name]))] for row in rows]
            assert batch[name].tolist() == padded, name

    _fuzz(
        check,
        texts=st.lists(st.lists(st.integers(0, 99), max_size=40), max_size=9),
        most=st.integers(-1, 50),
        packing=st.booleans(),
        eos=st.sampled_from((None, 7)),
        multiple=st.sampled_from((1, 64)),
    )


def test_fuzz_options():
    """Any value of any option is taken as it was given, or refused in one line."""
    from hypothesis import strategies as st

    names = "max_length packing lora_r lora_alpha lora_dropout target_modules dequant fuzz seed "
    names += "gradient_checkpointing learning_rate max_steps only stacks nonesuch"
    values = "-1 0 1 2 8 0.5 1e9 nan inf true False bnb nf4_triton q_proj x 1b hf,ours '' ."

    def check(name, value):
        argv = [f"--{name}", value, "--use_cpu", "true", "--output_dir", _folder().name]
        parsed = _refusal(lambda: _parse(argv))
        if parsed:
            held = [getattr(kind, name) for kind in parsed if hasattr(kind, name)]
            same = [value, [value], value.lower() == "true"]
            ok = held[0] in same or str(held[0]) == value or float(value) == held[0]
            assert ok and len(held) == 1, (name, value)

    _fuzz(check, name=st.sampled_from(names.split()), value=st.sampled_from(values.split()))


def test_fuzz_broken_configurations():
    """A checkpoint's config.json with another value somewhere: a model's, or one line of error."""
    from hypothesis import strategies as st

    transformers, config = _import("transformers"), json.loads(_llama("tiny").to_json_string())
    path = Path(_folder().name) / "broken"
    path.mkdir(exist_ok=True)
    values = [None, -1, 0, 1.5, 7, 2**40, "x", "llama", "t5", [], ["T5Model"], {}, {"a": 1}, True]
    names = [*config, "quantization_config", "attn_logit_softcapping", "sliding_window"]

    def check(name, value, cut):
        text = json.dumps({**config, "architectures": ["LlamaForCausalLM"], name: value})
        (path / "config.json").write_text(text[:cut])
        found = _refusal(lambda: _config_of(str(path), Options(max_length=64)))
        assert found is None or isinstance(found[0], transformers.PretrainedConfig)

    cuts = st.sampled_from([None] * 5 + [0, 1, 50, 300])
    _fuzz(check, name=st.sampled_from(names), value=st.sampled_from(values), cut=cuts)


def test_fuzz_data_files():
    """Files of any content: rows of text, or one line of error."""
    from hypothesis import strategies as st

    datasets, folder = _import("datasets"), Path(tempfile.mkdtemp(dir=_folder().name))
    tokenizer, count = _tokenizer(_checkpoint()), itertools.count()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
    pieces = ['{"text": "a b"}', '{"text": 5}', '{"text": null}', '{"messages": "hi"}', "text\nab"]
    pieces += ['{"messages": [{"role": "user", "content": "hi"}]}', "[", '{"text": ["a"]}', "a,b"]
    pieces += ['{"messages": [{"content": 5}]}', '{"messages": null}', "\0", '{"a": "b"}', '"']
    pieces = [piece.encode() for piece in pieces] + [b"\xff\xfe", b"PAR1", b""]

    def check(parts, kind):
        path = (
            folder / f"{next(count)}.{kind}"
        )  # a name of its own: datasets keeps what it has read
        path.write_bytes(b"\n".join(parts))
        texts = _refusal(lambda: load_texts(str(path), tokenizer))
        assert texts is None or texts and all(isinstance(t, str) for t in texts), texts

    lists = st.lists(st.sampled_from(pieces), max_size=3)
    datasets.disable_progress_bars()
    with mock.patch.object(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache")):
        _fuzz(check, parts=lists, kind=st.sampled_from(("jsonl", "json", "csv", "txt", "parquet")))
    datasets.enable_progress_bars()


# --------------------------------------------------------------------------------------------------
# Timings: every stack in a process of its own, on the same random tokens


def flops_per_token(config, length, lora_r) -> float:
    """Model FLOPs a token: 2 for each frozen weight forward and 2 for the gradient of its input (it
    has none of its own), 6 for each LoRA weight, attention's two products over the length / 2 keys
    that a token sees on average (backward: twice that), and the head like a frozen weight."""
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    shapes = [(hidden, heads * dim), (hidden, kv * dim), (hidden, kv * dim), (heads * dim, hidden)]
    shapes += [(hidden, inner)] * 2 + [(inner, hidden)]
    frozen = sum(a * b for a, b in shapes) * config.num_hidden_layers + hidden * config.vocab_size
    lora = sum(a + b for a, b in shapes) * lora_r * config.num_hidden_layers
    attention = 4 * heads * dim * (length / 2) * config.num_hidden_layers
    return 4 * frozen + 6 * lora + 3 * attention


def _unsloth(path, length, checkpointing):
    language = _import("unsloth").FastLanguageModel
    model, _ = language.from_pretrained(
        path, max_seq_length=length, dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True
    )
    how = "unsloth" if checkpointing else False
    lora = {"r": 32, "lora_alpha": 64, "lora_dropout": 0, "bias": "none", "random_state": 0}
    return language.get_peft_model(
        model, **lora, target_modules=list(TARGETS), use_gradient_checkpointing=how
    ).train()


GROUPS_OF_KERNELS = {
    "attention": r"sdpa|flash|fmha|cudnn|_forward_kernel|_dq_kernel|_dkv_kernel|softmax_warp",
    "LoRA added in place": r"badd",
    "matrix products": r"nvjet|gemm|cutlass|splitK|xmma",
    "dequantisation": r"_nf4_kernel|kDequantize",
    "gated activation": r"_gated_kernel",
    "loss by rows": r"_row_kernel|cross_entropy",
    "optimizer": r"multi_tensor|[Aa]dam",
    "inductor's kernels": r"^triton_",
}


def _by_group(step):
    """Milliseconds on the device of one step, by group of kernels."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
    return _groups(profiled)


def _groups(profiled, kinds=GROUPS_OF_KERNELS):
    """Milliseconds on the device of what was profiled, by group of kernels, the longest first."""
    found = collections.Counter()
    for event in profiled.key_averages():
        names = (kind for kind, pattern in kinds.items() if re.search(pattern, event.key))
        found[next(names, "other")] += event.self_device_time_total / 1e3
    return {kind: ms for kind, ms in found.most_common() if ms > 0}


def _power(step, times=8):
    """While steps run: the GPU's watts and MHz, each of how many; {} without nvidia-smi."""
    names = "power.draw,power.limit,clocks.sm,clocks.max.sm"
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    command = ["nvidia-smi", "-i", uuid, f"--query-gpu={names}", "--format=csv,noheader,nounits"]
    try:
        reader = subprocess.Popen([*command, "-lms", "50"], stdout=subprocess.PIPE, text=True)
    except OSError:
        return {}
    for _ in range(times):
        step()
    reader.terminate()
    found = re.findall(
        r"^([\d.]+), ([\d.]+), ([\d.]+), ([\d.]+)$", reader.communicate()[0], re.MULTILINE
    )
    columns = zip(*(map(float, line) for line in found[len(found) // 2 :]), strict=True)
    keys = "watts", "watts_most", "mhz", "mhz_most"
    return {key: statistics.median(column) for key, column in zip(keys, columns, strict=False)}


def _phases(model, batch, optimizer):
    """Peak GiB while each part of a step runs."""
    peaks = {"weights": torch.cuda.memory_allocated() / GIB}
    torch.cuda.reset_peak_memory_stats()
    value = _loss_of(model, batch)
    peaks["forward"] = _peak_gib(reset=True)
    value.backward()
    peaks["backward"] = _peak_gib(reset=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    peaks["optimizer"] = _peak_gib()
    return peaks


def _loss_of(model, batch):
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16):
        return model(**batch).loss


def worker(spec: dict) -> dict:
    """One stack in this process: {path, stack, checkpointing, batch, length, steps, ...}."""
    stack, device = spec["stack"], _device()
    begin = time.perf_counter()
    if stack == "unsloth":
        model = _unsloth(spec["path"], spec["length"], spec["checkpointing"])
        config = model.config
    else:
        options = Options(max_length=spec["length"], max_autotune=spec.get("max_autotune", False))
        options.offload = spec["checkpointing"] and device == "cuda"  # as Unsloth's does
        torch.manual_seed(0)
        model, _ = load(spec["path"], stack, options, torch.bfloat16, device)
        how = {"checkpointing": spec["checkpointing"], "fixed": True}
        config = prepare(model, stack, options, **how).config
    load_s = time.perf_counter() - begin
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=device == "cuda")
    generator = torch.Generator().manual_seed(1)
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    sizes = spec["batch"], spec["length"]

    def make():
        ids = torch.randint(0, config.vocab_size, sizes, generator=generator).to(device)
        mask = {} if stack.startswith("ours") else {"attention_mask": torch.ones_like(ids)}
        return {"input_ids": ids, "labels": ids, **mask}

    def step():
        batch = make()
        sync()
        start = time.perf_counter()
        value = _loss_of(model, batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sync()
        return time.perf_counter() - start, value.item()

    _reset()
    before = len(_metrics())
    times, losses = zip(*(step() for _ in range(spec["steps"])), strict=True)
    seconds = statistics.median(times[-6:])
    result = {
        **{k: spec[k] for k in ("name", "stack", "checkpointing", "batch", "length")},
        "tokens_per_s": sizes[0] * sizes[1] / seconds,
        "step_ms": seconds * 1e3,
        "first_s": times[0],
        "load_s": load_s,
        "peak_gib": _peak_gib(),
        "losses": losses,
    }
    compiled = getattr(model, "compiled_regions", None)
    report = compiled.report() if compiled else _foreign_report(before) if "hf_b" in stack else []
    result["report"] = report
    per_token = flops_per_token(config, sizes[1], 32)
    result["tflops"] = result["tokens_per_s"] * per_token / 1e12
    if device == "cuda":
        result["phases_gib"] = _phases(model, make(), optimizer)
        if spec.get("profile"):
            result["groups_ms"], result["power"] = _by_group(step), _power(step)
    return result


def _visible(gpu):
    """What CUDA_VISIBLE_DEVICES has to be where only this GPU of ours (from 0) is to be seen."""
    ours = os.environ.get("CUDA_VISIBLE_DEVICES")
    return ours.split(",")[gpu].strip() if ours else str(gpu)


def _spawn(spec, gpu, cache, running):
    """worker(spec) in a process of its own, which `running` has while it runs; {"error": its last
    line} if it fails."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    env |= {"UNSLOTH_DISABLE_STATISTICS": "1", "CUDA_VISIBLE_DEVICES": _visible(gpu)}
    env |= {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
    command = [sys.executable, os.path.abspath(__file__), "--worker", json.dumps(spec)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=env, **pipes) as process:
        running.append(process)
        out, err = process.communicate()
    running.remove(process)
    for line in reversed(out.splitlines()):
        if line.startswith("WORKER "):
            return json.loads(line[7:])
    words = (err.strip() or out.strip() or f"exit {process.returncode}").splitlines()
    return {**spec, "error": words[-1][:200]}


def _say_result(r):
    mode = "checkpointing" if r["checkpointing"] else "no checkpointing"
    name = f"{r['name']} {mode:<17} {r['stack']:<14}"
    if "error" in r:
        print(f"{name} failed: {r['error']}", flush=True)
        return
    peak = (
        PEAK_TFLOPS.get(torch.cuda.get_device_capability()) if torch.cuda.is_available() else None
    )
    mfu = f", MFU {100 * r['tflops'] / peak:.1f}%" if peak else ""
    phases = ", ".join(f"{k} {v:.2f}" for k, v in r.get("phases_gib", {}).items())
    first = f"{name} {r['tokens_per_s']:8.0f} tokens/s, {r['step_ms']:.1f} ms{mfu}; first step "
    lines = [f"{first}{r['first_s']:.1f} s; peak {r['peak_gib']:.2f} GiB ({phases})"]
    lines += [f"    {line}" for line in r.get("report", [])]
    if "groups_ms" in r:
        total = sum(r["groups_ms"].values())
        parts = ", ".join(f"{k} {v:.1f}" for k, v in r["groups_ms"].items())
        lines.append(f"    on the device {total:.1f} ms: {parts}")
    if p := r.get("power"):
        words = "{watts:.0f} of {watts_most:.0f} W, {mhz:.0f} of {mhz_most:.0f} MHz"
        lines.append("    while it runs " + words.format(**p))
    if "warm_first_s" in r:
        lines.append(f"    first step with a warm cache {r['warm_first_s']:.1f} s")
    print("\n".join(lines), flush=True)


PEAK_TFLOPS = {(9, 0): 989, (8, 0): 312, (7, 5): 65}  # dense half precision: H100/H200, A100, T4


def bench_gpu(results, names, options) -> dict:
    """TIMINGS by name. 1b and 8b: real shapes with random weights, batch 4 x 2048, r = 32 on all
    projections, every stack with and without checkpointing; results are added to, the headline
    figures returned. With --stacks ours_compiled is run again from the compiler's cache."""
    with tempfile.TemporaryDirectory(prefix="compile_qlora_bench_") as folder:
        return _bench_in(Path(folder), results, names, options)


def _bench_in(folder, results, names, options):
    unsloth = ["unsloth"] if importlib.util.find_spec("unsloth") else []
    stacks = _stacks(options, ["hf", "ours_compiled", *unsloth], "unsloth")
    free, jobs = torch.cuda.get_device_properties(0).total_memory / GIB, []
    for name in sorted(set(names) - {"challenge"}, reverse=True):  # the long ones first
        if free < {"1b": 30, "8b": 70}[name]:
            print(f"{name}: skipped, {free:.0f} GiB of GPU memory")
            continue
        path = write_checkpoint(folder / name, _llama(name), device="cuda")
        torch.cuda.empty_cache()
        common = {"name": name, "path": str(path), "batch": 4, "length": 2048, "steps": 12}
        common["max_autotune"] = options.max_autotune
        for checkpointing, stack in itertools.product((False, True), stacks):
            if not (checkpointing and stack == "hf_blocks"):  # slower than without, compiles long
                spec = {**common, "stack": stack, "checkpointing": checkpointing}
                jobs.append({**spec, "profile": stack == "ours_compiled"})
    gpus, running = queue.SimpleQueue(), []
    for gpu in range(torch.cuda.device_count()):
        gpus.put(gpu)

    def run(job):
        gpu = gpus.get()
        try:
            cold = str(folder / f"cache-{job['name']}-{job['checkpointing']}-{job['stack']}")
            found = _spawn(job, gpu, cold, running)
            if options.stacks and job["stack"] == "ours_compiled" and "error" not in found:
                warm = _spawn({**job, "steps": 3, "profile": False}, gpu, cold, running)
                found["warm_first_s"] = warm.get("first_s", math.nan)
            return found
        finally:
            gpus.put(gpu)

    results["speed"] = []
    pool = concurrent.futures.ThreadPoolExecutor(torch.cuda.device_count())
    try:
        for found in pool.map(run, jobs):
            _say_result(found)
            results["speed"].append(found)
    finally:  # after Ctrl-C nothing is started, and nothing goes on
        for process in running:
            process.kill()
        pool.shutdown(cancel_futures=True)
    if "challenge" in names:
        if not (folder / "1b").exists():
            write_checkpoint(folder / "1b", _llama("1b"), device="cuda")
            torch.cuda.empty_cache()
        results["challenge"] = _challenge(str(folder / "1b"), options)
    return _headline(results["speed"])


def _headline(speed):
    """By model and checkpointing: our rate over that of the best that is not ours."""
    head, by_name = {}, {}
    for r in speed:
        key = f"{r['name']}{'_ckpt' if r['checkpointing'] else ''}"
        by_name.setdefault(key, {})[r["stack"]] = r.get("tokens_per_s", 0.0)
    for key, rates in by_name.items():
        others = {stack: rate for stack, rate in rates.items() if not stack.startswith("ours")}
        best = max(others, key=others.get, default=None)
        if best and others[best] and rates.get("ours_compiled"):
            head[f"{key}_vs_{best}"] = rates["ours_compiled"] / others[best]
    return head


def _challenge(path, options, steps=30):
    """Batch 1, accumulation 2, rows of up to 1024 tokens, through Trainer; nothing may be compiled
    after the second step."""
    print("challenge C: batch 1, accumulation 2, lengths to 1024, r 32, Trainer", flush=True)
    how = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "seed": 3407}
    args = _arguments(**how, max_steps=steps, learning_rate=1e-4, **{_half(): True})
    mine = Options(max_length=1024, error_on_recompile=2, controls=options.controls)
    return compare(path, [*COMPARED], mine, args)[1]


def _arguments(**more):
    folder = tempfile.mkdtemp(dir=_folder().name)
    usual = {"output_dir": folder, "report_to": "none", "disable_tqdm": True, "logging_steps": 1e9}
    usual |= {"use_cpu": not torch.cuda.is_available(), "dataloader_pin_memory": False}
    usual |= {"log_level": "error", "save_strategy": "no"}
    return _import("transformers").TrainingArguments(**usual | more)


def bench_cpu(results, options) -> dict:
    path = _checkpoint("small", dtype=torch.bfloat16)
    how = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "seed": 3407}
    mine = Options(max_length=128, error_on_recompile=2, controls=options.controls)
    runs, results["cpu"] = compare(path, [*COMPARED], mine, _arguments(**how, max_steps=20))
    return {"compiled_vs_hf": runs["ours_compiled"].tokens_per_s / runs["hf"].tokens_per_s}


def plot_losses(curves, path, title, control=None):
    """Loss curves, {name: [loss of each step]}, over each other, and below how far each is from the
    first; `control`, likewise, has the first's own stack with its sums in another order. A PNG."""
    from matplotlib.figure import Figure

    figure = Figure((8, 7), layout="constrained", dpi=150)
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    (first, base), *_ = curves.items()
    looks, steps = itertools.cycle(("-", "--", ":", "-.")), lambda y: range(1, len(y) + 1)
    far = lambda y: [abs(a - b) or math.nan for a, b in zip(base, y, strict=False)]
    for (name, losses), mark in zip((control or {}).items(), itertools.cycle("s^vdx")):
        below.plot(steps(losses), far(losses), f"{mark}-", color="0.65", markersize=3, label=name)
    for i, (name, losses) in enumerate(curves.items()):
        style, width = {"color": f"C{i}", "linestyle": next(looks)}, 3 - 2 * i / len(curves)
        above.plot(steps(losses), losses, **style, linewidth=width, label=name)
        if i:
            below.plot(steps(losses), far(losses), "o-", color=f"C{i}", markersize=3)
    above.set(title=title, ylabel="loss (nats a label)")
    below.xaxis.get_major_locator().set_params(integer=True)
    below.set(yscale="log", xlabel="optimizer step", ylabel=f"distance to {first} (nats)")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    _write(path, lambda part: figure.savefig(part, format="png"))
    print(f"drawn: {path}")


def plot(results, path):
    """The loss curves of the comparison that this run made, as a PNG."""
    found = results.get("challenge") or results.get("cpu") or results
    names = {stack: f"{stack}, eager" for stack in ("hf", "ours")}
    curves = {names.get(k, k): found[k]["losses"] for k in STACKS if k in found}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    title = f"Training with the same seed and data, on {device}"
    control = {
        f"control: hf, {k} in another order": v for k, v in found.get("controls", {}).items() if v
    }
    plot_losses(curves, path, title, control)


# --------------------------------------------------------------------------------------------------


def _explain(error) -> tuple[int, str]:
    """(exit code, one line) for what ended a run; "" if it was not foreseen."""
    line, dynamo = " ".join(str(error).split())[:400], torch._dynamo.exc
    if isinstance(error, KeyboardInterrupt):
        return 130, "; ".join(filter(None, ("interrupted", line)))
    if isinstance(error, AssertionError):
        return 1, f"a check failed: {line}"
    if found := _no_memory(error):
        less = "less: --per_device_train_batch_size, --max_length, --gradient_checkpointing true"
        return 1, f"out of memory: {found}, need {less}"
    if isinstance(error, dynamo.RecompileError):
        return 1, f"compiled again after the warm-up: {line}"
    if isinstance(error, dynamo.BackendCompilerFailed):
        return 1, f"a region could not be compiled: {line}"
    if isinstance(error, dynamo.TorchDynamoException):
        return 1, f"a region has a graph break: {line}"
    if isinstance(error, ModuleNotFoundError):
        return 77, f"found no {error.name}, need it installed, see requirements.txt"
    if isinstance(error, ImportError):
        return 77, line
    if type(error).__name__ == "SafetensorError":
        return 2, f"a file of safetensors cannot be read or written: {line}"
    if isinstance(error, RuntimeError) and re.search(r"unexpected pos|PytorchStreamWriter", line):
        return 2, f"torch.save could not write: found {line[:80]}, need room at --output_dir"
    if isinstance(error, RuntimeError) and "PytorchStreamReader" in line:
        return 2, f"torch.load cannot read: found {line[:80]}, need a whole checkpoint"
    if isinstance(error, (ValueError, TypeError, OSError)):
        return 2, line
    return 1, ""


def _parse(argv, kind=Options, doc=__doc__, output_dir="results/compile_qlora", **defaults):
    """(options of a kind, TrainingArguments) of a command line, explained by a script's doc."""
    transformers = _import("transformers")
    first, usage = doc.split("\n")[0], doc[doc.index("    python ") :]
    kinds = kind, transformers.TrainingArguments
    formats = argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter
    style = {"formatter_class": type("Format", formats, {})}  # the examples as they are, defaults
    parser = transformers.HfArgumentParser(kinds, description=first, epilog=usage, **style)

    def refuse(message):  # argparse's own way prints a hundred lines of usage
        _need(False, "options", message, "what --help shows")

    parser.error = refuse
    parser.set_defaults(output_dir=output_dir, report_to="none", **defaults)
    *parsed, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    _need(not rest, "options", " ".join(rest), "what --help shows")
    _settle_tf32(parsed[1])
    return parsed


def _stacks(options, usual, *more):
    """Those asked for, or the usual."""
    stacks, known = options.stacks.split(",") if options.stacks else usual, [*STACKS, *more]
    for stack in stacks:
        _need(stack in known, "stacks", repr(stack), f"some of {', '.join(known)}")
    return stacks


def _is_whole(file):
    try:
        json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return True


def _whole_checkpoint(args):
    """The checkpoint to go on from; trainer_state.json is what Trainer writes last into one."""
    resume = args.resume_from_checkpoint
    if not resume or resume in ("false", "False", "0"):
        return None
    found = [resume]
    if resume in ("true", "True", "1"):
        folders = Path(args.output_dir).glob("checkpoint-*[0-9]")
        found = sorted(map(str, folders), key=lambda name: int(name.rsplit("-", 1)[-1]))
    whole = [name for name in found if _is_whole(Path(name) / "trainer_state.json")]
    words = f"{', '.join(found) or 'no checkpoint'} in {args.output_dir}"
    _need(whole, "resume_from_checkpoint", words, "one with a whole trainer_state.json, its last")
    return whole[-1]


def _train(options, args) -> dict:
    """--model and --dataset: what was trained, for --json."""
    stacks = _stacks(options, [*COMPARED])
    backend = args.torch_compile_backend or "inductor"
    _need_backend(backend, "torch_compile_backend")
    if torch.cuda.is_available() and not args.use_cpu:
        capability = torch.cuda.get_device_capability()
        if backend == "inductor" and "ours_compiled" in stacks:
            ok = capability >= (7, 0)
            _need(
                ok,
                "torch_compile_backend",
                f"inductor on sm_{capability[0]}{capability[1]}",
                "sm_70",
            )
        if not args.fp16 and not args.bf16:
            args = _in_precision(args, _half())
        ok = not args.bf16 or _half() == "bf16"
        _need(ok, "bf16", f"sm_{capability[0]}{capability[1]}", "--fp16 true")
    if options.log:
        Path("results").mkdir(exist_ok=True)
        os.environ["TORCH_LOGS_OUT"] = "results/compile_qlora_torch.log"
        torch._logging.set_logs(graph_breaks=True, recompiles=True, recompiles_verbose=True)
        print("the compiler's log: results/compile_qlora_torch.log")
    path = options.model or _checkpoint("small", dtype=torch.bfloat16)
    resume = _whole_checkpoint(args)
    return compare(path, stacks, options, args, save=True, resume=resume, backend=backend)[1]


def _plan(options, gpu) -> tuple[bool, list[str], bool]:
    """(whether it tests, what it times, whether it trains); ValueError, before any work, for options
    that do not go together and files that could not be written at its end."""
    trains, only = bool(options.model or options.dataset), options.test or options.bench
    ok = not (trains and (only or options.fuzz))
    _need(ok, "--model, --dataset", "--test, --bench or --fuzz beside them", "either")
    known = "none", "few", "all"
    _need(options.controls in known, "--controls", options.controls, f"one of {', '.join(known)}")
    tests = bool(options.test or options.fuzz or not (options.bench or trains))
    times = options.bench or not (options.test or options.fuzz or trains)
    names = options.only.split(",") if options.only else ["1b"]
    _need(set(names) <= {*TIMINGS}, "--only", options.only, f"some of {', '.join(TIMINGS)}")
    _need(times or not options.only, "--only", "no timings to choose from", "--bench")
    _need(gpu or not options.only, "--only", "no GPU", "one: a CPU has one timing")
    _need(times or trains or not options.plot, "--plot", "no losses", "timings or --model")
    _check_paths(options.plot, options.json)  # what is written last is looked at first
    if options.plot:
        import matplotlib  # noqa: F401

        names.append("challenge")
    return tests, names if times else [], trains


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--worker"]:
        print("WORKER " + json.dumps(worker(json.loads(argv[1]))), flush=True)
        return 0
    results, head, code, checks = {}, {}, 0, 0
    try:
        options, args = _parse(argv)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        versions = {"torch": torch.__version__.split("+")[0], "triton": triton.__version__}
        for name in ("transformers", "peft", "bitsandbytes"):
            versions[name] = _import(name).__version__
        versions |= {"cuda": torch.version.cuda, "seed": args.seed}
        words = (f"{k} {v}" for k, v in versions.items())
        print("compile_qlora", device, *words, sep=" | ", flush=True)
        gpu = torch.cuda.is_available()
        tests, names, trains = _plan(options, gpu)
        if tests:
            code, checks = _self_test(options.fuzz, args.seed, sys.modules[__name__])
        if names and not code:
            head = bench_gpu(results, names, options) if gpu else bench_cpu(results, options)
            failed = (r for r in results.get("speed", ()) if r["stack"] != "unsloth")
            code = int(any("error" in r for r in failed))
        if trains:
            results |= _train(options, args)
        if options.plot and not code:
            plot(results, options.plot)
        if options.json:
            found = {"device": device, **versions, **results, **head}
            _write(options.json, lambda part: part.write_text(json.dumps(found, indent=1)))
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 (a traceback if unforeseen)
        code, words = _explain(error)
        print(f"compile_qlora: {words}" if words else traceback.format_exc(), file=sys.stderr)
    figures = " ".join(f"{k}={v:.2f}x" for k, v in head.items())
    print(f"RESULT compile_qlora {'FAIL' if code else 'PASS'} checks={checks} {figures}".rstrip())
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, INTERRUPT)
    sys.exit(main())
