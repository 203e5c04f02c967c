#!/usr/bin/env bash
# Train t5-like on the demo's corpus, on CPU ranks. Arguments are overrides: --section.field value
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -d .venv ] && source .venv/bin/activate
export OMP_NUM_THREADS=1 DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"

if [ ! -f runs/corpus/text_text_document.bin ]; then
    echo "the demo's corpus is needed first: bash examples/omega-tiny/run.sh" >&2
    exit 3
fi
deepspeed --num_gpus "${NUM_RANKS:-8}" --no_local_rank pretrain_omega.py \
    --config examples/t5-like/run.yaml --deepspeed_config ds_configs/zero1.json "$@"
