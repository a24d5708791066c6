"""Errors that a user can cause: each message says what was expected, what was found, what to do."""

import reprlib

# A terminal shows a message of this length without a search; "error: " comes before it.
_LONGEST = 290


def shortened(text: str, longest: int = 60) -> str:
    """Return a text in one line, its middle left out where it has more characters than that."""
    line = " ".join(text.split())
    if not line.isprintable():
        # What came from a file may hold commands for a terminal.
        line = "".join(c if c.isprintable() else _escaped(c) for c in line)
    if len(line) <= longest:
        return line
    end = longest // 3
    return f"{line[: longest - end - 1]}…{line[-end:]}"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class _Shown(reprlib.Repr):
    """Representations of bounded length, of any object."""

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write a number of more than some thousand digits.
        return repr(x) if abs(x) < 10**40 else f"<integer of {x.bit_length()} bits>"


_SHOWN = _Shown()
_SHOWN.maxstring = _SHOWN.maxother = 60


def shown(value: object) -> str:
    """Return how a value is shown in a message: one short line, whatever it is."""
    return shortened(_SHOWN.repr(value), 90)


class LminfError(Exception):
    """Base of every error a user can cause; the command line prints it in one line and exits 2.

    The message is one line of at most 290 characters: of a longer one the middle is left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message, _LONGEST))


def require_instance(name: str, value: object, kind: type) -> None:
    """Refuse an argument of another class.

    Raises:
        InputError: it is none of this one.
    """
    if not isinstance(value, kind):
        raise InputError(f"{name}={shown(value)}: must be a {kind.__name__}")


class ConfigError(LminfError, ValueError):
    """A setting is outside its rule; the message names the field, the value and the rule."""


class ModelError(LminfError):
    """The source model is missing, damaged or of a kind Λ-attention cannot serve."""


class ExportError(LminfError):
    """The export could not be written, or the traced graph is not what the contract asks for."""


class DependencyError(LminfError):
    """An installed package is of a version that has not what is needed; the line names versions."""


class BundleError(LminfError):
    """A bundle is missing, incomplete, altered or of another schema version."""


class EngineError(LminfError):
    """An engine cannot be built, or cannot run on this machine."""


class SessionError(LminfError):
    """A runtime session cannot be created or a step has failed."""


class InputError(LminfError, ValueError):
    """Token ids, lengths or a prompt that the model cannot take."""


class BusyError(LminfError):
    """More requests than an engine takes at once; the same one may be served a little later."""


class ParkingError(LminfError):
    """A store of parked sessions cannot be used."""


class StaleTurnError(ParkingError):
    """Another server has stored this turn already, or the session was removed meanwhile."""


class ParkedSessionError(LminfError):
    """A parked session must not be resumed: the store holds it, but not as it was written.

    Attributes:
        reason: "damaged", "foreign" (of another bundle or session) or "expired".
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
