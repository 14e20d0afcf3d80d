"""Text to token ids: the tokenizer of a checkpoint folder, and a bundled one whose tokens are bytes.

Both are a `tokenizer.json` run by the `tokenizers` package; transformers reads the same file and gives the same ids.
"""

import json
from pathlib import Path

import tokenizers

from sana_model.errors import UserError


class Tokenizer:
    """`encode` gives the ids of a text, beginning-of-text token (BOS) included, neither padded nor truncated."""

    def __init__(self, backend: tokenizers.Tokenizer, pad_id: int, bos_id: int | None = None):
        """`bos_id`: prepended where the post-processor of `backend` does not do so itself."""
        backend.no_padding()  # a file may carry the settings of its last use
        backend.no_truncation()
        self._backend, self._bos_id = backend, bos_id
        self.pad_id = pad_id

    def encode(self, text: str) -> list[int]:
        """UserError for a str that no UTF-8 text decodes to, as the shell makes of other encodings."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"the text {text!r} is not valid Unicode: {error.reason} at {error.start}") from error
        ids = self._backend.encode(text).ids
        return ids if self._bos_id is None or ids[:1] == [self._bos_id] else [self._bos_id, *ids]

    def decode(self, ids: list[int]) -> str:
        """The text of the ids, without special tokens."""
        return self._backend.decode(ids)


class ByteTokenizer(Tokenizer):
    """One token per byte of UTF-8, for models without a vocabulary of their own: byte b has id b + 3."""

    SPECIAL = ("<pad>", "<eos>", "<bos>")  # ids 0, 1, 2

    def __init__(self):
        super().__init__(tokenizers.Tokenizer.from_str(json.dumps(self._json())), pad_id=0)

    @classmethod
    def _json(cls) -> dict:
        """The tokenizer.json: an empty vocabulary of characters, so that each one falls back to its bytes."""
        bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
        text, second = ({"Sequence": {"id": id, "type_id": 0}} for id in "AB")
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
        vocab = [*cls.SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
        return {
            "version": "1.0",
            "added_tokens": [{"id": i, "content": token} | flags for i, token in enumerate(cls.SPECIAL)],
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [bos, text],
                "pair": [bos, text, second],
                "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
            },
            "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": {
                "type": "BPE",
                "byte_fallback": True,
                "vocab": {token: id for id, token in enumerate(vocab)},
                "merges": [],
            },
        }

    def save(self, folder: str | Path) -> None:
        """Write `folder` as the tokenizer/ of a diffusers folder; `load_tokenizer` and transformers read it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "<pad>",
            "eos_token": "<eos>",
            "bos_token": "<bos>",
            "padding_side": "right",
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in the tokenizer/ of a diffusers folder: tokenizer.json and tokenizer_config.json.

    UserError where a file is missing, damaged or names no padding token.
    """
    folder = Path(folder)
    file = folder / "tokenizer.json"
    if not file.is_file():
        if (folder / "tokenizer.model").is_file():
            raise UserError(
                f"{folder} has only a SentencePiece tokenizer.model; tokenizer.json is needed. To make one"
                " (pip install transformers sentencepiece protobuf):\n"
                '  python -c "from transformers import AutoTokenizer as T;'
                f" T.from_pretrained(r'{folder}').save_pretrained(r'{folder}')\""
            )
        raise UserError(f"{folder} has no tokenizer.json; it belongs to the checkpoint, next to the other parts")
    try:
        backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the package raises nothing more specific
        raise UserError(f"{file} is no tokenizer that `tokenizers` can read: {error}") from error
    config = _config(folder / "tokenizer_config.json")
    pad_id, bos_id = (_id(backend, config.get(key)) for key in ("pad_token", "bos_token"))
    if pad_id is None:
        raise UserError(f"{folder / 'tokenizer_config.json'} names no pad_token that tokenizer.json knows")
    return Tokenizer(backend, pad_id, bos_id if config.get("add_bos_token") else None)


def _config(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}, which names the special tokens: {error}") from error


def _id(backend: tokenizers.Tokenizer, token: str | dict | None) -> int | None:
    """Id of a special token as tokenizer_config.json writes it: its text, or a dict with the text as "content"."""
    text = token["content"] if isinstance(token, dict) else token
    return None if text is None else backend.token_to_id(text)
