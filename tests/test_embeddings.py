"""Embeddings bundled in a LoRA: known while its prompts are read, carried into the new file, and gone afterwards."""

import contextlib
import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from ziplora_lib.errors import BadInput
from ziplora_lib.job import run
from ziplora_lib.lora.reader import read

ENCODERS = {"clip_l": ("text_encoder", "tokenizer"), "clip_g": ("text_encoder_2", "tokenizer_2")}


@pytest.fixture
def bundled(host, pair_files, tmp_path):
    """bundled(file, name, words): a copy of the file with an embedding that reads as these words do."""

    def make(file, name, words, parts=("clip_l", "clip_g")):
        tensors = load_file(file)
        for part in parts:
            encoder, tokenizer = (getattr(host.pipe, attribute) for attribute in ENCODERS[part])
            ids = [tokenizer.convert_tokens_to_ids(f"{word}</w>") for word in words.split()]
            assert tokenizer.unk_token_id not in ids
            tensors[f"bundle_emb.{name}.{part}"] = encoder.get_input_embeddings().weight[ids].detach().clone()
        path = tmp_path / f"{file.stem}-{name}.safetensors"
        save_file(tensors, path)
        return path

    return make


def state(host):
    """All of the text encoders and tokenizers that an embedding could change, to the bit."""
    found = []
    for encoder, tokenizer in ENCODERS.values():
        encoder, tokenizer = getattr(host.pipe, encoder), getattr(host.pipe, tokenizer)
        digest = hashlib.sha256()
        for name, tensor in encoder.state_dict().items():
            digest.update(name.encode() + str(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
        sizes = encoder.config.vocab_size, encoder.get_input_embeddings().num_embeddings
        found.append(
            (digest.hexdigest(), sizes, id(tokenizer), len(tokenizer), tokenizer("a photo of zzz, dog").input_ids)
        )
        found.append([m.eos_token_id for m in encoder.modules() if hasattr(m, "eos_token_id")])
    return found


def close(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("words", ["dog", "red dog", "blue light house"])
@pytest.mark.parametrize("old_config", [False, True], ids=["", "argmax"])
def test_a_prompt_with_its_name_is_read_with_the_embedding(host, pair_files, bundled, words, old_config):
    """One of several vectors stands for as many words. Also with the wrong end of text in SDXL's own config."""
    if old_config:
        for module in host.pipe.text_encoder_2.modules():
            if hasattr(module, "eos_token_id"):
                module.eos_token_id = 2
    lora = host.open(str(bundled(pair_files[0], "zzz", words)))
    assert lora.embeddings.keys() == {"zzz"}
    before, wanted, without = state(host), host.encode(f"a photo of a {words}, sea", 64), host.encode("a zzz", 64)
    with host.embeddings([lora]):
        close(host.encode("a photo of a zzz, sea", 64), wanted)
        close(host.encode(f"a photo of a {words}, sea", 64), wanted)
        assert not torch.allclose(host.encode("a zzz", 64)[0], without[0], atol=1e-2)
    assert state(host) == before
    assert all(torch.equal(x, y) for x, y in zip(host.encode("a zzz", 64), without))


def test_an_embedding_of_one_encoder(host, pair_files, bundled):
    lora = host.open(str(bundled(pair_files[0], "zzz", "dog", parts=("clip_g",))))
    before, dog, without = state(host), host.encode("a dog", 64), host.encode("a zzz", 64)
    width = host.pipe.text_encoder.config.hidden_size
    with host.embeddings([lora]):
        states, pooled, _ = host.encode("a zzz", 64)
        torch.testing.assert_close(states[:, :, width:], dog[0][:, :, width:], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(pooled, dog[1], rtol=1e-5, atol=1e-5)
        assert torch.equal(states[:, :, :width], without[0][:, :, :width])
    assert state(host) == before


def test_it_is_gone_even_after_an_error(host, pair_files, bundled):
    lora, before = host.open(str(bundled(pair_files[0], "zzz", "dog"))), state(host)
    with contextlib.suppress(KeyError), host.embeddings([lora]):
        meanwhile = state(host)
        raise KeyError
    assert meanwhile != before
    assert state(host) == before


def test_a_name_that_is_a_word_already_is_refused(host, pair_files, bundled):
    lora, before = host.open(str(bundled(pair_files[0], "d", "dog"))), state(host)
    with pytest.raises(BadInput, match="'d'") as caught, host.embeddings([lora]):
        pass
    assert caught.value.file == lora.path.name
    assert state(host) == before


def test_without_embeddings_nothing_is_touched(host, pair_files):
    before = state(host)
    with host.embeddings([host.open(str(file)) for file in pair_files]):
        assert state(host) == before


def test_a_merge_reads_its_prompts_with_them_and_carries_them_over(host, pair_files, bundled, recipe_of, monkeypatch):
    subject, style = bundled(pair_files[0], "zzz", "red dog"), bundled(pair_files[1], "szn", "blue")
    seen, encode = {}, host.encode

    def recording(prompt, *args, **kwargs):
        ids = len(host.pipe.tokenizer(prompt).input_ids)
        seen[prompt] = (ids, "zzz" in host.pipe.tokenizer.get_added_vocab())
        return encode(prompt, *args, **kwargs)

    monkeypatch.setattr(host, "encode", recording)
    recipe = recipe_of(subject, style, dtype="fp32", samples=2, steps=1)
    recipe.parents[0].prompt = "a photo of zzz"
    before = state(host)
    result = run(recipe, host)
    assert seen["a photo of zzz"][1]
    assert state(host) == before
    assert any("brings embeddings (zzz)" in said for said in result.warnings)
    assert any("brings embeddings (szn)" in said for said in result.warnings)
    own, saved = [read(file).embeddings for file in (subject, style)], read(host.destination("merged"))
    assert saved.embeddings.keys() == {"zzz", "szn"}
    for parts in own:
        for name, tensors in parts.items():
            for part, tensor in tensors.items():
                assert torch.equal(saved.embeddings[name][part], tensor)
    tensors = load_file(host.destination("merged"))
    assert {n for n in tensors if n.startswith("bundle_emb.")} == {
        f"bundle_emb.{name}.{part}" for name in ("zzz", "szn") for part in ENCODERS
    }


def test_two_of_one_name_are_warned_of_and_the_first_is_kept(host, pair_files, bundled, recipe_of):
    files = bundled(pair_files[0], "zzz", "dog"), bundled(pair_files[1], "zzz", "cat")
    result = run(recipe_of(*files, method="direct", dtype="fp32"), host)
    assert [said for said in result.warnings if "two LoRAs bring an embedding 'zzz'" in said]
    kept = read(host.destination("merged")).embeddings["zzz"]
    assert all(torch.equal(kept[part], tensor) for part, tensor in read(files[0]).embeddings["zzz"].items())


def test_the_same_embedding_twice_is_no_clash(host, pair_files, bundled, recipe_of):
    files = bundled(pair_files[0], "zzz", "dog"), bundled(pair_files[1], "zzz", "dog")
    result = run(recipe_of(*files, method="direct"), host)
    assert not [said for said in result.warnings if "two LoRAs bring" in said]
    assert read(host.destination("merged")).embeddings.keys() == {"zzz"}


def test_a_file_of_embeddings_alone_is_no_lora(host, pair_files, bundled, tmp_path):
    tensors = load_file(bundled(pair_files[0], "zzz", "dog"))
    save_file({n: t for n, t in tensors.items() if n.startswith("bundle_emb")}, tmp_path / "alone.safetensors")
    with pytest.raises(BadInput, match="no LoRA layer"):
        read(tmp_path / "alone.safetensors")
