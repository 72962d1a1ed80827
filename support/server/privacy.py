"""The (ε, δ)-differential privacy that clipping and noise guarantee, computed by dp-accounting.

pip install dp-accounting
python train.py --users 100 --participation 0.1 --clip-update 1 --dp-noise 4
"""

LARGE_DELTA = 0.01  # δ is the probability that the guarantee fails; a larger one is too weak


def epsilon(noise: float, rounds: int, users: int, selected: int, delta: float) -> float:
    """ε of some rounds if one user's text is replaced by another. Raises ImportError.

    noise: z, in multiples of the maximum norm of an update. selected: users per round, drawn
    without replacement (Wang, Balle and Kasiviswanathan 2019).
    """
    from dp_accounting import GaussianDpEvent, NeighboringRelation, SampledWithoutReplacementDpEvent
    from dp_accounting.rdp import RdpAccountant

    # Another update moves the sum by up to two bounds, from −C to C.
    event = GaussianDpEvent(noise / 2)
    if selected < users:
        event = SampledWithoutReplacementDpEvent(users, selected, event)
    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
    accountant.compose(event, rounds)
    return float(accountant.get_epsilon(delta))


def guarantee(noise: float, users: int, selected: int, rounds: int, complete: bool) -> dict:
    """The entry `privacy` of result.json; {} without noise.

    There is no ε without dp-accounting, or if an average isn't complete. complete: whether each
    average contains all selected users, since the noise is chosen for that number.
    """
    if not noise:
        return {}
    delta = users**-1.1
    found, reason = None, None
    if complete:
        try:
            found = epsilon(noise, rounds, users, selected, delta)
        except ImportError:
            reason = "pip install dp-accounting"
    else:
        reason = "an upload is missing from an average"
    return {"privacy": {"epsilon": found, "delta": delta, "why": reason}}


def sentence(privacy: dict) -> str:
    """A guarantee as a sentence to print."""
    if privacy["epsilon"] is None:
        return f"privacy: no ε ({privacy['why']})"
    text = (
        "privacy of a user, from those who see the averages only: "
        f"ε = {privacy['epsilon']:.3g} at δ = {privacy['delta']:.2g}"
    )
    if privacy["delta"] > LARGE_DELTA:
        text += "; δ is too large for a useful guarantee"
    return text
