# shellcheck shell=bash disable=SC2034 # what is unused here is used by those who source it
# What the scripts in tests/vm share: where things are kept, how they speak, and how they get packages without ever
# touching the system's own package sources. Sourced, never run.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
vm=$root/tests/vm
cache=${XDG_CACHE_HOME:-$HOME/.cache}/passgate
mkdir -p "$cache"
PATH=$PATH:/usr/sbin:/sbin

# Where a kernel or QEMU newer than this machine's release is looked for, best first.
kernel_suites=(trixie-backports testing)

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() {
    say "$*"
    exit 1
}
# Exit status of the rig's tools when something cannot be had here (no network and nothing cached): not a failed test.
readonly cannot_status=77
cannot() {
    say "$*"
    exit "$cannot_status"
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

# packages NAME…: installs those that are missing from the system's own archive.
packages() {
    local missing=() name
    for name; do
        dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null | grep -qx installed || missing+=("$name")
    done
    [ ${#missing[@]} != 0 ] || return 0
    say "apt installs ${missing[*]}"
    apt_update || cannot "apt cannot reach its archive (log: $cache/apt-update.log), and ${missing[*]} must be installed"
    apt_install "${missing[@]}"
}

# apt_update and apt_install take apt's options, and turns: apt's own locks do not wait for everything.
apt_update() {
    (flock 8 && as_root apt-get -qq -o APT::Update::Error-Mode=any "$@" update >"$cache/apt-update.log" 2>&1) 8>"$cache/apt.lock"
}
apt_install() {
    (
        flock 8
        as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 \
            install --no-install-recommends "$@" >"$cache/apt-install.log" 2>&1
    ) 8>"$cache/apt.lock" || cannot "apt could not install $* (log: $cache/apt-install.log)"
}

release() { (. /etc/os-release && printf '%s\n' "${VERSION_CODENAME:-unknown}"); }

# The address of the archive this machine's release comes from, as apt itself knows it.
archive() {
    # shellcheck disable=SC2016 # apt fills these in, not the shell
    apt-get indextargets --format '$(RELEASE) $(REPO_URI)' 'Created-By: Packages' |
        awk -v own="$(release)" '$1 == own || $1 ~ /^(old)?stable$/ { print $2; exit }'
}

# suite_view SUITE…: from here on apt sees these suites alone, through `suite_options`; refreshed when an hour old.
suite_options=()
suite_view() {
    local dir uri suite
    dir=$cache/apt/$(IFS=+ && printf '%s' "$*")
    mkdir -p "$dir/lists/partial" "$dir/archives/partial"
    uri=$(archive)
    [ -n "$uri" ] || return 1
    for suite; do
        printf 'deb [signed-by=%s] %s %s main\n' /usr/share/keyrings/debian-archive-keyring.gpg "$uri" "$suite"
    done >"$dir/sources.list"
    suite_options=(-o "Dir::Etc::sourcelist=$dir/sources.list" -o Dir::Etc::sourceparts=/dev/null
        -o "Dir::State::Lists=$dir/lists" -o "Dir::Cache=$dir" -o APT::Sandbox::User=root)
    [ -n "$(find "$dir/updated" -mmin -60 2>/dev/null)" ] && return
    apt_update "${suite_options[@]}" && touch "$dir/updated"
}

# unpack DIR PACKAGE=VERSION…: downloads through the current suite view and unpacks; nothing is installed.
unpack() {
    local dir=$1 debs deb
    shift
    debs=$(mktemp -d "$cache/debs.XXXXXX")
    (cd "$debs" && apt-get -qq "${suite_options[@]}" download "$@" >&2) || return 1
    for deb in "$debs"/*.deb; do dpkg -x "$deb" "$dir"; done
    rm -rf "$debs"
}

# unpack_whole DIR SUITE PACKAGE…: the same with all that they need, as if nothing were installed here: libraries must be
# of one release with the programs.
unpack_whole() {
    local dir=$1 suite=$2 debs deb
    shift 2
    debs=$(mktemp -d "$cache/debs.XXXXXX")
    mkdir -p "$dir" "$debs/partial"
    apt-get -qq "${suite_options[@]}" -o Dir::State::status=/dev/null -o "Dir::Cache::archives=$debs" \
        -o Debug::NoLocking=1 -t "$suite" --no-install-recommends --download-only -y install "$@" >&2 || return 1
    for deb in "$debs"/*.deb; do dpkg -x "$deb" "$dir"; done
    rm -rf "$debs"
}

hash_of() { sha256sum | cut -c1-16; }

# results: reads the output of test binaries (with cargo's `Running` lines where it ran them) and prints the sums
# "passed failed skipped". A binary that ended without a result line counts as one failure.
results() {
    awk '
        # 0: between two binaries, 1: cargo has named one, 2: it has begun.
        function close_binary() { if (open) { failed++; open = 0 } }
        /^ +(Running|Doc-tests) / { close_binary(); open = 1 }
        /^running [0-9]+ tests?$/ { if (open == 2) close_binary(); open = 2 }
        /^test result: / {
            open = 0
            for (i = 1; i < NF; i++) {
                if ($(i + 1) == "passed;") passed += $i
                if ($(i + 1) == "failed;") failed += $i
                if ($(i + 1) == "ignored;") skipped += $i
            }
        }
        END { close_binary(); print passed + 0, failed + 0, skipped + 0 }'
}
