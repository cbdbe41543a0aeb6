"""What the benchmarks share: timing, tables, files, machine code.

`python bench/NAME.py` times the script NAME.py, one folder up, beside the field's other packages in
the same run. RESULTS.md keeps what was measured.
"""

import re
import statistics
import subprocess
import tempfile
from pathlib import Path

import torch
import triton


def print_header(name: str) -> dict:
    """Prints and returns what the figures depend on."""
    gpu = torch.cuda.is_available()
    found = {
        "device": torch.cuda.get_device_name() if gpu else "CPU",
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    print(name, *(f"{key} {value}" for key, value in found.items()), sep=" | ", flush=True)
    return found


def in_turns(functions: dict, measure, turns: int) -> dict[str, float]:
    """Medians of measure(function), taken in turns, so that a slow moment meets all of them."""
    times = {name: [] for name in functions}
    for _ in range(turns):
        for name, function in functions.items():
            times[name].append(measure(function))
    return {name: statistics.median(found) for name, found in times.items()}


def show(results: dict, name: str, times: dict, unit: str = "us", **more) -> None:
    """Prints a row of times, each with its ratio to ours, and adds it to the results."""
    ratios = "".join(f" | {k} {t:.2f} ({t / times['ours']:.2f}x)" for k, t in times.items())
    print(f"{name}, {unit}{ratios}", flush=True)
    results[name] = {"unit": unit, **times, **more}


def save(path: Path, write) -> None:
    """write(a temporary path), which then gets its name: no half of a file ever has it."""
    part = path.with_name(f"{path.name}.part")
    write(part)
    part.replace(path)
    print(f"written: {path}")


def instructions(compiled) -> list[str]:
    """Opcodes of a compiled Triton kernel up to its last EXIT."""
    code = re.findall(r"\t(?:@!?U?P\w+ )?([A-Z][\w.]*)", compiled.asm["sass"])
    return code[: len(code) - code[::-1].index("EXIT")]


def resources(compiled) -> dict[str, int]:
    """Registers and bytes of a compiled Triton kernel: {REG, STACK, SHARED, LOCAL, ...}."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([tool, "-res-usage", file.name], text=True)
    return {key: int(count) for key, count in re.findall(r"\b([A-Z]+):(\d+)", usage)}
