"""Models in the formats of other tools, each compared with the model before it is kept."""
