#!/usr/bin/env bash
usage() { cat <<'HELP'
The whole speedrun in one command: shards, dry run, training, evaluation, record, report.

    bash scripts/speedrun.sh                          on a TPU VM, after pip install: one run of the preset `speedrun`
    bash scripts/speedrun.sh --seeds=5 --name=Idea    five seeds, laid out as records/v6e-8/<date>_Idea and verified
    bash scripts/speedrun.sh --smoke                  the same chain with scripts/presets/tiny.args on a CPU, in minutes

    --seeds=N         runs, with --seed=0 .. N-1 (default: 1; of --smoke 2). Two or more make a record
    --name=NAME       of the record (default: Speedrun)
    --track=TRACK     of records/README.md (default: v6e-8)
    --topology=NAME   what the dry run compiles for (default: v6e:2x4)
    --tasks=DIR       also score these sets of questions; fetched from the Hub where DIR is not there
    --out=DIR         where runs and report go (default: logs/speedrun; of --smoke logs/smoke)
    --skip=A,B        leave out steps: shards, dry_run, evaluate, record, report
    -- FLAGS          flags of train.py for every run, as --preset=demo --steps=540

A second one in the same --out is refused while the first is at work.
A run that was stopped (exit code 75, 143), killed (137), or whose host was lost or crashed (134, 139) is started again and goes
on from its last checkpoint. The same command again continues: what was done with this train.py and these flags is not done again.
(A record wants runs in one go: the verifier rejects a resumed one.) PYTHON names another interpreter. The chain has been run
with --smoke; nobody has run it on a TPU yet.
Exit codes: 0; 1 where the verifier rejects the record; otherwise that of the step that failed.
HELP
}
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python} smoke="" seeds="" name=Speedrun track=v6e-8 topology=v6e:2x4 tasks="" out="" skip="" flags=()
say() { printf '\n== %s\n' "$*"; }
die() { printf 'error: %s\n' "$2" >&2; exit "$1"; }
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit ;;
        --smoke) smoke=1 ;;
        --seeds=* | --name=* | --track=* | --topology=* | --tasks=* | --out=* | --skip=*)
            key=${1%%=*}; printf -v "${key#--}" %s "${1#*=}" ;;
        --) shift; flags=("$@"); break ;;
        *) die 2 "$1: there is no such flag; flags of train.py come after -- (bash scripts/speedrun.sh --help)" ;;
    esac
    shift
done
seeds=${seeds:-${smoke:+2}} seeds=${seeds:-1} out=${out:-logs/${smoke:+smoke}} out=${out%/}
[ "$out" != logs ] || out=logs/speedrun
[[ $out != -* ]] || out=./$out
[[ $seeds =~ ^[1-9][0-9]*$ ]] || die 2 "--seeds=$seeds: wanted a whole number from 1 on"
for key in name track; do
    [[ ${!key} =~ ^[A-Za-z0-9_][A-Za-z0-9_.-]*$ ]] || die 2 "--$key=${!key}: wanted letters, digits, _ . and -, as a folder is named"
