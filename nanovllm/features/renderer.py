"""vLLM's renderer: prompts made into token ids ahead of `generate`."""

from collections.abc import Iterable, Mapping
from typing import Any

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.inputs.plain_tokenizer import in_full
from nanovllm.inputs.prompts import check_tokenization_kwargs, encode_prompts


class TokenizeParams:
    """Keywords for the tokenizer's `encode`: those of `tokenization_kwargs`."""

    def __init__(self, **kwargs: Any) -> None:
        self.kwargs = check_tokenization_kwargs(kwargs)

    def with_kwargs(self, **kwargs: Any) -> "TokenizeParams":
        """A copy with other keywords."""
        return TokenizeParams(**self.kwargs | kwargs)


class Renderer:
    """Of an engine; `LLM.chat` renders conversations."""

    def __init__(self, llm: LLMEngine) -> None:
        self._llm = llm
        self.tokenizer = in_full(llm.input_processor.tokenizer)

    @property
    def default_cmpl_tok_params(self) -> TokenizeParams:
        """The tokenizer's own defaults."""
        return TokenizeParams()

    def get_tokenizer(self) -> Any:
        """The engine's tokenizer."""
        return self.tokenizer

    def render_cmpl(
        self, prompts: Iterable[Any], tok_params: TokenizeParams | None = None
    ) -> list[dict[str, Any]]:
        """Each prompt as a dict of text and token ids, which `generate` takes.

        Args:
            prompts: strings, token ids, or dicts with either, as `parse_model_prompt` gives them.
            tok_params: None: `default_cmpl_tok_params`.

        Raises:
            ArgumentError: as for `generate`.
        """
        kwargs = (tok_params or self.default_cmpl_tok_params).kwargs
        vocab_size = self._llm.config.model_config.vocab_size
        encoded = encode_prompts(list(prompts), self.tokenizer, vocab_size, kwargs)
        return [
            {"type": "token", "prompt_token_ids": token_ids}
            | ({} if text is None else {"prompt": text})
            for text, token_ids in encoded
        ]


def parse_model_prompt(model_config: Any, prompt: Any) -> dict[str, Any]:
    """vLLM's: a prompt as a dict with its text or its token ids; it is checked where it is used."""
    if isinstance(prompt, Mapping):
        return dict(prompt)
    return {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": prompt}
