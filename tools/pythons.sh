#!/usr/bin/env bash
# The path of the newest Python of this machine that calm_jax runs on; nothing where there is none. For the Makefile.
#
#     tools/pythons.sh                      of all
#     tools/pythons.sh UV REQUIREMENT...    of those for which there are wheels of the requirements, without CUDA's
#                                           libraries among what they need (gigabytes, for a GPU) where that can be had
set -euo pipefail
versions=(3.14 3.13 3.12 3.11)

# Commands of that name, pyenv's folders, and what a uv on the path manages. A command may be a shim that starts nothing.
candidates() {
    command -v "python$1" || true
    find "${PYENV_ROOT:-$HOME/.pyenv}/versions" -maxdepth 3 -path "*/$1.*/bin/python" 2>/dev/null | sort -rV || true
    if command -v uv >/dev/null; then uv python find --no-python-downloads --no-project "$1" 2>/dev/null || true; fi
    command -v python3 || true
}

# Environments are made with venv and pip, which some systems pack apart.
serves() {
    "$2" -c "import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null
}

# One path a line, newest first. Who reads them may stop at the first.
found() {
    local version python
    for version in "${versions[@]}"; do
        while read -r python; do
            if serves "$version" "$python"; then
                "$python" -c 'import sys; print(sys.executable)' 2>/dev/null || return 0
                break
            fi
        done < <(candidates "$version")
    done
}

# What the requirements need on this machine with Python $2; fails where something has no wheel.
needs() {
    printf '%s\n' "${@:3}" | "$1" pip compile - --only-binary :all: --python "$2" --no-header --no-annotate --quiet
}

if (($# == 0)); then
    read -r newest < <(found) && echo "$newest"
    exit 0
fi
any=
while read -r python; do
    if listed=$(needs "$1" "$python" "${@:2}" 2>/dev/null); then
        if ! grep -qE '^(nvidia|cuda)-' <<<"$listed"; then
            echo "$python"
            exit
        fi
        any=${any:-$python}
    fi
done < <(found)
if [[ -z $any ]]; then
    echo "pythons.sh: no Python of this machine has wheels of ${*:2}" >&2
    exit 1
fi
echo "pythons.sh: ${*:2} comes with CUDA's libraries here; UV_TORCH_BACKEND=cpu takes PyTorch's builds without them" >&2
echo "$any"
