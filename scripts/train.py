"""Train a digit classifier: `accelerate launch scripts/train.py --help` lists the options."""

from mnist_accel.cli import importing, run_script
from mnist_accel.config import parse_config


def main() -> int:
    config = parse_config()
    with importing():
        from mnist_accel.trainer import Trainer  # torch is imported only once the options are known to be right

        trainer = Trainer(config)  # building an optimizer imports as much once more
    return trainer.run()


if __name__ == "__main__":
    run_script(main)
