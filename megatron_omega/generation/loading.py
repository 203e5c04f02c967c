"""The path that the page of an export by version 0.1 names; what is here lives in `export.loading`."""

from megatron_omega.export.loading import load_omega, load_text_model

__all__ = ["load_omega", "load_text_model"]
