"""MNIST training done right with Hugging Face Accelerate.

`load_model` is imported on first use, so that `import mnist_accel` (and every `--help`) does not pay for torch.
"""

__version__ = "0.1.0"
__all__ = ["__version__", "load_model"]


def __getattr__(name: str):
    if name == "load_model":
        from mnist_accel.models import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
