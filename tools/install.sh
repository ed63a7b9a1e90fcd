#!/usr/bin/env bash
# Makes the virtual environment $1 and installs this checkout into it, editable, with the developers'
# tools. $PYTHON names the interpreter, $TORCH the requirement for torch.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$1
python=$(bash tools/find_python.sh)

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    echo "Making $venv with $python"
    "$python" -m venv --clear "$venv"
fi

# torch comes first and alone: once the wanted build is there, no other requirement replaces it.
"$venv/bin/python" -m pip install "${TORCH:-torch==2.13.0}"
"$venv/bin/python" -m pip install -e '.[dev]'
