"""Data that models write: questions, facts and answers of a teacher that filters keep, as a source like any other."""

from cmapkd.engine.config import EngineConfig, list_engine_recipes, load_engine
from cmapkd.engine.run import Engine, EngineResult, check_recipe, told

__all__ = ["Engine", "EngineConfig", "EngineResult", "check_recipe", "list_engine_recipes", "load_engine", "told"]
