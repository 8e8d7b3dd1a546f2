#!/usr/bin/env bash
# Sets up everything that `make demo` and `make test` need: Debian libraries, then .venv with this project in it.
#
#   ./setup.sh                     both
#   ./setup.sh --system-packages   the Debian libraries only
#   ./setup.sh --test-packages     those, and what some tests skip without: a browser to open reports in,
#                                  ffmpeg, SLURM, shellcheck
#
# Environment:  PYTHON           the interpreter to build .venv from (default: the first python3 that is >= 3.11)
#               TORCH_INDEX_URL  where pip takes torch from, for example a CPU-only or a CUDA 13 wheel index
#               PIP_ARGS         further arguments for every `pip install` (--verbose to see what it does)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

VENV=.venv
EXTRAS=data,ros,similarity,train,sim,dev

fail() { # said on one line, before anything slow
    echo "setup: $*" >&2
    exit 2
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "needs Python 3.11 or newer, but ${PYTHON:-python3} is $("${PYTHON:-python3}" --version 2>/dev/null || echo missing);" \
        "install one and run: make setup PYTHON=/path/to/python3.11"
}

FOR_TESTS=false
[ "${1:-}" != --test-packages ] || FOR_TESTS=true
LIBRARIES=$(ldconfig -p 2>/dev/null || /sbin/ldconfig -p 2>/dev/null || true)

is_installed() { # by library, or by Debian package where no library tells
    [[ $LIBRARIES == *"lib$2"* ]] || dpkg -s "$1" >/dev/null 2>&1
}

# Newer releases have dropped OSMesa; MuJoCo draws the same pixels through EGL there.
has_no_osmesa() {
    [ -n "$(apt-cache show libegl1 2>/dev/null)" ] && [ -z "$(apt-cache show libosmesa6 2>/dev/null)" ]
}

missing_packages() {
    local python=$1 version
    version=$("$python" -c 'import sys; print(f"{sys.version_info.major}.{sys.version_info.minor}")')
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo "python$version-venv"
    # MuJoCo renders offscreen through these.
    is_installed libosmesa6 OSMesa.so || has_no_osmesa || echo libosmesa6
    is_installed libegl1 EGL.so.1 || echo libegl1
    is_installed libgl1 GL.so.1 || echo libgl1
    is_installed libgl1-mesa-dri gallium || compgen -G '/usr/lib*/*/dri/swrast_dri.so' >/dev/null || echo libgl1-mesa-dri
    is_installed libglfw3 glfw.so.3 || echo libglfw3
    is_installed libglib2.0-0 glib-2.0.so.0 || echo libglib2.0-0
    $FOR_TESTS || return 0
    command -v ffmpeg >/dev/null || echo ffmpeg
    # A real SLURM of two nodes, and what reads the scripts that are submitted to it.
    command -v sbatch >/dev/null || echo slurm-wlm
    [ -x /usr/sbin/munged ] || echo munge
    command -v shellcheck >/dev/null || echo shellcheck
    # Ubuntu's package of this name is a snap, which does not run in containers.
    if grep -qx 'ID=debian' /etc/os-release; then
        command -v chromium >/dev/null || echo chromium
    fi
}

install_system_packages() {
    local python=$1 missing sudo=()
    missing=$(missing_packages "$python" | xargs)
    [ -n "$missing" ] || return 0
    command -v apt-get >/dev/null ||
        fail "these are missing (by their Debian names), install them and run make again: $missing"
    if [ "$(id -u)" -ne 0 ]; then
        sudo -n true 2>/dev/null ||
            fail "run this, then make again: sudo apt-get update && sudo apt-get install -y --no-install-recommends $missing"
        sudo=(sudo -n)
    fi
    "${sudo[@]}" apt-get update -qq
    missing=$(missing_packages "$python" | xargs) # a fresh container knows what its release has only now
    [ -n "$missing" ] || return 0
    echo "setup: installing Debian packages: $missing"
    # shellcheck disable=SC2086  # a list of words
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing
}

install_python_packages() {
    local python=$1
    # A folder that was moved here or left half-made is made anew.
    if ! $VENV/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "setup: making $VENV with $("$python" --version)"
        "$python" -m venv --clear $VENV
    fi
    echo "setup: installing Python packages into $VENV, which takes a few minutes the first time"
    # torch comes first and alone: left to the resolver, another package's wish may pull a different build of it.
    # shellcheck disable=SC2086  # PIP_ARGS is a list of words
    $VENV/bin/python -m pip install --quiet ${PIP_ARGS:-} ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} \
        "$(grep '^torch==' constraints.txt)"
    # shellcheck disable=SC2086
    $VENV/bin/python -m pip install --quiet ${PIP_ARGS:-} -c constraints.txt -e ".[$EXTRAS]"
    touch $VENV/.ready # make compares its age with pyproject.toml, constraints.txt and this file
}

python=$(find_python)
install_system_packages "$python"
[ -n "${1:-}" ] || install_python_packages "$python"
