"""What clipping and noise guarantee to a user: (ε, δ)-differential privacy, as dp-accounting counts it.

    pip install dp-accounting
    python train.py --users 100 --participation 0.1 --clip-update 1 --dp-noise 4
"""

from support.runs.settings import Settings

WORTH = 0.01  # a δ above this is worth little: it is the chance that the guarantee fails


def epsilon(noise: float, rounds: int, users: int, called: int, delta: float) -> float:
    """ε of `rounds` averages, each of `called` users of `users`, drawn without replacement (Wang, Balle and
    Kasiviswanathan 2019), if one user's text were another. noise: z, in multiples of the updates' bound. Raises
    ImportError."""
    from dp_accounting import GaussianDpEvent, NeighboringRelation, SampledWithoutReplacementDpEvent
    from dp_accounting.rdp import RdpAccountant
    event = GaussianDpEvent(noise / 2)  # from −C to C: one update for another moves the sum by two bounds
    if called < users:
        event = SampledWithoutReplacementDpEvent(users, called, event)
    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE).compose(event, rounds)
    return float(accountant.get_epsilon(delta))


def guarantee(settings: Settings, users: int, called: int, rounds: int, whole: bool) -> dict:
    """What result.json says of privacy: nothing without noise; no ε without dp-accounting, or if averages aren't whole.

    whole: whether everyone who was called is in every average, since the noise is made for so many.
    """
    if not settings.dp_noise:
        return {}
    delta, found, why = settings.users ** -1.1, None, "an answer is missing from an average"
    try:
        if whole:
            found, why = epsilon(settings.dp_noise, rounds, users, called, delta), None
    except ImportError:
        why = "pip install dp-accounting"
    return {"privacy": {"epsilon": found, "delta": delta, "why": why}}


def sentence(told: dict) -> str:
    """A guarantee as a person reads it."""
    if told["epsilon"] is None:
        return f"privacy: no ε ({told['why']})"
    worth = "; worth little, with so large a δ" if told["delta"] > WORTH else ""
    return (f"privacy of a user, from whoever sees the averages only: ε = {told['epsilon']:.3g} at "
            f"δ = {told['delta']:.2g}{worth}")
