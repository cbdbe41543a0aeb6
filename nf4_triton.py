"""NF4 to fp16, bf16 or fp32 in one Triton kernel, bit-equal to bitsandbytes' CUDA kernels.

Problem: bitsandbytes keeps a QLoRA weight as 4-bit codes with a scale ("absmax") per block of 64;
with double quantisation the scales are 8-bit codes too. It dequantises in three launches through a
temporary buffer (decode the scales, add their mean, decode the weights), twice per layer and step.

Idea: four fifths of the bytes are the output, so a memset of it bounds the time from below. A lane
takes 32-bit words (8 weights of one block each), decodes the scale itself and stores 16 bytes.
- The NF4 table lives in a warp's registers, entry i in lane i, read by inline PTX `shfl.sync.idx`.
- Codes are read once and large outputs exceed the L2: both are marked evict-first.
- The scale takes two fp32 roundings as in bitsandbytes, so multiply-add fusion is off.
- Addresses and sizes are read in every call: a weight that moves or changes needs no notice.

Left out: FP4, AMD and Intel GPUs, and fused 4-bit matmuls, which win for a few rows: all left to
bitsandbytes by patch_bitsandbytes. Also a prefetch into the L2, worth 1 to 3% of the kernel, and
the C function below Triton's launcher, worth 1 us a call: its arguments vary. CPU tensors take
the plain reference, the same bits but slow. Run on an H200 and, in Triton's interpreter, on CPUs.
Not run on a T4, for which it compiles without spills.

    python nf4_triton.py            self-test, then timings (--test or --bench: one of them)

    from nf4_triton import dequantize_nf4, patch_bitsandbytes
    weight = dequantize_nf4(layer.weight, layer.weight.quant_state)
    with patch_bitsandbytes():      # every Linear4bit, and PEFT's merges
        trainer.train()
"""

import argparse
import contextlib
import ctypes
import functools
import itertools
import json
import math
import statistics
import struct
import timeit
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch._C._dynamo import guards
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime.interpreter import InterpretedFunction

# The NormalFloat4 levels (QLoRA, arXiv 2305.14314, appendix E) as bitsandbytes' kernels hold them.
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
       -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
       0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}

# ---- The definition in plain PyTorch; CPU tensors take it


