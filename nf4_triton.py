"""NF4 to fp16, bf16 or fp32 in one Triton kernel, bit-equal to bitsandbytes' CUDA kernels.

Problem: bitsandbytes keeps a QLoRA weight as 4-bit codes with a scale ("absmax") per 64 weights;
with double quantisation the scales are 8-bit codes too. Its dequantisation is three launches and
two temporary buffers: decode the scales, add their mean, decode the weights, twice per layer and
step.

Idea: four fifths of the bytes are the output, so the floor is a memset of it. A lane takes a 32-bit
word (8 weights of one block), decodes the block's scale itself and writes one 16-byte store.
- The NF4 table lives in a warp's registers, entry i in lane i, read by inline PTX `shfl.sync.idx`.
  shfl uses 5 bits of its index and lanes 16-31 repeat the table: a code needs a shift, no mask.
- Codes are read once and the output is too large to stay: both are marked evict-first. Of a large
  weight each program prefetches into the L2 what a program after the running ones will read.
- The launch goes to the driver (cuLaunchKernelEx, ctypes), from sm_90 on with programmatic
  dependent launch: a call costs the host little and back-to-back launches overlap.
- The scale takes two fp32 roundings as in bitsandbytes, so multiply-add fusion is off.

Left out: FP4 (bitsandbytes does it), AMD and Intel GPUs, and products that never dequantise, which
win for a few rows (`patch_bitsandbytes` leaves those to bitsandbytes). Not run on a T4: `--target`
shows what can be shown without one. Run on an H200 and, through Triton's interpreter, on CPUs.

    python nf4_triton.py                  self-test, then timings; --test or --bench for one of them
    python nf4_triton.py --target sm_75   registers, SASS and what bounds the kernel on a T4
    python nf4_triton.py --storage        how small 4-bit storage could get (or of FILE.safetensors)
    compute-sanitizer --tool racecheck python -m pytest nf4_triton.py -k bits_equal    (or memcheck)

    from nf4_triton import dequantize_nf4, patch_bitsandbytes
    weight = dequantize_nf4(layer.weight, layer.weight.quant_state)
    with patch_bitsandbytes():
        trainer.train()
"""

import argparse
import concurrent.futures
import contextlib
import copy
import ctypes
import functools
import io
import itertools
import json
import math
import os
import random
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
import unittest.mock
import weakref
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # Ctrl-C while torch is imported: nothing else can catch it yet
    INTERRUPT = signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch._C._dynamo import guards
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language.extra.cuda import gdc_wait
from triton.runtime.interpreter import InterpretedFunction

# The NormalFloat4 levels (QLoRA, arXiv 2305.14314, appendix E) as bitsandbytes' kernels hold them.
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453)
NF4 += (-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0)
NF4 += (0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224)
NF4 += (0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
FUZZ_CASES = "25"  # of each random test in the self-test
PACKED_BYTES = 0.5 + 1 / 64 + 4 / 16384  # read per weight: codes, absmax, absmax2 (64, nested 256)
# Compute capability: published GPU, bytes/s, SMs, boost clock in Hz
CHIPS = {75: ("T4", 320e9, 40, 1.59e9), 80: ("A100", 2039e9, 108, 1.41e9)}
CHIPS |= {89: ("L4", 300e9, 58, 2.04e9), 90: ("H200", 4800e9, 132, 1.98e9)}
CHIPS |= {100: ("B200", 8000e9, 148, 1.96e9)}

# --------------------------------------------------------------------------------------------------
# What a weight and its QuantState hold, checked; and the definition in plain PyTorch


class Packed(NamedTuple):
    weight: torch.Tensor  # two codes per byte, high nibble first, in any storage dtype
    absmax: torch.Tensor  # [blocks] uint8 (nested) or fp32 (flat)
    code2: torch.Tensor | None  # [256] fp32
    absmax2: torch.Tensor | None  # [ceil(blocks / blocksize2)] fp32
    offset: torch.Tensor | None  # one fp32 on the weight's device: reading it would synchronise
    blocksize: int
    blocksize2: int  # 0: flat
    shape: tuple[int, ...]
    dtype: torch.dtype


def _need(ok, name, found, need, error=ValueError):
    if not ok:
        raise error(f"{name}: found {' '.join(str(found).split())[:80]}, need {need}")


def _need_tensor(name, tensor, dtype, count, device):
    _need(torch.is_tensor(tensor), name, type(tensor).__name__, "a tensor", TypeError)
    _need(tensor.dtype == dtype, f"{name}.dtype", tensor.dtype, dtype, TypeError)
    _need(tensor.numel() == count, name, f"shape {tuple(tensor.shape)}", f"{count} values")
    _need(tensor.is_contiguous(), name, f"strides {tensor.stride()}", "a contiguous tensor")
    _need(tensor.device == device, name, f"on {tensor.device}", f"it on {device}")


def _unpack(weight, state, dtype=None, out=None) -> Packed:
    _need(hasattr(state, "absmax"), "quant_state", type(state).__name__, "a QuantState", TypeError)
    _need(state.quant_type == "nf4", "quant_type", repr(state.quant_type), "'nf4'")
    repacked = getattr(state, "packing_format_for_cpu", False)
    _need(not repacked, "weight", "it packed for bitsandbytes' CPU kernels", "the usual packing")
    _need(torch.is_tensor(weight), "weight", type(weight).__name__, "a tensor", TypeError)
    shape = state.shape
    ok = isinstance(shape, (tuple, list)) and all(isinstance(n, int) and n >= 0 for n in shape)
    _need(ok, "quant_state.shape", shape, "sizes", TypeError)
    dtype, shape, device = dtype or state.dtype, tuple(shape), weight.device
    _need(dtype in DTYPES, "dtype", dtype, "float16, bfloat16 or float32", TypeError)
    ok = weight.dtype in (torch.uint8, *DTYPES)
    _need(ok, "weight.dtype", weight.dtype, "uint8 or 16/32-bit floats", TypeError)
    _need(weight.is_contiguous(), "weight", f"strides {weight.stride()}", "a contiguous tensor")
    blocksize, blocksize2, code2, absmax2, offset = state.blocksize, 0, None, None, None
    ok = isinstance(blocksize, int) and blocksize in (32, 64, 128, 256, 512, 1024, 2048, 4096)
    _need(ok, "blocksize", blocksize, "a power of two from 32 to 4096")
    numel = math.prod(shape)
    size, want, blocks = weight.element_size(), (numel + 1) // 2, triton.cdiv(numel, blocksize)
    nbytes = weight.numel() * size
    _need(want <= nbytes < want + size, "weight", f"{nbytes} bytes", f"{want} for {shape}")
    if state.state2 is not None:
        ok = hasattr(state.state2, "absmax")
        _need(ok, "state2", type(state.state2).__name__, "a QuantState", TypeError)
        code2, absmax2, blocksize2 = state.state2.code, state.state2.absmax, state.state2.blocksize
        _need(not getattr(state.state2, "state2", None), "state2", "a nested state", "a flat one")
        ok = isinstance(blocksize2, int) and 0 < blocksize2 < 2**31
        _need(ok, "state2.blocksize", blocksize2, "a positive 32-bit integer")
        offset = state.offset
        ok = offset.numel() == 1 if torch.is_tensor(offset) else isinstance(offset, (int, float))
        found = f"shape {tuple(offset.shape)}" if torch.is_tensor(offset) else repr(offset)
        _need(ok, "offset", found, "a number or a tensor of one")
        if not torch.is_tensor(offset) or offset.device.type == "cpu" != device.type:
            # Old checkpoints: a fill, because a copy to the GPU would be waited for.
            offset = torch.full((), float(offset), device=device)
        offset = offset.to(torch.float32)
        _need_tensor("state2.code", code2, torch.float32, 256, device)
        count = triton.cdiv(blocks, blocksize2)
        _need_tensor("state2.absmax", absmax2, torch.float32, count, device)
        _need_tensor("offset", offset, torch.float32, 1, device)
    kind = torch.float32 if state.state2 is None else torch.uint8
    _need_tensor("absmax", state.absmax, kind, blocks, device)
    if out is not None:
        _need(out.shape == shape, "out.shape", tuple(out.shape), shape)
        _need_tensor("out", out, dtype, numel, device)
    return Packed(weight, state.absmax, code2, absmax2, offset, blocksize, blocksize2, shape, dtype)


def _dequantize_torch(p: Packed) -> torch.Tensor:
    """fp32 products with every rounding where bitsandbytes' CUDA kernels have it."""
    numel, table = math.prod(p.shape), torch.tensor(NF4, device=p.weight.device)
    # Both levels of a byte in one 64-bit number: moved as one it is 6 times faster than as two
    pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], 1).view(torch.float64)
    bytes_ = p.weight.flatten().view(torch.uint8).int()
    values = pairs.flatten().index_select(0, bytes_).view(torch.float32)
    scale = p.absmax
    if p.blocksize2:
        absmax2 = p.absmax2.repeat_interleave(min(p.blocksize2, scale.numel()))[: scale.numel()]
        scale = p.code2[scale.int()] * absmax2 + p.offset
    full = scale.numel() * p.blocksize
    values = values[:full] if values.numel() >= full else F.pad(values, (0, full - values.numel()))
    values = values.view(-1, p.blocksize).mul_(scale[:, None])
    return values.flatten()[:numel].to(p.dtype).view(p.shape)


# --------------------------------------------------------------------------------------------------
# The kernel


