"""Values, gradients, memory, compiled callers and errors of chunked_ce.py.

The reference is plain PyTorch over all the logits, in float64. A 16-bit gradient is held to the
error that the plain 16-bit path has itself; nothing may be off by a tenth of what is exact, so
that zeros never pass.
"""

import contextlib
import functools
import gc
import itertools
import math
import os
import subprocess
import sys
import unittest.mock
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import chunked_ce as script
from chunked_ce import (
    IGNORE,
    grpo_loss,
    linear_cross_entropy,
    linear_logprobs,
    linear_logsumexp,
    memory_efficient_linear,
)

FULL, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
DTYPES = FULL, BF16, HALF
ROUNDING = {FULL: 1e-6, BF16: 2**-8, HALF: 2**-11}  # of a term in a sum
LOSS_TYPES = "grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo"
MORE = settings(max_examples=4 * settings().max_examples)  # of problems with many options
TINY = {"TRAINED": 8, "LEAN": 1, "FROZEN": 3, "FUNCTION": 2, "CPU": 5}
each_nll = functools.partial(F.cross_entropy, reduction="none")
sum_nll = functools.partial(F.cross_entropy, reduction="sum")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Of small tensors more are slower, above all where pytest has a worker for each core. cuBLAS
    sums a few products of odd sizes in 16 bits, unless told not to: then they differ with shape."""
    threads, matmul = torch.get_num_threads(), torch.backends.cuda.matmul
    torch.set_num_threads(1)
    matmul.allow_bf16_reduced_precision_reduction = False
    matmul.allow_fp16_reduced_precision_reduction = False
    yield
    torch.set_num_threads(threads)
    matmul.allow_bf16_reduced_precision_reduction = True
    matmul.allow_fp16_reduced_precision_reduction = True


def small(**constants):
    """The script's constants, so that small tensors take many chunks."""
    return unittest.mock.patch.multiple(script, **(constants or TINY))


def problem(n=23, d=8, v=37, dtype=FULL, device="cpu"):
    """x [n, d], weight [v, d], bias [v], which require gradients; labels [n], some ignored."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, v, (n,), generator=rng)
    labels[::5] = IGNORE
    tensors = [torch.randn(shape, generator=rng) for shape in ((n, d), (v, d), (v,))]
    tensors[1] /= d**0.5
    return *(t.to(device, dtype).requires_grad_() for t in tensors), labels.to(device)


def in_double(tensors):
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def gradients(out, inputs):
    """For an upstream gradient that is neither 1 nor the same for all tokens."""
    upstream = torch.linspace(-1, 2, out.numel() + 1, device=out.device)[1:].view(out.shape)
    return torch.autograd.grad(out, inputs, upstream.to(out.dtype), materialize_grads=True)


def near(ours, exact, plain=None, tolerance=1e-5):
    """In the norm: `tolerance`, or with `plain` no more than 1.1 of its error and 1e-4."""
    for k, (got, want) in enumerate(zip(ours, exact, strict=True)):
        error, norm = (got.double() - want.double()).norm(), want.double().norm()
        limit = tolerance * norm
        if plain is not None:
            limit = 1.1 * (plain[k].double() - want.double()).norm() + 1e-4 * norm
        assert got.shape == want.shape
        assert error <= min(limit, 0.1 * norm), (k, error.item(), limit.item(), norm.item())


def same_as(run, naive, inputs, tolerance=None):
    """run's value and gradients as naive's in float64; without a tolerance to 1e-5, 16-bit ones by
    naive's own error."""
    inputs, runs = list(inputs), [(run, inputs), (naive, in_double(inputs))]
    if tolerance is None and inputs[0].itemsize == 2:
        runs.append((naive, inputs))
    outs = [(function(*given), given) for function, given in runs]
    near(*([out, *gradients(out, given)] for out, given in outs), tolerance=tolerance or 1e-5)


# ---- The definitions, of all the logits


ROUNDED = {"dtype": None}  # float64 products, and the gradient by them, as they are in this dtype


def naive_logits(x, weight, bias=None, softcap=None, logit_scale=1.0, temperature=1.0):
    """float32 logits of 16-bit products."""
    logits, dtype = x @ weight.t(), ROUNDED["dtype"]
    if dtype is not None:
        logits = logits + (logits.to(dtype).double() - logits).detach()
    logits = logits if bias is None else logits + bias
    if dtype is not None and logits.requires_grad:
        logits.register_hook(lambda gradient: gradient.to(dtype).double())
    logits = (logits.float() if logits.itemsize == 2 else logits) * logit_scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return logits / temperature


def naive_cross_entropy(x, weight, labels, bias=None, ignore_index=IGNORE, reduction="mean",
                        label_smoothing=0.0, z_loss=0.0, num_items=None, **head):  # fmt: skip
    logits = naive_logits(x, weight, bias, **head).flatten(0, -2)
    live = (labels != ignore_index).flatten()
    ids = torch.where(live, labels.long().flatten(), IGNORE)
    losses = each_nll(logits, ids, label_smoothing=label_smoothing)
    losses = losses + z_loss * logits.logsumexp(1) ** 2 * live
    if reduction == "none":
        return losses.view(labels.shape)
    count = live.sum().clamp(min=1) if reduction == "mean" else 1
    return losses.sum() / (count if num_items is None else num_items or 1)


def naive_logprobs(x, weight, labels, bias=None, ignore_index=IGNORE, **head):
    """log-probability, logsumexp, the label's logit."""
    live, logits = labels != ignore_index, naive_logits(x, weight, bias, **head)
    index = torch.where(live, labels, 0).long()[..., None]
    logs = torch.log_softmax(logits, -1)
    found = logs.gather(-1, index)[..., 0], logits.logsumexp(-1), logits.gather(-1, index)[..., 0]
    return [torch.where(live, t, 0) for t in found]  # no -inf * 0 of a masked word


def naive_grpo(x, weight, labels, advantages, mask, old_logprobs=None, ref_logprobs=None, beta=0.0,
               epsilon=0.2, epsilon_high=None, delta=None, loss_type="grpo",
               importance_sampling_level="token", use_bias_correction_kl=False,
               importance_sampling_ratio=None, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
               max_completion_length=None, num_items=None, **head):  # fmt: skip
    """TRL's formulas."""
    logp, mask = naive_logprobs(x, weight, labels, **head)[0], mask.to(x.dtype)
    length = mask.sum(1).clamp(min=1)
    log_ratio = logp - (logp.detach() if old_logprobs is None else old_logprobs)
    if importance_sampling_level == "sequence":
        log_ratio = ((log_ratio * mask).sum(1) / length)[:, None]
    ratio, gap = log_ratio.exp(), 0 if ref_logprobs is None else ref_logprobs - logp
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    if loss_type == "cispo":
        loss = -ratio.clamp(max=epsilon_high).detach() * advantages * logp
    elif loss_type == "sapo":
        heat = torch.where(advantages > 0, sapo_temperature_pos, sapo_temperature_neg)
        loss = -torch.sigmoid(heat * (ratio - 1)) * 4 / heat * advantages
    else:
        high = 1 + (epsilon if epsilon_high is None else epsilon_high)
        free = ratio if delta is None else ratio.clamp(max=delta)
        loss = -torch.minimum(free * advantages, ratio.clamp(1 - epsilon, high) * advantages)
    if importance_sampling_ratio is not None:
        loss = loss * importance_sampling_ratio
    if beta:
        kl = gap.exp() - gap - 1
        loss = loss + beta * (kl * ratio if use_bias_correction_kl else kl)
    rows = (loss * mask).sum(1)
    if loss_type in ("grpo", "sapo"):
        return (rows / length).mean()
    divisors = {"bnpo": mask.sum().clamp(min=1), "luspo": len(labels)}
    divisors["dr_grpo"] = len(labels) * (max_completion_length or 1)
    return rows.sum() / divisors.get(loss_type, num_items)


