# Functions that the scripts share. Source it; it changes to the root of the checkout.
#
#   BATON_VENV    the virtual environment                (default: .venv)
#   BATON_PYTHON  the interpreter that makes it          (default: python3.11, else python3)
#   BATON_TORCH   the version of torch it holds          (default: 2.13.0)

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
export BATON_VENV=${BATON_VENV:-$root/.venv}
torch_version=${BATON_TORCH:-2.13.0}
bin=$BATON_VENV/bin

fail() {
  echo "${0##*/}: $*" >&2
  exit 1
}

# step TEXT COMMAND...: run it and say what it does and how long it took. At a terminal its own
# output (pip's progress bars) is shown; elsewhere a line every 15 s, and its end if it fails.
step() {
  local text=$1 start=$SECONDS log pulse status=0
  shift
  if [[ -t 1 ]]; then
    printf -- '--> %s\n' "$text"
    "$@" || status=$?
  else
    log=$(mktemp)
    printf -- '--> %s ...\n' "$text"
    (
      # Waits without a child process, which would outlive this shell by up to 15 s.
      exec {never}<> <(:)
      while ! read -r -t 15 -u "$never"; do
        printf '    %3d s: %s\n' $((SECONDS - start)) "$(tail -n 1 "$log" | cut -c 1-100)"
      done
    ) &
    pulse=$!
    "$@" >"$log" 2>&1 || status=$?
    kill "$pulse" 2>/dev/null || true
    wait "$pulse" 2>/dev/null || true
    ((status == 0)) || tail -n 40 "$log" >&2
    rm -f "$log"
  fi
  if ((status != 0)); then
    fail "failed after $((SECONDS - start)) s (exit status $status): $text"
  fi
  printf '    done in %d s\n' $((SECONDS - start))
}

# as_root COMMAND...: run it as root, with sudo if need be; 1 if there is no way to.
as_root() {
  if ((EUID == 0)); then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    return 1
  fi
}

# present NAME: whether there is a command, or a shared library (libNAME.so.VERSION), of that name.
present() {
  local PATH=$PATH:/usr/sbin:/sbin
  if [[ $1 == lib*.so.* ]]; then
    [[ $(ldconfig -p) == *"$1 "* ]]
  else
    command -v "$1" >/dev/null
  fi
}

# What the tests need of the system: a Redis server, network namespaces, certificates, and what
# Mooncake's wheel links to.
test_needs=(
  redis-server=redis-server ip=iproute2 openssl=openssl
  libibverbs.so.1=libibverbs1 libcurl.so.4=libcurl4 libnuma.so.1=libnuma1
)

# ensure_system NAME=PACKAGE...: install the Debian package of each command or library that is
# missing.
ensure_system() {
  local pair
  local -a packages=()
  for pair in "$@"; do
    present "${pair%%=*}" || packages+=("${pair#*=}")
  done
  ((${#packages[@]})) || return 0
  command -v apt-get >/dev/null ||
    fail "please install ${packages[*]} (there is no apt-get here to do it with)"
  as_root true || fail "please run as root, or install sudo, or: apt-get install ${packages[*]}"
  step "apt-get update" as_root apt-get update -q
  step "apt-get install ${packages[*]}" as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -q --no-install-recommends "${packages[@]}"
}

find_python() {
  local name
  for name in ${BATON_PYTHON:-python3.11 python3}; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  fail "Python 3.11 or newer is needed, but none of ${BATON_PYTHON:-python3.11, python3} is one"
}

make_venv() {
  local python=$1
  if [[ -x $bin/python ]] && "$bin/python" -m pip --version >/dev/null 2>&1; then
    return
  fi
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    # Debian keeps these two modules of the standard library in a package of their own.
    ensure_system "no-such-command=python3-venv"
    "$python" -c 'import ensurepip, venv' || fail "$python has no venv module"
  fi
  step "virtual environment ${BATON_VENV/#$root\//} with $("$python" --version)" \
    "$python" -m venv --clear "$BATON_VENV"
}

install_all() (
  flock 9 # two scripts at a time would break each other's environment
  local extras=$1 stamp=$2 python
  stamp_holds "$extras" "$stamp" && exit 0
  python=$(find_python)
  make_venv "$python"
  rm -f "$BATON_VENV/baton-stamp"
  local -a pip=("$bin/python" -m pip install --disable-pip-version-check)
  # torch comes first and by exact version: left to itself pip takes the newest, with gigabytes
  # of libraries for devices this machine may not have.
  step "torch $torch_version" "${pip[@]}" -c requirements/constraints.txt "torch==$torch_version"
  step "build tools" "${pip[@]}" -c requirements/constraints.txt hatchling
  step "dependencies and Baton itself${extras:+ ($extras)}" \
    "${pip[@]}" -c requirements/constraints.txt --no-build-isolation -e ".${extras:+[$extras]}"
  printf '%s %s\n' "$stamp" "$extras" >"$BATON_VENV/baton-stamp"
) 9<"$root"

# stamp_holds EXTRAS STAMP: whether the environment is what they ask for; one with "dev" has all.
stamp_holds() {
  local have=""
  [[ -x $bin/python && -f $BATON_VENV/baton-stamp ]] || return 1
  read -r have <"$BATON_VENV/baton-stamp" || true
  [[ $have == "$2 dev" || $have == "$2${1:+ $1}" ]]
}

# ensure_venv [EXTRAS]: make $BATON_VENV hold the pinned dependencies. Instantaneous when it does.
ensure_venv() {
  local extras=${1:-} stamp
  stamp=$({ cat pyproject.toml requirements/constraints.txt && echo "$root $torch_version"; } |
    sha256sum | cut -c 1-32)
  if ! stamp_holds "$extras" "$stamp"; then
    install_all "$extras" "$stamp"
  fi
}
