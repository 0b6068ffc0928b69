"""Token ids against transformers' CLIPTokenizer; weights against the grammar that A1111 documents."""

import contextlib
import json
import logging
import math
import time

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from stepforge.export.models.tokenizer import tokenizer_json
from stepforge.runtime.engine.conditions.prompts import ClipTokenizer, TokenChunks, apply_weights, pad_chunks, parse
from stepforge.runtime.errors import BundleError, CheckpointError, RequestError
from stepforge.runtime.load import load

WORDS = ("a", "cat", "photo", "the", "unkind", "un", "kind", "café", "it's", "!!!")
LENGTH = 27  # of a chunk: 25 tokens, so that A1111's 20 tokens of backtracking are less than a chunk
PADS = {"SD: pads with end": "<|endoftext|>", "SDXL's second: pads with !": "!"}


def write_tokenizer(folder, pad, **config):
    """A diffusers tokenizer folder whose merges cover WORDS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = []
    for word in WORDS:
        (text, _), *_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(word)
        parts = [*text[:-1], text[-1] + "</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts[:2] = [parts[0] + parts[1]]
    merges = list(dict.fromkeys(merges))
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "pad_token": pad, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def build(folder):
    text, card = tokenizer_json(folder)
    (folder / "built.json").write_text(text, "utf-8")
    return ClipTokenizer.from_file(folder / "built.json", **card)


@pytest.fixture(scope="module", params=PADS.values(), ids=PADS)
def pair(request, tmp_path_factory):
    """transformers' tokenizer and ours, of the same folder."""
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param)
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True), build(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), "<|endoftext|>"))


def ids_of(reference, prompt):
    """What a diffusers pipeline feeds its text encoder."""
    return reference(prompt, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="np").input_ids


def words(tokenizer, *texts):
    """Ids of single-token words."""
    return [tokenizer._tokenizer.token_to_id(text + "</w>") for text in texts]


ANY_TEXT = st.lists(
    st.sampled_from([*WORDS, " ", ", ", "  \n", "CAT", "<|endoftext|>", "<|startoftext|>", "(", ":1.2)", "BREAK", "\\"])
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=10),
    max_size=12,
).map("".join)


@settings(max_examples=400, deadline=None)
@given(prompt=ANY_TEXT)
def test_plain_ids_equal_transformers(pair, prompt):
    reference, ours = pair
    chunks = ours.encode(prompt, syntax="plain")
    np.testing.assert_array_equal(chunks.ids, ids_of(reference, prompt))
    assert chunks.ids.dtype == np.int64
    assert (chunks.weights == 1).all()


@settings(max_examples=400, deadline=None)
@given(prompt=ANY_TEXT)
def test_unweighted_ids_equal_transformers(pair, prompt):
    reference, ours = pair
    assume(not set(prompt) & set("()[]\\") and "BREAK" not in prompt)
    chunks = ours.encode(prompt)
    assert (chunks.weights == 1).all()
    everything = reference(prompt, add_special_tokens=False).input_ids
    if len(everything) <= LENGTH - 2:
        np.testing.assert_array_equal(chunks.ids, ids_of(reference, prompt))
    else:
        assume(reference.eos_token_id not in everything)
        rows = chunks.ids.tolist()
        assert [token for row in rows for token in row[1 : row.index(reference.eos_token_id)]] == everything


def test_escaped_brackets_equal_diffusers(pair):
    reference, ours = pair
    np.testing.assert_array_equal(
        ours.encode(r"a \(cat\) \[the\] \\ photo").ids, ids_of(reference, r"a (cat) [the] \ photo")
    )


