"""Prompts of an exact length in tokens, another one for each repetition and the same for all runs."""

import random
from pathlib import Path

from sana_model.config import ModelConfig
from sana_model.errors import UserError
from sana_model.prompt import DEFAULT_INSTRUCTION
from sana_model.tokenizer import Tokenizer

ENDINGS = ("", ".", ",", "!", "s", "ed", "ly", "ing")  # to gain a token or two where no whole word does


class Prompts:
    """prompts(i) is the i-th prompt: words of prompts.txt in seeded order, `text_tokens` caption states long.

    That is the length of what the DiT attends to: BOS, the last token of the instruction where there is one, and the
    prompt.
    """

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig, text_tokens: int, seed: int = 0):
        if not 1 < text_tokens <= config.max_text_tokens:
            raise UserError(f"--text-tokens must lie between 2 and {config.max_text_tokens} for {config.name}")
        self._tokenizer, self._target, self._seed = tokenizer, text_tokens, seed
        self._instruction = {"none": "", "default": DEFAULT_INSTRUCTION}.get(config.instruction, config.instruction)
        self._dropped = len(tokenizer.encode(self._instruction)) - 2 if self._instruction else 0
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
