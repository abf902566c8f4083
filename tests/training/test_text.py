"""Text sources, and blocks whose order can be resumed."""

import json

import pytest
import torch

from slimgrad.errors import BatchError, CheckpointError, LoadError
from slimgrad.training.text import ByteTokenizer, TextSource, TokenBlocks, text_source, tokenize


def take(blocks, count):
    return [next(blocks)["input_ids"] for _ in range(count)]


def test_default_text_is_python_topics_in_order():
    from pydoc_data.topics import topics

    source = text_source(None)
    assert source.documents == tuple(topics[name] for name in sorted(topics))
    assert sum(map(len, source.documents)) > 300_000


def test_text_file(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffgrüße\n".encode())
    assert text_source(str(tmp_path / "a.txt")).documents == ("grüße\n",)


def test_json_lines(tmp_path):
    lines = [{"id": 1, "text": "a\u2028b"}, {"id": 2, "title": "c", "body": "d"}, "e"]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n"
    (tmp_path / "a.jsonl").write_text(text)
    assert text_source(str(tmp_path / "a.jsonl")).documents == ("a\u2028b", "c", "e")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "a"}\n{"text": \n', "line 2 .* is not JSON"),
        ('{"text": "a"}\n\n{"n": 1}\n', "line 3 .* no text in any of its fields: n"),
        ("[1]\n", "line 1 .* is list"),
        ("\n", "holds no text"),
    ],
)
def test_bad_lines_are_named(tmp_path, content, words):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(LoadError, match=words):
        text_source(str(tmp_path / "a.jsonl"))


def test_unreadable_texts_are_refused(tmp_path):
    (tmp_path / "story.txt").write_bytes(b"abc\xff")
    with pytest.raises(LoadError, match="byte 3 is 0xff"):
        text_source(str(tmp_path / "story.txt"))
    with pytest.raises(LoadError, match=r"did you mean .*story\.txt"):
        text_source(str(tmp_path / "stroy.txt"))
    with pytest.raises(LoadError, match=r"expected a \.txt or \.jsonl"):
        text_source(str(tmp_path / "story.pdf"))


def test_bytes_are_tokens_without_a_tokenizer():
    tokens = tokenize(TextSource("t", ("aé", "b")), None)
    assert tokens.dtype == torch.int32
    assert tokens.tolist() == [97, 195, 169, 98]
    assert ByteTokenizer().decode(tokens.tolist()) == "aéb"


def test_documents_end_with_the_end_of_text_token():
    class Words:
        eos_token_id = 9

        def encode(self, text, *, add_special_tokens=True, verbose=True):
            assert not add_special_tokens
            assert not verbose
            return [len(word) for word in text.split()]

    assert tokenize(TextSource("t", ("a bb", "ccc")), Words()).tolist() == [1, 2, 9, 3, 9]


def test_an_epoch_visits_every_block_once_in_a_new_order():
    blocks = TokenBlocks(torch.arange(83), seq_len=4, batch_size=5, seed=3)
    epochs = [torch.cat(take(blocks, 4)) for _ in range(2)]
    for epoch in epochs:
        assert sorted(epoch.flatten().tolist()) == list(range(80))
        assert all((row[1:] - row[:-1] == 1).all() for row in epoch)
        assert not torch.equal(epoch, torch.arange(80).view(20, 4))
    assert not torch.equal(*epochs)
    batch = next(blocks)
    assert batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert batch["input_ids"].data_ptr() != batch["labels"].data_ptr()
    assert blocks.blocks.dtype == torch.int32


def test_order_depends_on_the_seed_alone():
    def order(seed):
        return torch.cat(take(TokenBlocks(torch.arange(80), 4, 5, seed), 4))

    first, before = order(1), torch.get_rng_state()
    torch.manual_seed(99)
    assert torch.equal(order(1), first)
    assert not torch.equal(order(2), first)
    torch.set_rng_state(before)
    order(1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("done", range(9))  # four batches an epoch: both ends of two epochs
def test_resume_continues_with_the_next_batch(done):
    straight = TokenBlocks(torch.arange(83), 4, 5, seed=7)
    take(straight, done)
    state = json.loads(json.dumps(straight.state()))
    resumed = TokenBlocks(torch.arange(83), 4, 5, seed=7)
    resumed.restore(state)
    for a, b in zip(take(straight, 6), take(resumed, 6), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "other",
    [
        TokenBlocks(torch.arange(1, 84), 4, 5, seed=7),
        TokenBlocks(torch.arange(83), 4, 5, seed=8),
        TokenBlocks(torch.arange(83), 4, 2, seed=7),
        TokenBlocks(torch.arange(83), 8, 5, seed=7),
    ],
    ids=["text", "seed", "batch_size", "seq_len"],
)
def test_a_position_in_other_data_is_refused(other):
    blocks = TokenBlocks(torch.arange(83), 4, 5, seed=7)
    with pytest.raises(CheckpointError, match="resume with the same text"):
        other.restore(blocks.state())


def test_a_text_too_short_says_by_how_much():
    with pytest.raises(BatchError, match="needs 1,024 tokens, found 1,000"):
        TokenBlocks(torch.arange(1000), 512, 2)
    TokenBlocks(torch.arange(1024), 512, 2)
    with pytest.raises(BatchError, match="1 or more"):
        TokenBlocks(torch.arange(1000), 0, 2)