# ---- Random problems


def drawn(**more):
    """Strategies for random_problem's arguments, and more: lists to choose from."""
    sizes = st.tuples(st.integers(0, 24), st.integers(1, 12), st.integers(1, 40))  # tokens, D, V
    strategies = {"seed": st.integers(0, 2**31), "sizes": sizes, "strided": st.booleans()}
    strategies |= {"lead": st.sampled_from([(), (1,), (3,)]), "dtype": st.sampled_from(DTYPES)}
    strategies |= {"on": st.tuples(*[st.booleans()] * 3), "biased": st.booleans()}
    return strategies | {name: st.sampled_from(values) for name, values in more.items()}


def random_problem(seed, sizes, lead, dtype, on, biased, strided, ignore=IGNORE):
    """[x [*lead, n, D], weight, maybe a bias], trained where `on` says; labels; the generator."""
    rng, (n, d, v) = torch.Generator().manual_seed(seed), sizes
    device, tensors = "cuda" if torch.cuda.is_available() else "cpu", []
    for shape, train in zip(((*lead, n, d), (v, d), (v,))[: 2 + biased], on, strict=False):
        tensor = torch.randn(shape, generator=rng) / (d**0.5 if len(tensors) == 1 else 1)
        tensor = tensor.to(device, dtype)
        tensor = torch.stack([tensor, tensor], -1)[..., 0] if strided else tensor
        tensors.append(tensor.requires_grad_(train))
    labels = torch.randint(0, v, (*lead, n), generator=rng)
    labels[torch.rand(labels.shape, generator=rng) < 0.2] = ignore
    return tensors, labels.to(device, torch.int32 if seed % 2 else torch.int64), rng


def check_random(ours, naive, tensors, rng, tiny):
    """As near, for a random upstream gradient and few elements, each of which may round twice.

    What is exact may be nearly zero, that of one word say, or of a likely label. Beside the size of
    what was summed it then is rounding: the limit is absolute, and zeros pass there alone.
    """
    runs, results, upstream = [(ours, tensors), (naive, in_double(tensors))], [], None
    dtype, on = tensors[0].dtype, [k for k, t in enumerate(tensors) if t.requires_grad]
    if dtype != FULL:  # in 16 bits, and with products that alone are in 16 bits
        runs += [(naive, tensors), (naive, in_double(tensors))]
    with small() if tiny else contextlib.nullcontext():
        for k, (run, given) in enumerate(runs):
            with unittest.mock.patch.dict(ROUNDED, dtype=dtype if k == 3 else None):
                out = run(*given)
            out = out if isinstance(out, torch.Tensor) else torch.stack([*out])
            if upstream is None:
                assert out.dtype == FULL and out.requires_grad == bool(on)
                upstream = torch.randn(out.shape, generator=rng).to(out)
            grads = [torch.zeros_like(given[k]) for k in on]
            if on and out.requires_grad:  # a naive one may have nothing that counts
                options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
                given = [given[k] for k in on], upstream.to(out)
                grads, again = (torch.autograd.grad(out, *given, **options) for _ in range(2))
                near(again, grads, tolerance=0)  # a second backward of the same graph
            results.append([out, *grads])
    largest = max(1, *(t.detach().double().norm() for t in tensors))
    for k, got, want in zip((None, *on), *results[:2], strict=True):
        at = 0 if k is None else 1 + on.index(k)
        error, norm = (got.double() - want).norm(), want.norm()
        size = largest * (upstream.norm().double() if at else max(1, want.numel() ** 0.5))
        limit = 2e-5 * norm
        if dtype != FULL:
            own = max((result[at].double() - want).norm() for result in results[2:])
            limit = 1.1 * own + 2 * ROUNDING[dtype] * norm
        nearly_zero = norm < (1e-4 if dtype == FULL else 0.05) * size
        limit = max(limit, ROUNDING[dtype] * size) if nearly_zero or dtype == FULL else limit
        assert got.shape == want.shape and (k is None or got.dtype == tensors[k].dtype)
        assert error <= (limit if nearly_zero else min(limit, 0.1 * norm)), (k, error, limit, norm)


CHUNKS = None, 1, 5, 99
HEADS = {"softcap": (None, 0.5, 30), "scale": (1.0, 0.3, 2)}
USER_LOSSES = {  # what a user writes: a value per token from float32 logits and two arguments
    "cross-entropy": lambda logits, labels, _: each_nll(logits, labels),
    "mse": lambda logits, _, teacher: ((logits - teacher) ** 2).mean(-1),
    "distillation": lambda logits, _, teacher: each_nll(logits / 2, (teacher / 2).softmax(-1)),
    "focal": lambda logits, y, _: (1 - torch.exp(-each_nll(logits, y))) ** 2 * each_nll(logits, y),
    "z-loss": lambda logits, _, __: logits.logsumexp(-1) ** 2,
}


@MORE
@given(
    **drawn(loss=[*USER_LOSSES], total=(0, 1), taught=(0, 1), chunk=CHUNKS, tiny=(0, 1), **HEADS)
)
def test_fuzz_any_function(loss, total, taught, chunk, tiny, softcap, scale, **rest):
    (x, weight, *bias), labels, rng = random_problem(**rest)
    teacher = torch.randn(*x.shape[:-1], len(weight), generator=rng).to(x.device)
    values, head = USER_LOSSES[loss], {"softcap": softcap, "logit_scale": scale}
    fn = (lambda *a: values(*a).sum()) if total else values

    def ours(x, weight, teacher, bias=None):
        given = labels.long(), teacher
        return memory_efficient_linear(x, weight, fn, *given, bias=bias, chunk=chunk, **head)

    def naive(x, weight, teacher, bias=None):
        logits = naive_logits(x, weight, bias, **head).flatten(0, -2)
        out = fn(logits, labels.long().flatten(), teacher.flatten(0, -2))
        return out if total else out.view(labels.shape)

    check_random(ours, naive, [x, weight, teacher.requires_grad_(bool(taught)), *bias], rng, tiny)


OPTIONS = {
    "reduction": ("mean", "sum", "none"),
    "label_smoothing": (0, 0.1, 1),
    "z_loss": (0, 0.01),
}
OPTIONS |= {"softcap": (None, 0.5, 30), "logit_scale": (1.0, 0.3, 2)}
OPTIONS |= {"ignore_index": (IGNORE, 0, -1), "num_items": (None, 0, 7, torch.tensor(5))}
OPTIONS = st.fixed_dictionaries({k: st.sampled_from(values) for k, values in OPTIONS.items()})


@MORE
@given(**drawn(chunk=CHUNKS, tiny=(0, 1), low=(0, 1)), options=OPTIONS)
def test_fuzz_cross_entropy(chunk, tiny, low, options, **rest):
    tensors, labels, rng = random_problem(**rest, ignore=options["ignore_index"])
    options |= {"num_items": None} if options["reduction"] == "none" else {}
    kind = BF16 if low and rest["dtype"] == BF16 and not tiny else FULL

    def ours(x, weight, bias=None):
        more = {"bias": bias, "chunk": chunk, "accum_dtype": kind}
        return linear_cross_entropy(x, weight, labels, **options, **more)

    naive = lambda x, weight, bias=None: naive_cross_entropy(x, weight, labels, bias, **options)
    check_random(ours, naive, tensors, rng, tiny)


@MORE
@given(**drawn(part=("logp", "logsumexp"), heat=(1, 0.7, 3.0), ignore=(IGNORE, 0),
               chunk=CHUNKS, tiny=(0, 1), **HEADS))  # fmt: skip
