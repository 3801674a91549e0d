"""The questions of the paper, each a function from a model and a concept to tidy rows."""
