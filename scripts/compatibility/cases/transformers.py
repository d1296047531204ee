"""Models of Hugging Face's transformers, and LoRA by peft."""

import peft
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import lightning_mimic
from scripts.compatibility.case import Case
from scripts.compatibility.data import batches_of
from scripts.compatibility.modules import Trained

WORDS, LENGTH = 30, 7
BERT = BertConfig(
    vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3,
    max_position_embeddings=16,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=WORDS, n_positions=16, n_embd=16, n_layer=2, n_head=2)
LLAMA = LlamaConfig(
    vocab_size=WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=16,
)  # fmt: skip
VIT = ViTConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8,
    num_labels=3,
)  # fmt: skip
T5 = T5Config(vocab_size=WORDS, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)


class Tuned(Trained):
    def __init__(self, kind, config, lora=None) -> None:
        super().__init__()
        self.model = kind(config)
        if lora is not None:
            self.model = peft.get_peft_model(self.model, lora)

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss


class LanguageModelOfSamples(Tuned):
    def sample_losses(self, batch):
        logits = self.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return lightning_mimic.token_losses(logits[:, :-1], batch["labels"][:, 1:])

    def training_step(self, batch, batch_idx):
        return self.sample_losses(batch).mean()


class TokensOfSamples(Tuned):
    def sample_losses(self, batch):
        logits = self.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return lightning_mimic.token_losses(logits, batch["labels"])

    def training_step(self, batch, batch_idx):
        return self.sample_losses(batch).mean()


def text(padded: bool, labels: str):
    """Batches of token ids, padded on the right."""

    def batches(size: int):
        words = torch.randint(3, WORDS, (4, LENGTH))
        lengths = torch.tensor([7, 4, 6, 5]) if padded else torch.full((4,), LENGTH)
        mask = torch.arange(LENGTH) < lengths[:, None]
        words = words.where(mask, 0)
        of = {
            "classes": torch.arange(4) % 3,
            "tokens": words.where(mask, -100),
            "tags": (words % 3).where(mask, -100),
            "masked": words.where(mask & (torch.arange(LENGTH) % 3 == 0), -100),
        }
        return batches_of({"input_ids": words, "attention_mask": mask.long(), "labels": of[labels]}, size)

    return batches


def pictures(size: int):
    return batches_of({"pixel_values": torch.randn(4, 3, 16, 16).double(), "labels": torch.arange(4) % 3}, size)


def lora(task: str, modules: list[str], **options) -> peft.LoraConfig:
    return peft.LoraConfig(task_type=task, r=2, target_modules=modules, init_lora_weights=False, **options)


CASES = [
    Case(
        "`BertForSequenceClassification`, padded",
        Tuned,
        text(True, "classes"),
        "model.classifier",
        options={"kind": BertForSequenceClassification, "config": BERT},
    ),
    Case(
        "`BertForTokenClassification`, padded",
        Tuned,
        text(True, "tags"),
        "model.classifier",
        plain=False,
        fixed=TokensOfSamples,
        options={"kind": BertForTokenClassification, "config": BERT},
    ),
    Case(
        "`BertForMaskedLM`, as many masked words per text",
        Tuned,
        text(False, "masked"),
        "model.cls.predictions.transform.dense",
        options={"kind": BertForMaskedLM, "config": BERT},
    ),
    Case(
        "`GPT2LMHeadModel`, not padded",
        Tuned,
        text(False, "tokens"),
        "model.transformer.ln_f",
        options={"kind": GPT2LMHeadModel, "config": GPT2},
    ),
    Case(
        "`GPT2LMHeadModel`, padded",
        Tuned,
        text(True, "tokens"),
        "model.transformer.ln_f",
        plain=False,
        fixed=LanguageModelOfSamples,
        options={"kind": GPT2LMHeadModel, "config": GPT2},
    ),
    Case(
        "`LlamaForCausalLM`, not padded",
        Tuned,
        text(False, "tokens"),
        "model.lm_head",
        options={"kind": LlamaForCausalLM, "config": LLAMA},
    ),
    Case(
        "`LlamaForCausalLM`, padded",
        Tuned,
        text(True, "tokens"),
        "model.lm_head",
        plain=False,
        fixed=LanguageModelOfSamples,
        options={"kind": LlamaForCausalLM, "config": LLAMA},
    ),
    Case(
        "`T5ForConditionalGeneration`, not padded",
        Tuned,
        text(False, "tokens"),
        "model.decoder.final_layer_norm",
        options={"kind": T5ForConditionalGeneration, "config": T5},
    ),
    Case(
        "`ViTForImageClassification`",
        Tuned,
        pictures,
        "model.classifier",
        options={"kind": ViTForImageClassification, "config": VIT},
    ),
    Case(
        "`BertForSequenceClassification` with peft's LoRA",
        Tuned,
        text(True, "classes"),
        "model.base_model.model.classifier.modules_to_save.default",
        options={"kind": BertForSequenceClassification, "config": BERT, "lora": lora("SEQ_CLS", ["query", "value"])},
    ),
    Case(
        "`LlamaForCausalLM` with peft's LoRA, not padded",
        Tuned,
        text(False, "tokens"),
        "model.base_model.model.model.layers.1.self_attn.v_proj.lora_B.default",
        options={
            "kind": LlamaForCausalLM,
            "config": LLAMA,
            "lora": lora("CAUSAL_LM", ["q_proj", "v_proj", "o_proj"], lora_dropout=0.1),
        },
    ),
]
