"""Builds the kernels (mesh/kernels/native) where there is a C++ compiler; everything else about the package is in pyproject.toml.

Without a compiler, or with MESH_NO_KERNELS set, the package is pure Python, and its products are XLA's. The header that the kernels need
comes with jaxlib, so jaxlib is needed for the build as well, but only then.
"""

import os
import shlex
import shutil
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path("mesh/kernels/native")
FLAGS = [
    "-std=c++17",
    "-O2",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-fPIC",
    "-pthread",
    "-DNDEBUG",
    "-w",
    "-Wno-psabi",
]


def compiler():
    """The command of a C++ compiler, or None."""
    wanted = shlex.split(os.environ.get("CXX", "")) or next(([name] for name in ("g++", "clang++", "c++") if shutil.which(name)), [])
    return wanted if wanted and shutil.which(wanted[0]) else None


def wanted():
    posix = os.name == "posix" and sysconfig.get_platform().rpartition("-")[2] in ("x86_64", "aarch64", "arm64")
    return posix and not os.environ.get("MESH_NO_KERNELS") and compiler() is not None


class BuildKernels(build_ext):
    """One shared library, which Python never imports: it has no entry of Python's, and serves every version of it."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = Path(self.build_temp) / "kernels"
        objects.mkdir(parents=True, exist_ok=True)
        [headers] = find_spec("jaxlib").submodule_search_locations
        command = [*compiler(), *FLAGS, f"-I{headers}/include"]

        def compiled(source):
            made = objects / Path(source).with_suffix(".o").name
            self.spawn([*command, "-c", source, "-o", str(made)])
            return str(made)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = list(pool.map(compiled, ext.sources))
        self.spawn([*compiler(), "-shared", "-pthread", "-static-libstdc++", "-static-libgcc", "-s", *made, "-o", str(target)])


class PlatformWheel(bdist_wheel):
    """For any Python on this platform."""

    def get_tag(self):
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


kernels = Extension(
    "mesh.kernels.native.kernels", sorted(map(str, NATIVE.glob("*.cpp"))), depends=sorted(map(str, NATIVE.glob("*"))), optional=True
)
build = wanted()
setup(
    ext_modules=[kernels] if build else [],
    setup_requires=["jaxlib>=0.10,<0.12"] if build else [],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
