#!/usr/bin/env bash
# Builds, tests and measures the CUDA and the Triton backend on a machine with an NVIDIA GPU: no
# network, 9 minutes.
#
#   bash benchmarks/gpu.sh              everything; rows go to benchmarks/results/local, which git ignores
#   bash benchmarks/gpu.sh --quick      a minute: what is installed, few cases, no rows
#   bash benchmarks/gpu.sh --dry-run    without a GPU: the same steps on the CPU, no figures
#   bash benchmarks/gpu.sh --logs DIR   keeps the log of every stage there, and a copy of the rows
#   bash benchmarks/gpu.sh --goals      shows what the project works towards on an H200, too
#   bash benchmarks/gpu.sh --record     rows go to the project's own file, benchmarks/results/<gpu>.csv
#
# PYTHON=/path/to/python chooses the Python; it needs torch, and setuptools and pybind11 to build.
set -uo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=$(command -v "${PYTHON:-python3}") || { echo "no ${PYTHON:-python3} on PATH" >&2; exit 2; }
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
mode=full goals=() record=()
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
logs=$work/logs
while [ $# -gt 0 ]; do
  case $1 in
    --quick) mode=quick ;;
    --dry-run) mode=dry ;;
    --goals) goals=(--goals) ;;
    --record) record=(--record) ;;
    --logs) logs=$2 && shift ;;
    *) sed -n '2,13s/^# \{0,1\}//p' "$0" && exit 2 ;;
  esac
  shift
done
[ "$mode" != dry ] || [ "${#record[@]}" -eq 0 ] || { echo "--dry-run measures nothing" >&2; exit 2; }
mkdir -p "$logs" && logs=$(cd "$logs" && pwd)
[ -d /usr/local/cuda/bin ] && PATH=$PATH:/usr/local/cuda/bin
export PATH PYTHONUNBUFFERED=1

# From here Python finds the benchmarks of the checkout, and the package where pip installed it.
ln -s "$root/benchmarks" "$work/benchmarks"
cd "$work" || exit 2

total=525 # seconds; the rest of the 9 minutes is for what cannot be foreseen
summary=$work/summary
failed=0

note() { printf '| %s | %s | %s | %s |\n' "$1" "$2" "$3" "$4" >>"$summary"; }

# The last line of a log that matches, cut to what a table has room for.
last() { grep -E "$2" "$logs/$1.log" | tail -n 1 | tr '|' '/' | cut -c 1-110; }

# stage NAME LIMIT RESERVE COMMAND...: at most LIMIT seconds, and RESERVE seconds stay for the rest.
# Sets `status`: 0, the command's own, 124 when the time was up, 125 when there was none.
stage() {
  local name=$1 limit=$2 room=$((total - SECONDS - $3))
  shift 3
  [ "$limit" -lt "$room" ] || limit=$room
  if [ "$limit" -lt 5 ]; then
    status=125 seconds=0
    echo "no time left" >"$logs/$name.log"
    return
  fi
  printf '\n==> %3ds  %s (at most %ds)\n' "$SECONDS" "$name" "$limit"
  local start=$SECONDS
  # SIGINT: pytest and the benchmark then still print what they have
  timeout -s INT -k 10 "$limit" "$@" >"$logs/$name.log" 2>"$logs/$name.err"
  status=$?
  [ "$status" -ne 137 ] || status=124
  cat "$logs/$name.err" >>"$logs/$name.log"
  rm "$logs/$name.err"
  seconds=$((SECONDS - start))
}

# Judges the last stage: result, and on a failure the end of its log. `may_stop`: time up is no failure.
may_stop=0
judge() {
  local name=$1 detail=$2 result=passed
  case $status in
    0) ;;
    124) result='TIME UP' ;;
    125) result='no time' ;;
    *) result=FAILED ;;
  esac
  [ "$result" = passed ] || { [ "$may_stop" = 1 ] && [ "$result" != FAILED ]; } || failed=1
  [ "$result" = passed ] || grep -v '^USDT' "$logs/$name.log" | tail -n 40
  note "$name" "$result" "$seconds" "$detail"
}

skip() { note "$1" skipped 0 "$2"; }

