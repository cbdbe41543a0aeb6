"""nf4_triton.py beside its peers; what bounds it on other chips; how small 4-bit storage could get.

    python bench/nf4_triton.py                 all timings (a GPU), or some of them:
                                               --only challenge,kernel,host,rows,step
    python bench/nf4_triton.py --plot PATH     also draws the kernel's rates by size (matplotlib)
    python bench/nf4_triton.py --target sm_75  registers, SASS and what bounds the kernel on a T4
    python bench/nf4_triton.py --storage       storage bounds of Gaussian weights, or of one tensor:
                                               --storage FILE.safetensors --tensor NAME

Peers are timed if they are installed and give the same bits: bitsandbytes, PEFT, Unsloth.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).parents[1])  # this file has the script's name

import nf4_triton as script
from bench.common import in_turns, instructions, print_header, resources, save, show

PACKED_BYTES = 0.5 + 1 / 64 + 4 / 16384  # read per weight: codes, absmax, absmax2 (64, nested 256)
SHAPES = {
    "Llama 1B up": (8192, 2048),
    "challenge": (4096, 1024),
    "Llama 8B up": (14336, 4096),
    "Llama 70B up": (28672, 8192),
    "Llama 1B q": (2048, 2048),
    "Llama 8B q": (4096, 4096),
    "Llama 70B q": (8192, 8192),
    "Qwen2.5 7B q": (3584, 3584),
    "Qwen2.5 7B up": (18944, 3584),
    "Gemma2 9B up": (14336, 3584),
}
# Compute capability: published GPU, bytes/s, SMs, boost clock in Hz
CHIPS = {
    75: ("T4", 320e9, 40, 1.59e9),
    80: ("A100", 2039e9, 108, 1.41e9),
    89: ("L4", 300e9, 58, 2.04e9),
    90: ("H200", 4800e9, 132, 1.98e9),
    100: ("B200", 8000e9, 148, 1.96e9),
}


def find_peers() -> dict:
    """Name -> function of (weight, quant_state), of what is installed and gives the same bits."""
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    import bitsandbytes.functional as bnb
    from peft.utils.integrations import dequantize_bnb_weight

    peers = {
        "ours": script.dequantize_nf4,
        "memset": script.memset,
        "reference": script.challenge_reference,
        "bitsandbytes": bnb.dequantize_4bit,
        "peft": lambda weight, state: dequantize_bnb_weight(weight),
    }
    with contextlib.suppress(ImportError), contextlib.redirect_stdout(io.StringIO()):
        import unsloth  # noqa: F401
        from unsloth.kernels.utils import fast_dequantize

        peers["unsloth"] = fast_dequantize
        peers["unsloth, one buffer"] = functools.partial(fast_dequantize, use_global_buffer=True)
    pair = script.check_challenge(1, 64, 256, 512, 0, torch.bfloat16, "cuda")[0]
    want = script.dequantize_nf4(*pair)
    for name in [name for name in peers if name != "memset"]:
        got = peers[name](*pair)
        if not script.same_bits(got if got.shape == want.shape else got.t(), want):
            print(f"{name} gives other bits and is not timed")
            del peers[name]
    assert "reference" in peers, "the challenge's reference gives other bits"
    return peers


def time_challenge(results: dict, peers: dict) -> None:
    """The challenge's own test: 1000 rounds of three weights with a synchronize after each."""
    total = {}
    for option in script.CHALLENGE:
        pairs = script.check_challenge(*option, "cuda")

        def measure(peer, pairs=pairs):
            def round_of_three():
                for pair in pairs:
                    peer(*pair).t()
                    torch.cuda.synchronize()

            return script.wall_us(round_of_three, 100)

        times = in_turns(peers, measure, 3)
        total = {name: total.get(name, 0) + time_us for name, time_us in times.items()}
        dtype = script.DTYPES[option[5]]
        show(results, f"challenge {option[2]}x{option[3]} {dtype}", times, "us a round")
    show(results, "challenge, its three options", total, "us a round")


