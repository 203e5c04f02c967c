#!/usr/bin/env bash
# Train omega-1b on the GPUs of this machine, or of those in HOSTFILE. Arguments are overrides: --section.field value
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -d .venv ] && source .venv/bin/activate

deepspeed ${HOSTFILE:+--hostfile "$HOSTFILE"} --no_local_rank pretrain_omega.py \
    --config examples/omega-1b/run.yaml --deepspeed_config ds_configs/zero1.json "$@"