run_pytest() { # NAME LIMIT RESERVE ARGUMENTS...
  local name=$1 limit=$2 reserve=$3
  shift 3
  # not `python -m pytest` in the checkout: that would test the sources, without the built module
  stage "$name" "$limit" "$reserve" "$python" -m pytest -q -c "$root/pyproject.toml" \
    --rootdir "$root" -p no:cacheprovider "$@"
  local found
  found=$(last "$name" '[0-9]+ (passed|failed|error|skipped)')
  case $found in
    *failed* | *error*) [ "$status" -ne 124 ] || status=1 ;;
    *passed*) ;;
    *) [ "$status" -ne 0 ] || status=1 ;; # nothing ran: that proves nothing
  esac
  judge "$name" "$found"
}

sanitize() { # NAME TOOL BACKEND KERNELS...: in the options' own words
  local name=$1 tool=$2 backend=$3 kernels=() found
  for found in "${@:4}"; do kernels+=(--kernel-name "$found"); done
  stage "$name" 40 200 compute-sanitizer --tool "$tool" "${kernels[@]}" \
    --error-exitcode 99 --print-limit 5 "$python" -m benchmarks.gpu.sanitize "$backend"
  found=$(last "$name" '(ERROR|RACECHECK) SUMMARY')
  if [ "$status" -eq 99 ] || { [ "$status" -eq 0 ] && [ -n "$found" ]; }; then
    judge "$name" "${found#========= }"
  else # the tool itself does not work on every machine: that is no finding about the kernels
    note "$name" 'not run' "$seconds" "status $status: $(tail -n 1 "$logs/$name.log" | tr '|' '/' | cut -c 1-90)"
  fi
}

# ---- environment --------------------------------------------------------------------------------

stage environment 60 0 bash -c '
  "$0" -m torch.utils.collect_env
  for tool in nvcc g++ cmake ninja ncu compute-sanitizer nvidia-smi; do
    command -v "$tool" || echo "not on PATH: $tool"
  done
  "$0" -c "import importlib.util as u, sys; [print(n, \"is\" if u.find_spec(n) else \"is NOT\", \"here\") for n in sys.argv[1:]]" \
    numpy scipy setuptools pybind11 pytest hypothesis xdist expecttest sklearn matplotlib tqdm triton \
    transformer_engine apex flashoptim bitsandbytes deepspeed
  "$0" -c "import torch, torch.distributed as d; print(\"NCCL is\", \"here\" if d.is_available() and d.is_nccl_available() else \"NOT here\", \"for\", torch.cuda.device_count(), \"GPUs\")"' "$python"
cat "$logs/environment.log"
gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name(), "sm_%d%d" % torch.cuda.get_device_capability())' 2>/dev/null)
if [ -z "$gpu" ] && [ "$mode" != dry ]; then
  echo "No NVIDIA GPU that torch can use; bash benchmarks/gpu.sh --dry-run needs none." >&2
  exit 2
fi
gpu="gpu  ${gpu:-none}"
note environment passed "$seconds" "$gpu"

# ---- build and install --------------------------------------------------------------------------

if [ "$mode" = full ]; then
  arch=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  stage build 150 330 env FUSEDOPT_CUDA=1 "TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$arch}" \
    "$python" -m pip install --no-build-isolation --no-deps --no-index \
    --disable-pip-version-check "$root"
  judge build "$(last build '(Successfully|rror)')"
  built=$status
else
  skip build "$mode: what is installed is used"
  built=0
fi
stage report 60 0 "$python" -m fusedopt
cat "$logs/report.log"
judge report "$(last report '^module _cuda|^backend cuda')"

# ---- tests --------------------------------------------------------------------------------------