# (prompt, [(text, weight)]); the first six are the examples in A1111's prompt_parser.parse_prompt_attention
GRAMMAR = {
    "plain": ("normal text", [("normal text", 1.0)]),
    "round": ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
    "open to the end": ("(unbalanced", [("unbalanced", 1.1)]),
    "escapes": (r"\(literal\]", [("(literal]", 1.0)]),
    "neighbours join": ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
    "nested": (
        "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
        [
            ("a ", 1.0),
            ("house", 1.3 * 1.1 * 1.1),
            (" ", 1.1),
            ("on", 1.0),
            (" a ", 1.1),
            ("hill", 0.5 * 1.1),
            (", sun, ", 1.1),
            ("sky", 1.1**4),
            (".", 1.1),
        ],
    ),
    "empty": ("", [("", 1.0)]),
    "square": ("[cat]", [("cat", 1 / 1.1)]),
    "square twice": ("[[cat]]", [("cat", 1.1**-2)]),
    "spaces around a weight": ("(cat : 1.5 )", [("cat ", 1.5)]),
    "signed and bare": ("(a:-.5)(b:+2.)", [("a", -0.5), ("b", 2.0)]),
    "zero": ("(cat:0)", [("cat", 0.0)]),
    "closing only": ("cat) a]", [("cat) a]", 1.0)]),
    "weight with nothing open": ("cat:1.3)", [("cat:1.3)", 1.0)]),
    "weight closes round only": ("[cat:1.3)", [("cat:1.3)", 1 / 1.1)]),
    "crossed": ("(a [b) c]", [("a ", 1.1), ("b", 1.0), (" c", 1 / 1.1)]),
    "two open": ("(a (b", [("a ", 1.1), ("b", 1.1 * 1.1)]),
    "no number": ("(cat:1.2.3)", [("cat:1.2.3", 1.1)]),
    "colon": ("ratio 16:9 (cat:dog:1.2)", [("ratio 16:9 ", 1.0), ("cat:dog", 1.2)]),
    "empty brackets": ("a () b", [("a  b", 1.0)]),
    "escaped backslash": (r"\\(a)", [("\\", 1.0), ("a", 1.1)]),
    "lone backslash": (r"a\b", [("ab", 1.0)]),
    "break": ("a BREAK b", [("a", 1.0), (None, 1.0), ("b", 1.0)]),
    "spaces around BREAK": ("a \n BREAK\tBREAK b", [("a", 1.0), (None, 1.0), ("", 1.0), (None, 1.0), ("b", 1.0)]),
    "no break in a word": ("BREAKFAST", [("BREAKFAST", 1.0)]),
}


@pytest.mark.parametrize(("prompt", "expected"), GRAMMAR.values(), ids=GRAMMAR)
def test_grammar(prompt, expected):
    found = [(span.text, span.weight) for span in parse(prompt)]
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected], rel=1e-12)


LEAF = st.text("ab,: ()[]\\", min_size=1, max_size=5)
TREE = st.recursive(
    LEAF,
    lambda inner: st.tuples(st.sampled_from(["()", "[]", 0.5, 1.25, -2.0]), st.lists(inner, min_size=1, max_size=3)),
    max_leaves=12,
)


def render(tree):
    if isinstance(tree, str):
        return "".join("\\" + letter if letter in "()[]\\" else letter for letter in tree)
    kind, parts = tree
    inside = "".join(map(render, parts))
    return f"({inside}:{kind})" if isinstance(kind, float) else kind[0] + inside + kind[1]


def letters(tree, weight=1.0):
    """Every character of a prompt tree with its weight."""
    if isinstance(tree, str):
        return [(letter, weight) for letter in tree]
    kind, parts = tree
    factor = {"()": 1.1, "[]": 1 / 1.1}.get(kind, kind)
    return [pair for part in parts for pair in letters(part, weight * factor)]


@settings(max_examples=300, deadline=None)
@given(st.lists(TREE, min_size=1, max_size=4))
def test_weights_multiply_through_any_nesting(trees):
    expected = [pair for tree in trees for pair in letters(tree)]
    assume(all(abs(weight) <= 100 for _, weight in expected))
    found = [(letter, span.weight) for span in parse("".join(map(render, trees))) for letter in span.text]
    assert [letter for letter, _ in found] == [letter for letter, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected], rel=1e-9)


def test_weights_lie_on_their_tokens(tokenizer):
    chunks = tokenizer.encode("a (cat:1.5) [photo]")
    assert chunks.ids[0, :5].tolist() == [tokenizer.bos_id, *words(tokenizer, "a", "cat", "photo"), tokenizer.eos_id]
    np.testing.assert_array_equal(chunks.weights[0, :5], np.float32([1, 1, 1.5, 1 / 1.1, 1]))
    assert (chunks.weights[0, 5:] == 1).all()


