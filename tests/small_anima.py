"""A tiny random Anima: the libraries' classes with every kind of layer of the real one, and its files in the original layout."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

TEXT_WIDTH = 32  # of Qwen3's states: the text conditioner's source_dim
WIDTH = 32  # of the transformer
QWEN_WORDS, T5_WORDS = 320, 320
WORDS = ("a", "cat", "dog", "red", "blue", "photo", "of", "the")  # what the tokenizers know whole
QWEN_ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
T5_SPECIAL = ("<pad>", "</s>", "<unk>")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class SmallAnima:
    """The three models, frozen, in eval mode; the denoiser has the children `transformer` and `text_conditioner`."""

    denoiser: nn.Module
    text_encoder: nn.Module
    vae: nn.Module


@dataclass(frozen=True)
class SmallFiles:
    """The files of a tiny Anima, in the original layout, fp32, with the folders of both tokenizers beside."""

    dit: Path
    qwen3: Path
    vae: Path


def build_small_anima() -> SmallAnima:
    """The models with the same random weights at every call."""
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
    from diffusers.models.condition_embedders.condition_embedder_anima import AnimaTextConditioner
    from diffusers.models.transformers.transformer_cosmos import CosmosTransformer3DModel
    from transformers import Qwen3Config, Qwen3Model

    transformer = CosmosTransformer3DModel(
        in_channels=17, out_channels=16, num_attention_heads=2, attention_head_dim=WIDTH // 2, num_layers=2, mlp_ratio=2.0,
        text_embed_dim=24, adaln_lora_dim=8, max_size=(128, 512, 512), rope_scale=(1.0, 4.0, 4.0), concat_padding_mask=False,
        extra_pos_embed_type=None,
    )  # fmt: skip
    conditioner = AnimaTextConditioner(
        source_dim=TEXT_WIDTH, target_dim=24, model_dim=24, num_layers=2, num_attention_heads=2, mlp_ratio=2.0, target_vocab_size=T5_WORDS
    )
    config: dict[str, Any] = {
        "vocab_size": QWEN_WORDS, "hidden_size": TEXT_WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "rope_theta": 1_000_000.0, "max_position_embeddings": 32768,
    }  # fmt: skip
    models = SmallAnima(
        denoiser=nn.ModuleDict({"transformer": transformer, "text_conditioner": conditioner}),
        text_encoder=Qwen3Model(Qwen3Config(**config)),
        vae=AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 2, 4, 4], num_res_blocks=1),
    )
    generator = torch.Generator().manual_seed(0)
    for module in vars(models).values():
        _make_random(module, generator)
    return models


def write_small_anima(folder: Path, models: SmallAnima | None = None) -> SmallFiles:
    """The files of these models, or of `build_small_anima()`, in `folder`; the tokenizers beside their models."""
    from library.core.tensor_file import save_tensors
    from library.models.anima.checkpoint import denoiser_state_dict, text_encoder_state_dict, vae_state_dict

    models = models or build_small_anima()
    files = SmallFiles(dit=folder / "dit.safetensors", qwen3=folder / "qwen3.safetensors", vae=folder / "vae.safetensors")
    save_tensors(files.dit, denoiser_state_dict(models.denoiser, torch.float32))
    save_tensors(files.qwen3, text_encoder_state_dict(models.text_encoder, torch.float32))
    save_tensors(files.vae, vae_state_dict(models.vae, torch.float32))
    write_qwen_tokenizer(files.qwen3.with_suffix(".tokenizer"))
    write_t5_tokenizer(files.dit.with_suffix(".t5_tokenizer"))
    return files


# Tokenizers


def write_qwen_tokenizer(folder: Path) -> int:
    """`vocab.json`, `merges.txt` and `tokenizer_config.json` of a byte-level BPE that knows a few words; returns its number of tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    characters = sorted(ByteLevel.alphabet())
    merges = [(word[:n], word[n]) for word in WORDS for n in range(1, len(word))]
    merges = [*dict.fromkeys(merges), *(("\u0120", word) for word in WORDS)]  # U+0120 stands for a space
    tokens = [*characters, *("".join(pair) for pair in merges)]
    added = {
        str(len(tokens) + n): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for n, token in enumerate(QWEN_ADDED)
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {"added_tokens_decoder": added, "tokenizer_class": "Qwen2Tokenizer", "pad_token": QWEN_ADDED[0], "eos_token": QWEN_ADDED[2]}
    _write_json(folder / "tokenizer_config.json", config | {"add_prefix_space": False, "errors": "replace"})
    return len(tokens) + len(added)


def write_t5_tokenizer(folder: Path) -> int:
    """`tokenizer.json` of a unigram model that knows a few words and single letters; returns its number of tokens."""
    pieces = [(token, 0.0) for token in T5_SPECIAL]
    pieces += [("\u2581" + word, -3.0) for word in WORDS]  # U+2581 stands for a space
    pieces += [("\u2581", -4.0), *((letter, -6.0) for letter in (*LETTERS, *LETTERS.upper(), *",.-0123456789"))]
    pieces += [(f"<extra_id_{number}>", 0.0) for number in reversed(range(100))]
    t5_tokenizer(pieces).save(str(_made(folder) / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "pad_token": "<pad>", "eos_token": "</s>"})
    return len(pieces)


def t5_tokenizer(pieces: list[tuple[str, float]]) -> Any:
    """T5's tokenizer over these pieces, as T5's own `tokenizer.json` describes it but for the table of normal characters."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import Unigram

    tokenizer = Tokenizer(Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in T5_SPECIAL])
    return tokenizer


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_json(path: Path, table: dict) -> None:
    path.write_text(json.dumps(table, ensure_ascii=False, indent=1), encoding="utf-8")


def _make_random(module: nn.Module, generator: torch.Generator) -> None:
    """Weights of the scale of an initialised model, norms near one, every number different."""
    module.eval().requires_grad_(False)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        inputs = parameter[0].numel() if parameter.ndim > 1 else 1
        is_norm = bool((parameter == 1).all())
        parameter.copy_(1 + 0.1 * noise if is_norm else noise * (0.1 if parameter.ndim == 1 else inputs**-0.5))
