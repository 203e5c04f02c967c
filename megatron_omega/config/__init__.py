"""Configuration: what can be set (`schema`), how it is read (`load`), what DeepSpeed is told (`deepspeed`)."""

from megatron_omega.config.schema import RunConfig

__all__ = ["RunConfig"]
