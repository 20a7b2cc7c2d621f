"""Answers to conversations, which the chat template makes prompts of."""

from collections.abc import Callable
from typing import Any

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.features.request_queue import enqueue
from nanovllm.inputs.chat import render_prompts, takes_chat_options
from nanovllm.lora_request import LoRARequests
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams


def chat(
    llm: LLMEngine,
    messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
    sampling_params: SamplingParams | list[SamplingParams] | None = None,
    use_tqdm: bool | Callable[..., Any] = True,
    lora_request: LoRARequests = None,
    chat_template: str | None = None,
    chat_template_content_format: str = "auto",
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: list[Any] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    tokenization_kwargs: dict[str, Any] | None = None,
    mm_processor_kwargs: None = None,
    priority: list[int] | None = None,
) -> list[RequestOutput]:
    """Answer conversations: `generate` on what the chat template makes of them.

    Args:
        messages: a conversation, or a list of them. It is a list of dicts with "role" and
            "content": a string, or a list of {"type": "text", "text": ...}.
        sampling_params, use_tqdm, priority: as for `generate`.
        chat_template: a Jinja template, or the path of a file with one; None: that of `LLM(...,
            chat_template=...)`, else the tokenizer's.
        chat_template_content_format: what the template is given as content: "string" ("auto"),
            text parts joined by newlines; "openai", a list of text parts.
        add_generation_prompt: end with the header of the model's answer.
        continue_final_message: leave the final message open, for the model to continue; needs
            `add_generation_prompt=False`.
        tools: what the model may call: dicts with JSON schemas, or documented functions.
        chat_template_kwargs: variables for the template, such as `enable_thinking` of Qwen3.
        tokenization_kwargs: for the tokenizer's `encode` of the rendered text; by default it
            adds no special tokens, as the template has written them.
        lora_request: as for `generate`, of the conversations.
        mm_processor_kwargs: only None.

    Returns:
        A `RequestOutput` for each conversation, whose `prompt` is the rendered text.

    Raises:
        ArgumentError: an argument is wrong, or the template refuses a conversation; nothing
            was queued then.
    """
    prompts = render_prompts(
        llm,
        messages,
        chat_template,
        chat_template_content_format,
        add_generation_prompt,
        continue_final_message,
        tools,
        chat_template_kwargs,
        tokenization_kwargs,
        mm_processor_kwargs,
    )
    return llm.generate(
        prompts, sampling_params, use_tqdm, lora_request=lora_request, priority=priority
    )


@takes_chat_options
def enqueue_chat(
    llm: LLMEngine,
    messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
    sampling_params: SamplingParams | list[SamplingParams] | None = None,
    use_tqdm: bool | Callable[..., Any] = True,
    lora_request: LoRARequests = None,
    priority: list[int] | None = None,
    *options: Any,
    **named_options: Any,
) -> list[str]:
    """Queue conversations without running them, for `wait_for_completion`; returns their ids.

    Arguments and errors are those of `chat`, and the priorities of `generate`.
    """
    prompts = render_prompts(llm, messages, *options, **named_options)
    return enqueue(llm, prompts, sampling_params, lora_request, priority, use_tqdm)
