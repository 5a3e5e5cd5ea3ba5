"""Build auto_gptq/_native.so out of csrc/; all metadata is in pyproject.toml.

The library needs g++ and the headers of torch >= 2.10 at build time.  Without them, or under pip's
build isolation, which has no torch, the package is built as pure Python and runs on plain torch.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

STABLE_ABI = (2, 10)  # the first torch whose stable ABI has all that bindings.cpp uses
SOURCES = sorted(map(str, [*Path("csrc").glob("*.cpp"), *Path("csrc/cpu").glob("*.cpp")]))
CUDA_SOURCES = sorted(map(str, Path("csrc/cuda").glob("*.cu")))
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix in (".h", ".cuh"))
# Real code for what data centres and desks have, and PTX for what comes.  AUTO_GPTQ_CUDA_TARGETS=90
# builds for one of them, in a fifth of the time; AUTO_GPTQ_CUDA_TARGETS= leaves CUDA out.
CUDA_TARGETS = os.environ.get("AUTO_GPTQ_CUDA_TARGETS", "75 80 86 89 90").split()

# Files that use what only some chips have; code for 8.0 also runs on 8.6 and 8.9.
OWN_TARGETS = {
    "q_mma": ["80"],
    "q_wide_sm90": ["90a"],
    **{f"q_wgmma_{bits}": ["90a"] for bits in (2, 3, 4, 8)},
}
OWN_TARGETS |= {"route": ["80", "90"]}
OWN_TARGETS |= {f"q_experts{bits}": ["80", "90"] for bits in ("", "_2", "_3", "_4", "_8")}


def find_torch() -> Path | None:
    """Find torch's directory without importing it; None if it is absent or too old."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    release = re.match(r"(\d+)\.(\d+)", importlib.metadata.version("torch"))
    if release is None or tuple(map(int, release.groups())) < STABLE_ABI:
        return None
    directory = Path(spec.origin).parent
    return directory if (directory / "include/torch/csrc/stable/library.h").is_file() else None


def why_not() -> str | None:
    """Say why the library cannot be built here; None if it can."""
    if sys.platform != "linux":
        return f"the native library is built on Linux only, this is {sys.platform}"
    compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler})"
    if find_torch() is None:
        return "there are no headers of torch >= {}.{}".format(*STABLE_ABI)
    return None


def native_library() -> Extension:
    """Describe the library: torch is linked by name only, without a path to this machine's copy."""
    torch = find_torch()
    assert torch is not None
    target = (STABLE_ABI[0] << 56) | (STABLE_ABI[1] << 48)
    return Extension(
        "auto_gptq._native",
        SOURCES,
        depends=[*HEADERS, *CUDA_SOURCES],
        include_dirs=["csrc"],
        library_dirs=[str(torch / "lib")],
        libraries=["torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", f"0x{target:016x}")],
        extra_compile_args=[
            *("-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=fast"),
            "-Wno-psabi",  # vectors are only passed between functions that get inlined
            # -isystem keeps the warnings of torch's own headers out of the build's output.
            *("-isystem", str(torch / "include")),
        ],
        language="c++",
    )


def cuda_libraries(nvcc: Path) -> list[str]:
    """Ask the compiler where its toolkit lies: what is on the PATH may be a link or a script."""
    command = [str(nvcc), "--dryrun", "-x", "cu", "/dev/null"]
    plan = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    return [] if top is None else [f"{top[1]}/{name}" for name in ("lib64", "lib")]


def code_for(source: str) -> list[str]:
    """Give the compiler's options for what one file is compiled to."""
    own = OWN_TARGETS.get(Path(source).stem)
    targets = own or CUDA_TARGETS
    options = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in targets]
    if not targets[-1].endswith("a"):  # PTX for what comes, except of one chip's own instructions
        options.append("-gencode=arch=compute_{0},code=compute_{0}".format(targets[-1]))
    return options


class BuildNative(build_ext):
    """Name the file without the ABI tag of one Python: it does not use Python's C API."""

    def build_extension(self, extension: Extension) -> None:
        nvcc = shutil.which("nvcc")
        if nvcc is not None and CUDA_TARGETS:
            self.add_cuda(extension, Path(nvcc))
        super().build_extension(extension)

    def add_cuda(self, extension: Extension, nvcc: Path) -> None:
        """Compile the GPU kernels, which know no torch, and link CUDA's runtime in."""
        for source in CUDA_SOURCES:
            target = Path(self.build_temp) / f"{Path(source).stem}.cuda.o"
            target.parent.mkdir(parents=True, exist_ok=True)
            options = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0"]
            self.spawn([str(nvcc), *options, *code_for(source), "-c", source, "-o", str(target)])
            extension.extra_objects.append(str(target))
        extension.define_macros.append(("AUTO_GPTQ_CUDA", "1"))
        extension.library_dirs += cuda_libraries(nvcc)
        extension.libraries += ["cudart_static", "rt", "pthread", "dl"]

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"


class NativeWheel(bdist_wheel):
    """Tag the wheel for every Python of one platform."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


class PureBuild(build_py):
    """Say in one line that the package comes without its library."""

    def run(self) -> None:
        super().run()
        self.announce(f"auto-gptq is built as pure Python: {why_not()}.", level=logging.WARNING)


if why_not() is None:
    setup(
        ext_modules=[native_library()],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": NativeWheel},
    )
else:
    setup(cmdclass={"build_py": PureBuild})
