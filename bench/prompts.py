"""Prompts of an exact length in tokens, another one for each repetition and the same for all runs."""

import random
from dataclasses import replace
from pathlib import Path

from sana_model.config import ModelConfig
from sana_model.errors import UserError
from sana_model.prompt import DEFAULT_INSTRUCTION
from sana_model.tokenizer import ByteTokenizer, Tokenizer
from sana_model.weights.loaded import LoadedModel

ENDINGS = ("", ".", ",", "!", "s", "ed", "ly", "ing")  # to gain a token or two where no whole word does
GEMMAS_INSTRUCTION = (
    209  # tokens of the default instruction, BOS included: counted with Gemma-3's tokenizer, like Gemma-2's
)


def with_gemmas_lengths(loaded: LoadedModel) -> LoadedModel:
    """Random weights read bytes, five times as many as Gemma's tokens: their default instruction, cut to Gemma's length.

    diffusers computes it for every picture, and would be slowed by what none of its users waits for.
    """
    if loaded.config.instruction != "default" or not isinstance(loaded.tokenizer, ByteTokenizer):
        return loaded
    return replace(loaded, config=replace(loaded.config, instruction=DEFAULT_INSTRUCTION[: GEMMAS_INSTRUCTION - 1]))


def check_length(text_tokens: int, config: ModelConfig) -> None:
    """Raise UserError for a prompt that the model would not read, or not whole."""
    if not 1 < text_tokens <= config.max_text_tokens:
        raise UserError(f"--text-tokens must lie between 2 and {config.max_text_tokens} for {config.name}")


class Prompts:
    """prompts(i) is the i-th prompt: words of prompts.txt in seeded order, `text_tokens` caption states long.

    That is the length of what the DiT attends to: BOS, the last token of the instruction where there is one, and the
    prompt.
    """

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig, text_tokens: int, seed: int = 0):
        check_length(text_tokens, config)
        self._tokenizer, self._target, self._seed = tokenizer, text_tokens, seed
        self._instruction = {"none": "", "default": DEFAULT_INSTRUCTION}.get(config.instruction, config.instruction)
        self.instruction_tokens = len(tokenizer.encode(self._instruction)) if self._instruction else 0
        self._dropped = max(self.instruction_tokens - 2, 0)
        lines = (Path(__file__).parent / "prompts.txt").read_text(encoding="utf-8").splitlines()
        self._words = sorted({word for line in lines if not line.startswith("#") for word in line.lower().split()})

    def __call__(self, i: int) -> str:
        """Raises UserError where the tokenizer allows no prompt of that length."""
        order = random.Random(f"{self._seed} {i}")
        words: list[str] = []
        for _ in range(64 * self._target):
            word = order.choice(self._words)
            for ending in ENDINGS if self._target - self.length(" ".join(words)) <= 16 else ENDINGS[:1]:
                length = self.length(" ".join([*words, word + ending]))
                if length == self._target:
                    return " ".join([*words, word + ending])
            if self.length(" ".join([*words, word])) < self._target:
                words.append(word)
        raise UserError(f"no prompt of {self._target} text tokens was found; try another --text-tokens")

    def length(self, prompt: str) -> int:
        """How many caption states a prompt has."""
        return len(self._tokenizer.encode(self._instruction + prompt)) - self._dropped