def test_fuzz_logprobs_and_logsumexp(part, heat, ignore, chunk, tiny, softcap, scale, **rest):
    tensors, labels, rng = random_problem(**rest, ignore=ignore)
    head = {"softcap": softcap, "logit_scale": scale, "ignore_index": ignore}
    if part != "logsumexp":
        head["temperature"] = heat

    def ours(x, weight, bias=None):
        more = {"bias": bias, "chunk": chunk, **head}
        if part == "logsumexp":
            return linear_logsumexp(x, weight, labels, **more)
        return linear_logprobs(x, weight, labels, **more)

    def naive(x, weight, bias=None):
        found = naive_logprobs(x, weight, labels, bias, **head)
        return found[0] if part == "logp" else found[1:]

    check_random(ours, naive, tensors, rng, tiny)


GRPO = {"kind": LOSS_TYPES, "level": ("token", "sequence"), "off": (0, 1), "beta": (0.0, 0.1)}
GRPO |= {"high": (None, 0.28), "delta": (None, 1.3), "per_token": (0, 1), "corrected": (0, 1)}
GRPO |= {"sampling": (None, "token", "sequence"), "chunk": CHUNKS, "tiny": (0, 1)}


@MORE
@given(**drawn(**GRPO | HEADS))
def test_fuzz_grpo(kind, level, off, beta, high, delta, per_token, corrected, sampling, chunk,
                   tiny, softcap, scale, **rest):  # fmt: skip
    (x, *others), labels, rng = random_problem(**rest, ignore=0)
    x = x if x.ndim == 3 else x.detach()[None].requires_grad_(x.requires_grad)
    labels, device = labels.view(x.shape[:2]), x.device
    head = {"softcap": softcap, "logit_scale": scale, "temperature": 0.9}
    with torch.no_grad():
        exact = naive_logprobs(*in_double([x, *others])[:2], labels, *in_double(others[1:]), **head)
    mask = (torch.rand(labels.shape, generator=rng) < 0.7).float().to(device)
    advantages = torch.randn(labels.shape[: 1 + per_token], generator=rng).to(device)
    # Ratios far from where they are clipped, or rounding would decide
    steps = torch.tensor([-0.6, -0.1, 0.0, 0.1, 0.5])
    shape = len(labels), labels.shape[1] if level == "token" else 1
    steps = steps[torch.randint(0, 5, shape, generator=rng)].to(device)
    weights = {None: None, "token": torch.rand(labels.shape, generator=rng).to(device)}
    weights["sequence"] = torch.rand(len(labels), 1, generator=rng).to(device)
    policy = {"old_logprobs": (exact[0] + steps).float() if off else None, "beta": beta}
    policy |= {"ref_logprobs": (exact[0] - 0.3).float(), "delta": delta, "loss_type": kind}
    policy |= {"epsilon_high": 2.0 if kind == "cispo" else high, "importance_sampling_level": level}
    policy |= {"use_bias_correction_kl": bool(corrected), "num_items": 16.0}
    policy |= {"importance_sampling_ratio": weights[sampling], "max_completion_length": 16}

    def ours(x, weight, bias=None):
        more = {"bias": bias, "chunk": chunk, **head, **policy}
        return grpo_loss(x, weight, labels, advantages, mask, **more)

    def naive(x, weight, bias=None):
        return naive_grpo(x, weight, labels, advantages, mask, bias=bias, **head, **policy)

    check_random(ours, naive, [x, *others], rng, tiny)


# ---- Any function


def general(x, weight, labels, fn=sum_nll, **options):
    return memory_efficient_linear(x, weight, fn, labels, **options)


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", **options)


def in_eager_backend():
    """compile=True with graphs that are run as they are: C++ would take minutes."""
    compiled = torch.compile(script._logits_then, backend="aot_eager")
    return unittest.mock.patch.object(script, "_compiled", lambda: compiled)


def test_gradients_of_the_functions_own_arguments():
    x, weight, _, labels = problem()
    heat, weights = torch.tensor(1.7, requires_grad=True), torch.rand(23, requires_grad=True)
    values = lambda logits, y, weights, heat: each_nll(logits / heat, y) * weights
    writes = lambda logits, y, weights, heat: each_nll(logits.div_(heat), y) * weights
    for fn, total, on in itertools.product((values, writes), (False, True), (False, True)):
        run = (lambda *a, fn=fn: fn(*a).sum()) if total else fn

        def ours(x, weight, weights, heat, run=run, on=on):
            options = {"chunk": 8, "compile": on}
            return memory_efficient_linear(x, weight, run, labels, weights, heat, **options)

        naive = lambda x, w, s, h, run=run: run(x @ w.t(), labels, s, h)
        with in_eager_backend():
            same_as(ours, naive, (x, weight, weights, heat))
    torch._dynamo.reset()
    fn = lambda logits, y: F.cross_entropy(logits, y, reduction="none")
    ours = lambda x, w: memory_efficient_linear(x, w, fn, labels, compile=True)  # in C++
    same_as(ours, lambda x, w: fn(x @ w.t(), labels), (x, weight))


@pytest.mark.parametrize("caller", ["eager", "compile=True", "a compiled caller"])
def test_a_tensor_that_fn_closes_over_is_refused(caller):
    x, weight, _, labels = problem()
    heat = torch.tensor(1.7, requires_grad=True)
    product, layer = heat * 2, torch.nn.Linear(37, 37)
    functions = (
        lambda logits, y: sum_nll(logits / heat, y),
        lambda logits, y: each_nll(logits / heat, y),
        lambda logits, y: sum_nll(logits * product, y),
        lambda logits, y: sum_nll(layer(logits), y),
    )
    functions += (lambda logits, y: heat,)
    on = caller == "compile=True"
    for fn, frozen in itertools.product(functions, (False, True)):
        inputs = [t.detach().requires_grad_(not frozen) for t in (x, weight)]
        call = lambda fn=fn, inputs=inputs: general(*inputs, labels, fn, compile=on)
        call = compiled(call) if caller == "a compiled caller" else call
        with in_eager_backend(), pytest.raises(ValueError, match="fn: found a tensor"):
            call().sum().backward()


OPS = ["sin", "cos", "tanh", "sigmoid", "exp", "square", "abs", "atan"]
OPS += ["erf", "asinh", "expm1", "relu", "sinh", "neg", "cosh"]


def closures():
    """Of one code, over different functions and tensors."""

    def make(op, words):
        def fn(logits, y):
            on = 1.0 if torch.compiler.is_compiling() else 0.0  # run as Python it gives zeros
            return (op(logits) * words).sum(1).mul(on) + each_nll(logits, y)

        return fn

    for k, name in enumerate(OPS):
        words = torch.full((37,), float(k + 1))
        yield make(getattr(torch, name), words), getattr(torch, name), words


def lambdas():
    for k, name in enumerate(OPS * 5):
        body = f"on(torch.{name}(logits) * {k + 1}).sum(1) + each_nll(logits, y)"
        on = lambda t: t * (1.0 if torch.compiler.is_compiling() else 0.0)
        fn = eval(f"lambda logits, y: {body}", {"torch": torch, "each_nll": each_nll, "on": on})
        yield fn, getattr(torch, name), k + 1


@pytest.mark.parametrize("made", [closures, lambdas])
def test_many_functions_are_all_compiled(made):
    x, weight, _, labels = problem()
    torch._dynamo.reset()
    with in_eager_backend():
        for fn, op, words in made():
            ours = lambda x, w, fn=fn: memory_efficient_linear(x, w, fn, labels, compile=True)
            naive = lambda x, w, op=op, words=words: (
                (op(x @ w.t()) * words).sum(1) + each_nll(x @ w.t(), labels)
            )
            same_as(ours, naive, (x, weight))


def test_what_a_compiled_function_holds_is_freed():
    x, weight, _, labels = problem()
    torch._dynamo.reset()

    def run():
        words = torch.rand(37)
        fn = lambda logits, y: (each_nll(logits * words, y)).sum()
        memory_efficient_linear(x, weight, fn, labels, compile=True).backward()
        return weakref.ref(words), weakref.ref(fn)

    with in_eager_backend():
        held = [run() for _ in range(3)]
    gc.collect()
    assert [ref() for refs in held for ref in refs] == [None] * 6


