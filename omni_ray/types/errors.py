"""One tree of errors: each names the thing, the value and the mend."""

from __future__ import annotations


class OmniError(Exception):
    """Base of every error that omni_ray raises on purpose; its text is one clear sentence for the user."""


class ConfigError(OmniError, ValueError):
    """A recipe or model setting that cannot be."""


class DataError(OmniError):
    """A source, shard or sample that cannot be used as it is."""


class MediaError(DataError):
    """Picture, sound or video bytes that cannot be decoded or lie outside the stated limits."""


class StorageError(OmniError):
    """A file that is there and does not answer (stalled disk, lost connection, no permission).

    Not a DataError: nothing is wrong with the sample, and leaving it out would let the order depend on the disk's mood.
    """


class PlanError(OmniError):
    """A step plan that contradicts itself (overlapping routes, unknown ranks, wrong sizes)."""


class CheckpointError(OmniError):
    """A checkpoint directory that is not whole, not ours, or does not fit the model."""


class ResourceError(OmniError):
    """Hardware, memory, ports or cluster capacity that is not there."""


class HangError(OmniError):
    """A pool, rank and phase that did not answer within the recipe's time-out, or lost a peer."""


class RequestError(OmniError):
    """A request of a client that cannot be answered as it stands."""


class NotYetError(OmniError):
    """A part of the public surface whose implementation comes later; refused by name, exit code 1."""

    def __init__(self, feature: str, instead: str = "") -> None:
        mend = f"; {instead}" if instead else ""
        super().__init__(f"{feature} is not built yet in this version{mend}")
        self.feature = feature
