"""Prompt to caption states against diffusers' SanaPipeline, and the tokenizers against transformers."""

import inspect
import threading
import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from compare import assert_close
from diffusers import SanaPipeline

from sana_model.config import BUILT_IN, TextEncoderConfig
from sana_model.errors import UserError
from sana_model.prompt import DEFAULT_INSTRUCTION, PromptEncoder
from sana_model.text_encoder import TextEncoder
from sana_model.tokenizer import ByteTokenizer, load_tokenizer

TEXT = TextEncoderConfig(
    vocab=320, hidden=64, layers=3, heads=4, kv_heads=2, head_dim=32, ffn=128, query_pre_attn_scalar=32.0,
    sliding_window=50,
)  # fmt: skip
CONFIG = replace(BUILT_IN["sana-tiny-random"], text=TEXT, max_text_tokens=24)
OWN = "Draw this dog: "
MIDWORD = "Now draw this: he"
PROMPTS = ["A Cat ", "", "  täglich\n10 Hände 🦊", "cat dog", "a cat and a dog and a cat and a dog and a CAT and a dog"]
CLOSE = 1e-5  # of the RMS of the states


@pytest.fixture(scope="module")
def gemma() -> transformers.Gemma2Model:
    torch.manual_seed(0)
    model = transformers.Gemma2Model(
        transformers.Gemma2Config(
            vocab_size=TEXT.vocab, hidden_size=TEXT.hidden, intermediate_size=TEXT.ffn, num_hidden_layers=TEXT.layers,
            num_attention_heads=TEXT.heads, num_key_value_heads=TEXT.kv_heads, head_dim=TEXT.head_dim,
            query_pre_attn_scalar=32, sliding_window=TEXT.sliding_window, attn_implementation="eager",
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=0.3 if "norm" in name else 2 * weight.shape[-1] ** -0.5)
        model.embed_tokens.weight[:, 7] *= 20
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    """bytes: the bundled tokenizer. fusing: Gemma's in small, where a space and the word after it can be one token."""
    root = tmp_path_factory.mktemp("tokenizers")
    ByteTokenizer().save(root / "bytes")
    merges = [("▁", "c"), ("▁c", "a"), ("▁ca", "t"), ("o", "g"), ("▁", "d"), ("▁d", "og"), ("e", "n"), ("h", "en")]
    characters = [*(f"<0x{byte:02X}>" for byte in range(256)), *"▁catdoghinser"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *characters, *(a + b for a, b in merges)]
    vocab = {token: id for id, token in enumerate(tokens)}
    transformers.GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True).save_pretrained(root / "fusing")
    return {name: root / name for name in ("bytes", "fusing")}


@pytest.fixture(scope="module", params=["bytes", "fusing"])
def folder(request, folders):
    return folders[request.param]


def prompt_encoder(gemma, folder, **changes) -> PromptEncoder:
    encoder = TextEncoder(TEXT).requires_grad_(False)
    encoder.load_state_dict(gemma.state_dict())
    return PromptEncoder(encoder, load_tokenizer(folder), replace(CONFIG, **changes))


def diffusers_states(gemma, folder, prompts, instruction, negative="") -> tuple[list, list]:
    """What diffusers' cross-attention sees: per prompt, the states that are not masked; (negative, positive)."""
    pipeline = SanaPipeline(transformers.AutoTokenizer.from_pretrained(folder), gemma, None, None, None)
    states, mask, negative_states, negative_mask = pipeline.encode_prompt(
        prompts, negative_prompt=negative, device=torch.device("cpu"), max_sequence_length=CONFIG.max_text_tokens,
        complex_human_instruction=instruction.split("\n") if instruction else None,
    )  # fmt: skip
    return (
        [s[m.bool()] for s, m in zip(negative_states, negative_mask, strict=True)],
        [s[m.bool()] for s, m in zip(states, mask, strict=True)],
    )


def assert_captions(captions, rows):
    """Equal in number and value; and zero where a caption has ended."""
    assert captions.lengths.tolist() == [len(row) for row in rows]
    assert captions.states.shape[1] == max(len(row) for row in rows)
    for states, row in zip(captions.states, rows, strict=True):
        assert_close(states[: len(row)], row, CLOSE)
        assert not states[len(row) :].any()


def test_the_instruction_is_the_published_one():
    default = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    assert "\n".join(default) == DEFAULT_INSTRUCTION
    assert len(DEFAULT_INSTRUCTION) == 1057


