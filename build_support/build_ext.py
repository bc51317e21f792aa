"""The build command: torch's, the CPU's kernels, vectors' once per CPU capability, and CUDA."""

import logging
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from setuptools import Extension
from setuptools.errors import CompileError, LinkError

# torch's own search for a toolkit, run at this import, warns about a machine without a GPU.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
from torch.utils import cpp_extension  # noqa: E402

from build_support.checks import check_compiler, cxx, fail  # noqa: E402
from build_support.toolkit import Toolkit, arch_list, choose_toolkit  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

COMPILE_FIX = (
    "\nCompilation failed; the first line above with 'error:' says why. Where the machine ran out "
    "of memory ('Killed'), build with fewer jobs: MAX_JOBS=1"
)
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    # at::parallel_for is a header: without this it runs on one thread and says nothing.
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wconversion",
]
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-extended-lambda"]  # and torch's own


class Capability(NamedTuple):
    """What csrc/cpu/simd/ is compiled with, once for each; numbered as dlops::cpu::Capability."""

    name: str
    vec: str  # torch's name for it in CPU_CAPABILITY, which ATen/cpu/vec goes by
    flags: list[str]


AVX2_SETS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_SETS = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", *AVX2_SETS]
# g++ 12 takes the undefined registers of its own AVX-512 intrinsics for uninitialised variables.
AVX512_QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
CAPABILITIES = [Capability("baseline", "DEFAULT", [])]
if platform.machine() == "x86_64":
    avx512_flags = [*AVX512_SETS, "-mprefer-vector-width=512", *AVX512_QUIET]
    CAPABILITIES += [
        Capability("AVX2", "AVX2", AVX2_SETS),
        Capability("AVX512", "AVX512", avx512_flags),
    ]


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def extension() -> Extension:
    """The module dlops._C, without what depends on the build machine: BuildExt adds that."""
    return cpp_extension.CppExtension("dlops._C", sources("csrc/*.cpp"))


def job_count() -> int:
    """MAX_JOBS, or one job per core while each has 3 GB of memory."""
    asked = os.environ.get("MAX_JOBS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // (3 << 30)))


def extra_flags() -> list[str]:
    """Flags for compiler and linker after our own, such as scripts/sanitize.sh's."""
    return shlex.split(os.environ.get("DLOPS_CXX_FLAGS", ""))


def capabilities() -> dict[int, Capability]:
    """What the vector kernels are compiled for, by level: DLOPS_CPU_CAPABILITY alone, or all."""
    every = dict(enumerate(CAPABILITIES))
    wish = os.environ.get("DLOPS_CPU_CAPABILITY", "")
    if not wish:
        return every
    names = [capability.name for capability in CAPABILITIES]
    if wish not in names:
        fail(f"DLOPS_CPU_CAPABILITY={wish!r} is not understood. Fix: {', '.join(names)} or unset.")
    return {level: capability for level, capability in every.items() if capability.name == wish}


def only_capability() -> list[tuple[str, str]]:
    """The macro that says so where the vector kernels are compiled for one level alone."""
    every = len(capabilities()) == len(CAPABILITIES)
    return [] if every else [("DLOPS_ONLY_CAPABILITY", str(*capabilities()))]


def warnings_are_errors() -> bool:
    """Off for users: a newer compiler's new warning must not stop an installation."""
    return os.environ.get("DLOPS_WERROR") == "1"


def path_maps() -> list[str]:
    """Keep the build machine's paths out of the binary (__FILE__ in torch's check macros)."""
    torch_parent = Path(torch.__file__).parent.parent
    return [f"-ffile-prefix-map={torch_parent}/=", f"-ffile-prefix-map={ROOT}/="]


def find_own_ninja() -> None:
    """The environment's ninja, which is not on PATH where the environment was not activated."""
    scripts = sysconfig.get_path("scripts")
    os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])


