#!/usr/bin/env bash
# A new user's first hour: install, make a picture, train an SAE, label it, serve it, steer by it. Tells every step's time.
#
#   examples/first_hour.sh FOLDER [SITE_PACKAGES]
#
# FOLDER is made and holds all of it. SITE_PACKAGES, where it is given, is the folder of an environment that has PyTorch
# and the other packages already: they are taken from there, and only TurboLens is installed.
set -euo pipefail

repository=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
mkdir -p "$1" && cd "$1"

step() {
    local name=$1 began=$SECONDS
    shift
    "$@" >"$name.log" 2>&1 || { echo "$name failed:"; tail -20 "$name.log"; exit 1; }
    echo "$name: $((SECONDS - began)) s"
}

install() {
    "$python" -m venv venv
    local options=()
    if [ -n "${1:-}" ]; then
        echo "$1" >"$(venv/bin/python -c 'import site; print(site.getsitepackages()[0])')/beside.pth"
        options=(--no-deps)
    fi
    # Copies: building in place would leave folders in the repository.
    for part in . server training; do
        mkdir -p "source/$part"
        tar -C "$repository/$part" --exclude .git --exclude .venv --exclude node_modules --exclude runs -cf - . |
            tar -C "source/$part" -xf -
    done
    venv/bin/python -m pip install --quiet "${options[@]}" ./source ./source/server ./source/training
}

captions() {
    for size in small big; do for color in red green blue yellow purple white; do
    for shape in circle square triangle star ring cross; do for place in left right; do
    for background in night snow grass sky sunset; do
        echo "a $size $color $shape on the $place, $background background"
    done; done; done; done; done >captions.txt
}

train() {
    turbolens train sae --prompts captions.txt --hook-points up.0.0 up.0.1 --d-sae 64 --steps 300 --batch 1024 \
        --reservoir 8192 --held-out-chunks 2 --out saes --work work
}

label() { turbolens catalog build --sae saes --images 256 --effect-scenes 0 --work work; }

serve() {
    turbolens serve --sae saes --port 0 --log-format json >served.log 2>&1 &
    echo $! >server.pid
    for _ in $(seq 240); do
        if grep -q '"ready"' served.log; then return 0; fi
        kill -0 "$(cat server.pid)" || { cat served.log; return 1; }
        sleep 0.5
    done
    return 1
}

steer() {
    local port feature edits=()
    port=$(grep -o '"address": *"[^"]*"' served.log | head -1 | grep -o '[0-9]*"$' | tr -d '"')
    export TURBOLENS_TARGET=localhost:$port
    prompt="a big red star on the left, night background"
    turbolens features search snow --limit 4 --json >found.json
    for feature in $(python -c 'import json; print(*(r["ref"] for r in json.load(open("found.json"))))'); do
        edits+=(--add "$feature=4")
    done
    turbolens generate "$prompt" --seed 7 --out night.png
    turbolens generate "$prompt" --seed 7 --out snow.png "${edits[@]}"
    turbolens provenance snow.png
}

step install install "${2:-}"
export PATH="$PWD/venv/bin:$PATH"
unset PYTHONPATH
step picture turbolens generate "a blue ring on the right, snow background" --seed 1 --server embedded --out first.png
step captions captions
step train train
step label label
trap 'kill "$(cat server.pid)" 2>/dev/null || true' EXIT
step serve serve
step steer steer
echo "from nothing to a steered picture: $SECONDS s"
