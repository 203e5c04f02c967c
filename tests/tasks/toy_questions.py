"""64 questions with answers, learned from the same weights by our own fine-tuning and by Transformers' Seq2SeqTrainer.

Every step sees all of them, so both runs take the same steps, whatever their order and packing.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from written_models import tiny_config, tiny_tokenizer, write_model

from megatron_omega.checkpoint.reader import open_checkpoint
from megatron_omega.config.arguments import parse_arguments
from megatron_omega.config.load import resolve_run
from megatron_omega.data.sources import open_sources
from megatron_omega.export.native import write_export
from megatron_omega.host import run_folder
from megatron_omega.host.environment import complete_environment
from megatron_omega.model.context import ModelContext
from megatron_omega.model.omega import Omega
from megatron_omega.tasks.finetuning import as_finetuning, read_tasks

NUMBER, STEPS, RATE, WARM_UP = 64, 80, 1e-2, 0
SAME_STEPS, SAME = 20, 1e-3
"""How far both are compared step by step, and the relative difference that rounding explains by then."""
BETAS, EPSILON, CLIPPING = (0.9, 0.95), 1e-8, 1.0
WIDTH = 48
MODEL: dict[str, Any] = {
    "hidden_size": WIDTH, "width_base": WIDTH, "table_multiplier": 1.0, "ffn_hidden_size": 96, "num_attention_heads": 4, "encoder_layers": 1,
    "decoder_layers": 1,
}  # fmt: skip


def write_questions(path: Path) -> Path:
    """Write the pairs: each answer follows from a table that only learning can know."""
    things, places = (
        ("fox", "dog", "quick", "lazy", "brown", "jumps", "over", "the"),
        ("Boxkämpfer", "Viktor", "Deich", "quer"),
    )
    rows = [
        {"prompt": f"{things[k % 8]} {k // 8} is", "target": f" {places[(k * k + 3 * (k // 8)) % 7 % 4]}"}
        for k in range(NUMBER)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_start(folder: Path) -> Path:
    """Write an untrained model as a run, and its export; return the run."""
    run = folder / "start"
    run.mkdir(parents=True)
    (run / run_folder.TOKENIZER).write_bytes(tiny_tokenizer().model)
    config = tiny_config(model=MODEL, data={"tokenizer": str(run / run_folder.TOKENIZER)})
    untrained = Omega(ModelContext.of(config)).eval().requires_grad_(requires_grad=False)
    write_model(untrained, config, run / run_folder.CHECKPOINTS)
    with open_checkpoint(next((run / run_folder.CHECKPOINTS).iterdir())) as source:
        write_export(folder / "export", source, tiny_tokenizer(), dtype="fp32", shard_bytes=1 << 30)
    return run


def words_of(folder: Path) -> list[str]:
    """Return the command line of our fine-tuning."""
    pairs = folder / "questions.jsonl"
    settings = {
        "training.train_steps": STEPS, "batch.global_batch_size": rows_of(pairs), "batch.micro_batch_size": rows_of(pairs), "optimizer.learning_rate": RATE,
        "schedule.warmup_steps": WARM_UP, "optimizer.gradient_clipping": CLIPPING, "evaluation.interval_steps": STEPS // 2,
        "evaluation.answers": NUMBER, "checkpoint.interval_steps": STEPS, "logging.tensorboard": "false",
        "resilience.monitor": "false", "logging.run_directory": folder / "ours", "objective.z_loss_weight": 0,
        "data.decoder_seq_length": 96,
    }  # fmt: skip
    task = f"[{{path: {pairs}, validation: {pairs}}}]"
    return [
        "--load",
        str(folder / "start"),
        "--tasks",
        task,
        *(f"--{name}={value}" for name, value in settings.items()),
    ]


def rows_of(pairs: Path) -> int:
    """Return the rows that all pairs fill: a batch of so many is an epoch."""
    start = pairs.parent / "start/tokenizer.model"
    data = {"tokenizer": str(start), "tasks": [{"path": str(pairs), "validation": str(pairs)}]}
    return len(
        open_sources(tiny_config(model=MODEL, data=data | {"encoder_seq_length": 96, "decoder_seq_length": 96})).train
    )


def train_ours(words: list[str]) -> None:
    """Fine-tune, as one rank."""
    from megatron_omega.run.train import train
    from megatron_omega.tasks.answering import Answers

    place = complete_environment()
    arguments = parse_arguments(words)
    overrides = (*arguments.overrides, read_tasks(arguments.tasks or ""))
    run = as_finetuning(replace(arguments, tasks=None, overrides=overrides), place.world_size)
    train(resolve_run(run.arguments, place.world_size), place, answering=Answers)


def losses_of(run: Path) -> list[float]:
    """Return the loss of each step."""
    return [json.loads(line)["lm_loss"] for line in (run / run_folder.METRICS).read_text().splitlines()]


class Questions(torch.utils.data.Dataset):
    """The pairs as ids."""

    def __init__(self, path: Path) -> None:
        tokenizer = tiny_tokenizer()
        rows = map(json.loads, path.read_text().splitlines())
        special = tokenizer.special
        self.rows = [
            {
                "input_ids": [special.modes.prefix, *tokenizer.encode(row["prompt"])],
                "labels": [*tokenizer.encode(row["target"]), special.eos],
            }
            for row in rows
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def train_theirs(folder: Path) -> tuple[list[float], float]:
    """Train the export with Seq2SeqTrainer; return the loss of each step, and the share of answers that are right."""
    import transformers

    from megatron_omega.export.hugging_face.registration import register

    register()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "export")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder / "export")
    settings = transformers.Seq2SeqTrainingArguments(
        output_dir=str(folder / "theirs"), max_steps=STEPS, per_device_train_batch_size=NUMBER, learning_rate=RATE,
        warmup_steps=WARM_UP, lr_scheduler_type="linear", adam_beta1=BETAS[0], adam_beta2=BETAS[1],
        adam_epsilon=EPSILON, max_grad_norm=CLIPPING, weight_decay=0.0, logging_steps=1, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, predict_with_generate=True,
        per_device_eval_batch_size=NUMBER,
    )  # fmt: skip
    data = Questions(folder / "questions.jsonl")
    trainer = transformers.Seq2SeqTrainer(
        model=model, args=settings, train_dataset=data, eval_dataset=data, processing_class=tokenizer,
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, model=model),
    )  # fmt: skip
    trainer.train()
    predicted: Any = trainer.predict(data, max_new_tokens=16).predictions  # pyright: ignore[reportArgumentType]
    ours = tiny_tokenizer()
    right = [
        ours.decode([i for i in row.tolist()[1:] if i in ours.text_ids]).strip()
        == ours.decode(wanted["labels"][:-1]).strip()
        for row, wanted in zip(predicted, data.rows, strict=True)
    ]
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], sum(right) / len(right)
