"""A table of the families of transformers: what of their heads and hidden units can be taken out.

Every family is built small, with all weights drawn. Half of its groups are set to zero, `slim`
takes them out, and outputs are compared on inputs of another length. It takes about an hour:

    python -m tests.benchmarks.tables.families examples/results/transformers.md [family ...]
"""

from __future__ import annotations

import copy
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import configuration_auto, modeling_auto

from lightning_wgsef import group_parameters, slim
from tests.helpers.removal import difference, drawn, zero_beyond_budgets

SECONDS = 120
MOST = 3_000_000

# Taken where a configuration has an entry of this name; lists keep their lengths.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size"), 16),
    **dict.fromkeys(("d_embed", "word_embed_proj_dim", "output_hidden_size", "width"), 16),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_num_hidden_layers", "decoder_num_hidden_layers"), 2),
    **dict.fromkeys(("num_encoder_layers",), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("attention_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_num_attention_heads", "decoder_num_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_num_key_value_heads", "decoder_num_key_value_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "rotary_dim", "kv_channels", "attention_head_size"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 24),
    **dict.fromkeys(("d_ff", "dff", "n_inner", "hidden_dim", "ffn_hidden_size", "d_inner"), 24),
    **dict.fromkeys(("shared_expert_intermediate_size", "intermediate_size_mlp"), 24),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("max_source_positions", "max_target_positions", "context_length"), 64),
    "vocab_size": 40,
    "decoder_vocab_size": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "type_vocab_size": 2,
    "expansion_ratio": 2,
    "mlp_ratio": 2,
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 3,
    "sliding_window": 8,
    "window_size": 4,
    "conv_dim": 16,
    "embed_dim": 16,
    "hidden_sizes": 16,
    "depths": 1,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "num_mel_bins": 8,
    "num_labels": 3,
    "use_cache": False,
    "num_input_channels": 2,
    "prediction_length": 4,
    "patch_length": 4,
    "patch_stride": 4,
}

IDS = torch.randint(3, 40, (2, 8), generator=torch.Generator().manual_seed(0))
OTHER = torch.randint(3, 40, (3, 12), generator=torch.Generator().manual_seed(1))


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def _both(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}


# Heading, mapping of classes, an input and another of other sizes.
TASKS: list[tuple[str, str, Any, Any]] = [
    ("decoders", "CAUSAL_LM", {"input_ids": IDS}, {"input_ids": OTHER}),
    ("encoders", "MASKED_LM", {"input_ids": IDS}, {"input_ids": OTHER}),
    ("encoder-decoders", "SEQ_TO_SEQ_CAUSAL_LM", _both(IDS), _both(OTHER)),
    ("vision", "IMAGE_CLASSIFICATION", _noise(2, 3, 32, 32), _noise(3, 3, 32, 32)),
    ("speech", "CTC", _noise(2, 2000), _noise(3, 2400)),
    ("time series", "TIME_SERIES_CLASSIFICATION", _noise(2, 64, 2), _noise(3, 64, 2)),
]


def small_config(model_type: str) -> Any:
    """The configuration of a family with `SIZES`."""
    cls = getattr(transformers, configuration_auto.CONFIG_MAPPING_NAMES[model_type])
    plain = cls()
    sizes = {}
    for name, value in SIZES.items():
        own = getattr(plain, name, None)
        if own is None and name not in vars(plain):
            continue
        sizes[name] = [value] * len(own) if isinstance(own, list | tuple) else value
    for name in ("image_size", "patch_size"):
        if isinstance(getattr(plain, name, None), list | tuple):
            sizes[name] = [SIZES[name]] * len(getattr(plain, name))
    config = cls(**sizes)
    for name, value in vars(config).items():
        if isinstance(value, float) and "drop" in name:
            setattr(config, name, 0.0)
    return config


def small(model_type: str, architecture: str) -> Callable[[], nn.Module]:
    """Makes the network of a family, small.

    Raises:
        ValueError: it cannot be made small by `SIZES`.
    """
    cls = getattr(transformers, architecture)
    config = small_config(model_type)
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
    if size > MOST:
        raise ValueError(f"{size:,} parameters")

    def make() -> nn.Module:
        torch.manual_seed(0)
        network: nn.Module = cls(copy.deepcopy(config))
        if hasattr(network, "set_experts_implementation"):
            network.set_experts_implementation("eager")
        return drawn(network)

    return make


def measured(make: Callable[[], nn.Module], example: Any, other: Any, grouping: str) -> dict:
    """What is found, promised and taken out of a family, and the reasons for the rest."""
    network = make()
    try:
        groups = group_parameters(network, grouping, example_input=example)
    except ValueError as error:
        lines = str(error).splitlines()
        return {
            "groups": 0,
            "reasons": sorted({line.split(": ", 1)[-1] for line in lines[1:] or lines}),
        }
    zero_beyond_budgets(groups)
    slimmed = slim(network, example)
    promised = [x for x in groups.layers if x.removable and x.count > x.budget]
    record = slimmed.slimming
    shrunk = record.parameters[1] < record.parameters[0]
    gone = [x for x in promised if shrunk and x.name not in record.kept]
    reasons = {x.obstacle for x in groups.layers if not x.removable} | set(groups.left_out.values())
    try:
        apart = max(difference(network, slimmed, x) for x in (example, other))
    except Exception:  # a network that takes one length only
        apart = difference(network, slimmed, example)
    return {
        "groups": len(groups),
        "layers": len([x for x in groups.layers if x.count > x.budget]),
        "promised": len(promised),
        "taken": len(gone),
        "parameters": list(record.parameters),
        "difference": apart,
        "config": record.kept.get("config", ""),
        "reasons": sorted(reasons),
        "kept": {x.name: record.kept[x.name] for x in promised if x.name in record.kept},
    }


