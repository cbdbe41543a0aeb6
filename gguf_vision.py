"""A vision finetune straight to two GGUF files for llama.cpp, and the proof that llama.cpp agrees.

Problem: llama.cpp runs a vision model from two files, the text model and the projector (mmproj).
Its converter cannot make the second from a transformers LLaVA, and converts no adapter into it, so
that LoRA on the vision tower is lost. Nothing says whether the files give the model's own outputs.

Idea:
- One call reads safetensors (or a live model) half a million weights at a time, dequantises 4-bit
  weights by their quant_state, adds LoRA in float32 wherever it sits (language, vision, projector),
  converts and writes. It holds no tensor whole but those it permutes.
- Every tensor of the model is written, or listed as left out with the reason, or the export stops.
- The tokenizer's pre-tokenizer is identified by what it does to a text, not by its name.
- `--verify` runs pictures and a prompt through both files in llama.cpp's mtmd, and through
  transformers in float32: token ids, image embeddings, logits of the next token.
- The finetune before it: QLoRA with Trainer on rows with pictures and rows without, in one batch.

Left out: LLaVA-NeXT (mtmd lays tiles one after another and never reads the newline embedding, so
its grid cannot be expressed), mixtures of experts, video and audio, K-quants (llama-quantize makes
them from the F16 file; Python's gguf has none), tensors split over several GGUF files.
Run on CPUs and on an H200; the proof needs `pip install llama-cpp-python`, built from source.

    python gguf_vision.py                 self-test, then timings; --test or --bench for one of them
    python gguf_vision.py --export MODEL_DIR --out DIR [--adapter LORA_DIR] [--dtype f16] [--verify]
    python gguf_vision.py --finetune MODEL_DIR --out DIR [--image-max-tokens 256] [--max_steps 60]
    llama-mtmd-cli -m DIR/NAME-text-F16.gguf --mmproj DIR/NAME-mmproj-F16.gguf --image cat.png

    from gguf_vision import export_gguf
    text_path, mmproj_path = export_gguf(model, "out", processor=processor)   # a live (PEFT) model
"""

import argparse
import contextlib
import copy
import ctypes
import functools
import heapq
import io
import itertools
import json
import math
import os
import pydoc_data.topics
import random
import re
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import types
import unicodedata
import unittest
import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # Ctrl-C while torch is imported: nothing else can catch it yet
    INTERRUPT = signal.signal(signal.SIGINT, lambda *_: os._exit(130))

try:
    import gguf
    import numpy as np
    import torch
    from torch import Tensor
except ImportError as missing:
    if __name__ != "__main__":
        raise
    found = f"found no {missing.name}, need it installed, see requirements.txt"
    print(f"gguf_vision: {found}", file=sys.stderr)
    print("RESULT gguf_vision FAIL checks=0")
    sys.exit(77)

IGNORE = -100
# Weights converted at a time. Buffers of 1 MiB stay in the cache and with the allocator: a 2B model in
# float16 took 2.5 s so and 6.8 s by 8 MiB (2 cores)
ELEMENTS = 512 << 10
GIB = 1 << 30
TYPE, FILE = gguf.GGMLQuantizationType, gguf.LlamaFileType
# --dtype: how matrices are stored, and the file's own word for it. Vectors stay float32.
DTYPES = {
    "f32": (TYPE.F32, FILE.ALL_F32),
    "f16": (TYPE.F16, FILE.MOSTLY_F16),
    "bf16": (TYPE.BF16, FILE.MOSTLY_BF16),
    "q8_0": (TYPE.Q8_0, FILE.MOSTLY_Q8_0),
    "q5_1": (TYPE.Q5_1, FILE.MOSTLY_Q5_1),
    "q5_0": (TYPE.Q5_0, FILE.MOSTLY_Q5_0),
    "q4_1": (TYPE.Q4_1, FILE.MOSTLY_Q4_1),
    "q4_0": (TYPE.Q4_0, FILE.MOSTLY_Q4_0),
}
FAMILIES = {
    "llava": "LLaVA 1.5, with a CLIP or a SigLIP tower",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
}
TEXT = {  # a text model's model_type: llama.cpp's architecture
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_vl_text": "qwen2vl",
    "qwen2_5_vl_text": "qwen2vl",
    "qwen3_vl_text": "qwen3vl",
}
LLAMA_CPP = "llama-cpp-python==0.3.36"  # the version whose faults FAULTS names
FUZZ_CASES = "12"  # of each random test in the self-test
LIMIT = 2e-3  # relative L2 distance to transformers, files in float32
ROUTES = ("images", "logits")  # what is compared
THREADS = os.cpu_count() or 1  # of llama.cpp
PAD_COLOUR = (122, 116, 104)  # with which llama.cpp makes a picture for LLaVA square


def _need(ok, name, found, need):
    if not ok:
        raise ValueError(f"{name}: found {found}, need {need}")


# --------------------------------------------------------------------------------------------------
# Weights: each has a name, a shape, a dtype, and gives the rows asked for, so that nothing is held
# whole. Rows are those of the first dimension.

STORED = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file, read by rows with plain reads (a map would keep its pages)."""

    file: io.FileIO  # kept open: the kernel reads ahead by descriptor
    name: str
    offset: int  # bytes from the file's beginning
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        rows = self.shape[0] if self.shape else 1
        stop = rows if stop is None else stop
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        data = bytearray((stop - start) * row)
        got, view = 0, memoryview(data)
        while got < len(data):
            n = os.preadv(self.file.fileno(), [view[got:]], self.offset + start * row + got)
            found = f"the file's end {len(data) - got} bytes too early"
            _need(n, f"{self.file.name}: {self.name}", found, "the whole tensor")
            got += n
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        if not data:
            return torch.empty(shape, dtype=self.dtype)
        return torch.frombuffer(data, dtype=self.dtype).view(shape)


@dataclass(frozen=True)
class Live:
    """A tensor of a model in memory, on any device."""

    name: str
    tensor: Tensor

    @property
    def shape(self):
        return tuple(self.tensor.shape)

    @property
    def dtype(self):
        return self.tensor.dtype

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        if not self.tensor.dim():
            return self.tensor.detach().cpu()
        return self.tensor.detach()[start:stop].cpu().contiguous()


class Quantised:
    """A bitsandbytes 4-bit weight (NF4 or FP4: its code table says which), by its quant_state.

    Value = dtype(code[nibble] * scale), the high nibble first; a nested scale is code2[q] * absmax2,
    rounded to float32, plus the offset, rounded again: the bits of bitsandbytes' CUDA kernels.
    """

    def __init__(self, name, packed, parts):
        self.name, self.packed = name, packed
        key = next(k for k in parts if k.startswith("quant_state."))
        state = _parsed(bytes(parts[key].read().flatten().tolist()), f"{name}: {key}")
        try:
            self.shape, self.blocksize = tuple(state["shape"]), state["blocksize"]
            self.dtype = getattr(torch, state["dtype"])
            self.code, self.scale = parts["quant_map"].read().float(), parts["absmax"].read()
            if "nested_absmax" in parts:
                blocks = torch.arange(self.scale.numel()) // state["nested_blocksize"]
                scale2 = parts["nested_absmax"].read().float()[blocks]
                self.scale = parts["nested_quant_map"].read().float()[self.scale.long()] * scale2
                self.scale = self.scale + torch.tensor(state["nested_offset"], dtype=torch.float32)
            sizes = (self.blocksize, *self.shape)
            whole = all(type(n) is int and n > 0 for n in sizes) and self.code.shape == (16,)
            whole = whole and self.scale.is_floating_point()
            whole = whole and isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point
        except (KeyError, TypeError, IndexError, AttributeError, RuntimeError, ValueError):
            whole = False
        _need(whole, name, f"a broken quant_state: {state}", "bitsandbytes' own")
        blocks = -(-math.prod(self.shape) // self.blocksize)
        _need(self.scale.numel() == blocks, name, f"{self.scale.numel()} scales", str(blocks))
        size, need = math.prod(packed.shape) * packed.dtype.itemsize, -(-math.prod(self.shape) // 2)
        _need(0 <= size - need < 8, name, f"{size} bytes of 4-bit codes", need)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        row, stop = math.prod(self.shape[1:]), self.shape[0] if stop is None else stop
        first, last = start * row, stop * row
        item, flat = 2 * self.packed.dtype.itemsize, self.packed.shape[0] > 1
        low, high = (first // item, -(-last // item)) if flat else (0, None)
        data = self.packed.read(low, high).flatten().view(torch.uint8)
        nibbles = torch.stack((data >> 4, data & 15), 1).flatten()[first - low * item :]
        scales = self.scale[torch.arange(first, last) // self.blocksize]
        values = self.code[nibbles[: last - first].int()] * scales
        return values.to(self.dtype).view(stop - start, *self.shape[1:])


@dataclass
class Merged:
    """A weight plus LoRA, in float32: base + scale * left @ right, DoRA's magnitude last."""

    base: Any
    left: Tensor  # [rows, rank]
    right: Tensor  # [rank, the rest of the shape, flat]
    scale: float
    magnitude: Tensor | None = None  # [rows]
    dtype = torch.float32

    @property
    def name(self):
        return self.base.name

    @property
    def shape(self):
        return self.base.shape

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        rows = self.base.read(start, stop).float()
        rows = rows + (self.left[start:stop] @ self.right).view_as(rows) * self.scale
        if self.magnitude is not None:
            norm = torch.linalg.norm(rows.flatten(1), dim=1)
            factor = self.magnitude[start:stop] / norm
            rows = rows * factor.view(-1, *[1] * (rows.dim() - 1))
        return rows


@dataclass
class View:
    """Some rows of a weight, or what a function makes of all of it."""

    base: Any
    rows: slice | None = None
    make: Callable | None = None

    @property
    def name(self):
        return self.base.name

    @property
    def dtype(self):
        return self.base.dtype

    @functools.cached_property
    def shape(self):
        if self.make is None:
            return (self.rows.stop - self.rows.start, *self.base.shape[1:])
        return tuple(self.make(torch.empty(self.base.shape, device="meta")).shape)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        if self.make is not None:
            return self.make(self.base.read())[start:stop]
        stop = self.shape[0] if stop is None else stop
        return self.base.read(self.rows.start + start, self.rows.start + stop)


def _safetensors(path) -> dict[str, Stored]:
    """The tensors of one file; one line says what is wrong with a file that is cut or corrupt."""
    file = open(path, "rb", buffering=0)  # noqa: SIM115, closed with the last of its tensors
    size = os.fstat(file.fileno()).st_size
    (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
    _need(length <= size - 8, path, f"{size} bytes", "a whole safetensors header")
    header = _parsed(file.read(length), path)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            (start, stop), shape = entry["data_offsets"], tuple(entry["shape"])
            whole = all(type(n) is int and n >= 0 for n in (start, stop, *shape))
            dtype = STORED.get(entry["dtype"])
        except (TypeError, KeyError, ValueError):
            whole = False
        _need(whole, f"{path}: {name}", entry, "dtype, shape and data_offsets")
        known = ", ".join(STORED)
        _need(dtype is not None, f"{path}: {name}", f"dtype {entry['dtype']}", f"one of {known}")
        found = f"{size - 8 - length} bytes of data: the file is cut short"
        _need(stop <= size - 8 - length, f"{path}: {name}", found, f"{stop}")
        need = math.prod(shape) * dtype.itemsize
        _need(stop - start == need, f"{path}: {name}", f"{stop - start} bytes", f"{need}")
        tensors[name] = Stored(file, name, 8 + length + start, dtype, shape)
    return tensors


def _checkpoint(directory, stem="model") -> dict[str, Stored]:
    """The tensors of a checkpoint, sharded or not."""
    index = directory / f"{stem}.safetensors.index.json"
    if index.exists():
        where = _json(index).get("weight_map")
        whole = isinstance(where, dict) and all(isinstance(v, str) for v in where.values())
        _need(whole, index, "no weight_map", "tensor names and their files")
        files = sorted(set(where.values()))
        for name in files:
            _need(
                (directory / name).exists(), directory, f"no {name}", f"each shard of {index.name}"
            )
        tensors = {k: v for name in files for k, v in _safetensors(directory / name).items()}
        absent = sorted(set(where) - set(tensors))
        _need(not absent, index, f"no {', '.join(absent[:3])} in the shards", "every tensor named")
        return tensors
    files = sorted(directory.glob(f"{stem}*.safetensors"))
    others = sorted(p.name for p in directory.glob("*.bin")) or "no weights"
    need = f"{stem}.safetensors, whole or with {index.name}"
    _need(files, directory, others, need)
    _need(len(files) == 1, directory, f"{len(files)} files {stem}*.safetensors", need)
    return _safetensors(files[0])


def _parsed(data, path) -> dict:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: found no JSON ({error}), need a JSON object") from None
    _need(isinstance(found, dict), path, type(found).__name__, "a JSON object")
    return found


def _json(path) -> dict:
    return _parsed(path.read_bytes(), path)


PARTS = re.compile(
    r"(.+)\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)$"
)


def _group(tensors, family) -> dict[str, Any]:
    """Weights by canonical name: the parts of each 4-bit one become one weight."""
    weights, parts = {}, {}
    for name, tensor in tensors.items():
        if match := PARTS.match(name):
            parts.setdefault(match[1] + ".weight", {})[match[2]] = tensor
        else:
            weights[name] = tensor
    for name, found in parts.items():
        ok = name in weights and any(k.startswith("quant_state.") for k in found)
        _need(ok, name, f"only {', '.join(sorted(found))}", "4-bit codes and their quant_state")
        weights[name] = Quantised(name, weights[name], found)
    named = {}
    for name, weight in weights.items():
        target = _canonical(name, family)
        _need(target not in named, target, f"{name} and another of that name", "one")
        named[target] = weight
    return named


# --------------------------------------------------------------------------------------------------
# LoRA


def _canonical(name, family) -> str:
    """The name that transformers 5 gives a tensor in memory, of any that checkpoints have had."""
    name = re.sub(r"^(base_model\.model\.)+", "", name)
    if family == "llava":
        name = re.sub(r"^(model\.)?language_model\.lm_head", "lm_head", name)
        name = re.sub(r"^(model\.)?language_model\.model\.", "model.language_model.", name)
        name = re.sub(r"^(model\.)?vision_tower\.(vision_model\.)?", "model.vision_tower.", name)
        return re.sub(r"^(language_model|multi_modal_projector)\.", r"model.\1.", name)
    name = re.sub(r"^visual\.", "model.visual.", name)
    return re.sub(r"^model\.(layers|embed_tokens|norm)\.", r"model.language_model.\1.", name)


LORA = re.compile(
    r"(.+)\.lora_(?:(A|B)\.(weight|bias)|embedding_(A|B)|(magnitude_vector)(?:\.weight)?)$"
)
UNSUPPORTED = ("fan_in_fan_out", "layer_replication", "use_qalora", "trainable_token_indices")
UNSUPPORTED += ("target_parameters", "alora_invocation_tokens", "arrow_config", "use_bdlora")
UNSUPPORTED += ("kasa_config", "monteclora_config")
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _merge(weights, adapter, config, family, live=False):
    """Replaces by Merged, or by the adapter's own copy, every weight that the adapter touches.

    weights: by canonical name. adapter: name -> weight, as PEFT saves them. config: adapter_config.
    Returns how many were merged and how many replaced.
    """
    kind = config.get("peft_type")
    _need(str(kind).split(".")[-1] == "LORA", "adapter", f"peft_type {kind}", "LORA")
    for option in UNSUPPORTED:
        _need(not config.get(option), "adapter", f"{option}={config.get(option)}", "none")
    start = str(config.get("init_lora_weights")).lower()
    found = f"init_lora_weights={start}, which changes the base"
    _need(
        live or not start.startswith(CHANGES_BASE), "adapter", found, "the live model, or another"
    )
    loras, copies = {}, {}
    for name, weight in adapter.items():
        name = re.sub(r"\.default(?=\.|$)", "", name)
        if match := LORA.match(name):
            part = match[5] or match[2] or f"embedding_{match[4]}"
            part += ".bias" if match[3] == "bias" else ""
            loras.setdefault(match[1], {})[part] = weight
        else:
            copies[re.sub(r"\.(modules_to_save|base_layer|original_module)\.", ".", name)] = weight
    for name, weight in copies.items():
        target = _canonical(name, family)
        if target == "lm_head.weight" and target not in weights:  # tied until now
            weights[target] = weight
        _need(target in weights, f"adapter: {name}", "no such tensor in the model", "its own base")
        shape = tuple(weights[target].shape)
        _need(weight.shape == shape, f"adapter: {name}", f"shape {weight.shape}", f"{shape}")
        dtype = weight.dtype
        _need(dtype.is_floating_point, f"adapter: {name}", dtype, "floating point")
        weights[target] = weight
    for module, parts in loras.items():
        target = _canonical(module + ".weight", family)
        if target == "lm_head.weight" and target not in weights:
            weights[target] = weights["model.language_model.embed_tokens.weight"]
        _need(
            target in weights, f"adapter: {module}", "no such module in the model", "its own base"
        )
        base, embedding = weights[target], "embedding_A" in parts
        names = ("embedding_B", "embedding_A") if embedding else ("B", "A")
        found = f"only {', '.join(sorted(parts))}"
        _need(all(n in parts for n in names), f"adapter: {module}", found, "lora_A and lora_B")
        b, a = (parts[n].read().float() for n in names)
        rank = a.shape[0]
        left, right = (a.T, b.T) if embedding else (b.flatten(1), a.flatten(1))
        fits = left.shape[0] == base.shape[0] and right.shape[1] == math.prod(base.shape[1:])
        fits = fits and left.shape[1] == right.shape[0]
        found = f"LoRA of {tuple(left.shape)} x {tuple(right.shape)}"
        _need(fits, f"adapter: {module}", found, f"one for {tuple(base.shape)}")
        patterns = (config.get("alpha_pattern") or {}).items()
        path = re.sub(r"^(base_model\.model\.)+", "", module)
        match = (v for k, v in patterns if re.match(rf"(.*\.)?({k})$", path))
        alpha = next(match, config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        magnitude = parts.get("magnitude_vector")
        _need(not (embedding and magnitude), f"adapter: {module}", "DoRA of an embedding", "LoRA")
        plain = not config.get("use_dora")
        _need(magnitude or plain, f"adapter: {module}", "no magnitude", "one, by its use_dora")
        magnitude = magnitude and magnitude.read().float().flatten()
        weights[target] = Merged(base, left.contiguous(), right.contiguous(), scale, magnitude)
        if bias := parts.get("B.bias"):
            target = _canonical(module + ".bias", family)
            _need(target in weights, f"adapter: {module}", "LoRA's bias", "a base that has one")
            left = bias.read().float().view(-1, 1)
            weights[target] = Merged(weights[target], left, torch.ones(1, 1), scale)
    return len(loras), len(copies)


# --------------------------------------------------------------------------------------------------
# What is written of each family: tensors and keys

LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TEXT_NAMES = {
    "model.language_model.embed_tokens": "token_embd",
    "model.language_model.norm": "output_norm",
    "lm_head": "output",
    **{f"model.language_model.layers.N.{k}": f"blk.N.{v}" for k, v in LAYER.items()},
}
TOWER = {  # CLIP and SigLIP
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding": "v.patch_embd",
    "embeddings.position_embedding": "v.position_embd",
    "pre_layrnorm": "v.pre_ln",
    "encoder.layers.N.layer_norm1": "v.blk.N.ln1",
    "encoder.layers.N.layer_norm2": "v.blk.N.ln2",
    "encoder.layers.N.self_attn.q_proj": "v.blk.N.attn_q",
    "encoder.layers.N.self_attn.k_proj": "v.blk.N.attn_k",
    "encoder.layers.N.self_attn.v_proj": "v.blk.N.attn_v",
    "encoder.layers.N.self_attn.out_proj": "v.blk.N.attn_out",
    "encoder.layers.N.mlp.fc1": "v.blk.N.ffn_up",
    "encoder.layers.N.mlp.fc2": "v.blk.N.ffn_down",
}
VISUAL = {  # Qwen
    "patch_embed.proj": "v.patch_embd",
    "pos_embed": "v.position_embd",
    "blocks.N.norm1": "v.blk.N.ln1",
    "blocks.N.norm2": "v.blk.N.ln2",
    "blocks.N.attn.qkv": "v.blk.N.attn_qkv",
    "blocks.N.attn.proj": "v.blk.N.attn_out",
    "blocks.N.mlp.fc1": "v.blk.N.ffn_up",
    "blocks.N.mlp.fc2": "v.blk.N.ffn_down",
    "blocks.N.mlp.linear_fc1": "v.blk.N.ffn_up",
    "blocks.N.mlp.linear_fc2": "v.blk.N.ffn_down",
    "blocks.N.mlp.gate_proj": "v.blk.N.ffn_gate",
    "blocks.N.mlp.up_proj": "v.blk.N.ffn_up",
    "blocks.N.mlp.down_proj": "v.blk.N.ffn_down",
    "merger.ln_q": "v.post_ln",
    "merger.norm": "v.post_ln",
    "merger.mlp.0": "mm.0",
    "merger.mlp.2": "mm.2",
    "merger.linear_fc1": "mm.0",
    "merger.linear_fc2": "mm.2",
    "deepstack_merger_list.N.norm": "v.deepstack.N.norm",
    "deepstack_merger_list.N.linear_fc1": "v.deepstack.N.fc1",
    "deepstack_merger_list.N.linear_fc2": "v.deepstack.N.fc2",
}
VISION_NAMES = {
    "model.multi_modal_projector.linear_1": "mm.0",
    "model.multi_modal_projector.linear_2": "mm.2",
    **{f"model.vision_tower.{k}": v for k, v in TOWER.items()},
    **{f"model.visual.{k}": v for k, v in VISUAL.items()},
}


class Plan(NamedTuple):
    text: dict[str, Any]  # GGUF name -> weight
    vision: dict[str, Any]
    left_out: dict[str, str]  # the model's name -> why


def _half_to_pairs(heads, weight):
    """Rows of q or k in the order of llama.cpp's rope for Llama: pairs, where the model has halves."""
    shape = weight.shape
    return weight.view(heads, 2, -1, *shape[1:]).transpose(1, 2).reshape(shape)


def _features(config) -> list[int]:
    """Of LLaVA: the hidden states taken from the tower, counted from its embeddings (0)."""
    layers = config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else list(layers)
    total = config.vision_config.num_hidden_layers
    return [layer % (total + 1) for layer in layers]


def _plan(config, weights) -> Plan:
    """Where each weight (by canonical name) goes. Raises ValueError for one it does not know."""
    text_config, family = config.text_config, config.model_type
    text, vision, left_out = {}, {}, {}
    for name, weight in weights.items():
        stem, suffix = name.rsplit(".", 1)
        if stem.endswith("embeddings") and suffix in ("class_embedding", "position_ids"):
            stem, suffix = name, ""
        number = re.search(r"(?<=layers|blocks|r_list)\.(\d+)\.", stem)
        layer = int(number[1]) if number else 0
        key = stem.replace(number[0], ".N.", 1) if number else stem
        if key in TEXT_NAMES:
            target = TEXT_NAMES[key].replace(".N.", f".{layer}.") + f".{suffix}"
            heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
            part = target.split(".")[-2]
            if TEXT[text_config.model_type] == "llama" and part in heads:
                heads = getattr(text_config, heads[part])
                weight = View(weight, make=functools.partial(_half_to_pairs, heads))
            text[target] = weight
            continue
        if name.endswith(".position_ids") or key.endswith("rotary_emb") or suffix == "inv_freq":
            left_out[name] = "computed by llama.cpp"
            continue
        if ".vision_tower.post_layernorm" in name or ".vision_tower.head." in name:
            left_out[name] = "after the layer that LLaVA takes its features from"
            continue
        _need(key in VISION_NAMES, name, f"a tensor that {FAMILIES[family]} does not have", "none")
        if "vision_tower.encoder.layers" in name and layer >= max(_features(config)):
            left_out[name] = "after the layer that LLaVA takes its features from"
            continue
        target = VISION_NAMES[key] + (f".{suffix}" if suffix else "")
        if target.startswith("v.deepstack"):
            deep = config.vision_config.deepstack_visual_indexes
            _need(layer < len(deep), name, f"it beyond deepstack_visual_indexes {deep}", "one each")
            layer = deep[layer]
        target = target.replace(".N.", f".{layer}.")
        if target == "v.patch_embd.weight" and len(weight.shape) == 5:  # Conv3d: a kernel a frame
            frames = weight.shape[2]
            _need(frames == 2, name, f"a temporal patch of {frames} frames", "2")
            vision[target] = View(weight, make=lambda w: w[:, :, 0])
            vision[f"{target}.1"] = View(weight, make=lambda w: w[:, :, 1])
        elif ".attn_qkv." in target and family != "qwen3_vl":
            rows = weight.shape[0] // 3
            for i, part in enumerate("qkv"):
                piece = View(weight, rows=slice(i * rows, (i + 1) * rows))
                vision[target.replace("attn_qkv", f"attn_{part}")] = piece
        else:
            vision[target] = weight
    if family == "llava":
        for name in ("mm.0.bias", "mm.2.bias"):  # which llama.cpp adds always
            vision.setdefault(name, Live(name, torch.zeros(text_config.hidden_size)))
    return Plan(text, vision, left_out)


def _check(config) -> None:
    """Refuses by name what llama.cpp cannot express, before anything is read."""
    family = config.model_type
    known = ", ".join(f"{k} ({v})" for k, v in FAMILIES.items())
    if family.startswith("llava_next"):
        reason = "llama.cpp lays its tiles one after another and never reads image_newline"
        found = f"{family}, whose grid cannot be expressed ({reason})"
        raise ValueError(f"model_type: found {found}, need one of {known}")
    _need(family in FAMILIES, "model_type", family, f"one of {known}")
    text, vision = config.text_config, config.vision_config
    known, kind = ", ".join(TEXT), text.model_type
    _need(isinstance(kind, str) and kind in TEXT, "text_config.model_type", kind, f"one of {known}")
    _need(text.hidden_act == "silu", "text_config.hidden_act", text.hidden_act, "silu")
    rope = text.rope_parameters or {}
    kind, allowed = rope.get("rope_type", "default"), ("default", "linear", "yarn", "llama3")
    _need(kind in allowed, "rope_type", kind, f"one of {', '.join(allowed)}")
    part = rope.get("partial_rotary_factor", 1.0) or 1.0
    _need(part == 1.0, "partial_rotary_factor", part, "1.0")
    windowed = getattr(text, "use_sliding_window", False) and "sliding_attention" in (
        getattr(text, "layer_types", None) or []
    )
    _need(not windowed, "use_sliding_window", True, "false: llama.cpp has no windows for it")
    biased = text.model_type.startswith("qwen3") and getattr(text, "attention_bias", False)
    _need(not biased, "attention_bias with Qwen3", True, "false: llama.cpp has no such biases")
    if family == "llava":
        towers = {"clip_vision_model": "default", "siglip_vision_model": "full"}
        _need(vision.model_type in towers, "vision tower", vision.model_type, " or ".join(towers))
        strategy, need = config.vision_feature_select_strategy, towers[vision.model_type]
        name = f"vision_feature_select_strategy with {vision.model_type}"
        _need(strategy == need, name, strategy, need)
        act = config.projector_hidden_act
        _need(act == "gelu", "projector_hidden_act", act, "gelu")
        acts = ("quick_gelu", "gelu", "gelu_pytorch_tanh")
        _need(vision.hidden_act in acts, "vision hidden_act", vision.hidden_act, ", ".join(acts))
        layers = _features(config)
        found = f"vision_feature_layer {config.vision_feature_layer}"
        _need(layers == sorted(set(layers)), "config", found, "layers in ascending order")
    else:
        acts = {"qwen2_vl": "quick_gelu", "qwen2_5_vl": "silu", "qwen3_vl": "gelu_pytorch_tanh"}
        act = acts[family]
        _need(vision.hidden_act == act, "vision hidden_act", vision.hidden_act, act)
        merge = vision.spatial_merge_size
        _need(merge == 2, "spatial_merge_size", merge, "2")
    if family == "qwen2_5_vl":
        blocks, window = vision.fullatt_block_indexes, vision.window_size
        _need(window == 112, "vision window_size", window, "112, which llama.cpp has built in")
        step = blocks[0] + 1
        even = all(b == (i + 1) * step - 1 for i, b in enumerate(blocks))
        rest = vision.depth - 1 - blocks[-1]
        found = f"{blocks} of {vision.depth} layers"
        _need(even and rest < step, "fullatt_block_indexes", found, "every n-th layer")
    if family == "qwen3_vl":
        deep, layers = len(vision.deepstack_visual_indexes), text.num_hidden_layers
        found = f"{deep} with {layers} text layers"
        _need(deep < layers, "deepstack_visual_indexes", found, "fewer: llama.cpp aborts")
    else:
        wide = _vision_width(config)
        found = f"as wide as the vision tower's hidden size, {wide[0]}"
        need = "another width: llama.cpp would swap fc1 and fc2"
        _need(wide[0] != wide[1], "vision intermediate size", found, need)


def _vision_width(config) -> tuple[int, int]:
    """A vision tower's (hidden size, intermediate size)."""
    vision = config.vision_config
    if config.model_type == "qwen2_vl":  # its hidden_size is the text model's
        return vision.embed_dim, int(vision.embed_dim * vision.mlp_ratio)
    return vision.hidden_size, vision.intermediate_size


def _head_size(text) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _llama3_factors(rope, size) -> Tensor:
    """What Llama 3.1's rope divides each of its frequencies by, float32 [size / 2]."""
    frequency = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    length, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = length * frequency / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _text_keys(w, config, name, vocabulary) -> list[str]:
    """Writes the text model's keys; returns what a reader of the report should know."""
    text, said = config.text_config, []
    rope, context = text.rope_parameters or {}, text.max_position_embeddings
    heads = text.num_attention_heads
    size = _head_size(text)
    window = getattr(text, "sliding_window", None)
    if text.model_type == "mistral" and window:
        context = min(context, window)
        said.append(f"context_length {context}: llama.cpp has no sliding window for Mistral")
    w.add_name(name)
    w.add_block_count(text.num_hidden_layers)
    w.add_context_length(context)
    w.add_embedding_length(text.hidden_size)
    w.add_feed_forward_length(text.intermediate_size)
    w.add_head_count(heads)
    w.add_head_count_kv(text.num_key_value_heads)
    w.add_key_length(size)
    w.add_value_length(size)
    w.add_rope_dimension_count(size)
    w.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    w.add_layer_norm_rms_eps(text.rms_norm_eps)
    w.add_vocab_size(vocabulary)
    if sections := rope.get("mrope_section"):
        whole = isinstance(sections, list) and all(type(n) is int for n in sections)
        _need(whole, "mrope_section", sections, "whole numbers")
        w.add_rope_dimension_sections([*sections, 0, 0][:4])
    if rope.get("rope_type") in ("linear", "yarn"):
        kind = gguf.RopeScalingType
        w.add_rope_scaling_type(kind.LINEAR if rope["rope_type"] == "linear" else kind.YARN)
        w.add_rope_scaling_factor(float(rope["factor"]))
    if rope.get("rope_type") == "yarn":
        length = rope.get("original_max_position_embeddings") or text.max_position_embeddings
        w.add_rope_scaling_orig_ctx_len(int(length))
        if (value := rope.get("attention_factor")) is not None:
            w.add_rope_scaling_yarn_attn_factor(float(value))
        w.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
        w.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))
    if config.model_type == "qwen3_vl":
        w.add_num_deepstack_layers(len(config.vision_config.deepstack_visual_indexes))
    return said


