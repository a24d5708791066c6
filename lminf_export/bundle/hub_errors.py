"""The errors of the Hugging Face hub's client, as one line of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lminf_export.errors import LminfError


@contextmanager
def hub_errors_as(
    kind: type[LminfError], name: str, revision: str | None = None, *, lacks: str | None = None
) -> Iterator[None]:
    """Raise errors of the hub, and of the way to it, as errors of ours.

    Args:
        kind: of error.
        name: what was asked for, as the line begins.
        revision: the one asked for.
        lacks: end of the line where a repository does not hold the file that was asked for.

    Raises:
        LminfError: of that kind.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise kind(f"{name}: no such folder, and not a valid hub id") from error
    except errors.RevisionNotFoundError as error:
        raise kind(f"{name}: the hub has no revision {revision!r} of it") from error
    except errors.GatedRepoError as error:
        raise kind(
            f"{name} is gated: accept its terms on the hub and log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise kind(
            f"{name}: no such folder here, and the hub does not know it or keeps it private; "
            "check the spelling, or log in with `hf auth login`"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise kind(
            f"{name}: no such folder here, not in the hub's cache, and the hub could not be "
            "reached; check the spelling, the network or HF_HUB_OFFLINE"
        ) from error
    except errors.EntryNotFoundError as error:
        raise kind(f"{name} {lacks or 'lacks a file that was asked for'}") from error
    except (errors.OfflineModeIsEnabled, transport_error(), OSError) as error:
        lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
        reason = lines[0][:150] if lines else type(error).__name__
        raise kind(f"{name}: the hub could not do it: {reason}") from error


def transport_error() -> type[Exception]:
    """Return the base of what the HTTP library raises: requests or httpx, by the hub's release."""
    from huggingface_hub.errors import HfHubHTTPError

    base: type[Exception] = HfHubHTTPError.__bases__[0]
    return base