@pytest.mark.filterwarnings("ignore:the prompt is")
@pytest.mark.parametrize("instruction", ["none", "default", OWN, MIDWORD])
def test_equals_diffusers(instruction, gemma, folder):
    """Different lengths, truncation, the empty prompt, and seams where the first word fuses with the instruction."""
    text = {"none": "", "default": DEFAULT_INSTRUCTION}.get(instruction, instruction)
    prompts = [*PROMPTS, "n", "n cat"]
    negative, positive = diffusers_states(gemma, folder, prompts, text, "Ugly, täglich")
    ours = prompt_encoder(gemma, folder).encode_pair(prompts, ["Ugly, täglich"] * len(prompts), instruction)
    assert_captions(ours[1], positive)
    assert_captions(ours[0], negative)


@pytest.mark.parametrize("wrong", ["instruction", "quotes", "case", "length"])
def test_what_is_read_matters(wrong, gemma, folder):
    _, rows = diffusers_states(gemma, folder, ["A Cat"], DEFAULT_INSTRUCTION)
    encoder = prompt_encoder(gemma, folder)
    assert_captions(encoder.encode(["a cat"], "default"), rows)
    instruction, prompt = DEFAULT_INSTRUCTION, "a cat"
    if wrong == "instruction":
        instruction = instruction[:-1] + "\n"
    elif wrong == "quotes":
        instruction = instruction.replace("'", '"')
    elif wrong == "case":
        encoder, prompt = prompt_encoder(gemma, folder, dialect="original"), "A Cat"
    else:
        prompt = "a cats"
    with pytest.raises(AssertionError):
        assert_captions(encoder.encode([prompt], instruction), rows)


def test_seams_do_fuse(folders):
    """The case that the prefix cache must survive does occur in these tests."""
    tokenizer = load_tokenizer(folders["fusing"])
    for instruction, prompt, changed in ((DEFAULT_INSTRUCTION, "cat", 1), (MIDWORD, "n cat", 2)):
        alone, together = tokenizer.encode(instruction), tokenizer.encode(instruction + prompt)
        assert together[: len(alone) - changed] == alone[:-changed]
        assert together[len(alone) - changed] != alone[-changed]


def test_empty_negative_is_bos(gemma, folder):
    encoder = prompt_encoder(gemma, folder)
    negative, _ = diffusers_states(gemma, folder, ["cat", "dog"], "")
    assert_captions(encoder.encode_negative(["", ""]), negative)
    assert negative[0].shape == (1, TEXT.hidden)


