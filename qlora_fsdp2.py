"""QLoRA on several GPUs under FSDP2, through transformers' Trainer, from one GPU's loss curve.

Problem: FSDP2 shards parameters, and a QLoRA model's are mostly 4-bit bytes that must be neither
cast nor trained. transformers' way types those bytes as bf16 and gathers them for every block,
which costs memory, traffic and, for some bit patterns, the bytes themselves.

Idea: what FSDP2 sees is what is trained.
- Each block's frozen tensors (packed weights, their quantisation states, norms) lie in one uint8
  buffer of which they are views. --base replicate, the default: every rank has it, FSDP2 never
  sees it, and all traffic of a step is LoRA's.
- --base shard: the same buffer is one frozen uint8 parameter of the block's FSDP2 group. FSDP2
  shards it, gathers it with LoRA's in one all-gather, ahead of need, and frees it; the views stay
  valid because FSDP2 gathers into the same storage. A 70B base then needs a share of its bytes on
  each GPU. torch 2.11 would make it trainable and cast it: two small patches, both in _fully_shard.
- Ranks read a checkpoint's blocks in turns, quantise them on their GPU if they are not, and send
  the bytes to the others. No rank reads what another reads, or holds a 16-bit model.
- Blocks are compiled one by one inside FSDP2's hooks, with everything that compile_qlora.py fuses
  (part A's kernel, gated MLP, checkpointing by the partitioner); the loss is chunked_ce.py's.
- Data is dealt as a single process would read it, also the last uneven batches, and the loss is
  the mean over all ranks' tokens, so the curve is that of one GPU with the same global batch.
- The optimizer and clipping work on each rank's piece, without DTensor's cost for each tensor.
- Checkpoints are torch.distributed.checkpoint's, written beside training and renamed when whole.

Left out: tensor, context and pipeline parallelism; full finetuning; evaluation while training.
The head and the embedding are in 16 bits, frozen; with --base shard in the host's memory.
Two T4s were not at hand: README.md says what was done instead.

    python qlora_fsdp2.py                  self-test, then timings; --test or --bench for one
    python qlora_fsdp2.py --bench --only 8b,shard,peers --plot losses.png --json times.json
    torchrun --nproc_per_node 2 qlora_fsdp2.py --model unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit
        --dataset data.jsonl --max_length 2048 --per_device_train_batch_size 2
        --gradient_accumulation_steps 4 --max_steps 60 --gradient_checkpointing true --fp16 true
        (any TrainingArguments flag; on several machines as torchrun's own manual says)
    torchrun ... --base shard --cpu_offload true --replicas 2 --optim adamw_8bit --merge true
    torchrun ... --resume_from_checkpoint true         on as many GPUs or another number
"""

import atexit
import collections
import concurrent.futures
import contextlib
import copy
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import resource
import select
import shutil
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
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, NamedTuple
from unittest import mock

if __name__ == "__main__":  # Ctrl-C while torch is imported: nothing else can catch it yet
    INTERRUPT = signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    FileSystemReader,
    FileSystemWriter,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

try:
    import chunked_ce
    import compile_qlora
    from compile_qlora import (
        GIB,
        TARGETS,
        _check_paths,
        _import,
        _need,
        _no_memory,
        _self_test,
        _write,
    )
    from compile_qlora import _random_cases as _fuzz
    from nf4_triton import NF4, dequantize_nf4
except ModuleNotFoundError as error:
    if error.name not in ("chunked_ce", "compile_qlora", "flex_attn", "nf4_triton"):
        raise
    found = f"qlora_fsdp2: found no {error.name}.py, need it in this script's directory"
    if __name__ != "__main__":
        raise ImportError(found) from None
    print(found, file=sys.stderr)
    sys.exit(77)

ALIGN = 256  # bytes between the starts of tensors in a unit's buffer
SHARD_BYTES = 5 * 10**9  # of a merged model's files
TIMINGS = "parity", "8b", "shard", "peers", "t4", "70b"  # on GPUs, by --only
PEERS = {
    "hf_ddp": "transformers Trainer, DDP",
    "unsloth_ddp": "Unsloth, DDP",
    "unsloth_fsdp2": "Unsloth, its FSDP2",
    "hf_fsdp2": "transformers Trainer, FSDP2 by accelerate",
}
DEFAULT = "8b", "hf_ddp"


class Missing(RuntimeError):
    """The hardware that was asked for is not there: exit 77."""


# --------------------------------------------------------------------------------------------------
# The ranks


class World(NamedTuple):
    """This process among the others."""

    rank: int
    size: int
    local: int  # on this machine
    device: torch.device
    gloo: object  # a process group for CPU tensors and objects
    saver: object  # another, for checkpoints: they are written while training goes on

    @property
    def first(self):
        return self.rank == 0


def _environment() -> tuple[int, int, int]:
    """(rank, size, local rank) as torchrun says; (0, 1, 0) without it."""
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK"
    given = [name for name in names if name in os.environ]
    found = ", ".join(given)
    _need(len(given) in (0, 3), "environment", found, f"all of {', '.join(names)}: use torchrun")
    values = [os.environ[name] for name in given] or ["0", "1", "0"]
    _need(all(v.isdigit() for v in values), found, ", ".join(values), "numbers: use torchrun")
    rank, size, local = map(int, values)
    _need(0 <= rank < size, "RANK", f"{rank} of WORLD_SIZE {size}", f"0 to {size - 1}")
    return rank, size, local


def join(use_cpu: bool = False) -> World:
    """Joins the process group that torchrun describes: NCCL and gloo, or gloo alone on CPUs.
    Missing if this machine has fewer GPUs than ranks."""
    rank, size, local = _environment()
    gpus = 0 if use_cpu else torch.cuda.device_count()
    if gpus and local >= gpus:
        need = f"one a process: --nproc_per_node {gpus} at most"
        raise Missing(f"found {gpus} GPUs on this machine and local rank {local}, need {need}")
    device = torch.device("cuda", local) if gpus else torch.device("cpu")
    how = {"backend": "cpu:gloo,cuda:nccl" if gpus else "gloo"}
    if gpus:
        torch.cuda.set_device(device)
        how["device_id"] = device
    if not dist.is_initialized():
        if "MASTER_ADDR" not in os.environ:
            how |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(**how)
    groups = (dist.new_group(backend="gloo") for _ in range(2))
    return World(rank, size, local, device, *groups)


class _Voice:
    """Lets one rank speak for all: the first that has something to say."""

    def __init__(self):
        self.store, self.output_dir = None, "results/qlora_fsdp2"

    def connect(self):
        """A line of its own to the store of torchrun's agent, which outlives any rank."""
        names = "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"
        if all(name in os.environ for name in names):
            address, port, _ = (os.environ[name] for name in names)
            how = {"is_master": False, "wait_for_workers": False}
            with contextlib.suppress(RuntimeError):
                self.store = dist.TCPStore(address, int(port), **how)

    def say(self, words):
        """What ended this run, a traceback if that was not foreseen, and the RESULT line: it is the
        one rank that speaks who writes it, as the first may be gone."""
        with contextlib.suppress(RuntimeError):
            count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            if self.store is not None and self.store.add(f"qlora_fsdp2/said/{count}", 1) > 1:
                return
        who = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        line = f"qlora_fsdp2: {who}{words}" if words else traceback.format_exc()
        print(line, file=sys.stderr, flush=True)
        print("RESULT qlora_fsdp2 FAIL", flush=True)


_voice = _Voice()


def _end_with_the_others():
    """torchrun sends SIGTERM when a rank has died, and SIGINT after Ctrl-C. Python runs no handler
    while a collective waits for a rank, but the interpreter writes the signal's number to a pipe at
    once. Of a torchrun that was killed, ranks would go on by themselves."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def end(code, words):
        _voice.say(f"{words}; {_last_words()}")
        os._exit(code)

    def watch():
        while True:
            ready, _, _ = select.select([read], [], [], 1.0)
            number = os.read(read, 1)[0] if ready else 0
            if number == signal.SIGINT:
                end(130, "interrupted")
            if number == signal.SIGTERM:
                end(143, "stopped: another rank has ended, or the job was stopped from outside")
            if parent not in (None, os.getppid()):
                end(143, "stopped: torchrun has ended")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()


def _checkpoints(output_dir) -> list[Path]:
    """The complete ones, oldest first."""
    found = {}
    for path in Path(output_dir).glob("checkpoint-*"):
        if match := re.fullmatch(r"checkpoint-(\d+)", path.name):
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def _last_words():
    complete = _checkpoints(_voice.output_dir)
    if not complete:
        return f"no checkpoint is complete in {_voice.output_dir}"
    return f"the last complete checkpoint is {complete[-1]} (--resume_from_checkpoint true)"


# --------------------------------------------------------------------------------------------------
# Options


@dataclass
class Options(compile_qlora.ModelOptions):
    """What this script adds to TrainingArguments."""

    max_length: int = field(default=2048, metadata={"help": "tokens of a row at most"})
    lora_r: int = field(default=64, metadata={"help": "LoRA rank"})
    lora_alpha: float = field(default=128.0, metadata={"help": "scaling = lora_alpha / lora_r"})
    base: str = field(
        default="replicate",
        metadata={"help": "the frozen weights: replicate, shard, or auto by free memory"},
    )
    replicas: int = field(
        default=1, metadata={"help": "HSDP: groups of ranks that each have a whole model"}
    )
    reshard_after_forward: bool = field(
        default=True,
        metadata={
            "help": "free what a block has gathered until its backward; false: what is gathered "
            "stays until the optimizer's step, through all micro-batches"
        },
    )
    cpu_offload: bool = field(
        default=False, metadata={"help": "sharded weights and the optimizer's states on the CPU"}
    )
    param_dtype: str = field(
        default="float32",
        metadata={"help": "LoRA is gathered in float32, or half: fp16 or bf16 as trained"},
    )
    reduce_dtype: str = field(
        default="float32", metadata={"help": "gradients are reduced in float32, or half"}
    )
    compile: bool = field(default=True, metadata={"help": "false: the same functions, eager"})
    only: str | None = field(
        default=None,
        metadata={
            "help": f"on GPUs, of {', '.join((*TIMINGS, *PEERS))} "
            f"(default: {', '.join(DEFAULT)}; --plot adds parity)",
            "metavar": "NAMES",
        },
    )
    memory_cap_gib: float = field(
        default=0.0, metadata={"help": "PyTorch may take so much of each GPU; 0: all"}
    )
    merge: bool = field(
        default=False, metadata={"help": "also write a merged 16-bit model, to output_dir/merged"}
    )

    def __post_init__(self):
        super().__post_init__()
        ok = 0 <= self.memory_cap_gib < math.inf
        _need(ok, "memory_cap_gib", self.memory_cap_gib, "0 or more GiB")


def _check_options(options, args, world):
    """ValueError for what does not go together."""
    for name, known in (
        ("base", ("replicate", "shard", "auto")),
        ("param_dtype", ("float32", "half")),
        ("reduce_dtype", ("float32", "half")),
    ):
        value = getattr(options, name)
        _need(value in known, name, repr(value), f"one of {', '.join(known)}")
    ok = options.replicas >= 1 and world.size % options.replicas == 0
    _need(ok, "replicas", options.replicas, f"a divisor of the {world.size} ranks")
    _need(args.world_size == world.size, "WORLD_SIZE", world.size, f"{args.world_size}, as Trainer")
    ours = "this script shards the model"
    for name, wanted, why in (
        ("fsdp", False, ours),
        ("deepspeed", False, ours),
        ("eval_strategy", "no", "evaluate the saved adapter"),
        ("load_best_model_at_end", False, "nothing is evaluated"),
        ("train_sampling_strategy", "random", "rows are dealt as in one process"),
        ("dataloader_drop_last", False, "the last rows are dealt out unevenly"),
        ("average_tokens_across_devices", True, "the loss is the mean over all ranks' tokens"),
        ("auto_find_batch_size", False, "a step must take the same rows"),
        ("label_smoothing_factor", False, "Trainer's needs the logits"),
    ):
        value = getattr(args, name, wanted)
        value = getattr(value, "value", value)  # of an enumeration
        ok = value == wanted if wanted else not value
        _need(ok, name, repr(value), f"{wanted or 'none'}: {why}")
    if options.offload:
        _need(world.device.type == "cuda", "offload", "a CPU", "GPUs")
        ok = any(getattr(args, n, False) for n in compile_qlora.CHECKPOINTING) and options.compile
        _need(ok, "offload", True, "--gradient_checkpointing true and --compile true")
    if world.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(world.device)
        ok = not args.bf16 or compile_qlora._half() == "bf16"
        _need(ok, "bf16", f"sm_{major}{minor}", "--fp16 true")


# --------------------------------------------------------------------------------------------------
# Reading a model: units of frozen tensors, each one buffer of bytes


class Entry(NamedTuple):
    """A frozen tensor and the places that it has in the model."""

    places: list[tuple[torch.nn.Module, str]]
    keys: list[str]  # of the checkpoint: any that is there
    linear: bool  # of a decoder block, so to be in 4 bits
    shape: torch.Size


@dataclass
class Unit:
    """What is gathered at once: a block, the embedding, the head, or the rest."""

    name: str
    module: torch.nn.Module
    entries: list[Entry]
    layout: list = field(default_factory=list)  # of each entry, see _pack
    attached: bool = False
    parked: "Parked | None" = None

    def attach(self, dtype, flat=None):
        """Once: makes the model's frozen tensors views of the unit's bytes, or of what FSDP2 has
        gathered of them: it always gathers into the same storage."""
        if not self.attached:
            _attach(self, self.module._base.data if flat is None else flat, dtype)
            self.attached = True

    @contextlib.contextmanager
    def gathered(self, dtype):
        """All of the unit's tensors are whole inside, whatever holds them."""
        holder = self.parked or (self.module if isinstance(self.module, FSDPModule) else None)
        if holder is not None:
            holder.unshard()
            if hasattr(self.module, "_base"):
                self.attach(dtype)
        yield
        if holder is not None:
            holder.reshard()


class Source:
    """The tensors of a checkpoint's safetensors files, read one at a time: what is mapped into
    memory is let go with the file."""

    def __init__(self, folder):
        self.folder = Path(folder)
        index, single = self.folder / "model.safetensors.index.json", "model.safetensors"
        if index.is_file():
            try:
                self.files = dict(json.loads(index.read_bytes())["weight_map"])
            except (KeyError, TypeError, ValueError):
                found = f"{index} without a weight_map"
                raise ValueError(
                    f"model: found {found}, need a whole file: fetch it again"
                ) from None
        else:
            need = "model.safetensors or model.safetensors.index.json"
            _need((self.folder / single).is_file(), "model", f"no safetensors in {folder}", need)
            with self._open(single) as file:
                self.files = dict.fromkeys(file.keys(), single)

    @contextlib.contextmanager
    def _open(self, name):
        safetensors = _import("safetensors")
        try:
            with safetensors.safe_open(self.folder / name, framework="pt") as file:
                yield file
        except (OSError, safetensors.SafetensorError) as error:
            words = " ".join(str(error).split())[:120]
            found = f"{self.folder / name}, which cannot be read ({words})"
            raise ValueError(f"model: found {found}, need a whole file: fetch it again") from None

    def __contains__(self, key):
        return key in self.files

    def read(self, key) -> Tensor:
        with self._open(self.files[key]) as file:
            return file.get_tensor(key)


def fetch(path, world) -> str:
    """A local directory for a hub id: fetched by one rank a machine."""
    if Path(path).is_dir():
        return str(path)
    get = functools.partial(
        _import("huggingface_hub").snapshot_download,
        path,
        allow_patterns=["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"],
    )
    for turn in (True, False):
        if (world.local == 0) == turn:
            try:
                folder = get()
            except Exception as error:  # noqa: BLE001 (the hub's client raises a dozen kinds)
                words = " ".join(str(error).split())[:160]
                need = "a local directory, or a hub id that this machine can fetch"
                raise ValueError(f"model: found {path!r} ({words}), need {need}") from None
        dist.barrier(group=world.gloo)
    return folder