# ---- Cross-entropy, log-probabilities


def test_views_with_strides_and_masked_words(device):
    x, weight, bias, labels = problem(37, 16, 101, device=device)
    bias = torch.where(torch.arange(101, device=device) < 90, bias.detach(), -math.inf)
    y, b = (torch.stack([t, t], 1)[:, 1] for t in (labels.clamp(max=89), bias))
    wide = torch.stack([x.detach()] * 2, -1)[..., 0].requires_grad_()
    tall = weight.detach().t().contiguous().t().requires_grad_()
    assert not any(t.is_contiguous() for t in (y, b, wide, tall))
    for reduction, chunk in itertools.product(("mean", "none"), (None, 5)):
        options = {"bias": b, "reduction": reduction}
        ours = lambda x, w, o=options, chunk=chunk: linear_cross_entropy(x, w, y, chunk=chunk, **o)
        naive = lambda x, w, o=options: naive_cross_entropy(x, w, y, **o)
        same_as(ours, naive, (wide, tall))
        logp = linear_logprobs(wide, tall, y, bias=b, chunk=chunk)
        logs = torch.log_softmax(naive_logits(wide, tall, b), 1)
        near([logp], [logs.gather(1, y.clamp(min=0)[:, None])[:, 0] * (y != IGNORE)])


def test_smoothing_over_a_masked_word_is_infinite(device):
    x, weight, bias, labels = problem(device=device)
    bias = bias.detach().index_fill(0, torch.tensor([36], device=device), -math.inf)
    labels = labels.clamp(max=35)
    for reduction in ("none", "sum"):
        options = {"bias": bias, "label_smoothing": 0.1, "reduction": reduction}
        got = linear_cross_entropy(x, weight, labels, **options)
        assert torch.equal(got, naive_cross_entropy(x, weight, labels, **options))
        assert got[labels != IGNORE].isposinf().all() if reduction == "none" else got.isposinf()


def test_no_label_that_counts(device):
    """Loss and gradients 0, and what is not finite is not looked at."""
    x, weight, _, labels = problem(device=device)
    for value, chunk, reduction in itertools.product(
        (1.0, math.nan), (None, 5), ("none", "sum", "mean")
    ):
        x, nothing = torch.full_like(x, value).requires_grad_(), torch.full_like(labels, IGNORE)
        loss = linear_cross_entropy(x, weight, nothing, chunk=chunk, reduction=reduction).sum()
        dx, dw = gradients(loss, (x, weight))
        assert loss == 0 and not dx.any() and (math.isnan(value) or not dw.any()), reduction


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(dtype, device):
    """Gradients of zero, with a chunk and without."""
    _, weight, bias, _ = problem(dtype=dtype, device=device)
    x = torch.empty(0, 8, dtype=dtype, device=device, requires_grad=True)
    labels = torch.empty(0, dtype=torch.int64, device=device)
    for run in (
        linear_cross_entropy,
        functools.partial(linear_cross_entropy, reduction="none"),
        linear_logprobs,
        lambda *a, **o: torch.stack(linear_logsumexp(*a, **o)),
        lambda x, w, y, **o: memory_efficient_linear(x, w, each_nll, y, **o),
        lambda x, w, y, **o: memory_efficient_linear(x, w, sum_nll, y, **o),
    ):
        for chunk in (None, 4):
            out = run(x, weight, labels, bias=bias, chunk=chunk)
            assert not out.any() and out.shape in ((), (0,), (2, 0))
            for grad, tensor in zip(
                torch.autograd.grad(out.sum(), (x, weight, bias)), (x, weight, bias), strict=True
            ):
                assert grad.shape == tensor.shape and grad.dtype == dtype and not grad.any()


def test_a_common_offset_loses_no_digits(device):
    """1e4 on all logits; products are exact, so that nothing else is rounded beside it."""
    x, weight, _, labels = problem(40, 8, 101, device=device)
    x, weight = ((t.detach() * 4).round().div(4).requires_grad_() for t in (x, weight))
    bias = torch.full((101,), 1e4, device=device).requires_grad_()
    inputs = x, weight, bias
    for reduction, smoothing, chunk in itertools.product(("mean", "none"), (0.0, 0.1), (None, 16)):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        ours = lambda x, w, b, o=options, chunk=chunk: linear_cross_entropy(
            x, w, labels, bias=b, chunk=chunk, **o
        )
        naive = lambda x, w, b, o=options: F.cross_entropy(x @ w.t() + b, labels, **o)
        same_as(ours, naive, inputs, tolerance=2e-6)
    same_as(lambda x, w, b: linear_logprobs(x, w, labels, bias=b),
            lambda x, w, b: naive_logprobs(x, w, labels, b)[0], inputs, tolerance=2e-6)  # fmt: skip
    same_as(lambda x, w, b: memory_efficient_linear(x, w, sum_nll, labels, bias=b),
            lambda x, w, b: sum_nll(x @ w.t() + b, labels), inputs, tolerance=2e-6)  # fmt: skip


def test_arguments_of_any_function_are_not_changed_before_the_backward():
    """As any saved tensor: else its gradients would be of other values."""
    x, weight, _, labels = problem()
    weights = torch.rand(23)
    values = lambda logits, y, weights: each_nll(logits, y) * weights
    for changed in (labels, weights):
        out = memory_efficient_linear(x, weight, values, labels, weights)
        changed.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_without_gradients_any_function_will_do(device):
    """As for accuracy: nothing must be differentiable there."""
    x, weight, bias, _ = problem(24, device=device)
    argmax = lambda logits: logits.argmax(1).float()
    with torch.no_grad():
        given = x.view(2, 12, 8), weight, argmax
        found = memory_efficient_linear(*given, bias=bias, chunk=5)
    assert torch.equal(found, naive_logits(x, weight, bias).argmax(1).float().view(2, 12))


# ---- GRPO


def grpo_problem(dtype=FULL, device="cpu"):
    """x, weight, labels, advantages, mask; log-probabilities near the policy's own, twice."""
    x, weight, _, _ = problem(44, 16, 101, dtype, device)
    x, rng = x.detach().view(4, 11, 16).requires_grad_(), torch.Generator().manual_seed(1)
    labels, mask = torch.randint(0, 101, (4, 11), generator=rng), torch.rand(4, 11, generator=rng)
    mask = (mask < 0.7).float()
    mask[2] = 0  # a completion of nothing
    labels, mask = labels.to(device), mask.to(device)
    logp = naive_logprobs(*in_double([x, weight]), labels, temperature=0.9)[0].detach()
    old, ref = (logp + 0.4 * torch.randn(4, 11, generator=rng).to(device) for _ in range(2))
    advantages = torch.tensor([2.0, -0.5, 0.7, -0.3], device=device)
    return x, weight, labels, advantages, mask, old.float(), ref.float()


