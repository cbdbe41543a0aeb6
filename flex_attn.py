"""One attention interface: say the mask once, run the fastest correct kernel.

Problem: FlexAttention, SDPA's four kernels, flash-attn and xformers each want the mask in another
form (a mask_mod with a BlockMask, a flag, a dense tensor, cumulative lengths, a bias object), each
refuses other inputs, and FlexAttention recompiles with every length unless it is held.

Idea: causal, sliding window, packed documents and padding all let a query see one interval of keys.
- `Mask` describes them; it lowers to whatever a kernel needs, once per batch for all layers.
- The intervals are data: two int32 numbers a query. For FlexAttention one compiled graph serves all
  windows, document layouts and lengths; a second one, without data, serves plain causal masks. The
  block tables come from the first and last key of each block, 1/16384 of the work of evaluating
  the mask everywhere. Lengths are padded inside to blocks of 128, heads and head size are constants
  of the graph, and tile sizes per head size and mask come from a table measured on an H200 (TUNED;
  `tune` measures for other GPUs and shapes).
- For Hopper there are Triton kernels here that take the same intervals (backend `triton`): nothing
  to trace, any length, and 1.1 to 1.7 times as fast as FlexAttention forward and backward.
- `auto` follows rules measured on the GPU family; a backend asked for by name runs or says why not.
- `register()` makes all this transformers' attn_implementation="flex_attn", position ids that
  restart included (packed documents).

Left out: dropout, additive biases, attention sinks, paged caches. The Triton kernels are for
compute capability 9.0, where they were tuned; elsewhere `auto` takes FlexAttention or SDPA.
Run on an H200 and on CPUs. On a T4 (sm_75) nothing was run: there `auto` takes SDPA.

    python flex_attn.py                   self-test, then timings; --test or --bench for one of them
    python flex_attn.py --bench --only layouts,gemma --plot results/flex.png

    from flex_attn import Mask, attention, register
    out = attention(q, k, v)                                    # [B, H, S, D], grouped heads too
    out = attention(q, k, v, mask=Mask(window=1024, doc_ids=ids), softcap=30.0)
    register(); model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="flex_attn")
"""

import argparse
import contextlib
import functools
import gc
import importlib
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
import threading
import time
import traceback
import types
import unittest
import unittest.mock
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # Ctrl-C while torch is imported: nothing else can catch it yet
    INTERRUPT = signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_scalar
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import (
    BlockMask,
    create_block_mask,
    flex_attention,
)
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.testing import do_bench
from triton.tools.tensor_descriptor import TensorDescriptor

BLOCK = 128  # of FlexAttention's block mask; lengths are padded to it, and to two of them
NEAR = 64  # how many keys share one kept range of queries: the least N of _dkv_kernel
LOG2E = math.log2(math.e)
FAR = 2**30  # a window wider than any sequence
SDPA = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
BACKENDS = ("triton", "flex", "sdpa", *SDPA, "varlen", "flash_attn", "xformers", "reference")
HALF = (torch.float16, torch.bfloat16)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
COMPILING = threading.RLock()  # torch 2.11 refuses compiled calls while another thread compiles
KEEPING = threading.Lock()  # of what masks keep: threads may share one
FUZZ_CASES = "25"  # of each random test in the self-test


class Tiles(NamedTuple):
    """FlexAttention's kernel options: forward (queries, keys, warps, stages), backward (queries and
    keys of the dK/dV programs, of the dQ programs, warps, stages), TMA loads in the forward, scale
    folded into q there (saves two multiplications a score, costs one rounding of q)."""

    forward: tuple[int, int, int, int]
    backward: tuple[int, int, int, int, int, int]
    tma: bool = False
    prescale: bool = False


# By capability, head size up to, and kind: medians over 470 variants on one H200, torch 2.11, 4
# sequences of 4096, 32/8 heads (16/8 at head size 256), bf16. Milliseconds forward+backward against
# inductor's own choice: causal 128: 5.34 for 5.71, 64: 3.11 for 3.60, 256: 7.03 for 12.7;
# documents of 512, 128: 1.24 for 1.42, 64: 0.79 for 1.19, 256: 1.74 for 2.50.
TUNED: dict[tuple, Tiles] = {
    ((9, 0), 64, "causal"): Tiles((64, 64, 4, 3), (32, 128, 128, 64, 4, 3), True, True),
    ((9, 0), 64, "rows"): Tiles((64, 64, 4, 3), (32, 128, 128, 64, 4, 3)),
    ((9, 0), 64, "softcap"): Tiles((64, 64, 4, 3), (64, 128, 128, 64, 8, 3)),
    ((9, 0), 128, "causal"): Tiles((64, 64, 4, 3), (64, 128, 128, 64, 8, 3), True, True),
    ((9, 0), 128, "rows"): Tiles((64, 64, 4, 3), (32, 64, 64, 64, 4, 2)),
    ((9, 0), 128, "softcap"): Tiles((64, 64, 4, 3), (32, 64, 64, 64, 4, 2)),
    ((9, 0), 256, "causal"): Tiles((128, 64, 8, 2), (64, 64, 128, 32, 8, 2), True),
    ((9, 0), 256, "rows"): Tiles((128, 64, 8, 2), (64, 64, 128, 32, 8, 2), True),
    ((9, 0), 256, "softcap"): Tiles((128, 64, 8, 2), (64, 64, 128, 32, 8, 2)),
}

# --------------------------------------------------------------------------------------------------
# The mask, its checks, and the definition of attention in plain PyTorch


def _need(ok, name, found, need, error=ValueError):
    """Raise what was found and what is needed, put into a line of words only then."""
    if not ok:
        words = lambda t: f"shape {list(t)}" if isinstance(t, tuple) else getattr(t, "__name__", t)
        line = lambda t: " ".join(str(words(t)).split())[:300]
        raise error(f"{name}: found {line(found)}, need {line(need)}")


@dataclass(frozen=True, eq=False)
class Mask:
    """Which keys a query sees. Query i stands at position i + offset; it sees key j if all hold:

    causal: j <= i + offset.
    window: the distance is less than `window` (1: itself alone), to both sides if not causal.
    doc_ids: the ids of the two positions are equal. [S_k] or [B, S_k] integers, non-decreasing.
    padding: both positions are real tokens. [B, S_k] bool, True for a real token.
    offset: an int or a 0-d integer tensor; default S_k - S_q, so that the queries are the last
        positions (decoding, chunked prefill). A static cache passes its own.

    A query that sees no key has output zero and passes no gradient. Keep one Mask per batch for all
    layers: what it lowers to is kept in it, so do not write into its tensors afterwards. On a GPU
    the first use of doc_ids or padding waits once for the device, to check them (not inside
    torch.compile).
    """

    causal: bool = True
    window: int | None = None
    doc_ids: Tensor | None = None
    padding: Tensor | None = None
    offset: int | Tensor | None = None
    _memo: dict = field(default_factory=dict, init=False, repr=False)
    _blocks: "Blocks | None" = field(default=None, init=False, repr=False)
    _dense: Tensor | None = field(default=None, init=False, repr=False)
    _lengths: tuple[int, int] | None = field(default=None, init=False, repr=False)

    def __post_init__(self):
        _need(isinstance(self.causal, bool), "causal", self.causal, "True or False", TypeError)
        if self.window is not None:
            ok = isinstance(self.window, int) and not isinstance(self.window, bool)
            _need(ok, "window", self.window, "an integer or None", TypeError)
            _need(1 <= self.window <= FAR, "window", self.window, f"1 or more (at most {FAR})")
        shapes = {"doc_ids": "[S_k] or [B, S_k]", "padding": "[B, S_k]"}
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value is not None:
                _need(isinstance(value, Tensor), name, type(value), "a tensor or None", TypeError)
                if name == "padding":
                    _need(value.dtype == torch.bool, name, value.dtype, "torch.bool", TypeError)
                else:
                    _need(value.dtype in INTEGERS, name, value.dtype, "an integer dtype", TypeError)
                ok = value.ndim == 2 or (value.ndim == 1 and name == "doc_ids")
                _need(ok, name, value.shape, shape)
        if isinstance(self.offset, Tensor):
            ok = self.offset.dtype in INTEGERS and self.offset.ndim == 0
            _need(
                ok, "offset", (self.offset.dtype, self.offset.shape), "an integer or a 0-d tensor"
            )
        elif self.offset is not None:
            ok = isinstance(self.offset, (int, torch.SymInt)) and not isinstance(self.offset, bool)
            _need(ok, "offset", type(self.offset), "an integer or a 0-d tensor of one", TypeError)
            ok = not isinstance(self.offset, int) or abs(self.offset) <= FAR
            _need(ok, "offset", self.offset, f"{-FAR} to {FAR}")
        if not _tracing():
            _mark_dynamic(self.doc_ids, self.padding)

    @property
    def plain(self) -> bool:
        """Nothing but causal or not."""
        return self.window is self.doc_ids is self.padding is self.offset is None

    ndim = 0  # transformers asks masks for it, and has static caches' masks made contiguous

    def contiguous(self) -> "Mask":
        return self

    def to(self, device, non_blocking: bool = False) -> "Mask":
        """This mask on another device, what prepare() made included; made once for all layers
        there. accelerate calls this between the parts of a model that a device_map splits."""
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        lowered = [self._dense, *(self._blocks or ())]
        tensors = [self.doc_ids, self.padding, self.offset, *lowered]
        if all(t.device == device for t in tensors if isinstance(t, Tensor)):
            return self

        def make():
            move = lambda t: t.to(device, non_blocking=non_blocking) if isinstance(t, Tensor) else t
            ids, real, offset, dense, *blocks = map(move, tensors)
            mask = replace(self, doc_ids=ids, padding=real, offset=offset)
            if FACTS in self._memo:
                mask._memo[FACTS] = self._memo[FACTS]
            object.__setattr__(mask, "_dense", dense)
            object.__setattr__(mask, "_blocks", Blocks(*blocks) if blocks else None)
            object.__setattr__(mask, "_lengths", self._lengths)
            _mark_dynamic(dense, *blocks)
            return mask

        return _kept(self._memo, ("to", _place(device)), make)

    def prepare(self, q: Tensor, k: Tensor) -> "Mask":
        """This mask, checked and lowered for q and k [B, H, S, D] of these lengths, for use inside
        a torch.compile'd region: layers compiled one by one then share one block table."""
        lengths = q.shape[2], k.shape[2]
        if self._lengths == lengths or (self.plain and self._lengths is None):
            return self
        mask = _ready(self, q, k)
        facts, mask = _facts(mask), replace(mask)
        mask._memo[FACTS] = facts
        object.__setattr__(mask, "_lengths", lengths)
        if not mask.plain:
            dense = not q.is_cuda or q.shape[2] < BLOCK or _unable_flex(q) is not None
            name, make = ("_dense", dense_mask) if dense else ("_blocks", _lower)
            object.__setattr__(mask, name, make(mask, q, k))
            _mark_dynamic(mask._dense)
        return mask


def _tracing():
    # is_compiling() is also true while another thread compiles (torch 2.13)
    return torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()


def _mark_dynamic(*tensors):
    """Have torch.compile take no size of these for a constant."""
    for tensor in tensors:
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, tuple(range(tensor.ndim)))


def _place(device):
    """What keeps tensors apart: a device, its stream (what one has queued is not there yet for
    another), and inference mode (its tensors cannot be saved for a backward pass)."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return device, stream, torch.is_inference_mode_enabled()


def _kept(memo, key, make, most=64):
    """The value of `key`, a tuple, made if it is new; the oldest of its kind, key[0], leave."""
    try:
        return memo[key]
    except KeyError:
        value = make()
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return value  # it is not there before the graph runs
    with KEEPING:
        alike = [other for other in memo if other[0] == key[0]]
        for other in alike[: max(0, len(alike) + 1 - most)]:
            del memo[other]
        return memo.setdefault(key, value)


FACTS = ("facts",)


def _facts(mask):
    """Of doc_ids and padding, in one transfer: (ids fall somewhere, a token is padding, a document
    has padding between its tokens, how often a document follows another in its row)."""

    def read():
        ids, real = mask.doc_ids, mask.padding
        if ids is real is None:
            return [0, 0, 0, 0]
        flags = [torch.zeros((), dtype=torch.bool, device="cpu")] * 4
        if ids is not None:
            flags[0] = (ids[..., 1:] < ids[..., :-1]).any()
            flags[3] = (ids[..., 1:] != ids[..., :-1]).sum()
        if real is not None:
            size = real.shape[1]
            at = torch.arange(size, device=real.device)
            before = F.pad(torch.where(real, at, -1).cummax(-1).values[:, :-1], (1, 0), value=-1)
            gap = real & (before >= 0) & (before < at - 1)
            if ids is not None:
                two = ids.expand(real.shape)
                gap = gap & (two.gather(1, before.clamp(min=0)) == two)
            flags[1:3] = [~real.all(), gap.any()]
        device = real.device if ids is None else ids.device
        return torch.stack([f.to(device, torch.int64) for f in flags]).tolist()

    return _kept(mask._memo, FACTS, read)


def _ready(mask, q, k):
    """The mask without what changes nothing for q and k; doc_ids checked for order."""
    if _tracing():
        return mask
    lengths, size = (q.shape[2], k.shape[2]), max(q.shape[2], k.shape[2])
    if mask._lengths is not None:  # prepare() has done it
        words = "{} queries and {} keys".format
        ok = mask._lengths == lengths
        _need(ok, "mask", "one prepared for " + words(*mask._lengths), words(*lengths))
        made = mask._dense if mask._blocks is None else mask._blocks.lo
        ok = made is None or made.device == q.device
        _need(ok, "mask", f"one prepared on {getattr(made, 'device', None)}", f"{q.device} as q")
        return mask
    if mask.plain:
        return mask

    def make():
        unsorted, padded, gaps, follow = _facts(mask)
        _need(not unsorted, "doc_ids", "ids that fall", "non-decreasing ids in each row")
        changes = {}
        if mask.doc_ids is not None and not follow:
            changes["doc_ids"] = None
        if mask.padding is not None and not padded:
            changes["padding"] = None
        if mask.window is not None and mask.window >= size:
            changes["window"] = None
        if not changes or mask.offset is not None:  # a cache's mask is of one kind for all tokens
            return None  # (the mask itself would keep itself alive)
        simple = replace(mask, **changes)
        simple._memo[FACTS] = [0, padded, gaps, follow]
        return simple

    return _kept(mask._memo, ("simple", size), make) or mask


def _check(q, k, v, mask, scale, softcap):
    for name, t in (("q", q), ("k", k), ("v", v)):
        _need(isinstance(t, Tensor), name, type(t), "a tensor", TypeError)
        _need(t.ndim == 4, name, t.shape, "[B, H, S, D]")
        ok = t.dtype in (*HALF, torch.float32, torch.float64)
        _need(ok, name, t.dtype, "a floating-point dtype of 16 to 64 bits", TypeError)
        _need(t.layout == torch.strided, name, t.layout, "torch.strided", TypeError)
        _need(t.device == q.device, name, t.device, f"{q.device} as q")
        _need(t.dtype == q.dtype, name, t.dtype, f"{q.dtype} as q", TypeError)
    batch, heads, q_len, dim = q.shape
    kv_heads, k_len = k.shape[1:3]
    ok = batch > 0 and heads > 0 and q_len > 0 and dim > 0
    _need(ok, "q", q.shape, "at least one token, head and value")
    _need(k_len > 0, "k", k.shape, "at least one token")
    _need(k.shape[0] == batch and k.shape[3] == dim, "k", k.shape, (batch, kv_heads, k_len, dim))
    _need(v.shape == k.shape, "v", v.shape, tuple(k.shape))
    if kv_heads == 0 or heads % kv_heads:
        _need(False, "k", f"{kv_heads} heads", f"a number that divides q's {heads}")
    _need(isinstance(mask, Mask), "mask", type(mask), "a Mask", TypeError)
    for name, tensor in (("doc_ids", mask.doc_ids), ("padding", mask.padding)):
        if tensor is not None:
            shape = (batch, k_len)[2 - tensor.ndim :]
            ok = all(a == b for a, b in zip(tensor.shape, shape, strict=True))
            _need(ok, name, tensor.shape, shape)
            _need(tensor.device == q.device, name, tensor.device, f"{q.device} as q")
    tokens = mask.doc_ids is not None or mask.padding is not None
    if tokens and q_len > k_len:  # (these words would make torch.compile take sizes for constants)
        words = f"at most the {k_len} keys with doc_ids or padding"
        _need(False, "q", f"{q_len} queries", words)
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is not None:
            ok = isinstance(value, (int, float)) and not isinstance(value, bool)
            _need(ok, name, type(value), "a number or None", TypeError)
            _need(0 < value < 3e38, name, value, "a finite number, more than 0")


def dense_mask(mask: Mask, q: Tensor, k: Tensor) -> Tensor:
    """The definition: bool [B or 1, 1, S_q, S_k], True where query i sees key j."""
    q_len, k_len = q.shape[2], k.shape[2]
    offset = k_len - q_len if mask.offset is None else mask.offset
    i = (torch.arange(q_len, device=q.device) + offset)[:, None]
    j = torch.arange(k_len, device=q.device)[None]
    sees = torch.ones_like(i - j, dtype=torch.bool)
    if mask.causal:
        sees = sees & (j <= i)
    if mask.window is not None:
        sees = sees & ((i - j).abs() < mask.window)
    sees = sees[None]
    at = i[:, 0].clamp(0, k_len - 1)
    if mask.doc_ids is not None:
        ids = mask.doc_ids if mask.doc_ids.ndim == 2 else mask.doc_ids[None]
        sees = sees & (ids[:, at, None] == ids[:, None, :])
    if mask.padding is not None:
        sees = sees & mask.padding[:, at, None] & mask.padding[:, None, :]
    return sees[:, None]


def _repeated(q, k, v):
    group = q.shape[1] // k.shape[1]
    return (k, v) if group == 1 else tuple(t.repeat_interleave(group, 1) for t in (k, v))


def _run_reference(q, k, v, mask, scale, softcap):
    """Plain attention in float32 (float64 for float64 inputs): every score in memory."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = _repeated(q, k, v)
    scores = q.to(wide) @ k.to(wide).mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    sees = dense_mask(mask, q, k) if mask._dense is None else mask._dense
    scores = scores.masked_fill(~sees, -math.inf)
    weights = scores.masked_fill(~sees.any(-1, True), 0).softmax(-1)
    return (weights.masked_fill(~sees, 0) @ v.to(wide)).to(q.dtype)


# --------------------------------------------------------------------------------------------------
# FlexAttention: intervals, block tables, kernels


class Blocks(NamedTuple):
    """A mask lowered for FlexAttention; all of it data, for lengths padded to blocks."""

    lo: Tensor  # int32 [B or 1, pitch], flat: the first key that a query sees
    hi: Tensor  # and the last; lo > hi for none
    real: Tensor  # bool [B, pitch], flat: the keys that are no padding; empty if all are real
    pitch: Tensor  # int32, the larger of S_q and S_k, or 0 where all sequences share a row
    tables: Tensor  # int32: BlockMask's eight tables one after the other, then a 0
    queries: Tensor  # int32 [B or 1, pitch / 64, 2], flat: which meet 64 keys, from and to


def _runs(ids):
    """The first and last position [B, S] of the run of equal ids that each position is in."""
    size = ids.shape[-1]
    at = torch.arange(size, device=ids.device)
    new = F.pad(ids[:, 1:] != ids[:, :-1], (1, 1), value=True)
    first = torch.where(new[:, :-1], at, 0).cummax(-1).values
    last = torch.where(new[:, 1:], at, size).flip(-1).cummin(-1).values.flip(-1)
    return first, last


def _ordered(dense):
    """How many are set in each row of bools [B, 1, n, m], and their columns, before the others."""
    rank = dense.cumsum(-1)
    place = torch.where(dense, rank, rank[..., -1:] + (~dense).cumsum(-1)) - 1
    columns = torch.arange(dense.shape[-1], device=dense.device).expand(dense.shape)
    return [rank[..., -1].flatten(), torch.empty_like(place).scatter_(-1, place, columns).flatten()]


