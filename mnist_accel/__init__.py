"""MNIST training done right with Hugging Face Accelerate.

`load_model` is imported on first use, so that `import mnist_accel` (and every `--help`) does not pay for torch.
"""

from pathlib import Path

__version__ = "0.1.0"
__all__ = ["SHIPPED", "__version__", "load_model"]

SHIPPED = Path(__file__).parent / "pretrained"  # the weights that come with the package


def __getattr__(name: str):
    if name == "load_model":
        from mnist_accel.models import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
