"""After pretraining: fine-tuning on supervised tasks."""
