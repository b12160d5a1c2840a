"""What `retrograde.spectral.adapt` keeps for each layer: source statistics, those of the test stream, and the map.

The equations and symbols are those of `retrograde.spectral.adaptation`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from retrograde.maths import spectral
from retrograde.spectral.moments import Moments

Correction = Literal["transport", "colour", "mean", "scale", "align", "shrink"]

SOURCE = ("source_mean", "source_basis", "source_values", "source_rest", "usual")
_TRIAL = 3.0
"""Windows that a trial lasts at least: what it began with counts for e⁻³ = 5 % then."""
_TINY = 1e-12
_FLOOR = 1e-6
"""Of the largest eigenvalue: variances below it count as it does in ratios."""


class Precise(nn.Module):
    """Its buffers stay float32 or float64: of a model that is cast to half precision they only follow the device."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Precise":
        for child in self.children():
            child._apply(fn)  # pyright: ignore[reportPrivateUsage]
        for name, buffer in self.named_buffers(recurse=False):
            like = fn(buffer)
            setattr(
                self, name, like if like.dtype in (torch.float32, torch.float64) else buffer.to(like.device)
            )
        return self


class Stream(Precise):
    """Mean (d,), covariance (d, d) and leading subspace (d, k) of a stream, and the windows that it has lasted."""

    mean: Tensor
    covariance: Tensor
    basis: Tensor
    age: Tensor

    def __init__(self, *source: Tensor) -> None:
        super().__init__()
        for name in ("mean", "covariance", "basis", "age"):
            self.register_buffer(name, torch.empty(0))
        self.start(*source)

    @torch.inference_mode(False)
    def start(self, mean: Tensor, covariance: Tensor, basis: Tensor) -> None:
        """Begin, or begin anew, with these."""
        self.mean, self.covariance, self.basis = mean.clone(), covariance.clone(), basis.clone()
        self.age = mean.new_zeros(())

    def update(self, rows: Tensor, windows: float, floor: Tensor) -> None:
        """Equations (1) and (2): let the rows (n, d) of a batch, n/N `windows`, count."""
        share = -math.expm1(-windows)
        mean = rows.mean(0)
        centred, moved = rows - mean, mean - self.mean
        fresh = centred.mT @ centred / rows.shape[0] + (1 - share) * moved.outer(moved)
        if not bool(fresh.isfinite().all()):
            return
        self.covariance = self.covariance.lerp(fresh, share)
        self.mean = self.mean + share * moved
        # A stream that has less variance than directions would leave QR with zero columns.
        basis = spectral.qr_steps(lambda q: self.covariance @ q + floor * q, self.basis, 1)
        self.basis = basis.contiguous()
        self.age = self.age + windows

    def along(self, q: Tensor) -> Tensor:
        """The stream's variance along the columns of q."""
        return (q * (self.covariance @ q)).sum(0).clamp_min(0)