@pytest.mark.filterwarnings("ignore:the prompt is")
@pytest.mark.parametrize("negative", ["", "Ugly dog", "a cat and a dog and a cat and a dog and a cat"])
def test_original_dialect(negative, gemma, folder):
    """Case and quotes as written; negative states, pads among them, under the mask of the prompt."""
    prompts, limit = ["A Cat ", "a cat and a Dog"], CONFIG.max_text_tokens
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="right")

    def run(texts, limit):
        tokens = tokenizer(texts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
        return gemma(tokens.input_ids, attention_mask=tokens.attention_mask)[0], tokens.attention_mask

    chi = DEFAULT_INSTRUCTION.replace("'Enhanced prompt'", '"Enhanced prompt"')
    states, mask = run([chi + prompt.strip() for prompt in prompts], len(tokenizer.encode(chi)) + limit - 2)
    kept = [0, *range(1 - limit, 0)]
    states, mask, null = states[:, kept], mask[:, kept].bool(), run([negative], limit)[0][0]
    encoder = prompt_encoder(gemma, folder, dialect="original", instruction="default")
    ours = encoder.encode_pair(prompts, [negative] * 2)
    assert_captions(ours[1], [s[m] for s, m in zip(states, mask, strict=True)])
    assert_captions(ours[0], [null[m] for m in mask])
    own = encoder.encode_negative([negative])
    assert_captions(own, [null[: own.lengths[0]]])
    assert own.lengths[0] == min(len(tokenizer(negative).input_ids), limit)


def test_a_prompt_that_is_too_long_warns_of_what_is_cut(gemma, folders):
    encoder = prompt_encoder(gemma, folders["bytes"])
    with pytest.warns(UserWarning, match="4 tokens too long for this model, which reads 24; .*: 'end.'"):
        encoder.encode(["x" * 23 + "end."])
    with pytest.warns(UserWarning, match="1 tokens too long .*: '.'"):
        encoder.encode(["x" * 22 + "."], "default")  # one place is the last token's of the instruction
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(["x" * 23])


def test_states_do_not_depend_on_the_batch(gemma, folder):
    encoder = prompt_encoder(gemma, folder)
    both = encoder.encode(["cat", "a cat and a dog"], OWN)
    encoder.clear()
    alone = encoder.encode(["cat"], OWN).states
    assert torch.equal(both.states[0, : alone.shape[1]], alone[0])


def count_forwards(encoder: PromptEncoder) -> list[int]:
    """The number of tokens of every call of the network from now on."""
    calls = []
    encoder.text_encoder.register_forward_hook(lambda module, args, output: calls.append(output.shape[1]))
    return calls


def test_what_was_computed_is_remembered(gemma, folders):
    encoder = prompt_encoder(gemma, folders["bytes"])
    calls = count_forwards(encoder)
    first = encoder.encode_pair(["cat"], [""], "default")
    assert sorted(calls) == [1, 4]  # BOS alone; "cat" and the last token of the instruction
    first[1].states.zero_()  # a caller's tensors are its own
    second = encoder.encode_pair(["CAT", "cat"], ["", ""], "default")
    assert len(calls) == 2
    assert second[1].states.any()
    encoder.encode(["cat"], OWN)
    assert len(calls) == 3
    encoder.clear()
    encoder.encode(["cat"], OWN)
    assert len(calls) == 4
    encoder.text_encoder.double()  # makes everything so far useless
    states = encoder.encode(["cat"], OWN).states
    encoder.clear()
    assert torch.equal(states, encoder.encode(["cat"], OWN).states)
    for i in range(100):
        encoder.encode([str(i)])
    calls.clear()
    encoder.encode(["cat"], OWN)
    assert calls, "memory is bounded"


def test_threads_get_their_own_states(gemma, folder):
    prompts = [f"{animal} {i}" for i in range(15) for animal in ("cat", "dog")]
    expected = [prompt_encoder(gemma, folder).encode([prompt], OWN).states for prompt in prompts]
    shared, results = prompt_encoder(gemma, folder), {}

    def work(own: int) -> None:
        for i in range(len(prompts)) if own else reversed(range(len(prompts))):
            results[own, i] = shared.encode([prompts[i]], OWN).states

    threads = [threading.Thread(target=work, args=(own,)) for own in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2 * len(prompts)
    assert all(torch.equal(states, expected[i]) for (_, i), states in results.items())


def test_mistakes_are_explained(gemma, folders):
    encoder = prompt_encoder(gemma, folders["bytes"])
    with pytest.raises(UserError, match="no prompt"):
        encoder.encode([])
    with pytest.raises(UserError, match="2 prompts and 1 negative"):
        encoder.encode_pair(["a", "b"], [""])
    with pytest.raises(UserError, match="not valid Unicode"):
        encoder.encode(["caf\udce9"])
    encoder.config = replace(CONFIG, text=replace(TEXT, vocab=100))
    with pytest.raises(UserError, match="different models"):
        encoder.encode(["cat"])


@pytest.mark.parametrize("text", ["", " a  cat ", "Füchse 🦊\n\t\x00", "dog<bos>cat<pad> <0x41>", "▁cat"])
def test_tokenizer_equals_transformers(text, folder):
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.encode(text) == theirs(text).input_ids
    assert ours.encode(text)[0] == theirs.bos_token_id == 2
    assert ours.pad_id == theirs.pad_token_id == 0


def test_byte_tokenizer():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("a\xff") == [2, 100, 0xC3 + 3, 0xBF + 3]
    assert tokenizer.decode(tokenizer.encode("täglich 🦊")) == "täglich 🦊"
    assert max(tokenizer.encode("\U0010ffff" + chr(127))) < BUILT_IN["sana-tiny-random"].text.vocab


def test_bos_is_added_where_only_the_configuration_asks_for_it(folders, tmp_path):
    json = (folders["bytes"] / "tokenizer.json").read_text()
    start, end = json.index('"post_processor"'), json.index('"decoder"')
    (tmp_path / "tokenizer.json").write_text(json[:start] + '"post_processor": null, ' + json[end:])
    config = '{"pad_token": {"content": "<pad>"}, "bos_token": "<bos>", "add_bos_token": %s}'
    for flag, ids in (("true", [2, 100]), ("false", [100])):
        (tmp_path / "tokenizer_config.json").write_text(config % flag)
        assert load_tokenizer(tmp_path).encode("a") == ids


def test_folders_that_hold_no_tokenizer(folders, tmp_path):
    def load(match: str):
        with pytest.raises(UserError, match=match):
            load_tokenizer(tmp_path)

    load("no tokenizer.json")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    load("only a SentencePiece tokenizer.model.*\n.*save_pretrained")
    (tmp_path / "tokenizer.json").write_text("{")
    load("no tokenizer that")
    (tmp_path / "tokenizer.json").write_bytes((folders["bytes"] / "tokenizer.json").read_bytes())
    load("cannot read .*tokenizer_config.json")
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<nothing>"}')
    load("names no pad_token")
