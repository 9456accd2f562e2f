"""A model that looks and answers yes or no: the probability of yes, as VQAScore has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..pictures import to_pil
from ..prompt_sets import UNSAFE, PromptSet
from . import Absent, Measure, Metric, Scores, attempt, require_plain_config

QUESTION = 'Does this figure show "{}"? Please answer yes or no.'  # Lin et al., VQAScore, 2024
_REMEDY = "name a vision-language model of transformers (a folder or a hub id) with --vqa"


def vqa_score(model: str | None, device: str = "cpu") -> Metric | Absent:
    """P(yes) of a vision-language model, asked for the prompt and for the concept."""
    return attempt("VQA", lambda: _made(model, device), _REMEDY)


def _made(name: str | None, device: str) -> Metric:
    if name is None:
        raise ValueError("no vision-language model named")
    from transformers import AutoModelForImageTextToText, AutoProcessor

    require_plain_config(name)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    model = AutoModelForImageTextToText.from_pretrained(name, use_safetensors=True, trust_remote_code=False)
    model = model.eval().requires_grad_(False).to(device)
    answers = _answers(processor.tokenizer)

    @torch.no_grad()
    def yes(picture: Tensor, text: str) -> float:
        batch = processor(images=to_pil(picture), text=_prompt(processor, QUESTION.format(text)), return_tensors="pt")
        logits = model(**batch.to(device)).logits[0, -1].float()
        return torch.stack([logits[tokens].logsumexp(0) for tokens in answers]).softmax(0)[0].item()

    def scores(pictures: Tensor, asked: PromptSet, _base: Tensor) -> Scores:
        pairs = list(zip(pictures, asked.asks, strict=True))
        found = {"prompt": torch.tensor([yes(picture, ask.text) for picture, ask in pairs])}
        if asked.words:
            found["concept"] = torch.tensor([yes(picture, asked.words) for picture, _ in pairs])
        return found

    return Metric("VQA", f"VQA {name}", scores, _measures)


def _answers(tokenizer: Any) -> list[list[int]]:
    """The first tokens of yes, and of no, in the spellings that models answer with."""
    found = []
    for word in ("yes", "no"):
        spellings = (word, word.capitalize(), f" {word}", f" {word.capitalize()}")
        found.append({tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in spellings})
    # some tokenizers begin every word with the same space, or know neither word
    answers = [sorted(tokens - other - {tokenizer.unk_token_id}) for tokens, other in (found, found[::-1])]
    if not all(answers):
        raise ValueError("tokenizer: got no token of its own for yes or no, expected a model that answers so")
    return answers


def _prompt(processor: Any, question: str) -> str:
    if getattr(processor, "chat_template", None):
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        return processor.apply_chat_template(turn, add_generation_prompt=True)
    return f"{getattr(processor, 'image_token', '<image>')}\n{question}"


def _measures(asked: PromptSet, own: Scores, _base: Scores) -> dict[str, Measure]:
    measures = {"VQA score of the prompt": Measure(own["prompt"], column="VQA" if asked.kind != UNSAFE else "")}
    if "concept" in own:
        measures["VQA: yes to the concept"] = Measure(own["concept"] > 0.5)
    return measures