has() { "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }

gpu_tests=$(grep -lE '= (on_gpu|runners)\(\)?|mark\.gpu\b' "$root"/tests/*/test_*.py)
if [ "$mode" = quick ]; then
  skip tests "quick"
elif ! has pytest; then
  skip tests "pytest is not installed"
elif [ -z "$gpu_tests" ]; then
  skip tests "there are no tests marked gpu"
elif [ "$mode" = dry ]; then
  may_stop=1 # a CPU takes its time to stand in for a GPU
  # shellcheck disable=SC2086
  FUSEDOPT_TEST_GPU=shim run_pytest tests-cuda 30 0 -m gpu -x $gpu_tests
  # shellcheck disable=SC2086
  ! has triton || FUSEDOPT_TEST_GPU=interpreter run_pytest tests-triton 30 0 -m gpu -x $gpu_tests
  may_stop=0
elif [ "$built" -eq 0 ]; then
  # a few processes share the GPU: most of a test is its twin on the CPU
  workers=()
  ! has xdist || workers=(-n 4)
  # shellcheck disable=SC2086
  FUSEDOPT_TEST_GPU=cuda FUSEDOPT_REQUIRE_CUDA=1 \
    run_pytest tests-cuda 110 290 -m gpu "${workers[@]}" $gpu_tests
  if has triton; then
    # shellcheck disable=SC2086
    FUSEDOPT_TEST_GPU=triton FUSEDOPT_REQUIRE_TRITON=1 \
      run_pytest tests-triton 120 220 -m gpu "${workers[@]}" $gpu_tests
  else
    skip tests-triton "Triton is not installed"
  fi
  ! has xdist || workers=(-n "$(nproc)")
  # the kernels through the shim, the machine code, the build: what needs no GPU
  may_stop=1
  run_pytest other-tests 60 215 -m 'not gpu and not clients' "${workers[@]}" \
    "$root"/tests/{cuda,triton_backend} "$root"/tests/installation/test_build_cuda.py
  may_stop=0
fi

# ---- compute-sanitizer --------------------------------------------------------------------------

if [ "$mode" = dry ]; then
  for backend in cuda triton; do
    stage "sanitized-$backend" 120 0 "$python" -m benchmarks.gpu.sanitize "$backend" --dry-run
    judge "sanitized-$backend" "on the CPU, without the tool: $(grep -c 'same bits' "$logs/sanitized-$backend.log") cases agree"
  done
elif [ "$mode" = quick ]; then
  skip memcheck quick
elif ! command -v compute-sanitizer >/dev/null; then
  skip memcheck "compute-sanitizer is not on PATH"
elif [ "$built" -eq 0 ]; then
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # every tensor an allocation of its own, with known ends
  sanitize memcheck memcheck cuda kns=fusedopt
  sanitize racecheck racecheck cuda kns=fusedopt
  ! has triton || sanitize memcheck-triton memcheck triton \
    kne=reduce_kernel kne=finalize_kernel kne=update_kernel
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
fi

# ---- benchmark ----------------------------------------------------------------------------------

keep_rows() { # NAME OF THE STAGE: a copy of its rows beside the logs
  local rows
  rows=$(sed -n 's/^rows in //p' "$logs/$1.log")
  [ -z "$rows" ] || [ ! -e "$rows" ] || cp "$rows" "$logs/"
}

sweep=65 # seconds kept back for the kernels over sizes
options=() kernel_options=(--budget 45)
[ "$mode" != dry ] || options=(--dry-run) kernel_options=(--dry-run)
[ "$mode" != quick ] || options=(--quick --budget 35) kernel_options=(--quick --budget 10)
if [ "$built" -eq 0 ]; then
  [ "$mode" != full ] || options=(--budget $((total - SECONDS - 25 - sweep)))
  stage benchmark 500 $((5 + sweep)) "$python" -m benchmarks.gpu.step "${options[@]}" \
    "${goals[@]}" "${record[@]}"
  grep -v '^USDT' "$logs/benchmark.log"
  judge benchmark "$(last benchmark '^(rows in|no rows)')"
  keep_rows benchmark
  may_stop=1 # the larger sizes are then missing, and nothing else
  stage kernels "$sweep" 5 "$python" -m benchmarks kernels --backends cuda triton \
    "${kernel_options[@]}" "${record[@]}"
  grep -v '^USDT' "$logs/kernels.log"
  judge kernels "$(last kernels '^(rows in|no rows)')"
  may_stop=0
  keep_rows kernels
else
  note benchmark 'not run' 0 "the build failed"
  note kernels 'not run' 0 "the build failed"
fi

# ---- the short table ----------------------------------------------------------------------------

printf '\n%s\n\n' "$gpu"
printf '| stage | result | s | |\n|---|---|---|---|\n'
cat "$summary"
printf '\n%d s in all' "$SECONDS"
[ "$mode" != dry ] || printf '; DRY RUN: nothing was measured'
printf '\n'
exit "$failed"
