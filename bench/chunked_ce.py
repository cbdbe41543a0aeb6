"""chunked_ce.py beside its peers; its memory by dtype and mode; how it goes with size; registers.

    python bench/chunked_ce.py                 all timings (a GPU), or some of them: --only
                                               challenge,gemma-2b,llama-1b,llama-8b,grpo,memory
    python bench/chunked_ce.py --plot PATH     memory and time by size (matplotlib)
    python bench/chunked_ce.py --target sm_75  registers and spills of the kernel on a chip
    python bench/chunked_ce.py --curve         Llama 1B, random weights, stock and patched

Peers are timed if they are installed and give the same loss and gradients: torch.compile, torch's
own chunked F.linear_cross_entropy (2.13), Liger, its CuTe DSL kernels for Hopper, Cut Cross
Entropy, Unsloth.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.testing import do_bench

sys.path[0] = str(Path(__file__).parents[1])  # this file has the script's name

import chunked_ce as script
from bench.common import in_turns, print_header, resources, save, show

SHAPES = {  # tokens, hidden size, vocabulary
    "challenge": (16384, 4096, 131072),
    "gemma-2b": (8192, 2304, 256000),
    "llama-1b": (8192, 2048, 128256),
    "llama-8b": (8192, 4096, 128256),
}


def find_peers(vocab: int, frozen: bool) -> dict:
    """Name -> loss of (x, weight, labels): ours in its modes, then what is installed."""
    ours = script.linear_cross_entropy
    peers = {
        "ours": ours,
        "ours, 64 MiB": functools.partial(ours, chunk=2**26 // (2 * vocab)),
        "general": script.general,
        "general, compiled": functools.partial(script.general, compile=True),
        "eager": script.plain,
        "torch.compile": torch.compile(script.plain),
    }
    if not frozen:
        peers["ours, dW in bf16"] = functools.partial(ours, accum_dtype=torch.bfloat16)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        peers["torch's own"] = functools.partial(F.linear_cross_entropy, options=options)
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    with contextlib.suppress(ImportError):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        peers["Liger"] = lambda x, weight, labels: liger(weight, x, labels)
        exact = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
        peers["Liger, dW in fp32"] = lambda x, weight, labels: exact(weight, x, labels)
    with contextlib.suppress(ImportError):
        from liger_kernel.ops.cutedsl.ops import fused_linear_cross_entropy_sm90

        peers["Liger sm90"] = fused_linear_cross_entropy_sm90.liger_fused_linear_cross_entropy_sm90
    with contextlib.suppress(ImportError):
        import cut_cross_entropy

        peers["CCE"] = cut_cross_entropy.linear_cross_entropy
    with contextlib.suppress(ImportError), contextlib.redirect_stdout(io.StringIO()):
        import unsloth  # noqa: F401
        from unsloth_zoo.fused_losses.fused_linear import fused_linear_cross_entropy

        def unsloth_loss(x, weight, labels):
            return fused_linear_cross_entropy(x, weight, None, labels, divisor=len(labels))

        peers["Unsloth"] = unsloth_loss
    return peers


def random_tensors(n: int, d: int, v: int, frozen: bool) -> tuple:
    """(x, weight, labels) in bf16."""
    x, weight, _, labels = script.make_problem(n, d, v, torch.bfloat16, "cuda")
    return x, weight.requires_grad_(not frozen), labels.clamp(min=0)


def find_exact(x, weight, labels) -> tuple:
    """(loss, dX of 2048 tokens, dW of 4096 words) in float32, 1024 tokens at a time."""
    n, loss, dx, dw = len(x), 0.0, [], 0.0
    for i in range(0, n, 1024):
        part, targets = x[i : i + 1024].detach().float(), labels[i : i + 1024]
        logits = torch.cat([part @ w.float().t() for w in weight.detach().split(2**15)], 1)
        loss += F.cross_entropy(logits, targets, reduction="sum").item() / n
        grad = torch.softmax(logits, 1) / n
        grad[torch.arange(len(targets)), targets] -= 1 / n
        dw += grad[:, :4096].t() @ part
        if i < 2048:
            slices = zip(grad.split(2**15, 1), weight.detach().split(2**15), strict=True)
            dx.append(sum(g @ w.float() for g, w in slices))
    return loss, torch.cat(dx), dw


def relative(got, want) -> float:
    return ((got.float() - want).norm() / want.norm()).item()


def time_shape(results: dict, name: str) -> None:
    for frozen in (False, True):
        tensors = random_tensors(*SHAPES[name], frozen)
        x, weight, _ = tensors
        loss, dx, dw = find_exact(*tensors)
        runs, figures = {}, {}
        torch._dynamo.reset()
        for peer, way in find_peers(len(weight), frozen).items():
            try:
                peak = script.peak_mib(way, *tensors)
                got = script.backward(way, *tensors).item()
            except Exception as error:  # a peer's is said, and the others are timed
                if peer.startswith(("ours", "general")):
                    raise
                print(f"  {peer}: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
                continue
            errors = [relative(x.grad[:2048], dx)]
            errors += [] if frozen else [relative(weight.grad[:4096], dw)]
            figures[peer] = {"mib": round(peak), "errors": errors}
            if abs(got - loss) > 1e-2 or max(errors) > 2e-2:
                assert not peer.startswith(("ours", "general")), (peer, got, loss, errors)
                print(f"  {peer}: loss {got} for {loss}, errors {errors}: not timed")
                continue
            runs[peer] = functools.partial(script.backward, way, *tensors)
        runs["bare products"] = functools.partial(script.bare_products, *tensors)
        measure = functools.partial(do_bench, rep=150, return_mode="median")
        times = in_turns(runs, measure, 3)
        title = f"{name} {'x'.join(map(str, SHAPES[name]))} W {'frozen' if frozen else 'trained'}"
        show(results, title, times, "ms", figures=figures)
        for peer, figure in figures.items():
            words = ", ".join(f"{e:.1e}" for e in figure["errors"])
            ratio = times.get(peer, float("nan")) / times["bare products"]
            print(f"  {peer}: {ratio:.3f} of the products, {figure['mib']} MiB, errors {words}")


def time_grpo(results: dict) -> None:
    """8 completions of 1024 tokens, head of Llama 1B."""
    x, weight, labels = random_tensors(*SHAPES["llama-1b"], False)
    x, ids = x.detach().view(8, 1024, -1).requires_grad_(), labels.view(8, 1024)
    mask, old = torch.ones(8, 1024, device="cuda"), torch.full((8, 1024), -11.0, device="cuda")
    advantages = torch.randn(8, device="cuda")

    def naive(x, weight, ids):
        logp = torch.log_softmax((x @ weight.t()).float(), -1).gather(-1, ids[..., None])[..., 0]
        ratio = torch.exp(logp - old)
        clipped = torch.minimum(
            ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None]
        )
        return -clipped.mean()

    def over_logprobs(x, weight, ids):
        ratio = torch.exp(script.linear_logprobs(x, weight, ids) - old)
        return -torch.minimum(
            ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None]
        ).mean()

    ours = lambda x, weight, ids: script.grpo_loss(
        x, weight, ids, advantages, mask, old_logprobs=old
    )
    ways = {"ours": ours, "over linear_logprobs": over_logprobs, "all the logits": naive}
    tensors = x, weight, ids
    peaks = {name: round(script.peak_mib(way, *tensors)) for name, way in ways.items()}
    losses = [script.backward(way, *tensors).item() for way in ways.values()]
    assert max(losses) - min(losses) < 1e-2 * abs(losses[0]), losses
    runs = {name: functools.partial(script.backward, way, *tensors) for name, way in ways.items()}
    times = in_turns(runs, functools.partial(do_bench, rep=150, return_mode="median"), 3)
    show(results, "GRPO 8x1024, head 2048x128256", times, "ms", mib=peaks)
    print(f"  MiB beyond the gradients: {peaks}")


def measure_memory(results: dict) -> None:
    """Peaks beyond the gradients, 8192 tokens, head of Llama 1B; chunk of 256 tokens or none."""
    n, d, v = SHAPES["llama-1b"]
    functions = {
        "mean": script.linear_cross_entropy,
        "none": lambda *a, **o: script.linear_cross_entropy(*a, reduction="none", **o).mean(),
        "logprobs": lambda *a, **o: script.linear_logprobs(*a, **o).mean(),
        "general": script.general,
    }
    modes = itertools.product((torch.bfloat16, torch.float16, torch.float32, "autocast"), (0, 1))
    for (dtype, frozen), (name, way) in itertools.product(modes, functions.items()):
        x, weight, labels = random_tensors(n, d, v, frozen)
        kind = torch.float32 if dtype == "autocast" else dtype
        x, weight = x.detach().to(kind), weight.detach().to(kind).requires_grad_(not frozen)
        tensors, peaks = (x.requires_grad_(), weight, labels), []
        for chunk in (256, None):
            with torch.autocast("cuda", torch.bfloat16, enabled=dtype == "autocast"):
                peaks.append(round(script.peak_mib(functools.partial(way, chunk=chunk), *tensors)))
        row = f"memory {str(dtype).split('.')[-1]} W {'frozen' if frozen else 'trained'}"
        print(f"{row}, {name}: chunk 256 {peaks[0]} MiB, none {peaks[1]} MiB", flush=True)
        results[f"{row}, {name}"] = peaks


def train_llama_1b(results: dict) -> None:
    """60 AdamW steps in bf16 autocast on a made-up language, stock, in half batches, patched."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 16}
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=True)
    torch.manual_seed(1)
    table = torch.randint(0, 128256, (4096, 4))  # each of 4096 words has four that may follow
    words = torch.randint(0, 4096, (60, 4, 512))
    for k in range(1, 512):
        follow = torch.randint(0, 4, words.shape[:2])
        words[..., k] = table[words[..., k - 1] % 4096, follow] % 4096
    curves = {}
    for name, parts in (("stock", 1), ("half batches", 2), ("patched", 1)):
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = LlamaForCausalLM(config).train()
        model = script.patch_causal_lm(model) if name == "patched" else model
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=2e-4), []
        for batch in words.cuda():
            total = 0.0
            for ids in batch.chunk(parts):
                with torch.autocast("cuda", torch.bfloat16):
                    loss = model(input_ids=ids, labels=ids).loss / parts
                loss.backward()
                total += loss.item()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
        curves[name] = losses
        del model, optimizer
        torch.cuda.empty_cache()
    gaps = {
        k: max(abs(a - b) for a, b in zip(c, curves["stock"], strict=True))
        for k, c in curves.items()
    }
    ends = {name: f"{curve[0]:.4f} to {curve[-1]:.4f}" for name, curve in curves.items()}
    print(f"Llama 1B, 60 steps: {ends}; furthest from stock: {gaps}")
    results["Llama 1B"] = curves


