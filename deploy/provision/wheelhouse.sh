#!/bin/bash
# wheelhouse.sh FOLDER [PYTHON]: fills FOLDER with the wheels of stagemesh and of everything in requirements.lock, for machines that
# reach no package index. PYTHON must be of the version that those machines have. What is fetched is checked against the lock's hashes.
set -euo pipefail
FOLDER=${1:?a folder for the wheels}
PYTHON=${2:-python3}
HERE=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$FOLDER"
pip() { "$PYTHON" -m pip --quiet --disable-pip-version-check "$@"; }
# one of the packages has no wheel in the index: it is built here, so that no machine needs a compiler
pip wheel --require-hashes --no-deps -r "$HERE/requirements.lock" --wheel-dir "$FOLDER"
rm -f "$FOLDER"/stagemesh-*.whl
pip wheel --no-deps --wheel-dir "$FOLDER" "$HERE"
rm -rf "$HERE/build"
# grep reads to the end: with -q it would leave early, and what still writes to it would fail
if [ -z "${MESH_NO_KERNELS:-}" ] && ! "$PYTHON" -m zipfile -l "$FOLDER"/stagemesh-*.whl | grep kernels/native/kernels.so > /dev/null; then
  echo "the wheel of stagemesh has no kernels: install g++, or set MESH_NO_KERNELS=1 for machines that are to compute without them" >&2
  exit 2
fi
(cd "$FOLDER" && sha256sum -- *.whl > SHA256SUMS)
echo "$FOLDER: $(wc -l < "$FOLDER/SHA256SUMS") wheels, $(du -sh "$FOLDER" | cut -f1)" >&2
