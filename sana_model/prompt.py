"""Prompts to caption states: what the cross-attention of the diffusion transformer reads.

SANA gives Gemma-2 an instruction that asks for a richer description, followed by the prompt (the "complex human
instruction" of arXiv 2410.10629). Of the resulting states it keeps the first (BOS) and those from the last token of the
instruction on. A causal model gives every prompt the same states for the same beginning, so the keys and values of the
instruction are computed once, and pads not at all; neither changes a state beyond rounding.

The two public implementations read a prompt differently (`ModelConfig.dialect`):

                          diffusers                      original
    prompt                lower-cased, stripped          stripped (flags such as `--ar 3:4` are not cut off here)
    negative prompt       lower-cased, stripped          as written
    default instruction   'Enhanced prompt'              "Enhanced prompt"
    negative states       its own tokens                 those of its padded form, as many as the prompt has: the mask
                                                         of the prompt serves for both, so states of pads are read
"""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sana_model.config import ModelConfig
from sana_model.errors import UserError
from sana_model.text_encoder import PrefixCache, TextEncoder
from sana_model.tokenizer import Tokenizer

# A published constant of the SANA release, here as diffusers writes it.
DEFAULT_INSTRUCTION = "\n".join(
    (
        "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for"
        " image generation. Evaluate the level of detail in the user prompt:",
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial"
        " relationships to create vivid and concrete scenes.",
        "- If the prompt is already detailed, refine and enhance the existing details slightly without"
        " overcomplicating.",
        "Here are examples of how to transform or refine prompts:",
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping"
        " peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street"
        " lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass"
        " skyscrapers.",
        "Please generate only the enhanced description for the prompt below and avoid including any additional"
        " commentary or evaluations:",
        "User Prompt: ",
    )
)


@dataclass(frozen=True)
class CaptionStates:
    """The states of a batch of captions without their pads."""

    states: Tensor  # (B, L, hidden), zeros after each caption's end; L is the longest of the batch
    lengths: Tensor  # (B,) int64, on the device of the states

    @classmethod
    def stack(cls, rows: list[Tensor]) -> "CaptionStates":
        """From one (length, hidden) per caption."""
        if not rows:
            raise UserError("there is no prompt")
        lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
        return cls(pad_sequence(rows, batch_first=True), lengths)


