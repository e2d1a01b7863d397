#!/usr/bin/env bash
# stubs.sh OUT: generate the Python stubs of protos/double11 into OUT/double11/v1.
set -euo pipefail
mkdir -p "$1"; out=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")"
python -m grpc_tools.protoc -I . --python_out="$out" --grpc_python_out="$out" --mypy_out=quiet:"$out" --mypy_grpc_out=quiet:"$out" double11/v1/*.proto
