"""Bits, changes, errors, torch.compile, the patch and machine code of nf4_triton.py.

Where a GPU is needed, CPUs run the same Python with a stand-in for the GPU: tensors that say they
are on one, and launches that Triton's interpreter carries out at the addresses that are launched.
"""

import concurrent.futures
import copy
import ctypes
import functools
import gc
import itertools
import json
import math
import random
import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import ClassVar

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from bitsandbytes.functional import QuantState
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpretedFunction

import nf4_triton
from bench.common import instructions, resources
from bench.nf4_triton import print_storage, print_target, qlora_model, qlora_step
from nf4_triton import (
    DTYPES,
    NF4,
    compile_kernel,
    dequantize_nf4,
    interpret,
    patch_bitsandbytes,
    same_bits,
)

HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32
STORAGES = (torch.uint8, BF16, HALF, FULL)
BLOCKS = [2**k for k in range(5, 13)]
CHIPS = (75, 80, 89, 90, 100)


def random_nf4(seed, shape, dtype, blocksize=64, blocksize2=256, storage=torch.uint8, device="cpu"):
    """(weight, QuantState; flat if blocksize2 is 0) of random codes and scales, of sizes that fp16
    holds, rounds to subnormals or overflows with."""
    rng, numel = torch.Generator().manual_seed(seed), math.prod(shape)
    blocks, state2, offset = -(-numel // blocksize), None, None
    nbytes = -(-numel // (2 * storage.itemsize)) * storage.itemsize
    weight = torch.randint(256, (nbytes,), dtype=torch.uint8, generator=rng)
    absmax = torch.rand(blocks, generator=rng) * 10.0 ** (seed % 11 - 6)
    if blocksize2:
        absmax2, code2 = absmax[: -(-blocks // blocksize2)], torch.rand(256, generator=rng) * 2 - 1
        state2 = QuantState(absmax2.to(device), None, code2.to(device), blocksize2, dtype=FULL)
        offset = absmax.mean().to(device)
        absmax = torch.randint(256, (blocks,), dtype=torch.uint8, generator=rng)
    shape, absmax = torch.Size(shape), absmax.to(device)
    code = torch.tensor(NF4, device=device)
    state = QuantState(absmax, shape, code, blocksize, "nf4", dtype, offset, state2)
    return weight.to(device).view(storage)[:, None], state


def numpy_values(weight, state):
    """What a weight holds, by numpy, sharing nothing with the script but the 16 levels."""
    packed = weight.detach().cpu().flatten().view(torch.uint8).numpy()
    codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1)[: math.prod(state.shape)]
    scale = state.absmax.cpu().numpy()
    if state.state2 is not None:
        scale2, size2 = state.state2.absmax.cpu().numpy(), state.state2.blocksize
        product = state.state2.code.cpu().numpy()[scale] * scale2[np.arange(len(scale)) // size2]
        scale = product + np.float32(float(state.offset))  # two roundings
    each = scale[np.arange(len(codes)) // state.blocksize]
    with np.errstate(invalid="ignore"):  # infinity times 0
        values = np.array(NF4, np.float32)[codes] * each
    return torch.from_numpy(values).to(state.dtype).view(state.shape).to(weight.device)


def cases(count):
    """Arguments of random_nf4 that mix every kind of size, block, nesting and storage."""
    numels = (1, 2, 7, 8, 63, 64, 65, 2047, 2048, 4095, 4096, 4097, 8192, 12288)
    for seed in range(count):
        pick = random.Random(seed).choice
        numel = pick(numels)
        shapes = [(numel,), (1, numel), (3, numel), (numel, 64)]
        shape = pick(shapes if numel < 99 else shapes[:2])
        blocksize2 = pick([0, 0, 256, 256, 1, 3, 100, 4096])
        yield seed, shape, pick(list(DTYPES)), pick(BLOCKS), blocksize2, pick(STORAGES)


# ---- A stand-in for the GPU


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True

    def get_device(self):
        return 0


def on_gpu(weight, state):
    state.absmax = state.absmax.as_subclass(OnGpu)
    if state.state2 is not None:
        state.offset = state.offset.as_subclass(OnGpu)
    return weight.as_subclass(OnGpu), state


def at(address, count, dtype):
    if count == 0:
        return torch.empty(0, dtype=dtype)
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype, count=count)


class EmulatedKernel:
    """A CompiledKernel that Triton's interpreter runs at the addresses it is launched with."""

    function = packed_metadata = None

    def __init__(self, sm, dtype, blocksize, blocksize2, words, warps, ragged):
        self.constants = blocksize, blocksize2, words, ragged, 0
        self.dtype = {name: dtype for dtype, name in DTYPES.items()}[dtype]

    def run(self, programs, y, z, stream, function, metadata, enter, leave, launch, *arguments):
        weight, absmax, code2, absmax2, offset, out, numel = arguments[:7]
        blocksize, blocksize2, _words, ragged, _ = self.constants
        blocks, packed = -(-numel // blocksize), -(-numel // 2)
        assert ragged or not any(address % 16 for address in arguments[:6])
        codes = at(weight, packed, torch.uint8) if ragged else at(weight, packed // 4, torch.int32)
        scales = at(absmax, blocks, torch.uint8 if blocksize2 else FULL)
        tensors = [codes, scales, *[torch.zeros(1)] * 3, at(out, numel, self.dtype)]
        if blocksize2:
            scales2 = at(absmax2, -(-blocks // blocksize2), FULL)
            tensors[2:5] = at(code2, 256, FULL), scales2, at(offset, 1, FULL)
        kernel = InterpretedFunction(nf4_triton._nf4_kernel.fn)[(programs,)]
        if programs == 0:  # as Triton's launcher
            return
        kernel(*tensors, numel, *self.constants)


@pytest.fixture
def emulated(monkeypatch):
    """Launches on OnGpu tensors run in the interpreter. Gives what was compiled."""
    compiled = []

    def load(*variant):
        compiled.append(variant)
        return EmulatedKernel(*variant)

    def empty(shape, strides, dtype):
        return torch.full((math.prod(shape),), math.nan, dtype=dtype).as_strided(shape, strides)

    monkeypatch.setattr(nf4_triton, "compile_kernel", load)
    monkeypatch.setattr(nf4_triton, "_current_device", lambda: 0)
    monkeypatch.setattr(nf4_triton, "_current_stream", lambda index: 0)
    monkeypatch.setattr(nf4_triton, "_empty_strided", empty)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (9, 0))
    for cached in (nf4_triton._plan, nf4_triton._few_rows):
        cached.cache_clear()
    yield compiled
    for cached in (nf4_triton._plan, nf4_triton._few_rows):
        cached.cache_clear()


@pytest.fixture
def pair_on_gpu(request):
    """Makes (weight, state) pairs on a GPU, or on its stand-in where there is none."""
    if torch.cuda.is_available():
        return functools.partial(random_nf4, device="cuda")
    request.getfixturevalue("emulated")
    return lambda *arguments: on_gpu(*random_nf4(*arguments))


# ---- Bits


@pytest.mark.parametrize("case", list(cases(100)), ids=lambda case: str(case[0]))
def test_kernel_bits_in_interpreter(case):
    weight, state = random_nf4(*case)
    words = (32, 64, 256)[case[0] % 3]
    ragged = math.prod(state.shape) % (words * 8) != 0 or case[0] % 2 == 0
    assert same_bits(interpret(weight, state, words, ragged), numpy_values(weight, state))


def test_bf16_ties_are_rounded_to_even():
    ties = (torch.arange(64, dtype=torch.int32) * 0x8000 + 0x3F800000).view(FULL)
    ones = torch.full((2048, 1), 255, dtype=torch.uint8)  # code 15 is 1.0
    state = QuantState(ties, torch.Size((4096,)), torch.tensor(NF4), 64, "nf4", BF16)
    assert same_bits(interpret(ones, state, 64, False), numpy_values(ones, state))


@given(
    seed=st.integers(0, 2**31),
    shape=st.lists(st.integers(1, 5000), min_size=1, max_size=3)
    .map(tuple)
    .filter(lambda shape: math.prod(shape) <= 5000),
    dtype=st.sampled_from(list(DTYPES)),
    blocksize=st.sampled_from(BLOCKS),
    blocksize2=st.sampled_from((0, 1, 2, 3, 7, 100, 256, 4096)),
    storage=st.sampled_from(STORAGES),
    words=st.sampled_from((32, 64, 256)),
    ragged=st.booleans(),
)
def test_fuzz_kernel_in_interpreter(words, ragged, **case):
    weight, state = random_nf4(**case)
    ragged = ragged or math.prod(state.shape) % (words * 8) != 0
    want = numpy_values(weight, state)
    assert same_bits(interpret(weight, state, words, ragged), want)
    if len(weight) > 1 or want.dim() < 3:  # one byte counts as transposed
        assert same_bits(dequantize_nf4(weight, state), want.t() if len(weight) == 1 else want)


@given(
    shape=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    dtype=st.sampled_from(list(DTYPES)),
    blocksize=st.sampled_from(BLOCKS[1:]),
    nested=st.booleans(),
    storage=st.sampled_from(STORAGES),
    scale=st.sampled_from((1e-4, 0.02, 1.0, 300.0)),
    seed=st.integers(0, 2**31),
    given_out=st.booleans(),
    transposed=st.booleans(),
)
def test_fuzz_equals_bitsandbytes(
    shape, dtype, blocksize, nested, storage, scale, seed, given_out, transposed
):
    """Any weight that bitsandbytes quantises."""
    gpu = torch.cuda.is_available()
    if not gpu and dtype == BF16:
        dtype = FULL  # its CPU code rounds bf16 otherwise
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    weight = weight.to("cuda" if gpu else "cpu", dtype)
    packed, state = bnb.functional.quantize_4bit(weight, None, None, blocksize, nested, "nf4")
    plain = copy.copy(state)
    if not gpu:  # its CPU code begins a block with each row that ends inside one
        plain.shape = torch.Size((1, weight.numel()))
    want = bnb.functional.dequantize_4bit(packed, plain).view(shape)
    if len(packed) % storage.itemsize == 0:  # else bitsandbytes cannot store it so
        packed = packed.flatten().view(storage)[:, None]
    out = torch.empty_like(want) if given_out else None
    packed = packed.t() if transposed else packed
    if packed.shape[0] == 1:  # what bitsandbytes too takes for a transposed weight
        want, out = want.t(), None
    got = dequantize_nf4(packed, state, out)
    assert same_bits(got, want) and (out is None or got is out)


@pytest.mark.parametrize("case", list(cases(40)), ids=lambda case: str(case[0]))
def test_launch_writes_the_bits(case, pair_on_gpu):
    """Through the launch: the addresses, the variants, out= and transposed weights."""
    weight, state = pair_on_gpu(*case)
    want = numpy_values(weight, state)
    space = torch.full((want.numel() + 17,), math.nan, dtype=state.dtype, device=weight.device)
    for shift in (0, 1, 8):
        out = space[shift : shift + want.numel()].view(want.shape)
        assert dequantize_nf4(weight.view(-1, 1), state, out).data_ptr() == out.data_ptr()
        assert same_bits(out, want)
        assert space.isnan().sum() == 17 + want.isnan().sum()
        space.fill_(math.nan)
    for view in (weight, weight.t(), weight):
        got = dequantize_nf4(view, state)
        assert same_bits(got, want.t() if view.shape[0] == 1 else want)
        assert got.stride() == (want.t() if view.shape[0] == 1 else want).stride()
    moved = torch.cat([weight[:1], weight])[1:]  # a view that is not 16-byte aligned
    turned = want.t() if len(weight) == 1 else want
    assert same_bits(dequantize_nf4(moved, state), turned)
    assert same_bits(dequantize_nf4(weight, state, dtype=FULL).to(state.dtype), turned)


@pytest.mark.parametrize("shape", [(0,), (0, 64), (64, 0)])
def test_empty_weights(shape, pair_on_gpu):
    for state_dtype, blocksize2 in itertools.product(DTYPES, (0, 256)):
        weight, state = pair_on_gpu(0, shape, state_dtype, 64, blocksize2)
        got = dequantize_nf4(weight, state)
        assert got.shape == shape and got.dtype == state_dtype


def test_infinite_and_nan_scales(pair_on_gpu):
    for special in (math.inf, math.nan):
        weight, state = pair_on_gpu(6, (64, 64), BF16, 64, 0)
        state.absmax[::2] = special
        got, want = dequantize_nf4(weight, state), numpy_values(weight, state)
        torch.testing.assert_close(
            got.as_subclass(torch.Tensor), want, rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize(
    "old", [float, lambda t: t.reshape(1), torch.Tensor.double, torch.Tensor.cpu]
)
def test_offsets_of_old_checkpoints(old, pair_on_gpu):
    for make in (random_nf4, pair_on_gpu):
        weight, state = make(1, (4, 64), FULL)
        want = numpy_values(weight, state)
        state.offset = old(state.offset)
        assert same_bits(dequantize_nf4(weight, state), want)


def test_reference_equals_bitsandbytes_on_cpu():
    rng = torch.Generator().manual_seed(0)
    for rows, dtype in ((96, FULL), (64, HALF), (33, FULL)):
        for blocksize, nested in ((64, True), (64, False), (128, True), (1024, False)):
            weight = torch.randn(rows, 130, generator=rng).to(dtype)
            packed, state = bnb.functional.quantize_4bit(
                weight, None, None, blocksize, nested, "nf4"
            )
            want = bnb.functional.dequantize_4bit(packed, state)
            out = torch.empty_like(want)
            assert dequantize_nf4(packed, state, out) is out and same_bits(out, want)
            assert same_bits(dequantize_nf4(packed.t(), state), want.t())


# ---- What changes after a call, and what does not fit together

TENSORS = "weight", "absmax", "offset", "state2.code", "state2.absmax"
FIELDS = [
    ("blocksize", 128),
    ("blocksize", 32),
    ("blocksize", 0),
    ("blocksize", 48),
    ("quant_type", "fp4"),
    ("dtype", BF16),
    ("dtype", torch.float64),
    ("shape", torch.Size((32, 128))),
    ("shape", torch.Size((63, 64))),
    ("shape", torch.Size((65, 64))),
    ("state2.blocksize", 32),
    ("state2.blocksize", 512),
    ("state2", None),
    ("absmax", torch.zeros(32, dtype=torch.uint8)),
    ("absmax", torch.zeros(64)),
    ("state2.absmax", torch.zeros(2)),
]
RIGHT = {("dtype", BF16), ("shape", torch.Size((32, 128))), ("state2.blocksize", 512)}


def change(weight, state, name, value):
    holder = state.state2 if name.startswith("state2.") else state
    setattr(holder, name.split(".")[-1], value)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("how", ["data", "object", "in place"])
def test_another_address_is_read(name, how, pair_on_gpu):
    """After two calls a tensor's memory is replaced; the old one is overwritten."""
    weight, state = pair_on_gpu(6, (64, 64), HALF)
    other_weight, other = pair_on_gpu(7, (64, 64), HALF)
    before = [dequantize_nf4(weight, state) for _ in range(2)][1].clone()
    holder, field = (state.state2 if "." in name else state), name.split(".")[-1]
    old = weight if name == "weight" else getattr(holder, field)
    new = (
        other_weight if name == "weight" else getattr(other.state2 if "." in name else other, field)
    )
    if how == "in place":
        old.copy_(new)
    elif how == "data":
        former = old.detach().clone().set_(old.untyped_storage())
        old.data = new
        former.zero_()
    elif name == "weight":
        weight = new
    else:
        setattr(holder, field, new)
    want = numpy_values(weight, state)
    assert not same_bits(want, before)
    assert same_bits(dequantize_nf4(weight, state), want)
    out = torch.empty_like(want)
    assert same_bits(dequantize_nf4(weight, state, out), want) and same_bits(out, want)


@pytest.mark.parametrize(("name", "value"), FIELDS)
def test_another_number_is_noticed(name, value, pair_on_gpu):
    for make in (random_nf4, pair_on_gpu):
        weight, state = make(6, (64, 64), HALF)
        dequantize_nf4(weight, state)
        if isinstance(value, torch.Tensor):
            old = getattr(state.state2 if "." in name else state, name.split(".")[-1])
            value = value.to(weight.device).as_subclass(type(old))
        change(weight, state, name, value)
        if (name, value) in RIGHT:
            assert same_bits(dequantize_nf4(weight, state), numpy_values(weight, state))
        else:
            with pytest.raises(ValueError, match="found"):
                dequantize_nf4(weight, state)


@given(
    field=st.sampled_from(
        ["absmax", "shape", "blocksize", "quant_type", "dtype", "state2.blocksize"]
    ),
    value=st.sampled_from(
        [-64, 0, 1, 63, 64, 128, 4096, 2**40, "nf4", "fp4", torch.Size(), torch.Size((8, 64))]
        + [torch.Size((4, 128)), torch.Size((8, 63)), HALF, FULL, torch.float64]
        + [torch.zeros(7), torch.zeros(8), torch.zeros(8).byte(), torch.zeros(9, 1).byte()]
    ),
    seed=st.integers(0, 99),
)
def test_fuzz_broken_states(field, value, seed):
    """Another field: the bits for what the state then says, by numpy, or an error."""
    weight, state = random_nf4(seed, (8, 64), HALF)
    change(weight, state, field, value)
    try:
        got = dequantize_nf4(weight, state)
    except (ValueError, TypeError, AttributeError, RuntimeError):
        return
    assert same_bits(got, numpy_values(weight, state))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (
            "quant_state",
            None,
            "quant_type: found None, need 'nf4' (None: call layer.to(...) first)",
        ),
        ("quant_type", "fp4", "quant_type: found 'fp4', need 'nf4'"),
        ("packing_format_for_cpu", True, "weight: found bitsandbytes' packing for CPUs"),
        (
            "dtype",
            torch.float64,
            "dtype: found torch.float64, need one of torch.float16, torch.bfloat16",
        ),
        ("blocksize", 48, "blocksize: found 48, need 32 or 64"),
        ("shape", (9, 64), "weight.nbytes: found 256, need 288 or 289 or 290 or 291"),
        ("shape", (7, 64), "weight.nbytes: found 256, need 224"),
        ("absmax", torch.zeros(7).byte(), "absmax.nbytes: found 7, need 8 for a weight of (8, 64)"),
        ("absmax", torch.zeros(8), "absmax.nbytes: found 32, need 8"),
        ("absmax", torch.zeros(8).byte().to("meta"), "absmax: found it on meta, need it on cpu"),
        ("weight", torch.zeros(256, 2).byte()[:, :1], "weight.is_contiguous(): found False"),
        (
            "out",
            torch.zeros(8, 63),
            "out (shape, dtype, ...): found ((8, 63), torch.f",
        ),
        (
            "out",
            torch.zeros(8, 64),
            "out (shape, dtype, ...): found ((8, 64), torch.f",
        ),
        (
            "out",
            torch.zeros(64, 8, dtype=HALF).t(),
            "out (shape, dtype, ...): found",
        ),
    ],
)
def test_errors_say_what_was_found_and_needed(name, value, words):
    weight, state = random_nf4(0, (8, 64), HALF)
    arguments = {"weight": weight, "quant_state": state}
    if name in ("weight", "quant_state", "out"):
        arguments[name] = value
    else:
        setattr(state, name, value)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        dequantize_nf4(**arguments)
    assert "\n" not in str(caught.value)


def test_nothing_of_a_weight_is_kept(pair_on_gpu):
    """Another weight of the shape takes the same cached launch, which keeps no state alive."""
    weight, state = pair_on_gpu(6, (64, 64), HALF)
    dequantize_nf4(weight, state)
    misses, alive = nf4_triton._plan.cache_info().misses, weakref.ref(state)
    del weight, state
    gc.collect()
    assert alive() is None
    weight, state = pair_on_gpu(7, (64, 64), HALF)
    assert same_bits(dequantize_nf4(weight, state), numpy_values(weight, state))
    assert nf4_triton._plan.cache_info().misses == misses


# ---- The operator: torch.compile, dispatch modes, reloads


@pytest.mark.parametrize("options", [{"backend": "aot_eager"}, {}, {"mode": "reduce-overhead"}])
def test_compile_makes_one_graph_for_weights_of_a_shape(options, device):
    if options and "mode" in options and device == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    double = torch.compile(lambda w, s: dequantize_nf4(w, s) * 2, fullgraph=True, **options)
    pairs = [random_nf4(seed, (96, 128), BF16, device=device) for seed in (5, 6, 7)]
    for weight, state in pairs * 3:
        assert same_bits(double(weight, state).clone(), numpy_values(weight, state) * 2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    into = torch.compile(dequantize_nf4, fullgraph=True, **options)
    out, want = torch.empty(96, 128, dtype=BF16, device=device), numpy_values(*pairs[0])
    assert same_bits(into(*pairs[0], out), want) and same_bits(out, want)


def test_compiled_linear4bit_weight(device):
    """The weight of a layer is a tensor subclass."""
    layer = bnb.nn.Linear4bit(128, 64, bias=None, compute_dtype=HALF, quant_type="nf4").to(device)
    compiled = torch.compile(lambda w: dequantize_nf4(w, w.quant_state), fullgraph=True)
    want = numpy_values(layer.weight, layer.weight.quant_state)
    assert same_bits(compiled(layer.weight), want)


class Log(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_every_call_is_seen_by_dispatch_modes(pair_on_gpu):
    """Not only a thread's first: selective checkpointing and flop counters depend on it."""
    weight, state = pair_on_gpu(6, (64, 64), HALF)
    dequantize_nf4(weight, state)
    for out in (None, torch.empty(64, 64, dtype=HALF, device=weight.device)):
        with Log() as log:
            for _ in range(3):
                dequantize_nf4(weight, state, out)
        assert log.names.count("nf4_triton.dequantize.default") == 3


def test_selective_checkpointing_keeps_the_decoded_weight(device):
    weight, state = random_nf4(6, (64, 64), FULL, device=device)
    x, calls = torch.randn(4, 64, device=device, requires_grad=True), []

    def policy(context, operator, *args, **kwargs):
        calls.append(str(operator))
        save = operator is torch.ops.nf4_triton.dequantize.default
        kinds = torch.utils.checkpoint.CheckpointPolicy
        return kinds.MUST_SAVE if save else kinds.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    step = lambda x: F.linear(x, dequantize_nf4(weight, state)).sin()
    checkpoint(step, x, use_reentrant=False, context_fn=contexts).sum().backward()
    assert "nf4_triton.dequantize.default" in calls
    want = torch.autograd.grad(step(x).sum(), x)[0]
    torch.testing.assert_close(x.grad, want)


class Sharded(OnGpu):
    """A tensor that handles operators itself, as DTensor does: its address means nothing."""

    seen: ClassVar[list] = []
    inner = None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        return func(*(cls.inner if isinstance(a, cls) else a for a in args), **(kwargs or {}))


def test_subclasses_that_handle_operators_get_the_operator(emulated):
    weight, state = on_gpu(*random_nf4(6, (64, 64), HALF))
    want = numpy_values(weight, state)
    Sharded.inner = weight.as_subclass(torch.Tensor)
    weight = torch.Tensor._make_subclass(Sharded, Sharded.inner)
    state.absmax = state.absmax.as_subclass(torch.Tensor)
    assert same_bits(dequantize_nf4(weight, state), want)
    assert "nf4_triton.dequantize.default" in Sharded.seen


def test_fake_and_meta_tensors():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        weight, state = random_nf4(0, (8, 64), HALF)
        got = dequantize_nf4(weight, state)
    for found in (got, dequantize_nf4(weight, state)):  # within and outside of the mode
        assert type(found).__name__ == "FakeTensor"
        assert found.shape == (8, 64) and found.dtype == HALF
    weight, state = random_nf4(0, (8, 64), BF16, device="meta")
    assert dequantize_nf4(weight, state).device.type == "meta"


RERUNS = """
import importlib, shutil, sys, torch
import bitsandbytes as bnb
from tests.test_nf4_triton import HALF, nf4_triton, numpy_values, random_nf4, same_bits

path, folder = nf4_triton.__file__, sys.argv[1]
shutil.copy(path, folder + "/other_name.py")
sys.path.insert(0, folder)
stock, first = bnb.matmul_4bit, nf4_triton.dequantize_nf4
weight, state = random_nf4(6, (64, 64), HALF)
want = numpy_values(weight, state)

def check(names):
    assert same_bits(names["dequantize_nf4"](weight, state), want)
    assert same_bits(first(weight, state), want)
    names["patch_bitsandbytes"]()  # as a cell that is run again does, never undone
    assert bnb.matmul_4bit is names["_matmul_4bit"] and bnb.matmul_4bit.original is stock

check(vars(importlib.reload(nf4_triton)))  # importlib.reload
torch.set_default_dtype(torch.bfloat16)  # as code around it may
state.offset, want = float(state.offset), numpy_values(weight, state)
cell = {"__name__": "notebook"}
code = compile(open(path).read(), path, "exec")
for _ in range(2):  # a notebook's cell
    with torch.device("meta"):
        exec(code, cell)
    check(cell)
check(vars(importlib.import_module("other_name")))  # a second copy beside the first
newest = bnb.matmul_4bit
for old in [*nf4_triton.patch_bitsandbytes.active]:
    old.undo()  # of an import that another has patched over
assert bnb.matmul_4bit is newest
del sys.modules["nf4_triton"]
check(vars(importlib.import_module("nf4_triton")))  # imported anew
patch = nf4_triton.patch_bitsandbytes()
print("all well")
"""


def test_the_script_may_be_run_again(tmp_path):
    """In a process of its own, whose operator and patch end up in the last copy's hands."""
    command = [sys.executable, "-c", RERUNS, str(tmp_path)]
    root = Path(nf4_triton.__file__).parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "all well" in done.stdout, done.stderr


# ---- The patch


def test_amd_is_left_to_bitsandbytes(layer, monkeypatch):
    weight, state, _ = layer
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(
        nf4_triton, "dequantize_nf4", lambda *a, **k: pytest.fail("it was not left")
    )
    x, plain = rows(99, layer), weight.as_subclass(torch.Tensor)
    with patch_bitsandbytes():
        y = bnb.matmul_4bit(x, weight, state)
        bnb.functional.dequantize_4bit(weight, state)
    want = x.detach().as_subclass(torch.Tensor) @ numpy_values(plain, state).t()
    torch.testing.assert_close(y.as_subclass(torch.Tensor), want, rtol=1e-4, atol=1e-4)


def test_a_bias_alone_needs_no_weight_in_backward(monkeypatch):
    (weight, state), calls = random_nf4(6, (48, 64), FULL), []
    ours = nf4_triton.dequantize_nf4
    monkeypatch.setattr(
        nf4_triton, "dequantize_nf4", lambda *a, **k: calls.append(a) or ours(*a, **k)
    )
    bias = torch.zeros(48, requires_grad=True)
    nf4_triton._Linear4bit.apply(torch.randn(5, 64), weight, bias, state).sum().backward()
    assert len(calls) == 1 and torch.equal(bias.grad, torch.full((48,), 5.0))


def test_linear4bit_gradients():
    (weight, state), rng = random_nf4(6, (48, 64), FULL), torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=rng) for shape in ((2, 5, 64), (48,), (2, 5, 48))]
    x, bias, upstream = (t.double().requires_grad_() for t in tensors)
    want = F.linear(x, numpy_values(weight, state).double(), bias)
    wants = want, *torch.autograd.grad(want, (x, bias), upstream)
    x, bias, upstream = (t.requires_grad_() for t in tensors)
    y = nf4_triton._Linear4bit.apply(x, weight, bias, state)
    for got, want in zip((y, *torch.autograd.grad(y, (x, bias), upstream)), wants, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.fixture
def layer(request):
    """A Linear4bit's parts: (weight, state, bias), on a GPU or its stand-in."""
    rng = torch.Generator().manual_seed(0)
    dense, bias = torch.randn(96, 64, generator=rng), torch.randn(96, generator=rng)
    if torch.cuda.is_available():
        dense, bias = dense.cuda(), bias.cuda()
    packed, state = bnb.functional.quantize_4bit(dense, None, None, 64, True, "nf4")
    if torch.cuda.is_available():
        return packed, state, bias
    request.getfixturevalue("emulated")
    return *on_gpu(packed, state), bias


def rows(count, layer, dtype=FULL):
    x = torch.randn(count, 64, generator=torch.Generator().manual_seed(count)).to(dtype)
    return x.to(layer[0].device).as_subclass(type(layer[0])).requires_grad_()


@pytest.mark.parametrize("transposed", [False, True])
def test_patched_product_is_ours_and_right(layer, transposed, monkeypatch):
    weight, state, bias = layer
    decoded, x = [], rows(33, layer)
    ours = nf4_triton.dequantize_nf4
    spy = lambda *args, **kwargs: decoded.append(kwargs["dtype"]) or ours(*args, **kwargs)
    monkeypatch.setattr(nf4_triton, "dequantize_nf4", spy)
    with patch_bitsandbytes():
        y = bnb.matmul_4bit(x, weight.t() if transposed else weight, state, bias=bias)
        y.backward(torch.ones_like(y))
    assert decoded == [FULL, FULL]  # forward and backward
    w, x64 = numpy_values(weight, state).double(), x.detach().double().as_subclass(torch.Tensor)
    want = x64 @ w.t() + bias.double()
    torch.testing.assert_close(y.double().as_subclass(torch.Tensor), want, rtol=1e-5, atol=1e-4)
    want = torch.ones_like(want) @ w
    torch.testing.assert_close(
        x.grad.double().as_subclass(torch.Tensor), want, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("count", [1, 4, 32])
def test_few_rows_go_to_bitsandbytes(layer, count, monkeypatch):
    weight, state, bias = layer
    refuse = lambda *args: pytest.fail("a product of few rows was not left to bitsandbytes")
    monkeypatch.setattr(nf4_triton._Linear4bit, "apply", refuse)
    x = rows(count, layer)
    with patch_bitsandbytes():
        y = bnb.matmul_4bit(x, weight, state, bias=bias)
    want = x.detach().double() @ numpy_values(weight, state).double().t() + bias.double()
    want = want.as_subclass(torch.Tensor)
    torch.testing.assert_close(y.double().as_subclass(torch.Tensor), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", [BF16, HALF])
@pytest.mark.parametrize("dtype", [FULL, BF16])
def test_autocast_decodes_into_what_the_product_uses(layer, kind, dtype, monkeypatch):
    weight, state, bias = layer
    decoded, x = [], rows(64, layer, dtype)
    ours = nf4_triton.dequantize_nf4

    def spy(*args, **kwargs):
        decoded.append(kwargs["dtype"])
        return ours(*args, **kwargs)

    monkeypatch.setattr(nf4_triton, "dequantize_nf4", spy)
    on, before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)  # what torch.autocast does, where there is a GPU
    torch.set_autocast_dtype("cuda", kind)
    try:
        with patch_bitsandbytes():
            y = bnb.matmul_4bit(x, weight, state, bias=bias)
    finally:
        torch.set_autocast_enabled("cuda", on)
        torch.set_autocast_dtype("cuda", before)
    y.sum().backward()
    assert decoded == [kind, kind] and y.dtype == kind and x.grad.dtype == dtype
    w = numpy_values(weight, state).to(kind).double()
    want = x.detach().to(kind).double().as_subclass(torch.Tensor) @ w.t() + bias.to(kind).double()
    eps = torch.finfo(kind).eps
    error = (y.double().as_subclass(torch.Tensor) - want).norm() / want.norm()
    assert error < 2 * eps


def test_patched_dequantize_4bit_gives_our_bits(layer, monkeypatch):
    """What PEFT's merges and bitsandbytes' own backward call."""
    from peft.utils.integrations import dequantize_bnb_weight

    weight, state, _ = layer
    want = numpy_values(weight, state)
    calls, ours = [], nf4_triton.dequantize_nf4
    monkeypatch.setattr(nf4_triton, "dequantize_nf4", lambda *a: calls.append(a) or ours(*a))
    with patch_bitsandbytes():
        out = torch.empty_like(want)
        assert same_bits(bnb.functional.dequantize_4bit(weight, state), want)
        assert same_bits(bnb.functional.dequantize_4bit(weight, state, out=out), want)
        assert same_bits(bnb.functional.dequantize_4bit(weight, state, None, out), want)
        assert same_bits(bnb.functional.dequantize_4bit(weight.t(), quant_state=state), want.t())
        assert same_bits(out, want) and len(calls) == 4
        if torch.cuda.is_available():
            layer = bnb.nn.Linear4bit(64, 96, bias=None, quant_type="nf4").to("cuda")
            want = numpy_values(layer.weight, layer.weight.quant_state)
            assert same_bits(dequantize_bnb_weight(layer.weight), want) and len(calls) == 5


def test_what_the_patch_leaves_to_bitsandbytes(layer, monkeypatch):
    """CPU tensors, FP4, float64, out=, weights quantised as [K, N]: its own results."""
    refuse = lambda *args, **kwargs: pytest.fail("this was for bitsandbytes")
    dense = torch.randn(96, 64)
    x = torch.randn(40, 64)
    for kind, dtype in (("nf4", FULL), ("fp4", FULL), ("nf4", HALF)):
        packed, state = bnb.functional.quantize_4bit(dense.to(dtype), None, None, 64, True, kind)
        want = bnb.matmul_4bit(x.to(dtype), packed, state)
        decoded = bnb.functional.dequantize_4bit(packed, state)
        with patch_bitsandbytes(), monkeypatch.context() as patch:
            patch.setattr(nf4_triton, "dequantize_nf4", refuse)
            assert torch.equal(bnb.matmul_4bit(x.to(dtype), packed, state), want)
            assert torch.equal(bnb.functional.dequantize_4bit(packed, state), decoded)
    with patch_bitsandbytes(), pytest.raises(ValueError, match="quant_state is required"):
        bnb.matmul_4bit(rows(64, layer), layer[0], None)


def functions():
    return bnb.matmul_4bit, bnb.functional.dequantize_4bit


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_patches_nest_and_are_undone_in_any_order(order):
    stock = functions()
    patches = [patch_bitsandbytes() for _ in range(3)]
    for count, index in enumerate(order):
        assert functions() == (nf4_triton._matmul_4bit, nf4_triton._dequantize_4bit)
        assert (bnb.matmul_4bit.original, bnb.functional.dequantize_4bit.original) == stock
        patches[index].undo()
        patches[index].undo()  # twice is as good as once
        assert (functions() == stock) == (count == 2)
    with patch_bitsandbytes():
        assert functions() != stock
    assert functions() == stock
    with pytest.raises(KeyError), patch_bitsandbytes():
        raise KeyError
    assert functions() == stock


def test_a_patch_that_others_have_wrapped(monkeypatch):
    """Of what wraps ours, none is lost and none is called by ours again, in whatever order."""
    calls, stock, restore = [], bnb.matmul_4bit, monkeypatch.setattr
    packed, state = bnb.functional.quantize_4bit(torch.randn(96, 64), None, None, 64, True, "nf4")
    x = torch.randn(5, 64)
    want = stock(x, packed, state)

    def wrap():
        inner = bnb.matmul_4bit
        restore(bnb, "matmul_4bit", lambda *a: calls.append(1) or inner(*a))

    def check(count):
        calls.clear()
        assert torch.equal(bnb.matmul_4bit(x, packed, state), want) and len(calls) == count

    try:
        wrap()  # before
        first = patch_bitsandbytes()
        check(1)
        wrap()
        second = patch_bitsandbytes()  # within
        check(2)
        second.undo()
        first.undo()
        check(2)  # ours, wrapped, could not go
        with patch_bitsandbytes():  # after
            check(2)
        assert bnb.functional.dequantize_4bit.__module__ == "bitsandbytes.functional"
    finally:
        nf4_triton._matmul_4bit.in_place = False


def test_a_patch_that_others_have_replaced(monkeypatch):
    stock = functions()
    with monkeypatch.context() as mock:
        mock.setattr(bnb, "matmul_4bit", stock[0])
        first = patch_bitsandbytes()
    assert bnb.matmul_4bit is stock[0]  # the mock put back what it found
    with patch_bitsandbytes():
        assert functions() == (nf4_triton._matmul_4bit, nf4_triton._dequantize_4bit)
        first.undo()
    assert functions() == stock
    with monkeypatch.context() as mock:
        mock.setattr(bnb, "matmul_4bit", stock[0])
        with patch_bitsandbytes():
            mock.undo()
    with patch_bitsandbytes():
        assert functions() == (nf4_triton._matmul_4bit, nf4_triton._dequantize_4bit)
    assert functions() == stock


def test_other_devices_are_refused():
    class OnXpu(torch.Tensor):
        device = torch.device("xpu:0")

    weight, state = random_nf4(6, (64, 64), HALF)
    with pytest.raises(ValueError, match="found it on xpu:0, need an NVIDIA GPU or a CPU"):
        dequantize_nf4(weight.as_subclass(OnXpu), state)


def test_amd_gpus_are_refused_and_their_cpus_are_not(emulated, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    weight, state = random_nf4(6, (64, 64), HALF)
    assert same_bits(dequantize_nf4(weight, state), numpy_values(weight, state))
    with pytest.raises(ValueError, match="GPU: found AMD, need NVIDIA"):
        dequantize_nf4(*on_gpu(weight, state))


def test_patched_layers_compile(layer):
    weight, state, bias = layer
    if not torch.cuda.is_available():
        pytest.skip("needs 1 GPU(s)")
    x = rows(64, layer)
    step = lambda x: bnb.matmul_4bit(x, weight, state, bias=bias).sin().sum()
    with patch_bitsandbytes():
        want = torch.autograd.grad(step(x), x)[0]
        torch._dynamo.reset()
        got = torch.autograd.grad(torch.compile(step, fullgraph=True)(x), x)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# ---- Machine code


def table_is_shuffled_where_it_is(ttgir):
    """The table depends on the lane: no layout may be converted on its way to the shuffle."""
    names = set(re.findall(r"(%\w+) = tt.elementwise_inline_asm [^\n]*%laneid", ttgir))
    seen = len(names)
    for result, operation, operand in re.findall(r"(%\w+) = (\S+) (%\w+)", ttgir):
        if operand in names:
            names.add(result)
            if operation == "ttg.convert_layout":
                return False
    shuffles = re.findall(r"tt.elementwise_inline_asm [^\n]*shfl[^\n]*\} (%\w+),", ttgir)
    return seen == 1 and len(shuffles) == 1 and shuffles[0] in names


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("sm", CHIPS)
@pytest.mark.parametrize(("words", "warps"), [(512, 4), (1024, 16)])
def test_machine_code(sm, dtype, words, warps):
    """No spill, no fused multiply-add, one shuffle a weight, stores of 16 bytes, 64-bit offsets,
    and on sm_75 bf16 rounded by integers."""
    compiled = compile_kernel(sm, dtype, words=words, warps=warps)
    wide = r"(%\w+) = tt.get_program_id x[^\n]*\n\s*%\w+ = arith.extsi \1 : i32 to i64"
    assert re.search(wide, compiled.asm["ttir"])  # before it is multiplied: 2^31 weights
    assert table_is_shuffled_where_it_is(compiled.asm["ttgir"])
    assert ("arith.minsi" in compiled.asm["ttir"]) == (dtype == "bf16" and sm < 80)
    code = instructions(compiled)
    starts = [op.split(".")[0] for op in code]
    assert not {"LDL", "STL", "FFMA"} & set(starts) and resources(compiled)["STACK"] == 0
    assert starts.count("SHFL") == words // warps // 4
    assert all(".128" in op for op in code if op.startswith("STG"))
    assert dtype == "fp32" or compiled.metadata.shared == 0
    assert (starts.count("ACQBULK") == 1) == (sm >= 90) == compiled.metadata.launch_pdl


def test_local_memory_shows_a_spill():
    """What these tests and the self-test look for is there if a kernel spills."""

    @triton.jit
    def kernel(x_ptr, SIZE: tl.constexpr):
        at = tl.arange(0, SIZE)
        x = tl.load(x_ptr + at)
        tl.store(x_ptr + at, x * tl.sum(x))  # x is alive across the sum

    source = ASTSource(kernel, {"x_ptr": "*fp32", "SIZE": "constexpr"}, {"SIZE": 4096})
    options = {"num_warps": 1, "maxnreg": 32}
    compiled = triton.compile(source, target=GPUTarget("cuda", 75, 32), options=options)
    assert {"STL", "LDL"} <= {op.split(".")[0] for op in instructions(compiled)}
    assert resources(compiled)["STACK"] > 0


# ---- GPUs


@pytest.mark.gpu
def test_gpu_bits_equal_bitsandbytes():
    large = [
        (6, (2050, 4096), HALF, *pair) for pair in ((64, 256), (32, 0), (4096, 256), (128, 100))
    ]
    for case in (*cases(120), *large):
        weight, state = random_nf4(*case, device="cuda")
        want, numel = numpy_values(weight, state), math.prod(case[1])
        want = want.t() if len(weight) == 1 else want
        if case[4] in (0, 256) and weight.nbytes * 2 == numel:  # what bitsandbytes itself can do
            assert same_bits(bnb.functional.dequantize_4bit(weight, state), want), case
        assert same_bits(dequantize_nf4(weight, state), want), case
    for special in (math.inf, math.nan):
        weight, state = random_nf4(6, (64, 64), BF16, 64, 0, device="cuda")
        state.absmax[::2] = special
        want = bnb.functional.dequantize_4bit(weight, state)
        assert same_bits(dequantize_nf4(weight, state), want)


@pytest.mark.gpu
def test_gpu_storage_that_moves():
    """Views of one buffer whose storage is freed and allocated elsewhere, as FSDP2 does."""
    weight, state = random_nf4(6, (64, 4096), BF16, device="cuda")
    want, nested = dequantize_nf4(weight, state), state.state2
    parts = weight, state.absmax, nested.code, nested.absmax, state.offset
    sizes = [-(-t.nbytes // 256) * 256 for t in parts]
    flat = torch.empty(sum(sizes), dtype=torch.uint8, device="cuda")
    views = [
        piece[: t.nbytes].view(t.dtype).view(t.shape)
        for piece, t in zip(flat.split(sizes), parts, strict=True)
    ]
    moved, addresses, held = copy.copy(state), set(), []
    moved.state2 = copy.copy(nested)
    moved.absmax, moved.state2.code, moved.state2.absmax, moved.offset = views[1:]
    for _ in range(4):
        flat.untyped_storage().resize_(0)
        held.append(torch.full((sum(sizes),), 255, dtype=torch.uint8, device="cuda"))
        flat.untyped_storage().resize_(sum(sizes))
        for view, part in zip(views, parts, strict=True):
            view.copy_(part)
        assert same_bits(dequantize_nf4(views[0], moved), want)
        addresses.add(flat.data_ptr())
    assert len(addresses) > 1


@pytest.mark.gpu(gib=20)
@pytest.mark.parametrize("numel", [2**31 + 4096 + 5, 2**31 + 8192])  # ragged and whole tiles
def test_gpu_more_than_2_31_weights(numel):
    period = 4096 * 64
    small, state = random_nf4(6, (period,), BF16, device="cuda")
    want, copies, blocks = numpy_values(small, state), numel // period + 1, -(-numel // 64)
    state.absmax, state.shape = state.absmax.repeat(copies)[:blocks], torch.Size((numel,))
    state.state2.absmax = state.state2.absmax.repeat(copies)[: -(-blocks // 256)]
    out = dequantize_nf4(small.repeat(copies, 1)[: -(-numel // 2)], state)
    for row in out[: numel // period * period].view(-1, period).split(1024):
        assert (row == want).all()
    assert same_bits(out[-(numel % period) :], want[: numel % period])


@pytest.mark.gpu
def test_gpu_streams_without_synchronisation():
    weight, state = random_nf4(5, (512, 512), HALF, device="cuda")
    flipped, stream = ~weight, torch.cuda.Stream()
    dequantize_nf4(weight, state)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    with torch.cuda.stream(stream):
        torch.cuda._sleep(2**29)
        weight.copy_(flipped)  # behind the sleep, so that only the right stream sees it
        got = dequantize_nf4(weight, state)
        waited = stream.query()
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert not waited and same_bits(got, numpy_values(flipped, state))


@pytest.mark.gpu
def test_gpu_memory_is_the_output_alone():
    weight, state = random_nf4(5, (512, 512), HALF, device="cuda")
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before, out = torch.cuda.memory_allocated(), dequantize_nf4(weight, state)
        assert torch.cuda.max_memory_allocated() - before <= out.nbytes


@pytest.mark.gpu
def test_gpu_graphs_capture_first_calls():
    pairs = [random_nf4(seed, (512, 512), HALF, device="cuda") for seed in (5, 6)]
    pairs.append(random_nf4(6, (64, 512), HALF, 512, 100, device="cuda"))  # a variant of its own
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # not warmed up
        outs = [dequantize_nf4(*pair) for pair in pairs]
    for weight, _ in pairs:
        weight.bitwise_not_()
    graph.replay()
    for out, pair in zip(outs, pairs, strict=True):
        assert same_bits(out, numpy_values(*pair))


@pytest.mark.gpu
def test_gpu_threads():
    pairs = [random_nf4(seed, (512, 512), HALF, device="cuda") for seed in (5, 6, 7, 8)]
    wants = [numpy_values(*pair) for pair in pairs]

    def work(pair, want):
        with torch.cuda.stream(torch.cuda.Stream()):
            got = [dequantize_nf4(*pair) for _ in range(300)]
            torch.cuda.current_stream().synchronize()
        return all(same_bits(g, want) for g in got)

    with concurrent.futures.ThreadPoolExecutor(len(pairs)) as pool:
        assert all(pool.map(work, pairs, wants))
    out = torch.empty_like(wants[1])
    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # that thread's first use of CUDA
        pool.submit(dequantize_nf4, *pairs[1], out).result()
    torch.cuda.synchronize()
    assert same_bits(out, wants[1])


@pytest.mark.gpu(count=2)
def test_gpu_any_current_device():
    for device in ("cuda:1", "cuda:0"):
        pair = random_nf4(6, (64, 64), HALF, device=device)
        for _ in range(2):
            assert same_bits(dequantize_nf4(*pair), numpy_values(*pair))
            assert torch.cuda.current_device() == 0
    weight, state = random_nf4(6, (64, 64), HALF, device="cuda:1")
    state.absmax = state.absmax.to("cuda:0")
    with pytest.raises(ValueError, match="absmax.device == weight.device: found False"):
        dequantize_nf4(weight, state)


@pytest.mark.gpu
def test_gpu_qlora_step_is_the_same_when_patched():
    model, ids = qlora_model(512, 1024, 2), torch.randint(32000, (4, 512), device="cuda")

    loss, grads = qlora_step(model, ids)
    before = nf4_triton._plan.cache_info()
    with patch_bitsandbytes():
        patched_loss, patched = qlora_step(model, ids)
    after = nf4_triton._plan.cache_info()
    # 14 layers forward, and backward but for the three whose input needs no gradient
    assert after.hits + after.misses - before.hits - before.misses >= 25
    torch.testing.assert_close(patched_loss, loss, rtol=2**-8, atol=0)
    assert len(grads) == len(patched) == 28
    for grad, want in zip(patched, grads, strict=True):
        assert (grad - want).norm() <= 2**-8 * want.norm()


# ---- The command lines


def test_bench_needs_no_gpu_for_targets_and_storage(capsys):
    results = {}
    print_target(75, results)
    assert (
        results["sm_75 fp16 512"]["bound"] == "memory" and results["sm_75 fp16 512"]["STACK"] == 0
    )
    print_storage(torch.randn(2**18), "Gaussian", results)
    assert 4.127 > results["64 True"]["bound"] > 3.9 and 0.08 < results["64 True"]["error"] < 0.1
    assert "out of reach" in capsys.readouterr().out.splitlines()[-1]


def test_main_prints_a_result_and_writes_json(monkeypatch, capsys, tmp_path):
    path = tmp_path / "nf4.json"
    monkeypatch.setattr(nf4_triton, "self_test", lambda: iter(["one", "two"]))
    monkeypatch.setattr(nf4_triton, "bench", lambda: {"challenge_vs_memset": 1.5})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["nf4_triton.py", "--json", str(path)])
    nf4_triton.main()
    assert (
        capsys.readouterr().out.splitlines()[-1] == "RESULT nf4_triton PASS checks=2 skipped=1(GPU)"
    )
    assert json.loads(path.read_text())["checks"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["nf4.json"]


def test_self_test_fails_where_a_check_fails(monkeypatch):
    monkeypatch.setattr(
        nf4_triton, "dequantize_reference", lambda w, s, dtype: torch.zeros(s.shape, dtype=dtype)
    )
    with pytest.raises(AssertionError):
        list(nf4_triton.self_test())