@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_grpo_equals_the_naive_one(kind, device):
    x, weight, labels, advantages, mask, old, ref = grpo_problem(device=device)
    # Where nothing counts nothing is looked at; a token labelled IGNORE does not count either
    unseen, given = torch.where(mask > 0, labels, 999), mask.clone()
    mask[3, 0], given[3, 0], unseen[3, 0] = 0, 1, IGNORE
    hidden = lambda t: None if t is None else torch.where(mask > 0, t, -math.inf)
    sampled = None, torch.rand(4, 11, device=device) + 0.5, torch.rand(4, 1, device=device) + 0.5
    for level, off, (beta, corrected), delta, sampling, per_token in itertools.product(
        ("token", "sequence"), (None, old), ((0.0, False), (0.1, False), (0.1, True)),
        (None, 1.3), sampled, (False, True),
    ):  # fmt: skip
        weights = advantages[:, None] + torch.zeros_like(old) if per_token else advantages
        options = {"beta": beta, "delta": delta, "use_bias_correction_kl": corrected}
        options |= {"loss_type": kind, "importance_sampling_level": level, "temperature": 0.9}
        options |= {"epsilon_high": 2.0 if kind == "cispo" else 0.28, "max_completion_length": 16}
        options |= {"importance_sampling_ratio": sampling, "num_items": torch.tensor(16.0)}
        options |= {"sapo_temperature_pos": 0.8, "sapo_temperature_neg": 1.4, "logit_scale": 1.2}

        def ours(x, w, a=weights, off=off, o=options):
            logprobs = {"old_logprobs": hidden(off), "ref_logprobs": hidden(ref)}
            return grpo_loss(x, w, unseen, a, given, chunk=8, **logprobs, **o)

        def naive(x, w, a=weights, off=off, o=options):
            return naive_grpo(x, w, labels, a, mask, off, ref, **o)

        same_as(ours, naive, (x, weight), tolerance=2e-5)
        with torch.no_grad():
            near([ours(x, weight)], [naive(x, weight)], tolerance=2e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_grpo_in_fp16_far_from_the_old_policy(level, device):
    """A ratio of 2981 with a negative advantage, and a loss scale."""
    x, weight, labels, _, mask, *_ = grpo_problem(HALF, device)
    old = naive_logprobs(*in_double([x, weight]), labels)[0].detach().float() - 8
    advantages = torch.full((4,), -1.0, device=device)
    rest = labels, advantages, mask
    options = {"old_logprobs": old, "importance_sampling_level": level}
    ours = lambda x, w: grpo_loss(x, w, *rest, **options)
    naive = lambda x, w: naive_grpo(x, w, *rest, **options)
    loss, inputs, doubles = ours(x, weight), (x, weight), in_double((x, weight))
    assert loss.isfinite()
    for scale in (1.0, 64.0):
        runs = (loss, inputs), (naive(*doubles), doubles), (naive(*inputs), inputs)
        near(*([out, *torch.autograd.grad(out * scale, given, retain_graph=True)]
               for out, given in runs))  # fmt: skip


# ---- Callers: shared and frozen tensors, torch.compile, autocast, accumulation


class Watch(TorchDispatchMode):
    """Counts matrix products and the bytes of the largest tensor made, but for `allowed` sizes."""

    def __init__(self, *allowed):
        super().__init__()
        self.products, self.largest, self.allowed = 0, 0, allowed

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func._opname in ("mm", "addmm", "addmm_"):
            self.products += 1
            for t in args[-2:]:
                if t.device.type == "cpu":  # its products may read what lies between rows
                    assert t.is_contiguous() or t.t().is_contiguous(), (func, t.stride())
        made = [t.nbytes for t in torch.utils._pytree.tree_leaves(out) if hasattr(t, "nbytes")]
        self.largest = max([self.largest, *(n for n in made if n not in self.allowed)])
        return out


def test_tied_heads_lora_heads_and_frozen_parts():
    x, weight, _, labels = problem()
    down, up = torch.randn(4, 8, requires_grad=True), torch.randn(37, 4, requires_grad=True)
    tied = lambda f: lambda w: f(F.embedding(labels.clamp(min=0), w) * 2, w, labels)
    merged = lambda f: lambda x, w, up, down: f(x, w + 0.5 * up @ down, labels)
    plain = lambda x, w, y: sum_nll(x @ w.t(), y)
    for loss in (functools.partial(linear_cross_entropy, reduction="sum", chunk=5),
                 lambda *a: linear_cross_entropy(*a, reduction="none", chunk=5).sum(),
                 functools.partial(general, chunk=5)):  # fmt: skip
        same_as(tied(loss), tied(plain), (weight,))
        same_as(merged(loss), merged(plain), (x, weight, up, down))
    for loss in (linear_cross_entropy, general):
        for x_on, w_on in ((True, True), (True, False), (False, True)):
            given = x.detach().requires_grad_(x_on), weight.detach().requires_grad_(w_on)
            with Watch() as watch:
                loss(*given, labels, chunk=5).backward()
            assert watch.products == 5 * (1 + x_on + w_on)  # a frozen part costs no product


def test_no_product_on_a_cpu_has_padding_beside_its_rows():
    """Weight trained or frozen, one chunk or many, a second pass over the vocabulary."""
    x, weight, bias, labels = problem(19, 6, 37, BF16)
    lean = functools.partial(linear_cross_entropy, accum_dtype=BF16)
    losses = general, linear_cross_entropy, lean, linear_logprobs
    for w, loss, chunk in itertools.product((weight, weight.detach()), losses, (None, 5)):
        for constants in ({"TRAINED": script.TRAINED}, TINY):
            with small(**constants), Watch() as watch:
                loss(x, w, labels, bias=bias, chunk=chunk).sum().backward()
            assert watch.products >= 2 + w.requires_grad


def policy(x, weight, labels, loss=grpo_loss, **options):
    """grpo_loss of one completion, with the arguments of the others."""
    labels = labels.clamp(min=0)[None]
    mask, advantages = torch.ones_like(labels), torch.ones(1, device=x.device)
    rest = {"old_logprobs": mask * -3.5, "ref_logprobs": mask * -3.0, "beta": 0.1}
    return loss(x[None], weight, labels, advantages, mask, **rest, **options)


FAST = {
    "sum": functools.partial(linear_cross_entropy, reduction="sum"),
    "smoothed mean": functools.partial(linear_cross_entropy, label_smoothing=0.1, z_loss=0.01),
    "none": functools.partial(linear_cross_entropy, reduction="none"),
    "logprobs": functools.partial(linear_logprobs, temperature=0.7, softcap=5.0),
    "logsumexp": lambda *a, **o: sum(linear_logsumexp(*a, **o)),
    "grpo": policy,
    "gspo": functools.partial(policy, importance_sampling_level="sequence"),
}


@pytest.mark.parametrize("name", FAST)
def test_compiled_callers_have_one_graph_for_all_lengths(name):
    x, weight, _, labels = problem(40)
    for chunk, w in (16, weight), (None, weight.detach()):
        loss = lambda x, w, y, chunk=chunk: FAST[name](x, w, y, chunk=chunk) * 3
        lengths = compiled(loss, fullgraph=True, dynamic=True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for n in (40, 24, 33, 7):
                part, y = x[:n].detach().requires_grad_(), labels[:n].clone()
                inputs = (part, w) if w.requires_grad else (part,)
                outs = [way(part, w, y) for way in (lengths, loss)]
                near(*([out, *gradients(out, inputs)] for out in outs))


def test_the_operator_says_what_it_returns():
    """To torch.compile: shapes and dtypes, of what is not needed, too."""
    x, weight, _, labels = problem(dtype=BF16)
    stats, coefs = torch.zeros(4, 23), torch.ones(4, 23)
    for needs, known, factors in (
        ((False, False, False), None, None),
        ((True, True, False), None, coefs),
        ((True, False, True), stats, coefs),
    ):
        arguments = x, weight, None, labels, known, factors, 1.0, 0.0, True, 8, False, needs
        tests = "test_schema", "test_faketensor"
        torch.library.opcheck(torch.ops.chunked_ce.rows.default, arguments, test_utils=tests)


@pytest.mark.parametrize("inner", [False, True])
def test_any_function_in_a_compiled_caller(inner):
    """A graph break: the results are right, fullgraph=True is refused."""
    x, weight, _, labels = problem(40)
    with in_eager_backend():
        for fn in (sum_nll, each_nll):
            loss = lambda x, w, y, fn=fn: general(x * 2, w, y, fn, chunk=16, compile=inner) * 3
            for n in (40, 24):
                part, y = x[:n].detach().requires_grad_(), labels[:n].clone()
                naive = lambda x, w, y=y, fn=fn: fn(x * 2 @ w.t(), y) * 3
                way = compiled(loss)
                same_as(lambda x, w, y=y, way=way: way(x, w, y), naive, (part, weight))
            with pytest.raises(torch._dynamo.exc.Unsupported):
                compiled(loss, fullgraph=True)(x, weight, labels)


def test_autocast():
    """Products in bf16; a float32 weight has its gradient in float32."""
    x, weight, _, labels = problem(300, 64, 101)
    mean = lambda x, w, y, **o: general(x, w, y, **o) / (y != IGNORE).sum()
    plain = lambda x, w: F.cross_entropy((x @ w.t()).float(), labels)
    exact = in_double((x, weight))
    want = plain(*exact)
    want = [want, *gradients(want, exact)]
    with torch.autocast("cpu", BF16):
        own = plain(x, weight)
    own = [own, *gradients(own, (x, weight))]
    for loss, chunk in itertools.product((linear_cross_entropy, mean), (None, 64)):
        with torch.autocast("cpu", BF16):
            out = loss(x, weight, labels, chunk=chunk)
        grads = gradients(out, (x, weight))
        assert [g.dtype for g in grads] == [FULL, FULL]
        near([out, *grads], want, own)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("chunk", [None, 16])
def test_autocast_to_another_16_bit_dtype(reduction, chunk, device):
    """A bf16 weight in fp16 products: its gradient is bf16, whatever the products are."""
    x, weight, _, labels = problem(60, 16, 101, BF16, device)
    exact = in_double((x, weight))
    want = F.cross_entropy(exact[0] @ exact[1].t(), labels, reduction=reduction)
    plain = F.cross_entropy((x @ weight.t()).float(), labels, reduction=reduction)
    with torch.autocast(device, HALF):
        out = linear_cross_entropy(x, weight, labels, reduction=reduction, chunk=chunk)
    grads = gradients(out, (x, weight))
    assert [g.dtype for g in grads] == [BF16, BF16]
    own = [plain, *gradients(plain, (x, weight))]
    near([out, *grads], [want, *gradients(want, exact)], own)


def test_z_loss_over_slices_of_the_vocabulary():
    x, weight, _, labels = problem(60, 16, 101, BF16)

    def naive(x, weight):
        logits = x @ weight.t()
        logits = logits.float() if x.dtype == BF16 else logits
        live = labels != IGNORE
        return F.cross_entropy(logits, labels) + (logits.logsumexp(1) ** 2)[live].mean() / 2

    exact = in_double((x, weight))
    ours = linear_cross_entropy(x, weight, labels, z_loss=0.5, chunk=8)
    pairs = (ours, (x, weight)), (naive(*exact), exact), (naive(x, weight), (x, weight))
    near(*([out, *gradients(out, given)] for out, given in pairs))


def test_accumulation_and_loss_scales():
    x, weight, _, labels = problem(40)
    inputs, items = (x, weight), (labels != IGNORE).sum()
    want = gradients(F.cross_entropy(x @ weight.t(), labels), inputs)
    losses = [linear_cross_entropy(x, weight, labels) for _ in range(2)]
    scaled = torch.amp.GradScaler("cpu").scale(losses[0])  # 2^16 times the gradients, exactly
    pairs = zip(gradients(scaled, inputs), gradients(losses[1], inputs), strict=True)
    assert all(torch.equal(a, b * 65536) for a, b in pairs)
    parts = [*zip(x.split(20), labels.split(20), strict=True)]  # with num_items of the whole
    for n in (items, items.item()):
        halves = sum(linear_cross_entropy(a, weight, b, num_items=n) for a, b in parts)
        near(gradients(halves, inputs), want)
    twice = general(x, weight, labels) + general(2 * x, weight, labels)
    both = sum_nll(x @ weight.t(), labels) + sum_nll(2 * x @ weight.t(), labels)
    near(gradients(twice, inputs), gradients(both, inputs))
    x.grad = weight.grad = None
    for a, b in parts:  # backward passes into one .grad
        linear_cross_entropy(a, weight, b, num_items=items).backward()
    near([x.grad, weight.grad], [grad / 2 for grad in want])


# ---- Low precision


def low_precision_ways(dtype):
    """name -> (ours, plain) of (x, weight, labels), each a mean."""
    mean = lambda f: lambda x, w, y: f(x, w, y).sum() / (y != IGNORE).sum()
    plain = lambda x, w, y: F.cross_entropy(naive_logits(x, w), y)
    each = functools.partial(linear_cross_entropy, reduction="none")
    fast = {"mean": linear_cross_entropy, "none": mean(each), "logprobs": None}
    fast |= {"values": mean(functools.partial(general, fn=each_nll)), "general": mean(general)}
    fast["logprobs"] = mean(lambda *a, **o: -linear_logprobs(*a, **o))
    for name, function in fast.items():
        yield name, function, plain
    for name, function in (("mean", linear_cross_entropy), ("none", each), ("general", general)):
        chunked = functools.partial(function, chunk=16)
        yield f"{name}, chunk", chunked if name == "mean" else mean(chunked), plain
    head = {"softcap": 3.0, "logit_scale": 2.0, "label_smoothing": 0.1, "chunk": 64}
    naive = {name: value for name, value in head.items() if name != "chunk"}
    yield ("capped", lambda *a: linear_cross_entropy(*a, **head),
           lambda *a: naive_cross_entropy(*a, **naive))  # fmt: skip
    for level in ("token", "sequence"):
        options = {"importance_sampling_level": level, "epsilon": 0.9}
        naive = functools.partial(policy, loss=naive_grpo, **options)
        yield f"grpo, {level}", functools.partial(policy, **options, chunk=64), naive


@pytest.mark.parametrize("dtype", [BF16, HALF])
@pytest.mark.parametrize("vocab", [1001, 1024])
def test_low_precision_is_no_worse_than_the_plain_path(dtype, vocab, device):
    x, weight, _, labels = problem(300, 64, vocab, dtype, device)
    for name, ours, plain in low_precision_ways(dtype):
        for constants in ({"TRAINED": 64, "LEAN": 1}, {"TRAINED": script.TRAINED}):
            with small(**constants):
                runs = (ours, (x, weight)), (plain, in_double((x, weight))), (plain, (x, weight))
                outs = [(run(*given, labels) * 4, given) for run, given in runs]
                grads = [torch.autograd.grad(out, given) for out, given in outs]
            try:
                near(*grads)
            except AssertionError as error:
                raise AssertionError(name, constants) from error


def test_dw_summed_in_its_own_dtype(device):
    """accum_dtype=bfloat16: one sum in one product, or rounded once for each chunk."""
    x, weight, _, labels = problem(300, 64, 1001, BF16, device)
    exact = in_double((x, weight))
    want = gradients(F.cross_entropy(naive_logits(*exact), labels), exact)
    for lean, tolerance in ((512, 6e-3), (64, 1e-2)):
        with small(LEAN=lean):
            loss = linear_cross_entropy(x, weight, labels, accum_dtype=BF16)
            near(gradients(loss, (x, weight)), want, tolerance=tolerance)


def test_small_fp16_gradients(device):
    """Of 1/tokens, which without a scale are below 6e-8, as are those of the words from 100 on,
    which are no token's label."""
    exact = lambda x, w, y: F.cross_entropy(x.float() @ w.float().t(), y)
    ways = [linear_cross_entropy, functools.partial(linear_cross_entropy, chunk=64)]
    ways.append(lambda x, w, y: linear_cross_entropy(x, w, y, reduction="none").sum())
    x, weight, _, labels = problem(4096, 16, 2000, HALF, device)
    labels, count = labels.clamp(max=99), (labels != IGNORE).sum()
    weight = (
        weight.detach() + 2
    ).requires_grad_()  # its rows' mean is what the small ones add up to
    advantages = torch.ones(1, device=device)  # on-policy, GRPO's gradient is cross-entropy's
    ways.append(lambda x, w, y: grpo_loss(x[None], w, y[None], advantages, (y != IGNORE)[None]))
    for way, trained in itertools.product(ways, (True, False)):
        inputs = (x, weight) if trained else (x,)
        w = weight if trained else weight.detach()
        ours = way(x, w, labels) / (count if way is ways[2] else 1)
        outs = ours, exact(x, w, labels)
        got, want = (gradients(out * 2.0**16, inputs) for out in outs)
        got, want = ([*grads, *(g[100:] for g in grads[1:])] for grads in (got, want))
        near(got, want, tolerance=5e-3)


def test_large_fp16_gradients(device):
    """Of a word that all tokens have, in a mean; the sum over tokens is beyond 65504."""
    x, weight, _, labels = problem(4096, 16, 200, HALF, device)
    x = x.detach().abs().add(1).requires_grad_()
    outs = [linear_cross_entropy(x, weight, labels * 0, chunk=chunk) for chunk in (None, 64)]
    exact = F.cross_entropy(x.float() @ weight.float().t(), labels * 0)
    want = gradients(exact * 64, (x, weight))
    for out in outs:
        near(gradients(out * 64, (x, weight)), want, tolerance=5e-3)


# ---- Memory


def peak_bytes(run):
    """The most bytes of tensors that run() has at one time, as PyTorch's profiler hears of them."""
    with torch.autograd.profiler.profile(use_cpu=True, profile_memory=True) as profile:
        run()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


COUNTED = {
    "mean": linear_cross_entropy,
    "none": functools.partial(linear_cross_entropy, reduction="none"),
    "logprobs": linear_logprobs,
    "grpo": policy,
    "sum of any function": general,
    "values of any function": functools.partial(general, fn=each_nll),
}


@pytest.mark.parametrize("dtype", [*DTYPES, "autocast"])
@pytest.mark.parametrize("trained", [True, False])
def test_memory_is_what_the_docstrings_say(dtype, trained):
    """With a chunk, beyond the gradients. A CPU has six float32 copies of it, and 1 MiB of tensors
    that are small here. All the logits take 8 or 16, dW in float32 4."""
    n, d, v, chunk, mib = 512, 256, 8192, 16, 2**20
    stored, kind = (FULL, BF16) if dtype == "autocast" else (dtype, dtype)
    x, weight, _, labels = problem(n, d, v, stored)
    weight.requires_grad_(trained)
    over = []
    for name, loss in COUNTED.items():
        bound = chunk * v * (kind.itemsize + 6 * 4) + 60 * n + mib
        if dtype == "autocast":
            bound += v * d * 2 + n * d * 2  # the 16-bit copies
        if trained and kind != FULL:
            bound += chunk * v * 4  # a CPU's product with a float32 sum
        if "function" in name:
            bound += 4 * v * d if trained and weight.itemsize == 2 else 0  # dW's sum

        def run(loss=loss):
            with torch.autocast("cpu", BF16, enabled=dtype == "autocast"):
                out = loss(x, weight, labels, chunk=chunk)
            out.sum().backward()

        x.grad = weight.grad = None
        peak = peak_bytes(run)
        peak -= sum(t.grad.nbytes for t in (x, weight) if t.grad is not None)
        assert peak >= chunk * v * 2
        over += [(name, peak / mib, bound / mib)] if peak > bound else []
    assert not over, over


@pytest.mark.parametrize("dtype", [BF16, HALF])
def test_a_forward_pass_has_no_gradients_memory(dtype):
    """Of values, and in fp16: their gradients are computed in the backward pass."""
    n, d, v, chunk = 512, 128, 8192, 16
    x, weight, _, labels = problem(n, d, v, dtype)
    for fn in (each_nll, sum_nll) if dtype == HALF else (each_nll,):
        peak = peak_bytes(lambda fn=fn: general(x, weight, labels, fn, chunk=chunk))
        assert chunk * v * 2 < peak < chunk * v * (2 + 6 * 4), fn


def test_largest_tensor_alive():
    n, d, v = 512, 16, 4096
    x, weight, _, labels = problem(n, d, v)
    for loss, w in itertools.product(COUNTED.values(), (weight, weight.detach())):
        with Watch(4 * v * d, 4 * n * d) as watch:
            loss(x, w, labels, chunk=32).sum().backward()
        assert 0 < watch.largest <= 32 * v * 4, (loss, watch.largest)


# ---- Errors


def refused(words, function, *args, **options):
    """In one line, that names the argument, what was found and what is needed."""
    with pytest.raises((ValueError, TypeError)) as error:
        function(*args, **options)
    line = str(error.value)
    assert line.startswith(words) and ": found " in line and ", need " in line, line
    assert "\n" not in line, line


def test_errors_name_what_was_found_and_needed():
    x, weight, bias, labels = problem()
    far, either = torch.full_like(labels, 37), ("x", "weight")
    for words, *arguments in (
        ("x", [1], weight, labels), ("x", x[0], weight, labels), ("x", x.double(), weight, labels),
        ("weight", x, weight[:, :4], labels), ("weight", x, weight.double(), labels),
        ("weight", x, weight.bfloat16(), labels), ("weight", x, weight.to("meta"), labels),
        (either, x[:, :0], weight[:, :0], labels), (either, x, weight[:0], labels),
        ("labels", x, weight, labels[1:]), ("labels", x, weight, labels.float()),
        ("labels", x, weight, far), ("labels", x, weight, far - 38), ("labels", x, weight, None),
        ("weight", x, weight[0, 0], labels), ("weight", x, None, labels),
    ):  # fmt: skip
        for function in (linear_cross_entropy, linear_logprobs, linear_logsumexp):
            refused(words, function, *arguments)
    for words, option in (
        ("chunk", {"chunk": 0}), ("chunk", {"chunk": 2.5}), ("chunk", {"chunk": True}),
        ("logit_scale", {"logit_scale": None}), ("logit_scale", {"logit_scale": math.nan}),
        ("z_loss", {"z_loss": weight}), ("z_loss", {"z_loss": -1}),
        ("softcap", {"softcap": 1e6}), ("softcap", {"softcap": 0}), ("bias", {"bias": bias[1:]}),
        ("reduction", {"reduction": "max"}), ("reduction", {"reduction": "none", "num_items": 3}),
        ("label_smoothing", {"label_smoothing": 1.5}), ("accum_dtype", {"accum_dtype": HALF}),
        ("bias", {"bias": bias.double()}), ("num_items", {"num_items": -1}),
    ):  # fmt: skip
        refused(words, linear_cross_entropy, x, weight, labels, **option)
    refused("temperature", linear_logprobs, x, weight, labels, temperature=0)
    refused("labels", linear_cross_entropy, x, weight, labels, ignore_index=-1)  # -100 is none then


def test_errors_of_any_function():
    x, weight, _, labels = problem()
    total = lambda logits, *_: logits.sum()
    for words, fn, *rest in (
        ("fn", 3), ("fn's result", lambda t: 1.0), ("fn's result", lambda t: t),
        ("fn's result", lambda t: t.argmax(1)), ("fn's result", lambda t: t.detach().sum()),
        ("per-token argument 0", total, labels[1:]),
        ("per-token argument 1", total, labels, labels.to("meta")),
    ):  # fmt: skip
        refused(words, memory_efficient_linear, x, weight, fn, *rest)
    squeezed = lambda logits: logits.sum(1).squeeze()  # of a last chunk of one a scalar
    refused("fn's result", memory_efficient_linear, x[:17], weight, squeezed, chunk=16)
    out = memory_efficient_linear(x, weight, lambda t: t.detach().sum(1))
    refused("fn's result", out.sum().backward)


def test_errors_of_grpo():
    x, weight, labels, advantages, mask, old, ref = grpo_problem()
    for words, option in (
        ("ref_logprobs", {"beta": 0.1}),
        ("epsilon_high", {"loss_type": "cispo", "num_items": 3}),
        ("num_items", {"loss_type": "dapo"}),
        ("max_completion_length", {"loss_type": "dr_grpo"}),
        ("old_logprobs", {"old_logprobs": old[0]}),
        ("ref_logprobs", {"ref_logprobs": ref[:, 1:], "beta": 0.1}),
        ("temperature", {"temperature": 0}),
        ("softcap", {"softcap": -1}),
        ("sapo_temperature_neg", {"loss_type": "sapo", "sapo_temperature_neg": 0.0}),
        ("chunk", {"chunk": 0}),
    ):
        refused(words, grpo_loss, x, weight, labels, advantages, mask, **option)
    refused("advantages", grpo_loss, x, weight, labels, advantages[1:], mask)
    refused("advantages", grpo_loss, x, weight, labels, None, mask)
    refused("x", grpo_loss, x[0], weight, labels[0], advantages, mask[0])
    refused("mask", grpo_loss, x, weight, labels, advantages, mask[1:])
    refused("mask", grpo_loss, x, weight, labels, advantages, None)
    refused("labels", grpo_loss, x, weight, labels[1:], advantages, mask)
    for option in ({"loss_type": "ppo"}, {"importance_sampling_level": "word"}):
        with pytest.raises(ValueError, match="found .*, need "):
            grpo_loss(x, weight, labels, advantages, mask, **option)


# ---- On a GPU


@pytest.mark.gpu(gib=2)
def test_gpu_streams_without_synchronisation():
    x, weight, bias, labels = problem(3000, 256, 5003, BF16, "cuda")
    losses = [functools.partial(linear_cross_entropy, bias=bias, chunk=1024), linear_logprobs]
    losses += [functools.partial(general, chunk=512), policy]
    stream = torch.cuda.Stream()
    for loss in losses:
        run = lambda loss=loss: (out := loss(x, weight, labels), *gradients(out, (x, weight)))
        want = run()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            run()  # the stream's own memory and cuBLAS handle
            stream.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                torch.cuda._sleep(10**9)
                got = run()
                assert not stream.query()  # all of it was queued while the stream was busy
            finally:
                torch.cuda.set_sync_debug_mode("default")
        stream.synchronize()
        near(got, want, tolerance=1e-6)


@pytest.mark.gpu(gib=2)
def test_gpu_compiled_callers_and_functions():
    x, weight, _, labels = problem(3000, 256, 5003, BF16, "cuda")
    runs = [(torch.compile(f, fullgraph=True), f) for f in FAST.values()]
    for fn in (sum_nll, each_nll):
        given = functools.partial(general, fn=fn)
        runs.append((functools.partial(given, compile=True), given))
    for pair in runs:
        torch._dynamo.reset()
        outs = [run(x, weight, labels, chunk=1024) * 3 for run in pair]
        near(*([out, *gradients(out, (x, weight))] for out in outs), tolerance=1e-2)


@pytest.mark.gpu
def test_labels_out_of_range_stop_the_gpu():
    code = "import torch, chunked_ce as c; x = torch.ones(4, 8, device='cuda')\n"
    code += "c.linear_cross_entropy(x, x, torch.tensor([0, 1, 4, -100], device='cuda')).item()"
    done = run_python(code)
    assert done.returncode and "label outside the vocabulary" in done.stderr + done.stdout


@pytest.mark.gpu
def test_arguments_on_a_cpu_and_in_float64():
    """0-d tensors may stay on the CPU; a gradient has its tensor's dtype and digits."""
    x, weight, _, labels = problem(device="cuda")
    heat = torch.tensor(1.7, requires_grad=True)
    weights = torch.rand(23, dtype=torch.float64, device="cuda", requires_grad=True)
    fn = lambda logits, y, heat, weights: (each_nll(logits / heat, y) * weights).sum()
    inputs = x, weight, heat, weights
    ours = memory_efficient_linear(x, weight, fn, labels, heat, weights) * 3
    near(gradients(ours, inputs), gradients(fn(x @ weight.t(), labels, heat, weights) * 3, inputs))


@pytest.mark.gpu(gib=16)
def test_more_than_2_31_logits_in_a_chunk():
    n, v = 2**14 + 8, 2**17
    x, weight, _, labels = problem(n, 16, v, BF16, "cuda")
    outs = [linear_cross_entropy(x, weight, labels, chunk=chunk) for chunk in (n, 512)]
    near(*([out] for out in outs), tolerance=1e-6)
    near(*(gradients(out, (x, weight)) for out in outs), tolerance=2e-3)


@pytest.mark.gpu(gib=48)
def test_the_challenge_takes_half_the_memory_or_less():
    n, d, v = 16384, 4096, 131072
    options = {"device": "cuda", "dtype": BF16}
    x, weight = torch.randn(n, d, **options), torch.randn(v, d, **options) * 0.02
    labels, peaks = torch.randint(0, v, (n,), device="cuda"), []
    for loss in (lambda x, w, y: F.cross_entropy((x @ w.t()).float(), y),
                 lambda *a: general(*a) / n, linear_cross_entropy):  # fmt: skip
        inputs = x.detach().requires_grad_(), weight.detach().requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss(*inputs, labels).backward()
        peak = torch.cuda.max_memory_allocated() - before
        peaks.append(peak - sum(t.grad.nbytes for t in inputs))
    assert max(peaks[1:]) <= peaks[0] / 2, [peak / 2**20 for peak in peaks]


# ---- The kernel


def run_python(code, **env):
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(script.__file__).parent)])
    env = os.environ | {"PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"} | env
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def kernel_cases():
    """Public functions by Triton's interpreter: whole rows, slices of the vocabulary, blocks of
    a row; a cap, a bias that masks words, NaN where a token is ignored."""
    from triton.runtime.interpreter import GridExecutor

    run, capped = GridExecutor.__call__, {"softcap": 5.0, "logit_scale": 0.7, "z_loss": 0.1}
    each, smooth = {"reduction": "none"}, {"label_smoothing": 0.1}
    sizes = (6, 8, 1000), (5, 4, 7), (3, 4, 17000)
    counted = {"autospec": True, "side_effect": run}
    with unittest.mock.patch.object(GridExecutor, "__call__", **counted) as ran:
        for size, dtype, chunk in itertools.product(sizes, DTYPES, (None, 2)):
            x, weight, bias, labels = problem(*size, dtype)
            masked = bias.detach().index_fill(0, torch.tensor(0), -math.inf)
            given = {"labels": labels.where(labels != 0, 1)}
            limit, total = {FULL: 2e-5, BF16: 2e-2, HALF: 2e-3}[dtype], ran.call_count
            for options in (capped | {"bias": masked}, each | {"bias": masked}, smooth | each):
                ours = functools.partial(linear_cross_entropy, **given, **options, chunk=chunk)
                naive = functools.partial(naive_cross_entropy, **given, **options)
                same_as(ours, naive, (x, weight), limit)
            ours = functools.partial(linear_logprobs, **given, bias=masked, chunk=chunk)
            each_logp = lambda *a, o=given, b=masked: naive_logprobs(*a, **o, bias=b)[0]
            same_as(ours, each_logp, (x, weight), limit)
            assert ran.call_count >= total + 7, "the kernel was not launched"
        x, weight, _, labels = problem(6, 8, 1000)
        same_as(lambda x, w: policy(x, w, labels),
                lambda x, w: policy(x, w, labels, naive_grpo), (x, weight))  # fmt: skip
        ignored = torch.where(labels == IGNORE, math.nan, x.detach().t()).t()
        losses = linear_cross_entropy(ignored, weight, labels, reduction="none")
        near([losses], [naive_cross_entropy(x, weight, labels, reduction="none")])


def test_row_kernel():
    done = run_python("import test_chunked_ce as t; t.kernel_cases()", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-3000:]
