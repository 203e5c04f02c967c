#!/usr/bin/env bash
# The demo on examples/omega-tiny/run.yaml: gather text, learn a tokenizer, write the corpus, train on 8 CPU ranks, let the model write.
# Arguments are overrides for training: --section.field value. NUM_RANKS=8 processes; RUN=runs/omega-tiny is the run's folder.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -d .venv ] && source .venv/bin/activate
exec python -m megatron_omega demo --ranks "${NUM_RANKS:-8}" --run "${RUN:-runs/omega-tiny}" "$@"
