r"""Weight gradients in a subspace, sent as such: what ranks of `DistributedDataParallel` add up.

With ``Spectral(residual="unbiased")`` the weight gradient of a step is Ĝ = M₁ Vᵀ + M₂ E_Jᵀ/p
(`retrograde.methods.spectral.sketch`), and all ranks have the same U and have drawn the same channels J. Outside J its
columns are M₁ U_Jᶜᵀ, so that

    Ĝ_J  (o × j)   and   M₁ = Ĝ_Jᶜ U_Jᶜ (U_JᶜᵀU_Jᶜ)⁻¹  (o × k)                       (1)

say all of it, and (k + j)/d of its bytes are sent. The mean over ranks of (1) is (1) of the mean: nothing is
approximated but for rounding. What is not in the subspace, a penalty's gradient, a tied weight's, would be lost, and is
refused.

Cost: 2·o·d·k operations to take M₁ and as many to widen it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from retrograde.engine.layers import find_kind
from retrograde.engine.maps.base import LayerKind, Map, wide
from retrograde.errors import AttachError, OptionError
from retrograde.methods.spectral.core import SpectralRule
from retrograde.session import Session, session_of

_OUTSIDE = 1e-3
"""Of a gradient's norm, what rounding may leave outside the subspace; a unit of rounding where that is more."""


def share_projections(parallel: nn.parallel.DistributedDataParallel, session: Session | None = None) -> None:
    """Let ranks add up projected weight gradients in place of whole ones, from the next backward pass on.

    Gradients of weights that are computed in each forward pass (weight norm) are added up whole, as all others are.

    Args:
        parallel: the attached model, wrapped. It takes one such hook, and none before.
        session: of the attached model; found where it is None.

    Raises:
        OptionError: no layer has ``Spectral(residual="unbiased")``.

    Examples:
        >>> session = rg.attach(model, rg.Spectral(residual="unbiased"))
        >>> parallel = nn.parallel.DistributedDataParallel(model)
        >>> rg.spectral.share_projections(parallel)
    """
    session = session_of(parallel.module) if session is None else session
    rules: dict[int, SpectralRule] = {}
    for layer, rule in session.rules_of("spectral"):
        if isinstance(rule, SpectralRule) and rule.sketches and not rule.tied:
            # A weight that is computed in each forward pass (weight norm) has no gradient in the subspace to send.
            kind = find_kind(layer)
            name = kind.names(layer)[0] if isinstance(kind, LayerKind) else ""
            if name:
                rules[id(layer.get_parameter(name))] = rule
    if not rules:
        raise OptionError(
            "share_projections has nothing to share: no layer of the model is attached with "
            "rg.Spectral(residual='unbiased'), whose gradients alone lie in a subspace that all ranks know."
        )
    parallel.register_comm_hook(rules, _hook)


# torch refuses annotations other than its own classes, which builds without torch.distributed lack.
def _hook(rules: dict[int, SpectralRule], bucket):  # pyright: ignore[reportMissingParameterType, reportUnknownParameterType]
    ranks = torch.distributed.get_world_size()
    gradients = list(zip(bucket.parameters(), bucket.gradients(), strict=True))
    parts: list[Tensor] = []
    for weight, gradient in gradients:
        parts += _taken(rules.get(id(weight)), gradient)
    flat = torch.cat([part.reshape(-1) for part in parts]) / ranks
    future = torch.distributed.all_reduce(flat, async_op=True).get_future()  # pyright: ignore[reportOptionalMemberAccess]

    def spread(done: Any) -> Tensor:
        found = iter(done.value()[0].split([part.numel() for part in parts]))
        given = iter(parts)
        for weight, gradient in gradients:
            rule = rules.get(id(weight))
            if rule is None or rule.drawn is None or rule.map is None:
                gradient.copy_(next(found).view(next(given).shape))
                continue
            columns, narrow = (next(found).view(next(given).shape) for _ in range(2))
            gradient.copy_(_widened(rule, rule.map, gradient, columns, narrow))
        return bucket.buffer()

    return future.then(spread)


def _taken(rule: SpectralRule | None, gradient: Tensor) -> list[Tensor]:
    """What is sent of a gradient: equation (1), or the whole."""
    if rule is None or rule.drawn is None or rule.map is None:
        return [gradient]
    # As the passes rounded it; what is solved needs more than 16 bits.
    basis, chosen = wide(rule.drawn[0].to(gradient)), rule.drawn[1]
    # What multiplies each channel, in columns.
    columns = rule.map.by_channel(rule.map.matrix(wide(gradient)), basis.shape[1])
    rest = torch.ones(basis.shape[1], dtype=torch.bool, device=gradient.device)
    rest[chosen] = False
    outside, u = columns[..., rest], basis[:, rest]
    narrow = torch.linalg.solve(u.mT @ u, u.mT @ outside.mT).mT
    lost = torch.linalg.vector_norm(outside - narrow @ u.mT)
    outside_at_most = max(_OUTSIDE, torch.finfo(gradient.dtype).eps)
    if bool(lost > outside_at_most * torch.linalg.vector_norm(columns)):
        raise AttachError(
            f"layer {rule.name!r}: its gradient does not lie in the subspace that the ranks share, so adding it up "
            "there would lose a part of it. Something else adds to it: a penalty on the weight in the loss, or another "
            "use of the weight. Leave the layer out with `skip`, or do not call share_projections."
        )
    return [columns[..., chosen].to(gradient), narrow.to(gradient)]


def _widened(rule: SpectralRule, map: Map, gradient: Tensor, columns: Tensor, narrow: Tensor) -> Tensor:
    assert rule.drawn is not None
    basis, chosen = rule.drawn
    whole = narrow @ basis.to(gradient).mT
    whole[..., chosen] = columns
    matrix = map.matrix(gradient)
    if matrix.shape[2] != basis.shape[1]:
        places = matrix.shape[2] // basis.shape[1]
        whole = whole.unflatten(1, (-1, places)).transpose(2, 3).flatten(2)
    return map.from_matrix(whole, gradient.shape)
