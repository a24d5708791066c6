#!/bin/sh
# Builds ./generate from generate.cc.
#
#   sh build.sh                              with the library of Python's onnxruntime wheel
#   ONNXRUNTIME_ROOT=DIR sh build.sh         with include/ and lib/ of a release archive
#   OUT=PATH CXX=COMPILER PYTHON=PROGRAM     may be set, too
set -eu
here=$(cd -- "$(dirname -- "$0")" && pwd)
out=${OUT:-$here/generate}
if [ -n "${ONNXRUNTIME_ROOT:-}" ]; then
  include=$ONNXRUNTIME_ROOT/include
  library=$ONNXRUNTIME_ROOT/lib/libonnxruntime.so
else
  # The wheel has no header: the one beside this script declares what generate.cc uses.
  include=$here/include
  library=$("${PYTHON:-python3}" -c '
import glob, os, onnxruntime
print(glob.glob(os.path.join(os.path.dirname(onnxruntime.__file__), "capi", "libonnxruntime.so.*"))[0])
' 2>/dev/null) || {
    echo "error: ${PYTHON:-python3} has no onnxruntime with a library; set PYTHON or ONNXRUNTIME_ROOT" >&2
    exit 2
  }
fi
# The program looks for libonnxruntime.so.1, which a wheel has under another name.
mkdir -p "$out.lib"
ln -sf -- "$library" "$out.lib/libonnxruntime.so.1"
ln -sf -- libonnxruntime.so.1 "$out.lib/libonnxruntime.so"
"${CXX:-c++}" -std=c++17 -O2 -Wall -Wextra -isystem "$include" "$here/generate.cc" -o "$out" \
  -L "$out.lib" -lonnxruntime -Wl,-rpath,"$out.lib"
echo "$out"
