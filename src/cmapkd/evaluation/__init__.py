"""What a model is worth and what it costs, by protocols stated in docs/evaluation.md."""

from cmapkd.evaluation.config import EvaluationConfig, SuiteConfig
from cmapkd.evaluation.run import evaluate
from cmapkd.evaluation.suite import evaluate_models

__all__ = ["EvaluationConfig", "SuiteConfig", "evaluate", "evaluate_models"]