def test_joined_spans_are_one_word(tokenizer):
    chunks = tokenizer.encode("(un)(kind)")
    assert chunks.ids[0, 1:3].tolist() == [*words(tokenizer, "unkind"), tokenizer.eos_id]


# words in each chunk; 25 fit
CHUNKS = {
    "empty": ("", [""]),
    "exactly full": ("a " * 25, ["a " * 25]),
    "one too many": ("a " * 26, ["a " * 25, "a"]),
    "three chunks": ("cat " * 60, ["cat " * 25, "cat " * 25, "cat " * 10]),
    "cut after a comma": ("a " * 20 + ", " + "cat " * 10, ["a " * 20 + ",", "cat " * 10]),
    "the last comma": (
        "a " * 10 + ", " + "a " * 9 + ", " + "cat " * 10,
        ["a " * 10 + ", " + "a " * 9 + ",", "cat " * 10],
    ),
    "comma 20 tokens back": ("a " * 5 + ", " + "cat " * 25, ["a " * 5 + ",", "cat " * 25]),
    "comma 21 tokens back": ("a " * 4 + ", " + "cat " * 25, ["a " * 4 + ", " + "cat " * 20, "cat " * 5]),
    "full, then a comma": ("a " * 20 + ", " + "a " * 4 + ", cat", ["a " * 20 + ", " + "a " * 4, ", cat"]),
    "BREAK": ("a BREAK cat", ["a", "cat"]),
    "BREAK first": ("BREAK cat", ["", "cat"]),
    "BREAK last": ("cat BREAK", ["cat"]),
    "BREAK alone": ("BREAK", [""]),
    "BREAK twice": ("a BREAK BREAK cat", ["a", "", "cat"]),
    "BREAK after a full chunk": ("a " * 25 + "BREAK cat", ["a " * 25, "cat"]),
    "BREAK in brackets": ("(a BREAK cat:1.5)", ["a", "cat"]),
}


@pytest.mark.parametrize(("prompt", "expected"), CHUNKS.values(), ids=CHUNKS)
def test_chunks(tokenizer, prompt, expected):
    chunks = tokenizer.encode(prompt)
    rows = []
    for text in expected:
        row = [tokenizer.bos_id, *words(tokenizer, *text.split()), tokenizer.eos_id]
        rows.append(row + [tokenizer.pad_id] * (LENGTH - len(row)))
    assert chunks.ids.tolist() == rows
    assert chunks.weights.shape == chunks.ids.shape


