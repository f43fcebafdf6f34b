"""How a query of a gallery ends, by name and label: with a teacher beside the student, without, and unjudged."""

OUTCOMES = {
    "lost": "Teacher right, student wrong",
    "won": "Student right, teacher wrong",
    "both": "Both right",
    "neither": "Both wrong",
}
ALONE = {"wrong": "Student wrong", "right": "Student right"}
UNJUDGED = {"described": "Descriptions"}
