#!/usr/bin/env bash
# Lint the protos, compare the checked-in stubs with fresh ones, and refuse breaking changes (internal scoring.proto
# apart, see buf.yaml) against the protos as they were before the latest change: the committed ones where the working
# tree differs from them, else those before the last commit that touched them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
(cd protos && buf lint)

work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
protos/stubs.sh "$work/fresh"
for stub in "$work"/fresh/double11/v1/*_pb2*; do
  cmp "$stub" "protos/double11/v1/$(basename "$stub")" || { echo 'The stubs are not those of the protos: run make protos and commit.' >&2; exit 1; }
done

git rev-parse --quiet --verify HEAD >/dev/null || { echo 'buf breaking: not a git checkout, nothing to compare with'; exit 0; }
base=HEAD
git diff --quiet HEAD -- 'protos/*.proto' && base=$(git log -1 --format=%H -- 'protos/*.proto')^
if git cat-file -e "$base:protos/double11" 2>/dev/null; then
  mkdir "$work/base"; git archive "$base" protos | tar -x -C "$work/base"
  (cd protos && buf breaking --against "$work/base/protos")
else
  echo "buf breaking: no earlier protos, nothing to compare with"
fi
