"""A model of ours inside lm-evaluation-harness: `megatron-omega lm-eval`, or its model `omega` from Python.

    import megatron_omega.tasks.harness
    lm_eval.simple_evaluate("omega", model_args={"checkpoint": "runs/omega-tiny"}, tasks=["arc_easy"])

Importing it registers the model; needs the extra `harness`. What three kinds of requests mean for an encoder-decoder
is defined in docs/likelihoods.md: a context goes to the encoder, what is scored or written to the decoder, and a whole
text is scored as what follows nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from megatron_omega.errors import ConfigError
from megatron_omega.export.loading import load_text_model
from megatron_omega.generation.requests import Request
from megatron_omega.generation.sampling import Sampling
from megatron_omega.tasks.likelihood import Asked, likelihoods
from megatron_omega.tasks.questions import text_asked
from megatron_omega.tasks.scoring import answered, request_of

_NEW_TOKENS = 256
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the same limit, the first that is given counts."""
_KNOWN = {*_LENGTHS, "until", "do_sample", "temperature", "top_k", "top_p"}


@register_model("omega")
class OmegaLM(LM):
    """A checkpoint of any layout, a run, an export, or adapters."""

    def __init__(
        self, checkpoint: str, device: str | None = None, tokenizer: str | None = None, seed: int = 0, **unused: Any
    ) -> None:
        """`unused`: batch sizes and the like, which the harness gives every model; batches follow from lengths here."""
        super().__init__()
        self.model = load_text_model(checkpoint, device or "cpu", tokenizer=tokenizer)
        self._seed = seed

    @property
    def tokenizer_name(self) -> str:
        return self.model.tokenizer.fingerprint

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return log p(continuation | context) and whether it is greedy, of every (context, continuation)."""
        asked = [text_asked(self.model.tokenizer, *request.args[:2]) for request in requests]
        return [(one.nats, one.is_greedy) for one in likelihoods(self.model, asked)]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return log p of every whole text."""
        ids = [tuple(self.model.tokenizer.encode(request.args[0])) for request in requests]
        known = iter(likelihoods(self.model, [Asked((), text) for text in ids if text]))
        return [next(known).nats if text else 0.0 for text in ids]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what follows every context, up to its stop strings."""
        return answered(self.model, [self._request(number, *one.args[:2]) for number, one in enumerate(requests)])

    def _request(self, number: int, context: str, options: Mapping[str, Any]) -> Request:
        if strangers := sorted(set(options) - _KNOWN):
            raise ConfigError(f"generation_kwargs {', '.join(strangers)} are not known here; use {', '.join(_KNOWN)}")
        most = int(next((options[name] for name in _LENGTHS if options.get(name) is not None), _NEW_TOKENS))
        until = options.get("until") or []
        draws = options.get("do_sample", options.get("temperature", 0.0) > 0)
        sampling = Sampling(
            float(options.get("temperature", 1.0)) if draws else 0.0,
            int(options.get("top_k") or 0),
            float(options.get("top_p") or 1.0),
        )
        stop = tuple([until] if isinstance(until, str) else until)
        ids = tuple(self.model.tokenizer.encode(context))
        return request_of(self.model, ids, most, sampling=sampling, stop=stop, seed=self._seed + number)
