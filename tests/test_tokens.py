"""Tokenizers of both kinds: lossless, chat template, stops, and what bad files say."""

import io
import itertools
import json

import pytest
import sentencepiece
import tokenizers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from klear_jax import tokens
from klear_jax.errors import InputError

SYMBOLS = ["<think>", "</think>", "\\boxed{", "}", "user", "assistant"]
CHAIN = "7+5-3=<think>7+5=12;12-3=9</think>\\boxed{9}"
MESSAGES = [{"role": "user", "content": "7+5="}]
PROMPT = "<|im_start|>user\n7+5=<|im_end|>\n<|im_start|>assistant\n"


def make_hugging_face(folder):
    """A byte-level BPE with Qwen3's roles: chat markers special, <think> ordinary."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CHAIN] * 20, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.enable_truncation(5)  # Must not count: nothing is cut silently.
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "eos_token": {"content": "<|im_end|>"},
        "chat_template": tokens.QWEN3_CHAT,
    }
    write_json(folder / "tokenizer_config.json", config)
    ends = [tokenizer.token_to_id(end) for end in ("<|im_end|>", "<|endoftext|>")]
    write_json(folder / "generation_config.json", {"eos_token_id": ends})


def make_sentencepiece(folder):
    tokens.train_sentencepiece([CHAIN] * 20, folder, symbols=SYMBOLS)


def write_json(path, content):
    path.write_text(json.dumps(content))


def change_config(folder, **changes):
    path = folder / "tokenizer_config.json"
    write_json(path, {**json.loads(path.read_text()), **changes})


@pytest.fixture(scope="module", params=["hugging face", "characters", "bpe"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "hugging face":
        make_hugging_face(folder)
    elif request.param == "characters":
        make_sentencepiece(folder)
    else:
        texts = [CHAIN + " the sum of the sums"] * 20
        tokens.train_sentencepiece(texts, folder, symbols=SYMBOLS, vocab_size=290)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return tokens.load(folder)


@settings(max_examples=300, deadline=None)
@given(text=st.text() | st.text("\n\t +=<>|▁😀\0é}7"))
@example(text="▁ ▁▁  x▁")
@example(text=" <0x41> ⁇ <unk> \r\n")
def test_lossless(tokenizer, text):
    assume("<|" not in text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.text("\n\t +=<>▁😀\0é}7中"))
@example(text=" <0x41> x")
def test_pieces_make_up_the_text(tokenizer, text):
    assume("<|" not in text and tokens.NO_CHARACTER not in text)
    ids = tokenizer.encode(text)
    pieces = tokens.speller(tokenizer)(ids)
    assert "".join(piece.text for piece in pieces) == text
    assert all(piece.plain for piece in pieces)
    assert sum(piece.count for piece in pieces) == len(ids)


def test_what_is_no_text_has_a_name_or_numbers(tokenizer):
    spell = tokens.speller(tokenizer)
    stop = tokenizer.stop_ids[0]
    smile = tokenizer.encode("😀")
    assert spell([stop]) == [tokens.Piece("<|im_end|>", 1, False)]
    assert spell([*smile[:2], stop]) == [
        tokens.Piece("<0xF0>", 1, False),
        tokens.Piece("<0x9F>", 1, False),
        tokens.Piece("<|im_end|>", 1, False),
    ]
    (beyond,) = spell([tokenizer.vocab_size + 5])
    assert not beyond.plain


def test_a_piece_keeps_the_space_that_a_text_s_first_token_loses():
    words = [" a", " b"]

    class Strips:
        def decode(self, ids):
            return "".join(words[i] for i in ids).removeprefix(" ")

    pieces = tokens.speller(Strips())([0, 1, 1])
    assert [piece.text for piece in pieces] == ["a", " b", " b"]


def test_special_text_becomes_its_token_and_is_not_decoded(tokenizer):
    ids = tokenizer.encode("<think>7</think>9<|im_end|>")
    assert len(ids) == 5
    assert ids[-1] == tokenizer.stop_ids[0]
    assert tokenizer.decode(ids) == "<think>7</think>9"


def test_prompt(tokenizer):
    assert tokenizer.render(MESSAGES, add_generation_prompt=True) == PROMPT
    assert tokenizer.prompt(MESSAGES) == tokenizer.encode(PROMPT)
    answered = [*MESSAGES, {"role": "assistant", "content": "12"}]
    assert (
        tokenizer.render(answered, add_generation_prompt=False)
        == PROMPT + "12<|im_end|>\n"
    )


def test_size_bounds_the_ids(tokenizer):
    ids = tokenizer.encode(PROMPT + CHAIN + "é")
    assert max(ids) < tokenizer.vocab_size
    beyond = [*ids, tokenizer.vocab_size + 5]  # A model may have more rows.
    assert tokenizer.decode(beyond) == tokenizer.decode(ids)
    tokens.check_fits(tokenizer, tokenizer.vocab_size)
    with pytest.raises(InputError, match="does not fit"):
        tokens.check_fits(tokenizer, tokenizer.vocab_size - 1)


def test_save_publishes_no_file_that_a_link_names(tokenizer, tmp_path):
    cached = tmp_path / "models--some--model"
    copy, blobs = cached / "snapshots" / "0123abcd", cached / "blobs"
    tokenizer.save(copy)
    blobs.mkdir()
    name = "tokenizer_config.json"
    (copy / name).rename(blobs / "4567ef")
    (copy / name).symlink_to("../../blobs/4567ef")  # As Hugging Face's cache has it.
    tokens.load(copy).save(tmp_path / "export")
    exported = tmp_path / "export" / name
    assert exported.read_text() == (blobs / "4567ef").read_text()
    (blobs / "4567ef").rename(tmp_path / "secret.json")
    (copy / name).unlink()
    (copy / name).symlink_to(tmp_path / "secret.json")
    with pytest.raises(InputError, match=f"{name} is a link out of its folder"):
        tokens.load(copy).save(tmp_path / "other")
    assert not (tmp_path / "other" / name).exists()


def test_save_keeps_the_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "export")
    saved = tokens.load(tmp_path / "export")
    assert saved.stop_ids == tokenizer.stop_ids
    assert saved.prompt(MESSAGES) == tokenizer.prompt(MESSAGES)


@pytest.mark.parametrize("name", ["tokenizer.model", "spm.model"])
def test_save_keeps_the_vocabulary_that_was_named(tokenizer, tmp_path, name):
    """Also where another lies beside it, which the folder's readers would take."""
    source = tmp_path / "source"
    tokens.train_sentencepiece(["7+5=12"], source, symbols=())
    if name == "tokenizer.model":
        (source / "tokenizer.json").write_text("{}")
    else:
        (source / "tokenizer.model").rename(source / name)
    named = tokens.load(source / name)
    named.save(tmp_path / "model")
    assert tokens.load(tmp_path / "model").fingerprint == named.fingerprint


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("a7 }é▁😀<|\n\ufffd"),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=9),
)
def test_a_stream_tells_each_character_once_and_whole(tokenizer, text, sizes):
    assume("<|" not in text)
    ids = tokenizer.encode(f"{text}<think>{text}")
    stream, told, start = tokens.Stream(tokenizer), "", 0
    for size in itertools.cycle(sizes):
        told += stream.add(ids[start : start + size])
        assert tokenizer.decode(ids).startswith(told)
        start += size
        if start >= len(ids):
            break
    assert told + stream.end() == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 300), max_size=3), max_size=8))
