"""The networks: single-device mathematics. With any of them comes the hook that lets optimizer writes be seen."""

from omni_ray.models import changed_weights as changed_weights
