#!/usr/bin/env bash
# Records training steps with Nsight Systems, one report a rank, and says how much of rank 0's communication was hidden.
#   benchmarks/nsys.sh RANKS [FOLDER [layer|block|demo [options of profile_step.py]]]     FOLDER: profiles; default: all three
set -euo pipefail
ranks=${1:?"usage: benchmarks/nsys.sh RANKS [FOLDER [layer|block|demo [options of profile_step.py]]]"}
folder=${2:-profiles}
shift $(($# < 2 ? $# : 2))
if ! command -v nsys >/dev/null; then
  echo "nsys.sh: nsys is not on the PATH: install Nsight Systems (CUDA toolkits have it), https://developer.nvidia.com/nsight-systems" >&2
  exit 1
fi
python=${PYTHON:-python3}
here=$(dirname "$0")
mkdir -p "$folder"

record() {
  "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" --no-python \
    nsys profile --trace=cuda,nvtx --sample=none --cpuctxsw=none --cuda-graph-trace=node \
    --capture-range=cudaProfilerApi --capture-range-end=stop --force-overwrite=true --output="$folder/$1.rank%q{RANK}" \
    "$python" "$here/profile_step.py" "$@"
  nsys export --type=sqlite --force-overwrite=true --output="$folder/$1.rank0.sqlite" "$folder/$1.rank0.nsys-rep"
  "$python" -m tpkernels trace "$folder/$1.rank0.sqlite"
}

if [ $# -gt 0 ]; then
  record "$@"
else
  for what in layer block demo; do record "$what"; done
fi