def _vision_keys(w, config, name, processor) -> None:
    vision, family = config.vision_config, config.model_type
    hidden, wide = _vision_width(config)
    w.add_type(gguf.GGUFType.MMPROJ)
    w.add_name(name)
    w.add_clip_has_vision_encoder(True)
    w.add_vision_projection_dim(config.text_config.hidden_size)
    w.add_vision_patch_size(vision.patch_size)
    w.add_vision_embedding_length(hidden)
    w.add_vision_feed_forward_length(wide)
    w.add_vision_image_mean(processor["image_mean"])
    w.add_vision_image_std(processor["image_std"])
    w.add_vision_head_count(vision.num_attention_heads)
    if family == "llava":
        layers = _features(config)
        w.add_clip_projector_type("mlp")
        w.add_vision_block_count(max(layers))
        w.add_array("clip.vision.feature_layer", layers)
        w.add_vision_image_size(vision.image_size)
        w.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
        if vision.hidden_act != "quick_gelu":
            w.add_vision_use_gelu(True)
        return
    version = family.removeprefix("qwen").removesuffix("_vl").replace("_", ".")
    w.add_clip_projector_type(f"qwen{version}vl_merger")
    w.add_vision_block_count(vision.depth)
    w.add_vision_spatial_merge_size(vision.spatial_merge_size)
    w.add_vision_attention_layernorm_eps(1e-6)  # a constant of all three in transformers
    if family == "qwen3_vl":
        w.add_vision_image_size(math.isqrt(vision.num_position_embeddings) * vision.patch_size)
        w.add_vision_use_gelu(True)
        deep = [i in vision.deepstack_visual_indexes for i in range(vision.depth)]
        w.add_vision_is_deepstack_layers(deep)
        return
    w.add_vision_image_size(560)  # any size will do; llama.cpp wants the key
    if family == "qwen2_5_vl":
        w.add_vision_use_silu(True)
        step = vision.fullatt_block_indexes[0] + 1
        w.add_vision_n_wa_pattern(step if step > 1 else 0)  # 0: no windows; by 1 llama.cpp aborts


def _preprocessor(directory) -> dict:
    """image_mean and image_std of a checkpoint's image processor, as [3] floats."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (directory / name).exists():
            found = _json(directory / name)
            inner = found.get("image_processor")
            found = found | (inner if isinstance(inner, dict) else {})
            if "image_mean" in found and "image_std" in found:
                with contextlib.suppress(TypeError, ValueError):
                    image = {k: [float(x) for x in found[k]] for k in ("image_mean", "image_std")}
                    whole = all(len(v) == 3 and all(map(math.isfinite, v)) for v in image.values())
                    if whole and min(image["image_std"]) > 0:
                        return image
    need = "preprocessor_config.json with image_mean and image_std"
    raise ValueError(f"{directory}: found none, need {need} (the base model has it)")


# --------------------------------------------------------------------------------------------------
# Tokenizer

# What llama.cpp does for each value of tokenizer.ggml.pre that the supported models need: the
# pattern that splits a text into words (as the models' own tokenizer.json has it), and whether a
# word that is a token skips the merges. Compared by what they do to PROBE, see _pre.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = _REST.replace(r"\p{L}\p{N}", r"\p{L}\p{M}\p{N}")
_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ONE = r"[^\r\n\p{L}\p{N}]?"
PRE = {
    "llama-bpe": (rf"{_CONTRACTION}|{_ONE}\p{{L}}+|\p{{N}}{{1,3}}|{_REST}", True),
    "qwen2": (rf"{_CONTRACTION}|{_ONE}\p{{L}}+|\p{{N}}|{_REST}", False),
    "qwen35": (rf"{_CONTRACTION}|{_ONE}[\p{{L}}\p{{M}}]+|\p{{N}}|{_MARKS}", False),
    "tekken": (rf"{_ONE}{_UPPER}*{_LOWER}+|{_ONE}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASH}", True),
    "gpt-2": (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", False),
}
PROBE = (
    "Hello, World! It's we'RE YOU'LL I'd've 1 12 123 1234 12345 3.14 x2y33z camelCase HTTPServer\n"
    "tabs\t\t and  two   three    spaces \n\n newlines \r\n\r\n  (brackets) [x]{y}; a_b --- === ///\n/n"
    " caf\u00e9 cafe\u0301 na\u00efve \u017dlu\u0165 \u043d\u0435\u0449\u043e \u0394\u03b9 \u6211\u60f3\u5728"
    "\u5de5\u4f5c\uff0c\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0939\u093f\u0928\u094d\u0926\u0940 \u0e20\u0e32"
    "\u0e29\u0e32 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0663\u0664\u0665 \u2167 \u00bd \U0001f680 "
    '\U0001f468\u200d\U0001f469 \u00a0nbsp\u3000wide...!!!??? \'tis "quoted" $100 50% a@b.c #tag <b>&amp;\n   '
)


def _pre(spec) -> list[str]:
    """The values of tokenizer.ggml.pre that do to PROBE what a tokenizer.json (spec) does."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    def words(step):
        return [w for w, _ in step.pre_tokenize_str(PROBE)]

    empty = Tokenizer(models.BPE())
    bare = json.loads(empty.to_str()) | {"pre_tokenizer": spec["pre_tokenizer"]}
    mine = words(Tokenizer.from_str(json.dumps(bare)).pre_tokenizer)
    ignores, found = bool(spec["model"].get("ignore_merges")), []
    for name, (pattern, ignore) in PRE.items():
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        if ignore == ignores and words(pre_tokenizers.Sequence([split, level])) == mine:
            found.append(name)
    return found