done
for word in ${flags[@]+"${flags[@]}"}; do
    [[ $word != @* || -r ${word#@} ]] || die 2 "$word: there is no file of flags ${word#@}"
done
for step in ${skip//,/ }; do
    [[ ,shards,dry_run,evaluate,record,report, == *",$step,"* ]] || die 2 "--skip=$skip: there is no step $step that can be left out"
done
skips() { [[ ,$skip, == *",$1,"* ]]; }
record=records/$track
if [ -n "$smoke" ]; then
    export JAX_PLATFORMS=cpu
    flags=(@scripts/presets/tiny.args ${flags[@]+"${flags[@]}"}) topology=v6e:1x1
fi
needed="$python -m pip install -r"
said=$("$python" -c 'import jax, einops, safetensors, huggingface_hub' 2>&1) ||
    die 2 "a package is missing (${said##*$'\n'}): $needed requirements.txt"
companions=sys
[ "$seeds" = 1 ] || skips record || companions+=,scipy
skips report || companions+=,matplotlib
said=$("$python" -c "import $companions" 2>&1) ||
    die 2 "a package is missing (${said##*$'\n'}), needed at the end: $needed scripts/requirements.txt"

# what was done is known by train.py and the flags, those of an @FILE too
hash='import hashlib, os, sys; read = lambda word: open(word[1:], "rb").read() if word[:1] == "@" else os.fsencode(word)
print(hashlib.sha256(open("train.py", "rb").read() + repr([*map(read, sys.argv[1:])]).encode()).hexdigest()[:12])'
key=$("$python" -c "$hash" ${flags[@]+"${flags[@]}"})
state=$out/$key
said=$(mkdir -p "$state" 2>&1) || die 2 "--out=$out: $said"
[ -z "$smoke" ] || record=$state/cpu
exec 9< "$out"  # a lock on the folder, which dies with this process and those that it started
lock='import fcntl, sys
try: fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError: sys.exit(1)
except OSError: pass  # a disk that hosts share may know no locks'
"$python" -c "$lock" || die 2 "$out: another speedrun.sh, or a run that it started, is at work there; wait for its end"

bare() {  # FILE PATTERN: the name in a file of ours, of something that lies in a folder of ours
    local name
    name=$(cat "$1"); name=${name##*/}  # older files hold a path
    [[ $name =~ $2 ]] || die 2 "$1: holds no name of ours; delete it"
    echo "$name"
}

say "1. shards"
if [ -n "$smoke" ]; then echo "none: it reads this Python's own library"
elif skips shards; then echo "left out"
else "$python" cached_fineweb10B.py 8; fi  # what is there is only looked at

say "2. dry run for $topology"
if skips dry_run; then echo "left out"
elif [ -f "$state/dry_run.json" ]; then echo "done: $state/dry_run.json"
elif ! "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("libtpu") is None)'; then
    echo 'left out: the TPU compiler is not here (pip install "jax[tpu]")'
else
    "$python" -m scripts.dry_run "$topology" ${flags[@]+"${flags[@]}"} --json="$state/dry_run.part"
    mv "$state/dry_run.part" "$state/dry_run.json"
fi

say "3. training, $seeds seeds"
runs=() run_name='^[0-9]{8}T[0-9]{6}Z-[0-9a-f]+$'
for ((seed = 0; seed < seeds; seed++)); do
    stamp=$state/seed$seed.done
    if [ -f "$stamp" ]; then
        run=$(bare "$stamp" "$run_name")
        echo "seed $seed: done, $run"
    else
        for ((again = 0; again < 100; again++)); do
            code=0
            "$python" train.py ${flags[@]+"${flags[@]}"} --seed=$seed --log_dir="$state/seed$seed" \
                --save_every=250 --resume=auto || code=$?
            case $code in 75 | 134 | 137 | 139 | 143) ;; *) break ;; esac
            echo "seed $seed: ended with exit code $code, on from the last checkpoint"
        done
        [ $code = 0 ] || die $code "seed $seed ended with exit code $code; the same command goes on from its last checkpoint"
        run=""
        for folder in "$state/seed$seed"/*/; do
            folder=${folder%/}
            if [[ ${folder##*/} =~ $run_name ]] && [ ! -L "$folder" ]; then run=${folder##*/}; fi
        done
        [ -n "$run" ] || die 2 "$state/seed$seed: train.py left no run there"
        echo "$run" > "$stamp"
    fi
    runs+=("$state/seed$seed/$run")
done

say "4. evaluation"
asked=()
[ -z "$tasks" ] || asked+=("--tasks=$tasks")
[ -z "$tasks" ] || [ -d "$tasks" ] || asked+=(--fetch)
if skips evaluate; then echo "left out"
else
    for run in "${runs[@]}"; do "$python" -m scripts.evaluate --checkpoint="$run" ${asked[@]+"${asked[@]}"}; done
fi

say "5. record"
verdict=0
if skips record; then echo "left out"
elif [ "$seeds" = 1 ]; then echo "left out: one run is no record; --seeds=5 makes five"
else
    if [ -f "$state/record" ]; then  # a later day continues the same
        folder=$(bare "$state/record" "^[0-9]{4}-[0-9]{2}-[0-9]{2}_[A-Za-z0-9_.-]+$")
        folder=$record/$folder
    else
        folder=$record/$(date -u +%F)_$name
        [ ! -e "$folder" ] || die 2 "$folder is there already: give another --name"
        echo "${folder##*/}" > "$state/record"
    fi
    mkdir -p "$folder"
    for seed in "${!runs[@]}"; do
        [ ! -L "$folder/seed$seed.txt" ] || die 2 "$folder/seed$seed.txt is a link to elsewhere; take it away"
        cp "${runs[$seed]}/log.txt" "$folder/seed$seed.txt"
    done
    [ -f "$folder/README.md" ] || {
        echo "# $name"
        printf '\n%s\n\n' "TO BE WRITTEN: the change, why it should help, what did not work."
        made="bash scripts/speedrun.sh${smoke:+ --smoke} --seeds=$seeds --name=$name --track=$track"
        [ ${#flags[@]} = 0 ] || made+=" --$(printf ' %q' "${flags[@]}")"
        printf 'Made by `%s`\n\n' "$made"
        grep -h '^devices: ' "$folder/seed0.txt" | tail -n 1
        printf '\n| seed | result |\n|---|---|\n'
        for seed in "${!runs[@]}"; do echo "| $seed | $(grep '^final: ' "$folder/seed$seed.txt" | tail -n 1 | cut -c8-) |"; done
    } > "$folder/README.md"
    "$python" -m scripts.verify_record "$folder" || verdict=$?
    [ $verdict -le 1 ] || die $verdict "the record could not be verified"
    [ -z "$smoke" ] || { echo "(rejected it must be: a smoke run is no record)"; verdict=0; }
fi

say "6. report"
if skips report; then echo "left out"
else "$python" -m scripts.report "${runs[@]}" --out="$state/report.html"; fi

say "done: ${runs[*]}"
exit $verdict