def _empty_model(path, dtype, device, attention):
    """The model without its weights: parameters on the meta device, buffers computed."""
    transformers = _import("transformers")
    config = compile_qlora._causal_config(path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    for module in model.modules():
        buffers = {name: b for name, b in module.named_buffers(recurse=False) if b.is_meta}
        for name, buffer in buffers.items():
            module._buffers[name] = torch.empty_like(buffer, device=device)
        if buffers:  # inverse frequencies, scales: as from_pretrained makes them
            model._init_weights(module)
    return model.requires_grad_(False)


def _in_four_bits(model, source, dtype):
    """Every linear layer of the blocks as bitsandbytes' Linear4bit, on the meta device; of a
    quantised checkpoint those that are quantised in it."""
    bnb = _import("bitsandbytes")
    ready = any("quant_state.bitsandbytes__" in key for key in source.files)
    names = {module: name for name, module in model.named_modules()}
    for parent in list(model.base_model.layers.modules()):
        for name, layer in list(parent.named_children()):
            key = f"{names[parent]}.{name}.weight"
            wrong = f"{key}.quant_state.bitsandbytes__fp4" in source
            _need(not wrong, "model", f"{key} in FP4", "NF4, or 16-bit weights")
            if type(layer) is torch.nn.Linear and (not ready or _state_key(key) in source):
                sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
                how = {"compute_dtype": dtype, "quant_type": "nf4", "device": "meta"}
                new = bnb.nn.Linear4bit(*sizes, bias, **how)
                new.compute_type_is_set = True
                setattr(parent, name, new.requires_grad_(False))


def _state_key(key):
    return f"{key}.quant_state.bitsandbytes__nf4"


def _units(model) -> list[Unit]:
    """All frozen tensors of a model, each in one unit."""
    linear4bit = _import("bitsandbytes").nn.Linear4bit
    inner, head = model.base_model, model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    owners = [inner.get_input_embeddings(), *inner.layers, head]
    units = [Unit(names[module], module, []) for module in owners]
    units.append(Unit("rest", model, []))
    seen = {}
    for unit in units:
        for name, module in unit.module.named_modules():
            for attribute, p in module.named_parameters(recurse=False):
                key = ".".join(part for part in (names[module], attribute) if part)
                if p in seen:
                    if (module, attribute) not in seen[p].places:
                        seen[p].places.append((module, attribute))
                        seen[p].keys.append(key)
                    continue
                linear = isinstance(module, linear4bit) and attribute == "weight"
                shape = torch.Size((module.out_features, module.in_features)) if linear else p.shape
                seen[p] = Entry([(module, attribute)], [key], linear, shape)
                unit.entries.append(seen[p])
    return [unit for unit in units if unit.entries]


def _key(entry, source):
    found = [key for key in entry.keys if key in source]
    _need(found, "model", f"no tensor {entry.keys[0]}", "one of the config's architecture")
    return found[0]


def _check_state(packed, state):
    """What a checkpoint says of a weight, before a kernel reads as far as that says."""
    _need(state.quant_type == "nf4", "quant_type", repr(state.quant_type), "'nf4'")
    kept = isinstance(state.blocksize, int) and 32 <= state.blocksize <= 4096
    _need(kept and state.blocksize.bit_count() == 1, "blocksize", state.blocksize, "32 to 4096")
    numel, nested = math.prod(state.shape), state.state2
    blocks = -(-numel // state.blocksize)
    parts = [("weight", packed, torch.uint8, (numel + 1) // 2)]
    parts.append(("absmax", state.absmax, torch.float32 if nested is None else torch.uint8, blocks))
    if nested is not None:
        _need(nested.blocksize > 0, "nested_blocksize", nested.blocksize, "1 or more")
        scales2 = -(-blocks // nested.blocksize)
        parts.append(("nested_absmax", nested.absmax, torch.float32, scales2))
        parts.append(("nested_quant_map", nested.code, torch.float32, 256))
        parts.append(("nested_offset", state.offset, torch.float32, 1))
    for name, part, dtype, count in parts:
        found = f"{part.numel()} of {part.dtype}"
        _need((part.dtype, part.numel()) == (dtype, count), name, found, f"{count} of {dtype}")


def _tensors(entry, source, dtype, device):
    """(tensors of an entry by name, its quantisation's numbers or None)."""
    bnb = _import("bitsandbytes").functional
    key = _key(entry, source)
    value, ready = source.read(key), entry.linear and _state_key(key) in source
    if not ready:
        ok = value.shape == entry.shape
        _need(ok, key, f"shape {tuple(value.shape)}", f"{tuple(entry.shape)} by the config")
        _need(value.is_floating_point(), key, value.dtype, "a floating-point tensor")
    if not entry.linear:
        return {"": value.to(dtype)}, None
    if ready:
        parts = {n: source.read(n) for n in source.files if n.startswith(f"{key}.")}
        packed = value.to(device).contiguous().view(torch.uint8)
        try:
            state = bnb.QuantState.from_dict(parts, device)
            _check_state(packed, state)
            torch.testing.assert_close(parts[f"{key}.quant_map"], torch.tensor(NF4))
        except Exception as error:  # noqa: BLE001 (whatever a torn state makes of bitsandbytes)
            words = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            found = f"a state that cannot be read ({words})"
            raise ValueError(f"{key}: found {found}, need one as bitsandbytes saves it") from None
    else:
        value = value.to(device).to(dtype).contiguous()
        packed, state = bnb.quantize_4bit(value, quant_type="nf4", compress_statistics=True)
    ok = tuple(state.shape) == tuple(entry.shape)
    _need(ok, key, f"a weight of {tuple(state.shape)}", f"{tuple(entry.shape)} by the config")
    nested = state.state2
    tensors = {"": packed, "absmax": state.absmax, "code": state.code}
    if nested is not None:
        tensors |= {"offset": state.offset, "absmax2": nested.absmax, "code2": nested.code}
    return tensors, (state.blocksize, nested.blocksize if nested is not None else 0)


def _pack(unit, source, dtype, device):
    """(layout, buffer): for each entry its quantisation's numbers and {name: (first byte, shape,
    dtype)}; the tensors' bytes one after the other in a uint8 buffer on `device`."""
    found, layout, at = [], [], 0
    for entry in unit.entries:
        tensors, numbers = _tensors(entry, source, dtype, device)
        places = {}
        for name, value in tensors.items():
            places[name] = at, tuple(value.shape), value.dtype
            at += -(-value.nbytes // ALIGN) * ALIGN
        layout.append((numbers, places))
        found.append(tensors)
    flat = torch.zeros(at, dtype=torch.uint8, device=device)
    for (_, places), tensors in zip(layout, found, strict=True):
        for name, value in tensors.items():
            as_bytes = value.reshape(-1).contiguous().view(torch.uint8)
            flat[places[name][0] :][: value.nbytes].copy_(as_bytes)
        tensors.clear()
    return layout, flat


def _view(flat, place):
    first, shape, dtype = place
    size = math.prod(shape) * dtype.itemsize
    return flat[first : first + size].view(dtype).view(shape)


def _attach(unit, flat, dtype, only=None):
    """Makes the model's frozen tensors, or those of one module, views of a unit's bytes."""
    bnb = _import("bitsandbytes")
    for entry, (numbers, places) in zip(unit.entries, unit.layout, strict=True):
        views = {name: _view(flat, place) for name, place in places.items()}
        if numbers is None:
            value = torch.nn.Parameter(views[""], requires_grad=False)
        else:
            blocksize, nested = numbers
            make = bnb.functional.QuantState
            second = offset = None
            if nested:
                second = make(views["absmax2"], code=views["code2"], blocksize=nested)
                second.dtype, offset = torch.float32, views["offset"]
            state = make(
                views["absmax"],
                shape=entry.shape,
                code=views["code"],
                blocksize=blocksize,
                quant_type="nf4",
                dtype=dtype,
                offset=offset,
                state2=second,
            )
            value = bnb.nn.Params4bit(
                views[""],
                quant_state=state,
                blocksize=blocksize,
                compress_statistics=bool(nested),
                quant_type="nf4",
                bnb_quantized=True,
            )
        for module, name in entry.places:
            if only in (None, module):
                module._buffers[name] = value
                if numbers is not None:
                    module.quant_state = state


def _reserve(unit, dtype, device):
    """Empty parameters in the places of a unit's tensors: PEFT asks for their kind and device."""
    for entry in unit.entries:
        empty = torch.nn.Parameter(torch.empty(0, dtype=dtype, device=device), False)
        if entry.linear:
            kind = _import("bitsandbytes").nn.Params4bit
            empty = kind(torch.empty(0, dtype=torch.uint8, device=device), quant_type="nf4")
        for module, name in entry.places:
            module._parameters[name] = empty


def _as_buffers(unit):
    """Takes a unit's tensors out of the parameters: FSDP2 moves and shards those alone."""
    for entry in unit.entries:
        for module, name in entry.places:
            module.register_buffer(name, module._parameters.pop(name), persistent=False)


def _read_units(units, source, dtype, world):
    """Yields the units as they come, with their buffers. Ranks read in turns, one unit ahead of
    what is being sent."""
    mine = [unit for i, unit in enumerate(units) if i % world.size == world.rank]

    def read(unit):
        with torch.cuda.device(world.device) if world.device.type == "cuda" else _nothing():
            return _pack(unit, source, dtype, world.device)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ahead = collections.deque(pool.submit(read, unit) for unit in mine[:1])
        for i, unit in enumerate(units):
            owner, layout, flat = i % world.size, [None], None
            if owner == world.rank:
                unit.layout, flat = ahead.popleft().result()
                layout = [(unit.layout, flat.numel())]
                if (after := mine.index(unit) + 1) < len(mine):
                    ahead.append(pool.submit(read, mine[after]))
            if world.size > 1:
                dist.broadcast_object_list(layout, owner, group=world.gloo)
                unit.layout, size = layout[0]
                if flat is None:
                    flat = torch.empty(size, dtype=torch.uint8, device=world.device)
                dist.broadcast(flat, owner)
            yield unit, flat


_nothing = contextlib.nullcontext


class Parked:
    """The embedding or the head under --base shard: its bytes stay in pinned host memory. The GPU
    reads the embedding's rows there, so no more than a batch's tokens cross the bus; the head's
    bytes are copied for the loss, beside the last blocks, and freed after it."""

    def __init__(self, unit, flat, dtype, words):
        cuda = flat.device.type == "cuda"
        self.host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=cuda).copy_(flat)
        self.flat, self.stream = flat, torch.cuda.Stream() if cuda else None
        unit.attach(dtype, flat)
        if unit.module is words:
            _attach(unit, _on_gpu(self.host) if cuda else self.host, dtype, only=words)
        places = [module for entry in unit.entries for module, _ in entry.places]
        self.copied, self.expected = any(module is not words for module in places), False
        self.reshard()

    def expect(self):
        self.expected = True

    def start(self):
        """The copy, once a forward: a block's recomputation in the backward may come here too."""
        if self.expected:
            self.expected = False
            self.unshard(wait=False)

    def unshard(self, wait=True):
        if self.copied:
            self.flat.untyped_storage().resize_(self.host.numel())
            if self.stream is None:
                self.flat.copy_(self.host)
                return
            self.stream.wait_stream(torch.cuda.current_stream())  # it may have freed that memory
            with torch.cuda.stream(self.stream):
                self.flat.copy_(self.host, non_blocking=True)
            if wait:
                self.wait()

    def wait(self):
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)

    def reshard(self):
        self.wait()  # if a forward ended early its memory must not be used again before the copy
        self.flat.untyped_storage().resize_(0)


def _on_gpu(host):
    """A GPU tensor of pinned host memory itself."""
    data = {"shape": tuple(host.shape), "typestr": "|u1", "data": (host.data_ptr(), False)}
    shared = types.SimpleNamespace(__cuda_array_interface__=data | {"version": 3}, host=host)
    return torch.as_tensor(shared, device="cuda")


# --------------------------------------------------------------------------------------------------
# Sharding


def _fully_shard(module, *, frozen=None, **how):
    """torch's fully_shard. frozen: the module's uint8 parameter. Before torch 2.12 FSDP2 makes all
    that it shards trainable, which bytes cannot be, and casts them to param_dtype."""
    if frozen is None or torch.__version__ >= "2.12":
        return fully_shard(module, **how)
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    def parameter(data, requires_grad=None):
        wants = data.is_floating_point() if requires_grad is None else requires_grad
        return torch.nn.Parameter(data, wants)

    names = types.SimpleNamespace(**{**vars(torch.nn), "Parameter": parameter})
    with mock.patch.object(_fsdp_param, "nn", names):
        fully_shard(module, **how)
    for param in fully_shard.state(module)._fsdp_param_group.fsdp_params:
        if param.sharded_param.dtype == torch.uint8:
            stock = param.init_dtype_attrs
            param.init_dtype_attrs = lambda _, stock=stock: stock(MixedPrecisionPolicy())
    return module


def _estimate(units, model, options, args, shards):
    """(bytes of the base, bytes beside it) that a GPU needs, before anything is read."""
    base = 0
    for entry in (e for unit in units for e in unit.entries):
        if entry.linear:
            base += int(entry.shape.numel() * 0.516)  # 4 bits and nested scales of blocks of 64
        else:
            base += 2 * entry.shape.numel()
    lora = _lora_weights(model)
    # float32: weights, gradients and two moments in pieces; gradients as accumulated
    beside = lora * (16 // shards + 4 * (args.gradient_accumulation_steps > 1))
    config = model.config.get_text_config()
    tokens = args.per_device_train_batch_size * options.max_length
    kept = config.hidden_size * config.num_hidden_layers
    kept *= 2 if any(getattr(args, n, False) for n in compile_qlora.CHECKPOINTING) else 36
    block = 20 * config.intermediate_size + 2 * 4 * config.hidden_size
    return base, beside + tokens * (kept + block) + GIB


def _choose_base(options, world, base, beside):
    """(replicate or shard, why), the same on all ranks."""
    if world.device.type == "cpu":
        return "replicate", "on CPUs"
    free = torch.tensor(_free_bytes(options), dtype=torch.int64)
    dist.all_reduce(free, dist.ReduceOp.MIN, group=world.gloo)
    words = f"a copy needs about {(base + beside) / GIB:.1f} GiB on each GPU ({base / GIB:.1f} for "
    words += f"the base), {int(free) / GIB:.1f} are free"
    return ("replicate" if base + beside < 0.92 * int(free) else "shard"), words


def _free_bytes(options):
    free = torch.cuda.mem_get_info()[0]
    return min(free, int(options.memory_cap_gib * GIB)) if options.memory_cap_gib else free


def _trained(model) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _lora_weights(model) -> int:
    return sum(p.numel() for p in _trained(model).values())


class Loaded(NamedTuple):
    """A model ready to train, and what it took."""

    model: torch.nn.Module
    tokenizer: object
    units: list[Unit]
    base: str
    why: str
    seconds: float
    host_gib: float  # peak of this process beyond what it had before
    device_gib: float  # peak while loading
    base_bytes: int
    dtype: torch.dtype  # of the products
    group: object  # the ranks that share out a parameter


def load(path, options, args, dtype, world) -> Loaded:
    """The model of a checkpoint with LoRA, sharded: quantised (bitsandbytes NF4) or in 16 bits,
    from its safetensors. ValueError for what cannot be read."""
    transformers, peft = _import("transformers"), _import("peft")
    begin, host = time.perf_counter(), _host_gib()
    compile_qlora.flex_attn.register()
    source = Source(path)
    compile_qlora._config_of(path, options)
    model = _empty_model(path, dtype, world.device, "flex_attn")
    parts = [getattr(model.base_model, name, None) for name in ("layers", "norm", "rotary_emb")]
    found = f"a {type(model).__name__} without layers, norm or rotary_emb"
    _need(None not in parts, "model", found, "a Llama, Mistral, Qwen, Gemma or one built like them")
    _in_four_bits(model, source, dtype)
    units = _units(model)
    for unit in units:
        _reserve(unit, dtype, world.device)
    model.config.use_cache, model.is_loaded_in_4bit = False, True
    model.config.quantization_config = None
    lora = compile_qlora._lora_config(options, base_model_name_or_path=options.model or path)
    transformers.set_seed(args.seed)  # every rank draws the same LoRA weights
    model = peft.get_peft_model(model, lora)
    for unit in units:
        _as_buffers(unit)
    causal = model.get_base_model()
    causal.is_loaded_in_4bit = False  # accelerate would ask for a device map
    outside = [name for name in _trained(model) if ".layers." not in name]
    _need(not outside, "target_modules", outside[:1], "layers of the decoder blocks")
    shards = world.size // options.replicas
    base, why = options.base, "asked for"
    if shards == 1:
        base, why = "replicate", "there is one rank to a replica"
    elif base == "auto":
        sizes = _estimate(units, model, options, args, shards)
        base, why = _choose_base(options, world, *sizes)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    how = _sharding(options, world, dtype)
    total = 0
    blocks = set(causal.base_model.layers)
    for unit, flat in _read_units(units, source, dtype, world):
        total += flat.numel()
        frozen = None
        if base == "shard" and unit.module in blocks:
            frozen = unit.module._base = torch.nn.Parameter(flat, requires_grad=False)
        elif base == "shard" and unit.name != "rest":
            unit.parked = Parked(unit, flat, dtype, causal.get_input_embeddings())
        else:
            unit.attach(dtype, flat)
        if unit.module in blocks:
            _fully_shard(unit.module, frozen=frozen, **how)
        if frozen is not None:  # after FSDP2's own hook
            unit.module.register_forward_pre_hook(lambda *_, unit=unit: _arrived(unit, dtype))
        del flat, frozen
    fully_shard(model, **how)
    _prefetch(model, units, args.per_device_train_batch_size * options.max_length)
    for module in model.modules():  # else Dynamo would leave out guards, also those that matter
        if "_is_fsdp_managed_module" in vars(module):
            module._is_fsdp_managed_module = False
    seconds, tokenizer = time.perf_counter() - begin, compile_qlora._tokenizer(path)
    peak = _peak_gib() if world.device.type == "cuda" else 0.0
    grown = _host_gib() - host
    group = how["mesh"].get_group("shard")
    return Loaded(model, tokenizer, units, base, why, seconds, grown, peak, total, dtype, group)


def _sharding(options, world, dtype):
    """Arguments of fully_shard."""
    gathered = None if options.param_dtype == "float32" else dtype
    reduced = torch.float32 if options.reduce_dtype == "float32" else dtype
    shape, names = (world.size,), ("shard",)
    if options.replicas > 1:
        shape, names = (options.replicas, world.size // options.replicas), ("replicate", "shard")
    return {
        "mesh": init_device_mesh(world.device.type, shape, mesh_dim_names=names),
        "reshard_after_forward": options.reshard_after_forward,
        "mp_policy": MixedPrecisionPolicy(gathered, reduced, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
        if options.cpu_offload
        else OffloadPolicy(),
    }


def _arrived(unit, dtype):
    """A block's bytes are in place: what they were received in is let go. FSDP2 would keep it until
    the next block's have come, another block's memory."""
    unit.attach(dtype)
    group = fully_shard.state(unit.module)._fsdp_param_group
    if received := group.comm_ctx.all_gather_state:
        group._wait_all_gather_streams_on_event(received.event)
        group.comm_ctx.all_gather_state = None


def _prefetch(model, units, tokens):
    """Each block's all-gather starts a block ahead; a parked head's copy beside the forward of as
    many of the last blocks as hide it, and of those none is gathered ahead: it would stand beside
    the head, at the forward's peak (where it takes all blocks, speed comes first). The head is
    freed after the loss, which makes its gradient in the forward."""
    inner = model.get_base_model().base_model
    layers = list(inner.layers)
    head = next((unit.parked for unit in units if unit.parked and unit.parked.copied), None)
    if head is not None:
        block = next(unit for unit in units if unit.module is layers[0])
        weights = sum(entry.shape.numel() for entry in block.entries)
        # A bus of 30 GB/s, products of 2 * weights * tokens at 450 TFLOPS; slower GPUs hide more
        late = math.ceil(head.host.numel() * 7500 / (weights * tokens))
        first = max(0, len(layers) - late)
        model.register_forward_pre_hook(lambda *_: head.expect())
        layers[first].register_forward_pre_hook(lambda *_: head.start())
        inner.norm.register_forward_hook(lambda *_: head.wait())
        model.register_forward_hook(lambda *_: head.reshard())
        layers = layers[: first + 1] if first else layers
    for now, then in itertools.pairwise(layers):
        now.set_modules_to_forward_prefetch([then])


# --------------------------------------------------------------------------------------------------
# The optimizer: each rank's piece of a parameter is a tensor like any other


def _local(tensor):
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


# Others look at whole matrices, of which a rank has a piece
ELEMENTWISE = "Adam", "AdamW", "SGD", "Lion", "RMSprop", "Adagrad", "AdEMAMix", "NAdam", "RAdam"


def step_locally(optimizer):
    """Makes an element-wise optimizer (AdamW, SGD, Lion; bitsandbytes' 8-bit ones, which know no
    DTensor) step on the pieces that this rank has. In place; returns it. Its state_dict is of
    plain tensors: checkpoints are _optimizer_state's."""
    pieces = {}
    stock = optimizer.step

    def piece(p):
        if p not in pieces:
            pieces[p] = torch.nn.Parameter(_local(p.detach()), requires_grad=True)
            if p in optimizer.state:  # Adagrad's is made with it, and torch 2.11 makes it only then
                state = optimizer.state.pop(p)
                optimizer.state[pieces[p]] = {k: _local(v) for k, v in state.items()}
        ours = pieces[p]
        ours.grad = None if p.grad is None or not ours.numel() else _local(p.grad)
        return ours

    @functools.wraps(stock)
    def step(*args, **kwargs):
        whole = [group["params"] for group in optimizer.param_groups]
        for group, params in zip(optimizer.param_groups, whole, strict=True):
            group["params"] = [piece(p) for p in params]
        try:
            return stock(*args, **kwargs)
        finally:
            for group, params in zip(optimizer.param_groups, whole, strict=True):
                group["params"] = params
                for p in params:
                    pieces[p].grad = None

    optimizer.step, optimizer.pieces = step, pieces
    return optimizer


def clip_grad_norm(parameters, max_norm: float, group=None) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ (2-norm) for sharded gradients with one collective. group: of
    the ranks that share out a parameter. Returns the norm before clipping, on the gradients'
    device; does not wait for it."""
    grads = [_local(p.grad) for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    squares = torch.stack(torch._foreach_norm(grads, 2.0)).float().square().sum()
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(squares, group=group)
    norm = squares.sqrt()
    if max_norm and math.isfinite(max_norm):
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def wait_for_scale(scaler):
    """Makes a GradScaler wait for what it copies to gradients on the CPU: torch (2.11 to 2.13) reads
    the scale there, and notes an overflow, while the copy may be under way (pytorch/pytorch#176429).
    In place; returns it."""
    stock = scaler._unscale_grads_

    def unscale(optimizer, inv_scale, found_inf, *rest):
        if optimizer.param_groups[0]["params"][0].device.type == "cpu":  # then all are
            inv_scale, found_inf = inv_scale.cpu(), found_inf.cpu()
        return stock(optimizer, inv_scale, found_inf, *rest)

    scaler._unscale_grads_ = unscale
    return scaler


# bitsandbytes' states in 8 bits: name, its scales, its code book
IN_8_BITS = {"state1": ("absmax1", "qmap1"), "state2": ("absmax2", "qmap2")}


def _optimizer_state(optimizer, names, rank) -> tuple[dict, dict]:
    """(tensors, numbers) by parameter and name. Tensors in a parameter's shape are sharded like it,
    so that any number of ranks can read them. 8-bit ones are decoded for that; as many ranks as
    saved them find their own bytes beside (exact)."""
    decode = _import("bitsandbytes").functional.dequantize_blockwise
    tensors, numbers = {}, {}
    parts = {part for pair in IN_8_BITS.values() for part in pair}
    for name, p in names.items():
        state = optimizer.state.get(optimizer.pieces.get(p), {})
        for key, value in state.items():
            place = f"optimizer.{name}.{key}"
            if key in parts:
                continue
            if not isinstance(value, Tensor):
                numbers[place] = value
            elif value.shape != _local(p).shape:
                tensors[place] = value
            else:
                if value.dtype == torch.uint8:
                    absmax, code = (state[part] for part in IN_8_BITS[key])
                    tensors[f"exact.{rank}.{name}.{key}"] = value
                    tensors[f"exact.{rank}.{name}.{IN_8_BITS[key][0]}"] = absmax
                    value = decode(value, absmax=absmax, code=code, blocksize=256)
                tensors[place] = _like(p, value)
    return tensors, numbers


def _like(p, local):
    """A DTensor sharded as p of this rank's piece."""
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    spec = p._spec
    meta = TensorMeta(p.shape, p.stride(), local.dtype)
    return DTensor(local, DTensorSpec(spec.mesh, spec.placements, meta), requires_grad=False)


def _load_optimizer_state(optimizer, names, tensors, numbers, exact):
    """exact: this rank's 8-bit tensors by parameter and name, if as many ranks saved them."""
    encode = _import("bitsandbytes").functional.quantize_blockwise
    for name, p in names.items():
        prefix = f"optimizer.{name}."
        places = [*numbers.items(), *tensors.items()]
        state = {k[len(prefix) :]: _local(v) for k, v in places if k.startswith(prefix)}
        piece = torch.nn.Parameter(_local(p.detach()), requires_grad=True)
        if not state or not piece.numel():
            continue
        bits = getattr(getattr(optimizer, "args", None), "optim_bits", 32)
        if bits == 8 and piece.numel() >= optimizer.args.min_8bit_size:
            optimizer.fill_qmap()
            books = zip(IN_8_BITS.items(), ("dynamic", "udynamic"), strict=True)
            for (key, (absmax, qmap)), book in books:
                if key not in state:
                    continue
                code = optimizer.name2qmap[book].to(piece.device)
                value, made = encode(state[key], code=code, blocksize=256)
                state |= {key: value, absmax: made.absmax, qmap: code}
                for part in (key, absmax):
                    if (saved := exact.get(f"{name}.{part}")) is not None:
                        state[part] = saved.to(piece.device)
        optimizer.pieces[p] = piece
        optimizer.state[piece] = state


# --------------------------------------------------------------------------------------------------
# Data: dealt to the ranks as one process would read it


class Dealt(torch.utils.data.Sampler):
    """Batches of one rank: of the epoch's batches in order, every size-th, an empty one where there
    is none left. A single process that accumulates size times as often takes the same rows to each
    optimizer step. The order is accelerate's seedable sampler's, so Trainer's own."""

    def __init__(self, rows, batch, rank, size, seed, epoch):
        self.rows, self.batch, self.rank, self.size = rows, batch, rank, size
        self.seed, self.epoch = seed, epoch

    def __len__(self):
        return math.ceil(self.rows / (self.batch * self.size))

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        order = torch.randperm(self.rows, generator=generator).tolist()
        for i in range(len(self)):
            first = (i * self.size + self.rank) * self.batch
            yield order[first : first + self.batch]


@dataclass
class Collate(compile_qlora.Collate):
    """A batch padded on the right; of no rows, padding without labels: its rank takes part in the
    collectives and adds nothing to the loss."""

    packing: bool = False

    def __call__(self, rows):
        nothing = {"input_ids": [self.pad] * 2, "labels": [chunked_ce.IGNORE] * 2}
        if self.packing:
            nothing["position_ids"] = [0, 1]
        return super().__call__(rows or [nothing])


# --------------------------------------------------------------------------------------------------
# Training


class Traffic:
    """Counts the bytes that a rank receives, by collective. FSDP2 calls them by the names in
    torch.distributed, the newer ones since torch 2.13."""

    NAMES = "all_gather", "reduce_scatter", "all_reduce"
    CALLED: ClassVar = {
        "all_gather_into_tensor": "all_gather",
        "all_gather_single": "all_gather",
        "reduce_scatter_tensor": "reduce_scatter",
        "reduce_scatter_single": "reduce_scatter",
        "all_reduce": "all_reduce",
    }

    def __init__(self):
        self.bytes, self.calls = collections.Counter(), collections.Counter()

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        for name in [name for name in self.CALLED if hasattr(dist, name)]:
            counted = functools.partial(self._count, self.CALLED[name], getattr(dist, name))
            self.stack.enter_context(mock.patch.object(dist, name, counted))
        return self

    def __exit__(self, *_):
        self.stack.close()

    def _count(self, name, function, *args, **kwargs):
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        group = kwargs.get("group")
        size = dist.get_world_size(group)
        whole = max(t.nbytes for t in tensors)
        self.bytes[name] += whole * (size - 1) // size * (2 if name == "all_reduce" else 1)
        self.calls[name] += 1
        return function(*args, **kwargs)


class _Writer(FileSystemWriter):
    """torch's, whose error is the file system's own: of a full disk torch.save says other words."""

    def write_data(self, plan, planner):
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise OSError(cause.errno, cause.strerror, str(self.path)) from None


@functools.cache
def _trainer_class():
    class Sharded(compile_qlora._trainer_class()):
        """Trainer for a model that FSDP2 has sharded already."""

        def __init__(self, *args, world, group, reshard, **kwargs):
            self.world, self.group, self.reshard = world, group, reshard
            self.saving, self.run_state, self.last = None, {}, None
            self.now, self.marked = [], None
            self.steps = collections.deque(maxlen=10_000)  # (loss, labels) of this rank
            self.labels = 0  # of this rank so far
            super().__init__(*args, **kwargs)
            # Looked up once: a visit to every module takes milliseconds, in which a GPU may idle
            self.named = _trained(self.model)
            self.trained = list(self.named.values())
            self.sharded = [m for m in self.model.modules() if isinstance(m, FSDPModule)]
            _quicken(self.model, self.trained)
            self.model_accepts_loss_kwargs = True  # the loss divides by the tokens of all ranks

        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            prepare = self.accelerator.prepare_model  # autocast, and no DistributedDataParallel
            self.accelerator.prepare_model = functools.partial(prepare, evaluation_mode=True)
            if self.accelerator.scaler is not None:
                wait_for_scale(self.accelerator.scaler)

        def _move_model_to_device(self, *_):
            pass

        def _prepare_input(self, data):
            # From pinned memory without waiting, or each micro-batch would begin with an idle GPU
            if isinstance(data, Tensor):
                return data.to(self.world.device, non_blocking=True)
            return super()._prepare_input(data)

        def get_train_dataloader(self):
            args, world = self.args, self.world
            batch = args.per_device_train_batch_size
            seed = args.seed if args.data_seed is None else args.data_seed
            epoch = lambda: int(self.state.epoch or 0)
            dealt = Dealt(len(self.train_dataset), batch, world.rank, world.size, seed, epoch)
            return torch.utils.data.DataLoader(
                self.train_dataset,
                batch_sampler=dealt,
                collate_fn=self.data_collator,
                num_workers=args.dataloader_num_workers,
                pin_memory=args.dataloader_pin_memory and world.device.type == "cuda",
            )

        def create_optimizer(self, *args, **kwargs):
            fresh = self.optimizer is None
            made = super().create_optimizer(*args, **kwargs)
            if fresh:
                kind = type(self.optimizer).__name__
                need = f"one that works by elements: {', '.join(ELEMENTWISE)}"
                _need(kind in ELEMENTWISE, "optim", kind, need)
                step_locally(self.optimizer)
            return made

        def training_step(self, model, inputs, *args, **kwargs):
            last = self.accelerator.sync_gradients
            if last != self.last:
                self.last = last
                for module in self.sharded:
                    module.set_requires_gradient_sync(last, recurse=False)
                    module.set_reshard_after_backward(self.reshard or last, recurse=False)
            loss = super().training_step(model, inputs, *args, **kwargs)
            _, loss_, labels = self.seen.pop()
            self.now.append((loss_, int(labels)))
            return loss

        def end_step(self):
            """Adds up the step's micro-batches."""
            losses, labels = zip(*self.now, strict=True)
            self.steps.append((torch.stack(losses).sum(), sum(labels)))
            self.labels += sum(labels)
            self.now.clear()

        def floating_point_ops(self, inputs):
            if not hasattr(self, "_flos"):
                self._flos = 6 * sum(p.numel() for p in self.model.parameters())
            return self._flos * inputs["input_ids"].numel()

        def _clip_grad_norm(self, model):
            self.accelerator.unscale_gradients()
            return clip_grad_norm(self.trained, self.args.max_grad_norm, self.group)

        def _get_grad_norm(self, model, grad_norm=None):
            if grad_norm is None:
                grad_norm = clip_grad_norm(self.trained, 0.0, self.group)
            return grad_norm

        def log(self, logs, *args, **kwargs):
            if "loss" in logs:
                logs |= self.progress()
            super().log(logs, *args, **kwargs)

        def progress(self):
            """Since the last call: tokens with labels a second, all ranks; and this rank's peak."""
            step = self.state.global_step  # the same on all ranks, as labels are not
            last, self.marked = self.marked, (time.perf_counter(), self.labels, step)
            found = {}
            if last and step > last[2]:
                labels = torch.tensor(self.labels - last[1])
                dist.all_reduce(labels, group=self.world.gloo)
                found["tokens_per_s"] = round(int(labels) / (self.marked[0] - last[0]))
            if self.world.device.type == "cuda":
                found["peak_gib"] = round(_peak_gib(), 2)
            return found

        # Checkpoints

        def _save_checkpoint(self, model, trial):
            self.finish_saving()
            world, names = self.world, self.named
            final = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            part = final.with_name(f"{final.name}.part")
            optimizer = self.optimizer.optimizer
            tensors, numbers = _optimizer_state(optimizer, names, world.rank)
            tensors |= {f"model.{name}": p.detach() for name, p in names.items()}
            # What is on the CPU goes on changing while it is written
            tensors = {
                k: t.clone() if _local(t).device.type == "cpu" else t for k, t in tensors.items()
            }
            state = tensors | _rng_state(world)
            if world.first:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
                self.state.save_to_json(part / "trainer_state.json")
                scaler = self.accelerator.scaler
                run = {
                    "world": world.size,
                    "global_batch": _global_batch(self.args, world),
                    "rows": len(self.train_dataset),
                    "optimizer": type(optimizer).__name__,
                    "numbers": numbers,
                    "scheduler": self.lr_scheduler.state_dict(),
                    "scaler": scaler.state_dict() if scaler else None,
                }
                (part / "run_state.json").write_text(json.dumps(run))
            dist.barrier(group=world.gloo)
            writer = _Writer(part, sync_files=True)
            future = dcp.async_save(state, storage_writer=writer, process_group=world.saver)
            if world.first:
                future.add_done_callback(functools.partial(self._complete, part, final))
            self.saving = future

        def _complete(self, part, final, future):
            if future.exception() is None:
                if final.exists():
                    final.rename(old := final.with_name(f"{final.name}.old"))
                    part.rename(final)
                    shutil.rmtree(old)
                else:
                    part.rename(final)
                if self.args.save_total_limit:
                    for path in _checkpoints(self.args.output_dir)[: -self.args.save_total_limit]:
                        shutil.rmtree(path)
            else:
                shutil.rmtree(part, ignore_errors=True)

        def finish_saving(self, wait=True):
            """Raises what went wrong while the last checkpoint was written."""
            if self.saving is not None and (wait or self.saving.done()):
                try:
                    self.saving.result()
                except CheckpointException as error:
                    error.writing = True
                    raise
                self.saving = None

        def _load_from_checkpoint(self, *_, **__):
            pass  # with the optimizer's state, below

        def _load_optimizer_and_scheduler(self, checkpoint):
            if checkpoint is None:
                return
            world, names = self.world, self.named
            run = json.loads((Path(checkpoint) / "run_state.json").read_text())
            batch, rows = _global_batch(self.args, world), len(self.train_dataset)
            need = f"{run['global_batch']} as in {checkpoint}: a step must take the same rows"
            _need(batch == run["global_batch"], "global batch", batch, need)
            need = f"{run['rows']} as in {checkpoint}"
            _need(rows == run["rows"], "rows of the dataset", rows, need)
            optimizer = self.optimizer.optimizer
            kind = type(optimizer).__name__
            _need(kind == run["optimizer"], "optim", kind, f"the checkpoint's {run['optimizer']}")
            reader, same = FileSystemReader(checkpoint), run["world"] == world.size
            fused = any(g.get("fused") or g.get("capturable") for g in optimizer.param_groups)
            state = {f"model.{name}": p.detach() for name, p in names.items()}
            for key, meta in reader.read_metadata().state_dict_metadata.items():
                kind, *rest = key.split(".")
                if kind == "optimizer":
                    p = names.get(".".join(rest[:-1]))
                    _need(p is not None, "checkpoint", key, "the LoRA layers of this model")
                    if meta.size == p.shape:
                        piece = torch.empty_like(_local(p), dtype=meta.properties.dtype)
                        state[key] = _like(p, piece)
                    else:  # the count of steps, which fused kernels have beside the weights
                        place = _local(p).device if fused else "cpu"
                        kind = meta.properties.dtype
                        state[key] = torch.empty(meta.size, dtype=kind, device=place)
                elif kind in ("rng", "exact") and same and rest[0] == str(world.rank):
                    state[key] = torch.empty(meta.size, dtype=meta.properties.dtype)
            dcp.load(state, storage_reader=reader, process_group=world.gloo)
            tensors = {k: t for k, t in state.items() if k.startswith("optimizer.")}
            prefix = f"exact.{world.rank}."
            exact = {k[len(prefix) :]: t for k, t in state.items() if k.startswith(prefix)}
            _load_optimizer_state(optimizer, names, tensors, run["numbers"], exact)
            self.lr_scheduler.load_state_dict(run["scheduler"])
            rates = self.lr_scheduler.get_last_lr()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            if run["scaler"] and self.accelerator.scaler:
                self.accelerator.scaler.load_state_dict(run["scaler"])
            self.run_state = {k: t for k, t in state.items() if k.startswith("rng.")}
            if not same and world.first:
                what = "random states are not taken over (dropout draws others)"
                print(f"resumed from {run['world']} ranks on {world.size}: {what}", flush=True)

        def _load_scaler(self, *_):
            pass

        def _load_rng_state(self, *_):
            _set_rng_state(self.run_state)

    return Sharded


def _global_batch(args, world):
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * world.size


def _rng_state(world):
    """This rank's random states, as tensors."""
    version, numbers, _ = random.getstate()  # the last is gauss()'s alone
    found = {"python": torch.tensor([version, *numbers])}
    found["torch"] = torch.get_rng_state()
    if world.device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(world.device)
    return {f"rng.{world.rank}.{name}": value for name, value in found.items()}


def _set_rng_state(found):
    for key, value in found.items():
        if key.endswith(".python"):
            version, *numbers = value.tolist()
            random.setstate((version, tuple(numbers), None))
        elif key.endswith(".torch"):
            torch.set_rng_state(value)
        else:
            torch.cuda.set_rng_state(value.cpu())


@functools.cache
def _callback_class():
    transformers = _import("transformers")

    class Watch(transformers.TrainerCallback):
        """Times of steps, traffic of the second, checkpoints that failed."""

        def __init__(self, trainer_of, profile_at=0):
            self.trainer_of, self.profile_at, self.profiler = trainer_of, profile_at, None
            self.times = collections.deque(maxlen=10_000)
            self.traffic, self.exposed, self.groups = Traffic(), None, None

        def on_train_begin(self, args, state, control, **_):
            self.begin = state.global_step
            self.times.append(time.perf_counter())
            self.trainer_of().progress()

        def on_step_begin(self, args, state, control, **_):
            first = state.global_step - self.begin
            if first == 1:
                self.traffic.__enter__()
            if self.profile_at and first == self.profile_at - 1:
                from torch.profiler import ProfilerActivity, profile

                self.profiler = profile(activities=[ProfilerActivity.CUDA])
                self.profiler.prepare_trace()  # the first step under it is slowed: not recorded
            if self.profiler and first == self.profile_at:
                torch.cuda.synchronize()
                self.profiler.start_trace()
                dist.barrier(group=self.trainer_of().world.gloo)  # its start takes a while

        def on_step_end(self, args, state, control, **_):
            trainer = self.trainer_of()
            first = state.global_step - self.begin
            if first == 2:
                self.traffic.__exit__()
            if trainer.world.device.type == "cuda" and (args.logging_steps == 1 or self.profiler):
                torch.cuda.synchronize()
            if self.profiler and first > self.profile_at:
                self.profiler.stop_trace()
                self.exposed = _exposed(self.profiler)
                self.groups = compile_qlora._groups(self.profiler, GROUPS_OF_KERNELS)
                self.profiler = None
            trainer.end_step()
            self.times.append(time.perf_counter())
            trainer.finish_saving(wait=False)

        def on_train_end(self, args, state, control, **_):
            self.trainer_of().finish_saving()

    return Watch


GROUPS_OF_KERNELS = {
    "communication": r"(?i)nccl",
    "copies to gather": r"multi_tensor.*Copy",
    **compile_qlora.GROUPS_OF_KERNELS,
}


def _exposed(profiler) -> dict[str, float]:
    """Of a profiled step, from its first kernel to its last: milliseconds, the share in which only
    communication ran, and the share in which nothing did."""
    spans = {True: [], False: []}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and event.time_range.elapsed_us():
            span = event.time_range.start, event.time_range.end
            spans["nccl" in event.name.lower()].append(span)
    compute, every = _union(spans[False]), _union(spans[False] + spans[True])
    first, last = every[0][0], every[-1][1]
    length = lambda parts: sum(end - start for start, end in parts)
    whole = last - first
    alone, busy = length(every) - length(compute), length(every)
    return {"ms": whole / 1e3, "exposed": alone / whole, "idle": 1 - busy / whole}


def _union(spans):
    merged = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(end, merged[-1][1])
        else:
            merged.append([start, end])
    return merged


class Run(NamedTuple):
    """What training gave; the same on every rank, but for memory and the profile."""

    losses: list[float]  # of the last 10,000 optimizer steps, over all ranks' tokens
    step_s: list[float]
    tokens_per_s: float  # with labels, median of the last five steps
    peak_gib: float
    loaded: Loaded
    traffic: dict[str, int]
    exposed: dict[str, float] | None
    groups: dict[str, float] | None
    trainer: object


def train(path, options, args, world, *, resume=None, profile_at=0, rows=None) -> Run:
    """Trains `path` through Trainer, and saves the checkpoints that args ask for."""
    compile_qlora._reset()
    half = args.bf16 or args.fp16
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if half else torch.float32
    if options.memory_cap_gib and world.device.type == "cuda":
        total = torch.cuda.get_device_properties(world.device).total_memory
        torch.cuda.set_per_process_memory_fraction(options.memory_cap_gib * GIB / total)
    save = args.save_strategy != "no"
    args = compile_qlora._plain_arguments(args, "", True)
    backend = args.torch_compile_backend or "inductor"
    loaded = load(path, options, args, dtype, world)
    _say_loaded(loaded, options, world)
    model, tokenizer = loaded.model, loaded.tokenizer
    if rows is None:
        rows = compile_qlora._rows(path, options.dataset, options.max_length, options.packing)
    checkpointing = compile_qlora._take_checkpointing(args)
    fixed = len({len(row["input_ids"]) for row in rows}) == 1
    stack = "ours_compiled" if options.compile else "ours"
    how = {"checkpointing": checkpointing, "fixed": fixed, "backend": backend}
    compile_qlora.prepare(model, stack, options, **how)
    if world.first and save:
        for path_ in Path(args.output_dir).glob("checkpoint-*.part"):
            shutil.rmtree(path_)
    trainer = None
    watch = _callback_class()(lambda: trainer, profile_at)
    trainer = _trainer_class()(
        model=model,
        args=args,
        train_dataset=rows,
        data_collator=Collate(tokenizer.pad_token_id, options.packing),
        processing_class=tokenizer,
        callbacks=[watch],
        world=world,
        group=loaded.group,
        reshard=options.reshard_after_forward,
    )
    _voice.output_dir = args.output_dir
    trainer.train(resume_from_checkpoint=resume)
    losses, tokens = _of_all_ranks(trainer, world)
    step_s = [b - a for a, b in itertools.pairwise(watch.times)][-len(losses) :]
    rates = [n / s for n, s in zip(tokens[-5:], step_s[-5:], strict=True)]
    traffic = {f"{k}_bytes": watch.traffic.bytes[k] for k in Traffic.NAMES}
    traffic |= {f"{k}_calls": watch.traffic.calls[k] for k in Traffic.NAMES}
    rate = statistics.median(rates) if rates else math.nan
    found = watch.exposed, watch.groups
    return Run(losses, step_s, rate, _peak_gib(), loaded, traffic, *found, trainer)


def _quicken(model, trained):
    """Trainer calls train() for each micro-batch and zero_grad() for each step."""
    stock = model.train

    def train(mode=True):
        return model if model.training == mode else stock(mode)

    def zero_grad(set_to_none=True):
        for p in trained:
            p.grad = None

    model.train, model.zero_grad = train, zero_grad


def _of_all_ranks(trainer, world):
    """(loss, labels) of each step."""
    if not trainer.steps:
        return [], []
    losses, labels = zip(*trainer.steps, strict=True)
    both = torch.stack([torch.stack(losses).double().cpu(), torch.tensor(labels).double()])
    dist.all_reduce(both, group=world.gloo)
    # Trainer multiplies by the number of ranks, because FSDP2 averages gradients
    return (both[0] / world.size).tolist(), both[1].tolist()


def _host_gib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _peak_gib():
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0


def _say_loaded(loaded, options, world):
    if not world.first:
        return
    words = f"loaded in {loaded.seconds:.1f} s; host memory +{loaded.host_gib:.2f} GiB a rank"
    if world.device.type == "cuda":
        words += f", GPU peak {loaded.device_gib:.2f} GiB"
    print(f"base {loaded.base}: {loaded.why}", flush=True)
    print(f"  {words}; frozen {loaded.base_bytes / GIB:.2f} GiB in {len(loaded.units)} units")
    lora = _lora_weights(loaded.model)
    print(f"  LoRA {lora} weights, {lora * 4} bytes, sharded over {world.size // options.replicas}")


# --------------------------------------------------------------------------------------------------
# What training leaves: an adapter in PEFT's format, a merged model


def save_adapter(model, folder, world):
    """adapter_model.safetensors and adapter_config.json, as PeftModel.from_pretrained reads them.
    Every rank must call it; the first writes."""
    full = {}
    for name, p in _trained(model).items():
        value = p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()
        if world.first:
            full[name] = value.cpu()
    if world.first:
        folder = Path(folder)
        part = folder / "adapter.part"
        shutil.rmtree(part, ignore_errors=True)
        model.save_pretrained(part, state_dict=full, save_embedding_layers=False)
        for path in sorted(part.iterdir()):
            path.replace(folder / path.name)
        part.rmdir()
    dist.barrier(group=world.gloo)


def save_merged(loaded, source_dir, folder, dtype, world):
    """A 16-bit checkpoint of base and adapter merged: W + scaling B A in float32, rounded to dtype.
    Unit by unit, so that no rank holds more than one, and one file (5 GB) in host memory."""
    from safetensors.torch import save_file

    model, units, first = loaded.model, loaded.units, world.first
    folder, files, held = Path(folder), [], {}
    wrapped = {m.base_layer: m for m in model.modules() if hasattr(m, "base_layer")}
    if first:
        shutil.rmtree(folder.with_name(f"{folder.name}.part"), ignore_errors=True)
        out = folder.with_name(f"{folder.name}.part")
        out.mkdir(parents=True)

    def flush():
        if held:
            files.append((f"model-{len(files) + 1:05d}.safetensors", list(held)))
            save_file(held, out / files[-1][0], metadata={"format": "pt"})
            held.clear()

    total = 0
    for unit in units:
        with unit.gathered(loaded.dtype):
            for entry in unit.entries if first else []:
                module, name = entry.places[0]
                value = module._buffers[name]
                if entry.linear:
                    value = dequantize_nf4(value, value.quant_state, dtype=torch.float32)
                    value = value + _delta(wrapped.get(module), value)
                value = value.detach().to("cpu", dtype, copy=True).contiguous()
                total += value.nbytes
                held[entry.keys[0]] = value
                if sum(t.nbytes for t in held.values()) > SHARD_BYTES:
                    flush()
    if first:
        flush()
        count = len(files)
        names = {}
        for i, (file, keys) in enumerate(files):
            name = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            (out / file).rename(out / name)
            names |= dict.fromkeys(keys, name)
        index = {"metadata": {"total_size": total}, "weight_map": names}
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
        config = copy.deepcopy(model.get_base_model().config)
        config.__dict__.pop("quantization_config", None)
        config.dtype, config.use_cache = dtype, True
        config.architectures = [type(model.get_base_model()).__name__]
        config.save_pretrained(out)
        loaded.tokenizer.save_pretrained(out)
        if (generation := Path(source_dir) / "generation_config.json").is_file():
            shutil.copy(generation, out)
        shutil.rmtree(folder, ignore_errors=True)
        out.rename(folder)
    dist.barrier(group=world.gloo)


def _delta(module, like):
    """scaling B A of a LoRA layer, float32; the product in float64, as Trainer may have switched
    float32 products of GPUs to TF32."""
    if module is None:
        return 0.0
    total = 0.0
    for name in module.active_adapters:
        if name in module.lora_A:
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
            total = total + module.scaling[name] * (b.double() @ a.double()).to(like.dtype)
    return total


# --------------------------------------------------------------------------------------------------
# Runs in processes of their own: what the self-test and the timings start


_started = set()  # processes to end with this one


def _start(ranks, argv, env, **how):
    """This script in processes of its own: under torchrun, or with 0 ranks in one without it."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    torchrun += ["--log-dir", f"{_folder().name}/torchrun"]
    command = [sys.executable, *(torchrun if ranks else ()), os.path.abspath(__file__), *argv]
    process = subprocess.Popen(command, env=_plain_environment() | env, text=True, **how)
    _started.add(process)
    return process


def _end(*processes):
    """Ends them, and they what they started."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        _started.discard(process)


def _launch(ranks, argv, *, before=None, **env):
    """_start's processes when they have ended, output as text."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = _start(ranks, argv, env, preexec_fn=before, **pipes)
    try:
        out, err = process.communicate(timeout=900)
    finally:
        _end(process)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _beside(*jobs) -> list:
    """Results of functions that wait for processes, run in threads."""
    with concurrent.futures.ThreadPoolExecutor(len(jobs) if _gpus() else 2) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            return [future.result() for future in futures]
        except BaseException:  # also Ctrl-C: a thread would wait as long as its process runs
            for future in futures:
                future.cancel()
            _end(*_started)
            raise


def _plain_environment():
    """Ours without what torchrun has said to us."""
    mine = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"
    env = {k: v for k, v in os.environ.items() if k not in mine}
    away = "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_", "ACCELERATE_", "TORCH_NCCL_"
    env = {k: v for k, v in env.items() if not k.startswith(away)}
    plain = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    few = _gpus() or (os.cpu_count() or 1) < 4  # torchrun's own choice, which beside GPUs is right
    plain["OMP_NUM_THREADS"] = "1" if few else str(os.cpu_count() // 2)
    return env | plain


def _own_lines(stderr) -> list[str]:
    """What this script said of its own end, among what libraries say."""
    return [line for line in stderr.splitlines() if line.startswith("qlora_fsdp2: ")]


class _Ranks:
    """Ranks that wait for specs on standard input: their start takes longer than most of those."""

    def __init__(self, ranks, env):
        self.lock = threading.Lock()
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the ranks)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.said}
        self.process = _start(ranks, ["--worker", "-"], env, **pipes)
        atexit.register(_end, self.process)

    def run(self, specs) -> list[dict]:
        found, others = [], []
        late = threading.Timer(900, self.process.terminate)
        with self.lock:
            late.start()
            try:
                with contextlib.suppress(BrokenPipeError):
                    print(json.dumps(specs), file=self.process.stdin, flush=True)
                while len(found) < len(specs) and (line := self.process.stdout.readline()):
                    if line.startswith("WORKER "):
                        found.append(json.loads(line[7:]))
                    else:
                        others.append(line)
            finally:
                late.cancel()
        if len(found) < len(specs):
            _end(self.process)
            self.said.seek(0)
            said = "".join(others) + self.said.read()
            said = next(iter(_own_lines(said)), said[-3000:])
            raise AssertionError(f"{len(found)} of {len(specs)} runs ended well: {said}")
        return found


_waiting, _waiting_lock = {}, threading.Lock()


def _jobs(ranks, specs, **env) -> list[dict]:
    """worker's results for each of specs. AssertionError if one failed."""
    with _waiting_lock:
        key = ranks, *env.items()
        usual = [] if _waiting or _gpus() < 2 else [(0, ()), (2, ()), (2, (*NO_GPU.items(),))]
        for count, given in [*usual, (ranks, (*env.items(),))]:  # starts that overlap
            one = count, *given
            if one not in _waiting or _waiting[one].process.poll() is not None:
                _waiting[one] = _Ranks(count, dict(given))
    return _waiting[key].run(specs)


def worker(spec: dict, world) -> dict:
    """One run among the ranks: {path, options, args, ...}, or {call: a function's name}. With a
    stack of compile_qlora.py it is that script's run in one process. {fails: a spec} gives what is
    said of a run that ends in an error on all ranks."""
    if "fails" in spec:
        try:
            worker(spec["fails"], world)
        except (Exception, CheckpointException) as error:  # noqa: BLE001 (to be looked at)
            return dict(zip(("code", "said"), _explain(error), strict=True))
        raise AssertionError(f"{spec['fails']} ended well")
    if "argv" in spec:
        return _train(*_parse(spec["argv"]), world)
    if "call" in spec:
        return globals()[spec["call"]](world, **spec.get("with", {})) or {}
    options = Options(**spec.get("options", {}))
    args = _arguments(world.device.type == "cpu", **spec.get("args", {}))
    rows = None
    if "random" in spec:
        count, length, vocab = spec["random"]
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, vocab, (count, length), generator=generator).tolist()
        rows = [{"input_ids": row, "labels": row} for row in ids]
    elif "rows" in spec:
        rows = compile_qlora._rows(spec["path"], None, options.max_length, options.packing)
        rows = rows[: spec["rows"]]
    _check_options(options, args, world)
    if "stack" in spec:
        return _one_process(spec, options, args)
    _voice.output_dir = args.output_dir
    with _fault(spec.get("fault"), world):
        more = {"resume": spec.get("resume"), "profile_at": spec.get("profile_at", 0)}
        run = train(spec["path"], options, args, world, rows=rows, **more)
    if spec.get("adapter"):
        save_adapter(run.trainer.model, spec["adapter"], world)
    if spec.get("merged"):
        save_merged(run.loaded, spec["path"], spec["merged"], torch.float32, world)
    ranks = [None] * world.size
    mine = *_device_peaks(world), run.loaded.host_gib, run.exposed
    dist.all_gather_object(ranks, mine, group=world.gloo)
    peaks, devices, hosts, exposed = zip(*ranks, strict=True)
    lora = _lora_weights(run.trainer.model)
    compiled = getattr(run.trainer.model, "compiled_regions", None)
    return {
        "name": spec.get("name", ""),
        "losses": run.losses,
        "step_s": run.step_s,
        "tokens_per_s": run.tokens_per_s,
        "peak_gib": max(peaks),
        "device_gib": max(devices),
        "base": run.loaded.base,
        "base_gib": run.loaded.base_bytes / GIB,
        "load_s": run.loaded.seconds,
        "load_host_gib": max(hosts),
        "load_device_gib": run.loaded.device_gib,
        "traffic": run.traffic,
        "exposed": exposed,
        "groups": run.groups,
        "lora_bytes": lora * 4,
        "graphs": len(compiled.graphs()) if compiled else 0,
        "breaks": compile_qlora._breaks().total(),
        "log": [entry for entry in run.trainer.state.log_history if "loss" in entry],
    }


def _one_process(spec, options, args):
    """worker's results, as far as there are any, of a stack of compile_qlora.py."""
    same = {f.name: getattr(options, f.name) for f in fields(compile_qlora.ModelOptions)}
    path, stock = spec["path"], compile_qlora._rows
    rows = lambda *given: stock(*given)[: spec["rows"]]
    with mock.patch.object(compile_qlora, "_rows", rows):
        run = compile_qlora.train(spec["stack"], path, compile_qlora.Options(**same), args)
    found = {"name": spec["name"], "losses": run.losses, "tokens_per_s": run.tokens_per_s}
    return found | {"first_s": run.first_s, "peak_gib": run.peak_gib["training"]}


def _device_peaks(world):
    if world.device.type == "cpu":
        return 0.0, 0.0
    free, total = torch.cuda.mem_get_info()
    return _peak_gib(), (total - free) / GIB


def _arguments(use_cpu, **more):
    usual = {"report_to": "none", "disable_tqdm": True, "logging_steps": 10**9}
    usual |= {"output_dir": more.pop("output_dir", "results/qlora_fsdp2"), "use_cpu": use_cpu}
    usual |= {"log_level": "error", "save_strategy": "no", "dataloader_pin_memory": not use_cpu}
    usual |= {"logging_nan_inf_filter": False}
    args = _import("transformers").TrainingArguments(**usual | more)
    return compile_qlora._in_precision(args, "bf16" if args.bf16 else "fp16" if args.fp16 else None)


@contextlib.contextmanager
def _fault(fault, world):
    """For the self-test: {rank, step, kind}: kill, kill_saving or memory."""
    if fault is None or fault["rank"] != world.rank:
        yield
        return
    kind, cls = fault["kind"], _trainer_class()
    stock = cls.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == fault["step"]:
            while not _checkpoints(self.args.output_dir):  # it is written beside training
                time.sleep(0.05)
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.99 GiB.")
        return stock(self, *args, **kwargs)

    def write(self, plan, planner):
        path = Path(self.path)
        if path.name == f"checkpoint-{fault['step']}.part":
            (path / f"__{world.rank}_0.distcp").write_bytes(b"half of")
            os.kill(os.getpid(), signal.SIGKILL)
        return stock_write(self, plan, planner)

    stock_write = FileSystemWriter.write_data
    saving = kind == "kill_saving"
    target = (FileSystemWriter, "write_data", write) if saving else (cls, "training_step", step)
    with mock.patch.object(*target):
        yield


# --------------------------------------------------------------------------------------------------
# Self-test: `pytest qlora_fsdp2.py` runs the same functions. Two ranks, on CPUs with gloo or, where
# there are several GPUs, with NCCL


def _gpus():
    return torch.cuda.device_count()


def _on_cpu():
    return {} if _gpus() > 1 else NO_GPU


def _skip_unless(gpus):
    if _gpus() < gpus:
        raise unittest.SkipTest(f"needs {gpus} CUDA GPU(s)")


@functools.cache
def _folder():
    return tempfile.TemporaryDirectory(prefix="qlora_fsdp2_")


def _checkpoint(name="tiny", config=None, quantised=True, dtype=torch.float32):
    """A checkpoint of a small model, written once a process."""
    directory = Path(_folder().name) / f"{name}-{quantised}-{dtype}".replace("torch.", "")
    if not (directory / "config.json").exists():
        config = copy.deepcopy(config) or compile_qlora._llama(name)
        compile_qlora.write_checkpoint(directory, config, quantised=quantised, dtype=dtype)
    return str(directory)


STEPS = 60
BATCH = {"per_device_train_batch_size": 2, "learning_rate": 2e-3, "max_grad_norm": 0.5}
SMALL = {"lora_r": 8, "lora_alpha": 16, "max_length": 96}
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
CPU_STEPS = 24  # of the timings on a CPU
ROWS = 45  # 11 steps of 4 rows, and one row: one rank has none in each epoch's last step


def _spec(name="", path=None, steps=STEPS, accumulate=1, options=None, **more):
    args = BATCH | {"max_steps": steps, "gradient_accumulation_steps": accumulate}
    args |= {"torch_compile_backend": "aot_eager"} | more.pop("args", {})
    options = SMALL | {"compile": False} | (options or {})
    path = path or _checkpoint()
    return {"name": name, "path": path, "options": options, "args": args, "rows": ROWS, **more}


def _single(world, accumulate, order=False, packing=False):
    """Losses of stock Trainer, transformers and PEFT in one process, 4 rows a step for 2. Packed,
    of compile_qlora's functions: transformers' own mask for it is another matter."""
    args = compile_qlora._arguments(
        **BATCH, max_steps=STEPS, gradient_accumulation_steps=accumulate, use_cpu=True
    )
    options = compile_qlora.Options(**SMALL, packing=packing)
    rows = compile_qlora._rows(_checkpoint(), None, options.max_length, packing)[:ROWS]
    change = compile_qlora._other_attention, compile_qlora._other_shapes
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(compile_qlora, "_rows", lambda *_: rows))
        for other in change if order else ():
            stack.enter_context(other())
        stack = "ours" if packing else "hf"
        return {"losses": compile_qlora.train(stack, _checkpoint(), options, args).losses}


def _apart(a, b):
    assert len(a) == len(b), (len(a), len(b))
    return compile_qlora.difference(a, b)


def _drawn(**drawn) -> list[dict]:
    """The values themselves, for ranks to check."""
    cases = []
    _fuzz(lambda **case: cases.append(case), **drawn)
    return cases


def _random(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _lists_of_shapes(most):
    from hypothesis import strategies as st

    return st.lists(st.lists(st.integers(1, most), min_size=1, max_size=3), min_size=1, max_size=5)


def test_fuzz_rows_are_dealt_as_one_process_reads_them():
    from accelerate.data_loader import SeedableRandomSampler
    from hypothesis import strategies as st

    def check(rows, batch, size, seed, epoch):
        whole = SeedableRandomSampler(range(rows), data_seed=seed)
        whole.set_epoch(epoch)
        want = [*torch.utils.data.BatchSampler(whole, batch, drop_last=False)]
        ranks = [Dealt(rows, batch, rank, size, seed, lambda: epoch) for rank in range(size)]
        assert {len([*rank]) for rank in ranks} == {len(ranks[0])}
        dealt = [part for turn in zip(*ranks, strict=True) for part in turn]
        assert dealt[: len(want)] == want and not any(dealt[len(want) :])
        assert len(dealt) - len(want) < size  # no turn in which nobody has rows

    small = st.integers(1, 9)
    rows, seed = st.integers(1, 99), st.integers(0, 2**31)
    _fuzz(check, rows=rows, batch=small, size=small, seed=seed, epoch=st.integers(0, 99))


def test_fuzz_clipping_equals_float64():
    from hypothesis import strategies as st

    def check(shapes, dtypes, scale, limit, seed):
        kinds = itertools.cycle(dtypes)
        params = [torch.zeros(shape, dtype=kind) for shape, kind in zip(shapes, kinds)]
        for i, p in enumerate(params):
            p.grad = _random(p.shape, seed + i).mul(scale).to(p.dtype)
        grads = [p.grad.double().clone() for p in params]
        want = torch.cat([g.flatten() for g in grads]).norm()
        bare = torch.zeros(3)  # of which there is no gradient
        norm, near = (
            clip_grad_norm([bare, *params], limit),
            3e-2 if torch.bfloat16 in dtypes else 1e-5,
        )
        torch.testing.assert_close(norm.double(), want, rtol=near, atol=0)
        factor = min(1.0, limit / (want + 1e-6)) if 0 < limit < math.inf else 1.0
        for p, g in zip(params, grads, strict=True):
            torch.testing.assert_close(p.grad.double(), g * factor, rtol=near, atol=1e-30)
        assert bare.grad is None and clip_grad_norm([bare], limit) == 0

    kinds = st.sampled_from((torch.float32, torch.float64, torch.bfloat16))
    _fuzz(
        check,
        shapes=_lists_of_shapes(20),
        dtypes=st.lists(kinds, min_size=1, max_size=3),
        scale=st.sampled_from((0.0, 1e-12, 1e-3, 1.0, 1e4, 1e12)),
        limit=st.sampled_from((0.0, 1e-3, 0.5, 1.0, 1e9, math.inf)),
        seed=st.integers(0, 2**31),
    )


OPTIMIZERS = {
    "AdamW": {"weight_decay": 0.1},
    "SGD": {"momentum": 0.9},
    "RMSprop": {},
    "Adagrad": {},
    "NAdam": {},
    "RAdam": {},
}


def _check_pieces(world, path):
    """Sharded parameters of any shapes: gradients, their norm, clipped steps and the optimizer's
    states are those of whole ones."""
    mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    for case in json.loads(Path(path).read_text()):
        shapes, seed = case["shapes"], case["seed"]
        kind, dtype = getattr(torch.optim, case["kind"]), getattr(torch, case["dtype"])
        make = functools.partial(kind, lr=0.1, **OPTIMIZERS[case["kind"]])
        whole = [_random(shape, seed + i, dtype) for i, shape in enumerate(shapes)]
        model = torch.nn.Module()
        model.params = torch.nn.ParameterList(p.clone().to(world.device) for p in whole)
        model.forward = lambda ups, model=model: sum(
            (p * up).sum() for p, up in zip(model.params, ups, strict=True)
        )
        fully_shard(model, mesh=mesh)
        params = dict(model.named_parameters())
        ours, theirs = step_locally(make(params.values())), make(whole)
        for step in range(case["steps"]):
            ups = [
                [
                    _random(p.shape, seed + 99 * step + 7 * rank + i, dtype)
                    for i, p in enumerate(whole)
                ]
                for rank in range(world.size)
            ]
            model([up.to(world.device) for up in ups[world.rank]]).backward()
            for p, *grads in zip(whole, *ups, strict=True):
                p.grad = sum(grads) / world.size
            want = torch.nn.utils.clip_grad_norm_(whole, case["limit"])
            got = clip_grad_norm(params.values(), case["limit"], mesh.get_group("shard"))
            torch.testing.assert_close(got.cpu().to(dtype), want, rtol=1e-5, atol=1e-6)
            ours.step(), theirs.step()
            model.zero_grad()
        tensors, _ = _optimizer_state(ours, params, world.rank)
        for (name, p), q in zip(params.items(), whole, strict=True):
            empty = _like(p, torch.empty_like(_local(p.detach())))  # where a rank has no piece
            pairs = [(p, q)]
            for key, value in theirs.state[q].items():
                alike = isinstance(value, Tensor) and value.shape == q.shape
                place = f"optimizer.{name}.{key}"
                assert place in tensors or not alike or not _local(p).numel(), case
                pairs += [(tensors.get(place, empty), value)] if alike else []
            for sharded, value in pairs:
                got, near = sharded.full_tensor().detach().cpu(), {"rtol": 1e-4, "atol": 1e-5}
                torch.testing.assert_close(got, value, **near, msg=str(case))


def test_fuzz_sharded_steps_equal_whole_ones():
    from hypothesis import strategies as st

    cases = _drawn(
        shapes=_lists_of_shapes(9),
        kind=st.sampled_from([*OPTIMIZERS]),
        dtype=st.sampled_from(("float32", "float64")),
        steps=st.integers(1, 3),
        limit=st.sampled_from((1e-3, 0.5, 1e9)),
        seed=st.integers(0, 2**31),
    )
    path = Path(_folder().name) / "pieces.json"
    path.write_text(json.dumps(cases))
    _jobs(2, [{"call": "_check_pieces", "with": {"path": str(path)}}], **_on_cpu())


def test_fuzz_units_keep_every_bit():
    """Tensors of any shape, quantised or to be quantised: packed into a buffer and viewed there
    they are what bitsandbytes makes of them."""
    import bitsandbytes.functional as bnb
    from hypothesis import strategies as st
    from safetensors.torch import save_file

    def check(tensors, dtype, seed):
        files, entries, wants = {}, [], []
        for i, (kind, shape, stored, block, nested) in enumerate(tensors):
            key, value = f"{i}.weight", _random(shape, seed + i, stored)
            if kind == "plain":
                wants.append((value.to(dtype), None))
            else:
                ready = kind == "ready"
                how = (block, nested) if ready else (64, True)
                source = value if ready else value.to(dtype)
                packed, state = bnb.quantize_4bit(source, None, None, *how, "nf4")
                wants.append((packed, state))
                if ready:
                    files |= {f"{key}.{k}": t for k, t in state.as_dict(packed=True).items()}
                    value = packed
            files[key] = value
            places = [(torch.nn.Module(), "weight")]
            entries.append(Entry(places, [f"other.{key}", key], kind != "plain", torch.Size(shape)))
        with tempfile.TemporaryDirectory() as folder:
            save_file(files, f"{folder}/model.safetensors")
            unit = Unit("", None, entries)
            unit.layout, flat = _pack(unit, Source(folder), dtype, "cpu")
        _attach(unit, flat, dtype)
        ends = [0]
        for entry, (_, places), (want, state) in zip(entries, unit.layout, wants, strict=True):
            for first, shape, kind in places.values():
                assert first % ALIGN == 0 and first >= ends[-1]
                ends.append(first + math.prod(shape) * kind.itemsize)
            ((module, name),) = entry.places
            got = module._buffers[name]
            assert got.shape == want.shape and torch.equal(
                got.view(torch.uint8), want.view(torch.uint8)
            )
            if state is not None:
                ours = dequantize_nf4(got, got.quant_state, dtype=torch.float32)
                assert torch.equal(ours, dequantize_nf4(want, state, dtype=torch.float32))
                assert got.quant_state.dtype == dtype and got.quant_state is module.quant_state
        assert ends[-1] <= flat.numel() and flat.numel() % ALIGN == 0

    halves = st.sampled_from((torch.float16, torch.bfloat16, torch.float32))
    size = st.integers(1, 70)
    tensor = st.tuples(
        st.sampled_from(("plain", "ready", "linear")),
        st.tuples(size, size),
        halves,
        st.sampled_from((64, 128, 256)),
        st.booleans(),
    )
    tensors = st.lists(tensor, min_size=1, max_size=5)
    _fuzz(check, tensors=tensors, dtype=halves, seed=st.integers(0, 2**31))


def test_fuzz_broken_checkpoints_are_refused():
    """A checkpoint with a tensor gone, of another shape or kind, or with other bytes in its files:
    the same bits, or one line of error."""
    from hypothesis import strategies as st
    from safetensors.torch import load_file, save_file

    whole = Path(_checkpoint())
    tensors, data = (
        load_file(whole / "model.safetensors"),
        (whole / "model.safetensors").read_bytes(),
    )
    changes = {
        "half": lambda t: t.flatten()[: t.numel() // 2].clone(),
        "flat": lambda t: t.flatten(),
        "more": lambda t: torch.cat([t.flatten()] * 2),
        "empty": lambda t: t.flatten()[:0].clone(),
        "float16": lambda t: t.half(),
        "int64": lambda t: t.long(),
    }

    def read(folder):
        source = Source(folder)
        model = _empty_model(str(whole), torch.float32, "cpu", "eager")
        _in_four_bits(model, source, torch.float32)
        units = _units(model)
        return [_pack(unit, source, torch.float32, "cpu") for unit in units]

    want = read(whole)

    def check(key, change, at, byte):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.safetensors")
            if change in changes or change == "gone":
                some = dict(tensors)
                value = some.pop(key)
                if change in changes:
                    some[key] = changes[change](value)
                save_file(some, path)
            elif change == "cut":
                path.write_bytes(data[: int(at * len(data))])
            elif change == "header":
                place = int(at * (8 + int.from_bytes(data[:8], "little")))
                path.write_bytes(data[:place] + bytes([byte]) + data[place + 1 :])
            else:
                path.write_bytes(data)
                Path(folder, "model.safetensors.index.json").write_text(change)
            try:
                got = read(folder)
            except (ValueError, TypeError) as error:
                assert "found" in str(error) and "\n" not in str(error), error
                return
        for (layout, flat), (want_layout, want_flat) in zip(got, want, strict=True):
            assert len(layout) == len(want_layout) and flat.numel() == want_flat.numel()
            if change not in ("header", "float16"):  # which may name or round other bytes
                assert torch.equal(flat, want_flat), (key, change)

    one = dict.fromkeys(tensors, "model.safetensors")
    lost = json.dumps({"weight_map": dict.fromkeys(tensors, "lost.safetensors")})
    indices = "", "[]", "{}", '{"weight_map": 1}', lost, json.dumps({"weight_map": one})
    _fuzz(
        check,
        key=st.sampled_from(sorted(tensors)),
        change=st.sampled_from((*changes, "gone", "cut", "header", *indices)),
        at=st.floats(0, 1, exclude_max=True),
        byte=st.integers(0, 255),
    )


def test_fuzz_memory_is_estimated():
    """What a base takes is what packing it gives, more of anything never takes less, and a copy is
    kept where it fits beside the rest."""
    from hypothesis import strategies as st

    config = types.SimpleNamespace(hidden_size=64, intermediate_size=192, num_hidden_layers=2)
    config.get_text_config = lambda: config
    model = torch.nn.Linear(8, 8)
    model.config = config
    world = World(0, 2, 0, torch.device("cuda"), None, None)

    def check(shapes, batch, length, accumulate, shards, gib):
        unit = Unit("", model, [Entry([], [], True, torch.Size(shape)) for shape in shapes])
        args = types.SimpleNamespace(per_device_train_batch_size=batch)
        args.gradient_accumulation_steps = accumulate
        estimate = lambda: _estimate([unit], model, Options(max_length=length), args, shards)
        base, beside = estimate()
        numel = sum(map(math.prod, shapes))
        packed = numel / 2 + numel / 64 + numel / 64 / 64  # codes, absmax, its scales
        assert abs(base / packed - 1) < 0.01, (base, packed)
        args.per_device_train_batch_size += 1
        assert estimate()[0] == base and estimate()[1] > beside
        free, least = int(gib * GIB), mock.patch.object(dist, "all_reduce", lambda *_, **__: None)
        memory = mock.patch.object(torch.cuda, "mem_get_info", lambda: (free, 0))
        with least, memory:
            choice, words = _choose_base(Options(base="auto"), world, base, beside)
        assert (choice == "replicate") == (base + beside < 0.92 * free), (choice, words)

    size = st.integers(64, 20_000)
    _fuzz(
        check,
        shapes=st.lists(st.tuples(size, size), min_size=1, max_size=200),
        batch=st.integers(1, 64),
        length=st.integers(2, 2**17),
        accumulate=st.integers(1, 64),
        shards=st.integers(1, 64),
        gib=st.floats(0.5, 200),
    )


def test_fuzz_union_of_spans():
    from hypothesis import strategies as st

    def check(spans):
        spans = [(first, first + length) for first, length in spans]
        merged = _union(spans)
        inside = {i for first, last in spans for i in range(first, last)}
        assert {i for first, last in merged for i in range(first, last)} == inside
        assert all(a[1] < b[0] for a, b in itertools.pairwise(merged)), merged

    _fuzz(check, spans=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=12))


def test_fuzz_small_models_load_as_in_transformers():
    """Of random configurations, a few: a model takes as long as many of the cases above."""
    from hypothesis import strategies as st

    cases = _drawn(
        family=st.sampled_from(("llama", "mistral", "qwen2", "qwen3", "gemma2")),
        layers=st.integers(1, 3),
        heads=st.sampled_from(((1, 1), (2, 1), (4, 2), (3, 3))),
        head_dim=st.sampled_from((16, 24, 32)),
        inner=st.sampled_from((40, 64, 136)),
        vocab=st.integers(259, 400),
        tied=st.booleans(),
        quantised=st.booleans(),
    )[::8]
    specs, wants = [], []
    for i, case in enumerate(cases):
        config = compile_qlora._families()[case["family"]]
        config.num_attention_heads, config.num_key_value_heads = case["heads"]
        config.head_dim, config.intermediate_size = case["head_dim"], case["inner"]
        config.hidden_size = case["heads"][0] * case["head_dim"]
        config.num_hidden_layers, config.vocab_size = case["layers"], case["vocab"]
        config.tie_word_embeddings = case["tied"]
        if hasattr(config, "layer_types"):
            config.layer_types = (config.layer_types * 2)[: case["layers"]]
        path = _checkpoint(f"fuzz{i}", config, quantised=case["quantised"])
        wants += [_stock_sums(path)] * 2
        specs += [
            {"call": "_sums", "with": {"path": path, "base": base}}
            for base in ("replicate", "shard")
        ]
    for run, want, spec in zip(_jobs(2, specs, **NO_GPU), wants, specs, strict=True):
        _same_sums(run, want, spec)


def _alone():
    """Losses of one process: (4 rows a step for 2, its sums in another order, 8 rows, packed)."""
    specs = [_spec(accumulate=2)]
    specs += [_spec(args={"per_device_train_batch_size": 4})]  # the same rows, other sums
    specs += [_spec(accumulate=4), _spec(accumulate=2, options={"packing": True})]
    if _gpus() < 2:
        ways = {}, {"order": True}, {"accumulate": 4}, {"packing": True}
        specs = [{"call": "_single", "with": {"accumulate": 2} | way} for way in ways]
    return [run["losses"] for run in _jobs(0, specs, **_on_cpu())]


def test_losses_equal_one_process():
    """60 steps of 4 rows, 12 to an epoch and the last of one row alone: the curve of one process
    with stock Trainer, transformers and PEFT, for every way to shard. On GPUs that of one GPU."""
    specs = [
        _spec("replicate", args={"logging_steps": 1}),
        _spec("shard", options={"base": "shard"}),
        _spec(
            "shard, kept after forward", options={"base": "shard", "reshard_after_forward": False}
        ),
        _spec("offload", options={"base": "shard", "cpu_offload": True}),
        _spec("checkpointing", args={"gradient_checkpointing": True}),
        _spec("compile", options={"compile": True, "base": "shard"}),
        _spec(
            "compile, checkpointing",
            options={"compile": True, "base": "shard"},
            args={"gradient_checkpointing": True},
        ),
        _spec("accumulation", accumulate=2, options={"base": "shard"}),
        _spec("packing", options={"packing": True}),
    ]
    more = _spec(
        "HSDP", options={"base": "shard", "replicas": 2}, args={"per_device_train_batch_size": 1}
    )
    jobs = [_alone, lambda: _jobs(2, specs, **_on_cpu())]
    if _gpus() == 0 or _gpus() > 3:
        jobs.append(lambda: _jobs(4, [more], **_on_cpu()))
    (want, again, accumulated, packed), *runs = _beside(*jobs)
    noise = max(_apart(want, again), 2e-7)  # a unit in the last place is 0.8e-7
    assert want[-1] < want[0] - 0.2, want
    others = {"accumulation": accumulated, "packing": packed}
    found = {run["name"]: run for run in itertools.chain(*runs)}
    for name, run in found.items():
        truth = others.get(name, want)
        apart = _apart(truth, run["losses"])
        said = name, apart, noise, truth[:5], run["losses"][:5]
        assert apart < (5 if _gpus() > 1 else 2) * noise, said
        assert not run["breaks"], run["breaks"]
    assert found["compile"]["graphs"] and not found["replicate"]["graphs"]
    assert found["replicate"]["base"] == "replicate" and found["shard"]["base"] == "shard"


def test_traffic_is_lora():
    """Bytes of a step: LoRA is gathered twice for each micro-batch and its gradients are reduced
    once; nothing else moves. Kept after the forward, once. With --base shard the blocks' bytes
    too, twice."""
    specs = [
        _spec(steps=3, accumulate=2),
        _spec(steps=3, accumulate=2, options={"reshard_after_forward": False}),
        _spec(steps=3, options={"base": "shard"}),
        _spec(steps=3, options={"param_dtype": "half"}, args={"bf16": True}),
    ]
    plain, kept, sharded, half = _jobs(2, specs, **_on_cpu())
    lora = plain["lora_bytes"]
    assert plain["traffic"]["all_gather_bytes"] == 2 * 2 * lora // 2, plain["traffic"]
    assert kept["traffic"]["all_gather_bytes"] == lora // 2
    assert half["traffic"]["all_gather_bytes"] == 2 * lora // 2 // 2
    for run in (plain, kept, sharded, half):
        assert run["traffic"]["reduce_scatter_bytes"] == lora // 2
        assert run["traffic"]["all_reduce_bytes"] <= 64, run["traffic"]  # the gradients' norm
    base = sharded["traffic"]["all_gather_bytes"] - 2 * lora // 2
    config = compile_qlora._llama("tiny")  # its tied embedding, and the last norm, in float32
    outside = 4 * config.hidden_size * (config.vocab_size + 1)
    assert base == sharded["base_gib"] * GIB - outside, (base, sharded["base_gib"] * GIB, outside)


def _as_bytes(tensor):
    # numpy() of the tensor itself would make its storage one that FSDP2 cannot free
    return tensor.detach().cpu().clone().numpy().tobytes()


def _checksum(tensor) -> str:
    """Of a frozen tensor's bytes; in 4 bits, also of its state's and of the weight behind them."""
    state = getattr(tensor, "quant_state", None)
    parts = [tensor.float()]
    if state is not None:
        nested = [] if state.state2 is None else [state.offset, state.state2.absmax]
        parts = [tensor.data, dequantize_nf4(tensor, state), state.absmax, state.code, *nested]
    return hashlib.sha256(b"".join(map(_as_bytes, parts))).hexdigest()


def _sums(world, path, base):
    """Checksums of a model's frozen tensors as they stand when gathered, and of LoRA's."""
    options = Options(**SMALL, base=base)
    loaded = load(path, options, _arguments(world.device.type == "cpu"), torch.float32, world)
    found = {}
    for unit in loaded.units:
        for _ in range(2):  # the second time into the same storage
            with unit.gathered(torch.float32):
                for entry in unit.entries:
                    for module, name in entry.places:
                        sum_ = _checksum(module._buffers[name])
                        assert found.setdefault(entry.keys[0], sum_) == sum_, entry.keys
    trained = _trained(loaded.model).items()
    lora = {n: p.detach().full_tensor().double().sum().item() for n, p in trained}
    others = [None] * world.size
    dist.all_gather_object(others, found, group=world.gloo)
    assert all(other == found for other in others)
    return {"sums": found, "lora": lora, "base": loaded.base}


def _stock_sums(path):
    """(_sums, LoRA's, how many NaNs its bytes would be) of what transformers and PEFT load."""
    options = compile_qlora.Options(**SMALL)
    _import("transformers").set_seed(42)
    model, _ = compile_qlora.load(path, "hf", options, torch.float32, "cpu")
    found, lora, nans = {}, {}, 0
    for name, p in model.named_parameters():
        if p.requires_grad:
            lora[name] = p.detach().double().sum().item()
            continue
        if hasattr(p, "quant_state"):
            nans += int(p.data.flatten().view(torch.float16).isnan().sum())
        name = name.removeprefix("base_model.model.").replace("base_layer.", "")
        found[name] = _checksum(p)
    return found, lora, nans


def _same_sums(run, want, spec):
    sums, lora, _ = want
    assert run["base"] == spec["with"]["base"]
    assert run["lora"].keys() == lora.keys(), spec
    assert all(abs(run["lora"][n] - lora[n]) < 1e-9 for n in lora), spec
    assert run["sums"] == sums, (spec, set(run["sums"].items()) ^ set(sums.items()))


def test_loaded_bytes_are_transformers_and_survive_gathering():
    """Quantised and 16-bit checkpoints, several architectures, tied heads, biases, bytes that would
    be NaNs in half precision."""
    cases = {"tiny": None, **compile_qlora._families()}
    specs, wants = [], []
    for name, config in cases.items():
        for quantised in (True, False):
            if not quantised and name not in ("tiny", "qwen2"):
                continue
            path = _checkpoint(name, config, quantised=quantised, dtype=torch.bfloat16)
            wants.append(_stock_sums(path))
            for base in ("replicate", "shard"):
                specs.append({"call": "_sums", "with": {"path": path, "base": base}})
    found = _jobs(2, specs, **NO_GPU)
    for i, run in enumerate(found):
        _same_sums(run, wants[i // 2], specs[i])
        assert wants[i // 2][2] > 100, specs[i]


def _head_moves(world, path, tokens):
    """In which order blocks are computed (numbers) and a parked head is copied, in a step of
    checkpointed blocks; which blocks each gathers ahead; its loss, and the gradients' sum of
    squares."""
    options = Options(**SMALL | {"base": "shard", "max_length": tokens})
    args = _arguments(world.device.type == "cpu", per_device_train_batch_size=1)
    loaded = load(path, options, args, torch.float32, world)
    model, moves = loaded.model, []
    compile_qlora.prepare(model, "ours", options, checkpointing=True, fixed=True)
    (head,) = (unit.parked for unit in loaded.units if unit.parked and unit.parked.copied)
    stock = head.unshard
    head.unshard = lambda wait=True: moves.append("head") or stock(wait)
    for i, block in enumerate(model.get_base_model().base_model.layers):
        block.register_forward_pre_hook(lambda *_, i=i: moves.append(i))
    states = [fully_shard.state(block) for block in model.get_base_model().base_model.layers]
    ahead = [[states.index(s) for s in state._states_to_forward_prefetch] for state in states]
    ids = torch.arange(40, device=world.device)[None] + 60 + world.rank
    model.train()
    loss = model(input_ids=ids, labels=ids, num_items_in_batch=39).loss
    assert head.flat.untyped_storage().nbytes() == 0
    loss.backward()
    squares = sum(p.grad.full_tensor().square().sum().item() for p in _trained(model).values())
    return {"moves": moves, "ahead": ahead, "loss": loss.item(), "squares": squares}


def test_a_parked_head_comes_late():
    """Copied once a step, beside the last blocks if those suffice, else from the first; and that
    changes nothing."""
    path = _checkpoint("small")
    specs = [{"call": "_head_moves", "with": {"path": path, "tokens": n}} for n in (64, 8192)]
    early, late = _jobs(2, specs, **_on_cpu())
    again = [3, 2, 1, 0]  # recomputed; not all versions call a block's hooks then
    assert early.pop("moves") in (["head", 0, 1, 2, 3], ["head", 0, 1, 2, 3, *again])
    assert late.pop("moves") in ([0, 1, 2, "head", 3], [0, 1, 2, "head", 3, *again])
    assert early.pop("ahead") == late.pop("ahead") == [[1], [2], [3], []]
    for name, value in early.items():
        assert value > 0 and abs(late[name] / value - 1) < 1e-5, (early, late)


def test_buffers_equal_transformers():
    """What is computed, not read: rotary frequencies, scales of embeddings."""
    cases = dict(compile_qlora._families())
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for kind, more in (("llama3", bands), ("yarn", {}), ("linear", {})):
        cases[kind] = copy.deepcopy(cases["llama"])
        rope = {"rope_type": kind, "rope_theta": 5e5, "factor": 8.0, **more}
        cases[kind].rope_parameters = rope | {"original_max_position_embeddings": 256}
    seen = set()
    for name, config in cases.items():
        path = _checkpoint(name, config, quantised=False)
        auto = _import("transformers").AutoModelForCausalLM
        want = dict(auto.from_pretrained(path, dtype=torch.float32).named_buffers())
        got = dict(_empty_model(path, torch.float32, "cpu", "eager").named_buffers())
        assert want.keys() == got.keys() and want, name
        assert all(torch.equal(want[k], got[k]) for k in want), name
        seen.add(str(want["model.rotary_emb.inv_freq"].tolist()))
    assert len(seen) >= 4, seen  # they do differ


def _check_clip(world):
    """Our clipping is torch's; and GradScaler skips a step on all ranks when one overflows."""
    mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        fully_shard(model.to(world.device), mesh=mesh)
    x = torch.randn(4, 5, device=world.device) + world.rank
    norms = []
    for model in models:
        model(x).square().sum().backward()
    for limit in (1e9, 0.5, 0.1):
        want = torch.nn.utils.clip_grad_norm_(models[0].parameters(), limit).full_tensor()
        got = clip_grad_norm(models[1].parameters(), limit, mesh.get_group("shard"))
        torch.testing.assert_close(got, want)
        norms.append(float(got))
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(b.grad.full_tensor(), a.grad.full_tensor())
    assert norms[0] > 0.5 > norms[2] * 0.99, norms
    scaler = wait_for_scale(torch.amp.GradScaler(world.device.type, init_scale=8.0))
    optimizer = step_locally(torch.optim.AdamW(models[0].parameters(), lr=0.1))
    for broken in (True, False, False):
        before = [p.full_tensor().clone() for p in models[0].parameters()]
        models[0].zero_grad()
        scaler.scale(models[0](x).sum()).backward()
        last = list(models[0].parameters())[-1].grad._local_tensor
        if broken and world.rank == world.size - 1 and last.numel():
            last[0] = math.inf
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        moved = [
            not torch.equal(p.full_tensor(), b)
            for p, b in zip(models[0].parameters(), before, strict=True)
        ]
        assert (not any(moved)) if broken else all(moved), (broken, moved)
    assert scaler.get_scale() == 4.0
    return {"ok": True}


def _check_base(world):
    """--base auto, by the memory of the rank that has least; Llama 8B and 70B on 15 and 40 GiB."""
    found = {}
    for size, config in (("8b", compile_qlora._llama("8b")), ("70b", _llama_70b())):
        args = _arguments(True, per_device_train_batch_size=2, gradient_checkpointing=True)
        with torch.device("meta"):
            model = _import("transformers").AutoModelForCausalLM.from_config(config)
        entries = [
            Entry([], [], ".layers." in name and p.ndim == 2, p.shape)
            for name, p in model.named_parameters()
        ]
        unit = Unit("", model, entries)
        model.requires_grad_(False)
        sizes = _estimate([unit], model, Options(), args, world.size)
        for gib in (5, 15, 40, 140):
            free = gib if world.rank else 150
            fake = world._replace(device=torch.device("cuda"))
            with mock.patch.object(torch.cuda, "mem_get_info", lambda free=free: (free * GIB, 0)):
                found[f"{size} {gib}"] = _choose_base(Options(), fake, *sizes)
    return found


def test_base_is_chosen_by_memory():
    (found,) = _jobs(2, [{"call": "_check_base"}], **NO_GPU)
    bases = {name: base for name, (base, _) in found.items()}
    assert bases["8b 15"] == bases["8b 40"] == bases["70b 140"] == "replicate", found
    assert bases["8b 5"] == bases["70b 15"] == bases["70b 40"] == "shard", found
    assert "15.0 are free" in found["8b 15"][1], found


def test_clipping_and_the_scaler():
    assert all(run["ok"] for run in _jobs(2, [{"call": "_check_clip"}], **_on_cpu()))


def test_optimizers():
    """bitsandbytes' 8-bit AdamW on pieces is as close to AdamW as it is in one process; through
    its checkpoint it goes on exactly."""
    out = str(Path(_folder().name) / "eight")
    eight, large = {"optim": "adamw_8bit"}, {"lora_r": 64}  # pieces of 4096 weights or more
    save = {"save_strategy": "steps", "save_steps": 4, "output_dir": out}
    specs = [
        _spec("whole", steps=8, args=eight, options=large),
        _spec("saved", steps=8, args=eight | save, options=large),
        _spec(
            "resumed",
            steps=8,
            args=eight | {"output_dir": out},
            options=large,
            resume=f"{out}/checkpoint-4",
        ),
        _spec("32 bits", steps=8, options=large),
    ]
    whole, saved, resumed, full = _jobs(2, specs, **_on_cpu())
    assert whole["losses"] == saved["losses"] and resumed["losses"] == whole["losses"][4:]
    assert 1e-7 < _apart(whole["losses"], full["losses"]) < 2e-2


def test_resumed_on_any_number_of_ranks():
    """Losses of a resumed run are those of the one that went on: exactly on as many ranks."""
    out = str(Path(_folder().name) / "resumed")
    save = {"save_strategy": "steps", "save_steps": 6, "output_dir": out, "save_total_limit": 2}
    go = {"output_dir": out}
    first = f"{out}/checkpoint-6"
    options = {"base": "shard"}
    whole = _spec(steps=12, accumulate=2, options=options, args=save)
    again = _spec(steps=12, accumulate=2, args=go, resume=first)
    # Dropout draws from the random states
    dropout, other = {"lora_dropout": 0.3}, f"{out}-dropout"
    drawn = _spec(steps=8, options=dropout, args=save | {"save_steps": 4, "output_dir": other})
    resume = {"resume": f"{other}/checkpoint-4", "args": {"output_dir": other}}
    redrawn = _spec(steps=8, options=dropout, **resume)
    whole, again, drawn, redrawn = _jobs(2, [whole, again, drawn, redrawn], **_on_cpu())
    assert again["losses"] == whole["losses"][6:], (whole["losses"], again["losses"])
    assert redrawn["losses"] == drawn["losses"][4:], (drawn["losses"], redrawn["losses"])
    assert [p.name for p in _checkpoints(out)] == ["checkpoint-6", "checkpoint-12"]
    ways = [(0, 4)] if _gpus() else [(0, 4), (4, 1)]
    for ranks, accumulate in ways:
        spec = _spec(steps=12, accumulate=accumulate, args=go, resume=first)
        (other,) = _jobs(ranks, [spec], **_on_cpu())
        assert _apart(whole["losses"][6:], other["losses"]) < 1e-5
    wrong = {"fails": _spec(steps=12, accumulate=1, args=go, resume=first)}
    torn = Path(out) / "torn"
    shutil.copytree(first, torn)
    piece = next(torn.glob("__1_*.distcp"))
    piece.write_bytes(piece.read_bytes()[:1000])
    torn = {"fails": _spec(steps=12, accumulate=2, args=go, resume=str(torn))}
    wrong, torn = (run["said"] for run in _jobs(2, [wrong, torn], **_on_cpu()))
    assert wrong.startswith("global batch: found 4, need 8 as in"), wrong
    assert torn.startswith("the checkpoint cannot be read: rank "), torn


def _one_line(done):
    """What this script said when it failed: one line, of one rank."""
    said = _own_lines(done.stderr)
    assert done.returncode != 0 and len(said) == 1, (done.returncode, done.stderr[-3000:])
    assert "Traceback" not in done.stderr.split("qlora_fsdp2: ")[0], done.stderr[:3000]
    assert done.stdout.splitlines()[-1] == "RESULT qlora_fsdp2 FAIL", done.stdout[-3000:]
    return said[0]


def _broken(spec, before=None):
    """(the line that was said, seconds from the last file's writing to the end)."""
    begin = time.time()
    done = _launch(2, ["--worker", json.dumps([spec])], before=before, **_on_cpu())
    files = [p.stat().st_mtime for p in Path(spec["args"]["output_dir"]).rglob("*")]
    return _one_line(done), time.time() - max([begin, *files])


FAULTS = {  # rank, step, what
    "first": (0, 4, "kill"),
    "second": (1, 4, "kill"),
    "saving": (1, 6, "kill_saving"),
    "memory": (1, 4, "memory"),
}


def test_a_rank_that_fails_ends_the_job():
    """A rank killed in training, one while it writes a checkpoint, one out of memory, or all
    without space: the job ends, one line is said, and it goes on from the last complete checkpoint
    with the same losses."""
    save = {"save_strategy": "steps", "save_steps": 3}
    out = {name: str(Path(_folder().name) / name) for name in (*FAULTS, "full")}
    args = {name: save | {"output_dir": folder} for name, folder in out.items()}
    whole, _ = _jobs(2, [_spec(steps=9), _spec(steps=3, args=args["full"])], **_on_cpu())
    jobs = []
    for name, fault in FAULTS.items():
        fault = dict(zip(("rank", "step", "kind"), fault, strict=True))
        spec = _spec(steps=9, args=args[name], fault=fault)
        jobs.append(functools.partial(_broken, spec))

    def no_space():  # the LoRA and optimizer pieces of a rank take more
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    spec = _spec(steps=9, args=args["full"], resume=f"{out['full']}/checkpoint-3")
    done = _beside(*jobs, functools.partial(_broken, spec, no_space))
    words = {"first": "rank 1: ", "second": "rank 0: ", "saving": "rank 0: "}
    words["memory"] = "rank 1: out of memory (Tried to allocate 9.99 GiB), need less"
    words["full"] = "the checkpoint could not be written"
    for (name, folder), (line, seconds) in zip(out.items(), done, strict=True):
        assert words[name] in line and "checkpoint-3" in line, (name, line)
        assert seconds < 30 or name == "full", (name, seconds)  # whose last file is removed
        assert [p.name for p in _checkpoints(folder)] == ["checkpoint-3"], name
    assert [p.name for p in Path(out["full"]).iterdir()] == ["checkpoint-3"]
    rest = [
        _spec(steps=9, args={"output_dir": out[name]}, resume=f"{out[name]}/checkpoint-3")
        for name in FAULTS
    ]
    for run in _jobs(2, rest, **_on_cpu()):
        assert run["losses"] == whole["losses"][3:]


def test_bad_environment():
    for env, words in (
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK: found 2 of WORLD_SIZE 2"),
        ({"RANK": "0"}, "found RANK, need all of RANK, WORLD_SIZE, LOCAL_RANK"),
        ({"RANK": "one", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK"),
    ):
        with mock.patch.dict(os.environ, env):
            assert words in _refused(_environment)
    ranks = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}
    two = mock.patch.object(torch.cuda, "device_count", lambda: 2)
    with mock.patch.dict(os.environ, ranks), two:
        assert "found 2 GPUs on this machine and local rank 3" in _refused(join)


def _refused(call):
    """What is said of an error that is the user's."""
    try:
        call()
    except (ValueError, TypeError, Missing) as error:
        code, words = _explain(error)
        assert code in (2, 77) and "found" in words and "need" in words, (code, words)
        return words
    raise AssertionError("it went unnoticed")


def test_adapter_and_merged_model():
    """PeftModel.from_pretrained loads the adapter on one device; the merged model is it in one."""
    transformers, peft = _import("transformers"), _import("peft")
    out = Path(_folder().name) / "exported"
    specs = []
    for base in ("replicate", "shard"):
        folders = {"adapter": str(out / base), "merged": str(out / f"{base}-merged")}
        (out / base).mkdir(parents=True)
        specs.append(_spec(steps=4, options={"base": base}, **folders))
    _jobs(2, specs, **_on_cpu())
    ids = torch.arange(40)[None] + 60
    auto = transformers.AutoModelForCausalLM
    how = {"dtype": torch.float32, "device_map": {"": "cpu"}}
    for base in ("replicate", "shard"):
        plain = auto.from_pretrained(_checkpoint(), **how)
        for module in plain.modules():
            if hasattr(module, "compute_dtype"):
                module.compute_dtype = module.weight.quant_state.dtype = torch.float32
        model = peft.PeftModel.from_pretrained(plain, str(out / base), torch_device="cpu")
        model = compile_qlora.fuse(model).eval()  # bitsandbytes' products on a CPU are rougher
        want = model(ids).logits
        with model.disable_adapter():
            bare = model(ids).logits
        merged = auto.from_pretrained(str(out / f"{base}-merged"), **how)
        got = merged(ids).logits
        error = ((got - want).norm() / want.norm()).item()
        moved = ((bare - want).norm() / want.norm()).item()
        assert error < 1e-5, (base, error)
        assert moved > 1e-2, (base, moved)
        assert getattr(merged.config, "quantization_config", None) is None
        names = {p.name for p in (out / base).iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json"} <= names, names


def test_command_line():
    """torchrun with TrainingArguments' flags: a log with tokens/s, an adapter, a merged model."""
    out = Path(_folder().name) / "cli"
    text = out.with_suffix(".txt")
    text.write_text("\n".join(compile_qlora._documents()[:40]))
    argv = ["--model", _checkpoint(), "--dataset", str(text), "--max_length", "80", "--lora_r", "8"]
    argv += ["--output_dir", str(out), "--max_steps", "3", "--per_device_train_batch_size", "2"]
    argv += ["--logging_steps", "1", "--save_steps", "2", "--base", "auto", "--merge", "true"]
    argv += ["--packing", "true", "--torch_compile_backend", "aot_eager", "--json", f"{out}.json"]
    nowhere = [*argv, "--model", "/nowhere/at/all"]
    launches = (2, argv), (0, nowhere), (2, ["--bench", "--only", "nothing"])
    jobs = [functools.partial(_launch, *launch, **_on_cpu()) for launch in launches]
    done, failed, untimed = _beside(*jobs)
    said = _one_line(untimed)  # by the first rank, the others have nothing to do
    assert "found no GPU, need one" in said or "found nothing, need some of" in said, said
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("RESULT qlora_fsdp2 PASS"), lines[-3:]
    assert sum("'tokens_per_s': " in line for line in lines) == 3, done.stdout
    assert any("traffic" in line for line in lines), lines
    assert (out / "adapter_model.safetensors").exists() and (out / "merged/config.json").exists()
    assert (out / "checkpoint-2" / "run_state.json").exists()
    assert len(json.loads(Path(f"{out}.json").read_text())["losses"]) == 3
    assert failed.returncode == 2 and "found '/nowhere/at/all'" in _one_line(failed), failed.stderr
    wrong = {
        "optim: found Adafactor, need one that works by elements": ["--optim", "adafactor"],
        "target_modules: found": ["--target_modules", "lm_head"],
        "options: found --model or --dataset beside --bench": ["--bench", "true"],
        "resume_from_checkpoint: found no checkpoint in": [
            *("--output_dir", str(out / "other"), "--resume_from_checkpoint", "true")
        ],
        "--plot, --json: found the directory": ["--json", str(out)],
    }
    specs = [{"fails": {"argv": [*argv, "--use_cpu", "true", *more]}} for more in wrong.values()]
    for run, words in zip(_jobs(0, specs, **NO_GPU), wrong, strict=True):
        assert run["code"] == 2 and run["said"].startswith(words), run


def test_flags_that_do_not_fit_are_refused():
    world = World(0, 1, 0, torch.device("cpu"), None, None)
    _check_options(Options(), _arguments(True), world)
    for options, args, words in (
        ({"base": "half"}, {}, "base: found 'half', need one of replicate, shard, auto"),
        ({"replicas": 2}, {}, "replicas: found 2, need a divisor of the 1 ranks"),
        ({"offload": True}, {}, "offload: found a CPU, need GPUs"),
        ({"memory_cap_gib": -1.0}, {}, "memory_cap_gib: found -1.0, need 0 or more GiB"),
        ({}, {"fsdp": "full_shard"}, "fsdp: found"),
        ({}, {"eval_strategy": "steps"}, "eval_strategy: found 'steps', need no"),
        ({}, {"dataloader_drop_last": True}, "dataloader_drop_last: found True, need none"),
        ({}, {"auto_find_batch_size": True}, "auto_find_batch_size: found True"),
        ({}, {"average_tokens_across_devices": False}, "average_tokens_across_devices: found"),
        ({}, {"label_smoothing_factor": 0.1}, "label_smoothing_factor: found 0.1, need none"),
    ):
        made = _arguments(True)
        for name, value in args.items():
            setattr(made, name, value)
        check = lambda made=made, how=options: _check_options(Options(**how), made, world)
        assert words in _refused(check)


def test_timings_by_name():
    """Which processes --bench starts on one GPU and on two, and its figures of them."""

    def run(spec, **env):
        started.append(spec["name"])
        each = 1.0 if "kind" in spec else 1.5
        return {"name": spec["name"], "tokens_per_s": each * spec["ranks"]}

    hf, usual = PEERS["hf_ddp"], ["8B, GPU 0 by itself", "8B, GPU 1 by itself", "8B, 2 GPUs"]
    for count, names, want, figures in (
        (1, DEFAULT, [*usual[:1], hf], {"8b_vs_hf_ddp": 1.5}),
        (1, ("shard", "hf_fsdp2", "peers"), [], {}),
        (2, DEFAULT, [*usual, hf], {"scaling": 2.0, "8b_vs_hf_ddp": 1.5}),
        (2, ("shard", "hf_fsdp2"), ["8B, 2 GPUs, shard", PEERS["hf_fsdp2"]], {}),
    ):
        started, results, said = [], {}, io.StringIO()
        fakes = {"_gpus": lambda of=count: of, "_run_timed": run, "_say_apart": len}
        fakes |= {"write_by_block": lambda *_: "", "_end": lambda *_: None}
        devices = mock.patch.object(compile_qlora, "_visible")
        quiet = contextlib.redirect_stdout(said)
        with mock.patch.dict(globals(), fakes), devices, quiet:
            head = bench_gpu(results, names)
        assert (sorted(started), head) == (sorted(want), figures), (count, names, started, head)
        assert [r["name"] for r in results["runs"]] == want
        skipped = "shard, hf_fsdp2, peers: skipped, found 1 GPU, need 2 or more\n"
        assert said.getvalue() == (skipped if count == 1 and "shard" in names else "")


def test_gpu_half_precision_compiled():
    """fp16 with GradScaler, and bf16, through inductor: replicated, sharded, offloaded, and
    checkpointed, on all GPUs against one."""
    _skip_unless(gpus=2)
    path = _checkpoint("small", dtype=torch.bfloat16)
    more = {"gradient_checkpointing": True, "torch_compile_backend": "inductor"}
    options = {"compile": True, "lora_r": 16, "lora_alpha": 32}
    ways = {"fp16 replicate": {}, "fp16 shard": {"base": "shard", "offload": True}}
    ways |= {"fp16 offload": {"base": "shard", "cpu_offload": True}}
    ways |= {"bf16 half": {"param_dtype": "half"}}
    ways |= {"bf16 kept": {"base": "shard", "reshard_after_forward": False, "offload": True}}
    halves = {"fp16": 2e-4, "bf16": 1e-2}  # 4e-6 on an H200
    make = functools.partial(_spec, path=path, steps=20)
    count = _gpus()
    ones = [make(options=options, args=more | {half: True}, accumulate=count) for half in halves]
    specs = [
        make(way, options=options | how, args=more | {way.split()[0]: True})
        for way, how in ways.items()
    ]
    ones, runs = _beside(lambda: _jobs(0, ones), lambda: _jobs(count, specs))
    ones = dict(zip(halves, ones, strict=True))
    for run in runs:
        half = run["name"].split()[0]
        apart = _apart(ones[half]["losses"], run["losses"])
        assert apart < halves[half], (run["name"], apart, run["losses"])
        assert run["graphs"] and not run["breaks"]


def test_gpu_scaler_waits_for_its_copies():
    """Gradients on the CPU, a GPU that is busy when they are unscaled."""
    _skip_unless(gpus=1)
    for value in (16.0, math.inf):
        scaler = wait_for_scale(torch.amp.GradScaler("cuda", init_scale=8.0))
        scaler.scale(torch.ones((), device="cuda"))  # which makes its tensors
        p = torch.nn.Parameter(torch.zeros(3))
        p.grad = torch.full((3,), value)
        optimizer = torch.optim.SGD([p], lr=1.0)
        torch.full((2,), 7.0).pin_memory()  # what the copies' memory held before
        torch.cuda._sleep(200_000_000)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        moved, scale = (-2.0, 8.0) if math.isfinite(value) else (0.0, 4.0)
        assert p.tolist() == [moved] * 3 and scaler.get_scale() == scale, (p, scaler.get_scale())


def test_gpu_limits_are_one_line():
    _skip_unless(gpus=1)
    options = {"memory_cap_gib": 0.6, "max_length": 8192, "compile": False}
    path = _checkpoint("small", dtype=torch.bfloat16)
    spec = _spec("", path, options=options, args={"bf16": True, "per_device_train_batch_size": 64})
    spec["random"] = spec.pop("rows") * 4, 8000, 512
    full = functools.partial(_launch, _gpus(), ["--worker", json.dumps([spec])])
    more = functools.partial(_launch, _gpus() + 1, ["--worker", json.dumps([_spec()])])
    full, more = map(_one_line, _beside(full, more))
    assert "out of memory (Tried to allocate" in full
    assert f"found {_gpus()} GPUs on this machine" in more


# --------------------------------------------------------------------------------------------------
# Timings


def write_by_block(directory, config, *, quantised=True, dtype=None):
    """A random checkpoint of a model of any size, a file a block: one block's weights for all of
    them. On a GPU if there is one; no more than one block in memory."""
    from safetensors.torch import save_file

    transformers, bnb = _import("transformers"), _import("bitsandbytes")
    dtype, device = dtype or torch.bfloat16, "cuda" if torch.cuda.is_available() else "cpu"
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size = 1, 259
    directory = compile_qlora.write_checkpoint(directory, small, dtype=dtype)  # and a tokenizer
    (directory / "model.safetensors").unlink()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    files, block = {}, {}

    def random_(p):
        if p.ndim == 1:
            return torch.ones(p.shape, dtype=dtype)
        return torch.randn(p.shape, dtype=dtype, device=device).mul_(0.02)

    def write(name, tensors):
        save_file(tensors, directory / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(tensors, name))

    for name, p in model.base_model.layers[0].named_parameters():
        value = random_(p)
        if quantised and p.ndim == 2:
            how = {"quant_type": "nf4", "compress_statistics": True}
            value, state = bnb.functional.quantize_4bit(value, **how)
            items = state.as_dict(packed=True).items()
            block |= {f"{name}.{k}": t.cpu() for k, t in items}
        block[name] = value.cpu()

    def write_block(i):  # each a little further, or no one would notice another block's bytes
        moved = {k: t.roll(i, 0) if t.ndim == 2 else t for k, t in block.items()}
        tensors = {f"model.layers.{i}.{k}": t for k, t in moved.items()}
        write(f"block-{i:03d}.safetensors", tensors)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(write_block, range(config.num_hidden_layers)))
    rest = {n: p for n, p in model.named_parameters() if ".layers." not in n}
    for i, (name, p) in enumerate(rest.items()):
        write(f"rest-{i}.safetensors", {name: random_(p).cpu().contiguous()})
    index = {"metadata": {}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures, config.dtype = [type(model).__name__], dtype
    if quantised:
        config.quantization_config = compile_qlora._nf4_config(dtype).to_dict()
    config.save_pretrained(directory)
    return directory


def _llama_70b():
    config = compile_qlora._llama("8b")
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 8192, 28672, 80
    config.num_attention_heads = 64
    return config


TIMED = {"batch": 2, "length": 2048, "accumulate": 4, "steps": 9, "r": 64}


def peer(spec: dict):
    """One of PEERS on the same random tokens, in torchrun's processes: prints as worker does."""
    kind, local = spec["kind"], int(os.environ["LOCAL_RANK"])
    if kind == "unsloth_fsdp2":
        os.environ["UNSLOTH_FSDP2"] = "1"
    unsloth = _import("unsloth") if kind.startswith("unsloth") else None
    transformers, peft, datasets = _import("transformers"), _import("peft"), _import("datasets")
    torch.cuda.set_device(local)
    t = types.SimpleNamespace(**TIMED)
    world = int(os.environ["WORLD_SIZE"])
    generator = torch.Generator().manual_seed(1)
    count = world * t.batch * t.accumulate * t.steps
    ids = torch.randint(0, 128000, (count, t.length), generator=generator)
    columns = {"input_ids": ids.tolist(), "labels": ids.tolist()}
    columns["attention_mask"] = torch.ones_like(ids).tolist()
    rows = datasets.Dataset.from_dict(columns)
    times = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            torch.cuda.synchronize()
            times.append(time.perf_counter())

    args = {"per_device_train_batch_size": t.batch, "gradient_accumulation_steps": t.accumulate}
    args |= {"max_steps": t.steps, "logging_steps": 1, "report_to": "none", "save_strategy": "no"}
    args |= {"bf16": True, "learning_rate": 1e-4, "optim": "adamw_torch_fused", "seed": 3407}
    args |= {"disable_tqdm": True, "remove_unused_columns": False}
    args |= {"output_dir": tempfile.mkdtemp(prefix="qlora_fsdp2_peer_")}
    lora = {"r": t.r, "lora_alpha": 2 * t.r, "lora_dropout": 0, "target_modules": list(TARGETS)}
    if unsloth:
        trl, fast = _import("trl"), unsloth.FastLanguageModel
        model, tokenizer = fast.from_pretrained(
            spec["path"],
            max_seq_length=t.length,
            dtype=torch.bfloat16,
            load_in_4bit=True,
            local_files_only=True,
            device_map={"": local},
        )
        model = fast.get_peft_model(model, use_gradient_checkpointing="unsloth", **lora)
        how = {"max_length": t.length, "dataset_kwargs": {"skip_prepare_dataset": True}}
        trainer = trl.SFTTrainer(
            model=model,
            train_dataset=rows,
            processing_class=tokenizer,
            args=trl.SFTConfig(**how, **args),
            callbacks=[Clock()],
        )
    else:
        if kind == "hf_fsdp2":
            config = {"fsdp_version": 2, "version": 2, "activation_checkpointing": True}
            config["transformer_layer_cls_to_wrap"] = ["LlamaDecoderLayer"]
            args |= {"fsdp": "full_shard auto_wrap", "fsdp_config": config}
        else:
            args |= {"gradient_checkpointing": True, "ddp_find_unused_parameters": False}
            args |= {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
        how = {"dtype": torch.bfloat16, "device_map": {"": local}, "attn_implementation": "sdpa"}
        auto = transformers.AutoModelForCausalLM
        model = auto.from_pretrained(spec["path"], **how)
        model.config.use_cache = False
        for module in model.modules() if kind == "hf_fsdp2" else ():
            # accelerate shards 4-bit weights that are typed as bf16, as quant_storage would do it
            if hasattr(module, "quant_state"):
                weight = module.weight
                weight.data = weight.data.view(-1).view(torch.bfloat16).view(-1, 1)
                weight.quant_storage = torch.bfloat16
        model.enable_input_require_grads()
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **lora))
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(**args),
            train_dataset=rows,
            data_collator=transformers.default_data_collator,
            callbacks=[Clock()],
        )
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    step_s = [b - a for a, b in itertools.pairwise(times)]
    rate = count / t.steps * t.length / statistics.median(step_s[-5:])
    logged = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    found = {"name": spec["name"], "tokens_per_s": rate, "step_s": step_s, "losses": logged}
    if local == 0:
        print("WORKER " + json.dumps(found | {"peak_gib": _peak_gib()}), flush=True)


def _timed(name, path, vocab, ranks, options=None, args=None, **more):
    t = types.SimpleNamespace(**{**TIMED, **more.pop("timed", {})})
    accumulate = more.pop("accumulate", t.accumulate)
    usual = {"per_device_train_batch_size": t.batch, "gradient_accumulation_steps": accumulate}
    usual |= {"max_steps": t.steps, "logging_steps": 1, "learning_rate": 1e-4, "seed": 3407}
    usual |= {
        "gradient_checkpointing": True,
        "bf16": True,
        "warmup_steps": 1,
        "save_strategy": "no",
    }
    kept = {"reshard_after_forward": False, "offload": True}
    options = (
        {"max_length": t.length, "lora_r": t.r, "lora_alpha": 2 * t.r} | kept | (options or {})
    )
    rows = ranks * t.batch * accumulate * t.steps
    spec = {"name": name, "path": path, "options": options, "args": usual | (args or {})}
    return spec | {"random": (rows, t.length, vocab), "ranks": ranks} | more


def _run_timed(spec, **env) -> dict:
    """A spec's result in a torchrun of its own, {"error": ...} if it failed; printed."""
    how = ["--peer", json.dumps(spec)] if "kind" in spec else ["--worker", json.dumps([spec])]
    done = _launch(spec["ranks"], how, UNSLOTH_DISABLE_STATISTICS="1", **env)
    lines = [x for x in done.stdout.splitlines() if x.startswith("WORKER ")]
    if lines:
        found = json.loads(lines[-1][7:])
    else:
        said = [x for x in done.stderr.splitlines() if re.search(r"qlora_fsdp2: |Error", x)]
        found = {"name": spec["name"], "error": (said or ["no output"])[0][-300:]}
    found["ranks"] = spec["ranks"]
    _say_result(found)
    return found


def _say_result(r):
    if "error" in r:
        print(f"{r['name']:<28} failed: {r['error']}", flush=True)
        return
    steps = r.get("step_s", ())
    line = f"{r['name']:<28} {r['tokens_per_s']:8.0f} tokens/s, "
    line += f"step {statistics.median(steps[-5:]):.3f} s, " if steps else ""
    line += f"first {steps[0] if steps else r['first_s']:.1f} s; "
    line += f"peak {r['peak_gib']:.2f} GiB a GPU; " if _gpus() else ""
    lines = [f"{line}loss {r['losses'][0]:.4f} to {r['losses'][-1]:.4f}"]
    if "load_s" in r:
        words = f"base {r['base']}, {r['base_gib']:.2f} GiB, loaded in {r['load_s']:.1f} s, host "
        words += f"+{r['load_host_gib']:.2f} GiB"
        if _gpus():
            words += f", GPU peak {r['load_device_gib']:.2f} GiB; "
            words += f"all of PyTorch on a GPU {r['device_gib']:.2f} GiB"
        lines.append(f"    {words}")
        lines.append("    " + _say_traffic(r["traffic"], r["lora_bytes"]))
    if any(by_rank := r.get("exposed", ())):
        share = lambda key: " ".join(f"{100 * e[key]:.2f}%" for e in by_rank)
        words = f"{by_rank[0]['ms']:.1f} ms; rank by rank, communication alone "
        words += f"{share('exposed')}, nothing {share('idle')}; by kernels: "
        words += ", ".join(f"{k} {ms:.1f}" for k, ms in r["groups"].items())
        lines.append(f"    a profiled step {words}")
    print("\n".join(lines), flush=True)


def _say_traffic(traffic, lora_bytes):
    parts = []
    for name in Traffic.NAMES:
        if calls := traffic[f"{name}_calls"]:
            parts.append(f"{name} {traffic[f'{name}_bytes']} in {calls} calls")
    what = f"; LoRA is {lora_bytes} bytes"
    return "traffic received a step and rank: " + (", ".join(parts) or "none") + what


def bench_gpu(results, names) -> dict:
    """Real shapes with random weights on all GPUs here, each run in processes of its own. Of TIMINGS
    and PEERS by name; adds its records to results, headline figures are returned."""
    count, folder = _gpus(), Path(tempfile.mkdtemp(prefix="qlora_fsdp2_bench_"))
    head, found = {}, results.setdefault("runs", [])
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    cache["TRITON_CACHE_DIR"] = str(folder / "cache/triton")

    def go(*specs):
        """Runs of one GPU side by side, others one after the other."""
        seen = compile_qlora._visible
        alone = lambda i, s: functools.partial(_run_timed, s, CUDA_VISIBLE_DEVICES=seen(i), **cache)
        ones = [s for s in specs if s["ranks"] < 2]
        made = {}
        for i in range(0, len(ones), count):
            few = ones[i : i + count]
            done = _beside(*(alone(gpu, spec) for gpu, spec in enumerate(few)))
            made |= {id(spec): run for spec, run in zip(few, done, strict=True)}
        made |= {id(s): _run_timed(s, **cache) for s in specs if s["ranks"] > 1}
        found.extend(made[id(s)] for s in specs)
        return [made[id(s)] for s in specs]

    own = f"8B, {count} GPUs" if count > 1 else "8B, GPU 0 by itself"
    ours = lambda: [r for r in found if r["name"] == own and "error" not in r]
    _end(*_started)  # ranks that wait hold memory
    several = [n for n in names if n in ("shard", "peers", "70b", *PEERS) and n != "hf_ddp"]
    if count < 2 and several:
        print(f"{', '.join(several)}: skipped, found 1 GPU, need 2 or more", flush=True)
        names = [n for n in names if n not in several]
    try:
        if "parity" in names:
            results["curves"] = _bench_parity(folder, count, go)
        if {*names} - {"parity", "70b"}:
            path = str(write_by_block(folder / "8b", compile_qlora._llama("8b")))
            torch.cuda.empty_cache()
            timed = functools.partial(_timed, path=path, vocab=128000)
        if "8b" in names:
            # each GPU by itself, side by side: ranks wait for the slowest of them
            specs = [timed(f"8B, GPU {i} by itself", ranks=1, profile_at=3) for i in range(count)]
            if count > 1:
                specs.append(timed(f"8B, {count} GPUs", ranks=count, profile_at=3))
            *ones, last = (r.get("tokens_per_s", math.nan) for r in go(*specs))
            if ones:
                head["scaling"] = last / statistics.mean(ones)
        if "shard" in names:
            options = {"base": "shard", "reshard_after_forward": True}
            shard = timed(f"8B, {count} GPUs, shard", ranks=count, options=options, profile_at=3)
            _say_apart(ours() + go(shard))
        wanted = [n for n in PEERS if "peers" in names or n in names]
        if not importlib.util.find_spec("unsloth"):
            wanted = [n for n in wanted if n[:2] == "hf"]
        if wanted:
            specs = [{"kind": n, "name": PEERS[n], "path": path, "ranks": count} for n in wanted]
            rates = {n: r["tokens_per_s"] for n, r in zip(wanted, go(*specs)) if "error" not in r}
            if rates and ours():
                best = max(rates, key=rates.get)
                head[f"8b_vs_{best}"] = ours()[0]["tokens_per_s"] / rates[best]
        if "t4" in names:
            half = {"fp16": True, "bf16": False}
            capped = {"options": {"memory_cap_gib": 15.0}, "args": half, "timed": {"steps": 8}}
            specs = [timed("8B fp16, 15 GiB, 2 ranks", ranks=2, **capped)] if count > 1 else []
            one = timed("8B fp16, 15 GiB, 1 rank", ranks=1, accumulate=8, **capped)
            other = copy.deepcopy(one) | {"name": "the same, other attention"}
            other["options"]["attention"] = "sdpa"
            *two, one, other = go(*specs, one, other)
            _say_apart([one, *two, other])
        if "70b" in names:
            _bench_70b(folder, count, go)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return head


def _say_apart(runs):
    """Differences of loss curves to the first's."""
    whole = [run for run in runs if "losses" in run]
    for run in whole[1:] if whole and whole[0] is runs[0] else ():
        if len(run["losses"]) == len(whole[0]["losses"]):
            apart = _apart(whole[0]["losses"], run["losses"])
            words = f"largest relative difference of {len(run['losses'])} losses"
            print(f"{words}, {whole[0]['name']} to {run['name']}: {apart:.2e}", flush=True)


def _bench_parity(folder, count, go) -> dict:
    """60 steps of Llama 1B on text: every way to shard on all GPUs against one GPU, one GPU with
    its sums in another order, and transformers with PEFT on one. Curves to plot, by name."""
    path = str(write_by_block(folder / "1b", compile_qlora._llama("1b")))
    torch.cuda.empty_cache()
    specs = {}

    def spec(name, ranks, options=None, accumulate=1, stack=None, **args):
        usual = {"per_device_train_batch_size": 2, "max_steps": 60, "learning_rate": 2e-4}
        usual |= {"gradient_accumulation_steps": accumulate, "bf16": True, "seed": 3407}
        options = {"max_length": 512, "lora_r": 32, "lora_alpha": 64} | (options or {})
        made = {"name": f"1B, {name}", "path": path, "options": options, "args": usual | args}
        made |= {"rows": 100 * 2 * count + 1, "ranks": ranks}
        specs[name] = made | ({"stack": stack} if stack else {})

    if count > 1:
        many = f"{count} GPUs"
        spec(f"{many}, replicate", count)
        spec(f"{many}, shard", count, {"base": "shard"})
        spec(f"{many}, CPU offload", count, {"base": "shard", "cpu_offload": True})
        spec(f"{many}, checkpointing", count, gradient_checkpointing=True)
        spec(f"{many}, HSDP", count, {"replicas": count})
    spec("1 GPU", 1, accumulate=count)
    spec("1 GPU, other attention", 1, {"attention": "sdpa"}, accumulate=count)
    spec("1 GPU, checkpointing", 1, accumulate=count, gradient_checkpointing=True)
    spec("1 GPU, transformers", 0, accumulate=count, stack="hf")
    sharded = [spec for spec in specs.values() if spec["ranks"] > 1]
    made = _jobs(count, sharded) if sharded else []
    _end(*_started)
    for run in made:
        _say_result(run)
    made += go(*(spec for spec in specs.values() if spec["ranks"] < 2))
    runs = dict(zip(specs, made, strict=True))
    _say_apart([runs["1 GPU"], *(run for run in made if run is not runs["1 GPU"])])
    alone = runs["1 GPU, checkpointing"]
    _say_apart([alone, *(runs[n] for n in runs if "checkpointing" in n and runs[n] is not alone)])
    drawn = {"1 GPU, transformers": "eager, 1 GPU", "1 GPU": "compiled, 1 GPU"}
    for way in ("replicate", "shard") if count > 1 else ():
        drawn[f"{many}, {way}"] = f"{way}, {many}"
    curves = {w: runs[name]["losses"] for name, w in drawn.items() if "losses" in runs[name]}
    for name, losses in curves.items():
        for i in range(0, len(losses), 10):
            values = " ".join(f"{x:.5f}" for x in losses[i : i + 10])
            print(f"loss {name:<18} from step {i + 1:<3} {values}", flush=True)
    return curves


def _bench_70b(folder, count, go):
    begin = time.perf_counter()
    path = str(write_by_block(folder / "70b", _llama_70b()))
    torch.cuda.empty_cache()
    print(
        f"a 70B-shaped checkpoint in NF4 written in {time.perf_counter() - begin:.0f} s", flush=True
    )
    apart = {"reshard_after_forward": True}
    capped = apart | {"base": "shard", "memory_cap_gib": 48.0}
    for rank in (32, 64):
        ways = {"replicate": apart, "shard, 48 GiB": capped}
        if rank == 32:
            ways["shard, CPU offload"] = capped | {"cpu_offload": True}
        specs = []
        for name, options in ways.items():
            lora = {"lora_r": rank, "lora_alpha": 2 * rank}
            how = {"options": options | lora, "timed": {"steps": 8}}
            if rank == 32 and name == "shard, 48 GiB":
                how["profile_at"] = 2  # before the steps whose median counts
            specs.append(_timed(f"70B r={rank}, {name}", path, 128000, count, accumulate=1, **how))
        whole, *others = go(*specs)
        _say_apart([whole, *others])
        for run in others:
            if "peak_gib" in run and "peak_gib" in whole:
                share = run["peak_gib"] / whole["peak_gib"]
                print(f"{run['name']}: its peak is {share:.3f} of replicate's", flush=True)


def bench_cpu(results) -> dict:
    """Two gloo ranks on this CPU: the small model, ways to shard it, beside one process."""
    make = functools.partial(
        _spec, path=_checkpoint("small", dtype=torch.bfloat16), steps=CPU_STEPS
    )
    one, how = "1 process", {"args": {"logging_steps": 1}}
    ones = [make(f"eager, {one}", accumulate=2, stack="hf")]
    ones += [make(f"compiled, {one}", accumulate=2, options={"compile": True}, **how)]
    ways = "replicate", "shard"
    twos = [make(f"{base}, 2 ranks", options={"base": base}, **how) for base in ways]
    results["runs"] = _jobs(0, ones, **_on_cpu()) + _jobs(2, twos, **_on_cpu())
    for run in results["runs"]:
        _say_result(run)
    results["curves"] = {run["name"]: run["losses"] for run in results["runs"]}
    _say_apart(results["runs"])
    _, _, plain, sharded = results["runs"]
    return {"shard_vs_replicate": sharded["tokens_per_s"] / plain["tokens_per_s"]}


def plot(results, path):
    """Loss curves of one process, eager and compiled, and of all ranks, as a PNG."""
    curves = results["curves"]
    model = "Llama 1B" if _gpus() else "a small Llama"
    title = f"QLoRA of {model} on text, {_device_words(_gpus() or 1)}"
    _need(len(curves) > 1, "--plot", f"{len(curves)} whole runs", "two or more, see above")
    compile_qlora.plot_losses(curves, path, title)


# --------------------------------------------------------------------------------------------------


def _parse(argv):
    # The filter of logged losses waits for the GPU in each micro-batch
    how = {"output_dir": "results/qlora_fsdp2", "logging_nan_inf_filter": False}
    return compile_qlora._parse(argv, Options, __doc__, **how)


def _header(device, seed):
    versions = {"torch": torch.__version__.split("+")[0]}
    for name in ("triton", "transformers", "peft", "bitsandbytes", "accelerate"):
        versions[name] = _import(name).__version__
    versions |= {"cuda": torch.version.cuda, "seed": seed}
    words = (f"{k} {v}" for k, v in versions.items())
    print("qlora_fsdp2", device, *words, sep=" | ", flush=True)
    return versions


def _device_words(count):
    return f"{count} x {torch.cuda.get_device_name()}" if _gpus() else "CPU"


def _train(options, args, world) -> dict:
    """--model or --dataset: trains, exports; results for --json."""
    for name in ("test", "bench", "fuzz", "only", "plot"):
        found = f"--model or --dataset beside --{name}"
        _need(not getattr(options, name), "options", found, "either")
    _check_options(options, args, world)
    _check_paths(options.json)
    _voice.output_dir = args.output_dir
    cuda = world.device.type == "cuda"
    if cuda and not args.fp16 and not args.bf16:
        args = compile_qlora._in_precision(args, compile_qlora._half())
    if not world.first:
        args.disable_tqdm = True
    resume = args.resume_from_checkpoint
    if resume in ("true", "True", "1"):
        complete = _checkpoints(args.output_dir)
        need = "--output_dir of a run that saved one"
        _need(complete, "resume_from_checkpoint", f"no checkpoint in {args.output_dir}", need)
        resume = str(complete[-1])
    if resume and not (Path(resume) / "run_state.json").is_file():
        raise ValueError(
            f"resume_from_checkpoint: found {resume}, need a checkpoint of this script"
        )
    name = options.model or "a small random Llama"
    if options.model is None:
        path = Path(args.output_dir) / "small"
        if world.first:
            compile_qlora.write_checkpoint(path, compile_qlora._llama("small"))
        dist.barrier(group=world.gloo)
    else:
        path = fetch(options.model, world)
    if world.first:
        print(f"training {name} on {world.size} ranks", flush=True)
    run = train(str(path), options, args, world, resume=resume)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    save_adapter(run.trainer.model, args.output_dir, world)
    if options.merge:
        half = torch.float16 if args.fp16 else torch.bfloat16
        save_merged(run.loaded, path, Path(args.output_dir) / "merged", half, world)
    lora = _lora_weights(run.trainer.model)
    if world.first:
        print(_say_traffic(run.traffic, lora * 4))
        compiled = getattr(run.trainer.model, "compiled_regions", None)
        for line in compiled.report() if compiled else ():
            print(f"  {line}")
        what = ", merged" if options.merge else ""
        print(f"saved in {args.output_dir}: adapter{what}", flush=True)
    keys = "losses", "step_s", "tokens_per_s", "peak_gib", "traffic"
    return {key: getattr(run, key) for key in keys}


def _specs(given, world):
    """What --worker is to do: as given, or for "-" line by line from the first rank's input."""
    while True:
        line = [(sys.stdin.readline() if given == "-" else given) if world.first else None]
        dist.broadcast_object_list(line, 0, group=world.gloo)
        yield from json.loads(line[0] or "[]")
        if given != "-" or not line[0]:
            return


def _in_ranks(argv) -> int:
    """What every rank does under torchrun, or the only process without it."""
    _voice.connect()
    _end_with_the_others()
    use_cpu = bool(re.search(r"--use_cpu(?![= ](?i:false|0|no))", " ".join(argv)))
    world = join(use_cpu)
    if world.device.type == "cpu" and not use_cpu:
        argv = [*argv, "--use_cpu", "true"]
    if argv[:1] == ["--worker"]:
        for spec in _specs(argv[1], world):
            found = worker(spec, world)
            if world.first:
                print("WORKER " + json.dumps(found), flush=True)
            compile_qlora._reset()
        dist.barrier(group=world.gloo)
        return 0
    quiet = _nothing() if world.first else contextlib.redirect_stderr(io.StringIO())
    with quiet:  # argparse's own words, once
        options, args = _parse(argv)
    args._n_gpu = min(args.n_gpu, 1)
    versions = _header(_device_words(world.size), args.seed) if world.first else {}
    if world.first and not _gpus() and not use_cpu:
        print("no GPU found: training on CPUs, with gloo", flush=True)
    found = _train(options, args, world)
    if world.first and options.json:
        found = {**versions, **found}
        _write(options.json, lambda part: part.write_text(json.dumps(found, indent=1)))
    dist.barrier(group=world.gloo)
    if world.first:
        rate = f"tokens_per_s={found['tokens_per_s']:.0f}"
        print(f"RESULT qlora_fsdp2 PASS steps={len(found['losses'])} {rate}", flush=True)
    return 0


def _explain(error) -> tuple[int, str]:
    """(exit code, one line) for what ended a run; "" if it was not foreseen."""
    line = " ".join(str(error).split())[:400]
    if found := _no_memory(error):
        tried = re.search(r"Tried to allocate [\d.]+ \w+", line)
        less = "need less: --per_device_train_batch_size, --max_length, --gradient_checkpointing "
        less += "true, --offload true, --base shard or --cpu_offload true"
        return 1, f"out of memory ({tried[0] if tried else found[:80]}), {less}; {_last_words()}"
    if isinstance(error, CheckpointException):
        rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
        words = " ".join(str(cause).split())[:160] or type(cause).__name__
        wrote = getattr(error, "writing", False)
        what = "the checkpoint could not be written" if wrote else "the checkpoint cannot be read"
        return 1, f"{what}: rank {rank}: {type(cause).__name__}: {words}; {_last_words()}"
    if type(error).__name__ == "SafetensorError":
        return 2, f"a file of safetensors cannot be read or written: {line[:200]}"
    if isinstance(error, Missing):
        return 77, line
    code, words = compile_qlora._explain(error)
    lost = re.search(r"(?i)connection (closed|reset)|gloo|nccl|socket|peer", line)
    if not words and lost and isinstance(error, (dist.DistError, RuntimeError)):
        return 1, f"lost another rank ({line[:100]}); {_last_words()}"
    return code, words


def _plan(options) -> tuple[bool, list[str]]:
    """(whether it tests, what it times); ValueError, before any work, for options that do not go
    together."""
    tests = bool(options.test or options.fuzz or not options.bench)
    times = options.bench or not (options.test or options.fuzz)
    names, known = options.only.split(",") if options.only else [*DEFAULT], {*TIMINGS, *PEERS}
    _need({*names} <= known, "--only", options.only, f"some of {', '.join((*TIMINGS, *PEERS))}")
    for name in ("only", "plot"):
        ok = times or not getattr(options, name)
        _need(ok, f"--{name}", "no timings", "--bench or neither it nor --test")
    _need(_gpus() or not options.only, "--only", "no GPU", "one: a CPU has one timing")
    if options.plot:
        names.append("parity")
    return tests, names if times else []


def _test_and_time(options, args) -> int:
    tests, names = _plan(options)
    _check_paths(options.plot, options.json)  # what is written last is looked at first
    if options.plot:
        import matplotlib  # noqa: F401
    versions = _header(_device_words(_gpus() or 1), args.seed)
    code, checks, head, results = 0, 0, {}, {}
    if tests:
        code, checks = _self_test(options.fuzz, args.seed, sys.modules[__name__])
    if names and not code:
        head = bench_gpu(results, names) if _gpus() else bench_cpu(results)
        broken = [r for r in results["runs"] if "error" in r and r["name"] not in PEERS.values()]
        code = int(bool(broken))
        if options.plot and not code:
            plot(results, options.plot)
    if options.json:
        found = {**versions, **results, **head}
        _write(options.json, lambda part: part.write_text(json.dumps(found, indent=1)))
    figures = " ".join(f"{k}={v:.2f}x" for k, v in head.items())
    print(f"RESULT qlora_fsdp2 {'FAIL' if code else 'PASS'} checks={checks} {figures}".rstrip())
    return code


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    trains = any(re.match(r"--(worker|model|dataset)(=|$)", word) for word in argv)
    try:
        if argv[:1] == ["--peer"]:
            peer(json.loads(argv[1]))
            return 0
        if trains:
            code = _in_ranks(argv)
            dist.destroy_process_group()
            return code
        if int(os.environ.get("RANK", "0")):  # torchrun without a model: one process tests, and
            return 0  # starts torchruns of its own
        alone = _plain_environment()  # TrainingArguments would wait for the others
        os.environ.clear()
        os.environ.update(alone)
        return _test_and_time(*_parse(argv))
    except (Exception, CheckpointException, KeyboardInterrupt) as error:  # noqa: BLE001
        code, words = _explain(error)
        _voice.say(words)
    _end(*_started)
    sys.stdout.flush()
    sys.stderr.flush()
    if trains:  # other ranks may wait in a collective: torchrun ends them when this one has gone
        os._exit(code)
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, INTERRUPT)
    sys.exit(main())
