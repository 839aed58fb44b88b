"""Sources: numbered samples read where they lie, by an index made once.

WebDataset tars, Parquet, JSON lines with media beside them, LLaVA's JSON lists, Hugging Face ``datasets`` folders; on
disks and in object stores.
"""

from omni_ray.data.sources.base import FileSource, read_together
from omni_ray.data.sources.opening import WebDatasetSource, holds_shards, is_there, open_configured, open_path
from omni_ray.data.sources.storage import ReadLimits, Storage
from omni_ray.data.sources.tar import sample_from_members

__all__ = [
    "FileSource",
    "ReadLimits",
    "Storage",
    "WebDatasetSource",
    "holds_shards",
    "is_there",
    "open_configured",
    "open_path",
    "read_together",
    "sample_from_members",
]
