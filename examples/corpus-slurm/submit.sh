#!/usr/bin/env bash
# Tokenize a corpus on a cluster: an array of parts, then one job that joins them. From the root of the checkout:
#   examples/corpus-slurm/submit.sh '/data/text/*.jsonl.zst' /data/shards/omega tokenizer.model [elements, default 16]
# Where an element fails the join is cancelled. Mend the cause and give the same command: finished parts are kept.
# SBATCH_OPTIONS are options of sbatch for both jobs, such as '--partition=cpu --account=me'.
set -euo pipefail
export INPUT=${1:?a glob, file or folder} OUTPUT=${2:?prefix of the shards} TOKENIZER=${3:?SentencePiece model}
export SHARDS=${4:-16}
here=$(dirname "$0")
# shellcheck disable=SC2086 # several options
submit() { sbatch --parsable --export=ALL ${SBATCH_OPTIONS:-} "$@" | cut -d ';' -f 1; }
array=$(submit --array="0-$((SHARDS - 1))" "$here/array.sbatch")
merge=$(submit --dependency="afterok:$array" --kill-on-invalid-dep=yes "$here/merge.sbatch")
echo "array $array, then $merge: ${OUTPUT}_text_document"
