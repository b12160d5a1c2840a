"""Dithered against plain backpropagation on CIFAR-10, two epochs: writes ``results/cifar10.json``.

RETROGRADE_DATA=… python repro/dither_cifar10.py [--seeds 3] [--epochs 2]
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from retrograde.lab.comparison import FILE, compare
from retrograde.lab.recipe import Recipe

RESULT = Path(__file__).parent.parent / "results" / "cifar10.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    given = parser.parse_args()
    recipe = Recipe(data="cifar10", model="vgg-small", epochs=given.epochs)
    with tempfile.TemporaryDirectory() as folder:
        compare(
            [recipe],
            [{"dither": {"scale": 1.0}}],
            Path(folder),
            seeds=given.seeds,
            what=f"CIFAR-10, vgg-small (no BatchNorm), {given.epochs} epochs",
            command="python repro/dither_cifar10.py",
        )
        RESULT.parent.mkdir(exist_ok=True)
        shutil.copy(Path(folder) / FILE, RESULT)


if __name__ == "__main__":
    main()