def dequantize_reference(weight, state, dtype) -> Tensor:
    """NF4[code] * (code2[absmax] * absmax2 + offset), in fp32 with every rounding where
    bitsandbytes' CUDA kernels have it, then in dtype. The result has state.shape."""
    table = torch.tensor(NF4, dtype=torch.float32, device=weight.device)
    scale, nested = state.absmax, state.state2
    # A byte's two fp32 levels, high nibble first; gathered as one 64-bit number, which is fastest
    pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], 1).view(torch.float64)
    level = pairs.flatten()[weight.flatten().view(torch.uint8).int()].view(torch.float32)
    if nested is not None:
        block = torch.arange(scale.numel(), device=weight.device)
        scale = nested.code[scale.int()] * nested.absmax[block // nested.blocksize]
        scale = scale + torch.as_tensor(state.offset, dtype=torch.float32, device=weight.device)
    level = F.pad(level, (0, scale.numel() * state.blocksize - level.numel()))
    value = level.view(-1, state.blocksize).mul_(scale[:, None])  # [blocks, blocksize]
    return value.flatten()[: math.prod(state.shape)].to(dtype).view(state.shape)


# ---- The kernel


def _table_ptx() -> str:
    """PTX for $0 = NF4[laneid % 16]: a tree of 15 selects, run while the loads are in flight."""
    bits = ["0f" + struct.pack(">f", x).hex() for x in NF4]
    ptx = [".reg .b32 lane, bit; .reg .f32 t<8>; .reg .pred p<4>; mov.u32 lane, %laneid;"]
    ptx += [f"and.b32 bit, lane, {1 << b}; setp.ne.u32 p{b}, bit, 0;" for b in range(4)]
    ptx += [f"selp.f32 t{i}, {bits[2 * i + 1]}, {bits[2 * i]}, p0;" for i in range(8)]
    ptx += [f"selp.f32 t{i}, t{2 * i + 1}, t{2 * i}, p1;" for i in range(4)]
    ptx += [f"selp.f32 t{i}, t{2 * i + 1}, t{2 * i}, p2;" for i in range(2)]
    return "{ " + " ".join(ptx) + " selp.f32 $0, t1, t0, p3; }"


LEVELS, TABLE_PTX = tl.constexpr(NF4), tl.constexpr(_table_ptx())
# shfl takes 5 bits of its index and lanes 16-31 repeat the table: a code needs a shift, no mask.
LOOKUP_PTX = tl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;")


# RAGGED: the last tile is not full or a pointer is not 16-byte aligned, so read bytes and mask. SM:
# compute capability; 0 under the interpreter, which has no inline PTX. BLOCKSIZE2: 0 if flat.
# fmt: off
@triton.jit
def _nf4_kernel(weight_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, out_ptr, numel,
                BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, WORDS: tl.constexpr,
                RAGGED: tl.constexpr, SM: tl.constexpr):
    # The hint keeps the compiler from giving a lane several neighbouring words. With one, its 8
    # outputs are a 16-byte store as they are, so 16-bit outputs need no shared memory.
    word = tl.max_contiguous(tl.arange(0, WORDS), 1)  # [WORDS], of 8 weights each
    column = tl.arange(0, 8)
    if SM >= 90:
        # Programmatic dependent launch (launch_pdl below): let the next kernel start early, as this
        # one was; wait for the end of the last one, whose writes are not visible before.
        gdc_launch_dependents()
        gdc_wait()
    first_word = tl.program_id(0).to(tl.int64) * WORDS  # int64: numel may pass 2^31
    left = numel - first_word * 8  # weights
    mask = word * 8 < left if RAGGED else None
    other = 0 if RAGGED else None  # what a masked load returns

    if RAGGED:
        codes = tl.full([WORDS], 0, tl.int32)
        for i in tl.static_range(4):
            byte_ptrs = weight_ptr + (first_word * 4 + word * 4 + i)
            byte = tl.load(byte_ptrs, mask=word * 8 + i * 2 < left, other=0)
            codes |= byte.to(tl.int32) << (8 * i)
    else:
        codes = tl.load(weight_ptr + (first_word + word), eviction_policy="evict_first")

    # A tile holds whole blocks or lies inside one: a word's block is the tile's first plus its own.
    first_block, block = first_word * 8 // BLOCKSIZE, word * 8 // BLOCKSIZE
    scale = tl.load(absmax_ptr + (first_block + block), mask=mask, other=other)  # [WORDS]
    if BLOCKSIZE2 > 0:
        absmax2_ptrs = absmax2_ptr + (first_block + block) // BLOCKSIZE2
        absmax2 = tl.load(absmax2_ptrs, mask=mask, other=other)
        scale = tl.load(code2_ptr + scale) * absmax2 + tl.load(offset_ptr)

    # Little-endian words, the high nibble of a byte first: 0xAB is weight 0xA, then weight 0xB
    codes = codes[:, None] >> ((column ^ 1) * 4)[None, :]  # [WORDS, 8]
    if SM > 0:
        # NF4[lane % 16] in each lane, `word` being an operand for its shape and layout alone. Were
        # that layout converted before the shuffle, entries would land in other lanes.
        table = tl.inline_asm_elementwise(TABLE_PTX, "=f,r", [word], tl.float32, True, 1)
        pair = [table[:, None], codes]
        level = tl.inline_asm_elementwise(LOOKUP_PTX, "=f,f,r", pair, tl.float32, True, 1)
    else:
        level = tl.full([WORDS, 8], 0.0, tl.float32)
        for i in tl.static_range(16):
            level = tl.where((codes & 15) == i, LEVELS[i], level)
    value = level * scale[:, None]
    if out_ptr.dtype.element_ty == tl.bfloat16 and SM < 80:
        # No bf16 conversion before sm_80, nor in the interpreter: round to nearest even in
        # integers. The minimum is for NaN, on a GPU always 0x7FFFFFFF: it becomes bf16's 0x7FFF.
        bits = tl.minimum(value.to(tl.int32, bitcast=True), 0x7FFF7FFF)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        value = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    index = word[:, None] * 8 + column[None, :]
    mask = index < left if RAGGED else None
    tl.store(out_ptr + first_word * 8 + index, value, mask=mask, cache_modifier=".cs")
# fmt: on


def compile_kernel(sm, dtype, blocksize=64, blocksize2=256, words=512, warps=4, ragged=False):
    """The kernel for capability `sm` (75, ...) and "fp16", "bf16" or "fp32". Needs no GPU."""
    types = ["*u8" if ragged else "*i32", "*u8" if blocksize2 else "*fp32", *["*fp32"] * 3]
    types += [f"*{dtype}", "i64", *["constexpr"] * 5]
    signature = dict(zip(_nf4_kernel.arg_names, types, strict=True))
    constants = {"BLOCKSIZE": blocksize, "BLOCKSIZE2": blocksize2, "WORDS": words,
                 "RAGGED": ragged, "SM": sm}  # fmt: skip
    aligned = {} if ragged else {(i,): [["tt.divisibility", 16]] for i in range(6)}
    source = ASTSource(_nf4_kernel, signature, constexprs=constants, attrs=aligned)
    # With multiply-adds fused, scales differ from bitsandbytes' in the last bit
    options = {"num_warps": warps, "enable_fp_fusion": False, "launch_pdl": sm >= 90}
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


# ---- The launch: 43 us a call by Triton's JIT on an H200's host, 9 by what follows, a memset 10.
# Addresses are read in every call; all else that a launch depends on is the key of _plan's cache.
# Private, as each public way takes 0.3 to 2 us more (torch 2.11, 2.13; CPU builds lack some).
_current_device = getattr(torch._C, "_cuda_getDevice", None)
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_empty_strided = getattr(guards, "_empty_strided_cuda", None)  # inductor's, on the current device
_plain_attributes = torch._C.DisableTorchFunctionSubclass  # Params4bit's own take 1 us each
_is_compiling, _count_modes = torch.compiler.is_dynamo_compiling, torch._C._len_torch_dispatch_stack


@functools.cache
def _plan(index, aligned, shape, dtype, blocksize, blocksize2, scales2, scale_bytes, same_device,
          nbytes, contiguous):  # fmt: skip
    """(run, function, metadata, programs, numel, shape, strides) of a launch on GPU `index`, which
    is the current one; only the checks for a CPU, -1. ValueError if numbers do not fit together."""
    numel = math.prod(shape)
    packed, scales = (numel + 1) // 2, -(-numel // max(blocksize, 1))
    for name, found, allowed in (
        ("GPU", "AMD" if torch.version.hip and index >= 0 else "NVIDIA", ["NVIDIA"]),
        ("blocksize", blocksize, [32, 64, 128, 256, 512, 1024, 2048, 4096]),
        ("weight.is_contiguous()", contiguous, [True]),
        ("weight.nbytes", nbytes, range(packed, packed + 4)),  # with a 32-bit storage's padding
        ("absmax.device == weight.device", same_device, [True]),
        ("absmax.nbytes", scale_bytes, [scales if blocksize2 else 4 * scales]),
        ("state2.absmax.numel()", scales2, [-(-scales // blocksize2) if blocksize2 else 0]),
    ):
        if found not in allowed:
            need = " or ".join(map(str, allowed))
            raise ValueError(f"{name}: found {found}, need {need} for a weight of {tuple(shape)}")
    if index < 0:
        return (None,) * 7
    # The best of 9 tiles on an H200. In multiples of a memset's time: 4 million weights take 1.01
    # with 512 words and 1.11 with 1024; 17 million 1.15 and 1.09. So they change places at 2^23.
    words, warps = (512, 4) if numel < 2**23 else (1024, 16)
    ragged = not aligned or numel % (words * 8) != 0
    major, minor = torch.cuda.get_device_capability(index)
    variant = DTYPES[dtype], blocksize, blocksize2, words, warps, ragged
    kernel = compile_kernel(major * 10 + minor, *variant)  # whose .run loads its .function
    launch = kernel.run, kernel.function, kernel.packed_metadata, -(-numel // (words * 8)), numel
    return *launch, tuple(shape), torch.empty(shape, device="meta").stride()


def _dequantize(weight, state, out, dtype) -> Tensor:
    """The kernel on the current stream; for CPU tensors the reference, which takes no `out`."""
    index, absmax, nested = weight.get_device(), state.absmax, state.state2
    if index >= 0 and index != _current_device():
        with torch.cuda.device(index):
            return _dequantize(weight, state, out, dtype)
    weight_ptr, absmax_ptr = weight.data_ptr(), absmax.data_ptr()
    code2_ptr = absmax2_ptr = offset_ptr = blocksize2 = scales2 = 0
    if nested is not None:
        absmax2, offset, blocksize2 = nested.absmax, state.offset, nested.blocksize
        on_device = isinstance(offset, Tensor) and offset.get_device() == index
        if not on_device or offset.dtype != torch.float32:
            # Old checkpoints keep a number or a tensor on the CPU. To copy that would synchronise.
            offset = torch.full((), float(offset), dtype=torch.float32, device=weight.device)
        code2_ptr, absmax2_ptr = nested.code.data_ptr(), absmax2.data_ptr()
        offset_ptr, scales2 = offset.data_ptr(), absmax2.numel()
    out_ptr = 0 if out is None else out.data_ptr()
    aligned = (weight_ptr | absmax_ptr | code2_ptr | absmax2_ptr | offset_ptr | out_ptr) % 16 == 0
    # fmt: off
    run, function, metadata, programs, numel, shape, strides = _plan(
        index, aligned, state.shape, dtype, state.blocksize, blocksize2, scales2, absmax.nbytes,
        absmax.get_device() == index, weight.nbytes, weight.is_contiguous())
    if index < 0:
        return dequantize_reference(weight, state, dtype)
    if out is None:
        out = _empty_strided(shape, strides, dtype)
    # As JITFunction.run of Triton 3.6 and 3.7: no launch metadata, no hooks; five constants' places
    run(programs, 1, 1, _current_stream(index), function, metadata, None, None, None,
        weight_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, out.data_ptr(), numel,
        None, None, None, None, None)
    # fmt: on
    return out


SCHEMA = "(Tensor weight, Tensor absmax, Tensor? code2, Tensor? absmax2, Tensor? offset, "
SCHEMA += "int blocksize, int blocksize2, int[] shape, ScalarType dtype) -> Tensor"


@torch.library.custom_op("nf4_triton::dequantize", mutates_args=(), schema=SCHEMA)
def _dequantize_op(weight, absmax, code2, absmax2, offset, blocksize, blocksize2, shape, dtype):
    state = SimpleNamespace(absmax=absmax, offset=offset, blocksize=blocksize, shape=tuple(shape))
    nested = SimpleNamespace(code=code2, absmax=absmax2, blocksize=blocksize2)
    state.state2 = nested if blocksize2 else None
    return _dequantize(weight, state, None, dtype)


@_dequantize_op.register_fake
def _(weight, absmax, code2, absmax2, offset, blocksize, blocksize2, shape, dtype):
    if absmax.device != weight.device:  # one of them on meta: no kernel will run to say so
        raise ValueError(f"absmax: found it on {absmax.device}, need it on {weight.device}")
    return weight.new_empty(shape, dtype=dtype)


# ---- Public functions, and what the patch puts in place


def dequantize_nf4(weight: Tensor, quant_state, out=None, *, dtype=None) -> Tensor:
    """The weight behind a bitsandbytes parameter, NF4[code] * (code2[absmax] * absmax2 + offset).

    weight: codes in uint8, bf16, fp16 or fp32 storage, contiguous [n, 1] or, transposed, [1, n].
    quant_state: its bitsandbytes.functional.QuantState, nested or flat, block size 32 to 4096.
    out: contiguous, of quant_state.shape. dtype: fp16, bf16 or fp32 in place of quant_state.dtype.
    Returns a tensor of quant_state.shape, for a transposed weight its transpose. On CUDA: one
    kernel on the current stream, bitsandbytes' bits, no synchronisation, no other buffer. On CPU:
    those bits by PyTorch. torch.compile, selective checkpointing, FlopCounterMode and any other
    TorchDispatchMode see nf4_triton::dequantize; where none is active the launch bypasses the
    dispatcher.
    ValueError for FP4, for a weight packed for CPUs and for byte counts that do not fit together.
    """
    kind = None if quant_state is None else quant_state.quant_type
    if kind != "nf4":
        raise ValueError(f"quant_type: found {kind!r}, need 'nf4' (None: call layer.to(...) first)")
    dtype = dtype or quant_state.dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype: found {dtype}, need one of {', '.join(map(str, DTYPES))}")
    with _plain_attributes():
        if out is not None:
            need = tuple(quant_state.shape), dtype, weight.device, True
            found = tuple(out.shape), out.dtype, out.device, out.is_contiguous()
            if found != need:
                raise ValueError(f"out (shape, dtype, ...): found {found}, need {need}")
        plain = type(weight).__torch_dispatch__ is Tensor.__torch_dispatch__  # no DTensor or such
        if weight.is_cuda and plain and not _is_compiling() and not _count_modes():
            out = _dequantize(weight, quant_state, out, dtype)
        elif weight.device.type not in ("cpu", "cuda", "meta"):
            raise ValueError(f"weight: found it on {weight.device}, need an NVIDIA GPU or a CPU")
        elif getattr(quant_state, "packing_format_for_cpu", False):
            raise ValueError("weight: found bitsandbytes' packing for CPUs, need its usual one")
        else:
            nested, blocksize = quant_state.state2, quant_state.blocksize
            scales = None, None, None, blocksize, 0
            if nested is not None:
                offset = torch.as_tensor(quant_state.offset, dtype=torch.float32)
                scales = nested.code, nested.absmax, offset, blocksize, nested.blocksize
            arguments = weight, quant_state.absmax, *scales, quant_state.shape, dtype
            result = torch.ops.nf4_triton.dequantize(*arguments)
            out = result if out is None else out.copy_(result)
        return out.t() if weight.size(0) == 1 else out


class _Linear4bit(torch.autograd.Function):
    """x @ W.T + bias, W dequantised in forward and again in backward: only its 4 bits are kept."""

    @staticmethod
    def forward(ctx, x, weight, bias, quant_state):
        ctx.weight, ctx.quant_state = weight, quant_state
        return F.linear(x, dequantize_nf4(weight, quant_state, dtype=x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        (need_x, _, need_bias, _), pair = ctx.needs_input_grad, (ctx.weight, ctx.quant_state)
        grad_x = grad @ dequantize_nf4(*pair, dtype=grad.dtype) if need_x else None
        grad_bias = grad.flatten(0, -2).sum(0) if need_bias else None
        return grad_x, None, grad_bias, None


@functools.cache
def _few_rows(index: int) -> int:
    """Up to so many rows a matmul stays with bitsandbytes, which may multiply without decoding,
    often to 512 (unmeasured). On an H200, at 32, it takes 0.98 to 2.2 of our time, by shape."""
    return 32 if torch.cuda.get_device_capability(index)[0] in (9, 10) else 512


def _matmul_4bit(A, B, quant_state, out=None, bias=None):
    """bitsandbytes.matmul_4bit: ours where it would decode in three launches and then multiply."""
    if (
        not A.is_cuda
        or A.numel() <= _few_rows(A.get_device()) * A.size(-1)
        or torch.version.hip
        or A.dtype not in DTYPES
        or out is not None
        or getattr(quant_state, "quant_type", None) != "nf4"
        or tuple(quant_state.shape[1:]) != A.shape[-1:]
    ):
        return _matmul_4bit.original(A, B, quant_state, out, bias)
    if torch.is_autocast_enabled("cuda"):  # decode into what the product will use
        A = A.to(torch.get_autocast_dtype("cuda"))
        bias = bias if bias is None else bias.to(A.dtype)
    return _Linear4bit.apply(A, B.view(-1, 1), bias, quant_state)  # B, in either form, is W


def _dequantize_4bit(A, quant_state=None, absmax=None, out=None, blocksize=None, quant_type="fp4"):
    """bitsandbytes.functional.dequantize_4bit: NF4 on CUDA through the kernel."""
    if A.is_cuda and not torch.version.hip and getattr(quant_state, "quant_type", None) == "nf4":
        return dequantize_nf4(A, quant_state, out)
    return _dequantize_4bit.original(A, quant_state, absmax, out, blocksize, quant_type)


class patch_bitsandbytes(contextlib.AbstractContextManager):
    """From its construction to .undo(), or to the end of a `with` block, every bitsandbytes
    Linear4bit, and PEFT's merges, use the kernel where it is faster. May nest."""

    active: ClassVar[set] = set()  # all that are not undone

    def __init__(self):
        self.targets = ((bnb, "matmul_4bit", _matmul_4bit),
                        (bnb.functional, "dequantize_4bit", _dequantize_4bit))  # fmt: skip
        self.active.add(self)
        for module, name, ours in self.targets:
            found = getattr(module, name)
            if not getattr(ours, "in_place", False) or found is ours.original:
                ours.original = getattr(found, "original", found)  # ours of an old import has one
                ours.in_place = True
                setattr(module, name, ours)

    def undo(self):
        self.active.discard(self)
        for module, name, ours in () if self.active else self.targets:
            if getattr(module, name) is ours:  # else it stays, below what patched it since
                setattr(module, name, ours.original)
                ours.in_place = False

    def __exit__(self, *_):
        self.undo()


# ---- Self-test. Unsloth's challenge of 2025, part A: batch, length, hd, m, seed, dtype
CHALLENGE = ((2, 3333, 2048, 8192, 3407, torch.float16),
             (5, 777, 1024, 4096, 3409, torch.bfloat16),
             (3, 2048, 4096, 14336, 3408, torch.bfloat16))  # fmt: skip


def quantize(shape, dtype, blocksize=64, nested=True, device="cuda") -> tuple:
    """(packed weight, QuantState) of a random weight."""
    weight = torch.randn(shape, dtype=dtype, device=device)
    return bnb.functional.quantize_4bit(weight, None, None, blocksize, nested, "nf4")


def same_bits(a, b) -> bool:
    alike = (a.dtype, a.shape) == (b.dtype, b.shape)
    return alike and torch.equal(*(t.flatten().view(torch.uint8) for t in (a, b)))


def interpret(weight, state, words, ragged) -> Tensor:
    """The kernel in Triton's interpreter on CPU tensors, checked to write nothing past the end."""
    numel, flat, nested = math.prod(state.shape), state.state2 is None, state.state2 or state
    offset = state.absmax if flat else state.offset  # of a flat state the kernel reads no offset
    padded = torch.full((numel + words * 8,), math.nan, dtype=state.dtype)
    codes = weight.flatten().view(torch.uint8 if ragged else torch.int32)
    tensors = codes, state.absmax, nested.code, nested.absmax, offset, padded
    kernel = InterpretedFunction(_nf4_kernel.fn)[(-(-numel // (words * 8)),)]
    kernel(*tensors, numel, state.blocksize, 0 if flat else nested.blocksize, words, ragged, 0)
    assert padded[numel:].isnan().all()
    return padded[:numel].view(state.shape)


def check_challenge(batch, length, hd, m, seed, dtype, device) -> list[tuple]:
    """The challenge's MLP and its checks. Returns (weight, state) in the order it times them in."""
    torch.manual_seed(seed)
    make = functools.partial(bnb.nn.Linear4bit, bias=None, compute_dtype=dtype, quant_type="nf4")
    up, gate, down = layers = [make(*io).to(device) for io in ((hd, m), (hd, m), (m, hd))]
    pairs = [(layer.weight, layer.weight.quant_state) for layer in layers]
    for _, state in pairs:
        state.dtype = dtype
    x = torch.randn(batch, length, hd, device=device, dtype=dtype)
    for _ in range(2):
        ups, gates, downs = weights = [dequantize_nf4(*pair).t() for pair in pairs]
        wants = [bnb.functional.dequantize_4bit(*pair).t() for pair in pairs]
        torch.testing.assert_close(weights, wants, rtol=0, atol=0, check_stride=True)
        y, want = (F.silu(x @ gates) * (x @ ups)) @ downs, down(F.silu(gate(x)) * up(x))
        torch.testing.assert_close(y, want, check_stride=True)
    return pairs


def self_test():
    """Yields the name of each check once it has passed."""
    device = "cuda" if (gpu := torch.cuda.is_available()) else "cpu"
    cases = ((2048, 64, True, False), (4096, 32, False, False), (8192, 4096, True, False),
             (2405, 64, True, True), (1, 64, False, True))  # fmt: skip
    for (numel, *quantisation, ragged), dtype in itertools.product(cases, DTYPES):
        pair = quantize((numel,), dtype, *quantisation, "cpu")
        assert same_bits(interpret(*pair, 32, ragged), dequantize_reference(*pair, dtype))
    yield "the kernel in Triton's interpreter: the reference's bits, and nothing past the end"

    dtypes = DTYPES if gpu else (torch.float16, torch.float32)  # on CPUs its bf16 may differ
    for dtype, nested, blocksize in itertools.product(dtypes, (True, False), (64, 128, 4096)):
        weight, state = quantize((15, 4096), dtype, blocksize, nested, device)
        want = bnb.functional.dequantize_4bit(weight, state)
        out, moved = torch.empty_like(want), torch.cat([weight[:1], weight])[1:]  # misaligned
        dequantize_nf4(weight, state, out)
        transposed = dequantize_nf4(weight.t(), state).t()
        for got in (dequantize_nf4(weight, state), out, transposed, dequantize_nf4(moved, state)):
            assert same_bits(got, want), (dtype, nested, blocksize)
    yield f"bitsandbytes' own bits on {device}: nested, flat, out=, transposed, misaligned"

    for option in CHALLENGE if gpu else [(2, 33, 128, 512, 3407, torch.float16)]:
        check_challenge(*option, device)
    yield "the challenge's MLP: outputs, weights, dtypes, strides"

    weight, state = quantize((64, 64), torch.float16, device=device)
    for tensor in (weight, state.absmax, state.offset, state.state2.code, state.state2.absmax):
        before = dequantize_nf4(weight, state)
        tensor.data = tensor + 1  # another address behind the same object
        got = dequantize_nf4(weight, state)
        assert same_bits(got, dequantize_reference(weight, state, torch.float16))
        assert not same_bits(got, before)
    state.blocksize = 128  # which does not fit
    with contextlib.suppress(ValueError):  # which the call in the next line is to raise
        raise AssertionError(f"not noticed: {dequantize_nf4(weight, state)}")
    yield "changes after a call: new addresses are read, numbers that do not fit refused"

    double = torch.compile(lambda *pair: dequantize_nf4(*pair) * 2, fullgraph=True)
    for _ in range(3):
        pair = quantize((96, 128), torch.bfloat16, device=device)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert same_bits(double(*pair), dequantize_nf4(*pair) * 2)
    yield "torch.compile(fullgraph=True): one graph for three weights"

    x = torch.randn(9, 99, 128, device=device, requires_grad=True)
    weight, state = quantize((64, 128), torch.float32, device=device)
    with patch_bitsandbytes():
        assert bnb.matmul_4bit is _matmul_4bit  # which leaves CPU tensors to bitsandbytes
        y = bnb.matmul_4bit(x, weight, state) if gpu else _Linear4bit.apply(x, weight, None, state)
    assert bnb.matmul_4bit is not _matmul_4bit
    y.backward(y.detach())
    w = dequantize_reference(weight, state, torch.float64)
    want = x.detach().double() @ w.t()
    pair, wanted = (y.double(), x.grad.double()), (want, want @ w)
    torch.testing.assert_close(pair, wanted, rtol=1e-4, atol=1e-4)
    yield "patch_bitsandbytes: its matmul and gradient against float64; undone"

    for sm, dtype in itertools.product((75, 80, 89, 90, 100), DTYPES.values()):
        assert "shfl.sync.idx" in compile_kernel(sm, dtype).asm["ptx"]
    yield "compiles for sm_75 (T4), 80, 89, 90 and 100"

    if gpu:
        weight, state = quantize((512, 512), torch.float16)
        want = dequantize_nf4(weight, state)
        with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
            got = dequantize_nf4(weight, state)  # on another stream; synchronising is an error
        got.zero_()
        graph.replay()
        assert same_bits(got, want)
        yield "graph capture: the current stream, no synchronisation"


# ---- Timings


def challenge_reference(weight, state) -> Tensor:
    """The challenge's reference: bitsandbytes' C functions, three launches and a buffer."""
    nested, int32 = state.state2, ctypes.c_int
    get_ptr, lib = bnb.functional.get_ptr, bnb.functional.lib
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    absmax = torch.empty(state.absmax.shape, device="cuda")
    tensors = [get_ptr(t) for t in (nested.code, state.absmax, nested.absmax, absmax)]
    lib.cdequantize_blockwise_fp32(*tensors, int32(nested.blocksize), int32(absmax.numel()), stream)
    absmax += state.offset
    out = torch.empty(state.shape, dtype=state.dtype, device="cuda")
    tensors = [None] + [get_ptr(t) for t in (weight, absmax, out)]
    decode = getattr(lib, f"cdequantize_blockwise_{DTYPES[state.dtype]}_nf4")
    decode(*tensors, int32(state.blocksize), int32(out.numel()), stream)
    return out


def memset(weight, state) -> Tensor:
    """The floor: the output allocated and written, nothing read."""
    return torch.empty(*state.shape, dtype=state.dtype, device=weight.device).zero_()


def wall_us(run, number) -> float:
    """Median microseconds of a run on the host's clock over ten batches, after one to warm up."""
    return statistics.median(timeit.repeat(run, number=number, repeat=11)[1:]) / number * 1e6


def graph_us(function, shape, dtype) -> float:
    """Microseconds a weight in a replayed CUDA graph over 0.5 GB: no launch cost, a cold L2."""
    pairs = [quantize(shape, dtype) for _ in range(2**28 // math.prod(shape))]
    run = lambda: [function(*pair) for pair in pairs]
    return triton.testing.do_bench_cudagraph(run, return_mode="median") * 1e3 / len(pairs)


def bench() -> dict[str, float]:
    """Prints microseconds and returns how many times as fast as the others ours is."""
    functions = {"ours": dequantize_nf4, "reference": challenge_reference, "memset": memset}
    total = dict.fromkeys(functions, 0.0)
    for option in CHALLENGE:
        pairs = check_challenge(*option, "cuda")

        def round_of_three(function, pairs=pairs):
            for pair in pairs:
                function(*pair).t()
                torch.cuda.synchronize()

        for name, function in functions.items():
            total[name] += wall_us(functools.partial(round_of_three, function), 100)
    print("the challenge, us a round:", *(f"{name} {t:.1f}" for name, t in total.items()))
    figures = {f"challenge_vs_{k}": total[k] / total["ours"] for k in ("reference", "memset")}
    for shape in ((4096, 1024), (8192, 2048), (14336, 4096)):
        ours, floor = (graph_us(f, shape, torch.bfloat16) for f in (dequantize_nf4, memset))
        print(f"the kernel, {shape} bf16: {ours:.2f} us, memset {floor:.2f}")
        figures[f"kernel_{shape[0]}x{shape[1]}_vs_memset"] = floor / ours
    pair = check_challenge(1, 64, 256, 256, 0, torch.bfloat16, "cuda")[0]  # of a Linear4bit
    ours, floor = (wall_us(lambda f=f: f(*pair), 500) for f in (dequantize_nf4, memset))
    print(f"a call's cost to the host: {ours:.1f} us, memset {floor:.1f}")
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--test", action="store_true", help="the self-test alone")
    parser.add_argument("--bench", action="store_true", help="the timings alone (needs a GPU)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures there")
    args = parser.parse_args()
    gpu, checks, figures = torch.cuda.is_available(), 0, {}
    device = torch.cuda.get_device_name() if gpu else "CPU"
    print(f"nf4_triton | {device} | torch {torch.__version__} | triton {triton.__version__}")
    if args.test or not args.bench:
        for checks, name in enumerate(self_test(), 1):
            print(f"ok {checks}: {name}", flush=True)
    if gpu and (args.bench or not args.test):
        figures = bench()
    words = "".join(f" {name}={value:.2f}x" for name, value in figures.items())
    print(f"RESULT nf4_triton PASS checks={checks}{'' if gpu else ' skipped=1(GPU)'}{words}")
    if args.json:
        part = args.json.with_name(f"{args.json.name}.part")
        part.write_text(json.dumps({"device": device, "checks": checks, **figures}, indent=1))
        part.replace(args.json)


if __name__ == "__main__":
    main()