def test_plain_warns_of_what_it_drops(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        assert tokenizer.encode("a " * 30, syntax="plain").ids.shape == (1, LENGTH)
    assert "30 tokens" in caplog.text


def test_apply_weights_equals_the_formula_in_float64():
    rng = np.random.default_rng(0)
    states = rng.normal(0.5, 1, (2, 7, 16)).astype(np.float32)
    weights = np.ones((2, 7), np.float32)
    weights[1, 2:4] = 1.5, 0.25
    result = apply_weights(states, weights)
    np.testing.assert_array_equal(result[0], states[0])
    exact = states[1].astype(np.float64) * weights[1, :, None]
    exact *= states[1].astype(np.float64).mean() / exact.mean()
    np.testing.assert_allclose(result[1], exact, rtol=4e-7)  # three float32 roundings
    assert result[1].mean() == pytest.approx(states[1].mean(), rel=1e-5)
    assert result.dtype == np.float32


def test_apply_weights_of_one_is_the_identity():
    states = np.random.default_rng(1).normal(size=(3, 5, 8)).astype(np.float32)
    np.testing.assert_array_equal(apply_weights(states, np.ones((3, 5), np.float32)), states)


def test_apply_weights_survives_a_mean_of_zero():
    states = np.stack([np.ones((1, 4)), -np.ones((1, 4))], axis=1).astype(np.float32).reshape(1, 2, 4)
    result = apply_weights(states, np.full((1, 2), 2, np.float32))
    np.testing.assert_array_equal(result, 2 * states)


def test_pad_chunks(tokenizer):
    short, long = tokenizer.encode("a (cat)"), tokenizer.encode("a " * 60)
    padded, same = pad_chunks(short, long)
    np.testing.assert_array_equal(padded.ids, np.concatenate([short.ids, *[tokenizer.encode("").ids] * 2]))
    np.testing.assert_array_equal(padded.weights[1:], np.ones((2, LENGTH)))
    np.testing.assert_array_equal(padded.weights[0], short.weights[0])
    assert same is long
    assert isinstance(padded, TokenChunks)


REFUSED = {
    "characters": ("a" * 100_001, "at most 100000"),
    "chunks": ("a " * (25 * 32 + 1), "at most 32"),
    "breaks": ("a BREAK " * 40, "at most 32"),
    "NUL": ("a\0b", "NUL"),
    "surrogate": ("a\ud800", "valid Unicode"),
    "no text": (7, "must be text"),
    "depth": ("(" * 65, "64 open brackets"),
    "weight": ("(cat:101)", "at most ±100"),
    "infinite weight": (f"(cat:{'9' * 400})", "at most ±100"),
    "product of weights": ("((cat:20):20)", "at most ±100"),
}


@pytest.mark.parametrize(("prompt", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused_prompts(tokenizer, prompt, reason):
    with pytest.raises(RequestError, match=reason) as caught:
        tokenizer.encode(prompt)
    assert "\n" not in str(caught.value)


def test_largest_prompts_are_accepted(tokenizer):
    assert tokenizer.encode("a " * (25 * 32)).ids.shape == (32, LENGTH)


HOSTILE = {
    "spaces": " " * 100_000,
    "spaces before BREAK": " " * 99_995 + "BREAK",
    "digits": "(a:" + "9" * 99_997,
    "weights": ":1 " * 33_333,
    "spaced weight": "(a:" + " " * 99_997,
    "colons": ":" * 100_000,
    "closing": ")" * 100_000,
    "pairs": "()" * 50_000,
    "pieces": "(" * 60 + "a(b)" * 24_000,
    "breaks": "BREAK " * 16_000,
    "one word": "x" * 100_000,
    "combining marks": "a" + "\u0301" * 99_999,
}


@pytest.mark.parametrize("prompt", HOSTILE.values(), ids=HOSTILE)
def test_parsing_is_not_quadratic(tokenizer, prompt):
    """4 s of CPU is seven times what these need at most; `\\s*BREAK` in the pattern once took 320 s for the first."""
    start = time.process_time()
    with contextlib.suppress(RequestError):
        tokenizer.encode(prompt)
    assert time.process_time() - start < 4


def test_unknown_syntax_is_refused(tokenizer):
    with pytest.raises(RequestError, match="choose one of a1111, plain"):
        tokenizer.encode("a", syntax="compel")


def test_broken_tokenizer_files_are_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    for path in (tmp_path / "tokenizer.json", tmp_path / "missing.json"):
        with pytest.raises(BundleError, match="not a tokenizer file"):
            ClipTokenizer.from_file(path, LENGTH, 0, 1, 1)


@pytest.mark.parametrize(("change", "reason"), [({"eos_id": 10**6}, "eos_id is 1000000"), ({"max_length": 2}, "is 2")])
def test_cards_that_do_not_fit_are_refused(tmp_path, change, reason):
    text, card = tokenizer_json(write_tokenizer(tmp_path, "!"))
    (tmp_path / "built.json").write_text(text, "utf-8")
    with pytest.raises(BundleError, match=reason):
        ClipTokenizer.from_file(tmp_path / "built.json", **{**card, **change})


def test_card_equals_transformers(pair, tmp_path):
    reference, ours = pair
    assert (ours.max_length, ours.bos_id, ours.eos_id, ours.pad_id) == (
        LENGTH,
        reference.bos_token_id,
        reference.eos_token_id,
        reference.pad_token_id,
    )
    reference.save_pretrained(tmp_path)  # a folder with tokenizer.json only, as transformers 5 writes it
    assert not (tmp_path / "vocab.json").exists()
    prompt = "the cat's café!!! <|endoftext|> 猫"
    np.testing.assert_array_equal(build(tmp_path).encode(prompt).ids, ours.encode(prompt).ids)


def test_absurd_max_length_becomes_77(tmp_path):
    folder = write_tokenizer(tmp_path, "!", model_max_length=1e30)
    assert tokenizer_json(folder)[1]["max_length"] == 77
    assert math.prod(build(folder).encode("a").ids.shape) == 77


def test_folders_without_a_clip_tokenizer_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="neither"):
        tokenizer_json(tmp_path)
    write_tokenizer(tmp_path / "t5", "!", tokenizer_class="T5Tokenizer")
    with pytest.raises(CheckpointError, match="T5Tokenizer"):
        tokenizer_json(tmp_path / "t5")
    (write_tokenizer(tmp_path / "torn", "!") / "vocab.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        tokenizer_json(tmp_path / "torn")


# ----- what other programs load by a prompt


@pytest.mark.parametrize(
    "prompt",
    ["a <cat> photo", "<cat>", "a<cat>b", "the <cat>, <cat> and sks cat", "<cat>_1", "a <cat> <cat>_1", "one <dog>",
     "SKS <CAT>", "skskin <old>", "<cat>_2 <cat>_9", "", "<cat>" * 30],
)  # fmt: skip
def test_textual_inversions_of_several_vectors(prompt, tmp_path):
    """Ids of a diffusers pipeline for a folder that was saved after load_textual_inversion."""
    from diffusers.loaders import TextualInversionLoaderMixin

    theirs = CLIPTokenizer.from_pretrained(write_tokenizer(tmp_path, "!"), local_files_only=True)
    theirs.add_tokens(["<cat>", "<cat>_1", "<cat>_2", "sks", "sks_1", "<dog>", "<old>", "<old>_2", "<cat>_9"])
    theirs.save_pretrained(tmp_path)
    theirs = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    text = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, theirs)
    wanted = theirs(text, padding="max_length", max_length=LENGTH, truncation=True).input_ids
    ours = build(tmp_path)
    assert ours.encode(prompt, syntax="plain").ids.tolist() == [wanted]
    if prompt == "a <cat> photo":
        assert text == "a <cat> <cat>_1 <cat>_2 photo"
        weighted = ours.encode("a (<cat>:1.5) photo")
        assert weighted.ids.tolist() == [wanted]
        assert weighted.weights[0, :6].tolist() == [1, 1, 1.5, 1.5, 1.5, 1]


def test_inversions_do_not_grow_without_a_limit(tmp_path):
    theirs = CLIPTokenizer.from_pretrained(write_tokenizer(tmp_path, "!"), local_files_only=True)
    theirs.add_tokens(["x", *(f"x_{i}" for i in range(1, 200))])
    theirs.save_pretrained(tmp_path)
    with pytest.raises(RequestError, match="more than 100000 characters once 'x' is written out"):
        build(tmp_path).encode("x " * 9_999)


TAGS = {
    "a <lora:style:0.8> cat": "'<lora:style:0.8>'", "embedding:bad.pt, cat": "'embedding:bad.pt'",
    "(embedding:x:1.2)": "'embedding:x:1.2'", "<lyco:a>": "'<lyco:a>'", "<lora:\x1b[2J>": r"'<lora:\x1b[2J>'",
}  # fmt: skip


def test_tags_of_other_programs_stay_text_with_one_warning(tokenizer, caplog):
    with load("fake") as engine:
        for prompt, shown in TAGS.items():
            caplog.clear()
            engine.generate(prompt, negative=f"bad, {prompt}", steps=2, width=64, height=64)
            (record,) = caplog.records
            assert f"prompt has {shown}, which is plain text here" in record.getMessage()
        caplog.clear()
        engine.generate("lora:x, an embedding : y <lora <3 <loral:x>", steps=1, width=64, height=64)
        assert not caplog.records
    plain = tokenizer.encode("a <lora:b:1> c", syntax="plain").ids
    assert (tokenizer.encode("a <lora:b:1> c").ids == plain).all()