def _table_ptx() -> str:
    """PTX for $0 = NF4[laneid % 16]: a tree of 15 selects, run while the loads are in flight."""
    bits = [f"0f{torch.tensor(x).view(torch.int32).item() & 0xFFFFFFFF:08X}" for x in NF4]
    ptx = [".reg .b32 lane, bit; .reg .f32 t<8>; .reg .pred p<4>; mov.u32 lane, %laneid;"]
    ptx += [f"and.b32 bit, lane, {1 << b}; setp.ne.u32 p{b}, bit, 0;" for b in range(4)]
    ptx += [f"selp.f32 t{i}, {bits[2 * i + 1]}, {bits[2 * i]}, p0;" for i in range(8)]
    ptx += [f"selp.f32 t{i}, t{2 * i + 1}, t{2 * i}, p1;" for i in range(4)]
    ptx += [f"selp.f32 t{i}, t{2 * i + 1}, t{2 * i}, p2;" for i in range(2)]
    return "{ " + " ".join(ptx) + " selp.f32 $0, t1, t0, p3; }"


LEVELS, TABLE_PTX = tl.constexpr(NF4), tl.constexpr(_table_ptx())
LOOKUP_PTX = tl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;")
# One thread asks for $2 bytes from $1 on to come to the L2, if $3 is 1. A multiple of 16 each.
PREFETCH_PTX = "{ .reg .b32 tid; .reg .pred p; mov.u32 tid, %tid.x; setp.lt.u32 p, tid, $3; "
PREFETCH_PTX += "@p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }"
PREFETCH_PTX = tl.constexpr(PREFETCH_PTX)


