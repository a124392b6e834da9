"""Every error this package raises on its own account, except ``ValueError`` for a wrong argument."""


class MoeEpError(RuntimeError):
    """Base of the errors below: ``except MoeEpError`` catches whatever an exchange between ranks can raise."""


class NotBuiltError(MoeEpError):
    """A backend or extension module was asked for that is not installed here; the text says how to get it."""


class CapacityError(MoeEpError):
    """Routing needs more rows on a rank than its capacity gives. Raised on all ranks of the group.

    Attributes:
        rank: rank of the group whose rows overflowed.
        needed: rows that its routing asked for.
        given: rows that the capacity gives.
    """

    def __init__(self, message: str, *, rank: int, needed: int, given: int) -> None:
        super().__init__(message)
        self.rank = rank
        self.needed = needed
        self.given = given

    def __reduce__(self) -> tuple:
        return _rebuild, (type(self), str(self), {"rank": self.rank, "needed": self.needed, "given": self.given})


class PeerTimeoutError(MoeEpError):
    """A peer did not take part in an exchange within the timeout, or its connection broke.

    Attributes:
        ranks: ranks of the group that are missing or behind; empty where that cannot be known.
    """

    def __init__(self, message: str, *, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks

    def __reduce__(self) -> tuple:
        return _rebuild, (type(self), str(self), {"ranks": self.ranks})


class PeerAbortedError(MoeEpError):
    """A peer raised an error of its own instead of taking part in an exchange.

    Attributes:
        rank: rank of the group that raised.
        reason: the text of its error.
    """

    def __init__(self, message: str, *, rank: int, reason: str) -> None:
        super().__init__(message)
        self.rank = rank
        self.reason = reason

    def __reduce__(self) -> tuple:
        return _rebuild, (type(self), str(self), {"rank": self.rank, "reason": self.reason})


class ExchangeMismatchError(MoeEpError):
    """Ranks differ in settings, or issued different exchanges; the text shows both sides."""


class StaleHandleError(MoeEpError):
    """A handle of another dispatcher, group or device, or from before ``reset()``."""


class AgreedError(ValueError):
    """A wrong argument that every rank sees in the exchanged counts, so that all raise and none must be told."""


def _rebuild(kind: type, message: str, attributes: dict) -> MoeEpError:
    # NOTE: exceptions with keyword-only arguments do not unpickle by themselves, and errors cross process borders.
    return kind(message, **attributes)