def time_kernel(results: dict, peers: dict) -> None:
    """The kernel alone in a replayed CUDA graph over 0.5 GB of weights, ten shapes of models."""
    timed = {
        name: peers[name] for name in ("ours", "memset", "reference", "unsloth") if name in peers
    }
    ratios = {name: [] for name in timed}
    for name, shape in SHAPES.items():
        dtype = torch.float16 if name == "Llama 1B up" else torch.bfloat16
        times = in_turns(timed, lambda f, s=shape, d=dtype: script.graph_us(f, s, d), 1)
        nbytes = math.prod(shape) * (PACKED_BYTES + dtype.itemsize)
        rate, floor = nbytes / times["ours"] / 1e3, times["ours"] / times["memset"]
        row = f"kernel {name} {shape[0]}x{shape[1]} {script.DTYPES[dtype]}"
        show(results, f"{row}: {rate:.0f} GB/s, {floor:.3f} of a memset", times, bytes=nbytes)
        for peer in timed:
            ratios[peer].append(times[peer] / times["ours"])
    means = {peer: statistics.geometric_mean(found) for peer, found in ratios.items()}
    print("kernel, geometric means over ours:", *(f"{k} {v:.2f}x" for k, v in means.items()))


def time_host(results: dict, peers: dict) -> None:
    """A call's cost to the host, the GPU idle."""
    pair = script.check_challenge(1, 64, 256, 256, 0, torch.bfloat16, "cuda")[0]
    show(results, "host", in_turns(peers, lambda f: script.wall_us(lambda: f(*pair), 500), 3))


def time_rows(results: dict, peers: dict) -> None:
    """Products of few to many rows, 4096 -> 14336, by the patched function and by stock."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(4096, 14336, bias=None, quant_type="nf4").to("cuda")
    weight, state = layer.weight, layer.weight.quant_state
    stock = bnb.matmul_4bit
    with script.patch_bitsandbytes():
        functions = {"ours": bnb.matmul_4bit, "bitsandbytes": stock}
        for rows in (1, 4, 16, 32, 33, 64, 512, 4096):
            x = torch.randn(rows, 4096, dtype=torch.bfloat16, device="cuda")

            def measure(f, x=x):
                def run():
                    f(x, weight, state)

                time_us = script.wall_us(run, 100)
                torch.cuda.synchronize()
                return time_us

            show(
                results,
                f"product of {rows} rows, 4096 -> 14336 bf16",
                in_turns(functions, measure, 5),
            )


def qlora_model(hidden: int, inner: int, layers: int):
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


def qlora_step(model, ids) -> tuple:
    """(loss, gradients) of one step."""
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def time_step(results: dict, peers: dict) -> None:
    """A QLoRA step of PEFT's, with bitsandbytes patched and as it is."""
    model, ids = qlora_model(2048, 8192, 4), torch.randint(32000, (2, 1024), device="cuda")

    def measure(patch):
        with patch():
            return script.wall_us(lambda: qlora_step(model, ids)[0].item(), 5)

    patches = {"ours": script.patch_bitsandbytes, "bitsandbytes": contextlib.nullcontext}
    times = in_turns(patches, measure, 3)
    show(results, "QLoRA step, 4 layers of Llama 1B, 2048 tokens", times)


# step first: importing Unsloth patches transformers
TIMINGS = {
    "step": time_step,
    "challenge": time_challenge,
    "kernel": time_kernel,
    "host": time_host,
    "rows": time_rows,
}


def draw(results: dict, path: Path) -> None:
    """The kernel's rates by size, below the memory's."""
    from matplotlib.figure import Figure

    kernels = sorted((r for r in results.values() if "bytes" in r), key=lambda r: r["bytes"])
    axes = (figure := Figure((8, 5), layout="constrained", dpi=150)).subplots()
    for name in [name for name in kernels[0] if name not in ("unit", "bytes")]:
        rates = [r["bytes"] / r[name] / 1e3 for r in kernels]
        style = "k--" if name == "memset" else "o-"
        axes.plot([r["bytes"] / 2**20 for r in kernels], rates, style, label=name)
    major, minor = torch.cuda.get_device_capability()
    if major * 10 + minor in CHIPS:
        chip, peak = CHIPS[major * 10 + minor][:2]
        axes.axhline(peak / 1e9, color="grey", label=f"the memory of {chip}, published")
    axes.set(xscale="log", ylim=0, ylabel="GB/s read and written")
    axes.set(xlabel="MiB of a weight, packed and unpacked (cold L2, no launch cost)")
    axes.set(title=f"NF4 dequantisation by size, {torch.cuda.get_device_name()}")
    axes.set_xticks(ticks := (10, 20, 50, 100, 200, 500), map(str, ticks))
    axes.legend()
    axes.grid(alpha=0.3)
    save(path, lambda part: figure.savefig(part, format="png"))


