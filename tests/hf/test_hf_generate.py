"""An exported folder, loaded as anyone loads it: generate() in its ways, and pipelines."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

GREEDY = {"max_new_tokens": 20, "do_sample": False, "min_new_tokens": 20}
TEXTS = ["whale", "sea ship night harpoon whale sea"]


@pytest.fixture(scope="module")
def model(exported_run):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(exported_run, trust_remote_code=True).eval()


@pytest.fixture(scope="module")
def tokenizer(exported_run):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(exported_run, trust_remote_code=True)


@pytest.fixture(scope="module")
def inputs(tokenizer):
    found = tokenizer(TEXTS, return_tensors="pt", padding=True)
    assert found["attention_mask"].sum(1).tolist() == [6, 33]
    assert found["attention_mask"][0, 0] == 0
    return found


@pytest.mark.parametrize("options", [{}, {"ttt": False}, {"num_beams": 3}])
def test_a_padded_batch_continues_as_each_alone(model, tokenizer, inputs, options):
    together = model.generate(**inputs, **GREEDY, **options)
    for row, text in enumerate(TEXTS):
        alone = tokenizer(text, return_tensors="pt")
        assert torch.equal(
            model.generate(**alone, **GREEDY, **options)[0, -20:], together[row, -20:]
        )


def test_inner_steps_make_a_difference(model, inputs):
    on = model(inputs["input_ids"][1:]).logits
    off = model(inputs["input_ids"][1:], ttt=False).logits
    assert torch.allclose(on[:, :8], off[:, :8], atol=1e-5)
    assert not torch.allclose(on[:, 9:], off[:, 9:], atol=1e-3)


def test_greedy_equals_the_engine(model, inputs, exported_run):
    from ttt_megatron.exchange.exported import load_exported
    from ttt_megatron.serving.generation import generate
    from ttt_megatron.serving.sampling import Sampler, SamplingSettings
    from ttt_megatron.serving.session import Session

    session = Session(load_exported(exported_run)[0].eval(), bos_id=256)
    session.prefill(inputs["input_ids"][1:])
    sampler = Sampler(SamplingSettings(temperature=0.0), vocab_size=257)
    expected = torch.cat(list(generate(session, sampler, 20)), dim=1)
    # The model has 264 rows and the tokenizer 257 ids: the others are left out on both sides.
    actual = model.generate(inputs["input_ids"][1:], **{**GREEDY, "min_new_tokens": 0})[0, 33:]
    assert actual.tolist() == expected[0, : len(actual)].tolist()
    assert len(actual) > 2


def test_sampling_follows_the_seed(model, inputs):
    def sample(seed):
        torch.manual_seed(seed)
        return model.generate(**inputs, max_new_tokens=12, top_k=40, num_return_sequences=2)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert sample(1).shape == (4, 33 + 12)


def test_a_returned_cache_is_gone_on_with(model, inputs):
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    ids = torch.cat((first.sequences, torch.tensor([[97, 98], [99, 100]])), dim=1)
    mask = torch.ones_like(ids)
    mask[:, :33] = inputs["attention_mask"]
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    cache = getattr(first, "cache", None) or first.past_key_values
    whole = model.generate(ids, attention_mask=mask, cache=cache.clone(), **GREEDY)
    assert torch.equal(whole, expected)
    rest = cache.clone().count_from_here()
    # The last token was chosen and not read yet.
    actual = model.generate(ids[:, -3:], cache=rest, **GREEDY)
    assert torch.equal(actual[:, -20:], expected[:, -20:])
    with pytest.raises(ValueError, match="count_from_here"):
        model.generate(ids[:, -3:], cache=cache.clone(), **GREEDY)


def test_streaming_pipeline_and_text(model, tokenizer):
    from transformers import TextIteratorStreamer, pipeline

    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    made = generator("whale ", max_new_tokens=10, do_sample=False)[0]["generated_text"]
    assert made.startswith("whale ")
    batch = generator(TEXTS, max_new_tokens=10, do_sample=False, batch_size=2)
    assert [rows[0]["generated_text"].startswith(t) for rows, t in zip(batch, TEXTS, strict=True)]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(
        **tokenizer("whale ", return_tensors="pt"),
        streamer=streamer,
        max_new_tokens=10,
        do_sample=False,
    )
    assert "whale " + "".join(streamer) in (made, made + tokenizer.eos_token)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cache_implementation": "static"}, "cache of its own"),
        ({"inputs_embeds": torch.zeros(1, 2, 16), "input_ids": None}, "inputs_embeds"),
        ({"assistant_model": "self"}, "assisted generation"),
    ],
)
def test_ways_it_cannot_go_are_refused(model, arguments, message):
    if arguments.get("assistant_model"):
        arguments = {"assistant_model": model}
    with pytest.raises(ValueError, match=message):
        model.generate(**{"input_ids": torch.ones(1, 3, dtype=torch.int64), **arguments})


def test_saving_and_loading_again_gives_the_same_model(model, tmp_path):
    from transformers import AutoModelForCausalLM

    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, ttt=False)
    assert again.base_hash() == model.base_hash()
    assert not again.config.learns
    assert again.config.inner["chunk_size"] == model.config.inner["chunk_size"] == 8
    with pytest.raises(ValueError, match="no key 'chunk'"):
        again.config.ttt = {"chunk": 4}


_ALONE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokens = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("whale", return_tensors="pt")
cache = model(**tokens).cache
cache.save(folder + "/../alone.state", model)
model.generate(**tokens, max_new_tokens=4)
ours = {"ttt_megatron", "ttt_kernels", "megatron"} & {name.split(".")[0] for name in sys.modules}
assert not ours, ours
"""


def test_it_needs_nothing_of_this_project(exported_run):
    done = subprocess.run(
        [sys.executable, "-c", _ALONE, str(exported_run)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (Path(exported_run).parent / "alone.state").is_file()
