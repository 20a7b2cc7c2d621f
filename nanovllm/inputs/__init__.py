"""From what a user gives to token ids, and from token ids to text.

Prompts are strings, lists of token ids, or dicts, for which there are vLLM's names.
"""

from typing import TypedDict


class _Text(TypedDict):
    prompt: str


class TextPrompt(_Text, total=False):
    """A prompt that is text."""


class _Tokens(TypedDict):
    prompt_token_ids: list[int]


class TokensPrompt(_Tokens, total=False):
    """A prompt that is token ids; `prompt` is kept as its text."""

    prompt: str


TokensInput = TokensPrompt  # what vLLM's renderer makes of a prompt
PromptType = str | list[int] | TextPrompt | TokensPrompt
SingletonPrompt = PromptType
