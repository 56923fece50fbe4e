"""Compiles the GPU's kernels by NVRTC for each architecture, and prints what ptxas says of their registers and spills.

No GPU and no driver is needed. Fails if a kernel of gpu/kernels.rs is missing from what comes out, or if one spills more than
LITTLE bytes: ptxas gives up a register or two for one more block on a processor.
Install: python -m venv .venv && .venv/bin/pip install --no-deps nvidia-cuda-nvrtc==13.0.88
Run:     .venv/bin/python benches/nvrtc.py [--markdown]
Architectures: 80 (A100), 90 (H100, H200), 100 (B200). PTX is compiled too, and its syntax checked on the way to machine code.
"""

import argparse
import ctypes
import multiprocessing
import re
import sys
import time
from functools import partial
from pathlib import Path

GPU = Path(__file__).resolve().parent.parent / "gpu"
ARCHITECTURES = (80, 90, 100)
ELEMENTS = {"f32": "float", "bf16": "Bf16"}
LITTLE = 32


def sources() -> tuple[str, list[str]]:
    """The translation unit of gpu/kernels.rs, and the names of its kernels, which are there for each type of elements."""
    text = (GPU / "kernels.rs").read_text()
    files = re.findall(r'include_str!\("(.+?)"\)', text)
    common, *both, f32, bf16 = (f'#line 1 "{Path(f).name}"\n{(GPU / f).read_text()}' for f in files)
    for (element, t), own in zip(ELEMENTS.items(), (f32, bf16)):
        kernels = "".join(both) + own
        common += f"#undef ELEMENT\n#define ELEMENT {element}\nnamespace in_{element} {{\ntypedef {t} T;\n{kernels}}}\n"
    return common, re.findall(r'"(\w+)"', text.split("NAMES:")[1])


def library() -> ctypes.CDLL:
    """NVRTC, out of this interpreter's packages if the loader has none."""
    folders = [Path(p) / "nvidia" for p in sys.path]
    for parts in ("libnvrtc-builtins.so.*", "libnvrtc.so.*"):  # the second looks for the first by name alone
        found = sorted(f for folder in folders for f in folder.glob(f"*/lib/{parts}"))
        if found:
            opened = ctypes.CDLL(str(found[-1]), mode=ctypes.RTLD_GLOBAL)
    return opened if found else ctypes.CDLL("libnvrtc.so")


def compiled(text: str, arch: str) -> tuple[bytes, str]:
    """Machine code for arch sm_N, PTX for compute_N; and the compiler's log."""
    nvrtc, program = library(), ctypes.c_void_p()
    options = [f"--gpu-architecture={arch}", "--std=c++17", "--device-as-default-execution-space"]
    if arch.startswith("sm_"):
        options.append("--ptxas-options=--verbose")
    arguments = (ctypes.c_char_p * len(options))(*[o.encode() for o in options])

    def check(code: int):
        if code:
            raise RuntimeError(f"NVRTC error {code} for {arch}: {log()}")

    def read(what: str) -> bytes:
        size = ctypes.c_size_t()
        check(getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        check(getattr(nvrtc, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def log() -> str:
        return read("ProgramLog").rstrip(b"\0").decode()

    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None))
    check(nvrtc.nvrtcCompileProgram(program, len(options), arguments))
    image = read("CUBIN" if arch.startswith("sm_") else "PTX")
    outcome = image, log()
    check(nvrtc.nvrtcDestroyProgram(ctypes.byref(program)))
    return outcome


def resources(log: str) -> dict[str, tuple[int, int, int]]:
    """Registers, bytes spilled, bytes of static shared memory of each kernel, from the log of ptxas."""
    table = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        number = lambda pattern: sum(int(n) for n in re.findall(pattern, part))
        registers, spilled = number(r"Used (\d+) registers"), number(r"(\d+) bytes spill stores")
        table[part.split("'")[0]] = registers, spilled, number(r"(\d+) bytes smem")
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--markdown", action="store_true", help="print the table as docs/gpu.md has it")
    markdown = parser.parse_args().markdown
    nvrtc = library()
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    text, kernels = sources()
    names = [f"{kernel}_{element}" for element in ELEMENTS for kernel in kernels]
    tables = []
    start = time.time()
    images = [f"{kind}_{arch}" for arch in ARCHITECTURES for kind in ("sm", "compute")]
    with multiprocessing.Pool() as pool:  # a process of NVRTC compiles one text at a time
        made = dict(zip(images, pool.map(partial(compiled, text), images, chunksize=1)))
    for arch in ARCHITECTURES:
        (ptx, _), (cubin, log) = made[f"compute_{arch}"], made[f"sm_{arch}"]
        tables.append(resources(log))
        missing = [n for n in names if f".entry {n}(".encode() not in ptx or b"\0.text." + n.encode() + b"\0" not in cubin]
        spilling = [n for n, (_, spilled, _) in tables[-1].items() if spilled > LITTLE]
        if missing or spilling:
            sys.exit(f"sm_{arch}: missing {missing}, spill more than {LITTLE} bytes: {spilling}")
        if not markdown:
            print(f"sm_{arch}: {len(names)} kernels by NVRTC {major.value}.{minor.value}, {len(cubin)} bytes")
    if not all(set(names) == set(table) for table in tables):
        sys.exit(f"ptxas reports {sorted(tables[0])}, not the kernels of gpu/kernels.rs")
    if not markdown:
        print(f"all of them: {time.time() - start:.1f} s")
    print("| registers: f32, bf16 | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " | static shared memory, bytes |")
    print("|---" * (len(ARCHITECTURES) + 2) + "|")
    for kernel in kernels:
        both = lambda table: [table[f"{kernel}_{element}"] for element in ELEMENTS]
        cells = (", ".join(f"{r} (spills {s} bytes)" if s else str(r) for r, s, _ in both(table)) for table in tables)
        print(f"| {kernel} | " + " | ".join(cells) + f" | {max(shared for *_, shared in both(tables[0]))} |")


if __name__ == "__main__":
    main()
