#!/bin/sh
# Finds the servers that the tests and `make` targets start privately; installs them where that is possible.
#
#   scripts/servers.sh           print where they are; install what is missing (root with apt-get only)
#   scripts/servers.sh --check   print where they are; install nothing
#
# Exits 0 when all were found, 1 otherwise, with the command to run. Nothing is started on a default port.
set -eu

# What Debian asks before it starts a daemon; another path is for tests.
policy=${KNELL_POLICY_RC_D:-/usr/sbin/policy-rc.d}
saved=

find_one() {
    for name in "$@"; do
        for folder in /usr/lib/rabbitmq/bin /usr/lib/postgresql/*/bin $(printf '%s' "$PATH" | tr ':' ' '); do
            if [ -x "$folder/$name" ]; then
                printf '%s\n' "$folder/$name"
                return 0
            fi
        done
    done
    return 1
}

missing_packages() {
    find_one rabbitmq-server >/dev/null || printf 'rabbitmq-server '
    find_one redis-server valkey-server >/dev/null || printf 'redis-server '
    find_one postgres >/dev/null || printf 'postgresql '
}

restore_policy() {
    status=$?
    trap - EXIT HUP INT TERM
    rm -f "$policy"
    if [ -n "$saved" ]; then
        mv "$saved" "$policy"
    fi
    exit "$status"
}

# Debian's packages start their daemons when they are installed, unless this policy forbids it.
forbid_daemons() {
    if [ -e "$policy" ] || [ -L "$policy" ]; then
        saved="$policy.knell-saved"
        if [ -e "$saved" ] || [ -L "$saved" ]; then
            echo "$saved is left over from an earlier run that was killed; move it back to $policy first" >&2
            exit 1
        fi
    fi
    trap restore_policy EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
    if [ -n "$saved" ]; then
        mv "$policy" "$saved"
    fi
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
}

install_with_apt() {
    forbid_daemons
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@"
}

missing=$(missing_packages)
if [ -n "$missing" ] && [ "${1:-}" != "--check" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing $missing(their daemons are not started)"
    # A subshell, so that the policy is restored before anything else happens, whatever becomes of apt-get.
    # shellcheck disable=SC2086 # the packages are separate words
    (install_with_apt $missing)
    missing=$(missing_packages)
fi

if [ -n "$missing" ]; then
    echo "missing: $missing" >&2
    if command -v apt-get >/dev/null; then
        echo "run: sudo apt-get install --no-install-recommends $missing" >&2
    elif command -v dnf >/dev/null; then
        echo "run: sudo dnf install rabbitmq-server valkey postgresql-server" >&2
    elif command -v brew >/dev/null; then
        echo "run: brew install rabbitmq redis postgresql" >&2
    else
        echo "install RabbitMQ 3.10, Redis 7 (or Valkey) and PostgreSQL 15, or newer, and put their programs on PATH" >&2
    fi
    exit 1
fi

find_one rabbitmq-server
find_one redis-server valkey-server
find_one postgres
