"""A real Wan model, and the backbone that drives it and the pocket model alike."""

from kvpo_min.wan.backbone import CausalProcessor, WanBackbone

__all__ = ["CausalProcessor", "WanBackbone"]
