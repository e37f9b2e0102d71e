#!/bin/sh
# Makes .venv, or brings it up to date, with everything that demo, check and test need.
#
#   scripts/env.sh             the versions of constraints.txt
#   scripts/env.sh --newest    the newest versions that pyproject.toml allows
#
# PYTHON names the Python to use; otherwise the first one of 3.11 or newer is taken.
set -eu

suitable() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

choose_python() {
    for name in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if command -v "$name" >/dev/null && suitable "$name"; then
            printf '%s\n' "$name"
            return 0
        fi
    done
    if [ -n "${PYTHON:-}" ]; then
        echo "PYTHON is '$PYTHON', which is not Python 3.11 or newer" >&2
    else
        echo "no Python 3.11 or newer is on PATH; install one (on Debian 12 and Ubuntu 24.04: apt-get install python3)," >&2
        echo "or name it: make PYTHON=/path/to/python3" >&2
    fi
    return 1
}

# Debian splits venv off into a package of its own, named after the version.
venv_package() {
    "$1" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'
}

make_venv() {
    rm -rf .venv
    if "$1" -m venv .venv >/dev/null 2>&1; then
        return 0
    fi
    rm -rf .venv
    if ! command -v apt-get >/dev/null; then
        echo "$1 cannot make a virtual environment; install its venv and ensurepip modules" >&2
        return 1
    fi
    package=$(venv_package "$1")
    if [ "$(id -u)" != 0 ]; then
        echo "$1 cannot make a virtual environment; run: sudo apt-get install $package" >&2
        return 1
    fi
    echo "installing $package"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$package" >/dev/null
    "$1" -m venv .venv
}

pip() {
    .venv/bin/python -m pip -qq --disable-pip-version-check "$@"
}

if ! suitable .venv/bin/python; then
    python=$(choose_python)
    echo "making .venv with $("$python" --version)"
    make_venv "$python"
fi

if [ "${1:-}" = "--newest" ]; then
    versions="--upgrade --upgrade-strategy eager"
else
    versions="-c constraints.txt"
fi

echo "installing what pyproject.toml names into .venv"
# Dependency groups need pip 25.1, and Debian 12 has 23.0.
pip install 'pip>=25.1'
# shellcheck disable=SC2086 # the options are separate words
pip install $versions -e '.[services,flower,postgresql,simplejwt,fastapi-users,flask-jwt-extended]' --group dev
