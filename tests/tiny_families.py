"""A tiny random model and the real processor of every supported family, built offline."""

from __future__ import annotations

import torch
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from sparsity_forcing.data.digits import corpus
from sparsity_forcing.models.tiny import CHAT_TEMPLATE, MERGE, PATCH, build_model, build_processor, build_tokenizer
from sparsity_forcing.params import ScratchModel

SIDE = 32  # pixels: what the fixed-size vision towers see
DECODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 2048,
}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}
IMAGE_TEMPLATE = CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>")


def build_family(family: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A randomly initialised two-layer model of ``family`` in eval mode, and its processor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, processor = _BUILDERS[family]()
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    return model.eval(), processor


def _tokenizer(*extra: str):
    tokenizer = build_tokenizer(corpus())
    tokenizer.add_tokens(list(extra), special_tokens=True)
    return tokenizer


def _qwen_geometry() -> dict:
    pixels = {"shortest_edge": (PATCH * MERGE) ** 2, "longest_edge": 512**2}
    return {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2, "size": pixels}


def _qwen_ids(tokenizer) -> dict:
    names = ("image_token_id", "<|image_pad|>"), ("video_token_id", "<|video_pad|>")
    ends = ("vision_start_token_id", "<|vision_start|>"), ("vision_end_token_id", "<|vision_end|>")
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in (*names, *ends)}


def _qwen2_5_vl():
    processor = build_processor(corpus())
    return build_model(ScratchModel(layers=2), processor.tokenizer, seed=0), processor


def _qwen2_vl():
    tokenizer = _tokenizer()
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(**_qwen_geometry()),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**_qwen_geometry()),
        chat_template=CHAT_TEMPLATE,
    )
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]}
    config = Qwen2VLConfig(
        text_config={**DECODER, "vocab_size": len(tokenizer), "rope_parameters": rope},
        vision_config={
            "depth": 1,
            "embed_dim": 16,
            "hidden_size": DECODER["hidden_size"],
            "mlp_ratio": 2,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
        },
        **_qwen_ids(tokenizer),
    )
    return Qwen2VLForConditionalGeneration(config), processor


def _qwen3_vl():
    tokenizer = _tokenizer()
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(**_qwen_geometry()),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**_qwen_geometry()),
        chat_template=CHAT_TEMPLATE,
    )
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={**DECODER, "vocab_size": len(tokenizer), "rope_parameters": rope},
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": DECODER["hidden_size"],
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        **_qwen_ids(tokenizer),
    )
    return Qwen3VLForConditionalGeneration(config), processor


def _llava():
    tokenizer = _tokenizer("<image>")
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer,
        patch_size=TOWER["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=IMAGE_TEMPLATE,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**DECODER, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config), processor


def _llava_next():
    tokenizer = _tokenizer("<image>")
    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=pinpoints
        ),
        tokenizer=tokenizer,
        patch_size=TOWER["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=IMAGE_TEMPLATE,
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**DECODER, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
    )
    return LlavaNextForConditionalGeneration(config), processor


def _llava_onevision():
    tokenizer = _tokenizer("<image>", "<video>")
    pinpoints = [[SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessorPil(
            size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=pinpoints
        ),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size={"height": SIDE, "width": SIDE}),
        num_image_tokens=(SIDE // TOWER["patch_size"]) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        chat_template=IMAGE_TEMPLATE,
    )
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=Qwen2Config(**DECODER, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


def _internvl():
    marks = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = _tokenizer(*marks.values(), "<video>")
    for name, token in {**marks, "video_token": "<video>"}.items():
        tokenizer._set_model_specific_special_tokens({name: token})
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, crop_to_patches=False),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size={"height": SIDE, "width": SIDE}),
        image_seq_length=(SIDE // TOWER["patch_size"] // 2) ** 2,
        chat_template=IMAGE_TEMPLATE.replace("<image>", "<IMG_CONTEXT>"),
    )
    config = InternVLConfig(
        vision_config={**TOWER, "image_size": [SIDE, SIDE], "patch_size": [TOWER["patch_size"]] * 2},
        text_config=Qwen2Config(**DECODER, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )
    return InternVLForConditionalGeneration(config), processor


_BUILDERS = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "internvl": _internvl,
}