def test_a_stream_of_any_tokens_is_their_text(tokenizer, parts):
    stream = tokens.Stream(tokenizer)
    told = "".join(map(stream.add, parts)) + stream.end()
    assert told == tokenizer.decode(itertools.chain(*parts))


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    """As transformers reads it: from a tokenizer.json."""
    folder = tmp_path_factory.mktemp("exported")
    tokenizer.export(folder)
    assert tokens.load(folder).path.name == "tokenizer.json"
    return tokens.load(folder)


@settings(max_examples=300, deadline=None)
@given(text=st.text() | st.text("\n\t +=<>|▁😀\0é}7") | st.text("the sumof "))
@example(text="▁ ▁▁  x▁ user assistants <think></think> \\boxed{ <|im_end|>")
@example(text=" <0x41> ⁇ <unk> \r\n")
def test_an_exported_tokenizer_is_the_same(tokenizer, exported, text):
    ids = tokenizer.encode(text)
    assert exported.encode(text) == ids
    assert exported.decode(ids) == tokenizer.decode(ids)


def test_an_exported_tokenizer_ends_a_response_alike(tokenizer, exported):
    assert exported.stop_ids == tokenizer.stop_ids
    file = exported.path.parent / "generation_config.json"
    assert json.loads(file.read_text())["eos_token_id"] == list(tokenizer.stop_ids)
    assert exported.prompt(MESSAGES) == tokenizer.prompt(MESSAGES)
    assert exported.markers == tokenizer.markers
    config = json.loads((exported.path.parent / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_an_export_keeps_what_it_need_not_change(tmp_path):
    """A base model's generation_config.json may name the end of a text alone."""
    make_hugging_face(tmp_path / "base")
    change_config(tmp_path / "base", tokenizer_class="Qwen2Tokenizer")
    end = tokens.load(tmp_path / "base").encode("<|endoftext|>")
    config = {"eos_token_id": end[0], "temperature": 0.7}
    write_json(tmp_path / "base" / "generation_config.json", config)
    tokens.load(tmp_path / "base").export(tmp_path / "out")
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    stop_ids = list(tokens.load(tmp_path / "base").stop_ids)
    assert found == {"eos_token_id": stop_ids, "temperature": 0.7}
    assert len(stop_ids) == 2
    for name in ("tokenizer.json", "tokenizer_config.json"):
        one, two = ((tmp_path / way / name).read_text() for way in ("base", "out"))
        assert one == two


@pytest.mark.parametrize(
    "rule",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
    ],
    ids=str,
)
def test_a_model_of_another_kind_is_exported_as_it_is(tmp_path, rule):
    make_sentencepiece(tmp_path)
    model = io.BytesIO()
    training = {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([CHAIN] * 20),
        model_writer=model,
        vocab_size=290,
        byte_fallback=True,
        hard_vocab_limit=False,
        add_dummy_prefix=False,
        user_defined_symbols=["<|im_start|>", "<|im_end|>"],
        minloglevel=2,
        **training | rule,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    tokens.load(tmp_path).export(tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()


@settings(max_examples=100, deadline=None)
@given(text=st.text("ab7}\n é"), stops=st.lists(st.text("ab7}é", min_size=1)))
def test_cut_at_the_token_that_completes_the_first_stop(tokenizer, text, stops):
    ids = tokenizer.encode(text)
    shortest = next(
        (
            n
            for n in range(len(ids) + 1)
            if any(stop in tokenizer.decode(ids[:n]) for stop in stops)
        ),
        None,
    )
    expected = (ids, False) if shortest is None else (ids[:shortest], True)
    assert tokens.cut_at_stop(tokenizer, ids, stops) == expected


def test_empty_stop_string(tokenizer):
    with pytest.raises(InputError, match="empty"):
        tokens.cut_at_stop(tokenizer, [1], [""])


def test_characters_have_no_merges_and_symbols_are_single(tmp_path):
    make_sentencepiece(tmp_path)
    tokenizer = tokens.load(tmp_path)
    assert len(tokenizer.encode("12;12-3=9")) == 9
    for symbol in [*SYMBOLS, "<|im_start|>", "<|im_end|>", "\n", " "]:
        assert len(tokenizer.encode(symbol)) == 1
    known = set("7+5-3=12;9") | {*SYMBOLS, "<|im_start|>", "<|im_end|>", "\n", " "}
    assert tokenizer.vocab_size == len(known) + 256 + 1  # Bytes, <unk>.


def test_same_texts_same_files(tmp_path):
    for name in ("one", "two"):
        make_sentencepiece(tmp_path / name)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        one, two = ((tmp_path / way / name).read_bytes() for way in ("one", "two"))
        assert one == two


@pytest.mark.parametrize("texts, vocab_size", [([], None), ([CHAIN], 4000)])
def test_training_that_cannot_be(tmp_path, texts, vocab_size):
    with pytest.raises(InputError, match="cannot train"):
        tokens.train_sentencepiece(texts, tmp_path, symbols=(), vocab_size=vocab_size)


def test_stop_ids_of_generation_config(tmp_path):
    make_hugging_face(tmp_path)
    tokenizer = tokens.load(tmp_path)
    assert tokenizer.stop_ids == tuple(
        tokenizer.encode(end)[0] for end in ("<|im_end|>", "<|endoftext|>")
    )


def test_template_file_goes_first_and_knows_hugging_face_names(tmp_path):
    make_hugging_face(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{%- for message in messages %}\n"
        "  {%- if loop.index0 == 1 %}{% break %}{% endif %}\n"
        "{{- message | tojson }}{{ eos_token }}{% endfor %}"
        "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    )
    tokenizer = tokens.load(tmp_path / "tokenizer.json")
    text = tokenizer.render([{"role": "user", "content": "<é>"}] * 2, False)
    assert text == '{"role": "user", "content": "<é>"}<|im_end|>'
    with pytest.raises(InputError, match="no tools"):
        tokenizer.prompt([{"role": "tool", "content": ""}])


def cut_file(name):
    def cut(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return cut


@pytest.mark.parametrize(
    "make, spoil, message",
    [
        (
            make_hugging_face,
            cut_file("tokenizer.json"),
            "tokenizer.json is not a whole",
        ),
        (make_sentencepiece, cut_file("tokenizer.model"), "tokenizer.model is not"),
        (
            make_sentencepiece,
            lambda folder: (folder / "tokenizer.model").write_bytes(b""),
            "it holds no tokens",
        ),
        (
            make_hugging_face,
            cut_file("tokenizer_config.json"),
            "tokenizer_config.json is not whole",
        ),
        (
            make_hugging_face,
            lambda folder: (folder / "tokenizer.json").unlink(),
            "neither tokenizer.json nor tokenizer.model",
        ),
        (
            make_hugging_face,
            lambda folder: write_json(folder / "generation_config.json", [1]),
            "not a JSON object",
        ),
        (
            make_sentencepiece,
            lambda folder: change_config(folder, chat_template=None),
            "no chat template",
        ),
        (
            make_sentencepiece,
            lambda folder: change_config(folder, chat_template="{% for"),
            "template is broken",
        ),
        (
            make_sentencepiece,
            lambda folder: change_config(folder, eos_token="<end>"),
            "lacks the eos_token '<end>'",
        ),
    ],
)
def test_broken_folder(tmp_path, make, spoil, message):
    make(tmp_path)
    tokens.load(tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError, match=message):
        tokens.load(tmp_path)


def test_missing_path(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.model"):
        tokens.load(tmp_path / "nothing.model")


@pytest.mark.parametrize(
    "template, message",
    [
        (tokens.QWEN3_CHAT, "needs <|im_start|> as a single token"),
        ("{{ messages[0].content }}", "no token ends a response"),
    ],
)
def test_vocabulary_without_markers(tmp_path, template, message):
    model = models.BPE({"a": 0, "b": 1}, [])
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": template})
    with pytest.raises(InputError) as error:
        tokens.load(tmp_path)
    assert message in str(error.value)