def rows(only: list[str]) -> Iterator[dict]:
    """A row for every family and grouping."""
    seen: set[str] = set()
    for task, mapping, example, other in TASKS:
        names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES")
        for model_type, architecture in names.items():
            if model_type in seen or (only and model_type not in only):
                continue
            row = {"task": task, "family": model_type}
            try:
                signal.alarm(SECONDS)
                make = small(model_type, architecture)
                with torch.no_grad():
                    made = make()
                    made(**example) if isinstance(example, dict) else made(example)
            except BaseException as error:
                signal.alarm(0)
                if isinstance(error, KeyboardInterrupt):
                    raise
                continue  # not made small by these sizes
            seen.add(model_type)
            for grouping in GROUPINGS:
                try:
                    signal.alarm(SECONDS)
                    row[grouping] = measured(make, example, other, grouping)
                except KeyboardInterrupt:
                    raise
                except BaseException as error:
                    row[grouping] = {"failed": f"{type(error).__name__}: {error}"[:300]}
                finally:
                    signal.alarm(0)
            yield row


class TooLongError(BaseException):
    """Time is up; trials do not catch it."""


def _too_long(*_: Any) -> None:
    raise TooLongError(f"more than {SECONDS} s")


GROUPINGS = ("head", "hidden", "expert", "layer")

HEAD = """# Families of transformers

Made by `python -m tests.benchmarks.tables.families` with transformers {version}: {count} families
of its mappings of models that run when they are made small (16 channels, 2 layers, 4 heads).
Half of the groups of every layer are zero, `slim` takes them out, and the networks are compared in
float64 on two inputs, of different lengths where the family takes them.

A cell says how many groups there are, and of how many layers zero groups were promised to be
removable, and were taken out: `8: 2, 2 of 2`. "loads" says of `head` and `hidden` that
`from_pretrained` loads what `save_pretrained` wrote of the slim network, and does the same; the
others need `save_slim`.

{totals}
"""


def document(found: list[dict]) -> str:
    """The table as Markdown."""
    unique = {row["family"]: row for row in found}
    totals = [
        "| | families | groups | layers | promised | taken out |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for grouping in GROUPINGS:
        cells = [row[grouping] for row in unique.values() if row[grouping].get("groups")]
        sums = [sum(x[key] for x in cells) for key in ("groups", "layers", "promised", "taken")]
        totals.append(f"| `{grouping}` | {len(cells)} | " + " | ".join(map(str, sums)) + " |")
    lines = [
        HEAD.format(version=transformers.__version__, count=len(unique), totals="\n".join(totals))
    ]
    for task in dict.fromkeys(row["task"] for row in unique.values()):
        lines += [
            f"## {task.capitalize()}\n",
            "| family | heads | hidden units | experts | blocks | largest difference | loads |",
            "|---|---|---|---|---|--:|---|",
        ]
        for name, row in unique.items():
            if row["task"] == task:
                lines.append(f"| {name} | {' | '.join(_cells(row))} |")
        lines.append("")
    lines += ["## Reasons for the others\n"]
    for grouping in ("head", "hidden", "expert"):
        by_reason: dict[str, list[str]] = {}
        for name, row in unique.items():
            cell = row[grouping]
            said = [cell["failed"]] if "failed" in cell else []
            has = bool(cell.get("groups"))
            if (has and cell["promised"] < cell["layers"]) or (not has and grouping != "expert"):
                said += cell.get("reasons", [])
            for reason in dict.fromkeys(_short(x) for x in said):
                by_reason.setdefault(reason, []).append(name)
        lines += [f"### {grouping}\n", "| reason | families |", "|---|---|"]
        for reason, names in sorted(by_reason.items(), key=lambda x: -len(x[1])):
            lines.append(f"| {reason} | {', '.join(dict.fromkeys(names))} |")
        lines.append("")
    return "\n".join(lines)


def _cells(row: dict) -> Iterator[str]:
    for grouping in GROUPINGS:
        cell = row[grouping]
        if "failed" in cell:
            yield "not compared"
        elif not cell.get("groups"):
            yield "-"
        else:
            yield f"{cell['groups']}: {cell['promised']}, {cell['taken']} of {cell['layers']}"
    differences = [row[x]["difference"] for x in GROUPINGS if "difference" in row[x]]
    yield f"{max(differences):.0e}" if differences else "-"
    loads = [x for x in ("head", "hidden") if row[x].get("taken") and not row[x]["config"]]
    yield ", ".join(loads) or "-"


def _short(reason: str) -> str:
    """A reason without what differs between layers: names and sizes."""
    if reason.startswith(TooLongError.__name__):
        return "not finished in the time given"
    if "double" in reason.lower() or "without overflow" in reason:
        return "the family does not run in float64, in which outputs are compared"
    text = re.sub(r"'[^']*'|\b(?:\w+\.)+\w+(?:, (?:\w+\.)+\w+)*", "..", reason.splitlines()[0])
    text = re.sub(r"\b\w*(RMSNorm|LayerNorm)\b", r"\1", text)
    text = re.sub(r"\d+", "n", text)
    return text.replace("|", "/")[:160]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, _too_long)
    Path(sys.argv[1]).write_text(document(list(rows(sys.argv[2:]))))