def sweep(results: dict, path: Path) -> None:
    """Memory and time by vocabulary and by tokens, hidden size 2048, as a picture."""
    from matplotlib.figure import Figure

    ways = {"ours": script.linear_cross_entropy, "eager": script.plain}
    ways |= {"ours, chunk 256": functools.partial(script.linear_cross_entropy, chunk=256)}
    sizes = [("vocabulary", 8192, 2**k) for k in range(13, 19)]
    sizes += [("tokens", 2**k, 128256) for k in range(10, 16)]
    points = {}
    for (axis, n, v), (name, way) in itertools.product(sizes, ways.items()):
        tensors = random_tensors(n, 2048, v, False)
        with contextlib.suppress(torch.OutOfMemoryError):
            peak = script.peak_mib(way, *tensors)
            run = functools.partial(script.backward, way, *tensors)
            point = v if axis == "vocabulary" else n, peak, do_bench(run, return_mode="median")
            points.setdefault((axis, name), []).append(point)
            print(f"sweep by {axis}, {n}x2048x{v}, {name}: {point[2]:.2f} ms, {peak:.0f} MiB")
    results["sweep"] = {" ".join(key): value for key, value in points.items()}
    figure = Figure((10, 8), layout="constrained", dpi=150)
    figure.suptitle(
        f"A head and its cross-entropy, hidden 2048, bf16, {torch.cuda.get_device_name()}"
    )
    panels = figure.subplots(2, 2, sharex="col")
    for (axis, name), found in points.items():
        for row, unit in ((0, "MiB beyond the gradients"), (1, "ms, forward and backward")):
            panel = panels[row, axis == "tokens"]
            panel.loglog([p[0] for p in found], [p[1 + row] for p in found], "o-", label=name)
            panel.set(ylabel=unit, xlabel=axis)
            panel.grid(alpha=0.3)
    panels[0, 0].legend()
    save(path, lambda part: figure.savefig(part, format="png"))


