"""QuantizedModel: text in, text out, in one piece or in many."""

import copy
import threading
import time

import pytest
import torch

import gpu_poor
from gpu_poor import assets
from gpu_poor.detokenize import Continuation, Detokenizer, text_of
from gpu_poor.modules import unwrap

transformers = pytest.importorskip("transformers")
from gpu_poor.quantization import QuantizedModel  # noqa: E402

PROMPT = "Once upon a time, there was a"


@pytest.fixture(scope="module")
def model():
    return QuantizedModel.from_pretrained(assets.STORIES260K, verbose=False)


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(assets.STORIES260K)


def workers():
    return [t for t in threading.enumerate() if t.name == "gpu_poor.stream"]


# -- loading -------------------------------------------------------------------------------------


def test_from_pretrained_quantizes_and_prints_the_receipt(capsys):
    model = QuantizedModel.from_pretrained(assets.STORIES260K, bits=4)
    assert "LlamaForCausalLM: " in capsys.readouterr().out
    assert "int4_g64_asym" in gpu_poor.receipt(model).formats
    assert unwrap(model) is model.model and unwrap(model.model) is model.model


def test_options_of_the_config_are_taken():
    model = QuantizedModel.from_pretrained(
        assets.STORIES260K, activation="a8", overrides={"lm_head": 16}, verbose=False
    )
    assert model.model.lm_head.format.name == "bf16"
    assert model.model.model.layers[0].mlp.up_proj.activation == "a8"


def test_saved_and_loaded_it_writes_the_same(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = QuantizedModel.from_pretrained(tmp_path, verbose=False)
    assert again.generate(PROMPT) == model.generate(PROMPT)
    with pytest.raises(ValueError, match="quantized already: leave out bits$"):
        QuantizedModel.from_pretrained(tmp_path, bits=4)
    with pytest.raises(ValueError, match="leave out bits, activation"):
        QuantizedModel.from_pretrained(tmp_path, bits=4, activation="a8")


def test_what_is_no_quantized_model_is_refused(tokenizer):
    floats = transformers.AutoModelForCausalLM.from_pretrained(assets.STORIES260K)
    with pytest.raises(ValueError, match="not quantized"):
        QuantizedModel(floats, tokenizer)
    with pytest.raises(TypeError, match="from_pretrained"):
        QuantizedModel("gpt2", tokenizer)
    with pytest.raises(TypeError, match="tokenizer"):
        QuantizedModel(gpu_poor.quantize(floats, verbose=False), None)
    with pytest.raises(ValueError, match="cannot generate"):
        QuantizedModel(floats.model, tokenizer)
    with pytest.raises(ValueError, match="cannot calibrate"):
        QuantizedModel.from_pretrained(assets.STORIES260K, sample_inputs="text")
    with pytest.raises(OSError):
        QuantizedModel.from_pretrained("no-such-folder/anywhere", verbose=False)


def test_what_is_not_its_own_is_the_models(model):
    assert model.config is model.model.config
    ids = torch.tensor([[1, 5, 9]])
    assert torch.equal(model(ids).logits, model.model(ids).logits)
    assert model.to("cpu") is model
    with pytest.raises(AttributeError, match="no_such_thing"):
        model.no_such_thing  # noqa: B018
    assert copy.deepcopy(model).generate(PROMPT, 5) == model.generate(PROMPT, 5)


# -- generate ------------------------------------------------------------------------------------


def test_generate_is_transformers_generate(model, tokenizer):
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    out = model.model.generate(ids, max_new_tokens=100, do_sample=False, pad_token_id=0)
    whole = tokenizer.decode(out[0], skip_special_tokens=True)
    text = model.generate(PROMPT)
    assert text and PROMPT + text == whole
    assert model.generate(PROMPT, echo=True) == whole
    assert len(tokenizer(text)["input_ids"]) > 50  # the default is 100 tokens


def test_options_go_to_transformers(model):
    torch.manual_seed(1)
    sampled = model.generate(PROMPT, 40, do_sample=True, temperature=1.5)
    torch.manual_seed(1)
    assert model.generate(PROMPT, 40, do_sample=True, temperature=1.5) == sampled
    assert sampled != model.generate(PROMPT, 40)


def test_a_batch_is_what_each_is_alone(model):
    prompts = [PROMPT, "The dog", "Lily and her mom went to the"]
    assert model.generate(prompts, 20) == [model.generate(p, 20) for p in prompts]
    assert model.generate([PROMPT], 5) == [model.generate(PROMPT, 5)]


def test_a_batch_ends_row_by_row(model, tokenizer):
    """A row ends where it would alone, though the others go on."""
    ends = tokenizer(".", add_special_tokens=False)["input_ids"][-1]
    prompts = [PROMPT, "The dog"]
    alone = [model.generate(p, 60, eos_token_id=ends) for p in prompts]
    assert len({len(text) for text in alone}) == 2 and not any("." in text for text in alone)
    assert model.generate(prompts, 60, eos_token_id=ends) == alone


def test_stop_strings_end_the_text(model):
    whole = model.generate(PROMPT, 60)
    cut = model.generate(PROMPT, 60, stop=["zebra", "play out"])
    assert whole.startswith(cut + "play out") and "play out" not in cut
    assert model.generate(PROMPT, 60, stop="zebra") == whole


def test_a_stop_string_ends_the_work(model):
    lengths = []
    generate = model.model.generate

    def spy(**arguments):
        out = generate(**arguments)
        lengths.append(out.shape[1] - arguments["input_ids"].shape[1])
        return out

    model.model.generate = spy
    try:
        model.generate(PROMPT, 60, stop="Lily")
    finally:
        del model.model.generate
    assert lengths[0] < 20


def test_beams(model):
    assert model.generate(PROMPT, 10, num_beams=2)
    with pytest.raises(ValueError, match="one beam"):
        model.generate(PROMPT, 10, num_beams=2, stop=".")
    with pytest.raises(ValueError, match="one beam"):
        model.stream(PROMPT, 10, num_beams=2)


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        ("", {}, ValueError, "prompt is empty"),
        (PROMPT, {"max_new_tokens": 2.5}, ValueError, "an integer >= 1, got 2.5"),
        (PROMPT, {"max_new_tokens": "5"}, ValueError, "an integer >= 1, got '5'"),
        (PROMPT, {"stop": 3}, ValueError, "stop must be a string"),
        (PROMPT, {"max_length": 9}, ValueError, "it is max_new_tokens here"),
        (PROMPT, {"inputs_embeds": None}, ValueError, "inputs_embeds is not taken"),
        ([], {}, ValueError, "no prompt"),
        ([PROMPT, ""], {}, ValueError, "prompt is empty"),
        (7, {}, TypeError, "got int"),
        ([1, 2], {}, TypeError, "got list"),
        ("word " * 600, {}, ValueError, r"\d+ tokens and the model's context 512"),
        (PROMPT, {"max_new_tokens": 0}, ValueError, "an integer >= 1, got 0"),
        (PROMPT, {"max_new_tokens": 0}, ValueError, "an integer >= 1"),
        (PROMPT, {"max_new_tokens": "5"}, ValueError, "an integer >= 1, got '5'"),
        (PROMPT, {"max_length": 20}, ValueError, "it is max_new_tokens here"),
        (PROMPT, {"stop": 5}, ValueError, "none of them empty, got 5"),
        (PROMPT, {"max_new_tokens": 510}, ValueError, "does not fit"),
        (PROMPT, {"stop": ["x", ""]}, ValueError, "none of them empty"),
        (PROMPT, {"num_return_sequences": 2}, ValueError, "several times"),
        (PROMPT, {"stop_strings": ["."]}, ValueError, "it is stop here"),
        ([{"role": "user", "content": "Hi"}], {}, ValueError, "no chat model"),
    ],
)
def test_mistakes(model, prompt, options, error, message):
    with pytest.raises(error, match=message):
        model.generate(prompt, **options)
    if not isinstance(prompt, list):
        with pytest.raises(error, match=message):
            model.stream(prompt, **options)  # at once, not at the first piece


