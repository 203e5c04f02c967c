"""Let Transformers know GPT-Omega where this package is installed: folders load without trust_remote_code."""

from __future__ import annotations


def register() -> None:
    """Make AutoConfig and AutoModel... of Transformers load GPT-Omega from this package; again does no harm."""
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
    )

    from megatron_omega.export.hugging_face.model.configuration_gpt_omega import GPTOmegaConfig
    from megatron_omega.export.hugging_face.model.modeling_gpt_omega import (
        GPTOmegaForCausalLM,
        GPTOmegaForConditionalGeneration,
        GPTOmegaForMaskedLM,
    )
    from megatron_omega.export.hugging_face.model.stacks_gpt_omega import GPTOmegaModel
    from megatron_omega.export.hugging_face.model.tokenization_gpt_omega import GPTOmegaTokenizerFast

    AutoConfig.register(GPTOmegaConfig.model_type, GPTOmegaConfig, exist_ok=True)
    AutoTokenizer.register(GPTOmegaConfig, fast_tokenizer_class=GPTOmegaTokenizerFast, exist_ok=True)
    GPTOmegaConfig.register_for_auto_class()
    GPTOmegaTokenizerFast.register_for_auto_class()
    for auto, model in (
        (AutoModel, GPTOmegaModel),
        (AutoModelForSeq2SeqLM, GPTOmegaForConditionalGeneration),
        (AutoModelForCausalLM, GPTOmegaForCausalLM),
        (AutoModelForMaskedLM, GPTOmegaForMaskedLM),
    ):
        auto.register(GPTOmegaConfig, model, exist_ok=True)
        model.register_for_auto_class(auto.__name__)  # what is saved from here carries the code again
