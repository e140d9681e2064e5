"""One outside system each; they know the core's values and the errors, nothing else of ours."""
