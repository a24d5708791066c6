#!/bin/sh
# Makes a release of a built plugin: checks liblminf_tensorrt.so and names it after what it runs on.
#
#   sh plugins/release.sh BUILD OUT
#
# BUILD is a build folder of cmake -S plugins; OUT gets
# liblminf_tensorrt-VERSION-cudaMAJOR.MINOR-linux-MACHINE.so and its SHA-256. Refused is a library
# without a function that is to be there, without the mark of its CUDA runtime, or (where cuobjdump
# is) without machine code for a GPU it was configured for.
set -eu
build=$1 out=$2
library=$build/liblminf_tensorrt.so
fail() {
  echo "error: $*" >&2
  exit 2
}
[ -f "$library" ] ||
  fail "$library is not there: configure with -DTENSORRT_INCLUDE_DIR=DIR, and with nvcc on the path"
[ -f "$build/release.txt" ] || fail "$build was not configured by this cmake -S plugins"
version=$(sed -n 's/^version //p' "$build/release.txt")
functions=$(nm -D --defined-only "$library")
for name in getCreators setLoggerFinder lminfCachesInPlace lminfCachesApart lminfRecordCaches \
  lminfCudaRuntime; do
  echo "$functions" | grep -q " T $name\$" || fail "$library does not export $name"
done
cuda=$(grep -a -o 'lminf_tensorrt CUDA runtime [0-9]*' "$library" | sed 's/.* //' | head -n 1)
[ "${cuda:-0}" -gt 0 ] || fail "$library does not say which CUDA runtime it holds"
if command -v cuobjdump >/dev/null; then
  held=$(cuobjdump --list-elf "$library")
  for gpu in $(sed -n 's/^gpus //p' "$build/release.txt" | tr ';' ' '); do
    case $gpu in
      *-virtual) continue ;;
    esac
    number=${gpu%-real}
    echo "$held" | grep -q "sm_$number\." || fail "$library has no machine code for sm_$number"
  done
else
  echo "note: cuobjdump is not here, so nobody looked for which GPUs the library has code" >&2
fi
name=liblminf_tensorrt-$version-cuda$((cuda / 1000)).$((cuda % 1000 / 10))-linux-$(uname -m).so
mkdir -p "$out"
cp "$library" "$out/$name"
(cd "$out" && sha256sum "$name" >"$name.sha256")
echo "$out/$name"