class BuildExt(cpp_extension.BuildExtension):
    def __init__(self, *args, **kwargs):
        find_own_ninja()
        super().__init__(*args, **kwargs)

    def finalize_options(self):
        super().finalize_options()
        # Without ninja, setuptools would see neither changed headers nor a changed torch.
        self.force = True
        if self.editable_mode:
            # pip would build in a fresh temporary folder, and so everything, at every install.
            tag = f"{self.plat_name}-{sys.implementation.cache_tag}"
            self.build_temp = str(ROOT / "build" / f"temp.{tag}")

    def run(self):
        check_compiler()
        os.environ["MAX_JOBS"] = str(job_count())
        super().run()
        self.write_build_config()

    def build_extensions(self):
        (ext,) = self.extensions
        toolkit, self.cuda_reason = choose_toolkit(torch.version.cuda)
        self.configure(ext)
        self.drop_run_paths()
        if toolkit:
            self.configure_cuda(ext, toolkit)
            print(f"dlops: building for the CPU and CUDA {toolkit.version} ({toolkit.home})")
        else:
            print(f"dlops: building for the CPU only: {self.cuda_reason}")
        self.define_build_info(ext, toolkit)
        ext.extra_objects = self.build_cpu_objects(ext)
        try:
            super().build_extensions()
        except ValueError as error:  # torch's, about an architecture that it does not know
            fail(f"TORCH_CUDA_ARCH_LIST={arch_list()!r}: {error}. Fix: give it as '8.0+PTX;9.0a'")
        except (RuntimeError, CompileError, LinkError) as error:
            fail(f"{error}{COMPILE_FIX}")

    def configure(self, ext):
        # As system headers, so that our warnings are about our code.
        system = [flag for path in ext.include_dirs for flag in ("-isystem", path)]
        ext.include_dirs = [str(ROOT / "csrc")]
        strict = ["-Werror"] if warnings_are_errors() else []
        flags = [*CXX_FLAGS, *strict, *path_maps(), *system, *extra_flags()]
        ext.extra_compile_args = {"cxx": flags}
        # Debug information stays where it was asked for.
        asked = any(flag.startswith("-g") for flag in extra_flags())
        strip = [] if asked else ["-Wl,--strip-debug"]
        ext.extra_link_args = ["-fopenmp", *strip, *extra_flags()]

    def drop_run_paths(self):
        """A Python that was linked with a run path hands it down: this machine's, in the binary."""
        for name in ("linker_so", "linker_so_cxx"):
            command = getattr(self.compiler, name, None) or []
            setattr(self.compiler, name, [w for w in command if not w.startswith("-Wl,-rpath")])

    def configure_cuda(self, ext, toolkit: Toolkit):
        os.environ["TORCH_CUDA_ARCH_LIST"] = arch_list()
        cpp_extension.CUDA_HOME = str(toolkit.home)
        system = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
        strict = ["-Werror", "all-warnings"] if warnings_are_errors() else []
        host = ["-fopenmp", "-fvisibility=hidden", "-Wall", *path_maps()]
        ext.extra_compile_args["nvcc"] = [
            *NVCC_FLAGS,
            *strict,
            *(flag for option in host for flag in ("-Xcompiler", option)),
            *system,
        ]
        ext.sources += sources("csrc/cuda/*.cu")
        ext.libraries += ["c10_cuda", "torch_cuda"]
        # By its full path: the name recorded in the binary is the library's own, libcudart.so.N.
        ext.extra_link_args.append(str(toolkit.cudart))

    def define_build_info(self, ext, toolkit: Toolkit | None):
        texts = {
            "VERSION": self.distribution.get_version(),
            "TORCH_VERSION": torch.__version__,
            "CPU_CAPABILITIES": " ".join(capability.name for capability in capabilities().values()),
            "CUDA_REASON": self.cuda_reason,
            "CUDA_VERSION": toolkit.version if toolkit else "",
            "CUDA_ARCH_LIST": arch_list() if toolkit else "",
        }
        quoted = {
            name: text.replace("\\", "\\\\").replace('"', '\\"') for name, text in texts.items()
        }
        ext.define_macros += [(f"DLOPS_{name}", f'"{text}"') for name, text in quoted.items()]
        if toolkit:
            ext.define_macros.append(("DLOPS_WITH_CUDA", "1"))
        ext.define_macros += only_capability()

    def build_cpu_objects(self, ext) -> list[str]:
        """csrc/cpu/*.cpp, and csrc/cpu/simd/*.cpp once per capability.

        They are the same whatever else is in the build, so one build may take them from another
        (scripts/cuda_compile.sh). Baseline first: where an inline function ends up in several
        objects the linker keeps the first, and that one must run on every machine.
        """
        folder = Path(self.build_temp).absolute() / "cpu"
        common = [*cxx(), "-fPIC", "-DNDEBUG", f"-I{ROOT / 'csrc'}", *ext.extra_compile_args["cxx"]]
        common += [f"-D{name}={value}" for name, value in only_capability()]
        jobs = [object_of(source, folder, common) for source in sources("csrc/cpu/*.cpp")]
        for level, (name, vec, flags) in capabilities().items():
            defines = [
                f"CPU_CAPABILITY={vec}",
                f"CPU_CAPABILITY_{vec}",
                f"DLOPS_CAPABILITY={level}",
            ]
            command = [*common, *flags, *(f"-D{define}" for define in defines)]
            jobs += [
                object_of(source, folder / name, command)
                for source in sources("csrc/cpu/simd/*.cpp")
            ]
        stale = [job for job in jobs if not is_fresh(*job)]
        with ThreadPoolExecutor(job_count()) as pool:
            failures = [text for text in pool.map(lambda job: compile_object(*job), stale) if text]
        if failures:
            fail("\n".join(failures) + COMPILE_FIX)
        return [str(target) for target, _ in jobs]

    def write_build_config(self):
        """What dlops/_load.py compares with the running torch, readable without the binary."""
        folder = Path(self.get_ext_fullpath("dlops._C")).parent
        (folder / "_build_config.py").write_text(
            "# Written by the build.\n"
            f"TORCH_VERSION = {str(torch.__version__)!r}\n"
            f"TORCH_CUDA = {torch.version.cuda!r}\n"
            f"WITH_CUDA = {not self.cuda_reason}\n"
            f"CUDA_REASON = {self.cuda_reason!r}\n"
        )


def object_of(source: str, folder: Path, command: list[str]) -> tuple[Path, list[str]]:
    """Where a source's object goes, and the command that makes it but for that."""
    return folder / f"{Path(source).stem}.o", [*command, "-MMD", "-c", str(ROOT / source)]


def signature(command: list[str]) -> str:
    return f"{shlex.join(command)}\ntorch {torch.__version__}\n"


def is_fresh(target: Path, command: list[str]) -> bool:
    """Whether `target` was made by this command from files that have not changed since."""
    recorded, dependencies = target.with_suffix(".cmd"), target.with_suffix(".d")
    if not (target.exists() and dependencies.exists() and recorded.exists()):
        return False
    if recorded.read_text() != signature(command):
        return False
    _, _, files = dependencies.read_text().replace("\\\n", " ").partition(":")
    made = target.stat().st_mtime
    return all(os.path.exists(file) and os.stat(file).st_mtime <= made for file in files.split())


def compile_object(target: Path, command: list[str]) -> str:
    """Compile; the compiler's messages where it fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"dlops: compiling {target.parent.name}/{target.stem}\n", end="", flush=True)
    result = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
    if result.returncode != 0:
        return result.stderr
    print(result.stderr, end="", flush=True)
    target.with_suffix(".cmd").write_text(signature(command))
    return ""