def print_target(sm: int, results: dict) -> None:
    """What the kernel compiles to for a chip, and whether memory or issue bounds it there."""
    chip, bandwidth, sms, clock = CHIPS[sm]
    for (dtype, name), (words, warps) in itertools.product(
        script.DTYPES.items(), ((512, 4), (1024, 16))
    ):
        compiled = script.compile_kernel(sm, name, words=words, warps=warps)
        code, used = instructions(compiled), resources(compiled)
        each = len(code) / (words * 8 // warps // 32)
        memory = (PACKED_BYTES + dtype.itemsize) / bandwidth * 1e12
        issue = each / (sms * 64 * clock) * 1e12
        bound, ratio = ("memory" if memory > issue else "instruction issue"), memory / issue
        print(
            f"sm_{sm} {name}, {words} words on {warps} warps: {used['REG']} registers, "
            f"{used['SHARED']} B shared, {used['LOCAL'] + used['STACK']} B local, {each:.1f} SASS "
            f"instructions a weight\n    on a {chip}: memory {memory:.2f} ps a weight, issue "
            f"{issue:.2f} ps (64 lanes a clock, SM at {clock / 1e9:.2f} GHz): bound by {bound}, "
            f"{max(ratio, 1 / ratio):.1f}x"
        )
        results[f"sm_{sm} {name} {words}"] = {"instructions": each, "bound": bound, **used}


def storage_bounds(weight, blocksize: int, nested: bool) -> tuple[float, float, float, float]:
    """(bits stored, entropy of the codes, lossless bound, relative error) per weight. The bound
    codes each weight given its block's scale (in 64 classes), and the nested scales' codes."""
    import bitsandbytes.functional as bnb

    def entropy(values):
        p = torch.bincount(values).double() / values.numel()
        return -torch.xlogy(p, p).sum().item() / math.log(2)

    packed, state = bnb.quantize_4bit(weight, None, None, blocksize, nested, "nf4")
    error = ((script.dequantize_nf4(packed, state) - weight).norm() / weight.norm()).item()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[: weight.numel()].int()
    scale = state.state2.code[state.absmax.int()] if nested else state.absmax
    rank = scale.argsort(stable=True).argsort() * 64 // len(scale)
    rank = rank.repeat_interleave(blocksize)[: len(codes)]
    bits = 8 + 32 / state.state2.blocksize if nested else 32
    coded = bits - 8 + entropy(state.absmax.int()) if nested else 32
    bound = entropy(rank * 16 + codes) - entropy(rank) + coded / blocksize
    return 4 + bits / blocksize, entropy(codes), bound, error


def print_storage(weight, name: str, results: dict) -> None:
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


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--only", default=",".join(TIMINGS), metavar="NAMES")
    parser.add_argument("--plot", type=Path, metavar="PATH")
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--target", choices=[f"sm_{sm}" for sm in CHIPS])
    parser.add_argument("--storage", nargs="?", const="", metavar="FILE")
    parser.add_argument("--tensor", metavar="NAME")
    args = parser.parse_args()
    results = print_header("bench/nf4_triton")
    if args.target:
        print_target(int(args.target[3:]), results)
    elif args.storage is not None:
        weight = torch.randn(2**22)
        if args.storage:
            from safetensors import safe_open

            with safe_open(args.storage, "pt") as file:
                weight = file.get_tensor(args.tensor)
        print_storage(weight, args.tensor or "Gaussian", results)
    elif not torch.cuda.is_available():
        parser.error("found no GPU, need one for timings")
    else:
        names, peers = args.only.split(","), {}
        if unknown := set(names) - set(TIMINGS):
            parser.error(f"--only: found {', '.join(unknown)}, need some of {', '.join(TIMINGS)}")
        for name, measure in TIMINGS.items():
            if name in names:
                if name != "step" and not peers:
                    peers = find_peers()
                measure(results, peers)
        if args.plot:
            draw(results, args.plot)
    if args.json:
        save(args.json, lambda part: part.write_text(json.dumps(results, indent=1)))


if __name__ == "__main__":
    main()
