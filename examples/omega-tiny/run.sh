#!/usr/bin/env bash
# The demo: gather text, learn a tokenizer, write the corpus, train on 8 CPU ranks, let the model write.
# Arguments are overrides for training: --section.field value. NUM_RANKS=8 processes; RUN=runs/omega-tiny is the run's folder.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -d .venv ] && source .venv/bin/activate
export OMP_NUM_THREADS=1 DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"

example=examples/omega-tiny
corpus=runs/corpus
run="${RUN:-runs/omega-tiny}"
mkdir -p "$corpus" "$run"

say() { printf '\n== %s\n' "$*"; }

if [ ! -f "$corpus/text.jsonl" ]; then
    say "gathering text that this Python installation carries"
    python "$example/gather_corpus.py" --output "$corpus/text.jsonl.unfinished"
    mv "$corpus/text.jsonl.unfinished" "$corpus/text.jsonl"
fi
if [ ! -f "$corpus/tokenizer.model" ]; then
    say "learning a tokenizer"
    python tools/train_tokenizer.py --input "$corpus/text.jsonl" --output "$corpus/tokenizer.model" --vocab-size 2048
fi
if [ ! -f "$corpus/text_text_document.idx" ]; then
    say "writing the corpus"
    python tools/preprocess_data.py --input "$corpus/text.jsonl" --output-prefix "$corpus/text" --json-keys text \
        --tokenizer-model "$corpus/tokenizer.model" --append-eod --workers 2
fi

say "training on ${NUM_RANKS:-8} ranks"
deepspeed --num_gpus "${NUM_RANKS:-8}" --no_local_rank pretrain_omega.py \
    --config "$example/run.yaml" --deepspeed_config ds_configs/zero1.json --logging.run_directory "$run" "$@"

say "what it learned"
python "$example/report.py" --run "$run"
python tools/generate.py --checkpoint "$run/checkpoints" --prompt "This function returns" --max-new-tokens 48 --seed 1
python tools/fill_mask.py --checkpoint "$run/checkpoints" --text "The [MASK] of the file is returned as a string."

cat <<EOF

== where everything is
  losses            $run/loss.png
  every step        $run/metrics.jsonl, $run/events.jsonl (tensorboard --logdir $run/tensorboard)
  checkpoints       $run/checkpoints/
  configuration     $run/config.yaml
  corpus            $corpus/text_text_document.bin, tokenizer $corpus/tokenizer.model

== what to try next
  longer            bash $example/run.sh --training.train_steps 400
  another layout    RUN=runs/other NUM_RANKS=4 bash $example/run.sh --parallel.tensor_parallel_size 1
  proof             python tools/verify_parallel.py --config $example/run.yaml
  write             python tools/generate.py --checkpoint $run/checkpoints --prompt "Open the file and"
  what would run    python pretrain_omega.py --config examples/omega-1b/run.yaml --dry-run
EOF
