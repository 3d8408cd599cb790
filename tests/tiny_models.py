"""Real transformers and diffusers models, tiny, untrained and built without a network.

Weights come from torch's global generator: seed it for repeatable models.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessor,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    GPT2Tokenizer,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from percov2.synthesis.text_conditioner import train_clip_tokenizer

CAPTIONS = (
    "A dog runs along the beach.",
    "Two children play in the sand near the water.",
    "A man on a surfboard rides a wave while people watch.",
    "A brown dog catches a ball in the park.",
    "The red barn stands behind a field of yellow flowers.",
)
MAX_LENGTH = 16
JOINT_DIM = 96
POOLED_DIM = 56

_Model = TypeVar("_Model")


@functools.cache
def tiny_clip_tokenizer() -> CLIPTokenizer:
    """CLIP tokenizer of about 560 tokens, 16 per caption."""
    return train_clip_tokenizer(CAPTIONS, vocab_size=560, max_length=MAX_LENGTH)


def _evaluating(model: _Model) -> _Model:
    """Switch to evaluation: dropout would make outputs random."""
    assert isinstance(model, nn.Module)
    model.eval()
    return model


def tiny_clip_encoder(
    *, hidden_size: int = 32, projection_dim: int = 24
) -> CLIPTextModelWithProjection:
    """Two-layer CLIP text encoder for `tiny_clip_tokenizer`."""
    tokenizer = tiny_clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        projection_dim=projection_dim,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _evaluating(CLIPTextModelWithProjection(config))


def tiny_t5_tokenizer() -> T5Tokenizer:
    """T5 tokenizer that knows lower-case letters."""
    letters = [(letter, -3.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def tiny_t5_encoder(*, d_model: int = JOINT_DIM) -> T5EncoderModel:
    """One-layer T5 encoder for `tiny_t5_tokenizer`."""
    config = T5Config(
        vocab_size=len(tiny_t5_tokenizer()),
        d_model=d_model,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return _evaluating(T5EncoderModel(config))


def tiny_sd3_transformer(
    *, joint_dim: int = JOINT_DIM, pooled_dim: int = POOLED_DIM, latent_channels: int = 4
) -> SD3Transformer2DModel:
    """Two-block SD3 transformer for latents of at most 16x16."""
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=joint_dim,
        caption_projection_dim=32,
        pooled_projection_dim=pooled_dim,
        pos_embed_max_size=16,
    )
    return _evaluating(transformer)


def tiny_vae(*, latent_channels: int = 4, levels: int = 2) -> AutoencoderKL:
    """AutoencoderKL with SD3's kind of shift and scale.

    Args:
        latent_channels: 16 in SD3.
        levels: each side is reduced by 2 ** (levels - 1); 4 levels in SD3.
    """
    vae = AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5305,
    )
    return _evaluating(vae)


def tiny_sd3_pipeline(*, with_t5: bool) -> Any:
    """Diffusers' `StableDiffusion3Pipeline` with tiny parts; CLIP reads 16 tokens."""
    return StableDiffusion3Pipeline(
        transformer=tiny_sd3_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(),
        text_encoder=tiny_clip_encoder(),
        tokenizer=tiny_clip_tokenizer(),
        text_encoder_2=tiny_clip_encoder(hidden_size=40, projection_dim=POOLED_DIM - 24),
        tokenizer_2=tiny_clip_tokenizer(),
        text_encoder_3=tiny_t5_encoder() if with_t5 else None,
        tokenizer_3=tiny_t5_tokenizer() if with_t5 else None,
    )


SYLLABLES = tuple(left + right for left in "bdfgklmnprst" for right in "aeiou")
_BYTES = ("<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()))
_IMAGE_TOKEN_ID = len(_BYTES) + len(SYLLABLES)
_SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
_TEXT: dict[str, Any] = {
    "vocab_size": _IMAGE_TOKEN_ID + 1,
    "max_position_embeddings": 400,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def syllable_tokenizer() -> GPT2Tokenizer:
    """Tokenizer that reads bytes and can speak `SYLLABLES`, each after a line break."""
    symbols = [*_BYTES, *(f"Ċ{syllable}" for syllable in SYLLABLES), "<image>"]
    return GPT2Tokenizer(
        vocab={symbol: index for index, symbol in enumerate(symbols)},
        merges=[],
        unk_token="</s>",
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )


def save_tiny_blip2(directory: Path) -> None:
    """Save a random BLIP-2 and its processor; its captions are `SYLLABLES`, one a line."""
    images = BlipImageProcessor(size={"height": 16, "width": 16})
    processor = Blip2Processor(images, syllable_tokenizer(), num_query_tokens=4)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**_SMALL, image_size=16, patch_size=8),
        qformer_config=Blip2QFormerConfig(**_SMALL, vocab_size=8, cross_attention_frequency=1),
        text_config=OPTConfig(
            **_TEXT,
            hidden_size=16,
            word_embed_proj_dim=16,
            ffn_dim=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        ),
        num_query_tokens=4,
        image_token_index=_IMAGE_TOKEN_ID,
    )
    _save_captioner(Blip2ForConditionalGeneration(config), processor, directory)


def save_tiny_llava(directory: Path) -> None:
    """Save a random LLaVA, a model with a chat template, that speaks `SYLLABLES`."""
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        images,
        syllable_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(
            "{% for message in messages %}{% for part in message['content'] %}"
            "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
            "{% endfor %}{% endfor %}: "
        ),
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_SMALL, image_size=16, patch_size=8),
        text_config=LlamaConfig(**_TEXT, **_SMALL, tie_word_embeddings=True),
        image_token_index=_IMAGE_TOKEN_ID,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    _save_captioner(LlavaForConditionalGeneration(config), processor, directory)


@torch.no_grad()
def _save_captioner(model: PreTrainedModel, processor: Any, directory: Path) -> None:
    randomise(model, std=0.3)
    # A byte's logit is its embedding's product with the state: 0, less than the best syllable's.
    embeddings = model.get_input_embeddings().get_parameter("weight")
    embeddings[: len(_BYTES)] = 0
    embeddings[_IMAGE_TOKEN_ID] = 0
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


@torch.no_grad()
def randomise(module: nn.Module, *, std: float) -> None:
    """Draw every parameter afresh, so that no zero initialisation hides a part's effect."""
    for parameter in module.parameters():
        parameter.normal_(std=std)