class Tracker(Precise):
    """Statistics of one layer's features.

    Attributes:
        stream: the test stream's, which go into the corrections.
        trial: those of its rows since they last were far from the source, begun as the source's. The stream's own
            forget a far-off past slowly: of a variance that was a thousand times that of the source's last direction
            they need ten windows. What begins afresh after it is like the source at once.
    """

    source_mean: Tensor
    source_basis: Tensor
    source_values: Tensor
    source_rest: Tensor
    usual: Tensor

    def __init__(self, source: Mapping[str, Tensor]) -> None:
        super().__init__()
        # One layout, whatever made them: products of another one round differently, and what is loaded has this one.
        with torch.inference_mode(False):
            for name in SOURCE:
                self.register_buffer(name, source[name].clone(memory_format=torch.contiguous_format))
            beginning = self._beginning()
            self.stream, self.trial = Stream(*beginning), Stream(*beginning)

    @classmethod
    def of(cls, moments: Moments, rank: int | None, energy: float = 1.0) -> "Tracker":
        """From the source's moments: k is `rank`, or the smallest that holds the share `energy` of the trace."""
        # Each process has its own source, and its own stream.
        mean, covariance = moments.finish(everywhere=False)
        d = mean.shape[0]
        values, vectors = (x.flip(-1) for x in torch.linalg.eigh(covariance))
        values = values.clamp_min(0)
        k = min(rank, d) if rank else spectral.rank_for_energy(values[None], values.sum()[None], energy)
        rest = values[k:].mean() if k < d else values.new_zeros(())
        source = (mean, vectors[:, :k], values[:k], rest, values.new_ones(3))
        return cls({name: tensor.to(moments.like) for name, tensor in zip(SOURCE, source, strict=True)})

    @property
    def width(self) -> int:
        """d."""
        return self.source_mean.shape[0]

    @torch.inference_mode(False)
    def reset(self) -> None:
        """Forget the test stream: it is taken to be like the source."""
        self.stream.start(*self._beginning())
        self.start_trial()

    @torch.inference_mode(False)
    def start_trial(self) -> None:
        """Begin anew what tells whether the stream is like the source again."""
        self.trial.start(*self._beginning())

    def _beginning(self) -> tuple[Tensor, Tensor, Tensor]:
        q = self.source_basis
        eye = torch.eye(q.shape[0], dtype=q.dtype, device=q.device)
        covariance = self.source_rest * eye + (q * (self.source_values - self.source_rest)) @ q.mT
        return self.source_mean, covariance, q

    def _floor(self) -> Tensor:
        return _FLOOR * self.source_values[0] + _TINY

    def update(self, rows: Tensor, windows: float) -> None:
        """Equations (1) and (2): let the rows (n, d) of a batch, n/N `windows`, count in the stream's statistics."""
        self.stream.update(rows, windows, self._floor())

    def put_on_trial(self, rows: Tensor, windows: float, opens: float, closes: float) -> None:
        """As `update`, in the trial; where it has lasted, and its level is below `closes`, the stream's are its own.

        Above the level `opens` it begins anew.
        """
        self.trial.update(rows, windows, self._floor())
        level = self.level(self.trial)
        if level < closes and float(self.trial.age) >= _TRIAL:
            self.stream.start(self.trial.mean, self.trial.covariance, self.trial.basis)
        elif level <= opens:
            return
        self.start_trial()

    def level(self, stream: Stream | None = None) -> float:
        """Equation (6) of this layer: the largest of the stream's `shift`, each divided by its limit."""
        return float((self.shift(stream) / self.usual).max())

    def shift(self, stream: Stream | None = None) -> Tensor:
        """Equations (3) to (5): drift of the subspace, displacement of the mean, change of the spectrum; (3,)."""
        stream = stream or self.stream
        k = self.source_values.shape[0]
        floor = self._floor()
        values = self.source_values + floor
        drift = spectral.drift(self.source_basis, stream.basis) / k
        if k == self.width:
            # All there is: what comes out is rounding.
            drift = torch.zeros_like(drift)
        moved = self.source_basis.mT @ (stream.mean - self.source_mean)
        ratio = (stream.along(self.source_basis) + floor) / values
        spectrum = ratio.log().square().mean()
        return torch.stack((drift, (moved.square() / values).mean(), spectrum))

    def map(self, correction: Correction, tau: float, drop: bool) -> tuple[float | Tensor, Tensor, Tensor]:
        """g, L (d, m) and R (d, m) of the corrections h' = μ_s + g(h − μ_t) + L Rᵀ(h − μ_t), equations (7) to (11)."""
        q_s, q_t = self.source_basis, self.stream.basis
        ridge = tau * self.source_values.mean() + _TINY
        kept: float | Tensor = 0.0 if drop else 1.0
        if correction == "mean":
            return 1.0, q_s[:, :0], q_s[:, :0]
        if correction == "scale":
            along = self.stream.along(q_s)
            gain = kept * self._rest_ratio(along)
            inside = ((self.source_values + ridge) / (along + ridge)).sqrt()
            return gain, q_s * (inside - gain), q_s
        if correction == "shrink":
            along = self.stream.along(q_t)
            return kept, q_t * (along / (along + ridge) - kept), q_t
        if correction == "align":
            overlap = q_s.mT @ q_t
            left, _, right = torch.linalg.svd(overlap)
            between = left @ right
            if drop:
                return 0.0, q_s @ between, q_t
            return 1.0, torch.cat((-q_s, q_s @ (between + overlap) - q_t), 1), torch.cat((q_s, q_t), 1)
        return self._matched(ridge, kept, correction == "transport")

    def _matched(
        self, ridge: Tensor, kept: float | Tensor, least: bool
    ) -> tuple[float | Tensor, Tensor, Tensor]:
        # In float64: the product of two covariances has the product of their condition numbers.
        q_s, q_t, values = self.source_basis.double(), self.stream.basis.double(), self.source_values.double()
        d, k = q_s.shape
        # Both models are isotropic outside the two subspaces together.
        u = torch.eye(d).to(q_s) if 2 * k >= d else torch.linalg.qr(torch.cat((q_s, q_t), 1))[0]
        inner = q_t.mT @ self.stream.covariance.double() @ q_t
        # What lies below the rounding of the stream's own variances says nothing.
        ridge = ridge.double().maximum(torch.finfo(self.source_mean.dtype).eps * inner.diagonal().max())
        rest = self._rest(inner.diagonal())
        gain = kept * ((self.source_rest + ridge) / (rest + ridge)).sqrt() if k < d else kept
        eye = torch.eye(u.shape[1]).to(u)
        s, t = u.mT @ q_s, u.mT @ q_t
        # The source's root: its eigenvectors are known.
        outside = (self.source_rest + ridge).sqrt()
        half = outside * eye + (s * ((values + ridge).sqrt() - outside)) @ s.mT
        target = (rest + ridge) * eye + t @ (inner - rest * torch.eye(k).to(t)) @ t.mT
        inside = spectral.optimal_transport(target, half) if least else half @ spectral.root(target, -0.5)
        gain = gain.to(self.source_mean) if isinstance(gain, Tensor) else gain
        return gain, (u @ (inside - gain * eye)).to(self.source_mean), u.to(self.source_mean)

    def _rest(self, along: Tensor) -> Tensor:
        """The stream's mean variance in the other directions."""
        d, k = self.source_basis.shape
        return (self.stream.covariance.diagonal().sum() - along.sum()).clamp_min(0) / max(d - k, 1)

    def _rest_ratio(self, along: Tensor) -> Tensor:
        floor = self._floor()
        return ((self.source_rest + floor) / (self._rest(along) + floor)).sqrt()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        state_dict, prefix = args[:2]
        saved = {name: state_dict[prefix + name] for name in SOURCE if prefix + name in state_dict}
        # The rank follows the source's energy, so that what is loaded may have another one.
        if len(saved) == len(SOURCE) and is_source(saved) and len(saved["source_mean"]) == self.width:
            k = len(saved["source_values"])
            with torch.inference_mode(False):
                self.source_values = self.source_values.new_empty(k)
                for own, name in ((self, "source_basis"), (self.stream, "basis"), (self.trial, "basis")):
                    setattr(own, name, self.source_values.new_empty(self.width, k))
        super()._load_from_state_dict(*args, **kwargs)