def _sentencepiece_scores(path) -> dict[str, float]:
    """Scores of the pieces in a sentencepiece tokenizer.model (protobuf: field 1 is a piece, whose
    own fields are 1, its text, and 2, its score as a float32)."""
    data, scores = path.read_bytes(), {}

    def number(at):
        value = shift = 0
        while True:
            byte, at = data[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value, at

    def fields(at, end):
        while at < end:
            key, at = number(at)
            if key & 7 == 2:
                size, at = number(at)
            else:
                size = {1: 8, 5: 4}.get(key & 7) or number(at)[1] - at
            yield key >> 3, at, at + size
            at += size

    try:
        for kind, start, end in fields(0, len(data)):
            if kind == 1:
                parts = {k: data[a:b] for k, a, b in fields(start, end)}
                score = struct.unpack("<f", parts[2])[0] if 2 in parts else 0.0
                scores[parts.get(1, b"").decode()] = score
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: found no sentencepiece model ({error})") from None
    return scores


def _spm_encode(text, scores) -> list[str]:
    """Pieces of a text (spaces already U+2581), joined best score first, as llama.cpp does it."""
    pieces = [*text]
    left, right = [*range(-1, len(pieces) - 1)], [*range(1, len(pieces) + 1)]
    queue = []

    def offer(a, b):
        if a >= 0 and b < len(pieces) and (joined := pieces[a] + pieces[b]) in scores:
            heapq.heappush(queue, (-scores[joined], a, b, joined))

    for i in range(1, len(pieces)):
        offer(i - 1, i)
    while queue:
        _, a, b, joined = heapq.heappop(queue)
        if pieces[a] + pieces[b] != joined or right[a] != b:
            continue
        pieces[a], pieces[b], right[a] = joined, "", right[b]
        if right[a] < len(pieces):
            left[right[a]] = a
        offer(left[a], a)
        offer(a, right[a])
    out = []
    for piece in filter(None, pieces):
        out += [piece] if piece in scores else [f"<0x{b:02X}>" for b in piece.encode()]
    return out


def _tokenizer_keys(w, tokenizer, directory, size, pre=None) -> None:
    """Writes tokens, scores or merges, types, special ids and chat template of a fast tokenizer.

    size: rows of the embedding, which may be more than the tokens. pre: tokenizer.ggml.pre by hand.
    Raises ValueError for a tokenizer of which llama.cpp would make other ids.
    """
    _need(getattr(tokenizer, "is_fast", False), "tokenizer", type(tokenizer).__name__, "a fast one")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model, kind = spec["model"], spec["model"]["type"]
    _need(kind == "BPE", "tokenizer model", kind, "BPE (byte-level or sentencepiece)")
    vocab, added = model["vocab"], {t["id"]: t for t in spec["added_tokens"]}
    tokens = {i: t for t, i in vocab.items()} | {i: t["content"] for i, t in added.items()}
    most = max(tokens) + 1
    _need(most <= size, "tokenizer", f"{most} tokens", f"at most {size}, the embedding's rows")
    level = "ByteLevel" in json.dumps(spec["pre_tokenizer"])
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    kinds, T = [], gguf.TokenType
    for i in range(size):
        token = tokens.get(i)
        if token is None:
            kinds.append(T.UNUSED)
        elif i in added:
            kinds.append(T.CONTROL if added[i]["special"] else T.USER_DEFINED)
        elif not level and token == model.get("unk_token"):
            kinds.append(T.UNKNOWN)
        elif not level and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            kinds.append(T.BYTE)
        else:
            kinds.append(T.NORMAL)
    names = [tokens.get(i, f"[PAD{i}]") for i in range(size)]
    normal = spec["normalizer"]
    if level:
        # NFC (Qwen's) is let through: llama.cpp does not do it, so text that is not NFC gets other ids
        _need(normal in (None, {"type": "NFC"}), "tokenizer normalizer", normal, "none or NFC")
        found = _pre(spec)
        need = "--pre NAME for a value of tokenizer.ggml.pre that you know to be right"
        known = f"a pre-tokenizer that does as none of {', '.join(PRE)} does"
        _need(pre or found, "tokenizer", known, need)
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre(pre or found[0])
        w.add_token_list(names)
        w.add_token_merges([" ".join(m) for m in merges])
    else:
        _need(model.get("byte_fallback"), "tokenizer", "BPE without byte_fallback", "byte_fallback")
        piece = directory and directory / "tokenizer.model"
        if piece and piece.exists():
            scores = _sentencepiece_scores(piece)
        else:  # sentencepiece numbers its pieces in the order of the merges that make them
            scores = {}
            for rank, pair in enumerate(merges):
                scores.setdefault("".join(pair), float(-rank))
        scores = {t: scores.get(t, -1e4 if len(t) == 1 else 0.0) for t in vocab}
        plain = tokenizer("x", add_special_tokens=False).input_ids
        space = tokens[plain[0]].startswith("\u2581")
        special = next((t["content"] for t in added.values() if t["special"]), "")
        after = tokenizer(f"{special}x", add_special_tokens=False).input_ids[1:]
        again = bool(after) and tokens[after[0]].startswith("\u2581")
        text = " ".join(PROBE.split())
        mine = _spm_encode(("\u2581" if space else "") + text.replace(" ", "\u2581"), scores)
        theirs = [tokens[i] for i in tokenizer(text, add_special_tokens=False).input_ids]
        same = mine == theirs and (space == again or not special)
        found = "no space added after a special token, where llama.cpp adds one"
        if mine != theirs:
            found = "pieces that llama.cpp would join otherwise"
        _need(pre or same, "tokenizer", found, "--pre default to write it all the same")
        w.add_tokenizer_model("llama")
        w.add_tokenizer_pre(pre or "default")
        w.add_token_list(names)
        w.add_token_scores([scores.get(t, 0.0) for t in names])
        w.add_add_space_prefix(space)
    w.add_token_types(kinds)
    strips = [t["content"] for t in added.values() if t["lstrip"] or t["rstrip"]]
    found = f"{', '.join(strips[:3])}, which take the spaces beside them"
    _need(pre or not strips, "tokenizer", found, "--pre to write it all the same")
    for name in ("bos", "eos", "unk", "pad"):
        token = getattr(tokenizer, f"{name}_token_id")
        if token is not None:
            _need(0 <= token < most, f"{name}_token_id", token, f"an id below {most}")
            getattr(w, f"add_{name}_token_id")(token)
    ids = tokenizer("x").input_ids
    w.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    w.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    if template := _chat_template(tokenizer, directory):
        w.add_chat_template(template)


def _chat_template(tokenizer, directory=None):
    """A model's chat template, of its tokenizer or (older checkpoints) its processor."""
    if template := getattr(tokenizer, "chat_template", None):
        return template if isinstance(template, str) else template.get("default")
    if directory and (directory / "chat_template.json").exists():
        return _json(directory / "chat_template.json").get("chat_template")
    return None


# --------------------------------------------------------------------------------------------------
# Export


def _stored_as(name, shape, dtype) -> TYPE:
    """The GGML type of one tensor: matrices as asked, all else as llama.cpp's graphs need it."""
    if len(shape) < 2 or name in ("v.position_embd.weight", "v.class_embd"):
        return TYPE.F32
    if name.startswith("v.patch_embd.weight"):  # a convolution: F16 or F32 only
        return TYPE.F16 if dtype == TYPE.F16 else TYPE.F32
    block = gguf.GGML_QUANT_SIZES[dtype][0]
    return dtype if shape[-1] % block == 0 else TYPE.F16


def _mmproj_dtype(dtype) -> str:
    """Of the second file where none is asked for: towers are small, and bits matter more there."""
    return dtype if dtype in ("f32", "f16", "bf16", "q8_0") else "f16"


def _encode(name, rows, dtype) -> np.ndarray:
    """Rows of a weight in a GGML type, as bytes. Raises ValueError where a value does not fit."""
    if rows.dtype in (torch.float16, torch.bfloat16):  # numpy's one thread: the other core writes
        mask = 0x7C00 if rows.dtype == torch.float16 else 0x7F80
        bad = bool((rows.view(torch.int16).numpy() & mask).max(initial=0) == mask)
    else:
        bad = not bool(torch.isfinite(rows).all())
    _need(not bad, name, "NaN or infinity", "finite weights: is the file corrupt?")
    half = {TYPE.F16: torch.float16, TYPE.BF16: torch.bfloat16, TYPE.F32: torch.float32}.get(dtype)
    if half:
        out = rows.to(half)
        fits = torch.finfo(rows.dtype).max <= torch.finfo(half).max
        fits = fits or bool(torch.isfinite(out).all())
        data = (out if half == torch.float32 else out.view(torch.int16)).numpy()
    else:
        with np.errstate(over="ignore"):
            data = gguf.quants.quantize(rows.float().numpy(), dtype)
        scales = data.reshape(-1, gguf.GGML_QUANT_SIZES[dtype][1])
        scales = scales[:, : 4 if dtype.name.endswith("_1") else 2].copy().view(np.float16)
        fits = bool(np.isfinite(scales).all())
    if not fits:
        largest, kind = rows.abs().max().item(), dtype.name.lower()
        need = "at most 65504" if dtype == TYPE.F16 else "less"
        raise ValueError(f"{name}: found {largest:.4g}, need {need} for {kind}: try bf16")
    return data


def _chunks(weight) -> Iterator[Tensor]:
    """A weight's rows, about ELEMENTS elements at a time (all at once where they are permuted)."""
    if not weight.shape:
        yield weight.read().view(1)
        return
    count = weight.shape[0]
    step = max(1, ELEMENTS // max(1, math.prod(weight.shape[1:])))
    if isinstance(weight, View) and weight.make is not None:
        whole = weight.read()
        weight = Live(weight.name, whole)
    for start in range(0, count, step):
        yield weight.read(start, min(count, start + step))


def _ahead(items) -> Iterator:
    """The items of an iterator, the next one made in a thread while this one is used."""
    items = iter(items)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


class _File:
    """One GGUF file to be written, to path.part; whoever has them all renames them."""

    def __init__(self, path, arch, tensors, dtype, file_type):
        self.path, self.part = path, path.with_name(path.name + ".part")
        self.tensors = tensors
        self.types = {n: _stored_as(n, w.shape, dtype) for n, w in tensors.items()}
        self.writer = gguf.GGUFWriter(None, arch)
        self.writer.add_file_type(file_type)
        self.writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        self.sizes = {}
        for name, weight in tensors.items():
            shape, kind = weight.shape or (1,), self.types[name]
            self.sizes[name] = math.prod(gguf.quant_shape_to_byte_shape(shape, kind))
            args = (name, shape, np.dtype(np.float32), self.sizes[name])
            self.writer.add_tensor_info(*args, raw_dtype=kind)

    def write(self, bar) -> None:
        w = self.writer
        w.write_header_to_file(self.part)
        try:
            w.write_kv_data_to_file()
        except (struct.error, UnicodeEncodeError) as error:
            found = f"a value that no key of GGUF holds ({error})"
            raise ValueError(f"{self.path.name}: found {found}, need another") from None
        w.write_ti_data_to_file()
        file = w.fout[0]
        w.write_padding(file, file.tell())
        left = dict(self.sizes)
        for name, data in _ahead(self._encoded()):  # writing is most of the time
            left[name] -= file.write(memoryview(data).cast("B"))
            bar.update(data.nbytes)
            if not left[name]:
                w.write_padding(file, self.sizes[name])
        wrong = [name for name, size in left.items() if size]
        _need(not wrong, self.path.name, f"another size of {wrong[:3]}", "the size announced")
        file.flush()
        os.fsync(file.fileno())
        w.close()

    def _encoded(self) -> Iterator[tuple[str, np.ndarray]]:
        for name, weight in self.tensors.items():
            for rows in _chunks(weight):
                yield name, np.ascontiguousarray(_encode(name, rows, self.types[name]))

    def drop(self) -> None:
        with contextlib.suppress(Exception):  # closing flushes, and the disk may be full
            self.writer.close()
        self.part.unlink(missing_ok=True)


def _local(model) -> Path:
    """A checkpoint's directory: the path given, or a hub id fetched by huggingface_hub."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError as HTTPError

    try:
        kinds = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
        return Path(snapshot_download(str(model), allow_patterns=kinds))
    except (OSError, ValueError, HTTPError) as error:
        reason = type(error).__name__
        found = f"no such directory, and no answer from the hub ({reason})"
        need = "a local directory with a checkpoint"
        raise ValueError(f"{model}: found {found}, need {need}") from None


def _config(directory):
    from transformers import AutoConfig

    _need((directory / "config.json").exists(), directory, "no config.json", "a checkpoint")
    family = _json(directory / "config.json").get("model_type", "nothing")
    try:
        config = AutoConfig.from_pretrained(directory)
    except Exception as error:  # noqa: BLE001 (whatever a wrong field makes transformers raise)
        known = ", ".join(FAMILIES)
        words = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{directory}: found model_type {family} ({words}), need {known}"
        ) from None
    vision = getattr(config, "vision_config", None)
    _need(vision is not None, directory, f"a text model ({family})", "a vision model")
    return config


def _base(model):
    """A model without PEFT's wrapper, if it has one."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _state(model) -> dict[str, Live]:
    """The tensors of a model in memory, LoRA's own left out, by the names they have without it."""
    state = {}
    for key, tensor in model.state_dict().items():
        key = key.replace("_orig_mod.", "")  # of torch.compile
        if not re.search(r"\.lora_|\.modules_to_save\.", key):
            key = re.sub(r"\.(base_layer|original_module)\.", ".", key)
            state[key] = Live(key, tensor)
    return state


def _source(model, adapter, processor, scratch):
    """(config, weights by canonical name, adapter or None, its config, live?, directory of the
    tokenizer's and image processor's files, name) of a directory or a live model."""
    adapter_config, parts, live = None, None, isinstance(model, torch.nn.Module)
    if live:
        base, name = model, "model"
        if hasattr(model, "peft_config"):
            from peft import get_peft_model_state_dict

            _need(adapter is None, "adapter", "one, and a PEFT model with its own", "either")
            active = model.active_adapters
            active = active() if callable(active) else active
            _need(len(active) == 1, "active adapters", active, "one")
            merged = any(getattr(m, "merged", False) for m in model.modules())
            _need(not merged, "adapter", "one that is merged", "model.unmerge_adapter() first")
            base = model.get_base_model()
            state = get_peft_model_state_dict(model, adapter_name=active[0])
            parts = {k.replace("_orig_mod.", ""): Live(k, v) for k, v in state.items()}
            adapter_config = model.peft_config[active[0]].to_dict()
        state = _state(base)
        meta = [k for k, v in state.items() if v.tensor.is_meta]
        _need(not meta, "model", f"{len(meta)} weights on the meta device", "a loaded model")
        config, directory = base.config, scratch
        origin = Path(str(getattr(config, "_name_or_path", "") or ""))
        name = origin.name or config.model_type
        if processor is None:
            _need(origin.is_dir(), "processor", "none", "processor= for a live model")
            directory = origin
    else:
        directory = _local(model)
        config, name = _config(directory), directory.resolve().name
        state = None
    _check(config)  # before gigabytes of headers
    if state is None:
        quant = _json(directory / "config.json").get("quantization_config") or {}
        kind = quant.get("quant_method")
        ok = kind is None or (kind == "bitsandbytes" and quant.get("load_in_4bit"))
        _need(ok, "quantization_config", f"{kind}, not 4-bit bitsandbytes", "bitsandbytes 4-bit")
        state = _checkpoint(directory)
    if adapter is not None:
        adapter = _local(adapter)
        found = (adapter / "adapter_config.json").exists()
        _need(found, adapter, "no adapter_config.json", "a directory that PEFT saved")
        adapter_config = _json(adapter / "adapter_config.json")
        parts = dict(_checkpoint(adapter, "adapter_model"))
    if processor is not None:
        directory = scratch
        processor.save_pretrained(scratch)
    return config, _group(state, config.model_type), parts, adapter_config, live, directory, name


def _expect(config, weights) -> None:
    """Every tensor that transformers has for this config is there, in its shape."""
    from transformers import AutoModelForImageTextToText

    config = copy.deepcopy(config)
    with contextlib.suppress(AttributeError):
        del config.quantization_config
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
    except Exception as error:  # noqa: BLE001 (whatever a wrong field makes transformers raise)
        words = " ".join(f"{type(error).__name__} {error}".split())[:160]
        raise ValueError(f"config: found {words}, need one of which a model can be made") from None
    names = {_canonical(name, config.model_type) for name in model.state_dict()}
    numbered = [n for n in weights if re.search(r"\.\d+\.", n) and not n.endswith("inv_freq")]
    beyond = [n for n in numbered if n not in names]
    _need(not beyond, "checkpoint", f"{beyond[:1]}, which the config's layers lack", "all in them")
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = _canonical(name, config.model_type)
        _need(name in weights, "checkpoint", f"no {name}", f"every tensor of {config.model_type}")
        shape, dtype = tuple(weights[name].shape), weights[name].dtype
        _need(shape == tuple(tensor.shape), name, f"shape {shape}", f"{tuple(tensor.shape)}")
        _need(dtype.is_floating_point, name, dtype, "floating point, or 4-bit with quant_state")


def export_gguf(
    model_or_dir,
    out_dir,
    *,
    processor=None,
    adapter=None,
    dtype: str = "f16",
    mmproj_dtype: str | None = None,
    name: str | None = None,
    pre: str | None = None,
    clip_workaround: bool = False,
    report: Callable[[str], None] | None = None,
) -> tuple[Path, Path]:
    """Writes a vision model as NAME-text-DTYPE.gguf and NAME-mmproj-DTYPE.gguf for llama.cpp.

    model_or_dir: a transformers vision model in memory (also a PEFT model, also 4-bit), or the
        directory (or hub id) of a safetensors checkpoint, 16-bit, 32-bit or bitsandbytes 4-bit.
    processor: of a live model, anything whose save_pretrained writes tokenizer and image processor;
        without it, the files beside the checkpoint that the model was loaded from.
    adapter: directory of a LoRA adapter that PEFT saved; merged in float32.
    dtype: of matrices: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0. Vectors, positions: float32.
    mmproj_dtype: of the second file; dtype, or f16 where that is below 8 bits.
    name, pre: in place of the directory's name, and of the pre-tokenizer id found (tokenizer.ggml.pre).
    clip_workaround: LLaVA with CLIP only: positions in the order in which llama.cpp reads them while
        it puts the class token last (FAULTS). All but the last of a picture's embeddings are then
        those of its second to last patch; with a llama.cpp that is mended they are wrong.
    report: called with lines about the export; print by default.

    Both files appear under their names when both are complete, or not at all.
    Raises ValueError for what cannot be expressed or does not fit together, OSError for the disk.
    """
    from tqdm import tqdm
    from transformers import AutoTokenizer

    say = print if report is None else report
    _need(dtype in DTYPES, "dtype", dtype, f"one of {', '.join(DTYPES)}")
    mmproj_dtype = mmproj_dtype or _mmproj_dtype(dtype)
    _need(mmproj_dtype in DTYPES, "mmproj_dtype", mmproj_dtype, f"one of {', '.join(DTYPES)}")
    out, files = Path(out_dir), []
    _need(not out.is_file(), "out_dir", f"the file {out}", "a directory")
    with tempfile.TemporaryDirectory(prefix="gguf_vision_") as scratch:
        source = _source(model_or_dir, adapter, processor, Path(scratch))
        config, weights, parts, adapter_config, live, directory, found_name = source
        if not config.tie_word_embeddings:
            _need("lm_head.weight" in weights, "checkpoint", "no lm_head.weight", "untied heads")
        _expect(config, weights)
        tied = config.tie_word_embeddings and weights.pop("lm_head.weight", None)
        merged, replaced = 0, 0
        embedding = weights["model.language_model.embed_tokens.weight"]
        if parts is not None:
            merged, replaced = _merge(weights, parts, adapter_config, config.model_type, live)
        changed = weights["model.language_model.embed_tokens.weight"] is not embedding
        if config.tie_word_embeddings and changed:  # the adapter's training left the head alone
            weights.setdefault("lm_head.weight", embedding)
        plan = _plan(config, weights)
        fault = FAULTS["class token last"]
        if clip_workaround:
            clip, need = fault.applies(config), "LLaVA with a CLIP tower"
            _need(clip, "clip_workaround", FAMILIES[config.model_type], need)
            positions = plan.vision["v.position_embd.weight"]
            turn = lambda weight: weight.roll(-1, 0)
            plan.vision["v.position_embd.weight"] = View(positions, make=turn)
        elif fault.applies(config):
            say(f"gguf_vision: llama.cpp {fault.words} ({fault.where}): --clip-workaround helps")
        if tied and "output.weight" not in plan.text:
            plan.left_out["lm_head.weight"] = (
                "tied to token_embd, which llama.cpp uses in its place"
            )
        rope = config.text_config.rope_parameters or {}
        if rope.get("rope_type") == "llama3":
            factors = _llama3_factors(rope, _head_size(config.text_config))
            plan.text["rope_freqs.weight"] = Live("rope_freqs", factors)
        image = _preprocessor(directory)
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory)
            tokenizer("x")  # a wrong length shows only here
        except Exception as error:  # noqa: BLE001 (whatever a broken file makes transformers raise)
            words = " ".join(f"{type(error).__name__} {error}".split())[:160]
            found = f"no tokenizer that loads ({words})"
            raise ValueError(f"{directory}: found {found}, need tokenizer.json") from None
        for end in ("start", "end") if config.model_type != "llava" else ():
            token, need = f"<|vision_{end}|>", getattr(config, f"vision_{end}_token_id")
            found = tokenizer.convert_tokens_to_ids(token)
            _need(found == need, f"tokenizer: {token}", f"id {found}", f"{need}: mtmd writes it")
        name = name or found_name
        try:
            kind, file_type = DTYPES[dtype]
            path = out / f"{name}-text-{dtype.upper()}.gguf"
            arch = TEXT[config.text_config.model_type]
            files.append(_File(path, arch, plan.text, kind, file_type))
            size = weights["model.language_model.embed_tokens.weight"].shape[0]
            for line in _text_keys(files[0].writer, config, name, size):
                say(f"gguf_vision: {line}")
            _tokenizer_keys(files[0].writer, tokenizer, directory, size, pre)
            kind, file_type = DTYPES[mmproj_dtype]
            path = out / f"{name}-mmproj-{mmproj_dtype.upper()}.gguf"
            files.append(_File(path, "clip", plan.vision, kind, file_type))
            _vision_keys(files[1].writer, config, name, image)
            total = sum(sum(f.sizes.values()) for f in files)
            out.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(out).free
            found = f"{free >> 20:,} MiB free"
            _need(free > total, out, found, f"{(total >> 20) + 1:,} MiB for the two files")
            quiet = report is not None or not sys.stderr.isatty()
            options = {"unit": "B", "unit_scale": True, "disable": quiet, "desc": name}
            start = time.perf_counter()
            with tqdm(total=total, **options) as bar:
                for file in files:
                    file.write(bar)
            seconds = time.perf_counter() - start
            for file in files:
                os.replace(file.part, file.path)
        except BaseException as error:
            for file in files:
                file.drop()
            if isinstance(error, OSError) and error.filename is None:
                found = f"{error.strerror or error}: nothing was written"
                raise OSError(f"{out}: found {found}, need a disk that takes both files") from None
            raise
    lora = f", {merged} LoRA modules merged in float32, {replaced} tensors replaced"
    counts = f"{len(plan.text)} + {len(plan.vision)} tensors, {total / GIB:.2f} GiB"
    counts += f" in {seconds:.1f} s ({total / seconds / 1e9:.2f} GB/s)"
    say(f"gguf_vision: wrote {counts}{lora if parts is not None else ''}")
    reasons = {}
    for key, why in plan.left_out.items():
        reasons.setdefault(why, []).append(key)
    for why, keys in reasons.items():
        many = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
        say(f"gguf_vision: left out {keys[0]}{many}: {why}")
    return files[0].path, files[1].path


# --------------------------------------------------------------------------------------------------
# Prompts: chat messages with pictures become a model's inputs, the same for training and the proof


def fit_size(width, height, factor, least, most) -> tuple[int, int]:
    """The size to which to stretch a picture: multiples of factor, from least to most squares of it.

    As Qwen's own resizing and llama.cpp's do it, so that neither changes the result again.
    """
    long, short = max(width, height), min(width, height)
    _need(long <= 200 * short, "picture", f"{width} x {height}", "sides within 200 of each other")
    w, h = (max(1, round(x / factor)) for x in (width, height))
    scale = math.sqrt(width * height) / factor
    if w * h > most:
        beta = scale / math.sqrt(most)
        w, h = (max(1, math.floor(x / beta / factor)) for x in (width, height))
    elif w * h < least:
        beta = math.sqrt(least) / scale
        w, h = (math.ceil(x * beta / factor) for x in (width, height))
    while w * h > most:  # a side of less than one square became one
        w, h = (w - 1, h) if w > h else (w, h - 1)
    return w * factor, h * factor


class Prompts:
    """Renders messages by the chat template, fits the pictures, expands the image tokens.

    messages: [{"role", "content"}], content a string or a list of {"type": "text", "text"} and
    {"type": "image", "image": PIL image or path}. image_max_tokens: of one picture; Qwen's are
    resized to it, LLaVA's always take as many as the tower has patches.
    """

    def __init__(self, config, tokenizer, image_processor, image_max_tokens=None, template=None):
        self.config, self.tokenizer, self.processor = config, tokenizer, image_processor
        self.template = template or _chat_template(tokenizer)
        _need(self.template, "tokenizer", "no chat template", "one")
        self.llava, vision = config.model_type == "llava", config.vision_config
        self.token_id = config.image_token_id
        self.token = tokenizer.convert_ids_to_tokens(self.token_id)
        self.patch = vision.patch_size
        if self.llava:
            self.side = vision.image_size
            tokens = (self.side // self.patch) ** 2
            enough = image_max_tokens is None or image_max_tokens >= tokens
            need = f"at least {tokens}, which every picture takes"
            _need(enough, "image-max-tokens", image_max_tokens, need)
        else:
            self.factor = vision.patch_size * vision.spatial_merge_size
            self.most = min(image_max_tokens or 1280, 4096)
            need = "at least 16: llama.cpp makes smaller pictures larger"
            _need(self.most >= 16, "image-max-tokens", image_max_tokens, need)

    def fit(self, image):
        """A picture as both transformers and llama.cpp take it: RGB, in a size that neither
        changes. Qwen's are stretched to whole patches, LLaVA's made square with a border."""
        from PIL import Image

        image = image if isinstance(image, Image.Image) else Image.open(image)
        image = image.convert("RGB")
        if not self.llava:
            size = fit_size(*image.size, self.factor, 8, self.most)
            return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
        if image.size == (self.side, self.side):
            return image
        scale = np.float32(self.side) / np.float32(max(image.size))
        inner = [min(self.side, math.ceil(np.float32(x) * scale)) for x in image.size]
        square = Image.new("RGB", (self.side, self.side), PAD_COLOUR)
        at = [(self.side - x) // 2 for x in inner]
        for size in (
            (inner[0], image.height),
            inner,
        ):  # Pillow starts with the height if it is more
            image = image.resize(size, Image.Resampling.BICUBIC)
        square.paste(image, at)
        return square

    def render(self, messages, generate=False) -> str:
        listed = lambda c: [{"type": "text", "text": c}] if isinstance(c, str) else c
        messages = [m | {"content": listed(m["content"])} for m in messages]  # LLaVA's wants lists
        options = {"add_generation_prompt": generate, "chat_template": self.template}
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def pictures(self, messages) -> list:
        parts = [c for m in messages if not isinstance(m["content"], str) for c in m["content"]]
        images = [c["image"] for c in parts if c["type"] == "image"]
        return [self.fit(image) for image in images]

    def _spans(self, messages, text) -> list[tuple[int, int]]:
        """Where the assistant's words lie in a rendered conversation, their end token included."""
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start, stop = self.render(messages[:i], True), self.render(messages[: i + 1])
            ok = text.startswith(start) and text.startswith(stop)
            found = "a chat template that renders earlier turns otherwise once later ones follow"
            _need(ok, "tokenizer", found, "one whose prefixes stay")
            spans.append((len(start), len(stop.rstrip("\n"))))
        return spans

    def encode(self, messages, generate=False) -> dict[str, Any]:
        """One conversation: input_ids and labels (lists; labels IGNORE but on the assistant's
        words), and of its pictures, if any, pixel_values and (Qwen) image_grid_thw."""
        text, images = self.render(messages, generate), self.pictures(messages)
        spans, end = self._spans(messages, text), self.tokenizer.eos_token
        if spans and not generate and end and not text.rstrip().endswith(end):
            text = text.rstrip() + end  # LLaVA's template has no end, but a model has to learn it
            spans[-1] = spans[-1][0], len(text)
        begins = self.tokenizer.bos_token or "\0"
        special = not text.startswith(begins)
        row = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        out, counts = {}, []
        if images:
            options = {} if not self.llava else {"do_center_crop": False}
            pixels = self.processor(images=images, do_resize=False, return_tensors="pt", **options)
            out["pixel_values"] = pixels["pixel_values"]
            if self.llava:
                counts = [(self.side // self.patch) ** 2] * len(images)
            else:
                out["image_grid_thw"] = pixels["image_grid_thw"]
                counts = [n // 4 for n in pixels["image_grid_thw"].prod(-1).tolist()]
        ids, labels, counts = [], [], iter(counts)
        for token, (start, stop) in zip(row.input_ids, row.offset_mapping, strict=True):
            if token == self.token_id:
                count = next(counts, 0)
                _need(count, "conversation", f"more {self.token} than pictures", "one for each")
                ids += [token] * count
                labels += [IGNORE] * count
                continue
            spoken = stop > start and any(a <= start and stop <= b for a, b in spans)
            ids.append(token)
            labels.append(token if spoken else IGNORE)
        _need(next(counts, None) is None, "conversation", f"fewer {self.token}", "one a picture")
        return out | {"input_ids": ids, "labels": labels}


class Collator:
    """Batches of conversations, rows with pictures beside rows without, and no dummy pictures.

    Called with rows {"messages": ...}; gives input_ids, attention_mask, labels [rows, longest]
    (int64, padded to the right), pixel_values of all pictures of the batch one after another, and
    for Qwen image_grid_thw [pictures, 3] and mm_token_type_ids.
    """

    def __init__(self, prompts, max_length=None):
        self.prompts, self.max_length = prompts, max_length
        pad = prompts.tokenizer.pad_token_id
        self.pad = prompts.tokenizer.eos_token_id if pad is None else pad

    def __call__(self, rows) -> dict[str, Tensor]:
        rows = [self.prompts.encode(row["messages"]) for row in rows]
        longest = max(len(row["input_ids"]) for row in rows)
        limit = self.max_length
        _need(not limit or longest <= limit, "row", f"{longest} tokens", f"at most {limit}")
        pad = lambda name, value: torch.tensor(
            [row[name] + [value] * (longest - len(row[name])) for row in rows]
        )
        batch = {"input_ids": pad("input_ids", self.pad), "labels": pad("labels", IGNORE)}
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        for name in ("pixel_values", "image_grid_thw"):
            parts = [row[name] for row in rows if name in row]
            if parts:
                batch[name] = torch.cat(parts)
        if not self.prompts.llava:
            image = batch["input_ids"] == self.prompts.token_id
            batch["mm_token_type_ids"] = (image & batch["attention_mask"].bool()).int()
        return batch


def load_prompts(directory, image_max_tokens=None) -> Prompts:
    """Prompts of a checkpoint's directory."""
    from transformers import AutoTokenizer
    from transformers.models.auto import image_processing_auto as auto

    config, tokenizer = _config(directory), AutoTokenizer.from_pretrained(directory)
    # By this name transformers 5.17 does without torchvision
    processor = auto.AutoImageProcessor.from_pretrained(directory, backend="pil")
    template = _chat_template(tokenizer, directory)
    return Prompts(config, tokenizer, processor, image_max_tokens, template)


class _Files:
    """A processor that is a checkpoint's files, as they are."""

    def __init__(self, directory):
        self.directory = directory

    def save_pretrained(self, to):
        for path in self.directory.iterdir():
            if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt"):
                shutil.copy(path, to)


# --------------------------------------------------------------------------------------------------
# Finetune: pictures of shapes and words about them, QLoRA with Trainer

COLOURS = {
    "red": 0xD62728,
    "green": 0x2CA02C,
    "blue": 0x1F77B4,
    "yellow": 0xFFD92F,
    "white": 0xF7F7F7,
}
SHAPES = ("circle", "square", "triangle")


def draw(rng, width, height):
    """A shape of one colour on a ground of another, and the words for it."""
    from PIL import Image, ImageDraw

    rgb = lambda name: tuple(COLOURS[name].to_bytes(3, "big"))
    shape, (ink, ground) = rng.choice(SHAPES), rng.sample(list(COLOURS), 2)
    image = Image.new("RGB", (width, height), rgb(ground))
    size = round(min(width, height) * rng.uniform(0.4, 0.8))
    x, y = rng.randint(0, width - size), rng.randint(0, height - size)
    box, pen = (x, y, x + size, y + size), ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse(box, fill=rgb(ink))
    elif shape == "square":
        pen.rectangle(box, fill=rgb(ink))
    else:
        corners = (x, y + size), (x + size, y + size), (x + size // 2, y)
        pen.polygon(corners, fill=rgb(ink))
    return image, f"a {ink} {shape} on a {ground} ground"


def generated_rows(count, seed=0, size=(112, 448)) -> list[dict]:
    """Conversations: two thirds with one picture, some with two, the rest without any."""
    rng, rows = random.Random(seed), []
    for i in range(count):
        if i % 3 == 2:
            a, b = rng.randint(0, 9), rng.randint(0, 9)
            ask, answer = f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."
            rows.append(
                [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
            )
            continue
        many = 2 if i % 6 == 4 else 1
        drawn = [draw(rng, rng.randint(*size), rng.randint(*size)) for _ in range(many)]
        content = [{"type": "image", "image": image} for image, _ in drawn]
        content.append({"type": "text", "text": "What do you see?"})
        answer = "I see " + " and ".join(words for _, words in drawn) + "."
        spoken = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        rows.append([{"role": "user", "content": content}, spoken])
    return [{"messages": row} for row in rows]


def read_rows(path) -> list[dict]:
    """Rows of a JSON-lines file: {"messages": [...]}; an image is {"type": "image", "image": FILE},
    looked for beside the file."""
    rows, path = [], Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() splits within strings
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: found no text ({error}), need JSON lines in UTF-8") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        messages = _parsed(line, where).get("messages")
        lists = isinstance(messages, list) and messages
        _need(lists, where, f"messages {str(messages)[:80]}", "a list of them")
        for message in messages:
            whole = isinstance(message, dict) and isinstance(message.get("role"), str)
            content = message.get("content") if whole else None
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            need = 'role, and content: words, or a list of {"type": "text" or "image"}'
            for part in parts:
                kind = part.get("type") if isinstance(part, dict) else None
                whole = whole and kind in ("text", "image") and isinstance(part.get(kind), str)
                _need(whole, where, str(message)[:80], need)
                if kind == "image":
                    part["image"] = path.parent / part["image"]
                    _need(part["image"].is_file(), where, f"no file {part['image']}", "the picture")
        rows.append({"messages": messages})
    _need(rows, path, "no rows", "one conversation a line")
    return rows


def lora_targets(model) -> list[str]:
    """Every linear layer that the loss depends on: language model, vision tower, projector."""
    last = max(_features(model.config)) if model.config.model_type == "llava" else math.inf
    names = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name.endswith("lm_head"):
            continue
        layer = re.search(r"vision_tower.*\.layers\.(\d+)\.", name)
        if ".head." in name or (layer and int(layer[1]) >= last):
            continue
        names.append(name)
    return names


def finetune(directory, rows, args, *, image_max_tokens=None, lora_r=16, four_bit=True):
    """QLoRA on the language model, the vision tower and the projector, with Trainer.

    args: TrainingArguments. Returns (PEFT model, Prompts, losses by step). Weights are loaded in
    NF4 with nested scales (or, four_bit=False, as they are) on the GPU, else on the CPU.
    """
    import transformers
    from peft import LoraConfig, get_peft_model

    _need(rows, "rows", "none", "at least one conversation")
    prompts = load_prompts(directory, image_max_tokens)
    gpu = torch.cuda.is_available()
    dtype = torch.float32
    if gpu:
        half = args.fp16 or not (args.bf16 or torch.cuda.get_device_capability() >= (8, 0))
        dtype = torch.float16 if half else torch.bfloat16
    options = {"dtype": dtype, "device_map": {"": 0 if gpu else "cpu"}}
    quant = _json(directory / "config.json").get("quantization_config")
    if four_bit and not quant:
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        nf4 |= {"load_in_4bit": True, "bnb_4bit_compute_dtype": dtype}
        options["quantization_config"] = transformers.BitsAndBytesConfig(**nf4)
    model = transformers.AutoModelForImageTextToText.from_pretrained(directory, **options)
    targets = lora_targets(model)
    lora = LoraConfig(r=lora_r, lora_alpha=2 * lora_r, target_modules=targets)
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    model = get_peft_model(model, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    args.remove_unused_columns, args.label_names = False, ["labels"]
    args._n_gpu = min(args.n_gpu, 1)  # one process trains on one GPU
    if gpu and not (args.bf16 or args.fp16):
        args.bf16, args.fp16 = dtype == torch.bfloat16, dtype == torch.float16
    trainer = transformers.Trainer(model, args, Collator(prompts), rows)
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    trainer.train()
    seconds, peak = time.perf_counter() - start, ""
    if gpu:
        peak = f", peak {torch.cuda.max_memory_allocated() / GIB:.2f} GiB"
    print(f"gguf_vision: {trainer.state.global_step} steps in {seconds:.1f} s{peak}")
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    return model, prompts, losses


# --------------------------------------------------------------------------------------------------
# Proof: the two files in llama.cpp against transformers in float32


@contextlib.contextmanager
def _class_token_last(model, workaround=False):
    """llama.cpp's order in CLIP towers: the class token after the patches, positions and the rows
    taken as if it came first. workaround: with positions that export_gguf put in that order."""
    found = [m for m in model.modules() if type(m).__name__ == "CLIPVisionEmbeddings"]

    def forward(self, pixel_values, **_):
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        classes = self.class_embedding.expand(len(patches), 1, -1)
        positions = self.position_embedding.weight
        positions = positions.roll(-1, 0) if workaround else positions
        return torch.cat((patches, classes), 1) + positions

    with contextlib.ExitStack() as stack:
        for module in found:
            patch = unittest.mock.patch.object
            stack.enter_context(patch(module, "forward", functools.partial(forward, module)))
        yield


@contextlib.contextmanager
def _no_epsilon(model):
    """llama.cpp's RMS norms in the text model of Qwen2-VL and Qwen2.5-VL: epsilon is not read."""
    names = ("Qwen2VLRMSNorm", "Qwen2_5_VLRMSNorm")
    norms = [m for m in _base(model).model.language_model.modules() if type(m).__name__ in names]
    with contextlib.ExitStack() as stack:
        for module in norms:
            stack.enter_context(unittest.mock.patch.object(module, "variance_epsilon", 0.0))
        yield


@contextlib.contextmanager
def _sectors_unturned(model):
    """llama.cpp's interleaved M-RoPE: frequencies past 3 * mrope_section of their axis are turned by
    a fourth position, which is 0, where transformers turns them by the first."""
    base = _base(model)
    rotary = base.model.language_model.rotary_emb
    kept, sections = rotary.inv_freq, base.config.text_config.rope_parameters["mrope_section"]
    index = torch.arange(len(kept))
    covered = index < 3 * torch.tensor(sections)[index % 3]
    rotary.inv_freq = torch.where(covered, kept, 0)
    try:
        yield
    finally:
        rotary.inv_freq = kept


@contextlib.contextmanager
def _float16_steps(model):
    """What ggml does in float16 on a CPU whatever the files hold: the patches and the kernel of the
    convolution, and GELU, looked up in a table (by the tanh formula also where the model has erf)."""
    half = lambda x: x.half().float()

    def gelu(quick, x):
        if quick:
            return half(half(x) * torch.sigmoid(1.702 * half(x)))
        y = half(torch.nn.functional.gelu(half(x), approximate="tanh"))
        return torch.where(x <= -10, 0, torch.where(x >= 10, x, y))

    def convolution(module, x):
        return module._conv_forward(half(x), half(module.weight), module.bias)

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            name, new = type(module).__name__, None
            if "GELU" in name:
                new = functools.partial(gelu, "Quick" in name)
            elif isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
                new = functools.partial(convolution, module)
            if new:
                stack.enter_context(unittest.mock.patch.object(module, "forward", new))
        yield


class Fault(NamedTuple):
    words: str
    where: str  # upstream
    emulate: Callable
    applies: Callable  # to a config


FAULTS = {
    "class token last": Fault(
        "puts CLIP's class token after the patches: each patch gets its neighbour's position, the "
        "first is dropped and the class token's output taken for a patch",
        "ggml-org/llama.cpp#25814",
        _class_token_last,
        lambda c: c.model_type == "llava" and c.vision_config.model_type == "clip_vision_model",
    ),
    "rms epsilon 0": Fault(
        "does not read attention.layer_norm_rms_epsilon of Qwen2-VL and Qwen2.5-VL text models",
        "no issue found; src/models/qwen2vl.cpp, load_arch_hparams",
        _no_epsilon,
        lambda c: c.model_type in ("qwen2_vl", "qwen2_5_vl"),
    ),
    "rope sectors": Fault(
        "turns the lowest frequencies of Qwen3-VL's rope (2 of 64) by a position that is always 0",
        "no issue found; ggml/src/ggml-cpu/ops.cpp, ggml_mrope_cache_init",
        _sectors_unturned,
        lambda c: c.model_type == "qwen3_vl",
    ),
    "float16 steps": Fault(
        "rounds patches, the patch convolution's kernel and GELU to float16 (on CPUs)",
        "by intent; ggml/src/ggml.c, ggml_conv_2d, and ggml-cpu/vec.h, GGML_GELU_FP16",
        _float16_steps,
        lambda c: True,
    ),
}


class LlamaCpp:
    """A text file and an mmproj in llama.cpp's mtmd, float32 KV cache, on the CPU."""

    def __init__(self, text_path, mmproj_path, context=4096):
        import llama_cpp
        from llama_cpp import mtmd_cpp

        self.lib, self.mtmd = llama_cpp, mtmd_cpp
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)
        for setter in (
            llama_cpp.llama_log_set,
            mtmd_cpp.mtmd_log_set,
            mtmd_cpp.mtmd_helper_log_set,
        ):
            setter(self.quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(text_path).encode(), params)
        _need(self.model, text_path, "a file that llama.cpp does not load", "a text model")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = context
        params.n_threads = params.n_threads_batch = THREADS
        params.type_k = params.type_v = 0  # float32
        params.flash_attn_type = 0  # off: it computes in float16
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        _need(self.context, text_path, "no context from llama.cpp", "memory for one")
        params = mtmd_cpp.mtmd_context_params_default()
        params.use_gpu = params.warmup = params.print_timings = False
        params.n_threads, params.flash_attn_type = THREADS, 0
        self.vision = mtmd_cpp.mtmd_init_from_file(str(mmproj_path).encode(), self.model, params)
        _need(self.vision, mmproj_path, "a file that mtmd does not load", "an mmproj")

    def close(self):
        self.mtmd.mtmd_free(self.vision)
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def tokens(self, text, special=True) -> list[int]:
        """Token ids of a text; special: begin-of-sequence as the file says."""
        data = text.encode()
        room = (self.lib.llama_token * (len(data) + 8))()
        vocab = self.lib.llama_model_get_vocab(self.model)
        n = self.lib.llama_tokenize(vocab, data, len(data), room, len(room), special, True)
        return list(room[:n])

    def run(self, prompt, images, special=True):
        """(token ids with -1 at each image token, image embeddings, logits of the next token).

        prompt: text with mtmd's marker where each picture goes. images: PIL images.
        """
        lib, m = self.lib, self.mtmd
        bitmaps = []
        for image in images:
            data = image.convert("RGB").tobytes()
            raw = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
            bitmaps.append(m.mtmd_bitmap_init(image.width, image.height, raw))
        chunks = m.mtmd_input_chunks_init()
        try:
            data = prompt.encode()
            text = m.mtmd_input_text()
            text.text, text.text_len, text.add_special, text.parse_special = (
                *(data, len(data)),
                *(special, True),
            )
            array = (m.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
            code = m.mtmd_tokenize(self.vision, chunks, ctypes.byref(text), array, len(bitmaps))
            _need(code == 0, "mtmd", f"error {code} of mtmd_tokenize", "0")
            ids, embeddings = [], []
            wide = lib.llama_model_n_embd_inp(self.model)
            for i in range(m.mtmd_input_chunks_size(chunks)):
                chunk = m.mtmd_input_chunks_get(chunks, i)
                count = m.mtmd_input_chunk_get_n_tokens(chunk)
                if m.mtmd_input_chunk_get_type(chunk) == 0:
                    size = ctypes.c_size_t()
                    found = m.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(size))
                    ids += list(found[: size.value])
                    continue
                ids += [-1] * count
                code = m.mtmd_encode_chunk(self.vision, chunk)
                _need(code == 0, "mtmd", f"error {code} of mtmd_encode_chunk", "0")
                out = np.ctypeslib.as_array(m.mtmd_get_output_embd(self.vision), (count, wide))
                embeddings.append(torch.from_numpy(out.copy()))
            lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
            past = ctypes.c_int32()
            args = self.vision, self.context, chunks, 0, 0, lib.llama_n_batch(self.context), True
            code = m.mtmd_helper_eval_chunks(*args, ctypes.byref(past))
            _need(code == 0, "mtmd", f"error {code} of mtmd_helper_eval_chunks", "0")
            vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
            logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(self.context, -1), (vocab,))
            return ids, embeddings, torch.from_numpy(logits.copy())
        finally:
            m.mtmd_input_chunks_free(chunks)
            for bitmap in bitmaps:
                m.mtmd_bitmap_free(bitmap)


def _llama_cpp_missing() -> str | None:
    """Why the proof cannot run here: None, or a line with the command to run."""
    try:
        import llama_cpp.mtmd_cpp  # noqa: F401
    except (ImportError, OSError, RuntimeError, FileNotFoundError):
        return f"found no llama.cpp, need CMAKE_ARGS=-DGGML_NATIVE=OFF pip install {LLAMA_CPP}"
    return None


def reference_model(directory, adapter=None, live=None):
    """transformers' own model in float32 on the CPU, LoRA beside it.

    A 4-bit checkpoint is taken as its quant_state says. live: a model in memory, whose weights (of
    the base, where it has LoRA) are taken in place of the checkpoint's.
    """
    import transformers

    kind = transformers.AutoModelForImageTextToText
    if live is not None or _json(directory / "config.json").get("quantization_config"):
        config = _config(directory)
        with contextlib.suppress(AttributeError):
            del config.quantization_config
        model = kind.from_config(config, dtype=torch.float32)
        state = _checkpoint(directory) if live is None else _state(_base(live))
        state = _group(state, config.model_type)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                weight = state.get(_canonical(name, config.model_type))
                if weight is not None:
                    tensor.copy_(weight.read().float())
        model.tie_weights()
    else:
        model = kind.from_pretrained(directory, dtype=torch.float32, device_map={"": "cpu"})
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).float()
    return model.eval()


@torch.no_grad()
def reference_outputs(model, row):
    """(image embeddings, logits of the next token) of one encoded conversation in transformers."""
    base = _base(model)
    inputs = {"input_ids": torch.tensor([row["input_ids"]])}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    embeddings = []
    if "pixel_values" in row:
        inputs["pixel_values"] = row["pixel_values"]
        options = {}
        if "image_grid_thw" in row:
            inputs["image_grid_thw"] = options["image_grid_thw"] = row["image_grid_thw"]
        else:
            config = base.config
            options["vision_feature_layer"] = config.vision_feature_layer
            options["vision_feature_select_strategy"] = config.vision_feature_select_strategy
        out = base.get_image_features(row["pixel_values"], **options)
        embeddings = list(out.pooler_output)
        for deep in getattr(out, "deepstack_features", None) or []:
            if isinstance(deep, Tensor):  # transformers 5.17: of all pictures together
                deep = torch.split(deep, [len(e) for e in embeddings])
            embeddings = [torch.cat(pair, -1) for pair in zip(embeddings, deep, strict=True)]
    if base.config.model_type != "llava":
        image = inputs["input_ids"] == base.config.image_token_id
        inputs["mm_token_type_ids"] = image.int()
    return embeddings, model(**inputs).logits[0, -1]


def _distance(got, want) -> float:
    """Relative L2 distance, in float64."""
    got, want = got.double(), want.double()
    return (torch.linalg.norm(got - want) / torch.linalg.norm(want)).item()


def _operand(x, kind):
    """What llama.cpp makes of a product's input on a CPU: the weight's type, 8 bits for blocks."""
    if kind in (TYPE.F16, TYPE.BF16):
        return x.to(torch.float16 if kind == TYPE.F16 else torch.bfloat16).float()
    blocks = x.unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return (torch.round(blocks / scale.clamp(min=1e-30)) * scale.half().float()).flatten(-2)


def _rounded(model, dtype, mmproj_dtype):
    """A copy of a reference model whose weights went through the dtypes of the two files, and the
    inputs of its linear layers through llama.cpp's."""
    model = copy.deepcopy(model)
    base, kinds = model.merge_and_unload() if hasattr(model, "peft_config") else model, {}
    for name, parameter in base.named_parameters():
        name = _canonical(name, base.config.model_type)
        kind = DTYPES[
            dtype if "language_model" in name or name.startswith("lm_head") else mmproj_dtype
        ]
        target = "v.patch_embd.weight" if parameter.dim() > 2 else ""
        if "position_embedding" in name or "pos_embed" in name:
            target = "v.position_embd.weight"
        kind = _stored_as(target, parameter.shape, kind[0])
        if kind != TYPE.F32:
            data = _encode(name, parameter.data, kind)
            if kind == TYPE.F16:
                data = data.view(np.float16).astype(np.float32)
            elif kind == TYPE.BF16:
                data = torch.from_numpy(data).view(torch.bfloat16).float().numpy()
            else:
                data = gguf.quants.dequantize(data, kind)
            parameter.data = torch.from_numpy(data).view(parameter.shape)
            kinds[parameter] = kind
    for module in base.modules():
        if isinstance(module, torch.nn.Linear) and module.weight in kinds:
            kind = kinds[module.weight]
            module.register_forward_pre_hook(lambda _, x, kind=kind: (_operand(x[0], kind), *x[1:]))
    return base


class Proof(NamedTuple):
    """What one prompt gave: relative L2 distances to transformers as it is, and with all that
    llama.cpp is known to do otherwise (`faults`) put into it; `allowed` is what the dtype explains."""

    ids: bool
    tokens: int
    images: float | None
    logits: float
    images_emulated: float | None
    logits_emulated: float
    allowed: float
    faults: tuple[str, ...]

    @property
    def ok(self):
        far = [(self.images, self.images_emulated), (self.logits, self.logits_emulated)]
        return self.ids and all(min(pair) <= self.allowed for pair in far if pair[0] is not None)


def prove(
    llama, prompts, model, messages, *, rounded=None, images=None, clip_workaround=False
) -> Proof:
    """Runs one conversation (its last turn still to be answered) through both.

    images: what llama.cpp gets, by default the pictures as `Prompts.fit` made them. rounded: the
    model with weights and inputs rounded as in llama.cpp; twice its distance to the model is what
    the dtype explains.
    """
    from llama_cpp import mtmd_cpp

    row = prompts.encode(messages, generate=True)
    text = prompts.render(messages, True)
    marker = mtmd_cpp.mtmd_default_marker().decode()
    place = prompts.token
    if not prompts.llava:  # mtmd adds the two itself
        ends = (getattr(prompts.config, f"vision_{end}_token_id") for end in ("start", "end"))
        start, end = prompts.tokenizer.convert_ids_to_tokens(list(ends))
        place = start + place + end
    special = not text.startswith(prompts.tokenizer.bos_token or "\0")
    images = prompts.pictures(messages) if images is None else images
    ids, embeddings, logits = llama.run(text.replace(place, marker), images, special)
    want = [-1 if i == prompts.token_id else i for i in row["input_ids"]]

    def distances(reference):
        far, next_logits = reference
        pictures = [_distance(a, b) for a, b in zip(embeddings, far, strict=True)]
        return max(pictures, default=None), _distance(logits, next_logits)

    faults = [f for f, fault in FAULTS.items() if fault.applies(prompts.config)]
    own, allowed = reference_outputs(model, row), LIMIT
    if rounded is not None:
        a, b = ([*far, last] for far, last in (own, reference_outputs(rounded, row)))
        allowed += 2 * max(_distance(x, y) for x, y in zip(b, a, strict=True))
    with contextlib.ExitStack() as stack:
        for name in faults:
            turned = {"workaround": True} if clip_workaround and name == "class token last" else {}
            stack.enter_context(FAULTS[name].emulate(model, **turned))
        emulated = distances(reference_outputs(model, row))
    plain = distances(own)
    return Proof(ids == want, len(ids), *plain, *emulated, allowed, tuple(faults))


def verify(
    directory,
    text_path,
    mmproj_path,
    adapter=None,
    dtype="f16",
    *,
    mmproj_dtype=None,
    images=(),
    live=None,
    clip_workaround=False,
    say=print,
) -> bool:
    """Compares the two files in llama.cpp with the checkpoint (and adapter) in transformers.

    Prompts: text alone, each picture given (or drawn: several sizes), and two pictures in one.
    Prints a line for each; returns whether all agree. Needs memory for the model in float32, twice
    where the dtype is not f32.
    """
    prompts = load_prompts(directory)
    rng = random.Random(0)
    sizes = ((448, 448), (336, 560), (616, 252))
    pictures = [prompts.fit(i) for i in images] or [draw(rng, *size)[0] for size in sizes]
    ask = lambda *shown: [
        {
            "role": "user",
            "content": [{"type": "image", "image": i} for i in shown]
            + [{"type": "text", "text": "Describe what you see, 123 words; naïve café?"}],
        }
    ]
    cases = [("text", ask())] + [(f"{i.width}x{i.height}", ask(i)) for i in pictures]
    cases.append(("two pictures", ask(pictures[0], pictures[-1])))
    model, rounded = reference_model(directory, adapter, live), None
    mmproj_dtype = mmproj_dtype or _mmproj_dtype(dtype)
    if (dtype, mmproj_dtype) != ("f32", "f32"):
        rounded = _rounded(model, dtype, mmproj_dtype)
    good = True
    with LlamaCpp(text_path, mmproj_path) as llama:
        for name, messages in cases:
            more = {"rounded": rounded, "clip_workaround": clip_workaround}
            proof = prove(llama, prompts, model, messages, **more)
            good &= proof.ok
            say(f"gguf_vision: {name}: {_figures(proof)}")
            for fault in proof.faults if name == "two pictures" else ():
                what = FAULTS[fault]
                say(f"gguf_vision: llama.cpp {what.words} ({what.where}); emulated above")
    return good


def _figures(proof) -> str:
    words = [f"{proof.tokens} token ids {'equal' if proof.ids else 'DIFFER'}"]
    for name in ROUTES:
        plain, emulated = getattr(proof, name), getattr(proof, f"{name}_emulated")
        if plain is not None:
            words.append(f"{name} {plain:.1e} (emulated {emulated:.1e})")
    verdict = "agrees" if proof.ok else "DISAGREES"
    if proof.ok and max(proof.images or 0, proof.logits) > proof.allowed:
        verdict = "agrees but for llama.cpp's own faults"
    return f"{', '.join(words)}: {verdict} (within {proof.allowed:.1e})"


# --------------------------------------------------------------------------------------------------
# Tests: small models of every family with random weights, tokenizers trained on the spot

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ ' ' if m['role'] == 'user' else eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SPECIAL = {
    "qwen2": [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
        "<image>",
    ],
    "llama-bpe": ["<|begin_of_text|>", "<|eot_id|>", "<image>"],
    "spm": ["<unk>", "<s>", "</s>", "<image>"],
}


@functools.cache
def _backend(kind, size=600):
    """A tokenizers.Tokenizer of one of three kinds: as Qwen2's, Llama 3's or Llama 2's is made."""
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    words = "".join(pydoc_data.topics.topics.values())[:200_000]
    special = SPECIAL[kind]
    if kind == "spm":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        tokenizer.normalizer = normalizers.Sequence(steps)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?<!\u2581)(?=\u2581)"), "isolated")
        more = special[:3] + [f"<0x{b:02X}>" for b in range(256)] + special[3:]
        trainer = trainers.BpeTrainer(
            vocab_size=size + 500, special_tokens=more, show_progress=False
        )
        tokenizer.train_from_iterator(words.splitlines(), trainer)
        spec = json.loads(tokenizer.to_str())
        vocab = spec["model"]["vocab"]
        ranks = {}
        for rank, pair in enumerate(spec["model"]["merges"]):
            ranks.setdefault("".join(pair), rank)
        # As sentencepiece models are converted: every pair of pieces that joins into a piece
        merges = [
            (rank, joined[:i], joined[i:])
            for joined, rank in ranks.items()
            for i in range(1, len(joined))
            if joined[:i] in vocab and joined[i:] in vocab
        ]
        spec["model"]["merges"] = [[a, b] for _, a, b in sorted(merges, key=lambda m: m[0])]
        spec["pre_tokenizer"] = None
        plain = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        keep = [t for t in spec["added_tokens"] if t["content"] in special]
        spec["added_tokens"] = keep
        tokenizer = Tokenizer.from_str(json.dumps(spec))
        tokenizer.decoder = plain
        start = "<s>"
    else:
        pattern, ignore = PRE[kind]
        tokenizer = Tokenizer(models.BPE(ignore_merges=ignore))
        if kind == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size - len(special),
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        tokenizer.train_from_iterator(words.splitlines(), trainer)
        tokenizer.add_special_tokens(special)
        start = "<|begin_of_text|>" if kind == "llama-bpe" else None
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(
            f"{start} $A", f"{start} $A {start} $B", [(start, tokenizer.token_to_id(start))]
        )
    return tokenizer


def _save_tokenizer(kind, directory, template):
    from transformers import PreTrainedTokenizerFast

    names = {
        "qwen2": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "llama-bpe": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        "spm": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    }[kind]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_backend(kind), **names)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return tokenizer


def _tiny_config(family, tokens, decoder="llama", tower="clip_vision_model", wide=1, **more):
    """A small config of a family. tokens: its tokenizer's vocabulary; wide: multiplies the widths."""
    import transformers as t

    size = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    size |= {
        "hidden_size": 64 * wide,
        "intermediate_size": 160 * wide,
        "max_position_embeddings": 2048,
    }
    size |= {"vocab_size": len(tokens) + 8, "bos_token_id": None, "eos_token_id": None}
    size |= {"pad_token_id": None}
    text = more.pop("text", {})
    if family == "llava":
        side = {
            "image_size": 84,
            "patch_size": 14,
            "hidden_size": 48 * wide,
            "num_hidden_layers": 4,
        }
        side |= {"intermediate_size": 112 * wide, "num_attention_heads": 4, "model_type": tower}
        chosen = "default" if tower.startswith("clip") else "full"
        side |= more.pop("vision", {})
        return t.LlavaConfig(
            text_config=size | text | {"model_type": decoder}, vision_config=side,
            image_token_index=tokens["<image>"], vision_feature_select_strategy=chosen,
            image_seq_length=36, tie_word_embeddings=False, **more,
        )  # fmt: skip
    ids = {f"{k}_token_id": tokens[f"<|{v}|>"] for k, v in (
        ("image", "image_pad"), ("video", "video_pad"),
        ("vision_start", "vision_start"), ("vision_end", "vision_end"))}  # fmt: skip
    size["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [2, 3, 3],
    }
    side = {"depth": 4, "num_heads": 4, "hidden_size": 48 * wide, "out_hidden_size": 64 * wide}
    if family == "qwen2_vl":
        side = {"depth": 4, "num_heads": 4, "embed_dim": 48 * wide, "hidden_size": 64 * wide}
        kind = t.Qwen2VLConfig
    elif family == "qwen2_5_vl":
        side |= {"intermediate_size": 112 * wide, "fullatt_block_indexes": [1, 3]}
        kind = t.Qwen2_5_VLConfig
    else:
        side |= {"intermediate_size": 112 * wide, "deepstack_visual_indexes": [0, 2]}
        side |= {"num_position_embeddings": 64}
        size |= {"head_dim": 16 * wide}
        size["rope_parameters"]["mrope_section"] = [4 * wide, 2 * wide, 2 * wide]
        kind = t.Qwen3VLConfig
    if family != "qwen3_vl":
        size["rope_parameters"]["mrope_section"] = [2 * wide, 3 * wide, 3 * wide]
    side |= more.pop("vision", {})
    more = ids | {"tie_word_embeddings": False} | more
    return kind(text_config=size | text, vision_config=side, **more)


@torch.no_grad()
def _randomise(model, seed=0):
    """Weights large enough that a wrong one shows: the library's start is close to the identity."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise * (0.8 / math.sqrt(math.prod(parameter.shape[1:]))))
        elif "norm" in name or "ln_q" in name or "layrnorm" in name:
            parameter.copy_((1.0 if name.endswith("weight") else 0.0) + 0.1 * noise)
        else:
            parameter.copy_(0.1 * noise)
        if "embed_tokens" in name:
            parameter.copy_(0.5 * noise)


def _save(directory, family, kind="spm", dtype=torch.float32, shards=None, **options):
    """Writes a whole checkpoint, as the hub has them; returns the model."""
    import transformers

    directory.mkdir(parents=True, exist_ok=True)
    template = VICUNA if family == "llava" else CHATML
    tokenizer = _save_tokenizer(kind, directory, template)
    config = _tiny_config(family, tokenizer.get_vocab(), **options)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    _randomise(model)
    model.to(dtype).save_pretrained(directory, **({"max_shard_size": shards} if shards else {}))
    siglip = getattr(config.vision_config, "model_type", "").startswith("siglip")
    half = [0.5, 0.5, 0.5]
    clip = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    mean, std = (half, half) if siglip or family == "qwen3_vl" else clip
    saved = {"image_mean": mean, "image_std": std, "do_convert_rgb": True}
    if family == "llava":
        side = config.vision_config.image_size
        square = {"height": side, "width": side}
        saved["image_processor_type"] = "SiglipImageProcessor" if siglip else "CLIPImageProcessor"
        saved |= {"size": square, "crop_size": square}
    else:
        saved |= {"image_processor_type": "Qwen2VLImageProcessor", "merge_size": 2}
        saved |= {"patch_size": config.vision_config.patch_size, "temporal_patch_size": 2}
    (directory / "preprocessor_config.json").write_text(json.dumps(saved))
    return model


def _adapter(directory, model, seed=1, **options):
    """A LoRA adapter for language model, vision tower and projector, with random A and B."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": lora_targets(model), **options})
    model = get_peft_model(copy.deepcopy(model), lora)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return model


CASES = {  # what the tests go through: arguments of _save
    "LLaVA, CLIP, Llama": {"family": "llava"},
    "LLaVA, CLIP, Qwen3": {"family": "llava", "kind": "qwen2", "decoder": "qwen3"},
    "LLaVA, SigLIP, Mistral": {
        "family": "llava", "kind": "llama-bpe", "decoder": "mistral", "tower": "siglip_vision_model"},
    "LLaVA, SigLIP, Qwen2": {
        "family": "llava", "kind": "qwen2", "decoder": "qwen2", "tower": "siglip_vision_model"},
    "Qwen2-VL": {"family": "qwen2_vl", "kind": "qwen2"},
    "Qwen2.5-VL": {"family": "qwen2_5_vl", "kind": "qwen2"},
    "Qwen3-VL": {"family": "qwen3_vl", "kind": "qwen2"},
}  # fmt: skip


# Rows of whole blocks of 64, which bitsandbytes' CPU code wants
WHOLE_BLOCKS = {"wide": 4, "vision": {"hidden_size": 192, "intermediate_size": 448}}


@contextlib.contextmanager
def _work():
    """A directory for a test; transformers' bars and words off, torch and llama.cpp on one thread:
    more would spin while they wait, and take the cores from whatever runs beside."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    module, threads = sys.modules[export_gguf.__module__], torch.get_num_threads()
    torch.set_num_threads(1)
    with (
        unittest.mock.patch.object(module, "THREADS", 1),
        tempfile.TemporaryDirectory(prefix="gguf_vision_test_") as directory,
        warnings.catch_warnings(action="ignore"),
    ):
        try:
            yield Path(directory)
        finally:
            torch.set_num_threads(threads)


def _quiet(*args, **options):
    """export_gguf, and the lines it said."""
    lines = []
    return *export_gguf(*args, report=lines.append, **options), lines


def _read(path):
    """(keys, tensors as float32 or their raw blocks, GGML types) of a GGUF file."""
    reader = gguf.GGUFReader(path)
    keys = {k: f.contents() for k, f in reader.fields.items()}
    tensors = {}
    for t in reader.tensors:
        data = np.array(t.data)
        if t.tensor_type == TYPE.BF16:
            data = torch.from_numpy(data.view(np.int16)).view(torch.bfloat16).float().numpy()
            data = data.reshape([int(n) for n in reversed(t.shape)])
        tensors[t.name] = data
    return keys, tensors, {t.name: t.tensor_type for t in reader.tensors}


def _expected(model) -> dict[str, Tensor]:
    """What the two files should hold, by GGUF name: written apart from the plan, with the names
    of gguf's own table where it has them."""
    config, out = model.config, {}
    family, text = config.model_type, config.text_config
    arch = gguf.MODEL_ARCH[TEXT[text.model_type].upper()]
    table = gguf.get_tensor_name_map(arch, text.num_hidden_layers)
    pictures = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 32)
    for name, tensor in model.state_dict().items():
        stem, suffix = name.rsplit(".", 1)
        if "language_model" in name or name.startswith("lm_head"):
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            old = stem.replace("model.language_model.", "model.")
            if TEXT[text.model_type] == "llama" and re.search(r"\.(q|k)_proj$", stem):
                heads = text.num_attention_heads
                heads = heads if stem.endswith("q_proj") else text.num_key_value_heads
                half = tensor.shape[0] // heads // 2
                rows = [
                    h * 2 * half + p * half + i
                    for h in range(heads)
                    for i in range(half)
                    for p in (0, 1)
                ]
                tensor = tensor[rows]
            out[f"{table.get_name(old)}.{suffix}"] = tensor
            continue
        if "post_layernorm" in name or ".head." in name:
            continue
        if family == "llava":
            layer = re.search(r"encoder\.layers\.(\d+)\.", name)
            if layer and int(layer[1]) >= config.vision_config.num_hidden_layers - 1:
                continue
            if name.endswith("class_embedding"):
                out["v.class_embd"] = tensor
                continue
            if "projector" in name:  # gguf's table has Pixtral's names for these
                out[f"mm.{2 * int(stem[-1]) - 2}.{suffix}"] = tensor
                continue
            old = stem.replace("model.vision_tower.", "vision_tower.vision_model.").replace(
                "model.multi", "multi"
            )
            out[f"{pictures.get_name(old)}.{suffix}"] = tensor
            continue
        old = stem.replace("model.visual.", "visual.")
        if match := re.match(r"visual\.deepstack_merger_list\.(\d+)\.(?:linear_)?(\w+)", old):
            layer = config.vision_config.deepstack_visual_indexes[int(match[1])]
            out[f"v.deepstack.{layer}.{match[2]}.{suffix}"] = tensor
        elif ".patch_embed.proj" in old and suffix == "weight":
            out["v.patch_embd.weight"], out["v.patch_embd.weight.1"] = tensor.unbind(2)
        elif old.endswith("attn.qkv") and family != "qwen3_vl":
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                out[f"{pictures.get_name(old.replace('qkv', part))}.{suffix}"] = rows
        elif "merger" in old:
            ends = {"ln_q": "v.post_ln", "norm": "v.post_ln", "0": "mm.0", "2": "mm.2"}
            ends |= {"linear_fc1": "mm.0", "linear_fc2": "mm.2"}
            out[f"{ends[old.split('.')[-1]]}.{suffix}"] = tensor
        else:
            out[f"{pictures.get_name(old) or 'v.position_embd'}.{suffix}"] = tensor
    return out


def _raises(error, words, call, *args, **options):
    try:
        call(*args, **options)
    except error as found:
        assert words in str(found), f"{words!r} is not in {str(found)!r}"
        return
    raise AssertionError(f"no {error.__name__} with {words!r}")


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


def _right_or_one_line(call, *args, **options):
    """What a call gives, or None after an error that says in one line what was found and needed."""
    try:
        return call(*args, **options)
    except (ValueError, OSError) as error:
        words = str(error)
        assert "found" in words and "need" in words and "\n" not in words, words
        return None


def _check_tensors(paths, want, dtypes, near=False):
    """Files of those two dtypes hold the tensors of _expected, rounded by gguf's own code; near:
    as near as two ways of merging LoRA are in float32."""
    found = {}
    for path, dtype in zip(paths, dtypes, strict=True):
        for tensor in gguf.GGUFReader(path).tensors:
            assert tensor.name not in found, tensor.name
            values, kind = want[tensor.name], DTYPES[dtype][0]
            shape = tuple(values.shape)
            assert tuple(int(n) for n in reversed(tensor.shape)) == (shape or (1,)), tensor.name
            if len(shape) < 2 or tensor.name == "v.position_embd.weight":
                kind = TYPE.F32
            elif tensor.name.startswith("v.patch_embd"):
                kind = TYPE.F16 if kind == TYPE.F16 else TYPE.F32
            elif shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
                kind = TYPE.F16
            assert tensor.tensor_type == kind, (tensor.name, tensor.tensor_type, kind)
            found[tensor.name], values = tensor, values.float().contiguous().numpy()
            if near:
                np.testing.assert_allclose(tensor.data, values, 2e-6, 4e-6, err_msg=tensor.name)
            else:
                same = tensor.data.tobytes() == gguf.quants.quantize(values, kind).tobytes()
                assert same, (tensor.name, kind)
    assert set(found) == set(want), set(found) ^ set(want)


@functools.cache
def _checkpoints():
    """A strategy: arguments of _save for a small checkpoint of any family."""
    from hypothesis import strategies as st

    @st.composite
    def make(draw):
        pick = lambda *options: draw(st.sampled_from(options))
        family, heads, size = pick(*FAMILIES), pick(1, 2, 3, 4), pick(8, 16, 24)
        kind = pick("spm", "llama-bpe", "qwen2") if family == "llava" else "qwen2"
        text = {"num_hidden_layers": pick(1, 2, 3), "num_attention_heads": heads}
        text["num_key_value_heads"] = pick(*(n for n in range(1, heads + 1) if heads % n == 0))
        text |= {"intermediate_size": pick(24, 32, 64, 100), "hidden_size": heads * size}
        text["vocab_size"] = _backend(kind).get_vocab_size() + pick(0, 1, 30)
        options = {"decoder": pick("llama", "mistral", "qwen2", "qwen3")}
        if family == "qwen3_vl" or (family == "llava" and options["decoder"] != "qwen2"):
            text |= {"hidden_size": heads * pick(8, 12, 32), "head_dim": size}
        if family == "llava" and options["decoder"] == "llama":
            text |= {"attention_bias": pick(True, False), "mlp_bias": pick(True, False)}
        many, depth = pick(1, 2, 3), pick(2, 3, 4)
        side = {"hidden_size": many * pick(8, 16), "intermediate_size": pick(20, 64, 100)}
        side["patch_size"] = pick(6, 14)
        if family == "llava":
            options["tower"] = pick("clip_vision_model", "siglip_vision_model")
            side |= {"num_attention_heads": many, "num_hidden_layers": depth}
            side["image_size"] = side["patch_size"] * pick(1, 3)
        else:
            options = {"tie_word_embeddings": pick(True, False)}
            third = 3 * size // 16
            sections = [size // 2 - 2 * third, third, third]
            rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
            text["rope_parameters"] = rope
            side |= {"num_heads": many, "depth": depth, "out_hidden_size": text["hidden_size"]}
            if family == "qwen2_vl":
                side |= {"embed_dim": side["hidden_size"], "hidden_size": text["hidden_size"]}
                del side["out_hidden_size"], side["intermediate_size"]
                side["mlp_ratio"] = pick(2, 4)
            elif family == "qwen2_5_vl":
                step = pick(*range(1, depth + 1))
                side["fullatt_block_indexes"] = [*range(step - 1, depth, step)]
            else:
                deep = draw(st.sets(st.integers(0, depth - 1), min_size=1))
                side |= {"deepstack_visual_indexes": sorted(deep)}
                text["num_hidden_layers"] += len(deep)
                side["num_position_embeddings"] = pick(16, 49)
        options |= {"family": family, "kind": kind, "text": text, "vision": side}
        return options | {"shards": pick(None, "20KB")}

    return make()


def test_fuzz_exports_hold_every_tensor():
    """Any small model in any dtype, from disk and from memory, with and without LoRA."""
    from hypothesis import strategies as st

    module = sys.modules[export_gguf.__module__]

    def check(options, dtype, dtypes, live, lora, rank, flags, part, elements):
        with _work() as work, unittest.mock.patch.object(module, "ELEMENTS", elements):
            base = work / "model"
            model = _save(base, **copy.deepcopy(options), dtype=dtype)
            adapter, want = None, _expected(model)
            if lora:
                dtypes, adapter = ("f32", "f32"), work / "adapter"
                names = lora_targets(model)
                lora = {"r": rank, "lora_alpha": 3, "target_modules": names[part % 4 :: part + 1]}
                model = _adapter(adapter, model, **lora, **flags)
                want = _expected(reference_model(base, adapter).merge_and_unload())
            more = {"dtype": dtypes[0], "mmproj_dtype": dtypes[1]}
            if live:
                paths = _quiet(model, work / "out", processor=_Files(base), **more)[:2]
            else:
                paths = _quiet(base, work / "out", adapter=adapter, **more)[:2]
            _check_tensors(paths, want, dtypes, near=bool(lora))
            keys, text = _read(paths[0])[0], options["text"]
            get = lambda key: keys[f"{keys['general.architecture']}.{key}"]
            assert get("attention.head_count") == text["num_attention_heads"]
            assert get("attention.head_count_kv") == text["num_key_value_heads"]
            assert get("block_count") == text["num_hidden_layers"]
            assert get("feed_forward_length") == text["intermediate_size"]
            size = text.get("head_dim", text["hidden_size"] // text["num_attention_heads"])
            assert get("attention.key_length") == get("attention.value_length") == size
            assert get("rope.dimension_count") == size
            assert len(keys["tokenizer.ggml.tokens"]) == get("vocab_size") == text["vocab_size"]
            assert get("embedding_length") == text["hidden_size"]

    _fuzz(
        check,
        options=_checkpoints(),
        dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
        dtypes=st.tuples(*[st.sampled_from([*DTYPES])] * 2),
        live=st.booleans(),
        lora=st.booleans(),
        rank=st.integers(1, 5),
        flags=st.sampled_from(({}, {"use_rslora": True}, {"use_dora": True})),
        part=st.integers(0, 3),
        elements=st.sampled_from((ELEMENTS, 1000, 1)),
    )


def test_fuzz_rounding():
    """Bits are those of gguf's own code, or the error names what does not fit."""
    from hypothesis import strategies as st

    def check(seed, scale, stored, special):
        rows = torch.randn((3, 64), generator=torch.Generator().manual_seed(seed)).double() * scale
        rows = rows.to(stored)
        if special is not None:
            rows[1, 5] = special
        for kind, _ in DTYPES.values():
            got = _right_or_one_line(_encode, "w", rows, kind)
            with np.errstate(all="ignore"):
                want = gguf.quants.quantize(rows.float().numpy(), kind)
                back = gguf.quants.dequantize(want, kind)
            whole = bool(torch.isfinite(rows).all()) and bool(np.isfinite(back).all())
            assert (got is not None) == whole, (kind, got, back)
            assert got is None or got.tobytes() == want.tobytes(), kind

    _fuzz(
        check,
        seed=st.integers(0, 2**31),
        scale=st.sampled_from((1e-38, 1e-8, 1e-4, 0.02, 1.0, 2e4, 3e5, 1e7, 1e38, 1e300)),
        stored=st.sampled_from((torch.float64, torch.float32, torch.float16, torch.bfloat16)),
        special=st.sampled_from((None, None, 65519.0, 65520.0, 3.4e38, math.inf, math.nan)),
    )


def test_fuzz_broken_checkpoints():
    """A field, byte or name of a checkpoint changed: what transformers makes of it, or one line."""
    from hypothesis import strategies as st
    from safetensors.torch import load_file, save_file

    values = [None, 0, -1, 1, 3, 7, 1.5, 1e300, True, "", "gelu", "x", [], [1], {}, {"a": 1}, [[]]]
    values += [2**40, "\ud800", "auto", "float16", "NaN"]

    def places(node, path=()):
        """Every path into a JSON document."""
        if path:
            yield path
        items = node.items() if isinstance(node, dict) else ()
        items = enumerate(node[:3]) if isinstance(node, list) else items
        for key, value in items:
            yield from places(value, (*path, key))

    def in_json(path, place, value, gone):
        spec = json.loads(path.read_text())
        steps = sorted(places(spec), key=str)
        *steps, last = steps[place % len(steps)]
        node = functools.reduce(lambda at, step: at[step], steps, spec)
        node[last] = value
        if gone:
            del node[last]
        path.write_text(json.dumps(spec))

    def in_bytes(path, place, value, gone):
        data = bytearray(path.read_bytes())
        length = min(len(data), 8 + int.from_bytes(data[:8], "little"))
        data[place % length] = value % 256
        path.write_bytes(data[: place % len(data)] if gone else data)

    def in_tensors(path, place, value, gone):
        state = load_file(path)
        name = sorted(state)[place % len(state)]
        tensor = state.pop(name)
        new = (tensor.half(), tensor.int(), tensor[1:].clone(), tensor[None], tensor * 0.5)
        if not gone:
            state[name if value % 3 else f"{name}.x"] = new[value % len(new)]
        save_file(state, path)

    which = "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"

    def wanted(base, adapter):
        model = reference_model(base, adapter)
        return _expected(model.merge_and_unload() if adapter else model)

    with _work() as work:
        for family, kind in (("qwen3_vl", "qwen2"), ("llava", "spm")):
            small = {"num_hidden_layers": 3, "intermediate_size": 96}
            base = work / family / "model"
            model = _save(base, family, kind, text=small)
            _adapter(work / family / "adapter", model, target_modules=["q_proj", "fc1", "qkv"])

        def check(family, file, place, number, value, gone):
            shutil.rmtree(work / "copy", ignore_errors=True)
            shutil.copytree(work / family, work / "copy")
            path = work / "copy" / file
            if path.suffix == ".json":
                in_json(path, place, value, gone)
            elif number % 2:
                in_tensors(path, place, number, gone)
            else:
                in_bytes(path, place, number, gone)
            base, adapter = work / "copy" / "model", work / "copy" / "adapter"
            adapter = adapter if path.parent == adapter else None
            made = _right_or_one_line(
                _quiet, base, work / "out", adapter=adapter, dtype="f32", name="n"
            )
            if made:
                whole = work / family / "adapter"
                if adapter:  # its tensors say which modules it has; PEFT would skip some
                    spec = json.loads((whole / "adapter_config.json").read_text())
                    changed = json.loads((adapter / "adapter_config.json").read_text())
                    changed |= {k: spec[k] for k in which}
                    (adapter / "adapter_config.json").write_text(json.dumps(changed))
                try:
                    want = wanted(base, adapter)
                except Exception:  # noqa: BLE001 (a field of which only PEFT's training takes note)
                    want = wanted(work / family / "model", adapter and whole)
                _check_tensors(made[:2], want, ("f32", "f32"), near=bool(adapter))
                for written in made[:2]:
                    written.unlink()
            assert not (work / "out").exists() or not list((work / "out").iterdir())

        files = ["model/config.json"] * 4 + ["model/model.safetensors"] * 3
        files += ["model/preprocessor_config.json", "model/tokenizer.json"]
        files += ["model/tokenizer_config.json", "adapter/adapter_config.json"]
        files += ["adapter/adapter_model.safetensors"]
        _fuzz(
            check,
            family=st.sampled_from(("qwen3_vl", "llava")),
            file=st.sampled_from(files),
            place=st.integers(0, 2**31),
            number=st.integers(0, 255),
            value=st.sampled_from(values),
            gone=st.booleans(),
        )


def test_every_tensor_of_every_family_is_written_or_listed():
    for case, options in CASES.items():
        family = options["family"]
        with _work() as work:
            model = _save(work / "model", **options)
            text, mmproj, lines = _quiet(work / "model", work / "out", dtype="f32")
            assert text.name == "model-text-F32.gguf" and mmproj.name == "model-mmproj-F32.gguf"
            want, got, keys = _expected(model), {}, {}
            for path in (text, mmproj):
                more, tensors, _ = _read(path)
                got |= tensors
                keys |= {f"{path.name}:{k}": v for k, v in more.items()}
            assert set(got) == set(want), (case, set(got) ^ set(want))
            for name, tensor in want.items():
                assert got[name].tobytes() == tensor.contiguous().numpy().tobytes(), (case, name)
            left = {
                n
                for n in model.state_dict()
                if re.search(r"post_layernorm|\.head\.|vision_tower\.encoder\.layers\.3\.", n)
            }
            said = [line for line in lines if "left out" in line]
            many = sum(1 + int((re.search(r"and (\d+) more", line) or [0, 0])[1]) for line in said)
            assert many == len(left), (case, said, left)
            saved = json.loads((work / "model" / "preprocessor_config.json").read_text())
            clip, wide = "CLIP" in case, 192 if family == "qwen2_vl" else 112
            kinds = {"llava": "mlp", "qwen2_vl": "qwen2vl_merger"}
            kinds |= {"qwen2_5_vl": "qwen2.5vl_merger", "qwen3_vl": "qwen3vl_merger"}
            values = {"embedding_length": 48, "feed_forward_length": wide, "projection_dim": 64}
            values |= {"block_count": 3 if family == "llava" else 4, "attention.head_count": 4}
            values |= {"image_size": {"llava": 84, "qwen3_vl": 8 * 16}.get(family, 560)}
            values |= {"patch_size": 16 if family == "qwen3_vl" else 14}
            values |= {"attention.layer_norm_epsilon": 1e-5 if clip else 1e-6}
            values |= {k: saved[k] for k in ("image_mean", "image_std")}
            values = {f"{mmproj.name}:clip.vision.{k}": v for k, v in values.items()}
            values |= {f"{mmproj.name}:clip.projector_type": kinds[family]}
            values |= {f"{mmproj.name}:clip.has_vision_encoder": True}
            values |= {f"{mmproj.name}:general.architecture": "clip"}
            values |= {f"{mmproj.name}:general.type": "mmproj"}
            decoder = model.config.text_config
            arch, size = TEXT[decoder.model_type], getattr(decoder, "head_dim", None) or 16
            more = {"block_count": 3, "context_length": 2048, "embedding_length": 64}
            more |= {"feed_forward_length": 160, "vocab_size": decoder.vocab_size}
            more |= {"attention.head_count": 4, "attention.head_count_kv": 2}
            more |= {"rope.freq_base": decoder.rope_parameters["rope_theta"]}
            more |= {"attention.layer_norm_rms_epsilon": decoder.rms_norm_eps}
            more |= {"rope.dimension_count": size, "attention.key_length": size}
            values |= {f"{text.name}:{arch}.{k}": v for k, v in more.items()}
            values |= {f"{text.name}:general.architecture": arch}
            for key, value in values.items():
                same = keys[key] == value or np.array_equal(np.float32(value), keys[key])
                assert same, (case, key, keys[key], value)
            tokens = ("model", "pre", "tokens", "token_type", "eos_token_id")
            assert all(f"{text.name}:tokenizer.ggml.{k}" in keys for k in tokens)
            assert keys[f"{text.name}:tokenizer.chat_template"] == (
                VICUNA if family == "llava" else CHATML
            )
            if family == "qwen3_vl":
                assert keys[f"{text.name}:qwen3vl.n_deepstack_layers"] == 2
                deep = keys[f"{mmproj.name}:clip.vision.is_deepstack_layers"]
                assert list(deep) == [True, False, True, False]


def test_names_of_old_checkpoints():
    renames = {
        "llava": [
            (r"^model\.language_model\.", "language_model.model."),
            (r"^lm_head", "language_model.lm_head"),
            (r"^model\.vision_tower\.", "vision_tower.vision_model."),
            (r"^model\.multi_modal", "multi_modal"),
        ],
        "qwen2_5_vl": [(r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")],
    }
    for family, rules in renames.items():
        with _work() as work:
            from safetensors.torch import save_file

            model = _save(work / "model", family, "spm" if family == "llava" else "qwen2")
            want = [path.read_bytes() for path in _quiet(work / "model", work / "out")[:2]]
            for number, steps in enumerate((rules, [])):  # as the hub has it, as it is in memory
                state = {}
                for name, tensor in model.state_dict().items():
                    for pattern, new in steps:
                        name = re.sub(pattern, new, name)
                    state[name] = tensor.contiguous()
                other = work / f"other{number}"
                shutil.copytree(work / "model", other)
                save_file(state, other / "model.safetensors")
                got = _quiet(other, work / f"out{number}", name="model")[:2]
                assert [path.read_bytes() for path in got] == want


def test_dtypes_round_as_they_should():
    with _work() as work:
        model = _save(work / "model", "qwen2_vl", "qwen2")
        want = _expected(model)
        limits = {"f16": 5e-4, "bf16": 4e-3, "q8_0": 1e-2, "q5_1": 5e-2, "q5_0": 6e-2}
        limits |= {"q4_1": 9e-2, "q4_0": 1.2e-1}
        for dtype, limit in limits.items():
            text, mmproj, _ = _quiet(work / "model", work / "out", dtype=dtype)
            small = dtype.startswith(("q4", "q5"))
            assert f"mmproj-{'F16' if small else dtype.upper()}.gguf" in mmproj.name
            for path in (text, mmproj):
                keys, tensors, types_ = _read(path)
                kind, file_type = DTYPES[dtype if path is text or not small else "f16"]
                assert keys["general.file_type"] == file_type
                for name, data in tensors.items():
                    tensor, found = want[name], types_[name]
                    if tensor.dim() < 2:
                        assert found == TYPE.F32 and np.array_equal(data, tensor.numpy())
                        continue
                    if name.startswith("v.patch_embd"):
                        assert found == (TYPE.F16 if kind == TYPE.F16 else TYPE.F32)
                    else:
                        whole = tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
                        assert found == (kind if whole else TYPE.F16), (name, found)
                    if found not in (TYPE.F32, TYPE.F16, TYPE.BF16):
                        data = gguf.quants.dequantize(data, found)
                    far = _distance(torch.from_numpy(data.astype(np.float32)), tensor)
                    assert far <= limit, (dtype, name, far)
        # Bits: a 16-bit checkpoint goes through unchanged
        for dtype in (torch.float16, torch.bfloat16):
            name = "f16" if dtype == torch.float16 else "bf16"
            _save(work / name, "qwen2_vl", "qwen2", dtype)
            text = _quiet(work / name, work / "out", dtype=name)[0]
            got, half = _read(text)[1], {k: v.to(dtype) for k, v in want.items()}
            for tensor in ("blk.0.ffn_up.weight", "token_embd.weight"):
                assert np.array_equal(got[tensor].astype(np.float32), half[tensor].float().numpy())
        _save(work / "llava", "llava", "spm")
        mmproj = _quiet(work / "llava", work / "out", dtype="q8_0")[1]
        kinds = _read(mmproj)[2]
        assert kinds["v.position_embd.weight"] == kinds["v.class_embd"] == TYPE.F32
    rows = torch.tensor([[1.0, 1e5]])
    _raises(ValueError, "found 1e+05, need at most 65504 for f16", _encode, "w", rows, TYPE.F16)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for value in (math.nan, math.inf, -math.inf):
            rows = torch.tensor([[1.0, value]], dtype=dtype)
            _raises(ValueError, "NaN or infinity", _encode, "w", rows, TYPE.F32)


def _merged_state(work, adapter):
    """The weights that export_gguf wrote of a base and an adapter, f32, by GGUF name."""
    text, mmproj, lines = _quiet(work / "model", work / "out", dtype="f32", adapter=adapter)
    return _read(text)[1] | _read(mmproj)[1], lines


def test_lora_is_merged_as_peft_merges_it():
    adapters = {
        "LoRA": {},
        "rank-stabilised": {"use_rslora": True},
        "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3, "qkv": 5}},
        "DoRA": {"use_dora": True},
        "bias": {"lora_bias": True, "target_modules": ["v_proj", "qkv"]},
        "trained biases": {"bias": "all"},
        "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
        "head": {"target_modules": ["lm_head", "q_proj"]},
        "convolution": {"target_modules": ["patch_embed.proj", "q_proj"]},
        "copies": {"modules_to_save": ["lm_head", "norm1"]},
    }
    for family, kind in (("qwen2_vl", "qwen2"), ("llava", "spm")):
        with _work() as work:
            model = _save(work / "model", family, kind)
            plain = _expected(model)
            for name, options in adapters.items():
                if family == "llava" and name not in ("LoRA", "DoRA"):
                    continue  # the rest is the same code
                peft, adapter = _adapter(work / name, model, **options), work / name
                with torch.no_grad():
                    for key, parameter in peft.named_parameters():
                        if "modules_to_save" in key or (name == "trained biases" and "bias" in key):
                            parameter.add_(0.1)
                peft.save_pretrained(adapter)
                got, lines = _merged_state(work, adapter)
                assert any("merged in float32" in line for line in lines)
                live, _ = _live(work, peft)
                want, changed = _expected(peft.merge_and_unload()), 0
                assert set(got) == set(want) == set(live)
                for key, tensor in want.items():
                    data, msg = torch.from_numpy(got[key]).view_as(tensor), f"{name} {key}"
                    # PEFT adds the same float32 terms; DoRA divides in another order
                    torch.testing.assert_close(data, tensor, rtol=2e-6, atol=2e-6, msg=msg)
                    assert np.array_equal(live[key], got[key]), (name, key)
                    changed += not torch.equal(data, plain[key])
                assert changed >= 3, (name, changed)


def _live(work, model):
    files = _Files(work / "model")
    text, mmproj, lines = _quiet(model, work / "live", dtype="f32", processor=files)
    return _read(text)[1] | _read(mmproj)[1], lines


def test_adapters_that_do_not_fit_are_refused():
    with _work() as work:
        model = _save(work / "model", "qwen2_vl", "qwen2")
        _adapter(work / "adapter", model)
        config = work / "adapter" / "adapter_config.json"
        good = json.loads(config.read_text())
        out = work / "out"
        changes = (
            ({"peft_type": "IA3"}, "found peft_type IA3, need LORA"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa, which changes the base"),
            ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
            ({"kasa_config": {"beta": 1e-4}}, "kasa_config={'beta': 0.0001}"),
            ({"use_dora": True}, "found no magnitude, need one, by its use_dora"),
        )
        for change, words in changes:
            config.write_text(json.dumps(good | change))
            _raises(ValueError, words, export_gguf, work / "model", out, adapter=work / "adapter")
        config.write_text(json.dumps(good))
        other = _save(work / "other", "qwen2_vl", "qwen2", text={"num_hidden_layers": 2})
        words = "no such module in the model"
        _raises(ValueError, words, export_gguf, work / "other", out, adapter=work / "adapter")
        _save(work / "wide", "qwen2_vl", "qwen2", text={"intermediate_size": 192})
        words = "need one for"
        _raises(ValueError, words, export_gguf, work / "wide", out, adapter=work / "adapter")
        _raises(
            ValueError,
            "no adapter_config.json",
            export_gguf,
            other,
            out,
            adapter=work / "model",
            processor=load_prompts(work / "other").processor,
        )
        assert not out.exists() or not list(out.iterdir())


def test_tied_embeddings_and_heads():
    with _work() as work:
        model = _save(work / "model", "qwen2_vl", "qwen2", tie_word_embeddings=True)
        text, _, _ = _quiet(work / "model", work / "out", dtype="f32")
        assert "output.weight" not in _read(text)[1]
        _quiet(model, work / "live", processor=_Files(work / "model"))
        _adapter(work / "adapter", model, target_modules=["lm_head", "q_proj"])
        got, _ = _merged_state(work, work / "adapter")
        embedding = torch.from_numpy(got["token_embd.weight"])
        assert torch.equal(
            embedding, model.state_dict()["model.language_model.embed_tokens.weight"]
        )
        assert not torch.equal(torch.from_numpy(got["output.weight"]), embedding)
        _adapter(work / "adapter2", model, target_modules=["embed_tokens", "q_proj"])
        got, _ = _merged_state(work, work / "adapter2")
        assert torch.equal(torch.from_numpy(got["output.weight"]), embedding)
        assert not torch.equal(torch.from_numpy(got["token_embd.weight"]), embedding)


def _four_bit(seed, shape, blocksize, nested, kind, dtype, storage):
    """(a random weight, its 4-bit codes, its state, the parts a checkpoint has) by bitsandbytes."""
    import bitsandbytes.functional as bnb

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=nested, quant_type=kind
    )
    if packed.numel() % storage.itemsize == 0:  # else bitsandbytes cannot store it so
        packed = packed.flatten().view(storage)[:, None]
    return weight, packed, state, state.as_dict(packed=True)


def _check_four_bit(*case, split=1):
    import bitsandbytes.functional as bnb

    (weight, packed, state, parts), (_, shape, blocksize, nested, *_) = _four_bit(*case), case
    got = Quantised("w", Live("w", packed), {k: Live(k, v) for k, v in parts.items()})
    assert got.shape == shape and got.dtype == weight.dtype
    code, scale = state.code, state.absmax
    if nested:
        scale = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    flat = packed.flatten().view(torch.uint8)
    nibbles = torch.stack((flat >> 4, flat & 15), 1).flatten()[: math.prod(shape)].long()
    want = code[nibbles] * scale.repeat_interleave(blocksize)[: math.prod(shape)]
    whole = got.read()
    assert torch.equal(whole, want.view(shape).to(weight.dtype))
    rows = [got.read(i, min(i + split, shape[0])) for i in range(0, shape[0], split)]
    assert torch.equal(torch.cat(rows), whole)
    near = _distance(whole.float(), weight.float())
    assert near < 0.15 * (blocksize / 64) ** 0.25 or weight.numel() < 256, (shape, near)


def test_four_bit_weights_are_dequantised_by_their_state():
    for number, case in enumerate((
        ((64, 128), 64, True, "nf4", torch.bfloat16, torch.uint8),
        ((96, 80), 64, True, "nf4", torch.float16, torch.uint8),
        ((33, 65), 128, True, "nf4", torch.float32, torch.uint8),
        ((40, 72), 64, False, "nf4", torch.bfloat16, torch.uint8),
        ((48, 64), 64, True, "fp4", torch.float16, torch.uint8),
        ((50, 66), 64, True, "nf4", torch.bfloat16, torch.bfloat16),  # for FSDP
    )):  # fmt: skip
        _check_four_bit(number, *case)


def test_fuzz_four_bit_weights():
    from hypothesis import strategies as st

    dtypes = st.sampled_from((torch.float16, torch.bfloat16, torch.float32))
    _fuzz(
        lambda case, split: _check_four_bit(*case, split=split),
        case=st.tuples(
            st.integers(0, 2**31),
            st.tuples(st.integers(1, 90), st.integers(1, 90)),
            st.sampled_from([2**k for k in range(6, 13)]),
            st.booleans(),
            st.sampled_from(("nf4", "fp4")),
            dtypes,
            st.sampled_from((torch.uint8, torch.bfloat16, torch.float16, torch.float32)),
        ),
        split=st.integers(1, 9),
    )


def test_fuzz_broken_quant_states():
    """A field of the state with another value: its error in one line, or the same weight."""
    from hypothesis import strategies as st

    values = [
        None,
        0,
        -1,
        63,
        128,
        2**40,
        1.5,
        "nf4",
        "float16",
        "int8",
        "Tensor",
        [],
        [8],
        [8, 64],
    ]
    values += [[64, 8], [-8, -64], [8, 65], {}, True]

    def check(field, value, seed):
        _, packed, _, parts = _four_bit(seed, (8, 64), 64, True, "nf4", torch.float16, torch.uint8)
        (key,) = (k for k in parts if k.startswith("quant_state."))
        if field in parts:
            parts[field] = torch.zeros(value if type(value) is int and 0 <= value < 200 else 3)
        elif field == "json":
            parts[key] = torch.tensor([*str(value).encode()], dtype=torch.uint8)
        else:
            state = json.loads(bytes(parts[key].tolist())) | {field: value}
            parts[key] = torch.tensor([*json.dumps(state).encode()], dtype=torch.uint8)
        make = lambda: Quantised("w", Live("w", packed), {k: Live(k, v) for k, v in parts.items()})
        if got := _right_or_one_line(make):
            assert got.read().shape == got.shape and got.read().numel() == 512

    fields = "shape blocksize dtype nested_blocksize nested_offset absmax quant_map nested_absmax"
    names = st.sampled_from([*fields.split(), "nested_quant_map", "json"])
    _fuzz(check, field=names, value=st.sampled_from(values), seed=st.integers(0, 99))


def test_four_bit_checkpoints_and_live_models():
    import transformers
    from peft import LoraConfig, get_peft_model

    for family, kind in (("qwen2_5_vl", "qwen2"), ("llava", "spm")):
        with _work() as work:
            _save(work / "model", family, kind, **WHOLE_BLOCKS)
            nf4 = {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
            }
            quant = transformers.BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=torch.float32)
            load = transformers.AutoModelForImageTextToText.from_pretrained
            model = load(work / "model", quantization_config=quant, device_map={"": "cpu"})
            model.save_pretrained(work / "four")
            for path in (work / "model").iterdir():
                if "safetensors" not in path.name and not (work / "four" / path.name).exists():
                    shutil.copy(path, work / "four")
            text, mmproj, _ = _quiet(work / "four", work / "out", dtype="f32")
            from_disk = _read(text)[1] | _read(mmproj)[1]
            live, _ = _live(work, model)
            assert set(live) == set(from_disk)
            for name, data in live.items():
                assert np.array_equal(data, from_disk[name]), name
            want, four = _expected(reference_model(work / "four")), 0
            for name, data in from_disk.items():
                assert np.array_equal(data, want[name].numpy()), name
            from bitsandbytes.nn import Linear4bit

            names = {id(m.weight): n for n, m in model.named_modules() if isinstance(m, Linear4bit)}
            four = len(names)
            assert four > 20, four
            # With LoRA beside it: the file has quant_state's weight plus the float32 product
            lora = LoraConfig(r=4, target_modules=lora_targets(model))
            peft = get_peft_model(model, lora)
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for name, parameter in peft.named_parameters():
                    if "lora_" in name:
                        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            peft.save_pretrained(work / "adapter")
            got, _ = _live(work, peft)
            merged = reference_model(work / "four", work / "adapter").merge_and_unload()
            for name, tensor in _expected(merged).items():
                data = torch.from_numpy(got[name]).view_as(tensor)
                torch.testing.assert_close(data, tensor, rtol=2e-6, atol=2e-6, msg=name)


def test_weights_are_read_some_rows_at_a_time():
    sizes, read = [], Stored.read

    def watch(self, *args):
        out = read(self, *args)
        sizes.append(out.numel())
        return out

    with _work() as work:
        _save(work / "model", "qwen2_vl", "qwen2", shards="300KB")
        assert (work / "model" / "model.safetensors.index.json").exists()
        want = [path.read_bytes() for path in _quiet(work / "model", work / "out")[:2]]
        module = sys.modules[export_gguf.__module__]
        with (
            unittest.mock.patch.object(Stored, "read", watch),
            unittest.mock.patch.object(module, "ELEMENTS", 1000),
        ):
            got = [path.read_bytes() for path in _quiet(work / "model", work / "out")[:2]]
        assert got == want
        convolution = max(48 * 3 * 2 * 14 * 14, 0)  # whole, for its frames
        assert max(sizes) == convolution and sorted(sizes)[-3] <= 1000, sorted(sizes)[-5:]


def _child(work, code, *argv):
    """A python process that finds this file, its temporary files in work."""
    paths = [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    env |= {"OMP_NUM_THREADS": "1", "TMPDIR": str(work)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], env=env, **pipes)


def test_interruptions_leave_no_half_file():
    import signal

    slow = """
import signal, sys, time, gguf, gguf_vision as g
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
pad, count = gguf.GGUFWriter.write_padding, 0
def late(*args):
    global count
    count += 1
    if count == 50:  # in the second file
        print("HALF", flush=True)
        time.sleep(60)
    return pad(*args)
gguf.GGUFWriter.write_padding = late
sys.exit(g.main(sys.argv[1:]))
"""
    with _work() as work:
        _save(work / "model", "qwen2_vl", "qwen2")
        out = work / "out"
        before = {p: p.read_bytes() for p in (work / "model").iterdir()}
        # A disk that fills up: a limit on file sizes gives the same kind of error
        full = """
import resource, signal, sys, gguf_vision as g
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
sys.exit(g.main(sys.argv[1:]))
"""
        export, ends = (
            ("--export", work / "model", "--out"),
            {signal.SIGINT: 130, signal.SIGKILL: -9},
        )
        with contextlib.ExitStack() as stack:  # side by side: each begins with seconds of imports
            start = lambda code, to: stack.enter_context(_child(work, code, *export, to))
            children = [start(slow, out if how == signal.SIGKILL else work / "int") for how in ends]
            children.append(start(full, work / "full"))
            for (how, code), child in zip(ends.items(), children[:2], strict=True):
                for line in child.stdout:
                    if "HALF" in line:
                        break
                child.send_signal(how)
                rest = child.communicate()[0]
                assert child.returncode == code, (how, child.returncode, rest)
                assert "Traceback" not in rest, rest
                assert how == signal.SIGKILL or rest.count("gguf_vision: interrupted") == 1, rest
            said = children[2].communicate()[0]
        assert children[2].returncode == 2 and "nothing was written" in said, said
        assert "Traceback" not in said
        assert not list((work / "int").iterdir()) and not list((work / "full").iterdir())
        assert not list(out.glob("*.gguf")) and list(out.iterdir()), list(out.iterdir())
        text, mmproj, _ = _quiet(work / "model", out)  # over what SIGKILL left
        assert sorted(out.iterdir()) == sorted((text, mmproj))
        good = {p: p.read_bytes() for p in out.iterdir()}
        assert {p: p.read_bytes() for p in (work / "model").iterdir()} == before
        usage = types.SimpleNamespace(free=1000)
        with unittest.mock.patch.object(shutil, "disk_usage", lambda _: usage):
            _raises(ValueError, "MiB for the two files", _quiet, work / "model", out)
        assert {p: p.read_bytes() for p in out.iterdir()} == good


def test_checkpoints_that_are_broken():
    from safetensors.torch import load_file, save_file

    with _work() as work:
        _save(work / "model", "qwen2_vl", "qwen2", shards="300KB")
        shards = sorted((work / "model").glob("*.safetensors"))
        assert len(shards) > 2

        def broken(change, words):
            copied = work / "copy"
            shutil.rmtree(copied, ignore_errors=True)
            shutil.copytree(work / "model", copied)
            change(copied)
            _raises(ValueError, words, _quiet, copied, work / "out")
            assert not (work / "out").exists() or not list((work / "out").iterdir())

        second = shards[1].name
        cut = lambda d, n: os.truncate(d / second, n)
        size = shards[1].stat().st_size
        broken(lambda d: cut(d, size - 100), f"{second}: ")
        broken(lambda d: cut(d, size - 100), "the file is cut short")
        broken(lambda d: cut(d, 20), "a whole safetensors header")
        broken(lambda d: cut(d, 0), "a whole safetensors header")
        broken(lambda d: (d / second).unlink(), f"no {second}")
        broken(lambda d: (d / second).write_bytes(struct.pack("<Q", 8) + b"notjson!"), "no JSON")
        broken(lambda d: (d / "config.json").write_text("{"), "no JSON")
        broken(lambda d: (d / "config.json").unlink(), "no config.json")
        broken(lambda d: (d / "preprocessor_config.json").unlink(), "need preprocessor_config.json")
        broken(lambda d: (d / "tokenizer.json").unlink(), "no tokenizer")

        def bits(d):  # an infinity in the middle of a shard
            with open(d / second, "r+b") as file:
                file.seek(-4, 2)
                file.write(struct.pack("<f", math.inf))

        broken(bits, "NaN or infinity")

        def numbers(d):
            state = load_file(d / second)
            save_file({k: t.int() for k, t in state.items()}, d / second)

        broken(numbers, "found torch.int32, need floating point")

        def only_bin(d):
            for path in (*d.glob("*.safetensors"), d / "model.safetensors.index.json"):
                path.unlink()
            (d / "pytorch_model.bin").write_bytes(b"x")

        broken(only_bin, "found ['pytorch_model.bin'], need model.safetensors")

        def edit(**changes):
            def change(d):
                config = json.loads((d / "config.json").read_text())
                for key, value in changes.items():
                    at, *path = key.split("__")
                    if path:
                        config[at][path[0]] = value
                    else:
                        config[at] = value
                (d / "config.json").write_text(json.dumps(config))

            return change

        more = {"text_config__num_hidden_layers": 4}
        broken(edit(**more), "`num_hidden_layers` (4)")
        more["text_config__layer_types"] = ["full_attention"] * 4
        broken(edit(**more), "no model.language_model.layers.3")
        more["text_config__num_hidden_layers"] = 2
        more["text_config__layer_types"] = ["full_attention"] * 2
        broken(edit(**more), "which the config's layers lack")
        broken(edit(vision_config__depth=3), "which the config's layers lack")
        broken(edit(text_config__intermediate_size=161), "shape (160, 64), need (161, 64)")
        broken(edit(text_config__hidden_act="gelu"), "found gelu, need silu")
        broken(edit(vision_config__hidden_act="gelu"), "found gelu, need quick_gelu")
        broken(edit(model_type="llava_next"), "whose grid cannot be expressed")
        broken(edit(model_type="idefics3"), "need one of llava (LLaVA 1.5")
        text = {"model_type": "llama", "hidden_size": 64}
        write = lambda d: (d / "config.json").write_text(json.dumps(text))
        broken(write, "a text model (llama), need a vision model")
        broken(edit(model_type="nonesuch"), "found model_type nonesuch")
        broken(edit(quantization_config={"quant_method": "gptq"}), "gptq, not 4-bit bitsandbytes")
        scaled = {
            "rope_type": "dynamic",
            "factor": 2.0,
            "rope_theta": 1e6,
            "mrope_section": [2, 3, 3],
        }
        broken(edit(text_config__rope_parameters=scaled), "rope_type: found dynamic")
        words = "need a local directory"
        with unittest.mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}):
            _raises(ValueError, words, _quiet, work / "nowhere", work / "out")
        _raises(
            ValueError,
            "dtype: found q3_k, need one of f32",
            _quiet,
            work / "model",
            work,
            dtype="q3_k",
        )
    for options, words in (
        ({"vision_feature_select_strategy": "full"}, "found full, need default"),
        ({"projector_hidden_act": "relu"}, "found relu, need gelu"),
        ({"vision_feature_layer": [3, 1]}, "layers in ascending order"),
        ({"decoder": "qwen3", "text": {"attention_bias": True}}, "attention_bias with Qwen3"),
        ({"vision": {"intermediate_size": 48}}, "would swap fc1 and fc2"),
    ):
        if "vision_feature_select_strategy" in options:
            config = _tiny_config("llava", _backend("spm").get_vocab())
            config.vision_feature_select_strategy = "full"
        else:
            config = _tiny_config("llava", _backend("spm").get_vocab(), **options)
        _raises(ValueError, words, _check, config)
    for family, options, words in (
        ("qwen2_5_vl", {"vision": {"fullatt_block_indexes": [0, 3]}}, "need every n-th layer"),
        ("qwen3_vl", {"text": {"num_hidden_layers": 2}}, "found 2 with 2 text layers, need fewer"),
    ):
        config = _tiny_config(family, _backend("qwen2").get_vocab(), **options)
        _raises(ValueError, words, _check, config)


def test_tensors_that_are_not_known():
    """A tensor beyond those of the family stops the export; position ids of old files do not."""
    from safetensors.torch import load_file, save_file

    with _work() as work:
        _save(work / "model", "llava", "spm")
        path = work / "model" / "model.safetensors"
        state = load_file(path)
        save_file(state | {"vision_tower.adapter.weight": torch.ones(2, 2)}, path)
        words = "model.vision_tower.adapter.weight: found a tensor that LLaVA 1.5"
        _raises(ValueError, words, _quiet, work / "model", work / "out")
        old = {"vision_tower.vision_model.embeddings.position_ids": torch.arange(37)[None]}
        old["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        save_file(state | old, path)
        lines = _quiet(work / "model", work / "out")[2]
        assert any("and 1 more: computed by llama.cpp" in line for line in lines), lines


def test_rope_scaling_of_text_models():
    """Factors and keys against transformers' own frequencies."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    llama3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
    llama3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 256}
    vocab = _backend("llama-bpe").get_vocab()
    config = _tiny_config("llava", vocab, text={"rope_parameters": llama3, "head_dim": 32})
    text = config.text_config
    got, _ = ROPE_INIT_FUNCTIONS["llama3"](text, "cpu")
    plain = 1.0 / 5e5 ** (torch.arange(0, 32, 2).float() / 32)
    torch.testing.assert_close(plain / _llama3_factors(text.rope_parameters, 32), got)
    with _work() as work:
        _save(work / "model", "llava", "llama-bpe", text={"rope_parameters": llama3})
        text, _, _ = _quiet(work / "model", work / "out")
        assert "rope_freqs.weight" in _read(text)[1]
        yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
        yarn |= {"original_max_position_embeddings": 512}
        _save(work / "yarn", "llava", "llama-bpe", text={"rope_parameters": yarn})
        keys = _read(_quiet(work / "yarn", work / "out")[0])[0]
        assert keys["llama.rope.scaling.type"] == "yarn" and keys["llama.rope.scaling.factor"] == 4
        assert keys["llama.rope.scaling.original_context_length"] == 512
        betas = [keys[f"llama.rope.scaling.yarn_beta_{end}"] for end in ("fast", "slow")]
        assert betas == [32, 1]  # transformers' defaults
        window = {"decoder": "mistral", "text": {"sliding_window": 512}}
        _save(work / "window", "llava", "llama-bpe", **window)
        text, _, lines = _quiet(work / "window", work / "out")
        assert _read(text)[0]["llama.context_length"] == 512
        assert any("no sliding window for Mistral" in line for line in lines), lines
        line = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
        _save(work / "linear", "llava", "llama-bpe", text={"rope_parameters": line})
        keys = _read(_quiet(work / "linear", work / "out")[0])[0]
        assert (
            keys["llama.rope.scaling.type"] == "linear" and keys["llama.rope.scaling.factor"] == 2
        )
        if _llama_cpp_missing() is None:
            for kind in ("model", "yarn", "linear"):
                text, mmproj, _ = _quiet(work / kind, work / "proof", dtype="f32")
                lines = []
                assert verify(work / kind, text, mmproj, dtype="f32", say=lines.append), lines


def _keys_of(work, kind, tokenizer=None, **options):
    """The tokenizer keys that are written for a tokenizer."""
    from transformers import PreTrainedTokenizerFast

    if tokenizer is None:
        tokenizer = _save_tokenizer(kind, work, CHATML)
    elif not hasattr(tokenizer, "backend_tokenizer"):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    writer = gguf.GGUFWriter(None, "llama")
    _tokenizer_keys(writer, tokenizer, work, len(tokenizer) + 3, **options)
    writer.add_tensor_info("t", (1,), np.dtype(np.float32), 4)
    path = work / "keys.gguf"
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_tensor_data(np.zeros(1, np.float32))
    writer.close()
    return _read(path)[0], tokenizer


def test_tokenizers_are_known_by_what_they_do():
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    T = gguf.TokenType
    for kind, pre in (("qwen2", "qwen2"), ("llama-bpe", "llama-bpe"), ("spm", "default")):
        with _work() as work:
            keys, tokenizer = _keys_of(work, kind)
            get = lambda k, keys=keys: keys[f"tokenizer.ggml.{k}"]
            assert get("pre") == pre and get("model") == ("llama" if kind == "spm" else "gpt2")
            tokens, kinds = get("tokens"), get("token_type")
            assert len(tokens) == len(kinds) == len(tokenizer) + 3
            for i in range(len(tokenizer)):
                assert tokens[i] == tokenizer.convert_ids_to_tokens(i)
            assert kinds[-3:] == [T.UNUSED] * 3
            for token in SPECIAL[kind]:
                want = T.UNKNOWN if token == "<unk>" else T.CONTROL
                assert kinds[tokens.index(token)] in (want, T.CONTROL), token
            assert get("add_bos_token") == (kind != "qwen2")
            assert get("eos_token_id") == tokenizer.eos_token_id
            if kind == "spm":
                assert sum(k == T.BYTE for k in kinds) == 256
                scores = get("scores")
                assert get("add_space_prefix") is True and len(scores) == len(tokens)
    # Every pattern is told from every other, also where only a use of merges differs
    for name, (pattern, ignore) in PRE.items():
        tokenizer = Tokenizer.from_str(_backend("qwen2").to_str())
        spec = json.loads(tokenizer.to_str())
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
        spec = json.loads(tokenizer.to_str())
        spec["model"]["ignore_merges"] = ignore
        assert _pre(spec) == [name], (name, _pre(spec))
        spec["model"]["ignore_merges"] = not ignore
        assert name not in _pre(spec)
    with _work() as work:
        other = Tokenizer.from_str(_backend("qwen2").to_str())
        split = pre_tokenizers.Split(Regex(PRE["llama-bpe"][0].replace("1,3", "1,2")), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        other.pre_tokenizer = pre_tokenizers.Sequence([split, level])
        _raises(ValueError, "need --pre NAME", _keys_of, work, "", other)
        keys, _ = _keys_of(work, "", other, pre="qwen2")
        assert keys["tokenizer.ggml.pre"] == "qwen2"
        from tokenizers import models, normalizers

        lower = Tokenizer.from_str(_backend("qwen2").to_str())
        lower.normalizer = normalizers.Lowercase()
        _raises(ValueError, "tokenizer normalizer", _keys_of, work, "", lower)
        from tokenizers import AddedToken

        strips = Tokenizer.from_str(_backend("qwen2").to_str())
        strips.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
        _raises(ValueError, "<mask>, which take the spaces beside them", _keys_of, work, "", strips)
        plain = Tokenizer.from_str(_backend("qwen2").to_str())
        plain.add_tokens(["<plain>"])
        keys, _ = _keys_of(work, "", plain)
        at = keys["tokenizer.ggml.tokens"].index("<plain>")
        assert keys["tokenizer.ggml.token_type"][at] == T.USER_DEFINED
        unigram = Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], unk_id=0))
        _raises(ValueError, "found Unigram, need BPE", _keys_of, work, "", unigram)
        # sentencepiece: pieces that no merge makes, but llama.cpp would; a space only at the start
        spec = json.loads(_backend("spm").to_str())
        spec["model"]["merges"] = spec["model"]["merges"][::2]
        wrong = Tokenizer.from_str(json.dumps(spec))
        _raises(ValueError, "pieces that llama.cpp would join otherwise", _keys_of, work, "", wrong)
        first = Tokenizer.from_str(_backend("spm").to_str())
        first.normalizer = None
        first.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", "first", split=False)
        _raises(ValueError, "no space added after a special token", _keys_of, work, "", first)
    with _work() as work:
        _save(work / "model", "qwen2_vl", "qwen2")
        backend = Tokenizer.from_str(_backend("qwen2").to_str())
        backend.add_tokens([f"word{i}" for i in range(20)])  # more than the embedding has rows
        backend.save(str(work / "model" / "tokenizer.json"))
        _raises(ValueError, "the embedding's rows", _quiet, work / "model", work / "out")


def test_sentencepiece_model_files():
    """Scores from tokenizer.model's protobuf, which win over the order of the merges."""

    def number(n):
        out = b""
        while n > 127:
            out, n = out + bytes([n & 127 | 128]), n >> 7
        return out + bytes([n])

    def piece(text, score, kind):
        body = b"\x0a" + number(len(text.encode())) + text.encode()
        body += b"\x15" + struct.pack("<f", score) + b"\x18" + number(kind)
        return b"\x0a" + number(len(body)) + body

    with _work() as work:
        tokenizer = _save_tokenizer("spm", work, VICUNA)
        merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        ranks = {}
        for rank, pair in enumerate(merges):
            ranks.setdefault("".join(pair), -float(rank) - 0.5)
        data = piece("<unk>", 0.0, 2) + b"\x12\x02\x08\x01"  # then a field of another kind
        for token in tokenizer.get_vocab():
            data += piece(token, ranks.get(token, -1e4), 1)
        (work / "tokenizer.model").write_bytes(data)
        keys, _ = _keys_of(work, "spm")
        tokens, scores = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"]
        assert all(scores[tokens.index(t)] == s for t, s in ranks.items())
        (work / "tokenizer.model").write_bytes(b"\x0a\xff\xff\xff")
        _raises(ValueError, "no sentencepiece model", _keys_of, work, "spm")


def _need_llama_cpp():
    if why := _llama_cpp_missing():
        raise unittest.SkipTest(why)


def test_llama_cpp_gives_the_same_token_ids():
    _need_llama_cpp()
    rng = random.Random(0)
    alphabet = [
        *"abcdefgXYZ 0123456789 .,!?'-\n\t",
        "é",
        "ж",
        "我",
        "\U0001f680",
        "ß",
        "  ",
        "'s",
        "\r\n",
    ]
    texts = [PROBE, " ".join(PROBE.split()), "", " ", "x"]
    texts += ["".join(rng.choices(alphabet, k=rng.randint(1, 80))) for _ in range(300)]
    words = "".join(pydoc_data.topics.topics.values())
    texts += [words[i : i + 400] for i in range(0, 40_000, 4_000)]
    for kind, family in (("qwen2", "qwen2_vl"), ("llama-bpe", "llava"), ("spm", "llava")):
        with _work() as work:
            from transformers import AutoTokenizer

            _save(work / "model", family, kind)
            text, mmproj, _ = _quiet(work / "model", work / "out")
            tokenizer = AutoTokenizer.from_pretrained(work / "model")
            with LlamaCpp(text, mmproj) as llama:
                if kind == "qwen2":  # llama.cpp does not do Qwen's NFC
                    assert llama.tokens("cafe\u0301") != tokenizer("cafe\u0301").input_ids
                    texts = [unicodedata.normalize("NFC", t) for t in texts]
                for sample in texts + [f"{t}{s}{t}" for t in texts[:40] for s in SPECIAL[kind]]:
                    want = tokenizer(sample).input_ids
                    got = llama.tokens(sample)
                    assert got == want, (kind, sample, got, want)


def _proofs(
    options, dtype="f32", sizes=((224, 224), (112, 280), (308, 168)), adapter=False, alone=True
):
    """Proofs of one model (arguments of _save): two pictures in one prompt; alone: also text without
    pictures, and each size of picture."""
    with _work() as work:
        model = _save(work / "model", **options)
        lora = None
        if adapter:
            lora = work / "adapter"
            _adapter(lora, model)
        text, mmproj, _ = _quiet(work / "model", work / "out", adapter=lora, dtype=dtype)
        prompts, reference = load_prompts(work / "model"), reference_model(work / "model", lora)
        rounded = None if dtype == "f32" else _rounded(reference, dtype, _mmproj_dtype(dtype))
        rng = random.Random(5)
        drawn = [draw(rng, *size)[0] for size in sizes]
        ask = lambda *shown: [{"role": "user", "content": [
            *({"type": "image", "image": i} for i in shown),
            {"type": "text", "text": "What's this, 12345 times? naïve"}]}]  # fmt: skip
        given = {"text": ask()} | {f"{i.width}x{i.height}": ask(i) for i in drawn} if alone else {}
        given["two pictures"] = ask(drawn[0], drawn[-1])
        proofs = {}
        with LlamaCpp(text, mmproj) as llama:
            for name, messages in given.items():
                raw = None
                if prompts.llava:  # as the user has them: mtmd makes them square as `fit` does
                    raw = [p["image"] for p in messages[0]["content"] if p["type"] == "image"]
                proofs[name] = prove(
                    llama, prompts, reference, messages, rounded=rounded, images=raw
                )
        return proofs


@functools.cache
def _float32_proofs(case, adapter):
    """Computed once, for two tests and the timings."""
    return _proofs(CASES[case], adapter=adapter)


def test_llama_cpp_agrees_in_float32():
    _need_llama_cpp()
    for case, adapter in itertools.product(CASES, (False, True)):
        for name, proof in _float32_proofs(case, adapter).items():
            what = case, adapter, name, proof
            assert proof.ok and proof.allowed == 2e-3, what
            if proof.faults == ("float16 steps",):  # not only where it is emulated
                assert max(proof.images or 0, proof.logits) <= 2e-3, what
            assert max(proof.images_emulated or 0, proof.logits_emulated) < 5e-4, what


def test_fuzz_llama_cpp_agrees():
    """Any small model: the other heads, widths and depths that the named cases do not have."""
    _need_llama_cpp()
    from hypothesis import strategies as st

    def check(options, adapter, sizes):
        (proof,) = _proofs(copy.deepcopy(options), "f32", sizes, adapter, alone=False).values()
        assert proof.ok, proof

    sizes = st.tuples(*[st.tuples(*[st.integers(28, 140)] * 2)] * 2)
    _fuzz(check, options=_checkpoints(), adapter=st.booleans(), sizes=sizes)


def test_llama_cpp_agrees_in_the_other_dtypes():
    _need_llama_cpp()
    picks = ("LLaVA, SigLIP, Qwen2", "Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "LLaVA, CLIP, Llama")
    dtypes = ("f16", "bf16", "q8_0", "q5_0", "q4_0", "q5_1", "q4_1")
    for number, dtype in enumerate(dtypes):
        for case in picks if dtype in ("f16", "q8_0") else picks[number % 5 :][:1]:
            wide = CASES[case] | {"wide": 2}
            (proof,) = _proofs(wide, dtype, ((112, 280), (84, 84)), True, alone=False).values()
            assert proof.ok, (case, dtype, proof)


def test_a_wrong_tensor_is_seen():
    """The proof can fail: one tensor halved, two swapped, or a key changed must show."""
    _need_llama_cpp()

    def half(plan, vision):
        name = "blk.1.attn_v.weight" if not vision else "v.blk.1.ffn_down.weight"
        where = plan.vision if vision else plan.text
        where[name] = View(where[name], make=lambda w: w * 0.5)

    def swap(plan, vision):
        where = plan.vision if vision else plan.text
        a, b = (
            ("v.blk.0.ln1.bias", "v.blk.0.ln2.bias")
            if vision
            else ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight")
        )
        where[a], where[b] = where[b], where[a]

    module, plain = sys.modules[export_gguf.__module__], _plan
    for change in (half, swap):
        for vision in (False, True):

            def wrong(config, weights, change=change, vision=vision):
                plan = plain(config, weights)
                change(plan, vision)
                return plan

            with unittest.mock.patch.object(module, "_plan", wrong):
                proofs = _proofs(CASES["Qwen3-VL"], sizes=((224, 224),))
            assert not proofs["224x224"].ok, (change, vision, proofs)
            assert proofs["text"].ok == vision, (change, vision, proofs)
    with unittest.mock.patch.object(
        module, "_features", lambda c: [c.vision_config.num_hidden_layers]
    ):
        assert not _proofs(CASES["LLaVA, SigLIP, Qwen2"], sizes=((84, 84),))["84x84"].ok


def test_clip_workaround():
    """With it llama.cpp gives transformers' own embeddings of all patches but the first."""
    _need_llama_cpp()
    with _work() as work:
        _save(work / "model", "llava", "spm")
        text, mmproj, lines = _quiet(
            work / "model", work / "out", dtype="f32", clip_workaround=True
        )
        assert not any("#25814" in line for line in lines)
        assert any("#25814" in line for line in _quiet(work / "model", work / "plain")[2])
        prompts, model = load_prompts(work / "model"), reference_model(work / "model")
        image, _ = draw(random.Random(0), 84, 84)
        row = [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]
        row = [{"role": "user", "content": row}]
        with LlamaCpp(text, mmproj) as llama:
            (got,) = llama.run("USER: <__media__>\nWhat? ASSISTANT:", [image])[1]
            proof = prove(llama, prompts, model, row, clip_workaround=True)
        (want,), _ = reference_outputs(model, prompts.encode(row, generate=True))
        assert _distance(got[:-1], want[1:]) < 2e-3 and _distance(got, want) > 0.1
        assert proof.ok, proof
        _save(work / "other", "qwen2_vl", "qwen2")
        words = "clip_workaround: found Qwen2-VL, need LLaVA with a CLIP tower"
        _raises(ValueError, words, _quiet, work / "other", work / "out", clip_workaround=True)


def test_features_of_other_layers():
    """vision_feature_layer: the last, one in the middle, several side by side."""
    _need_llama_cpp()
    for layers in (-1, 2, [1, 3], [-3, -1]):
        fresh = {"vision_feature_layer": layers}
        for case in ("LLaVA, SigLIP, Qwen2", "LLaVA, CLIP, Llama"):
            for name, proof in _proofs(CASES[case] | fresh, sizes=((84, 84),)).items():
                assert proof.ok, (case, layers, name, proof)


def test_a_tower_without_windows():
    """Qwen2.5-VL with full attention in every layer."""
    _need_llama_cpp()
    options = CASES["Qwen2.5-VL"] | {"vision": {"fullatt_block_indexes": [0, 1, 2, 3]}}
    (proof,) = _proofs(options, sizes=((224, 224), (84, 140)), alone=False).values()
    assert proof.ok, proof


def test_llama_cpp_still_has_its_faults():
    """Goes red when llama.cpp mends one: then FAULTS, the README and this test lose it."""
    _need_llama_cpp()
    for case, fault, which, gap in (
        ("LLaVA, CLIP, Llama", "class token last", "224x224", 100),
        ("Qwen2-VL", "rms epsilon 0", "text", 5),
        ("Qwen2.5-VL", "rms epsilon 0", "text", 5),
        ("Qwen3-VL", "rope sectors", "text", 5),
        ("LLaVA, SigLIP, Qwen2", "float16 steps", "224x224", 5),
    ):
        proof = _float32_proofs(case, False)[which]
        assert proof.faults == (fault, "float16 steps")[fault == "float16 steps" :]
        assert proof.logits > gap * proof.logits_emulated, f"llama.cpp has mended {fault}: {proof}"
        if which != "text":
            assert proof.images > gap * proof.images_emulated, (
                f"llama.cpp has mended {fault}: {proof}"
            )


def _check_fit(width, height, factor, most):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    if max(width, height) > 200 * min(width, height):
        return _raises(ValueError, "within 200", fit_size, width, height, factor, 8, most)
    w, h = fit_size(width, height, factor, 4, most)
    assert w % factor == h % factor == 0 and w * h <= most * factor**2, (width, height, w, h)
    assert fit_size(w, h, factor, 4, most) == (w, h)
    if most >= 16:  # as `Prompts` asks for it: within llama.cpp's own limits
        fitted = fit_size(width, height, factor, 8, most)
        assert 8 <= math.prod(fitted) // factor**2 <= most, (width, height, fitted)
        assert fit_size(*fitted, factor, 8, most) == fitted
    if min(width, height) < factor or most < 16:
        return None
    limits = {"min_pixels": 4 * factor**2, "max_pixels": most * factor**2}
    want = smart_resize(height, width, factor, **limits)
    if math.prod(want) <= most * factor**2:
        assert (h, w) == want, (width, height, factor, most)


def test_pictures_are_fitted_as_qwen_fits_them():
    rng = random.Random(0)
    for _ in range(3000):
        factor, most = rng.choice((28, 32)), rng.choice((8, 16, 64, 256, 1280, 4096))
        _check_fit(rng.randint(1, 3000), rng.randint(1, 3000), factor, most)


def test_fuzz_pictures():
    from hypothesis import strategies as st

    sides, factors = st.integers(1, 20_000), st.sampled_from((8, 14, 28, 32))
    _fuzz(_check_fit, width=sides, height=sides, factor=factors, most=st.integers(8, 4096))


def test_fuzz_conversations():
    """Any mix of words and pictures: labels are the spoken words, and a batch is its rows, padded."""
    from hypothesis import strategies as st
    from PIL import Image

    words = st.text(st.characters(codec="ascii", exclude_characters="<|>"), min_size=1, max_size=30)
    words = words.filter(lambda text: text == text.strip())
    sizes = st.tuples(st.integers(1, 150), st.integers(1, 150))
    sizes = sizes.filter(lambda size: max(size) <= 200 * min(size))
    turn = st.tuples(words, st.lists(sizes, max_size=2), words)

    def check(rows, family):
        prompts, messages, spoken, shown = known[family], [], [], []
        for turns in rows:
            messages.append([])
            spoken.append([])
            for ask, pictures, answer in turns:
                parts = [{"type": "image", "image": Image.new("RGB", size)} for size in pictures]
                parts.append({"type": "text", "text": ask})
                messages[-1] += [{"role": "user", "content": parts}]
                messages[-1] += [{"role": "assistant", "content": answer}]
                spoken[-1].append(answer)
                shown += parts[:-1]
        batch = Collator(prompts)([{"messages": m} for m in messages])
        tokenizer, at = prompts.tokenizer, 0
        for i, row in enumerate(messages):
            one, long = prompts.encode(row), int(batch["attention_mask"][i].sum())
            assert one["input_ids"] == batch["input_ids"][i][:long].tolist()
            assert one["labels"] == batch["labels"][i][:long].tolist()
            assert (batch["labels"][i][long:] == IGNORE).all()
            kept = tokenizer.decode([t for t in one["labels"] if t != IGNORE])
            end = tokenizer.eos_token
            assert [t.strip() for t in kept.split(end)[:-1]] == spoken[i], (kept, spoken[i])
            pixels = one.get("pixel_values", torch.empty(0))
            many = len(pixels)
            assert many == 0 or torch.equal(batch["pixel_values"][at : at + many], pixels)
            at += many
        tokens = (batch["input_ids"] == prompts.token_id) & batch["attention_mask"].bool()
        if not shown:
            assert "pixel_values" not in batch and not tokens.any()
        elif prompts.llava:
            assert at == len(shown) and tokens.sum() == 36 * len(shown)
        else:
            grid = batch["image_grid_thw"].prod(-1)
            assert len(grid) == len(shown) and at == grid.sum() == 4 * tokens.sum()
            assert torch.equal(batch["mm_token_type_ids"].bool(), tokens)

    with _work() as work:
        known = {}
        for family, kind in (("qwen2_5_vl", "qwen2"), ("llava", "spm")):
            _save(work / family, family, kind)
            known[family] = load_prompts(work / family, 40)
        rows = st.lists(st.lists(turn, min_size=1, max_size=3), min_size=1, max_size=3)
        _fuzz(check, rows=rows, family=st.sampled_from([*known]))


def test_fuzz_rows_of_files():
    """Lines of JSON of any shape: conversations that can be encoded, or one line of error."""
    from hypothesis import strategies as st

    word = st.sampled_from(("user", "assistant", "text", "image", "a.png", "b.png", "", "messages"))
    leaf = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.floats(), word)
    names = st.sampled_from(("role", "content", "type", "text", "image", "messages"))
    deeper = lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4)
    part = st.fixed_dictionaries({"type": word, "text": word, "image": word})
    content = word | st.lists(part, max_size=2) | st.recursive(leaf, deeper, max_leaves=6)
    message = st.fixed_dictionaries({"role": word | leaf, "content": content})
    near = st.fixed_dictionaries({"messages": st.lists(message, min_size=1, max_size=2)})
    line = near.map(json.dumps) | st.recursive(leaf, deeper, max_leaves=9).map(json.dumps)

    def check(lines, cut):
        data = "\n".join(lines).encode()
        path.write_bytes(data[: len(data) - cut] if cut else data)
        for row in _right_or_one_line(read_rows, path) or []:
            assert row["messages"]
            for message in row["messages"]:
                parts = message["content"]
                assert isinstance(message["role"], str) and isinstance(parts, str | list)
                for part in parts if isinstance(parts, list) else ():
                    assert isinstance(part["text"], str) or part["image"].exists(), part

    with _work() as work:
        path, lines = work / "rows.jsonl", st.lists(line | st.just(""), min_size=1, max_size=3)
        draw(random.Random(0), 8, 8)[0].save(work / "a.png")
        _fuzz(check, lines=lines, cut=st.sampled_from((0, 0, 1, 5)))


def test_batches_mix_rows_with_and_without_pictures():
    """The loss of a batch is the mean over its rows' labels of their own losses, and its gradients
    those of the sum; only the assistant's words are labels; no row has a dummy picture."""
    for family, kind in (
        ("qwen2_vl", "qwen2"),
        ("qwen2_5_vl", "qwen2"),
        ("qwen3_vl", "qwen2"),
        ("llava", "spm"),
    ):
        with _work() as work:
            _save(work / "model", family, kind)
            budget = 40 if family == "llava" else 24
            prompts, model = load_prompts(work / "model", budget), reference_model(work / "model")
            rows, collate = generated_rows(6, seed=2), Collator(prompts)
            batch = collate(rows)
            counts = [len(prompts.pictures(r["messages"])) for r in rows]
            assert sorted(counts) == [0, 0, 1, 1, 1, 2]
            if family == "llava":
                assert batch["pixel_values"].shape[0] == sum(counts)
            else:
                tokens = batch["image_grid_thw"].prod(-1) // 4
                assert len(tokens) == sum(counts) and tokens.max() <= budget and tokens.min() >= 8
            each = [len(prompts.encode(row["messages"])["input_ids"]) for row in rows]
            assert batch["attention_mask"].sum(1).tolist() == each
            text_only = collate([r for r, n in zip(rows, counts, strict=True) if not n])
            assert "pixel_values" not in text_only and "image_grid_thw" not in text_only
            for i, row in enumerate(rows):
                labels = batch["labels"][i]
                kept = labels[labels != IGNORE]
                assert torch.equal(kept, batch["input_ids"][i][labels != IGNORE])
                said = prompts.tokenizer.decode(kept)
                answer = row["messages"][-1]["content"]
                answer = answer if isinstance(answer, str) else answer[0]["text"]
                assert said.strip() == answer + prompts.tokenizer.eos_token, (said, answer)
                first = int((labels != IGNORE).nonzero()[0])
                before = prompts.tokenizer.decode(batch["input_ids"][i][:first])
                assert before.endswith(("assistant\n", "ASSISTANT:")), before[-30:]

            def backward(batch, weight=1.0, model=model):
                model.zero_grad()
                loss = model(**batch).loss
                (loss * weight).backward()
                grads = {
                    n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
                }
                return loss.detach(), grads

            loss, grads = backward(batch)
            parts = [collate([row]) for row in rows]
            numbers = [int((p["labels"][:, 1:] != IGNORE).sum()) for p in parts]
            total, mean, summed = sum(numbers), 0.0, {}
            for part, number in zip(parts, numbers, strict=True):
                own, own_grads = backward(part, number / total)
                mean += own * number / total
                for name, grad in own_grads.items():
                    summed[name] = summed.get(name, 0) + grad
            torch.testing.assert_close(loss, mean, rtol=2e-6, atol=0)
            assert set(grads) == set(summed)
            for name, grad in grads.items():
                torch.testing.assert_close(summed[name], grad, rtol=1e-3, atol=1e-6, msg=name)
            if family == "qwen2_vl":
                _raises(ValueError, "tokens, need at most 20", Collator(prompts, 20), rows)
                _raises(ValueError, "need at least 16", load_prompts, work / "model", 8)
                shown = copy.deepcopy(rows[0]["messages"])
                shown[0]["content"][1]["text"] += "<|image_pad|>"
                _raises(ValueError, "more <|image_pad|> than pictures", prompts.encode, shown)
            elif family == "llava":
                _raises(ValueError, "need at least 36", load_prompts, work / "model", 20)


def test_conversations_of_several_turns():
    with _work() as work:
        _save(work / "model", "qwen2_vl", "qwen2")
        prompts = load_prompts(work / "model", 16)
        image, _ = draw(random.Random(1), 200, 100)
        turns = [
            {
                "role": "user",
                "content": [{"type": "image", "image": image}, {"type": "text", "text": "One?"}],
            },
            {"role": "assistant", "content": "First answer"},
            {"role": "user", "content": "Two?"},
            {"role": "assistant", "content": "Second answer"},
        ]
        row = prompts.encode(turns)
        kept = prompts.tokenizer.decode([t for t in row["labels"] if t != IGNORE])
        assert kept == "First answer<|im_end|>Second answer<|im_end|>", kept
        prompts.template = CHATML.replace(
            "{{ c['text'] }}", "{{ c['text'] if messages|length > 3 }}"
        )
        _raises(ValueError, "renders earlier turns otherwise", prompts.encode, turns)
        # As LLaVA's own template: pictures first, lists only, no end after an answer
        prompts.template = (
            "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] | "
            "selectattr('type', 'equalto', 'image') %}{{ '<|vision_start|><|image_pad|>"
            "<|vision_end|>' }}{% endfor %}{% for c in m['content'] | selectattr('type', 'equalto', "
            "'text') %}{{ c['text'] + ' ' }}{% endfor %}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
        )
        kept = [t for t in prompts.encode(turns)["labels"] if t != IGNORE]
        kept = prompts.tokenizer.decode(kept)
        assert kept == " First answer  Second answer<|im_end|>", kept
        path, picture = work / "rows.jsonl", work / "a.png"
        image.save(picture)
        turns[0]["content"][0]["image"] = "a.png"
        path.write_text(json.dumps({"messages": turns}) + "\n\n")
        prompts.template = CHATML
        again = prompts.encode(read_rows(path)[0]["messages"])
        assert again["labels"] == row["labels"]
        assert torch.equal(again["pixel_values"], row["pixel_values"])
        for line, words in (
            ('{"messages": 3}', "rows.jsonl:1: found"),
            ("{", "rows.jsonl:1: found"),
            (
                '{"messages": [{"role": "user", "content": [{"type": "image", "image": "b.png"}]}]}',
                "no file",
            ),
        ):
            path.write_text(line)
            _raises(ValueError, words, read_rows, path)
        path.write_text("")
        _raises(ValueError, "no rows", read_rows, path)


def test_finetune_export_and_proof():
    """QLoRA on a mixed set, LoRA in all three parts, then from memory to GGUF, and llama.cpp agrees
    with the 4-bit base and the adapter in transformers."""
    import transformers

    for family, kind in (("qwen2_5_vl", "qwen2"), ("llava", "spm")):
        with _work() as work:
            _save(work / "model", family, kind, **WHOLE_BLOCKS)
            args = transformers.TrainingArguments(
                output_dir=str(work / "run"), max_steps=10, per_device_train_batch_size=4, logging_steps=1,
                learning_rate=2e-3, save_strategy="no", report_to="none", seed=0, disable_tqdm=True,
                use_cpu=True, gradient_checkpointing=family == "llava", lr_scheduler_type="constant",
            )  # fmt: skip
            budget = 36 if family == "llava" else 16
            with contextlib.redirect_stdout(io.StringIO()):
                model, _, losses = finetune(
                    work / "model", generated_rows(24), args, image_max_tokens=budget, lora_r=8
                )
            assert len(losses) == 10 and statistics.mean(losses[-3:]) < losses[0] - 0.3, losses
            trained = {
                n for n, p in model.named_parameters() if "lora_B" in n and p.abs().max() > 0
            }
            parts = ("language_model", "visual.blocks", "visual.merger")
            if family == "llava":
                parts = ("language_model", "vision_tower", "multi_modal_projector")
            assert all(any(part in n for n in trained) for part in parts), parts
            plain = reference_model(work / "model")
            assert len(trained) == len(lora_targets(plain)), set(lora_targets(plain)) - trained
            model.save_pretrained(work / "adapter")
            model.get_base_model().save_pretrained(work / "ignored")  # saving does not disturb it
            text, mmproj, _ = _quiet(
                model.cpu(), work / "out", dtype="f32", processor=_Files(work / "model")
            )
            if _llama_cpp_missing() is None:
                shown, lines = [draw(random.Random(0), 112, 140)[0]], []
                args = work / "model", text, mmproj, work / "adapter", "f32"
                assert verify(*args, images=shown, live=model, say=lines.append), lines


def _main(*argv):
    """(exit code, everything printed) of the command line."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = main([str(a) for a in argv])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue()


def test_command_line():
    with _work() as work:
        model = _save(work / "model", "qwen2_vl", "qwen2")
        _adapter(work / "adapter", model)
        pins = Path(__file__).with_name("requirements.txt")
        assert not pins.exists() or LLAMA_CPP in pins.read_text(), "another llama-cpp-python"
        code, said = _main("--help")
        assert code == 0 and "--export" in said and "--image-max-tokens" in said
        export = ("--export", work / "model", "--out", work / "out")
        results = work / "results.json"
        proof = ("--verify",) if _llama_cpp_missing() is None else ()
        code, said = _main(*export, "--adapter", work / "adapter", "--json", results, *proof)
        assert code == 0 and "RESULT gguf_vision PASS" in said, said
        assert json.loads(results.read_text())["text"] == str(work / "out" / "model-text-F16.gguf")
        assert not proof or said.count("agrees") == 5, said
        tune = ("--finetune", work / "model", "--out", work / "few")
        for argv, words in (
            (("--export", work / "model"), "need --out"),
            ((*export, "--dtype", "q3_k"), "invalid choice"),
            (("--export", work / "nowhere", "--out", work / "out"), "need a local directory"),
            ((*export, "--adapter", work / "model"), "no adapter_config.json"),
            ((*export, "--nonesuch"), "nonesuch"),
            (("--verify",), "need --export or --finetune"),
            (("--out", work / "out"), "need --export or --finetune"),
            (("--bench", "--only", "proof,3b"), "--only: found 3b, need of proof, 0.5b, 2b, 7b"),
            (("--bench", "--json", work), "need a file"),
            (("--export", work / "model", "--out", pins), "requirements.txt, need a directory"),
            ((*tune, "--max_stepz", "3"), "found --max_stepz 3, need flags of TrainingArguments"),
            ((*tune, "--max_steps", "x"), "found argument --max_steps"),
            (("--test", "--plot", work / "a.png"), "--plot, --only and --converter are for the"),
        ):
            with unittest.mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}):
                code, said = _main(*argv)
            assert code == 2 and words in said and "Traceback" not in said, (argv, code, said)
        tune = f"--finetune {work}/model --max_steps 2 --use_cpu --per_device_train_batch_size 2"
        tune += " --image-max-tokens 16 --logging_steps 1 --dtype f32"
        few = tune.replace("--logging_steps 1", "")  # fewer steps than a line of the log
        code, said = _main(*few.split(), "--out", work / "few", "--adapter", work / "adapter")
        assert code == 2 and "--adapter: found one, with --finetune" in said, said
        draw(random.Random(0), 112, 140)[0].save(work / "a.png")
        shown = ("--image", work / "a.png") if proof else ()
        for bits, flags in (("false", few), ("true", tune)):
            out = work / f"tuned-{bits}"
            more = "--out", out, "--four-bit", bits, *proof, *shown
            code, said = _main(*flags.split(), *more)
            assert code == 0 and ("gguf_vision: loss" in said) == (flags == tune), said
            files = sorted(p.name for p in out.iterdir())
            assert files == ["adapter", "model-mmproj-F32.gguf", "model-text-F32.gguf"], files
            assert (out / "adapter" / "adapter_model.safetensors").exists()
            assert not proof or said.count("agrees") == 3, said
        with unittest.mock.patch.dict(sys.modules, {"llama_cpp": None, "llama_cpp.mtmd_cpp": None}):
            for argv in ((*export, "--verify"), ("--bench", "--only", "proof")):
                code, said = _main(*argv)
                assert code == 77 and f"pip install {LLAMA_CPP}" in said, (argv, code, said)


def test_errors_have_codes_and_one_line():
    for error, code, words in (
        (KeyboardInterrupt(), 130, "interrupted"),
        (AssertionError("one\ntwo"), 1, "a check failed: one two"),
        (torch.OutOfMemoryError("big"), 1, "out of memory: big, need more or a smaller"),
        (
            RuntimeError("DefaultCPUAllocator: can't"),
            1,
            "out of memory: DefaultCPUAllocator: can't",
        ),
        (
            RuntimeError("CUDA error: out of memory Search for `cudaErrorMemoryAllocation' in"),
            1,
            "out of memory: CUDA error: out of memory, need",
        ),
        (ModuleNotFoundError("x", name="peft"), 77, "found no peft, need it installed"),
        (ImportError("cannot import name 'a'"), 77, "cannot import name 'a'"),
        (ValueError("a: found b, need c"), 2, "a: found b, need c"),
        (RuntimeError("unforeseen"), 1, ""),
    ):
        found = _explain(error)
        assert found[0] == code and found[1].startswith(words) and bool(words) == bool(found[1])


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


def test_plots_are_drawn():
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise unittest.SkipTest("matplotlib is not installed") from None
    parts = ("images", "images_emulated", "logits", "logits_emulated")
    rate = {"seconds": 1.0, "gb_per_s": 2.0, "of_copy": 1.0}
    rates = {"0.5b": {"copy": rate, "export": rate}}
    with _work() as work, contextlib.redirect_stdout(io.StringIO()):
        for results in ({"proof": dict.fromkeys(CASES, dict.fromkeys(parts, 1e-3))} | rates, rates):
            plot(results, work / "a.png")
            assert (work / "a.png").read_bytes()[:4] == b"\x89PNG", results
            assert [p.name for p in work.iterdir()] == ["a.png"]


# --------------------------------------------------------------------------------------------------
# Timings

SIZES = {  # random weights of real shapes, tied or not: Qwen2-VL's text and vision parts
    "0.5b": (True, {  # Qwen2 0.5B with a tower as large as ViT-B
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936},
        {"hidden_size": 896, "embed_dim": 768, "depth": 12, "num_heads": 12}),
    "2b": (True, {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936},
        {"hidden_size": 1536}),
    "7b": (False, {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
        {"hidden_size": 3584}),
}  # fmt: skip
USUAL = ["proof", "0.5b"]  # timed without --only


def write_random(directory, size, seed=0) -> int:
    """A checkpoint of a real shape in float16, in shards of at most 2 GiB; returns its bytes."""
    import transformers

    tie, text, vision = SIZES[size]
    directory.mkdir(parents=True)
    tokenizer = _save_tokenizer("qwen2", directory, CHATML)
    ids = {k: tokenizer.convert_tokens_to_ids(f"<|{v}|>") for k, v in (
        ("image_token_id", "image_pad"), ("video_token_id", "video_pad"),
        ("vision_start_token_id", "vision_start"), ("vision_end_token_id", "vision_end"))}  # fmt: skip
    eighth = text["hidden_size"] // text["num_attention_heads"] // 16
    sections = [2 * eighth, 3 * eighth, 3 * eighth]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    text = text | {"rope_parameters": rope, "max_position_embeddings": 32768}
    text |= {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": tie}
    kind = transformers.Qwen2VLConfig
    config = kind(text_config=text, vision_config=vision, tie_word_embeddings=tie, **ids)
    config.architectures, config.dtype = ["Qwen2VLForConditionalGeneration"], "float16"
    config.save_pretrained(directory)
    saved = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "merge_size": 2}
    saved |= {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14}
    (directory / "preprocessor_config.json").write_text(json.dumps(saved))
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    if tie:
        del shapes["lm_head.weight"]
    rng = np.random.default_rng(seed)
    pool = (rng.standard_normal(1 << 24, dtype=np.float32) * 0.02).astype(np.float16)
    shards, where, total = [[]], {}, 0
    for key, shape in shapes.items():
        if sum(2 * math.prod(s) for _, s in shards[-1]) + 2 * math.prod(shape) > 2 * GIB:
            shards.append([])
        shards[-1].append((key, shape))
    for number, members in enumerate(shards, 1):
        header, at = {}, 0
        for key, shape in members:
            end = at + 2 * math.prod(shape)
            old = re.sub(r"^model\.language_model\.", "model.", key).replace(
                "model.visual.", "visual."
            )
            header[old] = {"dtype": "F16", "shape": shape, "data_offsets": [at, end]}
            where[old], at = f"model-{number:05}-of-{len(shards):05}.safetensors", end
        words = json.dumps(header).encode()
        words += b" " * (-len(words) % 8)
        with open(directory / where[old], "wb") as file:
            file.write(struct.pack("<Q", len(words)) + words)
            for _, shape in members:
                left = math.prod(shape)
                while left:
                    start = int(rng.integers(len(pool) // 2))
                    left -= file.write(pool[start : start + left].data.cast("B")) // 2
        total += at
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


MEASURED = """
import json, re, sys, time
sys.path.insert(0, sys.argv[1])

def peak():  # of this process alone; ru_maxrss begins with its parent's
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

{setup}
base, start = peak(), time.perf_counter()
{run}
print("MEASURED " + json.dumps([time.perf_counter() - start, peak(), base]))
"""
OURS = (
    "import gguf_vision as g, transformers; transformers.Qwen2VLForConditionalGeneration",
    "g.export_gguf(sys.argv[2], sys.argv[3], dtype=sys.argv[4], report=lambda _: None)",
)
COPY = (
    "import os",
    'assert os.system(f"cp -r {sys.argv[2]} {sys.argv[3]} && sync {sys.argv[3]}/*.safetensors") == 0',
)
# llama.cpp's converter knows a tokenizer by a hash of its real vocabulary; this one's is made up
CONVERTER = (
    """
import os, logging, torch, transformers
from pathlib import Path
sys.path.insert(0, sys.argv[5])
import convert_hf_to_gguf
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
transformers.AutoTokenizer
""",
    """
model, out, dtype = sys.argv[2:5]
Path(out).mkdir()
for name, more in (("text", []), ("mmproj", ["--mmproj"])):
    path = f"{out}/{name}.gguf"
    sys.argv[1:] = [model, "--outtype", dtype, "--outfile", path, *more]
    convert_hf_to_gguf.main()
    with open(path, "rb") as file:  # as the others do
        os.fsync(file.fileno())
""",
)


def _measured(kind, *argv):
    """(seconds, peak bytes, bytes before it began) of one way, in a process of its own, with
    nothing of the model (argv[0]) in the page cache."""
    setup, run = kind
    code = MEASURED.format(setup=setup, run=run)
    os.sync()  # or the disk is still busy with what was written before
    for path in argv[0].glob("*.safetensors"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    here = str(Path(__file__).resolve().parent)
    command = [sys.executable, "-c", code, here, *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    line = [x for x in done.stdout.splitlines() if x.startswith("MEASURED ")]
    if done.returncode or not line:
        words = " ".join(done.stderr.split())[-300:]
        raise ValueError(f"a measured process: found exit code {done.returncode} ({words}), need 0")
    return json.loads(line[0].removeprefix("MEASURED "))


def bench_proof(results) -> dict:
    """The largest distances of every family to transformers, F32 files, over the tests' prompts."""
    if why := _llama_cpp_missing():
        print(f"gguf_vision: no figures of the proof: {why}")
        return {}
    results["proof"], worst = {}, 0.0
    for case, adapter in itertools.product(CASES, (False, True)):
        proofs, row = _float32_proofs(case, adapter).values(), {}
        name = f"{case}{', LoRA' if adapter else ''}"
        assert all(p.ok for p in proofs), f"{name} is too far from transformers"
        for part in ("images", "images_emulated", "logits", "logits_emulated"):
            row[part] = max(getattr(p, part) or 0 for p in proofs)
        results["proof"][name] = row
        worst = max(worst, row["images_emulated"], row["logits_emulated"])
        far = (f"{k} {row[k]:.1e} (emulated {row[f'{k}_emulated']:.1e})" for k in ROUTES)
        print(f"{name}: token ids equal,", ", ".join(far))
    return {"distance": worst}


def bench_export(results, size, converter=None, seed=0) -> dict:
    """Rates of the export, float16 to float16, beside a plain copy of the same bytes; peak memory;
    llama.cpp's converter, where its directory is given, with the tensors compared."""
    with tempfile.TemporaryDirectory(prefix="gguf_vision_bench_") as d:
        work, ways = Path(d), {"copy": COPY, "export": OURS}
        if converter:
            ways["converter"] = CONVERTER
        need = {"0.5b": 1.2, "2b": 4.5, "7b": 16}[size] * (1 + len(ways))
        free = shutil.disk_usage(work).free / GIB
        _need(free > need, d, f"{free:.1f} GiB free", f"{need:.1f} for {size} (or TMPDIR=)")
        total = write_random(work / "model", size, seed)
        largest = max(math.prod(t.shape) * 2 for t in _checkpoint(work / "model").values())
        rows, times, turns = {}, {name: [] for name in ways}, 3
        for turn in range(turns):
            order = [*ways.items()] * 2  # each way goes first in its turn
            for name, way in order[turn % len(ways) :][: len(ways)]:
                more = [converter] if way is CONVERTER else []
                seconds, peak, base = _measured(way, work / "model", work / name, "f16", *more)
                times[name].append(seconds)
                rows[name] = {"peak_gib": peak / GIB, "imports_gib": base / GIB}
                if turn < turns - 1 or way is COPY:
                    shutil.rmtree(work / name)
        equal = converter and _same_tensors(work / "export", work / "converter")
    print(f"{size}: {total / GIB:.2f} GiB in float16, largest tensor {largest / GIB:.2f} GiB")
    for name, row in rows.items():
        row["seconds"] = statistics.median(times[name])
        row["gb_per_s"] = total / row["seconds"] / 1e9
        row["of_copy"] = row["gb_per_s"] / rows["copy"]["gb_per_s"]
        words = f"{row['of_copy']:.2f} of the copy's, peak {row['peak_gib']:.2f} GiB"
        words = f"{words} ({row['imports_gib']:.2f} of it imports)"
        words = "cp, then sync" if name == "copy" else words
        print(f"  {name}: {row['seconds']:.1f} s, {row['gb_per_s']:.2f} GB/s, {words}")
    if converter:
        print(f"  {equal} tensors equal to the converter's, bit by bit")
    results[size] = rows | ({"tensors_equal": equal} if converter else {})
    return {f"{size}_of_copy": rows["export"]["of_copy"]}


def _same_tensors(ours, theirs) -> int:
    """How many tensors two directories of two files have; AssertionError unless all are equal."""
    count = 0
    for kind in ("text", "mmproj"):
        (mine,) = ours.glob(f"*-{kind}-*.gguf")
        a, b = gguf.GGUFReader(mine), gguf.GGUFReader(theirs / f"{kind}.gguf")
        a, b = ({t.name: t for t in r.tensors} for r in (a, b))
        assert set(a) == set(b), f"{kind}: {sorted(set(a) ^ set(b))[:5]} in one file only"
        for name, tensor in a.items():
            other = b[name]
            assert tensor.tensor_type == other.tensor_type, f"{name}: {tensor.tensor_type.name}"
            assert np.array_equal(tensor.data, other.data), f"{name} differs from the converter's"
        count += len(a)
    return count


def bench(results, names, converter=None, seed=0) -> dict:
    """Each of names adds its records to results; headline figures are returned."""
    head = {}
    for name in names:
        options = () if name == "proof" else (name, converter, seed)
        head |= (bench_proof if name == "proof" else bench_export)(results, *options)
    return head


def plot(results, path):
    """The proof's distances as a PNG; the export's rates beside a copy's where it was not run."""
    from matplotlib.figure import Figure

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    if rows := results.get("proof"):
        figure = Figure((9, 8), layout="constrained", dpi=150)
        axes, names = figure.subplots(), [*rows]
        colours = {"images": ("#9ecae1", "#2171b5"), "logits": ("#fdae6b", "#d94801")}
        bars = [(k, part, i) for k in ROUTES for i, part in enumerate((k, f"{k}_emulated"))]
        for number, (kind, part, emulated) in enumerate(bars):
            words = "llama.cpp's faults emulated" if emulated else "as they are"
            places = [y + 0.2 * (number - 1.5) for y in range(len(names))]
            style = {"color": colours[kind][emulated], "label": f"{kind}, {words}"}
            axes.barh(places, [rows[n][part] for n in names], 0.2, **style)
        axes.axvline(LIMIT, color="black", linestyle="--", label=f"limit {LIMIT:g}")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set(xscale="log", xlabel="relative L2 distance, largest of the prompts")
        axes.set_title(f"llama.cpp's distance to transformers in float32, F32 files, {device}")
    else:
        figure = Figure((8, 5), layout="constrained", dpi=150)
        axes, sizes = figure.subplots(), [name for name in SIZES if name in results]
        ways = [way for way in results[sizes[0]] if way != "tensors_equal"]
        for number, way in enumerate(ways):
            places = [x + (number - (len(ways) - 1) / 2) * 0.25 for x in range(len(sizes))]
            label = "copy (cp, then sync)" if way == "copy" else way
            bars = axes.bar(places, [results[n][way]["gb_per_s"] for n in sizes], 0.25, label=label)
            axes.bar_label(bars, fmt="%.2f")
        axes.set_xticks(range(len(sizes)), sizes)
        axes.set(xlabel="model, float16 to GGUF F16", ylabel="GB/s, from a cold page cache")
        axes.set_title(f"Export to GGUF beside a copy, {device}")
    figure.legend(loc="outside lower center", ncols=2)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    _write(path, lambda part: figure.savefig(part, format="png"))
    print(f"drawn: {path}")


# --------------------------------------------------------------------------------------------------
# Command line


def _export(args, rest, results) -> int:
    """--export and --finetune, then --verify."""
    adapter, live = args.adapter, None
    _need(args.out, "command", "no directory to write to", "--out DIR")
    _need(not Path(args.out).is_file(), "--out", f"the file {args.out}", "a directory")
    _need(not (args.finetune and adapter), "--adapter", "one, with --finetune", "either")
    if args.verify and (why := _llama_cpp_missing()):
        raise ImportError(why)
    directory = _local(args.export or args.finetune)
    options = {"dtype": args.dtype, "mmproj_dtype": args.mmproj_dtype, "pre": args.pre}
    options["name"] = args.name or directory.resolve().name
    options["clip_workaround"] = args.clip_workaround
    if args.finetune:
        import transformers

        def refuse(words):  # in place of TrainingArguments' usage, several screens of it
            raise ValueError(f"--finetune: found {words}, need flags of TrainingArguments")

        _check(_config(directory))
        parser = transformers.HfArgumentParser(transformers.TrainingArguments)
        parser.error = refuse
        with tempfile.TemporaryDirectory(prefix="gguf_vision_run_") as scratch:
            parser.set_defaults(output_dir=scratch, report_to="none", save_strategy="no")
            parser.set_defaults(logging_steps=10, seed=args.seed)
            training, left = parser.parse_args_into_dataclasses(rest, return_remaining_strings=True)
            if left:
                refuse(" ".join(left))
            rows = read_rows(args.data) if args.data else generated_rows(256, args.seed)
            four_bit, budget = args.four_bit == "true", {"image_max_tokens": args.image_max_tokens}
            budget |= {"four_bit": four_bit, "lora_r": args.lora_r}
            live, _, losses = finetune(directory, rows, training, **budget)
        results["losses"], adapter = losses, Path(args.out) / "adapter"
        live.save_pretrained(adapter)
        if losses:
            print(f"gguf_vision: loss {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} lines")
        text, mmproj = export_gguf(live, args.out, processor=_Files(directory), **options)
    else:
        text, mmproj = export_gguf(directory, args.out, adapter=adapter, **options)
    print(f"gguf_vision: {text}\ngguf_vision: {mmproj}")
    results |= {"text": str(text), "mmproj": str(mmproj)}
    if not args.verify:
        return 0
    more = {"mmproj_dtype": args.mmproj_dtype, "images": args.image}
    more |= {"live": live, "clip_workaround": args.clip_workaround}
    return 0 if verify(directory, text, mmproj, adapter, args.dtype, **more) else 1


def _version(package) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


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
    sys.modules["gguf_vision"] = sys.modules[__name__]  # or pytest would import a second one
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
        return 1, f"out of memory: {found}, need more or a smaller model or batch"
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
    option("--export", metavar="MODEL", help="checkpoint directory (or hub id) to write as GGUF")
    option("--finetune", metavar="MODEL", help="QLoRA first; all of TrainingArguments' flags work")
    option("--out", metavar="DIR", help="where the two files go")
    option("--adapter", metavar="DIR", help="LoRA adapter to merge in float32")
    option("--dtype", choices=[*DTYPES], default="f16", help="of matrices (default: f16)")
    words = "of the second file (default: --dtype, or f16 where that is below 8 bits)"
    option("--mmproj-dtype", choices=[*DTYPES], help=words)
    option("--name", help="of the files (default: the directory's)")
    option("--pre", help="tokenizer.ggml.pre, where the script cannot tell it")
    option("--clip-workaround", action="store_true", help="LLaVA with CLIP, llama.cpp as it is now")
    option("--verify", action="store_true", help="compare with transformers in llama.cpp (float32)")
    option("--image", metavar="FILE", action="append", default=[], help="for --verify; repeatable")
    option("--data", metavar="FILE", help="rows to finetune on (JSON lines); else drawn shapes")
    option("--image-max-tokens", type=int, metavar="N", help="pictures are resized to as many")
    option("--lora-r", type=int, default=16, help="LoRA's rank for --finetune (default: 16)")
    either = {"choices": ("true", "false"), "default": "true"}
    option("--four-bit", **either, help="NF4 base for --finetune (default: true)")
    option("--test", action="store_true", help="the self-test alone")
    option("--bench", action="store_true", help="the timings alone")
    option("--fuzz", type=int, metavar="N", help="the random tests alone, with N cases each")
    names, usual = ", ".join(["proof", *SIZES]), ",".join(USUAL)
    option("--only", metavar="NAMES", help=f"of {names} (default: {usual})")
    option("--converter", metavar="DIR", help="llama.cpp's source, to time its converter as well")
    option("--seed", type=int, default=0, help="of timings, --fuzz and --finetune (default: 0)")
    option("--plot", metavar="PATH", help="distances to transformers as PNG (needs matplotlib)")
    option("--json", metavar="PATH", help="also write the results as JSON")
    return parser


def main(argv=None) -> int:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    asked = args.export or args.finetune
    tests = args.test or args.fuzz or not (args.bench or asked)
    times = args.bench or not (args.test or args.fuzz or asked)
    if rest and not args.finetune:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if not times and (args.plot or args.only or args.converter):
        parser.error("--plot, --only and --converter are for the timings")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    results, head, code, checks = {}, {}, 0, 0
    try:
        import transformers

        versions = {"torch": torch.__version__.split("+")[0], "gguf": _version("gguf")}
        versions |= {"transformers": transformers.__version__}
        versions |= {"llama-cpp-python": _version("llama_cpp_python"), "seed": args.seed}
        words = (f"{k} {v}" for k, v in versions.items())
        print("gguf_vision", device, *words, sep=" | ", flush=True)
        torch.manual_seed(args.seed)
        _check_paths(args.plot, args.json)  # what is written last is looked at first
        if args.plot:
            import matplotlib  # noqa: F401
        names = args.only.split(",") if args.only else USUAL
        for name in names:
            _need(name in ("proof", *SIZES), "--only", name, f"of {', '.join(['proof', *SIZES])}")
        if args.only and "proof" in names and (why := _llama_cpp_missing()):
            raise ImportError(why)
        idle = args.verify or args.out or args.adapter or args.data or args.image
        _need(asked or not idle, "command", "no model", "--export or --finetune")
        if asked:
            code = _export(args, rest, results)
        if tests and not code:
            code, checks = _self_test(args.fuzz, args.seed)
        if times and not code:
            head = bench(results, names, args.converter, args.seed)
            if args.plot:
                plot(results, args.plot)
        if args.json:
            found = {"device": device, **versions, **results, **head}
            _write(args.json, lambda part: part.write_text(json.dumps(found, indent=1)))
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 (a traceback if unforeseen)
        code, words = _explain(error)
        print(f"gguf_vision: {words}" if words else traceback.format_exc(), file=sys.stderr)
    figures = " ".join(
        f"{k}={v:.2g}" + ("x" if k.endswith("copy") else "") for k, v in head.items()
    )
    print(f"RESULT gguf_vision {'FAIL' if code else 'PASS'} checks={checks} {figures}".rstrip())
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, INTERRUPT)
    sys.exit(main())
