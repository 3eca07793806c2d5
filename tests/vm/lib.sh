# shellcheck shell=bash disable=SC2034 # used by the scripts that source it
# Shared by the scripts in tests/vm: directories, messages, and packages, which are fetched without any change to the
# system's own package sources. Sourced, never run.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
vm=$root/tests/vm
cache=${XDG_CACHE_HOME:-$HOME/.cache}/passgate
mkdir -p "$cache"
PATH=$PATH:/usr/sbin:/sbin

# The suites that are searched for a newer kernel than that of this machine's release, preferred first.
kernel_suites=(trixie-backports testing)

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() {
    say "$*"
    exit 1
}
# The exit status of these scripts if something is not available (no network and not cached), which is no failed test.
readonly cannot_status=77
cannot() {
    say "$*"
    exit "$cannot_status"
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

# packages NAME…: installs the packages that are missing, from the system's own archive.
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

# apt_update and apt_install take options of apt. The lock serializes them: apt waits for some of its own locks only.
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

# Prints the URI of the archive of this machine's release, from apt's own configuration.
archive() {
    # shellcheck disable=SC2016 # apt fills these in, not the shell
    apt-get indextargets --format '$(RELEASE) $(REPO_URI)' 'Created-By: Packages' |
        awk -v own="$(release)" '$1 == own || $1 ~ /^(old)?stable$/ { print $2; exit }'
}

# suite_view SUITE…: sets `suite_options` so that apt uses these suites only; refreshes its lists after one hour.
suite_options=()
suite_view() {
    local dir uri suite
    dir=$cache/apt/$(IFS=+ && printf '%s' "$*")
    mkdir -p "$dir/lists/partial" "$dir/archives/partial"
    uri=$(archive)
    [ -n "$uri" ] || return 1
    for suite; do
        printf 'deb [signed-by=%s] %s %s main\n' /usr/share/keyrings/debian-archive-keyring.gpg "$uri" "$suite"
    done >"$dir/sources.new.$$"
    mv "$dir/sources.new.$$" "$dir/sources.list" # another machine may read it
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

# unpack_whole DIR SUITE PACKAGE…: like unpack, with all dependencies, as if no package were installed here: libraries and
# programs must be of the same release.
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

# results: reads the output of test binaries (with the `Running` lines of cargo, if it ran them) and prints the totals
# "passed failed skipped". A binary that ended without a result line counts as one failure.
results() {
    awk '
        # open: 0 between two binaries, 1 after a line of cargo that names one, 2 while it runs.
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