def test_a_generation_config_is_obeyed(model):
    """Given with the call, it comes before the model's own."""

    def config(**settings):
        return {"generation_config": transformers.GenerationConfig(**settings)}

    assert model.generate(PROMPT, **config(max_new_tokens=5)) == model.generate(PROMPT, 5)
    assert "".join(model.stream(PROMPT, **config(max_new_tokens=5))) == model.generate(PROMPT, 5)
    for call in (
        lambda **o: model.generate(PROMPT, stop=".", **o),
        lambda **o: model.stream(PROMPT, **o),
    ):
        with pytest.raises(ValueError, match="num_beams=3"):
            call(**config(num_beams=3))
    ids = model.tokenizer(model.generate(PROMPT, 8), add_special_tokens=False)["input_ids"]
    short = model.generate(PROMPT, 8, **config(eos_token_id=ids[-1]))
    assert model.generate(PROMPT, 8).startswith(short)
    assert short == model.generate(PROMPT, 8, eos_token_id=torch.tensor([ids[-1]]))


def test_the_default_length_fits_the_context(model):
    prompt = "a " * 200
    assert model.generate(prompt)  # the context has room for a few tokens only


def test_messages_go_through_the_chat_template(model):
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}there was{% endif %}"
    )
    chat = QuantizedModel(model.model, tokenizer)
    messages = [{"role": "user", "content": "Once upon a time"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    expected = text_of(
        tokenizer,
        ids,
        model.model.generate(torch.tensor([ids]), max_new_tokens=9, pad_token_id=0)[0, len(ids) :],
    )
    assert chat.generate(messages, 9) == expected
    assert chat.generate([messages, PROMPT], 9) == [expected, model.generate(PROMPT, 9)]
    assert "".join(chat.stream(messages, 9)) == expected
    with pytest.raises(ValueError, match="echo"):
        chat.generate(messages, echo=True)


# -- stream --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [(), "Lily", "to play out", ["park", "park."]])
def test_stream_is_generate_in_pieces(model, stop):
    pieces = list(model.stream(PROMPT, stop=stop))
    assert len(pieces) > 2 and all(pieces)
    assert "".join(pieces) == model.generate(PROMPT, stop=stop)
    assert not workers()


def test_closing_the_iterator_stops_the_work(model, monkeypatch):
    forward, calls = model.model.forward, []

    def slow(*args, **kwargs):
        calls.append(1)
        time.sleep(0.02)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", slow)
    pieces = model.stream(PROMPT, 400)
    assert not calls  # nothing runs before the first piece is asked for
    assert next(pieces)
    pieces.close()
    assert not workers()
    assert len(calls) < 20


def test_what_the_worker_raises_is_raised_to_the_reader(model, monkeypatch):
    forward, calls = model.model.forward, []

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise ZeroDivisionError("in the model")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", fails)
    pieces = model.stream(PROMPT, 20)
    assert next(pieces)
    with pytest.raises(ZeroDivisionError, match="in the model"):
        list(pieces)
    assert not workers()
    with pytest.raises(ValueError, match="nonsense"):  # of transformers' generate
        list(model.stream(PROMPT, 5, nonsense=1))


# -- text ----------------------------------------------------------------------------------------

TEXTS = ["Das Mädchen weiß: 猫は可愛い 🐈‍⬛!", "a  b\n\n c", " leading", "naïve café"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["", "The story:", "猫"])
def test_pieces_are_whole_characters(tokenizer, prompt, text):
    """The tokenizer has no such characters: each is two to four tokens of a byte each."""
    before = tokenizer(prompt)["input_ids"]
    whole = tokenizer(prompt + text)["input_ids"]
    assert len(whole) > len(before)
    expected = tokenizer.decode(whole, skip_special_tokens=True)
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(token) for token in whole]
    assert "".join(pieces) == expected
    assert not any("\ufffd" in piece for piece in pieces) and detokenizer.end() == ""
    if whole[: len(before)] == before:
        tail = text_of(tokenizer, before, whole[len(before) :])
        assert tokenizer.decode(before, skip_special_tokens=True) + tail == expected


def test_half_a_character_at_the_end_is_shown_as_the_tokenizer_does(tokenizer):
    ids = tokenizer("a猫", add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.add(token) for token in ids[:-1]][-2:] == ["", ""]
    assert set(detokenizer.end()) == {"\ufffd"}


class Letters:
    """A tokenizer whose tokens are characters."""

    def decode(self, ids, skip_special_tokens):
        return "".join(map(chr, ids))


def test_text_that_may_become_a_stop_string_is_held_back():
    row = Continuation(Letters(), stops=["END", "Nothing"])
    assert [row.add(ord(c)) for c in "xENE"] == ["x", "", "", "EN"]  # "E" may begin another
    assert row.end() == "E" and row.done
    row = Continuation(Letters(), stops=["END"])
    assert [row.add(ord(c)) for c in "aEENDz"] == ["a", "", "E", "", "", ""]
    assert row.done and row.end() == ""


def test_an_end_token_gives_what_was_held_back():
    row = Continuation(Letters(), ends=[0], stops=["END"])
    assert [row.add(c) for c in (ord("E"), ord("N"), 0, ord("x"))] == ["", "", "EN", ""]


def test_it_is_measured_as_its_model_is(model):
    text = assets.valid_text()[:2000]
    floats = transformers.AutoModelForCausalLM.from_pretrained(assets.STORIES260K)
    through = gpu_poor.evaluate(model, floats, text, model.tokenizer)
    assert through == gpu_poor.evaluate(model.model, floats, text, model.tokenizer)
    assert gpu_poor.metrics.perplexity(model, text, model.tokenizer) == through.perplexity
    with pytest.raises(ValueError, match="the same object"):
        gpu_poor.evaluate(model.model, model, text, model.tokenizer)


def test_it_is_used_as_in_a_notebook():
    """The functions for attention and cache take it, and give it back."""
    kv_cache = pytest.importorskip("gpu_poor.kv_cache")
    from gpu_poor.attention import use_flash_attention_if_available

    model = QuantizedModel.from_pretrained(assets.STORIES260K, bits=4, verbose=False)
    before = model.generate(PROMPT, 30)
    assert use_flash_attention_if_available(model) is model
    assert kv_cache.use_paged_kv_cache_if_available(model, format="fp32") is model
    assert model.model.config._attn_implementation == "gpu_poor"
    assert model.generate(PROMPT, 30) == before == "".join(model.stream(PROMPT, 30))