class PromptEncoder:
    """Text encoder and tokenizer of one model. Safe to share between threads.

    The latest instructions and captions are remembered by their text; `clear` forgets them, as is needed when the
    weights of the text encoder change. Each caption is computed by itself: its states do not depend on its batch.
    """

    def __init__(self, text_encoder: TextEncoder, tokenizer: Tokenizer, config: ModelConfig):
        self.text_encoder, self.tokenizer, self.config = text_encoder, tokenizer, config
        self._captions = _Cache(64)  # at most 1.4 MB each, for Gemma-2-2B in bf16
        self._prefixes = _Cache(2)  # 22 MB each, for the default instruction

    def encode(self, prompts: list[str], instruction: str | None = None) -> CaptionStates:
        """The states of prompts after an instruction.

        `instruction`: "default", "none", a text of one's own (the prompt follows it directly: end it in a space or a
        line break), or None for that of the model's configuration. The end of a prompt that is too long is cut off,
        with a warning. UserError where there is no prompt, or the tokenizer is that of another model.
        """
        instruction = self.instruction(self.config.instruction if instruction is None else instruction)
        return CaptionStates.stack([self._caption(self._clean(prompt), instruction) for prompt in prompts])

    def encode_negative(self, prompts: list[str]) -> CaptionStates:
        """The states of negative prompts, which get no instruction. An empty one has a single state, that of BOS."""
        return CaptionStates.stack([self._caption(self._clean_negative(prompt), "") for prompt in prompts])

    def encode_pair(
        self, prompts: list[str], negatives: list[str], instruction: str | None = None
    ) -> tuple[CaptionStates, CaptionStates]:
        """(negative, positive) states for classifier-free guidance, as the dialect has them; a negative per prompt."""
        if len(prompts) != len(negatives):
            raise UserError(f"{len(prompts)} prompts and {len(negatives)} negative prompts: give one for each")
        positive = self.encode(prompts, instruction)
        if self.config.dialect == "diffusers":
            return self.encode_negative(negatives), positive
        rows = [self._padded_caption(self._clean_negative(prompt)) for prompt in negatives]
        return CaptionStates.stack([row[:n] for row, n in zip(rows, positive.lengths.tolist(), strict=True)]), positive

    def clear(self) -> None:
        """Forget every instruction and caption."""
        self._captions.clear()
        self._prefixes.clear()

    def instruction(self, instruction: str) -> str:
        """What goes in front of a prompt where `encode` is given this `instruction`."""
        if instruction == "none":
            return ""
        if instruction != "default":
            return instruction
        return DEFAULT_INSTRUCTION if self.config.dialect == "diffusers" else DEFAULT_INSTRUCTION.replace("'", '"')

    def _clean(self, prompt: str) -> str:
        return prompt.lower().strip() if self.config.dialect == "diffusers" else prompt.strip()

    def _clean_negative(self, prompt: str) -> str:
        return prompt.lower().strip() if self.config.dialect == "diffusers" else prompt

    def _caption(self, prompt: str, instruction: str) -> Tensor:
        """(length, hidden) of one prompt after an instruction ("" for none)."""
        limit = self.config.max_text_tokens

        def compute() -> Tensor:
            if not instruction:
                return self._states(self._ids(prompt, limit))
            prefix_ids, prefix = self._prefix(instruction)
            kept_from = len(prefix_ids)
            ids = self._ids(instruction + prompt, kept_from + limit - 1)  # BOS takes the place that is left
            # The space that ends the instruction may fuse with the first word: only equal tokens come from the prefix.
            common = _common(ids[:-1], prefix_ids)
            states = torch.cat([prefix.states[:common], self._states(ids[common:], prefix.take(common))])
            return torch.cat([states[:1], states[kept_from:]])

        return self._captions.get((prompt, instruction, *self._placement()), compute)

    def _padded_caption(self, prompt: str) -> Tensor:
        """(max_text_tokens, hidden) of one prompt without instruction, its pads included."""
        limit = self.config.max_text_tokens

        def compute() -> Tensor:
            ids = self._ids(prompt, limit)
            return self._states(ids + [self.tokenizer.pad_id] * (limit - len(ids)), length=len(ids))

        return self._captions.get((prompt, None, *self._placement()), compute)

    def _prefix(self, instruction: str) -> tuple[list[int], PrefixCache]:
        """Ids and cache of the instruction without its last token, the first whose state is kept."""

        def compute() -> tuple[list[int], PrefixCache]:
            ids = self._ids(instruction)[:-1]
            if not ids:
                raise UserError(f"the instruction {instruction!r} is too short: 'none' stands for no instruction")
            with torch.no_grad():
                return ids, self.text_encoder.prefix(self._tensor(ids))

        return self._prefixes.get((instruction, *self._placement()), compute)

    def _states(self, ids: list[int], prefix: PrefixCache | None = None, length: int | None = None) -> Tensor:
        """(len(ids), hidden) of one text, of whose ids the first `length` (default: all) are no pads."""
        with torch.no_grad():
            lengths = self._tensor([len(ids) if length is None else length])
            return self.text_encoder(self._tensor(ids)[None], lengths, prefix)[0]

    def _ids(self, text: str, limit: int | None = None) -> list[int]:
        ids = self.tokenizer.encode(text)
        vocab = self.config.text.vocab
        if not ids:
            raise UserError("the prompt is empty, and this tokenizer adds no token that begins a text: give a prompt")
        if max(ids) >= vocab:
            raise UserError(
                f"the tokenizer gave token {max(ids)}, the text encoder knows {vocab}: they are of different models"
            )
        if limit is not None and len(ids) > limit:
            cut = self.tokenizer.decode(ids[limit:])
            warnings.warn(
                f"the prompt is {len(ids) - limit} tokens too long for this model, which reads"
                f" {self.config.max_text_tokens}; ignored from there on: {cut[:200]!r}",
                stacklevel=2,
            )
        return ids[:limit]

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor(ids, device=self._placement()[0])

    def _placement(self) -> tuple[torch.device, torch.dtype]:
        """Where and in which dtype the text encoder computes; part of every key, for a model may be moved."""
        weight = self.text_encoder.norm.weight
        return weight.device, weight.dtype


class _Cache:
    """The latest values by key, at most `size`. Two threads may compute one value twice, but never mix up two."""

    def __init__(self, size: int):
        self._size, self._lock = size, threading.Lock()
        self._values: OrderedDict[Hashable, object] = OrderedDict()

    def get(self, key: Hashable, compute: Callable):
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = compute()  # without the lock: others need not wait for the network
        with self._lock:
            self._values[key] = value
            while len(self._values) > self._size:
                self._values.popitem(last=False)
        return value

    def clear(self) -> None:
        with self._lock:
            self._values.clear()


def _common(first: list[int], second: list[int]) -> int:
    """How many elements the beginnings of two lists share."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count
