"""The tokenizer of `sana-tiny`: byte-pair encoding (arXiv 1508.07909) learned from the captions of the data set.

Its smallest pieces are bytes, so any text has ids; what the grammar says often is one token. `transformers` reads the
files as well.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from recipes.captions import COLOURS, STYLES, canonical
from recipes.data import Row

VOCABULARY = 2048
SPECIAL = ("<pad>", "<eos>", "<bos>")  # ids 0, 1, 2, as in the text encoder's config.json


def captions(rows: Iterable[Row]) -> Iterator[str]:
    """Every concept as often as it has colours, every tag once."""
    for row in rows:
        yield from (canonical(row.name, row.style, colour) for colour in COLOURS)
        yield ", ".join((*STYLES[row.style], *row.tags))


def train_tokenizer(rows: Iterable[Row], folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json for the captions of `rows`; the same rows give the same files."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(captions(rows), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
    )
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "padding_side": "right",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