def compile_kernel(capability: int, dtype: str, options: bool, stats: bool, grads: bool):
    """_row_kernel for a chip; needs no GPU. options: bias, softcap and mean."""
    block, warps = (4096, 16) if dtype == "fp32" else (16384, 32)
    names = script._row_kernel.arg_names
    types = [f"*{dtype}", "*fp32", "*i64", "*fp32", "*fp32", *["i32"] * 5, "fp32", "fp32"]
    constants = [-100, options, options, stats, grads, options, block]
    signature = dict(zip(names, types + ["constexpr"] * 7, strict=True))
    divisible = {(k,): [["tt.divisibility", 16]] for k in range(9)}
    constants = dict(zip(names[-7:], constants, strict=True))
    source = ASTSource(script._row_kernel, signature, constexprs=constants, attrs=divisible)
    target = GPUTarget("cuda", capability, 32)
    settings = {"num_warps": warps, "debug": True, "sanitize_overflow": False}
    return triton.compile(source, target=target, options=settings)


def print_target(capability: int) -> None:
    dtypes = ("fp16", "fp32") if capability < 80 else ("bf16", "fp16", "fp32")
    kinds = ((True, True), (True, False), (False, True))
    for dtype, options, (stats, grads) in itertools.product(dtypes, (False, True), kinds):
        used = resources(compile_kernel(capability, dtype, options, stats, grads))
        words = f"{used['REG']} registers, {used['STACK'] + used['LOCAL']} bytes spilled"
        print(
            f"sm_{capability} {dtype}, options {options}, stats {stats}, gradient {grads}: {words}"
        )


def main():
    timings = {name: functools.partial(time_shape, name=name) for name in SHAPES}
    timings |= {"grpo": time_grpo, "memory": measure_memory}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=",".join(timings), help=f"of {','.join(timings)}")
    parser.add_argument("--plot", type=Path, metavar="PATH")
    parser.add_argument("--curve", action="store_true")
    parser.add_argument("--target", metavar="sm_NN")
    parser.add_argument("--json", type=Path, metavar="PATH")
    args = parser.parse_args()
    if args.target:
        return print_target(int(args.target.removeprefix("sm_")))
    results = print_header("chunked_ce")
    if args.plot:
        sweep(results, args.plot)
    elif args.curve:
        train_llama_1b(results)
    else:
        for name in args.only.split(","):
            timings[name](results)
            torch.cuda.empty_cache()
    if args.json:
        save(args.json, lambda part: part.write_text(json.dumps(results, indent=1)))


if __name__ == "__main__":
    main()
