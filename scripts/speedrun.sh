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
[[ $seeds =~ ^[1-9][0-9]*$ ]] || die 2 "--seeds=$seeds: wanted a whole number from 1 on"
[[ $name =~ ^[A-Za-z0-9_][A-Za-z0-9_.-]*$ ]] || die 2 "--name=$name: wanted letters, digits, _ . and -, as a folder is named"
for step in ${skip//,/ }; do
    [[ ,shards,dry_run,evaluate,record,report, == *",$step,"* ]] || die 2 "--skip=$skip: there is no step $step that can be left out"
done
skips() { [[ ,$skip, == *",$1,"* ]]; }
record=records/$track
if [ -n "$smoke" ]; then
    export JAX_PLATFORMS=cpu
    flags=(@scripts/presets/tiny.args ${flags[@]+"${flags[@]}"}) record=$out/record/cpu topology=v6e:1x1
fi
needed="$python -m pip install -r"
"$python" -c 'import jax, einops, safetensors, huggingface_hub' || die 2 "a package is missing: $needed requirements.txt"
companions=sys
[ "$seeds" = 1 ] || skips record || companions+=,scipy
skips report || companions+=,matplotlib
"$python" -c "import $companions" || die 2 "a package is missing, needed at the end: $needed scripts/requirements.txt"

# what was done is known by train.py and the flags, those of an @FILE too
hash='import hashlib, sys; read = lambda word: open(word[1:]).read() if word[0] == "@" else word
print(hashlib.sha256(open("train.py", "rb").read() + repr([*map(read, sys.argv[1:])]).encode()).hexdigest()[:12])'
key=$("$python" -c "$hash" ${flags[@]+"${flags[@]}"})
state=$out/$key
mkdir -p "$state"

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
runs=()
for ((seed = 0; seed < seeds; seed++)); do
    stamp=$state/seed$seed.done
    if [ -f "$stamp" ]; then echo "seed $seed: done, $(cat "$stamp")"
    else
        for ((again = 0; again < 100; again++)); do
            code=0
            "$python" train.py ${flags[@]+"${flags[@]}"} --seed=$seed --log_dir="$state/seed$seed" \
                --save_every=250 --resume=auto || code=$?
            case $code in 75 | 134 | 137 | 139 | 143) ;; *) break ;; esac
            echo "seed $seed: ended with exit code $code, on from the last checkpoint"
        done
        [ $code = 0 ] || die $code "seed $seed ended with exit code $code; the same command goes on from its last checkpoint"
        run=$(for folder in "$state/seed$seed"/*/; do echo "${folder%/}"; done | tail -n 1)
        echo "$run" > "$stamp"
    fi
    runs+=("$(cat "$stamp")")
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
    if [ -f "$state/record" ]; then folder=$(cat "$state/record")  # a later day continues the same
    else
        folder=$record/$(date -u +%F)_$name
        [ ! -e "$folder" ] || [ -n "$smoke" ] || die 2 "$folder is there already: give another --name"
        echo "$folder" > "$state/record"
    fi
    mkdir -p "$folder"
    for seed in "${!runs[@]}"; do cp "${runs[$seed]}/log.txt" "$folder/seed$seed.txt"; done
    [ -f "$folder/README.md" ] || {
        echo "# $name"
        printf '\n%s\n\n' "TO BE WRITTEN: the change, why it should help, what did not work."
        printf 'Made by `bash scripts/speedrun.sh --seeds=%s --name=%s`, flags of train.py: `%s`\n\n' "$seeds" "$name" "${flags[*]:-none}"
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
