"""A first recipe for data that cmapkd has not seen: what they are, a student that fits, and the file."""

from cmapkd.starter.look import Looked, look
from cmapkd.starter.student import Measured, choose_student
from cmapkd.starter.teacher import check_teacher
from cmapkd.starter.weights import weights_said
from cmapkd.starter.write import compose, write_recipe

__all__ = ["Looked", "Measured", "check_teacher", "choose_student", "compose", "look", "weights_said", "write_recipe"]
