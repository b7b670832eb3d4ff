"""The README.md beside saved weights: what the model is, how it was made, how it did, how to use it."""

import os
from pathlib import Path
from textwrap import indent
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from mnist_accel.config import FIRST_PROCESS_ONLY
from mnist_accel.data import hub_dataset
from mnist_accel.models import DigitClassifier, count_parameters


def model_card(model: DigitClassifier, facts: dict[str, Any]) -> str:
    """A model card in the Hub's format, metadata included.

    The facts are those that `Trainer` records, and `test_accuracy` where the weights were chosen on another split.
    """
    split, accuracy, task = facts["split"], facts["accuracy"], "image-classification"
    hub_id = hub_dataset(facts["dataset"])
    dataset = hub_id or Path(os.path.expanduser(facts["dataset"])).resolve().name
    accuracies = {split: accuracy}
    if "test_accuracy" in facts:
        accuracies["test"] = facts["test_accuracy"]
    metadata = ModelCardData(
        license="mit",
        library_name="mnist_accel",
        pipeline_tag=task,
        tags=["mnist", "accelerate", "safetensors"],
        datasets=[hub_id] if hub_id else None,
        metrics=["accuracy"],
        model_name=model.name,
        eval_results=[
            EvalResult(task, dataset, dataset, "accuracy", round(value, 6), dataset_split=name)
            for name, value in accuracies.items()
        ],
    )
    on_test = f" On the test split: accuracy {accuracies['test']:.2%}." if "test_accuracy" in facts else ""
    options = {name: value for name, value in facts["options"].items() if name not in FIRST_PROCESS_ONLY}
    return f"""---
{metadata.to_yaml()}
---

# {model.name}

Classifies 28x28 images into {len(model.class_names)} classes: {", ".join(model.class_names)}.
{count_parameters(model):,} parameters, trained on {dataset} with Hugging Face Accelerate: epoch {facts["epoch"]},
optimizer step {facts["step"]:,}. On the {split} split: accuracy {accuracy:.2%}, average loss
{facts["loss"]:.4f}.{on_test}

## Use

    import mnist_accel
    model = mnist_accel.load_model("FOLDER")   # this folder, or its Hub id
    logits = model(images)                     # float (N, 1, 28, 28) in 0..1, white ink on black

Normalisation is part of the network. Photos and scans are first brought into MNIST's form:
`python scripts/predict_dir.py images/ --model FOLDER`.

## Training

These options, as a file for `scripts/train.py --config`:

{indent(yaml.safe_dump(options, sort_keys=False), 4 * " ")}"""
