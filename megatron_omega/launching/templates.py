"""The text of every script that is written for a cluster. `$name` is filled in; `$$` is the shell's own dollar."""

_HEAD = """\
#!/usr/bin/env bash
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
$tasks
$resources
#SBATCH --time=$time
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
$signal# Start from the root of the checkout: sbatch $path [--section.field value ...]
# Written by: $command
"""

PRETRAIN = (
    _HEAD
    + """\
# Three minutes before the time limit the ranks are told to save. What every exit code leads to: docs/launching.md
set -u
$activation
export OMP_NUM_THREADS=$threads DS_ACCELERATOR=$device
$environment
run=($arguments "$$@")

# Sets codes (a folder), nodes and hosts (without those that were found faulty) and layout (where they are fewer).
plan=$$(python -m megatron_omega launch begin $hosts "$${run[@]}") || exit $$?
eval "$$plan"
export codes
# A task for each rank, which finds its place in SLURM_*. Signals are for the ranks, which handle them; what else is in
# the step (this shell, data workers) ignores them. A stop is no bad exit: Slurm would end those not through saving.
srun --nodes="$$nodes" --nodelist="$$hosts" --ntasks-per-node=$ranks_per_node --ntasks=$$((nodes * $ranks_per_node)) \\
    --cpus-per-task=$threads --kill-on-bad-exit=1 --wait=60 bash -c '
    trap "" USR1 TERM
    python -u "$$@"
    code=$$?
    [ $$code -eq 0 ] || echo $$code > "$$codes/$$SLURM_PROCID"
    [ $$code -eq 75 ] && exit 0
    exit $$code' rank $program "$${run[@]}" "$${layout[@]}"
again=$$(python -m megatron_omega launch end --code $$? "$${run[@]}")
code=$$?
if [ -n "$$again" ] && [ -z "$${OMEGA_CHAIN:-}" ]; then # in a chain the next job goes on
    scontrol requeue "$$SLURM_JOB_ID"
    sleep 300 # the requeue ends this script
fi
exit $$code
"""
)

EVALUATE = (
    _HEAD
    + """\
# The loss of the newest checkpoint, or of --load PATH, on the validation part of the corpus.
set -eu
$activation
export OMP_NUM_THREADS=$threads DS_ACCELERATOR=$device
srun --cpus-per-task=$threads --kill-on-bad-exit=1 --wait=60 python -u -m megatron_omega evaluate $arguments "$$@"
"""
)

HOSTS = """\
#!/usr/bin/env bash
# Start from the root of the checkout, on a host that reaches the others by ssh without a password:
#   bash $path [--section.field value ...]
# Written by: $command
# Checkout and .venv have to be at the same path on every host. Ctrl-C ends the ranks without saving; to save and stop:
#   touch $run_directory/stop
# What every exit code leads to: docs/launching.md
set -u
$activation
run=($arguments "$$@")
export OMEGA_JOB=hosts-$$$$ DS_ENV_FILE=$environment

while true; do
    # Sets hosts (those that answer, without those that were found faulty) and layout (where they are fewer).
    plan=$$(python -m megatron_omega launch begin --by-pdsh --hostfile $hostfile $hosts "$${run[@]}") || exit $$?
    eval "$$plan"
    deepspeed --hostfile $hostfile --include "$${hosts//,/@}" $several--master_port $port --no_local_rank \\
        $program "$${run[@]}" "$${layout[@]}"
    again=$$(python -m megatron_omega launch end --code $$? --stop-is-final "$${run[@]}")
    code=$$?
    [ -n "$$again" ] || exit $$code
done
"""
