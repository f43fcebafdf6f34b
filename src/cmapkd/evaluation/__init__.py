"""What a model is worth: retrieval and zero-shot classification, by protocols stated in docs/evaluation.md."""

from cmapkd.evaluation.run import EvaluationConfig, evaluate

__all__ = ["EvaluationConfig", "evaluate"]
