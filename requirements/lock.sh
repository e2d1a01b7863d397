#!/usr/bin/env bash
# Pin what pyproject.toml and the .in files declare, with the hashes of the registry's files. Versions already in a lock
# are kept while they satisfy the ranges; LOCK_ARGS="--upgrade" or "--upgrade-package grpcio" moves them. Needs uv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
command -v uv >/dev/null || { echo 'make lock needs uv: python3 -m venv /tmp/uv && /tmp/uv/bin/pip install uv, then put /tmp/uv/bin on PATH' >&2; exit 1; }
compile() { # CONFIG OUT INPUTS...
  local config=$1 out=$2; shift 2
  # shellcheck disable=SC2086
  uv pip compile --quiet --config-file "requirements/$config" --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --generate-hashes --custom-compile-command 'make lock' ${LOCK_ARGS:-} "$@" -o "requirements/$out"
}
compile uv-cpu.toml build.txt requirements/build.in
compile uv-cpu.toml cpu.txt --no-emit-package torch -c requirements/build.txt pyproject.toml requirements/cpu.in
compile uv-cpu.toml dev.txt --no-emit-package torch -c requirements/cpu.txt requirements/dev.in
compile uv.toml cuda.txt -c requirements/cpu.txt pyproject.toml requirements/cuda.in