def _build(numbers, ids, real, q_size, k_size, causal):
    """Blocks of a mask. numbers: int64 [4], S_q, S_k, offset, window; ids, real: [B or 1, k_size].
    Queries past S_q repeat the last one: their outputs are cut off, and they keep blocks full."""
    q_len, k_len, offset, window = numbers
    at = torch.minimum(torch.arange(q_size, device=numbers.device), q_len - 1) + offset
    inside, at = torch.minimum(at, k_len - 1).clamp(min=0), at[None]
    lo, hi = (at - window + 1).clamp(min=0), at if causal else at + window - 1
    if ids is not None:
        first, last = _runs(ids)
        lo, hi = torch.maximum(lo, first[:, inside]), torch.minimum(hi, last[:, inside])
    if real is not None:
        hi = torch.where(real[:, inside], hi, -1)
    hi = torch.minimum(hi, k_len - 1)
    lo, hi = torch.where(lo > hi, k_size, lo), torch.where(lo > hi, -1, hi)
    rows = lambda t: t.view(t.shape[0], 1, q_size // BLOCK, BLOCK)
    start = torch.arange(0, k_size, BLOCK, device=lo.device)
    end = start + BLOCK - 1
    some = (end >= rows(lo).amin(-1, True)) & (start <= rows(hi).amax(-1, True))
    full = (start >= rows(lo).amax(-1, True)) & (end <= rows(hi).amin(-1, True))
    if real is not None:
        keys = real.view(real.shape[0], 1, 1, k_size // BLOCK, BLOCK)
        some, full = some & keys.any(-1), full & keys.all(-1)
    some = some & ~full
    tables = [t for dense in (some, full, some.mT, full.mT) for t in _ordered(dense)]
    tables = torch.cat([*tables, tables[0].new_zeros(1)])
    lows, highs = (t.view(t.shape[0], -1, NEAR, 1) for t in (lo, hi))
    start, at = (torch.arange(0, size, NEAR, device=lo.device) for size in (k_size, q_size))
    meet = (start + NEAR - 1 >= lows.amin(2)) & (start <= highs.amax(2))
    from_, to = torch.where(meet, at[:, None], q_size), torch.where(meet, at[:, None] + NEAR, 0)
    queries = torch.stack([from_.amin(1), to.amax(1)], -1).flatten(1)
    pitch = max(q_size, k_size)
    flat = lambda t, width=pitch: F.pad(t, (0, width - t.shape[1])).flatten()
    real = numbers.new_empty(0, dtype=torch.bool) if real is None else flat(real)
    number = torch.zeros_like(q_len) + (pitch if lo.shape[0] > 1 else 0)
    rest = flat(lo), flat(hi), number, tables, flat(queries, pitch // NEAR * 2)
    lo, hi, number, tables, queries = (t.to(torch.int32) for t in rest)
    return Blocks(lo, hi, real, number, tables, queries)


@functools.cache
def _compiled_build(*variant):
    """_build compiled for one variant of its arguments. The copied code keeps a cache of its own:
    the variants of a long process would together pass torch.compile's limit, which is an error."""
    run = types.FunctionType(_build.__code__.replace(co_name="blocks"), _build.__globals__)
    return torch.compile(run, dynamic=True, fullgraph=True)


def _padded_size(size):
    """In whole blocks, two at least. Without max: a hit in torch.compile's caches evaluates the guards
    kept there as Python, whose max takes a side, and a length on the other side is a graph more."""
    blocks = (size + BLOCK - 1) // BLOCK
    return (blocks + 2 // (blocks + 1)) * BLOCK


@torch.library.custom_op("flex_attn::blocks", mutates_args=())
def _blocks(
    like: Tensor,
    q_len: int,
    k_len: int,
    offset: int | None,
    offset_tensor: Tensor | None,
    window: int,
    ids: Tensor | None,
    real: Tensor | None,
    causal: bool,
) -> list[Tensor]:
    """Blocks on like's device; an operator: a compiled caller neither inlines it nor breaks."""
    full = functools.partial(torch.full, (), dtype=torch.int64, device=like.device)
    at = full(offset) if offset_tensor is None else offset_tensor.to(torch.int64).reshape(())
    numbers = torch.stack([full(q_len), full(k_len), at, full(window)])
    q_size, k_size = _padded_size(q_len), _padded_size(k_len)
    if ids is not None:
        ids = F.pad((ids if ids.ndim == 2 else ids[None]).long(), (0, k_size - k_len))
    if real is not None:
        real = F.pad(real, (0, k_size - k_len)).clone()
    below = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    rows = tuple(0 if t is None else min(len(t), 2) for t in (ids, real))
    build = _compiled_build(causal, rows, q_size == k_size, like.device)
    # as in a compiled caller: one graph for both
    with COMPILING, torch.no_grad(), torch._C._ExcludeDispatchKeyGuard(below):
        return list(build(numbers, ids, real, q_size, k_size, causal))


@_blocks.register_fake
def _(like, q_len, k_len, offset, offset_tensor, window, ids, real, causal):
    q_size, k_size = _padded_size(q_len), _padded_size(k_len)
    batch = ids.shape[0] if ids is not None and ids.ndim == 2 else 1
    batch = batch if real is None else real.shape[0]
    n, m = q_size // BLOCK, k_size // BLOCK
    rows = batch * max(q_size, k_size)
    sizes = (rows,), (rows,), (0 if real is None else rows,), ()
    sizes = *sizes, (batch * (2 * n + 2 * m + 4 * n * m) + 1,), (rows // NEAR * 2,)
    dtypes = torch.int32, torch.int32, torch.bool, torch.int32, torch.int32, torch.int32
    return [like.new_empty(size, dtype=t) for size, t in zip(sizes, dtypes, strict=True)]


PLAIN = {}  # Blocks of masks without tensors, shared by all Masks


def _lower(mask, q, k):
    """Blocks for q and k [B, H, S, D], kept in the mask (without tensors: for all masks)."""
    q_len, k_len, device = q.shape[2], k.shape[2], q.device
    offset = k_len - q_len if mask.offset is None else mask.offset

    def make():
        given = (None, offset) if isinstance(offset, Tensor) else (offset, None)
        window = FAR if mask.window is None else mask.window
        ids, real = mask.doc_ids, mask.padding
        blocks = Blocks(*_blocks(q, q_len, k_len, *given, window, ids, real, mask.causal))
        if _tracing():
            return blocks
        if device.type != "cpu":
            _mark_dynamic(*blocks)
            return blocks
        _mark_dynamic(blocks.tables)
        # inductor's C++ kernel mixes up the names of the other sizes: make them constants, rounded
        fixed = [F.pad(t, (0, _rounded(t.numel()) - t.numel())) for t in blocks[:3]]
        return Blocks(*fixed, *blocks[3:])

    if mask._blocks is not None:
        return mask._blocks
    if _tracing():
        return make()
    if mask.doc_ids is None and mask.padding is None and not isinstance(offset, Tensor):
        key = ("blocks", q_len, k_len, offset, mask.window, mask.causal, _place(device))
        return _kept(PLAIN, key, make, most=16)
    return _kept(mask._memo, ("blocks", q_len, k_len, _place(device)), make, most=8)


def _rounded(size):
    return 0 if size == 0 else max(2**16, 2 ** (size - 1).bit_length())


def _softcapped(score, softcap):
    """softcap * tanh(score / softcap), by a sigmoid: its code and its gradient are shorter."""
    return softcap * (2 * torch.sigmoid(score * (2 / softcap)) - 1)


def _flex(q, k, v, blocks, *, kind, scale, softcap, options, inside, per_row, padded):
    """FlexAttention on lengths that are multiples of BLOCK; traced, never run as it is. With
    `inside` tensors come as [B, S, H, D]: gradients then have the layout that autograd expects."""
    if inside:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    lo, hi, real, pitch, tables, _ = blocks
    if kind == "causal":
        mask_mod = lambda b, h, i, j: j <= i
    elif padded:

        def mask_mod(b, h, i, j):
            row = b * pitch + i
            return (j >= lo[row]) & (j <= hi[row]) & real[b * pitch + j]
    else:

        def mask_mod(b, h, i, j):
            row = b * pitch + i
            return (j >= lo[row]) & (j <= hi[row])

    score_mod = None
    if softcap is not None:
        score_mod = lambda score, b, h, i, j: _softcapped(score, softcap)
    batch, n, m = q.shape[0] if per_row else 1, q.shape[2] // BLOCK, k.shape[2] // BLOCK
    shapes = [(batch, 1, n), (batch, 1, n, m)] * 2 + [(batch, 1, m), (batch, 1, m, n)] * 2
    parts = tables[:-1].split([math.prod(shape) for shape in shapes])
    parts = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    if q.device.type == "cpu":  # inductor's C++ kernel needs each table in a buffer of its own
        parts = [part + tables[-1] for part in parts]
    block_mask = BlockMask((q.shape[2], k.shape[2]), *parts, (BLOCK, BLOCK), mask_mod)
    out = flex_attention(
        q,
        k,
        v,
        score_mod=score_mod,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=guard_scalar(q.shape[1] != k.shape[1]),
        kernel_options=dict(options),
    )
    return out.transpose(1, 2) if inside else out


FLEX_CONSTANTS = ("kind", "scale", "softcap", "options", "inside", "per_row", "padded")


@functools.cache
def _compiled_flex(name, *key):
    """_flex compiled for these constants (as arguments, torch.compile would make symbols of them).
    The copied code keeps a cache and a name of its own in torch.compile's logs."""
    given = dict(zip(FLEX_CONSTANTS, key, strict=False))
    constant = torch.compiler.assume_constant_result(lambda which: given[which])

    def run(q, k, v, blocks):
        return _flex(q, k, v, blocks, **{which: constant(which) for which in FLEX_CONSTANTS})

    run.__code__ = run.__code__.replace(co_name=name)
    return torch.compile(run, fullgraph=True)


@torch.compiler.assume_constant_result
def _capability(index):
    return torch.cuda.get_device_capability(index)


def _wants_grad(q, k, v):
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def _numbers(scale, softcap):
    """As constants: a number that came as an argument is a symbol in a traced caller."""
    if not _tracing():
        return scale, softcap
    return guard_scalar(scale), None if softcap is None else guard_scalar(softcap)


def _kind(mask, q, k):
    """Which of the two masks of FlexAttention: without data, or rows of data."""
    plain = mask.causal and mask.plain and q.shape[2] == k.shape[2]
    return "causal" if plain else "rows"


def _tiles_key(kind, dim, device, softcap):
    size = next((size for size in (64, 128, 256) if dim <= size), None)
    return _capability(device.index), size, kind if softcap is None else "softcap"


def _options(kind, dim, dtype, device, softcap):
    """FlexAttention's kernel_options. Lengths are padded, so no kernel checks bounds."""
    if device.type != "cuda":
        return ()
    options = {"IS_DIVISIBLE": True}
    if kind == "causal":  # one partial block and those before it; else holes are possible
        options["BLOCKS_ARE_CONTIGUOUS"] = True
    if dtype in HALF:
        key = _tiles_key(kind, dim, device, softcap)
        if key in TUNED:
            options |= _tile_options(TUNED[key], dim == key[1])
    return tuple(options.items())


def _tile_options(tiles, whole=True):
    names = ("fwd_BLOCK_M", "fwd_BLOCK_N", "fwd_num_warps", "fwd_num_stages")
    options = dict(zip(names, tiles.forward, strict=True))
    names = ("BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2", "num_warps", "num_stages")
    options |= dict(zip(("bwd_" + name for name in names), tiles.backward, strict=True))
    options["fwd_USE_TMA"] = tiles.tma and whole
    options["fwd_PRESCALE_QK"] = tiles.prescale
    return options


def _run_flex(q, k, v, mask, scale, softcap):
    q_len, k_len, dim = q.shape[2], k.shape[2], q.shape[3]
    kind, blocks = _kind(mask, q, k), _lower(mask, q, k)
    options = _options(kind, dim, q.dtype, q.device, softcap)
    inside = q.stride(1) < q.stride(2)  # a token's heads lie together, as projections leave them
    if inside:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    axis = 1 if inside else 2
    longer = lambda t, n: F.pad(t, (0, 0) * (3 - axis) + (0, n)) if n else t.view(t.shape)
    q = longer(q, _padded_size(q_len) - q_len)
    k, v = (longer(t, _padded_size(k_len) - k_len) for t in (k, v))
    padded = mask.padding is not None
    per_row = padded or (mask.doc_ids is not None and mask.doc_ids.ndim == 2)
    per_row = per_row and q.shape[0] > 1
    scale, softcap = _numbers(scale, softcap)
    constants = (kind, scale, softcap, options, inside, per_row, padded)
    if _tracing():
        out = _flex(q, k, v, blocks, **dict(zip(FLEX_CONSTANTS, constants, strict=True)))
    else:
        for t in (q, k, v):
            torch._dynamo.maybe_mark_dynamic(t, (0, axis))
        name = f"flex_{kind}" + "_padded" * padded + "_softcap" * (softcap is not None)
        heads = q.shape[3 - axis], k.shape[3 - axis], dim
        grad = _wants_grad(q, k, v)
        variant = (q.dtype, q.device, heads, grad, q.shape[0] == 1, q_len == k_len)
        with COMPILING:
            out = _compiled_flex(name, *constants, *variant)(q, k, v, blocks)
    if out.shape[axis] != q_len:  # (a slice copies its gradient)
        out = out.narrow(axis, 0, q_len)
    return out.transpose(1, 2) if inside else out


# --------------------------------------------------------------------------------------------------
# The same intervals in Triton kernels of our own, for Hopper
#
# Forward as in FlashAttention (arXiv 2205.14135). Backward in two kernels, one for dQ, one for dK
# and dV, which both compute the scores: 7 products and not 5, but adding dQ up in memory took twice
# as long (3.9 ms for the second kernel instead of 1.9). What they gain over FlexAttention: one loop
# over all queries and all heads that share keys, so that its pipeline fills once; two programs on a
# multiprocessor; loads by TMA, which bounds them too, so that no length needs padding; masks only
# in blocks that need one. No atomics: the same bits every time. All three take the same numbers and
# constants, used or not.


SPAN = tl.constexpr(NEAR)
NUMBERS = ["pitch", "q_len", "width"]
POINTERS = ["lo_ptr", "hi_ptr", "real_ptr", "queries_ptr"]


@triton.jit
def _tanh(x, inner):
    return 1 - 2 / (tl.math.exp2(x * inner) + 1)  # inner: 2 log2(e) times the argument's own factor


@triton.jit
def _sees(keys, rows, low, high, real_ptr, CAUSAL: tl.constexpr, PADDED: tl.constexpr):
    """Which scores count: keys against rows, or against low and high, the keys that a row sees."""
    if CAUSAL:
        return keys <= rows
    inside = (keys >= low) & (keys <= high)
    if PADDED:
        inside = inside & (tl.load(real_ptr + keys) != 0)
    return inside


@triton.jit
def _queries(lo_ptr, hi_ptr, pitch, HEADS: tl.constexpr, M: tl.constexpr, CAUSAL: tl.constexpr):
    """The M queries of a program: sequence, head, the first, all, the keys they see from and to."""
    b, h = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    block = tl.program_id(1)
    if CAUSAL:  # the longest first
        block = tl.num_programs(1) - 1 - block
    m0 = block * M
    rows = m0 + tl.arange(0, M)
    low, high = rows, rows
    if not CAUSAL:
        low, high = tl.load(lo_ptr + b * pitch + rows), tl.load(hi_ptr + b * pitch + rows)
    return b, h, m0, rows, low, high


@triton.jit
def _blocks_of_keys(m0, low, high, q_len, M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr):
    """The blocks of N keys that rows m0 to m0 + M see: the first, how many, the keys all see."""
    if CAUSAL:
        return 0, tl.cdiv(tl.minimum(m0 + M, q_len), N), 0, m0
    first = tl.min(low) // N
    return first, tl.maximum(tl.cdiv(tl.max(high) + 1, N) - first, 0), tl.max(low), tl.min(high)


@triton.jit
def _only_seen(x, other, n0, rows, low, high, some, every, real_ptr, N: tl.constexpr,
               CAUSAL: tl.constexpr, PADDED: tl.constexpr):  # fmt: skip
    """x [M, N] with `other` where a row does not see the key; as it is in a block that all see."""
    if PADDED | (n0 < some) | (n0 + N - 1 > every):
        keys, lows, highs = (n0 + tl.arange(0, N))[None, :], low[:, None], high[:, None]
        seen = _sees(keys, rows[:, None], lows, highs, real_ptr, CAUSAL, PADDED)
        x = tl.where(seen, x, other)
    return x


# fmt: off
# What is not specialized may differ between calls of one compiled kernel: see _launch.
@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=POINTERS)
def _forward_kernel(q_desc, out_desc, k_desc, v_desc, lse_ptr, lo_ptr, hi_ptr, real_ptr,
                    queries_ptr, pitch, q_len, width, scale, factor, inner,
                    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
                    CAUSAL: tl.constexpr, PADDED: tl.constexpr, CAP: tl.constexpr,
                    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr):
    # out and the logsumexp of the scores (base 2) for M queries of a head. A score is `factor` (it
    # has log2(e) in it) times q k^T, or times tanh(inner q k^T).
    b, h, m0, rows, low, high = _queries(lo_ptr, hi_ptr, pitch, HEADS, M, CAUSAL)
    if PADDED:
        real_ptr += b * pitch
    first, count, some, every = _blocks_of_keys(m0, low, high, q_len, M, N, CAUSAL)
    q = q_desc.load([b, h, m0, 0]).reshape([M, DIM])
    total = tl.zeros([M], tl.float32)
    top = tl.full([M], -float("inf"), tl.float32)
    sums = tl.zeros([M, DIM], tl.float32)
    for j in tl.range(0, count, num_stages=STAGES):
        n0 = (first + j) * N
        k = k_desc.load([b, h // GROUP, n0, 0]).reshape([N, DIM])
        v = v_desc.load([b, h // GROUP, n0, 0]).reshape([N, DIM])
        s = tl.dot(q, k.T)
        if CAP:
            s = _tanh(s, inner)
        s = _only_seen(s, -float("inf"), n0, rows, low, high, some, every, real_ptr,
                       N, CAUSAL, PADDED)
        new = tl.maximum(top, tl.max(s, 1) * factor)
        base = tl.where(new == -float("inf"), 0.0, new)
        p = tl.math.exp2(s * factor - base[:, None])
        shrink = tl.math.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        sums = tl.dot(p.to(v.dtype), v, sums * shrink[:, None])
        top = new
    empty = total == 0
    out = sums / tl.where(empty, 1.0, total)[:, None]
    out_desc.store([b, h, m0, 0], out.to(out_desc.dtype).reshape([1, 1, M, DIM]))
    at = tl.program_id(0).to(tl.int64) * width + rows
    lse = tl.where(empty, -float("inf"), top + tl.math.log2(total))
    tl.store(lse_ptr + at, lse, mask=rows < width)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=POINTERS)
def _dq_kernel(q_desc, out_desc, dout_desc, dq_desc, k_desc, v_desc, lse_ptr, delta_ptr,
               lo_ptr, hi_ptr, real_ptr, queries_ptr, pitch, q_len, width,
               scale, factor, inner,
               HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
               CAUSAL: tl.constexpr, PADDED: tl.constexpr, CAP: tl.constexpr,
               M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr):
    # dq for M queries of a head, and delta = sum(out * dout) for the other kernel.
    b, h, m0, rows, low, high = _queries(lo_ptr, hi_ptr, pitch, HEADS, M, CAUSAL)
    if PADDED:
        real_ptr += b * pitch
    first, count, some, every = _blocks_of_keys(m0, low, high, q_len, M, N, CAUSAL)
    dout = dout_desc.load([b, h, m0, 0]).reshape([M, DIM])
    out = out_desc.load([b, h, m0, 0]).reshape([M, DIM])
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    at = tl.program_id(0).to(tl.int64) * width + rows
    tl.store(delta_ptr + at, delta, mask=rows < width)
    q = q_desc.load([b, h, m0, 0]).reshape([M, DIM])
    lse = tl.load(lse_ptr + at, mask=rows < width, other=0.0)
    sums = tl.zeros([M, DIM], tl.float32)
    for j in tl.range(0, count, num_stages=STAGES):
        n0 = (first + j) * N
        k = k_desc.load([b, h // GROUP, n0, 0]).reshape([N, DIM])
        v = v_desc.load([b, h // GROUP, n0, 0]).reshape([N, DIM])
        s = tl.dot(q, k.T)
        dp = tl.dot(dout, v.T)
        if CAP:
            s = _tanh(s, inner)
        p = tl.math.exp2(s * factor - lse[:, None])
        p = _only_seen(p, 0.0, n0, rows, low, high, some, every, real_ptr, N, CAUSAL, PADDED)
        ds = p * (dp - delta[:, None])
        if CAP:
            ds = ds * (1 - s * s)
        sums = tl.dot(ds.to(k.dtype), k, sums)
    dq_desc.store([b, h, m0, 0], (sums * scale).to(dq_desc.dtype).reshape([1, 1, M, DIM]))


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=POINTERS)
def _dkv_kernel(q_desc, dout_desc, k_desc, v_desc, dk_desc, dv_desc, lse_desc, delta_desc,
                lo_desc, hi_desc, real_ptr, queries_ptr, pitch, q_len, width,
                scale, factor, inner,
                HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
                CAUSAL: tl.constexpr, PADDED: tl.constexpr, CAP: tl.constexpr,
                M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr):
    # dk and dv for N keys, over all queries that see them in all heads of the group. lse, delta, lo
    # and hi come by TMA: addresses for each thread were a sixth of the loop's instructions.
    KV_HEADS: tl.constexpr = HEADS // GROUP
    b, h_kv = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    n0 = tl.program_id(1) * N
    keys = (n0 + tl.arange(0, N))[:, None]
    if PADDED:
        real_ptr += b * pitch
    if CAUSAL:
        start, end = n0, q_len
    else:
        start, end = q_len, 0
        for part in tl.static_range(N // SPAN):
            pair = queries_ptr + ((b * pitch + n0) // SPAN + part) * 2
            start, end = tl.minimum(start, tl.load(pair)), tl.maximum(end, tl.load(pair + 1))
    first = start // M
    count = tl.maximum(tl.cdiv(tl.minimum(end, q_len), M) - first, 0)
    row = tl.minimum(b * pitch, b)  # of lo and hi
    k = k_desc.load([b, h_kv, n0, 0]).reshape([N, DIM])
    v = v_desc.load([b, h_kv, n0, 0]).reshape([N, DIM])
    dk = tl.zeros([N, DIM], tl.float32)
    dv = tl.zeros([N, DIM], tl.float32)
    h, m0 = h_kv * GROUP, first * M
    for _ in tl.range(0, GROUP * count, num_stages=STAGES):
        q = q_desc.load([b, h, m0, 0]).reshape([M, DIM])
        dout = dout_desc.load([b, h, m0, 0]).reshape([M, DIM])
        lse = lse_desc.load([b * HEADS + h, m0]).reshape([M])
        delta = delta_desc.load([b * HEADS + h, m0]).reshape([M])
        s = tl.dot(k, q.T)  # [keys, queries]: p is then the operand of the next product as it lies
        dp = tl.dot(v, dout.T)
        if CAP:
            s = _tanh(s, inner)
        p = tl.math.exp2(s * factor - lse[None, :])
        rows = m0 + tl.arange(0, M)
        low, high = rows, rows
        if not CAUSAL:
            low, high = lo_desc.load([row, m0]).reshape([M]), hi_desc.load([row, m0]).reshape([M])
        lows, highs = low[None, :], high[None, :]
        p = tl.where(_sees(keys, rows[None, :], lows, highs, real_ptr, CAUSAL, PADDED), p, 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv)
        ds = p * (dp - delta[None, :])
        if CAP:
            ds = ds * (1 - s * s)
        dk = tl.dot(ds.to(q.dtype), q, dk)
        last = h % GROUP == GROUP - 1
        h, m0 = tl.where(last, h - GROUP + 1, h + 1), tl.where(last, m0 + M, m0)
    dk_desc.store([b, h_kv, n0, 0], (dk * scale).to(dk_desc.dtype).reshape([1, 1, N, DIM]))
    dv_desc.store([b, h_kv, n0, 0], dv.to(dv_desc.dtype).reshape([1, 1, N, DIM]))
# fmt: on


class Plan(NamedTuple):
    """Queries, keys, warps and stages of the kernels for out, for dQ, and for dK and dV."""

    forward: tuple[int, int, int, int]
    dq: tuple[int, int, int, int]
    dkv: tuple[int, int, int, int]


# By head size up to, and whether the mask is plain causal: of 6 to 9 variants a kernel on an H200,
# shapes as for TUNED. Milliseconds forward + backward of the device alone: causal 128: 1.25 + 3.62,
# 64: 0.72 + 2.00, 256: 1.22 + 5.42; documents of 512, 128: 0.25 + 0.65, 64: 0.14 + 0.37, 256: 0.25
# + 1.00. A window of 1024 at 128 would gain 3% by (128, 32, 8, 3) for dQ, documents lose as much.
PLANS = {
    (64, True): Plan((64, 128, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3)),
    (64, False): Plan((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3)),
    (128, True): Plan((64, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 2)),
    (128, False): Plan((64, 64, 4, 3), (64, 32, 4, 2), (64, 64, 4, 2)),
    (256, True): Plan((128, 64, 8, 2), (64, 32, 4, 3), (64, 64, 8, 2)),
    (256, False): Plan((128, 64, 8, 2), (64, 32, 4, 3), (64, 64, 8, 2)),
}


def _plan(dim, causal):
    return next(plan for (size, kind), plan in PLANS.items() if dim <= size and kind == causal)


def _same_order(t):
    """A new tensor of t's shape [B, H, S, D], a token's heads lying together if t's do."""
    order = (0, 2, 1, 3) if t.stride(1) < t.stride(2) else (0, 1, 2, 3)
    return torch.empty_permuted(t.shape, order, dtype=t.dtype, device=t.device)


def _for_tma(t):
    """t, copied if TMA cannot read it: addresses and strides are to be multiples of 16 bytes."""
    batch, head, token, last = t.stride()
    ok = last == 1 and min(batch, head, token) > 0
    ok = ok and ((batch | head | token) * t.element_size() | t.data_ptr()) % 16 == 0
    return t if ok else t.clone(memory_format=torch.contiguous_format)


def _descriptor(t, block):
    """TMA's view of t in blocks of that shape, zeros past the ends. Made without TensorDescriptor's
    own checks, which _for_tma has done: they take 4 of 6 us."""
    made = TensorDescriptor.__new__(TensorDescriptor)
    made.base, made.shape, made.strides, made.block_shape = t, t.shape, t.stride(), block
    return made


def _width(q_len):
    """Of a head's row of lse and delta: a multiple of 4, for TMA."""
    return -(-q_len // 4) * 4


def _lse_like(q):
    """For the logsumexp (base 2) of the scores: float32 [B, H, S_q, rounded up to 4]."""
    return q.new_empty((*q.shape[:2], _width(q.shape[2])), dtype=torch.float32)


KERNELS = {}  # compiled, by all that they are compiled for


def _launch(kernel, tiles, programs, by_query, by_key, more, numbers, flags):
    """Run a kernel with `tiles`. programs: how many, by head and block; by_query, by_key: what goes
    by descriptor, in blocks of tiles' queries and keys; then its other arguments."""
    m, n, warps, stages = tiles
    wide = flags[2]
    args = [_descriptor(t, [1, 1, m, wide]) for t in by_query]
    args += [_descriptor(t, [1, 1, n, wide]) for t in by_key]
    args += *more, *numbers, *flags, m, n, stages
    key = kernel.fn, tiles, by_query[0].dtype, by_query[0].device, flags
    made = KERNELS.get(key)
    if made is not None:  # Triton's own look-up takes longer than all else here
        made[programs](*args)
    else:  # (its interpreter returns nothing)
        KERNELS[key] = kernel[programs](*args, num_warps=warps, num_stages=stages)


def _programs(t, rows):
    """One for each `rows` positions of each head of t [B, H, S, D]."""
    return t.shape[0] * t.shape[1], -(-t.shape[2] // rows), 1


def _arguments(q, k, lo, hi, real, queries, scale, softcap):
    """What all kernels take after their descriptors: (the mask, numbers), and their constants."""
    batch, heads, q_len, dim = q.shape
    kv_heads, k_len = k.shape[1:3]
    real = None if real is None or real.numel() == 0 else real.view(torch.uint8)
    pitch = 0  # of a sequence's row in lo and its like, if each has one
    if lo is not None:
        size = max(_padded_size(q_len), _padded_size(k_len))
        ok = lo.numel() in (size, batch * size)
        _need(ok, "mask", "one for other lengths", f"{q_len} queries and {k_len} keys")
        lo, hi = lo.view(-1, size), hi.view(-1, size)
        pitch = 0 if lo.shape[0] == 1 else size
    factor, inner = scale * LOG2E, 1.0
    if softcap is not None:
        factor, inner = softcap * LOG2E, 2 * LOG2E * scale / softcap
    wide = 1 << (dim - 1).bit_length()  # Triton's blocks are powers of 2
    flags = heads, heads // kv_heads, wide, lo is None, real is not None
    numbers = lo, hi, real, queries, pitch, q_len, _width(q_len), scale, factor, inner
    return numbers, (*flags, softcap is not None)


def _run_forward(q, k, v, lo, hi, real, scale, softcap):
    out, lse = _same_order(q), _lse_like(q)
    q, k, v = map(_for_tma, (q, k, v))
    tiles = _plan(q.shape[3], lo is None).forward
    arguments = _arguments(q, k, lo, hi, real, None, scale, softcap)
    by_query = _programs(q, tiles[0])
    with torch.cuda.device_of(q):
        _launch(_forward_kernel, tiles, by_query, (q, out), (k, v), (lse,), *arguments)
    return out, lse


def _run_backward(dout, q, k, v, out, lse, lo, hi, real, queries, scale, softcap):
    dq, dk, dv = grads = tuple(map(_same_order, (q, k, v)))
    dout, out, q, k, v = map(_for_tma, (dout, out, q, k, v))
    dq_tiles, dkv_tiles = _plan(q.shape[3], lo is None)[1:]
    numbers, flags = _arguments(q, k, lo, hi, real, queries, scale, softcap)
    rows = [t.view(-1, lse.shape[2]) for t in (lse, torch.empty_like(lse))]
    views = [t if t is None else _descriptor(t, [1, dkv_tiles[0]]) for t in (*rows, *numbers[:2])]
    by_query, by_key = _programs(q, dq_tiles[0]), _programs(k, dkv_tiles[1])
    with torch.cuda.device_of(q):
        ends = (q, out, dout, dq), (k, v)
        _launch(_dq_kernel, dq_tiles, by_query, *ends, rows, numbers, flags)
        ends = (q, dout), (k, v, dk, dv)  # lo and hi, the first of the numbers, go by descriptor
        _launch(_dkv_kernel, dkv_tiles, by_key, *ends, views, numbers[2:], flags)
    return grads


@torch.library.custom_op("flex_attn::forward", mutates_args=(), device_types="cuda")
def _triton_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    real: Tensor | None,
    queries: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, S_q, D], logsumexp as _lse_like) with Blocks' parts, or, all None, causal. An
    operator, so that a compiled caller takes it as it is."""
    return _run_forward(q, k, v, lo, hi, real, scale, softcap)


@_triton_forward.register_fake
def _(q, k, v, lo, hi, real, queries, scale, softcap):
    return _same_order(q), _lse_like(q)


@torch.library.custom_op("flex_attn::backward", mutates_args=(), device_types="cuda")
def _triton_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    real: Tensor | None,
    queries: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _run_backward(dout, q, k, v, out, lse, lo, hi, real, queries, scale, softcap)


@_triton_backward.register_fake
def _(dout, q, k, v, out, lse, lo, hi, real, queries, scale, softcap):
    return _same_order(q), _same_order(k), _same_order(v)


def _save(ctx, inputs, output):
    q, k, v, lo, hi, real, queries, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(q, k, v, *output, lo, hi, real, queries)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, _, run=_triton_backward):
    if dout is None:  # a later function had no gradient to give
        return (None,) * 9
    grads = run(dout, *ctx.saved_tensors, ctx.scale, ctx.softcap)
    return *grads, None, None, None, None, None, None


_triton_forward.register_autograd(_backward, setup_context=_save)


class _Triton(torch.autograd.Function):
    """The same outside torch.compile: an operator would take 130 us more on the host."""

    @staticmethod
    def forward(ctx, *inputs):
        q, k, v, lo, hi, real, _, scale, softcap = inputs
        output = _run_forward(q, k, v, lo, hi, real, scale, softcap)
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        return _backward(ctx, dout, None, _run_backward)


def _run_triton(q, k, v, mask, scale, softcap):
    lo = hi = real = queries = None
    if _kind(mask, q, k) == "rows":
        lo, hi, real, _, _, queries = _lower(mask, q, k)
    given = q, k, v, lo, hi, real, queries, *_numbers(scale, softcap)
    return _triton_forward(*given)[0] if _tracing() else _Triton.apply(*given)


# --------------------------------------------------------------------------------------------------
# Kernels that take cumulative lengths (varlen, flash-attn, xformers), and SDPA


class Segments(NamedTuple):
    """A batch as one row of tokens: documents or sequences one after another, no padding."""

    q_lens: list[int]
    k_lens: list[int]
    cu_q: Tensor  # int32 [segments + 1]
    cu_k: Tensor
    q_index: Tensor | None  # int64: where the kept tokens stand in [B * S]; None: all are kept
    k_index: Tensor | None


def _segments(mask, q, k):
    batch, q_len, k_len, device = q.shape[0], q.shape[2], k.shape[2], q.device

    def make():
        q_index = k_index = None
        if mask.doc_ids is None and mask.padding is None:
            q_lens, k_lens = [q_len] * batch, [k_len] * batch
        else:
            shape = batch, k_len
            real = torch.ones(shape, dtype=torch.bool, device=device)
            new = torch.zeros(shape, dtype=torch.bool, device=device)
            new[:, 0] = True
            if mask.doc_ids is not None:
                ids = mask.doc_ids.expand(shape)
                new[:, 1:] = ids[:, 1:] != ids[:, :-1]
            if mask.padding is not None:
                real = mask.padding
            segment = new.flatten().cumsum(0) - 1
            queries = real.clone()
            queries[:, : k_len - q_len] = False
            count = lambda kept: torch.bincount(
                segment[kept.flatten()], minlength=int(segment[-1]) + 1
            ).tolist()
            q_lens, k_lens = count(queries), count(real)
            if mask.padding is not None:
                k_index = real.flatten().nonzero()[:, 0]
                q_index = real[:, k_len - q_len :].flatten().nonzero()[:, 0]
            pairs = [pair for pair in zip(q_lens, k_lens, strict=True) if pair[0]]
            if k_lens and len(pairs) < len(q_lens):  # documents before the first query
                kept = torch.tensor([length > 0 for length in q_lens], device=device)
                k_index = (real.flatten() & kept[segment]).nonzero()[:, 0]
            q_lens, k_lens = [p[0] for p in pairs], [p[1] for p in pairs]
        cu = lambda lens: torch.tensor(
            [0, *itertools.accumulate(lens)], dtype=torch.int32, device=device
        )
        return Segments(q_lens, k_lens, cu(q_lens), cu(k_lens), q_index, k_index)

    return _kept(mask._memo, ("segments", batch, q_len, k_len, _place(device)), make, most=8)


def _with_segments(run, q, k, v, mask):
    """run(q, k, v [tokens, H, D], segments) put back into [B, H, S, D], zero where padding was."""
    segments = _segments(mask, q, k)
    batch, heads, q_len, dim = q.shape
    rows = lambda t: t.transpose(1, 2).reshape(-1, t.shape[1], dim)
    q, k, v = rows(q), rows(k), rows(v)
    if segments.k_index is not None:
        k, v = k[segments.k_index], v[segments.k_index]
    if segments.q_index is not None:
        zeros = q.new_zeros(q.shape)
        if segments.q_lens:
            out = zeros.index_copy(0, segments.q_index, run(q[segments.q_index], k, v, segments))
        else:  # all is padding: sums of nothing give the three their gradients, zeros
            out = zeros + sum(t[:0].sum() for t in (q, k, v))
    else:
        out = run(q, k, v, segments)
    return out.view(batch, q_len, heads, dim).transpose(1, 2)


def _sides(mask, none):
    """A window as the keys seen to the left and right."""
    right = 0 if mask.causal else none
    if mask.window is None:
        return none, right
    return mask.window - 1, 0 if mask.causal else mask.window - 1


@functools.cache
def _varlen():
    """torch's varlen_attn and whether it takes enable_gqa; else flash-attn's; else None and why."""
    try:
        from torch.nn.attention.varlen import varlen_attn

        names = inspect.signature(varlen_attn).parameters
        if "window_size" in names:
            return varlen_attn, "enable_gqa" in names
    except ImportError:
        pass
    version, _, flash = _flash()
    if version != 2:
        return None, "neither torch's varlen_attn with windows nor flash-attn 2 is here"
    return lambda q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size: flash(
        *(q, k, v, cu_q, cu_k, max_q, max_k),
        softmax_scale=scale,
        causal=window_size[1] == 0,
        window_size=window_size,
    ), False


def _run_varlen(q, k, v, mask, scale, softcap):
    function, flag = _varlen()
    more = {"enable_gqa": True} if flag and q.shape[1] != k.shape[1] else {}

    def run(q, k, v, s):
        most = max(s.q_lens), max(s.k_lens)
        window = _sides(mask, -1)
        return function(q, k, v, s.cu_q, s.cu_k, *most, scale=scale, window_size=window, **more)

    return _with_segments(run, q, k, v, mask)


@functools.cache
def _flash():
    """(version, flash_attn_func, flash_attn_varlen_func), or (0, the reason, None)."""
    for version, name in ((2, "flash_attn.flash_attn_interface"), (4, "flash_attn.cute")):
        try:
            module = importlib.import_module(name)
            return version, module.flash_attn_func, module.flash_attn_varlen_func
        except (ImportError, AttributeError, OSError):
            continue
    return 0, "flash-attn (2 or 4) is not installed", None


def _run_flash_attn(q, k, v, mask, scale, softcap):
    version, dense, varlen = _flash()
    none = -1 if version == 2 else None
    window = (none, none) if mask.window is None else _sides(mask, none)
    options = {"softmax_scale": scale, "causal": mask.causal, "window_size": window}
    if softcap is not None:
        options["softcap"] = softcap
    first = lambda out: out[0] if isinstance(out, tuple) else out
    if mask.doc_ids is None and mask.padding is None:
        out = first(dense(*(t.transpose(1, 2) for t in (q, k, v)), **options))
        return out.transpose(1, 2)

    def run(q, k, v, s):
        lengths = {"max_seqlen_q": max(s.q_lens), "max_seqlen_k": max(s.k_lens)}
        cu = {"cu_seqlens_q": s.cu_q, "cu_seqlens_k": s.cu_k}
        return first(varlen(q, k, v, **cu, **lengths, **options))

    return _with_segments(run, q, k, v, mask)


@functools.cache
def _xformers():
    """(xformers.ops.fmha, its attn_bias), or (None, the reason)."""
    try:
        fmha = importlib.import_module("xformers.ops.fmha")
        if not any(op.is_available() for op in (fmha.flash.FwOp, fmha.cutlass.FwOp)):
            return None, "this xformers was built for another torch or without CUDA"
        return fmha, importlib.import_module("xformers.ops.fmha.attn_bias")
    except (ImportError, AttributeError, OSError):
        return None, "xformers is not installed"


def _run_xformers(q, k, v, mask, scale, softcap):
    fmha, bias = _xformers()
    k, v = _repeated(q, k, v)

    def run(q, k, v, s):
        blocks = bias.BlockDiagonalMask.from_seqlens(s.q_lens, s.k_lens)
        if mask.window is not None:
            blocks = blocks.make_local_attention_from_bottomright(mask.window)
        elif mask.causal:
            blocks = blocks.make_causal_from_bottomright()
        rows = (t[None] for t in (q, k, v))
        return fmha.memory_efficient_attention(*rows, attn_bias=blocks, scale=scale)[0]

    return _with_segments(run, q, k, v, mask)


def _needs_dense(q, k, mask):
    """Whether SDPA needs the mask as a tensor: its is_causal counts from the first key."""
    q_len, k_len = q.shape[2], k.shape[2]
    return not mask.plain or (mask.causal and q_len != 1 and q_len != k_len)


def _run_sdpa(q, k, v, mask, scale, softcap, kernel=None):
    grouped = guard_scalar(q.shape[1] != k.shape[1])
    dense = empty = None
    if _needs_dense(q, k, mask):
        if mask._dense is not None:
            dense = mask._dense
        elif _tracing() or mask.plain:
            dense = dense_mask(mask, q, k)
        else:
            key = ("dense", q.shape[2], k.shape[2], _place(q.device))
            dense = _kept(mask._memo, key, lambda: dense_mask(mask, q, k), most=2)
        # Rows without a key are NaN in some kernels: let them see all, and zero them afterwards
        if mask.padding is not None or mask.offset is not None or q.shape[2] > k.shape[2]:
            empty = ~dense.any(-1, True)
            dense = dense | empty
    kernels = [SDPA[kernel]] if kernel else []
    if q.is_cuda and dense is not None and not kernel:
        # cuDNN's gradients with a mask are wrong by a third inside torch.compile (torch 2.11 on an
        # H200), and NaN at lengths of 128 n + 64 (pytorch issue 196678)
        kernels = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    # memory-efficient takes no grouped heads; before sm_80 it is what torch chooses
    efficient = SDPBackend.EFFICIENT_ATTENTION in kernels
    if grouped and (
        efficient or (not kernel and q.is_cuda and _capability(q.device.index) < (8, 0))
    ):
        k, v = _repeated(q, k, v)
        grouped = False
    causal = False  # one query, the last position, sees all keys
    if dense is None and mask.causal and q.shape[2] != 1:
        causal = True
    with sdpa_kernel(kernels) if kernels else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=dense, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    return out if empty is None else out.masked_fill(empty, 0)


RUN = {
    "triton": _run_triton,
    "flex": _run_flex,
    "sdpa": _run_sdpa,
    **{name: functools.partial(_run_sdpa, kernel=name) for name in SDPA},
    "varlen": _run_varlen,
    "flash_attn": _run_flash_attn,
    "xformers": _run_xformers,
    "reference": _run_reference,
}

# --------------------------------------------------------------------------------------------------
# What can run, what should run, and the interface


def _unable_flex(q):
    if q.dtype == torch.float64:
        return "FlexAttention has no float64 kernel"
    if q.device.type == "cpu":
        return "inside torch.compile on a CPU its sizes are mixed up" if _tracing() else None
    if q.device.type != "cuda":
        return f"not tried on {q.device.type}"
    if _capability(q.device.index) < (8, 0):
        return "FlexAttention needs compute capability 8.0"
    return None if 16 <= q.shape[3] <= 256 else f"head size {q.shape[3]}, not 16 to 256"


def _unable_half(q):
    if q.device.type == "cuda" and q.dtype in HALF:
        return None
    return f"needs float16 or bfloat16 on a GPU, found {q.dtype} on {q.device.type}"


def _unable_triton(q):
    if reason := _unable_half(q):
        return reason
    capability = _capability(q.device.index)
    hopper = capability == (9, 0)  # (torch 2.11 cannot trace != here)
    if not hopper:
        return f"needs compute capability 9.0, found {capability[0]}.{capability[1]}"
    ok = q.shape[3] % 8 == 0 and 16 <= q.shape[3] <= 256
    return None if ok else f"head size {q.shape[3]}, not a multiple of 8 from 16 to 256"


def _unable_sdpa(name, q, k, v, mask):
    if name in ("sdpa", "sdpa_math"):
        return None
    if not q.is_cuda:
        return f"{name} names a CUDA kernel, the tensors are on {q.device}"
    masked = _needs_dense(q, k, mask)
    if name == "sdpa_cudnn" and masked and _wants_grad(q, k, v):
        return "its gradients with a mask are wrong inside torch.compile, NaN at some lengths"
    if _tracing():
        return None  # SDPA itself says so
    dense = None
    if masked:
        size = q.shape[0], 1, q.shape[2], k.shape[2]
        dense = torch.empty(size[3], dtype=torch.bool, device=q.device).expand(size)
    if name == "sdpa_efficient":
        k, v = (t[:, :1].expand(-1, q.shape[1], -1, -1) for t in (k, v))
    grouped = q.shape[1] != k.shape[1]
    causal = dense is None and mask.causal and q.shape[2] == k.shape[2]
    params = torch.backends.cuda.SDPAParams(q, k, v, dense, 0.0, causal, grouped)
    can = getattr(torch.backends.cuda, f"can_use_{name.removeprefix('sdpa_')}_attention")
    if can(params):
        return None
    if name == "sdpa_flash" and dense is not None:
        return "it takes no mask but causal or none"
    return f"torch.backends.cuda.{can.__name__} refuses these inputs"


def _need_backend(backend, auto=True):
    ok = backend in BACKENDS or (auto and backend == "auto")
    _need(ok, "backend", repr(backend)[:60], "auto or one of " + ", ".join(BACKENDS))


def _autocasted(q, k, v):
    """The three as autocast hands them to SDPA (of its dtype, but float64); None: it is off."""
    kind = q.device.type if isinstance(q, Tensor) else "none"
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return None
    dtype = torch.get_autocast_dtype(kind)
    casts = lambda t: isinstance(t, Tensor) and t.dtype in (*HALF, torch.float32)
    return tuple(t.to(dtype) if casts(t) else t for t in (q, k, v))


def supports(
    backend: str, q: Tensor, k: Tensor, v: Tensor, mask: Mask, softcap: float | None = None
) -> str | None:
    """None if `backend` can run this, forward and (where an input requires gradients) backward;
    else the reason. q [B, H, S_q, D], k and v [B, H_kv, S_k, D]. Raises ValueError or TypeError for
    inputs that no backend takes."""
    _need_backend(backend, auto=False)
    q, k, v = _autocasted(q, k, v) or (q, k, v)
    _check(q, k, v, mask, None, softcap)
    return _unable(backend, q, k, v, _ready(mask, q, k), softcap)


def _unable(backend, q, k, v, mask, softcap):
    if backend == "reference":
        return None
    ours = backend in ("triton", "flex")
    if ours and not _tracing() and torch._C._are_functorch_transforms_active():
        return "torch.func transforms need SDPA"
    if backend == "triton":
        return _unable_triton(q)
    if backend == "flex":
        if q.device.type == "cpu" and _wants_grad(q, k, v):
            return "FlexAttention has no backward on CPUs"
        return _unable_flex(q)
    if backend == "sdpa" or backend in SDPA:
        return (
            "SDPA has no softcap" if softcap is not None else _unable_sdpa(backend, q, k, v, mask)
        )
    if _tracing():
        return "its lengths have to be known on the host, which torch.compile does not allow"
    package = {"varlen": _varlen, "flash_attn": _flash, "xformers": _xformers}[backend]()
    if not package[0]:
        return package[1]
    if reason := _unable_half(q):
        return reason
    capability = _capability(q.device.index)
    least = (9, 0) if backend == "flash_attn" and package[0] == 4 else (8, 0)
    if capability < least and backend != "xformers":
        return f"needs compute capability {least[0]}.0, found {capability[0]}.{capability[1]}"
    if q.shape[3] % 8 or q.shape[3] > 256:
        return f"head size {q.shape[3]}, not a multiple of 8 up to 256"
    if mask.offset is not None or q.shape[2] > k.shape[2]:
        return "queries have to be the last positions"
    if least == (9, 0) and (q.shape[3] not in (64, 128, 256) or not mask.causal):
        # dq was wrong by 84% with a window to both sides at head size 80 (4.0.0b36, H200)
        return "flash-attn 4 is used for causal masks and head sizes 64, 128 and 256 alone"
    if softcap is not None and backend != "flash_attn":
        return f"{backend} has no softcap"
    if mask.window is not None and not mask.causal and backend == "xformers":
        return "its windows are causal"
    if mask.window is not None and mask.padding is not None and _facts(mask)[2]:
        return "padding inside a sequence would shorten the window"
    return None


@functools.cache
def _say(words):
    warnings.warn("flex_attn: " + words, stacklevel=4)


def _choose(q, k, v, mask, softcap):
    """The fastest of what can run, by rules from timings on an H200 (torch 2.11, flash-attn
    4.0.0b36, bf16; ms forward / forward+backward at 4 x 32/8 x 4096 x 128 unless said)."""
    can = lambda name: _unable(name, q, k, v, mask, softcap) is None
    hopper = q.is_cuda and _capability(q.device.index) == (9, 0)
    flash_4 = hopper and q.shape[2] >= BLOCK and mask.padding is None
    flash_4 = flash_4 and can("flash_attn") and _flash()[0] == 4

    def long():  # documents of more than 1536 tokens on average
        size = mask.doc_ids.numel()
        count = _facts(mask)[3] + size // mask.doc_ids.shape[-1]
        return q.stride(1) < q.stride(2) and size > 1536 * count

    if not q.is_cuda:
        if softcap is None:
            return "sdpa"
    elif q.shape[2] < BLOCK and softcap is None:
        return "sdpa"  # decoding: flex would pad to 256 queries, and a dense mask is a few rows
    elif flash_4 and (mask.doc_ids is None or long()):
        # causal: flash-attn 4 0.86 / 3.58, SDPA (cuDNN) 0.92 / 3.80, triton 1.10 / 4.61
        # window 1024: 0.46 / 1.93, triton 0.54 / 2.28
        # documents of 2048: 0.52 / 2.11, triton 0.60 / 2.48; [B, H, S, D] it copies, 0.7 ms
        return "flash_attn"
    if softcap is None and mask.plain and not _needs_dense(q, k, mask):
        return "sdpa"
    if q.is_cuda and can("triton"):
        # documents of 512: triton 0.24 / 0.85, flash-attn 4 0.26 / 1.14, flex 0.31 / 1.24, varlen
        # 0.47 / 1.71, SDPA with a dense mask 3.2 / 12.3
        return "triton"
    reason = _unable("flex", q, k, v, mask, softcap) if q.is_cuda else "on a CPU it is not chosen"
    if reason is None:
        return "flex"
    if not _tracing():
        instead = (
            "the plain reference, all scores in memory," if softcap else "SDPA with a dense mask"
        )
        _say(f"no FlexAttention here ({reason}): {instead} takes its place")
    return "sdpa" if softcap is None else "reference"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask = Mask(),
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q k^T * scale under mask) v.

    q: [B, H, S_q, D]; k, v: [B, H_kv, S_k, D], H a multiple of H_kv; one floating dtype and device
    (in autocast: its dtype, to which the three are cast).
    scale: default D ** -0.5. softcap: scores become softcap * tanh(scores / softcap).
    backend: "auto" (the rules of `_choose`), or one of BACKENDS, which then runs or raises
    ValueError with the reason of `supports`. Returns [B, H, S_q, D] in q's dtype; rows that see no
    key are zero. Raises ValueError or TypeError for inputs that do not fit together.
    """
    cast = _autocasted(q, k, v)
    if cast is not None:
        with torch.autocast(q.device.type, enabled=False):
            return attention(*cast, mask=mask, scale=scale, softcap=softcap, backend=backend)
    _check(q, k, v, mask, scale, softcap)
    if _tracing():
        # heads and head sizes are constants of a graph, where q and k are its inputs too
        for t in (q, k):
            guard_scalar(t.shape[1]), guard_scalar(t.shape[3])
    mask = _ready(mask, q, k)
    _need_backend(backend)
    if backend == "auto":
        backend = _choose(q, k, v, mask, softcap)
    elif reason := _unable(backend, q, k, v, mask, softcap):
        _need(False, "backend", f"{backend!r}, which cannot run this ({reason})", "another")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if not _tracing():  # (kernels would be compiled for an integer)
        scale, softcap = float(scale), None if softcap is None else float(softcap)
    return RUN[backend](q, k, v, mask, scale, softcap)


# --------------------------------------------------------------------------------------------------
# transformers


SIMPLE = {"causal_mask_function": True, "bidirectional_mask_function": False}  # whether causal


def _read_mask(function):
    """(causal, window, document ids) of one of transformers' mask functions, which are closures."""
    name = function.__qualname__.split(".")[0]
    if name in SIMPLE:
        return SIMPLE[name], None, None
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    inner = dict(zip(function.__code__.co_freevars, cells, strict=True))
    if name == "sliding_window_overlay":
        return None, inner["sliding_window"], None
    if name == "sliding_window_bidirectional_overlay":
        return False, inner["sliding_window"] + 1, None
    if name == "packed_sequence_mask_function":
        return None, None, inner["packed_sequence_mask"]
    if name == "remap_positions_for_packed_sequence":  # equal distances within a document
        return _read_mask(inner["mask_function"])
    _need(
        name == "and_masks", "mask function", name, "causal, sliding or packed", NotImplementedError
    )
    read = [_read_mask(part) for part in inner["mask_functions"]]
    return tuple(next((part[i] for part in read if part[i] is not None), None) for i in range(3))


class _OpenMask(Mask):
    """A mask made while a whole model is traced, where closures cannot be read: the window is what
    the layer says."""


def _traced_mask(function, batch, q_len, kv_len, device, config):
    """(causal, document ids) by asking the mask function whether each token sees the one before."""
    if function.__name__ in SIMPLE:
        return SIMPLE[function.__name__], None
    if q_len != kv_len:  # packed documents come without a cache
        return getattr(config, "is_causal", True), None
    rows = torch.arange(batch, device=device)[:, None]
    at = torch.arange(q_len, device=device)[None]
    same = function(rows, torch.zeros_like(rows), at, (at - 1).clamp(min=0))
    return getattr(config, "is_causal", True), (~same.expand(batch, -1)).long().cumsum(-1)


def _transformers_mask(
    batch_size,
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    mask_function=None,
    attention_mask=None,
    device=None,
    **kwargs,
):
    """What transformers passes to every layer as attention_mask: one prepared Mask a batch."""
    if isinstance(attention_mask, Mask):  # generate() makes static caches' masks before the model
        return attention_mask
    window = None
    if _tracing():
        config = kwargs.get("config")
        sizes = batch_size, q_length, kv_length
        causal, doc_ids = _traced_mask(mask_function, *sizes, device, config)
    else:
        causal, window, doc_ids = _read_mask(mask_function)
    padding = attention_mask
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length].bool()
        padding = F.pad(padding, (0, kv_length - padding.shape[1]))
    offset = q_offset - kv_offset
    if not isinstance(offset, Tensor) and offset == kv_length - q_length:
        offset = None
    if doc_ids is not None:
        doc_ids = doc_ids.expand(batch_size, -1)
    if _tracing():  # equal block tables of several layers become one in the graph
        return _OpenMask(causal, window, doc_ids, padding, offset)
    mask = Mask(causal is not False, window, doc_ids, padding, offset)
    shape = torch.empty((batch_size, 1, 1, 16), device=device, dtype=torch.float16)
    q, k = shape.expand(-1, -1, q_length, -1), shape.expand(-1, -1, kv_length, -1)
    return mask.prepare(q, k)


def _transformers_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    softcap=None,
    backend="auto",
    **kwargs,
):
    _need(not dropout, "attention dropout", dropout, "0: these kernels have none")
    for name in ("s_aux", "position_bias"):
        _need(kwargs.get(name) is None, name, "a tensor", "none", NotImplementedError)
    mask = attention_mask
    if mask is None:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        mask = Mask(bool(causal) and query.shape[2] > 1, kwargs.get("sliding_window"))
    if isinstance(mask, _OpenMask) and kwargs.get("sliding_window") is not None:
        mask = Mask(mask.causal, kwargs["sliding_window"], mask.doc_ids, mask.padding, mask.offset)
    _need(
        isinstance(mask, Mask), "attention_mask", type(mask), "a mask of two dimensions", TypeError
    )
    out = attention(query, key, value, mask=mask, scale=scaling, softcap=softcap, backend=backend)
    return out.transpose(1, 2).contiguous(), None


def register(name: str = "flex_attn", backend: str = "auto") -> None:
    """Make `name` an attn_implementation of transformers' models, for training and generation, by
    `attention` with `backend`. Position ids that restart mean packed documents. A mask that is not
    causal, sliding, packed or padded raises NotImplementedError, dropout ValueError."""
    from transformers import AttentionInterface, AttentionMaskInterface

    _need_backend(backend)
    AttentionInterface.register(name, functools.partial(_transformers_attention, backend=backend))
    AttentionMaskInterface.register(name, _transformers_mask)


# --------------------------------------------------------------------------------------------------
# Tile sizes for this GPU


def tune(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    softcap: float | None = None,
    path: str | None = None,
) -> Tiles:
    """Time FlexAttention forward+backward on these inputs over tile sizes, and use the fastest for
    this GPU's capability, head size and kind of mask from now on (TUNED). path: a JSON file that
    keeps the choice and is read first. About 5 s a candidate, 20 candidates."""
    reason = supports("flex", q, k, v, mask, softcap)
    _need(
        reason is None and q.is_cuda, "tune", reason or f"tensors on {q.device}", "a GPU with flex"
    )
    mask = _ready(mask, q, k)
    key = capability, size, kind = _tiles_key(_kind(mask, q, k), q.shape[3], q.device, softcap)
    words = f"{torch.cuda.get_device_name(q.device)} {size} {kind}"
    known = json.loads(Path(path).read_text()) if path and Path(path).exists() else {}
    if words in known:
        forward, backward, *flags = known[words]
        TUNED[key] = Tiles(tuple(forward), tuple(backward), *flags)
        return TUNED[key]
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    grad = torch.randn_like(q)
    forwards = [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 2), (128, 128, 8, 2)]
    backwards = [
        *((32, 64, 64, 64, 4, 2), (64, 64, 64, 64, 4, 2), (64, 128, 128, 64, 8, 3)),
        *((32, 128, 128, 64, 4, 3), (64, 64, 128, 32, 8, 2), (32, 64, 64, 32, 4, 2)),
    ]
    before, best = TUNED.get(key), (math.inf, None)

    def attempt(tiles):
        nonlocal best
        TUNED[key] = tiles
        try:
            way = functools.partial(attention, mask=mask, softcap=softcap, backend="flex")
            run = lambda: way(q, k, v).backward(grad)
            run()
            best = min(best, (do_bench(run, 10, 60, return_mode="median"), tiles))
        except Exception as error:  # out of shared memory or registers: inductor raises many kinds
            if "resource" not in str(error) and "choices" not in str(error).lower():
                raise

    try:
        base = Tiles(forwards[0], backwards[0])
        for tiles in ([before] if before else []) + [base._replace(forward=f) for f in forwards]:
            attempt(tiles)
        fast = best[1] or base
        for tiles in [fast._replace(backward=b) for b in backwards]:
            attempt(tiles)
        if q.shape[3] == size and capability >= (9, 0):
            attempt(best[1]._replace(tma=not best[1].tma))
    finally:
        TUNED.pop(key, None)
        if best[1] or before:
            TUNED[key] = best[1] or before
    _need(best[1] is not None, "tune", "no tile sizes that fit", "a GPU with more shared memory")
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(f"{path}.{os.getpid()}")
        temporary.write_text(json.dumps(known | {words: best[1]}, indent=1))
        temporary.replace(path)
    return best[1]


# --------------------------------------------------------------------------------------------------
# Self-test

LENGTHS = [1, 2, 3, 17, 64, 100, 127, 128, 129, 200, 255, 256, 257, 300, 384, 512, 640, 777, 1000]
LENGTHS += [1024, 1500, 2048, 3000, 4096, 5000, 6001, 8000, 8192]


def _device():
    return "cuda" if torch.cuda.is_available() and _capability(0) >= (8, 0) else "cpu"


def _needs_gpu(count=1):
    if _device() == "cpu" or torch.cuda.device_count() < count:
        raise unittest.SkipTest(f"needs {count} GPU(s) of compute capability 8.0 or more")


def _documents(size, generator, mean=60):
    """Sorted ids [size] of documents of random lengths, 1 among them."""
    lengths = torch.randint(1, 2 * mean, (size,), generator=generator)
    lengths[::3] = 1
    return torch.repeat_interleave(torch.arange(size), lengths)[:size]


def _some_mask(kind, batch, q_len, k_len, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    documents = torch.stack([_documents(k_len, g) for _ in range(batch)]).to(device)
    lengths = torch.randint(1, k_len + 1, (batch, 1), generator=g)
    right = (torch.arange(k_len) < lengths).to(device)
    return KINDS[kind](documents, right, seed)


KINDS = {  # of the documents [B, k_len] and real tokens [B, k_len] of a seed
    "causal": lambda ids, real, seed: Mask(),
    "full": lambda ids, real, seed: Mask(causal=False),
    "window": lambda ids, real, seed: Mask(window=1 + seed * 37 % 300),
    "window 1": lambda ids, real, seed: Mask(window=1),
    "window both sides": lambda ids, real, seed: Mask(causal=False, window=20),
    "documents": lambda ids, real, seed: Mask(doc_ids=ids),
    "documents, one for all": lambda ids, real, seed: Mask(doc_ids=ids[0]),
    "documents both ways": lambda ids, real, seed: Mask(causal=False, doc_ids=ids),
    "one document": lambda ids, real, seed: Mask(doc_ids=torch.zeros_like(ids)),
    "documents of 1": lambda ids, real, seed: Mask(doc_ids=torch.ones_like(ids[0]).cumsum(0)),
    "padding right": lambda ids, real, seed: Mask(padding=real),
    "padding left": lambda ids, real, seed: Mask(padding=real.flip(1)),
    "padding inside": lambda ids, real, seed: Mask(padding=real ^ real.roll(real.shape[1] // 3, 1)),
    "padding of all": lambda ids, real, seed: Mask(padding=torch.zeros_like(real)),
    "all": lambda ids, real, seed: Mask(window=30, doc_ids=ids, padding=real.flip(1)),
}


def _qkv(batch, heads, kv_heads, q_len, k_len, dim, dtype, device, grad=True, inside=True):
    def one(h, size):
        shape = (batch, size, h, dim) if inside else (batch, h, size, dim)
        t = torch.randn(shape, device=device, dtype=torch.float32).to(dtype)
        return (t.transpose(1, 2) if inside else t).detach().requires_grad_(grad)

    return one(heads, q_len), one(kv_heads, k_len), one(kv_heads, k_len)


def _plain_low(q, k, v, mask, scale, softcap):
    """Plain attention with every step in q's dtype: the error that a kernel may have."""
    k, v = _repeated(q, k, v)
    scores = q @ k.mT * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    sees = dense_mask(mask, q, k)
    weights = scores.masked_fill(~sees, torch.finfo(q.dtype).min).softmax(-1)
    return weights.masked_fill(~sees, 0) @ v


def _error(got, want):
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def _errors(run, inputs, weight, truth):
    """Relative errors of the output and the three gradients, and that nothing is NaN."""
    inputs = [t.detach().requires_grad_(truth[1] is not None) for t in inputs]
    out = run(*inputs)
    grads = []
    if truth[1] is not None:
        grads = torch.autograd.grad(out, inputs, weight.to(out.dtype))
    found = []
    for got, want in zip([out, *grads], [truth[0], *(truth[1] or ())], strict=True):
        assert got.isfinite().all() and got.shape == want.shape
        size = max(want.norm().item(), 0.3 * want.numel() ** 0.5)  # of a gradient that is all zero
        found.append((got.double() - want).norm().item() / size)
    return found


def _compare(backend, inputs, mask, softcap=None, scale=None, grad=True):
    """backend against float64, by the error that plain attention in the inputs' dtype has."""
    q = inputs[0]
    weight = torch.randn(q.shape, device=q.device, dtype=torch.float64)
    sized = q.shape[3] ** -0.5 if scale is None else scale
    wide = [t.detach().double().requires_grad_() for t in inputs]
    out = _run_reference(*wide, mask, sized, softcap)
    truth = out.detach(), torch.autograd.grad(out, wide, weight) if grad else None
    low = _errors(lambda *t: _plain_low(*t, mask, sized, softcap), inputs, weight, truth)
    call = functools.partial(attention, mask=mask, softcap=softcap, scale=scale, backend=backend)
    got = _errors(call, inputs, weight, truth)
    out = call(*inputs)
    dead = ~dense_mask(mask, q, inputs[1]).any(-1, True).expand(q.shape)
    assert (out[dead] == 0).all(), "a row without keys is not zero"
    tiny = max(1e-5, torch.finfo(q.dtype).eps)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, low, strict=False):
        assert a <= 2 * b + tiny, f"{backend} {mask} {name}: error {a:.2e}, plain {b:.2e}"


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


class Case(NamedTuple):
    """A mask and the sizes it is for."""

    mask: Mask
    batch: int
    q_len: int
    k_len: int


def _cases(most, device="cpu", *, offsets=True, square=False, batches=(1, 2, 3)):
    """A strategy: masks of all options for up to `most` tokens."""
    from hypothesis import strategies as st

    @st.composite
    def case(draw):
        batch, k_len = draw(st.sampled_from(batches)), draw(st.integers(1, most))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        random = torch.rand(2, batch, k_len, generator=generator)
        share, at = st.sampled_from((0.0, 0.02, 0.2, 0.8, 1.0)), st.integers(0, k_len)
        ids = real = offset = None
        if draw(st.booleans()):
            ids = (random[0] < draw(share)).cumsum(1).to(draw(st.sampled_from(INTEGERS[2:])))
            ids = ids[0] if draw(st.booleans()) else ids
        if draw(st.booleans()):
            start, end, place = draw(at), draw(at), torch.arange(k_len)
            real = (random[1] < draw(share)) ^ ((place >= start) & (place < end))
        q_len = k_len
        if not square and draw(st.booleans()):
            q_len = draw(st.integers(1, most if ids is real is None else k_len))
        if offsets and draw(st.booleans()):
            offset = draw(st.integers(-k_len, 2 * k_len))
            offset = torch.tensor(offset, device=device) if draw(st.booleans()) else offset
        ids, real = (t if t is None else t.to(device) for t in (ids, real))
        all_keys = st.integers(max(1, k_len - 1), k_len + 1)  # and what is next to it
        window = draw(st.none() | st.integers(1, most + 2) | all_keys)
        return Case(Mask(draw(st.booleans()), window, ids, real, offset), batch, q_len, k_len)

    return case()


def test_fuzz_the_definition():
    def check(case):
        mask, batch, q_len, k_len = case
        sees = dense_mask(mask, torch.empty(batch, 1, q_len, 8), torch.empty(batch, 1, k_len, 8))
        for b, i, j in itertools.product(range(batch), range(q_len), range(k_len)):
            at = i + (k_len - q_len if mask.offset is None else int(mask.offset))
            near = mask.window is None or abs(at - j) < mask.window
            want = near and (j <= at or not mask.causal)
            at = min(max(at, 0), k_len - 1)
            if mask.doc_ids is not None:
                ids = mask.doc_ids.expand(batch, -1)[b]
                want = want and bool(ids[at] == ids[j])
            if mask.padding is not None:
                want = want and bool(mask.padding[b, at] and mask.padding[b, j])
            assert sees[min(b, len(sees) - 1), 0, i, j] == want

    _fuzz(check, case=_cases(8))


def _check_blocks(mask, batch, q_len, k_len):
    """Intervals exactly; tables too, but with padding a block may count as partial that holds
    nothing or everything."""
    q, k = torch.empty(batch, 1, q_len, 8), torch.empty(batch, 1, k_len, 8)
    with unittest.mock.patch(__name__ + "._compiled_build", return_value=_build):
        lo, hi, real, pitch, tables, queries = _lower(mask, q, k)
    q_size, k_size = _padded_size(q_len), _padded_size(k_len)
    batch, pitch = 1 if pitch == 0 else batch, max(q_size, k_size)
    lo, hi, real = (t[: batch * pitch].view(-1, 1, pitch) for t in (lo, hi, real))
    lo, hi = lo[:, :, :q_size, None], hi[:, :, :q_size, None]
    j = torch.arange(k_size)
    got = (j >= lo) & (j <= hi)
    if mask.padding is not None:
        got = got & real[:, :, None, :k_size]
    want = dense_mask(mask, q, k)
    assert torch.equal(got[:, :, :q_len, :k_len], want.expand(batch, -1, -1, -1)), mask
    assert not got[..., k_len:].any()
    queries = queries.view(batch, -1, 2).repeat_interleave(NEAR, 1)[:, :k_size]
    at, (start, end) = torch.arange(q_size)[:, None], queries[:, None, None].unbind(-1)
    assert not (got & ((at < start) | (at >= end))).any(), mask
    if mask.window is not None:  # and no more than the blocks' edges explain
        most = mask.window * (1 if mask.causal else 2) + 3 * NEAR
        assert (queries.clamp(max=q_len).diff() <= most).all(), mask
    n, m = q_size // BLOCK, k_size // BLOCK
    sizes = [batch * n, batch * n * m] * 2 + [batch * m, batch * n * m] * 2
    parts = [
        part.view(batch, 1, *shape)
        for part, shape in zip(
            tables[:-1].split(sizes), [(n,), (n, m)] * 2 + [(m,), (m, n)] * 2, strict=True
        )
    ]
    dense = lambda num, idx: torch.zeros(idx.shape, dtype=torch.bool).scatter(
        -1, idx.long(), torch.arange(idx.shape[-1]) < num[..., None]
    )
    some, full = dense(*parts[:2]), dense(*parts[2:4])
    blocks = got.view(-1, 1, n, BLOCK, m, BLOCK).transpose(3, 4).flatten(4)
    blocks = blocks.expand(batch, -1, -1, -1, -1)
    t_some, t_full = blocks.any(-1) & ~blocks.all(-1), blocks.all(-1)
    assert not (some & full).any() and torch.equal(dense(*parts[4:6]), some.mT)
    assert torch.equal(dense(*parts[6:]), full.mT)
    if mask.padding is None:
        assert torch.equal(some, t_some) and torch.equal(full, t_full), mask
    else:
        assert not (full & ~t_full).any() and not ((t_some | t_full) & ~(some | full)).any()


def test_fuzz_blocks_equal_the_definition():
    sizes = (300, 300, None), (512, 512, None), (130, 700, None), (150, 180, 40)  # past the keys
    for kind, (q_len, k_len, offset) in itertools.product(KINDS, sizes):
        mask = replace(_some_mask(kind, 2, q_len, k_len, "cpu", seed=q_len), offset=offset)
        _check_blocks(mask, 2, q_len, k_len)
    _fuzz(lambda case: _check_blocks(*case), case=_cases(400))


def test_fuzz_attention_equals_float64():
    """Every backend but FlexAttention, which compiles: it runs this or gives its reason."""
    from hypothesis import strategies as st

    device, gpu = _device(), _device() == "cuda"
    ways = [name for name in BACKENDS if name != "flex"]
    if not gpu or _capability(0) == (9, 0):  # (elsewhere auto is FlexAttention)
        ways.append("auto")
    shapes = (4, 2), (6, 2), (1, 1), (3, 3)
    build = unittest.mock.patch(__name__ + "._compiled_build", return_value=_build)

    def check(case, backend, heads, dim, dtype, inside, scale, softcap, prepared):
        mask, batch, q_len, k_len = case
        inputs = _qkv(batch, *heads, q_len, k_len, dim, dtype, device, True, inside)
        mask = mask.prepare(*inputs[:2]) if prepared else mask
        with build:
            reason = None if backend == "auto" else supports(backend, *inputs, mask, softcap)
            run = functools.partial(_compare, backend, inputs, mask, softcap, scale)
            if reason is None:
                run()
            else:
                _refused(run, reason)

    _fuzz(
        check,
        case=_cases(150, device),
        backend=st.sampled_from(ways),
        heads=st.sampled_from(shapes[: 1 if gpu else 4]),  # (kernels are compiled for these)
        dim=st.sampled_from((64,) if gpu else (1, 8, 20, 64)),
        dtype=st.sampled_from(HALF[1:] if gpu else (*HALF, torch.float32, torch.float64)),
        inside=st.booleans(),
        scale=st.none() | st.floats(0.01, 1),
        softcap=st.none() | st.floats(0.5, 30),
        prepared=st.booleans(),
    )


def test_sdpa_and_reference_equal_float64():
    for kind, (q_len, k_len), dtype in itertools.product(
        KINDS, ((33, 33), (1, 40), (9, 40)), (torch.float32, torch.bfloat16)
    ):
        inputs = _qkv(2, 4, 2, q_len, k_len, 16, dtype, "cpu")
        mask = _some_mask(kind, 2, q_len, k_len, "cpu", seed=3)
        for backend in ("auto", "sdpa", "sdpa_math", "reference"):
            _compare(backend, inputs, mask, scale=0.3)
        for backend in ("auto", "reference"):
            _compare(backend, inputs, mask, softcap=2.0)
    inputs = _qkv(1, 2, 2, 9, 9, 16, torch.float32, "cpu")
    for window in (8, 9):  # the last query does not see the first key, or does
        _compare("sdpa", inputs, Mask(window=window))
    inputs = _qkv(1, 2, 2, 9, 4, 16, torch.float32, "cpu")  # more queries than keys
    for mask, backend in itertools.product((Mask(), Mask(window=2)), ("sdpa", "reference")):
        _compare(backend, inputs, mask)
    mask = Mask(causal=False, window=4)
    for backend in ("sdpa", "reference"):
        _compare(backend, inputs, mask)
    # positions past the last key are as the last one
    inputs = _qkv(2, 2, 1, 9, 12, 16, torch.float32, "cpu")
    for kind, backend in itertools.product(("documents", "padding inside"), ("sdpa", "reference")):
        _compare(backend, inputs, replace(_some_mask(kind, 2, 9, 12, "cpu"), offset=6))
    # a static cache: 7 of 12 keys are there
    inputs = _qkv(1, 2, 1, 3, 12, 16, torch.float32, "cpu")
    for offset, backend in itertools.product((4, torch.tensor(4)), ("sdpa", "reference")):
        _compare(backend, inputs, Mask(offset=offset))


def test_a_prepared_mask_keeps_what_it_is():
    like = lambda size: (torch.empty(2, 1, size, 16), torch.empty(2, 1, size, 16))
    real = torch.ones(2, 20, dtype=torch.bool)
    for mask in (Mask(window=200), Mask(doc_ids=torch.zeros(20).int()), Mask(padding=real)):
        made = mask.prepare(*like(20))
        assert made.plain and made.prepare(*like(20)) is made
        for call in (
            lambda m: m.prepare(*like(30)),
            lambda m: attention(*_qkv(2, 1, 1, 30, 30, 16, torch.float32, "cpu"), mask=m),
            lambda m: supports("sdpa", *_qkv(2, 1, 1, 30, 30, 16, torch.float32, "cpu"), m),
        ):
            _refused(functools.partial(call, made), "mask", "20 queries and 20 keys")
    made = Mask(window=5).prepare(*like(20))
    assert made.window == 5 and made.prepare(*like(20)) is made
    meta = [t.to("meta") for t in _qkv(2, 1, 1, 20, 20, 16, torch.float32, "cpu")]
    _refused(lambda: attention(*meta, mask=made), "mask", "cpu", "meta")


def test_masks_let_go_of_their_memory():
    """No mask keeps itself alive, and of each kind of what it keeps the oldest leave."""
    ids = torch.arange(40) // 9
    gc.collect()
    gc.disable()
    try:
        for given in ({"doc_ids": ids}, {"window": 3}, {"doc_ids": ids, "window": 50}):
            mask = Mask(**given)
            alive = weakref.ref(mask)
            attention(*_qkv(1, 1, 1, 40, 40, 16, torch.float32, "cpu"), mask=mask)
            del mask
            assert alive() is None
    finally:
        gc.enable()
    mask = Mask(window=5, offset=0)
    for _ in range(3):
        for size in (20, 30, 40, 50):
            attention(*_qkv(1, 1, 1, size, size, 16, torch.float32, "cpu"), mask=mask)
    kinds = [key[0] for key in mask._memo]
    assert kinds.count("dense") == 2 and kinds.count("simple") == 4 and FACTS in mask._memo
    memo = {}

    def fill(_):
        for i in range(20000):
            key = ("some", i % 7)
            assert _kept(memo, key, lambda key=key: key, most=3) == key

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(fill, range(4)))
    finally:
        sys.setswitchinterval(before)
    assert len(memo) == 3


def test_torch_func_and_fake_tensors():
    q, k, v = _qkv(1, 2, 1, 30, 30, 16, torch.float64, "cpu", grad=False)
    mask = Mask(window=7)

    def loss(q):
        assert supports("flex", q, k, v, mask) == "torch.func transforms need SDPA"
        return attention(q, k, v, mask=mask).square().sum()

    want = torch.autograd.functional.jacobian(
        lambda q: attention(q, k, v, mask=mask, backend="reference").square().sum(), q
    )
    assert_close(torch.func.grad(loss)(q), want)
    with torch._subclasses.FakeTensorMode():
        fake = _qkv(1, 2, 1, 30, 30, 16, torch.float16, "cpu")
        assert attention(*fake, mask=Mask(window=9)).shape == (1, 2, 30, 16)


def _count_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    _compiled_flex.cache_clear()
    _compiled_build.cache_clear()


def test_a_long_process_stays_below_the_recompile_limit():
    """Every kind of mask, batch and caller builds its tables in one process: a graph a variant."""
    _fresh()
    traced = functools.partial(torch.compile, backend="eager")
    with unittest.mock.patch("torch.compile", traced):
        kinds = "full", "documents", "documents both ways", "padding left", "all"
        turns = (
            *itertools.product(kinds, (1, 2, 3), (700,), (True, False)),
            ("causal", 1, 300, True),
        )
        for kind, batch, q_len, grad in turns:
            q, k = torch.empty(batch, 1, q_len, 8), torch.empty(batch, 1, 700, 8)
            with torch.set_grad_enabled(grad):
                _lower(_some_mask(kind, batch, q_len, 700, "cpu"), q, k)
        variants = _compiled_build.cache_info().currsize
        made, limit = _count_graphs(), torch._dynamo.config.recompile_limit
    _fresh()
    assert made == variants > limit, f"{made} graphs of {variants} variants, limit {limit}"


def test_a_warm_cache_makes_no_more_graphs():
    """Lengths padded inside a compiled caller: one graph for all, compiled or from the cache."""

    def longer(x):
        n = _padded_size(len(x)) - len(x)
        return (F.pad(x, (0, n)) if n else x).view(-1, BLOCK).sum(1)

    made, sizes = [], (100, 300, 40, 700)
    with torch._inductor.utils.fresh_cache():
        for _ in range(2):
            torch._dynamo.reset()
            before, run = _count_graphs(), torch.compile(longer, dynamic=True, fullgraph=True)
            for size in sizes:
                x = torch.ones(size, device=_device())
                assert_close(run(x).sum(), x.sum())
            made.append(_count_graphs() - before)
    assert made == [1, 1], made
    assert [_padded_size(n) // BLOCK for n in (0, 1, 128, 129, 256, 257)] == [2, 2, 2, 2, 2, 3]


CAP = 5.0  # of scores; the tests of FlexAttention share their graphs, which take seconds each


def test_few_graphs_for_all_lengths():
    """Lengths from 1 to 8192, mask after mask: at most 2 graphs for each kind, none in eager."""
    device = _device()
    kinds = ["causal", "window", "documents", "padding right", "softcap"]
    dim, dtype = (64, torch.bfloat16) if device == "cuda" else (16, torch.float32)
    lengths = LENGTHS if device == "cuda" else [*LENGTHS[:-7], LENGTHS[-1]]
    register()  # (importing transformers later would have all graphs made anew)
    _fresh()
    made = dict.fromkeys(kinds, 0)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for kind, (turn, size) in itertools.product(kinds, enumerate(lengths)):
            mask = Mask() if kind == "softcap" else _some_mask(kind, 2, size, size, device, turn)
            inputs = _qkv(2, 4, 2, size, size, dim, dtype, device, device == "cuda")
            _lower(_ready(mask, *inputs[:2]), *inputs[:2])
            before = _count_graphs()
            softcap = CAP if kind == "softcap" else None
            out = attention(*inputs, mask=mask, softcap=softcap, backend="flex")
            if device == "cuda":
                out.sum().backward()
            made[kind] += _count_graphs() - before
            if turn % 7 == 0:
                q, k, v = inputs
                want = _run_reference(q[:, :, -300:], k, v, mask, dim**-0.5, softcap)
                close = {"atol": 2e-2, "rtol": 2e-2} if dtype != torch.float32 else {}
                assert_close(out[:, :, -300:], want, **close)
    print(f"graphs for {len(lengths)} lengths: {made}")
    # a window or padding that changes nothing makes the mask plain causal: that graph exists then
    assert max(made.values()) <= 2 and sum(made.values()) <= 5, made
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert not breaks, breaks


def test_flex_equals_float64():
    """Forward on a CPU, as torch has it there; forward and backward on a GPU."""
    device, grad = _device(), _device() != "cpu"
    run = functools.partial(_compare, "flex", grad=grad)
    inputs = _qkv(2, 4, 2, 200, 200, 16, torch.float32, device, grad)
    for kind in ("causal", "window", "documents", "padding left", "all"):
        run(inputs, _some_mask(kind, 2, 200, 200, device, seed=3))
    run(inputs, _some_mask("window", 2, 200, 200, device, 3), softcap=CAP)
    inputs = _qkv(2, 4, 2, 40, 300, 16, torch.float32, device, grad)  # chunked prefill
    run(inputs, _some_mask("documents", 2, 40, 300, device, 3))


def test_fuzz_flex_equals_float64():
    """Masks of all options and lengths through three graphs; on a GPU forward and backward."""
    from hypothesis import strategies as st

    device, grad = _device(), _device() != "cpu"

    def check(case, prepared):
        inputs = _qkv(2, 4, 2, case.q_len, case.k_len, 16, torch.float32, device, grad)
        mask = case.mask
        if mask.doc_ids is not None and mask.padding is None:
            mask = replace(mask, doc_ids=mask.doc_ids.expand(2, -1))
        _compare("flex", inputs, mask.prepare(*inputs[:2]) if prepared else mask, grad=grad)

    cases = _cases(600, device, square=True, batches=(2,))
    with unittest.mock.patch(__name__ + "._compiled_build", return_value=_build):
        _fuzz(check, case=cases, prepared=st.booleans())


def test_windows_and_documents_are_data():
    device = _device()
    inputs = _qkv(2, 4, 2, 700, 700, 16, torch.float32, device, False)
    run = functools.partial(attention, *inputs, backend="flex")
    g = torch.Generator().manual_seed(0)
    layout = lambda: torch.stack([_documents(700, g) for _ in range(2)]).to(device)
    for ids in (layout()[0], layout()):
        run(mask=Mask(window=9, doc_ids=ids))
    with torch._dynamo.config.patch(error_on_recompile=True):
        before = _count_graphs()
        for window in (1, 2, 128, 500, 699):
            for ids in (layout()[0], layout()):
                mask = Mask(window=window, doc_ids=ids)
                want = _run_reference(*inputs, mask, 16**-0.5, None)
                assert_close(run(mask=mask), want, atol=5e-3, rtol=5e-3)  # tf32 on a GPU
        assert _count_graphs() == before


def test_transformers_through_flex():
    """The FlexAttention path itself, forward: windows, softcap, packed and padded."""
    register("flex_attn_only", backend="flex")
    for name in ("mistral", "gemma2"):
        eager, ours = (_model(name, way, device=_device()) for way in ("eager", "flex_attn_only"))
        ours.load_state_dict(eager.state_dict())
        ids = _text_ids(2, 200, _device())
        for model in (eager, ours):  # (no_grad would take graphs of its own)
            model.requires_grad_(False)
        restart = _restarting((70, 1, 129), 2, _device())
        for more in ({}, {"position_ids": restart})[: 2 if name == "mistral" else 1]:
            want, got = (m(ids, use_cache=False, **more).logits for m in (eager, ours))
            assert_close(got, want, atol=5e-3, rtol=5e-3)


def test_threads_may_compile_at_once():
    """As DataParallel's replicas do in their first step: torch 2.13 tells every thread then that
    it is_compiling(), 2.11 refuses a compiled call while another thread compiles."""
    busy = threading.Lock()

    def compiled(*key):
        def run(q, k, v, blocks):
            assert busy.acquire(blocking=False), "two at once"
            time.sleep(0.02)
            busy.release()
            return q

        return run

    def replica(seed):
        inputs = _qkv(1, 2, 2, 200, 200, 16, torch.float32, "cpu", False)
        assert attention(*inputs, mask=Mask(window=30), backend="flex").shape == inputs[0].shape

    patch = unittest.mock.patch.multiple(
        __name__, _compiled_flex=compiled, _compiled_build=lambda *key: _build
    )
    flag = unittest.mock.patch("torch.compiler._is_compiling_flag", True)
    with patch, flag, ThreadPoolExecutor(4) as pool:
        list(pool.map(replica, range(8)))


def test_one_build_for_all_layers():
    inputs = _qkv(2, 4, 2, 300, 300, 16, torch.float32, _device(), False)
    mask = _some_mask("documents", 2, 300, 300, _device())
    with unittest.mock.patch(__name__ + "._compiled_build", return_value=_build) as build:
        for _ in range(5):
            attention(*inputs, mask=mask, backend="flex")
        assert build.call_count == 1
        attention(*inputs, mask=replace(mask), backend="flex")
        assert build.call_count == 2


def test_a_mask_moves_with_a_split_model():
    """accelerate moves what a layer is given to the layer's device."""
    from accelerate.utils import send_to_device

    q, k = torch.empty(2, 4, 40, 16), torch.empty(2, 2, 40, 16)
    for kind in ("all", "window", "causal"):
        mask = _some_mask(kind, 2, 40, 40, "cpu").prepare(q, k)
        given = {"attention_mask": mask}
        moved = send_to_device(given, torch.device("meta"))["attention_mask"]
        assert send_to_device(given, torch.device("meta"))["attention_mask"] is moved
        assert mask.to("cpu") is mask and (moved is mask) == (kind == "causal")
        if kind != "causal":
            assert moved._dense.device.type == "meta" and moved.window == mask.window
            out = attention(q.to("meta"), *[k.to("meta")] * 2, mask=moved)
            assert out.shape == q.shape and out.device.type == "meta"


def _check_kernels(mask, q, k, v, scale=0.3, softcap=None):
    """The Triton kernels against float64: of a GPU, or in Triton's interpreter on a CPU."""
    q_len, k_len, device = q.shape[2], k.shape[2], q.device.type
    dout = torch.empty_strided(q.shape, q.stride(), dtype=q.dtype, device=device).normal_()
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    want = _run_reference(*wide, mask, scale, softcap)
    want = want, *torch.autograd.grad(want, wide, dout.double())
    lo = hi = real = queries = None
    if _kind(mask, q, k) == "rows":
        with unittest.mock.patch(__name__ + "._compiled_build", return_value=_build):
            lo, hi, real, _, _, queries = _lower(replace(mask), q, k)
        # (on a CPU _lower makes them longer)
        lo, hi, real = (t[: queries.numel() * NEAR // 2] for t in (lo, hi, real))
    close = {"atol": 2e-2, "rtol": 2e-2} if q.dtype in HALF else {"atol": 2e-5, "rtol": 2e-5}
    out, lse = _run_forward(q, k, v, lo, hi, real, scale, softcap)
    numbers = lo, hi, real, queries, scale, softcap
    grads = _run_backward(dout, q, k, v, out, lse, *numbers)
    for name, a, b in zip(("out", "dq", "dk", "dv"), (out, *grads), want, strict=True):
        words = f"{name}, {mask}, {q_len} x {k_len} x {q.shape[3]}: {{}}"
        assert_close(a.double(), b, **close, msg=words.format)
    scores = (q.double() @ _repeated(q, k, v)[0].double().mT) * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~dense_mask(mask, q, k), -math.inf)
    assert_close(lse[..., :q_len].double(), scores.logsumexp(-1) / math.log(2), **close)


def _check_all_kernels(device, dtype):
    """Kinds of mask in turn, then random ones."""
    from hypothesis import strategies as st

    cases = (
        *(("causal", 70, 70), ("causal", 150, 150), ("causal", 150, 33), ("full", 33, 150)),
        *(("window both sides", 70, 70), ("documents", 200, 200), ("documents", 1, 130)),
        *(("padding inside", 33, 150), ("padding of all", 70, 70), ("all", 150, 150)),
        *(("causal", 88, 150), ("window", 198, 198)),  # (a row's last key, first key is a block's)
    )
    if device == "cuda":  # other lengths go to the kernels that the first ones had compiled
        cases += tuple((kind, q_len + 8, k_len + 8) for kind, q_len, k_len in cases)
    turns = list(itertools.product((True, False), (16, 80), (None, 2.0)))
    turns = itertools.cycle(turns + turns[:4])
    for (kind, q_len, k_len), (inside, dim, softcap) in zip(cases, turns, strict=False):
        heads = (2, 1) if q_len > 70 else (4, 2)
        q, k, v = _qkv(2, *heads, q_len, k_len, dim, dtype, device, False, inside)
        if kind == "all":  # such rows TMA cannot read, nor those of its gradient
            q = F.pad(q, (0, 3))[..., :dim]
        mask = _some_mask(kind, 2, q_len, k_len, device, seed=q_len)
        _check_kernels(mask, q, k, v, softcap=softcap)

    def check(case, heads, inside, scale, softcap):
        mask, batch, q_len, k_len = case
        sizes = batch, *heads, q_len, k_len, 16
        _check_kernels(mask, *_qkv(*sizes, dtype, device, False, inside), scale, softcap)

    _fuzz(
        check,
        case=_cases(130, device, batches=(1, 2)),
        heads=st.sampled_from(((2, 1), (1, 1), (2, 2))[: 1 if device == "cuda" else 3]),
        inside=st.booleans(),
        scale=st.floats(0.01, 0.5),
        softcap=st.none() | st.floats(0.5, 30),
    )


def test_fuzz_triton_kernels():
    """On a Hopper GPU; else in Triton's interpreter, which has to be chosen before the import."""
    if _device() == "cuda" and _capability(0) == (9, 0):
        return _check_all_kernels("cuda", torch.float16)
    name = Path(__file__).stem
    code = f"import torch, {name}; {name}._check_all_kernels('cpu', torch.float32)"
    _run_interpreted(code)


def _compiled_kernel(kernel, tiles, dim, causal):
    """A kernel compiled for sm_90, the one with most in it; needs no GPU."""
    m, n, warps, stages = tiles
    constants = {"HEADS": 8, "GROUP": 4, "DIM": dim, "CAUSAL": causal, "PADDED": not causal}
    constants |= {"CAP": True, "M": m, "N": n, "STAGES": stages}
    types = {"scale": "fp32", "inner": "fp32", "factor": "fp32"}
    types |= {"real_ptr": "*u8", "queries_ptr": "*i32"} | dict.fromkeys(constants, "constexpr")
    for names, rows in ((("q", "out", "dout", "dq"), m), (("k", "v", "dk", "dv"), n)):
        types |= {f"{name}_desc": f"tensordesc<bf16[1, 1, {rows}, {dim}]>" for name in names}
    for name, dtype in (("lse", "fp32"), ("delta", "fp32"), ("lo", "i32"), ("hi", "i32")):
        types |= {f"{name}_ptr": f"*{dtype}", f"{name}_desc": f"tensordesc<{dtype}[1, {m}]>"}
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    source = ASTSource(kernel, {name: types.get(name, "i32") for name in names}, constants)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def test_triton_kernels_fit_a_hopper_gpu():
    """Each compiles, by tensor cores and TMA, into the 227 KiB that a program can have."""
    kernels = {"forward": _forward_kernel, "dq": _dq_kernel, "dkv": _dkv_kernel}
    for ((dim, causal), plan), (name, kernel) in itertools.product(PLANS.items(), kernels.items()):
        made = _compiled_kernel(kernel, getattr(plan, name), dim, causal)
        ptx = made.asm["ptx"]
        assert "wgmma.mma_async" in ptx and "cp.async.bulk.tensor" in ptx, (dim, name)
        assert made.metadata.shared <= 227 * 1024, (dim, causal, name, made.metadata.shared)


def _run_python(code, **env):
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    env = os.environ | {"PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"} | env
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def _run_interpreted(code, **env):
    """code in Triton's interpreter: a process of its own, as it is chosen before the import."""
    done = _run_python(code, TRITON_INTERPRET="1", **env)
    if "only 0-dimensional arrays" in done.stderr:
        raise unittest.SkipTest("Triton 3.6's interpreter has loops with numpy before 2.4 only")
    assert done.returncode == 0, done.stderr[-2000:]


def _naive_varlen(q, k, v, cu_q, cu_k, causal, window, scale, softcap=None):
    """What the interfaces of cumulative lengths say that they compute, in plain PyTorch."""
    outs = []
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        rows = [t[None].transpose(1, 2) for t in (q[a:b], k[c:d], v[c:d])]
        i = torch.arange(b - a)[:, None] + (d - c) - (b - a)
        j = torch.arange(d - c)
        left, right = (FAR if side in (-1, None) else side for side in window)
        sees = (j >= i - left) & (j <= i + (min(right, 0) if causal else right))
        k_, v_ = _repeated(*rows)
        scores = rows[0] @ k_.mT * scale
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~sees, -math.inf).softmax(-1).nan_to_num(0)
        outs.append((weights @ v_)[0].transpose(0, 1))
    return torch.cat(outs)


def _stand_in_packages():
    """varlen, flash-attn and xformers as what computes in plain PyTorch what their documents say."""

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):
        assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
        return _naive_varlen(q, k, v, cu_q, cu_k, False, window_size, scale)

    def flash(q, k, v, *, softmax_scale, causal, window_size, softcap=None, **lengths):
        cu = lengths.get("cu_seqlens_q"), lengths.get("cu_seqlens_k")
        if lengths:
            return _naive_varlen(q, k, v, *cu, causal, window_size, softmax_scale, softcap)
        batch, size = q.shape[:2]
        cu = [torch.arange(batch + 1) * t.shape[1] for t in (q, k)]
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        out = _naive_varlen(q, k, v, *cu, causal, window_size, softmax_scale, softcap)
        return out.view(batch, size, *out.shape[1:])

    class BlockDiagonal:
        def __init__(self, q_lens, k_lens, causal=False, window=None):
            self.lens, self.causal, self.window = (q_lens, k_lens), causal, window

        def make_causal_from_bottomright(self):
            return BlockDiagonal(*self.lens, True)

        def make_local_attention_from_bottomright(self, window):
            return BlockDiagonal(*self.lens, True, window)

    def efficient(q, k, v, *, attn_bias, scale):
        cu = [torch.tensor([0, *itertools.accumulate(lens)]) for lens in attn_bias.lens]
        window = (attn_bias.window - 1 if attn_bias.window else -1, -1)
        return _naive_varlen(q[0], k[0], v[0], *cu, attn_bias.causal, window, scale)[None]

    fmha = types.SimpleNamespace(memory_efficient_attention=efficient)
    bias = types.SimpleNamespace(
        BlockDiagonalMask=types.SimpleNamespace(from_seqlens=lambda q, k: BlockDiagonal(q, k))
    )
    return unittest.mock.patch.multiple(
        __name__,
        _varlen=lambda: (varlen, False),
        _flash=lambda: (2, flash, flash),
        _xformers=lambda: (fmha, bias),
    )


def test_fuzz_lowering_to_cumulative_lengths():
    def check(mask, batch, q_len, k_len):
        if q_len > k_len or (mask.window and mask.padding is not None and _facts(mask)[2]):
            return  # supports() refuses these
        inputs = _qkv(batch, 4, 2, q_len, k_len, 16, torch.float64, "cpu")
        found = []
        for backend in ("reference", "varlen", "flash_attn", "xformers"):
            if backend == "xformers" and mask.window and not mask.causal:
                continue
            out = RUN[backend](*inputs, mask, 0.2, None)
            found.append((out, *torch.autograd.grad(out.sin().sum(), inputs)))
            words = lambda m, b=backend: f"{b} {mask}: {m}"
            assert_close(found[-1], found[0], msg=words)
        got = _run_flash_attn(*inputs, mask, 0.2, 1.5)
        assert_close(got, _run_reference(*inputs, mask, 0.2, 1.5))

    with _stand_in_packages():
        for kind, (q_len, k_len) in itertools.product(KINDS, ((50, 50), (7, 50))):
            check(_some_mask(kind, 3, q_len, k_len, "cpu", seed=5), 3, q_len, k_len)
        _fuzz(lambda case: check(*case), case=_cases(40, offsets=False))


def test_a_mask_is_kept_for_each_length():
    """The block tables, cumulative lengths and dense mask of all queries are not taken for some."""
    mask = _some_mask("documents", 2, 300, 300, "cpu")
    with _stand_in_packages():
        for q_len in (300, 40, 300):
            _check_blocks(mask, 2, q_len, 300)
            inputs = _qkv(2, 4, 2, q_len, 300, 16, torch.float64, "cpu", False)
            want = _run_reference(*inputs, mask, 0.2, None)
            for backend in ("sdpa", "varlen"):
                assert_close(RUN[backend](*inputs, mask, 0.2, None), want)


def _refused(call, *words, error=ValueError):
    try:
        call()
    except error as raised:
        text = str(raised)
        assert "\n" not in text and all(word in text for word in ("found", "need", *words)), text
    else:
        raise AssertionError(f"not refused: {words}")


def test_fuzz_bad_input_is_refused_in_one_line():
    """An argument or two with another value: what the definition says, or one line of error."""
    from hypothesis import strategies as st

    normal, zeros = torch.randn, torch.zeros
    q, k, v = normal(2, 4, 8, 16), normal(2, 2, 8, 16), normal(2, 2, 8, 16)
    sizes = (2, 4, 8, 16), (2, 3, 8, 16), (2, 2, 5, 16), (2, 1, 8, 16), (1, 2, 8, 16), (2, 2, 8, 20)
    sizes += (2, 0, 8, 16), (0, 2, 8, 16), (2, 2, 0, 16), (2, 2, 8, 0), (2, 8, 16), (2, 2, 1, 16)
    values = [normal(size) for size in sizes] + [k.half(), k.double(), k.long(), k.to("meta")]
    values += [k.to_sparse(), k.to(torch.complex64), k.bool(), k.to(torch.float8_e4m3fn)]
    ids, real = torch.arange(8) // 3, torch.arange(16).view(2, 8) % 5 > 0
    values += [ids, ids.flip(0), ids.expand(2, -1), ids.int()[:5], ids.to("meta"), ids.float()]
    values += [real, real[:1], real[0], real[:, :5], real.float(), zeros(2, 8), zeros(3, 8).bool()]
    values += [None, True, False, 0, 1, -1, 3, 8, 2**31, 2**70, 2.5, 0.0, math.nan, math.inf]
    values += [
        "a",
        "auto",
        "sdpa",
        "flex",
        "sdpa_flash",
        "varlen",
        (),
        [1],
        {},
        torch.float32,
        Mask,
    ]
    values += [torch.tensor(2), torch.tensor(2.0), torch.tensor([2]), torch.tensor(2**40)]

    def check(changes):
        given = {"q": q, "k": k, "v": v, "scale": None, "softcap": None, "backend": "auto"}
        for names, i in changes.items():
            given |= dict.fromkeys(names.split(), values[i])
        fields = "causal", "window", "doc_ids", "padding", "offset"
        make = lambda: Mask(**{name: given[name] for name in fields if name in given})
        rest = {name: value for name, value in given.items() if name not in fields}
        try:
            mask = rest["mask"] = given["mask"] if "mask" in given else make()
            three = [rest[name] for name in ("q", "k", "v")]
            if rest["backend"] != "auto":
                reason = supports(rest["backend"], *three, mask, rest["softcap"])
                assert reason is None or "\n" not in reason
            got = attention(**rest)
        except (TypeError, ValueError) as error:
            text = str(error)
            assert "found" in text and "need" in text and "\n" not in text, error
        else:
            scale = three[0].shape[3] ** -0.5 if rest["scale"] is None else rest["scale"]
            softcap = None if rest["softcap"] is None else float(rest["softcap"])
            want = _run_reference(*three, replace(mask), float(scale), softcap)
            assert_close(got, want, atol=2e-3, rtol=2e-3)

    names = ["q", "k", "v", "k v", "q k v", "mask", "causal", "window", "doc_ids", "padding"]
    names += ["offset", "scale", "softcap", "backend"]
    at = st.integers(0, len(values) - 1)  # (printed, if one fails, and not the value)
    changes = st.dictionaries(st.sampled_from(names), at, max_size=2)
    _fuzz(check, changes=changes)


def test_bad_input_is_refused_in_one_line():
    q, k, v = _qkv(2, 4, 2, 8, 8, 16, torch.float32, "cpu", False)
    run = lambda *t, **mask: lambda: attention(*(t or (q, k, v)), mask=Mask(**mask))
    _refused(run(q, k[:, :, :4], v), "v: found shape")
    _refused(run(q, k[..., :8], v), "k: found shape")
    _refused(run(q[:, :3], k, v), "2 heads", "divides q's 3")
    _refused(run(q[0], k, v), "[B, H, S, D]")
    _refused(run(q[:, :, :0], k, v), "at least one token")
    _refused(run(q[..., :0], k[..., :0], v[..., :0]), "q: found shape [2, 4, 8, 0]", "value")
    _refused(run(q, k[:, :, :0], v[:, :, :0]), "k: found shape", "at least one token")
    _refused(run(q, k.double(), v), "float32 as q", error=TypeError)
    _refused(run(q.long(), k, v), "floating", error=TypeError)
    _refused(run(window=0), "window: found 0", "1 or more")
    _refused(run(window=2.5), "an integer", error=TypeError)
    _refused(run(window=2**70), "window", "at most")
    for offset in (2.5, True, "a"):
        _refused(run(offset=offset), "offset", "0-d tensor", error=TypeError)
    for offset in (torch.tensor(4.5), torch.tensor([4, 5])):
        _refused(run(offset=offset), "offset", "0-d tensor")
    _refused(run(causal=1), "causal", error=TypeError)
    ids = torch.tensor([0, 0, 1, 1, 1, 0, 2, 2])
    _refused(run(doc_ids=ids), "doc_ids", "non-decreasing")
    _refused(run(doc_ids=ids[:4]), "doc_ids: found shape [4]", "shape [8]")
    for dtype in (torch.float32, torch.uint16, torch.complex64):
        _refused(run(doc_ids=ids.to(dtype)), "integer", error=TypeError)
    _refused(run(padding=torch.ones(2, 7, dtype=torch.bool)), "padding", "[2, 8]")
    _refused(run(padding=torch.ones(2, 8)), "torch.bool", error=TypeError)
    _refused(run(q, k[:, :, :4], v[:, :, :4], doc_ids=ids[:4].sort().values), "at most the 4 keys")
    refuse = lambda *words, **options: _refused(lambda: attention(q, k, v, **options), *words)
    refuse("scale", "more than 0", scale=-1.0)
    refuse("softcap", "more than 0", softcap=0)
    refuse("'flax'", "flex, sdpa", backend="flax")
    refuse("sdpa_flash names a CUDA kernel", backend="sdpa_flash")
    refuse("SDPA has no softcap", backend="sdpa", softcap=3.0)
    _refused(lambda: attention(q, k, v, mask=None), "a Mask", error=TypeError)
    prepared = Mask(window=3).prepare(q, k)
    short = lambda: attention(q[:, :, :4], k, v, mask=prepared)
    _refused(short, "prepared for 8 queries and 8 keys", "4 queries and 8 keys")
    grad = [t.clone().requires_grad_() for t in (q, k, v)]
    _refused(lambda: attention(*grad, backend="flex"), "no backward on CPUs")
    _refused(lambda: supports("flax", q, k, v, Mask()), "'flax'")
    for name in ("varlen", "flash_attn", "xformers"):
        assert supports(name, q, k, v, Mask()), name
    half = [t.half() for t in (q, k, v)]
    assert supports("flex", *half, Mask()) is None and supports("flex", q, k, v, Mask()) is None
    assert "float64" in supports("flex", *(t.double() for t in (q, k, v)), Mask())
    _refused(lambda: tune(q, k, v, Mask()), "a GPU")
    _refused(lambda: register(backend="flax"), "'flax'")


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
        path = Path(folder, "made", "flex_attn.json")
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
            assert code == 0 or err[0].startswith(f"flex_attn: {words}"), err
            assert out[-1].startswith(f"RESULT flex_attn {'FAIL' if code else 'PASS'} checks=")
            assert [p.name for p in path.parent.iterdir()] == ([] if code else [path.name])
        for words, *args in (
            ("--only: found lama, need some of causal", "--bench", "--only", "lama"),
            ("--fuzz: found 0, need 1 case or more", "--test", "--fuzz", 0),
            (f"--seed: found {2**64}, need 64 bits", "--test", "--seed", 2**64),
            (f"--plot, --json: found the directory {folder}, need a file", "--json", folder),
            (f"{path}: found ", "--plot", path / "a.png"),
        ):
            code, out, err = _main(*args, _self_test=unittest.mock.Mock(return_value=(0, 7)))
            assert code == 2 and len(err) == 1 and err[0].startswith(f"flex_attn: {words}"), err


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


def _stand_ins(dim=64, size=300, k_len=None, inside=True, grad=True, dtype=torch.float16):
    """What the choice of a backend asks of q, k and v on a GPU; no GPU is needed for it."""
    strides = (3, 1, 2, 0) if inside else (3, 2, 1, 0)
    device = torch.device("cuda", 0)
    given = {"is_cuda": True, "requires_grad": grad, "dtype": dtype, "device": device}
    given["stride"] = strides.__getitem__
    lengths = size, k_len or size, k_len or size
    return (types.SimpleNamespace(**given, shape=(2, 4, length, dim)) for length in lengths)


def test_auto_on_hopper():
    """The rules, with flash-attn 4, 2 and without."""
    ids, long = torch.arange(300) // 100, torch.arange(4000) // 2000
    real = torch.ones(2, 300, dtype=torch.bool)
    cases = [  # mask, softcap, stand-ins, with flash-attn 4, without
        (Mask(), None, {}, "flash_attn", "sdpa"),
        (Mask(), None, {"grad": False}, "flash_attn", "sdpa"),
        (Mask(), None, {"dim": 80}, "sdpa", "sdpa"),
        (Mask(causal=False), None, {}, "sdpa", "sdpa"),
        (Mask(window=9), None, {}, "flash_attn", "triton"),
        (Mask(window=9), None, {"size": 100}, "sdpa", "sdpa"),
        (Mask(causal=False, window=9), None, {}, "triton", "triton"),
        (Mask(doc_ids=ids), None, {}, "triton", "triton"),
        (Mask(doc_ids=ids), None, {"inside": False}, "triton", "triton"),
        (Mask(doc_ids=long), None, {"size": 4000}, "flash_attn", "triton"),
        (Mask(doc_ids=long), None, {"size": 4000, "inside": False}, "triton", "triton"),
        (Mask(doc_ids=ids), None, {"dim": 20}, "flex", "flex"),
        (Mask(doc_ids=ids), None, {"dtype": torch.float32}, "flex", "flex"),
        (Mask(padding=real), None, {}, "triton", "triton"),
        (Mask(), 30.0, {"dim": 256}, "flash_attn", "triton"),
        (Mask(), 30.0, {"size": 100}, "triton", "triton"),
        (Mask(), None, {"k_len": 900}, "flash_attn", "triton"),
        (Mask(causal=False), None, {"k_len": 900}, "sdpa", "sdpa"),
    ]
    with unittest.mock.patch(__name__ + "._capability", return_value=(9, 0)):
        for version in (4, 2, 0):
            flash = unittest.mock.patch(__name__ + "._flash", return_value=(version, "none", None))
            with flash:
                for mask, softcap, more, with_4, without in cases:
                    chosen = _choose(*_stand_ins(**more), mask, softcap)
                    assert chosen == (with_4 if version == 4 else without), (mask, version, chosen)


def test_auto_before_ampere_is_sdpa_and_says_so_once():
    """As on a T4."""
    q, k, v = _stand_ins()
    ids = torch.zeros(300, dtype=torch.int64)
    _say.cache_clear()
    with unittest.mock.patch(__name__ + "._capability", return_value=(7, 5)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(3):
                assert _choose(q, k, v, Mask(window=5, doc_ids=ids), None) == "sdpa"
                assert _choose(q, k, v, Mask(), None) == "sdpa"
                assert _choose(q, k, v, Mask(), 30.0) == "reference"
        assert len(said) == 2 and "dense mask" in str(said[0].message), said
        assert "7" in _unable("varlen", q, k, v, Mask(), None) or not _varlen()[0]
        assert "8.0" in _unable("flex", q, k, v, Mask(), None)
        assert "9.0" in _unable("triton", q, k, v, Mask(), None)
    _say.cache_clear()


def _inside_a_compiled_caller(kind, softcap, name):
    """fullgraph and dynamic: no break, few graphs, prepared masks not built again."""
    device = _device()
    backend = "inductor" if device == "cuda" else "aot_eager"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def layer(x, mask):
        q, k, v = (x.unflatten(-1, (3, 4, 16)).unbind(2)[i].transpose(1, 2) for i in range(3))
        out = attention(q, k, v, mask=mask, softcap=softcap, backend=name)
        return out.transpose(1, 2).flatten(2)

    torch._dynamo.reset()
    before = _count_graphs()
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for turn, size in enumerate((140, 300, 512)):
        x = torch.randn(2, size, 192, device=device, dtype=dtype, requires_grad=True)
        mask = _some_mask(kind, 2, size, size, device, turn)
        if turn % 2:
            like = torch.empty(2, 4, size, 16, device=device, dtype=dtype)
            mask = mask.prepare(like, like)
        got = compiled(x, mask)
        got.float().square().sum().backward()
        x2 = x.detach().requires_grad_()
        want = layer(x2, mask)
        want.float().square().sum().backward()
        close = {"atol": 2e-2, "rtol": 2e-2} if device == "cuda" else {"atol": 1e-4, "rtol": 1e-4}
        assert_close(got, want, **close)
        assert_close(x.grad, x2.grad, **close)
    assert _count_graphs() - before <= 8 and not torch._dynamo.utils.counters["graph_break"]


CALLED = ("causal", None), ("documents", None), ("window", 3.0), ("padding left", None)


def test_inside_a_compiled_caller():
    for kind, softcap in CALLED:
        _inside_a_compiled_caller(kind, softcap, "auto")


def test_gpu_kernels_inside_a_compiled_caller():
    """What auto does not take for them (and on a CPU flex is not for compiled callers)."""
    _needs_gpu()
    like = torch.empty(2, 4, 140, 16, device="cuda", dtype=torch.bfloat16)
    if supports("triton", like, like, like, Mask()) is None:
        _inside_a_compiled_caller("causal", None, "triton")
    for kind, softcap in CALLED[:2]:
        _inside_a_compiled_caller(kind, softcap, "flex")


def test_gpu_softcap_and_padding_inside_a_compiled_caller():
    _needs_gpu()
    for kind, softcap in CALLED[2:]:
        _inside_a_compiled_caller(kind, softcap, "flex")


def test_autocast_casts_as_for_sdpa():
    """Rotary embeddings leave q and k in float32 beside v in bfloat16, in every Trainer(bf16)."""
    device = _device()
    q, k, v = _qkv(2, 4, 2, 60, 60, 16, torch.float32, device)
    mask = Mask(window=9)
    backends = ("auto", "reference", *(("triton", "flex") if device == "cuda" else ()))
    backends = [name for name in backends if name != "triton" or _capability(0) == (9, 0)]
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for backend, run in itertools.product(backends, (attention, compiled)):
        with torch.autocast(device, torch.bfloat16):
            assert supports("sdpa", q, k, v.bfloat16(), mask) is None
            out = run(q, k, v.bfloat16(), mask=mask, backend=backend)
        low = [t.detach().bfloat16().requires_grad_() for t in (q, k, v)]
        want = attention(*low, mask=mask, backend=backend)
        assert out.dtype == torch.bfloat16, backend
        assert torch.equal(out, want) if run is attention else _error(out, want) < 1e-2, backend
        grads = torch.autograd.grad(out.float().sin().sum(), (q, k, v))
        wants = torch.autograd.grad(want.float().sin().sum(), low)
        for grad, other in zip(grads, wants, strict=True):
            assert grad.dtype == torch.float32 and _error(grad, other) < 2e-2, backend


def test_evaluation_then_training():
    """What a mask lowers to in inference mode cannot be saved for a backward pass."""
    device = _device()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs = _qkv(2, 4, 2, 140, 140, 16, dtype, device)
    masks = [Mask(window=9), _some_mask("all", 2, 140, 140, device)]
    backends = ("sdpa", "auto", "flex", "triton")[: 4 if device == "cuda" else 2]
    for mask, backend in itertools.product(masks, backends):
        if backend != "auto" and supports(backend, *(t.detach() for t in inputs), mask):
            continue
        PLAIN.clear()
        with torch.inference_mode():
            want = attention(*inputs, mask=mask, backend=backend)
        if backend == "auto" or supports(backend, *inputs, mask) is None:
            out = attention(*inputs, mask=mask, backend=backend)
            assert_close(out, want.clone())
            out.sum().backward()
    mask, build = Mask(doc_ids=torch.arange(140) // 9), unittest.mock.Mock(return_value=_build)
    with unittest.mock.patch(__name__ + "._compiled_build", build):
        for mode in (True, False):
            with torch.inference_mode(mode):
                lowered = _lower(mask, *(torch.empty(1, 1, 140, 16) for _ in range(2)))
            assert lowered.lo.is_inference() == mode


def test_activation_checkpointing():
    device = _device()
    mask = _some_mask("documents", 2, 300, 300, device)
    run = lambda q, k, v: attention(q * 1.5, k, v, mask=mask)
    for dtype in (torch.float32, torch.bfloat16)[: 2 if device == "cuda" else 1]:  # flex, triton
        q, k, v = _qkv(2, 4, 2, 300, 300, 32, dtype, device)
        want = torch.autograd.grad(run(q, k, v).square().sum(), (q, k, v))
        for reentrant in (False, True):
            checkpoint(run, q, k, v, use_reentrant=reentrant).square().sum().backward()
            for t, b in zip((q, k, v), want, strict=True):
                assert_close(t.grad, b)
                t.grad = None


def _model(name, implementation, dtype=torch.float32, device="cpu", layers=2):
    import transformers as tf

    common = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
    }
    common |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    common |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    configs = {
        "llama": lambda: tf.LlamaConfig(**common),
        "qwen2": lambda: tf.Qwen2Config(**common),
        "mistral": lambda: tf.MistralConfig(**common, sliding_window=16),
        "gemma2": lambda: tf.Gemma2Config(
            **common,
            head_dim=16,
            sliding_window=16,
            attn_logit_softcapping=5.0,
            query_pre_attn_scalar=16,
        ),
    }
    config = configs[name]()
    torch.manual_seed(1)
    with torch.device(device):
        model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    model.to(device=device, dtype=dtype)
    for p in model.parameters():  # larger than its initialisation, so that masks and caps matter
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.15)
    return model


def _text_ids(batch, size, device="cpu", seed=0):
    text = "".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    data = torch.tensor(list(text.encode("latin-1", "replace")), device=device)
    starts = torch.randint(
        0, len(data) - size, (batch,), generator=torch.Generator().manual_seed(seed)
    )
    return torch.stack([data[s : s + size] for s in starts])


def _restarting(lengths, batch, device):
    """Position ids [batch, tokens] of documents of these lengths, packed."""
    return torch.cat([torch.arange(n) for n in lengths])[None].expand(batch, -1).to(device)


def test_transformers_models_equal_eager():
    """Logits and gradients; packed by position ids; padded; generated tokens."""
    register()
    device = _device()
    for name in ("llama", "qwen2", "mistral", "gemma2"):
        eager, ours = (_model(name, way, device=device) for way in ("eager", "flex_attn"))
        ours.load_state_dict(eager.state_dict())
        ids = _text_ids(2, 200, device)
        restart = _restarting((70, 1, 129), 2, device)
        left = torch.ones_like(ids)
        left[1, :50] = 0
        for more in ({}, {"position_ids": restart}, {"attention_mask": left}):
            real = more.get("attention_mask", torch.ones_like(ids)).bool()
            grads = []
            for model in (eager, ours):
                model.zero_grad()
                logits = model(ids, use_cache=False, **more).logits
                loss = F.cross_entropy(logits[:, :-1][real[:, :-1]], ids[:, 1:][real[:, :-1]])
                loss.backward()
                grads.append((logits[real], [p.grad for p in model.parameters()]))
            close = (
                {"atol": 2e-3, "rtol": 2e-3} if device == "cuda" else {"atol": 2e-4, "rtol": 1e-3}
            )
            assert_close(grads[1][0], grads[0][0], **close, msg=lambda m, n=name: f"{n}: {m}")
            for a, b in zip(grads[1][1], grads[0][1], strict=True):
                error = (a - b).norm() / b.norm().clamp(min=1e-6)
                assert error < (5e-3 if device == "cuda" else 1e-4), (name, error)
            with torch.autocast(device, torch.bfloat16):  # float32 weights: mixed precision
                low = [model(ids, use_cache=False, **more).logits for model in (ours, eager)]
            error = _error(low[0][real], low[1][real])
            assert error < 3e-2, (name, error)
        for cache in ("dynamic", "static"):
            short = {"input_ids": ids[:, :40], "attention_mask": left[:, 30:70], "do_sample": False}
            short |= {"max_new_tokens": 12, "cache_implementation": cache, "disable_compile": True}
            short |= {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
            a, b = (model.eval().generate(**short) for model in (eager, ours))
            assert torch.equal(a.sequences, b.sequences), (name, cache)
            close = {"atol": 5e-3, "rtol": 5e-3}
            assert_close(torch.stack(a.logits), torch.stack(b.logits), **close)
    dropout = _model("llama", "flex_attn")
    dropout.train().model.layers[0].self_attn.attention_dropout = 0.1
    _refused(lambda: dropout(torch.ones(1, 5, dtype=torch.long)), "dropout")


def test_fuzz_masks_equal_those_of_transformers():
    """As SDPA's for every creator of masks: packed, padded, sliding, after a cache."""
    import transformers as tf
    from hypothesis import strategies as st
    from transformers import masking_utils

    register()
    names = "causal", "sliding_window_causal", "bidirectional", "bidirectional_sliding_window"
    config = tf.LlamaConfig(num_hidden_layers=1)

    def check(name, batch, size, past, longer, lengths, padding, window):
        config.sliding_window = window
        cache, real, position, more = None, None, None, {}
        if name.endswith("causal"):
            more["allow_is_causal_skip"] = False
            if past:
                cache = tf.DynamicCache()
                cache.update(*torch.zeros(2, batch, 1, past, 8), 0)
            position = (torch.arange(size) + past)[None]
            if lengths:  # packed
                position = _restarting(lengths, 1, "cpu")[:, :size]
                more["position_ids"] = F.pad(position, (0, size - position.shape[1]))
        seen = size + past * (cache is not None)
        if padding is not None:
            generator = torch.Generator().manual_seed(padding)
            real = torch.rand(batch, seen + longer * (cache is None), generator=generator) < 0.7
        make = getattr(masking_utils, f"create_{name}_mask")
        sizes, masks = torch.empty(batch, size, 8), []
        for way in ("flex_attn", "sdpa"):
            config._attn_implementation = way
            given = {"attention_mask": None if real is None else real.long(), **more}
            masks.append(make(config, sizes, past_key_values=cache, **given))
        ours, theirs = masks
        k_len = seen if real is None else real.shape[1]
        q, k = torch.empty(batch, 1, size, 8), torch.empty(batch, 1, k_len, 8)
        sees = dense_mask(ours, q, k).expand(batch, -1, -1, -1)
        if theirs is None:  # all see all
            theirs = torch.ones_like(sees)
        if real is not None:  # of queries that are padding only ours sees nothing
            at = torch.arange(size) + (past if cache is not None else 0)
            theirs = theirs & real[:, at][:, None, :, None]
        assert torch.equal(sees, theirs.expand(batch, -1, -1, -1)), (ours, theirs)

    _fuzz(
        check,
        name=st.sampled_from(names),
        batch=st.integers(1, 3),
        size=st.integers(1, 30),
        past=st.sampled_from((0, 0, 1, 9)),
        longer=st.sampled_from((0, 0, 5)),
        lengths=st.lists(st.integers(1, 9), max_size=6),
        padding=st.none() | st.integers(0, 2**31),
        window=st.integers(1, 33),
    )


def test_compiled_decoding_with_a_static_cache():
    """As generate() does on GPUs by itself: a graph or two for all tokens, eager's tokens."""
    from transformers.generation import CompileConfig

    full = Mask(padding=torch.ones(2, 9, dtype=torch.bool), offset=torch.tensor(8))
    like = torch.empty(2, 1, 1, 16), torch.empty(2, 1, 9, 16)
    assert _ready(full, *like) is full  # or the token that fills the cache would be compiled anew
    register()
    device = _device()
    how = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    how._compile_all_devices = True
    for name in ("llama", "gemma2"):
        torch._dynamo.reset()
        eager, ours = (_model(name, way, device=device).eval() for way in ("eager", "flex_attn"))
        ours.load_state_dict(eager.state_dict())
        ids = _text_ids(2, 40, device)
        more = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "do_sample": False}
        want = eager.generate(ids, **more, eos_token_id=None)
        before = _count_graphs()
        static = {"cache_implementation": "static", "compile_config": how, "eos_token_id": None}
        assert torch.equal(ours.generate(ids, **more, **static), want), name
        made = _count_graphs() - before  # for 10 tokens: the last fills gemma2's sliding cache
        flex = 4 if device == "cuda" and name == "gemma2" else 0  # kernels and tables, each twice
        assert 1 <= made <= 2 + flex, f"{name}: {made} graphs"


def test_a_packed_batch_has_each_documents_own_loss():
    register()
    device = _device()
    model = _model("gemma2", "flex_attn", device=device)
    lengths = [5, 1, 90, 33, 2, 60]
    ids = _text_ids(1, sum(lengths), device)
    position = _restarting(lengths, 1, device)
    packed = model(ids, position_ids=position, use_cache=False).logits[0].split(lengths)
    for logits, own in zip(packed, ids[0].split(lengths), strict=True):
        alone = model(own[None], use_cache=False).logits[0]
        loss = lambda t, own=own: F.cross_entropy(t[:-1], own[1:], reduction="sum")
        assert_close(loss(logits), loss(alone), atol=2e-2 if device == "cuda" else 1e-3, rtol=1e-4)
        assert_close(logits, alone, atol=5e-3, rtol=5e-3)


def test_blocks_compiled_one_by_one():
    """Layers of a transformers model under torch.compile: one graph for all of a kind."""
    register()
    device = _device()
    model = _model("gemma2", "flex_attn", device=device, layers=4)
    plain = _model("gemma2", "flex_attn", device=device, layers=4)
    backend = "inductor" if device == "cuda" else "aot_eager"
    for layer in model.model.layers:
        layer.compile(backend=backend, fullgraph=True, dynamic=True)
    torch._dynamo.reset()
    before = _count_graphs()
    for size in (200, 333, 260, 512):
        ids = _text_ids(2, size, device)
        position = _restarting((150, size - 150), 2, device)
        logits = model(ids, position_ids=position, use_cache=False).logits
        logits.float().logsumexp(-1).mean().backward()
        want = plain(ids, position_ids=position, use_cache=False).logits
        assert_close(logits, want, atol=5e-3, rtol=5e-3)
    made = _count_graphs() - before
    print(f"graphs for 4 layers of two kinds: {made}")
    # lengths that are whole blocks and others, window or not; and two of the block tables
    assert made <= 6 and not torch._dynamo.utils.counters["graph_break"]


def _whole_model_compiled(name, dtype):
    """fullgraph and dynamic: two graphs for all lengths, one of them for packed batches."""
    register()
    device = _device()
    backend = "inductor" if device == "cuda" else "aot_eager"
    torch._dynamo.reset()
    layers = 2 if name == "gemma2" else 1  # (that has two kinds)
    model, plain = (_model(name, "flex_attn", dtype, device, layers) for _ in range(2))
    atol, most = (5e-3, 1e-2) if dtype == torch.float32 else (5e-2, 5e-2)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    made = 0
    for size in (150, 257):
        ids = _text_ids(2, size, device)
        position = _restarting((60, size - 60), 2, device)
        for more in ({}, {"position_ids": position}):
            grads = []
            for run, owner in ((compiled, model), (plain, plain)):
                owner.zero_grad()
                before = _count_graphs()
                logits = run(ids, use_cache=False, **more).logits
                logits.float().logsumexp(-1).mean().backward()
                grads.append((logits, owner.model.layers[0].self_attn.q_proj.weight.grad))
                made += _count_graphs() - before if owner is model else 0
            assert_close(grads[0][0], grads[1][0], atol=atol, rtol=atol)
            error = _error(grads[0][1], grads[1][1])
            assert error < most, (name, dtype, size, error)
    tables = 2 if device == "cuda" else 0  # of documents, and with softcap of none
    assert made <= 2 + tables, f"{name}: {made} graphs"


def test_whole_model_compiled():
    _whole_model_compiled("llama", torch.float32)


def test_whole_model_of_two_kinds_of_layers_compiled():
    _whole_model_compiled("gemma2", torch.float32)


def test_gpu_whole_model_compiled_in_low_precision():
    """Through this file's Triton kernels on Hopper; in float32 it is FlexAttention."""
    _needs_gpu()
    _whole_model_compiled("gemma2", torch.bfloat16)


def _equals_float64(backends, kinds=KINDS):
    """Over kinds of mask, with and without softcap: how often each backend ran."""
    ran = {name: 0 for name in backends}
    shapes = itertools.cycle(((333, 333), (256, 256), (1, 200), (77, 300), (200, 200)))
    half, brain = torch.float16, torch.bfloat16
    turns = (64, half, True), (128, brain, True), (80, half, False), (256, brain, True)
    turns = itertools.cycle((*turns, (96, brain, False), (128, half, False), (256, half, False)))
    for turn, kind in enumerate(KINDS):
        (q_len, k_len), (dim, dtype, inside) = next(shapes), next(turns)
        if kind not in kinds:
            continue
        inputs = _qkv(2, 4, 2, q_len, k_len, dim, dtype, "cuda", True, inside)
        mask = _some_mask(kind, 2, q_len, k_len, "cuda", seed=7)
        capped = (None, 2.0) if turn % 3 == 0 else (None,)
        for backend, softcap in itertools.product(backends, capped):
            if backend != "auto" and supports(backend, *inputs, mask, softcap):
                continue
            _compare(backend, inputs, mask, softcap=softcap)
            ran[backend] += 1
    print(ran)
    return ran


def test_gpu_flex_equals_float64_at_every_head_size():
    _needs_gpu()
    assert _equals_float64(["flex"], [*KINDS][:8])["flex"]


def test_gpu_flex_equals_float64_with_padding():
    _needs_gpu()
    assert _equals_float64(["flex"], [*KINDS][8:])["flex"]


def test_gpu_every_other_backend_equals_float64():
    _needs_gpu()
    ran = _equals_float64(["auto", *(name for name in BACKENDS if name != "flex")])
    found = {"varlen": _varlen()[0], "flash_attn": _flash()[0], "xformers": _xformers()[0]}
    idle = [name for name, n in ran.items() if not n and found.get(name, True)]
    assert not idle, f"never ran: {idle}"
    # more queries than keys, a stream of its own
    for backend in ("triton", "flex", "sdpa", "varlen"):
        inputs = _qkv(1, 2, 2, 300, 150, 64, torch.bfloat16, "cuda")
        if supports(backend, *inputs, Mask()) is None:
            _compare(backend, inputs, Mask())
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            _compare(backend, _qkv(2, 4, 2, 500, 500, 64, torch.bfloat16, "cuda"), Mask(window=9))
        torch.cuda.current_stream().wait_stream(stream)


def test_gpu_streams_do_not_share_what_is_queued():
    """What a mask lowers to on a busy stream is not there yet for another one."""
    _needs_gpu()
    inputs = _qkv(2, 4, 2, 400, 400, 64, torch.bfloat16, "cuda", False)
    backends = "triton", "flex", "sdpa", "varlen"
    for kind, backend in itertools.product(("window", "documents"), backends):
        mask = _some_mask(kind, 2, 400, 400, "cuda")
        if supports(backend, *inputs, mask):  # (and doc_ids are checked, which waits)
            continue
        attention(*inputs, mask=replace(mask), backend=backend)  # compiles
        PLAIN.clear()
        torch.cuda.synchronize()
        busy = torch.cuda.Stream()
        with torch.cuda.stream(busy):
            torch.cuda._sleep(10**9)
            late = attention(*inputs, mask=mask, backend=backend)
        out = attention(*inputs, mask=mask, backend=backend)
        torch.cuda.current_stream().synchronize()
        soon = not busy.query()
        torch.cuda.synchronize()
        assert torch.equal(out, late) and (soon or backend == "varlen"), (kind, backend)


def test_models_on_two_gpus():
    """Replicated by DataParallel, or split by a device_map: padded, packed, windows and softcap."""
    _needs_gpu(2)
    from accelerate import dispatch_model

    register()
    ids = _text_ids(4, 200, "cuda")
    real = (torch.arange(200) < torch.tensor([[200], [90], [150], [1]])).cuda()
    restart = _restarting((70, 1, 129), 4, "cuda")
    second = "model.layers.1", "model.norm"
    first = "model.embed_tokens", "model.rotary_emb", "model.layers.0", "lm_head"
    split = dict.fromkeys(first, 0) | dict.fromkeys(second, 1)
    ways = lambda m: m, torch.nn.DataParallel, lambda m: dispatch_model(m.cpu(), split)
    for name, more in itertools.product(
        ("gemma2", "mistral"), ({"attention_mask": real}, {"position_ids": restart})
    ):
        results = []
        for way in ways:
            model = _model(name, "flex_attn", device="cuda")
            logits = way(model)(ids, use_cache=False, **more).logits.to("cuda:0")
            kept = logits[real] if "attention_mask" in more else logits
            kept.logsumexp(-1).mean().backward()
            results.append([kept.detach(), *(p.grad.cpu() for p in model.parameters())])
        for got in results[1:]:
            for a, b in zip(got, results[0], strict=True):
                assert (a - b).norm() <= 5e-3 * b.norm() + 1e-6, name
    inputs = _qkv(2, 4, 2, 300, 300, 64, torch.bfloat16, "cuda")
    other = [t.detach().to("cuda:1").requires_grad_() for t in inputs]  # not the current device
    for mask in (Mask(), Mask(window=9)):
        here, there = (attention(*ts, mask=mask, backend="triton") for ts in (inputs, other))
        grads = [torch.autograd.grad(out.sum(), ts) for out, ts in ((here, inputs), (there, other))]
        for a, b in zip((here, *grads[0]), (there, *grads[1]), strict=True):
            assert torch.equal(a.cpu(), b.cpu())


def test_gpu_large():
    """2^31 elements in q: 64 heads, 262144 tokens, head size 128; rows compared one by one."""
    _needs_gpu()
    size = 2**18
    q, k, v = _qkv(1, 64, 1, size, size, 128, torch.bfloat16, "cuda", False)
    ids = torch.arange(size, device="cuda") // 777
    mask = Mask(window=300, doc_ids=ids)
    for backend in ("flex", "triton"):
        if supports(backend, q, k, v, mask):
            continue
        out = attention(q, k, v, mask=mask, backend=backend)
        assert out.numel() >= 2**31
        for row in (0, 776, 777, 123_456, size - 1):
            keys = slice(max(row // 777 * 777, row - 299), row + 1)
            few = q[:, -3:, row : row + 1], k[:, :, keys], v[:, :, keys]
            want = _run_reference(*few, Mask(), 128**-0.5, None)
            assert_close(out[:, -3:, row : row + 1], want, atol=2e-2, rtol=2e-2)
    if supports("triton", q, k, v, mask) is None:  # gradients of the last row
        few = [t.clone().requires_grad_() for t in few]
        _run_reference(*few, Mask(), 128**-0.5, None).sum().backward()
        wide = [t.requires_grad_() for t in (q, k, v)]
        out = attention(*wide, mask=mask, backend="triton")
        grads = torch.autograd.grad(out[:, -3:, -1].sum(), wide)
        assert_close(grads[0][:, -3:, -1:], few[0].grad, atol=2e-2, rtol=2e-2)
        assert not grads[0][:, :-3].any() and not grads[0][:, :, :-1].any()
        for got, want in zip(grads[1:], (few[1].grad, few[2].grad), strict=True):
            assert_close(got[:, :, keys], want, atol=2e-2, rtol=2e-2)
            assert not got[:, :, : keys.start].any()


def test_gpu_tune_keeps_its_choice(tmp_path):
    _needs_gpu()
    key = _capability(0), 64, "rows"
    before = TUNED.get(key)
    path = tmp_path / "tiles.json"
    inputs = _qkv(1, 4, 2, 1024, 1024, 64, torch.bfloat16, "cuda")
    mask = Mask(window=200)
    try:
        chosen = tune(*inputs, mask, path=str(path))
        assert TUNED[key] == chosen and json.loads(path.read_text())
        TUNED.pop(key)
        with unittest.mock.patch(__name__ + ".do_bench", side_effect=AssertionError):
            assert tune(*inputs, mask, path=str(path)) == chosen
        _compare("flex", inputs, mask)
    finally:
        TUNED[key] = before
        if before is None:
            TUNED.pop(key)


# --------------------------------------------------------------------------------------------------
# Timings


def _torch_flex(mask, q, k):
    """FlexAttention as its documentation has it: static shapes, a mask_mod, create_block_mask."""
    if mask.doc_ids is not None:
        ids = mask.doc_ids
        mask_mod = lambda b, h, i, j: (i >= j) & (ids[i] == ids[j])
    elif mask.window is not None:
        window = mask.window
        mask_mod = lambda b, h, i, j: (i >= j) & (i - j < window)
    else:
        mask_mod = lambda b, h, i, j: i >= j
    blocks = create_block_mask(mask_mod, None, None, q.shape[2], k.shape[2], device=q.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v, score: compiled(
        q, k, v, score_mod=score, block_mask=blocks, enable_gqa=True
    )


def _wall_ms(run, device=True):
    """Host and device, or the host alone until it has queued everything."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device and torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def _turns(runs, turns=5, time_ms=40):
    """Median ms on the device, in shuffled turns: a chip's heat and clock then hit all alike.

    Of the buffer that do_bench clears before a call 4 GiB are made, 1 ms on an H200: the device
    is then behind the host, as in training, where other layers fill the queue. With its 256 MB a
    slow host's gaps were in the times of documents (0.9 ms of work): 0.87 to 1.06 ms.
    """
    times, order = {name: [] for name in runs}, random.Random(torch.initial_seed())
    buffer = functools.partial(torch.empty, 2**32, dtype=torch.uint8, device="cuda")
    driver = triton.runtime.driver.active
    with unittest.mock.patch.object(driver, "get_empty_cache_for_benchmark", buffer):
        for _ in range(turns):
            for name in order.sample(list(runs), len(runs)):
                times[name].append(do_bench(runs[name], 10, time_ms, return_mode="median"))
    return {name: statistics.median(laps) for name, laps in times.items()}


KINDS_TIMED = ("causal", "window", "documents")  # on a CPU these alone
SHAPE = (4, 32, 8, 4096, 128)  # sequences, heads of q, heads of k and v, tokens, head size


def _mask_of(kind, size, device="cuda"):
    """The three kinds of mask that are timed, and their names."""
    at, window, length = torch.arange(size, device=device), size // 4, size // 8
    masks = {"causal": ("causal", Mask()), "window": (f"window {window}", Mask(window=window))}
    return masks.get(kind) or (f"documents of {length}", Mask(doc_ids=at // length))


def _bench_shape(words, mask, results, shape=SHAPE, softcap=None, inside=False):
    """One mask at one shape: every way checked against the others, then timed in turns."""
    batch, heads, kv_heads, size, dim = shape
    _fresh()
    inputs = _qkv(batch, heads, kv_heads, size, size, dim, torch.bfloat16, "cuda", True, inside)
    grad = torch.randn_like(inputs[0])
    ways = {}
    names = "auto", "triton", "flex", "sdpa_cudnn", "sdpa_flash"
    for name in (*names, "varlen", "flash_attn", "xformers"):
        if name == "auto" or supports(name, *inputs, mask, softcap) is None:
            if name.startswith("sdpa") and not mask.plain:
                continue
            ways[name] = functools.partial(attention, mask=mask, softcap=softcap, backend=name)
    theirs = _torch_flex(mask, *inputs[:2])
    score = lambda s, b, h, i, j: softcap * torch.tanh(s / softcap)
    ways["torch's flex"] = lambda *t: theirs(*t, None if softcap is None else score)
    if not mask.plain and softcap is None:
        sees = dense_mask(mask, *inputs[:2])
        ways["SDPA, dense mask"] = lambda *t: F.scaled_dot_product_attention(
            *t, attn_mask=sees, enable_gqa=True
        )
    with torch.no_grad():
        want = ways["torch's flex"](*inputs)
        for name, way in ways.items():
            error = _error(way(*inputs), want)
            assert error < 1e-2, f"{name} is off by {error:.1e}"

    def step(way):
        for t in inputs:
            t.grad = None
        way(*inputs).backward(grad)

    def forward(way):
        with torch.no_grad():
            way(*inputs)

    runs = lambda f: {name: functools.partial(f, way) for name, way in ways.items()}
    times = {"forward": _turns(runs(forward)), "both": _turns(runs(step))}
    lo, hi = _lower(mask, *inputs[:2])[:2]
    pairs = (hi.long() - lo + 1).clamp(min=0)[:size].sum().item()
    flop = 4 * batch * heads * dim * pairs
    chosen = _choose(*inputs, mask, softcap)
    layout = "[B, S, H, D]" if inside else "[B, H, S, D]"
    host = functools.partial(_wall_ms, runs(step)["auto"], device=False)
    host_ms = statistics.median(host() for _ in range(30))
    name = f"{words}, {batch} x {heads}/{kv_heads} x {size} x {dim}, {layout}"
    results[name] = times | {"flop": flop, "auto": chosen, "host": host_ms}
    print(f"{name} | auto: {chosen}, {host_ms:.2f} ms on the host")
    for name in ways:
        a, b = times["forward"][name], times["both"][name]
        rates = flop / a / 1e9, 3.5 * flop / b / 1e9
        ratio = times["both"]["torch's flex"] / b
        print(
            f"  {name:17} forward {a:7.3f} ms {rates[0]:4.0f} TFLOP/s | forward+backward {b:7.3f} "
            f"ms {rates[1]:4.0f} TFLOP/s | {ratio:5.2f}x torch's flex",
            flush=True,
        )
    return times["both"]


def _bench_causal(results) -> dict:
    times = _bench_shape("causal", Mask(), results)
    best = min(t for name, t in times.items() if name not in ("auto", "torch's flex"))
    ours = times["triton" if "triton" in times else "flex"]
    return {"auto_vs_best": best / times["auto"], "causal_vs_flex": times["torch's flex"] / ours}


def _bench_window(results) -> dict:
    times = _bench_shape(*_mask_of("window", SHAPE[3]), results)
    return {"window_vs_dense": times["SDPA, dense mask"] / times["auto"]}


def _bench_documents(results) -> dict:
    times = _bench_shape(*_mask_of("documents", SHAPE[3]), results)
    peers = {"flex": "torch's flex", "dense": "SDPA, dense mask"}
    return {f"documents_vs_{name}": times[peer] / times["auto"] for name, peer in peers.items()}


def _bench_layouts(results) -> dict:
    """A token's heads side by side, as projections leave them; documents of other lengths."""
    size = SHAPE[3]
    for kind in KINDS_TIMED:
        _bench_shape(*_mask_of(kind, size), results, inside=True)
    ragged = _documents(size, torch.Generator().manual_seed(1), 400).cuda()
    _bench_shape("documents of 1 to 800", Mask(doc_ids=ragged), results, inside=True)
    longer = torch.arange(size, device="cuda") // 2048
    _bench_shape("documents of 2048", Mask(doc_ids=longer), results, inside=True)
    return {}


def _bench_long(results) -> dict:
    _bench_shape("causal", Mask(), results, (1, 32, 8, 16384, 128))
    return {}


def _bench_head64(results) -> dict:
    for kind in KINDS_TIMED:
        _bench_shape(*_mask_of(kind, 4096), results, (4, 32, 8, 4096, 64), inside=True)
    return {}


def _bench_gemma(results) -> dict:
    for kind in KINDS_TIMED:
        (words, mask), softcap = _mask_of(kind, 4096), None if kind == "documents" else 50.0
        words = words if softcap is None else f"softcap {words}"
        _bench_shape(words, mask, results, (4, 16, 8, 4096, 256), softcap, inside=True)
    return {}


def _bench_blocks(results) -> dict:
    """A mask's block tables, built as often as there are batches."""
    g = torch.Generator().manual_seed(0)
    for batch, size in ((4, 4096), (1, 16384), (1, 65536)):
        q = torch.empty(batch, 1, 1, 64, device="cuda", dtype=torch.float16).expand(
            -1, -1, size, -1
        )
        ids = torch.stack([_documents(size, g, 300) for _ in range(batch)]).cuda()

        def ours(ids=ids, q=q):
            _lower(Mask(doc_ids=ids), q, q)

        theirs = torch.compile(create_block_mask)

        def torchs(ids=ids, size=size, batch=batch, theirs=theirs):
            mask_mod = lambda b, h, i, j: (i >= j) & (ids[b, i] == ids[b, j])
            theirs(mask_mod, batch, None, size, size, device="cuda")

        laps = {}
        for name, run in (("ours", ours), ("torchs", torchs)):
            run()
            laps[name] = statistics.median(_wall_ms(run) for _ in range(20))
        ratio = laps["torchs"] / laps["ours"]
        print(
            f"block tables, documents, {batch} x {size}: {laps['ours']:.3f} ms, create_block_mask "
            f"compiled {laps['torchs']:.3f} ms ({ratio:.1f}x), host and device",
            flush=True,
        )
        results[f"block tables {batch} x {size}"] = laps
    return {}


def _bench_graphs(results) -> dict:
    """Compile seconds and graphs for each kind of mask, forward and backward, over LENGTHS."""
    _fresh()
    kinds = "causal", "window", "documents", "padding right", "softcap"
    for backend, kind in itertools.product(("flex", "triton"), kinds):
        like = torch.empty(1, 1, 1, 128, device="cuda", dtype=torch.bfloat16)
        if supports(backend, like, like, like, Mask()):
            continue
        before, seconds = _count_graphs(), []
        for turn, size in enumerate(LENGTHS):
            mask = Mask() if kind == "softcap" else _some_mask(kind, 2, size, size, "cuda", turn)
            inputs = _qkv(2, 8, 2, size, size, 128, torch.bfloat16, "cuda")
            softcap = 20.0 if kind == "softcap" else None
            more = {"mask": mask, "softcap": softcap, "backend": backend}
            run = functools.partial(attention, *inputs, **more)
            seconds.append(_wall_ms(lambda run=run: run().sum().backward()) / 1e3)
        made = _count_graphs() - before
        slow = sum(s for s in seconds if s > 0.3)
        usual = statistics.median(seconds) * 1e3
        print(
            f"{len(LENGTHS)} lengths, {backend}, {kind}: {made} new graphs (block tables among "
            f"them), {slow:.1f} s in calls that compiled, median call {usual:.2f} ms",
            flush=True,
        )
        results[f"graphs {backend} {kind}"] = {"graphs": made, "compile_s": slow, "call_ms": usual}
    return {}


def _bench_packed(results) -> dict:
    """A model trained on padded and on packed batches of the same documents."""
    import transformers as tf

    register()
    config = tf.LlamaConfig(
        vocab_size=32768,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=8192,
    )
    g = torch.Generator().manual_seed(0)
    lengths = torch.randn(64, generator=g).mul(0.9).add(math.log(400)).exp().long().clamp(16, 4096)
    lengths = lengths.tolist()
    documents = [torch.randint(0, 32768, (n,), generator=g).cuda() for n in lengths]
    padded = []
    for i in range(0, 64, 8):
        rows = documents[i : i + 8]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
        padded.append({"input_ids": ids, "attention_mask": real})
    packed, row = [], []
    for document in [*documents, None]:
        if document is None or sum(map(len, row)) + len(document) > 8192:
            position = _restarting(map(len, row), 1, "cuda")
            packed.append({"input_ids": torch.cat(row)[None], "position_ids": position})
            row = []
        row.append(document)
    total = sum(lengths)

    def loss_of(model, batch):
        ids = batch["input_ids"]
        labels = ids.clone()
        if "position_ids" in batch:
            labels[batch["position_ids"] == 0] = -100
        else:
            labels[batch["attention_mask"] == 0] = -100
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")

    def epoch(model, batches):
        loss = 0.0
        for batch in batches:
            model.zero_grad()
            value = loss_of(model, batch)
            (value / total).backward()
            loss += value.detach()
        return loss

    rates, losses, build_ms = {}, {}, []
    for batch in packed:  # what register()'s masks cost a batch, before any layer
        ids = (batch["position_ids"] == 0).cumsum(1)
        q = torch.empty(1, 1, 1, 64, device="cuda", dtype=torch.float16)
        q = q.expand(-1, -1, ids.shape[1], -1)
        run = lambda ids=ids, q=q: Mask(doc_ids=ids).prepare(q, q)
        build_ms += [_wall_ms(run) for _ in range(5)]
    for way in ("flex_attn", "sdpa"):
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=way)
        model.bfloat16()
        for name, batches in (("padded", padded), ("packed", packed)):
            laps = [_wall_ms(lambda model=model, b=batches: epoch(model, b)) for _ in range(5)]
            rates[f"{way} {name}"] = total / statistics.median(laps[1:]) * 1e3
            losses[f"{way} {name}"] = (epoch(model, batches) / (total - 64)).item()
    spread = f"{min(lengths)} to {max(lengths)}, mean {total / 64:.0f}"
    share = total / sum(b["input_ids"].numel() for b in padded)
    print(
        f"training 4 layers of Llama 1B, 64 documents of {spread} tokens: padded batches of 8 "
        f"({share:.0%} real tokens) or packed rows of up to 8192"
    )
    for name, rate in rates.items():
        ratio = rate / rates["sdpa padded"]
        print(
            f"  {name:17} {rate:8.0f} tokens/s ({ratio:.2f}x), loss {losses[name]:.4f}", flush=True
        )
    step_ms = total / len(packed) / rates["flex_attn packed"] * 1e3
    build = statistics.median(build_ms)
    print(
        f"  a mask is checked and lowered once a step: {build:.2f} ms of {step_ms:.1f} ms, "
        f"{build / step_ms:.1%} of a step of 4 layers"
    )
    results["mask_of_a_step"] = {"ms": build, "step_ms": step_ms}
    assert max(losses.values()) - min(losses.values()) < 2e-3 * max(losses.values()), losses
    results["packed"] = {"tokens_per_s": rates, "loss": losses, "lengths": lengths}
    return {"packed_vs_padded": rates["flex_attn packed"] / rates["flex_attn padded"]}


TIMINGS = {"causal": _bench_causal, "window": _bench_window, "documents": _bench_documents}
TIMINGS |= {"layouts": _bench_layouts, "long": _bench_long, "head64": _bench_head64}
TIMINGS |= {"gemma": _bench_gemma, "blocks": _bench_blocks, "graphs": _bench_graphs}
TIMINGS |= {"packed": _bench_packed}
USUAL = (*KINDS_TIMED, "packed")  # by default
UNDRAWN = ("blocks", "graphs", "packed")  # no times of backends to draw


def bench_gpu(results, names) -> dict:
    """TIMINGS by name; each adds its records to results, headline figures are returned."""
    head = {}
    for name in names:
        head |= TIMINGS[name](results)
    return head


def bench_cpu(results, names) -> dict:
    """The kinds of mask by name, small and forward alone: FlexAttention has no backward here."""
    batch, heads, kv_heads, size, dim = shape = 1, 8, 2, 1024, 64
    inputs, ratios = _qkv(*shape[:3], size, size, dim, torch.float32, "cpu", False), []
    for kind in names:
        words, mask = _mask_of(kind, size, "cpu")
        want, ways = _run_reference(*inputs, mask, dim**-0.5, None), {}
        for name in ("auto", "sdpa_math", "flex", "reference"):
            ways[name] = functools.partial(attention, mask=mask, backend=name)
        sees = dense_mask(mask, *inputs[:2])
        ways["SDPA, dense mask"] = functools.partial(
            F.scaled_dot_product_attention, attn_mask=sees, enable_gqa=True
        )
        times = {}
        for name, way in ways.items():
            assert_close(way(*inputs), want, msg=lambda m, n=name: f"{n}: {m}")
            run = functools.partial(way, *inputs)
            times[name] = statistics.median(_wall_ms(run) for _ in range(7))
        name = f"{words}, {batch} x {heads}/{kv_heads} x {size} x {dim}, float32"
        results[name] = {"forward": times, "auto": _choose(*inputs, mask, None)}
        each = (f"{n} {t:.1f} ms ({t / times['auto']:.2f}x)" for n, t in times.items())
        print(f"{name}, forward | {' | '.join(each)}", flush=True)
        ratios.append(times["reference"] / times["auto"])
    return {"auto_vs_reference": statistics.geometric_mean(ratios)}


def plot(results, path):
    """What was timed, as a PNG: ms by mask and backend, forward + backward (GPU) or forward."""
    from matplotlib.figure import Figure

    shapes = {name: record for name, record in results.items() if "auto" in record}
    which = "both" if all("both" in record for record in shapes.values()) else "forward"
    bars = []  # of each shape: ms by backend, with auto's choice instead of auto
    for record in shapes.values():
        others = {name: t for name, t in record[which].items() if name != "auto"}
        bars.append({record["auto"]: record[which]["auto"]} | others)
    names = (*BACKENDS, "torch's flex", "SDPA, dense mask")
    names = [name for name in names if any(name in times for times in bars)]
    figure = Figure((max(9, 3 + 0.33 * sum(map(len, bars))), 5), layout="constrained", dpi=150)
    axes, at, middles = figure.subplots(), 0, []
    for times, record in zip(bars, shapes.values(), strict=True):
        for name in (name for name in names if name in times):
            chosen, color = name == record["auto"], f"C{names.index(name)}"
            edge = {"edgecolor": "black" if chosen else color, "linewidth": 1.5}
            bar = axes.bar(at, times[name], 0.85, color=color, **edge)
            words = f"{times[name]:.3g}" + chosen * "  auto"
            axes.bar_label(bar, [words], rotation=90, padding=3, fontsize=8)
            at += 1
        middles.append(at - (len(times) + 1) / 2)
        at += 1
    axes.set_xticks(middles, [name.replace(", ", "\n", 2) for name in shapes])
    axes.set(ylabel="ms forward + backward" if which == "both" else "ms forward")
    axes.margins(y=0.15)
    device = torch.cuda.get_device_name() if which == "both" else "CPU"
    axes.set_title(f"Attention by mask and backend, {device} (auto: what backend='auto' takes)")
    handles = [axes.bar(0, 0, color=f"C{i}") for i in range(len(names))]
    figure.legend(handles, names, loc="outside right center")
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
    sys.modules["flex_attn"] = sys.modules[__name__]  # or pytest would import a second one
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
    option("--test", action="store_true", help="the self-test alone")
    option("--bench", action="store_true", help="the timings alone")
    option("--fuzz", type=int, metavar="N", help="the random tests alone, with N cases each")
    names = f"of {', '.join(TIMINGS)} (default: {','.join(USUAL)})"
    option("--only", metavar="NAMES", help=f"{names}; on a CPU {', '.join(KINDS_TIMED)} alone")
    option("--seed", type=int, default=0, help="of timings and --fuzz (default: 0)")
    option("--plot", metavar="PATH", help="times by kind of mask as PNG (needs matplotlib)")
    option("--json", metavar="PATH", help="also write the results as JSON")
    return parser


def main(argv=None) -> int:
    parser = _parser()
    args, gpu = parser.parse_args(argv), _device() == "cuda"
    tests = args.test or args.fuzz or not args.bench
    times = args.bench or not (args.test or args.fuzz)
    if not times and (args.plot or args.only):
        parser.error("--plot and --only are for the timings")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = {"torch": torch.__version__.split("+")[0], "triton": triton.__version__}
    versions |= {"cuda": torch.version.cuda, "seed": args.seed}
    print("flex_attn", device, *(f"{k} {v}" for k, v in versions.items()), sep=" | ", flush=True)
    if device != "CPU" and not gpu:
        print(f"flex_attn: found {device}, need compute capability 8.0: everything on the CPU")
    results, head, code, checks = {}, {}, 0, 0
    known = TIMINGS if gpu else KINDS_TIMED
    names = args.only.split(",") if args.only else [name for name in USUAL if name in known]
    try:
        _need(args.fuzz is None or args.fuzz > 0, "--fuzz", args.fuzz, "1 case or more")
        _need(abs(args.seed) < 2**63, "--seed", args.seed, "64 bits")
        torch.manual_seed(args.seed)
        for name in names:
            _need(name in known, "--only", name, f"some of {', '.join(known)}")
        drawn = any(name not in UNDRAWN for name in names)
        _need(drawn or not args.plot, "--plot", args.only, "a timing of backends among --only")
        _check_paths(args.plot, args.json)  # what is written last is looked at first
        if args.plot:
            import matplotlib  # noqa: F401
        if tests:
            code, checks = _self_test(args.fuzz, args.seed)
        if times and not code:
            head = (bench_gpu if gpu else bench_cpu)(results, names)
            if args.plot:
                plot(results, args.plot)
        if args.json:
            found = {"device": device, **versions, **results, **head}
            _write(args.json, lambda part: part.write_text(json.dumps(found, indent=1)))
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 (a traceback if unforeseen)
        code, words = _explain(error)
        print(f"flex_attn: {words}" if words else traceback.format_exc(), file=sys.stderr)
    figures = " ".join(f"{k}={v:.2f}x" for k, v in head.items())
    print(f"RESULT flex_attn {'FAIL' if code else 'PASS'} checks={checks} {figures}".rstrip())
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, INTERRUPT)
    sys.exit(main())
