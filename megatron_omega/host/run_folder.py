"""The names of all files of a run folder. Who writes what:

config.yaml      run         the settings, resolved
metrics.jsonl    monitoring  one object for each step
events.jsonl     monitoring  starts, validations, checkpoints, faults (the watchdog adds a hang)
loss.png         monitoring  the curves
deepspeed.log    run         what DeepSpeed prints while it is set up
launches.jsonl   launching   each start with its end
excluded.jsonl   all         hosts that the run no longer uses, and why
exit-codes/      launching   what the ranks of a launch returned
stacks/          watchdog    where the ranks stood when they hung
logs/            run         the log of every rank, where there are several
.monitor/        watchdog    where the monitors of a running run meet; closed to other users
.lease           run         who writes here; lapses by itself
stop             the user    asks for a stop; removed when it is obeyed
tokenizer.model  run         the tokenizer; each checkpoint has its own copy too
.compiled/       run         compiled layers, a folder for each host
traces/          run         traces of training.profile_steps
checkpoints/     checkpoint  step-00000100/ and so on
SUCCESS          monitoring  written last of all: the run is complete
"""

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
PLOT = "loss.png"
ENGINE_LOG = "deepspeed.log"
LAUNCHES = "launches.jsonl"
EXCLUDED = "excluded.jsonl"
EXIT_CODES = "exit-codes"
STACKS = "stacks"
LOGS = "logs"
MONITOR = ".monitor"
LEASE = ".lease"
STOP = "stop"
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer.model"
PAIRS = "pairs.json"
"""Of a checkpoint: which supervised pairs it was trained on."""
COMPILED = ".compiled"
TRACES = "traces"
SUCCESS = "SUCCESS"
