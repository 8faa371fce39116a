#!/usr/bin/env bash
# The tests at both ends of what is supported, each in a fresh environment: Python 3.11 with JAX 0.10, and the newest Python
# on the PATH with the newest JAX that requirements.txt allows. Arguments go to pytest; exit code 1 where one end fails.
#     bash scripts/both_ends.sh                 the whole suite, twice
#     bash scripts/both_ends.sh -k checkpoint   a part of it
set -uo pipefail
if [ "${1-}" = --help ]; then sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit; fi
cd "$(dirname "$0")/.."
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
export XDG_CACHE_HOME="$work/cache"

newest() {  # the newest python3.N that runs, from 3.12 on
  for minor in {12..40}; do "python3.$minor" -c '' 2> /dev/null && echo "python3.$minor"; done | tail -1
}
test_with() {  # NAME PYTHON JAX: a line of the summary
  local venv="$work/$1" log="$work/$1.log" versions
  if ! "$2" -m venv "$venv" 2> "$log" || ! "$venv/bin/pip" install -q -r requirements.txt -r tests/requirements.txt "$3" > "$log" 2>&1; then
    echo "$1: no environment with ${2:-Python 3.12 or newer} and $3: $(tail -1 "$log")"
    return 1
  fi
  versions=$("$venv/bin/python" -c 'import platform, jax; print(f"Python {platform.python_version()}, JAX {jax.__version__}")')
  echo "$1: $versions ..." >&2
  "$venv/bin/python" -m pytest -q "${@:4}" 2>&1 | tee "$log" >&2
  local code=${PIPESTATUS[0]}
  echo "$1: $versions: $(tail -1 "$log")"
  return "$code"
}
oldest=$(test_with oldest python3.11 'jax~=0.10.0' "$@"); first=$?
newest=$(test_with newest "$(newest)" 'jax<0.13' "$@"); second=$?
printf '\n%s\n%s\n' "$oldest" "$newest"
[ $first = 0 ] && [ $second = 0 ]
