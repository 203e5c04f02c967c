#!/usr/bin/env bash
# From the demo's checkpoint to answers: gather tasks from the installed packages, fine-tune the whole model and, beside it, adapters;
# then compare both with the untuned model (zero- and four-shot) and with two guesses, on one page. Arguments are settings of both fine-tunings.
# BASE=runs/omega-tiny is what is fine-tuned (made by the demo if it is not there), RUN=runs/tasks the folder of everything made here.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -d .venv ] && source .venv/bin/activate
export OMP_NUM_THREADS=1 DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
base="${BASE:-runs/omega-tiny}" run="${RUN:-runs/tasks}" ranks="${NUM_RANKS:-2}" records="${RECORDS:-2400}" limit="${LIMIT:-225}"
omega="python -m megatron_omega"

finetune() { # NAME SETTING...
    [ -e "$run/$1/SUCCESS" ] || torchrun --standalone --nproc-per-node "$ranks" pretrain_omega.py --load "$base" \
        --tasks "$run/data/tasks.yaml" --logging.run_directory "$run/$1" --batch.micro_batch_size 4 --evaluation.answers 60 "${@:2}"
}

[ -e "$base/SUCCESS" ] || $omega demo --run "$base"
[ -e "$run/data/tasks.yaml" ] || $omega gather-tasks --output "$run/data" --records "$records"
echo; echo "== fine-tuning the whole model"
finetune full --training.epochs 3 --optimizer.learning_rate 3e-3 "$@"
echo; echo "== fine-tuning adapters beside it"
finetune lora --training.epochs 3 --lora.rank 32 --lora.alpha 64 --lora.also "[table, vectors]" --optimizer.learning_rate 5e-3 "$@"
echo; echo "== comparison"
torchrun --standalone --nproc-per-node "$ranks" -m megatron_omega compare --tasks "$run/data/tasks.yaml" --limit "$limit" --output "$run/comparison" \
    --models "untuned, 0-shot=$base" "untuned, 4-shot=$base@4" "fine-tuned whole=$run/full" "fine-tuned by LoRA=$run/lora"
