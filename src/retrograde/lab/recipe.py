"""A recipe: everything that defines a training run, from a TOML file or flags."""

import tomllib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from retrograde.engine.slots import Method
from retrograde.errors import OptionError
from retrograde.lab import data as lab_data
from retrograde.lab import peers
from retrograde.lab.data import Data
from retrograde.lab.options import make, require_known
from retrograde.lab.peers import Peer
from retrograde.lab.peers.base import trainable


class Recipe(BaseModel):
    """What to train, on what, and how. The same recipe on the same machine gives the same run, bit for bit, as long as
    forecasts decline the same layers.

    Attributes:
        data: Data set: `digits`, a folder in the data folder, a path, or a hub id.
        model: Name of a model, or any importable `module:callable`, which the command line may name and a file may not.
        model_options: Keyword arguments of the model.
        methods: Methods by name, each with its options. Without any this is plain backpropagation.
        peers: Rivals of the methods by name, each with its options (see `retrograde.lab.peers`).
        only: Glob patterns of the layers to attach to. With none, methods attach to all layers.
        skip: Glob patterns of the layers to leave alone.
        epochs: Passes over the training data.
        steps: Number of steps to train for in place of `epochs`. The schedule is fitted to it.
        evaluations: Evaluations on the validation split in each epoch. The last one comes at its end.
        keep: Weights that are tested and saved: the `last`, or those with the `best` validation accuracy.
        batch_size: Examples in a batch.
        optimizer: Optimizer. `sgd` has momentum 0.9.
        learning_rate: Learning rate, which is the peak where the schedule has one.
        weight_decay: Weight decay of the optimizer, decoupled for `adamw`.
        schedule: Learning-rate schedule.
        label_smoothing: Label smoothing of the cross-entropy loss.
        augment: Augment image data by shifts and mirror images.
        validation: Share of the training rows to hold out for validation if the data set has no such split.
        limit: Number of training rows to use, of all that there are.
        standardise: Standardise images by mean and deviation of the training rows. Otherwise pixels are 0 to 1.
        seed: Seed of the initial weights, the order of the data, and the methods' random numbers.
        device: Device: `cpu`, `cuda`, or `auto`, which takes a GPU if there is one.
        precision: Precision of training. `bfloat16` means autocast.
        compile: Run the model through `torch.compile`.
        decline: Leave plain the layers that are not forecast faster with methods that are there to save time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str = "digits"
    model: str = "mlp-small"
    model_options: dict[str, Any] = Field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = Field(default_factory=dict)
    peers: dict[str, dict[str, Any]] = Field(default_factory=dict)
    only: list[str] | None = None
    skip: list[str] | None = None
    epochs: int = Field(default=10, ge=1)
    steps: int | None = Field(default=None, ge=1)
    evaluations: int = Field(default=1, ge=1)
    keep: Literal["last", "best"] = "last"
    batch_size: int = Field(default=128, ge=1)
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    schedule: Literal["one-cycle", "cosine", "constant"] = "one-cycle"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    augment: bool = False
    validation: float = Field(default=0.1, gt=0, lt=1)
    limit: int | None = Field(default=None, ge=1)
    standardise: bool = True
    seed: int = Field(default=0, ge=0, lt=2**63)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    decline: bool = True

    @property
    def label(self) -> str:
        """The run's methods and peers in words: ``"plain"`` or ``"dither(scale=1.0)"``."""
        parts = [
            name + (f"({', '.join(f'{k}={v}' for k, v in options.items())})" if options else "")
            for name, options in (*self.methods.items(), *self.peers.items())
        ]
        return " + ".join(parts) or "plain"

    def make_methods(self) -> list[Method]:
        """The methods themselves.

        Raises:
            OptionError: an unknown method or option, or a refused value.
        """
        return [make(name, options) for name, options in self.methods.items()]

    def make_peers(self) -> list[Peer]:
        """The peers themselves.

        Raises:
            OptionError: an unknown peer or option, a refused value, or a package that is missing.
        """
        return [peers.make(name, options) for name, options in self.peers.items()]

    @property
    def data_key(self) -> tuple[str, float, int, int | None, bool]:
        """What the loaded data depend on: recipes that agree in it share them."""
        return self.data, self.validation, self.seed, self.limit, self.standardise

    def make_optimizer(self, model: nn.Module, peers: Sequence[Peer]) -> torch.optim.Optimizer:
        """The optimizer over the model's trainable parameters, or that of the first peer which brings one."""
        rate, decay = self.learning_rate, self.weight_decay
        settings: dict[str, Any] = {"lr": rate, "weight_decay": decay, "fused": True}
        base: Callable[..., torch.optim.Optimizer]
        if self.optimizer == "sgd":
            base = partial(torch.optim.SGD, momentum=0.9, nesterov=True, **settings)
        else:
            base = partial(torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.Adam, **settings)
        made = (peer.make_optimizer(model, rate, decay, base) for peer in peers)
        found = next((optimizer for optimizer in made if optimizer is not None), None)
        return found or base(trainable(model))

    def make_schedule(
        self, optimizer: torch.optim.Optimizer, steps: int
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule of the learning rate over `steps` steps."""
        schedulers = torch.optim.lr_scheduler
        if self.schedule == "one-cycle":
            # A peer may give some parameters a learning rate of their own, as the other schedules take for granted.
            peaks = [group["lr"] for group in optimizer.param_groups]
            # The loop steps the schedule after every step, the last one included.
            return schedulers.OneCycleLR(optimizer, peaks, total_steps=steps + 1, cycle_momentum=False)
        if self.schedule == "cosine":
            return schedulers.CosineAnnealingLR(optimizer, steps)
        return schedulers.ConstantLR(optimizer, factor=1.0)

    def length(self, data: Data) -> int:
        """Optimizer steps of the whole run on `data`."""
        return self.steps or self.epochs * lab_data.steps_in_epoch(data.train, self.batch_size)

    def load_data(self, data_dir: Path | None = None) -> Data:
        """The recipe's data set.

        Args:
            data_dir: where data sets lie; None reads ``RETROGRADE_DATA``.

        Raises:
            DataError: it is missing, damaged or of another schema.
        """
        fields = self.model_dump(include={"validation", "seed", "limit", "standardise"})
        return lab_data.load(self.data, data_dir=data_dir, **fields)

    @property
    def plain(self) -> bool:
        """Whether this is plain backpropagation."""
        return not self.methods and not self.peers


def read_recipe(path: Path, what: str = "recipe", *, code: bool = False) -> dict[str, Any]:
    """The fields that a TOML recipe sets, for `make_recipe`.

    Args:
        path: of the file.
        what: the file is, for messages.
        code: the model may be any ``module:callable``, because the file is trusted or its model not used.

    Raises:
        OptionError: the file is missing, is not TOML, or names code.
    """
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{what} {path} cannot be read: {error}. Give the path of a TOML file.") from error
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"{what} {path} is not valid TOML: {error}. Fix that line.") from error
    if not code:
        refuse_code(fields, f"{what} {path}")
    return fields


def refuse_code(fields: dict[str, Any], source: str) -> None:
    """Refuse fields of a file, tables inside each other, in which a model is any ``module:callable``.

    Raises:
        OptionError: one is.
    """
    for key, value in fields.items():
        if isinstance(value, dict):
            refuse_code(cast(dict[str, Any], value), source)
        elif key.rpartition(".")[2] == "model":
            for name in cast(list[Any], value) if isinstance(value, list) else [value]:
                if ":" in str(name):
                    raise OptionError(
                        f"{source}: model={name!r} names code, which a file alone must not run. Where you trust that "
                        f"code, name it on the command line: --model {name}."
                    )


def make_recipe(fields: dict[str, Any], source: str = "recipe") -> Recipe:
    """A checked recipe.

    Args:
        fields: any of the attributes of `Recipe`.
        source: where they come from, for messages.

    Raises:
        OptionError: an unknown field (with the nearest names) or a value out of range.
    """
    require_known(f"{source}: there is no field", fields, Recipe.model_fields)
    try:
        recipe = Recipe(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise OptionError(f"{source}: {where}={first['input']!r} is refused: {first['msg']}.") from error
    recipe.make_methods()
    recipe.make_peers()
    return recipe