# RAGGED: the last tile is not full or a pointer is not 16-byte aligned, so read bytes and mask. SM:
# compute capability; 0 under the interpreter, which has no inline PTX.
# fmt: off
@triton.jit
def _nf4_kernel(weight_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, out_ptr, numel,
                BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, WORDS: tl.constexpr,
                AHEAD: tl.constexpr, RAGGED: tl.constexpr, SM: tl.constexpr):
    # Claiming no contiguity keeps one word per lane, the layout of the 16-byte stores: nothing
    # passes through shared memory.
    word = tl.max_contiguous(tl.arange(0, WORDS), 1)
    column = tl.arange(0, 8)
    if SM >= 90:
        gdc_wait()  # launched beside the previous kernel's tail: touch no memory before it is done
    first = tl.program_id(0).to(tl.int64) * WORDS  # int64: numel may pass 2^31
    left = numel - first * 8
    inside = word * 8 < left if RAGGED else None
    none = 0 if RAGGED else None  # what a masked load returns

    if AHEAD > 0 and SM >= 90 and not RAGGED:  # what the program AHEAD of this one will read
        ahead = first + AHEAD * WORDS
        some = (ahead * 8 < numel).to(tl.int32)
        part = [(weight_ptr + ahead).to(tl.int64, bitcast=True), WORDS * 4, some]
        tl.inline_asm_elementwise(PREFETCH_PTX, "=r,l,r,r", part, tl.int32, False, 1)
        nbytes: tl.constexpr = WORDS * 8 // BLOCKSIZE * (1 if BLOCKSIZE2 > 0 else 4)
        if nbytes % 16 == 0:
            part = [(absmax_ptr + ahead * 8 // BLOCKSIZE).to(tl.int64, bitcast=True), nbytes, some]
            tl.inline_asm_elementwise(PREFETCH_PTX, "=r,l,r,r", part, tl.int32, False, 1)
    if RAGGED:
        codes = tl.full([WORDS], 0, tl.int32)
        for i in tl.static_range(4):
            mask = word * 8 + i * 2 < left
            byte = tl.load(weight_ptr + (first * 4 + word * 4 + i), mask=mask, other=0)
            codes |= byte.to(tl.int32) << (8 * i)
    else:
        codes = tl.load(weight_ptr + (first + word), eviction_policy="evict_first")

    # A tile holds whole blocks or lies inside one, so its first block and a word's own split apart.
    first_block, block = first * 8 // BLOCKSIZE, word * 8 // BLOCKSIZE
    scale = tl.load(absmax_ptr + (first_block + block), mask=inside, other=none)
    if BLOCKSIZE2 > 0:
        if BLOCKSIZE2 % max(1, WORDS * 8 // BLOCKSIZE) == 0:  # one absmax2 for the whole tile
            absmax2 = tl.load(absmax2_ptr + first_block // BLOCKSIZE2)
        else:
            at = absmax2_ptr + (first_block + block) // BLOCKSIZE2
            absmax2 = tl.load(at, mask=inside, other=none)
        scale = tl.load(code2_ptr + scale) * absmax2 + tl.load(offset_ptr)

    codes = codes[:, None] >> ((column ^ 1) * 4)[None, :]  # little-endian word, high nibble first
    if SM > 0:
        table = tl.inline_asm_elementwise(TABLE_PTX, "=f,r", [word], tl.float32, True, 1)
        pair = [table[:, None], codes]
        level = tl.inline_asm_elementwise(LOOKUP_PTX, "=f,f,r", pair, tl.float32, True, 1)
    else:
        level = tl.full([WORDS, 8], 0.0, tl.float32)
        for i in tl.static_range(16):
            level = tl.where((codes & 15) == i, LEVELS[i], level)
    value = level * scale[:, None]
    if out_ptr.dtype.element_ty == tl.bfloat16 and SM < 80:
        # No bf16 conversion before sm_80: round to nearest even in integers. The minimum takes the
        # GPU's NaN, 0x7FFFFFFF, to bf16's 0x7FFF and leaves all else.
        bits = tl.minimum(value.to(tl.int32, bitcast=True), 0x7FFF7FFF)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        value = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    at = out_ptr + first * 8 + (word[:, None] * 8 + column[None, :])
    mask = word[:, None] * 8 + column[None, :] < left if RAGGED else None
    tl.store(at, value, mask=mask, cache_modifier=".cs")
# fmt: on


def _tile(numel: int, sms: int) -> tuple[int, int, int]:
    """(words per program, warps, programs to prefetch ahead), the best of 9 tiles on an H200, 128
    words on 2 warps to 2048 on 16. As multiples of a memset's time: with 4 million weights 512 on 4
    takes 1.06 and 1024 on 16 1.14; with 17, 59 and 235 million they take 1.16, 1.10, 1.08 and 1.12,
    1.06, 1.05. Prefetching 1.25 times what runs at once makes that 3, 1.5 and 1 percent less."""
    return (512, 4, 0) if numel < 2**23 else (1024, 16, 5 * sms)


@functools.cache
def compile_kernel(sm, dtype, blocksize=64, blocksize2=256, tile=(512, 4, 0), ragged=False):
    """The Triton CompiledKernel for compute capability `sm` (75, 80, ...). Needs no GPU."""
    ok = not isinstance(_nf4_kernel, InterpretedFunction)
    _need(ok, "TRITON_INTERPRET", 1, "it unset when triton is imported", RuntimeError)
    constants = {"BLOCKSIZE": blocksize, "BLOCKSIZE2": blocksize2, "WORDS": tile[0]}
    constants |= {"AHEAD": tile[2], "RAGGED": ragged, "SM": sm}
    types = ["*u8" if ragged else "*i32", "*u8" if blocksize2 else "*fp32", *["*fp32"] * 3]
    types += [f"*{dtype}", "i64", *["constexpr"] * len(constants)]
    signature = dict(zip(_nf4_kernel.arg_names, types, strict=True))
    attrs = {} if ragged else {(i,): [["tt.divisibility", 16]] for i in range(6)}
    options = {"num_warps": tile[1], "enable_fp_fusion": False}  # fused, scales differ in one bit
    source = ASTSource(_nf4_kernel, signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


# --------------------------------------------------------------------------------------------------
# The launch. On one H200's host Triton's CompiledKernel.run takes 8 us, this 5 (the driver alone 4)


class _Attribute(ctypes.Structure):  # CUlaunchAttribute
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):  # CUlaunchConfig
    _fields_ = (("sizes", ctypes.c_uint * 7), ("stream", ctypes.c_void_p))  # grid, block, shared
    _fields_ += (("attrs", ctypes.c_void_p), ("count", ctypes.c_uint))


def _check(code: int):
    if code:
        raise RuntimeError(f"CUDA driver: error {code}")


def _runs_on(device: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (7, 5)


@functools.cache
def _driver():
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


def _bind(device: int):
    """Gives this thread the device's context if it has none. CUDA's runtime does so at its first
    call in a thread, the driver does not, and autograd's threads may come here first."""
    cuda, context, handle = _driver(), ctypes.c_void_p(), ctypes.c_int()
    _check(cuda.cuCtxGetCurrent(ctypes.byref(context)))
    if not context:
        _check(cuda.cuDeviceGet(ctypes.byref(handle), device))
        _check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle))
        _check(cuda.cuCtxSetCurrent(context))


@functools.cache
def _load(device: int, *variant):
    """(cuLaunchKernelEx, CUfunction, bytes of shared memory, overlap launches?) on `device`."""
    sm = torch.cuda.get_device_capability(device)
    found, need = f"compute capability {sm}", "an NVIDIA GPU of 7.5 or more"
    _need(_runs_on(device), "GPU", found, need, RuntimeError)
    cuda = _driver()
    compiled = compile_kernel(sm[0] * 10 + sm[1], *variant)
    module, function, version = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()
    with torch.cuda.device(device):
        _check(cuda.cuModuleLoadData(ctypes.byref(module), compiled.asm["cubin"]))
    name = compiled.metadata.name.encode()
    _check(cuda.cuModuleGetFunction(ctypes.byref(function), module, name))
    _check(cuda.cuDriverGetVersion(ctypes.byref(version)))
    overlap = sm >= (9, 0) and version.value >= 12030  # before 12.3 graphs cannot capture it
    return cuda.cuLaunchKernelEx, function, compiled.metadata.shared, overlap


class _Launch:
    """One weight's kernel, ready to go: only the output and the stream change from call to call."""

    def __init__(self, p: Packed, out_ptr: int = 0):
        numel, pointers = math.prod(p.shape), [0 if t is None else t.data_ptr() for t in p[:5]]
        self.index = p.weight.device.index
        sms = torch.cuda.get_device_properties(self.index).multi_processor_count
        tile = _tile(numel, sms)
        ragged = numel % (tile[0] * 8) != 0 or any(ptr % 16 for ptr in (*pointers, out_ptr))
        variant = (DTYPES[p.dtype], p.blocksize, p.blocksize2, tile, ragged)
        _bind(self.index)
        driver, function, shared, overlap = _load(self.index, *variant)
        self.args = (ctypes.c_uint64 * 9)(*pointers, 0, numel)  # the last two: Triton's, unused
        base = ctypes.addressof(self.args)
        self.params = (ctypes.c_void_p * 9)(*range(base, base + 72, 8))
        self.overlap = _Attribute(6, 0, (ctypes.c_int * 16)(1))  # programmatic stream serialization
        attrs = (ctypes.addressof(self.overlap), 1) if overlap else (None, 0)
        sizes = (triton.cdiv(numel, tile[0] * 8), 1, 1, 32 * tile[1], 1, 1, shared)
        self.config = _Config(sizes, None, *attrs)
        # Ready-made argument objects: converted from integers in each call they cost 0.1 us
        args = ctypes.byref(self.config), function, ctypes.byref(self.params), None
        self.go, self.ragged = functools.partial(driver, *args), ragged

    def move(self, weight, state) -> bool:
        """Takes the addresses anew, of tensors whose storage was freed and allocated again, as
        FSDP2 does with what it gathers. False if anything else has changed."""
        tensors = _tensors(weight, state)
        pointers = [t.data_ptr() for t in tensors]
        same = len(tensors) == len(self.seen) and all(
            t is ref() and (t.dtype, t.numel(), t.device) == kind
            for t, (ref, kind) in zip(tensors, self.seen, strict=True)
        )
        if not same or not self.ragged and any(pointer % 16 for pointer in pointers):
            return False
        self.args[: len(pointers)] = pointers
        self.weight_ptr, self.absmax_ptr = pointers[:2]
        self.nested_ptr = pointers[3] if state.state2 else pointers[1]
        return True


def _tensors(weight, state):
    """A weight's, in the kernel's order."""
    nested = state.state2
    return [weight, state.absmax, *([nested.code, nested.absmax, state.offset] if nested else [])]


def _run(p: Packed, out: torch.Tensor | None = None) -> torch.Tensor:
    device = p.weight.device
    if device.type == "cpu":
        return _dequantize_torch(p) if out is None else out.copy_(_dequantize_torch(p))
    out = torch.empty(p.shape, dtype=p.dtype, device=device) if out is None else out
    if out.numel():
        with torch.cuda.device(device):
            launch = _Launch(p, out.data_ptr())
            launch.args[5] = out.data_ptr()
            launch.config.stream = torch.cuda.current_stream().cuda_stream
            _check(launch.go())
    return out


_OP = "nf4_triton::dequantize"
_SCHEMA = "(Tensor weight, Tensor absmax, Tensor? code2, Tensor? absmax2, Tensor? offset, "
_SCHEMA += "int blocksize, int blocksize2, int[] shape, ScalarType dtype) -> Tensor"
torch.library.define(_OP, _SCHEMA)
torch.library.impl(_OP, ("CPU", "CUDA"), lambda *args: _run(Packed(*args)))


@torch.library.register_fake(_OP)
def _fake(weight, absmax, code2, absmax2, offset, blocksize, blocksize2, shape, dtype):
    return torch.empty(shape, dtype=dtype, device=weight.device)


# --------------------------------------------------------------------------------------------------
# Public functions


class _Local(threading.local):  # a _Launch is not for two threads at once: ctypes drops the GIL
    def __init__(self):
        self.known = {}  # id(quant_state) -> its _Launch


_local = _Local()
# Bound once: looked up in every call they cost 0.3 us. getattr: CPU builds of torch lack two.
_is_tracing, _empty_strided = torch.compiler.is_dynamo_compiling, guards._empty_strided_cuda
_plain_tensors = torch._C.DisableTorchFunctionSubclass
_current_device = getattr(torch._C, "_cuda_getDevice", None)
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def _dequantize(weight, state, out, dtype):
    """dequantize_nf4 of a pair not seen before, on any device, and in torch.compile."""
    p = _unpack(weight, state, dtype, out)
    compiling = torch.compiler.is_compiling()
    if out is None or compiling:
        result = torch.ops.nf4_triton.dequantize(*p)
        out = result if out is None else out.copy_(result)
    else:
        _run(p, out)
    if not compiling and weight.is_cuda and p.shape and out.numel() and p.offset is state.offset:
        # To be launched at once next time. An old checkpoint's offset is converted each time.
        known, key, launch = _local.known, id(state), _Launch(p)
        known[key], launch.state = launch, weakref.ref(state, lambda _: known.pop(key, None))
        launch.weight, launch.transposed = weakref.ref(weight), weight.shape[0] == 1
        launch.shape, launch.dtype, launch.offset = state.shape, p.dtype, state.offset
        nested, (launch.weight_ptr, launch.absmax_ptr) = state.state2 or state, launch.args[:2]
        launch.nested_ptr, launch.code = nested.absmax.data_ptr(), nested.code
        kinds = ((weakref.ref(t), (t.dtype, t.numel(), t.device)) for t in _tensors(weight, state))
        launch.seen = list(kinds)
        launch.kind = (p.shape, p.dtype, weight.device, True, 0)
        # *shape: as one torch.Size it takes 8 us to parse, as numbers 2.5
        launch.empty = functools.partial(torch.empty, *p.shape, dtype=p.dtype, device=weight.device)
        if threading.current_thread() is threading.main_thread():
            # What inductor's code allocates by, on the current device, takes 1.2. But it keeps the
            # GIL while it calls CUDA, at which threads hang under compute-sanitizer's memcheck.
            strides = torch.empty(p.shape, device="meta").stride()
            launch.empty = functools.partial(_empty_strided, p.shape, strides, p.dtype)
    return out.t() if weight.shape[0] == 1 else out


def dequantize_nf4(weight, quant_state, out=None, *, dtype=None) -> torch.Tensor:
    """The weight behind a bitsandbytes parameter, NF4[code] * (code2[absmax] * absmax2 + offset).

    weight: codes in uint8, bf16, fp16 or fp32 storage, [n, 1] or, transposed, [1, n]. quant_state:
    its bitsandbytes.functional.QuantState, nested or flat. out: contiguous, of quant_state.shape.
    dtype: fp16, bf16 or fp32 in place of quant_state.dtype.
    Returns quant_state.shape (its transpose for a transposed weight). On CUDA: one kernel on the
    current stream, the bits of bitsandbytes' CUDA kernels, no synchronisation, no other buffer. On
    CPU: the same bits by PyTorch. In torch.compile: the operator nf4_triton::dequantize. ValueError
    or TypeError if weight, state and out do not fit together, for FP4 and for CPU-packed states.
    """
    if _is_tracing():
        return _dequantize(weight, quant_state, out, dtype)
    with _plain_tensors():  # Params4bit's own __torch_function__ costs 2 us per attribute
        launch = _local.known.get(id(quant_state))
        if launch is None:
            return _dequantize(weight, quant_state, out, dtype)
        nested = quant_state.state2 or quant_state
        if (  # has anything changed since the pair was checked?
            launch.weight() is not weight
            or launch.shape is not quant_state.shape
            or launch.dtype is not (dtype or quant_state.dtype)
            or launch.offset is not quant_state.offset
            or launch.code is not nested.code
        ):
            return _dequantize(weight, quant_state, out, dtype)
        if (
            launch.weight_ptr != weight.data_ptr()
            or launch.absmax_ptr != quant_state.absmax.data_ptr()
            or launch.nested_ptr != nested.absmax.data_ptr()
        ) and not launch.move(weight, quant_state):
            return _dequantize(weight, quant_state, out, dtype)
        if _current_device() != launch.index:
            with torch.cuda.device(launch.index):
                return dequantize_nf4(weight, quant_state, out, dtype=dtype)
        if out is None:
            out = launch.empty()
        else:
            kind = (out.shape, out.dtype, out.device, out.is_contiguous(), out.data_ptr() % 16)
            if kind != launch.kind:
                return _dequantize(weight, quant_state, out, dtype)
        launch.args[5] = out.data_ptr()
        launch.config.stream = _current_stream(launch.index)
        if code := launch.go():
            _check(code)
        return out.t() if launch.transposed else out


class _Linear4bit(torch.autograd.Function):
    """x @ W.T + bias, W dequantised in forward and again in backward: only its 4 bits are kept."""

    @staticmethod
    def forward(ctx, x, weight, bias, quant_state):
        ctx.weight, ctx.quant_state = weight, quant_state
        return F.linear(x, dequantize_nf4(weight, quant_state, dtype=x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ dequantize_nf4(ctx.weight, ctx.quant_state, dtype=grad.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.flatten(0, -2).sum(0)
        return grad_x, None, grad_bias, None


def _matmul_4bit(A, B, quant_state, out=None, bias=None):
    """bitsandbytes.matmul_4bit; ours where it would decode in three launches and then multiply."""
    ours = A.is_cuda and out is None and getattr(quant_state, "quant_type", None) == "nf4"
    ours = ours and len(quant_state.shape) == 2 and A.shape[-1] == quant_state.shape[1]
    # Few rows: bitsandbytes' fused 4-bit product is for those. On an H200 it takes 1.4 to 1.7 times
    # ours at 64 rows over seven shapes and 0.98 to 2.2 at 32. Before sm_90 its own limit is 512.
    limit = 32 if ours and torch.cuda.get_device_capability(A.device)[0] >= 9 else 512
    if not ours or A.dtype not in DTYPES or A.numel() <= limit * A.shape[-1]:
        return patch_bitsandbytes.stock["matmul_4bit"](A, B, quant_state, out=out, bias=bias)
    return _Linear4bit.apply(A, B.view(-1, 1) if B.shape[0] == 1 else B, bias, quant_state)


def _dequantize_4bit(A, quant_state=None, *args, **kwargs):
    """bitsandbytes.functional.dequantize_4bit; NF4 on CUDA through the kernel."""
    if quant_state is not None and A.is_cuda and quant_state.quant_type == "nf4":
        return dequantize_nf4(A, quant_state, kwargs.get("out", args[1] if len(args) > 1 else None))
    return patch_bitsandbytes.stock["dequantize_4bit"](A, quant_state, *args, **kwargs)


class patch_bitsandbytes:
    """Makes every bitsandbytes Linear4bit, and PEFT's merges, use the kernel where it is faster.

    A plain call lasts until its .undo(), a `with` block until its end; they may nest.
    """

    stock, active = {}, set()

    def __init__(self):
        import bitsandbytes as bnb

        self.targets = (bnb, _matmul_4bit), (bnb.functional, _dequantize_4bit)
        for module, ours in () if self.active else self.targets:
            self.stock[ours.__name__[1:]] = getattr(module, ours.__name__[1:])
            setattr(module, ours.__name__[1:], ours)
        self.active.add(self)

    def undo(self):
        for module, ours in self.targets if self.active == {self} else ():
            setattr(module, ours.__name__[1:], self.stock[ours.__name__[1:]])
        self.active.discard(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.undo()


# --------------------------------------------------------------------------------------------------
# Self-test: `pytest nf4_triton.py` runs the same functions

# batch, length, hd, m, seed, dt
CHALLENGE = ((2, 3333, 2048, 8192, 3407, torch.float16), (5, 777, 1024, 4096, 3409, torch.bfloat16))
CHALLENGE += ((3, 2048, 4096, 14336, 3408, torch.bfloat16),)


def _gpus() -> int:
    """How many GPUs there are, if the kernel runs on the first."""
    return torch.cuda.device_count() if torch.cuda.is_available() and _runs_on(0) else 0


def _skip_unless(gpus, gib=0):
    if _gpus() < gpus or gib and torch.cuda.mem_get_info()[0] < gib * 2**30:
        memory = f" and {gib} GiB free on it" if gib else ""
        raise unittest.SkipTest(f"needs {gpus} NVIDIA GPU(s) of capability 7.5 or more{memory}")


def _pair(seed, shape, dtype, block=64, block2=256, storage=torch.uint8, device="cpu"):
    """Random codes and scales, of sizes that fp16 holds, rounds to subnormals or overflows with."""
    from bitsandbytes.functional import QuantState

    rng, numel = torch.Generator().manual_seed(seed), math.prod(shape)
    blocks, state2, offset = triton.cdiv(numel, block), None, None
    nbytes = triton.cdiv(numel, 2 * storage.itemsize) * storage.itemsize
    weight = torch.randint(256, (nbytes,), dtype=torch.uint8, generator=rng)
    absmax = torch.rand(blocks, generator=rng) * 10.0 ** (seed % 11 - 6)
    if block2:
        absmax2 = absmax[: triton.cdiv(blocks, block2)].clone().to(device)
        code2 = torch.rand(256, generator=rng).mul(2).sub(1).to(device)
        state2 = QuantState(absmax2, None, code2, block2, dtype=torch.float32)
        offset = absmax.mean().to(device)
        absmax = torch.randint(256, (blocks,), dtype=torch.uint8, generator=rng)
    shape, absmax = torch.Size(shape), absmax.to(device)
    state = QuantState(absmax, shape, None, block, "nf4", dtype, offset, state2)
    return weight.to(device).view(storage)[:, None], state


def _cases(count):
    """Arguments of _pair that mix every kind of size, block, nesting and storage."""
    numels = (1, 2, 7, 8, 63, 64, 65, 2047, 2048, 4095, 4096, 4097, 8192, 12288)
    storages = (torch.uint8, torch.uint8, torch.bfloat16, torch.float16, torch.float32)
    for seed in range(count):
        pick = random.Random(seed).choice
        numel = pick(numels)
        shape = pick([(numel,), (1, numel), (3, numel), (numel, 64)][: 4 if numel < 99 else 2])
        block, block2 = 2 ** pick(range(5, 13)), pick([0, 0, 256, 256, 1, 3, 100, 4096])
        yield seed, shape, pick(list(DTYPES)), block, block2, pick(storages)


def _same(a, b) -> bool:
    bits = {2: torch.int16, 4: torch.int32}[a.element_size()]
    alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return alike and torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def _expected(weight, state):
    return _dequantize_torch(_unpack(weight, state))


def _check_interpreted(p, words, ragged):
    """The kernel under Triton's interpreter gives the reference's bits, and nothing past the end."""
    kernel, unused = InterpretedFunction(getattr(_nf4_kernel, "fn", _nf4_kernel)), torch.zeros(1)
    numel = math.prod(p.shape)
    space = torch.full((numel + words * 8,), math.nan, dtype=p.dtype)
    ragged = numel % (words * 8) != 0 or ragged
    weight = p.weight.flatten().view(torch.uint8 if ragged else torch.int32)
    args = [weight, *(unused if part is None else part for part in p[1:5]), space, numel]
    grid = (triton.cdiv(numel, words * 8),)
    kernel[grid](*args, p.blocksize, p.blocksize2, words, 0, ragged, 0)
    assert _same(space[:numel].view(p.shape), _dequantize_torch(p))
    assert space[numel:].isnan().all()


def test_kernel_bits_under_interpreter():
    for case in _cases(100):
        _check_interpreted(_unpack(*_pair(*case)), (32, 64, 256)[case[0] % 3], case[0] % 2 == 0)
    # Halfway between two bf16 numbers, where only round-to-nearest-even is right: code 15 is 1.0
    ties = (torch.arange(64, dtype=torch.int32) * 0x8000 + 0x3F800000).view(torch.float32)
    ones = torch.full((2048, 1), 255, dtype=torch.uint8)
    tied = Packed(ones, ties, None, None, None, 64, 0, (4096,), torch.bfloat16)
    _check_interpreted(tied, 64, False)


def _fuzz(check, few=FUZZ_CASES, **drawn):
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


def _sizes(most):
    """Shapes of one to three dimensions, up to so many weights."""
    from hypothesis import strategies as st

    shapes = st.lists(st.integers(1, most), min_size=1, max_size=3).map(tuple)
    return shapes.filter(lambda shape: math.prod(shape) <= most)


def test_fuzz_kernel_under_interpreter():
    from hypothesis import strategies as st

    _fuzz(
        lambda words, ragged, case: _check_interpreted(_unpack(*_pair(*case)), words, ragged),
        words=st.sampled_from((32, 64, 256)),
        ragged=st.booleans(),
        case=st.tuples(
            st.integers(0, 2**31),  # of codes and scales
            _sizes(5000),
            st.sampled_from([*DTYPES]),
            st.sampled_from([2**k for k in range(5, 13)]),
            st.sampled_from((0, 1, 2, 3, 7, 100, 256, 4096)),
            st.sampled_from((torch.uint8, torch.bfloat16, torch.float16, torch.float32)),
        ),
    )


def test_fuzz_weights_equal_bitsandbytes():
    """Any weight that bitsandbytes quantises; on a GPU by the kernel, in every dtype."""
    import bitsandbytes.functional as bnb
    from hypothesis import strategies as st

    device = "cuda" if _gpus() else "cpu"
    dtypes = [*DTYPES] if _gpus() else [torch.float16, torch.float32]  # its bf16 rounds otherwise

    def check(shape, dtype, block, nested, storage, seed, scale, given, transposed):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
        weight = weight.to(device, dtype)
        packed, state = bnb.quantize_4bit(weight, None, None, block, nested, "nf4")
        plain = copy.copy(state)
        if device == "cpu":  # its CPU code begins a block with each row that ends inside one
            plain.shape = torch.Size((1, weight.numel()))
        want = bnb.dequantize_4bit(packed, plain).view(shape)
        if len(packed) % storage.itemsize == 0:  # else bitsandbytes cannot store it so
            packed = packed.flatten().view(storage)[:, None]
        out = torch.empty_like(want) if given else None
        packed = packed.t() if transposed else packed
        if packed.shape[0] == 1:  # what bitsandbytes too takes for a transposed weight
            want, out = want.t(), None
        got = dequantize_nf4(packed, state, out)
        assert _same(got, want) and (out is None or got is out)

    _fuzz(
        check,
        shape=st.tuples(st.integers(1, 300), st.integers(1, 300)),
        dtype=st.sampled_from(dtypes),
        block=st.sampled_from((64, 128, 256, 512, 1024, 2048, 4096)),
        nested=st.booleans(),
        storage=st.sampled_from((torch.uint8, torch.bfloat16, torch.float16, torch.float32)),
        seed=st.integers(0, 2**31),
        scale=st.sampled_from((1e-4, 0.02, 1.0, 300.0)),
        given=st.booleans(),
        transposed=st.booleans(),
    )


def test_fuzz_broken_states_are_refused():
    """A field with another value: the right bits for what it then says, or one line of error."""
    from hypothesis import strategies as st

    sizes = torch.zeros(7), torch.zeros(256), torch.zeros(8).byte(), torch.zeros(9, 1).byte()
    values = [None, 0, -64, 63, 64, 128, 4096, 1.5, "nf4", "fp4", (), (8, 64), (4, 128), (8, 63)]
    values += [*sizes, torch.float16, torch.float32, torch.float64, torch.tensor(0.5), 2**40]

    def check(field, value, seed):
        weight, state = _pair(seed, (8, 64), torch.float16)
        setattr(state.state2 if "." in field else state, field.split(".")[-1], value)
        try:
            got = dequantize_nf4(weight, state)
        except (TypeError, ValueError) as error:
            assert "found" in str(error) and "\n" not in str(error), error
        else:
            assert _same(got, _expected(weight, state)) and got.numel() == math.prod(state.shape)

    fields = "absmax shape blocksize quant_type dtype offset state2 state2.code state2.absmax"
    names = st.sampled_from([*fields.split(), "state2.blocksize"])
    _fuzz(check, field=names, value=st.sampled_from(values), seed=st.integers(0, 99))


def test_reference_equals_bitsandbytes_on_cpu():
    import bitsandbytes.functional as bnb

    rng = torch.Generator().manual_seed(0)
    for rows, dtype in ((96, torch.float32), (64, torch.float16), (33, torch.float32)):
        for block, nested in ((64, True), (64, False), (128, True), (1024, False)):
            weight = torch.randn(rows, 130, generator=rng).to(dtype)
            packed, state = bnb.quantize_4bit(weight, None, None, block, nested, "nf4")
            want = bnb.dequantize_4bit(packed, state)  # in bf16 its CPU code rounds otherwise
            out = torch.empty_like(want)
            assert dequantize_nf4(packed, state, out) is out and _same(out, want)
            assert _same(dequantize_nf4(packed.t(), state), want.t())
    weight, state = _pair(1, (4, 64), torch.float32)
    want, offset = _expected(weight, state), state.offset
    for old in (float(offset), offset.reshape(1), offset.double()):  # as old checkpoints have it
        state.offset = old
        assert _same(dequantize_nf4(weight, state), want)


def test_errors_name_what_was_found_and_needed():
    zeros, half, flat = torch.zeros, torch.float16, torch.zeros(256, 2).byte()[:, :1]
    changes = [  # the argument or field of the state that is wrong, its value, words of the error
        ("quant_state", [1, 2], "TypeError quant_state: found list"),
        ("quant_type", "fp4", "ValueError quant_type: found 'fp4', need 'nf4'"),
        ("packing_format_for_cpu", True, "ValueError weight: found it packed for bitsandbytes'"),
        ("dtype", torch.float64, "TypeError dtype: found torch.float64"),
        ("blocksize", 48, "ValueError blocksize: found 48"),
        ("shape", (9, 64), "ValueError weight: found 256 bytes, need 288 for (9, 64)"),
        ("shape", (7, 64), "ValueError weight: found 256 bytes, need 224 for (7, 64)"),
        ("absmax", zeros(7).byte(), "ValueError absmax: found shape (7,), need 8 values"),
        ("absmax", zeros(8), "TypeError absmax.dtype: found torch.float32"),
        ("absmax", zeros(8).byte().to("meta"), "ValueError absmax: found on meta, need it on cpu"),
        ("state2.code", zeros(16), "ValueError state2.code: found shape (16,)"),
        ("state2.blocksize", 0, "ValueError state2.blocksize: found 0"),
        ("offset", None, "ValueError offset: found None"),
        ("weight", zeros(32, 1).long(), "TypeError weight.dtype: found torch.int64"),
        ("weight", flat, "ValueError weight: found strides (2, 1)"),
        ("out", zeros(8, 63), "ValueError out.shape: found (8, 63)"),
        ("out", zeros(8, 64), "TypeError out.dtype: found torch.float32"),
        ("out", zeros(64, 8, dtype=half).t(), "ValueError out: found strides (1, 8)"),
    ]
    for name, value, words in changes:
        weight, state = _pair(0, (8, 64), half)
        args = {"weight": weight, "quant_state": state}
        if name in ("weight", "quant_state", "out"):
            args[name] = value
        else:
            setattr(state.state2 if "." in name else state, name.split(".")[-1], value)
        try:
            found = dequantize_nf4(**args)
        except (TypeError, ValueError) as error:
            found = f"{type(error).__name__} {error}"
        assert str(found).startswith(words) and "\n" not in found, (words, found)


def _main(*args, **changed):
    """(exit code, lines of stdout, lines of stderr) of main, with this file's names changed."""
    out, err = io.StringIO(), io.StringIO()
    changes = unittest.mock.patch.dict(globals(), changed)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), changes:
        code = main([*map(str, args)])
    return code, out.getvalue().splitlines(), err.getvalue().splitlines()


def test_faults_end_in_one_line_and_a_code():
    full, alloc = OSError(28, "No space left on device"), "CUDA error: CUBLAS_STATUS_ALLOC_FAILED"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "made", "nf4_triton.json")
        for code, words, fault in (
            (130, "interrupted", KeyboardInterrupt()),
            (1, f"out of memory: {alloc}, need more free", RuntimeError(f"{alloc} Search for it")),
            (1, "out of memory: CUDA: 1 GiB, need", torch.OutOfMemoryError("CUDA: 1 GiB")),
            (1, "a check failed: 3, not 4", AssertionError("3, not 4")),
            (77, "found no unknown, need it installed", ModuleNotFoundError(name="unknown")),
            (77, "cannot import name 'a'", ImportError("cannot import name 'a'")),
            (2, f"{path}: found No space left on device, need room", full),
            (0, "", None),
        ):
            test = unittest.mock.Mock(return_value=(0, 7))
            test.side_effect = None if fault is full else fault
            disk = unittest.mock.patch.object(Path, "replace", side_effect=full)
            with disk if fault is full else contextlib.nullcontext():
                got, out, err = _main("--test", "--json", path, _self_test=test)
            assert got == code and len(err) == (code > 0), err
            assert code == 0 or err[0].startswith(f"nf4_triton: {words}"), err
            assert out[-1].startswith(f"RESULT nf4_triton {'FAIL' if code else 'PASS'} checks=")
            assert [p.name for p in path.parent.iterdir()] == ([] if code else [path.name])
        for words, *args in (
            ("--only: found ", "--bench", "--only", "lama"),
            ("--fuzz: found 0, need 1 case or more", "--test", "--fuzz", 0),
            (f"--seed: found {2**64}, need 64 bits", "--test", "--seed", 2**64),
            (f"--plot, --json: found the directory {folder}, need a file", "--json", folder),
            (f"{path}: found ", "--plot", path / "a.png"),
        ):
            code, out, err = _main(*args, _self_test=unittest.mock.Mock(return_value=(0, 7)))
            assert code == 2 and len(err) == 1 and err[0].startswith(f"nf4_triton: {words}"), err


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


def _sass(compiled) -> tuple[list[str], dict[str, int]]:
    """(instructions up to the last EXIT, {REG, STACK, SHARED, LOCAL}) of a compiled kernel."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        run = functools.partial(subprocess.check_output, text=True, stderr=subprocess.STDOUT)
        text = run([tools / "nvdisasm", "-c", cubin])
        usage = run([tools / "cuobjdump", "-res-usage", cubin])
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)", text, re.MULTILINE)
    used = {k: int(n) for k, n in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return code[: len(code) - code[::-1].index("EXIT")], used


def test_every_architecture_compiles_without_spills_or_fused_scales():
    for sm, dtype, numel in itertools.product(CHIPS, DTYPES.values(), (2**22, 2**24)):
        tile = _tile(numel, CHIPS[sm][2])
        compiled = compile_kernel(sm, dtype, tile=tile)
        wide = r"(%\w+) = tt.get_program_id x[^\n]*\n\s*%\w+ = arith.extsi \1 : i32 to i64"
        assert re.search(wide, compiled.asm["ttir"])  # before it is multiplied: 2^31 weights
        by_integers = "arith.minsi" in compiled.asm["ttir"]
        assert by_integers == (dtype == "bf16" and sm < 80)  # bf16's rounding
        code, used = _sass(compiled)
        starts = [op.split(".")[0] for op in code]
        assert used["STACK"] == used["LOCAL"] == 0 and not {"LDL", "STL"} & set(starts), used
        assert starts.count("FFMA") == 0, (sm, dtype)
        assert starts.count("SHFL") == tile[0] // tile[1] // 4, (sm, dtype)  # one per weight
        assert all(".128" in op for op in code if op.startswith("STG")), (sm, dtype)
        assert dtype == "fp32" or used["SHARED"] == 0, (sm, dtype)


def _linear4bit(inputs, outputs, dtype, device="cuda"):
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(inputs, outputs, bias=None, compute_dtype=dtype, quant_type="nf4").to(device)
    layer.weight.quant_state.dtype = dtype
    return layer


def _of(dequantize, layer, out=None):
    weight = layer.weight
    return dequantize(weight, weight.quant_state, out=out)


def _check_challenge(batch, length, hd, m, seed, dtype, device):
    """The challenge's MLP and its checks. Returns the layers in the order it times them."""
    import bitsandbytes.functional as bnb

    torch.manual_seed(seed)
    gate, up, down = (_linear4bit(*io, dtype, device) for io in ((hd, m), (hd, m), (m, hd)))
    layers = up, gate, down
    close = functools.partial(torch.testing.assert_close, check_stride=True)
    x = torch.randn(batch, length, hd, device=device, dtype=dtype)
    for _ in range(2):
        ups, gates, downs = weights = [_of(dequantize_nf4, layer).t() for layer in layers]
        close((F.silu(x @ gates) * (x @ ups)) @ downs, down(F.silu(gate(x)) * up(x)))
        for layer, weight in zip(layers, weights, strict=True):
            close(weight, _of(bnb.dequantize_4bit, layer).t())
            assert weight.dtype == dtype
    return layers


def test_challenge_mlp_and_strides():
    gpu, small = _gpus(), (2, 33, 128, 512, 3407, torch.float16)
    for option in CHALLENGE if gpu else (small,):
        _check_challenge(*option, "cuda" if gpu else "cpu")


def test_linear4bit_gradients():
    (weight, state), rng = _pair(6, (48, 64), torch.float32), torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=rng) for shape in ((2, 5, 64), (48,), (2, 5, 48))]
    x, bias, upstream = (t.double().requires_grad_() for t in tensors)
    want = F.linear(x, _expected(weight, state).double(), bias)
    wants = want, *torch.autograd.grad(want, (x, bias), upstream)
    x, bias, upstream = (t.requires_grad_() for t in tensors)
    y = _Linear4bit.apply(x, weight, bias, state)
    for got, want in zip((y, *torch.autograd.grad(y, (x, bias), upstream)), wants, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_patch_nests_and_is_undone():
    import bitsandbytes as bnb

    names = lambda: (bnb.matmul_4bit, bnb.functional.dequantize_4bit)
    stock, x, layer = names(), torch.randn(3, 64), _linear4bit(64, 64, torch.float32, "cpu")
    want = layer(x)
    with patch_bitsandbytes():
        inner = patch_bitsandbytes()
        inner.undo()
        inner.undo()
        assert names() == (_matmul_4bit, _dequantize_4bit)
        assert torch.equal(layer(x), want)  # a CPU layer stays with bitsandbytes
    assert names() == stock


def test_compile_makes_one_graph_for_all_weights():
    import torch._dynamo as dynamo

    device = "cuda" if _gpus() else "cpu"
    pairs = [_pair(seed, (96, 128), torch.bfloat16, device=device) for seed in (5, 6, 7)]
    backends = [{"backend": "aot_eager"}, {}, {"mode": "reduce-overhead"}]
    for options in backends if device == "cuda" else backends[:1]:
        dynamo.reset()
        dynamo.utils.counters.clear()
        double = torch.compile(lambda w, s: dequantize_nf4(w, s) * 2, fullgraph=True, **options)
        for pair in pairs * 3:
            assert _same(double(*pair).clone(), _expected(*pair) * 2), options
        assert dynamo.utils.counters["stats"]["unique_graphs"] == 1, options
        into = torch.compile(dequantize_nf4, fullgraph=True, **options)
        out, want = torch.empty(96, 128, dtype=torch.bfloat16, device=device), _expected(*pairs[0])
        assert _same(into(*pairs[0], out), want) and _same(out, want)


def test_bits_equal_bitsandbytes_on_gpu():
    _skip_unless(gpus=1)
    import bitsandbytes.functional as bnb

    blocks = (64, 256), (32, 0), (4096, 256), (128, 100)  # large: with the other tile
    large = [(6, (2050, 4096), torch.float16, *pair) for pair in blocks]
    for case in (*_cases(120), *large):
        weight, state = _pair(*case, device="cuda")
        want, numel = _expected(weight, state), math.prod(case[1])
        if case[4] in (0, 256) and weight.nbytes * 2 == numel:  # what bitsandbytes itself can do
            assert _same(bnb.dequantize_4bit(weight.view(-1, 1), state), want), case
        space = torch.full((numel + 17,), math.nan, dtype=state.dtype, device="cuda")
        for shift in (0, 1, 8):
            out = space[shift : shift + numel].view(want.shape)
            dequantize_nf4(weight.view(-1, 1), state, out)
            assert _same(out, want) and space.isnan().sum() == 17 + want.isnan().sum(), case
            space.fill_(math.nan)
        moved = torch.cat([weight[:1], weight])[1:]  # a view that is not 16-byte aligned
        for view in (weight, weight, weight.t(), moved, weight):
            got = dequantize_nf4(view, state)
            assert _same(got, want.t() if view.shape[0] == 1 else want), case
    for special in (math.inf, math.nan):
        weight, state = _pair(6, (64, 64), torch.bfloat16, 64, 0, device="cuda")
        state.absmax[::2] = special
        assert _same(dequantize_nf4(weight, state), bnb.dequantize_4bit(weight, state))


def test_gpu_storage_that_moves():
    """Views of one buffer whose storage is freed and allocated elsewhere, as FSDP2 does."""
    if not torch.cuda.is_available():
        raise unittest.SkipTest("needs a CUDA GPU")
    import copy

    weight, state = _pair(6, (64, 4096), torch.bfloat16, 64, 256, device="cuda")
    want, parts = dequantize_nf4(weight, state), _tensors(weight, state)
    sizes = [-(-t.nbytes // 256) * 256 for t in parts]
    flat = torch.empty(sum(sizes), dtype=torch.uint8, device="cuda")
    views = [
        p[: t.nbytes].view(t.dtype).view(t.shape)
        for p, t in zip(flat.split(sizes), parts, strict=True)
    ]
    moved, nested = copy.copy(state), copy.copy(state.state2)
    moved.absmax, nested.code, nested.absmax, moved.offset = views[1:]
    moved.state2, addresses = nested, set()
    held = []
    for _ in range(4):
        flat.untyped_storage().resize_(0)
        held.append(torch.full((sum(sizes),), 255, dtype=torch.uint8, device="cuda"))
        flat.untyped_storage().resize_(sum(sizes))
        for view, part in zip(views, parts, strict=True):
            view.copy_(part)
        known = _local.known.get(id(moved))
        assert torch.equal(dequantize_nf4(views[0], moved), want)
        assert known is None or _local.known[id(moved)] is known  # no second plan
        addresses.add(flat.data_ptr())
    assert len(addresses) > 1


def test_changes_after_the_first_call_are_noticed():
    _skip_unless(gpus=1)
    other, donor = _pair(7, (64, 64), torch.float16, device="cuda")
    changes = [
        lambda weight, state: setattr(weight, "data", other),
        lambda _, state: setattr(state, "absmax", donor.absmax),
        lambda _, state: setattr(state.absmax, "data", donor.absmax),
        lambda _, state: setattr(state, "offset", donor.offset),
        lambda _, state: setattr(state, "dtype", torch.bfloat16),
        lambda _, state: setattr(state, "shape", torch.Size((32, 128))),
        lambda _, state: setattr(state, "state2", donor.state2),
        lambda _, state: setattr(state.state2, "code", donor.state2.code),
        lambda _, state: setattr(state.state2, "absmax", donor.state2.absmax),
        lambda _, state: setattr(state.state2.absmax, "data", donor.state2.absmax),
    ]
    for i, change in enumerate(changes):
        weight, state = _pair(6, (64, 64), torch.float16, device="cuda")
        before = [dequantize_nf4(weight, state) for _ in range(2)][1]
        change(weight, state)
        want = _expected(weight, state)
        assert not _same(want, before), i
        assert _same(dequantize_nf4(weight, state), want), i
        assert _same(dequantize_nf4(weight, state, torch.empty_like(want)), want), i
    try:
        dequantize_nf4(weight, state, want[:, ::2])
        raise AssertionError("a wrong out was taken")
    except ValueError as error:
        assert str(error).startswith("out.shape: found (64, 32), need (64, 64)"), error


def test_more_than_2_31_weights():
    _skip_unless(gpus=1, gib=20)
    period = 4096 * 64
    small, state = _pair(6, (period,), torch.bfloat16, device="cuda")
    want, absmax, absmax2 = _expected(small, state), state.absmax, state.state2.absmax
    for numel in (2**31 + 4096 + 5, 2**31 + 8192):  # ragged and whole tiles
        copies, blocks = numel // period + 1, triton.cdiv(numel, 64)
        state.absmax, state.shape = absmax.repeat(copies)[:blocks], torch.Size((numel,))
        state.state2.absmax = absmax2.repeat(copies)[: triton.cdiv(blocks, 256)]
        out = dequantize_nf4(small.repeat(copies, 1)[: triton.cdiv(numel, 2)], state)
        for row in out[: numel // period * period].view(-1, period).split(1024):
            assert (row == want).all()
        assert _same(out[-(numel % period) :], want[: numel % period])


def test_streams_graphs_threads_and_no_synchronisation():
    _skip_unless(gpus=1)
    pairs = [_pair(seed, (512, 512), torch.float16, device="cuda") for seed in (5, 6, 7)]
    pairs.append(_pair(6, (64, 512), torch.float16, 512, 100, device="cuda"))
    wants, graph = [_expected(*pair) for pair in pairs], torch.cuda.CUDAGraph()
    (weight, state), flipped, stream = pairs[0], ~pairs[0][0], torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):  # not warmed up: the first calls are captured
        outs = [dequantize_nf4(*pair) for pair in pairs]
    graph.replay()
    assert all(map(_same, outs, wants))
    torch.cuda.set_sync_debug_mode("error")
    with torch.cuda.stream(stream):
        torch.cuda._sleep(2**29)
        weight.copy_(flipped)  # behind the sleep, so that only the right stream sees it
        got = dequantize_nf4(weight, state)
        waited = stream.query()
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert not waited and _same(got, _expected(flipped, state))
    wants[0] = got

    def work(pair, want):
        with torch.cuda.stream(torch.cuda.Stream()):
            got = [dequantize_nf4(*pair) for _ in range(300)]
            torch.cuda.current_stream().synchronize()
        return all(_same(g, want) for g in got)

    with concurrent.futures.ThreadPoolExecutor(len(pairs)) as pool:
        assert all(pool.map(work, pairs, wants))
    out = torch.empty_like(wants[1])
    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # that thread's first use of CUDA
        pool.submit(dequantize_nf4, *pairs[1], out).result()
    torch.cuda.synchronize()
    assert _same(out, wants[1])


def test_any_current_device():
    _skip_unless(gpus=2)
    for device in ("cuda:1", "cuda:0"):
        pair = _pair(6, (64, 64), torch.float16, device=device)
        for _ in range(2):
            assert _same(dequantize_nf4(*pair), _expected(*pair))
            assert torch.cuda.current_device() == 0


def _qlora(hidden, inner, layers):
    """A Llama of random weights, saved and loaded in NF4 as users do, LoRA on all projections."""
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 256}
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "load_in_4bit": True}
    nf4 = BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(**sizes, **heads)).bfloat16().save_pretrained(folder)
        options = {"quantization_config": nf4, "dtype": torch.bfloat16, "device_map": {"": 0}}
        model = LlamaForCausalLM.from_pretrained(folder, **options)
    # Not the usual B = 0, with which half the gradients vanish
    lora = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, lora)


def _step(model, ids):
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def test_qlora_step_is_the_same_when_patched():
    _skip_unless(gpus=1)
    model, ids = _qlora(512, 1024, 2), torch.randint(32000, (4, 512), device="cuda")
    loss, grads = _step(model, ids)
    with patch_bitsandbytes():
        patched_loss, patched = _step(model, ids)
    torch.testing.assert_close(patched_loss, loss, rtol=2**-8, atol=0)
    assert len(_local.known) >= 14 and len(grads) == len(patched) == 28
    for grad, want in zip(patched, grads, strict=True):
        assert (grad - want).norm() <= 2**-8 * want.norm()


# --------------------------------------------------------------------------------------------------
# Timings: every figure with its peers in the same run

SHAPES = {"Llama 1B up": (8192, 2048), "challenge": (4096, 1024), "Llama 8B up": (14336, 4096)}
SHAPES |= {"Llama 70B up": (28672, 8192), "Llama 1B q": (2048, 2048), "Llama 8B q": (4096, 4096)}
SHAPES |= {"Llama 70B q": (8192, 8192), "Qwen2.5 7B q": (3584, 3584)}
SHAPES |= {"Qwen2.5 7B up": (18944, 3584), "Gemma2 9B up": (14336, 3584)}


def _reference(weight, state, out=None):
    """The challenge's reference: bitsandbytes' C functions, three launches, two buffers."""
    from bitsandbytes.functional import get_ptr, lib

    stream, int32 = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream), ctypes.c_int
    absmax, state2 = torch.empty(state.absmax.shape, device="cuda"), state.state2
    tensors = map(get_ptr, (state2.code, state.absmax, state2.absmax, absmax))
    sizes = int32(state2.blocksize), int32(absmax.numel())
    lib.cdequantize_blockwise_fp32(*tensors, *sizes, stream)
    absmax += state.offset
    out = torch.empty(state.shape, dtype=state.dtype, device="cuda") if out is None else out
    tensors = map(get_ptr, (weight, absmax, out))
    sizes = int32(state.blocksize), int32(out.numel())
    getattr(lib, f"cdequantize_blockwise_{DTYPES[state.dtype]}_nf4")(None, *tensors, *sizes, stream)
    return out


def _memset(weight, state, out=None):
    """The floor: the output allocated and written, nothing read."""
    out = torch.empty(*state.shape, dtype=state.dtype, device=weight.device) if out is None else out
    return out.zero_()


def _peers() -> dict:
    """Name -> function of (weight, quant_state, out), for what is installed."""
    import bitsandbytes.functional as bnb
    from peft.utils.integrations import dequantize_bnb_weight

    peft = lambda weight, state, out: dequantize_bnb_weight(weight)
    peers = {"ours": dequantize_nf4, "memset": _memset, "reference": _reference}
    peers |= {"bitsandbytes": bnb.dequantize_4bit, "peft": peft}
    with contextlib.suppress(ImportError), contextlib.redirect_stdout(io.StringIO()):
        import unsloth  # noqa: F401
        from unsloth.kernels.utils import fast_dequantize

        peers["unsloth"] = fast_dequantize
        peers["unsloth one buffer"] = functools.partial(fast_dequantize, use_global_buffer=True)
    return peers


def _with_our_bits(peers, layer) -> dict:
    """The peers, and the memset, without those whose result differs; the reference's must not."""
    want, same = _of(dequantize_nf4, layer), {}
    for name, peer in peers.items():
        got = want if peer is _memset else _of(peer, layer)
        if torch.equal(got if got.shape == want.shape else got.t(), want):
            same[name] = peer
        else:
            print(f"{name} gives other bits and is not timed")
    assert "reference" in same, "the challenge's reference gives other bits"
    return same


def _say(results, name, times, unit="us", **more):
    ratios = "".join(f" | {k} {t:.2f} ({t / times['ours']:.2f}x)" for k, t in times.items())
    print(f"{name}, {unit}{ratios}", flush=True)
    results[name] = {"unit": unit, **times, **more}


def _wall_us(peers, rounds, run) -> dict:
    """Median microseconds of run(peer): `rounds` of them in ten turns, the first turn a warm-up."""
    times = {name: [] for name in peers}
    for turn, (name, peer) in itertools.product(range(11), peers.items()):
        torch.cuda.synchronize() if torch.cuda.is_available() else None
        start = time.perf_counter()
        for _ in range(rounds // 10):
            run(peer)
        times[name] += [(time.perf_counter() - start) / (rounds // 10) * 1e6] if turn else []
    return {name: statistics.median(t) for name, t in times.items()}


def _all_of(dequantize, layers, outs):
    for layer, out in zip(layers, outs, strict=True):
        _of(dequantize, layer, out)


def _bench_step(results, peers) -> dict:
    model, ids = _qlora(2048, 8192, 4), torch.randint(32000, (2, 1024), device="cuda")

    def step(patch):
        with patch():
            _step(model, ids)[0].item()

    patches = {"ours": patch_bitsandbytes, "bitsandbytes": contextlib.nullcontext}
    times = _wall_us(patches, 50, step)
    _say(results, "QLoRA step, 4 layers of Llama 1B, 2048 tokens", times)
    return {"qlora_step_vs_bitsandbytes": times["bitsandbytes"] / times["ours"]}


def _bench_challenge(results, peers) -> dict:
    total = {}
    for option in CHALLENGE:
        layers = _check_challenge(*option, "cuda")

        def round_of_three(peer, layers=layers):
            for layer in layers:
                _of(peer, layer).t()
                torch.cuda.synchronize()

        times = _wall_us(_with_our_bits(peers, layers[0]), 1000, round_of_three)
        total = {name: total.get(name, 0) + t for name, t in times.items()}
        _say(results, f"challenge {option[2]}x{option[3]} {DTYPES[option[5]]}", times, "us a round")
    _say(results, "challenge, its three options", total, "us a round")
    kinds = [kind for kind in ("reference", "unsloth", "memset") if kind in total]
    return {f"challenge_vs_{kind}": total[kind] / total["ours"] for kind in kinds}


def _bench_kernel(results, peers) -> dict:
    timed = [p for p in peers if p in ("ours", "reference", "unsloth", "memset")]
    ratios = {peer: [] for peer in timed}
    for name, shape in SHAPES.items():
        dtype = torch.float16 if name == "Llama 1B up" else torch.bfloat16
        ideal, times = math.prod(shape) * (PACKED_BYTES + dtype.itemsize), {}
        layers = [_linear4bit(*shape[::-1], dtype) for _ in range(max(1, int(4e8 / ideal)))]
        outs = [torch.empty(shape, dtype=dtype, device="cuda") for _ in layers]
        for peer in timed:  # a graph of one call a weight: no launch cost, no warm L2
            calls = functools.partial(_all_of, peers[peer], layers, outs)
            time_ms = triton.testing.do_bench_cudagraph(calls, rep=50, return_mode="median")
            times[peer] = time_ms * 1e3 / len(layers)
        rate, floor = ideal / times["ours"] / 1e3, times["ours"] / times["memset"]
        name = f"kernel {name} {shape[0]}x{shape[1]} {DTYPES[dtype]}"
        _say(results, f"{name}: {rate:.0f} GB/s, {floor:.3f} memset", times, bytes=ideal)
        for peer in timed:
            ratios[peer].append(times[peer] / times["ours"])
    mean = statistics.geometric_mean
    return {f"kernel_vs_{kind}": mean(parts) for kind, parts in ratios.items() if kind != "ours"}


def _bench_host(results, peers) -> dict:
    weight = _linear4bit(256, 256, torch.bfloat16).weight
    pair = weight, weight.quant_state
    times = _wall_us(peers, 5000, lambda peer: peer(*pair, out=None))
    _say(results, "host cost of a call, GPU idle", times)
    torch.cuda.reset_peak_memory_stats()
    before, out = torch.cuda.memory_allocated(), dequantize_nf4(*pair)
    beyond = torch.cuda.max_memory_allocated() - before - out.nbytes
    print(f"memory beyond the output: {beyond} bytes")
    return {"host_us": times["ours"]}


TIMINGS = {"step": _bench_step, "challenge": _bench_challenge, "kernel": _bench_kernel}
TIMINGS |= {"host": _bench_host}


def bench_gpu(results, names) -> dict:
    """TIMINGS by name; each adds its records to results, headline figures are returned."""
    head, peers = {}, None
    for name in (n for n in TIMINGS if n in names):
        if peers is None and name != "step":  # importing Unsloth patches transformers: after that
            layer = _check_challenge(*CHALLENGE[0], "cuda")[0]
            peers = _with_our_bits(_peers(), layer)
        head |= TIMINGS[name](results, peers)
    return head


def bench_cpu(results) -> dict:
    import bitsandbytes.functional as bnb

    layer = _linear4bit(1024, 4096, torch.float16, "cpu")
    peers = {"ours": dequantize_nf4, "bitsandbytes": bnb.dequantize_4bit, "memset": _memset}
    times = _wall_us(peers, 100, lambda peer: _of(peer, layer))
    _say(results, "the PyTorch path on the CPU, 4096x1024 fp16", times)
    return {"cpu_vs_bitsandbytes": times["bitsandbytes"] / times["ours"]}


def plot(results, path):
    """What was timed, as a PNG: rates by size below the memory's (GPU), or microseconds (CPU)."""
    from matplotlib.figure import Figure

    figure = Figure((8, 5), layout="constrained", dpi=150)
    axes = figure.subplots()
    kernels = sorted((r for r in results.values() if "bytes" in r), key=lambda r: r["bytes"])
    skip = "unit", "bytes"
    if kernels:
        device = torch.cuda.get_device_name()
        for name in (k for k in kernels[0] if k not in skip):
            rates = [r["bytes"] / r[name] / 1e3 for r in kernels]
            label = "in the time of a memset of the output" if name == "memset" else name
            style = "k--" if name == "memset" else "o-"
            axes.plot([r["bytes"] / 2**20 for r in kernels], rates, style, label=label)
        major, minor = torch.cuda.get_device_capability()
        if major * 10 + minor in CHIPS:
            chip, peak = CHIPS[major * 10 + minor][:2]
            axes.axhline(peak / 1e9, color="grey", label=f"the memory of {chip}, published")
        ticks = 10, 20, 50, 100, 200, 500
        axes.set(xscale="log", ylim=0, ylabel="GB/s read and written")
        axes.set_xticks(ticks, [*map(str, ticks)]), axes.minorticks_off()
        axes.set(xlabel="MiB of a weight, packed and unpacked (cold L2, no launch cost)")
        axes.set_title(f"NF4 dequantisation by size, {device}")
        axes.legend(), axes.grid(alpha=0.3)
    else:
        name, times = next(iter(results.items()))
        times = {k: v for k, v in times.items() if k not in skip}
        bars = axes.barh([*times], [*times.values()])
        axes.bar_label(bars, fmt=" %.0f"), axes.margins(x=0.15), axes.invert_yaxis()
        axes.set(title=name, xlabel=results[name]["unit"])
    _write(path, lambda part: figure.savefig(part, format="png"))
    print(f"drawn: {path}")


# --------------------------------------------------------------------------------------------------
# What a chip at hand elsewhere would do, and how small storage could get


def print_target(sm: int, results):
    chip, bandwidth, sms, clock = CHIPS[sm]
    for (dtype, name), numel in itertools.product(DTYPES.items(), (2**22, 2**24)):
        tile = _tile(numel, sms)
        code, used = _sass(compile_kernel(sm, name, tile=tile))
        widths = {"LDG": set(), "STG": set()}
        for op in code:
            bits = re.findall(r"\.[US]?(8|16|64|128)\b", op) or ["32"]
            widths.get(op[:3], set()).add(int(bits[0]))
        loads, stores = (", ".join(map(str, sorted(bits))) for bits in widths.values())
        each = len(code) / (tile[0] * 8 // tile[1] // 32)
        memory = (PACKED_BYTES + dtype.itemsize) / bandwidth * 1e12
        issue = each / (sms * 64 * clock) * 1e12
        bound, ratio = "memory" if memory > issue else "instruction issue", memory / issue
        print(
            f"sm_{sm} {name}, {tile[0]} words on {tile[1]} warps: {used['REG']} registers, "
            f"{used['SHARED']} B shared, {used['LOCAL'] + used['STACK']} B local, {each:.1f} SASS "
            f"instructions a weight, loads of {loads} bits, stores of {stores} bits\n"
            f"    on a {chip}: memory {memory:.2f} ps a weight, issue {issue:.2f} ps (64 lanes a "
            f"clock, SM at {clock / 1e9:.2f} GHz): bound by {bound}, {max(ratio, 1 / ratio):.1f}x"
        )
        results[f"sm_{sm} {name} {tile[0]}"] = {"instructions": each, "bound": bound, **used}


def storage_bounds(weight, blocksize: int, nested: bool) -> tuple[float, float, float, float]:
    """(bits stored, entropy of the codes, lossless bound, relative error) per weight. The bound
    codes each weight given its block's scale (in 64 classes), and the nested scales' codes."""
    import bitsandbytes.functional as bnb

    def entropy(values):
        p = torch.bincount(values).double() / values.numel()
        return -torch.xlogy(p, p).sum().item() / math.log(2)

    packed, state = bnb.quantize_4bit(weight, None, None, blocksize, nested, "nf4")
    error = ((dequantize_nf4(packed, state) - weight).norm() / weight.norm()).item()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[: weight.numel()].int()
    scale = state.state2.code[state.absmax.int()] if nested else state.absmax
    rank = scale.argsort(stable=True).argsort() * 64 // len(scale)
    rank = rank.repeat_interleave(blocksize)[: len(codes)]
    bits = 8 + 32 / state.state2.blocksize if nested else 32
    coded = bits - 8 + entropy(state.absmax.int()) if nested else 32
    bound = entropy(rank * 16 + codes) - entropy(rank) + coded / blocksize
    return 4 + bits / blocksize, entropy(codes), bound, error


def print_storage(weight, name, results):
    print(f"{name}, {weight.numel()} weights. Bits a weight; error |dequantised - w| / |w|")
    print("block nested stored codes' entropy lossless bound  saves   error")
    for blocksize, nested in itertools.product([2**i for i in range(5, 13)], (False, True)):
        stored, codes, bound, error = storage_bounds(weight.float().flatten(), blocksize, nested)
        saves = 1 - bound / stored
        row = f"{blocksize:5} {nested!s:>6} {stored:6.3f} {codes:14.3f} {bound:14.3f} {saves:6.1%}"
        print(f"{row} {error:7.4f}")
        results[f"{blocksize} {nested}"] = {"stored": stored, "bound": bound, "error": error}
    saves = 1 - results["64 True"]["bound"] / results["64 True"]["stored"]
    verdict = "15% without loss is out of reach" if saves < 0.15 else "15% without loss can be had"
    print(f"Verdict for block 64, nested: at most {saves:.1%} smaller, so {verdict}.")


def _read_weight(path: str, name: str | None) -> torch.Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            found = name in file.keys()  # noqa: SIM118, not a dict
            _need(found, "--tensor", name, f"one of {', '.join(file.keys())[:200]}")
            weight = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--storage: found {path} ({error}), need a safetensors file") from None
    _need(weight.is_floating_point(), "--tensor", weight.dtype, "a weight before quantisation")
    return weight


# --------------------------------------------------------------------------------------------------


def _self_test(fuzz=None, seed=0, module=sys.modules[__name__]) -> tuple[int, int]:
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


def _explain(error) -> tuple[int, str]:
    """(exit code, one line) for what ended a run; "" if it was not foreseen."""
    line = " ".join(str(error).split())[:400]
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, AssertionError):
        return 1, f"a check failed: {line}"
    if found := _no_memory(error):
        return 1, f"out of memory: {found}, need more free"
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
    option = parser.add_argument
    option("--target", choices=[f"sm_{sm}" for sm in CHIPS], help="a chip to compile for")
    option("--storage", nargs="?", const="", metavar="FILE", help="storage bounds of a tensor")
    option("--tensor", metavar="TENSOR", help="the tensor of FILE (without a FILE: Gaussian)")
    option("--test", action="store_true", help="the self-test alone")
    option("--bench", action="store_true", help="the timings alone")
    option("--fuzz", type=int, metavar="N", help="the random tests alone, with N cases each")
    option("--only", metavar="NAMES", help=f"of {', '.join(TIMINGS)} (default: all)")
    option("--seed", type=int, default=0, help="of timings and --fuzz (default: 0)")
    option("--plot", metavar="PATH", help="rates beside the memory's as PNG (needs matplotlib)")
    option("--json", metavar="PATH", help="also write the results as JSON")
    return parser


def main(argv=None) -> int:
    parser = _parser()
    args, gpu = parser.parse_args(argv), _gpus() > 0
    asked = args.target or args.storage is not None
    tests = args.test or args.fuzz or not (args.bench or asked)
    times = args.bench or not (args.test or args.fuzz or asked)
    if not times and (args.plot or args.only):
        parser.error("--plot and --only are for the timings")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = {"torch": torch.__version__.split("+")[0], "triton": triton.__version__}
    versions |= {"cuda": torch.version.cuda, "seed": args.seed}
    print("nf4_triton", device, *(f"{k} {v}" for k, v in versions.items()), sep=" | ", flush=True)
    if device != "CPU" and not gpu:
        print(f"nf4_triton: found {device}, need compute capability 7.5: everything on the CPU")
    results, head, code, checks = {}, {}, 0, 0
    names = args.only.split(",") if args.only else [*TIMINGS]
    try:
        _need(args.fuzz is None or args.fuzz > 0, "--fuzz", args.fuzz, "1 case or more")
        _need(abs(args.seed) < 2**63, "--seed", args.seed, "64 bits")
        torch.manual_seed(args.seed)
        _need(gpu or not args.only, "--only", "no GPU", "one: a CPU has one timing")
        for name in names:
            _need(name in TIMINGS, "--only", name, f"some of {', '.join(TIMINGS)}")
        _check_paths(args.plot, args.json)  # what is written last is looked at first
        if args.plot:
            import matplotlib  # noqa: F401
        if args.target:
            print_target(int(args.target[3:]), results)
        if args.storage is not None:
            weight = _read_weight(args.storage, args.tensor) if args.storage else None
            weight = torch.randn(2**22) if weight is None else weight
            print_storage(weight, args.tensor or "Gaussian", results)
        if tests:
            code, checks = _self_test(args.fuzz, args.seed)
        if times and not code:
            head = bench_gpu(results, names) if gpu else bench_cpu(results)
            if args.plot:
                plot(results, args.plot)
        if args.json:
            found = {"device": device, **versions, **results, **head}
            _write(args.json, lambda part: part.write_text(json.dumps(found, indent=1)))
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 (a traceback if unforeseen)
        code, words = _explain(error)
        print(f"nf4_triton: {words}" if words else traceback.format_exc(), file=sys.stderr)
    figures = " ".join(f"{k}={v:.2f}" + ("" if k.endswith("us") else "x") for k, v in head.items())
    print(f"RESULT nf4_triton {'FAIL' if code else 'PASS'} checks={checks} {figures}".rstrip())
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, INTERRUPT)
    sys.exit(main())
