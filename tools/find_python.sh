#!/usr/bin/env bash
# Prints the interpreter to build the virtual environment with: $PYTHON if set, else the newest of
# Python 3.12 and 3.11 that is found, runs and can make virtual environments.
set -euo pipefail

probe='import sys, venv, ensurepip; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 12) else 1)'

usable() {
    # Version managers put commands on PATH that exist and do not run, so each candidate is run.
    command -v "$1" >/dev/null 2>&1 && "$1" -c "$probe" >/dev/null 2>&1
}

if [[ -n "${PYTHON:-}" ]]; then
    if usable "$PYTHON"; then
        command -v "$PYTHON"
        exit 0
    fi
    echo "error: PYTHON=$PYTHON is not a Python 3.11 or 3.12 with venv and ensurepip; name one that is." >&2
    exit 1
fi

for candidate in python3.12 python3.11 python3 python; do
    if usable "$candidate"; then
        command -v "$candidate"
        exit 0
    fi
done

echo "error: no Python 3.11 or 3.12 with venv was found; install one (on Debian and Ubuntu: python3.11 and python3.11-venv) or name it: make install PYTHON=/path/to/python3.11" >&2
exit 1
