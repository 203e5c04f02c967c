#!/usr/bin/env bash
# Tokenize a corpus on a cluster: an array of parts, then one job that joins them. From the root of the checkout:
#   examples/corpus-slurm/submit.sh '/data/text/*.jsonl.zst' /data/shards/omega tokenizer.model [elements, default 16]
set -euo pipefail
export INPUT=${1:?a glob, file or folder} OUTPUT=${2:?prefix of the shards} TOKENIZER=${3:?SentencePiece model}
elements=${4:-16}
here=$(dirname "$0")
array=$(sbatch --parsable --export=ALL --array="0-$((elements - 1))" "$here/array.sbatch")
merge=$(sbatch --parsable --export=ALL --dependency="afterok:${array%%;*}" "$here/merge.sbatch")
echo "array ${array%%;*}, then ${merge%%;*}: ${OUTPUT}_text_document"
