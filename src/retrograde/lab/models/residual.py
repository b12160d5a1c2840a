"""The residual connection, written once."""

from torch import Tensor, nn

__all__ = ["Residual"]


class Residual(nn.Module):
    """``shortcut(x) + branch(x)``: x of any shape that both accept, out of the shape that both return.

    The branch is a module with one tensor in and one out, so that its backward pass can be treated, or left
    out, as a whole.
    """

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return ``shortcut(x) + branch(x)``."""
        return self.shortcut(x) + self.branch(x)