def corrected(
    x: Tensor, axis: int, tracker: Tracker, affine: tuple[float | Tensor, Tensor, Tensor]
) -> Tensor:
    """h' of every row of x, in its own layout and dtype; the arithmetic is that of the statistics."""
    gain, left, right = affine
    d, m = left.shape
    dtype = torch.promote_types(x.dtype, tracker.source_mean.dtype)
    with torch.autocast(x.device.type, enabled=False):
        h = x.to(dtype)
        shape = [-1 if i == axis else 1 for i in range(h.dim())]
        h = h - tracker.stream.mean.to(dtype).view(shape)
        if m and axis == h.dim() - 1:
            h = gain * h + (h @ right.to(dtype)) @ left.mT.to(dtype)
        elif m:
            flat = h.flatten(axis + 1)
            if 2 * m < d:
                flat = gain * flat + left.to(dtype) @ (right.mT.to(dtype) @ flat)
            else:
                dense = left @ right.mT
                flat = (dense + gain * torch.eye(d).to(dense)).to(dtype) @ flat
            h = flat.view(h.shape)
        else:
            h = gain * h
        return (h + tracker.source_mean.to(dtype).view(shape)).to(x.dtype)


def is_source(statistics: Mapping[str, Tensor]) -> bool:
    """Whether the shapes of all of `SOURCE` belong together."""
    basis = statistics["source_basis"]
    shapes = (basis.shape[:1], basis.shape, basis.shape[1:], (), (3,))
    return basis.dim() == 2 and all(
        tuple(statistics[name].shape) == tuple(shape) for name, shape in zip(SOURCE, shapes, strict=True)
    )


def source_of(tracker: Tracker) -> dict[str, Any]:
    """The source's part of a tracker's buffers."""
    return {name: getattr(tracker, name).clone() for name in SOURCE}
