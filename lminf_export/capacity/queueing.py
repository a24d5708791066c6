"""Waiting for one of several servers: the M/M/c queue.

Arrivals are Poisson, service times exponential. Source: A. K. Erlang, "Solution of some problems
in the theory of probabilities of significance in automatic telephone exchanges" (1917).
"""

from __future__ import annotations

import math


def waiting_probability(servers: int, load: float) -> float:
    """Return Erlang's C: the share of arrivals that wait.

    Args:
        servers: c ≥ 1.
        load: arrival rate / service rate of one server, in erlangs; at c and above all wait.
    """
    if load >= servers:
        return 1.0
    blocked = 1.0  # Erlang's B, by its recursion, which neither overflows nor cancels
    for count in range(1, servers + 1):
        blocked = load * blocked / (count + load * blocked)
    return blocked / (1 - load / servers * (1 - blocked))


def waits_longer(servers: int, arrivals: float, service: float, seconds: float) -> float:
    """Return the share of arrivals that wait longer than some time.

    Args:
        servers: c ≥ 1.
        arrivals: rate of all arrivals, per second.
        service: rate of one server, per second.
        seconds: the time.
    """
    spare = servers * service - arrivals
    if spare <= 0:
        return 1.0
    return waiting_probability(servers, arrivals / service) * math.exp(-spare * seconds)


def mean_wait(servers: int, arrivals: float, service: float) -> float:
    """Return the mean wait in seconds; infinite where more comes than is served."""
    spare = servers * service - arrivals
    if spare <= 0:
        return math.inf
    return waiting_probability(servers, arrivals / service) / spare


def most_arrivals(servers: int, service: float, seconds: float, share: float) -> float:
    """Return the largest arrival rate at which no more than a share waits longer than a time.

    Args:
        servers: c ≥ 1.
        service: rate of one server, per second.
        seconds: the time.
        share: 0 … 1, such as 0.01.
    """
    low, high = 0.0, servers * service
    for _ in range(100):
        middle = (low + high) / 2
        if not low < middle < high:
            break  # neighbours
        if waits_longer(servers, middle, service, seconds) <= share:
            low = middle
        else:
            high = middle
    return low
