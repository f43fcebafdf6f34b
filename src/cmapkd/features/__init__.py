"""What is done with a model's features before an objective sees them: gathering across processes, projecting."""

from cmapkd.features.gather import gather_features
from cmapkd.features.projector import PairProjector

__all__ = ["PairProjector", "gather_features"]
