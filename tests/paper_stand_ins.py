"""Tiny stand-ins for the models and the tasks of the paper's tables."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import transformers
from conftest import VOCABULARY, llama_config, perturb, save_tokenizer, write_yaml

from benchmarks.quality.families import Score


def save_models(folder: Path, names: Iterable[str]) -> None:
    """Write a fine-tune of one tiny Llama for each name of the hub, at either of its places."""
    for number, name in enumerate(sorted(names)):
        path = folder / (name if number % 2 else name.rpartition("/")[2])
        # The two LLaMA-2 MAmmoTHs have one token more than their bases.
        save_model(path, tokens=VOCABULARY + ("MAmmoTH-" in name))


def save_model(path: Path, tokens: int) -> None:
    torch.manual_seed(0)
    config = llama_config(max_position_embeddings=256)
    model = transformers.AutoModelForCausalLM.from_config(config)
    perturb(model, 0.05, seed=crc32(path.name.encode()))
    model.resize_token_embeddings(tokens, mean_resizing=False)
    model.save_pretrained(path)
    words = [f"w{number}" for number in range(tokens)]
    save_tokenizer(path, *words, bos_token="w1", eos_token="w2")


def score(model: Path, examples: Iterable[tuple[str, str]]) -> Score:
    """Score a model on prompts and answers without lm-eval."""
    network = transformers.AutoModelForCausalLM.from_pretrained(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    losses, right = [], []
    for prompt, answer in examples:
        ids = tokenizer(f"{prompt} {answer}", return_tensors="pt")["input_ids"]
        start = len(tokenizer(prompt)["input_ids"])
        with torch.inference_mode():
            predicted = network(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
        wanted = ids[0, start:]
        losses.append(-predicted.gather(1, wanted[:, None]).sum().item())
        right.append(bool((predicted.argmax(1) == wanted).all()))
    return Score(100 * sum(right) / len(right), sum(losses) / len(losses))


def save_choice_tasks(folder: Path, questions: list[dict[str, Any]]) -> None:
    """Write tasks named as lm-eval's; AGIEval's list the right choices, or have an answer."""
    count = len(questions)
    numbers = {"answer": [n % 2 for n in range(count)], "gold": [[n % 2] for n in range(count)]}
    tasks = {
        "answer": ["medqa_4options", "agieval_math"],
        "gold": ["agieval_sat_en", "agieval_jec_qa_kd", "agieval_jec_qa_ca"],
    }
    accuracy = {"metric": "acc", "aggregation": "mean"}
    for key, names in tasks.items():
        documents = [{**q, key: a} for q, a in zip(questions, numbers[key], strict=True)]
        file = folder / f"{key}.jsonl"
        file.write_text("\n".join(map(json.dumps, documents)))
        common = {
            "output_type": "multiple_choice",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}},
            "test_split": "test",
            "doc_to_text": "{{q}}",
            "doc_to_choice": "{{c}}",
            "doc_to_target": f"{{{{{key}}}}}",
            "metric_list": [{**accuracy, "higher_is_better": True}],
            "metadata": {"version": 1.0},
        }
        for name in names:
            write_yaml(folder / f"{name}.yaml", {"task": name, **common})
    parts = {"group": "agieval", "task": ["agieval_sat_en", "agieval_math"]}
    write_yaml(folder / "agieval.yaml", {**parts, "aggregate_metric_list": [accuracy]})
