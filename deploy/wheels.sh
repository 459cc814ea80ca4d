#!/bin/sh
# Wheels of the last commit with the kernels, for Linux on x86-64 and on 64-bit Arm: deploy/wheels.sh OUT PYTHON
#
# PYTHON has build, setuptools 77 and later, jaxlib (its header) and ziglang: a C++ compiler that makes code for both processors on
# either, and links against the symbols of glibc 2.28. So the wheels are manylinux_2_28, and no container and no second machine is needed.
set -eu
out=$(mkdir -p "$1" && cd "$1" && pwd)
python=$(cd "$(dirname "$2")" && pwd)/$(basename "$2")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for machine in x86_64 aarch64; do
    mkdir "$work/$machine"
    git archive HEAD | tar -x -C "$work/$machine"
    (
        cd "$work/$machine"
        CXX="$python -m ziglang c++ -target $machine-linux-gnu.2.28" _PYTHON_HOST_PLATFORM="linux-$machine" \
            "$python" -m build --wheel --no-isolation --outdir "$out" "-C--build-option=--plat-name=manylinux_2_28_$machine"
    )
done
# What the wheel for this processor would choose here.
"$python" - "$out"/stagemesh-*_"$(uname -m)".whl << 'END'
import ctypes, sys, tempfile, zipfile
with tempfile.TemporaryDirectory() as folder:
    library = ctypes.CDLL(zipfile.ZipFile(sys.argv[1]).extract("mesh/kernels/native/kernels.so", folder))
    library.mesh_kernels_name.restype = ctypes.c_char_p
    print(f"{sys.argv[1]}: kernels {library.mesh_kernels_name().decode()}")
END
